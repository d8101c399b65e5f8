# %% [markdown]
# # 10 · Operator fusion
#
# **Why does a network spend its time carrying numbers about, and which operations can share one
# trip?**
#
# After this chapter you can: *count* the bytes that a chain of operations moves · *predict* what
# fusing it gains, and from which size on · *write* a graph pass that folds BatchNorm wherever that
# is legal, and only there · *tile* attention so that its memory grows linearly · *read* what
# `torch.compile` generated, find its graph breaks, and count its compile time in.
#
# 125 minutes · before this: 1 Measurement; 6 and 8 help · runs on any CPU

# %% tags=["parameters"]
import os

PROFILE = os.environ.get("COURSE_PROFILE", "fast")

# %% tags=["nbval-ignore-output"]
import copy
import math
import time
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from course_utils import claims, exercises, machine, measure, models, plots

SMOKE, FULL = PROFILE == "smoke", PROFILE == "full"
SECONDS = {"smoke": 0.1, "fast": 1.5, "full": 8.0}[PROFILE]  # for one comparison
MIB = 2**20  # bytes
machine.card()

# %% [markdown]
# ## Recall
# 1. (Chapter 1) On the roofline, what limits an operation with few operations a byte?
#    <details><summary>Answer</summary>The memory: it can't be faster than its bytes divided by the
#    bandwidth.</details>
# 2. (Chapter 6) Why was BatchNorm folded into the convolution before quantizing?
#    <details><summary>Answer</summary>So that the output is rounded once, after everything: one
#    layer in place of two.</details>
# 3. Naive attention keeps a table of $T \times T$ scores. How does its memory grow with the length
#    $T$?
#    <details><summary>Answer</summary>With $T^2$: twice the length, four times the bytes.</details>
#
# ## Predict
# Five pointwise operations in a row, on two tensors of `64 MiB`, run as one pass over memory in
# place of five. How many times faster? And: all 20 BatchNorms of ResNet-18 disappear into the
# convolutions before them. How many times faster is the network?

# %%
my_chain = ...
my_folding = ...
exercises.predict("10.chain", my_chain)
exercises.predict("10.folding", my_folding)

# %% [markdown]
# ## From scratch: count the bytes
# Take a line of code that no one would call slow.


# %%
def chain(x, r):
    return torch.clamp(x * 0.5 + 1.0, 0.0, 6.0) * r + x


# %% [markdown]
# Eager PyTorch runs it as five operations. Each one reads its inputs from memory and writes its
# output there, and the next one reads that again. A *dispatch mode* sees every operation on its way
# to a kernel. Let it add up the bytes.

# %%
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """Adds up the bytes that operations read and write; an operation that only makes a view moves
    none.
    """

    def __init__(self):
        super().__init__()
        self.bytes, self.calls = 0, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = [a for a in args if isinstance(a, torch.Tensor)]
        made = [
            t
            for t in (result if isinstance(result, tuple | list) else [result])
            if isinstance(t, torch.Tensor)
        ]
        owners = {a.untyped_storage().data_ptr() for a in given}
        view = bool(made) and all(t.untyped_storage().data_ptr() in owners for t in made)
        if not view or function._schema.is_mutable:
            self.bytes += sum(t.nbytes for t in given + made)
            self.calls[function._schema.name.removeprefix("aten::")] += 1
        return result


x, r = torch.randn(1000), torch.randn(1000)  # 4,000 bytes each
with Traffic() as eager:
    y = chain(x, r)
print(dict(eager.calls))
print(eager.bytes / x.nbytes, "times the bytes of x")

# %% [markdown]
# Twelve trips: three operations with one input (read, write), two with two inputs (read, read,
# write). What had to move? `x` and `r` in, `y` out: three. The other nine trips carry numbers that
# nobody asked for. **Fusing** means: one pass over memory, and everything in between stays in
# registers or in the cache. If memory is the limit, five operations in one should be $12 / 3 = 4$
# times faster.
#
# ## From scratch: fuse by blocks
# You can have most of that without a compiler. Take a piece so small that it stays in the cache,
# run all five operations on it, then go on to the next piece.


# %%
def by_blocks(x, r, size=2**15):
    """chain(x, r) for flat tensors, a block of `size` numbers at a time; what is between the
    operations stays in the cache.
    """
    out = torch.empty_like(x)
    for a, b, o in zip(x.split(size), r.split(size), out.split(size), strict=True):
        t = torch.mul(a, 0.5).add_(1.0).clamp_(0.0, 6.0).mul_(b)
        torch.add(t, a, out=o)
    return out


x, r = torch.randn(100_001), torch.randn(100_001)
print("equal:", torch.equal(by_blocks(x, r), chain(x, r)))

# %% [markdown]
# The same operations in the same order on the same numbers, so the same bits. How large should a
# block be? Too small, and the fixed cost of each call counts; too large, and the block falls out of
# the cache.

# %% tags=["nbval-ignore-output"]
LONG = 2**18 if SMOKE else 2**24  # numbers in a tensor
x, r = torch.randn(LONG), torch.randn(LONG)
blocks = [2**k for k in ((10, 14, 18) if SMOKE else (10, 12, 14, 16, 18, 20, 22))]
by_size = {
    b: measure.compare(
        lambda: chain(x, r), lambda b=b: by_blocks(x, r, b), seconds=SECONDS / 2, precision=0.05
    )
    for b in blocks
}
best = max(by_size, key=lambda b: by_size[b].ratio)
plots.lines(
    [4 * b / 1024 for b in blocks],
    {"by blocks": [c.interval for c in by_size.values()]},
    xlabel="KiB of one tensor in a block",
    ylabel="speed-up over eager (x)",
    logx=True,
    reference=(1.0, "as fast as eager"),
    title=f"Blocks of {4 * best // 1024} KiB: {by_size[best].ratio:.1f}x",
    alt=(
        "Speed-up against block size: low for tiny blocks, highest where a block fits the cache,"
        " falling towards one."
    ),
)

