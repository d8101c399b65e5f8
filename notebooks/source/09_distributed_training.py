# %% [markdown]
# # 09 · Distributed training
#
# **What does a second worker buy you, what does it cost, and how far can you carry the answer?**
#
# After this chapter you can: *write* an all-reduce from messages between neighbours · *say* when
# data-parallel training equals one large batch, and *mend* it when it does not · *compute* the
# bytes a worker holds under ZeRO · *explain* why a pipeline idles · *restart* a killed worker and
# end at the same bits · *tell* what a prediction for many machines rests on.
#
# 90 minutes · before this: 1 Measurement; 8 helps · runs on any CPU, in two to four processes

# %% tags=["parameters"]
import os

PROFILE = os.environ.get("COURSE_PROFILE", "fast")

# %% tags=["nbval-ignore-output"]
import math
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from IPython.display import display
from torch import nn

from course_utils import claims, distributed, exercises, machine, measure, plots, scratch

# %% tags=["nbval-ignore-output"]
SMOKE, FULL = PROFILE == "smoke", PROFILE == "full"
FOLDER = scratch("09")  # what the workers run and write
W = Path(os.path.relpath(FOLDER)).as_posix()
LIVES = 12 if FULL else 5  # fresh processes behind an interval
job = distributed.job
machine.card()

# %% [markdown]
# ## Recall
# (Chapter 8) What must be restored so that a repeated computation gives the same bits?
# <details><summary>Answer</summary>Everything it reads: its input, the weights, and the state of
# the random generator. You need that below.</details>
#
# ## Predict
# You have two cores. Arm one: one process that uses both as two threads. Arm two: two processes,
# one thread each, half of the rows each, gradients averaged. How many times faster is arm two?
# Then: two workers share the storage of weights, gradients and Adam's numbers. By what factor does
# the *peak* memory of a worker fall?

# %%
my_speedup = ...  # 1 means equally fast
my_factor = ...  # 1 means no saving
exercises.predict("09.speedup", my_speedup)
exercises.predict("09.memory", my_factor)

# %% [markdown]
# ## Four ways to share one model
# A *worker* is a process with its own memory; its number is its *rank*. Nothing is shared: what one
# knows, another must be sent. Four things can be divided among workers:
#
# | | what is divided | what travels |
# |---|---|---|
# | *data parallel* | the rows of a batch; each worker holds the whole model | every gradient |
# | *ZeRO*, in PyTorch FSDP | rows, and the *storage* of the model (zero redundancy; fully sharded data parallel) | weights, when a layer needs them, and gradients |
# | *tensor parallel* | the columns of each layer | activations, within each layer |
# | *pipeline* | the layers: the first ones here, the last ones there | activations at the borders |
#
# ## From scratch: all-reduce
# Data parallel needs one thing: the sum of all workers' gradients, on all workers. That is an
# *all-reduce*, one of the *collectives*: operations in which every worker takes part. The plain way
# sends everything to one worker and back; with $p$ workers, $2(p-1)$ whole vectors pass through
# that one. A *ring* does better. Cut the vector into $p$ pieces; each worker talks only to its
# right neighbour. Here are four workers in one process, one row each.


# %%
def ring_on_paper(vectors):
    """All steps of a ring all-reduce on the rows of one table; piece j is column j."""
    table, p = np.array(vectors), len(vectors)
    print(table, "at the start")
    for k in range(2 * (p - 1)):
        reduce = k < p - 1
        sent = [(rank, (rank - k + (0 if reduce else p)) % p) for rank in range(p)]
        values = [table[rank, piece] for rank, piece in sent]  # all send at the same time
        for (rank, piece), value in zip(sent, values, strict=True):
            right = (rank + 1) % p
            table[right, piece] = table[right, piece] + value if reduce else value
        print(table, "reduce-scatter" if reduce else "all-gather", "after step", k + 1)
    return table


table = ring_on_paper([[1] * 4, [10] * 4, [100] * 4, [1000] * 4])

# %% [markdown]
# Follow the number 1111. After three steps each column is complete in one row (*reduce-scatter*),
# after six everywhere (*all-gather*). A worker has sent $2(p-1)$ messages, each a $p$-th of the
# vector of $n$ bytes. If a message costs $\alpha$ seconds however short, and each byte $1/\beta$
# seconds more, then
#
# $$t = 2(p-1)\left(\alpha + \frac{n}{p\,\beta}\right)$$
#
# With many workers the bytes that each one sends approach $2n$ and stay there; the number of
# messages goes on growing. (A *tree* needs only about $2\log_2 p$ of them; libraries such as NCCL,
# for GPUs, choose by size. Ours, *gloo*, is for CPUs.)
#
# Now on real processes. A process can't see a cell of your notebook, so its code must be a file.
# `%%writefile` writes the cell to one. Each worker hands `batch_isend_irecv` a message to send and
# one to receive, and waits for both.

# %% tags=["nbval-ignore-output"]
# %%writefile "$W/ring.py"
import torch
import torch.distributed as dist

from course_utils.distributed import device


def exchange(piece, to, source):
    """Send to one neighbour and receive from the other at the same time."""
    inbox = torch.empty_like(piece)
    ops = [dist.P2POp(dist.isend, piece.clone(), to), dist.P2POp(dist.irecv, inbox, source)]
    for request in dist.batch_isend_irecv(ops):
        request.wait()
    return inbox


def ring_all_reduce(x):
    """The sum over all workers, in place; the length must divide by their number."""
    rank, p = dist.get_rank(), dist.get_world_size()
    right, left, pieces = (rank + 1) % p, (rank - 1) % p, x.view(p, -1)
    for k in range(p - 1):  # reduce-scatter: afterwards piece rank + 1 is complete here
        pieces[(rank - k - 1) % p] += exchange(pieces[(rank - k) % p], right, left)
    for k in range(p - 1):  # all-gather: complete pieces travel round the ring
        pieces[(rank - k) % p] = exchange(pieces[(rank - k + 1) % p], right, left)
    return x


# %% tags=["nbval-ignore-output"]
# %%writefile "$W/ring.py" -a
def run(settings):
    before = torch.arange(2.0 * dist.get_world_size()) + 10 * dist.get_rank()
    mine, theirs = before.clone().to(device()), before.clone().to(device())
    dist.all_reduce(theirs)
    equal = torch.equal(ring_all_reduce(mine), theirs)
    return {"before": before.tolist(), "after": mine.tolist(), "equal": equal}


# %% [markdown]
# *torchrun* starts the processes, tells each its rank, and watches them. In this course a
# [small module](../course_utils/distributed/worker.py) is what torchrun starts: it opens the group,
# calls `run` of each file you name, and returns what they return. `distributed.launch` does it for
# you on this machine; on a cluster you start the same files once on each machine:
#
# ```
# torchrun --nnodes=4 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29400 \
#     -m course_utils.distributed ring.py --out results
# ```
#
# (If nothing happens for a minute, machines do not find each other by name: add
# `--local-addr=` and the machine's number.) A start costs seconds, so the ring goes together with
# the next question.
#
# ## Measure: does data parallel equal the large batch?
# `DistributedDataParallel` (DDP) wraps a model: each worker computes its own rows, and during
# `backward` the gradients are averaged over the workers. Are these the gradients of one process
# with all rows? In language models rows have padding, which does not count in the loss. So give
# each row a weight, and let worker 0 get mostly padding.

# %% tags=["nbval-ignore-output"]
# %%writefile "$W/equality.py"
import copy

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from course_utils.distributed import apart, batch, chain, flat_gradients, mine


def loss(model, x, y, counts, terms):
    return ((model(x) - y).square().mean(1) * counts).sum() / terms


