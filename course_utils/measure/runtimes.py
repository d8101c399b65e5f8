"""ONNX Runtime as an arm of a comparison: the same threads as torch, and no thread that spins while
the other arm runs.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from course_utils.measure.arms import Arm

if TYPE_CHECKING:
    import onnxruntime


def onnx_session(
    model: str | Path | bytes, *, threads: int | None = None
) -> "onnxruntime.InferenceSession":
    """An InferenceSession on the CPU with `threads` threads (torch's number by default), spinning
    switched off.

    Left on, ONNX Runtime's waiting threads keep a core busy between calls and slow whatever else is
    measured.

    >>> from onnx import helper
    >>> graph = helper.make_graph(
    ...     [helper.make_node("Relu", ["x"], ["y"])],
    ...     "relu",
    ...     [helper.make_tensor_value_info("x", 1, [2])],
    ...     [helper.make_tensor_value_info("y", 1, [2])],
    ... )
    >>> small = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])
    >>> session = onnx_session(small.SerializeToString(), threads=1)
    >>> session.run(None, {"x": np.array([-1, 2], np.float32)})
    [array([0., 2.], dtype=float32)]
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
    """`session` on the one input `x` as an Arm that says its own threads.

    >>> from types import SimpleNamespace as Fake
    >>> options = Fake(intra_op_num_threads=2)
    >>> session = Fake(get_inputs=lambda: [Fake(name="x")], get_session_options=lambda: options)
    >>> onnx_arm(session, torch.zeros(4, 3), "ONNX Runtime").threads
    2
    """
    array = x.numpy() if isinstance(x, torch.Tensor) else x
    feed = {session.get_inputs()[0].name: np.ascontiguousarray(array)}
    threads = session.get_session_options().intra_op_num_threads
    return Arm(_Run(session, feed), label, threads, dtype, len(array), "contiguous")


class _Run:
    def __init__(
        self, session: "onnxruntime.InferenceSession", feed: dict[str, np.ndarray]
    ) -> None:
        self.session, self.feed = session, feed

    def __call__(self) -> list[np.ndarray]:
        return self.session.run(None, self.feed)
