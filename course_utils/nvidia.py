"""NVIDIA's Model Optimizer, which inserts Q/DQ pairs and converts types on a CPU. It imports much,
so chapter 12 calls it in a process of its own (`measure.child`). Needs the packages
nvidia-modelopt and lief.
"""

from pathlib import Path

import numpy as np


def int8(source: str, target: str, images: str) -> list[str]:
    """Write `source` with the Q/DQ pairs that Model Optimizer wants, calibrated by the largest
    magnitude over `images` (a .npz file with an array x); the tensors that got one, sorted.

    >>> int8("fp32.onnx", "int8.onnx", "images.npz")  # doctest: +SKIP
    ['relu', 'x']
    """
    import onnx
    from modelopt.onnx.quantization import quantize

    from course_utils import qdq

    quantize(
        source,
        "int8",
        {"x": np.load(images)["x"]},
        "max",
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=target,
        log_level="CRITICAL",
    )
    return qdq.paired(onnx.load(target))


def fp16(source: str, target: str, images: str) -> int:
    """Write `source` with types by AutoCast, which leaves in fp32 what fp16 can't hold; the number
    of Cast nodes in it.

    >>> fp16("fp32.onnx", "fp16.onnx", "images.npz")  # doctest: +SKIP
    2
    """
    import onnx
    from modelopt.onnx.autocast import convert_to_mixed_precision

    model = convert_to_mixed_precision(source, "fp16", keep_io_types=True, calibration_data=images)
    onnx.save(model, target)
    assert Path(target).is_file()
    return sum(node.op_type == "Cast" for node in model.graph.node)
