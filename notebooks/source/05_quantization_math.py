# %% [markdown]
# # 05 · Quantization math
#
# **What does a number lose when it gets only a few bits, and can you know it before you run
# anything?**
#
# After this chapter you can: *compute* a scale and a zero-point by hand, and say which error they
# allow · *predict* the signal-to-noise ratio of a quantized tensor from its range, and say when the
# prediction breaks · *choose* where a range should end · *write* a linear layer that uses integers
# from its input to its output · *ask* of every other grid what it is worth against clipped even
# steps.
#
# 90 minutes · before this: 01 Measurement, and the idea of a trained network from 02 · runs on any
# CPU
#
# Packages: onnx

# %% tags=["parameters"]
import os

PROFILE = os.environ.get("COURSE_PROFILE", "fast")

# %% tags=["nbval-ignore-output"]
import copy
import heapq
import math
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F

from course_utils import claims, data, exercises, machine, measure, models, plots, training

SMOKE = PROFILE == "smoke"
IMAGES = {"smoke": (200, 400), "fast": (3000, 5000), "full": (3000, 10_000)}
VALIDATION, TEST = IMAGES[PROFILE]  # choices are made on the first, verdicts on the second
SEEDS = range(10 if PROFILE == "full" else 5)
machine.card()

# %% [markdown]
# ## Recall
# 1. In chapter 1 a comparison gave a speed-up of 1.04 with the interval [0.98, 1.11]. Which of the
#    four verdicts is it?
#    <details><summary>Answer</summary>Inconclusive. The interval holds 1, so neither arm is known
#    to be faster, and it reaches beyond ±3%, so "no difference" would claim too much.</details>
# 2. Chapter 2 split the data three ways. On which part do you choose, and on which do you report?
#    <details><summary>Answer</summary>You choose on validation images. The test images are for the
#    verdict alone: a choice made on them would flatter itself.</details>
#
# ## Predict
# The course's trained network stores every weight in 32 bits. Now each weight may take one of a few
# evenly spaced values only, from the smallest to the largest weight of its output channel: two
# values for one bit, four for two, and so on. Down to how many bits does the network stay within
# one point of its accuracy?

# %%
my_guess = ...  # a number of bits, for example 6
exercises.predict("05.fewest_bits", my_guess)

# %% [markdown]
# ## From scratch: counting steps
# Four weights, three bits. Three bits can tell eight things apart, so there are seven steps from
# the smallest weight to the largest.

# %%
w = torch.tensor([-0.6, -0.07, 0.25, 0.8])
scale = (w.max() - w.min()) / 7
codes = torch.round((w - w.min()) / scale)
back = codes * scale + w.min()
print("one step ", f"{scale:.2f}")
print("codes    ", codes.int().tolist())
print("back     ", [round(v, 2) for v in back.tolist()])
print("error    ", [round(v, 2) for v in (back - w).tolist()])

# %% [markdown]
# The width of one step is the *scale* $s$. What is stored is the number of steps, the *code*.
# Rounding moves a weight by at most half a step, so no error can exceed $s/2$, here 0.1.
#
# One thing is missing. Add 0.1 to all weights, and zero lies *between* two codes, so no code stands
# for it. Zero is not any number: padding is made of zeros, a ReLU gives zeros, pruned weights are
# zeros. A small error on each of them adds up. So the grid is moved until zero is on it. The code
# that means 0.0 is the *zero-point* $z$, an integer:
#
# $$q = \mathrm{clamp}\bigl(\mathrm{round}(x/s) + z,\; q_{min},\; q_{max}\bigr),
# \qquad \hat x = s\,(q - z)$$
#
# Here $x$ is a number, $q$ its code, $\hat x$ what comes back; $q_{min}$ and $q_{max}$ are the
# smallest and the largest code. The clamp is called *saturation*: what lies beyond the last code
# gets the last code. A grid whose zero-point is free is *affine*. A grid with $z = 0$ and as many
# codes below zero as above is *symmetric*; of the even number of codes it leaves one unused.


# %%
def affine_grid(rows, bits):
    """Scale and zero-point for each row of `rows` (R, N); the range is widened until it holds 0."""
    rows = F.pad(rows, (0, 1))  # a column of zeros: now every range holds 0, even an empty one
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, 1.0)  # a row of zeros has no width; any scale will do
    return scale, torch.round(-low / scale), 0, 2**bits - 1


def symmetric_grid(rows, bits):
    """A scale for each row; zero-point 0, codes from -(2^(bits-1)-1) to the same above."""
    top = 2 ** (bits - 1) - 1
    scale = F.pad(rows, (0, 1)).abs().amax(1, keepdim=True) / top
    return torch.where(scale > 0, scale, 1.0), torch.zeros_like(scale), -top, top


# %%
def quantize(x, scale, zero_point, qmin, qmax, divide=True):
    """Codes of x. ONNX divides by the scale; torch multiplies by 1/scale (`divide=False`)."""
    if not torch.isfinite(x).all():
        bad = int((~x.isfinite()).sum())
        raise ValueError(f"{bad} of {x.numel()} values are NaN or infinite; no code is theirs.")
    steps = x / scale if divide else x * (1 / scale)
    return (torch.round(steps) + zero_point).clamp(qmin, qmax).to(torch.int32)


def dequantize(codes, scale, zero_point):
    return (codes - zero_point) * scale


# %% [markdown]
# A function like this is judged by its edges. What would you have expected of each line?


# %%
def show_codes(name, values, bits=8, grid=affine_grid):
    x = torch.tensor([values])
    scale, zero_point, qmin, qmax = grid(x, bits)
    codes = quantize(x, scale, zero_point, qmin, qmax)[0].tolist()
    print(f"{name:20} codes {codes}  zero-point {int(zero_point)}")


whole = (torch.tensor(1.0), 0, 0, 255)  # a grid of whole numbers, to see the rounding itself
print("ties                 codes", quantize(torch.tensor([0.5, 1.5, 2.5]), *whole).tolist())
print("outside the range    codes", quantize(torch.tensor([-3.0, 255.4, 900.0]), *whole).tolist())
show_codes("all positive", [0.5, 1.0])
show_codes("all equal", [0.7, 0.7, 0.7])
show_codes("all zero", [0.0, 0.0])
show_codes("symmetric, 4 bits", [-1.0, 0.4, 0.9], 4, symmetric_grid)
with exercises.fails(ValueError):
    quantize(torch.tensor([1.0, float("nan")]), *whole)

# %% [markdown]
# Ties go to the *even* neighbour: always rounding them up would push every mean up. Equal values
# survive because the range reaches down to zero. NaN is refused: a library that accepts one has to
# invent a code for it, and no later layer can see that.

# %% [markdown]
# ## Exercise A · the code that means zero
# `affine_grid` always counts from 0. Many runtimes want signed codes, from −128 to 127, or fewer
# bits. Complete the one line so that `scale_and_zero_point(low, high, qmin, qmax)` works for every
# range and every pair of codes, `qmin < qmax`.
#
# It takes the smallest and largest value (floats, `low <= high`) and the smallest and largest code
# (ints), and returns `(scale, zero_point)`: the scale is the widened range over the number of steps
# (any positive number if the range is empty), `zero_point` is a whole number between `qmin` and
# `qmax`, the code of exactly 0.0, and both ends of the widened range must come back within half a
# step. For `(-1.0, 3.0, -128, 127)` the answer is `(4 / 255, -64)`: zero lies `63.75` steps above
# `low`, and −128 + 64 = −64.


# %% tags=["exercise"]
def scale_and_zero_point(low, high, qmin, qmax):
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (qmax - qmin) or 1.0
    zero_point = ...
    return scale, zero_point


# %%
exercises.check("05.A", scale_and_zero_point)

# %% [markdown] tags=["hint"]
# `low` gets the code `qmin`. How many steps is 0.0 above `low`?

# %% [markdown] tags=["hint"]
# `-low / scale` steps, and a code must be whole. Python's `round` gives an `int`.


# %% tags=["solution"]
def scale_and_zero_point(low, high, qmin, qmax):
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (qmax - qmin) or 1.0
    zero_point = round(qmin - low / scale)
    return scale, zero_point


# %% tags=["wrong"]
# Counts from 0: right for unsigned codes only.
def scale_and_zero_point(low, high, qmin, qmax):
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (qmax - qmin) or 1.0
    return scale, round(-low / scale)


# %% tags=["wrong"]
# Cuts off instead of rounding: an end of the range can be off by a whole step.
def scale_and_zero_point(low, high, qmin, qmax):
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (qmax - qmin) or 1.0
    return scale, qmin + int(-low / scale)


# %% tags=["wrong"]
# Takes the middle code for a range on one side of zero: the edge.
def scale_and_zero_point(low, high, qmin, qmax):
    one_sided = low >= 0 or high <= 0
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (qmax - qmin) or 1.0
    return scale, (qmin + qmax + 1) // 2 if one_sided else round(qmin - low / scale)


