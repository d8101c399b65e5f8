"""Answers to chapter 10's exercises."""

import copy
import functools
import itertools
import math
from fractions import Fraction

import numpy as np
import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from answers import right, wrong
from course_utils.folding import fold_at


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

CONV, NORM = torch.ops.aten.conv2d.default, torch.ops.aten.batch_norm.default


def _behind(node):
    """What the one BatchNorm behind this convolution reads, or None."""
    (norm,) = node.users if node.target is CONV and len(node.users) == 1 else (None,)
    if norm is None or norm.target is not NORM or norm.args[5]:
        return None
    return *norm.args[1:5], norm.args[7]


def _agree(node, partner):
    """Every reader of the weight has this node's partner."""
    return all(partner(reader) == partner(node) for reader in node.args[1].users)


def _fold(
    *,
    partner=_behind,
    rule=_agree,
    apply=fold_at,
    work=copy.deepcopy,
    finish=lambda folded: folded,
):
    """The right answer with one of its decisions exchanged."""

    def fold_legal(program):
        folded = work(program)
        for node in list(folded.graph.nodes):
            if partner(node) is not None and rule(node, partner):
                apply(folded, node)
        folded.recompile()
        return finish(folded)

    return fold_legal


right("10.B", "in pieces")(_fold())


@right("10.B", "cleaned up, from a new GraphModule")
def tidy(program):
    folded = _fold()(program)
    folded.graph.eliminate_dead_code()
    folded.graph.lint()
    return fx.GraphModule(folded, folded.graph)


def _value(program, node):
    return None if node is None else program.get_parameter(node.target).data


def _by_hand(program, conv):
    """The algebra written out, with names of its own, and the new numbers as buffers."""
    norm, (x, weight, *more) = next(iter(conv.users)), conv.args
    _, gamma, beta, mean, var, _, _, eps, _ = norm.args
    mean, var = program.get_buffer(mean.target), program.get_buffer(var.target)
    factor = (var + eps).rsqrt() * (1.0 if gamma is None else _value(program, gamma))
    bias = 0.0 if not more or more[0] is None else _value(program, more[0])
    shift = 0.0 if beta is None else _value(program, beta)
    new = {
        f"mine_{conv.name}_w": _value(program, weight) * factor[:, None, None, None],
        f"mine_{conv.name}_b": (bias - mean) * factor + shift,
    }
    for name, tensor in new.items():
        program.register_buffer(name, tensor)
    with program.graph.inserting_after(conv):
        with program.graph.inserting_before(conv):
            w, b = map(program.graph.get_attr, new)
        call = program.graph.call_function(CONV, (x, w, b, *more[1:]))
    norm.replace_all_uses_with(call)
    program.graph.erase_node(norm)
    program.graph.erase_node(conv)


class Grouped:
    """Weights first: all readers of a weight are folded, or none; a callable object."""

    def __call__(self, program):
        folded = copy.deepcopy(program)
        for weight in [n for n in folded.graph.nodes if n.op == "get_attr"]:
            readers = list(weight.users)
            partners = {_behind(reader) for reader in readers}
            if len(partners) == 1 and None not in partners and _is_weight(weight, readers):
                for reader in readers:
                    _by_hand(folded, reader)
        folded.recompile()
        return folded


def _is_weight(node, readers):
    return all(reader.args[1] is node for reader in readers)


right("10.B", "weight by weight, the algebra by hand, new calls")(Grouped())


@right("10.B", "torch's own algebra for two modules, through a pattern of pairs")
def pairs(program):
    folded = copy.deepcopy(program)
    found = [(n.args[0], n) for n in folded.graph.nodes if n.target is NORM and not n.args[5]]
    good = [(c, n) for c, n in found if c.target is CONV and set(c.users) == {n}]
    same = {c: (n.args[1:5], n.args[7]) for c, n in good}
    chosen = [c for c in same if all(same.get(r) == same[c] for r in c.args[1].users)]
    for conv in chosen:
        fold_at(folded, conv)
    folded.recompile()
    return folded


wrong("10.B", "how often the weight is read does not matter")(_fold(rule=lambda node, p: True))
wrong("10.B", "a weight that is read twice always stays")(
    _fold(rule=lambda node, p: len(node.args[1].users) == 1)
)
wrong("10.B", "any BatchNorm behind the other readers will do")(
    _fold(rule=lambda node, p: all(p(r) is not None for r in node.args[1].users))
)
wrong("10.B", "only other convolutions are asked")(
    _fold(rule=lambda node, p: all(p(r) == p(node) for r in node.args[1].users if r.target is CONV))
)
wrong("10.B", "one reader that agrees is enough")(
    _fold(rule=lambda node, p: sum(p(r) == p(node) for r in node.args[1].users) >= 1)
)


def _first_reader(node):
    norm = next(iter(node.users), None) if node.target is CONV else None
    if norm is None or norm.target is not NORM or norm.args[5]:
        return None
    return *norm.args[1:5], norm.args[7]


def _fold_first(program, conv):
    """The first reader goes, whoever else there is."""
    others = [n for n in conv.users if n is not next(iter(conv.users))]
    with program.graph.inserting_after(conv):
        twin = program.graph.call_function(torch.ops.aten.alias.default, (conv,))
    for other in others:
        other.replace_input_with(conv, twin)
    norm = next(n for n in conv.users if n is not twin)
    _scaled(program, conv, norm)


