"""Checks of chapter 11, Runtimes."""

from collections import Counter

import numpy as np
import torch
from torch import nn

from course_utils.exercises import Probe, Wrong, exercise


@exercise("11.A")
def fused_away(answer: Probe, rng: np.random.Generator) -> None:
    """For each kind of node, how many the optimiser took away."""
    kinds = [
        "Conv",
        "Relu",
        "Add",
        "BatchNormalization",
        "Clip",
        "Gemm",
        "ReorderOutput",
        "FusedConv",
    ]
    cases = [
        (["Conv", "Relu", "Conv", "Relu"], ["Conv", "Conv", "Relu"]),
        (["Conv", "Relu"], ["FusedConv"]),
        ([], []),
    ]
    cases += [
        (
            [kinds[i] for i in rng.integers(0, 8, rng.integers(0, 14))],
            [kinds[i] for i in rng.integers(0, 8, rng.integers(0, 9))],
        )
        for _ in range(8)
    ]
    for before, after in cases:
        got = answer(list(before), list(after))
        if not isinstance(got, dict):
            raise Wrong(f"a dict from kind to number was expected; you returned {got!r}.")
        a, b = Counter(before), Counter(after)
        for kind in sorted(set(before) | set(after) | set(got)):
            lost = max(a[kind] - b[kind], 0)
            if got.get(kind, 0) != lost or (kind in got and lost == 0):
                raise Wrong(
                    f"before {before}, after {after}: of {kind} {lost} were taken away; you say"
                    f" {got.get(kind, 'nothing')}. A kind of which nothing was taken away does not"
                    " belong into the dict."
                )


class _Runtime:
    """A runtime as it is called, with one fault or none."""

    def __init__(self, model: nn.Module, fault: str) -> None:
        self.model, self.fault = model, fault

    def __call__(self, x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            y = self.model(torch.from_numpy(x)).numpy().copy()
        n = len(x)
        if self.fault == "raises at any batch but 2" and n != 2:
            raise RuntimeError("Got invalid dimensions for input: index 0")
        if self.fault == "drops the batch of 1" and n == 1:
            return y[0]
        if self.fault == "NaN in one place":
            y.reshape(-1)[-1] = np.nan
        if self.fault == "the first answer for everyone":
            y[:] = y[0]
        if self.fault == "one logit is off by 0.01":
            y.reshape(-1)[0] += 0.01
        if self.fault == "rounding":
            y += np.float32(1e-7)
        return y


@exercise("11.B")
def first_bad_batch(answer: Probe, rng: np.random.Generator) -> None:
    """Every fault is found, at the first batch size that shows it, and rounding is let through."""
    torch.manual_seed(int(rng.integers(0, 2**31)))
    width = int(rng.integers(3, 9))
    model = nn.Linear(width, 4).eval()
    rows = {
        "none": ([1, 2, 5], None),
        "rounding": ([1, 2, 5], None),
        "raises at any batch but 2": ([2, 1, 5], 1),
        "drops the batch of 1": ([3, 2, 1], 1),
        "NaN in one place": ([4, 1], 4),
        "the first answer for everyone": ([1, 2, 7], 2),
        "one logit is off by 0.01": ([1], 1),
    }
    for fault, (batches, wanted) in rows.items():
        got = answer(model, _Runtime(model, fault), (width,), list(batches), 1e-5)
        if got != wanted:
            raise Wrong(
                f"a runtime with this fault: {fault}. Over the batch sizes {batches} the answer is"
                f" {wanted}; you returned {got!r}."
            )


@exercise("11.C")
def choose(answer: Probe, rng: np.random.Generator) -> None:
    """The most requests a second among those that keep both promises; None if none does."""
    fixed = [
        {"name": "a", "batch": 1, "milliseconds": [1.0] * 200, "accuracy": 0.91},
        {"name": "b", "batch": 8, "milliseconds": [4.0] * 195 + [50.0] * 5, "accuracy": 0.91},
        {"name": "c", "batch": 8, "milliseconds": [4.0] * 200, "accuracy": 0.80},
        {"name": "d", "batch": 4, "milliseconds": [3.0] * 200, "accuracy": 0.90},
    ]
    cases = [
        (fixed, 10.0, 0.9),
        (fixed, 0.5, 0.9),
        (fixed, 3.0, 0.9),
        (fixed, 10.0, 0.99),
        ([], 1.0, 0.0),
    ]
    cases += [
        (_configs(rng), float(rng.uniform(2, 20)), float(rng.uniform(0.8, 0.95))) for _ in range(12)
    ]
    for configs, slo, floor in cases:
        valid = {
            c["name"]: c["batch"] / float(np.mean(c["milliseconds"]))
            for c in configs
            if float(np.percentile(c["milliseconds"], 99)) <= slo and c["accuracy"] >= floor
        }
        got = answer([dict(c) for c in configs], slo, floor)
        tails = {c["name"]: float(np.percentile(c["milliseconds"], 99)) for c in configs}
        short = [
            {k: v for k, v in c.items() if k != "milliseconds"}
            | {"p99": round(tails[c["name"]], 2)}
            for c in configs
        ]
        where = f"p99 at most {slo:.3g} ms and accuracy at least {floor:.3g}, of {short}"
        if not valid:
            if got is not None:
                raise Wrong(f"{where}: nothing keeps both, so None is due; you returned {got!r}.")
        elif got not in valid:
            raise Wrong(f"{where}: {got!r} does not keep both.")
        elif valid[got] < max(valid.values()) * (1 - 1e-9):
            raise Wrong(
                f"{where}: {got!r} serves {1000 * valid[got]:.0f} a second,"
                f" {1000 * max(valid.values()):.0f} are possible."
            )


def _configs(rng: np.random.Generator) -> list[dict]:
    return [
        {
            "name": f"config {i}",
            "batch": int(rng.choice([1, 2, 4, 8])),
            "milliseconds": [
                float(v) for v in rng.uniform(0.5, 6) * (1 + rng.exponential(0.3, 120))
            ],
            "accuracy": float(rng.uniform(0.75, 1)),
        }
        for i in range(int(rng.integers(1, 7)))
    ]
