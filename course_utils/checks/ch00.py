"""The one check of chapter 00, Start here."""

import math

import numpy as np

from course_utils.exercises import Probe, Wrong, exercise


@exercise("00.A")
def speedup(answer: Probe, rng: np.random.Generator) -> None:
    """Old time over new time: above 1 is faster, and that is how this course says it everywhere."""
    cases = [(12.0, 4.0, 3.0), (4.0, 12.0, 1 / 3), (5.0, 5.0, 1.0)]
    for old, new in rng.uniform(0.001, 10, (5, 2)):
        cases.append((float(old), float(new), math.exp(math.log(old) - math.log(new))))
    for old, new, want in cases:
        got = answer(old, new)
        if not isinstance(got, int | float | np.number):
            raise Wrong(
                f"speedup({old:.3g}, {new:.3g}) must be a number; you returned a"
                f" {type(got).__name__}."
            )
        if not math.isclose(got, want, rel_tol=1e-9):
            raise Wrong(
                f"speedup({old:.3g}, {new:.3g}) is {got:.4g}; a right answer is {want:.4g}."
            )
    old, half = 10.0, answer(10.0, 5.0)
    if not math.isclose(answer(old, 2.5), half * half):
        raise Wrong("two steps that each halve the time must multiply: 2 times 2 is 4.")
