"""Which cells of what was handed in are answers: the exercises', by their ids."""

import json
from collections.abc import Iterator

from course_utils.course.grading import jobs, submissions, tampering
from course_utils.course.grading.submissions import Submission

MOST_SOURCE = 200_000  # characters of a cell


def pick(one: Submission, tasks: dict[str, jobs.Task]) -> dict[str, dict]:
    """For each exercise what is known before anything runs: {"cell": source} for one to be judged,
    or its final {"status", "message"}; "flags" either way. What is odd about the notebooks is
    added to the submission's flags.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    wanted = {task.cell: task for task in tasks.values()}
    chapters_seen: dict[str, list[str]] = {}
    for path in sorted(one.notebooks, key=submissions.order):
        seen = set()
        for cell_id, source in _cells(one, path):
            if cell_id not in wanted:
                continue
            seen.add(cell_id.partition("-")[0])
            found.setdefault(wanted[cell_id].exercise, []).append((path, source))
        for chapter in seen:
            chapters_seen.setdefault(chapter, []).append(path)
    for chapter, paths in sorted(chapters_seen.items()):
        if len(paths) > 1:
            one.flags.append(
                f"chapter {chapter[1:]} was handed in more than once ({', '.join(paths)}); the last"
                " one counts"
            )
    return {name: _one(one, task, found.get(name, [])) for name, task in tasks.items()}


def _one(one: Submission, task: jobs.Task, sources: list[tuple[str, str]]) -> dict:
    if not sources:
        return {"status": "not attempted", "message": "", "flags": _renamed(one, task)}
    path, raw = sources[-1]
    flags = []
    if len({s for p, s in sources if p == path}) > 1:
        flags.append(f"{path} holds the cell {task.cell} more than once; the last one counts")
    if len(raw) > MOST_SOURCE:
        text = f"the exercise's cell has {len(raw):,} characters; {MOST_SOURCE:,} are read."
        return {"status": "error", "message": text, "flags": [*flags, "a very long cell"]}
    try:
        source = jobs.plain(raw)
    except Exception:  # no Python that IPython can read: the cell says what is wrong when it runs
        source = raw
    if jobs.pending(source, task.stub):
        return {"status": "not attempted", "message": "", "flags": flags}
    if signs := tampering.signs(source, task.within):
        text = f"not run: {'; '.join(signs[:4])}. Look at this cell yourself."
        return {"status": "error", "message": text, "flags": [*flags, "tampering"]}
    return {"cell": source, "flags": flags}


def _cells(one: Submission, path: str) -> Iterator[tuple[str, str]]:
    """(id, source) of a notebook's code cells. It is read as plain JSON: a notebook that is broken
    elsewhere can still be graded.
    """
    try:
        book = json.loads(one.notebooks[path].decode("utf-8-sig"))
        cells = book["cells"]
        if not isinstance(cells, list):
            raise TypeError("no list of cells")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        one.flags.append(f"{path} is no notebook ({type(error).__name__})")
        return
    for cell in cells:
        if not isinstance(cell, dict) or cell.get("cell_type") != "code":
            continue
        source = cell.get("source", "")
        if isinstance(source, list) and all(isinstance(line, str) for line in source):
            source = "".join(source)
        if isinstance(source, str) and isinstance(cell.get("id"), str):
            yield cell["id"], source


def _renamed(one: Submission, task: jobs.Task) -> list[str]:
    """A flag where another cell of a notebook defines the answer: the cell's id was changed."""
    for path in one.notebooks:
        for cell_id, source in _cells(Submission("", "", notebooks=one.notebooks), path):
            defines = f"def {task.answer}(" in source or f"class {task.answer}" in source
            mine = cell_id.partition("-")[0] in (task.cell.partition("-")[0], cell_id)
            if defines and mine and source.strip() != task.stub.strip():
                return [
                    f"{path}: the cell {task.cell} is not there, and the cell {cell_id} defines"
                    f" {task.answer}"
                ]
    return []
