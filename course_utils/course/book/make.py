"""Assemble the sources, call Sphinx, and put the book in its place whole or not at all."""

import contextlib
import importlib.util
import io
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from course_utils import ROOT
from course_utils.course import atlas
from course_utils.course.book import assemble
from course_utils.course.chapters import UsageError, writable

HERE = Path(__file__).resolve().parent
OUT = ROOT / "build" / "book"
NEEDS = ("sphinx", "myst_nb", "furo", "latex2mathml")


@dataclass(frozen=True)
class Book:
    """What was made: the folder, its HTML pages, its bytes, and the seconds that it took."""

    folder: Path
    pages: int
    bytes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.folder / 'index.html'}: {self.pages} pages, {self.bytes / 1e6:.1f} MB,"
            f" {self.seconds:.0f} s"
        )


def make(out: Path = OUT, ledgers: Path = atlas.FOLDER) -> Book:
    """Write the book to `out`, which it replaces. Raises UsageError where a package is missing or
    Sphinx has a warning; then what lay in `out` stays.
    """
    if missing := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        raise UsageError(f"the book needs {', '.join(missing)}: run `make setup` once more.")
    start = time.monotonic()
    if out.exists() and not (out / ".buildinfo").is_file() and any(out.iterdir()):
        raise UsageError(f"{out} holds something that is no book: choose another --out.")
    desk = writable(out.parent) / f"{out.name}.part"  # stays after a complaint, which names files
    shutil.rmtree(desk, ignore_errors=True)
    assemble.assemble(desk / "source", ledgers)
    _sphinx(desk / "source", desk / "html")
    shutil.rmtree(out, ignore_errors=True)
    (desk / "html").replace(out)
    shutil.rmtree(desk)
    files = [path for path in out.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    pages = sum(path.suffix == ".html" for path in files)
    return Book(out, pages, size, time.monotonic() - start)


def _sphinx(source: Path, html: Path) -> None:
    """Run Sphinx in this process; every warning is an error, and all of them are told."""
    from sphinx.cmd.build import build_main

    said = io.StringIO()
    doctrees = source / ".doctrees"
    command = ["-q", "-W", "--keep-going", "-b", "html", "-c", HERE, "-d", doctrees, source, html]
    with contextlib.redirect_stderr(said):
        status = build_main([str(word) for word in command])
    if status:
        raise UsageError(f"Sphinx has complaints, and there is no new book:\n{said.getvalue()}")
