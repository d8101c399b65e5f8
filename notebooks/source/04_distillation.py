# %% [markdown]
# # 04 · Distillation
#
# **What does a small network learn from a large one that the labels do not tell it, and where does
# the gain come from?**
#
# After this chapter you can: *write* the distillation loss, with its temperature and its T² ·
# *derive* why that factor is there and *measure* it · *tell* by five seeds and three controls where
# a gain comes from · *cache* a teacher and pay for it once · *judge* features against logits fairly
# · *say* when a teacher does harm.
#
# 150 minutes · before this: 01 Measurement, 02 Training recipe · runs on any CPU

# %% tags=["parameters"]
import os

PROFILE = os.environ.get("COURSE_PROFILE", "fast")

# %% tags=["nbval-ignore-output"]
import functools
import math
import shutil
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from IPython.display import display
from torch import nn
from tqdm.auto import tqdm

from course_utils import claims, data, exercises, machine, measure, models, plots, scratch

SMOKE, FULL = PROFILE == "smoke", PROFILE == "full"
SECONDS = {"smoke": 0.1, "fast": 1.0, "full": 8.0}[PROFILE]  # for one comparison
SEEDS = range({"smoke": 3, "fast": 5, "full": 10}[PROFILE])
FEW = 128 if SMOKE else 1000  # images that the student may learn from
EPOCHS = {"smoke": 1, "fast": 6, "full": 20}[PROFILE]
machine.card()

# %% [markdown]
# ## Recall
# 1. (Chapter 2) Five paired seeds, mean difference +0.4 points, interval [−0.3, 1.1]. What do you
#    say?
#    <details><summary>Answer</summary>No effect seen; it may be anything between a loss of 0.3 and
#    a gain of 1.1.</details>
# 2. (Chapter 2) What does label smoothing ask the network for?
#    <details><summary>Answer</summary>For a little less than all of the probability on the label,
#    and the same small share on every other class.</details>
# 3. (Chapter 3, if you took it) Beside the pruned networks stood a *control*: the same network, not
#    cut, with the same fine-tuning. What for?
#    <details><summary>Answer</summary>Without it, the gain from the extra training hides what the
#    cut costs.</details>
#
# ## Predict
# A student of 20 thousand parameters gets `1000` images. It learns once from their labels, and once
# from what a trained network says about the same images. How many points of test accuracy does the
# second way gain? And a second guess: ResNet-152 is the teacher and MobileNetV3-large the student
# in a comparison that circulates. How many times faster is the student on your processor?

# %%
my_gain = ...  # points
my_speedup = ...  # times
exercises.predict("04.gain", my_gain)
exercises.predict("04.speedup", my_speedup)

# %% [markdown]
# ## From scratch: what a label leaves out
# A teacher looks at one picture and gives a number for each of four classes, its *logits*.
# *Softmax* turns them into probabilities.

# %%
classes = ["shirt", "T-shirt", "coat", "sandal"]
logits = torch.tensor([6.0, 3.0, 2.0, -4.0])


def show(p):
    print("  ".join(f"{name} {value:.4f}" for name, value in zip(classes, p.tolist(), strict=True)))


show(F.one_hot(torch.tensor(0), 4).double())  # the label
show(F.softmax(logits, 0))  # the teacher

# %% [markdown]
# The label says *shirt*, and nothing else. The teacher says more: if it is no shirt, it is a
# T-shirt rather than a coat, and certainly no sandal. Hinton et al. (2015) called these small
# probabilities *dark knowledge*. They are so small that they hardly move a loss. So divide the
# logits by a number $T$ first, the *temperature*.

# %%
for T in (1, 4, 16, 1000):
    print(f"T = {T:4}:", end=" ")
    show(F.softmax(logits / T, 0))

# %% [markdown]
# At `T = 4` the order of the wrong classes shows. At `T = 1000` everything is nearly equal, and it
# looks as if nothing were left. Keep that in mind: it will turn out wrong.
#
# The student gets the same temperature, and is asked to match. How far two lists of probabilities
# are apart is measured by the *Kullback–Leibler divergence*, $\mathrm{KL}(p \| q) = \sum_k p_k \log
# (p_k / q_k)$: zero if they are equal, positive otherwise. With $p^T$ the teacher's and $q^T$ the
# student's probabilities at temperature $T$, the *distillation loss* is
#
# $$L = \alpha\, T^2\, \mathrm{KL}(p^T \| q^T) + (1 - \alpha)\, \mathrm{CE}(\text{label}, q^1)$$
#
# $\alpha$ is the weight of the teacher, from 0 to 1; CE is the cross-entropy with the label, at
# temperature 1. The factor $T^2$ looks arbitrary. Exercise B asks you for this loss, so here is
# only its soft half, in the plainest possible way.


# %%
def soft_loss(student, teacher, T):
    """KL of the softened probabilities, mean over the batch (B, K); without T²."""
    p, log_q = F.softmax(teacher / T, 1), F.log_softmax(student / T, 1)
    return (p * (p.log() - log_q)).sum(1).mean()


wrong_student = torch.tensor([[3.0, 3.0, 3.0, 3.0]])
print(f"an equal student   {soft_loss(logits[None], logits[None], 4):.4f}")
print(f"an undecided one   {soft_loss(wrong_student, logits[None], 4):.4f}")

# %% [markdown]
# ## Exercise A · soften
# Complete the line. `soften(logits, T)` gets logits of any shape whose *last* dimension is the
# classes. It returns probabilities at temperature `T`. `soften(tensor([0., 0.]), 3)` is `[0.5,
# 0.5]`, and `soften(tensor([2., 0.]), 2)` is about `[0.731, 0.269]`.


# %% tags=["exercise"]
def soften(logits, T):
    scaled = ...
    return torch.softmax(scaled, dim=-1)


# %%
exercises.check("04.A", soften)

# %% [markdown] tags=["hint"]
# The temperature acts on the logits, before the exponential. A high one brings them nearer to each
# other.


# %% tags=["solution"]
def soften(logits, T):
    scaled = logits / T
    return torch.softmax(scaled, dim=-1)


# %% tags=["wrong"]
# Multiplies: a high temperature would sharpen.
def soften(logits, T):
    scaled = logits * T
    return torch.softmax(scaled, dim=-1)


# %% tags=["wrong"]
# The temperature acts on the probabilities: they no longer add up to one.
def soften(logits, T):
    return torch.softmax(logits, dim=-1) / T


# %% tags=["wrong"]
# Normalises over the batch.
def soften(logits, T):
    return torch.softmax(logits / T, dim=0)


# %% tags=["wrong"]
# The formula as it stands in books: overflows for large logits. The edge.
def soften(logits, T):
    e = torch.exp(logits / T)
    return e / e.sum(-1, keepdim=True)


# %% [markdown] tags=["instructor"]
# 5 minutes. Ask for `T = 0.5` as well: a temperature below one sharpens. Who wrote `dim=1` passes
# for two dimensions only.

# %% [markdown]
# ## The experiment
# `1000` images for the student; validation images for every choice; test images for verdicts alone.
# The teacher is the course's *baseline*: width 32, trained with the recipe of chapter 2 on `55000`
# images. These `1000` are among them, with their right labels. It is a *better-informed* teacher,
# and that will matter.
#
# The teacher's answer to a training image never changes, so ask once and keep it: *cached logits*.


# %%
def ready(pixels):
    """uint8 → normalised, channels last."""
    return models.normalise(pixels).contiguous(memory_format=torch.channels_last)


images, labels = (t[:FEW] for t in data.fashion_mnist("train"))
train_x = ready(images)
judge_x, judge_y = (t[: 200 if SMOKE else 1000] for t in data.fashion_mnist("validation"))
test_x, test_y = (t[: 200 if SMOKE else 2000] for t in data.fashion_mnist("test"))
judge_x, test_x = ready(judge_x), ready(test_x)


@torch.no_grad()
def answers(net, x):
    """Logits (N, 10) in eval mode, without a graph."""
    net.eval()
    return torch.cat([net(part) for part in x.split(500)])


