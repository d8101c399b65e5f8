"""The machine card as text and as HTML."""

import html
from dataclasses import asdict, dataclass, field

__all__ = ["Card"]


@dataclass(frozen=True)
class Card:
    """One machine, as far as it matters for speed. `isa` holds the instruction sets that change a
    verdict, `unknown` those of which the system does not tell. Memory is in units of 2^30 bytes.

    >>> machine = ("Some CPU", "x86_64", ("avx2",), 2, 2, 7.5, "none")
    >>> Card(*machine, "Linux 6", "3.12", versions={}, profile="fast")
    CPU               Some CPU (x86_64)
    Cores             2, torch's threads: 2
    Instruction sets  avx2
    Memory            7.5 GB
    GPU               none
    System            Linux 6, Python 3.12
    Profile           fast
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
    model: str = ""  # e.g. "family 6, model 143, stepping 8"
    unknown: tuple[str, ...] = ()
    allocator: str = ""
    selftest: dict = field(default_factory=dict)  # what `course selftest` found on this machine

    def as_dict(self) -> dict:
        return asdict(self)

    def _rows(self) -> list[tuple[str, str]]:
        model = f", {self.model}" if self.model not in ("", self.cpu) else ""
        sets = ", ".join(self.isa)
        if self.unknown:
            sets = f"{sets}; not known: {', '.join(self.unknown)}" if sets else "not known"
        rows = {
            "CPU": f"{self.cpu} ({self.architecture}){model}",
            "Cores": f"{self.cores}, torch's threads: {self.threads}",
            "Instruction sets": sets or "none of those that the course looks for",
            "Capped": ", ".join(f"{name}={cap}" for name, cap in self.caps.items()),
            "Memory": f"{self.memory_gb:.1f} GB",
            "Allocator": self.allocator,
            "Self-test": self.selftest.get("summary", ""),
            "GPU": self.gpu,
            "System": f"{self.system}, Python {self.python}",
            "Versions": ", ".join(f"{k} {v}" for k, v in self.versions.items()),
            "Profile": self.profile,
        }
        return [(name, value) for name, value in rows.items() if value]

    def __repr__(self) -> str:
        return "\n".join(f"{name:17} {value}" for name, value in self._rows())

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{name}</th><td"
            f" style='text-align:left'>{html.escape(value)}</td></tr>"
            for name, value in self._rows()
        )
        return f"<table><caption>This machine</caption>{rows}</table>"
