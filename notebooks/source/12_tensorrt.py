# %% [markdown]
# # 12 · TensorRT
#
# **What does an engine builder decide for you, and what must your graph have decided before?**
#
# After this chapter you can: *write* a small builder that chooses kernels by timing them · *place*
# Q/DQ pairs so that a builder makes INT8 of them · *choose* the shapes of a profile from a trace ·
# *read* an engine's layers and find the one that was not fused · *replace* the recipes of TensorRT
# 7 to 9 by what works in 10 and 11.
#
# 150 minutes · before this: 5, 6 and 11 · runs on any CPU; with an NVIDIA GPU it builds real
# engines

# %% tags=["parameters"]
import os

PROFILE = os.environ.get("COURSE_PROFILE", "fast")

# %% tags=["nbval-ignore-output"]
import copy
import json
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from course_utils import claims, data, exercises, machine, measure, models, plots, scratch, trt

SMOKE = PROFILE == "smoke"
SECONDS = {"smoke": 0.2, "fast": 2.5, "full": 10.0}[PROFILE]  # for one comparison
BATCHES = [1, 4, 16] if SMOKE else [1, 4, 16, 64]
FOLDER = scratch("12")
machine.card()

# %% [markdown]
# *TensorRT* is NVIDIA's compiler for inference. You give it a graph, usually an ONNX file. Its
# *builder* works for some seconds or minutes and gives you an *engine*: a list of GPU kernels with
# the memory they use, for one GPU model and one TensorRT version. On a CPU you can't run an engine.
# You can run everything that decides whether the engine will be good: the graph, its Q/DQ pairs,
# its types, its shapes. The last part of the chapter does the rest where there is a GPU, and says
# so where not.
#
# ## Recall
# 1. (Chapter 5) A tensor holds values from −3 to 2. What are scale and zero-point of symmetric
#    signed 8-bit quantization?
#    <details><summary>Answer</summary>Scale $3/127$, zero-point 0: the larger of the two sides
#    decides, and real zero is integer zero.</details>
# 2. (Chapter 6) What does a pair QuantizeLinear, DequantizeLinear (Q/DQ for short) compute, if
#    nobody optimizes it?
#    <details><summary>Answer</summary>Floating-point numbers that were rounded to a grid on the
#    way. It costs time and saves none: a runtime must first find the pairs and put an integer
#    kernel in their place.</details>
# 3. (Chapter 11) Two runtimes are compared, one with two threads, one with its default. What do you
#    know?
#    <details><summary>Answer</summary>Nothing about the runtimes.</details>
#
# ## Predict
# You take the trained network and put Q/DQ pairs where NVIDIA's guide wants them. This one file
# goes to two CPU runtimes, each compared with its own fp32. How many times faster is it in the one
# that gains *less*? And: a builder times kernels and keeps the fastest. You build five times. For
# how many of the nine convolutions, in percent, does it choose the same kernel all five times?

# %%
my_factor = ...  # for example 1.5; below 1 is slower
my_share = ...  # percent
exercises.predict("12.qdq", my_factor)
exercises.predict("12.same", my_share)

# %% [markdown]
# ## From scratch: a builder
# A builder does four things: it *fuses* layers, it *chooses a kernel* for each by running the
# candidates on your device, it *remembers* what it measured, and it *plans memory*. Each fits in a
# few lines. First fusion: a BatchNorm after a convolution is folded into its weights (you wrote
# this in chapter 10; here torch does it).


# %%
def folded(model):
    """A copy of a mini-ResNet with every BatchNorm inside its convolution."""
    fold = torch.nn.utils.fusion.fuse_conv_bn_eval
    model = copy.deepcopy(model).eval().requires_grad_(False)
    model.stem = nn.Sequential(fold(model.stem[0], model.stem[1]), model.stem[2])
    for block in model.stages:
        block.conv1, block.bn1 = fold(block.conv1, block.bn1), nn.Identity()
        block.conv2, block.bn2 = fold(block.conv2, block.bn2), nn.Identity()
        if isinstance(block.shortcut, nn.Sequential):
            block.shortcut = fold(*block.shortcut)
    return model


baseline = models.baseline()
network = folded(baseline)
layers = {"before": len(list(baseline.modules())), "after": len(list(network.modules()))}
x = torch.randn(4, 1, 28, 28)
torch.testing.assert_close(network(x), baseline(x), atol=1e-4, rtol=0)

# %% [markdown]
# The candidates for one convolution. TensorRT calls each way of computing a layer a *tactic*; it
# has hundreds, we have three. They give the same numbers up to rounding and differ in the order of
# the data.


# %%
class Planes(nn.Module):
    """One channel after the other in memory (NCHW)."""

    order = torch.contiguous_format

    def __init__(self, conv):
        super().__init__()
        self.weight = conv.weight.detach().contiguous(memory_format=self.order)
        self.bias, self.stride, self.padding = conv.bias.detach(), conv.stride, conv.padding

    def forward(self, x):
        x = x.contiguous(
            memory_format=self.order
        )  # a reformat, if the layer before wrote otherwise
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


class Pixels(Planes):
    """All channels of a pixel side by side (channels last, NHWC)."""

    order = torch.channels_last


class Columns(Planes):
    """Every window copied into a column, then one matrix product (im2col)."""

    def forward(self, x):
        n, _, height, _ = x.shape
        side = self.weight.shape[2]
        columns = F.unfold(x, side, padding=self.padding, stride=self.stride)
        out = self.weight.flatten(1) @ columns + self.bias[:, None]
        return out.view(
            n, len(out[0]), (height + 2 * self.padding[0] - side) // self.stride[0] + 1, -1
        )


TACTICS = {"planes": Planes, "pixels": Pixels, "columns": Columns}

# %% [markdown]
# And the builder. It runs the network once to see which shape reaches each convolution, times the
# candidates on that shape, and puts the fastest in place. Times go into a dict, the *timing cache*;
# what is there need not be measured again.

