"""The whole suite, cheapest first: lint, static checks, units, exercises, nbval and the commands,
papermill and the pages.

    make test                 notebooks run in smoke
    make test PROFILE=fast    notebooks run in fast

Every stage runs even if an earlier one failed; the exit status is 1 if any did. In smoke the last
two stages run side by side, each with one thread: there the notebooks are tested, and nothing that
they measure counts.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def stages() -> list[tuple[str, list[str]]]:
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    notebooks = sorted(
        str(p.relative_to(ROOT)) for p in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")
    )
    return [
        ("lint", [str(BIN / "ruff"), "check", "--no-cache", "."]),
        ("format", [str(BIN / "ruff"), "format", "--no-cache", "--check", "-q", "."]),
        ("static, units, exercises", [*pytest, *test_files("123")]),
        (
            "nbval, commands, classes, faults",
            [
                *pytest,
                "--nbval",
                "--nbval-current-env",
                "--nbval-sanitize-with",
                "tests/nbval.cfg",
                "--nbval-cell-timeout=300",
                *notebooks,
                *test_files("67"),
            ],
        ),
        ("papermill, JupyterLab, book", [*pytest, *test_files("58")]),
    ]


def test_files(digits: str) -> list[str]:
    return sorted(
        str(p.relative_to(ROOT)) for p in (ROOT / "tests").glob("test_*.py") if p.name[5] in digits
    )


def together(pair: list[tuple[str, list[str]]]) -> list[str]:
    """Run the stages at the same time and print what each said, one after the other; the names of
    those that failed.
    """
    start, running = time.monotonic(), []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        for number, (name, command) in enumerate(pair):
            # The first shows at once what it says, the second when it has ended.
            log = stack.enter_context(tempfile.TemporaryFile("w+")) if number else None
            print(f"\n=== {name}, started", flush=True)
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log and subprocess.STDOUT, env=environment
            )
            stack.callback(
                process.kill
            )  # also after Ctrl-C; a process that has ended does not mind
            running.append((name, process, log))
        failed = []
        for name, process, log in running:
            if process.wait() != 0:
                failed.append(name)
            if log:
                log.seek(0)
                print(log.read())
            print(f"=== {name}: {time.monotonic() - start:.0f} s", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="smoke", choices=["smoke", "fast", "full"])
    os.environ["COURSE_PROFILE"] = parser.parse_args().profile
    os.environ["JUPYTER_PLATFORM_DIRS"] = "1"
    # The suite leaves a reader's own work alone, and does not read it.
    os.environ.pop("COURSE_LEDGER", None)
    os.environ["COURSE_FIGURES"] = "png"  # nbval compares with what was built
    os.environ["COURSE_WORKBOOK"] = tempfile.mkdtemp(prefix="course-suite-")
    failed, todo = [], stages()
    side_by_side = todo[-2:] if os.environ["COURSE_PROFILE"] == "smoke" else []
    for name, command in todo[: len(todo) - len(side_by_side)]:
        start = time.monotonic()
        print(f"\n=== {name}", flush=True)
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            failed.append(name)
        print(f"=== {name}: {time.monotonic() - start:.0f} s", flush=True)
    failed += together(side_by_side)
    print(f"\nFAILED: {', '.join(failed)}" if failed else "\nEverything passed.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
