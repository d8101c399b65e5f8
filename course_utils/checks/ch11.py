"""Checks of chapter 11, Runtimes."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from course_utils.checks.accept import apart, said, whole
from course_utils.exercises import Probe, Wrong, exercise


@exercise("11.A")
def fused_away(answer: Probe, rng: np.random.Generator) -> None:
    """For each kind of node, how many the optimiser took away."""
    kinds = [*("Conv", "Relu", "Add", "Gemm"), *(f"Kind{n}" for n in rng.integers(0, 1000, 3))]
    cases = [
        (["Conv", "Relu"], ["FusedConv"]),
        (["Conv", "Relu", "Conv", "Relu"], ["Conv", "Conv", "Relu"]),
        (["Relu"], ["Relu", "Relu", "ReorderOutput"]),  # it adds nodes, too
        (["Relu", "Conv", "Relu", "Relu"], ["Conv", "Relu"]),
        ([], ["Conv"]),
        ([], []),
    ]
    for most_before, most_after in [(14, 9)] * 8:
        sizes = rng.integers(0, most_before), rng.integers(0, most_after)
        cases.append(tuple([kinds[i] for i in rng.integers(0, len(kinds), n)] for n in sizes))
    for before, after in cases:
        where = f"before {before}, after {after}"
        got = answer(list(before), list(after))
        if not isinstance(got, Mapping):
            raise Wrong(f"{where}: a dict from kind to number was expected; you return {said(got)}")
        a, b = Counter(before), Counter(after)
        for kind in sorted({*before, *after, *map(str, got)}):
            lost = max(a[kind] - b[kind], 0)
            if kind in got and lost == 0:
                raise Wrong(f"{where}: no {kind} is gone, and your dict holds {kind}.")
            if lost and (kind not in got or whole(got[kind], where) != lost):
                yours = got.get(kind, "nothing")
                raise Wrong(f"{where}: of {kind} {lost} are gone; you say {yours}.")


class _Sign(nn.Module):
    """Answers of -1, 0 and 1: what is added to them is exact."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sign(x).flatten(1)  # (B, n)


def _linear(shape: tuple[int, ...], size: float) -> nn.Module:
    layer = nn.Linear(int(np.prod(shape)), 4)
    with torch.no_grad():
        layer.bias.add_(size)
    return nn.Sequential(nn.Flatten(), layer).eval()


class _Runtime:
    """A runtime as it is called, with one fault or none. `complaint` says what it was given that no
    runtime takes.
    """

    def __init__(self, model: nn.Module, shape: tuple[int, ...], fault: str, size: float) -> None:
        self.model, self.shape, self.fault, self.size = model, shape, fault, size
        self.complaint = ""

    def __call__(self, x: np.ndarray) -> np.ndarray:
        if not isinstance(x, np.ndarray) or x.dtype != np.float32 or x.shape[1:] != self.shape:
            what = f"{x.dtype} {tuple(x.shape)}" if hasattr(x, "dtype") else type(x).__name__
            self.complaint = f"run takes a float32 array (batch, *{self.shape}); you gave {what}."
            raise TypeError(self.complaint)
        n = len(x)
        if self.fault == "uses the first number of each input alone":
            flat = x.reshape(n, -1)
            x = np.repeat(flat[:, :1], flat.shape[1], axis=1).reshape(x.shape)
        with torch.no_grad():
            y = self.model(torch.from_numpy(x)).numpy().copy()
        match self.fault:
            case "raises at any batch but 2" if n != 2:
                raise RuntimeError("Got invalid dimensions for input: index 0")
            case "drops the batch of 1" if n == 1:
                return y[0]
            case "answers one row too few" if n > 3:
                return y[1:]
            case "the first answer for everyone":
                y[:] = y[0]
            case "the answers in reverse":
                y = y[::-1].copy()
            case "NaN in the last place":
                y.reshape(-1)[-1] = np.nan
            case "infinity in the last place":
                y.reshape(-1)[-1] = np.inf
            case "one number of the last row is too large" | "rounding":
                y[-1, 0] += np.float32(self.size)
            case "one number of the first row is too large":
                y[0, -1] += np.float32(self.size)
            case "one number of the last row is too small":
                y[-1, -1] -= np.float32(self.size)
        return y