# %% [markdown]
# Left, the machine is busy with calls, not with numbers. Right, a block no longer fits; what is
# still gained there comes from working in place, one array used again where eager asks for a fresh
# one each time. The hill between them is your cache: a block has four arrays alive (two inputs,
# what is in between, the output), so its top usually lies at a quarter or less of the cache of one
# core.
#
# ## Measure: from which size on?
# A compiler does better than blocks: it keeps the numbers in registers and calls one kernel.
# `torch.compile` writes C++ for the chain and needs a C++ compiler. Below, one compiled function
# serves all sizes.

# %% tags=["nbval-ignore-output"]
import torch._inductor.config as inductor

inductor.compile_threads = 1  # no worker processes beside the kernel
can_compile = machine.can("compiler")
arms = {"by blocks": lambda x, r: by_blocks(x, r, best)}


class Compiled:
    """`function`, compiled at its first call in each process: compiled code does not travel."""

    def __init__(self, function):
        self.function, self.ready = function, None

    def __call__(self, *tensors):
        if self.ready is None:
            self.ready = torch.compile(self.function, dynamic=True)
        return self.ready(*tensors)

    def __reduce__(self):  # what is sent to another process
        return Compiled, (self.function,)


if can_compile:
    Compiled(chain)(torch.randn(1000), torch.randn(1000))  # fills the compiler's cache
    arms = {"compiled": Compiled(chain)} | arms
else:
    print(machine.skip("compiler", "the compiled chain: blocks stand for it"))
numbers = [2**k for k in ((10, 16) if SMOKE else (10, 12, 14, 16, 18, 20, 22, 24))]
gain = {name: [] for name in arms}
for n in numbers:
    a, b = torch.randn(n), torch.randn(n)
    for name, call in arms.items():
        both = (lambda: chain(a, b)), (lambda call=call: call(a, b))
        gain[name].append(measure.compare(*both, seconds=SECONDS / 3, precision=0.05))

# %% tags=["nbval-ignore-output"]
main = next(iter(gain))
crossover = next((n for n, c in zip(numbers, gain[main], strict=True) if c.low > 1), None)
title = f"{main.capitalize()}: {gain[main][-1].ratio:.1f}x at {4 * numbers[-1] / MIB:g} MiB; " + (
    f"faster from {4 * crossover / 1024:g} KiB on" if crossover else "faster at none of these sizes"
)
plots.lines(
    [4 * n / 1024 for n in numbers],
    {name: [c.interval for c in row] for name, row in gain.items()},
    xlabel="KiB of one tensor",
    ylabel="speed-up over eager (x)",
    logx=True,
    reference=(4.0, "12 trips in place of 3"),
    title=title,
    alt=(
        "Speed-up against tensor size for the compiled chain and for blocks, rising with the size"
        " towards the dashed line."
    ),
)
exercises.reveal("10.chain", gain[main][-1].ratio, "times")
last = measure.across(
    lambda: chain(a, b), lambda: arms[main](a, b), seconds=2 * SECONDS, processes=5
)
print(last)
claims.verdict("10.fusion_gains_by_its_bytes", measure.derive(lambda s: s / 4, last.interval))

# %% [markdown]
# At the left a call's fixed cost is all there is: a compiled function checks its inputs before each
# call, and that can cost more than five small operations. In the middle everything fits the cache,
# and trips are cheap. At the right the tensors come from memory and the gain nears the dashed line.
# It stays below where a large cache still carried some of eager's trips. It may even pass it: a
# fresh tensor's pages must be handed out by the system when they are first touched, and the fused
# version asks for one tensor, not for five.
#
# Now see what was generated. These are the lines of the loop.

# %% tags=["nbval-ignore-output"]
if can_compile:
    from torch._inductor.utils import run_and_get_code

    torch.compiler.reset()
    _, sources = run_and_get_code(torch.compile(chain), torch.randn(4096), torch.randn(4096))
    lines = sources[0].splitlines()
    start = next(i for i, line in enumerate(lines) if "loadu" in line)
    end = max(i for i, line in enumerate(lines) if ".store(" in line)
    kernel = [line.strip() for line in lines[start : end + 1] if "static_cast<float>" not in line]
    print("\n".join(line.replace("static_cast<int64_t>", "") for line in kernel[:16]))
    torch.compiler.reset()
else:
    print(machine.skip("compiler", "the generated kernel"))

# %% [markdown]
# Two `loadu`, arithmetic on vector registers, one `store`: three trips. That is the whole idea, and
# on a GPU it is the same with threads in place of vectors.
#
# ## From scratch: fold a BatchNorm
# Some fusions need no new kernel at all. In inference BatchNorm is a multiplication and an addition
# for each channel, with constants. A convolution multiplies and adds as well. Write $W$ and $b$ for
# the convolution's weight and bias, $\mu, \sigma^2, \gamma, \beta$ for BatchNorm's running mean and
# variance, scale and shift, and $\varepsilon$ for the small number (`bn.eps`) that keeps the root
# above zero:
#
# $$\gamma\,\frac{(W x + b) - \mu}{\sqrt{\sigma^2 + \varepsilon}} + \beta \;=\;
# \underbrace{\tfrac{\gamma}{\sqrt{\sigma^2 + \varepsilon}} W}_{W'}\; x \;+\; b'$$
#
# $b'$ is exercise A. The function below takes it from torch; all the rest is yours.


# %%
def fold(conv, bn):
    """One convolution that computes bn(conv(x)), both in eval mode."""
    one = copy.deepcopy(conv)
    factor = (bn.weight if bn.affine else 1.0) / torch.sqrt(bn.running_var + bn.eps)
    one.weight = nn.Parameter((conv.weight * factor[:, None, None, None]).detach())
    _, bias = torch.nn.utils.fuse_conv_bn_weights(
        conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )
    one.bias = nn.Parameter(bias.detach())
    return one


# %% [markdown]
# ResNet-18 has twenty such pairs. Which module follows which is not written in the modules; it is
# in `forward`. `torch.fx` runs `forward` with stand-ins and writes down what happens: a *graph* of
# nodes, each with its inputs (`args`) and its readers (`users`).