# %% tags=["wrong"]
# A zero-point that is no integer: zero falls between two codes again.
def scale_and_zero_point(low, high, qmin, qmax):
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (qmax - qmin) or 1.0
    return scale, qmin - low / scale


# %% [markdown] tags=["instructor"]
# 6 minutes. Let the room do `(-1, 3)` by hand for signed and unsigned codes before anyone types:
# the scale is the same, the zero-point moves by 128. Ask what the zero-point of a ReLU's output is
# (`qmin`), and what that does to the cross terms.

# %% [markdown]
# ## Measure: inside the range and outside it
# Send a ramp of numbers through a `4`-bit grid made for the range from −1 to 1, and go beyond it.

# %% tags=["nbval-ignore-output"]
ramp = torch.linspace(-1.6, 1.6, 1601)
grid = symmetric_grid(torch.tensor([[-1.0, 1.0]]), 4)
error = (dequantize(quantize(ramp[None], *grid), *grid[:2])[0] - ramp).numpy()
half, inside = float(grid[0]) / 2, ramp.abs().numpy() <= 1 + 1e-6
figure, ax = plots.axes(
    "number x",
    "error after the round trip",
    title=(
        f"Inside at most {np.abs(error[inside]).max():.3f} (half a step is {half:.3f}), outside up"
        f" to {np.abs(error).max():.2f}"
    ),
)
ax.axvspan(-1, 1, color="0.92", label="the range")
ax.plot(ramp, error, color=plots.COLOURS[0])
ax.hlines([-half, half], -1.6, 1.6, color="0.4", linestyle="--", linewidth=1, label="half a step")
ax.legend()
plots.show(figure, "A sawtooth within half a step inside the range, straight slopes outside it.")

# %% [markdown]
# Between the two ends the error is a sawtooth that never leaves the dashed lines: *rounding error*.
# Beyond them it grows without bound: *clipping error*. Everything in this chapter trades one for
# the other. A wider range means wider teeth, a narrower one more numbers out on the slopes.
#
# ## Measure: does each bit buy six decibels?
# If a number is equally likely to fall anywhere in a step, its squared error is $s^2/12$ on
# average. One bit more halves $s$ and divides that by four. The *power* of some numbers is the mean
# of their squares, and a ratio of powers is told in *decibels*, ten times its logarithm to base
# ten: $10\log_{10}4 = 6.02$, the *six-decibel rule* (Bennett 1948). The power of the signal over
# the power of the error is the *SQNR*, the signal-to-quantization-noise ratio.


# %%
def sqnr_db(x, restored):
    """Power of the signal over power of the error, in decibels; infinite if nothing was lost."""
    signal, error = x.double().square().sum(), (x - restored).double().square().sum()
    return float(10 * torch.log10(signal / error))


def round_trip(rows, bits, grid=symmetric_grid):
    scale, zero_point, qmin, qmax = grid(rows, bits)
    return dequantize(quantize(rows, scale, zero_point, qmin, qmax), scale, zero_point)


# %%
model = models.baseline()
weights = {n: p.detach() for n, p in model.named_parameters() if p.dim() > 1}  # ten of them
layer = weights["stages.2.conv2.weight"].reshape(1, -1)
torch.manual_seed(0)
tensors = {
    "uniform numbers": torch.rand(1, 100_000) * 2 - 1,
    "weights of a trained layer": layer,
    "the same and one outlier": torch.cat([layer, 60 * layer.std()[None, None]], 1),
}

# %% tags=["nbval-ignore-output"]
bits, measured, theory = np.arange(2, 13), {}, {}
for name, x in tensors.items():
    steps = [float(affine_grid(x, int(b))[0]) for b in bits]
    measured[name] = np.array([sqnr_db(x, round_trip(x, int(b), affine_grid)) for b in bits])
    theory[name] = [float(10 * torch.log10(12 * x.square().mean() / s**2)) for s in steps]
at_eight_bits = [values[bits == 8][0] for values in measured.values()]

# %% tags=["nbval-ignore-output"]
figure, ax = plots.axes(
    "bits",
    "SQNR (dB)",
    height=3.8,
    title=f"Equal slopes; one outlier costs {at_eight_bits[1] - at_eight_bits[2]:.0f} dB at 8 bits",
)
for i, name in enumerate(tensors):
    ax.plot(bits, theory[name], linestyle="--", color=plots.COLOURS[i], linewidth=1)
    ax.plot(bits, measured[name], plots.MARKERS[i], color=plots.COLOURS[i], label=name)
ax.plot([], [], linestyle="--", color="0.4", label="theory: $s^2/12$")
ax.legend()
plots.show(figure, "SQNR against bits, three tensors: points on straight dashed theory lines.")

# %% [markdown]
# All three climb alike; they differ in height. The height is set by the ratio of the range to the
# typical size of a number: the outlier stretches the range, so it costs all the others some bits.
# At few bits the points leave the dashed lines, because then most weights share one or two codes
# and their error is no longer uniform in a step.
#
# The claim is about the slope. Fit it from four bits on, for each layer of the network.

# %% tags=["nbval-ignore-output"]
fit = list(range(4, 13))
slopes = []
for x in weights.values():
    curve = [sqnr_db(x.reshape(1, -1), round_trip(x.reshape(1, -1), b, affine_grid)) for b in fit]
    slopes.append(np.polyfit(fit, curve, 1)[0])
exact = np.polyfit(fit, [20 * math.log10(2**b - 1) for b in fit], 1)[0]
print(f"theory with 2^b codes: 6.02 dB a bit; with the 2^b - 1 steps between them: {exact:.2f}")
claims.verdict("05.six_db_a_bit", measure.paired_t(slopes, "dB"))

# %% [markdown]
# ## Measure: who shares a scale?
# One scale for a whole tensor is set by its largest weight, wherever it sits. Give each output
# channel its own, or each group of 32 neighbours, and an outlier costs its own row only. This
# choice is called the *granularity*.


# %%
def rows_of(w, granularity, group=32):
    """The weight as rows that share one scale; a channel that groups do not divide stays a row."""
    if granularity == "tensor":
        return w.reshape(1, -1)
    if granularity == "channel" or w[0].numel() % group:
        return w.reshape(len(w), -1)
    return w.reshape(-1, group)


# %%
def fake_quantize(w, bits, granularity, grid=symmetric_grid):
    """Quantized and restored at once: fp32 numbers that lie on the grid."""
    return round_trip(rows_of(w, granularity), bits, grid).reshape(w.shape)


# %%
def right_with(new_weights, images, labels):
    """Which images the network gets right with some of its weights replaced."""
    twin = copy.deepcopy(model)
    twin.load_state_dict(new_weights, strict=False)
    return (training.predict(twin, images).argmax(1) == labels).tolist()


def all_weights(change):
    return {name: change(w) for name, w in weights.items()}


# %% tags=["nbval-ignore-output"]
images, labels = (t[:VALIDATION] for t in data.fashion_mnist("validation"))
full_precision = 100 * np.mean(right_with({}, images, labels))
WIDTHS = (2, 3, 4, 5, 6, 8)


def at(bits, granularity):
    return all_weights(lambda w: fake_quantize(w, bits, granularity))


points = {
    g: [100 * np.mean(right_with(at(b, g), images, labels)) for b in WIDTHS]
    for g in ("tensor", "channel", "group")
}
near = [b for b, a in zip(WIDTHS, points["channel"], strict=True) if a >= full_precision - 1]
fewest = min(near, default=32)
exercises.reveal("05.fewest_bits", fewest, "bits")

# %% tags=["nbval-ignore-output"]
plots.lines(
    WIDTHS,
    points,
    xlabel="bits for a weight (symmetric grid)",
    ylabel="accuracy on validation images (%)",
    title=f"One scale a channel: within a point of fp32 down to {fewest} bits",
    reference=(full_precision, "fp32"),
    alt="Accuracy against bits for three granularities: flat at many bits, then a cliff.",
)

# %% [markdown]
# The decibels fell evenly; the accuracy does not. It stays flat over several bits and then drops
# off a cliff. A network tolerates noise up to a point, so a rule about noise tells you how far you
# are from the cliff, never how steep it is.
#
# A scale for each channel is said to be needed at eight bits already. Test images decide, there and
# nearer to the cliff.

# %% tags=["nbval-ignore-output"]
test_images, test_labels = (t[:TEST] for t in data.fashion_mnist("test"))


def granularity_gain(bits, fine="channel", coarse="tensor"):
    """Points of test accuracy that the finer granularity keeps."""
    right = [right_with(at(bits, g), test_images, test_labels) for g in (coarse, fine)]
    return measure.paired_share(*right)


at_eight = granularity_gain(8)
for b in (4, 3):
    print(f"{b} bits: channel minus tensor {granularity_gain(b)}")
    print(f"{b} bits: group minus channel {granularity_gain(b, 'group', 'channel')}")
claims.verdict("05.a_scale_a_channel_at_eight_bits", at_eight)

# %% [markdown]
# Far from the cliff granularity is worth nothing, near it a great deal; and how much finer pays is
# seen in the second lines. That is this network. One with wide differences between its channels (a
# depthwise one, say) meets its cliff earlier.

