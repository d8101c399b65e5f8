# %% [markdown]
# # 09 · Distributed training
#
# **What does a second worker buy you, what does it cost, and how far can you carry the answer?**
#
# After this chapter you can: *write* an all-reduce from messages between neighbours · *prove* that
# data-parallel training equals one large batch, and name the layer for which it does not ·
# *compute* the bytes a worker holds under ZeRO · *explain* why a pipeline idles · *restart* a
# killed worker and end at the same bits · *predict* the step time on machines you don't have.
#
# 195 minutes · before this: 1 Measurement; 8 helps · runs on any CPU, two processes

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
from course_utils.measure.stats import speedup

SMOKE, FULL = PROFILE == "smoke", PROFILE == "full"
FOLDER = scratch("09")  # what the workers run and write
W = Path(os.path.relpath(FOLDER)).as_posix()
SETTINGS = {"width": 192, "depth": 8, "rows": 256, "rounds": 24 if FULL else 12, "bucket_mb": 1.0}
SETTINGS |= {"cases": [[4, 64], [4, 256], [8, 256], [4, 128], [8, 64], [8, 128], [6, 192], [8, 8]]}
SETTINGS |= {"micro": 64, "fit": 3}  # blocks and rows; the first three cases are for fitting
SETTINGS |= {"sizes": [2**8, 2**12, 2**16, 2**18, 2**20, 2**22], "counts": [2, 4, 8]}
SETTINGS |= {"tp_rows": [256, 128, 512], "steps": 20, "kill_at": 7}
if SMOKE:
    SETTINGS |= {"width": 32, "rows": 32, "rounds": 8, "bucket_mb": 0.03, "micro": 8, "steps": 6}
    SETTINGS |= {"sizes": [2**4, 2**8, 2**12], "tp_rows": [32, 16, 64], "kill_at": 3}
    SETTINGS["cases"] = [[4, 16], [4, 64], [8, 64], [8, 32], [6, 48], [8, 8]]
MIB = 2**20  # bytes
machine.card()

# %% [markdown]
# ## Recall
# 1. (Chapter 1) One arm of a comparison has two threads, the other one. What may you conclude from
#    its speed-up?
#    <details><summary>Answer</summary>Nothing about the method: you measured threads. Both arms get
#    the same cores.</details>
# 2. (Chapter 8) A model has a million parameters, trained with Adam in fp32. How many bytes stay
#    between two steps?
#    <details><summary>Answer</summary>Sixteen million: four for the weight, four for its gradient,
#    eight for Adam's two numbers.</details>
# 3. (Chapter 8) What must be restored so that a repeated computation gives the same bits?
#    <details><summary>Answer</summary>Everything it reads: its input, the weights, and the state of
#    the random generator. A whole training run also reads the optimizer's state: you need that
#    below.</details>
#
# ## Predict
# You have two cores. Arm one: one process that uses both as two threads. Arm two: two processes,
# one thread each, half of the rows each, gradients averaged. How many times faster is arm two?
# Then: two workers shard weights, gradients and Adam's numbers between them. By what factor does
# the *peak* memory of a worker fall?

# %%
my_speedup = ...  # 1 means equally fast
my_factor = ...  # 1 means no saving
exercises.predict("09.speedup", my_speedup)
exercises.predict("09.memory", my_factor)

# %% [markdown]
# ## Four ways to share one model
# A *worker* (often called a rank) is a process with its own memory. Nothing is shared: what one
# knows, another must be sent. Four things can be divided among workers.

# %%
from matplotlib.patches import Rectangle

WAYS = {
    "data": "rows; every gradient travels",
    "tensor": "columns; activations travel",
    "pipeline": "layers; borders travel",
    "ZeRO / FSDP": "storage; weights travel",
}
figure, panels = plots.axes(
    "", "", title=f"{len(WAYS)} ways to divide a model among two workers", columns=4, height=2.7
)
for panel, (way, travels) in zip(panels, WAYS.items(), strict=True):
    for layer in range(4):
        for column in range(4):
            second = {
                "tensor": column > 1,
                "pipeline": layer > 1,
                "ZeRO / FSDP": (layer + column) % 2,
            }
            colours = plots.COLOURS[:2] if way == "data" else [plots.COLOURS[int(second[way])]] * 2
            for half, colour in enumerate(colours):
                panel.add_patch(Rectangle((column + half / 2, layer), 0.5, 0.9, color=colour))
    panel.set(xlim=(-0.1, 4.1), ylim=(4.1, -0.2), xticks=[], yticks=[], xlabel=travels)
    panel.set_title(way, fontsize=10)
    panel.xaxis.label.set_size(8)
    panel.grid(visible=False)
panels[0].set_ylabel("layers, the first on top")
plots.show(
    figure,
    "Four grids of layers by columns; two colours for the two workers: both hold all, half the"
    " columns, half the layers, or alternating slices.",
)

# %% [markdown]
# Blue is worker 0, orange worker 1. *Data parallel*: each holds the whole model and takes half of
# the rows. *Tensor parallel*: each layer is cut in two. *Pipeline*: the first layers here, the last
# ones there. *ZeRO* and its PyTorch form FSDP: like data parallel, but each number is *stored* by
# one worker only, and sent to the other when a layer needs it. Under each stands what travels.
#
# ## From scratch: all-reduce
# Data parallel needs one thing: the sum of all workers' gradients, on all workers. That is an
# *all-reduce*, one of the *collectives*: operations in which every worker takes part. The plain way
# sends everything to one worker and back: with $p$ workers, $2(p-1)$ whole vectors pass through
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


table = ring_on_paper(
    [[1, 1, 1, 1], [10, 10, 10, 10], [100, 100, 100, 100], [1000, 1000, 1000, 1000]]
)
assert (table == 1111).all()

# %% [markdown]
# Follow the number 1111. After three steps each column is complete in one row, after six
# everywhere. A worker has sent $2(p-1)$ messages, each a $p$-th of the vector of $n$ bytes. If a
# message costs $\alpha$ seconds however short, and each byte $1/\beta$ seconds, then
#
# $$t = 2(p-1)\left(\alpha + \frac{n}{p\,\beta}\right)$$
#
# This is the $\alpha$–$\beta$ model. For many workers the bytes that each one sends approach $2n$
# and stay there. That is why rings won.
#
# Now on real processes. A process can't see a cell of your notebook, so its code must be a file.
# `%%writefile` writes the cell to one. `dist.isend` starts a send and goes on, `dist.recv` waits
# for a message.

# %% tags=["nbval-ignore-output"]
# %%writefile "$W/ring.py"
import torch
import torch.distributed as dist

messages = []  # bytes of each one that this worker sends


def exchange(piece, to, source):
    """Send to one neighbour and receive from the other at the same time."""
    messages.append(piece.nbytes)
    inbox = torch.empty_like(piece)
    request = dist.isend(piece.clone(), to)
    dist.recv(inbox, source)
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


def run(settings):
    mine = torch.arange(8.0) + 10 * dist.get_rank()
    theirs, before = mine.clone(), mine.tolist()
    dist.all_reduce(theirs)
    equal = torch.equal(ring_all_reduce(mine), theirs)
    sent = list(messages)
    return {"before": before, "after": mine.tolist(), "equal": equal, "messages": sent}


# %% [markdown]
# *torchrun* starts the processes, tells each its rank, and watches them. In this course a small
# module, `course_utils/distributed.py`, is what torchrun starts: it opens the group, calls `run` of
# each file you name, and returns what they return. On your machine it runs this line,
#
# ```
# python -m torch.distributed.run --nnodes=1 --nproc-per-node=2 \
#     -m course_utils.distributed ring.py --out results
# ```
#
# and on a cluster the same files run unchanged, started once on each machine:
#
# ```
# torchrun --nnodes=4 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29400 \
#     -m course_utils.distributed ring.py --out results
# ```
#
# A start costs seconds, so this chapter starts torchrun four times and hands it several files each
# time. Here are the others of the first start. *Does data parallel compute the same as one process
# with all rows?* `DistributedDataParallel` (DDP) wraps a model; during `backward` it averages the
# gradients over the workers.

# %% tags=["nbval-ignore-output"]
# %%writefile "$W/equality.py"
import copy

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from course_utils.distributed import batch, chain, flat_gradients, step


def difference(dtype, norm):
    """Largest gap between DDP's gradients and one process's, as a share of the largest gradient."""
    alone = chain(32, 3, norm=norm).to(dtype)
    together = DDP(copy.deepcopy(alone))
    x, y = batch(64, 32, dtype=dtype)
    step(alone, x, y)
    mine = slice(dist.get_rank(), None, dist.get_world_size())  # every p-th row
    step(together, x[mine], y[mine])
    want, got = flat_gradients(alone), flat_gradients(together)
    return float((got - want).abs().max() / want.abs().max())


def no_sync():
    """Two halves of the rows, the first one silent: the gap to one step with all of them."""
    model = DDP(chain(32, 3).double())
    x, y = batch(64, 32, seed=5 + dist.get_rank(), dtype=torch.float64)
    with model.no_sync():
        step(model, x[:32], y[:32])  # gradients stay on this worker
    silent = flat_gradients(model) / 2
    step(model, x[32:], y[32:])  # now the sum of both travels
    halves = flat_gradients(model) / 2
    model.zero_grad()
    step(model, x, y)
    return [float((part - flat_gradients(model)).abs().max()) for part in (silent, halves)]


