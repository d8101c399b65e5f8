"""Checks of chapter 06, Quantization in practice."""

import numpy as np
import torch

from course_utils.checks.accept import said
from course_utils.exercises import Probe, Wrong, exercise

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


@exercise("06.C")
def corrected_bias(answer: Probe, rng: np.random.Generator) -> None:
    """With the new bias, every channel of the rounded layer has the mean of the exact layer's."""
    text = ([[1.4, -0.6]], [[1.0, -1.0]], [0.5], [[1.0, 0.0], [1.0, 2.0]])
    lean = ([[0.6, 0.6], [0.2, 0.9]], [[1.0, 1.0], [0.0, 1.0]], [0.0, 1.0], [[1.0, 3.0]])
    for case in (text, lean):
        _judge_bias(answer, *map(torch.tensor, case))
    for _ in range(12):
        outputs, inputs, n = (int(k) for k in rng.integers(1, 7, 3))
        w = torch.from_numpy(rng.normal(size=(outputs, inputs)))
        x = torch.from_numpy(rng.normal(rng.normal(scale=2), 1, size=(n, inputs)))
        bias = torch.from_numpy(rng.normal(size=outputs))
        step = float(rng.uniform(0.3, 1.5))
        _judge_bias(answer, w, torch.round(w / step) * step, bias, x)
    square = torch.from_numpy(rng.normal(size=(4, 4)))  # rows and columns could be exchanged
    some = torch.from_numpy(rng.normal(1, 1, size=(4, 4)))
    _judge_bias(answer, square, torch.round(square), torch.zeros(4).double(), some)
    _judge_bias(answer, square, square.clone(), torch.ones(4).double(), some)  # nothing rounded


def _judge_bias(
    answer: Probe,
    weight: torch.Tensor,
    rounded: torch.Tensor,
    bias: torch.Tensor,
    inputs: torch.Tensor,
) -> None:
    given = answer(weight, rounded, bias, inputs)
    if isinstance(given, np.ndarray | list | tuple):
        given = torch.as_tensor(np.asarray(given))
    where = f"weights {tuple(weight.shape)}, {len(inputs)} inputs"
    if not isinstance(given, torch.Tensor) or given.shape != bias.shape:
        raise Wrong(f"{where}: a bias of shape {tuple(bias.shape)} is due; got {said(given)}.")
    exact = (inputs @ weight.T + bias).double().mean(0)
    got = (inputs.double() @ rounded.double().T).mean(0) + given.double()
    off = (got - exact).abs()
    if not bool((off <= 1e-5 * (1 + exact.abs())).all()):
        k = int(torch.nan_to_num(off, nan=torch.inf).argmax())
        raise Wrong(
            f"{where}: output {k} of the exact layer has mean {exact[k]:.4f} over the inputs; with"
            f" your bias the rounded layer's has {got[k]:.4f}."
        )
