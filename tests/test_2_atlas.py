"""The atlas: planted ledgers are taken as measured; forged, broken or personal ones are refused
with the reason.
"""

import argparse
import copy
import getpass
import json
import math
import socket

import pytest

from course_utils import claims, machine
from course_utils.course import atlas, contribute, publish
from course_utils.course.chapters import UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ISA = {
    "avx2": ["avx2"],
    "vnni": ["avx2", "avx512_f", "avx512_vnni"],
    "bf16": ["avx2", "avx512_f", "avx512_vnni", "avx512_bf16"],
}


def selftest(cpu):
    return {
        "equal": [1.0, 0.99, 1.01],
        "known": [1.5, 1.49, 1.51],
        "programs": 10,
        "common": 2.0,
        "held": 10,
        "held_within": 4,
        "spread_within": 3.0,
        "passed": True,
        "seconds": 90,
        "date": "2026-11-28",
        "cpu": cpu,
        "summary": "passed: 10 of 10 intervals over processes (2026-11-28)",
    }


def card(kind="avx2", **more):
    cpu = f"Planted {kind.upper()} CPU"
    return {
        "cpu": cpu,
        "architecture": "x86_64",
        "isa": ISA[kind],
        "cores": 2,
        "threads": 2,
        "memory_gb": 8.0,
        "gpu": "none",
        "system": "Linux 6.1",
        "python": "3.12.1",
        "versions": {"torch": "2.14.1", "onnxruntime": "1.32.0"},
        "profile": "fast",
        "caps": {},
        "model": "family 6",
        "unknown": [],
        "allocator": "mallopt",
        "selftest": selftest(cpu),
    } | more


def row(claim, verdict, where):
    """Planted numbers that lead to `verdict`: inside the band, or beyond one of its edges."""
    low, high = claim.band
    finite = [edge for edge in claim.band if math.isfinite(edge)]
    width = (high - low) / 2 if len(finite) == 2 and high > low else abs(finite[0]) / 2 or 1.0
    if verdict == claims.UNTESTED:
        numbers, reason = (None, None, None), "Skipped (gpu): there is none."
    else:
        inside = low + width / 2 if math.isfinite(low) else high - width / 2
        if high == low:
            inside, width = low, 0.0
        outside = high + 1.0 if math.isfinite(high) else low - width
        value = inside if verdict == claims.HOLDS else outside
        reach = width / 5 if verdict == claims.HOLDS or math.isinf(high) else 0.2
        numbers, reason = (value, value - reach, value + reach), ""
    return {
        "claim": claim.id,
        "chapter": claim.id[:2],
        "statement": claim.statement,
        **dict(zip(("value", "low", "high"), numbers, strict=True)),
        "unit": claim.unit,
        "verdict": verdict,
        "reason": reason,
        "stand_in": claim.stand_in,
        "scope": "12 fresh processes",
        "at": "2026-11-27T10:00:00Z",
        "machine": where,
    }


