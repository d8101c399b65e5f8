"""Wrong answers to chapter 05's exercises, by somebody who has read only their texts."""

import math

import torch

from answers import wrong

# ---- A


def _scale(low, high, qmin, qmax):
    low, high = min(low, 0.0), max(high, 0.0)
    return low, high, (high - low) / (qmax - qmin) or 1.0


@wrong("05.A", "read only: counts from 0 whatever qmin is")
def from_zero(low, high, qmin, qmax):
    low, high, scale = _scale(low, high, qmin, qmax)
    return scale, round(-low / scale)


@wrong("05.A", "read only: counts from -128 whatever qmin is")
def from_minus_128(low, high, qmin, qmax):
    low, high, scale = _scale(low, high, qmin, qmax)
    return scale, -128 + round(-low / scale)


@wrong("05.A", "read only: rounded down")
def rounded_down(low, high, qmin, qmax):
    low, high, scale = _scale(low, high, qmin, qmax)
    return scale, qmin + int(-low / scale)


@wrong("05.A", "read only: rounded up, right for the example")
def rounded_up(low, high, qmin, qmax):
    low, high, scale = _scale(low, high, qmin, qmax)
    return scale, qmin + math.ceil(-low / scale)


@wrong("05.A", "read only: rounded towards zero after qmin was added")
def towards_zero(low, high, qmin, qmax):
    low, high, scale = _scale(low, high, qmin, qmax)
    return scale, int(qmin - low / scale)


@wrong("05.A", "read only: not rounded")
def not_rounded(low, high, qmin, qmax):
    low, high, scale = _scale(low, high, qmin, qmax)
    return scale, qmin - low / scale


@wrong("05.A", "read only: always 255 steps")
def always_255(low, high, qmin, qmax):
    low, high, scale = _scale(low, high, qmin, qmax)
    return scale, qmin + round(-low / ((high - low) / 255 or 1.0))


@wrong("05.A", "read only: kept within -128 and 127, wrong for unsigned codes")
def within_int8(low, high, qmin, qmax):
    low, high, scale = _scale(low, high, qmin, qmax)
    return scale, min(127, max(-128, qmin + round(-low / scale)))


@wrong("05.A", "read only: never below 0")
def never_negative(low, high, qmin, qmax):
    low, high, scale = _scale(low, high, qmin, qmax)
    return scale, max(0, qmin + round(-low / scale))


@wrong("05.A", "read only: the middle of the codes, right for symmetric ranges")
def middle(low, high, qmin, qmax):
    low, high, scale = _scale(low, high, qmin, qmax)
    return scale, (qmin + qmax) // 2


@wrong("05.A", "read only: low's sign is wrong")
def wrong_sign(low, high, qmin, qmax):
    low, high, scale = _scale(low, high, qmin, qmax)
    return scale, min(qmax, max(qmin, round(qmin + low / scale)))


@wrong("05.A", "read only: 0 for an empty range, which may be no code")
def zero_for_empty(low, high, qmin, qmax):
    low, high, scale = _scale(low, high, qmin, qmax)
    return scale, qmin + round(-low / scale) if high > low else 0


@wrong("05.A", "read only: qmin for positive and qmax for negative ranges, 0 between")
def zero_between(low, high, qmin, qmax):
    low, high, scale = _scale(low, high, qmin, qmax)
    return scale, qmin if low == 0 else qmax if high == 0 else (0 if qmin < 0 < qmax else qmin)


@wrong("05.A", "read only: the code range is not symmetric, so the upper half is one code off")
def one_more(low, high, qmin, qmax):
    low, high, scale = _scale(low, high, qmin, qmax)
    return scale, min(qmax, qmin + round(-low / scale + 0.25))


# ---- B


def _sums(qx, zx, qw, zw, bias):
    return (qx.long() - zx) @ (qw.long() - zw.long()) + bias.long()


def _shifted(acc, m0, shift):
    half = torch.ones_like(shift) << (shift - 1)
    return (acc.long() * m0 + half) >> shift


def _codes(y, zy):
    return (y + zy).clamp(0, 255).to(torch.uint8)


@wrong("05.B", "read only: ties to even")
def ties_to_even(qx, zx, qw, zw, bias, m0, shift, zy):
    acc = _sums(qx, zx, qw, zw, bias)
    y = _shifted(acc, m0, shift)
    half = torch.ones_like(shift) << (shift - 1)
    tie = ((acc * m0) & ((torch.ones_like(shift) << shift) - 1)) == half
    return acc.int(), _codes(torch.where(tie & (y % 2 == 1), y - 1, y), zy)


@wrong("05.B", "read only: ties away from zero, wrong for negative sums")
def ties_away(qx, zx, qw, zw, bias, m0, shift, zy):
    acc = _sums(qx, zx, qw, zw, bias)
    return acc.int(), _codes(acc.sign() * _shifted(acc.abs(), m0, shift), zy)


