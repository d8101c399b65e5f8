# %% [markdown]
# # 07 · Mixed precision
#
# **What do 16 bits lose, what must stay in 32, and does your machine pay you for the change?**
#
# After this chapter you can: *predict* where fp16 and bf16 break · *say* what autocast puts in
# which format, and what it costs in memory · *write* a dynamic loss scaler that agrees with
# PyTorch's bit for bit · *explain* why 16 bits are faster on one processor and slower on another ·
# *keep* an fp16 training run alive.
#
# 90 minutes · before this: 01 Measurement; 02 and 05 help · runs on any CPU

# %% tags=["parameters"]
import os

PROFILE = os.environ.get("COURSE_PROFILE", "fast")

# %% tags=["nbval-ignore-output"]
import contextlib
import functools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from course_utils import claims, data, exercises, machine, measure, models, plots, scratch
from course_utils.training import side_by_side

SMOKE = PROFILE == "smoke"
SECONDS = {"smoke": 0.1, "fast": 2.0, "full": 12.0}[PROFILE]  # for one comparison
STEPS = {"smoke": 12, "fast": 200, "full": 900}[PROFILE]  # of one short training run
SEEDS = range({"smoke": 3, "fast": 20, "full": 40}[PROFILE])
MIB, FOLDER = 2**20, Path(os.path.relpath(scratch("07")))
machine.card()

# %% [markdown]
# ## Recall
# (Chapter 5) What is the largest error when you store a number on a grid of step $s$?
# <details><summary>Answer</summary>Half a step, $s/2$, inside the range. The formats below have a
# grid too, but its step grows with the number.</details>
#
# ## Predict
# You train a small residual network, once in fp32 and once with *autocast*, which lets PyTorch use
# the 16-bit format bf16 where it thinks fit. How many times faster is a training step on *your*
# machine (below 1 means slower)? And by what factor does the peak memory of the step shrink?

# %%
my_speedup = ...  # times
my_saving = ...  # times
exercises.predict("07.speed", my_speedup)
exercises.predict("07.memory", my_saving)

# %% [markdown]
# ## From scratch: a number by its bits
# Here is 0.1, as five formats of PyTorch store it. The first bit is the *sign*, the next group the
# *exponent*, the last the *mantissa*.

# %%
FORMATS = {  # name: exponent bits, mantissa bits
    "fp32": (8, 23),
    "bf16": (8, 7),
    "fp16": (5, 10),
    "fp8 e4m3": (4, 3),
    "fp8 e5m2": (5, 2),
}
TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TORCH |= {"fp8 e4m3": torch.float8_e4m3fn, "fp8 e5m2": torch.float8_e5m2}
WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # integers of as many bytes


# %%
def pattern(x, dtype):
    """The bits of x in a format, as a non-negative integer."""
    stored = torch.tensor(x, dtype=torch.float64).to(dtype)
    size = stored.element_size()
    return stored.view(WORD[size]).item() & (2 ** (8 * size) - 1)


# %%
for name, dtype in TORCH.items():
    e, m = FORMATS[name]
    text = f"{pattern(0.1, dtype):0{1 + e + m}b}"
    back = torch.tensor(0.1).to(dtype).item()
    print(f"{name:9}{text[0]} {text[1 : 1 + e]:8} {text[1 + e :]:23} is {back:.10g}")

# %% [markdown]
# Not one of them holds 0.1 exactly. bf16 is fp32 with the last 16 bits cut off (and rounded): the
# exponent is the same. fp16 spends three bits less than bf16 on the exponent and three more on the
# mantissa. Those three bits are what this chapter is about.
#
# Write $E$ for the exponent's integer, $M$ for the mantissa's, $e$ and $m$ for their numbers of
# bits, and $b = 2^{e-1} - 1$ for the *bias*. A *normal* number is $(1 + M/2^m)\cdot 2^{E-b}$. When
# $E$ is zero the leading 1 is dropped and the exponent stays at $1 - b$: such numbers are
# *subnormal*, and they fill the gap between the smallest normal number and zero. The gap between
# two neighbours is one step of the mantissa: the *ulp*, the unit in the last place.
#
# Where does each format end, and how fine is it next to 1?

# %%
for name, dtype in TORCH.items():
    info = torch.finfo(dtype)
    small, gap = (round(math.log2(v)) for v in (info.smallest_normal * info.eps, info.eps))
    print(f"{name:9} smallest 2^{small:<5} largest {info.max:<12.6g} gap above one 2^{gap}")

# %% [markdown]
# Two rows to remember. **fp16 ends near 65,504 and at $2^{-24}$; bf16 reaches as far as fp32 but
# has only a gap of $2^{-7}$ above 1**: it knows two to three decimal digits. fp16's trouble will be
# range, bf16's precision.

# %% [markdown]
# ## Exercise A · smallest normal and ulp
# Complete one line, so that `ruler(x, e, m)` returns the smallest positive *normal* number of a
# format with $e$ exponent bits and $m$ mantissa bits (with infinities, as fp16 and bf16 have them),
# and the *ulp* at `x`: the distance between the two neighbouring representable numbers around a
# positive `x` (for a representable `x`: the distance to the next larger one). `x` may lie a hair
# below a power of two, where a logarithm rounds up.
#
# Example: `ruler(1.0, 5, 10)` is `(2**-14, 2**-10)`, and `ruler(3.0, 8, 7)` is `(2**-126, 2**-6)`.


# %% tags=["exercise"]
def ruler(x, e, m):
    bias = 2 ** (e - 1) - 1
    smallest_normal = 2.0 ** (1 - bias)
    exponent = ...  # which power of two sets the spacing at x?
    return smallest_normal, 2.0 ** (exponent - m)


# %%
exercises.check("07.A", ruler)

# %% [markdown] tags=["hint"]
# Between 2 and 4 the numbers are equally spaced, twice as wide as between 1 and 2.

# %% [markdown] tags=["hint"]
# Below the smallest normal number the spacing stays what it is just above it: subnormals share one
# exponent.


# %% tags=["solution"]
def ruler(x, e, m):
    bias = 2 ** (e - 1) - 1
    smallest_normal = 2.0 ** (1 - bias)
    exponent = max(math.frexp(x)[1] - 1, 1 - bias)
    return smallest_normal, 2.0 ** (exponent - m)


# %% tags=["wrong"]
# The machine epsilon, the same for every x.
def ruler(x, e, m):
    bias = 2 ** (e - 1) - 1
    return 2.0 ** (1 - bias), 2.0**-m


# %% tags=["wrong"]
# Rounds the exponent: too wide from the middle of an octave on.
def ruler(x, e, m):
    bias = 2 ** (e - 1) - 1
    return 2.0 ** (1 - bias), 2.0 ** (max(round(math.log2(x)), 1 - bias) - m)


# %% tags=["wrong"]
# Forgets subnormals: visible only below the smallest normal number.
def ruler(x, e, m):
    bias = 2 ** (e - 1) - 1
    return 2.0 ** (1 - bias), 2.0 ** (math.frexp(x)[1] - 1 - m)


# %% tags=["wrong"]
# Subnormals one octave too low: the exponent's integer 0 read as if the leading one were still
# there.
def ruler(x, e, m):
    bias = 2 ** (e - 1) - 1
    return 2.0 ** (1 - bias), 2.0 ** (max(math.frexp(x)[1] - 1, -bias) - m)


# %% [markdown] tags=["instructor"]
# 5 minutes. Let the class place 1, 1.5, 2, 3 and 4 of a format with one mantissa bit on a line,
# then ask what lies between 0 and the first of them. Whoever writes the machine epsilon has the
# right answer for exactly one octave.

# %% [markdown]
# ## Measure: where the numbers of a training step live
# Take the course's trained network and one batch. Collect the sizes of all its weights, of what its
# convolutions compute, and of its gradients. Where do they fall, and what would fp16 keep?


# %%
def sizes_in_a_step(model, x, y):
    """Absolute values, zeros left out: weights, activations, gradients of both."""
    seen = {"weights": [p.detach() for p in model.parameters()], "activations": [], "gradients": []}

    def hook(_, __, output):
        seen["activations"].append(output.detach())
        output.register_hook(seen["gradients"].append)

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(hook)
    F.cross_entropy(model(x), y).backward()
    seen["gradients"] += [p.grad for p in model.parameters()]
    flat = {name: torch.cat([t.flatten() for t in ts]).abs() for name, ts in seen.items()}
    return {name: t[t > 0] for name, t in flat.items()}


