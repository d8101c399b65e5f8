"""The statistics behind every answer about time: coverage, false alarms and power on planted noise,
with the stopping rule on; what is derived; which arms are refused.
"""

import functools
import itertools
import math
import time

import numpy as np
import pytest
import torch

from course_utils import machine, measure
from course_utils.measure import arms, stats, timing

SERIES = 2000
CALLS_A_DIFFERENCE = ("faster", "slower")


def autoregressive(rng: np.random.Generator, n: int, sd: float, kept: float) -> np.ndarray:
    steps = rng.normal(0, sd * math.sqrt(1 - kept**2), n)
    out = [rng.normal(0, sd)]
    for step in steps[1:]:
        out.append(kept * out[-1] + step)
    return np.array(out)


def pink(rng: np.random.Generator, n: int, sd: float, whole: int = 4096) -> np.ndarray:
    """A piece of a longer series with power 1/f: its own mean is not the whole one's."""
    f = np.arange(1, whole // 2 + 1)
    angle, size = rng.uniform(0, 2 * math.pi, len(f)), np.sqrt(rng.exponential(size=len(f)) / f)
    x = np.fft.irfft(np.concatenate([[0], size * np.exp(1j * angle)]), whole)
    start = rng.integers(0, whole - n)
    return sd * (x / x.std())[start : start + n]


def two_moods(rng: np.random.Generator, n: int, sd: float, apart: float = 0.05) -> np.ndarray:
    """Two speeds 5% apart; the machine stays in one for sixty rounds on average."""
    changes = np.cumsum(rng.random(n) < 1 / 60) + rng.integers(0, 2)
    return rng.normal(0, sd, n) + apart * (changes % 2 - 0.5)


NOISE = {
    "independent": lambda rng, n, sd: rng.normal(0, sd, n),
    "heavy-tailed": lambda rng, n, sd: sd * rng.standard_t(2, n),
    "0.5 kept": lambda rng, n, sd: autoregressive(rng, n, sd, 0.5),
    "0.8 kept": lambda rng, n, sd: autoregressive(rng, n, sd, 0.8),
    "0.95 kept": lambda rng, n, sd: autoregressive(rng, n, sd, 0.95),
    "pink": pink,
    "two moods": two_moods,
}


def outcome(
    noise: np.ndarray, true: float, a_round: float = 0.01, precision: float = 0.01
) -> stats.Interval:
    """What compare would conclude from this series in three seconds, its stopping rule and its
    clock included: `a_round` seconds each.
    """
    ticks, rounds = itertools.count(), iter(true * np.exp(noise))
    ratios, _ = timing.collect(
        lambda: (next(rounds), 1.0),
        seconds=3.0,
        precision=precision,
        now=lambda: a_round * next(ticks),
    )
    return stats.speedup(ratios)


def answer(interval: stats.Interval) -> str:
    return stats.decide(interval.low, interval.high)


@pytest.mark.settled
@pytest.mark.parametrize("a_round", [0.01, 0.04, 0.25])  # about 300, 80 and 20 rounds
@pytest.mark.parametrize("kind", NOISE)
def test_the_interval_holds_or_leaves_it_open(kind, a_round):
    """Two equal arms, 2,000 series of 2% and 6% of noise, with a strict and a lax stopping rule: at
    least 90% hold 1 or are inconclusive, and at most 5% are called faster or slower.
    """
    rng, held, alarms = np.random.default_rng(7), 0, 0
    rounds = round(3 / a_round) + 12
    for k in range(SERIES):
        sd, precision = ((0.02, 0.01), (0.06, 0.01), (0.02, 0.05))[k % 3]
        same = outcome(NOISE[kind](rng, rounds, sd), 1.0, a_round, precision)
        held += same.low <= 1 <= same.high or answer(same) == "inconclusive"
        alarms += answer(same) in CALLS_A_DIFFERENCE
    print(f"held or open {held / SERIES:.3f}, called a difference {alarms / SERIES:.3f}")
    assert held / SERIES >= 0.90
    assert alarms / SERIES <= 0.05


@pytest.mark.settled
@pytest.mark.parametrize("kind", NOISE)
def test_a_long_series_holds_the_truth_itself(kind):
    """300 rounds, and open answers do not count as right."""
    rng, held = np.random.default_rng(8), 0
    for _ in range(500):
        same = outcome(NOISE[kind](rng, 312, 0.02), 1.0)
        held += same.low <= 1 <= same.high
    assert held / 500 >= 0.90


@pytest.mark.settled
def test_a_tenth_is_found():
    """Power: 1.10 against noise of 2% is called faster in nine of ten series of 75 rounds."""
    rng = np.random.default_rng(9)
    found = [
        answer(outcome(rng.normal(0, 0.02, 87), 1.10, 0.04)) == "faster" for _ in range(SERIES)
    ]
    assert np.mean(found) >= 0.90


@pytest.mark.settled
def test_a_plain_bootstrap_fails_where_ours_holds():
    """The tests above can fail: a percentile bootstrap of the same moods, stopped when narrow."""
    rng, held = np.random.default_rng(7), 0
    for _ in range(200):
        x = two_moods(rng, 75, 0.02)
        medians = np.median(rng.choice(x, (200, len(x))), axis=1)
        low, high = np.exp(np.percentile(medians, (2.5, 97.5)))
        held += low <= 1 <= high or stats.decide(low, high) == "inconclusive"
    assert held / 200 < 0.90


@pytest.mark.settled
@pytest.mark.parametrize("processes", [5, 6, 8, 12, 24])
@pytest.mark.parametrize("spread", ["normal", "two kinds of process", "heavy-tailed"])
def test_the_interval_over_processes(processes, spread):
    """Each process has an offset of its own; 2,000 sets, the median must be held in 94%."""
    rng, held = np.random.default_rng(11), 0
    draw = {
        "normal": lambda: rng.normal(0, 0.1, processes),
        "heavy-tailed": lambda: 0.1 * rng.standard_t(2, processes),
        "two kinds of process": lambda: (
            0.3 * (rng.random(processes) < 0.5) - 0.15 + rng.normal(0, 0.01, processes)
        ),
    }[spread]
    for _ in range(SERIES):
        found = stats.speedup(np.exp(draw()), processes=True)
        held += found.low <= 1 <= found.high
    lucky = 2 * 0.5**processes if spread == "two kinds of process" else 0  # all of one kind
    assert held / SERIES >= min(0.94, 1 - lucky - 0.02)


@pytest.mark.settled
def test_a_tenth_is_found_over_processes():
    """Power: processes 2% apart tell 1.10 from 1 in nine of ten comparisons, equal arms never."""
    rng = np.random.default_rng(12)
    sets = np.exp(rng.normal(0, 0.02, (500, 12)))
    found = [answer(stats.speedup(1.10 * s, processes=True)) == "faster" for s in sets]
    false = [answer(stats.speedup(s, processes=True)) in CALLS_A_DIFFERENCE for s in sets]
    assert np.mean(found) >= 0.90
    assert np.mean(false) <= 0.01


@pytest.mark.settled
def test_one_process_does_not_speak_for_the_next():
    """What the path over processes is for: ten intervals from one long series each miss."""
    rng = np.random.default_rng(3)
    offsets = rng.normal(0, 0.2, 10)
    within = [stats.speedup(np.exp(o + rng.normal(0, 0.02, 300))) for o in offsets]
    assert sum(i.low <= 1 <= i.high for i in within) <= 3
    over = [stats.speedup(np.exp(rng.normal(0, 0.2, 12)), processes=True) for _ in range(10)]
    assert sum(i.low <= 1 <= i.high for i in over) >= 9


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.98, 1.02, "no difference"),
        (1.01, 1.029, "no difference"),
        (1.015, 1.025, "no difference"),
        (1.005, 1.035, "inconclusive"),
        (1.01, 1.2, "inconclusive"),
        (1.031, 1.2, "faster"),
        (0.5, 0.97, "slower"),
        (0.5, 0.99, "inconclusive"),
        (0.9, 1.1, "inconclusive"),
    ],
)
def test_the_four_answers(low, high, said):
    assert stats.decide(low, high) == said
    mirror = {"faster": "slower", "slower": "faster"}
    assert stats.decide(1 / high, 1 / low) == mirror.get(said, said)