# %% tags=["nbval-ignore-output"]
# %%writefile "$W/equality.py" -a
def gap(dtype=torch.float64, norm=False, padding=False, over_all=False):
    """DDP's gradients against one process's: the largest gap, as a share of the largest."""
    p, alone = dist.get_world_size(), chain(32, 3, norm=norm).to(dtype)
    together = DDP(copy.deepcopy(alone))
    x, y = batch(24 * p, 32, dtype=dtype)
    counts = torch.ones_like(x[:, 0])
    if padding:
        counts[4 * p :: p] = 0  # of the 24 rows of worker 0, four count
    loss(alone, x, y, counts, counts.sum()).backward()
    own = mine(x, y, counts)
    terms = own[2].sum()  # each worker's mean is over its own rows
    if over_all:
        dist.all_reduce(terms)
        terms /= p  # DDP will divide the sum of gradients by p
    loss(together, *own, terms).backward()
    return apart(flat_gradients(together), flat_gradients(alone))


# %% tags=["nbval-ignore-output"]
# %%writefile "$W/equality.py" -a
CASES = {
    "every row counts": {},
    "the same in fp32": {"dtype": torch.float32},
    "worker 0 has padding": {"padding": True},
    "padding, loss over all workers": {"padding": True, "over_all": True},
    "BatchNorm, every row counts": {"norm": True},
}


def run(settings):
    return {name: gap(**how) for name, how in CASES.items()}


# %% tags=["nbval-ignore-output"]
def files(*names):
    return [FOLDER / f"{name}.py" for name in names]


# %% tags=["nbval-ignore-output"]
told = distributed.launch(*files("ring", "equality"))
for rank, one in enumerate(told["ring"]):
    print(f"worker {rank}: {one['before']} → {one['after']}, torch's: {one['equal']}")
gaps = {name: max(one[name] for one in told["equality"]) for name in told["equality"][0]}
print("\ngap to the large batch, as a share of the largest gradient:")
for name, size in gaps.items():
    print(f"{name:32} {size:.0e}")

# %% tags=["nbval-ignore-output"]
display(claims.verdict("09.ddp_equals_large_batch", gaps["every row counts"]))
claims.verdict("09.ddp_equals_large_batch_with_padding", gaps["worker 0 has padding"])

# %% [markdown]
# Look at the first two lines: from fp64 to fp32 the gap grows by the ratio of their precisions. So
# it is rounding, and the two are *equal*. The third line does not shrink with more precision. A
# mean of means is the mean only if each has equally many terms: worker 0's four rows weigh as much
# as the other's twenty-four. This was a bug of well-known training programs until late 2024
# ([transformers, issue 34242](https://github.com/huggingface/transformers/issues/34242)). The cure
# is the fourth line: divide by the terms of *all* workers, and undo DDP's division.
#
# BatchNorm is another matter. Each worker normalises by the mean of *its* rows. `nn.SyncBatchNorm`
# (for GPUs) sends the means around; layers that treat each row alone (LayerNorm) don't need it.
#
# Gradients of several small batches need to travel only once: inside `with model.no_sync():` they
# add up at home.

# %% [markdown]
# ## Myth: eight workers, the same model eight times sooner
# DDP's gradient is that of a larger batch, and with the same number of epochs the optimizer takes
# *fewer steps*. What becomes of the accuracy? Goyal et al. (2017) give a rule: "When the minibatch
# size is multiplied by k, multiply the learning rate by k", after a warm-up. You need no eight
# workers to test it: you have just seen that they equal one process with the large batch. A small
# network on Fashion-MNIST, 32 images a worker; the rate of *one* worker is chosen on validation
# images, and the rivals are the same rate for all, and a rate chosen anew.


