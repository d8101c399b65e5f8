"""Predictions and self-checking exercises.

`check("05.B", answer)` runs the reader's own object against properties and independent results,
never against a stored solution. An answer may raise, exit, print, change its input or loop for
ever: the notebook goes on.
"""

import ast
import contextlib
import difflib
import functools
import html
import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from course_utils import aside, claims, ledger
from course_utils.probe import Probe, Wrong

_predictions: dict[str, object] = {}
_COLOURS = {"passed": "#1b7837", "wrong": "#b2182b", "pending": "#666666"}


class UnknownExercise(KeyError):
    """No exercise of this id; the message names the nearest one."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Result:
    """`status` is "pending", "passed" or "wrong"; `message` says what was seen.

    >>> Result("99.A", "wrong", "for 0 the answer is 1.")
    Exercise 99.A: not yet right: for 0 the answer is 1.
    """

    id: str
    status: str
    message: str

    def __repr__(self) -> str:
        return f"Exercise {self.id}: {_LABELS[self.status]}{self.message}"

    def _repr_html_(self) -> str:
        colour, label = _COLOURS[self.status], _LABELS[self.status].rstrip(": ")
        text = html.escape(self.message).replace("\n", "<br>")
        return (
            f"<div style='border-left:4px solid {colour};padding:2px 12px'><b"
            f" style='{claims.badge(colour)}'>Exercise {self.id}: {label}</b> {text}</div>"
        )


_LATE = {
    aside.STOPPED: (
        "your code was still running after {seconds:g} s and was stopped. Does a loop ever end?"
    ),
    aside.RUNNING: (
        "your code was still running after {seconds:g} s and could not be stopped: it is still"
        " running in the background. Restart the kernel to end it. Does it sleep, or catch every"
        " exception in a loop?"
    ),
}
_LABELS = {"passed": "passed. ", "wrong": "not yet right: ", "pending": "not attempted yet. "}


def check(
    exercise_id: str, answer: object, *, seconds: float = 20.0, seed: int | None = None
) -> Result:
    """Check a reader's answer. Never raises for what the answer does; raises UnknownExercise for an
    unknown id.

    Random inputs are drawn now, the same ones again for the same `seed`. After `seconds` an answer
    that loops in Python is stopped; one that cannot be stopped is said to be running still. What
    the answer printed is shown when the check is over.

    >>> check("01.A", ...)
    Exercise 01.A: not attempted yet. Replace the ... and run this cell again.
    """
    function = _find(exercise_id)
    if is_pending(answer):
        return _report(exercise_id, "pending", "Replace the ... and run this cell again.")

    def work() -> None:
        if seed is not None:
            torch.manual_seed(seed)  # some checks draw with torch
        function(Probe(answer), np.random.default_rng(seed))

    state = torch.random.get_rng_state()
    try:
        ending, error = aside.run(work, seconds)
    finally:
        torch.random.set_rng_state(state)
    if ending != aside.ENDED:
        return _report(exercise_id, "wrong", _LATE[ending].format(seconds=seconds))
    if error is None:
        return _report(exercise_id, "passed", inspect.getdoc(function) or "")
    if isinstance(error, Wrong):
        return _report(exercise_id, "wrong", str(error))
    # The answer had a shape that the check did not foresee (a string where a number was due, say).
    return _report(
        exercise_id,
        "wrong",
        f"what your code returned could not be used ({type(error).__name__}: {error}).",
    )


def predict(question: str, guess: object) -> None:
    """Keep the reader's guess until `reveal`; `...` means none, and nothing is blocked by it.

    >>> predict("how much faster?", 2)
    Noted: 2
    """
    _predictions.pop(question, None)
    if guess is ...:
        print("No prediction yet. A wrong one teaches more than none.")
    else:
        _predictions[question] = guess
        print(f"Noted: {guess}")


def reveal(question: str, measured: float, unit: str = "") -> None:
    """Show the measurement beside what the reader predicted.

    >>> predict("how much faster?", 2)
    Noted: 2
    >>> reveal("how much faster?", 1.234, "x")
    measured 1.23 x; you predicted 2 x
    """
    guess = _predictions.get(question)
    said = "you did not predict" if guess is None else f"you predicted {guess} {unit}".rstrip()
    print(f"measured {measured:.3g} {unit}".rstrip() + f"; {said}")
    if guess is not None:
        plain = float(guess) if isinstance(guess, int | float) else str(guess)
        ledger.record(
            "prediction", question=question, guess=plain, measured=float(measured), unit=unit
        )


@contextlib.contextmanager
def fails(kind: type[Exception] = Exception) -> Iterator[None]:
    """Run a circulating mistake live and show the error it ends in, without a traceback.

    Should it no longer fail, AssertionError says so: then the text around it is out of date.

    >>> with fails(ZeroDivisionError):
    ...     1 / 0
    ZeroDivisionError: division by zero
    """
    try:
        yield
    except kind as error:
        text = str(error)  # some errors go on with a page of internals
        print(
            f"{type(error).__name__}:"
            f" {text if len(text) <= 320 else text[:320].rsplit(' ', 1)[0] + ' …'}"
        )
    else:
        raise AssertionError(
            f"this was expected to end in {kind.__name__}, and today it runs: the text must change."
        )


def exercise(exercise_id: str) -> Callable:
    """Register a check in course_utils/checks/. Its docstring is shown when the answer passes.

    >>> @exercise("99.A")
    ... def double(answer, rng):
    ...     '''Right: twice.'''
    ...     n = int(rng.integers(1, 9))
    ...     if answer(n) != 2 * n:
    ...         raise Wrong(f"twice {n} is {2 * n}.")
    >>> double.exercise_id
    '99.A'
    """

    def register(function: Callable[[Probe, np.random.Generator], None]) -> Callable:
        function.exercise_id = exercise_id
        return function

    return register


@functools.cache
def registry() -> dict[str, Callable]:
    """All checks by id, from the modules of course_utils.checks.

    >>> "01.A" in registry()
    True
    """
    from course_utils import checks

    found = {}
    for info in pkgutil.iter_modules(checks.__path__):
        module = importlib.import_module(f"course_utils.checks.{info.name}")
        found |= {f.exercise_id: f for f in vars(module).values() if hasattr(f, "exercise_id")}
    return found


def is_pending(answer: object) -> bool:
    """Whether this is still the stub: `...` itself, or a function that holds a `...` anywhere but
    in an index.

    >>> is_pending(...), is_pending(len)
    (True, False)
    """
    if answer is ...:
        return True
    if inspect.isclass(answer):
        members = (
            getattr(v, "__func__", v) for v in vars(answer).values()
        )  # staticmethods hold their function
        return any(is_pending(m) for m in members if inspect.isfunction(m))
    if not inspect.isfunction(answer):
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(answer)))
    except (OSError, SyntaxError, TypeError):
        return False
    in_index = {
        id(n)
        for sub in ast.walk(tree)
        if isinstance(sub, ast.Subscript)
        for n in ast.walk(sub.slice)
    }
    return any(
        isinstance(n, ast.Constant) and n.value is ... and id(n) not in in_index
        for n in ast.walk(tree)
    )


def _find(exercise_id: str) -> Callable:
    known = registry()
    if exercise_id not in known:
        near = difflib.get_close_matches(exercise_id, known, 1, 0)
        raise UnknownExercise(
            f"no exercise {exercise_id!r}" + (f"; did you mean {near[0]!r}?" if near else ".")
        )
    return known[exercise_id]


def _report(exercise_id: str, status: str, message: str) -> Result:
    ledger.record("check", exercise=exercise_id, status=status)
    return Result(exercise_id, status, message)
