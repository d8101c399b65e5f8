"""A class's package: what learners get, and what they must not get."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest

from course_utils.course import build, cli, pack
from course_utils.course.chapters import UsageError, chapters


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("class") / "class.zip"
    assert cli.main(["class", "pack", "--out", str(target)]) == 0
    return target


@pytest.fixture(scope="module")
def bare(packed, tmp_path_factory) -> Path:
    """The package, unpacked in a folder of its own whose name has a space."""
    folder = tmp_path_factory.mktemp("a learner")
    with zipfile.ZipFile(packed) as z:
        z.extractall(folder)
    return folder / pack.FOLDER


def test_no_solution_no_teacher_s_note_and_no_test_travels_along(packed):
    with zipfile.ZipFile(packed) as z:
        members = {n.partition("/")[2]: z.read(n) for n in z.namelist()}
    assert len(list(chapters())) == sum(n.endswith(".ipynb") for n in members)
    assert not [n for n in members if n.startswith(("tests/", "notebooks/source/"))]
    assert pack.leaked(chapters(), members) == []
    for name, data in members.items():
        if name.endswith(".ipynb"):
            cells = nbformat.reads(data.decode(), 4).cells
            assert not [c for c in cells if "One solution" in c.source], name
            assert not [c for c in cells if "For the teacher" in c.source], name
            assert not any(c.get("outputs") for c in cells), name


def test_a_solution_that_travels_along_is_found_and_refused(monkeypatch, tmp_path):
    chapter = chapters(["03"])[0]
    exercise, solution = next(iter(pack._solutions(chapter)))
    indented = "def hidden():\n" + "\n".join(f"    {line}" for line in solution.splitlines())
    cell = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(indented)])
    for name, data in (("x.py", indented), ("x.ipynb", json.dumps(cell))):
        assert pack.leaked([chapter], {name: data.encode()}) == [f"{exercise} in {name}"]
    members = pack._members
    monkeypatch.setattr(
        pack, "_members", lambda chosen: [*members(chosen), ("x.py", indented.encode())]
    )
    with pytest.raises(UsageError, match="would travel along: 03"):
        pack.pack(tmp_path / "c.zip", ["03"])
    assert not list(tmp_path.iterdir())


def test_the_same_course_gives_the_same_package(packed, tmp_path):
    again = pack.pack(tmp_path / "again.zip")
    assert again.read_bytes() == packed.read_bytes()


def inside(folder: Path, *command: str) -> subprocess.CompletedProcess:
    """A program in the learner's folder, with the course that lies there and no other."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("COURSE_")}
    env |= {"PYTHONPATH": str(folder), "COURSE_PROFILE": "smoke"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_it_opens_resets_and_counts_in_a_bare_folder(bare):
    course = ("-m", "course_utils.course.cli")
    where = inside(bare, "-c", "import course_utils; print(course_utils.ROOT)").stdout.strip()
    assert Path(where) == bare
    inside(bare, *course, "lab", "--update-only")
    assert len(list((bare / "workbook").glob("*.ipynb"))) == len(chapters())
    inside(bare, *course, "reset", "03")
    assert "03" in inside(bare, *course, "progress").stdout


def test_its_first_chapter_runs_in_a_bare_folder(bare, tmp_path):
    out = tmp_path / "out.ipynb"
    inside(bare, "-m", "papermill", "notebooks/00_start_here.ipynb", str(out), "-k", "python3")
    cells = nbformat.read(out, 4).cells
    assert not [o for c in cells for o in c.get("outputs", ()) if o.output_type == "error"]


def test_it_sets_itself_up_from_its_own_files(bare):
    """Its set-up program finds all that it reads, without what the package has not."""
    code = (
        "from course_utils.course import setup\n"
        "calls = []\n"
        "setup.pip = lambda *a, **_: calls.append(a)\n"
        "setup.torch_backend = lambda: None\n"
        "setup.works = lambda python: True\n"
        "setup.VENV.mkdir(exist_ok=True)\n"
        "setup.install(extended=False)\n"
        "print(len(calls), setup.STAMP.is_file())\n"
    )
    assert inside(bare, "-c", code).stdout.splitlines()[-1] == "3 True"
    assert "setup.py" in (bare / "Makefile").read_text()


def test_a_class_s_copy_cannot_be_packed_again(bare):
    done = subprocess.run(
        [sys.executable, "-m", "course_utils.course.cli", "class", "pack"],
        cwd=bare,
        env=os.environ | {"PYTHONPATH": str(bare)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "no sources" in done.stderr


def test_the_student_edition_keeps_every_exercise_s_cell():
    for chapter in chapters():
        learner = {c.id for c in build.notebook(chapter).cells if "exercise" in build.tags(c)}
        student = build.notebook(chapter, "student").cells
        assert learner == {c.id for c in student if "exercise" in build.tags(c)}
