"""A notebook's answers against their checks, without opening it.

Of the cells above a check, imports, functions and classes are executed, and the exercise's own cell
whole: nothing is measured or trained. It happens in a process of its own: an answer that takes the
process with it is told, and the next one is checked.
"""

import ast
import contextlib
import io
import json
import linecache
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

from course_utils import exercises
from course_utils.course import workbook
from course_utils.course.chapters import UsageError, chapters

_KEPT = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class Asked:
    """A call of exercises.check in a notebook: the exercise, the answer's name, and its cell."""

    exercise: str
    answer: str
    cell: int


def notebooks(wanted: list[str]) -> list[Path]:
    """The files asked for: as paths, or as chapters, the reader's copy where there is one; all
    chapters by default. Raises UsageError for one that is not there.
    """
    files = [Path(w) for w in wanted if w.endswith(".ipynb")]
    names = [w for w in wanted if not w.endswith(".ipynb")]
    for chapter in chapters(names) if names or not files else []:
        own = workbook.FOLDER / chapter.learner.name
        files.append(own if own.is_file() else chapter.learner)
    for path in files:
        if not path.is_file():
            raise UsageError(f"there is no notebook {path}.")
    return files


def read(path: Path) -> tuple[list[tuple[str, bool]], list[Asked]]:
    """The code cells as (plain Python, whether it is an exercise's), and what they ask. Raises
    UsageError for a file that is no notebook.
    """
    try:
        found = nbformat.read(path, as_version=4).cells
    except Exception as error:
        raise UsageError(f"{path} is no notebook: {type(error).__name__}: {error}") from None
    plain, cells, asked = TransformerManager(), [], []
    for cell in (c for c in found if c.cell_type == "code"):
        source = "" if cell.source.startswith("%%") else plain.transform_cell(cell.source)
        for node in _walk(source):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "exercises.check":
                asked.append(Asked(*(ast.unparse(a).strip("'\"") for a in node.args), len(cells)))
        cells.append((source, "exercise" in cell.metadata.get("tags", [])))
    return cells, asked


def _walk(source: str) -> Iterator[ast.AST]:
    with contextlib.suppress(SyntaxError):
        yield from ast.walk(ast.parse(source))


def defined(cells: list[tuple[str, bool]]) -> tuple[dict, str]:
    """What these cells define, and the first error of an exercise's cell, or an empty text."""
    space, wrong = {"__name__": "__main__"}, ""
    for number, (source, whole) in enumerate(cells):
        try:
            body = ast.parse(source).body
        except SyntaxError as error:
            wrong = wrong or (f"SyntaxError: {error}" if whole else "")
            continue
        filename = f"<cell {number}>"  # where `inspect` finds the source, as in a notebook
        linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
        for node in body:
            if not (whole or isinstance(node, _KEPT)) or "get_ipython()" in ast.unparse(node):
                continue
            try:
                exec(compile(ast.Module([node], []), filename, "exec"), space)
            except (Exception, SystemExit) as error:
                if whole:
                    wrong = wrong or f"{type(error).__name__}: {error}"
    return space, wrong


def answer(path: Path, asked: Asked, cells: list[tuple[str, bool]]) -> exercises.Result:
    """Check one answer, in this process."""
    with contextlib.redirect_stdout(io.StringIO()):
        space, wrong = defined(cells[: asked.cell])
    if wrong:
        return exercises.Result(asked.exercise, "wrong", f"the exercise's cell stops with {wrong}")
    if asked.answer not in space:
        text = f"no cell above the check defines {asked.answer}."
        return exercises.Result(asked.exercise, "wrong", text)
    try:
        return exercises.check(asked.exercise, space[asked.answer])
    except exercises.UnknownExercise as error:
        return exercises.Result(asked.exercise, "wrong", str(error))


def check(path: Path) -> Iterator[exercises.Result]:
    """The results of a notebook's exercises, each as soon as it is there."""
    left = read(path)[1]
    while left:
        command = [sys.executable, "-m", __name__, str(path), str(len(left))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            for line in child.stdout:
                if not line.startswith("{"):
                    print(line, end="")  # what an answer printed
                    continue
                yield exercises.Result(**json.loads(line))
                left = left[1:]
        if child.returncode and left:
            text = f"your code took the whole process with it (exit status {child.returncode})."
            yield exercises.Result(left[0].exercise, "wrong", text)
            left = left[1:]


def main(path: str, last: str) -> None:
    """In the child: the last so many of the notebook's exercises, a line of JSON each."""
    cells, asked = read(Path(path))
    for one in asked[-int(last) :]:
        print(json.dumps(asdict(answer(Path(path), one, cells))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
