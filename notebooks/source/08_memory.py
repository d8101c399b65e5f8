# %% [markdown]
# # 08 · Memory
#
# **Where do the bytes of a training step go, and which of them can you trade for time?**
#
# After this chapter you can: *predict* the peak memory of a training step before you run it ·
# *write* activation checkpointing whose gradients equal the plain ones bit for bit · *explain* what
# it costs, and when · *shrink* one step part by part: loss, activations, gradients, optimizer ·
# *tell* what tensors hold from what the allocator holds.
#
# 90 minutes · before this: 1 Measurement; 5 and 7 help · runs on any CPU
#
# Packages: transformers

# %% tags=["parameters"]
import os

PROFILE = os.environ.get("COURSE_PROFILE", "fast")

# %% tags=["nbval-ignore-output"]
import functools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from course_utils import caching, claims, exercises, footprint, machine, measure, plots, scratch

SMOKE = PROFILE == "smoke"
SECONDS = {"smoke": 0.1, "fast": 2.0, "full": 12.0}[PROFILE]  # for one comparison
WIDTH, DEPTH, ROWS = {"smoke": (64, 4, 32), "fast": (256, 16, 192), "full": (512, 16, 1024)}[
    PROFILE
]
MIB, FOLDER = 2**20, Path(os.path.relpath(scratch("08")))
machine.card()

# %% [markdown]
# ## Recall
# (Chapter 7) Under autocast the saved activations should halve. When do they not?
# <details><summary>Answer</summary>When the 16-bit copies of the weights weigh as much, and where
# layers such as normalisation stay in fp32.</details>
#
# ## Predict
# Below stands a chain of `16` blocks, each two linear layers, from 256 numbers to 1,024 and back.
# You train it with Adam on `192` rows at a time. What share of the step's peak memory do the
# *parameters* take, in percent? Then: you stop storing what the blocks computed, and compute it
# again when the backward pass needs it. By how many percent does a step get longer?

# %%
my_share = ...  # percent
my_slowdown = ...  # percent
exercises.predict("08.parameters", my_share)
exercises.predict("08.slowdown", my_slowdown)

# %% [markdown]
# ## From scratch: what a backward pass keeps
# Take $y = x^2$. Its slope is $2x$, so the backward pass needs $x$ again. Autograd therefore
# *saves* $x$ during the forward pass. A *saved-tensor hook* sees each tensor on
# its way into the graph.


