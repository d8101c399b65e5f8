"""An executor that computes each node of an ONNX file in the types that the file says, on a CPU.

ONNX Runtime's CPU provider has no fp16 convolution: it casts to fp32, computes there and casts
back, so a file in fp16 gives answers that no fp16 unit would give. A strongly typed TensorRT engine
computes what the file says. This module does so with torch, whose products of half numbers are
summed in fp32 and rounded to half once, as Tensor Cores do with fp32 sums. It knows the operators
of this course's residual network and refuses others.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    import onnx


def run(model: "onnx.ModelProto", feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of the graph by name, each in the type in which it was computed.

    Nodes whose floating-point inputs differ in type are refused, as TensorRT refuses them under
    strong typing. Raises NotImplementedError for an operator it does not know, TypeError for mixed
    types.

    >>> from course_utils import qdq
    >>> from onnxconverter_common import float16
    >>> half = float16.convert_float_to_float16(qdq._example())
    >>> run(half, {"x": torch.ones(2, 3).half()})["y"].dtype
    torch.float16
    """
    from onnx import numpy_helper

    here = {
        i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in model.graph.initializer
    }
    here |= dict(feed)
    with torch.inference_mode():
        for node in model.graph.node:
            given = [here[name] for name in node.input]
            floats = {x.dtype for x in given if x.is_floating_point()}
            if len(floats) > 1:
                raise TypeError(f"{node.op_type} {node.name} reads {sorted(map(str, floats))}.")
            here[node.output[0]] = _compute(node, given)
    return here


def _compute(node: "onnx.NodeProto", given: list[Tensor]) -> Tensor:
    from onnx import helper

    said = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    match node.op_type:
        case "Conv":
            side, stride = said.get("pads", [0])[0], said.get("strides", [1])[0]
            return F.conv2d(*given, stride=stride, padding=side, groups=said.get("group", 1))
        case "Gemm":
            weight = given[1].T if said.get("transB") else given[1]
            return given[0] @ weight + (given[2] if len(given) > 2 else 0)
        case "Relu":
            return given[0].relu()
        case "Add":
            return given[0] + given[1]
        case "ReduceMean":
            return given[0].mean(given[1].tolist(), keepdim=bool(said.get("keepdims", 1)))
        case "Reshape":
            return given[0].reshape(given[1].tolist())
        case "Cast":
            return given[0].to({1: torch.float32, 10: torch.float16}[said["to"]])
    raise NotImplementedError(f"{node.op_type} {node.name}: this executor does not know it.")