# %%
from torchvision.models import resnet18


def lived_in(model, side=64):
    """The model in eval mode after some batches in train mode, so that its BatchNorms have
    statistics worth folding.
    """
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(8, 3, side, side) * 2 + 1)
    return model.eval()


torch.manual_seed(0)
resnet = lived_in(resnet18())
graph = fx.symbolic_trace(resnet).graph
for node in list(graph.nodes)[:6]:
    print(
        f"{node.op:12} {node.target!s:18} reads {[str(a) for a in node.args]}, read by"
        f" {len(node.users)}"
    )

# %% [markdown]
# When is folding *illegal*? If anything but this BatchNorm sees the convolution's output, that
# other reader would get the wrong numbers. If the convolution is called a second time, that call
# would be scaled too. And in train mode BatchNorm normalises by its batch, which no constant can
# do.


# %%
def illegal(node, modules, calls):
    """Why this BatchNorm's node may not be folded, or None."""
    before, bn = node.args[0], modules[node.target]
    if bn.training or not bn.track_running_stats:
        return "it uses the statistics of the batch"
    if before.op != "call_module" or not isinstance(modules[before.target], nn.Conv2d):
        return "no convolution stands before it"
    if calls[before.target] > 1:
        return "its convolution is called more than once"
    if calls[node.target] > 1:
        return "it is called more than once itself"
    if len(before.users) > 1:
        return "its convolution's output has another reader"
    return None


# %%
def fold_all(model):
    """A copy with every BatchNorm folded where that is legal, and for each of the others the reason
    why not.
    """
    if model.training:
        raise ValueError(
            "the model is in train mode, in which BatchNorm uses its batch; call eval() first."
        )
    traced = fx.symbolic_trace(copy.deepcopy(model))
    modules, refused = dict(traced.named_modules()), {}
    calls = Counter(n.target for n in traced.graph.nodes if n.op == "call_module")
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d):
            continue
        if reason := illegal(node, modules, calls):
            refused[node.target] = reason
            continue
        before = node.args[0]
        traced.set_submodule(before.target, fold(modules[before.target], modules[node.target]))
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced, refused


# %% [markdown]
# A second pass puts the ReLU into the convolution's module, where it can work in place: one trip
# less.


# %%
class ConvReLU(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x).relu_()


def merge_relu(traced):
    """Conv → ReLU in one module, wherever nobody else reads the convolution."""
    modules = dict(traced.named_modules())
    calls = Counter(n.target for n in traced.graph.nodes if n.op == "call_module")
    for node in list(traced.graph.nodes):
        is_relu = node.op == "call_module" and isinstance(modules[node.target], nn.ReLU)
        before = node.args[0] if is_relu else None
        if (
            not is_relu
            or before.op != "call_module"
            or not isinstance(modules[before.target], nn.Conv2d)
        ):
            continue
        if len(before.users) == 1 and calls[before.target] == 1:
            traced.set_submodule(before.target, ConvReLU(modules[before.target]))
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.recompile()
    return traced


# %%
def batchnorms(model):
    return sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


picture = torch.randn(2, 3, 64, 64)
folded, refused = fold_all(resnet)
merged = merge_relu(copy.deepcopy(folded))
with torch.no_grad():
    want = resnet(picture)
    apart = max(float((m(picture) - want).abs().max() / want.abs().max()) for m in (folded, merged))
    exact, _ = fold_all(copy.deepcopy(resnet).double())
    exactly = float(
        (exact(picture.double()) - copy.deepcopy(resnet).double()(picture.double())).abs().max()
    )
exact = None
measure.release()
print(f"BatchNorms: {batchnorms(resnet)} → {batchnorms(folded)}, refused: {refused}")
print(f"equal within 1e-5: {apart < 1e-5}; in 64 bits within 1e-11: {exactly < 1e-11}")

# %% [markdown]
# The whole network, and the answers agree. And where it is illegal, the pass must say no. Three
# networks, one for each reason.


# %%
class Twice(nn.Module):
    """One convolution whose output has two readers, or which is called twice."""

    def __init__(self, shared):
        super().__init__()
        self.shared, self.conv, self.bn = shared, nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(self.conv(y)) if self.shared else self.bn(y) + y


for net in (Twice(shared=True), Twice(shared=False)):
    print(fold_all(lived_in(net))[1])
with exercises.fails(ValueError):
    fold_all(resnet18().train())

# %% [markdown]
# ## Measure: what folding gains
# The same network with and without its BatchNorms, in both memory formats.

# %% tags=["nbval-ignore-output"]
side = 64 if SMOKE else 224
networks = {"folded": folded, "folded, ReLU merged": merged}
folding = {}
for layout in (torch.contiguous_format, torch.channels_last):
    photo = torch.randn(1, 3, side, side).contiguous(memory_format=layout)
    name = "channels_last" if layout is torch.channels_last else "contiguous"
    for label, net in networks.items():
        pair = [
            measure.arm(m.to(memory_format=layout), photo, n)
            for m, n in ((resnet, "as it was"), (net, label))
        ]
        folding[f"{label}, {name}"] = measure.across(*pair, seconds=2 * SECONDS)
shown = folding["folded, contiguous"]
plots.intervals(
    {n: c.interval for n, c in folding.items()},
    xlabel="speed-up over the network with BatchNorm (x)",
    title=(
        f"Folding ResNet-18: {shown.ratio:.2f}x, channels_last"
        f" {folding['folded, channels_last'].ratio:.2f}x"
    ),
    alt=(
        "Speed-ups of ResNet-18 by folding, and by folding with merged ReLUs, in two memory"
        " formats."
    ),
)
exercises.reveal("10.folding", shown.ratio, "times")
claims.verdict("10.folding_gives_10_to_30_percent", shown)

# %% [markdown]
# The same BatchNorms were taken away in all four rows (two of them also save the ReLUs' trips), and
# what that is worth depends on what is left: the faster the convolutions of your machine and
# layout, the larger the share of everything else. Compare channels_last with contiguous.
#
# ## Explain: bytes, again
# Twenty layers are gone. How much arithmetic was that, how many bytes, how much time?

