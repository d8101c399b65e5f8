# %% [markdown]
# # 10 · Operator fusion
#
# **Why does a network spend its time carrying numbers about, and which operations can share one
# trip?**
#
# After this chapter you can: *count* the bytes that a chain of operations moves · *predict* what
# fusing it gains, and where it gains nothing · *write* a fused kernel, and a graph pass that folds
# BatchNorm only where that is legal · *read* what `torch.compile` generated: threads, breaks,
# recompiles · *count* its compile time in.
#
# 87 minutes · before this: 1 Measurement; 6 and 8 help · runs on any CPU
#
# Packages: onnx, onnxruntime, onnxscript

# %% tags=["parameters"]
import os

PROFILE = os.environ.get("COURSE_PROFILE", "fast")

# %% tags=["nbval-ignore-output"]
import ctypes
import math
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from course_utils import claims, compiled, exercises, machine, measure, models, plots, scratch

SMOKE = PROFILE == "smoke"
SECONDS = {"smoke": 0.1, "fast": 1.5, "full": 8.0}[PROFILE]  # for one comparison
MIB, FOLDER = 2**20, Path(os.path.relpath(scratch("10")))
machine.card()

# %% [markdown]
# ## Recall
# 1. (Chapter 1) On the roofline, what limits an operation with few operations a byte?
#    <details><summary>Answer</summary>The memory: it can't be faster than its bytes divided by the
#    bandwidth.</details>
# 2. (Chapter 6) Why was BatchNorm folded into the convolution before quantizing?
#    <details><summary>Answer</summary>So that the output is rounded once, after everything: one
#    layer in place of two.</details>
#
# ## Predict
# Five pointwise operations in a row, on two tensors of `32 MiB`, run as one pass over memory in
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
# Eager PyTorch runs it as five operations. Each reads its inputs from memory and writes its output
# there, and the next one reads that again. A *dispatch mode* sees every operation on its way to a
# kernel. Let it add up the bytes.

# %%
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """Adds up the bytes that operations read and write; one that only makes a view moves none."""

    def __init__(self):
        super().__init__()
        self.bytes, self.calls = 0, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = [a for a in args if isinstance(a, torch.Tensor)]
        made = list(result) if isinstance(result, tuple | list) else [result]
        made = [t for t in made if isinstance(t, torch.Tensor)]
        owners = {a.untyped_storage().data_ptr() for a in given}
        view = bool(made) and all(t.untyped_storage().data_ptr() in owners for t in made)
        if not view or function._schema.is_mutable:
            self.bytes += sum(t.nbytes for t in given + made)
            self.calls[function._schema.name.removeprefix("aten::")] += 1
        return result


# %%
x, r = torch.randn(1000), torch.randn(1000)
for name, call in {
    "chain": lambda: chain(x, r),
    "relu": lambda: torch.relu(x),
    "relu_": lambda: torch.relu_(x),
}.items():
    with Traffic() as seen:
        call()
    print(f"{name:6} {dict(seen.calls)} moves {seen.bytes / x.nbytes:g} times the bytes of x")

# %% [markdown]
# Call one tensor's way to or from memory a *trip*. The chain makes twelve: three operations with
# one input (read, write), two with two inputs (read, read, write). What had to move? `x` and `r`
# in, `y` out: three. The other nine carry numbers that nobody asked for. **Fusing** means one pass
# over memory, in which everything in between stays in registers or in the cache.
#
# An operation *in place*, such as `relu_`, is not fused: it saves the second tensor, not a trip.
#
# ## From scratch: fuse by blocks
# You can have most of that without a compiler. Take a piece so small that it stays in the cache,
# run all five operations on it, then go on to the next piece.


# %%
def by_blocks(x, r, size=2**16):
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
# The same operations in the same order on the same numbers, so the same bits. How large a block
# should be is measured under *Further*.
#
# ## Measure: trips or arithmetic?
# Which of the two is the time? Tell them apart with a kernel that you can set. `together ×
# passes` is its arithmetic, `2 × passes` its trips.

# %%
KERNELS = Path(compiled.__file__).with_name("kernels")
print((KERNELS / "passes.cpp").read_text())

# %% [markdown]
# `compiled.library` gives the file to `torch.utils.cpp_extension`, torch's tool for kernels of your
# own, and loads the result ([how](../course_utils/compiled.py)). Below, one thread; the output is
# there before the clock starts, so that no pages have to be handed out.

# %% tags=["nbval-ignore-output"]
LONG = 2**18 if SMOKE else 2**23  # numbers in a tensor
POINTER, WHOLE = ctypes.c_void_p, ctypes.c_int64
missing = next((what for what in ("compiler", "package:ninja") if not machine.can(what)), None)


def kernel(name, *types):
    """The function `run` of NAME.cpp, for arguments of these types."""
    run = compiled.library(KERNELS / f"{name}.cpp", FOLDER).run
    run.argtypes = types
    return run


x, y = torch.rand(2 * LONG), torch.empty(2 * LONG)
if missing:
    print(machine.skip(missing, "kernels in C++"))
else:
    run_passes = kernel("passes", POINTER, POINTER, WHOLE, ctypes.c_int, ctypes.c_int)

# %% tags=["nbval-ignore-output"]
DOSES = (1, 2, 4, 8, 16)


def look(call):
    """Milliseconds of a call, one thread, within this process."""
    median = measure.latency(call, seconds=SECONDS / 8, threads=1).median
    return measure.derive(lambda s: 1e3 * s, median, unit="ms")


def passes(together, times):
    return look(lambda: run_passes(x.data_ptr(), y.data_ptr(), len(x), together, times))


