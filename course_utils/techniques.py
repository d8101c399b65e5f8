"""Which technique when, and what a ledger says about the claims made for it."""

import html
import tomllib
from dataclasses import dataclass

from course_utils import claims


def _fill(verdict: str | None) -> str:
    """Black on the verdict's colour; where there is none, as the page has it."""
    return f"background:{claims.FILLS[verdict]};color:#000;padding:0 4px" if verdict else ""


@dataclass(frozen=True)
class Techniques:
    """Which technique when, with what a ledger says about the claims made for it; shows itself as a
    table.

    >>> said = (("99.twice", "It is twice as fast.", claims.HOLDS),)
    >>> row = {"name": "Pruning", "chapters": ["03"], "try_when": "…", "leave_when": "…"}
    >>> Techniques((row | {"verdicts": said},))
    Pruning (03)
        holds: It is twice as fast.
    """

    rows: tuple[
        dict, ...
    ]  # name, chapters, try_when, leave_when, and verdicts: (claim, statement, verdict or None)

    def __repr__(self) -> str:
        lines = []
        for row in self.rows:
            words = ((claims.WORDS.get(v, "not run"), text) for _, text, v in row["verdicts"])
            said = [f"{word}: {text}" for word, text in words]
            lines.append("\n    ".join([f"{row['name']} ({', '.join(row['chapters'])})", *said]))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        e, body = html.escape, ""
        for row in self.rows:
            said = "<br>".join(
                f"<span title='{e(claim)}' style='{_fill(v)}'>"
                f"{claims.WORDS.get(v, 'not run')}</span> {e(statement)}"
                for claim, statement, v in row["verdicts"]
            )
            cells = (
                f"<b>{e(row['name'])}</b> ({', '.join(row['chapters'])})",
                e(row["try_when"]),
                e(row["leave_when"]),
                said,
            )
            body += (
                "<tr>"
                + "".join(f"<td style='text-align:left;vertical-align:top'>{c}</td>" for c in cells)
                + "</tr>"
            )
        head = "".join(
            f"<th style='text-align:left'>{h}</th>"
            for h in (
                "technique (chapter)",
                "try it when",
                "leave it when",
                "what is promised of it, and what this machine said",
            )
        )
        return f"<table><tr>{head}</tr>{body}</table>"


def table(rows: list[dict]) -> Techniques:
    """Which technique when, from a ledger's rows (`ledger.verdicts()`, or a ledger.json). Raises
    ClaimError for an unknown claim.

    >>> [row["name"] for row in table([]).rows if "03" in row["chapters"]]
    ['...']
    """
    said = {row["claim"]: row["verdict"] for row in rows}
    entries = tomllib.loads((claims.FOLDER / "techniques.toml").read_text(encoding="utf-8"))
    made = []
    for name, entry in entries.items():
        row = {"name": name, **{k: entry[k] for k in ("chapters", "try_when", "leave_when")}}
        promised = ((i, claims.find(i).statement, said.get(i)) for i in entry["claims"])
        made.append(row | {"verdicts": tuple(promised)})
    return Techniques(tuple(made))
