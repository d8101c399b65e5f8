"""Answers to chapter 10's exercises."""

import copy
import functools
import itertools
import math
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from answers import right, wrong


@right("10.A", "both layers, of an input of zeros")
def of_zeros(conv, bn):
    with torch.no_grad():
        x = torch.zeros(1, conv.in_channels, 3, 3, dtype=conv.weight.dtype)
        return bn(conv(x))[0, :, 1, 1]


@right("10.A", "torch's own function")
def from_torch(conv, bn):
    return torch.nn.utils.fuse_conv_bn_weights(
        *(conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
    )[1].detach()


@right("10.A", "a loop, with NumPy")
def channel_by_channel(conv, bn):
    out = np.zeros(conv.out_channels)
    for k in range(conv.out_channels):
        bias = 0.0 if conv.bias is None else conv.bias[k].item()
        scale = bn.weight[k].item() if bn.affine else 1.0
        shift = bn.bias[k].item() if bn.affine else 0.0
        deviation = math.sqrt(bn.running_var[k].item() + bn.eps)
        out[k] = (bias - bn.running_mean[k].item()) / deviation * scale + shift
    return torch.from_numpy(out)


def _bias(
    *,
    deviation=lambda bn: torch.sqrt(bn.running_var + bn.eps),
    scale=lambda bn: bn.weight if bn.affine else 1.0,
    shift=lambda bn: bn.bias if bn.affine else 0.0,
    own=lambda conv: 0.0 if conv.bias is None else conv.bias,
    put=lambda own, mean, factor, shift: (own - mean) * factor + shift,
):
    def folded_bias(conv, bn):
        return put(own(conv), bn.running_mean, scale(bn) / deviation(bn), shift(bn))

    return folded_bias


right("10.A", "in pieces")(_bias())
wrong("10.A", "no convolution's bias")(_bias(own=lambda conv: 0.0))
wrong("10.A", "a bias is taken for granted")(_bias(own=lambda conv: conv.bias))
wrong("10.A", "a scale is taken for granted")(_bias(scale=lambda bn: bn.weight))
wrong("10.A", "a shift is taken for granted")(_bias(shift=lambda bn: bn.bias))
wrong("10.A", "no shift")(_bias(shift=lambda bn: 0.0))
wrong("10.A", "no scale")(_bias(scale=lambda bn: 1.0))
wrong("10.A", "the scale's absolute value")(
    _bias(scale=lambda bn: bn.weight.abs() if bn.affine else 1.0)
)
wrong("10.A", "no eps")(_bias(deviation=lambda bn: bn.running_var.sqrt()))
wrong("10.A", "eps behind the root")(_bias(deviation=lambda bn: bn.running_var.sqrt() + bn.eps))
wrong("10.A", "eps of 1e-5")(_bias(deviation=lambda bn: (bn.running_var + 1e-5).sqrt()))
wrong("10.A", "the variance, not its root")(_bias(deviation=lambda bn: bn.running_var + bn.eps))
wrong("10.A", "the bias is not scaled")(_bias(put=lambda b, m, f, s: b - m * f + s))
wrong("10.A", "the mean is not scaled")(_bias(put=lambda b, m, f, s: b * f - m + s))
wrong("10.A", "the mean is added")(_bias(put=lambda b, m, f, s: (b + m) * f + s))
wrong("10.A", "the shift is scaled, too")(_bias(put=lambda b, m, f, s: (b - m + s) * f))
wrong("10.A", "the wrong sign")(_bias(put=lambda b, m, f, s: (m - b) * f + s))
wrong("10.A", "the sum over channels")(_bias(put=lambda b, m, f, s: ((b - m) * f + s).sum()))
wrong("10.A", "a list")(lambda conv, bn: from_torch(conv, bn).tolist())
wrong("10.A", "the folded convolution")(lambda conv, bn: fuse_conv_bn_eval(conv, bn))


@wrong("10.A", "the convolution's bias is changed on the way")
def in_place(conv, bn):
    bias = from_torch(conv, bn)
    if conv.bias is not None:
        conv.bias.data.copy_(bias)
    return bias


# --- 10.B -------------------------------------------------------------------------------------


def _into(traced, node, modules):
    """Replace the convolution and take the BatchNorm out of the graph."""
    before = node.args[0]
    traced.set_submodule(
        before.target, fuse_conv_bn_eval(modules[before.target], modules[node.target])
    )
    node.replace_all_uses_with(before)
    traced.graph.erase_node(node)


def _in_place(traced, node, modules):
    """Scale the convolution's own numbers."""
    before, bn = node.args[0], modules[node.target]
    conv = modules[before.target]
    fused = fuse_conv_bn_eval(conv, bn)
    conv.weight.data.copy_(fused.weight.data)
    conv.bias = fused.bias
    node.replace_all_uses_with(before)
    traced.graph.erase_node(node)


class Scale(nn.Module):
    def __init__(self, bn):
        super().__init__()
        factor = (bn.weight if bn.affine else 1.0) / torch.sqrt(bn.running_var + bn.eps)
        shift = (bn.bias if bn.affine else 0.0) - bn.running_mean * factor
        self.factor, self.shift = (nn.Parameter(v[:, None, None].detach()) for v in (factor, shift))

    def forward(self, x):
        return x * self.factor + self.shift


class Functional(nn.Module):
    def __init__(self, bn):
        super().__init__()
        self.bn = [bn]

    def forward(self, x):
        bn = self.bn[0]
        return F.batch_norm(
            x, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0, bn.eps
        )


def _instead(kind):
    """Put another module in the BatchNorm's place."""
    return lambda traced, node, modules: traced.set_submodule(
        node.target, kind(modules[node.target])
    )


def _once(node, calls):
    return calls.count(node.target) == 1


def _fold(
    *,
    train=ValueError,
    work=copy.deepcopy,
    bn_ready=lambda bn: not bn.training and bn.running_mean is not None,
    before=lambda node: node.args[0],
    once=_once,
    alone=lambda node: len(node.users) == 1,
    shared=lambda node, calls: True,
    apply=_into,
    finish=lambda traced: traced,
):
    """The right answer with one of its decisions exchanged."""

    def fold_legal(model):
        if train is not None and model.training:
            raise train("call eval() first")
        traced = fx.symbolic_trace(work(model))
        modules = dict(traced.named_modules())
        calls = [n.target for n in traced.graph.nodes if n.op == "call_module"]
        for node in list(traced.graph.nodes):
            if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d):
                continue
            conv = before(node)
            legal = (
                conv.op == "call_module"
                and isinstance(modules[conv.target], nn.Conv2d)
                and bn_ready(modules[node.target])
                and once(conv, calls)
                and alone(conv)
                and shared(node, calls)
            )
            if legal:
                apply(traced, node, modules)
        traced.recompile()
        return finish(traced)

    return fold_legal


