"""The atlas and Guess first in a browser: filters, a scripted play and its score, the keyboard."""

import json

import pytest
from book_site import BROWSER, PHONE, serious

from course_utils import claims
from course_utils.course.book import atlas_page, guess_page

pytest_plugins = ["book_site"]


def answer(page, guess: str, sure: int, number: float | None = None) -> None:
    page.check(f"input[name=guess][value={guess}]")
    page.check(f"input[name=sure][value='{sure}']")
    if number is not None:
        page.fill("input[name=number]", str(number))
    page.get_by_role("button", name="Answer").click()


def asked(page, game: dict) -> dict:
    said = page.locator("#guess blockquote").inner_text()
    return next(c for c in game["claims"] if c["statement"] == said)


@BROWSER
def test_a_scripted_play_gets_the_score_it_earned(visit, book):
    page = visit(viewport=PHONE)
    page.goto((book.folder / "guess.html").as_uri() + "#seed=7")  # no server
    game = json.loads(page.locator("#guess-data").inner_text())
    machine = game["machines"][1]["name"]
    page.select_option("#guess-machine", machine)
    page.get_by_role("button", name="Draw the claims").click()
    met, numbers = [], 0
    for i in range(guess_page.DRAWN):
        claim = asked(page, game)
        met.append(claim["id"])
        said, right = claim["said"][machine], i < 6
        wrong = {"holds": "fails", "fails": "holds"}[said["word"]]
        number = None
        if page.locator("input[name=number]").count():
            numbers += 1
            number = said["value"] if right else said["value"] * 10 + 100
        answer(page, said["word"] if right else wrong, 90 if i < 8 else 50, number)
        shown = page.locator("#guess").inner_text()
        assert said["text"] in shown
        assert claim["reason"] in shown
        assert ("Right" in shown) is right
        assert (book.folder / page.locator("#guess a").get_attribute("href")).is_file()
        page.get_by_role("button", name="Next claim" if i < 9 else "See how you did").click()
    assert len(set(met)) == guess_page.DRAWN
    shown = page.locator("#guess").inner_text()
    assert "6 of 10 right" in shown
    assert "82% sure and 60% right: you were surer than you were right" in shown
    assert "Brier score 0.22" in shown  # (6 · 0.1² + 2 · 0.9² + 2 · 0.5²) / 10 = 0.218
    assert numbers
    rights = page.locator("#numbers").inner_text()
    assert f"of {numbers} within a factor of two" in rights
    assert page.locator("#guess tbody tr").all_inner_texts() == ["50%\t2\t0", "90%\t8\t6"]
    page.get_by_role("button", name="Play again").click()
    page.get_by_role("button", name="Draw the claims").click()
    assert page.get_by_text("Claim 1 of 10").is_visible()


@BROWSER
def test_the_game_is_played_by_keyboard(site, visit):
    page = visit()
    page.goto(f"{site}/guess.html#seed=5")
    page.locator("#guess-machine").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    for i in (1, 2):
        assert page.get_by_text(f"Claim {i} of 10").is_visible()
        for key in ("Tab", "Space", "Tab", "ArrowRight", "Enter"):  # holds, 80%, answer
            page.keyboard.press(key)
        assert page.locator("#guess ul.forest").is_visible()
        page.keyboard.press("Enter")  # the next claim has the focus


@BROWSER
def test_the_atlas_is_filtered_and_shows_the_machine_that_was_chosen(site, visit, planted):
    page = visit()
    page.goto(f"{site}/atlas.html")
    everything = len(claims.registry())
    assert f"{everything} of {everything} claims" in page.locator("#shown").inner_text()
    page.select_option("#filter-technique", "t-pruning-channels")
    page.wait_for_function("() => document.getElementById('shown').textContent.startsWith('4 of')")
    assert page.locator(".claim:visible").count() == 4
    page.select_option("#filter-technique", "")
    page.select_option("#filter-kind", "bf16")
    page.select_option("#filter-verdict", "fails")
    rows = page.locator(".machine:visible")
    assert {row.get_attribute("data-kind") for row in rows.all()} == {"bf16"}
    assert {row.get_attribute("data-verdict") for row in rows.all()} == {"fails"}
    before = page.locator(".promise .badge:visible").all_inner_texts()
    page.select_option("#machine", "planted-bf16-bf16")
    after = page.locator(".promise .badge:visible").all_inner_texts()
    assert len(before) == len(after) > 20
    assert before != after


def test_every_claim_stands_in_the_atlas_with_all_that_was_said(book):
    text = (book.folder / "atlas.html").read_text(encoding="utf-8")
    for claim in claims.registry().values():
        assert f'id="claim-{atlas_page.slug(claim.id)}"' in text
    assert text.count('class="forest"') == len(claims.registry())
    assert text.count("capped by ONEDNN_MAX_CPU_ISA=AVX2") >= len(claims.registry())
    assert "No ledger yet of a CPU with VNNI." in text


def test_without_a_ledger_the_pages_say_so(tmp_path):
    titles = dict.fromkeys({name[:2] for name in claims.registry()}, ("x", "x.ipynb"))
    for part in (atlas_page, guess_page):
        part.write(tmp_path / "page.md", tmp_path, titles)
        text = (tmp_path / "page.md").read_text(encoding="utf-8")
        assert "no machine has sent its ledger" in text.lower()
        assert "course contribute" in text
    atlas_page.write(tmp_path / "page.md", tmp_path, titles)
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "No ledger yet of a CPU with AVX2 only, a CPU with VNNI or a" in text


@BROWSER
@pytest.mark.parametrize(("scheme", "rules"), [("light", None), ("dark", ["color-contrast"])])
def test_axe_finds_nothing_serious(site, visit, scheme, rules):
    """All rules in one theme; in the other, what a theme can change."""
    page = visit(color_scheme=scheme, viewport=PHONE)
    page.goto(f"{site}/atlas.html")
    page.select_option("#filter-technique", "t-pruning-channels")  # 90 claims look alike
    found = {"atlas": serious(page, rules)}
    page.goto(f"{site}/guess.html#seed=3")
    found["a machine"] = serious(page, rules)
    page.get_by_role("button", name="Draw the claims").click()
    found["a question"] = serious(page, rules)
    answer(page, "holds", 70)
    found["an answer"] = serious(page, rules)
    assert {name: rows for name, rows in found.items() if rows} == {}
