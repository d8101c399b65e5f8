"""Measuring: time with its uncertainty, size, work, memory and energy.

measure.compare(lambda: slow(x), lambda: fast(x))   # a speed-up with its interval and a verdict
measure.latency(call), measure.throughput(call, batch) measure.saved_bytes(model),
measure.macs(model, x), measure.parameters(model), measure.peak_memory(call) measure.roofline(),
measure.energy(call), measure.child("print(1)"), measure.turns(code, {"capped": env}, rounds=9)
"""

from course_utils.measure.children import Child, child, turns
from course_utils.measure.resources import (
    Roofline,
    energy,
    macs,
    parameters,
    peak_memory,
    release,
    roofline,
    saved_bytes,
)
from course_utils.measure.runtimes import onnx_arm, onnx_session
from course_utils.measure.stats import Interval, median_interval, paired_share, paired_t
from course_utils.measure.timing import (
    Arm,
    Comparison,
    Latency,
    MeasurementError,
    aa_spread,
    arm,
    compare,
    latency,
    pretty,
    throughput,
)

__all__ = [
    "Arm",
    "Child",
    "Comparison",
    "Interval",
    "Latency",
    "MeasurementError",
    "Roofline",
    "aa_spread",
    "arm",
    "child",
    "compare",
    "energy",
    "latency",
    "macs",
    "median_interval",
    "onnx_arm",
    "onnx_session",
    "paired_share",
    "paired_t",
    "parameters",
    "peak_memory",
    "pretty",
    "release",
    "roofline",
    "saved_bytes",
    "throughput",
    "turns",
]