# %% [markdown]
# ## From scratch: a linear layer in integers
# So far the codes were turned back into fp32 before any arithmetic. Hardware earns its speed by
# *not* doing that. A linear layer sums products $x_k w_k$ over $K$ inputs. Put $x = s_x(q_x - z_x)$
# and $w = s_w(q_w - z_w)$ into it:
#
# $$\sum_k x_k w_k = s_x s_w \Bigl(\underbrace{\textstyle\sum q_x q_w}_{\text{the product}} -
# z_w\!\underbrace{\textstyle\sum q_x}_{\text{row sum}} -
# z_x\!\underbrace{\textstyle\sum q_w}_{\text{column sum}} + K z_x z_w\Bigr)$$
#
# The bracket holds integers only. The last three are the *cross terms*: column sums and $K z_x z_w$
# are known before any input comes, so they join the bias; the row sum must be computed for each
# input, unless $z_w = 0$. That is why weights are so often symmetric. Two inputs, one output:

# %%
qx, zx = torch.tensor([[200, 3]], dtype=torch.int32), 128  # codes 0 … 255
qw, zw = torch.tensor([[5], [-7]], dtype=torch.int32), 2  # codes -128 … 127
direct = (qx - zx) @ (qw - zw)
terms = [qx @ qw, -zw * qx.sum(1), -zx * qw.sum(0), torch.tensor(2 * zx * zw)]
print("product, row sum, column sum, constant:", [int(t) for t in terms])
print("their sum:", sum(int(t) for t in terms), " computed directly:", int(direct))

# %% [markdown]
# How large can the bracket get? Both differences stay within ±255, so a product stays within
# ±65,025, and $K$ of them are added. The *accumulator* has 32 bits, which is enough for $K$ up to
# 33,000 even in the worst case.
#
# The result must become an 8-bit code again, for the next layer. Its scale is $s_y$, so the
# accumulator has to be multiplied by $M = s_x s_w / s_y$, a real number. Integers can do that too
# (Jacob et al. 2018): write $M$ as a 31-bit integer $m_0$ over a power of two, multiply in 64 bits,
# add one half, shift right. This step is *requantization*.


