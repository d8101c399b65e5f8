# %% [markdown]
# # 07 · Mixed precision
#
# **What do 16 bits lose, what must stay in 32, and does your machine pay you for the change?**
#
# After this chapter you can: *read* a number from its bits in six formats · *predict* where fp16
# and bf16 break · *write* autocast and a dynamic loss scaler that agree with PyTorch's bit for bit
# · *explain* why 16 bits are faster on one processor and slower on another · *keep* an fp16
# training run alive.
#
# 175 minutes · before this: 01 Measurement; 02, 05 and 06 help · runs on any CPU

# %% tags=["parameters"]
import os

PROFILE = os.environ.get("COURSE_PROFILE", "fast")

# %% tags=["nbval-ignore-output"]
import math

import numpy as np
import torch
import torch.nn.functional as F
from IPython.display import display
from torch import nn

from course_utils import claims, data, exercises, machine, measure, models, plots

SMOKE, FULL = PROFILE == "smoke", PROFILE == "full"
SECONDS = {"smoke": 0.1, "fast": 2.5, "full": 12.0}[PROFILE]  # for one comparison
STEPS = {"smoke": 12, "fast": 300, "full": 900}[PROFILE]  # of one short training run
MIB = 2**20  # bytes
machine.card()

# %% [markdown]
# ## Recall
# 1. (Chapter 1) A speed-up has the interval [0.9, 1.3]. May you say "faster"?
#    <details><summary>Answer</summary>No: it holds both slower and faster. The answer is
#    "inconclusive".</details>
# 2. (Chapter 5) What is the largest error when you store a number on a grid of step $s$?
#    <details><summary>Answer</summary>Half a step, $s/2$, inside the range. The formats below have
#    a grid too, but its step grows with the number.</details>
# 3. (Chapter 6, if you took it) INT8 gains much on one CPU and little or nothing on another. What
#    is most often the difference?
#    <details><summary>Answer</summary>One instruction. Fewer bits save bytes everywhere; how much
#    arithmetic they save depends on the instructions that the processor has for them.</details>
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
    "tf32": (8, 10),
    "bf16": (8, 7),
    "fp16": (5, 10),
    "fp8 e4m3": (4, 3),
    "fp8 e5m2": (5, 2),
}
TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TORCH |= {"fp8 e4m3": torch.float8_e4m3fn, "fp8 e5m2": torch.float8_e5m2}
WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # integers of as many bytes


def pattern(x, dtype):
    """The bits of x in a format, as a non-negative integer."""
    stored = torch.tensor(x, dtype=torch.float64).to(dtype)
    size = stored.element_size()
    return stored.view(WORD[size]).item() & (2 ** (8 * size) - 1)


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
# *subnormal*, and they fill the gap between the smallest normal number and zero. When all bits of
# $E$ are ones, the pattern means infinity ($M = 0$) or not-a-number. The e4m3 of PyTorch spends
# only one pattern a sign on that.


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


for name, dtype in list(TORCH.items())[1:]:
    e, m = FORMATS[name]
    words = torch.arange(2 ** (1 + e + m))
    ours = decode(words, e, m, only_nan=name == "fp8 e4m3")
    theirs = words.to({8: torch.uint8, 16: torch.uint16}[1 + e + m]).view(dtype).double()
    same = bool(((ours == theirs) | (ours.isnan() & theirs.isnan())).all())
    print(f"{name:9} all {len(words)} patterns agree with torch: {same}")

# %% [markdown]
# Every pattern of four formats, and you have read all of them. Now the other direction: store a
# number in *any* format, tf32 too, which PyTorch has no type for (it exists only inside NVIDIA's
# matrix units). The gap between neighbours is one step of the mantissa at the number's exponent. It
# is called the *ulp*, the unit in the last place.


# %%
def stored(x, e, m):
    """x (tensor or number) rounded to the nearest number with e exponent and m mantissa bits, ties
    to even.
    """
    x = torch.as_tensor(x, dtype=torch.float64)
    bias = 2 ** (e - 1) - 1
    exponent = (torch.frexp(x).exponent - 1).clamp(min=1 - bias)  # subnormals share one exponent
    ulp = torch.exp2(exponent.double() - m)
    y = torch.round(x / ulp) * ulp
    largest = (2 - 2.0**-m) * 2.0**bias
    return torch.where(y.abs() > largest, torch.sign(x) * math.inf, y)


x = torch.randn(100_000) * torch.exp2(torch.randint(-30, 20, (100_000,)).float())
for name in ("bf16", "fp16"):
    print(
        f"{name} as torch rounds:",
        torch.equal(stored(x, *FORMATS[name]), x.to(TORCH[name]).double()),
    )

# %% [markdown]
# Range and precision can be found by experiment, without any formula: halve until nothing is left,
# double until nothing fits, and add less and less to 1 until it stays 1.


# %%
def experiment(dtype):
    """Exponents of two: smallest number, largest power, gap above 1; found by trying."""

    def keeps(value):
        return torch.tensor(value, dtype=torch.float64).to(dtype).double().item()

    small = next(k for k in range(0, -200, -1) if keeps(2.0 ** (k - 1)) == 0)
    large = next(k for k in range(200) if keeps(2.0 ** (k + 1)) != 2.0 ** (k + 1))
    gap = next(k for k in range(0, -60, -1) if keeps(1 + 2.0 ** (k - 1)) == 1)
    return small, large, gap


for name, dtype in TORCH.items():
    small, large, gap = experiment(dtype)
    print(
        f"{name:9} smallest 2^{small:<5} largest power 2^{large:<4} gap above one 2^{gap:<4}",
        end=" ",
    )
    print(f"largest number {torch.finfo(dtype).max:.6g}")

# %% [markdown]
# Two columns to remember. **fp16 ends at 65,504 and at $2^{-24}$; bf16 reaches as far as fp32 but
# has only a gap of $2^{-7}$ above 1**: it knows about two to three decimal digits. fp16's trouble
# will be range, bf16's precision.
#
# The slider lets you build a format. Without a running Jupyter kernel you see no slider; the figure
# after it says the same.


# %%
def bits_text(value, e, m):
    """The bits of a finite number in the format (e, m), as text."""
    y = float(stored(value, e, m))
    bias = 2 ** (e - 1) - 1
    if math.isinf(y):
        E, M = 2**e - 1, 0
    else:
        exponent = max(math.frexp(y)[1] - 1, 1 - bias) if y else 1 - bias
        scaled = int(abs(y) / 2.0 ** (exponent - m))  # the mantissa with its leading one
        E, M = (exponent + bias, scaled - 2**m) if scaled >= 2**m else (0, scaled)
    return f"{int(y < 0)}{E:0{e}b}{M:0{m}b}"