# %% tags=["nbval-ignore-output"]
resnet, folded = (m.to(memory_format=torch.contiguous_format) for m in (resnet, folded))
photo = torch.randn(1, 3, side, side)
moved, values = {}, []
hooks = [
    m.register_forward_hook(lambda _, __, out: values.append(out.numel()))
    for m in resnet.modules()
    if isinstance(m, nn.BatchNorm2d)
]
for name, net in (("before", resnet), ("after", folded)):
    with torch.inference_mode(False), torch.no_grad(), Traffic() as seen:
        net(photo)
    moved[name] = seen.bytes
for hook in hooks:
    hook.remove()
arithmetic = 2 * sum(values) / (2 * measure.macs(resnet, photo) + 2 * sum(values))
saved = {
    "floating-point operations": 100 * arithmetic,
    "bytes moved": 100 * (1 - moved["after"] / moved["before"]),
    "time": measure.derive(lambda s: 100 * (1 - 1 / s), shown.interval),
}
plots.bars(
    saved,
    xlabel="saved by folding (%)",
    title=(
        f"{saved['floating-point operations']:.2g}% of the arithmetic, {saved['bytes moved']:.0f}%"
        f" of the bytes, {saved['time'].value:.0f}% of the time"
    ),
    alt=(
        "Three bars: folding saves almost no arithmetic, a good part of the bytes, and some of the"
        " time."
    ),
)

# %% [markdown]
# BatchNorm's arithmetic is next to nothing beside that of the convolutions. What folding saves is
# trips: a BatchNorm reads and writes a whole activation to do two operations a number. The time
# saved should lie between the two, because the convolutions are limited by arithmetic and do not
# care about bytes. If your bar of time is near zero, your caches carried the activations anyway.
#
# ## From scratch: attention in tiles
# Attention is three operations, $S = QK^\top / \sqrt D$ (each row of $Q$, $K$ and $V$ has $D$
# numbers), $P = \mathrm{softmax}(S)$ and $O = PV$. The first two each write a table of $T \times T$
# numbers. To fuse them, a piece of $P$ must be used before all of a row of $S$ is known. But
# softmax divides by a sum over the *whole* row. The way out: keep a running maximum $m$ and a
# running sum $\ell$, and when a new maximum appears, scale what you have by $e^{m_\text{old} -
# m_\text{new}}$ (Milakov and Gimelshein 2018; Dao et al. 2022).


# %%
def naive(q, k, v):  # each (H, T, D)
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    return torch.softmax(scores, -1) @ v


def tiled(q, k, v, rows=64, columns=64):
    """The same, a tile of rows × columns scores at a time."""
    out = torch.empty_like(q)
    for i in range(0, q.shape[1], rows):
        part = q[:, i : i + rows] / math.sqrt(q.shape[-1])
        top = torch.full_like(part[..., :1], -math.inf)  # running maximum m
        total, mixed = (
            torch.zeros_like(top),
            torch.zeros_like(part),
        )  # running sum ℓ, and O before the division
        for j in range(0, k.shape[1], columns):
            scores = part @ k[:, j : j + columns].transpose(1, 2)
            new = torch.maximum(top, scores.amax(-1, keepdim=True))
            p, keep = torch.exp(scores - new), torch.exp(top - new)
            total = total * keep + p.sum(-1, keepdim=True)
            mixed = mixed * keep + p @ v[:, j : j + columns]
            top = new
        out[:, i : i + rows] = mixed / total
    return out


q, k, v = torch.randn(3, 2, 300, 16, dtype=torch.float64).unbind(0)
for shape in ((64, 64), (128, 32), (300, 1), (7, 300)):
    print(
        f"tiles of {shape}: equal within 1e-12:",
        float((tiled(q, k, v, *shape) - naive(q, k, v)).abs().max()) < 1e-12,
    )
