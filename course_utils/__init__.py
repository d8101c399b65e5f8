"""Helpers of the course *Efficient Deep Learning, Measured*.

Import the module you need (`from course_utils import measure, plots`); nothing heavy is loaded
before.
"""

import functools
import logging
import os
from pathlib import Path

# torch's profiler and its benchmark module report what they look for on GPUs; on a CPU that is
# noise in a notebook.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
for _name in ("torch.utils.cpp_extension", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

ROOT = Path(__file__).resolve().parent.parent
"""The course's folder: notebooks/ and datasets/ lie beside course_utils/."""


def scratch(name: str) -> Path:
    """A folder for what a chapter writes: build/scratch/NAME, or a temporary one where the course
    cannot be written.
    """
    folder = Path(os.environ.get("COURSE_SCRATCH", ROOT / "build" / "scratch")) / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return _temporary(name)


@functools.cache  # what a chapter writes in one cell it finds in the next
def _temporary(name: str) -> Path:
    import tempfile

    return Path(tempfile.mkdtemp(prefix=f"course-{name}-"))


def _explain_missing_names() -> None:
    """In a notebook, say after a NameError what it mostly means: a cell further up has not been
    run.
    """
    import sys

    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None:
        return

    def explain(result: object) -> None:
        error = result.error_in_exec
        if isinstance(error, NameError) and getattr(error, "name", None):
            print(
                f"{error.name!r} is not there yet. If a cell further up makes it, run the cells in"
                " order: menu Run, Run All Above Selected Cell; then this one again."
            )

    shell.events.register("post_run_cell", explain)


_explain_missing_names()
