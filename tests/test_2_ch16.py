"""What the capstone accepts and refuses, taken from its cells; and what it shows of a ledger."""

import ast
import contextlib
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import taught
from scipy.stats import binomtest

from course_utils import (
    acceptance,
    candidates,
    claims,
    data,
    fleet,
    machine,
    measure,
    plots,
    serving,
    techniques,
)
from course_utils.course import build, report, run
from course_utils.course.chapters import chapters


def constants() -> dict:
    """The plain numbers that the chapter's cells define."""
    found = {}
    for cell in build.cells(chapters(["16"])[0]):
        if cell.cell_type == "code":
            for node in ast.parse(cell.source).body:
                with contextlib.suppress(ValueError, AttributeError):
                    names, value = node.targets[0], ast.literal_eval(node.value)
                    names = getattr(names, "elts", [names])
                    values = value if len(names) > 1 else [value]
                    found |= dict(zip((n.id for n in names), values, strict=True))
    return found


NUMBERS = {k: v for k, v in constants().items() if k in ("STAKES", "ENOUGH", "STRETCH", "STALL")}
ENOUGH = NUMBERS["ENOUGH"]


@pytest.fixture
def ch16():
    return taught(
        "16",
        **NUMBERS,
        binomtest=binomtest,
        dataclass=dataclass,
        Path=Path,
        measure=measure,
        acceptance=acceptance,
        candidates=candidates,
        serving=serving,
        fleet=fleet,
        torch=torch,
    )


# --- The bets -------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0.001, 0.1, 0.25])
def test_the_bets_accept_a_service_at_the_limit_in_at_most_one_of_twenty(ch16, length):
    rng = np.random.default_rng(0)
    wrong = sum(ch16.by_bets(0.05, length, rng) for _ in range(200))
    assert wrong <= 16, "200 tries at 5%: 16 or fewer in 97 of 100"


def test_one_load_order_by_order_does_not(ch16):
    rng = np.random.default_rng(0)
    assert sum(ch16.once(0.05, 0.25, rng) for _ in range(200)) > 60
    assert sum(ch16.once(0.05, 0.001, rng) for _ in range(200)) <= 16, "and is honest about coins"


def test_the_bets_accept_a_good_service_and_refuse_a_bad_one(ch16):
    rng = np.random.default_rng(1)
    assert sum(ch16.by_bets(0.005, 0.25, rng) for _ in range(40)) >= 34
    assert sum(ch16.by_bets(0.15, 0.25, rng) for _ in range(40)) == 0


def test_a_losing_game_stays_losing_whatever_the_stretches_are(ch16):
    """Ville: of fair coins with any spread, at most one in twenty ever multiplies by twenty."""
    rng = np.random.default_rng(2)
    for draw in (lambda: rng.random(400) < 0.1, lambda: rng.beta(0.2, 1.8, 400)):  # both: mean 0.1
        ever = [[m.max() >= ENOUGH for m in ch16.capital(draw(), 0.1)] for _ in range(400)]
        less, more = np.mean(ever, 0)
        assert less <= 0.075
        assert more <= 0.075


@pytest.mark.parametrize("limit", [0.01, 0.05, 0.5])
def test_money_never_falls_below_zero_and_clean_stretches_are_counted(ch16, limit):
    for x in (np.zeros(100), np.ones(100), np.resize([0, 1], 100)):
        assert all((money >= 0).all() for money in ch16.capital(x, limit))
    n = ch16.needed(limit)
    less, _ = ch16.capital(np.zeros(n), limit)
    assert less[n - 1] >= ENOUGH
    assert n == 1 or less[n - 2] < ENOUGH


# --- A load ---------------------------------------------------------------------------------


def answers(due: np.ndarray, waited_ms, status=200) -> serving.Answers:
    due = np.asarray(due, float)
    waited, status = np.broadcast_to(waited_ms, len(due)), np.broadcast_to(status, len(due))
    return serving.Answers(due, due, due + waited / 1e3, status, np.zeros(len(due), int), 4.0)


