"""`course grade`: every learner's exercises judged, and everything that is written about them.

DIR/grades.csv          learner × exercise
DIR/canvas.csv          for Canvas's import, a column a chapter
DIR/moodle.csv          for Moodle's grading worksheet
DIR/overview.html       the class; links to a page a learner in DIR/feedback/
DIR/grades.json         all of it, with limits, seed and what could not be walled off
DIR/learners/KEY.json   one learner, written when its last exercise is judged
"""

import hashlib
import json
import secrets
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from course_utils import ROOT
from course_utils.course.chapters import writable
from course_utils.course.grading import gradebook, jobs, pages, picking, submissions
from course_utils.course.grading.pool import Pool
from course_utils.course.grading.submissions import Submission
from course_utils.course.grading.walls import Limits

STATUSES = ("passed", "wrong", "not attempted", "error")


def grade(
    source: Path,
    out: Path,
    wanted: list[str] | None = None,
    *,
    limits: Limits | None = None,
    slots: int | None = None,
    seed: int | None = None,
) -> dict:
    """Grade a folder or zip of submissions; returns what grades.json holds.

    `wanted` are chapters, by default those that somebody handed in. Learners that an earlier call
    on the same `out` finished, and that handed in nothing new, are not judged again. Raises
    UsageError where there is nothing to grade; a KeyboardInterrupt leaves all that was finished.
    """
    limits = limits or Limits()
    class_, odd = submissions.read(source)
    tasks = jobs.tasks(wanted)
    if not wanted:
        tasks = _handed_in(class_, tasks)
    seed = _seed(writable(out), seed)
    folder = writable(out / "learners")
    stamp = _stamp(tasks, limits, seed)
    done = {one.key: row for one in class_ if (row := _finished(folder, one, stamp))}
    todo = [one for one in class_ if one.key not in done]
    try:
        if todo:
            _judge_all(todo, tasks, limits, slots, seed, stamp, folder, done)
    finally:  # what is finished is told, after Ctrl-C as well
        rows = [done[one.key] for one in class_ if one.key in done]
        result = _result(rows, tasks, limits, seed) | {"flags": odd}
        _write(out, result, tasks)
    return result


def _handed_in(class_: list[Submission], tasks: dict[str, jobs.Task]) -> dict[str, jobs.Task]:
    """The tasks of the chapters of which any notebook holds an exercise's cell; all, if none."""
    texts = [data for one in class_ for data in one.notebooks.values()]
    numbers = {t.cell[:4] for t in tasks.values() if any(t.cell.encode() in x for x in texts)}
    return {name: t for name, t in tasks.items() if t.cell[:4] in numbers} or tasks


def _seed(out: Path, seed: int | None) -> int:
    """The one given, that of an earlier call, or a new one that nobody can have known."""
    if seed is None:
        try:
            seed = int(json.loads((out / "grades.json").read_text(encoding="utf-8"))["seed"])
        except (OSError, ValueError, LookupError, TypeError):
            seed = secrets.randbits(31)
    return seed


def _stamp(tasks: dict[str, jobs.Task], limits: Limits, seed: int) -> str:
    """Changes with whatever a verdict depends on beside the submission."""
    total = hashlib.sha256(repr((sorted(tasks.items()), limits, seed)).encode())
    for path in sorted((ROOT / "course_utils" / "checks").glob("*.py")):
        total.update(path.read_bytes())
    return total.hexdigest()


