"""Checks of chapter 10, Operator fusion."""

import copy
import functools
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from course_utils.checks.accept import apart, close, number, said, sequence, whole
from course_utils.exercises import Probe, Wrong, exercise


@exercise("10.A")
def folded_bias(answer: Probe, rng: np.random.Generator) -> None:
    """This is what both layers make of an input of zeros, where only the bias is left."""
    cases = {
        "with a bias": {},
        "without a bias": {"bias": False},
        "with affine=False": {"affine": False},
        "with affine=False and without a bias": {"affine": False, "bias": False},
        "with a tiny running variance": {"var": 1e-6},
        "grouped": {"groups": 2},
    }
    torch.manual_seed(int(rng.integers(2**31)))
    _judge_bias(answer, *_of_the_text(), "with b = 1, µ = 3, σ² + ε = 4, γ = 2, β = 5")
    for name, how in cases.items():
        _judge_bias(answer, *_pair(rng, **how), f"for a convolution {name}")


def _judge_bias(answer: Probe, conv: nn.Conv2d, bn: nn.BatchNorm2d, where: str) -> None:
    got = answer(conv, bn)
    if not isinstance(got, torch.Tensor) or got.shape != (conv.out_channels,):
        raise Wrong(
            f"{where}, a tensor of {conv.out_channels} numbers was expected; you returned"
            f" {said(got)}."
        )
    with torch.no_grad():
        due = bn(conv(torch.zeros(1, conv.in_channels, 3, 3, dtype=torch.float64)))[0, :, 1, 1]
    for k, (mine, theirs) in enumerate(zip(got.tolist(), due.tolist(), strict=True)):
        # Five roundings to 1.1e-16 of terms below 1e4 (a deviation of 1/300): 1e-11 at most.
        if not close(mine, theirs, rel=0.0, absolute=1e-9):
            yours, right = apart(mine, theirs)
            raise Wrong(
                f"{where}, the bias of channel {k} is {right}; you say {yours}. For an input of"
                " zeros, bn(conv(x)) is the bias."
            )


def _of_the_text() -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv, bn = nn.Conv2d(1, 1, 3, padding=1).double(), nn.BatchNorm2d(1, eps=0.5).double()
    places = (conv.bias, bn.running_mean, bn.running_var, bn.weight, bn.bias)
    for place, value in zip(places, (1, 3, 3.5, 2, 5), strict=True):
        place.data.fill_(value)
    return conv.eval(), bn.eval()


def _pair(
    rng: np.random.Generator,
    bias: bool = True,
    affine: bool = True,
    var: float | None = None,
    groups: int = 1,
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    channels = 2 * int(rng.integers(2, 5))
    conv = nn.Conv2d(4, channels, 3, padding=1, bias=bias, groups=groups).double()
    bn = nn.BatchNorm2d(channels, affine=affine).double()
    _shake(bn, rng)
    if var is not None:
        bn.running_var.fill_(var)
    return conv.eval(), bn.eval()


def _shake(bn: nn.BatchNorm2d, rng: np.random.Generator) -> None:
    """Other numbers than a new BatchNorm's in all its places; some scales are below 0, one is 0."""
    n = bn.num_features
    bn.eps = float(rng.uniform(1e-5, 1e-2))
    if bn.running_mean is not None:
        bn.running_mean.copy_(torch.from_numpy(rng.normal(size=n)))
        bn.running_var.copy_(torch.from_numpy(rng.uniform(0.2, 3, size=n)))
    if bn.affine:
        signs = np.array([1, -1, 0, 1] * n)[:n]
        bn.weight.data.copy_(torch.from_numpy(rng.uniform(0.5, 2, size=n) * signs))
        bn.bias.data.copy_(torch.from_numpy(rng.normal(size=n)))


class _Net(nn.Module):
    """Two convolutions and two BatchNorms, put together by `forward`."""

    def __init__(self, forward: Callable, affine: bool = True, running: bool = True) -> None:
        super().__init__()
        how = {"affine": affine, "track_running_stats": running, "eps": 1e-2}
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.n, self.m = nn.BatchNorm2d(4, **how), nn.BatchNorm2d(4)
        self.one, self.relu, self.run = nn.Conv2d(4, 4, 1, bias=False), nn.ReLU(), forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self, x)


