"""Checks of chapter 06, Quantization in practice."""

import math

import numpy as np
import torch

from course_utils.exercises import Probe, Wrong, exercise

BITS = (2, 3, 4, 8)


@exercise("06.A")
def worst_layer(answer: Probe, rng: np.random.Generator) -> None:
    """One layer at a time, against the network with none quantized; a gain is not a loss."""
    for trial in range(6):
        names = [f"layer{i}" for i in range(int(rng.integers(2, 7)))]
        loss = dict(zip(names, rng.permutation(np.linspace(0.01, 0.2, len(names))), strict=True))
        lucky = names[int(rng.integers(len(names)))]
        if trial % 2:  # quantizing this one happens to help, by more than any other one hurts
            loss[lucky] = -0.3
        asked = []

        def evaluate(layers: set, loss: dict = loss, asked: list = asked) -> float:
            if not isinstance(layers, set | frozenset | list | tuple):
                raise Wrong(
                    f"evaluate takes a set of layer names; you gave it a {type(layers).__name__}."
                )
            asked.append(set(layers))
            return 0.6 - sum(loss[name] for name in layers)

        got, want = answer(evaluate, list(names)), max(names, key=lambda n: loss[n])
        if got != want:
            raise Wrong(
                f"accuracy lost by quantizing one layer alone: {_show(loss)}. The worst is"
                f" {want!r}; you returned {got!r}."
            )
        if any(len(layers) > 1 for layers in asked):
            raise Wrong(
                f"you quantized {max(asked, key=len)} at once: then nobody knows whose fault the"
                " loss is."
            )


def _show(loss: dict) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in loss.items())


@exercise("06.B")
def straight_through(answer: Probe, rng: np.random.Generator) -> None:
    """Rounds and clamps like torch's operator, forwards and backwards."""
    function = answer.answer
    if not (isinstance(function, type) and issubclass(function, torch.autograd.Function)):
        raise Wrong("a class derived from torch.autograd.Function was expected.")
    for low, high, spread in ((-8, 7, 0.3), (-128, 127, 1.0), (-2, 1, 4.0)):
        scale = float(rng.uniform(0.05, 0.3))
        w = torch.from_numpy(rng.normal(0, spread, 400)).float()
        w[:3] = scale * torch.tensor([0.2, -0.7, 0.9])  # some are inside, whatever was drawn
        w = w[
            (w / scale - torch.floor(w / scale) - 0.5).abs() > 1e-3
        ]  # no ties: conventions differ there
        weights = torch.from_numpy(rng.normal(0, 1, len(w))).float()
        ours, theirs = w.clone().requires_grad_(), w.clone().requires_grad_()
        try:
            value = function.apply(ours, scale, low, high)
        except Exception as error:
            raise Wrong(f"forward raised {type(error).__name__}: {error}") from error
        wanted = torch.fake_quantize_per_tensor_affine(theirs, scale, 0, low, high)
        if not isinstance(value, torch.Tensor) or value.shape != wanted.shape:
            raise Wrong("forward must return a tensor of the shape of w.")
        if not torch.allclose(value, wanted, atol=1e-5):
            i = int((value - wanted).abs().argmax())
            raise Wrong(
                f"with scale {scale:.3f} and integers {low} … {high}, {w[i]:.3f} becomes"
                f" {value[i]:.3f}; torch gives {wanted[i]:.3f}."
            )
        _compare_gradients(value, wanted, ours, theirs, weights, (scale, low, high))


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
        i = int((ours.grad - theirs.grad).abs().argmax())
        w = float(ours.detach()[i])
        where = "inside" if low <= round(w / scale) <= high else "outside"
        raise Wrong(
            f"for w = {w:.3f}, {where} the range {low * scale:.2f} … {high * scale:.2f}, the"
            f" gradient that arrives is {weights[i]:.3f}; you passed on {ours.grad[i]:.3f}, and"
            f" {theirs.grad[i]:.3f} is right."
        )