# %%
def saved_bytes(call):
    """Bytes that autograd keeps during call(), each tensor once."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()  # the graph must live while we count, or an address is used twice
    del result
    return sum(kept.values())


# %%
x = torch.randn(1000, requires_grad=True)  # 4,000 bytes
for name, call in {
    "x + 1": lambda: x + 1,
    "x * x": lambda: x * x,
    "relu(x)": lambda: torch.relu(x),
    "relu(gelu(x))": lambda: torch.relu(F.gelu(x)),
}.items():
    print(f"{name:14} keeps {saved_bytes(call):5} bytes")

# %% [markdown]
# An addition has slope 1 everywhere and keeps nothing. ReLU keeps its *output* (where it is
# positive, the slope is 1), GELU its *input*. Linear layers, convolutions and normalisations keep
# their inputs; dropout keeps its *mask*, the random choice it made. A tensor that two layers need,
# one's output and the next one's input, is stored once.
#
# The chain of this chapter is made of the block that follows the attention in a transformer layer:
# normalise, widen four times, bend, drop, narrow, add.


# %%
class Block(nn.Module):
    """x + down(dropout(gelu(up(norm(x))))) for rows of `width` numbers."""

    def __init__(self, width, p=0.1):
        super().__init__()
        self.norm, self.act, self.drop = nn.LayerNorm(width), nn.GELU(), nn.Dropout(p)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):  # (N, width) → (N, width)
        return x + self.down(self.drop(self.act(self.up(self.norm(x)))))


def chain(width, depth, p=0.1):
    torch.manual_seed(0)
    return nn.Sequential(*[Block(width, p) for _ in range(depth)])


# %% [markdown]
# Count what one block keeps, in units of its input: the input (the norm needs it) and the norm's
# output, one each; GELU's input, dropout's mask and what `down` reads, four each. Fourteen. With
# many rows that outgrows the weights by far.
#
# ## From scratch: a dry run
# A *fake tensor* has a shape, a type and a device, and no numbers. Run the forward pass on fake
# tensors and note, in order, what is saved: so you can count any network without spending its
# bytes.

# %%
from torch._subclasses.fake_tensor import FakeTensorMode


def place(t):
    return t.untyped_storage()._cdata  # what tells one piece of memory from another


# %%
def dry_run(make, shape, dtype=torch.float32):
    """What autograd would save, in order: (its bytes, how many are new, the gradient to come); and
    the sizes of parameters and buffers. Nothing is computed.
    """
    saved, alive, seen = [], [], set()

    def pack(t):
        size, there = t.untyped_storage().nbytes(), place(t)
        alive.append(t)
        if there in given:  # a parameter's gradient is made when backward comes by
            saved.append((0, 0, given[there]))
            given[there] = 0
        else:
            saved.append((size, 0 if there in seen else size, 0))
            seen.add(there)
        return t

    with FakeTensorMode(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model, x = make(), torch.zeros(shape, dtype=dtype)
        given = {place(t): 0 for t in (x, *model.buffers())}
        given |= {place(p): p.nbytes for p in model.parameters()}
        logits = model(x)
        alive.append(F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long)))
    sizes = [p.nbytes for p in model.parameters()]
    return saved, sizes, [b.nbytes for b in model.buffers()]


# %% [markdown]
# The backward pass goes through this list from its end. At each step it holds what is still saved,
# the parameters' gradients made so far, and two tensors in passing: a gradient that arrives and one
# that leaves.


# %%
def walk(saved):
    """The highest point of the backward pass, by what is held there."""
    kept, made, places = sum(new for _, new, _ in saved), 0, []
    for size, new, gradient in reversed(saved):
        made += gradient
        places.append({"activations": kept, "gradients": made, "temporary": 2 * size})
        kept -= new
    return max(places, key=lambda place: sum(place.values()))


# %% [markdown]
# Then the optimizer works, with all gradients there. Call the parameters' bytes $P$. Adam keeps two
# numbers a parameter, $2P$. What it needs in passing depends on its *implementation*. The plain
# loop (the default on a CPU) needs two copies of one parameter. `foreach`, the default on a GPU,
# handles all parameters in one go and needs $P$ more. `fused` needs nothing.


# %%
def predicted(dry, adam="loop"):
    """Bytes at the peak of an Adam step in fp32, by kind, from a dry run."""
    saved, sizes, buffers = dry
    everything = sum(sizes)
    passing = {"loop": 2 * max(sizes), "foreach": everything, "fused": 0}[adam]
    updating = {"activations": 0, "gradients": everything, "temporary": passing}
    peak = max(walk(saved), updating, key=lambda moment: sum(moment.values()))
    return {"parameters": everything + sum(buffers), "Adam": 2 * everything} | peak


# %% [markdown]
# ## Measure: networks that were held out
# The walk was made with the chain and an MLP. So judge it on others: four convolutional networks of
# torchvision, this course's own, and a small GPT-2
# ([how they are made](../course_utils/footprint.py)). `measure.peak_memory` sums the profiler's
# allocation events. The rival is a short formula, $3P + \max(A + 2a,\ P)$, with $A$ for all that is
# saved and $a$ for the largest single tensor.


# %%
def two_steps(make, x, y, adam="loop"):
    """A callable that makes a model and its Adam and takes two steps: the second is complete."""
    options = {"foreach": adam == "foreach", "fused": adam == "fused"}

    def run():
        model = make()
        optimizer = torch.optim.Adam(model.parameters(), **options)
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return model, optimizer

    return run


# %% tags=["nbval-ignore-output"]
measured, parts, rule = {}, {}, {}
held_out = footprint.held_out(*(2, 32) if SMOKE else (16, 64))  # images, their side
for name, (make, shape, dtype) in held_out.items():
    inputs, dry = torch.zeros(shape, dtype=dtype), dry_run(make, shape, dtype)
    labels = torch.zeros(inputs.numel() if dtype == torch.long else len(inputs), dtype=torch.long)
    saved, P = dry[0], sum(dry[1])
    whole, largest = sum(new for _, new, _ in saved), max(size for size, _, _ in saved)
    for adam in ("loop", "foreach", "fused"):
        call, case = two_steps(make, inputs, labels, adam), f"{name}, {adam}"
        measured[case] = measure.peak_memory(call) / MIB
        parts[case] = {kind: size / MIB for kind, size in predicted(dry, adam).items()}
        rule[case] = (3 * P + max(whole + 2 * largest, P)) / MIB
measure.release()  # to the system, what they leave behind

# %% tags=["nbval-ignore-output"]
error = {n: 100 * (sum(parts[n].values()) / measured[n] - 1) for n in measured}
by_rule = {n: 100 * (rule[n] / measured[n] - 1) for n in measured}
worst, off = max(error, key=lambda n: abs(error[n])), max(map(abs, by_rule.values()))
some = [n for n in measured if n.endswith("loop") or n.startswith("ResNet")]
footprint.stacked(
    {n: parts[n] for n in some},
    {n: measured[n] for n in some},
    xlabel="MiB at the peak of a training step",
    title=f"Predicted by a dry run: off by {abs(error[worst]):.1f}% at worst; by the short"
    f" formula {off:.0f}%",
    alt="Stacked bars of predicted bytes; the measured peak, a diamond, stands near each end.",
)
print({n: f"{e:+.1f}%" for n, e in error.items()})
claims.verdict("08.predictable_from_the_architecture", abs(error[worst]))

# %% [markdown]
# Each bar should end at its diamond; if one does not, look at *If yours shows no gain*. The short
# formula takes the largest tensor as if everything else were still there; the walk knows what is
# gone when its turn comes. ResNet-18's three rows differ by Adam's implementation alone.
#
# And your prediction?

# %% tags=["nbval-ignore-output"]
make_chain = functools.partial(chain, WIDTH, DEPTH)
for count in (ROWS // 8, ROWS):
    bytes_of = predicted(dry_run(make_chain, (count, WIDTH)))
    print(f"{count:4} rows:", {kind: f"{size / MIB:.1f} MiB" for kind, size in bytes_of.items()})
share = 100 * bytes_of["parameters"] / sum(bytes_of.values())
exercises.reveal("08.parameters", share, "%")

# %% [markdown]
# With few rows, parameters, gradients and Adam are the peak; with many, the activations. Each part
# has its own remedy.

# %% [markdown]
# ## Exercise A · the peak of an MLP
# An MLP has layers `nn.Linear(widths[0], widths[1])`, `nn.Linear(widths[1], widths[2])`, …, each
# with a bias, and a ReLU after every one but the last. It is trained in fp32 with Adam on `batch`
# rows. Complete one line, so that `mlp_bytes(widths, batch)` gives the bytes alive *between the
# forward and the backward pass* of a later step: the parameters, Adam's two numbers for each, and
# every activation that the layers keep. The batch counts, because the first layer keeps it; the
# last output, the loss and the gradients (none exist yet) do not.
#
# Example: `widths = [4, 8, 2]`, `batch = 3`. Parameters: $4·8 + 8 + 8·2 + 2 = 58$. Kept: the batch,
# $3·4$, and the ReLU's output, $3·8$, which the second layer reads too. $4·(3·58 + 36) = 840$
# bytes.


# %% tags=["exercise"]
def mlp_bytes(widths, batch):
    parameters = sum(a * b + b for a, b in zip(widths[:-1], widths[1:], strict=True))
    activations = ...  # how many numbers do the layers keep?
    return 4 * (3 * parameters + activations)


# %%
exercises.check("08.A", mlp_bytes)

# %% [markdown] tags=["hint"]
# A Linear keeps its input. A ReLU keeps its output. Which tensors are both?

# %% [markdown] tags=["hint"]
# Every width but one appears once, times the batch.


# %% tags=["solution"]
def mlp_bytes(widths, batch):
    parameters = sum(a * b + b for a, b in zip(widths[:-1], widths[1:], strict=True))
    activations = batch * sum(widths[:-1])
    return 4 * (3 * parameters + activations)


# %% tags=["wrong"]
# ReLU's output and the next layer's input are counted as two tensors.
def mlp_bytes(widths, batch):
    parameters = sum(a * b + b for a, b in zip(widths[:-1], widths[1:], strict=True))
    activations = batch * (widths[0] + 2 * sum(widths[1:-1]))
    return 4 * (3 * parameters + activations)


# %% tags=["wrong"]
# Counts outputs in place of inputs: the batch is missing and the logits are in.
def mlp_bytes(widths, batch):
    parameters = sum(a * b + b for a, b in zip(widths[:-1], widths[1:], strict=True))
    activations = batch * sum(widths[1:])
    return 4 * (3 * parameters + activations)


# %% tags=["wrong"]
# Two layers of one width share an entry: visible only when widths repeat.
def mlp_bytes(widths, batch):
    parameters = sum(a * b + b for a, b in zip(widths[:-1], widths[1:], strict=True))
    activations = batch * sum(set(widths[:-1]))
    return 4 * (3 * parameters + activations)


# %% [markdown] tags=["instructor"]
# 4 minutes. Draw the two-layer example on the board and colour the tensors that two layers share.
# Whoever gets 936 for the example has counted the ReLU twice: ask at which address the second copy
# would lie.

# %% [markdown]
# ## From scratch: checkpointing
# Keep only what enters a block. When the backward pass arrives, run the block once more, this time
# with gradients, and go on. That is *activation checkpointing* (Chen et al. 2016). PyTorch lets you
# write it as an autograd function: you say what happens forwards, and what happens when a gradient
# comes back.


# %%
class FirstCheckpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, x):
        ctx.function = function
        ctx.save_for_backward(x)  # all that is kept
        return function(x)  # autograd is off inside forward: nothing else is saved

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()  # a fresh start: the graph ends at this block's input
        with torch.enable_grad():
            y = ctx.function(x)
        torch.autograd.backward(y, gradient)  # parameters collect their gradients on the way
        return None, x.grad  # one answer for each input of forward


# %% [markdown]
# Does it compute the same? Compare every gradient bit by bit, without dropout and with it.


# %%
def through(wrap, parts):
    """A forward pass that sends each part through wrap(part, x)."""
    return lambda x: functools.reduce(lambda x, part: wrap(part, x), parts, x)


def gradients(model, forward, x, y):
    """The gradients of one step, from a fixed random state."""
    torch.manual_seed(1)
    model.zero_grad()
    x = x.detach().requires_grad_()
    F.cross_entropy(forward(x), y).backward()
    return [p.grad for p in model.parameters()] + [x.grad]


def equal_bits(model, wrap, x, y):
    plain, ours = gradients(model, model, x, y), gradients(model, through(wrap, model), x, y)
    return all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


# %%
sample, target = torch.randn(32, 64), torch.randint(0, 64, (32,))


def compare_bits(wrap):
    for p in (0.0, 0.1):
        same = equal_bits(chain(64, 4, p), wrap, sample, target)
        print(f"dropout {p}: bitwise equal {same}")


compare_bits(FirstCheckpoint.apply)

# %% [markdown]
# With dropout the gradients are wrong, and nothing complained. The second run drew *another* mask.
# So the state of the random generator belongs to what must be kept. Before the second run, set it
# back; after it, put the present state in place again, or every later random number of your program
# changes.


# %%
class Checkpoint(FirstCheckpoint):
    @staticmethod
    def forward(ctx, function, x):
        ctx.state = torch.get_rng_state()  # a GPU has a state of its own
        return FirstCheckpoint.forward(ctx, function, x)

    @staticmethod
    def backward(ctx, gradient):
        now = torch.get_rng_state()
        torch.set_rng_state(ctx.state)  # the same mask as in the first run
        answer = FirstCheckpoint.backward(ctx, gradient)
        torch.set_rng_state(now)
        return answer


compare_bits(Checkpoint.apply)

# %% [markdown]
# ## The tool of the field: torch.utils.checkpoint
# Use it with `use_reentrant=False`. It hooks into the saving of tensors, so it also works with
# inputs that need no gradient (ours does not: *Further*), and it stops as soon as it has what it
# needs. Both must agree with the plain step bit for bit and leave the random generator in the same
# state.

# %%
from torch.utils.checkpoint import checkpoint


def library(part, x):
    return checkpoint(part, x, use_reentrant=False)


net, after = chain(64, 4), {}
for name, wrap in {"ours": Checkpoint.apply, "torch": library}.items():
    print(f"{name}: bitwise equal {equal_bits(net, wrap, sample, target)}")
    after[name] = torch.rand(1).item()
gradients(net, net, sample, target)
print("the next random number is the plain step's:", {torch.rand(1).item()} == set(after.values()))

# %% [markdown]
# ## Exercise B · a checkpoint for any function
# Write `MyCheckpoint`, an autograd function: `MyCheckpoint.apply(function, *inputs)` returns
# `function(*inputs)`, one tensor. Among the inputs may be several tensors, tensors that need no
# gradient, tensors of integers, and things that are no tensors (a number, a string, None); at least
# one tensor needs a gradient. Write both passes yourself. The demands:
# 1. Forwards, `function` runs once, without autograd, and nothing inside it is kept; backwards, it
#    runs a second time. Between the passes you hold what went in and a random state, no copies of
#    the output.
# 2. Every gradient equals the plain one bit for bit, those of parameters inside `function` too,
#    with dropout in it, and with a second checkpoint behind the first one.
# 3. After the backward pass, the CPU's random generator stands where it stood before the backward
#    pass.
#
# Example: for `f = lambda x, n: x * n` and `x = torch.ones(2, requires_grad=True)`,
# `MyCheckpoint.apply(f, x, 3).sum().backward()` leaves `x.grad` at `[3, 3]`. `ctx.needs_input_grad`
# has an entry for each input of `forward`, `function` included.


# %% tags=["exercise"]
class MyCheckpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, *inputs): ...

    @staticmethod
    def backward(ctx, gradient): ...


# %%
exercises.check("08.B", MyCheckpoint)

# %% [markdown] tags=["hint"]
# `save_for_backward` takes tensors only. Remember in `ctx` at which positions they were, and what
# stood at the others.

# %% [markdown] tags=["hint"]
# Only an input with `ctx.needs_input_grad[i + 1]` may get `requires_grad_()`: integers can't have a
# gradient.

# %% [markdown] tags=["hint"]
# Three random states: the one at the first run, the one when backward begins, and again the latter
# when it ends.


# %% tags=["solution"]
class MyCheckpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.function, ctx.state = function, torch.get_rng_state()
        ctx.others = {i: v for i, v in enumerate(inputs) if not isinstance(v, torch.Tensor)}
        ctx.count = len(inputs)
        ctx.save_for_backward(*[v for v in inputs if isinstance(v, torch.Tensor)])
        return function(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        saved, needed = iter(ctx.saved_tensors), ctx.needs_input_grad[1:]
        inputs = [
            ctx.others[i] if i in ctx.others else next(saved).detach() for i in range(ctx.count)
        ]
        for value, need in zip(inputs, needed, strict=True):
            if need:
                value.requires_grad_()
        now = torch.get_rng_state()
        torch.set_rng_state(ctx.state)
        with torch.enable_grad():
            y = ctx.function(*inputs)
        torch.set_rng_state(now)
        torch.autograd.backward(y, gradient)
        return None, *[v.grad if need else None for v, need in zip(inputs, needed, strict=True)]


# %% tags=["wrong"]
# The random state is not kept: with dropout the second run draws another mask.
class MyCheckpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.function, ctx.inputs = function, inputs
        return function(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        needed = ctx.needs_input_grad[1:]
        inputs = [v.detach() if isinstance(v, torch.Tensor) else v for v in ctx.inputs]
        inputs = [v.requires_grad_() if n else v for v, n in zip(inputs, needed, strict=True)]
        with torch.enable_grad():
            torch.autograd.backward(ctx.function(*inputs), gradient)
        return None, *[v.grad if n else None for v, n in zip(inputs, needed, strict=True)]


# %% tags=["wrong"]
# The state is set back for the second run and left there: later random numbers change.
class MyCheckpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.function, ctx.inputs, ctx.state = function, inputs, torch.get_rng_state()
        return function(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        needed = ctx.needs_input_grad[1:]
        inputs = [v.detach() if isinstance(v, torch.Tensor) else v for v in ctx.inputs]
        inputs = [v.requires_grad_() if n else v for v, n in zip(inputs, needed, strict=True)]
        torch.set_rng_state(ctx.state)
        with torch.enable_grad():
            torch.autograd.backward(ctx.function(*inputs), gradient)
        return None, *[v.grad if n else None for v, n in zip(inputs, needed, strict=True)]


# %% tags=["wrong"]
# The graph of the first run is kept: right gradients, and no byte saved.
class MyCheckpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, *inputs):
        inputs = [v.detach() if isinstance(v, torch.Tensor) else v for v in inputs]
        ctx.inputs = [
            v.requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for v in inputs
        ]
        with torch.enable_grad():
            ctx.y = function(*ctx.inputs)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx, gradient):
        torch.autograd.backward(ctx.y, gradient)
        needed = ctx.needs_input_grad[1:]
        return None, *[v.grad if n else None for v, n in zip(ctx.inputs, needed, strict=True)]


# %% tags=["wrong"]
# Every tensor is asked for a gradient: integers, such as a word's number, can't have one. The edge.
class MyCheckpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.function, ctx.inputs, ctx.state = function, inputs, torch.get_rng_state()
        return function(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        inputs = [
            v.detach().requires_grad_() if isinstance(v, torch.Tensor) else v for v in ctx.inputs
        ]
        now = torch.get_rng_state()
        torch.set_rng_state(ctx.state)
        with torch.enable_grad():
            y = ctx.function(*inputs)
        torch.set_rng_state(now)
        torch.autograd.backward(y, gradient)
        return None, *[v.grad if isinstance(v, torch.Tensor) else None for v in inputs]


# %% [markdown] tags=["instructor"]
# 15 minutes, in pairs. Demand 3 is the one that rooms forget; show them two runs of a training
# script that differ only by checkpointing and have different losses from the second step on. Ask
# why `save_for_backward` is better than `ctx.inputs = …` (it notices in-place changes and avoids
# reference cycles).

# %% [markdown]
# ## Measure: what does it cost?
# Checkpointing can take several blocks at once: a *segment*. Chen et al. cut $n$ layers into about
# $\sqrt n$ segments and report "only 30 percent additional running time cost" (2016). Many say a
# third. Take torch's function, $\sqrt n$ segments, no dropout.


# %%
def segments(model, length):
    return [model[i : i + length] for i in range(0, len(model), length)]


def step(model, forward=None):
    F.cross_entropy((forward or model)(x), y).backward()  # gradients add up; nobody reads them


# %% tags=["nbval-ignore-output"]
blocks = chain(WIDTH, DEPTH, p=0.0)
x, y = torch.randn(ROWS, WIDTH, requires_grad=True), torch.randint(0, WIDTH, (ROWS,))
ways = {
    "plain": blocks,
    "every block": through(library, blocks),
    "√n segments": through(library, segments(blocks, math.isqrt(DEPTH))),
    "one segment": through(library, segments(blocks, DEPTH)),
}
step(blocks)  # the gradients exist from here on: only activations are counted
for name, way in ways.items():
    size = measure.peak_memory(lambda: step(blocks, way)) / MIB
    print(f"{name:20} {size:6.1f} MiB of activations")

# %% [markdown]
# *One segment* saves nothing: computing again, it holds everything at one moment. And *every block*
# needs less than $\sqrt n$ (*Further*). Now the time of nine blocks: fresh processes, one thread.


# %%
def forward_only(model):
    with torch.no_grad():
        return model(x)


def price(model, processes):
    """Speed of the plain step over the checkpointed one, and of the forward pass over the step."""
    checkpointed = through(library, segments(model, math.isqrt(len(model))))
    plain, alone = functools.partial(step, model), functools.partial(forward_only, model)
    how = {"seconds": SECONDS * processes / 3, "processes": processes, "threads": 1}
    slower = measure.across(lambda: step(model, checkpointed), plain, **how)
    how |= {"seconds": SECONDS, "processes": 6, "across_modes": True}
    return slower, measure.across(plain, alone, **how)


# %% tags=["nbval-ignore-output"]
nine, dropping = (chain(WIDTH, 4 if SMOKE else 9, p=p) for p in (0.0, 0.1))
cost = {"no dropout": price(nine, 12), "dropout": price(dropping, 6)}
measure.fresh.end()  # the processes that wait for comparisons; their memory is needed
extra = {
    name: measure.derive(lambda s: 100 * (s - 1), slower.interval, unit="% more time")
    for name, (slower, _) in cost.items()
}
exercises.reveal("08.slowdown", extra["no dropout"].value, "%")
claims.verdict("08.a_third_more_time", extra["no dropout"])

# %% [markdown]
# ## Explain: where the third comes from, and where it goes
# A backward pass has two matrix products for each one of the forward pass: for the gradient of the
# input and for that of the weight. So the plain step costs $1 + 2 = 3$, and a second forward pass
# adds a third. If time were matrix products, dropout would change nothing. The rival: **the extra
# time is the forward pass's share of the step**, whatever it consists of. Dropout, whose random
# numbers cost nothing in the backward pass, tells the two apart.

# %% tags=["nbval-ignore-output"]
bars = {"matrix products alone": 100 / 3}
for name, (_, share) in cost.items():
    bars[f"{name}: the forward pass's share"] = measure.derive(lambda s: 100 / s, share.interval)
    bars[f"{name}: measured"] = extra[name]
plots.bars(
    bars,
    xlabel="more time than the plain step (%)",
    title=f"Checkpointing adds {extra['no dropout'].value:.0f}% without dropout,"
    f" {extra['dropout'].value:.0f}% with it",
    alt="Bars: a third; then, without and with dropout, the forward's share and the extra time.",
)

# %% [markdown]
# Are the *measured* bars equal, or does each stand beside its share? Torch may end below its share:
# it skips the last product of a segment, which nobody needs.

# %% [markdown]
# ## Exercise C · fit a network into a budget
# A network is a list of blocks, in the order of the forward pass. Each is a tuple `(inside, border,
# seconds)`: the bytes that it keeps for its backward pass, those of its input, and the time of
# running it again. You may checkpoint any set of blocks. A checkpointed block holds its `border`
# only; any other holds its `inside`.
#
# The peak is the largest amount held while the backward pass works on a block: what the blocks
# before it hold, plus its `inside`, plus its `border` if it is checkpointed. (Later blocks are
# freed.)
#
# Write `plan(blocks, budget)`. Return the indices to checkpoint, as a sorted list, such that the
# peak is **at most** `budget` and the sum of their `seconds` as small as possible; `None` if
# nothing fits. There are 1 to 10 blocks, so you may try all sets.
#
# Example: `blocks = [(10, 1, 3.0), (10, 1, 2.0)]`. With a budget of 20: `[]`. With 12: `[0]`, for
# at block 1 $1 + 10 = 11$, at block 0 $10 + 1 = 11$. The cheaper `[1]` does not fit: when block 1
# is at work, block 0 holds 10, and $10 + 10 + 1 = 21$. With 10: `None`.


# %% tags=["exercise"]
def plan(blocks, budget): ...


# %%
exercises.check("08.C", plan)

# %% [markdown] tags=["hint"]
# First write `peak(chosen)`. Then `itertools.combinations(range(n), size)` for each `size` from 0
# to `n` gives every set.

# %% [markdown] tags=["hint"]
# Keep the sets that fit; take `min(…, key=…)` by the sum of seconds, with `default=None`.


# %% tags=["solution"]
def plan(blocks, budget):
    import itertools

    def peak(chosen):
        held = [border if i in chosen else inside for i, (inside, border, _) in enumerate(blocks)]
        return max(
            sum(held[:i]) + inside + (border if i in chosen else 0)
            for i, (inside, border, _) in enumerate(blocks)
        )

    n = len(blocks)
    sets = (c for k in range(n + 1) for c in itertools.combinations(range(n), k))
    fitting = (c for c in sets if peak(c) <= budget)
    best = min(fitting, key=lambda c: sum(blocks[i][2] for i in c), default=None)
    return None if best is None else list(best)


# %% tags=["wrong"]
# What a block needs while it is computed again is forgotten: the plan does not fit.
def plan(blocks, budget):
    import itertools

    def peak(chosen):
        return sum(
            border if i in chosen else inside for i, (inside, border, _) in enumerate(blocks)
        )

    sets = (
        c for k in range(len(blocks) + 1) for c in itertools.combinations(range(len(blocks)), k)
    )
    fitting = (c for c in sets if peak(c) <= budget)
    best = min(fitting, key=lambda c: sum(blocks[i][2] for i in c), default=None)
    return None if best is None else list(best)


# %% tags=["wrong"]
# Greedy: the block that saves most bytes first, whatever its time.
def plan(blocks, budget):
    def peak(chosen):
        held = [border if i in chosen else inside for i, (inside, border, _) in enumerate(blocks)]
        at_work = [
            sum(held[:i]) + b[0] + (b[1] if i in chosen else 0) for i, b in enumerate(blocks)
        ]
        return max([sum(held), *at_work])

    chosen = []
    for i in sorted(range(len(blocks)), key=lambda i: blocks[i][1] - blocks[i][0]):
        if peak(chosen) <= budget:
            break
        chosen.append(i)
    return sorted(chosen) if peak(chosen) <= budget else None


# %% tags=["wrong"]
# "Below" in place of "at most": wrong only where the budget is met to the byte.
def plan(blocks, budget):
    import itertools

    def peak(chosen):
        held = [border if i in chosen else inside for i, (inside, border, _) in enumerate(blocks)]
        at_work = [
            sum(held[:i]) + b[0] + (b[1] if i in chosen else 0) for i, b in enumerate(blocks)
        ]
        return max([sum(held), *at_work])

    sets = (
        c for k in range(len(blocks) + 1) for c in itertools.combinations(range(len(blocks)), k)
    )
    fitting = (c for c in sets if peak(c) < budget)
    best = min(fitting, key=lambda c: sum(blocks[i][2] for i in c), default=None)
    return None if best is None else list(best)


# %% tags=["wrong"]
# Hands back the plan with everything checkpointed when nothing fits.
def plan(blocks, budget):
    import itertools

    def peak(chosen):
        held = [border if i in chosen else inside for i, (inside, border, _) in enumerate(blocks)]
        at_work = [
            sum(held[:i]) + b[0] + (b[1] if i in chosen else 0) for i, b in enumerate(blocks)
        ]
        return max([sum(held), *at_work])

    every = tuple(range(len(blocks)))
    sets = (c for k in range(len(blocks) + 1) for c in itertools.combinations(every, k))
    fitting = (c for c in sets if peak(c) <= budget)
    return list(min(fitting, key=lambda c: sum(blocks[i][2] for i in c), default=every))


# %% [markdown] tags=["instructor"]
# 12 minutes. The example with budget 12 is the heart: an early block weighs longer than a late one,
# because it is held while all later ones work. Ask which single block is the worst to checkpoint
# (the last: it saves nothing at its own backward pass).

# %% [markdown]
# ## Measure: one step, made smaller part by part
# Now a small language model: words, blocks, and scores over a vocabulary of 8,192 (the *logits*),
# the largest tensors of all. The loss, "for small models, consumes an order of magnitude more
# memory than the rest of the LLM combined" (Wijmans et al. 2024). Compute it for a piece of the
# rows at a time, and checkpoint the pieces.


# %%
def loss_in_pieces(head, h, labels, pieces):
    """Mean cross-entropy of head(h), with the scores of one piece of the rows at a time."""

    def part(h, labels):
        return F.cross_entropy(head(h), labels, reduction="sum")

    some = zip(h.chunk(pieces), labels.chunk(pieces), strict=True)
    return sum(checkpoint(part, *one, use_reentrant=False) for one in some) / len(labels)


# %%
class LanguageModel(nn.Module):
    """Words → blocks → scores → mean loss; `pieces` and `wrap` switch the savings on."""

    def __init__(self, vocabulary, width, depth, pieces=0, wrap=None):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.blocks = nn.Embedding(vocabulary, width), chain(width, depth, p=0.0)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.pieces, self.wrap = pieces, wrap

    def forward(self, words, labels):  # (N,), (N,) → a number
        h = self.words(words)
        h = through(self.wrap, self.blocks)(h) if self.wrap else self.blocks(h)
        if self.pieces:
            return loss_in_pieces(self.head, h, labels, self.pieces)
        return F.cross_entropy(self.head(h), labels)


# %% [markdown]
# *Gradients* can go, too: update each parameter as soon as its gradient is there, inside the
# backward pass, and drop the gradient. And the *optimizer's state*: Adafactor (Shazeer & Stern
# 2018) keeps a row and a column of sums in place of Adam's table of squares, and no average of
# gradients. It takes other steps than Adam; all savings before it leave the step as it was.


# %%
def update(p, optimizer):
    """Called when p's gradient is complete."""
    optimizer.step()
    p.grad = None


