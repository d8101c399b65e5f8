"""Chapter 14's figures (what a step costs, the roofline, an engine's slots), when users come to a
server, and what became of them.
"""

import math
import random
from collections.abc import Mapping, Sequence

import numpy as np

from course_utils import machine, plots
from course_utils.llm_server import Answer
from course_utils.measure import Interval, Roofline, median_interval

__all__ = ["arrivals", "has", "roofline", "slots", "steps", "told"]


def has(part: str, *packages: str) -> machine.Skip | bool:
    """True where all of `packages` are installed. Otherwise the reason, which is false and shown,
    and `part` of the chapter is recorded as left out.

    >>> has("a comparison", "torch")
    True
    >>> has("a comparison", "torch", "nowhere").kind
    the package nowhere is not installed.
    'package'
    """
    for name in packages:
        if not machine.can(f"package:{name}"):
            reason = machine.skip(f"package:{name}", part)
            print(reason.reason)
            return reason
    return True


def _ms(seconds: np.ndarray) -> Interval:
    return median_interval((1e3 * np.asarray(seconds)).tolist())


def steps(
    lengths: Sequence[int],
    without: Mapping[int, np.ndarray],
    cached: Mapping[int, np.ndarray],
    title: str,
) -> None:
    """Time of the step that writes the token at each of `lengths`, without a cache and with it.
    Both map a position to seconds, one a round.

    >>> took = {16: np.full(9, 0.1), 64: np.full(9, 0.3)}
    >>> steps([16, 64], took, took, "Equal")
    Figure: Time of one step against position: rising without a cache, nearly flat with it.
    """
    plots.lines(
        lengths,
        {
            "without cache": [_ms(without[n]) for n in lengths],
            "with cache": [_ms(cached[n]) for n in lengths],
        },
        xlabel="position of the token",
        ylabel="time of one step (ms)",
        title=title,
        alt="Time of one step against position: rising without a cache, nearly flat with it.",
    )


def roofline(
    roof: Roofline, weights: int, passes: Mapping[str, Mapping[int, np.ndarray]], title: str
) -> None:
    """GFLOP/s against operations a byte of weights, under the machine's roof. `weights` are bytes
    in fp32; `passes` map the number of tokens in a pass to seconds, one a round.

    >>> roof = Roofline(gflops=100.0, gbytes=20.0, threads=1)
    >>> roofline(roof, 10**6, {"decode": {1: np.full(9, 1e-3)}}, "Below the roof")
    Figure: Roofline: decode sits on the sloping part at the left, prefill climbs to the right.
    """
    figure, ax = plots.axes("operations a byte of weights", "GFLOP/s", title=title)
    x = np.geomspace(0.3, 300, 50)
    ax.plot(x, [roof.bound(i) for i in x], color="0.4", label="roofline of this machine")
    for k, (name, times) in enumerate(passes.items()):
        points = [(n / 2, weights / 2 * n / float(np.median(s)) / 1e9) for n, s in times.items()]
        colour = plots.COLOURS[k]
        ax.plot(*zip(*points, strict=True), plots.MARKERS[k], color=colour, label=name)
    plots.plain_log(ax.xaxis)
    plots.plain_log(ax.yaxis)
    ax.legend()
    plots.show(
        figure,
        "Roofline: decode sits on the sloping part at the left, prefill climbs to the right.",
    )


def slots(rows: Mapping[str, Sequence[Sequence[tuple[int, int, int]]]], title: str) -> None:
    """Who occupies an engine's slots: for each policy, a list a slot of (text, first step, end).

    >>> slots({"static": [[(0, 0, 3)], [(1, 0, 1)]], "continuous": [[(0, 0, 3)], []]}, "Gaps")
    Figure: Occupied slots over time: static batching leaves gaps until its longest text ends.
    """
    figure, panels = plots.axes("step", "slot", columns=len(rows), title=title)
    for ax, (name, policy) in zip(panels, rows.items(), strict=True):
        for slot, texts in enumerate(policy):
            for text, start, end in texts:
                colour = plots.COLOURS[text % 6]
                ax.barh(slot, end - start, left=start, color=colour, edgecolor="white", height=0.8)
        ax.set_title(name, fontsize=10)
        ax.set_yticks(range(0, len(policy), 4))
    for ax in panels[1:]:
        ax.set_xlim(panels[0].get_xlim())
    plots.show(
        figure,
        "Occupied slots over time: static batching leaves gaps until its longest text ends.",
    )


def arrivals(rate: float, seconds: float, seed: int = 0) -> list[float]:
    """Poisson arrivals, `rate` a second for `seconds`. Raises ValueError where either is not above
    0.

    >>> len(arrivals(10.0, 100.0)) in range(850, 1150)
    True
    """
    if not (rate > 0 and seconds > 0):
        raise ValueError(f"rate is {rate} and seconds {seconds}; both must be above 0.")
    rng, now, due = random.Random(seed), 0.0, []
    while (now := now + rng.expovariate(rate)) < seconds:
        due.append(now)
    return due


def told(answers: Sequence[Answer], ttft: float, tpot: float, seconds: float) -> str:
    """One line: what became of all requests of `seconds`, TTFT and TPOT of the answered, goodput.

    >>> told([Answer(0, 0.0, 200, 0.1, 0.3, 5, "x"), Answer(0, 0.5, 429)], 1.0, 0.1, seconds=2.0)
    '1 answered, 1 refused, 0 lost; TTFT p50 100 ms, TPOT p50 50 ms; goodput 0.5 a second'
    """
    good = [a for a in answers if a.status == 200]
    refused = sum(a.status == 429 for a in answers)
    middle = [
        1e3 * sorted(values)[len(values) // 2] if values else math.nan
        for values in ([a.ttft for a in good], [a.tpot for a in good])
    ]
    kept = sum(a.within(ttft, tpot) for a in good) / seconds
    return (
        f"{len(good)} answered, {refused} refused, {len(answers) - len(good) - refused} lost; TTFT"
        f" p50 {middle[0]:.0f} ms, TPOT p50 {middle[1]:.0f} ms; goodput {kept:.2g} a second"
    )
