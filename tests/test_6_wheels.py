"""`course class wheels` and set-up from its folder: planted packages, a path with a space, and no
network but a proxy that nobody answers.
"""

import hashlib
import os
import subprocess
import sys
import zipfile

import pytest

from course_utils.course import setup, wheels
from course_utils.course.chapters import UsageError

NOWHERE = "http://127.0.0.1:9"


def wheel(folder, name: str):
    """A package with one module, as a wheel."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": "here = True\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as out:
        for file, text in {**files, f"{info}/RECORD": record}.items():
            out.writestr(file, text)
    return path


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A course that asks for torch_planted and, in its lock, for planted; an index of both."""
    root, index = tmp_path / "a course", tmp_path / "an index"
    for folder in (root, index):
        folder.mkdir()
    wheel(index, "torch_planted")
    digest = hashlib.sha256(wheel(index, "planted").read_bytes()).hexdigest()
    lock = f"planted==1.0 \\\n    --hash=sha256:{digest}\n"
    (root / "requirements.lock").write_text(lock, encoding="utf-8")
    text = '[project]\nname = "x"\nversion = "1"\ndependencies = ["torch_planted", "other"]\n'
    (root / "pyproject.toml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(setup, "ROOT", root)
    monkeypatch.setattr(setup, "VENV", root / ".venv")
    monkeypatch.setattr(setup, "torch_backend", lambda: None)
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, NOWHERE)
    monkeypatch.setenv("PIP_RETRIES", "0")
    return root, index


def test_a_room_without_a_network_is_set_up_from_the_folder(house, tmp_path, monkeypatch):
    root, index = house
    folder = tmp_path / "the wheels"
    with monkeypatch.context() as teacher:  # whose index is a folder here
        teacher.setenv("PIP_NO_INDEX", "1")
        teacher.setenv("PIP_FIND_LINKS", index.as_uri())
        said = wheels.collect(folder, root)
    assert "2 packages" in said
    assert f"make lab WHEELS={folder}" in said
    for path in index.iterdir():  # what the learner has is the folder, not the index
        path.unlink()
    with pytest.raises(SystemExit, match="holds no torch"):
        setup.from_folder(folder)
    wheel(folder, "torch")
    setup.from_folder(folder)
    subprocess.run([sys.executable, "-m", "venv", setup.VENV], check=True)
    setup.install_torch()
    setup.pip("--no-deps", "--require-hashes", "-r", "requirements.lock")
    code = "import planted, torch_planted; assert planted.here and torch_planted.here"
    subprocess.run([setup.venv_python(), "-c", code], check=True)


def test_a_download_that_fails_says_so_and_keeps_what_it_has(house, tmp_path, monkeypatch, capfd):
    root, index = house
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", index.as_uri())
    (index / "torch_planted-1.0-py3-none-any.whl").unlink()
    with pytest.raises(UsageError, match=r"pip could not download everything.*stays in"):
        wheels.collect(tmp_path / "the wheels", root)
    assert "torch_planted" in capfd.readouterr().err
    assert len(list((tmp_path / "the wheels").iterdir())) == 1


def test_uvs_answer_is_read(monkeypatch):
    said = "torch==2.14.1+cpu\n    # from https://example.org/whl/cpu\nx==1\n"

    def answer(*_, **__):
        return subprocess.CompletedProcess([], 0, said, "")

    monkeypatch.setattr(subprocess, "run", answer)
    assert wheels.torch_index(["torch>=2"]) == "https://example.org/whl/cpu"
    said = "torch==2.14.1\n"
    assert wheels.torch_index(["torch>=2"]) is None