def trainer(early=False, make=None, **savings):
    """A training step as a callable, and what it uses: the model and its optimizers."""
    make = make or functools.partial(torch.optim.Adam, fused=True)
    model = LanguageModel(*SIZES, **savings)
    optimizers = {p: make([p]) for p in model.parameters()}
    for p, optimizer in optimizers.items() if early else ():
        p.register_post_accumulate_grad_hook(functools.partial(update, optimizer=optimizer))

    def step():
        loss = model(words, labels)
        loss.backward()
        for optimizer in () if early else optimizers.values():
            optimizer.step()
        model.zero_grad()
        return loss.item()

    return step, [model, *optimizers.values()]


# %% tags=["nbval-ignore-output"]
SIZES = (512, 32, 2) if SMOKE else (8192, 256, 8)  # vocabulary, width, blocks
words, labels = torch.randint(0, SIZES[0], (2, 64 if SMOKE else 384))
savings = {"plain": {}, "loss in 8 pieces": {"pieces": 8}}
savings["+ checkpoints"] = savings["loss in 8 pieces"] | {"wrap": library}
savings["+ step in backward"] = savings["+ checkpoints"] | {"early": True}
savings["+ Adafactor"] = savings["+ step in backward"] | {"make": torch.optim.Adafactor}

# %% [markdown]
# `footprint.by_kind` asks torch's own tracker whose bytes live at the peak. It knows nothing of the
# profiler, whose sum the diamonds are.


