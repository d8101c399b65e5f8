# %% [markdown]
# # 05 · Quantization math
#
# **What does a number lose when it gets only a few bits, and can you know it before you run
# anything?**
#
# After this chapter you can
# - *compute* a scale and a zero-point by hand, and say which error they allow,
# - *predict* the signal-to-noise ratio of a quantized tensor from its range, and say when the
#   prediction breaks,
# - *write* a linear layer that uses integers from its input to its output,
# - *choose* a clipping range by four methods and defend the choice,
# - *compare* quantization with its rivals (codebook, Huffman code, low rank) by the bytes of real
#   files.
#
# 170 minutes with the two parts called *Further* · before this: 01 Measurement, and the idea
# of a trained network from 02 · runs on any CPU

# %% tags=["parameters"]
import os

PROFILE = os.environ.get("COURSE_PROFILE", "fast")

# %% tags=["nbval-ignore-output"]
import copy
import math

import numpy as np
import torch
import torch.nn.functional as F

from course_utils import claims, data, exercises, machine, measure, models, plots, training

SMOKE = PROFILE == "smoke"
IMAGES = {"smoke": (200, 400), "fast": (2000, 5000), "full": (3000, 10_000)}
VALIDATION, TEST = IMAGES[PROFILE]  # choices are made on the first, verdicts on the second
SEEDS = range(10 if PROFILE == "full" else 5)
machine.card()

# %% [markdown]
# ## Recall
# 1. In chapter 1 a comparison gave a speed-up of 1.04 with the interval [0.98, 1.11]. Which of the
#    four verdicts is it?
#    <details><summary>Answer</summary>Inconclusive. The interval holds 1, so neither arm is known
#    to be faster, and it reaches beyond ±3%, so "no difference" would claim too much.</details>
# 2. Chapter 2 split the data three ways. On which part do you choose a clipping range, and on which
#    do you report?
#    <details><summary>Answer</summary>You choose on validation images (or on training images, where
#    only ranges are read off). The test images are for the verdict alone: a choice made on them
#    would flatter itself.</details>
# 3. In chapter 3 (if you took it) nine weights of ten were set to zero. How much smaller did the
#    saved file become?
#    <details><summary>Answer</summary>Not at all: a zero in fp32 takes four bytes like any other
#    number. Today you meet the two things that make a file smaller: fewer bits for each number, and
#    a code that spends few bits on frequent ones.</details>

# %% [markdown]
# ## Predict
# The course's trained network stores every weight in 32 bits. Rounded to fewer bits it will at some
# point fail. Take one scale for each output channel: down to how many bits does the network stay
# within one point of its accuracy?

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
# Rounding moves a weight by at most half a step, so no error can exceed $s/2$, here 0.1. That is
# the *error bound*, and it holds for every number between the two ends.
#
# You may know the same map as *min–max normalisation*: bring the weights to the interval from 0 to
# 1, then multiply by the largest code and round. The division by the range happens first instead of
# last; nothing else differs.

# %%
normalised = (w - w.min()) / (w.max() - w.min())
print("codes by min-max normalisation", torch.round(7 * normalised).int().tolist())

shifted = w + 0.1  # the same weights, a tenth higher
start = float(shifted.min() / scale)
print(f"0.0 lies {-start:.1f} steps from the left end")

# %% [markdown]
# The second line is a problem. After the shift, zero lies *between* two codes, so no code stands
# for it. Zero is not any number: padding is made of zeros, a ReLU gives zeros, pruned weights are
# zeros. A small error on each of them adds up.
#
# So the grid is moved until zero is on it. The code that means 0.0 is the *zero-point* $z$, an
# integer:
#
# $$q = \mathrm{clamp}\bigl(\mathrm{round}(x/s) + z,\; q_{min},\; q_{max}\bigr),
# \qquad \hat x = s\,(q - z)$$
#
# Here $x$ is a number, $q$ its code, $\hat x$ what comes back; $q_{min}$ and $q_{max}$ are the
# smallest and the largest code, 0 and $2^b - 1$ for $b$ bits. The clamp is called *saturation*:
# what lies beyond the last code gets the last code. A grid whose zero-point is free is *affine*. A
# grid with $z = 0$ and as many codes below zero as above is *symmetric*; of the even number of
# codes it leaves one unused.


# %%
def affine_grid(rows, bits):
    """Scale and zero-point for each row of `rows` (R, N); the range is widened until it holds 0."""
    rows = F.pad(rows, (0, 1))  # a column of zeros: now every range holds 0, even an empty one
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, 1.0)  # a row of zeros has no width; any scale will do
    return scale, torch.round(-low / scale), 0, 2**bits - 1


def symmetric_grid(rows, bits):
    """A scale for each row of `rows` (R, N); the zero-point is 0, the codes run from
    -(2^(bits-1)-1) to the same above.
    """
    top = 2 ** (bits - 1) - 1
    scale = F.pad(rows, (0, 1)).abs().amax(1, keepdim=True) / top
    return torch.where(scale > 0, scale, 1.0), torch.zeros_like(scale), -top, top


def quantize(x, scale, zero_point, qmin, qmax, divide=True):
    """Codes of x. ONNX divides by the scale; torch multiplies by 1/scale (`divide=False`)."""
    if not torch.isfinite(x).all():
        bad = int((~x.isfinite()).sum())
        raise ValueError(
            f"{bad} of {x.numel()} values are NaN or infinite; no code stands for those."
        )
    steps = x / scale if divide else x * (1 / scale)
    return (torch.round(steps) + zero_point).clamp(qmin, qmax).to(torch.int32)


def dequantize(codes, scale, zero_point):
    return (codes - zero_point) * scale


# %% [markdown]
# A function like this is judged by its edges. Look at each line before you read on: what would you
# have expected?


# %%
def show_codes(name, values, bits=8, grid=affine_grid):
    x = torch.tensor([values])
    scale, zero_point, qmin, qmax = grid(x, bits)
    codes = quantize(x, scale, zero_point, qmin, qmax)[0].tolist()
    print(f"{name:20} codes {codes}  zero-point {int(zero_point)}")


one = (torch.tensor(1.0), 0, 0, 255)  # a grid of whole numbers, to see the rounding itself
print("ties                 codes", quantize(torch.tensor([0.5, 1.5, 2.5, 3.5]), *one).tolist())
print(
    "outside the range    codes", quantize(torch.tensor([-3.0, 254.6, 255.4, 900.0]), *one).tolist()
)
show_codes("all positive", [0.5, 1.0])
show_codes("all negative", [-0.5, -1.0])
show_codes("all equal", [0.7, 0.7, 0.7])
show_codes("all zero", [0.0, 0.0])
show_codes("empty", [])
show_codes("symmetric, 4 bits", [-1.0, 0.4, 0.9], 4, symmetric_grid)
with exercises.fails(ValueError):
    quantize(torch.tensor([1.0, float("nan"), float("inf")]), *one)

# %% [markdown]
# Ties go to the *even* neighbour: always rounding them up would push every mean up. One-sided
# tensors put the zero-point at an end, and equal values survive because the range reaches down to
# zero. NaN and infinity are refused. A library that accepts a NaN has to invent a code for it; *The
# tool of the field* shows which.

# %% [markdown]
# ## Measure: inside the range and outside it
# The bound has two halves. Send a ramp of numbers through a `4`-bit grid made for the range from −1
# to 1, and go beyond it.

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
ax.axhline(half, color="0.4", linestyle="--", linewidth=1, label="half a step")
ax.axhline(-half, color="0.4", linestyle="--", linewidth=1)
ax.legend()
plots.show(
    figure,
    "The error is a sawtooth within half a step inside the range and grows as a straight line"
    " outside it.",
)

# %% [markdown]
# Between the two ends the error is a sawtooth that never leaves the dashed lines: *rounding error*.
# Beyond them it grows without bound, one for one with the number: *clipping error*. Everything in
# this chapter trades one for the other. A wider range means wider teeth, a narrower range means
# more numbers out on the slopes.

