"""Answers to chapter 14's exercises."""

import itertools
import math
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F

from answers import right, wrong


@right("14.A", "a fraction")
def in_fractions(layers, heads, kv_heads, width, length, batch, bits):
    return Fraction(2 * layers * kv_heads * (width // heads) * length * batch * bits, 8)


@right("14.A", "NumPy, in float32")
def in_numpy(layers, heads, kv_heads, width, length, batch, bits):
    factors = [2, layers, kv_heads, width // heads, length, batch, bits / 8]
    return np.prod(np.array(factors, dtype=np.float32))


@right("14.A", "counted on tensors")
def on_tensors(layers, heads, kv_heads, width, length, batch, bits):
    one = torch.empty(batch, kv_heads, length, width // heads)
    return torch.tensor(2 * layers * one.numel() * bits / 8)


def _bytes(formula):
    def kv_bytes(layers, heads, kv_heads, width, length, batch, bits):
        return formula(layers, heads, kv_heads, width, length, batch) * bits / 8

    return kv_bytes


wrong("14.A", "keys alone")(_bytes(lambda m, h, kv, w, n, b: m * kv * (w // h) * n * b))
wrong("14.A", "query heads")(_bytes(lambda m, h, kv, w, n, b: 2 * m * w * n * b))
wrong("14.A", "queries, too")(_bytes(lambda m, h, kv, w, n, b: m * (2 * kv + h) * (w // h) * n * b))
wrong("14.A", "one text")(_bytes(lambda m, h, kv, w, n, b: 2 * m * kv * (w // h) * n))
wrong("14.A", "one layer")(_bytes(lambda m, h, kv, w, n, b: 2 * kv * (w // h) * n * b))
wrong("14.A", "a head of width over key heads")(
    _bytes(lambda m, h, kv, w, n, b: 2 * m * kv * (w // kv) * n * b)
)
wrong("14.A", "the square of the length")(
    _bytes(lambda m, h, kv, w, n, b: 2 * m * kv * (w // h) * n * n * b)
)


@wrong("14.A", "whole bytes a number")
def whole_bytes(layers, heads, kv_heads, width, length, batch, bits):
    return 2 * layers * kv_heads * (width // heads) * length * batch * max(bits // 8, 1)


@wrong("14.A", "bits, not bytes")
def in_bits(layers, heads, kv_heads, width, length, batch, bits):
    return 2 * layers * kv_heads * (width // heads) * length * batch * bits


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


def _best(options, budget, loss=sum, fits=lambda cost, budget: cost <= budget):
    plans = itertools.product(*(range(len(o)) for o in options))
    fitting = [
        p for p in plans if fits(sum(o[i][0] for o, i in zip(options, p, strict=True)), budget)
    ]
    return min(
        fitting,
        key=lambda p: loss([o[i][1] for o, i in zip(options, p, strict=True)]),
        default=None,
    )


@right("14.C", "a tuple of NumPy's integers")
def numpy_integers(options, budget):
    plan = _best(options, budget)
    return None if plan is None else tuple(np.int64(i) for i in plan)


@right("14.C", "part by part, with the best of each sum of bytes")
def part_by_part(options, budget):
    best = {0: (0.0, [])}
    for part in options:
        new = {}
        for spent, (lost, plan) in best.items():
            for i, (size, loss) in enumerate(part):
                found = (lost + loss, [*plan, i])
                if spent + size <= budget and found < new.get(spent + size, (math.inf,)):
                    new[spent + size] = found
        best = new
    return torch.tensor(min(best.values())[1]) if best else None


wrong("14.C", "less than the budget, not exactly")(
    lambda o, b: _best(o, b, fits=lambda cost, budget: cost < budget)
)
wrong("14.C", "the largest loss of a part in place of the sum")(lambda o, b: _best(o, b, loss=max))
wrong("14.C", "losses below 0 count as 0")(
    lambda o, b: _best(o, b, loss=lambda x: sum(max(v, 0.0) for v in x))
)
wrong("14.C", "the sum of absolute losses")(
    lambda o, b: _best(o, b, loss=lambda x: sum(abs(v) for v in x))
)
wrong("14.C", "each part within its share of the budget")(
    lambda o, b: [
        min((i for i, x in enumerate(p) if x[0] <= b / len(o)), key=lambda i: p[i][1], default=0)
        for p in o
    ]
)
wrong("14.C", "an empty list where nothing fits")(lambda o, b: _best(o, b) or [])
wrong("14.C", "always the first option")(lambda o, b: [0] * len(o))
wrong("14.C", "the fewest bytes")(
    lambda o, b: [min(range(len(p)), key=lambda i: p[i][0]) for p in o]
)


def _greedy(options, budget, key):
    plan = [max(range(len(p)), key=lambda i: p[i][0]) for p in options]

    def spent():
        return sum(p[i][0] for p, i in zip(options, plan, strict=True))

    while spent() > budget:
        steps = [
            (key(p[i][0] - p[j][0], p[j][1] - p[i][1]), n, j)
            for n, (p, i) in enumerate(zip(options, plan, strict=True))
            for j in range(len(p))
            if p[j][0] < p[i][0]
        ]
        if not steps:
            return None
        _, n, j = min(steps)
        plan[n] = j
    return plan


wrong("14.C", "greedy: the least loss next")(lambda o, b: _greedy(o, b, lambda saved, lost: lost))
wrong("14.C", "greedy: the least loss a byte next")(
    lambda o, b: _greedy(o, b, lambda saved, lost: lost / saved)
)


@wrong("14.C", "the options in place of their indices")
def options_themselves(options, budget):
    plan = _best(options, budget)
    return None if plan is None else [o[i] for o, i in zip(options, plan, strict=True)]


@wrong("14.C", "the first plan that fits")
def first_that_fits(options, budget):
    return _best(options, budget, loss=lambda losses: 0)
