"""README's opening comes from a ledger of the atlas, and says what that ledger says."""

import pytest
from test_2_atlas import given, ledger

from course_utils import claims
from course_utils.course import atlas, front
from course_utils.course.chapters import UsageError

MARKED = f"above\n{front.BEGIN}\nold\n{front.END}\nbelow\n"


@pytest.fixture
def planted(tmp_path):
    given(tmp_path, ledger("bf16"))
    given(tmp_path, ledger("bf16", caps={"ONEDNN_MAX_CPU_ISA": "AVX2"}))
    return tmp_path / "atlas"


def test_the_opening_says_what_the_ledger_says(planted):
    one = front.chosen(planted)
    assert not one.capped
    shown = front.opened(MARKED, one)
    assert shown.startswith("above\n")
    assert shown.endswith("\nbelow\n")
    assert "\nold\n" not in shown
    assert front.opened(shown, one) == shown
    for name in front.SHOWN:
        claim, verdict = claims.find(name), one.verdict(claims.find(name))
        line = next(line for line in shown.splitlines() if claim.statement in line)
        assert line.endswith(f"| {verdict.status} | {verdict.measured()} |")


def test_what_was_not_decided_is_not_shown_as_a_result(planted):
    one = front.chosen(planted)
    one.rows[front.SHOWN[1]] |= {"verdict": claims.OPEN}
    with pytest.raises(UsageError, match=f"has not decided {front.SHOWN[1]}"):
        front.text(one)
    del one.rows[front.SHOWN[0]]
    with pytest.raises(UsageError, match=f"has not decided {front.SHOWN[0]}"):
        front.text(one)


@pytest.mark.parametrize("readme", ["no marks", MARKED + MARKED, front.BEGIN])
def test_a_readme_without_its_place_is_refused(planted, readme):
    with pytest.raises(UsageError, match="once each"):
        front.opened(readme, front.chosen(planted))


def test_without_a_ledger_there_is_nothing_to_show(tmp_path):
    with pytest.raises(UsageError, match="no ledger of an uncapped machine"):
        front.chosen(tmp_path)


def test_the_committed_readme_and_picture_are_those_of_the_atlas():
    readme = front.README.read_text(encoding="utf-8")
    assert front.opened(readme, front.chosen(atlas.FOLDER)) == readme
    assert front.PICTURE.is_file()
