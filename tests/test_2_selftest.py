"""`course selftest`: what it calls a pass, what it keeps, and where that shows."""

import json
from types import SimpleNamespace

import pytest

from course_utils import claims, cpu, machine, measure
from course_utils.course import selftest


def comparison(ratio: float, half: float) -> SimpleNamespace:
    return SimpleNamespace(ratio=ratio, low=ratio - half, high=ratio + half, verdict="told")


STEADY = [[5.0, 4.8, 5.2]] * 10
MOODY = [[2.5, 2.4, 2.6]] * 5 + [[5.0, 4.9, 5.1]] * 5  # narrow, and each in a mood of its own


@pytest.mark.parametrize(
    ("equal", "known", "over", "passed"),
    [
        ((1.0, 0.01), (1.5, 0.02), STEADY, True),
        ((1.0, 0.01), (1.5, 0.02), [*STEADY[:9], [6.0, 5.9, 6.1]], True),  # one of ten may miss
        ((1.0, 0.01), (1.5, 0.02), [*STEADY[:8], [6.0, 5.9, 6.1], [6.0, 5.9, 6.1]], False),
        ((1.0, 0.01), (1.5, 0.02), MOODY, False),
        ((1.05, 0.01), (1.5, 0.02), STEADY, False),
        ((1.0, 0.01), (1.6, 0.02), STEADY, False),
    ],
)
def test_it_can_pass_and_fail(equal, known, over, passed):
    said = selftest.judged(comparison(*equal), comparison(*known), MOODY, over)
    assert said["passed"] is passed
    assert said["held_within"] <= 5
    assert selftest.summary(said).startswith("passed:" if passed else "not passed:")


def test_its_result_is_on_the_card_of_this_processor_only(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "SELFTEST", tmp_path / "build" / "selftest.json")
    assert machine.card().selftest == {}
    result = {"cpu": cpu.name(), "summary": "passed: 10 of 10"}
    selftest.keep(result)
    assert machine.card().selftest == result
    assert "passed: 10 of 10" in repr(machine.card())
    selftest.keep(result | {"cpu": "another one"})
    assert machine.card().selftest == {}
    (tmp_path / "build" / "selftest.json").write_text('{"cpu":')
    assert machine.card().selftest == {}


def test_a_place_that_cannot_be_written_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(machine, "SELFTEST", tmp_path / "file" / "selftest.json")
    selftest.keep({"cpu": "x"})
    assert "could not be kept" in capsys.readouterr().out


def test_one_fresh_program_answers(monkeypatch):
    """The program that runs ten times, once, shortened."""
    monkeypatch.setenv("COURSE_PROFILE", "smoke")
    within, over = measure.child(selftest.ONE_PROGRAM, timeout=120).result
    for ratio, low, high, *_ in (within, over):
        assert 0 < low <= ratio <= high


def test_a_verdict_says_over_what_its_interval_holds(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_LEDGER", str(tmp_path / "ledger.jsonl"))
    claim = claims.Claim("99.x", "It is twice as fast.", "somebody, 2020", "here", (1.5, 2.5), "x")
    monkeypatch.setattr(claims, "find", lambda _: claim)
    x = measure.compare(lambda: sum(range(40_000)), lambda: sum(range(20_000)), seconds=0.2)
    assert "within this process" in repr(claims.verdict("99.x", x))
    y = measure.across(lambda: sum(range(40_000)), lambda: sum(range(20_000)), seconds=0.2)
    assert "fresh processes" in claims.verdict("99.x", y)._repr_html_()
    lines = (tmp_path / "ledger.jsonl").read_text().splitlines()
    scopes = [json.loads(line)["scope"] for line in lines]
    assert scopes == ["within this process", y.scope]
    assert claims.verdict("99.x", measure.Interval(2.0, 1.9, 2.1)).scope == ""