@torch.no_grad()
def features(net, x):
    """The outputs of the three stages."""
    x, found = net.stem(x), []
    for stage in net.stages:
        found.append(x := stage(x))
    return found


baseline = models.baseline().to(memory_format=torch.channels_last)
cached = answers(baseline, train_x)
print(
    "one row of logits an image:",
    cached.shape[1],
    "numbers of 4 bytes for",
    train_x[0].numel(),
    "pixels",
)

# %% [markdown]
# What does the cache save? Compare a training step that asks the teacher with one that looks its
# answer up.


# %% tags=["nbval-ignore-output"]
def a_step(look_up):
    net = models.mini_resnet(8, seed=0).to(memory_format=torch.channels_last).train()
    optimizer, index = torch.optim.SGD(net.parameters(), 0.01), torch.arange(64)

    def call():
        teacher = cached[index] if look_up else answers(baseline, train_x[index])
        optimizer.zero_grad()
        soft_loss(net(train_x[index]), teacher, 4).backward()
        optimizer.step()

    return call


asking, looking = (
    measure.Arm(a_step(c), n) for c, n in ((False, "teacher asked"), (True, "cached"))
)
measure.across(asking, looking, seconds=SECONDS, processes=6)

# %% [markdown]
# The teacher's forward pass is gone from the step, and stays gone for every epoch and every trial.
# The price: the cached answer belongs to *this* image. If you mirror images in training, cache the
# answers to the mirrored ones too. Here no image is mirrored, in any arm.
#
# Now one training run. The loss is an argument; everything else is the recipe of chapter 2, and for
# one seed all arms see the same first weights and the same batches.


# %%
def fit(net, loss, seed, x=None, epochs=EPOCHS, extra=(), with_features=False, rate=0.1):
    """Train net on x (the few images); loss(logits, index) or loss(logits, index, stages) gives the
    number to lower.
    """
    x = train_x if x is None else x
    net = net.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        [*net.parameters(), *extra], rate, 0.9, weight_decay=5e-4, nesterov=True, fused=True
    )
    batches = len(x) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=max(8, epochs * batches + 1), pct_start=0.25
    )
    order, seen = torch.Generator().manual_seed(seed), []
    hooks = (
        [s.register_forward_hook(lambda m, i, out: seen.append(out)) for s in net.stages]
        if with_features
        else []
    )
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=order)[: 64 * batches].split(64):
            seen.clear()
            logits = net(x[index])
            value = loss(logits, index, seen) if with_features else loss(logits, index)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
    for hook in hooks:
        hook.remove()
    return net.eval()


# %% [markdown]
# A network of width 8 is so small that a second core hardly helps one run. Two runs side by side,
# one core each, finish together. The networks are made before, one after the other: a random
# generator is shared by all threads.


# %%
def side_by_side(jobs):
    """Results of the callables in `jobs`, each with one torch thread, as many at once as there are
    cores.
    """
    threads, workers = torch.get_num_threads(), min(8, machine.usable_cores())
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(lambda job: job(), jobs))
    finally:
        torch.set_num_threads(threads)


def jobs_of(loss, seeds=SEEDS, make=None, **how):
    """One training run a seed, not yet started."""
    make = make or functools.partial(models.mini_resnet, 8)
    return [functools.partial(fit, make(seed=s), loss, s, **how) for s in seeds]


def students(loss, seeds=SEEDS, make=None, **how):
    """One trained student a seed."""
    return side_by_side(jobs_of(loss, seeds, make, **how))


def together(groups):
    """{name: jobs} → {name: results}; no core waits between the groups."""
    done = iter(side_by_side([job for jobs in groups.values() for job in jobs]))
    return {name: [next(done) for _ in jobs] for name, jobs in groups.items()}


# %%
def score(net, x=test_x, y=test_y):
    """Accuracy in percent."""
    return 100 * float((answers(net, x).argmax(1) == y).float().mean())


def hard(y, smoothing=0.0):
    return lambda z, i: F.cross_entropy(z, y[i], label_smoothing=smoothing)


def distilled(y, teacher, T=4.0, alpha=0.9):
    p = F.softmax(teacher / T, 1)  # once for all steps

    def loss(z, i):
        soft = F.kl_div(F.log_softmax(z / T, 1), p[i], reduction="batchmean")
        return alpha * T**2 * soft + (1 - alpha) * F.cross_entropy(z, y[i])

    return loss


# %% [markdown]
# Is this `distilled` the same as the plain sum from above? The library's `kl_div` wants
# *log*-probabilities first, probabilities second, and has a `reduction` that must be chosen. All
# three are traps, and their turn comes.

# %%
z = torch.randn(64, 10)
index = torch.arange(64)
plain = 0.9 * 16 * soft_loss(z, cached[:64], 4) + 0.1 * F.cross_entropy(z, labels[:64])
print("agree:", torch.allclose(plain, distilled(labels, cached)(z, index), atol=1e-5))

# %% [markdown]
# ## Measure: where does the gain come from?
# Four arms, five paired seeds, two sets of labels. *Hard*: the labels. *Smoothing*: label smoothing
# of 0.1, the control that softens without knowing anything. *Same data*: a teacher of width 16 that
# was trained on the same `1000` images and labels. *Informed*: the baseline. In the second set, two
# labels in five are redrawn at random (one in ten of these comes out right by chance); the
# same-data teacher learned from the redrawn ones, the informed one never saw them.

# %% tags=["nbval-ignore-output"]
draw = torch.Generator().manual_seed(0)
redrawn = torch.rand(FEW, generator=draw) < 0.4
noisy = torch.where(redrawn, torch.randint(0, 10, (FEW,), generator=draw), labels)
told = {"clean": labels, "40% redrawn": noisy}
schooled = side_by_side(
    [
        functools.partial(
            fit, models.mini_resnet(16, seed=99), hard(y, 0.05), 99, epochs=2 * EPOCHS
        )
        for y in told.values()
    ]
)
same_data = dict(zip(told, schooled, strict=True))
print(
    "teachers:",
    {"informed": round(score(baseline), 1)}
    | {f"same data, {n}": round(score(t), 1) for n, t in same_data.items()},
)

# %% tags=["nbval-ignore-output"]
arms = {}
for kind, y in told.items():
    arms[kind, "hard"] = hard(y)
    arms[kind, "smoothing"] = hard(y, 0.1)
    arms[kind, "same data"] = distilled(y, answers(same_data[kind], train_x))
    arms[kind, "informed"] = distilled(y, cached)
everyone = together({arm: jobs_of(loss) for arm, loss in arms.items()})
trained = {kind: {n: nets for (k, n), nets in everyone.items() if k == kind} for kind in told}
results = {
    kind: {name: [score(net) for net in nets] for name, nets in group.items()}
    for kind, group in trained.items()
}


def gain(over, of="hard", kind="clean"):
    """Arm `over` minus arm `of`, paired over the seeds that both have."""
    a, b = results[kind][over], results[kind][of]
    both = min(len(a), len(b))
    return measure.paired_t(np.subtract(a[:both], b[:both]), "points")


# %% tags=["nbval-ignore-output"]
figure, panels = plots.axes(
    "",
    "test accuracy (%)",
    columns=2,
    height=3.9,
    title=(
        f"Informed teacher: {gain('informed').value:+.1f} points on clean labels,"
        f" {gain('informed', kind='40% redrawn').value:+.1f} on noisy ones; same-data teacher:"
        f" {gain('same data').value:+.1f} and {gain('same data', kind='40% redrawn').value:+.1f}"
    ),
)
for panel, (kind, arms) in zip(panels, results.items(), strict=True):
    table = np.array(list(arms.values()))
    panel.plot(range(len(arms)), table, color="0.8", linewidth=0.8, zorder=1)
    for i, values in enumerate(table):
        panel.scatter([i] * len(values), values, color=plots.COLOURS[i], s=22, zorder=2)
        panel.hlines(values.mean(), i - 0.2, i + 0.2, color="black", zorder=3)
    panel.set_xticks(range(len(arms)), list(arms), fontsize=8)
    panel.set_title(f"labels: {kind}", fontsize=10)
    panel.margins(x=0.12)
