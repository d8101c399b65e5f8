"""How long a chapter takes its reader, and whether its cells can be taken in at a glance.

What stands under the heading *Further* is optional and is not counted, nor are the sources.
"""

import math
import re

from nbformat.notebooknode import NotebookNode

from course_utils import claims
from course_utils.course import build
from course_utils.course.chapters import Chapter

WORDS, LINES = 150, 10
"""What a reader takes in a minute: words of prose, lines of code."""
LONGEST, MEDIAN, CLAIMS, MINUTES = 25, 10, 7, 90
_ASIDE = {"hint", "instructor", "solution", "wrong"}


def complaints(chapter: Chapter) -> list[str]:
    """A header that promises fewer minutes; and what is too long: cells, claims, minutes."""
    lines, said, needed = cell_lines(chapter), stated(chapter), minutes(chapter)
    found = []
    if needed > said:
        found.append(f"the header says {said} minutes; the core path takes {needed}")
    if said > MINUTES:
        found.append(f"the header says {said} minutes; {MINUTES} are the most")
    if max(lines) > LONGEST:
        found.append(f"a code cell has {max(lines)} lines, more than {LONGEST}")
    if lines[len(lines) // 2] > MEDIAN:
        found.append(f"the median code cell has {lines[len(lines) // 2]} lines, more than {MEDIAN}")
    if (n := sum(c.startswith(f"{chapter.number}.") for c in claims.registry())) > CLAIMS:
        found.append(f"it has {n} claims, more than {CLAIMS}")
    return found


def told(chapter: Chapter) -> str:
    """Cells, minutes and size in a line."""
    lines = cell_lines(chapter)
    size = chapter.learner.stat().st_size / 1e3 if chapter.learner.is_file() else 0
    return (
        f"{chapter.name}: {len(lines)} code cells, median {lines[len(lines) // 2]} lines, longest"
        f" {lines[-1]}; {minutes(chapter)} minutes, its header says {stated(chapter)}; notebook"
        f" {size:.0f} kB"
    )


def cell_lines(chapter: Chapter) -> list[int]:
    """Lines of each code cell of the learner edition, sorted: the start cell, too."""
    cells = [c for c in build.notebook(chapter).cells if c.cell_type == "code"]
    return sorted(len(c.source.splitlines()) for c in cells)


def minutes(chapter: Chapter) -> int:
    """Minutes of the core path: its words, its shown code, and its exercises as their teacher's
    notes say.
    """
    words = lines = exercises = 0
    for cell in core(build.cells(chapter)):
        kind = set(build.tags(cell))
        if "instructor" in kind and (told := re.match(r"(\d+) minutes", cell.source)):
            exercises += int(told[1])
        if kind & (_ASIDE | {"exercise"}):
            continue
        if cell.cell_type == "code":
            lines += len(cell.source.splitlines())
        else:
            prose = re.sub(r"(?m)^Packages: [\w-]+(,\s[\w-]+)*$", " ", cell.source)
            prose = re.sub(r"<[^>]+>|\*\*Sources\*\*.*", " ", prose, flags=re.S)
            words += len(re.findall(r"\w[\w.'’-]*", prose))
    return math.ceil(words / WORDS + lines / LINES + exercises)


def core(cells: list[NotebookNode]) -> list[NotebookNode]:
    """The cells without the last section *Further*; exercises and quiz after it count again."""
    kept, further = [], False
    for cell in cells:
        if cell.cell_type == "markdown" and (title := re.search(r"^## (.+)", cell.source, re.M)):
            further = title[1].startswith("Further")
        if not further:
            kept.append(cell)
    return kept


def stated(chapter: Chapter) -> int:
    """The minutes in the chapter's header. Raises ValueError where it has none."""
    header = build.cells(chapter)[0].source
    if not (found := re.search(r"^(\d+) minutes", header, re.M)):
        raise ValueError(f"{chapter.name}: the first cell says no minutes, as in '60 minutes · …'.")
    return int(found[1])
