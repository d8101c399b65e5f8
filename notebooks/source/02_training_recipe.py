# %% [markdown]
# # 02 · Training recipe
#
# **Which changes to a training loop buy time, which buy accuracy, and which buy nothing?**
#
# After this chapter you can: *split* the seconds of a training run into steps and seconds a step ·
# *find* a learning rate from one short run · *write* a one-cycle schedule · *tell* by five seeds
# whether a change helped · *train* to a stated accuracy in a fraction of a tutorial's time.
#
# 80 minutes · before this: 01 Measurement · runs on any CPU

# %% tags=["parameters"]
import os

PROFILE = os.environ.get("COURSE_PROFILE", "fast")

# %% tags=["nbval-ignore-output"]
import itertools
import math
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from course_utils import claims, data, exercises, machine, measure, models, plots, scratch, training

SMOKE, FULL = PROFILE == "smoke", PROFILE == "full"
SECONDS = {"smoke": 0.1, "fast": 1.5, "full": 8.0}[PROFILE]  # for one comparison
SEEDS = range(3 if SMOKE else 5)
TARGET = 0.3 if SMOKE else 0.75  # of the validation images, right
machine.card()

# %% [markdown]
# ## Recall
# 1. (Chapter 1) Two arms are timed one after the other. Why does this course interleave them
#    instead?
#    <details><summary>Answer</summary>What slows the machine for a while then slows both, and the
#    ratio of a round stays true.</details>
# 2. (Chapter 1) A layer has 8 times fewer multiply–accumulates. What do you know about its time?
#    <details><summary>Answer</summary>Little. If its bytes did not shrink as well, memory limits
#    it, and it gains less than 8.</details>
# 3. (Chapter 1) When may you say *no difference*, and when only *inconclusive*?
#    <details><summary>Answer</summary>No difference: the whole interval lies within the band that
#    counts as the same. Inconclusive: it is wider than that and contains it.</details>
#
# ## Predict
# Below stands a training loop as many tutorials have it. At the end of the chapter the same
# accuracy is reached by another one. How many times sooner? And a second number: replace each
# convolution by a *depthwise separable* one, the kind that [chapter 1](01_measurement.ipynb) timed.
# It needs about a sixth of the multiply–accumulates here. How many times faster is a training step?

# %%
my_speedup = ...
my_depthwise = ...
exercises.predict("02.sooner", my_speedup)
exercises.predict("02.depthwise", my_depthwise)

# %% [markdown]
# ## From scratch: the loop that circulates
# Fashion-MNIST, 12,000 training images. Each image is turned into a picture object, then into a
# tensor, one by one; 64 of them make a batch; plain SGD at a rate of 0.01 does the rest. Nothing
# here is wrong. The images are in three parts, and no image is in two of them: the network learns
# from *training* images, every choice is made on *validation* images, and *test* images give the
# verdicts.

# %%
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

images, labels = data.fashion_mnist("train")
unseen, truth = data.fashion_mnist("validation")
unseen, truth = unseen[:600], truth[:600]  # what is looked at while training


class OneByOne(Dataset):
    """Image for image through PIL and torchvision's transforms, as in most tutorials."""

    def __init__(self, images, labels, *more):
        self.pixels, self.labels = images.numpy(), labels
        self.transform = transforms.Compose([transforms.ToTensor(), *more])

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.pixels[i, 0])), self.labels[i]


# %% [markdown]
# The images are all in memory already. So a whole batch can be indexed and converted at once. Are
# the numbers the same?


# %%
def unit(pixels):
    """uint8 → 0 … 1, what ToTensor does."""
    return pixels.float().div_(255)


