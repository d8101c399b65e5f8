"""Answers to the exercises of chapter 03."""

import copy
import itertools

import numpy as np
import torch
from torch import nn

from answers import right, wrong

right("03.A", "32 bits")(lambda w, g: (w.float() * g.float()).flatten(1).sum(1).abs())
right("03.A", "einsum")(lambda w, g: torch.einsum("ok,ok->o", w.flatten(1), g.flatten(1)).abs())
right("03.A", "NumPy")(lambda w, g: np.abs((w.numpy() * g.numpy()).reshape(len(w), -1).sum(-1)))
right("03.A", "channel by channel")(
    lambda w, g: torch.stack([(a * b).sum().abs() for a, b in zip(w, g, strict=True)])
)
right("03.A", "the diagonal of a product")(
    lambda w, g: torch.diagonal(w.flatten(1) @ g.flatten(1).T).abs()
)

wrong("03.A", "absolute values before the sum")(lambda w, g: (w * g).abs().flatten(1).sum(1))
wrong("03.A", "with its sign")(lambda w, g: (w * g).flatten(1).sum(1))
wrong("03.A", "the negative sign")(lambda w, g: -(w * g).flatten(1).sum(1).abs())
wrong("03.A", "NaN where it is negative")(lambda w, g: (w * g).flatten(1).sum(1).sqrt().square())
wrong("03.A", "never a number")(lambda w, g: torch.full((len(w),), float("nan")))
wrong("03.A", "the mean over a channel")(lambda w, g: (w * g).flatten(1).mean(1).abs())
wrong("03.A", "squares of the effects")(lambda w, g: (w * g).flatten(1).square().sum(1))
wrong("03.A", "the square of the effect")(lambda w, g: (w * g).flatten(1).sum(1).square())
wrong("03.A", "the gradient alone")(lambda w, g: g.flatten(1).sum(1).abs())
wrong("03.A", "the weight alone")(lambda w, g: w.flatten(1).abs().sum(1))
wrong("03.A", "sum of weights times sum of gradients")(
    lambda w, g: (w.flatten(1).sum(1) * g.flatten(1).sum(1)).abs()
)
wrong("03.A", "input channels")(lambda w, g: (w * g).transpose(0, 1).flatten(1).sum(1).abs())
wrong("03.A", "a convolution's dimensions")(lambda w, g: (w * g).sum((1, 2, 3)).abs())
wrong("03.A", "one number for all")(lambda w, g: (w * g).sum().abs())
wrong("03.A", "a column")(lambda w, g: (w * g).flatten(1).sum(1, keepdim=True).abs())
wrong("03.A", "the last two dimensions alone")(lambda w, g: (w * g).sum((-1, -2)).abs())
wrong("03.A", "norm of the effects")(lambda w, g: (w * g).flatten(1).norm(dim=1))


def _set(layer, key, value):
    setattr(layer, key, nn.Parameter(value.detach().clone()))


def _shrink(conv1, bn, conv2, keep):
    conv1, bn, conv2 = copy.deepcopy((conv1, bn, conv2))
    for layer in (conv1, bn):
        for key, value in list(layer.named_parameters()):
            _set(layer, key, value[keep])
    bn.running_mean, bn.running_var = bn.running_mean[keep], bn.running_var[keep]
    _set(conv2, "weight", conv2.weight[:, keep])
    conv1.out_channels = bn.num_features = conv2.in_channels = len(keep)
    return conv1, bn, conv2


@right("03.B", "layers made anew, states loaded")
def made_anew(conv1, bn, conv2, keep):
    def like(conv, inputs, outputs):
        new = nn.Conv2d(
            inputs,
            outputs,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            bias=conv.bias is not None,
            dtype=conv.weight.dtype,
        )
        return new.train(conv.training)

    n = len(keep)
    first, second = like(conv1, conv1.in_channels, n), like(conv2, n, conv2.out_channels)
    norm = nn.BatchNorm2d(n, bn.eps, bn.momentum, dtype=bn.weight.dtype).train(bn.training)
    first.load_state_dict({k: v[keep] for k, v in conv1.state_dict().items()})
    norm.load_state_dict({k: v[keep] if v.dim() else v for k, v in bn.state_dict().items()})
    second.load_state_dict(conv2.state_dict() | {"weight": conv2.weight[:, keep]})
    return [first, norm, second]


@right("03.B", "through .data, as a list")
def through_data(conv1, bn, conv2, keep):
    layers = copy.deepcopy((conv1, bn, conv2))
    for layer in layers[:2]:
        for _, value in [*layer.named_parameters(), *layer.named_buffers()]:
            if value.dim():
                value.data = value.data[keep]
    layers[2].weight.data = layers[2].weight.data[:, keep]
    layers[0].out_channels = layers[1].num_features = layers[2].in_channels = keep.numel()
    return list(layers)


