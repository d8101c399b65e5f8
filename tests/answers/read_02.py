"""Wrong answers to chapter 02's exercises, by somebody who has read only their texts."""

import math
import time

import torch
from torch.nn import functional as F

from answers import wrong
from course_utils import models

# ---- A


@wrong("02.A", "read only: mean and deviation of x, not of the training images")
def of_x(train, x):
    mean, std = x.float().mean(), x.float().std(correction=0)
    return (x.float() - mean) / (std if std > 0 else 1.0)


@wrong("02.A", "read only: one mean a pixel, not one over all")
def per_pixel(train, x):
    mean, std = train.float().mean(0), train.float().std(0, correction=0)
    return (x.float() - mean) / std.clamp(min=1e-6)


@wrong("02.A", "read only: the deviation over n - 1")
def unbiased(train, x):
    mean, std = train.float().mean(), train.float().std()
    return (x.float() - mean) / (std if std > 0 else 1.0)


@wrong("02.A", "read only: no care for equal pixels")
def no_guard(train, x):
    mean, std = train.float().mean(), train.float().std(correction=0)
    return (x.float() - mean) / std


@wrong("02.A", "read only: a deviation below 1 becomes 1, wrong for nearly black images")
def at_least_one(train, x):
    mean, std = train.float().mean(), train.float().std(correction=0).clamp(min=1)
    return (x.float() - mean) / std


@wrong("02.A", "read only: 1 added to the deviation")
def one_added(train, x):
    mean, std = train.float().mean(), train.float().std(correction=0) + 1
    return (x.float() - mean) / std


@wrong("02.A", "read only: squares in uint8, which wrap around")
def wrapped_squares(train, x):
    mean = train.float().mean()
    std = ((train * train).float().mean() - mean**2).clamp(min=1e-6).sqrt()
    return (x.float() - mean) / std


@wrong("02.A", "read only: the variance instead of the deviation")
def variance(train, x):
    mean, std = train.float().mean(), train.float().var(correction=0)
    return (x.float() - mean) / (std if std > 0 else 1.0)


@wrong("02.A", "read only: the constants of the example")
def constants(train, x):
    mean, std = 127.5, 127.5
    return (x.float() - mean) / std


@wrong("02.A", "read only: the mean of each image's deviation, blind for bright and dark ones")
def mean_of_deviations(train, x):
    mean = train.float().mean()
    std = train.float().reshape(len(train), -1).std(1, correction=0).mean()
    return (x.float() - mean) / (std if std > 0 else 1.0)


@wrong("02.A", "read only: remembers the first training images that it saw")
def remembers(train, x, seen=[]):  # noqa: B006
    if not seen:
        std = train.float().std(correction=0)
        seen.append((train.float().mean(), std if std > 0 else 1.0))
    mean, std = seen[0]
    return (x.float() - mean) / std


@wrong("02.A", "read only: only the first hundred training images")
def first_hundred(train, x):
    mean, std = train[:100].float().mean(), train[:100].float().std(correction=0)
    return (x.float() - mean) / (std if std > 0 else 1.0)


# ---- B


def _cosine(a, b, u):
    return b + (a - b) / 2 * (1 + math.cos(math.pi * u))


def _cycle(step, total, max_lr, peak, *, first=None, last=None, end=None, curve=_cosine):
    first = max_lr / 25 if first is None else first
    last = first / 1e4 if last is None else last
    end = total - 1 if end is None else end
    if step <= peak:
        return curve(first, max_lr, step / peak if peak else 1.0)
    return curve(max_lr, last, (step - peak) / (end - peak))


@wrong("02.B", "read only: the peak one step later")
def later_peak(step, total, max_lr, warmup):
    return _cycle(step, total, max_lr, warmup * total)


@wrong("02.B", "read only: the peak on a whole step, rounded down")
def whole_peak(step, total, max_lr, warmup):
    return _cycle(step, total, max_lr, int(warmup * total) - 1)


@wrong("02.B", "read only: the peak at the warm-up's share of the last step")
def share_of_last(step, total, max_lr, warmup):
    return _cycle(step, total, max_lr, warmup * (total - 1))


@wrong("02.B", "read only: the lowest rate is max_lr / 10,000")
def of_the_top(step, total, max_lr, warmup):
    return _cycle(step, total, max_lr, warmup * total - 1, last=max_lr / 1e4)


@wrong("02.B", "read only: falls to nothing")
def to_nothing(step, total, max_lr, warmup):
    return _cycle(step, total, max_lr, warmup * total - 1, last=0.0)