def run(settings):
    dtypes = (torch.float32, torch.float64)
    return {"gaps": [difference(d, n) for n in (False, True) for d in dtypes], "no_sync": no_sync()}


# %% [markdown]
# *Which habits go wrong?* Weights that each worker draws for itself; a sampler whose epoch nobody
# sets. (A `DistributedSampler` shuffles the numbers of the rows and deals them out, to each worker
# its own.)

# %% tags=["nbval-ignore-output"]
# %%writefile "$W/habits.py"
import copy

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DistributedSampler

from course_utils.distributed import batch, chain, step


def apart(t):
    """How far this worker's tensor is from that of worker 0."""
    first = t.detach().clone()
    dist.broadcast(first, 0)
    return float((t.detach() - first).abs().max())


def run(settings):
    own = chain(8, 1, seed=dist.get_rank())  # each worker draws weights of its own
    weight = own[0].up.weight
    result = {"drawn": apart(weight), "in DDP": apart(DDP(copy.deepcopy(own)).module[0].up.weight)}
    optimizer = torch.optim.SGD(own.parameters(), 0.1)
    step(own, *batch(16, 8))
    for p in own.parameters():  # the usual home-made version: only gradients are averaged
        dist.all_reduce(p.grad.div_(dist.get_world_size()))
    optimizer.step()
    result["home-made"] = apart(weight)
    sampler = DistributedSampler(range(8), shuffle=True, seed=0)
    result["epochs"] = [list(sampler), list(sampler)]
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        result["epochs"].append(list(sampler))
    result["of seven rows"] = list(DistributedSampler(range(7), shuffle=False))
    return result


# %% [markdown]
# *When do the gradients travel?* DDP packs them into *buckets* and sends each as soon as it is
# full, while the rest of the backward pass still computes. A *communication hook* replaces DDP's
# own all-reduce; ours does the same and looks at the clock.

# %% tags=["nbval-ignore-output"]
# %%writefile "$W/buckets.py"
import time

import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

from course_utils.distributed import batch, chain, step

launched = []  # (bytes, start, end) of each bucket, on this worker's clock


def hook(_, bucket):
    """What DDP calls when a bucket of gradients is complete: its own all-reduce, with a clock."""
    buffer, start = bucket.buffer().div_(dist.get_world_size()), time.perf_counter()
    future = dist.all_reduce(buffer, async_op=True).get_future()

    def done(result):
        launched.append((buffer.nbytes, start, time.perf_counter()))
        return result.value()[0]

    return future.then(done)


def run(settings):
    model = DDP(chain(settings["width"], settings["depth"]), bucket_cap_mb=settings["bucket_mb"])
    model.register_comm_hook(None, hook)
    x, y = batch(settings["rows"], settings["width"], seed=dist.get_rank())
    for _ in range(3):  # DDP arranges its buckets anew after the first step
        launched.clear()
        loss = F.mse_loss(model(x), y)
        start = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
    timeline = sorted((a - start, b - start, n) for n, a, b in launched)
    launched.clear()
    with model.no_sync():
        step(model, x, y)
    quiet = len(launched)
    return {"timeline": timeline, "backward": end - start, "in no_sync": quiet}


# %% [markdown]
# *Is it faster?* Three arms for the same rows, in random order within each round. While one process
# works alone, the other waits in a barrier and leaves its core free.

# %% tags=["nbval-ignore-output"]
# %%writefile "$W/scaling.py"
import random

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from course_utils.distributed import batch, chain, seconds, step


def run(settings):  # seconds of "processes x threads"
    rank, width = dist.get_rank(), settings["width"]
    alone = chain(width, settings["depth"])
    together = DDP(chain(width, settings["depth"]))
    x, y = batch(settings["rows"], width)
    mine = slice(rank, None, dist.get_world_size())
    order, times = random.Random(0), {"1 x 1": [], "1 x 2": [], "2 x 1": []}

    def one(threads):
        torch.set_num_threads(threads)
        if rank == 0:
            step(alone, x, y)
        torch.set_num_threads(1)
        dist.barrier()  # the other worker waits here and leaves its core free

    calls = {"1 x 1": lambda: one(1), "1 x 2": lambda: one(2)}
    calls["2 x 1"] = lambda: step(together, x[mine], y[mine])
    for k in range(settings["rounds"] + 1):
        for name in order.sample(list(calls), len(calls)):  # the same order on both
            dist.barrier()
            took = seconds(calls[name])
            if k:
                times[name].append(took)
    return times


# %% [markdown]
# *What do messages and steps cost?* These times will feed a model of larger machines.

# %% tags=["nbval-ignore-output"]
# %%writefile "$W/timing.py"
import torch
import torch.distributed as dist
from ring import ring_all_reduce
from torch.nn.parallel import DistributedDataParallel as DDP

from course_utils.distributed import batch, chain, seconds, step


def together(call):
    dist.barrier()
    return seconds(call)


def all_reduces(size, rounds):  # our ring and torch's, turn by turn
    x = torch.zeros(size)
    kinds = (ring_all_reduce, dist.all_reduce)
    return [[together(lambda: kind(x)) for kind in kinds] for _ in range(rounds + 1)][1:]


def steps(models, width, depth, rows):  # seconds without communication, and as DDP
    model, (x, y) = models[depth], batch(rows, width)
    with model.no_sync():
        compute = together(lambda: step(model, x, y))
    model.zero_grad()
    return [depth, rows, compute, together(lambda: step(model, x, y))]


def run(settings):
    width, rounds, cases = settings["width"], settings["rounds"], settings["cases"]
    models = {
        depth: DDP(chain(width, depth), gradient_as_bucket_view=True)
        for depth in {d for d, _ in cases}
    }
    reduces = {str(4 * n): all_reduces(n, rounds) for n in settings["sizes"]}
    points = []
    for k in range(rounds + 1):
        taken = [steps(models, width, *case) for case in cases]
        points += taken if k else []
    return {"all-reduce": reduces, "steps": points}


# %% tags=["nbval-ignore-output"]
def files(*names):
    return [FOLDER / f"{name}.py" for name in names]


first = distributed.launch(
    *files("ring", "equality", "habits", "buckets", "scaling", "timing"), settings=SETTINGS
)
for rank, told in enumerate(first["ring"]):
    print(f"worker {rank} had {told['before']}")
    print(
        f"    after its {len(told['messages'])} messages of {told['messages'][0]} bytes:"
        f" {told['after']}, equal to torch's: {told['equal']}"
    )

# %% [markdown]
# Two workers, so $2(p-1) = 2$ messages of half the vector each, as the formula says.
#
# ## Measure: what a message costs
# Both ways were timed on vectors of several sizes. The line is the $\alpha$–$\beta$ model, fitted
# to every other one of torch's points.

# %% tags=["nbval-ignore-output"]
assert all(told["equal"] and len(told["messages"]) == 2 for told in first["ring"])
sizes = [4 * n for n in SETTINGS["sizes"]]  # bytes
rounds = {n: np.array(first["timing"][0]["all-reduce"][str(n)]) for n in sizes}
median = {n: np.median(r, axis=0) for n, r in rounds.items()}
fitted = sizes[::2]
design = np.array([[2.0, n] for n in fitted])  # for p = 2: t = 2 alpha + n / beta
weight = 1 / np.array([median[n][1] for n in fitted])  # relative errors count
(alpha, per_byte), *_ = np.linalg.lstsq(design * weight[:, None], np.ones(len(fitted)), rcond=None)
alpha, per_byte = max(alpha, 1e-6), max(per_byte, 1e-12)
curves = {
    "our ring": [1e3 * median[n][0] for n in sizes],
    "torch": [1e3 * median[n][1] for n in sizes],
}
curves["α–β model"] = [1e3 * (2 * alpha + n * per_byte) for n in sizes]
plots.lines(
    [n / 1024 for n in sizes],
    curves,
    xlabel="vector (KiB)",
    ylabel="all-reduce (ms)",
    logx=True,
    logy=True,
    title=f"A message costs {1e6 * alpha:.0f} µs, then {1e-9 / per_byte:.2f} GB/s",
    alt=(
        "Time of an all-reduce against the vector's size: flat for short vectors, rising in"
        " proportion for long ones."
    ),
)

# %% [markdown]
# On the left the line is flat: only the number of messages counts. On the right it rises in
# proportion: only bytes count. Where it bends, a vector is long enough to be worth sending; that is
# why DDP packs small gradients into buckets. Points off the line are real too: a library changes
# its algorithm with the size, and caches end.
#
# ## Measure: does DDP equal the large batch?

# %% tags=["nbval-ignore-output"]
gaps = np.max([told["gaps"] for told in first["equality"]], axis=0)
for name, gap in zip(
    ("fp32", "fp64", "fp32 with BatchNorm", "fp64 with BatchNorm"), gaps, strict=True
):
    print(f"{name:20} largest gap, as a share of the largest gradient: {gap:.1e}")
apart, same = np.max([told["no_sync"] for told in first["equality"]], axis=0)
print(
    f"no_sync: after the silent half apart by {apart:.1e}, after both halves {same:.1e} from one"
    " step"
)
display(claims.verdict("09.ddp_equals_large_batch", float(gaps[1])))
claims.verdict("09.ddp_equals_large_batch_with_batchnorm", float(gaps[3]))

