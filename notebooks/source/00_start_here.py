# %% [markdown]
# # 00 · Start here
#
# **What will this course let you do?**
#
# In the first five minutes you measure a speed-up on this machine: one trained network, three ways
# to run it. On the way you use each thing that the other chapters are made of, once: a
# *prediction*, a *measurement*, a *verdict* and a *check*.
#
# 20 minutes · before this: nothing but Python · runs on any CPU, offline
#
# Packages: onnx, onnxruntime, onnxscript

# %% tags=["parameters"]
import os

PROFILE = os.environ.get("COURSE_PROFILE", "fast")

# %% [markdown]
# Run a cell with Shift + Enter. Run them in order. The first ones load the tools and show your
# machine: what you measure depends on it, so every chapter begins with this card.

# %% tags=["nbval-ignore-output"]
import numpy as np
import torch

from course_utils import claims, data, exercises, first, machine, measure, models, plots, scratch

ROUNDS = {"smoke": 1, "fast": 5, "full": 15}[PROFILE]
machine.card()

# %% [markdown]
# ## Predict
# A network computes with numbers of 32 bits, *floating-point* numbers: *fp32*. Soon you run one
# network in one program twice, once with these and once with whole numbers of 8 bits, *INT8*. How
# many times faster will the 8 bits be? Write a number in place of the dots, for example `1.5`.
# Nothing stops you if you have no idea. But a guess that turns out wrong is what you will remember.

# %%
my_guess = ...
exercises.predict("00.int8", my_guess)

# %% [markdown]
# ## Three ways to run a network
# The network comes with the course. It tells ten kinds of clothes apart (Fashion-MNIST, pictures of
# 28 by 28 pixels). You run it in three ways:
#
# 1. **Eager PyTorch**: each operator is called from Python, one after the other.
# 2. **ONNX Runtime, fp32**: the network is written to a file as a graph of operators, and another
#    program runs that graph. The numbers are the same 32-bit ones.
# 3. **ONNX Runtime, INT8**: the same graph, with 8-bit integers.
#
# Why three? If you compared the first with the third you could not say what helped, the program or
# the 8 bits.
#
# The next cell makes the files. It shows the network 200 training images, so that the 8 bits fit
# the numbers that occur inside. The box is [first.py](../course_utils/first.py); chapter 6 takes it
# apart.

# %% tags=["nbval-ignore-output"]
baseline, folder = models.baseline(), scratch("00")
images, labels = data.fashion_mnist("test")
ready = machine.can("package:onnxruntime") and machine.can("package:onnxscript")
if ready:
    training_images = models.normalise(data.fashion_mnist("train")[0][:200])
    files = first.export_and_quantize(baseline, training_images, folder)
    np.save(folder / "batch.npy", models.normalise(images[:32]).numpy())
else:
    print(machine.skip("package:onnxruntime", "the first speed-up"))

# %% [markdown]
# One of the files has weights of 7 bits only. It is there for x86 processors that lack an
# instruction for 8 bits; you will see below what it cures. The next cell picks the file that suits
# this machine.
#
# ## Measure
# Each way gets a program of its own, because two in one program disturb each other. The three are
# started together and asked in turn: 32 images, several times. Then they are ended and started
# anew, nine times in all, because the next start may be a faster or a slower one.

# %% tags=["nbval-ignore-output"]
if ready:
    chosen = "int8" if machine.can("vnni") else "int8, 7-bit weights"
    ways = {"eager": "eager", "fp32": str(files["fp32"]), "int8": str(files[chosen])}
    shared = {"THREADS": str(torch.get_num_threads()), "IMAGES": str(folder / "batch.npy")}
    seconds = measure.turns(
        first.CHILD,
        {name: {"WAY": way} | shared for name, way in ways.items()},
        rounds=ROUNDS,
        starts=9,
        timeout=600,
    )
    print({name: measure.pretty(float(np.median(times))) for name, times in seconds.items()})