# %% [markdown]
# ## Measure: does each bit buy six decibels?
# The sawtooth has a size you can compute. If a number is equally likely to fall anywhere in a step,
# its error is uniform between $-s/2$ and $s/2$, and the mean squared error is $s^2/12$. One bit
# more halves $s$ and so divides the squared error by four. In decibels that is $10\log_{10}4 =
# 6.02$, the *six-decibel rule* (Bennett 1948). The ratio of the signal's power to the error's power
# is the *SQNR*, the signal-to-quantization-noise ratio.

# %% tags=["nbval-ignore-output"]
model = models.baseline()
weights = {
    n: p.detach() for n, p in model.named_parameters() if p.dim() > 1
}  # ten, without BatchNorm
layer = weights["stages.2.conv2.weight"].reshape(1, -1)
torch.manual_seed(0)
tensors = {
    "uniform numbers": torch.rand(1, 100_000) * 2 - 1,
    "weights of a trained layer": layer,
    "the same and one outlier": torch.cat([layer, 60 * layer.std()[None, None]], 1),
}


def sqnr_db(x, restored):
    """Power of the signal over power of the error, in decibels; infinite if nothing was lost."""
    signal, error = x.double().square().sum(), (x - restored).double().square().sum()
    return float(10 * torch.log10(signal / error))


# %% tags=["nbval-ignore-output"]
bits, measured, theory = np.arange(2, 13), {}, {}
for name, x in tensors.items():
    grids = [affine_grid(x, int(b)) for b in bits]
    measured[name] = np.array([sqnr_db(x, dequantize(quantize(x, *g), *g[:2])) for g in grids])
    theory[name] = np.array(
        [float(10 * torch.log10(12 * x.square().mean() / g[0] ** 2)) for g in grids]
    )
gap = np.array([np.abs(measured[name] - theory[name]) for name in tensors]).max(0)

figure, ax = plots.axes(
    "bits",
    "SQNR (dB)",
    height=3.8,
    title=(
        f"Theory is off by {gap[bits >= 8].max():.2f} dB at most from 8 bits on, by up to"
        f" {gap.max():.0f} dB below"
    ),
)
for i, name in enumerate(tensors):
    ax.plot(bits, theory[name], linestyle="--", color=plots.COLOURS[i], linewidth=1)
    ax.plot(bits, measured[name], plots.MARKERS[i], color=plots.COLOURS[i], label=name)
ax.plot([], [], linestyle="--", color="0.4", label="theory: $s^2/12$")
ax.legend()
plots.show(
    figure,
    "SQNR against bits for three tensors: measured points on dashed straight theory lines, lower"
    " for the tensor with an outlier.",
)

# %% [markdown]
# All three tensors climb with the same slope; they differ in height. The height is set by the ratio
# of the range to the typical size of a number: the outlier stretches the range, so it costs all the
# others some bits at every width. At few bits the points leave the dashed lines, because then most
# weights share one or two codes and their error is no longer uniform in a step.
#
# The claim is about the slope. Fit it from four bits on, one fit for each layer of the network, and
# treat the ten layers as the sample.


# %% tags=["nbval-ignore-output"]
def round_trip(rows, bits, grid=symmetric_grid):
    scale, zero_point, qmin, qmax = grid(rows, bits)
    return dequantize(quantize(rows, scale, zero_point, qmin, qmax), scale, zero_point)


fit = list(range(4, 13))
slopes = []
for x in weights.values():
    curve = [sqnr_db(x.reshape(1, -1), round_trip(x.reshape(1, -1), b, affine_grid)) for b in fit]
    slopes.append(np.polyfit(fit, curve, 1)[0])
exact = np.polyfit(fit, [20 * math.log10(2**b - 1) for b in fit], 1)[0]
print(
    f"theory with 2^b codes: 6.02 dB a bit; with the 2^b - 1 steps between them: {exact:.2f} dB"
    " a bit"
)
claims.verdict("05.six_db_a_bit", measure.paired_t(slopes, "dB"))

# %% [markdown]
# Why a little above 6.02? Because $2^b$ codes have only $2^b - 1$ steps between them. From four
# bits to five the step shrinks to $15/31$ of itself, a little less than half. The line printed
# above the verdict has the slope that this predicts.

# %% [markdown]
# ## Measure: who shares a scale?
# One scale for a whole tensor is set by its largest weight, wherever it sits. Give each output
# channel its own scale, or each group of 32 neighbours, and an outlier costs its own row only. This
# choice is called the *granularity*.


# %%
def rows_of(w, granularity, group=32):
    """The weight as rows that share one scale. A channel that groups of 32 do not divide stays one
    row.
    """
    if granularity == "tensor":
        return w.reshape(1, -1)
    if granularity == "channel" or w[0].numel() % group:
        return w.reshape(len(w), -1)
    return w.reshape(-1, group)


def fake_quantize(w, bits, granularity, grid=symmetric_grid):
    """Quantized and restored at once: fp32 numbers that lie on the grid."""
    return round_trip(rows_of(w, granularity), bits, grid).reshape(w.shape)


def accuracy_with(new_weights, images, labels):
    """Accuracy of the network (0 to 1) with some of its weights replaced."""
    twin = copy.deepcopy(model)
    twin.load_state_dict(new_weights, strict=False)
    return training.accuracy(twin, images, labels)


shapes = {
    g: tuple(rows_of(weights["stages.1.conv2.weight"], g).shape)
    for g in ("tensor", "channel", "group")
}
shapes

# %% tags=["nbval-ignore-output"]
images, labels = (t[:VALIDATION] for t in data.fashion_mnist("validation"))
full_precision = accuracy_with({}, images, labels)
widths = (3, 4, 8) if SMOKE else (2, 3, 4, 5, 6, 8)
points = {
    g: [
        100 * accuracy_with({n: fake_quantize(w, b, g) for n, w in weights.items()}, images, labels)
        for b in widths
    ]
    for g in shapes
}
near = [b for b, a in zip(widths, points["channel"], strict=True) if a >= 100 * full_precision - 1]
fewest = min(near, default=32)
plots.lines(
    widths,
    points,
    xlabel="bits for a weight (symmetric grid)",
    ylabel="accuracy on validation images (%)",
    title=f"One scale a channel: within a point of fp32 down to {fewest} bits",
    reference=(100 * full_precision, "fp32"),
    alt=(
        "Accuracy against bits for one scale a tensor, a channel and a group: flat at many bits,"
        " then a cliff, at more bits for coarser scales."
    ),
)
exercises.reveal("05.fewest_bits", fewest, "bits")

# %% [markdown]
# The decibels fell evenly; the accuracy does not. It stays flat over several bits and then drops
# off a cliff. A network tolerates noise up to a point, so a rule about noise tells you how far you
# are from the cliff, never how steep it is. The finer the granularity, the fewer bits the cliff is
# at. Test images give the verdict, at four bits.

# %% tags=["nbval-ignore-output"]
test_images, test_labels = (t[:TEST] for t in data.fashion_mnist("test"))


def right_answers(granularity, bits=4):
    twin = copy.deepcopy(model)
    twin.load_state_dict(
        {n: fake_quantize(w, bits, granularity) for n, w in weights.items()}, strict=False
    )
    return (training.predict(twin, test_images).argmax(1) == test_labels).tolist()


claims.verdict(
    "05.per_channel_beats_per_tensor",
    measure.paired_share(right_answers("tensor"), right_answers("channel")),
)

# %% [markdown]
# ## Measure: the file
# Fake-quantized weights are fp32 numbers: saved as they are, they save nothing. To shrink the file
# you must store the codes in one byte each, with the scales beside them, and leave BatchNorm and
# the biases in fp32.