# %% tags=["nbval-ignore-output"]
def two_language_steps(how):
    one, owners = trainer(**how)
    return one(), one(), owners


kinds, total = {}, {}
for name, how in savings.items():
    total[name] = measure.peak_memory(lambda: two_language_steps(how)) / MIB
    one, owners = trainer(**how)
    one()  # the optimizer's state comes into being
    kinds[name] = {k: size / MIB for k, size in footprint.by_kind(one, *owners).items()}
    loss, took = one(), measure.latency(one, seconds=SECONDS / 4).median
    print(f"{name:20} third loss {loss:.5f}, a step takes {measure.pretty(took.value)} (a look)")
    measure.release()  # a hook and its optimizer know each other: only a search finds them

# %% tags=["nbval-ignore-output"]
footprint.stacked(
    kinds,
    total,
    mark="measured by the profiler",
    xlabel="MiB at the peak of a training step",
    title=f"From {total['plain']:.0f} to {total['+ Adafactor']:.0f} MiB:"
    f" {total['plain'] / total['+ Adafactor']:.1f} times less",
    alt="Stacked bars of five ways to take one step: each is shorter than the one above it.",
)

# %% [markdown]
# Row by row: which part fell, which one stands out now? Each saving works on its own part: find the
# part first. All losses but the last must agree to about six digits. The last column is the price.
#
# ## Measure: allocated is not reserved
# Asking a GPU for memory is slow, so PyTorch keeps what you free. What tensors hold is *allocated*;
# what PyTorch took from the device is *reserved*. Make it a habit to print both,
# `torch.cuda.max_memory_allocated()` and `torch.cuda.max_memory_reserved()`: a large gap means
# pieces that fit nobody. [`course_utils/caching.py`](../course_utils/caching.py) is that allocator
# on paper, with the rules of PyTorch's source. Train a model on it, with batches of random lengths.