# %%
def train(workers, rate, seed, test, epochs=2 if SMOKE else 4):
    """Accuracy in percent: a warm-up over the first epoch, then the rate falls to zero."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    batches, done = [], 0
    for _ in range(epochs):
        batches += torch.randperm(len(images)).split(32 * workers)
    for chosen in batches:
        share = (done := done + 1) / len(batches)
        optimizer.param_groups[0]["lr"] = rate * min(1, share * epochs) * (1 - share)
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    with torch.no_grad():
        return 100 * float((model(test[0]).argmax(1) == test[1]).float().mean())


# %% tags=["nbval-ignore-output"]
from course_utils import data, models


def flat(split, n):
    pixels, classes = data.fashion_mnist(split)
    return models.normalise(pixels[:n]).flatten(1), classes[:n]


images, labels = flat("train", 2000 if SMOKE else 8000)
validation, test = flat("validation", 3000), flat("test", 10000)
threads = torch.get_num_threads()
torch.set_num_threads(1)  # small products: a second thread would only wait
best = {
    k: max(rates, key=lambda rate, k=k: train(k, rate, 0, validation))
    for k, rates in {1: (0.01, 0.03, 0.1), 8: (0.03, 0.1, 0.3)}.items()
}
print("chosen on validation images: rate", best[1], "for one worker,", best[8], "for eight")

# %% tags=["nbval-ignore-output"]
arms = {f"{k} workers, rate × {k}": (k, k * best[1]) for k in (2, 8, 32)}
arms = {"1 worker": (1, best[1])} | arms
arms |= {"8, same rate": (8, best[1]), "8, chosen anew": (8, best[8])}
seeds = range(3 if SMOKE else 5)
scores = {name: [train(*how, seed + 1, test) for seed in seeds] for name, how in arms.items()}
torch.set_num_threads(threads)

# %% tags=["nbval-ignore-output"]
lost = {
    name: measure.paired_t(np.subtract(scores["1 worker"], found), "points")
    for name, found in scores.items()
    if name != "1 worker"
}
plots.bars(
    lost,
    xlabel="test accuracy lost against one worker (points)",
    title=f"By the rule 8 workers lose {lost['8 workers, rate × 8'].value:.1f} points, 32 lose"
    f" {lost['32 workers, rate × 32'].value:.1f}",
    alt="Bars of lost accuracy: little for 2 workers, more for 8, far more for 32.",
)
claims.verdict("09.linear_scaling_rule", lost["8 workers, rate × 8"])

# %% [markdown]
# Compare the three bars of eight workers. The rule's loss against a rate chosen anew says whether
# the *rule* failed, or eight times fewer steps are too few whatever the rate. Then go along the
# rule from 2 to 32: up to which size does it hold? For Goyal it held up to 8,192 images of 1.28
# million (2017). A second worker buys throughput, and beyond that size you pay in accuracy or in
# steps.
#
# ## Measure: honest scaling
# *Scaling efficiency* has a definition: the time of one worker with $r$ rows, over the time of $p$
# workers with $r$ rows *each*, $T_1(r)/T_p(r)$. Li et al. (2020) say that DDP "attains near-linear
# scalability using 256 GPUs". Here are
# [the arms](../course_utils/distributed/jobs/scaling.py), in random order, on your two cores:
#
# - *alone*: one worker computes its rows, the other one waits and leaves its core free;
# - *silent*: both compute their rows, nothing is sent. What is lost here, the machine takes: the
#   workers share its memory and its clock;
# - *ddp*: both compute, and the gradients travel;
# - *threads*: one process computes all rows with two threads. That is the rival.
#
# Each worker forks fresh processes, one after the other; an interval is over these.

# %% tags=["nbval-ignore-output"]
CASES = [[6, 256], [4, 64], [4, 256], [8, 256], [4, 128], [8, 64], [8, 128], [8, 16]]
SETTINGS = {"width": 32 if SMOKE else 128, "rounds": 2 if SMOKE else 5}
SETTINGS |= {"cases": CASES[:4] + CASES[-2:] if SMOKE else CASES}  # blocks, rows of a worker
SETTINGS |= {"sizes": [2**6, 2**12, 2**16, 2**18, 2**20][: 3 if SMOKE else 5]}  # numbers
measured = distributed.launch(
    *files("ring"), job("messages"), job("scaling"), settings=SETTINGS, fresh=LIVES
)


# %% tags=["nbval-ignore-output"]
from course_utils.distributed import alpha_beta, sent, typical


def across_lives(formula):
    return measure.over_processes([formula(typical(life, "6 x 256")) for life in steps])


steps = measured["scaling"]
efficiency = {
    "scaling efficiency": across_lives(lambda t: t["alone"] / t["ddp"]),
    "if nothing were sent": across_lives(lambda t: t["alone"] / t["silent"]),
    "if the cores shared nothing": across_lives(lambda t: t["silent"] / t["ddp"]),
}

# %% tags=["nbval-ignore-output"]
plots.intervals(
    efficiency,
    xlabel="T₁(r) / T₂(r)",
    title=f"Two workers: an efficiency of {efficiency['scaling efficiency'].value:.2f}",
    alt="Three efficiencies with intervals: measured, without sending, without sharing.",
)
claims.verdict("09.near_linear_scaling", efficiency["scaling efficiency"])

# %% [markdown]
# The first row is about the product of the other two. Which one is lower? And the honest question
# on *one* machine is another one: is a second process better than a second thread?

# %% tags=["nbval-ignore-output"]
honest = across_lives(lambda t: t["threads"] / t["ddp"])
tutorial = across_lives(lambda t: 2 * t["alone"] / t["ddp"])
print(f"two processes against one thread, as tutorials print it: {tutorial}x")
print(f"two processes against two threads, the same two cores:   {honest}x")
exercises.reveal("09.speedup", honest.value, "times")

# %% [markdown]
# Both baselines are right for their question. The first says what the method makes of a second
# core. The second says what *you* should make of it: threads have no gradients to send. If your
# second line is above 1, threads shared these small products badly. Processes win where threads
# can't go: to a second machine, a second GPU, or past Python's lock.

# %% [markdown]
# ## Measure: bytes on each worker
# To *shard* is to store each number on one worker only. ZeRO (Rajbhandari et al. 2020) counts, for
# each parameter on each of $N$ workers:
#
# | | weights | gradients | optimizer | bytes a parameter |
# |---|---|---|---|---|
# | fp32 and Adam, plain | 4 | 4 | 8 | 16 |
# | 16-bit weights and gradients, fp32 copy and Adam: the paper's | 2 | 2 | 12 | 16 |
# | stage 1 shards the optimizer | 2 | 2 | 12/N | 4 + 12/N |
# | stage 2, gradients too | 2 | 2/N | 12/N | 2 + 14/N |
# | stage 3, weights too (`fully_shard`) | 2/N | 2/N | 12/N | 16/N |
#
# Does it hold, and of what? [Three ways](../course_utils/distributed/jobs/sharding.py) in fp32: DDP
# as it comes, DDP whose gradients are views into its buckets, and FSDP2. The bytes come
# from [where memory is taken](../course_utils/distributed/heap.py), so that buffers count: the
# profiler does not see what the threads of gloo free, and reports another number in each run.

# %% tags=["nbval-ignore-output"]
SHARED = {"width": 48 if SMOKE else 192, "depth": 4, "rows": 64 if SMOKE else 256}
SHARED |= {"micro": 4, "wait": 0.001 if SMOKE else 0.006, "counts": [2, 4, 8], "rounds": 2}
shared = distributed.launch(job("sharding"), job("pipes"), settings=SHARED, fresh=5)
held = {
    f"{way}, {moment}": measure.over_processes(
        [max(one[way][key] for one in life) for life in shared["sharding"]]
    )
    for way in ("DDP, plain", "DDP, views", "FSDP2")
    for key, moment in (("kept", "between steps"), ("peak", "at the peak"))
}

# %% tags=["nbval-ignore-output"]
factor = measure.over_processes(
    [
        max(one["DDP, views"]["peak"] for one in life) / max(one["FSDP2"]["peak"] for one in life)
        for life in shared["sharding"]
    ]
)
stays = held["DDP, views, between steps"].value / held["FSDP2, between steps"].value
plots.bars(
    held,
    xlabel="bytes a parameter on the fuller of two workers",
    title=f"FSDP2 holds {stays:.2f}x less between steps, {factor.value:.2f}x less at the peak",
    alt="Bars: DDP, DDP with views and FSDP2, each between steps and at the peak.",
)
exercises.reveal("09.memory", factor.value, "times")
claims.verdict("09.zero_divides_memory", factor)

# %% [markdown]
# Compare the bars *between steps* with the formula: 16, and $16/N$ for FSDP2. Plain DDP holds 4
# more: its buckets are a second copy of the gradients, unless `gradient_as_bucket_view=True`. What
# a step needs at its peak is more: activations, the block whose weights have just been collected,
# and messages. ZeRO divides what *stays*; how much the peak falls depends on how much of it that
# is. More rows lower the factor, a larger model raises it.

# %% [markdown]
# ## Exercise A · bytes per rank
# Many programs add gradients in fp32, also when weights have 16 bits. Such a model has, for each of
# its `numbers` parameters: a weight of 2 bytes, a gradient of 4, and an optimizer state of 12. ZeRO
# shards from stage 1 the state, from stage 2 also the gradients, from stage 3 also the weights;
# stage 0 is plain data parallel. A shard is padded: each of the `n` workers holds equally many
# numbers. Complete the line so that `bytes_per_rank` gives the bytes on each worker, as a whole
# number, exact for models of any size. Example: 10 parameters, 4 workers, stage 1: a shard has 3
# numbers; $2·10 + 4·10 + 12·3 = 96$.


# %% tags=["exercise"]
def bytes_per_rank(numbers, n, stage):
    shard = ...  # numbers in one worker's part
    weights = shard if stage >= 3 else numbers
    gradients = shard if stage >= 2 else numbers
    state = shard if stage >= 1 else numbers
    return 2 * weights + 4 * gradients + 12 * state


# %%
exercises.check("09.A", bytes_per_rank)

# %% [markdown] tags=["hint"]
# Ten numbers on four workers: 3 + 3 + 3 + 1, and the last one is padded to 3.

# %% [markdown] tags=["hint"]
# Division that rounds up: `-(-a // b)`.


# %% tags=["solution"]
def bytes_per_rank(numbers, n, stage):
    shard = -(-numbers // n)
    weights = shard if stage >= 3 else numbers
    gradients = shard if stage >= 2 else numbers
    state = shard if stage >= 1 else numbers
    return 2 * weights + 4 * gradients + 12 * state


# %% tags=["wrong"]
# Rounds down: right only when the numbers divide. The edge.
def bytes_per_rank(numbers, n, stage):
    shard = numbers // n
    weights = shard if stage >= 3 else numbers
    gradients = shard if stage >= 2 else numbers
    state = shard if stage >= 1 else numbers
    return 2 * weights + 4 * gradients + 12 * state


# %% tags=["wrong"]
# "ZeRO divides memory by N": everything is sharded from stage 1 on.
def bytes_per_rank(numbers, n, stage):
    return 18 * (-(-numbers // n) if stage >= 1 else numbers)


# %% tags=["wrong"]
# Stages 2 and 3 are exchanged: weights first.
def bytes_per_rank(numbers, n, stage):
    shard = -(-numbers // n)
    weights = shard if stage >= 2 else numbers
    gradients = shard if stage >= 3 else numbers
    state = shard if stage >= 1 else numbers
    return 2 * weights + 4 * gradients + 12 * state


# %% tags=["wrong"]
# Rounds up by hand: right for fewer than a hundred workers.
def bytes_per_rank(numbers, n, stage):
    shard = int(numbers / n + 0.99)
    weights = shard if stage >= 3 else numbers
    gradients = shard if stage >= 2 else numbers
    state = shard if stage >= 1 else numbers
    return 2 * weights + 4 * gradients + 12 * state


# %% [markdown] tags=["instructor"]
# 4 minutes. Let the room compute a model of 7 billion parameters on 8 GPUs for each stage, then ask
# what is missing in the sum (activations, and the block that is collected at the moment).

# %% [markdown]
# ## The tool of the field: fully_shard, and checkpoints that fit any number
# A *mesh* arranges the workers in a grid. With one dimension, `fully_shard` (FSDP2) shards over
# all. With two it replicates along the first and shards along the second: *hybrid sharding*, HSDP.
# The second dimension is one machine with fast links, and only gradients cross the slow network.
# A *distributed checkpoint* (DCP) is written by all workers, each its own shards, and read by any
# number of others. Four workers write:

# %% tags=["nbval-ignore-output"]
# %%writefile "$W/sharded.py"
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard

from course_utils.distributed import batch, chain, device, mine, step


def build(seed):
    p = dist.get_world_size()
    shape = (p // 2, 2) if p % 2 == 0 else (1, p)
    mesh = dist.init_device_mesh(device().type, shape, mesh_dim_names=("replicate", "shard"))
    model = chain(16, 2, seed=seed)
    for part in [*model, model]:
        fully_shard(part, mesh=mesh)
    return model, shape


# %% tags=["nbval-ignore-output"]
# %%writefile "$W/sharded.py" -a
def run(settings):
    model, shape = build(seed="load" in settings)  # whoever loads begins with other weights
    if "load" in settings:
        state = get_model_state_dict(model)  # where the loaded shards go
        dcp.load(state, checkpoint_id=settings["load"])
        set_model_state_dict(model, state)
    else:
        step(model, *mine(*batch(84, 16)))
        torch.optim.SGD(model.parameters(), 0.1).step()
        dcp.save(get_model_state_dict(model), checkpoint_id=settings["save"])
    whole = model[0].up.weight.full_tensor()
    return {"mesh": shape, "part": model[0].up.weight.to_local().shape, "sum": float(whole.sum())}


# %% tags=["nbval-ignore-output"]
saved = FOLDER / "saved"
shutil.rmtree(saved, ignore_errors=True)
MESH = {"width": 32, "depth": 2, "rows": 16, "rounds": 3, "sizes": SETTINGS["sizes"]}
four = distributed.launch(
    *files("sharded"), job("messages"), job("mesh"), workers=4, settings=MESH | {"save": str(saved)}
)
one = four["sharded"][0]
print(f"mesh {one['mesh']}: a worker stores {one['part']} of [64, 16], the sum is {one['sum']:.6f}")
print("files:", sorted(path.name for path in saved.iterdir()))

# %% [markdown]
# Each stores half, not a quarter: two pairs hold copies. All write, and no shard is written twice:
# the copies' owners share the work. One worker will read the files below.
#
# ## From scratch: a pipeline on paper
# Worker 0 holds the first layers, worker 1 the next ones. With one batch, one of them always waits.
# So cut the rows into $m$ *micro-batches*. *GPipe* (Huang et al. 2019) runs all forward passes,
# then all backward ones. A digit is a forward pass, a letter a backward one, a dot is idle.


# %%
def timeline(p, m):
    """One row a worker (a stage), one column a time slot."""
    slots = range(m + p - 1)
    for stage in range(p):
        forward = [str(t - stage) if 0 <= t - stage < m else "·" for t in slots]
        late = p - 1 - stage
        backward = ["abcdefgh"[t - late] if 0 <= t - late < m else "·" for t in slots]
        print(f"worker {stage}  ", *forward, " ", *backward)


timeline(p=3, m=5)

# %% [markdown]
# ## Explain: the bubble is an intercept
# Count: $m + p - 1$ slots, of which each worker idles $p - 1$. That is the *bubble*, a share of
# $(p-1)/(m+p-1)$. It predicts a step's time, $t = s·(m + p - 1)$: a line over $m$ with slope $s$,
# whose intercept is $p - 1$ slots. No pipeline at all, one micro-batch after the other, has slope
# $p·s$ and intercept 0. So fit the line. Two cores that share everything are a poor pipeline, so
# [these stages](../course_utils/distributed/jobs/pipes.py) compute next to nothing and *wait*, as
# your process does while a GPU works: what is measured is PyTorch's schedule.

# %% tags=["nbval-ignore-output"]
counts = SHARED["counts"]


def line(life, name):
    """Slope in seconds, and intercept in slots, of a step's time over m."""
    rounds = [np.max([one["times"][f"{name}, {m}"] for one in life], 0) for m in counts]
    took = [min(each) for each in rounds]  # a wait can only come out longer than it is
    slope, intercept = np.polyfit(counts, took, 1)
    return slope, intercept / slope


