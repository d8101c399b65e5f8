"""Intervals and verdicts for paired timings: no torch, no clock, so that the statistics can be
tested alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCKS = 12
MIN_ROUNDS = 8
SAME = 0.03  # two arms within ±3% count as the same
LOOKS = tuple(
    round(24 * 1.5**k) for k in range(16)
)  # the rounds after which the width is looked at: 24, 36, 54, …


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval; `low <= value <= high`."""

    value: float
    low: float
    high: float
    unit: str = ""

    def __repr__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}] {self.unit}".rstrip()


def median_interval(samples: Sequence[float]) -> Interval:
    """The median of a series and a 95% interval for it that holds under autocorrelation and heavy
    tails.

    The series is cut into twelve consecutive blocks; the interval reaches from the second smallest
    to the second largest block median. For independent blocks the true median lies outside with
    probability 2·(1+12)/2¹² = 0.6% (sign test; Conover 1999, §3.2). The slack pays for what remains
    of the correlation between neighbouring blocks and for looking several times while sampling:
    tests/test_2_stats.py measures what is left, at most 5%. With fewer than twelve samples the
    interval is their whole range. Raises ValueError below eight.
    """
    x = np.asarray(samples, dtype=float)
    if len(x) < MIN_ROUNDS or not np.isfinite(x).all():
        raise ValueError(
            f"an interval needs at least {MIN_ROUNDS} finite samples; got {len(x)},"
            f" {np.isfinite(x).sum()} finite."
        )
    medians = np.sort([np.median(block) for block in np.array_split(x, min(len(x), BLOCKS))])
    trim = 1 if len(medians) == BLOCKS else 0
    middle = float(np.median(x))
    return Interval(
        middle, min(middle, float(medians[trim])), max(middle, float(medians[-1 - trim]))
    )


def speedup(ratios: Sequence[float], spread: float = 0.0) -> Interval:
    """Median of per-round speed-ups with its interval, widened by `spread`, the A/A error in log
    units.
    """
    log = median_interval(np.log(ratios))
    return Interval(
        math.exp(log.value), math.exp(log.low - spread), math.exp(log.high + spread), "x"
    )


def decide(low: float, high: float) -> str:
    """One of "faster", "slower", "no difference", "inconclusive" for an interval of a speed-up."""
    if low >= 1 - SAME and high <= 1 + SAME:
        return "no difference"
    if low > 1:
        return "faster"
    if high < 1:
        return "slower"
    return "inconclusive"


def narrow_enough(interval: Interval, precision: float) -> bool:
    """Whether half the width, relative to the value, is at most `precision`."""
    return (interval.high - interval.low) / 2 <= precision * interval.value


def paired_t(differences: Sequence[float], unit: str = "") -> Interval:
    """Mean of paired differences (one a seed) with its 95% t-interval, for training results over
    seeds.

    Five seeds are the course's habit: a bootstrap of so few covers far too little, the t-interval
    covers 95% when the differences are roughly normal. Raises ValueError for fewer than three.
    """
    from scipy.stats import t

    d = np.asarray(differences, dtype=float)
    if len(d) < 3:
        raise ValueError(f"a paired t-interval needs at least three pairs; got {len(d)}.")
    half = float(t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d)))
    return Interval(float(d.mean()), float(d.mean()) - half, float(d.mean()) + half, unit)


def paired_share(baseline: Sequence[bool], candidate: Sequence[bool]) -> Interval:
    """Difference of two accuracies on the same images, in percentage points (candidate minus
    baseline).

    Only images on which the two disagree count (McNemar 1947); the interval is normal with
    continuity correction.
    """
    a, b = np.asarray(baseline, bool), np.asarray(candidate, bool)
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise ValueError(
            f"both must be lists of the same length, one entry an image; got {a.shape} and"
            f" {b.shape}."
        )
    gained, lost, n = int((b & ~a).sum()), int((a & ~b).sum()), len(a)
    difference = (gained - lost) / n
    half = 1.96 * math.sqrt(max(gained + lost - (gained - lost) ** 2 / n, 0)) / n + 0.5 / n
    return Interval(
        100 * difference, 100 * (difference - half), 100 * (difference + half), "points"
    )
