"""`course grade`: a class of honest and of hostile learners gets what it earned, and no more."""

import csv
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path

import hostile
import mutants
import nbformat
import psutil
import pytest
from conftest import CHAPTERS

from course_utils.course import build, cli, shape
from course_utils.course.grading import grade, jobs, walls
from course_utils.course.grading.walls import Limits

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="grading forks")
EXERCISES = {e.id: e for c in CHAPTERS for e in shape.exercises(c)}
LIMITS = Limits(cpu=30, wall=60)
"""A right answer needs six seconds of processor; a busy machine has time for ten times that."""


# --- Making submissions -----------------------------------------------------------------------


def notebook(number: str, answers: dict[str, str]) -> bytes:
    """The student's notebook of a chapter with these answers in the exercises' cells."""
    chapter = next(c for c in CHAPTERS if c.number == number)
    book = build.notebook(chapter, "student")
    cells = {task.cell: task.exercise for task in jobs.tasks([number]).values()}
    for cell in book.cells:
        if cells.get(cell.id) in answers:
            cell.source = answers[cells[cell.id]]
    return nbformat.writes(book).encode()


def handed_in(folder: Path, who: str, answers: dict[str, str]) -> None:
    """A learner's folder with a notebook for each chapter that has an answer."""
    (folder / who).mkdir(parents=True)
    for number in sorted({name[:2] for name in answers}):
        (folder / who / f"{number}.ipynb").write_bytes(notebook(number, answers))


def mutant(exercise: shape.Exercise) -> str:
    """One of the changed solutions that no list calls a right one, the same one each time."""
    known = mutants.equivalents()
    every = [t for n, t in mutants.changes(exercise.solution) if (exercise.id, n) not in known]
    return random.Random(zlib.crc32(exercise.id.encode())).choice(every)


def honest(k: int, name: str) -> tuple[str, str]:
    """(answer, what it must get) of the honest learner k: of each exercise some have it right."""
    exercise, turn = EXERCISES[name], (k + zlib.crc32(name.encode())) % 4
    if turn == 0:
        return exercise.solution, "passed"
    if turn == 1:
        return exercise.wrong[k % len(exercise.wrong)], "wrong"
    if turn == 2:
        return mutant(exercise), "not passed"
    return exercise.stub, "not attempted"


def statuses(out: Path) -> dict[str, dict[str, str]]:
    rows = csv.DictReader(io.StringIO((out / "grades.csv").read_text(encoding="utf-8")))
    return {row["name"]: row for row in rows}


@pytest.fixture(scope="module")
def trap(tmp_path_factory):
    """A file that must live on, and a port to which nobody may connect."""
    folder = tmp_path_factory.mktemp("trap")
    canary = folder / "canary"
    canary.write_text("alive")
    folder.chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        yield canary, server


# --- The class --------------------------------------------------------------------------------


def everybody(source: Path, cases: list[hostile.Hostile]) -> dict[str, dict[str, str]]:
    """Write a class's folder; what everybody must get in each exercise."""
    handed_in(source, "Ada Right", {n: e.solution for n, e in EXERCISES.items()})
    due = {"Ada Right": dict.fromkeys(EXERCISES, "passed")}
    for k in range(3):
        told = {n: honest(k, n) for n in EXERCISES}
        handed_in(source, f"Honest {k}", {n: text for n, (text, _) in told.items()})
        due[f"Honest {k}"] = {n: status for n, (_, status) in told.items()}
    right = {n: EXERCISES[n].solution for n in hostile.RIGHT}
    for case in cases:
        (source / f"Who {case.name}").mkdir()
        for name, data in case.rework(notebook("03", right | case.cells)).items():
            (source / f"Who {case.name}" / name).write_bytes(data)
        due[f"Who {case.name}"] = dict.fromkeys(EXERCISES, "not attempted") | case.due
    return due


