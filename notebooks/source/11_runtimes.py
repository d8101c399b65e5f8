# %% [markdown]
# # 11 · Runtimes
#
# **Which program should run your model, and how do you know that it runs the model you trained?**
#
# After this chapter you can: *export* a network and check the export over batch sizes · *read* a
# graph before and after its optimiser · *compare* five ways to run one model so that they do not
# disturb each other · *recognise* the errors of a broken file · *choose* a runtime from your own
# table.
#
# 115 minutes · before this: 1 Measurement, 10 Operator fusion · runs on any CPU

# %% tags=["parameters"]
import os

PROFILE = os.environ.get("COURSE_PROFILE", "fast")

# %% tags=["nbval-ignore-output"]
import copy
import importlib.metadata
import time
from collections import Counter

import numpy as np
import torch
from torch import nn

from course_utils import claims, data, exercises, machine, measure, models, plots, scratch

SMOKE, FULL = PROFILE == "smoke", PROFILE == "full"
SECONDS = {"smoke": 0.1, "fast": 1.5, "full": 8.0}[PROFILE]  # for one comparison
FOLDER = scratch("11")
THREADS = torch.get_num_threads()
machine.card()

# %% [markdown]
# ## Recall
# 1. (Chapter 1) ONNX Runtime is three times faster than eager on two threads against one. What do
#    you know?
#    <details><summary>Answer</summary>Not how much is the runtime's: the threads differ, too.
#    `measure.compare` refuses such a pair.</details>
# 2. (Chapter 6) INT8 in ONNX Runtime beats eager fp32. Which comparison is missing?
#    <details><summary>Answer</summary>INT8 against the same runtime's fp32, so that the runtime's
#    part is known.</details>
# 3. (Chapter 10) What does folding a BatchNorm need to be legal?
#    <details><summary>Answer</summary>Eval mode, a convolution before it that is called once, and
#    nobody else who reads its output.</details>
#
# ## Predict
# The course's network, batch 1, the same threads: how many times faster is ONNX Runtime than eager
# PyTorch? And: an optimiser takes away about half of ResNet-18's nodes. How many times faster is
# the rest?

# %%
my_runtime = ...
my_nodes = ...
exercises.predict("11.runtime", my_runtime)
exercises.predict("11.nodes", my_nodes)

# %% [markdown]
# ## From scratch: from a program to a graph
# A PyTorch model is a Python program. Another program can run it only as data: a list of operations
# with their inputs and outputs, and the weights. *ONNX* is a file format for that. Exporting runs
# the model with stand-ins, as `torch.fx` did in chapter 10, and writes down what happens.

# %%
import onnx

baseline = models.baseline()
two_images = torch.zeros(2, 1, 28, 28)


def export(model, example, name, *, free_batch=True, external=False):
    """Write FOLDER/name; with `free_batch` the first dimension may be anything later."""
    shapes = {"dynamic_shapes": {"x": {0: torch.export.Dim.DYNAMIC}}} if free_batch else {}
    torch.onnx.export(
        model,
        (example,),
        FOLDER / name,
        input_names=["image"],
        output_names=["logits"],
        external_data=external,
        verbose=False,
        **shapes,
    )
    return FOLDER / name


graph = onnx.load(export(baseline, two_images, "net.onnx")).graph
for node in graph.node[:5]:
    print(f"{node.op_type:6} reads {len(node.input)} tensors, writes {len(node.output)}")
print("BatchNorms in the file:", sum(n.op_type == "BatchNormalization" for n in graph.node))

# %% [markdown]
# No BatchNorm is left: the exporter has folded them, as you did in chapter 10. Which shape does
# each tensor have? *Shape inference* answers without running anything, from the input's shape and
# the rules of each operation.

# %% tags=["nbval-ignore-output"]
inferred = onnx.shape_inference.infer_shapes(onnx.load(FOLDER / "net.onnx")).graph
stored = {tensor.name for tensor in inferred.initializer}  # the weights
between = [value for value in inferred.value_info if value.name not in stored]
for value in [*inferred.input, *between[:4], *inferred.output]:
    sizes = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
    print(f"{value.name[:24]:24} {sizes}")

# %% [markdown]
# A name in place of a number is a dimension that stays free. Without `dynamic_shapes` the example's
# batch is burnt in. See what a file for two images says to three:

# %%
fixed = measure.onnx_session(export(baseline, two_images, "fixed.onnx", free_batch=False))
three = np.zeros((3, 1, 28, 28), np.float32)
with exercises.fails(Exception):
    fixed.run(None, {"image": three})

# %% [markdown]
# ## From scratch: is it the same model?
# An export is a translation, so check it, over several batch sizes, with inputs that are not zeros.
# Write $\hat y$ for the runtime's answer and $y$ for torch's: every number must satisfy $|\hat y -
# y| \le a + r\,|y|$, with an absolute part $a$ for numbers near zero and a relative part $r$ for
# large ones.


# %%
def apart(model, run, batch, a=1e-4, r=1e-4):
    """Largest |ŷ − y| / (a + r|y|) at this batch size: at most 1 is a pass."""
    x = torch.randn(batch, 1, 28, 28)
    with torch.no_grad():
        want = model(x).double().numpy()
    got = np.asarray(run(x.numpy()), np.float64)
    if got.shape != want.shape or not np.isfinite(got).all():
        return np.inf
    return float((np.abs(got - want) / (a + r * np.abs(want))).max())


session = measure.onnx_session(FOLDER / "net.onnx")
for batch in (1, 2, 3, 17):
    print(
        f"batch {batch:2}: passes",
        apart(baseline, lambda x: session.run(None, {"image": x})[0], batch) <= 1,
    )

# %% [markdown]
# ## Measure: what the optimiser does
# ONNX Runtime rewrites the graph when it loads it, in levels: *basic* (folds constants, removes
# what does nothing), *extended* (fuses operations), *all* (also changes the order of data in memory
# to suit the kernels). It can save what it made, so you can look.

# %% tags=["nbval-ignore-output"]
import onnxruntime as ort
from torchvision.models import resnet18

