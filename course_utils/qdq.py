"""Q/DQ pairs in an ONNX graph: where they stand, and what two builders for a CPU make of them.

A pair is a QuantizeLinear node, which writes a tensor as 8-bit integers, and a DequantizeLinear
node, which reads it back. All of it needs the packages onnx and onnxruntime.
"""

import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from course_utils import measure

if TYPE_CHECKING:
    import onnx
    import openvino


def values(model: "onnx.ModelProto", feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a graph and return every tensor that a node makes, by name, and the inputs.

    >>> net = _example()
    >>> sorted(values(net, {"x": np.ones((2, 3), np.float32)}))
    ['a', 'x', 'y']
    """
    import onnx

    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    known = {o.name for o in wide.graph.output}
    made = [o for node in wide.graph.node for o in node.output if o not in known]
    wide.graph.output.extend(onnx.ValueInfoProto(name=o) for o in made)  # the type is inferred
    session = measure.onnx_session(wide.SerializeToString())
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(feed)), strict=True)) | dict(feed)


def weights(model: "onnx.ModelProto") -> dict[str, np.ndarray]:
    """The constants of a graph by name.

    >>> weights(_example())["w"].shape
    (4, 3)
    """
    from onnx import numpy_helper

    return {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}


def insert_pairs(
    model: "onnx.ModelProto",
    tensors: Collection[str],
    amax: Mapping[str, float],
    unsigned: Collection[str] = (),
) -> "onnx.ModelProto":
    """A copy of the graph with a Q/DQ pair on each of `tensors`, which every reader then reads.

    Symmetric, as TensorRT wants it: zero-point 0 and int8. A weight gets one scale for each output
    channel (its first axis), another tensor the scale of its largest magnitude `amax[name]`. Those
    in `unsigned` get uint8. Raises KeyError for a tensor that is neither a weight nor in `amax`.

    >>> paired(insert_pairs(_example(), ["x", "w"], {"x": 2.0}))
    ['w', 'x']
    """
    import onnx
    from onnx import numpy_helper

    out = onnx.ModelProto()
    out.CopyFrom(model)
    constants, pairs = weights(model), {}
    for name in tensors:
        pairs[name], stored = _pair(name, constants.get(name), amax, name in unsigned)
        out.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in stored.items())
    made = {o for node in model.graph.node for o in node.output}
    ordered = [node for name in pairs if name not in made for node in pairs[name]]
    for node in out.graph.node:
        node.input[:] = [f"{name}.dq" if name in pairs else name for name in node.input]
        ordered += [node, *(half for o in node.output for half in pairs.get(o, []))]
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
    del out.graph.node[:]
    out.graph.node.extend(nodes)
    return out


def _pair(
    name: str, weight: np.ndarray | None, amax: Mapping[str, float], unsigned: bool
) -> tuple[list["onnx.NodeProto"], dict[str, np.ndarray]]:
    """The two nodes on tensor `name`, and their scale and zero-point by name."""
    from onnx import helper

    kind = np.dtype(np.uint8 if unsigned else np.int8)
    axis = {} if weight is None else {"axis": 0}
    if weight is None:
        largest = np.array(amax[name])
    else:
        largest = np.abs(weight).reshape(len(weight), -1).max(1)  # (output channels,)
    scale = np.maximum(largest / np.iinfo(kind).max, 1e-9).astype(np.float32)
    ends = [f"{name}.scale", f"{name}.zero"]
    nodes = [
        helper.make_node("QuantizeLinear", [name, *ends], [f"{name}.q"], **axis),
        helper.make_node("DequantizeLinear", [f"{name}.q", *ends], [f"{name}.dq"], **axis),
    ]
    return nodes, dict(zip(ends, (scale, np.zeros(scale.shape, kind)), strict=True))


def paired(model: "onnx.ModelProto") -> list[str]:
    """Tensors that a QuantizeLinear node reads, sorted.

    >>> paired(_example())
    []
    """
    return sorted(n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear")


def onnxruntime_integers(model: "onnx.ModelProto") -> int:
    """Integer convolutions in the graph that ONNX Runtime executes for the file.

    >>> onnxruntime_integers(_example())
    0
    """
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        options.log_severity_level = 3  # it warns that the saved file fits this machine alone
        onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        nodes = onnx.load(options.optimized_model_filepath).graph.node
    return Counter(n.op_type for n in nodes)["QLinearConv"]


def openvino_compiled(model: "onnx.ModelProto", threads: int) -> "openvino.CompiledModel":
    """The file compiled by OpenVINO for the CPU, its floats in fp32, on `threads` threads. Needs
    the package openvino.

    >>> x = np.ones((2, 3), np.float32)
    >>> openvino_compiled(_example(), 1)({"x": x})[0].shape  # doctest: +SKIP
    (2, 4)
    """
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    return core.compile_model(core.read_model(model.SerializeToString()), "CPU", settings)


def openvino_integers(compiled: "openvino.CompiledModel") -> int:
    """Convolutions that a model compiled by OpenVINO executes on 8-bit integers.

    >>> openvino_integers(openvino_compiled(_example(), 1))  # doctest: +SKIP
    0
    """
    found = 0
    for op in compiled.get_runtime_model().get_ops():
        info = {key: _text(value) for key, value in op.get_rt_info().items()}
        eight = info.get("runtimePrecision") in ("u8", "i8")
        found += info.get("layerType") == "Convolution" and eight
    return found


def _text(value: object) -> str:
    return str(value.astype(str)) if hasattr(value, "astype") else str(value)


def _example() -> "onnx.ModelProto":
    """One matrix product and a ReLU: (n, 3) → (n, 4)."""
    import onnx
    from onnx import helper, numpy_helper

    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", size])
        for name, size in (("x", 3), ("y", 4))
    ]
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["a"], name="product", transB=1),
        helper.make_node("Relu", ["a"], ["y"], name="relu"),
    ]
    stored = [numpy_helper.from_array(np.ones((4, 3), np.float32), "w")]
    graph = helper.make_graph(nodes, "example", ends[:1], ends[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
