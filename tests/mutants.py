"""Does a check reject every answer that is nearly right? Each solution is changed in one place, or
spoilt in one of the general ways, and its own check must say so.

    .venv/bin/python tests/mutants.py                  every exercise, two at a time; a table
    .venv/bin/python tests/mutants.py 03.C 05.B        these two
    .venv/bin/python tests/mutants.py --sample 6       six mutants of each, drawn by today's date

A mutant that passes is a survivor. It is printed with its line and its change, and the exit status
is 1, unless `equivalents.toml` says in words why the changed answer is a right one. `make soak`
runs all of them, `make test` a sample (test_3_mutants.py).
"""

import argparse
import ast
import contextlib
import datetime
import functools
import inspect
import io
import random
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import spoilt
import torch
from conftest import CHAPTERS, execute, sow

from course_utils import exercises
from course_utils.course import shape

SECONDS = 20  # a mutant that loops for ever is stopped after these, and that is a rejection
KNOWN = Path(__file__).with_name("equivalents.toml")


@dataclass(frozen=True)
class Mutant:
    """`name` is "line 3: a + b → a - b" or "returns NaN"; `make()` gives the wrong answer."""

    exercise: str
    name: str
    make: Callable[[], object]
    touched: list = field(default_factory=list, compare=False)  # not empty: it differed somewhere


# --- One change in the source -----------------------------------------------------------------

_OTHER = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
_COMPARED = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
_PAIRS = (
    "min max, any all, sum max, mean sum, mean median, floor ceil, round ceil, round floor, "
    "argmin argmax, zeros ones, softmax log_softmax, sorted reversed, geomspace linspace, "
    "float64 float32, float32 float16, int64 int32, int32 int16, uint8 int8, tril triu, "
    "repeat_interleave repeat, append insert, permutations combinations, left right, "
    "batchmean mean, rows columns, std var, sqrt square, cos sin"
)
_TYPES = ("float", "list", "tuple")  # right answers come in any of these
_SWAPPED: dict[str, list[str]] = {}
for _a, _b in (pair.split() for pair in _PAIRS.split(", ")):
    _SWAPPED.setdefault(_a, []).append(_b)
    _SWAPPED.setdefault(_b, []).append(_a)


def _alternatives(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in this node's place: each differs from it by one operator."""

    def changed(**fields: object) -> ast.AST:
        return ast.copy_location(type(node)(**(dict(ast.iter_fields(node)) | fields)), node)

    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in _OTHER:
        yield changed(op=_OTHER[type(node.op)]())
    if isinstance(node, ast.BinOp):
        yield node.left
        yield node.right
        if not isinstance(node.op, ast.Add | ast.Mult | ast.BitAnd | ast.BitOr):
            yield changed(left=node.right, right=node.left)
    elif isinstance(node, ast.BoolOp):
        yield from node.values
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Compare):
        for other in _COMPARED[type(node.ops[0])]:
            yield changed(ops=[other(), *node.ops[1:]])
    elif isinstance(node, ast.Constant):
        yield from (ast.copy_location(ast.Constant(v), node) for v in _values(node.value))
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    elif isinstance(node, ast.If | ast.While):
        yield changed(test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.comprehension) and node.ifs:
        yield changed(ifs=[])
    elif isinstance(node, ast.Slice):
        yield from (changed(**{k: None}) for k in ("lower", "upper", "step") if getattr(node, k))
    elif isinstance(node, ast.Name) and node.id in _SWAPPED:
        yield from (changed(id=other) for other in _SWAPPED[node.id])
    elif isinstance(node, ast.Attribute) and node.attr in _SWAPPED:
        yield from (changed(attr=other) for other in _SWAPPED[node.attr])
    elif isinstance(node, ast.Call):
        yield from _calls(node, changed)
    if isinstance(
        node, ast.Assign | ast.AugAssign | ast.Expr | ast.Raise | ast.Break | ast.Continue
    ):
        yield ast.copy_location(ast.Pass(), node)


def _calls(node: ast.Call, changed: Callable) -> Iterator[ast.AST]:
    """A call without one of its arguments, with two of them swapped, or not made at all."""
    for i in (i for i, k in enumerate(node.keywords) if k.arg != "strict"):
        yield changed(keywords=node.keywords[:i] + node.keywords[i + 1 :])
    if len(node.args) == 2:
        yield changed(args=node.args[::-1])
        yield changed(args=node.args[:1])
    if isinstance(node.func, ast.Attribute):  # x.detach() becomes x
        yield node.func.value
    elif len(node.args) == 1 and ast.unparse(node.func) not in _TYPES:  # sorted(x) becomes x
        yield node.args[0]


def _values(value: object) -> Iterator[object]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from {value + 1, value - 1, -value, 0} - {value}
    elif isinstance(value, float):
        yield from {value * 2, value / 2, 0.0} - {value}
    elif isinstance(value, str) and value in _SWAPPED:
        yield from _SWAPPED[value]