side = 64 if SMOKE else 224
photo = torch.randn(1, 3, side, side)
big = resnet18().eval()
export(big, torch.zeros(2, 3, side, side), "resnet18.onnx")
LEVELS = {
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


def at_level(name):
    """A session at this level, and the kinds of nodes that it runs."""
    options = ort.SessionOptions()
    options.graph_optimization_level, options.intra_op_num_threads = LEVELS[name], THREADS
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.optimized_model_filepath, options.log_severity_level = str(FOLDER / f"{name}.onnx"), 3
    opened = ort.InferenceSession(
        str(FOLDER / "resnet18.onnx"), options, providers=["CPUExecutionProvider"]
    )
    return opened, [
        n.op_type for n in onnx.load(FOLDER / f"{name}.onnx", load_external_data=False).graph.node
    ]


levels = {name: at_level(name) for name in LEVELS}
for name, (_, kinds) in levels.items():
    print(f"{name:9} {len(kinds):3} nodes: {dict(Counter(kinds).most_common(6))}")

# %% tags=["nbval-ignore-output"]
level_arms = {name: measure.onnx_arm(opened, photo, name) for name, (opened, _) in levels.items()}
faster = {
    name: measure.across(level_arms["none"], level_arms[name], seconds=2 * SECONDS)
    for name in list(LEVELS)[1:]
}
fewer = {name: len(levels["none"][1]) / len(kinds) for name, (_, kinds) in levels.items()}

# %% tags=["nbval-ignore-output"]
figure, ax = plots.axes(
    "times",
    "",
    height=2.6,
    title=(
        f"All optimisations: {fewer['all']:.2f}x fewer nodes, {faster['all'].ratio:.2f}x the speed"
    ),
)
for row, name in enumerate(faster):
    c = faster[name]
    ends = [[c.ratio - c.low], [c.high - c.ratio]]
    ax.errorbar(
        [c.ratio],
        [row],
        xerr=ends,
        fmt="o",
        color=plots.COLOURS[0],
        capsize=4,
        label=None if row else "speed-up over level none",
    )
    ax.plot(
        fewer[name],
        row + 0.18,
        "D",
        color=plots.COLOURS[1],
        label=None if row else "nodes of level none ÷ nodes",
    )
ax.axvline(1, color="0.4", linewidth=1)
ax.set_yticks(range(len(faster)), list(faster))
ax.set_ylim(len(faster) - 0.5, -0.5)
figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
plots.show(
    figure,
    "For three optimisation levels, the speed-up with its interval and, beside it, the ratio of"
    " nodes.",
)
exercises.reveal("11.nodes", faster["all"].ratio, "times")
by_nodes = measure.derive(lambda s: s / fewer["all"], faster["all"].interval)
claims.verdict("11.graph_optimisation_halves_the_time", by_nodes)

# %% [markdown]
# Read the kinds. *Extended* writes `FusedConv`: a convolution with its ReLU. *All* runs
# convolutions on data in blocks of channels, with the Add and the ReLU inside, and writes
# `ReorderOutput` where the usual order must come back (and `ReorderInput` where data in the usual
# order come in). A processor without such kernels shows the kinds of *extended* again. If a diamond
# lies right of its point, nodes vanished that had cost little; if it lies left, the nodes that
# stayed became faster. Counting nodes tells you *what* was fused. It does not tell you the time.
#
# The optimised graph can be kept, so that the work is not repeated at every start. It then fits
# this kind of machine alone.


# %% tags=["nbval-ignore-output"]
def seconds_to_open(path, level):
    options = ort.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 3
    start = time.perf_counter()
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return time.perf_counter() - start


opening = {
    "original, optimised at start": (FOLDER / "resnet18.onnx", LEVELS["all"]),
    "saved after optimising": (FOLDER / "all.onnx", LEVELS["none"]),
}
for name, how in opening.items():
    print(
        f"{name:30} opens in"
        f" {measure.median_interval([1e3 * seconds_to_open(*how) for _ in range(8)])} ms"
    )
levels = level_arms = big = None
measure.release()

# %% [markdown]
# ## Explain: why a process for each runtime
# ONNX Runtime's threads do not sleep between two calls. They *spin*: they ask again and again
# whether there is work, because waking up takes time. That is good for the runtime, and bad for
# whoever comes next. Time an eager call alone, and right after a call of ONNX Runtime.


# %% tags=["nbval-ignore-output"]
def session_that(spins):
    options = ort.SessionOptions()
    options.intra_op_num_threads = max(THREADS, 2)
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spins)))
    return ort.InferenceSession(
        str(FOLDER / "net.onnx"), options, providers=["CPUExecutionProvider"]
    )


image = torch.randn(1, 1, 28, 28)
neighbours = {
    "alone": None,
    "after ONNX Runtime, spinning off": session_that(False),
    "after ONNX Runtime, its default": session_that(True),
}


def eager_seconds(neighbour):
    """One eager call, timed right after a call of the neighbour."""
    if neighbour:
        neighbour.run(None, {"image": image.numpy()})
    start = time.perf_counter()
    with torch.inference_mode():
        baseline(image)
    return time.perf_counter() - start


# %% tags=["nbval-ignore-output"]
rounds = np.array(
    [[eager_seconds(n) for n in neighbours.values()] for _ in range(30 if SMOKE else 300)]
)[10:]
slower = {
    name: measure.median_interval(rounds[:, i] / rounds[:, 0]) for i, name in enumerate(neighbours)
}
neighbours = None
last = list(slower)[-1]
plots.bars(
    slower,
    xlabel="time of an eager call, alone = 1",
    reference=(1.0, "alone"),
    title=(
        f"Right after a spinning neighbour an eager call takes {slower[last].value:.2f} times as"
        " long"
    ),
    alt=(
        "Time of an eager call alone, after ONNX Runtime without spinning, and after it with its"
        " default."
    ),
)
claims.verdict("11.runtimes_do_not_disturb_each_other", slower[last])

