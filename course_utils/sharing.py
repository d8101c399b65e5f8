"""A child process and a piece of memory that both it and we see, for chapter 13: how arrays get
from one process into another.
"""

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import shared_memory

import numpy as np

from course_utils import ROOT
from course_utils.workers import attach

__all__ = ["child_and_segment", "exists", "round_trip"]


@contextlib.contextmanager
def child_and_segment(
    numbers: int,
) -> Iterator[tuple[subprocess.Popen, shared_memory.SharedMemory]]:
    """A child process, and a segment of shared memory for so many float32 numbers that it has
    attached. Who made the segment removes it, whatever becomes of the child.

    >>> with child_and_segment(10) as (child, segment):
    ...     round_trip(child, np.zeros(2))
    array([1., 0.])
    """
    segment = shared_memory.SharedMemory(create=True, size=4 * numbers)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    child = subprocess.Popen(
        [sys.executable, "-c", "from course_utils import sharing; sharing.serve()", segment.name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
    )
    try:
        yield child, segment
    finally:
        child.kill()
        child.wait()  # a dead process that nobody waits for stays in the table: a zombie
        child.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
        segment.close()
        segment.unlink()


def round_trip(child: subprocess.Popen, value: np.ndarray | None) -> np.ndarray | None:
    """Send an array through the pipe and get it back with its first number one larger; or send
    None, and the child does this to the array in the segment. Raises EOFError or BrokenPipeError if
    the child has gone.

    >>> with child_and_segment(10) as (child, segment):
    ...     round_trip(child, None)
    ...     float(np.ndarray(10, np.float32, segment.buf)[0])
    1.0
    """
    pickle.dump(value, child.stdin, protocol=5)
    child.stdin.flush()
    return pickle.load(child.stdout)  # our own child's bytes


def exists(name: str) -> bool:
    """Whether there is a segment of this name in the system.

    >>> exists("no_segment_of_ours")
    False
    """
    try:
        attach(name).close()
    except FileNotFoundError:
        return False
    return True


def serve() -> None:
    """The child's own program; it ends when its input ends."""
    segment = attach(sys.argv[1])
    shared = np.ndarray(segment.size // 4, np.float32, segment.buf)
    with contextlib.suppress(EOFError):
        while True:
            value = pickle.load(sys.stdin.buffer)
            (shared if value is None else value)[0] += 1
            pickle.dump(value, sys.stdout.buffer, protocol=5)
            sys.stdout.flush()
