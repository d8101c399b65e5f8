"""README's opening: five claims with what a machine of the atlas measured, and the picture of all.

`python -m course_utils.course.front` writes both anew.
"""

import sys
from pathlib import Path

from course_utils import ROOT, claims
from course_utils.claims import FAILS, HOLDS
from course_utils.course import atlas, report
from course_utils.course.atlas import Ledger
from course_utils.course.chapters import NOTEBOOKS, UsageError, chapters

SHOWN = (
    "01.fewer_macs_proportionally_faster",
    "03.pruning_beats_training_small",
    "06.two_to_three_times_faster",
    "06.dynamic_always_faster",
    "16.service_gains_what_the_model_gains",
)
README = ROOT / "README.md"
PICTURE = NOTEBOOKS / "images" / "claims.png"
BEGIN, END = "<!-- front -->", "<!-- /front -->"


def chosen(folder: Path = atlas.FOLDER) -> Ledger:
    """The ledger that the README quotes: the newest of an uncapped machine. UsageError without."""
    found = [one for one in atlas.load(folder) if not one.capped]
    if not found:
        raise UsageError(f"{folder} holds no ledger of an uncapped machine: `course contribute`.")
    return max(found, key=lambda one: (one.date, one.name))


def text(ledger: Ledger) -> str:
    """What stands between the marks. UsageError where the ledger did not decide one of SHOWN."""
    lines = ["| what people say | on this machine | measured |", "|---|---|---|"]
    titles = {chapter.number: chapter for chapter in chapters()}
    for name in SHOWN:
        claim = claims.find(name)
        verdict = ledger.verdict(claim)
        if verdict is None or verdict.status not in (HOLDS, FAILS):
            raise UsageError(f"{ledger.name} has not decided {name}: choose another claim to show.")
        chapter = titles[name[:2]]
        where = f"[{chapter.number}](notebooks/{chapter.name}.ipynb)"
        lines.append(f"| {claim.statement} ({where}) | {verdict.status} | {verdict.measured()} |")
    made = f"*Measured by {ledger.label}, on {ledger.date}. Yours will differ; that is the point.*"
    return "\n".join([*lines, "", made])


def picture(ledger: Ledger) -> bytes:
    """All claims, a row a chapter, as PNG."""
    found = (ledger.verdict(claim) for claim in claims.registry().values())
    return report.overview([{"claim": v.claim.id, "verdict": v.status} for v in found if v])


def opened(readme: str, ledger: Ledger) -> str:
    """The README with what stands between the marks made anew. UsageError without the marks."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise UsageError(f"the README must have {BEGIN} and {END}, once each.")
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{text(ledger)}\n{END}{rest.partition(END)[2]}"


def write() -> list[Path]:
    """Write README's opening and the picture."""
    ledger = chosen()
    new = opened(README.read_text(encoding="utf-8"), ledger)
    for path, content in ((README, new.encode()), (PICTURE, picture(ledger))):
        part = path.with_name(f"{path.name}.part")
        part.write_bytes(content)
        part.replace(path)
    return [README, PICTURE]


if __name__ == "__main__":
    try:
        print(*write(), sep="\n")
    except UsageError as error:
        print(f"front: {error}", file=sys.stderr)
        sys.exit(2)
