"""A sample of the mutants, drawn by the date: each check rejects them, or equivalents.toml says why
not. `make soak` tries all.
"""

import mutants
import pytest

ALL = mutants.everything()
TRAINS = ("02.C", "04.C", "07.C")  # a check of these takes seconds


@pytest.mark.settled  # the check's draws are seeded, and the date stays what it is during a soak
@pytest.mark.parametrize("exercise", ALL, ids=[e.id for e in ALL])
def test_a_sample_is_rejected(exercise):
    score = mutants.judge(exercise.id, sample=2 if exercise.id in TRAINS else 5)
    assert not score.survivors


@pytest.mark.settled
def test_reasons_stand_beside_mutants_that_exist():
    names = {(e.id, m.name) for e in ALL for m in mutants.mutants(e)}
    gone = sorted(set(mutants.equivalents()) - names)
    assert not gone, f"no mutant has these names any more: {gone}"


@pytest.mark.settled
def test_changes_are_made_and_named_once():
    source = "def f(a, b):\n    return a - b if a < 2 else max(a, b)\n"
    found = dict(mutants.changes(source))
    assert len(found) == len(set(found.values()))
    assert found["line 2: a - b → a + b"].endswith("return a + b if a < 2 else max(a, b)")
    assert {"line 2: a < 2 → a <= 2", "line 2: a < 2 → a > 2", "line 2: 2 → 3"} <= set(found)
    assert {"line 2: max → min", "line 2: max(a, b) → max(b, a)"} <= set(found)


@pytest.mark.settled
def test_a_check_that_accepts_anything_is_found_out(monkeypatch):
    """00.A's check exchanged for one that looks at nothing: every mutant survives."""
    monkeypatch.setitem(mutants.exercises.registry(), "00.A", lambda answer, rng: answer(4.0, 2.0))
    score = mutants.judge("00.A")
    assert "line 2: old_seconds / new_seconds → old_seconds * new_seconds" in score.survivors
    assert len(score.survivors) > 10
