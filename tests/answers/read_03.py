"""Wrong answers to chapter 03's exercises, by somebody who has read only their texts."""

import copy
import itertools

import torch
from torch import nn

from answers import wrong

# ---- A


@wrong("03.A", "read only: the absolute value before the sum")
def absolute_first(weight, grad):
    return (weight * grad).abs().flatten(1).sum(1)


@wrong("03.A", "read only: the sign is left")
def signed(weight, grad):
    return (weight * grad).flatten(1).sum(1)


@wrong("03.A", "read only: the sign is dropped for a linear layer only")
def signed_conv(weight, grad):
    total = (weight * grad).flatten(1).sum(1)
    return total.abs() if weight.dim() == 2 else total


@wrong("03.A", "read only: a mean over the kernel, a sum over the channels")
def mean_over_kernel(weight, grad):
    product = weight * grad
    while product.dim() > 2:
        product = product.mean(-1)
    return product.sum(1).abs()


@wrong("03.A", "read only: the absolute value of each kernel, then the sum")
def kernel_by_kernel(weight, grad):
    product = weight * grad
    if product.dim() == 2:
        return product.sum(1).abs()
    return product.flatten(2).sum(2).abs().sum(1)


@wrong("03.A", "read only: the root of the squares")
def root_of_squares(weight, grad):
    return (weight * grad).flatten(1).norm(dim=1)


@wrong("03.A", "read only: sums of weights times sums of gradients")
def product_of_sums(weight, grad):
    return (weight.flatten(1).sum(1) * grad.flatten(1).sum(1)).abs()


@wrong("03.A", "read only: input channels where there are as many as outputs")
def square_turned(weight, grad):
    product = weight * grad
    if product.dim() == 4 and product.shape[0] == product.shape[1]:
        product = product.transpose(0, 1)
    return product.flatten(1).sum(1).abs()


@wrong("03.A", "read only: scaled so that the largest is 6, as in the example")
def scaled(weight, grad):
    total = (weight * grad).flatten(1).sum(1).abs()
    return total / total.max() * 6


@wrong("03.A", "read only: multiplies the weight in place")
def in_place(weight, grad):
    return weight.data.mul_(grad).flatten(1).sum(1).abs()


@wrong("03.A", "read only: the weights' size alone")
def magnitude(weight, grad):
    return (weight * weight).flatten(1).sum(1).sqrt()


