"""The builder and its engines, on the GPU of this machine."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from course_utils.trt.errors import (
    BuildError,
    EngineMismatch,
    NoDriver,
    NoTensorRT,
    OutOfWorkspace,
    ParseError,
    ProfileError,
    RefitError,
    TrtError,
)
from course_utils.trt.profiles import Profile, Shape, check_profiles, choose_profile

if TYPE_CHECKING:
    import torch


def load() -> ModuleType:
    """The module `tensorrt`; NoTensorRT where it can't be imported.

    >>> try:
    ...     print(load().__name__)
    ... except NoTensorRT:
    ...     print("tensorrt")  # what it would be called
    tensorrt
    """
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

    >>> profile = {"image": ((1, 1, 28, 28), (64, 1, 28, 28), (256, 1, 28, 28))}
    >>> plan = build("model.onnx", [profile], timing_cache="timing.cache")  # doctest: +SKIP
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
    """An engine ready to run. Raises NoTensorRT, NoDriver or EngineMismatch.

    >>> engine = Engine(Path("model.plan").read_bytes())  # doctest: +SKIP
    >>> engine.run({"image": torch.zeros(8, 1, 28, 28)})["logits"].shape  # doctest: +SKIP
    torch.Size([8, 10])
    """

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


def build_failure(lines: Sequence[str]) -> TrtError:
    """Which failure a builder's messages tell of.

    >>> build_failure(["Insufficient memory for any tactic"])
    OutOfWorkspace('no kernel got by with the memory it was given; raise or drop `workspace` ...')
    """
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

    >>> messages(load()).lines  # doctest: +SKIP
    []
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