def shuffled(count, seed, size):
    """Index batches, epoch after epoch, in an order that the seed alone decides."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator)[: count // size * size].split(size)


def in_memory(prepare, seed=0, size=64):
    for index in shuffled(len(images), seed, size):
        yield prepare(images[index]), labels[index]


order = torch.cat(list(itertools.islice(shuffled(len(images), 0, 64), 20)))
loader = DataLoader(OneByOne(images, labels), batch_size=64, sampler=order.tolist())
pairs = list(zip(loader, in_memory(unit), strict=False))
print(
    all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in pairs), len(pairs), "batches"
)

# %% [markdown]
# Bit for bit the same batches. Whatever the network learns from one, it learns from the other; only
# the seconds differ. Now the loop itself, with a clock that stops while accuracy is looked at.


# %%
def accuracy(net, prepare):
    with torch.inference_mode():
        net.eval()
        right = [
            (net(prepare(x)).argmax(1) == y)
            for x, y in zip(unseen.split(200), truth.split(200), strict=True)
        ]
    net.train()
    return float(torch.cat(right).float().mean())


def train(net, batches, optimizer, steps, schedule=None, prepare=None, target=None, every=50):
    """Up to `steps` steps; with a target, stop once validation accuracy reaches it. Returns (steps,
    seconds).
    """
    seconds, batches = 0.0, iter(batches)
    net.train()
    for step in range(1, steps + 1):
        start = time.perf_counter()
        x, y = next(batches)
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule:
            schedule.step()
        seconds += time.perf_counter() - start
        if target and step % every == 0 and accuracy(net, prepare) >= target:
            break
    return step, seconds


# %% [markdown]
# One equation holds the chapter together:
#
# $$\text{seconds to an accuracy} = \text{steps} \times \text{seconds a step}$$
#
# Each change below acts on one factor or on the other, and a few on both, in opposite directions.
#
# ## Measure: getting the data ready
# What does one image cost before it reaches the network? `num_workers` starts processes that
# prepare batches beside the training.

# %% tags=["nbval-ignore-output"]
COUNT = 256 if SMOKE else 2048
part = OneByOne(images[:COUNT], labels[:COUNT])


def pass_over(loader):
    start = time.perf_counter()
    for _ in loader:
        pass
    return 1e6 * (time.perf_counter() - start) / COUNT


def batches_once():
    return (unit(images[index]) for index in torch.arange(COUNT).split(64))


fork = {"multiprocessing_context": "fork"}  # a class from a notebook can't reach a spawned process
cost = {
    "in memory, a batch at once": measure.median_interval(
        [pass_over(batches_once()) for _ in range(9)]
    )
}
for workers in (0, 1, 2) if sys.platform == "linux" else (0,):
    way = fork | {"persistent_workers": True} if workers else {}
    loader = DataLoader(part, batch_size=64, num_workers=workers, **way)
    times = [pass_over(loader) for _ in range(9)][1:]  # the first pass starts the workers
    cost[f"one by one, workers: {workers}"] = measure.median_interval(times)
del loader
most, least = max(c.value for c in cost.values()), min(c.value for c in cost.values())
plots.bars(
    cost,
    xlabel="microseconds an image, data alone",
    logx=True,
    title=f"The dearest way to the same bits costs {most / least:.0f} times the cheapest",
    alt=(
        "Microseconds an image on a logarithmic axis: in memory is far below the three ways one by"
        " one."
    ),
)

# %% [markdown]
# The axis is logarithmic. The network sees identical numbers in all rows. Workers share the dear
# way out among processes; the top row does not do it at all. And on a machine whose cores are busy
# with the network, workers take from the network what they give to the data. So the claim must be
# tested with training beside it.


# %% tags=["nbval-ignore-output"]
def an_epoch(workers):
    net = models.mini_resnet(16, seed=0).train()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    way = fork | {"persistent_workers": True} if workers else {}
    loader = DataLoader(small_part, batch_size=64, num_workers=workers, **way)

    def call():
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()

    return call


small_part = OneByOne(images[: 128 if SMOKE else 384], labels)
if sys.platform == "linux" and machine.can("two cores"):
    arms = measure.Arm(an_epoch(0), "no workers"), measure.Arm(an_epoch(2), "two workers")
    workers = measure.across(*arms, seconds=SECONDS, processes=6)
    print(workers)
elif sys.platform == "linux":
    workers = machine.skip("two cores", "DataLoader workers")
else:
    workers = machine.Skip(
        "system", "a notebook's class can't be sent to workers here: they are spawned, not forked."
    )
claims.verdict("02.more_workers_are_faster", workers)

# %% [markdown]
# If it holds on yours: two workers hide some of a cost that you need not have. If it does not: the
# workers and the network want the same cores. Either way the better answer is the top row of the
# figure.
#
# ## Measure: what normalising moves
# *Standardising* subtracts the mean pixel and divides by the standard deviation, so that inputs
# have mean 0 and deviation 1. It is said to speed up convergence. Look at a whole row of learning
# rates before you believe it, and at two networks: a plain convolutional one, and the course's,
# which has a BatchNorm after each convolution. *BatchNorm* standardises each channel over the
# batch, and then multiplies and shifts it by two learned numbers (Ioffe and Szegedy 2015).


# %%
def plain(seed):
    torch.manual_seed(seed)
    front = [
        nn.Conv2d(1, 8, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
    ]
    return nn.Sequential(*front, nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


def with_batchnorm(seed):
    return models.mini_resnet(8, seed=seed)


inputs = {"0 … 255": lambda u: u.float(), "0 … 1": unit, "standardised": models.normalise}


def short_run(make, prepare, rate, seed=0, steps=10 if SMOKE else 50):
    """Accuracy in percent after a few steps: what a learning rate is worth at the start."""
    net = make(seed)
    optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9)
    train(net, in_memory(prepare, seed), optimizer, steps)
    return 100 * accuracy(net, prepare)


# %% tags=["nbval-ignore-output"]
rates = [1e-3, 1e-1] if SMOKE else [1e-4, 1e-3, 1e-2, 1e-1, 1]
grid = {
    make: {n: [short_run(make, p, r) for r in rates] for n, p in inputs.items()}
    for make in (plain, with_batchnorm)
}


def first_usable(values):
    """The lowest rate of the grid that reaches half of the row's best accuracy."""
    return next(r for r, v in zip(rates, values, strict=True) if v >= max(values) / 2)


first = {make: [first_usable(v) for v in rows.values()] for make, rows in grid.items()}
spread = {make: max(f) / min(f) for make, f in first.items()}
figure, panels = plots.axes(
    "learning rate",
    "validation accuracy (%)",
    columns=2,
    title=(
        f"Usable from rates {spread[plain]:g}x apart without BatchNorm, {spread[with_batchnorm]:g}x"
        " apart with it"
    ),
)
for panel, (make, rows), name in zip(
    panels, grid.items(), ("no normalisation inside", "BatchNorm inside"), strict=True
):
    for i, (label, values) in enumerate(rows.items()):
        panel.semilogx(rates, values, marker=plots.MARKERS[i], color=plots.COLOURS[i], label=label)
    panel.set(ylim=(0, 100))
    panel.set_title(name, fontsize=10)
panels[0].legend(title="input", fontsize=8)
plots.show(
    figure,
    "Accuracy against learning rate for three input scales: three shifted curves in the left panel"
    " without BatchNorm; three curves close together in the right panel with BatchNorm.",
)

# %% [markdown]
# Left: each input has its own window of usable rates, and the windows lie orders of magnitude
# apart. The gradient of a first layer is proportional to its input, so pixels 255 times larger want
# a far smaller rate. Standardised input has its window where people look for it, near 0.1 and 0.01.
# That is what normalising does: it *moves the usable learning rate* to the usual place.
#
# Right: the three curves lie nearly on each other. BatchNorm divides by the deviation of what it
# gets, so a factor of 255 in the input is gone after the first layer. You can see it without a
# figure. The gradients of the first weights are the same, up to `eps`, the small number that keeps
# BatchNorm from dividing by zero, and that the next cell makes still smaller.


# %%
def first_gradient(prepare):
    """Of the loss with respect to the first weights, in 64 bits."""
    net = with_batchnorm(0).double().train()
    net.stem[1].eps = 1e-12
    F.cross_entropy(net(prepare(images[:64]).double()), labels[:64]).backward()
    return net.stem[0].weight.grad


raw, scaled = first_gradient(inputs["0 … 255"]), first_gradient(unit)
print("the same within a millionth:", bool((raw - scaled).norm() < 1e-6 * scaled.norm()))


# %% tags=["nbval-ignore-output"]
def gain(make):
    """Points gained by standardising at one fixed rate, a pair a seed."""
    pairs = [[short_run(make, p, 0.01, seed) for p in (unit, models.normalise)] for seed in SEEDS]
    return measure.paired_t([after - before for before, after in pairs], "points")


claims.verdict("02.normalising_speeds_convergence", gain(plain))

# %% tags=["nbval-ignore-output"]
claims.verdict("02.normalising_helps_with_batchnorm", gain(with_batchnorm))

