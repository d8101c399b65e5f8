"""Checks of chapter 01, Measurement."""

import math

import numpy as np

from course_utils.exercises import Probe, Wrong, exercise


@exercise("01.A")
def p99(answer: Probe, rng: np.random.Generator) -> None:
    """Nearest rank, sorted, counted from 1, and the caller's list left alone."""
    sizes = [1, 200, 100, 150, 37]
    for n in sizes:
        latencies = [float(v) for v in rng.permutation(np.arange(1, n + 1))]
        got = answer(latencies)
        # the definition of the exercise, in NumPy's words
        want = np.percentile(latencies, 99, method="inverted_cdf")
        if not isinstance(got, int | float | np.number):
            raise Wrong(
                f"for {n} latencies you returned a {type(got).__name__}; a number was expected."
            )
        if got != want:
            below = sum(v <= got for v in latencies)
            raise Wrong(
                f"of the latencies 1 … {n} in mixed order you returned {got:g}, which {below} of"
                f" {n} calls do not exceed; it must be the smallest that at least 99 of 100 do not"
                " exceed."
            )


@exercise("01.B")
def speedup_interval(answer: Probe, rng: np.random.Generator) -> None:
    """The pairs stay together, the median is the estimate, and the interval covers the truth about
    as often as it says.
    """
    got = _triple(answer([4.0, 4.0], [2.0, 2.0]), "[4.0, 4.0] and [2.0, 2.0]")
    if got != (2.0, 2.0, 2.0):
        raise Wrong(
            f"for [4.0, 4.0] and [2.0, 2.0] you returned {got}; every round is a speed-up of 2.0."
        )
    base, cand = [3.0, 3.0, 3.0, 3.0, 300.0], [1.0] * 5
    middle = _triple(answer(base, cand), "four rounds of 3 and one of 300")[1]
    if not math.isclose(middle, 3.0):
        raise Wrong(
            "four rounds show 3x and one hiccuped to 300x: the median is 3, and you returned"
            f" {middle:g} as the middle."
        )
    # 95 intervals of 100 hold the truth: fewer than 80 are a chance of 2 in 100 million. Who has 36
    # of the first 40 is spared the rest: intervals of 68% have them once in 1,000 checks.
    inside, widths, n, noise = 0, [], 30, 0.05
    while len(widths) < 100 and not (len(widths) == 40 and inside >= 36):
        truth, shared = (
            rng.uniform(1.2, 2.5),
            np.exp(rng.normal(0, 0.4, n)),
        )  # a machine that speeds up and slows down
        candidate = shared * np.exp(rng.normal(0, noise, n))
        low, middle, high = _triple(
            answer((truth * shared).tolist(), candidate.tolist()), "lists of 30"
        )
        if not low <= middle <= high:
            raise Wrong(
                f"low ≤ middle ≤ high must hold; you returned {low:.3g}, {middle:.3g}, {high:.3g}."
            )
        inside += low <= truth <= high
        widths.append((high - low) / truth)
    expected = 2 * 1.96 * 1.253 * noise / math.sqrt(n)  # of the median of n normal ratios
    if np.median(widths) > 2 * expected:
        raise Wrong(
            f"your interval is {np.median(widths) / expected:.1f} times as wide as the median's"
            " uncertainty. Are rounds kept in pairs? Is it the spread of the *median* over"
            " resamples?"
        )
    if inside < 0.8 * len(widths):
        raise Wrong(
            f"your interval held the true speed-up in {inside} of {len(widths)} simulated runs; 95%"
            " was promised."
        )


@exercise("01.C")
def decide(answer: Probe, rng: np.random.Generator) -> None:
    """Few false alarms under noise that remembers, and real differences of either sign found."""
    for ratios, allowed in (
        ([2.0] * 60, "faster"),
        ([0.5] * 60, "slower"),
        ([1.0] * 60, "can't tell"),
    ):
        if (got := answer(list(ratios))) != allowed:
            raise Wrong(f"for sixty times {ratios[0]} you said {got!r}; {allowed!r} is due.")
    runs = 600  # who is wrong in 5% of the series exceeds 8% of so many once in 1,500 checks
    said = [answer(_series(rng, 1.0)) for _ in range(runs)]
    alarms = sum(s != "can't tell" for s in said)
    if alarms > 0.08 * runs:
        raise Wrong(
            f"two equal arms, {runs} series: you saw a difference in {alarms}, that is"
            f" {alarms / runs:.0%} and over 8%. Neighbouring rounds are alike; do you count them as"
            " independent?"
        )
    for truth, word in ((1.15, "faster"), (1 / 1.15, "slower")):
        found = sum(answer(_series(rng, truth)) == word for _ in range(100))
        if found < 80:
            raise Wrong(
                f"a true speed-up of {truth:.2f}: you said {word!r} in {found} of 100 series; 80"
                " are due. A single round may be off by ten: does it decide alone?"
            )


def _series(
    rng: np.random.Generator, truth: float, n: int = 60, sd: float = 0.04, memory: float = 0.6
) -> list[float]:
    """Speed-ups whose noise is autocorrelated, with one round in fifty off by a factor of ten."""
    noise = np.empty(n)
    noise[0] = rng.normal(0, sd)
    steps = rng.normal(0, sd * math.sqrt(1 - memory**2), n)
    for i in range(1, n):
        noise[i] = memory * noise[i - 1] + steps[i]
    spikes = np.where(rng.random(n) < 0.02, rng.choice([10.0, 0.1], n), 1.0)
    return (truth * np.exp(noise) * spikes).tolist()


def _triple(value: object, given: str) -> tuple[float, float, float]:
    if not isinstance(value, tuple | list) or len(value) != 3:
        raise Wrong(f"for {given} you returned {value!r}; (low, middle, high) was expected.")
    return tuple(float(v) for v in value)
