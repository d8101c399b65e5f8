"""Ledgers into one page and one picture: claims × machines, for one reader or a whole class."""

import base64
import html
import io
import json
from pathlib import Path

from course_utils import ledger, techniques
from course_utils.claims import FILLS, WORDS
from course_utils.course.chapters import UsageError

FIELDS = {
    "claim",
    "chapter",
    "statement",
    "value",
    "low",
    "high",
    "unit",
    "verdict",
    "reason",
    "machine",
}


def read(path: Path) -> list[dict]:
    """A ledger's rows: of a ledger.json that `course run` wrote, or of a reader's own
    ledger.jsonl. UsageError, naming the file, if it is none.
    """
    if path.suffix == ".jsonl":
        return _own(path)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}.") from None
    except ValueError:
        raise UsageError(
            f"{path} is no ledger: it is not JSON. A ledger is the ledger.json that `course run`"
            " writes, or a reader's ledger.jsonl."
        ) from None
    if not isinstance(rows, list) or not rows:
        raise UsageError(
            f"{path} is no ledger, or an empty one: it must be a list with at least one verdict."
        )
    for row in rows:
        if not isinstance(row, dict) or not row.keys() >= FIELDS:
            missing = sorted(FIELDS - row.keys()) if isinstance(row, dict) else "every field"
            raise UsageError(f"{path} is no ledger: an entry lacks {missing}.")
        if row["verdict"] not in WORDS:
            raise UsageError(f"{path} is no ledger: {row['verdict']!r} is no verdict.")
    return rows


def _own(path: Path) -> list[dict]:
    """The last verdict of each claim in a reader's ledger, each with the machine whose card was
    shown before it.
    """
    if not path.is_file():
        raise UsageError(f"cannot read {path}: there is no such file. Run a chapter first.")
    rows, machine = {}, {}
    for event in ledger.events(path):
        if event["event"] == "card" and isinstance(event.get("machine"), dict):
            machine = event["machine"]
        elif event["event"] == "verdict":
            row = {"machine": machine} | event
            if row.keys() >= FIELDS and row["verdict"] in WORDS:
                rows[row["claim"]] = row
    if not rows:
        raise UsageError(f"{path} holds no verdict yet: run a chapter first.")
    return list(rows.values())


def report(paths: list[Path], folder: Path) -> list[Path]:
    """Write report.html (self-contained) and report.png into `folder`, and for a single ledger
    techniques.html, which technique when; each whole or not at all. One ledger is drawn by chapter,
    several as claims × machines.
    """
    ledgers = [read(path) for path in paths]
    names = [machine_name(rows[0]["machine"]) for rows in ledgers]
    names = [f"{n} ({i + 1})" if names.count(n) > 1 else n for i, n in enumerate(names)]
    claims = list({row["claim"]: row for rows in ledgers for row in rows}.values())
    claims.sort(key=lambda row: row["claim"])
    by_machine = [{row["claim"]: row for row in rows} for rows in ledgers]
    picture = draw(claims, names, by_machine) if len(ledgers) > 1 else overview(ledgers[0])
    files = {
        "report.html": render(claims, names, by_machine, picture).encode(),
        "report.png": picture,
    }
    if len(ledgers) == 1:
        table = techniques.table(ledgers[0])._repr_html_()
        files["techniques.html"] = page(
            "Which technique when", f"<p>{html.escape(names[0])}.</p>{table}"
        ).encode()
    for name, content in files.items():
        part = folder / f"{name}.part"
        part.write_bytes(content)
        part.replace(folder / name)
    return [folder / name for name in files]


def overview(rows: list[dict]) -> bytes:
    from course_utils import plots

    buffer = io.BytesIO()
    plots.verdicts(rows).savefig(
        buffer, format="png", bbox_inches="tight", metadata={"Software": None}
    )
    return buffer.getvalue()


def machine_name(card: dict) -> str:
    best = card["isa"][-1] if card.get("isa") else card.get("architecture", "?")
    caps = "".join(f", {name}={cap}" for name, cap in card.get("caps", {}).items())
    cores = card.get("cores", "?")
    return f"{card.get('cpu', '?')}, {cores} core{'' if cores == 1 else 's'}, {best}{caps}"


def draw(claims: list[dict], names: list[str], by_machine: list[dict]) -> bytes:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(
        figsize=(6.5 + 1.1 * len(names), 0.3 * len(claims) + 1.2), layout="constrained", dpi=110
    )
    ax = figure.subplots()
    for column, rows in enumerate(by_machine):
        for row, claim in enumerate(claims):
            if claim["claim"] not in rows:
                continue
            verdict = rows[claim["claim"]]["verdict"]
            ax.add_patch(Rectangle((column, row), 0.94, 0.9, color=FILLS[verdict]))
            ax.text(column + 0.47, row + 0.5, WORDS[verdict], ha="center", va="center", fontsize=8)
    ax.set(xlim=(0, len(names)), ylim=(len(claims), 0))
    ax.set_yticks(
        [i + 0.45 for i in range(len(claims))],
        [f"{c['claim']}  {shorten(c['statement'], 62)}" for c in claims],
        fontsize=8,
    )
    ax.set_xticks(
        [i + 0.47 for i in range(len(names))],
        [n.replace(", ", "\n").replace("=", "\n= ") for n in names],
        fontsize=7,
    )
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def render(claims: list[dict], names: list[str], by_machine: list[dict], picture: bytes) -> str:
    e = html.escape
    head = "".join(f"<th>{e(n)}</th>" for n in names)
    body = ""
    for claim in claims:
        answers = "".join(_cell(rows.get(claim["claim"])) for rows in by_machine)
        body += f"<tr><td>{e(claim['claim'])}</td><td>{e(claim['statement'])}</td>{answers}</tr>"
    counts = "; ".join(f"{e(n)}: {_count(rows)}" for n, rows in zip(names, by_machine, strict=True))
    image = base64.b64encode(picture).decode()
    alt = "One row a claim, one column a machine; the table below says the same."
    if len(names) == 1:
        alt = "One row a chapter, one square a claim; the table below says the same."
    return page(
        "Claims, measured here",
        f'<p>{counts}.</p><img alt="{alt}" src="data:image/png;base64,{image}">'
        f"<table><tr><th>claim</th><th>statement</th>{head}</tr>{body}</table>",
    )


def page(title: str, body: str) -> str:
    """A page that needs nothing from elsewhere."""
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body{{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto}}
body{{padding:0 1rem;color:#222}}
table{{border-collapse:collapse}}
td,th{{border:1px solid #ddd;padding:.3rem .6rem;text-align:left;vertical-align:top}}
img{{max-width:100%}}small{{color:#555}}</style>
<h1>{title}</h1>{body}</html>
"""


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rsplit(" ", 1)[0] + " …"


def _cell(row: dict | None) -> str:
    if row is None:
        return "<td></td>"
    measured = html.escape(row["reason"])
    if row["value"] is not None:
        measured = html.escape(
            f"{row['value']:.3g} [{row['low']:.3g}, {row['high']:.3g}] {row['unit']}"
        )
    stand_in = (
        f"<br><small>on a stand-in: {html.escape(row['stand_in'])}</small>"
        if row.get("stand_in")
        else ""
    )
    fill = FILLS[row["verdict"]]
    return f"<td style='background:{fill}'><b>{row['verdict']}</b><br>{measured}{stand_in}</td>"


def _count(rows: dict) -> str:
    verdicts = [row["verdict"] for row in rows.values()]
    return ", ".join(f"{verdicts.count(v)} {v}" for v in WORDS if v in verdicts)