# fault, its size, the tolerance, the batch sizes, and the one that must be returned
_FAULTS = [
    ("none", 0.0, 1e-4, [1, 2, 5], None),
    ("rounding", 1e-6, 1e-4, [1, 2, 5], None),
    ("drops the batch of 1", 0.0, 1e-4, [3, 2, 1], 1),
    ("raises at any batch but 2", 0.0, 1e-4, [2, 1, 5], 1),
    ("raises at any batch but 2", 0.0, 1e-4, [2, 7, 1], 7),
    ("answers one row too few", 0.0, 1e-4, [3, 4], 4),
    ("NaN in the last place", 0.0, 1e-4, [4, 1], 4),
    ("infinity in the last place", 0.0, 1e-4, [2], 2),
    ("the first answer for everyone", 0.0, 1e-4, [1, 2, 7], 2),
    ("the answers in reverse", 0.0, 1e-4, [1, 6, 2], 6),
    ("uses the first number of each input alone", 0.0, 1e-4, [1], 1),
    ("one number of the last row is too large", 0.01, 1e-3, [3], 3),
    ("one number of the last row is too small", 0.01, 1e-3, [3], 3),
    ("one number of the first row is too large", 0.01, 1e-3, [2], 2),
    ("one number of the last row is too large", 0.01, 0.02, [3], None),
    ("one number of the last row is too small", 0.01, 0.02, [1, 3], None),
    ("one number of the last row is too large", 0.01, 0.005, [3, 1], 3),
]


@exercise("11.B")
def first_bad_batch(answer: Probe, rng: np.random.Generator) -> None:
    """Every fault is found, at the first batch size that shows it, and what is within the tolerance
    is let through.
    """
    torch.manual_seed(int(rng.integers(0, 2**31)))
    shapes = [(int(rng.integers(3, 9)),), (1, 2, int(rng.integers(2, 5)))]
    for i, row in enumerate(_FAULTS):
        shape = shapes[i % 2]
        _judge(answer, _linear(shape, 0.0), shape, *row)
    # All numbers of this model are near 1,000: a tolerance that grows with them finds nothing.
    large, shape = _linear(shapes[0], 1000.0), shapes[0]
    _judge(answer, large, shape, "one number of the last row is too small", 0.01, 4e-3, [2], 2)
    silent = _linear(shape, 0.0)
    for parameter in silent.parameters():
        parameter.detach().zero_()  # NaN as 0 would be the right answer
    for fault in ("NaN in the last place", "infinity in the last place"):
        _judge(answer, silent, shape, fault, 0.0, 1e-4, [2], 2)
    exactly = ("one number of the last row is too large", 0.5, 0.5, [2, 1], None)
    _judge(answer, _Sign(), shape, *exactly)


def _judge(
    answer: Probe,
    model: nn.Module,
    shape: tuple[int, ...],
    fault: str,
    size: float,
    tolerance: float,
    batches: list[int],
    wanted: int | None,
) -> None:
    run = _Runtime(model, shape, fault, size)
    got = answer(model, run, shape, list(batches), tolerance)
    if run.complaint:
        raise Wrong(run.complaint)
    where = f"a runtime with this fault: {fault}" + (f", by {size:g}" if size else "")
    where += f". The tolerance is {tolerance:g}, the batch sizes {batches}"
    if got is not None:
        got = whole(got, where)
    if got != wanted:
        raise Wrong(f"{where}: the answer is {wanted}; you returned {got}.")


def _config(name: str, batch: int, times: list[float], accuracy: float) -> dict:
    return {"name": name, "batch": batch, "milliseconds": times, "accuracy": accuracy}