right("03.B", "a generator")(lambda *given: (layer for layer in _shrink(*given)))
right("03.B", "a Sequential")(lambda *given: nn.Sequential(*_shrink(*given)))


def _then(change):
    """The right layers, and one thing more."""

    def shrink(conv1, bn, conv2, keep):
        new = _shrink(conv1, bn, conv2, keep)
        change((conv1, bn, conv2), new, keep)
        return new

    return shrink


def _all(layers, key, value):
    for layer in layers:
        for p in layer.parameters():
            setattr(p, key, value)


def _plain(old, new, keep):
    for layer in new:
        for key, value in list(layer.named_parameters()):
            delattr(layer, key)
            setattr(layer, key, value.detach())


def _stale(old, new, keep):
    new[0].out_channels = new[1].num_features = new[2].in_channels = old[0].out_channels


def _shared_bias(old, new, keep):
    if old[2].bias is not None:
        new[2].bias = old[2].bias


def _slice(old, new, keep):
    first, last = int(keep[0]), int(keep[-1]) + 1
    if last - first == len(keep):
        new[0].weight.data = old[0].weight.data[first:last]


def _fresh_variance(old, new, keep):
    new[1].running_var = torch.ones_like(new[1].running_var)


wrong("03.B", "nothing learns any more")(_then(lambda o, n, k: _all(n, "requires_grad", False)))
wrong("03.B", "plain tensors: an empty state")(_then(_plain))
wrong("03.B", "old numbers of channels")(_then(_stale))
wrong("03.B", "conv2's bias is shared")(_then(_shared_bias))
wrong("03.B", "a slice shares its memory")(_then(_slice))
wrong("03.B", "the running variance is forgotten")(_then(_fresh_variance))
wrong("03.B", "the running mean is forgotten")(_then(lambda o, n, k: n[1].running_mean.zero_()))
wrong("03.B", "train mode")(_then(lambda o, n, k: [x.train() for x in n]))
wrong("03.B", "the usual eps")(_then(lambda o, n, k: setattr(n[1], "eps", 1e-5)))
wrong("03.B", "the usual momentum")(_then(lambda o, n, k: setattr(n[1], "momentum", 0.1)))
wrong("03.B", "stride 1")(_then(lambda o, n, k: setattr(n[0], "stride", (1, 1))))
wrong("03.B", "conv2's stride 1")(_then(lambda o, n, k: setattr(n[2], "stride", (1, 1))))
wrong("03.B", "no dilation")(_then(lambda o, n, k: setattr(n[0], "dilation", (1, 1))))
wrong("03.B", "32 bits")(_then(lambda o, n, k: [x.float().double() for x in n]))
wrong("03.B", "the given layers learn their new sizes")(
    _then(lambda o, n, k: setattr(o[0], "out_channels", len(k)))
)
wrong("03.B", "the first channels")(lambda a, b, c, keep: _shrink(a, b, c, torch.arange(len(keep))))
wrong("03.B", "the other channels")(
    lambda a, b, c, keep: _shrink(
        a, b, c, torch.tensor([i for i in range(a.out_channels) if i not in keep.tolist()])
    )
)
wrong("03.B", "masked, as large as before")(lambda a, b, c, keep: (a, b, c))
wrong("03.B", "two layers")(lambda a, b, c, keep: _shrink(a, b, c, keep)[::2])


def _sum(table, options):
    return sum(row[j] for row, j in zip(table, options, strict=True))


def _every(drop):
    return itertools.product(*(range(len(row)) for row in drop))


@right("03.C", "depth first")
def depth_first(drop, cost, budget):
    best = (float("inf"), None)

    def go(i, lost, spent, chosen):
        nonlocal best
        if i == len(drop):
            if spent <= budget and lost < best[0]:
                best = (lost, chosen)
            return
        for j in range(len(drop[i])):
            go(i + 1, lost + drop[i][j], spent + cost[i][j], (*chosen, j))

    go(0, 0, 0, ())
    return best[1]


@right("03.C", "the best of each price, layer by layer")
def frontier(drop, cost, budget):
    states = [(0.0, 0.0, [])]
    for losses, prices in zip(drop, cost, strict=True):
        states = sorted(
            (spent + c, lost + d, [*chosen, j])
            for spent, lost, chosen in states
            for j, (d, c) in enumerate(zip(losses, prices, strict=True))
        )
        kept = []
        for state in states:
            if state[0] <= budget and (not kept or state[1] < kept[-1][1]):
                kept.append(state)
        states = kept
    return np.array(states[-1][2]) if states else None


@right("03.C", "NumPy")
def in_numpy(drop, cost, budget):
    lost, spent = (
        sum(np.ix_(*[np.array(row, dtype=float) for row in table])) for table in (drop, cost)
    )
    if not (spent <= budget).any():
        return None
    return np.unravel_index(np.argmin(np.where(spent <= budget, lost, np.inf)), lost.shape)