# %% [markdown]
# The middle bar is what any neighbour costs: it filled the caches with its own data. Only what the
# last bar has beyond it is the spinning. That depends on how many cores are free: with more cores
# than threads, the spinners sit elsewhere. Either way there are two remedies: switch spinning off,
# as `measure.onnx_session` does, or give each runtime a process of its own. The comparison below
# does the second. The processes of a comparison are alive at once, asleep, and are asked in turn;
# eager is in every comparison, so that all are compared with it in the same rounds.
#
# ## Measure: five ways to run one model
# A file for each way, with the same three names: `name`, `precision`, and `run(images)`. A child
# process imports its file and answers when it is asked.

# %%
WAYS = {}
WAYS["eager"] = """
import torch
from course_utils import models
torch.set_num_threads(THREADS)
net = models.baseline()
precision = str(next(net.parameters()).dtype)
@torch.inference_mode()
def run(images):
    return net(torch.from_numpy(images)).numpy()
"""
WAYS["compiled"] = (
    WAYS["eager"]
    .replace(
        "precision =",
        """
import torch._inductor.config
torch._inductor.config.compile_threads = 1
net = torch.compile(net, dynamic=False)
precision =""",
    )
    .replace("next(net", "next(net._orig_mod")
)
WAYS["ONNX Runtime"] = """
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = THREADS
options.add_session_config_entry("session.intra_op.allow_spinning", "0")
cpu = ["CPUExecutionProvider"]
session = onnxruntime.InferenceSession(FOLDER + "/net.onnx", options, providers=cpu)
precision = session.get_outputs()[0].type
def run(images):
    return session.run(None, {"image": images})[0]
"""

# %%
WAYS["OpenVINO"] = """
import openvino
core, compiled = openvino.Core(), {}
def run(images):
    if len(images) not in compiled:
        model = core.read_model(FOLDER + "/net.onnx")
        model.reshape([len(images), 1, 28, 28])
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": THREADS}
        compiled[len(images)] = core.compile_model(model, "CPU", settings).create_infer_request()
    return compiled[len(images)].infer({0: images})[0]
run(numpy.zeros((1, 1, 28, 28), "float32"))
ops = compiled[1].get_compiled_model().get_runtime_model().get_ops()
facts = [
    {k: v.astype(str) for k, v in op.get_rt_info().items() if hasattr(v, "astype")} for op in ops
]
precision = next(f["runtimePrecision"] for f in facts if "Conv" in f.get("layerType", ""))
"""
# TVM compiles ahead, for each batch size a shared library; a process that ends gives its memory
# back.
COMPILE_TVM = """
import torch, tvm
from tvm.relax.frontend.torch import from_exported_program
from course_utils import models
for batch in (1, 32):
    program = torch.export.export(models.baseline(), (torch.zeros(batch, 1, 28, 28),))
    tvm.compile(from_exported_program(program), "llvm").export_library(f"FOLDER/tvm{batch}.so")
print(0)
"""
WAYS["TVM"] = """
import tvm
from tvm import relax
machines = {}
def run(images):
    if len(images) not in machines:
        library = tvm.runtime.load_module(f"{FOLDER}/tvm{len(images)}.so")
        machines[len(images)] = relax.VirtualMachine(library, tvm.cpu())
    answer = machines[len(images)]["main"](tvm.runtime.tensor(images))
    return answer[0].numpy()
precision = str(run(numpy.zeros((1, 1, 28, 28), "float32")).dtype)
"""

# %% [markdown]
# The code that all children share: it measures how long the way takes until its first answer,
# compares its answers with what torch computes in 64 bits, and then times one call of each batch
# size whenever it is asked. One arm stands in twice, *eager again*: two equal arms must come out
# equal, or the comparison is no good.

# %%
CHILD = """
import os, time
start = time.perf_counter()
import numpy
way = {"THREADS": int(os.environ["THREADS"]), "FOLDER": os.environ["FOLDER"]}
way |= {"numpy": numpy, "__name__": "way"}
with open(os.environ["WAY"], encoding="utf-8") as file:
    exec(compile(file.read(), "way", "exec"), way)
way["run"](numpy.zeros((1, 1, 28, 28), "float32"))
ready = time.perf_counter() - start
known = numpy.load(os.environ["FOLDER"] + "/known.npz")
answers = numpy.concatenate([way["run"](part) for part in numpy.split(known["images"], 8)])
told = {"ready": ready, "precision": way["precision"],
        "far": float(abs(answers - known["logits"]).max()),
        "agree": float((answers.argmax(1) == known["logits"].argmax(1)).mean())}
def sample():
    for images in (known["images"][:1], known["images"][:32]):
        way["run"](images)  # its caches are cold: the others have run in between
        calls = 5 if len(images) == 1 else 1
        begin = time.perf_counter()
        for _ in range(calls):
            way["run"](images)
        told[str(len(images))] = (time.perf_counter() - begin) / calls
    return told
"""
known = models.normalise(data.fashion_mnist("test")[0][:256])
with torch.no_grad():
    logits = copy.deepcopy(baseline).double()(known.double()).numpy()
np.savez(FOLDER / "known.npz", images=known.numpy(), logits=logits)
for name, code in WAYS.items():
    (FOLDER / f"{name}.py").write_text(code, encoding="utf-8")

# %% tags=["nbval-ignore-output"]
needs = {
    "compiled": ("compiler",),
    "OpenVINO": ("package:openvino",),
    "TVM": ("package:tvm", "compiler"),
}
present, skipped = [], {}
for name in WAYS:
    lacking = next((n for n in needs.get(name, ()) if not machine.can(n)), None)
    if lacking:
        skipped[name] = machine.skip(lacking, f"the way {name}")
    elif SMOKE and name in ("compiled", "TVM"):
        skipped[name] = machine.Skip("profile", "preparing it takes longer than all of smoke.")
    else:
        present.append(name)
        continue
    print(f"{name}:", skipped[name])
if "TVM" in present:
    measure.release()
    measure.child(COMPILE_TVM.replace("FOLDER", FOLDER.as_posix()))

