"""Wrong answers to chapter 15's exercises, by somebody who has read only their texts."""

import itertools

import numpy as np
import torch

from answers import wrong

# ---- A


@wrong("15.A", "read only: scale and zero point for every weight")
def for_every_weight(columns, bits, group, scale_bits, zero_bits):
    return bits + scale_bits + zero_bits


@wrong("15.A", "read only: the group's size instead of their number")
def size_for_number(columns, bits, group, scale_bits, zero_bits):
    return bits + (group or 1) * (scale_bits + zero_bits) / columns


@wrong("15.A", "read only: rounded to a whole bit")
def whole_bits(columns, bits, group, scale_bits, zero_bits):
    groups = 1 if group is None else -(-columns // group)
    return round(bits + groups * (scale_bits + zero_bits) / columns)


@wrong("15.A", "read only: a short group keeps a short scale")
def short_scale(columns, bits, group, scale_bits, zero_bits):
    return bits + (scale_bits + zero_bits) / min(group or columns, columns)


@wrong("15.A", "read only: refuses groups that do not divide")
def refuses(columns, bits, group, scale_bits, zero_bits):
    if group and columns % group:
        raise ValueError("groups must divide")
    return bits + (columns // (group or columns)) * (scale_bits + zero_bits) / columns


# ---- B


@wrong("15.B", "read only: the whole error on the next column")
def next_column(w, H, done):
    k = done.shape[1]
    rest = w[:, k:].clone()
    if k and rest.shape[1]:
        rest[:, 0] += (w[:, :k] - done).sum(1)
    return rest


@wrong("15.B", "read only: spread evenly")
def evenly(w, H, done):
    k = done.shape[1]
    lost = (w[:, :k] - done).sum(1, keepdim=True)
    return w[:, k:] + lost / max(w.shape[1] - k, 1)


@wrong("15.B", "read only: rounded as well")
def rounded_as_well(w, H, done):
    k = done.shape[1]
    return (w[:, k:] + (w[:, :k] - done) @ H[:k, k:] @ torch.linalg.pinv(H[k:, k:])).round()


@wrong("15.B", "read only: the inverse of the whole table")
def whole_inverse(w, H, done):
    k = done.shape[1]
    inverse = torch.linalg.pinv(H)
    return w[:, k:] + (w[:, :k] - done) @ inverse[:k, k:]


@wrong("15.B", "read only: from the done weights, not from their error")
def from_done(w, H, done):
    k = done.shape[1]
    return w[:, k:] + done @ H[:k, k:] @ torch.linalg.pinv(H[k:, k:])


# ---- C


def _all(options):
    return list(itertools.product(*[range(len(o)) for o in options]))


def _cost(options, pick):
    return sum(o[i][0] for o, i in zip(options, pick, strict=True))


def _loss(options, pick):
    return sum(np.asarray(o[i][1], float) for o, i in zip(options, pick, strict=True))


@wrong("15.C", "read only: least loss a byte saved")
def loss_a_byte(options, budget):
    fits = [p for p in _all(options) if _cost(options, p) <= budget]
    return (
        list(min(fits, key=lambda p: _loss(options, p).mean() / _cost(options, p)))
        if fits
        else None
    )


@wrong("15.C", "read only: medians in place of means")
def medians(options, budget):
    fits = [p for p in _all(options) if _cost(options, p) <= budget]
    return list(min(fits, key=lambda p: float(np.median(_loss(options, p))))) if fits else None


@wrong("15.C", "read only: over the budget where it pays")
def over(options, budget):
    return list(min(_all(options), key=lambda p: _loss(options, p).mean()))


@wrong("15.C", "read only: the best for the worst block")
def worst_block(options, budget):
    fits = [p for p in _all(options) if _cost(options, p) <= budget]
    return list(min(fits, key=lambda p: _loss(options, p).max())) if fits else None


@wrong("15.C", "read only: each part told apart alone")
def part_by_part(options, budget):
    pick = []
    for o in options:
        best = min(range(len(o)), key=lambda i: np.mean(o[i][1]))
        d = [np.asarray(b, float) - np.asarray(o[best][1], float) for _, b in o]
        same = [i for i, x in enumerate(d) if x.mean() <= 2 * x.std(ddof=1) / len(x) ** 0.5]
        pick.append(min(same, key=lambda i: o[i][0]))
    return pick if _cost(options, pick) <= budget else None
