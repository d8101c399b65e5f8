"""What this machine is and what it can do: the card every chapter opens with, and typed skips for
what it lacks.
"""

import contextlib
import functools
import html
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
CAPS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
"""Variables that hide instruction sets from oneDNN and from torch's own kernels, to see what a
lesser machine would say.
"""
PACKAGES = ("torch", "torchvision", "onnxruntime", "openvino")
_X86_FLAGS = ("avx2", "avx512_f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
_ARM_FLAGS = {"asimddp": "dotprod", "i8mm": "i8mm", "bf16": "bf16", "sve": "sve"}


@dataclass(frozen=True)
class Skip:
    """Why a part did not run. `kind` is one of KINDS, so that skips can be counted by cause."""

    kind: str
    reason: str
    remedy: str = ""

    KINDS = (
        "gpu",
        "isa",
        "compiler",
        "package",
        "permission",
        "cores",
        "memory",
        "profile",
        "system",
    )

    def __post_init__(self) -> None:
        if self.kind not in self.KINDS:
            raise ValueError(f"kind is {self.kind!r}; it must be one of {', '.join(self.KINDS)}.")

    def __bool__(self) -> bool:
        return False  # so that `if machine.can("gpu"):` reads as it should

    def __repr__(self) -> str:
        return f"Skipped ({self.kind}): {self.reason}" + (f" {self.remedy}" if self.remedy else "")


@dataclass(frozen=True)
class Card:
    """One machine, as far as it matters for speed. `isa` holds the instruction sets that change a
    verdict.
    """

    cpu: str
    architecture: str
    isa: tuple[str, ...]
    cores: int
    threads: int
    memory_gb: float
    gpu: str
    system: str
    python: str
    versions: dict[str, str]
    profile: str
    caps: dict[str, str] = field(default_factory=dict)  # e.g. {"ONEDNN_MAX_CPU_ISA": "SSE41"}

    def as_dict(self) -> dict:
        return asdict(self)

    def _rows(self) -> list[tuple[str, str]]:
        return [
            (
                "CPU",
                (
                    f"{self.cpu} ({self.architecture}), cores: {self.cores}, torch's threads:"
                    f" {self.threads}"
                ),
            ),
            ("Instruction sets", ", ".join(self.isa) or "none of those that the course looks for"),
            *(
                [("Capped", ", ".join(f"{name}={cap}" for name, cap in self.caps.items()))]
                if self.caps
                else []
            ),
            ("Memory", f"{self.memory_gb:.1f} GB"),
            ("GPU", self.gpu),
            ("System", f"{self.system}, Python {self.python}"),
            ("Versions", ", ".join(f"{k} {v}" for k, v in self.versions.items())),
            ("Profile", self.profile),
        ]

    def __repr__(self) -> str:
        return "\n".join(f"{name:17} {value}" for name, value in self._rows())

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{name}</th><td"
            f" style='text-align:left'>{html.escape(value)}</td></tr>"
            for name, value in self._rows()
        )
        return f"<table><caption>This machine</caption>{rows}</table>"


def card() -> Card:
    """The machine card, read from the machine now."""
    import torch

    return Card(
        cpu=_cpu_name(),
        architecture=platform.machine(),
        isa=isa(),
        cores=usable_cores(),
        threads=torch.get_num_threads(),
        memory_gb=round(memory_gb(), 1),
        gpu=torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        system=f"{platform.system()} {platform.release().split('-')[0]}",
        python=platform.python_version(),
        versions={name: v for name in PACKAGES if (v := version(name))},
        profile=os.environ.get("COURSE_PROFILE", "fast"),
        caps={name: os.environ[name] for name in CAPS if os.environ.get(name)},
    )


@functools.cache
def isa() -> tuple[str, ...]:
    """Instruction sets that decide about INT8 and bf16 speed, e.g. ("avx2", "avx512_f",
    "avx512_vnni").
    """
    import torch

    have = {name for name, value in torch.cpu.get_capabilities().items() if value is True}
    if platform.machine().lower() in ("aarch64", "arm64"):
        features = _proc_cpuinfo("Features").split()
        return tuple(sorted({label for flag, label in _ARM_FLAGS.items() if flag in features}))
    return tuple(flag for flag in _X86_FLAGS if flag in have)


def usable_cores() -> int:
    """Cores this process may use: affinity and, on Linux, the control group's quota (a container's
    limit).
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return cores


def memory_gb() -> float:
    """Memory this process may use, in units of 2^30 bytes: the machine's, or less in a control
    group (a container).
    """
    import psutil

    limits = [float(psutil.virtual_memory().total)]
    for name in (
        "memory.max",
        "memory/memory.limit_in_bytes",
    ):  # version 2 and 1 of control groups; "max" is no limit
        with contextlib.suppress(OSError, ValueError):
            limits.append(float((CGROUP / name).read_text()))
    return min(limits) / 2**30


def held_bytes(pid: int) -> int:
    """Memory of a process in bytes: its proportional set size (shared pages divided among those who
    share them) where Linux tells it in one look, its resident size elsewhere; 0 for a process that
    is gone.
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