# %% [markdown]
# Without BatchNorm the gap is rounding: it shrinks from fp32 to fp64 by the ratio of their
# precisions. So it is equality, not closeness. `no_sync` skips the all-reduce: gradients of several
# small batches add up at home, and travel once.
#
# With BatchNorm the gap does not shrink. Each worker normalises by the mean of *its* rows, and half
# of the rows have another mean. More precision does not help; `nn.SyncBatchNorm` (for GPUs) sends
# the means around, and layers that treat each row alone (LayerNorm, GroupNorm) don't need it.
#
# ## Myth: each worker may draw its own weights
# If gradients are averaged, will the models not become equal? And an epoch is an epoch, why name
# it?

# %% tags=["nbval-ignore-output"]
one = first["habits"][1]
print(f"weights that worker 1 drew itself differ from worker 0's by {one['drawn']:.2f}")
print(
    f"the same model in DDP: {one['in DDP']:.2f}; averaged gradients and one step:"
    f" {one['home-made']:.2f}"
)
epochs = np.array([told["epochs"] for told in first["habits"]])
for k, name in enumerate(
    ("no set_epoch, first", "no set_epoch, second", "set_epoch(0)", "set_epoch(1)")
):
    print(f"{name:21} worker 0 {epochs[0, k]}, worker 1 {epochs[1, k]}")
print("seven rows:", *[told["of seven rows"] for told in first["habits"]])
assert one["in DDP"] == 0 < one["home-made"]
assert (epochs[:, 0] == epochs[:, 1]).all()
assert (epochs[:, 2] != epochs[:, 3]).any()

# %% [markdown]
# Averaged gradients keep a difference for ever: both models move by the same step from different
# places, and what you save at the end is one of them. DDP sends worker 0's weights to all when you
# wrap the model. Without `set_epoch` every epoch has the *same* order. With seven rows, look at the
# last entry: one row is used twice, so that both workers take equally many steps. For an accuracy
# over a test set that one row counts double.
#
# ## Measure: buckets on their way

# %% tags=["nbval-ignore-output"]
told = first["buckets"][0]
line, whole = told["timeline"], told["backward"]
early = sum(begin < 0.9 * whole for begin, _, _ in line)
figure, ax = plots.axes(
    "time since backward began (ms)",
    "bucket",
    height=3.2,
    title=f"{early} of {len(line)} buckets leave before 90% of the backward pass is over",
)
for k, (begin, end, size) in enumerate(line):
    ax.barh(k, 1e3 * (end - begin), left=1e3 * begin, color=plots.COLOURS[0], height=0.6)
    ax.annotate(
        f"{size / MIB:.2f} MiB",
        (1e3 * end, k),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
    )
ax.axvline(1e3 * whole, color="black", linestyle="--", label="backward ends")
ax.invert_yaxis()
ax.margins(x=0.15)
figure.legend(loc="outside lower center")
plots.show(
    figure,
    "One bar a bucket, from its launch to its arrival: they start one after the other during the"
    " backward pass.",
)
print("launched inside no_sync:", told["in no_sync"])

# %% [markdown]
# A bar begins when its bucket is full and ends when the sum is back. The last layers come first,
# because backward starts there. On a GPU the transfer runs beside the computation and takes little
# from it, so all but the last bar cost almost nothing. On a CPU, the carrying is done by the cores
# that should compute. Watch what that means for the next figure.
#
# ## Measure: honest scaling

# %% tags=["nbval-ignore-output"]
times = {name: np.array(t) for name, t in first["scaling"][0].items()}
gain = {
    "two processes against one thread": speedup(times["1 x 1"] / times["2 x 1"]),
    "two threads against one thread": speedup(times["1 x 1"] / times["1 x 2"]),
    "two processes against two threads": speedup(times["1 x 2"] / times["2 x 1"]),
}
honest = gain["two processes against two threads"]
plots.intervals(
    gain,
    xlabel="speed-up for the same rows",
    title=(
        f"Two processes: {gain['two processes against one thread'].value:.2f}x of one core,"
        f" {honest.value:.2f}x of two"
    ),
    alt=(
        "Three speed-ups with intervals: two processes and two threads against one thread, and the"
        " two against each other."
    ),
)
exercises.reveal("09.speedup", honest.value, "times")
claims.verdict("09.two_workers_against_one_thread", gain["two processes against one thread"])

# %% [markdown]
# The last row is the honest one: both arms have the same two cores. The first row is what most
# tutorials print; its baseline left one core idle. On *one* machine a second process competes with
# a second thread, and pays for messages too. Is your last row above 1? Then look at the middle one:
# two threads shared these small products badly. Elsewhere, processes win where threads can't go: to
# a second machine, a second GPU, or a program that Python's lock holds back.

# %% [markdown]
# ## From scratch: cut a layer
# Tensor parallel, on paper first. The block computes
# $\mathrm{down}(\mathrm{relu}(\mathrm{up}(x)))$. Give each worker half of `up`'s outputs and the
# same half of `down`'s inputs. ReLU looks at each number alone, so no message is due in between;
# the two results must be added: one all-reduce.

# %%
torch.manual_seed(0)
up, down = nn.Linear(4, 8).double(), nn.Linear(8, 4, bias=False).double()
x = torch.randn(3, 4, dtype=torch.float64)
parts = []
for rows in (slice(0, 4), slice(4, 8)):  # worker 0, worker 1
    hidden = F.relu(F.linear(x, up.weight[rows], up.bias[rows]))
    parts.append(F.linear(hidden, down.weight[:, rows]))
print(
    "sum of the parts equals the whole:",
    torch.allclose(parts[0] + parts[1], down(F.relu(up(x))), atol=1e-14),
)
print(
    "cut the other way, before ReLU:",
    torch.allclose(F.relu(parts[0]) + F.relu(parts[1]), F.relu(parts[0] + parts[1])),
)

# %% [markdown]
# The order matters: columns first, then rows. PyTorch calls them `ColwiseParallel` and
# `RowwiseParallel`. The names are about the $W$ of $xW$; a `Linear` stores it transposed, so `up`'s
# columns are *rows* of `up.weight`, as in the cell above.
#
# For the second start: who *stores* what. To *shard* is to store each number on one worker only; a
# *mesh* names the workers among which something is cut. `ZeroRedundancyOptimizer` shards Adam's
# numbers (ZeRO's first stage), `fully_shard` (FSDP2) shards everything (its third).

# %% tags=["nbval-ignore-output"]
# %%writefile "$W/zero.py"
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

from course_utils.distributed import chain


def build(way, width, depth):
    model = chain(width, depth)
    if way == "FSDP2":
        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model:  # gathered block by block
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, torch.optim.Adam(model.parameters(), foreach=False)
    model = DDP(model)
    if way == "ZeRO-1":
        adam = {"optimizer_class": torch.optim.Adam, "foreach": False}
        return model, ZeroRedundancyOptimizer(model.parameters(), **adam)
    return model, torch.optim.Adam(model.parameters(), foreach=False)


def local(t):
    return t.to_local() if isinstance(t, DTensor) else t


def held(model, optimizer):
    """Bytes that this worker really holds: weights, gradients, Adam's two numbers."""
    weights = sum(local(p).nbytes for p in model.parameters())
    gradients = sum(local(p.grad).nbytes for p in model.parameters())
    state = getattr(optimizer, "optim", optimizer).state
    adam = [local(v) for s in state.values() for v in s.values() if v.dim() > 0]
    return {"weights": weights, "gradients": gradients, "Adam": sum(t.nbytes for t in adam)}


# %% tags=["nbval-ignore-output"]
# %%writefile "$W/sharding.py"
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from zero import build, held

from course_utils import measure
from course_utils.distributed import batch, step


def train(way, settings):
    """Three steps on this worker's share of the rows."""
    model, optimizer = build(way, settings["width"], settings["depth"])
    share = slice(dist.get_rank(), None, dist.get_world_size())
    x, y = (t[share] for t in batch(settings["rows"], settings["width"]))
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        step(model, x, y)
        optimizer.step()
    return {"model": model, "optimizer": optimizer}


def weights(model):
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in whole])


def run(settings):
    result, reference = {}, None
    for way in ("DDP", "ZeRO-1", "FSDP2"):
        kept = {}
        peak = measure.peak_memory(lambda kept=kept, way=way: kept.update(train(way, settings)))
        reference = weights(kept["model"]) if reference is None else reference
        gap = weights(kept["model"]) - reference
        result[way] = held(**kept) | {"peak": peak, "apart": float(gap.abs().max())}
        kept.clear(), measure.release()  # the next way starts from nothing
    return result


# %% [markdown]
# Tensor parallel on two processes, its collectives counted by PyTorch's own counter:

# %% tags=["nbval-ignore-output"]
# %%writefile "$W/tensor.py"
import copy

import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from course_utils.distributed import batch, chain, seconds, step


def run(settings):
    width, depth = settings["width"], settings["depth"]
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    alone = chain(width, depth)
    split = copy.deepcopy(alone)
    for block in split:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    x, y = batch(settings["tp_rows"][0], width)
    x.requires_grad_()
    with CommDebugMode() as forward:
        out = split(x)
    with CommDebugMode() as backward:
        out.sum().backward()
    counts = [c.get_total_counts() for c in (forward, backward)]
    apart = float((out - alone(x)).abs().max())
    shape, times = list(split[0].up.weight.to_local().shape), []
    for k in range(settings["rounds"] + 1):
        for rows in settings["tp_rows"]:
            x, y = batch(rows, width)
            dist.barrier()
            took = seconds(lambda: step(split, x, y))
            if k:
                times.append([rows, took])
    return {"collectives": counts, "apart": apart, "shape": shape, "times": times}


