"""Resolve the pinned requirements again: `make lock`. Needs uv on the PATH; nothing else of the
course. What is pinned and still fits stays; `make lock UPGRADE=1` takes the newest of everything.

Two files come out, both universal and hashed, with no address in them. torch, torchvision and what
only they need stay out: a lock that holds their registry hashes could not use a machine's own build
(README, "Another torch").
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOR_TORCH_ONLY = re.compile(
    r"^(torch|torchvision|triton|nvidia-(?!modelopt|ml-py)[\w-]+|cuda-[\w-]+)=="
)


def compile_lock(*arguments: str, known: str = "") -> list[str]:
    """One entry a requirement (its pin and all its hashes), as uv resolves pyproject.toml with
    these arguments; it prefers the pins of `known`, an earlier lock.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "lock.txt"
        out.write_text(known, encoding="utf-8")
        command = [
            "uv",
            "pip",
            "compile",
            "-q",
            "--universal",
            "--python-version",
            "3.11",
            "--generate-hashes",
        ]
        command += [
            "--no-annotate",
            "--no-header",
            "--group",
            "models",
            "--extra",
            "all",
            "--extra",
            "lab",
            "--extra",
            "dev",
            "--extra",
            "book",
        ]
        subprocess.run([*command, *arguments, "pyproject.toml", "-o", out], cwd=ROOT, check=True)
        entries = re.split(r"\n(?=\S)", out.read_text().strip())
    return [entry for entry in entries if not FOR_TORCH_ONLY.match(entry)]


def write(path: Path, title: str, entries: list[str]) -> None:
    path.write_text(
        f"# {title}\n# Made by `make lock`; installed by `make setup` with --no-deps.\n"
        + "\n".join(entries)
        + "\n"
    )
    print(f"{path.name}: {len(entries)} packages")


def main() -> int:
    if not shutil.which("uv"):
        print("make lock needs uv on the PATH (pip install uv).", file=sys.stderr)
        return 1
    names = ("requirements.lock", "requirements-extended.lock")
    files = [ROOT / name for name in names if "--upgrade" not in sys.argv]
    known = "".join(file.read_text(encoding="utf-8") for file in files)
    everything = compile_lock("--extra", "extended", known=known)
    pins = "\n".join(entry.split(" \\\n")[0] for entry in everything)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write(pins)
        constraints.flush()
        base = compile_lock("-c", constraints.name, known=known)
    write(ROOT / "requirements.lock", "What the course uses on a CPU, and its tests.", base)
    there = {entry.split(" \\\n")[0] for entry in base}  # with its condition: "; python_version …"
    extra = [entry for entry in everything if entry.split(" \\\n")[0] not in there]
    write(ROOT / "requirements-extended.lock", "In addition: DeepSpeed, Model Optimizer.", extra)
    return 0


if __name__ == "__main__":
    sys.exit(main())
