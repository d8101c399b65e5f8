"""Answers to the exercises of chapter 05."""

import math
from fractions import Fraction

import numpy as np
import torch

from answers import right, wrong


def _grid(
    scale=lambda low, high, qmin, qmax: (high - low) / (qmax - qmin) or 1.0,
    zero=lambda low, high, qmin, qmax, scale: round(qmin - low / scale),
    widen=lambda low, high: (min(low, 0.0), max(high, 0.0)),
):
    """The right answer, with one of its lines exchanged."""

    def scale_and_zero_point(low, high, qmin, qmax):
        low, high = widen(low, high)
        s = scale(low, high, qmin, qmax)
        return s, zero(low, high, qmin, qmax, s)

    return scale_and_zero_point


right("05.A", "half upwards")(
    _grid(zero=lambda low, high, qmin, qmax, s: math.floor(qmin - low / s + 0.5))
)
right("05.A", "from the upper end")(
    _grid(zero=lambda low, high, qmin, qmax, s: round(qmax - high / s))
)


@right("05.A", "NumPy, the scale in 32 bits, as a list")
def numpy_pair(low, high, qmin, qmax):
    scale, zero = _grid()(low, high, qmin, qmax)
    return [np.float32(scale), np.int64(zero)]


@right("05.A", "tensors")
def tensor_pair(low, high, qmin, qmax):
    low, high = (torch.tensor(v, dtype=torch.float64) for v in (min(low, 0), max(high, 0)))
    scale = (high - low) / (qmax - qmin)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, (qmin - low / scale).round().clamp(qmin, qmax).to(torch.int32)


@right("05.A", "fractions")
def fractions(low, high, qmin, qmax):
    low, high = Fraction(min(low, 0.0)), Fraction(max(high, 0.0))
    scale = (high - low) / (qmax - qmin) or Fraction(1)
    return scale, round(qmin - low / scale)


