"""Answers to chapter 16's exercises."""

import heapq
import math
from fractions import Fraction

import numpy as np
import torch

from answers import right, wrong


@right("16.A", "a generator of shares, a tensor as share")
def in_torch(requirements):
    shares = []
    for _, measured, target, kind in requirements:
        x = torch.tensor([measured, target], dtype=torch.float64)
        share = x[0] / x[1] if kind == "at most" else x[1] / x[0].clamp_min(0)
        shares.append(share.nan_to_num(math.inf, math.inf))
    k = int(torch.stack(shares).argmax())
    return [requirements[k][0], shares[k]]


@right("16.A", "the last of equal ones, NumPy's numbers")
def last_of_equals(requirements):
    best = ("", -math.inf)
    for name, measured, target, kind in requirements:
        if math.isnan(measured) or (kind == "at least" and measured <= 0):
            share = np.float64("inf")
        else:
            share = np.float64(measured / target if kind == "at most" else target / measured)
        best = (name, share) if share >= best[1] else best
    return best


def _binding(share, pick=max, missing=math.inf, nothing=math.inf):
    def binding(requirements):
        shares = {}
        for name, measured, target, kind in requirements:
            if math.isnan(measured):
                shares[name] = missing
            elif kind == "at least" and measured <= 0:
                shares[name] = nothing
            else:
                shares[name] = share(measured, target, kind)
        name = pick(shares, key=shares.get)
        return name, shares[name]

    return binding


def _share(measured, target, kind):
    return measured / target if kind == "at most" else target / measured


wrong("16.A", "measured over target, both ways")(_binding(lambda m, t, kind: m / t))
wrong("16.A", "one minus the share for at least")(
    _binding(lambda m, t, kind: m / t if kind == "at most" else 1 - m / t)
)
wrong("16.A", "the distance in units")(
    _binding(lambda m, t, kind: m - t if kind == "at most" else t - m)
)
wrong("16.A", "two minus the share for at least")(
    _binding(lambda m, t, kind: m / t if kind == "at most" else 2 - m / t)
)
wrong("16.A", "the smallest share")(_binding(_share, pick=min))
wrong("16.A", "what was not measured does not count")(_binding(_share, missing=0.0))
wrong("16.A", "nothing at all is 0")(_binding(_share, nothing=0.0))
wrong("16.A", "never above 1")(_binding(lambda *a: min(_share(*a), 1.0)))
wrong("16.A", "NaN stays NaN")(_binding(_share, missing=math.nan))


@wrong("16.A", "the name alone")
def name_alone(requirements):
    return _binding(_share)(requirements)[0]


@right("16.B", "a sweep from the fastest, best accuracy so far")
def sweep(points):
    kept, best = [], -math.inf
    for ms in sorted({p[1] for p in points}):
        here = [p for p in points if p[1] == ms]
        top = max(p[2] for p in here)
        if top > best:
            kept += [p[0] for p in here if p[2] == top]
            best = top
    return tuple(kept)


@right("16.B", "NumPy, fractions")
def by_numpy(points):
    numbers = [(Fraction(ms), Fraction(right_)) for _, ms, right_ in points]
    kept = [
        i
        for i, (m, r) in enumerate(numbers)
        if not any(x <= m and y >= r and (x, y) != (m, r) for x, y in numbers)
    ]
    return (points[i][0] for i in sorted(kept, key=lambda i: numbers[i][0]))


def _front(dominates, key=lambda p: p[1]):
    def front(points):
        kept = [q for q in points if not any(dominates(p, q) for p in points)]
        return [p[0] for p in sorted(kept, key=key)]

    return front


def _dominates(p, q):
    return p[1] <= q[1] and p[2] >= q[2] and p[1:] != q[1:]


wrong("16.B", "ties by name")(_front(_dominates, key=lambda p: (p[1], p[0])))
wrong("16.B", "the most accurate first")(_front(_dominates, key=lambda p: -p[2]))
wrong("16.B", "ties in reverse")(lambda points: _front(_dominates)(points[::-1]))
wrong("16.B", "better in both is asked for")(_front(lambda p, q: p[1] < q[1] and p[2] > q[2]))
wrong("16.B", "better in one is enough")(_front(lambda p, q: p[1] < q[1] or p[2] > q[2]))
wrong("16.B", "equal ones dominate each other")(
    _front(lambda p, q: p is not q and p[1] <= q[1] and p[2] >= q[2])
)
wrong("16.B", "of equal ones the first alone")(
    lambda points: _front(_dominates)(list({p[1:]: p for p in points[::-1]}.values())[::-1])
)
wrong("16.B", "the best of each time")(_front(lambda p, q: p[1] == q[1] and p[2] > q[2]))
wrong("16.B", "sorted by name")(lambda points: sorted(_front(_dominates)(points)))
wrong("16.B", "the points in place of their names")(
    lambda points: sorted(
        [q for q in points if not any(_dominates(p, q) for p in points)], key=lambda p: p[1]
    )
)


@wrong("16.B", "the convex hull")
def hull(points):
    kept = []
    for p in sorted((p for p in points if p[0] in _front(_dominates)(points)), key=lambda p: p[1]):
        while len(kept) > 1:
            (_, x0, y0), (_, x1, y1) = kept[-2:]
            if (y1 - y0) * (p[1] - x0) > (p[2] - y0) * (x1 - x0):
                break
            kept.pop()
        kept.append(p)
    return [p[0] for p in kept]


