"""Answers to chapter 08's exercises."""

import functools
import itertools
import math
from fractions import Fraction

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from answers import right, wrong


def _parameters(widths):
    return sum((a + 1) * b for a, b in itertools.pairwise(widths))


@right("08.A", "a 0-d tensor")
def in_torch(widths, batch):
    return torch.tensor(4 * (3 * _parameters(widths) + batch * sum(widths[:-1])))


@right("08.A", "NumPy")
def in_numpy(widths, batch):
    w = np.array(widths)
    return np.float32(12 * (w[:-1] @ w[1:] + w[1:].sum()) + 4 * batch * w[:-1].sum())


@right("08.A", "a fraction, layer by layer")
def layer_by_layer(widths, batch):
    total = Fraction(0)
    for into, out in itertools.pairwise(widths):
        total += 12 * (into * out + out) + Fraction(batch * into * 32, 8)
    return total


def _bytes(activations=lambda w, b: b * sum(w[:-1]), times=3, parameters=_parameters, each=4):
    return lambda widths, batch: (
        each * (times * parameters(widths) + activations(list(widths), batch))
    )


wrong("08.A", "ReLUs count again")(_bytes(lambda w, b: b * (sum(w[:-1]) + sum(w[1:-1]))))
wrong("08.A", "outputs, not inputs")(_bytes(lambda w, b: b * sum(w[1:])))
wrong("08.A", "the last output, too")(_bytes(lambda w, b: b * sum(w)))
wrong("08.A", "no batch")(_bytes(lambda w, b: b * sum(w[1:-1])))
wrong("08.A", "one row")(_bytes(lambda w, b: sum(w[:-1])))
wrong("08.A", "one of equal widths")(_bytes(lambda w, b: b * sum(set(w[:-1]))))
wrong("08.A", "the widest layer alone")(_bytes(lambda w, b: b * max(w[:-1])))
wrong("08.A", "gradients, too")(_bytes(times=4))
wrong("08.A", "one number of Adam's")(_bytes(times=2))
wrong("08.A", "no biases")(
    _bytes(parameters=lambda w: sum(a * b for a, b in itertools.pairwise(w)))
)
wrong("08.A", "numbers, not bytes")(_bytes(each=1))
wrong("08.A", "half precision")(_bytes(each=2))


@wrong("08.A", "text")
def in_words(widths, batch):
    return f"{_bytes()(widths, batch)} bytes"


# --- 08.B -------------------------------------------------------------------------------------


def _fresh(values, needed):
    values = [v.detach() if isinstance(v, torch.Tensor) else v for v in values]
    return [v.requires_grad_() if n else v for v, n in zip(values, needed, strict=True)]


