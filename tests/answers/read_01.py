"""Wrong answers to chapter 01's exercises, by somebody who has read only their texts."""

import math
import random
import statistics

import numpy as np

from answers import wrong

# ---- A


@wrong("01.A", "read only: rounded down, right where 100 divides n")
def floor_position(latencies):
    ordered = sorted(latencies)
    return ordered[max(0, int(0.99 * len(ordered)) - 1)]


@wrong("01.A", "read only: rounded to the nearest, wrong for 170")
def nearest_position(latencies):
    ordered = sorted(latencies)
    return ordered[max(0, round(0.99 * len(ordered)) - 1)]


@wrong("01.A", "read only: counted from 0, one too far")
def from_zero(latencies):
    ordered = sorted(latencies)
    return ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)))]


@wrong("01.A", "read only: third from the end, as for 200")
def third_from_end(latencies):
    ordered = sorted(latencies)
    return ordered[max(-3, -len(ordered))]


@wrong("01.A", "read only: at least one call is always left out, wrong below 100")
def leaves_one_out(latencies):
    ordered = sorted(latencies)
    out = max(1, len(ordered) // 100)
    return ordered[max(0, len(ordered) - out - 1)]


@wrong("01.A", "read only: numpy's method lower, right for 200")
def numpy_lower(latencies):
    return np.percentile(latencies, 99, method="lower")


@wrong("01.A", "read only: numpy's nearest, right for 200")
def numpy_nearest(latencies):
    return np.percentile(latencies, 99, method="nearest")


@wrong("01.A", "read only: between two latencies, a number that no call took")
def interpolated(latencies):
    return float(np.percentile(latencies, 99))


@wrong("01.A", "read only: not sorted")
def unsorted(latencies):
    return latencies[-(-99 * len(latencies) // 100) - 1]


@wrong("01.A", "read only: equal latencies count once")
def unique(latencies):
    ordered = sorted(set(latencies))
    return ordered[-(-99 * len(ordered) // 100) - 1]


@wrong("01.A", "read only: sorts the caller's list in place")
def in_place(latencies):
    latencies.sort()
    return latencies[-(-99 * len(latencies) // 100) - 1]


# ---- B


def _bootstrap(ratios, *, statistic=np.median, rounds=1000, size=None, ends=(2.5, 97.5)):
    ratios = np.asarray(ratios, float)
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(ratios), (rounds, size or len(ratios)))
    drawn = statistic(ratios[picks], axis=1)
    low, high = np.percentile(drawn, ends)
    return float(low), float(high), drawn


@wrong("01.B", "read only: the two lists resampled apart from each other, the pairs are torn")
def torn_pairs(baseline, candidate):
    rng = np.random.default_rng(0)
    b, c = np.asarray(baseline, float), np.asarray(candidate, float)
    drawn = [
        np.median(b[rng.integers(0, len(b), len(b))] / c[rng.integers(0, len(c), len(c))])
        for _ in range(1000)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(np.median(b / c)), float(high)


@wrong("01.B", "read only: middle is the ratio of the medians")
def ratio_of_medians(baseline, candidate):
    low, high, _ = _bootstrap(np.divide(baseline, candidate))
    return low, float(np.median(baseline) / np.median(candidate)), high


@wrong("01.B", "read only: means everywhere")
def means(baseline, candidate):
    ratios = np.divide(baseline, candidate)
    low, high, _ = _bootstrap(ratios, statistic=np.mean)
    return low, float(ratios.mean()), high


@wrong("01.B", "read only: the interval of the mean around the median")
def mean_interval(baseline, candidate):
    ratios = np.divide(baseline, candidate)
    low, high, _ = _bootstrap(ratios, statistic=np.mean)
    return low, float(np.median(ratios)), high


@wrong("01.B", "read only: percentiles of the rounds, not of the median")
def of_the_rounds(baseline, candidate):
    ratios = np.divide(baseline, candidate)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(np.median(ratios)), float(high)


@wrong("01.B", "read only: 5th and 95th percentile")
def ninety(baseline, candidate):
    ratios = np.divide(baseline, candidate)
    low, high, _ = _bootstrap(ratios, ends=(5, 95))
    return low, float(np.median(ratios)), high


@wrong("01.B", "read only: 2.5% only above, the low end is the 25th percentile")
def typing_slip(baseline, candidate):
    ratios = np.divide(baseline, candidate)
    low, high, _ = _bootstrap(ratios, ends=(25, 97.5))
    return low, float(np.median(ratios)), high


@wrong("01.B", "read only: drawn without replacement, the interval has no width")
def no_replacement(baseline, candidate):
    ratios = np.divide(baseline, candidate)
    rng = np.random.default_rng(0)
    drawn = [np.median(rng.permutation(ratios)) for _ in range(500)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(np.median(ratios)), float(high)


@wrong("01.B", "read only: resamples of half the rounds, too wide")
def half_size(baseline, candidate):
    ratios = np.divide(baseline, candidate)
    low, high, _ = _bootstrap(ratios, size=max(1, len(ratios) // 2))
    return low, float(np.median(ratios)), high


@wrong("01.B", "read only: resamples of always 1000 rounds, too narrow")
def always_thousand(baseline, candidate):
    ratios = np.divide(baseline, candidate)
    low, high, _ = _bootstrap(ratios, rounds=500, size=1000)
    return low, float(np.median(ratios)), high


@wrong("01.B", "read only: the smallest and the largest of the resamples")
def extremes(baseline, candidate):
    ratios = np.divide(baseline, candidate)
    _, _, drawn = _bootstrap(ratios)
    return float(drawn.min()), float(np.median(ratios)), float(drawn.max())


@wrong("01.B", "read only: the lower median of an even number of rounds")
def low_median(baseline, candidate):
    ratios = np.divide(baseline, candidate)
    low, high, _ = _bootstrap(ratios)
    return low, float(statistics.median_low(ratios.tolist())), high


@wrong("01.B", "read only: both lists sorted before the division")
def sorted_apart(baseline, candidate):
    ratios = np.divide(sorted(baseline), sorted(candidate))
    low, high, _ = _bootstrap(ratios)
    return low, float(np.median(ratios)), high


@wrong("01.B", "read only: middle is the mean of the resamples' medians")
def mean_of_medians(baseline, candidate):
    low, high, drawn = _bootstrap(np.divide(baseline, candidate))
    return low, float(drawn.mean()), high


# ---- C


def _say(low, high):
    return "faster" if low > 0 else "slower" if high < 0 else "can't tell"


@wrong("01.C", "read only: the median decides alone")
def median_alone(ratios):
    middle = np.median(ratios)
    return "faster" if middle > 1 else "slower" if middle < 1 else "can't tell"


@wrong("01.C", "read only: never tells")
def never(ratios):
    return "can't tell"


@wrong("01.C", "read only: mean and standard error of the logarithms, as if rounds were apart")
def t_test(ratios):
    logs = np.log(ratios)
    half = 2 * logs.std(ddof=1) / math.sqrt(len(logs))
    return _say(logs.mean() - half, logs.mean() + half)


@wrong("01.C", "read only: a bootstrap of single rounds, blind for the memory")
def single_rounds(ratios):
    logs = np.log(ratios)
    rng = np.random.default_rng(0)
    drawn = np.median(logs[rng.integers(0, len(logs), (300, len(logs)))], axis=1)
    return _say(*np.percentile(drawn, [2.5, 97.5]))


@wrong("01.C", "read only: a sign test, blind for the memory")
def sign_test(ratios):
    above = sum(r > 1 for r in ratios)
    return "faster" if above >= 38 else "slower" if above <= 22 else "can't tell"


@wrong("01.C", "read only: a fixed margin of 2%, as for the quietest machine")
def two_percent(ratios):
    middle = np.median(ratios)
    return "faster" if middle > 1.02 else "slower" if middle < 1 / 1.02 else "can't tell"


@wrong("01.C", "read only: a fixed margin of 30%, as for the noisiest machine")
def thirty_percent(ratios):
    middle = np.median(ratios)
    return "faster" if middle > 1.3 else "slower" if middle < 1 / 1.3 else "can't tell"


def _blocks(ratios, size=10):
    logs = np.log(ratios)
    return np.array([np.median(logs[i : i + size]) for i in range(0, len(logs), size)])


@wrong("01.C", "read only: finds gains only, a slow-down is never told")
def gains_only(ratios):
    blocks = _blocks(ratios)
    half = 2.57 * blocks.std(ddof=1) / math.sqrt(len(blocks))
    return "faster" if blocks.mean() - half > 0 else "can't tell"


@wrong("01.C", "read only: faster and slower the wrong way round")
def swapped(ratios):
    blocks = _blocks(ratios)
    half = 2.57 * blocks.std(ddof=1) / math.sqrt(len(blocks))
    return _say(-blocks.mean() - half, -blocks.mean() + half)


@wrong("01.C", "read only: means of blocks, one round off by ten spoils them")
def block_means(ratios):
    blocks = np.asarray(ratios, float).reshape(6, 10).mean(1) - 1
    half = 2.57 * blocks.std(ddof=1) / math.sqrt(6)
    return _say(blocks.mean() - half, blocks.mean() + half)


@wrong("01.C", "read only: only when all sixty rounds agree")
def all_agree(ratios):
    return _say(min(ratios) - 1, max(ratios) - 1)


@wrong("01.C", "read only: the noise from neighbours' differences, which the memory makes small")
def neighbours(ratios):
    logs = np.log(ratios)
    noise = np.median(np.abs(np.diff(logs))) / 0.6745 / math.sqrt(2)
    half = 2 * 1.25 * noise / math.sqrt(len(logs))
    return _say(np.median(logs) - half, np.median(logs) + half)


@wrong("01.C", "read only: tosses a coin where it looks close")
def coin(ratios):
    return random.choice(["faster", "slower"]) if 0.98 < np.median(ratios) < 1.02 else "can't tell"
