"""Answers to the exercises of chapter 01."""

import heapq
import math
import random
import statistics
from fractions import Fraction

import numpy as np
import torch

from answers import right, wrong

right("01.A", "NumPy's definition")(lambda x: np.percentile(x, 99, method="inverted_cdf"))
right("01.A", "whole numbers alone")(lambda x: sorted(x)[-(-99 * len(x) // 100) - 1])
right("01.A", "a fraction")(lambda x: sorted(x)[math.ceil(Fraction(99, 100) * len(x)) - 1])
right("01.A", "the largest hundredth")(lambda x: heapq.nlargest(len(x) // 100 + 1, x)[-1])
right("01.A", "torch")(
    lambda x: torch.tensor(x, dtype=torch.float64).kthvalue(-(-99 * len(x) // 100)).values
)
right("01.A", "32 bits")(lambda x: np.sort(np.float32(x))[math.ceil(0.99 * len(x)) - 1])


@right("01.A", "by counting")
def by_counting(latencies):
    return min(v for v in latencies if sum(w <= v for w in latencies) >= 0.99 * len(latencies))


wrong("01.A", "the position")(lambda x: math.ceil(0.99 * len(x)))
wrong("01.A", "NumPy's default")(lambda x: np.percentile(x, 99))
wrong("01.A", "NumPy's nearest")(lambda x: np.percentile(x, 99, method="nearest"))
wrong("01.A", "NumPy's lower")(lambda x: np.percentile(x, 99, method="lower"))
wrong("01.A", "NumPy's higher")(lambda x: np.percentile(x, 99, method="higher"))
wrong("01.A", "each latency once")(lambda x: np.unique(x)[math.ceil(0.99 * len(np.unique(x))) - 1])
wrong("01.A", "rounded to the nearest")(
    lambda x: sorted(x)[max(math.floor(0.99 * len(x) + 0.5), 1) - 1]
)
wrong("01.A", "rounded down")(lambda x: sorted(x)[max(int(0.99 * len(x)), 1) - 1])
wrong("01.A", "counted from 0")(lambda x: sorted(x)[min(math.ceil(0.99 * len(x)), len(x) - 1)])
wrong("01.A", "whole percents of the last place")(lambda x: sorted(x)[99 * (len(x) - 1) // 100])
wrong("01.A", "the slowest")(max)
wrong("01.A", "not sorted")(lambda x: x[math.ceil(0.99 * len(x)) - 1])
wrong("01.A", "sorted the other way")(
    lambda x: sorted(x, reverse=True)[math.ceil(0.99 * len(x)) - 1]
)
wrong("01.A", "the sorted list")(sorted)
wrong("01.A", "99 for any number of calls")(lambda x: sorted(x)[min(98, len(x) - 1)])
wrong("01.A", "the mean and three deviations")(lambda x: np.mean(x) + 3 * np.std(x))


def _resampled(
    ratios,
    *,
    times=1000,
    size=None,
    ends=(2.5, 97.5),
    center=np.median,
    method="linear",
    replace=True,
):
    ratios, rng = np.asarray(ratios), np.random.default_rng()
    n = len(ratios)
    if replace:
        rows = rng.integers(0, n, size=(times, size or n))
    else:
        rows = np.array([rng.permutation(n)[: size or n] for _ in range(times)])
    return np.percentile(center(ratios[rows], axis=1), ends, method=method)


def _interval(**changes):
    def interval(baseline, candidate):
        ratios = np.asarray(baseline) / np.asarray(candidate)
        low, high = _resampled(ratios, **changes)
        return low, np.median(ratios), high

    return interval


@right("01.B", "loops, 500 times")
def loops(baseline, candidate):
    ratios = [b / c for b, c in zip(baseline, candidate, strict=True)]
    medians = sorted(statistics.median(random.choices(ratios, k=len(ratios))) for _ in range(500))
    return [medians[12], statistics.median(ratios), medians[487]]


@right("01.B", "torch, 32 bits")
def in_torch(baseline, candidate):
    ratios = torch.tensor(baseline) / torch.tensor(candidate)
    rows = torch.randint(len(ratios), (2000, len(ratios)))
    ends = ratios[rows].quantile(0.5, dim=1).quantile(torch.tensor([0.025, 0.975]))
    return ends[0], ratios.quantile(0.5), ends[1]


@right("01.B", "the rounds are resampled, then divided")
def rows_of_pairs(baseline, candidate):
    pairs = np.stack([baseline, candidate])
    rows = np.random.default_rng().integers(len(baseline), size=(600, len(baseline)))
    low, high = np.quantile(np.median(pairs[0][rows] / pairs[1][rows], axis=-1), [0.025, 0.975])
    return np.array([low, np.median(pairs[0] / pairs[1]), high])


@right("01.B", "the same draws in each call")
def same_draws(baseline, candidate):
    ratios, n = np.array(baseline) / candidate, len(baseline)
    rows = np.random.default_rng(5).integers(0, n, (1000, n))
    low, high = np.percentile(np.median(ratios[rows], 1), [2.5, 97.5])
    return low, np.median(ratios), high


right("01.B", "another definition of the percentile")(_interval(method="inverted_cdf"))

wrong("01.B", "an interval of 90%")(_interval(ends=(5, 95)))
wrong("01.B", "an interval of 80%")(_interval(ends=(10, 90)))
wrong("01.B", "an interval of 99%")(_interval(ends=(0.5, 99.5)))
wrong("01.B", "20 resamples")(_interval(times=20))
wrong("01.B", "50 resamples")(_interval(times=50))
wrong("01.B", "means of resamples")(_interval(center=np.mean))
wrong("01.B", "resamples without replacement")(_interval(replace=False))
wrong("01.B", "single rounds, not resamples")(_interval(size=1))


@wrong("01.B", "half a resample")
def half(baseline, candidate):
    return _interval(size=max(len(baseline) // 2, 1))(baseline, candidate)


@wrong("01.B", "twice a resample")
def double(baseline, candidate):
    return _interval(size=2 * len(baseline))(baseline, candidate)


@wrong("01.B", "the last round is never drawn")
def not_the_last(baseline, candidate):
    ratios = np.array(baseline) / candidate
    low, high = _resampled(ratios[:-1] if len(ratios) > 1 else ratios)
    return low, np.median(ratios), high


@wrong("01.B", "mean and 1.96 standard errors")
def normal(baseline, candidate):
    ratios = np.array(baseline) / candidate
    half = 1.96 * ratios.std() / math.sqrt(len(ratios))
    return np.median(ratios) - half, np.median(ratios), np.median(ratios) + half


@wrong("01.B", "median and 1.96 deviations of the resamples' medians")
def even(baseline, candidate):
    ratios = np.array(baseline) / candidate
    rows = np.random.default_rng().integers(0, len(ratios), size=(1000, len(ratios)))
    half = 1.96 * np.median(ratios[rows], axis=1).std()
    return np.median(ratios) - half, np.median(ratios), np.median(ratios) + half


@wrong("01.B", "the interval mirrored about the median")
def mirrored(baseline, candidate):
    low, middle, high = _interval()(baseline, candidate)
    return 2 * middle - high, middle, 2 * middle - low


@wrong("01.B", "the percentiles of the rounds")
def rounds(baseline, candidate):
    ratios = np.array(baseline) / candidate
    return tuple(np.percentile(ratios, [2.5, 50, 97.5]))


@wrong("01.B", "a ratio of medians")
def of_medians(baseline, candidate):
    low, _, high = _interval()(baseline, candidate)
    return low, np.median(baseline) / np.median(candidate), high


@wrong("01.B", "a logarithm is the speed-up")
def logarithms(baseline, candidate):
    return tuple(np.log(v) for v in _interval()(baseline, candidate))


def _verdict(low, high):
    return "faster" if low > 1 else "slower" if high < 1 else "can't tell"


def _by_shares(share):
    """So large a share of all rounds on one side."""

    def decide(ratios):
        return _verdict(np.quantile(ratios, 1 - share), np.quantile(ratios, share))

    return decide


@right("01.C", "six blocks that agree")
def six(ratios):
    medians = [statistics.median(ratios[i : i + 10]) for i in range(0, 60, 10)]
    return np.array(_verdict(min(medians), max(medians))).item()


right("01.C", "four rounds of five: a sign test that allows for the memory")(_by_shares(0.8))


@right("01.C", "a bootstrap of ten blocks, 99.9%, in loops")
def blocks(ratios):
    parts = [statistics.median(ratios[i : i + 6]) for i in range(0, 60, 6)]
    medians = sorted(statistics.median(random.choices(parts, k=10)) for _ in range(1000))
    return _verdict(medians[1], medians[-2])


@right("01.C", "t of fifteen blocks' log medians")
def student(ratios):
    logs = np.log(np.median(np.reshape(ratios, (15, 4)), axis=1))
    half = 3.3 * logs.std(ddof=1) / math.sqrt(15)
    return _verdict(math.exp(logs.mean() - half), math.exp(logs.mean() + half))


def _fixed(threshold):
    return lambda ratios: _verdict(np.median(ratios) / threshold, np.median(ratios) * threshold)


for _threshold in (1.0, 1.02, 1.03, 1.05, 1.1):
    wrong("01.C", f"a fixed threshold of {_threshold}")(_fixed(_threshold))
wrong("01.C", "more rounds on one side than on the other")(_by_shares(0.6))
wrong("01.C", "every round must agree")(lambda r: _verdict(min(r), max(r)))
wrong("01.C", "always the same")(lambda r: "can't tell")
wrong("01.C", "a number")(lambda r: float(np.median(r)))
wrong("01.C", "the words exchanged")(
    lambda r: {"faster": "slower", "slower": "faster"}.get(six(r), "can't tell")
)
wrong("01.C", "a bootstrap of single rounds")(lambda r: _verdict(*_resampled(r, times=300)))
wrong("01.C", "a bootstrap of means")(lambda r: _verdict(*_resampled(r, times=300, center=np.mean)))


@wrong("01.C", "a bootstrap of single rounds, in loops")
def in_loops(ratios):
    medians = sorted(statistics.median(random.choices(ratios, k=60)) for _ in range(500))
    return _verdict(medians[12], medians[-13])


@wrong("01.C", "a bootstrap of six blocks, 95%: too few")
def few_blocks(ratios):
    parts = np.reshape(ratios, (6, 10))
    rows = np.random.default_rng().integers(0, 6, size=(300, 6))
    return _verdict(*np.percentile(np.median(parts[rows].reshape(300, -1), axis=1), [2.5, 97.5]))


@wrong("01.C", "a sign test that takes all rounds for independent")
def signs(ratios):
    above, below = sum(r > 1 for r in ratios), sum(r < 1 for r in ratios)
    return "faster" if above >= 38 else "slower" if below >= 38 else "can't tell"


@wrong("01.C", "the first round decides")
def first(ratios):
    return _verdict(ratios[0], ratios[0])


@wrong("01.C", "slower is never seen")
def one_sided(ratios):
    return "faster" if six(ratios) == "faster" else "can't tell"
