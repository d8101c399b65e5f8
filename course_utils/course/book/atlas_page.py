"""The atlas as a page: machines, which technique when, and every claim with a forest plot over the
machines. It is whole without a script; static/atlas.js only hides what a filter leaves out.
"""

import html
import re
from pathlib import Path

from course_utils import claims
from course_utils.claims import WORDS, Claim
from course_utils.course import atlas
from course_utils.course.atlas import KINDS, Ledger

Titles = dict[str, tuple[str, str]]
"""By a chapter's number: its title, and the name of its page."""
SEND = """\
Run `course selftest` with nothing else running, then `make run`, then `course contribute
build/run/ledger.json`: it checks the ledger, writes one file to `datasets/ledgers/`, and says what
is missing. Open a pull request with that file.
"""


INTRO = """\
# The atlas

Every claim of the course, and what machines said about it when they measured it. A claim *holds*
where the whole interval lies in its band, *fails* where all of it lies outside, and is *open* where
it straddles an edge.
"""


def escape(text: str) -> str:
    """Text that Markdown leaves as it is."""
    return re.sub(r"([\\`*_{}\[\]<>$#|~])", r"\\\1", text)


def slug(text: str) -> str:
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")


def write(page: Path, folder: Path, titles: Titles) -> None:
    """Write the page from the ledgers in `folder`; with none it says so and has the claims."""
    ledgers = atlas.load(folder)
    parts = [
        INTRO,
        *_machines(ledgers),
        *_techniques(ledgers),
        *_claims(ledgers, titles),
        raw('<script src="_static/atlas.js" defer></script>'),
    ]
    page.write_text("\n".join(parts), encoding="utf-8")


def raw(text: str) -> str:
    return f"\n```{{raw}} html\n{text}\n```\n"


def absent(ledgers: list[Ledger]) -> str:
    """Which machines are missing, as a sentence, and how to send one; "" where none is."""
    if not (kinds := atlas.missing(ledgers)):
        return ""
    wanted = ", ".join(kinds[:-1]) + " or " * (len(kinds) > 1) + kinds[-1]
    stands = "".join(f" A capped run is not one: {one.label}." for one in ledgers if one.capped)
    return f"**No ledger yet of {wanted}.**{escape(stands)} How to send yours: {SEND}"


def _machines(ledgers: list[Ledger]) -> list[str]:
    parts = ["## Machines\n"]
    for one in ledgers:
        card = one.machine
        test = escape(card["selftest"].get("summary", ""))
        versions = ", ".join(f"{name} {version}" for name, version in card["versions"].items())
        cap = (
            f" **Capped** by {one.capped}: a lesser machine played by this one."
            if one.capped
            else ""
        )
        told = f"Of its {len(one.rows) + one.dropped} answers {one.dropped} are to questions that"
        dropped = f" {told} have been worded anew since, and are left out." if one.dropped else ""
        parts.append(
            f"**{escape(one.label)}**, measured {one.date} by commit"
            f" `{one.commit[:10]}`, profile {card['profile']}.{cap}{dropped}\n\n"
            f"{', '.join(card['isa'])}; {card['memory_gb']:g} GB; {escape(card['system'])}, Python"
            f" {card['python']}; {versions}. Self-test {test}\n"
        )
    if not ledgers:
        parts.append("No machine has sent its ledger yet.\n")
    return [*parts, absent(ledgers)]


def _techniques(ledgers: list[Ledger]) -> list[str]:
    """Which technique when; with several machines a reader chooses whose verdicts are shown."""
    parts = ["\n## Which technique when\n"]
    if ledgers:
        options = "".join(
            f'<option value="{one.name}">{html.escape(one.label)}</option>' for one in ledgers
        )
        parts.append(
            raw(
                '<p class="filters"><label>Machine <select id="machine">'
                f"{options}</select></label></p>"
            )
        )
    for name, entry in atlas.techniques().items():
        lines = [f"**{name}** ({', '.join(entry['chapters'])})\n"]
        lines.append(f"Try it when {entry['try_when']}. Leave it when {entry['leave_when']}.\n")
        for claim in (claims.find(i) for i in entry["claims"]):
            badges = "".join(_badge(one, claim) for one in ledgers)
            lines.append(raw(f'<p class="promise">{badges} {html.escape(claim.statement)}</p>'))
        parts.append(f"::::{{container}} technique\n{chr(10).join(lines)}\n::::\n")
    return parts


