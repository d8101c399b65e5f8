"""Answers by other people: every wrong one is rejected with a message that helps, and every right
one passes, in whatever style it is written.
"""

import answers
import pytest

from course_utils import exercises

ALL = answers.everything()
SECONDS = 120  # a busy machine's
NO_HELP = ("could not be used", " at 0x")


def ids(chosen: list[answers.Answer]) -> list[str]:
    return [f"{a.exercise}-{a.what}" for a in chosen]


RIGHT, WRONG = [a for a in ALL if a.right], [a for a in ALL if not a.right]


@pytest.mark.parametrize("answer", RIGHT, ids=ids(RIGHT))
def test_right_in_another_style(answer, seeded):
    result = exercises.check(answer.exercise, answer.value, seconds=SECONDS, seed=seeded)
    assert result.status == "passed", f"{result}\nseed={seeded}"


@pytest.mark.parametrize("answer", WRONG, ids=ids(WRONG))
def test_wrong_in_its_own_way(answer, seeded):
    result = exercises.check(answer.exercise, answer.value, seconds=SECONDS, seed=seeded)
    assert result.status == "wrong", f"{result}\nseed={seeded}"
    assert len(result.message) > 20, "the message must say what is wrong"
    assert not any(text in result.message for text in NO_HELP), result.message


def test_every_exercise_has_met_other_peoples_answers():
    wanted = exercises.registry()
    lacking = {e for e in wanted if sum(a.exercise == e for a in WRONG) < 5}
    assert not lacking, f"fewer than five wrong answers: {sorted(lacking)}"
