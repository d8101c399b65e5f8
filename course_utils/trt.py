"""TensorRT engines: build, inspect, run, refit. Written for TensorRT 10 and 11; every failure is
one clear exception.

profile = {"image": ((1, 1, 28, 28), (64, 1, 28, 28), (256, 1, 28, 28))}   # smallest, tuned for,
largest plan = trt.build("model.onnx", [profile], timing_cache="timing.cache")     # bytes: save
them as they are engine = trt.Engine(plan) engine.run({"image": x})["logits"]
# torch tensors on the GPU [layer.name for layer in trt.layers(engine.inspect())]

The precision is the graph's own: types and Q/DQ pairs in the ONNX file (networks are strongly
typed).
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]
"""For each input with a free dimension: the smallest shape, the one to tune for, the largest."""


class TrtError(RuntimeError):
    """Something went wrong in TensorRT; a subclass says what, the message what to do."""


class NoTensorRT(TrtError):
    """The package or NVIDIA's libraries are missing."""


class NoDriver(TrtError):
    """TensorRT is installed and finds no usable NVIDIA driver or GPU."""


class ParseError(TrtError):
    """The ONNX file can't be read, or holds an operator that TensorRT does not know."""


class ProfileError(TrtError):
    """The shapes of a profile do not fit the network."""


class OutOfWorkspace(TrtError):
    """No kernel of a layer got by with the scratch memory that the builder may use."""


class BuildError(TrtError):
    """The builder gave up for another reason; its own last words are in the message."""


class EngineMismatch(TrtError):
    """The engine file belongs to another TensorRT version or another GPU, or is no engine."""


class OutsideProfile(TrtError):
    """An input has a shape that no profile of the engine covers."""


class RefitError(TrtError):
    """New weights did not fit the engine."""


def load() -> ModuleType:
    """The module `tensorrt`; NoTensorRT where it can't be imported."""
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        raise NoTensorRT(
            f"tensorrt can't be imported ({error}). On a machine with an NVIDIA GPU: pip install"
            " tensorrt. In Colab, first: Runtime, Change runtime type, GPU."
        ) from error
    return tensorrt