@pytest.mark.settled
def test_measuring_better_never_turns_an_answer_round():
    """Of two intervals one inside the other, the inner may settle what the outer left open, no
    more.
    """
    ends = np.exp(np.linspace(-0.08, 0.08, 33))
    for a, b, c, d in itertools.combinations(ends, 4):
        outer, inner = stats.decide(a, d), stats.decide(b, c)
        assert outer in ("inconclusive", inner), ((a, d), (b, c))


def test_slower_is_faster_turned_round():
    rng = np.random.default_rng(3)
    for n in (48, 300):
        ratios = np.exp(autoregressive(rng, n, 0.05, 0.5)) * 1.3
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
                lambda: next(cycle), seconds=300.0, precision=0.01, now=lambda: next(ticks)
            )[0]
        )

    wide = np.exp(np.random.default_rng(2).normal(1, 0.3, 400))
    assert rounds([(r, 1.0) for r in wide]) > 290
    assert rounds([(2.0, 1.0), (2.001, 1.0)]) == stats.LOOK_AFTER[0] == 24


@pytest.mark.parametrize("bad", [[1.0] * 7, [1.0] * 9 + [float("nan")]])
def test_an_interval_needs_enough_finite_samples(bad):
    with pytest.raises(ValueError, match="at least 8"):
        stats.median_interval(bad)
    with pytest.raises(ValueError, match="at least 5"):
        stats.over_processes(bad[:4])


