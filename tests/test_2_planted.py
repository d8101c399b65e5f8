"""Every claim can hold and can fail, by the chapter's own lines on planted data."""

import ast

import planted
import pytest

from course_utils import claims

ALL = claims.registry()
PROVEN = [i for i, c in ALL.items() if c.can_hold and c.can_fail]


@pytest.mark.settled
@pytest.mark.parametrize("claim_id", PROVEN)
def test_it_can_hold_and_it_can_fail(claim_id):
    claim = ALL[claim_id]
    assert claim.estimand, "say what is estimated, and from what"
    for text, due in ((claim.can_hold, claims.HOLDS), (claim.can_fail, claims.FAILS)):
        right = planted.share(claim_id, text, due)
        assert right >= planted.NEEDED, f"{text}: {due!r} in {right} of {planted.TRIES}"


def exchanged(monkeypatch, argument: str) -> None:
    """The chapter's verdict on channels_last gets another argument."""
    call = ast.parse(f'claims.verdict("02.channels_last_is_faster", {argument})', mode="eval").body
    monkeypatch.setattr(planted, "lines", lambda *_: [([], call)])


@pytest.mark.settled
def test_a_verdict_that_is_decided_in_advance_is_found_out(monkeypatch):
    """It holds whatever is planted; and one that reads nothing of the data is refused."""
    slower = "layouts=across(0.8)"
    exchanged(monkeypatch, "max(layouts.ratio, 2.0)")
    assert planted.share("02.channels_last_is_faster", slower, claims.FAILS) == 0
    exchanged(monkeypatch, "2.0")
    with pytest.raises(LookupError, match="no line that leads to the verdict reads"):
        planted.judge("02.channels_last_is_faster", slower)


@pytest.mark.settled
def test_what_leads_to_the_verdict_is_run_and_nothing_else():
    (kept, _), *_ = planted.lines("02.learning_rate_decay_helps", {"results"})
    assert [planted.ast.unparse(s).split(" = ")[0] for s in kept] == ["decay"]


@pytest.mark.settled
def test_every_claim_has_both_proofs():
    lacking = sorted(set(ALL) - set(PROVEN))
    assert not lacking, f"no estimand, can_hold or can_fail: {lacking}"
