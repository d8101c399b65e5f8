"""Every exercise: the stub is pending, the solution passes, every wrong answer is rejected with a
message.
"""

import pytest
from conftest import CHAPTERS

from course_utils import exercises
from course_utils.course import shape

ALL = [(e.id, e) for c in CHAPTERS for e in shape.exercises(c)]
WRONG = [(f"{i}-{k + 1}", e, text) for i, e in ALL for k, text in enumerate(e.wrong)]
SECONDS = 120  # a busy machine's; a right answer needs three


def judged(exercise: shape.Exercise, source: str, run_cell, seed: int) -> exercises.Result:
    answer = eval(exercise.answer, run_cell(source))
    return exercises.check(exercise.id, answer, seconds=SECONDS, seed=seed)


def test_every_check_has_its_exercise_and_the_other_way_round():
    assert sorted(exercises.registry()) == sorted(i for i, _ in ALL)


@pytest.mark.parametrize(("_", "exercise"), ALL, ids=[i for i, _ in ALL])
def test_stub_is_pending(_, exercise, run_cell, seeded):
    result = judged(exercise, exercise.stub, run_cell, seeded)
    assert result.status == "pending", result


@pytest.mark.parametrize(("_", "exercise"), ALL, ids=[i for i, _ in ALL])
def test_solution_passes(_, exercise, run_cell, seeded):
    """Once; `make soak` does it a thousand times."""
    result = judged(exercise, exercise.solution, run_cell, seeded)
    assert result.status == "passed", f"{result}\nseed={seeded}"


@pytest.mark.parametrize(("_", "exercise", "text"), WRONG, ids=[i for i, _, _ in WRONG])
def test_wrong_answer_is_rejected(_, exercise, text, run_cell, seeded):
    result = judged(exercise, text, run_cell, seeded)
    assert result.status == "wrong", f"{result}\nseed={seeded}"
    assert len(result.message) > 20, "the message must say what is wrong"
