"""Wrong answers to chapter 14's exercises, by somebody who has read only their texts."""

import itertools
import math

import torch
from torch.nn import functional as F

from answers import wrong

# ---- A


@wrong("14.A", "read only: all heads, not the key heads")
def all_heads(layers, heads, kv_heads, width, length, batch, bits):
    return 2 * layers * heads * (width // heads) * length * batch * bits / 8


@wrong("14.A", "read only: keys only")
def keys_only(layers, heads, kv_heads, width, length, batch, bits):
    return layers * kv_heads * (width // heads) * length * batch * bits / 8


@wrong("14.A", "read only: one text, right for a batch of one")
def one_text(layers, heads, kv_heads, width, length, batch, bits):
    return 2 * layers * kv_heads * (width // heads) * length * bits / 8


@wrong("14.A", "read only: two layers, as in the example")
def two_layers(layers, heads, kv_heads, width, length, batch, bits):
    return 2 * 2 * kv_heads * (width // heads) * length * batch * bits / 8


@wrong("14.A", "read only: the key heads' share of the width, also where heads do not divide it")
def share_of_width(layers, heads, kv_heads, width, length, batch, bits):
    return 2 * layers * (width * kv_heads // heads) * length * batch * bits / 8


@wrong("14.A", "read only: a head's width is not rounded down")
def not_rounded(layers, heads, kv_heads, width, length, batch, bits):
    return 2 * layers * kv_heads * width / heads * length * batch * bits / 8


@wrong("14.A", "read only: the layers for the 2 of keys and values, right for two layers")
def layers_squared(layers, heads, kv_heads, width, length, batch, bits):
    return layers * layers * kv_heads * (width // heads) * length * batch * bits / 8


@wrong("14.A", "read only: whole bytes a number, 4 bits become none")
def whole_bytes(layers, heads, kv_heads, width, length, batch, bits):
    return 2 * layers * kv_heads * (width // heads) * length * batch * (bits // 8)


@wrong("14.A", "read only: always 16 bits")
def sixteen_bits(layers, heads, kv_heads, width, length, batch, bits):
    return 2 * layers * kv_heads * (width // heads) * length * batch * 2


@wrong("14.A", "read only: the last position is not kept")
def one_position_less(layers, heads, kv_heads, width, length, batch, bits):
    return 2 * layers * kv_heads * (width // heads) * max(10, length - 1) * batch * bits / 8


@wrong("14.A", "read only: query heads a key head instead of key heads, 4 / 2 = 2 in the example")
def group_size(layers, heads, kv_heads, width, length, batch, bits):
    return 2 * layers * (heads // kv_heads) * (width // heads) * length * batch * bits / 8


@wrong("14.A", "read only: half of the width, right for two query heads a key head")
def half_width(layers, heads, kv_heads, width, length, batch, bits):
    return 2 * layers * (width // 2) * length * batch * bits / 8


# ---- B


def _attend(
    q,
    k,
    v,
    past,
    *,
    scale=True,
    mask="right",
    heads="right",
    shift=True,
    keep="right",
    clamp=None,
    dtype=None,
):
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    h, g = q.shape[1], k.shape[1]
    if heads == "right":
        wide = [t.repeat_interleave(h // g, 1) for t in (k, v)]
    elif heads == "modulo":
        wide = [t.repeat(1, h // g, 1, 1) for t in (k, v)]
    else:
        wide = [t[:, :1].expand(-1, h, -1, -1) for t in (k, v)]
    q2, k2 = (q.to(dtype), wide[0].to(dtype)) if dtype else (q, wide[0])
    scores = q2 @ k2.transpose(-1, -2)
    if scale:
        scores = scores / math.sqrt(q.shape[-1])
    if clamp:
        scores = scores.clamp(-clamp, clamp)
    T, S = scores.shape[-2:]
    offset = {"right": S - T, "top": 0, "next": S - T + 1, "strict": S - T - 1}
    if mask in offset:
        seen = torch.ones(T, S, dtype=torch.bool).tril(offset[mask])
        scores = scores.masked_fill(~seen, -math.inf)
    elif mask == "first" and past is None:
        scores = scores.masked_fill(~torch.ones(T, S, dtype=torch.bool).tril(), -math.inf)
    if shift:
        weights = torch.softmax(scores, -1)
    else:
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    out = weights.to(q.dtype) @ wide[1]
    if keep == "wide":
        return out, (wide[0], wide[1])
    return out, (k, v)


@wrong("14.B", "read only: not divided by the root of d")
def no_scale(q, k, v, past):
    return _attend(q, k, v, past, scale=False)


@wrong("14.B", "read only: a mask at the start only, later pieces see what comes after them")
def mask_at_start(q, k, v, past):
    return _attend(q, k, v, past, mask="first")


@wrong("14.B", "read only: no mask, right for single positions")
def no_mask(q, k, v, past):
    return _attend(q, k, v, past, mask="none")


@wrong("14.B", "read only: the mask's corner stays at the top left, later pieces see too little")
def top_left(q, k, v, past):
    return _attend(q, k, v, past, mask="top")


@wrong("14.B", "read only: each position sees the next one, too")
def sees_next(q, k, v, past):
    return _attend(q, k, v, past, mask="next")


@wrong("14.B", "read only: query head h uses key head h modulo kv_heads")
def modulo(q, k, v, past):
    return _attend(q, k, v, past, heads="modulo")


@wrong("14.B", "read only: all use the first key head")
def first_head(q, k, v, past):
    return _attend(q, k, v, past, heads="first")


@wrong("14.B", "read only: exponentials without the shift, nan for large numbers")
def no_shift(q, k, v, past):
    return _attend(q, k, v, past, shift=False)


@wrong("14.B", "read only: scores cut off at 50, wrong for large numbers")
def cut_off(q, k, v, past):
    return _attend(q, k, v, past, clamp=50.0)


@wrong("14.B", "read only: scores in bfloat16")
def bfloat16(q, k, v, past):
    return _attend(q, k, v, past, dtype=torch.bfloat16)


@wrong("14.B", "read only: past is a list that grows in place")
def grows_in_place(q, k, v, past):
    if past is None:
        past = [k, v]
    else:
        past[0] = torch.cat([past[0], k], 2)
        past[1] = torch.cat([past[1], v], 2)
    t = q.shape[2]
    before = None if past[0].shape[2] == t else [p[:, :, :-t] for p in past]
    return _attend(q, k, v, before)[0], past


@wrong("14.B", "read only: keeps a buffer of 256 positions, filled or not")
def long_buffer(q, k, v, past):
    at, buffers = past[2:] if past else (0, None)
    out, (keys, values) = _attend(q, k, v, past[:2] if past else None)
    at += q.shape[2]
    room = max(256, at)
    buffers = [torch.zeros(*t.shape[:2], room, t.shape[3], dtype=t.dtype) for t in (keys, values)]
    for b, t in zip(buffers, (keys, values), strict=True):
        b[:, :, :at] = t
    return out, (buffers[0][:, :, :at], buffers[1][:, :, :at], at, buffers)


@wrong("14.B", "read only: keeps keys and values of all query heads")
def keeps_wide(q, k, v, past):
    h, g = q.shape[1], k.shape[1]
    k, v = (t.repeat_interleave(h // g, 1) for t in (k, v))
    return _attend(q, k, v, past)


@wrong("14.B", "read only: keeps the queries, too")
def keeps_queries(q, k, v, past):
    out, (keys, values) = _attend(q, k, v, past[:2] if past else None)
    queries = q if past is None else torch.cat([past[2], q], 2)
    return out, (keys, values, queries)


@wrong("14.B", "read only: the cache keeps the last 16 positions only")
def window(q, k, v, past):
    out, (keys, values) = _attend(q, k, v, past)
    return out, (keys[:, :, -16:].clone(), values[:, :, -16:].clone())


@wrong("14.B", "read only: the cache is the new piece only")
def new_piece_only(q, k, v, past):
    out, _ = _attend(q, k, v, past)
    return out, (k, v)


@wrong("14.B", "read only: torch's own is_causal, whose corner is at the top left")
def is_causal(q, k, v, past):
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    n = q.shape[1] // k.shape[1]
    wide = [t.repeat_interleave(n, 1) for t in (k, v)]
    causal = q.shape[2] > 1
    return F.scaled_dot_product_attention(q, *wide, is_causal=causal), (k, v)


@wrong("14.B", "read only: scales the queries in place")
def scales_in_place(q, k, v, past):
    q.data.div_(math.sqrt(q.shape[-1]))
    return _attend(q, k, v, past, scale=False)


@wrong("14.B", "read only: the cache lies in a global, whatever past is given")
def in_a_global(q, k, v, past, kept=[None]):  # noqa: B006
    out, kept[0] = _attend(q, k, v, None if past is None else kept[0])
    return out, kept[0]


# ---- C


def _allocate(options, budget, *, fits=lambda b, budget: b <= budget):
    states = [(0, 0.0, [])]
    for part in options:
        grown = sorted(
            (b + part[j][0], loss + part[j][1], [*picks, j])
            for b, loss, picks in states
            for j in range(len(part))
        )
        states, best = [], math.inf
        for b, loss, picks in grown:
            if loss < best:
                states.append((b, loss, picks))
                best = loss
    good = [s for s in states if fits(s[0], budget)]
    return min(good, key=lambda s: s[1])[2] if good else None


def _bytes(options, picks):
    return sum(part[j][0] for part, j in zip(options, picks, strict=True))


def _loss(options, picks):
    return sum(part[j][1] for part, j in zip(options, picks, strict=True))


@wrong("14.C", "read only: the budget itself is too much")
def strict_budget(options, budget):
    return _allocate(options, budget, fits=lambda b, budget: b < budget)


@wrong("14.C", "read only: a loss below 0 counts as none")
def no_negative(options, budget):
    return _allocate([[(b, max(0.0, loss)) for b, loss in part] for part in options], budget)


@wrong("14.C", "read only: the first option is the largest, the next the next smaller")
def in_order(options, budget):
    picks = [0] * len(options)
    while _bytes(options, picks) > budget:
        steps = [
            (options[i][j + 1][1] - options[i][j][1], i)
            for i, j in enumerate(picks)
            if j + 1 < len(options[i])
        ]
        if not steps:
            return None
        picks[min(steps)[1]] += 1
    return picks


@wrong("14.C", "read only: greedy, the least loss a byte first")
def greedy(options, budget):
    picks = [min(range(len(p)), key=lambda j, p=p: (p[j][1], p[j][0])) for p in options]
    while _bytes(options, picks) > budget:
        steps = [
            ((part[j][1] - part[at][1]) / (part[at][0] - part[j][0]), i, j)
            for i, (part, at) in enumerate(zip(options, picks, strict=True))
            for j in range(len(part))
            if part[j][0] < part[at][0]
        ]
        if not steps:
            return None
        _, i, j = min(steps)
        picks[i] = j
    return picks


@wrong("14.C", "read only: a price for bytes, so only the convex hull is found")
def convex_hull(options, budget):
    best = None
    for price in [0.0, *(2.0**k for k in range(-40, 20))]:
        picks = [min(range(len(p)), key=lambda j, p=p: p[j][1] + price * p[j][0]) for p in options]
        if _bytes(options, picks) <= budget and (
            best is None or _loss(options, picks) < _loss(options, best)
        ):
            best = picks
    return best


@wrong("14.C", "read only: an empty list where nothing fits")
def empty_list(options, budget):
    return _allocate(options, budget) or []


@wrong("14.C", "read only: the smallest where nothing fits")
def smallest(options, budget):
    found = _allocate(options, budget)
    return found or [min(range(len(p)), key=lambda j, p=p: p[j][0]) for p in options]


@wrong("14.C", "read only: an even share of the budget for each part")
def even_share(options, budget):
    picks = []
    for part in options:
        good = [j for j in range(len(part)) if part[j][0] <= budget / len(options)]
        if not good:
            return None
        picks.append(min(good, key=lambda j: part[j][1]))
    return picks


@wrong("14.C", "read only: sorts each part's options in place and returns places in that order")
def sorted_places(options, budget):
    for part in options:
        part.sort(reverse=True)
    return _allocate(options, budget)


@wrong("14.C", "read only: the largest number of bytes within the budget")
def most_bytes(options, budget):
    picks, best = None, -1
    for trial in itertools.islice(itertools.product(*[range(len(p)) for p in options]), 5000):
        b = _bytes(options, trial)
        if best < b <= budget:
            picks, best = list(trial), b
    return picks


@wrong("14.C", "read only: two options a part at most")
def two_options(options, budget):
    return _allocate([part[:2] for part in options], budget)


@wrong("14.C", "read only: bytes in thousands, rounded down")
def thousands(options, budget):
    return _allocate([[(b // 1000, loss) for b, loss in part] for part in options], budget // 1000)


@wrong("14.C", "read only: the same place in every part")
def same_place(options, budget):
    n = min(map(len, options), default=0)
    good = [[j] * len(options) for j in range(n) if _bytes(options, [j] * len(options)) <= budget]
    return min(good, key=lambda p: _loss(options, p), default=None)


@wrong("14.C", "read only: the least of the largest loss, not of the sum")
def least_of_largest(options, budget):
    limits = sorted({loss for part in options for _, loss in part})
    for limit in limits:
        kept = [
            [(b, loss) if loss <= limit else (math.inf, loss) for b, loss in p] for p in options
        ]
        picks = [min(range(len(p)), key=lambda j, p=p: p[j][0]) for p in kept]
        if _bytes(kept, picks) <= budget:
            return picks
    return None
