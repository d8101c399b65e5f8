"""What chapter 15 needs around its ideas: GPTQ at speed, GGUF files served in turn, a figure.

The chapter writes GPTQ by hand, one linear system a column; `gptq` here gives the same numbers.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from course_utils import data, decoder, llm, measure, plots

LLAMA = """
import json, os, xllamacpp
p = xllamacpp.CommonParams()
p.model.path = os.environ["COURSE_GGUF"]
p.n_ctx, p.n_parallel, p.verbosity, p.n_threads_http = 256, 1, -1, 1
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = int(os.environ["COURSE_THREADS"])
server = xllamacpp.Server(p)  # inside this process; it listens on 127.0.0.1 and ends with it
prompts, count = json.loads(os.environ["COURSE_PROMPTS"]), int(os.environ["COURSE_COUNT"])
def ask(prompt, n, **more):
    ask = {"prompt": prompt, "n_predict": n, "temperature": 0, "ignore_eos": True}
    return server.handle_completions(ask | {"cache_prompt": False} | more)
said = []
def sample():
    if not said and len(prompts) > 1:
        said.extend(ask(p, 1)["choices"][0]["text"] for p in prompts[1:])
    times = ask(prompts[0], count)["timings"]
    return [times["predicted_per_token_ms"], times["prompt_per_token_ms"], said]
