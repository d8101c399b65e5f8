"""Proof that the suite can fail: each fault planted here must be found by the check that is there
for it.
"""

import shutil
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import pytest
import run_suite
import test_3_exercises as exercise_tests

from course_utils import ROOT, exercises
from course_utils.course import build, pace, shape
from course_utils.course.chapters import Chapter


@pytest.fixture
def chapter(tmp_path) -> Chapter:
    """A copy of chapter 01, source, claims and notebook, to damage."""
    (tmp_path / "notebooks").mkdir()
    for other in (ROOT / "notebooks").glob("*.ipynb"):
        (tmp_path / "notebooks" / other.name).touch()  # what its links lead to
    for name in ("source/01_measurement.py", "claims/01.toml", "01_measurement.ipynb"):
        target = tmp_path / "notebooks" / name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "notebooks" / name, target)
    copied = Chapter(tmp_path / "notebooks" / "source" / "01_measurement.py")
    assert shape.source_complaints(copied) == []
    assert shape.notebook_complaints(copied) == []
    return copied


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_a_stale_notebook(chapter):
    edit(chapter.source, "SECONDS = {", "SECONDS  = {")
    assert any("differ" in c for c in shape.notebook_complaints(chapter))
    assert any("stale" in c for c in shape.notebook_complaints(chapter))


def test_changed_prose_alone_is_found_too(chapter):
    edit(chapter.source, "# **Is it faster", "# **Was it faster")
    assert shape.notebook_complaints(chapter) == [
        "source and notebook differ; run: course build 01"
    ]


def test_a_changed_claim_makes_the_outputs_stale(chapter):
    edit(chapter.claims_file, "band = [0.7, 1.3]", "band = [1.1, inf]")
    assert any("stale" in c for c in shape.notebook_complaints(chapter))


def test_an_edited_output(chapter):
    book = nbformat.read(chapter.learner, 4)
    streams = [
        o
        for c in book.cells
        if c.cell_type == "code"
        for o in c.outputs
        if o.output_type == "stream"
    ]
    streams[-1].text += "and five times faster"
    nbformat.write(book, chapter.learner)
    assert shape.notebook_complaints(chapter) == [
        "an output was edited by hand; run: course build 01"
    ]


def test_nbval_finds_an_output_that_is_not_what_the_code_gives(tmp_path):
    book = nbformat.v4.new_notebook(metadata={"kernelspec": build.KERNEL})
    result = nbformat.v4.new_output("execute_result", {"text/plain": "3"}, execution_count=1)
    book.cells = [nbformat.v4.new_code_cell("1 + 1", outputs=[result], execution_count=1)]
    nbformat.write(book, tmp_path / "edited.ipynb")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--nbval",
        "--nbval-current-env",
        "edited.ipynb",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    assert "1 failed" in done.stdout


def test_an_error_output_a_cell_that_never_ran_and_a_machine_path(chapter):
    book = nbformat.read(chapter.learner, 4)
    code = [c for c in book.cells if c.cell_type == "code"]
    code[3].outputs.append(
        nbformat.v4.new_output("error", ename="ValueError", evalue="x", traceback=[])
    )
    code[4].execution_count = None
    code[5].outputs.append(nbformat.v4.new_output("stream", text="saved to /home/reader/model.bin"))
    nbformat.write(book, chapter.learner)
    text = "\n".join(shape.notebook_complaints(chapter))
    assert "ended in ValueError" in text
    assert "never ran" in text
    assert "/home/reader" in text


def test_a_figure_without_alternative_text(chapter):
    book = nbformat.read(chapter.learner, 4)
    figure = next(
        o
        for c in book.cells
        if c.cell_type == "code"
        for o in c.outputs
        if "image/png" in o.get("data", {})
    )
    figure.metadata.clear()
    nbformat.write(book, chapter.learner)
    assert any("without an alternative text" in c for c in shape.notebook_complaints(chapter))


@pytest.mark.parametrize(
    "part", ["Predict", "From scratch", "If yours shows no gain", "Myth", "Break it", "Exit quiz"]
)
def test_a_missing_part(chapter, part):
    text = chapter.text().replace(f"## {part}", "## Something else")
    chapter.source.write_text(text, encoding="utf-8")
    assert f"the part {part!r} is missing" in shape.source_complaints(chapter)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("90 minutes ·", "60 minutes ·", "the header says 60 minutes"),
        ("90 minutes ·", "95 minutes ·", "90 are the most"),
        ("# Three remedies:", "# " + "word " * 600 + "Three remedies:", "the core path takes"),
        ("# 5 minutes. Ask", "# 25 minutes. Ask", "the core path takes"),
        ("def inference():\n", "def inference():\n" + "    pass\n" * 25, "lines, more than 25"),
    ],
)
def test_a_chapter_that_takes_longer_than_it_says(chapter, old, new, said):
    assert pace.complaints(chapter) == []
    edit(chapter.source, old, new)
    assert any(said in c for c in pace.complaints(chapter))


