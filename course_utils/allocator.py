"""The C library's allocator, told once to keep what it was given.

glibc hands freed memory back to the system and takes it again, page by page, whenever a tensor of
some megabytes comes and goes. Whether it does depends on what the process did before, and it can
double the time of a layer: two processes that run the same code then measure two speeds. So the
package settles it where it is imported: memory stays with the process (`measure.release()` still
hands it back), and both arms of every comparison find the same.
"""

import contextlib
import ctypes
import os
import sys

KEEP = 2**30  # blocks below 1 GiB come from the heap, and the heap is never trimmed
PAD = 2**26  # the heap grows by 64 MiB at a time
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h
STATE = "not touched"
"""What was done, in words for the machine card."""


def settle() -> str:
    """Have glibc keep freed memory. Returns what was done, in words; nothing is raised.

    COURSE_ALLOCATOR=system leaves the allocator alone, to see what it does to an interval.

    >>> settle().startswith(("glibc keeps freed memory", "as the system has it"))
    True
    """
    global STATE
    STATE = _settle()
    return STATE


def _settle() -> str:
    if os.environ.get("COURSE_ALLOCATOR") == "system":
        return "as the system has it (COURSE_ALLOCATOR=system)"
    if sys.platform != "linux":
        return f"as the system has it: {sys.platform} has no mallopt"
    with contextlib.suppress(OSError, AttributeError):  # musl has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        done = [
            mallopt(_MMAP_THRESHOLD, KEEP),
            mallopt(_TRIM_THRESHOLD, 2**31 - 1),
            mallopt(_TOP_PAD, PAD),
        ]
        if all(done):
            return "glibc keeps freed memory (mallopt)"
        return "as the system has it: mallopt refused"
    return "as the system has it: this C library has no mallopt"