# %% tags=["nbval-ignore-output"]
arms = {n: {"WAY": str(FOLDER / f"{n}.py")} for n in present} | {
    "eager again": {"WAY": str(FOLDER / "eager.py")}
}
shared = {"THREADS": str(THREADS), "FOLDER": str(FOLDER), "TVM_NUM_THREADS": str(THREADS)}
light = [n for n in arms if n in ("ONNX Runtime", "OpenVINO", "eager again")]
groups = [light] + [
    [n] for n in arms if n not in ("eager", *light)
]  # few processes at a time: memory
STARTS = 5  # each start is a new process for each way
turns, base = {}, {}  # for each way its own times, and eager's in the same rounds
for group in groups:
    asked = {n: arms[n] | shared for n in ("eager", *group)}
    answered = measure.turns(CHILD, asked, rounds=3, starts=STARTS, timeout=300)
    turns |= answered
    base |= dict.fromkeys(group, answered["eager"])

# %% tags=["nbval-ignore-output"]
speed = {
    b: {
        name: measure.over_processes(
            [e[b] / t[b] for e, t in zip(base[name], turns[name], strict=True)], STARTS
        )
        for name in arms
        if name != "eager"
    }
    for b in ("1", "32")
}
figure, panels = plots.axes(
    "speed-up over eager (x)",
    "",
    columns=2,
    height=3.2,
    title="Fastest at batch 1: {}; at batch 32: {}".format(
        *(max(s, key=lambda n: s[n].value) for s in speed.values())
    ),
)
for panel, (batch, rows) in zip(panels, speed.items(), strict=True):
    middle = np.array([v.value for v in rows.values()])
    ends = [middle - [v.low for v in rows.values()], [v.high for v in rows.values()] - middle]
    panel.axvline(1, color="0.4", linewidth=1)
    panel.errorbar(middle, range(len(rows)), xerr=ends, fmt="o", color=plots.COLOURS[0], capsize=4)
    panel.set_yticks(range(len(rows)), list(rows))
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_title(f"batch {batch}", fontsize=10)
    plots.plain_log(panel.xaxis)
plots.show(
    figure,
    "Speed-ups over eager with intervals, batch 1 on the left and batch 32 on the right, one row a"
    " way.",
)
exercises.reveal("11.runtime", speed["1"]["ONNX Runtime"].value, "times")
claims.verdict("11.onnx_runtime_is_faster_than_eager", speed["1"]["ONNX Runtime"])

# %% [markdown]
# First look at *eager again*: its interval should contain 1 (by chance 5 in 100 don't; one far from
# 1 means a disturbed run). Then read the rows, and the two panels against each other. At batch 1 on
# a network this small, what counts is the cost of calling operators; at batch 32 the kernels. A
# runtime may lead in one panel and not in the other, so "the fastest runtime" is a sentence without
# an end.
#
# Speed is one column of several. Size, start, disk and fidelity:


# %% tags=["nbval-ignore-output"]
def installed_mb(package):
    """Bytes of the package's own files, without what it depends on, in 10⁶."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return float("nan")
    return sum(f.size or 0 for f in files) / 1e6


def model_bytes(name):
    """What has to be shipped besides the runtime."""
    if name == "OpenVINO":
        import openvino

        openvino.save_model(
            openvino.convert_model(FOLDER / "net.onnx"), FOLDER / "net.xml", compress_to_fp16=False
        )
        return sum((FOLDER / f"net.{end}").stat().st_size for end in ("xml", "bin"))
    shipped = {"ONNX Runtime": "net.onnx", "TVM": "tvm1.so"}
    if name in shipped:
        return (FOLDER / shipped[name]).stat().st_size
    return measure.saved_bytes(baseline)


# %% tags=["nbval-ignore-output"]
PACKAGE = {
    "eager": "torch",
    "compiled": "torch",
    "ONNX Runtime": "onnxruntime",
    "OpenVINO": "openvino",
    "TVM": "apache-tvm",
}
print(
    f"{'way':13} {'batch 1':>9} {'batch 32':>9} {'ready':>7} {'model':>8} {'install':>9}"
    f" {'farthest':>9} {'same class':>10}  precision"
)
for name in present:
    t = turns[name]
    b1, b32 = (measure.pretty(float(np.median([r[b] for r in t]))) for b in ("1", "32"))
    print(
        f"{name:13} {b1:>9} {b32:>9} {t[0]['ready']:5.1f} s {model_bytes(name) / 1e6:5.2f} MB"
        f" {installed_mb(PACKAGE[name]):6.0f} MB {t[0]['far']:9.1e} {t[0]['agree']:10.1%} "
        f" {t[0]['precision']}"
    )

# %% [markdown]
# *Ready* is the time from the start of the process to the first answer, imports and compiling
# included; what was made ahead, the ONNX file and TVM's library, is not (several processes start at
# once here, so take it as a ranking). *Install* is the package alone. *Farthest* is the largest
# difference of a logit from torch in 64 bits: differences of rounding are normal, and the same
# class for every image is what you want. *Precision* is what the runtime says that it computed
# with. All must say 32 bits, or the comparison is one of formats.
#
# TVM is here as it comes: *untuned*. Its point is to search for fast loops, for hours if you let
# it. Where the installed release can, the next cell tunes one layer, in a process of its own,
# because a search that crashes must not take the notebook with it.

# %%
TUNE = """
import json, tempfile, torch, tvm
from tvm import relax
from tvm.relax.frontend.torch import from_exported_program
from tvm.s_tir import meta_schedule
layer = torch.nn.Sequential(torch.nn.Conv2d(1, 32, 3, 2, 1), torch.nn.ReLU()).eval()
program = torch.export.export(layer, (torch.zeros(1, 1, 28, 28),))
module = relax.transform.LegalizeOps()(from_exported_program(program))
target = tvm.target.Target({"kind": "llvm", "num-cores": 2})
images = tvm.runtime.tensor(torch.zeros(1, 1, 28, 28).numpy())
def seconds(executable):
    vm = relax.VirtualMachine(executable, tvm.cpu())
    return vm.time_evaluator("main", tvm.cpu(), number=20, repeat=9)(images).median
with tempfile.TemporaryDirectory() as folder:
    found = meta_schedule.relax_integration.tune_relax(
        module, {}, target, folder, max_trials_global=TRIALS)
    tuned = meta_schedule.relax_integration.compile_relax(found, module, target, {})
