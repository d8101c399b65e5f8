"""Wrong answers to chapter 16's exercises, by somebody who has read only their texts."""

import heapq
import math

import numpy as np

from answers import wrong

# ---- A


def _binding(requirements, at_least, *, at_most=lambda m, t: m / t, nan=math.inf, pick=max):
    shares = {}
    for name, measured, target, kind in requirements:
        if math.isnan(measured):
            shares[name] = nan
        elif kind == "at most":
            shares[name] = at_most(measured, target)
        else:
            shares[name] = at_least(measured, target)
    name = pick(shares, key=shares.get)
    return name, shares[name]


def _share(measured, target):
    return target / measured if measured > 0 else math.inf


@wrong("16.A", "read only: the same quotient for at least")
def same_quotient(requirements):
    return _binding(requirements, lambda m, t: m / t)


@wrong("16.A", "read only: fails where nothing is there")
def nothing_there(requirements):
    return _binding(requirements, lambda m, t: t / m)


@wrong("16.A", "read only: 0 where nothing is there")
def zero_where_nothing(requirements):
    return _binding(requirements, lambda m, t: t / m if m > 0 else 0.0)


@wrong("16.A", "read only: a large number where nothing is there")
def large_number(requirements):
    return _binding(requirements, lambda m, t: t / max(m, 1e-9))


@wrong("16.A", "read only: 2 minus the quotient, 1 at the limit and infinite never")
def two_minus(requirements):
    return _binding(requirements, lambda m, t: 2 - m / t if m > 0 else math.inf)


@wrong("16.A", "read only: 1 plus the gap in the target's units")
def gap(requirements):
    return _binding(requirements, lambda m, t: 1 + t - m if m > 0 else math.inf)


@wrong("16.A", "read only: never below 1")
def never_below_one(requirements):
    return _binding(requirements, lambda m, t: max(1.0, _share(m, t)))


@wrong("16.A", "read only: 1 if it is met, else the quotient")
def one_or_nothing(requirements):
    return _binding(requirements, lambda m, t: 0.0 if m >= t else _share(m, t))


@wrong("16.A", "read only: the smallest share")
def smallest(requirements):
    return _binding(requirements, _share, pick=min)


@wrong("16.A", "read only: what was not measured is passed over")
def passed_over(requirements):
    return _binding(requirements, _share, nan=0.0)


@wrong("16.A", "read only: what was not measured is just at its limit")
def at_its_limit(requirements):
    return _binding(requirements, _share, nan=1.0)


@wrong("16.A", "read only: in whole percent")
def whole_percent(requirements):
    name, share = _binding(requirements, _share)
    return name, share if math.isinf(share) else round(share, 2)


@wrong("16.A", "read only: the last requirement of a kind only")
def last_of_a_kind(requirements):
    kinds = {}
    for requirement in requirements:
        kinds[requirement[3]] = requirement
    return _binding(list(kinds.values()), _share)


@wrong("16.A", "read only: less than 1 where a whole one is asked counts as nothing")
def below_one(requirements):
    return _binding(requirements, lambda m, t: t / m if int(m) else math.inf)


# ---- B


def _front(points, *, dominates=None, order=lambda p: p[1], names=True):
    dominates = dominates or (
        lambda a, b: a[1] <= b[1] and a[2] >= b[2] and (a[1] < b[1] or a[2] > b[2])
    )
    kept = [p for p in points if not any(dominates(q, p) for q in points)]
    kept = sorted(kept, key=order) if order else kept
    return [p[0] for p in kept] if names else kept


@wrong("16.B", "read only: only what is worse in both is dominated")
def worse_in_both(points):
    return _front(points, dominates=lambda a, b: a[1] < b[1] and a[2] > b[2])


@wrong("16.B", "read only: equal accuracy at more time is not dominated")
def equal_accuracy(points):
    return _front(points, dominates=lambda a, b: a[1] <= b[1] and a[2] > b[2])


@wrong("16.B", "read only: equal time at less accuracy is not dominated")
def equal_time(points):
    return _front(points, dominates=lambda a, b: a[1] < b[1] and a[2] >= b[2])


