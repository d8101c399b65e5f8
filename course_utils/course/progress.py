"""How far a reader has come, from the workbook's notebooks and the reader's own ledger: a table for
the terminal, a page, and what to do next.
"""

import html
import re
from dataclasses import dataclass, field
from pathlib import Path

from course_utils import ledger
from course_utils.course import report, workbook
from course_utils.course.chapters import Chapter, UsageError

PASSED = "passed"


@dataclass(frozen=True)
class Row:
    """One chapter: code cells that ran, exercises by id with their last status and the number of
    attempts, predictions made, verdicts by word.
    """

    chapter: Chapter
    ran: int
    cells: int
    exercises: dict[str, tuple[str, int]] = field(default_factory=dict)
    predictions: int = 0
    verdicts: dict[str, int] = field(default_factory=dict)
    trouble: str = ""

    @property
    def passed(self) -> int:
        return sum(status == PASSED for status, _ in self.exercises.values())


def gather(chapters: list[Chapter], folder: Path, events: list[dict]) -> list[Row]:
    """One row a chapter."""
    return [_row(chapter, folder / f"{chapter.name}.ipynb", events) for chapter in chapters]


def _row(chapter: Chapter, path: Path, events: list[dict]) -> Row:
    trouble, code = "", []
    shipped = workbook.read(chapter.learner)
    if path.exists():
        try:
            code = [c for c in workbook.read(path).cells if c.cell_type == "code"]
        except UsageError as error:
            trouble = str(error)
    names = {name: ("", 0) for _, name in workbook._exercises(shipped)}
    tried = [e for e in events if e["event"] == "check" and e.get("exercise") in names]
    for event in tried:
        before, count = names[event["exercise"]]
        best = PASSED if PASSED in (before, event["status"]) else event["status"]
        names[event["exercise"]] = (best, count + 1)
    mine = f"{chapter.number}."
    verdicts: dict[str, int] = {}
    last = {e["claim"]: e for e in events if e["event"] == "verdict" and "verdict" in e}
    for event in last.values():
        if event["claim"].startswith(mine):
            verdicts[event["verdict"]] = verdicts.get(event["verdict"], 0) + 1
    asked = {e["question"] for e in events if e["event"] == "prediction"}
    whole = len(code) or sum(c.cell_type == "code" for c in shipped.cells)
    return Row(
        chapter,
        sum(c.execution_count is not None for c in code),
        whole,
        names,
        sum(question.startswith(mine) for question in asked),
        verdicts,
        trouble,
    )


def table(rows: list[Row]) -> str:
    """The rows for a terminal."""
    lines = [f"{'chapter':26}{'cells run':>12}{'predictions':>13}{'exercises':>24}  verdicts"]
    for row in rows:
        exercises = " ".join(_short(name, *told) for name, told in row.exercises.items())
        verdicts = ", ".join(f"{n} {word}" for word, n in row.verdicts.items())
        cells = f"{row.ran} of {row.cells}"
        lines.append(
            f"{row.chapter.name[:25]:26}{cells:>12}{row.predictions or '':>13}{exercises:>24} "
            f" {row.trouble or verdicts}"
        )
    lines += ["", "A✓2: passed, in two attempts. B✗1: tried once, not passed yet.", after(rows)]
    return "\n".join(lines)


def _short(name: str, status: str, attempts: int) -> str:
    mark = "✓" if status == PASSED else "✗" if attempts else "–"
    return f"{name.split('.')[1]}{mark}{attempts or ''}"


def after(rows: list[Row]) -> str:
    """What to do next, in a sentence."""
    started = [row for row in rows if row.ran or any(n for _, n in row.exercises.values())]
    for row in started:
        open_ = [name for name, (status, _) in row.exercises.items() if status != PASSED]
        if open_:
            return f"Next: exercise {open_[0]}, in {row.chapter.name}."
        if row.ran < row.cells:
            return f"Next: {row.cells - row.ran} cells of {row.chapter.name} have not run."
    for row in rows:
        if row not in started:
            return f"Next: {row.chapter.name}."
    return "Every chapter has been read and every exercise passed."