plots.show(
    figure,
    "Test accuracy of every student, a column an arm, a grey line a seed; left panel clean, right"
    " panel noisy labels.",
)
for kind in results:
    for name in ("smoothing", "same data", "informed"):
        print(f"{kind:12} {name:10} minus hard: {gain(name, kind=kind)}")

# %% [markdown]
# Each point is one student, each grey line one seed, each black bar a mean. Read the columns as
# questions. *Informed* against *hard*: does a teacher help? *Same data* against *hard*: does it
# still help when it knows nothing that the labels do not say? *Same data* against *smoothing*: does
# it do more than soften?
#
# Whatever rises from *same data* to *informed* is mostly *information*: the teacher saw more
# images, and clean labels (and it is twice as wide). On noisy labels that column shows how much of
# a wrong label a knowing teacher can undo. Where *same data* lies above *hard* on clean labels, a
# larger network that trained twice as long made more of the same images, and can say so. Where it
# lies at or below, it passes on its mistakes at nine tenths of the weight; a teacher that learned
# redrawn labels by heart has many of them.

# %% tags=["nbval-ignore-output"]
exercises.reveal("04.gain", gain("informed").value, "points")
noisy_kind = "40% redrawn"
display(
    claims.verdict("04.distillation_beats_hard_labels", gain("informed")),
    claims.verdict("04.robust_to_noisy_labels", gain("informed", kind=noisy_kind)),
    claims.verdict("04.robust_without_clean_labels", gain("same data", kind=noisy_kind)),
    claims.verdict("04.dark_knowledge_regularises", gain("same data")),
    claims.verdict("04.more_than_label_smoothing", gain("same data", "smoothing")),
)

# %% [markdown]
# Five verdicts on one technique, and each names the teacher. "Distillation helps" is not a
# statement that can be tested; "this teacher, who saw that, helps this student" is one. A limit of
# ours: the `1000` images and the redrawn labels are the same in all seeds, so the intervals speak
# about first weights and batch order, not about another draw of images.
#
# ## Measure: teachers from useless to good
# Put the student's gain over the teacher's own accuracy. Two teachers more: one *untrained*, which
# someone forgot to load, and one *equal*, a network of width 8 that learned from the hard labels:
# *self-distillation*. The equal one teaches twice: with our weights (`T = 4`, `alpha = 0.9`), and
# *gently*, with those of the born-again networks of Furlanello et al. (2018), `T = 1` and `alpha =
# 0.5`.

# %% tags=["nbval-ignore-output"]
untrained = models.mini_resnet(32, seed=5).to(memory_format=torch.channels_last)
equals = trained["clean"]["hard"]
said = [answers(equals[(s + 1) % len(equals)], train_x) for s in SEEDS]  # another seed's network


def from_equals(seeds, T, alpha):
    losses = {s: distilled(labels, said[s], T, alpha) for s in seeds}
    return [job for s, loss in losses.items() for job in jobs_of(loss, [s])]


more = together(
    {
        "equal": from_equals(SEEDS[:3], 4.0, 0.9),
        "equal, gentle": from_equals(SEEDS, 1.0, 0.5),  # the setting of born-again networks
        "untrained": jobs_of(distilled(labels, answers(untrained, train_x)), SEEDS[:3]),
    }
)
results["clean"] |= {name: [score(net) for net in nets] for name, nets in more.items()}
level = {
    "untrained": score(untrained),
    "equal": float(np.mean(results["clean"]["hard"])),
    "equal, gentle": float(np.mean(results["clean"]["hard"])),
    "same data": score(same_data["clean"]),
    "informed": score(baseline),
}

# %% tags=["nbval-ignore-output"]
figure, ax = plots.axes(
    "the teacher's test accuracy (%)",
    "student's gain over hard labels (points)",
    title=(
        f"From {gain('untrained').value:+.1f} points with an untrained teacher to"
        f" {gain('informed').value:+.1f} with an informed one"
    ),
)
for i, name in enumerate(level):
    g = gain(name)
    ax.errorbar(
        [level[name]],
        [g.value],
        yerr=[[g.value - g.low], [g.high - g.value]],
        fmt=plots.MARKERS[i],
        color=plots.COLOURS[i],
        capsize=4,
        label=f"{name}: {g.value:+.1f}",
    )
ax.axhline(0, color="0.4", linestyle="--", linewidth=1)
ax.legend(loc="lower center")
plots.show(
    figure,
    "Gain over hard labels against the teacher's accuracy, five teachers with intervals: far below"
    " zero at the left.",
)
claims.verdict("04.self_distillation_helps", gain("equal, gentle"))

# %% [markdown]
# The dashed line is *no teacher at all*. An untrained teacher costs most, and no error tells you:
# the loss falls, because the student learns to imitate noise. So print a teacher's accuracy before
# the first step, always.
#
# Compare the two *equal* ones: one teacher, two weights. If the first lies far below the line on
# yours, that is its mistakes at nine tenths of the weight, with nothing to make up for them. Asked
# gently, the same teacher can do less harm, and at best a little good. Born-again networks were
# trained for many epochs on 50,000 images in 2018; a hundred steps are another experiment. The gain
# follows what a teacher knows *beyond the student's labels*, not its size.
#
# ## Explain: why T²
# Differentiate. With $z_k$ the student's logit of class $k$, and $q^T$, $p^T$ as above, $\partial\,
# \mathrm{KL} / \partial z_k = (q^T_k - p^T_k)/T$. For high $T$, $e^{z/T} \approx 1 + z/T$, so with
# $K$ classes and the logits' means taken out ($\tilde z$ for the student, $\tilde v$ for the
# teacher)
#
# $$\frac{\partial\, \mathrm{KL}}{\partial z_k} \approx \frac{1}{K\,T^2} (\tilde z_k - \tilde v_k)$$
#
# One $T$ comes from the chain rule, the other because the probabilities themselves move together.
# Without a factor $T^2$ the teacher fades as $T$ grows, and the label takes over. And what is left
# for high $T$, $\tilde z - \tilde v$, is the gradient of *half the mean squared error of the
# centred logits*: $T^2\,\mathrm{KL} \to \frac{1}{2K}\sum_k (\tilde z_k - \tilde v_k)^2$. So the
# list of equal probabilities at `T = 1000` had lost nothing.


# %%
def soft_gradient(student, teacher, T):
    """The gradient of the soft loss with respect to the student's logits, in 64 bits."""
    z = student.double().clone().requires_grad_()
    soft_loss(z, teacher.double(), T).backward()
    return z.grad * len(z)  # an image's own, not divided by the batch


def centred(logits):
    return logits.double() - logits.double().mean(1, keepdim=True)


z, v = torch.randn(5, 10), 3 * torch.randn(5, 10)
limit = (centred(z) - centred(v)) / 10
for T in (1, 10, 100, 1000):
    far = (T**2 * soft_gradient(z, v, T) - limit).norm() / limit.norm()
    print(
        f"T = {T:4}: the two gradients differ by {'more' if far > 10 / T else 'less'} than"
        f" {10 / T:g} of their size"
    )

# %% [markdown]
# Random logits are one thing. Now the gradients of a trained student against the teacher, on the
# training images.

# %% tags=["nbval-ignore-output"]
temperatures = [1, 2, 4, 8, 16, 32, 64]
half_way = answers(trained["clean"]["hard"][0], train_x)
norms = np.array(
    [float(soft_gradient(half_way, cached, T).norm(dim=1).mean()) for T in temperatures]
)
label_norm = float((F.softmax(half_way, 1) - F.one_hot(labels, 10)).norm(dim=1).mean())
slope = float(np.polyfit(np.log(temperatures[2:]), np.log(norms[2:]), 1)[0])
plots.lines(
    temperatures,
    {"KL": norms, "T² KL": norms * np.square(temperatures)},
    xlabel="temperature T",
    ylabel="gradient norm an image",
    logx=True,
    logy=True,
    reference=(label_norm, "the label's gradient"),
    title=f"Without the factor the teacher's gradient falls like T to the power {slope:.2f}",
    alt="Gradient norms on logarithmic axes: KL alone falls in a straight line, T² KL levels off.",
)
claims.verdict("04.gradients_fall_with_t_squared", slope)

