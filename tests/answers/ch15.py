"""Answers to chapter 15's exercises."""

import itertools
import math
from fractions import Fraction

import numpy as np
import torch

from answers import right, wrong

# ---- A


@right("15.A", "fractions")
def in_fractions(columns, bits, group, scale_bits, zero_bits):
    groups = math.ceil(Fraction(columns, group or columns))
    return Fraction(columns * bits + groups * (scale_bits + zero_bits), columns)


@right("15.A", "group by group, a NumPy number")
def walked(columns, bits, group, scale_bits, zero_bits):
    starts = np.arange(0, columns, group or columns)
    return np.float64(bits + len(starts) * (scale_bits + zero_bits) / columns)


def _counted(groups, kept=lambda s, z: s + z):
    def bits_a_weight(columns, bits, group, scale_bits, zero_bits):
        return bits + groups(columns, group or columns) * kept(scale_bits, zero_bits) / columns

    return bits_a_weight


def _up(columns, group):
    return -(-columns // group)


wrong("15.A", "one group more than there are")(_counted(lambda c, g: c // g + 1))
wrong("15.A", "scales only")(_counted(_up, lambda s, z: s))
wrong("15.A", "zero points only")(_counted(_up, lambda s, z: z))
wrong("15.A", "one group at most")(_counted(lambda c, g: 1))
wrong("15.A", "scales come in whole bytes")(_counted(_up, lambda s, z: 8 * -(-(s + z) // 8)))


@wrong("15.A", "the bits of the whole row")
def of_the_row(columns, bits, group, scale_bits, zero_bits):
    return columns * bits + _up(columns, group or columns) * (scale_bits + zero_bits)


@wrong("15.A", "None is taken for no scale at all")
def none_is_free(columns, bits, group, scale_bits, zero_bits):
    return (
        bits if group is None else bits + _up(columns, group) * (scale_bits + zero_bits) / columns
    )


# ---- B


@right("15.B", "least squares")
def least_squares(w, H, done):
    k = done.shape[1]
    due = H[k:, :k] @ (w[:, :k] - done).T
    if not due.numel():
        return w[:, k:]
    return w[:, k:] + torch.linalg.lstsq(H[k:, k:], due, driver="gelsd").solution.T


@right("15.B", "NumPy, through a root of H")
def with_a_root(w, H, done):
    w, H, done = (np.asarray(t) for t in (w, H, done))
    k = done.shape[1]
    values, vectors = np.linalg.eigh(H)
    x = np.sqrt(values.clip(0))[:, None] * vectors.T
    if k in (0, w.shape[1]):
        return w[:, k:]
    return w[:, k:] + np.linalg.lstsq(x[:, k:], x[:, :k] @ (w[:, :k] - done).T, rcond=1e-9)[0].T


@right("15.B", "another best answer: moved along what H does not see")
def another_best(w, H, done):
    k = done.shape[1]
    h = H[k:, k:]
    values, vectors = torch.linalg.eigh(h) if len(h) else (h.new_zeros(0), h)
    unseen = vectors[:, values < 1e-9 * values.max()] if len(h) else vectors
    rest = w[:, k:] + (w[:, :k] - done) @ H[:k, k:] @ torch.linalg.pinv(h)
    return rest + unseen.sum(1)


def _repair(change):
    def repair(w, H, done):
        k = done.shape[1]
        return w[:, k:] + change(w[:, :k] - done, H[:k, k:], H[k:, k:])

    return repair


wrong("15.B", "the transpose of the table")(
    _repair(lambda e, a, h: e @ torch.linalg.pinv(h)[: e.shape[1]] if len(h) else e[:, :0])
)
wrong("15.B", "H is not inverted")(_repair(lambda e, a, h: e @ a))
wrong("15.B", "half of the repair")(_repair(lambda e, a, h: e @ a @ torch.linalg.pinv(h) / 2))
wrong("15.B", "damped by a tenth of the mean diagonal")(
    _repair(
        lambda e, a, h: (
            e @ a @ torch.linalg.pinv(h + 0.1 * h.diagonal().mean() * torch.eye(len(h)).double())
            if len(h)
            else e[:, :0]
        )
    )
)
wrong("15.B", "the last column's error alone")(
    _repair(lambda e, a, h: e[:, -1:] @ a[-1:] @ torch.linalg.pinv(h))
)


@wrong("15.B", "all columns are returned")
def all_columns(w, H, done):
    k = done.shape[1]
    rest = w[:, k:] + (w[:, :k] - done) @ H[:k, k:] @ torch.linalg.pinv(H[k:, k:])
    return torch.cat([done, rest], 1)


@wrong("15.B", "a Cholesky factor: no inverse, no answer")
def cholesky(w, H, done):
    k = done.shape[1]
    due = H[k:, :k] @ (w[:, :k] - done).T
    return w[:, k:] + torch.cholesky_solve(due, torch.linalg.cholesky(H[k:, k:])).T


# ---- C


def _plans(options, budget):
    for pick in itertools.product(*[range(len(o)) for o in options]):
        chosen = [o[i] for o, i in zip(options, pick, strict=True)]
        if (cost := sum(c for c, _ in chosen)) <= budget:
            yield cost, pick, sum(np.asarray(r, float) for _, r in chosen)


@right("15.C", "cheapest first, in torch")
def cheapest_first(options, budget):
    fits = sorted(_plans(options, budget), key=lambda f: f[:2])
    if not fits:
        return None
    best = torch.tensor(min(fits, key=lambda f: f[2].mean())[2])
    for _, pick, blocks in fits:
        d = torch.tensor(blocks) - best
        if d.mean() <= 2 * d.std() / math.sqrt(len(d)):
            return torch.tensor(pick)


def _told(limit, spread):
    def plan(options, budget):
        fits = list(_plans(options, budget))
        if not fits:
            return None
        best = min(fits, key=lambda f: f[2].mean())[2]
        same = [f for f in fits if (f[2] - best).mean() <= limit * spread(f[2] - best, f[2])]
        return list(min(same or fits, key=lambda f: f[:2])[1])

    return plan


def _error(d, blocks):
    return d.std(ddof=1) / len(d) ** 0.5


right("15.C", "NumPy's own")(_told(2, _error))
wrong("15.C", "one standard error")(_told(1, _error))
wrong("15.C", "three standard errors")(_told(3, _error))
wrong("15.C", "the standard deviation, not its error")(_told(2, lambda d, b: d.std(ddof=1)))
wrong("15.C", "divided by n, not n - 1")(_told(2, lambda d, b: d.std() / len(d) ** 0.5))
wrong("15.C", "the error of the plan's own losses")(_told(2, lambda d, b: _error(b, b)))
wrong("15.C", "ten percent worse is the same")(_told(0.1, lambda d, b: abs(b.mean())))


@wrong("15.C", "the first plan that fits")
def first(options, budget):
    return next((list(p) for _, p, _ in _plans(options, budget)), None)


@wrong("15.C", "an empty list where nothing fits")
def empty(options, budget):
    return _told(2, _error)(options, budget) or []


@wrong("15.C", "the budget may not be used up")
def not_used_up(options, budget):
    return _told(2, _error)(options, budget - 1)
