"""Answers to chapter 06's exercises."""

import itertools

import numpy as np
import torch

from answers import right, wrong


@right("06.A", "a loop, a frozen set, a NumPy string")
def by_loop(evaluate, names):
    before = evaluate(frozenset())
    lost = np.array([before - evaluate(frozenset([name])) for name in names])
    return np.array(names)[lost.argmax()]


@right("06.A", "the lowest accuracy, without asking for the untouched network")
def lowest(evaluate, names):
    return min(names, key=lambda name: evaluate({name}))


wrong("06.A", "the largest change, a gain too")(
    lambda evaluate, names: max(names, key=lambda n: abs(evaluate(set()) - evaluate({n})))
)
wrong("06.A", "the layer that loses least")(
    lambda evaluate, names: max(names, key=lambda n: evaluate({n}))
)
wrong("06.A", "the first that loses more than 0.1")(
    lambda evaluate, names: next(
        (n for n in names if evaluate(set()) - evaluate({n}) > 0.1), names[0]
    )
)
wrong("06.A", "all but one are quantized")(
    lambda evaluate, names: max(names, key=lambda n: evaluate(set(names) - {n}))
)
wrong("06.A", "one after the other, added up")(
    lambda evaluate, names: max(
        range(len(names)), key=lambda i: evaluate(set(names[:i])) - evaluate(set(names[: i + 1]))
    )
)
wrong("06.A", "neighbours together")(
    lambda evaluate, names: min(
        names, key=lambda n: evaluate({n, names[(names.index(n) + 1) % len(names)]})
    )
)
wrong("06.A", "the first name")(lambda evaluate, names: names[0])
wrong("06.A", "the loss in place of the name")(
    lambda evaluate, names: max(evaluate(set()) - evaluate({n}) for n in names)
)


def _function(forward, backward):
    return type(
        "Rounding",
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )


def _forward(inside=lambda w, steps, s, low, high: (steps >= low) & (steps <= high)):
    def forward(ctx, w, scale, low, high):
        steps = torch.round(w / scale)
        ctx.save_for_backward(inside(w, steps, scale, low, high))
        return steps.clamp(low, high) * scale

    return forward


def _backward(ctx, gradient):
    return gradient * ctx.saved_tensors[0], None, None, None


def _by_attribute(ctx, w, scale, low, high):
    steps = (w / scale).round()
    ctx.inside = (steps == steps.clamp(low, high)).to(w.dtype)
    return steps.clamp(low, high).mul(scale)


right("06.B", "the mask as numbers in an attribute")(
    _function(_by_attribute, lambda ctx, g: (g.mul(ctx.inside), None, None, None))
)
right("06.B", "the gradient copied and set to 0 outside")(
    _function(
        _forward(),
        lambda ctx, g: (
            torch.where(ctx.saved_tensors[0], g, torch.zeros_like(g)),
            None,
            None,
            None,
        ),
    )
)


def _in_place(ctx, w, scale, low, high):
    w.data.div_(scale).round_()
    ctx.save_for_backward((w >= low) & (w <= high))
    return w.detach().clamp(low, high) * scale


_LAST = []


def _outside_memory(ctx, w, scale, low, high):
    steps = torch.round(w / scale)
    _LAST.append((steps >= low) & (steps <= high))
    return steps.clamp(low, high) * scale


wrong("06.B", "w is overwritten")(_function(_in_place, _backward))
wrong("06.B", "the mask is kept outside ctx")(
    _function(_outside_memory, lambda ctx, g: (g * _LAST[-1], None, None, None))
)
wrong("06.B", "inside as the number itself, before rounding")(
    _function(_forward(lambda w, steps, s, low, high: (w >= low * s) & (w <= high * s)), _backward)
)
wrong("06.B", "the ends are outside")(
    _function(_forward(lambda w, steps, s, low, high: (steps > low) & (steps < high)), _backward)
)
wrong("06.B", "no mask")(_function(_forward(), lambda ctx, g: (g, None, None, None)))
wrong("06.B", "only clamped above")(
    _function(_forward(lambda w, steps, s, low, high: steps <= high), _backward)
)
wrong("06.B", "the gradient times the scale")(
    _function(_forward(), lambda ctx, g: (g * ctx.saved_tensors[0] * 0.5, None, None, None))
)
wrong("06.B", "the gradient of rounding, which is 0")(
    _function(_forward(), lambda ctx, g: (g * 0, None, None, None))
)
wrong("06.B", "one gradient for four inputs")(
    _function(_forward(), lambda ctx, g: g * ctx.saved_tensors[0])
)


def _floored(ctx, w, scale, low, high):
    steps = torch.floor(w / scale)
    ctx.save_for_backward((steps >= low) & (steps <= high))
    return steps.clamp(low, high) * scale