# %% [markdown]
# One sentence, two verdicts. The sentence leaves out the network.
#
# Each verdict stands on five *paired* seeds: in a pair, both arms start from the same weights and
# see the same batches, and only their difference counts, in percentage points. The interval is
# Student's t for the mean of these differences.
#
# ## Measure: a learning-rate range test
# Nobody has to guess the rate. Let it grow by a constant factor from step to step, from far too
# small to far too large, in one run of a hundred steps, and write down the loss (Smith 2017).


# %% tags=["nbval-ignore-output"]
def range_test(net, batches, low=1e-3, high=3.0, steps=100):
    """(rates, losses) of one run in which the rate grows from low to high."""
    optimizer = torch.optim.SGD(net.parameters(), low, momentum=0.9, nesterov=True)
    rates, losses = np.geomspace(low, high, steps), []
    net.train()
    for rate, (x, y) in zip(rates, batches, strict=False):
        optimizer.param_groups[0]["lr"] = rate
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return rates, np.array(losses)


tried, losses = range_test(
    models.mini_resnet(16, seed=0), in_memory(models.normalise), steps=30 if SMOKE else 100
)
smooth = np.convolve(np.pad(losses, 4, mode="edge"), np.ones(9) / 9, mode="valid")
lowest = float(tried[int(np.argmin(smooth))])
plots.lines(
    tried,
    {"one step's loss": losses, "mean of nine": smooth},
    xlabel="learning rate",
    ylabel="loss",
    logx=True,
    title=f"The loss is lowest near {lowest:.2g}; a safe rate is a third to a tenth of that",
    alt=(
        "Loss against a growing learning rate: flat, then falling, a valley, then rising and noisy."
    ),
)

# %% [markdown]
# Read it from left to right. Flat: the rate is too small to move anything in a step. Falling: it
# learns. Then the valley, and to its right steps so long that they undo each other. Do not take the
# valley's floor: the loss there is still the work of the smaller rates before it. A third to a
# tenth of it is the cautious choice for a rate that stays constant. This chapter uses 0.1 with
# schedules that soon come down from it. In a flat valley, such choices are about equally good.
#
# ## Measure: schedules over five seeds
# A schedule changes the rate during training. *Decay* lets it fall, here along half a cosine. A
# *warm-up* lets it rise first. *One-cycle* does both: a warm-up for a quarter of the steps, then
# the cosine (Smith 2018). Every schedule gets the same five seeds: the same weights at the start,
# the same batches.

# %%
STEPS = 16 if SMOKE else 120


def cosine(step):  # the factor on the rate, 1 → 0
    return 0.5 * (1 + math.cos(math.pi * step / STEPS))


lambdas = {"constant": lambda step: 1.0, "cosine": cosine}


def scheduled(optimizer, name, rate, steps=STEPS):
    if name == "one-cycle":
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, rate, total_steps=steps + 1, pct_start=0.25
        )
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambdas[name])


def run(name, seed, rate=0.1, width=8):
    net = models.mini_resnet(width, seed=seed)
    optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9, nesterov=True)
    train(
        net, in_memory(models.normalise, seed), optimizer, STEPS, scheduled(optimizer, name, rate)
    )
    return net.eval()


# %% tags=["nbval-ignore-output"]
test_images, test_labels = (t[: 500 if SMOKE else 2000] for t in data.fashion_mnist("test"))


def score(net):
    return 100 * training.accuracy(net, test_images, test_labels)


names = [*lambdas, "one-cycle"]
results = {
    n: [score(run(n, seed)) for seed in SEEDS] for n in tqdm(names, desc="schedules", leave=False)
}
against = {
    n: measure.paired_t(np.subtract(results[n], results["constant"]), "points") for n in names[1:]
}
plots.seeds(
    results,
    ylabel="test accuracy (%)",
    title="Against a constant rate: "
    + ", ".join(f"{n} {a.value:+.1f}" for n, a in against.items()),
    alt="Test accuracy of five seeds under three schedules; each seed's points are joined.",
)
for name, difference in against.items():
    seen = "no effect seen" if difference.low <= 0 <= difference.high else "an effect"
    print(f"{name:16} minus constant: {difference}: {seen}")

# %% tags=["nbval-ignore-output"]
claims.verdict("02.learning_rate_decay_helps", against["cosine"])

# %% tags=["nbval-ignore-output"]
warm = measure.paired_t(np.subtract(results["one-cycle"], results["cosine"]), "points")
claims.verdict("02.warmup_helps", warm)

# %% [markdown]
# Each grey line is one seed. If the lines rise from *constant* to *cosine* for every seed, decay
# helps; a small rate at the end lets the weights settle where a large one shakes them about. If the
# lines between *cosine* and *one-cycle* cross each other, you see no effect of the warm-up, and the
# verdict says so. Goyal et al. (2017) needed it for batches of thousands; a batch of 64 at a
# moderate rate starts gently enough. A schedule that did nothing at this rate may still save a run
# at another: see *Break it*.
#
# ## Measure: the right size
# A bigger network learns more in a step and takes longer for it. So compare at the same *seconds*:
# measure the step of each width, give each as many steps as fit, and plan the schedule for that
# many.


