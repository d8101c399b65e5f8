# %% [markdown]
# # 12 · TensorRT
#
# **What does an engine builder decide for you, and what must your graph have decided before?**
#
# After this chapter you can: *write* a small builder that chooses kernels by timing them, and say
# what noise decided · *place* Q/DQ pairs and count what a builder made of them · *see* where a file
# in FP16 overflows, and why a CPU does not show it · *choose* the shapes of a profile from a trace
# · *read* an engine's layers · *replace* the recipes of TensorRT 7 to 9.
#
# 90 minutes · before this: 5, 6 and 11 · runs on any CPU; with an NVIDIA GPU its last part builds
# real engines
#
# Packages: onnx, onnxruntime, onnxscript, onnxconverter-common, openvino

# %% tags=["parameters"]
import os

PROFILE = os.environ.get("COURSE_PROFILE", "fast")

# %% tags=["nbval-ignore-output"]
import copy
import itertools
import json
import math
import time
import warnings

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from onnx import helper
from torch import nn

from course_utils import claims, data, exercises, machine, measure, models, plots, scratch

SMOKE = PROFILE == "smoke"
SECONDS = {"smoke": 0.1, "fast": 1.5, "full": 10.0}[PROFILE]  # for one comparison
LARGE, BUILDS = (16, 3) if SMOKE else (64, 5)
FOLDER = scratch("12")
machine.card()

# %% [markdown]
# *TensorRT* is NVIDIA's compiler for inference. You give it a graph, usually an ONNX file. Its
# *builder* works for seconds or minutes and gives you an *engine*: GPU kernels in order, with their
# weights and memory, for one GPU architecture and one TensorRT version. A CPU can't run an engine.
# It can run what decides whether the engine will be good: the graph, its types, its pairs, its
# shapes, and a race of kernels.
#
# ## Recall
# 1. (Chapter 5) A tensor holds values from −3 to 2. What are scale and zero-point of symmetric
#    signed 8-bit quantization?
#    <details><summary>Answer</summary>Scale $3/127$, zero-point 0: the larger of the two sides
#    decides, and real zero is integer zero.</details>
# 2. (Chapter 6) What does a pair QuantizeLinear, DequantizeLinear (Q/DQ for short) compute, if
#    nobody optimizes it?
#    <details><summary>Answer</summary>Floating-point numbers that were rounded to a grid on the
#    way. It costs time and saves none: a runtime must find the pairs and put an integer kernel in
#    their place.</details>
#
# ## Predict
# A builder times three kernels for each of nine convolutions and keeps the fastest. You build five
# times. For how many of the nine, in percent, does it keep the same one all five times? And: you
# place Q/DQ pairs where NVIDIA's guide wants them, and give the file to ONNX Runtime on this CPU.
# How many times faster than its own fp32 is it?

# %%
my_share = ...  # percent
my_factor = ...  # for example 1.5; below 1 is slower
exercises.predict("12.same", my_share)
exercises.predict("12.qdq", my_factor)

# %% [markdown]
# ## From scratch: a race of kernels
# A builder *fuses* layers, *chooses a kernel* for each by running the candidates, *remembers* what
# it measured, and *plans memory*. Fusing is chapter 10's: here every BatchNorm is folded already.
# TensorRT calls a way to compute a layer a *tactic*. We take three of its hundreds. The first two
# differ in the order of the data.

# %%
from course_utils import tactics

network = models.folded(models.baseline()).requires_grad_(False)


class Planes(nn.Module):
    """One channel after the other in memory (NCHW)."""

    order = torch.contiguous_format

    def __init__(self, conv):
        super().__init__()
        self.weight = conv.weight.detach().contiguous(memory_format=self.order)
        self.bias, self.stride, self.padding = conv.bias.detach(), conv.stride, conv.padding

    def forward(self, x):
        x = x.contiguous(memory_format=self.order)  # a reformat, where the layer before differs
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


# %%
class Pixels(Planes):
    """All channels of a pixel side by side (channels last, NHWC)."""

    order = torch.channels_last


# %% [markdown]
# The third copies every window of the picture into a column, so that one matrix product does the
# rest (*im2col*).


