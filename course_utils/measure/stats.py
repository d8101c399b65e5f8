"""Intervals and answers for timings: no torch and no clock, so that they can be tested alone.

Two kinds of interval for a speed-up:

- `within_process`: one long series of rounds. It knows how long its noise remembers, and is widened
  or spans the whole series where that is long. It says nothing about the next process.
- `over_processes`: one number a fresh process. What the processes do not share (where buffers lie,
  what the allocator holds) is in its width.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

BLOCKS = 12
MIN_ROUNDS = 8
MIN_PROCESSES = 5
SAME = 1.03  # two arms count as the same where neither is 3% faster
STEADY = 180  # rounds: three times the dwell of the slowest mood that the tests plant
LOOK_AFTER = tuple(round(24 * 1.5**k) for k in range(16))  # rounds: 24, 36, 54, …


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval; `low <= value <= high`.

    >>> Interval(1.84, 1.71, 2.02, "x")
    1.84 [1.71, 2.02] x
    """

    value: float
    low: float
    high: float
    unit: str = ""

    def __repr__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}] {self.unit}".rstrip()


def memory(series: Sequence[float]) -> float:
    """How many samples in a row count as one: the integrated autocorrelation time of the ranks.

    1 for independent noise, (1+ρ)/(1−ρ) for noise in which each sample keeps the share ρ of the one
    before. Ranks, so that one outlier hides nothing. Each correlation is raised by what a short
    series takes from it (Kendall 1954); the sum ends where the correlation is gone, or after five
    times itself (Sokal 1997, §3).

    >>> memory([1, 5, 2, 4] * 20)
    1.0
    >>> memory([1] * 40 + [2] * 40) > 20
    True
    """
    n = len(series)
    ranks = np.argsort(np.argsort(np.asarray(series, float), kind="stable")).astype(float)
    ranks -= ranks.mean()
    spectrum = np.fft.rfft(ranks, 2 * n)  # Wiener–Khinchin: all lags at once
    kept = np.fft.irfft(spectrum * spectrum.conj(), 2 * n)[: max(2, min(n // 3, 200))]
    kept = kept / (kept[0] or 1.0)
    kept += (1 + 3 * np.maximum(kept, 0.0)) / n
    total = 1.0
    for lag, share in enumerate(kept[1:].tolist(), 1):
        if share < 0 or lag >= 5 * total:
            break
        total += 2 * share
    return total


def within_process(series: Sequence[float]) -> Interval:
    """Median of a series from one process, with an interval that knows the noise's memory.

    Twelve consecutive blocks: the interval reaches over all twelve block medians and a quarter
    beyond, so that it does not shrink where neighbouring blocks resemble each other. A series
    shorter than 180 rounds is widened by √(180/n). One with fewer than 24 samples, or shorter than
    eight times its `memory`, has shown too little: the interval is its whole range and a quarter of
    it again on either side. tests/test_2_stats.py measures the coverage on seven kinds of noise.
    Raises ValueError below eight samples, or where one is not finite.

    >>> within_process([1.0, 1.2, 0.9, 1.1] * 60)
    1.05 [1.05, 1.05]
    >>> within_process([1.0, 1.2, 0.9, 1.1, 1.0, 1.05, 0.95, 1.1])
    1.02 [0.825, 1.27]
    """
    x = np.asarray(series, dtype=float)
    if len(x) < MIN_ROUNDS or not np.isfinite(x).all():
        raise ValueError(
            f"an interval needs at least {MIN_ROUNDS} finite samples;"
            f" got {len(x)}, {np.isfinite(x).sum()} finite."
        )
    middle = float(np.median(x))
    if len(x) < 24 or len(x) < 8 * memory(x):
        beyond = float(x.max() - x.min()) / 4
        return Interval(middle, float(x.min()) - beyond, float(x.max()) + beyond)
    blocks = _block_medians(x)
    wider = 1.25 * max(1.0, math.sqrt(STEADY / len(x)))
    down, up = middle - min(blocks), max(blocks) - middle
    return Interval(middle, middle - wider * max(down, 0.0), middle + wider * max(up, 0.0))


def _block_medians(x: np.ndarray) -> list[float]:
    """Medians of twelve consecutive blocks, the first ones longer by one where need be."""
    size, longer = divmod(len(x), BLOCKS)
    cut = longer * (size + 1)
    medians: list[float] = []
    for part, length in ((x[:cut], size + 1), (x[cut:], size)):
        if len(part):
            rows = np.sort(part.reshape(-1, length), axis=1)
            medians += ((rows[:, (length - 1) // 2] + rows[:, length // 2]) / 2).tolist()
    return medians


def over_processes(values: Sequence[float], starts: int | None = None) -> Interval:
    """Median of one value a process, with an interval over processes.

    With n independent processes the whole range misses the median with probability 2/2ⁿ, whatever
    the distribution (sign test; Conover 1999, §3.2): 6.3% for five, 0.05% for twelve. The slack is
    spent: the processes of one comparison share the seconds in which they ran, and repeated
    comparisons were seen to spread twice as far as their own processes tell. Where the t-interval
    of the mean is wider (five processes that happen to agree), it counts. Positive values are
    treated in logarithms.

    `starts` is for the results of `turns(…, starts=…)`: the values come start by start, and the
    median of each start is one value. Raises ValueError for fewer than five.

    >>> over_processes([2.0, 2.1, 1.9, 2.2, 2.0])
    2 [1.9, 2.2]
    >>> over_processes([1, 2, 9, 1, 2, 3, 2, 2, 2, 1, 2, 8, 2, 7, 1], starts=5)
    2 [2, 2]
    """
    from scipy.stats import t

    x = np.asarray(values, dtype=float)
    if starts is not None:
        if starts < 1 or len(x) % starts:
            raise ValueError(f"{len(x)} values cannot be those of {starts} equal starts.")
        x = np.median(x.reshape(starts, -1), axis=1)
    if len(x) < MIN_PROCESSES or not np.isfinite(x).all():
        raise ValueError(
            f"an interval over processes needs at least {MIN_PROCESSES} finite values;"
            f" got {len(x)}, {np.isfinite(x).sum()} finite."
        )
    in_logs = bool((x > 0).all())
    y = np.sort(np.log(x) if in_logs else x)
    trim = len(y) // (2 * BLOCKS)  # of 24 processes the second to the last but one
    half = float(t.ppf(0.975, len(y) - 1) * y.std(ddof=1) / math.sqrt(len(y)))
    ends = [min(y[trim], y.mean() - half), max(y[-1 - trim], y.mean() + half)]
    low, high = (math.exp(e) if in_logs else float(e) for e in ends)
    return Interval(float(np.median(x)), low, high)


def median_interval(samples: Sequence[float]) -> Interval:
    """`within_process` for durations and their ratios: the interval stays above zero.

    Positive samples are treated in logarithms, so that an interval of a duration never reaches
    below zero and that of 1/x is that of x turned round.

    >>> median_interval([2.0] * 24)
    2 [2, 2]
    """
    x = np.asarray(samples, dtype=float)
    if len(x) and (x > 0).all():
        log = within_process(np.log(x))
        return Interval(float(np.median(x)), math.exp(log.low), math.exp(log.high))
    return within_process(x)


def speedup(ratios: Sequence[float], processes: bool = False) -> Interval:
    """Speed-up from ratios, one a round of this process, or one a process.

    >>> speedup([2.0, 2.1, 1.9, 2.2, 2.0], processes=True)
    2 [1.9, 2.2] x
    """
    found = (over_processes if processes else median_interval)(ratios)
    return Interval(found.value, found.low, found.high, "x")


def decide(low: float, high: float) -> str:
    """What an interval of a speed-up says, against a difference that matters: 3%.

    "faster": all of it above 1.03. "slower": all of it below 1/1.03. "no difference": all of it
    between the two. Anything else is "inconclusive". A narrower interval inside the same one can
    only settle what was open, never turn one answer into another.

    >>> decide(1.04, 1.10), decide(0.98, 1.02), decide(1.01, 1.05)
    ('faster', 'no difference', 'inconclusive')
    """
    if low > SAME:
        return "faster"
    if high < 1 / SAME:
        return "slower"
    if low >= 1 / SAME and high <= SAME:
        return "no difference"
    return "inconclusive"


def narrow_enough(interval: Interval, precision: float) -> bool:
    """Whether half the width, relative to the value, is at most `precision`.

    >>> narrow_enough(Interval(2.0, 1.99, 2.01), 0.01)
    True
    """
    return (interval.high - interval.low) / 2 <= precision * abs(interval.value)


def derive(
    formula: Callable[..., float],
    *inputs: Interval | float,
    unit: str = "",
    dependent: bool = False,
) -> Interval:
    """`formula(*inputs)` with an interval that carries the width of every input.

    Each input goes to both its ends while the others stay at their values; what that changes is
    added in squares, each side for itself (Zou & Donner 2008, Statistics in Medicine 27:1693):
    right for inputs measured independently. `dependent=True` takes the worst corner, for inputs
    from the same measurement. A plain number is exact. The formula must not turn back within an
    interval (rise and then fall).

    >>> derive(lambda s, p: 1 / (1 - p + p / s), Interval(2, 1.8, 2.2), Interval(0.5, 0.4, 0.6))
    1.33 [1.24, 1.44]
    >>> derive(lambda a, b: a / b, Interval(6, 5.7, 6.3), 3.0, unit="x")
    2 [1.9, 2.1] x
    """
    ends = [(i.value, i.low, i.high) if isinstance(i, Interval) else (i,) * 3 for i in inputs]
    values = [e[0] for e in ends]
    middle = float(formula(*values))
    if dependent:
        corners = [float(formula(*c)) for c in itertools.product(*(e[1:] for e in ends))]
        low, high = min([middle, *corners]), max([middle, *corners])
    else:
        below = above = 0.0
        for k, (_, *both) in enumerate(ends):
            moved = [float(formula(*values[:k], end, *values[k + 1 :])) - middle for end in both]
            below += min(0.0, *moved) ** 2
            above += max(0.0, *moved) ** 2
        low, high = middle - math.sqrt(below), middle + math.sqrt(above)
    if not all(map(math.isfinite, (low, middle, high))):
        raise ValueError(f"the formula gives {middle} [{low}, {high}] for {list(inputs)}.")
    return Interval(middle, low, high, unit)


def paired_t(differences: Sequence[float], unit: str = "") -> Interval:
    """Mean of paired differences (one a seed) with its 95% t-interval, for results over seeds.

    Five seeds are the course's habit: a bootstrap of so few covers far too little, the t-interval
    covers 95% when the differences are roughly normal. Raises ValueError for fewer than three.

    >>> paired_t([0.9, 1.2, 1.7], "points")
    1.27 [0.263, 2.27] points
    """
    from scipy.stats import t

    d = np.asarray(differences, dtype=float)
    if len(d) < 3:
        raise ValueError(f"a paired t-interval needs at least three pairs; got {len(d)}.")
    half = float(t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d)))
    return Interval(float(d.mean()), float(d.mean()) - half, float(d.mean()) + half, unit)


def paired_share(baseline: Sequence[bool], candidate: Sequence[bool]) -> Interval:
    """Difference of two accuracies on the same images, in percentage points: candidate minus
    baseline.

    Only images on which the two disagree count (McNemar 1947); the interval is normal with
    continuity correction. Raises ValueError where the two are not lists of the same length.

    >>> paired_share([True, True, False, False], [True, True, True, False]).value
    25.0
    """
    a, b = np.asarray(baseline, bool), np.asarray(candidate, bool)
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise ValueError(
            "both must be lists of the same length, one entry an image;"
            f" got {a.shape} and {b.shape}."
        )
    gained, lost, n = int((b & ~a).sum()), int((a & ~b).sum()), len(a)
    difference = (gained - lost) / n
    half = 1.96 * math.sqrt(max(gained + lost - (gained - lost) ** 2 / n, 0)) / n + 0.5 / n
    return Interval(
        100 * difference, 100 * (difference - half), 100 * (difference + half), "points"
    )