# %%
import time


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
    """A copy of `model` with the fastest tactic for each convolution at x's shape, and the plan
    {layer: tactic}.
    """
    inputs, plan, engine = {}, {}, copy.deepcopy(model)
    convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    hooks = [
        m.register_forward_hook(lambda _, given, __, n=n: inputs.update({n: given[0]}))
        for n, m in convs.items()
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    for name, conv in convs.items():
        made = {tactic: kind(conv) for tactic, kind in TACTICS.items()}
        key = (tuple(conv.weight.shape), conv.stride, tuple(inputs[name].shape))
        for tactic, layer in made.items():
            if (*key, tactic) not in cache:
                cache[(*key, tactic)] = fastest(lambda layer=layer: layer(inputs[name]))
        plan[name] = min(made, key=lambda tactic: cache[(*key, tactic)])
        engine.set_submodule(name, made[plan[name]])
    return engine, plan


engine, plan = build(network, x, {})
torch.testing.assert_close(engine(x), network(x), atol=1e-4, rtol=0)
print(len(plan), "convolutions, the same answer within 0.0001")

# %% [markdown]
# ## Measure: who wins, and for whom?
# The same network is built for several batch sizes. (In TensorRT this shape is called *opt*, the
# one to tune for.)

# %% tags=["nbval-ignore-output"]
cache, engines, plans = {}, {}, {}
for b in BATCHES:
    engines[b], plans[b] = build(network, torch.randn(b, 1, 28, 28), cache)
convs = list(plans[1])
moved = sum(len({plans[b][name] for b in BATCHES}) > 1 for name in convs)
figure, ax = plots.axes(
    "batch size the engine was tuned for",
    "",
    title=f"Another batch size, another kernel: in {moved} of {len(convs)} layers",
    height=3.8,
)
for i, tactic in enumerate(TACTICS):
    won = [
        (k, r) for k, b in enumerate(BATCHES) for r, n in enumerate(convs) if plans[b][n] == tactic
    ]
    if won:
        style = {"marker": plots.MARKERS[i], "color": plots.COLOURS[i], "s": 70}
        ax.scatter(*zip(*won, strict=True), label=tactic, **style)
ax.set_xticks(range(len(BATCHES)), BATCHES)
ax.set_yticks(range(len(convs)), convs)
ax.margins(x=0.15)
ax.invert_yaxis()
figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
plots.show(figure, "For each convolution and batch size, a mark says which of three tactics won.")

# %% [markdown]
# Read along a row: where the mark changes, no single kernel is best for all batches, or two are
# nearly equal and noise chose (more on that below). Now the price. An engine tuned for batch 1 must
# serve the largest batch, and the other way round.

# %% tags=["nbval-ignore-output"]
large, cost = BATCHES[-1], {}
uniform = copy.deepcopy(network)  # one order of the data everywhere: no reformat inside
for name in convs:
    uniform.set_submodule(name, Pixels(network.get_submodule(name)))
others = {
    "batch 1, all pixels": (1, uniform),
    f"batch 1, tuned for {large}": (1, engines[large]),
    f"batch {large}, tuned for 1": (large, engines[1]),
}
for label, (served, other) in others.items():
    inputs = torch.randn(served, 1, 28, 28)
    right = measure.arm(engines[served], inputs, f"tuned for {served}")
    cost[label] = measure.across(right, measure.arm(other, inputs, label), seconds=SECONDS)
shown = cost[f"batch {large}, tuned for 1"]
plots.intervals(
    {name: c.interval for name, c in cost.items()},
    xlabel="speed against the engine tuned for that batch (x)",
    title=f"Tuned for 1, run at {large}: {shown.ratio:.2f}x the speed",
    alt=(
        "Three intervals: engines that were not tuned for the batch they serve, against the one"
        " that was."
    ),
)
claims.verdict("12.one_profile", shown)

# %% [markdown]
# Left of 1 the other engine is slower than the one tuned for the batch it serves. A GPU has many
# more tactics and larger gaps between them: that is why TensorRT lets one engine hold several
# *optimization profiles*, each with its own `min`, `opt` and `max` shape, and tunes each for its
# `opt`. From here on *profile* means one of these, not the course's `PROFILE`.
#
# Now look for a point *right* of 1: an engine that nobody tuned for this batch beats the one that
# was. Our race is greedy. It times each layer alone, and what it costs to change the order of the
# data *between* two layers is on nobody's bill. TensorRT puts it there: changes of order are layers
# of their own in an engine, named *Reformat*, and are timed like the others.
#
# Timing has noise. If two tactics are nearly equal, noise decides. Build the same network five
# times, each time afresh:

# %% tags=["nbval-ignore-output"]
again = [build(network, torch.randn(4, 1, 28, 28), {})[1] for _ in range(5)]
steady = sum(len({p[name] for p in again}) == 1 for name in convs) / len(convs)
exercises.reveal("12.same", 100 * steady, "%")
claims.verdict("12.same_engine", steady)

# %% [markdown]
# Two builds may give two engines. Their answers agree up to rounding, and no further. In TensorRT
# up to 10 a builder with the flag `FP16` could also race fp16 kernels against fp32 ones, so noise
# could decide the *precision* of a layer. TensorRT 11 has no such mode: types come from the graph
# (*strong typing*), and the race is between equals.
#
# The cache makes the second build cheap, and repeatable: the same times give the same plan.

# %% tags=["nbval-ignore-output"]
sample = torch.randn(4, 1, 28, 28)
warm: dict = {}
_, first = build(network, sample, warm)
print("from the cache, the same plan:", build(network, sample, warm)[1] == first)
cold_or_warm = measure.across(
    lambda: build(network, sample, {}),
    lambda: build(network, sample, warm),
    seconds=SECONDS,
    processes=6,
)
claims.verdict("12.timing_cache", cold_or_warm)

# %% [markdown]
# ## From scratch: planning memory
# An engine asks for its memory once. A tensor lives from the step that makes it to the last step
# that reads it; two tensors that never live together may share their bytes. For that we need the
# graph, with every tensor's size. Here it is as an ONNX file, batch left free.

# %%
import onnx
from onnx import helper, numpy_helper

torch.onnx.export(
    baseline,
    (torch.zeros(2, 1, 28, 28),),
    FOLDER / "fp32.onnx",
    input_names=["image"],
    output_names=["logits"],
    dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}},
    external_data=False,
    verbose=False,
)
fp32 = onnx.load(FOLDER / "fp32.onnx")
print(Counter(node.op_type for node in fp32.graph.node).most_common(3))