def draw(value, rows):
    """Rows of bits, coloured by their part; what is stored and how far off it is stands at the
    right.
    """
    off = {n: float(stored(value, *f)) / value - 1 for n, f in rows.items()}
    worst = max(off, key=lambda n: abs(off[n]))
    title = f"{value:g} is off by {100 * abs(off[worst]):.2g}% in {worst}"
    figure, ax = plots.axes("bit", "", title=title, height=1.1 + 0.36 * len(rows))
    for row, (name, (e, m)) in enumerate(rows.items()):
        for i, bit in enumerate(bits_text(value, e, m)):
            colour = plots.COLOURS[1 if i == 0 else 2 if i <= e else 0]
            alpha = 0.85 if bit == "1" else 0.25
            ax.barh(row, 0.92, left=i, height=0.7, color=colour, alpha=alpha)
            ax.text(i + 0.46, row, bit, ha="center", va="center", fontsize=7)
        ax.text(32.8, row, f"{float(stored(value, e, m)):.8g}", va="center", fontsize=9)
    ax.set(xlim=(0, 40), xticks=[0, 8, 16, 24, 32])
    ax.set_yticks(range(len(rows)), list(rows))
    ax.grid(visible=False)
    ax.invert_yaxis()
    plots.show(
        figure, f"Bits of {value:g}: sign, exponent, mantissa, and at the right what is stored."
    )


# %% tags=["nbval-ignore-output"]
import ipywidgets

plots.explore(
    lambda value, e, m: draw(value, {f"{1 + e + m} bits": (e, m)} | FORMATS),
    value=ipywidgets.FloatText(value=0.1),
    e=ipywidgets.IntSlider(value=6, min=2, max=8, description="exponent"),
    m=ipywidgets.IntSlider(value=9, min=1, max=23, description="mantissa"),
)

# %%
draw(0.1, FORMATS)

# %% [markdown]
# Orange is the sign, green the exponent, blue the mantissa; a dark box is a 1. Try 100,000 and
# 0.00000001 with the slider: fp16 says infinity and zero, bf16 is about right both times. Try 257:
# bf16 says 256. (The slider keeps the top exponent for infinity in every format. Real e4m3 gives it
# up, and reaches 448.)
#
# ## Measure: where the numbers of a training step live
# Take the course's trained network and one batch. Collect the sizes of all its weights, of what its
# convolutions compute, and of its gradients. Where do they fall, and what would fp16 keep?


# %% tags=["nbval-ignore-output"]
def sizes_in_a_step(model, x, y):
    """Absolute values, zeros left out: weights, activations, gradients of both."""
    seen = {"weights": [], "activations": [], "gradients": []}

    def hook(_, __, output):
        seen["activations"].append(output.detach())
        output.register_hook(lambda g: seen["gradients"].append(g))

    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    handles = [layer.register_forward_hook(hook) for layer in convolutions]
    F.cross_entropy(model(x), y).backward()
    for handle in handles:
        handle.remove()
    seen["weights"] = [p.detach() for p in model.parameters()]
    seen["gradients"] += [p.grad for p in model.parameters()]
    flat = {name: torch.cat([t.flatten() for t in ts]).abs() for name, ts in seen.items()}
    return {name: t[t > 0] for name, t in flat.items()}


images, labels = data.fashion_mnist("train")
sample = slice(0, 32 if SMOKE else 256)
sizes = sizes_in_a_step(models.baseline(), models.normalise(images[sample]), labels[sample])
lost = {k: float((stored(t, 5, 10) == 0).double().mean()) for k, t in sizes.items()}
subnormal = {k: float((t < 2.0**-14).double().mean()) for k, t in sizes.items()}
print(
    {
        k: f"{lost[k]:.1%} become zero in fp16, {subnormal[k]:.1%} lie below its normal range"
        for k in sizes
    }
)

# %% tags=["nbval-ignore-output"]
figure, ax = plots.axes(
    "size, as a power of two",
    "share of the values (%)",
    height=4.2,
    title=(
        f"{100 * subnormal['gradients']:.0f}% of the gradients lie below fp16's normal range,"
        f" {100 * lost['gradients']:.2g}% are zero in it"
    ),
)
edges = np.arange(-40, 20)
for i, (name, t) in enumerate(sizes.items()):
    counts, _ = np.histogram(torch.log2(t).numpy(), edges)
    ax.step(edges[:-1], 100 * counts / len(t), where="post", color=plots.COLOURS[i], label=name)
ax.axvspan(-14, 16, color="0.85", zorder=0, label="fp16, normal")
ax.axvspan(-24, -14, color="0.93", zorder=0, label="fp16, subnormal")
ax.legend(loc="upper left", fontsize=9)
plots.show(
    figure,
    "Histograms of sizes on a scale of powers of two, with fp16's range shaded: gradients lie"
    " furthest left.",
)

# %% [markdown]
# The shaded part is what fp16 can hold, the lighter one with fewer and fewer digits. Weights and
# activations sit in the middle. The gradients stand at the left, most of them where digits are
# missing, some beyond the edge, while the right half of the shaded part stays empty. Micikevicius
# et al. (2018) show the same picture for a detection network. So do not ask for more range: **shift
# the gradients to the right**. Multiply the loss by a large $S$, and by the chain rule every
# gradient is multiplied by $S$. Divide at the end, in fp32. That is *loss scaling*. bf16 has the
# range of fp32; for it the whole figure is shaded.
#
# ## From scratch: sums stop growing
# Add 1, again and again, in each format. Then add up thousands of random numbers between 0 and 1.

# %%
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    total = torch.zeros((), dtype=dtype)
    for _ in range(4096):
        total += 1
    print(f"4096 times one in {str(dtype).removeprefix('torch.'):9}: {total.item():g}")
ones = torch.ones(1, 4096, dtype=torch.bfloat16)
print("a matrix product of ones, bfloat16:", (ones @ ones.T).item())

# %% tags=["nbval-ignore-output"]
terms = torch.rand(2000 if SMOKE else 8000, dtype=torch.float64)


def running_sum(terms, e, m):
    """Partial sums, the accumulator rounded after each addition."""
    total, out = 0.0, []
    for value in terms.tolist():
        total = total + value
        if abs(total) > 0:
            step = 2.0 ** (math.frexp(total)[1] - 1 - m)
            total = round(total / step) * step  # Python rounds ties to even, too
        out.append(total)
    return out


