"""A reader's answer, called so that what it raises, and what it changes, becomes a message."""

import copy

import numpy as np
import torch


class Wrong(Exception):
    """Raised inside a check: the message tells the reader what is wrong, with the smallest failing
    case.
    """


class Probe:
    """The reader's answer, called on copies: what it raises becomes a message, and a changed input
    is noticed.

    >>> Probe(lambda x: 1 / x)(0)
    Traceback (most recent call last):
    course_utils.probe.Wrong: your code raised ZeroDivisionError: division by zero
    for the input 0.
    """

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def __call__(self, *args: object, **kwargs: object) -> object:
        if not callable(self.answer):
            raise Wrong(f"a function was expected; this is a {type(self.answer).__name__}.")
        given, before = copy.deepcopy((args, kwargs)), (args, kwargs)
        try:
            value = self.answer(*given[0], **given[1])
        except Wrong:
            raise
        except Exception as error:
            raise Wrong(
                f"your code raised {type(error).__name__}: {error}\nfor the input"
                f" {shown(*args, **kwargs)}."
            ) from error
        except SystemExit:
            raise Wrong(
                f"your code ended the program (sys.exit) for the input {shown(*args, **kwargs)}."
            ) from None
        if not same(given, before):
            raise Wrong(
                "your code changed its input, which belongs to the caller:"
                f" {shown(*args, **kwargs)} became {shown(*given[0])}."
            )
        return value


def same(a: object, b: object) -> bool:
    """Deep equality that knows tensors and arrays; NaN equals NaN.

    >>> same([torch.tensor([1.0, float("nan")])], [torch.tensor([1.0, float("nan")])])
    True
    >>> same(torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    False
    """
    if isinstance(a, torch.Tensor):
        return (
            a.shape == b.shape
            and a.dtype == b.dtype
            and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        )
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.nn.Module):
        return same(dict(a.state_dict()), dict(b.state_dict()))
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (np.isnan(a) and np.isnan(b))
    return type(a).__eq__ is object.__eq__ or bool(a == b)


def shown(*args: object, **kwargs: object) -> str:
    """Arguments as the reader would write them, long ones shortened.

    >>> shown(2, torch.zeros(3, 4), scale=0.5)
    '2, tensor of shape (3, 4), scale=0.5'
    """
    parts = [_short(a) for a in args] + [f"{k}={_short(v)}" for k, v in kwargs.items()]
    return ", ".join(parts)


def _short(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return (
            f"tensor of shape {tuple(value.shape)}"
            if value.numel() > 8
            else f"tensor({value.tolist()})"
        )
    if isinstance(value, np.ndarray) and value.size > 8:
        return f"array of shape {value.shape}"
    if callable(value) and not isinstance(value, torch.nn.Module):
        return getattr(value, "__name__", type(value).__name__)  # an address says nothing
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:120]} … ({type(value).__name__})"