right("10.B", "in pieces")(_fold())
right("10.B", "a BatchNorm that is called twice stays, as in the chapter")(_fold(shared=_once))


@right("10.B", "unused modules are deleted, too")
def tidy(model):
    folded = _fold()(model)
    folded.delete_all_unused_submodules()
    folded.graph.lint()
    return folded


class NewNames:
    def __call__(self, model):
        if model.training:
            raise ValueError
        traced = fx.symbolic_trace(copy.deepcopy(model))
        modules = dict(traced.named_modules())
        calls = [n.target for n in traced.graph.nodes if n.op == "call_module"]
        for i, node in enumerate(list(traced.graph.nodes)):
            bn = modules.get(node.target) if node.op == "call_module" else None
            if not isinstance(bn, nn.BatchNorm2d) or bn.training or bn.running_var is None:
                continue
            (before,) = node.args
            conv = modules.get(before.target) if before.op == "call_module" else None
            same = [t for t in calls if modules.get(t) is conv]
            if isinstance(conv, nn.Conv2d) and len(same) == 1 and list(before.users) == [node]:
                traced.add_module(f"folded_{i}", fuse_conv_bn_eval(conv, bn))
                with traced.graph.inserting_after(before):
                    new = traced.graph.call_module(f"folded_{i}", before.args)
                node.replace_all_uses_with(new)
                traced.graph.erase_node(node)
                traced.graph.erase_node(before)
        return fx.GraphModule(traced, traced.graph)


