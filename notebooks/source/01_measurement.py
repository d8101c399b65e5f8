# %% [markdown]
# # 01 · Measurement
#
# **Is it faster, or did it only look faster?**
#
# After this chapter you can: *time* a network so that the number survives a second run · *give* a
# speed-up with its uncertainty · *say* "no difference" and "inconclusive" where they are due ·
# *place* a layer on your machine's roofline and find out why it lies where it does · *predict* how
# much the whole gains when a part gets faster.
#
# 90 minutes · before this: Python, and one network trained · runs on any CPU

# %% tags=["parameters"]
import os

PROFILE = os.environ.get("COURSE_PROFILE", "fast")

# %% tags=["nbval-ignore-output"]
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from course_utils import claims, exercises, machine, measure, models, plots, scratch

SECONDS = {"smoke": 0.15, "fast": 1.5, "full": 8.0}[PROFILE]  # for one comparison
CALLS = {"smoke": 60, "fast": 400, "full": 2000}[PROFILE]
folder = os.path.relpath(scratch("01"))
machine.card()

# %% [markdown]
# The card is part of every result here: on another processor the same code may get another verdict.

# %% [markdown]
# ## Predict
# Below, you time one inference of a small network. Then you time it again: the same network, the
# same input, the same second. Do that for two hundred pairs. In the worst pair, by what factor does
# the slower call differ from the faster one? Write your guess as a number such as 1.05.

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
    alt="Time of the first twenty calls, the first one beside the others.",
)

# %% [markdown]
# The first call pays for what the others find ready: memory is asked for, and the library chooses
# and prepares a *kernel*, the compiled routine that computes one operation, for these shapes. A
# user meets that cost once. A comparison leaves it out, a report on start-up time leaves it in.
#
# Now the warm calls.

# %% tags=["nbval-ignore-output"]
warm_calls = np.array([milliseconds(inference) for _ in range(CALLS)])
old, new = warm_calls[0::2], warm_calls[1::2]  # "I ran the old one, then the new one"
pairs = new / old
worst = float(np.maximum(pairs, 1 / pairs).max())
exercises.reveal("01.twice", worst, "times")

# %% [markdown]
# That was the worst pair. How common are bad ones? Each pair of neighbouring calls is a speed test
# that somebody might have published. Here the old and the new one are the same.

# %% tags=["nbval-ignore-output"]
outside = float(np.mean((pairs < 0.97) | (pairs > 1.03)))
figure, ax = plots.axes(
    "second call's time / first call's time",
    "pairs",
    title=f"{outside:.0%} of comparisons of a network with itself are off by over 3%",
)
ax.hist(np.clip(pairs, 0.7, 1.4), bins=np.linspace(0.7, 1.4, 57), color=plots.COLOURS[0])
ax.axvspan(0.97, 1.03, color="0.85", zorder=0, label="the same, within ±3%")
ax.yaxis.get_major_locator().set_params(integer=True)
ax.legend()
plots.show(
    figure,
    "Histogram of time ratios of neighbouring calls of one network, with the band of ±3% in grey.",
)

# %% [markdown]
# The grey band is where every bar should stand, because nothing changed between the two calls. What
# lies outside it would have been reported as a gain or a loss.
#
# Three remedies:
# 1. **Repeat**, and take the median. One slow call in ten moves the mean; it leaves the median
#    where it is.
# 2. **Interleave.** Time A, B, A, B …, not all A and then all B. Whatever slows the machine for a
#    second slows both.
# 3. **Pair.** Divide within a round, then take the median of the ratios. What both suffered
#    cancels.


# %% tags=["nbval-ignore-output"]
def ratios(baseline, candidate, rounds):
    """One speed-up a round: above 1, the candidate is faster."""
    baseline(), candidate()  # warm up
    found = []
    for _ in range(rounds):
        found.append(milliseconds(baseline) / milliseconds(candidate))
    return np.array(found)