# %% tags=["nbval-ignore-output"]
images, labels = data.fashion_mnist("train")
sample = slice(0, 32 if SMOKE else 256)
sizes = sizes_in_a_step(models.baseline(), models.normalise(images[sample]), labels[sample])

# %% tags=["nbval-ignore-output"]
below = {name: 100 * float((t < 2.0**-14).double().mean()) for name, t in sizes.items()}
edges = np.arange(-40, 20)
shares = {n: np.histogram(torch.log2(t), edges)[0] / len(t) for n, t in sizes.items()}
figure, ax = plots.axes(
    "size, as a power of two",
    "share of the values (%)",
    title=f"{below['gradients']:.0f}% of the gradients lie below fp16's normal range",
)
for i, (name, share) in enumerate(shares.items()):
    ax.step(edges[:-1], 100 * share, where="post", color=plots.COLOURS[i], label=name)
ax.axvspan(-14, 16, color="0.85", zorder=0, label="fp16, normal")
ax.axvspan(-24, -14, color="0.93", zorder=0, label="fp16, subnormal")
ax.legend(loc="upper left", fontsize=9)
plots.show(figure, "Histograms of sizes, fp16's range shaded: gradients lie furthest left.")

# %% [markdown]
# The shaded part is what fp16 can hold, the lighter one with fewer and fewer digits. Weights and
# activations sit in the middle. The gradients stand at the left, most of them where digits are
# missing, while the right half of the shaded part stays empty. So do not ask for more range:
# **shift the gradients to the right** (Micikevicius et al. 2018). Multiply the loss by a large $S$,
# and by the chain rule every gradient is multiplied by $S$. Divide at the end, in fp32. That is
# *loss scaling*. bf16 has the range of fp32; for it the whole figure is shaded.

# %% [markdown]
# ## From scratch: sums stop growing, weights stop moving
# Add 1, again and again, in each format. Then take a weight of 1 and 200 updates of −0.001, as
# [chapter 5](05_quantization_math.ipynb) did.

# %%
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    total, weight = torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)
    for _ in range(4096):
        total += 1
    for _ in range(200):
        weight -= 0.001
    print(f"{dtype}: 4096 times one {total.item():g}, 1 less 200 times 0.001 {weight.item():.4f}")
ones = torch.ones(1, 4096, dtype=torch.bfloat16)
print("a matrix product of ones, bfloat16:", (ones @ ones.T).item())

# %% [markdown]
# A sum stops growing when a term is less than half of its ulp. The bf16 weight never moves for the
# same reason. So two things stay in 32 bits. The *accumulator* of a product: the product of ones
# was counted right, because this kernel adds in fp32. (That is the kernel's choice, not a law:
# NVIDIA's units can add fp16 products in fp16, and Hopper's FP8 units were reported to keep about
# 14 bits, DeepSeek-V3, 2024.) And the weights themselves: keep fp32 *master weights*, and make
# 16-bit copies for the products.
#
# ## From scratch: autocast
# `torch.autocast` chooses a format for each *operation*. Ask it.

# %% tags=["nbval-ignore-output"]
a, w, picture = torch.randn(8, 16), torch.randn(16, 16), torch.randn(2, 3, 8, 8)
kernel, classes = torch.randn(4, 3, 3, 3), torch.zeros(8, dtype=torch.long)
calls = {
    "a @ w": lambda: a @ w,
    "conv2d(picture)": lambda: F.conv2d(picture, kernel),
    "relu(a @ w)": lambda: torch.relu(a @ w),
    "softmax(a @ w)": lambda: torch.softmax(a @ w, -1),
    "layer_norm(a @ w)": lambda: F.layer_norm(a @ w, (16,)),
    "a + 1": lambda: a + 1,
    "a @ w + a": lambda: a @ w + a,
    "cross_entropy(a @ w)": lambda: F.cross_entropy(a @ w, classes),
}
with torch.autocast("cpu", dtype=torch.bfloat16):
    for name, call in calls.items():
        print(f"{name:22} {str(call().dtype).removeprefix('torch.')}")

# %% [markdown]
# Three lists. *Lower*: matrix products and convolutions, where the arithmetic is, get 16-bit
# inputs. *Upper*: losses and a few others, which add up many terms, get fp32. *Neither*: the rest
# takes what comes, and two formats together become the wider one. The lists differ between devices.
# The weights themselves stay fp32 all the time: they are your master weights. *Further* writes an
# autocast of its own that agrees with torch's bit for bit.
#
# ## Measure: is it faster on your machine?
# One training step of the course's network, and one inference in `eval` mode. For inference there
# is a rival that is often served: cast the whole model once, `model.bfloat16()`.

# %% tags=["nbval-ignore-output"]
WIDTH, BATCH = {"smoke": (8, 16), "fast": (32, 64), "full": (64, 128)}[PROFILE]
x = models.normalise(images[:BATCH]).contiguous(memory_format=torch.channels_last)
y = labels[:BATCH]
big = models.mini_resnet(WIDTH, seed=0).to(memory_format=torch.channels_last).train()


def train_step(on, model=big):
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


# %%
serving = models.mini_resnet(WIDTH, seed=0).to(memory_format=torch.channels_last).eval()
whole16, x16 = models.mini_resnet(WIDTH, seed=0).eval().bfloat16(), x.bfloat16()
whole16 = whole16.to(memory_format=torch.channels_last)


@torch.inference_mode()
def infer(on):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
        return serving(x)


@torch.inference_mode()
def infer16():
    return whole16(x16)


# %% tags=["nbval-ignore-output"]
arms = {
    "training": (lambda: train_step(False), lambda: train_step(True)),
    "inference": (lambda: infer(False), lambda: infer(True)),
    "all in bf16": (lambda: infer(False), infer16),
}
faster = {name: measure.across(*pair, seconds=SECONDS) for name, pair in arms.items()}
for name, comparison in faster.items():
    print(f"{name:12} bf16 over fp32: {comparison.interval}")
exercises.reveal("07.speed", faster["training"].ratio, "times")
claims.verdict("07.amp_trains_faster", faster["training"])

# %% tags=["nbval-ignore-output"]
claims.verdict("07.amp_speeds_up_inference", faster["inference"])

# %% [markdown]
# If your machine card lists `avx512_bf16`, `amx_bf16` or Arm's `bf16`, expect one. If it does not,
# you probably saw a number *below* 1: the same bits, and slower. And where *all in bf16* beats
# autocast, the difference is casting.
#
# ## Explain: bytes or arithmetic?
# A processor can be short of two things (chapter 1, the roofline). Adding two long vectors does one
# operation for every dozen bytes: it waits for memory. A matrix product does dozens for each byte:
# it waits for arithmetic. Half the bits means half the bytes, on every machine. It means faster
# arithmetic only with an instruction for it; without one, a kernel has to widen every number to
# fp32 first, or falls back to code that nobody tuned. If that is right, additions gain everywhere,
# and products in a format gain where the card lists its instruction.

# %% tags=["nbval-ignore-output"]
n, long = (64, 2**14) if SMOKE else (256, 2**24)


def matmul(dtype):
    left, right, out = (torch.randn(n, n).to(dtype) for _ in range(3))
    return measure.Arm(lambda: torch.mm(left, right, out=out), f"matmul {dtype}")


# %% tags=["nbval-ignore-output"]
def add(dtype):
    left, right, out = (torch.zeros(long, dtype=dtype) for _ in range(3))
    return measure.Arm(lambda: torch.add(left, right, out=out), f"add {dtype}")


# %% tags=["nbval-ignore-output"]
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
rows = {
    f"add, {half}": measure.compare(add(torch.float32), add(dtype), seconds=SECONDS / 2)
    for half, dtype in HALVES.items()
} | {
    f"matrix product, {half}": measure.across(matmul(torch.float32), matmul(dtype), seconds=SECONDS)
    for half, dtype in HALVES.items()
}
ratio = {name: comparison.ratio for name, comparison in rows.items()}
plots.intervals(
    {name: comparison.interval for name, comparison in rows.items()},
    xlabel="speed-up over fp32 (x)",
    title=f"Products: bf16 {ratio['matrix product, bf16']:.1f}x, fp16"
    f" {ratio['matrix product, fp16']:.1f}x; additions {ratio['add, bf16']:.1f}x",
    alt="Speed-up of additions and matrix products in bf16 and fp16, with intervals.",
)
claims.verdict("07.fp16_is_fast_on_a_cpu", rows["matrix product, fp16"])

