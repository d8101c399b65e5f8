"""Checks of chapter 03, Pruning: properties and independent results, never a stored solution."""

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from course_utils.exercises import Probe, Wrong, exercise, shown


@exercise("03.A")
def importance(answer: Probe, rng: np.random.Generator) -> None:
    """Each number is what a finite difference says: how fast the loss moves when that channel fades
    out.
    """
    for shape in [(2, 1, 1, 1), (4, 3, 3, 3), (5, 6)]:
        weight, grad = (torch.tensor(rng.normal(size=shape)) for _ in range(2))
        got = _vector(answer, weight, grad)
        for c in range(shape[0]):
            faded = weight.clone()
            faded[c] = 0
            change = abs(
                float(((faded - weight) * grad).sum())
            )  # exact: this loss is linear in the weights
            if abs(float(got[c]) - change) > 1e-9:
                raise Wrong(
                    f"for weights of shape {shape} and a loss that is linear in them, removing"
                    f" output channel {c} changes the loss by {change:.4f}; you returned"
                    f" {float(got[c]):.4f}."
                )
    weight = torch.tensor(rng.normal(size=(3, 2, 3, 3)), requires_grad=True)
    x, target = (
        torch.tensor(rng.normal(size=(4, 2, 6, 6))),
        torch.tensor(rng.normal(size=(4, 3, 4, 4))),
    )
    F.mse_loss(F.conv2d(x, weight), target).backward()
    got = _vector(answer, weight.detach(), weight.grad)
    for c in range(3):
        loss = []
        for step in (1e-5, -1e-5):
            scale = torch.ones(3, 1, 1, 1, dtype=torch.float64)
            scale[c] += step
            loss.append(float(F.mse_loss(F.conv2d(x, weight.detach() * scale), target)))
        slope = abs(loss[0] - loss[1]) / 2e-5
        if abs(float(got[c]) - slope) > 1e-6 * max(1, slope):
            raise Wrong(
                f"on a real convolution the loss moves by {slope:.5f} per unit of channel {c}'s"
                f" scale; you returned {float(got[c]):.5f}."
            )


def _vector(answer: Probe, weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    got = answer(weight, grad)
    if not isinstance(got, torch.Tensor) or tuple(got.shape) != (weight.shape[0],):
        what = (
            f"a tensor of shape {tuple(got.shape)}"
            if isinstance(got, torch.Tensor)
            else f"a {type(got).__name__}"
        )
        raise Wrong(
            f"for weights of shape {tuple(weight.shape)} a tensor of shape ({weight.shape[0]},) was"
            f" expected; you returned {what}."
        )
    if bool((got < 0).any()):
        raise Wrong(f"an importance must not be negative; you returned {got.tolist()}.")
    return got


@exercise("03.B")
def shrink(answer: Probe, rng: np.random.Generator) -> None:
    """The smaller chain equals the mask after BatchNorm within 1e-10, with and without bias,
    strides and padding.
    """
    cases = [
        {"bias": False, "stride": 1, "padding": 1, "eps": 1e-5},
        {"bias": True, "stride": 1, "padding": 1, "eps": 1e-5},
        {"bias": True, "stride": 2, "padding": 0, "eps": 0.1},
    ]
    for case in cases:
        chain = _chain(rng, **case)
        width = chain[0].out_channels
        keep = torch.tensor(
            np.sort(rng.choice(width, size=int(rng.integers(1, width)), replace=False))
        )
        if int(keep[-1]) == len(keep) - 1:  # the first few channels would let a wrong slice pass
            keep = keep + 1
        got = answer(*chain, keep)
        settings = ", ".join(f"{k}={v}" for k, v in case.items())
        where = f"conv1 with {settings}; keep={keep.tolist()} of {width} channels"
        _layers(got, chain, keep, where)
        x = torch.tensor(rng.normal(size=(2, chain[0].in_channels, 9, 9)))
        mask = torch.zeros(width, dtype=torch.float64)
        mask[keep] = 1
        with torch.no_grad():
            wanted = chain[2](F.relu(chain[1](chain[0](x))) * mask.view(1, -1, 1, 1))
            small = got[2](F.relu(got[1](got[0](x))))
        if small.shape != wanted.shape:
            raise Wrong(
                f"the output has shape {tuple(small.shape)}, the masked chain's"
                f" {tuple(wanted.shape)}: {where}."
            )
        apart = float((small - wanted).abs().max())
        # 108 products, each rounded to 1.1e-16 of terms that add up to 1e3 or so: 1e-11 at most.
        if not apart <= 1e-10:
            raise Wrong(
                f"your chain and the masked one differ by {apart:.2g} (allowed: 1e-10, in fp64):"
                f" {where}."
            )


def _chain(
    rng: np.random.Generator, *, bias: bool, stride: int, padding: int, eps: float
) -> tuple[nn.Conv2d, nn.BatchNorm2d, nn.Conv2d]:
    width = int(rng.integers(5, 9))
    conv1 = nn.Conv2d(3, width, 3, stride=stride, padding=padding, bias=bias)
    bn = nn.BatchNorm2d(width, eps=eps)
    conv2 = nn.Conv2d(width, 4, 3, stride=stride, padding=padding, bias=bias)
    layers = [layer.double().eval() for layer in (conv1, bn, conv2)]
    with torch.no_grad():
        for layer in layers:
            for value in layer.parameters():
                value.copy_(torch.tensor(rng.normal(size=tuple(value.shape))))
        bn.running_mean.copy_(torch.tensor(rng.normal(size=width)))
        bn.running_var.copy_(torch.tensor(rng.uniform(0.5, 2, size=width)))
    return conv1, bn, conv2


def _layers(got: object, chain: tuple, keep: torch.Tensor, where: str) -> None:
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Conv2d)
    if (
        not isinstance(got, tuple | list)
        or len(got) != 3
        or not all(isinstance(g, k) for g, k in zip(got, kinds, strict=False))
    ):
        raise Wrong("three layers were expected: a Conv2d, a BatchNorm2d and a Conv2d.")
    n = len(keep)
    wanted = {
        "conv1's weight": (got[0].weight.shape, (n, *chain[0].weight.shape[1:])),
        "the BatchNorm's weight": (got[1].weight.shape, (n,)),
        "the BatchNorm's running_var": (got[1].running_var.shape, (n,)),
        "conv2's weight": (
            got[2].weight.shape,
            (chain[2].weight.shape[0], n, *chain[2].weight.shape[2:]),
        ),
    }
    for name, (has, needs) in wanted.items():
        if tuple(has) != tuple(needs):
            raise Wrong(f"{name} has shape {tuple(has)}, not {tuple(needs)}: {where}.")
    if any(g.training for g in got):
        raise Wrong(
            f"the layers you were given are in eval mode, and yours are in train mode: {where}."
        )


