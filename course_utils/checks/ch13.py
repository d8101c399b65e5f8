"""Checks of chapter 13, Dynamic batching."""

import asyncio
import bisect
import functools
import inspect
import math
import time
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np

from course_utils.checks.accept import apart, close, number, said, sequence, whole
from course_utils.checks.clock import Clock, Loop, told_to
from course_utils.exercises import Probe, Wrong, exercise


@exercise("13.A")
def mean_inside(answer: Probe, rng: np.random.Generator) -> None:
    """The area under the number inside, divided by the window: Little's law."""
    cases = [
        ([0.0, 1.0], [2.0, 4.0]),
        ([5.0], [7.5]),
        ([0, 1, 2], [9, 3, 4]),  # the last to come is not the last to be answered
        ([2, 0, 1], [4, 9, 3]),  # and the first in the list not the first to come
        ([0, 100], [1, 101]),  # nobody is inside most of the time
        ([-4.0, -1.0], [-2.0, 0.0]),
        ([], []),
        ([3.0], [3.0]),
        ([3.0, 3.0], [3.0, 3.0]),
        ([0.0, 5.0], [2.0, 5.0]),  # one that is answered as it comes
        ([0.0, 1.0], [0.0, 3.0]),
    ]
    for _ in range(6):
        arrived = rng.uniform(0, 10, int(rng.integers(2, 30)))
        cases.append((arrived.tolist(), (arrived + rng.exponential(2, len(arrived))).tolist()))
    for arrived, finished in cases:
        few = len(arrived) < 4
        where = f"arrivals {arrived}, answers {finished}" if few else f"{len(arrived)} requests"
        got, want = (
            number(answer(list(arrived), list(finished)), where),
            _counted(arrived, finished),
        )
        if not close(got, want, rel=1e-6, absolute=1e-9):
            yours, due = apart(got, want)
            raise Wrong(f"{where}: counted, {due} are inside on average; you return {yours}.")


def _counted(arrived: list[float], finished: list[float]) -> float:
    """Walk over the events and add up (number inside) · (time until the next event)."""
    events = sorted([(t, 1) for t in arrived] + [(t, -1) for t in finished])
    if not events or events[0][0] == events[-1][0]:
        return 0.0
    area, inside = 0.0, 0
    for (t, change), (after, _) in zip(events, events[1:], strict=False):
        inside += change
        area += inside * (after - t)
    return area / (events[-1][0] - events[0][0])


_UNIT = 0.06  # seconds, on the loop's own clock: nothing waits, and a busy machine is never late

# arrivals, max_batch, max_wait, and for each call of collect: when it is made at the earliest, the
# batch that is right, and when it must be there
_TIMETABLES = [
    ([0, 0, 0], 3, 4, [(0, [0, 1, 2], 0)]),
    ([0], 3, 2, [(0, [0], 2)]),
    ([0, 1, 6], 8, 3, [(0, [0, 1], 3)]),
    ([0, 1.5, 3, 4.5, 6], 8, 2.25, [(0, [0, 1], 2.25)]),
    ([0, 0], 1, 4, [(0, [0], 0)]),
    ([3, 4, 9], 8, 2, [(0, [0, 1], 5)]),  # a quiet hour first
    # Two calls and more: what the first one did not return, the next one gets.
    ([0, 5, 6], 3, 2, [(0, [0], 2), (0, [1, 2], 7)]),
    ([0, 0, 0, 0, 0], 2, 4, [(0, [0, 1], 0), (0, [2, 3], 0), (0, [4], 4)]),
    ([0, 3, 6, 9], 2, 1, [(0, [0], 1), (0, [1], 4), (0, [2], 7), (0, [3], 10)]),
    ([0, 1, 2], 3, 1.5, [(0, [0, 1], 1.5), (0, [2], 3.5)]),
    # The last batch ran until now: the wait counts from when the oldest came.
    ([0, 1, 4], 8, 3, [(2, [0, 1], 3), (0, [2], 7)]),
    ([0, 1, 2, 5], 8, 3, [(4, [0, 1, 2], 4), (0, [3], 8)]),  # its time is over: all that wait
    ([0, 0, 0, 0, 0], 2, 1, [(3, [0, 1], 3), (0, [2, 3], 3), (0, [4], 3)]),
    # No wait at all: what is there.
    ([0, 0, 0, 4], 8, 0, [(0, [0, 1, 2], 0), (0, [3], 4)]),
    ([0, 0, 0, 2], 2, 0, [(1, [0, 1], 1), (0, [2], 1), (0, [3], 2)]),
]