def _chain(net: _Net, x: torch.Tensor) -> torch.Tensor:
    return net.m(net.b(net.relu(net.n(net.a(x)))))


def _beside(net: _Net, x: torch.Tensor) -> torch.Tensor:
    return net.n(net.a(x)) + net.n(net.relu(net.b(x)))


def _one_weight(net: _Net) -> None:
    net.b.weight = net.a.weight


def _one_bias(net: _Net) -> None:
    net.b.bias = net.a.bias


def _nested() -> nn.Module:
    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4), nn.ReLU())

    return nn.Sequential(block(), nn.Sequential(block(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)))


def _norm(net: _Net, y: torch.Tensor, other: str = "") -> torch.Tensor:
    """BatchNorm as a function; one of its arguments is another than n's."""
    n, m = net.n, net.m
    given = {
        "running_mean": (n if other != "mean" else m).running_mean,
        "running_var": (n if other != "variance" else m).running_var,
        "weight": (n if other != "weight" else m).weight,
        "bias": (n if other != "shift" else m).bias,
        "momentum": 0.5 if other == "momentum" else 0.1,
        "eps": 0.5 if other == "eps" else 0.01,
    }
    return F.batch_norm(y, **given)


def _differ(other: str) -> Callable[[], nn.Module]:
    return lambda: _Net(lambda s, x: _norm(s, s.a(F.relu(_norm(s, s.a(x)))), other))


_NETS = {  # what it is: the network, how many calls of BatchNorm go
    "Sequential(Conv2d, BatchNorm2d)": (lambda: _nested()[0][:2], 1),
    "Sequential(BatchNorm2d, Conv2d)": (lambda: _nested()[0][1::-1], 0),
    "a chain": (lambda: _Net(_chain), 2),
    "a chain with affine=False": (lambda: _Net(_chain, affine=False), 2),
    "a Sequential inside a Sequential": (_nested, 3),
    "a 1×1 convolution without a bias": (lambda: _Net(lambda s, x: s.n(s.one(x))), 1),
    "F.conv2d and F.batch_norm": (
        lambda: _Net(
            lambda s, x: F.batch_norm(
                F.conv2d(x, s.a.weight, s.a.bias), s.n.running_mean, s.n.running_var, eps=0.5
            )
        ),
        1,
    ),
    "a convolution whose output is used twice": (
        lambda: _Net(lambda s, x: [s.m(s.b(s.n(y) + y)) for y in [s.a(x)]][0]),
        1,
    ),
    "two BatchNorms behind one convolution": (
        lambda: _Net(lambda s, x: [s.n(y) + s.m(y) for y in [s.a(x)]][0]),
        0,
    ),
    "one convolution, called twice, each time before the same BatchNorm": (
        lambda: _Net(lambda s, x: s.n(s.a(F.relu(s.n(s.a(x)))))),
        2,
    ),
    "one convolution, called twice, before two BatchNorms": (
        lambda: _Net(lambda s, x: s.m(s.a(F.relu(s.n(s.a(x)))))),
        0,
    ),
    **{
        f"one convolution, called twice, before BatchNorms that differ in {other} only": (
            _differ(other),
            2 * (other == "momentum"),  # it matters in training only
        )
        for other in ("weight", "shift", "mean", "variance", "eps", "momentum")
    },
    "one convolution, called twice, once without a BatchNorm": (
        lambda: _Net(lambda s, x: s.m(s.b(s.a(F.relu(s.n(s.a(x))))))),
        1,
    ),
    "one convolution, called twice, its first output used twice": (
        lambda: _Net(lambda s, x: [s.n(y) + s.n(s.a(y)) for y in [s.a(x)]][0]),
        0,
    ),
    "one weight with two biases, before the same BatchNorm": (
        lambda: _changed(_Net(lambda s, x: s.n(s.a(x)) + s.n(s.b(x))), _one_weight),
        2,
    ),
    "two convolutions with one weight, one of them without a BatchNorm": (
        lambda: _changed(_Net(lambda s, x: s.n(s.a(x)) + s.relu(s.b(x))), _one_weight),
        0,
    ),
    "a weight that is also added to its convolution's output": (
        lambda: _Net(lambda s, x: s.m(s.b(x)) + s.n(s.a(x)) + s.a.weight.sum()),
        1,
    ),
    "two convolutions with one bias": (lambda: _changed(_Net(_chain), _one_bias), 2),
    "one BatchNorm behind two convolutions": (
        lambda: _Net(lambda s, x: s.n(s.b(s.relu(s.n(s.a(x)))))),
        2,
    ),
    "one BatchNorm, called behind a convolution and behind a ReLU": (lambda: _Net(_beside), 1),
    "a ReLU between convolution and BatchNorm": (
        lambda: _Net(lambda s, x: s.m(s.b(s.n(s.relu(s.a(x)))))),
        1,
    ),
    "a BatchNorm on the input": (lambda: _Net(lambda s, x: s.m(s.a(s.n(x)))), 1),
    "a convolution that is the output, too": (
        lambda: _Net(lambda s, x: [torch.cat([y, s.n(y)]) for y in [s.a(x)]][0]),
        0,
    ),
    "a BatchNorm that alone is in train mode": (
        lambda: _changed(_Net(_chain), lambda net: net.n.train()),
        1,
    ),
    "a BatchNorm without running statistics": (lambda: _Net(_chain, running=False), 1),
}


