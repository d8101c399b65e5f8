"""Checks of chapter 03, Pruning: properties and independent results, never a stored solution."""

import copy
import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from course_utils.checks.accept import apart, said, sequence, whole
from course_utils.exercises import Probe, Wrong, exercise
from course_utils.probe import shown


@exercise("03.A")
def importance(answer: Probe, rng: np.random.Generator) -> None:
    """Each number is what a finite difference says: how fast the loss moves when that channel fades
    out.
    """
    fixed = [
        ([[1.0, 2.0], [3.0, 1.0]], [[1.0, -1.0], [2.0, 0.0]]),
        ([[-2.0]], [[3.0]]),
        ([[1.0, 1.0], [2.0, -4.0]], [[5.0, -5.0], [-1.0, 1.0]]),  # effects that cancel: 0 and 6
    ]
    for weight, grad in fixed:
        where = f"for weight {weight} and grad {grad}"
        _removed(answer, torch.tensor(weight), torch.tensor(grad), where)
    for shape in [(4, 3, 3, 3), (3, 3, 2, 2), (5, 6), (1, 2, 3, 3), (3, 1, 1, 1), (4, 1)]:
        weight, grad = (torch.tensor(rng.normal(size=shape)) for _ in range(2))
        _removed(answer, weight, grad, f"for a weight of shape {shape}")
    weight = torch.tensor(rng.normal(size=(3, 2, 3, 3)), requires_grad=True)
    x = torch.tensor(rng.normal(size=(4, 2, 6, 6)))
    target = torch.tensor(rng.normal(size=(4, 3, 4, 4)))
    F.mse_loss(F.conv2d(x, weight), target).backward()
    slopes = []
    for c in range(3):
        loss = []
        for step in (1e-5, -1e-5):
            scale = torch.ones(3, 1, 1, 1, dtype=torch.float64)
            scale[c] += step
            loss.append(float(F.mse_loss(F.conv2d(x, weight.detach() * scale), target)))
        slopes.append((loss[0] - loss[1]) / 2e-5)
    where = "on a real convolution, by a finite difference,"
    _judge_channels(answer, weight.detach(), weight.grad, torch.tensor(slopes), where)


def _removed(answer: Probe, weight: torch.Tensor, grad: torch.Tensor, where: str) -> None:
    """Of a loss that is linear in the weights, each channel removed in turn."""
    change = []
    for c in range(len(weight)):
        without = weight.double().clone()
        without[c] = 0
        change.append(float(((without - weight.double()) * grad.double()).sum()))
    _judge_channels(answer, weight, grad, torch.tensor(change), where)


def _judge_channels(
    answer: Probe, weight: torch.Tensor, grad: torch.Tensor, change: torch.Tensor, where: str
) -> None:
    got = answer(weight, grad)
    if isinstance(got, np.ndarray):
        got = torch.from_numpy(got)
    if not isinstance(got, torch.Tensor) or tuple(got.shape) != (len(weight),):
        raise Wrong(
            f"{where} a tensor of shape ({len(weight)},) was expected; you returned {said(got)}."
        )
    size = (weight * grad).double().abs().flatten(1).sum(1)  # fp32 rounds each term of the sum
    for c, value in enumerate(got.detach().double().tolist()):
        due = abs(float(change[c]))
        if not abs(value - due) <= 1e-5 * float(size[c]):
            yours, want = apart(value, due)
            raise Wrong(
                f"{where} removing output channel {c} changes the loss by {want}, to first order"
                f" and without its sign; you returned {yours}."
            )


_CHAINS = [  # the channels kept, of how many, and the settings of conv1, bn and conv2
    ([1, 6], 8, {"bias": False}, {}, {"bias": False}),
    ([0, 2, 3], 5, {"bias": True, "padding": 1}, {}, {"bias": True, "padding": 1}),
    ([2, 3, 4], 6, {"bias": True, "stride": 2}, {"eps": 0.1}, {"bias": False}),  # a slice would do
    ([3], 4, {"bias": False, "padding": 2}, {"momentum": 0.3}, {"bias": True, "stride": 2}),
    ([0, 1, 2], 3, {"bias": True, "dilation": 2}, {}, {"bias": True, "kernel_size": 1}),  # all
    ([0, 3], 4, {"bias": True}, {}, {"bias": True, "padding": 2, "dilation": 2}),
]
_SETTINGS = {
    nn.Conv2d: ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    nn.BatchNorm2d: ("eps", "momentum", "affine", "track_running_stats"),
}


