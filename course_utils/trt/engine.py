"""An engine on the GPU of this machine."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from course_utils.trt.building import last, load, made, messages, parser_errors
from course_utils.trt.errors import EngineMismatch, RefitError, TrtError
from course_utils.trt.profiles import Shape, choose_profile

if TYPE_CHECKING:
    import torch

ALIGNED = 256
"""Bytes: TensorRT wants the address of every tensor to be a multiple of it."""


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
        self._runtime = made(trt.Runtime, self._log)  # must outlive the engine
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineMismatch(
                f"this plan can't be used here: {last(self._log)}. An engine fits the TensorRT"
                " version and the GPU architecture it was built for: build it again from the ONNX"
                " file on this machine."
            )
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self.inputs = [
            n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT
        ]
        self.outputs = [n for n in names if n not in self.inputs]
        self._bounds = self.bounds()
        self._context, self._stream = self._new_context(), torch.cuda.Stream()

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
        """Outputs by name, on the GPU; inputs are moved there, cast and aligned.

        Shapes and memory are settled anew in each call, in Python: to time an engine, `capture` it.
        Raises OutsideProfile, TrtError or KeyError.
        """
        import torch

        index = self._profile({name: tuple(x.shape) for name, x in feed.items()})
        here = torch.cuda.current_stream()
        held = {n: _aligned(x.to("cuda", self._dtype(n)).contiguous()) for n, x in feed.items()}
        self._stream.wait_stream(here)  # the inputs are made on the other stream
        made = self._bind(self._context, self._stream, index, held)
        for x in [*held.values(), *made.values()]:
            x.record_stream(self._stream)
        self._demand(self._context.execute_async_v3(self._stream.cuda_stream), "the run")
        here.wait_stream(self._stream)
        return made

    def capture(self, shapes: Mapping[str, Shape]) -> "Captured":
        """This engine for inputs of these shapes, as one CUDA graph. Raises as `run` does.

        >>> call = engine.capture({"image": (64, 1, 28, 28)})  # doctest: +SKIP
        >>> call.inputs["image"].copy_(x)  # doctest: +SKIP
        >>> call()["logits"].shape  # doctest: +SKIP
        torch.Size([64, 10])
        """
        return Captured(self, shapes)

    def inspect(self) -> str:
        """What the builder made, as JSON text: see `layers`."""
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        return inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)

    def refit(self, onnx: str | Path) -> None:
        """Put the weights of another ONNX file of the same graph into this engine, when all its
        work is done. Raises RefitError.
        """
        import torch

        if not self._engine.refittable:
            raise RefitError(
                "this engine was built without refit=True; its weights are baked into its kernels."
            )
        torch.cuda.synchronize()  # with work still queued, what a refit does is undefined
        refitter = self._trt.Refitter(self._engine, self._log)
        parser = self._trt.OnnxParserRefitter(refitter, self._log)
        if not parser.refit_from_file(str(onnx)):
            raise RefitError(
                f"{Path(onnx).name} does not fit the engine:"
                f" {parser_errors(parser) or last(self._log)}"
            )
        if not refitter.refit_cuda_engine():
            raise RefitError(f"still missing: {refitter.get_missing_weights()}. {last(self._log)}")

    def _new_context(self) -> object:
        context = self._engine.create_execution_context()
        if context is None:
            raise TrtError(f"no memory on the GPU for this engine's activations: {last(self._log)}")
        return context

    def _bind(
        self, context: object, stream: object, index: int, held: Mapping[str, "torch.Tensor"]
    ) -> dict[str, "torch.Tensor"]:
        """Settle profile, shapes and addresses for these inputs; the outputs' memory by name."""
        import torch

        if context.active_optimization_profile != index:
            self._demand(
                context.set_optimization_profile_async(index, stream.cuda_stream), "the profile"
            )
        for name, x in held.items():
            self._demand(
                context.set_input_shape(name, tuple(x.shape)),
                f"the shape {tuple(x.shape)} of {name}",
            )
        try:
            unknown = context.infer_shapes()
        except RuntimeError as error:
            raise TrtError(f"the shapes can't be inferred ({error}): {last(self._log)}") from error
        if unknown:
            raise TrtError(f"the shapes of {unknown} are not known: {last(self._log)}")
        outputs = {}
        for name in self.outputs:
            shape = tuple(context.get_tensor_shape(name))
            if -1 in shape:
                raise TrtError(
                    f"the shape of {name} depends on the data ({shape}); such an output needs an"
                    " IOutputAllocator, which this class does not have."
                )
            outputs[name] = torch.empty(shape, dtype=self._dtype(name), device="cuda")
        for name, x in {**held, **outputs}.items():
            self._demand(context.set_tensor_address(name, x.data_ptr()), f"the memory of {name}")
        return outputs

    def _profile(self, shapes: Mapping[str, Shape]) -> int:
        """The profile that covers these shapes, before anything is moved to the GPU."""
        if set(shapes) != set(self.inputs):
            raise KeyError(f"the engine's inputs are {self.inputs}; given were {list(shapes)}.")
        return choose_profile(self._bounds, shapes)

    def _demand(self, done: bool, what: str) -> None:
        if not done:
            raise TrtError(f"TensorRT refused {what}: {last(self._log)}")

    def _dtype(self, name: str) -> "torch.dtype":
        import torch

        kinds, kind = self._trt.DataType, self._engine.get_tensor_dtype(name)
        table = {
            kinds.FLOAT: torch.float32,
            kinds.HALF: torch.float16,
            kinds.BF16: torch.bfloat16,
            kinds.INT8: torch.int8,
            kinds.INT32: torch.int32,
            kinds.INT64: torch.int64,
            kinds.BOOL: torch.bool,
            kinds.UINT8: torch.uint8,
            kinds.FP8: torch.float8_e4m3fn,
        }
        if kind not in table:
            raise TrtError(f"{name} is {kind}, for which torch has no tensor that can be passed.")
        return table[kind]


class Captured:
    """An engine at fixed shapes and addresses, recorded as a CUDA graph: `engine.capture(shapes)`.

    Write into `inputs`, call, read `outputs`. It has an execution context of its own, so that the
    engine's other runs do not change what it replays.

    >>> call = Captured(engine, {"image": (64, 1, 28, 28)})  # doctest: +SKIP
    >>> call()["logits"].shape  # doctest: +SKIP
    torch.Size([64, 10])
    """

    def __init__(self, engine: Engine, shapes: Mapping[str, Shape]) -> None:
        import torch

        index = engine._profile(shapes)
        self.inputs = {
            n: torch.zeros(tuple(s), dtype=engine._dtype(n), device="cuda")
            for n, s in shapes.items()
        }
        stream, self._context = torch.cuda.Stream(), engine._new_context()
        stream.wait_stream(torch.cuda.current_stream())
        self.outputs = engine._bind(self._context, stream, index, self.inputs)
        # The first run settles what a change of shape has left to do; a graph must not record that.
        engine._demand(self._context.execute_async_v3(stream.cuda_stream), "the run")
        stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            engine._demand(self._context.execute_async_v3(stream.cuda_stream), "the capture")

    def __call__(self) -> dict[str, "torch.Tensor"]:
        self._graph.replay()
        return self.outputs


def _aligned(x: "torch.Tensor") -> "torch.Tensor":
    """`x`, or a copy where its address is none that TensorRT takes: a slice of a larger tensor."""
    return x if x.data_ptr() % ALIGNED == 0 else x.clone()
