"""Checks of chapter 10, Operator fusion."""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from course_utils.exercises import Probe, Wrong, exercise


@exercise("10.A")
def folded_bias(answer: Probe, rng: np.random.Generator) -> None:
    """With this bias and the scaled weight, one convolution computes what two layers did."""
    cases = {
        "with a bias": {"bias": True},
        "without a bias": {"bias": False},
        "a BatchNorm without weight and bias (affine=False)": {"bias": True, "affine": False},
        "a tiny running variance": {"bias": True, "var": 1e-6},
        "grouped": {"bias": True, "groups": 2},
    }
    torch.manual_seed(int(rng.integers(2**31)))
    for name, how in cases.items():
        conv, bn = _pair(rng, **how)
        got = answer(conv, bn)
        if not isinstance(got, torch.Tensor) or got.shape != (conv.out_channels,):
            raise Wrong(
                f"{name}: a tensor of {conv.out_channels} numbers was expected; you returned"
                f" {got!r}."
            )
        one = copy.deepcopy(conv)
        gamma = bn.weight if bn.affine else torch.ones_like(bn.running_var)
        one.weight.data = (
            conv.weight * (gamma / torch.sqrt(bn.running_var + bn.eps))[:, None, None, None]
        )
        one.bias = nn.Parameter(got.detach())
        x = torch.from_numpy(rng.normal(size=(2, conv.in_channels, 5, 5)))
        with torch.no_grad():
            apart = float((one(x) - bn(conv(x))).abs().max())
        # 40 roundings to 1.1e-16 of terms that add up to 1e4 (a deviation of 1/300): 1e-10 at most.
        if not apart < 1e-9:
            raise Wrong(
                f"{name}: with your bias the folded convolution is off by up to {apart:.3g}."
            )


def _pair(
    rng: np.random.Generator,
    bias: bool,
    affine: bool = True,
    var: float | None = None,
    groups: int = 1,
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    channels = 2 * int(rng.integers(2, 5))
    conv = nn.Conv2d(4, channels, 3, padding=1, bias=bias, groups=groups).double()
    bn = nn.BatchNorm2d(channels, affine=affine, eps=float(rng.uniform(1e-5, 1e-2))).double()
    _shake(bn, rng)
    if var is not None:
        bn.running_var.fill_(var)
    return conv.eval(), bn.eval()


def _shake(bn: nn.BatchNorm2d, rng: np.random.Generator) -> None:
    n = bn.num_features
    bn.running_mean.copy_(torch.from_numpy(rng.normal(size=n)))
    bn.running_var.copy_(torch.from_numpy(rng.uniform(0.2, 3, size=n)))
    if bn.affine:
        bn.weight.data.copy_(torch.from_numpy(rng.uniform(0.5, 2, size=n)))
        bn.bias.data.copy_(torch.from_numpy(rng.normal(size=n)))


class _Net(nn.Module):
    """One small network for each situation; `folds` says how many of its BatchNorms may
    disappear.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False),
        )
        self.n, self.m = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "a chain":
            return self.m(self.b(self.relu(self.n(self.a(x)))))
        if self.kind == "the convolution's output is used twice":
            y = self.a(x)
            return self.m(self.b(self.n(y) + y))
        if self.kind == "one convolution, called twice":
            y = self.b(self.a(x))
            return self.n(y) + self.m(self.b(F.relu(y)))
        if self.kind == "a ReLU between convolution and BatchNorm":
            return self.m(self.b(self.n(self.relu(self.a(x)))))
        if self.kind == "a function between convolution and BatchNorm":
            return self.m(self.b(self.n(F.relu(self.a(x)))))
        return self.n(x[:, :1].expand(-1, 4, -1, -1)) + self.m(
            self.b(self.a(x))
        )  # a BatchNorm on the input


_FOLDS = {
    "a chain": 2,
    "the convolution's output is used twice": 1,
    "one convolution, called twice": 0,
    "a ReLU between convolution and BatchNorm": 1,
    "a function between convolution and BatchNorm": 1,
    "a BatchNorm on the input": 1,
}


@exercise("10.B")
def fold_legal(answer: Probe, rng: np.random.Generator) -> None:
    """Equal outputs in every case, and every BatchNorm gone that may go."""
    torch.manual_seed(int(rng.integers(2**31)))
    for kind, folds in _FOLDS.items():
        net = _Net(kind).double().eval()
        for bn in (net.n, net.m):
            _shake(bn, rng)
        got = answer(net)
        if not isinstance(got, nn.Module):
            raise Wrong(f"{kind}: a module was expected; you returned a {type(got).__name__}.")
        x = torch.from_numpy(rng.normal(size=(3, 3, 6, 6)))
        with torch.no_grad():
            apart = float((got(x) - net(x)).abs().max())
        if not apart < 1e-9:
            raise Wrong(
                f"{kind}: the outputs differ by up to {apart:.3g}. That fold was not legal."
            )
        left = _calls(got)
        if left != 2 - folds:
            raise Wrong(f"{kind}: {left} of 2 BatchNorms are still called; {folds} can be folded.")
    net = _Net("a chain").double().train()
    try:
        answer(net)
    except Wrong as error:
        if "ValueError" in str(error):
            return
        raise
    raise Wrong(
        "a network in train mode: there BatchNorm uses the batch's statistics; a ValueError is due."
    )


def _calls(net: nn.Module) -> int:
    """How many BatchNorms a forward pass really runs."""
    seen: list[object] = []
    hooks = [
        m.register_forward_hook(lambda *_: seen.append(1))
        for m in net.modules()
        if isinstance(m, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        net(torch.zeros(1, 3, 6, 6, dtype=torch.float64))
    for hook in hooks:
        hook.remove()
    return len(seen)


@exercise("10.C")
def cuts(answer: Probe, rng: np.random.Generator) -> None:
    """No other way to cut moves fewer bytes, and the predicted gain is what the bytes say."""
    cases = [([4, 8, 1, 4], 2), ([5, 5], 3), ([1, 9, 9, 9, 1], 4), ([3, 1, 4, 1, 5, 9, 2, 6], 1)]
    for _ in range(20):
        n = int(rng.integers(1, 9))
        cases.append(([int(s) for s in rng.integers(1, 30, n + 1)], int(rng.integers(1, 6))))
    for sizes, limit in cases:
        where = f"sizes {sizes}, at most {limit} operations a kernel"
        try:
            lengths, gain = answer(list(sizes), limit)
            lengths = [int(k) for k in lengths]
            gain = float(gain)
        except (TypeError, ValueError):
            raise Wrong(
                f"{where}: two things were expected, a list of lengths and the gain."
            ) from None
        if sum(lengths) != len(sizes) - 1 or min(lengths) < 1 or max(lengths) > limit:
            raise Wrong(
                f"{where}: {lengths} does not cut {len(sizes) - 1} operations into groups of 1 to"
                f" {limit}."
            )
        least = min(_moved(sizes, c) for c in _ways(len(sizes) - 1, limit))
        if _moved(sizes, lengths) > least:
            raise Wrong(
                f"{where}: {lengths} moves {_moved(sizes, lengths)} bytes; {least} are possible."
            )
        wanted = _moved(sizes, [1] * (len(sizes) - 1)) / least
        if abs(gain - wanted) > 1e-9 * wanted:
            raise Wrong(
                f"{where}: one kernel an operation moves {wanted:.4g} times as many bytes; you say"
                f" {gain:.4g}."
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
