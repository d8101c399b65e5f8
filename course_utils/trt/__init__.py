"""TensorRT engines: build, inspect, run, refit. Written for TensorRT 10 and 11; every failure is
one clear exception.

    # smallest shape, the one to tune for, largest
    profile = {"image": ((1, 1, 28, 28), (64, 1, 28, 28), (256, 1, 28, 28))}
    plan = trt.build("model.onnx", [profile], timing_cache="timing.cache")  # bytes: save them
    engine = trt.Engine(plan)
    engine.run({"image": x})["logits"]  # torch tensors on the GPU
    [layer.name for layer in trt.layers(engine.inspect())]

The precision is the graph's own: types and Q/DQ pairs in the ONNX file (networks are strongly
typed).
"""

from course_utils.trt.engines import Engine, build, build_failure, load, messages
from course_utils.trt.errors import (
    BuildError,
    EngineMismatch,
    NoDriver,
    NoTensorRT,
    OutOfWorkspace,
    OutsideProfile,
    ParseError,
    ProfileError,
    RefitError,
    TrtError,
)
from course_utils.trt.inspection import Layer, layers
from course_utils.trt.profiles import Profile, Shape, check_profiles, choose_profile

__all__ = [
    "BuildError",
    "Engine",
    "EngineMismatch",
    "Layer",
    "NoDriver",
    "NoTensorRT",
    "OutOfWorkspace",
    "OutsideProfile",
    "ParseError",
    "Profile",
    "ProfileError",
    "RefitError",
    "Shape",
    "TrtError",
    "build",
    "build_failure",
    "check_profiles",
    "choose_profile",
    "layers",
    "load",
    "messages",
]