def ledger(kind="avx2", **more):
    """A whole ledger: claims hold and fail in turn, those of TensorRT were not tested."""
    where, rows = card(kind, **more), []
    for i, claim in enumerate(claims.registry().values()):
        verdict = (claims.HOLDS, claims.FAILS)[(i + list(ISA).index(kind) // 2) % 2]
        if "engine" in claim.condition:
            verdict = claims.UNTESTED
        rows.append(row(claim, verdict, where))
    return rows


def given(folder, rows, **options):
    source = folder / "ledger.json"
    source.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    options = {"commit": COMMIT, "folder": folder / "atlas"} | options
    return contribute.contribute(source, **options)


@pytest.mark.parametrize("kind", ISA)
def test_a_whole_ledger_is_taken_and_read_again(tmp_path, kind):
    rows = ledger(kind)
    path = given(tmp_path, rows)
    (one,) = atlas.load(path.parent)
    assert path.name == f"planted-{kind}-{kind}.json"
    assert (one.kind, one.date, one.commit, one.dropped) == (kind, "2026-11-27", COMMIT, 0)
    assert len(one.rows) == len(claims.registry())
    for told in rows:
        verdict = one.verdict(claims.find(told["claim"]))
        assert (verdict.status, verdict.value) == (told["verdict"], told["value"])
    assert str(tmp_path) not in path.read_text()


def spoil(change):
    """A ledger in which one thing is wrong."""
    rows = ledger()
    change(rows)
    return rows


def on_card(**fields):
    return lambda rows: [r["machine"].update(copy.deepcopy(fields)) for r in rows]


def on_test(**fields):
    return lambda rows: [r["machine"]["selftest"].update(fields) for r in rows]


def on_row(**fields):
    return lambda rows: rows[0].update(fields)


REFUSED = {
    "a verdict that its numbers deny": (on_row(verdict=claims.FAILS), "its numbers say"),
    "a value outside of its interval": (on_row(value=1e9), "does not lie in its interval"),
    "no number": (on_row(value=None), "its numbers are"),
    "numbers for what was not tested": (on_row(verdict=claims.UNTESTED), "no numbers"),
    "another statement": (on_row(statement="It is fast."), "its statement is not what"),
    "another unit": (on_row(unit="furlongs"), "its unit is not what"),
    "an unknown claim": (on_row(claim="00.nowhere"), "no claim of the course"),
    "a claim twice": (lambda rows: rows.append(dict(rows[0])), "stands there twice"),
    "no time": (lambda rows: rows[0].pop("at"), "lacks the time"),
    "a day to come": (on_row(at="2999-01-01T00:00:00Z"), "lies in the future"),
    "a chapter left out": (
        lambda rows: rows.__setitem__(slice(None), [r for r in rows if r["chapter"] != "03"]),
        "no verdict from chapter 03",
    ),
    "two machines": (lambda rows: rows[0].update(machine=card("vnni")), "mixes machines"),
    "smoke": (on_card(profile="smoke"), "profile 'smoke'"),
    "no self-test": (on_card(selftest={}), "carries no self-test"),
    "a self-test that failed": (on_test(passed=False), "did not pass"),
    "a self-test that is forged": (on_test(held=3), "its own numbers say it did not"),
    "a self-test cut short": (on_test(equal=None), "self-test is broken"),
    "another machine's self-test": (on_test(cpu="Other CPU"), "of another processor"),
    "no versions": (on_card(versions={}), "torch's must be there"),
    "a strange instruction set": (on_card(isa=["avx1024"]), "avx1024"),
    "a strange cap": (on_card(caps={"PATH": "x"}), "the caps PATH"),
    "a field of its own": (on_card(owner="x"), "holds owner"),
    "a field missing": (lambda rows: [r["machine"].pop("gpu", 0) for r in rows], "lacks gpu"),
    "a home folder": (on_row(reason="see /home/maria/run"), "a path or a name"),
    "a folder on Windows": (on_card(allocator=r"C:\Users\maria"), "a path or a name"),
    "an address of a person": (on_card(system="Linux, maria@example.org"), "a path or a name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_forged_broken_or_personal_ledger_is_refused_with_the_reason(tmp_path, case):
    change, reason = REFUSED[case]
    with pytest.raises(UsageError, match="can't go into the atlas") as error:
        given(tmp_path, spoil(change))
    assert reason in str(error.value)
    assert not list(tmp_path.glob("atlas/*"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "not JSON"), ("[]", "empty"), ('[{"claim": "x"}]', "lacks"), ("{}", "no ledger")],
)
def test_what_is_no_ledger_is_refused(tmp_path, text, reason):
    with pytest.raises(UsageError, match=reason):
        given(tmp_path, text)


def test_the_name_of_this_account_or_machine_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "maria")
    monkeypatch.setattr(socket, "gethostname", lambda: "marias-desk.example")
    for text in ("Maria's CPU", "marias-desk, 2 cores"):
        with pytest.raises(UsageError, match="a path or a name"):
            given(tmp_path, spoil(on_card(system=text)))
    monkeypatch.setattr(getpass, "getuser", lambda: "root")
    assert given(tmp_path, spoil(on_card(system="a root")))


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"name": "../x"}, "--name is"), ({"commit": "HEAD"}, "the commit is 'HEAD'")],
)
def test_a_name_or_a_commit_that_is_none_is_refused(tmp_path, options, reason):
    with pytest.raises(UsageError, match=reason):
        given(tmp_path, ledger(), **options)


