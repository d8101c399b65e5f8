"""Wrong in general: a right answer whose results are changed on the way out, or that ignores one
of its arguments. mutants.py lets each solution go through all of these.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator

import numpy as np
import torch

from course_utils import probe


def _leaves(value: object, change: Callable) -> object:
    """The same structure with every number, tensor and array changed."""
    if isinstance(value, tuple | list):
        return type(value)([_leaves(v, change) for v in value])
    if isinstance(value, dict):
        return {k: _leaves(v, change) for k, v in value.items()}
    numbers = int | float | np.number | np.ndarray | torch.Tensor
    return change(value) if isinstance(value, numbers) and not isinstance(value, bool) else value


def _reversed(value: object) -> object:
    if isinstance(value, tuple | list):
        return type(value)(value[::-1])
    if isinstance(value, torch.Tensor) and value.dim():
        return value.flip(0)
    return value


def _sixteen_bits(value: object) -> object:
    """What comes out of a float16 computation, in whatever type it came."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.half().to(value.dtype)
    return float(np.float16(value)) if isinstance(value, float) else value


def _nan(value: object) -> object:
    whole = isinstance(value, torch.Tensor | np.ndarray) and "int" in str(value.dtype)
    return value if whole else value * float("nan")


def _whole(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.round() if value.is_floating_point() else value
    return np.round(value) if isinstance(value, np.ndarray) else type(value)(round(value))


def _cut(value: object) -> object:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _as_is(result: object, args: tuple, kept: list) -> object:
    return result


def _alike(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.requires_grad == b.requires_grad and probe.same(a, b)
    return type(a) is type(b) and probe.same(a, b)


def _spoil_input(result: object, args: tuple, kept: list) -> object:
    """The result; what was given is changed behind the caller's back."""
    for given in args:
        if isinstance(given, torch.Tensor) and given.numel():
            given.detach().add_(1)
        elif isinstance(given, np.ndarray) and given.size:
            given += 1
        elif isinstance(given, list | set | dict) and given:
            given.clear()
    return result


RESULTS = {  # of a right answer's result, its arguments, and all its results so far
    "returns None": lambda y, a, kept: None,
    "returns its first argument": lambda y, a, kept: a[0] if a else None,
    "returns NaN": lambda y, a, kept: _leaves(y, _nan),
    "returns zeros": lambda y, a, kept: _leaves(y, lambda v: v * 0),
    "returns the negative": lambda y, a, kept: _leaves(y, lambda v: -v),
    "returns twice as much": lambda y, a, kept: _leaves(y, lambda v: v * 2),
    "returns one more": lambda y, a, kept: _leaves(y, lambda v: v + 1),
    "returns it in reverse": lambda y, a, kept: _reversed(y),
    "returns it cut from the graph": lambda y, a, kept: _leaves(y, _cut),
    "returns what float16 holds": lambda y, a, kept: _leaves(y, _sixteen_bits),
    "returns whole numbers": lambda y, a, kept: _leaves(y, _whole),
    "returns its first answer again": lambda y, a, kept: kept[0],
    "answers one call late": lambda y, a, kept: kept[-2:][0],
    "changes its input": _spoil_input,
}


def spoilt(
    function: Callable, touched: list, change: Callable = _as_is, ignored: int | None = None
) -> Callable:
    """The right function with its result changed, or with argument number `ignored` always as it
    was in the first call. Something is appended to `touched` when that made a difference.
    """
    first, results = [], []

    def before(args: tuple, kwargs: dict) -> tuple[list, dict]:
        args, kwargs = list(args), dict(kwargs)
        if ignored is not None:
            name = list(inspect.signature(function).parameters)[ignored]
            place, key = (args, ignored) if ignored < len(args) else (kwargs, name)
            if place is args or name in kwargs:  # left out: its default cannot be exchanged
                now = place[key]
                first.append(now if callable(now) else copy.deepcopy(now))
                place[key] = first[0]
        return args, kwargs

    def after(value: object, args: tuple) -> object:
        results.append(value)
        before = copy.deepcopy(args) if change is _spoil_input else None
        changed = change(value, args, results)
        if ignored is not None or not _alike(changed, value) or not probe.same(before, args):
            touched.append(changed)
        return changed

    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> object:
        given, named = before(args, kwargs)
        return after(function(*given, **named), args)

    @functools.wraps(function)
    async def call_later(*args: object, **kwargs: object) -> object:
        given, named = before(args, kwargs)
        return after(await function(*given, **named), args)

    return call_later if inspect.iscoroutinefunction(function) else call


def general(function: Callable) -> Iterator[tuple[str, Callable]]:
    """Every (name, spoilt function)."""
    for name, change in RESULTS.items():
        yield name, functools.partial(spoilt, change=change)
    for k, name in enumerate(inspect.signature(function).parameters):
        if name not in ("self", "ctx", "inputs"):
            yield f"ignores {name}", functools.partial(spoilt, ignored=k)


def in_class(answer: object, method: str | None, spoil: Callable) -> object:
    """A subclass with this one method spoilt; without a method the answer is a function itself."""
    if method is None:
        return spoil(answer)
    own = vars(answer)[method]
    static = isinstance(own, staticmethod)
    function = spoil(own.__func__ if static else own)
    return type(
        answer.__name__, (answer,), {method: staticmethod(function) if static else function}
    )
