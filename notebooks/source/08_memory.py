# %% [markdown]
# # 08 · Memory
#
# **Where do the bytes of a training step go, and which of them can you trade for time?**
#
# After this chapter you can: *predict* the peak memory of a training step from the architecture ·
# *write* activation checkpointing whose gradients equal the plain ones bit for bit · *choose* the
# segment length that memory and time allow · *explain* what an allocator's cache is and what
# emptying it does · *share* memory between processes and clean up after a killed one.
#
# 185 minutes · before this: 1 Measurement; 5 and 7 help · runs on any CPU

# %% tags=["parameters"]
import os

PROFILE = os.environ.get("COURSE_PROFILE", "fast")

# %% tags=["nbval-ignore-output"]
import copy
import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from course_utils import claims, exercises, machine, measure, models, plots, scratch

SMOKE, FULL = PROFILE == "smoke", PROFILE == "full"
SECONDS = {"smoke": 0.1, "fast": 3.0, "full": 12.0}[PROFILE]  # for one comparison
ROWS = {"smoke": 32, "fast": 256, "full": 1024}[PROFILE]  # rows (tokens) in a batch
DEPTH = 4 if SMOKE else 16  # blocks of the chain
MIB = 2**20  # bytes
machine.card()

# %% [markdown]
# ## Recall
# 1. (Chapter 1) Model A was measured first, model B after it, in one process. What is wrong with "B
#    needs less memory"?
#    <details><summary>Answer</summary>The order. What A left behind (warm kernels, memory that was
#    never handed back) stands in B's bill or is missing from it. Interleave, or give each a process
#    of its own.</details>
# 2. (Chapter 5) A tensor of a million numbers: how many bytes in fp32, and how many in INT8?
#    <details><summary>Answer</summary>Four million and one million, plus a scale and a
#    zero-point.</details>
# 3. (Chapter 7) Under autocast the saved activations should halve. When do they not?
#    <details><summary>Answer</summary>When the 16-bit copies of the weights, which autocast keeps
#    beside the fp32 ones, weigh as much as what was saved; and where layers such as normalisation
#    stay in fp32.</details>
#
# ## Predict
# Below stands a chain of `16` blocks, each two linear layers from 128 numbers to 512 and back. You
# train it with Adam on a batch of `256` rows. What share of the step's peak memory do the
# *parameters* take, in percent? Then: you stop storing what the blocks computed, and compute it a
# second time when the backward pass needs it. By how many percent does a step get longer?

# %%
my_share = ...  # percent
my_slowdown = ...  # percent
exercises.predict("08.parameters", my_share)
exercises.predict("08.slowdown", my_slowdown)

# %% [markdown]
# ## From scratch: what a backward pass keeps
# Take $y = x^2$. Its slope is $2x$, so the backward pass needs $x$ again. Autograd therefore
# *saves* $x$ during the forward pass. You can watch it: a *saved-tensor hook* sees each tensor on
# its way into the graph.


# %%
def saved_tensors(call):
    """Every distinct tensor that autograd keeps during call(), as {address: bytes}; parameters are
    left out.
    """
    kept = {}

    def pack(t):
        if not isinstance(t, nn.Parameter) and not isinstance(t._base, nn.Parameter):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()  # the graph must live while we count, or an address is used twice
    del result
    return kept


x = torch.randn(1000, requires_grad=True)  # 4,000 bytes
for name, call in {
    "x + 1": lambda: x + 1,
    "x * x": lambda: x * x,
    "relu(x)": lambda: torch.relu(x),
    "gelu(x)": lambda: F.gelu(x),
    "relu(x) * 3": lambda: torch.relu(x) * 3,
}.items():
    print(f"{name:12} keeps {sum(saved_tensors(call).values()):5} bytes")

# %% [markdown]
# An addition has slope 1 everywhere and keeps nothing. ReLU keeps its *output* (where it is
# positive, the slope is 1), GELU its *input*. In a network, one layer's output is the next one's
# input: what two layers need is stored once. So the bytes follow from a short table of rules.


# %%
KEEPS = {  # what the backward pass of a layer needs, parameters aside
    nn.Linear: "input",
    nn.Conv2d: "input",
    nn.LayerNorm: "input",
    nn.BatchNorm2d: "input",
    nn.GELU: "input",
    nn.ReLU: "output",
    nn.Dropout: "mask",  # on a CPU a tensor like the output
}


def activation_bytes(model, x):
    """Bytes that backward needs after model(x), and the largest single activation. Nothing is
    computed.
    """
    kept, largest = {}, [0]

    def hook(layer, inputs, output):
        rule = KEEPS[type(layer)]
        tensor = {"input": inputs[0], "output": output}.get(rule, torch.empty_like(output))
        kept[id(tensor)] = tensor  # the same tensor under two rules is stored once
        largest[0] = max(largest[0], output.nbytes)

    twin = copy.deepcopy(model).to("meta")  # meta tensors have a shape and no bytes
    for layer in twin.modules():
        if type(layer) in KEEPS:
            layer.register_forward_hook(hook)
    logits = twin(x.to("meta"))
    kept[id(logits)] = logits  # the loss keeps log-probabilities of this shape
    return sum(t.nbytes for t in kept.values()), largest[0]


# %% [markdown]
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


rows = torch.zeros(8, 32)
one_block, _ = activation_bytes(chain(32, 1), rows)
print(
    f"one block keeps {(one_block - rows.nbytes) / rows.nbytes:.0f} times its input"
)  # without the logits

# %% [markdown]
# Fourteen times: the input (the norm needs it) and the norm's output, one each; and three tensors
# of fourfold width, GELU's input, the dropout's mask and what `down` reads, twelve. With many rows,
# that outgrows the weights by far.
#
# Now the whole step. Call the bytes of the parameters $P$. Adam keeps two numbers a parameter,
# $2P$. The gradients are another $P$, but they are made during the backward pass, while the
# activations $A$ are freed. So the peak is the larger of two moments:
#
# $$\text{peak} = 3P + \max(\underbrace{A + 2a}_{\text{backward begins}},\;
# \underbrace{P + 2w}_{\text{the optimizer works}})$$
#
# where $a$ is the largest single activation (a gradient of that size arrives, another leaves) and
# $w$ the largest parameter (Adam works on one parameter at a time and needs two temporary copies).


# %%
def predicted_parts(model, x):
    """Bytes at the peak of an Adam step in fp32, from the architecture alone."""
    sizes = [p.nbytes for p in model.parameters()]
    kept, largest = activation_bytes(model, x)
    kept -= x.nbytes  # the batch was there before the step
    if kept + 2 * largest >= sum(sizes) + 2 * max(sizes):
        moment = {"activations": kept, "gradients": 0, "temporary": 2 * largest}
    else:
        moment = {"activations": 0, "gradients": sum(sizes), "temporary": 2 * max(sizes)}
    return {"parameters": sum(sizes), "Adam": 2 * sum(sizes)} | moment


def training_steps(make, x, y):
    """A callable that makes the model and its optimizer and takes two steps: the second one is
    complete.
    """

    def run():
        model = make()
        optimizer = torch.optim.Adam(model.parameters(), foreach=False)
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return model, optimizer

    return run


# %% [markdown]
# ## Measure: is the prediction right?
# `measure.peak_memory` reads the profiler's record of allocations: each event says how many bytes
# torch took or gave back. Everything is made inside the measured call, so the parameters count too.