@wrong("16.B", "read only: of two equal ones the first alone stays")
def first_of_equals(points):
    best, found = -math.inf, []
    for name, _, right in sorted(points, key=lambda p: (p[1], -p[2])):
        if right > best:
            found.append(name)
            best = right
    return found


@wrong("16.B", "read only: of two equal ones none stays")
def none_of_equals(points):
    return [
        p[0]
        for i, p in sorted(enumerate(points), key=lambda e: e[1][1])
        if not any(q[1] <= p[1] and q[2] >= p[2] for j, q in enumerate(points) if j != i)
    ]


@wrong("16.B", "read only: in the order of the list")
def order_of_list(points):
    return _front(points, order=None)


@wrong("16.B", "read only: the slowest first")
def slowest_first(points):
    return _front(points)[::-1]


@wrong("16.B", "read only: of equally fast ones, the order of the names")
def order_of_names(points):
    return _front(points, order=lambda p: (p[1], p[0]))


@wrong("16.B", "read only: of equally fast ones, the order of the list from behind")
def from_behind(points):
    return _front(points[::-1])


@wrong("16.B", "read only: sorts the caller's list")
def sorts_the_list(points):
    points.sort(key=lambda p: p[1])
    return _front(points)


@wrong("16.B", "read only: compared with the neighbour in time only")
def neighbour(points):
    ordered = sorted(points, key=lambda p: p[1])
    return [
        p[0]
        for i, p in enumerate(ordered)
        if i == 0 or p[2] > ordered[i - 1][2] or p[1:] == ordered[i - 1][1:]
    ]


@wrong("16.B", "read only: the fastest and the most accurate alone")
def two_ends(points):
    found = _front(points)
    return found if len(found) < 3 else [found[0], found[-1]]


@wrong("16.B", "read only: the last point of the list is not looked at")
def without_last(points):
    return _front(points[:-1])


@wrong("16.B", "read only: points, not names")
def whole_points(points):
    return _front(points, names=False)


@wrong("16.B", "read only: fast and inaccurate are mixed up, less accuracy is better")
def less_accuracy(points):
    return _front([(name, ms, -right) for name, ms, right in points])


@wrong("16.B", "read only: within a hundredth is equal")
def within_a_hundredth(points):
    return _front(
        points,
        dominates=lambda a, b: (
            a[1] <= b[1] + 0.01 and a[2] >= b[2] - 0.01 and (a[1] < b[1] or a[2] > b[2])
        ),
    )


# ---- C


def _p99(candidate, brief, most, wait_ms, orders=1500):
    """Plays a deployment: batches of at most `most` orders, one call at a time."""
    rng = np.random.default_rng(1)
    arrived = np.cumsum(rng.exponential(1000 / brief["rate"], orders))
    free, i, taken = 0.0, 0, []
    while i < orders:
        full = arrived[i + most - 1] if i + most <= orders else math.inf
        start = max(free, min(arrived[i] + wait_ms, full))
        n = min(most, max(1, int(np.searchsorted(arrived, start, side="right")) - i))
        images = n * brief["images"]
        free = start + candidate["fixed_ms"] + candidate["image_ms"] * images
        taken += [free - arrived[j] for j in range(i, i + n)]
        i += n
    return float(np.percentile(taken, 99))


def _policy(candidate, brief, *, p99=_p99, limit=0.9):
    for most in (1, 2, 4, 8, 16, 32, 64):
        if p99(candidate, brief, most, 0.0) <= limit * brief["p99_ms"]:
            return most * brief["images"], 0.0
    return None


def _choose(candidates, brief, *, fits=None, key=lambda c: c["kb"], policy=_policy):
    fits = fits or (lambda c: c["kb"] <= brief["kb"] and c["right"] >= brief["right"])
    for candidate in sorted(filter(fits, candidates), key=key):
        found = policy(candidate, brief)
        if found:
            return candidate["name"], *found
    return None


@wrong("16.C", "read only: the size is not looked at")
def no_size(candidates, brief):
    def fits(c):
        return c["right"] >= brief["right"]

    return _choose(candidates, brief, fits=fits, key=lambda c: -c["kb"])


