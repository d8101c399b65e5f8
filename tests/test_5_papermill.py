"""Every chapter from end to end by papermill, twice in one kernel: solved, then with wrong answers filled in.

Both without a network and from a working folder outside of the course.
"""

import os

import pytest
from conftest import CHAPTERS, names

from course_utils import claims
from course_utils.course import build, run, shape

PROFILE = os.environ.get("COURSE_PROFILE", "smoke")
OFFLINE = """
import socket
real = socket.socket.connect
def connect(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "localhost", "::1"):
        raise OSError(101, f"the suite has no network, and something asked for {address[0]}")
    return real(self, address)
socket.socket.connect = connect
"""


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Every Python process that is started from here refuses to connect to another machine."""
    folder = tmp_path / "offline"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(OFFLINE)
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_the_parameters_cell_is_tagged_once_in_every_edition():
    """Papermill only warns when it is missing, and then runs in the wrong profile."""
    for chapter in CHAPTERS:
        for edition in ("learner", "instructor", "student"):
            tagged = [c for c in build.notebook(chapter, edition).cells if "parameters" in build.tags(c)]
            assert len(tagged) == 1, (chapter.name, edition)
            assert "PROFILE = " in tagged[0].source


def solved_then_wrong(chapter):
    """The instructor edition, and after it the learner edition whose exercises hold the k-th wrong answer."""
    book, again = build.notebook(chapter, "instructor"), build.notebook(chapter, "learner")
    answers = iter(shape.exercises(chapter))
    for cell in again.cells:
        cell.id = f"{cell.id}-2"
        kind = build.tags(cell)
        if "parameters" in kind:
            cell.metadata["tags"].remove("parameters")
        if "exercise" in kind:
            wrong = next(answers).wrong
            cell.source = wrong[int(chapter.number) % len(wrong)]
    book.cells += again.cells
    return book


@pytest.mark.parametrize("chapter", CHAPTERS, ids=names(CHAPTERS))
def test_a_chapter_runs_solved_and_again_with_wrong_answers(chapter, tmp_path, offline, capsys):
    outcome = run.execute(solved_then_wrong(chapter), chapter.name, PROFILE, tmp_path)
    with capsys.disabled():
        print(f"\n    {chapter.name}: {outcome.seconds:.0f} s, {outcome.peak_bytes / 1e6:.0f} MB, twice in {PROFILE}")
    assert outcome.error == ""
    checks = [(e["exercise"], e["status"]) for e in outcome.events if e["event"] == "check"]
    asked = [e.id for e in shape.exercises(chapter)]
    assert checks == [(i, "passed") for i in asked] + [(i, "wrong") for i in asked]
    reached = {e["claim"] for e in outcome.events if e["event"] == "verdict"}
    assert reached == {i for i in claims.registry() if i.startswith(f"{chapter.number}.")}