@exercise("13.B")
def collect(answer: Probe, rng: np.random.Generator) -> None:
    """Full, or the oldest one's deadline, whichever comes first; nothing is lost."""
    function = answer.answer
    code = function if inspect.isfunction(function) else type(function).__call__
    code = getattr(function, "func", code)  # of a functools.partial
    if not inspect.iscoroutinefunction(code):
        raise Wrong("collect must be a coroutine: async def collect(queue, max_batch, max_wait).")
    for arrivals, max_batch, max_wait, calls in _TIMETABLES:
        where = (
            f"requests arrive at {arrivals}, max_batch is {max_batch}, max_wait {max_wait} (the"
            f" unit is {_UNIT} s)"
        )
        play = functools.partial(_timetable, function, arrivals, max_batch, max_wait, calls, where)
        _run(code, play, where)
    _run(code, functools.partial(_cancelled, function), "collect is cancelled while it waits")


def _run(code: Callable, play: Callable, where: str) -> None:
    """Play it on a clock of ours, whose wall clock is set back by an hour in the first moment."""
    clock = Clock()

    def wall_clock() -> float:
        return clock.read() - 3600 * (clock.now > _UNIT / 2)

    try:
        with (
            told_to(code, clock),
            mock.patch.object(time, "time", wall_clock),
            asyncio.Runner(loop_factory=lambda: Loop(clock)) as runner,
        ):
            runner.run(play())
    except Wrong:
        raise
    except Exception as error:
        raise Wrong(f"{where}: your code raised {type(error).__name__}: {error}") from error


def _put(queue: asyncio.Queue, item: int) -> None:
    queue.put_nowait((asyncio.get_running_loop().time(), item))


async def _timetable(
    collect: Callable,
    arrivals: list[float],
    max_batch: int,
    max_wait: float,
    calls: list[tuple[float, list[int], float]],
    where: str,
) -> None:
    """Call collect again and again while requests arrive at these times (in units)."""
    queue: asyncio.Queue[tuple[float, int]] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    start = loop.time()
    for i, t in enumerate(arrivals):
        if t:
            loop.call_at(start + t * _UNIT + 1e-5 * i, _put, queue, i)
        else:
            _put(queue, i)
    for k, (earliest, wanted, when) in enumerate(calls):
        await asyncio.sleep(start + earliest * _UNIT - loop.time())
        at = where + (f", and collect is called at {earliest}" if earliest else "")
        at += f", and collect is called again (call {k + 1})" if k else ""
        try:
            given = collect(queue, max_batch, max_wait * _UNIT)
            batch = await asyncio.wait_for(given, 20 * _UNIT)
        except TimeoutError:
            raise Wrong(f"{at}: your collect never returns.") from None
        took = (loop.time() - start) / _UNIT
        batch = sequence(batch, at)
        if batch != wanted:
            raise Wrong(
                f"{at}: the batch must be the requests {wanted}; yours is {batch}, after"
                f" {took:.1f}. A get that is left waiting takes a request that nobody returns."
            )
        if abs(took - when) > 0.3:  # 18 ms, for an answer that looks again every few
            raise Wrong(
                f"{at}: the batch is right, and must be there after {when}; yours came after"
                f" {took:.1f}."
            )


async def _cancelled(collect: Callable) -> None:
    """The service is shut down: once before the first request, once while company is waited for."""
    for first in (False, True):
        queue: asyncio.Queue[tuple[float, int]] = asyncio.Queue()
        if first:
            _put(queue, 0)
        task = asyncio.ensure_future(collect(queue, 8, 4 * _UNIT))
        await asyncio.sleep(_UNIT)
        task.cancel()
        await asyncio.wait([task], timeout=_UNIT)
        if not task.cancelled():
            state = "with one request in hand" if first else "without a request"
            raise Wrong(
                f"collect was cancelled while it waited, {state}, and it did not end so:"
                " CancelledError must be let through."
            )


