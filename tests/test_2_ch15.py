"""What the capstone accepts and refuses, taken from its cells; and what it shows of a ledger."""

import ast
import io
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from conftest import taught

from course_utils import claims, machine, measure, plots, serving
from course_utils.course import build, report, run
from course_utils.course.chapters import chapters


@pytest.fixture(scope="module")
def ch15():
    return taught("15", dataclass=dataclass, field=field, Path=Path, measure=measure, io=io)


def answers(waited_ms: np.ndarray, status: np.ndarray | None = None) -> serving.Answers:
    due = np.linspace(0, 4, len(waited_ms), endpoint=False)
    status = np.full(len(due), 200) if status is None else status
    return serving.Answers(due, due, due + waited_ms / 1e3, status, np.zeros(len(due), int), 4.0)


def test_no_late_request_proves_a_p99_only_if_there_were_enough(ch15):
    assert ch15.late_share(answers(np.full(1000, 5.0)), 10).high <= 0.01
    assert ch15.late_share(answers(np.full(200, 5.0)), 10).high > 0.01


def test_what_was_refused_or_never_answered_is_late(ch15):
    status = np.full(1000, 200)
    status[::10] = 0
    status[5::50] = 503
    share = ch15.late_share(answers(np.full(1000, 1.0), status), 10)
    assert share.value == pytest.approx(0.12)
    assert share.low > 0.01


def test_lateness_in_one_cluster_is_less_certain_than_the_same_spread_out(ch15):
    spread, cluster = np.full(1000, 1.0), np.full(1000, 1.0)
    spread[::50], cluster[:20] = 99, 99
    wide, narrow = (ch15.late_share(answers(w), 10) for w in (cluster, spread))
    assert wide.value == narrow.value
    assert wide.high > narrow.high


def test_the_share_of_late_ones_covers_a_known_share(ch15):
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        share = ch15.late_share(answers(np.where(rng.random(800) < 0.03, 99.0, 1.0)), 10)
        inside += share.low <= 0.03 <= share.high
    assert inside >= 186


def test_an_acceptance_hangs_on_what_is_nearest_its_limit(ch15):
    interval = measure.Interval
    met = ch15.against("file", interval(90, 90, 90), 100, "kB")
    missed = ch15.against("accuracy lost", interval(4, 3.5, 4.5), 3, "points")
    open_ = ch15.against("accuracy lost", interval(3.2, 2.7, 3.7), 3, "points")
    assert [r.verdict for r in (met, missed, open_)] == ["met", "missed", "undecided"]
    named = ch15.Deployment("x", None)
    assert ch15.Acceptance(named, (met,)).verdict == "accepted"
    assert ch15.Acceptance(named, (met, open_)).verdict == "undecided"
    both = ch15.Acceptance(named, (met, open_, missed))
    assert (both.verdict, both.binding.name) == ("rejected", "accuracy lost")
    assert "it hangs on: accuracy lost" in repr(both)


@pytest.mark.wall_clock
@pytest.mark.skipif(not machine.can("package:mosec"), reason="mosec is not installed")
def test_the_service_answers_its_key_and_nobody_else(tmp_path):
    (tmp_path / "service.py").write_text(constant("SERVICE"), encoding="utf-8")
    key = os.urandom(8).hex()
    bodies = [key.encode() + bytes(784 * n) for n in (1, 3)]
    wrong = [b"x" * 16 + bytes(784), key.encode() + bytes(785), key.encode()]
    env = {"MODEL": "", "MAX_BATCH": "4", "MAX_WAIT_MS": "0"}
    with serving.server(tmp_path / "service.py", token=key, env=env) as running:
        good = serving.closed_loop(running.url + "/sort", bodies, 0.3, connections=2, keep=True)
        assert set(good.status) == {200}
        assert {len(text) for text in good.bodies} == {1, 3}, "one class for each image"
        for body in wrong:
            refused = serving.closed_loop(running.url + "/sort", [body], 0.1, connections=1)
            assert not set(refused.status) & {0, 200, 500}, body[:20]


def constant(name: str) -> str:
    for cell in build.cells(chapters(["15"])[0]):
        if cell.cell_type == "code" and f"{name} = " in cell.source:
            for node in ast.parse(cell.source).body:
                if isinstance(node, ast.Assign) and node.targets[0].id == name:
                    return ast.literal_eval(node.value)
    raise AssertionError(f"chapter 15 has no {name}")


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
    table = claims.techniques([row("06.two_to_three_times_faster", claims.FAILS)])
    said = {i: v for r in table.rows for i, _, v in r["verdicts"]}
    assert said["06.two_to_three_times_faster"] == claims.FAILS
    assert said["03.half_the_macs_is_half_the_time"] is None
    assert "fails: INT8 makes inference at least twice as fast on a CPU." in repr(table)
    assert "not run: Half the MACs is half the time." in repr(table)
    chapters_named = {c for r in table.rows for c in r["chapters"]}
    assert chapters_named == {f"{i:02}" for i in range(2, 16)}, (
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
        row("15.techniques_multiply", claims.OPEN),
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
    from course_utils import exercises

    assert exercises.same([("a", math.nan)], [("a", math.nan)])
    assert not exercises.same([("a", math.nan)], [("a", 1.0)])


def test_a_build_is_given_only_earlier_verdicts_of_this_machine(tmp_path, monkeypatch):
    own = machine.card().as_dict()
    rows = [
        row("06.two_to_three_times_faster", claims.HOLDS) | {"machine": own},
        row("05.six_db_a_bit", claims.HOLDS),
        row("15.techniques_multiply", claims.FAILS) | {"machine": own},
    ]
    monkeypatch.setattr(build, "ROOT", tmp_path)
    assert build._earlier("15_capstone") == ""
    (tmp_path / "build" / "run").mkdir(parents=True)
    (tmp_path / "build" / "run" / "ledger.json").write_text(json.dumps(rows))
    given = [json.loads(line)["claim"] for line in build._earlier("15_capstone").splitlines()]
    assert given == ["06.two_to_three_times_faster"]


def test_a_file_is_judged_again_when_it_was_written_again(ch15, tmp_path):
    space, judged = ch15.facts_of.__globals__, []
    space |= {"facts": {}, "test_images": None, "test_labels": 1, "peak_mb": lambda path: 60.0}
    space["answers_of"] = lambda path, images: judged.append(path) or int(path.read_text())
    model = tmp_path / "my_model.onnx"
    for text, right in (("0", False), ("0", False), ("1", True)):
        if not judged or text != model.read_text():
            model.write_text(text)
            os.utime(model, ns=(len(judged), len(judged)))
        assert ch15.facts_of(model) == (right, 60.0)
    assert len(judged) == 2, "once for each version of the file"
