# %% [markdown]
# # 00 · Start here
#
# **What will this course let you do?**
#
# In five minutes you measure a first speed-up on this machine: one trained network, three ways to
# run it. On the way you use each thing that the other chapters are made of, once: a *prediction*, a
# *measurement*, a *verdict* and a *check*.
#
# 15 minutes · before this: nothing but Python · runs on any CPU, offline

# %% tags=["parameters"]
import os

PROFILE = os.environ.get("COURSE_PROFILE", "fast")

# %% [markdown]
# Run a cell with Shift + Enter. Run them in order. The first ones load the tools and show your
# machine: what you measure depends on it, so every chapter begins with this card.

# %% tags=["nbval-ignore-output"]
import torch

from course_utils import claims, data, exercises, machine, measure, models, plots, scratch, training

SECONDS = {"smoke": 0.2, "fast": 3.0, "full": 8.0}[PROFILE]
machine.card()

# %% [markdown]
# ## Predict
# Soon you run one network in PyTorch, the way everybody does first, and then in another program
# with numbers of 8 bits in place of 32. How many times faster will that be? Write a number in place
# of the dots, for example `1.5`. Nothing stops you if you have no idea. But a guess that turns out
# wrong is what you will remember.

# %%
my_guess = ...
exercises.predict("00.int8", my_guess)

# %% [markdown]
# ## A trained network
# It comes with the course: a small residual network that tells ten kinds of clothes apart
# (Fashion-MNIST, 28 by 28 pixels). Here are the test images it has never seen, and how many of them
# it gets right.

# %% tags=["nbval-ignore-output"]
baseline = models.baseline()
images, labels = data.fashion_mnist("test")
share = training.accuracy(baseline, images, labels)
print(
    f"{measure.parameters(baseline):,} parameters, {measure.saved_bytes(baseline) / 1e6:.2f} MB,"
    f" {share:.1%} right"
)

# %% tags=["nbval-ignore-output"]
figure, panels = plots.axes(
    "", "", title="Sixteen test images and what the network says", columns=16, height=1.2
)
said = training.predict(baseline, images[:16]).argmax(1)
for panel, image, guess in zip(panels, images[:16], said, strict=True):
    panel.imshow(image[0], cmap="gray_r")
    panel.set_title(data.CLASSES[guess].split("/")[0], fontsize=5)
    panel.axis("off")
plots.show(figure, "Sixteen small grey pictures of clothes, each with the class the network names.")

# %% [markdown]
# ## Three ways to run it
# 1. **Eager PyTorch**: each operator is called from Python, one after the other.
# 2. **ONNX Runtime, fp32**: the network is written to a file as a graph, and another program runs
#    that graph. The numbers are the same 32-bit floating-point numbers.
# 3. **ONNX Runtime, INT8**: the same graph, with weights and activations in 8-bit integers.
#
# Why three? If you compared the first with the third you could not say what helped, the program or
# the 8 bits.

# %% tags=["nbval-ignore-output"]
folder = scratch("00")
ready = machine.can("package:onnxruntime") and machine.can("package:onnxscript")
if ready:
    torch.onnx.export(
        baseline,
        (torch.zeros(2, 1, 28, 28),),
        folder / "fp32.onnx",
        input_names=["image"],
        dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}},
        external_data=False,  # one file, so that its size is the model's
        verbose=False,
    )
else:
    print(machine.skip("package:onnxruntime", "the first speed-up"))

# %% [markdown]
# The 8-bit version needs to know how large the numbers inside the network get. So it is shown some
# training images: *calibration*. Chapter 5 teaches what happens to a single number, chapter 6 what
# happens to a network.

# %% tags=["nbval-ignore-output"]
if ready:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self, batches):
            self.batches = iter(batches)

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {"image": models.normalise(batch).numpy()}

    quant_pre_process(folder / "fp32.onnx", folder / "clean.onnx")
    calibration = Images(data.fashion_mnist("train")[0][:200].split(50))
    # Unsigned activations with signed weights: the pair that x86's dot-product instruction takes.
    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(
        folder / "clean.onnx", folder / "int8.onnx", calibration, per_channel=True, **kinds
    )

# %% [markdown]
# ## Measure
# Each comparison copies both ways into twelve fresh processes, one after the other, runs them there
# in turn, and gives the speed-up with an interval over the processes: where the true value lies, 95
# times in 100. Above 1 means faster. All three use the same number of threads.

# %% tags=["nbval-ignore-output"]
if ready:
    batch = models.normalise(images[:32])
    eager = measure.arm(baseline, batch, "eager PyTorch")
    fp32 = measure.onnx_arm(measure.onnx_session(folder / "fp32.onnx"), batch, "ONNX Runtime fp32")
    int8_session = measure.onnx_session(folder / "int8.onnx")
    int8 = measure.onnx_arm(int8_session, batch, "ONNX Runtime INT8", dtype="int8")
    runtime = measure.across(eager, fp32, seconds=SECONDS)
    both = measure.across(eager, int8, seconds=SECONDS)
    precision = measure.across(fp32, int8, seconds=SECONDS)
    print(runtime, both, precision, sep="\n")
    exercises.reveal("00.int8", both.ratio, "times")

# %% tags=["nbval-ignore-output"]
if ready:
    plots.intervals(
        {
            "another program": runtime.interval,
            "… and 8 bits": both.interval,
            "8 bits alone": precision.interval,
        },
        xlabel="speed-up (x)",
        title=(
            f"Program and 8 bits together: {both.ratio:.1f}x; the 8 bits alone:"
            f" {precision.ratio:.1f}x"
        ),
        alt=(
            "Three speed-ups with intervals: another program, another program with 8 bits, 8 bits"
            " alone."
        ),
    )

