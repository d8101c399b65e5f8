"""Verdicts and checks: what they say, and what they survive."""

import json
import math
import sys
import threading
import time

import numpy as np
import pytest
import torch

from course_utils import claims, exercises, machine, measure, probe, techniques
from course_utils.checks.clock import Clock, told_to
from course_utils.exercises import Probe, Wrong, check


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    path = tmp_path / "ledger.jsonl"
    monkeypatch.setenv("COURSE_LEDGER", str(path))
    return path


@pytest.fixture
def toml(tmp_path, monkeypatch):
    def write(text: str) -> None:
        folder = tmp_path / "claims"
        folder.mkdir(exist_ok=True)
        (folder / "99.toml").write_text(text)
        monkeypatch.setattr(claims, "registry", lambda: claims_of(folder))

    claims_of = claims.registry.__wrapped__
    return write


GOOD = (
    'statement = "It is twice as fast."\nsource = "somebody, 2020"\ncondition = "here"\nband ='
    ' [1.8, inf]\nunit = "x"\n'
)


def test_a_clock_of_ours_leaves_what_the_answer_has_set():
    """A notebook's names are the answer's globals: what it keeps there is not the check's."""
    space = {"perf_counter": time.perf_counter}
    exec("def answer():\n    global kept\n    kept = perf_counter()", space)
    clock = Clock()
    clock.now = 5.0
    with told_to(space["answer"], clock):
        space["answer"]()
    assert 5 < space["kept"] < 5.001
    assert space["perf_counter"] is time.perf_counter


@pytest.mark.parametrize(
    ("low", "high", "status"),
    [
        (1.9, 2.1, claims.HOLDS),
        (1.8, 1.8, claims.HOLDS),
        (1.0, 1.7, claims.FAILS),
        (1.7, 1.9, claims.OPEN),
        (0.1, 99.0, claims.OPEN),
    ],
)
def test_a_verdict_is_where_the_interval_lies(toml, ledger, low, high, status):
    toml("[twice]\n" + GOOD)
    result = claims.verdict("99.twice", measure.Interval((low + high) / 2, low, high))
    assert result.status == status
    assert status in repr(result)
    assert status in result._repr_html_()
    event = json.loads(ledger.read_text())
    assert event["claim"] == "99.twice"
    assert (event["low"], event["high"], event["verdict"]) == (low, high, status)


def test_a_band_is_closed_on_both_sides_and_symmetric_under_negation():
    for low, high in ((0.9, 1.1), (1.1, 1.1), (0.9, 0.9)):
        assert (
            claims.status((0.9, 1.1), low, high)
            == claims.HOLDS
            == claims.status((-1.1, -0.9), -high, -low)
        )
    assert (
        claims.status((0.9, 1.1), 1.1001, 2)
        == claims.FAILS
        == claims.status((-1.1, -0.9), -2, -1.1001)
    )


def test_a_number_beyond_an_edge_is_not_rounded_onto_it(toml, ledger):
    toml("[twice]\n" + GOOD)
    assert claims.verdict("99.twice", 1.79731).measured() == "1.7973 x"
    assert claims.verdict("99.twice", 1.23456).measured() == "1.23 x"
    assert (
        claims.verdict("99.twice", measure.Interval(1.7, 1.65432, 1.80041)).measured()
        == "1.7 x [1.65, 1.8004]"
    )


def test_a_skip_is_not_testable_and_keeps_its_reason(toml, ledger):
    toml("[twice]\nstand_in = 'a toy'\n" + GOOD)
    result = claims.verdict("99.twice", machine.Skip("gpu", "there is none."))
    assert result.status == claims.UNTESTED
    assert "there is none" in result.measured()
    assert "stand-in (a toy)" in result.heading()
    assert json.loads(ledger.read_text())["value"] is None


def test_unknown_claims_broken_entries_and_nan(toml):
    toml("[twice]\n" + GOOD)
    with pytest.raises(claims.ClaimError, match=r"did you mean '99.twice'"):
        claims.verdict("99.twise", 2.0)
    with pytest.raises(ValueError, match="nan"):
        claims.verdict("99.twice", math.nan)
    with pytest.raises(TypeError, match="a str"):
        claims.verdict("99.twice", "two")
    toml("[twice]\n" + GOOD.replace("source", "sauce"))
    with pytest.raises(claims.ClaimError, match="sauce"):
        claims.find("99.twice")
    toml('[twice]\nstatement = "x"\n')
    with pytest.raises(claims.ClaimError, match="band"):
        claims.find("99.twice")


