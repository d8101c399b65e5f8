"""Checks of chapter 05, quantization math."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from course_utils.checks.accept import apart, close, number, said, sequence
from course_utils.exercises import Probe, Wrong, exercise
from course_utils.onnx_node import onnx_reference
from course_utils.probe import shown


@exercise("05.A")
def scale_and_zero_point(answer: Probe, rng: np.random.Generator) -> None:
    """Zero has a code, both ends come back within half a step, and uint8 agrees with ONNX's
    DynamicQuantizeLinear.
    """
    cases = [
        (-1.0, 3.0, -128, 127),
        (0.5, 1.0, 0, 255),
        (0.5, 1.0, -128, 127),
        (-2.0, -1.0, 0, 255),
        (-2.0, -1.0, -8, 7),
        (0.0, 0.0, -128, 127),
        (0.0, 0.0, 3, 9),
        (-1e-6, 2e-6, 0, 15),  # a small range is a range
        (-3e4, 1e4, -128, 127),
        (-1.0, 2.0, 10, 13),
        (-1.0, 0.25, 0, 1),
        (-1.0, 1.0, -127, 127),
    ]
    codes = [(0, 255), (-128, 127), (-8, 7), (0, 15), (-127, 127), (5, 60), (-60, -5)]
    for _ in range(40):
        ends = np.sort(rng.normal(scale=10 ** rng.uniform(-3, 3), size=2))
        cases.append((float(ends[0]), float(ends[1]), *codes[rng.integers(len(codes))]))
    for low, high, qmin, qmax in cases:
        _judge_pair(answer, low, high, qmin, qmax)
    x = rng.normal(size=20).astype(np.float32)
    _, their_scale, their_zero = onnx_reference("DynamicQuantizeLinear", x)
    low, high = float(x.min()), float(x.max())
    scale, zero = _judge_pair(answer, low, high, 0, 255)
    steps = -min(low, 0.0) / float(their_scale)
    if abs(steps % 1 - 0.5) > 1e-3 and (
        zero != int(their_zero) or not close(scale, float(their_scale), rel=1e-5)
    ):
        raise Wrong(
            f"for {shown(low, high, 0, 255)} ONNX's DynamicQuantizeLinear has"
            f" {float(their_scale):.6g} and {int(their_zero)}; you have {scale:.6g} and {zero}."
        )


def _judge_pair(answer: Probe, low: float, high: float, qmin: int, qmax: int) -> tuple[float, int]:
    given = f"for {shown(low, high, qmin, qmax)}"
    scale, zero = sequence(answer(low, high, qmin, qmax), given, 2)
    scale = number(scale, f"{given}, the scale")
    what = f"{given}, the zero-point"
    if isinstance(zero, float) or number(zero, what) % 1:
        raise Wrong(f"{what} must be a whole number, of an integer type; you returned {said(zero)}")
    zero = int(number(zero, what))
    if not 0 < scale < math.inf:
        raise Wrong(f"{given} the scale must be a positive number; it is {scale}.")
    if not qmin <= zero <= qmax:
        raise Wrong(f"{what} must be a code between {qmin} and {qmax}; it is {zero}.")
    low, high = min(low, 0.0), max(high, 0.0)
    due = (high - low) / (qmax - qmin)
    if due and not close(scale, due, rel=1e-5):
        yours, right = apart(scale, due)
        raise Wrong(
            f"{given} the widened range from {low:.4g} to {high:.4g} has {qmax - qmin} steps of"
            f" {right}; your scale is {yours}."
        )
    for name, end in (("low", low), ("high", high)):
        code = min(max(round(end / scale) + zero, qmin), qmax)
        back = scale * (code - zero)
        # Both ends, after both roundings: half a step for the zero-point, a little slack for
        # the float.
        if not abs(back - end) <= scale * 0.5001:
            raise Wrong(
                f"{given} the {name} end {end:.4g} comes back as {back:.4g}, off by"
                f" {abs(back - end) / scale:.2f} steps; you returned scale {scale:.4g},"
                f" zero_point {zero}."
            )
    return scale, zero


class _IntegersOnly(TorchDispatchMode):
    """Notices the first operator that makes a floating-point tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor) and (t.is_floating_point() or t.is_complex()):
                raise Wrong(
                    f"a floating-point tensor ({t.dtype}) appeared in"
                    f" {func.__name__.split('.')[0]}: this layer must use integers only."
                )
        return out