def _simulated(x, brief, batch, wait=0.0, statistic=lambda w: np.percentile(w, 99), even=False):
    gaps = np.random.default_rng(1).exponential(1e3 / brief["rate"], 5000)
    due = np.cumsum(np.full(5000, 1e3 / brief["rate"]) if even else gaps)
    latencies, now, i = [], 0.0, 0
    while i < len(due):
        full = due[i + batch - 1] if i + batch <= len(due) else math.inf
        now = max(now, min(full, due[i] + wait))
        n = max(min(batch, int(np.searchsorted(due, now, side="right")) - i), 1)
        now = max(now, due[i]) + x["fixed_ms"] + x["image_ms"] * brief["images"] * n
        latencies += list(now - due[i : i + n])
        i += n
    return statistic(latencies)


def _choose(
    meets,
    *,
    size=lambda c, b: c["kb"] <= b["kb"],
    good=lambda c, b: c["right"] >= b["right"],
    order=lambda c: c["kb"],
    batches=(64, 16, 4, 1),
    wait=lambda brief: 0.0,
):
    def choose(candidates, brief):
        fits = [c for c in candidates if size(c, brief) and good(c, brief)]
        for c in sorted(fits, key=order):
            for batch in batches:
                if meets(c, brief, batch):
                    return c["name"], batch, wait(brief)
        return None

    return choose


def _meets(c, brief, batch):
    return _simulated(c, brief, batch) <= brief["p99_ms"]


right("16.C", "a wait of 1 ms, NumPy's types")(
    lambda candidates, brief: (
        None
        if (got := _choose(_meets)(candidates, brief)) is None
        else np.array([got[0], np.int64(64), np.float32(1.0)], dtype=object)
    )
)


@right("16.C", "a heap of events")
def by_events(candidates, brief):
    for c in sorted(candidates, key=lambda c: c["kb"]):
        if c["kb"] > brief["kb"] or c["right"] < brief["right"]:
            continue
        rng, events, waiting, late, busy, served = np.random.default_rng(5), [], [], 0, False, 0
        for t in np.cumsum(rng.exponential(1e3 / brief["rate"], 5000)):
            heapq.heappush(events, (t, 0))
        while events:
            t, kind = heapq.heappop(events)
            if kind == 0:
                waiting.append(t)
            else:
                busy = False
            if not busy and waiting:
                n = len(waiting[:32])
                end = t + c["fixed_ms"] + c["image_ms"] * brief["images"] * n
                late += sum(end - w > brief["p99_ms"] for w in waiting[:n])
                served, waiting, busy = served + n, waiting[n:], True
                heapq.heappush(events, (end, 1))
        if late <= 0.01 * served:
            return [c["name"], 32, 0]
    return None


def _stable(c, brief, batch):
    return batch / (c["fixed_ms"] + c["image_ms"] * brief["images"] * batch) * 1e3 > brief["rate"]


wrong("16.C", "the limit is not read: a stable queue is enough")(_choose(_stable))
wrong("16.C", "one call within the limit is enough")(
    _choose(lambda c, b, n: c["fixed_ms"] + c["image_ms"] * b["images"] <= b["p99_ms"])
)
wrong("16.C", "stable, and one call within the limit")(
    _choose(
        lambda c, b, n: (
            _stable(c, b, n) and c["fixed_ms"] + c["image_ms"] * b["images"] <= b["p99_ms"]
        )
    )
)
wrong("16.C", "the mean")(_choose(lambda c, b, n: _simulated(c, b, n, 0.0, np.mean) <= b["p99_ms"]))
wrong("16.C", "the median")(
    _choose(lambda c, b, n: _simulated(c, b, n, 0.0, np.median) <= b["p99_ms"])
)
wrong("16.C", "arrivals evenly spaced")(
    _choose(lambda c, b, n: _simulated(c, b, n, even=True) <= b["p99_ms"])
)
wrong("16.C", "a wait of 0.4 of the limit")(_choose(_meets, wait=lambda b: 0.4 * b["p99_ms"]))
wrong("16.C", "a wait of half of the limit")(_choose(_meets, wait=lambda b: 0.5 * b["p99_ms"]))
wrong("16.C", "a file smaller than allowed, not exactly as large")(
    _choose(_meets, size=lambda c, b: c["kb"] < b["kb"])
)
wrong("16.C", "more accurate than asked, not exactly so")(
    _choose(_meets, good=lambda c, b: c["right"] > b["right"])
)
wrong("16.C", "accuracy is not read")(_choose(_meets, good=lambda c, b: True))
wrong("16.C", "the file's limit is not read")(
    _choose(_meets, size=lambda c, b: True, order=lambda c: c["fixed_ms"])
)
wrong("16.C", "the fastest that fits")(
    _choose(_meets, order=lambda c: c["fixed_ms"] + 4 * c["image_ms"])
)
wrong("16.C", "the most accurate that fits")(_choose(_meets, order=lambda c: -c["right"]))
wrong("16.C", "one by one alone")(_choose(_meets, batches=(1,)))
wrong("16.C", "one image an order")(
    _choose(lambda c, b, n: _simulated(c, b | {"images": 1}, n) <= b["p99_ms"])
)


@wrong("16.C", "the smallest file where nothing fits")
def never_none(candidates, brief):
    got = _choose(_meets)(candidates, brief)
    return got or (min(candidates, key=lambda c: c["kb"])["name"], 64, 0.0)
