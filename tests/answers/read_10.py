"""Wrong answers to chapter 10's exercises, by somebody who has read only their texts."""

import copy

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from answers import wrong

# ---- A


def _parts(conv, bn):
    factor = (bn.weight if bn.affine else 1.0) / torch.sqrt(bn.running_var + bn.eps)
    bias = conv.bias if conv.bias is not None else torch.zeros_like(bn.running_mean)
    shift = bn.bias if bn.affine else torch.zeros_like(bn.running_mean)
    return factor, bias, shift


@wrong("10.A", "read only: the convolution's bias is not scaled")
def bias_not_scaled(conv, bn):
    factor, bias, shift = _parts(conv, bn)
    return bias - bn.running_mean * factor + shift


@wrong("10.A", "read only: the mean is not scaled")
def mean_not_scaled(conv, bn):
    factor, bias, shift = _parts(conv, bn)
    return bias * factor - bn.running_mean + shift


@wrong("10.A", "read only: the convolution's bias is forgotten")
def no_conv_bias(conv, bn):
    factor, _, shift = _parts(conv, bn)
    return shift - bn.running_mean * factor


@wrong("10.A", "read only: the shift is forgotten without a convolution's bias")
def no_shift_without_bias(conv, bn):
    factor, bias, shift = _parts(conv, bn)
    if conv.bias is None:
        return -bn.running_mean * factor
    return (bias - bn.running_mean) * factor + shift


@wrong("10.A", "read only: the shift is scaled, too")
def scaled_shift(conv, bn):
    factor, bias, shift = _parts(conv, bn)
    return (bias - bn.running_mean + shift) * factor


@wrong("10.A", "read only: a bias must be there")
def bias_must_be(conv, bn):
    factor, _, shift = _parts(conv, bn)
    return (conv.bias - bn.running_mean) * factor + shift


@wrong("10.A", "read only: weight and shift must be there")
def affine_must_be(conv, bn):
    factor, bias, _ = _parts(conv, bn)
    return (bias - bn.running_mean) * factor + bn.bias


@wrong("10.A", "read only: without eps")
def no_eps(conv, bn):
    _, bias, shift = _parts(conv, bn)
    factor = (bn.weight if bn.affine else 1.0) / torch.sqrt(bn.running_var)
    return (bias - bn.running_mean) * factor + shift


@wrong("10.A", "read only: eps is 1e-5, whatever the layer says")
def usual_eps(conv, bn):
    _, bias, shift = _parts(conv, bn)
    factor = (bn.weight if bn.affine else 1.0) / torch.sqrt(bn.running_var + 1e-5)
    return (bias - bn.running_mean) * factor + shift


@wrong("10.A", "read only: the variance instead of its root")
def variance(conv, bn):
    _, bias, shift = _parts(conv, bn)
    factor = (bn.weight if bn.affine else 1.0) / (bn.running_var + bn.eps)
    return (bias - bn.running_mean) * factor + shift


@wrong("10.A", "read only: the mean is added")
def mean_added(conv, bn):
    factor, bias, shift = _parts(conv, bn)
    return (bias + bn.running_mean) * factor + shift


@wrong("10.A", "read only: one number for all channels without any bias")
def one_number(conv, bn):
    factor, bias, shift = _parts(conv, bn)
    found = (bias - bn.running_mean) * factor + shift
    return found.mean() if conv.bias is None and not bn.affine else found


@wrong("10.A", "read only: changes the convolution's bias in place")
def in_place(conv, bn):
    factor, bias, shift = _parts(conv, bn)
    return ((bias.data.sub_(bn.running_mean)) * factor + shift).detach()


# ---- B

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _fold(
    model,
    *,
    alone=True,
    once=True,
    norm_once=True,
    stats=True,
    train=True,
    deep=True,
    convs=_CONVS,
    norms=_NORMS,
    most=None,
    through=(),
    params=True,
    erase=True,
):
    """A fold with its rules as switches."""
    if train and (model.training or any(m.training for m in model.modules())):
        raise ValueError("only in eval mode")
    graph_module = fx.symbolic_trace(copy.deepcopy(model) if deep else model)
    modules = dict(graph_module.named_modules())
    calls = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            key = id(modules[node.target])
            calls[key] = calls.get(key, 0) + 1
    read = {n.target.rpartition(".")[0] for n in graph_module.graph.nodes if n.op == "get_attr"}
    folded = 0
    for node in list(graph_module.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[node.target], norms):
            continue
        before = node.args[0]
        while before.op == "call_module" and isinstance(modules[before.target], through):
            before = before.args[0]
        if before.op != "call_module" or not isinstance(modules[before.target], convs):
            continue
        conv, bn = modules[before.target], modules[node.target]
        if alone and len(before.users) > 1:
            continue
        if once and calls[id(conv)] > 1:
            continue
        if norm_once and calls[id(bn)] > 1:
            continue
        if params and before.target in read:
            continue
        if stats and bn.running_mean is None:
            continue
        if most is not None and folded >= most:
            break
        fused = fuse_conv_bn_eval(conv, bn)
        parent, _, name = before.target.rpartition(".")
        setattr(graph_module.get_submodule(parent), name, fused)
        modules[before.target] = fused
        if erase:
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
        folded += 1
    graph_module.graph.lint()
    graph_module.recompile()
    if erase:
        graph_module.delete_all_unused_submodules()
    return graph_module


