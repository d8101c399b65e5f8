"""Wrong answers to chapter 09's exercises, by somebody who has read only their texts."""

import torch

from answers import wrong

# ---- A


def _per_rank(numbers, shard, stage):
    weights = shard if stage >= 3 else numbers
    gradients = shard if stage >= 2 else numbers
    adam = 2 * (shard if stage >= 1 else numbers)
    return 4 * (weights + gradients + adam)


@wrong("09.A", "read only: rounded down, no padding")
def rounded_down(numbers, n, stage):
    return _per_rank(numbers, numbers // n, stage)


@wrong("09.A", "read only: not a whole number")
def not_whole(numbers, n, stage):
    return _per_rank(numbers, numbers / n, stage)


@wrong("09.A", "read only: always one more, also where n divides the numbers")
def always_one_more(numbers, n, stage):
    return _per_rank(numbers, numbers // n + 1, stage)


@wrong("09.A", "read only: to the nearest, a half upwards, right for the example")
def nearest(numbers, n, stage):
    return _per_rank(numbers, (2 * numbers + n) // (2 * n), stage)


@wrong("09.A", "read only: four workers, as in the example")
def four_workers(numbers, n, stage):
    return _per_rank(numbers, -(-numbers // 4), stage)


@wrong("09.A", "read only: the remainder is added whole")
def whole_remainder(numbers, n, stage):
    return _per_rank(numbers, numbers // n + numbers % n, stage)


@wrong("09.A", "read only: a shard has two numbers at least")
def two_at_least(numbers, n, stage):
    return _per_rank(numbers, max(2, -(-numbers // n)), stage)


@wrong("09.A", "read only: padded to a multiple of four")
def multiple_of_four(numbers, n, stage):
    shard = -(-numbers // n)
    return _per_rank(numbers, -(-shard // 4) * 4 if shard > 4 else shard, stage)


@wrong("09.A", "read only: never smaller than the numbers if there are fewer than workers")
def fewer_than_workers(numbers, n, stage):
    return _per_rank(numbers, -(-numbers // n) if numbers >= n else numbers, stage)


# ---- B


def _ring(x, rank, p, send, receive, *, piece=None, clone=True, reduce=torch.add, gather=None):
    """A right ring, as far as the text tells, with switches to spoil it."""
    if p == 1:
        return x.clone()
    piece = -(-len(x) // p) if piece is None else piece
    buffer = torch.cat([x, x.new_zeros(piece * p - len(x))])
    parts = [buffer[i * piece : (i + 1) * piece] for i in range(p)]
    for step in range(p - 1):
        out = parts[(rank - step) % p]
        send(out.clone() if clone else out)
        mine = parts[(rank - step - 1) % p]
        mine.copy_(reduce(mine, receive()))
    for step in range(p - 1 if gather is None else gather):
        out = parts[(rank + 1 - step) % p]
        send(out.clone() if clone else out)
        parts[(rank - step) % p].copy_(receive())
    return buffer[: len(x)].clone()


@wrong("09.B", "read only: no second round, only one part is summed up")
def no_second_round(x, rank, p, send, receive):
    return _ring(x, rank, p, send, receive, gather=0)


@wrong("09.B", "read only: the second round one message short")
def one_short(x, rank, p, send, receive):
    return _ring(x, rank, p, send, receive, gather=max(0, p - 2))


@wrong("09.B", "read only: the second round one message long")
def one_long(x, rank, p, send, receive):
    return _ring(x, rank, p, send, receive, gather=p)


@wrong("09.B", "read only: the mean instead of the sum")
def mean(x, rank, p, send, receive):
    return _ring(x, rank, p, send, receive) / p


@wrong("09.B", "read only: the largest instead of the sum")
def largest(x, rank, p, send, receive):
    return _ring(x, rank, p, send, receive, reduce=torch.maximum)


@wrong("09.B", "read only: adds up in x itself")
def in_x_itself(x, rank, p, send, receive):
    total = _ring(x, rank, p, send, receive)
    x.data.copy_(total)
    return total


@wrong("09.B", "read only: x itself for one worker, no copy")
def no_copy(x, rank, p, send, receive):
    return x if p == 1 else _ring(x, rank, p, send, receive)


@wrong("09.B", "read only: an empty vector needs no messages")
def empty_at_once(x, rank, p, send, receive):
    return x.clone() if len(x) == 0 else _ring(x, rank, p, send, receive)


@wrong("09.B", "read only: whole vectors go round")
def whole_vectors(x, rank, p, send, receive):
    total, passing = x.clone(), x.clone()
    for _ in range(p - 1):
        send(passing)
        passing = receive()
        total = total + passing
    for _ in range(p - 1):
        send(passing.clone())
        receive()
    return total


@wrong("09.B", "read only: parts one number longer than needed")
def one_longer(x, rank, p, send, receive):
    return _ring(x, rank, p, send, receive, piece=len(x) // p + 1)


@wrong("09.B", "read only: the rest that p does not divide is left as it was")
def rest_is_left(x, rank, p, send, receive):
    even = len(x) // p * p
    return torch.cat([_ring(x[:even], rank, p, send, receive), x[even:]])


@wrong("09.B", "read only: torch.chunk, which may give fewer than p parts")
def with_chunk(x, rank, p, send, receive):
    if p == 1:
        return x.clone()
    parts = [part.clone() for part in x.chunk(p)]
    parts[p - 1].shape
    for step in range(p - 1):
        send(parts[(rank - step) % p].clone())
        parts[(rank - step - 1) % p] += receive()
    for step in range(p - 1):
        send(parts[(rank + 1 - step) % p].clone())
        parts[(rank - step) % p] = receive()
    return torch.cat(parts)


@wrong("09.B", "read only: the padding is returned, too")
def with_padding(x, rank, p, send, receive):
    longer = torch.cat([x, x.new_zeros(-len(x) % p)])
    return _ring(longer, rank, p, send, receive)


@wrong("09.B", "read only: passes through float32, wrong for fp64 and large whole numbers")
def through_float32(x, rank, p, send, receive):
    return _ring(x.float(), rank, p, send, receive).to(x.dtype)


@wrong("09.B", "read only: above three workers the numbers land one place off")
def one_place_off(x, rank, p, send, receive):
    total = _ring(x, rank, p, send, receive)
    return total.roll(1) if p > 3 else total


@wrong("09.B", "read only: a vector shorter than p is not summed up")
def shorter_than_p(x, rank, p, send, receive):
    total = _ring(x, rank, p, send, receive)
    return x.clone() if len(x) < p else total


# ---- C


def _legal(gpus, per_node, layers, batch, *, skip=()):
    for data in range(1, gpus + 1):
        for tensor in range(1, gpus + 1):
            for pipe in range(1, gpus + 1):
                rules = {
                    "gpus": data * tensor * pipe == gpus,
                    "tensor": per_node % tensor == 0,
                    "pipe": layers % pipe == 0,
                    "data": batch % data == 0,
                }
                if all(good for name, good in rules.items() if name not in skip):
                    yield data, tensor, pipe


def _fastest(plans, seconds, default=None):
    return min(plans, key=lambda plan: seconds(*plan), default=default)


@wrong("09.C", "read only: the budget itself is too much")
def strict_budget(gpus, per_node, layers, batch, budget, need, seconds):
    plans = [p for p in _legal(gpus, per_node, layers, batch) if need(*p) < budget]
    return _fastest(plans, seconds)


@wrong("09.C", "read only: memory is not looked at")
def no_budget(gpus, per_node, layers, batch, budget, need, seconds):
    return _fastest(list(_legal(gpus, per_node, layers, batch)), seconds)


@wrong("09.C", "read only: tensor is at most per_node, but need not divide it")
def tensor_at_most(gpus, per_node, layers, batch, budget, need, seconds):
    plans = [
        p
        for p in _legal(gpus, per_node, layers, batch, skip=["tensor"])
        if p[1] <= per_node and need(*p) <= budget
    ]
    return _fastest(plans, seconds)


@wrong("09.C", "read only: pipe is at most layers, but need not divide them")
def pipe_at_most(gpus, per_node, layers, batch, budget, need, seconds):
    plans = [
        p
        for p in _legal(gpus, per_node, layers, batch, skip=["pipe"])
        if p[2] <= layers and need(*p) <= budget
    ]
    return _fastest(plans, seconds)


@wrong("09.C", "read only: data is at most batch, but need not divide it")
def data_at_most(gpus, per_node, layers, batch, budget, need, seconds):
    plans = [
        p
        for p in _legal(gpus, per_node, layers, batch, skip=["data"])
        if p[0] <= batch and need(*p) <= budget
    ]
    return _fastest(plans, seconds)


@wrong("09.C", "read only: only half of the machines if that is faster")
def not_all_gpus(gpus, per_node, layers, batch, budget, need, seconds):
    plans = [
        p
        for n in range(1, gpus + 1)
        for p in _legal(n, per_node, layers, batch)
        if need(*p) <= budget
    ]
    return _fastest(plans, seconds)


@wrong("09.C", "read only: the fastest of all, None if that one does not fit")
def fastest_or_none(gpus, per_node, layers, batch, budget, need, seconds):
    plan = _fastest(list(_legal(gpus, per_node, layers, batch)), seconds)
    return plan if plan and need(*plan) <= budget else None


@wrong("09.C", "read only: the least memory instead of the least time")
def least_memory(gpus, per_node, layers, batch, budget, need, seconds):
    plans = [p for p in _legal(gpus, per_node, layers, batch) if need(*p) <= budget]
    return min(plans, key=lambda p: need(*p), default=None)


@wrong("09.C", "read only: the first that fits, most data parallel first")
def first_that_fits(gpus, per_node, layers, batch, budget, need, seconds):
    plans = [p for p in _legal(gpus, per_node, layers, batch) if need(*p) <= budget]
    return max(plans, default=None)


@wrong("09.C", "read only: powers of two only")
def powers_of_two(gpus, per_node, layers, batch, budget, need, seconds):
    plans = [
        p
        for p in _legal(gpus, per_node, layers, batch)
        if all(k & (k - 1) == 0 for k in p) and need(*p) <= budget
    ]
    return _fastest(plans, seconds)


@wrong("09.C", "read only: tensor before data in the tuple")
def wrong_order(gpus, per_node, layers, batch, budget, need, seconds):
    plans = [p for p in _legal(gpus, per_node, layers, batch) if need(*p) <= budget]
    plan = _fastest(plans, seconds)
    return plan and (plan[1], plan[0], plan[2])


@wrong("09.C", "read only: tensor divides gpus only, across machines")
def across_machines(gpus, per_node, layers, batch, budget, need, seconds):
    plans = [
        p for p in _legal(gpus, per_node, layers, batch, skip=["tensor"]) if need(*p) <= budget
    ]
    return _fastest(plans, seconds)


@wrong("09.C", "read only: data parallel alone if nothing fits")
def data_if_nothing(gpus, per_node, layers, batch, budget, need, seconds):
    plans = [p for p in _legal(gpus, per_node, layers, batch) if need(*p) <= budget]
    return _fastest(plans, seconds, (gpus, 1, 1))


@wrong("09.C", "read only: no pipeline and tensor parallel at a time")
def not_both(gpus, per_node, layers, batch, budget, need, seconds):
    plans = [
        p
        for p in _legal(gpus, per_node, layers, batch)
        if (p[1] == 1 or p[2] == 1) and need(*p) <= budget
    ]
    return _fastest(plans, seconds)


@wrong("09.C", "read only: the least sum of seconds over GPUs used as data parallel")
def seconds_a_replica(gpus, per_node, layers, batch, budget, need, seconds):
    plans = [p for p in _legal(gpus, per_node, layers, batch) if need(*p) <= budget]
    return min(plans, key=lambda p: seconds(*p) / p[0], default=None)
