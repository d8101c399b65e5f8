"""Wrong answers to chapter 08's exercises, by somebody who has read only their texts."""

import itertools

import torch

from answers import wrong

# ---- A


def _bytes(widths, batch, activations):
    parameters = sum(a * b + b for a, b in zip(widths[:-1], widths[1:], strict=True))
    return 4 * (3 * parameters + activations)


@wrong("08.A", "read only: the last output counts, too")
def last_output(widths, batch):
    return _bytes(widths, batch, batch * sum(widths))


@wrong("08.A", "read only: the batch does not count")
def no_batch(widths, batch):
    return _bytes(widths, batch, batch * sum(widths[1:-1]))


@wrong("08.A", "read only: the batch does not count, the last output does")
def outputs_only(widths, batch):
    return _bytes(widths, batch, batch * sum(widths[1:]))


@wrong("08.A", "read only: hidden layers count twice, before and after the ReLU")
def before_and_after(widths, batch):
    return _bytes(widths, batch, batch * (widths[0] + 2 * sum(widths[1:-1])))


@wrong("08.A", "read only: the first two widths, right for two layers")
def first_two(widths, batch):
    return _bytes(widths, batch, batch * (widths[0] + widths[1]))


@wrong("08.A", "read only: the first two widths if there is a hidden layer, one layer is right too")
def first_two_at_most(widths, batch):
    return _bytes(widths, batch, batch * sum(widths[:-1][:2]))


@wrong("08.A", "read only: equal widths count once")
def equal_once(widths, batch):
    return _bytes(widths, batch, batch * sum(set(widths[:-1])))


@wrong("08.A", "read only: all but the narrowest width")
def but_the_narrowest(widths, batch):
    return _bytes(widths, batch, batch * (sum(widths) - min(widths)))


@wrong("08.A", "read only: always three rows, as in the example")
def three_rows(widths, batch):
    return _bytes(widths, batch, 3 * sum(widths[:-1]))


@wrong("08.A", "read only: only the widest activation is alive")
def widest(widths, batch):
    return _bytes(widths, batch, batch * (widths[0] + max(widths[1:-1], default=0)))


@wrong("08.A", "read only: one number an activation for the ReLU's mask, on top")
def mask_on_top(widths, batch):
    return _bytes(widths, batch, batch * sum(widths[:-1]) + batch * sum(widths[2:-1]))


@wrong("08.A", "read only: the gradients count, too")
def gradients_too(widths, batch):
    parameters = sum(a * b + b for a, b in zip(widths[:-1], widths[1:], strict=True))
    return _bytes(widths, batch, batch * sum(widths[:-1]) + parameters)


# ---- B


def _needs(ctx, inputs):
    return [
        torch.is_tensor(t) and need
        for t, need in zip(inputs, ctx.needs_input_grad[1:], strict=True)
    ]


def _fresh(ctx, inputs):
    return [
        t.detach().requires_grad_(need) if torch.is_tensor(t) else t
        for t, need in zip(inputs, _needs(ctx, inputs), strict=True)
    ]


def _give(ctx, again):
    return tuple(
        t.grad if torch.is_tensor(t) and need else None
        for t, need in zip(again, _needs(ctx, again), strict=True)
    )


class _Base(torch.autograd.Function):
    """A right checkpoint, as far as the text tells."""

    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.function, ctx.state = function, torch.get_rng_state()
        ctx.spots = [i for i, t in enumerate(inputs) if torch.is_tensor(t)]
        ctx.others = [None if torch.is_tensor(t) else t for t in inputs]
        ctx.save_for_backward(*[inputs[i] for i in ctx.spots])
        with torch.no_grad():
            return function(*inputs)

    @staticmethod
    def inputs(ctx):
        inputs = list(ctx.others)
        for i, t in zip(ctx.spots, ctx.saved_tensors, strict=True):
            inputs[i] = t
        return inputs

    @staticmethod
    def backward(ctx, gradient):
        again = _fresh(ctx, _Base.inputs(ctx))
        now = torch.get_rng_state()
        torch.set_rng_state(ctx.state)
        with torch.enable_grad():
            out = ctx.function(*again)
        torch.set_rng_state(now)
        torch.autograd.backward(out, gradient)
        return None, *_give(ctx, again)