def _inputs(
    qx: np.ndarray,
    zx: int,
    qw: np.ndarray,
    zw: list[int],
    bias: list[int],
    scaling: list[tuple[int, int]],
    zy: int,
) -> dict:
    """As the exercise names them; `scaling` holds m0 and shift of each column."""
    return {
        "qx": torch.from_numpy(qx.astype(np.uint8)),
        "zx": zx,
        "qw": torch.from_numpy(qw.astype(np.int8)),
        "zw": torch.tensor(zw, dtype=torch.int32),
        "bias": torch.tensor(bias, dtype=torch.int32),
        "m0": torch.tensor([m for m, _ in scaling]),
        "shift": torch.tensor([s for _, s in scaling]),
        "zy": zy,
    }


def _judge_layer(answer: Probe, given: str, inputs: dict) -> tuple[np.ndarray, np.ndarray]:
    """The accumulators and the codes, equal to what Python's own whole numbers give."""
    with _IntegersOnly():
        acc, y = sequence(answer(**inputs), given, 2)
    n, m = inputs["qx"].shape[0], inputs["qw"].shape[1]
    found = []
    for name, t, dtype in (("accumulator", acc, torch.int32), ("y", y, torch.uint8)):
        t = torch.from_numpy(t) if isinstance(t, np.ndarray) else t
        if not isinstance(t, torch.Tensor) or t.dtype != dtype or tuple(t.shape) != (n, m):
            what = f"{t.dtype}, {tuple(t.shape)}" if isinstance(t, torch.Tensor) else said(t)
            raise Wrong(f"{name} must be {dtype} of shape ({n}, {m}); {given} it is {what}.")
        found.append(t.numpy())
    x, w = inputs["qx"].numpy().astype(np.int64), inputs["qw"].numpy().astype(np.int64)
    sums = (x - inputs["zx"]) @ (w - inputs["zw"].numpy()) + inputs["bias"].numpy()
    if (bad := np.argwhere(found[0] != sums)).size:
        i, j = bad[0]
        raise Wrong(
            f"{given} {len(bad)} of {sums.size} accumulators are wrong: at [{i}, {j}] the sum is"
            f" {sums[i, j]}, yours {found[0][i, j]}."
        )
    for i, j in np.ndindex(n, m):
        m0, shift = int(inputs["m0"][j]), int(inputs["shift"][j])
        code = (int(sums[i, j]) * m0 + (1 << (shift - 1)) >> shift) + inputs["zy"]
        code = min(max(code, 0), 255)
        if int(found[1][i, j]) != code:
            raise Wrong(
                f"{given} y[{i}, {j}] is {code} and yours {found[1][i, j]}: {sums[i, j]} times {m0}"
                f" / 2**{shift} is {sums[i, j] * m0 / 2**shift:.10g}, which is rounded to the"
                f" nearest, a tie upwards; then {inputs['zy']} is added, and 0 … 255 is the limit."
            )
    return found[0], found[1]


_HALF = 2**30
_CODES = [  # a sum, m0 and shift
    (49, _HALF, 31),
    (-49, _HALF, 31),  # −24.5, a tie
    (-51, _HALF, 31),
    (15, _HALF, 35),  # 0.47: whoever rounds to halves first gets 0.5, and then 1
    (-15, _HALF, 35),
    (-8, _HALF, 34),  # −0.5, a tie
    (7, _HALF, 29),  # a multiplier above 1
    (50, 2**31 - 1, 30),
    (-1, _HALF, 62),
    # 137.5 and 145.5, less 1e-14: in fp64 both are ties.
    (1542241403, 1606090843, 54),
    (1524343800, 1719490697, 54),
    (10**6, _HALF, 31),
    (-(10**6), _HALF, 31),
]


