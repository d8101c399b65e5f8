"""The one check of chapter 00, Start here."""

import numpy as np

from course_utils.checks.accept import apart, close, number
from course_utils.exercises import Probe, Wrong, exercise


@exercise("00.A")
def speedup(answer: Probe, rng: np.random.Generator) -> None:
    """Old time over new time: above 1 is faster, and that is how this course says it everywhere."""
    cases = [(12.0, 4.0), (4.0, 12.0), (5.0, 5.0), (0.01, 0.0025), (4e-6, 1e-6)]
    cases += [(float(old), float(new)) for old, new in 10 ** rng.uniform(-4, 2, (5, 2))]
    for old, new in cases:
        call = f"speedup({old:.3g}, {new:.3g})"
        got, want = number(answer(old, new), call), old / new
        if close(got, want, rel=1e-5):
            continue
        yours, due = apart(got, want)
        why = ""
        if close(got, new / old, rel=1e-5):
            why = " Yours is the latency ratio: below 1 for what is faster."
        elif close(got, 1 - new / old, rel=1e-5):
            why = " Yours is the share of the time that is saved."
        raise Wrong(f"{call} is {yours}; a right answer is {due}.{why}")