def build(
    onnx: str | Path,
    profiles: Sequence[Profile] = (),
    *,
    workspace: int | None = None,
    timing_cache: str | Path | None = None,
    refit: bool = False,
) -> bytes:
    """Compile an ONNX file into an engine for the GPU of this machine and return the plan's bytes.

    `workspace` limits the scratch memory of a kernel in bytes (default: all that the GPU has),
    `refit` allows new weights later. `timing_cache` is a file, read if it is there and fits this
    GPU, and written. Raises NoTensorRT, NoDriver, ParseError, ProfileError, OutOfWorkspace or
    BuildError.
    """
    trt = load()
    log = messages(trt)
    builder = _made(trt.Builder, log)
    network = builder.create_network(
        1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    )  # 11 has no other
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):
        raise ParseError(
            f"{Path(onnx).name} was not accepted: {_parser_errors(parser) or _last(log)}"
        )
    config = builder.create_builder_config()
    config.profiling_verbosity = (
        trt.ProfilingVerbosity.DETAILED
    )  # or the inspector shows names alone
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    if refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    free = [network.get_input(i) for i in range(network.num_inputs)]
    check_profiles({tensor.name: tuple(tensor.shape) for tensor in free}, profiles)
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, (low, best, high) in shapes.items():
            profile.set_shape(name, low, best, high)
        if config.add_optimization_profile(profile) < 0:
            raise ProfileError(f"the profile {dict(shapes)} was not accepted: {_last(log)}")
    if timing_cache is not None:
        path = Path(timing_cache)
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        if cache is None or not config.set_timing_cache(
            cache, ignore_mismatch=False
        ):  # another GPU's or version's
            config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise build_failure(log.lines)
    if timing_cache is not None:
        path.write_bytes(bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


class Engine:
    """An engine ready to run. Raises NoTensorRT, NoDriver or EngineMismatch."""

    def __init__(self, plan: bytes) -> None:
        import torch

        trt = self._trt = load()
        self._log = messages(trt)
        self._runtime = _made(trt.Runtime, self._log)  # must outlive the engine
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineMismatch(
                f"this plan can't be used here: {_last(self._log)}. An engine fits the TensorRT"
                " version and the GPU model it was built with: build it again from the ONNX file"
                " on this machine."
            )
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise TrtError(
                f"no memory on the GPU for this engine's activations: {_last(self._log)}"
            )
        self._stream = torch.cuda.Stream()
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self.inputs = [
            n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT
        ]
        self.outputs = [n for n in names if n not in self.inputs]

    def bounds(self) -> list[dict[str, tuple[Shape, Shape, Shape]]]:
        """Smallest, tuned and largest shape of every input, one dict a profile."""
        found = []
        for index in range(self._engine.num_optimization_profiles):
            shapes = {
                name: (tuple(self._engine.get_tensor_shape(name)),) * 3 for name in self.inputs
            }
            for name in (n for n, (shape, *_) in shapes.items() if -1 in shape):
                shapes[name] = tuple(
                    tuple(s) for s in self._engine.get_tensor_profile_shape(name, index)
                )
            found.append(shapes)
        return found

    def run(self, feed: Mapping[str, "torch.Tensor"]) -> dict[str, "torch.Tensor"]:
        """Outputs by name, on the GPU; inputs are moved there and cast. Raises OutsideProfile,
        TrtError or KeyError.
        """
        import torch

        if set(feed) != set(self.inputs):
            raise KeyError(f"the engine's inputs are {self.inputs}; given were {list(feed)}.")
        index = choose_profile(self.bounds(), {name: tuple(x.shape) for name, x in feed.items()})
        here, context = torch.cuda.current_stream(), self._context
        held = {n: x.to("cuda", self._dtype(n)).contiguous() for n, x in feed.items()}
        self._stream.wait_stream(here)  # the inputs are made on the other stream
        if context.active_optimization_profile != index:
            self._demand(
                context.set_optimization_profile_async(index, self._stream.cuda_stream),
                "the profile",
            )
        for name, x in held.items():
            self._demand(
                context.set_input_shape(name, tuple(x.shape)),
                f"the shape {tuple(x.shape)} of {name}",
            )
        if missing := context.infer_shapes():
            raise TrtError(f"the shapes of {missing} are not known: {_last(self._log)}")
        for name in self.outputs:
            shape = tuple(context.get_tensor_shape(name))
            held[name] = torch.empty(shape, dtype=self._dtype(name), device="cuda")
        for name, x in held.items():
            self._demand(context.set_tensor_address(name, x.data_ptr()), f"the memory of {name}")
            x.record_stream(self._stream)
        self._demand(context.execute_async_v3(self._stream.cuda_stream), "the run")
        here.wait_stream(self._stream)
        return {name: held[name] for name in self.outputs}

    def inspect(self) -> str:
        """What the builder made, as JSON text: see `layers`."""
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        return inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)

    def refit(self, onnx: str | Path) -> None:
        """Put the weights of another ONNX file of the same graph into this engine. Raises
        RefitError.
        """
        if not self._engine.refittable:
            raise RefitError(
                "this engine was built without refit=True; its weights are baked into its kernels."
            )
        refitter = self._trt.Refitter(self._engine, self._log)
        parser = self._trt.OnnxParserRefitter(refitter, self._log)
        if not parser.refit_from_file(str(onnx)):
            raise RefitError(
                f"{Path(onnx).name} does not fit the engine:"
                f" {_parser_errors(parser) or _last(self._log)}"
            )
        if not refitter.refit_cuda_engine():
            raise RefitError(f"still missing: {refitter.get_missing_weights()}. {_last(self._log)}")

    def _demand(self, done: bool, what: str) -> None:
        if not done:
            raise TrtError(f"TensorRT refused {what}: {_last(self._log)}")

    def _dtype(self, name: str) -> "torch.dtype":
        import torch

        kinds = self._trt.DataType
        table = {
            kinds.FLOAT: torch.float32,
            kinds.HALF: torch.float16,
            kinds.BF16: torch.bfloat16,
            kinds.INT8: torch.int8,
            kinds.INT32: torch.int32,
            kinds.INT64: torch.int64,
            kinds.BOOL: torch.bool,
            kinds.UINT8: torch.uint8,
        }
        return table[self._engine.get_tensor_dtype(name)]


