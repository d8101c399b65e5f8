# %% [markdown]
# # 02 · Training recipe
#
# **Which changes to a training loop save steps, which save seconds a step, and which save
# nothing?**
#
# After this chapter you can: *split* the seconds of a training run into steps and seconds a step ·
# *name* the rival that costs nothing · *choose* a learning rate from a row of short runs · *tell*
# by five seeds whether a change helped · *train* to a stated accuracy in a fraction of a tutorial's
# time.
#
# 90 minutes · before this: 01 Measurement · runs on any CPU

# %% tags=["parameters"]
import os

PROFILE = os.environ.get("COURSE_PROFILE", "fast")

# %% tags=["nbval-ignore-output"]
import copy
import itertools
import math
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from tqdm.auto import tqdm

from course_utils import claims, data, exercises, machine, measure, models, plots, scratch, training

SMOKE, FULL = PROFILE == "smoke", PROFILE == "full"
SECONDS = {"smoke": 0.1, "fast": 1.5, "full": 8.0}[PROFILE]  # for one comparison
SEEDS = range(3 if SMOKE else 5)
TARGET = 30 if SMOKE else 90  # percent of the validation images, right
machine.card()

# %% [markdown]
# ## Recall
# 1. (Chapter 1) When may you say *no difference*, and when only *inconclusive*?
#    <details><summary>Answer</summary>No difference: the whole interval lies within the band that
#    counts as the same. Inconclusive: it reaches over an edge of a band.</details>
#
# ## Predict
# Below stands a training loop as many tutorials have it. At the end of the chapter another loop
# gets 90 of 100 images right, and the tutorial's loop then gets two and a half times as long. How
# many of 100 does it get right by then? And a second number. The pictures show ten kinds of
# clothes. A *linear* model weighs the 784 pixels and adds them up. How many of 100 does it get
# right?

# %%
my_tutorial = ...
my_linear = ...
exercises.predict("02.tutorial", my_tutorial)
exercises.predict("02.linear", my_linear)

# %% [markdown]
# ## Measure: the rival that costs nothing
# Fashion-MNIST, 12,000 training images. They are in three parts, and no image is in two of them:
# the network learns from *training* images, every choice is made on *validation* images, and *test*
# images give the verdicts. (The race at the end is run on validation images.) No network yet.
# *Ridge regression* finds the best weights of a linear model by solving one system of equations.

# %%
images, labels = data.fashion_mnist("train")
unseen, truth = data.fashion_mnist("validation")
test_images, test_labels = (t[: 500 if SMOKE else 3000] for t in data.fashion_mnist("test"))


def flat(images):  # (N, 1, 28, 28) uint8 → (N, 785), the last column for a constant
    return F.pad(images.flatten(1).float() / 255, (0, 1), value=1.0)


# %% tags=["nbval-ignore-output"]
start = time.perf_counter()
x, y = flat(images), F.one_hot(labels, 10).float()
weights = torch.linalg.solve(x.T @ x + 10 * torch.eye(785), x.T @ y)  # (785, 10)
ridge_seconds = time.perf_counter() - start
ridge = 100 * float(((flat(unseen) @ weights).argmax(1) == truth).float().mean())
print(f"{ridge_seconds:.2f} s")
exercises.reveal("02.linear", ridge, "percent")

# %% [markdown]
# A loop that reaches only this has shown nothing. So the bar of this chapter is higher (`TARGET`),
# and the linear model's line stays in the figure.
#
# ## From scratch: the loop that circulates
# Each image is turned into a picture object, then into a tensor, one by one; 64 of them make a
# batch; plain SGD (*stochastic gradient descent*: each step follows the gradient of one batch) at a
# rate of 0.01 does the rest. Nothing in it is wrong.

# %%
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms


class OneByOne(Dataset):
    """Image for image through PIL and torchvision's transforms, as in most tutorials."""

    def __init__(self, images, labels):
        self.pixels, self.labels = images.numpy(), labels
        self.transform = transforms.ToTensor()

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.pixels[i, 0])), self.labels[i]


# %% [markdown]
# The images are all in memory already. So a whole batch can be indexed and converted at once. Are
# the numbers the same? (An *epoch* is one pass over all training images.)


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


# %%
order = torch.cat(list(itertools.islice(shuffled(len(images), 0, 64), 20)))
loader = DataLoader(OneByOne(images, labels), batch_size=64, sampler=order.tolist())
pairs = list(zip(loader, in_memory(unit), strict=False))
same = all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in pairs)
print(len(pairs), "batches, bit for bit the same:", same)

# %% [markdown]
# What the network learns from one, it learns from the other; only the seconds differ. Now the loop
# itself. One extra: a factor on the rate, by the share `u` of the steps done.


