# %% [markdown]
# # 01 · Measurement
#
# **Is it faster, or did it only look faster?**
#
# After this chapter you can: *time* a network so that the number survives a second run · *give* a
# speed-up with its uncertainty · *say* "no difference" and "inconclusive" where they are due ·
# *place* a layer on your machine's roofline · *predict* how much the whole gains when a part gets
# faster.
#
# 85 minutes · before this: Python, and one network trained · runs on any CPU

# %% tags=["parameters"]
import os

PROFILE = os.environ.get("COURSE_PROFILE", "fast")

# %% tags=["nbval-ignore-output"]
import math
import time

import numpy as np
import torch
from torch import nn

from course_utils import claims, exercises, machine, measure, models, plots

SECONDS = {"smoke": 0.15, "fast": 2.0, "full": 8.0}[PROFILE]  # for one comparison
CALLS = {"smoke": 60, "fast": 400, "full": 2000}[PROFILE]
machine.card()

# %% [markdown]
# The card above is part of every result in this course. The same code on another processor may give
# another verdict, and both are right. The row *Instruction sets* will decide many of them.

# %% [markdown]
# ## Predict
# Below, you time one inference of a small network. Then you time it again: the same network, the
# same input, the same second. By what factor can the slower of the two differ from the faster one?
# Write your guess as a number such as 1.05.

# %%
my_guess = ...
exercises.predict("01.twice", my_guess)

# %% [markdown]
# ## From scratch: one call, and then another
# `perf_counter` is the right clock: it never runs backwards and resolves well below a microsecond.
# The network is the one most chapters use; 8 images go in.

# %%
model = models.mini_resnet(32, seed=0).eval()
x = torch.randn(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))  # (B, C, H, W)


@torch.inference_mode()
def inference():
    return model(x)


def milliseconds(call):
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


# %% tags=["nbval-ignore-output"]
first_calls = [milliseconds(inference) for _ in range(20)]
warm = float(np.median(first_calls[5:]))
plots.lines(
    range(1, 21),
    {"one call": first_calls},
    xlabel="call number",
    ylabel="milliseconds",
    logy=True,
    title=f"The first call takes {first_calls[0] / warm:.1f} times as long as a warm one",
    alt=(
        "Time of the first twenty calls: the first one is the highest, the others lie close"
        " together."
    ),
)

# %% [markdown]
# The first call pays for what the others find ready: memory is asked for, and the library chooses
# and prepares a *kernel*, the compiled routine that computes one operation, for these shapes. A
# user who starts your program meets that cost once. It says nothing about the calls after it, so a
# comparison leaves it out, and a report on start-up time leaves it in.
#
# Now the warm calls.