# %% tags=["nbval-ignore-output"]
empty = caching.CachingAllocator.empty_cache
arms = {"left alone": {}, "emptied": {"after_step": empty}, "expandable": {"expandable": True}}
batches, reserved = caching.lengths(16, seed=3), {}
for name, how in arms.items():
    gpu = caching.CachingAllocator(expandable="expandable" in how)
    steps = caching.training(gpu, batches, after_step=how.get("after_step"))
    reserved[name] = [device.reserved / MIB for device in steps]
plots.lines(
    range(1, 17),
    reserved,
    xlabel="step",
    ylabel="reserved after the step (MiB)",
    reference=(gpu.peak_allocated / MIB, "most that ever lived at once"),
    title=f"Reserved at the end: {reserved['left alone'][-1]:.0f} MiB left alone,"
    f" {reserved['emptied'][-1]:.0f} emptied",
    alt="Reserved memory over the steps: left alone it climbs above what lived at once.",
)

# %% [markdown]
# `empty_cache()` after each step keeps the line low, and people
# [report](https://discuss.pytorch.org/t/about-torch-cuda-empty-cache/34232) that "it indeed works
# (save at least 50% memory compared to the code not using this function)". But for whom?
# `nvidia-smi` sees this line. Your model sees whether its next tensor can still be allocated, and
# before PyTorch gives up, it empties the cache by itself. So ask for the **smallest device on which
# the run comes to its end**.

# %% tags=["nbval-ignore-output"]
draws = range(4 if SMOKE else 12)
needs = {
    name: [caching.smallest_device(caching.lengths(16, seed), **how) for seed in draws]
    for name, how in arms.items()
}
equal, rising = [2048] * 16, list(range(256, 2049, 119))
for name, how in arms.items():
    one, other = (caching.smallest_device(sizes, **how) for sizes in (equal, rising))
    few, many = min(needs[name]), max(needs[name])
    print(f"{name:10} random {few} to {many} MiB, rising {other}, all equal {one}")

# %% tags=["nbval-ignore-output"]
less = [100 * (1 - b / a) for a, b in zip(needs["left alone"], needs["emptied"], strict=True)]
claims.verdict("08.empty_cache_saves_half", measure.paired_t(less, "%"))

# %% [markdown]
# The run fits into less than it reserves when nobody stops it. So emptying is good manners before
# *another process* starts on the same GPU; your own model gains what the interval says, and each
# emptying waits for the device. `PYTORCH_ALLOC_CONF=expandable_segments:True` is made for sizes
# that change: one segment that grows leaves no odd ends behind. Compare *rising* lengths with equal
# ones. It does not cure every hole: *Further*.
#
# ## If yours shows no gain
# | You see | Because | Look at |
# |---|---|---|
# | checkpointing saves little | parameters and optimizer are the peak | the chain with few rows |
# | it saves nothing | one segment holds everything at the end | shorter segments |
# | it costs far more than a third | random numbers, many small operations: a large forward share | the bars under *Explain* |
# | the prediction is too low for a convolution | the library rearranges weights and images in memory of its own | larger images; another machine |
# | pieces of the loss save nothing | a small vocabulary: the scores are not the largest part | the stacked bars |
#
# ## Myth: accumulation is the big batch
# Another way to hold fewer activations: send the batch in pieces, let the gradients add up, update
# once. "Gradient accumulation is supposed to be mathematically equivalent to full batch training",
# wrote [Hugging Face](https://huggingface.co/blog/gradient_accumulation) in October 2024, when it
# came out that in many trainers it was not. Each piece's loss was a mean over *its* tokens, divided
# by the number of pieces. What lies beyond a sentence's end is labelled −100 and left out.

# %%
sentences = torch.randn(8, 64, 32, dtype=torch.float64)  # sentences, tokens, width


def targets(lengths):
    beyond = torch.arange(64) >= torch.tensor(lengths)[:, None]
    return torch.randint(0, 32, (8, 64)).masked_fill(beyond, -100)


def tokens_in(labels):
    return (labels != -100).sum()


def accumulated(model, labels, pieces, divisor):
    """All gradients as one vector; each piece's summed loss is divided by divisor(its labels)."""
    model.zero_grad()
    x = sentences.to(next(model.parameters()).dtype)
    for part, own in zip(x.chunk(pieces), labels.chunk(pieces), strict=True):
        loss = F.cross_entropy(model(part).flatten(0, 1), own.flatten(), reduction="sum")
        (loss / divisor(own)).backward()  # adds to what is in .grad
    return nn.utils.parameters_to_vector([p.grad for p in model.parameters()])


# %%
def apart(a, b):
    return float((a - b).norm() / b.norm())


small, uneven = chain(32, 2, p=0.0).double(), targets([64, 3, 50, 4, 12, 5, 33, 2])
full = accumulated(small, uneven, 1, tokens_in)
recipe = accumulated(small, uneven, 4, lambda own: 4 * tokens_in(own))
cured = accumulated(small, uneven, 4, lambda own: tokens_in(uneven))
print("divided by all tokens of the batch, equal within 1e-12:", apart(cured, full) < 1e-12)
even = targets([40] * 8)
null = accumulated(small, even, 4, lambda own: 4 * tokens_in(own))
same = apart(null, accumulated(small, even, 1, tokens_in)) < 1e-12
print("the recipe, all sentences of one length, equal within 1e-12:", same)

# %% tags=["nbval-ignore-output"]
claims.verdict("08.accumulation_equals_the_full_batch", 100 * apart(recipe, full))