# %% [markdown]
# The falling line is the loss without T², the other one the loss with it; dashed, what the label
# pulls with. Suppose you tune $\alpha$ at `T = 4` without the factor, and then try `T = 16`: you
# have not only changed the temperature, you have also turned the teacher down sixteenfold. With the
# factor, T can be tried alone.

# %% [markdown]
# ## Exercise B · the loss
# Write `kd_loss(student, teacher, labels, T, alpha)`: logits of student and teacher `(B, K)`,
# labels `(B,)`, and the loss $L$ from above, a mean over the batch. No gradient may flow into the
# teacher. For equal logits and `alpha = 1` it is 0. For `student = [[0., 0.]]`, `teacher = [[2.,
# 0.]]`, `T = 2`, `alpha = 1` it is about `0.4437`. It must stay finite for a teacher or a student
# that is absolutely sure, with logits like `[1000., 0.]`.


# %% tags=["exercise"]
def kd_loss(student, teacher, labels, T, alpha): ...


# %%
exercises.check("04.B", kd_loss)

# %% [markdown] tags=["hint"]
# `F.kl_div(log_q, p, reduction="batchmean")` wants the student's *log*-probabilities and the
# teacher's probabilities.

# %% [markdown] tags=["hint"]
# `teacher.detach()` ends the graph there. Temperature and $T^2$ belong to the soft half only.


# %% tags=["solution"]
def kd_loss(student, teacher, labels, T, alpha):
    p = F.softmax(teacher.detach() / T, dim=1)
    soft = F.kl_div(F.log_softmax(student / T, dim=1), p, reduction="batchmean")
    return alpha * T**2 * soft + (1 - alpha) * F.cross_entropy(student, labels)


# %% tags=["wrong"]
# T² is missing.
def kd_loss(student, teacher, labels, T, alpha):
    p = F.softmax(teacher.detach() / T, dim=1)
    soft = F.kl_div(F.log_softmax(student / T, dim=1), p, reduction="batchmean")
    return alpha * soft + (1 - alpha) * F.cross_entropy(student, labels)


# %% tags=["wrong"]
# The default mean divides by the number of classes, too.
def kd_loss(student, teacher, labels, T, alpha):
    p = F.softmax(teacher.detach() / T, dim=1)
    soft = (p * (p.clamp_min(1e-30).log() - F.log_softmax(student / T, dim=1))).mean()
    return alpha * T**2 * soft + (1 - alpha) * F.cross_entropy(student, labels)


# %% tags=["wrong"]
# The divergence the wrong way round.
def kd_loss(student, teacher, labels, T, alpha):
    q = F.softmax(student / T, dim=1)
    soft = F.kl_div(F.log_softmax(teacher.detach() / T, dim=1), q, reduction="batchmean")
    return alpha * T**2 * soft + (1 - alpha) * F.cross_entropy(student, labels)


# %% tags=["wrong"]
# The teacher learns as well.
def kd_loss(student, teacher, labels, T, alpha):
    p = F.softmax(teacher / T, dim=1)
    soft = F.kl_div(F.log_softmax(student / T, dim=1), p, reduction="batchmean")
    return alpha * T**2 * soft + (1 - alpha) * F.cross_entropy(student, labels)


# %% tags=["wrong"]
# The formula by hand: 0 times the logarithm of 0 is not a number. The edge: a teacher that is sure.
def kd_loss(student, teacher, labels, T, alpha):
    p = F.softmax(teacher.detach() / T, dim=1)
    soft = (p * (p.log() - F.log_softmax(student / T, dim=1))).sum(1).mean()
    return alpha * T**2 * soft + (1 - alpha) * F.cross_entropy(student, labels)


# %% [markdown] tags=["instructor"]
# 15 minutes. The last mistake is ours: `soft_loss` above has it. Let the room find it there. Who
# swapped the arguments of `kl_div` gets a positive number and a student that learns, a little
# worse: the most expensive kind of mistake.

# %% [markdown]
# ## Measure: temperature and alpha
# Six settings, two seeds each (more of both in `full`), judged on validation. A heat map invites
# you to see hills; so the noise is measured, too: how far two seeds of one cell lie apart.

# %% tags=["nbval-ignore-output"]
Ts = [1, 16] if SMOKE else [1, 2, 4, 8, 16, 32] if FULL else [1, 4, 16]
ALPHAS = [0.3, 0.9] if SMOKE else [0.1, 0.3, 0.5, 0.7, 0.9, 1.0] if FULL else [0.3, 0.9]
TRIAL_SEEDS = range(5) if FULL else range(2)


known = {(4, 0.9, s): net for s, net in zip(SEEDS, trained["clean"]["informed"], strict=True)}


def taught_with(T, alpha, seeds=SEEDS):
    """Students of the informed teacher; none is trained twice."""
    missing = [s for s in seeds if (T, alpha, s) not in known]
    fresh = students(distilled(labels, cached, T, alpha), missing)
    known.update({(T, alpha, s): net for s, net in zip(missing, fresh, strict=True)})
    return [known[T, alpha, s] for s in seeds]


grid = {
    (T, a): [score(net, judge_x, judge_y) for net in taught_with(T, a, TRIAL_SEEDS)]
    for T in tqdm(Ts, desc="temperatures", leave=False)
    for a in ALPHAS
}
mean = {cell: float(np.mean(values)) for cell, values in grid.items()}
noise = float(
    np.sqrt(np.mean([np.var(v, ddof=1) / len(v) for v in grid.values()]))
)  # of a cell's mean

# %% tags=["nbval-ignore-output"]
reach = max(mean.values()) - min(mean.values())
figure, ax = plots.axes(
    "alpha, weight of the teacher",
    "temperature T",
    height=3.6,
    title=f"From worst to best cell {reach:.1f} points; the noise of a cell ±{2 * noise:.1f}",
)
table = np.array([[mean[T, a] for a in ALPHAS] for T in Ts])
picture = ax.imshow(table, cmap="cividis", aspect="auto", origin="lower")
for (row, column), value in np.ndenumerate(table):
    dark = value < (table.max() + table.min()) / 2
    ax.text(
        column,
        row,
        f"{value:.1f}",
        ha="center",
        va="center",
        color="white" if dark else "black",
        fontsize=8 if FULL else 10,
    )
ax.set_xticks(range(len(ALPHAS)), ALPHAS)
ax.set_yticks(range(len(Ts)), Ts)
ax.grid(visible=False)
figure.colorbar(picture, ax=ax, label="validation accuracy (%)")
plots.show(
    figure,
    "Heat map of validation accuracy over temperature and alpha; the number stands in each cell.",
)

# %% [markdown]
# Compare the two numbers in the title. Cells that differ by less than the noise are not told apart,
# however different their colours. Usually the columns differ more than the rows: how much weight
# the teacher gets matters, the temperature little once T² is there. The cell with the highest
# number was picked *because* of its number, so that number is too good; the choice is kept, and
# judged again on test images.
#
# "The higher the temperature, the better" needs five seeds of its own.

# %% tags=["nbval-ignore-output"]
results["clean"]["T = 16"] = [score(net) for net in taught_with(16, 0.9)]
claims.verdict("04.higher_t_always_helps", gain("T = 16", "informed"))

# %% [markdown]
# For large $T$ the loss becomes the squared error of the logits, as derived. It then insists that
# even the logit of a class which is out of the question be copied exactly. A small student may have
# better uses for its few weights; or, as with this teacher, it may not mind.
#
# ## From scratch: features in place of logits
# A teacher also has insides. *FitNets* (Romero et al. 2015): the student's feature map at some
# stage shall match the teacher's. The student has fewer channels, so a 1 by 1 convolution, the
# *regressor*, translates; it is trained along and thrown away. *Attention transfer* (Zagoruyko and
# Komodakis 2017): match only *where* the activity is, the mean square over the channels, scaled to
# length one. Nothing needs to be translated then.

# %%
inside = []  # the teacher's feature maps for every training image, filled when they are needed