def _scaled(program, conv, norm):
    bias = conv.args[2] if len(conv.args) > 2 else None
    gamma, beta = (_value(program, n) for n in norm.args[1:3])
    mean, var = (program.get_buffer(n.target) for n in norm.args[3:5])
    new = nn.utils.fuse_conv_bn_weights(
        *(_value(program, conv.args[1]), _value(program, bias), mean, var, norm.args[7]),
        *(gamma, beta),
    )
    names = f"its_{conv.name}_w", f"its_{conv.name}_b"
    for name, tensor in zip(names, new, strict=True):
        program.register_parameter(name, tensor)
    with program.graph.inserting_before(conv):
        conv.args = (conv.args[0], *map(program.graph.get_attr, names), *conv.args[3:])
    norm.replace_all_uses_with(conv)
    program.graph.erase_node(norm)


wrong("10.B", "who else reads the output does not matter")(
    _fold(partner=_first_reader, apply=_fold_first)
)


def _trains_too(node):
    (norm,) = node.users if node.target is CONV and len(node.users) == 1 else (None,)
    if norm is None or norm.target is not NORM or norm.args[3] is None:
        return None
    return *norm.args[1:5], norm.args[7]


wrong("10.B", "the statistics of the batch are taken for the running ones")(
    _fold(partner=_trains_too)
)


def _but(test):
    return lambda node: _behind(node) if node.target is CONV and test(node) else None


def _bias_of(node):
    return node.args[2] if len(node.args) > 2 else None


wrong("10.B", "without weight and shift it stays")(
    _fold(partner=_but(lambda n: all(u.args[1:2] != (None,) for u in n.users)))
)
wrong("10.B", "folds only what has a bias")(_fold(partner=_but(_bias_of)))
wrong("10.B", "folds no groups")(_fold(partner=_but(lambda n: len(n.args) < 7)))
wrong("10.B", "counts on three arguments")(_fold(partner=_but(lambda n: len(n.args) > 3)))
wrong("10.B", "folds only the module's own BatchNorm")(
    _fold(partner=_but(lambda n: all("running" in str(u.args[3]) for u in n.users)))
)
wrong("10.B", "folds nothing")(_fold(rule=lambda node, p: False))
wrong("10.B", "folds only the first")(
    _fold(rule=lambda node, p: _agree(node, p) and node.name == "conv2d")
)
wrong("10.B", "the given program is changed")(_fold(work=lambda program: program))


def _in_place(program, conv):
    """Scales the weight that is there."""
    norm, weight, bias = next(iter(conv.users)), conv.args[1], _bias_of(conv)
    gamma, beta = (_value(program, n) for n in norm.args[1:3])
    mean, var = (program.get_buffer(n.target) for n in norm.args[3:5])
    new = nn.utils.fuse_conv_bn_weights(
        *(_value(program, weight), _value(program, bias), mean, var, norm.args[7], gamma, beta)
    )
    _value(program, weight).copy_(new[0])
    program.register_parameter(f"b_{conv.name}", new[1])
    with program.graph.inserting_before(conv):
        conv.args = (*conv.args[:2], program.graph.get_attr(f"b_{conv.name}"), *conv.args[3:])
    norm.replace_all_uses_with(conv)
    program.graph.erase_node(norm)


wrong("10.B", "the weight is scaled where it is, once a call")(_fold(apply=_in_place))


def _only_erased(program, conv):
    norm = next(iter(conv.users))
    norm.replace_all_uses_with(conv)
    program.graph.erase_node(norm)


wrong("10.B", "BatchNorm is taken out, nothing is scaled")(_fold(apply=_only_erased))


def _as_scale(program, conv):
    """A multiplication and an addition in its place."""
    norm = next(iter(conv.users))
    aten, graph = torch.ops.aten, program.graph
    with graph.inserting_before(norm):
        _, gamma, beta, mean, var, _, _, eps, _ = norm.args
        factor = graph.call_function(aten.rsqrt.default, (_add(graph, var, eps),))
        factor = factor if gamma is None else _mul(graph, factor, gamma)
        shape = [-1, 1, 1]
        centred = graph.call_function(aten.sub.Tensor, (conv, _view(graph, mean, shape)))
        out = _mul(graph, centred, _view(graph, factor, shape))
        out = out if beta is None else _add(graph, out, _view(graph, beta, shape))
    norm.replace_all_uses_with(out)
    graph.erase_node(norm)


def _add(graph, a, b):
    kind = "Tensor" if isinstance(b, fx.Node) else "Scalar"
    return graph.call_function(getattr(torch.ops.aten.add, kind), (a, b))


def _mul(graph, a, b):
    return graph.call_function(torch.ops.aten.mul.Tensor, (a, b))


def _view(graph, a, shape):
    return graph.call_function(torch.ops.aten.view.default, (a, shape))


wrong("10.B", "a scale and a shift stand in for it")(_fold(apply=_as_scale))
wrong("10.B", "the network's text")(_fold(finish=lambda folded: folded.code))
wrong("10.B", "the graph, not the module")(_fold(finish=lambda folded: folded.graph))


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