ends = np.linspace(0, len(terms) - 1, 40).astype(int)
exact = terms.cumsum(0).numpy()
paths = {
    n: np.array(running_sum(stored(terms, *FORMATS[n]), *FORMATS[n])) for n in ("bf16", "fp16")
}
paths["bf16 terms, fp32 sum"] = np.array(running_sum(stored(terms, 8, 7), 8, 23))
off = {n: 100 * (1 - p[-1] / exact[-1]) for n, p in paths.items()}
plots.lines(
    ends + 1,
    {n: p[ends] for n, p in paths.items()} | {"exact": exact[ends]},
    xlabel="terms added",
    ylabel="running sum",
    title=(
        f"bf16 loses {off['bf16']:.0f}%, fp16 {off['fp16']:.0f}%; bf16 terms with an fp32 sum"
        f" {abs(off['bf16 terms, fp32 sum']):.1g}%"
    ),
    alt=(
        "Running sums: the bf16 line turns flat first, fp16 later, the one with an fp32 accumulator"
        " follows the exact line."
    ),
)

# %% [markdown]
# A sum stops growing when a term is less than half of its ulp. The last path shows the remedy:
# **16-bit terms, 32-bit sum**. The rounding of the terms goes in both directions and cancels; the
# rounding of the sum does not. Every matrix unit is built like this, and so are PyTorch's kernels:
# that is why the product of ones, in the cell before, was counted right.
#
# ## From scratch: master weights
# An update is a sum as well. Take a weight of 1 and 200 updates of −0.001, as [chapter
# 5](05_quantization_math.ipynb) did.

# %%
for name, dtype in {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}.items():
    weight = torch.ones((), dtype=dtype)
    for _ in range(200):
        weight -= 0.001
    print(f"{name}: {weight.item():.4f}")

# %% [markdown]
# The bf16 weight never moves: half an ulp below 1 is larger than the update. So keep the weights in
# fp32, the *master weights*, and make 16-bit copies for the products. Does it matter for a network?
# The next cell trains a small one three ways. All arithmetic is fp32 here; only what an update
# leaves in the weight is rounded. *Stochastic* rounding goes up or down by chance, with the
# probability that makes it right on average (chapter 5).