# %% tags=["nbval-ignore-output"]
def mlp():
    return nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def cases():
    big = 256 if SMOKE else 2048
    yield f"MLP, {big // 16} images", mlp, torch.randn(big // 16, 784)
    yield f"MLP, {big} images", mlp, torch.randn(big, 784)
    for batch in (32, 64) if SMOKE else (64, 256):
        small = functools.partial(models.mini_resnet, 32, seed=0)
        yield f"mini-ResNet, {batch} images", small, torch.randn(batch, 1, 28, 28)
    for count in (ROWS // 8, ROWS):
        yield f"chain, {count} rows", functools.partial(chain, 128, DEPTH), torch.randn(count, 128)


parts, measured = {}, {}
for name, make, x in cases():
    y = torch.randint(0, 10, (len(x),))
    parts[name] = predicted_parts(make(), x)
    measured[name] = measure.peak_memory(training_steps(make, x, y))
error = {name: sum(parts[name].values()) / measured[name] - 1 for name in parts}
worst = max(error, key=lambda name: abs(error[name]))
print({name: f"{e:+.1%}" for name, e in error.items()})

# %% tags=["nbval-ignore-output"]
figure, ax = plots.axes(
    "MiB at the peak of a training step",
    "",
    title=f"Predicted from the architecture, off by {abs(error[worst]):.1%} at worst",
    height=3.8,
)
left = np.zeros(len(parts))
for i, part in enumerate(next(iter(parts.values()))):
    widths = np.array([p[part] / MIB for p in parts.values()])
    ax.barh(list(parts), widths, left=left, color=plots.COLOURS[i], label=part, height=0.6)
    left += widths
ax.plot(
    [m / MIB for m in measured.values()],
    list(parts),
    "D",
    color="black",
    label="measured",
    zorder=3,
)
ax.invert_yaxis()
ax.grid(visible=False, axis="y")
figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
plots.show(
    figure,
    "Stacked bars of predicted bytes for six training steps; the measured peak, a diamond, ends"
    " near each bar.",
)
last = parts[f"chain, {ROWS} rows"]
exercises.reveal("08.parameters", 100 * last["parameters"] / sum(last.values()), "%")
claims.verdict("08.predictable_from_the_architecture", 100 * abs(error[worst]))

# %% [markdown]
# Each bar should end at its diamond. Compare the two rows of one network: the parameters' part
# stays, the activations grow with the batch. With a small batch the optimizer's moment is the peak,
# and there you save by another optimizer or fewer parameters. With a large one the activations are
# the peak, and the rest of this chapter is for you.
#
# ## Measure: modes that keep nothing
# Without a backward pass, nothing needs to be kept.

# %% tags=["nbval-ignore-output"]
blocks = chain(128, DEPTH)
x, y = torch.randn(ROWS, 128, requires_grad=True), torch.randint(0, 128, (ROWS,))
modes = {"with gradients": torch.enable_grad, "no_grad": torch.no_grad}
modes["inference_mode"] = torch.inference_mode
held = {}
for name, mode in modes.items():
    with mode():
        held[name] = measure.peak_memory(lambda: blocks(x)) / MIB
        out_of_place = measure.peak_memory(lambda: torch.relu(x + 1)) / MIB
        in_place = measure.peak_memory(lambda: (x + 1).relu_()) / MIB
    print(f"{name:15} forward {held[name]:6.2f} MiB, relu {out_of_place:.3f}, relu_ {in_place:.3f}")

z = torch.randn(4, requires_grad=True)
with exercises.fails(RuntimeError):
    e = z.exp()  # exp keeps its output: it is its own slope
    e.add_(1)  # and this writes over it
    e.sum().backward()

# %% [markdown]
# `no_grad` and `inference_mode` need the same bytes: both keep nothing. `inference_mode` also skips
# the bookkeeping of versions and views, which saves time on small tensors, and its tensors may
# never enter a graph later. An *in-place* operation (`relu_`, with the underscore) writes over its
# input and saves one tensor. In training, that input may be what another layer keeps. Autograd
# counts the writes and refuses: that is the error above.
#
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
def gradients(model, forward, x, y):
    """The gradients of one step, from a fixed random state."""
    torch.manual_seed(1)
    model.zero_grad()
    x = x.detach().requires_grad_()
    F.cross_entropy(forward(x), y).backward()
    return [p.grad for p in model.parameters()] + [x.grad]


def through(wrap, parts):
    """A forward pass that sends each part through wrap(part, x)."""

    def forward(x):
        for part in parts:
            x = wrap(part, x)
        return x

    return forward


def equal_bits(model, wrap, x, y):
    plain = gradients(model, model, x, y)
    ours = gradients(model, through(wrap, model), x, y)
    return all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


sample, target = torch.randn(32, 64), torch.randint(0, 64, (32,))
for p in (0.0, 0.1):
    print(
        f"dropout {p}: bitwise equal"
        f" {equal_bits(chain(64, 4, p), FirstCheckpoint.apply, sample, target)}"
    )

# %% [markdown]
# With dropout the gradients are wrong, and nothing complained. The second run drew *another* mask:
# the forward pass saw one network, the backward pass a different one. So the state of the random
# generator belongs to what must be kept. Before the second run, set it back; after it, put the
# present state in place again, or every later random number of your program changes.


# %%
def random_state():
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if machine.can("gpu") else []


def set_random_state(state):
    torch.set_rng_state(state[0])
    torch.cuda.set_rng_state_all(state[1])  # for no GPU, an empty list


class Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, x):
        ctx.function, ctx.state = function, random_state()
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        now = random_state()
        set_random_state(ctx.state)  # the same mask as in the first run
        with torch.enable_grad():
            y = ctx.function(x)
        set_random_state(now)
        torch.autograd.backward(y, gradient)
        return None, x.grad


for p in (0.0, 0.1, 0.5):
    print(
        f"dropout {p}: bitwise equal"
        f" {equal_bits(chain(64, 4, p), Checkpoint.apply, sample, target)}"
    )

# %% [markdown]
# ## The tool of the field: torch.utils.checkpoint
# `use_reentrant=False` is the version to use today: it hooks into the saving of tensors, so it also
# works under `torch.autograd.grad`, with inputs that need no gradient, and it stops recomputing as
# soon as it has what it needs. Yours and torch's must agree with the plain step bit for bit, and
# leave the random generator in the same state.
#
# *Selective* checkpointing keeps the results of some operations and recomputes the rest. The usual
# choice: keep what matrix products gave, because they are dear to compute, and recompute the norm,
# GELU and dropout.

# %%
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

library = functools.partial(checkpoint, use_reentrant=False)


def torch_checkpoint(part, x):
    return library(part, x)


net = chain(64, 4)
after = {}
for name, wrap in {"plain": None, "ours": Checkpoint.apply, "torch": torch_checkpoint}.items():
    gradients(net, through(wrap, net) if wrap else net, sample, target)
    after[name] = torch.rand(1).item()
print("torch bitwise equal:", equal_bits(net, torch_checkpoint, sample, target))
print("the next random number is the same:", len(set(after.values())) == 1)

DEAR = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]  # a Linear is one addmm
selective = functools.partial(
    checkpoint,
    use_reentrant=False,
    context_fn=functools.partial(create_selective_checkpoint_contexts, DEAR),
)
print(
    "selective bitwise equal:", equal_bits(net, lambda part, x: selective(part, x), sample, target)
)

# %% [markdown]
# ## Measure: memory against time
# Checkpointing can take several blocks at once: a *segment*. Chen et al. (2016) cut $n$ layers into
# about $\sqrt n$ segments. Here $n = 16$, so there are segments of 4 blocks. All modes compute the
# same gradients; they differ in bytes and seconds.


# %% tags=["nbval-ignore-output"]
def segments(model, length):
    return [model[i : i + length] for i in range(0, len(model), length)]


