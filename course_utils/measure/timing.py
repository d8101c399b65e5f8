"""Time measured so that two arms can be compared: interleaved rounds, paired ratios, an honest
interval.
"""

import concurrent.futures
import functools
import html
import inspect
import math
import random
import time
import timeit
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils import benchmark

from course_utils.measure.stats import (
    LOOKS,
    MIN_ROUNDS,
    Interval,
    decide,
    median_interval,
    narrow_enough,
    speedup,
)

BLOCK_SECONDS = 0.005  # inner calls are repeated until a block lasts this long
_EMPTY_CALLS = 4  # a callable that costs less than this many empty calls has computed nothing


class MeasurementError(RuntimeError):
    """The measurement would mean nothing: the message says why and what to do."""


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: what is called, and the conditions under which it runs.

    `threads` is None for a torch arm (the comparison sets them). A runtime with threads of its own
    (ONNX Runtime, OpenVINO) must say how many it was given, because torch's setting does not reach
    it. Example: Arm(lambda: session.run(None, feed), "ONNX Runtime int8", threads=1, dtype="int8",
    batch=8)
    """

    call: Callable[[], object]
    label: str = ""
    threads: int | None = None
    dtype: str = ""
    batch: int | None = None
    memory_format: str = ""

    def conditions(self) -> str:
        parts = [self.dtype, f"batch {self.batch}" if self.batch else "", self.memory_format]
        return ", ".join(p for p in parts if p)


def arm(model: Callable[[torch.Tensor], object], x: torch.Tensor, label: str = "") -> Arm:
    """`model(x)` in inference mode as an Arm; dtype, batch and memory format are read from `x`."""

    @torch.inference_mode()
    def call() -> object:
        return model(x)

    channels_last = (
        x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
    )
    name = label or type(model).__name__
    return Arm(
        call,
        name,
        None,
        str(x.dtype).removeprefix("torch."),
        len(x),
        "channels_last" if channels_last else "contiguous",
    )


@dataclass(frozen=True)
class Comparison:
    """The speed-up of `candidate` over `baseline`: above 1, the candidate is faster."""

    ratio: float
    low: float
    high: float
    verdict: str
    baseline: Arm
    candidate: Arm
    baseline_seconds: float
    candidate_seconds: float
    rounds: int
    threads: int
    clock: str
    ratios: tuple[float, ...]

    @property
    def interval(self) -> Interval:
        return Interval(self.ratio, self.low, self.high, "x")

    def __repr__(self) -> str:
        names = f"{self.candidate.label} against {self.baseline.label}"
        times = f"{pretty(self.baseline_seconds)} → {pretty(self.candidate_seconds)}"
        a, b = self.baseline.conditions(), self.candidate.conditions()
        conditions = "; ".join(c for c in (a if a == b else f"{a} → {b}",) if c.strip(" →"))
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return (
            f"{names}: {self.ratio:.2f}x [{self.low:.2f}, {self.high:.2f}], {self.verdict}"
            f" ({times}; {self.rounds} rounds, {threads}, {self.clock}"
            f" clock{'; ' + conditions if conditions else ''})"
        )

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>"


def compare(
    baseline: Callable[[], object] | Arm,
    candidate: Callable[[], object] | Arm,
    *,
    seconds: float = 3.0,
    threads: int | None = None,
    clock: str = "wall",
    precision: float = 0.01,
) -> Comparison:
    """How much faster `candidate` is than `baseline`, as the median of per-round ratios with a 95%
    interval.

    Every round times both, in random order, and gives one ratio, so that whatever slows the machine
    for a while slows both. Sampling ends when half the interval's width is `precision` of the
    ratio, or after `seconds`; eight rounds are made in any case. Then the interval is widened by
    the A/A spread of this machine (`aa_spread`). `clock="cpu"` counts one thread's CPU time: for a
    machine that is busy with something else.

    Raises MeasurementError where an arm raises, returns without computing, returns something lazy,
    or where the arms do not have the same number of threads.
    """
    a, b = _as_arm(baseline, "baseline"), _as_arm(candidate, "candidate")
    threads = _threads(a, b, threads, clock)
    first, second = _Sampler(a, threads, clock), _Sampler(b, threads, clock)
    spread = aa_spread(threads, clock)

    def one_round() -> tuple[float, float]:
        if random.random() < 0.5:
            return first.sample(), second.sample()
        later = second.sample()
        return first.sample(), later

    ratios, times = collect(one_round, seconds=seconds, precision=precision)
    result = speedup(ratios, spread)
    medians = np.median(times, axis=0)
    return Comparison(
        result.value,
        result.low,
        result.high,
        decide(result.low, result.high),
        _spent(a),
        _spent(b),
        float(medians[0]),
        float(medians[1]),
        len(ratios),
        threads,
        clock,
        tuple(ratios),
    )


def collect(
    one_round: Callable[[], tuple[float, float]],
    *,
    seconds: float,
    precision: float,
    now: Callable[[], float] = time.perf_counter,
) -> tuple[list[float], list[tuple[float, float]]]:
    """Rounds until the interval is narrow or time is spent. The stopping rule looks at the width,
    never at the verdict: stopping as soon as a difference shows would find one in noise.
    """
    start, ratios, times = now(), [], []
    while len(ratios) < MIN_ROUNDS or now() - start < seconds:
        pair = one_round()
        times.append(pair)
        ratios.append(pair[0] / pair[1])
        if len(ratios) in LOOKS and narrow_enough(speedup(ratios), precision):
            break
    return ratios, times


@functools.cache
def aa_spread(threads: int, clock: str = "wall", pairs: int = 9) -> float:
    """How far two *equal* arms come out apart on this machine, in log units: measured once a
    process, about 1 s.

    Each pair is the same small convolution on two buffers of its own, so what differs is what
    should not matter: where the buffers lie, what the other arm left in the cache. The median over
    pairs is returned, at most 0.05.
    """
    apart = []
    for _ in range(pairs):
        samplers = []
        for _ in range(2):
            conv, x = torch.nn.Conv2d(32, 32, 3, padding=1), torch.randn(8, 32, 28, 28)
            samplers.append(_Sampler(arm(conv, x), threads, clock, block=0.002))
        ratios = [samplers[0].sample() / samplers[1].sample() for _ in range(15)]
        apart.append(abs(math.log(float(np.median(ratios)))))
    return min(float(np.median(apart)), 0.05)


@dataclass(frozen=True)
class Latency:
    """The distribution of single calls, in seconds."""

    samples: tuple[float, ...]
    label: str = ""

    def percentile(self, share: float) -> float:
        return float(np.percentile(self.samples, share))

    mean = property(lambda self: float(np.mean(self.samples)))
    p50 = property(lambda self: self.percentile(50))
    p95 = property(lambda self: self.percentile(95))
    p99 = property(lambda self: self.percentile(99))
    median = property(lambda self: median_interval(self.samples))

    def __repr__(self) -> str:
        values = ", ".join(
            f"{n} {pretty(v)}" for n, v in [("p50", self.p50), ("p95", self.p95), ("p99", self.p99)]
        )
        return f"{self.label or 'latency'}: {values} ({len(self.samples)} calls)"


def latency(
    call: Callable[[], object] | Arm,
    *,
    seconds: float = 2.0,
    calls: int | None = None,
    threads: int | None = None,
) -> Latency:
    """Time single calls one by one, after a warm-up, for `seconds` or for `calls` calls (at least
    eight either way).
    """
    a = _as_arm(call, "the call")
    sampler = _Sampler(a, _threads(a, a, threads, "wall"), "wall", block=0.0)
    samples: list[float] = []
    start = time.perf_counter()
    while len(samples) < MIN_ROUNDS or (
        len(samples) < calls if calls else time.perf_counter() - start < seconds
    ):
        samples.append(sampler.sample())
    return Latency(tuple(samples), a.label)


def throughput(
    call: Callable[[], object] | Arm,
    batch: int,
    *,
    seconds: float = 1.0,
    threads: int | None = None,
) -> Interval:
    """Items a second when batches of `batch` are computed one after the other, with the median's
    interval.
    """
    median = latency(call, seconds=seconds, threads=threads).median
    return Interval(batch / median.value, batch / median.high, batch / median.low, "items/s")


def pretty(seconds: float) -> str:
    """A duration for people: 12.3 ms."""
    for unit, scale in (("s", 1), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


class _Sampler:
    """Times one arm: checks it, finds how many inner calls fill a block, then gives seconds a call,
    block by block.
    """

    def __init__(self, a: Arm, threads: int, clock: str, block: float = BLOCK_SECONDS) -> None:
        self.threads, self.arm = threads, a
        # benchmark.timer waits for an accelerator before it reads the clock.
        self._timer = timeit.Timer(
            a.call, timer=time.thread_time if clock == "cpu" else benchmark.timer
        )
        once = self._first_calls()
        self.number = max(1, math.ceil(block / once)) if block else 1

    def _first_calls(self) -> float:
        with benchmark.set_torch_threads(self.threads):
            try:
                _refuse_lazy(
                    self.arm.call(), self.arm.label
                )  # the first call warms up memory and caches
                once = min(timeit.Timer(self.arm.call).repeat(2, 1))
            except MeasurementError:
                raise
            except Exception as error:
                raise MeasurementError(
                    f"{self.arm.label} raised {type(error).__name__}: {error}"
                ) from error
            if once < 20e-6:  # short: look again, without the clock's own cost
                once = min(timeit.Timer(self.arm.call).repeat(3, 1000)) / 1000
                empty = min(timeit.Timer(lambda: None).repeat(3, 1000)) / 1000
                if once < _EMPTY_CALLS * empty:
                    raise MeasurementError(
                        f"{self.arm.label} returns after {pretty(once)}, an empty function after"
                        f" {pretty(empty)}: nothing is computed in it. Let the callable do the work"
                        " itself; a value computed before the clock started costs nothing."
                    )
        return max(once, 1e-9)

    def sample(self) -> float:
        with benchmark.set_torch_threads(self.threads):
            return max(self._timer.timeit(self.number) / self.number, 1e-9)


def _refuse_lazy(value: object, label: str) -> None:
    lazy = (
        inspect.isgenerator(value)
        or inspect.isawaitable(value)
        or isinstance(value, map | filter | zip)
    )
    if lazy or isinstance(value, concurrent.futures.Future):
        if inspect.iscoroutine(value):
            value.close()
        raise MeasurementError(
            f"{label} returned a {type(value).__name__}: work that is promised, not done. Consume"
            " it inside the callable: list(generator), future.result(), asyncio.run(coroutine)."
        )


def _as_arm(value: Callable[[], object] | Arm, name: str) -> Arm:
    if isinstance(value, Arm):
        return value if value.label else Arm(**(value.__dict__ | {"label": name}))
    if not callable(value):
        raise TypeError(
            f"{name} is a {type(value).__name__}, already computed; pass a function without"
            " arguments, or measure.arm(model, x)."
        )
    return Arm(value, name)


def _spent(a: Arm) -> Arm:
    """The arm without its callable: a result that is kept must not keep the model alive."""
    return replace(a, call=_no_call)


def _no_call() -> object:
    raise MeasurementError(
        "a Comparison keeps its arms' conditions, not what they called; measure again with new"
        " arms."
    )


def _threads(a: Arm, b: Arm, threads: int | None, clock: str) -> int:
    if clock not in ("wall", "cpu"):
        raise ValueError(f"clock is {clock!r}; it must be 'wall' or 'cpu'.")
    own = {x for x in (a.threads, b.threads, threads) if x is not None}
    if len(own) > 1:
        raise MeasurementError(
            f"the arms do not have the same threads: {a.label} {a.threads or 'torch'}, {b.label}"
            f" {b.threads or 'torch'}, asked for {threads}. A runtime's threads are set when it is"
            " made (intra_op_num_threads, INFERENCE_NUM_THREADS): give both the same."
        )
    chosen = own.pop() if own else (1 if clock == "cpu" else torch.get_num_threads())
    if chosen < 1 or (clock == "cpu" and chosen != 1):
        raise ValueError(f"threads is {chosen}; it must be at least 1, and 1 with clock='cpu'.")
    return chosen
