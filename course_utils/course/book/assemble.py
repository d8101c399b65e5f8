"""Write the folder that Sphinx reads: pages and notebooks from all over the repository, with their
links turned to where the pages lie in the book.
"""

import json
import os
import posixpath
import re
import shutil
from pathlib import Path

import nbformat

from course_utils import ROOT
from course_utils.course.book import api, atlas_page, glossary, guess_page
from course_utils.course.build import tags
from course_utils.course.chapters import NOTEBOOKS, UsageError

PAGES = {
    "README.md": "index.md",
    "TEACHING.md": "teaching.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "datasets/README.md": "data.md",
    "datasets/ledgers/README.md": "ledgers.md",
    "LICENSE": "license.md",
}
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")
FENCED = re.compile(r"(^ *```.*?^ *```[^\n]*$)", re.M | re.S)
FIRST = """
**[Guess first](guess.md)**: ten claims, no kernel needed; say which of them hold before you see
what machines measured. **[The atlas](atlas.md)** has all claims, with what each machine said.

"""
CONTENTS = """

```{{toctree}}
:hidden:

guess
atlas
```

```{{toctree}}
:hidden:
:caption: Chapters

{chapters}
```

```{{toctree}}
:hidden:
:caption: Beside the chapters

glossary
teaching
contributing
data
ledgers
api/index
code
changelog
license
```
"""


def assemble(target: Path, ledgers: Path) -> None:
    """Write all sources into `target`. UsageError for a link that leads nowhere, or a ledger that
    is none.
    """
    target.mkdir(parents=True)
    chapters = notebooks()
    linker = Linker({f"notebooks/{path.name}": path.name for path in chapters} | PAGES, target)
    for path in chapters:
        _notebook(path, target / path.name, linker)
    for name, page in PAGES.items():
        if name != "LICENSE":
            text = linker.turn((ROOT / name).read_text(encoding="utf-8"), name)
            (target / page).write_text(text, encoding="utf-8")
    _index(target / "index.md", [path.stem for path in chapters])
    terms = glossary.terms()
    glossary.write(target, terms)
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    (target / "license.md").write_text(f"# License\n\n```text\n{text}\n```\n", encoding="utf-8")
    titles = {path.stem[:2]: (title(path), path.name) for path in chapters}
    atlas_page.write(target / "atlas.md", ledgers, titles)
    guess_page.write(target / "guess.md", ledgers, titles)
    api.write(target / "api")
    linker.write_code()


def notebooks() -> list[Path]:
    """The committed learner editions, in order."""
    return sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def title(path: Path) -> str:
    """A notebook's first heading."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "".join(cells[0]["source"]).splitlines()[0].lstrip("# ")


class Linker:
    """Turns a repository's relative links into the book's, and remembers the files of code that
    are linked, each of which gets a page.
    """

    def __init__(self, pages: dict[str, str], target: Path) -> None:
        self.pages, self.target, self.code = pages, target, set()

    def turn(self, text: str, name: str) -> str:
        """`text` of the repository's file `name`, with its links as the book has them."""
        page = self.pages[name]
        parts = FENCED.split(text)
        for i in range(0, len(parts), 2):  # the odd ones are code
            parts[i] = LINK.sub(lambda m: m[1] + self._to(m[2], name, page) + m[3], parts[i])
        return "".join(parts)

    def _to(self, link: str, name: str, page: str) -> str:
        if re.match(r"[a-z]+:|#", link):
            return link
        path, hash_, anchor = link.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
        if path in self.pages:
            there = self.pages[path]
        elif path.endswith(".py") and (ROOT / path).is_file():
            self.code.add(path)
            there = f"code/{path}.md"
        elif path.endswith((".png", ".svg")) and (ROOT / path).is_file():
            there = f"images/{Path(path).name}"
            (self.target / "images").mkdir(exist_ok=True)
            shutil.copy(ROOT / path, self.target / there)
        else:
            raise UsageError(f"{name} links to {link}, which has no page in the book.")
        return os.path.relpath(there, posixpath.dirname(page) or ".") + hash_ + anchor

    def write_code(self) -> None:
        """A page for each file of code that a page links to, and one that lists them."""
        for path in sorted(self.code):
            page = self.target / "code" / f"{path}.md"
            page.parent.mkdir(parents=True, exist_ok=True)
            text = (ROOT / path).read_text(encoding="utf-8")
            page.write_text(
                f"# {Path(path).name}\n\n`{path}`\n\n````python\n{text}````\n", encoding="utf-8"
            )
        lines = "\n".join(f"code/{path}" for path in sorted(self.code))
        (self.target / "code.md").write_text(
            "# Files of code\n\nWhat the chapters point to; other processes run most of it.\n\n"
            f"```{{toctree}}\n:maxdepth: 1\n\n{lines}\n```\n",
            encoding="utf-8",
        )


def _notebook(path: Path, target: Path, linker: Linker) -> None:
    """The notebook as it was executed, without the cell that fetches the course."""
    book = nbformat.read(path, as_version=4)
    book.cells = [cell for cell in book.cells if "start" not in tags(cell)]
    book.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    for cell in book.cells:
        if cell.cell_type == "markdown":
            cell.source = linker.turn(cell.source, f"notebooks/{path.name}")
    nbformat.write(book, target)


def _index(page: Path, chapters: list[str]) -> None:
    """README is the front page: the way to the atlas comes first, the contents last."""
    head, rest = page.read_text(encoding="utf-8").split("\n## ", 1)
    body = f"{head}{FIRST}## {rest}{CONTENTS.format(chapters=chr(10).join(chapters))}"
    page.write_text(body, encoding="utf-8")
