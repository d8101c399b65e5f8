# %% [markdown]
# # 11 · Runtimes
#
# **Which program should run your model, who makes it fast, and is it still the model you trained?**
#
# After this chapter you can: *export* a network and check the export over batch sizes · *say* what
# the exporter left for the runtime to do · *count* time in place of nodes · *compare* ways to run
# one model so that they do not disturb each other · *choose* from a table that ranks only what its
# intervals separate.
#
# 75 minutes · before this: 1 Measurement, 10 Operator fusion · runs on any CPU
#
# Packages: onnx, onnxruntime, onnxscript, openvino

# %% tags=["parameters"]
import os

PROFILE = os.environ.get("COURSE_PROFILE", "fast")

# %% tags=["nbval-ignore-output"]
import copy
import itertools
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import nn

from course_utils import claims, data, exercises, machine, measure, models, plots, scratch

SMOKE = PROFILE == "smoke"
SECONDS = {"smoke": 0.1, "fast": 1.5, "full": 12.0}[PROFILE]  # for one comparison
THREADS, FOLDER = torch.get_num_threads(), Path(os.path.relpath(scratch("11")))
machine.card()

# %% [markdown]
# ## Recall
# 1. (Chapter 1) ONNX Runtime is three times faster than eager on two threads against one. What do
#    you know?
#    <details><summary>Answer</summary>Not how much is the runtime's: the threads differ, too.
#    `measure.compare` refuses such a pair.</details>
# 2. (Chapter 10) What does folding a BatchNorm need to be legal?
#    <details><summary>Answer</summary>Eval mode, constant weights, and a convolution before it
#    whose output nobody else reads.</details>
#
# ## Predict
# ResNet-18 is exported to a file of some 150 operations. A runtime's optimiser takes away a third
# of them. How many times faster is the rest? And the course's small network, batch 1, equal
# threads: how many times faster is ONNX Runtime than eager PyTorch?

# %%
my_nodes = ...
my_runtime = ...
exercises.predict("11.nodes", my_nodes)
exercises.predict("11.runtime", my_runtime)

# %% [markdown]
# ## From scratch: from a program to a graph
# A PyTorch model is a Python program. Another program can run it only as data: operations with
# their inputs and outputs, and the weights. *ONNX* is a file format for that. The exporter follows
# the model with stand-ins (`torch.export`, chapter 10) and writes down what happens. What it writes
# is a choice. `optimize=True`, the default, tidies the graph before it is saved.


# %%
def export(model, example, name, *, free_batch=True, **options):
    """Write FOLDER/name; with `free_batch` the first dimension may be anything later."""
    if free_batch:
        options["dynamic_shapes"] = {"x": {0: torch.export.Dim.DYNAMIC}}
    names = {"input_names": ["image"], "output_names": ["logits"]}
    options = {"external_data": False, "verbose": False} | options
    torch.onnx.export(model, (example,), FOLDER / name, **names, **options)
    return FOLDER / name


