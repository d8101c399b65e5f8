"""Time measured so that two arms can be compared: interleaved rounds, paired ratios, an honest
interval. `compare` looks inside this process; `fresh.across` asks several.
"""

import html
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from course_utils.measure.arms import (
    Arm,
    Sampler,
    agreed_threads,
    as_arm,
    graphs_compiled,
    pretty,
    refuse_compilation,
    refuse_two_modes,
)
from course_utils.measure.stats import (
    LOOK_AFTER,
    MIN_ROUNDS,
    Interval,
    decide,
    median_interval,
    narrow_enough,
    speedup,
)


@dataclass(frozen=True)
class Comparison:
    """The speed-up of `candidate` over `baseline`: above 1, the candidate is faster.

    `ratios` holds one number a round where `processes` is 1, one a process otherwise. `cores` is
    how many cores each arm kept busy, `faults` how many page faults one call of each made.

    >>> import time
    >>> compare(lambda: time.sleep(2e-3), lambda: time.sleep(1e-3), seconds=0.2).processes
    1
    """

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
    processes: int = 1
    cores: tuple[float, float] = (0.0, 0.0)
    faults: tuple[float, float] = (0.0, 0.0)

    @property
    def interval(self) -> Interval:
        return Interval(self.ratio, self.low, self.high, "x")

    @property
    def scope(self) -> str:
        """Where the interval holds: "within this process", or over how many fresh ones."""
        return f"{self.processes} fresh processes" if self.processes > 1 else "within this process"

    def __repr__(self) -> str:
        names = f"{self.candidate.label} against {self.baseline.label}"
        times = f"{pretty(self.baseline_seconds)} → {pretty(self.candidate_seconds)}"
        a, b = self.baseline.conditions(), self.candidate.conditions()
        conditions = f"{a} → {b}" if a and b and a != b else a or b
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        idle = min(self.cores) < 0.6 * max(self.cores) and self.threads > 1
        busy = f", busy cores {self.cores[0]:.1f} → {self.cores[1]:.1f}" if idle else ""
        return (
            f"{names}: {self.ratio:.2f}x [{self.low:.2f}, {self.high:.2f}], {self.verdict},"
            f" {self.scope} ({times}; {self.rounds} rounds, {threads}{busy}, {self.clock}"
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
    across_modes: bool = False,
) -> Comparison:
    """A quick look: how much faster `candidate` is than `baseline` *within this process*.

    Every round times both, in random order, and gives one ratio, so that whatever slows the machine
    for a while slows both; the median of the ratios has a 95% interval that knows the noise's
    memory. Sampling ends after `seconds`, or when half the interval's width is `precision` of the
    ratio; eight rounds are made in any case. `clock="cpu"` counts one thread's
    CPU time: for a machine that is busy with something else.

    The next process may differ by more than the interval is wide: `across` measures that.
    Raises MeasurementError where an arm raises, returns without computing, returns something lazy,
    is compiled while it is timed, or where the arms differ in threads or in mode.

    >>> import time
    >>> look = compare(lambda: time.sleep(4e-3), lambda: time.sleep(2e-3), seconds=0.2)
    >>> look.scope
    'within this process'
    """
    a, b = as_arm(baseline, "baseline"), as_arm(candidate, "candidate")
    threads = agreed_threads(a, b, threads, clock)
    first, second = Sampler(a, threads, clock), Sampler(b, threads, clock)
    if not across_modes:
        refuse_two_modes(first, second)
    graphs = graphs_compiled()
    ratios, times = collect(interleaved(first, second), seconds=seconds, precision=precision)
    refuse_compilation(graphs, first.arm, second.arm)
    result, medians = speedup(ratios), np.median(times, axis=0)
    return Comparison(
        ratio=result.value,
        low=result.low,
        high=result.high,
        verdict=decide(result.low, result.high),
        baseline=a.spent(),
        candidate=b.spent(),
        baseline_seconds=float(medians[0]),
        candidate_seconds=float(medians[1]),
        rounds=len(ratios),
        threads=threads,
        clock=clock,
        ratios=tuple(ratios),
        cores=(first.cores, second.cores),
        faults=(first.faults, second.faults),
    )


def interleaved(first: Sampler, second: Sampler) -> Callable[[], tuple[float, float]]:
    """A round: both arms timed once, in random order; (seconds of the first, of the second)."""

    def one_round() -> tuple[float, float]:
        if random.random() < 0.5:
            return first.sample(), second.sample()
        later = second.sample()
        return first.sample(), later

    return one_round


def collect(
    one_round: Callable[[], tuple[float, float]],
    *,
    seconds: float,
    precision: float,
    now: Callable[[], float] = time.perf_counter,
) -> tuple[list[float], list[tuple[float, float]]]:
    """Rounds until the interval is narrow or time is spent. The stopping rule looks at the width,
    never at the verdict (stopping as soon as a difference shows would find one in noise); a width
    from few rounds is narrow by luck, so `within_process` widens it.
    """
    start, ratios, times = now(), [], []
    while len(ratios) < MIN_ROUNDS or now() - start < seconds:
        pair = one_round()
        times.append(pair)
        ratios.append(pair[0] / pair[1])
        if len(ratios) in LOOK_AFTER and narrow_enough(speedup(ratios), precision):
            break
    return ratios, times


@dataclass(frozen=True)
class Latency:
    """The distribution of single calls, in seconds.

    >>> Latency((0.010, 0.011, 0.012, 0.040), "a call").p50
    0.0115
    """

    samples: tuple[float, ...]
    label: str = ""

    def percentile(self, share: float) -> float:
        """The latency that `share` percent of the calls do not exceed, interpolated."""
        return float(np.percentile(self.samples, share))

    mean = property(lambda self: float(np.mean(self.samples)))
    p50 = property(lambda self: self.percentile(50))
    p95 = property(lambda self: self.percentile(95))
    p99 = property(lambda self: self.percentile(99))
    median = property(lambda self: median_interval(self.samples))

    def __repr__(self) -> str:
        shares = [("p50", self.p50), ("p95", self.p95), ("p99", self.p99)]
        values = ", ".join(f"{name} {pretty(v)}" for name, v in shares)
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

    >>> len(latency(lambda: sum(range(10_000)), calls=20).samples)
    20
    """
    a = as_arm(call, "the call")
    sampler = Sampler(a, agreed_threads(a, a, threads, "wall"), "wall", block=0.0)
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
    interval, within this process.

    >>> throughput(lambda: sum(range(10_000)), 8, seconds=0.05).unit
    'items/s'
    """
    median = latency(call, seconds=seconds, threads=threads).median
    return Interval(batch / median.value, batch / median.high, batch / median.low, "items/s")