@wrong("16.C", "read only: the accuracy is not looked at")
def no_accuracy(candidates, brief):
    return _choose(candidates, brief, fits=lambda c: c["kb"] <= brief["kb"])


@wrong("16.C", "read only: size and accuracy just at their limits are left")
def strict_limits(candidates, brief):
    def fits(c):
        return c["kb"] < brief["kb"] and c["right"] > brief["right"]

    return _choose(candidates, brief, fits=fits)


@wrong("16.C", "read only: the most accurate instead of the smallest")
def most_accurate(candidates, brief):
    return _choose(candidates, brief, key=lambda c: -c["right"])


@wrong("16.C", "read only: the fastest instead of the smallest")
def fastest(candidates, brief):
    return _choose(candidates, brief, key=lambda c: c["fixed_ms"] + c["image_ms"] * brief["images"])


@wrong("16.C", "read only: the first of the list that can")
def first_of_list(candidates, brief):
    return _choose(candidates, brief, key=lambda c: 0)


def _one_call(candidate, brief, most=1):
    return candidate["fixed_ms"] + candidate["image_ms"] * most * brief["images"]


@wrong("16.C", "read only: the time of one call, as if nobody queued")
def nobody_queues(candidates, brief):
    def policy(candidate, brief):
        fits = _one_call(candidate, brief) <= brief["p99_ms"]
        return (brief["images"], 0.0) if fits else None

    return _choose(candidates, brief, policy=policy)


@wrong("16.C", "read only: an order has one image")
def one_image(candidates, brief):
    one = {**brief, "images": 1}
    return _choose(candidates, brief, policy=lambda c, b: _policy(c, one))


@wrong("16.C", "read only: batches of one order only, None where they do not suffice")
def one_order(candidates, brief):
    def policy(candidate, brief):
        fits = _p99(candidate, brief, 1, 0.0) <= brief["p99_ms"]
        return (brief["images"], 0.0) if fits else None

    return _choose(candidates, brief, policy=policy)


@wrong("16.C", "read only: waits as long as the promise is")
def waits_for_promise(candidates, brief):
    found = _choose(candidates, brief)
    return found and (found[0], 64 * brief["images"], float(brief["p99_ms"]))


@wrong("16.C", "read only: the right one, deployed one image at a time")
def one_at_a_time(candidates, brief):
    found = _choose(candidates, brief)
    return found and (found[0], 1, 0.0)


@wrong("16.C", "read only: one that can't where none can")
def never_none(candidates, brief):
    found = _choose(candidates, brief)
    return found or (min(candidates, key=lambda c: c["kb"])["name"], 8, 0.0)


@wrong("16.C", "read only: the rate is met by the mean, the tail is not looked at")
def mean_rate(candidates, brief):
    def policy(candidate, brief):
        busy = brief["rate"] / 1000 * _one_call(candidate, brief, 64) / 64
        return (64 * brief["images"], 0.0) if busy < 1 else None

    return _choose(candidates, brief, policy=policy)


@wrong("16.C", "read only: the mean latency instead of the tail")
def mean_latency(candidates, brief):
    def policy(candidate, brief):
        load = brief["rate"] / 1000 * _one_call(candidate, brief)
        if load >= 1:
            return None
        mean = _one_call(candidate, brief) * (1 + load / 2 / (1 - load))
        return (brief["images"], 0.0) if mean <= brief["p99_ms"] else None

    return _choose(candidates, brief, policy=policy)


@wrong("16.C", "read only: the whole candidate instead of its name")
def whole_candidate(candidates, brief):
    found = _choose(candidates, brief)
    return found and (next(c for c in candidates if c["name"] == found[0]), *found[1:])


@wrong("16.C", "read only: the smallest file must do, else None")
def smallest_or_none(candidates, brief):
    smallest = heapq.nsmallest(1, candidates, key=lambda c: c["kb"])
    return _choose(smallest, brief)


@wrong("16.C", "read only: the largest file that fits")
def largest(candidates, brief):
    return _choose(candidates, brief, key=lambda c: -c["kb"])