def kinds(path):
    """How many operations of each kind, a kind with its domain where it is none of ONNX's own."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    return Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in nodes)


# %% tags=["nbval-ignore-output"]
from torchvision.models import resnet18

side = 64 if SMOKE else 160
photo = torch.randn(1, 3, side, side)
torch.manual_seed(0)
big = resnet18().eval()
export(big, photo, "tidied.onnx", free_batch=False)
export(big, photo, "traced.onnx", free_batch=False, optimize=False)
for name in ("tidied", "traced"):
    found = kinds(FOLDER / f"{name}.onnx")
    print(f"{name}: {found.total()} operations, {dict(found.most_common(7))}")

# %% [markdown]
# Both files hold the same network. *Tidied*: no BatchNorm is left, the exporter has folded them.
# *Traced*: twenty BatchNorms, and around each convolution a few operations that make a bias of
# zeros, because the rule that translates a convolution wants one.
#
# ## Measure: who folds?
# ONNX Runtime rewrites a graph when it loads it, in levels. Its documentation lists for *basic*:
# constants folded, what does nothing removed, and the fusions that keep the operators' meaning,
# Conv with BatchNorm among them. *Extended* adds fused operators of its own. *All* adds the
# *layout*: convolutions on data in blocks of channels. So the runtime should make up for the
# exporter. Ask what it made of each file, and time it.


# %% tags=["nbval-ignore-output"]
LEVELS = {
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


def at_level(name, level):
    """A session of FOLDER/name.onnx at this level, and the kinds of operations that it runs."""
    options, made = ort.SessionOptions(), str(FOLDER / "made.onnx")
    options.graph_optimization_level, options.intra_op_num_threads = LEVELS[level], THREADS
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.optimized_model_filepath, options.log_severity_level = made, 3
    path, provider = str(FOLDER / f"{name}.onnx"), ["CPUExecutionProvider"]
    return ort.InferenceSession(path, options, providers=provider), kinds(made)


# %% tags=["nbval-ignore-output"]
for name, level in itertools.product(("tidied", "traced"), LEVELS):
    found = at_level(name, level)[1]
    norms = found["BatchNormalization"]
    print(f"{name:7}{level:9}{found.total():4} operations, {norms:2} BatchNorms", end="  ")
    print(dict(found.most_common(3)))

# %% [markdown]
# Look at the column of BatchNorms. At every level, the traced file keeps all twenty. Look at the
# kinds, too: with *all*, on x86 with AVX2 or AVX-512, `com.microsoft.nchwc::Conv` runs on blocked
# channels with ReLU and Add inside; another processor shows the kinds of *extended* again.
#
# ## From scratch: repair a graph
# Why does the runtime not fold? Here is a suspicion: the bias of each convolution is *computed*,
# though always to zeros, and folding needs constants. If that is it, a file whose convolutions have
# no bias must fold; if it is the BatchNorms themselves, nothing changes.

# %%
repaired = onnx.load(FOLDER / "traced.onnx")
for node in repaired.graph.node:
    if node.op_type == "Conv":
        del node.input[2:]  # data and weight stay; the zeros are nobody's input now
onnx.save(repaired, FOLDER / "repaired.onnx")

# %% tags=["nbval-ignore-output"]
compared = {
    "traced, none, again": ("traced", "none"),
    "traced, all": ("traced", "all"),
    "repaired, all": ("repaired", "all"),
    "tidied, none": ("tidied", "none"),
    "tidied, all": ("tidied", "all"),
}
sessions = {label: at_level(*how) for label, how in compared.items()}
start, start_kinds = at_level("traced", "none")
right = start.run(None, {"image": photo.numpy()})[0]
for label, (opened, found) in sessions.items():
    gap = np.abs(opened.run(None, {"image": photo.numpy()})[0] - right).max()
    norms = found["BatchNormalization"]
    print(f"{label:20}{found.total():4} operations, {norms:2} BatchNorms, gap {gap:.0e}")

# %% tags=["nbval-ignore-output"]
base, faster = measure.onnx_arm(start, photo, "traced, none"), {}
for label, (opened, _) in sessions.items():
    arm = measure.onnx_arm(opened, photo, label)
    faster[label] = measure.across(base, arm, seconds=SECONDS, processes=5).interval

# %% tags=["nbval-ignore-output"]
fewer = {label: start_kinds.total() / found.total() for label, (_, found) in sessions.items()}
rows = {f"{label} ({fewer[label]:.1f}x fewer)": v for label, v in faster.items()}
shown = {n: faster[f"{n}, all"].value for n in ("traced", "repaired", "tidied")}
plots.intervals(
    rows,
    xlabel="speed-up over the traced file without optimisation (x)",
    title="All optimisations: " + ", ".join(f"{n} {v:.2f}x" for n, v in shown.items()),
    alt="Speed-ups of five combinations of file and level, and how many fewer operations each has.",
)

# %% tags=["nbval-ignore-output"]
exercises.reveal("11.nodes", faster["traced, all"].value, "times")
by_nodes = measure.derive(lambda s: s / fewer["traced, all"], faster["traced, all"])
claims.verdict("11.fewer_nodes_less_time", by_nodes)

# %% tags=["nbval-ignore-output"]
same_end = measure.derive(
    lambda traced, tidied: traced / tidied, faster["traced, all"], faster["tidied, all"]
)
claims.verdict("11.the_runtime_makes_up_for_the_exporter", same_end)

# %% [markdown]
# The first row is the null: the same file, opened twice. Now compare *repaired* with *tidied*, both
# at *all*: one has more than twice the operations of the other. If they take the same time, the
# operations that differ cost nothing, and if *repaired* folded while *traced* did not, the
# suspicion holds: **the exporter decides what the runtime can fuse.** One computed zero stood in
# the way of twenty fusions. When a runtime disappoints, read the graph that it made, look for what
# should be gone, and ask who feeds it.
#
# ## Explain: count time, not nodes
# ONNX Runtime can say where the time goes: `enable_profiling` writes the time of every operation.
# Sum it by kind, for three of the files.

# %% tags=["nbval-ignore-output"]
from course_utils import onnx_int8

for name in ("traced", "repaired", "tidied"):
    path = FOLDER / f"{name}.onnx"
    _, spent = onnx_int8.look_inside(path, photo, THREADS, calls=5, name="image")
    share = {kind: 100 * ms / sum(spent.values()) for kind, ms in spent.most_common()}
    most = ", ".join(f"{kind} {percent:.0f}%" for kind, percent in list(share.items())[:3])
    zeros = share.get("Expand", 0) + share.get("Cast", 0)
    print(f"{name:9} {most}; Expand and Cast together {zeros:.1f}% of the time")

# %% [markdown]
# Most of the nodes that *repaired* has and *tidied* has not are *Expand* and *Cast*. Their share of
# the time is the last number. If it were large, the two files could not be equally fast. (Shares,
# not seconds: five calls with an instrument attached are a look. The figure above is the
# comparison.)
#
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


# %%
baseline, two = models.baseline(), torch.zeros(2, 1, 28, 28)
session = measure.onnx_session(export(baseline, two, "net.onnx"))
for batch in (1, 2, 3, 17):
    ratio = apart(baseline, lambda x: session.run(None, {"image": x})[0], batch)
    print(f"batch {batch:2}: passes", ratio <= 1)

# %% [markdown]
# Without `dynamic_shapes` the example's batch is burnt in. This is what a file for two images says
# to three:

# %%
fixed = measure.onnx_session(export(baseline, two, "fixed.onnx", free_batch=False))
with exercises.fails(Exception):
    fixed.run(None, {"image": np.zeros((3, 1, 28, 28), np.float32)})

# %% [markdown]
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
# 5 minutes. Let people predict the dict for *traced* and *repaired* at level *all* from the printed
# kinds before they run it.

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
# 12 minutes. Collect on the board how an export can be wrong, then ask of each which line of the
# check finds it.

# %% [markdown]
# ## Myth: compare them one after the other, in one process
# ONNX Runtime's threads do not sleep between two calls. They *spin*: they ask again and again
# whether there is work, because waking up takes time. Torch's threads have habits of their own. So
# what ran *before* a call may be part of its time. Four neighbours, in a new order each round, in
# five fresh processes: what does an eager call take right after each?

# %% tags=["nbval-ignore-output"]
from course_utils import ways

STARTS = 5
code = """from course_utils import ways
rounds = iter((4, {}))  # the first answer of a child is thrown away
sample = lambda: ways.neighbours({!r}, next(rounds), {})"""
code = code.format(10 if SMOKE else 40, str(FOLDER / "net.onnx"), max(THREADS, 2))
after = measure.turns(code, {"eager": {}}, rounds=1, starts=STARTS)["eager"]
slower = {
    name: measure.over_processes([t[name] / t["an eager call"] for t in after], STARTS)
    for name in after[0]
    if name != "an eager call"
}

# %% tags=["nbval-ignore-output"]
plots.intervals(
    slower,
    xlabel="time of an eager call, right after an eager call = 1",
    title="After " + ", ".join(f"{name}: {v.value:.1f}x" for name, v in slower.items()),
    alt="Time of an eager call after sleep and after two kinds of ONNX Runtime session.",
)
spins = [t["ONNX Runtime, its default"] / t["ONNX Runtime, spinning off"] for t in after]
print("spinning against not:", measure.over_processes(spins, STARTS))
claims.verdict("11.what_ran_before_does_not_matter", slower["20 ms of sleep"])

# %% [markdown]
# Read two things apart. The row of sleep against 1: nobody else ran there, so that is what it costs
# torch to wake its own second thread. The last row against the one above, printed: only that is the
# spinning. It depends on how many cores are free: with more cores than threads, the spinners sit
# elsewhere. Both are reasons for the same remedy: each way in a process of its own, the others
# asleep, and the first call after a pause kept apart from the next ones. And, below, one thread
# for each way: on a network this small, two would time the waking.
#
# ## Measure: four ways to run one model
# *Eager* PyTorch. *AOTInductor*: chapter 10's compiler, run ahead of time on the program that
# `torch.export` gives, into a package that needs no Python to compile it again. *ONNX Runtime*.
# *OpenVINO*, Intel's. A file for each, with two names: `precision` and `run(images)`. All get the
# batch size burnt in, so that none is served better by its shapes.

# %% tags=["nbval-ignore-output"]
# %%writefile "$FOLDER/eager.py"
import torch

from course_utils import models

torch.set_num_threads(THREADS)
net = models.baseline()
precision = str(next(net.parameters()).dtype)


@torch.inference_mode()
def run(images):
    return net(torch.from_numpy(images)).numpy()


# %% tags=["nbval-ignore-output"]
# %%writefile "$FOLDER/AOTInductor.py"
import torch

torch.set_num_threads(THREADS)
nets = {b: torch._inductor.aoti_load_package(f"{FOLDER}/net{b}.pt2") for b in (1, 32)}
precision = str(nets[1](torch.zeros(1, 1, 28, 28)).dtype)


@torch.inference_mode()
def run(images):
    return nets[len(images)](torch.from_numpy(images)).numpy()


# %% tags=["nbval-ignore-output"]
# %%writefile "$FOLDER/ONNX Runtime.py"
import onnxruntime

options, cpu = onnxruntime.SessionOptions(), ["CPUExecutionProvider"]
options.intra_op_num_threads = THREADS
options.add_session_config_entry("session.intra_op.allow_spinning", "0")
files = {b: f"{FOLDER}/net{b}.onnx" for b in (1, 32)}
sessions = {b: onnxruntime.InferenceSession(f, options, cpu) for b, f in files.items()}
precision = sessions[1].get_outputs()[0].type


def run(images):
    return sessions[len(images)].run(None, {"image": images})[0]


# %% tags=["nbval-ignore-output"]
# %%writefile "$FOLDER/OpenVINO.py"
import openvino

core = openvino.Core()
settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": THREADS}
models = {b: core.read_model(f"{FOLDER}/net{b}.onnx") for b in (1, 32)}
nets = {b: core.compile_model(model, "CPU", settings) for b, model in models.items()}
precision = nets[1].get_property("INFERENCE_PRECISION_HINT").to_string()
requests = {b: net.create_infer_request() for b, net in nets.items()}


def run(images):
    return requests[len(images)].infer({0: images})[0]


# %% [markdown]
# Prepare what they load, and answers in 64 bits to hold theirs against. Compiling ahead takes
# seconds, once: they are in no row below.

# %% tags=["nbval-ignore-output"]
known = models.normalise(data.fashion_mnist("test")[0][:256])
with torch.no_grad():
    logits = copy.deepcopy(baseline).double()(known.double()).numpy()
np.savez(FOLDER / "known.npz", images=known.numpy(), logits=logits)
needs = {"AOTInductor": ("compiler", "full" if SMOKE else "compiler")}
needs |= {"eager": (), "ONNX Runtime": (), "OpenVINO": ("package:openvino",)}
lacking = {way: next((n for n in needs[way] if not machine.can(n)), None) for way in needs}
present = [way for way in ("eager", "AOTInductor", "ONNX Runtime", "OpenVINO") if not lacking[way]]
for way, what in lacking.items():
    print(machine.skip(what, f"the way {way}")) if what else None

# %% tags=["nbval-ignore-output"]
for b in (1, 32):
    example = torch.zeros(b, 1, 28, 28)
    export(baseline, example, f"net{b}.onnx", free_batch=False)
    if "AOTInductor" in present:
        program, package = torch.export.export(baseline, (example,)), FOLDER / f"net{b}.pt2"
        options = {"package_path": str(package), "inductor_configs": {"cpp.threads": 1}}
        torch._inductor.aoti_compile_and_package(program, **options)

# %% [markdown]
# Each start is a new process for each way, all alive at once, asleep, and asked in random order.
# *Cold* is the first call after the others had their turn, *hot* the mean of the next ones. One way
# stands in twice, *eager again*: what it is off from 1 is the bar for all.

# %% tags=["nbval-ignore-output"]
arms = {way: {"WAY": str(FOLDER / f"{way}.py")} for way in present}
arms["eager again"] = arms["eager"]
shared = {"THREADS": "1", "OMP_NUM_THREADS": "1", "FOLDER": str(FOLDER)}
code = "from course_utils import ways\nsample = ways.sampler()"
asked = {way: env | shared for way, env in arms.items()}
times = measure.turns(code, asked, rounds=3, starts=STARTS, timeout=400)


def speed(way, over, regime):
    """Speed-up of a way over another one in this regime, over fresh processes."""
    pairs = zip(times[over], times[way], strict=True)
    return measure.over_processes([a[regime] / b[regime] for a, b in pairs], STARTS)


REGIMES = [f"{state} {b}" for b in ways.BATCHES for state in ("cold", "hot")]
lead = {r: {way: speed(way, "eager", r) for way in arms if way != "eager"} for r in REGIMES}

# %% tags=["nbval-ignore-output"]
for b in ways.BATCHES:
    states = {state: lead[f"{state} {b}"] for state in ("cold", "hot")}
    shown = ", ".join(f"{way} {v.value:.2f}x" for way, v in states["hot"].items())
    plots.intervals(
        {f"{state}: {way}": v for state, found in states.items() for way, v in found.items()},
        xlabel=f"speed-up over eager (x), batch {b}, one thread",
        title=f"Batch {b}, hot: {shown}",
        alt=f"Speed-ups over eager with intervals, for each way, cold and hot, batch {b}.",
    )

# %% tags=["nbval-ignore-output"]
exercises.reveal("11.runtime", lead["hot 1"]["ONNX Runtime"].value, "times")
claims.verdict("11.onnx_runtime_is_faster_than_eager", lead["hot 1"]["ONNX Runtime"])

# %% [markdown]
# First find the rows of *eager again*: equal arms. How wide they are, and how far off 1, is what
# this machine resolves: a way that leads by less has not led. Then compare a way's row when cold
# with its row when hot. A service with pauses between requests lives in the cold rows; a benchmark
# loop shows you the hot ones. At batch 1 the cost of *calling* operators counts, at batch 32 the
# kernels, so a way may lead in one and not in the other.
#
# ## The tool of the field: a table that says when it does not know
# The tool for this decision is your own measurement. A row of the table names every way that is
# *not worse than the best beyond doubt*: the interval of the best over it reaches down to the bar,
# which is 1 or the end of *eager again*, whichever is higher.


# %% tags=["nbval-ignore-output"]
def leaders(regime):
    """The fastest way, and all that it does not beat beyond what equal arms differ by."""
    equal = speed("eager again", "eager", regime)
    bar = max(1.0, equal.high, 1 / equal.low)
    best = max(present, key=lambda way: speed(way, "eager", regime).value)
    rest = [way for way in present if way != best and speed(best, way, regime).low <= bar]
    return [best, *rest]


for regime in REGIMES:
    print(f"{regime:8} fastest, or not separable from it: {', '.join(leaders(regime))}")
for way in present:
    t = times[way][0]
    print(f"{way:13} ready in {t['ready']:.1f} s; farthest logit {t['far']:.0e},", end=" ")
    print(f"{t['agree']:.1%} the same class; {t['precision']}")

# %% [markdown]
# *Ready* is from the start of the process to the first answer; several start at once here, so read
# it as a ranking. *Farthest* is the largest gap to torch in 64 bits: gaps of one size are rounding,
# and no reason to prefer one way. *Precision* must say 32 bits for all, or the comparison is one of
# formats. If a row of the table names several ways, decide by something else: what is installed
# already, what your team can debug, what runs on your target.

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
# 10 minutes. Then let them fill `configs` from this chapter's own `times` and choose for a promise
# of their own.

# %% [markdown]
# ## Myth: the same file, so the same answers
# The file holds the network and not what you did to the pixels before it. Here the exported model
# gets pixels from 0 to 1, as most image libraries deliver them, in place of the normalised ones it
# was trained on.

# %% tags=["nbval-ignore-output"]
test_images, test_labels = data.fashion_mnist("test")
some, truth = test_images[:1000], test_labels[:1000].numpy()
feeds = {"normalised": models.normalise(some), "0 … 1": some.float() / 255, "0 … 255": some.float()}
for name, pixels in feeds.items():
    right = (session.run(None, {"image": pixels.numpy()})[0].argmax(1) == truth).mean()
    print(f"{name:11} {right:.1%} right")

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


pixels = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
whole = measure.onnx_session(export(Whole(baseline).eval(), pixels, "whole.onnx"))
inside = whole.run(None, {"image": some[:64].numpy()})[0]
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
        net = core.compile_model(core.read_model(FOLDER / "net.onnx"), "CPU", settings)
        far = np.abs(np.concatenate([net({0: p.numpy()})[0] for p in known.split(64)]) - logits)
        hint = net.get_property("INFERENCE_PRECISION_HINT").to_string()
        print(f"{name:12} {hint}: farthest logit {far.max():.0e}")
else:
    print(machine.skip("package:openvino", "OpenVINO's default precision"))

# %% [markdown]
# If both lines say `f32`, your processor gives it no choice. If the first says `bf16`, its farthest
# logit is off by what 8 bits of mantissa lose ([chapter 7](07_mixed_precision.ipynb)), and its
# speed is bf16's.
#
# ## Break it
# One service, two workers, each with a session as it comes: that is how ONNX Runtime is started in
# most examples. As it comes, a session takes a thread for every core, and they spin. The rival has
# one thread for each session. Same work, batch 32, both sessions busy all the time.

# %% tags=["nbval-ignore-output"]
code = "from course_utils import ways\nsample = lambda: ways.side_by_side({!r}, {})"
code = code.format(str(FOLDER / "net.onnx"), 0.1 if SMOKE else 0.6)
served = measure.turns(code, {"service": {}}, rounds=1, starts=STARTS)["service"]
default = measure.over_processes([s["default"] / s["one thread each"] for s in served], STARTS)
best = np.median([s["one thread each"] for s in served])
print(f"one thread each: {best:,.0f} images a second")
claims.verdict("11.the_default_serves_two_sessions", default)

# %% [markdown]
# Two sessions with a thread for every core are twice as many threads as cores: they wait for each
# other's time slices, and the spinning ones take slices for nothing. In a container it is worse:
# the runtime may count the whole machine's cores and not its share. Set `intra_op_num_threads` to
# the cores that *this* session may use.
#
# ## If yours shows no gain
# | You see | Because | Look at |
# |---|---|---|
# | optimisation levels make no difference | the exporter folded already, or left something in the way | the kinds, BatchNorm first |
# | half the nodes, no time saved | the nodes that went had cost nothing | the profile by kind |
# | ONNX Runtime is no faster than eager | large convolutions: both call kernels of the same quality | batch 1, many small operators |
# | a runtime wins by far too much | other threads, another precision, hot against cold | *precision*; *eager again* |
# | OpenVINO's answers are farther off | it takes bf16 by default where the processor has it | `INFERENCE_PRECISION_HINT` |

# %% [markdown]
# ## Exit quiz
# **1. ONNX Runtime folds no BatchNorm of your file, at any level. Look first at**
# <details><summary>the number of threads</summary>They do not change the graph.</details>
# <details><summary>what feeds the convolutions in the graph</summary>Right: folding needs
# constants.</details>
# <details><summary>the batch size</summary>A free batch does not hinder folding.</details>
#
# **2. The optimiser takes away half of the nodes and the time falls by a tenth. That is**
# <details><summary>a wrong measurement</summary>It may well be right.</details>
# <details><summary>a sign of too few threads</summary>Threads would change both.</details>
# <details><summary>what you get if the nodes that went had cost little</summary>Right: count time,
# not nodes.</details>
#
# **3. An eager call takes longer after ONNX Runtime, and as long after a pause. The cause is**
# <details><summary>torch's own threads, which had gone to sleep</summary>Right: the pause has the
# same effect, and nobody spins in it.</details>
# <details><summary>ONNX Runtime's spinning threads</summary>In a pause there are none.</details>
# <details><summary>the file</summary>Eager does not read it.</details>
#
# **4. Runtime A leads B by 4%, and two equal arms differ by up to 6%. The table says**
# <details><summary>A</summary>Equal arms do as much.</details>
# <details><summary>A and B</summary>Right: not separable here.</details>
# <details><summary>B</summary>Nothing speaks for it.</details>
#
# **5. A check of an export should use**
# <details><summary>several batch sizes, drawn inputs, shapes compared
# first</summary>Right.</details>
# <details><summary>one batch of zeros</summary>Many faults pass it.</details>
# <details><summary>accuracy alone</summary>It hides small errors, and some large ones.</details>
#
# **Key points** · the exporter decides what the runtime can fuse: read the graph that was made ·
# count time, not nodes · an export is a translation: check it · what ran before is part of a time:
# a process for each way, cold and hot apart, one arm twice · rank only what intervals separate ·
# name the precision, put the preprocessing into the model · give each session its own cores.
#
# **Sources** · the documentation of [ONNX Runtime's graph
# optimizations](https://onnxruntime.ai/docs/performance/model-optimizations/graph-optimizations.html)
# and [thread management](https://onnxruntime.ai/docs/performance/tune-performance/threading.html),
# [OpenVINO](https://docs.openvino.ai/),
# [AOTInductor](https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html) and
# [torch.onnx](https://docs.pytorch.org/docs/stable/onnx.html). Apache TVM (T. Chen et al., 2018) is
# not compared: as it comes it is untuned, and its paper's subject is the tuning, which takes hours.
#
# **For the capstone** row 11 of your ledger, *runtimes*, says what a runtime gains here; your table
# says which to take at which batch size. Next: [12 · TensorRT](12_tensorrt.ipynb), the builder for
# NVIDIA's GPUs.

# %% [markdown]
# ## Further
# Each part stands alone.
#
# ### The errors of a broken file
# Files lose their other half, and versions drift. (An *opset* is a version of ONNX's list of
# operations; each file names the one it was written for.) Better to meet the errors here than at
# night. With `external_data=True` the weights lie in a second file, which is how models larger than
# 2 GB (a limit of the format, Google's Protocol Buffers, 2008) have to be stored; a runtime maps it
# into memory in place of reading it.


# %%
def told(action):
    """The end of the message, which says what is wrong, without the folders of this machine."""
    try:
        action()
    except Exception as error:
        text = " ".join(str(error).replace(f"{FOLDER.resolve()}/", "").split())
        short = text if len(text) <= 150 else "… " + text[-150:].split(" ", 1)[1]
        return f"{type(error).__name__}: {short}"
    raise AssertionError("this was expected to fail, and today it runs: the text must change")


def opened(model):
    options = ort.SessionOptions()
    options.log_severity_level = 4  # the exception says it all
    source = model if isinstance(model, bytes) else str(model)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


# %% tags=["nbval-ignore-output"]
path, broken = export(baseline, two, "split.onnx", external_data=True), {}
weights = path.with_name("split.onnx.data")
stored = weights.read_bytes()
weights.unlink()
broken["weights missing"] = told(lambda: opened(path))
weights.write_bytes(stored[: len(stored) // 2])
broken["weights cut in half"] = told(lambda: opened(path))
for label, version in (("opset of the future", 99), ("opset of the past", 7)):
    drifted = onnx.load(FOLDER / "net.onnx")
    drifted.opset_import[0].version = version
    broken[label] = told(lambda: opened(drifted.SerializeToString()))
one = np.zeros((1, 1, 28, 28), np.float32)
broken["wrong shape"] = told(lambda: session.run(None, {"image": one.repeat(3, 1)}))
broken["wrong type"] = told(lambda: session.run(None, {"image": one.astype(float)}))
broken["wrong name"] = told(lambda: session.run(None, {"images": one}))
for name, message in broken.items():
    print(f"{name:20} {message}")

# %% [markdown]
# All seven are refused before or at the first call, with a reason. The two mistakes that no runtime
# notices stand under *Myth*.
#
# ### Without copies
# `session.run` takes NumPy arrays and makes new ones for the answer. *IO binding* says once where
# input and output lie. On a CPU that saves an allocation, on a GPU a trip through the computer's
# memory.

# %% tags=["nbval-ignore-output"]
bound, batch = session.io_binding(), np.ascontiguousarray(known[:32].numpy())
room = ort.OrtValue.ortvalue_from_shape_and_type([32, 10], np.float32)
bound.bind_ortvalue_input("image", ort.OrtValue.ortvalue_from_numpy(batch))
bound.bind_ortvalue_output("logits", room)
plain = measure.onnx_arm(session, batch, "run")
shape = (THREADS, "float32", 32, "contiguous")
call = measure.Arm(lambda: session.run_with_iobinding(bound), "run_with_iobinding", *shape)
print(measure.compare(plain, call, seconds=SECONDS / 2))
print("equal:", np.array_equal(room.numpy(), session.run(None, {"image": batch})[0]))

# %% [markdown]
# ### Opened sooner
# The optimised graph can be kept, so that the work is not repeated at every start. It then fits
# this kind of machine alone. Providers that compile have the same idea: TensorRT's and OpenVINO's
# caches, and ONNX Runtime's *EP context* files (`ep.context_enable`).


# %% tags=["nbval-ignore-output"]
def milliseconds_to_open(path, level):
    options = ort.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = LEVELS[level], 3
    start = time.perf_counter()
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return 1e3 * (time.perf_counter() - start)


at_level("tidied", "all")  # leaves what it made in made.onnx
how = {"optimised at start": ("tidied.onnx", "all"), "saved": ("made.onnx", "none")}
for name, (file, level) in how.items():
    taken = [milliseconds_to_open(FOLDER / file, level) for _ in range(8)]
    print(f"{name:20} opens in {measure.median_interval(taken)} ms")

# %% [markdown]
# ### ExecuTorch
# PyTorch's runtime for phones and small devices. The same exported program, lowered to XNNPACK's
# kernels, becomes a file that a runtime without Python executes; here its Python binding does.

# %% tags=["nbval-ignore-output"]
if machine.can("package:executorch"):
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    program = torch.export.export(baseline, (known[:2],))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    (FOLDER / "net.pte").write_bytes(lowered.to_executorch().buffer)
    method = Runtime.get().load_program(FOLDER / "net.pte").load_method("forward")
    gap = np.abs(method.execute([known[:2]])[0].detach().numpy() - logits[:2]).max()
    print(f"{(FOLDER / 'net.pte').stat().st_size:,} bytes, farthest logit {gap:.0e}")
else:
    print(machine.skip("package:executorch", "ExecuTorch"))

# %% [markdown]
# Elsewhere the same idea has other names: Core ML on Apple's devices, Windows ML (ONNX Runtime with
# the providers that Windows installs), WebGPU in the browser (ONNX Runtime Web). On servers with
# several sockets, pin a session and its memory to one of them (*NUMA*: memory that is near to some
# cores and far from others); `numactl --cpunodebind=0 --membind=0` does it from outside.
#
# ### Which hardware when
# A runtime can't beat its hardware. Put machines on one roofline (chapter 1): the slanted part is
# memory bandwidth, the flat part arithmetic. The others come from public data sheets, dense, each
# in the format named; yours is measured. A *TPU* is Google's chip for matrix products; an *NPU* is
# a small one of that kind in a phone or laptop. The mark on each line is *decoding one token at
# batch 1*: two operations for each weight that is read, so 2 operations for as many bytes as the
# format has.

# %% tags=["nbval-ignore-output"]
SHEETS = {  # (10¹² operations a second, 10⁹ bytes a second, bytes of a weight)
    "NVIDIA B200, fp16 (2025)": (2250, 8000, 2),
    "AMD Instinct MI355X, fp16 (2025)": (2500, 8000, 2),
    "Google TPU7x, bf16 (2025)": (2307, 7380, 2),
    "NVIDIA H100 SXM, fp16 (2022)": (989, 3350, 2),
    "Snapdragon X2 Elite Extreme NPU, INT8 (2025)": (80, 228, 1),
}
mine = measure.roofline()
machines = SHEETS | {"this machine, fp32 (measured)": (mine.gflops / 1000, mine.gbytes, 4)}

# %% tags=["nbval-ignore-output"]
intensity = np.geomspace(0.25, 4096, 60)
title = f"Decoding one token: an H100 reads {3350 / mine.gbytes:.0f} times as fast as this machine"
figure, ax = plots.axes("operations for each byte moved", "10¹² operations a second", title=title)
for (name, (peak, gbytes, size)), colour in zip(machines.items(), plots.COLOURS, strict=False):
    ax.plot(intensity, np.minimum(peak, gbytes * intensity / 1000), color=colour, label=name)
    ax.plot(2 / size, gbytes * 2 / size / 1000, "o", color=colour)
plots.plain_log(ax.xaxis)
ax.set_yscale("log")
ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
plots.show(figure, "Rooflines of five accelerators and this machine; a mark where a token decodes.")

# %% [markdown]
# Sources: NVIDIA's data sheets of HGX B200 (2025) and H100 (2022); AMD's product page of the MI355X
# (2025); Google Cloud's page on [TPU7x](https://docs.cloud.google.com/tpu/docs/tpu7x); Qualcomm's
# product brief of the Snapdragon X2 Elite (2025), whose memory is shared with the processor. At the
# left all are ranked by bandwidth; at the right only arithmetic counts. A CPU is the one that is
# there already, and it answers a single small request without a trip to another device.
