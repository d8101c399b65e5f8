"""TensorRT's Python classes without TensorRT: enough to ask which names there are."""

import ctypes
import importlib
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

from course_utils.trt.building import load

_WANTED = {
    "libnvinfer": "createInferBuilder createInferRuntime createInferRefitter",
    "libnvinfer_plugin": "initLibNvInferPlugins getBuilderPluginRegistry getPluginRegistry",
    "libnvonnxparser": "createNvOnnxParser createNvOnnxParserRefitter getNvOnnxParserVersion",
}


def names(folder: str | Path) -> ModuleType | None:
    """The module `tensorrt` where it can be imported; else its bindings over empty libraries, which
    are compiled into `folder`; None without either, or without a C compiler.

    The package `tensorrt-cu13-bindings` holds the Python classes. When it is imported it asks
    NVIDIA's libraries for nine functions. To *read names*, nine functions that do nothing will do.
    Nothing of this can build an engine.

    >>> module = names(Path.cwd())
    >>> module is None or hasattr(module, "Builder")
    True
    """
    if importlib.util.find_spec("tensorrt"):
        return load()
    spec, compiler = importlib.util.find_spec("tensorrt_bindings"), shutil.which("cc")
    library = Path(spec.origin).parent / "tensorrt.so" if spec else Path()
    if not (library.is_file() and compiler):
        return None
    major = re.search(rb"libnvinfer\.so\.(\d+)", library.read_bytes()).group(1).decode()
    for stem, functions in _WANTED.items():
        asked = [f + "_INTERNAL" * f.startswith("create") for f in functions.split()]
        source, target = Path(folder, f"{stem}.c"), Path(folder, f"{stem}.so.{major}")
        source.write_text("\n".join(f"void *{n}(void) {{ return 0; }}" for n in asked))
        options = ["-shared", "-fPIC", f"-Wl,-soname,{target.name}", "-o"]
        subprocess.run([compiler, *options, target, source], check=True)
        ctypes.CDLL(str(target), ctypes.RTLD_GLOBAL)
    return importlib.import_module("tensorrt_bindings")
