"""The reader's own copy: `notebooks/` stays as it was shipped, reading and answering happens in
`workbook/`.

`update` brings in what the course changed and keeps every cell that the reader touched, added or
deleted. Beside each notebook lies its base, the version that the reader's copy was made from; what
differs from the base is the reader's. A file is replaced whole or not at all, the reader's before
its base: a kill between the two costs nothing, the next call finds both cells equal.
"""

import copy
import difflib
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat.notebooknode import NotebookNode
from nbformat.v4 import new_markdown_cell

from course_utils import ROOT
from course_utils.course.chapters import UsageError

FOLDER = Path(os.environ.get("COURSE_WORKBOOK", ROOT / "workbook"))
ALIKE = 0.6
"""Two versions of a cell are one cell if that much of their text is equal (difflib's ratio)."""


@dataclass(frozen=True)
class Change:
    """What `update` did to a notebook: "new", "updated", "unchanged" or "left alone", and how many
    cells are the reader's own, and how many both changed.
    """

    name: str
    what: str
    kept: int = 0
    both: int = 0
    reason: str = ""

    def __str__(self) -> str:
        parts = [f"{self.name}: {self.what}"]
        parts += [f"{self.kept} cells of yours kept"] if self.kept else []
        parts += [f"{self.both} changed by both: both stand there"] if self.both else []
        return ", ".join(parts) + (f" ({self.reason})" if self.reason else "")


def update(shipped: Iterable[Path], folder: Path = FOLDER) -> list[Change]:
    """Bring every shipped notebook into the workbook; what was done, one entry a notebook."""
    base_folder = folder / ".base"
    try:
        base_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"the workbook can't be written in {folder} ({error.strerror}). Set COURSE_WORKBOOK to"
            " a folder that can."
        ) from None
    return [_bring(path, folder / path.name, base_folder / path.name) for path in sorted(shipped)]


def _bring(shipped: Path, mine: Path, base: Path) -> Change:
    fresh = bare(read(shipped))
    if not mine.exists():
        write(mine, fresh)
        write(base, fresh)
        return Change(mine.stem, "new")
    try:
        own = read(mine)
    except UsageError as error:
        return Change(mine.stem, "left alone", reason=str(error))
    try:
        old = read(base)
    except UsageError:
        old = bare(own)  # without a base nothing counts as the course's
        old.cells = []
    if [_said(c) for c in old.cells] == [_said(c) for c in fresh.cells]:
        return Change(mine.stem, "unchanged", kept=touched(old, own))
    merged, both = merge(old, own, fresh)
    write(mine, merged)
    write(base, fresh)
    return Change(mine.stem, "updated", kept=touched(fresh, merged), both=both)


def reset(shipped: Path, folder: Path = FOLDER) -> Path | None:
    """Put a fresh copy into the workbook; where the reader's old one lies now, None if there was
    none.
    """
    mine, kept = folder / shipped.name, None
    if mine.exists():
        moment = time.strftime("%Y-%m-%d-%H%M%S")
        kept = folder / "kept" / f"{mine.stem}-{moment}.ipynb"
        kept.parent.mkdir(parents=True, exist_ok=True)
        number = 1
        while kept.exists():
            number += 1
            kept = kept.with_name(f"{mine.stem}-{moment}-{number}.ipynb")
        kept.write_bytes(mine.read_bytes())
    fresh = bare(read(shipped))
    (folder / ".base").mkdir(parents=True, exist_ok=True)
    write(mine, fresh)
    write(folder / ".base" / shipped.name, fresh)
    return kept


def read(path: Path) -> NotebookNode:
    """A notebook. Raises UsageError, which names the file, if it is none."""
    try:
        return nbformat.read(path, as_version=4)
    except OSError as error:
        raise UsageError(f"{path.name} can't be read: {error.strerror}") from None
    except Exception as error:  # nbformat raises what JSON and its schema raise
        first = str(error).splitlines()[0][:80]
        raise UsageError(f"{path.name} is no whole notebook ({first})") from None


def write(path: Path, notebook: NotebookNode) -> None:
    """Replace the file by this notebook in one step."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        nbformat.write(notebook, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def bare(notebook: NotebookNode) -> NotebookNode:
    """The notebook without outputs: a reader's copy starts with what the reader measures."""
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def touched(base: NotebookNode, mine: NotebookNode) -> int:
    """How many cells of `mine` are the reader's: changed, or not in `base`."""
    known = {cell.id: _said(cell) for cell in base.cells}
    return sum(known.get(cell.id) != _said(cell) for cell in mine.cells)