right("10.B", "a new convolution under a new name, from a callable object")(NewNames())
wrong("10.B", "train mode is let pass")(_fold(train=None))
wrong("10.B", "train mode is made eval mode")(
    _fold(train=None, work=lambda model: copy.deepcopy(model).eval())
)
wrong("10.B", "train mode is a RuntimeError")(_fold(train=RuntimeError))
wrong("10.B", "always a ValueError")(lambda model: [][model.index("a")])
wrong("10.B", "the model's own modules are scaled")(_fold(work=lambda m: m, apply=_in_place))
wrong("10.B", "how often the convolution is called does not matter")(
    _fold(once=lambda node, calls: True)
)
wrong("10.B", "how many read the convolution does not matter")(_fold(alone=lambda node: True))
wrong("10.B", "other readers than BatchNorms are counted")(
    _fold(alone=lambda node: all("n" in str(u.target) or "m" in str(u.target) for u in node.users))
)
wrong("10.B", "a BatchNorm in train mode is folded")(
    _fold(bn_ready=lambda bn: bn.eval().running_mean is not None)
)
wrong("10.B", "running statistics are taken for granted")(
    _fold(bn_ready=lambda bn: not bn.training)
)
wrong("10.B", "without weight and bias it stays")(
    _fold(bn_ready=lambda bn: bn.affine and not bn.training and bn.running_mean is not None)
)
wrong("10.B", "folds nothing")(_fold(once=lambda node, calls: False))
wrong("10.B", "folds only what has a bias")(
    _fold(
        apply=lambda t, node, m: _into(t, node, m) if m[node.args[0].target].bias is not None else 0
    )
)
wrong("10.B", "folds no groups")(
    _fold(apply=lambda t, node, m: _into(t, node, m) if m[node.args[0].target].groups == 1 else 0)
)
wrong("10.B", "scales the weight in place, though it is shared")(_fold(apply=_in_place))
wrong("10.B", "a scale stands in for it")(_fold(apply=_instead(Scale)))
wrong("10.B", "the function stands in for the module")(_fold(apply=_instead(Functional)))
wrong("10.B", "an Identity stands in for it, and nothing is folded")(
    _fold(apply=_instead(lambda bn: nn.Identity()))
)


def _looks_back(node):
    """Past a ReLU, module or function."""
    before = node.args[0]
    while "relu" in str(before.target) and before.args:
        before = before.args[0]
    return before


def _past_relu(traced, node, modules):
    before = _looks_back(node)
    fused = fuse_conv_bn_eval(modules[before.target], modules[node.target])
    traced.set_submodule(before.target, fused)
    node.replace_all_uses_with(node.args[0])
    traced.graph.erase_node(node)


def _next_conv(model):
    """Folds by the order of the modules, not of the calls."""
    if model.training:
        raise ValueError
    new = copy.deepcopy(model)
    for parent in [m for m in new.modules() if len(list(m.children())) > 1]:
        for (a, conv), (b, bn) in itertools.pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d):
                setattr(parent, a, fuse_conv_bn_eval(conv, bn))
                setattr(parent, b, nn.Identity())
    return fx.symbolic_trace(new)


wrong("10.B", "folds through a ReLU")(_fold(before=_looks_back, apply=_past_relu))
wrong("10.B", "the order of modules, not of calls")(_next_conv)
wrong("10.B", "the convolution's output is used, nothing is scaled")(
    _fold(
        apply=lambda t, node, m: (
            node.replace_all_uses_with(node.args[0]),
            t.graph.erase_node(node),
        )
    )
)
wrong("10.B", "the network's text")(_fold(finish=lambda traced: traced.code))
wrong("10.B", "back in train mode")(_fold(finish=lambda traced: traced.train()))


def _by_name(traced, node, modules):
    fused = fuse_conv_bn_eval(modules[node.args[0].target], modules[node.target])
    setattr(traced, node.args[0].target.split(".")[-1], fused)
    node.replace_all_uses_with(node.args[0])
    traced.graph.erase_node(node)


wrong("10.B", "nested names are cut")(_fold(apply=_by_name))


# --- 10.C -------------------------------------------------------------------------------------


def _moved(sizes, lengths):
    ends = [0, *itertools.accumulate(lengths)]
    return sum(sizes[a] + sizes[b] for a, b in itertools.pairwise(ends))


def _all_ways(n, limit):
    for places in itertools.product([False, True], repeat=n - 1):
        ends = [0, *[i + 1 for i, cut in enumerate(places) if cut], n]
        lengths = [b - a for a, b in itertools.pairwise(ends)]
        if max(lengths) <= limit:
            yield lengths


def _cuts(
    ways=_all_ways,
    cost=_moved,
    gain=lambda alone, mine: alone / mine,
    limit=lambda limit: limit,
    said=lambda lengths, gain: (lengths, gain),
):
    def cuts(sizes, most):
        n = len(sizes) - 1
        best = min(ways(n, limit(most)), key=lambda lengths: cost(sizes, lengths))
        return said(best, gain(_moved(sizes, [1] * n), _moved(sizes, best)))

    return cuts


