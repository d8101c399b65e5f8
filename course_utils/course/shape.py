"""What every chapter must have, checked on its source and on its built notebook: fast, nothing is
executed.

Each check returns a list of complaints; an empty list is a pass. Sizes and minutes: `pace`.
"""

import ast
import re
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from nbformat.notebooknode import NotebookNode

from course_utils import ROOT, claims
from course_utils.course import build
from course_utils.course.chapters import Chapter

PARTS = (
    "Recall",
    "Predict",
    "From scratch",
    "Measure",
    "Explain",
    "If yours shows no gain",
    "Myth",
    "Exercise A",
    "Exercise B",
    "Exercise C",
    "The tool of the field",
    "Break it",
    "Exit quiz",
    "Key points",
    "Sources",
)
OTHER_SHAPE = (
    "00",
    "16",
)  # the door and the capstone are built differently; the rest of the checks hold for them
MACHINE_PATH = re.compile(r"/(home|root|Users|work|farm|tmp|private/var)/[\w.-]+")
REGISTRY = re.compile(r"https?://[^/\s]*(py[p]i|npm[j]s|pyth[o]nhosted|deb[.]deb)")
_UNITS = (
    r"%|×|x\b|ms\b|µs\b|ns\b|[GMkK]B\b|[MG]iB\b|GHz\b|dB\b|GFLOP|percent\b|seconds?\b|times"
    r" (faster|slower|smaller)"
)
_NUMBER = re.compile(rf"(?<![\w.])\d[\d.,]*\s?({_UNITS})(?!\d)")
_NOT_PROSE = r"<details>.*?</details>|```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$\n]*\$|<!--.*?-->"
_SOURCE = re.compile(r"\]\(|\b(19|20)\d\d\b")  # a link, or a work cited by its year


@dataclass
class Exercise:
    """One exercise of a source: its id, the name of the answer, and the cells around it."""

    id: str
    answer: str
    stub: str
    solution: str = ""
    hints: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def exercises(chapter: Chapter) -> list[Exercise]:
    """The exercises of a source in order. Raises ValueError where a stub is not followed by its
    check.
    """
    found: list[Exercise] = []
    cells = build.cells(chapter)
    for i, cell in enumerate(cells):
        kind = build.tags(cell)
        if "exercise" in kind:
            exercise_id, answer = _check_call(cells[i + 1].source if i + 1 < len(cells) else "")
            found.append(Exercise(exercise_id, answer, cell.source))
        elif "hint" in kind:
            found[-1].hints.append(cell.source)
        elif "solution" in kind:
            found[-1].solution = cell.source
        elif "wrong" in kind:
            found[-1].wrong.append(cell.source)
    return found