@wrong("10.B", "read only: folds though another node reads the convolution, too")
def other_readers(model):
    return _fold(model, alone=False)


@wrong("10.B", "read only: folds a convolution that is called twice")
def called_twice(model):
    return _fold(model, once=False)


@wrong("10.B", "read only: folds into the given model itself")
def given_model(model):
    folded = _fold(model, deep=False)
    for name, module in folded.named_modules():
        if isinstance(module, _CONVS):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module)
    return folded


@wrong("10.B", "read only: no error in train mode")
def no_error(model):
    return _fold(copy.deepcopy(model).eval(), train=False)


@wrong("10.B", "read only: switches the given model to eval mode")
def switches(model):
    if model.training:
        model.eval()
        raise ValueError("only in eval mode")
    return _fold(model.requires_grad_(False))


@wrong("10.B", "read only: another kind of error in train mode")
def other_error(model):
    if model.training:
        raise RuntimeError("only in eval mode")
    return _fold(model)


@wrong("10.B", "read only: fails where a BatchNorm has no running averages")
def no_averages(model):
    return _fold(model, stats=False)


@wrong("10.B", "read only: folds the first pair only")
def first_pair(model):
    return _fold(model, most=1)


@wrong("10.B", "read only: folds through a ReLU that stands between")
def through_relu(model):
    return _fold(model, through=(nn.ReLU,))


@wrong("10.B", "read only: folds through a padding, a ReLU6 or a Sigmoid that stands between")
def through_others(model):
    return _fold(model, through=(nn.ZeroPad2d, nn.ReLU6, nn.Sigmoid))


@wrong("10.B", "read only: folds nothing")
def nothing(model):
    if model.training:
        raise ValueError("only in eval mode")
    return fx.symbolic_trace(copy.deepcopy(model))


@wrong("10.B", "read only: scales the weights and leaves the BatchNorm behind them")
def twice_normalised(model):
    return _fold(model, erase=False)


@wrong("10.B", "read only: every BatchNorm is thrown out, folded or not")
def thrown_out(model):
    graph_module = _fold(model)
    modules = dict(graph_module.named_modules())
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module" and isinstance(modules[node.target], _NORMS):
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
    graph_module.recompile()
    graph_module.delete_all_unused_submodules()
    return graph_module


@wrong("10.B", "read only: neighbours in the order of their names, not in the graph")
def by_names(model):
    if model.training:
        raise ValueError("only in eval mode")
    graph_module = fx.symbolic_trace(copy.deepcopy(model))
    found = [n for n, m in graph_module.named_modules() if not list(m.children())]
    modules = dict(graph_module.named_modules())
    for first, second in zip(found, found[1:], strict=False):
        if isinstance(modules[first], nn.Conv2d) and isinstance(modules[second], nn.BatchNorm2d):
            if modules[first].out_channels != modules[second].num_features:
                continue
            fused = fuse_conv_bn_eval(modules[first], modules[second])
            for name, module in ((first, fused), (second, nn.Identity())):
                parent, _, last = name.rpartition(".")
                setattr(graph_module.get_submodule(parent), last, module)
    return graph_module


@wrong("10.B", "read only: only where the model is one flat Sequential")
def flat_only(model):
    if model.training:
        raise ValueError("only in eval mode")
    if not isinstance(model, nn.Sequential):
        return fx.symbolic_trace(copy.deepcopy(model))
    return _fold(model)


@wrong("10.B", "read only: the folded convolution loses what the shift adds")
def no_shift(model):
    graph_module = _fold(model)
    for module in graph_module.modules():
        if isinstance(module, _CONVS) and module.bias is not None:
            module.bias.data.zero_()
    return graph_module


