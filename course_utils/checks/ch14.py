"""Checks of chapter 14, LLM inference."""

import itertools

import numpy as np
import torch
import torch.nn.functional as F

from course_utils.checks.accept import apart, close, number, said, sequence, whole
from course_utils.exercises import Probe, Wrong, exercise

_NAMES = ("layers", "heads", "kv_heads", "width", "length", "batch", "bits")


@exercise("14.A")
def kv_bytes(answer: Probe, rng: np.random.Generator) -> None:
    """Counted on real tensors: one key and one value a layer, text and position, of key heads only,
    down to 3 bits.
    """
    cases = [
        (1, 1, 1, 8, 1, 1, 16),
        (2, 4, 2, 32, 10, 1, 16),
        (1, 2, 2, 16, 3, 2, 4),
        (1, 3, 1, 6, 5, 1, 3),
        (2, 4, 2, 10, 3, 1, 8),  # a head has 10 // 4 numbers
    ]
    for _ in range(8):
        kv, group, d = int(rng.integers(1, 5)), int(rng.integers(1, 5)), 2 * int(rng.integers(2, 9))
        layers, length, batch = (int(n) for n in rng.integers(1, 9, 3))
        bits = int(rng.choice([3, 4, 8, 16, 32]))
        cases.append((layers, kv * group, kv, kv * group * d, length, batch, bits))
    for case in cases:
        layers, heads, kv_heads, width, length, batch, bits = case
        where = ", ".join(f"{n}={v}" for n, v in zip(_NAMES, case, strict=True))
        got = number(answer(*case), where)
        one = torch.empty(batch, kv_heads, length, width // heads, dtype=torch.uint8)
        want = sum(t.nbytes for _ in range(layers) for t in (one, one)) * bits / 8
        if not close(got, want):
            yours, due = apart(got, want)
            raise Wrong(f"{where}: the tensors hold {due} bytes, you say {yours}.")


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


_PLANS = [  # options, budget
    ([[(8, 0.0), (4, 0.5)]], 8),
    ([[(8, 0.0), (4, 0.5)]], 7.5),
    ([[(8, 0.0), (4, 0.5)]], 3),
    ([[(8, 0.0), (4, 0.5)]], 100),
    ([[(8, 0.0), (4, -0.5)]], 8),
    ([[(4, 0.5), (8, 0.0)]], 4),  # the widest need not come first
    ([[(8, 0.0), (4, 0.5)], [(8, 0.1), (4, 0.2)]], 12),
    ([[(8, 0.0), (4, 0.1)], [(8, 0.0), (4, 0.9)]], 12),
    ([[(8, 0.13), (4, 0.11)]], 8),  # fewer bits, less loss: measured on few tokens
    ([[(8, 0.0), (4, -0.02)], [(8, 0.0), (4, 0.01)]], 12),
    ([[(8, -0.5), (4, -0.02)]], 8),  # losses below 0 are not all alike
    ([[(8, -0.02), (4, -0.5)]], 8),
    ([[(9, 0.0)], [(9, 0.0), (2, 5.0), (1, 6.0)]], 11),  # one option alone
    # By loss a byte the first part gives up bits first; then the second must, too.
    ([[(10, 0.0), (9, 0.01)], [(10, 0.0), (4, 1.0)]], 14),
    ([[(10, 0.0), (6, 0.5)], [(10, 0.0), (6, 0.5)], [(10, 0.0), (2, 0.9)]], 22),
]


@exercise("14.C")
def allocate(answer: Probe, rng: np.random.Generator) -> None:
    """Within the budget to the byte, and no plan that fits loses less."""
    cases = list(_PLANS)
    for _ in range(12):
        options = [
            [
                (int(rng.integers(2, 30)), float(rng.integers(-4, 40)) / 8)
                for _ in range(int(rng.integers(1, 4)))
            ]
            for _ in range(int(rng.integers(2, 5)))
        ]
        sums = sorted({sum(o[0] for o in pick) for pick in itertools.product(*options)})
        cases.append((options, sums[int(rng.integers(0, len(sums)))]))
    for _ in range(3):  # as the chapter measures them: four parts at 8, 4 and 3 bits
        sizes, loss = rng.integers(10**6, 5 * 10**7, 4), rng.normal(0.0, 0.3, (4, 3))
        options = [
            [(n * bits / 8, float(x)) for bits, x in zip((8, 4, 3), row, strict=True)]
            for n, row in zip(sizes.tolist(), loss, strict=True)
        ]
        cases.append((options, 0.55 * float(sizes.sum())))
    for options, budget in cases:
        _judge_plan(answer, options, budget)


def _judge_plan(answer: Probe, options: list[list[tuple]], budget: float) -> None:
    where = f"allocate({options}, {budget})"
    got = answer(options, budget)
    fitting = [p for p in itertools.product(*options) if sum(o[0] for o in p) <= budget]
    if got is None:
        if fitting:
            least = min(sum(o[1] for o in p) for p in fitting)
            raise Wrong(f"{where}: a plan fits, with a loss of {least:g}; you returned None.")
        return
    if not fitting:
        raise Wrong(f"{where}: nothing fits, so None is due; you returned {said(got)}.")
    plan = [whole(i, where) for i in sequence(got, f"{where}, one index a part", len(options))]
    if not all(0 <= i < len(o) for i, o in zip(plan, options, strict=True)):
        raise Wrong(f"{where}: {plan} holds an index that its part does not have.")
    chosen = [o[i] for i, o in zip(plan, options, strict=True)]
    spent, lost = sum(c[0] for c in chosen), sum(c[1] for c in chosen)
    least = min(sum(o[1] for o in p) for p in fitting)
    if spent > budget:
        raise Wrong(f"{where}: your plan {plan} takes {spent} bytes.")
    if not lost <= least + 1e-9:
        yours, due = apart(lost, least)
        raise Wrong(f"{where}: your plan {plan} loses {yours}; {due} is possible.")