# %%
def mlp(seed, hidden=64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def to_bf16(x, how):
    """fp32 → the fp32 numbers that bf16 can hold."""
    if how == "nearest":
        return x.bfloat16().float()
    words = x.view(torch.int32) + torch.randint(0, 2**16, x.shape, dtype=torch.int32)
    return (words & -(2**16)).view(torch.float32)  # add a random tail, then cut it off


pixels = models.normalise(images).flatten(1)
test_images, test_labels = data.fashion_mnist("test")
test_pixels = models.normalise(test_images).flatten(1)


def batches(seed, steps, size=64):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        index = torch.randint(0, len(pixels), (size,), generator=generator)
        yield pixels[index], labels[index]


@torch.no_grad()
def accuracy(model):
    """Percent of the test images classified right, computed in fp32."""
    return 100 * float((model(test_pixels).argmax(1) == test_labels).float().mean())


# %% tags=["nbval-ignore-output"]
def train_rounded(how, seed, steps=STEPS, lr=0.01):
    """Accuracy after SGD whose weights are rounded by `how` after each update; and the share of
    updates that did nothing.
    """
    model, idle = mlp(seed), []
    for x, y in batches(seed, steps):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for p in model.parameters():
            with torch.no_grad():
                new = p - lr * p.grad
                new = new if how == "master" else to_bf16(new, how)
                idle.append(float((new == p)[p.grad != 0].float().mean()))
                p.copy_(new)
    return accuracy(model), float(np.mean(idle))


SEEDS = range(3 if SMOKE else 5)
runs = {how: [train_rounded(how, s) for s in SEEDS] for how in ("nearest", "stochastic", "master")}
gap = measure.paired_t([m[0] - n[0] for m, n in zip(runs["master"], runs["nearest"], strict=True)])
plots.seeds(
    {
        f"{how}\n({100 * np.mean([r[1] for r in rs]):.0f}% of updates idle)": [r[0] for r in rs]
        for how, rs in runs.items()
    },
    ylabel="test accuracy (%)",
    title=(
        f"Master weights against bf16 weights: {gap.value:+.1f} points [{gap.low:.1f},"
        f" {gap.high:.1f}]"
    ),
    alt=(
        "Test accuracy of five seeds with bf16 weights rounded to nearest, rounded stochastically,"
        " and fp32 master weights."
    ),
)

# %% [markdown]
# Under each name stands the share of updates that left the weight where it was. Rounding to nearest
# throws many of them away, always the small ones. Stochastic rounding loses nearly as many single
# updates but keeps their sum: it should be close to the master weights. With a larger learning
# rate, or fewer steps, the three come together: the price depends on the size of an update beside
# the ulp of the weight.
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
# On CUDA, softmax and layer norm stand in the upper list; on the CPU they take what comes. The
# weights themselves stay fp32 all the time: they are your master weights.
#
# You can write it. A *function mode* sees each call of a torch function before it runs.

# %%
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


class MyAutocast(TorchFunctionMode):
    """Matrix products and convolutions in `dtype`, the loss in fp32, everything else as it
    comes.
    """

    LOWER = (F.linear, F.conv2d, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
    UPPER = (F.cross_entropy, F.mse_loss)

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function, types, args=(), kwargs=None):
        wanted = {
            **dict.fromkeys(self.LOWER, self.dtype),
            **dict.fromkeys(self.UPPER, torch.float32),
        }
        if function in wanted:

            def cast(t):
                is_float = isinstance(t, torch.Tensor) and t.is_floating_point()
                return t.to(wanted[function]) if is_float else t

            args, kwargs = tree_map(cast, (args, kwargs or {}))
        return function(*args, **(kwargs or {}))


# %%
def step_gradients(model, context, x, y):
    model.zero_grad()
    with context:
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    return [loss.detach(), *[p.grad for p in model.parameters()]]


net, small_batch = models.mini_resnet(8, seed=0), models.normalise(images[:16])
for dtype in (torch.bfloat16, torch.float16):
    ours = step_gradients(net, MyAutocast(dtype), small_batch, labels[:16])
    theirs = step_gradients(net, torch.autocast("cpu", dtype=dtype), small_batch, labels[:16])
    equal = all(torch.equal(i, j) for i, j in zip(ours, theirs, strict=True))
    print(
        f"{dtype}: loss and all {len(ours) - 1} gradients equal torch.autocast's bit by bit:"
        f" {equal}"
    )

# %% [markdown]
# Thirty lines, and the same bits. Torch's version does one thing more: inside the `with` block it
# keeps the 16-bit copy of each weight, so that a weight used twice is cast once. That *weight
# cache* comes back below, as a cost.
#
# Here is the whole step, with the scaler that comes next.

# %%
FLOW = [
    ("fp32\nmaster weights", 0, 1.4, 0),
    ("16-bit copies", 1, 1.4, 1),
    ("forward\n(autocast)", 2, 1.4, 1),
    ("loss\n(fp32)", 3, 1.4, 0),
    ("loss × S", 4, 1.4, 0),
    ("backward\n(16 bits)", 4, 0, 1),
    ("gradients ÷ S\n(fp32)", 3, 0, 0),
    ("all finite?\nclip", 2, 0, 0),
    ("update,\nperhaps S × 2", 1, 0, 0),
    ("else skip,\nS ÷ 2", 2, -1.2, 0),
]
figure, ax = plots.axes("", "", title="One step: what is in 16 bits, what in 32", height=3.6)
boxes = []
for text, column, row, half in FLOW:
    colour = plots.COLOURS[4] if half else "0.88"
    style = {"boxstyle": "round,pad=0.4", "facecolor": colour, "edgecolor": "0.4"}
    boxes.append(ax.text(column, row, text, ha="center", va="center", fontsize=8, bbox=style))
for start, end in [*((i, i + 1) for i in range(8)), (7, 9), (8, 0)]:
    ends = {"patchA": boxes[start].get_bbox_patch(), "patchB": boxes[end].get_bbox_patch()}
    (_, x0, y0, _), (_, x1, y1, _) = FLOW[start], FLOW[end]
    ax.annotate("", (x1, y1), (x0, y0), arrowprops={"arrowstyle": "->", "color": "0.3", **ends})
ax.set(xlim=(-0.6, 4.6), ylim=(-1.7, 2))
ax.axis("off")
plots.show(
    figure,
    "Flow of a step: fp32 weights, 16-bit copies, forward, fp32 loss, times S, 16-bit backward,"
    " fp32 gradients, check, update or skip.",
)

# %% [markdown]
# Orange boxes are 16 bits, grey ones 32.
#
# ## Measure: is it faster on your machine?
# One training step and one inference of the course's network, fp32 against bf16 autocast.

# %% tags=["nbval-ignore-output"]
WIDTH, BATCH = {"smoke": (8, 16), "fast": (32, 64), "full": (64, 128)}[PROFILE]
big = models.mini_resnet(WIDTH, seed=0).to(memory_format=torch.channels_last)
x = models.normalise(images[:BATCH]).contiguous(memory_format=torch.channels_last)
y = labels[:BATCH]


def train_step(on, dtype=torch.bfloat16):
    with torch.autocast("cpu", dtype=dtype, enabled=on):
        loss = F.cross_entropy(big(x), y)
    loss.backward()
    return loss


@torch.inference_mode()
def infer(on, dtype=torch.bfloat16):
    with torch.autocast("cpu", dtype=dtype, enabled=on):
        return big(x)


def against_fp32(call, name, **how):
    arms = (
        measure.Arm(lambda: call(False), f"fp32 {name}"),
        measure.Arm(lambda: call(True, **how), f"{name} with autocast"),
    )
    return measure.across(*arms, seconds=SECONDS)


training, inference = against_fp32(train_step, "training"), against_fp32(infer, "inference")
print(training, inference, sep="\n")
exercises.reveal("07.speed", training.ratio, "times")
display(claims.verdict("07.amp_trains_faster", training))
claims.verdict("07.amp_speeds_up_inference", inference)

# %% [markdown]
# Blogs of Intel and PyTorch report a gain on processors with a bf16 instruction ([one of
# them](https://pytorch.org/blog/empowering-pytorch-on-intel-xeon-scalable-processors-with-bfloat16/)).
# If your machine card at the top lists `avx512_bf16`, `amx_bf16` or Arm's `bf16`, expect one. If it
# does not, you probably saw a number *below* 1: the same bits, and slower. The next measurement
# says why.
#
# ## Explain: bytes or arithmetic?
# A processor can be short of two things (chapter 1, the roofline). Adding two long vectors does one
# operation for every dozen bytes: it waits for memory. A matrix product of some size does dozens
# for each byte: it waits for arithmetic. Half the bits means half the bytes, on every machine. It
# means faster arithmetic only with an instruction for it; without one, a kernel has to widen every
# number to fp32 first, or falls back to code that nobody tuned.

# %% tags=["nbval-ignore-output"]
n, long = (64, 2**14) if SMOKE else (256, 2**24)


def matmul(dtype):
    left, right, out = (torch.randn(n, n).to(dtype) for _ in range(3))
    return measure.Arm(lambda: torch.mm(left, right, out=out), f"matmul {dtype}")


def add(dtype):
    left, right, out = (torch.zeros(long, dtype=dtype) for _ in range(3))
    return measure.Arm(lambda: torch.add(left, right, out=out), f"add {dtype}")


def speedups(kind, dtypes):
    base = kind(torch.float32)
    return {d: measure.compare(base, kind(d), seconds=SECONDS / 2, precision=0.03) for d in dtypes}


HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
products, additions = speedups(matmul, HALVES.values()), speedups(add, HALVES.values())
rows = {f"add, {n}": additions[d].interval for n, d in HALVES.items()}
rows |= {f"matrix product, {n}": products[d].interval for n, d in HALVES.items()}
plots.bars(
    rows,
    xlabel="speed-up over fp32 (x)",
    logx=True,
    reference=(1.0, "as fast as fp32"),
    title=(
        f"16 bits: long additions {rows['add, bf16'].value:.2g}x, matrix products"
        f" {rows['matrix product, bf16'].value:.2g}x (bf16),"
        f" {rows['matrix product, fp16'].value:.2g}x (fp16)"
    ),
    alt=(
        "Speed-up over fp32 of additions and matrix products in bf16 and fp16, on a logarithmic"
        " axis."
    ),
)
measure.release()
claims.verdict("07.fp16_is_fast_on_a_cpu", products[torch.float16])

# %% [markdown]
# The two upper bars are about bytes: they should lie on the right of the line, near 2, on any
# machine. The two lower ones are about instructions, and the axis is logarithmic. One CPU, one
# format, and the answer to "are 16 bits faster?" is yes and no. For fast fp16 products an x86
# processor needs AVX512_FP16 or AMX with fp16; nearly all desktops have neither. Many Arm
# processors do have fp16 arithmetic.
#
# ## Measure: both worlds on one machine
# oneDNN, the library behind PyTorch's convolutions on a CPU, can be told to ignore instructions
# that the processor has; [chapter 6](06_quantization_in_practice.ipynb) did it for INT8. Below, a
# child process a *world* waits for its turn. In each round every world times fp32 and bf16, a
# training step and an inference, in a random order of worlds, so that whatever slows this computer
# for a while slows all of them. What is compared is the ratio within a round.

# %%
import contextlib
import json
import random
import subprocess
import sys
import threading

WORLD = """
import json, sys, time, torch
import torch.nn.functional as F
from course_utils import models
torch.set_num_threads(1)
width, batch = map(int, sys.argv[1:])
model = models.mini_resnet(width, seed=0).to(memory_format=torch.channels_last)
x = torch.randn(batch, 1, 28, 28).contiguous(memory_format=torch.channels_last)
y = torch.zeros(batch, dtype=torch.long)
def train(on):
    start = time.perf_counter()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    return time.perf_counter() - start
def infer(on):
    start = time.perf_counter()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
        model(x)
    return time.perf_counter() - start
[f(on) for f in (train, infer) for on in (False, True)]
for line in sys.stdin:
    train(False)  # caches are warm for all
    print(json.dumps([f(on) for f in (train, infer) for on in (False, True)]), flush=True)
"""


# %%
class World:
    """A child process under a cap on oneDNN's instruction sets; leaving the `with` ends it."""

    def __init__(self, cap, *sizes):
        self.cap, self.sizes = cap, [str(s) for s in sizes]

    def __enter__(self):
        cap = {"ONEDNN_MAX_CPU_ISA": self.cap} if self.cap else {}
        env = os.environ | {"OMP_NUM_THREADS": "1"} | cap
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORLD, *self.sizes], text=True, env=env, **pipes
        )
        return self

    def round(self, patience=120.0):
        """Seconds of training in fp32 and bf16, of inference in both; or None if the child has died
        or takes too long: some caps have no bf16 kernel.
        """
        alarm = threading.Timer(patience, self.process.kill)
        alarm.start()
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        finally:
            alarm.cancel()
        return json.loads(line) if line else None

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        with contextlib.suppress(OSError):
            self.process.stdin.close()