# %% [markdown]
# The two upper rows are about bytes, the lower ones about instructions. For fast fp16 products an
# x86 processor needs AVX512_FP16 or AMX with fp16; nearly all desktops have neither. Many Arm
# processors do. So "are 16 bits faster?" has no answer without a machine.

# %% [markdown]
# ## From scratch: a dynamic loss scaler
# How large should $S$ be? Too small, and gradients vanish. Too large, and they overflow to
# infinity. The good $S$ drifts during training, so let it find itself: after every overflow *skip*
# the update and halve $S$ (*back-off*); after some number of good steps double it (*growth*). You
# probe for the edge, and pay with a skipped step now and then.


# %%
class LossScaler:
    """A dynamic loss scale for one optimizer (Micikevicius et al. 2018)."""

    def __init__(self, scale=2.0**16, growth=2.0, backoff=0.5, interval=2000):
        self.scale, self.growth, self.backoff, self.interval = scale, growth, backoff, interval
        self.good = 0  # steps since the scale last changed

    def scaled(self, loss):
        return loss * self.scale

    def step(self, optimizer):
        """Divide the gradients, then update if all are finite; returns whether it did."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        for g in gradients:
            g.mul_(1 / self.scale)
        finite = all(bool(g.isfinite().all()) for g in gradients)
        if finite:
            optimizer.step()
            self.good += 1
            if self.good == self.interval:
                self.scale, self.good = self.scale * self.growth, 0
        else:
            self.scale, self.good = self.scale * self.backoff, 0
        return finite


# %% [markdown]
# ## Measure: underflow kills a run, scaling rescues it
# A small network (*multilayer perceptron*), real fp16 on your CPU. **To show it in seconds, the
# loss is made small on purpose**: it is multiplied by $2^{-19}$, and the learning rate is $2^{19}$
# times larger, so that in exact arithmetic nothing changes. A real run gets there by depth or by
# averaging over many pixels or tokens.


# %%
def mlp(seed, hidden=64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def batches(seed, steps, size=64, flat=True):
    """Normalised training images, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        index = torch.randint(0, len(images), (size,), generator=generator)
        x = models.normalise(images[index])
        yield (x.flatten(1) if flat else x), labels[index]


# %%
test_images, test_labels = data.fashion_mnist("test")
test_x = models.normalise(test_images[: 500 if SMOKE else 6000])


@torch.no_grad()
def accuracy(model, flat=True):
    """Percent of the test images classified right, computed in fp32."""
    found = model.eval()(test_x.flatten(1) if flat else test_x).argmax(1)
    return 100 * float((found == test_labels[: len(found)]).float().mean())