@exercise("05.B")
def int8_linear(answer: Probe, rng: np.random.Generator) -> None:
    """Integers only; the accumulators equal ONNX's MatMulInteger, the codes are within 1 of its
    QLinearMatMul.
    """
    text = _inputs(np.array([[130, 120]]), 128, np.array([[3], [-4]]), [1], [5], [(_HALF, 31)], 10)
    _judge_layer(answer, "in the example of the text", text)
    for zy in (100, 0, 255):
        for total, m0, shift in _CODES:
            one = _inputs(np.array([[7]]), 7, np.array([[3]]), [0], [total], [(m0, shift)], zy)
            _judge_layer(answer, f"for a bias of {total} and qx = zx", one)
    for n, k, m in ((1, 1, 1), (5, 3, 2), (1, 4, 3), (4, 1, 2), (17, 64, 9), (3, 4096, 4)):
        _random_layer(answer, rng, n, k, m)


def _random_layer(answer: Probe, rng: np.random.Generator, n: int, k: int, m: int) -> None:
    qx = rng.integers(0, 256, (n, k)).astype(np.uint8)
    qw = rng.integers(-128, 128, (k, m)).astype(np.int8)
    zx, zy = int(rng.integers(0, 256)), int(rng.integers(0, 256))
    zw = rng.integers(-128, 128, m).astype(np.int8)
    if k > 1000:  # nearly constant rows: the sums pass 2**24, where fp32 stops being exact
        qx, qw = np.maximum(qx, 200).astype(np.uint8), np.maximum(qw, 90).astype(np.int8)
        zx, zw = zx % 60, (zw // 8).astype(np.int8)
    exact = (qx.astype(np.int64) - zx) @ (qw.astype(np.int64) - zw)
    spread = max(float(np.abs(exact).max()), 1.0)
    # Products of a scale each; wide enough for some outputs to saturate at both ends.
    sx, sy = np.float32(0.02), np.float32(0.05)
    sw = (rng.uniform(150, 600, m) / spread * sy / sx).astype(np.float32)
    multipliers = sx.astype(float) * sw / sy
    scaling = [_fixed_point(v) for v in multipliers]
    given = (
        f"for random codes of shapes ({n}, {k}) and ({k}, {m}), zx={zx}, zw={zw.tolist()}, zy={zy}"
    )
    plain = _inputs(qx, zx, qw, zw.tolist(), [0] * m, scaling, zy)
    acc, y = _judge_layer(answer, given + ", without bias,", plain)
    reference = onnx_reference("MatMulInteger", qx, qw, np.array(zx, np.uint8), zw)[0]
    codes = onnx_reference(
        "QLinearMatMul",
        *(qx, np.array(sx), np.array(zx, np.uint8)),
        *(qw, sw, zw),
        *(np.array(sy), np.array(zy, np.uint8)),
    )[0]
    # ONNX multiplies in fp32: off by less than a thousandth of a code, and by 1 at a tie.
    apart_by = np.abs(y.astype(int) - codes.astype(int))
    tie = np.abs(exact * multipliers % 1 - 0.5) < 1e-3
    if not np.array_equal(acc, reference) or (apart_by > tie).any():
        raise Wrong(f"{given} ONNX's MatMulInteger or QLinearMatMul has other numbers than yours.")
    some = int(spread) // 2 + 3
    bias = rng.integers(-some, some, m).tolist()
    biased = _inputs(qx, zx, qw, zw.tolist(), bias, scaling, zy)
    _judge_layer(answer, f"{given}, with a bias of {bias},", biased)


def _fixed_point(multiplier: float) -> tuple[int, int]:
    exponent = math.floor(math.log2(multiplier))
    m0 = min(max(round(multiplier / 2.0**exponent * _HALF), _HALF), 2 * _HALF - 1)
    return m0, 30 - exponent


@exercise("05.C")
def choose_clip(answer: Probe, rng: np.random.Generator) -> None:
    """Within 2% of the best error for light and heavy tails, with at most 20 looks at the error."""
    for pair in ([1.0, -2.0], [-1.0, 2.0]):
        x, ones = torch.tensor(pair), torch.ones(2)
        error = _weighted(x, ones, 8)
        # A little less than 2.0 can be a little better, and that is no use to anyone.
        _judge_clip(answer, str(pair), x, 8, ones, lambda c, e=error: e(c) <= 10 * e(2.0))
    _judge_clip(answer, "50 zeros", torch.zeros(50), 8, torch.ones(50), lambda clip: True)
    n = 5000
    # Equal distances: of twenty even steps or ratios none is within 3% of the best.
    even = rng.permutation(np.linspace(-1, 1, n))
    # One draw in a million is beyond 50, and would leave the best clip outside every search.
    tail = rng.standard_t(4, n).clip(-50, 50)
    lopsided = np.where(tail > 0, tail / 3, tail)
    cases = [  # name, values, bits, and how the weight grows with the size
        ("uniform numbers", even, 5, 0.0),
        ("uniform numbers", even * 7, 6, 0.0),
        ("normal numbers", rng.normal(size=n), 3, -0.5),
        ("normal numbers", rng.normal(size=n), 4, 1.0),
        ("Laplace numbers", rng.laplace(size=n) * rng.uniform(0.01, 100), 4, -0.5),
        ("Laplace numbers", rng.laplace(size=n), 5, 0.7),
        ("Student's t, 4 degrees of freedom,", tail, int(rng.integers(3, 6)), 0.5),
        ("Student's t, its lower tail longer,", lopsided, 4, -0.4),
    ]
    for name, values, bits, power in cases:
        x = torch.from_numpy(values.astype(np.float32))
        size = x.abs() / x.abs().mean()
        weights = size.clamp_min(1e-3) ** power
        error = _weighted(x, weights / weights.mean(), bits)
        _judge_clip(answer, name, x, bits, weights / weights.mean(), _near_best(x, error))


def _judge_clip(
    answer: Probe,
    name: str,
    x: torch.Tensor,
    bits: int,
    weights: torch.Tensor,
    good: Callable[[float], object],
) -> None:
    error, calls = _weighted(x, weights, bits), 0

    def counted(clip: float) -> float:
        nonlocal calls
        calls += 1
        return error(number(clip, "the clip that you gave to error"))

    # The function itself counts: Probe hands over copies, and a copied function is the same
    # function.
    clip = answer(x, bits, counted)
    given = f"for {name} in {bits} bits"
    if calls > 20:
        raise Wrong(f"{given} error was called {calls} times; the budget is 20.")
    clip = number(clip, given)
    if not 0 < clip < math.inf:
        raise Wrong(f"{given} a positive number was expected; you returned {clip}.")
    if (best := good(clip)) is not True:
        more = f"; {best:.4g} would have {error(best):.3g}" if best else ""
        raise Wrong(
            f"{given} your clip {clip:.4g} has the error {error(clip):.3g}{more}. The largest size"
            f" is {float(x.abs().max()):.4g}."
        )


def _near_best(x: torch.Tensor, error: Callable[[float], float]) -> Callable[[float], object]:
    """True for a clip within 2% of the best error; else the best clip."""
    top = float(x.abs().max())
    coarse = np.geomspace(top / 60, top * 1.02, 60)
    k = int(np.argmin([error(c) for c in coarse]))
    fine = np.linspace(coarse[max(k - 1, 0)], coarse[min(k + 1, 59)], 40)
    best = float(min([*coarse, *fine], key=error))
    least = error(best)
    return lambda clip: error(clip) <= 1.02 * least or best


def _weighted(x: torch.Tensor, weights: torch.Tensor, bits: int) -> Callable[[float], float]:
    """The mean squared error of the round trip, each value times its weight."""
    top = 2 ** (bits - 1) - 1

    def error(clip: float) -> float:
        clip = float(clip)
        if not 0 < clip < math.inf:
            raise ValueError(f"error(clip) needs a positive clip, not {clip}.")
        scale = clip / top
        back = (x / scale).round().clamp(-top, top) * scale
        return float(((back - x).square() * weights).mean())

    return error
