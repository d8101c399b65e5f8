"""Helpers of the course *Efficient Deep Learning, Measured*.

Import the module you need (`from course_utils import measure, plots`); nothing heavy is loaded
before. Two things change for the process, so that what it measures holds elsewhere: the C library
keeps freed memory (`allocator`), and where a quota grants fewer cores than the machine has, threads
are capped (`limits.cap_threads`).
"""

import functools
import os
from pathlib import Path

from course_utils import allocator, limits

allocator.settle()
limits.cap_threads()

ROOT = Path(__file__).resolve().parent.parent
"""The course's folder: notebooks/ and datasets/ lie beside course_utils/."""


def scratch(name: str) -> Path:
    """A folder for what a chapter writes: build/scratch/NAME, or a temporary one where the course
    cannot be written.

    >>> scratch("08").is_dir()
    True
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