schedules = ("GPipe", "1F1B")
fits = {n: [line(life, n) for life in shared["pipes"]] for n in schedules}
lost_slots = {n: measure.over_processes([slots for _, slots in fits[n]]) for n in schedules}
plots.intervals(
    lost_slots,
    xlabel="intercept, in slots (the formula says p − 1 = 1)",
    title=f"GPipe on two workers loses {lost_slots['GPipe'].value:.2f} slots to filling",
    alt="Lost slots with intervals for GPipe and 1F1B; the formula says 1.",
    same=None,
)
claims.verdict("09.bubble_formula", lost_slots["GPipe"])

# %% tags=["nbval-ignore-output"]
one = [max(life[0]["times"]["one by one, 8"]) for life in shared["pipes"]]
print(f"one by one, m = 8: {1e3 * np.median(one):.0f} ms")
for name in schedules:
    slot = np.median([slope for slope, _ in fits[name]])
    took = np.median([np.median(life[0]["times"][f"{name}, 8"]) for life in shared["pipes"]])
    alive = [worker["alive"][f"{name}, 8"] for worker in shared["pipes"][0]]
    print(f"{name:5}, m = 8: {1e3 * took:.0f} ms, a slot {1e3 * slot:.1f} ms; alive: {alive}")

# %% [markdown]
# *Alive* is the most micro-batches that a worker held between their forward and backward pass.
# GPipe holds all $m$; *1F1B* starts a backward pass as soon as it can, and worker $i$ holds $p-i$.
# Its gain is memory: on paper its bubble is GPipe's. *Zero-bubble* schedules split the backward
# pass and fill the gaps with the half that nobody waits for. All of them compute the same
# gradients.

# %% [markdown]
# ## Measure: a worker is killed while it writes
# Of many machines one fails often. *Elastic* training saves its state, and torchrun starts all
# workers again when one dies. Four things make the end equal bit for bit: the optimizer's state is
# saved; so is each worker's random generator (dropout draws from it); the rows depend on the step's
# number alone; and a file is complete or absent. For the last one, write to another name, and give
# it the right one when it is complete. Here worker 0 dies by `kill -9` in the middle of a write.

# %%
from safetensors.torch import load, save


