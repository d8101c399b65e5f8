"""One source, three editions: notebooks/source/NN_name.py → learner, instructor and student
notebooks.

The way is one-way and repeatable: cell ids come from the chapter and the cell's position, outputs
carry no times, no execution metadata and no paths. What was executed is stored as a hash in the
notebook's metadata.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import jupytext
import nbformat
from nbformat.notebooknode import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from course_utils import ledger
from course_utils.claims import PROOFS
from course_utils.course import edition
from course_utils.course.badges import links
from course_utils.course.chapters import NOTEBOOKS, Chapter, repository

KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
QUIET = {
    "extra_arguments": ["--IPKernelApp.log_level=40"]
}  # local kernels warn of unencrypted transport at every start
START = """\
# Opened alone, in Colab for example? Then this cell fetches the course, and adds the packages that
# this chapter uses and that are missing here. Inside the course it does nothing.
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("course_utils") is None:
    source = os.environ.get("COURSE_REPOSITORY", "{repository}")
    if not source:
        raise SystemExit(
            "This copy names no repository to fetch the course from. Choose the kernel of the"
            " course's own environment (.venv), or set COURSE_REPOSITORY."
        )
    if source.count("/") == 1 and not Path(source).exists():
        source = f"https://github.com/{{source}}"
    folder = Path.cwd() / "efficient-deep-learning-measured"
    if not folder.exists():
        subprocess.run(["git", "clone", "-q", "--depth", "1", source, folder], check=True)
    add = folder / "course_utils" / "course" / "start.py"
    subprocess.run([sys.executable, add, "{number}"], check=True)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = str(folder)  # for the programs that a chapter starts"""


def cells(chapter: Chapter) -> list[NotebookNode]:
    """The source's cells in order; each carries its tags in metadata["tags"]."""
    return jupytext.reads(chapter.text(), fmt="py:percent").cells


def tags(cell: NotebookNode) -> list[str]:
    return list(cell.metadata.get("tags", []))


def notebook(chapter: Chapter, edition: str = "learner") -> NotebookNode:
    """The chapter's edition, not executed."""
    built = new_notebook(metadata={"kernelspec": KERNEL, "language_info": {"name": "python"}})
    built.cells = list(_edition(chapter, edition))
    _insert_start(chapter, built)
    built.metadata["course"] = {"chapter": chapter.name, "edition": edition}
    return built


def _edition(chapter: Chapter, edition: str) -> Iterator[NotebookNode]:
    source = cells(chapter)
    hints = 0
    for index, cell in enumerate(source):
        kind = set(tags(cell))
        cell_id = f"c{chapter.number}-{index:03d}"
        if "exercise" in kind:
            hints = 0
            if edition == "instructor":
                cell = _next(source, index, "solution")
            yield _code(cell.source, cell_id, ["exercise"])
        elif "hint" in kind:
            hints += 1
            yield _folded(f"Hint {hints}", cell.source, cell_id)
        elif "solution" in kind:
            if edition == "learner":
                yield _folded("One solution", f"```python\n{cell.source}\n```", cell_id)
        elif "wrong" in kind:
            if edition == "instructor":
                yield _folded(
                    "A wrong answer you will meet", f"```python\n{cell.source}\n```", cell_id
                )
        elif "instructor" in kind:
            if edition == "instructor":
                yield new_markdown_cell(
                    f"> **For the teacher.** {cell.source}".replace("\n", "\n> "), id=cell_id
                )
        elif cell.cell_type == "markdown":
            yield new_markdown_cell(cell.source, id=cell_id)
        else:
            yield _code(cell.source, cell_id, tags(cell))


def _next(source: list[NotebookNode], index: int, tag: str) -> NotebookNode:
    for cell in source[index + 1 :]:
        if tag in tags(cell):
            return cell
        if "exercise" in tags(cell):
            break
    raise ValueError(f"the exercise in cell {index} has no cell tagged {tag!r} after it.")


def _code(source: str, cell_id: str, cell_tags: list[str]) -> NotebookNode:
    return new_code_cell(source, id=cell_id, metadata={"tags": cell_tags} if cell_tags else {})


def _folded(summary: str, text: str, cell_id: str) -> NotebookNode:
    return new_markdown_cell(
        f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>", id=cell_id
    )


def _insert_start(chapter: Chapter, built: NotebookNode) -> None:
    """The cell that fetches the course stands before the first code cell."""
    first = next(i for i, c in enumerate(built.cells) if c.cell_type == "code")
    if badges := links(repository(), chapter.name):
        built.cells[0].source += f"\n\n{badges}"
    metadata = {"tags": ["start"], "jupyter": {"source_hidden": True}}
    built.cells.insert(
        first,
        new_code_cell(
            START.format(repository=repository(), number=chapter.number),
            id=f"c{chapter.number}-start",
            metadata=metadata,
        ),
    )


