"""The builder, on the GPU of this machine."""

import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from course_utils.trt.errors import (
    BuildError,
    NoDriver,
    NoTensorRT,
    OutOfWorkspace,
    ParseError,
    ProfileError,
    TrtError,
    UnsupportedLayer,
)
from course_utils.trt.profiles import Profile, check_profiles


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
    only_cached: bool = False,
    refit: bool = False,
    tf32: bool = False,
) -> bytes:
    """Compile an ONNX file into an engine for the GPU of this machine and return the plan's bytes.

    `workspace` limits the scratch memory of a kernel in bytes (default: all that the GPU has),
    `refit` allows new weights later. `timing_cache` is a file, read if it is there and fits this
    GPU, and written; with `only_cached` a kernel that it does not hold is an error, so that the
    same file gives the same engine. TensorRT's own default lets fp32 products run in TF32, with 10
    bits of mantissa; here `tf32` must be asked for. Raises NoTensorRT, NoDriver, ParseError,
    ProfileError, OutOfWorkspace, UnsupportedLayer or BuildError.

    >>> profile = {"image": ((1, 1, 28, 28), (64, 1, 28, 28), (256, 1, 28, 28))}
    >>> plan = build("model.onnx", [profile], timing_cache="timing.cache")  # doctest: +SKIP
    """
    trt = load()
    log = messages(trt)
    builder = made(trt.Builder, log)
    network = builder.create_network(
        1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    )  # 11 has no other
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):
        raise ParseError(
            f"{Path(onnx).name} was not accepted: {parser_errors(parser) or last(log)}"
        )
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the inspector shows names
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    if refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    if only_cached:
        config.set_flag(trt.BuilderFlag.ERROR_ON_TIMING_CACHE_MISS)
    if not tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    free = [network.get_input(i) for i in range(network.num_inputs)]
    check_profiles({tensor.name: tuple(tensor.shape) for tensor in free}, profiles)
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, (low, best, high) in shapes.items():
            profile.set_shape(name, low, best, high)
        if config.add_optimization_profile(profile) < 0:
            raise ProfileError(f"the profile {dict(shapes)} was not accepted: {last(log)}")
    if timing_cache is not None:
        path = Path(timing_cache)
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        accepted = cache is not None and config.set_timing_cache(cache, ignore_mismatch=False)
        if not accepted:  # another GPU's, or another version's
            config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise build_failure(log.lines)
    if timing_cache is not None:
        path.write_bytes(bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


def build_failure(lines: Sequence[str]) -> TrtError:
    """Which failure a builder's messages tell of: the memory that a kernel may use, a layer that
    has no kernel in its types and shapes, or something else.

    That tactics are skipped for want of memory is a warning of many builds that end well. It counts
    only together with a layer that was left without a kernel.

    >>> build_failure(["Error Code 10: Could not find any implementation for node fc."])
    UnsupportedLayer("TensorRT has no kernel for 'fc' in the types and shapes of the file: ...
    """
    said, text = " | ".join(lines[-3:]) or "TensorRT said nothing", " ".join(lines)
    ended = re.search(r"out ?of ?memory|increas\w+ (?:the )?workspace", text, re.I)
    skipped = re.search(r"insufficient memory", text, re.I)
    node = re.search(r"any implementation for node ([^\s,]+)", text)
    if ended or (skipped and node):
        return OutOfWorkspace(
            f"no kernel got by with the memory it was given; raise or drop `workspace` ({said})."
        )
    if node:
        return UnsupportedLayer(
            f"TensorRT has no kernel for {node[1].rstrip('.')!r} in the types and shapes of the"
            f" file: look at its types and pairs ({said})."
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


def made(kind: type, log: object) -> object:
    """A Builder or a Runtime; without a driver, the bindings raise a TypeError about a null
    pointer.
    """
    try:
        return kind(log)
    except TypeError as error:
        raise NoDriver(
            f"TensorRT is installed and finds no GPU it can use ({last(log)}). `nvidia-smi` must"
            " list one, and its driver must be new enough for this TensorRT's CUDA."
        ) from error


def parser_errors(parser: object) -> str:
    return " | ".join(str(parser.get_error(i).desc()) for i in range(parser.num_errors))


def last(log: object) -> str:
    return log.lines[-1] if log.lines else "TensorRT said nothing"