@wrong("08.B", "read only: no random state, another dropout the second time")
class NoState(_Base):
    @staticmethod
    def backward(ctx, gradient):
        ctx.state = torch.get_rng_state()
        return _Base.backward(ctx, gradient)


@wrong("08.B", "read only: the generator is left where the second run left it")
class LeftThere(_Base):
    @staticmethod
    def backward(ctx, gradient):
        again = _fresh(ctx, _Base.inputs(ctx))
        torch.set_rng_state(ctx.state)
        with torch.enable_grad():
            out = ctx.function(*again)
        torch.autograd.backward(out, gradient)
        return None, *_give(ctx, again)


@wrong("08.B", "read only: the state is taken after the forward run")
class LateState(_Base):
    @staticmethod
    def forward(ctx, function, *inputs):
        out = _Base.forward(ctx, function, *inputs)
        ctx.state = torch.get_rng_state()
        return out


@wrong("08.B", "read only: sets the seed to 0 before both runs")
class SeedZero(_Base):
    @staticmethod
    def forward(ctx, function, *inputs):
        torch.manual_seed(0)
        return _Base.forward(ctx, function, *inputs)


@wrong("08.B", "read only: gradients of the inputs only, parameters inside get none")
class InputsOnly(_Base):
    @staticmethod
    def backward(ctx, gradient):
        again = _fresh(ctx, _Base.inputs(ctx))
        now = torch.get_rng_state()
        torch.set_rng_state(ctx.state)
        with torch.enable_grad():
            out = ctx.function(*again)
        torch.set_rng_state(now)
        wanted = [t for t, need in zip(again, _needs(ctx, again), strict=True) if need]
        found = iter(torch.autograd.grad(out, wanted, gradient, allow_unused=True))
        return None, *[next(found) if need else None for need in _needs(ctx, again)]


@wrong("08.B", "read only: only the first tensor gets a gradient")
class FirstOnly(_Base):
    @staticmethod
    def backward(ctx, gradient):
        grads = list(_Base.backward(ctx, gradient))
        seen = False
        for i, g in enumerate(grads):
            grads[i] = None if seen else g
            seen = seen or g is not None
        return tuple(grads)


@wrong("08.B", "read only: runs forwards with autograd and keeps the output")
class KeepsOutput(_Base):
    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.again = _fresh(ctx, inputs)
        with torch.enable_grad():
            ctx.out = function(*ctx.again)
        return ctx.out.detach()

    @staticmethod
    def backward(ctx, gradient):
        torch.autograd.backward(ctx.out, gradient)
        return None, *_give(ctx, ctx.again)


@wrong("08.B", "read only: a copy of the output is held")
class CopyOfOutput(_Base):
    @staticmethod
    def forward(ctx, function, *inputs):
        out = _Base.forward(ctx, function, *inputs)
        ctx.copy = out.clone()
        return out


@wrong("08.B", "read only: runs twice forwards")
class TwiceForwards(_Base):
    @staticmethod
    def forward(ctx, function, *inputs):
        state = torch.get_rng_state()
        with torch.no_grad():
            function(*inputs)
        torch.set_rng_state(state)
        return _Base.forward(ctx, function, *inputs)


