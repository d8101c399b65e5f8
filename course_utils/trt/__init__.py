"""TensorRT engines: build, inspect, run, refit. Written for TensorRT 10 and 11; every failure is
one clear exception.

    # smallest shape, the one to tune for, largest
    profile = {"image": ((1, 1, 28, 28), (64, 1, 28, 28), (256, 1, 28, 28))}
    plan = trt.build("model.onnx", [profile], timing_cache="timing.cache")  # bytes: save them
    engine = trt.Engine(plan)
    engine.run({"image": x})["logits"]  # torch tensors on the GPU
    engine.capture({"image": (64, 1, 28, 28)})  # the same as a CUDA graph, to be timed
    [layer.name for layer in trt.layers(engine.inspect())]

The precision is the graph's own: types and Q/DQ pairs in the ONNX file (networks are strongly
typed).
"""

from course_utils.trt.bindings import names
from course_utils.trt.building import build, build_failure, load, messages
from course_utils.trt.engine import Captured, Engine
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
    UnsupportedLayer,
)
from course_utils.trt.inspection import Layer, Tensor, layers
from course_utils.trt.profiles import Profile, Shape, check_profiles, choose_profile
from course_utils.trt.recipes import RECIPES, Recipe

__all__ = [
    "RECIPES",
    "BuildError",
    "Captured",
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
    "Recipe",
    "Shape",
    "Tensor",
    "TrtError",
    "UnsupportedLayer",
    "build",
    "build_failure",
    "check_profiles",
    "choose_profile",
    "layers",
    "load",
    "messages",
    "names",
]