# %%
def train(net, batches, optimizer, steps, factor=lambda u: 1.0, average=None, smoothing=0.0):
    """`steps` steps; at share u of them the rate is `factor(u)` times what it was set to."""
    rate = optimizer.param_groups[0]["lr"]
    net.train()
    for step, (x, y) in enumerate(itertools.islice(batches, steps)):
        optimizer.param_groups[0]["lr"] = rate * factor((step + 0.5) / steps)
        loss = F.cross_entropy(net(x), y, label_smoothing=smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if average is not None:
            average.update_parameters(net)
    optimizer.param_groups[0]["lr"] = rate
    return net.eval()


@torch.inference_mode()
def accuracy(net, prepare, images=unseen, labels=truth):
    """Percent right."""
    parts = zip(images.split(500), labels.split(500), strict=True)
    right = [(net(prepare(x)).argmax(1) == y) for x, y in parts]
    return 100 * float(torch.cat(right).float().mean())


# %% [markdown]
# One equation holds the chapter together:
#
# $$\text{seconds to an accuracy} = \text{steps} \times \text{seconds a step}$$
#
# Each change below acts on one factor or on the other. So the two are measured apart: steps by
# training, seconds a step by timing the arms in turn.
#
# ## Measure: seconds a step
# What does one image cost before it reaches the network?

# %% tags=["nbval-ignore-output"]
COUNT = 256 if SMOKE else 2048
part = OneByOne(images[:COUNT], labels[:COUNT])
ways = {
    "one by one": lambda: list(DataLoader(part, batch_size=64)),
    "a batch at once": lambda: [unit(images[i]) for i in torch.arange(COUNT).split(64)],
}


def in_turn(calls, rounds):
    """Median seconds of each call, all of them timed in turn in every round."""
    found = {name: [] for name in calls}
    for name, call in [*calls.items()] * (rounds + 1):  # one round to warm up
        start = time.perf_counter()
        call()
        found[name].append(time.perf_counter() - start)
    return {name: float(np.median(seconds[1:])) for name, seconds in found.items()}


for name, seconds in in_turn(ways, 5).items():
    print(f"{name:16} {1e6 * seconds / COUNT:6.1f} microseconds an image")

# %% [markdown]
# The same bits, for a small part of the price. `DataLoader(num_workers=2)` would share the dear way
# out among processes; the second line does not do it at all. (Where data do not fit into memory you
# need the workers, and with a GPU also `pin_memory`.)
#
# What else makes a step cheaper? `channels_last` stores the channels of a pixel side by side, which
# is how many convolution kernels want them; *contiguous*, the usual format, stores one channel's
# pixels side by side. ([Chapter 7](07_mixed_precision.ipynb) adds the precision.)


# %%
def stepper(net, fetch, optimizer=None):
    """A training step as a callable, for timing; `fetch` gets the batch ready, in every step."""
    optimizer = optimizer or torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)
    net.train()

    def call():
        x, y = fetch()
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return call


# %% tags=["nbval-ignore-output"]
few, answers, last = images[:64], labels[:64], torch.channels_last
contiguous = stepper(models.mini_resnet(16), lambda: (unit(few), answers))
last_net = models.mini_resnet(16).to(memory_format=last)
channels_last = stepper(last_net, lambda: (unit(few).contiguous(memory_format=last), answers))
arms = measure.Arm(contiguous, "contiguous"), measure.Arm(channels_last, "channels_last")
layouts = measure.across(*arms, seconds=SECONDS)
claims.verdict("02.channels_last_is_faster", layouts)

# %% [markdown]
# The networks below take `channels_last`; if your verdict speaks against it, you lose a little
# time.
#
# ## Measure: steps, and what normalising moves
# *Standardising* subtracts the mean pixel and divides by the standard deviation, so that inputs
# have mean 0 and deviation 1. It is said to speed up convergence. The gradient of a first layer is
# proportional to its input, so pixels 255 times larger want a far smaller rate. Give each input a
# row of rates and let it choose. And try two ways to draw the first weights: torch's default, and
# He's rule, which keeps the deviation of the signal from layer to layer (He et al. 2015). SGD here
# has *momentum*: it follows a running sum of the gradients, in which each old one counts 0.9 of
# what it did a step ago.


