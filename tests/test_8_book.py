"""The book as a visitor meets it: in a browser, with the network cut, in both themes, on a phone,
by keyboard.
"""

import re
import urllib.parse

import pytest
from book_site import BROWSER, PHONE, Links, serious

from course_utils.course import badges
from course_utils.course.book import assemble, glossary, make
from course_utils.course.chapters import UsageError

pytest_plugins = ["book_site"]
LIGHT = ("index", "glossary", "00_start_here", "api/course_utils.measure")
DARK = ("00_start_here",)


def dead(pages) -> list[str]:
    """Links inside of the book that lead nowhere."""
    found = []
    for path, page in pages.items():
        for link in page.links + page.loads:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (
                (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
            )
            fragment = urllib.parse.unquote(parts.fragment)
            if not target.is_file():
                found.append(f"{path.name}: {link}")
            elif fragment and target in pages and fragment not in pages[target].names:
                found.append(f"{path.name}: {link} has no such place")
    return found


def test_no_link_is_dead(pages):
    assert dead(pages) == []
    some = next(iter(pages))
    spoilt = Links()
    spoilt.feed('<a href="nowhere.html">x</a><a href="#nowhere">y</a>')
    assert len(dead({some: spoilt})) == 2


def test_nothing_is_loaded_from_outside(pages):
    outside = [load for page in pages.values() for load in page.loads if "//" in load]
    assert outside == []


def test_every_figure_keeps_its_text(pages):
    assert sum(page.figures for page in pages.values()) >= 80
    assert {path.name: page.mute for path, page in pages.items() if page.mute} == {}


def test_every_chapter_is_in_it_with_its_neighbours(book):
    chapters = sorted(path.stem for path in book.folder.glob("[0-9][0-9]_*.html"))
    assert len(chapters) == len(assemble.notebooks())
    for before, after in zip(chapters, chapters[1:], strict=False):
        assert f'href="{after}.html"' in (book.folder / f"{before}.html").read_text()


def test_formulas_are_drawn_without_a_script(book, pages):
    text = (book.folder / "05_quantization_math.html").read_text(encoding="utf-8")
    assert text.count("<math") >= 30
    assert "\\frac" not in text
    loads = {load for page in pages.values() for load in page.loads}
    assert not [load for load in loads if "mathjax" in load.lower() or "katex" in load.lower()]


def test_terms_are_linked_once_a_chapter_with_their_chinese_words(book):
    text = (book.folder / "05_quantization_math.html").read_text(encoding="utf-8")
    links = re.findall(r'<a class="term[^>]*href="glossary.html#([^"]+)"[^>]*title="([^"]+)"', text)
    assert len(links) == len({anchor for anchor, _ in links}) >= 8
    assert ("term-calibration", "校准: finding ranges from sample inputs") in links
    page = (book.folder / "glossary.html").read_text(encoding="utf-8")
    assert '<span lang="zh">校准</span>' in page


def test_names_of_terms():
    found = glossary.pattern(["arm", "MAC", "service-level objective"])
    assert [m[1] for m in found.finditer("Arms and a farm, MACs, a mac")] == ["Arm", "MAC"]
    assert glossary.Term("open loop, closed loop", "", "").names == ["open loop", "closed loop"]
    assert all(term.chinese and term.meaning for term in glossary.terms())


@BROWSER
def test_search_finds_the_zero_point(site, visit):
    page = visit()
    for words, wanted in (("zero-point", "Quantization math"), ("nowhereatall", "")):
        page.goto(f"{site}/search.html?q={words}")
        page.wait_for_function("() => /finished|did not match/i.test(document.body.innerText)")
        found = page.locator("#search-results li").all_inner_texts()
        assert any(wanted in text for text in found) if wanted else found == []


@BROWSER
def test_hints_and_solutions_are_folded_and_open_by_keyboard(site, visit):
    page = visit()
    page.goto(f"{site}/05_quantization_math.html")
    for summary in ("Hint 1", "One solution"):
        fold = page.locator("details", has=page.locator("summary", has_text=summary)).first
        inside = fold.locator("p, pre").first
        assert not inside.is_visible()
        fold.locator("summary").focus()
        page.keyboard.press("Enter")
        assert inside.is_visible()


@BROWSER
def test_the_theme_is_switched_and_kept(site, visit):
    page = visit(color_scheme="light")
    page.goto(f"{site}/index.html")
    colours = set()
    for _ in range(3):  # automatic, light, dark
        page.locator(".theme-toggle:visible").first.click()
        colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2
    page.evaluate("localStorage.setItem('theme', 'dark')")
    page.goto(f"{site}/guess.html")
    red = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
    assert int(red) < 60


@BROWSER
def test_nothing_runs_over_the_edge_of_a_phone(site, visit, book):
    page = visit(viewport=PHONE)
    names = sorted(path.name for path in book.folder.glob("*.html"))
    names += [f"api/{path.name}" for path in book.folder.glob("api/*measure.html")]
    wide = "document.documentElement.scrollWidth - innerWidth"
    over = {}
    for name in names:
        page.goto(f"{site}/{name}")
        if (pixels := page.evaluate(wide)) > 0:
            over[name] = pixels
    assert over == {}
    page.evaluate("document.body.style.minWidth = '500px'")
    assert page.evaluate(wide) > 0, "the measure sees nothing"


@BROWSER
@pytest.mark.parametrize(
    ("scheme", "rules", "names"), [("light", None, LIGHT), ("dark", ["color-contrast"], DARK)]
)
def test_axe_finds_nothing_serious(site, visit, scheme, rules, names):
    """All rules in one theme; in the other, what a theme can change."""
    page = visit(color_scheme=scheme, viewport=PHONE)
    found = {}
    for name in names:
        page.goto(f"{site}/{name}.html")
        found[name] = serious(page, rules)
    page.evaluate("document.querySelector('h1').style = 'color: #808080; background: #8a8a8a'")
    spoilt = serious(page, rules)
    assert {name: rows for name, rows in found.items() if rows} == {}
    assert any("color-contrast" in row for row in spoilt), "the inspection sees nothing"


def test_links_are_turned_to_where_pages_lie(tmp_path):
    linker = assemble.Linker(assemble.PAGES | {"notebooks/03.ipynb": "03.ipynb"}, tmp_path)
    for name, text, turned in (
        ("README.md", "[03](notebooks/03.ipynb#fold)", "[03](03.ipynb#fold)"),
        ("notebooks/03.ipynb", "[w](../TEACHING.md)", "[w](teaching.md)"),
        ("datasets/README.md", "[r](../README.md)", "[r](index.md)"),
        ("notebooks/03.ipynb", "[`cpu.py`](../course_utils/cpu.py)", None),
        ("notebooks/03.ipynb", badges.links("a/b", "03"), badges.links("a/b", "03")),
        ("README.md", "```\n[x](nowhere.md)\n```", "```\n[x](nowhere.md)\n```"),
    ):
        wanted = turned or "[`cpu.py`](code/course_utils/cpu.py.md)"
        assert linker.turn(text, name) == wanted
    assert linker.code == {"course_utils/cpu.py"}


def test_a_broken_ledger_or_a_dead_link_leaves_the_old_book(tmp_path, monkeypatch):
    out = tmp_path / "book"
    out.mkdir()
    (out / ".buildinfo").touch()
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UsageError, match=r"bad\.json"):
        make.make(out, tmp_path)
    assert (out / ".buildinfo").is_file()
    with pytest.raises(UsageError, match=r"nowhere\.md, which has no page"):
        assemble.Linker(assemble.PAGES, tmp_path).turn("[x](nowhere.md)", "README.md")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(UsageError, match="no book"):
        make.make(tmp_path / "mine")
    monkeypatch.setattr(make, "NEEDS", ("no_such_package",))
    with pytest.raises(UsageError, match="make setup"):
        make.make(out)