ways = {
    "plain": blocks,
    "every block, ours": through(Checkpoint.apply, blocks),
    "every block, torch": through(torch_checkpoint, blocks),
    "√n segments, ours": through(Checkpoint.apply, segments(blocks, math.isqrt(DEPTH))),
    "√n segments, torch": through(torch_checkpoint, segments(blocks, math.isqrt(DEPTH))),
    "selective": through(selective, blocks),
    "one segment": through(torch_checkpoint, segments(blocks, DEPTH)),
}


def step(forward):
    for p in [x, *blocks.parameters()]:
        if p.grad is None:  # in a fresh process: gradients do not travel with their tensors
            p.grad = torch.zeros_like(p)
        p.grad.zero_()  # its memory was there before: only activations are counted
    F.cross_entropy(forward(x), y).backward()


step(blocks)
peak = {name: measure.peak_memory(lambda: step(way)) / MIB for name, way in ways.items()}

# %% tags=["nbval-ignore-output"]
from tqdm.auto import tqdm

longer = {}
for name in tqdm(list(ways)[1 : 4 if SMOKE else None], desc="comparing", leave=False):
    verdict_on_it = name == "√n segments, ours"  # the others are a look within this process
    look = measure.across if verdict_on_it else measure.compare
    against = look(lambda: step(ways[name]), lambda: step(blocks), seconds=SECONDS)
    longer[name] = measure.derive(lambda s: 100 * (s - 1), against.interval, unit="% more time")

# %% tags=["nbval-ignore-output"]
figure, ax = plots.axes(
    "more time than the plain step (%)",
    "peak of activations (MiB)",
    title=(
        f"√n segments: {peak['plain'] / peak['√n segments, ours']:.1f}x less memory "
        f"for {longer['√n segments, ours'].value:.0f}% more time"
    ),
    height=4.0,
)
for i, name in enumerate(ways):
    t = longer.get(name, measure.Interval(0, 0, 0))
    ends = [[max(t.value - t.low, 0)], [max(t.high - t.value, 0)]]
    style = {"color": plots.COLOURS[i], "marker": plots.MARKERS[i], "label": name}
    ax.errorbar([t.value], [peak[name]], xerr=ends, linestyle="", capsize=3, **style)
ax.set_ylim(0)
ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
plots.show(
    figure,
    "Peak memory against extra time for seven ways: plain at top left, checkpointing low and to the"
    " right.",
)
exercises.reveal("08.slowdown", longer["every block, ours"].value, "%")
claims.verdict("08.a_third_more_time", longer["√n segments, ours"])

# %% [markdown]
# Down is less memory, right is more time. *One segment* lies as high as *plain*, but far to the
# right: it computes everything twice and at one moment still holds everything. *Selective* lies
# between in height; how far to the right depends on what your machine finds dear. And look at the
# two lowest: checkpointing every block needs *less* than the celebrated $\sqrt n$. Two questions
# are open: why this time, and why this memory?
#
# ## Explain: where the third comes from, and where it goes
# A backward pass has two matrix products for each one of the forward pass: one gives the gradient
# of the input, one that of the weight. So the plain step costs $1 + 2 = 3$, a second forward pass
# makes it 4, and $4/3$ is a third more. Count it.

# %% tags=["nbval-ignore-output"]
from torch.utils.flop_counter import FlopCounterMode


def operations(forward):
    with FlopCounterMode(display=False) as counter:
        step(forward)
    return counter.get_total_flops()


for name, way in ways.items():
    print(f"{name:20} {operations(way) / operations(blocks):.3f} times the plain step's operations")

# %% [markdown]
# Ours costs exactly 4/3 in matrix products. Torch's costs less: it stops once every tensor that
# backward needs is there, and the last product of a segment is needed by nobody. *Selective*
# repeats no product at all. So if time were matrix products, you could stop here. Time is not: GELU
# and above all dropout's random numbers are counted as nothing and take their share. The right rule
# is: **the extra time is the forward pass's share of the step.** Measure that share, with and
# without dropout.


# %% tags=["nbval-ignore-output"]
def forward_only():
    with torch.no_grad():
        return blocks(x)


share = measure.across(
    lambda: step(blocks), forward_only, seconds=SECONDS, processes=6, across_modes=True
)
for block in blocks:
    block.drop.p = 0.0
quiet = measure.across(
    lambda: step(ways["√n segments, ours"]),
    lambda: step(blocks),
    seconds=SECONDS / 2,
    processes=6,
)
for block in blocks:
    block.drop.p = 0.1
expected = measure.derive(lambda s: 100 / s, share.interval)
plots.bars(
    {
        "matrix products alone": 100 / 3,
        "forward's share of the step": expected,
        "measured, √n segments": longer["√n segments, ours"],
        "the same without dropout": measure.derive(lambda s: 100 * (s - 1), quiet.interval),
    },
    xlabel="more time than the plain step (%)",
    title=f"The forward pass is {expected.value:.0f}% of the plain step",
    alt=(
        "Four bars: a third from counting, the forward's share, the measured extra time, and that"
        " without dropout."
    ),
)

# %% [markdown]
# The second bar is what a second forward pass should cost; the third is what it cost. They should
# be near each other. The first bar is the famous third: it stands for a network in which matrix
# products are everything. The last bar leaves the dropout out and with it the random numbers; it
# should come nearer to the first.
#
# ## Explain: when is √n the right length?
# Let a block keep $A$ bytes and take in $b$ bytes. With segments of $s$ blocks you hold the input
# of each segment, and during the backward pass one segment's inside: $M(s) = \frac{n}{s}\, b + s
# A$. Its smallest value is at $s^* = \sqrt{n\, b / A}$. For $A = b$ that is $\sqrt n$: the rule is
# about layers whose inside is no larger than their border. Here $A = 14\,b$.

# %% tags=["nbval-ignore-output"]
WIDTH, DEEPEST = 64, 36


def activation_peak(model, wrap, length):
    rows = torch.zeros(ROWS, WIDTH, requires_grad=True)
    labels = torch.zeros(ROWS, dtype=torch.long)
    for p in [rows, *model.parameters()]:
        p.grad = torch.zeros_like(p)
    forward = through(wrap, segments(model, length)) if wrap else model
    return measure.peak_memory(lambda: F.cross_entropy(forward(rows), labels).backward())


border = ROWS * WIDTH * 4  # b, in bytes
inside = activation_bytes(chain(WIDTH, 1), torch.zeros(ROWS, WIDTH))[0] - border  # A
deep = chain(WIDTH, DEEPEST)
lengths = [1, 2, 3, 4, 6, 9, 12, 18, 36]
curve = {
    "predicted": [(DEEPEST / s * border + s * inside) / MIB for s in lengths],
    "measured": [activation_peak(deep, Checkpoint.apply, s) / MIB for s in lengths],
}
shortest = lengths[int(np.argmin(curve["measured"]))]
plots.lines(
    lengths,
    curve,
    xlabel="blocks a segment",
    ylabel="peak of activations (MiB)",
    logx=True,
    logy=True,
    title=f"Of {DEEPEST} blocks, {shortest} a segment need least; √n would say 6",
    alt=(
        "Peak memory against segment length: lowest at short segments, rising to the right,"
        " prediction beside it."
    ),
)

# %% [markdown]
# The two lines run together. The bottom of the valley lies near $s^* = \sqrt{36/14} \approx 1.6$,
# far left of $\sqrt{36} = 6$. Cut at the narrow places, and often. Does the memory of the $\sqrt n$
# rule still *grow* like $\sqrt n$, as promised?

# %% tags=["nbval-ignore-output"]
depths = [4, 9, 16, 25, 36]
growth = {"plain": [], "√n segments": [], "every block": []}
for n in depths:
    model = chain(WIDTH, n)
    growth["plain"].append(activation_peak(model, None, 1) / MIB)
    growth["√n segments"].append(activation_peak(model, Checkpoint.apply, math.isqrt(n)) / MIB)
    growth["every block"].append(activation_peak(model, Checkpoint.apply, 1) / MIB)