# %%
def plain(seed, he=False):
    """A convolutional network without any normalisation inside."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
    net.extend([nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10)])
    for layer in net if he else ():
        if hasattr(layer, "weight"):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return net


inputs = {"0 … 255": lambda u: u.float(), "0 … 1": unit, "standardised": models.normalise}


def together(jobs):
    """{name: call} → {name: result}; each with one thread, as many at once as there are cores."""
    return dict(zip(jobs, training.side_by_side(list(jobs.values())), strict=True))


def short_run(net, name, rate, seed=0, part=(unseen, truth), steps=10 if SMOKE else 50):
    """Accuracy in percent after a few steps."""
    optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9)
    train(net, in_memory(inputs[name], seed), optimizer, steps)
    return accuracy(net, inputs[name], *part)


# %% tags=["nbval-ignore-output"]
rates = [1e-3, 1e-1] if SMOKE else [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
cases = itertools.product((False, True), inputs, rates)
found = together({(he, n, r): partial(short_run, plain(0, he), n, r) for he, n, r in cases})
grid = {he: {n: [found[he, n, r] for r in rates] for n in inputs} for he in (False, True)}
best = {(n, he): rates[int(np.argmax(row))] for he in grid for n, row in grid[he].items()}
for he, rows in grid.items():
    plots.lines(
        rates,
        rows,
        xlabel="learning rate",
        ylabel="validation accuracy (%)",
        logx=True,
        title=f"{'He’s rule' if he else 'Default weights'}: at its best rate, "
        + ", ".join(f"{name} {max(row):.0f}%" for name, row in rows.items()),
        alt="Accuracy against learning rate, three curves of inputs, each with its own window.",
    )

# %% [markdown]
# Each input has its own window of usable rates. Read the tops, not one column. At torch's default,
# which draws small weights, the signal shrinks from layer to layer; large pixels make up for that.
# If that is the reason, He's rule must lift the two small inputs to about where raw pixels were,
# and must harm the raw ones. If the second figure looks like the first, the explanation is wrong.
# The verdict lets each input choose its rate *and* its first weights, on validation images; then
# ten seeds on test images.

# %% tags=["nbval-ignore-output"]
seeds, test = range(3 if SMOKE else 10), (test_images, test_labels)
jobs = {
    (n, s): partial(short_run, plain(s, n[1]), n[0], best[n], s, test) for n in best for s in seeds
}
found = together(jobs)
reached = {n: [found[n, s] for s in seeds] for n in best}
for (name, he), right in reached.items():
    print(f"{'He' if he else 'default':8} {name:13} {np.mean(right):5.1f}% at {best[name, he]:g}")

# %% tags=["nbval-ignore-output"]
he_is_better = {name: max(grid[True][name]) > max(grid[False][name]) for name in inputs}
raw, standard = (reached[name, he_is_better[name]] for name in ("0 … 255", "standardised"))
moved = measure.paired_t(np.subtract(standard, raw), "points")
claims.verdict("02.normalising_speeds_convergence", moved)

# %% [markdown]
# The verdict stands on ten *paired* seeds: a pair has the same seed and the same batches, and only
# its difference counts. The interval is Student's t for the mean of these differences.
#
# Compare the lines *He* with the lines *default*. If the small inputs rose and the raw one fell,
# the size of the signal was what counted; and at one fixed choice of weights you could have had
# either verdict. *BatchNorm* inside the network settles it for good: it standardises each channel
# over the batch, then multiplies and shifts it by two learned numbers (Ioffe and Szegedy 2015). A
# factor of 255 in the input is gone after the first layer (*Further* shows it). From here on the
# network is the course's: a stem and three residual blocks, a BatchNorm after each convolution.
# Half of the images are *mirrored* at random, because a shirt seen in a mirror is a shirt.


# %%
def mirrored(seed=0, size=64):
    """Batches without end, standardised, channels_last, each image mirrored or not."""
    coin = torch.Generator().manual_seed(seed)
    for index in shuffled(len(images), seed, size):
        yield training.batch(images, index, coin), labels[index]


# %%
def resnet(width=16, seed=0):
    return models.mini_resnet(width, seed=seed).to(memory_format=torch.channels_last)


def sgd(net, rate=0.1):
    return torch.optim.SGD(net.parameters(), rate, momentum=0.9, nesterov=True)


# %% [markdown]
# ## Measure: steps, and the end of a run
# *Decay* lets the rate fall along the run. Here it rises for a tenth of the steps and then falls in
# a straight line to zero. It is said to make the result better. There is a rival that needs no plan
# for the end: keep the rate *constant*, and keep beside the network an *average* of its recent
# weights: 97% of what was there, 3% of each new step (Polyak and Juditsky 1992 and Izmailov et al.
# 2018 give equal shares).
#
# Short runs have a trap. In eval mode BatchNorm uses *running averages*, and each training batch
# moves them by a tenth. Where weights move fast, they lag behind. So here and in the next section
# `update_bn` takes them anew over some training images before a score; no weight changes.


# %%
STEPS = 16 if SMOKE else 300


def score(net, images=test_images, labels=test_labels):
    return 100 * training.accuracy(net, images, labels)


def anew(net, *part):
    """The score with BatchNorm's averages taken anew over 1,536 training images."""
    update_bn((x for x, _ in itertools.islice(mirrored(size=128), 12)), net)
    return score(net, *part)


def falling(u):
    """The factor on the rate at share u of the run: up for a tenth, then straight to zero."""
    return min(10 * u, (1 - u) / 0.9)


# %% [markdown]
# At a constant rate the last step is luck. Three looks, ten steps apart, say more.


# %%
def at_constant_rate(seed):
    """Accuracy with BatchNorm's averages as they stand and anew; that of averaged weights."""
    net = resnet(seed=seed)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.97))
    batches, optimizer, looks = mirrored(seed, 32), sgd(net), []
    train(net, batches, optimizer, max(8, STEPS - 30), average=average)
    for _ in range(3):
        train(net, batches, optimizer, 10, average=average)
        looks.append((score(net), anew(copy.deepcopy(net))))
    return *np.mean(looks, axis=0), anew(average)


def at_falling_rate(seed):
    net = resnet(seed=seed)
    return anew(train(net, mirrored(seed, 32), sgd(net), STEPS, falling))


