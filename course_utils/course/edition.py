"""The edition's own ledger: what the learner notebooks said when they were built. Pages, ledger,
the README's numbers and the capstone's table come from the same runs on the same machine.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import nbformat

from course_utils import ROOT, machine
from course_utils.course.chapters import Chapter, UsageError, chapters

LEDGER = ROOT / "build" / "edition" / "ledger.json"


def here() -> dict:
    """What must be the same for all pages: the processor, and the caps that change its answers."""
    card = machine.card()
    return {"cpu": card.cpu, "isa": list(card.isa), "caps": dict(card.caps)}


def made_on(path: Path) -> dict | None:
    """The machine on which a learner notebook was built; None where it does not say."""
    if not path.is_file():
        return None
    return nbformat.read(path, as_version=4).metadata.get("course", {}).get("machine")


def refuse_a_mixture(built: Iterable[Chapter]) -> None:
    """UsageError if a learner notebook that is not among those built now came from another machine:
    readers would compare two machines and take them for one.
    """
    now, mine = {chapter.name for chapter in built}, here()
    others = [chapter for chapter in chapters() if chapter.name not in now]
    found = {c.number: made_on(c.learner) for c in others if c.learner.is_file()}
    strange = sorted(number for number, other in found.items() if other not in (None, mine))
    if strange:
        raise UsageError(
            f"this machine is {mine['cpu']} with {', '.join(mine['isa'])}; chapters"
            f" {', '.join(strange)} were built on another one. Build all of them here (course"
            " build), or say --mix."
        )


def rows(events: Iterable[dict], profile: str) -> list[dict]:
    """The verdicts among `events`, the last of each claim, each with the machine it was reached on.
    Its card says the run's profile, which this process's environment need not have.
    """
    card = machine.card().as_dict() | {"profile": profile}
    found = {}
    for event in events:
        if event["event"] == "verdict":
            row = {key: value for key, value in event.items() if key != "event"}
            found[event["claim"]] = row | {"machine": card}
    return list(found.values())


def earlier(chapter: str) -> list[dict]:
    """What earlier chapters of this edition said on this machine; of the last `course run` where
    nothing was built yet.
    """
    mine = here()
    for path in (LEDGER, ROOT / "build" / "run" / "ledger.json"):
        rows = [row for row in _read(path) if row["chapter"] < chapter[:2]]
        if kept := [row for row in rows if _alike(row["machine"], mine)]:
            return kept
    return []


def keep(chapter: Chapter, events: Iterable[dict], profile: str) -> None:
    """Put what a chapter said into the edition's ledger in place of what it said before. What was
    said on another machine, under another cap, in other versions or in another profile goes: the
    one card of all rows would not be true of it.
    """
    new, card = rows(events, profile), machine.card().as_dict() | {"profile": profile}
    same = here() | {"versions": card["versions"], "profile": profile}
    old = [
        row | {"machine": card}
        for row in _read(LEDGER)
        if row["chapter"] != chapter.number and _alike(row["machine"], same)
    ]
    LEDGER.parent.mkdir(parents=True, exist_ok=True)
    part = LEDGER.with_suffix(".part")
    whole = sorted([*old, *new], key=lambda row: row["claim"])
    part.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(LEDGER)


def _alike(card: dict, wanted: dict) -> bool:
    """Whether a card, read from JSON, has these fields."""
    return json.loads(json.dumps(wanted)).items() <= card.items()


def _read(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
