"""Every chapter from end to end by papermill, without a network and from a working folder outside
of the course.

Each exercise gets a wrong answer first, which must be rejected and stop nothing, and then its
solution. The chapters in TWICE run a second time in the same kernel: all of them with
COURSE_TWICE=all.
"""

import copy
import os

import pytest
from conftest import CHAPTERS, names
from nbformat.v4 import new_code_cell

from course_utils import claims
from course_utils.course import build, run, shape

TWICE = (
    "00",
    "01",
    "05",
    "07",
    "08",
)  # a few seconds each; all sixteen would take ten minutes more
PROFILE = os.environ.get("COURSE_PROFILE", "smoke")
OFFLINE = """
import socket
real = socket.socket.connect
def connect(self, address):
    internet = self.family in (socket.AF_INET, socket.AF_INET6)
    if internet and address[0] not in ("127.0.0.1", "localhost", "::1"):
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
            tagged = [
                c for c in build.notebook(chapter, edition).cells if "parameters" in build.tags(c)
            ]
            assert len(tagged) == 1, (chapter.name, edition)
            assert "PROFILE = " in tagged[0].source


def wrong_then_solved(chapter, twice):
    """The instructor edition with the k-th wrong answer and its check before each solution;
    `twice`, all of it again.
    """
    book, answers, cells = build.notebook(chapter, "instructor"), iter(shape.exercises(chapter)), []
    for i, cell in enumerate(book.cells):
        if "exercise" in build.tags(cell):
            wrong = next(answers).wrong
            for k, source in enumerate(
                (wrong[int(chapter.number) % len(wrong)], book.cells[i + 1].source)
            ):
                cells.append(new_code_cell(source, id=f"{cell.id}-wrong{k}"))
        cells.append(cell)
    for cell in list(cells) if twice else []:
        again = copy.deepcopy(cell)
        again.id += "-again"
        again.metadata["tags"] = [t for t in build.tags(cell) if t != "parameters"]
        cells.append(again)
    book.cells = cells
    return book


@pytest.mark.parametrize("chapter", CHAPTERS, ids=names(CHAPTERS))
def test_a_chapter_runs_with_wrong_answers_and_solved(chapter, tmp_path, offline, capsys):
    twice = chapter.number in TWICE or os.environ.get("COURSE_TWICE") == "all"
    outcome = run.execute(wrong_then_solved(chapter, twice), chapter.name, PROFILE, tmp_path)
    with capsys.disabled():
        said = f"{outcome.seconds:.0f} s, {outcome.peak_bytes / 1e6:.0f} MB{', twice' * twice}"
        print(f"\n    {chapter.name}: {said} in {PROFILE}")
    assert outcome.error == ""
    checks = [(e["exercise"], e["status"]) for e in outcome.events if e["event"] == "check"]
    once = [(e.id, status) for e in shape.exercises(chapter) for status in ("wrong", "passed")]
    assert checks == once * (1 + twice)
    reached = {e["claim"] for e in outcome.events if e["event"] == "verdict"}
    assert reached == {i for i in claims.registry() if i.startswith(f"{chapter.number}.")}
