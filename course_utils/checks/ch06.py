"""Checks of chapter 06, Quantization in practice."""

import itertools
import math
from collections.abc import Mapping

import numpy as np
import torch

from course_utils.checks.accept import said, whole
from course_utils.exercises import Probe, Wrong, exercise

BITS = (2, 3, 4, 8)

_LOSSES = [  # what each layer loses alone, and the accuracy with none quantized
    ({"a": 0.02, "b": 0.10}, 0.6),
    ({"only": 0.05}, 0.6),
    ({"a": 0.011, "b": 0.014}, 0.6),  # equal in whole points
    ({"first": 0.30, "then": 0.11, "last": 0.12}, 0.9),
    ({"head": 0.04, "neck": 0.05, "body": 0.06}, 0.9),  # the last one, and no loss above 0.1
    ({"b": 0.2, "a": 0.1, "c": 0.15}, 0.5),
    ({"good": -0.30, "bad": 0.05}, 0.5),  # a gain, and larger than the loss
    ({"worse": -0.01, "better": -0.20}, 0.5),  # all gain: the one that gains least
    ({"none": 0.0, "gain": -0.10}, 0.5),
]


@exercise("06.A")
def worst_layer(answer: Probe, rng: np.random.Generator) -> None:
    """One layer at a time, against the network with none quantized; a gain is not a loss."""
    cases = [*_LOSSES]
    for _ in range(12):
        names = [f"layer{i}" for i in rng.permutation(int(rng.integers(2, 7)))]
        loss = rng.permutation(np.linspace(-0.1, 0.2, len(names))).tolist()
        cases.append((dict(zip(names, loss, strict=True)), float(rng.uniform(0.4, 0.95))))
    for loss, untouched in cases:
        _judge_worst(answer, loss, untouched)


def _judge_worst(answer: Probe, loss: dict[str, float], untouched: float) -> None:
    asked = []

    def evaluate(layers: set) -> float:
        if not isinstance(layers, set | frozenset | list | tuple):
            raise Wrong(f"evaluate takes a set of layer names; you gave it {said(layers)}.")
        if unknown := [name for name in layers if name not in loss]:
            raise Wrong(f"evaluate was given {unknown[0]!r}, which is none of {[*loss]}.")
        asked.append(set(layers))
        return untouched - sum(loss[name] for name in layers)

    got, want = answer(evaluate, [*loss]), max(loss, key=loss.get)
    if any(len(layers) > 1 for layers in asked):
        raise Wrong(
            f"you quantized {sorted(max(asked, key=len))} at once: then nobody knows whose fault"
            " the loss is."
        )
    if got != want:
        lost = ", ".join(f"{name} {value:.3g}" for name, value in loss.items())
        raise Wrong(
            f"accuracy lost by quantizing one layer alone: {lost}. The worst is {want!r}; you"
            f" returned {said(got)}."
        )