# %% tags=["nbval-ignore-output"]
def train_amp(dtype, seed, steps=STEPS, lr=0.05, scaler=None, shrink=1.0):
    """An MLP trained under autocast; and of each step the share of zero gradients and the scale."""
    model, record = mlp(seed), []
    optimizer = torch.optim.SGD(model.parameters(), lr / shrink, momentum=0.9)
    for x, y in batches(seed, steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = F.cross_entropy(model(x), y) * shrink
        (scaler.scaled(loss) if scaler else loss).backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        record.append((float((grads == 0).float().mean()), scaler.scale if scaler else 1.0))
        scaler.step(optimizer) if scaler else optimizer.step()
    return model, record


# %% tags=["nbval-ignore-output"]
ours = LossScaler(2.0**22, interval=max(2, STEPS // 20))
four = {
    "fp32": train_amp(None, 0, shrink=2.0**-19),
    "bf16": train_amp(torch.bfloat16, 0, shrink=2.0**-19),
    "fp16": train_amp(torch.float16, 0, shrink=2.0**-19),
    "fp16 with our scaler": train_amp(torch.float16, 0, shrink=2.0**-19, scaler=ours),
}

# %% tags=["nbval-ignore-output"]
final = {name: accuracy(model) for name, (model, _) in four.items()}
plots.lines(
    range(1, STEPS + 1),
    {name: [100 * zeros for zeros, _ in record] for name, (_, record) in four.items()},
    xlabel="step",
    ylabel="gradients that are exactly zero (%)",
    title=f"Accuracy: fp16 {final['fp16']:.0f}%, scaled {final['fp16 with our scaler']:.0f}%,"
    f" fp32 {final['fp32']:.0f}%",
    alt="Share of zero gradients over the steps: fp16 without a scaler lies far above the others.",
)
print(
    "the scale, as powers of two:", [round(math.log2(s)) for _, s in four[list(four)[3]][1][::10]]
)

# %% [markdown]
# The fp16 line without a scaler runs near the top, and the network learns little or nothing. With a
# scaler it lies with fp32 and bf16. Some zeros are honest: a ReLU that is off passes none, in any
# format. No error was raised anywhere: an underflow makes no noise. Count your zeros. The scale
# climbs until an infinity pushes it back, and goes on probing.
#
# ## Measure: does it halve the memory?
# What autocast can halve is what the forward pass keeps for the backward pass. What it adds are
# 16-bit copies of the weights. Many say that this is autocast's *weight cache*, which can be
# switched off. If so, switching it off must give the bytes back.


# %%
def one_step(model, x, y, on, cache=True):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on, cache_enabled=cache):
        loss = F.cross_entropy(model(x), y)
    loss.backward()


# %%
def kept_bytes(model, x, y, on, cache=True):
    """What autograd keeps until backward, each storage once, without the fp32 weights."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        one_step(model, x, y, on, cache)
    return sum(kept.values())


# %%
def peak_bytes(model, *step):
    model.zero_grad(set_to_none=True)  # gradients are part of the step
    return measure.peak_memory(lambda: one_step(model, *step))


# %% tags=["nbval-ignore-output"]
kinds = {"fp32": (False, True), "autocast": (True, True), "without the cache": (True, False)}
peak = {name: peak_bytes(big, x, y, *how) / MIB for name, how in kinds.items()}
for name, how in kinds.items():
    kept = kept_bytes(big, x, y, *how) / MIB
    print(f"{name:18} kept for backward {kept:6.2f} MiB, peak of the step {peak[name]:6.2f} MiB")
ratio = peak["fp32"] / peak["autocast"]
exercises.reveal("07.memory", ratio, "times less")
claims.verdict("07.amp_halves_memory", ratio)

# %% [markdown]
# What is *kept* comes close to a half: that is the arithmetic of the claim. The *peak* also holds
# gradients, which stay fp32, copies on their way from one format to the other, and the scratch
# memory of kernels. The claim is about the peak, because that is what runs out. And the last row:
# the cache is innocent. Autograd itself keeps the 16-bit weights, because backward multiplies by
# them.
#
# So memory can *grow*. With $P$ the bytes of the parameters and $A$
# those of the activations that are kept, both in fp32, autocast saves $A/2$ and adds $P/2$. For a
# square layer of width $w$ and $B$ rows, $P = 4w^2$ and $A = 4Bw$: **the break-even lies at $B =
# w$**. *Further* looks for it.

# %% [markdown]
# ## The tool of the field: torch.amp
# `torch.autocast(device, dtype)` and `torch.amp.GradScaler(device)`. This is the whole recipe with
# gradient clipping, in the right order. With your scaler in place of torch's, the weights must be
# the same, bit for bit, after real fp16 training.


# %%
def recipe(model, steps, ours):
    optimizer, skipped = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), 0
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=4)
    for x, y in batches(7, steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(model(x), y)
        if ours:
            ours.scaled(loss).backward()
            skipped += not ours.step(optimizer)
            continue
        scaler.scale(loss).backward()  # outside the with block
        scaler.unscale_(optimizer)  # from here on gradients are true: clip here
        scaler.step(optimizer)  # skips when an infinity was seen
        scaler.update()
    return [p.detach() for p in model.parameters()], skipped


# %%
(theirs, _), (mine, skipped) = (
    recipe(mlp(3), 12, ours) for ours in (None, LossScaler(2.0**20, interval=4))
)
same = all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
print("weights equal bit for bit:", same, "- with skipped steps among them:", skipped > 0)

# %% [markdown]
# **Apex.** Tutorials that begin with `from apex import amp` use what became `torch.amp` in 2020;
# [its maintainers](https://github.com/NVIDIA/apex/issues/1214) call the old one deprecated. And
# `pip install apex` installs another project, a web toolkit.
#
# ## If yours shows no gain
# | You see | Because | Look at |
# |---|---|---|
# | bf16 is slower on your CPU | no bf16 instruction: products fall back to slow code | the machine card; *Both worlds*, in *Further* |
# | bf16 has its instruction and gains little | small layers: casting costs as much as it saves | a larger width or batch |
# | fp16 is far slower than bf16 | hardly any CPU has fp16 products | use bf16 on CPUs |
# | a depthwise network gains nothing | it waits for memory and for many small calls, not for products | chapter 10 |
# | memory grows | small batch, large layers: autograd keeps 16-bit weights | $A$ against $P$, above |
# | a GPU shows no gain | too small to fill it, or sides that are no multiples of 8 | the Tensor Core cell, a larger batch |
#
# ## Myth: clip, then step
# Clipping bounds the length of the gradient, here to 1. In fp32 it stands between `backward` and
# `step`. Leave it there, and the scaler has multiplied every gradient by $S$.


# %%
def first_update(order):
    """Length of the first update, learning rate 1, gradient clipped to length 1."""
    model = mlp(0)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = next(batches(0, 1))
    with torch.autocast("cpu", dtype=torch.float16):
        loss = 4 * F.cross_entropy(model(x), y)
    scaler.scale(loss).backward()
    if order == "unscale, clip":
        scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    after = nn.utils.parameters_to_vector(model.parameters()).detach()
    return float((after - before).norm())


# %%
for order in ("clip", "unscale, clip"):
    print(f"{order:14}: the update has length {first_update(order):.6f}")

# %% [markdown]
# Clipped at length 1 and *then* divided by 1024: nothing raises, the loss falls, very slowly, and
# the speed of learning depends on a number that changes by itself. `scaler.unscale_(optimizer)`
# first; the scaler remembers it and won't divide again.

# %% [markdown]
# ## Exercise B · a scaler for two optimizers and a clip
# Our `LossScaler` knows one optimizer and leaves no room for clipping. Write `MyScaler(scale,
# growth, backoff, interval)` with an attribute `scale` and four methods:
# - `scaled(loss)` returns the loss times the scale.
# - `unscale(optimizer)` makes this optimizer's gradients true. A second call for it before
#   `update()` raises `RuntimeError`.
# - `step(optimizer)` unscales unless that was done already, steps only if *this optimizer's*
#   gradients were all finite, and returns whether it did.
# - `update()` comes once, after all optimizers: if *any* of them saw an infinity or a NaN, back off
#   and start counting anew; after `interval` updates in a row without one, grow and start counting
#   anew.
#
# Example: scale 8, interval 2; after two good updates the scale is 16, after one with an infinity 8
# again. Gradients may be `None`.


# %% tags=["exercise"]
class MyScaler:
    def __init__(self, scale, growth, backoff, interval): ...

    def scaled(self, loss): ...

    def unscale(self, optimizer): ...

    def step(self, optimizer): ...

    def update(self): ...


# %%
exercises.check("07.B", MyScaler)

# %% [markdown] tags=["hint"]
# Keep a dictionary from `id(optimizer)` to "all of its gradients were finite". Its keys are the
# optimizers that were unscaled.

# %% [markdown] tags=["hint"]
# Look for infinities when you unscale, not when you step: clipping in between turns one infinity
# into many NaNs, or hides it.

# %% [markdown] tags=["hint"]
# `update()` asks `all(...)` of the dictionary's values, then empties it.


# %% tags=["solution"]
class MyScaler:
    def __init__(self, scale, growth, backoff, interval):
        self.scale, self.growth, self.backoff, self.interval = scale, growth, backoff, interval
        self.good, self.finite = 0, {}

    def scaled(self, loss):
        return loss * self.scale

    def unscale(self, optimizer):
        if id(optimizer) in self.finite:
            raise RuntimeError("this optimizer's gradients were unscaled already")
        fine = True
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(1 / self.scale)
                    fine = fine and bool(p.grad.isfinite().all())
        self.finite[id(optimizer)] = fine

    def step(self, optimizer):
        if id(optimizer) not in self.finite:
            self.unscale(optimizer)
        if self.finite[id(optimizer)]:
            optimizer.step()
        return self.finite[id(optimizer)]

    def update(self):
        if all(self.finite.values()):
            self.good += 1
            if self.good == self.interval:
                self.scale, self.good = self.scale * self.growth, 0
        else:
            self.scale, self.good = self.scale * self.backoff, 0
        self.finite = {}


# %% tags=["wrong"]
# step always unscales: after unscale() the gradients are divided twice.
class MyScaler:
    def __init__(self, scale, growth, backoff, interval):
        self.scale, self.growth, self.backoff, self.interval = scale, growth, backoff, interval
        self.good, self.bad, self.done = 0, False, set()

    def scaled(self, loss):
        return loss * self.scale

    def unscale(self, optimizer):
        if id(optimizer) in self.done:
            raise RuntimeError("twice")
        self.done.add(id(optimizer))
        self.divide(optimizer)

    def divide(self, optimizer):
        grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        for g in grads:
            g.div_(self.scale)
        return all(bool(g.isfinite().all()) for g in grads)

    def step(self, optimizer):
        fine = self.divide(optimizer)
        self.bad = self.bad or not fine
        if fine:
            optimizer.step()
        return fine

    def update(self):
        self.good = 0 if self.bad else self.good + 1
        if self.bad:
            self.scale *= self.backoff
        elif self.good == self.interval:
            self.scale, self.good = self.scale * self.growth, 0
        self.bad, self.done = False, set()


# %% tags=["wrong"]
# Only the last optimizer's infinities count in update.
class MyScaler:
    def __init__(self, scale, growth, backoff, interval):
        self.scale, self.growth, self.backoff, self.interval = scale, growth, backoff, interval
        self.good, self.finite, self.last = 0, {}, True

    def scaled(self, loss):
        return loss * self.scale

    def unscale(self, optimizer):
        if id(optimizer) in self.finite:
            raise RuntimeError("twice")
        grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        for g in grads:
            g.div_(self.scale)
        self.finite[id(optimizer)] = all(bool(g.isfinite().all()) for g in grads)

    def step(self, optimizer):
        if id(optimizer) not in self.finite:
            self.unscale(optimizer)
        self.last = self.finite[id(optimizer)]
        if self.last:
            optimizer.step()
        return self.last

    def update(self):
        self.good = self.good + 1 if self.last else 0
        if not self.last:
            self.scale *= self.backoff
        elif self.good == self.interval:
            self.scale, self.good = self.scale * self.growth, 0
        self.finite = {}


# %% tags=["wrong"]
# Looks for infinities only: a NaN gets into the weights. Visible only when a gradient is NaN.
class MyScaler:
    def __init__(self, scale, growth, backoff, interval):
        self.scale, self.growth, self.backoff, self.interval = scale, growth, backoff, interval
        self.good, self.finite = 0, {}

    def scaled(self, loss):
        return loss * self.scale

    def unscale(self, optimizer):
        if id(optimizer) in self.finite:
            raise RuntimeError("twice")
        grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        for g in grads:
            g.div_(self.scale)
        self.finite[id(optimizer)] = not any(bool(g.isinf().any()) for g in grads)

    def step(self, optimizer):
        if id(optimizer) not in self.finite:
            self.unscale(optimizer)
        if self.finite[id(optimizer)]:
            optimizer.step()
        return self.finite[id(optimizer)]

    def update(self):
        fine = all(self.finite.values())
        self.good = self.good + 1 if fine else 0
        if not fine:
            self.scale *= self.backoff
        elif self.good == self.interval:
            self.scale, self.good = self.scale * self.growth, 0
        self.finite = {}


# %% tags=["wrong"]
# The count of good updates survives an infinity: the scale grows too early after a back-off.
class MyScaler:
    def __init__(self, scale, growth, backoff, interval):
        self.scale, self.growth, self.backoff, self.interval = scale, growth, backoff, interval
        self.good, self.finite = 0, {}

    def scaled(self, loss):
        return loss * self.scale

    def unscale(self, optimizer):
        if id(optimizer) in self.finite:
            raise RuntimeError("twice")
        grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        for g in grads:
            g.div_(self.scale)
        self.finite[id(optimizer)] = all(bool(g.isfinite().all()) for g in grads)

    def step(self, optimizer):
        if id(optimizer) not in self.finite:
            self.unscale(optimizer)
        if self.finite[id(optimizer)]:
            optimizer.step()
        return self.finite[id(optimizer)]

    def update(self):
        if all(self.finite.values()):
            self.good += 1
            if self.good % self.interval == 0:
                self.scale *= self.growth
        else:
            self.scale *= self.backoff
        self.finite = {}


# %% [markdown] tags=["instructor"]
# 18 minutes. Two networks that are trained together (a generator and its critic) make the two
# optimizers plausible. Ask the class *when* to look for infinities before they write: the answer
# decides whether clipping can hide one.

# %% [markdown]
# ## Exercise C · keep a diverging run alive
# An fp16 run has died. Some of its batches are broken: their *loss* is infinite or NaN whatever the
# scale. They come alone and in bursts, and a stock scaler halves its scale at each of them, until
# all gradients of the good batches underflow. And the loss of the good ones shrinks by a factor of
# two every four or five batches, and once it jumps up again (the learning rate makes up for it: it
# is set inside `loss_of`). Write `keep_alive(model, batches, optimizer, loss_of)` that trains
# `model` (fp32 weights) once over the list `batches` of `(x, y)`; `loss_of(model, x, y)` computes
# the loss. It returns nothing: `model` is changed in place. The demands (this exercise's own,
# 2026), for 320 good batches:
# 1. The model runs in fp16 autocast, and its weights are finite at the end.
# 2. A broken batch changes nothing: no update.
# 3. At most 40 good batches go without an update, and none makes two.
# 4. It ends where the same run in fp32 ends: the difference of the weights is at most 12% of the
#    way that they went. For that the gradients must be true, and neither overflow nor underflow: no
#    scale that stays the same can do it.


# %% tags=["exercise"]
def keep_alive(model, batches, optimizer, loss_of): ...


# %%
exercises.check("07.C", keep_alive)

# %% [markdown] tags=["hint"]
# Two kinds of infinity: one that a smaller scale would cure, and one that it would not. What can
# you look at *before* `backward` to tell them apart?

# %% [markdown] tags=["hint"]
# `if not torch.isfinite(loss): continue`, without a back-off. For the rest, a scaler as above.

# %% [markdown] tags=["hint"]
# Every growth ends in one skipped step at the edge. Growth after every third step uses up the
# budget; after every hundredth, the scale never climbs as fast as the loss falls.


# %% tags=["solution"]
def keep_alive(model, batches, optimizer, loss_of):
    scale, good = 2.0**16, 0
    for x, y in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of(model, x, y)
        if not torch.isfinite(loss):
            continue  # no scale would help
        (loss * scale).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        for g in gradients:
            g /= scale
        if all(bool(g.isfinite().all()) for g in gradients):
            optimizer.step()
            good += 1
            if good == 8:
                scale, good = 2 * scale, 0
        else:
            scale, good = scale / 2, 0


# %% tags=["wrong"]
# The stock scaler: every broken batch halves the scale.
def keep_alive(model, batches, optimizer, loss_of):
    scaler = torch.amp.GradScaler("cpu")
    for x, y in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of(model, x, y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


# %% tags=["wrong"]
# In fp32: it learns, but it is not the run that was asked for.
def keep_alive(model, batches, optimizer, loss_of):
    for x, y in batches:
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        if torch.isfinite(loss):
            loss.backward()
            optimizer.step()


# %% tags=["wrong"]
# Skips broken batches and does not scale: the gradients underflow.
def keep_alive(model, batches, optimizer, loss_of):
    for x, y in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of(model, x, y)
        if torch.isfinite(loss):
            loss.backward()
            optimizer.step()


# %% tags=["wrong"]
# Grows after every good step: every second step is lost at the edge.
def keep_alive(model, batches, optimizer, loss_of):
    scale = 2.0**16
    for x, y in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of(model, x, y)
        if not torch.isfinite(loss):
            continue
        (loss * scale).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        for g in gradients:
            g /= scale
        if all(bool(g.isfinite().all()) for g in gradients):
            optimizer.step()
            scale *= 2
        else:
            scale /= 2


# %% tags=["wrong"]
# Tests the loss for infinity only: a broken batch whose loss is NaN passes, and poisons every
# weight. Visible only with NaN.
def keep_alive(model, batches, optimizer, loss_of):
    scale = 2.0**16
    for x, y in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of(model, x, y)
        if torch.isinf(loss):
            continue
        (loss * scale).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        for g in gradients:
            g /= scale
        if any(bool(g.isinf().any()) for g in gradients):
            scale /= 2
        else:
            optimizer.step()


# %% [markdown] tags=["instructor"]
# 17 minutes. Most begin with the stock GradScaler and a shorter growth interval, which survives
# single broken batches and dies in a burst. Draw the scale over the steps for both. In production
# the same thought reads: watch the *loss*, and alarm on bursts.

# %% [markdown]
# ## Break it
# fp16, where no scaler can help: an infinity in the *forward* pass. Features that are squared reach
# 65,504 soon. The scaler sees infinite gradients, halves its scale, and will go on halving for
# ever.

# %%
scaler = LossScaler(2.0**16)
features, w = torch.full((4, 8), 300.0), nn.Parameter(torch.ones(8, 1))
optimizer = torch.optim.SGD([w], 0.01)
for _ in range(30):
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = ((features.half() ** 2) @ w).mean()  # 300² is 90,000
    scaler.scaled(loss).backward()
    scaler.step(optimizer)
print(
    "scale after 30 steps: 2 to the power",
    math.log2(scaler.scale),
    "- weights moved:",
    bool((w != 1).any()),
)

# %% [markdown]
# The range ends, whatever the scale. bf16 has the range and lacks the digits: of the numbers from 0
# to 4095, how many are still different?

# %%
for name in ("bf16", "fp16", "fp32"):
    print(name, len(torch.arange(4096).to(TORCH[name]).unique()), "of 4096")

# %% [markdown]
# Position indices, running means, losses summed over an epoch and learning-rate counters never
# belong in 16 bits, however well the network itself does there.
#
# ## Exit quiz
# **1. A gradient of $2^{-30}$ appears in training. It becomes zero in**
# <details><summary>bf16</summary>It has the exponent of fp32.</details>
# <details><summary>both</summary>bf16 reaches down to below $2^{-126}$.</details>
# <details><summary>fp16</summary>Right: its smallest number is $2^{-24}$.</details>
#
# **2. A weight of 1 in bf16 gets an update of 0.001. Afterwards it is**
# <details><summary>0.999, rounded</summary>The two neighbours of 1 are further away than
# that.</details>
# <details><summary>1</summary>Right: less than half an ulp. Keep a master copy in fp32.</details>
# <details><summary>a NaN</summary>Nothing overflows here.</details>
#
# **3. bf16 is slower than fp32 on your CPU. Most likely**
# <details><summary>it has no instruction for bf16 products</summary>Right: fewer bytes, but the
# arithmetic falls back.</details>
# <details><summary>the loss scaler costs time</summary>bf16 needs none.</details>
# <details><summary>the memory is too slow</summary>Then half the bytes would help.</details>
#
# **4. The scaler skips a step. This means**
# <details><summary>the loss was too small</summary>Then gradients would be zero, which raises no
# alarm.</details>
# <details><summary>a gradient overflowed; the scale is halved</summary>Right, and now and then it
# is how the scale finds its edge.</details>
# <details><summary>training has diverged</summary>Only when it skips again and again: then look at
# the forward pass.</details>
#
# **Key points** · fp16 lacks range, bf16 lacks digits · products in 16 bits, sums and weights in 32
# · a loss scaler probes for the edge; look at the loss before you blame the scale · half the bytes
# everywhere, faster products only with the instruction · autocast saves when activations outweigh
# weights · unscale, clip, step.
#
# **Sources** · P. Micikevicius et al., *Mixed Precision Training*, 2018 · D. Kalamkar et al., *A
# Study of BFLOAT16 for Deep Learning Training*, 2019 · P. Micikevicius et al., *FP8 Formats for
# Deep Learning*, 2022 · P. Zamirai et al., *Revisiting BFloat16 Training*, 2020 · *DeepSeek-V3
# Technical Report*, 2024, section 3.3, on accumulation in FP8 · PyTorch's documentation of
# [torch.amp](https://docs.pytorch.org/docs/stable/amp.html), with its lists of operations, and of
# [TF32 and cuDNN](https://docs.pytorch.org/docs/stable/notes/cuda.html) · oneDNN's documentation of
# the [CPU dispatcher's
# caps](https://oneapi-src.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html) · NVIDIA's
# [Apex](https://github.com/NVIDIA/apex).
#
# **For the capstone** row 07 of your ledger, *precision*, now says whether 16 bits pay on this
# machine, in time and in bytes, and what they cost in accuracy. You have seen that autocast saves
# what the forward pass keeps. What exactly does it keep, and what if you keep nothing at all? Next:
# [08 · Memory](08_memory.ipynb).

# %% [markdown]
# ## Further
# Each part stands alone.
#
# ### Every pattern of four formats
# Range and precision can be found without any formula: halve until nothing is left, double until
# nothing fits, and add less and less to 1 until it stays 1.


# %%
def experiment(dtype):
    """Exponents of two: smallest number, largest power, gap above 1; found by trying."""

    def keeps(value):
        return torch.tensor(value, dtype=torch.float64).to(dtype).double().item()

    small = next(k for k in range(0, -200, -1) if keeps(2.0 ** (k - 1)) == 0)
    large = next(k for k in range(200) if keeps(2.0 ** (k + 1)) != 2.0 ** (k + 1))
    gap = next(k for k in range(0, -60, -1) if keeps(1 + 2.0 ** (k - 1)) == 1)
    return small, large, gap


print({name: experiment(dtype) for name, dtype in TORCH.items()})

# %% [markdown]
# The definition above, as code, against torch: all patterns of four formats. When all bits of $E$
# are ones, a pattern means infinity ($M = 0$) or not-a-number; PyTorch's e4m3 spends only one
# pattern a sign on that.


# %%
def decode(words, e, m, only_nan=False):
    """Integers (int64) → the numbers they stand for (float64) with e exponent bits and m mantissa
    bits.
    """
    bias = 2 ** (e - 1) - 1
    sign = 1.0 - 2.0 * (words >> (e + m))
    exponent, fraction = (words >> m) & (2**e - 1), (words & (2**m - 1)) / 2.0**m
    normal = (1 + fraction) * torch.exp2((exponent - bias).double())
    value = sign * torch.where(exponent == 0, fraction * 2.0 ** (1 - bias), normal)
    top = exponent == 2**e - 1
    if only_nan:  # e4m3: only the very last pattern is special
        return value.masked_fill(top & (fraction == 1 - 2.0**-m), math.nan)
    special = torch.where(fraction == 0, sign * math.inf, math.nan)
    return torch.where(top, special, value)


# %%
for name, dtype in list(TORCH.items())[1:]:
    e, m = FORMATS[name]
    words = torch.arange(2 ** (1 + e + m))
    ours = decode(words, e, m, only_nan=name == "fp8 e4m3")
    theirs = words.to({8: torch.uint8, 16: torch.uint16}[1 + e + m]).view(dtype).double()
    same = bool(((ours == theirs) | (ours.isnan() & theirs.isnan())).all())
    print(f"{name:9} all {len(words)} patterns agree with torch: {same}")

# %% [markdown]
# ### An autocast of your own
# A *function mode* sees each call of a torch function before it runs.


# %%
class MyAutocast(TorchFunctionMode):
    """Matrix products and convolutions in `dtype`, the loss in fp32, the rest as it comes."""

    LOWER = (F.linear, F.conv2d, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
    UPPER = (F.cross_entropy, F.mse_loss)

    def __init__(self, dtype):
        super().__init__()
        self.wanted = dict.fromkeys(self.LOWER, dtype) | dict.fromkeys(self.UPPER, torch.float32)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.wanted:
            args = tuple(
                a.to(self.wanted[function]) if torch.is_tensor(a) and a.is_floating_point() else a
                for a in args
            )
        return function(*args, **(kwargs or {}))


# %%
def step_gradients(model, context, x, y):
    model.zero_grad()
    with context:
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    return [loss.detach(), *[p.grad for p in model.parameters()]]


# %%
net, few = models.mini_resnet(8, seed=0), models.normalise(images[:16])
for dtype in (torch.bfloat16, torch.float16):
    mine = step_gradients(net, MyAutocast(dtype), few, labels[:16])
    theirs = step_gradients(net, torch.autocast("cpu", dtype=dtype), few, labels[:16])
    equal = all(torch.equal(i, j) for i, j in zip(mine, theirs, strict=True))
    print(f"{dtype}: loss and all gradients equal torch.autocast's bit by bit: {equal}")

# %% [markdown]
# ### Does bf16 learn as well, and does fp16 need a scaler?
# "fp16 needs a loss scaler" is repeated as a rule. Its source (Micikevicius et al. 2018) says that
# several convolutional networks trained without, and others failed. So ask a convolutional network
# with its ordinary loss (on images of half the resolution: many seeds). Few CPUs have fp16
# convolutions; here inputs, weights, outputs and their gradients are *rounded to fp16* and summed
# in fp32, as a GPU would. The check below compares that with real fp16.


# %%
class Rounded(torch.autograd.Function):
    """forward(x) on the way in, backward(gradient) on the way back."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.backward_rounding = backward
        return forward(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.backward_rounding(gradient), None, None


# %%
class Emulated(TorchFunctionMode):
    """Linear layers and convolutions whose tensors are rounded, both ways; sums stay fp32."""

    def __init__(self, forward, backward):
        super().__init__()
        self.round = lambda t: Rounded.apply(t, forward, backward)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.linear, F.conv2d):
            x, w, *rest = args
            return self.round(function(self.round(x), self.round(w), *rest, **(kwargs or {})))
        return function(*args, **(kwargs or {}))


# %% tags=["nbval-ignore-output"]
def to_fp16(t):
    return t.half().float()


net, (few, truth) = mlp(0), next(batches(0, 1))
real = step_gradients(net, torch.autocast("cpu", dtype=torch.float16), few, truth)
emulated = step_gradients(net, Emulated(to_fp16, to_fp16), few, truth)
plain = step_gradients(net, contextlib.nullcontext(), few, truth)
for name, found in (("emulated", emulated), ("fp32", plain)):
    off = [float((a - b).norm() / b.norm()) for a, b in zip(found[1:], real[1:], strict=True)]
    print(f"{name}: gradients differ from real fp16 by {max(off):.1e} at most")


# %% tags=["nbval-ignore-output"]
def train_cnn(context, seed, shrink=1.0):
    model = nn.Sequential(nn.AvgPool2d(2), models.mini_resnet(8, seed=seed)).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1 / shrink, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=STEPS)
    for x, y in batches(seed, STEPS, flat=False):
        optimizer.zero_grad()
        with context():
            loss = F.cross_entropy(model(x), y) * shrink
        loss.backward()
        optimizer.step()
        schedule.step()
    return accuracy(model, flat=False)


contexts = {
    "fp32": contextlib.nullcontext,
    "bf16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "fp16, no scaler": lambda: Emulated(to_fp16, to_fp16),
}
jobs = [functools.partial(train_cnn, c, s) for c in contexts.values() for s in SEEDS]
table = np.reshape(side_by_side(jobs), (len(contexts), -1))
scores = dict(zip(contexts, table.tolist(), strict=True))

# %% tags=["nbval-ignore-output"]
lost = {n: measure.paired_t(np.subtract(scores["fp32"], scores[n]), "points") for n in scores}
plots.seeds(
    scores,
    ylabel="test accuracy (%)",
    title=f"Lost against fp32: bf16 {lost['bf16'].value:.2f} points, fp16 without a scaler"
    f" {lost['fp16, no scaler'].value:.2f}",
    alt="Test accuracy of each seed in fp32, bf16 and fp16 without a scaler, joined by lines.",
)
claims.verdict("07.bf16_learns_as_well", lost["bf16"])

# %% tags=["nbval-ignore-output"]
claims.verdict("07.fp16_needs_a_scaler", lost["fp16, no scaler"])

# %% [markdown]
# A rule without its condition. Subnormal gradients are kept, with fewer digits; lost is what rounds
# to zero. So count zeros, as above, before you decide.
#
# ### Weights in bf16
# What if the weights themselves are bf16, without masters? *Stochastic* rounding goes up or down by
# chance, with the probability that makes it right on average (chapter 5; Zamirai et al. 2020 train
# so). All arithmetic is fp32 here; only what an update leaves in the weight is rounded.


# %%
def to_bf16(x, how):
    """fp32 → the fp32 numbers that bf16 can hold."""
    if how == "nearest":
        return x.bfloat16().float()
    words = x.view(torch.int32) + torch.randint(0, 2**16, x.shape, dtype=torch.int32)
    return (words & -(2**16)).view(torch.float32)  # add a random tail, then cut it off


# %%
class RoundedSGD(torch.optim.SGD):
    """SGD whose weights are bf16 numbers after each step."""

    def __init__(self, parameters, lr, how):
        super().__init__(parameters, lr)
        self.how, self.idle = how, []

    @torch.no_grad()
    def step(self, closure=None):
        weights = [p for group in self.param_groups for p in group["params"]]
        before = [p.clone() for p in weights]
        super().step(closure)
        for p, old in zip(weights, before, strict=True):
            p.copy_(to_bf16(p, self.how) if self.how != "master" else p)
            self.idle.append(float((p == old)[p.grad != 0].float().mean()))


# %% tags=["nbval-ignore-output"]
def train_rounded(how, lr, seed):
    """Test accuracy, and the percentage of updates that left a weight where it was."""
    model = mlp(seed)
    optimizer = RoundedSGD(model.parameters(), lr, how)
    for x, y in batches(seed, STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return accuracy(model), 100 * np.mean(optimizer.idle)


# %% tags=["nbval-ignore-output"]
for lr in (0.002, 0.05):
    for how in ("master", "nearest", "stochastic"):
        found = np.array([train_rounded(how, lr, seed) for seed in SEEDS[:3]])
        right, idle = found.mean(0)
        print(f"rate {lr:4}, {how:10} weights: {right:.1f}%, {idle:.0f}% of updates idle")

# %% [markdown]
# Rounding to nearest throws the small updates away; stochastic rounding keeps their sum. At the
# larger rate fewer are small: the price depends on the size of an update beside the weight's ulp.
#
# ### FP8 training, emulated
# Today's units multiply FP8. e4m3 is for what goes forward, e5m2, with more range, for gradients
# (Micikevicius et al. 2022). Both are so coarse that each tensor gets a *scale*, which puts its
# largest value at the format's end. Does it matter? With the ordinary loss, and with one made
# small, as above. This is an emulation: it says what is learned, not how fast.


# %%
def fp8(dtype, scaled):
    """Rounds to an FP8 type, with or without a scale for the tensor; overflow saturates."""
    largest = torch.finfo(dtype).max

    def rounding(t):
        scale = largest / t.abs().max().clamp(min=1e-30) if scaled else 1.0
        return (t * scale).clamp(-largest, largest).to(dtype).float() / scale

    return rounding


# %%
def fp8_mode(scaled):
    return Emulated(fp8(torch.float8_e4m3fn, scaled), fp8(torch.float8_e5m2, scaled))


# %% tags=["nbval-ignore-output"]
for shrink in (1.0, 2.0**-12):
    jobs = [
        functools.partial(train_cnn, functools.partial(fp8_mode, scaled), seed, shrink)
        for scaled in (True, False)
        for seed in SEEDS[:2]
    ]
    scaled, plain = np.reshape(side_by_side(jobs), (2, -1)).mean(1)
    print(f"loss times {shrink:g}: fp8 scaled {scaled:.1f}%, without a scale {plain:.1f}%")
print(f"fp32, the same seeds: {np.mean(scores['fp32'][:2]):.1f}%")

# %% [markdown]
# The scale is worth nothing where the numbers happen to fit, and everything where they do not. Real
# recipes go further: scales for blocks of 128 (DeepSeek-V3, 2024) or of 32 (MXFP8, chapter 5),
# and products that are added up in fp32 every few steps.
#
# ### Both worlds on one machine
# oneDNN, the library behind PyTorch's convolutions on a CPU, can be told to ignore instructions
# that the processor has. Each *world* below is a fresh program under such a cap, started twice; in
# turn they time fp32 and bf16, training steps of one thread. Two starts are a look, no interval.

# %% [markdown]
# ### Our scaler and GradScaler
# Does it behave as `torch.amp.GradScaler` does? Give both the same losses: mostly ordinary ones,
# some of which are infinite.


# %%
class Torch:
    """GradScaler behind the names of ours."""

    def __init__(self, scale, growth, backoff, interval):
        self.inner = torch.amp.GradScaler(
            "cpu",
            init_scale=scale,
            growth_factor=growth,
            backoff_factor=backoff,
            growth_interval=interval,
        )
        self.scaled = self.inner.scale

    scale = property(lambda self: self.inner.get_scale())

    def step(self, optimizer):
        self.inner.step(optimizer)
        before = self.scale
        self.inner.update()
        return self.scale >= before


# %%
def on_losses(scaler, factors):
    """A line a step: the scale before it and whether it was taken. A loss is the parameters' sum of
    squares times a factor.
    """
    weights = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    optimizer, lines = torch.optim.SGD([weights], 0.01, momentum=0.9), []
    for factor in factors:
        optimizer.zero_grad()
        scale = scaler.scale
        scaler.scaled(weights.square().sum() * factor).backward()
        lines.append((scale, scaler.step(optimizer)))
    return lines, weights.detach()


# %%
factors = [1.0] * 3 + [math.inf, 1.0, 1.0, math.nan, math.inf] + [0.5] * 7 + [math.inf] + [1.0] * 4
(ours, our_weights), (theirs, their_weights) = (
    on_losses(kind(1024.0, 2.0, 0.5, 3), factors) for kind in (LossScaler, Torch)
)
for i in range(9):
    print(
        f"loss times {factors[i]:<4} scale {ours[i][0]:6g} {'step' if ours[i][1] else 'skip'}",
        end="",
    )
    print(f"   GradScaler: {theirs[i][0]:6g} {'step' if theirs[i][1] else 'skip'}")
print(
    f"all {len(factors)} steps equal:",
    ours == theirs,
    "- weights equal:",
    torch.equal(our_weights, their_weights),
)

# %% [markdown]
# Growth after three good steps, back-off at every infinity, the counter starting anew: line for
# line the same.

# %% tags=["nbval-ignore-output"]
# %%writefile "$FOLDER/world.py"
import os
import time

import torch
import torch.nn.functional as F

from course_utils import models

torch.set_num_threads(1)
width, batch = map(int, os.environ["SIZES"].split())
model = models.mini_resnet(width, seed=0).to(memory_format=torch.channels_last).train()
x = torch.randn(batch, 1, 28, 28).contiguous(memory_format=torch.channels_last)
y = torch.zeros(batch, dtype=torch.long)


def sample():
    start = time.perf_counter()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=os.environ["FORMAT"] == "bf16"):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    return time.perf_counter() - start


# %%
def worlds_of(isa):
    """Caps that make a difference with these instruction sets: name → ONEDNN_MAX_CPU_ISA."""
    caps = {"as it is": None}
    if {"avx512_bf16", "amx_bf16"} & set(isa):
        caps["bf16 instruction hidden"] = "AVX512_CORE_VNNI"
    if "avx512_f" in isa:
        caps["AVX-512 hidden"] = "AVX2"
    elif "avx2" in isa:
        caps["AVX2 hidden"] = "SSE41"
    return caps


# %% tags=["nbval-ignore-output"]
sizes = {"SIZES": "8 8" if SMOKE else "16 32"}
for name, cap in worlds_of(machine.isa()).items():
    here = sizes | ({"ONEDNN_MAX_CPU_ISA": cap} if cap else {})
    try:
        took = measure.turns(
            (FOLDER / "world.py").read_text(),
            {form: here | {"FORMAT": form} for form in ("fp32", "bf16")},
            rounds=3 if SMOKE else 15,
            starts=2,
        )
    except (RuntimeError, TimeoutError) as error:
        print(f"{name}: no bf16 step under this cap ({str(error).splitlines()[-1]})")
        continue
    ratios = [a / b for a, b in zip(took["fp32"], took["bf16"], strict=True)]
    low, middle, high = np.percentile(ratios, [10, 50, 90])
    fp32, bf16 = (1e3 * np.median(took[form]) for form in ("fp32", "bf16"))
    print(f"{name:24} fp32 {fp32:6.1f} ms, bf16 {bf16:6.1f} ms: {middle:.2f}x", end=" ")
    print(f"({low:.2f} to {high:.2f} in eight rounds of ten)")

# %% [markdown]
# Read ratios *and* times. With wide instructions hidden, the ratio can be *better*, though nothing
# became faster: the fp32 step became slower. **A ratio can rise because its baseline fell**: always
# print both times.
#
# ### Where autocast needs more
# Layers with few rows and many weights, peak by peak. The arithmetic above says: more bytes below
# $B = w$ rows, fewer beyond.


# %% tags=["nbval-ignore-output"]
def chain(width, depth=6):
    layers = [(nn.Linear(width, width), nn.ReLU()) for _ in range(depth)]
    return nn.Sequential(*[layer for pair in layers for layer in pair])


# %% tags=["nbval-ignore-output"]
WIDE = 32 if SMOKE else 128
layers, counts = chain(WIDE), [WIDE // 16, WIDE // 4, WIDE, 4 * WIDE, 16 * WIDE]
kept, peaks = [], []
for count in counts:
    inputs, targets = torch.randn(count, WIDE), torch.zeros(count, dtype=torch.long)
    by = [kept_bytes(layers, inputs, targets, on) for on in (True, False)]
    kept.append(by[0] / by[1])
    by = [peak_bytes(layers, inputs, targets, on) for on in (True, False)]
    peaks.append(by[0] / by[1])

# %% tags=["nbval-ignore-output"]
plots.lines(
    counts,
    {"kept for backward": kept, "peak of the step": peaks},
    xlabel="rows in a batch",
    ylabel="bytes, autocast ÷ fp32",
    logx=True,
    logy=True,
    reference=(1.0, "no change"),
    title=f"Six layers of {WIDE}: peak {peaks[0]:.1f}x at {counts[0]} rows,"
    f" {peaks[-1]:.2f}x at {counts[-1]}",
    alt="Bytes with autocast divided by those in fp32, against the batch: above one at the left.",
)

# %% [markdown]
# ### Accumulation, and a compiler
# Four small batches and one update: the gradients are *sums*, so all four need the same scale.
# `update()` comes once, after the step. With a scaler that is updated after each small batch, the
# sum mixes scales.


# %%
def accumulated(model, update_each, parts=4):
    """The gradient after `parts` small batches, made true at the end; in real fp16."""
    optimizer = torch.optim.SGD(model.parameters(), 0.0)  # nothing moves
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    for x, y in batches(5, parts, size=16):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(model(x), y) / parts
        scaler.scale(loss).backward()
        if update_each:
            scaler.update(scaler.get_scale() * 2)
    scaler.unscale_(optimizer)
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# %% tags=["nbval-ignore-output"]
x_all, y_all = (torch.cat(part) for part in zip(*batches(5, 4, size=16), strict=True))
whole = torch.cat(
    [g.flatten() for g in step_gradients(mlp(0), contextlib.nullcontext(), x_all, y_all)[1:]]
)
for update_each in (False, True):
    off = (accumulated(mlp(0), update_each) - whole).norm() / whole.norm()
    print(f"update after {'each part' if update_each else 'the last part'}: off by {off:.1%}")

# %% [markdown]
# A *compiled* model under autocast gives the same dtypes and not the same bits: what the compiler
# fuses stays in fp32 between two operations, where eager rounds to 16 bits each time (chapter 10).
# The distance to fp32 says which is nearer.


# %%
def gated(x):
    y = x @ gate
    return F.gelu(y) * torch.sigmoid(y) - y


# %% tags=["nbval-ignore-output"]
gate, few = torch.randn(64, 64), torch.randn(256, 64)
if able := machine.can("compiler"):
    compiled = torch.compile(gated, backend="eager" if SMOKE else "inductor")
    with torch.inference_mode():
        exact = gated(few)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            arms = {"eager": gated(few), "compiled": compiled(few)}
    for name, found in arms.items():
        off = (found.float() - exact).norm() / exact.norm()
        print(f"{name}: {found.dtype}, {off:.2%} from fp32")
else:
    print(able.reason)

# %% [markdown]
# ### On an NVIDIA GPU: Tensor Cores, TF32, cuDNN
# *Tensor Cores* multiply small matrices of 16-bit numbers. They came with Volta (2017); bf16 and
# TF32, which rounds fp32 inputs to 10 mantissa bits, with Ampere (2020).


# %% tags=["nbval-ignore-output"]
def on_gpu(dtype, precision="ieee", side=4096):
    left, right = (torch.randn(side, side, device="cuda").to(dtype) for _ in range(2))

    def call():
        torch.backends.cuda.matmul.fp32_precision = precision  # "tf32" or "ieee"
        return left @ right

    return measure.Arm(call, f"{dtype} {precision}, {side}")


if machine.can("gpu"):
    plain = on_gpu(torch.float32)
    for arm in (on_gpu(torch.float32, "tf32"), on_gpu(torch.bfloat16), on_gpu(torch.float16)):
        print(measure.compare(plain, arm, seconds=SECONDS))
    odd = on_gpu(torch.float16, side=4095)
    print(measure.compare(on_gpu(torch.float16), odd, seconds=SECONDS))
    torch.backends.cuda.matmul.fp32_precision = "ieee"
else:
    print(machine.skip("gpu", "Tensor Cores and TF32"))

# %% tags=["nbval-ignore-output"]
if machine.can("gpu"):
    deep = models.mini_resnet(64).cuda().to(memory_format=torch.channels_last)
    photos = torch.randn(512, 1, 28, 28, device="cuda")
    targets = torch.zeros(512, dtype=torch.long, device="cuda")

    def gpu_step(on, benchmark=False):
        torch.backends.cudnn.benchmark = benchmark  # try all algorithms once for each shape
        with torch.autocast("cuda", dtype=torch.float16, enabled=on):
            loss = F.cross_entropy(deep(photos), targets)
        loss.backward()

    eager, amp = (measure.Arm(lambda on=on: gpu_step(on), f"autocast={on}") for on in (False, True))
    tuned = measure.Arm(lambda: gpu_step(True, benchmark=True), "autocast, cudnn.benchmark")
    print(measure.compare(eager, amp, seconds=SECONDS))
    print(measure.compare(amp, tuned, seconds=SECONDS))
else:
    print(machine.skip("gpu", "an AMP step on CUDA, and cudnn.benchmark"))
print("torch.backends.cudnn.enabled, before anybody sets it:", torch.backends.cudnn.enabled)

# %% [markdown]
# `cudnn.enabled = True` changes nothing: it is the default. `cudnn.benchmark = True` does
# something: for each new shape cuDNN times its algorithms once and keeps the best, which pays where
# shapes repeat and costs where they do not. Sides that are multiples of 8 (16-bit) keep the Tensor
# Cores fed. TF32 is off by default for matrix products and on for cuDNN's convolutions: an "fp32"
# network on a new GPU is already partly in mixed precision.
#
# ### A myth: `torch.cuda.amp` works everywhere
# This is what tutorials show. Run it on a CPU tensor, and write down every warning.

# %% tags=["nbval-ignore-output"]
import warnings

with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    with torch.cuda.amp.autocast():
        product = torch.randn(4, 4) @ torch.randn(4, 4)
    old_scaler = torch.cuda.amp.GradScaler()
    new_scaler = torch.amp.GradScaler()  # no device named
print("the product is", product.dtype)
for name, scaler in {
    "torch.cuda.amp.GradScaler()": old_scaler,
    "torch.amp.GradScaler()": new_scaler,
}.items():
    print(f"{name}: enabled {scaler.is_enabled()}, scale {scaler.get_scale():g}")
for warning in {str(w.message) for w in told}:
    print("-", warning[:110])

# %% [markdown]
# Without a GPU everything *runs*: in fp32, with a scaler that scales by 1. A warning is all you
# get, and in a training log nobody reads it. Whoever then measures "AMP against fp32" on such a
# machine measures fp32 against fp32. A GradScaler without a device means CUDA. Name the device:
# `torch.autocast("cpu", dtype=torch.bfloat16)`, `torch.amp.GradScaler("cpu")`.
#
# ### A myth: `.half()` is mixed precision
# `model.half()` casts the weights themselves. First it refuses your data; cast those too, train
# with Adam, and watch.

# %%
torch.manual_seed(0)
halved = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)).half()
with exercises.fails(RuntimeError):
    halved(torch.randn(4, 16))
optimizer = torch.optim.Adam(halved.parameters(), 1e-3)
for step in range(2):
    optimizer.zero_grad()
    halved(torch.randn(64, 16).half()).square().mean().backward()
    optimizer.step()
    weights = torch.cat([p.flatten() for p in halved.parameters()])
    print(f"after step {step + 1}, all weights finite: {bool(weights.isfinite().all())}")
print("Adam's epsilon in fp16:", torch.tensor(1e-8).half().item())

# %% [markdown]
# Adam divides by $\sqrt{v} + \epsilon$, where $v$ is a mean of squared gradients. In fp16, the
# square of a small gradient is zero, and so is $\epsilon = 10^{-8}$: a mean gradient that is not
# zero is divided by zero. There is
# no master weight, no fp32 loss, no scaler: nothing is mixed.