# %% tags=["nbval-ignore-output"]
def stepper(net, size=64, channels_last=False, bf16=False):
    """A training step on one fixed batch as a callable, for timing."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net, x, y = net.to(memory_format=layout).train(), models.normalise(images[:size]), labels[:size]
    x, optimizer = (
        x.contiguous(memory_format=layout),
        torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9),
    )

    def call():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return call


BUDGET = {"smoke": 0.1, "fast": 0.8, "full": 8.0}[PROFILE]  # seconds of training
WIDTHS = (8, 16, 32)
step_seconds = {
    w: measure.latency(stepper(models.mini_resnet(w)), seconds=SECONDS / 4).p50 for w in WIDTHS
}
fit_in = {w: max(8, round(BUDGET / s)) for w, s in step_seconds.items()}


def in_budget(width, seed):
    net, steps = models.mini_resnet(width, seed=seed), fit_in[width]
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, nesterov=True)
    schedule = scheduled(optimizer, "one-cycle", 0.1, steps)
    train(net, in_memory(models.normalise, seed), optimizer, steps, schedule)
    return score(net.eval())


# %% tags=["nbval-ignore-output"]
sizes = {
    f"width {w}\n{fit_in[w]} steps": [in_budget(w, seed) for seed in SEEDS]
    for w in tqdm(WIDTHS, desc="widths", leave=False)
}
by_width = dict(zip(WIDTHS, sizes.values(), strict=True))
winner = max(WIDTHS, key=lambda w: np.mean(by_width[w]))
plots.seeds(
    sizes,
    ylabel="test accuracy (%)",
    title=(
        f"In {BUDGET:g} s of training, width {winner} gets furthest:"
        f" {np.mean(by_width[winner]):.1f}%"
    ),
    alt="Test accuracy of five seeds for three widths that trained for the same seconds.",
)
smaller = measure.paired_t(np.subtract(by_width[16], by_width[32]), "points")
claims.verdict("02.smaller_beats_bigger_per_second", smaller)

# %% [markdown]
# Too narrow, and the network can't use its many steps; too wide, and it gets too few. Give all of
# them ten times as long, as `full` does, and a wider one can win: the right size belongs to a
# budget, not to a data set.
#
# ## Measure: fewer multiply–accumulates, and the step?
# [Chapter 1](01_measurement.ipynb) timed one *depthwise separable* layer (Howard et al. 2017),
# forwards only: a 3 by 3 convolution of each channel on its own, then a 1 by 1 convolution that
# mixes channels. Now a network of them takes a whole training step, forwards and backwards.


# %%
class Separable(nn.Module):
    def __init__(self, conv):
        super().__init__()
        inner, outer = conv.in_channels, conv.out_channels
        self.depthwise = nn.Conv2d(inner, inner, 3, conv.stride, 1, groups=inner, bias=False)
        self.pointwise = nn.Conv2d(inner, outer, 1, bias=False)

    def forward(self, x):  # (B, inner, H, W) → (B, outer, H/stride, W/stride)
        return self.pointwise(self.depthwise(x))


def separable(width, seed=0):
    net = models.mini_resnet(width, seed=seed)
    for block in net.stages:
        block.conv1, block.conv2 = Separable(block.conv1), Separable(block.conv2)
    return net


one_image = torch.zeros(1, 1, 28, 28)
fewer = measure.macs(models.mini_resnet(16), one_image) / measure.macs(separable(16), one_image)
print(f"{fewer:.2f} times fewer multiply–accumulates")

# %% tags=["nbval-ignore-output"]
steps_apart = {}
for layout in ("contiguous", "channels_last"):
    arms = [
        measure.Arm(
            stepper(net, channels_last=layout == "channels_last"), n, batch=64, memory_format=layout
        )
        for n, net in (("dense", models.mini_resnet(16)), ("separable", separable(16)))
    ]
    steps_apart[layout] = measure.across(*arms, seconds=SECONDS)
    print(steps_apart[layout])
depthwise = steps_apart["contiguous"]
exercises.reveal("02.depthwise", depthwise.ratio, "times faster a step")

# %% tags=["nbval-ignore-output"]
plots.intervals(
    {"the arithmetic saved": measure.Interval(fewer, fewer, fewer)}
    | {f"a step, {n}": c.interval for n, c in steps_apart.items()},
    xlabel="speed-up of the separable network (x)",
    same=(1 / 1.03, 1.03),
    title=f"{fewer:.1f} times less arithmetic, the step {depthwise.ratio:.2f}x",
    alt="The ratio of arithmetic far to the right, the measured speed-ups of a step far below it.",
)
share = measure.derive(lambda s: s / fewer, depthwise.interval)
claims.verdict("02.depthwise_is_faster_by_its_macs", share)

# %% [markdown]
# A depthwise filter does nine multiplications for each number it reads. That is little work for the
# bytes it moves, and there are now two layers in place of one, each of which writes its result to
# memory and keeps it for the backward pass. On many processors the step gains a small part of what
# the arithmetic promises, or comes out *slower*. Count bytes before you count multiplications: that
# is the roofline of [chapter 1](01_measurement.ipynb).
#
# ## Measure: layout and precision
# `channels_last` stores the channels of a pixel side by side, which is how many convolution kernels
# want them; *contiguous*, the usual format, stores one channel's pixels side by side. bf16 is a
# floating-point number of 16 bits. It halves the bytes of a number, and is fast where the processor
# has an instruction for it ([chapter 7](07_mixed_precision.ipynb)).

# %% tags=["nbval-ignore-output"]
reference = measure.Arm(stepper(models.mini_resnet(16)), "contiguous, fp32")
layouts = {
    "channels_last": stepper(models.mini_resnet(16), channels_last=True),
    "channels_last and bf16": stepper(models.mini_resnet(16), channels_last=True, bf16=True),
}
cheaper = {
    n: measure.across(reference, measure.Arm(call, n), seconds=SECONDS)
    for n, call in layouts.items()
}
plots.intervals(
    {n: c.interval for n, c in cheaper.items()},
    xlabel="speed-up of a training step (x)",
    title=", ".join(f"{n}: {c.ratio:.2f}x" for n, c in cheaper.items()),
    alt=(
        "Speed-up of a training step by channels_last and by channels_last with bf16, with"
        " intervals."
    ),
)
print("bf16 instruction:", "yes" if machine.can("bf16") else machine.can("bf16"))
claims.verdict("02.channels_last_is_faster", cheaper["channels_last"])

# %% [markdown]
# ## Measure: all changes, one at a time
# Now the ladder. Each rung keeps what stood below it. The first two rungs take the same steps,
# because their batches are the same bits; only the second is trained, and the price of preparing
# images one by one, measured above, is added for the first. The second rung and the last are
# trained with three seeds (five in `full`), those between with one. All have width 8.

# %%
LAST = {"size": 128, "channels_last": True}  # what the last rung adds to the batches
RUNGS = {  # name: (what prepares, rate, momentum, one-cycle, more)
    "batches in memory": (unit, 0.01, 0.0, False, {}),
    "rate 0.1, momentum": (unit, 0.1, 0.9, False, {}),
    "standardised": (models.normalise, 0.1, 0.9, False, {}),
    "one-cycle": (models.normalise, 0.1, 0.9, True, {}),
    "batch 128, channels_last": (models.normalise, 0.1, 0.9, True, LAST),
}


def to_target(prepare, rate, momentum, cycle, more, seed=0):
    """(steps, seconds) of one run until TARGET of the validation images are right, or until its
    images are spent.
    """
    layout = torch.channels_last if more else torch.contiguous_format
    net = models.mini_resnet(8, seed=seed).to(memory_format=layout)
    optimizer = torch.optim.SGD(net.parameters(), rate, momentum, nesterov=momentum > 0)
    size = more.get("size", 64)
    limit = (16_000 if cycle else 120_000) // size
    schedule = scheduled(optimizer, "one-cycle", rate, limit) if cycle else None
    batches = ((x.contiguous(memory_format=layout), y) for x, y in in_memory(prepare, seed, size))
    every = 2000 // size  # look after the same number of images
    steps, seconds = train(net, batches, optimizer, limit, schedule, prepare, TARGET, every)
    if steps == limit:
        print(
            f"{limit} steps were not enough with rate {rate} and seed {seed}: its time is counted"
            " in full"
        )
    return steps, seconds


# %% tags=["nbval-ignore-output"]
ladder = {}
for name, rung in tqdm(RUNGS.items(), desc="rungs", leave=False):
    ends = name in (next(iter(RUNGS)), list(RUNGS)[-1])
    ladder[name] = [to_target(*rung, seed) for seed in (range(5 if FULL else 3) if ends else [0])]
dear = (
    cost["one by one, workers: 0"].value - cost["in memory, a batch at once"].value
) / 1e6  # seconds an image
first = [(steps, seconds + dear * 64 * steps) for steps, seconds in ladder["batches in memory"]]
ladder = {"tutorial's loop": first} | ladder
for name, runs in ladder.items():
    steps, seconds = (float(np.median(column)) for column in zip(*runs, strict=True))
    print(f"{name:26} {steps:5.0f} steps x {1e3 * seconds / steps:5.1f} ms = {seconds:6.2f} s")

# %% [markdown]
# ## Explain: two factors
# Put the rungs into a plane: steps to the right, seconds a step upwards. Every point on a dashed
# line takes the same time.

# %% tags=["nbval-ignore-output"]
figure, ax = plots.axes(
    "steps to the accuracy",
    "milliseconds a step",
    height=4.2,
    title=(
        f"To {TARGET:.0%}: from {np.median([s for _, s in first]):.0f} s to"
        f" {np.median([s for _, s in ladder[list(RUNGS)[-1]]]):.1f} s"
    ),
)
middle = np.array([np.median(runs, axis=0) for runs in ladder.values()])
at = np.column_stack([middle[:, 0], 1e3 * middle[:, 1] / middle[:, 0]])
ax.plot(*at.T, color="0.6", linewidth=1, zorder=1)
for i, (name, point) in enumerate(zip(ladder, at, strict=True)):
    ax.plot(
        *point,
        plots.MARKERS[i],
        color=plots.COLOURS[i],
        markersize=8,
        label=f"{name} ({middle[i, 1]:.1f} s)",
    )
across = np.geomspace(at[:, 0].min() / 2, at[:, 0].max() * 2, 50)
for total in np.geomspace(middle[:, 1].min(), middle[:, 1].max(), 4):
    ax.plot(across, 1e3 * total / across, "--", color="0.8", linewidth=1, zorder=0)
ax.set(xlim=(across[0], across[-1]), ylim=(at[:, 1].min() / 1.6, at[:, 1].max() * 1.6))
plots.plain_log(ax.xaxis)
plots.plain_log(ax.yaxis)
ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
plots.show(
    figure,
    "Rungs of the ladder in a plane of steps against milliseconds a step, with dashed lines of"
    " equal time; the path leads down first, then far to the left.",
)

# %% [markdown]
# Going *down* is engineering: the same learning, cheaper steps. Data in memory and the layout do
# that. Going *left* is the recipe: fewer steps to the same place. The rate with momentum does most
# of it. A larger batch goes left and *up* at once, and gains only as far as the kernels like it. On
# yours a rung may have gained nothing, or lost; then its point lies on the same dashed line as the
# one before, or on the dearer side of it, and you may leave that change out. The rungs between have
# one seed each: a small difference between them is not told apart from luck.

# %% tags=["nbval-ignore-output"]
logs = [math.log(a / b) for (_, a), (_, b) in zip(first, ladder[list(RUNGS)[-1]], strict=True)]
in_log = measure.paired_t(logs)
sooner = measure.Interval(*(math.exp(v) for v in (in_log.value, in_log.low, in_log.high)), "x")
exercises.reveal("02.sooner", sooner.value, "times sooner")
claims.verdict("02.recipe_reaches_accuracy_sooner", sooner)

# %% [markdown]
# ## If yours shows no gain
# | You see | Because | Look at |
# |---|---|---|
# | `channels_last` gains nothing | very few channels, or kernels that reorder by themselves | the width; the figure of layouts |
# | bf16 is much slower | no bf16 instruction: it is emulated | the machine card; chapter 7 |
# | two workers are slower than none | they compete with the network for the cores, and copies travel between processes | the figure of microseconds an image |
# | standardising changes nothing | a normalisation layer does it already | the right panel above |
# | no schedule differs from constant | the run is too short, or the rate so small that it needs no decay | longer runs; the range test |
# | the separable network is faster as promised | your kernels, or a wide network, have more arithmetic to save | width 32, another layout |
#
# ## Myth: a one-cycle schedule stepped once an epoch
# `OneCycleLR` counts *batches*. Most loops call `scheduler.step()` at the end of an epoch, as older
# schedules want it. Nothing complains.


# %%
def rates_seen(step_every):
    """The rates of a run of 4 epochs of 25 batches, with the schedule stepped every so many
    batches.
    """
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs=4, steps_per_epoch=25)
    seen = []
    for batch in range(100):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if (batch + 1) % step_every == 0 and batch < 99:
            schedule.step()
    return seen


for name, every in (("each batch", 1), ("each epoch", 25)):
    print(
        f"stepped after {name}: highest rate {max(rates_seen(every)):.4f}, last"
        f" {rates_seen(every)[-1]:.7f}"
    )

# %% [markdown]
# Stepped once an epoch, the rate never leaves the warm-up: the network trains at less than a tenth
# of the rate you asked for, and the accuracy looks merely a bit poor. Print the rates of a schedule
# before you use it. The opposite mistake at least says so:

# %%
with exercises.fails(ValueError):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    for _ in range(12):
        optimizer.step()
        schedule.step()

# %% [markdown]
# ## Myth: evaluate as you train
# Leave out `net.eval()`, and BatchNorm normalises by the batch it happens to see. Sort the images
# by class, as a folder on disk does, and ask for the accuracy in batches.

# %% tags=["nbval-ignore-output"]
shipped = models.baseline()
by_class = truth.argsort()
for mode in (True, False):
    shipped.train(mode)
    for name, index in (("shuffled", torch.randperm(len(truth))), ("sorted by class", by_class)):
        with torch.no_grad():
            answers = torch.cat(
                [shipped(models.normalise(unseen[i])).argmax(1) for i in index.split(50)]
            )
        print(
            f"{'train' if mode else 'eval'} mode, {name:15}"
            f" {float((answers == truth[index]).float().mean()):.1%}"
        )
shipped = models.baseline()  # those passes have also moved the running means

# %% [markdown]
# In train mode the accuracy depends on who stands beside whom, and every forward pass changes the
# running statistics, so the network is another one afterwards. In eval mode both lines must be
# equal.
#
# ## Reproducibility
# One seed for the weights, one for the order. Is a second run the same, bit for bit? And with
# another number of threads?


# %% tags=["nbval-ignore-output"]
def weights_after(threads, seed=0):
    with torch.random.fork_rng(devices=[]):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        net = models.mini_resnet(8, seed=seed)
        train(
            net, in_memory(models.normalise, seed), torch.optim.SGD(net.parameters(), 0.1, 0.9), 20
        )
        torch.set_num_threads(before)
    return torch.cat([p.detach().flatten() for p in net.parameters()])


here = torch.get_num_threads()
print("the same seed again, equal bits:", torch.equal(weights_after(here), weights_after(here)))
apart = (weights_after(here) - weights_after(1 if here > 1 else 2)).abs().max()
print(f"another number of threads: weights differ by up to {float(apart):.2g} after 20 steps")
print(
    "another seed:              by up to"
    f" {float((weights_after(here) - weights_after(here, 1)).abs().max()):.2g}"
)

# %% [markdown]
# On a CPU the same program on the same machine usually repeats its bits. Another number of threads
# adds in another order; each sum changes in its last digit, and training amplifies it. So do
# another processor and another version. On a GPU some kernels add in random order;
# `torch.use_deterministic_algorithms(True)` refuses those. A result that needs equal bits to be
# true is none: report several seeds.
#
# ## Exercise A · standardise
# Complete the line. `standardise(train, x)` maps uint8 images `x` so that the *training* images get
# mean 0 and standard deviation 1 over all their pixels. `x` may be any images; the map comes from
# `train` alone. If all pixels of `train` are equal, nothing may become infinite or *not a number*.
# For `train` with pixels `[0, 255]`, half of each, a right answer maps 0 to −1 and 255 to 1.


# %% tags=["exercise"]
def standardise(train, x):
    mean, std = ...
    return (x.float() - mean) / std


# %%
exercises.check("02.A", standardise)

# %% [markdown] tags=["hint"]
# Whose mean? The test images' own mean is not known when one image arrives.

# %% [markdown] tags=["hint"]
# `std` of equal pixels is 0. What could you divide by in that case?


# %% tags=["solution"]
def standardise(train, x):
    mean, std = train.float().mean(), train.float().std(correction=0)
    return (x.float() - mean) / (std if std > 0 else 1.0)


# %% tags=["wrong"]
# The statistics of whatever is passed: a dark image and a bright one become the same.
def standardise(train, x):
    mean, std = x.float().mean(), x.float().std(correction=0)
    return (x.float() - mean) / (std if std > 0 else 1.0)


# %% tags=["wrong"]
# Divides by the variance.
def standardise(train, x):
    mean, std = train.float().mean(), train.float().var(correction=0)
    return (x.float() - mean) / (std if std > 0 else 1.0)


# %% tags=["wrong"]
# Equal pixels: division by zero, the edge.
def standardise(train, x):
    mean, std = train.float().mean(), train.float().std(correction=0)
    return (x.float() - mean) / std


# %% tags=["wrong"]
# Fixed to 0 … 1: right scale for nobody's data.
def standardise(train, x):
    return x.float() / 255


# %% [markdown] tags=["instructor"]
# 6 minutes. Ask what changes if the mean is taken per pixel position: a pixel that is always black
# has deviation 0, the edge case is then the rule.

# %% [markdown]
# ## Exercise B · one-cycle
# Write `one_cycle(step, total, max_lr, warmup)`: the rate in step `0 … total − 1`. It starts at
# `max_lr / 25`, rises along half a cosine to `max_lr`, which it reaches at step `warmup · total −
# 1` (this may lie between two steps), and falls along half a cosine to the first rate divided by
# 10,000 in the last step. From $a$ to $b$, half a cosine at share $u$ of the way is $b + \frac{a -
# b}{2}(1 + \cos \pi u)$. `one_cycle(0, 100, 1.0, 0.3)` is `0.04`. It must agree with torch's in
# every step.


# %% tags=["exercise"]
def one_cycle(step, total, max_lr, warmup): ...


# %%
exercises.check("02.B", one_cycle)

# %% [markdown] tags=["hint"]
# Let `peak = warmup * total - 1`. Before it the share of the way is `step / peak`; after it, `(step
# - peak) / (total - 1 - peak)`.

# %% [markdown] tags=["hint"]
# The last rate is `max_lr / 25 / 10_000`: the *first* rate divided by 10,000, not the highest.


# %% tags=["solution"]
def one_cycle(step, total, max_lr, warmup):
    def half_cosine(a, b, u):
        return b + (a - b) / 2 * (1 + math.cos(math.pi * u))

    start, peak = max_lr / 25, warmup * total - 1
    if step <= peak:
        return half_cosine(start, max_lr, step / peak)
    return half_cosine(max_lr, start / 10_000, (step - peak) / (total - 1 - peak))


# %% tags=["wrong"]
# Straight lines in place of cosines: right at the ends only.
def one_cycle(step, total, max_lr, warmup):
    start, peak = max_lr / 25, warmup * total - 1
    if step <= peak:
        return start + (max_lr - start) * step / peak
    return max_lr + (start / 10_000 - max_lr) * (step - peak) / (total - 1 - peak)


# %% tags=["wrong"]
# The peak one step late.
def one_cycle(step, total, max_lr, warmup):
    def half_cosine(a, b, u):
        return b + (a - b) / 2 * (1 + math.cos(math.pi * u))

    start, peak = max_lr / 25, warmup * total
    if step <= peak:
        return half_cosine(start, max_lr, step / peak)
    return half_cosine(max_lr, start / 10_000, (step - peak) / (total - 1 - peak))


# %% tags=["wrong"]
# The last rate is the highest divided by 10,000: visible in the last step alone.
def one_cycle(step, total, max_lr, warmup):
    def half_cosine(a, b, u):
        return b + (a - b) / 2 * (1 + math.cos(math.pi * u))

    start, peak = max_lr / 25, warmup * total - 1
    if step <= peak:
        return half_cosine(start, max_lr, step / peak)
    return half_cosine(max_lr, max_lr / 10_000, (step - peak) / (total - 1 - peak))


# %% tags=["wrong"]
# Starts at zero, as many warm-ups do.
def one_cycle(step, total, max_lr, warmup):
    def half_cosine(a, b, u):
        return b + (a - b) / 2 * (1 + math.cos(math.pi * u))

    start, peak = max_lr / 25, warmup * total - 1
    if step <= peak:
        return half_cosine(0.0, max_lr, step / peak)
    return half_cosine(max_lr, start / 10_000, (step - peak) / (total - 1 - peak))


# %% [markdown] tags=["instructor"]
# 15 minutes. Let the room plot it with `plots.lines`. Who has the peak one step late learns why a
# test compares every step.

# %% [markdown]
# ## Exercise C · an accuracy within a budget of seconds
# Write `train_within(images, labels, seconds)`. It gets 4,000 uint8 images with labels and returns
# a network in eval mode for normalised images (`models.normalise`). It may take `seconds` and
# finish the step that is under way when they are over, and not less than three quarters of them:
# about 100 steps of `models.mini_resnet(8)` with 64 images. The classes have new numbers, and all
# images are turned or mirrored alike, the unseen ones too, so that only what you train on them
# counts.
#
# So that a busy machine cannot fail you, the clocks that your function reads (`time.perf_counter`
# and its like) advance with the work that torch does in it, not with the wall clock; the machine
# they pretend may be ten times as slow as yours, or as fast. A right answer gets 72 of 100 unseen
# images right, and is on time, too, when `seconds` is ten steps long or one.


# %% tags=["exercise"]
def train_within(images, labels, seconds): ...


# %%
exercises.check("02.C", train_within)

# %% [markdown] tags=["hint"]
# You do not know how many steps fit. But you know at every moment which share of the time is spent:
# let the schedule run on the clock in place of the step count.

# %% [markdown] tags=["hint"]
# `rate = 0.1 * min(1, 5 * u) * (1 - u)` rises and falls while the share `u` of the time goes from 0
# to 1. Set it by `optimizer.param_groups[0]["lr"] = rate`. Stop at about 0.95 of the time.

# %% [markdown] tags=["hint"]
# BatchNorm's running averages take a tenth of each new batch: after a hundred steps they still lag
# behind weights that move fast. Its `momentum` says how much they take. And one bad step costs ten
# good ones: `nn.utils.clip_grad_norm_` shortens it.


# %% tags=["solution"]
def train_within(images, labels, seconds):
    import time

    from course_utils import models

    start = time.perf_counter()
    net = models.mini_resnet(8)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.25
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.8, nesterov=True)
    while (u := (time.perf_counter() - start) / seconds) < 0.95:
        optimizer.param_groups[0]["lr"] = 0.2 * min(1, 5 * u + 0.1) * (1 - u)
        index = torch.randint(0, len(images), (64,))
        loss = F.cross_entropy(net(models.normalise(images[index])), labels[index])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return net.eval()


# %% tags=["wrong"]
# Never looks at the clock: one epoch whatever it takes; the edge is the shortest budget.
def train_within(images, labels, seconds):
    from course_utils import models, training

    net = models.mini_resnet(8)
    training.fit(net, images, labels, training.Recipe(epochs=1, batch_size=64), progress=False)
    return net


# %% tags=["wrong"]
# On time, at the tutorial's rate: not far enough.
def train_within(images, labels, seconds):
    import time

    from course_utils import models

    start = time.perf_counter()
    net = models.mini_resnet(8)
    optimizer = torch.optim.SGD(net.parameters(), 0.001)
    while time.perf_counter() - start < 0.9 * seconds:
        index = torch.randint(0, len(images), (64,))
        loss = F.cross_entropy(net(models.normalise(images[index])), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


# %% tags=["wrong"]
# Comes back in train mode: answers depend on the neighbours.
def train_within(images, labels, seconds):
    import time

    from course_utils import models

    start = time.perf_counter()
    net = models.mini_resnet(8)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    while time.perf_counter() - start < 0.9 * seconds:
        index = torch.randint(0, len(images), (64,))
        loss = F.cross_entropy(net(models.normalise(images[index])), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


# %% tags=["wrong"]
# The shipped size: too few steps fit, and each overshoots the short budget.
def train_within(images, labels, seconds):
    import time

    from course_utils import models

    start = time.perf_counter()
    net = models.mini_resnet(64)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    while time.perf_counter() - start < 0.9 * seconds:
        index = torch.randint(0, len(images), (64,))
        loss = F.cross_entropy(net(models.normalise(images[index])), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


# %% [markdown] tags=["instructor"]
# 20 minutes; make it a contest over accuracy for the last five. The schedule on the clock is the
# idea worth a discussion: it is robust to a slow neighbour, and it can't be reproduced bit for bit.

# %% [markdown]
# ## The tool of the field
# The recipe as a loop of twenty lines. `training.fit`, which other chapters call, is the same with
# a progress bar and checks of its input; torch brings the optimizer and the schedule. The two must
# agree bit for bit.


# %%
def recipe_loop(net, images, labels, recipe):
    order = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.SGD(
        net.parameters(),
        recipe.max_lr,
        recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=True,
    )
    total = recipe.epochs * math.ceil(len(images) / recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.max_lr, total_steps=total + 1, pct_start=recipe.warmup
    )
    net.train().to(memory_format=torch.channels_last)
    for _ in range(recipe.epochs):
        for index in torch.randperm(len(images), generator=order).split(recipe.batch_size):
            x = models.normalise(images[index])
            mirrored = torch.rand(len(x), generator=order) < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x).contiguous(
                memory_format=torch.channels_last
            )
            loss = F.cross_entropy(net(x), labels[index], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


recipe = training.Recipe(epochs=2, seed=3)
ours, theirs = models.mini_resnet(8, seed=3), models.mini_resnet(8, seed=3)
recipe_loop(ours, images[:640], labels[:640], recipe)
training.fit(theirs, images[:640], labels[:640], recipe, progress=False)
assert all(
    torch.equal(a, b)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
)

# %% [markdown]
# Three things were added: mirrored images, because a shirt seen in a mirror is a shirt; weight
# decay, which pulls every weight a little towards zero in each step; and label smoothing, which
# asks for about 95% of the probability and not for all of it, and spreads the rest over all classes
# (Szegedy et al. 2016). This loop made the *baseline* that other chapters load, with the 55,000
# images of the full training set and 8 epochs at width 32. In `full`, and with the whole data set
# there (`course data --full`), the next cell trains it again.

# %% tags=["nbval-ignore-output"]
from safetensors.torch import load_file, save_file

if FULL and (data.FULL / "train-images-idx3-ubyte.gz").is_file():
    everything = data.fashion_mnist("train", full=True)
    mine, plan = models.mini_resnet(32, seed=1), training.Recipe(epochs=8, seed=1)
else:
    if not FULL:
        print(machine.skip("full", "the baseline trained again on 55,000 images"))
    everything = images[: 640 if SMOKE else 6000], labels[: 640 if SMOKE else 6000]
    mine, plan = models.mini_resnet(8, seed=1), training.Recipe(epochs=1, seed=1)
recipe_loop(mine, *everything, plan)
save_file(
    {k: v.contiguous() for k, v in mine.state_dict().items()}, scratch("02") / "mine.safetensors"
)
again = models.mini_resnet(mine.fc.in_features // 4)
again.load_state_dict(load_file(scratch("02") / "mine.safetensors"))
print(
    f"saved, loaded, and still {score(again.eval()):.1f}% of the test images; the shipped baseline"
    f" {score(shipped):.1f}%"
)

# %% [markdown]
# ## Break it
# How large may the rate get? A constant rate and one-cycle, from moderate to absurd.

# %% tags=["nbval-ignore-output"]
high = [0.1, 2.0] if SMOKE else [0.1, 1.0, 8.0]
broken = {
    n: [100 * accuracy(run(n, 0, rate), models.normalise) for rate in high]
    for n in ("constant", "one-cycle")
}
lost = next(
    (
        r
        for r, a in zip(high, broken["one-cycle"], strict=True)
        if a < max(broken["one-cycle"]) - 20
    ),
    None,
)
plots.lines(
    high,
    broken,
    xlabel="highest learning rate",
    ylabel="validation accuracy (%)",
    logx=True,
    title=(
        f"One-cycle loses 20 points at a rate of {lost:g}"
        if lost
        else "One-cycle survives every rate tried"
    ),
    alt=(
        "Accuracy against the highest learning rate for a constant rate and one-cycle: both fall,"
        " one-cycle later."
    ),
)

# %% [markdown]
# The network breaks at some rate under every schedule; a schedule that ends small forgives more,
# because its last steps repair what the large ones did. And a recipe is tuned for *its* budget: at
# a tenth of the steps the same numbers are too slow, at a hundred times as many they leave accuracy
# behind.
#
# ## Exit quiz
# **1. Two loops feed bitwise equal batches in the same order. They can differ in**
# <details><summary>seconds a step only</summary>Right: the learning is the same.</details>
# <details><summary>steps to an accuracy</summary>The network sees the same numbers, so it takes the
# same steps.</details>
# <details><summary>both</summary>Only what is fed can change the steps.</details>
#
# **2. Input scaled by 255, a BatchNorm after the first convolution. The usable learning rate**
# <details><summary>falls by 255 or more</summary>Without the BatchNorm it would.</details>
# <details><summary>stays about where it was</summary>Right: the layer divides the factor out, and
# the gradient is the same.</details>
# <details><summary>rises</summary>Nothing makes it rise.</details>
#
# **3. In a range test, take a rate**
# <details><summary>at the floor of the valley</summary>That is the edge: the loss there is still
# the work of smaller rates.</details>
# <details><summary>well left of the floor, where the loss falls</summary>Right.</details>
# <details><summary>where the curve is flat on the left</summary>Nothing is learned there in a
# step.</details>
#
# **4. Five paired differences, warm-up minus none: mean +0.2 points, interval [−0.5, 0.9]. You
# say**
# <details><summary>warm-up helps by 0.2 points</summary>Zero lies well inside the
# interval.</details>
# <details><summary>no effect seen; it may be anything from −0.5 to 0.9</summary>Right.</details>
# <details><summary>warm-up does not help</summary>You have not shown that either; the interval
# allows 0.9.</details>
#
# **5. A network with a sixth of the arithmetic trains no faster. First suspect**
# <details><summary>the bytes that its layers move</summary>Right: the step may be limited by memory
# and by the number of operators.</details>
# <details><summary>the learning rate</summary>It changes the number of steps, not the time of
# one.</details>
# <details><summary>a wrong count of multiply–accumulates</summary>Possible, and quickly checked,
# but rarely the reason.</details>
#
# **Key points** · seconds = steps × seconds a step · the cheapest data work is the one you do not
# do · normalising moves the usable rate, and BatchNorm does it for you · find the rate by a range
# test · five seeds before *it helps* · the right size belongs to a budget · count bytes before
# multiplications.
#
# **Sources** · L. Smith, *Cyclical Learning Rates for Training Neural Networks*, 2017;
# *Super-Convergence*, 2018 · P. Goyal et al., *Accurate, Large Minibatch SGD*, 2017 · S. Ioffe, C.
# Szegedy, *Batch Normalization*, 2015 · C. Szegedy et al., *Rethinking the Inception Architecture*,
# 2016 (label smoothing) · A. Howard et al., *MobileNets*, 2017 · C. Coleman et al., *DAWNBench*,
# 2017 · PyTorch's [performance tuning
# guide](https://docs.pytorch.org/tutorials/recipes/recipes/tuning_guide.html).
#
# **For the capstone** row 02 of your ledger, *recipe*, now says whether a stated accuracy is
# reached sooner, and by which of the two factors. Next: [03 · Pruning](03_pruning.ipynb), where the
# trained network loses channels.
