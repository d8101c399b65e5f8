"""A batcher that survives: every caller gets one outcome, its own output or an error that says why,
whatever the model, the callers and the operating system do.

Chapter 13 builds up to it. Read it from top to bottom: `ask` is what a caller sees; `_next` decides
when a batch leaves and `_pick` who is in it; `_answer` gives everybody their own and cuts a batch
that failed; `_run` sees to it that a call of the model ends.
"""

import asyncio
import collections
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

__all__ = ["Batcher", "Bill", "Closed", "Died", "Full"]

PATIENCE, COSTLY_PATIENCE = 15, 4
"""Calls of the model for one batch, none of which succeeded, after which the model is to blame and
not a request; the second number is for calls that cost a time limit or a process each."""


class Full(Exception):
    """The queue holds as many requests as it may: ask again later."""


class Closed(Exception):
    """The batcher takes no new requests."""


class Died(Exception):
    """The process that computed a batch ended in the middle of it."""


@dataclass(eq=False)
class Request:
    """One caller's input, its size (tokens, say), when it came, and where its output goes."""

    item: object
    size: int
    came: float
    future: asyncio.Future


@dataclass
class Bill:
    """What the answers have cost: calls of the model and how many of them failed, items put into
    all calls, items put in again because a call had failed, outputs for callers who had gone.

    >>> Bill(calls=3, items=40)
    Bill(calls=3, failed=0, items=40, again=0, gone=0)
    """

    calls: int = 0
    failed: int = 0
    items: int = 0
    again: int = 0
    gone: int = 0


