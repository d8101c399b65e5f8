"""Checks of chapter 14, LLM inference."""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

from course_utils.exercises import Probe, Wrong, exercise


@exercise("14.A")
def kv_bytes(answer: Probe, rng: np.random.Generator) -> None:
    """Counted on real tensors: one key and one value a layer, text and position, of key heads only,
    down to 4 bits.
    """
    cases = [(1, 1, 1, 8, 1, 1, 16), (2, 4, 2, 32, 10, 1, 16), (1, 2, 2, 16, 3, 2, 4)]
    for _ in range(8):
        kv, group, d = int(rng.integers(1, 5)), int(rng.integers(1, 5)), 2 * int(rng.integers(2, 9))
        layers, length, batch = (int(n) for n in rng.integers(1, 9, 3))
        cases.append(
            (layers, kv * group, kv, kv * group * d, length, batch, int(rng.choice([4, 8, 16, 32])))
        )
    for case in cases:
        layers, heads, kv_heads, width, length, batch, bits = case
        got = answer(*case)
        if not isinstance(got, int | float | np.number) or isinstance(got, bool):
            raise Wrong(f"a number of bytes was expected; you returned {got!r}.")
        one = torch.empty(batch, kv_heads, length, width // heads, dtype=torch.uint8)
        want = sum(t.nbytes for _ in range(layers) for t in (one, one)) * bits / 8
        if got != want:
            names = ("layers", "heads", "kv_heads", "width", "length", "batch", "bits")
            where = ", ".join(f"{n}={v}" for n, v in zip(names, case, strict=True))
            raise Wrong(f"{where}: the tensors hold {want:g} bytes, you say {got:g}.")


@exercise("14.B")
def cached_attention(answer: Probe, rng: np.random.Generator) -> None:
    """Equal to torch's causal attention over the whole, however the sequence is cut and the heads
    are shared.
    """
    cases = [
        (1, 1, [1]),
        (1, 1, [2]),
        (1, 1, [1, 1]),
        (1, 1, [2, 2]),
        (2, 2, [1, 1, 1]),
        (2, 2, [3, 2, 1]),
    ]
    cases += [
        (int(rng.integers(1, 4)), int(rng.integers(1, 4)), rng.integers(1, 6, 4).tolist())
        for _ in range(5)
    ]
    for kv, group, pieces in cases:
        batch, d, length = int(rng.integers(1, 3)), 4, sum(pieces)
        q = torch.from_numpy(rng.normal(size=(batch, kv * group, length, d)))
        k, v = (torch.from_numpy(rng.normal(size=(batch, kv, length, d))) for _ in range(2))
        want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        where = f"{kv * group} query heads, {kv} key heads, pieces of {pieces} tokens"
        past, start = None, 0
        for n in pieces:
            piece = slice(start, start + n)
            value = answer(q[:, :, piece], k[:, :, piece], v[:, :, piece], past)
            if not isinstance(value, tuple) or len(value) != 2:
                raise Wrong(
                    f"a pair (out, past) was expected; you returned a {type(value).__name__}."
                )
            out, past = value
            if not isinstance(out, torch.Tensor) or out.shape != q[:, :, piece].shape:
                shape = tuple(getattr(out, "shape", ()))
                raise Wrong(
                    f"{where}: out must have q's shape {tuple(q[:, :, piece].shape)}; it has"
                    f" {shape}."
                )
            apart = (out - want[:, :, piece]).abs().amax((0, 1, 3))
            if not bool((apart < 1e-9).all()):
                first = start + int((~(apart < 1e-9)).nonzero()[0])
                raise Wrong(
                    f"{where}: position {first} differs from attention over the whole by"
                    f" {float(apart.max()):.2g}. Which keys may it see, and which key head is its"
                    " own?"
                )
            start += n


@exercise("14.C")
def allocate(answer: Probe, rng: np.random.Generator) -> None:
    """Within the budget to the byte, and no plan that fits loses less."""
    cases = [
        ([[(8, 0.0), (4, 0.5)]], 8),
        ([[(8, 0.0), (4, 0.5)]], 3),
        ([[(8, 0.0), (4, 0.5)], [(8, 0.1), (4, 0.2)]], 12),
    ]
    cases.append(([[(8, 0.0), (4, 0.1)], [(8, 0.0), (4, 0.9)]], 12))
    for _ in range(12):
        options = [
            [
                (int(rng.integers(2, 30)), float(rng.integers(0, 40)) / 8)
                for _ in range(int(rng.integers(2, 4)))
            ]
            for _ in range(int(rng.integers(2, 5)))
        ]
        sums = sorted({sum(o[0] for o in pick) for pick in itertools.product(*options)})
        cases.append((options, sums[int(rng.integers(0, len(sums)))]))
    for options, budget in cases:
        got, where = answer(options, budget), f"options {options} and a budget of {budget}"
        fitting = [p for p in itertools.product(*options) if sum(o[0] for o in p) <= budget]
        if not fitting:
            if got is not None:
                raise Wrong(f"{where}: nothing fits, so None is due; you returned {got!r}.")
            continue
        least = min(sum(o[1] for o in p) for p in fitting)
        if got is None:
            raise Wrong(f"{where}: a plan fits, with a loss of {least:g}; you returned None.")
        if not isinstance(got, list | tuple) or len(got) != len(options):
            raise Wrong(f"{where}: one index a part was expected; you returned {got!r}.")
        if not all(0 <= i < len(o) for i, o in zip(got, options, strict=True)):
            raise Wrong(f"{where}: {got!r} holds an index that its part does not have.")
        spent = sum(o[i][0] for i, o in zip(got, options, strict=True))
        lost = sum(o[i][1] for i, o in zip(got, options, strict=True))
        if spent > budget:
            raise Wrong(f"{where}: your plan {got} takes {spent} bytes.")
        if not math.isclose(lost, least) and lost > least:
            raise Wrong(f"{where}: your plan {got} loses {lost:g}; {least:g} is possible.")