# %% tags=["nbval-ignore-output"]
def int8_parts(w):
    """What goes into the file for one weight tensor, and the tensor that comes out of it."""
    rows = rows_of(w, "channel")
    scale, zero_point, qmin, qmax = symmetric_grid(rows, 8)
    codes = quantize(rows, scale, zero_point, qmin, qmax)
    restored = dequantize(codes, scale, zero_point).reshape(w.shape)
    return {"codes": codes.to(torch.int8), "scale": scale}, restored


def file_of(encode, network=model):
    """Bytes of the saved network whose weights went through `encode`, and the weights as they come
    back.
    """
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

# ResNet-18 may be untrained here: the bytes of a file do not depend on the values.
for name, network in {"ResNet-18": resnet18(), "the course's network": model}.items():
    fp32_bytes, (int8_bytes, _) = measure.saved_bytes(network), file_of(int8_parts, network)
    ratio = fp32_bytes / int8_bytes
    print(
        f"{name}: {fp32_bytes / 1e6:.3f} MB → {int8_bytes / 1e6:.3f} MB, {ratio:.2f} times smaller"
    )
claims.verdict("05.four_times_smaller", ratio)

# %% [markdown]
# Both ratios fall short of four, and the small network's more so. What keeps them below is
# everything that did not shrink: the scales, the BatchNorm numbers, the header with the names. In a
# network of millions of weights this remainder hardly shows; in a small one, or with a scale for
# every few weights, it does. The verdict is about the small one.

# %% [markdown]
# ## Measure: where to clip
# Weights are known, so their range is known. Activations are not: you look at some batches and fix
# a range before you deploy. That is *calibration*. Four methods are in wide use. Each answers one
# question: where should the range end?
# - *Maximum*: at the largest value seen.
# - *Percentile*: where only a thousandth of the values lies beyond.
# - *Squared error*: where the measured error of the round trip is smallest.
# - *Entropy*: where the histogram of the quantized values tells least apart from the original one
#   (Migacz 2017).


# %%
def clipped(x, clip, bits):
    """Round trip of numbers ≥ 0 on a grid that ends at `clip`."""
    scale = torch.as_tensor(clip) / (2**bits - 1)
    return dequantize(quantize(x, scale, 0, 0, 2**bits - 1), scale, 0)


def by_maximum(x, bits):
    return float(x.max())


def by_percentile(x, bits, share=99.9):
    return float(np.percentile(x.numpy(), share))


def by_squared_error(x, bits):
    candidates = torch.linspace(0.05, 1, 58) * x.max()
    return float(min(candidates, key=lambda clip: (clipped(x, clip, bits) - x).square().mean()))


# %% [markdown]
# The entropy method needs more lines. For each candidate range it builds two histograms: $P$, in
# which everything beyond the range is pushed into the last bin, and $Q$, which has only $2^b$
# different heights. It keeps the range with the smallest *Kullback–Leibler divergence* $\sum P
# \log(P/Q)$: how many surprises you would meet if you believed $Q$ and saw $P$. Zeros are left out:
# a ReLU makes so many of them that they would decide alone, and a zero is exact at any range.


# %%
def by_entropy(x, bits, bins=2048):
    count, top = torch.histc(x[x > 0].double(), bins, 0, float(x.max())), 2**bits
    best, best_end = math.inf, bins
    for end in range(128, bins + 1, 16):
        inside = count[:end]
        p = inside.clone()
        p[-1] += count[end:].sum()
        level = torch.arange(end) * top // end  # which of the 2^b codes a bin falls to
        total = torch.zeros(top, dtype=torch.float64).index_add_(0, level, inside)
        filled = torch.zeros(top, dtype=torch.float64).index_add_(0, level, (inside > 0).double())
        q = torch.where(inside > 0, (total / filled.clamp(min=1))[level], 0.0)
        p, q = p / p.sum(), (q / q.sum()).clamp(min=1e-12)
        divergence = float((p * (p.clamp(min=1e-30) / q).log()).sum())
        if divergence < best:
            best, best_end = divergence, end
    return best_end / bins * float(x.max())


METHODS = {
    "maximum": by_maximum,
    "percentile": by_percentile,
    "squared error": by_squared_error,
    "entropy": by_entropy,
}

# %% [markdown]
# First numbers whose law is known: Laplace, with mean size 1. Banner et al. (2019) derive the error
# of clipping them at $c$: $2e^{-c}$ for what lies beyond, plus the rounding error $s^2/12$, where
# the step $s$ grows with $c$. Then one real tensor, what a ReLU of the network gives for training
# images.

# %%
torch.manual_seed(1)
laplace = torch.distributions.Laplace(0.0, 1.0).sample((1, 50_000))
clips = torch.linspace(1, 12, 23)
grids = [symmetric_grid(c.reshape(1, 1), 4) for c in clips]
found = [
    float((dequantize(quantize(laplace, *g), *g[:2]) - laplace).square().mean()) for g in grids
]
theory = 2 * torch.exp(-clips) + torch.cat([g[0] for g in grids]).flatten() ** 2 / 12

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

figure, panels = plots.axes(
    "clip",
    "mean squared error",
    title=(
        f"Laplace: best clip {clips[np.argmin(found)]:.1f} measured, {clips[theory.argmin()]:.1f}"
        f" in theory; a ReLU's: {shares[np.argmin(curve)]:.2f} of its maximum"
    ),
    columns=2,
)
panels[0].plot(clips, theory, "--", color="0.4", label="theory")
panels[0].plot(
    clips, found, "o", color=plots.COLOURS[0], markersize=4, label="measured, Laplace, 4 bits"
)
panels[1].plot(shares * relu.max(), curve, color=plots.COLOURS[0], label="measured, ReLU, 3 bits")
for i, (name, method) in enumerate(METHODS.items()):
    c = method(relu, 3)
    at = float((clipped(relu, c, 3) - relu).square().mean())
    panels[1].plot(c, at, plots.MARKERS[i], color=plots.COLOURS[i + 1], label=name)
for panel in panels:
    panel.set_yscale("log")
    panel.legend(fontsize=8, loc="upper center")
plots.show(
    figure,
    "Squared error against the clip: a valley between clipping error on the left and rounding error"
    " on the right, for Laplace numbers on the theory's curve and for a ReLU's output with the"
    " choices of four calibration methods marked.",
)

# %% [markdown]
# Both curves are valleys. On the left slope clipping error rules, on the right slope rounding
# error, and the bottom lies far below the maximum: a rare large value is not worth a wide step for
# all the others. The theory finds the same bottom. Does it matter for accuracy? Every ReLU's output
# goes through its own grid now, the weights stay fp32.


# %% tags=["nbval-ignore-output"]
def accuracy_clipped(method, bits):
    ends = {m: method(x, bits) for m, x in seen.items()}
    hooks = [m.register_forward_hook(lambda m, _, y: clipped(y, ends[m], bits)) for m in relus]
    try:
        return training.accuracy(model, images[:1000], labels[:1000])
    finally:
        for hook in hooks:
            hook.remove()


by_method = {name: 100 * accuracy_clipped(method, 3) for name, method in METHODS.items()}
ahead = max(by_method, key=by_method.get)
plots.bars(
    {"fp32 activations": 100 * training.accuracy(model, images[:1000], labels[:1000])} | by_method,
    xlabel="accuracy on validation images (%), activations in 3 bits",
    title=(
        f"{ahead.capitalize()} leads the plain maximum by"
        f" {by_method[ahead] - by_method['maximum']:.1f} points"
    ),
    alt="Accuracy with 3-bit activations for the four calibration methods and for fp32.",
)

# %% [markdown]
# At three bits the method decides. Run `accuracy_clipped(by_maximum, 8)` in a cell of your own: at
# eight bits the steps are so fine that hardly any choice of range can hurt, which is why the plain
# maximum keeps its good name. Mind that it can only grow with more calibration images, while the
# other three settle.

# %% [markdown]
# ## From scratch: an explorer
# Four knobs are on the table: bits, scheme, granularity, clip. Move them and watch the codes (ticks
# below the histogram) spread over the weights of one layer. Without a running Jupyter kernel you
# see no sliders; the figure after them says the same.

