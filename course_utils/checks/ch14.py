"""Checks of chapter 14, LLM serving."""

import numpy as np
import torch
import torch.nn.functional as F

from course_utils.checks.accept import apart, close, number, said
from course_utils.exercises import Probe, Wrong, exercise

_NAMES = ("lengths", "layers", "kv_heads", "head_width", "block", "window", "bits")


@exercise("14.A")
def kv_bytes(answer: Probe, rng: np.random.Generator) -> None:
    """Counted position by position: a block is held if it has one that a token still needs."""
    cases = [
        ([10], 1, 1, 2, 4, None, 8),
        ([10], 1, 1, 2, 4, 3, 8),
        ([8], 1, 1, 2, 4, 4, 8),  # the window begins with a block
        ([9], 1, 1, 2, 4, 4, 8),  # and lies across two
        ([3], 1, 1, 2, 4, 9, 8),  # a text shorter than the window
        ([3], 1, 1, 2, 1, 9, 8),
        ([0], 1, 1, 2, 4, None, 8),
        ([0, 5], 1, 1, 2, 4, 2, 8),
        ([], 1, 1, 2, 4, None, 8),
        ([1, 1], 1, 1, 2, 4, None, 8),
        ([6], 2, 3, 5, 1, None, 4),
        ([7, 20], 3, 2, 6, 8, 1, 3),
    ]
    for _ in range(10):
        lengths = rng.integers(0, 60, int(rng.integers(1, 6))).tolist()
        layers, kv, width = (int(n) for n in rng.integers(1, 9, 3))
        window = None if rng.random() < 0.4 else int(rng.integers(1, 40))
        block, bits = int(rng.integers(1, 20)), int(rng.choice([3, 4, 8, 16, 32]))
        cases.append((lengths, layers, kv, width, block, window, bits))
    for case in cases:
        lengths, layers, kv, width, block, window, bits = case
        where = ", ".join(f"{n}={v}" for n, v in zip(_NAMES, case, strict=True))
        got = number(answer(*case), where)
        held = [
            {p // block for p in range(n) if window is None or n - p <= window} for n in lengths
        ]
        blocks = sum(map(len, held))
        both = [torch.empty(block, kv, width, dtype=torch.uint8) for _ in range(2)]
        want = blocks * layers * sum(t.numel() for t in both) * bits / 8
        if not close(got, want):
            yours, due = apart(got, want)
            raise Wrong(
                f"{where}: the texts hold {[len(h) for h in held]} blocks, {due} bytes; you say"
                f" {yours}."
            )


@exercise("14.B")
def cached_attention(answer: Probe, rng: np.random.Generator) -> None:
    """Equal to torch's causal attention over the whole, however the sequence is cut and the heads
    are shared, and no more is kept than keys and values.
    """
    cases = [
        (1, 1, [1]),
        (1, 1, [2]),
        (1, 1, [1, 1]),
        (1, 1, [2, 2]),
        (1, 2, [2, 1]),
        (2, 1, [2, 1]),
        (2, 2, [1, 1, 1]),
        (2, 2, [3, 2, 1]),
    ]
    for _ in range(5):
        pieces = rng.integers(1, 6, 4).tolist()
        cases.append((int(rng.integers(1, 4)), int(rng.integers(1, 4)), pieces))
    for kv, group, pieces in cases:
        _judge_pieces(answer, rng, kv, group, pieces)
    _judge_pieces(answer, rng, 2, 2, [2, 2], size=50.0)
    _judge_pieces(answer, rng, 1, 2, [30, 40, 1, 30])
    _judge_pieces(answer, rng, 2, 2, [2, 2], dtype=torch.float32)


def _judge_pieces(
    answer: Probe,
    rng: np.random.Generator,
    kv: int,
    group: int,
    pieces: list[int],
    size: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> None:
    batch, d, length = int(rng.integers(1, 4)), 2 * int(rng.integers(1, 5)), sum(pieces)

    def draw(heads: int, scale: float) -> torch.Tensor:  # (B, heads, length, d)
        return torch.from_numpy(scale * rng.normal(size=(batch, heads, length, d))).to(dtype)

    q, k, v = draw(kv * group, size), draw(kv, size), draw(kv, 1.0)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    where = f"{kv * group} query heads, {kv} key heads, pieces of {pieces} tokens"
    where += f", numbers of about {size:g}" if size != 1 else ""
    # Softmax and products of at most 100 numbers of size 1: fp32 is off by some 1e-6; by 1e-3 where
    # scores are in the ten thousands.
    allowed = 3e-5 if size == 1 else 2e-2
    past, start = None, 0
    for n in pieces:
        piece = slice(start, start + n)
        given = (q[:, :, piece], k[:, :, piece], v[:, :, piece], past)
        (out, past), (again, _) = (_pair(answer(*given), where) for _ in range(2))
        if not isinstance(out, torch.Tensor) or out.shape != given[0].shape:
            shape = tuple(given[0].shape)
            raise Wrong(f"{where}: out must have q's shape {shape}; you returned {said(out)}.")
        apart_by = (out.double() - want[:, :, piece].double()).abs().amax((0, 1, 3))
        if not bool((apart_by < allowed).all()):
            first = start + int((~(apart_by < allowed)).nonzero()[0])
            raise Wrong(
                f"{where}: position {first} differs from attention over the whole by"
                f" {float(apart_by.max()):.2g}. Which keys may it see, and which key head is its"
                " own?"
            )
        if not (isinstance(again, torch.Tensor) and torch.allclose(again, out)):
            raise Wrong(f"{where}: the same past, used a second time, gives another answer.")
        start += n
        kept, due = sum(t.numel() for t in _tensors(past)), 2 * batch * kv * start * d
        if kept > due:
            raise Wrong(
                f"{where}: after {start} positions your past holds {kept:,} numbers; keys and"
                f" values of the {kv} key heads are {due:,}."
            )


def _pair(value: object, where: str) -> tuple:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise Wrong(f"{where}: a pair (out, past) was expected; you returned {said(value)}.")
    return tuple(value)


def _tensors(value: object) -> list[torch.Tensor]:
    """All tensors in lists, tuples, dicts and objects."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [t for v in value for t in _tensors(v)]
    return _tensors(vars(value)) if hasattr(value, "__dict__") else []


_PAIRS = [  # p, q
    ([0.5, 0.3, 0.2], [0.2, 0.3, 0.5]),
    ([0.5, 0.5], [0.5, 0.5]),  # no guess is ever refused
    ([1.0], [1.0]),
    ([1.0, 0.0], [0.0, 1.0]),  # none is ever kept
    ([0.0, 1.0], [0.5, 0.5]),
    ([0.5, 0.5], [0.0, 1.0]),  # a token that is never guessed
    ([0.25, 0.25, 0.5, 0.0], [0.25, 0.25, 0.0, 0.5]),
    ([0.0, 0.4, 0.6], [0.0, 0.9, 0.1]),  # one that nobody says
    ([0.6, 0.3, 0.1], [0.5, 0.3, 0.2]),
]


@exercise("14.C")
def rule(answer: Probe, rng: np.random.Generator) -> None:
    """Exact on the distribution, and no rule can keep more guesses: 1 less half of what the two
    distributions differ by.
    """
    cases = [(np.array(p), np.array(q)) for p, q in _PAIRS]
    for size in (2, 3, 5, 40, 2000):
        for sharp in (0.3, 3.0):
            cases.append(tuple(rng.dirichlet(np.full(size, sharp)) for _ in range(2)))
    p = rng.dirichlet(np.ones(30))
    cases += [(p, p.copy()), (p, (p * (1 + 1e-3 * rng.normal(size=30))).clip(0))]
    cases[-1] = (p, cases[-1][1] / cases[-1][1].sum())
    for p, q in cases:
        few = len(p) < 6
        where = f"p = {p.round(4)}, q = {q.round(4)}" if few else f"{len(p)} tokens"
        got = answer(p, q)
        if not isinstance(got, tuple | list) or len(got) != 2:
            raise Wrong(f"{where}: a pair (keep, instead) was expected; you returned {said(got)}.")
        keep, instead = (
            _array(v, len(p), f"{where}: {n}") for v, n in zip(got, _BOTH, strict=True)
        )
        _judge_rule(p, q, keep, instead, where)


_BOTH = ("keep", "instead")


def _judge_rule(
    p: np.ndarray, q: np.ndarray, keep: np.ndarray, instead: np.ndarray, where: str
) -> None:
    for name, values in zip(_BOTH, (keep, instead), strict=True):
        if not ((values >= -1e-12) & (values <= 1 + 1e-12)).all():  # NaN is neither
            raise Wrong(
                f"{where}: {name} must lie between 0 and 1; yours has"
                f" {values[np.argmax(~((values >= -1e-12) & (values <= 1 + 1e-12)))]:.4g}."
            )
    if abs(instead.sum() - 1) > 1e-6:
        raise Wrong(f"{where}: instead must sum to 1; yours sums to {instead.sum():.4g}.")
    kept = q * keep
    found = kept + (1 - kept.sum()) * instead
    if (off := np.abs(found - p)).max() > 1e-7:
        x = int(off.argmax())
        yours, due = apart(float(found[x]), float(p[x]))
        raise Wrong(f"{where}: token {x} comes with probability {yours}; p says {due}.")
    most = 1 - np.abs(p - q).sum() / 2
    if kept.sum() < most - 1e-7:
        yours, due = apart(float(kept.sum()), float(most))
        raise Wrong(f"{where}: you keep {yours} of the guesses; {due} can be kept.")


def _array(value: object, size: int, what: str) -> np.ndarray:
    """Numbers from an array, a tensor or a list."""
    try:
        array = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        raise Wrong(f"{what} must be {size} numbers; yours is {said(value)}.") from None
    if array.shape != (size,):
        raise Wrong(f"{what} must be {size} numbers; yours has the shape {array.shape}.")
    return array