def test_a_late_order_counts_in_its_own_stretch_and_a_refused_one_is_late(ch16):
    due = np.array([0.1, 0.2, 0.5, 0.6, 0.9, 1.0])
    shares = ch16.late_shares(answers(due, [5, 50, 5, 5, 5, 5], [200, 200, 429, 0, 200, 200]), 10)
    assert shares.tolist() == [0.5, 1.0, 0.0]


def loaded(ch16, monkeypatch, waited) -> tuple[acceptance.Requirement, list[int]]:
    """What `load` says of a service whose orders wait `waited(seed)` ms, and the seeds it used."""
    seeds, space = [], ch16.load.__globals__
    due = np.arange(0, 6, 0.01)

    def open_loop(url, orders, rate, seconds, *, seed, timeout_s):
        seeds.append(seed)
        return answers(due, waited(seed))

    fake = SimpleNamespace(open_loop=open_loop, closed_loop=lambda *_, **__: None)
    brief = SimpleNamespace(limit_ms=10.0, late=5.0, rate=100.0)
    start = lambda d: contextlib.nullcontext(SimpleNamespace(url=""))  # noqa: E731
    for name, value in {
        "serving": fake,
        "start": start,
        "brief": brief,
        "orders": [],
        "STARTS": 10,
        "ROUND": 6.0,
    }.items():
        monkeypatch.setitem(space, name, value)
    return ch16.load(None), seeds


def test_a_good_service_needs_several_starts_with_other_arrivals(ch16, monkeypatch):
    found, seeds = loaded(ch16, monkeypatch, lambda seed: 5.0)
    assert (found.verdict, found.measured) == ("met", 0.0)
    assert len(seeds) == math.ceil(ch16.needed(0.05) / (6 / NUMBERS["STRETCH"]))
    assert len(set(seeds)) == len(seeds)


def test_a_bad_service_is_refused_at_its_first_start(ch16, monkeypatch):
    found, seeds = loaded(ch16, monkeypatch, lambda seed: 50.0)
    assert (found.verdict, len(seeds)) == ("missed", 1)


def test_one_bad_start_of_four_is_not_accepted(ch16, monkeypatch):
    found, _ = loaded(ch16, monkeypatch, lambda seed: 50.0 if seed % 4 == 3 else 5.0)
    assert found.verdict == "missed"


def test_what_stays_near_the_limit_is_undecided(ch16, monkeypatch):
    waited = np.where(np.arange(600) % 20 == 0, 50.0, 5.0)  # one in twenty, in every stretch
    found, seeds = loaded(ch16, monkeypatch, lambda seed: waited)
    assert (found.verdict, len(seeds)) == ("undecided", 10)


# --- An acceptance --------------------------------------------------------------------------


def accepted(ch16, monkeypatch, kb: float, lost: float, late: str) -> acceptance.Trial:
    right = np.arange(5000) < 4500
    worse = np.arange(5000) < 4500 - 50 * lost
    space, loads = ch16.accept.__globals__, []
    model = SimpleNamespace(stat=lambda: SimpleNamespace(st_size=1e3 * kb))

    def load(d):
        loads.append(d)
        return acceptance.Requirement("late", 1.0, 5.0, "%", late)

    fake = SimpleNamespace(is_right=lambda path, images: worse if path is model else right)
    brief = SimpleNamespace(file_kb=100.0, lost_points=3.0, late=5.0)
    for name, value in {
        "candidates": fake,
        "load": load,
        "brief": brief,
        "shipped": None,
    }.items():
        monkeypatch.setitem(space, name, value)
    trial = ch16.accept(SimpleNamespace(name="x", model=model))
    assert [r.name for r in trial.requirements] == ["file", "accuracy lost", "late"]
    assert bool(loads) == (trial.requirements[2].verdict != "not tried"), "no load for nothing"
    return trial