def code_hash(chapter: Chapter, built: NotebookNode) -> str:
    """SHA-256 of everything whose change makes the stored outputs stale: the code that ran and the
    chapter's claims.
    """
    ran = [c.source for c in built.cells if c.cell_type == "code" and "start" not in tags(c)]
    file = chapter.claims_file
    claims = tomllib.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    shown = {
        name: {key: value for key, value in entry.items() if key not in PROOFS}
        for name, entry in claims.items()
    }
    return hashlib.sha256(json.dumps([ran, shown]).encode()).hexdigest()


def output_hash(built: NotebookNode) -> str:
    outputs = [c.outputs for c in built.cells if c.cell_type == "code"]
    return hashlib.sha256(json.dumps(outputs, sort_keys=True).encode()).hexdigest()


def write(chapter: Chapter, edition: str, folder: Path) -> Path:
    """Write an edition that is not executed."""
    path = folder / f"{chapter.name}.ipynb"
    _save(notebook(chapter, edition), path)
    return path


def write_learner(
    chapter: Chapter, profile: str, *, keep_outputs: bool = False, folder: Path | None = None
) -> Path:
    """Write the executed learner edition; with `keep_outputs`, reuse the stored outputs if the code
    is unchanged.
    """
    built, path = notebook(chapter), folder / f"{chapter.name}.ipynb" if folder else chapter.learner
    wanted = code_hash(chapter, built)
    if keep_outputs and path.is_file():
        stored = nbformat.read(path, as_version=4)
        if stored.metadata.get("course", {}).get("code_sha256") == wanted:
            old = [c for c in stored.cells if c.cell_type == "code"]
            for new, before in zip(
                (c for c in built.cells if c.cell_type == "code"), old, strict=True
            ):
                new.outputs, new.execution_count = before.outputs, before.execution_count
            known = stored.metadata["course"]
            return _finish(built, path, wanted, known["profile"], known.get("machine"))
    built, events = execute(built, profile)
    if path.parent == NOTEBOOKS and profile != "smoke":
        edition.keep(chapter, events, profile)
    return _finish(built, path, wanted, profile, edition.here())


def _finish(
    built: NotebookNode, path: Path, code_sha256: str, profile: str, machine: dict | None
) -> Path:
    built.metadata["course"] |= {
        "profile": profile,
        "machine": machine,
        "code_sha256": code_sha256,
        "output_sha256": output_hash(built),
    }
    _save(built, path)
    return path


def execute(built: NotebookNode, profile: str) -> tuple[NotebookNode, list[dict]]:
    """Run a notebook by papermill in a scratch folder and return it with clean outputs, and what it
    wrote into its ledger. Errors are papermill's own.
    """
    import papermill

    with tempfile.TemporaryDirectory(prefix="course-build-") as folder:
        before, after = Path(folder) / "in.ipynb", Path(folder) / "out.ipynb"
        nbformat.write(built, before)
        known = edition.earlier(built.metadata["course"]["chapter"])
        lines = "".join(json.dumps({"event": "verdict", **row}) + "\n" for row in known)
        events = Path(folder) / "ledger.jsonl"
        events.write_text(lines, encoding="utf-8")
        with environment(folder, profile):
            papermill.execute_notebook(
                before, after, cwd=folder, kernel_name=KERNEL["name"], progress_bar=False, **QUIET
            )
        ran, said = nbformat.read(after, as_version=4), ledger.events(events)[len(known) :]
    for cell, done in zip(built.cells, ran.cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = _clean(done.outputs), done.execution_count
    return built, said


@contextlib.contextmanager
def environment(scratch: str, profile: str) -> Iterator[None]:
    """What a chapter's kernel inherits: its profile, and a ledger and a folder of its own."""
    wanted = {
        "COURSE_PROFILE": profile,
        "COURSE_LEDGER": f"{scratch}/ledger.jsonl",
        "COURSE_SCRATCH": f"{scratch}/scratch",
        "COURSE_FIGURES": "png",
    }
    saved = {key: os.environ.get(key) for key in wanted}
    os.environ |= wanted
    try:
        yield
    finally:
        for key, value in saved.items():
            if value is None:
                os.environ.pop(key)
            else:
                os.environ[key] = value


def _clean(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Outputs without what changes from run to run for no reason: widgets' random ids, the way a
    stream was cut.
    """
    kept: list[NotebookNode] = []
    for output in outputs:
        if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
            continue
        same_stream = (
            kept
            and output.output_type == "stream" == kept[-1].output_type
            and output.name == kept[-1].name
        )
        if same_stream:
            kept[-1].text += output.text
        else:
            output.pop("transient", None)
            kept.append(output)
    return kept


def _save(built: NotebookNode, path: Path) -> None:
    """Write beside the target and rename: an interruption leaves the old notebook whole."""
    nbformat.validate(built)
    part = path.with_suffix(".ipynb.part")
    nbformat.write(built, part)
    part.replace(path)
