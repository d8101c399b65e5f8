"""Checks of chapter 15, LLM compression."""

import itertools
from fractions import Fraction

import numpy as np
import torch

from course_utils.checks.accept import apart, close, number, said, sequence, whole
from course_utils.exercises import Probe, Wrong, exercise

_ROWS = [  # columns, bits, group, scale_bits, zero_bits
    (192, 4, 64, 16, 4),
    (448, 3, 64, 16, 3),
    (100, 4, 64, 16, 4),  # the last group is short
    (65, 4, 64, 16, 0),
    (63, 4, 64, 16, 4),  # shorter than one group
    (64, 8, None, 16, 8),  # one group a row
    (30, 8, None, 32, 0),
    (1, 1, 1, 1, 1),
    (576, 4, 16, 8, 0),  # NVFP4
    (7, 2, 3, 5, 2),
]


@exercise("15.A")
def bits_a_weight(answer: Probe, rng: np.random.Generator) -> None:
    """Every bit of a row is counted, group by group."""
    cases = list(_ROWS)
    for _ in range(20):
        columns = int(rng.integers(1, 700))
        group = None if rng.random() < 0.2 else int(rng.integers(1, 200))
        bits, scale, zero = (int(rng.integers(low, 17)) for low in (1, 0, 0))
        cases.append((columns, bits, group, scale, zero))
    for case in cases:
        columns, bits, group, scale, zero = case
        stored, at = 0, 0
        while at < columns:  # walk along the row, group by group
            size = columns - at if group is None else min(group, columns - at)
            stored, at = stored + size * bits + scale + zero, at + size
        where = f"bits_a_weight{case}"
        got, want = number(answer(*case), where), float(Fraction(stored, columns))
        if not close(got, want, rel=1e-9):
            yours, due = apart(got, want)
            raise Wrong(f"{where}: the row takes {stored} bits, {due} a weight; you say {yours}.")


def _inputs(rng: np.random.Generator, tokens: int, n: int, kind: str) -> torch.Tensor:
    """Inputs (tokens, n) of a layer: alike in part, two of them always equal, or one never used."""
    x = rng.normal(size=(tokens, n)) @ rng.normal(size=(n, n))
    if kind == "whole":
        x = rng.integers(-3, 4, (tokens, n)).astype(float)
    if kind in ("equal", "dead"):
        x = np.round(2 * x)  # whole numbers: H is exact, and exactly without an inverse
        x[:, -1] = x[:, -2] if kind == "equal" else 0.0
    return torch.tensor(x)


@exercise("15.B")
def repair(answer: Probe, rng: np.random.Generator) -> None:
    """No other values of the remaining weights change the outputs less: found from the inputs
    themselves, without H.
    """
    pair = torch.tensor([[1.0, 1.0], [2.0, 2.0], [-1.0, -1.0]], dtype=torch.double)
    cases = [(pair, torch.tensor([[0.4, 0.4]]).double(), torch.zeros(1, 1).double(), "equal")]
    sizes = [(1, 4, 1), (3, 6, 2), (2, 5, 4), (4, 8, 3), (2, 7, 0), (3, 5, 5), (5, 12, 6)]
    for kind, (rows, n, k) in itertools.product(("alike", "whole", "equal", "dead"), sizes):
        x = _inputs(rng, 60, n, kind)
        w = torch.tensor(rng.normal(size=(rows, n)))
        done = w[:, :k].round() if rng.random() < 0.7 else torch.tensor(rng.normal(size=(rows, k)))
        cases.append((x, w, done, kind))
    said_of = {
        "alike": "inputs that are alike in part",
        "whole": "inputs that are whole numbers",
        "equal": "the last two inputs always equal",
        "dead": "the last input always 0",
    }
    for x, w, done, kind in cases:
        rows, n, k = *w.shape, done.shape[1]
        where = f"{rows} rows of {n} weights, {k} of them done, {said_of[kind]}"
        got = answer(w, x.T @ x, done)
        try:
            rest = torch.as_tensor(got).detach().double()
        except (TypeError, ValueError, RuntimeError):
            raise Wrong(f"{where}: a tensor was expected; you returned {said(got)}.") from None
        if rest.shape != (rows, n - k):
            raise Wrong(
                f"{where}: the remaining columns have the shape {(rows, n - k)}; yours has"
                f" {tuple(rest.shape)}."
            )
        if not torch.isfinite(rest).all():
            raise Wrong(f"{where}: your answer has values that are not finite.")
        lost = (w[:, :k] - done) @ x[:, :k].T  # what the outputs lack, (rows, tokens)
        best = torch.linalg.lstsq(x[:, k:], lost.T, driver="gelsd").solution.T if 0 < k < n else 0.0
        due = (lost - best @ x[:, k:].T if 0 < k < n else lost).square().sum(1)
        yours = (w @ x.T - torch.cat([done, rest], 1) @ x.T).square().sum(1)
        power = (w @ x.T).square().sum(1) + lost.square().sum(1)
        if not bool((yours <= due + 1e-9 * power).all()):
            i = int((yours - due).argmax())
            had, could = apart(float(yours[i]), float(due[i]))
            raise Wrong(
                f"{where}: the outputs of row {i} are off by {had} (sum of squares); {could} is"
                " possible."
            )