same = ratios(inference, inference, CALLS // 2)
print(f"median of {len(same)} ratios: {np.median(same):.3f}")
print(f"smallest and largest single ratio: {same.min():.2f} and {same.max():.2f}")

# %% [markdown]
# The median is far closer to 1 than the extremes are. But how close is it *bound* to be? Cut the
# series into twelve blocks, take each block's median, and look at where these lie.


# %% tags=["nbval-ignore-output"]
def interval(series, blocks=12):
    """Where the true median lies: the second smallest to the second largest block median."""
    medians = sorted(np.median(block) for block in np.array_split(series, blocks))
    return medians[1], medians[-2]


low, high = interval(same)
print(f"speed-up {np.median(same):.3f}, interval [{low:.3f}, {high:.3f}]")

# %% [markdown]
# Why does this work? If the true median were above the second largest of the twelve, then at least
# eleven blocks would have to lie below it. Each block lies below the true median with probability
# one half, like a coin. Eleven or more heads in twelve tosses, $(12 + 1) / 2^{12}$, is rare, and so
# is the other side. No bell curve was assumed (Conover 1999, §3.2): you may be wrong 6 times in
# 1,000, and 50 in 1,000 is what *95% confidence* allows.
#
# **Blocks remember.** Why blocks, and not single rounds? Because neighbours are alike: a core that
# is busy now is busy a moment later. Ten rounds in the same bad moment are one piece of evidence,
# not ten. A *bootstrap* draws the rounds again and
# again, with replacement, and looks at how the median varies. It takes the ten for ten. You write
# one in exercise B, and catch it at that in exercise C.
#
# **Stopping has a price.** "Run it until the result is clear": each look is a chance to be fooled,
# and you stop at the first one that fools you. Try it on your own noise: play
# the rounds of your network against itself anew, in a random order of short pieces, so that
# neighbours stay neighbours. Look after every twelve rounds; stop when the interval leaves 1 out.


# %%
def reshuffled(series, rng, piece=8):
    """The same noise in another order, with its memory of a few rounds."""
    starts = rng.integers(0, len(series) - piece, size=len(series) // piece)
    return np.concatenate([series[i : i + piece] for i in starts])


def fooled(series, looks):
    """Whether one of the looks finds a difference. There is none."""
    found = (interval(series[:n]) for n in looks)
    return any(low > 1 or high < 1 for low, high in found)


# %% tags=["nbval-ignore-output"]
rng, tries = np.random.default_rng(0), 1000
noise = same / np.median(same)  # whatever its median is, now there is no difference
played = [reshuffled(noise, rng) for _ in range(tries)]
every_twelve = range(24, len(played[0]) + 1, 12)
alarms = {
    "one look, at the end": [fooled(p, [len(p)]) for p in played],
    "a look every 12 rounds": [fooled(p, every_twelve) for p in played],
}
print({name: f"{np.mean(found):.1%} false alarms" for name, found in alarms.items()})

# %% [markdown]
# The first number is the price of one look, the second of many. The noise is the same: what they
# differ by, the looks made. The remedy is a plan made beforehand: so many seconds, so many
# processes, then one look.

# %% [markdown]
# ## From scratch: the next process
# An interval speaks of what varied while you measured. Where a network's buffers lie, what the
# memory allocator kept, which moment the machine had: these are drawn once, when a process starts,
# and all of its rounds share them (Mytkowicz et al. 2009; Kalibera and Jones 2013). Does your
# interval hold in the next process?
#
# Ask a few. A process can't see a cell of your notebook, so its code must be a file; `%%writefile`
# writes the cell to one. It compares a convolution with the pair of layers that MobileNets put in
# its place, which you meet again below, and it also times a ReLU of a large tensor.

# %% tags=["nbval-ignore-output"]
# %%writefile "$folder/opinion.py"
import time

import torch
from torch import nn

torch.set_num_threads(1)
x, large = torch.randn(8, 32, 28, 28), torch.randn(32, 128, 56, 56)
standard = nn.Conv2d(32, 32, 3, padding=1)
separable = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 32, 1))


@torch.inference_mode()
def seconds(layer, x):
    start = time.perf_counter()
    layer(x)
    return time.perf_counter() - start


def sample():
    ratios = [seconds(standard, x) / seconds(separable, x) for _ in range(10)]
    return {"ratios": ratios, "relu": seconds(torch.relu, large)}


# %% [markdown]
# `measure.turns` starts a program for each arm, calls their `sample` in turn, ends them, and starts
# anew. Two arms, one difference. A tensor that nobody needs any more goes back to the C library's
# *memory allocator*. The allocator may keep it for the next one, or hand it to the system, and ask
# for it again, page by page, at the next call. The course tells it to keep (the row *Allocator* on
# the card). The second arm leaves it as the system has it.