# %% [markdown]
# Divide the old time by the new one, in each round, and you have the *speed-up*: above 1 means
# faster. Every speed-up in this course comes with an *interval*, in square brackets: what nine
# starts of this comparison allow you to say.


# %% tags=["nbval-ignore-output"]
def ratio(old, new):
    pairs = zip(seconds[old], seconds[new], strict=True)
    return measure.over_processes([a / b for a, b in pairs], starts=9)


if ready:
    program, both, bits = ratio("eager", "fp32"), ratio("eager", "int8"), ratio("fp32", "int8")
    exercises.reveal("00.int8", bits.value, "times")

# %% tags=["nbval-ignore-output"]
if ready:
    plots.intervals(
        {"another program": program, "… and 8 bits": both, "8 bits alone": bits},
        xlabel="speed-up (x)",
        title=f"Program and 8 bits: {both.value:.1f}x; the 8 bits alone: {bits.value:.1f}x",
        alt="Three speed-ups with intervals: another program, that with 8 bits, 8 bits alone.",
    )

# %% [markdown]
# The first row changes the program and nothing else, the last one the number format and nothing
# else. The middle row changes both. An advertisement would print the middle row and call it INT8.
#
# ## A verdict
# An article says what is quoted below. Your measurement decides, for your machine.

# %% tags=["nbval-ignore-output"]
claims.verdict("00.int8_is_faster", bits if ready else machine.can("package:onnxruntime"))

# %% [markdown]
# A statement like that is a *claim*. It has a source, a condition, and a *band* of values for which
# it holds. The whole interval inside the band: *holds here*. All of it outside: *does not hold
# here*. Across the edge: *inconclusive*. What this machine cannot measure is *not testable here*,
# with the reason. *On a stand-in* says that a small network takes the place of the one that the
# claim speaks of. Every verdict goes to your *ledger*, a file that shows you all claims in one
# picture when you have finished.
#
# **If yours shows no gain**, that is a result too. Most often the processor has no instruction for
# 8-bit dot products: look for `avx512_vnni`, `avx_vnni`, `amx_int8` or, on Arm, `dotprod` in the
# card above. Chapter 6 shows both worlds on one machine, where it has the instruction and can be
# told to leave it unused.
#
# ## Faster is worth nothing if it is wrong
# Count how many of 10,000 test images each file gets right. The network has never seen them.

# %% tags=["nbval-ignore-output"]
if ready:
    pixels = models.normalise(images).numpy()
    right = {name: first.answers(file, pixels) == labels.numpy() for name, file in files.items()}
    for name, file in files.items():
        size, share = file.stat().st_size / 1e6, right[name].mean()
        change = measure.paired_share(right["fp32"].tolist(), right[name].tolist())
        print(f"{name:20} {size:.2f} MB, {share:.2%} right, a change of {change}")

# %% [markdown]
# The interval is there again: these images are a sample, and another 10,000 would give another
# number. An interval that contains 0 shows no loss.
#
# If 8 bits lose and 7 bits do not, the loss is your processor's and not the format's. Without the
# instruction, ONNX Runtime adds pairs of products in 16 bits, and cuts off what does not fit; a
# weight of 7 bits leaves room. If both lose alike, look at what both share: the activations, with 8
# bits in either file.
#
# ## A check
# Exercises check themselves. This one takes a minute. Write `speedup(old_seconds, new_seconds)`:
# how many times faster the new way is. Above 1 means faster, below 1 slower. `speedup(12.0, 4.0)`
# is `3.0`.


# %% tags=["exercise"]
def speedup(old_seconds, new_seconds): ...


# %%
exercises.check("00.A", speedup)

# %% [markdown] tags=["hint"]
# One division. Which of the two goes on top, if a shorter new time must give a larger number?


# %% tags=["solution"]
def speedup(old_seconds, new_seconds):
    return old_seconds / new_seconds