def write(path, content, die=False):
    """A file that is complete or absent; whoever dies half-way leaves the old one whole."""
    with path.with_suffix(".part").open("wb") as file:
        file.write(content[: len(content) // 2 if die else None])
    if not die:
        path.with_suffix(".part").replace(path)


old, new = (save({"done": torch.tensor(step)}) for step in (5, 6))
write(FOLDER / "state.st", old)
write(FOLDER / "state.st", new, die=True)
print("the file holds step", int(load((FOLDER / "state.st").read_bytes())["done"]))
with exercises.fails(Exception):
    load((FOLDER / "state.part").read_bytes())  # what you would have without the other name

# %% [markdown]
# [The training](../course_utils/distributed/jobs/elastic.py) does this on two workers, with
# dropout. The same start has [a second file](../course_utils/distributed/jobs/hang.py): worker 0
# has a batch more than worker 1, and waits for it in an all-reduce.

# %% tags=["nbval-ignore-output"]
out = FOLDER / "elastic"
shutil.rmtree(out, ignore_errors=True)  # an old checkpoint would make it short
RUN = {"steps": 8 if SMOKE else 14, "kill_at": 5}
told = distributed.launch(job("elastic"), job("hang"), settings=RUN, out=out, restarts=1)
ends = told["elastic"][0]
print(
    f"killed while it saved step {RUN['kill_at'] + 1}; begun again after step {ends.pop('begin')}"
)
for name, gap in ends.items():
    print(f"{name:22} weights apart by {gap:.0e}")
assert ends["killed and restarted"] == ends["nothing forgotten"] == 0

# %% [markdown]
# Zero is *the same bits*. Compare the two lines in which something is forgotten: such a run goes on
# without any error, and ends elsewhere. PyTorch's
# [tutorial](https://docs.pytorch.org/tutorials/beginner/saving_loading_models.html) on general
# checkpoints names the optimizer's state, and not the generator. (From three workers on, the order
# of adding counts, too: DDP arranges its buckets anew after its first step. The file forbids it.)
#
# *Elastic* also means that the number of workers changes. Let one worker go on where two were; it
# also reads what four workers wrote above.

# %% tags=["nbval-ignore-output"]
alone = distributed.launch(
    job("elastic"),
    *files("sharded"),
    workers=1,
    settings=RUN | {"go_on": True, "load": str(saved)},
    out=out,
)
for name, gap in alone["elastic"][0].items():
    print(f"two workers, then one, {name}: weights apart by {gap:.0e}")
print(f"read by one worker: the sum is {alone['sharded'][0]['sum']:.6f}")
print("\nhang, worker 0 is told by")
for who, said in told["hang"][0].items():
    print(f"  {who}: {said}")

# %% [markdown]
# Without dropout the gap is rounding: the same rows are added in another order. With dropout it is
# another training run: the second worker's generator is gone, and its masks with it. A change of
# workers keeps the bits only if nothing depends on who computes.
#
# The last lines are a hang, diagnosed. The worker that *waits* is the one that complains, and its
# traceback leads to a line without a mistake. `monitored_barrier` names who is missing. That one
# has one batch fewer: use a `DistributedSampler` (it repeats rows), or DDP's `join()`. If nobody
# ends, look where each worker stands: `py-spy dump` says it of any process (`distributed.launch`
# does when its time is up), and NCCL's *flight recorder* lists each GPU's last collectives.
#
# ## From scratch: a simulator, and what it may say
# You have two cores and want to know about hundreds of GPUs. Write down what you measured as a
# model, with one number a cause: $a$ seconds for each row of each block, $b$ for each block however
# few its rows, $c$ for each byte of gradient, and $\alpha$ as above:
#
# $$t = a · \text{blocks} · \text{rows} + b · \text{blocks} + c · \text{bytes} + 2\alpha$$
#
# Fit $a$ and $b$ on the silent steps of three settings, $c$ on their DDP steps. The other settings
# are *held out*: a model that is fitted to everything predicts nothing.


# %% tags=["nbval-ignore-output"]
messages = [sent("torch", life) for life in measured["messages"]]
of_two = {n: np.median([took[n] for took in messages]) for n in messages[0]}
alpha, per_byte = alpha_beta(of_two)
print(f"a message costs {1e6 * alpha:.0f} µs, then {1e-9 / per_byte:.2f} GB/s")

# %%
FIT = [[4, 64], [4, 256], [8, 256]]


def gradient_bytes(blocks):
    return 4 * blocks * (8 * SETTINGS["width"] ** 2 + 5 * SETTINGS["width"])


def fitted(times, alpha):
    """a, b, c from the settings in FIT; times[setting] are the seconds of its arms."""
    silent = np.array([times[blocks, rows]["silent"] for blocks, rows in FIT])
    design = np.array([[blocks * rows, blocks] for blocks, rows in FIT])
    (a, b), *_ = np.linalg.lstsq(design / silent[:, None], np.ones(len(FIT)), rcond=None)
    sending = [
        (times[blocks, rows]["ddp"] - times[blocks, rows]["silent"] - 2 * alpha)
        / gradient_bytes(blocks)
        for blocks, rows in FIT
    ]
    return a, b, float(np.mean(sending))


def predicted(model, blocks, rows, alpha):
    a, b, c = model
    return a * blocks * rows + b * blocks + c * gradient_bytes(blocks) + 2 * alpha


# %% tags=["nbval-ignore-output"]
HELD_OUT = [case for case in SETTINGS["cases"] if case not in FIT and case[1] >= 64]


def deviations(life, alpha):
    """How far each held-out setting's prediction is off, in percent."""
    times = {(b, r): typical(life, f"{b} x {r}") for b, r in SETTINGS["cases"]}
    model = fitted(times, alpha)
    guess = {case: predicted(model, *case, alpha) for case in times}
    return {case: 100 * (guess[case] / times[case]["ddp"] - 1) for case in times}


off = [deviations(life, alpha) for life in steps]
by_median = [np.median([abs(one[tuple(case)]) for case in HELD_OUT]) for one in off]
error = measure.over_processes(by_median)
for case in HELD_OUT:
    print(case, f"off by {np.median([one[tuple(case)] for one in off]):+.0f}% in the middle life")
print(f"median over these: off by {error.value:.0f}% [{error.low:.0f}, {error.high:.0f}]")

# %% [markdown]
# Each life is fitted and judged by itself, and the interval is over lives. If it is wide, two busy
# processes on your machine scatter by more than the model is wrong: then it is not the model that
# you have judged.
#
# Now leave the fitted range. The $\alpha$–$\beta$ model knows two workers; the start above has
# timed all-reduces of four.

# %% tags=["nbval-ignore-output"]
of_four = sent("torch", four["messages"])
for n, took in of_four.items():
    guess = 2 * 3 * (alpha + n / 4 * per_byte)  # 2(p − 1) messages of a p-th
    print(f"{n:8} bytes: {1e3 * took:6.2f} ms, predicted {1e3 * guess:6.2f}: {took / guess:.1f}x")

# %% [markdown]
# A ring's formula gives every worker a link of its own. Your four workers share two cores, and what
# carries a message is a core. If your factor is far above 1, that is why you can't carry $\beta$
# across a boundary at which something begins to be shared: cores here, a switch in a cluster. Run
# it on four idle cores, and the factor must fall; if it does not, the model is wrong.
#
# ## Measure: 256 GPUs, as a curve over what is assumed
# Goyal et al. (2017) report an efficiency of about 90% when they go from 8 to 256 GPUs. Their
# numbers: 100 MB of gradients, a backward pass of 0.12 s, one network card of 50 Gbit/s for 8 GPUs
# that add up inside their server first. Not told, and assumed here: a forward pass of half the
# backward one's time, 50 µs a message, and the share of the travel that *hides* behind the backward
# pass. Let the last one be the axis.


# %%
def efficiency_at(servers, hidden, messages, card=50e9 / 8, size=100e6, step=0.18, alpha=50e-6):
    """Against one server, which needs no network; at most the backward pass can hide travel."""
    travel = messages(servers) * alpha + 2 * (servers - 1) / servers * size / card
    return step / (step + travel - min(hidden * travel, 2 / 3 * step))


def in_a_ring(servers):
    return 2 * (servers - 1)


def by_halving(servers):  # each round with a partner twice as far away: what Goyal et al. used
    return 2 * math.log2(servers)


# %% tags=["nbval-ignore-output"]
hidden = [k / 10 for k in range(11)]
curves = {
    f"{name}, {servers} servers": [100 * efficiency_at(servers, h, kind) for h in hidden]
    for name, kind in {"ring": in_a_ring, "halving": by_halving}.items()
    for servers in (32, 512)
}

# %% tags=["nbval-ignore-output"]
least, most = (100 * efficiency_at(32, h, by_halving) for h in (0, 1))
plots.lines(
    hidden,
    curves,
    xlabel="share of the travel that hides behind the backward pass (assumed)",
    ylabel="efficiency against one server (%)",
    title=f"256 GPUs: from {least:.0f}% to {most:.0f}%, as you assume",
    alt="Efficiency over the hidden share: all lines rise to 100%, and one level crosses them.",
    reference=(90, "Goyal et al. 2017"),
)

# %% [markdown]
# Where a curve crosses the published level, a model with this knob "predicts" it; elsewhere it
# "predicts" another one. An assumption that decides the answer is no prediction. What the model
# does say: which levels are out of reach, and what more servers cost. To make it a prediction,
# measure the hidden share on two servers, then predict 32.
#
# ## If yours shows no gain
# | You see | Because | Look at |
# |---|---|---|
# | two processes slower than two threads | the same two cores, plus messages | a second machine, or a GPU each |
# | DDP far slower than one process | each process takes all cores for its threads | `OMP_NUM_THREADS`; here it is 1 |
# | FSDP saves little | activations, or one huge block, are the peak | shard each block; checkpointing, chapter 8 |
# | the loss differs from one process's | unequal terms, BatchNorm, each worker's own seed | the loss over all workers |
# | the bubble above the formula | unequal stages, costly messages | the slowest stage; more micro-batches |
#
# ## Exercise B · a ring for any length
# The ring above needs a length that $p$ divides. Write `ring(x, rank, p, send, receive)`, which
# runs on every worker: `x` is a one-dimensional tensor (any length, also shorter than $p$, also
# empty; any dtype); `send(tensor)` hands a copy to the right neighbour and does not wait;
# `receive()` waits for the left neighbour's. Return the sum over all workers as a new tensor of the
# same dtype and leave `x` alone. Demands: on each worker exactly $2(p-1)$ messages, none longer
# than a $p$-th of the vector, rounded up; what workers know of each other comes by these messages
# alone. Example: `p = 1` sends nothing and returns a copy.


# %% tags=["exercise"]
def ring(x, rank, p, send, receive): ...


# %%
exercises.check("09.B", ring)

# %% [markdown] tags=["hint"]
# `torch.tensor_split(y, p)` cuts any length into exactly `p` pieces (some may be empty) that are
# views of `y`. `chunk` may give fewer.

# %% [markdown] tags=["hint"]
# Each of the two loops sends one piece and receives the piece *before* it. In the first loop add,
# in the second overwrite.


# %% tags=["solution"]
def ring(x, rank, p, send, receive):
    result = x.clone()
    pieces = torch.tensor_split(result, p)
    for k in range(p - 1):
        send(pieces[(rank - k) % p])
        pieces[(rank - k - 1) % p].add_(receive())
    for k in range(p - 1):
        send(pieces[(rank - k + 1) % p])
        pieces[(rank - k) % p].copy_(receive())
    return result


# %% tags=["wrong"]
# chunk gives fewer pieces than workers for short vectors: the edge.
def ring(x, rank, p, send, receive):
    result = x.clone()
    pieces = result.chunk(p)
    for k in range(p - 1):
        send(pieces[(rank - k) % p].clone())
        pieces[(rank - k - 1) % p].add_(receive())
    for k in range(p - 1):
        send(pieces[(rank - k + 1) % p].clone())
        pieces[(rank - k) % p].copy_(receive())
    return result


# %% tags=["wrong"]
# The whole vector travels round the ring: the right sum, p times the bytes.
def ring(x, rank, p, send, receive):
    result, passing = x.clone(), x.clone()
    for _ in range(p - 1):
        send(passing)
        passing = receive()
        result = result + passing
    for _ in range(p - 1):
        send(result[:0])
        receive()
    return result


# %% tags=["wrong"]
# Works on the caller's tensor: the gradient of the next step is spoiled.
def ring(x, rank, p, send, receive):
    pieces = torch.tensor_split(x, p)
    for k in range(p - 1):
        send(pieces[(rank - k) % p].clone())
        pieces[(rank - k - 1) % p].add_(receive())
    for k in range(p - 1):
        send(pieces[(rank - k + 1) % p].clone())
        pieces[(rank - k) % p].copy_(receive())
    return x


# %% tags=["wrong"]
# Receives before it sends: everybody waits for everybody.
def ring(x, rank, p, send, receive):
    result = x.clone()
    pieces = torch.tensor_split(result, p)
    for k in range(p - 1):
        pieces[(rank - k - 1) % p].add_(receive())
        send(pieces[(rank - k) % p].clone())
    for k in range(p - 1):
        pieces[(rank - k) % p].copy_(receive())
        send(pieces[(rank - k + 1) % p].clone())
    return result


# %% [markdown] tags=["instructor"]
# 10 minutes. Four people in a circle with four paper slips each do it by hand first. Ask which
# demand `chunk` breaks, and let somebody cause the deadlock on purpose.

# %% [markdown]
# ## Exercise C · choose a layout
# You have `gpus` GPUs in machines of `per_node`, a model of `layers` layers, a batch of `batch`
# rows, and `budget` bytes of memory on each GPU. `need(data, tensor, pipe)` gives the bytes a GPU
# needs under a plan, `seconds(data, tensor, pipe)` the time of a step. Write `layout(gpus,
# per_node, layers, batch, budget, need, seconds)`: return the fastest tuple `(data, tensor, pipe)`
# of whole numbers such that all GPUs are used ($data · tensor · pipe = gpus$), tensor parallel
# stays within one machine (`tensor` divides `per_node`), `pipe` divides `layers`, `data` divides
# `batch`, and `need` is **at most** `budget`. If there is none, return `None`. Example: with one
# GPU and enough memory, `(1, 1, 1)`.


# %% tags=["exercise"]
def layout(gpus, per_node, layers, batch, budget, need, seconds): ...


# %%
exercises.check("09.C", layout)

# %% [markdown] tags=["hint"]
# Loop over all `tensor` and `pipe` from 1 to `gpus`; `data` follows, if `gpus` divides.

# %% [markdown] tags=["hint"]
# Collect what is allowed, then `min(allowed, key=lambda plan: seconds(*plan), default=None)`.


# %% tags=["solution"]
def layout(gpus, per_node, layers, batch, budget, need, seconds):
    allowed = [
        (gpus // (tensor * pipe), tensor, pipe)
        for tensor in range(1, gpus + 1)
        for pipe in range(1, gpus + 1)
        if gpus % (tensor * pipe) == 0 and per_node % tensor == 0 and layers % pipe == 0
    ]
    allowed = [plan for plan in allowed if batch % plan[0] == 0 and need(*plan) <= budget]
    return min(allowed, key=lambda plan: seconds(*plan), default=None)


# %% tags=["wrong"]
# The batch is forgotten: nine rows on six workers.
def layout(gpus, per_node, layers, batch, budget, need, seconds):
    allowed = [
        (gpus // (tensor * pipe), tensor, pipe)
        for tensor in range(1, gpus + 1)
        for pipe in range(1, gpus + 1)
        if gpus % (tensor * pipe) == 0 and per_node % tensor == 0 and layers % pipe == 0
    ]
    allowed = [plan for plan in allowed if need(*plan) <= budget]
    return min(allowed, key=lambda plan: seconds(*plan), default=None)


# %% tags=["wrong"]
# Tensor parallel across machines: the slow link is in every layer.
def layout(gpus, per_node, layers, batch, budget, need, seconds):
    allowed = [
        (gpus // (tensor * pipe), tensor, pipe)
        for tensor in range(1, gpus + 1)
        for pipe in range(1, gpus + 1)
        if gpus % (tensor * pipe) == 0 and layers % pipe == 0
    ]
    allowed = [plan for plan in allowed if batch % plan[0] == 0 and need(*plan) <= budget]
    return min(allowed, key=lambda plan: seconds(*plan), default=None)


# %% tags=["wrong"]
# "Below" in place of "at most": wrong only where the memory is met to the byte.
def layout(gpus, per_node, layers, batch, budget, need, seconds):
    allowed = [
        (gpus // (tensor * pipe), tensor, pipe)
        for tensor in range(1, gpus + 1)
        for pipe in range(1, gpus + 1)
        if gpus % (tensor * pipe) == 0 and per_node % tensor == 0 and layers % pipe == 0
    ]
    allowed = [plan for plan in allowed if batch % plan[0] == 0 and need(*plan) < budget]
    return min(allowed, key=lambda plan: seconds(*plan), default=None)


# %% tags=["wrong"]
# Powers of two up to 8 only: misses machines of six GPUs, and of sixteen.
def layout(gpus, per_node, layers, batch, budget, need, seconds):
    allowed = [
        (gpus // (tensor * pipe), tensor, pipe)
        for tensor in (1, 2, 4, 8)
        for pipe in (1, 2, 4, 8)
        if gpus % (tensor * pipe) == 0 and per_node % tensor == 0 and layers % pipe == 0
    ]
    allowed = [plan for plan in allowed if batch % plan[0] == 0 and need(*plan) <= budget]
    return min(allowed, key=lambda plan: seconds(*plan), default=None)


# %% [markdown] tags=["instructor"]
# 8 minutes. Afterwards ask why Narayanan et al. (2021) stop at tensor parallel over 8 GPUs for a
# trillion parameters on 3,072 of them (a machine has 8).

# %% [markdown]
# ## Break it
# Give DDP little to compute and the same gradients to send. The settings were timed above; their
# share of silent work is what is left for computing. And the simulator has not seen so few rows.

# %% tags=["nbval-ignore-output"]
share = {
    f"{blocks} blocks, {rows} rows": measure.over_processes(
        [100 * t["silent"] / t["ddp"] for t in (typical(x, f"{blocks} x {rows}") for x in steps)]
    )
    for blocks, rows in sorted(SETTINGS["cases"], key=lambda case: case[1])
}
fewest = min(share, key=lambda name: share[name].value)
plots.bars(
    share,
    xlabel="computing, as a share of the DDP step (%)",
    title=f"With {fewest} only {share[fewest].value:.0f}% of a DDP step computes",
    alt="Bars by rows: the fewer rows a worker has, the smaller the share that computes.",
)
outside = measure.over_processes([1 + one[8, 16] / 100 for one in off])
print(f"outside of the fitted range, 16 rows: predicted over measured is {outside}")

# %% [markdown]
# The shortest bar should belong to the fewest rows: gradients have the bytes of the weights,
# however few the rows. Give each worker more rows, or use `no_sync` for several small batches, or
# send fewer bytes (a *communication hook* can send 16 bits).
#
# ## Exit quiz
# **1. A ring all-reduce of 100 MB over 8 workers: how many bytes does each send?**
# <details><summary>700 MB</summary>That is the plain way through one worker, seen from that worker,
# in one direction.</details>
# <details><summary>175 MB</summary>Right: 14 messages of 12.5 MB.</details>
# <details><summary>12.5 MB</summary>That is one message.</details>
#
# **2. DDP's gradients differ from the large batch's by 5%, in fp64, too. Rows are padded. Look
# first for**
# <details><summary>rounding</summary>It would shrink with more precision.</details>
# <details><summary>a slow network</summary>Speed changes no number.</details>
# <details><summary>what the loss is divided by</summary>Right: each worker's mean is over its own
# terms.</details>
#
# **3. ZeRO stage 3 on 8 GPUs divides by 8**
# <details><summary>weights, gradients and the optimizer's state between
# steps</summary>Right.</details>
# <details><summary>the peak of a step</summary>Activations and the collected block
# remain.</details>
# <details><summary>the computation of each layer</summary>Every worker computes every layer, for
# its own rows.</details>
#
# **4. A pipeline of 4 stages with 12 micro-batches idles**
# <details><summary>25%</summary>That is 3 of 12: the idle slots against the working ones.</details>
# <details><summary>20%</summary>Right: 3 of 15 slots.</details>
# <details><summary>nothing, with 1F1B</summary>1F1B has the same bubble and fewer live
# activations.</details>
#
# **5. A run restarts from model, optimizer and step, and ends with other weights. What is
# missing?**
# <details><summary>the number of epochs</summary>It follows from the step.</details>
# <details><summary>more precision</summary>The same operations round in the same way.</details>
# <details><summary>the state of each worker's generator</summary>Right, if anything draws: dropout,
# augmentation.</details>
#
# **Key points** · in a ring all-reduce each worker sends $2(p-1)/p$ of the vector, never more than
# twice its bytes · DDP equals the large batch if rows are treated alone and the loss is divided by
# the terms of *all* workers · a larger batch takes fewer steps: the learning-rate rule holds up to
# a size · efficiency has a definition; the rival on one machine is a thread · ZeRO divides what
# stays, not what a step needs · a pipeline loses $p - 1$ slots a step · weights, optimizer,
# generators, rows by step and complete files survive a kill · fit on some, judge on others, and
# draw a curve over what you assume.
#
# **Sources** · P. Goyal et al., *Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour*, 2017
# · S. Li et al., *PyTorch Distributed: Experiences on Accelerating Data Parallel Training*, 2020 ·
# S. Rajbhandari et al., *ZeRO: Memory Optimizations Toward Training Trillion Parameter Models*,
# 2020 · Y. Huang et al., *GPipe: Efficient Training of Giant Neural Networks using Pipeline
# Parallelism*, 2019 · D. Narayanan et al., *Efficient Large-Scale Language Model Training on GPU
# Clusters Using Megatron-LM*, 2021 · P. Patarasuk and X. Yuan, *Bandwidth Optimal All-reduce
# Algorithms for Clusters of Workstations*, 2009 · P. Qi et al., *Zero Bubble Pipeline Parallelism*,
# 2023 · PyTorch's documentation of
# [torchrun](https://docs.pytorch.org/docs/stable/elastic/run.html),
# [DDP](https://docs.pytorch.org/docs/stable/notes/ddp.html),
# [fully_shard](https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html) and
# [distributed checkpoints](https://docs.pytorch.org/docs/stable/distributed.checkpoint.html).
#
# **For the capstone** row 09 of your ledger, *distributed*, says what a second worker buys on your
# machine, and how far a prediction may be trusted. Next: [10 · Operator
# fusion](10_operator_fusion.ipynb), back to one processor, and to the bytes it carries about.

# %% [markdown]
# ## Further
# Each part stands alone.
#
# ### What a message costs
# Does your own ring keep up with torch's? The line is the $\alpha$–$\beta$ model.

# %% tags=["nbval-ignore-output"]
lives = {kind: [sent(kind, life) for life in measured["messages"]] for kind in ("ring", "torch")}
sizes = list(lives["torch"][0])
middle = {kind: {n: np.median([t[n] for t in of]) for n in sizes} for kind, of in lives.items()}
plots.lines(
    [n / 1024 for n in sizes],
    {kind: [1e3 * t[n] for n in sizes] for kind, t in middle.items()}
    | {"α–β model": [1e3 * 2 * (alpha + n / 2 * per_byte) for n in sizes]},
    xlabel="vector (KiB)",
    ylabel="all-reduce of two workers (ms)",
    logx=True,
    logy=True,
    title=f"A message costs {1e6 * alpha:.0f} µs, then {1e-9 / per_byte:.2f} GB/s",
    alt="Time against size: flat for short vectors, in proportion to the size for long ones.",
)

# %% [markdown]
# On the left only the number of messages counts, on the right only bytes. That is why DDP packs
# small gradients into *buckets*, and sends each as soon as it is full, while the rest of the
# backward pass still computes. On a GPU that hides most of the travel; on a CPU the cores that
# should compute do the carrying.
#
# ### Cut a layer
# Tensor parallel, on paper. A block computes $\mathrm{down}(\mathrm{relu}(\mathrm{up}(x)))$. Give
# each worker half of `up`'s outputs and the same half of `down`'s inputs. ReLU looks at each number
# alone, so no message is due in between; the two results must be added: one all-reduce. Cut the
# other way round, `up` by its inputs, and each worker has only a part of the sum that ReLU must
# see.

# %%
torch.manual_seed(0)
up, down = nn.Linear(4, 8, bias=False).double(), nn.Linear(8, 4, bias=False).double()
x = torch.randn(3, 4, dtype=torch.float64)
want = down(F.relu(up(x)))
halves = slice(0, 4), slice(4, 8)  # of the hidden numbers: worker 0, worker 1
parts = [F.linear(F.relu(F.linear(x, up.weight[h])), down.weight[:, h]) for h in halves]
print("columns, then rows:", torch.allclose(sum(parts), want, atol=1e-14))
inputs = slice(0, 2), slice(2, 4)  # of the inputs
sums = [F.linear(x[:, i], up.weight[:, i]) for i in inputs]  # each worker has a part of each sum
print("rows first, without a message:", torch.allclose(down(sum(map(F.relu, sums))), want))

# %% [markdown]
# PyTorch calls them `ColwiseParallel` and `RowwiseParallel`. The names are about the $W$ of $xW$; a
# `Linear` stores it transposed, so `up`'s columns are *rows* of `up.weight`.
#
# ### A mesh of two dimensions
# Machines of 8 GPUs: tensor parallel inside, where links are fast; FSDP across, where they are
# slow. [The four workers above](../course_utils/distributed/jobs/mesh.py) also did this, as two
# times two.

# %% tags=["nbval-ignore-output"]
one = four["mesh"][0]
print(f"mesh {one['mesh']} (data, tensor): a worker stores {one['part']} of [128, 32]")
print("collectives of two blocks' forward pass:", one["collectives"])
print(f"apart from one process by {max(told['apart'] for told in four['mesh']):.0e}")

# %% [markdown]
# A quarter of the weights each. One all-gather a block collects a half along `data`; one all-reduce
# a block adds the parts along `tensor`. Long sequences are cut in the same manner (*context
# parallel*: the attention's keys travel round a ring), and so are the experts of a mixture (*expert
# parallel*: an all-to-all sends each token to its expert's worker). Both are further dimensions of
# the mesh.
#
# ### Two habits that go wrong
# Weights that each worker draws for itself; a sampler whose epoch nobody sets. A
# `DistributedSampler` shuffles the numbers of the rows and deals them out. It needs no group: tell
# it the rank.

# %%
from torch.utils.data import DistributedSampler


def rows_of(rank, epoch=None, count=8, **how):
    sampler = DistributedSampler(range(count), num_replicas=2, rank=rank, **how)
    if epoch is not None:
        sampler.set_epoch(epoch)
    return list(sampler)


for epoch in (None, None, 0, 1):
    print(f"set_epoch({epoch}): worker 0 {rows_of(0, epoch)}, worker 1 {rows_of(1, epoch)}")
print("seven rows:", rows_of(0, count=7, shuffle=False), rows_of(1, count=7, shuffle=False))

# %%
models_of = []
for rank in range(2):
    torch.manual_seed(rank)  # each worker draws its own weights
    models_of.append(nn.Linear(4, 4))
for _ in range(3):  # both get the average of both gradients
    gradient = torch.randn(4, 4)
    with torch.no_grad():
        for own in models_of:
            own.weight -= 0.1 * gradient
difference = (models_of[0].weight - models_of[1].weight).abs().max()
print(f"after three steps with one gradient the weights differ by {difference:.2f}")

# %% [markdown]
# Without `set_epoch` every epoch has the *same* order. With seven rows one is used twice, so that
# both workers take equally many steps; for an accuracy over a test set it counts double. And
# averaged gradients keep a difference for ever: both models move by the same step from different
# places. DDP sends worker 0's weights to all when you wrap the model.
#
# ### Myth: run a cell's function in other processes

# %% tags=["nbval-ignore-output"]
import pickle
import subprocess
import sys

import torch.multiprocessing as mp


def work(rank):
    print("hello from", rank)


errors = os.dup(2)
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the new process prints a page; its last line follows
try:
    with exercises.fails(Exception):
        mp.spawn(work, nprocs=1)  # what many tutorials say
finally:
    os.dup2(errors, 2)
code = f"import pickle; pickle.loads({pickle.dumps(work)!r})"  # what the new process does first
ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
print(ran.stderr.splitlines()[-1])

# %% [markdown]
# A function travels as its *name*. The new process imports your main program and looks the name up;
# your cells are not in it. Hence files, and torchrun, which also sets the four variables without
# which `init_process_group` finds nobody: `RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`.
#
# ### DeepSpeed
# *DeepSpeed* brought ZeRO into the world. "It does model parallelism automatically", many
# introductions say. Two settings,
# [same model, same rows](../course_utils/distributed/jobs/deep.py): ZeRO in its three stages, and
# `tensor_parallel.autotp_size`, which since version 0.16.4 (2025) cuts layers in training, too.

# %% tags=["nbval-ignore-output"]
if machine.can("package:deepspeed"):
    deep = distributed.launch(
        job("deep"), settings={"width": 64}, env={"DS_ACCELERATOR": "cpu"}, timeout=180
    )
    for way, got in deep["deep"][0].items():
        same = f", weights apart by {got['apart']:.0e}" if "apart" in got else ""
        print(f"{way}: computes {got['share']:.0%} of a layer, stores {got['weights']} bytes{same}")
else:
    print(machine.skip("package:deepspeed", "DeepSpeed's ZeRO and AutoTP"))

# %% [markdown]
# Under ZeRO-3 no worker *stores* a whole layer, yet each *computes* every layer in full, for its
# own rows: data parallelism with shared storage. With `autotp_size` each computes a part of every
# layer, for the same rows: that is model parallelism, and its
# [tutorial](https://www.deepspeed.ai/tutorials/autotp-training) (2026) combines it with ZeRO up to
# stage 2. So the sentence is true if you ask for it, and false for ZeRO alone.
#
# ### Two machines on one
# Linux can give a process a network of its own, a *namespace*: own addresses, own ports. Two of
# them, joined by a virtual cable, are two machines as far as torchrun can tell. That needs root.

# %% tags=["nbval-ignore-output"]
if machine.can("root") and machine.can("full"):
    nodes = distributed.launch_two_nodes(*files("ring"))
    print("two nodes:", [told["after"] for told in nodes["ring"]])
else:
    why = "full" if machine.can("root") else "root"
    print(machine.skip(why, "two nodes as two network namespaces"))
