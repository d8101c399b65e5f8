"""Wrong answers to chapter 07's exercises, by somebody who has read only their texts."""

import math

import torch

from answers import wrong

# ---- A


def _ruler(exponent, e, m):
    return 2.0 ** (2 - 2 ** (e - 1)), 2.0 ** (exponent - m)


@wrong("07.A", "read only: no end to the spacing below the smallest normal number")
def no_subnormals(x, e, m):
    return _ruler(math.frexp(x)[1] - 1, e, m)


@wrong("07.A", "read only: the logarithm, which rounds up just below a power of two")
def logarithm(x, e, m):
    return _ruler(max(math.floor(math.log2(x)), 2 - 2 ** (e - 1)), e, m)


@wrong("07.A", "read only: the natural logarithm's ratio, off at powers of two like 2**-29")
def ratio_of_logarithms(x, e, m):
    return _ruler(max(math.floor(math.log(x) / math.log(2)), 2 - 2 ** (e - 1)), e, m)


@wrong("07.A", "read only: frexp's exponent, twice too large")
def frexp(x, e, m):
    return _ruler(max(math.frexp(x)[1], 2 - 2 ** (e - 1)), e, m)


@wrong("07.A", "read only: towards zero, wrong below 1")
def towards_zero(x, e, m):
    return _ruler(max(int(math.log2(x)), 2 - 2 ** (e - 1)), e, m)


@wrong("07.A", "read only: rounded to the nearest power")
def nearest(x, e, m):
    return _ruler(max(round(math.log2(x)), 2 - 2 ** (e - 1)), e, m)


@wrong("07.A", "read only: rounded up, right for powers of two")
def rounded_up(x, e, m):
    return _ruler(max(math.ceil(math.log2(x)), 2 - 2 ** (e - 1)), e, m)


@wrong("07.A", "read only: subnormals one power finer than they are")
def one_power_finer(x, e, m):
    return _ruler(max(math.frexp(x)[1] - 1, 1 - 2 ** (e - 1)), e, m)


@wrong("07.A", "read only: subnormals end at fp16's -14 for every format")
def fp16_end(x, e, m):
    return _ruler(max(math.frexp(x)[1] - 1, -14), e, m)


@wrong("07.A", "read only: the end is the smallest subnormal's exponent")
def smallest_subnormal(x, e, m):
    return _ruler(max(math.frexp(x)[1] - 1, 2 - 2 ** (e - 1) - m), e, m)


@wrong("07.A", "read only: at a power of two the smaller spacing below it")
def below_the_power(x, e, m):
    fraction, exponent = math.frexp(x)
    power = exponent - 2 if fraction == 0.5 and x > 4 else exponent - 1
    return _ruler(max(power, 2 - 2 ** (e - 1)), e, m)


@wrong("07.A", "read only: the spacing is never wider than at 2")
def never_above_two(x, e, m):
    return _ruler(min(1, max(math.frexp(x)[1] - 1, 2 - 2 ** (e - 1))), e, m)


@wrong("07.A", "read only: 0 where x lies below the smallest normal number")
def flushed(x, e, m):
    power = math.frexp(x)[1] - 1
    return _ruler(power if power >= 2 - 2 ** (e - 1) else -math.inf, e, m)


# ---- B


class _Scaler:
    """A right scaler, as far as the text tells, for the wrong ones to spoil."""

    def __init__(self, scale, growth, backoff, interval):
        self.scale, self.growth, self.backoff = scale, growth, backoff
        self.interval, self.good, self.seen = interval, 0, {}

    def _grads(self, optimizer):
        return [
            p.grad
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]

    def _finite(self, grads):
        return all(bool(torch.isfinite(g).all()) for g in grads)

    def scaled(self, loss):
        return loss * self.scale

    def unscale(self, optimizer):
        if id(optimizer) in self.seen:
            raise RuntimeError("unscaled already")
        grads = self._grads(optimizer)
        for g in grads:
            g.div_(self.scale)
        self.seen[id(optimizer)] = self._finite(grads)

    def step(self, optimizer):
        if id(optimizer) not in self.seen:
            self.unscale(optimizer)
        if self.seen[id(optimizer)]:
            optimizer.step()
        return self.seen[id(optimizer)]

    def update(self):
        if not all(self.seen.values()):
            self.scale *= self.backoff
            self.good = 0
        else:
            self.good += 1
            if self.good == self.interval:
                self.scale *= self.growth
                self.good = 0
        self.seen = {}


@wrong("07.B", "read only: grows by 2 and backs off by a half, whatever is given")
class TwoAndHalf(_Scaler):
    def __init__(self, scale, growth, backoff, interval):
        super().__init__(scale, 2.0, 0.5, interval)


@wrong("07.B", "read only: grows one update late")
class OneLate(_Scaler):
    def __init__(self, scale, growth, backoff, interval):
        super().__init__(scale, growth, backoff, interval + 1)


