"""Figures in one style: labelled axes with units, a title that states the finding, an alternative
text.

A function shows its figure and returns nothing, but for `axes` and `verdicts`, whose figure is
finished with `show`, and `explore`, which returns a figure with sliders.
"""

import io
import os
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from course_utils.measure.stats import Interval
from course_utils.sliders import as_html, explore

__all__ = ["COLOURS", "MARKERS", "axes", "bars", "explore", "intervals", "lines", "plain_log"]
__all__ += ["seeds", "show", "verdicts"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette (2008), told apart with every common form of colour blindness."""
MARKERS = "osD^vPX"
_STYLE = {
    "figure.dpi": 110,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.prop_cycle": mpl.cycler(color=COLOURS),
    "legend.frameon": False,
}


def axes(
    x: str, y: str, *, title: str, columns: int = 1, height: float = 3.4
) -> tuple[Figure, "Axes | np.ndarray"]:
    """An empty figure in the course's style, 6.4 inches wide; finish it with `show`.

    >>> figure, ax = axes("batch", "latency (ms)", title="It grows with the batch")
    >>> _ = ax.plot([1, 2, 4], [3, 5, 9])
    >>> show(figure, "A line that rises from 3 to 9 ms.")
    Figure: A line that rises from 3 to 9 ms.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.4 if columns == 1 else 8.4, height), layout="constrained")
        panels = figure.subplots(1, columns)
        for panel in np.atleast_1d(panels):
            panel.set(xlabel=x, ylabel=y)
        if columns == 1:
            panels.set_title(title, wrap=True)
        else:
            figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure, panels


def show(figure: Figure, alt: str) -> None:
    """Display a figure with its alternative text, for screen readers and for whoever reads the
    notebook as text. Outside a notebook, the text alone is printed.

    Front ends drop the text of a plain picture, so the figure is also an HTML image that carries
    it; with COURSE_FIGURES=png it is not: so the pages that the course ships are half as large.

    >>> figure, _ = axes("n", "seconds", title="Nothing yet")
    >>> show(figure, "An empty figure.")
    Figure: An empty figure.
    """
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.display import display

    if not alt.strip():
        raise ValueError(
            "a figure needs an alternative text: one sentence that says what it shows."
        )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", metadata={"Software": None})
    if not InteractiveShell.initialized():  # a plain program: there is nothing to draw on
        print(f"Figure: {alt}")
        return
    bundle = {"image/png": buffer.getvalue(), "text/plain": f"Figure: {alt}"}
    if os.environ.get("COURSE_FIGURES") != "png":
        bundle["text/html"] = as_html(buffer.getvalue(), alt)
    display(bundle, raw=True, metadata={"image/png": {"alt": alt}})