@exercise("03.B")
def shrink(answer: Probe, rng: np.random.Generator) -> None:
    """The smaller chain equals the mask after BatchNorm within 1e-10, with and without bias,
    strides and padding, and its layers are new ones of the right sizes.
    """
    cases = list(_CHAINS)
    for _ in range(3):
        width = int(rng.integers(5, 9))
        keep = sorted(rng.choice(width, int(rng.integers(1, width)), replace=False).tolist())
        bias = {"bias": bool(rng.integers(2))}
        cases.append((keep, width, bias, {}, {"bias": True, "padding": int(rng.integers(2))}))
    for keep, width, *settings in cases:
        chain, kept = _chain(rng, width, *settings), torch.tensor(keep)
        where = f"keep={keep} of {width} channels, conv1 with {settings[0]}, conv2 {settings[2]}"
        _judge_chain(answer(*chain, kept), chain, kept, where)
        given = copy.deepcopy(chain)
        _judge_new(answer.answer(*given, kept.clone()), given, where)
        learning = [layer.train() for layer in copy.deepcopy(chain)]
        modes = [layer.training for layer in answer.answer(*learning, kept.clone())]
        if not all(modes):
            raise Wrong(f"layers in train mode came back in eval mode: {where}.")
        if repr(given) != repr(chain):
            raise Wrong(f"the layers you are given must not change: {where}.")


def _chain(
    rng: np.random.Generator, width: int, first: dict, norm: dict, second: dict
) -> tuple[nn.Conv2d, nn.BatchNorm2d, nn.Conv2d]:
    conv1 = nn.Conv2d(3, width, **({"kernel_size": 3} | first))
    bn = nn.BatchNorm2d(width, **norm)
    conv2 = nn.Conv2d(width, 4, **({"kernel_size": 3} | second))
    layers = [layer.double().eval() for layer in (conv1, bn, conv2)]
    with torch.no_grad():
        for layer in layers:
            for value in layer.parameters():
                value.copy_(torch.tensor(rng.normal(size=tuple(value.shape))))
        bn.running_mean.copy_(torch.tensor(rng.normal(size=width)))
        bn.running_var.copy_(torch.tensor(rng.uniform(0.5, 2, size=width)))
    return conv1, bn, conv2


def _judge_chain(got: object, chain: tuple, keep: torch.Tensor, where: str) -> None:
    got = _layers(got, chain, keep, where)
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.normal(size=(2, chain[0].in_channels, 11, 11)))
    mask = torch.zeros(chain[0].out_channels, dtype=torch.float64)
    mask[keep] = 1
    with torch.no_grad():
        wanted = chain[2](F.relu(chain[1](chain[0](x))) * mask.view(1, -1, 1, 1))
        try:
            small = got[2](F.relu(got[1](got[0](x))))
        except RuntimeError as error:
            raise Wrong(f"your chain does not run: {error}\n{where}.") from error
    if small.shape != wanted.shape:
        raise Wrong(
            f"the output has shape {tuple(small.shape)}, the masked chain's {tuple(wanted.shape)}:"
            f" {where}."
        )
    difference = float((small - wanted).abs().max())
    # 108 products, each rounded to 1.1e-16 of terms that add up to 1e3 or so: 1e-11 at most.
    if not difference <= 1e-10:
        raise Wrong(
            f"your chain and the masked one differ by {difference:.2g} (allowed: 1e-10, in fp64):"
            f" {where}."
        )


