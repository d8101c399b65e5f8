"""Wrong answers to chapter 11's exercises, by somebody who has read only their texts."""

from collections import Counter

import numpy as np
import torch

from answers import wrong

# ---- A


@wrong("11.A", "read only: kinds that are gone altogether only")
def altogether(before, after):
    a, b = Counter(before), Counter(after)
    return {k: n for k, n in a.items() if k not in b}


@wrong("11.A", "read only: kinds of which none is gone appear with 0")
def with_zeros(before, after):
    a, b = Counter(before), Counter(after)
    return {k: max(0, n - b[k]) for k, n in a.items()}


@wrong("11.A", "read only: kinds that became more appear with a negative number")
def with_negatives(before, after):
    a, b = Counter(before), Counter(after)
    return {k: n - b[k] for k, n in a.items() if n != b[k]}


@wrong("11.A", "read only: new kinds appear, too, with a negative number")
def subtracted(before, after):
    a, b = Counter(before), Counter(after)
    a.subtract(b)
    return {k: n for k, n in a.items() if n}


@wrong("11.A", "read only: the change without its sign")
def no_sign(before, after):
    a, b = Counter(before), Counter(after)
    return {k: abs(n - b[k]) for k, n in a.items() if n != b[k]}


@wrong("11.A", "read only: how many there were, not how many are gone")
def how_many_were(before, after):
    a, b = Counter(before), Counter(after)
    return {k: n for k, n in a.items() if n > b[k]}


@wrong("11.A", "read only: 1 for each kind of which some are gone")
def one_each(before, after):
    a, b = Counter(before), Counter(after)
    return {k: 1 for k, n in a.items() if n > b[k]}


@wrong("11.A", "read only: what has come, not what is gone")
def what_has_come(before, after):
    return dict(Counter(after) - Counter(before))


@wrong("11.A", "read only: nodes compared place by place")
def place_by_place(before, after):
    longer = [*after, *[None] * len(before)]
    return dict(Counter(k for k, other in zip(before, longer, strict=False) if k != other))


@wrong("11.A", "read only: kinds of which one is gone appear only if the first is fused")
def inside_a_name(before, after):
    gone = Counter(before) - Counter(after)
    return {k: n for k, n in gone.items() if n > 1 or after[:1] == ["FusedConv"]}


@wrong("11.A", "read only: the names of the kinds alone")
def names_alone(before, after):
    return sorted(Counter(before) - Counter(after))


@wrong("11.A", "read only: what is left, not what is gone")
def what_is_left(before, after):
    return dict(Counter(before) & Counter(after))


# ---- B


def _first(
    model,
    run,
    shape,
    batches,
    tolerance,
    *,
    images=None,
    raised=True,
    shaped=True,
    finite=True,
    limit=lambda gap, tolerance: float(gap.max(initial=0)) > tolerance,
    default=None,
    rng=None,
    dtype=np.float32,
    signed=True,
    look=lambda a: a,
):
    rng = rng or np.random.default_rng(0)
    for n in batches:
        x = images(n) if images else rng.standard_normal((n, *shape)).astype(dtype)
        with torch.no_grad():
            expected = model(torch.from_numpy(x).float()).numpy()
        try:
            got = np.asarray(run(x))
        except Exception:
            if raised:
                return n
            continue
        if shaped and got.shape != expected.shape:
            return n
        if finite and not np.isfinite(got).all():
            return n
        gap = look(got) - look(expected)
        if limit(np.abs(gap) if signed else gap, tolerance):
            return n
    return default


@wrong("11.B", "read only: all images of a batch are the same")
def same_images(model, run, shape, batches, tolerance):
    one = np.random.default_rng(0).standard_normal((1, *shape)).astype(np.float32)
    return _first(model, run, shape, batches, tolerance, images=lambda n: np.repeat(one, n, 0))


@wrong("11.B", "read only: images of zeros")
def zeros(model, run, shape, batches, tolerance):
    def black(n):
        return np.zeros((n, *shape), np.float32)

    return _first(model, run, shape, batches, tolerance, images=black)


@wrong("11.B", "read only: what raises is let through to the caller")
def lets_through(model, run, shape, batches, tolerance):
    rng = np.random.default_rng(0)
    for n in batches:
        x = rng.standard_normal((n, *shape)).astype(np.float32)
        with torch.no_grad():
            expected = model(torch.from_numpy(x)).numpy()
        got = run(x)
        if got.shape != expected.shape or not np.isfinite(got).all():
            return n
        if np.abs(got - expected).max() > tolerance:
            return n
    return None


