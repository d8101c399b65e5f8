"""The first speed-up, chapter 00: the files of one network in three number formats, and a process
that times one of them.

Chapter 6 opens the first half of this box, chapter 11 the second one.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnxruntime
    from torch import Tensor, nn

CHILD = "from course_utils import first; sample = first.ready()"
"""For `measure.turns`: a process that has prepared the way its environment names."""
CALLS = 30  # in a row, for one time


def export_and_quantize(model: "nn.Module", images: "Tensor", folder: Path) -> dict[str, Path]:
    """The network as three ONNX files: "fp32", "int8", and "int8, 7-bit weights".

    `images` (N, 1, 28, 28), normalised, are run through the network to see how large its numbers
    get: the *calibration* that static quantization needs. The third file is for x86 processors
    without an instruction for dot products of 8 bits, whose kernels add pairs of products in 16
    bits and cut off what does not fit (ONNX Runtime's documentation, *Quantize ONNX models*).

    >>> from course_utils import data, models, scratch
    >>> images = models.normalise(data.fashion_mnist("train")[0][:50])
    >>> files = export_and_quantize(models.baseline(), images, scratch("example"))
    >>> files["int8"].stat().st_size < files["fp32"].stat().st_size / 3
    True
    """
    import torch
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    files = {name: folder / f"{name}.onnx" for name in ("fp32", "int8", "int8, 7-bit weights")}
    torch.onnx.export(
        model,
        (images[:2],),
        files["fp32"],
        input_names=["image"],
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),  # any number of images
        external_data=False,  # one file, so that its size is the model's
        verbose=False,
    )
    quant_pre_process(files["fp32"], folder / "clean.onnx")
    for name in ("int8", "int8, 7-bit weights"):
        quantize_static(
            folder / "clean.onnx",
            files[name],
            _Calibration(images),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range="7-bit" in name,
        )
    return files


class _Calibration:
    """The images in pieces of 50, as ONNX Runtime's calibration asks for them."""

    def __init__(self, images: "Tensor") -> None:
        self.pieces = iter(images.split(50))

    def get_next(self) -> dict[str, np.ndarray] | None:
        piece = next(self.pieces, None)
        return None if piece is None else {"image": piece.numpy()}


def answers(file: Path, images: np.ndarray) -> np.ndarray:
    """The class that the network in an ONNX file gives each image, (N,).

    >>> from course_utils import data, models, scratch
    >>> images = models.normalise(data.fashion_mnist("train")[0][:50])
    >>> files = export_and_quantize(models.baseline(), images, scratch("example"))
    >>> answers(files["fp32"], images.numpy()).shape
    (50,)
    """
    session = _session(file, threads=0)  # as many as the runtime likes
    pieces = np.array_split(images, max(1, len(images) // 500))
    return np.concatenate([session.run(None, {"image": p})[0].argmax(1) for p in pieces])


def ready() -> Callable[[], float]:
    """Prepare one way to run the shipped network in this process, and return what times it:
    seconds a call, of `CALLS` calls in a row.

    The environment says which: WAY is "eager" or an ONNX file, IMAGES a .npy file with the batch,
    THREADS how many threads.

    >>> from unittest import mock
    >>> from course_utils import scratch
    >>> batch = scratch("example") / "batch.npy"
    >>> np.save(batch, np.zeros((2, 1, 28, 28), np.float32))
    >>> told = {"WAY": "eager", "IMAGES": str(batch), "THREADS": "1"}
    >>> with mock.patch.dict(os.environ, told):
    ...     ready()() > 0
    True
    """
    images = np.load(os.environ["IMAGES"])
    way, threads = os.environ["WAY"], int(os.environ["THREADS"])
    call = _eager(images, threads) if way == "eager" else _from_file(Path(way), images, threads)
    call(), call()

    def sample() -> float:
        call()  # its caches are cold: the other processes have run in between
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        return (time.perf_counter() - start) / CALLS

    return sample


def _eager(images: np.ndarray, threads: int) -> Callable[[], object]:
    import torch

    from course_utils import models

    network, batch = models.baseline(), torch.from_numpy(images)
    torch.set_num_threads(threads)

    def call() -> object:
        with torch.inference_mode():
            return network(batch)

    return call


def _from_file(file: Path, images: np.ndarray, threads: int) -> Callable[[], object]:
    session = _session(file, threads)
    return lambda: session.run(None, {"image": images})


def _session(file: Path, threads: int) -> "onnxruntime.InferenceSession":
    """As `measure.onnx_session`, whose import of torch would cost each process two seconds.

    Threads that wait do not spin, which is not the default: they would take the cores from whoever
    is timed next.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