# %%
def fixed_point(multiplier):
    """Integers (m0, shift) with multiplier = m0 / 2**shift and 2**30 <= m0 < 2**31."""
    if not 2**-33 <= multiplier < 2**29:
        raise ValueError(f"{multiplier!r} does not fit; 64 bits hold 2**-33 up to 2**29.")
    mantissa, exponent = math.frexp(multiplier)  # mantissa between 0.5 and 1
    m0, shift = round(mantissa * 2**31), 31 - exponent
    return (m0, shift) if m0 < 2**31 else (m0 // 2, shift - 1)


def requantize(accumulator, m0, shift, zero_point):
    """int32 sums → codes 0 … 255: multiply, add half, shift, add the zero-point, saturate."""
    rounded = (accumulator.to(torch.int64) * m0 + (1 << (shift - 1))) >> shift
    return (rounded + zero_point).clamp(0, 255).to(torch.uint8)


m0, shift = fixed_point(0.0123)
print(f"0.0123 = {m0} / 2^{shift}, relative error {abs(m0 / 2**shift / 0.0123 - 1):.0e}")
sums = torch.tensor([1000, -1000, 10**9], dtype=torch.int32)
print("1000, -1000 and 10**9 become", requantize(sums, m0, shift, 100).tolist())

# %% [markdown]
# Now the network's own last layer, on real features. The judge is ONNX, the exchange format whose
# operators are defined in a standard and in a *reference implementation* in plain numpy
# (`course_utils/onnx_node.py` runs one operator in it). `MatMulInteger` gives the
# accumulators, `QLinearMatMul` the codes.


# %%
def last_layer(pictures):
    """The features that enter the network's last layer (N, 128), and its logits (N, 10)."""
    seen = []
    hook = model.fc.register_forward_hook(lambda m, inputs, y: seen.append((inputs[0], y)))
    training.predict(model, pictures)
    hook.remove()
    return (torch.cat(part).clone() for part in zip(*seen, strict=True))


# %%
def codes_of(t):
    scale, zero_point, qmin, qmax = affine_grid(t.reshape(1, -1), 8)
    return quantize(t, scale, zero_point, qmin, qmax), float(scale), int(zero_point)


# %%
features, logits = last_layer(images)
qx, sx, zx = codes_of(features)
qw, sw, zw = codes_of(model.fc.weight.detach().T.contiguous())  # (128, 10)
qw, zw = qw - 128, zw - 128  # the same grid with signed codes: both move, the difference stays
_, sy, zy = codes_of(logits)
accumulator = (qx - zx) @ (qw - zw)
y = requantize(accumulator, *fixed_point(sx * sw / sy), zy)

# %% tags=["nbval-ignore-output"]
from course_utils.onnx_node import onnx_reference

a, b = (qx.numpy().astype(np.uint8), np.uint8(zx)), (qw.numpy().astype(np.int8), np.int8(zw))
(sums,) = onnx_reference("MatMulInteger", a[0], b[0], a[1], b[1])
scales = [np.float32(v) for v in (sx, sw, sy)]
(theirs,) = onnx_reference(
    "QLinearMatMul", a[0], scales[0], a[1], b[0], scales[1], b[1], scales[2], np.uint8(zy)
)
difference = np.abs(y.numpy().astype(int) - theirs)
print("accumulators equal ONNX's:", np.array_equal(accumulator.numpy(), sums))
print(f"codes unlike ONNX's: {(difference > 0).sum()} of {difference.size}, by {difference.max()}")

# %% [markdown]
# The accumulators must be equal, since integers leave no room for rounding. The codes could differ
# by one: `QLinearMatMul` requantizes in floating point, and a sum that lands next to a tie can fall
# to either side. Such sums are so rare that you may see none.

# %% [markdown]
# ## Exercise B · a linear layer in integers
# The layer above had one scale for all weights. Write the one that runtimes use: each output column
# has its own weight zero-point and its own multiplier, and there is a bias. No floating-point
# tensor may appear anywhere.
#
# `int8_linear(qx, zx, qw, zw, bias, m0, shift, zy)` takes
# - `qx`, uint8 codes `(N, K)`, with the zero-point `zx` (int), and `qw`, int8 codes `(K, M)`, with
#   the zero-points `zw` (int32, `(M,)`),
# - `bias` (int32, `(M,)`), a code of the accumulator's scale,
# - `m0` and `shift` (int64, `(M,)`): column `j` is multiplied by `m0[j] / 2**shift[j]`, where
#   `2**30 <= m0[j] < 2**31`,
# - `zy`, the output's zero-point (int),
#
# and returns `(accumulator, y)`: the int32 sums $\sum_k (q_x - z_x)(q_w - z_w)$ plus the bias, and
# the uint8 codes: multiplied, rounded to the nearest with ties upwards, plus `zy`, saturated to 0 …
# 255. With `qx = [[130, 120]]`, `zx = 128`, `qw = [[3], [-4]]`, `zw = [1]`, `bias = [5]`, `m0 =
# [2**30]`, `shift = [31]`, `zy = 10` the sum is 2·2 + (−8)·(−5) + 5 = 49; half of it is 24.5, which
# rounds to 25, so `y = [[35]]`.


# %% tags=["exercise"]
def int8_linear(qx, zx, qw, zw, bias, m0, shift, zy): ...


# %%
exercises.check("05.B", int8_linear)

# %% [markdown] tags=["hint"]
# Convert to a wide integer type *before* you subtract: in uint8, 120 − 128 is 248.

# %% [markdown] tags=["hint"]
# `accumulator * m0` needs up to 62 bits. And "half" differs from column to column: `1 << (shift -
# 1)` works on a tensor too.


# %% tags=["solution"]
def int8_linear(qx, zx, qw, zw, bias, m0, shift, zy):
    accumulator = (qx.to(torch.int32) - zx) @ (qw.to(torch.int32) - zw) + bias
    half = torch.ones_like(shift) << (shift - 1)
    rounded = (accumulator.to(torch.int64) * m0 + half) >> shift
    return accumulator, (rounded + zy).clamp(0, 255).to(torch.uint8)


# %% tags=["wrong"]
# Subtracts the zero-points in 8 bits: both differences wrap round.
def int8_linear(qx, zx, qw, zw, bias, m0, shift, zy):
    accumulator = (qx - zx).to(torch.int32) @ (qw.to(torch.int32) - zw) + bias
    half = torch.ones_like(shift) << (shift - 1)
    rounded = (accumulator.to(torch.int64) * m0 + half) >> shift
    return accumulator, (rounded + zy).clamp(0, 255).to(torch.uint8)


# %% tags=["wrong"]
# Multiplies in fp32: exact until a sum passes 2**24, so only long rows show it.
def int8_linear(qx, zx, qw, zw, bias, m0, shift, zy):
    accumulator = ((qx.float() - zx) @ (qw.float() - zw)).to(torch.int32) + bias
    half = torch.ones_like(shift) << (shift - 1)
    rounded = (accumulator.to(torch.int64) * m0 + half) >> shift
    return accumulator, (rounded + zy).clamp(0, 255).to(torch.uint8)


# %% tags=["wrong"]
# Shifts without adding one half: every code is rounded down.
def int8_linear(qx, zx, qw, zw, bias, m0, shift, zy):
    accumulator = (qx.to(torch.int32) - zx) @ (qw.to(torch.int32) - zw) + bias
    rounded = (accumulator.to(torch.int64) * m0) >> shift
    return accumulator, (rounded + zy).clamp(0, 255).to(torch.uint8)


# %% tags=["wrong"]
# No saturation: right as long as no output leaves 0 … 255 (the edge).
def int8_linear(qx, zx, qw, zw, bias, m0, shift, zy):
    accumulator = (qx.to(torch.int32) - zx) @ (qw.to(torch.int32) - zw) + bias
    half = torch.ones_like(shift) << (shift - 1)
    rounded = (accumulator.to(torch.int64) * m0 + half) >> shift
    return accumulator, (rounded + zy).to(torch.uint8)


# %% tags=["wrong"]
# Requantizes in 32 bits: the product overflows.
def int8_linear(qx, zx, qw, zw, bias, m0, shift, zy):
    accumulator = (qx.to(torch.int32) - zx) @ (qw.to(torch.int32) - zw) + bias
    half = torch.ones_like(shift) << (shift - 1)
    rounded = (accumulator * m0.to(torch.int32) + half) >> shift
    return accumulator, (rounded + zy).clamp(0, 255).to(torch.uint8)


# %% [markdown] tags=["instructor"]
# 15 minutes. Most first attempts subtract in uint8. Let them print `torch.tensor([120],
# dtype=torch.uint8) - 128`. A good question for the fast ones: which of the cross terms could be
# moved into `bias` before any input arrives?


# %% [markdown]
# ## Measure: where to clip
# Weights are known, so their range is known. Activations are not: you look at some batches and fix
# a range before you deploy. That is *calibration*. Three methods, each with its own idea where the
# range should end: at the *maximum* seen; at a *percentile*, with a thousandth of the values
# beyond; where the measured *squared error* of the round trip is smallest. (A fourth, by entropy,
# is Migacz's of 2017; runtimes have it.)


# %%
def clipped(x, clip, bits):
    """Round trip of numbers ≥ 0 on a grid that ends at `clip`."""
    scale = torch.as_tensor(clip) / (2**bits - 1)
    return dequantize(quantize(x, scale, 0, 0, 2**bits - 1), scale, 0)


def by_squared_error(x, bits):
    candidates = torch.linspace(0.05, 1, 58) * x.max()
    return float(min(candidates, key=lambda clip: (clipped(x, clip, bits) - x).square().mean()))


METHODS = {
    "maximum": lambda x, bits: float(x.max()),
    "percentile": lambda x, bits: float(np.percentile(x.numpy(), 99.9)),
    "squared error": by_squared_error,
}

# %% tags=["nbval-ignore-output"]
relus = [m for m in model.modules() if isinstance(m, torch.nn.ReLU)]
seen = {}
hooks = [m.register_forward_hook(lambda m, _, y: seen.update({m: y.flatten()})) for m in relus]
training.predict(model, data.fashion_mnist("train")[0][: 16 if SMOKE else 64])
for hook in hooks:
    hook.remove()
relu = seen[relus[1]]
shares = torch.linspace(0.1, 1, 37)
curve = [float((clipped(relu, s * relu.max(), 3) - relu).square().mean()) for s in shares]

# %% tags=["nbval-ignore-output"]
figure, ax = plots.axes(
    "where the range ends",
    "mean squared error",
    title=f"A ReLU's output in 3 bits: best at {shares[np.argmin(curve)]:.2f} of its maximum",
)
ax.plot(shares * relu.max(), curve, color=plots.COLOURS[0])
for i, (name, method) in enumerate(METHODS.items()):
    end = method(relu, 3)
    at = float((clipped(relu, end, 3) - relu).square().mean())
    ax.plot(end, at, plots.MARKERS[i], color=plots.COLOURS[i + 1], label=name)
ax.set_yscale("log")
ax.legend()
plots.show(figure, "A valley: clipping error on the left, rounding error on the right.")

# %% [markdown]
# A valley. On the left slope clipping error rules, on the right slope rounding error, and the
# bottom lies far below the maximum: a rare large value is not worth a wide step for all the others.
# (For numbers of a known law the bottom can be computed: Banner et al. 2019.) Does it matter for
# accuracy? Every ReLU's output goes through its own grid now, the weights stay fp32.


# %% tags=["nbval-ignore-output"]
def right_clipped(method, bits):
    ends = {m: method(x, bits) for m, x in seen.items()}
    hooks = [m.register_forward_hook(lambda m, _, y: clipped(y, ends[m], bits)) for m in relus]
    try:
        return (training.predict(model, images).argmax(1) == labels).tolist()
    finally:
        for hook in hooks:
            hook.remove()


plain = {b: right_clipped(METHODS["maximum"], b) for b in (3, 8)}
for b, name in [(3, "percentile"), (3, "squared error"), (8, "percentile"), (8, "squared error")]:
    gain = measure.paired_share(plain[b], right_clipped(METHODS[name], b))
    print(f"{b} bits: {name} minus maximum {gain}")
print(f"fp32 {full_precision:.1f}%, maximum in 3 bits {100 * np.mean(plain[3]):.1f}%")

# %% [markdown]
# At three bits the end of the range decides, and the two clever methods are closer to each other
# than to the maximum. At eight bits nothing is left to gain *for this network of ReLUs*. Language
# models have activations with outliers a hundred times their typical size, and for them the plain
# maximum fails at eight bits, too (chapter 15).

# %% [markdown]
# ## Exercise C · choose the clip
# Write `choose_clip(x, bits, error)` for tensors with heavy tails. It returns a positive float: the
# end of the range for a symmetric grid. `error(clip)` returns the mean squared error of `x` clipped
# there, each value weighted by how much it matters to the layer's output; these weights you do not
# see. Your clip's error must be at most `1.02` times that of the best clip there is.
#
# You have a budget: you may call `error` at most 20 times. `x` is a one-dimensional float tensor,
# `bits` is between 3 and 8. Do not count on the kind of its tail: it may be uniform (cut next to
# nothing, and a hair too much hurts), Laplace or Student's t (cut a lot), longer on one side than
# on the other, or all zeros (then return any positive number). For `x = [1.0, -2.0]` and 8 bits
# nothing is gained by clipping: 2.0 is a right answer.


# %% tags=["exercise"]
def choose_clip(x, bits, error): ...


# %%
exercises.check("05.C", choose_clip)

# %% [markdown] tags=["hint"]
# The best clip lies somewhere between a fiftieth of the largest size and the largest size. Even
# *ratios* (`np.geomspace`) look everywhere, and yet twenty in one look are too far apart: one may
# be 10% off.

# %% [markdown] tags=["hint"]
# Spend less than half the budget on a coarse look, then some between the two neighbours of the
# best, then the rest between the neighbours of what is best now. What you have seen once you need
# not ask again.


# %% tags=["solution"]
def choose_clip(x, bits, error):
    top = float(x.abs().max())
    if top == 0:
        return 1.0
    seen, candidates = {}, np.geomspace(top / 50, top, 8)
    for _ in range(3):
        seen |= {float(c): error(float(c)) for c in candidates}
        tried = sorted(seen)
        best = tried.index(min(seen, key=seen.get))
        low, high = tried[max(best - 1, 0)], tried[min(best + 1, len(tried) - 1)]
        candidates = np.geomspace(low, high, 8)[1:-1]
    return min(seen, key=seen.get)


# %% tags=["wrong"]
# Min-max: the outlier decides.
def choose_clip(x, bits, error):
    return float(x.abs().max()) or 1.0


# %% tags=["wrong"]
# Three standard deviations, whatever the tail and the bits are.
def choose_clip(x, bits, error):
    return float(3 * x.std()) or 1.0


# %% tags=["wrong"]
# A fine grid that pays no heed to the budget.
def choose_clip(x, bits, error):
    top = float(x.abs().max()) or 1.0
    return float(min(np.geomspace(top / 50, top, 400), key=lambda c: error(float(c))))


# %% tags=["wrong"]
# The whole budget in one look: where the best clip is next to the largest size, it is between two.
def choose_clip(x, bits, error):
    top = float(x.abs().max()) or 1.0
    return float(min(np.linspace(top / 20, top, 20), key=lambda c: error(float(c))))


# %% tags=["wrong"]
# Good for every tensor but the one of zeros: the edge.
def choose_clip(x, bits, error):
    top = float(x.abs().max())
    seen, candidates = {}, np.geomspace(max(top, 1e-30) / 50, max(top, 1e-30), 8)
    for _ in range(3):
        seen |= {float(c): error(float(c)) for c in candidates}
        tried = sorted(seen)
        best = tried.index(min(seen, key=seen.get))
        low, high = tried[max(best - 1, 0)], tried[min(best + 1, len(tried) - 1)]
        candidates = np.geomspace(low, high, 8)[1:-1]
    return min(seen, key=seen.get) if top else 0.0


# %% [markdown] tags=["instructor"]
# 15 minutes. Let pairs first draw the valley by hand and say which side is steep. Whoever reaches
# for bisection should be asked what guarantees a single valley: nothing does, one far outlier makes
# a second one.

# %% [markdown]
# ## Explain: three numbers decide
# For a tensor in $b$ bits whose range is $R$ and whose typical size (root mean square) is $\sigma$,
# the step is $R/(2^b-1)$ and the error's power is $s^2/12$. So
#
# $$\text{SQNR} \approx 6.02\,b + 10.8 - 20\log_{10}(R/\sigma) \quad \text{decibels.}$$
#
# Bits raise it, a wide range for its typical size lowers it. Every method works on one of the
# three: more *bits*; a smaller *R*, by clipping or by letting fewer weights share it; or another
# *grid*, which no longer has one step (*Further*). The formula says nothing about the network's
# answer. That was measured: flat, then a cliff.
#
# ## If yours shows no gain
# | You see | Because | Look at |
# |---|---|---|
# | the file did not shrink | fake-quantized weights are fp32, and codes in int32 or int64 are no smaller | the dtype of each tensor in the file |
# | the file shrank by less than the bits promise | scales, BatchNorm and the header stay as they were; small groups have many scales | how many bytes each part takes |
# | the slope is far below six decibels a bit | an outlier, or too few bits for the assumption of an even error | the histogram, then finer granularity |
# | one scale a channel gains nothing | both are far from the cliff | the same with fewer bits |
# | ONNX Runtime's sums differ from yours on an old x86 processor | without VNNI (x86's instruction for 8-bit dot products) its uint8 × int8 kernel adds pairs in 16 bits, which can saturate ([ONNX Runtime, *Quantize ONNX Models*](https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html)) | weights in 7 bits, or `uint8` weights |
# | it is not faster | nothing here was about speed: kernels decide that | chapter 06 |
#
# ## Myth: a scale made of bits alone
# This formula for $b$-bit quantization circulates: $W_q = \mathrm{round}(W \cdot 2^b / 2^b) \cdot
# 2^b$ (〈第八章:AI大模型的部署与优化〉). Run it.

# %%
w, b = torch.tensor([-0.6, -0.07, 0.25, 0.8]), 8
print("the formula  ", (torch.round(w * 2**b / 2**b) * 2**b).tolist())
print("a real scale ", [round(v, 3) for v in round_trip(w[None], b)[0].tolist()])

# %% [markdown]
# $2^b / 2^b$ is 1. The weights are rounded to whole numbers, whatever $b$ is, and then blown up.
# The number of bits cannot make a scale; the range must come in. For the same reason there is no
# `F.quantize(x, bits)`, though code that calls it is passed around.
#
# ## Myth: int8 numbers are summed in int8
# Two products are enough to disprove it.

# %%
a, b = torch.tensor([[100, 90]], dtype=torch.int8), torch.tensor([[2], [3]], dtype=torch.int8)
print("int8 accumulator: ", int(a @ b), " int32 accumulator:", int(a.int() @ b.int()))

# %% [markdown]
# The int8 sum wraps round modulo 256, without a word. Inputs and weights are narrow, the
# accumulator is wide: that is why an int8 matrix instruction has int32 outputs.

# %% [markdown]
# ## The tool of the field
# Two libraries, two conventions. Torch multiplies by the reciprocal of the scale, ONNX divides by
# the scale. In exact arithmetic that is the same; in fp32 the two part when a number lies next to a
# tie. Yours must be equal to *each of them, bit for bit*, in its own convention, on numbers placed
# on ties on purpose.

# %% tags=["nbval-ignore-output"]
torch.manual_seed(0)
scale, zero_point = torch.tensor(0.0123), 77
ties = (torch.arange(-400, 400) + 0.5) * scale
x = torch.cat([torch.randn(100_000), 50 * torch.randn(1000), ties, torch.tensor([0.0, -0.0])])
multiplied, divided = (quantize(x, scale, zero_point, 0, 255, divide=d) for d in (False, True))
theirs = torch.fake_quantize_per_tensor_affine(x, float(scale), zero_point, 0, 255)
assert torch.equal(dequantize(multiplied, scale, zero_point), theirs)
(theirs,) = onnx_reference("QuantizeLinear", x.numpy(), scale.numpy(), np.uint8(zero_point))
assert np.array_equal(divided.numpy(), theirs)
print(f"conventions part on {(multiplied != divided).sum()} of {len(x)} numbers")

# %% [markdown]
# Comparing two runtimes needs a tolerance of one code; comparing with one needs none. The suite of
# this course goes further: the node cases that ship in the `onnx` package, integers and small
# floats, run through the functions of this notebook (`tests/test_2_onnx_nodes.py`).
#
# And what no code can stand for? Here is what a kernel makes of it.

# %% tags=["nbval-ignore-output"]
nothing = torch.tensor([float("nan"), float("inf"), float("-inf")])
made = torch.fake_quantize_per_tensor_affine(nothing, 1.0, 7, 0, 255) + 7
print("codes of NaN, inf, -inf in torch:", made.tolist())

# %% [markdown]
# ## Break it
# One weight in a layer, ten times as large as the largest so far, as a fault in memory or a
# careless training would leave it. What does it cost, and which remedy gives it back?

# %% tags=["nbval-ignore-output"]
w = weights["stages.2.conv2.weight"].clone()
w[0, 0, 0, 0] = 10 * w.abs().max()
honest = torch.ones_like(w, dtype=torch.bool)
honest[0, 0, 0, 0] = False
remedies = {f"one scale a {g}": fake_quantize(w, 4, g) for g in ("tensor", "channel", "group")}
end = w.abs().quantile(0.9999)
remedies["one scale, clipped"] = fake_quantize(w.clamp(-end, end), 4, "tensor")
lost = float((remedies["one scale a tensor"][honest] == 0).float().mean())
plots.bars(
    {name: sqnr_db(w[honest], restored[honest]) for name, restored in remedies.items()},
    xlabel="SQNR of all other weights (dB), 4 bits",
    title=f"One weight, and {100 * lost:.1f}% of the others become zero",
    alt="SQNR of the other weights of a layer with one outlier, for four remedies.",
)
print(f"the clip cuts {int((w.abs() > end).sum())} weights of {w.numel()}")

# %% [markdown]
# With one scale the step is wider than nearly all weights, and they are rounded away. A scale for
# each channel confines the damage to one channel, a group confines it to 32 weights. Clipping saves
# the others at the price of the few it cuts, which is right if they were a fault, and wrong if the
# network relies on them: large language models do (chapter 15).

# %% [markdown]
# ## Exit quiz
# **1. You halve the range of a tensor and keep the bits. The largest rounding error becomes**
# <details><summary>a quarter</summary>That is the mean squared error. The largest error goes with
# the step itself.</details>
# <details><summary>half as large</summary>Right: the step halves, and the error is at most half a
# step.</details>
# <details><summary>the same</summary>The number of codes stays, but they stand closer
# together.</details>
#
# **2. The output of a ReLU lies between 0.4 and 6.0 in all calibration images. Its affine grid
# should reach**
# <details><summary>from 0.4 to 6</summary>Then no code stands for 0.0, and every padded border is
# wrong.</details>
# <details><summary>from −6 to 6</summary>Half of the codes would never be used: a bit is thrown
# away.</details>
# <details><summary>from 0 to 6</summary>Right: zero must have a code, for padding and for the zeros
# the next image brings.</details>
#
# **3. Which cross term must be computed anew for each input?**
# <details><summary>the row sum of the inputs, times the weights' zero-point</summary>Right, unless
# that zero-point is 0: the reason for symmetric weights.</details>
# <details><summary>the column sum of the weights, times the inputs' zero-point</summary>The weights
# are known beforehand: it joins the bias.</details>
# <details><summary>none, the zero-points are constants</summary>The zero-points are, the sums of
# the inputs are not.</details>
#
# **4. Your integer layer and `QLinearMatMul` differ by one code in one of 20,000 outputs. That is**
# <details><summary>a bug in the accumulators</summary>Compare those by themselves: they must be
# equal.</details>
# <details><summary>possible</summary>Right: one requantizes in integers, the other in floating
# point, and they part next to ties.</details>
# <details><summary>caused by the number of threads</summary>Integer sums come out the same in any
# order.</details>
#
# **5. A new 4-bit format beats even steps over the whole range by 5 dB. You ask for**
# <details><summary>the same with 8 bits</summary>Another question.</details>
# <details><summary>a larger network</summary>The comparison would be as unfair there.</details>
# <details><summary>even steps with the best clip, at equal bytes</summary>Right: the range alone
# may be worth most of it.</details>
#
# **Key points** · the scale comes from the range, never from the bits alone · inside the range the
# error is at most half a step, outside it has no bound · zero must have a code of its own · a bit
# is worth six decibels, and accuracy follows them to a cliff only · sums of int8 products live in
# int32; the way back is one integer multiplication and a shift · only a file tells what you saved ·
# the rival of every clever grid is even steps, clipped.
#
# **Sources** · W. R. Bennett, *Spectra of quantized signals*, 1948 · R. Gray, D. Neuhoff,
# *Quantization*, 1998 · H. Gish, J. Pierce, *Asymptotically efficient quantizing*, 1968 · D.
# Huffman, *A method for the construction of minimum-redundancy codes*, 1952 · S. Lloyd, *Least
# squares quantization in PCM*, 1982 · B. Jacob et al., *Quantization and training of neural
# networks for efficient integer-arithmetic-only inference*, 2018 · R. Krishnamoorthi, *Quantizing
# deep convolutional networks for efficient inference: a whitepaper*, 2018 · S. Migacz, *8-bit
# inference with TensorRT*, 2017 · R. Banner et al., *Post training 4-bit quantization of
# convolutional networks for rapid-deployment*, 2019 · M. Nagel et al., *A white paper on neural
# network quantization*, 2021 · S. Han et al., *Deep compression*, 2016 · S. Gupta et al., *Deep
# learning with limited numerical precision*, 2015 · *OCP Microscaling Formats (MX) Specification*,
# 1.0, 2023 · T. Dettmers et al., *QLoRA*, 2023, [arXiv
# 2305.14314](https://arxiv.org/abs/2305.14314) · S. Ashkboos et al., *QuaRot*, 2024, [arXiv
# 2404.00456](https://arxiv.org/abs/2404.00456) · ONNX operators
# [QuantizeLinear](https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html),
# [QLinearMatMul](https://onnx.ai/onnx/operators/onnx__QLinearMatMul.html)
#
# **For the capstone** row 05 of your ledger, the formats, now says what a bit, a scale and a code
# are worth. Next: [06 · Quantization in practice](06_quantization_in_practice.ipynb), where a whole
# network gets 8 bits and a clock decides.

# %% [markdown]
# ## Further
# Each part stands alone.
#
# ### An explorer
# Four knobs: bits, scheme, granularity, clip. Move them and watch the values that survive (ticks
# below the histogram) spread over the weights of one layer. Without a running Jupyter kernel you
# see one setting.

# %%
SCHEMES = {"symmetric": symmetric_grid, "affine": affine_grid}
explored = weights["stages.1.conv1.weight"]


def explore(bits, scheme="affine", granularity="tensor", clip=1.0, w=explored):
    """SQNR in dB of w, each row's range cut to `clip` of its largest size; and what came back."""
    rows = rows_of(w, granularity)
    end = clip * rows.abs().amax(1, keepdim=True)
    restored = round_trip(rows.clamp(-end, end), bits, SCHEMES[scheme])
    return sqnr_db(rows, restored), restored


def picture(bits=4, scheme="symmetric", granularity="tensor", clip=1.0):
    ratio, restored = explore(bits, scheme, granularity, clip)
    title = f"{bits} bits, {scheme}, one scale a {granularity}: SQNR {ratio:.1f} dB"
    figure, ax = plots.axes("weight", "weights", title=title, height=2.8)
    ax.hist(explored.flatten().numpy(), 120, color="0.75")
    levels = restored.unique()[:600]
    ax.plot(levels, torch.zeros_like(levels), "|", color=plots.COLOURS[1], markersize=14)
    plots.show(figure, f"A layer's weights and the {len(levels)} values that survive.")


# %% tags=["nbval-ignore-output"]
import ipywidgets

plots.explore(
    picture,
    bits=ipywidgets.SelectionSlider(options=[2, 3, 4, 6, 8], value=4),
    scheme=list(SCHEMES),
    granularity=["tensor", "channel", "group"],
    clip=ipywidgets.FloatSlider(value=1.0, min=0.2, max=1.0, step=0.05, continuous_update=False),
)

# %% [markdown]
# ### A codebook, and its rival
# Weights crowd around zero. Why should the codes be spread evenly? A *codebook* stores any $2^b$
# values, and a code says which one; *k-means* finds them by turns: each weight goes to its nearest
# value, each value moves to the mean of its weights (Lloyd 1982). It starts from affine even steps
# and can only get better than they are. But over the *whole* range even steps are a weak rival. The
# strong one may choose where to end.


# %%
def codebook(w, bits, rounds=30):
    """Codes and the 2**bits values that they stand for, by k-means on a line."""
    flat, k = w.flatten().double(), 2**bits
    values = torch.linspace(float(flat.min()), float(flat.max()), k, dtype=torch.float64)
    for _ in range(rounds):
        borders = (values[1:] + values[:-1]) / 2  # half-way: each weight goes to its nearest value
        codes = torch.bucketize(flat, borders)
        count = torch.bincount(codes, minlength=k)
        total = torch.zeros(k, dtype=torch.float64).index_add_(0, codes, flat)
        values = torch.where(count > 0, total / count.clamp(min=1), values)
    return torch.bucketize(flat, (values[1:] + values[:-1]) / 2), values.float()


def from_codebook(w, bits):
    codes, values = codebook(w, bits)
    return values[codes].reshape(w.shape)


# %% tags=["nbval-ignore-output"]
def with_best_clip(w, bits):
    return max(explore(bits, clip=c, w=w)[0] for c in np.linspace(0.2, 1, 33))


by_layer = np.array(
    [
        [explore(4, w=w)[0], with_best_clip(w, 4), sqnr_db(w, from_codebook(w, 4))]
        for w in weights.values()
    ]
)  # (layers, ways): whole range, clipped, codebook
over_whole = measure.paired_t(by_layer[:, 2] - by_layer[:, 0], "dB")
over_clipped = measure.paired_t(by_layer[:, 2] - by_layer[:, 1], "dB")
print("4 bits, codebook minus even steps, whole range:", over_whole)
print("4 bits, codebook minus even steps, clipped:    ", over_clipped)
claims.verdict("05.a_codebook_beats_even_steps", over_clipped)

# %% [markdown]
# The difference of the two lines is what clipping is worth, and people count it for the codebook.
# What is left has a price: the codes are no longer numbers one can multiply, so each weight must be
# looked up before it is used.
#
# ### A code for frequent numbers
# A *Huffman code* (1952) gives short bit strings to frequent symbols and long ones to rare. Take
# the two rarest, join them to one, repeat; every join makes their strings one bit longer. Only the
# lengths are stored: the strings follow from them (the *canonical* code).


# %%
def huffman_lengths(count):
    """Bits for each symbol, from how often it occurs: {symbol: count} → {symbol: length}."""
    heap = [(n, i, [symbol]) for i, (symbol, n) in enumerate(sorted(count.items()))]
    heapq.heapify(heap)
    length = dict.fromkeys(count, 1 if len(count) == 1 else 0)
    while len(heap) > 1:
        (n, _, some), (m, i, others) = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in some + others:
            length[symbol] += 1
        heapq.heappush(heap, (n + m, i, some + others))
    return length


def huffman_bits(symbols):
    """Bits of all strings together."""
    count = Counter(symbols)
    length = huffman_lengths(count)
    return sum(n * length[s] for s, n in count.items())


# %%
def canonical(length):
    """{symbol: bit string}: shorter first, then by symbol; each string is the next number."""
    strings, code, before = {}, 0, 0
    for symbol, bits in sorted(length.items(), key=lambda item: (item[1], item[0])):
        code <<= bits - before
        strings[symbol], code, before = format(code, f"0{bits}b"), code + 1, bits
    return strings


canonical(huffman_lengths({0: 9, 1: 4, 2: 2, 3: 1}))


# %%
def huffman_encode(symbols):
    """Symbols → (lengths, packed bytes)."""
    length = huffman_lengths(Counter(symbols))
    strings = canonical(length)
    text = "".join(strings[s] for s in symbols)
    return length, np.packbits(np.frombuffer(text.encode(), np.uint8) - 48)


def huffman_decode(length, packed, count):
    symbol_of, found, part = {v: k for k, v in canonical(length).items()}, [], ""
    for bit in np.unpackbits(packed).astype("U1"):
        part += bit
        if part in symbol_of and len(found) < count:
            found.append(symbol_of[part])
            part = ""
    return found


symbols = [0, 0, 3, 1, 0, 2, 0, 0, 1, 0]
length, packed = huffman_encode(symbols)
print(len(packed), "bytes; decoded:", huffman_decode(length, packed, 10) == symbols)

# %% [markdown]
# No code that gives every symbol its own string can go below the *entropy* of the histogram
# (Shannon 1948), and Huffman's stays less than a bit above it. Deep Compression (Han et al. 2016)
# reports that it saves 20 to 30% on top. Its setting: prune first, a codebook *of the survivors*,
# Huffman on their codes. Where a survivor stands is stored as the gap to the last one, in 4 bits; a
# longer gap takes a filler.


# %%
def gaps_of(kept, longest=15):
    """Positions of True in `kept` as gaps of at most `longest`; `longest` itself skips so many."""
    symbols, before = [], -1
    for place in kept.flatten().nonzero()[:, 0].tolist():
        skipped, before = place - before - 1, place
        symbols += [longest] * (skipped // longest) + [skipped % longest]
    return symbols


def saved(symbols, bits=4):
    """Percent of the symbols' bits that a Huffman code saves."""
    return 100 * (1 - huffman_bits(symbols) / (bits * len(symbols)))


# %% tags=["nbval-ignore-output"]
shares = {"codes, not pruned": [], "codes of survivors": [], "gaps": []}
for w in weights.values():
    kept = w.abs() > w.abs().quantile(0.7)
    shares["codes, not pruned"].append(saved(codebook(w, 4)[0].tolist()))
    shares["codes of survivors"].append(saved(codebook(w[kept], 4)[0].tolist()))
    shares["gaps"].append(saved(gaps_of(kept)))
for name, values in shares.items():
    print(f"saved on {name}: {measure.paired_t(values, '%')}")
claims.verdict("05.huffman_saves_a_quarter", measure.paired_t(shares["codes of survivors"], "%"))

# %% [markdown]
# The histogram decides. A codebook evens it out, for it puts more values where more weights are;
# what is even cannot be coded shorter. Without pruning the valley around zero is full; survivors
# have lost it.
#
# ### The file
# Fake-quantized weights are fp32 numbers: saved as they are, they save nothing. To shrink the file
# you must store the codes in one byte each, with the scales beside them, and leave BatchNorm and
# the biases in fp32.


# %%
def int8_parts(w):
    """What goes into the file for one weight tensor, and the tensor that comes out of it."""
    rows = rows_of(w, "channel")
    scale, zero_point, qmin, qmax = symmetric_grid(rows, 8)
    codes = quantize(rows, scale, zero_point, qmin, qmax)
    restored = dequantize(codes, scale, zero_point).reshape(w.shape)
    return {"codes": codes.to(torch.int8), "scale": scale}, restored


def file_of(encode, network=model):
    """Bytes of the saved network whose weights went through `encode`; and what came back."""
    state, restored = {}, {}
    for name, t in network.state_dict().items():
        if t.dim() < 2:
            state[name] = t
            continue
        parts, restored[name] = encode(t)
        state |= {f"{name}.{part}": value for part, value in parts.items()}
    return measure.saved_bytes(state), restored


# %% tags=["nbval-ignore-output"]
from torchvision.models import resnet18


def times_smaller(network):
    return measure.saved_bytes(network) / file_of(int8_parts, network)[0]


# ResNet-18 may be untrained here: the bytes of a file do not depend on the values.
print(f"ResNet-18: {times_smaller(resnet18()):.2f} times smaller")
claims.verdict("05.four_times_smaller", times_smaller(model))

# %% [markdown]
# Both fall short of four, the small network more so. What keeps them below is everything that did
# not shrink: scales, BatchNorm, names. In a network of millions of weights this hardly shows. The
# verdict is about the small one.
#
# ### The smallest file within a point
# So which partner does a coder want? The old answer is: even steps (Gish and Pierce 1968). Let
# files decide. Codes are packed without gaps, or Huffman-coded, and the weights that are judged
# come out of those bytes. Two rules: a candidate enters if its *interval* on validation images
# stays within one point of fp32, or if its *mean* does. The smallest that entered goes to the test.


# %%
def pack(codes, bits):
    """Codes 0 … 2**bits - 1, without gaps in bytes."""
    table = (codes.flatten()[:, None] >> torch.arange(bits - 1, -1, -1)) & 1
    return torch.from_numpy(np.packbits(table.numpy().astype(np.uint8)))


def unpack(packed, bits, count):
    table = np.unpackbits(packed.numpy())[: count * bits].reshape(count, bits)
    return torch.from_numpy(table @ (1 << np.arange(bits)[::-1]))


# %%
def to_file(codes, bits, coded):
    """What is stored of codes 0 … 2**bits - 1: packed, or Huffman's bytes and lengths."""
    if not coded:
        return {"codes": pack(codes, bits)}
    length, packed = huffman_encode(codes.flatten().tolist())
    table = [length.get(symbol, 0) for symbol in range(2**bits)]
    return {"codes": torch.from_numpy(packed), "length": torch.tensor(table, dtype=torch.uint8)}


def from_file(parts, bits, shape):
    """The codes, from the bytes alone."""
    if "length" not in parts:
        return unpack(parts["codes"], bits, math.prod(shape)).reshape(shape)
    length = {s: n for s, n in enumerate(parts["length"].tolist()) if n}
    codes = huffman_decode(length, parts["codes"].numpy(), math.prod(shape))
    return torch.tensor(codes).reshape(shape)


# %%
def even_parts(w, bits, coded):
    """Even steps, a scale a channel: what is stored, and the weights that come out of it."""
    rows = rows_of(w, "channel")
    scale, zero_point, low, high = symmetric_grid(rows, bits)
    codes = quantize(rows, scale, zero_point, low, high) - low  # from 0 on
    parts = to_file(codes, bits, coded) | {"scale": scale.half()}
    restored = dequantize(from_file(parts, bits, rows.shape), parts["scale"].float(), -low)
    return parts, restored.reshape(w.shape)


def codebook_parts(w, bits, coded):
    codes, values = codebook(w, bits)
    parts = to_file(codes, bits, coded) | {"values": values}
    return parts, values[from_file(parts, bits, w.shape)]


# %%
def low_rank_parts(w, share=0.5):
    """W ≈ U V with half of the numbers (Eckart and Young 1936): fewer numbers, not shorter ones."""
    matrix = w.reshape(len(w), -1)
    rank = max(1, int(share * matrix.numel() / sum(matrix.shape)))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    u, v = (u[:, :rank] * s[:rank]).contiguous(), v[:rank].contiguous()
    return {"u": u, "v": v}, (u @ v).reshape(w.shape)


candidates = {"int8, channel": int8_parts, "half rank": low_rank_parts}
for bits in (4, 3):
    for name, parts in (("even", even_parts), ("codebook", codebook_parts)):
        for coded in (False, True):
            candidates[f"{bits} bits {name}{', Huffman' * coded}"] = (
                lambda w, parts=parts, bits=bits, coded=coded: parts(w, bits, coded)
            )

# %% tags=["nbval-ignore-output"]
reference, files = right_with({}, images, labels), {}
for name, encode in candidates.items():
    size, restored = file_of(encode)
    loss = measure.paired_share(reference, right_with(restored, images, labels))
    files[name] = (size, loss, restored)
    print(f"{name:26} {size / 1e3:6.0f} kB  {loss}")

# %% tags=["nbval-ignore-output"]
for rule in ("interval", "mean"):
    worst = {n: loss.low if rule == "interval" else loss.value for n, (_, loss, _) in files.items()}
    entered = [name for name, loss in worst.items() if loss >= -1]
    smallest = min(entered, key=lambda n: files[n][0], default="int8, channel")
    before, after = (right_with(r, test_images, test_labels) for r in ({}, files[smallest][2]))
    print(f"smallest by its {rule}: {smallest}; test images {measure.paired_share(before, after)}")

# %% [markdown]
# Read two neighbours at a time. What does the coder save on even codes, what on a codebook's? And
# do both choices keep their promise on the test images? What is picked by its mean may have been
# picked *because* its mean was lucky; the interval leaves room for that, and pays with bytes.
#
# ### The update that rounding loses
# Rounding to nearest is best for weights that stand still. Training moves them in tiny steps, and a
# step below half of the grid's is rounded right back. *Stochastic rounding* goes up with a
# probability equal to the fraction above the lower code, so the mean comes out right. Gupta et al.
# (2015) train where nearest rounding stalls. But the step is learning rate times gradient. So the
# rival is a larger rate: the last layer, from zero, on a grid of $1/128$, at three rates.


# %%
def stochastic_round(x, generator):
    low = torch.floor(x)
    return low + (torch.rand(x.shape, generator=generator) < x - low)


def train_on_grid(rounding, lr, seed, x, y, step=1 / 128):
    """A linear layer (128 → 10), one pass of SGD, rounded to multiples of `step` each time; and the
    share of its updates that were less than half a step.
    """
    generator, w, small = torch.Generator().manual_seed(seed), torch.zeros(128, 10), []
    for index in torch.randperm(len(x), generator=generator).split(64):
        p = (x[index] @ w).softmax(1) - F.one_hot(y[index], 10)
        update = lr * x[index].T @ p / len(index)
        small.append(float((update.abs() < step / 2).float().mean()))
        w = rounding((w - update) / step, generator) * step
    return w, 100 * np.mean(small)


# %% tags=["nbval-ignore-output"]
pictures, y_train = (t[: 1000 if SMOKE else 5000] for t in data.fashion_mnist("train"))
x_train, _ = last_layer(pictures)
test_features, _ = last_layer(test_images)
roundings = {"nearest": lambda v, _: torch.round(v), "stochastic": stochastic_round}
scores = {}
for name, rounding in roundings.items():
    for lr in (0.02, 0.1, 0.3):
        runs = [train_on_grid(rounding, lr, seed, x_train, y_train) for seed in SEEDS]
        scores[name, lr] = [
            [100 * float(((f @ w).argmax(1) == t).float().mean()) for w, _ in runs]
            for f, t in ((features, labels), (test_features, test_labels))
        ]
        right = np.mean(scores[name, lr][1])
        print(f"{name:10} rate {lr:4}: {right:.1f}%, updates below half a step {runs[0][1]:.0f}%")

# %% tags=["nbval-ignore-output"]
best = {
    name: max((k for k in scores if k[0] == name), key=lambda k: np.mean(scores[k][0]))
    for name in ("nearest", "stochastic")
}
at_best = np.subtract(scores[best["stochastic"]][1], scores[best["nearest"]][1])
claims.verdict("05.stochastic_rounding_trains", measure.paired_t(at_best, "points"))

# %% [markdown]
# At the smallest rate nearly every update is lost, and nearest rounding stalls. At larger ones some
# updates reach half a step; those are enough, and the difference goes. So the sentence needs its
# condition: it bites where rate times gradient stays below half a step and the rate can't be
# raised, as at the end of a long training, in bf16, or with 8-bit weights (chapter 07).
#
# ### Formats of today: small floats and shared exponents
# A float of a few bits is a grid whose step grows with the number: E4M3 has four bits of exponent
# and three of mantissa. Ten lines make all of them.


# %%
def to_float(x, exponent_bits, mantissa_bits, largest):
    """Nearest number of the format, ties to even, saturated at ±largest; subnormals included."""
    least = 2 - 2 ** (exponent_bits - 1)  # the smallest exponent: below it the step stays
    _, exponent = torch.frexp(x)  # x = m · 2^exponent, 0.5 ≤ m < 1
    step = torch.ldexp(torch.ones_like(x), (exponent - 1).clamp(min=least) - mantissa_bits)
    return (torch.round(x / step) * step).clamp(-largest, largest)


# %%
E2M1, E4M3, E5M2 = (2, 1, 6.0), (4, 3, 448.0), (5, 2, 57344.0)
x = torch.cat([torch.randn(10_000) * 10.0**e for e in (-4, -2, 0, 1)]).clamp(-448, 448)
assert torch.equal(to_float(x, *E4M3), x.to(torch.float8_e4m3fn).float())
assert torch.equal(to_float(x, *E5M2), x.to(torch.float8_e5m2).float())
print("E2M1:", to_float(torch.linspace(0, 7, 1000), *E2M1).unique().tolist())

# %% [markdown]
# Bit-equal to torch's own types. Four such bits are useless alone and good with a scale for each
# *block*. *MX* (OCP 2023): blocks of 32 share a power of two. *NVFP4*: blocks of 16 share an E4M3
# number, and the tensor one in fp32. *NF4* (Dettmers et al. 2023): blocks of 64 with their largest
# size, codes at the quantiles of a normal distribution.


# %%
def mx(w, element, block=32):
    """OCP MX: each block's exponent is that of its largest size, less the element's own largest."""
    rows = w.reshape(-1, block)
    _, exponent = torch.frexp(rows.abs().amax(1, keepdim=True))
    shared = torch.ldexp(torch.ones(len(rows), 1), exponent - 1 - int(math.log2(element[2])))
    return (to_float(rows / shared, *element) * shared).reshape(w.shape)


def nvfp4(w, block=16):
    rows = w.reshape(-1, block)
    whole = rows.abs().max() / (6 * 448)  # one fp32 number a tensor
    shared = to_float(rows.abs().amax(1, keepdim=True) / 6 / whole, *E4M3) * whole
    return (to_float(rows / shared.clamp(min=1e-30), *E2M1) * shared).reshape(w.shape)


# %%
def nf4_values(offset=0.9677083):
    """The 16 codes: 8 quantiles above zero, zero, 7 below, scaled to ±1 (QLoRA, appendix E)."""
    up = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64))[:-1]
    down = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64))[:-1]
    values = torch.cat([up, torch.zeros(1), down]).sort().values
    return (values / values.max()).float()


