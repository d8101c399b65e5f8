"""Checks of chapter 02, Training recipe."""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import benchmark

from course_utils import data, models, training
from course_utils.checks.clock import Clock, Work, told_to
from course_utils.exercises import Probe, Wrong, exercise


@exercise("02.A")
def standardise(answer: Probe, rng: np.random.Generator) -> None:
    """Mean 0 and deviation 1 on the training images, the same map for every other image."""
    low = int(rng.integers(0, 216))
    high = int(rng.integers(low + 20, 256))  # far enough apart for fp32, whoever divides first
    drawn = torch.from_numpy(rng.integers(low, high + 1, (20, 1, 6, 6))).to(torch.uint8)
    cases = {
        "[0, 255], half of each": torch.tensor([0, 255] * 8, dtype=torch.uint8).view(4, 1, 2, 2),
        "mostly dark": torch.tensor([0] * 15 + [200], dtype=torch.uint8).view(4, 1, 2, 2),
        f"drawn from {low} to {high}": drawn,
    }
    for name, train in cases.items():
        got = _tensor(answer(train, train), name, train.shape)
        mean, std = float(got.double().mean()), float(got.double().std(correction=0))
        if abs(mean) > 1e-3 or abs(std - 1) > 0.05:
            raise Wrong(
                f"training images {name}: mean {mean:.3g} and deviation {std:.3g} come out; 0 and 1"
                " are due."
            )
        dark, light = (
            torch.zeros(2, 1, 2, 2, dtype=torch.uint8),
            torch.full((2, 1, 2, 2), 200, dtype=torch.uint8),
        )
        a, b = (_tensor(answer(train, x), name, x.shape) for x in (dark, light))
        if not bool((b > a).all()):
            raise Wrong(
                f"training images {name}: after the map a pixel of 200 must be larger than one of"
                f" 0; got {float(b.mean()):.3g} and {float(a.mean()):.3g}. Whose mean was taken"
                " away?"
            )
        known = _tensor(
            answer(train, torch.cat([train, train[:2]])), name, (len(train) + 2, *train.shape[1:])
        )
        if not torch.allclose(known[: len(train)], got, atol=1e-4):
            raise Wrong(
                f"training images {name}: an image is mapped differently when others stand"
                " beside it."
            )
    flat = torch.full((3, 1, 2, 2), 9, dtype=torch.uint8)
    got = _tensor(answer(flat, flat), "all pixels equal", flat.shape)
    if not torch.isfinite(got).all():
        raise Wrong(
            "training images whose pixels are all 9: the deviation is 0, and your result is not a"
            " number."
        )


def _tensor(value: object, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if (
        not isinstance(value, torch.Tensor)
        or tuple(value.shape) != tuple(shape)
        or not value.is_floating_point()
    ):
        raise Wrong(
            f"training images {name}: a float tensor of shape {tuple(shape)} was expected; you"
            f" returned {tuple(value.shape) if isinstance(value, torch.Tensor) else value!r}."
        )
    return value


@exercise("02.B")
def one_cycle(answer: Probe, rng: np.random.Generator) -> None:
    """Torch's OneCycleLR gives the same rate in every step, the first and the last included."""
    cases = [(8, 0.1, 0.25), (100, 1.0, 0.3)]
    cases += [
        (int(rng.integers(8, 200)), float(rng.uniform(1e-3, 2)), float(rng.uniform(0.15, 0.8)))
        for _ in range(3)
    ]
    for total, max_lr, warmup in cases:
        wanted = _torch_rates(total, max_lr, warmup)
        for step in sorted(
            {0, 1, total - 1, *range(0, total, max(1, total // 17)), int(np.argmax(wanted))}
        ):
            got = answer(step, total, max_lr, warmup)
            if not isinstance(got, int | float | np.number) or not np.isfinite(got):
                raise Wrong(f"step {step} of {total}: a number was expected; you returned {got!r}.")
            if abs(float(got) - wanted[step]) > 1e-6 * max_lr + 1e-9 * (step == total - 1):
                raise Wrong(
                    f"total {total}, max_lr {max_lr:.3g}, warmup {warmup:.3g}: in step {step}"
                    f" torch's rate is {wanted[step]:.6g}, yours {float(got):.6g}."
                )
        last = float(answer(total - 1, total, max_lr, warmup))
        if abs(last - wanted[-1]) > 1e-3 * wanted[-1]:
            raise Wrong(
                f"total {total}: the last rate is {last:.3g}, torch's {wanted[-1]:.3g}: the first"
                " one divided by 10,000."
            )


@functools.lru_cache(16)
def _torch_rates(total: int, max_lr: float, warmup: float) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=max_lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr, total_steps=total, pct_start=warmup
    )
    rates = []
    for step in range(total):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        if step < total - 1:
            schedule.step()
    return rates


STEPS, NEEDED = 150, 0.68  # the solution gets 0.80, with a deviation of 0.013 from draw to draw


@exercise("02.C")
def train_within(answer: Probe, rng: np.random.Generator) -> None:
    """Accurate on images it has not seen, and on time, however short the time."""
    images, labels = _split("train")
    chosen = torch.from_numpy(rng.permutation(len(images))[:4000])
    images, labels = images[chosen], labels[chosen]
    torch.manual_seed(int(rng.integers(2**31)))  # for an answer that draws from torch
    with benchmark.set_torch_threads(1):
        net, budget = _on_time(answer, images, labels)
    unseen, truth = _split("validation")
    reached = training.accuracy(net, unseen[:1000], truth[:1000])
    if reached < NEEDED:
        raise Wrong(
            f"in {budget:.2f} s, about {STEPS} steps of a small network, {NEEDED:.0%} of unseen"
            f" images are within reach; yours gets {reached:.1%}. Which learning rate, which"
            " schedule, which size?"
        )


@functools.cache
def _split(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return data.fashion_mnist(name)


def _on_time(answer: Probe, images: torch.Tensor, labels: torch.Tensor) -> tuple[nn.Module, float]:
    """The network trained in the longer of two budgets, and that budget; Wrong if either is
    overrun. The time is the work that torch does: a busy machine makes nobody late.
    """
    clock = Clock()
    took = 0.0

    def timed(*given: object) -> object:
        nonlocal took
        with told_to(answer.answer, clock), Work(clock):
            start = clock.now
            net = answer.answer(*given)
            took = clock.now - start
        return net

    step = _seconds_a_step(images, labels)
    for steps in (1, STEPS):
        budget = steps * step
        net = Probe(timed)(images, labels, budget)
        if not isinstance(net, nn.Module):
            raise Wrong(f"a network was expected; you returned a {type(net).__name__}.")
        if took > 1.3 * budget + 12 * step:
            raise Wrong(
                f"{budget:.2f} s were allowed, and it took {took:.2f} s. Look at the clock inside"
                " the loop."
            )
        if net.training:
            raise Wrong(
                "the network came back in train mode: an image's answer would depend on its"
                " neighbours. Call eval()."
            )
    return net, budget


def _seconds_a_step(images: torch.Tensor, labels: torch.Tensor) -> float:
    """How long one step of the small network takes on the clock that counts torch's work: what the
    budget is counted in.
    """
    net, clock = models.mini_resnet(8, seed=0).train(), Clock()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    with Work(clock):
        loss = F.cross_entropy(net(models.normalise(images[:64])), labels[:64])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return clock.now
