"""Every instructor edition from end to end by papermill: every check passes and every verdict is reached."""

import os

import pytest
from conftest import CHAPTERS, names

from course_utils import claims
from course_utils.course import build, run, shape

PROFILE = os.environ.get("COURSE_PROFILE", "smoke")


def test_the_parameters_cell_is_tagged_once_in_every_edition():
    """Papermill only warns when it is missing, and then runs in the wrong profile."""
    for chapter in CHAPTERS:
        for edition in ("learner", "instructor", "student"):
            tagged = [c for c in build.notebook(chapter, edition).cells if "parameters" in build.tags(c)]
            assert len(tagged) == 1, (chapter.name, edition)
            assert "PROFILE = " in tagged[0].source


@pytest.mark.parametrize("chapter", CHAPTERS, ids=names(CHAPTERS))
def test_instructor_edition_runs_with_every_check_passing(chapter, tmp_path, capsys):
    outcome = run.run_one(chapter, PROFILE, "instructor", tmp_path)
    with capsys.disabled():
        print(f"\n    {chapter.name}: {outcome.seconds:.0f} s, {outcome.peak_bytes / 1e6:.0f} MB in {PROFILE}")
    assert outcome.error == ""
    statuses = {e["exercise"]: e["status"] for e in outcome.events if e["event"] == "check"}
    assert statuses == {e.id: "passed" for e in shape.exercises(chapter)}
    reached = {e["claim"] for e in outcome.events if e["event"] == "verdict"}
    assert reached == {i for i in claims.registry() if i.startswith(f"{chapter.number}.")}
