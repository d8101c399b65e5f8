"""What a learner's process may do to the machine: hardly anything.

`enclose` is called inside the process, after the fork and before any of the learner's code. Each
wall is tried alone; what the system does not offer is named, so that the outcome can say it.
"""

import contextlib
import ctypes
import os
import signal
import struct
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from course_utils import ROOT

FIRST_USER = (
    30_000  # and the next 30,000: ids that a container has, too, and nobody is likely to be
)
NEW_NETWORK, NEW_USER = 0x40000000, 0x10000000
_RULES, _ADD, _RESTRICT = 444, 445, 446  # Landlock's system calls, the same on every machine
_READ, _ALL, _REFER, _TRUNCATE = 0b1101, (1 << 13) - 1, 1 << 13, 1 << 14
_SYSTEM = ("/usr", "/lib", "/lib64", "/etc", "/proc", "/sys/devices", "/dev")


@dataclass(frozen=True)
class Limits:
    """Of one exercise: seconds of processor and of waiting, bytes of memory (beyond what the fork
    starts with), of a file and of all its files, of output, and processes with their threads.
    """

    cpu: float = 60.0
    wall: float = 150.0
    memory: int = 2 * 2**30
    file: int = 64 * 2**20
    disk: int = 256 * 2**20
    output: int = 64 * 2**20
    processes: int = 64


def privileged() -> bool:
    """Whether this process may become other users."""
    return hasattr(os, "geteuid") and os.geteuid() == 0


def enclose(slot: int, scratch: Path, limits: Limits) -> list[str]:
    """Put up every wall around this process; what could not be put up, in words."""
    import resource

    missing = []
    libc = ctypes.CDLL(None, use_errno=True)
    os.chdir(scratch)
    if not _network(libc):
        missing.append("the network was not cut")
    held = _data_bytes()
    cpu = max(1, int(limits.cpu))
    for kind, most in (
        (resource.RLIMIT_CPU, (cpu, cpu + 2)),
        (resource.RLIMIT_FSIZE, (limits.file,) * 2),
        (resource.RLIMIT_NOFILE, (256,) * 2),
        (resource.RLIMIT_CORE, (0,) * 2),
        (resource.RLIMIT_DATA, (held + limits.memory,) * 2),
    ):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, most)
    if sys.platform == "linux":
        libc.prctl(38, 1, 0, 0, 0)  # no new privileges
    else:
        missing.append("memory, files and processes were not watched")
    # Before the user changes, who may not even look at where Python lies.
    if not _disk(libc, scratch):
        missing.append("the disk was not closed off")
    if privileged():
        user = FIRST_USER + slot
        os.chown(scratch, user, user)
        os.setgroups([])
        # Counted over all processes of the user: a slot's user has no others.
        resource.setrlimit(resource.RLIMIT_NPROC, (limits.processes,) * 2)
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    else:
        missing.append("it ran as the user who grades")
    return missing


