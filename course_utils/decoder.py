"""A language model of the Llama family as one readable function, with a hook for its linear layers.

Chapter 14 builds it by hand; here it stands for chapter 15, which puts other layers in its place.

    lm = decoder.small()  # the course's own model, trained on a novel: 1.5 million parameters
    logits = decoder.forward(lm.config, lm.weights, tokens)  # (batch, T, vocabulary)
    decoder.forward(lm.config, lm.weights, tokens, linear=watch)  # called as watch(w, name, x)
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from course_utils import data, llm, machine

Weights = Mapping[str, Tensor]
Linear = Callable[[Weights, str, Tensor], Tensor]

PARTS = ("q", "k", "v", "o", "gate", "up", "down")
"""The linear layers of a block, in the order in which they run."""
SMALL = llm.Config(4, width=192, heads=6, kv_heads=2, hidden=448, vocabulary=256, context=256)
"""The shape of the course's own model; one token is one byte."""


def linears(config: llm.Config, layers: Iterable[int] | None = None) -> list[str]:
    """Names of the linear layers, of all blocks or of `layers`, in the order in which they run.

    >>> linears(SMALL)[:8]
    ['0.q', '0.k', '0.v', '0.o', '0.gate', '0.up', '0.down', '1.q']
    """
    return [f"{i}.{n}" for i in (range(config.layers) if layers is None else layers) for n in PARTS]


def plain(w: Weights, name: str, x: Tensor) -> Tensor:
    """The linear layer `name` of the weights `w`, as it is.

    >>> plain({"0.q": torch.eye(2)}, "0.q", torch.tensor([[3.0, 4.0]]))
    tensor([[3., 4.]])
    """
    return F.linear(x, w[name])


def norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Each vector divided by its size (root of the mean square), times a weight for each number.

    >>> norm(torch.tensor([3.0, -3.0]), torch.ones(2))
    tensor([ 1.0000, -1.0000])
    """
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotary positions (Su et al. 2021): pairs of numbers turned by an angle that grows with the
    position. `x` is (batch, heads, T, d), d even.

    >>> x = torch.randn(1, 1, 3, 4)
    >>> bool(torch.allclose(rotate(x, 1e4).norm(dim=-1), x.norm(dim=-1)))
    True
    """
    half = x.shape[-1] // 2
    speed = base ** (-torch.arange(half) / half)
    angle = torch.arange(x.shape[-2])[:, None] * speed
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def block(c: llm.Config, w: Weights, i: int, x: Tensor, linear: Linear = plain) -> Tensor:
    """Layer `i` of the decoder, attention and feed-forward: from (batch, T, width) to the same.

    >>> lm = llm.load(tiny=True)
    >>> block(lm.config, lm.weights, 0, torch.randn(1, 5, 128)).shape
    torch.Size([1, 5, 128])
    """
    B, T = x.shape[:2]
    h = norm(x, w[f"{i}.norm1"], c.eps)
    q, k, v = (linear(w, f"{i}.{n}", h).view(B, T, -1, c.head_width).transpose(1, 2) for n in "qkv")
    q, k = rotate(q, c.rope_base), rotate(k, c.rope_base)
    seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    x = x + linear(w, f"{i}.o", seen.transpose(1, 2).reshape(B, T, -1))
    h = norm(x, w[f"{i}.norm2"], c.eps)
    gated = F.silu(linear(w, f"{i}.gate", h)) * linear(w, f"{i}.up", h)
    return x + linear(w, f"{i}.down", gated)


def forward(
    config: llm.Config,
    weights: Weights,
    tokens: Tensor,
    linear: Linear = plain,
    layers: Iterable[int] | None = None,
) -> Tensor:
    """Logits (batch, T, vocabulary) of `tokens`, int64 (batch, T).

    `linear(weights, name, x)` computes each linear layer, the output layer "embed" too; `layers`
    are the blocks that run, all by default. Gradients flow unless the caller stops them. Raises
    ValueError for tokens that are not (batch, T) or not in the vocabulary.

    >>> lm = llm.load(tiny=True)
    >>> forward(lm.config, lm.weights, lm.encode("Hello")[None]).shape
    torch.Size([1, 5, 256])
    """
    if tokens.ndim != 2:
        raise ValueError(f"tokens have the shape {tuple(tokens.shape)}; give (batch, T).")
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < config.vocabulary:
        raise ValueError(
            f"tokens go from {int(tokens.min())} to {int(tokens.max())}; the vocabulary has"
            f" {config.vocabulary}."
        )
    x = weights["embed"][tokens]
    for i in range(config.layers) if layers is None else layers:
        x = block(config, weights, i, x, linear)
    return linear(weights, "embed", norm(x, weights["norm"], config.eps))


def blank(config: llm.Config, seed: int) -> dict[str, Tensor]:
    """Fresh random weights of a shape, by short name: what a training starts from.

    >>> sum(t.numel() for t in blank(SMALL, 0).values())
    1476288
    """
    draw = torch.Generator().manual_seed(seed)
    c = config
    weights = {"embed": 0.05 * torch.randn(c.vocabulary, c.width, generator=draw)}
    for i in range(c.layers):
        for name, shape in c.layer.items():
            size = shape[1] ** -0.5
            if name in ("o", "down"):  # what is added to x starts small in a deep model
                size /= math.sqrt(2 * c.layers)
            weights[f"{i}.{name}"] = size * torch.randn(shape, generator=draw)
        weights |= {f"{i}.norm1": torch.ones(c.width), f"{i}.norm2": torch.ones(c.width)}
    return weights | {"norm": torch.ones(c.width)}


def novel() -> str:
    """The whole novel, for models with another tokenizer; `text` gives its bytes in parts.

    >>> novel()[:10]
    'Persuasion'
    """
    return data.austen()


def text(split: str) -> Tensor:
    """The novel's bytes, int64 (T,): the first 85 % to train on ("train"), 5 % to choose by
    ("validation"), and the last 10 % ("test"), which the small model has never seen.

    >>> [len(text(s)) for s in ("train", "validation", "test")]
    [396825, 23343, 46686]
    """
    edges = {"train": (0, 0.85), "validation": (0.85, 0.9), "test": (0.9, 1)}
    if split not in edges:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(edges)}.")
    all_ = torch.tensor(list(data.austen().encode()))
    low, high = (int(edge * len(all_)) for edge in edges[split])
    return all_[low:high]


@functools.cache
def small() -> llm.Model:
    """The course's own language model: trained from nothing, in full precision, on the first 85 %
    of *Persuasion* by datasets/make_small_lm.py. Nothing was quantised in it before.

    >>> lm = small()
    >>> lm.name, lm.decode(lm.encode("Anne")), sum(t.numel() for t in lm.weights.values())
    ('the small model', 'Anne', 1476288)
    """
    from safetensors.torch import load_file

    stored = load_file(data.dataset_file("small_lm.safetensors"))
    weights = {name: t.float() for name, t in stored.items()}
    return llm.Model("the small model", SMALL, weights, None, real=True)


def stand_in() -> llm.Model:
    """The tiny random model, with the reason that it stands for another one.

    >>> stand_in().real
    False
    """
    return llm.random_model(machine.Skip("profile", "a tiny random model stands in."))
