"""Checks of chapter 05, quantization math."""

import math

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from course_utils.exercises import Probe, Wrong, exercise, shown


def onnx_reference(operator: str, *inputs: np.ndarray) -> list[np.ndarray]:
    """One ONNX operator in ONNX's own reference implementation."""
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    names = [f"input{i}" for i in range(len(inputs))]
    outputs = ["y", "y_scale", "y_zero_point"] if operator == "DynamicQuantizeLinear" else ["y"]
    values = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in zip(names, inputs, strict=True)
    ]
    results = [helper.make_tensor_value_info(n, 1, None) for n in outputs]
    graph = helper.make_graph(
        [helper.make_node(operator, names, outputs)], operator, values, results
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ReferenceEvaluator(model).run(None, dict(zip(names, inputs, strict=True)))


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
    ]
    codes = [(0, 255), (-128, 127), (-8, 7), (0, 15), (-127, 127)]
    for _ in range(60):
        ends = np.sort(rng.normal(scale=10 ** rng.uniform(-3, 3), size=2))
        cases.append((float(ends[0]), float(ends[1]), *codes[rng.integers(len(codes))]))
    for low, high, qmin, qmax in cases:
        given = f"for {shown(low, high, qmin, qmax)}"
        scale, zero = _pair(answer(low, high, qmin, qmax), given)
        if isinstance(zero, bool) or not isinstance(zero, int):
            raise Wrong(
                f"zero_point must be an int, a code; {given} it is {zero!r}"
                f" ({type(zero).__name__})."
            )
        if not (isinstance(scale, float) and math.isfinite(scale) and scale > 0):
            raise Wrong(f"scale must be a positive float; {given} it is {scale!r}.")
        if not qmin <= zero <= qmax:
            raise Wrong(
                f"zero_point must be a code between {qmin} and {qmax}; {given} it is {zero}."
            )
        for name, end in (("low", min(low, 0.0)), ("high", max(high, 0.0))):
            back = scale * (min(max(round(end / scale) + zero, qmin), qmax) - zero)
            # Both ends, after both roundings: half a step for the zero-point, a little slack for
            # the float.
            if abs(back - end) > scale * 0.5001:
                raise Wrong(
                    f"{given} the {name} end {end:.4g} comes back as {back:.4g}, off by"
                    f" {abs(back - end) / scale:.2f} steps; you returned scale {scale:.4g},"
                    f" zero_point {zero}."
                )
    x = rng.normal(size=20).astype(np.float32)
    _, their_scale, their_zero = onnx_reference("DynamicQuantizeLinear", x)
    low, high = float(x.min()), float(x.max())
    scale, zero = answer(low, high, 0, 255)
    steps = -min(low, 0.0) / float(their_scale)
    if abs(steps % 1 - 0.5) > 1e-3 and (
        zero != int(their_zero) or not math.isclose(scale, float(their_scale), rel_tol=1e-5)
    ):
        raise Wrong(
            f"for {shown(low, high, 0, 255)} ONNX's DynamicQuantizeLinear has"
            f" {float(their_scale):.6g} and {int(their_zero)}; you have {scale:.6g} and {zero}."
        )


def _pair(value: object, given: str) -> tuple:
    if not (isinstance(value, tuple | list) and len(value) == 2):
        raise Wrong(
            f"two things were expected, as a tuple; {given} your function returned {shown(value)}."
        )
    return tuple(value)