# %% tags=["wrong"]
# The latency ratio: below 1 when the new way is faster.
def speedup(old_seconds, new_seconds):
    return new_seconds / old_seconds


# %% tags=["wrong"]
# The share of time saved, as in "67% faster": it can't tell 3 times from infinitely many.
def speedup(old_seconds, new_seconds):
    return (old_seconds - new_seconds) / old_seconds


# %% tags=["wrong"]
# Never below 1: hides every slow-down.
def speedup(old_seconds, new_seconds):
    return max(old_seconds, new_seconds) / min(old_seconds, new_seconds)


# %% [markdown] tags=["instructor"]
# 3 minutes, and worth them: people say "50% faster" and mean two different things. Agree on one
# word for the term. If a learner's figure shows no gain, put it on the wall beside one that does,
# with both cards.

# %% [markdown]
# `not attempted yet` is what you see until you replace the dots. Then it says *passed*, or what is
# wrong, with the smallest case that fails. Hints and a solution are folded below each exercise.
#
# ## The map
# Analyse, optimise, verify, deploy; and back whenever the verdict says *not yet*. Optimising has
# three branches: make the model smaller (03 to 06), train it at less cost (02, 07 to 09), run what
# you have in a better way (10 to 14).
#
# | chapter | you can then | minutes |
# |---|---|---|
# | 01 Measurement | say whether something is faster, and how sure you are | 90 |
# | 02 Training recipe | train to a stated accuracy in a fraction of the naive time | 90 |
# | 03 Pruning | take channels out of a network and keep its accuracy | 90 |
# | 04 Distillation | let a small network learn from a large one | 90 |
# | 05 Quantization math | store numbers in 8 bits and bound the error | 90 |
# | 06 Quantization in practice | deploy an INT8 network and know when it pays | 90 |
# | 07 Mixed precision | train in 16 bits without losing small gradients | 90 |
# | 08 Memory | predict what a training step needs, and trade it for time | 90 |
# | 09 Distributed training | train on several processes and know what it costs | 90 |
# | 10 Operator fusion | see why bytes cost more than arithmetic, and move fewer | 87 |
# | 11 Runtimes | export a model, check it, choose where to run it | 75 |
# | 12 TensorRT | build engines for NVIDIA GPUs with today's API | 90 |
# | 13 Dynamic batching | serve requests in batches without losing one | 90 |
# | 14 LLM serving | explain and cut the cost of each generated token | 90 |
# | 15 LLM compression | say what a smaller language model loses, and win it back | 90 |
# | 16 Capstone | bring a model under a latency, size and accuracy target | 90 |
#
# The minutes count reading, code and exercises; take more than 90 in two sittings. After 01 you may
# go in any order that the *before this* line of a chapter allows.
#
# **What is not here**: fine-tuning with adapters (LoRA, QLoRA), searching for architectures,
# kernels in CUDA, phones and microcontrollers, training on more than one machine.
#
# ## How long a chapter takes, and what it needs
# Three *profiles* run the same code in three sizes. `smoke` takes seconds and only shows that
# everything works. `fast` is the default. `full` adds more seeds and the large networks. Set
# `COURSE_PROFILE` before you start Jupyter, or `PROFILE` in the first cell.
#
# You need no GPU. What needs one is written for it, and says in one line why it was skipped when
# there is none: nothing is pretended. In the next cell you see what that will be on this machine.

# %% tags=["nbval-ignore-output"]
for what in ("gpu", "vnni", "bf16", "compiler", "energy", "two cores"):
    print(f"{what:10}", "here" if machine.can(what) is True else machine.can(what))

# %% [markdown]
# Words that you forget stand in the glossary in [TEACHING.md](../TEACHING.md). In Colab the ledger
# goes when the session ends: download `workbook/ledger.jsonl` before you leave.
#
# Go on with [01 · Measurement](01_measurement.ipynb). The interval that you took on trust here you
# build there yourself, and you see what goes wrong without it.
