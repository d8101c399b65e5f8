"""Checks of chapter 02, Training recipe."""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from course_utils import data, models, training
from course_utils.checks.accept import apart, close, number, said
from course_utils.checks.clock import Clock, Work, one_thread, told_to
from course_utils.checks.trained import judge_alone, turning
from course_utils.exercises import Probe, Wrong, exercise


@exercise("02.A")
def standardise(answer: Probe, rng: np.random.Generator) -> None:
    """Mean 0 and deviation 1 on the training images, the same map for every other image."""
    low = int(rng.integers(0, 100))
    high = int(rng.integers(low + 100, 256))  # far enough apart for fp32, whoever divides first
    # Of two channels the second is brighter: the map is one for all pixels, not one a channel.
    drawn = rng.integers(low, high + 1, (20, 2, 6, 6)) // np.array([2, 1]).reshape(2, 1, 1)
    cases = {
        "[0, 255], half of each": [0, 255] * 8,
        "[9, 10], half of each": [9, 10] * 8,
        "mostly dark": [0] * 15 + [200],
        "mostly light": [255] * 14 + [250, 100],
        "dark first, then light": [10] * 480 + [240] * 160,
    }
    trains = {name: _images(values) for name, values in cases.items()}
    trains[f"drawn from {low} to {high}"] = torch.from_numpy(drawn).to(torch.uint8)
    for name, train in trains.items():
        mean, std = float(train.double().mean()), float(train.double().std(correction=0))
        shape = tuple(train.shape[1:])
        others = {
            "themselves": train,
            "all black": torch.zeros((2, *shape), dtype=torch.uint8),
            "all white": torch.full((1, *shape), 255, dtype=torch.uint8),
            "drawn": torch.from_numpy(rng.integers(0, 256, (3, *shape))).to(torch.uint8),
        }
        for what, x in others.items():
            where = f"training images {name}, images {what}"
            got, want = _floats(answer(train, x), where, x), (x.double() - mean) / std
            # fp32 keeps seven digits of the mean; a mean square less its square, three or four.
            far = ~((got - want).abs() <= 3e-4 * (1 + want.abs()))
            if far.any():
                i = int(far.flatten().nonzero()[0])
                yours, due = apart(float(got.flatten()[i]), float(want.flatten()[i]))
                raise Wrong(
                    f"{where}: a pixel of {int(x.flatten()[i])} becomes {yours}; {due} is due. The"
                    f" training pixels' mean is {mean:.4g}, their deviation {std:.4g}."
                )
    for value in (9, 0, 255):
        flat = torch.full((3, 1, 2, 2), value, dtype=torch.uint8)
        for x in (flat, _images([0, value, 100, 255])):
            where = f"training images whose pixels are all {value}, images {x.flatten().tolist()}"
            got = _floats(answer(flat, x), where, x)
            if not torch.isfinite(got).all():
                raise Wrong(f"{where}: the deviation is 0, and your result is {got.flatten()[0]}.")
            if x is flat and not bool((got.abs() <= 1e-3).all()):
                raise Wrong(f"{where}: the mean must become 0; it becomes {got.flatten()[0]:.4g}.")


def _images(pixels: list[int]) -> torch.Tensor:
    return torch.tensor(pixels, dtype=torch.uint8).view(-1, 1, 2, 2)


