"""A speed-up over fresh processes: the same comparison, started anew, so that what processes do not
share (where buffers lie, what the allocator holds, which moment they had) is in the interval.

Kalibera & Jones 2013 (ISMM) and Mytkowicz et al. 2009 (ASPLOS) say why one process is one sample.
A server is started once: a plain interpreter that has imported torch and computed nothing. For each
process of a comparison it forks a child that unpacks both arms, warms them up, times a short series
of interleaved rounds, answers, and ends. A fork of that server costs some 20 ms where a new program
costs two seconds. Forks of one server start from one heap, so each child first leaves holes of
random sizes in it; comparisons from one server then spread as far as comparisons from as many
programs. `course selftest` asks ten programs. Where there is no safe fork (macOS, Windows) five
servers are started and kept instead.

What it costs: two seconds and some 300 MB once a chapter, for the server; then, for each comparison
of twelve processes, its own seconds and about one more for unpacking and warming up small networks,
a second a process for a ResNet-50 or a compiled network (from the compiler's cache). What the first
child has to import, the server imports before it forks the next one (`preload`).
"""

import atexit
import contextlib
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from course_utils import ROOT
from course_utils.measure import preload, travel
from course_utils.measure.arms import (
    Arm,
    MeasurementError,
    Sampler,
    agreed_threads,
    as_arm,
    graphs_compiled,
    refuse_compilation,
    refuse_two_modes,
)
from course_utils.measure.resources import release
from course_utils.measure.stats import MIN_PROCESSES, decide, speedup
from course_utils.measure.timing import Comparison, interleaved

FORKS = sys.platform == "linux"
PROCESSES = 12


def across(
    baseline: Callable[[], object] | Arm,
    candidate: Callable[[], object] | Arm,
    *,
    seconds: float = 3.0,
    processes: int | None = None,
    threads: int | None = None,
    clock: str = "wall",
    across_modes: bool = False,
    timeout: float = 300.0,
) -> Comparison:
    """How much faster `candidate` is than `baseline`, with a 95% interval over fresh processes.

    The arms are copied into `processes` processes (twelve), one after the other; each warms them up
    and times interleaved rounds for `seconds / processes` (one at least). Its median ratio is one
    value; the interval is `over_processes` of them. The number of processes is fixed beforehand, so
    nothing is stopped by luck. What the arms hold (models, inputs, ONNX Runtime sessions) travels
    by value: a change they make stays in the child.

    Raises MeasurementError where `compare` would, and for arms that cannot travel (an open socket,
    a running process); ValueError for fewer than five processes; TimeoutError after `timeout`
    seconds.

    >>> import time
    >>> across(lambda: time.sleep(2e-3), lambda: time.sleep(1e-3), seconds=0.2, processes=5).scope
    '5 fresh processes'
    """
    a, b = as_arm(baseline, "baseline"), as_arm(candidate, "candidate")
    processes, threads = how_many(processes), agreed_threads(a, b, threads, clock)
    release()  # the children are about to need what this process holds free
    with tempfile.NamedTemporaryFile(prefix="course-arms-", delete=False) as file:
        try:
            travel.pack((a, b), file)
            file.close()  # Windows opens it once at a time
            each = seconds / processes
            job = Job(file.name, each, threads, clock, across_modes, timeout)
            found = _crew().run(job, processes)
        finally:
            file.close()
            Path(file.name).unlink()
    result = speedup([s.ratio for s in found], processes=True)
    seconds_each, cores, faults = (
        tuple(map(float, np.median([getattr(s, name) for s in found], axis=0)))
        for name in ("seconds", "cores", "faults")
    )
    return Comparison(
        ratio=result.value,
        low=result.low,
        high=result.high,
        verdict=decide(result.low, result.high),
        baseline=a.spent(),
        candidate=b.spent(),
        baseline_seconds=seconds_each[0],
        candidate_seconds=seconds_each[1],
        rounds=sum(s.rounds for s in found),
        threads=threads,
        clock=clock,
        ratios=tuple(s.ratio for s in found),
        processes=len(found),
        cores=cores,
        faults=faults,
    )