@dataclass(frozen=True)
class Layer:
    """One step of an engine: its kernel, the types it reads and writes, the ONNX nodes that went
    into it.
    """

    name: str
    kind: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    tactic: str
    nodes: tuple[str, ...]


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


def layers(text: str) -> list[Layer]:
    """The layers in an inspector's JSON, of TensorRT 10 or 11. Raises TrtError where only names
    were kept.
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


def check_profiles(inputs: Mapping[str, Shape], profiles: Sequence[Profile]) -> None:
    """Raise ProfileError unless each profile fits the network's inputs, in which -1 is a free
    dimension.
    """
    free = sorted(name for name, shape in inputs.items() if -1 in shape)
    if free and not profiles:
        raise ProfileError(
            f"the inputs {free} have free dimensions: give a profile with smallest, tuned and"
            " largest shape."
        )
    for profile in profiles:
        if missing := [n for n in free if n not in profile] + [
            n for n in profile if n not in inputs
        ]:
            raise ProfileError(f"a profile must name the inputs {free}; look at {missing}.")
        for name, (low, best, high) in profile.items():
            shape = inputs[name]
            if not len(low) == len(best) == len(high) == len(shape):
                raise ProfileError(
                    f"{name} has {len(shape)} dimensions; the profile says {low}, {best}, {high}."
                )
            for i, (size, a, b, c) in enumerate(zip(shape, low, best, high, strict=True)):
                if not 0 <= a <= b <= c or (size != -1 and not a == b == c == size):
                    wanted = "smallest ≤ tuned ≤ largest" if size == -1 else f"{size} three times"
                    raise ProfileError(
                        f"dimension {i} of {name}: {wanted} is due; the profile says {a}, {b}, {c}."
                    )


def choose_profile(bounds: Sequence[Profile], shapes: Mapping[str, Shape]) -> int:
    """The profile that covers `shapes` and was tuned nearest to them (in elements); OutsideProfile
    if none covers them.
    """
    fitting = {}
    for index, profile in enumerate(bounds):
        sides = [(shapes[n], low, high) for n, (low, _, high) in profile.items()]
        if all(
            len(s) == len(a) and all(x <= y <= z for x, y, z in zip(a, s, b, strict=True))
            for s, a, b in sides
        ):
            fitting[index] = sum(
                abs(math.prod(shapes[n]) - math.prod(best)) for n, (_, best, _) in profile.items()
            )
    if not fitting:
        ranges = "; ".join(", ".join(f"{n} from {p[n][0]} to {p[n][2]}" for n in p) for p in bounds)
        raise OutsideProfile(
            f"{dict(shapes)} lies outside every profile ({ranges}). Build the engine with a wider"
            " one."
        )
    return min(fitting, key=fitting.get)


def build_failure(lines: Sequence[str]) -> TrtError:
    """Which failure a builder's messages tell of."""
    said = " | ".join(lines[-3:]) or "TensorRT said nothing"
    if re.search(
        r"workspace|out ?of ?memory|insufficient memory|any implementation for node",
        " ".join(lines),
        re.I,
    ):
        return OutOfWorkspace(
            f"no kernel got by with the memory it was given; raise or drop `workspace` ({said})."
        )
    return BuildError(f"the engine was not built: {said}")


def messages(trt: ModuleType) -> object:
    """A logger for TensorRT that keeps warnings and errors in `lines`, for the exceptions to
    quote.
    """

    class Messages(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: object, msg: str) -> None:
            if int(severity) <= int(trt.ILogger.WARNING):
                self.lines.append(msg)

    return Messages()


def _made(kind: type, log: object) -> object:
    """A Builder or a Runtime; without a driver, the bindings raise a TypeError about a null
    pointer.
    """
    try:
        return kind(log)
    except TypeError as error:
        raise NoDriver(
            f"TensorRT is installed and finds no GPU it can use ({_last(log)}). `nvidia-smi` must"
            " list one, and its driver must be new enough for this TensorRT's CUDA."
        ) from error


def _parser_errors(parser: object) -> str:
    return " | ".join(str(parser.get_error(i).desc()) for i in range(parser.num_errors))


def _last(log: object) -> str:
    return log.lines[-1] if log.lines else "TensorRT said nothing"
