"""What chapter 06 needs around ONNX Runtime's quantizer: a file out, INT8 files, a look inside.

Read `to_int8` once; the rest is plumbing. All of it needs the package onnxruntime.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from course_utils import measure


def export(
    model: nn.Module, example: tuple[Tensor, ...], path: Path, inputs: Sequence[str] = ("x",)
) -> None:
    """Write `model` as ONNX to `path`. The first dimension of every input is free; its example must
    be 2 or larger there.

    >>> export(nn.Conv2d(1, 2, 3).eval(), (torch.zeros(2, 1, 8, 8),), Path("net.onnx"))
    >>> Path("net.onnx").stat().st_size > 100
    True
    """
    free = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    torch.onnx.export(
        model,
        example,
        path,
        input_names=list(inputs),
        dynamic_shapes=free,
        external_data=False,
        verbose=False,
    )
    measure.release()


class Batches:
    """What ONNX Runtime's calibration asks for its next batch, of one input named x.

    >>> Batches([torch.zeros(2, 3)]).get_next()["x"].shape
    (2, 3)
    """

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self.batches = iter(batches)

    def get_next(self) -> dict | None:
        batch = next(self.batches, None)
        return None if batch is None else {"x": batch.numpy()}


def to_int8(
    source: Path,
    target: Path,
    batches: Iterable[Tensor],
    *,
    activations: str = "QUInt8",
    per_channel: bool = True,
) -> None:
    """Static quantization: fold and infer shapes, calibrate on `batches` (min–max), write Q/DQ
    pairs. Weights are signed, `activations` "QUInt8" or "QInt8". Raises KeyError for another.

    >>> x = torch.randn(8, 1, 8, 8)
    >>> export(nn.Conv2d(1, 2, 3).eval(), (x,), Path("net.onnx"))
    >>> to_int8(Path("net.onnx"), Path("int8.onnx"), x.split(4))
    >>> look_inside(Path("int8.onnx"), x)[0]["QLinearConv"]
    1
    """
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    kind = QuantType[activations]
    with tempfile.TemporaryDirectory() as folder:
        clean = Path(folder) / "clean.onnx"
        quant_pre_process(source, clean)
        quantize_static(
            clean,
            target,
            Batches(batches),
            per_channel=per_channel,
            activation_type=kind,
            weight_type=QuantType.QInt8,
        )
    measure.release()  # give back what the graph tools needed


def to_dynamic_int8(source: Path, target: Path) -> None:
    """Dynamic quantization: 8-bit weights, no calibration; ranges are found while it runs.

    Matrix products get signed weights with a scale for each channel. ONNX Runtime's integer
    convolution takes unsigned ones on x86.

    >>> x = torch.randn(8, 1, 8, 8)
    >>> export(nn.Conv2d(1, 2, 3).eval(), (x,), Path("net.onnx"))
    >>> to_dynamic_int8(Path("net.onnx"), Path("dynamic.onnx"))
    >>> look_inside(Path("dynamic.onnx"), x)[0]["ConvInteger"]
    1
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    found = {node.op_type for node in onnx.load(source, load_external_data=False).graph.node}
    kind = QuantType.QUInt8 if "Conv" in found else QuantType.QInt8
    quantize_dynamic(source, target, weight_type=kind, per_channel=kind is QuantType.QInt8)
    measure.release()


def look_inside(
    path: Path, x: Tensor, threads: int = 1, calls: int = 20, name: str = "x"
) -> tuple[Counter, Counter]:
    """Of the graph that ONNX Runtime *runs* for the file: how many operators of each kind there
    are, and milliseconds a call that each kind takes. Look with the threads of the comparison that
    you want to explain: not every kernel gains from a second one. `name` is the file's input.

    >>> x = torch.randn(8, 1, 8, 8)
    >>> export(nn.Conv2d(1, 2, 3).eval(), (x,), Path("net.onnx"))
    >>> found, spent = look_inside(Path("net.onnx"), x)
    >>> found["Conv"], spent["Conv"] > 0
    (1, True)
    """
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for _ in range(calls):
            session.run(None, {name: x.numpy()})
        events = json.loads(Path(session.end_profiling()).read_text())
        nodes = onnx.load(Path(folder) / "optimized.onnx", load_external_data=False).graph.node
    spent: Counter = Counter()
    for event in events:
        if event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"] / 1e3 / calls
    return Counter(node.op_type for node in nodes), spent
