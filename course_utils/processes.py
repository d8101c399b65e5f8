"""Processes looked at from outside: whether they run, what they hold, and their end."""

import contextlib
import time
from collections.abc import Collection, Iterable
from pathlib import Path

__all__ = ["end", "held_bytes", "held_together", "runs", "wait_gone"]


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


def held_together(pids: Iterable[int]) -> int:
    """Memory of several processes in bytes, looked at so cheaply that it can be done while one of
    them is timed: what the kernel counts anyway is read, no page is visited. (`held_bytes` walks
    through all of them, 26 ms for 1.5 GB; looked at five times a second, two or three of twelve
    short series came out wrong by 3x.)

    Pages of files count once, for the process that has most of them. Of a fork, what it holds
    beyond its parent is counted; pages that it shared and then wrote to are missed. For a notebook,
    its fork server and a child this was 3% below the sum of the proportional sizes. On other
    systems than Linux it is the sum of the resident sizes.

    >>> import os
    >>> held_together([os.getpid()]) > 2**20
    True
    """
    import psutil

    own, files, total = {}, 0, 0
    for pid in pids:
        try:
            process = psutil.Process(pid)
            memory, shown = process.memory_info(), (process.ppid(), process.cmdline())
        except psutil.Error:
            continue
        shared = getattr(memory, "shared", 0)
        own[pid] = (memory.rss - shared, *shown)
        files = max(files, shared)
    for held, parent, command in own.values():
        forked = parent in own and own[parent][2] == command
        total += max(0, held - own[parent][0]) if forked else held
    return files + total


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