@pytest.mark.parametrize(
    ("kb", "lost", "late", "verdict", "by"),
    [
        (90, 1, "met", "accepted", "file"),
        (101, 1, "met", "rejected", "file"),
        (90, 6, "met", "rejected", "accuracy lost"),
        (90, 1, "missed", "rejected", "late"),
        (90, 1, "undecided", "undecided", "late"),
        (90, 3, "met", "undecided", "accuracy lost"),
        (90, 3, "missed", "rejected", "late"),
    ],
)
def test_the_cheapest_question_comes_first(ch16, monkeypatch, kb, lost, late, verdict, by):
    trial = accepted(ch16, monkeypatch, kb, lost, late)
    assert (trial.verdict, trial.decided_by.name) == (verdict, by)


def test_what_is_undecided_decides_before_what_uses_more():
    """Two late orders of 622 at 123 kB of 158: the load hangs in the balance, not the file."""
    file = acceptance.Requirement("file", 123.0, 158.0, "kB", "met")
    late = acceptance.Requirement("late", 0.3, 5.0, "%", "undecided")
    trial = acceptance.Trial("x", (file, late))
    assert (trial.verdict, trial.decided_by.name) == ("undecided", "late")


def test_a_requirement_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="'perhaps'"):
        acceptance.Requirement("file", 1.0, 2.0, "kB", "perhaps")
    with pytest.raises(ValueError, match="must be above 0"):
        acceptance.Requirement("file", 1.0, 0.0, "kB", "met")


def test_the_page_names_everything_and_escapes_it():
    file = acceptance.Requirement("file <kB>", 90.0, 100.0, "kB", "met")
    trial = acceptance.Trial("<script>", (file, acceptance.untried("late", 5, "%")))
    page = acceptance.page("A & B", ["5 < 6"], [trial], {"p": (b"png", 'a "quote"')})
    assert "<script>" not in page
    for text in (
        "A &amp; B",
        "5 &lt; 6",
        "&lt;script&gt;",
        "undecided",
        "not tried",
        "&quot;quote",
    ):
        assert text in page


def test_no_exam_before_an_acceptance_and_every_exam_is_counted(ch16, monkeypatch):
    space = ch16.exam.__globals__
    met = acceptance.Requirement("file", 1.0, 2.0, "kB", "met")
    missed = acceptance.Requirement("file", 3.0, 2.0, "kB", "missed")
    asked = []
    fake = SimpleNamespace(
        is_right=lambda path, part: asked.append(part) or np.resize([True, False], 1000)
    )
    trials = {"good": acceptance.Trial("good", (met,)), "bad": acceptance.Trial("bad", (missed,))}
    brief, exams = SimpleNamespace(lost_points=3.0), []
    for name, value in {
        "trials": trials,
        "brief": brief,
        "candidates": fake,
        "shipped": None,
        "exams": exams,
    }.items():
        monkeypatch.setitem(space, name, value)
    for name in ("bad", "unknown"):
        assert "no exam" in ch16.exam(SimpleNamespace(name=name, model=None))
    assert not asked
    for _ in range(2):
        assert "0.00 points" in ch16.exam(SimpleNamespace(name="good", model=None))
    assert (len(exams), set(asked)) == (2, {"test"})


def test_a_shadow_is_promoted_taken_back_or_goes_on(ch16, monkeypatch):
    pixels, sizes = np.zeros((6000, 784), np.uint8), np.full(200, 30)
    space = ch16.shadow.__globals__
    said = {"old": np.zeros(6000), "same": np.zeros(6000), "other": np.ones(6000)}
    said["near"] = (np.arange(6000) % 10 == 0).astype(float)
    fake = SimpleNamespace(classes=lambda path, images: said[path])
    for name, value in {
        "pixels": pixels,
        "sizes": sizes,
        "ends": np.cumsum(sizes),
        "candidates": fake,
    }.items():
        monkeypatch.setitem(space, name, value)
    assert ch16.shadow("old", "same").startswith("promoted after")
    assert ch16.shadow("old", "other").startswith("taken back after 2 orders")
    assert ch16.shadow("old", "near").startswith("goes on after 200 orders")


