"""What Sphinx does for this book beyond its own: mathematics as MathML, alternative texts of the
figures, and the first use of a term in each chapter linked to the glossary.
"""

import base64
import hashlib
import json
import re
from pathlib import Path, PurePath

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

from course_utils.course.book import glossary

log = logging.getLogger(__name__)
NOT_PROSE = (
    nodes.literal,
    nodes.literal_block,
    nodes.doctest_block,
    nodes.reference,
    nodes.title,
    nodes.math,
    nodes.math_block,
    nodes.raw,
    nodes.comment,
)


class Chinese(nodes.inline):
    """Text that a screen reader must not read as English."""


def setup(app: Sphinx) -> dict:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.add_node(Chinese, html=(open_chinese, lambda writer, node: writer.body.append("</span>")))
    app.connect("builder-inited", gather)
    app.connect("doctree-read", mend)
    app.connect("html-page-context", level_captions, priority=900)  # after the theme's own
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def open_chinese(writer: nodes.NodeVisitor, node: nodes.Element) -> None:
    writer.body.append('<span lang="zh">')


def inline_math(writer: nodes.NodeVisitor, node: nodes.math) -> None:
    writer.body.append(mathml(node, "inline"))
    raise nodes.SkipNode


def block_math(writer: nodes.NodeVisitor, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="math-block">{mathml(node, "block")}</div>')
    raise nodes.SkipNode


def mathml(node: nodes.Element, display: str) -> str:
    """The formula in MathML, which browsers draw themselves: no script and no font to fetch."""
    from latex2mathml.converter import convert

    try:
        return convert(node.astext(), display=display)
    except Exception as error:  # the library's errors have no common ancestor
        log.warning("cannot draw %r: %s", node.astext(), error, location=node)
        return node.astext()


def gather(app: Sphinx) -> None:
    """The figures' alternative texts by the digest that names their files, and the terms."""
    app.course_alts = {}
    for path in Path(app.srcdir).glob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for output in cell.get("outputs", []):
                if content := output.get("data", {}).get("image/png"):
                    digest = hashlib.sha256(base64.b64decode("".join(content))).hexdigest()
                    alt = output.get("metadata", {}).get("image/png", {}).get("alt", "")
                    app.course_alts[digest] = alt
    app.course_terms = glossary.names(Path(app.srcdir))


def mend(app: Sphinx, doctree: nodes.document) -> None:
    """Alternative texts, the language of Chinese words, and links to the glossary."""
    for image in doctree.findall(nodes.image):
        if alt := app.course_alts.get(PurePath(image["uri"]).stem):
            image["alt"] = alt
    for span in list(doctree.findall(nodes.inline)):
        if "zh" in span["classes"]:
            span.replace_self(Chinese("", *span.children))
    if re.match(r"\d\d_", app.env.docname):
        link_terms(app, doctree)


def level_captions(
    app: Sphinx, page: str, template: str, context: dict, doctree: nodes.document | None
) -> None:
    """The captions of the contents call themselves headings, and a heading has a level."""
    tree = context.get("furo_navigation_tree", "")
    context["furo_navigation_tree"] = tree.replace(
        'role="heading"', 'role="heading" aria-level="2"'
    )


def link_terms(app: Sphinx, doctree: nodes.document) -> None:
    """Link the first use of each term in the prose of a chapter."""
    here = app.builder.get_relative_uri(app.env.docname, "glossary")
    left = dict(app.course_terms)
    for text in list(doctree.findall(nodes.Text)):
        parent, made, end, string = text.parent, [], 0, text.astext()
        if any(isinstance(above, NOT_PROSE) for above in ancestors(text)):
            continue
        for found in glossary.pattern(list(left)).finditer(string) if left else ():
            name = found[1] if found[1] in left else found[1][0].lower() + found[1][1:]
            if (term := left.get(name)) is None:
                continue
            for other in term.names:
                left.pop(other, None)
            about = f"{term.chinese}: {term.meaning}"
            link = nodes.reference("", found[0], internal=True, classes=["term"])
            link["refuri"], link["reftitle"] = f"{here}#{term.anchor}", about
            made += [nodes.Text(string[end : found.start()]), link]
            end = found.end()
        if made:
            parent.replace(text, [*made, nodes.Text(string[end:])])


def ancestors(node: nodes.Node) -> list[nodes.Node]:
    """The nodes around this one, the nearest first."""
    found = []
    while (node := node.parent) is not None:
        found.append(node)
    return found