@exercise("06.B")
def straight_through(answer: Probe, rng: np.random.Generator) -> None:
    """Rounds and clamps like torch's operator, forwards and backwards."""
    function = answer.answer
    if not (isinstance(function, type) and issubclass(function, torch.autograd.Function)):
        raise Wrong("a class derived from torch.autograd.Function was expected.")
    # The text's example; a weight that rounds to the last integer, and one half a step beyond it.
    _judge_rounding(function, torch.tensor([0.3, 0.9]), 0.5, -2, 1, torch.ones(2))
    edges = torch.tensor([0.7, 0.76, -1.2, -1.26, 0.0])
    _judge_rounding(function, edges, 0.5, -2, 1, torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0]))
    for low, high, spread in ((-8, 7, 0.3), (-128, 127, 1.0), (-2, 1, 4.0), (0, 15, 1.0)):
        scale = float(rng.uniform(0.05, 0.3))
        w = torch.from_numpy(rng.normal(0, spread, 400)).float()
        w[:3] = scale * torch.tensor([0.2, 0.7, 0.9])  # some are inside, whatever was drawn
        share = w / scale - torch.floor(w / scale)
        w = w[(share - 0.5).abs() > 1e-3]  # no ties: conventions differ there
        w = w[: len(w) // 4 * 4].view(4, -1)
        weights = torch.from_numpy(rng.normal(0, 1, tuple(w.shape))).float()
        _judge_rounding(function, w, scale, low, high, weights)
    _judge_two(function)


def _judge_rounding(
    function: type, w: torch.Tensor, scale: float, low: int, high: int, weights: torch.Tensor
) -> None:
    ours, theirs = w.clone().requires_grad_(), w.clone().requires_grad_()
    where = f"with scale {scale:.3f} and integers {low} … {high}"
    try:
        value = function.apply(ours, scale, low, high)
    except Exception as error:
        raise Wrong(f"{where}, forward raised {type(error).__name__}: {error}") from error
    if not torch.equal(ours, w):
        raise Wrong(f"{where}, forward changed w, which belongs to the caller.")
    wanted = torch.fake_quantize_per_tensor_affine(theirs, scale, 0, low, high)
    if not isinstance(value, torch.Tensor) or value.shape != wanted.shape:
        raise Wrong(f"{where}, forward must return a tensor of w's shape; it is {said(value)}.")
    if not torch.allclose(value, wanted, atol=1e-5):
        i = int((~torch.isclose(value, wanted, atol=1e-5)).flatten().nonzero()[0])
        got, due, from_ = (v.flatten()[i] for v in (value, wanted, w))
        raise Wrong(f"{where}, {from_:.3f} becomes {got:.3f}; torch gives {due:.3f}.")
    _compare_gradients(value, wanted, ours, theirs, weights, (scale, low, high))


def _judge_two(function: type) -> None:
    """Both forward passes first, then both backward passes: what the first one saved is its own."""
    first = torch.tensor([0.2, 5.0]).requires_grad_()
    second = torch.tensor([5.0, 0.2]).requires_grad_()
    total = function.apply(first, 1.0, -2, 1).sum() + function.apply(second, 1.0, -2, 1).sum()
    total.backward()
    if first.grad.tolist() != [1.0, 0.0] or second.grad.tolist() != [0.0, 1.0]:
        raise Wrong(
            "applied to [0.2, 5] and to [5, 0.2] (scale 1, integers -2 … 1) before one backward,"
            f" the gradients are {first.grad.tolist()} and {second.grad.tolist()}; [1, 0] and"
            " [0, 1] are right. What forward finds belongs to its own ctx."
        )


def _compare_gradients(
    value: torch.Tensor,
    wanted: torch.Tensor,
    ours: torch.Tensor,
    theirs: torch.Tensor,
    weights: torch.Tensor,
    setting: tuple[float, int, int],
) -> None:
    scale, low, high = setting
    try:
        (value * weights).sum().backward()
    except Exception as error:
        raise Wrong(
            f"backward raised {type(error).__name__}: {error}\nIt returns one gradient for each"
            " input of forward."
        ) from error
    (wanted * weights).sum().backward()
    if ours.grad is None or not ours.grad.abs().any():
        raise Wrong(
            "the gradient is zero everywhere: rounding is flat, and training would never move. Pass"
            " the gradient straight on."
        )
    if not torch.allclose(ours.grad, theirs.grad, atol=1e-6):
        i = int((~torch.isclose(ours.grad, theirs.grad, atol=1e-6)).flatten().nonzero()[0])
        w, came, got, due = (
            float(v.detach().flatten()[i]) for v in (ours, weights, ours.grad, theirs.grad)
        )
        raise Wrong(
            f"w = {w:.3f} is {round(w / scale)} steps of {scale:.3f}, and the integers are {low} …"
            f" {high}. The gradient that arrives is {came:.3f}; you passed on {got:.3f}, and"
            f" {due:.3f} is right."
        )


_ONE = {"layer": 1000}
# weights, {(layer, bits): what it costs alone}, and the floor
_NETWORKS = [
    (_ONE, {("layer", 4): 0.01, ("layer", 3): 0.2, ("layer", 2): 0.4}, 0.85),
    (_ONE, {("layer", 4): 0.01, ("layer", 3): 0.027, ("layer", 2): 0.4}, 0.85),  # just missed
    (_ONE, {("layer", 4): 0.125, ("layer", 3): 0.2, ("layer", 2): 0.4}, 0.75),  # exactly the floor
    (_ONE, {("layer", 4): 0.2, ("layer", 3): 0.3, ("layer", 2): 0.4}, 0.875),  # 8 bits, exactly
    (_ONE, {("layer", 4): 0.0, ("layer", 3): 0.0, ("layer", 2): 0.0}, 0.8),  # they cost nothing
    (_ONE, {("layer", 4): -0.02, ("layer", 3): -0.01, ("layer", 2): 0.3}, 0.86),  # and less
    (_ONE, {("layer", 4): 0.01, ("layer", 3): 0.01, ("layer", 2): 0.01}, 0.9),  # out of reach
    # One step of a costs least; but b's saves more for what it costs, and both are too much.
    (
        {"a": 10_000, "b": 10_000},
        {
            **{("a", 4): 0.0100, ("a", 3): 0.3, ("a", 2): 0.3},
            **{("b", 4): 0.0105, ("b", 3): 0.0108, ("b", 2): 0.0110},
        },
        0.8635,
    ),
    # One step of a saves most of all; it takes nearly all the accuracy there is to spend.
    (
        {"a": 20_000} | dict.fromkeys("bcd", 9_000),
        {("a", 4): 0.0295, ("a", 3): 0.3, ("a", 2): 0.3}
        | {(n, b): c for n in "bcd" for b, c in ((4, 0.0010), (3, 0.0020), (2, 0.0030))},
        0.845,
    ),
    # b's step saves most bits a weight for what it costs, and b is small.
    (
        {"a": 100_000, "b": 1_000},
        {
            **{("a", 4): 0.0100, ("a", 3): 0.3, ("a", 2): 0.3},
            **{("b", 4): 0.0105, ("b", 3): 0.0108, ("b", 2): 0.0110},
        },
        0.8635,
    ),
]


@exercise("06.C")
def choose_bits(answer: Probe, rng: np.random.Generator) -> None:
    """Above the floor, close to the smallest, and within the evaluations you may pay for."""
    for weights, hurt, floor in _NETWORKS:
        _judge_bits(answer, weights, hurt, floor, 0.0)
    for _ in range(3):
        _judge_bits(answer, *_network(rng))


def _reached(bits: Mapping, hurt: Mapping, crowd: float) -> float:
    """Layers of 3 bits and fewer hurt more together than each alone: `crowd` for each pair."""
    low = sum(b <= 3 for b in bits.values())
    alone = math.fsum(hurt.get((name, b), 0.0) for name, b in bits.items())  # in whatever order
    return 0.875 - alone - crowd * low * (low - 1) / 2


def _network(rng: np.random.Generator) -> tuple[dict, dict, float, float]:
    """Five layers in which a right strategy can't miss: weights, costs, floor and crowd.

    Whoever adds up what the layers lose alone, and does not try the sum, ends below the floor;
    whoever always takes the step that saves most for the accuracy it costs ends within 5% of the
    smallest, whether a step may skip a width or not. Networks that are not so are drawn again.
    """
    while True:
        names = [f"layer{i}" for i in rng.permutation(5)]
        weights = {n: int(rng.integers(1, 200)) * 100 for n in names}
        hurt = {
            (n, b): float(rng.uniform(0.2, 1.0) * 0.06 * 0.3 ** (b - 2))
            for n in names
            for b in BITS[:3]
        }
        floor, crowd = 0.845, 0.004
        best = smallest(weights, hurt, floor, crowd)
        guess = min(
            _choices(weights), key=lambda c: (_reached(c, hurt, 0) < floor, _size(c, weights))
        )
        greedy = [
            _size(_greedy(weights, hurt, floor, crowd, skip), weights) for skip in (False, True)
        ]
        if _reached(guess, hurt, crowd) < floor - 0.002 and max(greedy) <= 1.05 * best:
            return weights, hurt, floor, crowd


def _choices(weights: Mapping) -> list[dict]:
    return [
        dict(zip(weights, c, strict=True)) for c in itertools.product(BITS, repeat=len(weights))
    ]


def _size(bits: Mapping, weights: Mapping) -> int:
    return sum(weights[name] * b for name, b in bits.items())


def smallest(weights: Mapping, hurt: Mapping, floor: float, crowd: float) -> int | None:
    """Weights × bits of the smallest choice above the floor, of all there are; None if none is."""
    fitting = [c for c in _choices(weights) if _reached(c, hurt, crowd) >= floor]
    return min((_size(c, weights) for c in fitting), default=None)


def _greedy(weights: Mapping, hurt: Mapping, floor: float, crowd: float, skip: bool) -> dict:
    current = dict.fromkeys(weights, 8)
    while True:
        now, steps = _reached(current, hurt, crowd), []
        for name, bits in current.items():
            fewer = [b for b in BITS if b < bits]
            for b in fewer if skip else fewer[-1:]:
                value = _reached(current | {name: b}, hurt, crowd)
                if value >= floor:
                    steps.append((weights[name] * (bits - b) / max(now - value, 1e-9), name, b))
        if not steps:
            return current
        _, name, b = max(steps)
        current[name] = b


def _judge_bits(answer: Probe, weights: dict, hurt: dict, floor: float, crowd: float) -> None:
    where = f"weights {weights}, floor {floor}"
    calls = []

    def accuracy(bits: Mapping) -> float:
        _valid(bits, weights, f"{where}: accuracy was given")
        calls.append(bits)
        return _reached(bits, hurt, crowd)

    got, best = answer(dict(weights), accuracy, floor), smallest(weights, hurt, floor, crowd)
    if best is None:
        if got is not None:
            raise Wrong(
                f"{where}: even 8 bits everywhere give 0.875; None is due, and you returned"
                f" {said(got)}."
            )
        return
    got = _valid(got, weights, f"{where}: you returned")
    reached, taken = _reached(got, hurt, crowd), _size(got, weights)
    if not reached >= floor:
        raise Wrong(f"{where}: your choice {got} reaches {reached:.4f}, below the floor.")
    if taken > 1.1 * best:
        raise Wrong(
            f"{where}: your choice {got} takes {taken / 8e3:.2f} kB; {best / 8e3:.2f} kB are"
            " possible above the floor, and up to a tenth more would pass. Which step saves most"
            " bits for the accuracy it costs?"
        )
    if len(calls) > 250:
        raise Wrong(
            f"{where}: you evaluated {len(calls)} choices; 250 are allowed. On a real network each"
            " one costs a second."
        )


def _valid(bits: object, weights: Mapping, what: str) -> dict[str, int]:
    if not isinstance(bits, Mapping) or bits.keys() != weights.keys():
        raise Wrong(f"{what} {said(bits)}; a dict from every layer to its bits was expected.")
    found = {name: whole(b, what) for name, b in bits.items()}
    if not set(found.values()) <= set(BITS):
        raise Wrong(f"{what} {found}; 2, 3, 4 and 8 bits are allowed.")
    return found