@wrong("07.B", "read only: after the first growth it grows with every update")
class NoNewCount(_Scaler):
    def update(self):
        if not all(self.seen.values()):
            self.scale *= self.backoff
            self.good = 0
        else:
            self.good += 1
            if self.good >= self.interval:
                self.scale *= self.growth
        self.seen = {}


@wrong("07.B", "read only: an infinity does not start the count anew")
class CountGoesOn(_Scaler):
    def update(self):
        good = self.good
        bad = not all(self.seen.values())
        super().update()
        if bad:
            self.good = good


@wrong("07.B", "read only: an infinity takes one off the count only")
class OneOff(_Scaler):
    def update(self):
        good = self.good
        bad = not all(self.seen.values())
        super().update()
        if bad:
            self.good = max(0, good - 1)


@wrong("07.B", "read only: a second unscale is passed over silently")
class SilentTwice(_Scaler):
    def unscale(self, optimizer):
        if id(optimizer) not in self.seen:
            super().unscale(optimizer)


@wrong("07.B", "read only: a second unscale divides again")
class DividesAgain(_Scaler):
    def unscale(self, optimizer):
        self.seen.pop(id(optimizer), None)
        super().unscale(optimizer)


@wrong("07.B", "read only: one flag for all optimizers, unscale of the second raises")
class OneFlag(_Scaler):
    def unscale(self, optimizer):
        if self.seen:
            raise RuntimeError("unscaled already")
        super().unscale(optimizer)


@wrong("07.B", "read only: unscale never raises after a step, as the step forgets")
class StepForgets(_Scaler):
    def step(self, optimizer):
        stepped = super().step(optimizer)
        if stepped:
            del self.seen[id(optimizer)]
        return stepped


@wrong("07.B", "read only: one optimizer's infinity holds back the others, too")
class HoldsBack(_Scaler):
    def step(self, optimizer):
        if id(optimizer) not in self.seen:
            self.unscale(optimizer)
        good = all(self.seen.values())
        if good:
            optimizer.step()
        return good


@wrong("07.B", "read only: only the last optimizer's infinity counts in update")
class LastOnly(_Scaler):
    def update(self):
        self.seen = dict(list(self.seen.items())[-1:])
        super().update()


@wrong("07.B", "read only: backs off only if all optimizers saw an infinity")
class AllOfThem(_Scaler):
    def update(self):
        bad = bool(self.seen) and not any(self.seen.values())
        self.seen = {0: not bad}
        super().update()


@wrong("07.B", "read only: backs off once for each optimizer with an infinity")
class EachOfThem(_Scaler):
    def update(self):
        more = sum(not good for good in self.seen.values()) - 1
        super().update()
        if more > 0:
            self.scale *= self.backoff**more


@wrong("07.B", "read only: a NaN is not an infinity")
class InfinitiesOnly(_Scaler):
    def _finite(self, grads):
        return not any(bool(torch.isinf(g).any()) for g in grads)


@wrong("07.B", "read only: minus infinity passes")
class PlusOnly(_Scaler):
    def _finite(self, grads):
        return not any(bool((torch.isposinf(g) | torch.isnan(g)).any()) for g in grads)


@wrong("07.B", "read only: looks at the sum of squares, which overflows for large gradients")
class SumOfSquares(_Scaler):
    def _finite(self, grads):
        return all(math.isfinite(float(g.square().sum())) for g in grads)


@wrong("07.B", "read only: the first parameter's gradient alone is looked at")
class FirstOnly(_Scaler):
    def _finite(self, grads):
        return super()._finite(grads[:1])


@wrong("07.B", "read only: the first parameter group alone")
class FirstGroup(_Scaler):
    def _grads(self, optimizer):
        return [p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None]


@wrong("07.B", "read only: a gradient must be there")
class NoNone(_Scaler):
    def _grads(self, optimizer):
        return [p.grad for group in optimizer.param_groups for p in group["params"]]


@wrong("07.B", "read only: step says nothing")
class SaysNothing(_Scaler):
    def step(self, optimizer):
        super().step(optimizer)


@wrong("07.B", "read only: step does not unscale by itself")
class NoUnscale(_Scaler):
    def step(self, optimizer):
        if id(optimizer) not in self.seen:
            self.seen[id(optimizer)] = self._finite(self._grads(optimizer))
        return super().step(optimizer)


@wrong("07.B", "read only: infinities become zeros and it steps all the same")
class ZeroesThem(_Scaler):
    def step(self, optimizer):
        if id(optimizer) not in self.seen:
            self.unscale(optimizer)
        for g in self._grads(optimizer):
            torch.nan_to_num_(g, nan=0.0, posinf=0.0, neginf=0.0)
        optimizer.step()
        return True


@wrong("07.B", "read only: unscale divides by the scale of the beginning")
class FirstScale(_Scaler):
    def __init__(self, scale, growth, backoff, interval):
        super().__init__(scale, growth, backoff, interval)
        self.first = scale

    def unscale(self, optimizer):
        super().unscale(optimizer)
        for g in self._grads(optimizer):
            g.mul_(self.scale / self.first)


