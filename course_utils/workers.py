"""Processes that run a model for an event loop. Arrays reach them through shared memory: of a
batch, only two numbers travel through a pipe, and a word comes back.

The event loop's process owns the memory: it makes each segment and removes it, so that nothing is
left whatever becomes of a worker. A worker that dies, or that computes beyond its caller's patience
and is killed for it, is replaced.
"""

import asyncio
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from multiprocessing import shared_memory

import numpy as np

from course_utils import ROOT
from course_utils.batching import Died
from course_utils.embed import VECTOR, pad

__all__ = ["Workers"]

PLACES, ROWS = 2**15, 512
"""The largest batch: rows times the longest row, and rows."""
_OUT = 8 * PLACES  # where the vectors begin in the segment


class Workers:
    """`count` processes that each hold the model `factory(argument)`, with factory written
    "module:name"; a model is a function from lists of token numbers to vectors (B, 384).

    `run` is what a Batcher wants. It raises Died when the process ends in the middle of a batch,
    RuntimeError with the model's own words when the model raises, ValueError for a batch that does
    not fit into the segment. Cancelled, it kills the process: nothing else stops a computation.

    >>> workers = Workers("course_utils.embed:Model", "minilm.onnx", count=2)
    >>> workers.starts
    0
    """

    def __init__(self, factory: str, argument: str, count: int) -> None:
        self.factory, self.argument = factory, str(argument)
        self.count, self.starts = count, 0
        self.free: asyncio.Queue[_Worker] = asyncio.Queue()
        self.replacing: set[asyncio.Task] = set()

    async def start(self) -> None:
        """Start all of them; they are ready when this returns."""
        for worker in await asyncio.gather(*(self._open() for _ in range(self.count))):
            self.free.put_nowait(worker)

    async def run(self, lists: Sequence[Sequence[int]]) -> np.ndarray:
        """Vectors (B, 384) of a batch, computed by a free worker."""
        ids, mask = pad(lists)
        if ids.size > PLACES or len(ids) > ROWS:
            raise ValueError(f"a batch of {ids.shape} is larger than the workers' memory")
        while (worker := await self.free.get()).process.returncode is not None:
            self._replace(worker)  # it died while it had nothing to do: no request is to blame
        sound = False
        try:
            vectors = await worker.run(ids, mask)
            sound = True
            return vectors
        except RuntimeError:  # the model raised; its process is as good as before
            sound = True
            raise
        finally:
            if sound:
                self.free.put_nowait(worker)
            else:  # it died, or we were cancelled while it computes
                self._replace(worker)

    async def stop(self) -> None:
        """End all of them and remove their memory."""
        await asyncio.gather(*self.replacing, return_exceptions=True)
        while not self.free.empty():
            await self.free.get_nowait().close()

    async def _open(self) -> "_Worker":
        self.starts += 1
        return await _Worker.open(self.factory, self.argument)

    def _replace(self, worker: "_Worker") -> None:
        task = asyncio.create_task(self._new_for(worker))
        self.replacing.add(task)
        task.add_done_callback(self.replacing.discard)

    async def _new_for(self, worker: "_Worker") -> None:
        await worker.close()
        while True:
            try:
                self.free.put_nowait(await self._open())
                return
            except (OSError, Died):  # the machine may be short of something for a while
                await asyncio.sleep(1.0)


class _Worker:
    """One process and the segment that it shares with us."""

    @classmethod
    async def open(cls, factory: str, argument: str) -> "_Worker":
        self = cls()
        self.segment = shared_memory.SharedMemory(create=True, size=_OUT + 4 * VECTOR * ROWS)
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        program = "from course_utils import workers; workers.serve()"
        command = [sys.executable, "-c", program, self.segment.name, factory, argument]
        self.process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
        )
        if await self.process.stdout.readline() != b"ready\n":
            await self.close()
            raise Died("a worker ended before it was ready")
        return self

    async def run(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        # 0 stands for padding: a list that holds it itself would lose a token
        np.ndarray(ids.shape, np.int64, self.segment.buf)[:] = np.where(mask == 1, ids, -1)
        try:
            self.process.stdin.write(b"%d %d\n" % ids.shape)
            await self.process.stdin.drain()
            said = await self.process.stdout.readline()
        except (BrokenPipeError, ConnectionResetError):
            said = b""
        if said == b"done\n":  # copied: the next batch writes to the same place
            return np.ndarray((len(ids), VECTOR), np.float32, self.segment.buf, _OUT).copy()
        if said:
            raise RuntimeError(said.decode().strip())
        raise Died("the worker process ended while it computed this batch")

    async def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()  # or it stays in the table of processes as a zombie
        self.process.stdin.close()
        self.segment.close()
        self.segment.unlink()


def serve() -> None:
    """A worker's own program: NAME FACTORY ARGUMENT. It ends when its input ends."""
    name, factory, argument = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    segment = attach(name)
    module, _, function = factory.partition(":")
    model = getattr(importlib.import_module(module), function)(argument)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        rows, columns = map(int, line.split())
        ids = np.ndarray((rows, columns), np.int64, segment.buf)
        try:
            vectors = np.ndarray((rows, VECTOR), np.float32, segment.buf, _OUT)
            vectors[:] = model([row[row >= 0].tolist() for row in ids])
            said = "done"
        except Exception as error:
            said = f"{type(error).__name__}: {error}".replace("\n", " ")
        print(said, file=answers, flush=True)


def attach(name: str) -> shared_memory.SharedMemory:
    """The owner removes the segment, not whoever looks at it: before Python 3.13 looking registers
    it for removal, too.
    """
    if sys.version_info >= (3, 13):
        return shared_memory.SharedMemory(name, track=False)
    from multiprocessing import resource_tracker

    register, resource_tracker.register = resource_tracker.register, lambda *_: None
    try:
        return shared_memory.SharedMemory(name)
    finally:
        resource_tracker.register = register
