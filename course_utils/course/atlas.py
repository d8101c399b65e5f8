"""The atlas: whole ledgers of machines, kept in datasets/ledgers/, one JSON file a machine.

A ledger answers the claims as they were worded when it was measured. `asked` is the fingerprint of
that wording: where a claim has been changed since, the old answer is left out and counted, never
shown beside a question that it was not asked.
"""

import hashlib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from course_utils import ROOT, claims
from course_utils.claims import Claim, Verdict
from course_utils.course.chapters import UsageError

FOLDER = ROOT / "datasets" / "ledgers"
FORMAT = 1
FIELDS = ("format", "name", "date", "commit", "machine", "verdicts")
ROW = ("claim", "asked", "value", "low", "high", "verdict", "reason", "scope")
KINDS = {
    "avx2": "a CPU with AVX2 only",
    "vnni": "a CPU with VNNI",
    "bf16": "a CPU with VNNI and bf16",
    "arm": "an Arm CPU",
    "other": "another CPU",
}
WANTED = ("avx2", "vnni", "bf16")
"""The kinds of which the atlas says that they are missing, if they are."""


@dataclass(frozen=True)
class Ledger:
    """What one machine said: its card and, by claim, the rows whose question is still asked in the
    same words. `dropped` counts the others.
    """

    name: str
    date: str
    commit: str
    machine: dict
    rows: dict[str, dict]
    dropped: int = 0

    @property
    def kind(self) -> str:
        """One of KINDS, by what the processor has; a cap does not change it."""
        return kind(self.machine)

    @property
    def capped(self) -> str:
        """The caps under which it ran, e.g. "ONEDNN_MAX_CPU_ISA=AVX2"; "" without one."""
        return ", ".join(f"{name}={cap}" for name, cap in self.machine.get("caps", {}).items())

    @property
    def label(self) -> str:
        """For a reader: processor, cores, kind, and the cap."""
        cores = self.machine.get("cores", "?")
        plural = "" if cores == 1 else "s"
        best = KINDS[self.kind].removeprefix("a CPU with ")
        capped = f", capped by {self.capped}" if self.capped else ""
        return f"{self.machine.get('cpu', '?')}, {cores} core{plural}, {best}{capped}"

    def verdict(self, claim: Claim) -> Verdict | None:
        """What this machine says about `claim`; None where it was not asked."""
        row = self.rows.get(claim.id)
        if row is None:
            return None
        numbers = (row["value"], row["low"], row["high"])
        return Verdict(claim, row["verdict"], *numbers, row["reason"], row["scope"])


def kind(card: Mapping) -> str:
    """One of KINDS: what decides about INT8 and bf16 on this processor."""
    isa = set(card.get("isa", ()))
    if card.get("architecture", "").lower() in ("aarch64", "arm64"):
        return "arm"
    if isa & {"avx512_vnni", "avx_vnni", "amx_int8"}:
        return "bf16" if isa & {"avx512_bf16", "amx_bf16"} else "vnni"
    return "avx2" if "avx2" in isa else "other"


def asked(claim: Claim) -> str:
    """Twelve digits that change when the claim's question changes."""
    question = [claim.statement, claim.condition, *map(str, claim.band), claim.unit, claim.stand_in]
    return hashlib.sha256(json.dumps(question).encode()).hexdigest()[:12]


def read(path: Path) -> Ledger:
    """One file of the atlas. UsageError, naming the file, where it is none."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path.name} is no ledger of the atlas: {error}.") from None
    fields = whole.keys() if isinstance(whole, dict) else ()
    if set(fields) != set(FIELDS) or whole["format"] != FORMAT:
        raise UsageError(
            f"{path.name} is no ledger of the atlas: it must have {', '.join(FIELDS)}, and format"
            f" {FORMAT}. `course contribute` writes such files."
        )
    for row in whole["verdicts"]:
        if set(row) != set(ROW) or row["verdict"] not in claims.WORDS:
            raise UsageError(f"{path.name}: an entry is not {', '.join(ROW)}: {row}.")
    if path.stem != whole["name"]:
        raise UsageError(f"{path.name} calls itself {whole['name']!r}: both must be the same.")
    known = {claim.id: asked(claim) for claim in claims.registry().values()}
    rows = {r["claim"]: r for r in whole["verdicts"] if known.get(r["claim"]) == r["asked"]}
    head = {key: whole[key] for key in ("name", "date", "commit", "machine")}
    return Ledger(**head, rows=rows, dropped=len(whole["verdicts"]) - len(rows))


def load(folder: Path = FOLDER) -> list[Ledger]:
    """All ledgers of the atlas: the wanted kinds in order, uncapped ones first, then by date."""
    ledgers = [read(path) for path in sorted(folder.glob("*.json"))]
    order = list(KINDS)
    return sorted(ledgers, key=lambda one: (order.index(one.kind), one.capped, one.date))


def missing(ledgers: Iterable[Ledger]) -> list[str]:
    """The wanted kinds of which there is no ledger but, at most, a capped one."""
    have = {one.kind for one in ledgers if not one.capped}
    return [KINDS[kind] for kind in WANTED if kind not in have]


def techniques() -> dict[str, dict]:
    """notebooks/claims/techniques.toml: by name, chapters, try_when, leave_when and claims."""
    return tomllib.loads((claims.FOLDER / "techniques.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Scale:
    """Where numbers lie on a forest plot, in percent of its width. Ratios are drawn on a
    logarithmic axis: twice as fast and half as fast are equally far from 1.
    """

    low: float
    high: float
    logarithmic: bool

    def at(self, x: float) -> float:
        """0 to 100; what lies beyond an end is drawn at the end."""
        if self.logarithmic:
            x = math.log(x) if x > 0 else -math.inf
        return min(max(100 * (x - self.low) / (self.high - self.low), 0.0), 100.0)

    def end(self, which: int) -> float:
        """The number at the left end (0) or at the right end (1)."""
        x = (self.low, self.high)[which]
        return math.exp(x) if self.logarithmic else x


def scale(claim: Claim, verdicts: Iterable[Verdict]) -> Scale:
    """The axis on which the claim's band and all measured intervals can be seen."""
    numbers = [x for v in verdicts for x in (v.low, v.value, v.high) if x is not None]
    numbers = [x for x in (*numbers, *claim.band) if math.isfinite(x)]
    ratios = claim.unit.startswith("x") and all(x > 0 for x in numbers)
    if ratios:
        numbers = [math.log(x) for x in (*numbers, 1.0)]
    low, high = min(numbers, default=0.0), max(numbers, default=1.0)
    pad = 0.08 * (high - low) or 0.5
    return Scale(low - pad, high + pad, ratios)