@wrong("11.B", "read only: a batch size at which run raises is passed over")
def passed_over(model, run, shape, batches, tolerance):
    return _first(model, run, shape, batches, tolerance, raised=False)


@wrong("11.B", "read only: only a ValueError counts as raised")
def value_errors(model, run, shape, batches, tolerance):
    def careful(x):
        try:
            return run(x)
        except ValueError:
            raise
        except Exception:
            with torch.no_grad():
                return model(torch.from_numpy(x)).numpy()

    return _first(model, careful, shape, batches, tolerance)


@wrong("11.B", "read only: NaN compares as near enough")
def nan_is_near(model, run, shape, batches, tolerance):
    return _first(model, run, shape, batches, tolerance, finite=False)


@wrong("11.B", "read only: NaN and infinity count as 0")
def nan_as_zero(model, run, shape, batches, tolerance):
    def cleaned(a):
        return np.nan_to_num(a, nan=0.0, posinf=0.0, neginf=0.0)

    return _first(model, run, shape, batches, tolerance, finite=False, look=cleaned)


@wrong("11.B", "read only: shapes that numpy can stretch are taken for equal")
def stretched(model, run, shape, batches, tolerance):
    return _first(model, run, shape, batches, tolerance, shaped=False)


@wrong("11.B", "read only: the number of numbers is looked at, not the shape")
def flat(model, run, shape, batches, tolerance):
    def flattened(x):
        got = np.asarray(run(x))
        with torch.no_grad():
            expected = model(torch.from_numpy(x)).numpy()
        return got.reshape(expected.shape) if got.size == expected.size else got

    return _first(model, flattened, shape, batches, tolerance)


@wrong("11.B", "read only: the mean difference")
def mean_difference(model, run, shape, batches, tolerance):
    def mean(gap, tolerance):
        return gap.mean() > tolerance

    return _first(model, run, shape, batches, tolerance, limit=mean)


@wrong("11.B", "read only: the difference of the first image only")
def first_image(model, run, shape, batches, tolerance):
    def first(gap, tolerance):
        return gap[0].max() > tolerance

    return _first(model, run, shape, batches, tolerance, limit=first)


@wrong("11.B", "read only: the last image only")
def last_image(model, run, shape, batches, tolerance):
    def last(gap, tolerance):
        return gap[-1].max() > tolerance

    return _first(model, run, shape, batches, tolerance, limit=last)


@wrong("11.B", "read only: without the sign, answers that are too small pass")
def too_small_passes(model, run, shape, batches, tolerance):
    return _first(model, run, shape, batches, tolerance, signed=False)


@wrong("11.B", "read only: a relative tolerance on top")
def relative(model, run, shape, batches, tolerance):
    def careful(x):
        got = np.asarray(run(x))
        with torch.no_grad():
            expected = model(torch.from_numpy(x)).numpy()
        near = got.shape == expected.shape and np.allclose(got, expected, 0.05, tolerance)
        return expected if near else got

    return _first(model, careful, shape, batches, tolerance)


@wrong("11.B", "read only: the place in the list, not the batch size")
def place(model, run, shape, batches, tolerance):
    found = _first(model, run, shape, batches, tolerance)
    return None if found is None else list(batches).index(found)


@wrong("11.B", "read only: the smallest bad batch size, not the first")
def smallest(model, run, shape, batches, tolerance):
    return _first(model, run, shape, sorted(batches), tolerance)


@wrong("11.B", "read only: the last bad batch size")
def last_bad(model, run, shape, batches, tolerance):
    return _first(model, run, shape, list(batches)[::-1], tolerance)


@wrong("11.B", "read only: the largest class is compared only")
def classes_only(model, run, shape, batches, tolerance):
    def careful(x):
        got = np.asarray(run(x))
        with torch.no_grad():
            expected = model(torch.from_numpy(x)).numpy()
        sound = got.shape == expected.shape and bool(np.isfinite(got).all())
        return expected if sound and (got.argmax(-1) == expected.argmax(-1)).all() else got

    return _first(model, careful, shape, batches, tolerance)


@wrong("11.B", "read only: float64 goes into run")
def float64(model, run, shape, batches, tolerance):
    return _first(model, run, shape, batches, tolerance, dtype=np.float64)


@wrong("11.B", "read only: False where nothing is bad")
def false(model, run, shape, batches, tolerance):
    return _first(model, run, shape, batches, tolerance, default=False)