# %% tags=["nbval-ignore-output"]
STARTS, SAMPLES = 6, {"smoke": 3, "fast": 12, "full": 60}[PROFILE]
here = {"PYTHONPATH": str(Path(folder).resolve())}
arms = {"memory kept": here, "as it comes": here | {"COURSE_ALLOCATOR": "system"}}
found = measure.turns(
    "from opinion import sample", arms, rounds=SAMPLES, starts=STARTS, timeout=600
)
opinions = {  # (start, round): one speed-up each
    arm: np.array([s["ratios"] for s in samples]).reshape(STARTS, -1)
    for arm, samples in found.items()
}
medians = {arm: np.median(series, axis=1) for arm, series in opinions.items()}

# %% [markdown]
# Now the interval *over* processes, by hand. Each process gives one number, its median. With six of
# them, the true median of all processes lies between the smallest and the largest, unless all six
# fell on one side of it: $2 / 2^6$, one in thirty-two.

# %% tags=["nbval-ignore-output"]
rows, hold = {}, 0
for arm, series in opinions.items():
    own = [measure.Interval(float(np.median(one)), *interval(one)) for one in series]
    over = measure.Interval(float(np.median(medians[arm])), medians[arm].min(), medians[arm].max())
    hold += sum(one.low <= over.value <= one.high for one in own)
    rows |= {f"{arm}, process {i}": one for i, one in enumerate(own, 1)}
    rows[f"{arm}, over processes"] = over
kept, system = (rows[f"{arm}, over processes"].value for arm in arms)
plots.intervals(
    rows,
    xlabel="speed-up of the separable pair over the 3×3 convolution (x)",
    title=f"The same layers: {kept:.1f}x or {system:.1f}x; {hold} of {2 * STARTS} rows hold",
    alt="Two groups of intervals, one a process, and below each group the interval over processes.",
)

# %% [markdown]
# Count the rows of a group that exclude its last one: each was right about its own process, and no
# guide to the next. The row *over processes* is what you may publish. Then compare the groups.
# Nobody mentions an allocator in a benchmark. Does it matter?

# %% tags=["nbval-ignore-output"]
if "mallopt" in machine.card().allocator:
    change = measure.over_processes((medians["memory kept"] / medians["as it comes"]).tolist())
else:
    change = machine.Skip("system", f"the allocator is {machine.card().allocator}.")
claims.verdict("01.the_allocator_does_not_matter", change)

# %% [markdown]
# ## Measure: the course's instrument
# `measure.compare(a, b)` does what you did: repeat, interleave in random order, pair, blocks. It
# says of itself *within this process*. `measure.across(a, b)` copies both *arms*, the things that
# it compares, into twelve fresh processes, and gives the interval over these. `measure.arm(model,
# x)` makes an arm that runs in inference mode and tells its conditions. The answers of both:
#
# | answer | when |
# |---|---|
# | *faster* | the whole interval lies above `1.03` |
# | *slower* | all of it lies below `1 / 1.03` |
# | *no difference* | all of it lies between the two |
# | *inconclusive* | none of these: measure longer, or stop claiming |
#
# A comparison of a thing with itself, *A/A*, shows what your instrument can tell apart today.
# Measure longer until it says *no difference*; three tries are planned, no more.

# %% tags=["nbval-ignore-output"]
itself = measure.arm(model, x, "itself")
for factor in (1, 2, 4):
    again = measure.across(itself, itself, seconds=factor * SECONDS)
    print(again)
    if again.verdict == "no difference":
        break

# %% [markdown]
# If it never became *no difference*, the machine is too busy today for a difference of a few
# percent.

# %% [markdown]
# ## Measure: three ways to time the wrong thing
# **Threads.** `torch.utils.benchmark.Timer` uses *one* thread unless you say otherwise; your
# program uses all of them.

# %% tags=["nbval-ignore-output"]
from torch.utils import benchmark

big = torch.randn(64, 1, 28, 28)
for threads in sorted({1, machine.usable_cores()}):
    timer = benchmark.Timer("model(x)", globals={"model": model, "x": big}, num_threads=threads)
    took = timer.blocked_autorange(min_run_time=SECONDS / 4).median
    print(f"{threads} thread(s): {measure.pretty(took)}")
print("Timer without num_threads:", benchmark.Timer("0").timeit(1).num_threads, "thread")

