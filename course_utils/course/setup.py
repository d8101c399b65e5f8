"""Make .venv and install the course into it: `make setup`, or `python3
course_utils/course/setup.py`.

Standard library only, because it runs before anything is installed. A second call installs nothing
unless pyproject.toml or a lock changed; a call that follows an interrupted one repairs what it
left.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
STAMP = VENV / "course-setup.json"  # written last: a set-up without it did not finish
OLDEST = (3, 11)
OTHER_TENSORRT = "tests/tensorrt-10.txt"


def venv_python() -> Path:
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def digest(*names: str) -> str:
    """What the installed state depends on: the files named, this Python, and where the course
    lies.
    """
    h = hashlib.sha256(f"{sys.version_info[:3]} {ROOT}".encode())
    for name in names:
        h.update((ROOT / name).read_bytes())
    return h.hexdigest()


def torch_requirements() -> list[str]:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [r for r in project["dependencies"] if r.startswith("torch")]


def pip(*arguments: str | Path, quiet: bool = True) -> None:
    """`pip install` in .venv; not `quiet`, it shows its download bar."""
    command = [venv_python(), "-m", "pip", "install", "--disable-pip-version-check"]
    subprocess.run([*command, *(["-q"] if quiet else []), *arguments], check=True, cwd=ROOT)


def torch_backend() -> str | None:
    """Which build of torch fits, in uv's words: "cpu" without an NVIDIA GPU (200 MB in place of 3
    GB), "auto" with one, None where the usual index has the only one (macOS).
    """
    if sys.platform == "darwin":
        return None
    look = shutil.which("nvidia-smi")
    seen = look and subprocess.run([look], capture_output=True).returncode == 0
    return "auto" if seen else "cpu"


def by_uv(*arguments: str) -> bool:
    """`uv pip install` in .venv; whether it went in."""
    # a place that can't be reached shall not cost minutes
    settings = os.environ | {"UV_HTTP_TIMEOUT": os.environ.get("UV_HTTP_TIMEOUT", "30")}
    command = [venv_python(), "-m", "uv", "pip", "install", "--python", venv_python(), *arguments]
    try:
        pip("uv>=0.9")
        subprocess.run(command, check=True, cwd=ROOT, env=settings)
    except subprocess.CalledProcessError:
        return False
    return True


def from_folder(wheels: Path) -> None:
    """Let pip take everything from `wheels`, which `course class wheels` has filled, and ask no
    network.
    """
    if not any(wheels.glob("torch-*.whl")):
        raise SystemExit(f"{wheels} holds no torch: fill it with `course class wheels`.")
    os.environ |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels.resolve().as_uri()}


def install_torch() -> None:
    """torch and torchvision by uv, which knows where torch's own builds lie; by pip, with CUDA's
    libraries, where that place can't be reached. A build that is there and fits is kept.
    """
    backend, wanted = torch_backend(), torch_requirements()
    if os.environ.get("PIP_NO_INDEX"):
        print("Installing torch and torchvision from the folder …", flush=True)
    elif backend:
        print(f"Installing torch and torchvision (the {backend} build, by uv) …", flush=True)
        if by_uv(f"--torch-backend={backend}", *wanted):
            return
        print(
            "torch's own index can't be used (the reason stands above). Taking torch from the usual"
            " one: on Linux with CUDA's libraries, a download of about 3 GB …",
            flush=True,
        )
    else:
        print("Installing torch and torchvision …", flush=True)
    pip(*wanted, quiet=not sys.stdout.isatty())


def works(python: Path) -> bool:
    """Whether the environment's own Python and pip start: an interrupted `venv` leaves one that
    does not.
    """
    try:
        return (
            subprocess.run(
                [python, "-m", "pip", "--version"], capture_output=True, timeout=120
            ).returncode
            == 0
        )
    except OSError:
        return False


def installed() -> dict[str, str]:
    try:
        return json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}


def install(extended: bool) -> None:
    wanted = {"base": digest("pyproject.toml", "requirements.lock")}
    if extended:
        wanted["extended"] = digest(
            "pyproject.toml", "requirements.lock", "requirements-extended.lock", OTHER_TENSORRT
        )
    have = installed()
    if all(have.get(part) == value for part, value in wanted.items()) and venv_python().exists():
        return
    start = time.monotonic()
    if not works(venv_python()):
        print(f"Making {VENV.name} with Python {sys.version.split()[0]} …", flush=True)
        shutil.rmtree(VENV, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    STAMP.unlink(missing_ok=True)
    if have.get("base") != wanted["base"]:
        install_torch()
        print("Installing what the chapters use …", flush=True)
        pip("--no-deps", "--require-hashes", "-r", "requirements.lock")
        pip("--no-deps", "--no-build-isolation", "-e", ".")
    if extended and have.get("extended") != wanted["extended"]:
        print("Installing DeepSpeed and Model Optimizer …", flush=True)
        os.environ["DS_BUILD_OPS"] = "0"  # DeepSpeed's own operators stay uncompiled: none is used
        pip(
            "--no-deps",
            "--no-build-isolation",
            "--require-hashes",
            "-r",
            "requirements-extended.lock",
        )
        # TensorRT 10's Python classes have 11's import name: they lie beside it, for the tests.
        beside = VENV / "tensorrt-10"
        pip("--no-deps", "--require-hashes", "--upgrade", "--target", beside, "-r", OTHER_TENSORRT)
    STAMP.write_text(json.dumps(have | wanted))
    print(f"Set up in {time.monotonic() - start:.0f} s.", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--extended", action="store_true", help="also DeepSpeed and Model Optimizer"
    )
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="install from this folder, without a network"
    )
    options = parser.parse_args()
    if sys.version_info < OLDEST:
        have = ".".join(map(str, sys.version_info[:3]))
        print(
            f"The course needs Python 3.11 or newer; this is {have}. "
            "Install a newer one and run: make PYTHON=python3.12 lab",
            file=sys.stderr,
        )
        return 2
    if options.wheels:
        from_folder(options.wheels)
    try:
        install(options.extended)
    except subprocess.CalledProcessError as error:
        print(
            f"Set-up stopped: {' '.join(map(str, error.cmd[:6]))} … ended with {error.returncode}. "
            "Its own message stands above; the next call goes on from here.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("Set-up interrupted; the next call goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