def _layers(got: object, chain: tuple, keep: torch.Tensor, where: str) -> list[nn.Module]:
    """The three layers, of the right kinds, sizes and settings."""
    names, sizes = ("conv1", "the BatchNorm", "conv2"), _sizes(chain, len(keep))
    got = sequence(got, where, 3)
    for name, new, old, wanted in zip(names, got, chain, sizes, strict=True):
        if type(new) is not type(old):
            raise Wrong(f"{where}: {name} must be a {type(old).__name__}, not {said(new)}.")
        state, before = new.state_dict(), old.state_dict()
        if state.keys() != before.keys():
            raise Wrong(f"{where}: {name} holds {list(state)}; {list(before)} are due.")
        for key, shape in wanted.items():
            has = getattr(new, key)
            has = tuple(has.shape) if isinstance(has, torch.Tensor) else has
            if has != shape:
                kind = "shape " if isinstance(shape, tuple) else ""
                raise Wrong(f"{where}: {name}.{key} has {kind}{has}; {shape} is due.")
        for key in ("training", *_SETTINGS[type(old)]):
            if getattr(new, key) != getattr(old, key):
                mine, theirs = getattr(new, key), getattr(old, key)
                raise Wrong(f"{where}: {name}.{key} is {mine}; it must stay {theirs}.")
        learn = [k for k, p in old.named_parameters() if p.requires_grad]
        if [k for k, p in new.named_parameters() if p.requires_grad] != learn:
            raise Wrong(f"{where}: {name} must stay trainable: {learn} are parameters with a grad.")
    return got


def _sizes(chain: tuple, n: int) -> list[dict[str, object]]:
    """Of each layer, what must have which size."""
    conv1, bn, conv2 = chain
    return [
        {
            "weight": (n, *conv1.weight.shape[1:]),
            "in_channels": conv1.in_channels,
            "out_channels": n,
        },
        {"weight": (n,), "bias": (n,), "running_mean": (n,), "running_var": (n,)}
        | {"num_features": n},
        {
            "weight": (len(conv2.weight), n, *conv2.weight.shape[2:]),
            "in_channels": n,
            "out_channels": conv2.out_channels,
        },
    ]


def _judge_new(got: object, given: tuple, where: str) -> None:
    """No tensor of the new layers shares its memory with one that was given."""
    old = {
        t.untyped_storage().data_ptr(): f"{name}.{key}"
        for name, layer in zip(("conv1", "bn", "conv2"), given, strict=True)
        for key, t in layer.state_dict().items()
    }
    for layer in sequence(got, where, 3):
        for key, t in layer.state_dict().items():
            if t.untyped_storage().data_ptr() in old:
                theirs = old[t.untyped_storage().data_ptr()]
                raise Wrong(
                    f"{where}: {key} of your {type(layer).__name__} shares its memory with"
                    f" {theirs}, which you were given. New layers were asked for: copy it."
                )


_TABLES = [  # drop, cost, budget
    ([[0, 1], [0, 3]], [[5, 2], [5, 1]], 7),
    ([[0.0]], [[1.5]], 1.5),
    ([[0.0]], [[1.5]], 1.25),  # nothing fits
    ([[0, 1.0, 4.0]], [[9, 6, 7]], 6),  # the narrowest is not the cheapest
    ([[0, 1.0], [0, 1.5]], [[5, 4], [5, 1]], 10),  # all of it fits, exactly
    ([[0, -0.2], [0, 0.1]], [[5, 4], [5, 4]], 10),  # all of it fits, and a cut is better
    ([[0, -0.2], [0, 0.1]], [[4, 5], [5, 4]], 10),  # and another costs more
    ([[0.5, 0.25], [1.0, 2.0]], [[2.0, 2.5], [1.0, 0.5]], 3.0),
    ([[0, 1.0], [0, 2.0]], [[5, 4], [5, 4]], 7),  # nothing fits
    ([[0, 1.0], [0, 1.0]], [[1.9, 0.2], [1.9, 1.0]], 2.8),  # whole milliseconds would mislead
    ([[0, 1.0, 3.0], [0, 2.0]], [[1.75, 1.5, 0.5], [1.75, 0.75]], 2.25),
    ([[0, 1.04, 0.96]], [[9, 3, 4]], 5),  # and so would tenths of points
    ([[0, 1.0], [0.5, -3.0]], [[5, 2], [5, 8]], 10),  # a loss that a later gain makes good
    ([[1, 1, 0]] * 6, [[1, 1, 1]] * 6, 6),  # the last of 729 combinations
    # From what a greedy search finds here, no exchange of one or two options leads to the best.
    ([[0, 1, 3], [0, 2, 7], [0, 1, 4]], [[6, 4, 7], [4, 1, 8], [8, 8, 1]], 14),
    ([[0, 5, -1], [0, 0, 8], [0, 6, 5]], [[5, 4, 7], [7, 6, 2], [4, 1, 7]], 13),
    ([[0, 3, 8], [0, 3, 0], [0, 8, 8]], [[2, 1, 8], [7, 4, 7], [6, 6, 1]], 11),
    ([[0, 8, 7], [0, 4, 5], [0, 2, -1]], [[6, 2, 8], [8, 3, 1], [5, 4, 8]], 11),
    ([[3.0, 0.0, 1.0], [0.0, 2.0, -1.0]], [[1.0, 3.0, 2.0], [2.0, 1.0, 3.0]], 4.0),
]


