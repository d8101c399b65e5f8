"""Can a claim come out both ways? Planted data go through the chapter's own lines to its verdict.

A claim's `can_hold` and `can_fail` give names of the chapter their values, drawn by the functions
below: `layouts=across(1.2)`. Of the chapter's code only those lines are run that
make the verdict's argument from these names; what stands before them (a measurement, a training)
is cut off, because its result is given. Each is tried twenty times with new draws, and eighteen
times the verdict must be the one that was planted: that is the design's power, too.

    .venv/bin/python tests/planted.py 02.channels_last_is_faster     what is run, and what comes out
"""

import ast
import builtins
import collections
import contextlib
import functools
import io
import itertools
import os
import signal
import symtable
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from conftest import IMPORTED

from course_utils import claims, data, machine, measure, models, training
from course_utils.course import build
from course_utils.course.chapters import chapters
from course_utils.measure import stats

TRIES, NEEDED = 20, 18
SECONDS = 20  # for one judgement, on a busy machine
_DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
rng = np.random.default_rng(0)
_ARM = measure.Arm(lambda: None, "planted")


# --- What can be planted ----------------------------------------------------------------------


def across(ratio: float, spread: float = 0.04, processes: int = 12) -> measure.Comparison:
    """A comparison over fresh processes whose true speed-up is `ratio`; each process is off by
    `spread`, as they are on the machine that this course is written on.
    """
    return _comparison(ratio * np.exp(rng.normal(0, spread, processes)), processes)


def within(ratio: float, spread: float = 0.05, rounds: int = 100) -> measure.Comparison:
    """A comparison within one process; each round is off by `spread`."""
    return _comparison(ratio * np.exp(rng.normal(0, spread, rounds)), 1)


def _comparison(ratios: np.ndarray, processes: int) -> measure.Comparison:
    found = stats.speedup(ratios.tolist(), processes=processes > 1)
    return measure.Comparison(
        ratio=found.value,
        low=found.low,
        high=found.high,
        verdict=stats.decide(found.low, found.high),
        baseline=_ARM,
        candidate=_ARM,
        baseline_seconds=found.value,
        candidate_seconds=1.0,
        rounds=len(ratios),
        threads=1,
        clock="wall",
        ratios=tuple(ratios.tolist()),
        processes=processes,
    )


def around(value: float, spread: float, n: int = 5) -> list[float]:
    """One number a seed, a network or a round: normal around `value`."""
    return rng.normal(value, spread, n).tolist()


def times(seconds: float, spread: float = 0.05, n: int = 12) -> list[float]:
    """Durations, off by a share of `spread` each."""
    return (seconds * np.exp(rng.normal(0, spread, n))).tolist()


def interval(value: float, half: float, unit: str = "") -> measure.Interval:
    """An interval of this half width, whose middle is drawn as its width says."""
    middle = float(rng.normal(value, half / 1.96))
    return measure.Interval(middle, middle - half, middle + half, unit)


def images(before: float, after: float, n: int = 1000) -> tuple[list[bool], list[bool]]:
    """Which of n images two networks get right, with these accuracies in percent; they err on the
    same images as far as they can, and half as often on others.
    """
    hard = rng.random(n) * 100
    twin = np.where(rng.random(n) < 0.1, rng.random(n) * 100, hard)
    return (hard < before).tolist(), (twin < after).tolist()


def both(first: str, second: str, before: float, after: float, n: int = 1000) -> dict:
    """`images` as two tensors of these names: `**both("before", "after", 88, 87)`."""
    return dict(zip((first, second), map(torch.tensor, images(before, after, n)), strict=True))


def instead(**functions: Callable) -> SimpleNamespace:
    """The package's `measure` with some of its functions exchanged: `measure=instead(across=…)`."""
    return SimpleNamespace(**(vars(measure) | functions))


def file(size: float) -> SimpleNamespace:
    """A file of so many bytes, as pathlib would show it."""
    return SimpleNamespace(stat=lambda: SimpleNamespace(st_size=size), unlink=lambda **_: None)


# --- The chapter's own lines ------------------------------------------------------------------


_IN_PLACE = ("append", "extend", "update", "add", "setdefault")


def _defines(node: ast.stmt) -> set[str]:
    """Names that a statement sets, brings in, or changes in place."""
    table = symtable.symtable(ast.unparse(node), "cell", "exec")
    names = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
    for sub in [] if isinstance(node, _DEFINITIONS) else ast.walk(node):
        if isinstance(sub, ast.Subscript | ast.Attribute) and isinstance(sub.ctx, ast.Store):
            names.add(_root(sub))
        elif isinstance(sub, ast.Call) and getattr(sub.func, "attr", "") in _IN_PLACE:
            names.add(_root(sub.func))
    return names


def _made_anew(node: ast.stmt) -> set[str]:
    """Names to which a statement gives a value whatever they were before."""
    targets = node.targets if isinstance(node, ast.Assign) else []
    return {t.id for t in targets if isinstance(t, ast.Name)}