def _check_call(source: str) -> tuple[str, str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "exercises.check":
            return ast.literal_eval(node.args[0]), ast.unparse(node.args[1])
    raise ValueError(f"the cell after a stub must call exercises.check; it is:\n{source}")


def source_complaints(chapter: Chapter) -> list[str]:
    cells = build.cells(chapter)
    out = [
        f"code cell {i} has {n} lines, more than 40"
        for i, c in enumerate(cells)
        if c.cell_type == "code" and (n := len(c.source.splitlines())) > 40
    ]
    out += (
        _parts(chapter, cells)
        + _exercises(chapter)
        + _claims(chapter, cells)
        + _prose(cells)
        + _files(cells)
        + _links(chapter, cells)
    )
    if "parameters" not in build.tags(next(c for c in cells if c.cell_type == "code")):
        out.append('the first code cell must be tagged "parameters" and set PROFILE')
    return out


def _files(cells: list[NotebookNode]) -> list[str]:
    """A path with a space in it (the course's own folder, say) is one path only in quotes; without
    them the magic refuses, and JupyterLab stops there without an error in the page.
    """
    return [
        f"the path of %%writefile must be in quotes: {path}"
        for c in cells
        if (found := re.match(r"%%writefile (.+)", c.source))
        and not (path := found[1]).startswith('"')
    ]


def _parts(chapter: Chapter, cells: list[NotebookNode]) -> list[str]:
    if chapter.number in OTHER_SHAPE:
        return []
    text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    marks = {
        m.group(1).strip(): m.start()
        for m in re.finditer(r"^(?:## |\*\*)([^*\n]+?)(?:\*\*.*)?$", text, re.M)
    }
    wanted = [p for p in PARTS if not (p == "Recall" and chapter.number == "01")]
    return [
        f"the part {part!r} is missing"
        for part in wanted
        if not any(m.startswith(part) for m in marks)
    ]


def _exercises(chapter: Chapter) -> list[str]:
    out = []
    for e in exercises(chapter):
        if not e.id.startswith(f"{chapter.number}."):
            out.append(f"exercise {e.id} does not carry the chapter's number")
        if not e.solution:
            out.append(f"exercise {e.id} has no solution")
        if not 1 <= len(e.hints) <= 3:
            out.append(f"exercise {e.id} has {len(e.hints)} hints, not one to three")
        if len(set(e.wrong)) < 3:
            out.append(
                f"exercise {e.id} has {len(set(e.wrong))} different wrong answers, fewer than three"
            )
    if chapter.number not in OTHER_SHAPE and not any(
        "instructor" in build.tags(c) for c in build.cells(chapter)
    ):
        out.append("there is no note for the teacher")
    return out


def _claims(chapter: Chapter, cells: list[NotebookNode]) -> list[str]:
    code = "\n".join(c.source for c in cells if c.cell_type == "code")
    used = set(re.findall(r'claims\.verdict\(\s*"([^"]+)"', code))
    known = {i for i in claims.registry() if i.startswith(f"{chapter.number}.")}
    return [
        f"verdict on {i!r}, which notebooks/claims/ does not have"
        for i in sorted(used - set(claims.registry()))
    ] + [f"claim {i!r} never gets a verdict" for i in sorted(known - used)]


def _prose(cells: list[NotebookNode]) -> list[str]:
    """A number with %, × or a unit is either measured by a cell or carries the source it comes
    from.
    """
    out = []
    for cell in cells:
        if cell.cell_type != "markdown" or {"solution", "hint", "instructor"} & set(
            build.tags(cell)
        ):
            continue
        # A quiz may say wrong things: that is what it is for.
        text = re.sub(r"## Exit quiz.*?(?=\*\*Key points|\Z)", " ", cell.source, flags=re.S)
        text = re.sub(_NOT_PROSE, " ", text, flags=re.S)
        for block in re.split(r"\n\s*\n|\n(?=[|*-] ?)", text):
            if (found := _NUMBER.search(block)) and not _SOURCE.search(block):
                out.append(
                    f"a number without a source: “{found.group(0)}” in"
                    f" “{' '.join(block.split())[:90]}”"
                )
    return out


def _links(chapter: Chapter, cells: list[NotebookNode]) -> list[str]:
    text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    return broken_links(text, chapter.learner.parent)


def broken_links(text: str, folder: Path) -> list[str]:
    """Relative links that lead nowhere, and addresses of a package registry."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [t.split("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)]
    out = [f"the link {t} leads nowhere" for t in local if not (folder / t).exists()]
    return out + ([f"a registry's address: {m.group(0)}"] if (m := REGISTRY.search(text)) else [])


def notebook_complaints(chapter: Chapter) -> list[str]:
    """Whether the committed learner edition is what its source builds, and was executed by today's
    code.
    """
    if not chapter.learner.is_file():
        return [f"{chapter.learner.name} was never built: course build {chapter.number}"]
    stored, wanted = nbformat.read(chapter.learner, as_version=4), build.notebook(chapter)
    remedy = f"run: course build {chapter.number}"
    meta = stored.metadata.get("course", {})
    out = []
    if _texts(stored) != _texts(wanted):
        out.append(f"source and notebook differ; {remedy}")
    if meta.get("code_sha256") != build.code_hash(chapter, wanted) or meta.get("profile") != "fast":
        out.append(f"the outputs are stale, or not from fast; {remedy}")
    if meta.get("output_sha256") != build.output_hash(stored):
        out.append(f"an output was edited by hand; {remedy}")
    for cell in (c for c in stored.cells if c.cell_type == "code"):
        if cell.execution_count is None:
            out.append(f"cell {cell.id} never ran")
        out += [
            f"cell {cell.id} ended in {o.ename}" for o in cell.outputs if o.output_type == "error"
        ]
        out += [
            f"cell {cell.id} shows a figure without an alternative text"
            for o in cell.outputs
            if _no_alt(o)
        ]
    whole = chapter.learner.read_text(encoding="utf-8")
    out += [
        f"it shows a path of the machine: {m.group(0)}" for m in [MACHINE_PATH.search(whole)] if m
    ]
    if str(ROOT) in whole:
        out.append(f"it shows the course's own folder, {ROOT}")
    return out


def _texts(book: NotebookNode) -> list[tuple]:
    return [(c.id, c.cell_type, c.source, tuple(build.tags(c))) for c in book.cells]


def _no_alt(output: NotebookNode) -> bool:
    return "image/png" in output.get("data", {}) and not output.get("metadata", {}).get(
        "image/png", {}
    ).get("alt")
