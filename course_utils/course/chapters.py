"""Finding chapters, and what every command says when something asked for is not there."""

import difflib
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from course_utils import ROOT
from course_utils.course import start

NOTEBOOKS = ROOT / "notebooks"
SOURCES = NOTEBOOKS / "source"
EDITIONS = ("learner", "instructor", "student")
PROFILES = ("smoke", "fast", "full")


class UsageError(Exception):
    """Something asked for on the command line does not exist: one line, exit status 2."""


@dataclass(frozen=True)
class Chapter:
    """One chapter by its source, e.g. notebooks/source/01_measurement.py."""

    source: Path

    @property
    def name(self) -> str:
        return self.source.stem

    @property
    def number(self) -> str:
        return self.name[:2]

    @property
    def learner(self) -> Path:
        return self.source.parent.parent / f"{self.name}.ipynb"

    @property
    def claims_file(self) -> Path:
        return self.source.parent.parent / "claims" / f"{self.number}.toml"

    def text(self) -> str:
        return self.source.read_text(encoding="utf-8")

    def title(self) -> str:
        found = re.search(r"^# # (.+)$", self.text(), re.M)
        return found.group(1) if found else self.name

    def packages(self) -> list[str]:
        """What it uses beside torch and the course's own dependencies (`start.packages`)."""
        return start.packages(self.text())


def chapters(wanted: list[str] | None = None, folder: Path = SOURCES) -> list[Chapter]:
    """All chapters in order, or those asked for as "1", "01" or "01_measurement". A class's copy
    has notebooks and no sources: there a chapter is known by its notebook, and has no text.
    """
    known = [Chapter(path) for path in sorted(folder.glob("[0-9][0-9]_*.py"))]
    if not folder.is_dir():
        shipped = sorted(folder.parent.glob("[0-9][0-9]_*.ipynb"))
        known = [Chapter(folder / f"{path.stem}.py") for path in shipped]
    if not wanted:
        return known
    by_key = {key: c for c in known for key in (c.name, c.number, str(int(c.number)))}
    for key in wanted:
        if key not in by_key:
            near = difflib.get_close_matches(key, by_key, 1, 0.3)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UsageError(
                f"there is no chapter {key!r}; there are"
                f" {', '.join(c.name for c in known) or 'none yet'}.{hint}"
            )
    return sorted({by_key[key] for key in wanted}, key=lambda c: c.name)


def one_of(value: str, allowed: tuple[str, ...], what: str) -> str:
    if value not in allowed:
        raise UsageError(f"{what} is {value!r}; it must be one of {', '.join(allowed)}.")
    return value


def writable(folder: Path) -> Path:
    """`folder`, made if needed and tried by writing into it; UsageError with the system's reason
    otherwise.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}.") from None
    return folder


def repository() -> str:
    """The one setting from which Colab and Binder links are made: [tool.course] repository in
    pyproject.toml.
    """
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return settings["tool"]["course"]["repository"]
