"""Answers to chapter 07's exercises."""

import math
from fractions import Fraction

import numpy as np
import torch

from answers import right, wrong


@right("07.A", "fractions, a list")
def in_fractions(x, e, m):
    lowest = 2 - 2 ** (e - 1)
    exponent = lowest
    while Fraction(2) ** (exponent + 1) <= Fraction(x):
        exponent += 1
    return [Fraction(2) ** lowest, Fraction(2) ** (exponent - m)]


@right("07.A", "NumPy's frexp, tensors")
def by_numpy(x, e, m):
    lowest = 2 - 2 ** (e - 1)
    exponent = max(int(np.frexp(x)[1]) - 1, lowest)
    return torch.tensor(2.0**lowest), torch.tensor(2.0**exponent) / 2**m


def _ruler(bias=lambda e: 2 ** (e - 1) - 1, exponent=None, ulp=lambda p, m: 2.0 ** (p - m)):
    def ruler(x, e, m):
        lowest = 1 - bias(e)
        found = exponent(x, lowest) if exponent else max(math.frexp(x)[1] - 1, lowest)
        return 2.0**lowest, ulp(found, m)

    return ruler


wrong("07.A", "the bias one too large")(_ruler(bias=lambda e: 2 ** (e - 1)))
wrong("07.A", "the bias of an integer of e bits")(_ruler(bias=lambda e: 2**e - 1))
wrong("07.A", "frexp's exponent, one too large")(
    _ruler(exponent=lambda x, lowest: max(math.frexp(x)[1], lowest))
)
wrong("07.A", "subnormals as if they were normal")(
    _ruler(exponent=lambda x, lowest: math.frexp(x)[1] - 1)
)
wrong("07.A", "rounded to the next exponent")(
    _ruler(exponent=lambda x, lowest: max(round(math.log2(x)), lowest))
)
wrong("07.A", "always fp16's mantissa")(_ruler(ulp=lambda p, m: 2.0 ** (p - 10)))
wrong("07.A", "half of the distance")(_ruler(ulp=lambda p, m: 2.0 ** (p - m - 1)))
wrong("07.A", "the smallest subnormal in place of the smallest normal")(
    lambda x, e, m: (2.0 ** (2 - 2 ** (e - 1) - m), _ruler()(x, e, m)[1])
)
wrong("07.A", "relative to x")(lambda x, e, m: (_ruler()(x, e, m)[0], x * 2.0**-m))
wrong("07.A", "exchanged")(lambda x, e, m: _ruler()(x, e, m)[::-1])
wrong("07.A", "one number")(lambda x, e, m: _ruler()(x, e, m)[1])


class Scaler:
    """The right one; the wrong ones change one method."""

    def __init__(self, scale, growth, backoff, interval):
        self.scale, self.growth, self.backoff, self.interval = scale, growth, backoff, interval
        self.good, self.finite = 0, {}

    def scaled(self, loss):
        return loss * self.scale

    def gradients(self, optimizer):
        every = [p.grad for group in optimizer.param_groups for p in group["params"]]
        return [g for g in every if g is not None]

    def is_finite(self, gradients):
        return all(bool(g.isfinite().all()) for g in gradients)

    def unscale(self, optimizer):
        if id(optimizer) in self.finite:
            raise RuntimeError("unscaled already")
        found = self.gradients(optimizer)
        for g in found:
            g /= self.scale
        self.finite[id(optimizer)] = self.is_finite(found)

    def step(self, optimizer):
        if id(optimizer) not in self.finite:
            self.unscale(optimizer)
        if self.finite[id(optimizer)]:
            optimizer.step()
        return self.finite[id(optimizer)]

    def update(self):
        fine = all(self.finite.values())
        self.good = self.good + 1 if fine else 0
        if not fine:
            self.scale *= self.backoff
        elif self.good == self.interval:
            self.scale, self.good = self.scale * self.growth, 0
        self.finite = {}