# %% tags=["nbval-ignore-output"]
def worlds_of(isa):
    """Caps that make a difference on a processor with these instruction sets: name → value for
    ONEDNN_MAX_CPU_ISA.
    """
    caps = {"as it is": None}
    if {"avx512_bf16", "amx_bf16"} & set(isa):
        caps["bf16 instruction hidden"] = "AVX512_CORE_VNNI"
    if "avx512_f" in isa:
        caps["AVX-512 hidden"] = "AVX2"
    elif "avx2" in isa:
        caps["AVX2 hidden"] = "SSE41"
    return caps


caps = worlds_of(machine.isa())
seen = {name: [] for name in caps}
with contextlib.ExitStack() as stack:
    worlds = {
        name: stack.enter_context(World(cap, *((8, 8) if SMOKE else (16, 32))))
        for name, cap in caps.items()
    }
    for _ in range(8 if SMOKE else 24):
        for name in random.sample(list(worlds), len(worlds)):
            if (pair := worlds[name].round()) is None:
                worlds.pop(name)  # the cap leaves no kernel: this world is left out
                print(f"{name}: no bf16 step under this cap")
            else:
                seen[name].append(pair)
seen = {name: np.array(pairs) for name, pairs in seen.items() if len(pairs) >= 8}

# %% tags=["nbval-ignore-output"]
factor = {
    f"{kind}, {name}": measure.median_interval(t[:, k] / t[:, k + 1])
    for k, kind in ((0, "training"), (2, "inference"))
    for name, t in seen.items()
}
plots.bars(
    factor,
    xlabel="speed-up of bf16 autocast over fp32 (x), one thread",
    reference=(1.0, "as fast as fp32"),
    title="bf16 training over fp32: "
    + ", ".join(f"{name} {factor[f'training, {name}'].value:.2f}x" for name in seen),
    alt="Speed-up of bf16 over fp32, a training step and an inference, one bar for each world.",
)
for name, t in seen.items():
    print(
        f"{name:24} training step: fp32 {1e3 * np.median(t[:, 0]):6.1f} ms, bf16"
        f" {1e3 * np.median(t[:, 1]):6.1f} ms"
    )
for name in list(seen)[1:]:
    for column, dtype in enumerate(("fp32", "bf16")):
        times = seen[name][:, column] / seen["as it is"][:, column]
        print(f"{name}: the {dtype} step takes {measure.median_interval(times)} times as long")
machine.can("bf16") or machine.skip("bf16", "the world in which bf16 has its own instruction")

# %% [markdown]
# Read bars *and* times. If your CPU has a bf16 instruction, *as it is* should lie right of the line
# and the world without it left: same program, one instruction less. If it has none, all bars lie on
# the left, and the last line above says which world your machine can't show. But compare your two
# worlds then: with the wide instructions hidden, the ratio is often *better*. Nothing became
# faster. The fp32 step became slower, and the bf16 step did not use those instructions in the first
# place. **A ratio can rise because its baseline fell**: always print both times.
#
# ## Measure: does bf16 learn as well?
# Speed aside, is anything lost? Three arms, five seeds each, the same batches: fp32, bf16 without a
# scaler, and real fp16 without a scaler. The network is a small MLP (*multilayer perceptron*:
# linear layers with a ReLU between them), so that 16-bit products without an instruction end in
# seconds.