torch.testing.assert_close(
    tiled(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-12, rtol=0
)

# %% tags=["nbval-ignore-output"]
lengths = [64, 128, 256] if SMOKE else [512, 1024, 2048, 4096]
ways = {
    "naive": naive,
    "tiled by hand": tiled,
    "scaled_dot_product_attention": F.scaled_dot_product_attention,
}
peaks = {name: [] for name in ways}
for length in lengths:
    q, k, v = torch.randn(3, 1, length, 64).unbind(0)
    for name, attention in ways.items():
        with torch.no_grad():
            peaks[name].append(measure.peak_memory(lambda a=attention: a(q, k, v)) / MIB)
        measure.release()  # the profiler's own notes are large
slope = {
    name: float(np.polyfit(np.log(lengths[-3:]), np.log(p[-3:]), 1)[0]) for name, p in peaks.items()
}
plots.lines(
    lengths,
    peaks,
    xlabel="sequence length",
    ylabel="peak memory (MiB)",
    logx=True,
    logy=True,
    title=f"Naive grows like T^{slope['naive']:.2f}, tiled like T^{slope['tiled by hand']:.2f}",
    alt=(
        "Peak memory against sequence length on logarithmic axes: naive is steep, tiled and fused"
        " attention flat."
    ),
)
claims.verdict("10.tiled_attention_is_linear", slope["tiled by hand"])

# %% tags=["nbval-ignore-output"]
q, k, v = torch.randn(3, 2, lengths[-2], 64).unbind(0)
timed = {n: measure.Arm(torch.no_grad()(lambda a=a: a(q, k, v)), n) for n, a in ways.items()}
for name in list(ways)[1:]:
    print(measure.compare(timed["naive"], timed[name], seconds=SECONDS))
timed = None
measure.release()

# %% [markdown]
# Both tiled ways rise far less than the steep line: about linear against quadratic. The library's
# line may have a step, because it takes larger tiles for longer sequences. Read the times with
# care. Our tiles are driven from Python, many small calls; the library's run inside one kernel.
# Memory is saved by the algorithm, time by the fusion.
#
# ## The tool of the field: torch.compile
# It traces the Python code, writes the kernels, and folds, fuses and plans memory on the way. Its
# price is the compile time, so count it in: after how many calls does it pay?

# %% tags=["nbval-ignore-output"]
BATCH = 32
shirts = torch.randn(BATCH, 1, 28, 28)
if can_compile and not SMOKE:
    net = models.baseline()
    with torch.no_grad():
        fast_net = torch.compile(net)
        start = time.perf_counter()
        fast_net(shirts)
        compile_seconds = time.perf_counter() - start
        torch.testing.assert_close(fast_net(shirts), net(shirts), atol=1e-4, rtol=1e-4)
    arm = measure.Arm(torch.no_grad()(lambda: fast_net(shirts)), "compiled", batch=BATCH)
    against = measure.across(
        measure.Arm(torch.no_grad()(lambda: net(shirts)), "eager", batch=BATCH),
        arm,
        seconds=2 * SECONDS,
        processes=5,
    )
    print(against)
    saves = against.baseline_seconds - against.candidate_seconds
    pays = (
        f"pays after {compile_seconds / saves:,.0f} calls"
        if saves > 0 and against.low > 1
        else "never pays here"
    )
    print(f"compiled in {compile_seconds:.0f} s (less if the cache on disk was warm): {pays}")
    compiled_verdict = against
elif not can_compile:
    compiled_verdict = machine.skip("compiler", "torch.compile on a network")
else:
    compiled_verdict = machine.Skip(
        "profile", "compiling a network takes longer than all of smoke."
    )
claims.verdict("10.compile_is_43_percent_faster", compiled_verdict)

# %% [markdown]
# The assertion in the cell is the agreement with eager. A service that runs for days forgets the
# compile time; a script that is called once an hour does not, and a notebook that you restart all
# day even less.
#
# **Graph breaks.** What the compiler can't see through, it leaves to Python: it ends the graph
# there and begins a new one after it. Nothing is fused across. A branch on a *value* is the usual
# reason: the value is known only when the program runs.


# %%
def broken(x):
    y = torch.relu(x)
    if y.sum() > 100:
        y = y * 0.5
    return y + 1


def mended(x):
    y = torch.relu(x)
    y = torch.where(y.sum() > 100, y * 0.5, y)  # the choice is in the graph now
    return y + 1


for name, function in (("broken", broken), ("mended", mended)):
    found = torch._dynamo.explain(function)(torch.randn(64))
    print(f"{name}: {found.graph_count} graphs, {found.graph_break_count} breaks")
    torch.compiler.reset()
same = [torch.equal(broken(x), mended(x)) for x in (torch.ones(64), 10 * torch.ones(64))]
print("the same on both sides of the branch:", same)

# %% [markdown]
# `fullgraph=True` turns a break into an error, so that you find it before your users do:

# %% tags=["nbval-ignore-output"]
try:
    torch.compile(broken, fullgraph=True, backend="eager")(torch.randn(64))
except torch._dynamo.exc.Unsupported as error:
    print(
        f"{type(error).__name__}: {str(error).splitlines()[0]}"
    )  # the rest names files of this machine
else:
    raise AssertionError("the branch did not break the graph: the text must change")
torch.compiler.reset()

# %% [markdown]
# ## Measure: the same on a GPU
# On a GPU each operation is a *launch* as well, a few microseconds during which small kernels leave
# the GPU idle. Fusing saves trips and launches; a *CUDA graph* replays many launches as one.

# %% tags=["nbval-ignore-output"]
if machine.can("gpu"):
    on_gpu = torch.compile(chain)
    replayed = torch.compile(chain, mode="reduce-overhead")  # with CUDA graphs
    for n in (2**12, 2**18, 2**26):
        a, b = torch.randn(n, device="cuda"), torch.randn(n, device="cuda")
        eager_arm = measure.Arm(lambda: chain(a, b), f"eager, {n} numbers")
        for name, call in (("fused", on_gpu), ("fused, CUDA graph", replayed)):
            call(a, b)
            print(
                measure.compare(
                    eager_arm, measure.Arm(lambda call=call: call(a, b), name), seconds=SECONDS
                )
            )
    _, triton_code = run_and_get_code(torch.compile(chain), a, b)
    print("\n".join(line for line in triton_code[0].splitlines() if "tl." in line)[:1500])
else:
    print(machine.skip("gpu", "fusion by Triton and CUDA graphs"))

# %% [markdown]
# ## If yours shows no gain
# | You see | Because | Look at |
# |---|---|---|
# | the compiled chain is slower | the tensors are small: checks before each call cost more than the operations | the figure over sizes |
# | fusion gains less than the bytes say | everything fits the cache, or the operations are dear (`exp`, `tanh`) | *Break it* |
# | folding gains nothing | convolutions take nearly all the time, or the runtime had folded already (ONNX export does) | channels_last; chapter 11 |
# | `torch.compile` gains nothing on a network | most of it is convolutions, which are library calls either way | batch 1 with many small operators |
# | it is slow on every new input | a new shape: it compiles again | `dynamic=True`, or a few fixed shapes |
# | no compiler | `torch.compile` on a CPU writes C++ | `apt install g++`, `xcode-select --install` |
#
# ## Myth: fold in train mode
# The recipe is copied without its first line, `model.eval()`. Nothing raises.

# %%
conv, bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
block = lived_in(nn.Sequential(conv, bn))
fused = fold(conv, bn)
batch = 5 * torch.randn(16, 3, 16, 16)
with torch.no_grad():
    for mode in ("eval", "train"):
        block.train(mode == "train")
        answer = block(batch)
        print(
            f"against the block in {mode} mode: equal within 1e-4:"
            f" {bool((fused(batch) - answer).abs().max() < 1e-4)}"
        )

# %% [markdown]
# Whoever folds and goes on training has another network. Fold last, in eval mode; or, for training,
# leave BatchNorm alone.
#
# ## Myth: fold whatever stands behind a convolution
# The pass without `illegal`: it looks at the kind of the two modules and at nothing else.


# %%
def fold_blindly(model):
    traced = fx.symbolic_trace(copy.deepcopy(model))
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and isinstance(modules[node.target], nn.BatchNorm2d):
            before = node.args[0]
            if before.op == "call_module" and isinstance(modules[before.target], nn.Conv2d):
                traced.set_submodule(
                    before.target, fold(modules[before.target], modules[node.target])
                )
                node.replace_all_uses_with(before)
                traced.graph.erase_node(node)
    traced.recompile()
    return traced


for shared in (True, False):
    net = lived_in(Twice(shared))
    with torch.no_grad():
        blind, careful = (
            float((m(picture) - net(picture)).abs().max())
            for m in (fold_blindly(net), fold_all(net)[0])
        )
    name = "called twice" if shared else "a second reader"
    print(f"{name}: blindly equal {blind < 1e-4}, with the check equal {careful < 1e-4}")

# %% [markdown]
# It runs, and the answers are wrong. A residual network in which the *sum* reads the convolution
# directly is such a case.
#
# ## Myth: look the layer up in a Transformer
# `fx.Transformer` walks through a graph and lets you replace calls. A circulating version finds the
# convolution through `args[0]`.


# %%
class Circulating(fx.Transformer):
    def call_module(self, target, args, kwargs):
        layer = self.fetch_attr(target)
        if isinstance(layer, nn.BatchNorm2d) and isinstance(args[0], fx.Node):
            return args[0]  # "already folded into the convolution"
        return super().call_module(target, args, kwargs)


done = Circulating(fx.symbolic_trace(resnet)).transform()
print("BatchNorms left:", batchnorms(done), "of", batchnorms(resnet))

# %% [markdown]
# Nothing happened, and nothing was said. In a Transformer `args` holds *proxies*, stand-ins for
# values; the node they stand for is in `args[0].node`, and the test above is never true. A pass
# needs a check of its own: count what you meant to remove.
#
# ## Exercise A · the folded bias
# Complete the line. `folded_bias(conv, bn)` returns $b'$, a tensor with one number a channel: the
# bias of the convolution that computes `bn(conv(x))`; the weight is scaled as in `fold`. The
# convolution may have no bias, the BatchNorm no weight and shift (`affine=False`: both are None).
# For one channel with $b = 1$, $\mu = 3$, $\sigma^2 + \varepsilon = 4$, $\gamma = 2$, $\beta = 5$ a
# right answer is 3.


# %% tags=["exercise"]
def folded_bias(conv, bn):
    factor = (bn.weight if bn.affine else 1.0) / torch.sqrt(bn.running_var + bn.eps)
    return ...


# %%
exercises.check("10.A", folded_bias)

# %% [markdown] tags=["hint"]
# Put $x = 0$ into both sides of the equation: what is left is $b'$.

# %% [markdown] tags=["hint"]
# `conv.bias` may be None. Then it counts as 0, but the running mean is still there.


# %% tags=["solution"]
def folded_bias(conv, bn):
    factor = (bn.weight if bn.affine else 1.0) / torch.sqrt(bn.running_var + bn.eps)
    bias = 0.0 if conv.bias is None else conv.bias
    shift = bn.bias if bn.affine else 0.0
    return (bias - bn.running_mean) * factor + shift


# %% tags=["wrong"]
# Forgets the convolution's own bias: right for every network without one.
def folded_bias(conv, bn):
    factor = (bn.weight if bn.affine else 1.0) / torch.sqrt(bn.running_var + bn.eps)
    return -bn.running_mean * factor + (bn.bias if bn.affine else 0.0)


# %% tags=["wrong"]
# Adds the bias after scaling.
def folded_bias(conv, bn):
    factor = (bn.weight if bn.affine else 1.0) / torch.sqrt(bn.running_var + bn.eps)
    bias = 0.0 if conv.bias is None else conv.bias
    return bias - bn.running_mean * factor + (bn.bias if bn.affine else 0.0)


# %% tags=["wrong"]
# eps outside the root: visible where the variance is tiny.
def folded_bias(conv, bn):
    factor = (bn.weight if bn.affine else 1.0) / (torch.sqrt(bn.running_var) + bn.eps)
    bias = 0.0 if conv.bias is None else conv.bias
    return (bias - bn.running_mean) * factor + (bn.bias if bn.affine else 0.0)


# %% tags=["wrong"]
# Takes weight and shift for granted: the edge is affine=False.
def folded_bias(conv, bn):
    factor = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    bias = 0.0 if conv.bias is None else conv.bias
    return (bias - bn.running_mean) * factor + bn.bias


# %% [markdown] tags=["instructor"]
# 8 minutes. Do the example on the board first: (1 − 3) · 2 / 2 + 5. Whoever forgets the bias passes
# on every torchvision ResNet, whose convolutions have none.

# %% [markdown]
# ## Exercise B · fold only where it is legal
# Write `fold_legal(model)` without looking up: a GraphModule with the same outputs in which every
# `nn.BatchNorm2d` that may be folded into the `nn.Conv2d` before it is gone, with nothing in its
# place, and every other still there. In train mode raise `ValueError`. In a model in eval mode, a
# BatchNorm that uses its batch all the same stays: one that alone is in train mode, and one without
# running statistics (`running_mean` is None). One that is called behind several convolutions may
# stay or go. The given model stays as it is. You may use
# `torch.nn.utils.fusion.fuse_conv_bn_eval(conv, bn)` for the algebra. For `Sequential(Conv2d,
# BatchNorm2d)` in eval mode a right answer has no BatchNorm left and the same outputs.


# %% tags=["exercise"]
def fold_legal(model): ...


# %%
exercises.check("10.B", fold_legal)

# %% [markdown] tags=["hint"]
# `torch.fx.symbolic_trace(copy.deepcopy(model))` gives the graph; `dict(traced.named_modules())`
# the modules; `node.args[0]` the node before.

# %% [markdown] tags=["hint"]
# Three questions for each BatchNorm: is a `call_module` of a Conv2d before it? Is that module
# called once in the whole graph? Has that node one user?

# %% [markdown] tags=["hint"]
# `traced.set_submodule(name, module)`, `node.replace_all_uses_with(before)`,
# `traced.graph.erase_node(node)`, and at the end `traced.recompile()`.


# %% tags=["solution"]
def fold_legal(model):
    import copy

    from torch import fx

    if model.training:
        raise ValueError("call eval() first: in train mode BatchNorm uses its batch.")
    traced = fx.symbolic_trace(copy.deepcopy(model))
    modules = dict(traced.named_modules())
    targets = [n.target for n in traced.graph.nodes if n.op == "call_module"]
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d):
            continue
        before, bn = node.args[0], modules[node.target]
        if bn.training or bn.running_mean is None:
            continue
        if before.op != "call_module" or not isinstance(modules[before.target], nn.Conv2d):
            continue
        if targets.count(before.target) > 1 or len(before.users) > 1:
            continue
        fused = torch.nn.utils.fusion.fuse_conv_bn_eval(modules[before.target], bn)
        traced.set_submodule(before.target, fused)
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
    traced.recompile()
    return traced


