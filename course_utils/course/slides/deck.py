"""What goes on a chapter's slides: the source says in which order, the learner notebook has the
outputs.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import nbformat
from nbformat.notebooknode import NotebookNode

from course_utils.course import build
from course_utils.course.chapters import Chapter, UsageError

HEADING = re.compile(r"^#{1,2} (.+)$", re.M)
FOLDED = re.compile(r"<details><summary>(.*?)</summary>(.*?)</details>", re.S)
QUESTION = re.compile(r"^\*\*(\d+\. .+?)\*\*$(.*?)(?=^\*\*|\Z)", re.M | re.S)
AFTER = re.compile(r"^\*\*(Key points|For the capstone|Sources)", re.M)
LEAD = 45
"""Words of a section that are read aloud from the slide; what follows is for the speaker."""
UNTOLD = ("Further",)
SHOWN = ("image/png", "text/html")


@dataclass
class Slide:
    """One slide: Markdown, the outputs under it, what appears at a click, and the speaker's notes.
    `level` 0 starts a column, 1 goes down in it.
    """

    text: str
    level: int = 1
    outputs: list[NotebookNode] = field(default_factory=list)
    reveals: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Section:
    """What stands under one heading: prose, outputs, a teacher's notes, in their order."""

    title: str
    parts: list[tuple[str, object]] = field(default_factory=list)

    def texts(self, kind: str) -> list[str]:
        return [str(what) for is_, what in self.parts if is_ == kind]


def slides(chapter: Chapter) -> list[Slide]:
    """The chapter's slides. Raises UsageError where the learner notebook has not been built from
    this source.
    """
    found: list[Slide] = []
    for section in sections(chapter):
        if not section.title.startswith(UNTOLD):
            found += _slides(section)
    return found


def sections(chapter: Chapter) -> list[Section]:
    """The chapter by its headings. The first section is the head of the chapter."""
    shown, found = _outputs(chapter), [Section("")]
    for index, cell in enumerate(build.cells(chapter)):
        kind = set(build.tags(cell))
        if kind & {"hint", "solution", "exercise"}:
            continue
        if "instructor" in kind:
            found[-1].parts.append(("teacher", cell.source))
        elif "wrong" in kind:
            found[-1].parts.append(("wrong", _first_comment(cell.source)))
        elif cell.cell_type == "code":
            found[-1].parts += [
                ("output", o) for o in shown.get(f"c{chapter.number}-{index:03d}", [])
            ]
        else:
            head, *rest = HEADING.split(cell.source)
            found[-1].parts.append(("prose", head.strip()))
            for title, text in zip(rest[::2], rest[1::2], strict=True):
                found.append(Section(title, [("prose", text.strip())]))
    return [section for section in found if section.title]


def _outputs(chapter: Chapter) -> dict[str, list[NotebookNode]]:
    """By cell, what a room looks at: figures, verdicts and tables, not lines of text."""
    if not chapter.learner.is_file():
        raise UsageError(f"there is no {chapter.learner.name}; make it with: course build")
    book = nbformat.read(chapter.learner, as_version=4)
    wanted = build.code_hash(chapter, build.notebook(chapter))
    if book.metadata.get("course", {}).get("code_sha256") != wanted:
        raise UsageError(
            f"{chapter.learner.name} was built from another source: course build {chapter.number}"
        )
    return {
        cell.id: [o for o in cell.outputs if any(kind in o.get("data", {}) for kind in SHOWN)]
        for cell in book.cells
        if cell.cell_type == "code" and not _is_plumbing(cell)
    }


def _is_plumbing(cell: NotebookNode) -> bool:
    """The machine's card, and the checks of exercises that nobody has tried."""
    return "machine.card()" in cell.source or "exercises.check(" in cell.source


def _first_comment(source: str) -> str:
    return source.strip().splitlines()[0].removeprefix("# ")


def _slides(section: Section) -> list[Slide]:
    if re.match(r"\d\d · ", section.title):
        return [_title(section)]
    if section.title.startswith("Exercise"):
        return [_exercise(section)]
    if section.title == "Exit quiz":
        return list(_quiz(section))
    return _told(section)


def _title(section: Section) -> Slide:
    text = "\n\n".join(section.texts("prose"))
    question, _, rest = text.partition("\n\n")
    goals = rest.partition("\n\n")[0]
    return Slide(f"# {section.title}\n\n{question}", 0, notes=[goals, rest])


def _told(section: Section) -> list[Slide]:
    """The section's first words; then a slide for each figure or verdict, with the prose that reads
    it as the speaker's.
    """
    prose = section.texts("prose")
    opening = FOLDED.sub("", prose[0]).strip()
    slide = Slide(f"## {section.title}\n\n{lead(opening)}", 0)
    slide.reveals = [answer.strip() for _, answer in FOLDED.findall(prose[0])]
    found = [slide]
    for kind, what in section.parts:
        if kind == "output":
            found.append(Slide(f"### {section.title}", outputs=[what]))
        elif what:
            found[-1].notes.append(str(what))
    return found


def lead(text: str, words: int = LEAD) -> str:
    """The first sentences, whole, within `words`, or the first one; a table stays whole, and a
    formula stays with the sentence that it ends.

    >>> lead("One thing. Another thing, which is longer.", 4)
    'One thing.'
    >>> lead("The error is\\n\\n$$s/2$$\\n\\nNow more.")
    'The error is\\n\\n$$s/2$$'
    """
    first, _, rest = text.partition("\n\n")
    if text.startswith("|"):
        return first
    kept: list[str] = []
    for sentence in re.split(r"(?<=[.?:])\s+(?=[A-Z*\"“(`$])", first):
        if kept and len(" ".join([*kept, sentence]).split()) > words:
            return " ".join(kept)
        kept.append(sentence)
    formula = rest.partition("\n\n")[0] if rest.startswith("$$") else ""
    return "\n\n".join(filter(None, (" ".join(kept), formula)))


def _exercise(section: Section) -> Slide:
    teacher = section.texts("teacher")
    minutes = re.match(r"(\d+) minutes", "".join(teacher[:1]))
    time = f"\n\n*{minutes[1]} minutes; the whole text stands in the notebook.*" if minutes else ""
    text = section.texts("prose")[0]
    wrong = [f"- Wrong answer you will meet: {line}" for line in section.texts("wrong")]
    return Slide(
        f"## {section.title}\n\n{lead(text, 2 * LEAD)}{time}", 0, notes=[*teacher, *wrong, text]
    )


def _quiz(section: Section) -> Iterator[Slide]:
    text = "\n\n".join(section.texts("prose"))
    end = found.start() if (found := AFTER.search(text)) else len(text)
    asked, rest, level = text[:end], text[end:], 0
    for question, options in QUESTION.findall(asked):
        answers = FOLDED.findall(options)
        listed = "\n".join(f"- {_line(option)}" for option, _ in answers)
        slide = Slide(f"## Quiz\n\n**{_line(question)}**\n\n{listed}", level)
        slide.reveals = [
            f"**{_line(option)}.** {_line(why)}"
            for option, why in answers
            if why.strip().startswith("Right")
        ]
        slide.notes = [f"- *{_line(option)}*: {_line(why)}" for option, why in answers]
        level = 1
        yield slide
    if points := re.search(r"\*\*Key points\*\* · (.+?)\.?(?=\n\n|\Z)", rest, re.S):
        lines = "\n".join(f"- {_line(point)}" for point in re.split(r"\s+·\s+", points[1]))
        yield Slide(f"## Key points\n\n{lines}", 0)


def _line(text: str) -> str:
    return " ".join(text.split())