_FIXED = [
    _config("a", 1, [1.0] * 200, 0.91),
    _config("b", 8, [4.0] * 195 + [50.0] * 5, 0.91),  # of 200 calls 5 are late: too many
    _config("c", 8, [4.0] * 200, 0.80),
    _config("d", 4, [3.0] * 200, 0.90),  # exactly on the floor
]
_RARE = [_config("rare", 8, [4.0] * 299 + [90.0], 0.95), _config("safe", 1, [4.0] * 300, 0.95)]
_OFTEN = [_config("often", 8, [4.0] * 296 + [90.0] * 4, 0.95), *_RARE[1:]]  # 1.3%: p98 is 4 ms
_SLOW = [_config("slow", 8, [9.0] * 200, 0.95), _config("quick", 4, [3.0] * 200, 0.95)]
_BETWEEN = [_config("between", 4, [4.0] * 197 + [5.0, 6.0, 7.0], 0.95)]  # p99 is 5.01 ms
_FIRST = [
    _config("a slow start", 1, [100.0] + [1.0] * 299, 0.95),
    _config("even", 1, [1.2] * 300, 1.0),
]
_CALLS = [_config("many", 4, [3.0] * 400, 0.95), _config("few", 4, [4.0] * 200, 0.95)]
_MIDDLE = [  # the median says "tail", and so does the mean of batch / time
    _config("tail", 2, [1.0] * 120 + [9.0] * 80, 0.95),
    _config("even", 2, [2.0] * 200, 0.95),
]


@exercise("11.C")
def choose(answer: Probe, rng: np.random.Generator) -> None:
    """The most images a second among those that keep both promises; None if none does."""
    cases = [
        (_FIXED, 10.0, 0.9),
        (_FIXED, 0.5, 0.9),
        (_FIXED, 3.0, 0.9),  # p99 exactly what was promised
        (_FIXED, 60.0, 0.9),
        (_FIXED, 10.0, 0.75),
        (_FIXED, 10.0, 0.99),
        (_RARE, 10.0, 0.9),
        (_OFTEN, 10.0, 0.9),
        (_SLOW, 10.0, 0.9),
        (_CALLS, 10.0, 0.9),
        (_BETWEEN, 5.5, 0.9),
        (_FIRST, 10.0, 0.9),
        (_MIDDLE, 10.0, 0.9),
        ([_config("one call", 1, [2.0], 0.9)], 2.0, 0.9),
        ([], 1.0, 0.0),
    ]
    for _ in range(12):
        cases.append((_configs(rng), float(rng.uniform(2, 20)), float(rng.uniform(0.8, 0.95))))
    for configs, slo, floor in cases:
        order = rng.permutation(len(configs))
        _judge_choice(answer, [configs[i] for i in order], slo, floor)


def _judge_choice(answer: Probe, configs: list[dict], slo: float, floor: float) -> None:
    tails = {c["name"]: float(np.percentile(c["milliseconds"], 99)) for c in configs}
    valid = {
        c["name"]: 1e3 * c["batch"] / float(np.mean(c["milliseconds"]))
        for c in configs
        if tails[c["name"]] <= slo and c["accuracy"] >= floor
    }
    short = "; ".join(
        f"{c['name']}: batch {c['batch']}, p99 {tails[c['name']]:.3g} ms, mean"
        f" {np.mean(c['milliseconds']):.3g} ms, accuracy {c['accuracy']:.3g}"
        for c in configs
    )
    where = f"p99 at most {slo:.3g} ms and accuracy at least {floor:.3g}, of [{short}]"
    got = answer([dict(c) for c in configs], slo, floor)
    if got is None:
        if valid:
            raise Wrong(f"{where}: {min(valid)} keeps both promises; you returned None.")
        return
    if not isinstance(got, str):
        raise Wrong(f"{where}: a name was expected, or None; you returned {said(got)}.")
    if got not in valid:
        due = "another does" if valid else "nothing does, so None is due"
        raise Wrong(f"{where}: {got!r} does not keep both, and {due}.")
    if not valid[got] >= max(valid.values()) * (1 - 1e-9):
        yours, best = apart(valid[got], max(valid.values()))
        raise Wrong(f"{where}: {got!r} serves {yours} images a second; {best} are possible.")


def _configs(rng: np.random.Generator) -> list[dict]:
    """Drawn ones. No two calls take the same time, so that no p99 lies on the promise."""
    configs = []
    for name in rng.permutation([f"config {i}" for i in range(int(rng.integers(1, 7)))]):
        times = rng.uniform(0.5, 6) * (1 + rng.exponential(0.3, 120))
        batch, accuracy = int(rng.choice([1, 2, 4, 8])), float(rng.uniform(0.75, 1))
        configs.append(_config(str(name), batch, times.tolist(), accuracy))
    return configs