# %% tags=["nbval-ignore-output"]
ways = at_constant_rate, at_falling_rate
found = together({(way, s): partial(way, s) for way in ways for s in SEEDS})
constant, fell = ([found[way, s] for s in SEEDS] for way in ways)
names = "constant, as it stands", "constant", "averaged", "falling"
results = dict(zip(names, (*zip(*constant, strict=True), fell), strict=True))

# %% tags=["nbval-ignore-output"]
plots.seeds(
    results,
    ylabel="test accuracy (%)",
    title="After the same steps: "
    + ", ".join(f"{name} {np.mean(results[name]):.1f}%" for name in names[1:]),
    alt="Test accuracy of five seeds: a constant rate, its averaged weights, and a falling rate.",
)

# %% tags=["nbval-ignore-output"]
decay = measure.paired_t(np.subtract(results["falling"], results["constant"]), "points")
claims.verdict("02.learning_rate_decay_helps", decay)

# %% tags=["nbval-ignore-output"]
more = measure.paired_t(np.subtract(results["falling"], results["averaged"]), "points")
claims.verdict("02.decay_is_needed", more)

# %% [markdown]
# Each grey line is one seed. Five of them settle a difference of about two points here, and nothing
# smaller. A constant rate shakes the weights about. Decay calms them; averaging takes the middle of
# the shaking, and the run need not know when it ends. If the last two columns lie equally high,
# decay is one way to calm weights and not the only one; if *falling* lies higher, averaging does
# not replace it here. Some optimizers average all along
# (Defazio et al. 2024). The first two columns are the same
# weights: a comparison without `update_bn` would have credited their difference to decay.
#
# ## Measure: steps, and the optimizer
# SGD is the oldest. *AdamW* divides each weight's step by the usual size of its gradient (Kingma
# and Ba 2015; Loshchilov and Hutter 2019). *Muon* (Jordan et al. 2024) won the speed contests of
# 2024. It looks at a layer's update as a matrix. A few directions of such a matrix are usually
# strong and most are weak. Muon makes all of them equally strong: every *singular value*, the
# factor by which it stretches one direction, becomes about 1. A polynomial does it, five times in a
# row.


# %%
def orthogonal(update):  # (out, in, ...) → the same shape, singular values near 1
    x = update.flatten(1)
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.view_as(update)


torch.manual_seed(0)
matrix = torch.randn(16, 144) * torch.linspace(0.05, 1, 16)[:, None]
for m in (matrix / matrix.norm(), orthogonal(matrix)):
    print("singular values from {:.2f} to {:.2f}".format(*torch.linalg.svdvals(m)[[-1, 0]]))

# %% [markdown]
# The optimizer is SGD with momentum whose step goes through this function; BatchNorm's weights have
# one dimension, and no directions to balance. (Jordan leaves the first and the last layer to AdamW;
# here Muon takes all.)


# %%
class Muon(torch.optim.Optimizer):
    def __init__(self, parameters, lr, momentum=0.6):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(p.grad)
                update = p.grad + group["momentum"] * buffer
                p.sub_(group["lr"] * (orthogonal(update) if p.ndim > 1 else update))


optimizers = {
    "SGD": (sgd, [0.1, 0.2, 0.4, 0.8]),
    "AdamW": (lambda net, rate: torch.optim.AdamW(net.parameters(), rate), [0.005, 0.01, 0.02]),
    "Muon": (lambda net, rate: Muon(net.parameters(), rate), [0.04, 0.08, 0.16, 0.32]),
}

# %% [markdown]
# Each optimizer gets its own row of rates, and chooses. A schedule that
# falls is judged at its planned end and nowhere before it. The loss gets *label smoothing*, which
# asks for about 95% of the probability and not for all of it (Szegedy et al. 2016).

# %%
SHORT = 8 if SMOKE else 120  # steps


def planned(name, rate, steps, seed=0):
    """Validation accuracy at the end of a run that was planned for so many steps of 128 images."""
    net = resnet(16, seed)
    optimizer = optimizers[name][0](net, rate)
    train(net, mirrored(seed, 128), optimizer, steps, falling, smoothing=0.05)
    return anew(net, unseen, truth)


# %% tags=["nbval-ignore-output"]
tuned, short = {}, {}
for name, (_, choices) in optimizers.items():
    choices = choices[: 1 if SMOKE else None]
    found = together({rate: partial(planned, name, rate, SHORT) for rate in choices})
    short[name], tuned[name] = max((right, rate) for rate, right in found.items())
    print(f"{name:5}", {rate: f"{a:.1f}%" for rate, a in found.items()}, "takes", tuned[name])

# %% [markdown]
# Compare the best of each row. It is one seed: two neighbours that are a point apart are not told
# apart. If a row's best stands at its edge, the row was too short.
#
# ## Measure: steps to the bar
# Now the recipe: batches of 128, mirrored, Muon, falling to zero. Plan ever longer runs until two
# seeds reach the bar.

# %% tags=["nbval-ignore-output"]
PLANS = (8, 16) if SMOKE else (500, 1000, 2000)
plans, missed = {}, machine.Skip("system", f"no plan up to {PLANS[-1]} steps reached {TARGET}%.")
for steps in tqdm(PLANS, desc="plans", leave=False):
    jobs = {seed: partial(planned, "Muon", tuned["Muon"], steps, seed) for seed in (0, 1)}
    plans[steps] = list(together(jobs).values())
    print(f"{steps} steps planned:", ", ".join(f"{a:.1f}%" for a in plans[steps]))
    if there := min(plans[steps]) >= TARGET:
        break