@right("07.B", "torch's own scaler inside")
class Wrapped:
    def __init__(self, scale, growth, backoff, interval):
        options = {"growth_factor": growth, "backoff_factor": backoff, "growth_interval": interval}
        self.inner = torch.amp.GradScaler("cpu", init_scale=scale, **options)

    @property
    def scale(self):
        return self.inner.get_scale()

    def scaled(self, loss):
        return self.inner.scale(loss)

    def unscale(self, optimizer):
        self.inner.unscale_(optimizer)

    def step(self, optimizer):
        done = [False]
        hook = optimizer.register_step_pre_hook(lambda *_: done.__setitem__(0, True))
        self.inner.step(optimizer)
        hook.remove()
        return np.bool_(done[0])

    def update(self):
        self.inner.update()


@right("07.B", "new gradients in place of changed ones, a scale that is a 0-d tensor")
class Replaced(Scaler):
    def __init__(self, scale, growth, backoff, interval):
        super().__init__(torch.tensor(float(scale)), growth, backoff, interval)

    def unscale(self, optimizer):
        if id(optimizer) in self.finite:
            raise RuntimeError("unscaled already")
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for p in parameters:
            p.grad = None if p.grad is None else p.grad / self.scale
        self.finite[id(optimizer)] = self.is_finite(
            [p.grad for p in parameters if p.grad is not None]
        )


@right("07.B", "two sets, and a count that runs down")
class Sets:
    def __init__(self, scale, growth, backoff, interval):
        self.scale, self.factors, self.interval = np.float64(scale), (backoff, growth), interval
        self.seen, self.bad, self.left = set(), set(), interval

    def scaled(self, loss):
        return float(self.scale) * loss

    def unscale(self, optimizer):
        if optimizer in self.seen:
            raise RuntimeError("a second time")
        self.seen.add(optimizer)
        for parameter in (p for g in optimizer.param_groups for p in g["params"]):
            if parameter.grad is not None:
                parameter.grad.mul_(1 / float(self.scale))
                if not np.isfinite(parameter.grad.numpy()).all():
                    self.bad.add(optimizer)

    def step(self, optimizer):
        if optimizer not in self.seen:
            self.unscale(optimizer)
        if optimizer in self.bad:
            return 0
        optimizer.step()
        return 1

    def update(self):
        self.left = self.interval if self.bad else self.left - 1
        if self.bad or not self.left:
            self.scale, self.left = self.scale * self.factors[not self.bad], self.interval
        self.seen, self.bad = set(), set()


@wrong("07.B", "growth and back-off of 2 and a half, whatever is given")
class HardCoded(Scaler):
    def __init__(self, scale, growth, backoff, interval):
        super().__init__(scale, 2.0, 0.5, interval)


@wrong("07.B", "the back-off is one over the growth")
class OneArgument(Scaler):
    def __init__(self, scale, growth, backoff, interval):
        super().__init__(scale, growth, 1 / growth, interval)


@wrong("07.B", "infinities are looked for at the step")
class AsksLate(Scaler):
    def step(self, optimizer):
        if id(optimizer) not in self.finite:
            self.unscale(optimizer)
        self.finite[id(optimizer)] = self.is_finite(self.gradients(optimizer))
        if self.finite[id(optimizer)]:
            optimizer.step()
        return self.finite[id(optimizer)]


@wrong("07.B", "unscale is allowed again after step")
class ForgetsAtStep(Scaler):
    def __init__(self, *given):
        super().__init__(*given)
        self.seen = []

    def step(self, optimizer):
        done = super().step(optimizer)
        self.seen.append(self.finite.pop(id(optimizer)))
        return done

    def update(self):
        self.finite, self.seen = dict(enumerate(self.seen)), []
        super().update()


@wrong("07.B", "the sum of squares is finite")
class BySquares(Scaler):
    def is_finite(self, gradients):
        return math.isfinite(sum(float(g.square().sum()) for g in gradients))


@wrong("07.B", "no NaN is good enough")
class NoNan(Scaler):
    def is_finite(self, gradients):
        return not any(bool(g.isnan().any()) for g in gradients)


@wrong("07.B", "the first group alone")
class FirstGroup(Scaler):
    def gradients(self, optimizer):
        return [p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None]