class _Service:
    """A machine whose batch of b takes alpha + beta·b ms and, beyond `knee`, `extra` ms more each;
    no two calls take quite the same. Requests come at random, `rate` a ms.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        alpha: float,
        beta: float,
        rate: float,
        *,
        spread: float = 0.1,
        knee: int = 64,
        extra: float = 0.0,
    ) -> None:
        self.rng, self.rate, self.spread, self.calls = rng, rate, spread, 150
        self.took = [0.0] + [alpha + beta * b + extra * max(0, b - knee) for b in range(1, 65)]
        self.said = f"a batch of b takes about {alpha:.1f} + {beta:.2f}·b ms"
        if extra:
            self.said += f", beyond {knee} {extra:.1f} ms more each"
        self.said += f"; {1000 * rate:.0f} requests a second come"

    def __call__(self, max_batch: int, wait_ms: float) -> tuple[float, float]:
        if self.calls == 0:
            raise Wrong("simulate was called more than 150 times.")
        self.calls -= 1
        where = f"simulate({max_batch}, {wait_ms})"
        batch, wait = whole(max_batch, where), number(wait_ms, where)
        if not (1 <= batch <= 64 and 0 <= wait <= 100):
            raise Wrong(f"{where}: max_batch is 1 to 64, and wait_ms 0 to 100.")
        return self.play(batch, wait)

    def play(self, max_batch: int, wait_ms: float, n: int = 1000) -> tuple[float, float]:
        """p99 in ms and the share of the time that the machine computes, over n requests."""
        due = np.cumsum(self.rng.exponential(1 / self.rate, n))
        arrivals = due.tolist() + [math.inf] * max_batch
        vary = np.exp(self.rng.normal(-(self.spread**2) / 2, self.spread, n)).tolist()
        free, i, work, ends, sizes = 0.0, 0, 0.0, [], []
        while i < n:
            start = max(free, min(arrivals[i] + wait_ms, arrivals[i + max_batch - 1]))
            j = bisect.bisect_right(arrivals, start, i + 1, i + max_batch)
            took = self.took[j - i] * vary[len(ends)]
            free, work = start + took, work + took
            ends.append(free)
            sizes.append(j - i)
            i = j
        latency = np.repeat(ends, sizes) - due
        return float(np.percentile(latency, 99)), work / free


def _services(rng: np.random.Generator) -> Iterator[tuple[_Service, float, bool]]:
    """Each with a promise in ms, and whether a policy can keep it."""
    u = rng.uniform
    yield _Service(rng, u(4, 6), 0.1, 0.1), 2.0, False  # one request alone takes longer
    yield _Service(rng, u(2, 3), 0.5, u(2.6, 3.0)), u(60, 90), False  # more come than it can serve
    yield _Service(rng, u(2, 4), u(0.05, 0.15), u(0.1, 0.15)), u(45, 60), True
    for knee in (8, 32):
        extra = u(1.5, 2)
        service = _Service(rng, u(4, 6), u(0.05, 0.15), u(0.5, 0.6), knee=knee, extra=extra)
        yield service, u(70, 80), True
    alpha = u(15, 20)  # here 16 are too few
    yield _Service(rng, alpha, u(0.05, 0.15), u(0.75, 0.85)), alpha * u(4.5, 5), True
    for _ in range(8):  # here one draw differs from the next
        alpha = u(15, 20)
        yield _Service(rng, alpha, 0.1, u(0.1, 0.14), spread=0.4), alpha * u(5, 5.5), True


@exercise("13.C")
def choose(answer: Probe, rng: np.random.Generator) -> None:
    """The promise holds on arrivals you have not seen, with hardly more work than the least that is
    possible.
    """
    for service, promise, possible in _services(rng):
        got = answer.answer(service, promise)
        where = f"{service.said}; p99 at most {promise:.1f} ms"
        if got is None:
            if possible:
                raise Wrong(f"{where}: there are policies that keep it; you return None.")
            continue
        batch, wait = sequence(got, f"{where}, (max_batch, wait_ms) or None", 2)
        batch, wait = whole(batch, where), number(wait, where)
        if not (1 <= batch <= 64 and 0 <= wait <= 100):
            raise Wrong(f"{where}: max_batch is 1 to 64, wait_ms 0 to 100; yours {said(got)}.")
        plays = [service.play(batch, wait, 8000) for _ in range(3)]
        tail, work = np.median(plays, axis=0)
        if not tail <= promise:
            due = "" if possible else " No policy keeps it: None is due."
            raise Wrong(f"{where}: with {(batch, wait)} p99 is {tail:.1f} ms on new arrivals.{due}")
        least, policy = _least(service, promise)
        # 1.4 is asked: what an answer saw of a policy's work is off by some percent
        if not work <= 1.5 * least:
            yours, best = apart(100 * work, 100 * least)
            raise Wrong(
                f"{where}: with {(batch, wait)} the machine computes {yours}% of the time, and"
                f" {best}% with {policy}."
            )


def _least(service: _Service, promise: float) -> tuple[float, tuple[int, float]]:
    """The least work that keeps the promise, of a grid, and its policy. The longer the wait, the
    less work: of each batch size the longest wait counts that keeps it.
    """
    found = []
    for batch in (8, 16, 32, 64):
        for wait in np.linspace(0.95, 0, 12) * promise:
            tail, work = service.play(batch, min(float(wait), 100.0), 4000)
            if tail <= promise:
                found.append((work, (batch, round(float(wait), 1))))
                break
    return min(found)