# %%
knobs = {
    "bits": [2, 3, 4, 6, 8],
    "scheme": {"symmetric": symmetric_grid, "affine": affine_grid},
    "granularity": ["tensor", "channel", "group"],
}
explored = weights["stages.1.conv1.weight"]


def explore(bits, scheme, granularity, clip):
    """SQNR in dB of the explored layer, the range of each row cut to `clip` of its largest size;
    also what came back.
    """
    rows = rows_of(explored, granularity)
    end = clip * rows.abs().amax(1, keepdim=True)
    grid = knobs["scheme"][scheme](rows.clamp(-end, end), bits)
    restored = dequantize(quantize(rows, *grid), *grid[:2])
    return sqnr_db(rows, restored), restored


def picture(bits=4, scheme="symmetric", granularity="tensor", clip=1.0):
    ratio, restored = explore(bits, scheme, granularity, clip)
    title = f"{bits} bits, {scheme}, one scale a {granularity}: SQNR {ratio:.1f} dB"
    figure, ax = plots.axes("weight", "weights", title=title, height=2.8)
    ax.hist(explored.flatten().numpy(), 120, color="0.75")
    levels = restored.unique()[:600]
    ax.plot(levels, torch.zeros_like(levels), "|", color=plots.COLOURS[1], markersize=14)
    plots.show(
        figure, f"Histogram of a layer's weights with the {len(levels)} values that survive."
    )


# %% tags=["nbval-ignore-output"]
import ipywidgets

plots.explore(
    picture,
    bits=ipywidgets.SelectionSlider(options=knobs["bits"], value=4),
    scheme=list(knobs["scheme"]),
    granularity=knobs["granularity"],
    clip=ipywidgets.FloatSlider(value=1.0, min=0.2, max=1.0, step=0.05, continuous_update=False),
)

# %% tags=["nbval-ignore-output"]
ends = np.linspace(0.2, 1.0, 9 if SMOKE else 17)
grid_of = {
    (s, g, b): [explore(b, s, g, c)[0] for c in ends]
    for s in knobs["scheme"]
    for g in ("tensor", "group")
    for b in (3, 4, 8)
}
best = max((k for k in grid_of if k[2] == 4), key=lambda k: max(grid_of[k]))
figure, panels = plots.axes(
    "clip (share of the largest size)",
    "SQNR (dB)",
    columns=2,
    height=3.6,
    title=(
        f"At 4 bits the best is {best[0]}, one scale a {best[1]}, clipped at"
        f" {ends[np.argmax(grid_of[best])]:.2f}: {max(grid_of[best]):.1f} dB"
    ),
)
for panel, scheme in zip(panels, knobs["scheme"], strict=True):
    for i, b in enumerate((8, 4, 3)):
        for g, style in (("tensor", "-"), ("group", "--")):
            panel.plot(
                ends, grid_of[scheme, g, b], style, color=plots.COLOURS[i], label=f"{b} bits, {g}"
            )
    panel.set_title(scheme, fontsize=10)
panels[1].set_ylim(panels[0].get_ylim())
panels[0].legend(fontsize=7)
plots.show(
    figure,
    "SQNR against the clip for 3, 4 and 8 bits, whole tensor and groups, in two panels for the"
    " symmetric and the affine scheme.",
)

# %% [markdown]
# Read along one curve: with few bits it rises to a peak and falls, and the peak is the best clip.
# With eight bits it climbs almost to the right end, since rounding costs little there and clipping
# is all that is left to lose. A group has few weights and so hardly any outliers: clipping has less
# to give it.

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
terms = [
    qx @ qw,
    -zw * qx.sum(1, keepdim=True),
    -zx * qw.sum(0, keepdim=True),
    torch.tensor([[2 * zx * zw]]),
]
print("product, row sum, column sum, constant:", [int(t) for t in terms])
print("their sum:", int(sum(terms)), " computed directly:", int(direct))

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
    mantissa, exponent = math.frexp(multiplier)  # mantissa between 0.5 and 1
    m0, shift = round(mantissa * 2**31), 31 - exponent
    return (m0, shift) if m0 < 2**31 else (m0 // 2, shift - 1)


def requantize(accumulator, m0, shift, zero_point):
    """int32 sums → codes 0 … 255, in integers: multiply, add half, shift, add the zero-point,
    saturate.
    """
    rounded = (accumulator.to(torch.int64) * m0 + (1 << (shift - 1))) >> shift
    return (rounded + zero_point).clamp(0, 255).to(torch.uint8)


m0, shift = fixed_point(0.0123)
print(f"0.0123 = {m0} / 2^{shift}, relative error {abs(m0 / 2**shift / 0.0123 - 1):.0e}")
sums = torch.tensor([1000, -1000, 10**9], dtype=torch.int32)
print("1000, -1000 and 10**9 become", requantize(sums, m0, shift, 100).tolist())

# %% [markdown]
# Now the network's own last layer, on real features. The judge is ONNX, the exchange format whose
# operators are defined in a standard and in a *reference implementation* in plain numpy.
# `MatMulInteger` gives the accumulators, `QLinearMatMul` the codes.

# %%
from onnx import helper
from onnx.reference import ReferenceEvaluator


def onnx_model(operator, inputs, output_type, **attributes):
    """A model of one operator; `inputs` are numpy arrays."""
    names = [f"input{i}" for i in range(len(inputs))]
    values = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in zip(names, inputs, strict=True)
    ]
    node = helper.make_node(operator, names, ["output"], **attributes)
    output = helper.make_tensor_value_info(
        "output", helper.np_dtype_to_tensor_dtype(np.dtype(output_type)), None
    )
    graph = helper.make_graph([node], operator, values, [output])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def onnx_reference(operator, *inputs, output_type, **attributes):
    inputs = [np.asarray(a) for a in inputs]
    evaluator = ReferenceEvaluator(onnx_model(operator, inputs, output_type, **attributes))
    return torch.from_numpy(evaluator.run(None, {f"input{i}": a for i, a in enumerate(inputs)})[0])


# %%
def last_layer(pictures):
    """What goes into the network's last layer and what comes out: features (N, 128), logits (N,
    10).
    """
    seen = []
    hook = model.fc.register_forward_hook(lambda m, inputs, y: seen.append((inputs[0], y)))
    training.predict(model, pictures)
    hook.remove()
    return (torch.cat(part).clone() for part in zip(*seen, strict=True))


# %%
features, logits = last_layer(images)
w = model.fc.weight.detach().T.contiguous()  # (128, 10)


def codes_of(t):
    scale, zero_point, qmin, qmax = affine_grid(t.reshape(1, -1), 8)
    return quantize(t, scale, zero_point, qmin, qmax), float(scale), int(zero_point)


qx, sx, zx = codes_of(features)
qw, sw, zw = codes_of(w)
qw, zw = qw - 128, zw - 128  # the same grid with signed codes: both move, the difference stays
_, sy, zy = codes_of(logits)
accumulator = (qx - zx) @ (qw - zw)
y = requantize(accumulator, *fixed_point(sx * sw / sy), zy)

a, b = qx.numpy().astype(np.uint8), qw.numpy().astype(np.int8)
za, zb, zo = np.uint8(zx), np.int8(zw), np.uint8(zy)
reference = onnx_reference("MatMulInteger", a, b, za, zb, output_type=np.int32)
scales = [np.float32(v) for v in (sx, sw, sy)]
their_y = onnx_reference(
    "QLinearMatMul", a, scales[0], za, b, scales[1], zb, scales[2], zo, output_type=np.uint8
)
difference = (y.int() - their_y.int()).abs()
print("accumulators", accumulator.dtype, "equal ONNX's:", torch.equal(accumulator, reference))
print("requantized", y.dtype, "within one code of ONNX's:", int(difference.max()) <= 1)

