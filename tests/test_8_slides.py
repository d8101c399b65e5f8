"""`course slides`: what is on them, and two chapters slide by slide in a browser."""

import re

import pytest
from book_site import BROWSER, Links, serious

from course_utils.course import cli
from course_utils.course.chapters import UsageError, chapters
from course_utils.course.slides import deck, make

pytest_plugins = ["book_site"]
LOOKED_AT = ["03", "14"]
SIZE = {"width": 960, "height": 700}


@pytest.fixture(scope="module")
def decks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides") / "a folder"
    assert cli.main(["slides", *LOOKED_AT, "--out", str(folder)]) == 0
    return {number: next(folder.glob(f"{number}_*.slides.html")) for number in LOOKED_AT}


@pytest.mark.parametrize("chapter", chapters(), ids=lambda c: c.number)
def test_every_chapter_has_its_parts_on_slides(chapter):
    found = deck.slides(chapter)
    texts = [slide.text for slide in found]
    source = chapter.text()
    for kind in ("Myth", "Exercise", "Predict", "Recall"):
        wanted = len(re.findall(rf"^# ## {kind}", source.partition("# ## Further")[0], re.M))
        assert sum(text.startswith(f"## {kind}") for text in texts) == wanted
    assert texts[0].startswith(f"# {chapter.title()}")
    quiz = [slide for slide in found if slide.text.startswith("## Quiz")]
    assert len(quiz) == len(re.findall(r"^# \*\*\d+\. ", source, re.M))
    for slide in quiz:
        assert len(slide.reveals) == 1
        assert "Right" in slide.reveals[0]
        assert "Right" not in slide.text
    assert any(slide.outputs for slide in found) or chapter.number == "00"


def test_the_speaker_gets_the_prose_and_the_teachers_notes():
    found = deck.slides(chapters(["03"])[0])
    exercise = next(slide for slide in found if slide.text.startswith("## Exercise A"))
    told = "\n".join(exercise.notes)
    assert told.startswith("8 minutes. Many write the sum")
    assert "Takes the absolute value before the sum" in told
    assert "return" not in told.replace("Return", "")
    figure = next(slide for slide in found if slide.outputs and slide.notes)
    assert figure.notes[0]


@pytest.mark.parametrize(
    ("text", "drawn"),
    [
        ("so $x^2$ grows", True),
        ("it costs $5 or $6 a month", False),
        ("`$HOME` and `$PATH`", False),
        ("$$\\frac{a}{b}$$", True),
    ],
)
def test_formulas_are_drawn_and_dollars_are_not(text, drawn):
    made = make.mathematics(text)
    assert ("<math" in made) is drawn
    assert drawn or made == text


def test_the_same_source_gives_the_same_page(decks, tmp_path, monkeypatch):
    chapter = chapters(["03"])[0]
    assert make.make(chapter, tmp_path).read_bytes() == decks["03"].read_bytes()
    monkeypatch.setattr(deck.build, "code_hash", lambda *_: "another")
    with pytest.raises(UsageError, match="was built from another source: course build 03"):
        deck.slides(chapter)


def test_nothing_comes_from_elsewhere(decks):
    for page in decks.values():
        links = Links()
        links.feed(page.read_text(encoding="utf-8"))
        assert links.mute == []
        assert all((page.parent / name).is_file() for name in links.loads if ":" not in name)
        assert not [name for name in links.loads if name.startswith(("http", "//"))]


@BROWSER
@pytest.mark.parametrize("number", LOOKED_AT)
def test_every_slide_fits_and_shows_its_answer_at_a_click(decks, visit, number):
    page = visit(viewport=SIZE)
    page.goto(decks[number].as_uri())
    page.wait_for_function("() => window.Reveal && Reveal.isReady()")
    tall = page.evaluate(
        """() => Reveal.getSlides().map(s => [Reveal.getIndices(s), s]).map(([at, s]) => {
             Reveal.slide(at.h, at.v, 99);
             const own = s.innerText.slice(0, 60), high = s.scrollHeight;
             const wide = Math.max(0, ...[...s.querySelectorAll('*')]
               .filter(e => !e.closest('aside')).map(e => e.scrollWidth));
             return [high, wide, own];
           }).filter(([high, wide]) => high > 700 || wide > 970)"""
    )
    assert tall == []
    quiz = page.evaluate(
        """() => { const s = Reveal.getSlides().find(s => s.querySelector('.fragment'));
                   const at = Reveal.getIndices(s); Reveal.slide(at.h, at.v, -1); return at; }"""
    )
    answer = page.locator("section.present .fragment").last
    assert quiz
    page.wait_for_function("e => getComputedStyle(e).opacity === '0'", arg=answer.element_handle())
    page.keyboard.press("Space")
    page.wait_for_function(
        "() => [...document.querySelectorAll('section.present .fragment')]"
        ".some(e => getComputedStyle(e).opacity === '1')"
    )
    assert serious(page) == []
