"""Many machines with a batcher each, behind a balancer: chapter 13's discrete-event simulation."""

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence

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