class _IntegersOnly(TorchDispatchMode):
    """Notices the first operator that makes a floating-point tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                raise Wrong(
                    f"a floating-point tensor ({t.dtype}) appeared in"
                    f" {func.__name__.split('.')[0]}: this layer must use integers only."
                )
        return out


def _fixed_point(multipliers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    exponent = np.floor(np.log2(multipliers)).astype(np.int64)
    m0 = np.clip(np.rint(multipliers / 2.0**exponent * 2**30), 2**30, 2**31 - 1).astype(np.int64)
    return torch.from_numpy(m0), torch.from_numpy(30 - exponent)


def _layer(answer: Probe, given: str, **inputs) -> tuple[torch.Tensor, torch.Tensor]:
    with _IntegersOnly():
        acc, y = _pair(answer(**inputs), given)
    n, m = inputs["qx"].shape[0], inputs["qw"].shape[1]
    for name, t, dtype in (("accumulator", acc, torch.int32), ("y", y, torch.uint8)):
        if not isinstance(t, torch.Tensor) or t.dtype != dtype or t.shape != (n, m):
            what = (
                f"{t.dtype}, {tuple(t.shape)}" if isinstance(t, torch.Tensor) else type(t).__name__
            )
            raise Wrong(f"{name} must be {dtype} of shape ({n}, {m}); {given} it is {what}.")
    return acc, y


@exercise("05.B")
def int8_linear(answer: Probe, rng: np.random.Generator) -> None:
    """Integers only; the accumulators equal ONNX's MatMulInteger, the codes are within 1 of its
    QLinearMatMul.
    """
    t = torch.tensor
    small = {
        "qx": t([[130, 120]], dtype=torch.uint8),
        "zx": 128,
        "qw": t([[3], [-4]], dtype=torch.int8),
        "zw": t([1], dtype=torch.int32),
        "bias": t([5], dtype=torch.int32),
        "m0": t([2**30]),
        "shift": t([31]),
        "zy": 10,
    }
    acc, y = _layer(answer, "in the example of the text", **small)
    if int(acc) != 49:
        raise Wrong(f"in the example of the text the accumulator is 49; yours is {int(acc)}.")
    if int(y) != 35:
        raise Wrong(
            "in the example of the text y is 35 (49 / 2 = 24.5, rounded up, plus 10); yours is"
            f" {int(y)}."
        )
    for n, k, m in ((1, 1, 1), (5, 3, 2), (17, 64, 9), (3, 4096, 4)):
        _random_layer(answer, rng, n, k, m)


def _random_layer(answer: Probe, rng: np.random.Generator, n: int, k: int, m: int) -> None:
    qx = rng.integers(0, 256, (n, k)).astype(np.uint8)
    qw = rng.integers(-128, 128, (k, m)).astype(np.int8)
    if k > 1000:  # nearly constant rows: the sums pass 2**24, where fp32 stops being exact
        qx, qw = np.maximum(qx, 200).astype(np.uint8), np.maximum(qw, 90).astype(np.int8)
    zx, zy = int(rng.integers(0, 60)), int(rng.integers(1, 255))
    zw = rng.integers(-20, 20, m).astype(np.int8)
    exact = (qx.astype(np.int64) - zx) @ (qw.astype(np.int64) - zw)
    spread = max(float(np.abs(exact).max()), 1.0)
    # Products of a scale each; wide enough for some outputs to saturate at both ends.
    sx, sy = np.float32(0.02), np.float32(0.05)
    sw = (rng.uniform(150, 600, m) / spread * sy / sx).astype(np.float32)
    m0, shift = _fixed_point(sx.astype(float) * sw / sy)
    given = (
        f"for random codes of shapes ({n}, {k}) and ({k}, {m}), zx={zx}, zw={zw.tolist()}, zy={zy}"
    )
    common = {
        "qx": torch.from_numpy(qx),
        "zx": zx,
        "qw": torch.from_numpy(qw),
        "zw": torch.from_numpy(zw.astype(np.int32)),
        "m0": m0,
        "shift": shift,
        "zy": zy,
    }

    acc, y = _layer(answer, given, bias=torch.zeros(m, dtype=torch.int32), **common)
    reference = onnx_reference("MatMulInteger", qx, qw, np.array(zx, np.uint8), zw)[0]
    if (bad := np.argwhere(acc.numpy() != reference)).size:
        i, j = bad[0]
        raise Wrong(
            f"{given} {len(bad)} of {acc.numel()} accumulators differ from ONNX's MatMulInteger: "
            f"at [{i}, {j}] it has {reference[i, j]}, you have {int(acc[i, j])}."
        )
    theirs = onnx_reference(
        "QLinearMatMul",
        qx,
        np.array(sx),
        np.array(zx, np.uint8),
        qw,
        sw,
        zw,
        np.array(sy),
        np.array(zy, np.uint8),
    )[0]
    # The exact values; ONNX multiplies in fp32, which is off by less than a thousandth of a code.
    values = exact * (sx.astype(float) * sw / sy)
    tie = np.abs(values % 1 - 0.5) < 1e-3
    _codes(y.numpy(), theirs, given + ", without bias,", "QLinearMatMul", tie)

    bias = rng.integers(-int(spread) // 2 - 3, int(spread) // 2 + 3, m).astype(np.int32)
    acc, y = _layer(answer, given, bias=torch.from_numpy(bias), **common)
    if not np.array_equal(acc.numpy(), reference + bias):
        raise Wrong(
            f"{given} a bias of {bias.tolist()} must be added to the accumulators; that is not what"
            " came out."
        )
    wide = (reference + bias).astype(object) * m0.numpy().astype(
        object
    )  # Python's integers: no overflow
    halves = np.array([1 << (int(s) - 1) for s in shift], dtype=object)
    exact_codes = np.vectorize(lambda v: min(max(v, 0), 255), otypes=[np.int64])(
        (wide + halves) // (2 * halves) + zy
    )
    _codes(y.numpy(), exact_codes, given + ", with a bias,", "exact rounding")


def _codes(
    ours: np.ndarray,
    theirs: np.ndarray,
    given: str,
    judge: str,
    tie: np.ndarray | bool = False,
) -> None:
    """Equal codes; where `tie` says so, one more or less is right as well."""
    apart = np.abs(ours.astype(int) - theirs.astype(int))
    bad = np.argwhere(apart > np.where(tie, 1, 0))
    if not bad.size:
        return
    i, j = bad[0]
    alike = " All are one off at most: do you round to the nearest?" if apart.max() == 1 else ""
    raise Wrong(
        f"{given} {len(bad)} of {apart.size} codes differ from {judge}: y[{i}, {j}] is"
        f" {ours[i, j]} and {judge} gives {theirs[i, j]}.{alike}"
    )


@exercise("05.C")
def choose_clip(answer: Probe, rng: np.random.Generator) -> None:
    """Within 5% of the best squared error for light and heavy tails, with at most 40 looks at the
    error.
    """
    n = 20_000
    # One draw in a million is beyond 50, and would leave the best clip outside every search.
    tail = rng.standard_t(4, n).clip(-50, 50)
    tails = [
        ("all zeros", np.zeros(50), 8),
        ("uniform numbers", rng.uniform(-1, 1, n), int(rng.integers(3, 9))),
        ("normal numbers", rng.normal(size=n), 3),
        ("normal numbers", rng.normal(size=n), 8),
        ("Laplace numbers", rng.laplace(size=n) * rng.uniform(0.01, 100), int(rng.integers(3, 7))),
        ("Student's t, 4 degrees of freedom,", tail, int(rng.integers(3, 7))),
    ]
    for name, values, bits in tails:
        x = torch.from_numpy(values.astype(np.float32))
        calls = 0

        def error(clip: float, x: torch.Tensor = x, bits: int = bits) -> float:
            return _squared_error(x, float(clip), bits)

        def counted(clip: float, error=error) -> float:
            nonlocal calls
            calls += 1
            return error(clip)

        # The function itself counts: Probe hands over copies, and a copied function is the same
        # function.
        clip = answer(x, bits, counted)
        given = f"for {name} in {bits} bits"
        if calls > 40:
            raise Wrong(f"{given} error was called {calls} times; the budget is 40.")
        if (
            isinstance(clip, bool)
            or not isinstance(clip, int | float)
            or not math.isfinite(clip)
            or clip <= 0
        ):
            raise Wrong(f"{given} a positive float was expected; you returned {shown(clip)}.")
        top = float(x.abs().max())
        if top == 0:
            continue
        best_clip = min(np.geomspace(top / 100, top * 1.02, 240), key=error)
        if error(clip) > 1.05 * error(best_clip):
            raise Wrong(
                f"{given} your clip {clip:.4g} has the squared error {error(clip):.3g}; "
                f"{best_clip:.4g} would have {error(best_clip):.3g}. "
                f"The largest size is {top:.4g}."
            )


def _squared_error(x: torch.Tensor, clip: float, bits: int) -> float:
    if not (math.isfinite(clip) and clip > 0):
        raise ValueError(f"error(clip) needs a positive clip, not {clip}.")
    top = 2 ** (bits - 1) - 1
    scale = clip / top
    return float(((x / scale).round().clamp(-top, top) * scale - x).square().mean())