# %% tags=["nbval-ignore-output"]
# The bias is a code too, on the accumulator's scale.
bias = torch.round(model.fc.bias.detach() / (sx * sw)).to(torch.int32)
with_bias = requantize(accumulator + bias, *fixed_point(sx * sw / sy), zy)
same = (with_bias.argmax(1) == logits.argmax(1)).float().mean()
print(f"codes unlike QLinearMatMul's: {int((difference > 0).sum())} of {difference.numel()}")
print(f"same class as the fp32 layer: {100 * same:.2f}% of {len(features)} images")

# %% [markdown]
# The accumulators must be equal, since integers leave no room for rounding. The codes may differ by
# one: `QLinearMatMul` does its requantization in floating point, and a sum that lands next to a tie
# can fall to either side. Such sums are rare.

# %% [markdown]
# ## From scratch: Further · grids that are not even
# Weights crowd around zero. Why should the codes be spread evenly? A *codebook* stores any $2^b$
# values and a code says which one; *k-means* finds the values by turns: each weight goes to its
# nearest value, each value moves to the mean of its weights (Lloyd 1982). A *logarithmic* grid
# takes powers of two, so that a multiplication becomes a shift.


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


def log_codes(w, bits):
    """Sign and exponent below the largest weight; the smallest exponent stands for 0."""
    top = float(w.abs().max())
    drop = torch.round(-torch.log2(w.abs() / top)).clamp(max=2 ** (bits - 1) - 1)
    restored = w.sign() * top * 2.0**-drop
    return torch.where(drop == 2 ** (bits - 1) - 1, 0.0, restored)


w = weights["stages.1.conv1.weight"]
codes, values = codebook(w, 4)
gaps = values.diff()
print(len(values), "values; gaps grow outwards:", bool(gaps[0] > gaps[7] < gaps[-1]))

# %% [markdown]
# At the far end stand two grids with almost no codes. *Binary*: a sign, times the mean size of the
# row, which is the best factor in the sense of squares (Rastegari et al. 2016). *Ternary*: zero
# below a threshold of `0.7` times the mean size, a sign above it (Li and Liu 2016).


# %% tags=["nbval-ignore-output"]
def binary(w):
    rows = rows_of(w, "channel")
    signs = torch.where(rows < 0, -1, 1)
    factor = rows.abs().mean(1, keepdim=True)
    return signs, factor


def ternary(w):
    rows = rows_of(w, "channel")
    large = rows.abs() > 0.7 * rows.abs().mean(1, keepdim=True)
    factor = (rows.abs() * large).sum(1, keepdim=True) / large.sum(1, keepdim=True).clamp(min=1)
    return rows.sign().int() * large, factor


rivals = {
    "4 bits, even steps": fake_quantize(w, 4, "tensor"),
    "4 bits, codebook": values[codes].reshape(w.shape),
    "4 bits, powers of two": log_codes(w, 4),
    "ternary": torch.mul(*ternary(w)).reshape(w.shape),
    "binary": torch.mul(*binary(w)).reshape(w.shape),
}
ratios = {name: sqnr_db(w, r) for name, r in rivals.items()}
plots.bars(
    ratios,
    xlabel="SQNR (dB) of one layer",
    title=(
        "At 4 bits a codebook is worth"
        f" {ratios['4 bits, codebook'] - ratios['4 bits, even steps']:.1f} dB over even steps"
    ),
    alt=(
        "SQNR of one layer for even 4-bit steps, a 4-bit codebook, powers of two, ternary and"
        " binary weights."
    ),
)

# %% [markdown]
# On this measure the best codebook can't be worse than even steps, because even steps are one of
# the codebooks it could choose; k-means starts from even steps and never makes the error larger. It
# has its price: the codes are no longer numbers one can multiply, so every weight must be looked up
# before it is used.

# %% [markdown]
# ## From scratch: Further · a code for frequent numbers
# In a histogram of codes some bars are high. A *Huffman code* (1952) gives short bit strings to
# those and long ones to the rare. Take the two rarest symbols, join them to one, repeat; every join
# makes their strings one bit longer. Only the lengths need to be stored: the strings follow from
# them (the *canonical* code).

# %%
import heapq


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


def canonical(length):
    """{symbol: bit string}: shorter first, then by symbol; each string is the next number."""
    strings, code, before = {}, 0, 0
    for symbol, bits in sorted(length.items(), key=lambda item: (item[1], item[0])):
        code <<= bits - before
        strings[symbol], code, before = format(code, f"0{bits}b"), code + 1, bits
    return strings


canonical(huffman_lengths({0: 9, 1: 4, 2: 2, 3: 1}))

# %%
from collections import Counter


def huffman_encode(codes):
    """Codes → (lengths, packed bytes)."""
    symbols = codes.flatten().tolist()
    length = huffman_lengths(Counter(symbols))
    strings = canonical(length)
    text = "".join(strings[s] for s in symbols)
    return length, np.packbits(np.frombuffer(text.encode(), np.uint8) - 48)


def huffman_decode(length, packed, n):
    symbol_of = {string: symbol for symbol, string in canonical(length).items()}
    found, part = [], ""
    for bit in np.unpackbits(packed).astype("U1"):
        part += bit
        if part in symbol_of:
            found.append(symbol_of[part])
            part = ""
        if len(found) == n:
            return torch.tensor(found)


length, packed = huffman_encode(codes)
print("decoded equals encoded:", torch.equal(huffman_decode(length, packed, codes.numel()), codes))
share = torch.tensor(sorted(Counter(codes.tolist()).values())) / codes.numel()
entropy, mean_bits = float(-(share * share.log2()).sum()), 8 * len(packed) / codes.numel()
print("mean bits lie between the entropy and one more:", entropy <= mean_bits + 1e-6 < entropy + 1)

# %% [markdown]
# No code that gives every symbol its own string can go below the *entropy* of the histogram
# (Shannon 1948), and Huffman's stays less than a bit above it. How much does that save on top of a
# 4-bit codebook? Deep Compression (Han et al. 2016) reports 20 to 30%, on networks that had been
# pruned first. Ours has not. So both are measured.


# %% tags=["nbval-ignore-output"]
def saved_by_huffman(w, bits=4):
    """Percent of the codes' bits that a Huffman code saves."""
    count = Counter(codebook(w, bits, rounds=5 if SMOKE else 20)[0].tolist())
    length = huffman_lengths(count)
    return 100 * (1 - sum(count[s] * length[s] for s in count) / (bits * w.numel()))


def without_smallest(w, share=0.7):
    return torch.where(w.abs() > w.abs().quantile(share), w, 0.0)


plain = measure.paired_t([saved_by_huffman(w) for w in weights.values()], "%")
pruned = measure.paired_t([saved_by_huffman(without_smallest(w)) for w in weights.values()], "%")
print(f"saved as the network is: {plain};  with 70% of the weights pruned: {pruned}")
claims.verdict("05.huffman_saves_a_quarter", plain)

# %% [markdown]
# The verdict depends on the histogram. A codebook already evens it out, for it puts more values
# where more weights are, and what is even cannot be coded shorter. Pruning makes one bar tower over
# the rest. This is the missing half of the lesson of chapter 3: zeros shrink a file once a code
# makes use of them.

# %% [markdown]
# ## Measure: what each byte buys
# One rival remains. A matrix of rank $r$ is a product of two thin ones, $W \approx U V$, and the
# *singular value decomposition* finds the best pair (Eckart and Young 1936). It stores fewer
# numbers, not shorter ones. All candidates now write their file.


# %%
def pack(codes, bits):
    """Codes 0 … 2**bits - 1, packed without gaps into bytes."""
    table = (codes.flatten()[:, None] >> torch.arange(bits - 1, -1, -1)) & 1
    return torch.from_numpy(np.packbits(table.numpy().astype(np.uint8)))


def int4_parts(w):
    rows = rows_of(w, "group")
    grid = symmetric_grid(rows, 4)
    codes = quantize(rows, *grid)
    return {"codes": pack(codes + 7, 4), "scale": grid[0].half()}, dequantize(
        codes, grid[0].half().float(), 0
    ).reshape(w.shape)