print(json.dumps({"untuned": seconds(tvm.compile(module, target)), "tuned": seconds(tuned)}))
"""

# %% tags=["nbval-ignore-output"]
if "TVM" not in present:
    tuned = None
else:
    try:
        tuned = measure.child(
            TUNE.replace("TRIALS", "256" if FULL else "16"), timeout=600 if FULL else 15
        ).result
        print(f"one layer, tuned: {tuned['untuned'] / tuned['tuned']:.2f}x")
    except (RuntimeError, TimeoutError) as error:
        why = str(error).splitlines()[0].rstrip(":.")
        tuned = machine.Skip(
            "package",
            f"TVM {machine.version('apache-tvm')} can't tune here: {why}.",
            "Another release may.",
        )
        print(tuned)
others = [n for n in present if n not in ("TVM", "eager")]
if "TVM" in present:
    best = max(others, key=lambda n: speed["1"][n].value)
    pairs = zip(
        base["TVM"], turns["TVM"], strict=True
    )  # against eager in the same rounds, then the other's lead over eager
    ours = measure.over_processes([e["1"] / t["1"] for e, t in pairs], STARTS)
    against_best = measure.derive(lambda a, b: a / b, ours, speed["1"][best])
else:
    against_best = skipped["TVM"]
claims.verdict("11.tvm_beats_all", against_best)

# %% [markdown]
# ## Measure: the errors of a broken file
# Files lose their other half, and versions drift. (An *opset* is a version of ONNX's list of
# operations; each file names the one it was written for.) Better to meet the errors here than at
# night. With `external_data=True` the weights lie in a second file beside the graph, which is how
# models larger than 2 GB (a limit of the format, Google's Protocol Buffers, 2008) have to be
# stored.


# %%
def first_line(error):
    """The end of the message, which says what is wrong, without the folders of this machine."""
    text = " ".join(str(error).replace(str(FOLDER) + "/", "").split())
    return f"{type(error).__name__}: " + (
        text if len(text) <= 150 else "… " + text[-150:].split(" ", 1)[1]
    )


def opened(model):
    options = ort.SessionOptions()
    options.log_severity_level = 4  # the exception says it all
    return ort.InferenceSession(
        model if isinstance(model, bytes) else str(model),
        options,
        providers=["CPUExecutionProvider"],
    )


def told(action):
    try:
        action()
    except Exception as error:
        return first_line(error)
    raise AssertionError("this was expected to fail, and today it runs: the text must change")


# %% tags=["nbval-ignore-output"]
path = export(baseline, two_images, "split.onnx", external=True)
weights = path.with_name("split.onnx.data")
whole = weights.read_bytes()
broken, run_with = (
    {},
    lambda x, name="image": measure.onnx_session(FOLDER / "net.onnx").run(None, {name: x}),
)
weights.unlink()
broken["weights missing"] = told(lambda: opened(path))
weights.write_bytes(whole[: len(whole) // 2])
broken["weights cut in half"] = told(lambda: opened(path))
weights.write_bytes(whole)
for label, version in (("opset of the future", 99), ("opset of the past", 7)):
    drifted = onnx.load(FOLDER / "net.onnx")
    drifted.opset_import[0].version = version
    broken[label] = told(lambda: opened(drifted.SerializeToString()))
broken["wrong shape"] = told(lambda: run_with(np.zeros((1, 3, 28, 28), np.float32)))
broken["wrong type"] = told(lambda: run_with(np.zeros((1, 1, 28, 28))))
broken["wrong name"] = told(lambda: run_with(np.zeros((1, 1, 28, 28), np.float32), "images"))
for name, message in broken.items():
    print(f"{name:20} {message}")

# %% [markdown]
# All seven are refused before or at the first call, with a reason. Two mistakes are *not* in this
# list, because no runtime complains about them; they come under *Myth*.
#
# ## Measure: without copies
# `session.run` takes NumPy arrays and makes new ones for the answer. *IO binding* lets you say
# where input and output lie, once. On a CPU that saves an allocation, on a GPU a trip through the
# computer's memory.

# %% tags=["nbval-ignore-output"]
bound = session.io_binding()
value = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(known[:32].numpy()))
room = ort.OrtValue.ortvalue_from_shape_and_type([32, 10], np.float32)
bound.bind_ortvalue_input("image", value)
bound.bind_ortvalue_output("logits", room)
plain = measure.onnx_arm(session, known[:32], "run")
print(
    measure.compare(
        plain,
        measure.Arm(
            lambda: session.run_with_iobinding(bound),
            "run_with_iobinding",
            THREADS,
            "float32",
            32,
            "contiguous",
        ),
        seconds=SECONDS,
    )
)
print("equal:", np.array_equal(room.numpy(), session.run(None, {"image": known[:32].numpy()})[0]))

# %% [markdown]
# ## If yours shows no gain
# | You see | Because | Look at |
# |---|---|---|
# | ONNX Runtime is no faster than eager | large convolutions: both call kernels of the same quality | batch 1, many small operators |
# | a runtime wins by far too much | other threads, another precision, or a neighbour that spins | the column *precision*; *eager again* |
# | the compiled model is slow at first | it compiles at the first call of each shape | *ready* in the table |
# | OpenVINO's answers are farther off than the others' | it takes bf16 by default where the processor has it | `INFERENCE_PRECISION_HINT` |
# | TVM is many times slower | untuned: its loops are the plain ones | the tuner, or another runtime |
# | optimisation levels make no difference | the exporter had folded already, or kernels dominate | the node counts |
#
# ## Myth: comparing without fixing threads
# A runtime takes all cores by default; torch may have been told to take one. The course's
# instrument refuses the pair.

# %%
with exercises.fails(measure.MeasurementError):
    all_cores = measure.Arm(lambda: None, "a runtime with four threads", threads=4)
    measure.compare(measure.Arm(lambda: baseline(image), "eager", threads=1), all_cores)

# %% [markdown]
# ## Myth: the same file, so the same answers
# The file holds the network and not what you did to the pixels before it. Here the exported model
# gets pixels from 0 to 1, as most image libraries deliver them, in place of the normalised ones it
# was trained on.

# %% tags=["nbval-ignore-output"]
test_images, test_labels = data.fashion_mnist("test")
some, truth = test_images[:1000], test_labels[:1000].numpy()
feeds = {
    "normalised, as in training": models.normalise(some).numpy(),
    "0 … 1": (some.float() / 255).numpy(),
    "0 … 255": some.float().numpy(),
}
for name, pixels in feeds.items():
    right = (session.run(None, {"image": pixels})[0].argmax(1) == truth).mean()
    print(f"{name:28} {right:.1%} right")

# %% [markdown]
# No error, no warning: shape and type are right, and numbers carry no unit. Put the normalisation
# *into* the exported model, and nobody can forget it:


# %%
class Whole(nn.Module):
    """uint8 pixels in, logits out."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):  # (B, 1, 28, 28) uint8
        return self.net((x.float() / 255 - models.MEAN) / models.STD)