# %% tags=["wrong"]
# Never asks who else reads the convolution.
def fold_legal(model):
    import copy

    from torch import fx

    if model.training:
        raise ValueError("call eval() first.")
    traced = fx.symbolic_trace(copy.deepcopy(model))
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and isinstance(modules[node.target], nn.BatchNorm2d):
            before = node.args[0]
            if before.op == "call_module" and isinstance(modules[before.target], nn.Conv2d):
                fused = torch.nn.utils.fusion.fuse_conv_bn_eval(
                    modules[before.target], modules[node.target]
                )
                traced.set_submodule(before.target, fused)
                node.replace_all_uses_with(before)
                traced.graph.erase_node(node)
    traced.recompile()
    return traced


# %% tags=["wrong"]
# Counts users, but not calls: a convolution that is called twice is scaled in both places.
def fold_legal(model):
    import copy

    from torch import fx

    if model.training:
        raise ValueError("call eval() first.")
    traced = fx.symbolic_trace(copy.deepcopy(model))
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and isinstance(modules[node.target], nn.BatchNorm2d):
            before = node.args[0]
            is_conv = before.op == "call_module" and isinstance(modules[before.target], nn.Conv2d)
            if is_conv and len(before.users) == 1:
                fused = torch.nn.utils.fusion.fuse_conv_bn_eval(
                    modules[before.target], modules[node.target]
                )
                traced.set_submodule(before.target, fused)
                node.replace_all_uses_with(before)
                traced.graph.erase_node(node)
    traced.recompile()
    return traced