class Batcher:
    """Joins single requests into batches. `run` is an async function from a list of inputs to as
    many outputs, in the same order. Must be made inside a running event loop.

    A batch leaves when `max_batch` requests wait, or when the oldest has waited `max_wait` seconds;
    with 0 whatever waits leaves as soon as the model is free. More than `max_queue` waiting are
    refused. `workers` batches may run at the same time; a call that takes longer than `limit`
    seconds is given up. With `size`, a function from an input to its length, a batch holds the
    oldest request and those nearest to it in length, and with `budget` at most so many places, the
    number of requests times the longest of them.

    >>> async def double(items):
    ...     return [2 * i for i in items]
    >>> async def main():
    ...     batcher = Batcher(double, max_batch=4)
    ...     answers = await asyncio.gather(*(batcher.ask(i) for i in range(6)))
    ...     await batcher.close()
    ...     return answers, batcher.bill.calls
    >>> asyncio.run(main())
    ([0, 2, 4, 6, 8, 10], 2)
    """

    def __init__(
        self,
        run: Callable[[list], Awaitable[Sequence]],
        *,
        max_batch: int = 32,
        max_wait: float = 0.0,
        max_queue: int = 1000,
        workers: int = 1,
        limit: float = 30.0,
        size: Callable[[object], int] | None = None,
        budget: int | None = None,
    ) -> None:
        if max_batch < 1 or workers < 1 or max_queue < 1:
            raise ValueError(
                f"max_batch, workers and max_queue are at least 1; got {max_batch}, {workers},"
                f" {max_queue}."
            )
        self.run, self.max_batch, self.max_wait, self.max_queue = (
            run,
            max_batch,
            max_wait,
            max_queue,
        )
        self.limit, self.size, self.budget = limit, size, budget
        self.waiting: dict[Request, None] = {}  # in the order in which they came
        self.places = 0  # the sizes of all that wait
        self.some, self.enough = asyncio.Event(), asyncio.Event()
        self.turn, self.closing = asyncio.Lock(), False
        self.bill = Bill()
        self.log: collections.deque[tuple[int, int, float]] = collections.deque(maxlen=20_000)
        self.tasks = [asyncio.create_task(self._work()) for _ in range(workers)]

    async def ask(self, item: object) -> object:
        """The output for `item`. Raises Full, Closed, or what went wrong for this item: the model's
        own error, TimeoutError, Died. A caller who is cancelled leaves the queue at once.
        """
        if self.closing:
            raise Closed("the server is shutting down and takes no new requests")
        if len(self.waiting) >= self.max_queue:
            raise Full(f"{self.max_queue} requests are waiting already; ask again later")
        loop = asyncio.get_running_loop()
        size = self.size(item) if self.size else 1
        request = Request(item, size, loop.time(), loop.create_future())
        self.waiting[request] = None
        self.places += size
        self.some.set()
        if self._is_enough():
            self.enough.set()
        try:
            return await request.future
        finally:
            self._leave(request)

    async def close(self) -> None:
        """Take nothing new, answer everything that waits without a further wait, then stop."""
        self.closing = True
        self.some.set(), self.enough.set()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    # ------------------------------------------------------------------ when a batch leaves

    async def _work(self) -> None:
        batch: list[Request] = []
        try:
            while batch := await self._next():
                await self._answer(batch)
        finally:  # closed and empty; or stopped from outside, and then nobody else would answer
            stopped = Closed("the batcher was stopped")
            for request in batch:
                _fail(request, stopped)
            if all(task.done() or task is asyncio.current_task() for task in self.tasks):
                self.closing = True
                for request in list(self.waiting):
                    _fail(request, stopped)

    async def _next(self) -> list[Request]:
        """The next batch; [] when closed and empty. One worker at a time collects: two would
        collect two half batches.
        """
        loop = asyncio.get_running_loop()
        async with self.turn:
            while True:
                await self.some.wait()
                if not self.waiting:  # closed, or everybody who waited has gone
                    if self.closing:
                        return []
                    self.some.clear()
                    continue
                oldest = next(iter(self.waiting))
                left = oldest.came + self.max_wait - loop.time()
                if left <= 0 or self.closing or self._is_enough():
                    return self._pick()
                self.enough.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await self.enough.wait()

    def _is_enough(self) -> bool:
        if self.budget and self.places >= self.budget:
            return True
        return len(self.waiting) >= self.max_batch

    def _pick(self) -> list[Request]:
        """Take the oldest request out of the queue, and those that go with it."""
        oldest, *others = self.waiting
        if self.size:
            others.sort(key=lambda request: abs(request.size - oldest.size))
        batch, longest = [oldest], oldest.size
        for request in others:
            longest = max(longest, request.size)
            over = self.budget and (len(batch) + 1) * longest > self.budget
            if len(batch) == self.max_batch or over:
                break
            batch.append(request)
        for request in batch:
            self._leave(request)
        return batch

    def _leave(self, request: Request) -> None:
        if request in self.waiting:
            del self.waiting[request]
            self.places -= request.size

    # ------------------------------------------------------------------ who gets what

    async def _answer(self, batch: list[Request]) -> None:
        """Give everybody in the batch an outcome. A call that failed is cut into halves, and each
        is tried again, until the guilty request is alone; if the call cost a process or a time
        limit, its requests are tried one by one, so that a request takes two of those with it and
        not one for each halving.
        """
        pieces, tried, answered = collections.deque([batch]), 0, False
        while pieces:
            piece = [r for r in pieces.popleft() if not r.future.done()]  # the gone cost nothing
            if not piece:
                continue
            self.bill.again += len(piece) if tried else 0
            tried += 1
            try:
                outputs = await self._run(piece)
            except _Failed as failed:
                self.bill.failed += 1
                costly = isinstance(failed.error, Died | TimeoutError)
                if len(piece) == 1:
                    _fail(piece[0], failed.error)
                elif costly:
                    pieces.extend([request] for request in piece)
                else:
                    middle = len(piece) // 2
                    pieces.extend((piece[:middle], piece[middle:]))
                if not answered and tried >= (COSTLY_PATIENCE if costly else PATIENCE):
                    for request in (r for rest in pieces for r in rest):
                        _fail(request, failed.error)
                    return
                continue
            answered = True
            for request, output in zip(piece, outputs, strict=True):
                if request.future.done():  # gone while the batch ran
                    self.bill.gone += 1
                else:
                    request.future.set_result(output)

    async def _run(self, piece: list[Request]) -> list:
        """One call of the model, that ends: with as many outputs as there are requests, or with
        _Failed. The call is a task of its own, so that whatever it raises, being cancelled too,
        does not end the worker that waits for it.
        """
        loop = asyncio.get_running_loop()
        start, longest = loop.time(), max(request.size for request in piece)
        self.bill.calls += 1
        self.bill.items += len(piece)
        call = None
        try:
            call = asyncio.create_task(self._call([request.item for request in piece]))
            await asyncio.wait([call], timeout=self.limit)
            if not call.done():
                raise _Failed(TimeoutError(f"the model took longer than {self.limit:g} s"))
            if call.cancelled():
                raise _Failed(RuntimeError("the model's call was cancelled"))
            if (error := call.exception()) is not None:
                raise _Failed(error)
            outputs = list(call.result())
            if len(outputs) != len(piece):
                raise ValueError(f"{len(outputs)} outputs for {len(piece)} inputs")
        except Exception as error:
            raise error if isinstance(error, _Failed) else _Failed(error) from None
        finally:
            if call and not call.done():  # too late, or the worker itself is stopped
                call.cancel()
                call.add_done_callback(lambda late: late.cancelled() or late.exception())
        self.log.append((len(piece), longest, loop.time() - start))
        return outputs

    async def _call(self, items: list) -> Sequence:
        return await self.run(items)


class _Failed(Exception):
    """A call of the model that gave no outputs; `error` is what its callers are told."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        # a future takes no StopIteration, and GeneratorExit would end its caller
        plain = isinstance(error, Exception) and not isinstance(error, StopIteration)
        self.error = error if plain else RuntimeError(f"the model raised {type(error).__name__}")


def _fail(request: Request, error: Exception) -> None:
    if not request.future.done():
        request.future.set_exception(error)