# %% [markdown]
# The recipe gives a token in a short piece more weight than one in a long piece; with equal lengths
# nothing shows. The cure: divide every piece's *sum* by the tokens of the **whole** batch, counted
# before you begin (`num_items_in_batch` in today's Transformers; over all workers, in chapter 9).
# BatchNorm differs whatever you divide by.

# %% [markdown]
# ## Break it
# With few rows there is nothing to win: see the chain's parts. And a function that *remembers* does
# not run a second time as it ran the first. BatchNorm keeps running statistics:

# %%
counting = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.GELU())
library(counting, torch.randn(16, 8, requires_grad=True)).sum().backward()
print("batches seen: 1 - batches counted by BatchNorm:", int(counting[1].num_batches_tracked))

# %% [markdown]
# The gradients are right, and the running mean has moved twice as far as it should, which shows in
# evaluation only.
#
# ## Exit quiz
# **1. A batch twice as large doubles**
# <details><summary>Adam's state</summary>Two numbers a parameter, whatever the batch.</details>
# <details><summary>the activations</summary>Right: one row an example.</details>
# <details><summary>everything</summary>Parameters, gradients and Adam's state stay.</details>
#
# **2. Checkpointing adds to the time of a step**
# <details><summary>a third</summary>So much for the products; a step has more in it.</details>
# <details><summary>nothing, if the batch is small</summary>Every segment still runs
# twice.</details>
# <details><summary>about the forward pass's share of it</summary>Right: it runs again.</details>
#
# **3. Your GPU is out of memory, and `empty_cache()` in the loop is proposed. It helps**
# <details><summary>another process on that GPU</summary>Right: it lowers what is
# reserved.</details>
# <details><summary>your next allocation, always</summary>Before it gives up, the allocator empties
# its cache by itself.</details>
# <details><summary>against holes between living tensors</summary>A segment with one tenant
# stays.</details>
#
# **4. A language model with 8 layers and 100,000 words runs out of memory at a batch of 16. Look
# first at**
# <details><summary>Adam's state</summary>It does not depend on the batch.</details>
# <details><summary>the scores over the vocabulary</summary>Right: 100,000 numbers a token, three
# times over in the loss's backward pass.</details>
# <details><summary>the attention's table</summary>The fused kernel never stores it (chapter
# 10).</details>
#
# **5. Accumulated gradients differ from the big batch's by several percent. Look first at**
# <details><summary>rounding</summary>In fp32 the whole vector stays far closer; only single numbers
# that nearly cancel differ by percents.</details>
# <details><summary>the learning rate</summary>It acts after the gradients are there.</details>
# <details><summary>what each piece's loss is divided by, and BatchNorm</summary>Right.</details>
#
# **Key points** · a dry run predicts the peak · find the part that stands out, then choose the
# trick · checkpointing keeps the random state and costs the forward pass's share · allocated is not
# reserved · divide an accumulated loss by all tokens of the batch.
#
# **Sources** · T. Chen et al., [*Training Deep Nets with Sublinear Memory
# Cost*](https://arxiv.org/abs/1604.06174), 2016 · E. Wijmans et al., [*Cut Your Losses in
# Large-Vocabulary Language Models*](https://arxiv.org/abs/2411.09009), 2024 · N. Shazeer and M.
# Stern, *Adafactor: Adaptive Learning Rates with Sublinear Memory Cost*, 2018 · T. Dettmers et al.,
# [*8-bit Optimizers via Block-wise Quantization*](https://arxiv.org/abs/2110.02861), 2021 · S.
# Rajbhandari et al., *ZeRO: Memory Optimizations Toward Training Trillion Parameter Models*, 2020 ·
# Hugging Face's blog, [*Fixing Gradient
# Accumulation*](https://huggingface.co/blog/gradient_accumulation), 2024 · PyTorch's documentation
# of [torch.utils.checkpoint](https://docs.pytorch.org/docs/stable/checkpoint.html), [CUDA memory
# management](https://docs.pytorch.org/docs/stable/notes/cuda.html#memory-management), [memory
# snapshots](https://docs.pytorch.org/docs/stable/torch_cuda_memory.html) and [saved
# tensors](https://docs.pytorch.org/docs/stable/notes/autograd.html#saved-tensors) · PyTorch's
# source, `c10/cuda/CUDACachingAllocator.cpp` and `torch/utils/data/_utils/collate.py`.
#
# **For the capstone** row 08 of your ledger, *memory*, now says whether a peak can be predicted on
# your machine, and what lowering it costs. Next: [09 · Distributed
# training](09_distributed_training.ipynb), where one machine's memory is not enough.

# %% [markdown]
# ## Further
# Each part stands alone.
#
# ### When is √n the right length?
# Let a block keep $A$ bytes and take in $b$ bytes. With segments of $s$ blocks you hold the input
# of each segment, one segment's inside, and two tensors of size $a$ in passing: $M(s) =
# \frac{n}{s}\, b + s A + 2a$. Its smallest value is at $s^* = \sqrt{n\, b / A}$. For $A = b$ that
# is $\sqrt n$: the rule is about layers whose inside is no larger than their border. Here $A =
# 14\,b$ and $a = 4\,b$.


# %%
def activation_peak(model, length=None, rows=256, width=64):
    """Peak in MiB of a step's activations; with a length, torch's checkpoint over segments."""
    x, labels = torch.zeros(rows, width, requires_grad=True), torch.zeros(rows, dtype=torch.long)
    for p in [x, *model.parameters()]:
        p.grad = torch.zeros_like(p)
    forward = through(library, segments(model, length)) if length else model
    return measure.peak_memory(lambda: F.cross_entropy(forward(x), labels).backward()) / MIB


# %% tags=["nbval-ignore-output"]
deep, b = chain(64, 36), 256 * 64 * 4 / MIB
lengths = [1, 2, 3, 4, 6, 9, 12, 18, 36]
curve = {
    "predicted": [36 / s * b + 14 * s * b + 8 * b for s in lengths],
    "measured": [activation_peak(deep, s) for s in lengths],
}
shortest = lengths[int(np.argmin(curve["measured"]))]
far = max(abs(m / p - 1) for m, p in zip(curve["measured"], curve["predicted"], strict=True))
plots.lines(
    lengths,
    curve,
    xlabel="blocks a segment",
    ylabel="peak of activations (MiB)",
    logx=True,
    logy=True,
    title=f"Of 36 blocks, {shortest} a segment need least; √n says 6. Off by {far:.0%} at most",
    alt="Peak against segment length: lowest at short segments, prediction and measurement close.",
)

# %% [markdown]
# The bottom of the valley lies near $s^* = \sqrt{36/14} \approx 1.6$, far left of $\sqrt{36} = 6$.
# Cut at the narrow places, and often. Does the memory of the $\sqrt n$ rule still *grow* like
# $\sqrt n$, as promised?

# %% tags=["nbval-ignore-output"]
depths = [4, 9, 16, 25, 36]
growth = {"plain": [], "√n segments": [], "every block": []}
for n in depths:
    model = chain(64, n)
    for name, length in zip(growth, (None, math.isqrt(n), 1), strict=True):
        growth[name].append(activation_peak(model, length))
slope = {k: float(np.polyfit(np.log(depths), np.log(v), 1)[0]) for k, v in growth.items()}
print({name: f"n^{power:.2f}" for name, power in slope.items()})
claims.verdict("08.square_root_memory", slope["√n segments"])

# %% [markdown]
# The claim is about the *growth*. At depths that you meet, *every block* lies below *√n segments*;
# the two cross only at about $14^2$ blocks, where $n\,b + A$ has grown to $\sqrt n\,(b + A)$.
#
# ### What to compute again: you choose, or the compiler
# *Selective* checkpointing keeps the results of some operations and computes the rest again. The
# usual choice: keep what matrix products gave, because they are dear. `torch.compile` chooses by
# itself, by a minimal cut through the graph, and takes a *budget*: the share of the activations it
# may keep. (`aot_eager_decomp_partition` cuts and compiles no code.)

# %% tags=["nbval-ignore-output"]
from torch.utils.checkpoint import create_selective_checkpoint_contexts

DEAR = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]  # a Linear is one addmm
keeping = functools.partial(create_selective_checkpoint_contexts, DEAR)


def selective(part, x):
    return checkpoint(part, x, use_reentrant=False, context_fn=keeping)


print("selective, bitwise equal:", equal_bits(net, selective, sample, target))
forms = {"plain": blocks[:4], "selective": through(selective, blocks[:4])}
for name, form in forms.items():
    print(f"{name:20} {measure.peak_memory(lambda: step(blocks, form)) / MIB:5.2f} MiB")

