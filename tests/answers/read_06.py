"""Wrong answers to chapter 06's exercises, by somebody who has read only their texts."""

import torch

from answers import wrong

# ---- A


def _worst(lost):
    return max(lost, key=lost.get)


@wrong("06.A", "read only: the layer that loses least")
def least(evaluate, names):
    return _worst({name: evaluate({name}) for name in names})


@wrong("06.A", "read only: without the sign, a layer that helps much counts as bad")
def no_sign(evaluate, names):
    return _worst({name: abs(evaluate(set()) - evaluate({name})) for name in names})


@wrong("06.A", "read only: all but one quantized, instead of one alone")
def all_but_one(evaluate, names):
    everything = set(names)
    return _worst({n: evaluate(everything - {n}) - evaluate(everything) for n in names})


@wrong("06.A", "read only: a set of letters, right for names of one letter")
def letters(evaluate, names):
    return _worst({name: evaluate(set()) - evaluate(set(name)) for name in names})


@wrong("06.A", "read only: layers add up, each is measured on top of those before it")
def on_top(evaluate, names):
    lost, done = {}, set()
    for name in names:
        before = evaluate(set(done))
        done.add(name)
        lost[name] = before - evaluate(set(done))
    return _worst(lost)


@wrong("06.A", "read only: one set for all calls, never emptied")
def one_set(evaluate, names):
    lost, done = {}, set()
    for name in names:
        done.add(name)
        lost[name] = evaluate(set()) - evaluate(done)
    return _worst(lost)


@wrong("06.A", "read only: whole points only, the first of those that then are equal")
def whole_points(evaluate, names):
    return _worst({n: round(100 * (evaluate(set()) - evaluate({n}))) for n in names})


@wrong("06.A", "read only: everything quantized against one alone")
def against_everything(evaluate, names):
    return _worst({n: evaluate({n}) - evaluate(set(names)) for n in names})


@wrong("06.A", "read only: the last layer of the list is not looked at")
def without_last(evaluate, names):
    names = list(names)
    return _worst({n: evaluate(set()) - evaluate({n}) for n in names[:-1] or names})


@wrong("06.A", "read only: the first layer that loses a tenth, as in the example")
def first_tenth(evaluate, names):
    lost = {n: evaluate(set()) - evaluate({n}) for n in names}
    return next((n for n in names if lost[n] >= 0.1), _worst(lost))


# ---- B


class _Base(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, scale, low, high):
        q = torch.round(w / scale)
        ctx.save_for_backward((q >= low) & (q <= high))
        return q.clamp(low, high) * scale

    @staticmethod
    def backward(ctx, gradient):
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None, None


@wrong("06.B", "read only: the gradient passes everywhere")
class Everywhere(_Base):
    @staticmethod
    def backward(ctx, gradient):
        return gradient, None, None, None


@wrong("06.B", "read only: the gradient is divided by the scale")
class DividedGradient(_Base):
    @staticmethod
    def forward(ctx, w, scale, low, high):
        ctx.scale = scale
        return _Base.forward(ctx, w, scale, low, high)

    @staticmethod
    def backward(ctx, gradient):
        (inside,) = ctx.saved_tensors
        return gradient * inside / ctx.scale, None, None, None


@wrong("06.B", "read only: no gradient on the ends of the range, where nothing was clamped")
class StrictEnds(_Base):
    @staticmethod
    def forward(ctx, w, scale, low, high):
        q = torch.round(w / scale)
        ctx.save_for_backward((q > low) & (q < high))
        return q.clamp(low, high) * scale


@wrong("06.B", "read only: the weights, not the integers, are held against low and high")
class UnscaledMask(_Base):
    @staticmethod
    def forward(ctx, w, scale, low, high):
        ctx.save_for_backward((w >= low) & (w <= high))
        return torch.round(w / scale).clamp(low, high) * scale


@wrong("06.B", "read only: clamps the weights before they are divided")
class ClampedBefore(_Base):
    @staticmethod
    def forward(ctx, w, scale, low, high):
        ctx.save_for_backward((w >= low) & (w <= high))
        return torch.round(w.clamp(low, high) / scale) * scale


@wrong("06.B", "read only: gives integers, not multiplied by the scale")
class Integers(_Base):
    @staticmethod
    def forward(ctx, w, scale, low, high):
        return _Base.forward(ctx, w, scale, low, high) / scale