def page(rows: list[Row], events: list[dict]) -> str:
    """The same as a page that needs nothing from elsewhere, with the predictions."""
    e = html.escape
    body = f"<p><b>{e(after(rows))}</b></p><table><thead><tr><th>chapter</th><th>cells run</th>"
    body += "<th>predictions</th><th>exercises</th><th>verdicts</th></tr></thead><tbody>"
    for row in rows:
        exercises = "<br>".join(
            f"{e(name)}: {e(status or 'not tried')}" + (f", {n} attempts" if n > 1 else "")
            for name, (status, n) in row.exercises.items()
        )
        verdicts = "<br>".join(f"{n} {e(word)}" for word, n in row.verdicts.items())
        body += f"<tr><th>{e(row.chapter.name)}</th><td>{row.ran} of {row.cells}</td>"
        body += f"<td>{row.predictions or ''}</td><td>{exercises}</td>"
        body += f"<td>{e(row.trouble) or verdicts}</td></tr>"
    return report.page("My progress", body + "</tbody></table>" + predictions(events))


def predictions(events: list[dict]) -> str:
    """What the reader predicted, beside what came out, as a table and a picture."""
    made = {e["question"]: e for e in events if e["event"] == "prediction"}
    pairs = [e for e in made.values() if _number(e.get("guess")) and _number(e.get("measured"))]
    if not pairs:
        return "<h2>Predictions</h2><p>None yet that came out.</p>"
    lines = "".join(
        f"<tr><td>{html.escape(e['question'])}</td><td>{e['guess']:.3g}</td>"
        f"<td>{e['measured']:.3g} {html.escape(e.get('unit', ''))}</td></tr>"
        for e in pairs
    )
    within = sum(within_two(e["guess"], e["measured"]) for e in pairs)
    return (
        f"<h2>Predictions</h2><p>{within} of {len(pairs)} within a factor of two.</p>"
        f"{_picture(pairs)}<table><thead><tr><th>question</th><th>I predicted</th><th>measured</th>"
        f"</tr></thead><tbody>{lines}</tbody></table>"
    )


def within_two(guess: float, measured: float) -> bool:
    """Whether a guess is at most twice and at least half of what was measured.

    >>> within_two(1.5, 3), within_two(1.4, 3), within_two(0, 0), within_two(-1, 1)
    (True, False, True, False)
    """
    return guess == measured or (guess * measured > 0 and 0.5 <= guess / measured <= 2)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _picture(pairs: list[dict]) -> str:
    """Guess against measured on logarithmic axes, as SVG in the page itself."""
    import io

    import matplotlib as mpl

    from course_utils import plots

    drawn = [e for e in pairs if all(1e-9 < e[side] < 1e12 for side in ("guess", "measured"))]
    if not drawn:
        return ""
    right = sum(within_two(e["guess"], e["measured"]) for e in drawn)
    figure, ax = plots.axes(
        "measured", "predicted", title=f"{right} of {len(drawn)} lie within a factor of two"
    )
    x, y = [e["measured"] for e in drawn], [e["guess"] for e in drawn]
    ends = [min(x + y) / 2, max(x + y) * 2]
    ax.plot(ends, ends, color="0.4", linewidth=1)
    ax.fill_between(ends, [v / 2 for v in ends], [v * 2 for v in ends], color="0.9", linewidth=0)
    ax.plot(x, y, "o", color=plots.COLOURS[0])
    ax.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "course", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    drawing = re.sub(
        r"^.*?<svg",
        "<svg role='img' aria-label='predicted against measured'",
        buffer.getvalue(),
        count=1,
        flags=re.S,
    )
    return f"<div>{drawing}</div>"


def write(folder: Path, rows: list[Row]) -> Path:
    """progress.html in the workbook, whole or not at all."""
    target = folder / "progress.html"
    part = target.with_name("progress.html.part")
    part.write_text(page(rows, ledger.events()), encoding="utf-8")
    part.replace(target)
    return target