# %% tags=["wrong"]
# Folds nothing: legal everywhere, and of no use.
def fold_legal(model):
    import copy

    from torch import fx

    if model.training:
        raise ValueError("call eval() first.")
    return fx.symbolic_trace(copy.deepcopy(model))


# %% tags=["wrong"]
# Puts the model into eval mode by itself instead of refusing: the edge.
def fold_legal(model):
    import copy

    from torch import fx

    traced = fx.symbolic_trace(copy.deepcopy(model).eval())
    modules = dict(traced.named_modules())
    targets = [n.target for n in traced.graph.nodes if n.op == "call_module"]
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d):
            continue
        before = node.args[0]
        if before.op != "call_module" or not isinstance(modules[before.target], nn.Conv2d):
            continue
        if targets.count(before.target) > 1 or len(before.users) > 1:
            continue
        fused = torch.nn.utils.fusion.fuse_conv_bn_eval(
            modules[before.target], modules[node.target]
        )
        traced.set_submodule(before.target, fused)
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
    traced.recompile()
    return traced


# %% [markdown] tags=["instructor"]
# 20 minutes. Draw the graph of the residual case before anyone types. A good question for the fast
# ones: may a BatchNorm *before* a convolution be folded into it? (Yes without padding; with padding
# the border is wrong.)

# %% [markdown]
# ## Exercise C · predict, then cut
# A kernel can hold only so much: a compiler fuses at most `limit` operations into one. Operation
# $i$ of a chain reads tensor $i$ and writes tensor $i + 1$; `sizes` has their bytes, one more than
# there are operations, of which there is one at least. A fused group reads its first tensor and
# writes its last; the others stay inside. Write `cuts(sizes, limit)` that returns `(lengths,
# gain)`: the lengths of the groups in order, with as few bytes moved as possible, and the predicted
# gain, bytes of one kernel an operation divided by bytes of your groups. For `sizes = [4, 8, 1, 4]`
# and a limit of 2 a right answer is `([2, 1], 2.6)`: 26 bytes against 10.


# %% tags=["exercise"]
def cuts(sizes, limit): ...


# %%
exercises.check("10.C", cuts)

# %% [markdown] tags=["hint"]
# A cut at tensor $i$ costs it twice, once written and once read; the two ends cost once each. So
# look for cheap places to cut.

# %% [markdown] tags=["hint"]
# Work from the left: the least that the first $k$ operations can cost is the smallest, over the
# length of the last group, of what comes before plus that group.


# %% tags=["solution"]
def cuts(sizes, limit):
    n = len(sizes) - 1
    least = [(0, [])]  # for the first k operations: bytes, lengths
    for k in range(1, n + 1):
        options = []
        for length in range(1, min(k, limit) + 1):
            cost, lengths = least[k - length]
            options.append((cost + sizes[k - length] + sizes[k], [*lengths, length]))
        least.append(min(options))
    alone = sum(sizes[i] + sizes[i + 1] for i in range(n))
    return least[n][1], alone / least[n][0]