def runs(pid: int) -> bool:
    """Whether a process still runs. A zombie does not: it has ended, holds no memory and no port,
    and waits for its parent to ask how; in a container whose first process never asks it waits for
    ever.
    """
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_gone(pids: Collection[int], seconds: float) -> bool:
    """Wait until none of the processes runs any more, `seconds` at most; whether that came true."""
    end = time.monotonic() + seconds
    while any(map(runs, pids)):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def version(package: str) -> str | None:
    """The installed version of a package, or None; nothing is imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def can(what: str) -> "Skip | bool":
    """True, or the Skip that says why not. `what`: "gpu", "vnni", "bf16", "compiler", "energy",
    "root", "full", "two cores", "package:NAME", or "N GB" of memory. A Skip is false, so that `if
    machine.can("gpu"):` guards a part.
    """
    if what.startswith("package:"):
        return _package(what.removeprefix("package:"))
    if gigabytes := re.fullmatch(r"(\d+(?:\.\d+)?) GB", what):
        return _memory(float(gigabytes[1]))
    if what not in _CHECKS:
        raise ValueError(f"can() knows {', '.join(_CHECKS)}, package:NAME and N GB, not {what!r}.")
    return _CHECKS[what]()


def skip(what: str, part: str) -> Skip:
    """Record that `part` of a chapter was left out for want of `what`, and return the Skip to
    show.
    """
    from course_utils import claims

    answer = can(what)
    if answer is True:
        raise ValueError(f"this machine has {what}: {part!r} must run, not be skipped.")
    claims.record("skip", kind=answer.kind, part=part, reason=answer.reason)
    return answer


def rapl_file() -> Path | None:
    """The package energy counter in microjoules, where Linux shows one (Intel and AMD, not in most
    virtual machines).
    """
    return next(iter(sorted(Path("/sys/class/powercap").glob("intel-rapl:0/energy_uj"))), None)


def _gpu() -> "Skip | bool":
    import torch

    return torch.cuda.is_available() or Skip(
        "gpu",
        "no NVIDIA GPU that this torch can use.",
        "In Colab: Runtime, Change runtime type, GPU.",
    )


def _vnni() -> "Skip | bool":
    found = {"avx512_vnni", "avx_vnni", "amx_int8", "dotprod", "i8mm"} & set(isa())
    return bool(found) or Skip(
        "isa", "this CPU has no INT8 dot-product instruction (VNNI, AMX or Arm's dotprod)."
    )


def _bf16() -> "Skip | bool":
    found = {"avx512_bf16", "amx_bf16", "bf16"} & set(isa())
    return bool(found) or Skip(
        "isa", "this CPU has no bf16 instruction (AVX512_BF16, AMX or Arm's bf16)."
    )


def _compiler() -> "Skip | bool":
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if os.environ.get("ATEN_CPU_CAPABILITY") == "default" or (is_x86 and "avx2" not in isa()):
        # seen with torch 2.14: the C++ that inductor writes uses at::vec, which its header leaves
        # out then
        return Skip(
            "isa",
            "without AVX2 (or with it capped) the C++ that torch.compile writes does not compile.",
        )
    found = any(
        shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++", "cl")
    )
    return found or Skip(
        "compiler",
        "no C++ compiler on the PATH.",
        "Debian and Ubuntu: apt install g++. macOS: xcode-select --install.",
    )


def _energy() -> "Skip | bool":
    path = rapl_file()
    if path is None:
        return Skip(
            "system",
            "this system shows no energy counter (RAPL): usual in virtual machines, on Arm, macOS"
            " and Windows.",
        )
    return os.access(path, os.R_OK) or Skip(
        "permission", "the energy counter can be read by root only.", f"sudo chmod a+r {path}"
    )


def _root() -> "Skip | bool":
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0 and sys.platform == "linux"
    return is_root or Skip(
        "permission", "this part makes network namespaces, which needs root on Linux."
    )


def _two_cores() -> "Skip | bool":
    return usable_cores() >= 2 or Skip("cores", "this machine lets the course use one core only.")


def _full() -> "Skip | bool":
    profile = os.environ.get("COURSE_PROFILE", "fast")
    return profile == "full" or Skip(
        "profile", f"this part runs in the profile full, and this is {profile}."
    )


def _package(name: str) -> "Skip | bool":
    spec = importlib.util.find_spec(name)
    return spec is not None or Skip(
        "package",
        f"the package {name} is not installed.",
        "make setup-extended, or the README's table of packages.",
    )


def _memory(gigabytes: float) -> "Skip | bool":
    have = memory_gb()
    return have >= gigabytes or Skip(
        "memory",
        f"{gigabytes:g} GB of memory are needed; this machine lets the course use {have:.1f}.",
    )


_CHECKS = {
    "gpu": _gpu,
    "vnni": _vnni,
    "bf16": _bf16,
    "compiler": _compiler,
    "energy": _energy,
    "root": _root,
    "two cores": _two_cores,
    "full": _full,
}


def _proc_cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.lower().startswith(key.lower())),
        "",
    )


def _cpu_name() -> str:
    return _proc_cpuinfo("model name") or platform.processor() or platform.machine()
