"""What this machine is and what it can do: the card every chapter opens with, and typed skips for
what it lacks.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from course_utils import ROOT, allocator, cpu, ledger, notebook
from course_utils.card import Card
from course_utils.limits import memory_gb, usable_cores

CAPS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
"""Variables that hide instruction sets from oneDNN and from torch's own kernels, to see what a
lesser machine would say.
"""
PACKAGES = ("torch", "torchvision", "onnxruntime", "openvino")
SELFTEST = ROOT / "build" / "selftest.json"
_INT8 = ("avx512_vnni", "avx_vnni", "amx_int8", "dotprod", "i8mm")
_BF16 = ("avx512_bf16", "amx_bf16", "bf16")

__all__ = ["Card", "Skip", "can", "card", "isa", "memory_gb", "rapl_file", "skip", "usable_cores"]
__all__ += ["selftest", "version"]


@dataclass(frozen=True)
class Skip:
    """Why a part did not run. `kind` is one of KINDS, so that skips can be counted by cause.

    A Skip is false, so that `if machine.can("gpu"):` reads as it should.

    >>> Skip("gpu", "there is none.", "Borrow one.")
    Skipped (gpu): there is none. Borrow one.
    >>> bool(Skip("gpu", "there is none."))
    False
    """

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
        return False

    def __repr__(self) -> str:
        return f"Skipped ({self.kind}): {self.reason}" + (f" {self.remedy}" if self.remedy else "")


def card() -> Card:
    """The machine card, read from the machine now. In a notebook it also sets the kernel up (see
    `notebook.start`), because every chapter calls it first.

    >>> card().cores == usable_cores()
    True
    """
    import torch

    shown = Card(
        cpu=cpu.name(),
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
        model=cpu.model(),
        unknown=_silent(cpu.wanted() or ("all",)),
        allocator=allocator.STATE,
        selftest=selftest(),
    )
    if notebook.start():  # a reader's: the ledger says on which machine what follows was measured
        ledger.record("card", machine=shown.as_dict())
    return shown


def selftest() -> dict:
    """What `course selftest` found, if it has run on this processor; {} otherwise.

    >>> isinstance(selftest(), dict)
    True
    """
    try:
        found = json.loads(SELFTEST.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.get("cpu") == cpu.name() else {}


def isa() -> tuple[str, ...]:
    """Instruction sets that decide about INT8 and bf16 speed, e.g. ("avx2", "avx512_f",
    "avx512_vnni"): those that this CPU is known to have.

    >>> set(isa()) <= {*cpu.X86, *cpu.ARM}
    True
    """
    return tuple(name for name in cpu.wanted() if cpu.features().get(name))


def version(package: str) -> str | None:
    """The installed version of a package, or None; nothing is imported.

    >>> version("torch") is None, version("no-such-package") is None
    (False, True)
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def can(what: str) -> "Skip | bool":
    """True, or the Skip that says why not. `what`: "gpu", "vnni", "bf16", "compiler", "energy",
    "root", "full", "signals", "two cores", "package:NAME", or "N GB" of memory. A Skip is false, so
    that `if machine.can("gpu"):` guards a part.

    >>> can("package:torch"), can("1000000 GB").kind
    (True, 'memory')
    """
    if what.startswith("package:"):
        return _package(what.removeprefix("package:"))
    if gigabytes := re.fullmatch(r"(\d+(?:\.\d+)?) GB", what):
        return _memory(float(gigabytes[1]))
    if what not in _CHECKS:
        raise ValueError(f"can() knows {', '.join(_CHECKS)}, package:NAME and N GB, not {what!r}.")
    return _CHECKS[what]()


def skip(what: str, part: str) -> Skip:
    """Record that `part` of a chapter was left out for want of `what`, and return the Skip to show.
    ValueError where this machine has it.

    >>> skip("package:nowhere", "the comparison with nowhere").kind
    'package'
    """
    answer = can(what)
    if answer is True:
        raise ValueError(f"this machine has {what}: {part!r} must run, not be skipped.")
    ledger.record("skip", kind=answer.kind, part=part, reason=answer.reason)
    return answer


def rapl_file() -> Path | None:
    """The package energy counter in microjoules, where Linux shows one (Intel and AMD, not in most
    virtual machines).

    >>> rapl_file() is None or rapl_file().name == "energy_uj"
    True
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
    return _instruction(_INT8, "INT8 dot-product", "VNNI, AMX or Arm's dotprod")


def _bf16() -> "Skip | bool":
    return _instruction(_BF16, "bf16", "AVX512_BF16, AMX or Arm's bf16")


def _instruction(sets: tuple[str, ...], what: str, names: str) -> "Skip | bool":
    """Whether this CPU has one of the sets. No is said only where the system denies all of them."""
    if set(isa()) & set(sets):
        return True
    if not cpu.wanted() or _silent(set(cpu.wanted()) & set(sets)):
        reason = (
            f"this system does not tell whether the CPU has an instruction for {what} ({names})."
        )
        return Skip("isa", reason)
    return Skip("isa", f"this CPU has no {what} instruction ({names}).")


def _silent(sets: Iterable[str]) -> tuple[str, ...]:
    """The sets of which this system does not tell."""
    return tuple(name for name in sets if name not in cpu.features())


def _compiler() -> "Skip | bool":
    no_avx2 = cpu.architecture() == "x86" and not cpu.features().get("avx2", True)
    if os.environ.get("ATEN_CPU_CAPABILITY") == "default" or no_avx2:
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


def _signals() -> "Skip | bool":
    return all(hasattr(signal, name) for name in ("SIGUSR1", "SIGSTOP", "SIGCONT")) or Skip(
        "system", "this system has no signals that ask or pause a process (SIGUSR1, SIGSTOP)."
    )


def _two_cores() -> "Skip | bool":
    return usable_cores() >= 2 or Skip("cores", "this machine lets the course use one core only.")


def _full() -> "Skip | bool":
    profile = os.environ.get("COURSE_PROFILE", "fast")
    reason = f"this part runs in the profile full, and this is {profile}."
    return profile == "full" or Skip("profile", reason)


_USUAL = "Get it with: make setup; DeepSpeed and Model Optimizer with: make setup-extended."
_REMEDIES = {  # what no set-up of the course installs: it would fix the versions of too much else
    "executorch": "Get it with: pip install executorch, in an environment of its own.",
}


def _package(name: str) -> "Skip | bool":
    missing = Skip("package", f"the package {name} is not installed.", _REMEDIES.get(name, _USUAL))
    return importlib.util.find_spec(name) is not None or missing


def _memory(gigabytes: float) -> "Skip | bool":
    have = memory_gb()
    reason = f"{gigabytes:g} GB of memory are needed; this machine lets the course use {have:.1f}."
    return have >= gigabytes or Skip("memory", reason)


_CHECKS = {
    "gpu": _gpu,
    "vnni": _vnni,
    "bf16": _bf16,
    "compiler": _compiler,
    "energy": _energy,
    "root": _root,
    "signals": _signals,
    "two cores": _two_cores,
    "full": _full,
}
