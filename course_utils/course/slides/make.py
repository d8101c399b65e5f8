"""Slides by nbconvert, with reveal.js beside them from a package: nothing is fetched when they are
shown.
"""

import importlib.util
import re
import shutil
from pathlib import Path

import nbformat
from nbformat.notebooknode import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from course_utils.course.chapters import Chapter, UsageError
from course_utils.course.slides import deck

HERE = Path(__file__).resolve().parent
LIBRARY = "reveal"
"""The folder beside the slides."""
PARTS = ("LICENSE", "dist/reset.css", "dist/reveal.css", "dist/reveal.js", "dist/theme/white.css")
FOLDERS = ("dist/theme/fonts/source-sans-pro", "plugin/notes")
MATH = re.compile(r"\$\$(.+?)\$\$|(?<![\\$\w])\$([^$\n]+(?:\n[^$\n]+)?)\$(?![\d$])", re.S)
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.S)


def make(chapter: Chapter, folder: Path) -> Path:
    """Write NN_name.slides.html and the library into `folder`; the page's path. Raises UsageError
    where reveal.js's package is missing or the notebook is not built from this source.
    """
    page = render(chapter.title(), deck.slides(chapter))
    copy_library(folder / LIBRARY)
    target = folder / f"{chapter.name}.slides.html"
    part = target.with_suffix(".part")
    part.write_text(page, encoding="utf-8")
    part.replace(target)
    return target


def render(title: str, slides: list[deck.Slide]) -> str:
    """The whole page."""
    from nbconvert.exporters import SlidesExporter
    from traitlets.config import Config

    config = Config()
    config.SlidesExporter.template_name = "template"
    config.SlidesExporter.extra_template_basedirs = [str(HERE)]
    config.SlidesExporter.reveal_url_prefix = LIBRARY
    config.SlidesExporter.reveal_theme = "white"
    config.SlidesExporter.reveal_number = "c/t"
    config.SlidesExporter.exclude_input = True
    config.SlidesExporter.exclude_output_prompt = True
    book = new_notebook(metadata={"title": title}, cells=[c for s in slides for c in cells(s)])
    for number, cell in enumerate(book.cells):
        cell.id = f"s{number:03d}"  # the same slides give the same page
    nbformat.validate(book)
    return SlidesExporter(config=config).from_notebook_node(book)[0]


def cells(slide: deck.Slide) -> list[NotebookNode]:
    """A slide as nbconvert takes it: cells that say what they are in their metadata."""
    made = [_markdown(slide.text, "subslide" if slide.level else "slide")]
    for output in slide.outputs:
        made.append(new_code_cell("", outputs=[output], metadata=_is("-")))
    made += [_markdown(text, "fragment") for text in slide.reveals]
    if notes := [text for text in slide.notes if text.strip()]:
        made.append(_markdown("\n\n".join(notes), "notes"))
    return made


def _markdown(text: str, kind: str) -> NotebookNode:
    return new_markdown_cell(mathematics(text), metadata=_is(kind))


def _is(kind: str) -> dict:
    return {"slideshow": {"slide_type": kind}}


def mathematics(text: str) -> str:
    """Formulas as MathML, which browsers draw themselves; code keeps its dollars."""
    from latex2mathml.converter import convert

    def draw(found: re.Match) -> str:
        formula, display = (found[1], "block") if found[1] else (found[2], "inline")
        return convert(formula, display=display)

    parts = CODE.split(text)
    return "".join(part if i % 2 else MATH.sub(draw, part) for i, part in enumerate(parts))


def copy_library(target: Path) -> None:
    """reveal.js from the package that carries it, whole or not at all."""
    found = importlib.util.find_spec("sphinx_revealjs")
    if found is None or not found.submodule_search_locations:
        raise UsageError("the slides need sphinx-revealjs: run `make setup` once more.")
    source = Path(found.submodule_search_locations[0]) / "_static" / "revealjs"
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for name in PARTS:
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, part / name)
    for name in FOLDERS:
        shutil.copytree(source / name, part / name)
    shutil.rmtree(target, ignore_errors=True)
    part.replace(target)
