"""`course report --class`: a planted room, with what goes with what, and ledgers that lie."""

import json
import re
import zipfile

import pytest

from course_utils import ROOT
from course_utils.course import cli, room
from course_utils.course.chapters import UsageError

CARD = {
    "cpu": "Planted",
    "architecture": "x86_64",
    "cores": 2,
    "versions": {"torch": "2.9"},
    "caps": {},
}
KINDS = {"avx2": ["avx2"], "bf16": ["avx2", "avx512_vnni", "avx512_bf16"]}
CLAIM = "03.losses_add_up"


def ledger(kind: str, verdict: str = "", guess: object = None, **card) -> str:
    """The lines of a learner's ledger."""
    lines = [{"event": "card", "machine": CARD | {"isa": KINDS[kind]} | card}]
    if verdict:
        lines.append({"event": "verdict", "claim": CLAIM, "verdict": verdict})
    if guess is not None:
        pair = {"question": "03.half", "guess": guess, "measured": 1.5, "unit": "x"}
        lines.append({"event": "prediction"} | pair)
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def given(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()

    def put(**learners: str):
        for name, text in learners.items():
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        return folder

    return put


def test_a_disagreement_goes_with_what_separates_it(given, tmp_path, capsys):
    source = given(
        Ada=ledger("bf16", room.HOLDS, 2.0),
        Ben=ledger("bf16", room.HOLDS, 9.0),
        Cem=ledger("avx2", room.FAILS, 1.4),
    )
    assert cli.main(["report", "--class", str(source), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "class.html").read_text(encoding="utf-8")
    assert str(tmp_path / "out" / "class.html") in capsys.readouterr().out
    assert "the instruction set: holds with a CPU with VNNI and bf16; fails with a CPU" in text
    assert "holds: Ada, Ben" in text
    assert "fails: Cem" in text
    assert "3 guessed, 2 within a factor of two. Median guess 2 x, median measurement 1.5 x" in text
    assert "<title>Ben: 9</title>" in text
    assert "2 holds" in text


@pytest.mark.parametrize(
    ("learners", "told"),
    [
        (
            [("bf16", room.HOLDS, {"cores": 2}), ("bf16", room.FAILS, {"cores": 8})],
            "the number of cores: holds with 2; fails with 8. One machine a side",
        ),
        (
            [
                ("bf16", room.HOLDS, {"versions": {"torch": "2.9"}}),
                ("bf16", room.FAILS, {"versions": {"torch": "2.8"}}),
                ("bf16", room.FAILS, {"versions": {"torch": "2.8"}}),
            ],
            "torch's version: holds with 2.9; fails with 2.8.",
        ),
        ([("avx2", room.HOLDS, {}), ("avx2", room.FAILS, {})], "none of: the instruction set"),
        (
            [("avx2", room.HOLDS, {}), ("bf16", room.HOLDS, {}), ("bf16", room.FAILS, {})],
            "none of: the instruction set",
        ),
    ],
)
def test_what_it_goes_with(learners, told):
    made = []
    for number, (kind, verdict, card) in enumerate(learners):
        learner, broken = room.read(str(number), ledger(kind, verdict, **card).encode())
        assert broken == 0
        made.append(learner)
    said = {one.name: one.verdicts[CLAIM] for one in made}
    assert room.goes_with(made, said).startswith(told)


def test_an_undecided_machine_disagrees_with_nobody(given):
    source = given(Ada=ledger("bf16", room.HOLDS), Ben=ledger("avx2", "inconclusive"))
    text = room.page(*room.gather(source))
    assert "Nowhere: no claim holds on one machine and fails on another." in text


def test_a_cap_makes_a_machine_another_one(given):
    capped = ledger("bf16", room.FAILS, caps={"ONEDNN_MAX_CPU_ISA": "AVX2"})
    text = room.page(*room.gather(given(Ada=ledger("bf16", room.HOLDS), Ben=capped)))
    assert "fails with a CPU with VNNI and bf16, capped by ONEDNN_MAX_CPU_ISA=AVX2" in text


def test_ledgers_that_lie_are_shown_as_text_or_left_out_and_told(given):
    evil = "<script>alert(1)</script>"
    lines = [
        {"event": "prediction", "question": evil, "guess": 1.0, "measured": 2.0, "unit": evil},
        {"event": "prediction", "question": "q", "guess": float("inf"), "measured": 1},
        {"event": "prediction", "question": ["q"], "guess": 1, "measured": 1},
        {"event": "verdict", "claim": {"a": 1}, "verdict": room.HOLDS},
        {"event": "verdict", "claim": evil, "verdict": "certain"},
        {"event": "verdict", "claim": evil, "verdict": room.HOLDS},
        {"event": "card", "machine": {"isa": [[1]], "architecture": "x"}},
        {"event": "card", "machine": {"isa": [], "architecture": "x", "caps": [1]}},
        {"event": "card", "machine": 7},
        ["card"],
        {"no": "event"},
    ]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"event": "verd'
    source = given(Eve=text, Mallory="", Ada=ledger("avx2", room.HOLDS, 1.0))
    page = room.page(*room.gather(source))
    assert evil not in page
    assert page.count("&lt;script&gt;") >= 3
    assert "Eve: 10 lines of Eve.jsonl are no whole events" in page
    assert "Mallory: no ledger with a verdict or a prediction in it" in page
    assert "1 holds" in page


def test_moodles_export_with_workbooks_in_zips(tmp_path):
    for number, name in enumerate(("Ada Lovelace", "Ada Lovelace")):
        folder = tmp_path / "in" / f"{name}_{number}_assignsubmission_file_"
        folder.mkdir(parents=True)
        with zipfile.ZipFile(folder / "workbook.zip", "w") as out:
            out.writestr("workbook/ledger.jsonl", ledger("bf16", room.HOLDS))
    learners, odd = room.gather(tmp_path / "in")
    assert [one.name for one in learners] == ["Ada-Lovelace-0", "Ada-Lovelace-1"]
    assert odd == []


def test_the_half_day_has_the_minutes_that_it_has():
    text = (ROOT / "TEACHING.md").read_text(encoding="utf-8")
    table = text.split("**Half a day, minute by minute**")[1].split("\n\n**Two days")[0]
    assert sum(map(int, re.findall(r"^\| (\d+) \|", table, re.M))) == 180
    parts = " ".join(text.split("**Two days:**")[1].split("**Ten weeks")[0].split())
    assert sum(map(int, re.findall(r"\b(\d+) (?:minutes|in pairs|for)", parts))) == 90


def test_what_is_no_room_is_refused(given, tmp_path, capsys):
    with pytest.raises(UsageError, match="holds no ledger"):
        room.gather(given(Ada="", Ben="\n"))
    assert cli.main(["report", "a.jsonl", "--class", str(tmp_path)]) == 2
    assert "not both" in capsys.readouterr().err
    assert cli.main(["report", "--class", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert "there is no" in capsys.readouterr().err
