"""Guess first: a game that needs no kernel and no server. The page carries its data itself."""

import html
import json
import math
import tomllib
from pathlib import Path

from course_utils import claims
from course_utils.claims import FAILS, HOLDS, WORDS, Claim
from course_utils.course import atlas
from course_utils.course.atlas import Ledger
from course_utils.course.book.atlas_page import SEND, Titles, absent, raw, slug

REASONS = Path(__file__).with_name("reasons.toml")
DRAWN = 10
INTRO = """\
# Guess first

You get ten claims of the course. For each you say whether it holds on the machine that you choose,
and how sure you are; where there is a number you may guess that, too. Then you see what was
measured, and why. At the end stand your score, and whether you were as right as you were sure.
"""
ASIDE = """
The numbers come from [the atlas](atlas.md). Answer with the keyboard if you like: the tab key
moves, the arrows choose, Enter answers. Nothing that you enter leaves this page.
"""


def write(page: Path, folder: Path, titles: Titles) -> None:
    """Write the page from the ledgers in `folder`; with none it says that there is none."""
    ledgers = atlas.load(folder)
    game = data(ledgers, titles)
    if any(machine["decided"] for machine in game["machines"]):
        text = json.dumps(game, ensure_ascii=False).replace("</", "<\\/")
        play = raw(
            f'<div id="guess"><noscript>This page needs JavaScript.</noscript></div>\n'
            f'<script type="application/json" id="guess-data">{text}</script>\n'
            '<script src="_static/guess.js" defer></script>'
        )
    else:
        play = f"\n**There is nothing to guess yet: no machine has sent its ledger.** {SEND}\n"
    gaps = absent(ledgers) if ledgers else ""
    page.write_text(f"{INTRO}{play}{ASIDE}\n{gaps}", encoding="utf-8")


def data(ledgers: list[Ledger], titles: Titles) -> dict:
    """What the script plays with: machines, and the claims that a machine decided, each with what
    all machines measured.
    """
    why, machines, found = reasons(), [], []
    for one in ledgers:
        rows = [one.verdict(claims.find(name)) for name in one.rows]
        decided = [v.claim.id for v in rows if v and v.status in (HOLDS, FAILS)]
        machines.append({"name": one.name, "label": one.label, "decided": decided})
    for claim in claims.registry().values():
        if any(claim.id in machine["decided"] for machine in machines):
            found.append(_question(claim, ledgers, titles, why.get(claim.id, "")))
    return {"draw": DRAWN, "machines": machines, "claims": found}


def reasons() -> dict[str, str]:
    """By claim, what decides about it, in a sentence that is true whichever way it came out."""
    return tomllib.loads(REASONS.read_text(encoding="utf-8"))


def _question(claim: Claim, ledgers: list[Ledger], titles: Titles, reason: str) -> dict:
    title, page = titles[claim.id[:2]]
    said = {}
    for one in ledgers:
        if verdict := one.verdict(claim):
            number = verdict.value
            said[one.name] = {
                "word": WORDS[verdict.status],
                "kind": slug(WORDS[verdict.status]),
                "text": verdict.measured(),
                "value": number if number is not None and math.isfinite(number) else None,
            }
    return {
        "id": claim.id,
        "statement": claim.statement,
        "source": claim.source,
        "condition": claim.condition,
        "band": claims.Verdict(claim, claims.OPEN, None, None, None, "").band(),
        "unit": claim.unit,
        "stand_in": claim.stand_in,
        "reason": reason,
        "chapter": html.unescape(title),
        "page": f"{Path(page).stem}.html",
        "said": said,
    }
