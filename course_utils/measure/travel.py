"""Arms as a file: how a callable and what it holds get into another process.

cloudpickle carries functions of a notebook by value, with the globals they use. What it cannot
carry is taken apart here and put together again on the other side: ONNX Runtime's sessions,
OpenVINO's compiled models, torch's operators.
"""

import io
import pickle
import pickletools
import sys
from typing import BinaryIO

import cloudpickle
import torch

from course_utils.measure.arms import MeasurementError

_ORT_ENTRIES = ("session.intra_op.allow_spinning", "session.inter_op.allow_spinning")
_ORT_OPTIONS = (
    "intra_op_num_threads",
    "inter_op_num_threads",
    "graph_optimization_level",
    "execution_mode",
    "enable_cpu_mem_arena",
    "enable_mem_pattern",
)
OPENVINO_SETTINGS = (
    "INFERENCE_NUM_THREADS",
    "INFERENCE_PRECISION_HINT",
    "NUM_STREAMS",
    "PERFORMANCE_HINT",
)


def pack(arms: object, file: BinaryIO) -> None:
    """Write `arms` to a file. Raises MeasurementError for what cannot travel.

    >>> scale, file = 3, io.BytesIO()
    >>> pack(lambda: 2 * scale, file)
    >>> unpack(file)()
    6
    """
    try:
        _Pickler(file).dump(arms)
    except Exception as error:  # pickle raises TypeError, AttributeError, PicklingError, …
        raise MeasurementError(
            f"an arm cannot be copied into another process ({type(error).__name__}: {error}). Make"
            " what cannot travel inside the function, or look within this process:"
            " measure.compare."
        ) from error


def unpack(file: BinaryIO) -> object:
    """What `pack` packed: our own bytes, from our own file."""
    file.seek(0)
    return pickle.load(file)


def modules(file: BinaryIO) -> list[str]:
    """Names of the modules that `unpack` will import, read from the file without running it."""
    file.seek(0)
    words = [
        value
        for _, value, _ in pickletools.genops(file)
        if isinstance(value, str) and value != "__main__" and len(value) < 200
    ]
    return [w for w in dict.fromkeys(words) if w in sys.modules or w.split(".")[0] in _KNOWN]


_KNOWN = {"onnxruntime", "openvino", "torch", "torchvision", "transformers", "course_utils"}


class _Pickler(cloudpickle.Pickler):
    def reducer_override(self, value: object) -> object:
        ort, ov = sys.modules.get("onnxruntime"), sys.modules.get("openvino")
        if ort and isinstance(value, ort.InferenceSession):
            return _session, _describe_session(value)
        if ov and isinstance(value, ov.CompiledModel):
            return _openvino, _describe_openvino(value)
        if isinstance(value, torch._ops.OpOverload):
            packet = value.overloadpacket
            return _operator, (*packet._qualified_op_name.split("::"), value._overloadname)
        return super().reducer_override(value)


def _operator(namespace: str, name: str, overload: str) -> object:
    """torch.ops.aten.mm.default, say."""
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def _describe_session(session: object) -> tuple:
    options = session.get_session_options()
    entries = {}
    for name in _ORT_ENTRIES:
        try:
            entries[name] = options.get_session_config_entry(name)
        except Exception:  # not set: the library raises its own Fail
            continue
    chosen = {name: getattr(options, name) for name in _ORT_OPTIONS}
    chosen = {name: v if isinstance(v, int | bool) else v.name for name, v in chosen.items()}
    model = session._model_bytes or str(session._model_path)  # the only place that keeps them
    return model, chosen, entries, session.get_providers()


def _session(model: bytes | str, chosen: dict, entries: dict, providers: list[str]) -> object:
    import onnxruntime as ort

    options = ort.SessionOptions()
    enums = {
        "graph_optimization_level": ort.GraphOptimizationLevel,
        "execution_mode": ort.ExecutionMode,
    }
    for name, value in chosen.items():
        setattr(options, name, getattr(enums[name], value) if name in enums else value)
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    return ort.InferenceSession(model, options, providers=providers)


def _describe_openvino(compiled: object) -> tuple:
    settings = {name: compiled.get_property(name) for name in OPENVINO_SETTINGS}
    return bytes(compiled.export_model().getbuffer()), {
        k: str(_plain(v)) for k, v in settings.items()
    }


def _plain(value: object) -> object:
    """A property as the text that OpenVINO takes back: its types print as <Type: 'float32'>."""
    name = getattr(value, "to_string", None) or getattr(value, "get_type_name", None)
    if callable(name):
        return name()
    return getattr(value, "name", value)


def _openvino(data: bytes, settings: dict[str, str]) -> object:
    import openvino

    return openvino.Core().import_model(io.BytesIO(data), "CPU", settings)
