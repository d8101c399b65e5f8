"""Checks of chapter 13, Dynamic batching."""

import asyncio
import bisect
import inspect
import math

import numpy as np

from course_utils.checks.clock import Clock, Loop, told_to
from course_utils.exercises import Probe, Wrong, exercise


@exercise("13.A")
def mean_inside(answer: Probe, rng: np.random.Generator) -> None:
    """The area under the number inside, divided by the window: Little's law."""
    cases = [([0.0, 1.0], [2.0, 4.0]), ([5.0], [7.5]), ([0.0, 1.0, 2.0], [9.0, 3.0, 4.0]), ([], [])]
    for _ in range(6):
        arrived = np.sort(rng.uniform(0, 10, int(rng.integers(2, 30))))
        cases.append((arrived.tolist(), (arrived + rng.exponential(2, len(arrived))).tolist()))
    for arrived, finished in cases:
        got = answer(list(arrived), list(finished))
        want = _counted(arrived, finished)
        if not isinstance(got, int | float | np.floating) or not abs(got - want) <= 1e-6 * max(
            want, 1
        ):
            few = (
                f"arrivals {arrived}, answers {finished}"
                if len(arrived) < 4
                else f"{len(arrived)} requests, answered out of order"
            )
            raise Wrong(f"{few}: counted, {want:.4g} are inside on average; you return {got!r}.")


def _counted(arrived: list[float], finished: list[float]) -> float:
    """Walk over the events and add up (number inside) · (time until the next event)."""
    events = sorted([(t, 1) for t in arrived] + [(t, -1) for t in finished])
    if not events:
        return 0.0
    area, inside = 0.0, 0
    for (t, change), (after, _) in zip(events, events[1:], strict=False):
        inside += change
        area += inside * (after - t)
    return area / (events[-1][0] - events[0][0])


_UNIT = 0.06  # seconds, on the loop's own clock: nothing waits, and a busy machine is never late


async def _timetable(
    collect, arrivals: list[float], max_batch: int, max_wait: float
) -> tuple[list[int], float, int]:
    """One call of collect while requests arrive at these times (in units): what it returned, when,
    and how many were taken and not returned.
    """
    queue: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    start = loop.time()
    for i, t in enumerate(arrivals):
        loop.call_at(start + t * _UNIT + 1e-5 * i, queue.put_nowait, i)
    try:
        batch = await asyncio.wait_for(collect(queue.get, max_batch, max_wait * _UNIT), 12 * _UNIT)
    except TimeoutError:
        raise Wrong(
            f"requests arrive at {arrivals}, max_batch is {max_batch}, max_wait {max_wait} (the"
            f" unit is {_UNIT} s): your collect never returns."
        ) from None
    took = (loop.time() - start) / _UNIT
    if not isinstance(batch, list):
        raise Wrong(f"a list of requests was expected; you return a {type(batch).__name__}.")
    arrived = sum(t <= took - 0.2 for t in arrivals)
    return batch, took, arrived - len(batch) - queue.qsize()


@exercise("13.B")
def collect(answer: Probe, rng: np.random.Generator) -> None:
    """Full, or the first one's deadline, whichever comes first; nothing is lost."""
    function = answer.answer
    if not inspect.iscoroutinefunction(function):
        raise Wrong("collect must be a coroutine: async def collect(get, max_batch, max_wait).")
    # arrivals, max_batch, max_wait, the batch that is right, and when it must be there
    cases = [
        ([0, 0, 0], 3, 4, [0, 1, 2], 0),
        ([0], 3, 2, [0], 2),
        ([0, 1, 6], 8, 3, [0, 1], 3),
        ([0, 1.5, 3, 4.5, 6], 8, 2.25, [0, 1], 2.25),
        ([0, 0], 1, 4, [0], 0),
        ([3, 4, 9], 8, 2, [0, 1], 5),
    ]
    for arrivals, max_batch, max_wait, wanted, when in cases:
        where = (
            f"requests arrive at {arrivals}, max_batch is {max_batch}, max_wait {max_wait} (the"
            f" unit is {_UNIT} s)"
        )
        clock = Clock()
        try:
            with (
                told_to(function, clock),
                asyncio.Runner(loop_factory=lambda c=clock: Loop(c)) as runner,
            ):
                batch, took, lost = runner.run(_timetable(function, arrivals, max_batch, max_wait))
        except Wrong:
            raise
        except Exception as error:
            raise Wrong(f"{where}: your code raised {type(error).__name__}: {error}") from error
        if batch != wanted:
            raise Wrong(
                f"{where}: the batch must be the requests {wanted}; yours is {batch}, after"
                f" {took:.1f}."
            )
        if lost > 0:
            raise Wrong(
                f"{where}: {lost} requests were taken from the queue and are not in your batch."
            )
        if abs(took - when) > 0.3:  # 18 ms, for an answer that looks again every few
            raise Wrong(
                f"{where}: the batch is right, and must be there after {when}; yours came after"
                f" {took:.1f}."
            )