wrong("05.A", "counted from 0")(_grid(zero=lambda low, high, qmin, qmax, s: round(-low / s)))
wrong("05.A", "cut off")(_grid(zero=lambda low, high, qmin, qmax, s: qmin + int(-low / s)))
wrong("05.A", "rounded up")(_grid(zero=lambda low, high, qmin, qmax, s: math.ceil(qmin - low / s)))
wrong("05.A", "no whole number")(_grid(zero=lambda low, high, qmin, qmax, s: qmin - low / s))
wrong("05.A", "a float")(_grid(zero=lambda low, high, qmin, qmax, s: float(round(qmin - low / s))))
wrong("05.A", "symmetric")(_grid(zero=lambda low, high, qmin, qmax, s: (qmin + qmax + 1) // 2))
wrong("05.A", "qmin for zero")(_grid(zero=lambda low, high, qmin, qmax, s: qmin))
wrong("05.A", "the wrong sign")(_grid(zero=lambda low, high, qmin, qmax, s: round(qmin + low / s)))
wrong("05.A", "three times the scale")(
    _grid(scale=lambda low, high, qmin, qmax: 3 * (high - low) / (qmax - qmin) or 1.0)
)
wrong("05.A", "one step too many")(
    _grid(scale=lambda low, high, qmin, qmax: (high - low) / (qmax - qmin + 1) or 1.0)
)
wrong("05.A", "a floor of a thousandth under the scale")(
    _grid(scale=lambda low, high, qmin, qmax: max((high - low) / (qmax - qmin), 1e-3))
)
wrong("05.A", "signed codes divided by qmax alone")(
    _grid(scale=lambda low, high, qmin, qmax: (high - low) / max(qmax, 1) or 1.0)
)
wrong("05.A", "twice the larger end")(
    _grid(scale=lambda low, high, qmin, qmax: 2 * max(-low, high) / (qmax - qmin) or 1.0)
)
wrong("05.A", "the range is not widened")(
    _grid(
        widen=lambda low, high: (low, high),
        zero=lambda low, high, qmin, qmax, s: min(max(round(qmin - low / s), qmin), qmax),
    )
)
wrong("05.A", "zero for an empty range")(
    _grid(
        scale=lambda low, high, qmin, qmax: (high - low) / (qmax - qmin),
        zero=lambda low, high, qmin, qmax, s: round(qmin - low / s) if s else 0,
    )
)
wrong("05.A", "the two exchanged")(lambda *given: _grid()(*given)[::-1])
wrong("05.A", "eight bits whatever the codes are")(
    _grid(scale=lambda low, high, qmin, qmax: (high - low) / 255 or 1.0)
)


def _layer(
    *,
    sums=lambda qx, zx, qw, zw: (qx.int() - zx) @ (qw.int() - zw),
    add=lambda acc, bias: acc + bias,
    scaled=lambda acc, m0, shift: (acc.long() * m0 + (1 << (shift - 1))) >> shift,
    codes=lambda v, zy: (v + zy).clamp(0, 255).to(torch.uint8),
):
    """The right answer, with one of its lines exchanged."""

    def int8_linear(qx, zx, qw, zw, bias, m0, shift, zy):
        acc = add(sums(qx, zx, qw, zw), bias)
        return acc, codes(scaled(acc, m0, shift), zy)

    return int8_linear


right("05.B", "with ones that are shifted")(_layer())


@right("05.B", "cross terms apart")
def cross_terms(qx, zx, qw, zw, bias, m0, shift, zy):
    x, w, k = qx.long(), qw.long(), qx.shape[1]
    acc = x @ w - zx * w.sum(0) - x.sum(1, keepdim=True) * zw + k * zx * zw + bias
    rounded = ((acc * m0 >> (shift - 1)) + 1) >> 1
    return acc.int(), (rounded + zy).clamp(0, 255).to(torch.uint8)


@right("05.B", "Python's whole numbers")
def in_loops(qx, zx, qw, zw, bias, m0, shift, zy):
    x, w = qx.tolist(), qw.t().tolist()
    acc, y = [], []
    for row in x:
        acc.append([])
        y.append([])
        for col, z, b, m, s in zip(
            w, zw.tolist(), bias.tolist(), m0.tolist(), shift.tolist(), strict=True
        ):
            total = sum((a - zx) * (c - z) for a, c in zip(row, col, strict=True)) + b
            acc[-1].append(total)
            y[-1].append(min(max(((total * m + (1 << s - 1)) >> s) + zy, 0), 255))
    return [torch.tensor(acc, dtype=torch.int32), torch.tensor(y, dtype=torch.uint8)]


@right("05.B", "NumPy, in 64 whole bits")
def in_numpy(qx, zx, qw, zw, bias, m0, shift, zy):
    acc = (qx.numpy().astype(np.int64) - zx) @ (qw.numpy().astype(np.int64) - zw.numpy())
    acc = acc + bias.numpy()
    half = np.int64(1) << (shift.numpy() - 1)
    y = ((acc * m0.numpy() + half) >> shift.numpy()) + zy
    return acc.astype(np.int32), y.clip(0, 255).astype(np.uint8)


def _away_from_zero(acc, m0, shift):
    product = acc.long() * m0
    return product.sign() * ((product.abs() + (1 << (shift - 1))) >> shift)


def _twice(acc, m0, shift):
    high = (acc.long() * m0 + (1 << 30)) >> 31
    rest = shift - 31
    return torch.where(
        rest > 0,
        (high + ((1 << rest.clamp(min=0)) >> 1)) >> rest.clamp(min=0),
        (acc.long() * m0 + (1 << (shift - 1))) >> shift,
    )


def _even(acc, m0, shift):
    product = acc.long() * m0
    floor = product >> shift
    rest, half = product - (floor << shift), torch.ones_like(shift) << (shift - 1)
    return floor + ((rest > half) | ((rest == half) & (floor % 2 == 1))).long()


def _cut(acc, m0, shift):
    product = acc.long() * m0
    return product.sign() * (product.abs() >> shift)


wrong("05.B", "ties away from zero")(_layer(scaled=_away_from_zero))
wrong("05.B", "ties to the even code")(_layer(scaled=_even))
wrong("05.B", "rounded twice")(_layer(scaled=_twice))
wrong("05.B", "cut off")(_layer(scaled=_cut))
wrong("05.B", "rounded down")(_layer(scaled=lambda acc, m0, shift: (acc.long() * m0) >> shift))
wrong("05.B", "a product of 32 bits")(
    _layer(scaled=lambda acc, m0, shift: (acc * m0.int() + (1 << (shift - 1))) >> shift)
)
wrong("05.B", "the first column's multiplier for all")(
    _layer(scaled=lambda acc, m0, shift: (acc.long() * m0[0] + (1 << (shift[0] - 1))) >> shift[0])
)
wrong("05.B", "subtracted in 8 bits")(
    _layer(sums=lambda qx, zx, qw, zw: (qx - zx).int() @ (qw.int() - zw))
)
wrong("05.B", "sums in fp32")(
    _layer(sums=lambda qx, zx, qw, zw: ((qx.float() - zx) @ (qw.float() - zw)).int())
)
wrong("05.B", "sums in fp64: exact, and forbidden")(
    _layer(sums=lambda qx, zx, qw, zw: ((qx.double() - zx) @ (qw.double() - zw)).int())
)
wrong("05.B", "the weights' zero-points forgotten")(
    _layer(sums=lambda qx, zx, qw, zw: (qx.int() - zx) @ qw.int())
)
wrong("05.B", "the first weight zero-point for all")(
    _layer(sums=lambda qx, zx, qw, zw: (qx.int() - zx) @ (qw.int() - zw[0]))
)
wrong("05.B", "the bias forgotten")(_layer(add=lambda acc, bias: acc + 0 * bias))
wrong("05.B", "the bias in the codes alone")(
    lambda qx, zx, qw, zw, bias, m0, shift, zy: (
        _layer()(qx, zx, qw, zw, 0 * bias, m0, shift, zy)[0],
        _layer()(qx, zx, qw, zw, bias, m0, shift, zy)[1],
    )
)
wrong("05.B", "no saturation")(_layer(codes=lambda v, zy: (v + zy).to(torch.uint8)))
wrong("05.B", "saturated before the zero-point")(
    _layer(codes=lambda v, zy: (v.clamp(0, 255) + zy).to(torch.uint8))
)
wrong("05.B", "saturated as signed codes")(
    _layer(codes=lambda v, zy: (v + zy).clamp(-128, 127).to(torch.uint8))
)
wrong("05.B", "a ReLU: no code below the zero-point")(
    _layer(codes=lambda v, zy: (v + zy).clamp(zy, 255).to(torch.uint8))
)
wrong("05.B", "codes of 32 bits")(_layer(codes=lambda v, zy: (v + zy).clamp(0, 255).int()))
wrong("05.B", "the codes alone")(lambda **given: _layer()(**given)[1])


@wrong("05.B", "everything in NumPy's float64")
def numpy_floats(qx, zx, qw, zw, bias, m0, shift, zy):
    acc = (qx.numpy() * 1.0 - zx) @ (qw.numpy() * 1.0 - zw.numpy()) + bias.numpy()
    y = np.floor(acc * (m0.numpy() / 2.0 ** shift.numpy()) + 0.5) + zy
    return torch.from_numpy(acc.astype(np.int32)), torch.from_numpy(y.clip(0, 255).astype(np.uint8))


def _top(x):
    return float(x.abs().max()) or 1.0


def _best(candidates):
    return lambda x, bits, error: min(candidates(_top(x)), key=lambda c: error(float(c)))


@right("05.C", "golden section on the logarithm")
def golden(x, bits, error):
    top, g = _top(x), (5**0.5 - 1) / 2
    seen = {top: error(top)}

    def at(u):
        return seen.setdefault(math.exp(u), error(math.exp(u)))

    a, b = math.log(top / 50), math.log(top)
    c, d = b - g * (b - a), a + g * (b - a)
    fc, fd = at(c), at(d)
    for _ in range(17):
        if fc < fd:
            b, d, fd = d, c, fc
            c = b - g * (b - a)
            fc = at(c)
        else:
            a, c, fc = c, d, fd
            d = a + g * (b - a)
            fd = at(d)
    return np.float32(min(seen, key=seen.get))


@right("05.C", "on both sides of the best, nearer and nearer, as a tensor")
def nearer(x, bits, error):
    top = _top(x)
    grid = torch.logspace(math.log10(top / 50), math.log10(top), 8, dtype=torch.float64).tolist()
    seen = {c: error(c) for c in grid}
    for _ in range(6):
        tried = sorted(seen)
        k = tried.index(min(seen, key=seen.get))
        for other in (tried[max(k - 1, 0)], tried[min(k + 1, len(tried) - 1)]):
            middle = math.sqrt(other * tried[k])
            if middle not in seen:
                seen[middle] = error(middle)
    return torch.tensor(min(seen, key=seen.get))


class Clipper:
    """An object that is called."""

    def __call__(self, x, bits, error):
        return np.array([golden(x, bits, error)])


right("05.C", "an object that is called")(Clipper())


def _error(x, clip, bits):
    top = 2 ** (bits - 1) - 1
    scale = clip / top
    return float(((x / scale).round().clamp(-top, top) * scale - x).square().mean())


@wrong("05.C", "the error computed by oneself, 400 times")
def own_error(x, bits, error):
    top = _top(x)
    return min(np.geomspace(top / 50, top, 400), key=lambda c: _error(x, float(c), bits))


wrong("05.C", "the largest size")(lambda x, bits, error: _top(x))
wrong("05.C", "the largest value")(lambda x, bits, error: golden(x.clamp(min=0), bits, error))
wrong("05.C", "the smallest value's size")(
    lambda x, bits, error: golden(x.clamp(max=0), bits, error)
)
wrong("05.C", "three deviations")(lambda x, bits, error: float(3 * x.std()) or 1.0)
wrong("05.C", "the 99.9th percentile")(
    lambda x, bits, error: float(torch.quantile(x.abs(), 0.999)) or 1.0
)
wrong("05.C", "400 candidates")(_best(lambda top: np.geomspace(top / 50, top, 400)))
wrong("05.C", "21 candidates")(_best(lambda top: np.geomspace(top / 50, top, 21)))
wrong("05.C", "20 even steps")(_best(lambda top: np.linspace(top / 20, top, 20)))
wrong("05.C", "20 even ratios")(_best(lambda top: np.geomspace(top / 50, top, 20)))
wrong("05.C", "40 even steps")(_best(lambda top: np.linspace(top / 40, top, 40)))
wrong("05.C", "half of the largest size and less")(
    _best(lambda top: np.geomspace(top / 50, top / 2, 20))
)
wrong("05.C", "the worst")(
    lambda x, bits, error: max(np.geomspace(_top(x) / 50, _top(x), 20), key=error)
)
wrong("05.C", "no clip for zeros")(
    lambda x, bits, error: golden(x, bits, error) if x.any() else 0.0
)
wrong("05.C", "negative")(lambda x, bits, error: -golden(x, bits, error))
wrong("05.C", "the error in place of the clip")(
    lambda x, bits, error: error(golden(x, bits, lambda c: _error(x, c, bits))) + 1e-9
)
wrong("05.C", "a guess from bits alone")(lambda x, bits, error: _top(x) * bits / 8)