def attention(f):
    """Where a feature map (N, C, H, W) is active: (N, H·W), each row of length one."""
    return F.normalize(f.square().mean(1).flatten(1), dim=1)


def fitnet(stage, beta):
    """Hard labels, and beta times the squared error of one stage behind a regressor. Returns (loss,
    its parameters).
    """
    target = inside[stage]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        regressor = nn.Conv2d(target.shape[1] // 4, target.shape[1], 1)  # width 8 to width 32

    def loss(z, i, stages):
        return F.cross_entropy(z, labels[i]) + beta * F.mse_loss(
            regressor(stages[stage]), target[i]
        )

    return loss, list(regressor.parameters())


# %%
def attention_transfer(which, beta):
    """Hard labels, and beta times the squared distance of the attention maps of some stages."""
    target = {s: attention(inside[s]) for s in which}

    def loss(z, i, stages):
        apart = sum((attention(stages[s]) - target[s][i]).square().sum(1).mean() for s in which)
        return F.cross_entropy(z, labels[i]) + beta * apart

    return loss, []


def feature_jobs(method, setting, seeds):
    """One training run a seed, each with a regressor of its own."""
    for s in seeds:
        loss, extra = method(*setting)
        net = models.mini_resnet(8, seed=s)
        yield functools.partial(fit, net, loss, s, extra=extra, with_features=True)


# %% [markdown]
# ## Measure: features against logits, with equal effort
# Whoever tunes one method and takes the other as it comes finds that the first is better. So all
# three get the same number of settings (six in `fast`; for the logits, those of the heat map),
# judged by the same first seed on validation, and the best one goes to the test images with all
# seeds.

# %% tags=["nbval-ignore-output"]
BETAS = (
    [0.1, 1.0]
    if SMOKE
    else [0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000]
    if FULL
    else [1.0, 10.0]
)
STAGES = [0, 2] if SMOKE else [0, 1, 2]
SETS = [(2,), (0, 1, 2)] if SMOKE else [(1,), (2,), (0, 1, 2)]
inside[:] = features(baseline, train_x)
tried = {"logits": {setting: values[0] for setting, values in grid.items()}}
ways = {"FitNet": (fitnet, STAGES), "attention": (attention_transfer, SETS)}
for name, (method, where) in ways.items():
    settings = [(w, b) for w in where for b in BETAS]
    nets = side_by_side([job for setting in settings for job in feature_jobs(method, setting, [0])])
    tried[name] = {c: score(n, judge_x, judge_y) for c, n in zip(settings, nets, strict=True)}
best = {name: max(found, key=found.get) for name, found in tried.items()}
for name, setting in best.items():
    print(f"{name}: {len(tried[name])} settings, best {setting}, {tried[name][setting]:.1f}%")


# %% tags=["nbval-ignore-output"]
def squared(y, teacher, alpha=0.9):
    """Mean squared error of the centred logits, scaled as T² KL is for large T."""
    target = teacher - teacher.mean(1, keepdim=True)

    def loss(z, i):
        apart = (z - z.mean(1, keepdim=True) - target[i]).square().sum(1).mean() / (2 * z.shape[1])
        return alpha * apart + (1 - alpha) * F.cross_entropy(z, y[i])

    return loss


finals = {"logits": taught_with(*best["logits"])} | together(
    {
        "logits, squared": jobs_of(squared(labels, cached)),
        "FitNet": list(feature_jobs(fitnet, best["FitNet"], SEEDS)),
        "attention": list(feature_jobs(attention_transfer, best["attention"], SEEDS)),
    }
)
results["clean"] |= {name: [score(net) for net in nets] for name, nets in finals.items()}
feature = max(ways, key=lambda n: tried[n][best[n]])  # chosen on validation

# %% tags=["nbval-ignore-output"]
plots.seeds(
    {n: results["clean"][n] for n in ("hard", *finals)},
    ylabel="test accuracy (%)",
    title="Against hard labels: " + ", ".join(f"{n} {gain(n).value:+.1f}" for n in finals),
    alt=(
        "Test accuracy of every seed for hard labels, logits, squared logits, FitNet and attention"
        " transfer."
    ),
)
for name in finals:
    print(f"{name:16} minus hard: {gain(name)}")
display(claims.verdict("04.features_beat_logits", gain(feature, "logits")))

# %% [markdown]
# All columns but *hard* had the same information, that of the informed teacher. *Logits, squared*
# was not tuned at all: it is the limit of large T. If the feature columns lie lower, that is no
# verdict on features as such: a student with a quarter of the channels can't hold the teacher's
# features, and in `fast` it has a hundred steps. In RepDistiller's
# [benchmark](https://github.com/HobbitLong/RepDistiller), too, FitNets hurt MobileNetV2 and plain
# logits were hard to beat. Features have one advantage that no accuracy shows: they work where
# teacher and student have different classes, or none.

# %% tags=["nbval-ignore-output"]
close = measure.paired_t(np.array(results["clean"]["logits"]) - score(baseline), "points")
inside.clear()  # the teacher's feature maps
finals.clear()
measure.release()
claims.verdict("04.close_to_the_teacher", close)

# %% [markdown]
# *Close to its teacher* is asked of a student with a fifteenth of the parameters and 1,000 images
# (see datasets/README.md, 2026, for what the teacher had). Distillation narrows the gap; it does
# not abolish capacity, nor data.
#
# ## Measure: the three times faster student
# *ResNet-152 teaches MobileNetV3, which runs at 3x the speed*, says an article of 2025 that many
# repeat. The two are in torchvision. Their speed does not depend on what they have learned, so
# random weights will do.

# %% tags=["nbval-ignore-output"]
from torchvision.models import mobilenet_v3_large, resnet152

pixels = torch.randn(1, 3, *(2 * (64,) if SMOKE else 2 * (224,)))
big, small = resnet152(weights=None).eval(), mobilenet_v3_large(weights=None).eval()
counts = {
    n: (measure.parameters(m), measure.macs(m, pixels))
    for n, m in (("ResNet-152", big), ("MobileNetV3-large", small))
}
apart = measure.across(
    measure.arm(big, pixels, "ResNet-152"),
    measure.arm(small, pixels, "MobileNetV3-large"),
    seconds=3 * SECONDS,
    processes=5,
)
print(apart)
del big, small
measure.release()

# %% tags=["nbval-ignore-output"]
fewer = {
    n: a / b
    for n, a, b in zip(("parameters", "multiply–accumulates"), *counts.values(), strict=True)
}
plots.bars(
    {"said": 3.0}
    | {f"fewer {n}": v for n, v in fewer.items()}
    | {"faster, measured": apart.interval},
    xlabel="ResNet-152 over MobileNetV3-large (x)",
    logx=True,
    title=(
        f"{fewer['multiply–accumulates']:.0f} times less arithmetic, {apart.ratio:.1f} times faster"
    ),
    alt=(
        "Four bars on a logarithmic axis: the claimed three, the ratios of parameters and"
        " arithmetic, the measured speed-up."
    ),
)
exercises.reveal("04.speedup", apart.ratio, "times")
claims.verdict("04.three_times_faster", apart)

# %% [markdown]
# If your bar lies far beyond 3, the claim fails *upwards*: the pair is better than its
# advertisement, at least on a processor with batch 1. It can fail and still sell a good idea. A
# figure like that belongs to one machine, one batch size and one library; the article names none of
# the three. And your speed-up is still far below the ratio of the arithmetic. Depthwise
# convolutions move many bytes for each multiplication: [chapter 1](01_measurement.ipynb) placed one
# on the roofline.
#
# ## The real pair, and a training run that survives
# For the accuracy of the real two there is no short cut: both must be trained. That takes hours,
# and in hours something happens: the lid is closed, a notebook server restarts. So first a training
# loop that can be killed at any moment. What must be stored? Weights, BatchNorm's statistics, the
# optimizer's momentum, and the step. The learning rate is a function of the step and the order of
# images a function of the epoch, so both come back by themselves.


# %%
from safetensors.torch import load_file, save_file


def save_state(folder, step, net, optimizer):
    """A folder a checkpoint; it gets its name when it is whole, and only then the older one
    goes.
    """
    part = folder / f"step-{step:07}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, part / "net.safetensors")
    torch.save(optimizer.state_dict(), part / "optimizer.pt")
    whole = part.with_suffix("")
    shutil.rmtree(whole, ignore_errors=True)
    part.replace(whole)
    for old in folder.glob("step-" + "[0-9]" * 7):
        if old != whole:
            shutil.rmtree(old)


def load_state(folder, net, optimizer):
    """The step of the newest whole checkpoint, now in net and optimizer; 0 if there is none."""
    whole = sorted(folder.glob("step-" + "[0-9]" * 7))
    if not whole:
        return 0
    net.load_state_dict(load_file(whole[-1] / "net.safetensors"))
    optimizer.load_state_dict(torch.load(whole[-1] / "optimizer.pt", weights_only=True))
    return int(whole[-1].name[5:])


# %%
def resumable(net, x, loss, folder, *, epochs, size=32, every=200, stop=None, prepare=ready):
    """Train net on uint8 images x; go on where a checkpoint in `folder` says. `stop` plays the
    interruption.
    """
    optimizer = torch.optim.SGD(net.parameters(), 0.05, 0.9, weight_decay=5e-4, nesterov=True)
    net.to(memory_format=torch.channels_last).train()
    a_pass, first = len(x) // size, load_state(folder, net, optimizer)
    total = epochs * a_pass
    for step in tqdm(
        range(first, total), initial=first, total=total, leave=False, disable=total < 500
    ):
        if step == stop:
            raise KeyboardInterrupt(f"stopped before step {step}")
        if step == first or step % a_pass == 0:
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(step // a_pass))
        index = order[step % a_pass * size :][:size]
        share = step / total
        optimizer.param_groups[0]["lr"] = (
            0.05 * min(1, 10 * share + 0.02) * (1 + math.cos(math.pi * share)) / 2
        )
        value = loss(net(prepare(x[index])), index)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == total:
            save_state(folder, step + 1, net, optimizer)
    return net.eval()


# %% [markdown]
# The proof: one run in one go; another one stopped in the middle of an epoch, and continued by a
# *new* network and optimizer that know only the folder. They must be equal bit for bit. One thread,
# so that sums are taken in the same order.


# %%
def rehearsal(name, stop=None, fresh=True):
    folder = scratch("04") / name
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    net = models.mini_resnet(8, seed=0)
    return resumable(net, images[:128], hard(labels), folder, epochs=3, every=3, stop=stop)


threads = torch.get_num_threads()
torch.set_num_threads(1)
in_one_go = rehearsal("whole")
try:
    rehearsal("broken", stop=8)
except KeyboardInterrupt as stopped:
    print(stopped)
continued = rehearsal("broken", fresh=False)
torch.set_num_threads(threads)
pairs = zip(in_one_go.state_dict().values(), continued.state_dict().values(), strict=True)
print("equal bit for bit:", all(torch.equal(a, b) for a, b in pairs))

# %% [markdown]
# Now the pair, at 32 by 32 pixels in three equal channels. The teacher is trained, asked once for
# its logits, and released; then two students, one on labels and one on logits. In `full` the next
# cells do it: with `55000` images after `course data --full`, with the embedded `12000` otherwise.
# In every other profile they measure single steps and say how long it would take *you*.


# %%
def colour(pixels):
    """uint8 (N, 1, 28, 28) → normalised (N, 3, 32, 32): padded with black, three equal channels."""
    padded = F.pad(pixels, (2, 2, 2, 2))
    return (
        models.normalise(padded).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    )


def logits_of(net, x, prepare, size=250):
    with torch.no_grad():
        return torch.cat([net.eval()(prepare(part)) for part in x.split(size)])


def train_pair(make_teacher, make_student, x, y, test, folder, *, epochs, prepare=colour, **how):
    """Logits of teacher, hard student and distilled student for `test`. Each of the three runs can
    be resumed.
    """
    go_on = functools.partial(resumable, x=x, epochs=epochs, prepare=prepare, **how)
    teacher = go_on(make_teacher(), loss=hard(y, 0.05), folder=folder / "teacher")
    found = {"teacher": logits_of(teacher, test, prepare)}
    kept = logits_of(teacher, x, prepare)
    del teacher
    for name, loss in (("hard", hard(y)), ("distilled", distilled(y, kept))):
        student = go_on(make_student(), loss=loss, folder=folder / name)
        found[name] = logits_of(student, test, prepare)
    return found


def seeded(make):
    torch.manual_seed(0)
    return make(weights=None, num_classes=10)


# %% tags=["nbval-ignore-output"]
REAL_EPOCHS, REAL_BATCH = 15, 32


def seconds_a_step(make, size=REAL_BATCH):
    """Of one training step at 32 pixels, the faster of two after one that warms up."""
    net = seeded(make).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(net.parameters(), 0.01, 0.9)
    x, y, took = colour(images[:size]), labels[:size], []
    for _ in range(3):
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        took.append(time.perf_counter() - start)
    return min(took[1:])


def hours(steps_of, count):
    """One teacher and two students, all epochs."""
    passes = REAL_EPOCHS * count / REAL_BATCH
    return passes * (steps_of["ResNet-152"] + 2 * steps_of["MobileNetV3-large"]) / 3600


step_of = {}
for name, make in (("ResNet-152", resnet152), ("MobileNetV3-large", mobilenet_v3_large)):
    step_of[name] = seconds_a_step(make, 2 if SMOKE else REAL_BATCH) * (
        REAL_BATCH / 2 if SMOKE else 1
    )
    measure.release()
print({n: f"{REAL_BATCH / s:.0f} images a second" for n, s in step_of.items()})
print(
    f"expected here: {hours(step_of, 12_000):.1f} hours with 12,000 images,"
    f" {hours(step_of, 55_000):.1f} with 55,000"
)

# %% tags=["nbval-ignore-output"]
if FULL:
    whole = all(
        (data.FULL / f"{n}-ubyte").is_file() for n in ("train-images-idx3", "train-labels-idx1")
    )
    pair_x, pair_y = data.fashion_mnist("train", full=whole)
    pair_test, truth = data.fashion_mnist("test")
    makers = functools.partial(seeded, resnet152), functools.partial(seeded, mobilenet_v3_large)
    found = train_pair(
        *makers,
        pair_x,
        pair_y,
        pair_test,
        scratch("04") / f"pair-{len(pair_x)}",
        epochs=REAL_EPOCHS,
    )
    right = {n: (v.argmax(1) == truth).numpy() for n, v in found.items()}
    print({n: f"{100 * r.mean():.1f}%" for n, r in right.items()})
    print("distilled minus hard:", measure.paired_share(right["hard"], right["distilled"]))
    real_pair = measure.paired_share(right["teacher"], right["distilled"])
else:
    real_pair = machine.skip("full", "ResNet-152 and MobileNetV3-large trained on Fashion-MNIST")
claims.verdict("04.the_real_pair_is_close", real_pair)

# %% [markdown]
# If you interrupt it, run the cells again: each network goes on from its last checkpoint. One seed
# of each can't separate the training's luck from the method; the interval is about the test images
# alone, and says little about another run.
#
# ## If yours shows no gain
# | You see | Because | Look at |
# |---|---|---|
# | distilled no better than hard | the teacher knows no more than the labels | its accuracy on images it did not train on |
# | distilled far worse than hard | untrained or wrongly loaded teacher, other normalisation of its input | the teacher's accuracy, first |
# | a gain on noisy labels only | with clean labels and many images little is left to tell | fewer images, or a harder task |
# | same-data teacher hurts | it fits its few images perfectly, and is confidently wrong elsewhere | its logits' size; label smoothing in its training |
# | T makes no difference | T² is in place, and the noise is larger than the effect | the title of the heat map |
# | loss goes up with T | T² is there, and the gradients are alike: the *value* of the loss is not comparable between temperatures | accuracy |
# | student no faster | it is small in parameters and not in bytes moved or in the number of layers | chapters 1 and 2, the roofline |

# %% [markdown]
# ## Myth: the loss that runs
# Ways to call `kl_div` that circulate: two are right, three are not. None raises an error.

# %%
p, q = torch.tensor([[0.7, 0.3]]), torch.tensor([[0.6, 0.4]])
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    by_default = F.kl_div(q.log(), p)
ways = {
    "right": F.kl_div(q.log(), p, reduction="batchmean"),
    "target in logarithms": F.kl_div(q.log(), p.log(), reduction="batchmean"),
    "... and saying so": F.kl_div(q.log(), p.log(), reduction="batchmean", log_target=True),
    "probabilities as input": F.kl_div(q, p, reduction="batchmean"),
    "default reduction": by_default,
}
for name, value in ways.items():
    print(f"{name:24} {value:8.4f}")
print("warnings for the default reduction:", len(heard))
assert ways["probabilities as input"] < 0
assert torch.isclose(ways["right"], ways["... and saying so"])

# %% [markdown]
# A target in logarithms gives *nan* unless `log_target=True` says so. Probabilities as input give a
# negative number that falls and falls: the student "improves". The default reduction divides by the
# number of *classes* as well, here two; with ten, the teacher has a tenth of the weight that your
# $\alpha$ says. Rule: a divergence of equal inputs is 0, of others positive; test both once.
#
# ## Myth: a teacher in train mode
# `eval()` and `no_grad()` are forgotten often, and again nothing complains.

# %%
careless = models.baseline().train()
before = careless.stem[1].running_mean.clone()
alone = careless(train_x[:64])[0]
company = careless(torch.cat([train_x[:1], torch.zeros(63, 1, 28, 28)]))[0]
print(
    "the same image, other neighbours, the same answer:", torch.allclose(alone, company, atol=1e-2)
)
print("the teacher stayed as it was:", torch.equal(before, careless.stem[1].running_mean))
print("its answer carries a graph:", alone.requires_grad)


def answer_with(mode):
    with mode():
        return baseline(train_x[:64])


modes = torch.enable_grad, torch.no_grad
with_graph, without = (measure.peak_memory(lambda: answer_with(mode)) for mode in modes)
print("the graph more than doubles its memory:", with_graph > 2 * without)


# %% [markdown]
# In train mode BatchNorm takes mean and deviation from the batch. So the answer to an image depends
# on its neighbours, and each call moves the running statistics: the teacher drifts while it
# teaches. The graph, which nobody needs, keeps all activations.
#
# ## Myth: T² forgotten, and an untrained teacher
# You have seen both. Without T², at `T = 4` and `alpha = 0.9`, the teacher's part of the gradient
# shrinks sixteenfold; what does that cost on noisy labels, where the teacher is needed?


# %% tags=["nbval-ignore-output"]
def without_square(y, teacher, T=4.0, alpha=0.9):
    p = F.softmax(teacher / T, 1)

    def loss(z, i):
        soft = F.kl_div(F.log_softmax(z / T, 1), p[i], reduction="batchmean")
        return alpha * soft + (1 - alpha) * F.cross_entropy(z, y[i])

    return loss


results["40% redrawn"]["no T²"] = [
    score(net) for net in students(without_square(noisy, cached), SEEDS[:3])
]
print("without T² minus with it:", gain("no T²", "informed", kind="40% redrawn"))
print("untrained teacher minus hard labels:", gain("untrained"))

# %% [markdown]
# ## Myth: soft labels with one output
# An example that circulates distils a regression with a single output, `nn.Linear(10, 1)`, by
# softmax and KL divergence. Softmax over one number is 1, whatever the number.

# %%
one_student = torch.randn(8, 1, requires_grad=True)
one_teacher = torch.randn(8, 1)
nothing = F.kl_div(
    F.log_softmax(one_student / 4, 1), F.softmax(one_teacher / 4, 1), reduction="batchmean"
)
nothing.backward()
print(
    "loss", float(nothing.detach().abs()), "largest gradient", float(one_student.grad.abs().max())
)

# %% [markdown]
# The loss is 0 and so is every gradient: nothing is learned, and the loss looks perfect. For a
# regression, match the number itself, by squared error.
#
# ## Exercise C · a student under a budget, with wrong labels
# Write `distil(x, labels, teacher_logits, budget)`. It gets 1,000 normalised images `(N, 1, 28,
# 28)`, of whose labels 40% name one wrong class (this exercise's own rule, 2026), and the logits of
# a teacher, `(N, 10)`. It returns a network in eval mode with **at most** `budget` parameters that
# gets three quarters of unseen images right. No other numbers are free but the averages of
# BatchNorm, wherever the network may keep them, and an image's answer must not depend on its
# neighbours. The classes have new numbers, and all images are turned or mirrored alike, the unseen
# ones too. The budget is not always the same; it allows a `models.mini_resnet` of width 6 at least.
# (Leave width 4 alone: torch 2.14 has a fault in its kernels for four channels.)
#
# `check` calls you twice, with one torch thread: with 128 images and a large budget, where only the
# network's size and mode are judged, then with 1,000 and a small one. You have `20` seconds of an
# idle machine, of which 100 to 150 steps with 64 images need a part.


# %% tags=["exercise"]
def distil(x, labels, teacher_logits, budget): ...


# %%
exercises.check("04.C", distil)

# %% [markdown] tags=["hint"]
# The largest width that fits: go down from 8 and count `p.numel()`.

# %% [markdown] tags=["hint"]
# The labels are wrong in two cases of five. Who knows better, and which `alpha` says so?

# %% [markdown] tags=["hint"]
# Use your `kd_loss` with `T = 4` and `alpha = 1`, SGD with a one-cycle schedule up to 0.1, eight
# epochs.


# %% tags=["solution"]
def distil(x, labels, teacher_logits, budget):
    from course_utils import models

    for width in range(8, 4, -1):
        net = models.mini_resnet(width)
        if sum(p.numel() for p in net.parameters()) <= budget:
            break
    optimizer = torch.optim.SGD(
        net.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps, p = 8 * (len(x) // 64), F.softmax(teacher_logits / 4, dim=1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=steps + 1, pct_start=0.25
    )
    for _ in range(8):
        for i in torch.randperm(len(x))[: 64 * (len(x) // 64)].split(64):
            loss = 16 * F.kl_div(F.log_softmax(net(x[i]) / 4, dim=1), p[i], reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


# %% tags=["wrong"]
# Believes the labels.
def distil(x, labels, teacher_logits, budget):
    from course_utils import models

    net = models.mini_resnet(6).train()
    optimizer = torch.optim.SGD(
        net.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=8 * (len(x) // 64) + 1
    )
    for _ in range(8):
        for i in torch.randperm(len(x))[: 64 * (len(x) // 64)].split(64):
            loss = F.cross_entropy(net(x[i]), labels[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


# %% tags=["wrong"]
# Always width 8: fits the large budget only. The edge.
def distil(x, labels, teacher_logits, budget):
    from course_utils import models

    net = models.mini_resnet(8).train()
    optimizer = torch.optim.SGD(
        net.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    p = F.softmax(teacher_logits / 4, dim=1)
    for _ in range(8):
        for i in torch.randperm(len(x))[: 64 * (len(x) // 64)].split(64):
            loss = 16 * F.kl_div(F.log_softmax(net(x[i]) / 4, dim=1), p[i], reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


# %% tags=["wrong"]
# Comes back in train mode.
def distil(x, labels, teacher_logits, budget):
    from course_utils import models

    net = models.mini_resnet(6).train()
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    p = F.softmax(teacher_logits / 4, dim=1)
    for i in torch.randperm(len(x))[: 64 * (len(x) // 64)].split(64):
        loss = 16 * F.kl_div(F.log_softmax(net(x[i]) / 4, dim=1), p[i], reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


# %% tags=["wrong"]
# The teacher is asked in the wrong way: its logits are taken for probabilities.
def distil(x, labels, teacher_logits, budget):
    from course_utils import models

    net = models.mini_resnet(6).train()
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    p = F.softmax(teacher_logits, dim=0)  # over the batch
    for _ in range(4):
        for i in torch.randperm(len(x))[: 64 * (len(x) // 64)].split(64):
            loss = F.kl_div(F.log_softmax(net(x[i]), dim=1), p[i], reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


# %% [markdown] tags=["instructor"]
# 20 minutes. Let pairs compete for the smallest network that passes. Ask: with the labels ignored
# altogether (alpha 1), what would the student do where the teacher is wrong? It copies the mistake;
# see *Break it*.

# %% [markdown]
# ## The tool of the field
# torch has the loss: `nn.KLDivLoss`. NVIDIA's [Model
# Optimizer](https://github.com/NVIDIA/Model-Optimizer) (Linux) wraps a teacher and a student into
# one model and brings `LogitsDistillationLoss`, T² included. Yours, torch's and theirs must agree.

# %% tags=["nbval-ignore-output"]
ours = 16 * soft_loss(half_way, cached, 4)
torchs = 16 * nn.KLDivLoss(reduction="batchmean")(
    F.log_softmax(half_way / 4, 1), F.softmax(cached / 4, 1)
)
assert torch.isclose(ours, torchs, rtol=1e-4)
if machine.can("package:modelopt"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, about what it found installed
        from modelopt.torch.distill import LogitsDistillationLoss

        theirs = LogitsDistillationLoss(temperature=4, reduction="batchmean")(half_way, cached)
        default = LogitsDistillationLoss(temperature=4)(half_way, cached)
    assert torch.isclose(ours, theirs, rtol=1e-4)
    print(f"ours {ours:.4f}, Model Optimizer {theirs:.4f}; with its default settings {default:.4f}")
else:
    print(machine.skip("package:modelopt", "Model Optimizer's distillation loss"))

# %% [markdown]
# They agree when it is told `batchmean`. Its default is `mean`, which divides by the number of
# classes, too: the trap of `kl_div`'s default again, in a library of the field. That is a choice of
# scale and no error, as long as you know that the same $\alpha$ then means another weight.
#
# ## Break it
# *A student too small.* A linear model of the pixels, one convolution, and width 8, all taught by
# the same informed teacher.


# %% tags=["nbval-ignore-output"]
def linear(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def one_convolution(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


small_gain = {"width 8": gain("informed")}
for name, make, rates in (
    ("linear", linear, (0.1, 0.01)),
    ("one convolution", one_convolution, (0.1,)),
):
    reached = []
    for loss in (hard(labels), distilled(labels, cached)):
        tuned = [students(loss, make=make, rate=rate) for rate in rates]  # the same effort for both
        chosen = max(tuned, key=lambda nets: np.mean([score(n, judge_x, judge_y) for n in nets]))
        reached.append([score(net) for net in chosen])
    small_gain[name] = measure.paired_t(np.subtract(*reversed(reached)), "points")
least = min(small_gain, key=lambda n: small_gain[n].value)
plots.intervals(
    small_gain,
    xlabel="distilled minus hard labels (points)",
    same=None,
    title=f"Least gain: {least}, {round(small_gain[least].value, 1) + 0.0:+.1f} points",
    alt="Gain by distillation for three students, each with its interval.",
)
claims.verdict("04.transfer_suits_every_model", small_gain[least])

# %% [markdown]
# A student gains only what it can express *and* has not learned from the labels anyway. If an
# interval touches zero on yours, "suits every model" is not shown for that one.
#
# *A teacher that never saw the data.* Turn the images upside down. The labels stay right; the
# teacher has never met a shirt on its head, and answers all the same.

# %% tags=["nbval-ignore-output"]
turned_x, turned_test = train_x.flip(2), test_x.flip(2)
blind = answers(baseline, turned_x)
arms = {"hard labels": hard(labels), "taught": distilled(labels, blind)}
pupils = together({n: jobs_of(loss, range(3), x=turned_x) for n, loss in arms.items()})
upside = {n: [score(net, turned_test) for net in nets] for n, nets in pupils.items()}
teacher_now = score(baseline, turned_test)
plots.seeds(
    upside,
    ylabel="accuracy upside down (%)",
    title=(
        f"The teacher gets {teacher_now:.0f}%, its pupils {np.mean(upside['taught']):.0f}%, pupils"
        f" of the labels {np.mean(upside['hard labels']):.0f}%"
    ),
    alt=(
        "Accuracy on images turned upside down: pupils of the labels and pupils of the teacher, and"
        " each seed's points joined."
    ),
)

# %% [markdown]
# The student trusts the teacher at nine tenths and inherits its errors. Softer is not wiser. Before
# you distil on new data, measure the teacher *there*, on a few hundred labelled images; if it is
# worse than the labels, give it little weight or none.
#
# ## Exit quiz
# **1. A teacher trained on the student's own images and labels can pass on**
# <details><summary>new facts about the test images</summary>It has seen none that the student has
# not.</details>
# <details><summary>its own way of smoothing and ordering the classes</summary>Right; whether that
# helps, you measured.</details>
# <details><summary>nothing, ever</summary>Its wrong-class probabilities are not in the labels; they
# may help or harm.</details>
#
# **2. T goes from 4 to 16, without T² in the loss. The teacher's gradient**
# <details><summary>stays</summary>It would with the factor.</details>
# <details><summary>falls to about a sixteenth</summary>Right: one over T squared.</details>
# <details><summary>falls to a quarter</summary>That is one of the two factors 1/T only.</details>
#
# **3. The loss is −0.8 and falling. You have**
# <details><summary>given probabilities where logarithms are due</summary>Right: a divergence can't
# be negative.</details>
# <details><summary>a very good student</summary>The best possible divergence is 0.</details>
# <details><summary>a temperature that is too high</summary>That changes the size, not the
# sign.</details>
#
# **4. FitNets with its published β loses to logits with a tuned T. You conclude**
# <details><summary>logits are better</summary>One was tuned, the other was not.</details>
# <details><summary>nothing until both had as many trials</summary>Right.</details>
# <details><summary>the teacher is too small</summary>Nothing here speaks of that.</details>
#
# **5. Cached logits and mirrored training images:**
# <details><summary>use the image's logits for both</summary>The teacher's answer to the mirrored
# image is another one.</details>
# <details><summary>cache the answers to both</summary>Right: two rows an image are still
# little.</details>
# <details><summary>then a cache is impossible</summary>With few fixed transformations it is not;
# with random crops it becomes large.</details>
#
# **Key points** · soft labels carry what the teacher knows beyond the labels, errors included ·
# temperature acts on logits, T² keeps the weight · for large T it is a squared error of logits ·
# cache the teacher; eval, no gradient · a gain needs its controls: smoothing, a same-data teacher,
# as many trials for each rival · measure the teacher on *your* data first.
#
# **Sources** · G. Hinton, O. Vinyals, J. Dean, *Distilling the Knowledge in a Neural Network*,
# 2015, [arXiv 1503.02531](https://arxiv.org/abs/1503.02531) · A. Romero et al., *FitNets*, 2015,
# [arXiv 1412.6550](https://arxiv.org/abs/1412.6550) · S. Zagoruyko, N. Komodakis, *Paying More
# Attention to Attention*, 2017, [arXiv 1612.03928](https://arxiv.org/abs/1612.03928) · T.
# Furlanello et al., *Born-Again Neural Networks*, 2018, [arXiv
# 1805.04770](https://arxiv.org/abs/1805.04770) · Y. Li et al., *Learning from Noisy Labels with
# Distillation*, 2017, [arXiv 1703.02391](https://arxiv.org/abs/1703.02391) · L. Yuan et al.,
# *Revisiting Knowledge Distillation via Label Smoothing Regularization*, 2020, [arXiv
# 1909.11723](https://arxiv.org/abs/1909.11723) · Y. Tian et al., *Contrastive Representation
# Distillation*, 2020, with [RepDistiller](https://github.com/HobbitLong/RepDistiller) · the claims:
# 〈如何提升模型推理速度?深度学习优化全攻略〉 2025; 〈8.1 模型压缩与加速〉; 〈大模型的优化与加速技术〉.
#
# **For the capstone** row 04 of your ledger, *distillation*, now says what a student gains, and on
# which teacher that depends. Next: [05 · Quantization math](05_quantization_math.ipynb), where the
# network keeps its shape and its numbers lose bits.