def _floats(value: object, where: str, x: torch.Tensor) -> torch.Tensor:
    """The answer in fp64."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    shape = tuple(x.shape)
    if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape:
        raise Wrong(f"{where}: a tensor of shape {shape} was expected; you returned {said(value)}.")
    if not value.is_floating_point():
        raise Wrong(f"{where}: floating-point numbers were expected; yours are {value.dtype}.")
    return value.detach().double()


@exercise("02.B")
def one_cycle(answer: Probe, rng: np.random.Generator) -> None:
    """Torch's OneCycleLR gives the same rate in every step, the first and the last included."""
    cases = [(8, 0.1, 0.25), (100, 1.0, 0.3), (10, 0.5, 0.55), (3, 2.0, 0.5), (5, 0.3, 0.9)]
    cases += [
        (int(rng.integers(8, 200)), float(rng.uniform(1e-3, 2)), float(rng.uniform(0.15, 0.8)))
        for _ in range(3)
    ]
    for total, max_lr, warmup in cases:
        wanted = _torch_rates(total, max_lr, warmup)
        top = int(np.argmax(wanted))
        some = {0, 1, top, top - 1, min(top + 1, total - 1), total - 1}
        for step in sorted(some.union(range(0, total, max(1, total // 17)))):
            where = f"step {step}, total {total}, max_lr {max_lr:.3g}, warmup {warmup:.3g}"
            got = number(answer(step, total, max_lr, warmup), where)
            # The last rate is four millionths of the highest: held against it, anything is close.
            last = step == total - 1
            if not close(got, wanted[step], rel=1e-5, absolute=0.0 if last else 1e-6 * max_lr):
                yours, due = apart(got, wanted[step])
                why = "the first rate divided by 10,000, " if last else ""
                raise Wrong(f"{where}: torch's rate is {why}{due}, yours {yours}.")


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


# The solution gets 0.784 ± 0.010, Adam without clipping 0.775 ± 0.015 (sixteen networks each, 0.741
# at least), a third of the time 0.60 ± 0.04, a tenth of the rate 0.54 ± 0.03. The exercise asks for
# 0.72: what lies between is left to chance.
STEPS, ASKED, NEEDED = 100, 0.72, 0.7
FEW = 10


@exercise("02.C")
def train_within(answer: Probe, rng: np.random.Generator) -> None:
    """Accurate on images it has not seen, and on time, however short the time and however slow the
    machine.
    """
    tasks = [_task(rng) for _ in range(2)]
    torch.manual_seed(int(rng.integers(2**31)))  # for an answer that draws from torch
    with one_thread():
        net, used = _on_time(answer, [t[:2] for t in tasks], 10 ** float(rng.uniform(-0.5, 0.5)))
        unseen, truth = tasks[-1][2:]
        judge_alone(net, models.normalise(unseen[:8]))
        reached = training.accuracy(net, unseen, truth)
    if not reached >= NEEDED:
        raise Wrong(
            f"in about {STEPS} steps of a small network {ASKED:.0%} of unseen images are within"
            f" reach; yours gets {reached:.1%}, and it used {used:.0%} of the time. Which learning"
            " rate, which schedule, which size?"
        )


def _task(rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
    """Images and labels to train on, unseen ones, and their labels. The classes have new numbers,
    and all images are turned or mirrored alike: what was learned elsewhere is of no use.
    """
    names, turned = torch.from_numpy(rng.permutation(10)), turning(rng)
    (images, labels), (unseen, truth) = _split("train"), _split("validation")
    chosen = torch.from_numpy(rng.permutation(len(images))[:4000])
    return (
        turned(images[chosen]),
        names[labels[chosen]],
        turned(unseen[:2000]),
        names[truth[:2000]],
    )


@functools.cache
def _split(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return data.fashion_mnist(name)


class _Machine(Clock):
    """A clock on which the same work takes `slow` times as long. It was started long ago."""

    def __init__(self, slow: float) -> None:
        super().__init__()
        self.slow = slow
        self.now = 4321.0

    def read(self) -> float:
        return self.slow * super().read()

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds / self.slow)


def _on_time(
    answer: Probe, tasks: list[tuple[torch.Tensor, torch.Tensor]], slow: float
) -> tuple[nn.Module, float]:
    """The network of the longest budget, and the share of it that was used; Wrong if a budget is
    overrun. The time is the work that torch does: a busy machine makes nobody late.

    The second and the third budget are as many seconds, on machines of different speed.
    """
    step, took = _seconds_a_step(*tasks[0]), 0.0

    def timed(*given: object) -> object:
        nonlocal took
        with told_to(answer.answer, clock), Work(clock):
            start = clock.now
            net = answer.answer(*given)
            took = (clock.now - start) / step
        return net

    short, long = tasks
    for task, steps, speed in (
        (short, 1, slow),
        (short, FEW, slow * STEPS / FEW),
        (long, STEPS, slow),
    ):
        clock, budget = _Machine(speed), steps * step * speed
        where = f"{budget:.3g} s were allowed, about {steps} step{'s' if steps > 1 else ''}"
        net = Probe(timed)(*task, budget)
        if not isinstance(net, nn.Module):
            raise Wrong(f"a network was expected; you returned {said(net)}.")
        if took > 1.1 * steps + 6:
            raise Wrong(
                f"{where}, and your function took as long as {took:.0f}. Look at the clock inside"
                " the loop."
            )
        if took < 0.75 * steps - 1:
            raise Wrong(
                f"{where}, and your function took as long as {took:.0f}. Time that is left over is"
                " accuracy left over: use three quarters of it at least."
            )
        if any(m.training for m in net.modules()):
            raise Wrong(
                "the network came back in train mode: an image's answer would depend on its"
                " neighbours. Call eval()."
            )
    return net, took / STEPS


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