# %% tags=["nbval-ignore-output"]
import torch._functorch.config as compiler

for budget in (1.0,) if SMOKE else (1.0, 0.5, 0.0):
    torch.compiler.reset()
    with compiler.patch(activation_memory_budget=budget):
        cut = torch.compile(blocks[:4], backend="aot_eager_decomp_partition")
        step(blocks, cut)  # compiles
    size = measure.peak_memory(lambda: step(blocks, cut)) / MIB
    print(f"compiler, budget {budget:3} {size:5.2f} MiB")

# %% [markdown]
# Less budget, fewer bytes, until the last row. With a budget of nothing everything is computed
# again in one go, and at one moment everything is there: *one segment* again.
#
# ### Carry instead of computing again
# Saved tensors can also be *carried away* and fetched back: `torch.autograd.graph.save_on_cpu`
# moves a GPU's activations to the CPU's memory. On a CPU the far memory is a disk. The same two
# hooks as in the first cell, and this time they do something.


# %%
class OnDisk(torch.autograd.graph.saved_tensors_hooks):
    """Saved tensors of 64 KiB or more become files until they are needed."""

    def __init__(self, folder, keep):
        own, names = {p.untyped_storage().data_ptr() for p in keep}, iter(range(10**9))

        def pack(t):
            if t.untyped_storage().data_ptr() in own or t.nbytes < 2**16:
                return t
            path = Path(folder) / f"{next(names)}.npy"
            np.save(path, t.detach().numpy())
            return path

        def unpack(packed):
            return torch.from_numpy(np.load(packed)) if isinstance(packed, Path) else packed

        super().__init__(pack, unpack)


# %% tags=["nbval-ignore-output"]
import contextlib
import tempfile

with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
    places = {
        "kept": contextlib.nullcontext,
        "on disk": lambda: OnDisk(folder, blocks.parameters()),
        "save_on_cpu, on a CPU": torch.autograd.graph.save_on_cpu,
    }
    for name, where in places.items():

        def carried():
            with where():
                loss = F.cross_entropy(blocks(x), y)
            loss.backward()

        size, took = measure.peak_memory(carried), measure.latency(carried, seconds=SECONDS / 4)
        print(f"{name:22} {size / MIB:6.2f} MiB, {measure.pretty(took.median.value)} (a look)")

# %% [markdown]
# Compare the time with that of checkpointing above: is it quicker here to fetch or to compute
# again? `save_on_cpu` finds its tensors on the CPU already and does nothing. On a GPU it pays where
# the bus is idle; pinned memory and a second stream let both run at once.
#
# ### Optimizer state in eight bits
# Dettmers et al. (2021) announce "8-bit statistics while maintaining the performance levels of
# using 32-bit optimizer states". Their key is *blocks*: each has its own scale, and a format that
# is fine for small numbers. The rival is what one would write first: 256 even steps over the whole
# tensor.


# %%
def in_blocks(t, size=256):
    """t as fp8 numbers (chapter 7) and a scale for each block, and back."""
    flat = F.pad(t.flatten(), (0, -t.numel() % size)).view(-1, size)
    scale = flat.abs().amax(1, keepdim=True).clamp(min=1e-30) / 448  # e4m3's largest number
    codes = (flat / scale).to(torch.float8_e4m3fn)
    return (codes.float() * scale).flatten()[: t.numel()].view_as(t)


def even_steps(t):
    scale = t.abs().amax().clamp(min=1e-30) / 127
    return (t / scale).round() * scale


STORE = {  # what becomes of Adam's two tables between steps; the root halves the range of squares
    "32 bits": lambda m, v: (m, v),
    "8 bits, blocks": lambda m, v: (in_blocks(m), in_blocks(v.sqrt()).square()),
    "8 bits, even steps": lambda m, v: (even_steps(m), even_steps(v)),
}


# %%
@torch.no_grad()
def adam_step(p, state, t, store, lr=1e-3):
    m, v = state
    m, v = 0.9 * m + 0.1 * p.grad, 0.999 * v + 0.001 * p.grad.square()
    p -= lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return store(m, v)


def train(how, seed, steps=30 if SMOKE else 200):
    """Test accuracy in percent of an MLP trained with this store."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    state = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()}
    for t in range(1, steps + 1):
        some = torch.randint(0, len(images), (64,))
        model.zero_grad()
        F.cross_entropy(model(images[some]), digits[some]).backward()
        for p, tables in state.items():
            state[p] = adam_step(p, tables, t, STORE[how])
    return 100 * float((model(test_images).argmax(1) == test_digits).float().mean())


# %% tags=["nbval-ignore-output"]
from course_utils import data, models

(images, digits), (test_images, test_digits) = (
    data.fashion_mnist("train"),
    data.fashion_mnist("test"),
)
images = models.normalise(images[:10000]).flatten(1)
test_images = models.normalise(test_images).flatten(1)
seeds = range(3 if SMOKE else 6)
scores = {how: [train(how, seed) for seed in seeds] for how in STORE}

# %% tags=["nbval-ignore-output"]
mean = {how: float(np.mean(found)) for how, found in scores.items()}
plots.seeds(
    scores,
    ylabel="test accuracy (%)",
    title=f"Adam's state in 8 bits: {mean['8 bits, blocks']:.1f}% with blocks,"
    f" {mean['8 bits, even steps']:.0f}% with even steps; 32 bits {mean['32 bits']:.1f}%",
    alt="Test accuracy over seeds: blocks lie with 32 bits, even steps far below.",
)
lost = np.subtract(scores["32 bits"], scores["8 bits, blocks"])
claims.verdict("08.eight_bits_learn_as_well", measure.paired_t(lost, "points"))

# %% [markdown]
# Even steps round small squares to zero, and Adam then divides by almost nothing. With blocks a
# state of 8 bytes a parameter becomes one of 2, and a scale for 256 numbers. bitsandbytes and
# torchao have it ready (`torchao.optim.AdamW8bit`); bitsandbytes can *page* the state to the CPU,
# too.
#
# ### Bytes a parameter in mixed precision
# Activations aside, a step holds for each parameter (Rajbhandari et al. 2020 count the second row):
#
# | | weights | gradients | master weights | Adam | together |
# |---|---|---|---|---|---|
# | fp32, or autocast (chapter 7; plus 16-bit copies in passing) | 4 | 4 | – | 8 | 16 |
# | 16-bit weights with fp32 masters | 2 | 2 | 4 | 8 | 16 |
# | the same, 8-bit state | 2 | 2 | 4 | 2 | 10 |
# | 16-bit weights, fp32 masters, step in backward, 8-bit state | 2 | – | 4 | 2 | 8 |
# | 16 bits only (chapter 7: updates get lost) | 2 | 2 | – | 4 | 8 |
#
# Mixed precision saves activations, not these. Chapter 9 divides them among workers.
#
# ### Memory over time, and the snapshot viewer
# The profiler's events, in order, are a picture of the step: it rises in the forward pass and falls
# in the backward one.

# %% tags=["nbval-ignore-output"]
events = {
    name: np.divide(measure.held(lambda: step(blocks, ways[name])), MIB)
    for name in ("plain", "√n segments")
}
figure, ax = plots.axes(
    "allocations and releases, as a share of the step's",
    "activations held (MiB)",
    title=", ".join(f"{name}: {held.max():.0f} MiB at the top" for name, held in events.items()),
)
for i, (name, held) in enumerate(events.items()):
    ax.plot(np.linspace(0, 1, len(held)), held, color=plots.COLOURS[i], label=name)
ax.legend()
plots.show(figure, "Bytes held over a step: plain is one high triangle, checkpointed a low comb.")

# %% [markdown]
# For a GPU, torch records each allocation with the line of code behind it. Save the record and drop
# the file on [pytorch.org/memory_viz](https://pytorch.org/memory_viz); the page reads it in your
# browser and sends nothing. Here the text view of the same tool reads a snapshot of the allocator
# on paper: letters are tensors, blanks are free pages, one bracket is a segment.


# %%
def snapshot(allocator):
    """The allocator on paper in the format of torch.cuda.memory._snapshot()."""
    found = []
    for segment in allocator.segments:
        pieces = [p for p in segment.pieces if p.mapped]
        states = ["active_allocated" if p.used else "inactive" for p in pieces]
        blocks = [
            {"size": p.size, "requested_size": p.size, "state": state, "frames": []}
            for p, state in zip(pieces, states, strict=True)
        ]
        found.append({"total_size": sum(p.size for p in pieces), "stream": 0, "blocks": blocks})
    return {"segments": found}


# %%
from torch.cuda import _memory_viz as viewer

for name, how in {"left alone": False, "expandable": True}.items():
    gpu = caching.CachingAllocator(expandable=how)
    caching.runs(gpu, [700, 900, 1100, 1300], layers=1)
    print(name, viewer.segsum(snapshot(gpu)).partition("Legend")[0], sep="\n")

# %% tags=["nbval-ignore-output"]
if machine.can("gpu"):
    torch.cuda.memory._record_memory_history()
    on_gpu = chain(1024, 4).cuda()
    on_gpu(torch.randn(4096, 1024, device="cuda")).square().mean().backward()
    torch.cuda.memory._dump_snapshot(str(FOLDER / "snapshot.pickle"))
    torch.cuda.memory._record_memory_history(enabled=None)
    print("drop", FOLDER / "snapshot.pickle", "on the page")
else:
    print(machine.skip("gpu", "a memory snapshot of a real GPU"))

# %% [markdown]
# ### Holes that nothing cures
# Now make holes: a device with `80 MiB`, sixteen tensors of `5 MiB`, every second one freed. Half
# is free, and a request for `10 MiB` fails.

# %%
for expandable in (False, True):
    gpu = caching.CachingAllocator(80 * MIB, expandable)
    tensors = [gpu.malloc(5 * MIB) for _ in range(16)]
    for tensor in tensors[::2]:
        gpu.free(tensor)
    print(f"expandable {expandable}: {gpu.allocated // MIB} of {gpu.reserved // MIB} MiB in use")
    with exercises.fails(MemoryError):
        gpu.malloc(10 * MIB)

# %% [markdown]
# Expandable segments give back whole pages of 20 MiB (PyTorch's
# [source](https://github.com/pytorch/pytorch/blob/main/c10/cuda/CUDACachingAllocator.cpp)), and no
# page here is without a tenant. They cure odd sizes, not holes between living tensors. Those you
# avoid by order: make first what lives long.
#
# ### Myth: the reentrant version and an input that needs no gradient
# The first segment of a network reads data, and data need no gradient. The older, *reentrant*
# version of torch's checkpoint is an autograd function like ours: if no input needs a gradient,
# autograd skips the node.

# %%
import warnings


def reentrant(part, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning is all you get
        return checkpoint(part, x, use_reentrant=True)


for name, wrap in {"reentrant": reentrant, "ours": Checkpoint.apply, "torch": library}.items():
    net.zero_grad(set_to_none=True)
    F.cross_entropy(net[1:](wrap(net[0], sample)), target).backward()  # sample needs no gradient
    trained = sum(p.grad is not None for p in net.parameters())
    print(f"{name:10} {trained} of {len(list(net.parameters()))} parameters have a gradient")

# %% [markdown]
# Six parameters of the first block never learn, and the loss still falls, because the others do.
# The remedy is `use_reentrant=False`. Our own function has the same hole; a `requires_grad_()` on
# the input closes it.
#
# ### Myth: measuring memory by the resident set
# The operating system knows a process's *resident set*: the pages that are in memory now. Use it to
# rank two ways whose bytes you know.

# %% tags=["nbval-ignore-output"]
import threading
import time

import psutil


def resident_growth(call):
    """The resident set's highest value during call(), less that before, in bytes."""
    me, done, seen = psutil.Process(), threading.Event(), []
    seen.append(me.memory_info().rss)

    def watch():
        while not done.is_set():
            seen.append(me.memory_info().rss)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return max(seen) - seen[0]


