"""Checks of chapter 01, Measurement."""

import functools
import math
from collections.abc import Callable

import numpy as np

from course_utils.checks.accept import apart, close, number, said, sequence
from course_utils.exercises import Probe, Wrong, exercise


@exercise("01.A")
def p99(answer: Probe, rng: np.random.Generator) -> None:
    """Nearest rank, sorted, counted from 1, and the caller's list left alone."""
    # Of 100 and 101 calls the ranks are 99 and 100; 160 tells rounding up from rounding.
    one_to = [[float(v) for v in rng.permutation(np.arange(1, n + 1))] for n in (200, 100, 101)]
    cases = [[7.0], [3.0, 1.0, 2.0], *one_to]
    cases.append([1.0] * 150 + [float(v) for v in range(2, 12)])
    for n in (160, 100, 37, 150, 110, int(rng.integers(2, 400))):
        drawn = np.exp(rng.normal(0, 1, n))
        cases += [drawn.tolist(), rng.choice(drawn, n).tolist()]  # the second with repeats
    for latencies in cases:
        n = len(latencies)
        rank = -(-99 * n // 100)  # ⌈0.99 n⌉ in whole numbers
        want = sorted(latencies)[rank - 1]
        where = f"for {latencies}" if n < 5 else f"for {n} latencies in mixed order"
        got = number(answer(latencies), where)
        if close(got, want):
            continue
        below = sum(v <= got for v in latencies)
        yours, due = apart(got, want)
        raise Wrong(
            f"{where} you returned {yours}, which {below} of {n} calls do not exceed. The smallest"
            f" that at least 99 of 100 do not exceed is the one at position {rank}: {due}."
        )


@exercise("01.B")
def speedup_interval(answer: Probe, rng: np.random.Generator) -> None:
    """The pairs stay together, the median is the estimate, and both ends are the percentiles of
    that median over the resamples.
    """
    fixed = [
        ([4.0, 4.0], [2.0, 2.0]),
        ([3.0], [2.0]),
        ([3.0, 3.0, 3.0, 3.0, 300.0], [1.0] * 5),
        ([8.0, 1.0, 3.0, 2.0], [1.0, 1.0, 1.0, 1.0]),
        ([1.0, 2.0, 30.0], [2.0, 1.0, 10.0]),
    ]
    for base, cand in fixed:
        where = f"for baseline {base} and candidate {cand}"
        ratios = [b / c for b, c in zip(base, cand, strict=True)]
        _triple(answer(base, cand), ratios, where)
    _every_round(answer)
    shares = []
    for _ in range(16):
        base, cand = _rounds(rng)
        ratios = sorted(base / cand)
        where = f"for {len(ratios)} rounds"
        low, _, high = _triple(answer(base.tolist(), cand.tolist()), ratios, where)
        exact = _bootstrap(len(ratios))
        shares.append([float(np.interp(v, ratios, exact)) for v in (low, high)])
    _ends(np.array(shares))


def _triple(value: object, ratios: list[float], where: str) -> tuple[float, float, float]:
    low, middle, high = (number(v, where) for v in sequence(value, where, 3))
    want = float(np.median(ratios))
    if not close(middle, want, rel=1e-5):
        yours, due = apart(middle, want)
        raise Wrong(
            f"{where} the middle is {due}, the median of the rounds' speed-ups; you returned"
            f" {yours}."
        )
    slack = 1e-5 * want
    if (
        not min(ratios) - slack
        <= low
        <= middle + slack
        <= high + 2 * slack
        <= max(ratios) + 4 * (slack)
    ):
        raise Wrong(
            f"{where} you returned {low:.5g}, {middle:.5g}, {high:.5g}; low ≤ middle ≤ high must"
            f" hold, and every resample's median is between {min(ratios):.5g} and"
            f" {max(ratios):.5g}."
        )
    return low, middle, high


def _every_round(answer: Probe) -> None:
    """Of resamples of seven the median is the largest one in 1% and beyond the two largest in 87%:
    the 97.5th percentile is the second largest, but for one call in 500. Two of three must agree.
    """
    for ratios in ([float(v) for v in range(1, 8)], [float(v) for v in range(7, 0, -1)]):
        where = f"for the speed-ups {ratios}"
        three = [_triple(answer(ratios, [1.0] * 7), ratios, where) for _ in range(3)]
        low, _, high = np.median(three, axis=0)
        if not (close(low, 2, rel=1e-5) and close(high, 6, rel=1e-5)):
            raise Wrong(
                f"{where} low and high are 2 and 6, the 2.5th and the 97.5th percentile; yours are"
                f" {low:.5g} and {high:.5g}. Is each round drawn as often as any other, a resample"
                " as large as the data, and its median taken?"
            )


def _rounds(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A machine that speeds up and slows down, and a noise that is wider above its median: an
    interval that lies evenly about the middle is a wrong one.
    """
    n = 2 * int(rng.integers(100, 160)) + 1
    noise = rng.normal(0, 0.01, n)
    shared = np.exp(rng.normal(0, 0.4, n))
    return rng.uniform(1.2, 2.5) * shared * np.exp(np.where(noise > 0, 8, 1) * noise), shared


@functools.cache
def _bootstrap(n: int) -> np.ndarray:
    """For each of n different values, n odd, in order: how often a resample's median lies below
    it, half of the ties counted. Exact: at least (n + 1) / 2 draws must be that small.
    """
    below = np.arange(1, n) / n
    logs = np.cumsum([0.0, *np.log(np.arange(1, n + 1))])
    draws = np.arange((n + 1) // 2, n + 1)[:, None]
    ways = logs[n] - logs[draws] - logs[n - draws]
    tail = np.exp(ways + draws * np.log(below) + (n - draws) * np.log1p(-below)).sum(0)
    until = np.array([0.0, *tail, 1.0])
    return (until[:-1] + until[1:]) / 2


def _ends(shares: np.ndarray) -> None:
    """Of 500 resamples the 2.5th percentile lies at 2.6%, give or take 0.7; the mean of 16 such
    is off by 0.8 once in 100,000 checks. With 100 resamples it scatters by 1.6.
    """
    low, high = 100 * shares[:, 0], 100 - 100 * shares[:, 1]
    for name, outside in (("below your low", low), ("above your high", high)):
        if not 1.8 <= outside.mean() <= 3.4:
            raise Wrong(
                f"in 16 simulated measurements {outside.mean():.2g}% of all possible resamples'"
                f" medians lie {name}; 2.5% are due. Are rounds kept in pairs? Is it the spread of"
                " the *median* over resamples as large as the data?"
            )
    spread = math.sqrt((low.var(ddof=1) + high.var(ddof=1)) / 2)
    if spread > 1.3:
        raise Wrong(
            f"from one simulated measurement to the next, your 2.5% are {low.min():.2g} to"
            f" {low.max():.2g}%: do you draw at least 500 resamples?"
        )


_WORDS = ("faster", "slower", "can't tell")
_NOISE = (0.01, 0.04, 0.16)
_FOUND = 3.5  # times the noise: a true speed-up of 1.04, 1.15 or 1.75 is due to be found


@exercise("01.C")
def decide(answer: Probe, rng: np.random.Generator) -> None:
    """Few false alarms under noise that remembers, and real differences of either sign found,
    however noisy the machine.
    """
    for ratios, due in (
        ([2.0] * 60, "faster"),
        ([0.5] * 60, "slower"),
        ([1.0] * 60, "can't tell"),
    ):
        if (got := _said(answer, ratios)) != due:
            raise Wrong(f"for sixty times {ratios[0]} you said {got!r}; {due!r} is due.")
    alarms, runs = _count(
        lambda noise: _said(answer, _series(rng, 1.0, noise)) != "can't tell",
        ((120, 3, 24), (300, 15, 45), (600, 48, 48)),
    )
    if alarms > 0.08 * runs:
        raise Wrong(
            f"two equal arms, {runs} series: you saw a difference in {alarms}, that is"
            f" {alarms / runs:.0%} and over 8%. Neighbouring rounds are alike; do you count them as"
            " independent? And how noisy is the machine?"
        )
    for word, sign in (("faster", 1), ("slower", -1)):
        missed, runs = _count(
            lambda noise, word=word, sign=sign: (
                _said(answer, _series(rng, math.exp(sign * _FOUND * noise), noise)) != word
            ),
            ((30, 2, 14), (99, 26, 26)),  # of 99, six more than 20%: that is chance
        )
        if missed > 0.27 * runs:
            raise Wrong(
                f"a difference that is {_FOUND} times the noise: you said {word!r} in"
                f" {runs - missed} of {runs} series; 80% are due. A single round may be off by ten:"
                " does it decide alone? And how noisy is the machine?"
            )


def _count(event: Callable[[float], bool], stops: tuple) -> tuple[int, int]:
    """How often it happened, and in how many series: no more than it takes. Each stop says after
    how many series nobody is asked further who has so few events, or more than so many.
    """
    seen = 0
    for i in range(stops[-1][0]):
        seen += event(_NOISE[i % len(_NOISE)])
        for n, few, many in stops:
            if i + 1 == n and not few < seen <= many:
                return seen, n
    return seen, stops[-1][0]


def _said(answer: Probe, ratios: list[float]) -> str:
    got = answer(ratios)
    if not isinstance(got, str) or got not in _WORDS:
        raise Wrong(f"{_WORDS[0]!r}, {_WORDS[1]!r} or {_WORDS[2]!r} was expected, not {said(got)}.")
    return got


def _series(
    rng: np.random.Generator, truth: float, sd: float, n: int = 60, memory: float = 0.6
) -> list[float]:
    """Speed-ups whose noise is autocorrelated, with one round in fifty off by a factor of ten."""
    noise = np.empty(n)
    noise[0] = rng.normal(0, sd)
    steps = rng.normal(0, sd * math.sqrt(1 - memory**2), n)
    for i in range(1, n):
        noise[i] = memory * noise[i - 1] + steps[i]
    spikes = np.where(rng.random(n) < 0.02, rng.choice([10.0, 0.1], n), 1.0)
    return (truth * np.exp(noise) * spikes).tolist()
