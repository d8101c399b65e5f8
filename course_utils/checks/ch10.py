"""Checks of chapter 10, Operator fusion."""

import copy
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
        how = {"affine": affine, "track_running_stats": running}
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.n, self.m = nn.BatchNorm2d(4, **how), nn.BatchNorm2d(4)
        self.relu, self.run = nn.ReLU(), forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self, x)


def _chain(net: _Net, x: torch.Tensor) -> torch.Tensor:
    return net.m(net.b(net.relu(net.n(net.a(x)))))


class _Named(nn.Module):
    """Its convolution is called as its input is."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.n = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.n(self.x(x))


def _one_module(net: _Net) -> None:
    net.b = net.a


def _one_weight(net: _Net) -> None:
    net.b.weight = net.a.weight


def _nested() -> nn.Module:
    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4), nn.ReLU())

    return nn.Sequential(block(), nn.Sequential(block(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)))


_NETS = [  # (what it is, the network, how many BatchNorms can go, how often each is called)
    ("Sequential(Conv2d, BatchNorm2d)", lambda: _nested()[0][:2], {1}),
    ("Sequential(BatchNorm2d, Conv2d)", lambda: _nested()[0][1::-1], {0}),
    ("a chain", lambda: _Net(_chain), {2}),
    ("a chain with affine=False", lambda: _Net(_chain, affine=False), {2}),
    ("a Sequential inside a Sequential", _nested, {3}),
    ("a convolution that has its input's name", _Named, {1}),
    (
        "a convolution whose output is used twice",
        lambda: _Net(lambda s, x: [s.m(s.b(s.n(y) + y)) for y in [s.a(x)]][0]),
        {1},
    ),
    (
        "two BatchNorms behind one convolution",
        lambda: _Net(lambda s, x: [s.n(y) + s.m(y) for y in [s.a(x)]][0]),
        {0},
    ),
    (
        "one convolution, called twice",
        lambda: _Net(lambda s, x: s.m(s.a(F.relu(s.n(s.a(x)))))),
        {0},
    ),
    (
        "one convolution, called twice, once without a BatchNorm",
        lambda: _Net(lambda s, x: s.m(s.b(s.a(F.relu(s.n(s.a(x))))))),
        {1},
    ),
    ("one convolution under two names", lambda: _changed(_Net(_chain), _one_module), {0}),
    (
        "two convolutions with one weight",
        lambda: _changed(_Net(lambda s, x: s.n(s.a(x)) + s.relu(s.b(x))), _one_weight),
        {1},
    ),
    (
        "a ReLU between convolution and BatchNorm",
        lambda: _Net(lambda s, x: s.m(s.b(s.n(s.relu(s.a(x)))))),
        {1},
    ),
    (
        "a function between convolution and BatchNorm",
        lambda: _Net(lambda s, x: s.m(s.b(s.n(F.relu(s.a(x)))))),
        {1},
    ),
    ("a BatchNorm on the input", lambda: _Net(lambda s, x: s.m(s.a(s.n(x)))), {1}),
    (
        "one BatchNorm behind two convolutions",
        lambda: _Net(lambda s, x: s.n(s.b(s.relu(s.n(s.a(x)))))),
        {0, 1, 2},
    ),
    (
        "a BatchNorm that alone is in train mode",
        lambda: _changed(_Net(_chain), lambda net: net.n.train()),
        {1},
    ),
    ("a BatchNorm without running statistics", lambda: _Net(_chain, running=False), {1}),
]


def _changed(net: _Net, change: Callable[[_Net], object]) -> _Net:
    change(net.eval())
    return net


@exercise("10.B")
def fold_legal(answer: Probe, rng: np.random.Generator) -> None:
    """Equal outputs in every case, and every BatchNorm gone that may go."""
    torch.manual_seed(int(rng.integers(2**31)))
    for kind, make, folds in _NETS:
        net = make().double()
        if not kind.endswith("train mode"):
            net.eval()
        for bn in net.modules():
            if isinstance(bn, nn.BatchNorm2d):
                _shake(bn, rng)
        _judge_fold(answer(net), net, torch.from_numpy(rng.normal(size=(3, 4, 7, 6))), kind, folds)
    for kind, make, _ in _NETS[:3:2]:
        try:
            answer(make().train())
        except Wrong as error:
            if not isinstance(error.__cause__, ValueError):
                raise
        else:
            raise Wrong(
                f"{kind} in train mode: there BatchNorm uses its batch's statistics; a ValueError"
                " is due."
            )


def _judge_fold(got: object, net: nn.Module, x: torch.Tensor, kind: str, folds: set[int]) -> None:
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
    # Sums of at most 40 terms in fp64, three layers deep, with factors below 10: 1e-12.
    if not apart_ < 1e-9:
        raise Wrong(f"{kind}: the outputs differ by up to {apart_:.3g}. That fold was not legal.")
    norms, left = _norms(before), _norms(after)
    if norms - left not in folds:
        raise Wrong(
            f"{kind}: {left} of {norms} BatchNorms are still computed; {max(folds)} can be folded."
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
