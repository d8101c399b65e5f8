"""A folder from which a room without a network is set up: every package of the lock, torch as
`make setup` would choose it here, and the line that installs from there.
"""

import re
import subprocess
import sys
from pathlib import Path

from course_utils.course import setup
from course_utils.course.chapters import UsageError


def collect(folder: Path, root: Path = setup.ROOT) -> str:
    """Download into `folder` what `make setup` would install, for this system and this Python; what
    is there already stays. Says how much there is and how it is used. UsageError where a download
    fails.
    """
    _download("--no-deps", "--require-hashes", "-r", str(root / "requirements.lock"), to=folder)
    wanted = setup.torch_requirements()
    index = torch_index(wanted) if setup.torch_backend() == "cpu" else None
    if index:
        _download("--no-deps", "--index-url", index, *wanted, to=folder)
    else:
        _download(*wanted, to=folder)
    files = [path for path in folder.iterdir() if path.suffix in (".whl", ".gz", ".zip")]
    size = sum(path.stat().st_size for path in files)
    tag = f"Python {sys.version_info[0]}.{sys.version_info[1]} on {sys.platform}"
    return (
        f"{folder}: {len(files)} packages, {size / 1e9:.1f} GB, for {tag}. Carry the folder to each"
        f" machine; there:\n    make lab WHEELS={folder}"
    )


def torch_index(wanted: list[str]) -> str | None:
    """Where uv finds torch's CPU build; None where that place can't be reached."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "-q", "--no-deps", "-"]
    command += ["--torch-backend=cpu", "--emit-index-annotation"]
    done = subprocess.run(command, input="\n".join(wanted), capture_output=True, text=True)
    found = re.search(r"^torch==.*(?:\n\s+#.*)*?\n\s+# from (\S+)", done.stdout, re.M)
    return found[1] if done.returncode == 0 and found else None


def _download(*arguments: str, to: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--disable-pip-version-check",
        "-d",
        str(to),
    ]
    try:
        subprocess.run([*command, *arguments], check=True)
    except subprocess.CalledProcessError as error:
        raise UsageError(
            f"pip could not download everything (the reason stands above, status"
            f" {error.returncode}). What it has fetched stays in {to}; the next call goes on."
        ) from None