def plain_log(axis: Axis) -> None:
    """A logarithmic axis with plain numbers (0.5, 20) at 1, 2 and 5 times each power of ten, not 2
    × 10⁰; at the powers alone where the data span so many that the labels would touch.

    >>> _, ax = axes("n", "seconds", title="")
    >>> plain_log(ax.yaxis)
    >>> ax.get_yscale()
    'log'
    """
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    low, high = axis.get_data_interval()
    crowded = axis.axis_name == "x" and low > 0 and high / low > 2000
    axis.set_major_locator(LogLocator(subs=(1,) if crowded else (1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def lines(
    x: Sequence[float],
    series: Mapping[str, Sequence],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    alt: str,
    logx: bool = False,
    logy: bool = False,
    reference: tuple[float, str] | None = None,
) -> None:
    """One line a series over `x`; a value may be an Interval, whose ends are drawn. `reference` is
    (height, label).

    >>> times = [Interval(2.0, 1.9, 2.1), Interval(3.9, 3.7, 4.2)]
    >>> lines([1, 2], {"fp32": times}, xlabel="n", ylabel="ms", title="It rises", alt="A line.")
    Figure: A line.
    """
    figure, ax = axes(xlabel, ylabel, title=title)
    for i, (name, values) in enumerate(series.items()):
        middle, low, high = _ends(values)
        marker = MARKERS[i % len(MARKERS)] if len(middle) <= 40 else None
        ax.plot(x, middle, marker=marker, markersize=4, color=COLOURS[i % len(COLOURS)], label=name)
        if (high > low).any():
            ax.fill_between(x, low, high, color=COLOURS[i % len(COLOURS)], alpha=0.18, linewidth=0)
    if reference:
        ax.axhline(reference[0], color="0.4", linestyle="--", linewidth=1, label=reference[1])
    for axis, is_log in ((ax.xaxis, logx), (ax.yaxis, logy)):
        if is_log:
            plain_log(axis)
    numbers = np.asarray(x)
    if not logx and numbers.dtype.kind in "iuf" and (numbers == numbers.round()).all():
        ax.xaxis.get_major_locator().set_params(integer=True)  # there is no call number 2.5
    if len(series) > 3:  # inside, so many names would cover a line
        figure.legend(loc="outside lower center", ncols=2)
    elif len(series) > 1 or reference:
        ax.legend()
    show(figure, alt)


def bars(
    values: Mapping[str, "Interval | float"],
    *,
    xlabel: str,
    title: str,
    alt: str,
    reference: tuple[float, str] | None = None,
    logx: bool = False,
) -> None:
    """Horizontal bars, the first on top, with intervals where given. `xlabel` names the quantity
    and its unit.

    >>> bars({"fp32": 4.0, "int8": 1.0}, xlabel="MB", title="A quarter", alt="Bars of 4 and 1 MB.")
    Figure: Bars of 4 and 1 MB.
    """
    figure, ax = axes(xlabel, "", title=title, height=0.42 * len(values) + 1.3)
    middle, low, high = _ends(list(values.values()))
    rows = np.arange(len(values))
    ax.barh(rows, middle, color=COLOURS[0], height=0.62)
    ax.errorbar(
        middle, rows, xerr=[middle - low, high - middle], fmt="none", ecolor="black", capsize=3
    )
    for row, value, end in zip(rows, middle, high, strict=True):
        ax.annotate(
            f"{value:.3g}", (end, row), xytext=(5, 0), textcoords="offset points", va="center"
        )
    if reference:
        ax.axvline(reference[0], color="0.4", linestyle="--", linewidth=1, label=reference[1])
        ax.legend()
    ax.set_yticks(rows, list(values))
    if logx:
        plain_log(ax.xaxis)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.margins(x=0.12)
    show(figure, alt)


def intervals(
    values: Mapping[str, Interval],
    *,
    xlabel: str,
    title: str,
    alt: str,
    same: tuple[float, float] | None = (1 / 1.03, 1.03),
) -> None:
    """Point and interval a row, with the band in which two arms count as the same and a line at
    1.

    >>> ratios = {"int8": Interval(2.0, 1.9, 2.1), "bf16": Interval(1.0, 0.98, 1.02)}
    >>> intervals(ratios, xlabel="speed-up", title="int8 wins", alt="int8 at 2, bf16 at 1.")
    Figure: int8 at 2, bf16 at 1.
    """
    figure, ax = axes(xlabel, "", title=title, height=0.42 * len(values) + 1.3)
    if same:
        ax.axvspan(*same, color="0.85", label="the same, within ±3%")
        ax.axvline(1, color="0.4", linewidth=1)
    middle, low, high = _ends(list(values.values()))
    rows = np.arange(len(values))
    ax.errorbar(
        middle, rows, xerr=[middle - low, high - middle], fmt="o", color=COLOURS[0], capsize=4
    )
    ax.set_yticks(rows, list(values))
    ax.set_ylim(len(values) - 0.5, -0.5)
    ax.grid(visible=False, axis="y")
    if same:
        figure.legend(loc="outside lower center", fontsize=8)
    show(figure, alt)


def seeds(
    groups: Mapping[str, Sequence[float]], *, ylabel: str, title: str, alt: str, paired: bool = True
) -> None:
    """Every run as a point, one column a group; the same seed's points are joined, because runs are
    compared pairwise.

    >>> runs = {"plain": [90.1, 90.4], "smoothed": [90.6, 90.7]}
    >>> seeds(runs, ylabel="accuracy (%)", title="Smoothing helps", alt="Two columns of points.")
    Figure: Two columns of points.
    """
    figure, ax = axes("", ylabel, title=title)
    table = np.asarray(list(groups.values()), dtype=float)
    if paired:
        ax.plot(range(len(groups)), table, color="0.75", linewidth=0.8, zorder=1)
    for i, values in enumerate(table):
        ax.scatter([i] * len(values), values, color=COLOURS[i % len(COLOURS)], zorder=2, s=24)
        ax.hlines(values.mean(), i - 0.18, i + 0.18, color="black", linewidth=1.5, zorder=3)
    ax.set_xticks(range(len(groups)), list(groups))
    ax.margins(x=0.15)
    show(figure, alt)


def verdicts(rows: Sequence[Mapping]) -> Figure:
    """One row a chapter, one square a claim, from a ledger's rows (`ledger.verdicts()` or a
    ledger.json); show it with `show`.

    >>> figure = verdicts([{"claim": "01.a", "verdict": "holds here"}])
    >>> figure.axes[0].get_title("left")
    '1 claims on this machine: 1 hold'
    """
    from course_utils import claims

    by_chapter: dict[str, list[str]] = {i.split(".")[0]: [] for i in claims.registry()}
    for row in sorted(rows, key=lambda row: row["claim"]):
        by_chapter.setdefault(row["claim"].split(".")[0], []).append(row["verdict"])
    total = [v for found in by_chapter.values() for v in found]
    words = {
        claims.HOLDS: "hold",
        claims.FAILS: "do not hold",
        claims.OPEN: "inconclusive",
        claims.UNTESTED: "not testable",
    }
    said = ", ".join(f"{total.count(v)} {word}" for v, word in words.items() if v in total)
    figure, ax = axes(
        "",
        "chapter",
        title=f"{len(total)} claims on this machine: {said or 'none yet'}",
        height=0.24 * len(by_chapter) + 1.1,
    )
    letter = {claims.HOLDS: "✓", claims.FAILS: "✗", claims.OPEN: "?", claims.UNTESTED: "–"}
    for y, found in enumerate(by_chapter.values()):
        for x, verdict in enumerate(found):
            ax.add_patch(Rectangle((x, y), 0.9, 0.85, color=claims.FILLS[verdict]))
            ax.text(x + 0.45, y + 0.45, letter[verdict], ha="center", va="center", fontsize=8)
    ax.set(xlim=(0, max(14, *map(len, by_chapter.values()))), ylim=(len(by_chapter), 0))
    ax.set_yticks([y + 0.45 for y in range(len(by_chapter))], list(by_chapter), fontsize=8)
    ax.set_xticks([])
    ax.grid(visible=False)
    ax.tick_params(length=0)
    key = [Rectangle((0, 0), 1, 1, color=fill) for fill in claims.FILLS.values()]
    figure.legend(
        key,
        [f"{letter[v]} {v}" for v in claims.WORDS],
        loc="outside lower center",
        ncols=4,
        fontsize=8,
    )
    return figure


def _ends(values: Sequence["Interval | float"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    triples = [
        (v.value, v.low, v.high) if isinstance(v, Interval) else (float(v),) * 3 for v in values
    ]
    middle, low, high = np.array(triples, dtype=float).reshape(-1, 3).T
    return middle, low, high
