"""Processes looked at from outside: whether they run, what they hold, and their end."""

import contextlib
import time
from collections.abc import Collection, Iterable
from pathlib import Path

__all__ = ["Peak", "end", "held_bytes", "resident_bytes", "runs", "wait_gone"]


def runs(pid: int) -> bool:
    """Whether a process still runs. A zombie does not: it has ended, holds no memory and no port,
    and waits for its parent to ask how; in a container whose first process never asks it waits for
    ever.

    >>> import os
    >>> runs(os.getpid())
    True
    """
    import psutil  # os.kill(pid, 0), often seen, is Ctrl-C on Windows

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True  # it is there, and somebody else's


def wait_gone(pids: Collection[int], seconds: float) -> bool:
    """Wait until none of the processes runs any more, `seconds` at most; whether that came true.

    >>> import os
    >>> wait_gone([os.getpid()], seconds=0.05)
    False
    """
    stop = time.monotonic() + seconds
    while any(map(runs, pids)):
        if time.monotonic() > stop:
            return False
        time.sleep(0.01)
    return True


def held_bytes(pid: int) -> int:
    """Memory of a process in bytes: its proportional set size (shared pages divided among those who
    share them) where Linux tells it in one look, its resident size elsewhere; 0 for a process that
    is gone.

    >>> import os
    >>> held_bytes(os.getpid()) > 2**20
    True
    """
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        pass
    import psutil

    try:
        info = psutil.Process(pid).memory_full_info()
        return getattr(info, "pss", 0) or info.rss
    except psutil.Error:
        return 0


def resident_bytes(pid: int) -> int:
    """Resident memory of a process in bytes, shared pages in full; 0 for one that is gone. It costs
    microseconds and stops nobody, where `held_bytes` walks through all pages (26 ms for 1.5 GB) and
    holds up the process meanwhile.

    >>> import os
    >>> resident_bytes(os.getpid()) > 2**20
    True
    """
    import psutil

    try:
        return psutil.Process(pid).memory_info().rss
    except psutil.Error:
        return 0


class Peak:
    """The most memory that some processes were seen to hold together.

    It is watched while something is timed, so it must not disturb: the cheap resident size is read
    at each look, and the dear proportional one only where that sum has grown by a fiftieth since
    it was last read. (Read five times a second it made one in six comparisons wrong by 3x.)

    >>> import os
    >>> peak = Peak()
    >>> peak.look([os.getpid()])
    >>> 2**20 < peak.bytes <= resident_bytes(os.getpid()) * 1.1
    True
    """

    def __init__(self) -> None:
        self.bytes = self._resident = 0

    def look(self, pids: Iterable[int]) -> None:
        """Sum over these processes; the highest sum so far is in `bytes`."""
        pids = list(pids)
        resident = sum(map(resident_bytes, pids))
        if resident > 1.02 * self._resident:
            self._resident = resident
            self.bytes = max(self.bytes, sum(map(held_bytes, pids)))


def end(pid: int) -> None:
    """Kill a process and everything below it. It is stopped first, so that nothing new is started
    meanwhile. A process that is gone is no error.

    >>> import subprocess, sys
    >>> asleep = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    >>> end(asleep.pid)
    >>> asleep.wait() != 0
    True
    """
    import psutil

    try:
        root = psutil.Process(pid)
        if root.status() != psutil.STATUS_ZOMBIE:
            root.suspend()  # SIGSTOP, or what Windows has in its place
        tree = [*root.children(recursive=True), root]
    except psutil.Error:
        return
    for process in tree:
        with contextlib.suppress(psutil.Error):
            process.kill()
    wait_gone([process.pid for process in tree[:-1]], seconds=5)