# %% [markdown]
# Next the seconds a step of both: in turn within this process for the figure, over fresh processes
# for the verdict.


# %% tags=["nbval-ignore-output"]
def fetch(size=64):
    coin = torch.Generator().manual_seed(0)
    return training.batch(images, torch.arange(size), coin), labels[:size]


dear, collate = OneByOne(images[:64], labels[:64]), torch.utils.data.default_collate
first, final = models.mini_resnet(16), resnet(16)
slow = torch.optim.SGD(first.parameters(), 0.01)
loops = {
    "tutorial": stepper(first, lambda: collate([dear[i] for i in range(64)]), slow),
    "in memory": stepper(first, lambda: (unit(few), answers), slow),
    "SGD": stepper(resnet(16), lambda: fetch(128)),
    "recipe": stepper(final, lambda: fetch(128), Muon(final.parameters(), 1e-3)),
}
a_step = in_turn(loops, 3 if SMOKE else 15)
arms = [measure.Arm(loops[name], name) for name in ("tutorial", "recipe")]
ratio = measure.across(*arms, seconds=SECONDS).interval
print({name: f"{1e3 * s:.1f} ms" for name, s in a_step.items()}, "tutorial over recipe:", ratio)

# %% [markdown]
# And the tutorial's loop? It may never reach the bar. So follow it for two and a half times the
# recipe's seconds. If it arrives before, you know how many times sooner the recipe is. If not, you
# know a least. Its rate is the tutorial's, which nobody tuned: a part of the gain is that alone.

