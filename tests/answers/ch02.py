"""Answers to the exercises of chapter 02."""

import math
import time
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from answers import right, wrong
from course_utils import data, models, training


@right("02.A", "NumPy, in 64 bits")
def in_numpy(train, x):
    mean, std = train.numpy().mean(), train.numpy().std()
    return (x.numpy() - mean) / (std or 1.0)


@right("02.A", "pixels from 0 to 1 first, and a small number against division by zero")
def unit_pixels(train, x):
    train, x = train.float() / 255, x.float() / 255
    return (x - train.mean()) / (train.std(correction=0) + 1e-7)


@right("02.A", "the mean square less the square of the mean")
def by_squares(train, x):
    pixels = train.float()
    mean = pixels.mean()
    variance = (pixels**2).mean() - mean**2
    return (x.float() - mean) / variance.clamp(min=1e-4).sqrt()


def _map(mean=lambda t: t.mean(), std=lambda t: t.std(correction=0)):
    def standardise(train, x):
        t = train.float()
        s = std(t)
        return (x.float() - mean(t)) / torch.where(s > 0, s, torch.ones_like(s))

    return standardise


wrong("02.A", "the deviation of a sample")(_map(std=lambda t: t.std()))
wrong("02.A", "the variance")(_map(std=lambda t: t.var(correction=0)))
wrong("02.A", "the median")(_map(mean=lambda t: t.median()))
wrong("02.A", "the middle of the range")(_map(mean=lambda t: (t.max() + t.min()) / 2))
wrong("02.A", "half the range for the deviation")(_map(std=lambda t: (t.max() - t.min()) / 2))
wrong("02.A", "a mean a channel")(_map(mean=lambda t: t.mean((0, 2, 3), keepdim=True)))
wrong("02.A", "a mean a pixel")(_map(mean=lambda t: t.mean(0, keepdim=True)))
wrong("02.A", "the mean absolute deviation")(_map(std=lambda t: (t - t.mean()).abs().mean()))
wrong("02.A", "the mean is added")(_map(mean=lambda t: -t.mean()))
wrong("02.A", "one more than the deviation")(lambda t, x: _map(std=lambda v: v.std() + 1)(t, x))
wrong("02.A", "the statistics of x")(lambda t, x: _map()(x, x))
wrong("02.A", "the deviation of x")(
    lambda t, x: (x.float() - t.float().mean()) / (x.float().std(correction=0) + 1e-6)
)
wrong("02.A", "this course's mean and deviation")(lambda t, x: models.normalise(x))
wrong("02.A", "0 to 1")(lambda t, x: x.float() / 255)
wrong("02.A", "NaN for equal pixels")(
    lambda t, x: (x.float() - t.float().mean()) / t.float().std(correction=0)
)
wrong("02.A", "cut off at three deviations")(lambda t, x: _map()(t, x).clamp(-3, 3))
wrong("02.A", "a large number against division by zero")(
    lambda t, x: (x.float() - t.float().mean()) / (t.float().std(correction=0) + 0.1)
)


@wrong("02.A", "of a list")
def a_list(train, x):
    return _map()(train, x).tolist()


def _half_cosine(a, b, u):
    return b + (a - b) / 2 * (1 + math.cos(math.pi * u))


@right("02.B", "torch's own schedule")
def with_torch(step, total, max_lr, warmup):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], max_lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr, total_steps=total, pct_start=warmup
    )
    for _ in range(step):
        optimizer.step()
        schedule.step()
    return schedule.get_last_lr()[0]


@right("02.B", "sines squared, in NumPy")
def with_sines(step, total, max_lr, warmup):
    start, peak = np.float64(max_lr) / 25, warmup * total - 1
    if step < peak:
        return start + (max_lr - start) * np.sin(np.pi / 2 * step / peak) ** 2
    rest = np.cos(np.pi / 2 * (step - peak) / (total - 1 - peak)) ** 2
    return np.array(start / 10_000 + (max_lr - start / 10_000) * rest)


@right("02.B", "a tensor of 32 bits")
def in_fp32(step, total, max_lr, warmup):
    peak = warmup * total - 1
    up = step <= peak
    u = torch.tensor(step / peak if up else (step - peak) / (total - 1 - peak))
    a, b = (max_lr / 25, max_lr) if up else (max_lr, max_lr / 250_000)
    return b + (a - b) / 2 * (1 + torch.cos(math.pi * u))


def _cycle(
    first=25, last=10_000, peak_at=lambda total, warmup: warmup * total - 1, shape=_half_cosine
):
    def one_cycle(step, total, max_lr, warmup):
        start, peak = max_lr / first, peak_at(total, warmup)
        if step <= peak:
            return shape(start, max_lr, step / peak)
        return shape(max_lr, start / last, (step - peak) / max(total - 1 - peak, 1e-9))

    return one_cycle