# ---- C


def _moved(sizes, lengths):
    at = total = 0
    for n in lengths:
        total += sizes[at] + sizes[at + n]
        at += n
    return total


def _single(sizes):
    return sum(a + b for a, b in zip(sizes[:-1], sizes[1:], strict=True))


def _best(sizes, limit, *, cost=None):
    n = len(sizes) - 1
    cost = cost or (lambda i, j: sizes[i] + sizes[j])
    best = [(0, [])] + [None] * n
    for j in range(1, n + 1):
        best[j] = min(
            (best[i][0] + cost(i, j), [*best[i][1], j - i]) for i in range(max(0, j - limit), j)
        )
    return best[n][1]


def _answer(sizes, lengths):
    moved = _moved(sizes, lengths)
    return lengths, _single(sizes) / moved if moved else 1.0


@wrong("10.C", "read only: groups as long as the limit, from the start")
def from_the_start(sizes, limit):
    n = len(sizes) - 1
    lengths = [limit] * (n // limit) + ([n % limit] if n % limit else [])
    return _answer(sizes, lengths)


@wrong("10.C", "read only: groups as long as the limit, from the end")
def from_the_end(sizes, limit):
    n = len(sizes) - 1
    lengths = ([n % limit] if n % limit else []) + [limit] * (n // limit)
    return _answer(sizes, lengths)


@wrong("10.C", "read only: one operation more than the limit")
def one_more(sizes, limit):
    return _answer(sizes, _best(sizes, limit + 1))


@wrong("10.C", "read only: one operation less than the limit")
def one_less(sizes, limit):
    return _answer(sizes, _best(sizes, max(1, limit - 1)))


@wrong("10.C", "read only: cuts at the smallest tensor within reach, greedily")
def greedy(sizes, limit):
    at, lengths, n = 0, [], len(sizes) - 1
    while at < n:
        reach = range(1, min(limit, n - at) + 1)
        step = n - at if n - at <= limit else min(reach, key=lambda k, at=at: (sizes[at + k], -k))
        lengths.append(step)
        at += step
    return _answer(sizes, lengths)


@wrong("10.C", "read only: the lengths turned round")
def turned(sizes, limit):
    lengths = _best(sizes, limit)
    return lengths[::-1], _answer(sizes, lengths)[1]


@wrong("10.C", "read only: a gain below 1, the quotient upside down")
def upside_down(sizes, limit):
    lengths, gain = _answer(sizes, _best(sizes, limit))
    return lengths, 1 / gain


@wrong("10.C", "read only: a tensor between two operations counts once before fusion")
def counts_once(sizes, limit):
    lengths = _best(sizes, limit)
    return lengths, sum(sizes) / _moved(sizes, lengths)


@wrong("10.C", "read only: a tensor between two groups counts once")
def between_once(sizes, limit):
    lengths = _best(sizes, limit)
    at, moved = 0, sizes[0]
    for n in lengths:
        at += n
        moved += sizes[at]
    return lengths, _single(sizes) / moved


@wrong("10.C", "read only: the gain in numbers of kernels")
def kernels(sizes, limit):
    lengths = _best(sizes, limit)
    return lengths, (len(sizes) - 1) / len(lengths)


@wrong("10.C", "read only: the fewest groups, whatever they move")
def fewest_groups(sizes, limit):
    return _answer(sizes, _best(sizes, limit, cost=lambda i, j: 1 + 1e-12 * sizes[j]))


@wrong("10.C", "read only: the gain in bytes written, right for the example")
def writes_only(sizes, limit):
    lengths = _best(sizes, limit)
    written = sum(sizes[sum(lengths[: i + 1])] for i in range(len(lengths)))
    return lengths, sum(sizes[1:]) / written


@wrong("10.C", "read only: the gain rounded to one digit")
def one_digit(sizes, limit):
    lengths, gain = _answer(sizes, _best(sizes, limit))
    return lengths, round(gain, 1)


@wrong("10.C", "read only: fuses nothing but pairs")
def pairs_only(sizes, limit):
    return _answer(sizes, _best(sizes, min(2, limit)))


@wrong("10.C", "read only: everything in one group")
def one_group(sizes, limit):
    return _answer(sizes, [len(sizes) - 1])


@wrong("10.C", "read only: the places of the cuts, not the lengths")
def places(sizes, limit):
    lengths, gain = _answer(sizes, _best(sizes, limit))
    return [sum(lengths[: i + 1]) for i in range(len(lengths))], gain