# %%
def all_tensors(model, feed):
    """Run a graph and return every tensor in it by name, inputs included."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    known = {o.name for o in wide.graph.output}
    made = [o for node in wide.graph.node for o in node.output if o not in known]
    wide.graph.output.extend(onnx.ValueInfoProto(name=o) for o in made)  # the type is inferred
    session = measure.onnx_session(wide.SerializeToString())
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(None, feed), strict=True)) | feed


# %%
def arena(sizes, lives):
    """Place tensors of `sizes` bytes that live from step a to step b; return (offset of each, bytes
    in all).
    """
    placed = {}
    for name in sorted(sizes, key=sizes.get, reverse=True):  # the largest first
        a, b = lives[name]
        taken = sorted(
            (placed[o], placed[o] + sizes[o])
            for o in placed
            if lives[o][0] <= b and lives[o][1] >= a
        )
        offset = 0
        for start, end in taken:
            if offset + sizes[name] <= start:
                break
            offset = max(offset, end)
        placed[name] = offset
    return placed, max(placed[n] + sizes[n] for n in sizes)


# %% tags=["nbval-ignore-output"]
image = models.normalise(data.fashion_mnist("test")[0][:1]).numpy()
values = all_tensors(fp32, {"image": image})
nodes = [n for n in fp32.graph.node if n.op_type != "Relu"]  # a ReLU works in place
alias = {n.output[0]: n.input[0] for n in fp32.graph.node if n.op_type == "Relu"}
sizes = {n.output[0]: values[n.output[0]].nbytes for n in nodes}
lives = {n.output[0]: [step, step] for step, n in enumerate(nodes)}
for step, n in enumerate(nodes):
    for name in n.input:
        if alias.get(name, name) in lives:
            lives[alias.get(name, name)][1] = step
together = max(
    sum(sizes[n] for n, (a, b) in lives.items() if a <= t <= b) for t in range(len(nodes))
)
print(
    f"all tensors: {sum(sizes.values()):,} bytes a picture; living at once: {together:,}", end="; "
)
print(f"arena: {arena(sizes, lives)[1]:,}")

# %% [markdown]
# The arena can't be smaller than what lives at once, and need not be much larger. It grows with the
# batch: the `max` of a profile decides how much memory an engine holds, also when small batches
# come.
#
# ## From scratch: a graph that says its precision
# Now INT8. In TensorRT 11 there is no INT8 switch and no calibrator: the graph holds *pairs*. A
# QuantizeLinear node writes a tensor as 8-bit integers, a DequantizeLinear node reads it back (Q
# and DQ for short). The builder looks for an operation between a DQ and the next Q and replaces the
# group by one integer kernel.
#
# TensorRT's scheme is
# [symmetric](https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html):
# zero-point 0, signed integers; one scale for an activation, one scale for each output channel of a
# weight. The scale of an activation comes from *calibration*: run some training images and note the
# largest magnitude of each tensor.

# %%
train_images = models.normalise(data.fashion_mnist("train")[0][:256]).numpy()
amax = {
    name: float(np.abs(v).max()) for name, v in all_tensors(fp32, {"image": train_images}).items()
}


def insert_pairs(model, tensors, amax, unsigned=()):
    """A copy of the graph with a Q/DQ pair on each of `tensors`; those in `unsigned` get uint8 in
    place of int8.
    """
    out = onnx.ModelProto()
    out.CopyFrom(model)
    graph = out.graph
    weights = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    pairs = {}
    for name in tensors:
        kind = np.dtype(np.uint8 if name in unsigned else np.int8)
        if name in weights:  # one scale for each output channel
            scale, axis = np.abs(weights[name]).reshape(len(weights[name]), -1).max(1), {"axis": 0}
        else:
            scale, axis = np.array(amax[name]), {}
        scale = np.maximum(scale / np.iinfo(kind).max, 1e-9).astype(np.float32)
        ends = [f"{name}.scale", f"{name}.zero"]
        graph.initializer.append(numpy_helper.from_array(scale, ends[0]))
        graph.initializer.append(numpy_helper.from_array(np.zeros(scale.shape, kind), ends[1]))
        q = helper.make_node("QuantizeLinear", [name, *ends], [f"{name}.q"], **axis)
        pairs[name] = [
            q,
            helper.make_node("DequantizeLinear", [f"{name}.q", *ends], [f"{name}.dq"], **axis),
        ]
    nodes, made = list(graph.node), {o for node in graph.node for o in node.output}
    ordered = [node for name in pairs if name not in made for node in pairs[name]]
    for node in nodes:  # every reader gets the DQ's output
        node.input[:] = [f"{name}.dq" if name in pairs else name for name in node.input]
        ordered += [node, *(pair for o in node.output for pair in pairs.get(o, []))]
    del graph.node[:]
    graph.node.extend(ordered)
    return out


# %% [markdown]
# Where do the pairs go? Five answers, from "the weights, to make the file honest" to "everywhere".
# The third one follows NVIDIA's [placement
# recommendations](https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html):
# data and weight of each convolution, no bias, and in a residual block *one* input of the Add, so
# that the Add can be fused into the convolution that makes the other one.

# %%
heavy = [n for n in fp32.graph.node if n.op_type == "Conv"]
adds = [n for n in fp32.graph.node if n.op_type == "Add"]
relus = {n.output[0] for n in fp32.graph.node if n.op_type == "Relu"}
weights = [n.input[1] for n in heavy]
inputs = list(dict.fromkeys(n.input[0] for n in heavy))
residual = [n.input[1] for n in adds if n.input[1] not in inputs]
every = list(dict.fromkeys(weights + inputs + [t for n in adds for t in n.input]))
placements = {
    "weights alone": (weights, ()),
    "each conv's inputs": (weights + inputs, ()),
    "NVIDIA's guide": (weights + inputs + residual, ()),
    "all inputs of Conv and Add": (every, ()),
    "the same, unsigned": (every, relus),  # a ReLU's output is never negative
}
files = {"fp32": fp32} | {n: insert_pairs(fp32, t, amax, u) for n, (t, u) in placements.items()}
print({name: len(tensors) for name, (tensors, _) in placements.items()})

# %% [markdown]
# First see that a pair computes what you think. Torch has the same operator, chapter 5's:

# %%
pair = all_tensors(files["NVIDIA's guide"], {"image": train_images[:2]})
first_weight = torch.tensor(
    numpy_helper.to_array(next(i for i in fp32.graph.initializer if i.name == weights[0]))
)
scales = first_weight.abs().flatten(1).amax(1).clamp_min(1e-9) / 127
theirs = torch.fake_quantize_per_channel_affine(
    first_weight, scales, torch.zeros(len(scales), dtype=torch.int32), 0, -128, 127
)
apart = float((torch.tensor(pair[f"{weights[0]}.dq"]) - theirs).abs().max() / scales.max())
print("ours and torch's differ by at most one step:", apart < 1.001)

# %% [markdown]
# ## Measure: one file, two builders
# TensorRT itself needs a GPU. But two other builders read the same file and do the same kind of
# work on a CPU: ONNX Runtime and OpenVINO. They stand here as **analogues**: what you see is how
# much a placement matters and that builders differ, not how TensorRT will do. Ask each how many of
# the nine convolutions it runs on integers.

# %% tags=["nbval-ignore-output"]
import onnxruntime

has_openvino = machine.can("package:openvino")
threads = torch.get_num_threads()


def integer_convs_onnxruntime(model):
    """Integer convolutions in the graph that ONNX Runtime executes."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(FOLDER / "optimized.onnx")
    options.log_severity_level = 3  # it warns that the saved file fits this machine alone
    onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    kinds = Counter(n.op_type for n in onnx.load(FOLDER / "optimized.onnx").graph.node)
    return kinds["QLinearConv"]


def openvino_compiled(model):
    import openvino

    onnx.save(model, FOLDER / "openvino.onnx")
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    return core.compile_model(core.read_model(FOLDER / "openvino.onnx"), "CPU", settings)


def integer_convs_openvino(compiled):
    found = 0
    for op in compiled.get_runtime_model().get_ops():
        info = {
            k: str(v.astype(str)) if hasattr(v, "astype") else str(v)
            for k, v in op.get_rt_info().items()
        }
        found += info.get("layerType") == "Convolution" and info.get("runtimePrecision") in (
            "u8",
            "i8",
        )
    return found


# %% tags=["nbval-ignore-output"]
compiled = {n: openvino_compiled(m) for n, m in files.items()} if has_openvino else {}
integers = {"ONNX Runtime": {n: integer_convs_onnxruntime(m) for n, m in files.items()}}
if has_openvino:
    integers["OpenVINO"] = {n: integer_convs_openvino(c) for n, c in compiled.items()}
else:
    print(machine.skip("package:openvino", "the second builder"))
for builder, counts in integers.items():
    print(f"{builder:13}", counts)
fewest = min(counts["NVIDIA's guide"] for counts in integers.values())
claims.verdict("12.qdq_is_int8", fewest / len(heavy))

# %% [markdown]
# ONNX Runtime makes an integer convolution only where the *output* has a pair too. A ReLU in
# between is in the way, except before an unsigned pair: rounding to 0 … 255 cuts off what is
# negative, so the ReLU is dropped. OpenVINO, like TensorRT, needs the two inputs and lets the
# output be a float. So a file made for one may be no INT8 at all in the other. And the time?

# %% tags=["nbval-ignore-output"]
from tqdm.auto import tqdm

test_images, test_labels = data.fashion_mnist("test")
batch = models.normalise(test_images[:64]).numpy()


def openvino_arm(name):
    return measure.Arm(lambda: compiled[name]({0: batch}), f"OpenVINO, {name}", threads, "", 64)


arms = {
    "ONNX Runtime": lambda name: measure.onnx_arm(
        measure.onnx_session(files[name].SerializeToString()), batch, f"ONNX Runtime, {name}"
    ),
    "OpenVINO": openvino_arm,
}
gains = {builder: {} for builder in integers}
for builder in tqdm(integers, desc="comparing", leave=False):
    base = arms[builder]("fp32")
    for name in ("weights alone", "NVIDIA's guide") if SMOKE else placements:
        result = measure.across(base, arms[builder](name), seconds=SECONDS / 2, processes=6)
        gains[builder][name] = result.interval

# %% tags=["nbval-ignore-output"]
guide = {builder: g["NVIDIA's guide"].value for builder, g in gains.items()}
figure, ax = plots.axes(
    "speed-up over the same builder's fp32 (x)",
    "",
    title="NVIDIA's placement: " + ", ".join(f"{v:.2f}x in {b}" for b, v in guide.items()),
    height=3.6,
)
ax.axvline(1, color="0.4", linewidth=1)
rows = np.arange(len(gains["ONNX Runtime"]))
for i, (builder, g) in enumerate(gains.items()):
    middle = np.array([v.value for v in g.values()])
    ends = [middle - [v.low for v in g.values()], [v.high for v in g.values()] - middle]
    style = {"fmt": plots.MARKERS[i], "color": plots.COLOURS[i], "capsize": 3}
    ax.errorbar(middle, rows + 0.14 * i, xerr=ends, label=builder, **style)
ax.set_yticks(rows, list(gains["ONNX Runtime"]))
ax.invert_yaxis()
figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
plots.show(
    figure,
    "Speed-up of five placements of Q/DQ pairs in two CPU builders, each against its own fp32.",
)
exercises.reveal("12.qdq", min(guide.values()), "times")
claims.verdict("12.qdq_is_faster", gains["ONNX Runtime"]["NVIDIA's guide"])