@wrong("08.B", "read only: every input must be a tensor of floats")
class FloatsOnly(_Base):
    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.function, ctx.state = function, torch.get_rng_state()
        ctx.save_for_backward(*inputs)
        with torch.no_grad():
            return function(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        again = [t.detach().requires_grad_(True) for t in ctx.saved_tensors]
        now = torch.get_rng_state()
        torch.set_rng_state(ctx.state)
        with torch.enable_grad():
            out = ctx.function(*again)
        torch.set_rng_state(now)
        torch.autograd.backward(out, gradient)
        return None, *[t.grad for t in again]


@wrong("08.B", "read only: every tensor shall need a gradient inside, those of integers too")
class TensorsOfIntegers(_Base):
    @staticmethod
    def backward(ctx, gradient):
        again = [
            t.detach().requires_grad_(True) if torch.is_tensor(t) else t for t in _Base.inputs(ctx)
        ]
        now = torch.get_rng_state()
        torch.set_rng_state(ctx.state)
        with torch.enable_grad():
            out = ctx.function(*again)
        torch.set_rng_state(now)
        torch.autograd.backward(out, gradient)
        return None, *[t.grad if torch.is_tensor(t) else None for t in again]


@wrong("08.B", "read only: needs_input_grad read without the entry for function, one off")
class OneOff(_Base):
    @staticmethod
    def backward(ctx, gradient):
        inputs = _Base.inputs(ctx)
        pairs = zip(ctx.needs_input_grad, inputs, strict=False)
        needs = [n and torch.is_tensor(t) for n, t in pairs]
        again = [
            t.detach().requires_grad_(n and t.is_floating_point()) if torch.is_tensor(t) else t
            for t, n in zip(inputs, needs, strict=True)
        ]
        now = torch.get_rng_state()
        torch.set_rng_state(ctx.state)
        with torch.enable_grad():
            out = ctx.function(*again)
        torch.set_rng_state(now)
        if out.requires_grad:
            torch.autograd.backward(out, gradient)
        return None, *[t.grad if torch.is_tensor(t) else None for t in again]


@wrong("08.B", "read only: what went in is kept on the class, a second checkpoint overwrites it")
class OnTheClass(_Base):
    kept = None

    @staticmethod
    def forward(ctx, function, *inputs):
        OnTheClass.kept = (function, inputs, torch.get_rng_state())
        with torch.no_grad():
            return function(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        function, inputs, state = OnTheClass.kept
        again = [
            t.detach().requires_grad_(t.is_floating_point()) if torch.is_tensor(t) else t
            for t in inputs
        ]
        now = torch.get_rng_state()
        torch.set_rng_state(state)
        with torch.enable_grad():
            out = function(*again)
        torch.set_rng_state(now)
        torch.autograd.backward(out, gradient)
        found = [t.grad if torch.is_tensor(t) else None for t in again]
        wanted = ctx.needs_input_grad[1:]
        return None, *[g if n else None for g, n in zip(found, wanted, strict=True)]


@wrong("08.B", "read only: the incoming gradient is taken for ones")
class Ones(_Base):
    @staticmethod
    def backward(ctx, gradient):
        return _Base.backward(ctx, torch.ones_like(gradient))


@wrong("08.B", "read only: one more random number is drawn after the backward pass")
class OneMoreNumber(_Base):
    @staticmethod
    def backward(ctx, gradient):
        grads = _Base.backward(ctx, gradient)
        torch.rand(1)
        return grads


@wrong("08.B", "read only: leaves get their gradient twice")
class GivenTwice(_Base):
    @staticmethod
    def backward(ctx, gradient):
        inputs = _Base.inputs(ctx)
        again = _fresh(ctx, inputs)
        now = torch.get_rng_state()
        torch.set_rng_state(ctx.state)
        with torch.enable_grad():
            out = ctx.function(*again)
            torch.set_rng_state(now)
            torch.autograd.backward(out, gradient)
        for t, a in zip(inputs, again, strict=True):
            if torch.is_tensor(t) and t.is_leaf and t.requires_grad and a.grad is not None:
                t.grad = a.grad.clone() if t.grad is None else t.grad + a.grad
        return None, *_give(ctx, again)


# ---- C


def _sets(n):
    for k in range(n + 1):
        yield from itertools.combinations(range(n), k)


def _peak(blocks, chosen, *, border=True, last=False):
    held = peak = 0
    for i, (keeps, edge, _) in enumerate(blocks):
        now = held + keeps
        now += edge if i in chosen and border else 0
        peak = now if last else max(peak, now)
        held += edge if i in chosen else keeps
    return peak


def _plan(blocks, budget, *, value=None, fits=None, **options):
    fits = fits or (lambda peak, budget: peak <= budget)
    value = value or (lambda chosen: sum(blocks[i][2] for i in chosen))
    good = [s for s in _sets(len(blocks)) if fits(_peak(blocks, s, **options), budget)]
    return list(min(good, key=value)) if good else None


@wrong("08.C", "read only: the budget itself is too much")
def strict_limit(blocks, budget):
    return _plan(blocks, budget, fits=lambda peak, budget: peak < budget)


@wrong("08.C", "read only: a checkpointed block's border is forgotten while it works")
def no_border(blocks, budget):
    return _plan(blocks, budget, border=False)


@wrong("08.C", "read only: only the last block is looked at")
def last_block(blocks, budget):
    return _plan(blocks, budget, last=True)


@wrong("08.C", "read only: the fewest blocks instead of the least time")
def fewest(blocks, budget):
    return _plan(blocks, budget, value=len)


@wrong("08.C", "read only: the lowest peak instead of the least time")
def lowest_peak(blocks, budget):
    return _plan(blocks, budget, value=lambda s: _peak(blocks, s))


@wrong("08.C", "read only: an empty list where nothing fits")
def empty_list(blocks, budget):
    return _plan(blocks, budget) or []


@wrong("08.C", "read only: everything checkpointed where nothing fits")
def everything(blocks, budget):
    found = _plan(blocks, budget)
    return list(range(len(blocks))) if found is None else found


@wrong("08.C", "read only: None where nothing needs to be done")
def none_for_nothing(blocks, budget):
    return _plan(blocks, budget) or None


@wrong("08.C", "read only: the amount held after the forward pass, not the peak")
def after_forward(blocks, budget):
    good = [
        s
        for s in _sets(len(blocks))
        if sum(b[1] if i in s else b[0] for i, b in enumerate(blocks)) <= budget
    ]
    return list(min(good, key=lambda s: sum(blocks[i][2] for i in s))) if good else None


@wrong("08.C", "read only: greedy, the cheapest block first until it fits")
def greedy(blocks, budget):
    chosen = []
    for i in sorted(range(len(blocks)), key=lambda i: blocks[i][2]):
        if _peak(blocks, chosen) <= budget:
            break
        chosen.append(i)
    return sorted(chosen) if _peak(blocks, chosen) <= budget else None


@wrong("08.C", "read only: the first blocks until it fits")
def first_ones(blocks, budget):
    for n in range(len(blocks) + 1):
        if _peak(blocks, range(n)) <= budget:
            return list(range(n))
    return None


@wrong("08.C", "read only: not more than two blocks")
def at_most_two(blocks, budget):
    good = [s for s in _sets(len(blocks)) if len(s) < 3 and _peak(blocks, s) <= budget]
    return list(min(good, key=lambda s: sum(blocks[i][2] for i in s))) if good else None


@wrong("08.C", "read only: in the order of their seconds, not sorted")
def by_seconds(blocks, budget):
    found = _plan(blocks, budget)
    return found and sorted(found, key=lambda i: blocks[i][2])


@wrong("08.C", "read only: whole seconds only")
def whole_seconds(blocks, budget):
    return _plan(blocks, budget, value=lambda s: sum(int(blocks[i][2]) for i in s))


@wrong("08.C", "read only: the blocks behind are held, too, the order is turned")
def turned(blocks, budget):
    found = _plan(blocks[::-1], budget)
    return found and sorted(len(blocks) - 1 - i for i in found)
