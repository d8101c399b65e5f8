"""Every chapter as it is opened in Colab: an environment of Colab's own versions (colab.txt), an
empty folder, the start cell, the chapter in smoke. Needs an index to install from, and minutes.

    .venv/bin/python tests/colab.py [--env DIR] [00 05 …]

It fails where a chapter ends in an error, or where the start cell changed a package that was there;
it prints seconds to the first speed-up, and what was added.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import papermill

from course_utils import ROOT
from course_utils.course import build
from course_utils.course.chapters import Chapter, chapters


def environment(folder: Path) -> Path:
    """Colab's packages in a virtual environment; its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        listed = ROOT / "tests" / "colab.txt"
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", listed], check=True)
    return python


def kernel(python: Path, folder: Path) -> None:
    """A kernel named colab, for papermill in the course's own environment."""
    spec = folder / "kernels" / "colab"
    spec.mkdir(parents=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    text = json.dumps({"argv": argv, "display_name": "colab", "language": "python"})
    (spec / "kernel.json").write_text(text)
    os.environ["JUPYTER_PATH"] = str(folder)


def frozen(python: Path) -> dict[str, str]:
    code = "import importlib.metadata as m; [print(d.name, d.version) for d in m.distributions()]"
    out = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    return dict(line.split() for line in out.splitlines())


def run(chapter: Chapter, folder: Path) -> str:
    """Run it to its end; "" or what went wrong."""
    source, out = folder / f"{chapter.name}.ipynb", folder / "out.ipynb"
    nbformat.write(build.notebook(chapter), source)
    try:
        papermill.execute_notebook(
            source, out, cwd=folder, kernel_name="colab", progress_bar=False, **build.QUIET
        )
    except papermill.PapermillExecutionError as error:
        return f"cell {error.cell_index}: {error.ename}: {error.evalue}"
    return ""


def first_gain(out: Path) -> str:
    """The first number with an x that a chapter prints."""
    for cell in nbformat.read(out, 4).cells:
        for output in cell.get("outputs", ()):
            text = output.get("text") or output.get("data", {}).get("text/plain", "")
            if found := re.search(r"\d+\.\d+ ?x\b[^\n]*", text):
                return found.group()[:80]
    return "none"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", type=Path, help="keep the environment there")
    parser.add_argument("chapters", nargs="*")
    options, broken = parser.parse_args(), False
    with tempfile.TemporaryDirectory(prefix="course-colab-") as scratch:
        work = Path(scratch)
        python = environment((options.env or work / "env").resolve())
        kernel(python, work / "jupyter")
        os.environ |= {"COURSE_REPOSITORY": str(ROOT), "COURSE_PROFILE": "smoke"}
        for chapter in chapters(options.chapters):
            before, start = frozen(python), time.monotonic()
            folder = work / chapter.number
            folder.mkdir()
            error = run(chapter, folder)
            after = frozen(python)
            changed = {k: (v, after.get(k)) for k, v in before.items() if after.get(k) != v}
            broken |= bool(error or changed)
            gain = first_gain(folder / "out.ipynb") if chapter.number == "00" else ""
            print(
                f"{chapter.name}: {time.monotonic() - start:.0f} s, added"
                f" {', '.join(sorted(set(after) - set(before))) or 'nothing'}"
                f"{f'; changed {changed}' if changed else ''}"
                f"{f'; first speed-up {gain}' if gain else ''}"
                f"{f'; FAILED {error}' if error else ''}",
                flush=True,
            )
            shutil.rmtree(folder)
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