# %% [markdown]
# The first row changes the program and nothing else, the last one the precision and nothing else.
# The middle row is the two together, and it is about their product. An advertisement would print
# the middle row and call it INT8.
#
# Faster is worth nothing if it is wrong. Here are size and accuracy, counted on the same test
# images for both.

# %% tags=["nbval-ignore-output"]
if ready:
    parts = [
        int8_session.run(None, {"image": models.normalise(p).numpy()})[0] for p in images.split(500)
    ]
    answers = torch.cat([torch.from_numpy(part) for part in parts]).argmax(1)
    right_before = training.predict(baseline, images).argmax(1) == labels
    change = measure.paired_share(right_before, answers == labels)
    sizes = [(folder / name).stat().st_size / 1e6 for name in ("fp32.onnx", "int8.onnx")]
    print(f"accuracy changes by {change}; file {sizes[0]:.2f} MB → {sizes[1]:.2f} MB")

# %% [markdown]
# ## A verdict
# An article says what is quoted below. In this course a statement like that is a *claim*. It has a
# source, a condition, and a band of values for which it holds. Your measurement decides, for your
# machine: *holds here*, *does not hold here*, *inconclusive*, or *not testable here* with the
# reason. *On a stand-in* is added where a smaller network takes the place of the one that the claim
# speaks of.

# %% tags=["nbval-ignore-output"]
claims.verdict("00.int8_is_faster", precision if ready else machine.can("package:onnxruntime"))

# %% [markdown]
# Every verdict goes to your *ledger*. At the end of the course it shows all claims on your machine
# in one picture, and tells you which technique pays off there.
#
# **If yours shows no gain**, that is a result too. Most often the processor has no instruction for
# 8-bit dot products: look for `avx512_vnni`, `avx_vnni`, `amx_int8` or, on Arm, `dotprod` in the
# card above. Chapter 6 shows both worlds on one machine, where it has the instruction and can be
# told to leave it unused.

# %% [markdown]
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

# %%
STEPS = ["analyse\n01", "optimise\n02 to 14", "verify\n01", "deploy\n13, 15"]
BRANCHES = {
    "a smaller model": "03 pruning\n04 distillation\n05, 06 quantization",
    "cheaper training": "02 recipe · 07 mixed precision\n08 memory\n09 several workers",
    "running it better": "10 fusion · 11 runtimes\n12 TensorRT · 13 batching\n14 language models",
}
figure, ax = plots.axes(
    "", "", title=f"{len(STEPS)} steps, {len(BRANCHES)} branches, 16 chapters", height=3.2
)
box = {"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": plots.COLOURS[0]}
arrow = {"arrowstyle": "->", "color": "0.3", "shrinkA": 34, "shrinkB": 34}
for x, step in enumerate(STEPS):
    ax.text(x, 1.0, step, ha="center", va="center", bbox=box)
    if x:
        ax.annotate("", (x, 1.0), (x - 1, 1.0), arrowprops=arrow)
back = arrow | {"connectionstyle": "arc3,rad=0.45", "shrinkA": 18, "shrinkB": 18}
ax.annotate("", (0, 1.0), (2, 1.0), arrowprops=back | {"linestyle": "--"})
ax.text(1, 1.62, "not yet", ha="center", va="center", fontsize=9, color="0.3")
for x, (branch, chapters) in zip((0.1, 1.5, 2.9), BRANCHES.items(), strict=True):
    ax.text(x, -0.15, branch, ha="center", va="center", weight="bold", fontsize=9)
    ax.text(x, -0.65, chapters, ha="center", va="center", fontsize=8)
    ax.plot([1, x], [0.68, 0.05], color="0.7", linewidth=1)
ax.set(xlim=(-0.6, 3.6), ylim=(-1.1, 1.8))
ax.axis("off")
plots.show(
    figure,
    "A chain of four boxes, analyse, optimise, verify, deploy, with a dashed way back from verify;"
    " three branches below optimise.",
)

# %% [markdown]
# Analyse, optimise, verify, deploy; and back whenever the verdict says *not yet*. Optimising has
# three branches: make the model smaller, train it at less cost, run what you have in a better way.
#
# | chapter | you can then | minutes |
# |---|---|---|
# | 01 Measurement | say whether something is faster, and how sure you are | 85 |
# | 02 Training recipe | train to a stated accuracy in a fraction of the naive time | 80 |
# | 03 Pruning | take channels out of a network and keep its accuracy | 85 |
# | 04 Distillation | let a small network learn from a large one | 80 |
# | 05 Quantization math | store numbers in 8 bits and bound the error | 90 |
# | 06 Quantization in practice | deploy an INT8 network and know when it pays | 90 |
# | 07 Mixed precision | train in 16 bits without losing small gradients | 80 |
# | 08 Memory | predict what a training step needs, and trade it for time | 90 |
# | 09 Distributed training | train on several processes and know what it costs | 90 |
# | 10 Operator fusion | see why bytes cost more than arithmetic, and move fewer | 85 |
# | 11 Runtimes | export a model, check it, choose where to run it | 85 |
# | 12 TensorRT | build engines for NVIDIA GPUs with today's API | 75 |
# | 13 Dynamic batching | serve requests in batches without losing one | 90 |
# | 14 LLM inference | explain and cut the cost of each generated token | 90 |
# | 15 Capstone | bring a model under a latency, size and accuracy target | 120 |
#
# After 01 you may go in any order that the *before this* line of a chapter allows.
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
# Go on with [01 · Measurement](01_measurement.ipynb). What you did here in three lines,
# `measure.across`, you build there yourself, and you see what goes wrong without it.