@exercise("03.C")
def design(answer: Probe, rng: np.random.Generator) -> None:
    """No combination within the budget loses less: every one was tried."""
    for drop, cost, budget in _TABLES:
        _judge_design(answer, drop, cost, budget)
    for i, layers in enumerate([1, 2, 3, 3, 4, 4, *[5] * 24]):
        sizes = rng.integers(2, 5, layers)
        # Points of 1,000 images or of any number, some better than no cut; a real clock's times.
        drop = [rng.uniform(-0.5, 6, n).round(1 + 2 * (i % 2)).tolist() for n in sizes]
        cost = [rng.uniform(0.2, 3, n).round(3).tolist() for n in sizes]
        _judge_design(answer, drop, cost, _budget(rng, drop, cost))


def _totals(table: list[list[float]]) -> np.ndarray:
    """Of every combination, in the order of itertools.product."""
    return np.array([sum(row) for row in itertools.product(*table)])


def _budget(rng: np.random.Generator, drop: list, cost: list) -> float:
    """A hair more or less than what one of the best combinations costs, and never so near to any
    total that the order of a sum decides.
    """
    lost, spent = _totals(drop), _totals(cost)
    order = np.lexsort((lost, spent))
    least = np.minimum.accumulate(lost[order])
    best = order[np.r_[True, least[1:] < least[:-1]]]  # each loses less than all that cost less
    totals = np.sort(spent)
    k = int(np.searchsorted(totals, spent[rng.choice(best)])) - int(rng.integers(2))
    if k < 0 or k + 1 == len(totals) or totals[k + 1] - totals[k] < 1e-9:
        return float(totals[0] - 0.01 if k < 0 else totals[-1] + 0.01)
    return float(totals[k] + min(totals[k + 1] - totals[k], 0.01) / 2)


def _judge_design(answer: Probe, drop: list, cost: list, budget: float) -> None:
    given = f"design({shown(drop, cost, budget)})"
    got = answer(drop, cost, budget)
    lost, spent = _totals(drop), _totals(cost)
    if not (spent <= budget).any():
        if got is not None:
            raise Wrong(
                f"{given}: no combination costs {budget:.6g} or less, so None was expected; you"
                f" returned {said(got)}."
            )
        return
    every = list(itertools.product(*(range(len(row)) for row in drop)))
    best = every[int(np.where(spent <= budget, lost, np.inf).argmin())]
    if got is None:
        raise Wrong(f"{given}: you returned None, and {list(best)} is within the budget.")
    options = [whole(j, given) for j in sequence(got, given, len(drop))]
    if not all(0 <= j < len(row) for j, row in zip(options, drop, strict=True)):
        raise Wrong(f"{given}: {options} names an option that its layer does not have.")
    price, loss = (sum(row[j] for row, j in zip(t, options, strict=True)) for t in (cost, drop))
    if not price <= budget:
        more, allowed = apart(price, budget)
        raise Wrong(f"{given}: {options} costs {more}, more than the budget of {allowed}.")
    least = float(lost[every.index(best)])
    if not loss <= least + 1e-9:
        yours, due = apart(loss, least)
        raise Wrong(
            f"{given}: {options} loses {yours} points; within the same budget {list(best)} loses"
            f" only {due}."
        )