@wrong("02.B", "read only: would reach the lowest rate one step after the last")
def one_after(step, total, max_lr, warmup):
    return _cycle(step, total, max_lr, warmup * total - 1, end=total)


@wrong("02.B", "read only: straight lines")
def straight(step, total, max_lr, warmup):
    return _cycle(step, total, max_lr, warmup * total - 1, curve=lambda a, b, u: a + (b - a) * u)


@wrong("02.B", "read only: rises along a line, falls along half a cosine")
def straight_rise(step, total, max_lr, warmup):
    peak = warmup * total - 1
    if step <= peak:
        return max_lr / 25 + (max_lr - max_lr / 25) * step / peak
    return _cycle(step, total, max_lr, peak)


@wrong("02.B", "read only: falls back to the first rate only")
def back_to_first(step, total, max_lr, warmup):
    return _cycle(step, total, max_lr, warmup * total - 1, last=max_lr / 25)


@wrong("02.B", "read only: the warm-up is always 0.3")
def always_three_tenths(step, total, max_lr, warmup):
    return _cycle(step, total, max_lr, 0.3 * total - 1)


@wrong("02.B", "read only: rounded to six digits, small rates go wrong")
def six_digits(step, total, max_lr, warmup):
    return round(_cycle(step, total, max_lr, warmup * total - 1), 6)


@wrong("02.B", "read only: starts at 0.04 whatever max_lr is")
def always_004(step, total, max_lr, warmup):
    return _cycle(step, total, max_lr, warmup * total - 1, first=0.04)


@wrong("02.B", "read only: the first step after the peak is still at the top")
def late_fall(step, total, max_lr, warmup):
    peak = warmup * total - 1
    return max_lr if peak < step < peak + 1 else _cycle(step, total, max_lr, peak)


# ---- C


def _train(images, labels, steps, late, *, first=None, prepare=models.normalise, every=1):
    """A plain training loop; `late()` says when to stop."""
    torch.manual_seed(0)
    net = models.mini_resnet(8, seed=0).train()
    x = prepare(images[:first])
    y = labels[:first].long()
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    for step in range(steps):
        if step % every == 0 and late():
            break
        pick = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(net(x[pick]), y[pick]).backward()
        optimizer.step()
    return net.eval()


def _clock(seconds, share=0.93):
    start = time.perf_counter()
    return lambda: time.perf_counter() - start > share * seconds


@wrong("02.C", "read only: always a hundred steps, the seconds are ignored")
def hundred_steps(images, labels, seconds):
    return _train(images, labels, 100, lambda: False)


@wrong("02.C", "read only: uses a third of the time")
def a_third(images, labels, seconds):
    return _train(images, labels, 300, _clock(seconds, 0.33))


@wrong("02.C", "read only: looks at the clock every 20 steps")
def every_twenty(images, labels, seconds):
    return _train(images, labels, 300, _clock(seconds), every=20)


@wrong("02.C", "read only: left in train mode")
def train_mode(images, labels, seconds):
    return _train(images, labels, 300, _clock(seconds, 0.85)).train()


@wrong("02.C", "read only: learns on unnormalised pixels")
def unnormalised(images, labels, seconds):
    return _train(images, labels, 300, _clock(seconds, 0.85), prepare=lambda p: p.float() / 255)


@wrong("02.C", "read only: learns the first 64 images only")
def first_64(images, labels, seconds):
    return _train(images, labels, 300, _clock(seconds, 0.85), first=64)


@wrong("02.C", "read only: learns nothing")
def untrained(images, labels, seconds):
    return models.mini_resnet(8, seed=0).eval()


@wrong("02.C", "read only: images and labels shuffled apart")
def shuffled_apart(images, labels, seconds):
    mixed = labels[torch.randperm(len(labels))]
    return _train(images, mixed, 300, _clock(seconds, 0.85))


@wrong("02.C", "read only: turns the images upside down at training, the unseen ones are not")
def upside_down(images, labels, seconds):
    return _train(images.flip(2), labels, 300, _clock(seconds, 0.85))


@wrong("02.C", "read only: counts ten steps beforehand and then does not look at the clock")
def ten_to_measure(images, labels, seconds):
    start = time.perf_counter()
    _train(images, labels, 10, lambda: False)
    each = (time.perf_counter() - start) / 10
    return _train(images, labels, min(300, int(seconds / max(each, 1e-6))), lambda: False)