def test_one_machine_does_not_replace_another(tmp_path):
    path = given(tmp_path, ledger("avx2"), name="mine")
    assert given(tmp_path, ledger("avx2"), name="mine") == path
    with pytest.raises(UsageError, match="another machine's ledger"):
        given(tmp_path, ledger("bf16"), name="mine")
    assert atlas.read(path).kind == "avx2"


def test_a_capped_run_is_named_as_such_and_fills_no_gap(tmp_path):
    cap = dict.fromkeys(machine.CAPS[:1], "AVX2")
    for kind, caps in (("vnni", {}), ("bf16", {}), ("bf16", cap)):
        given(tmp_path, ledger(kind, caps=caps))
    ledgers = atlas.load(tmp_path / "atlas")
    assert [one.kind for one in ledgers] == ["vnni", "bf16", "bf16"]
    assert [one.capped for one in ledgers] == ["", "", "ONEDNN_MAX_CPU_ISA=AVX2"]
    assert "capped by ONEDNN_MAX_CPU_ISA=AVX2" in ledgers[2].label
    assert atlas.missing(ledgers) == ["a CPU with AVX2 only"]


def test_a_question_worded_anew_drops_its_old_answer(tmp_path):
    path = given(tmp_path, ledger())
    whole = json.loads(path.read_text())
    whole["verdicts"][0]["asked"] = "of old"
    path.write_text(json.dumps(whole))
    one = atlas.read(path)
    assert (one.dropped, whole["verdicts"][0]["claim"] in one.rows) == (1, False)


def test_a_broken_file_of_the_atlas_is_named(tmp_path):
    path = given(tmp_path, ledger())
    whole = json.loads(path.read_text())
    for text in ("{", "[]", json.dumps(whole | {"format": 2}), json.dumps(whole | {"name": "x"})):
        path.write_text(text)
        with pytest.raises(UsageError, match=path.name):
            atlas.load(path.parent)


def test_the_shipped_ledgers_would_be_taken_again():
    for one in atlas.load():
        about = {"machine": one.machine, "at": f"{one.date}T00:00:00Z"}
        found = []
        for told in one.rows.values():
            claim = claims.find(told["claim"])
            words = {key: getattr(claim, key) for key in ("statement", "unit", "stand_in")}
            found += contribute.complaints([told | about | words])
        assert {text for text in found if not text.startswith("it is not whole")} == set(), one.name


def test_every_claim_has_a_reason_and_no_other_has():
    from course_utils.course.book import guess_page

    reasons = guess_page.reasons()
    assert set(reasons) == set(claims.registry())
    assert all(40 < len(text) < 200 and text.endswith(".") for text in reasons.values())


def test_places_on_a_plot():
    claim = claims.Claim("99.x", "It is twice as fast.", "", "", (2.0, math.inf), "x")
    verdict = claims.Verdict(claim, claims.HOLDS, 4.0, 2.0, 8.0, "")
    axis = atlas.scale(claim, [verdict])
    one, two, four, eight = (axis.at(x) for x in (1, 2, 4, 8))
    assert two - one == pytest.approx(four - two) == pytest.approx(eight - four)
    assert 0 < one < eight < 100
    assert (axis.at(0), axis.at(math.inf)) == (0, 100)
    exact = claims.Claim("99.y", "None differ.", "", "", (0.0, 0.0), "tokens")
    assert atlas.scale(exact, []).at(0) == pytest.approx(50)


def test_the_command_says_what_it_wrote(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    publish.add(parser.add_subparsers())
    source = tmp_path / "ledger.json"
    source.write_text(json.dumps(ledger()[:-1]))
    words = ["contribute", str(source), "--commit", COMMIT, "--out", str(tmp_path), "--name", "one"]
    options = parser.parse_args(words)
    assert options.do(options) == 0
    said = capsys.readouterr().out
    assert "one.json" in said
    assert f"No answer to 1 of {len(claims.registry())}: {ledger()[-1]['claim']}." in said