@wrong("06.B", "read only: rounded down")
class RoundedDown(_Base):
    @staticmethod
    def forward(ctx, w, scale, low, high):
        q = torch.floor(w / scale)
        ctx.save_for_backward((q >= low) & (q <= high))
        return q.clamp(low, high) * scale


@wrong("06.B", "read only: rounded towards zero after a half was added, wrong for negative weights")
class Truncated(_Base):
    @staticmethod
    def forward(ctx, w, scale, low, high):
        q = torch.trunc(w / scale + 0.5)
        ctx.save_for_backward((q >= low) & (q <= high))
        return q.clamp(low, high) * scale


@wrong("06.B", "read only: only the upper end stops the gradient")
class UpperOnly(_Base):
    @staticmethod
    def forward(ctx, w, scale, low, high):
        q = torch.round(w / scale)
        ctx.save_for_backward(q <= high)
        return q.clamp(low, high) * scale


@wrong("06.B", "read only: the magnitude against high, wrong for the lower end")
class Magnitude(_Base):
    @staticmethod
    def forward(ctx, w, scale, low, high):
        q = torch.round(w / scale)
        ctx.save_for_backward(q.abs() <= high)
        return q.clamp(low, high) * scale


@wrong("06.B", "read only: symmetric, low is -high")
class Symmetric(_Base):
    @staticmethod
    def forward(ctx, w, scale, low, high):
        return _Base.forward(ctx, w, scale, -high, high)


@wrong("06.B", "read only: the mask is kept on the class, a second call overwrites the first's")
class OnTheClass(_Base):
    mask = None

    @staticmethod
    def forward(ctx, w, scale, low, high):
        q = torch.round(w / scale)
        OnTheClass.mask = (q >= low) & (q <= high)
        return q.clamp(low, high) * scale

    @staticmethod
    def backward(ctx, gradient):
        if OnTheClass.mask.shape != gradient.shape:
            return gradient, None, None, None
        return gradient * OnTheClass.mask, None, None, None


@wrong("06.B", "read only: the mask instead of the gradient, right for a gradient of ones")
class MaskAlone(_Base):
    @staticmethod
    def backward(ctx, gradient):
        (inside,) = ctx.saved_tensors
        return inside.to(gradient.dtype), None, None, None


@wrong("06.B", "read only: changes the weights in place")
class InPlace(_Base):
    @staticmethod
    def forward(ctx, w, scale, low, high):
        out = _Base.forward(ctx, w, scale, low, high)
        w.data.copy_(out)
        return out


@wrong("06.B", "read only: the gradient stops where rounding moved the weight by much")
class FarFromGrid(_Base):
    @staticmethod
    def forward(ctx, w, scale, low, high):
        out = _Base.forward(ctx, w, scale, low, high)
        ctx.save_for_backward((w - out).abs() < 0.45 * scale)
        return out


@wrong("06.B", "read only: scale 0.5, whatever is given")
class AlwaysHalf(_Base):
    @staticmethod
    def forward(ctx, w, scale, low, high):
        return _Base.forward(ctx, w, 0.5, low, high)


# ---- C


@wrong("06.C", "read only: the mean over the channels")
def over_channels(weight, rounded, bias, inputs):
    error = inputs @ weight.T - inputs @ rounded.T
    return bias + error.mean(1).mean()


@wrong("06.C", "read only: the mean of each output, without the exact layer's")
def only_rounded(weight, rounded, bias, inputs):
    return bias - (inputs @ rounded.T).mean(0)


@wrong("06.C", "read only: twice what was lost")
def twice(weight, rounded, bias, inputs):
    return bias + 2 * (inputs @ (weight - rounded).T).mean(0)


@wrong("06.C", "read only: weights and inputs not transposed")
def not_transposed(weight, rounded, bias, inputs):
    return bias + (inputs @ (weight - rounded)).mean(0)


@wrong("06.C", "read only: divides by one less")
def one_less(weight, rounded, bias, inputs):
    return bias + (inputs @ (weight - rounded).T).sum(0) / max(len(inputs) - 1, 1)


@wrong("06.C", "read only: the whole outputs instead of their mean")
def not_averaged(weight, rounded, bias, inputs):
    return bias + inputs @ (weight - rounded).T


@wrong("06.C", "read only: scales the bias by the ratio of the means")
def by_ratio(weight, rounded, bias, inputs):
    return bias * (inputs @ weight.T).mean(0) / (inputs @ rounded.T).mean(0)