def _changed(net: _Net, change: Callable[[_Net], object]) -> _Net:
    change(net.eval())
    return net


@functools.cache
def _exported(kind: str) -> nn.Module:
    net = _NETS[kind][0]().double()
    if not kind.endswith("train mode"):
        net.eval()
    return torch.export.export(net, (torch.zeros(3, 4, 7, 6, dtype=torch.float64),)).module()


def _drawn(kind: str, rng: np.random.Generator) -> nn.Module:
    """The exported network with new numbers in all places; some scales are below 0, one is 0."""
    program = copy.deepcopy(_exported(kind))
    for name, t in program.state_dict().items():
        if t.is_floating_point():
            drawn = rng.uniform(0.2, 3, t.shape) if "var" in name else rng.normal(size=t.shape)
            t.copy_(torch.from_numpy(np.asarray(drawn)))
            if t.dim() == 1 and name.endswith("n.weight"):
                t[0] = 0.0
    return program


@exercise("10.B")
def fold_legal(answer: Probe, rng: np.random.Generator) -> None:
    """Equal outputs in every case; each BatchNorm gone that may go, and none that may not."""
    torch.manual_seed(int(rng.integers(2**31)))
    for kind, (_, folds) in _NETS.items():
        program = _drawn(kind, rng)
        x = torch.from_numpy(rng.normal(size=(3, 4, 7, 6)))
        _judge_fold(answer(program), program, x, kind, folds)


def _judge_fold(got: object, net: nn.Module, x: torch.Tensor, kind: str, folds: int) -> None:
    if not isinstance(got, nn.Module):
        raise Wrong(f"{kind}: a module was expected; you returned {said(got)}.")
    want, before = _run(copy.deepcopy(net), x)
    try:
        have, after = _run(got, x)
    except Exception as error:
        raise Wrong(f"{kind}: your network raised {type(error).__name__}: {error}.") from error
    if not isinstance(have, torch.Tensor) or have.shape != want.shape:
        raise Wrong(f"{kind}: your network returns {said(have)}; the given one {said(want)}.")
    apart_ = float((have - want).abs().max())
    # Sums of at most 40 terms in fp64, four layers deep, with factors below 30: 1e-9.
    if not apart_ < 1e-7:
        raise Wrong(f"{kind}: the outputs differ by up to {apart_:.3g}. That fold was not legal.")
    norms, left = _norms(before), _norms(after)
    if norms - left != folds:
        raise Wrong(
            f"{kind}: {left} of {norms} calls of BatchNorm are still computed; {folds} can be"
            f" folded, so {norms - folds} must be left."
        )
    more = sum(after.values()) - (sum(before.values()) - (norms - left))
    if more > 0:
        raise Wrong(
            f"{kind}: in a BatchNorm's place your network computes something else. Its numbers"
            " belong into the convolution."
        )