# --- The service ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    from course_utils import models

    table = candidates.Table(tmp_path_factory.mktemp("ch16"), images_per_order=1, seconds=0.1)
    return table.export(models.mini_resnet(8, seed=1).eval(), "small")


needs_mosec = pytest.mark.skipif(not machine.can("package:mosec"), reason="mosec is not installed")


@pytest.mark.wall_clock
@needs_mosec
def test_the_service_answers_its_key_and_nobody_else():
    key = os.urandom(8).hex()
    bodies = [key.encode() + bytes(784 * n) for n in (1, 3)]
    wrong = [b"x" * 16 + bytes(784), key.encode() + bytes(785), key.encode()]
    env = {"MODEL": "", "MAX_BATCH": "4", "MAX_WAIT_MS": "0"}
    with serving.server(acceptance.PROGRAM, token=key, env=env) as running:
        good = serving.closed_loop(running.url + "/sort", bodies, 0.3, connections=2, keep=True)
        assert set(good.status) == {200}
        assert {len(text) for text in good.bodies} == {1, 3}, "one class for each image"
        for body in wrong:
            refused = serving.closed_loop(running.url + "/sort", [body], 0.1, connections=1)
            assert not set(refused.status) & {0, 200, 500}, body[:20]


@pytest.mark.wall_clock
@needs_mosec
def test_at_twice_its_capacity_every_refusal_is_told_and_no_answer_is_wrong(model):
    """COURSE_OVERLOAD_S=600 makes it the ten minutes of a release."""
    key, seconds = os.urandom(8).hex(), float(os.environ.get("COURSE_OVERLOAD_S", 3))
    images = data.fashion_mnist("validation")[0][:600]
    right = candidates.classes(model, images).astype(np.uint8)
    bodies = [key.encode() + images[i : i + 24].numpy().tobytes() for i in range(0, 600, 24)]
    env = {"MODEL": str(model), "CAPACITY": "8"}
    with serving.server(acceptance.PROGRAM, token=key, env=env, patience_s=0.3) as running:
        url = running.url + "/sort"
        busy = serving.closed_loop(url, bodies, 1.0, connections=8)
        able = (busy.status == 200).sum() / busy.finished.max()
        end, told = time.monotonic() + seconds, {200: 0, 429: 0}
        while time.monotonic() < end:
            load = serving.open_loop(url, bodies, 2 * able, min(seconds, 20), keep=True)
            assert set(load.status.tolist()) <= {200, 429}
            for which, status, text in zip(load.which, load.status, load.bodies, strict=True):
                told[int(status)] += 1
                if status == 200:
                    assert text == right[24 * which : 24 * which + 24].tobytes()
    assert min(told.values()) > 0, told


# --- The simulator, the table of candidates ---------------------------------------------------


@pytest.mark.parametrize(("batch", "wait"), [(1, 0), (4, 0), (16, 3.0)])
def test_the_simulator_agrees_with_the_fleet_of_one(batch, wait):
    rng = np.random.default_rng(0)
    due = np.cumsum(np.random.default_rng(0).exponential(10.0, 2000)) / 1e3
    model = {"fixed_ms": 5.0, "image_ms": 0.5}
    waits = fleet.fleet(due, 1, "random", batch, wait / 1e3, lambda b: (5 + 0.5 * 4 * b) / 1e3, rng)
    ours = fleet.p99_ms(model, {"rate": 100.0, "images": 4}, batch, wait, orders=2000, seed=0)
    assert ours == pytest.approx(1e3 * np.percentile(waits, 99), rel=0.02)


