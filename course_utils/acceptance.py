"""What an acceptance says, and the page that is handed in. How a verdict is found is chapter 16's.

against("file", Interval(90, 90, 90), 100, "kB")  # a Requirement: met, missed or undecided
Trial("reference", (…requirements…)).verdict      # accepted, rejected or undecided
page("Acceptance", ["…"], trials, pictures)       # one HTML file without a link to elsewhere
"""

import base64
import html
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from course_utils import machine
from course_utils.measure import Interval

PROGRAM = Path(__file__).parent / "programs" / "sorter.py"
"""The service that is accepted, for `serving.server`."""
MET, MISSED, UNDECIDED, UNTRIED = "met", "missed", "undecided", "not tried"
_RANK = {MISSED: 0, UNDECIDED: 1, UNTRIED: 2, MET: 3}


@dataclass(frozen=True)
class Requirement:
    """One line of a brief, *at most* `limit`, against what was measured.

    >>> Requirement("file", 90.0, 100.0, "kB", "met").used
    0.9
    """

    name: str
    measured: float
    limit: float
    unit: str
    verdict: str  # "met", "missed", "undecided" or "not tried"

    def __post_init__(self) -> None:
        if self.verdict not in _RANK:
            raise ValueError(f"verdict is {self.verdict!r}; it must be one of {', '.join(_RANK)}.")
        if not self.limit > 0:
            raise ValueError(f"the limit of {self.name} is {self.limit}; it must be above 0.")

    @property
    def used(self) -> float:
        """The share of the budget that is used: above 1 is too much, NaN where it was not tried."""
        return self.measured / self.limit

    @property
    def seen(self) -> str:
        """What was measured, to be read; a dash where nothing was."""
        return "–" if self.verdict == UNTRIED else f"{self.measured:.4g}"


def against(name: str, measured: Interval, limit: float, unit: str) -> Requirement:
    """A requirement from an interval: met if all of it is within the limit, missed if none is.

    >>> against("accuracy lost", Interval(2.5, 1.5, 3.5), 3, "points").verdict
    'undecided'
    """
    outside = measured.low > limit
    verdict = MET if measured.high <= limit else MISSED if outside else UNDECIDED
    return Requirement(name, measured.value, limit, unit, verdict)


def untried(name: str, limit: float, unit: str) -> Requirement:
    """A requirement that was not tried, because another one was missed before.

    >>> untried("late", 5, "%").verdict
    'not tried'
    """
    return Requirement(name, float("nan"), limit, unit, UNTRIED)


@dataclass(frozen=True)
class Trial:
    """A deployment against a brief. One requirement decides, `decided_by`: of those missed, or else
    undecided, or else met, the one that uses most of its budget.

    >>> file = Requirement("file", 123.0, 158.0, "kB", "met")
    >>> Trial("today", (file, Requirement("late", 4.0, 5.0, "%", "undecided")))
    today: undecided, by late
      file               123 of    158 kB      met
      late                 4 of      5 %       undecided
    """

    name: str
    requirements: tuple[Requirement, ...]
    images: str = "validation"  # which ones its accuracy was judged on

    @property
    def verdict(self) -> str:
        said = {r.verdict for r in self.requirements}
        if MISSED in said:
            return "rejected"
        return "accepted" if said == {MET} else "undecided"

    @property
    def decided_by(self) -> Requirement:
        worst = min(_RANK[r.verdict] for r in self.requirements)
        rivals = [r for r in self.requirements if _RANK[r.verdict] == worst]
        return max(rivals, key=lambda r: r.used)

    def __repr__(self) -> str:
        return "\n".join(
            [
                f"{self.name}: {self.verdict}, by {self.decided_by.name}",
                *(
                    f"  {r.name:14} {r.seen:>7} of {r.limit:6.4g} {r.unit:7} {r.verdict}"
                    for r in self.requirements
                ),
            ]
        )


@dataclass
class Pictures:
    """Figures that are shown and kept for the page: {name: (PNG, alternative text)}.

    >>> from course_utils import plots
    >>> pictures = Pictures()
    >>> pictures.show("empty", plots.axes("x", "y", title="Nothing yet")[0], "An empty figure.")
    Figure: An empty figure.
    >>> list(pictures.kept)
    ['empty']
    """

    kept: dict[str, tuple[bytes, str]] = field(default_factory=dict)

    def show(self, name: str, figure: Figure, alt: str) -> None:
        """Show a figure as `plots.show` does, and keep it under `name`."""
        from course_utils import plots

        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", bbox_inches="tight", metadata={"Software": None})
        self.kept[name] = buffer.getvalue(), alt
        plots.show(figure, alt)


_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
td,th{border:1px solid #888;padding:.3rem .6rem;text-align:left}
table{border-collapse:collapse}img{max-width:100%;background:#fff}
:root{color-scheme:light dark}"""


def page(
    title: str,
    facts: Iterable[str],
    trials: Iterable[Trial],
    pictures: Mapping[str, tuple[bytes, str]],
) -> str:
    """One HTML page: the brief's sentences, a row for each trial, the figures, and the machine.

    >>> file = Requirement("file", 90.0, 100.0, "kB", "met")
    >>> "<b>accepted</b>" in page("Acceptance", ["For <you>."], [Trial("mine", (file,))], {})
    True
    """
    trials = list(trials)
    told = "".join(f"<p>{html.escape(fact)}</p>" for fact in facts)
    names = trials[0].requirements if trials else ()
    heads = ["deployment", "verdict", "decided by", "images"]
    heads += [f"{r.name}, at most {r.limit:.3g} {r.unit}" for r in names]
    head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in heads)
    rows = "".join(f"<tr>{''.join(map(_cell, _row(trial)))}</tr>" for trial in trials)
    figures = "".join(
        f'<img alt="{html.escape(alt)}"'
        f' src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for png, alt in pictures.values()
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{told}"
        f"<table><tr>{head}</tr>{rows}</table>{figures}"
        f"<h2>Machine</h2>{machine.card()._repr_html_()}</html>"
    )


def _row(trial: Trial) -> list[tuple[str, str]]:
    """(text, what stands below it) of each cell."""
    found = [(f"{r.measured:.3g} {r.unit}", r.verdict) for r in trial.requirements]
    return [
        (trial.name, ""),
        (trial.verdict, "b"),
        (trial.decided_by.name, ""),
        (trial.images, ""),
    ] + [(text, verdict) for text, verdict in found]


def _cell(content: tuple[str, str]) -> str:
    text, below = html.escape(content[0]), content[1]
    if below == "b":
        return f"<td><b>{text}</b></td>"
    return f"<td>{text}{f'<br><small>{below}</small>' if below else ''}</td>"
