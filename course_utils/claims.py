"""Claims that circulate, and what this machine says about them.

A claim lives in notebooks/claims/NN.toml; `verdict("NN.name", measurement)` compares it with a
measurement, shows the result and writes it to the ledger.
"""

import difflib
import functools
import html
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path

from course_utils import ROOT, ledger, machine
from course_utils.measure.stats import Interval

FOLDER = ROOT / "notebooks" / "claims"
PROOFS = ("estimand", "can_hold", "can_fail")
"""What an entry says for the suite, and a verdict does not show."""
HOLDS, FAILS, OPEN, UNTESTED = (
    "holds here",
    "does not hold here",
    "inconclusive",
    "not testable here",
)
_COLOURS = {HOLDS: "#1b7837", FAILS: "#b2182b", OPEN: "#8a6d00", UNTESTED: "#666666"}
WORDS = {HOLDS: "holds", FAILS: "fails", OPEN: "open", UNTESTED: "n/a"}
"""The short word of each verdict: a picture must be read in grey, too."""
FILLS = {HOLDS: "#bfe3c5", FAILS: "#f4b6ae", OPEN: "#f5e6a8", UNTESTED: "#e0e0e0"}
"""The colour behind it."""


def badge(colour: str) -> str:
    """White on a dark colour: at least 4.5 : 1 on a light page and on a dark one.

    >>> badge("#1b7837")
    'background:#1b7837;color:#fff;padding:1px 6px'
    """
    return f"background:{colour};color:#fff;padding:1px 6px"


class ClaimError(ValueError):
    """A claim's id is unknown or its entry in the TOML file is not complete."""


@dataclass(frozen=True)
class Claim:
    """A statement somebody makes, the condition under which it is tested, and the band of values
    for which it holds.

    `estimand` says what is estimated, and from what. `can_hold` and `can_fail` are planted data,
    names of the chapter and their values: from them the chapter's own lines must come to "holds
    here" and to "does not hold here". tests/planted.py tries both.

    >>> Claim("99.twice", "It is twice as fast.", "somebody, 2020", "here", (1.8, 2.2), "x").band
    (1.8, 2.2)
    """

    id: str
    statement: str
    source: str
    condition: str
    band: tuple[float, float]
    unit: str = ""
    stand_in: str = ""
    estimand: str = ""
    can_hold: str = ""
    can_fail: str = ""


@dataclass(frozen=True)
class Verdict:
    """What this machine says about one claim.

    >>> claim = Claim("99.twice", "It is twice as fast.", "somebody, 2020", "here", (1.8, 2.2), "x")
    >>> Verdict(claim, HOLDS, 2.0, 1.9, 2.1, "")
    99.twice: holds here
      claim:     It is twice as fast.
      source:    somebody, 2020
      condition: here
      holds for: 1.8 to 2.2 x
      measured:  2 x [1.9, 2.1]
    """

    claim: Claim
    status: str
    value: float | None
    low: float | None
    high: float | None
    reason: str
    scope: str = ""  # of a comparison: "12 fresh processes", or "within this process"

    def measured(self) -> str:
        if self.value is None:
            return self.reason
        unit = f" {self.claim.unit}" if self.claim.unit else ""
        # a number just beyond an edge of the band must not be rounded onto it
        edges = {f"{edge:.3g}" for edge in self.claim.band}
        value, low, high = (
            f"{x:.5g}" if f"{x:.3g}" in edges else f"{x:.3g}"
            for x in (self.value, self.low, self.high)
        )
        interval = "" if self.low == self.high else f" [{low}, {high}]"
        return f"{value}{unit}{interval}{', ' if self.scope else ''}{self.scope}"

    def band(self) -> str:
        low, high = self.claim.band
        if math.isinf(high):
            return f"at least {low:g} {self.claim.unit}".strip()
        if math.isinf(low):
            return f"at most {high:g} {self.claim.unit}".strip()
        return f"{low:g} to {high:g} {self.claim.unit}".strip()

    def heading(self) -> str:
        return self.status + (
            f", on a stand-in ({self.claim.stand_in})" if self.claim.stand_in else ""
        )

    def __repr__(self) -> str:
        return (
            f"{self.claim.id}: {self.heading()}\n  claim:     {self.claim.statement}\n  source:   "
            f" {self.claim.source}\n  condition: {self.claim.condition}\n  holds for:"
            f" {self.band()}\n  measured:  {self.measured()}"
        )

    def _repr_html_(self) -> str:
        colour = _COLOURS[self.status]
        e = html.escape
        return (
            f"<div style='border-left:4px solid {colour};padding:2px 12px'><b"
            f" style='{badge(colour)}'>{e(self.heading())}</b><br>“{e(self.claim.statement)}”"
            f" <small>({e(self.claim.source)})</small><br>Measured here:"
            f" <b>{e(self.measured().rstrip('.'))}</b>. The claim holds for"
            f" {e(self.band())}.<br><small>Condition: {e(self.claim.condition)}</small></div>"
        )