class _Minute:
    """A machine whose batch of b takes alpha + beta·b ms, under Poisson arrivals: p99 and the share
    of time it computes.
    """

    def __init__(self, rng: np.random.Generator, calls: int) -> None:
        self.rng, self.calls = rng, calls
        self.alpha, self.beta = float(rng.uniform(4, 6)), float(rng.uniform(0.1, 0.2))
        self.rate = float(
            rng.uniform(0.1, 0.14)
        )  # requests a millisecond: one by one the machine is busy half the time or more

    def __call__(self, max_batch: int, wait_ms: float) -> tuple[float, float]:
        if self.calls == 0:
            raise Wrong("simulate was called more than 150 times.")
        self.calls -= 1
        return self.play(max_batch, wait_ms)

    def play(self, max_batch: int, wait_ms: float, n: int = 6000) -> tuple[float, float]:
        due = np.cumsum(self.rng.exponential(1 / self.rate, n))
        if max_batch == 1:  # nobody waits for company: Lindley's recursion
            took = self.alpha + self.beta
            back = took * np.arange(n)
            ends = np.maximum.accumulate(due - back) + back + took
            return float(np.percentile(ends - due, 99)), float(n * took / ends[-1])
        arrivals = due.tolist() + [math.inf] * max_batch
        free, i, ends, sizes = 0.0, 0, [], []
        while i < n:
            start = max(free, min(arrivals[i] + wait_ms, arrivals[i + max_batch - 1]))
            j = bisect.bisect_right(arrivals, start, i + 1, i + max_batch)
            free = start + self.alpha + self.beta * (j - i)
            ends.append(free)
            sizes.append(j - i)
            i = j
        latency = np.repeat(ends, sizes) - due
        return float(np.percentile(latency, 99)), (self.alpha * len(ends) + self.beta * n) / free


@exercise("13.C")
def choose(answer: Probe, rng: np.random.Generator) -> None:
    """The promise holds on arrivals you have not seen, with hardly more work than the least that is
    possible.
    """
    for promise in (float(rng.uniform(45, 60)), float(rng.uniform(70, 90)), 2.0):
        world = _Minute(rng, 150)
        got = answer.answer(world, promise)
        where = (
            f"a batch takes {world.alpha:.1f} + {world.beta:.2f}·b ms, {1000 * world.rate:.0f}"
            f" requests a second come, p99 at most {promise:.0f} ms"
        )
        if promise < world.alpha:
            if got is not None:
                raise Wrong(
                    f"{where}: even a batch of one takes longer, so None is due; you return"
                    f" {got!r}."
                )
            continue
        if got is None:
            raise Wrong(f"{where}: there are policies that keep the promise; you return None.")
        try:
            batch, wait = got
            valid = 1 <= batch <= 64 and int(batch) == batch and 0 <= wait <= 100
        except (TypeError, ValueError):
            valid = False
        if not valid:
            raise Wrong(
                "a pair (max_batch from 1 to 64, wait_ms from 0 to 100) was expected; you return"
                f" {got!r}."
            )
        # p99 and work differ from play to play by 0.4%: a step of a tenth of the waits, which
        # costs up to 8% of the work, is well within the tenth that is allowed.
        tail, work = np.median(
            [world.play(int(batch), float(wait), 20_000) for _ in range(3)], axis=0
        )
        if tail > promise:
            raise Wrong(f"{where}: with {got} p99 is {tail:.1f} ms on new arrivals.")
        # The longer the wait, the less work: the longest that keeps the promise has the least.
        waits = np.linspace(0.95, 0, 12) * promise
        played = (world.play(64, float(x), 20_000) for x in waits if x <= 100)
        least = next(w for t, w in played if t <= promise)
        if work > 1.1 * least:
            raise Wrong(
                f"{where}: with {got} the machine computes {100 * work:.0f}% of the time, and"
                f" {100 * least:.0f}% would do."
            )
