"""Answers to chapter 09's exercises."""

import itertools
import math
from fractions import Fraction

import numpy as np
import torch

from answers import right, wrong


@right("09.A", "a 0-d tensor, from the table of what each stage shards")
def from_a_table(numbers, n, stage):
    shard = (numbers + n - 1) // n
    cut = 2 * (stage >= 3) + 4 * (stage >= 2) + 12 * (stage >= 1)
    return torch.tensor(cut * shard + (18 - cut) * numbers)


@right("09.A", "a fraction")
def as_fraction(numbers, n, stage):
    shard = math.ceil(Fraction(numbers, n))
    return Fraction(sum(each * (shard if stage >= first else numbers) for each, first in KINDS))


@right("09.A", "NumPy's whole numbers")
def in_numpy(numbers, n, stage):
    shard = np.int64(numbers) // n + (numbers % n > 0)
    held = np.where(stage >= np.array([3, 2, 1]), shard, numbers)
    return np.array([2, 4, 12]) @ held


KINDS = ((2, 3), (4, 2), (12, 1))  # bytes, and the stage from which they are sharded


def _zero(shard=lambda a, b: -(-a // b), kinds=KINDS):
    return lambda numbers, n, stage: sum(
        each * (shard(numbers, n) if stage >= first else numbers) for each, first in kinds
    )


wrong("09.A", "rounded down")(_zero(shard=lambda a, b: a // b))
wrong("09.A", "a fractional shard")(_zero(shard=lambda a, b: a / b))
wrong("09.A", "rounded to the nearest")(_zero(shard=lambda a, b: round(a / b)))
wrong("09.A", "always one more")(_zero(shard=lambda a, b: a // b + 1))
wrong("09.A", "0.99 is added")(_zero(shard=lambda a, b: int(a / b + 0.99)))
wrong("09.A", "a float is rounded up")(_zero(shard=lambda a, b: math.ceil(a / b)))
wrong("09.A", "everything from stage 1 on")(_zero(kinds=((18, 1),)))
wrong("09.A", "weights first of all")(_zero(kinds=((2, 1), (4, 2), (12, 3))))
wrong("09.A", "stages 2 and 3 exchanged")(_zero(kinds=((2, 2), (4, 3), (12, 1))))
wrong("09.A", "one stage late")(_zero(kinds=((2, 4), (4, 3), (12, 2))))
wrong("09.A", "Adam's numbers without the copy")(_zero(kinds=((2, 3), (4, 2), (8, 1))))
wrong("09.A", "no gradients")(_zero(kinds=((2, 3), (12, 1))))
wrong("09.A", "gradients of 16 bits")(_zero(kinds=((2, 3), (2, 2), (12, 1))))
wrong("09.A", "numbers, not bytes")(_zero(kinds=((1, 3), (1, 2), (3, 1))))


@wrong("09.A", "in float32")
def in_float32(numbers, n, stage):
    return torch.tensor(_zero()(numbers, n, stage), dtype=torch.float32)


@wrong("09.A", "in float64")
def in_float64(numbers, n, stage):
    return float(_zero()(numbers, n, stage))


@wrong("09.A", "the whole group's bytes")
def whole_group(numbers, n, stage):
    return n * _zero()(numbers, n, stage)


@wrong("09.A", "the total is cut, not each part")
def total_cut(numbers, n, stage):
    cut = 2 * (stage >= 3) + 4 * (stage >= 2) + 12 * (stage >= 1)
    return (18 - cut) * numbers + -(-cut * numbers // n)


# --- 09.B -------------------------------------------------------------------------------------


def _ring(
    *,
    start=torch.clone,
    cut=torch.tensor_split,
    sent=lambda piece: piece,
    first=lambda rank, k: rank - k,
    second=lambda rank, k: rank - k + 1,
    rounds=(1, 1),
):
    """The right answer with one of its decisions exchanged."""

    def ring(x, rank, p, send, receive):
        result = start(x)
        pieces = cut(result, p)
        for k in range(p - rounds[0]):
            send(sent(pieces[first(rank, k) % p]))
            pieces[(first(rank, k) - 1) % p].add_(receive())
        for k in range(p - rounds[1]):
            send(sent(pieces[second(rank, k) % p]))
            pieces[(second(rank, k) - 1) % p].copy_(receive())
        return result

    return ring


right("09.B", "in pieces")(_ring())
right("09.B", "copies are sent")(_ring(sent=torch.clone))
right("09.B", "the other pieces first")(
    _ring(first=lambda rank, k: rank - k + 3, second=lambda rank, k: rank - k + 4)
)


@right("09.B", "padded, and cut at the end")
def padded(x, rank, p, send, receive):
    size = -(-len(x) // p)
    table = torch.zeros(p * size, dtype=x.dtype)
    table[: len(x)] = x
    table = table.view(p, size)
    at = rank
    for _ in range(p - 1):
        send(table[at])
        at = (at - 1) % p
        table[at] += receive()
    for _ in range(p - 1):
        send(table[at])
        at = (at - 1) % p
        table[at] = receive()
    return table.flatten()[: len(x)]


class InNumpy:
    def __call__(self, x, rank, p, send, receive):
        pieces = [np.array(part) for part in np.array_split(x.numpy(), p)]
        for k in range(p - 1):
            send(torch.from_numpy(pieces[rank - k]))
            pieces[rank - k - 1] = pieces[rank - k - 1] + receive().numpy()
        for k in range(p - 1):
            send(torch.from_numpy(pieces[(rank - k + 1) % p]))
            pieces[rank - k] = receive().numpy()
        return torch.from_numpy(np.concatenate(pieces))


right("09.B", "a callable object, with lists of NumPy's arrays")(InNumpy())


wrong("09.B", "chunk")(_ring(cut=torch.chunk))
wrong("09.B", "x itself is summed into")(_ring(start=lambda x: x))
wrong("09.B", "in fp32")(_ring(start=lambda x: x.float().clone()))
wrong("09.B", "in whole numbers")(_ring(start=lambda x: x.long().clone()))
wrong("09.B", "a message a piece too late")(_ring(second=lambda rank, k: rank - k))
wrong("09.B", "pieces of everybody the same")(_ring(first=lambda rank, k: -k))
wrong("09.B", "the other way round")(_ring(first=lambda rank, k: rank + k))
wrong("09.B", "no second loop")(_ring(rounds=(1, 10)))
wrong("09.B", "one round too many")(_ring(rounds=(0, 1)))
wrong("09.B", "one round too few")(_ring(rounds=(2, 1)))
wrong("09.B", "messages in half precision")(_ring(sent=lambda piece: piece.half().to(piece.dtype)))
wrong("09.B", "messages as lists")(_ring(sent=lambda piece: piece.tolist()))


@wrong("09.B", "a pad in fp32")
def fp32_pad(x, rank, p, send, receive):
    pad = torch.zeros(-len(x) % p)
    return padded(torch.cat([x.float(), pad]), rank, p, send, receive)[: len(x)]


@wrong("09.B", "the pad stays on")
def pad_stays(x, rank, p, send, receive):
    return padded(torch.cat([x, torch.zeros(-len(x) % p, dtype=x.dtype)]), rank, p, send, receive)


@wrong("09.B", "one worker returns what it got")
def alone(x, rank, p, send, receive):
    return x if p == 1 else _ring()(x, rank, p, send, receive)


@wrong("09.B", "whole vectors travel")
def whole_vectors(x, rank, p, send, receive):
    result = passing = x.clone()
    for _ in range(p - 1):
        send(passing)
        passing = receive()
        result = result + passing
    for _ in range(p - 1):
        send(result[:0])
        receive()
    return result


@wrong("09.B", "whole vectors travel, without the empty messages")
def half_the_messages(x, rank, p, send, receive):
    result = passing = x.clone()
    for _ in range(p - 1):
        send(passing)
        passing = receive()
        result = result + passing
    return result


@wrong("09.B", "everybody waits first")
def waits_first(x, rank, p, send, receive):
    result = x.clone()
    pieces = torch.tensor_split(result, p)
    for k in range(p - 1):
        pieces[(rank - k - 1) % p].add_(receive())
        send(pieces[(rank - k) % p])
    return result


@wrong("09.B", "x itself for an empty vector")
def empty_itself(x, rank, p, send, receive):
    return x if len(x) == 0 and p == 1 else _ring()(x, rank, p, send, receive)


@wrong("09.B", "right up to five workers")
def up_to_five(x, rank, p, send, receive):
    result = _ring()(x, rank, p, send, receive)
    return result if p <= 5 else result + (rank == 5)


@wrong("09.B", "right up to seven workers")
def up_to_seven(x, rank, p, send, receive):
    result = _ring()(x, rank, p, send, receive)
    return result if p <= 7 else result + (rank == 7)


@wrong("09.B", "the sum in float32")
def float32_result(x, rank, p, send, receive):
    return _ring()(x, rank, p, send, receive).float()


class Gossip:
    """Everybody writes into one dictionary and sends empty messages for show."""

    def __init__(self):
        self.known = {}

    def __call__(self, x, rank, p, send, receive):
        self.known[rank, p, len(x), x.dtype] = x.clone()
        for _ in range(2 * (p - 1)):  # whoever has all messages knows that all have written
            send(x[:0])
            receive()
        return sum(self.known[r, p, len(x), x.dtype] for r in range(p)) + 0 * x


wrong("09.B", "a shared dictionary, and messages for show")(Gossip())


@wrong("09.B", "the mean")
def mean(x, rank, p, send, receive):
    return _ring()(x, rank, p, send, receive) / p


@wrong("09.B", "a list")
def a_list(x, rank, p, send, receive):
    return _ring()(x, rank, p, send, receive).tolist()


# --- 09.C -------------------------------------------------------------------------------------


def _layout(
    *,
    product=lambda d, t, p, gpus: d * t * p == gpus,
    rule=lambda d, t, p, per_node, layers, batch: not (per_node % t or layers % p or batch % d),
    fits=lambda used, budget: used <= budget,
    key=lambda plan, need, seconds: seconds(*plan),
    nothing=None,
    said=tuple,
):
    def layout(gpus, per_node, layers, batch, budget, need, seconds):
        allowed = [
            plan
            for plan in itertools.product(range(1, gpus + 1), repeat=3)
            if product(*plan, gpus)
            and rule(*plan, per_node, layers, batch)
            and fits(need(*plan), budget)
        ]
        best = min(allowed, key=lambda plan: key(plan, need, seconds), default=None)
        return nothing if best is None else said(best)

    return layout


right("09.C", "a list")(_layout(said=list))
right("09.C", "an array")(_layout(said=np.array))
right("09.C", "a generator of NumPy's integers")(
    _layout(said=lambda plan: (np.int32(v) for v in plan))
)


@right("09.C", "over divisors, the later of equal plans")
def over_divisors(gpus, per_node, layers, batch, budget, need, seconds):
    best, least = None, math.inf
    for pipe in (d for d in range(1, layers + 1) if layers % d == 0 and gpus % d == 0):
        for data in (d for d in range(1, batch + 1) if batch % d == 0):
            tensor, rest = divmod(gpus // pipe, data)
            if rest or not tensor or per_node % tensor or need(data, tensor, pipe) > budget:
                continue
            if seconds(data, tensor, pipe) <= least:
                best, least = (data, tensor, pipe), seconds(data, tensor, pipe)
    return best


def _rule(tensor=True, pipe=True, data=True):
    return lambda d, t, p, per_node, layers, batch: (
        not ((tensor and per_node % t) or (pipe and layers % p) or (data and batch % d))
    )


wrong("09.C", "not all GPUs")(_layout(product=lambda d, t, p, gpus: d * t * p <= gpus))
wrong("09.C", "any number that divides the GPUs")(
    _layout(product=lambda d, t, p, gpus: gpus % (d * t * p) == 0)
)
wrong("09.C", "tensor across machines")(_layout(rule=_rule(tensor=False)))
wrong("09.C", "stages of unequal layers")(_layout(rule=_rule(pipe=False)))
wrong("09.C", "unequal batches")(_layout(rule=_rule(data=False)))
wrong("09.C", "tensor at most per_node")(
    _layout(rule=lambda d, t, p, m, layers, b: t <= m and not (layers % p or b % d))
)
wrong("09.C", "pipe at most layers")(
    _layout(rule=lambda d, t, p, m, layers, b: p <= layers and not (m % t or b % d))
)
wrong("09.C", "data at most the batch")(
    _layout(rule=lambda d, t, p, m, layers, b: d <= b and not (m % t or layers % p))
)
wrong("09.C", "tensor must fill the machine")(
    _layout(rule=lambda d, t, p, m, layers, b: t == m and not (layers % p or b % d))
)
wrong("09.C", "below the budget")(_layout(fits=lambda used, budget: used < budget))
wrong("09.C", "no budget")(_layout(fits=lambda used, budget: True))
wrong("09.C", "the slowest")(_layout(key=lambda plan, need, seconds: -seconds(*plan)))
wrong("09.C", "the least memory")(_layout(key=lambda plan, need, seconds: need(*plan)))
wrong("09.C", "the most memory")(_layout(key=lambda plan, need, seconds: -need(*plan)))
wrong("09.C", "the first that fits")(_layout(key=lambda plan, need, seconds: 0))
wrong("09.C", "in reverse")(_layout(said=lambda plan: plan[::-1]))
wrong("09.C", "an empty tuple where nothing fits")(_layout(nothing=()))
wrong("09.C", "its own names")(
    _layout(said=lambda plan: dict(zip(("data", "tensor", "pipe"), plan, strict=True)))
)
wrong("09.C", "floating-point numbers")(_layout(said=lambda plan: tuple(map(float, plan))))
wrong("09.C", "degrees up to 8")(
    _layout(rule=lambda d, t, p, *rest: max(d, t, p) <= 8 and _rule()(d, t, p, *rest))
)
wrong("09.C", "a GPU may be idle")(
    _layout(product=lambda d, t, p, gpus: gpus - 1 <= d * t * p <= gpus)
)
wrong("09.C", "one GPU's plan")(lambda *given: (given[0], 1, 1))


@wrong("09.C", "powers of two alone")
def powers(gpus, per_node, layers, batch, budget, need, seconds):
    def power(n):
        return n & (n - 1) == 0

    return _layout(rule=lambda d, t, p, *rest: power(t) and power(p) and _rule()(d, t, p, *rest))(
        gpus, per_node, layers, batch, budget, need, seconds
    )