export(Whole(baseline).eval(), torch.zeros(2, 1, 28, 28, dtype=torch.uint8), "whole.onnx")
inside = measure.onnx_session(FOLDER / "whole.onnx").run(None, {"image": some[:64].numpy()})[0]
outside = session.run(None, {"image": models.normalise(some[:64]).numpy()})[0]
print("equal within 1e-4:", bool(np.abs(inside - outside).max() < 1e-4))

# %% [markdown]
# ## Myth: fp32 is what you asked for
# OpenVINO chooses its precision by itself. On a processor with bf16 instructions an fp32 model runs
# in bf16 unless you say otherwise. Ask it.

# %% tags=["nbval-ignore-output"]
if machine.can("package:openvino"):
    import openvino

    core = openvino.Core()
    for name, settings in (("its default", {}), ("told to", {"INFERENCE_PRECISION_HINT": "f32"})):
        model = core.compile_model(core.read_model(FOLDER / "net.onnx"), "CPU", settings)
        got = np.concatenate([model({0: p.numpy()})[0] for p in known.split(64)])
        print(
            f"{name:12} {model.get_property('INFERENCE_PRECISION_HINT').to_string()}: farthest"
            f" logit {np.abs(got - logits).max():.1e}"
        )
    print("bf16 instruction:", "yes" if machine.can("bf16") else machine.can("bf16"))
else:
    print(machine.skip("package:openvino", "OpenVINO's default precision"))

# %% [markdown]
# If both lines say `f32`, your processor gives it no choice. If the first says `bf16`, its farthest
# logit should be off thousands of times as far as the second's, and its speed is the speed of bf16
# ([chapter 7](07_mixed_precision.ipynb)).
#
# ## Explain: which hardware when
# A runtime can't beat its hardware. Put machines on one roofline (chapter 1): the slanted part is
# memory bandwidth, the flat part arithmetic. The other machines come from public data sheets; yours
# is measured. A *TPU* is Google's chip for matrix products; an *NPU* is a small one of that kind in
# a phone or laptop.

# %% tags=["nbval-ignore-output"]
# name: (10¹² operations a second in the format given, 10⁹ bytes a second), dense, as published
SHEETS = {
    "NVIDIA A100 40 GB, fp16 (2020)": (312, 1555),
    "NVIDIA H100 SXM, fp16 (2022)": (989, 3350),
    "Google TPU v4, bf16 (2021)": (275, 1200),
    "Google TPU v5e, bf16 (2023)": (197, 819),
    "Snapdragon X Elite NPU, INT8 (2023)": (45, 135),
}
mine = measure.roofline()
rows = SHEETS | {"this machine, fp32 (measured)": (mine.gflops / 1000, mine.gbytes)}
intensity = np.geomspace(0.25, 4096, 60)
figure, ax = plots.axes(
    "operations for each byte moved",
    "10¹² operations a second",
    height=4.4,
    title=(
        f"This machine: {mine.gflops / 1000:.2g}·10¹² operations/s, ridge at {mine.ridge:.0f}"
        " operations a byte"
    ),
)
for i, (name, (peak, bandwidth)) in enumerate(rows.items()):
    style = {"color": "black", "linewidth": 2.5} if "this" in name else {"color": plots.COLOURS[i]}
    ax.plot(intensity, np.minimum(peak, bandwidth * intensity / 1000), label=name, **style)
for x, what in ((0.5, "decoding one token"), (60, "convolution"), (1000, "large matrix product")):
    ax.axvline(x, color="0.85", linewidth=1, zorder=0)
    ax.text(x, 0.0015, what, rotation=90, va="bottom", ha="right", fontsize=8, color="0.4")
plots.plain_log(ax.xaxis)
ax.set_yscale("log")
ax.set_ylim(0.001)
ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
plots.show(
    figure,
    "Rooflines of two GPUs, two TPUs, an NPU and this machine on logarithmic axes, with three kinds"
    " of work marked.",
)

# %% [markdown]
# Sources: NVIDIA's A100 white paper (2020) and H100 data sheet (2022); Jouppi et al., *TPU v4*
# (2023); Google Cloud's page on [TPU v5e](https://cloud.google.com/tpu/docs/v5e); Qualcomm's
# product brief of the Snapdragon X Elite (2023). The formats differ, so compare the slanted parts
# first. At the left all machines are ranked by memory bandwidth, and there a GPU leads a CPU by
# less than its peak suggests. At the right only arithmetic counts. An NPU has much arithmetic for
# its watts and little bandwidth: good for convolutions in INT8. A TPU wants large matrix products
# in large batches. A CPU is the one that is there already, and it answers a single small request
# without a trip to another device.
#
# ## The tool of the field: a table of your own
# The library for this decision is your measurement. The table below is computed from the figures
# above.


# %% tags=["nbval-ignore-output"]
def fastest(batch):
    """By the speed-up over eager, which was measured in the same rounds; eager itself counts as
    1.
    """
    return max(present, key=lambda n: speed[batch][n].value if n in speed[batch] else 1.0)