def test_a_ledger_that_cannot_be_written_does_not_stop_a_chapter(toml, monkeypatch):
    toml("[twice]\n" + GOOD)
    monkeypatch.setenv("COURSE_LEDGER", "/proc/none/ledger.jsonl")
    assert claims.verdict("99.twice", 2.0).status == claims.HOLDS


@pytest.fixture
def double(monkeypatch, ledger):
    """An exercise of the tests' own: return twice the list."""

    def task(answer: Probe, rng: np.random.Generator) -> None:
        """Well done."""
        for n in (0, 3):
            x = rng.integers(0, 9, n).tolist()
            if answer(x) != [2 * v for v in x]:
                raise Wrong(f"for {x} twice each number was expected.")

    monkeypatch.setattr(exercises, "registry", lambda: {"99.A": task})


def test_the_three_answers(double, ledger):
    def stub(x): ...

    def half_done(x):
        y = ...
        return y

    assert check("99.A", ...).status == "pending"
    assert check("99.A", stub).status == "pending"
    assert check("99.A", half_done).status == "pending"
    assert check("99.A", lambda x: [2 * v for v in x]).status == "passed"
    wrong = check("99.A", lambda x: x)
    assert (wrong.status, "twice each number" in wrong.message) == ("wrong", True)
    assert "wrong" not in repr(check("99.A", ...))
    assert [json.loads(line)["status"] for line in ledger.read_text().splitlines()][-3:] == [
        "passed",
        "wrong",
        "pending",
    ]


def test_an_ellipsis_in_an_index_is_no_stub(double):
    assert check("99.A", lambda x: np.asarray(x)[..., :].__mul__(2).tolist()).status == "passed"


def test_what_an_answer_may_do_without_stopping_the_notebook(double):
    def raises(x):
        raise KeyError("lost")

    def exits(x):
        sys.exit(3)

    def mutates(x):
        x.append(1)
        return []

    assert "KeyError: 'lost'" in check("99.A", raises).message
    assert "ended the program" in check("99.A", exits).message
    assert "changed its input" in check("99.A", mutates).message
    assert "int" in check("99.A", 3).message
    assert check("99.A", lambda x: None).status == "wrong"
    assert "TypeError" in check("99.A", lambda: 1).message


@pytest.mark.parametrize("swallow", [False, True], ids=["plain", "except Exception"])
def test_an_answer_that_never_ends_is_stopped(double, swallow):
    ticks = []

    def endless(x):
        while True:
            try:
                ticks.append(1)
                time.sleep(0.001)
            except Exception:
                if not swallow:
                    raise

    result = check("99.A", endless, seconds=0.3)
    assert (result.status, "was stopped" in result.message) == ("wrong", True)
    assert "in the background" not in result.message
    count = len(ticks)
    time.sleep(0.05)
    assert len(ticks) == count, "the answer's thread goes on"


def waits_in_c(x, gate):
    gate.acquire()  # no exception of ours arrives there


def catches_everything(x, gate):
    while gate.locked():
        try:
            time.sleep(0.001)
        except BaseException:
            continue


@pytest.mark.parametrize("answer", [waits_in_c, catches_everything])
def test_an_answer_that_cannot_be_stopped_is_said_to_run_still(double, answer):
    before, gate = set(threading.enumerate()), threading.Lock()
    gate.acquire()  # held until everything has been said
    result = check("99.A", lambda x: answer(x, gate), seconds=0.2)
    left = set(threading.enumerate()) - before
    assert result.status == "wrong"
    assert "could not be stopped: it is still running in the background" in result.message
    assert "Restart the kernel" in result.message
    assert len(left) == 1, "and it is"
    gate.release()
    left.pop().join(10)


def test_what_an_answer_prints_is_shown_before_the_result_right_or_wrong(double, capsys):
    def prints(x):
        print("x is", x)
        print("to the error stream", file=sys.stderr)
        return [2 * v for v in x]

    assert check("99.A", prints).status == "passed"
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[:3] == ["Your code printed:", "x is []", "to the error stream"]
    assert lines[3].startswith("x is [")
    assert err == ""
    assert check("99.A", lambda x: print("wrong", x)).status == "wrong"
    assert capsys.readouterr().out == "Your code printed:\nwrong []\n"
    assert check("99.A", lambda x: [2 * v for v in x]).status == "passed"
    assert capsys.readouterr().out == "", "nothing printed, nothing shown"