def test_an_interval_of_a_duration_stays_above_zero():
    few = stats.median_interval([0.01, 0.02, 0.5, 0.01, 0.02, 0.01, 0.02, 0.4])
    assert 0 < few.low < few.value < few.high


# ---------------------------------------------------------------------------- derived intervals


@pytest.mark.settled
@pytest.mark.parametrize(
    ("formula", "true"),
    [
        (lambda a, b: a * b, (4.0, 1.5)),
        (lambda a, b: a / b, (4.0, 1.5)),
        (lambda s, p: 1 / (1 - p / 3 + p / (3 * s)), (4.0, 1.5)),
        (lambda a, b: a - b, (4.0, 1.5)),
    ],
)
def test_a_derived_interval_carries_every_width(formula, true):
    rng, held, of_one = np.random.default_rng(5), 0, 0
    wanted = formula(*true)
    for _ in range(SERIES):
        found = []
        for value in true:
            half = 0.06 * value
            middle = value + rng.normal(0, half / 1.96)
            found.append(stats.Interval(middle, middle - half, middle + half))
        whole = stats.derive(formula, *found)
        first_only = stats.derive(formula, found[0], found[1].value)
        held += whole.low <= wanted <= whole.high
        of_one += first_only.low <= wanted <= first_only.high
    assert 0.93 <= held / SERIES <= 0.975
    assert of_one < held  # leaving a width out covers less


def test_derive_takes_plain_numbers_and_the_worst_corner():
    two = stats.Interval(2.0, 1.8, 2.2)
    assert stats.derive(lambda a, b: a * b, two, 3.0, unit="x") == stats.Interval(
        6.0, pytest.approx(5.4), pytest.approx(6.6), "x"
    )
    worst = stats.derive(lambda a, b: a / b, two, two, dependent=True)
    assert (worst.low, worst.high) == (pytest.approx(1.8 / 2.2), pytest.approx(2.2 / 1.8))
    with pytest.raises(ValueError, match="nan|inf"):
        stats.derive(lambda a: a * math.inf, two)


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


# ------------------------------------------------------------------------------ arms and refusals


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
    with pytest.raises(ValueError, match="processes is 4"):
        measure.across(work, work, processes=4)