# %% tags=["nbval-ignore-output"]
def train_amp(dtype, seed, steps=STEPS, lr=0.05, scaler=None, shrink=1.0):
    """Train an MLP under autocast; returns it and a record a step. `shrink` makes the loss small,
    and the gradient is blown up again before the update, so that all arms would learn alike if
    numbers had no end.
    """
    model, record = mlp(seed), []
    optimizer = torch.optim.SGD(model.parameters(), lr / shrink, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for x, y in batches(seed, steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = F.cross_entropy(model(x), y) * shrink
        (scaler.scaled(loss) if scaler else loss).backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        zeros, scale = float((grads == 0).float().mean()), scaler.scale if scaler else 1.0
        stepped = scaler.step(optimizer) if scaler else optimizer.step() or True
        schedule.step()
        record.append((zeros, scale, stepped))
    return model, record


# %% tags=["nbval-ignore-output"]
ARMS = {"fp32": None, "bf16": torch.bfloat16, "fp16, no scaler": torch.float16}
scores = {name: [accuracy(train_amp(dtype, s)[0]) for s in SEEDS] for name, dtype in ARMS.items()}
change = {
    name: measure.paired_t(np.subtract(scores[name], scores["fp32"]), "points")
    for name in list(ARMS)[1:]
}
plots.seeds(
    scores,
    ylabel="test accuracy (%)",
    title=(
        f"Against fp32: bf16 {change['bf16'].value:+.2f} points, fp16 without a scaler"
        f" {change['fp16, no scaler'].value:+.2f}"
    ),
    alt=(
        "Test accuracy of five seeds in fp32, bf16 and fp16 without a scaler; each seed's three"
        " points are joined."
    ),
)
display(claims.verdict("07.bf16_needs_no_scaler", change["bf16"]))
trained, few = models.baseline(), models.normalise(test_images[: 64 if SMOKE else 1000])
right = {}
for on in (False, True):
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
        right[on] = (trained(few).argmax(1) == test_labels[: len(few)]).numpy()
print(
    f"trained network, {len(few)} images, inference in bf16 less fp32:"
    f" {measure.paired_share(right[False], right[True])}"
)
loss_of_accuracy = change["fp16, no scaler"]
claims.verdict(
    "07.fp16_needs_a_scaler",
    measure.Interval(-loss_of_accuracy.value, -loss_of_accuracy.high, -loss_of_accuracy.low),
)

# %% [markdown]
# If the lines between the columns go up about as often as down, the format costs nothing that five
# seeds can see. Did fp16 do well without a scaler? Then it is because this network is shallow and
# its loss is of ordinary size: its gradients are in fp16's range. Deep networks, losses averaged
# over many pixels or tokens, and late training push them out, as the histogram showed.
#
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
#
# ## Measure: underflow kills a run, scaling rescues it
# **To show it in seconds, the loss is made small on purpose**: it is multiplied by $2^{-19}$, and
# the learning rate is $2^{19}$ times larger, so that in exact arithmetic nothing changes. A real
# run gets there by depth or by averaging. The arithmetic is real fp16, on your CPU.

# %% tags=["nbval-ignore-output"]
SHRINK = 2.0**-19
four = {
    "fp32": train_amp(None, 0, shrink=SHRINK),
    "bf16": train_amp(torch.bfloat16, 0, shrink=SHRINK),
    "fp16": train_amp(torch.float16, 0, shrink=SHRINK),
    "fp16 with our scaler": train_amp(
        torch.float16, 0, shrink=SHRINK, scaler=LossScaler(2.0**22, interval=max(2, STEPS // 20))
    ),
}
final = {name: accuracy(model) for name, (model, _) in four.items()}
zeros = {name: 100 * np.array([r[0] for r in record]) for name, (_, record) in four.items()}
plots.lines(
    range(1, STEPS + 1),
    zeros,
    xlabel="step",
    ylabel="gradients that are exactly zero (%)",
    title=(
        f"Accuracy: fp32 {final['fp32']:.0f}%, fp16 {final['fp16']:.0f}%, scaled"
        f" {final['fp16 with our scaler']:.0f}%"
    ),
    alt=(
        "Share of zero gradients over the steps: fp16 without scaling lies near the top, the three"
        " others far below."
    ),
)

# %% [markdown]
# The fp16 line without a scaler runs near the top: almost every gradient is zero, and the network
# learns little or nothing. The same fp16 with a scaler lies with fp32 and bf16. Some zeros are
# honest: a ReLU that is off passes none, in any format. And no error was raised anywhere: an
# underflow makes no noise. Count your zeros.

# %% tags=["nbval-ignore-output"]
record = four["fp16 with our scaler"][1]
log_scale = [math.log2(r[1]) for r in record]
skipped = [i + 1 for i, r in enumerate(record) if not r[2]]
figure, ax = plots.axes(
    "step",
    "scale, as a power of two",
    height=2.9,
    title=(
        f"The scale moves from 2^{log_scale[0]:.0f} to 2^{log_scale[-1]:.0f}; {len(skipped)} of"
        f" {STEPS} steps are skipped"
    ),
)
ax.step(range(1, STEPS + 1), log_scale, where="post", color=plots.COLOURS[0], label="scale")
ax.plot(
    skipped, [log_scale[i - 1] for i in skipped], "v", color=plots.COLOURS[1], label="skipped step"
)
ax.legend()
plots.show(
    figure,
    "The loss scale over the steps: it climbs in stairs, and falls by one where a step was"
    " skipped.",
)

# %% [markdown]
# The scale climbs in stairs until an infinity pushes it back, and then goes on probing: up, skip,
# down. The width of a stair is the growth interval, short here so that you see the edge within one
# short run; PyTorch's default of 2,000 steps is meant for long ones.
#
# ## Measure: does it halve the memory?
# What autocast can halve is what the forward pass keeps for the backward pass. What it adds are
# 16-bit copies of the weights.


# %% tags=["nbval-ignore-output"]
def one_step(model, x, y, on):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
        loss = F.cross_entropy(model(x), y)
    loss.backward()


def kept_bytes(model, x, y, on):
    """What autograd keeps between forward and backward, each storage once; the fp32 weights are
    there anyway.
    """
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        one_step(model, x, y, on)
    return sum(kept.values())


def peak_bytes(model, x, y, on):
    model.zero_grad(set_to_none=True)  # gradients are part of the step
    return measure.peak_memory(lambda: one_step(model, x, y, on))


kept, peak = (
    {on: f(big, x, y, on) / MIB for on in (False, True)} for f in (kept_bytes, peak_bytes)
)
for name, mib in {"kept for backward": kept, "peak of the step": peak}.items():
    print(
        f"{name:18} fp32 {mib[False]:5.1f} MiB, autocast {mib[True]:5.1f} MiB:"
        f" {mib[False] / mib[True]:.2f} times less"
    )
exercises.reveal("07.memory", peak[False] / peak[True], "times less")
claims.verdict("07.amp_halves_memory", peak[False] / peak[True])

# %% [markdown]
# Two lines, two answers. What is *kept* comes close to a half: that is the arithmetic of the claim.
# The *peak* also holds gradients, which stay fp32, copies on their way from one format to the
# other, and the scratch memory of kernels. A convolution without a bf16 instruction unfolds its
# input into a large table first. The claim is about the peak, because that is what runs out.
#
# When does autocast even need *more*? Take layers with few rows and many weights.


# %% tags=["nbval-ignore-output"]
def chain(width, depth=6):
    layers = [(nn.Linear(width, width), nn.ReLU()) for _ in range(depth)]
    return nn.Sequential(*[layer for pair in layers for layer in pair])


WIDE = 32 if SMOKE else 128
rows_in_batch = [WIDE // 16, WIDE // 4, WIDE // 2, WIDE, 2 * WIDE, 4 * WIDE, 8 * WIDE]
layers = chain(WIDE)
change = []
for count in rows_in_batch:
    inputs, targets = torch.randn(count, WIDE), torch.zeros(count, dtype=torch.long)
    with_it, without = (peak_bytes(layers, inputs, targets, on) for on in (True, False))
    change.append(with_it / without)
raised = [c for c, r in zip(rows_in_batch, change, strict=True) if r > 1.005]
plots.lines(
    rows_in_batch,
    {"six layers": change},
    xlabel="rows in a batch",
    ylabel="peak, autocast ÷ fp32",
    logx=True,
    reference=(1.0, "no change"),
    title=(
        f"Autocast needs more up to {max(raised)} rows"
        if raised
        else "Autocast needs more at none of these batches"
    )
    + f", and {change[-1]:.2f} of fp32's bytes at {rows_in_batch[-1]}",
    alt=(
        "Peak memory with autocast divided by that in fp32, against the batch: above one at the"
        " left, below at the right."
    ),
)

# %% [markdown]
# At the left autocast *raises* memory. Write $P$ for the bytes of the parameters and $A$ for those
# of the activations that are kept, in fp32. Autocast keeps $A/2$, and adds the weight cache, $P/2$.
# It saves only if $A > P$. For a square layer of width $w$ and a batch of $B$ rows, $P$ is $4w^2$
# bytes and $A$ is $4Bw$: **the break-even lies at $B = w$**, here at `128` rows in `fast`.
# Convolutions share their few weights over many pixels, so for them $A$ is much larger than $P$,
# and autocast saves. Near the break-even the line may lie flat: the peak is then another moment of
# the step, with fp32 gradients in both arms.
#
# ## The tool of the field: torch.amp
# `torch.autocast(device, dtype)` and `torch.amp.GradScaler(device)`. This is the whole recipe with
# gradient clipping, in the right order. Yours and torch's must leave the same weights, bit for bit,
# after real fp16 training.


# %%
def torch_recipe(model, steps, max_norm=1.0):
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=4)
    for x, y in batches(7, steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()  # outside the with block
        scaler.unscale_(optimizer)  # from here on gradients are true
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        scaler.step(optimizer)  # skips when an infinity was seen
        scaler.update()
    return [p.detach() for p in model.parameters()]


# %%
class Clipped(torch.optim.SGD):
    """SGD that clips before it updates: our scaler calls step() with gradients that are true
    again.
    """

    def step(self, closure=None):
        nn.utils.clip_grad_norm_([p for g in self.param_groups for p in g["params"]], 1.0)
        return super().step(closure)


def our_recipe(model, steps):
    optimizer = Clipped(model.parameters(), 0.05, momentum=0.9)
    scaler, skipped = LossScaler(2.0**20, interval=4), 0
    for x, y in batches(7, steps):
        optimizer.zero_grad()
        with MyAutocast(torch.float16):
            loss = F.cross_entropy(model(x), y)
        scaler.scaled(loss).backward()
        skipped += not scaler.step(optimizer)
    return [p.detach() for p in model.parameters()], skipped


ours, skipped = our_recipe(mlp(3), 12)
for a, b in zip(ours, torch_recipe(mlp(3), 12), strict=True):
    torch.testing.assert_close(a, b, rtol=0, atol=0)
print("weights equal bit for bit, with skipped steps among them:", skipped > 0)

# %% [markdown]
# **Apex.** Many tutorials begin with `from apex import amp` and `amp.initialize(model, optimizer,
# opt_level="O1")`. Apex was NVIDIA's extension library, which brought mixed precision to PyTorch in
# 2018. `O0` was fp32; `O1` patched torch's functions with lists, as autocast does now; `O2` cast
# the whole model to fp16 and kept master weights in the optimizer; `O3` was fp16 everywhere. Its
# `amp` moved into PyTorch 1.6 in 2020 as `torch.cuda.amp`, and lives on as `torch.amp`; [its
# maintainers](https://github.com/NVIDIA/apex/issues/1214) call the old one deprecated and send you
# to PyTorch's. Its fused optimizers came as `torch.optim.AdamW(fused=True)`, its synchronised
# BatchNorm as `nn.SyncBatchNorm`. And mind the name: `pip install apex` installs another project, a
# web toolkit.
#
# ## Measure: Tensor Cores, TF32, cuDNN
# NVIDIA's matrix units, the *Tensor Cores*, multiply small matrices of 16-bit numbers and add in
# fp32. They came with Volta (2017, compute capability 7.0); bf16 and TF32, which rounds fp32 inputs
# to 10 mantissa bits, came with Ampere (2020). The settings that matter:

# %% tags=["nbval-ignore-output"]
if machine.can("gpu"):
    SIDE = 1024 if SMOKE else 4096

    def on_gpu(dtype, precision="ieee", side=SIDE):
        left, right = (torch.randn(side, side, device="cuda").to(dtype) for _ in range(2))

        def call():
            torch.backends.cuda.matmul.fp32_precision = precision  # "tf32" or "ieee"
            return left @ right

        return measure.Arm(call, f"{dtype} {precision}, {side}")

    plain = on_gpu(torch.float32)
    cores = measure.compare(plain, on_gpu(torch.float16), seconds=SECONDS)
    for arm in (on_gpu(torch.float32, "tf32"), on_gpu(torch.bfloat16)):
        print(measure.compare(plain, arm, seconds=SECONDS))
    print(
        measure.compare(
            on_gpu(torch.float16), on_gpu(torch.float16, side=SIDE - 1), seconds=SECONDS
        )
    )
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    print(f"compute capability {torch.cuda.get_device_capability()}: fp16 {cores}")
else:
    print(machine.skip("gpu", "Tensor Cores and TF32"))

# %% tags=["nbval-ignore-output"]
if machine.can("gpu"):
    conv = nn.Conv2d(64, 64, 3, padding=1).cuda().half().to(memory_format=torch.channels_last)
    photo = (
        torch.randn(32, 64, 56, 56, device="cuda")
        .half()
        .contiguous(memory_format=torch.channels_last)
    )

    def with_benchmark(on):
        def call():
            torch.backends.cudnn.benchmark = on  # try all algorithms once for each shape
            with torch.inference_mode():
                return conv(photo)

        return measure.Arm(call, f"cudnn.benchmark={on}")

    print(measure.compare(with_benchmark(False), with_benchmark(True), seconds=SECONDS))
    torch.backends.cudnn.benchmark = False
    deep, photos = models.mini_resnet(64).cuda(), torch.randn(512, 1, 28, 28, device="cuda")
    targets = torch.zeros(512, dtype=torch.long, device="cuda")

    def gpu_step(on):
        with torch.autocast("cuda", dtype=torch.float16, enabled=on):
            loss = F.cross_entropy(deep(photos), targets)
        loss.backward()

    arms = [
        measure.Arm(lambda on=on: gpu_step(on), f"CUDA step, autocast={on}") for on in (False, True)
    ]
    print(measure.compare(*arms, seconds=SECONDS))
else:
    print(machine.skip("gpu", "cudnn.benchmark and an AMP step on CUDA"))
print("torch.backends.cudnn.enabled, before anybody sets it:", torch.backends.cudnn.enabled)

# %% [markdown]
# `cudnn.enabled = True` changes nothing: it is the default. `cudnn.benchmark = True` does
# something: for each new shape cuDNN times its algorithms once and keeps the best, which pays where
# shapes repeat and costs where they do not. Sides that are multiples of 8 (16-bit) keep the Tensor
# Cores fed. TF32 is off by default for matrix products and on for cuDNN's convolutions: an "fp32"
# network on a new GPU is already partly in mixed precision.
#
# ## If yours shows no gain
# | You see | Because | Look at |
# |---|---|---|
# | bf16 is slower on your CPU | no bf16 instruction: products fall back to slow code | the machine card; the bars of *Both worlds* |
# | bf16 has its instruction and gains little | small layers: casting costs as much as it saves | a larger width or batch |
# | fp16 is far slower than bf16 | hardly any CPU has fp16 products | use bf16 on CPUs |
# | a depthwise network gains nothing | it waits for memory and for many small calls, not for products | chapter 10 |
# | channels_last is missing | layout conversions eat the gain | `.to(memory_format=torch.channels_last)` for model and input |
# | the first step is much slower | kernels are prepared once a shape | measure after a warm-up |
# | memory grows | small batch, large layers: the weight cache | $A$ against $P$, above |
# | a GPU shows no gain | too small to fill it, or sides that are no multiples of 8 | the Tensor Core cell, a larger batch |
# | an old GPU (before Volta) | no Tensor Cores: fp16 saves bytes only | memory, not time |
#
# ## Myth: `torch.cuda.amp` works everywhere
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
# ## Myth: `.half()` is mixed precision
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
# square of a small gradient is zero, and so is $\epsilon = 10^{-8}$: zero divided by zero. There is
# no master weight, no fp32 loss, no scaler: nothing is mixed.
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


for order in ("clip", "unscale, clip"):
    print(f"{order:14}: the update has length {first_update(order):.6f}")

# %% [markdown]
# Clipped at length 1 and *then* divided by 1024: nothing raises, the loss falls, very slowly, and
# the speed of learning depends on a number that changes by itself. `scaler.unscale_(optimizer)`
# first; the scaler remembers it and won't divide again.
#
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
# 8 minutes. Let the class place 1, 1.5, 2, 3 and 4 of a format with one mantissa bit on a line,
# then ask what lies between 0 and the first of them. Whoever writes the machine epsilon has the
# right answer for exactly one octave.

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
# 20 minutes. Two networks that are trained together (a generator and its critic) make the two
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
# First fp16, where no scaler can help: an infinity in the *forward* pass. Features that are squared
# reach 65,504 soon. The scaler sees infinite gradients, halves its scale, and will go on halving
# for ever.

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
# Then bf16, which has the range and lacks the digits. Positions in a text are counted; how many of
# a thousand are still different?

# %% tags=["nbval-ignore-output"]
counts = [64, 128, 256, 512, 1024, 2048, 4096]
different = {
    name: [len(torch.arange(c).to(TORCH[name]).unique()) for c in counts]
    for name in ("bf16", "fp16", "fp32")
}
plots.lines(
    counts,
    different,
    xlabel="positions",
    ylabel="different numbers left",
    logx=True,
    logy=True,
    title=(
        f"Of 4096 positions bf16 tells {different['bf16'][-1]} apart, fp16 {different['fp16'][-1]}"
    ),
    alt=(
        "Different numbers left against positions counted: bf16 bends at 256, fp16 at 2048, fp32"
        " stays on the diagonal."
    ),
)

# %% [markdown]
# From 256 on, bf16 knows every second integer, from 512 on every fourth. So position indices,
# running means, losses summed over an epoch and learning-rate counters never belong in 16 bits,
# however well the network itself does there. fp32 draws the diagonal.
#
# ## Exit quiz
# **1. A gradient of $2^{-30}$ appears in training. It becomes zero in**
# <details><summary>fp16</summary>Right: its smallest number is $2^{-24}$.</details>
# <details><summary>bf16</summary>It has the exponent of fp32.</details>
# <details><summary>both</summary>bf16 reaches down to below $2^{-126}$.</details>
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
# **5. Under autocast memory went up. The first thing to compare is**
# <details><summary>the bytes of activations and of parameters</summary>Right: $A/2$ is saved, $P/2$
# is added.</details>
# <details><summary>the learning rate</summary>It costs no bytes.</details>
# <details><summary>the size of the mantissa</summary>All 16-bit formats have two bytes.</details>
#
# **Key points** · fp16 lacks range, bf16 lacks digits · 16-bit products, 32-bit sums, 32-bit
# weights · a loss scaler probes for the edge; look at the loss before you blame the scale · half
# the bytes everywhere, faster products only with the instruction · autocast saves when activations
# outweigh weights · unscale, clip, step.
#
# **Sources** · P. Micikevicius et al., *Mixed Precision Training*, 2018 · D. Kalamkar et al., *A
# Study of BFLOAT16 for Deep Learning Training*, 2019 · P. Micikevicius et al., *FP8 Formats for
# Deep Learning*, 2022 · PyTorch's documentation of
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