def how_many(processes: int | None) -> int:
    """The number of processes asked for, or twelve; the profile smoke, which tests that everything
    runs, makes do with five. Raises ValueError below five.

    >>> how_many(8) in (5, 8)
    True
    """
    wanted = PROCESSES if processes is None else processes
    if wanted < MIN_PROCESSES:
        raise ValueError(f"processes is {wanted}; an interval needs {MIN_PROCESSES} at least.")
    return MIN_PROCESSES if os.environ.get("COURSE_PROFILE") == "smoke" else wanted


@dataclass(frozen=True)
class Job:
    """What a child needs to know: the file with both arms, how to time them, where it is."""

    arms: str
    seconds: float
    threads: int
    clock: str
    across_modes: bool
    timeout: float
    path: list[str] = field(default_factory=lambda: list(sys.path))
    folder: str = field(default_factory=os.getcwd)


@dataclass(frozen=True)
class Series:
    """What one process saw, of the baseline and of the candidate: see `Comparison`."""

    ratio: float
    seconds: tuple[float, float]
    cores: tuple[float, float]
    faults: tuple[float, float]
    rounds: int


def series(job: Job) -> Series:
    """Time both arms of a job in this process."""
    held = scattered_holes()
    with Path(job.arms).open("rb") as file:
        arms = travel.unpack(file)
    order = random.sample((0, 1), 2)  # which arm warms up first, and takes the first memory
    made = {k: Sampler(arms[k], job.threads, job.clock) for k in order}
    first, second = made[0], made[1]
    if not job.across_modes:
        refuse_two_modes(first, second)
    one_round, times, graphs = interleaved(first, second), [], graphs_compiled()
    start = time.perf_counter()
    while not times or time.perf_counter() - start < job.seconds:
        times.append(one_round())
    refuse_compilation(graphs, first.arm, second.arm)
    del held
    seconds = np.array(times)
    return Series(
        float(np.median(seconds[:, 0] / seconds[:, 1])),
        tuple(map(float, np.median(seconds, axis=0))),
        (first.cores, second.cores),
        (first.faults, second.faults),
        len(times),
    )


def scattered_holes(blocks: int = 96) -> list[torch.Tensor]:
    """Leave holes of random sizes in the heap, so that weights, inputs and outputs lie elsewhere in
    each process: forks of one server start from one heap. Keep what is returned while you measure.
    """
    sizes = [int(2 ** random.uniform(6, 22)) for _ in range(blocks)]  # 64 bytes to 4 MiB
    taken = [torch.empty(size, dtype=torch.uint8) for size in sizes]
    return random.sample(taken, blocks // 2)


class Crew:
    """The servers of this process. One that can fork is enough; without forks there are five."""

    def __init__(self) -> None:
        self.servers = [_Server() for _ in range(1 if FORKS else MIN_PROCESSES)]

    def run(self, job: Job, processes: int) -> list[Series]:
        """One Series a process. A child's refusal or error is raised here."""
        servers = self.servers * (processes if FORKS else 1)
        try:
            for server in self.servers:
                server.send(job)
            return [_series_or_raise(server.ask(job.timeout)) for server in servers]
        except BaseException as error:
            if not isinstance(error, MeasurementError):  # Ctrl-C or a broken server: start anew
                end()
            raise


class _Server:
    """One interpreter that holds torch ready; it takes a job, then answers once a question."""

    def __init__(self) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by end())
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # children compile alone, without a pool
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # looking for a GPU must not spoil the forks
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "course_utils.measure.fresh"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
            start_new_session=True,
        )

    def send(self, message: object) -> None:
        try:
            _write(self.process.stdin, message)
        except BrokenPipeError:
            raise self._ended() from None

    def ask(self, timeout: float) -> tuple[str, object]:
        late = threading.Event()

        def stop() -> None:
            late.set()
            self.kill()

        clock = threading.Timer(timeout, stop)
        clock.start()
        try:
            self.send("go")
            return _read(self.process.stdout)
        except EOFError:
            if late.is_set():
                raise TimeoutError(
                    f"a process of the comparison was still at work after {timeout:.0f} s and was"
                    " stopped."
                ) from None
            raise self._ended() from None
        finally:
            clock.cancel()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            if FORKS:
                os.killpg(self.process.pid, signal.SIGKILL)  # its children, too
            else:
                self.process.kill()
        self.process.wait()

    def _ended(self) -> RuntimeError:
        self.process.wait()
        self.errors.seek(0)
        return RuntimeError(
            f"the server of fresh processes ended with {self.process.returncode}:"
            f"\n{self.errors.read()[-3000:]}"
        )