# %% [markdown]
# And the pipeline, by hand: worker 0 holds the first half of the layers, worker 1 the second.

# %% tags=["nbval-ignore-output"]
# %%writefile "$W/stages.py"
import torch
import torch.distributed as dist
import torch.nn.functional as F

from course_utils.distributed import batch, chain, flat_gradients


def halves(model):
    return model[: len(model) // 2], model[len(model) // 2 :]


def by_hand(whole, x, y):
    """Two stages on two workers: activations go right, gradients come back."""
    first, second = halves(whole)
    if dist.get_rank() == 0:
        out = first(x)
        dist.send(out.detach(), 1)
        gradient = torch.empty_like(out)
        dist.recv(gradient, 1)
        out.backward(gradient)
        return first
    inbox = torch.empty_like(x)
    dist.recv(inbox, 0)
    inbox.requires_grad_()
    F.mse_loss(second(inbox), y).backward()
    dist.send(inbox.grad, 0)
    return second


def run(settings):
    width, depth = settings["width"], settings["depth"]
    x, y = batch(4 * settings["micro"], width)
    alone = chain(width, depth)
    F.mse_loss(alone(x), y).backward()
    mine = halves(alone)[dist.get_rank()]
    stage = by_hand(chain(width, depth), x, y)
    return {"apart": float((flat_gradients(stage) - flat_gradients(mine)).abs().max())}


# %% [markdown]
# By hand, one worker always waits for the other. The remedy is to cut the rows into $m$
# *micro-batches* and send them one after the other. *GPipe* runs all forward passes, then all
# backward ones. *1F1B* starts a backward pass as soon as it can, so that fewer activations are
# alive at once.

# %% tags=["nbval-ignore-output"]
# %%writefile "$W/pipes.py"
import statistics
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from stages import halves
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from course_utils.distributed import batch, chain, flat_gradients, seconds


def run(settings):
    rank, width, micro = dist.get_rank(), settings["width"], settings["micro"]
    alone, mine = chain(width, settings["depth"]), halves(chain(width, settings["depth"]))[rank]
    calls, apart, times = {}, {}, []
    for name, kind in {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}.items():
        for m in settings["counts"]:
            x, y = batch(m * micro, width)
            stage = PipelineStage(mine, rank, 2, torch.device("cpu"))
            step = kind(stage, m, loss_fn=F.mse_loss).step
            calls[name, m] = partial(step, x) if rank == 0 else partial(step, target=y)
            alone.zero_grad(), mine.zero_grad()
            F.mse_loss(alone(x), y).backward()
            calls[name, m]()
            gap = flat_gradients(mine) - flat_gradients(halves(alone)[rank])
            apart[f"{name}, {m}"] = float(gap.abs().max())
    part, y = batch(micro, width)
    part.requires_grad_(rank == 1)
    for k in range(settings["rounds"] + 1):
        for (name, m), call in calls.items():
            dist.barrier()
            took = seconds(call)
            dist.barrier()  # then the same work without the schedule, on both at once
            work = [seconds(lambda: F.mse_loss(mine(part), y).backward()) for _ in "123"]
            times += [[name, m, took, statistics.median(work)]] if k else []
    return {"apart": apart, "times": times}


# %% tags=["nbval-ignore-output"]
second = distributed.launch(*files("sharding", "tensor", "stages", "pipes"), settings=SETTINGS)
tensor = second["tensor"][0]
print(
    f"a worker's part of up.weight: {tensor['shape']} of [{4 * SETTINGS['width']},"
    f" {SETTINGS['width']}]"
)
forward, backward = tensor["collectives"]
print(
    f"collectives for {SETTINGS['depth']} blocks: {forward} forwards, {backward} backwards; results"
    f" apart by {tensor['apart']:.0e}"
)
print("pipeline by hand, gradients apart by", max(told["apart"] for told in second["stages"]))
print(
    "GPipe and 1F1B, gradients apart by",
    f"{max(max(told['apart'].values()) for told in second['pipes']):.0e}",
)
assert forward == backward == SETTINGS["depth"]
assert max(max(told["apart"].values()) for told in second["pipes"]) < 1e-6

# %% [markdown]
# One all-reduce a block forwards, as on paper, and one backwards, where the two parts of the
# gradient of the block's input are added. A pipeline computes the same gradients in whatever order.
#
# ## Measure: bytes on each worker
# ZeRO's formula (Rajbhandari et al. 2020), for fp32 and Adam, in bytes a parameter on each of $N$
# workers. Plain data parallel: $4 + 4 + 8$. Stage 1: $4 + 4 + 8/N$. Stage 2: $4 + (4 + 8)/N$. Stage
# 3: $16/N$.

# %% tags=["nbval-ignore-output"]
ways = {way: [told[way] for told in second["sharding"]] for way in ("DDP", "ZeRO-1", "FSDP2")}
numbers = sum(
    p.numel() for p in distributed.chain(SETTINGS["width"], SETTINGS["depth"]).parameters()
)
formula = {"DDP": 16, "ZeRO-1": 8 + 8 / 2, "FSDP2": 16 / 2}
kinds = ("weights", "gradients", "Adam")
kept = {
    way: np.mean([[t[k] for k in kinds] for t in told], axis=0) / numbers
    for way, told in ways.items()
}
peak = {way: max(t["peak"] for t in told) / numbers for way, told in ways.items()}
factor = peak["DDP"] / peak["FSDP2"]

# %% tags=["nbval-ignore-output"]
figure, ax = plots.axes(
    "bytes a parameter on one worker",
    "",
    height=3.0,
    title=(
        f"Between steps FSDP2 holds {kept['DDP'].sum() / kept['FSDP2'].sum():.2f}x less, at the"
        f" peak {factor:.2f}x less"
    ),
)
left = np.zeros(3)
for i, kind in enumerate(kinds):
    widths = np.array([k[i] for k in kept.values()])
    ax.barh(list(kept), widths, left=left, color=plots.COLOURS[i], label=kind, height=0.55)
    left += widths
ax.plot(
    list(formula.values()), list(kept), "|", color="black", markersize=22, label="ZeRO's formula"
)
ax.plot(list(peak.values()), list(kept), "D", color="black", label="peak of a step")
ax.invert_yaxis()
figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
plots.show(
    figure,
    "Stacked bars of bytes held by DDP, ZeRO-1 and FSDP2; the formula's marks at their ends, the"
    " step's peaks to the right.",
)
exercises.reveal("09.memory", factor, "times")
print(
    "weights after three steps, apart from DDP's by",
    max(t["apart"] for told in ways.values() for t in told),
)
claims.verdict("09.zero_divides_memory", factor)

# %% [markdown]
# The bars end at the formula. The diamonds lie farther right: at the peak there are also
# activations (divided by the rows, not by ZeRO), the block whose weights have just been collected,
# and buffers for the messages. "Divides by $N$" is exact for what *stays*. For what a step needs it
# holds only as far as weights, gradients and Adam's numbers outweigh the rest: if your factor lies
# near the edge of the band, they nearly do, and more rows move it down.
#
# ## Explain: the bubble
# A pipeline of $p$ stages with $m$ micro-batches needs $m + p - 1$ time slots, and each worker
# works in $m$ of them. So a share of $(p-1)/(m+p-1)$ is idle. That is the *bubble*. Measured: the
# share of the step's time that is left when the time of the work alone is taken away.

# %% tags=["nbval-ignore-output"]
pipe = {}
for name in ("GPipe", "1F1B"):
    for m in SETTINGS["counts"]:
        of = [
            np.array([t[2:] for t in told["times"] if t[:2] == [name, m]])
            for told in second["pipes"]
        ]
        work = np.maximum(of[0][:, 1], of[1][:, 1])  # the slower stage sets the pace
        pipe[name, m] = measure.median_interval(100 * (1 - m * work / of[0][:, 0]))
counts = SETTINGS["counts"]
bubble = {"(p−1)/(m+p−1)": [100 / (m + 1) for m in counts]}
bubble |= {name: [pipe[name, m] for m in counts] for name in ("GPipe", "1F1B")}
extra = pipe["GPipe", 4].value - 20
plots.lines(
    counts,
    bubble,
    xlabel="micro-batches m",
    ylabel="idle share of a step (%)",
    logx=True,
    title=(
        f"At m = 4 GPipe idles {abs(extra):.0f} points {'more' if extra > 0 else 'less'} than the"
        " formula"
    ),
    alt=(
        "Idle share against the number of micro-batches: the formula falls, and two measured"
        " schedules beside it."
    ),
)
claims.verdict("09.bubble_formula", pipe["GPipe", 4])

# %% [markdown]
# The formula counts slots of equal length and messages that cost nothing. What lies above it is
# sending, waiting for the slower stage (the first one computes no gradient of its input), and
# Python between the calls. A point below it is possible too: the work alone was timed with both
# cores busy, and in the pipeline a core sometimes has the memory to itself. GPipe and 1F1B have the
# same bubble; 1F1B's gain is memory.
#
# ## If yours shows no gain
# | You see | Because | Look at |
# |---|---|---|
# | two processes slower than two threads | the same two cores, plus messages | a second machine, or a GPU each |
# | DDP far slower than one process | each process takes all cores for its threads | `OMP_NUM_THREADS`; here it is 1 |
# | scaling worse with small batches | the gradient has the same bytes, the compute is less | *Break it*; `no_sync` |
# | buckets leave only at the end | one bucket holds everything | `bucket_cap_mb` |
# | FSDP saves little | activations, or one huge block, are the peak | wrap each block; checkpointing, chapter 8 |
# | tensor parallel slower than one process | two all-reduces a block, and a dispatcher in Python | wider layers; a fast link within the machine |
# | the bubble above the formula | unequal stages, costly messages | the slowest stage; more micro-batches |
#
# ## Exercise A · bytes per rank
# A model has `numbers` parameters, trained in fp32 with Adam on `n` workers. ZeRO shards from stage
# 1 Adam's two numbers a parameter, from stage 2 also the gradients, from stage 3 also the weights;
# stage 0 is plain data parallel. A shard is padded: every worker holds equally many numbers.
# Complete the line so that `bytes_per_rank` gives the bytes on each worker. Example: 10 parameters,
# 4 workers, stage 1: a shard has 3 numbers; $4·10 + 4·10 + 8·3 = 104$.


# %% tags=["exercise"]
def bytes_per_rank(numbers, n, stage):
    shard = ...  # numbers in one worker's part
    weights = shard if stage >= 3 else numbers
    gradients = shard if stage >= 2 else numbers
    adam = 2 * (shard if stage >= 1 else numbers)
    return 4 * (weights + gradients + adam)


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
    adam = 2 * (shard if stage >= 1 else numbers)
    return 4 * (weights + gradients + adam)


# %% tags=["wrong"]
# Rounds down: right only when the numbers divide. The edge.
def bytes_per_rank(numbers, n, stage):
    shard = numbers // n
    weights = shard if stage >= 3 else numbers
    gradients = shard if stage >= 2 else numbers
    return 4 * (weights + gradients + 2 * (shard if stage >= 1 else numbers))


# %% tags=["wrong"]
# "ZeRO divides memory by N": everything is sharded from stage 1 on.
def bytes_per_rank(numbers, n, stage):
    shard = -(-numbers // n)
    return 16 * (shard if stage >= 1 else numbers)


# %% tags=["wrong"]
# Adam's second number is forgotten.
def bytes_per_rank(numbers, n, stage):
    shard = -(-numbers // n)
    weights = shard if stage >= 3 else numbers
    gradients = shard if stage >= 2 else numbers
    return 4 * (weights + gradients + (shard if stage >= 1 else numbers))


# %% tags=["wrong"]
# A fractional shard: nobody can hold half a number.
def bytes_per_rank(numbers, n, stage):
    shard = numbers / n
    weights = shard if stage >= 3 else numbers
    gradients = shard if stage >= 2 else numbers
    return 4 * (weights + gradients + 2 * (shard if stage >= 1 else numbers))


# %% [markdown] tags=["instructor"]
# 8 minutes. Let the room compute a model of 7 billion parameters on 8 GPUs for each stage, then ask
# what is missing in the sum (activations, and the block that is collected at the moment).

# %% [markdown]
# ## Exercise B · a ring for any length
# The ring above needs a length that $p$ divides. Write `ring(x, rank, p, send, receive)`, which
# runs on every worker: `x` is a one-dimensional tensor (any length, also shorter than $p$, also
# empty; any dtype); `send(tensor)` hands a copy to the right neighbour and does not wait;
# `receive()` waits for the left neighbour's. Return the sum over all workers as a new tensor of the
# same dtype and leave `x` alone. Demands: on each worker exactly $2(p-1)$ messages, none longer
# than a $p$-th of the vector, rounded up. Example: `p = 1` sends nothing and returns a copy.


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
# Only the first half: each worker ends with one complete piece.
def ring(x, rank, p, send, receive):
    result = x.clone()
    pieces = torch.tensor_split(result, p)
    for k in range(p - 1):
        send(pieces[(rank - k) % p].clone())
        pieces[(rank - k - 1) % p].add_(receive())
    for _ in range(p - 1):
        send(pieces[0][:0])
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
# 20 minutes. Four people in a circle with four paper slips each do it by hand first. Ask which
# demand `chunk` breaks, and let somebody cause the deadlock on purpose.

# %% [markdown]
# ## The tool of the field
# *DeepSpeed* brought ZeRO into the world. Same model, same rows, its three stages, against plain
# AdamW with all rows.

# %% tags=["nbval-ignore-output"]
# %%writefile "$W/ds.py"
import deepspeed
import torch
import torch.nn.functional as F

from course_utils.distributed import chain

# Messages between CPU workers go by gloo, as in the rest of the chapter: no library of DeepSpeed's
# own is compiled.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
ADAMW = {"lr": 1e-3, "eps": 1e-5, "weight_decay": 0.01}


def train(stage, settings, x, y):
    """Eight steps of DeepSpeed's ZeRO at this stage: bytes held, weights, share of the work."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": len(x), "zero_optimization": zero}
    config["optimizer"] = {"type": "AdamW", "params": {"torch_adam": True} | ADAMW}
    engine, *_ = deepspeed.initialize(model=chain(settings["width"], 2), config=config)
    seen, full = [], 4 * settings["width"]  # columns of each layer's result on this worker
    for block in engine.module:
        block.up.register_forward_hook(lambda layer, _, out: seen.append(out.shape[1] / full))
    for _ in range(8):
        engine.backward(F.mse_loss(engine(x), y))
        engine.step()
    parameters = list(engine.module.parameters())
    held = sum(getattr(p, "ds_tensor", p).nbytes for p in parameters)
    state = [v for s in engine.optimizer.optimizer.state.values() for v in s.values()]
    adam = sum(t.nbytes for t in state if torch.is_tensor(t) and t.dim() > 0)
    with deepspeed.zero.GatheredParameters(parameters, enabled=stage == 3):
        weights = torch.cat([p.detach().flatten() for p in parameters])
    engine.destroy()
    return {"weights": held, "Adam": adam, "share": sum(seen) / (8 * len(engine.module))}, weights


# %% tags=["nbval-ignore-output"]
# %%writefile "$W/deep.py"
import torch
import torch.distributed as dist
from ds import ADAMW, train

from course_utils.distributed import batch, chain, step


def run(settings):
    """ZeRO 1, 2 and 3 on this worker's rows, and plain training on all rows."""
    x, y = batch(64, settings["width"])
    plain = chain(settings["width"], 2)
    optimizer = torch.optim.AdamW(plain.parameters(), **ADAMW)
    for _ in range(8):
        optimizer.zero_grad()
        step(plain, x, y)
        optimizer.step()
    want = torch.cat([p.detach().flatten() for p in plain.parameters()])
    mine, result = slice(dist.get_rank(), None, dist.get_world_size()), {}
    for stage in (1, 2, 3):
        result[str(stage)], weights = train(stage, settings, x[mine], y[mine])
        result[str(stage)]["apart"] = float((weights - want).abs().max())
    return result


# %% tags=["nbval-ignore-output"]
if not machine.can("package:deepspeed"):
    outcome = claims.verdict(
        "09.deepspeed_is_model_parallel", machine.skip("package:deepspeed", "DeepSpeed's ZeRO")
    )
else:
    env = {"DS_ACCELERATOR": "cpu"}
    third = distributed.launch(*files("deep"), settings=SETTINGS, env=env, timeout=180)
    for stage, got in third["deep"][0].items():
        print(
            f"ZeRO-{stage}: weights {got['weights']:8} bytes, Adam {got['Adam']:8}, weights apart"
            f" by {got['apart']:.0e}, computes {got['share']:.0%} of each layer"
        )
    assert max(got["apart"] for told in third["deep"] for got in told.values()) < 1e-4
    outcome = claims.verdict("09.deepspeed_is_model_parallel", third["deep"][0]["3"]["share"])
outcome

# %% [markdown]
# Where DeepSpeed is installed, the assertion says: after eight steps each weight is within `1e-4`
# of plain training, and a single step moves a weight by up to `1e-3`. The last column answers a
# frequent claim. Under ZeRO-3 no worker *stores* a whole layer, yet each *computes* every layer in
# full, for its own rows. It is data parallelism with shared storage. Who wants a layer computed in
# parts must cut the model (tensor, pipeline).

# %% [markdown]
# ## Myth: run a cell's function in other processes

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
told = f"import pickle; pickle.loads({pickle.dumps(work)!r})"  # what the new process does first
print(
    subprocess.run(
        [sys.executable, "-c", told], capture_output=True, text=True
    ).stderr.splitlines()[-1]
)

# %% [markdown]
# A function travels as its *name*. The new process imports your main program and looks the name up;
# your cells are not in it. Hence files, and torchrun.
#
# ## Myth: init_process_group finds the others by itself
# And two more mistakes that everybody meets once: a tensor left behind on the CPU, and
# `DataParallel` on many machines.

# %% tags=["nbval-ignore-output"]
with exercises.fails(ValueError):
    torch.distributed.init_process_group("gloo", rank=0, world_size=2)

device = "cuda" if machine.can("gpu") else "meta"  # without a GPU, a device that has shapes only
second_stage = nn.Linear(4, 4, device=device)
with exercises.fails(RuntimeError):
    second_stage(torch.ones(2, 4))  # the first stage's result, where the first stage left it

calls, home = [], "cuda" if machine.can("gpu") else "cpu"
parallel = nn.DataParallel(nn.Linear(4, 4).to(home))
parallel.module.register_forward_hook(lambda *_: calls.append(1))
parallel(torch.ones(8, 4, device=home))
print(f"DataParallel: devices {parallel.device_ids}, the model ran {len(calls)} time(s)")

# %% [markdown]
# `init_process_group` reads four environment variables: `RANK`, `WORLD_SIZE`, `MASTER_ADDR`,
# `MASTER_PORT`. torchrun sets them. A stage gets its input on its own device: `x.to(device)`.
# `DataParallel` came first: *one* process, one Python thread for each GPU of *one* machine; it
# copies the model in every step and collects all outputs on the first GPU. On a CPU it has no
# device and passes the call through, silently. It never reaches a second machine. DDP replaced it.
#
# ## Measure: a worker is killed
# With a thousand machines, one fails every day. *Elastic* training saves after each step (or each
# hundred), and torchrun starts all workers again when one dies. Three things make the end equal bit
# for bit: the optimizer's state is saved, rows depend on the step's number alone, and a file is
# complete or absent.

# %% tags=["nbval-ignore-output"]
# %%writefile "$W/checkpoint.py"
import torch
from safetensors.torch import load_file, save_file


def save(path, model, optimizer, done):
    """Written beside and renamed: a worker that dies in between leaves the old file whole."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    for i, p in enumerate(model.parameters()):
        tensors[f"momentum.{i}"] = optimizer.state[p]["momentum_buffer"]
    save_file(tensors | {"done": torch.tensor(done)}, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def resume(path, model, optimizer):
    """The number of steps already done; model and optimizer are put back to that point."""
    if not path.exists():
        return 0
    saved = load_file(path)
    weights = {k[6:]: v for k, v in saved.items() if k.startswith("model.")}
    model.load_state_dict(weights)
    for i, p in enumerate(model.parameters()):
        optimizer.state[p]["momentum_buffer"] = saved[f"momentum.{i}"]
    return int(saved["done"])


# %% tags=["nbval-ignore-output"]
# %%writefile "$W/elastic.py"
import hashlib
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from checkpoint import resume, save
from torch.nn.parallel import DistributedDataParallel as DDP

from course_utils.distributed import batch, chain, step


def train(path, steps, kill_at=None):
    rank, p, model = dist.get_rank(), dist.get_world_size(), chain(16, 2)
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    begin, together = resume(path, model, optimizer), DDP(model)
    for k in range(begin, steps):
        if rank == 1 and k == kill_at and attempt == 0:
            os.kill(os.getpid(), signal.SIGKILL)  # kill -9: no warning, no cleaning up
        x, y = batch(32, 16, seed=k)  # the rows depend on the step alone
        optimizer.zero_grad()
        step(together, x[rank::p], y[rank::p])
        optimizer.step()
        if rank == 0:
            save(path, model, optimizer, k + 1)
    weights = torch.cat([q.detach().flatten() for q in model.parameters()])
    sha256 = hashlib.sha256(weights.numpy().tobytes()).hexdigest()
    return {"begin": begin, "attempt": attempt, "sha256": sha256}


def run(settings):
    out, steps = Path(settings["out"]), settings["steps"]
    disturbed = train(out / "disturbed.safetensors", steps, settings["kill_at"])
    return {"disturbed": disturbed, "undisturbed": train(out / "undisturbed.safetensors", steps)}


# %% [markdown]
# The same start also has a module with a mistake on one worker. What do you get to see of it?

# %% tags=["nbval-ignore-output"]
FAULTY = """
import torch
import torch.distributed as dist

def run(settings):
    x = torch.ones(4)
    if dist.get_rank() == 1:
        x = x.view(3, 2)  # a mistake on one worker only
    dist.all_reduce(x)  # the other one waits here
"""
(FOLDER / "faulty.py").write_text(FAULTY, encoding="utf-8")
out = FOLDER / "elastic"
shutil.rmtree(out, ignore_errors=True)  # an old checkpoint would make it short
try:
    distributed.launch(*files("elastic", "faulty"), settings=SETTINGS, out=out, restarts=1)
except distributed.WorkerError as error:
    print(error)
told = distributed.results(out, "elastic", 2)[0]
shutil.rmtree(out)
print(
    f"\nkilled at step {SETTINGS['kill_at']}, started again at step {told['disturbed']['begin']} by"
    f" attempt {told['disturbed']['attempt']}"
)
print(
    "undisturbed",
    told["undisturbed"]["sha256"][:16],
    "killed and restarted",
    told["disturbed"]["sha256"][:16],
)
claims.verdict(
    "09.kill_9_ends_bitwise_equal", told["undisturbed"]["sha256"] == told["disturbed"]["sha256"]
)

# %% [markdown]
# The traceback is the worker's own. The other worker sees only "connection reset"; who failed
# *first* is what you want to know, and torchrun alone prints a page around it. The launcher ends
# every process of a start, however it ends: an error, a time-out, your interrupt. A worker that
# hangs is stopped after its time, and the error names the line it hung in.

# %% [markdown]
# <details><summary><b>Further: two machines on one</b></summary>
#
# Linux can give a process a network of its own, a *namespace*: own addresses, own ports. Two of
# them, joined by a virtual cable, are two machines as far as torchrun can tell. That needs root.
# One torchrun runs in each, with the cluster's command line.
# </details>

# %% tags=["nbval-ignore-output"]
if machine.can("root") and machine.can("full"):
    nodes = distributed.launch_two_nodes(*files("ring"), settings=SETTINGS)
    print(
        "two nodes:",
        [told["after"] for told in nodes["ring"]],
        all(told["equal"] for told in nodes["ring"]),
    )
    outcome = "two network namespaces, one torchrun in each"
else:
    outcome = machine.skip(
        "full" if machine.can("root") else "root", "two nodes as two network namespaces"
    )
outcome

# %% [markdown]
# ## From scratch: a simulator
# You have two cores and want to know about a thousand GPUs. Write down what you measured as a
# model. A *cluster* is a handful of numbers, a *job* a few more, a *plan* says how many workers
# share what.

# %%
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Cluster:
    rate: float  # operations a second of one worker
    alpha: float  # seconds a message, however short
    beta: float  # bytes a second between workers
    fast: float = 0.0  # bytes a second within a machine, for tensor parallel; 0: as beta
    hidden: float = 0.0  # share of the gradient's travel that hides behind the backward pass
    per_block: float = 0.0  # seconds a block and micro-batch costs beside its operations
    per_split: float = 0.0  # the same, if the block is cut (tensor parallel)
    per_micro: float = 0.0  # seconds a micro-batch costs in a pipeline


@dataclass(frozen=True)
class Job:
    operations: float  # of one step, forward and backward, all rows
    gradient: float  # bytes
    blocks: int
    border: float  # bytes of one block's output, all rows
    reduces: int = 2  # all-reduces a block under tensor parallel


@dataclass(frozen=True)
class Plan:
    data: int = 1
    tensor: int = 1
    pipe: int = 1
    micro: int = 1  # micro-batches


# %%
def all_reduce(size, p, alpha, beta):
    return 2 * (p - 1) * (alpha + size / p / beta)


def step_time(cluster, job, plan):
    """Seconds of one training step."""
    c, workers = cluster, plan.data * plan.tensor * plan.pipe
    border = job.border / (plan.data * plan.micro)
    block = c.per_block
    if plan.tensor > 1:
        block += c.per_split + job.reduces * all_reduce(
            border, plan.tensor, c.alpha, c.fast or c.beta
        )
    slot = job.operations / (workers * plan.micro * c.rate) + job.blocks / plan.pipe * block
    if plan.pipe > 1:
        slot += c.per_micro + 2 * (c.alpha + border / c.beta)
    busy = (plan.micro + plan.pipe - 1) * slot  # the bubble is in the "- 1"
    travel = all_reduce(job.gradient / (plan.tensor * plan.pipe), plan.data, c.alpha, c.beta)
    return busy + travel - min(c.hidden * travel, 2 / 3 * busy)


# %% [markdown]
# Fit it on some of your measurements, and let it predict others: a model that is fitted to
# everything predicts nothing. The first three cases of `timing.py`, GPipe with four micro-batches,
# and one batch of tensor parallel are for fitting. Computing takes seconds for each operation and
# seconds for each block; as DDP, also seconds for each byte of gradient. The times are linear in
# these three unknowns, so least squares finds them; each equation is divided by its time, so that
# relative errors count.

# %% tags=["nbval-ignore-output"]
WIDTH = SETTINGS["width"]


def our_job(depth, rows):
    weights = depth * 8 * WIDTH**2
    return Job(6 * weights * rows, 4 * weights, depth, 4 * rows * WIDTH)


def typical(rows):
    return measure.median_interval(rows)


slowest = np.max([[t[2:] for t in told["steps"]] for told in first["timing"]], axis=0)
cases = [tuple(t[:2]) for t in first["timing"][0]["steps"]]
compute, ddp = (
    {
        c: typical([s[i] for s, k in zip(slowest, cases, strict=True) if k == c])
        for c in dict.fromkeys(cases)
    }
    for i in (0, 1)
)
gpipe = {
    key: typical([t[2] for t in second["pipes"][0]["times"] if tuple(t[:2]) == key]) for key in pipe
}
split = {
    rows: typical([t for r, t in tensor["times"] if r == rows]) for rows in SETTINGS["tp_rows"]
}
# %% tags=["nbval-ignore-output"]
fitted, equations, times = [tuple(c) for c in SETTINGS["cases"][: SETTINGS["fit"]]], [], []
for k in fitted:
    job = our_job(*k)
    equations += [[job.operations, job.blocks, 0], [job.operations, job.blocks, job.gradient]]
    times += [compute[k].value, ddp[k].value - 2 * alpha]
scale = np.abs(equations).max(0)  # operations are many, blocks are few
design, ones = np.array(equations) / scale / np.array(times)[:, None], np.ones(len(times))
slope, block, per_byte = np.linalg.lstsq(design, ones, rcond=None)[0] / scale
if slope <= 0 or block < 0:  # noise, or a machine whose small steps cost nothing extra
    slope, block = compute[fitted[-1]].value / our_job(*fitted[-1]).operations, 0.0
here = Cluster(1 / slope, alpha, 1 / max(per_byte, 1e-12), per_block=block)
rate, beta = here.rate, here.beta
print(
    f"{rate / 1e9:.1f} GFLOP/s a worker, {1e6 * block:.0f} µs a block, gradients at"
    f" {beta / 1e9:.2f} GB/s, {1e6 * alpha:.0f} µs a message"
)


# %% tags=["nbval-ignore-output"]
def pipe_job(m):
    return our_job(SETTINGS["depth"], m * SETTINGS["micro"])


middle, split_rows = SETTINGS["counts"][1], SETTINGS["tp_rows"][0]
missing = gpipe["GPipe", middle].value - step_time(
    here, pipe_job(middle), Plan(pipe=2, micro=middle)
)
here = replace(here, per_micro=missing / (middle + 1))
missing = split[split_rows].value - step_time(
    here, our_job(SETTINGS["depth"], split_rows), Plan(tensor=2)
)
here = replace(here, per_split=missing / SETTINGS["depth"])


# %% tags=["nbval-ignore-output"]
points = {}  # name: (predicted, measured, was it fitted)
for k in ddp:
    twice = our_job(k[0], 2 * k[1])  # both workers' rows
    if k[1] < fitted[0][1]:
        continue  # fewer rows than any fitted case: *Break it* looks at that one
    points[f"DDP, {k[0]} blocks, {k[1]} rows"] = (
        step_time(here, twice, Plan(data=2)),
        ddp[k],
        k in fitted,
    )
for (name, m), seen in gpipe.items():
    points[f"{name}, m = {m}"] = (
        step_time(here, pipe_job(m), Plan(pipe=2, micro=m)),
        seen,
        (name, m) == ("GPipe", middle),
    )
for rows, seen in split.items():
    points[f"tensor, {rows} rows"] = (
        step_time(here, our_job(SETTINGS["depth"], rows), Plan(tensor=2)),
        seen,
        rows == split_rows,
    )
new = {name: (guess, seen) for name, (guess, seen, used) in points.items() if not used}
off = {name: 100 * (guess / seen.value - 1) for name, (guess, seen) in new.items()}
worst = max(off, key=lambda name: abs(off[name]))
usual = np.median(np.abs(list(off.values())))
title = f"Not fitted: off by {usual:.0f}% in the median, {abs(off[worst]):.0f}% at worst ({worst})"
figure, ax = plots.axes("measured (ms)", "predicted (ms)", title=title)
for used, label, colour in ((True, "fitted", "0.6"), (False, "predicted", plots.COLOURS[0])):
    xy = np.array(
        [[1e3 * seen.value, 1e3 * guess] for guess, seen, u in points.values() if u == used]
    )
    ax.scatter(xy[:, 0], xy[:, 1], color=colour, label=label, zorder=3)
ends = np.array([pick(s.value for _, s, _ in points.values()) for pick in (min, max)]) * 1e3
ax.plot(ends, ends, color="black", linewidth=1, label="exact")
ax.fill_between(ends, 0.85 * ends, 1.15 * ends, color="0.85", label="within 15%")
ax.legend()
plots.show(figure, "Predicted against measured step times on a diagonal, with a band around it.")
print({name: f"{gap:+.0f}%" for name, gap in off.items()})

# %% tags=["nbval-ignore-output"]
# what is measured has an interval: the least and the most that each prediction can be off
least = [max(guess / seen.high - 1, 1 - guess / seen.low, 0) for guess, seen in new.values()]
most = [max(guess / seen.low - 1, 1 - guess / seen.high) for guess, seen in new.values()]
claims.verdict(
    "09.simulator_within_15", measure.Interval(abs(off[worst]), 100 * max(least), 100 * max(most))
)

# %% [markdown]
# The verdict is about the *worst* point, and its interval comes from what is measured: a median of
# few steps. A single noisy point decides; read the list too. If yours fails, look at which kind of
# point is off. A schedule that the fitted one does not resemble? Other programs on the two cores?
# And a model knows nothing outside of the range that it was fitted in: the case with eight rows is
# left out here, and *Break it* asks for it.
#
# ## Measure: against published points
# Now leave your machine. Three publications give enough numbers to be predicted. Goyal et al.
# (2017) train ResNet-50 on 256 GPUs at about 90% of the efficiency of 8; Huang et al. (GPipe, 2019)
# report the throughput of a transformer cut into 2, 4 and 8 parts; Narayanan et al. (2021) report
# TFLOP/s of GPT models on up to 3,072 A100 GPUs. What they don't tell is assumed, and said.

# %% tags=["nbval-ignore-output"]
# Goyal et al. 2017: 100 MB of gradients, backward 0.12 s, one 50 Gbit/s card for 8 GPUs, which add
# up over NVLink first.
SERVER = Cluster(rate=1.0, alpha=50e-6, beta=50e9 / 8, hidden=0.5)  # alpha and hidden are assumed


def efficiency(gpus, gbit=50.0, hidden=0.5, gradient=100e6, compute=0.18):
    """Of a data-parallel step, against one server of 8 GPUs that needs no network."""
    servers = max(gpus // 8, 1)
    c = replace(SERVER, beta=gbit * 1e9 / 8, hidden=hidden)
    return compute / step_time(c, Job(compute * servers, gradient, 1, 0), Plan(data=servers))


published = {"ResNet-50, 256 GPUs": (efficiency(256), 0.90)}
# GPipe 2019, table 2: transformer, throughput against 2 parts and 1 micro-batch. No messages, no
# other cost.
free = Cluster(rate=1.0, alpha=0.0, beta=math.inf)
for parts, m, seen in ((4, 4, 3.2), (8, 4, 4.8), (2, 32, 1.8), (4, 32, 3.4), (8, 32, 6.3)):
    took = step_time(free, Job(1.0, 0, parts, 0), Plan(pipe=parts, micro=m))
    base = step_time(free, Job(1.0, 0, 2, 0), Plan(pipe=2, micro=1))
    published[f"GPipe, {parts} parts, m = {m}"] = (base / took, seen)

# Narayanan et al. 2021, table 1: hidden size, layers, tensor, pipeline, GPUs, batch, TFLOP/s a GPU.
GPT = [
    (2304, 24, 1, 1, 32, 512, 137),
    (3072, 30, 2, 1, 64, 512, 138),
    (4096, 36, 4, 1, 128, 512, 142),
    (6144, 40, 8, 1, 256, 1024, 135),
    (8192, 48, 8, 2, 512, 1536, 138),
    (10240, 60, 8, 4, 1024, 1792, 140),
    (12288, 80, 8, 8, 1536, 2304, 148),
    (16384, 96, 8, 16, 1920, 2160, 155),
    (20480, 105, 8, 35, 2520, 2520, 163),
    (25600, 128, 8, 64, 3072, 3072, 163),
]


# %% tags=["nbval-ignore-output"]
def gpt_tflops(cluster, hidden, layers, tensor, pipe, gpus, batch):
    data, length, words = gpus // (tensor * pipe), 2048, 51200
    more = 1 + length / (6 * hidden) + words / (16 * layers * hidden)  # attention and vocabulary
    operations = 96 * batch * length * layers * hidden**2 * more
    job = Job(operations, 48 * layers * hidden**2, layers, 2 * batch * length * hidden, reduces=6)
    took = step_time(cluster, job, Plan(data, tensor, pipe, batch // data))
    return operations / gpus / took / 1e12


A100 = Cluster(
    rate=137e12, alpha=10e-6, beta=25e9, fast=300e9
)  # links as built into that machine; alpha assumed
for _ in range(20):  # the rate alone is fitted, to the first row
    A100 = replace(A100, rate=A100.rate * 137 / gpt_tflops(A100, *GPT[0][:-1]))
for row in GPT[1:]:
    published[f"GPT, {row[4]} GPUs"] = (gpt_tflops(A100, *row[:-1]), row[-1])
deviation = {name: 100 * (guess / seen - 1) for name, (guess, seen) in published.items()}
far = max(deviation, key=lambda name: abs(deviation[name]))
title = f"{len(published)} published points; the farthest, {far}: {deviation[far]:+.0f}%"
figure, ax = plots.axes("deviation of the prediction (%)", "", title=title, height=4.6)
ax.barh(list(deviation), list(deviation.values()), color=plots.COLOURS[0], height=0.6)
ax.axvspan(-15, 15, color="0.9", zorder=0)
ax.invert_yaxis()
plots.show(
    figure,
    "One bar a published point: how far the simulator's prediction lies from it, in percent; a grey"
    " band marks 15%.",
)
print({name: f"{guess:.2f} for {seen}" for name, (guess, seen) in published.items()})
print({f"hidden {h:.0%}": f"{100 * efficiency(256, 50, h):.0f}%" for h in (0.0, 0.5, 1.0)})

# %% [markdown]
# The point of ResNet-50 on 256 GPUs lies close, and proves little: it was computed with half of the
# gradients' travel hidden, and nobody has measured that half. The last line shows what the same
# formula says with none of it hidden, and with all. An assumption that decides the answer is not a
# prediction.
#
# Bars to the left: the real machine was faster than the model. For GPipe with few micro-batches,
# the published base line itself had costs that our free messages lack. For the largest GPT models,
# large matrices run nearer to the peak than those of the first row, which set our rate, while their
# interleaved schedule has a smaller bubble than ours. A model is useful when you know *why* it is
# off.
#
# ## Measure: a thousand GPUs, at your bandwidth

# %% tags=["nbval-ignore-output"]
import ipywidgets


def picture(gpus=1024, gbit=50, hidden=0.5):
    counts = [8 * 2**k for k in range(8)]
    curves = {
        f"{speed:g} Gbit/s": [100 * efficiency(n, speed, hidden) for n in counts]
        for speed in sorted({10, 50, 400, gbit})
    }
    at = 100 * efficiency(gpus, gbit, hidden)
    figure, ax = plots.axes(
        "GPUs",
        "efficiency against one server (%)",
        title=f"{gpus} GPUs at {gbit:g} Gbit/s: {at:.0f}%, worth {at / 100 * gpus:.0f}",
    )
    for i, (name, values) in enumerate(curves.items()):
        ax.plot(counts, values, marker=plots.MARKERS[i], color=plots.COLOURS[i], label=name)
    ax.plot(256, 90, "*", color="black", markersize=13, label="Goyal et al. 2017", linestyle="none")
    plots.plain_log(ax.xaxis)
    ax.set_ylim(0, 105)
    ax.legend()
    plots.show(
        figure,
        "Efficiency against the number of GPUs for several bandwidths; a star marks the published"
        " point.",
    )


picture()
plots.explore(
    picture,
    gpus=ipywidgets.SelectionSlider(options=[8 * 2**k for k in range(8)], value=256),
    gbit=ipywidgets.SelectionSlider(options=[1, 10, 25, 50, 100, 200, 400], value=25),
    hidden=ipywidgets.FloatSlider(value=0.5, min=0, max=1, step=0.1, continuous_update=False),
)

# %% [markdown]
# The curves fall fast at first and then bend: the bytes of a ring stop growing, and what goes on
# growing is the number of messages, $\alpha$. More bandwidth lifts a curve; more GPUs never make
# its slope positive. Move `hidden` to 1: what hides behind the backward pass is free.
#
# ## Exercise C · choose a layout
# You have `gpus` GPUs in machines of `per_node`, a model of `layers` layers, a batch of `batch`
# rows, and `budget` bytes of memory on each GPU. `need(data, tensor, pipe)` gives the bytes a GPU
# needs under a plan, `seconds(data, tensor, pipe)` the time of a step. Write `layout(gpus,
# per_node, layers, batch, budget, need, seconds)`: return the fastest tuple `(data, tensor, pipe)`
# such that all GPUs are used ($data · tensor · pipe = gpus$), tensor parallel stays within one
# machine (`tensor` divides `per_node`), `pipe` divides `layers`, `data` divides `batch`, and `need`
# is **at most** `budget`. If there is none, return `None`. Example: with one GPU and enough memory,
# `(1, 1, 1)`.


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
# The least memory in place of the least time.
def layout(gpus, per_node, layers, batch, budget, need, seconds):
    allowed = [
        (gpus // (tensor * pipe), tensor, pipe)
        for tensor in range(1, gpus + 1)
        for pipe in range(1, gpus + 1)
        if gpus % (tensor * pipe) == 0 and per_node % tensor == 0 and layers % pipe == 0
    ]
    allowed = [plan for plan in allowed if batch % plan[0] == 0 and need(*plan) <= budget]
    return min(allowed, key=lambda plan: need(*plan), default=None)


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
# Raises where nothing fits.
def layout(gpus, per_node, layers, batch, budget, need, seconds):
    allowed = [
        (gpus // (tensor * pipe), tensor, pipe)
        for tensor in range(1, gpus + 1)
        for pipe in range(1, gpus + 1)
        if gpus % (tensor * pipe) == 0 and per_node % tensor == 0 and layers % pipe == 0
    ]
    allowed = [plan for plan in allowed if batch % plan[0] == 0 and need(*plan) <= budget]
    return min(allowed, key=lambda plan: seconds(*plan))


# %% tags=["wrong"]
# Powers of two only: misses machines of six GPUs and models of 30 layers.
def layout(gpus, per_node, layers, batch, budget, need, seconds):
    powers = [2**k for k in range(12) if 2**k <= gpus]
    allowed = [
        (gpus // (tensor * pipe), tensor, pipe)
        for tensor in powers
        for pipe in powers
        if gpus % (tensor * pipe) == 0 and per_node % tensor == 0 and layers % pipe == 0
    ]
    allowed = [plan for plan in allowed if batch % plan[0] == 0 and need(*plan) <= budget]
    return min(allowed, key=lambda plan: seconds(*plan), default=None)


# %% [markdown] tags=["instructor"]
# 20 minutes. Afterwards plug in `gpt_tflops` for the row with 1,024 GPUs and let the room compare
# its plan with the published one (tensor 8, pipeline 4): why did the authors stop at 8?

# %% [markdown]
# ## Break it
# Give DDP little to compute and the same gradients to send. How much of its step is left for
# computing?

# %% tags=["nbval-ignore-output"]
share = {f"{k[0]} blocks, {k[1]} rows": 100 * compute[k].value / ddp[k].value for k in ddp}
share = dict(sorted(share.items(), key=lambda item: item[1]))
least = min(share, key=share.get)
plots.bars(
    share,
    xlabel="computing alone, as a share of the DDP step (%)",
    title=f"With {least} only {share[least]:.0f}% of a DDP step computes",
    alt=(
        "Bars, sorted: for each number of blocks and rows the share of a data-parallel step that is"
        " spent computing."
    ),
)
few = min(ddp, key=lambda k: k[1])
guess = step_time(here, our_job(few[0], 2 * few[1]), Plan(data=2))
print(
    f"outside of the fitted range, {few[1]} rows: the simulator is off by"
    f" {100 * (guess / ddp[few].value - 1):+.0f}%"
)
del first, second

# %% [markdown]
# The shortest bar should belong to the fewest rows. Gradients have the bytes of the weights,
# however few the rows. Give each worker more rows, or use `no_sync` for several small batches, or
# send fewer bytes (a hook can send 16 bits). On a faster link the same bar grows: a ratio, not a
# property of DDP.
#
# ## Exit quiz
# **1. A ring all-reduce of 100 MB over 8 workers: how many bytes does each send?**
# <details><summary>175 MB</summary>Right: 14 messages of 12.5 MB.</details>
# <details><summary>700 MB</summary>That is the plain way through one worker, seen from that worker,
# in one direction.</details>
# <details><summary>12.5 MB</summary>That is one message.</details>
#
# **2. DDP's gradients differ from the large batch's by 0.5% also in fp64. Look first for**
# <details><summary>BatchNorm</summary>Right: each worker normalises by its own rows.</details>
# <details><summary>rounding</summary>It would shrink with more precision.</details>
# <details><summary>a slow network</summary>Speed changes no number.</details>
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
# <details><summary>20%</summary>Right: 3 of 15 slots.</details>
# <details><summary>25%</summary>That is 3 of 12: the idle slots against the working ones.</details>
# <details><summary>nothing, with 1F1B</summary>1F1B has the same bubble and fewer live
# activations.</details>
#
# **5. "Two workers are twice as fast", a tutorial says. Ask first**
# <details><summary>how many threads the single process had</summary>Right.</details>
# <details><summary>which backend it used</summary>That matters later; a wrong baseline matters
# more.</details>
# <details><summary>how many epochs</summary>Both arms should do the same work a step; epochs don't
# enter.</details>
#
# **Key points** · in a ring all-reduce each worker sends $2(p-1)/p$ of the vector, never more than
# twice its bytes · DDP equals the large batch for layers that treat rows alone · the baseline gets
# the same cores · ZeRO divides what stays, not what a step needs · a pipeline idles $(p-1)/(m+p-1)$
# and then some · state, rows and files that depend on the step alone survive a kill · fit a model
# on some points, judge it on others.
#
# **Sources** · P. Goyal et al., *Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour*, 2017
# · S. Li et al., *PyTorch Distributed: Experiences on Accelerating Data Parallel Training*, 2020 ·
# S. Rajbhandari et al., *ZeRO: Memory Optimizations Toward Training Trillion Parameter Models*,
# 2020 · Y. Huang et al., *GPipe: Efficient Training of Giant Neural Networks using Pipeline
# Parallelism*, 2019 · D. Narayanan et al., *Efficient Large-Scale Language Model Training on GPU
# Clusters Using Megatron-LM*, 2021 · P. Patarasuk and X. Yuan, *Bandwidth Optimal All-reduce
# Algorithms for Clusters of Workstations*, 2009 · PyTorch's documentation of
# [torchrun](https://docs.pytorch.org/docs/stable/elastic/run.html),
# [DDP](https://docs.pytorch.org/docs/stable/notes/ddp.html) and
# [fully_shard](https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html).
#
# **For the capstone** row 09 of your ledger, *distributed*, says what a second worker buys on your
# machine, and how far the simulator may be trusted on another. Next: [10 · Operator
# fusion](10_operator_fusion.ipynb), back to one processor, and to the bytes it carries about.
