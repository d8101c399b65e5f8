"""ONNX Runtime as an arm of a comparison: the same threads as torch, and no thread that spins while
the other arm runs.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from course_utils.measure.timing import Arm

if TYPE_CHECKING:
    import onnxruntime


def onnx_session(
    model: str | Path | bytes, *, threads: int | None = None
) -> "onnxruntime.InferenceSession":
    """An InferenceSession on the CPU with `threads` threads (torch's number by default), spinning
    switched off.

    Left on, ONNX Runtime's waiting threads keep a core busy between calls and slow whatever else is
    measured.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def onnx_arm(
    session: "onnxruntime.InferenceSession",
    x: torch.Tensor | np.ndarray,
    label: str,
    dtype: str = "float32",
) -> Arm:
    """`session` on the one input `x` as an Arm that says its own threads."""
    array = x.numpy() if isinstance(x, torch.Tensor) else x
    feed = {session.get_inputs()[0].name: np.ascontiguousarray(array)}
    threads = session.get_session_options().intra_op_num_threads
    return Arm(lambda: session.run(None, feed), label, threads, dtype, len(array), "contiguous")
