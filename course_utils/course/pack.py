"""One zip for a class: student notebooks, the package without the makers' wing that learners do not
need, data and set-up files, and a README of its own. No solution is in it, in no form.
"""

import io
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import nbformat

from course_utils import ROOT
from course_utils.course import build
from course_utils.course.chapters import Chapter, UsageError, chapters

FOLDER = "efficient-deep-learning-measured"
"""The one folder inside the zip."""
SETTINGS = ("pyproject.toml", "requirements.lock", "environment.yml", "LICENSE", ".gitattributes")
DATE = (2026, 1, 1, 0, 0, 0)
"""Of every member, so that the same course gives the same zip, byte for byte."""
SHORT = 40  # characters
MAKEFILE = """\
# Sets itself up first. The README says how to do it without make.
PYTHON ?= python3
WHEELS ?=

lab: setup
\t@.venv/bin/course lab

setup:
\t@$(PYTHON) course_utils/course/setup.py $(if $(WHEELS),--wheels "$(WHEELS)")

.PHONY: lab setup
"""
README = """\
# {title}

```
make lab     # set up, then open your copy of the notebooks in JupyterLab
```

Without make: `python3 course_utils/course/setup.py`, then `.venv/bin/course lab` (on Windows
`.venv\\Scripts\\course lab`). You need Python 3.11 or newer, two cores and 8 GB of memory; the
first call installs everything into `.venv`, after that nothing is fetched. Were you given a folder
of packages? `make lab WHEELS=FOLDER`, or `setup.py --wheels FOLDER`, installs from it without a
network.

**What to do.** You work in `workbook/`, which `make lab` fills. In each chapter write your
predictions, run the cells from the top, and replace the `...` of exercises A, B and C. The cell
below an exercise checks it and says what is wrong, with the smallest case that fails.
`.venv/bin/course check 03` does the same without opening a notebook, and `.venv/bin/course
progress` says how far you are.

**What to hand in.** The folder `workbook/` as a zip, or the notebooks that were asked for. Leave
the cells of the exercises where they are: answers are found by their cells.

**If something does not run:** `.venv/bin/course doctor` says what your machine can do and what a
chapter will skip, and why.

## Chapters

{chapters}
"""


def pack(target: Path, wanted: list[str] | None = None) -> Path:
    """Write the zip to `target`, whole or not at all. Raises UsageError where this copy has no
    sources to make student notebooks from, or where a solution would travel along.
    """
    chosen = chapters(wanted)
    if not all(chapter.source.is_file() for chapter in chosen):
        raise UsageError("this copy has no sources in notebooks/source/: pack from a whole course.")
    members = dict(_members(chosen))
    if leaks := leaked(chosen, members):
        raise UsageError(f"solutions would travel along: {', '.join(leaks)}.")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as out:
        for name, data in sorted(members.items()):
            info = zipfile.ZipInfo(f"{FOLDER}/{name}", DATE)
            info.external_attr = 0o644 << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            out.writestr(info, data)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    part.write_bytes(buffer.getvalue())
    part.replace(target)
    return target


def _members(chosen: list[Chapter]) -> Iterator[tuple[str, bytes]]:
    """(path inside the folder, bytes) of everything that a learner gets."""
    for name in SETTINGS:
        if (ROOT / name).is_file():
            yield name, (ROOT / name).read_bytes()
    for top in ("course_utils", "datasets"):
        for path in sorted((ROOT / top).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path.relative_to(ROOT).as_posix(), path.read_bytes()
    for path in sorted((ROOT / "notebooks" / "claims").glob("*.toml")):
        yield path.relative_to(ROOT).as_posix(), path.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        for chapter in chosen:
            path = build.write(chapter, "student", Path(folder))
            yield f"notebooks/{path.name}", path.read_bytes()
    listed = "\n".join(f"- {chapter.title()}" for chapter in chosen)
    title = "Efficient Deep Learning, Measured: for learners"
    yield "README.md", README.format(title=title, chapters=listed).encode()
    yield "Makefile", MAKEFILE.encode()


def leaked(chosen: Iterable[Chapter], members: Mapping[str, bytes]) -> list[str]:
    """For each solution that stands in a member, however it is indented: its exercise and where.
    Bodies of a few words, which anything may hold by chance, do not count.
    """
    texts = {name: _words(_text(name, data)) for name, data in members.items()}
    found = []
    for chapter in chosen:
        for exercise, cell in _solutions(chapter):
            body = _words(cell.partition(":\n")[2])
            if len(body) >= SHORT:
                found += [f"{exercise} in {name}" for name, text in texts.items() if body in text]
    return found


def _solutions(chapter: Chapter) -> Iterator[tuple[str, str]]:
    """("03.A", the solution's source) of each exercise."""
    letters = iter("ABCDEFG")
    exercise = ""
    for cell in build.cells(chapter):
        if "exercise" in build.tags(cell):
            exercise = f"{chapter.number}.{next(letters)}"
        elif "solution" in build.tags(cell):
            yield exercise, cell.source


def _text(name: str, data: bytes) -> str:
    """What can be read in a member: of a notebook, its cells."""
    if name.endswith(".ipynb"):
        return "\n".join(cell.source for cell in nbformat.reads(data.decode(), 4).cells)
    return data.decode() if name.endswith((".py", ".md", ".toml", ".txt")) else ""


def _words(text: str) -> str:
    return " ".join(text.split())