def codebook_parts(w, code=False):
    codes, values = codebook(w, 4, rounds=5 if SMOKE else 20)
    parts = {"codes": pack(codes, 4), "values": values}
    if code:
        length, packed = huffman_encode(codes)
        parts |= {
            "codes": torch.from_numpy(packed),
            "length": torch.tensor([length.get(s, 0) for s in range(16)], dtype=torch.uint8),
        }
    return parts, values[codes].reshape(w.shape)


# %%
def sign_parts(w, split, bits):
    signs, factor = split(w)
    return {"codes": pack((signs + 1) // (2 if bits == 1 else 1), bits), "scale": factor}, (
        signs * factor
    ).reshape(w.shape)


def low_rank_parts(w, share=0.5):
    matrix = w.reshape(len(w), -1)
    rank = max(1, int(share * matrix.numel() / sum(matrix.shape)))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    u, v = u[:, :rank] * s[:rank], v[:rank]
    return {"u": u.contiguous(), "v": v.contiguous()}, (u @ v).reshape(w.shape)


# %% tags=["nbval-ignore-output"]
candidates = {
    "int8, channel": int8_parts,
    "int4, group of 32": int4_parts,
    "4-bit codebook": codebook_parts,
    "4-bit codebook, Huffman": lambda w: codebook_parts(w, code=True),
    "ternary": lambda w: sign_parts(w, ternary, 2),
    "binary": lambda w: sign_parts(w, binary, 1),
    "low rank, half": low_rank_parts,
    "low rank, quarter": lambda w: low_rank_parts(w, 0.25),
}
files = {"fp32": (fp32_bytes, 100 * full_precision)}
for name, encode in candidates.items():
    size, restored = file_of(encode)
    files[name] = (size, 100 * accuracy_with(restored, images, labels))
good = {n: size for n, (size, accuracy) in files.items() if accuracy >= 100 * full_precision - 1}
smallest = min(good, key=good.get)
figure, ax = plots.axes(
    "saved file (kB)",
    "accuracy on validation images (%)",
    height=4.2,
    title=f"Within a point of fp32, the smallest file is {smallest}: {good[smallest] / 1e3:.0f} kB",
)
for i, (name, (size, accuracy)) in enumerate(files.items()):
    label = f"{name}: {size / 1e3:.0f} kB, {accuracy:.1f}%"
    ax.plot(
        size / 1e3,
        accuracy,
        plots.MARKERS[i % 7],
        color=plots.COLOURS[i % 7],
        fillstyle="full" if i < 7 else "none",
        label=label,
    )
ax.set(xscale="log", xlim=(30, 2000))
ax.set_xticks([50, 100, 200, 500, 1000], ["50", "100", "200", "500", "1000"])
ax.legend(fontsize=8)
plots.show(
    figure,
    "Accuracy against file size for fp32, int8, int4, codebook, codebook with Huffman, ternary,"
    " binary and two low ranks.",
)

# %% [markdown]
# Fewer bits for each number go a long way before accuracy gives; fewer numbers do not, since the
# weights of this network are not near any low rank. Binary and ternary fall off the cliff. They
# were meant to be trained that way, and none of these candidates got any training after it was
# squeezed: chapter 06 does that.

# %% [markdown]
# ## Measure: the update that rounding loses
# Rounding to nearest is best for weights that stand still. Training moves them in tiny steps. A
# weight on a grid of $1/256$ that is told to fall by $0.001$ is rounded right back, again and
# again. *Stochastic rounding* goes up with a probability equal to the fraction it is above the
# lower code, so the mean comes out right.


# %%
def stochastic_round(x, generator):
    low = torch.floor(x)
    return low + (torch.rand(x.shape, generator=generator) < x - low)


generator = torch.Generator().manual_seed(0)
nearest, stochastic = torch.ones(1000), torch.ones(1000)
bf16 = torch.ones(1000, dtype=torch.bfloat16)
for _ in range(200):
    nearest = torch.round((nearest - 0.001) * 256) / 256
    stochastic = stochastic_round((stochastic - 0.001) * 256, generator) / 256
    bf16 = bf16 - 0.001
for name, reached in {"nearest": nearest, "bf16": bf16.float(), "stochastic": stochastic}.items():
    print(f"200 steps of -0.001 from 1: {name:10} {reached.mean():.2f}")

# %% [markdown]
# Nearest rounding lost all 200 updates, and bf16, a format that networks are trained in, lost them
# too: its grid just below 1 is as coarse. Stochastic rounding arrives where exact arithmetic would,
# with noise. Does it save a real training? The network's last layer is trained from zero on its
# real features, its weights kept on a grid of $1/128$ after every step.


# %% tags=["nbval-ignore-output"]
def train_on_grid(rounding, seed, x, y, steps=1 / 128, lr=0.02):
    """A linear layer (128 → 10), one pass of plain SGD, its weights rounded to multiples of
    `steps`.
    """
    generator = torch.Generator().manual_seed(seed)
    w = torch.zeros(128, 10)
    for index in torch.randperm(len(x), generator=generator).split(64):
        p = (x[index] @ w).softmax(1) - F.one_hot(y[index], 10)
        w = rounding((w - lr * x[index].T @ p / len(index)) / steps, generator) * steps
    return w


pictures, y_train = (t[: 1000 if SMOKE else 5000] for t in data.fashion_mnist("train"))
x_train, _ = last_layer(pictures)
arms = {
    "nearest": lambda v, _: torch.round(v),
    "stochastic": stochastic_round,
    "no rounding": lambda v, _: v,
}
scores = {name: [] for name in arms}
for seed in SEEDS:
    for name, arm in arms.items():
        answers = (features @ train_on_grid(arm, seed, x_train, y_train)).argmax(1)
        scores[name].append(100 * float((answers == labels).float().mean()))
gain = measure.paired_t(np.subtract(scores["stochastic"], scores["nearest"]), "points")
plots.seeds(
    scores,
    ylabel="accuracy on validation images (%)",
    title=f"Stochastic against nearest rounding: {gain.value:+.1f} points",
    alt=(
        "Accuracy of a linear layer trained on a coarse grid with nearest, stochastic and no"
        " rounding, five seeds each."
    ),
)
claims.verdict("05.stochastic_rounding_trains", gain)

# %% [markdown]
# ## Explain: three numbers decide
# Put the pieces together. For a tensor in $b$ bits whose range is $R$ and whose typical size (root
# mean square) is $\sigma$, the step is $R/(2^b-1)$ and the error's power is $s^2/12$. So
#
# $$\text{SQNR} \approx 6.02\,b + 10.8 - 20\log_{10}(R/\sigma) \quad \text{decibels.}$$
#
# Bits raise it, a wide range for its typical size lowers it. Every method of this chapter works on
# one of the three: more *bits*; a smaller *R*, by clipping or by letting fewer weights share it; or
# another *grid*, which no longer has one step. The formula says nothing about the network's answer.
# That was measured: flat, then a cliff.
#
# The integer layer needs no such formula. Its sums are exact, so all its error comes from the three
# roundings: of the inputs, of the weights, and of the result.

# %% [markdown]
# ## If yours shows no gain
# | You see | Because | Look at |
# |---|---|---|
# | the file did not shrink | fake-quantized weights are fp32, and codes in int32 or int64 are no smaller | the dtype of each tensor in the file |
# | the file shrank by less than the bits promise | scales, BatchNorm and the header stay as they were; small groups have many scales | how many bytes each part takes |
# | the slope is far below six decibels a bit | an outlier, or too few bits for the assumption of an even error | the histogram, then finer granularity |
# | one scale a channel gains nothing | at eight bits both are far from the cliff | the same at four bits |
# | ONNX Runtime's sums differ from yours on an old x86 processor | without VNNI (x86's instruction for 8-bit dot products) its uint8 × int8 kernel adds pairs in 16 bits, which can saturate ([ONNX Runtime, *Quantize ONNX Models*](https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html)) | weights in 7 bits, or `uint8` weights |
# | it is not faster | nothing here was about speed: kernels decide that | chapter 06 |

# %% [markdown]
# ## Myth: a scale made of bits alone
# This formula for $b$-bit quantization circulates: $W_q = \mathrm{round}(W \cdot 2^b / 2^b) \cdot
# 2^b$ (〈第八章:AI大模型的部署与优化〉). Run it.

# %%
w = torch.tensor([-0.6, -0.07, 0.25, 0.8])
b = 8
print("the formula  ", (torch.round(w * 2**b / 2**b) * 2**b).tolist())
print("a real scale ", [round(v, 3) for v in round_trip(w[None], b)[0].tolist()])

# %% [markdown]
# $2^b / 2^b$ is 1. The weights are rounded to whole numbers, whatever $b$ is, and then blown up.
# The number of bits cannot make a scale; the range must come in.

# %% [markdown]
# ## Myth: `F.quantize`
# Code that calls `torch.nn.functional.quantize(x, bits)` is passed around. There is no such
# function. What exists takes the grid, not the bits, because bits alone are not enough.

# %%
with exercises.fails(AttributeError):
    F.quantize(w, 8)
scale, zero_point, qmin, qmax = symmetric_grid(w[None], 8)
torch.fake_quantize_per_tensor_affine(w, float(scale), 0, qmin, qmax)

# %% [markdown]
# ## Myth: padding is zero, and zero is zero
# A grid fitted to the values alone, here from 0.5 to 1.5, has no code for 0.0. Pad a quantized
# image all the same, with 0.0 or with the code 0, and a convolution is silently wrong at its
# border. The check: compare with padding before quantizing.

# %%
image = torch.full((1, 1, 4, 4), 1.5)
kernel = torch.ones(1, 1, 3, 3)
exact = F.conv2d(F.pad(image, (1, 1, 1, 1)), kernel)

low, high = 0.5, 1.5
scale = (high - low) / 255
steps = torch.round((F.pad(image, (1, 1, 1, 1)) - low) / scale)
padded = steps.clamp(0, 255)  # 0.0 saturates at the code 0
wrong = F.conv2d(padded * scale + low, kernel)

scale, zero_point, qmin, qmax = affine_grid(image.reshape(1, -1), 8)
codes = F.pad(quantize(image, scale, zero_point, qmin, qmax), (1, 1, 1, 1), value=int(zero_point))
right = F.conv2d(dequantize(codes, scale, zero_point), kernel)
for name, result in {"range without zero": wrong, "zero-point as padding": right}.items():
    error = (result - exact).abs()[0, 0]
    print(f"{name:22} error inside {error[1:-1, 1:-1].max():.3f}, at the border {error.max():.3f}")

# %% [markdown]
# The value of the code 0 is 0.5 there, and a corner of this kernel sees five of them. Nothing
# fails, and nobody looks at the border. The right way has two parts: widen the range until it holds
# 0, and pad with the zero-point.

# %% [markdown]
# ## Myth: int8 numbers are summed in int8
# The inputs are int8, the weights are int8, so the sum is int8? Two products are enough to disprove
# it.

# %%
a, b = torch.tensor([[100, 90]], dtype=torch.int8), torch.tensor([[2], [3]], dtype=torch.int8)
wrapped, right = a @ b, a.int() @ b.int()
print("int8 accumulator: ", int(wrapped), wrapped.dtype)
print("int32 accumulator:", int(right), right.dtype)
print("they differ by a multiple of 256:", (int(right) - int(wrapped)) % 256 == 0)

# %% [markdown]
# The int8 sum wraps round modulo 256, without a word. Inputs and weights are narrow, the
# accumulator is wide: that is why an int8 matrix instruction has int32 outputs.

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
# 20 minutes. Most first attempts subtract in uint8. Let them print `torch.tensor([120],
# dtype=torch.uint8) - 128`. A good question for the fast ones: which of the cross terms could be
# moved into `bias` before any input arrives?

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
# ## The tool of the field
# Two libraries, two conventions. Torch multiplies by the reciprocal of the scale, ONNX divides by
# the scale. In exact arithmetic that is the same; in fp32 the two differ when a number lies next to
# a tie. Yours must be equal to *each of them, bit for bit*, in its own convention: random numbers,
# numbers beyond the range, and numbers placed on ties on purpose.

# %%
torch.manual_seed(0)
scale, zero_point = torch.tensor(0.0123), 77
ties = (torch.arange(-400, 400) + 0.5) * scale
x = torch.cat([torch.randn(100_000), 50 * torch.randn(1000), ties, torch.tensor([0.0, -0.0])])

ours_torch = quantize(x, scale, zero_point, 0, 255, divide=False)
theirs = torch.fake_quantize_per_tensor_affine(x, float(scale), zero_point, 0, 255)
assert torch.equal(dequantize(ours_torch, scale, zero_point), theirs)

ours_onnx = quantize(x, scale, zero_point, 0, 255)
codes = onnx_reference("QuantizeLinear", x, scale, np.uint8(zero_point), output_type=np.uint8)
assert torch.equal(ours_onnx, codes.int())
values = onnx_reference(
    "DequantizeLinear", codes, scale, np.uint8(zero_point), output_type=np.float32
)
assert torch.equal(dequantize(ours_onnx, scale, zero_point), values)

rows = torch.randn(8, 96)
for per_row, name in ((rows, "channel"), (rows.reshape(-1, 32), "group of 32")):
    scale_r, zero_r, _, _ = affine_grid(per_row, 8)
    ours = quantize(per_row, scale_r, zero_r, 0, 255, divide=False)
    theirs = torch.fake_quantize_per_channel_affine(
        per_row, scale_r[:, 0], zero_r[:, 0].int(), 0, 0, 255
    )
    assert torch.equal(dequantize(ours, scale_r, zero_r), theirs), name
    blocks = {"axis": 0} if name == "channel" else {"axis": 1, "block_size": 32}
    shape = (-1,) if name == "channel" else (8, -1)
    theirs = onnx_reference(
        "QuantizeLinear",
        rows,
        scale_r.reshape(shape),
        zero_r.to(torch.uint8).reshape(shape),
        output_type=np.uint8,
        **blocks,
    )
    assert torch.equal(
        quantize(per_row, scale_r, zero_r, 0, 255).reshape(rows.shape), theirs.int()
    ), name
print("bit-equal to torch and to ONNX: one scale a tensor, a channel, a group")

# %% [markdown]
# The edges of *From scratch* once more, against both judges: ties, saturation, a zero-point at
# either end, equal values, no values.

# %%
edges = {
    "ties": [0.5, 1.5, 2.5, -0.5],
    "saturation": [-1e4, 1e4, 300.0],
    "all positive": [0.5, 1.0],
    "all negative": [-0.5, -1.0],
    "all equal": [0.7, 0.7],
    "all zero": [0.0, 0.0],
    "empty": [],
}
for name, numbers in edges.items():
    x = torch.tensor(numbers)
    scale, zero_point, _, _ = affine_grid(x[None], 8)
    s, z = (
        (torch.tensor(1.0), 0) if name in ("ties", "saturation") else (scale[0, 0], int(zero_point))
    )
    by_onnx = onnx_reference("QuantizeLinear", x, s, np.uint8(z), output_type=np.uint8)
    by_torch = torch.fake_quantize_per_tensor_affine(x, float(s), z, 0, 255)
    assert torch.equal(quantize(x, s, z, 0, 255), by_onnx.int()), name
    assert torch.equal(dequantize(quantize(x, s, z, 0, 255, divide=False), s, z), by_torch), name
    print(f"{name:13} {by_onnx.tolist()}")

# %% [markdown]
# And what no code can stand for? The kernels refuse nothing. Here is what comes out, and how the
# two conventions fare on ties.

# %% tags=["nbval-ignore-output"]
import onnxruntime

options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = 1, 3


def onnx_runtime(operator, *inputs, output_type):
    """The same one-operator model in ONNX Runtime, the engine most ONNX files are run by."""
    inputs = [np.asarray(a) for a in inputs]
    session = onnxruntime.InferenceSession(
        onnx_model(operator, inputs, output_type).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    return session.run(None, {f"input{i}": a for i, a in enumerate(inputs)})[0]


nothing = torch.tensor([float("nan"), float("inf"), float("-inf")])
print(
    "NaN, inf, -inf in ONNX Runtime:",
    onnx_runtime(
        "QuantizeLinear", nothing, torch.tensor(1.0), np.uint8(7), output_type=np.uint8
    ).tolist(),
)
print(
    "NaN, inf, -inf in torch:       ",
    [v + 7 for v in torch.fake_quantize_per_tensor_affine(nothing, 1.0, 7, 0, 255).tolist()],
)
near_ties = onnx_runtime(
    "QuantizeLinear", ties, torch.tensor(0.0123), np.uint8(77), output_type=np.uint8
)
split = quantize(ties, torch.tensor(0.0123), 77, 0, 255) != quantize(
    ties, torch.tensor(0.0123), 77, 0, 255, divide=False
)
print(
    f"of {len(ties)} numbers on ties the two conventions part on {100 * split.float().mean():.1f}%;"
    " ONNX Runtime divides:"
    f" {np.array_equal(near_ties, quantize(ties, torch.tensor(0.0123), 77, 0, 255))}"
)

# %% [markdown]
# A NaN that becomes an ordinary code is a fault that no later layer can see: hence the refusal. And
# the share of ties on which the conventions part is why comparing two runtimes needs a tolerance of
# one code, while comparing with one needs none.

# %% [markdown]
# ## Break it
# One weight in a layer, ten times as large as the largest so far, as a fault in memory or a
# careless training would leave it. What does it cost, and which remedy gives it back?

# %% tags=["nbval-ignore-output"]
w = weights["stages.2.conv2.weight"].clone()
w[0, 0, 0, 0] = 10 * w.abs().max()
honest = torch.ones_like(w, dtype=torch.bool)
honest[0, 0, 0, 0] = False


def of_the_others(restored):
    return sqnr_db(w[honest], restored[honest])


rows = w.reshape(1, -1)
end = rows.abs().quantile(0.9999)
cut = dequantize(
    quantize(rows, *symmetric_grid(rows.clamp(-end, end), 4)),
    *symmetric_grid(rows.clamp(-end, end), 4)[:2],
)
remedies = {
    f"one scale a {g}": of_the_others(fake_quantize(w, 4, g))
    for g in ("tensor", "channel", "group")
}
remedies["one scale, clipped"] = of_the_others(cut.reshape(w.shape))
lost = float((fake_quantize(w, 4, "tensor")[honest] == 0).float().mean())
plots.bars(
    remedies,
    xlabel="SQNR of all other weights (dB), 4 bits",
    title=f"One weight, and {100 * lost:.1f}% of the others become zero",
    alt=(
        "SQNR of the remaining weights of a layer with one outlier, for one scale a tensor, a"
        " channel, a group, and with clipping."
    ),
)

# %% [markdown]
# With one scale the step is wider than nearly all weights, and they are rounded away. A scale for
# each channel confines the damage to one channel, a group confines it to 32 weights. Clipping saves
# the others at the price of the one, which is right if it was a fault, and wrong if the network
# relies on it: large language models do (chapter 14).

# %% [markdown]
# ## Exit quiz
# **1. You halve the range of a tensor and keep the bits. The largest rounding error becomes**
# <details><summary>half as large</summary>Right: the step halves, and the error is at most half a
# step.</details>
# <details><summary>a quarter</summary>That is the mean squared error. The largest error goes with
# the step itself.</details>
# <details><summary>the same</summary>The number of codes stays, but they stand closer
# together.</details>
#
# **2. The output of a ReLU lies between 0.4 and 6.0 in all calibration images. Its affine grid
# should reach**
# <details><summary>from 0 to 6</summary>Right: zero must have a code, for padding and for the zeros
# the next image brings.</details>
# <details><summary>from 0.4 to 6</summary>Then no code stands for 0.0, and every padded border is
# wrong.</details>
# <details><summary>from −6 to 6</summary>Half of the codes would never be used: a bit is thrown
# away.</details>
#
# **3. Which cross term must be computed anew for each input?**
# <details><summary>the row sum of the inputs, times the weights' zero-point</summary>Right, unless
# that zero-point is 0: the reason for symmetric weights.</details>
# <details><summary>the column sum of the weights, times the inputs' zero-point</summary>The weights
# are known beforehand: it joins the bias.</details>
# <details><summary>none, the zero-points are constants</summary>The zero-points are, the sums of
# the inputs are not.</details>
#
# **4. Your integer layer and `QLinearMatMul` differ by one code in a few outputs. That is**
# <details><summary>expected</summary>Right: one requantizes in integers, the other in floating
# point, and they part next to ties.</details>
# <details><summary>a bug in the accumulators</summary>Compare those by themselves: they must be
# equal, so look there first if the difference is larger than one.</details>
# <details><summary>caused by the number of threads</summary>Integer sums come out the same in any
# order.</details>
#
# **5. A file of 4-bit codes is Huffman-coded and hardly shrinks. Why?**
# <details><summary>the codes are about equally frequent</summary>Right: the entropy is then close
# to four bits, and no code can beat it.</details>
# <details><summary>Huffman codes need 8-bit symbols</summary>They work on any symbols.</details>
# <details><summary>the weights were not sorted</summary>Order does not matter to it: only
# frequencies do.</details>
#
# **Key points**
# - The scale comes from the range, never from the bits alone. Inside the range the error is at most
#   half a step; outside it has no bound.
# - Zero must have a code of its own.
# - A bit is worth six decibels, and the range costs what the largest number is above the typical
#   one. Accuracy follows neither: it is flat, then a cliff.
# - Sums of int8 products live in int32. The way back to 8 bits is one integer multiplication and a
#   shift.
# - Only a file tells you what you saved.
# - Nearest rounding for what stands still, stochastic rounding for what moves in small steps.
#
# **Sources** · W. R. Bennett, *Spectra of quantized signals*, 1948 · R. Gray, D. Neuhoff,
# *Quantization*, 1998 · D. Huffman, *A method for the construction of minimum-redundancy codes*,
# 1952 · S. Lloyd, *Least squares quantization in PCM*, 1982 · B. Jacob et al., *Quantization and
# training of neural networks for efficient integer-arithmetic-only inference*, 2018 · R.
# Krishnamoorthi, *Quantizing deep convolutional networks for efficient inference: a whitepaper*,
# 2018 · S. Migacz, *8-bit inference with TensorRT*, 2017 · R. Banner et al., *Post training 4-bit
# quantization of convolutional networks for rapid-deployment*, 2019 · M. Nagel et al., *A white
# paper on neural network quantization*, 2021 · S. Han et al., *Deep compression*, 2016 · M.
# Rastegari et al., *XNOR-Net*, 2016 · F. Li, B. Liu, *Ternary weight networks*, 2016 · S. Gupta et
# al., *Deep learning with limited numerical precision*, 2015 · C. Eckart, G. Young, *The
# approximation of one matrix by another of lower rank*, 1936 · C. Shannon, *A mathematical theory
# of communication*, 1948 · ONNX operators
# [QuantizeLinear](https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html),
# [QLinearMatMul](https://onnx.ai/onnx/operators/onnx__QLinearMatMul.html)
#
# For the capstone's ledger, this chapter adds five verdicts: six decibels a bit, one scale a
# channel, four times smaller, Huffman's share, stochastic rounding.
#
# Next: [06 · Quantization in practice](06_quantization_in_practice.ipynb), where a whole network
# gets 8 bits and a clock decides.
