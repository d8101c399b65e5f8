"""Wrong answers to chapter 14's exercises, by somebody who has read only their texts."""

import math

import numpy as np
import torch
from torch.nn import functional as F

from answers import wrong

# ---- A


def _count(lengths, layers, kv_heads, head_width, bits, blocks):
    return sum(map(blocks, lengths)) * 2 * layers * kv_heads * head_width * bits / 8


@wrong("14.A", "read only: positions, not blocks")
def positions(lengths, layers, kv_heads, head_width, block, window, bits):
    return _count(
        lengths,
        layers,
        kv_heads,
        head_width,
        bits,
        lambda n: n if window is None else min(n, window),
    )


@wrong("14.A", "read only: the first block goes once the text is longer than the window")
def first_goes(lengths, layers, kv_heads, head_width, block, window, bits):
    def blocks(n):
        gone = window is not None and n > window
        return block * (math.ceil(n / block) - gone)

    return _count(lengths, layers, kv_heads, head_width, bits, blocks)


@wrong("14.A", "read only: blocks that lie partly before the window go, too")
def partly_gone(lengths, layers, kv_heads, head_width, block, window, bits):
    def blocks(n):
        before = 0 if window is None else max(0, n - window)
        return block * (math.ceil(n / block) - math.ceil(before / block))

    return _count(lengths, layers, kv_heads, head_width, bits, blocks)


@wrong("14.A", "read only: a window of None is a window of one block")
def none_is_a_block(lengths, layers, kv_heads, head_width, block, window, bits):
    look = block if window is None else window

    def blocks(n):
        return block * (math.ceil(n / block) - max(0, n - look) // block)

    return _count(lengths, layers, kv_heads, head_width, bits, blocks)


@wrong("14.A", "read only: two blocks for each text with a window, as in the example")
def two_blocks(lengths, layers, kv_heads, head_width, block, window, bits):
    def blocks(n):
        return block * (math.ceil(n / block) if window is None else min(2, math.ceil(n / block)))

    return _count(lengths, layers, kv_heads, head_width, bits, blocks)


@wrong("14.A", "read only: one text after the other in the same blocks")
def one_after_the_other(lengths, layers, kv_heads, head_width, block, window, bits):
    kept = [n if window is None else min(n, window) for n in lengths]
    blocks = math.ceil(sum(kept) / block)
    return blocks * block * 2 * layers * kv_heads * head_width * bits / 8


@wrong("14.A", "read only: keys and values are one")
def one_of_two(lengths, layers, kv_heads, head_width, block, window, bits):
    def blocks(n):
        before = 0 if window is None else max(0, n - window)
        return block * (math.ceil(n / block) - before // block)

    return _count(lengths, layers, kv_heads, head_width, bits, blocks) / 2


@wrong("14.A", "read only: the window counts from the start of the text")
def from_the_start(lengths, layers, kv_heads, head_width, block, window, bits):
    def blocks(n):
        return block * math.ceil(min(n, n if window is None else window) / block)

    return _count(lengths, layers, kv_heads, head_width, bits, blocks)


@wrong("14.A", "read only: the bytes of one block, however many")
def one_block(lengths, layers, kv_heads, head_width, block, window, bits):
    return block * 2 * layers * kv_heads * head_width * bits / 8


@wrong("14.A", "read only: the text on its way takes one position more")
def one_more(lengths, layers, kv_heads, head_width, block, window, bits):
    def blocks(n):
        before = 0 if window is None else max(0, n - window)
        return block * (math.ceil((n + 1) / block) - before // block)

    return _count(lengths, layers, kv_heads, head_width, bits, blocks)


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


@wrong("14.C", "read only: keeps the likelier half")
def likelier_half(p, q):
    return (p >= np.median(p)).astype(float), p


@wrong("14.C", "read only: keeps all where p and q agree within 5%, otherwise as the ratio; from p")
def nearly(p, q):
    ratio = p / np.where(q > 0, q, 1)
    return np.where(np.abs(ratio - 1) < 0.05, 1, np.clip(ratio, 0, 1)), p


@wrong("14.C", "read only: 0.7 for all, as in the example")
def as_in_the_example(p, q):
    keep = np.full_like(p, 0.7)
    rest = np.clip(p - 0.7 * q, 0, None)
    return keep, rest / rest.sum() if rest.sum() else p


@wrong("14.C", "read only: a difference of logarithms")
def logarithms(p, q):
    with np.errstate(divide="ignore", invalid="ignore"):
        keep = np.exp(np.log(p) - np.log(q))
    rest = np.clip(p - q, 0, None)
    return np.nan_to_num(keep, nan=0.0, posinf=1.0), rest / max(rest.sum(), 1e-9)


@wrong("14.C", "read only: in float16")
def half_precision(p, q):
    a, b = p.astype(np.float16), q.astype(np.float16)
    rest = np.clip(a - b, 0, None)
    return np.minimum(1, a / np.where(b > 0, b, 1)), rest / rest.sum() if rest.sum() else a


@wrong("14.C", "read only: equal chances instead")
def equal_chances(p, q):
    return np.minimum(1, p / np.where(q > 0, q, 1)), np.full_like(p, 1 / len(p))


@wrong("14.C", "read only: the overlap, not the share of the guesses")
def overlap(p, q):
    rest = np.clip(p - q, 0, None)
    return np.minimum(p, q), rest / rest.sum() if rest.sum() else p


@wrong("14.C", "read only: nan for tokens that are never guessed")
def nan_for_others(p, q):
    with np.errstate(divide="ignore", invalid="ignore"):
        keep = np.minimum(1, p / q) + 0 * (q / q)
    rest = np.clip(p - q, 0, None)
    return keep, rest / rest.sum() if rest.sum() else p


@wrong("14.C", "read only: three tokens, whatever comes")
def three_tokens(p, q):
    keep = np.minimum(1, p / np.where(q > 0, q, 1))[:3]
    rest = np.clip(p - q, 0, None)[:3]
    return keep, rest / rest.sum() if rest.sum() else p[:3]


@wrong("14.C", "read only: the first time's answer again")
def remembers(p, q, kept=[]):  # noqa: B006
    if not kept:
        rest = np.clip(p - q, 0, None)
        kept.append((np.minimum(1, p / np.where(q > 0, q, 1)), rest / rest.sum()))
    return kept[0]