@pytest.mark.wall_clock
def test_a_class_gets_what_it_earned_twice(tmp_path, trap, capsys):
    """Thirty learners and more over all chapters, hostile ones between honest ones."""
    canary, server = trap
    cases = hostile.table(canary, server.getsockname()[1])
    if walls.lacking():
        cases = [case for case in cases if not case.dangerous]
    source, out = tmp_path / "handed in", tmp_path / "first"
    due = everybody(source, cases)
    start = time.monotonic()
    first = grade.grade(source, out, limits=LIMITS, slots=2, seed=7)
    with capsys.disabled():
        print(f"\n{len(due)} learners graded in {time.monotonic() - start:.0f} s")
    assert _off(statuses(out), due) == set()
    told = {row["name"]: json.dumps(row) for row in first["learners"]}
    assert [c.name for c in cases if json.dumps(c.said)[1:-1] not in told[f"Who {c.name}"]] == []
    assert canary.read_text() == "alive"
    assert sorted(canary.parent.iterdir()) == [canary]
    with pytest.raises(BlockingIOError):
        server.accept()
    assert not _left_behind()
    page = (out / "feedback" / "Who-writes-HTML.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    _again(source, tmp_path, first)


def _off(got: dict[str, dict[str, str]], due: dict[str, dict[str, str]]) -> set[tuple]:
    """(learner, exercise, got, due) where these differ. A mutant may fail its check, or loop until
    its time is up.
    """
    assert got.keys() == due.keys()
    allowed = {"not passed": ("wrong", "error")}
    return {
        (who, name, got[who][name], status)
        for who, wanted in due.items()
        for name, status in wanted.items()
        if got[who][name] not in allowed.get(status, (status,))
    }


def _left_behind() -> list[int]:
    """Processes of the users that this test's gradings made up."""
    first = walls.FIRST_USER + os.getpid() % 300 * 100
    return [p.pid for p in psutil.process_iter(["uids"]) if _real(p) in range(first, first + 100)]


def _real(process: psutil.Process) -> int:
    return process.info["uids"].real if process.info["uids"] else -1


def _again(source: Path, tmp_path: Path, first: dict) -> None:
    """A second call goes on from the first; one into a fresh folder says the same."""
    names = ("grades.csv", "canvas.csv", "moodle.csv", "grades.json", "overview.html")
    before = {n: (tmp_path / "first" / n).read_bytes() for n in names}
    assert grade.grade(source, tmp_path / "first", limits=LIMITS, slots=2, seed=7) == first
    assert {n: (tmp_path / "first" / n).read_bytes() for n in names} == before
    grade.grade(source, tmp_path / "second", limits=LIMITS, slots=2, seed=7)
    second = (tmp_path / "second" / "grades.csv").read_bytes()
    assert second == before["grades.csv"]


# --- One thing at a time ----------------------------------------------------------------------


RIGHT = {"00.A": EXERCISES["00.A"].solution}


def test_the_command_says_what_it_found_and_goes_on_after_an_interruption(tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    handed_in(source, "Ada", RIGHT)
    handed_in(source, "Bob", {"00.A": EXERCISES["00.A"].wrong[0]})
    assert cli.main(["grade", str(source), "--out", str(out), "--seed", "3"]) == 0
    assert "2 learners" in capsys.readouterr().out
    ada = out / "learners" / "Ada.json"
    stamp = ada.stat().st_mtime_ns
    (source / "Bob" / "00.ipynb").write_bytes(notebook("00", RIGHT))
    assert cli.main(["grade", str(source), "--out", str(out)]) == 0
    got = statuses(out)
    assert [got[who]["00.A"] for who in ("Ada", "Bob")] == ["passed", "passed"]
    assert ada.stat().st_mtime_ns == stamp, "whoever changed nothing is not judged again"
    assert json.loads((out / "grades.json").read_text())["seed"] == 3
    assert not list(out.rglob("*.part"))


@pytest.mark.wall_clock
def test_ctrl_c_keeps_what_is_finished(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    handed_in(source, "Ada", RIGHT)
    handed_in(source, "Bob", {"00.A": "def speedup(a, b):\n    while True: pass"})
    command = ["grade", str(source), "--out", str(out), "--jobs", "1", "--seconds", "500"]
    child = subprocess.Popen(
        [sys.executable, "-m", "course_utils.course.cli", *command],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # What a shell starts in the background ignores Ctrl-C, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until = time.monotonic() + 400
    while not (out / "learners" / "Ada.json").is_file():
        assert time.monotonic() < until
        assert child.poll() is None
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=120)
    assert child.returncode == 130, said
    assert "interrupted" in said
    got = statuses(out)
    assert got["Ada"]["00.A"] == "passed"
    assert "Bob" not in got


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("none", None, "there is no"), ("empty", {}, "holds no submissions")],
)
def test_nothing_to_grade_is_told(name, content, said, tmp_path, capsys):
    if content is not None:
        (tmp_path / name).mkdir()
    assert cli.main(["grade", str(tmp_path / name), "--out", str(tmp_path / "o")]) == 2
    assert said in capsys.readouterr().err