# %% [markdown]
# A comparison in this course states the threads, and refuses two arms that differ in them. Where it
# knows them, it also states the batch, the type of the numbers (*dtype*) and their order in memory
# (*memory format*).
#
# **Dead code, lazy code.** The work was done before the clock started; or the call returns a
# promise at once, and the work happens later, or never. The instrument refuses all three.

# %% tags=["nbval-ignore-output"]
from concurrent.futures import ThreadPoolExecutor

result = inference()
with ThreadPoolExecutor(1) as pool:
    for cheat in (
        lambda: result,
        lambda: pool.submit(inference),
        lambda: (model(image) for image in x.split(1)),
    ):
        with exercises.fails(measure.MeasurementError):
            measure.compare(inference, cheat)

# %% [markdown]
# ## Explain: what a network costs
# Time is what you feel. Other numbers explain it: the *multiply–accumulates* (MACs, one
# multiplication and one addition each) and the *bytes* that move. One convolution shows how MACs
# are counted. Each of its $C_{out}·H·W$ outputs needs $C_{in}·k·k$ of them: one for each of the $k$
# by $k$ weights over each of the $C_{in}$ input channels.

# %%
conv = nn.Conv2d(32, 64, 3, padding=1, bias=False)
by_hand = 64 * 28 * 28 * (32 * 3 * 3)
by_tool = measure.macs(conv, torch.zeros(1, 32, 28, 28))
by_hand, by_tool

# %% [markdown]
# A floating-point operation (FLOP) is an addition or a multiplication, so a MAC is two. "Fewer
# FLOPs, so it is faster" deserves a clean test: the 3×3 convolution, and the pair in its place. A
# *depthwise* convolution looks at each channel alone, a 1×1 *pointwise* one mixes channels.

# %% tags=["nbval-ignore-output"]
channels = 128
standard = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
pointwise = nn.Conv2d(channels, channels, 1, bias=False)
separable = nn.Sequential(depthwise, pointwise)
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
# Call a layer's operations for each byte it moves its *arithmetic intensity*. A machine computes
# only so fast (in GFLOP/s, billions of operations a second) and fetches bytes only so fast (in
# GB/s). Both limits in one figure make the *roofline* (Williams, Waterman and Patterson 2009): a
# slope, where memory is the limit, and a flat roof, where arithmetic is.

# %% tags=["nbval-ignore-output"]
roof = measure.roofline()
print(f"{roof.gflops:.0f} GFLOP/s, {roof.gbytes:.1f} GB/s, {roof.threads} thread(s)")
print(f"below {roof.ridge:.1f} operations a byte, memory is the limit")


def operations_and_bytes(layer, x):
    """In fp32, if input, weights and output each move once."""
    y = layer(x)
    moved = 4 * (x.numel() + y.numel() + sum(p.numel() for p in layer.parameters()))
    relu = y.numel()  # one operation a number, which MAC counters leave out
    return 2 * measure.macs(layer, x) or relu, moved


# %% tags=["nbval-ignore-output"]
layers = {
    "3×3 convolution": (standard, features),
    "depthwise 3×3": (depthwise, features),
    "pointwise 1×1": (pointwise, features),
    "ReLU": (nn.ReLU(), torch.randn(32, channels, 56, 56)),
    "linear, batch 1": (nn.Linear(2048, 2048), torch.randn(1, 2048)),
    "linear, batch 256": (nn.Linear(2048, 2048), torch.randn(256, 2048)),
}
placed = {}
for name, (layer, example) in layers.items():
    operations, moved = operations_and_bytes(layer, example)
    seconds = measure.latency(measure.arm(layer, example), seconds=SECONDS / 8).p50
    placed[name] = (operations / moved, operations / seconds / 1e9)

# %% tags=["nbval-ignore-output"]
under = {name: speed / roof.bound(i) for name, (i, speed) in placed.items()}
figure, ax = plots.axes(
    "operations a byte",
    "GFLOP/s",
    title=f"{min(under, key=under.get)}: {min(under.values()):.0%} of what the roofline allows",
    height=4.2,
)
line = np.geomspace(0.05, 400, 200)
ax.loglog(line, [roof.bound(i) for i in line], color="0.3", label="roofline, measured here")
for i, (name, point) in enumerate(placed.items()):
    ax.plot(*point, plots.MARKERS[i], color=plots.COLOURS[i], label=name, markersize=8)