_here: list[tuple[int, Crew]] = []  # at most one, with the process that started it


def _crew() -> Crew:
    if _here and _here[0][0] != os.getpid():
        _here.clear()  # a fork of ours: the servers belong to the parent
    if not _here:
        _here.append((os.getpid(), Crew()))
        atexit.register(end)
    return _here[0][1]


def servers() -> list[int]:
    """Process numbers of the servers that wait at the moment."""
    return [server.process.pid for _, crew in _here for server in crew.servers]


def end() -> None:
    """End the servers of fresh processes; the next comparison starts new ones (two seconds)."""
    if _here and _here[0][0] == os.getpid():
        for server in _here.pop()[1].servers:
            server.kill()
            for pipe in (server.process.stdin, server.process.stdout, server.errors):
                with contextlib.suppress(OSError):
                    pipe.close()


def _series_or_raise(answer: tuple[str, object]) -> Series:
    kind, said = answer
    if kind == "series":
        return said
    if kind == "refused":
        raise MeasurementError(said)
    raise MeasurementError(f"a fresh process could not run the comparison:\n{said}")


def _write(pipe: BinaryIO, message: object) -> None:
    data = pickle.dumps(message)
    pipe.write(len(data).to_bytes(8, "little") + data)
    pipe.flush()


def _read(pipe: BinaryIO) -> object:
    size = pipe.read(8)
    if len(size) < 8:
        raise EOFError
    return pickle.loads(pipe.read(int.from_bytes(size, "little")))


# ------------------------------------------------------------------- from here on: in the server


def serve() -> None:
    """Take jobs and answer until the other side closes the pipe."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    job, forked = None, 0
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            message = _read(requests)
            if message != "go":
                job, forked = message, 0
                _prepare(job)
            elif FORKS:
                answer, imported = _forked(job)
                _write(answers, answer)
                if not forked:
                    preload.load(imported)
                forked += 1
            else:
                _write(answers, _answer(job))


def _prepare(job: Job) -> None:
    """Import what the arms need before the fork, so that no child pays for it."""
    sys.path[:] = job.path
    with contextlib.suppress(OSError):
        os.chdir(job.folder)
    with Path(job.arms).open("rb") as file:
        names = travel.modules(file)
    release()
    preload.load(names)


def _answer(job: Job) -> tuple[str, object]:
    try:
        return "series", series(job)
    except MeasurementError as error:
        return "refused", str(error)
    except BaseException:
        return "error", traceback.format_exc()[-3000:]


def _forked(job: Job) -> tuple[tuple[str, object], list[str]]:
    """The answer of a fresh process, and what it had to import."""
    read, write = os.pipe()
    before = list(sys.modules)
    pid = os.fork()
    if pid == 0:
        signal.alarm(int(job.timeout) + 1)  # should everybody else be gone, the child ends, too
        with os.fdopen(write, "wb") as pipe:
            _write(pipe, (_answer(job), preload.imported_since(before)))
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        try:
            answer, imported = _read(pipe)
        except EOFError:
            answer, imported = None, []
    status = os.waitpid(pid, 0)[1]
    if answer is None:
        code = os.waitstatus_to_exitcode(status)
        answer = "error", f"it ended with {code} (a negative number is a signal) and said nothing."
    return answer, imported


if __name__ == "__main__":
    import course_utils.measure.fresh as module  # the job's classes have this module's name

    module.serve()