@right("08.B", "fork_rng, inputs in ctx, autograd.grad with the parameters' hooks left to backward")
class Forked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.again = functools.partial(_with_state, torch.get_rng_state(), function)
        ctx.inputs = inputs
        return function(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        values = _fresh(ctx.inputs, ctx.needs_input_grad[1:])
        ctx.again(values).backward(gradient)
        return None, *[getattr(v, "grad", None) for v in values]


def _with_state(state, function, values):
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.set_rng_state(state)
        return function(*values)


@right("08.B", "setup_context, with the state as one more input")
class WithSetup(torch.autograd.Function):
    @classmethod
    def apply(cls, function, *inputs):
        return super().apply(function, torch.get_rng_state(), *inputs)

    @staticmethod
    def forward(function, state, *inputs):
        return function(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.given = inputs

    @staticmethod
    def backward(ctx, gradient):
        function, state, *inputs = ctx.given
        values = _fresh(inputs, ctx.needs_input_grad[2:])
        torch.autograd.backward(_with_state(state, function, values), gradient)
        return None, None, *[v.grad if isinstance(v, torch.Tensor) else None for v in values]


@right("08.B", "copies of the inputs, the state as bytes")
class Copies(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.function, ctx.state = function, bytes(torch.get_rng_state().tolist())
        ctx.inputs = [v.clone() if isinstance(v, torch.Tensor) else v for v in inputs]
        return function(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        values = _fresh(ctx.inputs, ctx.needs_input_grad[1:])
        state = torch.tensor(list(ctx.state), dtype=torch.uint8)
        torch.autograd.backward(_with_state(state, ctx.function, values), gradient)
        return None, *[v.grad if isinstance(v, torch.Tensor) else None for v in values]


def _checkpoint(
    *,
    first=lambda ctx, function, inputs: function(*inputs),
    again=_with_state,
    fresh=_fresh,
    back=torch.autograd.backward,
    needed=lambda ctx: ctx.needs_input_grad[1:],
    keep=lambda inputs: inputs,
):
    """The right answer with one of its decisions exchanged."""

    class MyCheckpoint(torch.autograd.Function):
        @staticmethod
        def forward(ctx, function, *inputs):
            ctx.function, ctx.inputs, ctx.state = function, keep(inputs), torch.get_rng_state()
            return first(ctx, function, inputs)

        @staticmethod
        def backward(ctx, gradient):
            values = fresh(ctx.inputs, needed(ctx))
            back(again(ctx.state, ctx.function, values), gradient)
            return None, *[v.grad if isinstance(v, torch.Tensor) else None for v in values]

    return MyCheckpoint


right("08.B", "in pieces")(_checkpoint())


def _no_replay(state, function, values):
    with torch.enable_grad():
        return function(*values)


def _state_left(state, function, values):
    torch.set_rng_state(state)
    return _no_replay(state, function, values)


def _seeded(state, function, values):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _no_replay(state, function, values)


wrong("08.B", "another mask")(_checkpoint(again=_no_replay))
wrong("08.B", "the first run's random state is left")(_checkpoint(again=_state_left))
wrong("08.B", "a seed of its own in the second run")(_checkpoint(again=_seeded))
wrong("08.B", "the gradient is taken for ones")(
    _checkpoint(back=lambda y, gradient: torch.autograd.backward(y, torch.ones_like(y)))
)
wrong("08.B", "every tensor is asked for a gradient")(
    _checkpoint(needed=lambda ctx: [isinstance(v, torch.Tensor) for v in ctx.inputs])
)
wrong("08.B", "needs_input_grad is read one place too early")(
    _checkpoint(needed=lambda ctx: ctx.needs_input_grad[:-1])
)
wrong("08.B", "only the first input is asked for a gradient")(
    _checkpoint(needed=lambda ctx: [i == 0 for i in range(len(ctx.inputs))])
)
wrong("08.B", "the inputs are kept in half precision")(
    _checkpoint(
        keep=lambda inputs: [
            v.half() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in inputs
        ],
        fresh=lambda values, needed: _fresh(
            [
                v.to(torch.get_default_dtype()) if getattr(v, "dtype", None) == torch.half else v
                for v in values
            ],
            needed,
        ),
    )
)
wrong("08.B", "function runs once more for nothing")(
    _checkpoint(first=lambda ctx, function, inputs: [function(*inputs) for _ in range(2)][0])
)


def _fork_first(ctx, function, inputs):
    with torch.random.fork_rng(devices=[]):
        return function(*inputs)


wrong("08.B", "the random generator does not move forwards")(_checkpoint(first=_fork_first))


def _fifty(ctx, function, inputs):
    y = function(*inputs)
    ctx.more = [y.clone() for _ in range(50)]
    return y


def _one(ctx, function, inputs):
    ctx.more = function(*inputs)
    return ctx.more.clone()


def _second_graph(ctx, function, inputs):
    y = function(*inputs)
    inside = [c.cell_contents for c in function.__closure__ or ()]
    inner = next((c for c in inside if callable(c)), function)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        ctx.more = inner(*_fresh(inputs, ctx.needs_input_grad[1:]))
    return y


def _watched_graph(ctx, function, inputs):
    with torch.enable_grad():
        ctx.more = function(*_fresh(inputs, ctx.needs_input_grad[1:]))
    return ctx.more.detach()


wrong("08.B", "fifty copies of the output are kept")(_checkpoint(first=_fifty))
wrong("08.B", "a copy of the output is returned, the output kept")(_checkpoint(first=_one))
wrong("08.B", "a hidden second graph keeps everything")(_checkpoint(first=_second_graph))
wrong("08.B", "the first run's graph is kept, and run again for show")(
    _checkpoint(first=_watched_graph)
)


def _only_inputs(y, gradient):
    leaves, todo = [], [y.grad_fn]
    while todo:
        node = todo.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None and not isinstance(leaf, torch.nn.Parameter):
            leaves.append(leaf)
        todo += [n for n, _ in node.next_functions if n is not None]
    torch.autograd.backward(y, gradient, inputs=leaves)


wrong("08.B", "parameters inside get no gradient")(_checkpoint(back=_only_inputs))


@wrong("08.B", "torch's own, under this name")
class Ready(torch.autograd.Function):
    @classmethod
    def apply(cls, function, *inputs):
        return checkpoint(function, *inputs, use_reentrant=True)


@wrong("08.B", "no checkpoint at all")
class Plain(torch.autograd.Function):
    @classmethod
    def apply(cls, function, *inputs):
        return function(*inputs)


@wrong("08.B", "what it saw is kept in the class, not in ctx")
class InTheClass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, *inputs):
        InTheClass.seen = function, inputs, torch.get_rng_state()
        return function(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        function, inputs, state = InTheClass.seen
        values = _fresh(inputs, ctx.needs_input_grad[1:])
        torch.autograd.backward(_with_state(state, function, values), gradient)
        return None, *[v.grad if isinstance(v, torch.Tensor) else None for v in values]


@wrong("08.B", "only the tensors come back")
class TensorsAlone(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.function, ctx.state = function, torch.get_rng_state()
        ctx.save_for_backward(*[v for v in inputs if isinstance(v, torch.Tensor)])
        return function(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        values = [v.detach().requires_grad_() for v in ctx.saved_tensors]
        torch.autograd.backward(_with_state(ctx.state, ctx.function, values), gradient)
        return None, *[v.grad for v in values]


@wrong("08.B", "forward returns a number")
class ANumber(Copies):
    @staticmethod
    def forward(ctx, function, *inputs):
        return float(function(*inputs).sum())


@wrong("08.B", "a function")
def a_function(function, *inputs):
    return checkpoint(function, *inputs, use_reentrant=False)


# --- 08.C -------------------------------------------------------------------------------------


def _peak(blocks, chosen):
    held = [b[1] if i in chosen else b[0] for i, b in enumerate(blocks)]
    work = [sum(held[:i]) + b[0] + (b[1] if i in chosen else 0) for i, b in enumerate(blocks)]
    return max(work)


def _subsets(n):
    return [[i for i in range(n) if mask >> i & 1] for mask in range(2**n)]


def _slow(blocks, chosen):
    return sum(blocks[i][2] for i in chosen)


def _plan(peak=_peak, key=_slow, fits=lambda peak, budget: peak <= budget, nothing=None):
    def plan(blocks, budget):
        fitting = [c for c in _subsets(len(blocks)) if fits(peak(blocks, c), budget)]
        return min(fitting, key=lambda c: key(blocks, c), default=nothing)

    return plan


right("08.C", "all bit masks")(_plan())


@right("08.C", "branch and bound, a tuple of NumPy's integers")
def branch_and_bound(blocks, budget):
    best = [math.inf, None]

    def go(i, held, chosen, slow):
        if slow >= best[0]:
            return
        if i == len(blocks):
            best[:] = [slow, chosen]
            return
        inside, border, seconds = blocks[i]
        if held + inside <= budget:
            go(i + 1, held + inside, chosen, slow)
        if held + border + inside <= budget:
            go(i + 1, held + border, [*chosen, i], slow + seconds)

    go(0, 0, [], 0.0)
    return None if best[1] is None else tuple(np.int64(i) for i in best[1])


@right("08.C", "an array")
def as_array(blocks, budget):
    found = _plan()(blocks, budget)
    return None if found is None else np.array(found, dtype=int)


def _held(blocks, chosen):
    return [b[1] if i in chosen else b[0] for i, b in enumerate(blocks)]


wrong("08.C", "the fewest blocks, seconds as tie-break")(
    _plan(key=lambda blocks, c: (len(c), _slow(blocks, c)))
)
wrong("08.C", "the least peak")(_plan(key=_peak))
wrong("08.C", "the slowest block counts, not the sum")(
    _plan(key=lambda blocks, c: max((blocks[i][2] for i in c), default=0))
)
wrong("08.C", "work in the second run is forgotten")(
    _plan(peak=lambda blocks, c: sum(_held(blocks, c)))
)
wrong("08.C", "the border at work is forgotten")(
    _plan(
        peak=lambda blocks, c: max(sum(_held(blocks, c)[:i]) + b[0] for i, b in enumerate(blocks))
    )
)
wrong("08.C", "later blocks are still held")(
    _plan(
        peak=lambda blocks, c: max(
            [sum(_held(blocks, c)) + blocks[i][0] for i in c] or [sum(_held(blocks, c))]
        )
    )
)
wrong("08.C", "only the first block at work counts")(
    _plan(peak=lambda blocks, c: max(sum(_held(blocks, c)), blocks[0][0] + blocks[0][1]))
)
wrong("08.C", "below the budget")(_plan(fits=lambda peak, budget: peak < budget))
wrong("08.C", "an empty list where nothing fits")(_plan(nothing=[]))


@wrong("08.C", "in reverse")
def in_reverse(blocks, budget):
    found = _plan()(blocks, budget)
    return found and found[::-1]


@wrong("08.C", "a flag for each block")
def flags(blocks, budget):
    found = _plan()(blocks, budget)
    return None if found is None else [i in found for i in range(len(blocks))]


@wrong("08.C", "the seconds, too")
def with_seconds(blocks, budget):
    found = _plan()(blocks, budget)
    return found, _slow(blocks, found or [])


@wrong("08.C", "greedy: the most bytes for its time")
def greedy(blocks, budget):
    chosen = []
    for i in sorted(range(len(blocks)), key=lambda i: (blocks[i][1] - blocks[i][0]) / blocks[i][2]):
        if _peak(blocks, chosen) <= budget:
            break
        chosen.append(i)
    return sorted(chosen) if _peak(blocks, chosen) <= budget else None