def _finished(folder: Path, one: Submission, stamp: str) -> dict | None:
    try:
        row = json.loads((folder / f"{one.key}.json").read_text(encoding="utf-8"))
        return row if (row["digest"], row["stamp"]) == (one.digest, stamp) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _judge_all(
    todo: list[Submission],
    tasks: dict[str, jobs.Task],
    limits: Limits,
    slots: int | None,
    seed: int,
    stamp: str,
    folder: Path,
    done: dict[str, dict],
) -> None:
    """Judge each learner, as many at once as there are cores; each is written when it is whole."""
    from course_utils.limits import usable_cores

    slots = slots or usable_cores()
    picked = {one.key: picking.pick(one, tasks) for one in todo}
    count = sum("cell" in cell for cells in picked.values() for cell in cells.values())
    stop = threading.Event()
    bar = tqdm(total=count, unit="exercise", desc="grading", file=sys.stderr, dynamic_ncols=True)

    def judge(one: Submission, pool: Pool) -> dict | None:
        found = {}
        for name, cell in picked[one.key].items():
            if stop.is_set():
                return None
            found[name] = cell
            if "cell" in cell:
                found[name] = _judged(pool, tasks[name], cell, seed, limits)
                bar.update()
        return None if stop.is_set() else _row(one, found, stamp)

    with Pool(slots, limits, jobs.modules(tasks)) as pool, bar:
        threads = ThreadPoolExecutor(slots)
        try:
            for ended in as_completed([threads.submit(judge, one, pool) for one in todo]):
                if row := ended.result():
                    write_json(folder / f"{row['key']}.json", row)
                    done[row["key"]] = row
        finally:
            stop.set()
            pool.interrupt()
            threads.shutdown(cancel_futures=True)


def _judged(pool: Pool, task: jobs.Task, cell: dict, seed: int, limits: Limits) -> dict:
    start = time.monotonic()
    job = {
        "exercise": task.exercise,
        "answer": task.answer,
        "context": list(task.context),
        "cell": cell["cell"],
        "within": task.within,
        # Alike for the whole class, and another one for each exercise.
        "seed": zlib.crc32(f"{seed} {task.exercise}".encode()),
        "seconds": limits.wall,
    }
    outcome = pool.run(job)
    if outcome["status"] not in STATUSES:
        outcome |= {"status": "error", "message": f"the check said {outcome['status']!r}."}
    outcome["flags"] = [*cell["flags"], *outcome.get("flags", [])]
    return outcome | {"seconds": round(time.monotonic() - start, 2)}


def _row(one: Submission, found: dict[str, dict], stamp: str) -> dict:
    about = {k: getattr(one, k) for k in ("key", "name", "id", "system", "late", "digest")}
    flags = list(one.flags)
    for name, outcome in found.items():
        flags += [f"{name}: {flag}" for flag in outcome["flags"]]
        if outcome["status"] == "error" and not outcome["flags"]:
            flags.append(f"{name}: {outcome['message']}")
    return about | {
        "stamp": stamp,
        "flags": flags,
        "ignored": one.ignored,
        "exercises": found,
        "passed": sum(o["status"] == "passed" for o in found.values()),
    }


def _result(rows: list[dict], tasks: dict[str, jobs.Task], limits: Limits, seed: int) -> dict:
    missing = {m for r in rows for o in r["exercises"].values() for m in o.get("missing", [])}
    return {
        "seed": seed,
        "limits": asdict(limits),
        "walls_missing": sorted(missing),
        "exercises": list(tasks),
        "judged_beside_the_answer": [name for name, task in tasks.items() if task.within],
        "learners": rows,
    }


def _write(out: Path, result: dict, tasks: dict[str, jobs.Task]) -> None:
    write_json(out / "grades.json", result)
    for name, text in gradebook.files(result).items():
        write_text(out / name, text)
    feedback = writable(out / "feedback")
    for row in result["learners"]:
        write_text(feedback / f"{row['key']}.html", pages.feedback(row))
    write_text(out / "overview.html", pages.overview(result))


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8", newline="", errors="replace")
    part.replace(path)


def write_json(path: Path, value: object) -> None:
    """Whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def table(result: dict) -> str:
    """How many of each status, exercise by exercise, for the terminal."""
    lines = [f"{'exercise':10}" + "".join(f"{s:>15}" for s in STATUSES)]
    for name in result["exercises"]:
        told = [row["exercises"][name]["status"] for row in result["learners"]]
        lines.append(f"{name:10}" + "".join(f"{told.count(s):>15}" for s in STATUSES))
    flagged = sum(bool(row["flags"]) for row in result["learners"])
    lines.append(f"{len(result['learners'])} learners, {flagged} of them flagged.")
    lines += [f"{flag}." for flag in result["flags"]]
    if result["walls_missing"]:
        lines.append(f"On this machine: {'; '.join(result['walls_missing'])}.")
    return "\n".join(lines)