ax.legend(fontsize=8, loc="lower right")
plots.show(figure, "Roofline of this machine with six layers below or near it.")

# %% [markdown]
# The roofline says what a layer *could* reach, not what it reaches. A point on the line needs no
# other explanation: on the slope only fewer bytes help, on the roof only fewer operations. A point
# above the slope is no error: its data came from a cache, not from memory. A point *below* asks for
# one, and "memory is slow" is not it: the line already allows for that.
#
# **ReLU** makes a new tensor at every call. In the figure it found memory that the process had
# kept. Where the allocator gives it back each time, the second arm above has measured:

# %% tags=["nbval-ignore-output"]
relu = {arm: float(np.median([s["relu"] for s in samples])) for arm, samples in found.items()}
print({arm: measure.pretty(seconds) for arm, seconds in relu.items()}, "with one thread")

# %% [markdown]
# The same arithmetic, the same bytes. What is added is the system's work: it hands out each page of
# memory anew, filled with zeros. In a roofline the point would drop by that factor.
#
# **The depthwise layer** is often called memory-bound. If it were, it would take about as long as a
# copy of its bytes. That can be measured. And it can be asked of another kernel: in *channels_last*
# the channels of one pixel lie side by side in memory, and torch calls other code.

# %% tags=["nbval-ignore-output"]
target = torch.empty_like(features)
copy = measure.Arm(lambda: target.copy_(features), "a copy of its bytes")
copied = measure.across(measure.arm(depthwise, features, "depthwise"), copy, seconds=SECONDS)
last = features.to(memory_format=torch.channels_last)
turned = measure.across(
    measure.arm(depthwise, features, "contiguous"),
    measure.arm(depthwise, last, "channels_last"),
    seconds=SECONDS,
)
print(copied, turned, sep="\n")
claims.verdict("01.depthwise_waits_for_memory", copied)

# %% [markdown]
# Copy and layer find the same bytes in the same place, at this size in a cache. If the copy is many
# times faster, waiting for data is not what keeps the layer busy: its kernel is. A kernel is
# software; the second line says whether torch has a better one. Few MACs are no promise.

# %% [markdown]
# ## Explain: Amdahl's law
# A step of your program gets $S$ times faster, but it is only a share $p$ of the time. The rest
# stays, so the whole gets faster by $1 / ((1 - p) + p / S)$ (Amdahl 1967). (A textbook in
# circulation prints $T_{new} = T · S$: the faster the part, the slower the whole.) Two steps in a
# row, the second replaced by a faster one:

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
old_part = measure.arm(step_two, batch, "old part")
new_part = measure.arm(faster_two, batch, "new part")
part = measure.across(old_part, new_part, seconds=3 * SECONDS)
alone = measure.across(measure.Arm(before, "both"), old_part, seconds=3 * SECONDS)
whole = measure.across(before, after, seconds=3 * SECONDS)
p = measure.derive(lambda a: 1 / a, alone.interval)  # the part's share of the whole
predicted = measure.derive(lambda p, s: 1 / ((1 - p) + p / s), p, part.interval, unit="x")
print(f"S = {part.interval}, p = {p}: Amdahl predicts {predicted}, measured {whole.interval}")
claims.verdict("01.amdahl", measure.derive(lambda w, p: w / p, whole.interval, predicted))

# %% [markdown]
# However large $S$ becomes, the whole gets at most $1 / (1 - p)$ times faster: the part that stayed
# is the limit. Before you make something fast, ask what share of the time it has.

# %% [markdown]
# ## The tool of the field: a profiler, a timer, a self-test
# `torch.profiler` records every operator with its time. Which of MobileNetV3-small's take the most?

# %% tags=["nbval-ignore-output"]
from torch.profiler import ProfilerActivity, profile
from torchvision.models import mobilenet_v3_small