@exercise("06.C")
def choose_bits(answer: Probe, rng: np.random.Generator) -> None:
    """Above the floor, close to the smallest, and within the evaluations you may pay for."""
    for case in ("usual", "usual", "usual", "nothing may be lowered", "the floor is out of reach"):
        floor = 0.95 if case == "the floor is out of reach" else 0.87
        weights, hurt = _network(rng, floor)
        while case == "usual" and not _fair(weights, hurt, floor):
            weights, hurt = _network(rng, floor)
        if case == "nothing may be lowered":
            hurt = {key: 0.5 if key[1] < 8 else 0.0 for key in hurt}
        calls = [0]

        def accuracy(bits: dict, hurt: dict = hurt, calls: list = calls) -> float:
            calls[0] += 1
            return _reached(bits, hurt)

        got = answer(dict(weights), accuracy, floor)
        _judge_bits(got, weights, hurt, floor, calls[0])


def _network(rng: np.random.Generator, floor: float) -> tuple[dict, dict]:
    """Five layers: how many weights each has, and the accuracy that each number of bits loses."""
    weights = {f"layer{i}": int(rng.integers(1, 200)) * 100 for i in range(5)}
    hurt = {
        (n, b): float(rng.uniform(0.2, 1.0) * 0.06 * 0.3 ** (b - 2)) if b < 8 else 0.0
        for n in weights
        for b in BITS
    }
    return weights, hurt


def _reached(bits: dict, hurt: dict) -> float:
    return 0.9 - math.fsum(hurt[name, b] for name, b in bits.items())  # in whatever order


def _all_choices(weights: dict, hurt: dict) -> tuple[np.ndarray, np.ndarray]:
    """Of every choice its size in bits and the accuracy it loses."""
    sizes = [np.multiply(BITS, weights[n]) for n in weights]
    losses = [[hurt[n, b] for b in BITS] for n in weights]
    return tuple(sum(np.ix_(*table)).ravel() for table in (sizes, losses))


def _fair(weights: dict, hurt: dict, floor: float) -> bool:
    """Whether one exchange rate of accuracy into bits, the same for every layer, leads within a
    tenth of the smallest. Whoever always takes the step that saves most for the accuracy it costs
    passes all such choices that the floor allows: this strategy can't miss.
    """
    size, lost = _all_choices(weights, hurt)
    within = lost <= 0.9 - floor - 1e-9
    rates = np.geomspace(1e5, 1e9, 200)  # bits for one unit of accuracy
    chosen = np.unique(np.argmin(size + rates[:, None] * lost, axis=1))
    reached = size[chosen[within[chosen]]]
    return len(reached) > 0 and reached.min() <= 1.1 * size[within].min()


def _judge_bits(got: object, weights: dict, hurt: dict, floor: float, calls: int) -> None:
    size, lost = _all_choices(weights, hurt)
    if not (0.9 - lost.min() >= floor):
        if got is not None:
            raise Wrong(
                f"even 8 bits everywhere give 0.9 where the floor is {floor}; None is due, and you"
                f" returned {got!r}."
            )
        return
    if (
        not isinstance(got, dict)
        or got.keys() != weights.keys()
        or not set(got.values()) <= set(BITS)
    ):
        raise Wrong(
            f"a dict from every layer to 2, 3, 4 or 8 bits was expected; you returned {got!r}."
        )
    reached, taken = _reached(got, hurt), sum(weights[n] * b for n, b in got.items())
    if reached < floor:
        raise Wrong(f"your choice {got} reaches {reached:.3f}, below the floor of {floor}.")
    best = int(size[lost <= 0.9 - floor - 1e-9].min())
    if taken > 1.1 * best:
        raise Wrong(
            f"your choice {got} takes {taken / 8e3:.1f} kB; {best / 8e3:.1f} kB are possible"
            " above the floor, and up to a tenth more would pass. Which layer saves most for the"
            " accuracy it costs?"
        )
    if calls > 250:
        raise Wrong(
            f"you evaluated {calls} choices; 250 are allowed. On a real network each one costs a"
            " second."
        )
