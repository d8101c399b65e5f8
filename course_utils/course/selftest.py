"""`course selftest`: does the instrument keep its promise on this machine?

Three questions, a minute or two, nothing else running: are two equal arms called equal, is a known
ratio held, and do the intervals of ten fresh programs agree with each other? The answer goes on the
machine card and with every ledger.
"""

import datetime
import json
import math
import os
import time
from collections.abc import Callable

import numpy as np

from course_utils import cpu, machine, measure

PROGRAMS = 10
ONE_PROGRAM = """
import json, torch
from torch import nn
from course_utils import measure
torch.manual_seed(0)
whole = nn.Conv2d(128, 128, 3, padding=1, bias=False)
split = nn.Sequential(
    nn.Conv2d(128, 128, 3, padding=1, groups=128, bias=False), nn.Conv2d(128, 128, 1, bias=False)
)
x = torch.randn(8, 128, 28, 28)
arms = measure.arm(whole, x, "3x3"), measure.arm(split, x, "separable")
within = measure.compare(*arms, threads=1, seconds=1.5)
over = measure.across(*arms, threads=1)
print(json.dumps([[r.ratio, r.low, r.high, *r.faults] for r in (within, over)]))
"""


def run(say: Callable[[str], None] = print) -> dict:
    """Measure, tell each step through `say`, keep the result in build/selftest.json, return it."""
    start = time.monotonic()
    say("Nothing else should be running. This takes one to two minutes.")
    equal, known = two_known_ratios()
    say(f"two equal arms     {_shown(equal)}, {equal.verdict}")
    say(f"a known 1.50x      {_shown(known)}")
    within, over = [], []
    for k in range(PROGRAMS):
        one, several = measure.child(ONE_PROGRAM, timeout=300).result
        within.append(one)
        over.append(several)
        say(f"fresh program {k + 1:2}   {_row(several)}    inside one process alone: {_row(one)}")
    result = judged(equal, known, within, over) | {
        "seconds": round(time.monotonic() - start),
        "date": datetime.date.today().isoformat(),
        "cpu": cpu.name(),
    }
    result["summary"] = f"{summary(result)} ({result['date']})"
    say(result["summary"])
    keep(result)
    return result


def two_known_ratios() -> tuple[measure.Comparison, measure.Comparison]:
    """Two convolutions against themselves, and three of them against two. Short enough that a
    block holds several calls: the first one finds its data evicted by the other arm.
    """
    import torch

    conv, x = torch.nn.Conv2d(32, 32, 3, padding=1), torch.randn(4, 32, 28, 28)

    def times(n: int) -> measure.Arm:
        return measure.arm(torch.nn.Sequential(*[conv] * n), x, f"{n} convolutions")

    return (
        measure.across(times(2), times(2), threads=1),
        measure.across(times(3), times(2), threads=1),
    )


def judged(
    equal: measure.Comparison,
    known: measure.Comparison,
    within: list[list[float]],
    over: list[list[float]],
) -> dict:
    """What the three measurements say; `within` and `over` hold ratio, low, high, … a program."""
    common = float(np.median([row[0] for row in over]))
    held = {
        name: sum(low <= common <= high for _, low, high, *_ in rows)
        for name, rows in (("held", over), ("held_within", within))
    }
    spread = [math.log(row[0]) for row in within]
    # a hundredth is left to what one call costs beside its convolutions
    passed = equal.low <= 1 <= equal.high and known.low <= 1.515 and known.high >= 1.485
    return {
        "equal": [equal.ratio, equal.low, equal.high],
        "known": [known.ratio, known.low, known.high],
        "programs": len(over),
        "common": common,
        **held,
        "spread_within": round(100 * float(np.std(spread, ddof=1)), 1),  # percent, one sd
        "passed": bool(passed and held["held"] >= len(over) - 1),
    }


def summary(result: dict) -> str:
    """One line for the machine card."""
    n = result["programs"]
    return (
        f"{'passed' if result['passed'] else 'not passed'}: {result['held']} of {n} intervals over"
        f" processes hold the common {result['common']:.2f}x, {result['held_within']} of {n} from"
        f" inside one process; equal arms {result['equal'][0]:.2f}x, known 1.50x:"
        f" {result['known'][0]:.2f}x"
    )


def keep(result: dict) -> None:
    """Write the result where the card finds it; a place that cannot be written is no error."""
    try:
        machine.SELFTEST.parent.mkdir(parents=True, exist_ok=True)
        part = machine.SELFTEST.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(result, indent=1), encoding="utf-8")
        part.replace(machine.SELFTEST)
    except OSError as error:
        print(f"The result could not be kept: {error}")


def _shown(comparison: measure.Comparison) -> str:
    return f"{comparison.ratio:.2f}x [{comparison.low:.2f}, {comparison.high:.2f}]"


def _row(row: list[float]) -> str:
    return f"{row[0]:.2f}x [{row[1]:.2f}, {row[2]:.2f}]"
