"""Services in discrete events: chapter 13's many machines with a batcher each, behind a balancer;
and one service under the capstone's brief.
"""

import bisect
import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np

BALANCERS = ("random", "two choices", "fewest")


def fleet(
    arrivals: Sequence[float],
    machines: int,
    balancer: str,
    max_batch: int,
    wait: float,
    service: Callable[[int], float],
    rng: np.random.Generator,
) -> np.ndarray:
    """Latencies in seconds of `arrivals` (sorted, seconds), in the order in which the answers come.

    Each request goes to a machine at random; or to the one with fewer requests inside of two drawn
    at random (Mitzenmacher 2001); or to the one with the fewest of all. A machine starts a batch
    when it is free and `max_batch` requests wait, or the oldest has waited `wait` seconds;
    service(b) is the time of a batch of b.

    >>> fleet([0.0, 1.0, 2.0], 1, "random", 1, 0.0, lambda b: 3.0, np.random.default_rng(0))
    array([3., 5., 7.])
    """
    if balancer not in BALANCERS:
        raise ValueError(f"balancer is {balancer!r}; it must be one of {', '.join(BALANCERS)}.")
    waiting: list[deque[float]] = [deque() for _ in range(machines)]
    inside, free = np.zeros(machines, int), [0.0] * machines
    events: list[tuple[float, int, int, int]] = []  # when, tie, machine, how many are done then
    latencies: list[float] = []
    tie = itertools.count()

    def consider(m: int, now: float) -> None:
        """Start a batch on machine m if it is due; otherwise look again when it will be."""
        if not waiting[m] or free[m] > now:
            return  # the end of the running batch looks again
        due = waiting[m][0] + wait
        if len(waiting[m]) < max_batch and now < due:
            heapq.heappush(events, (due, next(tie), m, 0))
            return
        batch = [waiting[m].popleft() for _ in range(min(max_batch, len(waiting[m])))]
        free[m] = now + service(len(batch))
        latencies.extend(free[m] - came for came in batch)
        heapq.heappush(events, (free[m], next(tie), m, len(batch)))

    def until(now: float) -> None:
        while events and events[0][0] <= now:
            when, _, m, done = heapq.heappop(events)
            inside[m] -= done
            consider(m, when)

    for came in arrivals:
        until(came)
        if balancer == "fewest":
            m = int(inside.argmin())
        else:
            asked = rng.integers(machines, size=2 if balancer == "two choices" else 1)
            m = int(min(asked, key=lambda k: inside[k]))
        inside[m] += 1
        waiting[m].append(came)
        consider(m, came)
    until(np.inf)
    return np.array(latencies)


def p99_ms(
    candidate: Mapping[str, float],
    brief: Mapping[str, float],
    max_batch: int,
    max_wait_ms: float,
    *,
    orders: int = 6000,
    seed: "int | np.random.Generator" = 0,
) -> float:
    """The 99th percentile in ms of one service: how long an order waits for its answer.

    Orders of brief["images"] images come at random (Poisson), brief["rate"] a second. A batch
    starts when the service is free and `max_batch` orders wait, or the oldest has waited
    `max_wait_ms`; with n images it takes candidate["fixed_ms"] + candidate["image_ms"] · n. Raises
    ValueError for a batch below 1, a negative wait, or a rate of 0.

    >>> alone = {"rate": 0.001, "images": 4}
    >>> round(p99_ms({"fixed_ms": 2.0, "image_ms": 0.5}, alone, 16, 0), 6)
    4.0
    """
    if not (max_batch >= 1 and 0 <= max_wait_ms < math.inf and brief["rate"] > 0):
        raise ValueError(
            f"max_batch is {max_batch}, max_wait_ms {max_wait_ms}, rate {brief['rate']}; at least"
            " 1, at least 0 and above 0 are due."
        )
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(1e3 / brief["rate"], orders))
    due, fixed = arrivals.tolist(), candidate["fixed_ms"]
    each = candidate["image_ms"] * brief["images"]
    free, i, ends, sizes = 0.0, 0, [], []
    while i < orders:
        full = due[i + max_batch - 1] if i + max_batch <= orders else math.inf
        begin = max(free, min(full, due[i] + max_wait_ms))
        n = bisect.bisect_right(due, begin, i, min(i + max_batch, orders)) - i
        free = begin + fixed + each * n
        ends.append(free)
        sizes.append(n)
        i += n
    return float(np.percentile(np.repeat(ends, sizes) - arrivals, 99))


def stalls(
    share: float, length: float, seconds: float, rng: np.random.Generator, rate: float = 250.0
) -> tuple[np.ndarray, np.ndarray]:
    """Orders of some seconds, `rate` a second at random: when they come (N,), and which of them are
    late (N,), because the service stands still for `length` seconds now and then, for `share` of
    all the time.

    >>> due, late = stalls(0.1, 0.25, 1000, np.random.default_rng(0))
    >>> bool(0.08 < late.mean() < 0.12)
    True
    """
    if not 0 < share < 1:
        raise ValueError(f"share is {share}; it must lie between 0 and 1.")
    due = np.cumsum(rng.exponential(1 / rate, int(1.5 * rate * seconds) + 50))
    due = due[due < seconds]
    gaps = rng.exponential(length * (1 - share) / share, int(3 + 3 * seconds / length))
    if rng.random() < share:
        gaps[0] = -rng.random() * length  # in the middle of one when the load begins
    begins = np.cumsum(gaps) + length * np.arange(len(gaps))
    last = np.searchsorted(begins, due, side="right") - 1
    return due, (last >= 0) & (due - begins[last] < length)