decision = {
    "lowest latency of one request": fastest("1"),
    "most images a second in batches": fastest("32"),
    "ready soonest after a start": min(present, key=lambda n: turns[n][0]["ready"]),
    "smallest installation": min(present, key=lambda n: installed_mb(PACKAGE[n])),
    "nearest to torch's answers": min(present, key=lambda n: turns[n][0]["far"]),
    "still training and changing it": "eager",
}
for wish, name in decision.items():
    print(f"{wish:34} {name}")
assert all(t[0]["agree"] >= 0.99 for t in turns.values()), "a runtime gives other answers"

# %% [markdown]
# If one name stands in most rows, take it. If not, the first row that matters to you decides, and
# the assertion in the cell is the condition for all: no runtime is in the table whose answers
# differ.
#
# ## Exercise A · what was fused?
# Complete the line. `before` and `after` are lists of node kinds. `fused_away` returns a dict from
# kind to the number of nodes of that kind that are gone; kinds of which none is gone do not appear.
# For `["Conv", "Relu"]` and `["FusedConv"]` a right answer is `{"Conv": 1, "Relu": 1}`.


# %% tags=["exercise"]
def fused_away(before, after):
    from collections import Counter

    a, b = Counter(before), Counter(after)
    return ...


# %%
exercises.check("11.A", fused_away)

# %% [markdown] tags=["hint"]
# `a[kind] - b[kind]` may be negative: an optimiser also adds nodes.


# %% tags=["solution"]
def fused_away(before, after):
    from collections import Counter

    a, b = Counter(before), Counter(after)
    return {kind: a[kind] - b[kind] for kind in a if a[kind] > b[kind]}


# %% tags=["wrong"]
# Only kinds that vanished altogether.
def fused_away(before, after):
    return {kind: before.count(kind) for kind in set(before) - set(after)}


# %% tags=["wrong"]
# Negative numbers for kinds that were added.
def fused_away(before, after):
    return {
        k: before.count(k) - after.count(k)
        for k in {*before, *after}
        if before.count(k) != after.count(k)
    }


# %% tags=["wrong"]
# Zeros for kinds that stayed: the edge.
def fused_away(before, after):
    return {kind: max(before.count(kind) - after.count(kind), 0) for kind in before}


# %% [markdown] tags=["instructor"]
# 5 minutes. Let people predict the dict for ResNet-18 from the printed kinds before they run it on
# `levels`.

# %% [markdown]
# ## Exercise B · a check that can fail
# Write `first_bad_batch(model, run, shape, batches, tolerance)`. `run` takes a float32 array
# `(batch, *shape)` and should return what `model` returns, as an array. Go through `batches` in
# order and return the first batch size at which `run` raises, returns another shape, returns
# anything that is not a finite number, or is off by more than `tolerance` anywhere. Return `None`
# if there is none. A runtime that gives everybody the first image's answer must be found.


# %% tags=["exercise"]
def first_bad_batch(model, run, shape, batches, tolerance): ...


# %%
exercises.check("11.B", first_bad_batch)

# %% [markdown] tags=["hint"]
# Inputs that are all zeros, or all equal, hide a mixed-up batch. Draw them.

# %% [markdown] tags=["hint"]
# Compare shapes before numbers: NumPy stretches `(4,)` against `(1, 4)` without a word. And `nan >
# tolerance` is False.


# %% tags=["solution"]
def first_bad_batch(model, run, shape, batches, tolerance):
    for batch in batches:
        x = torch.randn(batch, *shape)
        with torch.no_grad():
            want = model(x).numpy()
        try:
            got = np.asarray(run(x.numpy()))
        except Exception:
            return batch
        if got.shape != want.shape or not (np.abs(got - want) <= tolerance).all():
            return batch
    return None


# %% tags=["wrong"]
# Shapes are not compared: a dropped batch of 1 is stretched to fit.
def first_bad_batch(model, run, shape, batches, tolerance):
    for batch in batches:
        x = torch.randn(batch, *shape)
        with torch.no_grad():
            want = model(x).numpy()
        try:
            if not (np.abs(run(x.numpy()) - want) <= tolerance).all():
                return batch
        except Exception:
            return batch
    return None


# %% tags=["wrong"]
# Asks whether the difference is too large: NaN is not.
def first_bad_batch(model, run, shape, batches, tolerance):
    for batch in batches:
        x = torch.randn(batch, *shape)
        with torch.no_grad():
            want = model(x).numpy()
        try:
            got = np.asarray(run(x.numpy()))
        except Exception:
            return batch
        if got.shape != want.shape or (np.abs(got - want) > tolerance).any():
            return batch
    return None


# %% tags=["wrong"]
# The same image all over: a mixed-up batch looks right.
def first_bad_batch(model, run, shape, batches, tolerance):
    for batch in batches:
        x = torch.ones(batch, *shape)
        with torch.no_grad():
            want = model(x).numpy()
        try:
            got = np.asarray(run(x.numpy()))
        except Exception:
            return batch
        if got.shape != want.shape or not (np.abs(got - want) <= tolerance).all():
            return batch
    return None


# %% tags=["wrong"]
# Compares classes, not numbers: one logit may be off.
def first_bad_batch(model, run, shape, batches, tolerance):
    for batch in batches:
        x = torch.randn(batch, *shape)
        with torch.no_grad():
            want = model(x).numpy()
        try:
            got = np.asarray(run(x.numpy()))
        except Exception:
            return batch
        if (
            got.shape != want.shape
            or not np.isfinite(got).all()
            or (got.argmax(1) != want.argmax(1)).any()
        ):
            return batch
    return None


# %% [markdown] tags=["instructor"]
# 15 minutes. Collect on the board how an export can be wrong, then ask of each which line of the
# check finds it.

# %% [markdown]
# ## Exercise C · the fastest that keeps its promises
# Write `choose(configs, slo, floor)`. Each config is a dict with `name`, `batch`, `milliseconds` (a
# list: the measured time of each call) and `accuracy`. Return the name of the one that serves most
# images a second, `batch` divided by the mean time of a call, among those whose p99
# (`np.percentile(…, 99)`) is at most `slo`, the latency that was promised (*service-level
# objective*), and whose accuracy is at least `floor`. Return `None` if no config keeps both.


