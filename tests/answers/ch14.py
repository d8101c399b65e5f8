"""Answers to chapter 14's exercises."""

import itertools
import math
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F

from answers import right, wrong


@right("14.A", "a fraction, position by position")
def in_fractions(lengths, layers, kv_heads, head_width, block, window, bits):
    held = {
        (i, p // block)
        for i, n in enumerate(lengths)
        for p in range(n)
        if window is None or p >= n - window
    }
    return Fraction(len(held) * block * 2 * layers * kv_heads * head_width * bits, 8)


@right("14.A", "NumPy, all texts at once")
def in_numpy(lengths, layers, kv_heads, head_width, block, window, bits):
    n = np.array(lengths, dtype=np.int64)
    first = 0 * n if window is None else np.maximum(n - window, 0)
    blocks = ((n + block - 1) // block - first // block).sum()
    return np.float64(blocks) * block * 2 * layers * kv_heads * head_width * bits / 8


@right("14.A", "counted on tensors")
def on_tensors(lengths, layers, kv_heads, head_width, block, window, bits):
    one = torch.empty(2, layers, kv_heads, block, head_width)
    seen = [range(n)[-(window or n) :] if n else range(0) for n in lengths]
    return torch.tensor(sum(len({p // block for p in s}) for s in seen) * one.numel() * bits / 8)


def _bytes(blocks, numbers=lambda m, kv, d, bits: 2 * m * kv * d * bits / 8):
    def kv_bytes(lengths, layers, kv_heads, head_width, block, window, bits):
        held = sum(blocks(n, block, window) for n in lengths)
        return held * block * numbers(layers, kv_heads, head_width, bits)

    return kv_bytes


def _right(n, block, window):
    return -(-n // block) - (0 if window is None else max(n - window, 0)) // block


wrong("14.A", "no block that was begun")(
    _bytes(lambda n, b, w: n // b - (0 if w is None else max(n - w, 0)) // b)
)
wrong("14.A", "one block more than needed where a text ends with a block")(
    _bytes(lambda n, b, w: n // b + 1 - (0 if w is None else max(n - w, 0)) // b)
)
wrong("14.A", "the window's positions, not its blocks")(
    _bytes(lambda n, b, w: (n if w is None else min(n, w)) / b)
)
wrong("14.A", "as many blocks as the window would fill")(
    _bytes(lambda n, b, w: -(-(n if w is None else min(n, w)) // b))
)
wrong("14.A", "the window is forgotten")(_bytes(lambda n, b, w: -(-n // b)))
wrong("14.A", "one position too many in the window")(
    _bytes(lambda n, b, w: _right(n, b, None if w is None else w + 1))
)
wrong("14.A", "one position too few in the window")(
    _bytes(lambda n, b, w: _right(n, b, None if w is None else max(w - 1, 1)))
)
wrong("14.A", "a text has a block from the start")(_bytes(lambda n, b, w: max(_right(n, b, w), 1)))
wrong("14.A", "keys alone")(_bytes(_right, lambda m, kv, d, bits: m * kv * d * bits / 8))
wrong("14.A", "one layer")(_bytes(_right, lambda m, kv, d, bits: 2 * kv * d * bits / 8))
wrong("14.A", "one head")(_bytes(_right, lambda m, kv, d, bits: 2 * m * d * bits / 8))
wrong("14.A", "whole bytes")(
    _bytes(_right, lambda m, kv, d, bits: 2 * m * kv * d * max(bits // 8, 1))
)
wrong("14.A", "bits, not bytes")(_bytes(_right, lambda m, kv, d, bits: 2 * m * kv * d * bits))


@wrong("14.A", "the longest text for all")
def longest(lengths, layers, kv_heads, head_width, block, window, bits):
    held = len(lengths) * _right(max(lengths, default=0), block, window)
    return held * block * 2 * layers * kv_heads * head_width * bits / 8


@right("14.B", "torch's own attention with a mask, a list as past")
def by_sdpa(q, k, v, past):
    past = past or [k[:, :, :0], v[:, :, :0]]
    k, v = (torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True))
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return [F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True), [k, v]]


@right("14.B", "loops, a dict as past")
def by_loops(q, k, v, past):
    keys, values = (
        (k, v) if past is None else (torch.cat([past[n], x], 2) for n, x in (("k", k), ("v", v)))
    )
    out, group, old = torch.empty_like(q), q.shape[1] // k.shape[1], keys.shape[2] - q.shape[2]
    for h, t in itertools.product(range(q.shape[1]), range(q.shape[2])):
        seen = slice(0, old + t + 1)
        scores = torch.einsum("bd,bsd->bs", q[:, h, t], keys[:, h // group, seen])
        share = (scores / q.shape[3] ** 0.5).softmax(-1)
        out[:, h, t] = torch.einsum("bs,bsd->bd", share, values[:, h // group, seen])
    return out, {"k": keys, "v": values}


@right("14.B", "one tensor as past, in float32")
def in_float32(q, k, v, past):
    both = torch.stack([k, v]).float()
    both = both if past is None else torch.cat([past, both], 3)
    return by_sdpa(q.float(), both[0], both[1], None)[0].to(q.dtype), both


def _attend(
    *,
    repeat=lambda x, group: x.repeat_interleave(group, 1),
    mask=lambda T, S: torch.ones(T, S, dtype=torch.bool).tril(S - T),
    scale=lambda d: 1 / math.sqrt(d),
    share=lambda scores: scores.softmax(-1),
    keep=lambda k, v, group: (k, v),
    join=lambda past, k, v: (torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)),
):
    """The right answer with one of its decisions exchanged."""

    def cached_attention(q, k, v, past):
        k, v = join(past, k, v) if past is not None else (k, v)
        group = q.shape[1] // k.shape[1]
        scores = q @ repeat(k, group).transpose(-1, -2) * scale(q.shape[-1])
        hidden = ~mask(q.shape[2], k.shape[2])
        weights = share(scores.masked_fill(hidden, -math.inf))
        return weights @ repeat(v, group), keep(k, v, group)

    return cached_attention


wrong("14.B", "key heads in turns")(_attend(repeat=lambda x, group: x.repeat(1, group, 1, 1)))
wrong("14.B", "no mask")(_attend(mask=lambda T, S: torch.ones(T, S, dtype=torch.bool)))
wrong("14.B", "the mask of a square")(
    _attend(mask=lambda T, S: torch.ones(T, S, dtype=torch.bool).tril())
)
wrong("14.B", "not its own position")(
    _attend(mask=lambda T, S: torch.ones(T, S, dtype=torch.bool).tril(max(S - T - 1, 0)))
)
wrong("14.B", "one position into the future")(
    _attend(mask=lambda T, S: torch.ones(T, S, dtype=torch.bool).tril(S - T + 1))
)
wrong("14.B", "no scale")(_attend(scale=lambda d: 1.0))
wrong("14.B", "divided by d")(_attend(scale=lambda d: 1 / d))
wrong("14.B", "exponentials that overflow")(
    _attend(share=lambda s: s.exp() / s.exp().sum(-1, keepdim=True))
)
wrong("14.B", "weights over the queries")(_attend(share=lambda s: s.softmax(-2)))
wrong("14.B", "the keys are kept once for each query head")(
    _attend(keep=lambda k, v, group: (k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
)
wrong("14.B", "more is kept than keys and values")(
    _attend(keep=lambda k, v, group: (k, v, k.clone()))
)
wrong("14.B", "only the last piece is remembered")(_attend(join=lambda past, k, v: (k, v)))
wrong("14.B", "new keys first")(
    _attend(join=lambda past, k, v: (torch.cat([k, past[0]], 2), torch.cat([v, past[1]], 2)))
)
wrong("14.B", "values of the past are lost")(
    _attend(join=lambda past, k, v: (torch.cat([past[0], k], 2), torch.cat([past[0], v], 2)))
)


@wrong("14.B", "past is a list that grows in place")
def grows_in_place(q, k, v, past):
    past = [] if past is None else past
    past.append((k, v))
    keys, values = (torch.cat([pair[i] for pair in past], 2) for i in range(2))
    return by_sdpa(q, keys, values, None)[0], past


_ALL = []


@wrong("14.B", "what it has seen is kept outside")
def global_memory(q, k, v, past):
    if past is None:
        _ALL.clear()
    _ALL.append((k, v))
    keys, values = (torch.cat([pair[i] for pair in _ALL], 2) for i in range(2))
    return by_sdpa(q, keys, values, None)[0], len(_ALL)


@wrong("14.B", "out alone")
def out_alone(q, k, v, past):
    return by_sdpa(q, k, v, past)[0]


@right("14.C", "a list and a tensor, in torch")
def in_torch(p, q):
    a, b = torch.tensor(p), torch.tensor(q)
    kept = torch.minimum(a, b)
    keep = torch.where(b > 0, kept / b.clamp(min=1e-300), torch.zeros_like(a))
    rest = (a - kept).clamp(min=0)
    return [keep.tolist(), rest / rest.sum() if rest.sum() > 0 else a]


@right("14.C", "loops, and one where nothing is guessed")
def rule_by_loops(p, q):
    keep = [min(1.0, a / b) if b else 1.0 for a, b in zip(p, q, strict=True)]
    rest = [max(a - b, 0.0) for a, b in zip(p, q, strict=True)]
    total = math.fsum(rest)
    n = len(p)
    return keep, [r / total for r in rest] if total else [1 / n] * n


def _rule(keep=None, instead=None, empty=lambda p, q: p):
    """The right answer with one of its parts exchanged."""

    def rule(p, q):
        safe = np.where(q > 0, q, 1)
        kept = np.minimum(1, p / safe) if keep is None else keep(p, q, safe)
        rest = np.maximum(p - q, 0) if instead is None else instead(p, q)
        return kept, rest / rest.sum() if rest.sum() > 0 else empty(p, q)

    return rule


wrong("14.C", "anew from p")(_rule(instead=lambda p, q: p))
wrong("14.C", "anew from q")(_rule(instead=lambda p, q: q))
wrong("14.C", "anew from what q has too much of")(_rule(instead=lambda p, q: np.maximum(q - p, 0)))
wrong("14.C", "anew from the absolute differences")(_rule(instead=lambda p, q: np.abs(p - q)))
wrong("14.C", "anew from the squares")(_rule(instead=lambda p, q: np.maximum(p - q, 0) ** 2))
wrong("14.C", "anew from the most likely one")(
    _rule(instead=lambda p, q: (np.arange(len(p)) == p.argmax()).astype(float))
)
wrong("14.C", "kept as often as p says")(_rule(keep=lambda p, q, s: p))
wrong("14.C", "kept by q / p")(_rule(keep=lambda p, q, s: np.minimum(1, q / np.where(p > 0, p, 1))))
wrong("14.C", "kept by half of it")(_rule(keep=lambda p, q, s: np.minimum(1, p / s) / 2))
wrong("14.C", "not cut off at one")(_rule(keep=lambda p, q, s: p / s))
wrong("14.C", "kept where p is larger, else never")(
    _rule(keep=lambda p, q, s: (p >= q).astype(float))
)
wrong("14.C", "kept always")(_rule(keep=lambda p, q, s: np.ones_like(p)))
wrong("14.C", "nothing where none is missing")(_rule(empty=lambda p, q: np.zeros_like(p)))
wrong("14.C", "the rest is not made to sum to one")(
    lambda p, q: (np.minimum(1, p / np.where(q > 0, q, 1)), np.maximum(p - q, 0))
)
wrong("14.C", "never kept")(lambda p, q: (np.zeros_like(p), p))
wrong("14.C", "kept in proportion")(
    lambda p, q: (np.full_like(p, ratio := (p / np.where(q > 0, q, np.inf)).min()), p - ratio * q)
)
wrong("14.C", "the rest first")(lambda p, q: _rule()(p, q)[::-1])
wrong("14.C", "keep alone")(lambda p, q: _rule()(p, q)[0])
wrong("14.C", "a dict")(lambda p, q: dict(zip(("keep", "instead"), _rule()(p, q), strict=True)))


@wrong("14.C", "in place")
def in_place(p, q):
    keep = np.minimum(1, p / np.where(q > 0, q, 1))
    p -= q
    np.maximum(p, 0, out=p)
    return keep, p / p.sum() if p.sum() > 0 else q
