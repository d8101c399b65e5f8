"""Answers to the exercises that are not the course's own: wrong ones of every kind, and right ones
in other styles. A module a chapter; test_3_answers.py lets each meet its check.

    @wrong("00.A", "new over old")
    def inverse(old_seconds, new_seconds):
        return new_seconds / old_seconds
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """`what` says in a few words what is wrong with it, or how it differs from the solution."""

    exercise: str
    what: str
    right: bool
    value: object


FOUND: list[Answer] = []


def right(exercise: str, what: str) -> Callable:
    """Register a right answer; the object stays as it is."""
    return _register(exercise, what, is_right=True)


def wrong(exercise: str, what: str) -> Callable:
    """Register a wrong answer; the object stays as it is."""
    return _register(exercise, what, is_right=False)


def _register(exercise: str, what: str, *, is_right: bool) -> Callable:
    def keep(value: object) -> object:
        FOUND.append(Answer(exercise, what, is_right, value))
        return value

    return keep


def everything() -> list[Answer]:
    """Of all chapters, in order. Raises ValueError if two answers of an exercise say the same."""
    for info in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{info.name}")
    names = [(a.exercise, a.what) for a in FOUND]
    if twice := {n for n in names if names.count(n) > 1}:
        raise ValueError(f"told twice: {sorted(twice)}")
    return sorted(FOUND, key=lambda a: a.exercise)