@pytest.mark.parametrize(
    ("text", "lines", "characters"),
    [("a\n" * 40, 40, None), ("a\n" * 41, 41, None), ("b" * 5000, 2, 4000), ("c" * 4000, 1, 4000)],
)
def test_a_long_print_is_cut_after_40_lines_or_4000_characters(
    double, capsys, text, lines, characters
):
    def prints(x):
        sys.stdout.write(text)
        raise KeyError

    assert check("99.A", prints).status == "wrong"
    shown = capsys.readouterr().out.splitlines()[1:]
    assert len(shown) == lines
    assert (shown[-1] == "…") == (text not in ("a\n" * 40, "c" * 4000))
    assert characters is None or len(shown[0]) == characters


def test_an_endless_print_is_stopped_and_its_beginning_shown(double, capsys):
    def endless(x):
        while True:
            print("again")

    assert "was stopped" in check("99.A", endless, seconds=0.3).message
    assert capsys.readouterr().out.splitlines() == ["Your code printed:", *["again"] * 40, "…"]


def test_what_another_thread_prints_meanwhile_is_not_held_back(double, capsys):
    def busy(x):
        other = threading.Thread(target=print, args=("from elsewhere",))
        other.start()
        other.join()
        return [2 * v for v in x]

    assert check("99.A", busy).status == "passed"
    out = capsys.readouterr().out
    assert "from elsewhere" in out
    assert "Your code printed" not in out


def test_a_seed_draws_the_same_again(monkeypatch, ledger):
    drawn = []
    monkeypatch.setattr(
        exercises,
        "registry",
        lambda: {"99.A": lambda answer, rng: drawn.append((rng.random(), float(torch.rand(1))))},
    )
    for seed in (1, 1, 2):
        check("99.A", lambda: 1, seed=seed)
    assert drawn[0] == drawn[1]
    assert drawn[1][0] != drawn[2][0]
    assert drawn[1][1] != drawn[2][1]


def test_check_leaves_the_random_state_alone_and_draws_anew(monkeypatch, ledger):
    drawn = []
    monkeypatch.setattr(
        exercises,
        "registry",
        lambda: {"99.A": lambda answer, rng: (drawn.append(rng.random()), torch.rand(3))},
    )
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    check("99.A", lambda: 1)
    check("99.A", lambda: 1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert drawn[0] != drawn[1]


def test_an_unknown_exercise_names_the_nearest(double):
    with pytest.raises(exercises.UnknownExercise, match=r"did you mean '99.A'"):
        check("99.B", ...)


def test_same_knows_tensors_arrays_and_modules():
    a = torch.tensor([1.0, float("nan")])
    assert probe.same({"x": [a, np.array([1.0])]}, {"x": [a.clone(), np.array([1.0])]})
    assert not probe.same(a, a + 1)
    assert not probe.same([1], [1, 2])
    net = torch.nn.Linear(2, 2)
    import copy

    other = copy.deepcopy(net)
    assert probe.same(net, other)
    other.weight.data += 1
    assert not probe.same(net, other)


def test_fails_shows_the_error_and_notices_when_there_is_none(capsys):
    with exercises.fails(ZeroDivisionError):
        1 / 0
    assert capsys.readouterr().out == "ZeroDivisionError: division by zero\n"
    with pytest.raises(AssertionError, match="today it runs"), exercises.fails():
        pass


def test_predict_and_reveal(capsys):
    exercises.predict("q", ...)
    exercises.reveal("q", 1.234, "x")
    exercises.predict("q", 2)
    exercises.reveal("q", 1.234, "x")
    out = capsys.readouterr().out
    assert "you did not predict" in out
    assert "measured 1.23 x; you predicted 2 x" in out


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio of two colours, #rrggbb."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        line = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * line[0] + 0.7152 * line[1] + 0.0722 * line[2]

    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def test_labels_are_readable_on_a_light_page_and_on_a_dark_one():
    assert round(contrast("#000000", "#ffffff")) == 21
    assert contrast("#cccccc", "#ffffff") < 2
    for colour in {*claims._COLOURS.values(), *exercises._COLOURS.values()}:
        assert contrast(colour, "#ffffff") >= 4.5, colour
        assert "color:#fff" in claims.badge(colour)
    for verdict, fill in claims.FILLS.items():
        assert contrast(fill, "#000000") >= 4.5, verdict
        assert "color:#000" in techniques._fill(verdict)
