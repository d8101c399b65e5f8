"""torch.compile in a comparison: an arm that is compiled anew in each process, at the size at which
it is timed; what was generated, as text; and a C++ file as a library.
"""

import ctypes
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from course_utils.cpu import architecture

PARALLEL = "#pragma omp parallel"
"""What stands in generated C++ that uses more than one thread."""


class Compiled:
    """`function`, compiled at its first call in each process: compiled code does not travel.

    Inductor decides at that call, from the size of its inputs, whether the kernel is worth more
    than one thread. `frozen` sets `torch._inductor.config.freezing` while it compiles: weights
    become constants, and BatchNorm is folded; call it without gradients then. A frozen function
    keeps the weights of its first call.

    >>> twice = Compiled(torch.mul)
    >>> twice.function is torch.mul, twice.frozen
    (True, False)
    """

    def __init__(self, function: Callable[..., object], frozen: bool = False) -> None:
        self.function, self.frozen = function, frozen
        self._ready: Callable[..., object] | None = None

    def __call__(self, *tensors: torch.Tensor) -> object:
        if self._ready is not None:
            return self._ready(*tensors)
        from torch._inductor import config

        # as an option alone it would do nothing; with it, the two forms have caches of their own
        options = {"freezing": True} if self.frozen else None
        self._ready = torch.compile(self.function, dynamic=False, options=options)
        with config.patch(freezing=self.frozen):
            return self._ready(*tensors)

    def __reduce__(self) -> tuple:
        return Compiled, (self.function, self.frozen)


def generated(function: Callable[..., object], *tensors: torch.Tensor, **how: object) -> str:
    """The program that Inductor writes for `function(*tensors)`, compiled anew; `how` goes to
    torch.compile. An active `torch._inductor.config.patch` counts. Whatever was compiled before in
    this process is forgotten.

    Raises ValueError where it was not one program: at a graph break there are several.

    >>> program = generated(torch.sin, torch.zeros(8))  # doctest: +SKIP
    >>> "sin" in program                                # doctest: +SKIP
    True
    """
    from torch._inductor.utils import run_and_get_code

    torch.compiler.reset()
    programs = run_and_get_code(torch.compile(function, **how), *tensors)[1]
    torch.compiler.reset()
    if len(programs) != 1:
        raise ValueError(f"Inductor wrote {len(programs)} programs, not one: is there a break?")
    return programs[0]


def empty_cache(folder: str | Path) -> None:
    """Empty `folder`, let Inductor keep its work there from now on, and forget what this process
    has compiled: the next compilation starts from nothing (but for what the compiler was asked
    about the processor). Children that start later inherit the folder.

    >>> empty_cache("build/inductor")                   # doctest: +SKIP
    >>> Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).name  # doctest: +SKIP
    'inductor'
    """
    from torch._inductor import utils

    shutil.rmtree(folder, ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder).resolve())
    torch.compiler.reset()
    forget = getattr(utils, "clear_caches", None) or utils.clear_inductor_caches
    forget()


def loop(program: str) -> str:
    """The body of the first vector loop in generated C++, without casts and blank lines.

    >>> print(loop("{\\nauto tmp0 = f::loadu(p + static_cast<int64_t>(x0));\\ntmp0.store(q);\\n}"))
    auto tmp0 = f::loadu(p + x0);
    tmp0.store(q);
    """
    lines = program.splitlines()
    start = next(i for i, line in enumerate(lines) if "loadu" in line)
    end = next(i for i, line in enumerate(lines) if i >= start and ".store(" in line)
    kept = (line.strip() for line in lines[start : end + 1])
    plain = [re.sub(r"static_cast<int64_t>\((\w+)\)", r"\1", line) for line in kept]
    return "\n".join(line for line in plain if line)


def library(source: str | Path, folder: str | Path, *flags: str) -> ctypes.CDLL:
    """Compile a C++ file with torch's own tool, `torch.utils.cpp_extension`, and load it. What it
    builds lies in `folder`, and is built again only when the source or the flags changed.

    Raises RuntimeError with the compiler's words. The tool needs ninja.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "seven.cpp").write_text('extern "C" int seven() { return 7; }')
    >>> library(folder / "seven.cpp", folder).seven()   # doctest: +SKIP
    7
    """
    from torch.utils import cpp_extension

    source, folder, windows = Path(source).resolve(), Path(folder).resolve(), os.name == "nt"
    native = ["-march=native"] if architecture() == "x86" and not windows else []
    optimise = ["/O2"] if windows else ["-O3", *native, "-fopenmp-simd"]
    # torch quotes the folders that it includes, not the one that it links with: a path with a space
    # would end there for the shell that runs the linker.
    place = cpp_extension.TORCH_LIB_PATH if windows else shlex.quote(cpp_extension.TORCH_LIB_PATH)
    with mock.patch.object(cpp_extension, "TORCH_LIB_PATH", place):
        built = cpp_extension.load(
            name=source.stem,
            sources=[str(source)],
            build_directory=str(folder),
            extra_cflags=[*optimise, *flags],
            is_python_module=False,
        )
    return ctypes.CDLL(str(built))
