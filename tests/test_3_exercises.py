"""Every exercise: the stub is pending, the solution passes, every wrong answer is rejected with a
message.
"""

import pytest
from conftest import CHAPTERS

from course_utils import exercises
from course_utils.course import shape

ALL = [(e.id, e) for c in CHAPTERS for e in shape.exercises(c)]
WRONG = [(f"{i}-{k + 1}", e, text) for i, e in ALL for k, text in enumerate(e.wrong)]


def test_every_check_has_its_exercise_and_the_other_way_round():
    assert sorted(exercises.registry()) == sorted(i for i, _ in ALL)


@pytest.mark.parametrize(("_", "exercise"), ALL, ids=[i for i, _ in ALL])
def test_stub_is_pending(_, exercise, run_cell):
    result = exercises.check(exercise.id, eval(exercise.answer, run_cell(exercise.stub)))
    assert result.status == "pending", result


@pytest.mark.parametrize("times", [1, 2], ids=["first", "again"])
@pytest.mark.parametrize(("_", "exercise"), ALL, ids=[i for i, _ in ALL])
def test_solution_passes(_, exercise, times, run_cell):
    result = exercises.check(exercise.id, eval(exercise.answer, run_cell(exercise.solution)))
    assert result.status == "passed", result


@pytest.mark.parametrize(("_", "exercise", "text"), WRONG, ids=[i for i, _, _ in WRONG])
def test_wrong_answer_is_rejected(_, exercise, text, run_cell):
    result = exercises.check(exercise.id, eval(exercise.answer, run_cell(text)))
    assert result.status == "wrong", result
    assert len(result.message) > 20, "the message must say what is wrong"