wrong("02.B", "straight lines")(_cycle(shape=lambda a, b, u: a + (b - a) * u))
wrong("02.B", "the peak one step late")(_cycle(peak_at=lambda total, warmup: warmup * total))
wrong("02.B", "the peak at a share of the last step")(
    _cycle(peak_at=lambda total, warmup: warmup * (total - 1))
)
wrong("02.B", "the peak rounded down")(
    _cycle(peak_at=lambda total, warmup: max(int(warmup * total) - 1, 0.1))
)
wrong("02.B", "the peak rounded")(
    _cycle(peak_at=lambda total, warmup: max(round(warmup * total - 1), 0.1))
)
wrong("02.B", "begins at a tenth")(_cycle(first=10))
wrong("02.B", "ends at the first rate over 1,000")(_cycle(last=1_000))
wrong("02.B", "ends at the highest over 10,000")(_cycle(last=400))
wrong("02.B", "ends at zero")(_cycle(last=math.inf))
wrong("02.B", "a quarter of a cosine")(
    _cycle(shape=lambda a, b, u: b + (a - b) * math.cos(math.pi / 2 * u))
)
wrong("02.B", "geometric")(_cycle(shape=lambda a, b, u: a * (b / a) ** u))
wrong("02.B", "the whole schedule")(
    lambda step, total, max_lr, warmup: [_cycle()(s, total, max_lr, warmup) for s in range(total)]
)
wrong("02.B", "a step late")(
    lambda step, total, max_lr, warmup: _cycle()(max(step - 1, 0), total, max_lr, warmup)
)
wrong("02.B", "counted from 1")(
    lambda step, total, max_lr, warmup: _cycle()(min(step + 1, total - 1), total, max_lr, warmup)
)
wrong("02.B", "max_lr is 1")(lambda step, total, max_lr, warmup: _cycle()(step, total, 1, warmup))


def _trainer(
    *,
    until=0.95,
    rate=lambda u: 0.2 * min(1, 5 * u + 0.1) * (1 - u),
    network=lambda: models.mini_resnet(8),
    momentum=0.25,
    clock=lambda: time.perf_counter(),
    end=lambda net: net.eval(),
    batch=64,
):
    def train_within(images, labels, seconds):
        start = clock()
        net = network()
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = momentum
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.8, nesterov=True)
        while (u := (clock() - start) / seconds) < until:
            optimizer.param_groups[0]["lr"] = rate(u)
            index = torch.randint(0, len(images), (batch,))
            loss = F.cross_entropy(net(models.normalise(images[index])), labels[index])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
        return end(net)

    return train_within


@right("02.C", "a clock imported by name, Adam and linear decay")
def with_adam(images, labels, seconds):
    start, net = perf_counter(), models.mini_resnet(8)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    x = models.normalise(images)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.3
    while (u := (perf_counter() - start) / seconds) < 0.93:
        optimizer.param_groups[0]["lr"] = 0.015 * (1 - u)
        index = torch.randperm(len(x))[:64]
        loss = F.cross_entropy(net(x[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


class Trainer:
    """The same, as an object that is called."""

    def __call__(self, images, labels, seconds):
        return _trainer(clock=lambda: time.monotonic_ns() / 1e9)(images, labels, seconds)


right("02.C", "an object that is called, and a clock in nanoseconds")(Trainer())

wrong("02.C", "half of the time")(_trainer(until=0.5))
wrong("02.C", "a tenth of the learning rate")(
    _trainer(rate=lambda u: 0.015 * min(1, 5 * u + 0.1) * (1 - u))
)
wrong("02.C", "a hundred times the learning rate")(_trainer(rate=lambda u: 15.0))
wrong("02.C", "twice the time")(_trainer(until=2.0))
wrong("02.C", "the network in train mode")(_trainer(end=lambda net: net.train()))
wrong("02.C", "one layer in train mode")(
    _trainer(end=lambda net: (net.eval(), net.stages[1].bn1.train())[0])
)
wrong("02.C", "the logits in place of the network")(_trainer(end=lambda net: net.state_dict()))
wrong("02.C", "no gradient step")(_trainer(rate=lambda u: 0.0))
wrong("02.C", "a large network: too few steps")(_trainer(network=lambda: models.mini_resnet(32)))
wrong("02.C", "the shipped network")(lambda images, labels, seconds: models.baseline())


def _without_running_averages(net):
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean = layer.running_var = None
    return net.eval()


wrong("02.C", "BatchNorm takes the batch's own averages in eval mode")(
    _trainer(end=_without_running_averages)
)


@wrong("02.C", "the course's data in place of the ones it gets")
def other_data(images, labels, seconds):
    return _trainer()(*data.fashion_mnist("train"), seconds)


@wrong("02.C", "the shipped network, and waits for the time to pass")
def waits(images, labels, seconds):
    time.sleep(0.9 * seconds)
    return models.baseline()


@wrong("02.C", "90 steps, without a look at the clock")
def blind(images, labels, seconds):
    net = models.mini_resnet(8).train()
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    for _ in range(90):
        index = torch.randint(0, len(images), (64,))
        loss = F.cross_entropy(net(models.normalise(images[index])), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@wrong("02.C", "one step in a short time, else 90")
def one_or_many(images, labels, seconds):
    net = models.mini_resnet(8).train()
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    for _ in range(90 if seconds > 0.1 else 1):
        index = torch.randint(0, len(images), (64,))
        loss = F.cross_entropy(net(models.normalise(images[index])), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@wrong("02.C", "a whole epoch between two looks at the clock")
def by_epochs(images, labels, seconds):
    start, net = time.perf_counter(), models.mini_resnet(8)
    recipe = training.Recipe(epochs=1, batch_size=64)
    while time.perf_counter() - start < seconds:
        training.fit(net, images, labels, recipe, progress=False)
    return net


@wrong("02.C", "every label one too high")
def shifted(images, labels, seconds):
    return _trainer()(images, (labels + 1) % 10, seconds)


@wrong("02.C", "no learning: the logits are the first pixels")
def no_learning(images, labels, seconds):
    time.sleep(0.9 * seconds)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).eval()