def nf4(w, block=64):
    rows, values = w.reshape(-1, block), nf4_values()
    size = rows.abs().amax(1, keepdim=True).clamp(min=1e-30)
    codes = torch.bucketize(rows / size, (values[1:] + values[:-1]) / 2)
    return (values[codes] * size).reshape(w.shape)


# %% [markdown]
# The rival, as for every clever grid: even steps, for each group the best of nine ends.


# %%
def even_clipped(w, group=64):
    rows = w.reshape(-1, group)
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    tried = torch.stack(
        [round_trip(rows.clamp(e * low, e * high), 4, affine_grid) for e in np.linspace(0.6, 1, 9)]
    )
    best = (tried - rows).square().sum(2).argmin(0)  # for each row
    return tried[best, torch.arange(len(rows))].reshape(w.shape)


# %% tags=["nbval-ignore-output"]
FORMATS = {
    "MXFP8 (8.25 bits)": lambda w: mx(w, E4M3),
    "even steps, group of 32 (4.5 bits)": lambda w: fake_quantize(w, 4, "group"),
    "MXFP4 (4.25 bits)": lambda w: mx(w, E2M1),
    "NVFP4 (4.5 bits)": nvfp4,
    "NF4 (4.25 bits)": nf4,
    "even steps, clipped (4.3 bits)": even_clipped,
}
large = {name: w for name, w in weights.items() if w.numel() % 64 == 0 and w[0].numel() % 32 == 0}
for name, format_ in FORMATS.items():
    decibels = np.mean([sqnr_db(w, format_(w)) for w in large.values()])
    right = right_with({n: format_(w) for n, w in large.items()}, images, labels)
    print(f"{name:36} {decibels:5.1f} dB  {measure.paired_share(reference, right)}")