def _integers(ctx, w, scale, low, high):
    steps = torch.round(w / scale)
    ctx.save_for_backward((steps >= low) & (steps <= high))
    return steps.clamp(low, high)


wrong("06.B", "rounded down")(_function(_floored, _backward))
wrong("06.B", "the integers, not times the scale")(_function(_integers, _backward))


@wrong("06.B", "a function, not a class")
def plain_function(w, scale, low, high):
    return torch.round(w / scale).clamp(low, high) * scale


def _greedy(weights, accuracy, floor, worth, widths=(2, 3, 4), start=8):
    current = dict.fromkeys(weights, start)
    if accuracy(current) < floor:
        return None
    while True:
        now, steps = accuracy(current), []
        for name, bits in current.items():
            for fewer in (b for b in widths if b < bits):
                value = accuracy(current | {name: fewer})
                if value >= floor:
                    steps.append((worth(weights[name], bits - fewer, now - value), name, fewer))
        if not steps:
            return current
        _, name, fewer = max(steps)
        current[name] = fewer


def _ratio(weights, saved, cost):
    return weights * saved / max(cost, 1e-9)


@right("06.C", "NumPy's integers")
def numpy_integers(weights, accuracy, floor):
    found = _greedy(weights, accuracy, floor, _ratio)
    return None if found is None else {name: np.int64(b) for name, b in found.items()}


@right("06.C", "the text's greedy, then swaps of one layer up and one down")
def with_swaps(weights, accuracy, floor):
    calls = [0]

    def asked(bits):
        calls[0] += 1
        return accuracy(bits)

    current = _greedy(weights, asked, floor, _ratio)
    if current is None or len(weights) < 2:
        return current
    for up, down in itertools.permutations(weights, 2):
        for more, fewer in itertools.product((3, 4, 8), (2, 3, 4)):
            other = current | {up: more, down: fewer}
            less = sum(weights[n] * (other[n] - current[n]) for n in weights) < 0
            if less and calls[0] < 245 and asked(other) >= floor:
                current = other
    return current


def _every(weights):
    product = itertools.product((2, 3, 4, 8), repeat=len(weights))
    return (dict(zip(weights, c, strict=True)) for c in product)


@wrong("06.C", "losses alone are added up, and the sum is never tried")
def added_up(weights, accuracy, floor):
    eight = dict.fromkeys(weights, 8)
    top = accuracy(eight)
    cost = {(n, b): top - accuracy(eight | {n: b}) for n in weights for b in (2, 3, 4)}
    every = _every(weights)
    fitting = [c for c in every if top - sum(cost.get((n, b), 0) for n, b in c.items()) >= floor]
    return min(fitting, key=lambda c: sum(weights[n] * b for n, b in c.items()), default=None)


@wrong("06.C", "every choice is tried")
def exhaustive(weights, accuracy, floor):
    every = _every(weights)
    fitting = [c for c in every if accuracy(c) >= floor]
    return min(fitting, key=lambda c: sum(weights[n] * b for n, b in c.items()), default=None)


wrong("06.C", "the step that costs least")(
    lambda w, a, f: _greedy(w, a, f, lambda weights, saved, cost: -cost)
)
wrong("06.C", "the step that saves most")(
    lambda w, a, f: _greedy(w, a, f, lambda weights, saved, cost: weights * saved)
)
wrong("06.C", "the layers' sizes are not read")(
    lambda w, a, f: _greedy(w, a, f, lambda weights, saved, cost: saved / max(cost, 1e-9))
)
wrong("06.C", "4 and 8 bits alone")(lambda w, a, f: _greedy(w, a, f, _ratio, widths=(4,)))
wrong("06.C", "one width for all layers")(
    lambda w, a, f: next(
        (dict.fromkeys(w, b) for b in (2, 3, 4, 8) if a(dict.fromkeys(w, b)) >= f), None
    )
)
wrong("06.C", "8 bits everywhere")(
    lambda w, a, f: dict.fromkeys(w, 8) if a(dict.fromkeys(w, 8)) >= f else None
)
wrong("06.C", "above the floor, not on it")(lambda w, a, f: _greedy(w, a, f + 1e-9, _ratio))
wrong("06.C", "8 bits where the floor is out of reach")(
    lambda w, a, f: _greedy(w, a, f, _ratio) or dict.fromkeys(w, 8)
)
wrong("06.C", "a little below the floor")(lambda w, a, f: _greedy(w, a, f - 0.004, _ratio))
wrong("06.C", "5 and 6 bits, too")(lambda w, a, f: _greedy(w, a, f, _ratio, widths=(2, 3, 4, 5, 6)))