def test_more_threads_than_cores_are_refused(monkeypatch):
    x = torch.randn(64, 64)
    monkeypatch.setattr(machine, "usable_cores", lambda: 1)
    with pytest.raises(measure.MeasurementError, match="2 threads on 1 usable core take turns"):
        measure.compare(lambda: x @ x, lambda: x @ x, threads=2)
    assert arms.agreed_threads(arms.Arm(min), arms.Arm(max), None, "wall") == 1


@pytest.mark.parametrize(
    "plain",
    [
        lambda model, x: model(x),  # returns what it built
        lambda model, x: float(model(x).sum().detach()),  # builds it and drops it
        lambda model, x: model(x).sum().backward(),  # uses it
        lambda model, x: {"logits": model(x)},
    ],
)
@pytest.mark.parametrize("path", [measure.compare, measure.across])
def test_a_graph_beside_inference_mode_is_refused(plain, path):
    model, x = torch.nn.Linear(256, 256), torch.randn(64, 256)
    with pytest.raises(measure.MeasurementError, match="two modes: inference makes no graph"):
        path(measure.arm(model, x, "inference"), lambda: plain(model, x), seconds=0.1)
    whole = measure.compare(
        measure.arm(model, x), lambda: plain(model, x), seconds=0.1, across_modes=True
    )
    assert whole.rounds >= 8


def test_looking_for_a_graph_is_silent(recwarn):
    """Selective checkpointing warns of hooks around it, with a path; no reader asked for ours."""
    from torch.utils import checkpoint as c

    dear = functools.partial(c.create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    model, x = torch.nn.Linear(64, 64), torch.randn(64, 64, requires_grad=True)

    def step() -> None:
        c.checkpoint(model, x, use_reentrant=False, context_fn=dear).sum().backward()

    measure.compare(step, step, seconds=0.1)
    assert [str(w.message) for w in recwarn] == []


def test_no_grad_beside_inference_mode_is_one_mode():
    model, x = torch.nn.Linear(256, 256), torch.randn(64, 256)
    with torch.no_grad():
        measure.compare(measure.arm(model, x), lambda: model(x), seconds=0.1)


def test_a_compilation_during_the_rounds_is_refused(monkeypatch):
    graphs = itertools.count()
    monkeypatch.setattr(timing, "graphs_compiled", lambda: 0)
    monkeypatch.setattr(arms, "graphs_compiled", lambda: next(graphs) + 1)
    x = torch.randn(64, 64)
    with pytest.raises(measure.MeasurementError, match=r"torch\.compile was at work"):
        measure.compare(lambda: x @ x, lambda: x @ x, seconds=0.1)


def test_first_calls_wait_for_an_accelerator(monkeypatch):
    """Launching work is not doing it: the calls that choose the block's length are timed with the
    clock that synchronises.
    """
    waited = []

    def clock() -> float:
        waited.append(1)
        return time.perf_counter()

    monkeypatch.setattr(torch.utils.benchmark, "timer", clock)
    x = torch.randn(300, 300)
    arms.Sampler(arms.Arm(lambda: x @ x, "a product"), 1, "wall")
    assert len(waited) >= 8  # the second call and three more, each read twice


def test_conditions_are_stated():
    x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    conv = measure.arm(torch.nn.Conv2d(3, 8, 3), x, "conv")
    text = repr(measure.compare(conv, conv, seconds=0.2, threads=1))
    for part in ("1 thread", "wall clock", "float32", "batch 4", "channels_last", "rounds"):
        assert part in text
    assert "within this process" in text


def test_cpu_clock_does_not_count_sleep():
    x = torch.randn(256, 256)
    result = measure.compare(
        lambda: (x @ x, time.sleep(0.01)), lambda: x @ x, seconds=0.5, clock="cpu"
    )
    assert 0.5 < result.ratio < 2


@pytest.mark.wall_clock
def test_known_sleeps_are_measured_right():
    """A busy machine oversleeps, the shorter sleep by more: the ratio falls, it does not rise."""
    result = measure.compare(
        lambda: time.sleep(0.012), lambda: time.sleep(0.006), seconds=1.0, threads=1
    )
    assert result.baseline_seconds >= 0.012
    assert result.candidate_seconds >= 0.006
    assert 1.05 < result.ratio < 2.3
