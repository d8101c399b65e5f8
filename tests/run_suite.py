"""The whole suite, cheapest first: lint, static checks, units, exercises, nbval, papermill, JupyterLab.

    make test                 notebooks run in smoke
    make test PROFILE=fast    notebooks run in fast

Every stage runs even if an earlier one failed; the exit status is 1 if any did.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def stages() -> list[tuple[str, list[str]]]:
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    notebooks = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    return [
        ("lint", [str(BIN / "ruff"), "check", "--no-cache", "."]),
        ("format", [str(BIN / "ruff"), "format", "--no-cache", "--check", "-q", "."]),
        ("static, units, exercises", [*pytest, *test_files("123")]),
        ("nbval", [*pytest, "--nbval", "--nbval-current-env", "--nbval-sanitize-with", "tests/nbval.cfg", *notebooks]),
        ("papermill, commands, faults, JupyterLab", [*pytest, *test_files("5678")]),
    ]


def test_files(digits: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").glob("test_*.py") if p.name[5] in digits)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="smoke", choices=["smoke", "fast", "full"])
    os.environ["COURSE_PROFILE"] = parser.parse_args().profile
    os.environ["JUPYTER_PLATFORM_DIRS"] = "1"
    os.environ.pop("COURSE_LEDGER", None)
    failed = []
    for name, command in stages():
        start = time.monotonic()
        print(f"\n=== {name}", flush=True)
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            failed.append(name)
        print(f"=== {name}: {time.monotonic() - start:.0f} s", flush=True)
    print(f"\nFAILED: {', '.join(failed)}" if failed else "\nEverything passed.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
