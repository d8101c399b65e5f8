"""Every exercise's solution against its own check, many times, each time with other random inputs.

    .venv/bin/python tests/soak_solutions.py                   1,000 times each, seeds 0 to 999
    .venv/bin/python tests/soak_solutions.py 50 02.C 04.C      50 times, these two
    .venv/bin/python tests/soak_solutions.py --seconds 20      no exercise longer than 20 seconds
    .venv/bin/python tests/soak_solutions.py --part 1/2        every second seed of all exercises

`make soak` runs it. The exercises whose check is cheap come first. The exit status is 1 if any
solution failed once; each failure is printed with the seed that repeats it.
"""

import argparse
import sys
import time
from collections.abc import Callable

import torch
from conftest import CHAPTERS, execute, sow

from course_utils import exercises
from course_utils.course import shape


def attempt(exercise_id: str, answer: object, seed: int) -> exercises.Result:
    """One check; the answer's own draws are seeded, too."""
    sow(seed)
    return exercises.check(exercise_id, answer, seed=seed, seconds=300)


def solution(exercise: shape.Exercise) -> object:
    return eval(exercise.answer, execute(exercise.solution))


def timed(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def soak(exercise: shape.Exercise, seeds: range, seconds: float) -> list[str]:
    """The failures, and one printed line: how often it passed, in how many seconds."""
    answer, failures, done = solution(exercise), [], 0
    start = time.perf_counter()
    for seed in seeds:
        if done and time.perf_counter() - start > seconds:
            break
        result = attempt(exercise.id, answer, seed)
        done += 1
        if result.status != "passed":
            failures.append(f"{exercise.id} seed={seed} {result.status}: {result.message}")
            print(f"    {failures[-1]}", flush=True)
    took = time.perf_counter() - start
    short = "" if done == len(seeds) else f" (of {len(seeds)}: out of time)"
    print(
        f"{exercise.id}: {done - len(failures)} of {done} passed{short}, {took:.1f} s", flush=True
    )
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("times", nargs="?", type=int, default=1000)
    parser.add_argument("only", nargs="*", help="exercises, such as 02.C; all by default")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="at most, an exercise")
    parser.add_argument("--part", default="1/1", help="2/3: seeds 1, 4, 7 …")
    given = parser.parse_intermixed_args()
    part, parts = map(int, given.part.split("/"))
    torch.set_num_threads(1)
    wanted = [e for c in CHAPTERS for e in shape.exercises(c)]
    wanted = [e for e in wanted if not given.only or e.id in given.only]
    for exercise in wanted:
        attempt(exercise.id, solution(exercise), 0)  # what is imported or loaded only once
    once = {e.id: timed(lambda e=e: attempt(e.id, solution(e), 0)) for e in wanted}
    wanted = sorted(wanted, key=lambda e: once[e.id])
    # By seeds, not by exercises: two processes that each order them by their own clock would check
    # some solutions twice and others never.
    seeds = range(part - 1, given.times, parts)
    estimate = sum(min(len(seeds) * s, given.seconds) for s in once.values())
    print(f"{len(wanted)} solutions, {len(seeds)} times each: about {estimate:.0f} s", flush=True)
    for exercise_id, s in sorted(once.items(), key=lambda item: -item[1])[:5]:
        print(f"    {exercise_id}: {1e3 * s:.0f} ms a check")
    failures = []
    for exercise in wanted:
        failures += soak(exercise, seeds, given.seconds)
    print(f"{len(failures)} failures" if failures else "Every solution passed every time.")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