# %% [markdown]
# The five files hold the same network at the same 8 bits. Left of the line a file is *slower* than
# fp32: its pairs were not turned into integer kernels, so they are computed as extra work, and they
# stand in the way of fusions that fp32 gets. Compare with the counts above: where no convolution is
# an integer one, nothing can be gained. A Q/DQ file is a request. Whether it was granted is read in
# the engine, not in the file.
#
# ## Explain: what a builder does with your graph
# | Step | In the builder above | In TensorRT |
# |---|---|---|
# | fuse | BatchNorm into the convolution | also bias, ReLU, Add, pointwise chains, Q and DQ, attention |
# | choose | the fastest of three | the fastest of hundreds, for each profile's `opt` |
# | remember | a dict | a timing cache file, for one GPU model and version |
# | plan memory | an arena | the same, for each profile's `max` |
# | keep | modules in Python | a *plan file* with kernels and weights: an engine |
#
# An engine is not portable as an ONNX file is. It holds machine code for one architecture and a
# format of one version. Options `VERSION_COMPATIBLE` and `hardware_compatibility_level` widen that
# and cost speed. Keep the ONNX file; build where you run.
#
# ## If yours shows no gain
# | You see | Because | Look at |
# |---|---|---|
# | INT8 slower than fp32 | pairs that were not fused | count integer kernels (above), or the engine's layers (exercise C) |
# | INT8 as fast as fp32 on a CPU | no INT8 instructions: `vnni`, `amx` or `dotprod` is missing on the card on top | chapter 6 |
# | signed activations slower than unsigned | x86's dot product wants unsigned by signed; a GPU has no preference | the last two rows |
# | accuracy falls with unsigned activations | without VNNI, sums of two products saturate at 16 bits (ONNX Runtime calls the remedy `reduce_range`) | chapter 6 |
# | a GPU shows no gain at batch 1 | launches, not arithmetic, take the time | a larger batch, CUDA graphs |
# | FP16 no faster than fp32 | the types were left fp32 in the file, or casts stand around each layer | the inspector's types |
#
# ## The tool of the field: Model Optimizer and Polygraphy
# NVIDIA's *Model Optimizer* inserts the pairs and converts types, on a CPU; *Polygraphy* compares
# runtimes output by output. Model Optimizer is an optional package. Where it is missing, ONNX
# Runtime's quantizer and onnxconverter do the same.

# %% tags=["nbval-ignore-output"]
MODELOPT = """
import json
import numpy as np, onnx
from modelopt.onnx.quantization import quantize
from modelopt.onnx.autocast import convert_to_mixed_precision
folder = FOLDER
images = np.load(f"{folder}/calibration.npz")["image"]
if TASK == "int8":
    quantize(f"{folder}/fp32.onnx", "int8", {"image": images}, "max", calibration_eps=["cpu"],
             high_precision_dtype="fp32", output_path=f"{folder}/modelopt_int8.onnx",
             log_level="CRITICAL")
else:
    model = convert_to_mixed_precision(f"{folder}/{TASK}.onnx", "fp16", keep_io_types=True,
                                       calibration_data=f"{folder}/calibration.npz")
    onnx.save(model, f"{folder}/modelopt_{TASK}_fp16.onnx")
print(json.dumps("done"))
"""
np.savez(FOLDER / "calibration.npz", image=train_images)
has_modelopt = machine.can("package:modelopt") and machine.can(
    "package:lief"
)  # its ONNX part needs both


def modelopt(task):
    """Run Model Optimizer in a process of its own: it imports much."""
    return measure.child(f"FOLDER, TASK = {str(FOLDER)!r}, {task!r}\n" + MODELOPT).result


# %% tags=["nbval-ignore-output"]
if has_modelopt:
    modelopt("int8")
    tool, maker = onnx.load(FOLDER / "modelopt_int8.onnx"), "Model Optimizer"
else:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Once(CalibrationDataReader):
        def __init__(self):
            self.batches = iter([{"image": train_images}])

        def get_next(self):
            return next(self.batches, None)

    kinds = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}
    kinds |= {"op_types_to_quantize": ["Conv", "Add"], "per_channel": True}
    symmetric = {"ActivationSymmetric": True, "WeightSymmetric": True}
    clean, made = FOLDER / "clean.onnx", FOLDER / "ort_int8.onnx"
    quant_pre_process(FOLDER / "fp32.onnx", clean, skip_optimization=True)
    quantize_static(clean, made, Once(), extra_options=symmetric, **kinds)
    tool, maker = onnx.load(made), "ONNX Runtime's quantizer"
    lacking = "lief" if machine.can("package:modelopt") else "modelopt"
    print(machine.skip(f"package:{lacking}", "Model Optimizer"))


def paired(model):
    """Tensors that a QuantizeLinear node reads."""
    return {n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear"}


ours = paired(files["NVIDIA's guide"])
if has_modelopt:
    assert paired(tool) == ours, paired(tool) ^ ours
print(
    f"{maker}: {len(paired(tool))} pairs, ours: {len(ours)}, the same places:"
    f" {paired(tool) == ours}"
)

# %% [markdown]
# Model Optimizer puts its pairs where *NVIDIA's guide* row has them. (ONNX Runtime's quantizer
# serves ONNX Runtime, so it adds what that one needs.)
#
# Whether an engine computes the same as the file it came from is a question of its own. The
# comparison below is the one that the GPU part uses for every engine, so that you can read its
# lines now.


# %%
def compare_outputs(reference, candidate, atol):
    """How far two runtimes' logits are apart: largest and mean difference, cosine, share of equal
    classes, verdict.
    """
    a, b = np.asarray(reference, np.float64), np.asarray(candidate, np.float64)
    if a.shape != b.shape or not np.isfinite(b).all():
        return {"passed": False, "shape": b.shape, "not finite": int((~np.isfinite(b)).sum())}
    worst = float(np.abs(a - b).max())
    return {
        "largest": round(worst, 5),
        "mean": round(float(np.abs(a - b).mean()), 5),
        "cosine": round(float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())), 6),
        "same class (%)": round(100 * float((a.argmax(1) == b.argmax(1)).mean()), 2),
        "passed": worst <= atol,
    }