# %% tags=["nbval-ignore-output"]
for name in ("plain", "every block") * 3:
    resident = resident_growth(lambda: step(blocks, ways[name])) / MIB
    exact = measure.peak_memory(lambda: step(blocks, ways[name])) / MIB
    print(f"{name:20} allocation events {exact:6.1f} MiB, resident set {resident:6.1f} MiB")

# %% [markdown]
# The events give each way the same number each time. The resident set depends on what ran before:
# freed memory often stays with the process, and the next call "needs" little, or nothing. It
# answers "will this process fit?", not "which way needs more?", unless each way gets a fresh
# process.
#
# ### Modes that keep nothing, and writing in place
# Without a backward pass nothing needs to be kept. An *in-place* operation (`relu_`) writes over
# its input and saves one tensor; in training, that input may be what another layer keeps. Autograd
# counts the writes and refuses.

# %% tags=["nbval-ignore-output"]
for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
    with mode():
        forward = measure.peak_memory(lambda: blocks(x)) / MIB
        out = measure.peak_memory(lambda: torch.relu(x + 1)) / MIB
        inside = measure.peak_memory(lambda: (x + 1).relu_()) / MIB
    print(f"{mode.__name__:15} forward {forward:6.2f} MiB, relu {out:.3f}, relu_ {inside:.3f}")

# %%
z = torch.randn(4, requires_grad=True)
with exercises.fails(RuntimeError):
    e = z.exp()  # exp keeps its output: it is its own slope
    e.add_(1)  # and this writes over it
    e.sum().backward()

# %% [markdown]
# ### Where a data loader's batch lies
# A loader's worker is another process, and its batch must come over. Many write that the batch is
# then moved by `share_memory_()`. Ask a worker: is its batch shared already when *collate*, which
# stacks the samples, returns it? The program is a file, because a worker must be able to import it.

# %% tags=["nbval-ignore-output"]
# %%writefile "$FOLDER/loader.py"
import json

import torch
from torch.utils.data import DataLoader, default_collate


def collate(samples):
    batch = default_collate(samples)
    shared, address = batch.is_shared(), batch.data_ptr()
    return shared, batch.share_memory_().data_ptr() != address


if __name__ == "__main__":
    rows = list(torch.randn(8, 1000))
    found = {n: next(iter(DataLoader(rows, 4, collate_fn=collate, num_workers=n))) for n in (0, 1)}
    print(json.dumps(found))

# %% tags=["nbval-ignore-output"]
import json
import subprocess
import sys

measure.release()  # the two processes need room
ran = subprocess.run([sys.executable, FOLDER / "loader.py"], capture_output=True, text=True)
for workers, (shared, moved) in json.loads(ran.stdout.splitlines()[-1]).items():
    print(f"{workers} workers: shared when collate returns {shared}, share_memory_ moves {moved}")

# %% [markdown]
# In a worker, collate *allocates* the batch in shared memory and stacks the samples into it: no
# copy is left to make. In the process itself there is nobody to share with, and `share_memory_()`
# must move the batch. Data that are made where they are needed travel for free; chapter 13 measures
# it.
#
# ### On an NVIDIA GPU: the dry run against the device
# `foreach` is the default there. The library for matrix products takes a workspace of its own,
# which no dry run knows, and dropout's mask is one byte a number in place of four.


# %% tags=["nbval-ignore-output"]
def on_the_gpu(rows, width=1024):
    """MiB at the peak of a step of eight blocks: predicted, and counted by the GPU's allocator."""
    make = functools.partial(chain, width, 8, 0.0)
    inputs = torch.zeros(rows, width, device="cuda")
    labels = torch.zeros(rows, dtype=torch.long, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    two_steps(lambda: make().cuda(), inputs, labels, "foreach")()
    counted = torch.cuda.max_memory_allocated() - before
    due = sum(predicted(dry_run(make, (rows, width)), "foreach").values())
    return due / MIB, counted / MIB


if machine.can("gpu"):
    for rows in (512, 8192):
        print(f"{rows} rows: predicted {{:.0f}} MiB, counted {{:.0f}}".format(*on_the_gpu(rows)))
else:
    print(machine.skip("gpu", "the dry run against a GPU's allocator"))

# %% [markdown]
# And the allocator on paper against the real one, on the same batches:


# %% tags=["nbval-ignore-output"]
class Real:
    """A device's own allocator behind the names of the one on paper."""

    def __init__(self, device):
        self.device = device

    def malloc(self, size):
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def free(self, tensor):
        tensor.untyped_storage().resize_(0)


if machine.can("gpu"):
    paper = caching.CachingAllocator()
    caching.runs(paper, batches)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    caching.runs(Real("cuda"), batches)
    real = (torch.cuda.max_memory_reserved() - before) / MIB
    print(f"reserved at most: {paper.peak_reserved / MIB:.0f} MiB on paper, {real:.0f} MiB here")
else:
    print(machine.skip("gpu", "the real caching allocator"))
