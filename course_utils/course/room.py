"""The ledgers of a room on one page: who predicted what, what each machine said, where machines
disagree, and what the disagreement goes with.
"""

import html
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from course_utils import claims
from course_utils.claims import FAILS, HOLDS, WORDS
from course_utils.course import atlas
from course_utils.course.book import guess_page
from course_utils.course.chapters import UsageError
from course_utils.course.grading import pages, submissions
from course_utils.course.progress import within_two

DECIDED = (HOLDS, FAILS)
WIDE = 640
"""Pixels of a picture of guesses."""


@dataclass
class Learner:
    """One learner's ledger: the machine's card, the last verdict of each claim, the last prediction
    of each question.
    """

    name: str
    machine: dict = field(default_factory=dict)
    verdicts: dict[str, str] = field(default_factory=dict)
    predictions: dict[str, tuple[float, float, str]] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What decides about INT8 and bf16 on the machine, and the cap under which it ran."""
        if not self.machine:
            return "a machine without a card"
        caps = self.machine.get("caps", {})
        capped = "".join(f", capped by {name}={cap}" for name, cap in caps.items())
        return atlas.KINDS[atlas.kind(self.machine)] + capped


def gather(source: Path) -> tuple[list[Learner], list[str]]:
    """All learners of a folder or zip with a ledger in it, and what was odd: the same folder that
    `course grade` takes, or one with a file NAME.jsonl a learner. UsageError where there is none.
    """
    found, (handed_in, odd) = [], submissions.read(source)
    names = [one.name for one in handed_in]
    for one in handed_in:
        called = one.name if names.count(one.name) == 1 else one.key
        for path, data in sorted(one.ledgers.items()):
            learner, broken = read(called, data)
            if broken:
                odd.append(f"{called}: {broken} lines of {path} are no whole events")
            if learner.verdicts or learner.predictions:
                found.append(learner)
                break
        else:
            odd.append(f"{called}: no ledger with a verdict or a prediction in it")
    if not found:
        raise UsageError(
            f"{source} holds no ledger: let learners hand in their workbook as a zip, or its"
            " ledger.jsonl under their name."
        )
    return found, odd


def read(name: str, data: bytes) -> tuple[Learner, int]:
    """A learner's ledger, and how many lines were left out because they say nothing."""
    learner, broken = Learner(name), 0
    for line in data.splitlines():
        if line.strip():
            try:
                _take(learner, json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                broken += 1
    return learner, broken


def _take(learner: Learner, event: dict) -> None:
    if event["event"] == "card":
        card = event["machine"]
        named = [*card["isa"], card["architecture"]]
        if not all(isinstance(x, str) for x in named) or not all(
            isinstance(card.get(field, {}), dict) for field in ("caps", "versions")
        ):
            raise ValueError("no machine's card")
        learner.machine = card
    elif event["event"] == "verdict":
        if event["verdict"] not in WORDS or not isinstance(event["claim"], str):
            raise ValueError("no verdict")
        learner.verdicts[event["claim"]] = event["verdict"]
    elif event["event"] == "prediction" and isinstance(event["guess"], int | float):
        pair = float(event["guess"]), float(event["measured"])
        if not all(map(math.isfinite, pair)) or not isinstance(event["question"], str):
            raise ValueError("no numbers")
        learner.predictions[event["question"]] = (*pair, str(event.get("unit", "")))


def write(source: Path, folder: Path) -> Path:
    """Write class.html into `folder`, whole or not at all; its path."""
    learners, odd = gather(source)
    target = folder / "class.html"
    part = folder / "class.html.part"
    part.write_text(page(learners, odd), encoding="utf-8")
    part.replace(target)
    return target


def page(learners: list[Learner], odd: list[str]) -> str:
    """The whole page; it needs nothing from elsewhere."""
    body = _room(learners) + _predictions(learners) + _disagreements(learners) + _claims(learners)
    if odd:
        body += (
            "<h2>Not on this page</h2><ul>" + "".join(f"<li>{_e(o)}</li>" for o in odd) + "</ul>"
        )
    return pages.page("What the room measured", body)


def _e(text: object) -> str:
    return html.escape(str(text))


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells are HTML; the first of a row names it."""
    out = "<div class='wide'><table><thead><tr>"
    out += "".join(f"<th scope='col'>{h}</th>" for h in head) + "</tr></thead><tbody>"
    for first, *rest in rows:
        out += f"<tr><th scope='row'>{first}</th>{''.join(f'<td>{c}</td>' for c in rest)}</tr>"
    return out + "</tbody></table></div>"


def _room(learners: list[Learner]) -> str:
    by_kind: dict[str, list[str]] = defaultdict(list)
    for one in learners:
        by_kind[one.kind].append(one.name)
    rows = [(_e(k), str(len(names)), _e(", ".join(names))) for k, names in by_kind.items()]
    head = ("processor", "learners", "who")
    return f"<h2>The machines</h2>{_table(head, rows)}"


def _predictions(learners: list[Learner]) -> str:
    asked = sorted({question for one in learners for question in one.predictions})
    out = "<h2>Who predicted what</h2>"
    if not asked:
        return out + "<p>Nobody has predicted a number that came out.</p>"
    out += "<p>A ring is a learner's guess, a bar what that learner's machine measured.</p>"
    for question in asked:
        made = {o.name: o.predictions[question] for o in learners if question in o.predictions}
        near = sum(within_two(guess, measured) for guess, measured, _ in made.values())
        unit = next(iter(made.values()))[2]
        middle = [statistics.median(pair[i] for pair in made.values()) for i in (0, 1)]
        out += (
            f"<h3>{_e(question)}</h3><p>{len(made)} guessed, {near} within a factor of two. Median"
            f" guess {middle[0]:.3g} {_e(unit)}, median measurement {middle[1]:.3g} {_e(unit)}.</p>"
            f"{_strip(made, unit)}"
        )
    return out


def _strip(made: dict[str, tuple[float, float, str]], unit: str) -> str:
    """Guesses and measurements on one axis as a picture."""
    numbers = [x for guess, measured, _ in made.values() for x in (guess, measured)]
    logarithmic = min(numbers) > 0 and max(numbers) > 5 * min(numbers)
    ends = [math.log(x) if logarithmic else x for x in (min(numbers), max(numbers))]
    span = (ends[1] - ends[0]) or 1.0

    def at(x: float) -> float:
        return 40 + (WIDE - 80) * ((math.log(x) if logarithmic else x) - ends[0]) / span

    marks = ""
    for i, (name, (guess, measured, _)) in enumerate(made.items()):
        y = 14 + 5 * (i % 4)
        marks += (
            f"<line x1='{at(measured):.1f}' x2='{at(measured):.1f}' y1='8' y2='36'"
            " stroke='currentColor' stroke-opacity='.5' stroke-width='2'/>"
            f"<circle cx='{at(guess):.1f}' cy='{y}' r='4' fill='none' stroke='currentColor'>"
            f"<title>{_e(name)}: {guess:.3g}</title></circle>"
        )
    text = "".join(
        f"<text x='{at(x):.1f}' y='54' font-size='12' text-anchor='middle' fill='currentColor'>"
        f"{x:.3g}</text>"
        for x in dict.fromkeys((min(numbers), max(numbers)))
    )
    told = "; ".join(f"{n} guessed {g:.3g}, measured {m:.3g}" for n, (g, m, _) in made.items())
    return (
        f"<svg role='img' aria-label='{_e(told)} {_e(unit)}' viewBox='0 0 {WIDE} 60' width='{WIDE}'"
        f" style='max-width:100%'>{marks}{text}</svg>"
    )


def _disagreements(learners: list[Learner]) -> str:
    out, why = "<h2>Where machines disagree</h2>", guess_page.reasons()
    rows = []
    for claim, said in _said(learners):
        if {said[one.name] for one in learners if one.name in said} >= set(DECIDED):
            known = claims.registry().get(claim)
            who = [
                f"{WORDS[word]}: {_e(', '.join(n for n, v in said.items() if v == word))}"
                for word in DECIDED
            ]
            rows.append(
                (
                    f"{_e(claim)}<br><small>{_e(known.statement) if known else ''}</small>",
                    "<br>".join(who),
                    _e(goes_with(learners, said)),
                    _e(why.get(claim, "")),
                )
            )
    if not rows:
        return out + "<p>Nowhere: no claim holds on one machine and fails on another.</p>"
    return out + _table(("claim", "who", "it goes with", "what decides"), rows)


SPLITS: tuple[tuple[str, Callable[[Learner], str]], ...] = (
    ("the instruction set", lambda one: one.kind),
    ("the number of cores", lambda one: str(one.machine.get("cores", "?"))),
    ("torch's version", lambda one: str(one.machine.get("versions", {}).get("torch", "?"))),
)


def goes_with(learners: list[Learner], said: dict[str, str]) -> str:
    """The first property of the machines that separates those on which a claim holds from those on
    which it fails; or that there is none among those known.
    """
    decided = [one for one in learners if said.get(one.name) in DECIDED]
    for what, of in SPLITS:
        groups: dict[str, set[str]] = defaultdict(set)
        for one in decided:
            groups[of(one)].add(said[one.name])
        if all(len(words) == 1 for words in groups.values()):
            told = "; ".join(f"{WORDS[words.pop()]} with {name}" for name, words in groups.items())
            few = " One machine a side: it may be chance." if len(decided) == 2 else ""
            return f"{what}: {told}.{few}"
    return (
        "none of: " + ", ".join(what for what, _ in SPLITS) + ". Machines alike in these said"
        " different things: compare their intervals, and run both again."
    )


def _said(learners: list[Learner]) -> Iterator[tuple[str, dict[str, str]]]:
    """(claim, {learner: verdict}) of each claim that anybody measured."""
    for claim in sorted({c for one in learners for c in one.verdicts}):
        yield claim, {o.name: o.verdicts[claim] for o in learners if claim in o.verdicts}


def _claims(learners: list[Learner]) -> str:
    kinds = list(dict.fromkeys(one.kind for one in learners))
    rows = []
    for claim, said in _said(learners):
        cells = []
        for kind in kinds:
            words = [said[o.name] for o in learners if o.kind == kind and o.name in said]
            cells.append(", ".join(f"{words.count(w)} {WORDS[w]}" for w in WORDS if w in words))
        known = claims.registry().get(claim)
        statement = f"<br><small>{_e(known.statement)}</small>" if known else ""
        rows.append((f"{_e(claim)}{statement}", *map(_e, cells)))
    if not rows:
        return "<h2>Every claim</h2><p>No verdict yet.</p>"
    return f"<h2>Every claim</h2>{_table(('claim', *map(_e, kinds)), rows)}"