class _Counted(TorchDispatchMode):
    """Counts the operations that torch really computes, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(
        self, func: object, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def _run(net: nn.Module, x: torch.Tensor) -> tuple[object, Counter]:
    given = x.clone()
    with torch.no_grad(), _Counted() as counted:
        return net(given), counted.names


def _norms(names: Counter) -> int:
    return sum(count for name, count in names.items() if "batch_norm" in name)


@exercise("10.C")
def cuts(answer: Probe, rng: np.random.Generator) -> None:
    """No other way to cut moves fewer bytes, and the predicted gain is what the bytes say."""
    cases = [
        ([5, 5], 3),
        ([5, 7], 1),
        ([4, 8, 1, 4], 2),
        ([9, 9, 9, 9], 3),  # all in one
        ([2, 7, 7, 2], 9),
        ([2, 7, 7, 2], 2),
        ([1, 9, 9, 9, 1], 4),
        ([6, 2, 1, 9, 9], 3),  # the group of three ends at a dear place
        ([9, 1, 9, 9, 1, 9], 3),  # three groups are cheaper than two
        ([9, 4, 5, 4, 9], 2),  # one cut at 5 is cheaper than two at 4
        ([19, 15, 8, 9, 2, 3, 1, 6], 5),  # the cheapest next cut leads astray
        ([27, 15, 18, 29, 22, 19, 16], 3),  # and so does the best merger of two
        ([3, 1, 4, 1, 5, 9, 2, 6], 1),
        ([3, 1, 4, 1, 5, 9, 2, 6], 3),
    ]
    for _ in range(20):
        n = int(rng.integers(1, 9))
        cases.append(([int(s) for s in rng.integers(1, 30, n + 1)], int(rng.integers(1, 6))))
    for sizes, limit in cases:
        where = f"for the sizes {sizes} and at most {limit} operations a kernel"
        got = sequence(answer(list(sizes), limit), f"{where}, (lengths, gain)", 2)
        _judge_cuts([whole(k, where) for k in sequence(got[0], where)], got[1], sizes, limit, where)


def _judge_cuts(lengths: list[int], gain: object, sizes: list[int], limit: int, where: str) -> None:
    n = len(sizes) - 1
    if sum(lengths) != n or min(lengths) < 1 or max(lengths) > limit:
        raise Wrong(f"{where}, {lengths} does not cut {n} operations into groups of 1 to {limit}.")
    best = min(_ways(n, limit), key=lambda way: _moved(sizes, way))
    mine, least, alone = (_moved(sizes, way) for way in (lengths, best, [1] * n))
    if mine > least:
        raise Wrong(f"{where}, {lengths} moves {mine} bytes; {best} moves {least}.")
    if not close(number(gain, f"{where}, the gain"), alone / least):
        yours, due = apart(float(gain), alone / least)
        raise Wrong(
            f"{where}, one kernel an operation moves {alone} bytes and your groups {least}, {due}"
            f" times as few; you say {yours}."
        )


def _ways(n: int, limit: int) -> list[list[int]]:
    if n == 0:
        return [[]]
    return [[k, *rest] for k in range(1, min(n, limit) + 1) for rest in _ways(n - k, limit)]


def _moved(sizes: list[int], lengths: list[int]) -> int:
    total = at = 0
    for k in lengths:
        total += sizes[at] + sizes[at + k]
        at += k
    return total
