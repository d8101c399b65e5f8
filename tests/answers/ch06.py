"""Answers to chapter 06's exercises."""

import numpy as np
import torch
import torch.nn.functional as F

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


def _means(weight, rounded, bias, inputs):
    exact = F.linear(inputs, weight, bias).mean(0)
    return exact, F.linear(inputs, rounded).mean(0)


@right("06.C", "the difference of two means")
def two_means(weight, rounded, bias, inputs):
    exact, without = _means(weight, rounded, bias, inputs)
    return exact - without


@right("06.C", "the mean input first, in NumPy")
def mean_input(weight, rounded, bias, inputs):
    lost = np.asarray(weight) - np.asarray(rounded)
    return np.asarray(bias) + lost @ np.asarray(inputs).mean(0)


@right("06.C", "loops over plain numbers")
def by_loops(weight, rounded, bias, inputs):
    found = []
    for w, r, b in zip(weight.tolist(), rounded.tolist(), bias.tolist(), strict=True):
        errors = [
            sum((p - q) * v for p, q, v in zip(w, r, x, strict=True)) for x in inputs.tolist()
        ]
        found.append(b + sum(errors) / len(errors))
    return found


@right("06.C", "einsum")
def by_einsum(weight, rounded, bias, inputs):
    return bias + torch.einsum("oi,ni->o", weight - rounded, inputs) / len(inputs)


wrong("06.C", "the old bias is lost")(lambda w, r, b, x: (x @ (w - r).T).mean(0))
wrong("06.C", "the rounded layer already has the bias")(
    lambda w, r, b, x: F.linear(x, w, b).mean(0) - F.linear(x, r, b).mean(0)
)
wrong("06.C", "the median of the errors")(lambda w, r, b, x: b + (x @ (w - r).T).median(0).values)
wrong("06.C", "the first input only")(lambda w, r, b, x: b + (x[:1] @ (w - r).T).mean(0))
wrong("06.C", "rounds the bias, too")(lambda w, r, b, x: (b + (x @ (w - r).T).mean(0)).round())
wrong("06.C", "absolute errors")(lambda w, r, b, x: b + (x @ (w - r).T).abs().mean(0))
wrong("06.C", "mean over inputs and channels of the inputs")(
    lambda w, r, b, x: b + (x.mean() * (w - r)).sum(1)
)
wrong("06.C", "keeps the dimension of the inputs")(
    lambda w, r, b, x: b + (x @ (w - r).T).mean(0, keepdim=True)
)
