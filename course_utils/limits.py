"""What this process may use of the machine: cores and memory, a container's quota counted."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
"""Where Linux shows its control groups, a container's among them."""
OWN_GROUPS = Path("/proc/self/cgroup")
"""Which of them this process is in: one line a hierarchy, "4:memory:/name" or "0::/name"."""

__all__ = ["cap_threads", "memory_gb", "usable_cores"]


def usable_cores() -> int:
    """Cores this process may use: its affinity and, on Linux, the control groups' quota.

    Half a core more is no core more: a quota of 1.5 cores gives 1, and one of 0.5 gives 1, too.

    >>> 1 <= usable_cores() <= os.cpu_count()
    True
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return min([cores, *(max(1, int(quota)) for quota in _quotas())])


def cap_threads() -> int:
    """No more threads than usable cores, here and in the processes started from here; returns that
    number. Only where a quota or an affinity grants fewer cores than the machine has: torch looks
    at the machine, and threads beyond the quota make each other wait.

    >>> cap_threads() == usable_cores()
    True
    """
    cores = usable_cores()
    if cores < (os.cpu_count() or 1):
        asked = os.environ.get("OMP_NUM_THREADS", "")
        if not asked.isdigit() or int(asked) > cores:
            os.environ["OMP_NUM_THREADS"] = str(cores)
        torch = sys.modules.get("torch")  # loaded before us it has read the variable already
        if torch is not None and torch.get_num_threads() > cores:
            torch.set_num_threads(cores)
    return cores


def memory_gb() -> float:
    """Memory this process may use, in units of 2^30 bytes: the machine's, or less in a control
    group (a container).

    >>> 0 < memory_gb() < 2**20
    True
    """
    import psutil

    limits = [float(psutil.virtual_memory().total)]
    for folder in _groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):  # version 2 and 1; "max" is no limit
            with contextlib.suppress(OSError, ValueError):
                limits.append(float((folder / name).read_text()))
    return min(limits) / 2**30


def _quotas() -> Iterator[float]:
    """Cores granted by each group that sets a limit: microseconds of CPU time in each period."""
    for folder in _groups("cpu"):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (folder / "cpu.max").read_text().split()  # version 2; "max" is no limit
            yield int(quota) / int(period)
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (
                int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period")
            )
            if quota > 0:  # version 1; -1 is no limit
                yield quota / period


def _groups(controller: str) -> Iterator[Path]:
    """The folders of the groups that this process is in, and of all groups above them: a limit
    binds everything below it.

    A container may see its own group as the root, or not at all: folders that do not exist are
    read in vain.
    """
    own = {"": "/", controller: "/"}  # the root's files count also where no group is named
    with contextlib.suppress(OSError):
        for line in OWN_GROUPS.read_text().splitlines():
            _, names, path = line.split(":", 2)
            own |= dict.fromkeys(set(names.split(",")) & {"", controller}, path)
    mounts = {"": ("", "unified"), controller: (controller, "cpu,cpuacct", "cpuacct,cpu")}
    for name, path in own.items():
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for mount in mounts[name]:
            for depth in range(len(parts), -1, -1):
                yield CGROUP.joinpath(mount, *parts[:depth])