@wrong("03.A", "read only: the middle of a 3x3 kernel alone")
def middle(weight, grad):
    product = weight * grad
    if product.dim() == 4:
        product = product[:, :, product.shape[2] // 2, product.shape[3] // 2]
    return product.sum(1).abs()


# ---- B


def _cut(conv1, bn, conv2, keep):
    """A right cut, for the wrong answers to spoil."""
    a, b, c = copy.deepcopy(conv1), copy.deepcopy(bn), copy.deepcopy(conv2)
    a.out_channels = b.num_features = c.in_channels = len(keep)
    a.weight = nn.Parameter(conv1.weight.detach()[keep].clone())
    if conv1.bias is not None:
        a.bias = nn.Parameter(conv1.bias.detach()[keep].clone())
    if bn.affine:
        b.weight = nn.Parameter(bn.weight.detach()[keep].clone())
        b.bias = nn.Parameter(bn.bias.detach()[keep].clone())
    if bn.running_mean is not None:
        b.running_mean = bn.running_mean[keep].clone()
        b.running_var = bn.running_var[keep].clone()
    c.weight = nn.Parameter(conv2.weight.detach()[:, keep].clone())
    return a, b, c


@wrong("03.B", "read only: the first len(keep) running means, not those of keep")
def first_means(conv1, bn, conv2, keep):
    a, b, c = _cut(conv1, bn, conv2, keep)
    b.running_mean = bn.running_mean[: len(keep)].clone()
    return a, b, c


@wrong("03.B", "read only: fresh running statistics")
def fresh_statistics(conv1, bn, conv2, keep):
    a, b, c = _cut(conv1, bn, conv2, keep)
    b.reset_running_stats()
    return a, b, c


@wrong("03.B", "read only: conv1's bias is lost")
def lost_bias(conv1, bn, conv2, keep):
    a, b, c = _cut(conv1, bn, conv2, keep)
    a.bias = None
    return a, b, c


@wrong("03.B", "read only: conv2's bias is lost")
def lost_second_bias(conv1, bn, conv2, keep):
    a, b, c = _cut(conv1, bn, conv2, keep)
    c.bias = None
    return a, b, c


@wrong("03.B", "read only: conv2's bias is the old one itself")
def shared_bias(conv1, bn, conv2, keep):
    a, b, c = _cut(conv1, bn, conv2, keep)
    c.bias = conv2.bias
    return a, b, c


@wrong("03.B", "read only: keep of neighbours is a slice that shares memory")
def slice_shares(conv1, bn, conv2, keep):
    a, b, c = _cut(conv1, bn, conv2, keep)
    low, high = int(keep[0]), int(keep[-1]) + 1
    if high - low == len(keep):
        a.weight = nn.Parameter(conv1.weight.detach()[low:high])
    return a, b, c


@wrong("03.B", "read only: the given layers themselves are cut")
def given_layers(conv1, bn, conv2, keep):
    a, b, c = _cut(conv1, bn, conv2, keep)
    for old, new in ((conv1, a), (bn, b), (conv2, c)):
        old.__dict__.update(new.__dict__)
    return conv1, bn, conv2


@wrong("03.B", "read only: eps is the usual one")
def usual_eps(conv1, bn, conv2, keep):
    a, b, c = _cut(conv1, bn, conv2, keep)
    b.eps = 1e-5
    return a, b, c


@wrong("03.B", "read only: momentum is the usual one")
def usual_momentum(conv1, bn, conv2, keep):
    a, b, c = _cut(conv1, bn, conv2, keep)
    b.momentum = 0.1
    return a, b, c


@wrong("03.B", "read only: conv2's dilation is forgotten")
def no_dilation(conv1, bn, conv2, keep):
    a, b, c = _cut(conv1, bn, conv2, keep)
    c.dilation = (1, 1)
    return a, b, c


@wrong("03.B", "read only: conv1's strides for both")
def strides_of_first(conv1, bn, conv2, keep):
    a, b, c = _cut(conv1, bn, conv2, keep)
    c.stride = conv1.stride
    return a, b, c


@wrong("03.B", "read only: everything back in train mode")
def train_mode(conv1, bn, conv2, keep):
    return tuple(layer.train() for layer in _cut(conv1, bn, conv2, keep))


@wrong("03.B", "read only: everything in eval mode, a layer in train mode too")
def eval_mode(conv1, bn, conv2, keep):
    return tuple(layer.eval() for layer in _cut(conv1, bn, conv2, keep))


@wrong("03.B", "read only: parameters not trainable any more")
def frozen(conv1, bn, conv2, keep):
    return tuple(layer.requires_grad_(False) for layer in _cut(conv1, bn, conv2, keep))


@wrong("03.B", "read only: passes through float32")
def single_precision(conv1, bn, conv2, keep):
    dtype = conv1.weight.dtype
    return tuple(layer.float().to(dtype) for layer in _cut(conv1, bn, conv2, keep))


@wrong("03.B", "read only: num_features tells the old size")
def old_size(conv1, bn, conv2, keep):
    a, b, c = _cut(conv1, bn, conv2, keep)
    b.num_features = bn.num_features
    return a, b, c


@wrong("03.B", "read only: the other channels become zero, none is cut")
def zeroed(conv1, bn, conv2, keep):
    a, b, c = copy.deepcopy(conv1), copy.deepcopy(bn), copy.deepcopy(conv2)
    gone = [i for i in range(conv1.out_channels) if i not in keep.tolist()]
    with torch.no_grad():
        c.weight[:, gone] = 0
    return a, b, c


# ---- C


def _all(drop, cost):
    for picks in itertools.product(*[range(len(row)) for row in drop]):
        d = sum(row[j] for row, j in zip(drop, picks, strict=True))
        c = sum(row[j] for row, j in zip(cost, picks, strict=True))
        yield list(picks), d, c


def _frontier(drop, cost, budget, *, good=lambda c, budget: c <= budget + 1e-9):
    """All that is not dominated, layer by layer: right unless spoilt."""
    states = [(0.0, 0.0, [])]
    for losses, times in zip(drop, cost, strict=True):
        grown = sorted(
            (c + times[j], d + losses[j], [*picks, j])
            for c, d, picks in states
            for j in range(len(losses))
        )
        states, best = [], float("inf")
        for c, d, picks in grown:
            if d < best:
                states.append((c, d, picks))
                best = d
    fits = [s for s in states if good(s[0], budget)]
    return min(fits, key=lambda s: s[1])[2] if fits else None


@wrong("03.C", "read only: the budget itself is too much")
def strict_limit(drop, cost, budget):
    return _frontier(drop, cost, budget, good=lambda c, budget: c < budget - 1e-9)


@wrong("03.C", "read only: times rounded down to whole milliseconds")
def whole_milliseconds(drop, cost, budget):
    return _frontier(drop, [[int(c) for c in row] for row in cost], budget)


@wrong("03.C", "read only: times rounded up to whole milliseconds")
def rounded_up(drop, cost, budget):
    return _frontier(drop, [[-int(-c // 1) for c in row] for row in cost], budget)


@wrong("03.C", "read only: a negative loss counts as none")
def no_negative(drop, cost, budget):
    return _frontier([[max(0.0, d) for d in row] for row in drop], cost, budget)


@wrong("03.C", "read only: an empty list where nothing fits")
def empty_list(drop, cost, budget):
    return _frontier(drop, cost, budget) or []


@wrong("03.C", "read only: the cheapest where nothing fits")
def cheapest(drop, cost, budget):
    found = _frontier(drop, cost, budget)
    return found or [min(range(len(row)), key=row.__getitem__) for row in cost]


@wrong("03.C", "read only: every layer has as many options as the shortest")
def as_the_shortest(drop, cost, budget):
    n = min(len(row) for row in drop)
    return _frontier([row[:n] for row in drop], [row[:n] for row in cost], budget)


@wrong("03.C", "read only: greedy from option 0, most time saved a point first")
def greedy(drop, cost, budget):
    picks = [0] * len(drop)
    while sum(row[j] for row, j in zip(cost, picks, strict=True)) > budget:
        best = None
        for i, at in enumerate(picks):
            for j in range(len(drop[i])):
                saved = cost[i][at] - cost[i][j]
                lost = drop[i][j] - drop[i][at]
                if saved > 0 and (best is None or lost / saved < best[0]):
                    best = (lost / saved, i, j)
        if best is None:
            return None
        picks[best[1]] = best[2]
    return picks


@wrong("03.C", "read only: a price for time, so only the convex hull is found")
def convex_hull(drop, cost, budget):
    best = None
    for price in [0.0, *(2.0**k for k in range(-20, 21))]:
        picks = [
            min(range(len(d)), key=lambda j, d=d, c=c: d[j] + price * c[j])
            for d, c in zip(drop, cost, strict=True)
        ]
        if sum(row[j] for row, j in zip(cost, picks, strict=True)) <= budget:
            d = sum(row[j] for row, j in zip(drop, picks, strict=True))
            if best is None or d < best[0]:
                best = (d, picks)
    return best[1] if best else None


@wrong("03.C", "read only: cuts a branch off once its loss is above the best, blind for gains")
def early_cut(drop, cost, budget):
    best = [float("inf"), None]

    def walk(i, d, c, picks):
        if d >= best[0] or c > budget + 1e-9:
            return
        if i == len(drop):
            best[:] = [d, picks]
            return
        for j in range(len(drop[i])):
            walk(i + 1, d + drop[i][j], c + cost[i][j], [*picks, j])

    walk(0, 0.0, 0.0, [])
    return best[1]


@wrong("03.C", "read only: at most the first two options of a layer")
def first_two(drop, cost, budget):
    return _frontier([row[:2] for row in drop], [row[:2] for row in cost], budget)


@wrong("03.C", "read only: a budget a layer, its even share")
def even_share(drop, cost, budget):
    picks = []
    for d, c in zip(drop, cost, strict=True):
        fits = [j for j in range(len(d)) if c[j] <= budget / len(drop)]
        if not fits:
            return None
        picks.append(min(fits, key=d.__getitem__))
    return picks


@wrong("03.C", "read only: the least loss among the five hundred first combinations")
def first_combinations(drop, cost, budget):
    fits = [s for s in itertools.islice(_all(drop, cost), 500) if s[2] <= budget + 1e-9]
    return min(fits, key=lambda s: s[1])[0] if fits else None


@wrong("03.C", "read only: an option dearer than the one before it is skipped")
def always_cheaper(drop, cost, budget):
    keep = [[j for j in range(len(c)) if j == 0 or c[j] < min(c[:j])] for c in cost]
    picks = _frontier(
        [[d[j] for j in k] for d, k in zip(drop, keep, strict=True)],
        [[c[j] for j in k] for c, k in zip(cost, keep, strict=True)],
        budget,
    )
    return picks and [k[j] for k, j in zip(keep, picks, strict=True)]