def merge(base: NotebookNode, mine: NotebookNode, fresh: NotebookNode) -> tuple[NotebookNode, int]:
    """The fresh notebook with everything that is the reader's in `mine`, and how many cells both
    changed: there the reader's stands first and the course's new one below it, as text.

    Cells of `mine` and `base` belong together by their ids. Those of `base` and `fresh` belong
    together by what they say, because an id counts the course's cells and moves when one is added.
    """
    own = {cell.id: cell for cell in mine.cells}
    at = {cell.id: i for i, cell in enumerate(base.cells)}
    partner = pair(base, fresh)  # index in base → index in fresh
    back = {f: b for b, f in partner.items()}
    taken = {cell.id for cell in [*fresh.cells, *base.cells]}
    merged, both = [], 0
    follow: dict[
        int | None, list[NotebookNode]
    ] = {}  # index in fresh → the reader's cells after it
    place: int | None = None
    for cell in mine.cells:
        b = at.get(cell.id)
        if b is not None and b in partner:
            place = partner[b]
        elif b is None or _said(cell) != _said(base.cells[b]):
            follow.setdefault(place, []).append(_renamed(cell, taken))
    merged += follow.pop(None, [])
    for f, new in enumerate(fresh.cells):
        old = base.cells[back[f]] if f in back else None
        cell = own.get(old.id) if old is not None else None
        if old is None or (cell is None and _said(old) != _said(new)):
            merged.append(new)
        elif cell is not None:
            found = _three(old, cell, new)
            both += len(found) > 1
            merged += found
        merged += follow.pop(f, [])
    result = copy.deepcopy(fresh)
    result.cells = _distinct(merged)
    return result, both


def _three(old: NotebookNode, mine: NotebookNode, new: NotebookNode) -> list[NotebookNode]:
    """One cell of three versions: the reader's where the reader changed it, else the course's; the
    reader's outputs stay where the code does.
    """
    kept = copy.deepcopy(mine)
    kept.id = new.id
    if _said(mine) == _said(new):
        return [kept]
    if _said(mine) == _said(old):
        return [new]
    if _said(old) == _said(new):
        return [kept]
    fence = "```python\n{}\n```" if new.cell_type == "code" else "{}"
    text = "*The course changed the cell above, and so did you. Its new version:*\n\n" + fence
    note = new_markdown_cell(text.format(new.source), id=f"{new.id}-new")
    return [kept, note]


def pair(base: NotebookNode, fresh: NotebookNode) -> dict[int, int]:
    """Which cell of `fresh` each cell of `base` became, by index: equal cells first, exercises by
    their names, then what is alike between two pairs.
    """
    old, new = ([_said(c) for c in notebook.cells] for notebook in (base, fresh))
    found: dict[int, int] = {}
    for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag == "equal":
            found |= dict(zip(range(a, b), range(c, d), strict=True))
        elif tag == "replace":
            found |= _alike(old, new, range(a, b), range(c, d))
    names = [{name: i for i, name in _exercises(notebook)} for notebook in (base, fresh)]
    for name in names[0].keys() & names[1].keys():
        b, f = names[0][name], names[1][name]
        found = {k: v for k, v in found.items() if k != b and v != f} | {b: f}
    return found


def _alike(old: list, new: list, left: range, right: range) -> dict[int, int]:
    found, start = {}, right.start
    for i in left:
        scores = {
            j: difflib.SequenceMatcher(None, old[i][1], new[j][1], autojunk=False).ratio()
            for j in range(start, right.stop)
            if old[i][0] == new[j][0]
        }
        best = max(scores, key=scores.get, default=None)
        if best is not None and scores[best] >= ALIKE:
            found[i], start = best, best + 1
    return found


def _exercises(notebook: NotebookNode) -> list[tuple[int, str]]:
    """The index of each exercise's stub and its name: the cell before the one that checks it."""
    checks = [re.search(r"exercises\.check\(\s*[\"']([^\"']+)", c.source) for c in notebook.cells]
    return [(i - 1, check[1]) for i, check in enumerate(checks) if check and i]


def _renamed(cell: NotebookNode, taken: set[str]) -> NotebookNode:
    """A cell that only the reader has, under an id that no cell of the course has."""
    cell = copy.deepcopy(cell)
    cell.id = f"{cell.id[:58]}-own" if cell.id in taken else cell.id
    return cell


def _said(cell: NotebookNode) -> tuple[str, str]:
    return cell.cell_type, cell.source


def _distinct(cells: list[NotebookNode]) -> list[NotebookNode]:
    """The cells with ids of which no two are equal: a reader's cell keeps its own where it can."""
    seen: set[str] = set()
    for cell in cells:
        wanted, number = cell.id, 1
        while cell.id in seen:
            number += 1
            cell.id = f"{wanted[:58]}-{number}"
        seen.add(cell.id)
    return cells