def lacking() -> list[str]:
    """What this system does not offer: `enclose` is tried in a fork that does nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        told, said = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(
                    said, "\n".join(enclose(os.getpid() % 30_000, Path(folder), Limits())).encode()
                )
            finally:
                os._exit(0)
        os.close(said)
        os.waitpid(pid, 0)
        found = os.read(told, 4096).decode().splitlines()
        os.close(told)
        return found


def _network(libc: ctypes.CDLL) -> bool:
    if sys.platform != "linux":
        return False
    if libc.unshare(NEW_NETWORK) == 0:
        return True
    return libc.unshare(NEW_USER | NEW_NETWORK) == 0


def _data_bytes() -> int:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmData")).split()[1])
    return 8 * 2**30


def readable() -> list[str]:
    """What an answer may read: Python, its libraries, the package and the data sets. The chapters'
    sources, the tests and the submissions are not among them.
    """
    python = {sys.prefix, sys.base_prefix, os.path.realpath(sys.base_prefix)}
    course = (str(ROOT / "course_utils"), str(ROOT / "datasets"))
    return [*sorted(python), *course, *_SYSTEM]


def _disk(libc: ctypes.CDLL, scratch: Path) -> bool:
    """Landlock, which needs no privilege: reads below `readable`, writes into scratch; no TCP, no
    signal to a process outside, where the kernel knows these.
    """
    if sys.platform != "linux":
        return False
    version = libc.syscall(_RULES, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    every = _ALL | (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
    attributes = struct.pack("<Q", every)
    if version >= 4:
        attributes += struct.pack("<Q", 0b11)
    if version >= 6:
        attributes += struct.pack("<Q", 0b11)
    rules = libc.syscall(_RULES, attributes, ctypes.c_size_t(len(attributes)), 0)
    if rules < 0:
        return False
    for path in readable():
        _allow(libc, rules, path, _READ)
    _allow(libc, rules, "/dev/null", _READ | 2)
    _allow(libc, rules, str(scratch), every)
    done = libc.syscall(_RESTRICT, rules, 0) == 0
    os.close(rules)
    return done


def _allow(libc: ctypes.CDLL, rules: int, path: str, access: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # not on this system
    if not Path(path).is_dir():
        access &= 0b111 | _TRUNCATE  # the rights that a file can have
    libc.syscall(_ADD, rules, 1, struct.pack("<Qi", access, place), 0)
    os.close(place)


def family(pid: int, slot: int) -> list[int]:
    """The processes of an answer that run: those of its user, or else of its session."""
    found = []
    for entry in os.scandir("/proc") if Path("/proc/self").is_dir() else ():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                text = Path(f"/proc/{entry.name}/stat").read_text().rpartition(")")[2]
                state, _, _, session, *_ = text.split()
                own = entry.stat().st_uid == FIRST_USER + slot
                if state not in "ZX" and (own if privileged() else int(session) == pid):
                    found.append(int(entry.name))
    return found or [pid]


def written_bytes(folder: Path) -> int:
    """What the files below a folder take, in bytes; one that just went counts nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(f"{place}/{name}").st_blocks * 512
    return total


def reap() -> None:
    """End and wait for whatever was left to this process, which adopts the orphans of an answer:
    those that hid in a session of their own, and zombies, which count among their user's processes.
    """
    for _ in range(100):
        left = _children()
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not left:
            return
        time.sleep(0.01)


def _children() -> list[int]:
    found = []
    for entry in os.scandir("/proc") if Path("/proc/self").is_dir() else ():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                text = Path(f"/proc/{entry.name}/stat").read_text().rpartition(")")[2]
                if int(text.split()[1]) == os.getpid():
                    found.append(int(entry.name))
    return found


def adopt() -> None:
    """Orphans of this process's family become its children, not those of the system's first one."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def own_bytes(pids: list[int]) -> int:
    """What these processes hold that no file backs, in bytes; pages shared by a fork count for
    each.
    """
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = Path(f"/proc/{pid}/statm").read_text().split()
            total += (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")
    return total


def end(pid: int, slot: int) -> None:
    """Kill an answer's process and all that it started, wherever they hid. With a user of its own
    they end at one stroke; otherwise its session, again until none is left.
    """
    if privileged():
        helper = os.fork()
        if helper == 0:
            try:
                os.setresuid(FIRST_USER + slot, FIRST_USER + slot, FIRST_USER + slot)
                os.kill(-1, signal.SIGKILL)
            finally:
                os._exit(0)
        os.waitpid(helper, 0)
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)  # it may not have changed its user yet
    for _ in range(50):
        with contextlib.suppress(OSError):
            os.killpg(pid, signal.SIGKILL)
        rest = [p for p in family(pid, slot) if p != pid]
        for other in rest:
            with contextlib.suppress(OSError):
                os.kill(other, signal.SIGKILL)
        if not rest:
            return
        time.sleep(0.02)