def _fitting(options: list, budget: float) -> list[tuple]:
    """(bytes, plan, rises) of every plan that fits."""
    found = []
    for picked in itertools.product(*[range(len(o)) for o in options]):
        cost = sum(o[i][0] for o, i in zip(options, picked, strict=True))
        if cost <= budget:
            blocks = np.zeros(len(options[0][0][1]))
            for o, i in zip(options, picked, strict=True):
                blocks = blocks + np.asarray(o[i][1], float)
            found.append((cost, picked, blocks))
    return found


def _errors_off(blocks: np.ndarray, best: np.ndarray) -> float:
    """By how many standard errors a plan is worse than the best one; 0 for the best itself."""
    d = blocks - best
    n, mean = len(d), float(d.mean())
    error = float(np.sqrt(((d - mean) ** 2).sum() / (n - 1) / n))
    return 0.0 if abs(mean) < 1e-12 else mean / error if error > 1e-12 else float("inf")


def _clear(options: list, budget: float) -> bool:
    """Whether no plan lies on the border of two standard errors, and one is clearly the best."""
    fits = _fitting(options, budget)
    if not fits:
        return True
    means = sorted(f[2].mean() for f in fits)
    best = min(fits, key=lambda f: f[2].mean())[2]
    return (len(means) == 1 or means[1] - means[0] > 1e-9) and all(
        abs(_errors_off(f[2], best) - 2) > 0.03 for f in fits
    )


def _apart_by(rng: np.random.Generator, n: int, errors: float) -> list:
    """One part: 8 bytes, or 4 that are worse by so many standard errors, on n blocks."""
    z = rng.normal(size=n)
    z = (z - z.mean()) / z.std(ddof=1)
    hard = 5 * rng.random(n)
    return [[(8, hard), (4, hard + 0.1 * (z + errors / n**0.5))]]


def _drawn(rng: np.random.Generator, parts: int) -> list:
    """As the chapter measures it: parts at 5, 4 and 3 bits, on the same blocks of a text."""
    hard = np.exp(rng.normal(0, 0.5, 48))
    options = []
    for _ in range(parts):
        size, loss = int(rng.integers(10**5, 10**6)), float(np.exp(rng.normal(-5, 1)))
        options.append(
            [
                (size * bits // 8, loss * 4.0 ** (4 - bits) * hard + rng.normal(0, 0.004, 48))
                for bits in (5, 4, 3)
            ]
        )
        rng.shuffle(options[-1])
    return options


@exercise("15.C")
def plan(answer: Probe, rng: np.random.Generator) -> None:
    """Within the budget to the byte; as good as the best, as far as the text can tell; and no such
    plan takes fewer bytes.
    """
    one = [[(8, [0.0, 0.0, 0.0]), (4, [0.1, -0.1, 0.03])]]
    cases = [(one, 9), (one, 8), (one, 7), (one, 4), (one, 3)]
    cases += [([[(4, [0.2, 0.3, 0.1]), (8, [0.2, 0.3, 0.11])]], 8)]
    cases += [([[(4, [0.5, 0.6, 0.55]), (8, [0.2, 0.3, 0.25])]], 8)]  # always the same apart
    cases += [(_apart_by(rng, n, t), 8) for n in (3, 4, 6, 40) for t in (1.9, 2.1, 1.1, 2.9, 3.7)]
    while len(cases) < 50:
        options = _drawn(rng, int(rng.integers(1, 4)))
        sums = sorted(sum(o[0] for o in picked) for picked in itertools.product(*options))
        budget = sums[int(rng.integers(len(sums)))]
        if rng.random() < 0.1:
            budget = sums[0] - 1
        if _clear(options, budget):
            cases.append((options, budget))
    for options, budget in cases:
        _judge(answer, options, budget)


def _judge(answer: Probe, options: list, budget: float) -> None:
    sizes, blocks = [[o[0] for o in part] for part in options], len(options[0][0][1])
    where = f"options of {sizes} bytes, {blocks} blocks, budget {budget}"
    got, fits = answer(options, budget), _fitting(options, budget)
    if not fits:
        if got is not None:
            raise Wrong(f"{where}: nothing fits, so None is due; you returned {said(got)}.")
        return
    if got is None:
        raise Wrong(f"{where}: {len(fits)} plans fit; you returned None.")
    picked = [whole(i, where) for i in sequence(got, f"{where}, one index a part", len(options))]
    if not all(0 <= i < len(o) for i, o in zip(picked, options, strict=True)):
        raise Wrong(f"{where}: {picked} holds an index that its part does not have.")
    best = min(fits, key=lambda f: f[2].mean())
    yours = next((f for f in fits if list(f[1]) == picked), None)
    if yours is None:
        spent = sum(o[i][0] for o, i in zip(options, picked, strict=True))
        raise Wrong(f"{where}: your plan {picked} takes {spent} bytes.")
    if (off := _errors_off(yours[2], best[2])) > 2:
        raise Wrong(
            f"{where}: your plan {picked} is worse than {list(best[1])} by {off:.1f} standard"
            " errors of the differences, block by block."
        )
    least = min(f for f in fits if _errors_off(f[2], best[2]) <= 2)
    if yours[0] > least[0]:
        raise Wrong(
            f"{where}: your plan {picked} takes {yours[0]} bytes; {list(least[1])} takes"
            f" {least[0]} and cannot be told apart from the best one, {list(best[1])}."
        )