# %% tags=["exercise"]
def choose(configs, slo, floor): ...


# %%
exercises.check("11.C", choose)

# %% [markdown] tags=["hint"]
# First a list of the valid ones, then the best of them. What does `max` do with an empty list?


# %% tags=["solution"]
def choose(configs, slo, floor):
    valid = [
        c for c in configs if np.percentile(c["milliseconds"], 99) <= slo and c["accuracy"] >= floor
    ]
    if not valid:
        return None
    return max(valid, key=lambda c: c["batch"] / np.mean(c["milliseconds"]))["name"]


# %% tags=["wrong"]
# The mean keeps the promise, the tail does not.
def choose(configs, slo, floor):
    valid = [c for c in configs if np.mean(c["milliseconds"]) <= slo and c["accuracy"] >= floor]
    return (
        max(valid, key=lambda c: c["batch"] / np.mean(c["milliseconds"]))["name"] if valid else None
    )


# %% tags=["wrong"]
# The shortest call, not the most images.
def choose(configs, slo, floor):
    valid = [
        c for c in configs if np.percentile(c["milliseconds"], 99) <= slo and c["accuracy"] >= floor
    ]
    return min(valid, key=lambda c: np.mean(c["milliseconds"]))["name"] if valid else None


# %% tags=["wrong"]
# Forgets the accuracy.
def choose(configs, slo, floor):
    valid = [c for c in configs if np.percentile(c["milliseconds"], 99) <= slo]
    return (
        max(valid, key=lambda c: c["batch"] / np.mean(c["milliseconds"]))["name"] if valid else None
    )


# %% tags=["wrong"]
# If nothing is valid, the nearest miss: a promise broken in silence.
def choose(configs, slo, floor):
    valid = [
        c for c in configs if np.percentile(c["milliseconds"], 99) <= slo and c["accuracy"] >= floor
    ]
    best = max(
        valid or configs, key=lambda c: c["batch"] / np.mean(c["milliseconds"]), default=None
    )
    return best and best["name"]


# %% [markdown] tags=["instructor"]
# 12 minutes. Then let them fill `configs` from this chapter's own `turns` and choose for a promise
# of their own.

# %% [markdown]
# ## Break it
# More threads are faster, until they are not. One session each with 1, 2, 4 and 8 threads, on the
# cores you have.

# %% tags=["nbval-ignore-output"]
counts = [1, 2, 4, 8]
many = {n: measure.onnx_session(FOLDER / "net.onnx", threads=n) for n in counts}
feed = {"image": known[:32].numpy()}
taken = {n: [] for n in counts}
for _ in range(10 if SMOKE else 60):
    for n in np.random.default_rng().permutation(counts):
        start = time.perf_counter()
        many[int(n)].run(None, feed)
        taken[int(n)].append(1e3 * (time.perf_counter() - start))
took = {n: measure.median_interval(t[2:]) for n, t in taken.items()}
best = min(took, key=lambda n: took[n].value)
plots.lines(
    counts,
    {"batch 32": list(took.values())},
    xlabel=f"threads ({machine.usable_cores()} cores here)",
    ylabel="milliseconds a call",
    title=(
        f"Fastest with {best} thread{'s' if best > 1 else ''}; with 8 it takes"
        f" {took[8].value / took[best].value:.2f} times as long"
    ),
    alt=(
        "Milliseconds a call against threads: falling up to the number of cores, then flat or"
        " rising."
    ),
)

# %% [markdown]
# Beyond the number of cores, threads wait for each other's time slices, and the slowest decides.
# Several workers on one machine have the same trouble if each takes all cores: in a container, the
# runtime may see the whole machine and not its share.
#
# ## Exit quiz
# **1. An exported file accepts only batch 2. The export lacked**
# <details><summary>a larger example</summary>Any example would be burnt in.</details>
# <details><summary>`dynamic_shapes`</summary>Right.</details>
# <details><summary>an opset</summary>It has one.</details>
#
# **2. The optimiser takes away half of the nodes and the time falls by a tenth. That is**
# <details><summary>a wrong measurement</summary>It may well be right.</details>
# <details><summary>what you get if the nodes that went had cost little</summary>Right: count time,
# not nodes.</details>
# <details><summary>a sign of too few threads</summary>Threads would change both.</details>
#
# **3. Eager becomes slower whenever ONNX Runtime ran before it. Look first at**
# <details><summary>spinning threads</summary>Right.</details>
# <details><summary>the file's opset</summary>It does not touch eager.</details>
# <details><summary>the accuracy</summary>It does not depend on the neighbour.</details>
#
# **4. Which mistake does no runtime notice?**
# <details><summary>pixels from 0 to 1 for a network trained on normalised ones</summary>Right:
# shape and type are fine.</details>
# <details><summary>float64 in place of float32</summary>It is refused.</details>
# <details><summary>a missing file of weights</summary>It is refused when the model is
# opened.</details>
#
# **5. A check of an export should use**
# <details><summary>one batch of zeros</summary>Many faults pass it.</details>
# <details><summary>several batch sizes, drawn inputs, shapes compared
# first</summary>Right.</details>
# <details><summary>accuracy alone</summary>It hides small errors, and some large ones.</details>
#
# **Key points** · an export is a translation: check it · read the graph before and after · a
# process for each runtime, and one arm twice · name the precision, do not assume it · put the
# preprocessing into the model · the fastest runtime belongs to a batch size and a machine.
#
# **Sources** · T. Chen et al., *TVM*, 2018 · N. Jouppi et al., *TPU v4*, 2023 · the documentation
# of [ONNX Runtime's graph
# optimizations](https://onnxruntime.ai/docs/performance/model-optimizations/graph-optimizations.html),
# [OpenVINO](https://docs.openvino.ai/) and
# [torch.onnx](https://docs.pytorch.org/docs/stable/onnx.html).
#
# **For the capstone** row 11 of your ledger, *runtimes*, says what a runtime gains here; your table
# above says which to take at which batch size. Next: [12 · TensorRT](12_tensorrt.ipynb), the
# builder for NVIDIA's GPUs.