@wrong("05.B", "read only: shifted without rounding")
def rounded_down_b(qx, zx, qw, zw, bias, m0, shift, zy):
    acc = _sums(qx, zx, qw, zw, bias)
    return acc.int(), _codes((acc * m0) >> shift, zy)


@wrong("05.B", "read only: rounded twice, first to 31 bits and then the rest")
def rounded_twice(qx, zx, qw, zw, bias, m0, shift, zy):
    acc = _sums(qx, zx, qw, zw, bias)
    first = (acc * m0 + (1 << 30)) >> 31
    rest = (shift - 31).clamp(min=0)
    half = torch.where(rest > 0, torch.ones_like(rest) << (rest - 1).clamp(min=0), 0)
    return acc.int(), _codes((first + half) >> rest, zy)


@wrong("05.B", "read only: the product in int32, which overflows")
def int32_product(qx, zx, qw, zw, bias, m0, shift, zy):
    acc = _sums(qx, zx, qw, zw, bias).int()
    product = (acc * m0.int()).long()
    half = torch.ones_like(shift) << (shift - 1)
    return acc, _codes((product + half) >> shift, zy)


@wrong("05.B", "read only: the zero-point of x is taken off in uint8")
def uint8_difference(qx, zx, qw, zw, bias, m0, shift, zy):
    acc = (qx - zx).long() @ (qw.long() - zw.long()) + bias.long()
    return acc.int(), _codes(_shifted(acc, m0, shift), zy)


@wrong("05.B", "read only: the zero-point of w is taken off in int8")
def int8_difference(qx, zx, qw, zw, bias, m0, shift, zy):
    acc = (qx.long() - zx) @ (qw - zw.to(torch.int8)).long() + bias.long()
    return acc.int(), _codes(_shifted(acc, m0, shift), zy)


@wrong("05.B", "read only: sums in int16")
def int16_sums(qx, zx, qw, zw, bias, m0, shift, zy):
    acc = _sums(qx, zx, qw, zw, bias).to(torch.int16).long()
    return acc.int(), _codes(_shifted(acc, m0, shift), zy)


@wrong("05.B", "read only: the first column's weight zero-point for all")
def first_zero_point(qx, zx, qw, zw, bias, m0, shift, zy):
    acc = _sums(qx, zx, qw, zw[:1], bias)
    return acc.int(), _codes(_shifted(acc, m0, shift), zy)


@wrong("05.B", "read only: the first column's shift for all")
def first_shift(qx, zx, qw, zw, bias, m0, shift, zy):
    acc = _sums(qx, zx, qw, zw, bias)
    return acc.int(), _codes(_shifted(acc, m0, shift[:1]), zy)


@wrong("05.B", "read only: the first column's m0 for all")
def first_m0(qx, zx, qw, zw, bias, m0, shift, zy):
    acc = _sums(qx, zx, qw, zw, bias)
    return acc.int(), _codes(_shifted(acc, m0[:1], shift), zy)


@wrong("05.B", "read only: always shifted by 31")
def always_31(qx, zx, qw, zw, bias, m0, shift, zy):
    acc = _sums(qx, zx, qw, zw, bias)
    return acc.int(), _codes(_shifted(acc, m0, torch.full_like(shift, 31)), zy)


@wrong("05.B", "read only: the bias is not in the accumulator, only in y")
def bias_only_in_y(qx, zx, qw, zw, bias, m0, shift, zy):
    acc = _sums(qx, zx, qw, zw, bias)
    return (acc - bias.long()).int(), _codes(_shifted(acc, m0, shift), zy)


@wrong("05.B", "read only: the bias after the multiplication")
def late_bias(qx, zx, qw, zw, bias, m0, shift, zy):
    acc = _sums(qx, zx, qw, zw, bias)
    return acc.int(), _codes(_shifted(acc - bias.long(), m0, shift) + bias.long(), zy)


@wrong("05.B", "read only: wraps around instead of saturating")
def wraps(qx, zx, qw, zw, bias, m0, shift, zy):
    acc = _sums(qx, zx, qw, zw, bias)
    return acc.int(), (_shifted(acc, m0, shift) + zy).to(torch.uint8)


@wrong("05.B", "read only: saturates before zy is added, then wraps")
def early_saturation(qx, zx, qw, zw, bias, m0, shift, zy):
    acc = _sums(qx, zx, qw, zw, bias)
    return acc.int(), (_shifted(acc, m0, shift).clamp(0, 255) + zy).to(torch.uint8)


@wrong("05.B", "read only: a ReLU, nothing comes out below zy")
def relu(qx, zx, qw, zw, bias, m0, shift, zy):
    acc = _sums(qx, zx, qw, zw, bias)
    return acc.int(), _codes(_shifted(acc, m0, shift).clamp(min=0), zy)