def _brute(
    price=lambda cost, o, budget: _sum(cost, o),
    loss=lambda drop, o: _sum(drop, o),
    fits=lambda spent, budget: spent <= budget,
    nothing=lambda every, cost: None,
):
    def design(drop, cost, budget):
        every = list(_every(drop))
        fitting = [o for o in every if fits(price(cost, o, budget), budget)]
        return min(fitting, key=lambda o: loss(drop, o)) if fitting else nothing(every, cost)

    return design


wrong("03.C", "whole milliseconds, cut")(
    _brute(price=lambda cost, o, b: sum(int(row[j]) for row, j in zip(cost, o, strict=True)))
)
wrong("03.C", "half a millisecond more")(_brute(fits=lambda spent, budget: spent <= budget + 0.5))
wrong("03.C", "half a millisecond less")(_brute(fits=lambda spent, budget: spent <= budget - 0.5))
wrong("03.C", "a total in whole milliseconds")(
    _brute(price=lambda cost, o, b: round(_sum(cost, o)))
)
wrong("03.C", "below the budget, not on it")(_brute(fits=lambda spent, budget: spent < budget))
wrong("03.C", "no limit")(_brute(fits=lambda spent, budget: True))
wrong("03.C", "a negative drop counts as none")(
    _brute(loss=lambda drop, o: sum(max(row[j], 0) for row, j in zip(drop, o, strict=True)))
)
wrong("03.C", "the worst layer counts")(
    _brute(loss=lambda drop, o: max(row[j] for row, j in zip(drop, o, strict=True)))
)
wrong("03.C", "an empty list if nothing fits")(_brute(nothing=lambda every, cost: []))
wrong("03.C", "no cut if nothing fits")(_brute(nothing=lambda every, cost: every[0]))
wrong("03.C", "the cheapest if nothing fits")(
    _brute(nothing=lambda every, cost: min(every, key=lambda o: _sum(cost, o)))
)
wrong("03.C", "the cheapest that fits")(
    lambda drop, cost, budget: min(
        (o for o in _every(drop) if _sum(cost, o) <= budget),
        key=lambda o: _sum(cost, o),
        default=None,
    )
)
wrong("03.C", "the loss, not the options")(
    lambda drop, cost, budget: min(
        (_sum(drop, o) for o in _every(drop) if _sum(cost, o) <= budget), default=None
    )
)


@wrong("03.C", "all of it, if all of it fits")
def all_that_fits(drop, cost, budget):
    whole = [0] * len(drop)
    return whole if _sum(cost, whole) <= budget else _brute()(drop, cost, budget)


@wrong("03.C", "at most three layers")
def three_layers(drop, cost, budget):
    rest = [0] * len(drop[3:])
    left = budget - _sum(cost[3:], rest)
    found = _brute()(drop[:3], cost[:3], left)
    return None if found is None else [*found, *rest]


def _greedy(drop, cost, budget):
    options = [int(np.argmin(row)) for row in drop]
    while _sum(cost, options) > budget:
        steps = [
            ((drop[i][k] - drop[i][j]) / (cost[i][j] - cost[i][k]), i, k)
            for i, j in enumerate(options)
            for k in range(len(drop[i]))
            if cost[i][k] < cost[i][j]
        ]
        if not steps:
            return None
        _, i, k = min(steps)
        options[i] = k
    return options


wrong("03.C", "greedy")(_greedy)


@wrong("03.C", "greedy, then exchanges in pairs")
def pair_swaps(drop, cost, budget):
    options = _greedy(drop, cost, budget)
    better = options is not None
    while better:
        better = False
        for a, b in itertools.combinations_with_replacement(range(len(drop)), 2):
            for j, k in itertools.product(range(len(drop[a])), range(len(drop[b]))):
                other = list(options)
                other[a] = j
                other[b] = k
                if _sum(cost, other) <= budget and _sum(drop, other) < _sum(drop, options) - 1e-9:
                    options, better = other, True
    return options


@wrong("03.C", "the knapsack of hint 3, with negative points")
def knapsack(drop, cost, budget):
    least = {0: (0.0, [])}  # tenths of points → the cheapest way to lose just so many
    for losses, prices in zip(drop, cost, strict=True):
        longer = {}
        for points, (spent, chosen) in least.items():
            for j, (loss, price) in enumerate(zip(losses, prices, strict=True)):
                key = max(points + round(10 * loss), 0)
                if key not in longer or spent + price < longer[key][0]:
                    longer[key] = (spent + price, [*chosen, j])
        least = longer
    fitting = [k for k, (spent, _) in least.items() if spent <= budget]
    return least[min(fitting)][1] if fitting else None


@wrong("03.C", "a knapsack of tenths of points, exact for tenths alone")
def tenths(drop, cost, budget):
    rounded = [[round(10 * v) for v in row] for row in drop]
    return _brute()(rounded, cost, budget)