def verdict(
    claim_id: str, measurement: "Interval | float | bool | machine.Skip | object"
) -> Verdict:
    """Compare a claim with a measurement, write the verdict to the ledger and return it for
    display.

    `measurement` is an Interval, a Comparison (its speed-up), a number known exactly, True or False
    (1 or 0), or a machine.Skip. The claim holds if the whole interval lies in its band, fails if
    all of it lies outside, and is inconclusive if the interval straddles an edge. Raises ClaimError
    for an unknown id, ValueError for NaN.

    >>> verdict(next(iter(registry())), machine.Skip("gpu", "there is none.")).status
    'not testable here'
    """
    claim = find(claim_id)
    if isinstance(measurement, machine.Skip):
        result = Verdict(claim, UNTESTED, None, None, None, repr(measurement))
    else:
        value, low, high = numbers(claim_id, measurement)
        scope = getattr(measurement, "scope", "")
        result = Verdict(claim, status(claim.band, low, high), value, low, high, "", scope)
    ledger.record(
        "verdict",
        claim=claim.id,
        chapter=claim.id.split(".")[0],
        statement=claim.statement,
        value=result.value,
        low=result.low,
        high=result.high,
        unit=claim.unit,
        verdict=result.status,
        reason=result.reason,
        stand_in=claim.stand_in,
        scope=result.scope,
    )
    return result


def status(band: tuple[float, float], low: float, high: float) -> str:
    """Where an interval lies with respect to a band.

    >>> status((1.8, 2.2), 1.9, 2.1), status((1.8, 2.2), 1.0, 1.7), status((1.8, 2.2), 1.7, 1.9)
    ('holds here', 'does not hold here', 'inconclusive')
    """
    if band[0] <= low and high <= band[1]:
        return HOLDS
    if high < band[0] or low > band[1]:
        return FAILS
    return OPEN


def find(claim_id: str) -> Claim:
    """The claim with this id; ClaimError naming the nearest one otherwise.

    >>> find("99.nowhere")
    Traceback (most recent call last):
    course_utils.claims.ClaimError: no claim '99.nowhere' in notebooks/claims/; did you mean ...?
    """
    known = registry()
    if claim_id not in known:
        near = difflib.get_close_matches(claim_id, known, 1, 0)
        raise ClaimError(
            f"no claim {claim_id!r} in notebooks/claims/"
            + (f"; did you mean {near[0]!r}?" if near else ".")
        )
    return known[claim_id]


@functools.cache
def registry(folder: Path = FOLDER) -> dict[str, Claim]:
    """All claims by id. Raises ClaimError for an entry that lacks a field or has one too many.

    >>> all(id == claim.id for id, claim in registry().items())
    True
    """
    claims = {}
    for path in sorted(folder.glob("[0-9][0-9].toml")):
        for name, entry in tomllib.loads(path.read_text(encoding="utf-8")).items():
            claim_id = f"{path.stem}.{name}"
            try:
                low, high = entry.pop("band")
                claims[claim_id] = Claim(id=claim_id, band=(float(low), float(high)), **entry)
            except (KeyError, TypeError, ValueError) as error:
                raise ClaimError(
                    f"{path.name}, [{name}]: {error}. A claim has statement, source, condition,"
                    " band = [low, high], and optionally unit, stand_in, estimand, can_hold,"
                    " can_fail."
                ) from error
    return claims


def numbers(claim_id: str, measurement: object) -> tuple[float, float, float]:
    """Value, low and high of whatever `verdict` takes, a Skip excepted.

    >>> numbers("99.twice", Interval(2.0, 1.9, 2.1)), numbers("99.exact", True)
    ((2.0, 1.9, 2.1), (1.0, 1.0, 1.0))
    """
    interval = getattr(measurement, "interval", measurement)
    if isinstance(interval, Interval):
        numbers = (interval.value, interval.low, interval.high)
    else:
        try:
            numbers = (float(interval),) * 3
        except (TypeError, ValueError):
            raise TypeError(
                f"{claim_id} was given a {type(measurement).__name__}; give an Interval, a"
                " Comparison, a number or a Skip."
            ) from None
    if any(math.isnan(x) for x in numbers):
        raise ValueError(
            f"{claim_id} was given {numbers}: something went wrong before the verdict."
        )
    return numbers
