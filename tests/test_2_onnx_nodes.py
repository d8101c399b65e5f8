"""The node cases that ship in the `onnx` package, run through the functions of chapter 05.

Adapted as a reader would: signed inputs, weights and outputs are moved by 128 to the codes that
`requantize` gives, a scale an axis gets the shape that broadcasts, a convolution becomes a matrix
product of its patches.
"""

import warnings

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from conftest import taught
from onnx import numpy_helper

OPERATORS = (
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "MatMulInteger",
    "QLinearMatMul",
    "QLinearConv",
    "ConvInteger",
)
RANGES = {"uint8": (0, 255), "int8": (-128, 127), "uint16": (0, 65535), "int16": (-32768, 32767)}
RANGES |= {"uint4": (0, 15), "int4": (-8, 7), "uint2": (0, 3), "int2": (-2, 1)}
FLOATS = {"float8_e4m3fn": (4, 3, 448.0), "float8_e5m2": (5, 2, 57344.0)}
FLOATS |= {"float4_e2m1fn": (2, 1, 6.0)}


def cases():
    from onnx.backend.test.case import node

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other operators' cases overflow on purpose
        found = {c.name: c for c in node.collect_testcases(None)}
    chosen = [c for c in found.values() if "expanded" not in c.name]
    return [c for c in chosen if c.model.graph.node[0].op_type in OPERATORS]


CASES = cases()
ch05 = taught("05")


def array(value):
    return (
        numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)
    )


def tensor(value):
    """Any of the types as int64 or float32: the functions take numbers, not types."""
    a = array(value)
    return torch.from_numpy(a.astype(np.float32 if a.dtype.kind in "fV" else np.int64))


def along(scale, x, attributes):
    """A scale or zero-point in the shape that broadcasts against x."""
    if scale.ndim == 0 or scale.shape == x.shape:
        return scale
    axis = attributes.get("axis", 1) % x.ndim
    if block := attributes.get("block_size", 0):
        return scale.repeat_interleave(block, axis)
    return scale.reshape([-1 if i == axis else 1 for i in range(x.ndim)])


def judged(case):
    """(ours, theirs) as arrays."""
    node, (inputs, outputs) = case.model.graph.node[0], case.data_sets[0]
    given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    theirs = array(outputs[0])
    ours = globals()[f"_{node.op_type.lower()}"](inputs, given, theirs)
    return np.asarray(ours).astype(np.float64), theirs.astype(np.float64)


def _quantizelinear(inputs, given, theirs):
    x, scale = tensor(inputs[0]), along(tensor(inputs[1]), tensor(inputs[0]), given)
    kind = theirs.dtype.name
    if kind in FLOATS:
        return ch05.to_float(x / scale, *FLOATS[kind])
    zero = along(tensor(inputs[2]), x, given) if len(inputs) > 2 else 0
    return ch05.quantize(x, scale, zero, *RANGES[kind])


def _dequantizelinear(inputs, given, theirs):
    x, scale = tensor(inputs[0]), tensor(inputs[1])
    zero = along(tensor(inputs[2]), x, given) if len(inputs) > 2 else 0
    return ch05.dequantize(x, along(scale, x, given), zero).numpy().astype(theirs.dtype)


def _dynamicquantizelinear(inputs, given, theirs):
    x = tensor(inputs[0])
    scale, zero, low, high = ch05.affine_grid(x.reshape(1, -1), 8)
    return ch05.quantize(x, scale.reshape(()), zero.reshape(()), low, high)


def _matmulinteger(inputs, given, theirs):
    a, b, za, zb = map(tensor, inputs)
    return (a - za) @ (b - zb)


def _requantized(sums, multiplier, zero, kind):
    moved = 128 if kind == "int8" else 0
    return ch05.requantize(sums, *ch05.fixed_point(multiplier), zero + moved).int() - moved


def _qlinearmatmul(inputs, given, theirs):
    a, sa, za, b, sb, zb, sy, zy = map(tensor, inputs)
    multiplier = float(sa) * float(sb) / float(sy)
    return _requantized((a - za) @ (b - zb), multiplier, int(zy), theirs.dtype.name)


def _convolved(x, w, given):
    """Sums of a convolution as a product of patches; x is padded with its own zero already."""
    pads, (_, _, *kernel) = given.get("pads", [0, 0, 0, 0]), w.shape
    x = F.pad(x.double(), (pads[1], pads[3], pads[0], pads[2]))
    patches = F.unfold(x, kernel)  # (N, C·k·k, places)
    size = [n - k + 1 for n, k in zip(x.shape[2:], kernel, strict=True)]
    return (w.double().flatten(1) @ patches).long().reshape(len(x), len(w), *size)


def _convinteger(inputs, given, theirs):
    x, w, zx, *zw = map(tensor, inputs)
    zw = zw[0].reshape(-1, 1, 1, 1) if zw else 0
    return _convolved(x - zx, w - zw, given)


def _qlinearconv(inputs, given, theirs):
    x, sx, zx, w, sw, zw, sy, zy = map(tensor, inputs)
    sums = _convolved(x - zx, w - zw.reshape(-1, 1, 1, 1), given)
    return _requantized(sums, float(sx) * float(sw) / float(sy), int(zy), theirs.dtype.name)


@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_bit_equal_to_the_standard(case):
    ours, theirs = judged(case)
    assert ours.shape == theirs.shape
    assert np.array_equal(ours, theirs)


def test_all_operators_have_cases():
    """42 cases in onnx 1.19; a package that ships none would prove nothing."""
    found = {c.model.graph.node[0].op_type for c in CASES}
    assert found == set(OPERATORS)
    assert len(CASES) >= 42