# %% [markdown]
# Compare at equal bits. A block of 16 costs twice the scales of one of 32; MX pays for a scale that
# can be a power of two only, up to half of its codes' range. And see what is left between the
# cleverest and the last row. None of this says which is fast: that
# is decided by what the hardware multiplies (chapter 07).
#
# ### A myth: padding is zero, and zero is zero
# A grid fitted to the values alone has no code for 0.0 if they are all positive. Pad a quantized
# image all the same, and a convolution is silently wrong at its border. The check: compare with
# padding before quantizing.

# %% tags=["nbval-ignore-output"]
image, kernel = torch.empty(1, 1, 4, 4).uniform_(0.5, 1.5), torch.ones(1, 1, 3, 3)
image[0, 0, 0, 0], image[0, 0, 3, 3] = 0.5, 1.5
exact = F.conv2d(F.pad(image, (1, 1, 1, 1)), kernel)
codes = F.pad(((image - 0.5) * 255).round(), (1, 1, 1, 1))  # a grid from 0.5 to 1.5, padded by 0
wrong = F.conv2d(codes / 255 + 0.5, kernel)
scale, zero_point, qmin, qmax = affine_grid(image.reshape(1, -1), 8)
codes = F.pad(quantize(image, scale, zero_point, qmin, qmax), (1, 1, 1, 1), value=int(zero_point))
right = F.conv2d(dequantize(codes, scale, zero_point), kernel)
for name, result in {"range without zero": wrong, "zero-point as padding": right}.items():
    error = (result - exact).abs()[0, 0]
    print(f"{name:22} error inside {error[1:-1, 1:-1].max():.2f}, at the border {error.max():.2f}")