@pytest.mark.parametrize(("batch", "wait", "rate"), [(0, 0, 1), (1, -1, 1), (1, 0, 0)])
def test_the_simulator_refuses_what_cannot_be(batch, wait, rate):
    with pytest.raises(ValueError, match="are due"):
        fleet.p99_ms({"fixed_ms": 1, "image_ms": 1}, {"rate": rate, "images": 1}, batch, wait)


def test_a_candidate_that_was_not_entered_is_named(tmp_path):
    with pytest.raises(KeyError, match="no candidate 'x'"):
        candidates.Table(tmp_path, images_per_order=24, seconds=0.1)["x"]


# --- The ledger -------------------------------------------------------------------------------


def row(claim: str, verdict: str) -> dict:
    found = claims.find(claim)
    return {
        "claim": claim,
        "chapter": claim[:2],
        "statement": found.statement,
        "value": 1.0,
        "low": 1.0,
        "high": 1.0,
        "unit": "",
        "verdict": verdict,
        "reason": "",
        "machine": {"cpu": "Test CPU", "isa": ["avx2"], "cores": 2},
    }


def test_every_technique_names_claims_that_exist_and_says_what_the_ledger_says():
    table = techniques.table([row("06.two_to_three_times_faster", claims.FAILS)])
    said = {i: v for r in table.rows for i, _, v in r["verdicts"]}
    assert said["06.two_to_three_times_faster"] == claims.FAILS
    assert said["03.half_the_macs_is_half_the_time"] is None
    assert "fails: INT8 makes inference at least twice as fast on a CPU." in repr(table)
    assert "not run: Half the MACs is half the time." in repr(table)
    chapters_named = {c for r in table.rows for c in r["chapters"]}
    assert chapters_named == {f"{i:02}" for i in range(2, 17)}, (
        "every chapter's technique is in the table"
    )


def test_one_ledger_gives_a_page_a_picture_and_which_technique_when(tmp_path):
    rows = [row("06.two_to_three_times_faster", claims.HOLDS)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    paths = report.report([tmp_path / "a.json"], tmp_path)
    assert [p.name for p in paths] == ["report.html", "report.png", "techniques.html"]
    assert "Which technique when" in paths[2].read_text(encoding="utf-8")


def test_the_picture_of_verdicts_counts_them():
    rows = [
        row("06.two_to_three_times_faster", claims.HOLDS),
        row("05.four_times_smaller", claims.FAILS),
        row("16.techniques_multiply", claims.OPEN),
    ]
    title = plots.verdicts(rows).axes[0].get_title("left")
    assert title == "3 claims on this machine: 1 hold, 1 do not hold, 1 inconclusive"
    assert plots.verdicts([]).axes[0].get_title("left").endswith("none yet")


LAST = """\
# %% [markdown]
# # 97

# %% tags=["parameters"]
PROFILE = "fast"

# %%
from course_utils import claims, ledger

assert [e["claim"] for e in ledger.verdicts()] == ["06.two_to_three_times_faster"]
claims.verdict("05.six_db_a_bit", 6.02)
"""


def test_a_chapter_run_after_others_finds_their_verdicts_and_does_not_count_them(
    tmp_path, monkeypatch
):
    source = tmp_path / "notebooks" / "source" / "97_last.py"
    source.parent.mkdir(parents=True)
    source.write_text(LAST)
    monkeypatch.setattr(chapters, "__defaults__", (None, source.parent))
    earlier = [{"event": "verdict", **row("06.two_to_three_times_faster", claims.HOLDS)}]
    outcome = run.run_one(chapters()[0], "smoke", "learner", tmp_path, earlier)
    assert outcome.error == ""
    assert [e["claim"] for e in outcome.events] == ["05.six_db_a_bit"]


def test_nan_does_not_look_like_a_changed_input():
    from course_utils import probe

    assert probe.same([("a", math.nan)], [("a", math.nan)])
    assert not probe.same([("a", math.nan)], [("a", 1.0)])