"""
"""A child that serves one GGUF file: ms a token in decode and in prefill, and the next token after
each of some prompts.
"""


def gptq(w: Tensor, h: Tensor, bits: int, group: int = 64, damp: float = 0.01) -> Tensor:
    """`w` (rows, columns) rounded to `bits` bits column by column, each error passed on to the
    columns that follow (Frantar et al. 2023, algorithm 1).

    `h` is XᵀX of the inputs, (columns, columns); `damp` of its mean diagonal is added to it. The
    columns' shares are rows of one Cholesky factor of H⁻¹: what a linear system a column gives,
    computed at once. Each group of columns is finished before the later ones are touched. Raises
    ValueError where groups do not divide or shapes differ.

    >>> x = torch.randn(64, 8)
    >>> gptq(torch.randn(4, 8), x.T @ x, bits=4, group=4).shape
    torch.Size([4, 8])
    """
    rows, n = w.shape
    if n % group:
        raise ValueError(f"rows of {n} weights do not divide into groups of {group}.")
    if h.shape != (n, n):
        raise ValueError(f"h has the shape {tuple(h.shape)}; {n} columns need ({n}, {n}).")
    h = h + damp * h.diagonal().mean() * torch.eye(n)
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    w, top = w.clone(), 2**bits - 1
    for start in range(0, n, group):
        end = start + group
        g = w[:, start:end]
        low, high = g.amin(1).clamp(max=0), g.amax(1).clamp(min=0)
        scale = (high - low).clamp(min=1e-8) / top
        zero = (-low / scale).round()
        errors = torch.empty(rows, group)
        for j in range(start, end):
            new = (((w[:, j] / scale).round() + zero).clamp(0, top) - zero) * scale
            errors[:, j - start] = (w[:, j] - new) / u[j, j]
            w[:, j] = new
            w[:, j + 1 : end] -= errors[:, j - start, None] * u[j, j + 1 : end]
        w[:, end:] -= errors @ u[start:end, end:]
    return w


@contextlib.contextmanager
def gguf_files(folder: Path, kinds: tuple[str, ...]) -> Iterator[dict[str, Path]]:
    """SmolLM2's package file ("Q4_1") and the same values written in other formats; the written
    ones are removed at the end. Raises FileNotFoundError where the package is missing.

    >>> with gguf_files(Path("."), ("F16",)) as files:  # doctest: +SKIP
    ...     list(files)
    ['F16', 'Q4_1']
    """
    made = {kind: folder / f"{kind}.gguf" for kind in kinds}
    try:
        for kind, path in made.items():
            llm.write_gguf(path, kind)
        measure.release()
        yield made | {"Q4_1": llm.gguf_file()}
    finally:
        for path in made.values():
            path.unlink(missing_ok=True)


def llama(
    files: Mapping[str, Path], *, rounds: int, starts: int, count: int = 16, prompts: int = 0
) -> dict[str, tuple[np.ndarray, list[str]]]:
    """llama.cpp on each file, one fresh child a file and start, asked in turn.

    For each file: an array (starts · rounds, 2) of milliseconds a token in decode and in prefill,
    and the token that follows each of `prompts` passages of the novel, asked once, by another child
    that is not timed.

    >>> llama({"Q4_1": llm.gguf_file()}, rounds=1, starts=1)["Q4_1"][0].shape  # doctest: +SKIP
    (1, 2)
    """
    novel = data.austen()
    passages = [novel[at : at + 200] for at in range(9000, 9000 + 700 * prompts, 700)]

    def ask(prompts: list[str], rounds: int, starts: int) -> dict[str, list]:
        common = {
            "COURSE_PROMPTS": json.dumps(prompts),
            "COURSE_COUNT": str(count),
            "COURSE_THREADS": str(torch.get_num_threads()),
        }
        arms = {name: common | {"COURSE_GGUF": str(file)} for name, file in files.items()}
        return measure.turns(LLAMA, arms, rounds=rounds, starts=starts, timeout=300)

    timed = ask([novel[9000:9100]], rounds, starts)
    words = ask([novel[9000:9100], *passages], 1, 1) if passages else timed
    return {n: (np.array([r[:2] for r in t]), list(words[n][-1][2])) for n, t in timed.items()}


def saved_share(rises: Tensor, other: Tensor) -> measure.Interval:
    """How much of a first rise a second way takes away, in percent: 100·(1 − Σother/Σrises), paired
    block by block, with an interval from leaving out one block at a time (Tukey's jackknife).

    Both are (blocks,): the rise of the loss in each block of text. Raises ValueError where they
    differ in shape.

    >>> saved_share(torch.tensor([1.0, 2.0, 1.5, 2.5]), torch.tensor([0.5, 1.0, 0.75, 1.25])).value
    50.0
    """
    if rises.shape != other.shape or rises.ndim != 1:
        raise ValueError(f"blocks of {tuple(rises.shape)} and {tuple(other.shape)} do not pair.")
    a, b, n = rises.double(), other.double(), len(rises)
    whole = 100 * (1 - b.sum() / a.sum())
    without = 100 * (1 - (b.sum() - b) / (a.sum() - a))
    return measure.paired_t((n * whole - (n - 1) * without).tolist(), "%")


def nf4_levels() -> Tensor:
    """The 16 values of NF4, from -1 to 1: quantiles of a normal distribution, eight below zero and
    nine from zero on, each side divided by its largest (Dettmers et al. 2023; the tail 0.9677083 is
    that of the paper's code).

    >>> [round(v, 2) for v in nf4_levels()[5:10].tolist()]
    [-0.18, -0.09, 0.0, 0.08, 0.16]
    """
    tail, normal = 0.9677083, torch.distributions.Normal(0.0, 1.0)
    below = normal.icdf(torch.linspace(1 - tail, 0.5, 8))
    above = normal.icdf(torch.linspace(0.5, tail, 9))
    return torch.cat([below[:-1] / -below[0], above / above[-1]])


def train(
    lm: llm.Model,
    weights: Mapping[str, Tensor],
    tensors: Iterable[Tensor],
    text: Tensor,
    steps: int,
    rate: float,
    linear: decoder.Linear = decoder.plain,
    *,
    layers: Iterable[int] | None = None,
    teacher: Callable[[Tensor], Tensor] | None = None,
    batch: int = 8,
) -> None:
    """Train `tensors` in place: Adam, a rate that falls to 0 in a line, `batch` rows of 257 tokens
    of `text` a step, drawn by a fixed seed, so that two arms see the same rows.

    The loss is that of the next token; with a `teacher`, which gives probabilities (rows, 256,
    vocabulary) for rows of tokens, it is the divergence from them. Raises ValueError where the text
    is shorter than a row.

    >>> lm = llm.load(tiny=True)
    >>> w = {n: t.clone().requires_grad_() for n, t in lm.weights.items()}
    >>> train(lm, w, w.values(), decoder.text("validation"), steps=1, rate=1e-3, batch=1)
    >>> torch.equal(w["0.q"], lm.weights["0.q"])
    False
    """
    if len(text) < 258:
        raise ValueError(f"the text has {len(text)} tokens; a row takes 257, and one more to draw.")
    optimizer, draw = torch.optim.Adam(list(tensors), lr=rate), torch.Generator().manual_seed(1)
    layers = None if layers is None else list(layers)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        start = torch.randint(len(text) - 257, (batch, 1), generator=draw)
        rows = text[start + torch.arange(257)]
        logits = decoder.forward(lm.config, weights, rows[:, :-1], linear, layers).flatten(0, 1)
        if teacher is None:
            loss = F.cross_entropy(logits, rows[:, 1:].flatten())
        else:
            due = teacher(rows[:, :-1]).flatten(0, 1)
            loss = F.kl_div(logits.log_softmax(-1), due, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def formats(points: dict[str, tuple[float, measure.Interval]], *, title: str, alt: str) -> None:
    """A row for each format, with its bits a weight: its rise of the perplexity with the interval.

    >>> formats({"INT4": (4.25, measure.Interval(0.4, 0.2, 0.6))}, title="", alt="One row.")
    Figure: One row.
    """
    figure, ax = plots.axes("rise of the perplexity (%)", "", title=title, height=2.8)
    for row, (_, i) in enumerate(points.values()):
        ax.errorbar(i.value, row, xerr=[[i.value - i.low], [i.high - i.value]], fmt="o", capsize=3)
    ax.axvline(0, color="0.4", linewidth=1)
    ax.set_yticks(range(len(points)), [f"{n}: {bits:.2f} bits" for n, (bits, _) in points.items()])
    ax.invert_yaxis()
    plots.show(figure, alt)