# %%
class Columns(Planes):
    def forward(self, x):  # (B, C, H, W) → (B, C', H', W')
        side, step, edge = self.weight.shape[2], self.stride[0], self.padding[0]
        columns = F.unfold(x, side, padding=edge, stride=step)  # (B, C·side², H'·W')
        out = self.weight.flatten(1) @ columns + self.bias[:, None]
        return out.view(len(x), len(self.bias), (x.shape[2] + 2 * edge - side) // step + 1, -1)


TACTICS = {"planes": Planes, "pixels": Pixels, "columns": Columns}

# %% [markdown]
# The race: the best of a few runs each, on the input that reaches the layer. Times go into a dict,
# the *timing cache*: what is there is not measured again.


# %%
def fastest(call, repeat=7):
    """The best of a few runs, after one to warm up: seconds."""
    call()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


# %%
@torch.inference_mode()
def build(model, x, cache):
    """A copy of `model` with each convolution's fastest tactic, and the plan {layer: tactic}."""
    plan, engine = {}, copy.deepcopy(model)
    for name, (conv, given) in tactics.convolutions(model, x).items():
        times = {}
        for tactic, kind in TACTICS.items():
            layer, shape = kind(conv), tuple(given.shape)
            key = (tactic, tuple(conv.weight.shape), conv.stride, shape)
            if key not in cache:
                cache[key] = fastest(lambda layer=layer, given=given: layer(given))
            times[tactic] = cache[key]
        plan[name] = min(times, key=times.get)
        engine.set_submodule(name, TACTICS[plan[name]](conv))
    return engine, plan


# %%
x = {b: torch.randn(b, 1, 28, 28) for b in (1, LARGE)}
engine, plan = build(network, x[1], {})
torch.testing.assert_close(engine(x[1]), network(x[1]), atol=1e-4, rtol=0)
print(len(plan), "convolutions, the same answer within 0.0001")

# %% [markdown]
# ## Measure: another batch, another kernel?
# You will read that an engine must be tuned for the shape it serves, because another batch size
# wants other kernels. Build once for each size, and you will see differences. You would see them
# for *one* size, too: where two tactics are nearly equal, noise decides. So build several times for
# each of two batch sizes, and compare pairs of the same size with pairs of different sizes.

# %% tags=["nbval-ignore-output"]
plans = {b: [build(network, x[b], {})[1] for _ in range(BUILDS)] for b in x}


def apart(one, other):
    """How many convolutions have another kernel."""
    return sum(one[name] != other[name] for name in one)


same = [apart(p, q) for b in x for p, q in itertools.combinations(plans[b], 2)]
other = [apart(p, q) for p, q in itertools.product(*plans.values())]
steady = np.mean([len({p[name] for p in plans[1]}) == 1 for name in plan])
exercises.reveal("12.same", 100 * float(steady), "% at batch 1")

# %% tags=["nbval-ignore-output"]
figure, ax = plots.axes(
    f"convolutions with another kernel, of {len(plan)}",
    "",
    title=f"Built again: {np.mean(same):.1f} kernels change; another batch: {np.mean(other):.1f}",
    height=2.4,
)
rows = {"the same batch, built again": same, f"batch 1 against {LARGE}": other}
for i, found in enumerate(rows.values()):
    for changed in sorted(set(found)):
        size = 300 * found.count(changed) / len(found) + 15
        ax.scatter(changed, i, s=size, color=plots.COLOURS[i], marker=plots.MARKERS[i])
ax.set_yticks(range(2), list(rows))
ax.set_xlim(-0.5, len(plan) + 0.5)
ax.margins(y=0.4)
ax.invert_yaxis()
plots.show(
    figure, "Two rows of marks: how many kernels differ between two engines; size is how often."
)

# %% [markdown]
# A larger mark stands for more pairs. The upper row is the null: engines that *should* be equal.
# What the lower row has beyond it is the batch's doing. If the rows overlap, this machine gives you
# no reason to say that the batch decided. Two engines of one graph agree in their answers up to
# rounding, and no further.
#
# The cache ends the lottery: equal times give an equal plan, and the second build measures nothing.
# TensorRT's timing cache is a file; its flag `ERROR_ON_TIMING_CACHE_MISS` makes a build fail rather
# than measure anew.

# %%
cache: dict = {}
first, known = build(network, x[1], cache)[1], len(cache)
again = build(network, x[1], cache)[1]
print("the same plan:", again == first, "· new times:", len(cache) - known)

# %% [markdown]
# Is the wrong engine slower, then? The engine for the large batch stands against three others: the
# same one built again (the null), the one tuned for batch 1, and one whose race was run *in place*,
# each tactic timed with the whole network around it. Our first race is blind to one thing: the
# price of changing the order of the data *between* two layers. If that price matters, the race in
# place wins.


# %%
@torch.inference_mode()
def build_in_place(model, x):
    """An engine whose tactics were timed in the whole network, one layer after the other."""
    engine, plan = build(model, x, {})
    for name in plan:
        conv, times = model.get_submodule(name), {}
        for tactic, kind in TACTICS.items():
            engine.set_submodule(name, kind(conv))
            times[tactic] = fastest(lambda: engine(x))
        engine.set_submodule(name, TACTICS[min(times, key=times.get)](conv))
    return engine


# %% tags=["nbval-ignore-output"]
tuned = measure.arm(build(network, x[LARGE], {})[0], x[LARGE], f"tuned for {LARGE}")
rivals = {
    "the same, built again": build(network, x[LARGE], {})[0],
    "tuned for batch 1": build(network, x[1], {})[0],
    "raced in place": build_in_place(network, x[LARGE]),
}
speed = {}
for label, rival in rivals.items():
    arm = measure.arm(rival, x[LARGE], label)
    speed[label] = measure.across(tuned, arm, seconds=SECONDS, processes=6).interval

# %% tags=["nbval-ignore-output"]
shown = ", ".join(f"{label} {v.value:.2f}x" for label, v in speed.items())
plots.intervals(
    speed,
    xlabel=f"speed at batch {LARGE} against the engine tuned for it (x)",
    title=f"At batch {LARGE}: {shown}",
    alt="Three intervals over processes: the engine again, one for batch 1, one raced in place.",
)

# %% [markdown]
# Read the first row first: how far it lies from 1 is what two builds of one engine differ by. Only
# a row that lies beyond it says something about tuning: right of it, an engine that its race chose
# well; left of it, one that its race misjudged. TensorRT's race is wider than ours, and
# changes of order are layers of their own in it, named *Reformat*. To serve small and large
# batches, one engine can hold several *optimization profiles*: smallest, best and largest shape,
# `min`, `opt` and `max`. Tactics are raced at `opt`; memory is planned for `max`.

# %% [markdown]
# ## Exercise B · a profile for your traffic
# `trace` is the list of batch sizes that your service saw. `seconds(n, tuned)` is the time of a
# batch of `n` on an engine whose `opt` is `tuned`. Write `profile(trace, seconds)` that returns
# `(min, opt, max)`: every batch of the trace is covered, `min` and `max` reach no further than the
# trace, and the trace's total time is as small as possible over all whole numbers that `opt` may
# be.
#
# If `trace` is `[1, 1, 1, 8]` and `seconds` says that the engine tuned for 8 costs little at 1, a
# right answer may be `(1, 8, 8)`.


# %% tags=["exercise"]
def profile(trace, seconds): ...


# %%
exercises.check("12.B", profile)

# %% [markdown] tags=["hint"]
# `opt` lies between `min` and `max`, both included, and need not be in the trace.

# %% [markdown] tags=["hint"]
# `min(range(low, high + 1), key=…)` with the total over the trace as the key.


# %% tags=["solution"]
def profile(trace, seconds):
    low, high = min(trace), max(trace)
    best = min(range(low, high + 1), key=lambda tuned: sum(seconds(n, tuned) for n in trace))
    return low, best, high


# %% tags=["wrong"]
# The most frequent size: many small batches can cost less than one large one.
def profile(trace, seconds):
    return min(trace), max(set(trace), key=trace.count), max(trace)


# %% tags=["wrong"]
# Tuned for the largest, the habit.
def profile(trace, seconds):
    return min(trace), max(trace), max(trace)


# %% tags=["wrong"]
# "To be safe" from 1 to 4096: memory is reserved for it.
def profile(trace, seconds):
    best = min(range(1, 4097), key=lambda tuned: sum(seconds(n, tuned) for n in trace))
    return 1, best, 4096


# %% tags=["wrong"]
# Each size counts once, however often it came.
def profile(trace, seconds):
    low, high = min(trace), max(trace)
    sizes = set(trace)
    return low, min(range(low, high + 1), key=lambda o: sum(seconds(n, o) for n in sizes)), high


# %% tags=["wrong"]
# range() ends before the largest size: wrong where that one is the best. The edge.
def profile(trace, seconds):
    low, high = min(trace), max(trace)
    best = min(range(low, high), key=lambda o: sum(seconds(n, o) for n in trace), default=low)
    return low, best, high


# %% [markdown] tags=["instructor"]
# 10 minutes. The discussion is worth more than the code: what if tomorrow's largest batch is
# larger? (An error, `OutsideProfile`: the service must split it, as chapter 13's batcher does.)
# When are two profiles worth their second set of kernels?

# %% [markdown]
# ## From scratch: a pair
# Now precision. TensorRT 11 has no INT8 switch and no calibrator: the graph holds *pairs*. Here is
# what one does to a path in the graph, and what a builder may make of it:
#
# ```
# as exported   relu ──────────────── fp32 ───────────────▶ Conv in fp32
# with a pair   relu ─▶ Quantize ─ int8 ─▶ Dequantize ─ fp32 ─▶ Conv in fp32
# if fused      relu ─▶ Quantize ─ int8 ─────────────────▶ Conv on integers
# ```
#
# TensorRT's scheme is
# [symmetric](https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html):
# zero-point 0, signed integers, one scale for an activation, one for each output channel of a
# weight. Make the two nodes for one weight by hand, and compare with torch's operator of chapter 5.

# %%
from course_utils import onnx_int8, qdq

onnx_int8.export(models.baseline(), (x[1].repeat(2, 1, 1, 1),), FOLDER / "fp32.onnx")
fp32 = onnx.load(FOLDER / "fp32.onnx")
name = "stages.0.conv1.weight"
weight = qdq.weights(fp32)[name]  # (output channels, input channels, 3, 3)
scale = np.abs(weight).max((1, 2, 3)) / np.float32(127)  # (output channels,)
nodes = [
    helper.make_node("QuantizeLinear", ["w", "scale", "zero"], ["q"], axis=0),
    helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"], axis=0),
]

# %%
from onnx.reference import ReferenceEvaluator

given = {"w": weight, "scale": scale, "zero": np.zeros(len(scale), np.int8)}
ends = [
    helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
    for n, v in given.items()
]
out = helper.make_tensor_value_info("dq", onnx.TensorProto.FLOAT, weight.shape)
pair = helper.make_model(helper.make_graph(nodes, "pair", ends, [out]))
ours = ReferenceEvaluator(pair).run(None, given)[0]
theirs = torch.fake_quantize_per_channel_affine(
    torch.tensor(weight),
    torch.tensor(scale),
    torch.zeros(len(scale), dtype=torch.int32),
    0,
    -128,
    127,
)
print("largest gap to torch:", float(np.abs(ours - theirs.numpy()).max()))
print("largest error in steps:", float((np.abs(ours - weight).max((1, 2, 3)) / scale).max()))

# %% [markdown]
# The error stays at half a step, as in chapter 5. `qdq.insert_pairs` does this for any list of
# tensors. The scale of an activation comes from *calibration*: run training images and note each
# tensor's largest magnitude.

# %%
train_images = models.normalise(data.fashion_mnist("train")[0][:256]).numpy()
amax = {n: float(np.abs(v).max()) for n, v in qdq.values(fp32, {"x": train_images}).items()}
convs = [n for n in fp32.graph.node if n.op_type == "Conv"]
adds = [n for n in fp32.graph.node if n.op_type == "Add"]
weights = [n.input[1] for n in convs]
inputs = list(dict.fromkeys(n.input[0] for n in convs))  # each once
residual = [n.input[1] for n in adds if n.input[1] not in inputs]
own = [n.input[0] for n in adds]  # what the convolution just before the Add has made

# %% [markdown]
# ## Measure: four places, two builders
# Where do the pairs go? *NVIDIA's guide* wants data and weight of each convolution, no bias, and in
# a residual block *one* input of the Add: the Add is then fused into the convolution that makes the
# other one. ONNX Runtime's own quantizer puts pairs around every operator, with unsigned integers.
# Between them stands the guide's list with the other input of each Add added.

# %%
places = {
    "weights alone": weights,
    "NVIDIA's guide": weights + inputs + residual,
    "… and the Adds' other input": list(dict.fromkeys(weights + inputs + residual + own)),
}
files = {"fp32": fp32} | {n: qdq.insert_pairs(fp32, t, amax) for n, t in places.items()}
onnx_int8.to_int8(FOLDER / "fp32.onnx", FOLDER / "ort.onnx", torch.tensor(train_images).split(64))
files["ONNX Runtime's quantizer"] = onnx.load(FOLDER / "ort.onnx")
print({name: len(qdq.paired(model)) for name, model in files.items()})

# %% [markdown]
# TensorRT needs a GPU. Two other builders read the same files on a CPU and stand here as
# **analogues**: ONNX Runtime and OpenVINO. You see how much a place matters and that builders
# differ, not how TensorRT will do. First ask each how many of the nine convolutions it runs on
# integers. That is read in what the builder *made*, not in the file.

# %% tags=["nbval-ignore-output"]
threads, has_openvino = torch.get_num_threads(), machine.can("package:openvino")
integers = {"ONNX Runtime": {n: qdq.onnxruntime_integers(m) for n, m in files.items()}}
if has_openvino:
    compiled = {n: qdq.openvino_compiled(m, threads) for n, m in files.items()}
    integers["OpenVINO"] = {n: qdq.openvino_integers(c) for n, c in compiled.items()}
else:
    print(machine.skip("package:openvino", "the second builder"))
for builder, counts in integers.items():
    print(f"{builder:13}", counts)
fewest = min(counts["NVIDIA's guide"] for counts in integers.values())
claims.verdict("12.qdq_is_int8", fewest / len(convs))

# %% [markdown]
# ONNX Runtime takes a convolution only with a pair on its *output* as well. A ReLU between them is
# in the way, except before an unsigned pair: rounding to 0 … 255 cuts off what is negative, so the
# ReLU is dropped. Follow the third file: one more pair for each Add, and the three convolutions
# before an Add are taken. OpenVINO, like TensorRT, needs the pairs on the two inputs.
#
# Now time and accuracy, each builder against its own fp32. *fp32 again* is the null: the same file,
# compiled a second time.

# %% tags=["nbval-ignore-output"]
test_images, test_labels = data.fashion_mnist("test")
batch = models.normalise(test_images[:64]).numpy()


def onnxruntime_arm(name):
    session = measure.onnx_session(files[name].SerializeToString())
    return measure.onnx_arm(session, batch, f"ONNX Runtime, {name}")


def openvino_arm(name):
    ready = qdq.openvino_compiled(files[name], threads)
    return measure.Arm(lambda: ready({0: batch}), f"OpenVINO, {name}", threads, "", 64)


makers = {"ONNX Runtime": onnxruntime_arm, "OpenVINO": openvino_arm}
makers = {builder: makers[builder] for builder in integers}

# %% tags=["nbval-ignore-output"]
asked = {"fp32 again": "fp32"} | {name: name for name in files if name != "fp32"}
gains = {builder: {} for builder in makers}
for (builder, make), (label, name) in itertools.product(makers.items(), asked.items()):
    result = measure.across(make("fp32"), make(name), seconds=SECONDS / 2, processes=6)
    gains[builder][label] = result.interval


# %% tags=["nbval-ignore-output"]
guide = {builder: g["NVIDIA's guide"].value for builder, g in gains.items()}
rows = {f"{b}: {label}": v for b, g in gains.items() for label, v in g.items()}
plots.intervals(
    rows,
    xlabel="speed-up over the same builder's fp32 (x)",
    title="NVIDIA's places: " + ", ".join(f"{v:.2f}x in {b}" for b, v in guide.items()),
    alt="Speed-up of four files with pairs in two builders, and of fp32 compiled again.",
)

# %% tags=["nbval-ignore-output"]
in_onnxruntime = gains["ONNX Runtime"]
exercises.reveal("12.qdq", in_onnxruntime["NVIDIA's guide"].value, "times")
claims.verdict("12.qdq_is_faster", in_onnxruntime["NVIDIA's guide"])

# %% tags=["nbval-ignore-output"]
claims.verdict("12.own_places_pay", in_onnxruntime["ONNX Runtime's quantizer"])

# %% [markdown]
# Hold the figure against the counts. Where no convolution is an integer one, a file can only lose:
# its pairs are extra work, and they stand in the way of fusions that fp32 gets. The same file may
# gain in one builder and lose in the other; that is two sets of rules, not two opinions about INT8.
# If no file gains in either, look at the card on top: without `vnni`, `amx` or `dotprod` the
# integer kernels have no instruction of their own.
#
# Speed is half the answer. Does each file still compute the network?


# %%
def compare_outputs(reference, candidate):
    """How far two runtimes' logits are apart: share of finite rows, largest gap, equal classes."""
    a, b = np.asarray(reference, np.float64), np.asarray(candidate, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"the shapes differ: {a.shape} and {b.shape}")
    finite = np.isfinite(b).all(1)
    gap, equal = np.abs(a - b)[finite], (a.argmax(1) == b.argmax(1)) & finite
    return {
        "finite (%)": round(100 * float(finite.mean()), 1),
        "largest gap": round(float(gap.max()), 4) if finite.any() else math.nan,
        "same class (%)": round(100 * float(equal.mean()), 2),
    }


# %% tags=["nbval-ignore-output"]
count = 500 if SMOKE else 5000
pictures = models.normalise(test_images[:count]).numpy()
truth = measure.onnx_session(fp32.SerializeToString()).run(None, {"x": pictures})[0]
for name, model in files.items():
    session = measure.onnx_session(model.SerializeToString())
    logits = session.run(None, {"x": pictures})[0]
    right = float((logits.argmax(1) == test_labels[:count].numpy()).mean())
    print(f"{name:28} {right:.2%} right  {compare_outputs(truth, logits)}")

# %% [markdown]
# *Same class* is the share of images that keep their answer; a right one may have become wrong, or
# a wrong one right. Read it beside the speed. On a CPU without VNNI the one file that gains in ONNX
# Runtime can be the one that loses points: sums of two products saturate at 16 bits there (chapter
# 6), and no builder tells you.

# %% [markdown]
# ## Exercise A · place the pairs
# A graph is a list of nodes `(op, inputs, output)` in order of execution, for example `("Conv",
# ["x", "w1", "b1"], "a")`: data, weight and, where there is one, bias. Complete `pairs(nodes)`; you
# may change its loop. It returns the list of tensors that get a Q/DQ pair, by the rules of NVIDIA's
# guide:
#
# - data and weight of each Conv and Gemm, never the bias;
# - each Add needs *one* input with a pair. If an input has one anyway, because a Conv or Gemm reads
#   it, add none. Else take the one that no Conv or Gemm makes, the *residual*: a pair on a Conv's
#   own output stands between it and the Add, and the two are not fused. Where a Conv makes both, or
#   neither, take either;
# - a tensor has one pair, however many nodes read it.
#
# For `[("Conv", ["x", "w1", "b1"], "a"), ("Relu", ["a"], "r"), ("Conv", ["r", "w2", "b2"], "c"),
# ("Add", ["c", "r"], "s")]` a right answer holds `x`, `w1`, `r` and `w2`.


# %% tags=["exercise"]
def pairs(nodes):
    chosen = []
    for op, inputs, output in nodes:
        wanted = ...  # which tensors does this node ask for?
        chosen += [t for t in wanted if t not in chosen]
    return chosen


# %%
exercises.check("12.A", pairs)

# %% [markdown] tags=["hint"]
# `inputs[:2]` are data and weight.

# %% [markdown] tags=["hint"]
# An Add can come *before* the Conv that reads one of its inputs. One pass over the nodes does not
# know that yet.

# %% [markdown] tags=["hint"]
# Two loops: first the heavy nodes, then the Adds.


# %% tags=["solution"]
def pairs(nodes):
    heavy = [node for node in nodes if node[0] in ("Conv", "Gemm")]
    made = [output for _, _, output in heavy]
    chosen = []
    for _, inputs, _ in heavy:
        chosen += [t for t in inputs[:2] if t not in chosen]
    for op, inputs, _ in nodes:
        if op == "Add" and not set(inputs) & set(chosen):
            a, b = inputs
            chosen.append(b if a in made else a)
    return chosen


# %% tags=["wrong"]
# The bias gets a pair too.
def pairs(nodes):
    chosen = []
    for op, inputs, _ in nodes:
        if op in ("Conv", "Gemm"):
            chosen += [t for t in inputs if t not in chosen]
    for op, inputs, _ in nodes:
        if op == "Add" and not set(inputs) & set(chosen):
            chosen.append(inputs[1])
    return chosen


# %% tags=["wrong"]
# Both inputs of every Add: right for ONNX Runtime, and it takes TensorRT's fusion away.
def pairs(nodes):
    chosen = []
    for op, inputs, _ in nodes:
        wanted = {"Conv": inputs[:2], "Gemm": inputs[:2], "Add": inputs}.get(op, [])
        chosen += [t for t in wanted if t not in chosen]
    return chosen


# %% tags=["wrong"]
# A tensor that two nodes read is listed twice.
def pairs(nodes):
    chosen = []
    for op, inputs, _ in nodes:
        if op in ("Conv", "Gemm"):
            chosen += inputs[:2]
    for op, inputs, _ in nodes:
        if op == "Add" and not set(inputs) & set(chosen):
            chosen.append(inputs[1])
    return chosen


# %% tags=["wrong"]
# One pass: an Add that comes before the convolution reading its other input. The edge.
def pairs(nodes):
    chosen = []
    for op, inputs, _ in nodes:
        if op in ("Conv", "Gemm"):
            wanted = inputs[:2]
        elif op == "Add" and not set(inputs) & set(chosen):
            wanted = inputs[:1]
        else:
            wanted = []
        chosen += [t for t in wanted if t not in chosen]
    return chosen


# %% [markdown] tags=["instructor"]
# 10 minutes. Draw the residual block on the board and let the room mark the pairs before anyone
# writes code. Ask why the bias needs none: it is added to 32-bit sums, so it stays in 32 bits. Then
# show the third file in the figure.

# %% [markdown]
# ## Myth: tested in FP16, because the file is in FP16
# A *mixed-precision* file has fp16 tensors and, where that is not safe, fp32 ones, with Cast nodes
# between. An fp16 number reaches up to 65,504 and has 10 bits after the leading one (IEEE 754). The
# usual test: convert, run in ONNX Runtime on a laptop, compare.

# %% tags=["nbval-ignore-output"]
from onnxconverter_common import float16


def to_fp16(model, wide=(), **limits):
    """A copy in fp16 whose nodes in `wide` stay in fp32, and what the converter warned of."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        half = float16.convert_float_to_float16(
            copy.deepcopy(model), keep_io_types=True, node_block_list=list(wide), **limits
        )
    return half, sorted(
        {str(w.message).split(" will be ")[1] for w in said if "will be" in str(w.message)}
    )


half, _ = to_fp16(fp32)
print(f"bytes: fp32 {fp32.ByteSize():,}, fp16 {half.ByteSize():,}")

# %% [markdown]
# ONNX Runtime has no fp16 convolution for this CPU. It casts to fp32, computes there, and casts
# back. An engine would compute in fp16. So you need something that *obeys the file*: `typed.run`
# computes each node in the types that the file says, in torch, products summed in fp32 and rounded
# to fp16 once. That is an emulation: the numbers are fp16's, the speed is not.

# %% tags=["nbval-ignore-output"]
from course_utils import typed

some, expected = torch.tensor(pictures[:500]), truth[:500]


def answers(model):
    """The logits of a file by ONNX Runtime, and by an executor that obeys its types."""
    logits = model.graph.output[0].name
    ready = measure.onnx_session(model.SerializeToString())
    return ready.run(None, {"x": some.numpy()})[0], typed.run(model, {"x": some})[logits].float()


for executor, logits in zip(("ONNX Runtime", "as typed"), answers(half), strict=True):
    print(f"{executor:13} {compare_outputs(expected, logits)}")
kept = compare_outputs(expected, answers(half)[1])["same class (%)"]
claims.verdict("12.fp16_keeps_the_answers", kept)

# %% [markdown]
# ## Break it
# Here is a network that is *the same function*. ReLU lets a positive factor pass: multiply one
# convolution's weights and bias by `2**17`, and divide the next one's weights by it. In fp32 not a
# bit of the answer changes, because the factor is a power of two.


# %%
def rescaled(model, first, factor):
    """Multiply convolution number `first` and divide the next one's weights by it: the same
    function.
    """
    out = copy.deepcopy(model)
    convs = [n for n in out.graph.node if n.op_type == "Conv"]
    scale = dict.fromkeys(convs[first].input[1:], factor) | {convs[first + 1].input[1]: 1 / factor}
    for i in out.graph.initializer:
        if i.name in scale:
            changed = onnx.numpy_helper.to_array(i) * np.float32(scale[i.name])
            i.CopyFrom(onnx.numpy_helper.from_array(changed, i.name))
    return out


stretched = rescaled(fp32, 3, 2.0**17)  # the first convolution of the second stage
before, after = (typed.run(m, {"x": some})["linear"] for m in (fp32, stretched))
print("bit for bit the same in fp32:", torch.equal(before, after))

# %% [markdown]
# Convert it, and judge it both ways. Then keep in fp32 every node that reads or writes something
# beyond fp16: the ranges come from calibration, as for INT8.

# %%
ranges = qdq.values(stretched, {"x": train_images})
ranges = {n: float(np.abs(v).max()) for n, v in ranges.items()}
SAFE = 65504 / 4  # other images may be larger than the calibration's
wide = [
    n.name
    for n in stretched.graph.node
    if any(ranges.get(t, 0) > SAFE for t in [*n.input, *n.output])
]
print("beyond fp16:", wide)

# %% tags=["nbval-ignore-output"]
trial = {"all in fp16": to_fp16(stretched), "wide nodes in fp32": to_fp16(stretched, wide)}
for name, (model, said) in trial.items():
    for executor, logits in zip(("ONNX Runtime", "as typed"), answers(model), strict=True):
        print(f"{name:19} {executor:13} {compare_outputs(expected, logits)}")
    print("   the converter's warnings:", said)

# %% [markdown]
# Three things to read. *All in fp16*, as typed: no logit is a number any more, and ONNX Runtime
# shows you a network that mostly works. *Wide nodes in fp32*: the overflow is gone, and the answers
# are still off, in both. The warnings say why: the converter cut weights off at 10,000, its
# default, though fp16 reaches 65,504, and it *raised* small ones to 0.0000001. It had stored the
# wide nodes' weights in fp16 and cast them back. torch's exporter lists weights among the inner
# tensors (`value_info`), and the converter takes what is listed there for an activation. So take
# them out of that list:


# %%
def weights_unlisted(model):
    """A copy that does not list its weights among the inner tensors, as an exporter may do."""
    out = copy.deepcopy(model)
    stored = {i.name for i in out.graph.initializer}
    inner = [v for v in model.graph.value_info if v.name not in stored]
    del out.graph.value_info[:]
    out.graph.value_info.extend(inner)
    return out


careful, said = to_fp16(weights_unlisted(stretched), wide)
print("unlisted:     ", compare_outputs(expected, answers(careful)[1]), said)
raised, _ = to_fp16(stretched, wide, max_finite_val=65504.0, min_positive_val=6e-8)
print("limits raised:", compare_outputs(expected, answers(raised)[1]))

# %% [markdown]
# Was it the limits after all? The second line raises them to fp16's own, with the weights still
# listed. If the limits were all, it would equal the first. What is left is the small weights' bits.
# Nobody multiplies by `2**17` on purpose; but training does not see the scale between two such
# layers either.
#
# ## Explain: what a builder does with your graph
# | Step | Here | In TensorRT |
# |---|---|---|
# | fuse | BatchNorm into the convolution | also bias, ReLU, Add, pointwise chains, Q and DQ, attention |
# | choose | the fastest of three | the fastest of hundreds, at each profile's `opt` |
# | remember | a dict | a timing cache file, for one GPU and version |
# | precision | pairs and types in the file | the same: networks are *strongly typed* |
# | keep | modules in Python | a *plan file*: kernels and weights, for one architecture |
#
# An ONNX file travels; an engine does not. On another model of the same architecture it loads with
# a warning, on another architecture not at all. The options `VERSION_COMPATIBLE` and
# `hardware_compatibility_level` widen that and cost speed. *TensorRT for RTX*, a product of its own
# for desktops, compiles on the user's card instead, so its files fit several.
#
# ## If yours shows no gain
# | You see | Because | Look at |
# |---|---|---|
# | INT8 slower than fp32 | pairs that were not fused | count integer kernels, or the engine's layers |
# | INT8 as fast as fp32 on a CPU | no `vnni`, `amx` or `dotprod` on the card on top | chapter 6 |
# | a GPU shows no gain at batch 1 | launches take the time, not arithmetic | a larger batch, CUDA graphs |
# | FP16 no faster than fp32 | the file is still fp32, or casts stand around each layer | the inspector's types |
# | fp32 engine faster than eager fp32 | TF32: 10 bits of mantissa in products | `trt.build(…, tf32=False)`, the default here |
#
# ## The tool of the field: trtexec, and the builder in Python
# `trtexec` comes with TensorRT: it builds, times and inspects without a line of code. Start there.
#
# ```
# trtexec --onnx=int8.onnx --minShapes=x:1x1x28x28 --optShapes=x:64x1x28x28 \
#         --maxShapes=x:256x1x28x28 --timingCacheFile=timing.cache --saveEngine=int8.plan \
#         --profilingVerbosity=detailed
# trtexec --loadEngine=int8.plan --shapes=x:64x1x28x28 --useCudaGraph --noDataTransfers --noTF32 \
#         --dumpProfile --exportLayerInfo=layers.json
# ```
#
# In Python it is ten calls. Their names are checked against TensorRT 10's and 11's own classes by
# this course's tests; `course_utils.trt` adds what can go wrong. NVIDIA's *Model Optimizer* makes
# the two files, pairs and types: it stands under *Further*.


# %%
def plan_file(trt, onnx_path, low, best, high):
    """The bytes of an engine for one input x, batches from `low` to `high`, tuned for `best`."""
    log = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx_path)):
        raise ValueError(parser.get_error(0).desc())
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape("x", (low, 1, 28, 28), (best, 1, 28, 28), (high, 1, 28, 28))
    config.add_optimization_profile(profile)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or layers have names alone
    return builder.build_serialized_network(network, config)


# %% [markdown]
# ## Exercise C · read an engine
# `trt.layers` reads the inspector's JSON, of TensorRT 10 or 11, into layers. Here is a dump of
# five. It is **synthetic**: written by hand in the inspector's form.


# %%
def said(name, dtype):
    return {"Name": name, "Format/Datatype": f"Row major linear {dtype} format"}


def dumped(name, kind, nodes, reads, writes):
    metadata = "\u001e".join(f"[ONNX Layer: {node}]" for node in nodes)
    ends = {"Inputs": [said(*t) for t in reads], "Outputs": [said(*t) for t in writes]}
    return {"Name": name, "LayerType": kind, "Metadata": metadata, **ends}


CONV = "CaskConvolution"
t1, t2, t3, t4 = ("t1", "INT8"), ("t2", "FP16"), ("t3", "FP16"), ("t4", "FP16")
DUMP = json.dumps(
    {
        "Layers": [
            dumped("conv1 + relu1", CONV, ["conv1", "relu1"], [("image", "INT8")], [t1]),
            dumped("conv2", CONV, ["conv2"], [t1], [t2]),
            dumped("PWN(relu2)", "PointWiseV2", ["relu2"], [t2], [t3]),
            dumped("pool", "CaskPooling", ["pool"], [t3], [t4]),
            dumped("conv3", CONV, ["conv3"], [t4], [("logits", "FP32")]),
        ]
    }
)

# %%
from course_utils import trt

for layer in trt.layers(DUMP):
    print(f"{layer.name:14}{layer.kind:16}{layer.nodes} reads {layer.inputs}")

# %% [markdown]
# Write `faults(layers)` that takes such a list and returns a dict from layer name to fault:
#
# - `"precision"`: a layer whose `kind` contains `Convolution` and whose *first* input's `dtype` is
#   not `"int8"`;
# - `"fusion"`: a layer that is no convolution, that has `nodes` which *all* begin with `relu` or
#   `add`, and one of whose inputs is a convolution's output that **no other** layer reads. The
#   convolution could have taken it in.
#
# Reformat and pooling layers are no faults, a layer may have no nodes, and layers stand in any
# order. For `trt.layers(DUMP)` the right answer is `{"PWN(relu2)": "fusion", "conv3":
# "precision"}`.


# %% tags=["exercise"]
def faults(layers): ...


# %%
exercises.check("12.C", faults)

# %% [markdown] tags=["hint"]
# First pass: the names of the tensors that convolutions write, and how many layers read each name.

# %% [markdown] tags=["hint"]
# A layer without nodes: `all([])` is true in Python.


# %% tags=["solution"]
def faults(layers):
    from collections import Counter

    convolutions = [layer for layer in layers if "Convolution" in layer.kind]
    made = {t.name for layer in convolutions for t in layer.outputs}
    readers = Counter(name for layer in layers for name in {t.name for t in layer.inputs})
    found = {}
    for layer in layers:
        if "Convolution" in layer.kind:
            if layer.inputs[0].dtype != "int8":
                found[layer.name] = "precision"
            continue
        alone = any(t.name in made and readers[t.name] == 1 for t in layer.inputs)
        if alone and layer.nodes and all(n.startswith(("relu", "add")) for n in layer.nodes):
            found[layer.name] = "fusion"
    return found


# %% tags=["wrong"]
# Looks at the names: a convolution that holds its ReLU is called "conv + relu" and is no fault.
def faults(layers):
    found = {}
    for layer in layers:
        if "relu" in layer.name or "add" in layer.name:
            found[layer.name] = "fusion"
        elif "Conv" in layer.kind and layer.inputs[0].dtype != "int8":
            found[layer.name] = "precision"
    return found


# %% tags=["wrong"]
# Judges a convolution by its output: an INT8 kernel may write floats.
def faults(layers):
    from collections import Counter

    made = {t.name for layer in layers if "Convolution" in layer.kind for t in layer.outputs}
    readers = Counter(t.name for layer in layers for t in layer.inputs)
    found = {}
    for layer in layers:
        if "Convolution" in layer.kind:
            if layer.outputs[0].dtype != "int8":
                found[layer.name] = "precision"
        elif not layer.nodes or not all(n.startswith(("relu", "add")) for n in layer.nodes):
            continue
        elif any(t.name in made and readers[t.name] == 1 for t in layer.inputs):
            found[layer.name] = "fusion"
    return found


# %% tags=["wrong"]
# A convolution whose output two layers read can't take one of them in. The edge.
def faults(layers):
    made = {t.name for layer in layers if "Convolution" in layer.kind for t in layer.outputs}
    found = {}
    for layer in layers:
        if "Convolution" in layer.kind:
            if layer.inputs[0].dtype != "int8":
                found[layer.name] = "precision"
        elif not layer.nodes or not all(n.startswith(("relu", "add")) for n in layer.nodes):
            continue
        elif any(t.name in made for t in layer.inputs):
            found[layer.name] = "fusion"
    return found


# %% tags=["wrong"]
# Every layer that is no convolution and reads one: Reformat and pooling are accused too.
def faults(layers):
    made = {t.name for layer in layers if "Convolution" in layer.kind for t in layer.outputs}
    found = {}
    for layer in layers:
        if "Convolution" in layer.kind:
            if layer.inputs[0].dtype != "int8":
                found[layer.name] = "precision"
        elif any(t.name in made for t in layer.inputs):
            found[layer.name] = "fusion"
    return found


# %% [markdown] tags=["instructor"]
# 10 minutes. Who has a GPU runs `faults(trt.layers(engine.inspect()))` afterwards. In TensorRT 11
# many layers are made by one compiler (names with `__myl_`) whose kinds have other names: ask what
# `"Convolution" in layer.kind` finds then, and what one would have to look at.

# %% [markdown]
# ## Myth: the recipes of TensorRT 7 to 9
# Search for "TensorRT Python example" and you find code for a version that is long gone. Names were
# deprecated in 8 and 9 and removed in 10 and 11. You can see that without a GPU: the package
# `tensorrt-cu13-bindings` holds the Python classes. It can build nothing, and it fails with the
# error that you would get on a GPU.

# %% tags=["nbval-ignore-output"]
bindings = trt.names(FOLDER)
if bindings:
    print(f"TensorRT {bindings.__version__}")
    for recipe in trt.RECIPES:
        print(f"{recipe.line}\n    {recipe.today(bindings)}\n    now {recipe.new} {recipe.how}")
elif not machine.can("package:tensorrt_bindings"):
    print(machine.skip("package:tensorrt_bindings", "the names of TensorRT"))
else:
    print(machine.skip("compiler", "the names of TensorRT"))

# %% [markdown]
# One more stands in articles with many readers; it never existed outside them:

# %%
with exercises.fails(ModuleNotFoundError):
    import trt_torch

    trt_torch.load_model("model.trt")

# %% [markdown]
# ## Myth: you asked for the provider, so you have it
# ONNX Runtime can hand a graph to TensorRT: you list `TensorrtExecutionProvider` first. Whether it
# was *compiled in* is what `get_available_providers()` says. Whether it *loads*, and which one a
# session has, is another matter: where it does not load, you get a warning at most, and a session
# that works.

# %% tags=["nbval-ignore-output"]
WANTED = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
with warnings.catch_warnings(record=True):
    warnings.simplefilter("always")
    session = onnxruntime.InferenceSession(FOLDER / "fp32.onnx", providers=WANTED)
print("asked for:", WANTED[0])
print("runs on:  ", session.get_providers()[0])

# %% [markdown]
# Without a GPU the second line names the CPU, and a benchmark of this session gets TensorRT's name
# on its bar. Assert `session.get_providers()[0]` before you time; even then, single nodes may be
# left to the next provider.

# %% [markdown]
# ## Exit quiz
# **1. You set `BuilderFlag.INT8` in TensorRT 11. What happens?**
# <details><summary>the engine runs in INT8</summary>That needed calibration even in TensorRT 8, and
# the flag is gone.</details>
# <details><summary>it is ignored</summary>A flag that does not exist can't be passed.</details>
# <details><summary>AttributeError</summary>Right: precision is the graph's, by Q/DQ
# pairs.</details>
#
# **2. A Q/DQ file is slower than fp32. First you**
# <details><summary>count the integer kernels that the builder made</summary>Right: pairs that stay
# are extra work.</details>
# <details><summary>calibrate with more images</summary>That changes scales, and no time.</details>
# <details><summary>move to unsigned integers</summary>That helps where the builder wants them, and
# the count tells you whether it does.</details>
#
# **3. Engines for batch 1 and 64 differ in four kernels of nine. The batch decided**
# <details><summary>those four</summary>Two engines for the same batch may differ in as
# many.</details>
# <details><summary>at most what goes beyond two builds for one batch</summary>Right: that is the
# null.</details>
# <details><summary>none, it is noise</summary>It may be; the null tells how much of it.</details>
#
# **4. Your fp16 file passes a comparison in ONNX Runtime on a CPU. You know**
# <details><summary>that it is safe in fp16</summary>Its convolutions were computed in
# fp32.</details>
# <details><summary>that rounding its weights to fp16 did little harm</summary>Right, and nothing
# about overflow between layers.</details>
# <details><summary>nothing</summary>The weights are the file's: their rounding was
# tested.</details>
#
# **5. A profile's `max` is 256 and batches are never above 16. You pay with**
# <details><summary>memory, and perhaps with slower kernels</summary>Right: activations are planned
# for `max`, and kernels that can't take it are out.</details>
# <details><summary>accuracy</summary>Shapes do not change numbers.</details>
# <details><summary>nothing</summary>Memory is planned for the largest shape.</details>
#
# **Key points** · a builder fuses, times, remembers and plans memory · what two builds differ by is
# the yardstick for what tuning does · precision is in the graph: types and Q/DQ pairs · where a
# pair stands decides whether it helps, and each builder has its own rules · an fp16 file is tested
# by something that computes in fp16 · look at ranges before FP16 · an engine belongs to one GPU
# architecture and one version · what you asked for is not what you got: read the engine.
#
# **Sources** · NVIDIA's documentation of TensorRT: [explicit
# quantization](https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/quantized-types-explicit-quantization.html),
# [migration from 10 to
# 11](https://docs.nvidia.com/deeplearning/tensorrt/latest/api/migration/tensorrt-10x-to-11x-python-api-reference.html),
# [engine
# inspector](https://docs.nvidia.com/deeplearning/tensorrt/10.16.1/inference-library/engine-tools.html),
# [trtexec](https://docs.nvidia.com/deeplearning/tensorrt/latest/reference/command-line-programs.html),
# [TensorRT for
# RTX](https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/architecture/architecture-overview.html)
# · [Torch-TensorRT, saving
# models](https://docs.pytorch.org/TensorRT/user_guide/runtime_performance/saving_models.html) ·
# [ONNX Runtime's TensorRT
# provider](https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html) ·
# Micikevicius et al., *Mixed Precision Training*, 2018 · Wu et al., *Integer Quantization for Deep
# Learning Inference*, 2020.
#
# **What ran here** On a CPU: the race, pairs and types, both analogues, every comparison, the
# exercises. Checked by name and argument against the classes of TensorRT 10 and 11, and not run
# without a GPU: what stands below and `course_utils.trt`'s build, run, capture, inspect and refit.
# No machine with a GPU was at hand when this edition was made, so it shows no recorded run.
# Torch-TensorRT and ONNX Runtime's provider were written from their documentation.
#
# **For the capstone** row 12 of your ledger, *engines*: whether pairs became integer kernels and
# paid, whether FP16 kept the answers. Next: [13 · Dynamic batching](13_dynamic_batching.ipynb),
# where the batch sizes of your trace come from.

# %% [markdown]
# ## Further
# Each part stands alone.
#
# ### Model Optimizer and AutoCast
# *Model Optimizer* is NVIDIA's tool for the two files: it inserts the pairs, and *AutoCast* chooses
# the types. Both run on a CPU, in a process of their own here. Does it place the pairs where we
# did, and does AutoCast survive the stretched network?

# %% tags=["nbval-ignore-output"]
np.savez(FOLDER / "images.npz", x=train_images)
onnx.save(stretched, FOLDER / "stretched.onnx")


def model_optimizer(task, source, target):
    given = (str(FOLDER / source), str(FOLDER / target), str(FOLDER / "images.npz"))
    code = (
        f"import json; from course_utils import nvidia; print(json.dumps(nvidia.{task}(*{given})))"
    )
    return measure.child(code, timeout=300).result


installed = machine.can("package:modelopt") and machine.can("package:lief")
if installed and not SMOKE:
    tool = model_optimizer("int8", "fp32.onnx", "modelopt.onnx")
    print("the same places:", tool == qdq.paired(files["NVIDIA's guide"]))

# %% tags=["nbval-ignore-output"]
if installed and not SMOKE:
    casts = model_optimizer("fp16", "stretched.onnx", "autocast.onnx")
    autocast = onnx.load(FOLDER / "autocast.onnx")
    print(casts, "casts; as typed:", compare_outputs(expected, answers(autocast)[1]))
elif not installed:
    print(
        machine.skip(
            "package:modelopt" if not machine.can("package:modelopt") else "package:lief",
            "Model Optimizer",
        )
    )

# %% [markdown]
# ### On an NVIDIA GPU: engines
# In Colab: *Runtime, Change runtime type, T4 GPU*. Then, in a cell on top, and restart:
#
# ```
# !pip install -q tensorrt torch-tensorrt
# !pip uninstall -yq onnxruntime && pip install -q onnxruntime-gpu
# ```
#
# On a machine of your own the same packages, and `nvidia-smi` must list the card.

# %% tags=["nbval-ignore-output"]
ready = machine.can("gpu") and machine.can("package:tensorrt")
SHAPES = {"x": ((1, 1, 28, 28), (64, 1, 28, 28), (256, 1, 28, 28))}
sources = {"fp32": fp32, "fp16": half, "int8": files["NVIDIA's guide"]}
gpu_engines = {}


def skipped(part):
    return machine.skip("gpu" if not machine.can("gpu") else "package:tensorrt", part)


if ready:
    for name, model in sources.items():
        onnx.save(model, FOLDER / f"{name}.onnx")
        start = time.perf_counter()
        (FOLDER / f"{name}.plan").write_bytes(trt.build(FOLDER / f"{name}.onnx", [SHAPES]))
        gpu_engines[name] = trt.Engine((FOLDER / f"{name}.plan").read_bytes())
        steps = trt.layers(gpu_engines[name].inspect())
        print(f"{name}: {time.perf_counter() - start:.1f} s, {len(steps)} layers, whose first")
        print("   inputs are", sorted({s.inputs[0].dtype for s in steps if s.inputs}))
else:
    print(skipped("building and inspecting engines"))

# %% [markdown]
# Is each engine right? *fp16* is compared with the file as typed, where your engine should agree.

# %% tags=["nbval-ignore-output"]
if ready:
    for name, gpu_engine in gpu_engines.items():
        got = gpu_engine.run({"x": some[:256]})
        logits = got[gpu_engine.outputs[0]].float().cpu().numpy()
        print(name, compare_outputs(expected[:256], logits))
else:
    print(skipped("comparing engines with the files"))

# %% [markdown]
# Time them as CUDA graphs, so that it is the engine that is timed and not Python. The baselines are
# PyTorch as a CUDA graph, `torch.compile` with `mode="reduce-overhead"`, and the fp32 engine with
# TF32 off: PyTorch has it off for products by default, and cuDNN's convolutions have it on, so it
# is switched off here.


# %% tags=["nbval-ignore-output"]
def captured(name):
    """An engine at batch 64 as an arm: its CUDA graph alone."""
    call = gpu_engines[name].capture({"x": (64, 1, 28, 28)})
    call.inputs["x"].copy_(some[:64])
    return measure.Arm(call, name, dtype=name, batch=64)


verdicts = {}
if ready:
    torch.backends.cudnn.allow_tf32 = False
    on_gpu = some[:64].cuda()
    fast = torch.compile(models.baseline().cuda(), mode="reduce-overhead")
    base = measure.arm(fast, on_gpu, "torch.compile, reduce-overhead")
    arms = {name: captured(name) for name in gpu_engines}
    rivals = {"tensorrt_is_faster": (base, arms["fp32"])}
    rivals |= {"fp16_doubles": (arms["fp32"], arms["fp16"])}
    rivals |= {"int8_quadruples": (arms["fp32"], arms["int8"])}
    verdicts = {k: measure.compare(a, b, seconds=SECONDS) for k, (a, b) in rivals.items()}

# %% tags=["nbval-ignore-output"]
claims.verdict(
    "12.tensorrt_is_faster", verdicts.get("tensorrt_is_faster") or skipped("engine, PyTorch")
)

# %% tags=["nbval-ignore-output"]
claims.verdict("12.fp16_doubles", verdicts.get("fp16_doubles") or skipped("FP16 against fp32"))

# %% tags=["nbval-ignore-output"]
claims.verdict("12.int8_quadruples", verdicts.get("int8_quadruples") or skipped("INT8, fp32"))

# %% [markdown]
# This network is small: a graph of a few microseconds a kernel is still mostly launch. Build with a
# larger `max` if the gains look poor.
#
# ### What goes wrong
# Each failure that you can meet is one exception of `course_utils.trt`, with TensorRT's own words
# in it. Profiles are checked before TensorRT sees them, so the first two run everywhere.

# %% tags=["nbval-ignore-output"]
with exercises.fails(trt.ProfileError):
    trt.check_profiles({"x": (-1, 3)}, [{"x": ((1, 3), (64, 3), (32, 3))}])
with exercises.fails(trt.OutsideProfile):
    trt.choose_profile([SHAPES], {"x": (512, 1, 28, 28)})
(FOLDER / "broken.onnx").write_bytes(b"this is no graph")
if ready:
    with exercises.fails(trt.ParseError):
        trt.build(FOLDER / "broken.onnx")
    with exercises.fails(trt.EngineMismatch):
        trt.Engine((FOLDER / "fp32.plan").read_bytes()[:1000])
elif not machine.can("package:tensorrt"):
    with exercises.fails(trt.NoTensorRT):
        trt.build(FOLDER / "fp32.onnx", [SHAPES])
else:
    with exercises.fails(trt.NoDriver):
        trt.build(FOLDER / "fp32.onnx", [SHAPES])

# %% [markdown]
# ### A timing cache on disk, and new weights
# *Refit* puts the weights of a model that was trained on into an engine that is already there. It
# waits for the GPU first: with work still queued, the result is undefined. The third build below
# may measure nothing at all.

# %% tags=["nbval-ignore-output"]
if ready:
    times, plans_on_disk = FOLDER / "timing.cache", []
    for only_cached in (False, False, True):
        start, options = time.perf_counter(), {"timing_cache": times, "only_cached": only_cached}
        live = trt.Engine(trt.build(FOLDER / "fp32.onnx", [SHAPES], refit=True, **options))
        print(f"{time.perf_counter() - start:.1f} s")
    changed = rescaled(fp32, 0, 2.0)  # the same function, other weights
    onnx.save(changed, FOLDER / "changed.onnx")
    before = live.run({"x": on_gpu})[live.outputs[0]].clone()
    live.refit(FOLDER / "changed.onnx")
    print("moved by", float((live.run({"x": on_gpu})[live.outputs[0]] - before).abs().max()))
else:
    print(skipped("timing cache on disk, and refit"))

# %% [markdown]
# ### Without an ONNX file of yours
# *Torch-TensorRT* compiles a PyTorch model and keeps in torch what TensorRT can't do (print the
# result: every `_run_on_gpu` is a part that stayed). As called here it fixes the batch; give
# `torch_tensorrt.Input` with smallest, best and largest shape for a range.

# %% tags=["nbval-ignore-output"]
if ready and machine.can("package:torch_tensorrt"):
    import torch_tensorrt

    made = torch_tensorrt.compile(models.baseline().cuda(), ir="dynamo", arg_inputs=[on_gpu])
    torch_tensorrt.save(made, str(FOLDER / "trt.ep"), arg_inputs=[on_gpu])
    again = torch_tensorrt.load(str(FOLDER / "trt.ep")).module()
    print(compare_outputs(expected[:64], again(on_gpu).detach().cpu().numpy()))
elif not ready:
    print(skipped("Torch-TensorRT"))
else:
    print(machine.skip("package:torch_tensorrt", "Torch-TensorRT"))

# %% [markdown]
# ONNX Runtime's provider builds engines behind a session, and its cache keeps them. It works with
# one major version of TensorRT; its table says which. So the session is asked what it has.

# %% tags=["nbval-ignore-output"]
OPTIONS = {
    "trt_engine_cache_enable": True,
    "trt_engine_cache_path": str(FOLDER),
    "trt_timing_cache_enable": True,
    "trt_profile_min_shapes": "x:1x1x28x28",
    "trt_profile_opt_shapes": "x:64x1x28x28",
    "trt_profile_max_shapes": "x:256x1x28x28",
}
if ready:
    session = onnxruntime.InferenceSession(
        FOLDER / "int8.onnx", providers=[(WANTED[0], OPTIONS), *WANTED[1:]]
    )
    if session.get_providers()[0] == WANTED[0]:
        print(compare_outputs(expected[:64], session.run(None, {"x": batch})[0]))
    else:
        print(
            "asked for TensorRT, has", session.get_providers()[0], "- install the version it wants"
        )
else:
    print(skipped("ONNX Runtime's TensorRT provider"))

# %% [markdown]
# ### Polygraphy
# `polygraphy run fp32.onnx --trt --onnxrt` compares an engine with ONNX Runtime output by output.
# Its Python half runs here with ONNX Runtime on both sides.

# %% tags=["nbval-ignore-output"]
if machine.can("package:polygraphy"):
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.comparator import Comparator
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    onnx.save(files["NVIDIA's guide"], FOLDER / "guide.onnx")
    paths = [str(FOLDER / name) for name in ("fp32.onnx", "guide.onnx")]
    runners = [OnnxrtRunner(SessionFromOnnx(p, providers=["cpu"]), name=p) for p in paths]
    seen = Comparator.run(runners, data_loader=[{"x": pictures[:500]}])
    print(compare_outputs(*(seen[p][0]["linear"] for p in paths)))
else:
    print(machine.skip("package:polygraphy", "the comparison by Polygraphy"))

# %% [markdown]
# ### Beyond
# **FP8 and NVFP4** are pairs like INT8's, with float types; chapter 5 builds both formats, and
# Model Optimizer writes the files (`quantize(…, "fp8")`). **Plugins** are operators of your own: an
# `IPluginV3` in C++ or Python, registered under the name that the ONNX node has. **Streams**: one
# engine may have many execution contexts, one a stream; each has its own activations. **TensorRT
# for RTX** builds on a machine without a GPU, compiles when it is loaded, and keeps what it
# compiled in a *runtime cache*; its own `tensorrt_rtx` is its trtexec.
