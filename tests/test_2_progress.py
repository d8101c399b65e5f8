"""What a reader sees of the own work: progress, and a report on the own ledger."""

import json
import os
import subprocess
import sys

import pytest
from conftest import CHAPTERS

from course_utils import ROOT, exercises, ledger
from course_utils.course import check, cli, progress, report, workbook
from course_utils.course.chapters import UsageError

FIRST = next(c for c in CHAPTERS if c.number == "01")
VERDICT = {
    "claim": "01.x",
    "chapter": "01",
    "statement": "It is <b>twice</b> as fast.",
    "value": 2.0,
    "low": 1.9,
    "high": 2.1,
    "unit": "x",
    "verdict": "holds here",
    "reason": "",
    "stand_in": "",
}


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A workbook with chapter 01, and an empty ledger in it."""
    monkeypatch.setattr(workbook, "FOLDER", tmp_path)
    monkeypatch.setenv("COURSE_LEDGER", str(tmp_path / "ledger.jsonl"))
    workbook.update([FIRST.learner], tmp_path)
    return tmp_path


def rows(desk):
    return progress.gather([FIRST], desk, ledger.events())


def test_a_fresh_workbook_has_everything_before_it(desk):
    (row,) = rows(desk)
    assert (row.ran, row.passed, row.predictions, row.verdicts) == (0, 0, 0, {})
    assert list(row.exercises) == ["01.A", "01.B", "01.C"]
    assert progress.after([row]) == f"Next: {FIRST.name}."


def test_attempts_count_and_what_has_passed_stays_passed(desk):
    for status in ("wrong", "passed", "wrong"):
        ledger.record("check", exercise="01.A", status=status)
    ledger.record("check", exercise="02.A", status="passed")
    (row,) = rows(desk)
    assert row.exercises["01.A"] == ("passed", 3)
    assert row.exercises["01.B"] == ("", 0)
    text = progress.table([row])
    assert "A✓3 B– C–" in text
    assert "Next: exercise 01.B" in text


def test_cells_that_ran_and_the_last_verdict_of_a_claim_are_counted(desk):
    mine = workbook.read(desk / FIRST.learner.name)
    code = [c for c in mine.cells if c.cell_type == "code"]
    code[0].execution_count = code[1].execution_count = 1
    workbook.write(desk / FIRST.learner.name, mine)
    for said in ("inconclusive", "holds here"):
        ledger.record("verdict", **VERDICT | {"verdict": said})
    (row,) = rows(desk)
    assert (row.ran, row.cells) == (2, len(code))
    assert row.verdicts == {"holds here": 1}


def test_a_prediction_and_what_came_out_stand_on_the_page(desk, capsys):
    for question, guess, measured in (("01.a", 2, 2.2), ("01.b", 10.0, 1.0), ("01.c", ..., 3.0)):
        exercises.predict(question, guess)
        exercises.reveal(question, measured, "x")
    capsys.readouterr()
    made = [e for e in ledger.events() if e["event"] == "prediction"]
    assert [(e["question"], e["guess"], e["measured"]) for e in made] == [
        ("01.a", 2.0, 2.2),
        ("01.b", 10.0, 1.0),
    ]
    text = progress.write(desk, rows(desk)).read_text(encoding="utf-8")
    assert "1 of 2 within a factor of two" in text
    assert "<svg" in text
    assert "http" not in text.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", ""), "nothing is fetched"


def test_predictions_of_every_kind_do_no_harm(desk):
    for guess in (0, -1.0, "many", True, 1e300, 1e-300):
        ledger.record("prediction", question=f"01.{guess}", guess=guess, measured=2.0, unit="x")
    text = progress.page(rows(desk), ledger.events())
    assert "<script" not in text
    assert "My progress" in text


def test_a_broken_copy_is_named_in_the_table(desk):
    (desk / FIRST.learner.name).write_text("{")
    (row,) = rows(desk)
    assert "no whole notebook" in progress.table([row])


def test_a_report_on_the_own_ledger(desk, capsys):
    ledger.record("card", machine={"cpu": "A CPU", "cores": 2, "isa": ["avx2"]})
    ledger.record("verdict", **VERDICT | {"verdict": "inconclusive"})
    ledger.record("verdict", **VERDICT)
    out = desk / "out"
    assert cli.main(["report", "--out", str(out)]) == 0
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "A CPU, 2 cores, avx2" in text
    assert "1 holds here" in text
    assert "<b>twice</b>" not in text
    capsys.readouterr()


def test_a_ledger_without_a_verdict_is_told_so(desk):
    with pytest.raises(UsageError, match="no such file"):
        report.read(desk / "nowhere.jsonl")
    ledger.record("check", exercise="01.A", status="passed")
    with pytest.raises(UsageError, match="no verdict yet"):
        report.read(desk / "ledger.jsonl")


def test_check_looks_into_the_readers_copy(desk):
    assert check.notebooks(["01"]) == [desk / FIRST.learner.name]
    (desk / FIRST.learner.name).unlink()
    assert check.notebooks(["01"]) == [FIRST.learner]


def test_the_commands_on_a_workbook_of_their_own(tmp_path):
    """As a reader types them: copied twice, reset, progress; the shipped notebooks stay."""
    before = {c.learner: c.learner.read_bytes() for c in CHAPTERS}
    env = os.environ | {"COURSE_WORKBOOK": str(tmp_path / "my work")}
    env.pop("COURSE_LEDGER", None)

    def course(*arguments):
        command = [sys.executable, "-m", "course_utils.course.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert course("lab", "--update-only").count(": new") == len(CHAPTERS)
    assert course("lab", "--update-only").count(": new") == 0
    path = tmp_path / "my work" / FIRST.learner.name
    book = json.loads(path.read_text(encoding="utf-8"))
    book["cells"][0]["source"] = ["mine"]
    path.write_text(json.dumps(book), encoding="utf-8")
    assert "kept" in course("reset", "01")
    assert len(list((tmp_path / "my work" / "kept").glob("01_*.ipynb"))) == 1
    assert "Next: 00_start_here." in course("progress")
    assert (tmp_path / "my work" / "progress.html").is_file()
    assert before == {c.learner: c.learner.read_bytes() for c in CHAPTERS}


def test_git_does_not_see_the_workbook():
    """So that `git pull` and the suite go on in a checkout that has been learned in."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    asked = ["workbook/01_measurement.ipynb", "workbook/ledger.jsonl", "workbook/.base/x.ipynb"]
    done = subprocess.run(["git", "check-ignore", *asked], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == asked