mobilenet, image = mobilenet_v3_small().eval(), torch.randn(1, 3, 224, 224)
with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as record:
    for _ in range(max(CALLS // 50, 3)):
        mobilenet(image)
table = record.key_averages().table("self_cpu_time_total", row_limit=6, max_name_column_width=28)
print(table.split("Self CPU time total")[0])

# %% [markdown]
# *Self CPU* is the time in the operator itself, without those that it calls: read this column.
# Convolutions come under several names, one a kernel.
#
# Your own timing must agree with the field's timer, or one of the two is wrong:

# %% tags=["nbval-ignore-output"]
yours = np.median([milliseconds(inference) for _ in range(CALLS)])
timer = benchmark.Timer("f()", globals={"f": inference}, num_threads=torch.get_num_threads())
theirs = 1e3 * timer.blocked_autorange(min_run_time=SECONDS / 2).median
print(f"yours {yours:.3f} ms, Timer {theirs:.3f} ms, ratio {yours / theirs:.2f}")

# %% [markdown]
# And how do you know that the instrument is right *on your machine*? Run `course selftest` in a
# terminal when nothing else runs. In two minutes it compares two equal arms, a known ratio, and the
# intervals of ten programs started one after the other. What it found stands on the machine card of
# every chapter from then on.
#
# Energy is another question: `measure.energy` reads the processor's counter where there is one.

# %% [markdown]
# ## If yours shows no gain
# If a later chapter's comparison shows no gain, look here first.
#
# | You see | Because | Look at |
# |---|---|---|
# | *inconclusive* | the interval is wide: the machine is busy, or the difference is small | close other programs, give `seconds=10` |
# | two threads are no faster than one | the layers are too small to share, or the second core is a hyper-thread | batch 1 against batch 64 |
# | fewer MACs, same time | the layer lies under the roofline | its bytes, its page faults, its kernel |
# | a part is faster, the whole is not | Amdahl: the part's share is small | the profiler's table |
# | a laptop gets slower from run to run | it heats up and lowers its clock | interleaved ratios, which cancel it |
# | under a virtual machine or in Colab everything jumps | neighbours share the cores | `clock="cpu"`, one thread |

# %% [markdown]
# ## Myth: time the first call, once, with `time.time()`
# Two *identical* networks, each timed once, as most snippets do:


# %% tags=["nbval-ignore-output"]
def snippet(net, images):
    start = time.time()
    net(images)
    return time.time() - start


twins = [models.mini_resnet(32, seed=5).eval() for _ in range(2)]
fresh = torch.randn(7, 1, 28, 28)  # a batch size that nothing has warmed up yet
print(
    f"“The new network is {snippet(twins[0], fresh) / snippet(twins[1], fresh):.2f} times faster.”"
)
print("Measured:", measure.compare(*(measure.arm(t, fresh) for t in twins), seconds=SECONDS))

# %% [markdown]
# The first network paid for the preparation of the shapes; the second one found it done. And
# `time.time()` is the clock of the calendar: it may be set back while you measure.

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
# 5 minutes. Ask before anyone runs it: what is the p99 of ten calls? (The slowest. Ten calls can't
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
# Half-way through, other programs start to compute. Somebody who times all of A first and all of B
# afterwards sees B "slow down"; somebody who interleaves sees both suffer.

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
    interleaved = ratios(inference, inference, 4 * rounds)
finally:
    for process in load:
        process.kill()
        process.wait()
sequential = np.median(one_after_the_other) / np.median(second)
low, high = interval(interleaved)
print(f"all A, then all B: {sequential:.2f}x")
print(f"A and B in turn:   {np.median(interleaved):.2f}x [{low:.2f}, {high:.2f}]")

# %% [markdown]
# The first number is a verdict on the neighbours. The second should have 1 in its interval, and
# pays for that with its width. If both lie near 1, your machine has cores to spare: start more of
# `burn`.

# %% [markdown]
# ## Further
# Four parts, in any order, each on its own.
#
# **Your own model.** Put a model of yours and an input in place of `mobilenet` and `image`. Does
# *channels_last* make it faster here? Guess before you run it. It asks for inputs (B, C, H, W);
# compare something else if yours are not, for example two batch sizes.

# %% tags=["nbval-ignore-output"]
import copy as copies

my_model, my_input = mobilenet, image
as_it_is = measure.arm(my_model, my_input, "as it is")
last_model = copies.deepcopy(my_model).to(memory_format=torch.channels_last)
last_input = my_input.to(memory_format=torch.channels_last)
measure.across(as_it_is, measure.arm(last_model, last_input, "channels_last"), seconds=2 * SECONDS)

# %% [markdown]
# **The mean.** Imagine a small service. Nineteen requests of twenty carry one image, the twentieth
# carries sixteen. Somebody times them all in one loop and divides by their number.

# %% tags=["nbval-ignore-output"]
one, sixteen = torch.randn(1, 1, 28, 28), torch.randn(16, 1, 28, 28)
many = np.random.default_rng(0).random(2 * CALLS) < 1 / 20
with torch.inference_mode():
    waits = np.array([milliseconds(lambda: model(sixteen if m else one)) for m in many])
tail = {f"p{q}": float(np.percentile(waits, q)) for q in (50, 90, 99)}
print(f"mean {waits.mean():.2f} ms;", {name: f"{ms:.2f} ms" for name, ms in tail.items()})

# %% [markdown]
# p50 is what half of the requests stay under, p99 what all but one in a hundred stay under. Look
# for the mean among them: hardly anybody waits that long. Most wait less, and the one in twenty
# waits far longer. A promise to users is made with p99, a bill for machines with the mean. (In a
# large system there is one more reason for a tail: a request that asks a hundred machines waits for
# the slowest; Dean and Barroso 2013.)

# %% [markdown]
# **A GPU** is asynchronous throughout: `model(x)` returns as soon as the work is queued. Either
# wait for the device, as `torch.utils.benchmark` and `measure.compare` do, or let the device write
# down the time itself, with *events*. And its clock moves with heat and load: a number without the
# clock rate is half a number. If you have a GPU, the next cell shows all three.

# %% tags=["nbval-ignore-output"]
if machine.can("gpu"):
    a = torch.randn(4096, 4096, device="cuda")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    a @ a
    queued = milliseconds(lambda: a @ a)
    finished = milliseconds(lambda: (a @ a, torch.cuda.synchronize()))
    begin.record(), a @ a, end.record()
    torch.cuda.synchronize()
    print(
        f"queued {queued:.3f} ms, finished {finished:.3f} ms, event {begin.elapsed_time(end):.3f}"
    )
    print(f"at {torch.cuda.clock_rate()} MHz")
else:
    print(machine.skip("gpu", "asynchronous timing on a GPU"))

# %% [markdown]
# **A counter does not say how many FLOPs there are.** It counts the operators it knows. In
# inference, PyTorch's transformer layer takes a fast path: one *fused* operator, several in a
# single call, that the counter has never heard of.

# %% tags=["nbval-ignore-output"]
encoder = nn.TransformerEncoderLayer(
    d_model=64, nhead=4, dim_feedforward=128, batch_first=True
).eval()
tokens = torch.zeros(2, 10, 64)  # (B, T, d_model): 20 tokens
on_fast_path = measure.macs(encoder, tokens)
torch.backends.mha.set_fastpath_enabled(False)
counted = measure.macs(encoder, tokens)
torch.backends.mha.set_fastpath_enabled(True)
linear = 20 * 4 * 64 * 64 + 20 * 2 * 64 * 128  # four projections and two layers, each token
print(
    f"on the fast path {on_fast_path:,}; off it {counted:,}; the linear layers by hand {linear:,}"
)

# %% [markdown]
# Nothing warned you. And off the fast path, where is the attention, each token's product with every
# other one? A count is trusted after one layer of each kind has been checked by hand.

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
# · an interval from one process speaks of that process · look once, when you said you would · *no
# difference* and *inconclusive* are results · say threads, batch, dtype and memory format · MACs
# are not time, and a point below the roofline asks for its own reason · Amdahl: look at the share
# before you look at the speed.
#
# **Sources** · G. Amdahl, *Validity of the single processor approach*, 1967 · P. Armitage, C.
# McPherson, B. Rowe, *Repeated significance tests on accumulating data*, 1969 · W. Conover,
# *Practical Nonparametric Statistics*, 1999, §3.2 · S. Williams, A. Waterman, D. Patterson,
# *Roofline*, 2009 · T. Mytkowicz et al., *Producing wrong data without doing anything obviously
# wrong!*, 2009 · T. Kalibera, R. Jones, *Rigorous benchmarking in reasonable time*, 2013 · J. Dean,
# L. Barroso, *The Tail at Scale*, 2013 · N. Ma et al., *ShuffleNet V2*, 2018 · the documentation of
# [torch.utils.benchmark](https://docs.pytorch.org/docs/stable/benchmark_utils.html) and
# [torch.profiler](https://docs.pytorch.org/docs/stable/profiler.html).
#
# **For the capstone** your ledger now holds four claims, and you have the instrument for all
# others. Next: [02 · Training recipe](02_training_recipe.ipynb), where every change must pay for
# itself in seconds or in accuracy.