@wrong("07.B", "read only: an update with one optimizer alone is not counted")
class TwoAtLeast(_Scaler):
    def update(self):
        if all(self.seen.values()) and len(self.seen) < 2:
            self.seen = {}
            return
        super().update()


# ---- C


def _alive(
    model,
    batches,
    optimizer,
    loss_of,
    *,
    scale=1024.0,
    find=True,
    once=False,
    autocast=True,
    check=True,
    unscale=True,
    grow=0,
    halve_always=False,
    clip=None,
    tries=30,
    top=2.0**40,
):
    """A loop with its switches; as it stands it searches a scale for each batch."""
    calm = 0
    for x, y in batches:
        for _ in range(tries):
            optimizer.zero_grad()
            with torch.autocast(x.device.type, torch.float16, enabled=autocast):
                loss = loss_of(model, x, y)
            broken = not bool(torch.isfinite(loss.detach()).all())
            if broken and check and not halve_always:
                break
            (loss.float() * scale).backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            finite = all(bool(torch.isfinite(g).all()) for g in grads)
            if not finite and check:
                scale, calm = max(scale / 2, 2.0**-40), 0
                if find and not broken:
                    continue
                break
            if unscale:
                for g in grads:
                    g.div_(scale)
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            calm += 1
            if grow and calm >= grow:
                scale, calm = min(scale * 2, top), 0
            break


@wrong("07.C", "read only: one scale of 1024 for the whole run, never changed")
def one_scale(model, batches, optimizer, loss_of):
    _alive(model, batches, optimizer, loss_of, find=False)


@wrong("07.C", "read only: only ever down, never up again")
def only_down(model, batches, optimizer, loss_of):
    _alive(model, batches, optimizer, loss_of, scale=2.0**16)


@wrong("07.C", "read only: the stock scaler, halves at each broken batch and grows after 2000")
def stock(model, batches, optimizer, loss_of):
    options = {"scale": 2.0**16, "find": False, "halve_always": True, "grow": 2000}
    _alive(model, batches, optimizer, loss_of, **options)


@wrong("07.C", "read only: trains in fp32, no autocast")
def full_precision(model, batches, optimizer, loss_of):
    _alive(model, batches, optimizer, loss_of, scale=1.0, autocast=False)


@wrong("07.C", "read only: no scale at all")
def no_scale(model, batches, optimizer, loss_of):
    _alive(model, batches, optimizer, loss_of, scale=1.0)


@wrong("07.C", "read only: the gradients stay scaled")
def stay_scaled(model, batches, optimizer, loss_of):
    _alive(model, batches, optimizer, loss_of, unscale=False, grow=5)


@wrong("07.C", "read only: a broken batch makes an update, too")
def broken_too(model, batches, optimizer, loss_of):
    _alive(model, batches, optimizer, loss_of, check=False)


@wrong("07.C", "read only: gradients clipped to a length of 0.01, not the true ones")
def clipped(model, batches, optimizer, loss_of):
    _alive(model, batches, optimizer, loss_of, grow=4, clip=0.01)


@wrong("07.C", "read only: a broken batch counts as an overflow, the scale falls in bursts")
def burst_falls(model, batches, optimizer, loss_of):
    options = {"scale": 2.0**16, "find": False, "halve_always": True, "grow": 40}
    _alive(model, batches, optimizer, loss_of, **options)


@wrong("07.C", "read only: goes over the list twice")
def twice(model, batches, optimizer, loss_of):
    _alive(model, batches, optimizer, loss_of, grow=4)
    _alive(model, batches, optimizer, loss_of, grow=4)


@wrong("07.C", "read only: the first half of the list only")
def first_half(model, batches, optimizer, loss_of):
    _alive(model, batches[: len(batches) // 2], optimizer, loss_of, grow=4)


@wrong("07.C", "read only: gives up at the first broken batch")
def gives_up(model, batches, optimizer, loss_of):
    good = []
    for x, y in batches:
        with torch.no_grad():
            if not bool(torch.isfinite(loss_of(model, x, y)).all()):
                break
        good.append((x, y))
    _alive(model, good, optimizer, loss_of, grow=4)


@wrong("07.C", "read only: the model itself becomes fp16")
def half_model(model, batches, optimizer, loss_of):
    model.half()
    _alive(model, batches, optimizer, loss_of, grow=4)


@wrong("07.C", "read only: broken gradients become zeros, and momentum steps on")
def zeros_step(model, batches, optimizer, loss_of):
    scale = 1024.0
    for x, y in batches:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.float16):
            loss = loss_of(model, x, y)
        (loss.float() * scale).backward()
        for p in model.parameters():
            if p.grad is not None:
                torch.nan_to_num_(p.grad, nan=0.0, posinf=0.0, neginf=0.0).div_(scale)
        optimizer.step()


@wrong("07.C", "read only: trains nothing")
def nothing(model, batches, optimizer, loss_of):
    return None