def test_what_stands_under_further_takes_no_minutes(chapter):
    before = pace.minutes(chapter)
    edit(chapter.source, "# Four parts, in any", "# " + "word " * 600 + "Four parts, in any")
    assert pace.minutes(chapter) == before


def test_a_file_whose_path_may_hold_a_space(chapter):
    edit(chapter.source, '%%writefile "$folder/opinion.py"', "%%writefile $folder/opinion.py")
    assert any("must be in quotes" in c for c in shape.source_complaints(chapter))


def test_a_broken_claim_id_and_a_claim_without_a_verdict(chapter):
    edit(chapter.source, '"01.amdahl"', '"01.amdal"')
    complaints = "\n".join(shape.source_complaints(chapter))
    assert "'01.amdal', which notebooks/claims/ does not have" in complaints
    assert "claim '01.amdahl' never gets a verdict" in complaints


@pytest.mark.parametrize(
    "sentence",
    ["It is 3x faster.", "It saves 40% of the time.", "It takes 12 ms.", "The file has 4.5 MB."],
)
def test_a_number_in_prose_without_a_source(chapter, sentence):
    edit(chapter.source, "# ## Predict\n", f"# {sentence}\n#\n# ## Predict\n")
    assert any("a number without a source" in c for c in shape.source_complaints(chapter))


@pytest.mark.parametrize(
    "sentence",
    ["It is 3x faster (Somebody 2019).", "It is `3x` faster.", "It is $3×$ faster.", "In 3 steps."],
)
def test_a_number_with_its_source_or_a_definition_is_none_of_them(chapter, sentence):
    edit(chapter.source, "# ## Predict\n", f"# {sentence}\n#\n# ## Predict\n")
    assert shape.source_complaints(chapter) == []


def test_a_broken_link_and_a_registry(chapter):
    host = "https://files." + "python" + "hosted.org/x"
    edit(
        chapter.source, "# ## Predict\n", f"# [a](../nowhere.md) and [b]({host})\n#\n# ## Predict\n"
    )
    assert [
        c for c in shape.source_complaints(chapter) if "nowhere.md" in c or "registry" in c
    ].__len__() == 2


def test_an_exercise_without_solution_hint_or_enough_wrong_answers(chapter):
    text = chapter.text()
    for tag in ("solution", "hint", "wrong"):
        text = text.replace(f'tags=["{tag}"]', 'tags=["instructor"]', 3)
    chapter.source.write_text(text, encoding="utf-8")
    complaints = "\n".join(shape.source_complaints(chapter))
    assert "01.A has no solution" in complaints
    assert "hints, not one to three" in complaints
    assert "fewer than three" in complaints


def test_a_wrong_answer_made_right(run_cell, seeded):
    _, exercise = exercise_tests.ALL[0]
    with pytest.raises(AssertionError, match="passed"):
        exercise_tests.test_wrong_answer_is_rejected(
            "", exercise, exercise.solution, run_cell, seeded
        )


def test_a_changed_constant_in_a_check(run_cell, seeded, monkeypatch):
    """The percentile of 01.A's check turned from 99 to 90: the suite's own test of the solution
    must fail.
    """
    text = (ROOT / "course_utils" / "checks" / "ch01.py").read_text()
    assert "-(-99 * n // 100)" in text
    module = types.ModuleType("damaged")
    exec(text.replace("-(-99 * n // 100)", "-(-90 * n // 100)"), module.__dict__)
    monkeypatch.setattr(exercises, "registry", lambda: {"01.A": module.p99})
    exercise = next(e for i, e in exercise_tests.ALL if i == "01.A")
    with pytest.raises(AssertionError, match="not yet right"):
        exercise_tests.test_solution_passes("", exercise, run_cell, seeded)


def test_a_check_that_accepts_everything(run_cell, seeded, monkeypatch):
    monkeypatch.setattr(exercises, "registry", lambda: {"01.A": lambda answer, rng: None})
    exercise = next(e for i, e in exercise_tests.ALL if i == "01.A")
    with pytest.raises(AssertionError):
        exercise_tests.test_wrong_answer_is_rejected(
            "", exercise, exercise.wrong[0], run_cell, seeded
        )


def test_of_two_stages_side_by_side_each_can_fail(capfd):
    def stage(name: str, status: int) -> tuple[str, list[str]]:
        return name, [sys.executable, "-c", f"print('said by {name}'); raise SystemExit({status})"]

    assert run_suite.together([stage("first", 0), stage("second", 0)]) == []
    assert run_suite.together([stage("first", 3), stage("second", 0)]) == ["first"]
    assert run_suite.together([stage("first", 0), stage("second", 3)]) == ["second"]
    assert capfd.readouterr().out.count("said by second") == 3
