"""What a check accepts as a number, a whole number, a list or a tensor: right answers come in
NumPy's, torch's and Python's own types.
"""

import math
import numbers
from collections.abc import Iterable

import numpy as np
import torch

from course_utils.exercises import Wrong


def number(value: object, what: str) -> float:
    """A float from an int, float, Fraction, NumPy scalar, or an array or tensor of one element.

    `what` names what was returned in the message. NaN and inf are numbers. Raises Wrong.

    >>> number(np.float32(0.5), "speedup(2, 4)")
    0.5
    >>> number("0.5", "speedup(2, 4)")
    Traceback (most recent call last):
    course_utils.exercises.Wrong: speedup(2, 4): a number was expected; you returned '0.5'.
    """
    one = isinstance(value, torch.Tensor | np.ndarray) and math.prod(value.shape) == 1
    plain = isinstance(value, numbers.Real | np.number) and not isinstance(value, bool)
    if not one and not plain:
        raise Wrong(f"{what}: a number was expected; you returned {said(value)}.")
    return float(value.item() if one else value)


def whole(value: object, what: str) -> int:
    """An int from whatever `number` takes, if it is whole. Raises Wrong.

    >>> whole(torch.tensor(3.0), "cuts")
    3
    """
    got = number(value, what)
    if not math.isfinite(got) or got != int(got):
        raise Wrong(f"{what}: a whole number was expected; you returned {said(value)}.")
    return int(got) if isinstance(value, float) else int(value)


def sequence(value: object, what: str, length: int | None = None) -> list:
    """A list from a list, tuple, generator, array or tensor of one dimension. Raises Wrong.

    >>> sequence(np.array([1, 2]), "cuts")
    [1, 2]
    """
    if isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 1:
        value = value.tolist()
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | dict | set):
        raise Wrong(f"{what}: a list was expected; you returned {said(value)}.")
    items = list(value)
    if length is not None and len(items) != length:
        raise Wrong(f"{what}: {length} items were expected; you returned {said(items)}.")
    return items


def close(got: float, want: float, *, rel: float = 1e-6, absolute: float = 0.0) -> bool:
    """Whether two numbers agree; NaN agrees with nothing, an infinity with itself.

    >>> close(1.0000001, 1.0), close(float("nan"), 1.0), close(math.inf, math.inf)
    (True, False, True)
    """
    return got == want or abs(got - want) <= max(rel * abs(want), absolute) < math.inf


def apart(got: float, want: float) -> tuple[str, str]:
    """Both numbers in as few digits, four at least, as tell them apart.

    >>> apart(1 / 3, 0.333333)
    ('0.3333333', '0.333333')
    """
    for digits in range(4, 18):
        a, b = f"{got:.{digits}g}", f"{want:.{digits}g}"
        if a != b:
            return a, b
    return repr(got), repr(want)


def said(value: object) -> str:
    """A value as a message shows it: short, and never with an address.

    >>> said(torch.zeros(2, 3)), said(len)
    ('a tensor of shape (2, 3)', 'the function len')
    """
    if isinstance(value, torch.Tensor | np.ndarray) and value.ndim:
        kind = "a tensor" if isinstance(value, torch.Tensor) else "an array"
        return f"{kind} of shape {tuple(value.shape)}"
    if callable(value):
        return f"the function {getattr(value, '__name__', type(value).__name__)}"
    text = repr(value)
    if " at 0x" in text:
        return f"a {type(value).__name__}"
    return text if len(text) <= 120 else f"{text[:100]} … ({type(value).__name__})"