# %% tags=["wrong"]
# As many as fit, from the left.
def cuts(sizes, limit):
    n = len(sizes) - 1
    lengths = [limit] * (n // limit) + ([n % limit] if n % limit else [])
    at, moved = 0, 0
    for k in lengths:
        moved += sizes[at] + sizes[at + k]
        at += k
    return lengths, sum(sizes[i] + sizes[i + 1] for i in range(n)) / moved


# %% tags=["wrong"]
# Always the best next cut: greedy.
def cuts(sizes, limit):
    n, at, lengths, moved = len(sizes) - 1, 0, [], 0
    while at < n:
        k = min(range(1, min(limit, n - at) + 1), key=lambda k: (sizes[at + k], -k))
        lengths.append(k)
        moved += sizes[at] + sizes[at + k]
        at += k
    return lengths, sum(sizes[i] + sizes[i + 1] for i in range(n)) / moved


# %% tags=["wrong"]
# Right groups, but each cut tensor is counted once: the gain is too good.
def cuts(sizes, limit):
    n = len(sizes) - 1
    least = [(sizes[0], [])]
    for k in range(1, n + 1):
        least.append(
            min(
                (least[k - g][0] + sizes[k], [*least[k - g][1], g])
                for g in range(1, min(k, limit) + 1)
            )
        )
    return least[n][1], sum(sizes) / least[n][0]


# %% tags=["wrong"]
# Forgets the limit: visible only when the chain is longer than it.
def cuts(sizes, limit):
    n = len(sizes) - 1
    return [n], sum(sizes[i] + sizes[i + 1] for i in range(n)) / (sizes[0] + sizes[-1])


# %% [markdown] tags=["instructor"]
# 20 minutes. The greedy answer passes on short chains; ask for a chain of four on which it fails.
# Compilers face the same question with branches in place of a chain, and use heuristics.

# %% [markdown]
# ## Break it
# Fusing saves trips. Make the operations *dear*, and trips no longer matter. Six operations by
# blocks against six at a time, cheap ones and dear ones.


# %% tags=["nbval-ignore-output"]
def six(x, operation):
    for _ in range(6):
        x = operation(x)
    return x


def six_by_blocks(x, operation, size=best):
    out = torch.empty_like(x)
    for a, o in zip(x.split(size), out.split(size), strict=True):
        o.copy_(six(a, operation))
    return out


# %% tags=["nbval-ignore-output"]
x = torch.rand(LONG // 4)
dear = {
    "add a number": lambda t: t + 0.1,
    "square root": torch.sqrt,
    "sine": torch.sin,
    "erf, as in GELU": torch.erf,
    "gamma function": torch.lgamma,
}
kept = {
    name: (
        measure.compare(
            lambda f=f: six(x, f),
            lambda f=f: six_by_blocks(x, f),
            seconds=SECONDS / 2,
            precision=0.03,
        ).interval
    )
    for name, f in dear.items()
}
low, high = min(kept, key=lambda n: kept[n].value), max(kept, key=lambda n: kept[n].value)
plots.intervals(
    kept,
    xlabel="speed-up of six operations by blocks (x)",
    title=f"From {kept[high].value:.1f}x ({high}) down to {kept[low].value:.2f}x ({low})",
    alt=(
        "Speed-ups of blocked over whole-tensor execution for operations of rising cost: falling"
        " towards one."
    ),
)

# %% [markdown]
# The bytes saved are the same in every row. What differs is how long the arithmetic takes beside
# them. On a CPU and with large tensors, fusion helps what waits for memory and nothing else (a GPU
# also saves launches): put an operation on the roofline before you fuse it.
#
# ## Exit quiz
# **1. `torch.relu(a + b)` on tensors far beyond the caches: fused, it moves**
# <details><summary>3 trips in place of 5</summary>Right: read a, read b, write; the sum stays
# inside.</details>
# <details><summary>2 in place of 4</summary>Two inputs have to be read.</details>
# <details><summary>the same, with less arithmetic</summary>The arithmetic is the same; the trips
# are not.</details>
#
# **2. Folding BatchNorm gained 5% here and 25% there. Most likely because**
# <details><summary>the second machine has more cores</summary>That alone changes both
# sides.</details>
# <details><summary>the second machine's convolutions are faster beside its memory</summary>Right:
# what is left over weighs more.</details>
# <details><summary>the statistics differ</summary>Values do not change the time.</details>
#
# **3. A convolution's output goes to a BatchNorm and to an Add. Folding**
# <details><summary>is legal in eval mode</summary>The Add would get normalised numbers.</details>
# <details><summary>changes what the Add gets</summary>Right: that is why users are
# counted.</details>
# <details><summary>is impossible in fx</summary>It is possible, and wrong.</details>
#
# **4. Tiled attention is slower than naive in your Python and uses less memory. This shows**
# <details><summary>that tiling saves memory, and that loops in Python cost
# time</summary>Right.</details>
# <details><summary>that flash attention is slow</summary>Its tiles run inside one kernel.</details>
# <details><summary>a wrong softmax</summary>The results agree within rounding.</details>
#
# **5. `torch.compile` takes 20 s and saves 1 ms a call. It pays after**
# <details><summary>20 calls</summary>A thousandth of that is saved.</details>
# <details><summary>20,000 calls</summary>Right.</details>
# <details><summary>the first call</summary>The first call is the one that compiles.</details>
#
# **Key points** · count trips, not operations · fusing pays from a size on · fold in eval mode, one
# reader, one call · softmax can be computed in pieces with a running maximum · a graph break ends a
# fusion · compile time belongs to the bill.
#
# **Sources** · S. Williams et al., *Roofline*, 2009 · J. Ansel et al., *PyTorch 2*, 2024 · J. Reed
# et al., *torch.fx*, 2022 · M. Milakov, N. Gimelshein, *Online normalizer calculation for softmax*,
# 2018 · T. Dao et al., *FlashAttention*, 2022 · PyTorch's [tutorial on fusing convolution and batch
# norm](https://docs.pytorch.org/tutorials/intermediate/fx_conv_bn_fuser.html) and
# [torch.compile](https://docs.pytorch.org/docs/stable/torch.compiler.html).
#
# **For the capstone** row 10 of your ledger, *fusion*, says what folding and compiling gain on this
# machine. Next: [11 · Runtimes](11_runtimes.ipynb), programs that do all of this when they load a
# graph.
