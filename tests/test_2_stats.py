"""The statistics behind every verdict: false alarms, power and coverage on synthetic series; known
sleeps.
"""

import itertools
import math
import time

import numpy as np
import pytest
import torch

from course_utils import measure
from course_utils.measure import stats, timing

SERIES = 2000


def series(rng: np.random.Generator, kind: str, n: int, sd: float) -> np.ndarray:
    """Logarithms of per-round ratios: independent, autocorrelated at 0.5, or heavy-tailed (Student,
    2 degrees).
    """
    if kind == "independent":
        return rng.normal(0, sd, n)
    if kind == "heavy-tailed":
        return sd * rng.standard_t(2, n)
    steps, out = rng.normal(0, sd * math.sqrt(0.75), n), np.empty(n)
    out[0] = rng.normal(0, sd)
    for i in range(1, n):
        out[i] = 0.5 * out[i - 1] + steps[i]
    return out


def outcome(noise: np.ndarray, true: float) -> stats.Interval:
    """What compare would conclude from this series, its stopping rule and its clock included: 40 ms
    a round, 3 s.
    """
    ticks = itertools.count()
    rounds = iter(true * np.exp(noise))
    ratios, _ = timing.collect(
        lambda: (next(rounds), 1.0), seconds=3.0, precision=0.01, now=lambda: 0.04 * next(ticks)
    )
    return stats.speedup(ratios)


@pytest.mark.parametrize("kind", ["independent", "autocorrelated", "heavy-tailed"])
@pytest.mark.parametrize("sd", [0.02, 0.06])
def test_few_false_differences_and_the_truth_is_found(kind, sd):
    rng = np.random.default_rng(7)
    alarms = found = covered = 0
    for _ in range(SERIES // 2):
        noise = series(rng, kind, 120, sd)
        same, faster = outcome(noise, 1.0), outcome(noise, 1.10)
        alarms += stats.decide(same.low, same.high) in ("faster", "slower")
        found += stats.decide(faster.low, faster.high) == "faster"
        covered += same.low <= 1 <= same.high
    assert alarms / (SERIES // 2) <= 0.07
    assert found / (SERIES // 2) >= 0.90
    assert covered / (SERIES // 2) >= 0.93


def test_a_naive_rule_would_fail_the_same_test():
    """The test above can fail: the sign of the median alone calls almost every A/A series a
    difference.
    """
    rng = np.random.default_rng(7)
    naive = [np.median(series(rng, "autocorrelated", 120, 0.02)) != 0 for _ in range(200)]
    assert np.mean(naive) > 0.9


def test_known_sleeps_are_measured_right():
    result = measure.compare(
        lambda: time.sleep(0.012), lambda: time.sleep(0.006), seconds=1.0, threads=1
    )
    assert result.verdict == "faster"
    assert (
        result.low <= 2.0 <= result.high * 1.02
    )  # sleep may oversleep by a little, both arms alike
    assert 0.012 <= result.baseline_seconds < 0.0135


@pytest.mark.parametrize(
    ("low", "high", "answer"),
    [
        (0.98, 1.02, "no difference"),
        (1.01, 1.029, "no difference"),
        (1.01, 1.2, "faster"),
        (0.5, 0.99, "slower"),
        (0.9, 1.1, "inconclusive"),
    ],
)
def test_the_four_answers(low, high, answer):
    assert stats.decide(low, high) == answer


def test_slower_is_faster_turned_round():
    rng = np.random.default_rng(3)
    ratios = np.exp(series(rng, "autocorrelated", 48, 0.05)) * 1.3
    one, other = stats.speedup(ratios), stats.speedup(1 / ratios)
    assert one.low == pytest.approx(1 / other.high)
    assert one.high == pytest.approx(1 / other.low)


def test_stopping_looks_at_the_width_not_at_the_verdict():
    """A clear but wide difference is measured until the time is spent; a narrow one ends at the
    first look.
    """

    def rounds(pairs: list[tuple[float, float]]) -> int:
        cycle, ticks = itertools.cycle(pairs), itertools.count()
        return len(
            timing.collect(
                lambda: next(cycle), seconds=100.0, precision=0.01, now=lambda: next(ticks)
            )[0]
        )

    assert rounds([(2.5, 1.0), (1.6, 1.0), (1.6, 1.0), (2.5, 1.0), (3.0, 1.0)]) > 100
    assert rounds([(2.0, 1.0)]) == timing.LOOKS[0] == 24


@pytest.mark.parametrize("bad", [[1.0] * 7, [1.0] * 9 + [float("nan")]])
def test_an_interval_needs_enough_finite_samples(bad):
    with pytest.raises(ValueError, match="at least 8"):
        stats.median_interval(bad)


def test_paired_t_against_scipy_and_coverage():
    from scipy.stats import ttest_1samp

    rng = np.random.default_rng(5)
    d = rng.normal(1, 2, 5)
    ours, theirs = measure.paired_t(d), ttest_1samp(d, 0).confidence_interval()
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
    hits = [measure.paired_t(rng.normal(0, 1, 5)) for _ in range(500)]
    assert 0.92 <= np.mean([h.low <= 0 <= h.high for h in hits]) <= 0.98
    with pytest.raises(ValueError, match="three pairs"):
        measure.paired_t([1.0, 2.0])


def test_paired_share_counts_only_disagreements():
    a, b = np.array([1, 1, 0, 0] * 100, bool), np.array([1, 1, 1, 0] * 100, bool)
    result = measure.paired_share(a, b)
    assert result.value == 25.0
    assert 20 < result.low < 25 < result.high < 30
    assert measure.paired_share(a, a).value == 0
    with pytest.raises(ValueError, match="same length"):
        measure.paired_share(a, b[:-1])


def test_arms_that_mean_nothing_are_refused():
    x = torch.randn(64, 64)
    work, done = (lambda: x @ x), x @ x
    with pytest.raises(measure.MeasurementError, match="nothing is computed"):
        measure.compare(work, lambda: done)
    with pytest.raises(measure.MeasurementError, match="generator"):
        measure.compare(work, lambda: (x @ x for _ in range(2)))

    async def later():
        return x @ x

    with pytest.raises(measure.MeasurementError, match="coroutine"):
        measure.compare(work, later)
    with pytest.raises(measure.MeasurementError, match="ZeroDivisionError: division by zero"):
        measure.compare(work, lambda: 1 / 0)
    with pytest.raises(TypeError, match="already computed"):
        measure.compare(work, done)
    with pytest.raises(measure.MeasurementError, match="same threads"):
        measure.compare(measure.Arm(work, "a", threads=1), measure.Arm(work, "b", threads=2))
    with pytest.raises(ValueError, match="clock"):
        measure.compare(work, work, clock="sundial")


def test_conditions_are_stated():
    x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    text = repr(
        measure.compare(
            *[measure.arm(torch.nn.Conv2d(3, 8, 3), x, "conv")] * 2, seconds=0.2, threads=1
        )
    )
    assert all(
        part in text
        for part in ("1 thread", "wall clock", "float32", "batch 4", "channels_last", "rounds")
    )


def test_cpu_clock_does_not_count_sleep():
    x = torch.randn(256, 256)
    result = measure.compare(
        lambda: (x @ x, time.sleep(0.01)), lambda: x @ x, seconds=0.5, clock="cpu"
    )
    assert 0.5 < result.ratio < 2
