"""What the builder made of a network, read from the inspector's JSON."""

import json
import re
from dataclasses import dataclass

from course_utils.trt.errors import TrtError

_TYPES = {
    "INT8": "int8",
    "FP8": "fp8",
    "BF16": "bf16",
    "BFLOAT16": "bf16",
    "FP16": "fp16",
    "HALF": "fp16",
    "FP32": "fp32",
    "FLOAT": "fp32",
    "INT32": "int32",
    "INT64": "int64",
    "FP4": "fp4",
    "INT4": "int4",
    "UINT8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class Tensor:
    """A tensor between two layers: its name and the type in which it is stored.

    >>> Tensor("image", "int8").dtype
    'int8'
    """

    name: str
    dtype: str


@dataclass(frozen=True)
class Layer:
    """One step of an engine: its kernel, the tensors it reads and writes, and the ONNX nodes that
    went into it (none in a step that the builder added, such as a change of layout).

    >>> image, t1 = Tensor("image", "int8"), Tensor("t1", "fp16")
    >>> Layer("conv1 + relu1", "Convolution", (image,), (t1,), "", ("conv1", "relu1")).nodes
    ('conv1', 'relu1')
    """

    name: str
    kind: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    tactic: str
    nodes: tuple[str, ...]


def layers(text: str) -> list[Layer]:
    """The layers in an inspector's JSON, of TensorRT 10 or 11.

    TensorRT 10 tells format and type of a tensor under one key, `Format/Datatype`; 11 splits them.
    Types come out in small letters: fp32, fp16, bf16, fp8, int8 and so on, "unknown" for another.
    Raises TrtError for text that is no such JSON, and where the engine kept its layers' names only.

    >>> half = {"Name": "a", "Format/Datatype": "Row major FP16 format"}
    >>> said = {"Name": "fc", "LayerType": "gemm", "Inputs": [half], "Outputs": [half]}
    >>> [layer.inputs for layer in layers(json.dumps({"Layers": [said]}))]
    [(Tensor(name='a', dtype='fp16'),)]
    """
    try:
        found = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise TrtError(f"this is no engine inspector's JSON ({error!r}): {text[:60]!r}") from error
    if any(isinstance(layer, str) for layer in found):
        raise TrtError(
            "the engine was built with layer names alone; set profiling_verbosity to DETAILED and"
            " build again."
        )
    return [
        Layer(
            f["Name"],
            f.get("LayerType", ""),
            _tensors(f.get("Inputs", [])),
            _tensors(f.get("Outputs", [])),
            f.get("TacticName", ""),
            tuple(re.findall(r"\[ONNX Layer: ([^\]]+)\]", f.get("Metadata", ""))),
        )
        for f in found
    ]


def _tensors(said: list[dict]) -> tuple[Tensor, ...]:
    found = []
    for t in said:
        keys = ("Format/Datatype", "Datatype", "DataType")
        words = re.findall(r"\w+", " ".join(str(t.get(key, "")) for key in keys).upper())
        dtype = next((_TYPES[word] for word in words if word in _TYPES), "unknown")
        found.append(Tensor(t.get("Name", ""), dtype))
    return tuple(found)
