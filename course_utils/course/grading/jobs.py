"""What is judged: each exercise with its cell's id, its stub, and the course's cells above it."""

import ast
import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

from course_utils.course import build, check
from course_utils.course.chapters import Chapter, UsageError, chapters

WITHIN = frozenset(
    ("02.C", "03.B", "04.B", "04.C", "06.B", "07.B", "07.C", "08.B", "09.B", "10.B", "13.B")
)
"""Exercises whose check shares graphs, layers, memory or a clock with the answer: it runs beside
it, in one process. All others are asked across a socket.
"""


@dataclass(frozen=True)
class Task:
    """`context` is the plain Python of the course's cells above; the exercises' are not in it."""

    exercise: str
    cell: str
    answer: str
    stub: str
    context: tuple[str, ...]

    @property
    def within(self) -> bool:
        """Whether its check runs beside the answer."""
        return self.exercise in WITHIN


def tasks(wanted: list[str] | None = None) -> dict[str, Task]:
    """The exercises of the chapters asked for, all by default, by id. Raises UsageError where this
    copy has no sources.
    """
    chosen = chapters(wanted)
    if not all(chapter.source.is_file() for chapter in chosen):
        raise UsageError(
            "this copy has no sources in notebooks/source/: grade with a whole course."
        )
    return {task.exercise: task for chapter in chosen for task in _of(chapter)}


@functools.cache
def _of(chapter: Chapter) -> tuple[Task, ...]:
    with tempfile.TemporaryDirectory() as folder:
        path = build.write(chapter, "student", Path(folder))
        cells, asked = check.read(path)
        code = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    found = []
    for one in asked:
        place = max(i for i in range(one.cell) if cells[i][1])
        context = tuple(source for source, exercise in cells[:place] if not exercise)
        stub = plain(code[place].source)
        found.append(Task(one.exercise, code[place].id, one.answer, stub, context))
    return tuple(found)


def plain(source: str) -> str:
    """A cell's source as plain Python, its magics translated; nothing of another program's cell."""
    return "" if source.startswith("%%") else TransformerManager().transform_cell(source)


def pending(source: str, stub: str) -> bool:
    """Whether this is the stub still, or holds a `...` where code is due. One that is no Python is
    an attempt.
    """
    if source.strip() in ("", stub.strip()):
        return True
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    subs = [n for n in ast.walk(tree) if isinstance(n, ast.Subscript)]
    in_index = {id(n) for sub in subs for n in ast.walk(sub.slice)}
    dots = (n for n in ast.walk(tree) if isinstance(n, ast.Constant) and n.value is ...)
    return any(id(n) not in in_index for n in dots)


def modules(every: dict[str, Task]) -> list[str]:
    """What the contexts import, for the server to import once."""
    found = set()
    for context in {task.context for task in every.values()}:
        for node in ast.walk(ast.parse("\n".join(context))):
            if isinstance(node, ast.Import):
                found |= {a.name for a in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return sorted(found)