right("10.C", "all ways")(_cuts())
right("10.C", "a fraction, and a tuple")(
    _cuts(gain=Fraction, said=lambda lengths, gain: [tuple(lengths), gain])
)
right("10.C", "NumPy")(_cuts(said=lambda lengths, gain: (np.array(lengths), np.float32(gain))))


@right("10.C", "from the right, remembered")
def from_the_right(sizes, limit):
    @functools.cache
    def best(at):
        if at == len(sizes) - 1:
            return 0, ()
        options = []
        for end in range(at + 1, min(at + limit, len(sizes) - 1) + 1):
            moved, rest = best(end)
            options.append((sizes[at] + sizes[end] + moved, (end - at, *rest)))
        return min(options)

    moved, lengths = best(0)
    return lengths, torch.tensor((2 * sum(sizes) - sizes[0] - sizes[-1]) / moved)


wrong("10.C", "the fewest groups")(_cuts(cost=lambda sizes, lengths: len(lengths)))
wrong("10.C", "the fewest groups, then bytes")(
    _cuts(cost=lambda sizes, lengths: (len(lengths), _moved(sizes, lengths)))
)
wrong("10.C", "the most bytes")(_cuts(cost=lambda sizes, lengths: -_moved(sizes, lengths)))
wrong("10.C", "every operation alone")(_cuts(ways=lambda n, limit: [[1] * n]))
wrong("10.C", "all in one")(_cuts(ways=lambda n, limit: [[n]]))
wrong("10.C", "one operation too many")(_cuts(limit=lambda limit: limit + 1))
wrong("10.C", "below the limit")(_cuts(limit=lambda limit: max(limit - 1, 1)))
wrong("10.C", "equal groups")(
    _cuts(ways=lambda n, limit: [[k] * (n // k) for k in range(1, limit + 1) if n % k == 0])
)
wrong("10.C", "as many as fit, from the left")(
    _cuts(ways=lambda n, limit: [[limit] * (n // limit) + [n % limit] * (n % limit > 0)])
)
wrong("10.C", "as many as fit, from the right")(
    _cuts(ways=lambda n, limit: [[n % limit] * (n % limit > 0) + [limit] * (n // limit)])
)
wrong("10.C", "the dearest cut counts")(
    _cuts(cost=lambda s, k: max([s[a] for a in itertools.accumulate(k)][:-1], default=0))
)
wrong("10.C", "the gain upside down")(_cuts(gain=lambda alone, mine: mine / alone))
wrong("10.C", "the gain in bytes")(_cuts(gain=lambda alone, mine: alone - mine))
wrong("10.C", "the gain as a share")(_cuts(gain=lambda alone, mine: 1 - mine / alone))
wrong("10.C", "the gain to two digits")(_cuts(gain=lambda alone, mine: round(alone / mine, 2)))
wrong("10.C", "the gain in percent")(_cuts(gain=lambda alone, mine: 100 * alone / mine))
wrong("10.C", "lengths alone")(_cuts(said=lambda lengths, gain: lengths))
wrong("10.C", "in reverse")(_cuts(said=lambda lengths, gain: (lengths[::-1], gain)))
wrong("10.C", "the places, not the lengths")(
    _cuts(said=lambda lengths, gain: (list(itertools.accumulate(lengths)), gain))
)
wrong("10.C", "the gain in words")(_cuts(said=lambda lengths, gain: (lengths, f"{gain:.3g}x")))


@wrong("10.C", "greedy: the cheapest next cut")
def greedy(sizes, limit):
    n, at, lengths = len(sizes) - 1, 0, []
    while at < n:
        k = min(range(1, min(limit, n - at) + 1), key=lambda k: (sizes[at + k], -k))
        lengths.append(k)
        at += k
    return lengths, _moved(sizes, [1] * n) / _moved(sizes, lengths)


@wrong("10.C", "greedy: two neighbours at a time")
def merge_pairs(sizes, limit):
    lengths = [1] * (len(sizes) - 1)
    alone = _moved(sizes, lengths)
    while True:
        options = [
            [*lengths[:i], lengths[i] + lengths[i + 1], *lengths[i + 2 :]]
            for i in range(len(lengths) - 1)
            if lengths[i] + lengths[i + 1] <= limit
        ]
        if not options:
            return lengths, alone / _moved(sizes, lengths)
        lengths = min(options, key=lambda k: _moved(sizes, k))
