"""Answers to chapter 11's exercises."""

from collections import Counter

import numpy as np
import torch

from answers import right, wrong


@right("11.A", "the difference of two counters")
def counters(before, after):
    return Counter(before) - Counter(after)


@right("11.A", "a loop that strikes out")
def strike_out(before, after):
    left, lost = list(after), {}
    for kind in before:
        if kind in left:
            left.remove(kind)
        else:
            lost[kind] = lost.get(kind, 0) + 1
    return lost


@right("11.A", "NumPy's integers")
def numpy_integers(before, after):
    lost = {k: np.sum(np.array(before) == k) - np.sum(np.array(after) == k) for k in set(before)}
    return {k: n for k, n in lost.items() if n > 0}


@wrong("11.A", "kinds of which none is gone stay with 0")
def with_zeros(before, after):
    a, b = Counter(before), Counter(after)
    return {k: max(a[k] - b[k], 0) for k in a}


@wrong("11.A", "what was added counts as negative")
def with_negatives(before, after):
    a, b = Counter(before), Counter(after)
    return {k: a[k] - b[k] for k in {*a, *b} if a[k] != b[k]}


@wrong("11.A", "only kinds that vanish altogether")
def vanished(before, after):
    return {k: n for k, n in Counter(before).items() if k not in after}


@wrong("11.A", "the distance, whichever way")
def distance(before, after):
    a, b = Counter(before), Counter(after)
    return {k: abs(a[k] - b[k]) for k in {*a, *b} if a[k] != b[k]}


@wrong("11.A", "a set of kinds")
def kinds_alone(before, after):
    return set(before) - set(after)


@wrong("11.A", "how many there were, of kinds that lost some")
def how_many_there_were(before, after):
    a, b = Counter(before), Counter(after)
    return {k: a[k] for k in a if a[k] > b[k]}


def _outputs(model, run, shape, batch, draw=torch.randn):
    x = draw(batch, *shape)
    with torch.no_grad():
        return model(x).numpy(), run(x.numpy())


@right("11.B", "numpy.allclose without its relative part")
def with_allclose(model, run, shape, batches, tolerance):
    for batch in batches:
        try:
            want, got = _outputs(model, run, shape, batch)
            np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * (1 + 1e-6))
        except Exception:
            return np.int64(batch)
        if got.shape != want.shape:
            return batch
    return None


@right("11.B", "uniform inputs, in torch")
def in_torch(model, run, shape, batches, tolerance):
    def bad(batch):
        x = torch.rand(batch, *shape) * 2 - 1
        try:
            got = torch.as_tensor(run(x.numpy()))
        except RuntimeError:
            return True
        with torch.no_grad():
            want = model(x)
        if got.shape != want.shape:
            return True
        return not bool(((got - want).abs() <= tolerance).all())

    return next((batch for batch in batches if bad(batch)), None)


def _first_bad(differs, draw=torch.randn, same_shape=True):
    """The right loop, with another comparison, or with other inputs."""

    def first_bad_batch(model, run, shape, batches, tolerance):
        for batch in batches:
            try:
                want, got = _outputs(model, run, shape, batch, draw)
                if (same_shape and got.shape != want.shape) or differs(got, want, tolerance):
                    return batch
            except Exception:
                return batch
        return None

    return first_bad_batch


def _far(got, want, tolerance):
    return not (np.abs(got - want) <= tolerance).all()


def _one_repeated(batch, *shape):
    return torch.randn(1, *shape).expand(batch, *shape).contiguous()


wrong("11.B", "NaN is not greater than the tolerance")(
    _first_bad(lambda got, want, t: (np.abs(got - want) > t).any())
)
wrong("11.B", "inputs of zeros")(_first_bad(_far, draw=torch.zeros))
wrong("11.B", "one input, repeated over the batch")(_first_bad(_far, draw=_one_repeated))
wrong("11.B", "a relative tolerance beside the absolute one")(
    _first_bad(lambda got, want, t: not np.allclose(got, want, atol=t))
)
wrong("11.B", "shapes that broadcast are compared")(_first_bad(_far, same_shape=False))
wrong("11.B", "the mean difference")(
    _first_bad(lambda got, want, t: not np.abs(got - want).mean() <= t)
)
wrong("11.B", "a signed difference")(_first_bad(lambda got, want, t: not (got - want <= t).all()))
wrong("11.B", "the classes agree")(
    _first_bad(lambda got, want, t: not (got.argmax(-1) == want.argmax(-1)).all())
)