def _root(node: ast.AST) -> str:
    while isinstance(node, ast.Subscript | ast.Attribute | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return getattr(node, "id", "")


def _reads(node: ast.AST) -> set[str]:
    """Names of the chapter that a statement needs: not its own loop's, not a function's own."""

    def needed(table: symtable.SymbolTable, top: bool) -> Iterator[str]:
        for s in table.get_symbols():
            if s.is_referenced() if top else s.is_global():
                yield s.get_name()
        for child in table.get_children():
            yield from needed(child, False)

    loops = {
        n.id
        for s in ast.walk(node)
        if isinstance(s, ast.For)
        for n in ast.walk(s.target)
        if isinstance(n, ast.Name)
    }
    return set(needed(symtable.symtable(ast.unparse(node), "cell", "exec"), True)) - loops


@functools.cache
def _statements(number: str) -> list[ast.stmt]:
    """A chapter's statements in order; exercises are left out."""
    found = []
    for cell in build.cells(chapters([number])[0]):
        kind = {"exercise", "solution", "wrong"} & set(build.tags(cell))
        if cell.cell_type == "code" and not kind and not cell.source.startswith("%"):
            found += ast.parse(cell.source).body
    return found


def _verdict_calls(node: ast.AST, claim_id: str) -> list[ast.Call]:
    calls = [s for s in ast.walk(node) if isinstance(s, ast.Call)]
    calls = [c for c in calls if ast.unparse(c.func) == "claims.verdict"]
    return [c for c in calls if ast.unparse(c.args[0]).strip("'") == claim_id]


def lines(claim_id: str, given: set[str]) -> list[tuple[list[ast.stmt], ast.Call]]:
    """For each place where the chapter judges the claim: the statements that lead from the given
    names to the verdict, and the call itself. Raises LookupError where there is none.
    """
    statements, found = _statements(claim_id.split(".")[0]), []
    judged = [(i, c) for i, s in enumerate(statements) for c in _verdict_calls(s, claim_id)]
    for last, call in judged:
        there = given | set(IMPORTED) | set(_MODULES) | set(dir(builtins))
        needed, kept = _reads(ast.Expr(call.args[1])) - there, []
        for earlier in reversed(statements[:last]):
            if _defines(earlier) & needed:
                kept.append(earlier)
                needed = (needed - _made_anew(earlier)) | (_reads(earlier) - there)
        found.append((kept[::-1], call))
    if not found:
        raise LookupError(f"no cell of the chapter judges {claim_id}")
    return found


def judge(claim_id: str, planted: str, seed: int = 0) -> str:
    """What the chapter says of planted data: the verdict's status."""
    global rng
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    tools = {n: v for n, v in globals().items() if callable(v) and not n.startswith("_")}
    tools["rng"] = rng
    space = IMPORTED | _MODULES
    given = eval(f"dict({planted})", space | tools)
    space |= given
    places = [
        (kept, call, set().union(*map(_reads, [*kept, ast.Expr(call)])))
        for kept, call in lines(claim_id, set(given))
    ]
    if idle := set(given) - set().union(*(reads for *_, reads in places)):
        raise LookupError(f"{claim_id}: no line that leads to the verdict reads {sorted(idle)}")
    for kept, call in ((k, c) for k, c, reads in places if reads & set(given)):
        block = ast.Module([*kept, ast.Expr(call)], [])
        space["claims"] = SimpleNamespace(verdict=_Judge(), Interval=measure.Interval)
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            _at_most(SECONDS, claim_id),
        ):
            exec(compile(ast.fix_missing_locations(block), f"<{claim_id}>", "exec"), space)
        if not isinstance(space["claims"].verdict.said.get(claim_id), machine.Skip):
            return _status(claim_id, space["claims"].verdict.said[claim_id])
    raise LookupError(f"every place that judges {claim_id} skipped it")


@contextlib.contextmanager
def _at_most(seconds: float, claim_id: str) -> Iterator[None]:
    """Planted data are judged in no time: what takes longer measures or trains."""

    def late(*_: object) -> None:
        raise TimeoutError(
            f"{claim_id}: a measurement or a training is not cut off by what is given"
        )

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class _Judge:
    """Stands for claims.verdict, keeps what was measured, and writes to no ledger."""

    def __init__(self) -> None:
        self.said: dict[str, object] = {}

    def __call__(self, claim_id: str, measured: object) -> object:
        self.said[claim_id] = measured
        return measured


def _status(claim_id: str, measured: object) -> str:
    _, low, high = claims.numbers(claim_id, measured)
    return claims.status(claims.find(claim_id).band, low, high)


_MODULES = {
    "claims": claims,
    "data": data,
    "machine": machine,
    "measure": measure,
    "models": models,
    "training": training,
    "SimpleNamespace": SimpleNamespace,
    "Counter": collections.Counter,
    "contextlib": contextlib,
    "itertools": itertools,
    "Path": Path,
    "os": os,
    "sys": sys,
    "SMOKE": False,
    "FULL": False,
    "plots": SimpleNamespace(**dict.fromkeys(("bars", "intervals", "seeds"), lambda *a, **k: None)),
    "exercises": SimpleNamespace(reveal=lambda *a, **k: None),
    "display": lambda *a, **k: None,
}


def share(claim_id: str, planted: str, due: str) -> int:
    """How many of the tries end in the verdict that is due."""
    return sum(judge(claim_id, planted, seed) == due for seed in range(TRIES))


if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        claim = claims.find(wanted)
        for planted, due in ((claim.can_hold, claims.HOLDS), (claim.can_fail, claims.FAILS)):
            given = eval(f"dict({planted})", IMPORTED | _MODULES | globals())
            for kept, call in lines(wanted, set(given)):
                print(*(ast.unparse(s) for s in [*kept, call]), sep="\n")
            print(f"# {planted}: {due!r} in {share(wanted, planted, due)} of {TRIES}\n")