# %% tags=["nbval-ignore-output"]
warm_calls = np.array([milliseconds(inference) for _ in range(CALLS)])
pairs = (
    warm_calls[1::2] / warm_calls[: len(warm_calls) // 2 * 2 : 2]
)  # each call against the one before it
factor = np.maximum(pairs, 1 / pairs)
exercises.reveal("01.twice", float(factor.max()), "times")

# %% [markdown]
# That was the worst pair. How common are bad ones? Each pair of neighbouring calls is a speed test
# that somebody might have published: "I ran the old one, then the new one". Here the old and the
# new one are the same.

# %% tags=["nbval-ignore-output"]
outside = float(np.mean((pairs < 0.97) | (pairs > 1.03)))
figure, ax = plots.axes(
    "second call's time / first call's time",
    "pairs",
    title=f"{outside:.0%} of single comparisons of a network with itself are off by over 3%",
)
ax.hist(np.clip(pairs, 0.7, 1.4), bins=np.linspace(0.7, 1.4, 57), color=plots.COLOURS[0])
ax.axvspan(0.97, 1.03, color="0.85", zorder=0, label="the same, within ±3%")
ax.legend()
plots.show(
    figure,
    "Histogram of time ratios of neighbouring calls of one network, with the band of ±3% in grey.",
)

# %% [markdown]
# The grey band is where every bar should stand, because nothing changed between the two calls. What
# lies outside it would have been reported as a gain or a loss. The bars at the edges collect
# everything beyond.
#
# Three remedies, in the order in which they help:
# 1. **Repeat**, and take the median. One slow call in ten moves the mean; it leaves the median
#    where it is.
# 2. **Interleave.** Time A, B, A, B …, not all A and then all B. Whatever slows the machine for a
#    second slows both.
# 3. **Pair.** Divide within a round, then take the median of the ratios. What both suffered
#    cancels.


# %%
def ratios(baseline, candidate, rounds):
    """One speed-up a round: above 1, the candidate is faster."""
    baseline(), candidate()  # warm up
    found = []
    for _ in range(rounds):
        found.append(milliseconds(baseline) / milliseconds(candidate))
    return np.array(found)


# %% tags=["nbval-ignore-output"]
same = ratios(inference, inference, CALLS // 4)
print(f"median of {len(same)} ratios: {np.median(same):.3f}")
print(f"smallest and largest single ratio: {same.min():.2f} and {same.max():.2f}")

# %% [markdown]
# The median is far closer to 1 than the extremes are. But how close is it *bound* to be? Two runs
# give two medians, and a result without its uncertainty can't be told from noise. So cut the series
# into twelve blocks, take each block's median, and look at where these lie.


# %%
def interval(series, blocks=12):
    """Where the true median lies, with 95% confidence or better: the second smallest to the second
    largest block median.
    """
    medians = sorted(np.median(block) for block in np.array_split(series, blocks))
    return medians[1], medians[-2]


# %% tags=["nbval-ignore-output"]
low, high = interval(same)
print(f"speed-up {np.median(same):.3f}, interval [{low:.3f}, {high:.3f}]")

# %% [markdown]
# Why does this work? If the true median were above the second largest of the twelve, then at least
# eleven blocks would have to lie below it. Each block lies below the true median with probability
# one half, like a coin. Eleven or more heads in twelve tosses, $(12 + 1) / 2^{12}$, is rare, and so
# is the other side. No bell curve was assumed.
#
# Why blocks, and not single rounds? Because neighbours are alike: a core that is busy now is busy a
# moment later. Ten calls in the same bad moment are one piece of evidence, not ten. A *bootstrap*
# draws the rounds again and again, with replacement, and looks at how the median varies. It takes
# the ten for ten, and its intervals come out too narrow. You write one in exercise B, and catch it
# at that in exercise C.

# %% [markdown]
# ## Measure: the course's instrument
# `measure.compare` does these three things and takes the two *arms*, the things that it compares,
# in random order. It also estimates how long the noise remembers: rounds that resemble their
# neighbours count as fewer, and the interval grows. What it says holds *within this process*.
#
# The next process may disagree. Where a network's buffers lie, what the memory allocator kept,
# which moment the machine had: these are drawn once, when a process starts, and all of its rounds
# share them (Mytkowicz et al. 2009; Kalibera and Jones 2013). So `measure.across` copies both arms
# into twelve fresh processes, takes one ratio from each, and gives the interval over those. A
# verdict that rests on a comparison says from which of the two it comes. The four answers are the
# vocabulary of both:
#
# | answer | when |
# |---|---|
# | *faster* | the whole interval lies above `1.03` |
# | *slower* | all of it lies below `1 / 1.03` |
# | *no difference* | all of it lies between the two |
# | *inconclusive* | none of these: measure longer, or stop claiming |
#
# A difference below `3%` counts as none, in both directions, so a better measurement can settle
# what was open but never turn one answer into another.

# %% tags=["nbval-ignore-output"]
eight, four = measure.arm(model, x, "8 images"), measure.arm(model, x[:4], "4 images")
look = measure.compare(eight, eight, seconds=SECONDS)
again = measure.across(eight, eight, seconds=SECONDS)
smaller_batch = measure.across(eight, four, seconds=SECONDS)
print(look, again, smaller_batch, sep="\n")
plots.intervals(
    {
        "itself, this process": look.interval,
        "itself, fresh processes": again.interval,
        "8 images, 4 images": smaller_batch.interval,
    },
    xlabel="speed-up (x)",
    title=f"The same network: {again.verdict}. Half the images: {smaller_batch.ratio:.2f}x",
    alt=(
        "Three intervals: the network against itself around 1, inside one process and over twelve,"
        " and eight against four images to the right of them."
    ),
)

# %% [markdown]
# The first two intervals should contain 1. The second one is usually the wider: it also holds what
# differs from process to process. The third answers a question that is worth asking: does half of
# the images take half of the time? If it lies below 2, it does not. Some of the time does not
# depend on the batch.
#
# How do you know that the instrument itself is right on your machine? Run `course selftest` in a
# terminal when nothing else runs. In two minutes it compares two equal arms, a known ratio, and the
# intervals of ten programs started one after the other, inside one process and over several. What
# it found stands on the machine card of every chapter from then on.
#
# ## Measure: four ways to time the wrong thing
# **Threads.** `torch.utils.benchmark.Timer` uses *one* thread unless you say otherwise; your
# program uses all of them.

# %% tags=["nbval-ignore-output"]
from torch.utils import benchmark

big = torch.randn(64, 1, 28, 28)
per_threads = {}
for threads in sorted({1, machine.usable_cores()}):
    timer = benchmark.Timer("model(x)", globals={"model": model, "x": big}, num_threads=threads)
    per_threads[threads] = timer.blocked_autorange(min_run_time=SECONDS / 4).median
print({f"{threads} thread(s)": measure.pretty(seconds) for threads, seconds in per_threads.items()})
print("Timer without num_threads:", benchmark.Timer("0").timeit(1).num_threads, "thread")

# %% [markdown]
# Two people who compare "my time" with "your time" without saying the threads compare their
# settings. A comparison in this course states them, and refuses two arms that differ in them. Where
# it knows them, it also states the batch, the type of the numbers (*dtype*) and their order in
# memory (*memory format*, [chapter 2](02_training_recipe.ipynb)).
#
# **Dead code.** The work was done before the clock started.

# %% tags=["nbval-ignore-output"]
result = inference()
with exercises.fails(measure.MeasurementError):
    measure.compare(inference, lambda: result)

# %% [markdown]
# **Lazy and asynchronous work.** The call returns a promise at once, and the work happens later, or
# never.

# %%
from concurrent.futures import ThreadPoolExecutor

with ThreadPoolExecutor(1) as pool:
    with exercises.fails(measure.MeasurementError):
        measure.compare(inference, lambda: pool.submit(inference))
    with exercises.fails(measure.MeasurementError):
        measure.compare(inference, lambda: (model(image) for image in x.split(1)))

# %% [markdown]
# A GPU is asynchronous throughout: `model(x)` returns as soon as the work is queued. The clock must
# wait for the device, which `torch.utils.benchmark` and `measure.compare` do. If you have a GPU,
# the next cell shows the trap.

# %% tags=["nbval-ignore-output"]
if machine.can("gpu"):
    a = torch.randn(4096, 4096, device="cuda")
    a @ a
    queued = milliseconds(lambda: a @ a)
    finished = milliseconds(lambda: (a @ a, torch.cuda.synchronize()))
    print(f"queued after {queued:.3f} ms, finished after {finished:.3f} ms")
else:
    print(machine.skip("gpu", "asynchronous timing on a GPU"))

# %% [markdown]
# **The mean.** Imagine a small service. Nineteen requests of twenty carry one image, the twentieth
# carries sixteen. Somebody times a thousand requests in one loop and divides by a thousand.

# %% tags=["nbval-ignore-output"]
one, sixteen = torch.randn(1, 1, 28, 28), torch.randn(16, 1, 28, 28)
sizes = np.random.default_rng(0).random(12 * max(CALLS // 4, 40)) < 1 / 20
with torch.inference_mode():
    waits = np.array([milliseconds(lambda: model(sixteen if many else one)) for many in sizes])
blocks = [np.percentile(part, 99) / part.mean() for part in np.array_split(waits, 12)]
tail = measure.median_interval(blocks)
shares = np.linspace(0, 100, 400)
plots.lines(
    shares,
    {"single requests": np.percentile(waits, shares)},
    xlabel="share of requests answered within (percent)",
    ylabel="milliseconds",
    reference=(float(waits.mean()), "mean"),
    title=f"One user in a hundred waits {tail.value:.1f} times the mean",
    alt=(
        "Waiting time against the share of requests: flat, then a steep rise at the right; the mean"
        " lies in between."
    ),
)

# %% tags=["nbval-ignore-output"]
claims.verdict("01.mean_hides_the_tail", tail)

# %% [markdown]
# The curve has two floors, one for each kind of request, and the mean lies where almost nobody
# waits. Write p50 for what half of the requests stay under and p99 for what all but one in a
# hundred stay under. A promise to users is made with p99, a bill for machines with the mean.

# %% [markdown]
# ## Measure: latency and throughput are two questions
# *Latency* is how long one answer takes. *Throughput* is how many images a second come out. A
# bigger batch trades one for the other.

# %% tags=["nbval-ignore-output"]
batches = [1, 2, 4, 8, 16, 32, 64]
speed, wait = [], []
for size in batches:
    images = torch.randn(size, 1, 28, 28)
    took = measure.latency(measure.arm(model, images), seconds=SECONDS / 6).median
    wait.append(1e3 * took.value)
    speed.append(measure.Interval(size / took.value, size / took.high, size / took.low))
gain = speed[-1].value / speed[0].value
plots.lines(
    wait,
    {"batch 1 (left) to 64 (right)": speed},
    xlabel="latency of one batch (ms)",
    ylabel="images a second",
    logx=True,
    title=(
        f"Batch 64 gives {gain:.1f} times the throughput at {wait[-1] / wait[0]:.0f} times the"
        " latency"
    ),
    alt="Throughput against latency for batches from 1 to 64: steep at first, then flat.",
)

# %% [markdown]
# Along the steep stretch a larger batch is nearly free: the fixed cost of a call is shared by more
# images. Where the curve is flat or falls, more images only mean more waiting. A flat piece on the
# far left, if yours has one, is a library that changes its kernel between one image and two.
# Chapter 13 builds a server that sits at the bend on purpose.

# %% [markdown]
# ## Explain: what a network costs
# Time is what you feel. Four other numbers explain it: the *multiply–accumulates* (MACs, one
# multiplication and one addition each), the *parameters*, the *bytes* of the saved file, and the
# *peak memory* while it runs. One convolution shows how MACs are counted. Its output has $C_{out}$
# channels of $H$ by $W$ numbers. Each of these $C_{out}·H·W$ outputs needs $C_{in}·k·k$ MACs: one
# for each of the $k$ by $k$ weights over each of the $C_{in}$ input channels.

# %%
conv = nn.Conv2d(32, 64, 3, padding=1, bias=False)
by_hand = 64 * 28 * 28 * (32 * 3 * 3)
by_tool = measure.macs(conv, torch.zeros(1, 32, 28, 28))
by_hand, by_tool

# %% tags=["nbval-ignore-output"]
from torchvision.models import mobilenet_v3_small, resnet18

image = torch.randn(1, 3, 224, 224)
networks = {
    "mini-ResNet 32": (model, x[:1]),
    "ResNet-18": (resnet18().eval(), image),
    "MobileNetV3-small": (mobilenet_v3_small().eval(), image),
}
print(f"{'':18} {'million MACs':>12} {'parameters':>11} {'file MB':>8} {'peak MB':>8} {'p50':>8}")
for name, (net, example) in networks.items():
    call = measure.arm(net, example)
    took = measure.latency(call, seconds=SECONDS / 2)
    print(
        f"{name:18} {measure.macs(net, example) / 1e6:12.1f} {measure.parameters(net):11,}", end=""
    )
    print(
        f" {measure.saved_bytes(net) / 1e6:8.2f} {measure.peak_memory(call.call) / 1e6:8.1f}"
        f" {measure.pretty(took.p50):>8}"
    )

# %% [markdown]
# Compare the last two rows. MobileNetV3-small needs a small fraction of ResNet-18's MACs. Divide
# the MACs, then divide the times: the second ratio is much smaller. A floating-point operation
# (FLOP) is an addition or a multiplication, so a MAC is two. The claim behind "fewer FLOPs, so it
# is faster" deserves a clean test: one layer, replaced by the one MobileNets are made of. A 3×3
# convolution is split into a *depthwise* one, which looks at each channel alone, and a 1×1
# *pointwise* one, which mixes channels.

# %% tags=["nbval-ignore-output"]
channels = 128
standard = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
separable = nn.Sequential(
    nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
    nn.Conv2d(channels, channels, 1, bias=False),
)
features = torch.randn(8, channels, 28, 28)
mac_ratio = measure.macs(standard, features) / measure.macs(separable, features)
split = measure.across(
    measure.arm(standard, features, "3×3"),
    measure.arm(separable, features, "separable"),
    seconds=SECONDS,
)
share_kept = measure.derive(lambda s: s / mac_ratio, split.interval)
print(f"{mac_ratio:.1f} times fewer MACs;", split)
claims.verdict("01.fewer_macs_proportionally_faster", share_kept)

# %% [markdown]
# To see why, ask what a layer does for each byte it moves. Call the operations a byte its
# *arithmetic intensity*. A machine can compute only so fast (in GFLOP/s, billions of operations a
# second), and it can fetch bytes only so fast (in GB/s). At low intensity the arithmetic units wait
# for memory. Both limits drawn in one figure make the *roofline* (Williams, Waterman and Patterson
# 2009): a slope, where memory is the limit, and a flat roof, where arithmetic is. They meet at the
# *ridge*.

# %% tags=["nbval-ignore-output"]
roof = measure.roofline()
print(f"{roof.gflops:.0f} GFLOP/s, {roof.gbytes:.1f} GB/s, {roof.threads} thread(s)")
print(f"below {roof.ridge:.1f} operations a byte, memory is the limit")


# %%
def operations_a_byte(layer, x):
    """Arithmetic intensity of a layer in fp32, if input, weights and output each move once."""
    y = layer(x)
    moved = 4 * (x.numel() + y.numel() + sum(p.numel() for p in layer.parameters()))
    operations = (
        2 * measure.macs(layer, x) or y.numel()
    )  # ReLU: one operation a number, which MAC counters leave out
    return operations / moved, operations


# %% tags=["nbval-ignore-output"]
layers = {
    "3×3 convolution": (standard, features),
    "depthwise 3×3": (separable[0], features),
    "pointwise 1×1": (separable[1], features),
    "ReLU": (nn.ReLU(), torch.randn(32, channels, 56, 56)),
    "linear, batch 1": (nn.Linear(2048, 2048), torch.randn(1, 2048)),
    "linear, batch 256": (nn.Linear(2048, 2048), torch.randn(256, 2048)),
}
placed = {}
for name, (layer, example) in layers.items():
    intensity, operations = operations_a_byte(layer, example)
    seconds = measure.latency(measure.arm(layer, example), seconds=SECONDS / 8).p50
    placed[name] = (intensity, operations / seconds / 1e9)

# %% tags=["nbval-ignore-output"]
figure, ax = plots.axes(
    "operations a byte",
    "GFLOP/s",
    title=f"Below {roof.ridge:.0f} operations a byte, memory decides",
    height=4.2,
)
line = np.geomspace(0.05, 400, 200)
ax.loglog(line, [roof.bound(i) for i in line], color="0.3", label="roofline, measured here")
for i, (name, (intensity, speed_here)) in enumerate(placed.items()):
    ax.plot(
        intensity, speed_here, plots.MARKERS[i], color=plots.COLOURS[i], label=name, markersize=8
    )
ax.legend(fontsize=8, loc="lower right")
plots.show(
    figure,
    "Roofline of this machine with six layers: ReLU, depthwise and batch-1 linear at the left under"
    " the slope.",
)

# %% [markdown]
# Read it from left to right. ReLU does one operation for eight bytes: no arithmetic trick can make
# it fast, only moving fewer bytes (chapter 10). The linear layer at batch 1 reads every weight for
# a single use; at batch 256 the same weights serve 256 rows and the point climbs. The depthwise
# convolution does nine MACs for each number it reads, so it sits low. Its few MACs are slow MACs. A
# point above the slope is no error: its data came from a cache, not from memory.

# %% [markdown]
# ## Explain: Amdahl's law
# A step of your program gets $S$ times faster, but it is only a share $p$ of the time. The rest
# stays: $T_{new} = (1 - p)\,T + p\,T / S$, so the whole gets faster by $1 / ((1 - p) + p / S)$
# (Amdahl 1967). A textbook chapter in circulation prints the opposite, $T_{new} = T · S$. Test
# both: two steps in a row, the second replaced by a faster one.

# %%
step_one = models.mini_resnet(24, seed=1).eval()  # stays
step_two, faster_two = models.mini_resnet(48, seed=2).eval(), models.mini_resnet(12, seed=3).eval()
batch = torch.randn(16, 1, 28, 28)


@torch.inference_mode()
def before():
    return step_one(batch), step_two(batch)


@torch.inference_mode()
def after():
    return step_one(batch), faster_two(batch)


# %% tags=["nbval-ignore-output"]
part = measure.across(
    measure.arm(step_two, batch, "old part"),
    measure.arm(faster_two, batch, "new part"),
    seconds=SECONDS,
)
alone = measure.across(
    measure.Arm(before, "both"), measure.arm(step_two, batch, "old part"), seconds=SECONDS
)
whole = measure.across(before, after, seconds=SECONDS)
p = measure.derive(lambda a: 1 / a, alone.interval)  # the part's share of the whole
predicted = measure.derive(lambda p, s: 1 / ((1 - p) + p / s), p, part.interval, unit="x")
print(f"S = {part.interval}, p = {p}: Amdahl predicts {predicted}, measured {whole.interval}")

# %% tags=["nbval-ignore-output"]
by_formula = measure.derive(lambda w, s: 1 / (w * s), whole.interval, part.interval)
claims.verdict("01.acceleration_multiplies_time", by_formula)

# %% tags=["nbval-ignore-output"]
claims.verdict("01.amdahl", measure.derive(lambda w, p: w / p, whole.interval, predicted))

# %% tags=["nbval-ignore-output"]
speedups = [1, 2, 4, 8, 16, 32]
curves = {
    f"p = {share:.2f}": [1 / ((1 - share) + share / s) for s in speedups]
    for share in (0.5, p.value, 0.95)
}
plots.lines(
    speedups,
    curves,
    xlabel="speed-up of the part, S",
    ylabel="speed-up of the whole (x)",
    title=f"With p = {p.value:.2f}, no S makes the whole {1 / (1 - p.value):.1f} times faster",
    alt="Amdahl's law for three shares: each curve flattens towards one over one minus p.",
)

# %% [markdown]
# The middle curve is yours. It flattens: the part that stayed is the limit. Before you make
# something fast, ask what share of the time it has. A profiler answers that.

# %% [markdown]
# ## The tool of the field: a profiler finds the slow operator
# `torch.profiler` records every operator with its time and input shapes. MobileNetV3-small has
# three kinds of convolution. Which kind takes the time, and which has the MACs?

# %% tags=["nbval-ignore-output"]
from torch.profiler import ProfilerActivity, profile

mobilenet = networks["MobileNetV3-small"][0]
with (
    torch.inference_mode(),
    profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record,
):
    for _ in range(max(CALLS // 50, 3)):
        mobilenet(image)
by_operator = record.key_averages()
print(
    by_operator.table(sort_by="self_cpu_time_total", row_limit=6, max_name_column_width=28).split(
        "Self CPU time total"
    )[0]
)


# %%
def kind(weight_shape):
    """Of a convolution's weight (outputs, inputs / groups, k, k)."""
    _, inputs, k, _ = weight_shape
    return "depthwise" if inputs == 1 and k > 1 else "pointwise" if k == 1 else "standard"


macs_of = {}
for layer in mobilenet.modules():
    if isinstance(layer, nn.Conv2d):
        layer.register_forward_hook(
            lambda conv, _, y: macs_of.update(
                {conv: (kind(conv.weight.shape), conv.weight[0].numel() * y[0].numel())}
            )
        )
with torch.inference_mode():
    mobilenet(image)
{
    name: sum(m for k, m in macs_of.values() if k == name)
    for name in ("pointwise", "depthwise", "standard")
}

# %% tags=["nbval-ignore-output"]
micros = dict.fromkeys(("pointwise", "depthwise", "standard"), 0.0)
for event in record.key_averages(group_by_input_shape=True):
    if event.key == "aten::conv2d":
        micros[kind(event.input_shapes[1])] += event.cpu_time_total
total_time, total_macs = sum(micros.values()), sum(m for _, m in macs_of.values())
per_mac = {
    name: (
        micros[name] / total_time / (sum(m for k, m in macs_of.values() if k == name) / total_macs)
    )
    for name in micros
}
plots.bars(
    {f"{name}": per_mac[name] for name in per_mac},
    xlabel="share of convolution time / share of MACs",
    reference=(1.0, "time in proportion to MACs"),
    title=(
        f"A depthwise MAC costs {per_mac['depthwise'] / per_mac['pointwise']:.1f} times a"
        " pointwise one"
    ),
    alt=(
        "Three bars, one a kind of convolution: its share of the time divided by its share of the"
        " MACs."
    ),
)

# %% [markdown]
# A bar at 1 would mean that time follows MACs. The depthwise bar says what the roofline said, now
# inside a real network. Your own timing must agree with the field's tool, or one of the two is
# wrong. MACs are exact, so they must be equal:

# %%
library = measure.macs(mobilenet, image)
linear = sum(layer.weight.numel() for layer in mobilenet.modules() if isinstance(layer, nn.Linear))
assert sum(m for _, m in macs_of.values()) + linear == library
library

# %% [markdown]
# Times are not exact. Here is your median beside `Timer`'s, with the same threads:

# %% tags=["nbval-ignore-output"]
yours = np.median([milliseconds(inference) for _ in range(CALLS)])
timer = benchmark.Timer("f()", globals={"f": inference}, num_threads=torch.get_num_threads())
theirs = 1e3 * timer.blocked_autorange(min_run_time=SECONDS / 2).median
print(f"yours {yours:.3f} ms, Timer {theirs:.3f} ms, ratio {yours / theirs:.2f}")

# %% [markdown]
# ## Measure: energy
# Intel and AMD processors count the energy they use (RAPL), and Linux shows the counter on real
# machines; a virtual machine usually hides it. Does the smaller network also use less?

# %% tags=["nbval-ignore-output"]
small = models.mini_resnet(16, seed=0).eval()
joules = [measure.energy(measure.arm(net, x).call, seconds=SECONDS) for net in (model, small)]
if machine.can("energy"):
    larger, smaller = joules
    use = measure.Interval(
        larger.value / smaller.value, larger.low / smaller.high, larger.high / smaller.low
    )
else:
    use = machine.skip("energy", "joules an inference")
claims.verdict("01.faster_uses_less_energy", use)

# %% [markdown]
# Energy is power times time. A network that is twice as fast because it keeps twice the units busy
# may use as much. If your verdict says *not testable here*, nothing was estimated in its place.

# %% [markdown]
# ## If yours shows no gain
# Every later chapter ends in a comparison like those above. If it shows no gain, look here first.
#
# | You see | Because | Look at |
# |---|---|---|
# | *inconclusive* | the interval is wide: the machine is busy, or the difference is small | close other programs, give `seconds=10` |
# | two threads are no faster than one | the layers are too small to share, or the second core is a hyper-thread | batch 1 against batch 64 |
# | fewer MACs, same time | the layer sits under the roofline's slope | its operations a byte |
# | a part is faster, the whole is not | Amdahl: the part's share is small | the profiler's table |
# | a laptop gets slower from run to run | it heats up and lowers its clock | interleaved ratios, which cancel it |
# | under a virtual machine or in Colab everything jumps | neighbours share the cores | `clock="cpu"`, one thread |

# %% [markdown]
# ## Myth: time the first call, once, with `time.time()`
# This is how most snippets in circulation measure. Two *identical* networks, each timed once, the
# way the snippets do:


# %% tags=["nbval-ignore-output"]
def snippet(net, images):
    start = time.time()
    net(images)
    return time.time() - start


old, new = models.mini_resnet(32, seed=5).eval(), models.mini_resnet(32, seed=5).eval()
fresh = torch.randn(7, 1, 28, 28)  # a batch size that nothing has warmed up yet
print(f"“The new network is {snippet(old, fresh) / snippet(new, fresh):.2f} times faster.”")
print(
    "Measured:", measure.compare(measure.arm(old, fresh), measure.arm(new, fresh), seconds=SECONDS)
)

# %% [markdown]
# The first network paid for the preparation of the shapes; the second one found it done. And
# `time.time()` is the wall clock of the calendar: it may be set back while you measure, and on some
# systems it ticks in steps of milliseconds.
#
# ## Myth: the counter says how many FLOPs there are
# Counters count the operators they know. In inference, PyTorch's transformer layer takes a fast
# path: one *fused* operator, several in a single call, that the counter has never heard of.

# %% tags=["nbval-ignore-output"]
encoder = nn.TransformerEncoderLayer(
    d_model=64, nhead=4, dim_feedforward=128, batch_first=True
).eval()
tokens = torch.zeros(2, 10, 64)  # (B, T, d_model): 20 tokens
on_fast_path = measure.macs(encoder, tokens)
torch.backends.mha.set_fastpath_enabled(False)
counted = measure.macs(encoder, tokens)
torch.backends.mha.set_fastpath_enabled(True)
print(f"counted on the fast path: {on_fast_path:,}; off it: {counted:,}")

# %% [markdown]
# Nothing warned you. Now by hand: for each of the 20 tokens four projections of 64 by 64 numbers
# and two layers of 64 by 128, and for each of the two sequences the two attention products, queries
# with keys and weights with values.

# %% tags=["nbval-ignore-output"]
projections, mlp, attention = 20 * 4 * 64 * 64, 20 * 2 * 64 * 128, 2 * (2 * 10 * 10 * 64)
print(f"by hand: {projections:,} + {mlp:,} + {attention:,} = {projections + mlp + attention:,}")
print(f"the counter off the fast path still misses {projections + mlp + attention - counted:,}")

# %% [markdown]
# If the last number is not 0, it is the attention products: one more operator this counter does not
# know. A count is trusted after one layer of each kind has been checked by hand.

# %% [markdown]
# ## Exercise A · the tail
# Complete the line. `p99` is the smallest of the given latencies that at least 99 of 100 calls do
# not exceed: in a sorted list of $n$, the one at position $\lceil 0.99\,n \rceil$, counted from 1.
# For `[1, 2, …, 200]` a right answer is 198.


# %% tags=["exercise"]
def p99(latencies):
    ordered = sorted(latencies)
    return ...


# %%
exercises.check("01.A", p99)

# %% [markdown] tags=["hint"]
# Python counts from 0, the definition from 1.

# %% [markdown] tags=["hint"]
# `math.ceil` rounds up. For one single latency the answer is that latency.


# %% tags=["solution"]
def p99(latencies):
    ordered = sorted(latencies)
    return ordered[math.ceil(0.99 * len(ordered)) - 1]


# %% tags=["wrong"]
# Counts from 0 where the definition counts from 1.
def p99(latencies):
    ordered = sorted(latencies)
    return ordered[min(math.ceil(0.99 * len(ordered)), len(ordered) - 1)]


# %% tags=["wrong"]
# Forgets to sort: the last call is not the slowest.
def p99(latencies):
    return latencies[math.ceil(0.99 * len(latencies)) - 1]


# %% tags=["wrong"]
# Rounds down: right for a multiple of 100, wrong between.
def p99(latencies):
    ordered = sorted(latencies)
    return ordered[max(int(0.99 * len(ordered)) - 1, 0)]


# %% tags=["wrong"]
# Sorts the caller's list in place.
def p99(latencies):
    latencies.sort()
    return latencies[math.ceil(0.99 * len(latencies)) - 1]


# %% [markdown] tags=["instructor"]
# 8 minutes. Ask before anyone runs it: what is the p99 of ten calls? (The slowest. Ten calls can't
# show a p99.) NumPy's default interpolates between neighbours and gives 198.01 for the example: a
# definition must be named.

# %% [markdown]
# ## Exercise B · an interval by bootstrap
# Write `speedup_interval(baseline, candidate)`. Both are lists of seconds of the same length; entry
# $i$ of both was taken in round $i$. Return `(low, middle, high)`: `middle` is the median of the
# per-round speed-ups, and `low` and `high` are the 2.5th and the 97.5th percentile of that median
# over at least 500 *resamples* of the rounds, drawn with replacement. For `baseline = [4.0, 4.0]`
# and `candidate = [2.0, 2.0]` a right answer is `(2.0, 2.0, 2.0)`.


# %% tags=["exercise"]
def speedup_interval(baseline, candidate): ...


# %%
exercises.check("01.B", speedup_interval)

# %% [markdown] tags=["hint"]
# First the per-round ratios, as a NumPy array. Which of the two goes on top, if above 1 means that
# the candidate is faster?

# %% [markdown] tags=["hint"]
# `rng.integers(0, n, size=(1000, n))` gives a thousand resamples of row numbers at once.

# %% [markdown] tags=["hint"]
# Resample *rounds*. If you resample the two lists separately you tear the pairs apart, and the
# noise that both shared no longer cancels.


# %% tags=["solution"]
def speedup_interval(baseline, candidate):
    ratios = np.asarray(baseline) / np.asarray(candidate)
    rows = np.random.default_rng().integers(0, len(ratios), size=(1000, len(ratios)))
    medians = np.median(ratios[rows], axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(low), float(np.median(ratios)), float(high)


# %% tags=["wrong"]
# The latency ratio: below 1 when the candidate is faster.
def speedup_interval(baseline, candidate):
    ratios = np.asarray(candidate) / np.asarray(baseline)
    rows = np.random.default_rng().integers(0, len(ratios), size=(1000, len(ratios)))
    low, high = np.percentile(np.median(ratios[rows], axis=1), [2.5, 97.5])
    return float(low), float(np.median(ratios)), float(high)


# %% tags=["wrong"]
# Tears the pairs apart: the noise that both arms shared comes back.
def speedup_interval(baseline, candidate):
    a, b, rng = np.asarray(baseline), np.asarray(candidate), np.random.default_rng()
    i, j = (rng.integers(0, len(a), size=(1000, len(a))) for _ in range(2))
    medians = np.median(a[i], axis=1) / np.median(b[j], axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(low), float(np.median(a / b)), float(high)


# %% tags=["wrong"]
# The spread of single rounds, not the uncertainty of their median: far too wide.
def speedup_interval(baseline, candidate):
    ratios = np.asarray(baseline) / np.asarray(candidate)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(np.median(ratios)), float(high)


# %% tags=["wrong"]
# The mean in place of the median: only a round that hiccuped shows it.
def speedup_interval(baseline, candidate):
    ratios = np.asarray(baseline) / np.asarray(candidate)
    rows = np.random.default_rng().integers(0, len(ratios), size=(1000, len(ratios)))
    low, high = np.percentile(np.mean(ratios[rows], axis=1), [2.5, 97.5])
    return float(low), float(np.mean(ratios)), float(high)


# %% [markdown] tags=["instructor"]
# 15 minutes. The torn pairs are the mistake to wait for: let a pair of learners compare the widths
# they get for the same lists.

# %% [markdown]
# ## Exercise C · decide, under noise that remembers
# Write `decide(ratios)`. It gets 60 speed-ups, one a round in the order they were taken, and
# returns `"faster"`, `"slower"` or `"can't tell"`. The noise is like that of a real machine: a slow
# moment lasts several rounds, and a single round may be off by a factor of ten. How noisy it is you
# are not told: the ratios are off by `1%`, by `4%` or by `16%`, from series to series.
#
# Your budget: for two equal arms say *faster* or *slower* in at most `8%` of the series; where the
# true difference is 3.5 times the noise (a speed-up of `1.04`, `1.15` or `1.75`, or as large a
# slow-down), find it in at least `80%` of them. `check` draws two hundred such series, more if it
# is a close thing, and waits `20` seconds: a twentieth of a second for each is time enough.


# %% tags=["exercise"]
def decide(ratios): ...


# %%
exercises.check("01.C", decide)

# %% [markdown] tags=["hint"]
# Neighbouring rounds are alike, so sixty rounds are fewer than sixty pieces of evidence. How did
# this chapter's `interval` deal with that?

# %% [markdown] tags=["hint"]
# The interval must lie wholly on one side of 1. If the second smallest of twelve block medians is
# above 1, what follows?


# %% tags=["solution"]
def decide(ratios):
    medians = sorted(np.median(block) for block in np.array_split(np.asarray(ratios), 12))
    if medians[1] > 1:
        return "faster"
    return "slower" if medians[-2] < 1 else "can't tell"


# %% tags=["wrong"]
# Looks at the median alone: noise is always a little on one side.
def decide(ratios):
    middle = np.median(ratios)
    return "faster" if middle > 1 else "slower" if middle < 1 else "can't tell"


# %% tags=["wrong"]
# A bootstrap of single rounds: takes sixty correlated rounds for sixty independent ones.
def decide(ratios):
    ratios = np.asarray(ratios)
    rows = np.random.default_rng().integers(0, len(ratios), size=(500, len(ratios)))
    low, high = np.percentile(np.median(ratios[rows], axis=1), [2.5, 97.5])
    return "faster" if low > 1 else "slower" if high < 1 else "can't tell"


# %% tags=["wrong"]
# Never wrong and never of use.
def decide(ratios):
    return "can't tell"


# %% tags=["wrong"]
# Mean and standard deviation: one round off by ten hides every difference.
def decide(ratios):
    ratios = np.asarray(ratios)
    half = 3 * ratios.std(ddof=1) / math.sqrt(len(ratios))
    return (
        "faster"
        if ratios.mean() - half > 1
        else "slower"
        if ratios.mean() + half < 1
        else "can't tell"
    )


# %% tags=["wrong"]
# Finds what is faster and forgets that something can be slower.
def decide(ratios):
    medians = sorted(np.median(block) for block in np.array_split(np.asarray(ratios), 12))
    return "faster" if medians[1] > 1 else "can't tell"


# %% [markdown] tags=["instructor"]
# 20 minutes. Whoever comes with a bootstrap has learned exercise B too well: ask what a bootstrap
# assumes about its samples. A good closing question for the room: which of your own past benchmarks
# would survive `decide`?

# %% [markdown]
# ## Break it
# Load the other core and watch. Half-way through, a second program starts to compute. Somebody who
# times all of A first and all of B afterwards sees B "slow down"; somebody who interleaves sees
# both suffer.

# %% tags=["nbval-ignore-output"]
import subprocess
import sys

rounds = max(CALLS // 8, 12)
one_after_the_other = [milliseconds(inference) for _ in range(rounds)]
burn = [sys.executable, "-c", "while True: pass"]
load = [subprocess.Popen(burn) for _ in range(machine.usable_cores())]
try:
    time.sleep(0.5)  # until the others have started
    second = [milliseconds(inference) for _ in range(rounds)]
    interleaved = measure.compare(inference, lambda: inference(), seconds=SECONDS)
finally:
    for process in load:
        process.kill()
        process.wait()

# %% tags=["nbval-ignore-output"]
sequential = np.median(one_after_the_other) / np.median(second)
plots.intervals(
    {
        "all A, then all B": measure.Interval(sequential, sequential, sequential),
        "A and B interleaved": interleaved.interval,
    },
    xlabel="speed-up of a network over itself (x)",
    title=f"One after the other: {sequential:.2f}x. Interleaved: {interleaved.verdict}",
    alt=(
        "The sequential measurement lies beside 1 or further off, the interleaved interval"
        " includes 1."
    ),
)

# %% [markdown]
# Nothing about the network changed. The first number is a verdict on the neighbours. The second is
# honest and pays for it with a wider interval. If both lie near 1 on your machine, it has cores to
# spare: start more copies of `burn`.

# %% [markdown]
# ## Exit quiz
# **1. An interval of [0.98, 1.02] means**
# <details><summary>no difference</summary>Right: the whole interval lies within ±3%.</details>
# <details><summary>inconclusive</summary>It would be, if it reached beyond ±3%: [0.9, 1.1] leaves
# everything open.</details>
# <details><summary>2% faster</summary>It contains 1 and values below it.</details>
#
# **2. You timed the old model all morning and the new one all afternoon, a thousand calls each.
# What is missing?**
# <details><summary>more calls</summary>A million calls in the afternoon still say nothing about the
# morning.</details>
# <details><summary>interleaving</summary>Right: what changed between morning and afternoon is in
# the ratio.</details>
# <details><summary>a better clock</summary>The clock is the least of it.</details>
#
# **3. A layer sits on the slope of the roofline. What makes it faster?**
# <details><summary>an instruction that multiplies twice as fast</summary>The units already wait for
# data.</details>
# <details><summary>moving fewer bytes</summary>Right: on the slope, bytes are the limit. Fewer bits
# a number, or fusing it with its neighbour.</details>
# <details><summary>fewer MACs at the same bytes</summary>That moves the point to the left, down the
# slope: the same time.</details>
#
# **4. Half of the time is in a step that becomes ten times faster. The whole becomes**
# <details><summary>10 times faster</summary>Only if the step were all of it.</details>
# <details><summary>5 times faster</summary>Shares do not multiply like this: the other half
# stays.</details>
# <details><summary>1.8 times faster</summary>Right: 1 / (0.5 + 0.05).</details>
#
# **5. The counter says 0 FLOPs. You conclude**
# <details><summary>the layer does nothing</summary>It computed a right answer a moment
# ago.</details>
# <details><summary>the counter does not know this operator</summary>Right. Check one layer by hand,
# then trust the tool.</details>
# <details><summary>the layer runs on another device</summary>A counter counts operators wherever
# they run.</details>
#
# **Key points** · warm up, repeat, interleave, pair · a speed-up has an interval, or it is a rumour
# · *no difference* and *inconclusive* are results · say threads, batch, dtype and memory format ·
# MACs are not time: the roofline says why · Amdahl: look at the share before you look at the speed.
#
# **Sources** · G. Amdahl, *Validity of the single processor approach*, 1967 · S. Williams, A.
# Waterman, D. Patterson, *Roofline*, 2009 · J. Dean, L. Barroso, *The Tail at Scale*, 2013 · N. Ma
# et al., *ShuffleNet V2*, 2018 · W. Conover, *Practical Nonparametric Statistics*, 1999, §3.2 · the
# documentation of
# [torch.utils.benchmark](https://docs.pytorch.org/docs/stable/benchmark_utils.html) and
# [torch.profiler](https://docs.pytorch.org/docs/stable/profiler.html).
#
# **For the capstone** your ledger now holds five claims, and you have the instrument for all
# others. Next: [02 · Training recipe](02_training_recipe.ipynb), where every change must pay for
# itself in seconds or in accuracy.