def _badge(one: Ledger, claim: Claim) -> str:
    verdict = one.verdict(claim)
    word = WORDS[verdict.status] if verdict else "not run"
    kind = f" v-{slug(word)}"
    return f'<span class="badge{kind}" data-machine="{one.name}">{word}</span>'


def _claims(ledgers: list[Ledger], titles: Titles) -> list[str]:
    parts = ["\n## Claims\n", raw(_filters(ledgers))]
    used: dict[str, list[str]] = {}
    for name, entry in atlas.techniques().items():
        for claim in entry["claims"]:
            used.setdefault(claim, []).append(slug(name))
    chapter = ""
    for claim in claims.registry().values():
        if claim.id[:2] != chapter:
            chapter = claim.id[:2]
            title, page = titles[chapter]
            parts.append(f"### {title}\n\nThe chapter: [{title}]({page}).\n")
        parts.append(_claim(claim, ledgers, used.get(claim.id, [])))
    return parts


def _claim(claim: Claim, ledgers: list[Ledger], used: list[str]) -> str:
    """One claim: what is said, by whom, under which condition, what is estimated, and the plot."""
    classes = " ".join(["claim", *(f"t-{name}" for name in used)])
    stand_in = f" On a stand-in: {escape(claim.stand_in)}." if claim.stand_in else ""
    band = claims.Verdict(claim, claims.OPEN, None, None, None, "").band()
    return (
        f"(claim-{slug(claim.id)})=\n::::{{container}} {classes}\n"
        f"**{escape(claim.statement)}**\n\nSource: {escape(claim.source)}\n\n"
        f"Condition: {escape(claim.condition)}.{stand_in}\n\n"
        f"Estimated: {escape(claim.estimand)}. It holds for {escape(band)}.\n"
        f"{raw(forest(claim, ledgers))}::::\n"
    )


def forest(claim: Claim, ledgers: list[Ledger]) -> str:
    """A row a machine: its name, its number and verdict as text, and the interval on the band."""
    verdicts = [(one, verdict) for one in ledgers if (verdict := one.verdict(claim))]
    axis = atlas.scale(claim, [verdict for _, verdict in verdicts])
    left, right = (axis.at(edge) for edge in claim.band)
    band = f'<i class="band" style="left:{left:.1f}%;width:{right - left:.1f}%"></i>'
    rows = []
    for one, verdict in verdicts:
        word = WORDS[verdict.status]
        track = ""
        if verdict.value is not None:
            low, point, high = (axis.at(x) for x in (verdict.low, verdict.value, verdict.high))
            track = (
                f'<div class="track" aria-hidden="true">{band}<i class="interval"'
                f' style="left:{low:.1f}%;width:{high - low:.1f}%"></i>'
                f'<i class="point" style="left:{point:.1f}%"></i></div>'
            )
        rows.append(
            f'<li class="machine" data-kind="{one.kind}" data-verdict="{slug(word)}">'
            f'<span class="badge v-{slug(word)}">{word}</span> {html.escape(one.label)}:'
            f" <b>{html.escape(verdict.measured())}</b>{track}</li>"
        )
    if not rows:
        return "<p>Not measured yet.</p>"
    ends = f"The line runs from {axis.end(0):.3g} to {axis.end(1):.3g} {claim.unit}".rstrip()
    kind = ", logarithmic" if axis.logarithmic else ""
    legend = (
        f'<p class="axis"><small>{html.escape(ends)}{kind}; it is shaded where the claim holds.'
    )
    return f'<ul class="forest">{"".join(rows)}</ul>{legend}</small></p>'


def _filters(ledgers: list[Ledger]) -> str:
    """Three lists to choose from, and how many claims are left."""
    kinds = sorted({one.kind for one in ledgers}, key=list(KINDS).index)
    lists = {
        "technique": [("t-" + slug(name), name) for name in atlas.techniques()],
        "kind": [(kind, KINDS[kind]) for kind in kinds],
        "verdict": [(slug(word), word) for word in WORDS.values()],
    }
    labels = {"technique": "Technique", "kind": "Processor", "verdict": "Verdict"}
    fields = "".join(
        f'<label>{labels[name]} <select id="filter-{name}"><option value="">all</option>'
        + "".join(f'<option value="{value}">{html.escape(text)}</option>' for value, text in rows)
        + "</select></label> "
        for name, rows in lists.items()
    )
    return (
        f'<form id="filters" class="filters">{fields}</form>'
        '<p id="shown" role="status" aria-live="polite"></p>'
    )
