"""The suite again and again, each round with other random draws: it must never be red by chance.

    make soak                              50 rounds, 1,000 checks of every solution, all mutants
    make soak ROUNDS=4 CHECKS=20 JOBS=1    fewer of both, one process at a time

A round is the static, unit and exercise stages of `make test` under a COURSE_SEED of its own. What
draws nothing and reads no clock (marked `settled`) is in the first round only. The soak goes on
after a failure, prints it with the seed that repeats it, and exits 1 if there was one.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

from run_suite import ROOT, test_files

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "COURSE_PROFILE": "smoke"}


def run_round(seed: int, whole: bool) -> bool:
    """Whether the round is green; what failed is printed when it has ended."""
    start, chosen = time.monotonic(), [] if whole else ["-m", "not settled"]
    with tempfile.TemporaryDirectory(prefix="course-soak-") as folder:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
        done = subprocess.run(
            [*command, f"--basetemp={folder}/files", *chosen, *test_files("123")],
            cwd=ROOT,
            env=os.environ | ONE_THREAD | {"COURSE_SEED": str(seed)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    green = done.returncode == 0
    said = f"COURSE_SEED={seed}: {'green' if green else 'RED'}, {time.monotonic() - start:.0f} s"
    print(said if green else f"{done.stdout}\n{said}", flush=True)
    return green


def check_solutions(times: int, part: int, parts: int) -> bool:
    command = [sys.executable, "tests/soak_solutions.py", str(times), f"--part={part}/{parts}"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | ONE_THREAD).returncode == 0


def try_mutants(jobs: int) -> bool:
    command = [sys.executable, "tests/mutants.py", f"--jobs={jobs}"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | ONE_THREAD).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--checks", type=int, default=1000, help="of each solution; 0 for none")
    parser.add_argument("--no-mutants", action="store_true", help="leave tests/mutants.py out")
    parser.add_argument("--jobs", type=int, default=2, help="rounds side by side, a thread each")
    parser.add_argument("--first", type=int, help="seed of the first round; new ones by default")
    given = parser.parse_args()
    os.environ.pop("COURSE_LEDGER", None)
    os.environ["COURSE_WORKBOOK"] = tempfile.mkdtemp(prefix="course-soak-")
    first = int(time.time()) % 10**8 if given.first is None else given.first
    with ThreadPoolExecutor(given.jobs) as pool:
        seeds = range(first, first + given.rounds)
        rounds = list(pool.map(lambda seed: run_round(seed, whole=seed == first), seeds))
        red = [first + i for i, green in enumerate(rounds) if not green]
        if given.rounds:
            print(f"{len(rounds) - len(red)} of {len(rounds)} rounds green", flush=True)
        parts = range(1, given.jobs + 1) if given.checks else ()
        passed = list(pool.map(lambda part: check_solutions(given.checks, part, given.jobs), parts))
    survivors = not given.no_mutants and not try_mutants(given.jobs)
    if red:
        print(f"red with COURSE_SEED={', '.join(map(str, red))}")
    if not all(passed):
        print("a solution failed its own check")
    if survivors:
        print("a check passed a wrong answer")
    return 1 if red or not all(passed) or survivors else 0


if __name__ == "__main__":
    sys.exit(main())