def answers(model, pictures):
    session = measure.onnx_session(model.SerializeToString())
    parts = [
        session.run(None, {"image": p})[0]
        for p in np.array_split(pictures, max(1, len(pictures) // 500))
    ]
    return np.concatenate(parts)


count = 1000 if SMOKE else 10000
pictures = models.normalise(test_images[:count]).numpy()
truth = answers(fp32, pictures)

# %% tags=["nbval-ignore-output"]
shown = {"fp32": fp32, "NVIDIA's guide": files["NVIDIA's guide"], maker: tool}
shown |= {"the same, unsigned": files["the same, unsigned"]}
for name, model in shown.items():
    got = answers(model, pictures)
    right = float((got.argmax(1) == test_labels[:count].numpy()).mean())
    print(f"{name:20} {right:.2%} right, {compare_outputs(truth, got, atol=1.0)}")
if has_openvino:
    other = compiled["fp32"]({0: pictures[:500]})[0]
    print("OpenVINO fp32       ", compare_outputs(truth[:500], other, atol=1e-3))

# %% tags=["nbval-ignore-output"]
if machine.can("package:polygraphy"):
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.comparator import Comparator
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    onnx.save(files["NVIDIA's guide"], FOLDER / "int8.onnx")
    runners = [
        OnnxrtRunner(SessionFromOnnx(str(FOLDER / f), providers=["cpu"]), name=f)
        for f in ("fp32.onnx", "int8.onnx")
    ]
    seen = Comparator.run(runners, data_loader=[{"image": pictures[:500]}])
    theirs = [seen[runner.name][0]["logits"] for runner in runners]
    by_polygraphy = compare_outputs(*theirs, atol=1.0)
    by_us = compare_outputs(truth[:500], answers(files["NVIDIA's guide"], pictures[:500]), atol=1.0)
    assert abs(by_polygraphy["largest"] - by_us["largest"]) < 1e-3
    print("Polygraphy's runners:", by_polygraphy)
else:
    print(machine.skip("package:polygraphy", "the comparison by Polygraphy"))

# %% [markdown]
# Look at *largest*, *mean* and *same class* together. INT8 moves every logit a little; what counts
# is how many answers it turns. A tolerance for INT8 on single logits would be guesswork, so
# accuracy on labelled images stands beside it.
#
# ## Measure: FP16 by types in the file
# A *mixed-precision* file has fp16 tensors and, where that is not safe, fp32 ones with Cast nodes
# between. An fp16 number reaches up to 65,504 (IEEE 754, 2008) and has 10 bits after the leading
# one. So convert, and leave in fp32 every node that reads or writes something too large. The ranges
# are there already: `amax`.

# %% tags=["nbval-ignore-output"]
import warnings

from onnxconverter_common import float16

SAFE = 65504 / 4  # other images may be larger than the calibration's


def to_fp16(model, amax, safe=SAFE):
    """A mixed-precision copy in which nodes with a tensor beyond `safe` stay in fp32, and the names
    of these nodes.
    """
    nodes = model.graph.node
    wide = [n.name for n in nodes if any(amax.get(t, 0) > safe for t in [*n.input, *n.output])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of each weight that is rounded to zero
        half = float16.convert_float_to_float16(
            copy.deepcopy(model), keep_io_types=True, node_block_list=wide
        )
    return half, wide


fp16, wide = to_fp16(fp32, amax)
got = answers(fp16, pictures)
result = compare_outputs(truth, got, atol=0.05)
print(f"{len(wide)} nodes left in fp32;", result)
print(f"bytes: fp32 {fp32.ByteSize():,}, fp16 {fp16.ByteSize():,}")
print(f"the same class: {100 * (truth.argmax(1) == got.argmax(1)).mean():.2f}% of {count} images")

# %% [markdown]
# ## Break it
# Now a network that is *the same function*, and still breaks. ReLU lets a positive factor pass:
# multiply one convolution's weights and bias by `2**17` and divide the next one's weights by it. In
# fp32 not one bit of the answer changes. In fp16 the numbers between the two have nowhere to go.


# %%
def rescaled(model, first, factor):
    """Multiply convolution number `first` by `factor` and divide the next one's weights by it: the
    same function.
    """
    out = copy.deepcopy(model)
    convs = [n for n in out.graph.node if n.op_type == "Conv"]
    scale = dict.fromkeys(convs[first].input[1:], factor) | {convs[first + 1].input[1]: 1 / factor}
    for i in out.graph.initializer:
        if i.name in scale:
            changed = numpy_helper.to_array(i) * np.float32(scale[i.name])
            i.CopyFrom(numpy_helper.from_array(changed, i.name))
    return out


stretched = rescaled(fp32, 3, 2.0**17)  # the first convolution of the second stage
some, expected = pictures[:500], truth[:500]
naive, _ = to_fp16(stretched, {})  # no ranges: everything is converted
ranges = {
    n: float(np.abs(v).max()) for n, v in all_tensors(stretched, {"image": train_images}).items()
}
blocked, wide = to_fp16(stretched, ranges)
trial = {"fp32": stretched, "everything fp16": naive, "wide nodes in fp32": blocked}
for name, model in trial.items():
    print(f"{name:24} right:", compare_outputs(expected, answers(model, some), 0.05)["passed"])

# %% [markdown]
# The last line is a surprise: the wide nodes run in fp32, and the answers are as wrong as before.
# Look where their weights come from.

# %%
kept = next(n for n in blocked.graph.node if n.name == wide[0])
source = next(n for n in blocked.graph.node if kept.input[1] in n.output)
stored = next(i for i in blocked.graph.initializer if i.name == source.input[0])
print(f"{kept.op_type} in fp32 reads a {source.op_type} of", numpy_helper.to_array(stored).dtype)


def weights_unlisted(model):
    """A copy that does not list its weights among the inner tensors (value_info), which an exporter
    may do.
    """
    out = copy.deepcopy(model)
    stored = {i.name for i in out.graph.initializer}
    inner = [v for v in model.graph.value_info if v.name not in stored]
    del out.graph.value_info[:]
    out.graph.value_info.extend(inner)
    return out


careful, _ = to_fp16(weights_unlisted(stretched), ranges)
passed = compare_outputs(expected, answers(careful, some), 0.05)["passed"]
print("wide nodes and their weights in fp32, right:", passed)

# %% [markdown]
# The converter stored the weights in fp16, the large ones cut off and the small ones rounded to
# zero, and cast them back. Two tools meet here, each right by itself: torch's exporter lists
# weights among the inner tensors, and the converter takes what stands in that list for an
# activation. Without the list it keeps the weights. There was no error and no warning that names
# the node: only the comparison of outputs shows it. NVIDIA's AutoCast gets it right by itself.

# %% tags=["nbval-ignore-output"]
trial["… and their weights"] = careful
if has_modelopt and not SMOKE:
    onnx.save(stretched, FOLDER / "stretched.onnx")
    modelopt("stretched")
    trial["AutoCast"] = onnx.load(FOLDER / "modelopt_stretched_fp16.onnx")
for name, model in trial.items():
    result = compare_outputs(expected, answers(model, some), 0.05)
    casts = sum(n.op_type == "Cast" for n in model.graph.node)
    print(f"{name:24} {casts} casts, {result}")

# %% [markdown]
# Nobody multiplies weights by `2**17` on purpose. But training does not see the scale between two
# such layers either, and real networks have inner values that differ by orders of magnitude.
# Calibrate FP16 as you calibrate INT8: look at the ranges first.
#
# ## Myth: the recipes of TensorRT 7 to 9
# Search for "TensorRT Python example" and you find code for a version that is long gone. Old names
# were deprecated in 8 and 9, removed in 10 and 11. You can see that without a GPU: the package
# `tensorrt-cu13-bindings` holds the Python classes. It wants NVIDIA's libraries when it is
# imported, and asks them for nine functions. For *reading names*, nine empty functions will do.

# %%
import ctypes
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path


def tensorrt_names(folder):
    """The module tensorrt if it can be imported; else its bindings over empty libraries; None
    without either.
    """
    if importlib.util.find_spec("tensorrt"):
        return trt.load()
    spec, compiler = importlib.util.find_spec("tensorrt_bindings"), shutil.which("cc")
    library = Path(spec.origin).parent / "tensorrt.so" if spec else Path()
    if not (library.is_file() and compiler):
        return None
    wanted = {
        "libnvinfer": "createInferBuilder createInferRuntime createInferRefitter",
        "libnvinfer_plugin": "initLibNvInferPlugins getBuilderPluginRegistry getPluginRegistry",
        "libnvonnxparser": "createNvOnnxParser createNvOnnxParserRefitter getNvOnnxParserVersion",
    }
    major = re.search(rb"libnvinfer\.so\.(\d+)", library.read_bytes()).group(1).decode()
    for stem, functions in wanted.items():
        names = [f + "_INTERNAL" * f.startswith("create") for f in functions.split()]
        source, target = Path(folder, f"{stem}.c"), Path(folder, f"{stem}.so.{major}")
        source.write_text("\n".join(f"void *{n}(void) {{ return 0; }}" for n in names))
        options = ["-shared", "-fPIC", f"-Wl,-soname,{target.name}", "-o"]
        subprocess.run([compiler, *options, target, source], check=True)
        ctypes.CDLL(str(target), ctypes.RTLD_GLOBAL)
    return importlib.import_module("tensorrt_bindings")


# %% [markdown]
# Nothing of this can build an engine. But a recipe that uses a name that is gone fails here with
# the error it would give you on a GPU.

# %% tags=["nbval-ignore-output"]
RECIPES = {  # what circulates: (the name it rests on, what took its place, how)
    "builder.build_engine(…)": ("Builder.build_engine", "Builder.build_serialized_network", ""),
    "build_cuda_engine(…)": ("Builder.build_cuda_engine", "Runtime.deserialize_cuda_engine", ""),
    "1 << …EXPLICIT_BATCH": (
        "NetworkDefinitionCreationFlag.EXPLICIT_BATCH",
        "Builder.create_network",
        "always so",
    ),
    "builder.max_batch_size = 64": ("Builder.max_batch_size", "IOptimizationProfile.set_shape", ""),
    "config.max_workspace_size = 1 << 30": (
        "IBuilderConfig.max_workspace_size",
        "IBuilderConfig.set_memory_pool_limit",
        "",
    ),
    "BuilderFlag.FP16": ("BuilderFlag.FP16", "INetworkDefinition.add_cast", "types in the file"),
    "BuilderFlag.INT8": ("BuilderFlag.INT8", "INetworkDefinition.add_quantize", "Q/DQ in the file"),
    "class C(IInt8EntropyCalibrator2)": (
        "IInt8EntropyCalibrator2",
        "INetworkDefinition.add_dequantize",
        "the same",
    ),
    "get_binding_index(name)": ("ICudaEngine.get_binding_index", "ICudaEngine.get_tensor_name", ""),
    "context.set_binding_shape(0, shape)": (
        "IExecutionContext.set_binding_shape",
        "IExecutionContext.set_input_shape",
        "",
    ),
    "context.execute_async_v2(bindings, stream)": (
        "IExecutionContext.execute_async_v2",
        "IExecutionContext.execute_async_v3",
        "set_tensor_address first",
    ),
}


# %% tags=["nbval-ignore-output"]
def look_up(module, chain):
    """The object at the end of a chain of attributes; AttributeError where it breaks."""
    for part in chain.split("."):
        module = getattr(module, part)
    return module


tensorrt = tensorrt_names(FOLDER)
if tensorrt:
    print(f"TensorRT {tensorrt.__version__}\n")
    for recipe, (old, new, how) in RECIPES.items():
        try:
            look_up(tensorrt, old)
            today = "still there, deprecated"
        except AttributeError as error:
            today = f"AttributeError: {error}"
        look_up(tensorrt, new)  # must be there
        print(f"{recipe}\n    {today}\n    now {new}" + (f" ({how})" if how else ""))
else:
    print(
        machine.skip("package:tensorrt_bindings", "the names of TensorRT")
        if not machine.can("package:tensorrt_bindings")
        else machine.skip("compiler", "the names of TensorRT")
    )

# %% [markdown]
# | Circulating recipe | Its error in TensorRT 11 | What replaced it |
# |---|---|---|
# | `builder.build_engine`, `build_cuda_engine` | no attribute `build_engine` | `build_serialized_network` gives bytes; a `Runtime` makes an engine of them |
# | `EXPLICIT_BATCH` | no attribute | nothing: every network has its batch dimension |
# | `max_workspace_size` | no attribute | `set_memory_pool_limit(MemoryPoolType.WORKSPACE, …)` |
# | `BuilderFlag.FP16`, `INT8`, calibrators | no attribute | types and Q/DQ pairs in the ONNX file |
# | `get_binding_*`, `execute_async_v2` | no attribute | tensors by name, `set_tensor_address`, `execute_async_v3` |
# | `import trt_torch; trt_torch.load_model(…)` | no such module | `torch_tensorrt.load`, or `course_utils.trt.Engine` |
#
# The last one is worth a run. It stands in articles with many readers, and following them leads to
# this:

# %%
with exercises.fails(ModuleNotFoundError):
    import trt_torch

    trt_torch.load_model("model.trt")

# %% [markdown]
# ## Myth: you asked for the provider, so you have it
# ONNX Runtime can hand a graph to TensorRT: you list `TensorrtExecutionProvider` first. If that
# provider is not there, you get a warning at most, and a session that works.

# %% tags=["nbval-ignore-output"]
WANTED = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
with warnings.catch_warnings(record=True):
    warnings.simplefilter("always")
    session = onnxruntime.InferenceSession(FOLDER / "fp32.onnx", providers=WANTED)
print("asked for:", WANTED[0])
print("runs on:  ", session.get_providers()[0])

# %% [markdown]
# On a machine without a GPU the second line names the CPU. A benchmark of this session measures the
# CPU and gets TensorRT's name on its bar. Always print `session.get_providers()`; even then, single
# nodes may have been left to the next provider.
#
# ## On an NVIDIA GPU
# In Colab: *Runtime, Change runtime type, T4 GPU*. Then, in a cell on top, and restart:
#
# ```
# !pip install -q tensorrt torch-tensorrt
# !pip uninstall -yq onnxruntime && pip install -q onnxruntime-gpu
# ```
#
# On a machine of your own the same packages, and `nvidia-smi` must list the card. ONNX Runtime's
# provider works with one major version of TensorRT; its
# [table](https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html) says
# which.
#
# This is how an engine is built; it is the code of `course_utils.trt`, in full. Read it beside the
# table above.

# %%
import inspect

print(inspect.getsource(trt.build).split('"""')[2])

# %% tags=["nbval-ignore-output"]
ready = machine.can("gpu") and machine.can("package:tensorrt")
PROFILE_SHAPES = {"image": ((1, 1, 28, 28), (64, 1, 28, 28), (256, 1, 28, 28))}


def skipped(part):
    return machine.skip("gpu" if not machine.can("gpu") else "package:tensorrt", part)


trt_files = {
    "fp32": FOLDER / "fp32.onnx",
    "fp16": FOLDER / "fp16.onnx",
    "int8": FOLDER / "int8.onnx",
}
onnx.save(fp16, trt_files["fp16"])
onnx.save(files["NVIDIA's guide"], trt_files["int8"])
gpu_engines = {}
if ready:
    for name, path in trt_files.items():
        start = time.perf_counter()
        bytes_of_plan = trt.build(path, [PROFILE_SHAPES])
        (FOLDER / f"{name}.plan").write_bytes(bytes_of_plan)
        gpu_engines[name] = trt.Engine(bytes_of_plan)
        steps = trt.layers(gpu_engines[name].inspect())
        print(
            f"{name}: {time.perf_counter() - start:.1f} s, {len(bytes_of_plan):,} bytes,", end=" "
        )
        print(f"{len(steps)} layers, reading {Counter(t for s in steps for t in s.reads[:1])}")
    layers_made = len(trt.layers(gpu_engines["fp32"].inspect()))
    print(f"{len(fp32.graph.node)} ONNX nodes became {layers_made} layers")
else:
    print(skipped("building and inspecting engines"))

# %% [markdown]
# Is each engine right? The same comparison as before, against ONNX Runtime's answers for the same
# file.

# %% tags=["nbval-ignore-output"]
if ready:
    tolerance = {"fp32": 0.05, "fp16": 0.1, "int8": 1.0}  # fp32 engines may use TF32
    sources = {"fp32": fp32, "fp16": fp16, "int8": files["NVIDIA's guide"]}
    for name, gpu_engine in gpu_engines.items():
        chunks = torch.tensor(pictures).split(256)
        got = torch.cat([gpu_engine.run({"image": c})["logits"].float().cpu() for c in chunks])
        print(name, compare_outputs(answers(sources[name], pictures), got.numpy(), tolerance[name]))
else:
    print(skipped("comparing engines with ONNX Runtime"))

# %% tags=["nbval-ignore-output"]
verdicts = {}
if ready:
    on_gpu = torch.tensor(batch).cuda()
    eager = measure.arm(copy.deepcopy(baseline).cuda(), on_gpu, "eager PyTorch")
    gpu_arms = {
        name: measure.Arm(lambda e=e: e.run({"image": on_gpu}), name, dtype=name, batch=64)
        for name, e in gpu_engines.items()
    }
    pairs_of_arms = {
        "12.tensorrt_is_faster": (eager, gpu_arms["fp32"]),
        "12.fp16_doubles": (gpu_arms["fp32"], gpu_arms["fp16"]),
        "12.int8_quadruples": (gpu_arms["fp32"], gpu_arms["int8"]),
    }
    verdicts = {k: measure.compare(a, b, seconds=SECONDS) for k, (a, b) in pairs_of_arms.items()}
print(
    claims.verdict(
        "12.tensorrt_is_faster",
        verdicts.get("12.tensorrt_is_faster") or skipped("engine against eager"),
    )
)
print(
    claims.verdict(
        "12.fp16_doubles", verdicts.get("12.fp16_doubles") or skipped("FP16 against fp32")
    )
)
print(
    claims.verdict(
        "12.int8_quadruples", verdicts.get("12.int8_quadruples") or skipped("INT8 against fp32")
    )
)

# %% [markdown]
# This network is small. If the GPU's gains look poor, raise the batch: a kernel that lasts a few
# microseconds is mostly launch.
#
# Errors next. Each failure you can meet is one exception of `course_utils.trt`, with TensorRT's own
# words in it. Profiles are checked before TensorRT sees them, so these two run everywhere:

# %%
with exercises.fails(trt.ProfileError):
    trt.check_profiles(
        {"image": (-1, 1, 28, 28)}, [{"image": ((1, 1, 28, 28), (64, 1, 28, 28), (32, 1, 28, 28))}]
    )
with exercises.fails(trt.OutsideProfile):
    trt.choose_profile([PROFILE_SHAPES], {"image": (512, 1, 28, 28)})

# %% tags=["nbval-ignore-output"]
(FOLDER / "broken.onnx").write_bytes(b"this is no graph")
if ready:
    with exercises.fails(trt.ParseError):
        trt.build(FOLDER / "broken.onnx")
    with exercises.fails(trt.EngineMismatch):
        trt.Engine((FOLDER / "fp32.plan").read_bytes()[:1000])
    with exercises.fails(trt.OutsideProfile):
        gpu_engines["fp32"].run({"image": torch.zeros(512, 1, 28, 28)})
elif not machine.can("package:tensorrt"):
    with exercises.fails(trt.NoTensorRT):
        trt.build(FOLDER / "fp32.onnx", [PROFILE_SHAPES])
else:
    with exercises.fails(trt.NoDriver):
        trt.build(FOLDER / "fp32.onnx", [PROFILE_SHAPES])

# %% [markdown]
# A timing cache on disk, and *refit*: new weights into an engine that is already there, for a model
# that was trained on.

# %% tags=["nbval-ignore-output"]
if ready:
    (FOLDER / "timing.cache").unlink(missing_ok=True)
    for turn in ("empty", "filled"):
        start = time.perf_counter()
        refittable = trt.build(
            trt_files["fp32"], [PROFILE_SHAPES], timing_cache=FOLDER / "timing.cache", refit=True
        )
        print(f"{turn} timing cache: {time.perf_counter() - start:.1f} s")
    changed = onnx.ModelProto()
    changed.CopyFrom(fp32)
    last = next(i for i in changed.graph.initializer if i.name.endswith("fc.bias"))
    last.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(last) + np.float32(1), last.name))
    onnx.save(changed, FOLDER / "changed.onnx")
    live = trt.Engine(refittable)
    before = live.run({"image": on_gpu})["logits"].clone()
    live.refit(FOLDER / "changed.onnx")
    print("every logit moved by", float((live.run({"image": on_gpu})["logits"] - before).mean()))
else:
    print(skipped("timing cache on disk, and refit"))

# %% [markdown]
# Two ways to TensorRT that need no ONNX file of yours, or no code of yours. *Torch-TensorRT*
# compiles a PyTorch model, keeps in torch what TensorRT can't do, and saves the result. *ONNX
# Runtime's provider* builds engines behind a session; its cache keeps them.

# %% tags=["nbval-ignore-output"]
if ready and machine.can("package:torch_tensorrt"):
    import torch_tensorrt

    compiled_torch = torch_tensorrt.compile(
        copy.deepcopy(baseline).cuda(), ir="dynamo", arg_inputs=[on_gpu]
    )
    torch_tensorrt.save(compiled_torch, str(FOLDER / "trt.ep"), arg_inputs=[on_gpu])
    reloaded = torch_tensorrt.load(str(FOLDER / "trt.ep")).module()
    got = reloaded(on_gpu).detach().cpu().numpy()
    print("Torch-TensorRT:", compare_outputs(answers(fp32, batch), got, 0.05))
elif not ready:
    print(skipped("Torch-TensorRT"))
else:
    print(machine.skip("package:torch_tensorrt", "Torch-TensorRT"))
if ready and WANTED[0] in onnxruntime.get_available_providers():
    options = {
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(FOLDER),
        "trt_timing_cache_enable": True,
        "trt_profile_min_shapes": "image:1x1x28x28",
        "trt_profile_opt_shapes": "image:64x1x28x28",
        "trt_profile_max_shapes": "image:256x1x28x28",
    }
    session = onnxruntime.InferenceSession(
        FOLDER / "int8.onnx", providers=[(WANTED[0], options), *WANTED[1:]]
    )
    got = session.run(None, {"image": batch})[0]
    print(
        session.get_providers()[0],
        compare_outputs(answers(files["NVIDIA's guide"], batch), got, 1.0),
    )
elif not ready:
    print(skipped("ONNX Runtime's TensorRT provider"))
else:
    print("This onnxruntime has no TensorRT provider: install onnxruntime-gpu.")

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
# show the row "all inputs of Conv and Add" of the figure.

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
# 12 minutes. The discussion is worth more than the code: what if tomorrow's largest batch is
# larger? (An error, `OutsideProfile`: the service must split it, as chapter 13's batcher does.)
# When are two profiles worth their second set of kernels?

# %% [markdown]
# ## Exercise C · read an engine's dump
# `trt.layers` and Nsight both start from the inspector's JSON. Here is a dump of five layers. It is
# **synthetic**: written by hand in the inspector's form, because this course shows no recorded GPU
# output. TensorRT 11 may keep format and type under two keys; `trt.layers` reads both forms, and
# yours need only read this one.

# %%
LAYERS = [
    {
        "Name": "conv1 + relu1",
        "LayerType": "CaskConvolution",
        "Metadata": "[ONNX Layer: conv1]\u001e[ONNX Layer: relu1]",
        "Inputs": [{"Name": "image", "Format/Datatype": "Row major Int8 format"}],
        "Outputs": [{"Name": "t1", "Format/Datatype": "Row major Int8 format"}],
    },
    {
        "Name": "conv2",
        "LayerType": "CaskConvolution",
        "Metadata": "[ONNX Layer: conv2]",
        "Inputs": [{"Name": "t1", "Format/Datatype": "Row major Int8 format"}],
        "Outputs": [{"Name": "t2", "Format/Datatype": "Row major linear FP16 format"}],
    },
    {
        "Name": "PWN(relu2)",
        "LayerType": "PointWiseV2",
        "Metadata": "[ONNX Layer: relu2]",
        "Inputs": [{"Name": "t2", "Format/Datatype": "Row major linear FP16 format"}],
        "Outputs": [{"Name": "t3", "Format/Datatype": "Row major linear FP16 format"}],
    },
    {
        "Name": "pool",
        "LayerType": "CaskPooling",
        "Metadata": "[ONNX Layer: pool]",
        "Inputs": [{"Name": "t3", "Format/Datatype": "Row major linear FP16 format"}],
        "Outputs": [{"Name": "t4", "Format/Datatype": "Row major linear FP16 format"}],
    },
    {
        "Name": "conv3",
        "LayerType": "CaskConvolution",
        "Metadata": "[ONNX Layer: conv3]",
        "Inputs": [{"Name": "t4", "Format/Datatype": "Row major linear FP16 format"}],
        "Outputs": [{"Name": "logits", "Format/Datatype": "Row major linear FP32 format"}],
    },
]

# %%
DUMP = json.dumps({"Layers": LAYERS})
for layer in trt.layers(DUMP):
    print(
        f"{layer.name:14} {layer.kind:16} {layer.reads[0]} → {layer.writes[0]}, made of"
        f" {layer.nodes}"
    )

# %% [markdown]
# Write `faults(text)` that returns a dict from layer name to fault:
#
# - `"precision"`: a layer whose `LayerType` contains `Convolution` and whose *first input* is not
#   INT8, in whatever case the type is written;
# - `"fusion"`: a layer that is no convolution, that has ONNX nodes (in `Metadata`, which may be
#   empty) which *all* begin with `relu` or `add`, and one of whose inputs is a convolution's output
#   that **no other** layer reads. The convolution could have taken it in.
#
# Reformat and pooling layers are no faults, and layers stand in any order. For `DUMP` the right
# answer is `{"PWN(relu2)": "fusion", "conv3": "precision"}`.


# %% tags=["exercise"]
def faults(text): ...


# %%
exercises.check("12.C", faults)

# %% [markdown] tags=["hint"]
# First pass: which layer makes each tensor, and how many layers read it.

# %% [markdown] tags=["hint"]
# `re.findall(r"\[ONNX Layer: ([^\]]+)\]", metadata)` gives the nodes. A Reformat has none:
# `all([])` is true in Python.

# %% [markdown] tags=["hint"]
# Compare types in one case: `"INT8" in text.upper()`.


# %% tags=["solution"]
def faults(text):
    import json
    import re
    from collections import Counter

    layers = json.loads(text)["Layers"]
    convolutions = [layer for layer in layers if "Convolution" in layer["LayerType"]]
    made = {t["Name"] for layer in convolutions for t in layer["Outputs"]}
    readers = Counter(name for layer in layers for name in {t["Name"] for t in layer["Inputs"]})
    found = {}
    for layer in layers:
        nodes = re.findall(r"\[ONNX Layer: ([^\]]+)\]", layer["Metadata"])
        if layer in convolutions:
            if "INT8" not in layer["Inputs"][0]["Format/Datatype"].upper():
                found[layer["Name"]] = "precision"
            continue
        alone = any(t["Name"] in made and readers[t["Name"]] == 1 for t in layer["Inputs"])
        if alone and nodes and all(n.startswith(("relu", "add")) for n in nodes):
            found[layer["Name"]] = "fusion"
    return found


# %% tags=["wrong"]
# Looks at the names: a convolution that holds its ReLU is called "conv + relu" and is no fault.
def faults(text):
    import json

    found = {}
    for layer in json.loads(text)["Layers"]:
        if "relu" in layer["Name"] or "add" in layer["Name"]:
            found[layer["Name"]] = "fusion"
        elif "Conv" in layer["LayerType"] and "INT8" not in str(layer["Inputs"]).upper():
            found[layer["Name"]] = "precision"
    return found


# %% tags=["wrong"]
# Judges a convolution by its output: an INT8 kernel may write floats.
def faults(text):
    import json
    import re
    from collections import Counter

    layers = json.loads(text)["Layers"]
    maker = {t["Name"]: layer for layer in layers for t in layer["Outputs"]}
    readers = Counter(t["Name"] for layer in layers for t in layer["Inputs"])
    found = {}
    for layer in layers:
        nodes = re.findall(r"\[ONNX Layer: ([^\]]+)\]", layer["Metadata"])
        first = layer["Inputs"][0]["Name"]
        if "Convolution" in layer["LayerType"]:
            if "INT8" not in layer["Outputs"][0]["Format/Datatype"].upper():
                found[layer["Name"]] = "precision"
        elif nodes and all(n.startswith(("relu", "add")) for n in nodes):
            source = maker.get(first, {"LayerType": ""})
            if "Convolution" in source["LayerType"] and readers[first] == 1:
                found[layer["Name"]] = "fusion"
    return found


# %% tags=["wrong"]
# A convolution whose output two layers read can't take one of them in. The edge.
def faults(text):
    import json
    import re

    layers = json.loads(text)["Layers"]
    maker = {t["Name"]: layer for layer in layers for t in layer["Outputs"]}
    found = {}
    for layer in layers:
        nodes = re.findall(r"\[ONNX Layer: ([^\]]+)\]", layer["Metadata"])
        first = layer["Inputs"][0]
        if "Convolution" in layer["LayerType"]:
            if "INT8" not in first["Format/Datatype"].upper():
                found[layer["Name"]] = "precision"
        elif (
            nodes
            and all(n.startswith(("relu", "add")) for n in nodes)
            and "Convolution" in maker.get(first["Name"], {"LayerType": ""})["LayerType"]
        ):
            found[layer["Name"]] = "fusion"
    return found


# %% tags=["wrong"]
# Every layer that is no convolution and reads one: Reformat and pooling are accused too.
def faults(text):
    import json

    layers = json.loads(text)["Layers"]
    maker = {t["Name"]: layer for layer in layers for t in layer["Outputs"]}
    found = {}
    for layer in layers:
        first = layer["Inputs"][0]
        if "Convolution" in layer["LayerType"]:
            if "INT8" not in first["Format/Datatype"].upper():
                found[layer["Name"]] = "precision"
        elif "Convolution" in maker.get(first["Name"], {"LayerType": ""})["LayerType"]:
            found[layer["Name"]] = "fusion"
    return found


# %% [markdown] tags=["instructor"]
# 15 minutes. Who has a GPU runs `faults(gpu_engines["int8"].inspect())` afterwards. In TensorRT 11
# many layers are made by one compiler (names with `__myl_`); their types read `Int8` and `Half`
# without a format, and may stand under another key: then `faults` must be written on `trt.layers`.

# %% [markdown]
# ## Exit quiz
# **1. You set `BuilderFlag.INT8` in TensorRT 11. What happens?**
# <details><summary>the engine runs in INT8</summary>That needed calibration even in TensorRT 8, and
# the flag is gone.</details>
# <details><summary>AttributeError</summary>Right: precision is the graph's, by Q/DQ
# pairs.</details>
# <details><summary>it is ignored</summary>A flag that does not exist can't be passed.</details>
#
# **2. A Q/DQ file is slower than fp32. First you**
# <details><summary>count the integer kernels that the builder made</summary>Right: pairs that stay
# are extra work.</details>
# <details><summary>calibrate with more images</summary>That changes scales, and no time.</details>
# <details><summary>lower the batch</summary>Then launches weigh more.</details>
#
# **3. Two builds of one graph give different kernels. Why?**
# <details><summary>kernels are chosen by timing, and timing has noise</summary>Right; a timing
# cache makes it repeatable.</details>
# <details><summary>weights are initialised anew</summary>They come from the file.</details>
# <details><summary>it is a bug</summary>It is how the choice is made.</details>
#
# **4. A profile's `max` is 256 and batches are never above 16. You pay with**
# <details><summary>accuracy</summary>Shapes do not change numbers.</details>
# <details><summary>memory, and perhaps with slower kernels</summary>Right: activations are planned
# for `max`.</details>
# <details><summary>nothing</summary>Memory is planned for the largest shape.</details>
#
# **5. An engine from your RTX card is copied to an older GPU. It**
# <details><summary>runs slower</summary>It holds machine code for another architecture.</details>
# <details><summary>does not load</summary>Right: `EngineMismatch`. Build it there, from the ONNX
# file.</details>
# <details><summary>is converted on loading</summary>Only ONNX files travel.</details>
#
# **Key points** · a builder fuses, times, remembers and plans memory · precision is in the graph:
# types and Q/DQ pairs · where a pair stands decides whether it helps, and each builder has its own
# rules · tune for the shape that costs you most · an engine belongs to one GPU and one version ·
# look at ranges before FP16 · what you asked for is not what you got: read the engine.
#
# **Sources** · NVIDIA's documentation of TensorRT: [explicit
# quantization](https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/quantized-types-explicit-quantization.html),
# [migration from 10 to
# 11](https://docs.nvidia.com/deeplearning/tensorrt/latest/api/migration/tensorrt-10x-to-11x-python-api-reference.html),
# [engine
# inspector](https://docs.nvidia.com/deeplearning/tensorrt/10.16.1/inference-library/engine-tools.html)
# · [Torch-TensorRT, saving
# models](https://docs.pytorch.org/TensorRT/user_guide/runtime_performance/saving_models.html) ·
# [ONNX Runtime's TensorRT
# provider](https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html) ·
# Micikevicius et al., *Mixed Precision Training*, 2018 · Wu et al., *Integer Quantization for Deep
# Learning Inference*, 2020.
#
# **What ran here** On a CPU: the builder, the memory plan, pairs and types, both analogues, every
# comparison, the exercises. Checked by name against the real bindings, and not run without a GPU:
# `course_utils.trt`'s build, run, inspect and refit. Torch-TensorRT and ONNX Runtime's provider
# were written from their documentation.
#
# **For the capstone** row 12 of your ledger, *engines*: whether one profile is enough, whether
# pairs became integer kernels and paid, whether FP16 kept the answers. Next: [13 · Dynamic
# batching](13_dynamic_batching.ipynb), where the batch sizes of your trace come from.
