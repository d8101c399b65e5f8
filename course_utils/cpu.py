"""What the processor is called and which instructions it has, as far as the system tells."""

import ctypes
import functools
import platform
import subprocess
import sys
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
X86 = ("avx2", "avx512_f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
ARM = ("dotprod", "i8mm", "bf16", "sve")
_LINUX = {  # a flag of /proc/cpuinfo that is spelt otherwise than our name
    "avx512_f": "avx512f",
    "dotprod": "asimddp",
}
_MACOS = {
    "dotprod": "hw.optional.arm.FEAT_DotProd",
    "i8mm": "hw.optional.arm.FEAT_I8MM",
    "bf16": "hw.optional.arm.FEAT_BF16",
}
_TORCH = {"dotprod": "dot"}
_WINDOWS_DOTPROD = 43  # PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE, winnt.h

__all__ = ["architecture", "features", "model", "name", "wanted"]


def architecture() -> str:
    """Which family of processors: "x86", "arm" or, for any other, what the system calls it.

    >>> architecture() != ""
    True
    """
    found = platform.machine().lower()
    kinds = {"x86_64": "x86", "amd64": "x86", "aarch64": "arm", "arm64": "arm"}
    return kinds.get(found, found)


def wanted() -> tuple[str, ...]:
    """The instruction sets that the course looks for on this kind of processor.

    >>> wanted() in (X86, ARM, ())
    True
    """
    return {"x86": X86, "arm": ARM}.get(architecture(), ())


@functools.cache
def features() -> dict[str, bool]:
    """Instruction sets that decide about INT8 and bf16 speed, each with whether this CPU has it.

    A set of which the system does not tell is not in the answer: "not known" is no "no".

    >>> set(features()) <= {*X86, *ARM}
    True
    """
    kind = architecture()
    sets = wanted()
    listed = _cpuinfo("flags" if kind == "x86" else "Features").split()
    if kind == "arm" and listed:
        return {name: _LINUX.get(name, name) in listed for name in sets}
    told = _from_torch(sets)
    if kind == "arm":
        # torch's library asks the system, too, and says no where it gets no answer
        found = {name: True for name, has in told.items() if has}
        return found | (_macos() if sys.platform == "darwin" else _windows())
    if not told and listed:
        return {name: _LINUX.get(name, name) in listed for name in sets}
    return told


def _from_torch(sets: tuple[str, ...]) -> dict[str, bool]:
    import torch

    told = getattr(torch.cpu, "get_capabilities", dict)()
    spelt = {name: _TORCH.get(name, name) for name in sets}
    return {name: told[key] for name, key in spelt.items() if isinstance(told.get(key), bool)}


def _macos() -> dict[str, bool]:
    found = {}
    for name, key in _MACOS.items():
        try:
            asked = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True)
        except OSError:
            return {}
        if asked.stdout.strip() in ("0", "1"):  # an older system does not know the key
            found[name] = asked.stdout.strip() == "1"
    return found


def _windows() -> dict[str, bool]:
    kernel32 = getattr(getattr(ctypes, "windll", None), "kernel32", None)
    if kernel32 is None:
        return {}
    return {"dotprod": bool(kernel32.IsProcessorFeaturePresent(_WINDOWS_DOTPROD))}


def name() -> str:
    """What the processor is called, e.g. "AMD EPYC".

    >>> name() != ""
    True
    """
    return _cpuinfo("model name") or platform.processor() or platform.machine() or "unknown"


def model() -> str:
    """Family, model and stepping, which tell apart processors of one name; "" if not known.

    >>> model()  # doctest: +SKIP
    'family 6, model 143, stepping 8'
    """
    keys = {"family": "cpu family", "model": "model", "stepping": "stepping"}
    numbers = {word: _cpuinfo(key) for word, key in keys.items()}
    told = ", ".join(f"{word} {number}" for word, number in numbers.items() if number)
    return told or platform.processor()


def _cpuinfo(key: str) -> str:
    """The first value of a key of /proc/cpuinfo; "" where there is none."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return ""
    pairs = (line.partition(":") for line in lines)
    return next((v.strip() for k, _, v in pairs if k.strip().lower() == key.lower()), "")