def changes(source: str) -> Iterator[tuple[str, str]]:
    """Every (name, changed source) of a solution; no two of them are the same program."""
    tree = ast.parse(source)
    seen, names = {ast.unparse(tree)}, {}
    for parent in list(ast.walk(tree)):
        for name, value in ast.iter_fields(parent):
            places = value if isinstance(value, list) else [value]
            for i, old in enumerate(places):
                if not isinstance(old, ast.AST) or getattr(parent, "arg", "") == "strict":
                    continue
                for new in _alternatives(old):
                    changed = [*places[:i], new, *places[i + 1 :]]
                    setattr(parent, name, changed if isinstance(value, list) else new)
                    try:
                        text = ast.unparse(tree)
                        ast.parse(text)
                    except (SyntaxError, AttributeError, ValueError):
                        text = None
                    finally:
                        setattr(parent, name, value)
                    if text is None or text in seen:
                        continue
                    seen.add(text)
                    line = getattr(old, "lineno", getattr(parent, "lineno", 0))
                    said = f"line {line}: {_short(old)} → {_short(new)}"
                    names[said] = names.get(said, 0) + 1
                    yield said + (f" (#{names[said]})" if names[said] > 1 else ""), text


def _short(node: ast.AST) -> str:
    if isinstance(node, ast.comprehension):
        node = node.ifs[0] if node.ifs else ast.Constant(True)
    if isinstance(node, ast.Slice):
        return ":".join(ast.unparse(p) if p else "" for p in (node.lower, node.upper))
    return ast.unparse(node).splitlines()[0]


# --- All of them ------------------------------------------------------------------------------


def mutants(exercise: shape.Exercise) -> list[Mutant]:
    """Every changed source first, then the general wrong answers; their names differ."""

    def run(source: str) -> object:
        return eval(exercise.answer, execute(source))

    found = [
        Mutant(exercise.id, name, functools.partial(run, text))
        for name, text in changes(exercise.solution)
    ]
    answer = run(exercise.solution)
    methods = [None]
    if inspect.isclass(answer):
        methods = [n for n, v in vars(answer).items() if inspect.isroutine(v) and n != "__init__"]
    for method in methods:
        for name, spoil in spoilt.general(getattr(answer, method) if method else answer):
            touched = []
            make = functools.partial(
                lambda m, s, t: spoilt.in_class(run(exercise.solution), m, lambda f: s(f, t)),
                method,
                spoil,
                touched,
            )
            said = f"{method} {name}" if method else name
            found.append(Mutant(exercise.id, said, make, touched))
    return found


def survives(mutant: Mutant, seed: int = 0) -> bool:
    """Whether the check takes the mutant for a right answer."""
    sow(seed)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            answer = mutant.make()
        except Exception:
            return False  # it can't even be defined
        return (
            exercises.check(mutant.exercise, answer, seed=seed, seconds=SECONDS).status == "passed"
        )


@functools.cache
def equivalents() -> dict[tuple[str, str], str]:
    """(exercise, name) → why this answer is right all the same."""
    entries = tomllib.loads(KNOWN.read_text("utf-8"))["equivalent"]
    return {(e["exercise"], name): e["reason"] for e in entries for name in e["changes"]}


@dataclass
class Score:
    """Of one exercise. `survivors` passed and have no reason; `equal` passed and have one."""

    exercise: str
    made: int
    equal: list[str] = field(default_factory=list)
    survivors: list[str] = field(default_factory=list)

    @property
    def row(self) -> str:
        rejected = self.made - len(self.equal) - len(self.survivors)
        return f"{self.exercise}  {self.made:5} {rejected:9} {len(self.equal):11}"


def everything() -> list[shape.Exercise]:
    return [e for c in CHAPTERS for e in shape.exercises(c)]


def judge(exercise_id: str, sample: int | None = None, seed: int = 0) -> Score:
    """Try all mutants of an exercise, or as many as `sample`, drawn by the date."""
    torch.set_num_threads(1)
    exercise = next(e for e in everything() if e.id == exercise_id)
    every = mutants(exercise)
    if sample is not None and sample < len(every):
        every = random.Random(f"{datetime.date.today()} {exercise_id}").sample(every, sample)
    score = Score(exercise_id, len(every))
    for mutant in every:
        passed = survives(mutant, seed)
        if passed and not mutant.touched and "line" not in mutant.name:
            score.made -= 1  # the same as the solution wherever it was asked
        elif passed:
            known = (exercise_id, mutant.name) in equivalents()
            (score.equal if known else score.survivors).append(mutant.name)
    return score


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("only", nargs="*", help="exercises, such as 02.C; all by default")
    parser.add_argument("--sample", type=int, help="so many of each, drawn by today's date")
    parser.add_argument("--seed", type=int, default=0, help="of the checks' draws")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    wanted = given.only or [e.id for e in everything()]
    print("exercise made  rejected  equivalent")
    with ProcessPoolExecutor(given.jobs) as pool:
        todo = [pool.submit(judge, e, given.sample, given.seed) for e in wanted]
        scores = []
        for future in todo:
            scores.append(future.result())
            print(scores[-1].row, flush=True)
            for name in scores[-1].survivors:
                print(f"      survived: {name}", flush=True)
    made = sum(s.made for s in scores)
    equal, survivors = (
        sum(len(x) for x in (getattr(s, k) for s in scores)) for k in ("equal", "survivors")
    )
    print(f"all   {made:6} {made - equal - survivors:9} {equal:11}")
    print(f"{survivors} survivors: {1 - survivors / max(made - equal, 1):.1%} rejected")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