slope = {k: float(np.polyfit(np.log(depths), np.log(v), 1)[0]) for k, v in growth.items()}
plots.lines(
    depths,
    growth,
    xlabel="blocks",
    ylabel="peak of activations (MiB)",
    logx=True,
    logy=True,
    title=(
        f"Plain memory grows like n^{slope['plain']:.2f}, with √n segments like"
        f" n^{slope['√n segments']:.2f}"
    ),
    alt=(
        "Peak memory against depth on two logarithmic axes: plain is steepest, √n segments half as"
        " steep."
    ),
)
claims.verdict("08.square_root_memory", slope["√n segments"])

# %% [markdown]
# Both axes are logarithmic, so a straight line is a power and its slope the exponent. The claim is
# about the *growth*. At depths that you meet, *every block* lies below *√n segments*; its line
# bends upwards, and the two cross only at about $14^2$ blocks, where $n\,b + A$ has grown to $\sqrt
# n\,(b + A)$.
#
# ## From scratch: gradient accumulation
# Another way to hold fewer activations: send the batch in pieces, let the gradients add up, and
# update once. The loss is a mean, so each piece must be weighted by its rows. Numbers of 64 bits
# show whether it is *equal* and not only close.


# %%
def accumulated(model, x, y, size):
    """Gradients of the whole batch's mean loss, computed `size` rows at a time."""
    model.zero_grad()
    for part, labels in zip(x.split(size), y.split(size), strict=True):
        loss = F.cross_entropy(model(part), labels, reduction="sum") / len(x)
        loss.backward()  # adds to what is in .grad
    return [p.grad for p in model.parameters()]


def apart(a, b):
    return max(float((i - j).abs().max()) for i, j in zip(a, b, strict=True))


exact = chain(64, 4, p=0.0).double()
batch, classes = torch.randn(100, 64, dtype=torch.float64), torch.randint(0, 64, (100,))
whole = accumulated(exact, batch, classes, 100)
for size in (50, 32, 1):
    same = apart(whole, accumulated(exact, batch, classes, size)) < 1e-14
    print(f"{size:3} rows at a time: equal to the big batch within 1e-14: {same}")

# %% tags=["nbval-ignore-output"]
sizes = [s for s in (256, 128, 64, 32, 16) if s <= ROWS]
bytes_needed = []
for size in sizes:
    blocks.zero_grad()  # no gradient exists before: it counts
    bytes_needed.append(measure.peak_memory(lambda: accumulated(blocks, x, y, size)) / MIB)
plots.lines(
    sizes,
    {"peak of one accumulated step": bytes_needed},
    xlabel="rows a piece",
    ylabel="MiB",
    logx=True,
    title=(
        f"Pieces of {sizes[-1]} rows need {bytes_needed[0] / bytes_needed[-1]:.1f} times fewer"
        f" bytes than {sizes[0]}"
    ),
    alt=(
        "Peak memory against the rows of a piece: it falls with smaller pieces down to the"
        " gradients' own bytes."
    ),
)

# %% [markdown]
# The line falls with the pieces until the gradients themselves, which no splitting makes smaller,
# are most of what is left. Checkpointing computes more; accumulation computes the same, in smaller
# and less efficient products.
#
# ## Myth: dividing the loss by the number of pieces
# The usual recipe is `loss = criterion(model(part), labels) / pieces`. Take 100 rows, 32 at a time.
# And take a network with BatchNorm, whose statistics come from the rows it sees together.


# %%
def circulating(model, x, y, size):
    model.zero_grad()
    pieces = list(zip(x.split(size), y.split(size), strict=True))
    for part, labels in pieces:
        (F.cross_entropy(model(part), labels) / len(pieces)).backward()
    return [p.grad for p in model.parameters()]


print("even pieces, equal:", apart(whole, circulating(exact, batch, classes, 25)) < 1e-14)
print("100 rows by 32, equal:", apart(whole, circulating(exact, batch, classes, 32)) < 1e-14)
with_bn = models.mini_resnet(8, seed=0).double()
pictures, digits = torch.randn(64, 1, 28, 28, dtype=torch.float64), torch.randint(0, 10, (64,))
big_batch = accumulated(with_bn, pictures, digits, 64)
small_ones = accumulated(with_bn, pictures, digits, 16)
print("with BatchNorm, equal:", apart(big_batch, small_ones) < 1e-6)

# %% [markdown]
# The last piece of 100 has 4 rows, and the recipe gives it the weight of a piece of 32. With
# BatchNorm no weighting helps: a piece is normalised by its own mean. "Equal to the big batch"
# holds for layers that treat each row alone.
#
# ## Myth: the reentrant version and an input that needs no gradient
# The first segment of a network reads data, and data need no gradient. The older, *reentrant*
# version of torch's checkpoint is an autograd function like ours: if no input needs a gradient,
# autograd skips the node. Newer torch asks you to say which version you mean; code that still says
# `True`, or was written when that was the default, does this:

# %%
import warnings