@exercise("03.C")
def design(answer: Probe, rng: np.random.Generator) -> None:
    """No combination within the budget loses less: every one was tried."""
    _one(answer, [[0, 1.0, 4.0]], [[9, 6, 7]], 6)  # the narrowest is not the cheapest
    _one(answer, [[0, 1.0], [0, 1.5]], [[5, 4], [5, 1]], 10)  # the budget fits exactly
    _one(answer, [[0, 1.0], [0, 2.0]], [[5, 4], [5, 4]], 7)  # impossible
    for _ in range(60):
        layers, options = int(rng.integers(1, 5)), int(rng.integers(2, 5))
        drop = [
            [0.0, *np.sort(rng.integers(1, 80, options - 1) / 10).tolist()] for _ in range(layers)
        ]
        cost = rng.integers(2, 20, (layers, options)).tolist()
        least, most = sum(min(row) for row in cost), sum(row[0] for row in cost)
        _one(answer, drop, cost, int(rng.integers(min(least, most) - 1, max(least, most) + 1)))


def _one(answer: Probe, drop: list[list[float]], cost: list[list[int]], budget: int) -> None:
    given = f"design({shown(drop, cost, budget)})"
    got = answer(drop, cost, budget)
    combinations = itertools.product(*(range(len(row)) for row in drop))
    possible = [
        c for c in combinations if sum(row[j] for row, j in zip(cost, c, strict=True)) <= budget
    ]
    if not possible:
        if got is not None:
            raise Wrong(
                f"{given}: no combination costs {budget} or less, so None was expected; you"
                f" returned {got}."
            )
        return
    if got is None:
        raise Wrong(f"{given}: you returned None, and {list(possible[0])} is within the budget.")
    if len(got) != len(drop) or any(
        int(j) != j or not 0 <= j < len(row) for j, row in zip(got, drop, strict=False)
    ):
        raise Wrong(
            f"{given}: one option a layer was expected, as a list of {len(drop)} indices; you"
            f" returned {got}."
        )
    spent = sum(row[int(j)] for row, j in zip(cost, got, strict=True))
    if spent > budget:
        raise Wrong(f"{given}: {list(got)} costs {spent}, more than the budget of {budget}.")
    lost = sum(row[int(j)] for row, j in zip(drop, got, strict=True))
    best = min(possible, key=lambda c: sum(row[j] for row, j in zip(drop, c, strict=True)))
    least = sum(row[j] for row, j in zip(drop, best, strict=True))
    if lost > least + 1e-9:
        raise Wrong(
            f"{given}: {list(got)} loses {lost:.1f} points; within the same budget one can lose"
            f" only {least:.1f}."
        )
