"""The glossary page from TEACHING's table, and where its terms are linked from."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from course_utils import ROOT

FILE = "glossary.json"
EVERYDAY = {"acceptance", "capacity", "engine", "kernel", "scale", "temperature", "token"}
"""Not linked: in a sentence these are as often the ordinary word, or another meaning."""
ROW = re.compile(r"^\| (.+?) \| (.+?) \| (.+?) \|$", re.M)


@dataclass(frozen=True)
class Term:
    """One line of the table: all names under which it is met, in English and in Chinese."""

    english: str
    chinese: str
    meaning: str

    @property
    def anchor(self) -> str:
        return "term-" + re.sub(r"[\W_]+", "-", self.english.lower()).strip("-")

    @property
    def names(self) -> list[str]:
        """ "multiply–accumulate (MAC)" is met under two names, "open loop, closed loop", too."""
        return [name.strip() for name in re.split(r"[,()]", self.english) if name.strip()]


def terms() -> list[Term]:
    """All terms of TEACHING's table Words, in its order."""
    table = (ROOT / "TEACHING.md").read_text(encoding="utf-8").split("## Words\n")[1]
    rows = [Term(*found) for found in ROW.findall(table)]
    return [row for row in rows if row.english != "English" and "---" not in row.english]


def write(target: Path, found: list[Term]) -> None:
    """glossary.md by alphabet, and the list of names for the links. TEACHING's table gives way to a
    link.
    """
    lines = ["# Glossary", "", "The course's words, in English and Chinese.", ""]
    for term in sorted(found, key=lambda term: term.english.lower()):
        lines += [
            f"[{term.english}]{{#{term.anchor}}} · [{term.chinese}]{{.zh}}",
            f": {term.meaning}",
            "",
        ]
    (target / "glossary.md").write_text("\n".join(lines), encoding="utf-8")
    links = [asdict(term) for term in found]
    (target / FILE).write_text(json.dumps(links, ensure_ascii=False), encoding="utf-8")
    page = target / "teaching.md"
    text = page.read_text(encoding="utf-8").split("## Words\n")[0]
    page.write_text(f"{text}## Words\n\nSee the [glossary](glossary.md).\n", encoding="utf-8")


def names(folder: Path) -> dict[str, Term]:
    """Each linked name, in small letters unless it is an abbreviation, with its term."""
    rows = json.loads((folder / FILE).read_text(encoding="utf-8"))
    found = {name: term for term in (Term(**row) for row in rows) for name in term.names}
    return {name: term for name, term in found.items() if name not in EVERYDAY}


def pattern(known: list[str]) -> re.Pattern:
    """Finds any of the names, whole, also in the plural, and with a capital at a sentence's head.

    >>> pattern(["arm", "MAC"]).findall("Arms and a farm, MACs and a mac")
    ['Arm', 'MAC']
    """
    ordered = sorted(known, key=len, reverse=True)
    each = [f"[{n[0].upper()}{n[0]}]{re.escape(n[1:])}" for n in ordered]
    return re.compile(rf"(?<![\w-])({'|'.join(each)})(?:s|es)?(?![\w-])")