reentrant = functools.partial(checkpoint, use_reentrant=True)
parts_of = list(net)
for name, wrap in {
    "reentrant": reentrant,
    "ours": Checkpoint.apply,
    "non-reentrant": library,
}.items():
    net.zero_grad(set_to_none=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning is all you get
        hidden = wrap(parts_of[0], sample)  # sample needs no gradient
        F.cross_entropy(net[1:](hidden), target).backward()
    trained = sum(p.grad is not None for p in net.parameters())
    print(f"{name:13}: {trained} of {len(list(net.parameters()))} parameters have a gradient")

# %% [markdown]
# Six parameters of the first block never learn, and the loss still falls, because the others do.
# The remedy is `use_reentrant=False`. Our own function has the same hole; a `requires_grad_()` on
# the input closes it.
#
# ## Myth: measuring memory by the resident set
# The operating system knows a process's *resident set*: the pages that are in memory now. It is in
# every task manager. Use it to rank two ways whose bytes you know. A thread reads it every
# millisecond while the step runs.

# %% tags=["nbval-ignore-output"]
import threading
import time

import psutil


def resident_growth(call):
    """The resident set's highest value during call(), less that before, in bytes."""
    me, done = psutil.Process(), threading.Event()
    before = highest = me.memory_info().rss

    def watch():
        nonlocal highest
        while not done.is_set():
            highest = max(highest, me.memory_info().rss)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return highest - before


print(f"{'':22} {'allocation events':>18} {'resident set':>13}")
for name in ("plain", "every block, ours") * 3:
    seen = resident_growth(lambda: step(ways[name])) / MIB
    exactly = measure.peak_memory(lambda: step(ways[name])) / MIB
    print(f"{name:22} {exactly:14.1f} MiB {seen:9.1f} MiB")
if not machine.can("gpu"):
    print("CUDA says: allocated", torch.cuda.memory_allocated())
    with exercises.fails(RuntimeError):
        torch.cuda.reset_peak_memory_stats()

# %% [markdown]
# Read down the columns. The left one gives each way the same number each time. The right one
# depends on what ran before: freed memory often stays with the process, so the next call finds it
# there and "needs" little, or nothing. A resident set answers "will this process fit?"; it does not
# answer "which way needs more?", unless each way gets a fresh process.
#
# And the numbers that CUDA reports on a machine without CUDA? Some calls answer 0, which means that
# nobody counted; others raise an error. The last lines show both where there is no GPU.
#
# ## From scratch: an allocator with a cache
# Asking a GPU for memory is slow, and giving it back waits for the device. So PyTorch keeps what
# you free. Here is its allocator on paper, with PyTorch's own sizes: memory comes from the device
# in *segments*; *blocks* are cut from segments; a freed block merges with its free neighbours and
# waits. (PyTorch's words again: these are pieces of memory, and have nothing to do with the blocks
# of the network and the segments of checkpointing. The code says `Piece`.)

# %%
from dataclasses import dataclass


@dataclass(eq=False)  # two blocks of one size are two blocks
class Piece:
    size: int
    small: bool
    used: bool = False


class Segments:
    """What an allocator holds: lists of pieces. A freed piece merges with its free neighbours and
    stays.
    """

    def __init__(self, capacity):
        self.capacity, self.segments, self.device_calls = capacity, [], 0

    reserved = property(lambda self: sum(p.size for s in self.segments for p in s))
    allocated = property(lambda self: sum(p.size for s in self.segments for p in s if p.used))

    def home(self, piece):
        return next(s for s in self.segments if piece in s)

    def free(self, piece):
        piece.used, segment, merged = False, self.home(piece), []
        for p in segment:
            if merged and not merged[-1].used and not p.used:
                merged[-1].size += p.size
            else:
                merged.append(p)
        segment[:] = merged

    def empty_cache(self):
        """Give back the segments in which nothing is used. A segment with one used piece stays
        whole.
        """
        kept = [s for s in self.segments if any(p.used for p in s)]
        self.device_calls += len(self.segments) - len(kept)
        self.segments = kept


# %%
def segment_size(size):
    """What is asked of the device for a request: PyTorch's rule for CUDA."""
    if size <= MIB:
        return 2 * MIB  # small requests share segments of this size
    if size < 10 * MIB:
        return 20 * MIB  # so do these
    return -(-size // (2 * MIB)) * 2 * MIB  # large ones get their own, rounded up


class CachingAllocator(Segments):
    def malloc(self, size):
        size = max(512, -(-size // 512) * 512)
        small = size <= MIB
        free = [p for s in self.segments for p in s if not p.used and p.small == small]
        fits = [p for p in free if p.size >= size]
        piece = min(fits, key=lambda p: p.size) if fits else self.new_segment(size, small)
        rest = piece.size - size
        if rest >= 512 if small else rest > MIB:  # cut off what is left over
            piece.size = size
            segment = self.home(piece)
            segment.insert(segment.index(piece) + 1, Piece(rest, small))
        piece.used = True
        return piece

    def new_segment(self, size, small):
        wanted = segment_size(size)
        if self.reserved + wanted > self.capacity:
            self.empty_cache()  # the allocator does this itself before it gives up
        if self.reserved + wanted > self.capacity:
            free = (self.capacity - self.allocated) // MIB
            raise MemoryError(f"{wanted // MIB} MiB wanted; {free} MiB free, not in one piece")
        self.device_calls += 1
        self.segments.append([Piece(wanted, small)])
        return self.segments[-1][0]


# %% [markdown]
# Now make holes. A device with `80 MiB`, sixteen tensors of `5 MiB`, and every second one freed.


# %%
def with_holes():
    device = CachingAllocator(80 * MIB)
    tensors = [device.malloc(5 * MIB) for _ in range(16)]
    for tensor in tensors[::2]:
        device.free(tensor)
    return device, tensors[1::2]


device, living = with_holes()
print("allocated", device.allocated // MIB, "MiB, reserved", device.reserved // MIB, "MiB")
with exercises.fails(MemoryError):
    device.malloc(10 * MIB)
device.empty_cache()
print("after empty_cache: reserved", device.reserved // MIB, "MiB")


# %% tags=["nbval-ignore-output"]
def draw(allocators, title, alt):
    figure, ax = plots.axes("MiB", "", title=title, height=1.0 + 0.75 * len(allocators))
    for row, allocator in enumerate(allocators.values()):
        start = 0
        for segment in allocator.segments:
            for p in segment:
                style = {"facecolor": plots.COLOURS[0] if p.used else "0.88", "edgecolor": "white"}
                ax.barh(row, p.size / MIB, left=start / MIB, height=0.55, linewidth=1.2, **style)
                start += p.size
            ax.vlines(start / MIB, row - 0.36, row + 0.36, color="black", linewidth=1.5)
    ax.set_yticks(range(len(allocators)), list(allocators))
    ax.invert_yaxis()
    ax.grid(visible=False)
    plots.show(figure, alt)


better = CachingAllocator(80 * MIB)
stays = [better.malloc(5 * MIB) for _ in range(8)]  # what lives long comes first
for tensor in [better.malloc(5 * MIB) for _ in range(8)]:
    better.free(tensor)
better.empty_cache()
draw(
    {"every second one freed": device, "long-lived first": better},
    f"Of {device.capacity // MIB} MiB, {device.reserved // MIB} or {better.reserved // MIB} stay"
    f" reserved for the same {better.allocated // MIB}",
    "Memory maps: in the first, used and free blocks alternate in all segments; in the second the"
    " used ones lie together.",
)

# %% [markdown]
# Blue is in use, grey is free, a black line ends a segment. In the first map half of the memory is
# free and no request for `10 MiB` can be served: this is *fragmentation*. `empty_cache` finds no
# segment without a tenant. In the second map the same tensors were made in another order, and half
# of the segments went back to the device. The setting `PYTORCH_ALLOC_CONF=expandable_segments:True`
# (in older versions `PYTORCH_CUDA_ALLOC_CONF`) attacks the same problem with segments that can
# grow.
#
# ## Myth: empty_cache frees memory for your model
# Three questions about one training step: how large a tensor can *you* still get, what can *another
# process* get, and how often was the slow device asked?


# %% tags=["nbval-ignore-output"]
def largest_request(allocator):
    """The largest tensor (whole MiB) that this process can still get."""
    sizes = range(allocator.capacity // MIB, 0, -1)
    for size in sizes:
        trial = copy.deepcopy(allocator)
        try:
            trial.malloc(size * MIB)
        except MemoryError:
            continue
        return size
    return 0


def train(allocator, steps, empty):
    model = allocator.malloc(24 * MIB)
    for _ in range(steps):
        activations = [allocator.malloc(size * MIB) for size in (12, 40, 30, 16)]
        for tensor in reversed(activations):
            allocator.free(tensor)
        if empty:
            allocator.empty_cache()
    return model


asked, mine, others = {}, {}, {}
for empty in (False, True):
    gpu = CachingAllocator(200 * MIB)
    train(gpu, 100, empty)
    name = "empty_cache in the loop" if empty else "left alone"
    asked[name], mine[name], others[name] = (
        gpu.device_calls,
        largest_request(gpu),
        gpu.capacity - gpu.reserved,
    )
    print(
        f"{name:24} you can get {mine[name]} MiB, another process {others[name] // MIB} MiB,",
        end=" ",
    )
    print(f"the device was asked {asked[name]} times")

# %% [markdown]
# Your model gets the same in both cases: before the allocator gives up, it empties its own cache.
# What changes is what *others* see, and the price: a hundred steps ask the device hundreds of times
# in place of five. So `empty_cache` is good manners before another process starts on the same GPU.
# It is no optimisation, and it frees no tensor that you still hold. PyTorch's [own
# page](https://docs.pytorch.org/docs/stable/generated/torch.cuda.memory.empty_cache.html) says so
# in its note.
#
# On a real GPU, the next cell repeats the holes in a fresh process and puts PyTorch's numbers
# beside the paper's.

# %% tags=["nbval-ignore-output"]
ON_A_GPU = """
import json, time, torch
MIB, cuda = 2**20, torch.cuda
def get(mib):
    return torch.empty(mib * MIB, dtype=torch.uint8, device="cuda")
def train(empty):
    model, seconds = get(24), []
    cuda.reset_peak_memory_stats()
    for _ in range(60):
        start = time.perf_counter()
        a = [get(size) for size in (12, 40, 30, 16)]
        del a
        if empty: cuda.empty_cache()
        seconds.append(time.perf_counter() - start)
    return cuda.max_memory_reserved() / MIB, seconds[10:]
tensors, numbers = [get(5) for _ in range(16)], []
tensors[::2] = [None] * 8
for _ in range(2):
    numbers.append((cuda.memory_allocated() // MIB, cuda.memory_reserved() // MIB))
    cuda.empty_cache()
del tensors
print(json.dumps([*numbers, train(False), train(True)]))
"""
if machine.can("gpu"):
    real = measure.child(ON_A_GPU).result
    holes, emptied, (peak_kept, t_kept), (peak_emptied, t_emptied) = real
    dearer = measure.median_interval(np.divide(t_emptied, t_kept))
    print(f"MiB allocated and reserved: with holes {holes}, after empty_cache {emptied}")
    print(f"emptying in the loop: {dearer.value:.0f} times the time of the allocations")
    print(f"MiB reserved at most: {peak_kept:.0f} left alone, {peak_emptied:.0f} emptied")
else:
    print(machine.skip("gpu", "the real caching allocator"))

# %% [markdown]
# The same training step can be counted by the GPU's own allocator, which needs no profiler.

# %% tags=["nbval-ignore-output"]
if machine.can("gpu"):
    on_gpu = chain(1024, 12).cuda()
    tokens = torch.randn(4096, 1024, device="cuda", requires_grad=True)
    labels = torch.randint(0, 1024, (4096,), device="cuda")
    for name, forward in {
        "plain": on_gpu,
        "every block": through(Checkpoint.apply, on_gpu),
    }.items():
        F.cross_entropy(forward(tokens), labels).backward()  # gradients exist from here on
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        F.cross_entropy(forward(tokens), labels).backward()
        print(
            f"{name:12} {(torch.cuda.max_memory_allocated() - base) / MIB:.0f} MiB of activations"
        )
    print("bitwise equal:", equal_bits(on_gpu, Checkpoint.apply, tokens, labels))
    del on_gpu, tokens, labels
    outcome = "counted on the GPU"
else:
    outcome = machine.skip("gpu", "checkpointing counted by the GPU's allocator")
outcome

# %% [markdown]
# ## From scratch: one memory, two processes
# A data loader, a server and its workers: processes that must hand over tensors. Between processes
# there are two ways. *Pickle* turns the array into bytes, a pipe carries them, and the other side
# builds a new array. *Shared memory* is a piece of memory that both processes see; only its name
# travels. (The system calls it a *segment*, too: the word's third meaning.)
#
# The worker is a file, because a new process can't import a cell.

# %%
WORKER = """\
import pickle, struct, sys, time
from multiprocessing import resource_tracker, shared_memory
import numpy as np
def send(pipe, value):
    data = pickle.dumps(value, protocol=5)
    pipe.write(struct.pack("<Q", len(data)))
    pipe.write(data)
    pipe.flush()

def receive(pipe):
    header = pipe.read(8)
    if len(header) < 8: raise EOFError("the other process has gone")
    return pickle.loads(pipe.read(struct.unpack("<Q", header)[0]))

def main(source, target):
    # The owner removes the segment. Before Python 3.13 attaching registers it for removal too.
    resource_tracker.register = lambda *_: None
    while True:
        try:
            kind, value = receive(source)
        except EOFError:
            return
        if kind == "attach":  # (name, how many numbers)
            segment = shared_memory.SharedMemory(value[0])
            shared = np.ndarray(value[1], np.float32, segment.buf)
        elif kind == "index":  # change one number of the shared array
            shared[value] += 1
        elif kind == "array":  # change the first number of an array that was sent
            value[0] += 1
        elif kind == "sleep":
            time.sleep(value)
        send(target, value)

if __name__ == "__main__":
    main(sys.stdin.buffer, sys.stdout.buffer)
"""
worker_file = scratch("08") / "worker.py"
worker_file.write_text(WORKER, encoding="utf-8")
worker_file.name

# %%
import contextlib
import runpy
import subprocess
import sys
from multiprocessing import shared_memory

protocol = runpy.run_path(str(worker_file))  # the same send and receive on both sides


class Worker:
    """A worker process; leaving the `with` block ends it, however it is left."""

    def __enter__(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, str(worker_file)], **pipes)
        return self

    def tell(self, kind, value):
        protocol["send"](self.process.stdin, (kind, value))

    def answer(self):
        return protocol["receive"](self.process.stdout)

    def ask(self, kind, value):
        self.tell(kind, value)
        return self.answer()

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()  # collect it: a process nobody waits for stays in the table as a zombie
        self.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # bytes may be left that nobody will read
            self.process.stdin.close()


# %%
COUNT = 2**14 if SMOKE else 2**22  # float32 numbers in the array
own = np.zeros(COUNT, np.float32)


class Segment:
    """A shared array of float32; leaving the `with` block removes it from the system."""

    def __enter__(self):
        self.memory = shared_memory.SharedMemory(create=True, size=4 * COUNT)
        self.array = np.ndarray(COUNT, np.float32, self.memory.buf)
        self.array[:] = 0
        return self

    def __exit__(self, *_):
        self.array = None  # a view that is still alive would forbid the close
        self.memory.close()
        self.memory.unlink()


def exists(name):
    try:
        shared_memory.SharedMemory(name).close()
    except FileNotFoundError:
        return False
    return True


with Worker() as worker, Segment() as segment:
    worker.ask("attach", (segment.memory.name, COUNT))
    worker.ask("index", 5)
    print("shared: the worker's change is here:", segment.array[5] == 1)
    back = worker.ask("array", own)
    print("pickled: here", own[0], "- in what came back", back[0])
print("segment left behind:", exists(segment.memory.name))

# %% [markdown]
# The first line is the proof: you see the other process's write, so there is one memory. In the
# second, your array is as it was. A copy travelled, and another copy came back.
#
# ## Measure: copied bytes and latency
# Three ways to have a worker change one number of an array. *Pickled*: the array goes and comes.
# *Copied in*: your array exists already, so it is first copied into the segment. *Made there*: the
# array was created in the segment. On Linux the kernel counts what a process reads and writes,
# pipes included.


# %% tags=["nbval-ignore-output"]
def piped_bytes(call):
    """Bytes this process passed to read and write during call(), from the kernel; None where it
    does not tell.
    """
    try:
        before = psutil.Process().io_counters()
        call()
        after = psutil.Process().io_counters()
        return after.read_chars + after.write_chars - before.read_chars - before.write_chars
    except (AttributeError, psutil.Error):
        return None


with Worker() as worker, Segment() as segment:
    worker.ask("attach", (segment.memory.name, COUNT))

    def pickled():
        return worker.ask("array", own)

    def made_there():
        return worker.ask("index", 0)

    def copied_in():
        np.copyto(segment.array, own)
        return worker.ask("index", 0)

    trips = {"pickled": pickled, "copied in": copied_in, "made there": made_there}
    piped = {name: piped_bytes(trip) for name, trip in trips.items()}
    took = {n: measure.latency(t, seconds=SECONDS / 3).median for n, t in trips.items()}
    gain = measure.compare(pickled, copied_in, seconds=SECONDS, precision=0.05)
copied = {"pickled": 0, "copied in": own.nbytes, "made there": 0}
for name in trips:
    pipe = "unknown" if piped[name] is None else f"{piped[name] / own.nbytes:.3f}"
    print(
        f"{name:11} through pipes {pipe} arrays, copied by us {copied[name] / own.nbytes:.0f},",
        end=" ",
    )
    print(f"round trip {measure.pretty(took[name].value)}")

# %% tags=["nbval-ignore-output"]
milliseconds = {
    n: measure.Interval(1e3 * t.value, 1e3 * t.low, 1e3 * t.high) for n, t in took.items()
}
plots.bars(
    milliseconds,
    xlabel="round trip (ms)",
    logx=True,
    title=(
        f"{own.nbytes / MIB:.3g} MiB: copied into shared memory, {gain.ratio:.1f}x faster than"
        " pickled"
    ),
    alt=(
        "Round-trip times on a logarithmic axis: pickled is longest, copied in shorter, made there"
        " shortest."
    ),
)
claims.verdict("08.shared_memory_is_faster", gain)


# %% [markdown]
# The axis is logarithmic. *Pickled* moves the array through pipes twice, and each side also builds
# it anew. *Copied in* pays for one copy. *Made there* sends a number of a few bytes, and its time
# no longer depends on the array.
#
# Does "shared memory avoids copies" hold for torch? `share_memory_()` is what torch's data loader
# uses. Watch the address.

# %% tags=["nbval-ignore-output"]
ordinary = torch.zeros(1000)
address = ordinary.data_ptr()
ordinary.share_memory_()
moved = ordinary.data_ptr() != address
with Segment() as segment:
    wrapped = torch.from_numpy(segment.array)  # a tensor over the segment
    no_copy = wrapped.data_ptr() == segment.array.ctypes.data
    del wrapped
print("share_memory_ moved the data:", moved, "- from_numpy on a segment copied nothing:", no_copy)
claims.verdict("08.shared_memory_avoids_copies", float(moved))

# %% [markdown]
# The verdict counts copies for a tensor that *exists already*: one. Shared memory avoids the second
# copy, the third and the way through the pipe. Only data that are created in the segment travel
# without any.
#
# ## Measure: a worker is killed
# A worker gets a signal that it can't catch, in the middle of its work. What stays behind?

# %%
with Segment() as segment:
    name = segment.memory.name
    with Worker() as worker:
        worker.ask("attach", (name, COUNT))
        worker.tell("sleep", 60)
        worker.process.kill()  # kill -9
        with exercises.fails(EOFError):
            worker.answer()
    segment.array[1] = 7
    print("the data survive the worker:", segment.array[1] == 7)
print("worker collected:", worker.process.poll() is not None)
print("zombie left:", psutil.pid_exists(worker.process.pid))
print("segment left:", exists(name))

# %% [markdown]
# Two rules kept the house clean. **One owner:** who creates the segment removes it, in a `with`
# block, whatever happens to others. **Always collect:** `wait` after `kill`, or the dead process
# keeps its place in the table. If the *owner* is killed, Python's resource tracker removes the
# segment; a C++ program has no such helper, and its segment stays until the machine restarts.
#
# ## Myth: `mp.Array` without a lock has `get_obj`
# This line circulates: `np.frombuffer(mp.Array("f", n, lock=False).get_obj())`.

# %%
import multiprocessing

with exercises.fails(AttributeError):
    multiprocessing.Array("f", 4, lock=False).get_obj()
raw = multiprocessing.Array("f", 4, lock=False)  # the array itself
locked = multiprocessing.Array("f", 4)  # a lock around it: this one has get_obj
np.frombuffer(raw, np.float32)[0] = 1
np.frombuffer(locked.get_obj(), np.float32)[0] = 2
raw[0], locked[0]

# %% [markdown]
# ## Measure: attention, naive and fused
# In *attention* each of $T$ positions sends a *query*, which is compared with the *key* of every
# position; the scores then weigh the positions' *values*. That is a table of $T \times T$ scores,
# and one for each *head*: several such comparisons run side by side. The naive way stores the
# tables. The *fused* operator of PyTorch works through them in blocks and never holds one whole
# (Dao et al. 2022). On the way to it stands what you can build now: take a block of queries at a
# time and checkpoint it.


# %%
def naive(q, k, v):  # each (heads, T, width)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (heads, T, T)
    return torch.softmax(scores, -1) @ v


def fused(q, k, v):
    return F.scaled_dot_product_attention(q[None], k[None], v[None])[0]


def blocked(q, k, v, size=64):
    """The naive way for `size` queries at a time; backward computes each table again."""
    return torch.cat([library(naive, part, k, v) for part in q.split(size, -2)], -2)


q, k, v = torch.randn(3, 4, 200, 32, dtype=torch.float64, requires_grad=True).unbind(0)
for way in (blocked, fused):
    torch.testing.assert_close(way(q, k, v), naive(q, k, v), atol=1e-12, rtol=0)
    ours, theirs = (torch.autograd.grad(f(q, k, v).square().sum(), (q, k, v)) for f in (way, naive))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)

# %% tags=["nbval-ignore-output"]
times = {"smoke": [64, 128, 256], "fast": [256, 512, 1024, 2048], "full": [512, 1024, 2048, 4096]}
times = times[PROFILE]
attention = {"naive": [], "blocks of 64 queries, checkpointed": [], "fused": []}
for length in times:
    q, k, v = (torch.randn(4, length, 64, requires_grad=True) for _ in range(3))
    for t in (q, k, v):
        t.grad = torch.zeros_like(t)
    for name, way in zip(attention, (naive, blocked, fused), strict=True):
        attention[name].append(measure.peak_memory(lambda: way(q, k, v).sum().backward()) / MIB)
powers = {
    n: math.log(m[-1] / m[-2]) / math.log(times[-1] / times[-2]) for n, m in attention.items()
}
plots.lines(
    times,
    attention,
    xlabel="sequence length T",
    ylabel="peak of a training step (MiB)",
    logx=True,
    logy=True,
    title=(
        f"Naive grows like T^{powers['naive']:.1f}, fused like T^{powers['fused']:.1f}: "
        f"{attention['naive'][-1] / attention['fused'][-1]:.0f}x at T = {times[-1]}"
    ),
    alt=(
        "Peak memory against sequence length: the naive line is steepest, the blocked and the fused"
        " one run far below it."
    ),
)
claims.verdict("08.fused_attention_is_linear", powers["fused"])

# %% [markdown]
# A doubled length makes the naive way pay four times, the others about twice. The fused operator
# also never writes its table to main memory, which saves time where memory is the limit. It
# computes the same numbers, as the assertion above says.
#
# ## If yours shows no gain
# | You see | Because | Look at |
# |---|---|---|
# | checkpointing saves little | parameters and Adam's state are the peak, not activations | the stacked bars above; *Break it* |
# | it saves nothing at all | one segment holds everything at the end | shorter segments |
# | it costs far more than a third | the forward pass is a large share: random numbers, normalisation, many small operations | the bars under *Explain* |
# | it costs almost nothing | the machine was waiting for data or for memory anyway | chapter 1, the roofline |
# | selective costs as much as full, or more | the cheap operations are the dear ones on this CPU, and the hooks run in Python | without dropout; larger matrices |
# | the prediction is off for a tiny batch of images | the convolution library rearranges weights in scratch memory | a larger batch |
# | accumulation is slower | small products use the processor badly | the largest piece that fits |
# | shared memory gains little | the array is small: a round trip costs what the pipe costs | arrays from `1 MiB` on |
# | fused attention needs as much as naive | a mask or a dtype for which PyTorch falls back to the plain kernel | `torch.nn.attention.sdpa_kernel` |
#
# ## Exercise A · the peak of an MLP
# An MLP has layers `nn.Linear(widths[0], widths[1])`, `nn.Linear(widths[1], widths[2])`, …, each
# with a bias, and a ReLU after every one but the last. It is trained in fp32 with Adam on `batch`
# rows. Complete one line, so that `mlp_bytes(widths, batch)` gives the bytes that are alive
# *between the forward and the backward pass* of a later step: the parameters, Adam's two numbers
# for each of them, and every activation that the layers keep for their backward pass. The batch
# itself counts, because the first layer keeps it. The last output, the loss and the gradients (none
# exist yet) do not.
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
# 8 minutes. Draw the two-layer example on the board and colour the tensors that two layers share.
# Whoever gets 936 for the example has counted the ReLU twice: ask at which address the second copy
# would lie.

# %% [markdown]
# ## Exercise B · a checkpoint for any function
# Write `MyCheckpoint`, an autograd function that is called as `MyCheckpoint.apply(function,
# *inputs)` and returns `function(*inputs)`, one tensor. Among the inputs may be several tensors,
# tensors that need no gradient, tensors of integers, and things that are no tensors (a number, a
# string, None); at least one tensor needs a gradient. Write both passes yourself. The demands:
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
# 20 minutes, in pairs. Demand 3 is the one that rooms forget; show them two runs of a training
# script that differ only by checkpointing and have different losses from the second step on. Ask
# why `save_for_backward` is better than `ctx.inputs = …` (it notices in-place changes and avoids
# reference cycles).

# %% [markdown]
# ## Exercise C · fit a network into a budget
# A network is a list of blocks, in the order of the forward pass. Each is a tuple `(inside, border,
# seconds)`: the bytes that it keeps for its backward pass, the bytes of its input, and the time of
# running it again. You may checkpoint any set of blocks. A checkpointed block holds only its
# `border`; any other holds its `inside`.
#
# The peak is the largest amount that is held while the backward pass works on a block: what the
# blocks before it hold, plus its `inside`, plus its `border` if it is checkpointed. (Later blocks
# are already freed.)
#
# Write `plan(blocks, budget)`. Return the indices to checkpoint, as a sorted list, such that the
# peak is **at most** `budget` and the sum of their `seconds` is as small as possible. If nothing
# fits, return `None`. There are 1 to 10 blocks, so trying all sets is allowed.
#
# Example: `blocks = [(10, 1, 3.0), (10, 1, 2.0)]`. With a budget of 20 nothing needs to be done:
# `[]`. With 12, `[0]` is right: at block 1 $1 + 10 = 11$, at block 0 $10 + 1 = 11$. The cheaper
# `[1]` does not fit: when block 1 is at work, block 0 holds 10, and $10 + 10 + 1 = 21$. With 10,
# the answer is `None`.


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
# 20 minutes. The example with budget 12 is the heart: an early block weighs longer than a late one,
# because it is held while all later ones work. Ask which single block is the worst to checkpoint
# (the last: it saves nothing at its own backward pass).

# %% [markdown]
# ## Break it
# Make the activations small beside the parameters: fewer rows. What share of the whole step's bytes
# does checkpointing every block still save?

# %% tags=["nbval-ignore-output"]
rows_in_batch = [2, 8, 32, 128] if SMOKE else [4, 16, 64, 256, 768]


class Checkpointed(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return through(torch_checkpoint, self.model)(x)


saved = []
for count in rows_in_batch:
    data_in, classes = torch.randn(count, 128), torch.randint(0, 128, (count,))
    plain_bytes, less = (
        measure.peak_memory(training_steps(make, data_in, classes))
        for make in (lambda: chain(128, 8), lambda: Checkpointed(chain(128, 8)))
    )
    saved.append(100 * (1 - less / plain_bytes))
plots.lines(
    rows_in_batch,
    {"every block checkpointed": saved},
    xlabel="rows in a batch",
    ylabel="bytes of the step saved (%)",
    logx=True,
    title=(
        f"At {rows_in_batch[0]} rows {saved[0]:.0f}% is saved, at {rows_in_batch[-1]} rows"
        f" {saved[-1]:.0f}%"
    ),
    alt="Share of bytes saved against rows in a batch: near zero at the left, rising to the right.",
)

# %% [markdown]
# On the left the peak is the optimizer's moment, and checkpointing pays time for nothing. On the
# right it takes away most.
#
# And a function that *remembers* breaks the promise that a second run is the same. BatchNorm keeps
# running statistics:

# %%
counting = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.GELU())
library(counting, torch.randn(16, 8, requires_grad=True)).sum().backward()
print("batches seen:", 1, "- batches counted by BatchNorm:", int(counting[1].num_batches_tracked))

# %% [markdown]
# The gradients are right, and the running mean has moved twice as far as it should, which shows in
# evaluation only. Freezing the statistics in the second run is a remedy; layers without a memory,
# such as LayerNorm, need none.
#
# ## Exit quiz
# **1. A batch twice as large doubles**
# <details><summary>the activations</summary>Right: each layer keeps a tensor with one row per
# example.</details>
# <details><summary>Adam's state</summary>It has two numbers a parameter, whatever the
# batch.</details>
# <details><summary>everything</summary>Parameters, gradients and Adam's state stay.</details>
#
# **2. Checkpointing adds a third to the time. This is exact for**
# <details><summary>the matrix products, if everything is run again</summary>Right: 4 passes in
# place of 3.</details>
# <details><summary>the wall clock</summary>It depends on the forward pass's share of the step,
# which you measured.</details>
# <details><summary>every segment length</summary>Torch skips the end of each segment, so short
# segments cost fewer products.</details>
#
# **3. Your GPU is out of memory, and `empty_cache` is proposed. It helps**
# <details><summary>if another process needs the memory</summary>Right.</details>
# <details><summary>your next allocation</summary>The allocator has emptied its cache already before
# it gave up.</details>
# <details><summary>against holes within segments</summary>A segment with one living block
# stays.</details>
#
# **4. A tensor that exists is handed to a worker by shared memory. How many times are its bytes
# copied?**
# <details><summary>never</summary>It must get into the segment somehow.</details>
# <details><summary>once</summary>Right: into the segment. Created there, never.</details>
# <details><summary>as often as with pickle</summary>Pickle and the pipe copy it several times on
# each way.</details>
#
# **5. Accumulated gradients differ from the big batch's. Look first at**
# <details><summary>BatchNorm, and pieces of unequal size</summary>Right.</details>
# <details><summary>the learning rate</summary>It acts after the gradients are there.</details>
# <details><summary>rounding</summary>In fp32 it shows in the seventh digit, no earlier.</details>
#
# **Key points** · layers keep inputs, outputs or masks, and the table predicts the peak ·
# checkpoint at narrow places, with the random state · the extra time is the forward pass's share ·
# a cache is not a leak, and emptying it frees nothing of yours · shared memory saves all copies but
# the first · whoever creates a segment removes it.
#
# **Sources** · T. Chen et al., *Training Deep Nets with Sublinear Memory Cost*, 2016 · T. Dao et
# al., *FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness*, 2022 ·
# PyTorch's documentation of
# [torch.utils.checkpoint](https://docs.pytorch.org/docs/stable/checkpoint.html), [CUDA memory
# management](https://docs.pytorch.org/docs/stable/notes/cuda.html#memory-management) and
# [autograd's saved tensors](https://docs.pytorch.org/docs/stable/notes/autograd.html#saved-tensors)
# · Python's documentation of
# [shared_memory](https://docs.python.org/3/library/multiprocessing.shared_memory.html), and
# [CPython's issue 82300](https://github.com/python/cpython/issues/82300) on who removes a segment.
#
# **For the capstone** row 08 of your ledger, *memory*, now says whether a peak can be predicted on
# your machine, and what lowering it costs. Next: [09 · Distributed
# training](09_distributed_training.ipynb), where one machine's memory is not enough.