@wrong("05.B", "read only: saturates at 127")
def at_127(qx, zx, qw, zw, bias, m0, shift, zy):
    acc = _sums(qx, zx, qw, zw, bias)
    return acc.int(), (_shifted(acc, m0, shift) + zy).clamp(0, 127).to(torch.uint8)


@wrong("05.B", "read only: multiplies in floating point")
def in_floats(qx, zx, qw, zw, bias, m0, shift, zy):
    acc = _sums(qx, zx, qw, zw, bias)
    y = torch.floor(acc.double() * (m0.double() / 2.0 ** shift.double()) + 0.5)
    return acc.int(), _codes(y.long(), zy)


@wrong("05.B", "read only: the accumulator in int64")
def int64_accumulator(qx, zx, qw, zw, bias, m0, shift, zy):
    acc = _sums(qx, zx, qw, zw, bias)
    return acc, _codes(_shifted(acc, m0, shift), zy)


@wrong("05.B", "read only: y in int32")
def int32_y(qx, zx, qw, zw, bias, m0, shift, zy):
    acc = _sums(qx, zx, qw, zw, bias)
    return acc.int(), (_shifted(acc, m0, shift) + zy).clamp(0, 255).int()


@wrong("05.B", "read only: zx is always 128")
def always_128(qx, zx, qw, zw, bias, m0, shift, zy):
    acc = _sums(qx, 128, qw, zw, bias)
    return acc.int(), _codes(_shifted(acc, m0, shift), zy)


# ---- C


def _own(x, bits, clip):
    steps = 2 ** (bits - 1) - 1
    scale = clip / steps
    return float(((x / scale).round().clamp(-steps, steps) * scale - x).square().mean())


def _top(x):
    return float(x.abs().max()) or 1.0


@wrong("05.C", "read only: the largest magnitude, nothing is cut")
def largest(x, bits, error):
    return _top(x)


@wrong("05.C", "read only: twenty even steps below the largest magnitude, too coarse for tails")
def even_steps(x, bits, error):
    return min((_top(x) * k / 20 for k in range(1, 21)), key=error)


@wrong("05.C", "read only: halves as long as it helps")
def halves(x, bits, error):
    clip = _top(x)
    best = error(clip)
    for _ in range(18):
        now = error(clip / 2)
        if now >= best:
            break
        clip, best = clip / 2, now
    return clip


@wrong("05.C", "read only: its own error, blind for the weights")
def own_error(x, bits, error):
    clips = [_top(x) * 0.97**k for k in range(200)]
    return min(clips, key=lambda c: _own(x, bits, c))


@wrong("05.C", "read only: forty calls")
def forty_calls(x, bits, error):
    clip = min((_top(x) * 0.8**k for k in range(20)), key=error)
    return min((clip * (0.8 + 0.4 * k / 19) for k in range(20)), key=error)


@wrong("05.C", "read only: twenty-one calls, one above the budget")
def one_too_many(x, bits, error):
    coarse = min((_top(x) * 0.75**k for k in range(13)), key=error)
    return min((coarse * f for f in (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.18)), key=error)


@wrong("05.C", "read only: the largest value, without its sign")
def largest_value(x, bits, error):
    top = float(x.max())
    if top <= 0:
        return 1.0
    return min((top * 0.85**k for k in range(20)), key=error)


@wrong("05.C", "read only: 0 for zeros")
def zero(x, bits, error):
    top = float(x.abs().max())
    if top == 0:
        return 0.0
    return min((top * 0.85**k for k in range(20)), key=error)


@wrong("05.C", "read only: three deviations")
def three_deviations(x, bits, error):
    return 3 * float(x.std(correction=0)) or 1.0


@wrong("05.C", "read only: the 99.9th percentile of the magnitudes")
def percentile(x, bits, error):
    return float(torch.quantile(x.abs().float()[:100_000], 0.999)) or 1.0


@wrong("05.C", "read only: the rule for a Laplace tail")
def laplace(x, bits, error):
    factor = {3: 3.9, 4: 5.0, 5: 6.2, 6: 7.5, 7: 8.7, 8: 9.9}[bits]
    return factor * float((x - x.median()).abs().mean()) or 1.0


@wrong("05.C", "read only: never below a third of the largest magnitude")
def above_a_third(x, bits, error):
    return min((_top(x) * (1 / 3 + 2 / 3 * k / 19) for k in range(20)), key=error)


@wrong("05.C", "read only: never the largest magnitude itself, a hair too much for uniform x")
def below_the_top(x, bits, error):
    return min((_top(x) * 0.8 ** (k + 1) for k in range(20)), key=error)


@wrong("05.C", "read only: its own error, always with 8 bits")
def eight_bits(x, bits, error):
    clips = [_top(x) * 0.97**k for k in range(200)]
    return min(clips, key=lambda c: _own(x, 8, c))


@wrong("05.C", "read only: the clip with the largest error")
def worst(x, bits, error):
    return max((_top(x) * 0.85**k for k in range(20)), key=error)
