"""The work on the graph that folding needs: take BatchNorms out of an exported network. Whether
that is legal is the caller's question, and chapter 10's.
"""

import copy
from collections.abc import Callable
from operator import attrgetter

import torch
from torch import Tensor, fx, nn

CONV2D, BATCH_NORM = torch.ops.aten.conv2d.default, torch.ops.aten.batch_norm.default


def fold_where(program: fx.GraphModule, legal: Callable[[fx.Node], bool]) -> fx.GraphModule:
    """A copy of `program` in which the BatchNorm behind every node for which `legal(node)` holds is
    folded into that node (`fold_at`); asked of each node in order, and of the graph as it is by
    then.

    >>> x = torch.randn(2, 3, 8, 8)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    >>> program = torch.export.export(model, (x,)).module()
    >>> folded = fold_where(program, lambda node: node.target is CONV2D)
    >>> "batch_norm" in program.code, "batch_norm" in folded.code
    (True, False)
    """
    folded = copy.deepcopy(program)
    for node in list(folded.graph.nodes):
        if legal(node):
            fold_at(folded, node)
    folded.recompile()
    return folded


def fold_at(program: fx.GraphModule, conv: fx.Node) -> None:
    """Fold the BatchNorm that reads the convolution `conv` into it, in place: the call gets a
    weight and a bias of its own, and the BatchNorm's node goes. Calls with the same weight, bias
    and BatchNorm share what they get. Call `program.recompile()` after the last one.

    `program` is what `torch.export.export(model, (x,)).module()` gives. Raises ValueError unless
    `conv` is an `aten.conv2d` whose output is read by one `aten.batch_norm` and nobody else. Who
    else reads its weight, and whether the BatchNorm uses its batch, is not asked.

    >>> x = torch.randn(2, 3, 8, 8)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    >>> program = torch.export.export(model, (x,)).module()
    >>> fold_at(program, next(n for n in program.graph.nodes if n.name == "conv2d"))
    >>> _ = program.recompile()
    >>> "batch_norm" in program.code, torch.allclose(program(x), model(x), atol=1e-6)
    (False, True)
    """
    readers = list(conv.users)
    if conv.target is not CONV2D or len(readers) != 1:
        raise ValueError(f"{conv.name} is no conv2d with one reader; it has {len(readers)}.")
    (norm,) = readers
    if norm.target is not BATCH_NORM:
        raise ValueError(f"{conv.name} is read by {norm.name}, which is no batch_norm.")

    def value(node: fx.Node | None) -> Tensor | None:
        return None if node is None else attrgetter(node.target)(program)

    bias = conv.args[2] if len(conv.args) > 2 else None
    key = conv.args[1], bias, *norm.args[1:5], norm.args[7]
    known = program.meta.setdefault("folded", {})
    if key not in known:
        gamma, beta, mean, var = map(value, norm.args[1:5])
        statistics = mean, var, norm.args[7], gamma, beta
        new = nn.utils.fuse_conv_bn_weights(value(conv.args[1]), value(bias), *statistics)
        known[key] = f"folded_{conv.name}_weight", f"folded_{conv.name}_bias"
        for name, tensor in zip(known[key], new, strict=True):
            program.register_parameter(name, tensor)
    with program.graph.inserting_before(conv):
        conv.args = (conv.args[0], *map(program.graph.get_attr, known[key]), *conv.args[3:])
    norm.replace_all_uses_with(conv)
    program.graph.erase_node(norm)