@wrong("11.B", "the smallest bad batch in place of the first")
def smallest(model, run, shape, batches, tolerance):
    bad = [b for b in batches if in_torch(model, run, shape, [b], tolerance) is not None]
    return min(bad, default=None)


@wrong("11.B", "an exception that gets out")
def unprotected(model, run, shape, batches, tolerance):
    for batch in batches:
        want, got = _outputs(model, run, shape, batch)
        if got.shape != want.shape or not (np.abs(got - want) <= tolerance).all():
            return batch
    return None


def _served(c):
    return c["batch"] / np.mean(c["milliseconds"])


@right("11.C", "a loop")
def by_loop(configs, slo, floor):
    best, name = 0.0, None
    for c in configs:
        times = sorted(c["milliseconds"])
        place = 0.99 * (len(times) - 1)
        low, high = int(place), min(int(place) + 1, len(times) - 1)
        p99 = times[low] + (times[high] - times[low]) * (place - low)
        rate = c["batch"] * len(times) / sum(times)
        if p99 <= slo and c["accuracy"] >= floor and rate > best:
            best, name = rate, c["name"]
    return name


@right("11.C", "NumPy's strings")
def numpy_strings(configs, slo, floor):
    fit = [c for c in configs if np.quantile(c["milliseconds"], 0.99) <= slo]
    fit = [c for c in fit if not c["accuracy"] < floor]
    rates = [_served(c) for c in fit]
    return np.array([c["name"] for c in fit])[np.argmax(rates)] if fit else None


def _by(tail, value, strict=False):
    def choose(configs, slo, floor):
        fit = [c for c in configs if tail(c["milliseconds"]) <= slo]
        fit = [c for c in fit if (c["accuracy"] > floor if strict else c["accuracy"] >= floor)]
        return max(fit, key=value)["name"] if fit else None

    return choose


def _p99(times):
    return np.percentile(times, 99)


wrong("11.C", "the mean within the limit")(_by(np.mean, _served))
wrong("11.C", "the median within the limit")(_by(np.median, _served))
wrong("11.C", "every call within the limit")(_by(max, _served))
wrong("11.C", "p95")(_by(lambda t: np.percentile(t, 95), _served))
wrong("11.C", "p98.5")(_by(lambda t: np.percentile(t, 98.5), _served))
wrong("11.C", "the least time in place of the most images")(
    _by(_p99, lambda c: -np.mean(c["milliseconds"]))
)
wrong("11.C", "the largest batch")(_by(_p99, lambda c: c["batch"]))
wrong("11.C", "batch over the median time")(
    _by(_p99, lambda c: c["batch"] / np.median(c["milliseconds"]))
)
wrong("11.C", "the mean of batch over time")(
    _by(_p99, lambda c: np.mean(c["batch"] / np.array(c["milliseconds"])))
)
wrong("11.C", "batch over p99")(_by(_p99, lambda c: c["batch"] / _p99(c["milliseconds"])))
wrong("11.C", "accuracy above the floor, not on it")(_by(_p99, _served, strict=True))
wrong("11.C", "the most accurate")(_by(_p99, lambda c: c["accuracy"]))


@wrong("11.C", "the limit is not read")
def no_limit(configs, slo, floor):
    return _by(lambda t: 0.0, _served)(configs, slo, floor)


@wrong("11.C", "the config in place of its name")
def whole_config(configs, slo, floor):
    fit = [c for c in configs if _p99(c["milliseconds"]) <= slo and c["accuracy"] >= floor]
    return max(fit, key=_served, default=None)


@wrong("11.C", "the next best where nothing keeps both")
def always_something(configs, slo, floor):
    return _by(_p99, _served)(configs, slo, floor) or max(configs, key=_served)["name"]