# %% tags=["nbval-ignore-output"]
enough = math.ceil(2.5 * steps / ratio.value)  # its steps in so many of the recipe's seconds
every = max(1, enough // 12)
net = models.mini_resnet(16, seed=0)
optimizer, batches, looks = torch.optim.SGD(net.parameters(), 0.01), in_memory(unit), {}
for done in tqdm(range(every, enough + every, every), desc="tutorial's loop", leave=False):
    train(net, batches, optimizer, every)
    looks[done] = accuracy(net, unit)
    if arrived := looks[done] >= TARGET:
        break

# %% tags=["nbval-ignore-output"]
exercises.reveal("02.tutorial", looks[done], "percent")
sooner = measure.derive(lambda r: r * done / steps, ratio, unit="x")
print(f"{'' if arrived else 'at least '}{sooner.low:.1f} times as soon" if there else missed)
claims.verdict("02.recipe_reaches_accuracy_sooner", sooner if there else missed)

# %% [markdown]
# ## Explain: two factors, one figure
# The race, by seconds. The linear model is the dotted line.

# %% tags=["nbval-ignore-output"]
figure, ax = plots.axes(
    "seconds of training",
    "validation accuracy (%)",
    height=4.2,
    title=f"The recipe {np.mean(plans[steps]):.0f}% in {steps * a_step['recipe']:.0f} s; the"
    f" tutorial's loop {looks[done]:.0f}% in {done * a_step['tutorial']:.0f} s",
)
at, ends = np.array(list(looks)), np.array([SHORT, *plans])
curves = {
    "tutorial's loop": (at * a_step["tutorial"], list(looks.values())),
    "batches in memory": (at * a_step["in memory"], list(looks.values())),
    "SGD, its rate, falling": ([SHORT * a_step["SGD"]], [short["SGD"]]),
    "Muon in its place": (ends * a_step["recipe"], [short["Muon"], *map(np.mean, plans.values())]),
}
for i, (name, (seconds, found)) in enumerate(curves.items()):
    ax.semilogx(seconds, found, marker=plots.MARKERS[i], color=plots.COLOURS[i], label=name)

# %% tags=["nbval-ignore-output"]
ax.axhline(ridge, linestyle=":", color="0.4", label=f"linear model, {ridge_seconds:.1f} s")
ax.axhline(TARGET, linestyle="--", color="0.4")
plots.plain_log(ax.xaxis)
ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
plots.show(
    figure,
    "Accuracy against seconds on a logarithmic axis: the tutorial's curve, the same curve moved to"
    " the left by batches in memory, and the planned runs of SGD and of the recipe as points.",
)

# %% [markdown]
# From the first curve to the second, a shift to the left: cheaper steps. From
# there up to the points: as many seconds, another accuracy. That is the optimizer, rate, decay,
# mirrored images, smoothing and the batch together; which of them did it, this figure does not
# tell. Mark where the tutorial's loop crosses the dotted line, which took one system of
# equations.
#
# ## If yours shows no gain
# | You see | Because | Look at |
# |---|---|---|
# | `channels_last` gains nothing | few channels, or kernels that reorder by themselves | another width |
# | standardising changes nothing | a normalisation layer does it already | the first gradient, in *Further* |
# | decay changes nothing | the rate is so small that nothing shakes | the range test, in *Further* |
# | Muon gains nothing | none of its rates fits your network | more rates, and the accuracy at each |
# | the recipe's step is dear | `orthogonal` costs the same for a batch of 1 as for 1,000 | a larger batch |
#
# ## The tool of the field
# torch brings optimizers (`torch.optim`) and schedules (`torch.optim.lr_scheduler`), and counts for
# you. `OneCycleLR` rises and falls within one run (Smith 2018), in torch along half a cosine each
# way; you rebuild it in exercise B.


# %%
def rates_seen(step_every):
    """The rates of 4 epochs of 25 batches, with the schedule stepped every so many batches."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs=4, steps_per_epoch=25)
    seen = []
    for batch in range(100):
        seen.append(schedule.get_last_lr()[0])
        optimizer.step()
        if (batch + 1) % step_every == 0 and batch < 99:
            schedule.step()
    return seen


print(f"highest rate {max(rates_seen(1)):.4f}, last {rates_seen(1)[-1]:.7f}")

# %% [markdown]
# `training.fit`, which other chapters call, uses this one.
#
# ## Myth: a schedule is stepped once an epoch
# Older schedules want `scheduler.step()` at the end of an epoch, and most loops have it there.
# `OneCycleLR` counts *batches*. Nothing complains:

# %%
print(f"highest rate {max(rates_seen(25)):.4f}, last {rates_seen(25)[-1]:.7f}")

# %% [markdown]
# The rate never gets past its rise: the network trains at less than a tenth of the rate you asked
# for, and no error tells you. Print the rates of a schedule before you use it.

# %% [markdown]
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
# 5 minutes. Ask what changes if the mean is taken per pixel position: a pixel that is always black
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
# 12 minutes. Let the room plot it with `plots.lines`. Who has the peak one step late learns why a
# test compares every step.

# %% [markdown]
# ## Exercise C · an accuracy within a budget of seconds
# Write `train_within(images, labels, seconds)`. It gets 4,000 uint8 images with labels and returns
# a network in eval mode for normalised images (`models.normalise`). Use at least three quarters of
# `seconds`; a step under way at the end may finish. About 100 steps of `models.mini_resnet(8)` with
# 64 images fit. The classes have new numbers, and all images are turned or mirrored alike, the
# unseen ones too, so that only what you train on them counts.
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
# behind weights that move fast. Its `momentum` says how much they take. And one bad step can undo
# several good ones: `nn.utils.clip_grad_norm_` shortens it.


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
# 15 minutes, and five more for a contest over accuracy. The schedule on the clock is the idea worth
# a discussion: it is robust to a slow neighbour, and it can't be reproduced bit for bit.

# %% [markdown]
# ## Break it
# How large may the rate get? Let it fall along the run as before, with and without *gradient
# clipping*: a gradient longer than 1 is cut to length 1 before the step.


# %% tags=["nbval-ignore-output"]
def survivor(rate, longest):
    net = resnet(8)
    optimizer = sgd(net, rate)

    def shorten(*_):  # torch calls it before each step
        nn.utils.clip_grad_norm_(net.parameters(), longest)

    optimizer.register_step_pre_hook(shorten)
    return anew(train(net, mirrored(), optimizer, 8 if SMOKE else 40, falling), unseen, truth)


high = [0.1, 8.0] if SMOKE else [0.1, 1.0, 8.0, 64.0]
runs = {n: [survivor(r, m) for r in high] for n, m in (("as it is", math.inf), ("clipped", 1.0))}
most = int(np.argmax(np.abs(np.subtract(*runs.values()))))
plots.lines(
    high,
    runs,
    xlabel="highest learning rate",
    ylabel="validation accuracy (%)",
    logx=True,
    title=f"They part most at a rate of {high[most]:g}: "
    + ", ".join(f"{name} {found[most]:.0f}%" for name, found in runs.items()),
    alt="Accuracy against the highest learning rate, with and without gradient clipping.",
)

# %% [markdown]
# Clipping bounds a step; if its curve falls as early as the other, bounding was not what the run
# lacked.
#
# ## Further
# Seven parts, in any order, each on its own.
#
# **A rate without guessing.** Let it grow by a constant factor from step to step, from far too
# small to far too large, in one run of a hundred steps, and write down the loss: the *range test*
# (Smith 2017).


# %%
def range_test(net, batches, low=1e-3, high=3.0, steps=100):
    """(rates, losses) of one run in which the rate grows from low to high."""
    optimizer, losses = sgd(net, low), []
    rates = np.geomspace(low, high, steps)
    net.train()
    for rate, (x, y) in zip(rates, batches, strict=False):
        optimizer.param_groups[0]["lr"] = rate
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return rates, np.array(losses)


# %% tags=["nbval-ignore-output"]
tried, losses = range_test(resnet(), mirrored(), steps=30 if SMOKE else 100)
smooth = np.convolve(np.pad(losses, 4, mode="edge"), np.ones(9) / 9, mode="valid")
lowest = float(tried[int(np.argmin(smooth))])

# %% tags=["nbval-ignore-output"]
plots.lines(
    tried,
    {"one step's loss": losses, "mean of nine": smooth},
    xlabel="learning rate",
    ylabel="loss",
    logx=True,
    title=f"The loss is lowest near a rate of {lowest:.2g}",
    alt="Loss against a growing learning rate: flat, then falling, a valley, then rising.",
)

# %% [markdown]
# Read it from left to right. Flat: the rate is too small to move anything in a step. Falling: it
# learns. Then the valley. Its floor is no answer yet: the loss there is still the work of the
# smaller rates before it. A third of it is a first guess, on the cautious side. Test it with a row
# of rates around it, as SGD's above.
#
# **BatchNorm takes a scale out.** The gradients of the first weights, for pixels up to 255 and for
# pixels up to 1. They are the same up to `eps`, the small number that keeps BatchNorm from dividing
# by zero, and that the cell makes still smaller.


# %%
def first_gradient(prepare):
    """Of the loss with respect to the first weights, in 64 bits."""
    net = models.mini_resnet(8, seed=0).double().train()
    net.stem[1].eps = 1e-12
    F.cross_entropy(net(prepare(images[:64]).double()), labels[:64]).backward()
    return net.stem[0].weight.grad


large, small = first_gradient(inputs["0 … 255"]), first_gradient(unit)
print("the same within a millionth:", bool((large - small).norm() < 1e-6 * small.norm()))

# %% [markdown]
# **The recipe of the other chapters.** `training.fit` as a loop, without its progress bar and its
# checks of the input. New is *weight decay*, which pulls every weight a little towards zero in each
# step. Loop and function must agree bit for bit.


# %%
def recipe_loop(net, images, labels, recipe):
    order = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.SGD(net.parameters(), recipe.max_lr, recipe.momentum, nesterov=True)
    optimizer.param_groups[0]["weight_decay"] = recipe.weight_decay
    total = recipe.epochs * math.ceil(len(images) / recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.max_lr, total_steps=total + 1, pct_start=recipe.warmup
    )
    net.train().to(memory_format=torch.channels_last)
    for _ in range(recipe.epochs):
        for index in torch.randperm(len(images), generator=order).split(recipe.batch_size):
            x = training.batch(images, index, order)
            loss = F.cross_entropy(net(x), labels[index], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


# %%
recipe = training.Recipe(epochs=2, seed=3)
ours, theirs = models.mini_resnet(8, seed=3), models.mini_resnet(8, seed=3)
recipe_loop(ours, images[:640], labels[:640], recipe)
training.fit(theirs, images[:640], labels[:640], recipe, progress=False)
pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
assert all(torch.equal(a, b) for a, b in pairs)

# %% [markdown]
# This loop made the *baseline* that other chapters load: 55,000 images, 8 epochs, width 32. In
# `full`, and with the whole data set there (`course data --full`), the next cell trains it again.

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
kept = scratch("02") / "mine.safetensors"
save_file({k: v.contiguous() for k, v in mine.state_dict().items()}, kept)
again = models.mini_resnet(mine.fc.in_features // 4)
again.load_state_dict(load_file(kept))
print(f"saved, loaded, {score(again.eval()):.1f}%; shipped {score(models.baseline()):.1f}%")

# %% [markdown]
# **A larger batch wants a larger rate.** With twice the batch there are half the steps for the same
# images. Goyal et al. (2017) make the rate larger by the same factor. Same images, four runs:


# %% tags=["nbval-ignore-output"]
def after_images(size, rate, count=640 if SMOKE else 6400):
    net = resnet(8)
    train(net, mirrored(0, size), sgd(net, rate), count // size, falling)
    return anew(net, unseen, truth)


for size, rate in ((64, 0.1), (256, 0.1), (256, 0.4), (64, 0.4)):
    print(f"batch {size:3}, rate {rate:g}: {after_images(size, rate):.1f}%")

# %% [markdown]
# If the third line lies above the second, the rule helped here; one seed and 25 steps decide
# nothing finer than several points. From some size on, the *critical batch size*, more images a
# step buy less and less (McCandlish et al. 2018).
#
# **Evaluate as you train**: leave out `net.eval()`, and BatchNorm normalises by the batch that it
# happens to see. Sort the images by class, as a folder on disk does, and ask for the accuracy in
# batches.

# %% tags=["nbval-ignore-output"]
shipped = models.baseline()
orders = {"shuffled": torch.randperm(len(truth)), "sorted by class": truth.argsort()}
for mode, (name, index) in itertools.product((True, False), orders.items()):
    shipped.train(mode)
    with torch.no_grad():
        parts = [shipped(models.normalise(unseen[i])).argmax(1) for i in index.split(50)]
    right = float((torch.cat(parts) == truth[index]).float().mean())
    print(f"{'train' if mode else 'eval'} mode, {name:15} {right:.1%}")

# %% [markdown]
# In train mode the accuracy depends on who stands beside whom, and every forward pass moves the
# running averages, so the network is another one afterwards. In eval mode both lines must be equal.
#
# **Again, bit for bit?** One seed for the weights, one for the order. Is a second run the same? And
# with another number of threads?


# %% tags=["nbval-ignore-output"]
def weights_after(threads, seed=0):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    net = resnet(8, seed)
    train(net, mirrored(seed), sgd(net), 20)
    torch.set_num_threads(before)
    return torch.cat([p.detach().flatten() for p in net.parameters()])


here = torch.get_num_threads()
once = weights_after(here)
print("the same seed again, equal bits:", torch.equal(once, weights_after(here)))
for name, other in (
    ("another number of threads", weights_after(here, 0) if here < 2 else weights_after(1)),
    ("another seed", weights_after(here, 1)),
):
    print(f"{name}: weights differ by up to {float((once - other).abs().max()):.2g}")

# %% [markdown]
# On a CPU the same program on the same machine usually repeats its bits. Another number of threads
# adds in another order; each sum changes in its last digit, and training amplifies it. So do
# another processor and another version. On a GPU some kernels add in random order;
# `torch.use_deterministic_algorithms(True)` takes another kernel where there is one, and raises an
# error where there is none. A result that needs equal bits to be true is none: report several
# seeds.
#
# **The contests.** DAWNBench (Coleman et al. 2017) asked for seconds and dollars to a stated
# accuracy, and half of today's habits come from its entries. Its heirs are one-file speed runs:
# Jordan's [airbench](https://github.com/KellerJordan/cifar10-airbench) for small pictures and
# [modded-nanogpt](https://github.com/KellerJordan/modded-nanogpt) for a language model, where Muon
# comes from. AlgoPerf (Dahl et al. 2023) compares optimizers with the tuning counted. Read their
# logs with this chapter's question: which factor did the change move?
#
# ## Exit quiz
# **1. Two loops have the same first weights, the same optimizer, and bitwise equal batches in the
# same order. They can differ in**
# <details><summary>steps to an accuracy</summary>Equal weights and equal batches give equal
# steps.</details>
# <details><summary>both factors</summary>See the first answer.</details>
# <details><summary>seconds a step only</summary>Right: the learning is the same.</details>
#
# **2. Input scaled by 255, a BatchNorm after the first convolution. The usable learning rate**
# <details><summary>falls</summary>Without the BatchNorm it would: see the two figures.</details>
# <details><summary>stays about where it was</summary>Right: the layer divides the factor out, and
# the gradient is the same.</details>
# <details><summary>rises</summary>Nothing makes it rise.</details>
#
# **3. A blog shows that its trick wins at a rate of 0.01, for both arms. You know**
# <details><summary>which arm that rate suits</summary>Right: let each arm choose its own, then
# compare.</details>
# <details><summary>that the trick helps</summary>With another rate it might lose.</details>
# <details><summary>that the trick helps at least for small rates</summary>You know one
# rate.</details>
#
# **4. Five paired differences, trick minus none: mean +0.2 points, interval [−0.5, 0.9]. You say**
# <details><summary>the trick helps by 0.2 points</summary>Zero lies well inside the
# interval.</details>
# <details><summary>no effect seen; it may be anything from −0.5 to 0.9</summary>Right.</details>
# <details><summary>the trick does not help</summary>You have not shown that either; the interval
# allows 0.9.</details>
#
# **5. A run planned for 1,000 falling steps is stopped at 400 and scores badly. You learn about**
# <details><summary>the schedule</summary>Its point is the end, and the end was not there.</details>
# <details><summary>a high rate, and little else</summary>Right: at 400 the rate was still
# large.</details>
# <details><summary>the network</summary>With a shorter plan the same network does better.</details>
#
# **Key points** · seconds = steps × seconds a step · draw the rival that costs nothing · the
# cheapest data work is the one you do not do · each arm chooses its own rate · compare decay
# with averaging before you credit it · a plan is judged at its end.
#
# **Sources** · L. Smith, *Cyclical Learning Rates for Training Neural Networks*, 2017;
# *Super-Convergence*, 2018 · P. Goyal et al., *Accurate, Large Minibatch SGD*, 2017 · S. Ioffe, C.
# Szegedy, *Batch Normalization*, 2015 · K. He et al., *Delving Deep into Rectifiers*, 2015 · C.
# Szegedy et al., *Rethinking the Inception Architecture*, 2016 (label smoothing) · B. Polyak, A.
# Juditsky, *Acceleration of Stochastic Approximation by Averaging*, 1992 · P. Izmailov et al.,
# *Averaging Weights Leads to Wider Optima*, 2018 · A. Defazio et al., *The Road
# Less Scheduled*, 2024 · D. Kingma, J. Ba, *Adam*, 2015 · I. Loshchilov, F. Hutter, *Decoupled
# Weight Decay Regularization*, 2019 · K. Jordan et al., *Muon: An optimizer for hidden layers in
# neural networks*, 2024 · S. McCandlish et al., *An Empirical Model of Large-Batch Training*, 2018
# · C. Coleman et al., *DAWNBench*, 2017 · G. Dahl et al., *Benchmarking Neural Network Training
# Algorithms*, 2023 · on `num_workers` and `pin_memory`, PyTorch's
# [performance tuning guide](https://docs.pytorch.org/tutorials/recipes/recipes/tuning_guide.html).
#
# **For the capstone** row 02 of your ledger, *recipe*, now says whether a stated accuracy is
# reached sooner, and by which of the two factors. Next: [03 · Pruning](03_pruning.ipynb), where the
# trained network loses channels.
