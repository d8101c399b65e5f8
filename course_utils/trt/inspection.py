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
    "BOOL": "bool",
}


@dataclass(frozen=True)
class Layer:
    """One step of an engine: its kernel, the types it reads and writes, the ONNX nodes that went
    into it.

    >>> Layer("conv1 + relu1", "Convolution", ("int8",), ("fp16",), "", ("conv1", "relu1")).nodes
    ('conv1', 'relu1')
    """

    name: str
    kind: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    tactic: str
    nodes: tuple[str, ...]


def layers(text: str) -> list[Layer]:
    """The layers in an inspector's JSON, of TensorRT 10 or 11. Raises TrtError where only names
    were kept.

    >>> half = {"Format/Datatype": "Row major FP16 format"}
    >>> said = {"Name": "fc", "LayerType": "gemm", "Inputs": [half], "Outputs": [half]}
    >>> [(layer.name, layer.reads) for layer in layers(json.dumps({"Layers": [said]}))]
    [('fc', ('fp16',))]
    """
    found = json.loads(text)["Layers"]
    if any(isinstance(layer, str) for layer in found):
        raise TrtError(
            "the engine was built with layer names alone; set profiling_verbosity to DETAILED and"
            " build again."
        )

    def types(tensors: list[dict]) -> tuple[str, ...]:
        words = [
            f"{t.get('Format/Datatype', '')} {t.get('Datatype', t.get('DataType', ''))}".upper()
            for t in tensors
        ]
        return tuple(
            next((_TYPES[w] for w in re.findall(r"\w+", text) if w in _TYPES), "unknown")
            for text in words
        )

    return [
        Layer(
            f["Name"],
            f.get("LayerType", ""),
            types(f.get("Inputs", [])),
            types(f.get("Outputs", [])),
            f.get("TacticName", ""),
            tuple(re.findall(r"\[ONNX Layer: ([^\]]+)\]", f.get("Metadata", ""))),
        )
        for f in found
    ]