@wrong("07.B", "the first parameter alone")
class FirstParameter(Scaler):
    def is_finite(self, gradients):
        return super().is_finite(gradients[:1])


@wrong("07.B", "one bad optimizer stops the other")
class AllOrNothing(Scaler):
    def step(self, optimizer):
        if id(optimizer) not in self.finite:
            self.unscale(optimizer)
        if all(self.finite.values()):
            optimizer.step()
        return all(self.finite.values())


@wrong("07.B", "the count of good updates is kept over a bad one")
class KeepsCounting(Scaler):
    def update(self):
        good, bad = self.good, not all(self.finite.values())
        super().update()
        self.good = good if bad else self.good


@wrong("07.B", "it grows one update late")
class GrowsLate(Scaler):
    def __init__(self, scale, growth, backoff, interval):
        super().__init__(scale, growth, backoff, interval + 1)


@wrong("07.B", "the scale never falls below 1,000")
class Floor(Scaler):
    def update(self):
        super().update()
        self.scale = max(self.scale, 1000.0)


def _keep(
    start=2.0**16,
    every=8,
    growth=2.0,
    back=0.5,
    look=torch.isfinite,
    true=True,
    clear=True,
    finite=lambda gradients: all(bool(g.isfinite().all()) for g in gradients),
    dtype=torch.float16,
    steps=1,
):
    def keep_alive(model, batches, optimizer, loss_of):
        scale, good = start, 0
        for x, y in batches:
            if clear:
                optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = loss_of(model, x, y)
            if not look(loss):
                continue
            (loss * scale).backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            for g in gradients:
                g /= scale if true else 1.0
            if finite(gradients):
                for _ in range(steps):
                    optimizer.step()
                good += 1
                if good == every:
                    scale, good = growth * scale, 0
            else:
                scale, good = scale * back, 0

    return keep_alive


right("07.C", "slower growth by larger steps")(_keep(every=14, growth=4.0, back=0.25))
right("07.C", "from 1 upwards")(_keep(start=1.0, every=6))
right("07.C", "from far too high")(_keep(start=2.0**24, every=10))

for _power in (0, 8, 16, 24):
    wrong("07.C", f"a scale of 2 to the {_power}, for ever")(
        _keep(start=2.0**_power, every=0, back=1.0)
    )
wrong("07.C", "it never grows")(_keep(every=0))
wrong("07.C", "it never backs off")(_keep(back=1.0))
wrong("07.C", "it grows after each step")(_keep(every=1))
wrong("07.C", "it grows after a hundred steps")(_keep(every=100))
wrong("07.C", "a broken loss backs off")(_keep(look=lambda loss: True))
wrong("07.C", "a NaN loss is let through")(_keep(look=lambda loss: not torch.isinf(loss)))
wrong("07.C", "an infinite loss is let through")(_keep(look=lambda loss: not torch.isnan(loss)))
wrong("07.C", "the gradients are never made true")(_keep(true=False))
wrong("07.C", "gradients are not looked at")(_keep(finite=lambda gradients: True))
wrong("07.C", "gradients add up over the batches")(_keep(clear=False))
wrong("07.C", "bf16")(_keep(dtype=torch.bfloat16))
wrong("07.C", "two steps a batch")(_keep(steps=2))


@wrong("07.C", "torch's scaler, and no look at the loss")
def stock(model, batches, optimizer, loss_of):
    scaler = torch.amp.GradScaler("cpu", growth_interval=8)
    for x, y in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of(model, x, y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


@wrong("07.C", "the loss in fp16, the update from a second pass in fp32")
def two_passes(model, batches, optimizer, loss_of):
    for x, y in batches:
        with torch.autocast("cpu", dtype=torch.float16):
            loss_of(model, x, y)
        loss = loss_of(model, x, y)
        optimizer.zero_grad()
        if torch.isfinite(loss):
            loss.backward()
            optimizer.step()


@wrong("07.C", "nothing is done")
def nothing(model, batches, optimizer, loss_of):
    return None