# %% [markdown]
# The value of the code 0 is 0.5 there, and a corner of this kernel sees five of them. The right way
# has two parts: widen the range until it holds 0, and pad with the zero-point.
#
# ### Rotations, against outliers
# If one input channel is a hundred times larger than the others, its token's scale drowns them.
# Turn the inputs by an orthogonal matrix $H$ and the weights as well: $(xH)(WH)^T = xW^T$, exactly,
# and the outlier is spread over all channels (QuaRot, Ashkboos et al. 2024). The control has no
# outlier: there it must be worth nothing.

# %% tags=["nbval-ignore-output"]
from scipy.linalg import hadamard

H = torch.tensor(hadamard(128) / math.sqrt(128), dtype=torch.float64)
torch.manual_seed(0)
x, w = torch.randn(512, 128, dtype=torch.float64), torch.randn(64, 128, dtype=torch.float64)
for name, factor in (("no outlier", 1), ("one channel 100 times larger", 100)):
    x[:, 5] *= factor
    assert torch.allclose((x @ H) @ (w @ H).T, x @ w.T)
    plain, turned = round_trip(x, 4) @ w.T, round_trip(x @ H, 4) @ (w @ H).T
    w_small = w.clone()
    w_small[:, 5] = 0  # what the other channels say
    others = x @ w_small.T
    print(
        f"{name}: the others' SQNR {sqnr_db(others, plain - x[:, 5:6] @ w[:, 5:6].T):.1f} dB,"
        f" turned {sqnr_db(others, turned - x[:, 5:6] @ w[:, 5:6].T):.1f} dB"
    )