# %% tags=["nbval-ignore-output"]
if not missing:
    lines = {
        "a trip there and back for each": [passes(1, k) for k in DOSES],
        "one for all": [passes(k, 1) for k in DOSES],
    }
    same_work = {f"{2 * 16 // k} trips": passes(k, 16 // k) for k in DOSES}
    print("16 operations on each number:", {k: f"{v.value:.3g} ms" for k, v in same_work.items()})

# %% tags=["nbval-ignore-output"]
if not missing:
    apart, together = (line[-1].value / line[0].value for line in lines.values())
    plots.lines(
        DOSES,
        lines,
        xlabel="operations on each number",
        ylabel="time (ms)",
        logx=True,
        logy=True,
        title=f"16 times the operations: {apart:.1f}x the time with 16 times the trips,"
        f" {together:.1f}x with the same",
        alt="Time against operations: with a trip for each it climbs, with one trip it stays low.",
    )

# %% [markdown]
# Up and down, the arithmetic is the same and only the trips differ. Along the lower line, the trips
# are the same and only the arithmetic differs. If arithmetic were the time, the lines would lie on
# each other. The printed row has one amount of arithmetic and ever fewer trips: does the time halve
# with them?
#
# ## Explain: what follows, and whether it holds here
# If trips are the time, an operation that does *more* with each number costs the same. That is what
# Horace He concludes (2022): "This is why activation functions are nearly all the same cost,
# despite `gelu` obviously consisting of many more operations than `relu`." He speaks of GPUs. GELU
# contains an error function, some twenty operations. It could cost what ReLU costs, or ten times
# that.

# %% tags=["nbval-ignore-output"]
x, y = torch.randn(LONG), None  # large tensors go when they are not needed
how = {"seconds": SECONDS, "processes": 5, "threads": 1}
gelu = measure.across(lambda: F.gelu(x), lambda: torch.relu(x), **how)
print("GELU takes", gelu.interval, "of ReLU's time:", gelu.scope)
few = x[: 2**15].clone()
arithmetic = (lambda: F.gelu(few)), (lambda: torch.relu(few))
cached = measure.compare(*arithmetic, seconds=SECONDS / 4, threads=1)
print("the same in the cache:", cached.interval, cached.scope)
claims.verdict("10.activations_cost_the_same", gelu)

# %% [markdown]
# In the cache trips are nearly free, and you see the arithmetic alone. From memory, is the ratio
# nearer to 1? Then trips hide arithmetic, as He says; if not, his reason does not hold here. Where
# they do not hide all of it, one core has too few operations a second for its memory: on the
# roofline GELU has passed the ridge. All cores share one memory, so with `threads=None` trips weigh
# more.
#
# ## The tool of the field: torch.compile
# A compiler does better than blocks: everything in between stays in registers. `torch.compile`
# writes C++ for a CPU (Triton for a GPU), and needs a C++ compiler. Its work is kept in a cache on
# disk, so that a time "to compile" is often a time to look up. Give it an empty cache first.

# %% tags=["nbval-ignore-output"]
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no worker processes beside the kernel
if not SMOKE:  # smoke tests that everything runs, and may look up
    compiled.empty_cache(FOLDER / "inductor")
    measure.fresh.end()  # processes that know the old folder
can_induct = machine.can("compiler")
measure.release()  # to the system, what is not needed any more
x, r = torch.randn(LONG), torch.randn(LONG)


def seconds_of(call):
    start = time.perf_counter()
    return call(), time.perf_counter() - start


if can_induct:
    program, took = seconds_of(lambda: compiled.generated(chain, x, r))
    _, again = seconds_of(lambda: compiled.generated(chain, x, r))
    print(f"empty cache: {took:.1f} s; again, from the cache: {again:.1f} s")
    print(compiled.loop(program))
else:
    print(machine.skip("compiler", "torch.compile; blocks stand for it"))

# %% [markdown]
# Two `loadu`, arithmetic on vector registers, one `store`: three trips. (Some seconds of the first
# time are for the compiler itself: it asks your processor what it can do.)
#
# The rule of chapter 1 is that both arms have the same threads. Inductor chooses them when it
# compiles, from the size of the first call. So look.

# %% tags=["nbval-ignore-output"]
if can_induct:
    few = torch.randn(256)
    for name, inputs in {"256 numbers": (few, few), f"{LONG:,} numbers": (x, r)}.items():
        program = compiled.generated(chain, *inputs)
        print(f"{name}: more than one thread {compiled.PARALLEL in program}")
    print("threads of the eager arm:", torch.get_num_threads())

# %% [markdown]
# A function that was first called with something small and is then timed on something large has one
# thread, and eager has all. `compiled.Compiled` therefore compiles in each process at the first
# call, which is at the size that is timed, and never for "any size". Now the comparison.

# %% tags=["nbval-ignore-output"]
fused = compiled.Compiled(chain) if can_induct else by_blocks
last = measure.across(lambda: chain(x, r), lambda: fused(x, r), seconds=SECONDS, processes=5)
print(last)
exercises.reveal("10.chain", last.ratio, "times")
claims.verdict("10.fusion_gains_by_its_bytes", measure.derive(lambda s: s / 4, last.interval))

# %% [markdown]
# The claim predicts $12/3 = 4$. What is not in the count: before a processor writes a line of
# memory, it mostly reads it first (*write-allocate*), which makes 17 against 4. Both ratios are
# within the band. Blocks, for comparison, and smaller tensors:

# %% tags=["nbval-ignore-output"]
numbers = [2**10, LONG] if SMOKE else [2**10, 2**17, LONG]
arms = {"compiled": compiled.Compiled, "by blocks": lambda _: by_blocks}
gain = {name: [] for name in arms if can_induct or name == "by blocks"}
for n in numbers:
    a, b = x[:n], r[:n]
    for name in gain:
        call = arms[name](chain)
        both = (lambda: chain(a, b)), (lambda call=call: call(a, b))
        gain[name].append(measure.compare(*both, seconds=SECONDS / 3, precision=0.05))

# %% tags=["nbval-ignore-output"]
main = next(iter(gain))
crossover = next((n for n, c in zip(numbers, gain[main], strict=True) if c.low > 1), None)
title = f"{main.capitalize()}: {gain[main][-1].ratio:.1f}x at {4 * LONG / MIB:g} MiB; " + (
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
    alt="Speed-up against size for the compiled chain and for blocks, with a line at 4.",
)

# %% [markdown]
# At the left a call's fixed cost is all there is: compiled code checks its inputs before each call
# (*guards*). Then everything fits a cache, whose trips are cheap. Only at the right do the tensors
# come from memory.
#
# ## From scratch: a kernel for a reduction
# *RMSNorm* divides each row of $n$ numbers by the root of its mean square and multiplies by a
# weight $w$. It is the normalisation of most language models. A sum over the row must be complete
# before the first output: that ends a pointwise pass. But a *row* fits the cache, so the second
# pass over it needs no trip.


# %%
def naive(x, w):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w


# %%
print((KERNELS / "rms.cpp").read_text())

# %% tags=["nbval-ignore-output"]
if not missing:
    run_rms = kernel("rms", POINTER, POINTER, POINTER, WHOLE, WHOLE)


def mine(x, w, out):
    run_rms(x.data_ptr(), w.data_ptr(), out.data_ptr(), *x.shape)
    return out


# %% tags=["nbval-ignore-output"]
rows, w = x.view(-1, 1024), torch.randn(1024)
ways = {
    "naive": lambda: naive(rows, w),
    "F.rms_norm": lambda: F.rms_norm(rows, (1024,), w, 1e-6),
}
for name, way in ways.items():
    with Traffic() as seen:
        way()
    print(f"{name}: {seen.bytes / rows.nbytes:.1f} trips; needed: 2")

# %% tags=["nbval-ignore-output"]
if not missing:
    out, naive_way = torch.empty_like(rows), ways.pop("naive")
    print("equal within 1e-5:", torch.allclose(mine(rows, w, out), naive(rows, w), atol=1e-5))
    by_inductor = compiled.Compiled(naive)
    ways["torch.compile"] = lambda: by_inductor(rows, w)
    ways["by hand, in C++"] = lambda: mine(rows, w, out)
    for name, way in ways.items():
        seen = measure.compare(naive_way, way, threads=1, seconds=SECONDS / 2)
        print(f"{name:16} {seen.interval} over naive, one thread, {seen.scope}")
measure.fresh.end()  # the processes that wait for comparisons
measure.release()

# %% [markdown]
# Does your kernel reach the ratio of the trips, and the compiler yours? A library's function need
# not be fused because it has one name: the second printed line tells. The same kernel for a GPU is
# written in *Triton*, a language inside Python. A *program* handles one row; `tl.load` and
# `tl.store` are the trips. You need no GPU to test it: `TRITON_INTERPRET=1` runs it in NumPy.

# %% tags=["nbval-ignore-output"]
# %%writefile "$FOLDER/rms_triton.py"
import torch
import triton
import triton.language as tl


@triton.jit
def rms(x, w, out, n, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    inside = at < n
    v = tl.load(x + row * n + at, mask=inside, other=0.0)
    scale = tl.rsqrt(tl.sum(v * v) / n + 1e-6)
    weight = tl.load(w + at, mask=inside, other=0.0)
    tl.store(out + row * n + at, v * scale * weight, mask=inside)


x, w = torch.randn(6, 100), torch.randn(100)
out = torch.empty_like(x)
rms[(6,)](x, w, out, 100, BLOCK=128)  # six programs, one a row
due = torch.nn.functional.rms_norm(x, (100,), w, 1e-6)
print("Triton, interpreted: equal within 1e-5:", torch.allclose(out, due, atol=1e-5))

# %% tags=["nbval-ignore-output"]
if machine.can("package:triton"):
    how = {"env": os.environ | {"TRITON_INTERPRET": "1"}, "capture_output": True, "text": True}
    ran = subprocess.run([sys.executable, FOLDER / "rms_triton.py"], **how)
    print(ran.stdout or ran.stderr[-300:])
else:
    print(machine.skip("package:triton", "the kernel in Triton; C++ carries the part"))

# %% [markdown]
# `inside` is for rows that do not fill the block: without it the kernel reads its neighbour's row.
#
# ## From scratch: fold a BatchNorm
# Some fusions need no new kernel. In inference BatchNorm is a multiplication and an addition for
# each channel, with constants. A convolution multiplies and adds as well. Write $W$ and $b$ for its
# weight and bias, $\mu, \sigma^2, \gamma, \beta$ for BatchNorm's running mean and variance, scale
# and shift, and $\varepsilon$ for the small number (`bn.eps`) that keeps the root above zero:
#
# $$\gamma\,\frac{(W x + b) - \mu}{\sqrt{\sigma^2 + \varepsilon}} + \beta \;=\;
# \underbrace{\tfrac{\gamma}{\sqrt{\sigma^2 + \varepsilon}} W}_{W'}\; x \;+\; b'$$
#
# What $b'$ is, is for you.

# %% [markdown]
# ## Exercise A · the folded bias
# Complete the line. `folded_bias(conv, bn)` returns $b'$, a tensor with one number a channel: the
# bias of the convolution that computes `bn(conv(x))`; the weight is scaled to $W'$. The
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
# 6 minutes. Do the example on the board first: (1 − 3) · 2 / 2 + 5. Whoever forgets the bias passes
# on every torchvision ResNet, whose convolutions have none.

# %% [markdown]
# ## From scratch: a graph to fold in
# To fold a whole network you need it as a *graph*. `torch.export` runs the model once with
# stand-ins and writes down every operation. Weights become nodes (`get_attr`), a BatchNorm is one
# call whose arguments say all: weight, shift, mean, variance, *training*, momentum, eps.


# %%
def lived_in(model, side=64):
    """The model in eval mode after some batches in train mode, so that its BatchNorms have
    statistics worth folding.
    """
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(8, 3, side, side) * 2 + 1)
    return model.eval()


class Twice(nn.Module):
    """One convolution, called twice; a BatchNorm behind the second call."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.conv(self.conv(x)))


# %% tags=["nbval-ignore-output"]
torch.manual_seed(0)
twice, picture = lived_in(Twice(), 16), torch.randn(2, 3, 16, 16)
for node in torch.export.export(twice, (picture,)).module().graph.nodes:
    if node.op != "call_module" and "tracked" not in node.name:
        reads = [str(a) for a in node.args if isinstance(a, fx.Node)]
        print(f"{node.op:14} {node.name:16} reads {reads}, read by {len(node.users)}")

# %% [markdown]
# Find the weight that is read by two. If you scale it for the BatchNorm, the *first* call is scaled
# too, and nobody asked for that. Folding is legal if
# 1. the BatchNorm uses its running statistics, not those of the batch;
# 2. nobody but the BatchNorm reads the convolution's output;
# 3. whoever reads the weight wants it folded, and in the same way.
#
# ## Myth: the library knows when
# torch has a pass that folds, `fuse` (PyTorch's fx tutorial builds the same one). Try it on this
# network.

# %%
from torch.fx.experimental.optimization import fuse


def differs(a, b, x):
    with torch.no_grad():
        return float((a(x) - b(x)).abs().max())


once = lived_in(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)), 16)
print("one call, equal within 1e-5:", differs(fuse(once), once, picture) < 1e-5)
print("two calls, equal within 1e-5:", differs(fuse(twice), twice, picture) < 1e-5)

# %% [markdown]
# It runs, it says nothing, and the answers are wrong. It asks the first two questions and not the
# third. So write a better one.

# %% [markdown]
# ## Exercise B · fold only where it is legal
# `program` is what `torch.export.export(model, (x,)).module()` gives. `fold_legal(program)` returns
# a copy that computes the same, in which every `aten.batch_norm` that may be folded into the
# `aten.conv2d` before it is gone, and every other is still there. The work on the graph is done for
# you: `folding.fold_where(program, legal)` folds into every node of a copy for which `legal(node)`
# is true. Write the question. `partner(node)`: of the BatchNorm behind a conv2d, `(weight, shift,
# mean, variance, eps)`, if rules 1 and 2 hold, and otherwise None. `legal(node)` adds rule 3: every
# reader of its weight has the same partner.
#
# So a convolution that is called twice is folded where the same BatchNorm follows both times. A
# weight that a second convolution shares, with another BatchNorm or none, stays: folded, it would
# have to be stored twice.
#
# For `Sequential(Conv2d, BatchNorm2d)` in eval mode a right answer has no BatchNorm left and the
# same outputs.


# %% tags=["exercise"]
def fold_legal(program):
    from course_utils import folding

    def partner(node): ...

    def legal(node): ...

    return folding.fold_where(program, legal)


# %%
exercises.check("10.B", fold_legal)

# %% [markdown] tags=["hint"]
# `node.target is folding.CONV2D` tells what a node is, `list(node.users)` who reads it. The other
# one is `folding.BATCH_NORM`. A placeholder's target is a text. `batch_norm`'s arguments: x,
# weight, shift, mean, variance, training, momentum, eps.

# %% [markdown] tags=["hint"]
# Two BatchNorms are the same if they read the same nodes and have the same eps: compare the tuples.
# `node.args[1].users` are the weight's readers; `partner` of a node that is no conv2d is None.


# %% tags=["solution"]
def fold_legal(program):
    from course_utils import folding

    def partner(node):
        if node.target is not folding.CONV2D or len(node.users) != 1:
            return None
        norm = next(iter(node.users))
        if norm.target is not folding.BATCH_NORM:
            return None
        _, weight, shift, mean, variance, batch, _, eps, _ = norm.args
        return None if batch else (weight, shift, mean, variance, eps)

    def legal(node):
        mine = partner(node)
        return mine is not None and all(partner(r) == mine for r in node.args[1].users)

    return folding.fold_where(program, legal)


# %% tags=["wrong"]
# Never asks who else reads the convolution's output.
def fold_legal(program):
    from course_utils import folding

    def partner(node):
        if node.target is not folding.CONV2D or not node.users:
            return None
        norm = next(iter(node.users))
        if norm.target is not folding.BATCH_NORM:
            return None
        _, weight, shift, mean, variance, batch, _, eps, _ = norm.args
        return None if batch else (weight, shift, mean, variance, eps)

    def legal(node):
        mine = partner(node)
        return mine is not None and all(partner(r) == mine for r in node.args[1].users)

    return folding.fold_where(program, legal)


# %% tags=["wrong"]
# Asks rules 1 and 2 only: a weight with two readers is folded for one of them.
def fold_legal(program):
    from course_utils import folding

    def partner(node):
        if node.target is not folding.CONV2D or len(node.users) != 1:
            return None
        norm = next(iter(node.users))
        if norm.target is not folding.BATCH_NORM:
            return None
        _, weight, shift, mean, variance, batch, _, eps, _ = norm.args
        return None if batch else (weight, shift, mean, variance, eps)

    def legal(node):
        mine = partner(node)
        return mine is not None

    return folding.fold_where(program, legal)


# %% tags=["wrong"]
# Every reader has a BatchNorm, but not the same one.
def fold_legal(program):
    from course_utils import folding

    def partner(node):
        if node.target is not folding.CONV2D or len(node.users) != 1:
            return None
        norm = next(iter(node.users))
        if norm.target is not folding.BATCH_NORM:
            return None
        _, weight, shift, mean, variance, batch, _, eps, _ = norm.args
        return None if batch else (weight, shift, mean, variance, eps)

    def legal(node):
        mine = partner(node)
        return mine is not None and all(partner(r) is not None for r in node.args[1].users)

    return folding.fold_where(program, legal)


# %% tags=["wrong"]
# Folds nothing that is called twice, not even where it is exact.
def fold_legal(program):
    from course_utils import folding

    def partner(node):
        if node.target is not folding.CONV2D or len(node.users) != 1:
            return None
        norm = next(iter(node.users))
        if norm.target is not folding.BATCH_NORM:
            return None
        _, weight, shift, mean, variance, batch, _, eps, _ = norm.args
        return None if batch else (weight, shift, mean, variance, eps)

    def legal(node):
        mine = partner(node)
        return mine is not None and len(node.args[1].users) == 1

    return folding.fold_where(program, legal)


# %% tags=["wrong"]
# Does not look whether BatchNorm uses its batch: the edge is one that alone is in train mode.
def fold_legal(program):
    from course_utils import folding

    def partner(node):
        if node.target is not folding.CONV2D or len(node.users) != 1:
            return None
        norm = next(iter(node.users))
        if norm.target is not folding.BATCH_NORM:
            return None
        _, weight, shift, mean, variance, _, _, eps, _ = norm.args
        return None if mean is None else (weight, shift, mean, variance, eps)

    def legal(node):
        mine = partner(node)
        return mine is not None and all(partner(r) == mine for r in node.args[1].users)

    return folding.fold_where(program, legal)


# %% tags=["wrong"]
# Folds nothing: legal everywhere, and of no use.
def fold_legal(program):
    import copy

    return copy.deepcopy(program)


# %% [markdown] tags=["instructor"]
# 12 minutes. Draw the graph of `Twice` before anyone types. A good question for the fast ones: may
# a BatchNorm *before* a convolution be folded into it? (Yes without padding; with padding the
# border is wrong.)

# %% [markdown]
# ## Measure: what folding gains
# The README of a [package that folds](https://github.com/oulu-imeds/pytorch_bn_fusion) says
# "expected boost is 30%!"; 10 to 30% are repeated widely. Both arms are traced, so that they differ
# by BatchNorm and nothing else: tracing alone turns `out += identity` into an addition that makes a
# new tensor. One thread.

# %% tags=["nbval-ignore-output"]
from torchvision.models import resnet18

x = r = rows = out = a = b = ways = None
torch.manual_seed(0)
resnet, side = lived_in(resnet18()), 64 if SMOKE else 224
traced, folded = fx.symbolic_trace(resnet), fuse(resnet)  # no weight is shared here
print("equal within 1e-4:", differs(traced, folded, torch.randn(1, 3, side, side)) < 1e-4)
photo = torch.randn(1, 3, side, side)
pair = measure.arm(traced, photo, "traced"), measure.arm(folded, photo, "folded")
shown = measure.across(*pair, seconds=2 * SECONDS, processes=5, threads=1)
print(shown)
exercises.reveal("10.folding", shown.ratio, "times")
claims.verdict("10.folding_gives_10_to_30_percent", shown)

# %% [markdown]
# How many of the network's bytes went away?

# %% tags=["nbval-ignore-output"]
moved = {}
for name, net in (("before", traced), ("after", folded)):
    with torch.inference_mode(False), torch.no_grad(), Traffic() as seen:
        net(photo)
    moved[name] = seen.bytes
print(f"{100 * (1 - moved['after'] / moved['before']):.0f}% of the bytes,", end=" ")
print(measure.derive(lambda s: 100 * (1 - 1 / s), shown.interval, unit="% of the time"))

# %% [markdown]
# Is the share of the time smaller than that of the bytes? Then the rest waits for something else:
# convolutions wait for arithmetic, and they are most of the time. BatchNorm's own arithmetic, two
# operations a number, is next to nothing beside theirs.
#
# ## Measure: a whole network, compiled
# "Across these 163 open-source models torch.compile works 93% of time, and the model runs 43%
# faster in training on an NVIDIA A100 GPU", says the PyTorch 2.0 announcement (2022). Here: this
# course's network in inference, batch 32, one thread, hot calls (no other model in between but the
# eager one, in turns).

# %% tags=["nbval-ignore-output"]
BATCH, net, fast_net = 32, models.baseline(), compiled.Compiled(models.baseline())
shirts = torch.randn(BATCH, 1, 28, 28)
if not can_induct:
    compiled_verdict = machine.skip("compiler", "torch.compile on a network")
elif SMOKE:
    reason = "compiling a network takes longer than all the rest of smoke."
    compiled_verdict = machine.Skip("profile", reason)
else:
    with torch.inference_mode():
        _, compile_seconds = seconds_of(lambda: fast_net(shirts))
        torch.testing.assert_close(fast_net(shirts), net(shirts), atol=1e-4, rtol=1e-4)
    arms = measure.arm(net, shirts, "eager"), measure.arm(fast_net, shirts, "compiled")
    how = {"seconds": SECONDS, "processes": 5, "threads": 1}
    compiled_verdict = against = measure.across(*arms, **how)
    print(against)
    saves = against.candidate_seconds * (against.ratio - 1)  # a call
    pays = f"after {compile_seconds / saves:,.0f} calls" if against.low > 1 else "never"
    print(f"compiled in {compile_seconds:.0f} s, from an empty cache; pays {pays}")
claims.verdict("10.compile_is_43_percent_faster", compiled_verdict)

# %% [markdown]
# A service that runs for days forgets the compile time. A script that is called once an hour does
# not.
#
# ## Myth: torch.compile folds BatchNorm
# It is often said to "fold, fuse and plan". Count what should be gone: BatchNorm's square roots in
# the generated code. By default weights may still change between two calls, so nothing can be
# folded. `freezing` declares them constants. There is an option of this name, and a setting.

# %% tags=["nbval-ignore-output"]
from torch._inductor import config as inductor

if not SMOKE and can_induct:
    options = {"default": {}, "the option": {"options": {"freezing": True}}, "the setting": {}}
    for name, how in options.items():
        with torch.no_grad(), inductor.patch(freezing=name == "the setting"):
            program = compiled.generated(net, shirts, **how)
        counts = {word: program.count(word) for word in ("sqrt", "_convolution_pointwise")}
        print(f"{name:12} {counts} in {len(program) // 1000} kB of code")

# %% [markdown]
# If the option's row looks like the default's, it was taken without a word and did nothing (seen
# with torch 2.14). `torch._inductor.config.freezing = True`, or `TORCHINDUCTOR_FREEZING=1` in the
# environment, is what works. **A pass needs a check of its own: count what you meant to remove.**
# The other word is a convolution with an *epilogue*: what stood behind it, a ReLU or an addition,
# is done to its output before that leaves the cache. What is all this worth, beside the default?

# %% tags=["nbval-ignore-output"]
if not SMOKE and can_induct:
    frozen = measure.arm(compiled.Compiled(net, frozen=True), shirts, "frozen")
    for arm in (arms[1], frozen):
        print(measure.compare(arms[0], arm, seconds=SECONDS, threads=1))
measure.fresh.end()
measure.release()

# %% [markdown]
# ## Breaks and recompiles
# What the compiler can't see through, it leaves to Python: it ends the graph there and begins a new
# one after it, a *graph break*. Nothing is fused across. A branch on a *value* is the usual reason:
# the value is known only when the program runs. And each graph has *guards*; an input that fails
# them is a *recompile*. `TORCH_LOGS` tells of both.

# %% tags=["nbval-ignore-output"]
# %%writefile "$FOLDER/breaks.py"
import torch


def broken(x):
    y = torch.relu(x)
    if y.sum() > 100:
        y = y * 0.5
    return y + 1


def mended(x):
    y = torch.relu(x)
    y = torch.where(y.sum() > 100, y * 0.5, y)  # the choice is in the graph now
    return y + 1


for function in (broken, mended):
    print(f"--- {function.__name__}", flush=True)
    compiled = torch.compile(function, backend="eager")  # captures, and generates nothing
    for n in (8, 9, 10, 11):
        assert torch.equal(compiled(torch.ones(20 * n)), function(torch.ones(20 * n)))

# %% tags=["nbval-ignore-output"]
how = {"env": os.environ | {"TORCH_LOGS": "graph_breaks,recompiles"}, "text": True}
how |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
ran = subprocess.run([sys.executable, "-u", FOLDER / "breaks.py"], **how)
for line in ran.stdout.splitlines():
    said = line.split("] ")[-1].strip()
    if said.startswith(("---", "Graph Break Reason", "- ")) and "File" not in said:
        print(said)

# %% [markdown]
# Read it in order. The first change of the size costs a recompile, which replaces the number by a
# symbol; after that, sizes are free. `fullgraph=True` turns a break into an error, so that you find
# it before your users do.
#
# ## Break it
# Fusing saves trips. Make the operations *dear*, and trips no longer matter. Six operations, block
# by block, against six over the whole tensor: the same calls, written to the same place.


# %%
def six(operation, x, out, size):
    """Six times the operation, a block of `size` numbers at a time; from x into out."""
    for a, o in zip(x.split(size), out.split(size), strict=True):
        for _ in range(6):
            a = operation(a, out=o)
    return out


# %% tags=["nbval-ignore-output"]
x, out = torch.rand(2 * LONG), torch.empty(2 * LONG)
dear = {"x + 0.1": lambda t, out: torch.add(t, 0.1, out=out)}
dear |= {"square root": torch.sqrt, "erf, as in GELU": torch.erf}
kept = {}
for name, f in dear.items():
    both = (lambda f=f: six(f, x, out, len(x))), (lambda f=f: six(f, x, out, 2**17))
    kept[name] = measure.compare(*both, seconds=SECONDS / 3, precision=0.03, threads=1).interval
low, high = min(kept, key=lambda n: kept[n].value), max(kept, key=lambda n: kept[n].value)
plots.intervals(
    kept,
    xlabel="speed-up of six operations by blocks (x), one thread",
    title=f"From {kept[high].value:.1f}x ({high}) down to {kept[low].value:.2f}x ({low})",
    alt="Speed-ups of blocks over whole tensors for three operations: falling towards one.",
)

# %% [markdown]
# The trips saved are the same in every row. What differs is how long the arithmetic takes beside
# them. So put an operation on the roofline before you fuse it. (A GPU also saves *launches*, the
# microseconds that each kernel's start costs.)

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
# 12 minutes. The greedy answer passes on short chains; ask for a chain of four on which it fails.
# Compilers face the same question with branches in place of a chain, and use heuristics.

# %% [markdown]
# ## If yours shows no gain
# | You see | Because | Look at |
# |---|---|---|
# | the compiled chain is slower | the tensors are small: guards cost more than the operations | the figure over sizes |
# | fusion gains less than the bytes say | a large cache carries the trips, or the operations are dear | *Break it* |
# | the compiled kernel keeps one core busy | it was first called with something small | `#pragma omp parallel` |
# | folding gains nothing | convolutions take nearly all the time, or the runtime had folded already | chapter 11 |
# | freezing gains nothing | it was given as an option, or gradients were on | count the square roots |
# | it is slow on every new input | a recompile each time | `TORCH_LOGS=recompiles` |
# | no compiler | `torch.compile` on a CPU writes C++ | `apt install g++`, `xcode-select --install` |
#
# ## Exit quiz
# **1. `torch.relu(a + b)` on tensors far beyond the caches: fused, it moves**
# <details><summary>2 in place of 4</summary>Two inputs have to be read.</details>
# <details><summary>3 trips in place of 5</summary>Right: read a, read b, write; the sum stays
# inside.</details>
# <details><summary>the same, with less arithmetic</summary>The arithmetic is the same; the trips
# are not.</details>
#
# **2. Folding BatchNorm gained 5% here and 25% there. Which of these alone could do it?**
# <details><summary>other running statistics</summary>Values do not change the time.</details>
# <details><summary>a faster memory on the second machine</summary>Then BatchNorm's trips are
# cheaper, and their share shrinks.</details>
# <details><summary>faster convolutions on the second machine</summary>Right: what is left over
# weighs more. More cores on the same memory do it, too.</details>
#
# **3. A convolution's output goes to a BatchNorm and to an Add. Folding**
# <details><summary>changes what the Add gets</summary>Right: that is why readers are
# counted.</details>
# <details><summary>is legal in eval mode</summary>The Add would get normalised numbers.</details>
# <details><summary>is impossible in fx</summary>It is possible, and wrong.</details>
#
# **4. You give Inductor an option, and the network is as fast as before. First**
# <details><summary>time it again, with more rounds</summary>That can't tell a small effect from
# none at all.</details>
# <details><summary>look whether the generated code changed</summary>Right: count what should be
# gone.</details>
# <details><summary>conclude that it does not help here</summary>It may not have been
# applied.</details>
#
# **5. `torch.compile` takes 20 s and saves 1 ms a call. It pays after**
# <details><summary>20 calls</summary>A thousandth of that is saved.</details>
# <details><summary>the first call</summary>The first call is the one that compiles.</details>
# <details><summary>20,000 calls</summary>Right; fewer, if the cache on disk has it.</details>
#
# **Key points** · count trips, not operations · a compiled arm is warmed at the size at which it is
# timed, and its threads are read in its code · fold where every reader of the weight agrees · count
# what you meant to remove · a graph break ends a fusion · compile time, from an empty cache,
# belongs to the bill.
#
# **Sources** · S. Williams et al., *Roofline*, 2009 · H. He, [*Making Deep Learning Go Brrrr From
# First Principles*](https://horace.io/brrr_intro.html), 2022 · J. Ansel et al., *PyTorch 2*, 2024 ·
# PyTorch's [announcement of 2.0](https://pytorch.org/get-started/pytorch-2-x/), 2022 · J. Reed et
# al., *torch.fx*, 2022 · P. Tillet et al., *Triton*, 2019 · M. Milakov, N. Gimelshein, *Online
# normalizer calculation for softmax*, 2018 · T. Dao et al.,
# [*FlashAttention*](https://arxiv.org/abs/2205.14135), 2022 · B. Zhang, R. Sennrich, *Root Mean
# Square Layer Normalization*, 2019 · PyTorch's [tutorial on fusing convolution and batch
# norm](https://docs.pytorch.org/tutorials/intermediate/fx_conv_bn_fuser.html),
# [torch.export](https://docs.pytorch.org/docs/stable/export.html) and
# [torch.compile](https://docs.pytorch.org/docs/stable/torch.compiler.html).
#
# **For the capstone** row 10 of your ledger, *fusion*, says what folding and compiling gain on this
# machine. Next: [11 · Runtimes](11_runtimes.ipynb), programs that do all of this when they load a
# graph.

# %% [markdown]
# ## Further
# Each part stands alone.
#
# ### Attention in tiles
# Attention is three operations, $S = QK^\top / \sqrt D$ (each row of $Q$, $K$ and $V$ has $D$
# numbers), $P = \mathrm{softmax}(S)$ and $O = PV$. The first two each write a table of $T \times T$
# numbers. To fuse them, a piece of $P$ must be used before all of a row of $S$ is known. But
# softmax divides by a sum over the *whole* row. The way out: keep a running maximum $m$ and a
# running sum $\ell$, and when a new maximum appears, scale what you have by $e^{m_\text{old} -
# m_\text{new}}$ (Milakov and Gimelshein 2018; Dao et al. 2022).


# %%
def naive_attention(q, k, v):  # each (H, T, D)
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    return torch.softmax(scores, -1) @ v


# %%
def one_tile_row(part, k, v, columns):
    """Attention of some scaled rows, a tile of `columns` scores at a time."""
    top = torch.full_like(part[..., :1], -math.inf)  # running maximum m
    total, mixed = torch.zeros_like(top), torch.zeros_like(part)  # ℓ, and O before the division
    for j in range(0, k.shape[1], columns):
        scores = part @ k[:, j : j + columns].transpose(1, 2)
        new = torch.maximum(top, scores.amax(-1, keepdim=True))
        p, keep = torch.exp(scores - new), torch.exp(top - new)
        total = total * keep + p.sum(-1, keepdim=True)
        mixed = mixed * keep + p @ v[:, j : j + columns]
        top = new
    return mixed / total


def tiled(q, k, v, rows=128, columns=128):
    """The same as naive_attention, a tile of rows × columns scores at a time."""
    out = torch.empty_like(q)
    for i in range(0, q.shape[1], rows):
        part = q[:, i : i + rows] / math.sqrt(q.shape[-1])
        out[:, i : i + rows] = one_tile_row(part, k, v, columns)
    return out


# %%
q, k, v = torch.randn(3, 2, 300, 16, dtype=torch.float64).unbind(0)
for shape in ((64, 64), (300, 1), (7, 300)):
    apart = (tiled(q, k, v, *shape) - naive_attention(q, k, v)).abs().max()
    print(f"tiles of {shape}: equal within 1e-12:", float(apart) < 1e-12)

# %% [markdown]
# Dao et al.'s first theorem promises "$O(N)$ additional memory beyond inputs and output". So take
# the output away from the peak, and judge torch's fused kernel. *naive* is the control: its
# exponent must be 2.

# %% tags=["nbval-ignore-output"]
lengths = [256, 512] if SMOKE else [1024, 2048, 3072]
ways = {"naive": naive_attention, "tiled by hand": tiled, "fused": F.scaled_dot_product_attention}
beyond = {name: [] for name in ways}
for length in lengths:
    q, k, v = torch.randn(3, 1, length, 64).unbind(0)
    for name, attention in ways.items():
        with torch.no_grad():
            peak = measure.peak_memory(lambda a=attention: a(q, k, v))
        beyond[name].append((peak - q.nbytes) / 1024)
    measure.release()  # the profiler's own notes are large

# %% tags=["nbval-ignore-output"]
slope = {n: float(np.polyfit(np.log(lengths), np.log(kib), 1)[0]) for n, kib in beyond.items()}
plots.lines(
    lengths,
    beyond,
    xlabel="sequence length T",
    ylabel="KiB beyond inputs and output",
    logx=True,
    logy=True,
    title=f"Naive grows like T^{slope['naive']:.1f}, the fused kernel like T^{slope['fused']:.2f}",
    alt="Additional memory against sequence length: naive is steep, the tiled ways are flat.",
)
claims.verdict("10.tiled_attention_is_linear", slope["fused"])

# %% [markdown]
# An exponent near 0 is a buffer of fixed size for each thread, with a small linear part: less than
# was promised. Our tiles are driven from Python, many small calls; the library's run inside one
# kernel. Memory is saved by the algorithm, time by the fusion.
#
# ### FlexAttention: your own score, fused
# What if you want another score, say a penalty for distance? `flex_attention` takes a function of
# one score and compiles it *into* the tiled kernel. (Twice the seconds of a chain: profile full.)


# %% tags=["nbval-ignore-output"]
def nearer(score, batch, head, i, j):
    return score - 0.1 * (i - j).abs()


if machine.can("full") and can_induct:
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = torch.randn(3, 1, 1, 1024, 64).unbind(0)
    with torch.no_grad():
        flexible = torch.compile(flex_attention)(q, k, v, score_mod=nearer)
    at = torch.arange(1024)
    bias = -0.1 * (at[:, None] - at).abs()
    due = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    print("equal within 1e-5:", torch.allclose(flexible, due, atol=1e-5))
else:
    print(machine.skip("full", "FlexAttention") if not machine.can("full") else "no compiler")

# %% [markdown]
# ### AOTInductor: compile before you ship
# A service must not compile at its first request. `torch._inductor.aoti_compile_and_package` takes
# an exported program and writes one file: kernels, the code that calls them, weights. It is loaded
# without Dynamo, from Python or C++. (It compiles for some twenty seconds: profile full.)

# %% tags=["nbval-ignore-output"]
if machine.can("full") and can_induct:
    exported = torch.export.export(net, (shirts,))
    how = {"package_path": str(FOLDER / "net.pt2"), "inductor_configs": {"freezing": True}}
    with torch.no_grad():
        path, took = seconds_of(lambda: torch._inductor.aoti_compile_and_package(exported, **how))
        package, load = seconds_of(lambda: torch._inductor.aoti_load_package(path))
        torch.testing.assert_close(package(shirts), net(shirts), atol=1e-4, rtol=1e-4)
    print(
        f"written in {took:.0f} s, loaded in {load:.2f} s, {Path(path).stat().st_size / 1e6:.1f} MB"
    )
    pair = measure.arm(net, shirts, "eager"), measure.arm(package, shirts, "AOTInductor")
    print(measure.compare(*pair, seconds=SECONDS))
else:
    print(machine.skip("full", "AOTInductor") if not machine.can("full") else "no compiler")

# %% [markdown]
# ### A pass of your own inside Inductor
# Inductor runs graph passes before it writes code, and takes one of yours. This one only counts
# what it is given. (`mode="max-autotune"` is the other door: more kernels tried, longer compiling.)

# %% tags=["nbval-ignore-output"]
given = Counter()


def count(graph):
    given.update(str(node.target) for node in graph.nodes if node.op == "call_function")


if can_induct:
    with inductor.patch(post_grad_custom_post_pass=count):
        compiled.generated(chain, torch.randn(256), torch.randn(256))
    print(dict(given))

# %% [markdown]
# ### How large a block?
# Too small, and the fixed cost of each call counts; too large, and the block falls out of the
# cache. One thread: above 32,768 numbers torch would use more, and the curve would show that
# instead.

# %% tags=["nbval-ignore-output"]
measure.release()
x, r = torch.randn(LONG), torch.randn(LONG)
blocks = [2**k for k in ((10, 14, 18) if SMOKE else (10, 13, 16, 19, 22))]
by_size = {}
for b in blocks:
    both = (lambda: chain(x, r)), (lambda b=b: by_blocks(x, r, b))
    by_size[b] = measure.compare(*both, seconds=SECONDS / 4, precision=0.05, threads=1)
best = max(by_size, key=lambda b: by_size[b].ratio)
plots.lines(
    [4 * b / 1024 for b in blocks],
    {"by blocks": [c.interval for c in by_size.values()]},
    xlabel="KiB of one tensor in a block",
    ylabel="speed-up over eager (x)",
    logx=True,
    reference=(1.0, "as fast as eager"),
    title=f"Blocks of {4 * best // 1024} KiB: {by_size[best].ratio:.1f}x",
    alt="Speed-up against block size: low for tiny blocks, then a hill, then falling.",
)

# %% [markdown]
# Left, the machine is busy with calls. Right, a block and what it needs beside it (four arrays) no
# longer fit. What is still gained at the far right is not fusion: eager asks for five fresh
# tensors, `by_blocks` for two.
#
# ### What the count leaves out
# `relu` and `relu_` move the same bytes by our count. Their times?

# %% tags=["nbval-ignore-output"]
x, out = torch.randn(LONG), torch.empty(LONG)
ways = {
    "into a fresh tensor": lambda: torch.relu(x),
    "into one that is there": lambda: torch.clamp_min(x, 0.0, out=out),
    "in place": lambda: torch.relu_(x),
}
print({name: str(look(way)) for name, way in ways.items()})

# %% [markdown]
# Between the first two rows lie pages that the system must hand out; if they are equal, the
# allocator gave the old ones again. The third row lies lower where memory is read before it is
# overwritten. So in place can be faster without being fused. A network whose ReLUs are in place
# already (torchvision's are) has nothing left to gain there.
#
# ### On an NVIDIA GPU
# Each operation is a *launch* as well. Fusing saves trips and launches; a *CUDA graph* replays many
# launches as one.

# %% tags=["nbval-ignore-output"]
if machine.can("gpu"):
    forms = {"fused": torch.compile(chain)}
    forms["fused, CUDA graph"] = torch.compile(chain, mode="reduce-overhead")
    for n in (2**12, 2**18, 2**26):
        a, b = torch.randn(n, device="cuda"), torch.randn(n, device="cuda")
        eager = measure.Arm(lambda: chain(a, b), f"eager, {n} numbers")
        for name, call in forms.items():
            call(a, b)
            arm = measure.Arm(lambda call=call: call(a, b), name)
            print(measure.compare(eager, arm, seconds=SECONDS))
    program = compiled.generated(chain, a, b)
    print("\n".join(line for line in program.splitlines() if "tl." in line)[:1500])
else:
    print(machine.skip("gpu", "fusion by Triton and CUDA graphs"))
