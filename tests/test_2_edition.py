"""The edition's ledger and its one machine, on planted pages."""

import json

import nbformat
import pytest

from course_utils import claims, machine
from course_utils.course import edition
from course_utils.course.chapters import Chapter, UsageError, chapters

OTHER = {"cpu": "Another", "isa": ["avx2"], "caps": {}}


@pytest.fixture
def house(tmp_path, monkeypatch):
    """Planted chapters 01 and 02, whose notebooks say on which machine they were built."""
    monkeypatch.setattr(edition, "LEDGER", tmp_path / "build" / "edition" / "ledger.json")
    monkeypatch.setattr(edition, "ROOT", tmp_path)
    (tmp_path / "source").mkdir()
    found = [Chapter(tmp_path / "source" / f"0{k}_planted.py") for k in (1, 2)]
    monkeypatch.setattr(edition, "chapters", lambda: found)

    def built(number: int, on: dict | None) -> Chapter:
        book = nbformat.v4.new_notebook(metadata={"course": {"machine": on} if on else {}})
        nbformat.write(book, found[number - 1].learner)
        return found[number - 1]

    return built


def said(claim: str, verdict: str = claims.HOLDS, **more) -> dict:
    return {"event": "verdict", "claim": claim, "chapter": claim[:2], "verdict": verdict} | more


def test_a_chapter_is_not_built_beside_another_machines_pages(house):
    first = house(1, edition.here())
    second = house(2, OTHER)
    with pytest.raises(UsageError, match=r"chapters 02 were built on another one.*--mix"):
        edition.refuse_a_mixture([first])
    edition.refuse_a_mixture([second])
    edition.refuse_a_mixture([first, second])
    house(2, None)  # a page that does not say where it is from is no proof
    edition.refuse_a_mixture([first])


def test_a_cap_makes_another_machine(house, monkeypatch):
    first = house(1, edition.here())
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    second = house(2, edition.here())
    assert edition.made_on(first.learner) != edition.made_on(second.learner)


def test_what_a_chapter_says_anew_takes_the_place_of_what_it_said(house):
    first, second = house(1, None), house(2, None)
    edition.keep(first, [said("01.amdahl"), said("01.gone")], "fast")
    edition.keep(second, [said("02.x"), {"event": "check"}], "fast")
    edition.keep(first, [said("01.amdahl"), said("01.amdahl", claims.FAILS)], "fast")
    kept = json.loads(edition.LEDGER.read_text(encoding="utf-8"))
    assert [(row["claim"], row["verdict"]) for row in kept] == [
        ("01.amdahl", claims.FAILS),
        ("02.x", claims.HOLDS),
    ]
    assert len({json.dumps(row["machine"]) for row in kept}) == 1
    assert kept[0]["machine"]["profile"] == "fast"


@pytest.mark.parametrize(
    "change",
    [
        {"cpu": "Another"},
        {"isa": ["avx2"]},
        {"caps": {"ONEDNN_MAX_CPU_ISA": "AVX2"}},
        {"versions": {"torch": "1.0"}},
        {"profile": "full"},
    ],
    ids=str,
)
def test_rows_of_which_the_card_would_not_be_true_go(house, change):
    first, second = house(1, None), house(2, None)
    edition.keep(first, [said("01.amdahl")], "fast")
    kept = json.loads(edition.LEDGER.read_text(encoding="utf-8"))
    kept[0]["machine"] |= change
    edition.LEDGER.write_text(json.dumps(kept), encoding="utf-8")
    edition.keep(second, [said("02.x")], "fast")
    kept = json.loads(edition.LEDGER.read_text(encoding="utf-8"))
    assert [row["claim"] for row in kept] == ["02.x"]


def test_a_build_is_given_only_earlier_verdicts_of_this_machine(house, tmp_path):
    own = machine.card().as_dict()
    rows = [
        said("06.two_to_three_times_faster") | {"machine": own},
        said("05.six_db_a_bit") | {"machine": own | {"cpu": "Another"}},
        said("16.techniques_multiply") | {"machine": own},
    ]
    assert edition.earlier("16_capstone") == []
    run = tmp_path / "build" / "run" / "ledger.json"
    run.parent.mkdir(parents=True)
    run.write_text(json.dumps(rows), encoding="utf-8")
    assert [r["claim"] for r in edition.earlier("16_capstone")] == ["06.two_to_three_times_faster"]
    edition.keep(house(1, None), [said("01.amdahl")], "fast")  # the edition's own goes first
    assert [r["claim"] for r in edition.earlier("16_capstone")] == ["01.amdahl"]


def test_all_pages_come_from_one_machine():
    found = {chapter.number: edition.made_on(chapter.learner) for chapter in chapters()}
    assert None not in found.values()
    assert len({json.dumps(one, sort_keys=True) for one in found.values()}) == 1, found
