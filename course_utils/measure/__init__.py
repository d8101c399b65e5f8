"""Measuring: time with its uncertainty, size, work, memory and energy.

measure.compare(lambda: slow(x), lambda: fast(x))  # a quick look, within this process
measure.across(measure.arm(a, x), measure.arm(b, x))  # a speed-up over fresh processes
measure.derive(lambda s, p: 1 / (1 - p + p / s), speedup, share)  # carries both widths
measure.latency(call), measure.throughput(call, batch)
measure.saved_bytes(model), measure.macs(model, x), measure.parameters(model)
measure.peak_memory(call), measure.held(call), measure.roofline(), measure.energy(call)
measure.child("print(1)"), measure.turns(code, {"capped": env}, rounds=9)
"""

from course_utils.measure.arms import Arm, MeasurementError, arm, pretty
from course_utils.measure.children import Child, child, turns
from course_utils.measure.fresh import across
from course_utils.measure.resources import (
    Roofline,
    energy,
    held,
    macs,
    parameters,
    peak_memory,
    release,
    roofline,
    saved_bytes,
)
from course_utils.measure.runtimes import onnx_arm, onnx_session
from course_utils.measure.stats import (
    Interval,
    derive,
    median_interval,
    over_processes,
    paired_share,
    paired_t,
)
from course_utils.measure.timing import Comparison, Latency, compare, latency, throughput

__all__ = [
    "Arm",
    "Child",
    "Comparison",
    "Interval",
    "Latency",
    "MeasurementError",
    "Roofline",
    "across",
    "arm",
    "child",
    "compare",
    "derive",
    "energy",
    "held",
    "latency",
    "macs",
    "median_interval",
    "onnx_arm",
    "onnx_session",
    "over_processes",
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