@wrong("11.B", "read only: the first batch size is not tried")
def first_not_tried(model, run, shape, batches, tolerance):
    return _first(model, run, shape, list(batches)[1:], tolerance)


# ---- C


def _rate(config):
    return config["batch"] / np.mean(config["milliseconds"])


def _p99(config):
    return np.percentile(config["milliseconds"], 99)


def _choose(configs, slo, floor, *, key=_rate, tail=_p99, right=True, default=None):
    fits = [c for c in configs if tail(c) <= slo and (not right or c["accuracy"] >= floor)]
    return max(fits, key=key)["name"] if fits else default


@wrong("11.C", "read only: p99 equal to the promise is too slow")
def strict_promise(configs, slo, floor):
    return _choose([c for c in configs if _p99(c) < slo], slo, floor)


@wrong("11.C", "read only: accuracy equal to the floor is too low")
def strict_floor(configs, slo, floor):
    return _choose([c for c in configs if c["accuracy"] > floor], slo, floor)


@wrong("11.C", "read only: the mean time keeps the promise")
def mean_keeps(configs, slo, floor):
    return _choose(configs, slo, floor, tail=lambda c: np.mean(c["milliseconds"]))


@wrong("11.C", "read only: the slowest call keeps the promise, not p99")
def slowest_keeps(configs, slo, floor):
    return _choose(configs, slo, floor, tail=lambda c: max(c["milliseconds"]))


@wrong("11.C", "read only: p95 keeps the promise")
def p95_keeps(configs, slo, floor):
    return _choose(configs, slo, floor, tail=lambda c: np.percentile(c["milliseconds"], 95))


@wrong("11.C", "read only: p99 of an image, not of a call")
def of_an_image(configs, slo, floor):
    return _choose(configs, slo, floor, tail=lambda c: _p99(c) / c["batch"])


@wrong("11.C", "read only: accuracy is not looked at")
def no_floor(configs, slo, floor):
    return _choose(configs, slo, floor, right=False)


@wrong("11.C", "read only: the shortest call, not the most images")
def shortest_call(configs, slo, floor):
    return _choose(configs, slo, floor, key=lambda c: -np.mean(c["milliseconds"]))


@wrong("11.C", "read only: the largest batch")
def largest_batch(configs, slo, floor):
    return _choose(configs, slo, floor, key=lambda c: c["batch"])


@wrong("11.C", "read only: the median instead of the mean")
def median(configs, slo, floor):
    return _choose(configs, slo, floor, key=lambda c: c["batch"] / np.median(c["milliseconds"]))


@wrong("11.C", "read only: the mean of the rates instead of the rate of the mean")
def mean_of_rates(configs, slo, floor):
    def rates(c):
        return np.mean(c["batch"] / np.array(c["milliseconds"]))

    return _choose(configs, slo, floor, key=rates)


@wrong("11.C", "read only: divided by p99")
def divided_by_tail(configs, slo, floor):
    return _choose(configs, slo, floor, key=lambda c: c["batch"] / _p99(c))


@wrong("11.C", "read only: the fastest of all, None if it breaks a promise")
def fastest_or_none(configs, slo, floor):
    best = max(configs, key=_rate, default=None)
    return best and _choose([best], slo, floor)


@wrong("11.C", "read only: the most accurate of those that keep the promise")
def most_accurate(configs, slo, floor):
    return _choose(configs, slo, floor, key=lambda c: c["accuracy"])


@wrong("11.C", "read only: the fastest if none keeps its promises")
def fastest_if_none(configs, slo, floor):
    best = max(configs, key=_rate, default=None)
    return _choose(configs, slo, floor, default=best and best["name"])


@wrong("11.C", "read only: the whole config, not its name")
def whole_config(configs, slo, floor):
    name = _choose(configs, slo, floor)
    return next((c for c in configs if c["name"] == name), None)


@wrong("11.C", "read only: sorts the measured times, and takes the upper of two for p99")
def upper_of_two(configs, slo, floor):
    def upper(c):
        return np.percentile(c["milliseconds"], 99, method="higher")

    return _choose(configs, slo, floor, tail=upper)


@wrong("11.C", "read only: the first call is left out as a warm-up")
def without_first(configs, slo, floor):
    fewer = [{**c, "milliseconds": c["milliseconds"][1:] or c["milliseconds"]} for c in configs]
    return _choose(fewer, slo, floor)
