"""The class as CSV: for a spreadsheet, for Canvas and for Moodle.

Canvas's import wants the columns Student, ID, SIS User ID, SIS Login ID and Section, of which the
name or one id finds the learner, then a column an assignment, and a row "Points Possible" below
the head (Instructure's guide "How do I import grades in the Gradebook?"). Moodle's worksheet finds
a learner by Identifier, "Participant" and the number that stands in the names of its downloads,
and takes Grade and Feedback comments; without "Last modified (grade)" it refuses the file (Moodle,
mod/assign/feedback/offline/importgradeslib.php).
"""

import csv
import io


def files(result: dict) -> dict[str, str]:
    """The text of each CSV, by its file's name."""
    return {
        "grades.csv": _text(_grades(result)),
        "canvas.csv": _text(_canvas(result)),
        "moodle.csv": _text(_moodle(result)),
    }


def _text(rows: list[list]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([_safe(v) for v in row] for row in rows)
    return buffer.getvalue()


def _safe(value: object) -> object:
    """A spreadsheet takes a text that begins with = for a formula; a learner chose the names."""
    if isinstance(value, str) and value != "-" and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{value}"
    return value


def _grades(result: dict) -> list[list]:
    names = result["exercises"]
    rows = [["learner", "name", "id", *names, "passed", "of", "late", "flagged"]]
    for row in result["learners"]:
        told = [row["exercises"][name]["status"] for name in names]
        late, flagged = ("yes" if v else "" for v in (row["late"], row["flags"]))
        ends = [row["passed"], len(names), late, flagged]
        rows.append([row["key"], row["name"], row["id"], *told, *ends])
    return rows


def _canvas(result: dict) -> list[list]:
    chapters = sorted({name[:2] for name in result["exercises"]})
    own = {c: [n for n in result["exercises"] if n[:2] == c] for c in chapters}
    head = ["Student", "ID", "SIS User ID", "SIS Login ID", "Section"]
    rows = [[*head, *(f"Chapter {c}" for c in chapters)]]
    rows.append(["    Points Possible", "", "", "", "", *(len(own[c]) for c in chapters)])
    for row in result["learners"]:
        points = [sum(row["exercises"][n]["status"] == "passed" for n in own[c]) for c in chapters]
        rows.append(
            [row["name"], row["id"] if row["system"] != "moodle" else "", "", "", "", *points]
        )
    return rows


def _moodle(result: dict) -> list[list]:
    head = ["Identifier", "Full name", "Grade", "Maximum grade", "Last modified (grade)"]
    rows = [[*head, "Feedback comments"]]
    for row in result["learners"]:
        who = f"Participant {row['id']}" if row["id"] else row["name"]
        told = ", ".join(
            f"{n}: {o['status']}" for n, o in row["exercises"].items() if o["status"] != "passed"
        )
        # No time: a grade that stands in Moodle already is kept, unless its form says otherwise.
        rows.append([who, row["name"], row["passed"], len(result["exercises"]), "-", told])
    return rows
