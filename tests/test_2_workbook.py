"""The reader's own copy: whatever the course changes, nothing that the reader wrote is lost."""

import random
import subprocess
import sys

import nbformat
import pytest
from conftest import CHAPTERS
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from course_utils.course import workbook
from course_utils.course.chapters import UsageError

TEXT = {
    "start": "import torch",
    "why": "# Why\nA sentence about speed.",
    "stub": "def answer(x): ...",
    "check": 'exercises.check("01.A", answer)',
    "end": "**Key points**",
}


def made(texts: dict[str, str] | list[str], first: int = 0) -> nbformat.NotebookNode:
    """A notebook whose ids count its cells, as the course's do."""
    sources = list(texts.values()) if isinstance(texts, dict) else texts
    cells = [
        (new_markdown_cell if s.startswith(("#", "*")) else new_code_cell)(s, id=f"c01-{i:03d}")
        for i, s in enumerate(sources, first)
    ]
    return new_notebook(cells=cells)


def ship(path, notebook) -> None:
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [new_output("stream", text="the course's machine\n")]
    nbformat.write(notebook, path)


@pytest.fixture
def desk(tmp_path):
    """A course with one notebook, and the workbook that was made from it."""
    (tmp_path / "notebooks").mkdir()
    shipped = tmp_path / "notebooks" / "01_speed.ipynb"
    ship(shipped, made(TEXT))
    assert [c.what for c in workbook.update([shipped], tmp_path / "workbook")] == ["new"]
    return shipped, tmp_path / "workbook"


def own(desk) -> nbformat.NotebookNode:
    return nbformat.read(desk[1] / desk[0].name, as_version=4)


def learn(desk, **changes: str) -> nbformat.NotebookNode:
    """The reader writes into cells by their names and runs the code."""
    mine = own(desk)
    for name, text in changes.items():
        mine.cells[list(TEXT).index(name)].source = text
    for cell in mine.cells:
        if cell.cell_type == "code":
            cell.execution_count, cell.outputs = 1, [new_output("stream", text="mine\n")]
    nbformat.write(mine, desk[1] / desk[0].name)
    return mine


def course(desk, texts: dict[str, str] | list[str]) -> workbook.Change:
    ship(desk[0], made(texts))
    return workbook.update([desk[0]], desk[1])[0]


def sources(desk) -> list[str]:
    return [cell.source for cell in own(desk).cells]


def test_a_new_copy_has_no_outputs_and_a_second_call_changes_nothing(desk):
    assert sources(desk) == list(TEXT.values())
    assert all(not c.outputs for c in own(desk).cells if c.cell_type == "code")
    learn(desk, stub="def answer(x): return x")
    before = (desk[1] / desk[0].name).read_bytes()
    change = workbook.update([desk[0]], desk[1])[0]
    assert (change.what, change.kept) == ("unchanged", 1)
    assert (desk[1] / desk[0].name).read_bytes() == before


def test_an_answer_and_its_output_stay_where_cells_come_in_before_them(desk):
    learn(desk, stub="def answer(x): return x")
    texts = {"new": "# New\nA cell that was not there.", **TEXT, "end": "**Key points**, mended"}
    change = course(desk, texts)
    assert (change.what, change.kept, change.both) == ("updated", 1, 0)
    assert sources(desk) == [
        texts["new"],
        *list(TEXT.values())[:2],
        "def answer(x): return x",
        TEXT["check"],
        texts["end"],
    ]
    stub = own(desk).cells[3]
    assert stub.outputs[0].text == "mine\n"
    assert stub.id == "c01-003", "the ids are the new edition's"


def test_where_both_changed_a_cell_both_stand_there(desk):
    learn(desk, stub="def answer(x): return x", why="# Why\nMy own note about speed.")
    change = course(
        desk, TEXT | {"stub": "def answer(x, y): ...", "why": "# Why\nA sentence on it."}
    )
    assert change.both == 2
    text = sources(desk)
    assert text[text.index("def answer(x): return x") + 1].endswith(
        "```python\ndef answer(x, y): ...\n```"
    )
    assert any("My own note" in t for t in text)
    assert any("A sentence on it." in t for t in text)
    before = sources(desk)
    assert (
        course(
            desk, TEXT | {"stub": "def answer(x, y): ...", "why": "# Why\nA sentence on it."}
        ).what
        == "unchanged"
    )
    assert sources(desk) == before, "the conflict is told once"


def test_cells_that_the_reader_added_or_deleted_stay_so(desk):
    mine = learn(desk)
    mine.cells.insert(0, new_markdown_cell("My title", id="mine-0"))
    mine.cells.insert(4, new_code_cell("print('mine')", id="mine-1"))
    del mine.cells[2]  # the paragraph
    nbformat.write(mine, desk[1] / desk[0].name)
    course(desk, TEXT | {"end": "**Key points**, mended"})
    assert sources(desk) == [
        "My title",
        TEXT["start"],
        TEXT["stub"],
        "print('mine')",
        TEXT["check"],
        "**Key points**, mended",
    ]


def test_a_cell_that_the_course_removed_goes_unless_the_reader_wrote_in_it(desk):
    learn(desk, start="import torch  # and what I learned about it")
    course(desk, {k: v for k, v in TEXT.items() if k not in ("start", "why")})
    assert sources(desk) == [
        "import torch  # and what I learned about it",
        *list(TEXT.values())[2:],
    ]


def test_an_exercise_is_found_by_its_name_however_its_stub_reads(desk):
    learn(desk, stub="def answer(x): return 7")
    texts = {"check2": "print('a new cell')", **TEXT}
    texts["stub"] = "def answer(values, weights, *, axis=None):\n    ...  # a wholly new signature"
    course(desk, texts)
    text = sources(desk)
    assert text.index("def answer(x): return 7") < text.index(TEXT["check"])
    assert any("wholly new signature" in t for t in text)


def test_nothing_is_lost_in_a_thousand_random_histories(desk, seeded):
    """Whatever both sides do: what the reader wrote is there, and what the course wrote."""
    rng = random.Random(seeded)
    for _ in range(1000 if seeded == 0 else 200):
        old = [f"x{i} = {rng.randrange(9)}" for i in range(rng.randrange(1, 8))]
        base = made(old)
        mine, new = workbook.bare(base), list(old)
        wrote = []
        for _ in range(rng.randrange(4)):
            text = f"mine = {rng.randrange(10**9)}"
            wrote.append(text)
            if rng.random() < 0.5:
                mine.cells.insert(
                    rng.randrange(len(mine.cells) + 1), new_code_cell(text, id=f"m{len(wrote)}")
                )
            else:
                cell = rng.choice(mine.cells)
                if cell.source in wrote:
                    wrote.remove(cell.source)
                cell.source = text
        for _ in range(rng.randrange(4)):
            text = f"course = {rng.randrange(10**9)}"
            kind = rng.choice(["insert", "change", "remove"])
            if kind == "insert" or not new:
                new.insert(rng.randrange(len(new) + 1), text)
            elif kind == "change":
                new[rng.randrange(len(new))] = text
            else:
                del new[rng.randrange(len(new))]
        merged, _both = workbook.merge(base, mine, made(new))
        everything = "\n".join(cell.source for cell in merged.cells)
        assert all(text in everything for text in wrote), (old, wrote, new)
        news = [text for text in new if text.startswith("course")]
        assert all(text in everything for text in news), (old, wrote, new)
        ids = [cell.id for cell in merged.cells]
        assert len(ids) == len(set(ids))
        again, _both = workbook.merge(made(new), merged, made(new))
        assert [c.source for c in again.cells] == [c.source for c in merged.cells]


def test_a_broken_copy_is_left_alone_and_the_others_go_on(desk):
    other = desk[0].with_name("02_next.ipynb")
    ship(other, made(TEXT))
    path = desk[1] / desk[0].name
    path.write_text('{"cells": [')
    changes = workbook.update([desk[0], other], desk[1])
    assert [c.what for c in changes] == ["left alone", "new"]
    assert "no whole notebook" in changes[0].reason
    assert path.read_text() == '{"cells": ['


def test_without_a_base_everything_of_the_readers_is_kept(desk):
    learn(desk, stub="def answer(x): return x")
    (desk[1] / ".base" / desk[0].name).unlink()
    course(desk, TEXT | {"end": "**Key points**, mended"})
    text = "\n".join(sources(desk))
    assert "def answer(x): return x" in text
    assert "**Key points**, mended" in text


def test_a_kill_before_the_base_was_written_costs_nothing(desk, monkeypatch):
    learn(desk, stub="def answer(x): return x")
    real = workbook.write

    def killed(path, notebook):
        if path.parent.name == ".base":
            raise KeyboardInterrupt
        real(path, notebook)

    monkeypatch.setattr(workbook, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        course(desk, TEXT | {"why": "# Why\nAnother sentence about speed."})
    monkeypatch.setattr(workbook, "write", real)
    before = sources(desk)
    change = workbook.update([desk[0]], desk[1])[0]
    assert (change.what, change.both) == ("updated", 0)
    assert sources(desk) == before


def test_kill_9_while_a_file_is_written_leaves_the_old_one_whole(tmp_path):
    code = (
        "import sys, nbformat\nfrom pathlib import Path\nfrom course_utils.course import workbook\n"
        "from nbformat.v4 import new_notebook, new_markdown_cell\n"
        "path, n = Path(sys.argv[1]), 0\n"
        "while True:\n"
        "    n += 1\n"
        "    cells = [new_markdown_cell(f'{n} ' * 20000, id='a')]\n"
        "    workbook.write(path, new_notebook(cells=cells))\n"
        "    print(n, flush=True)\n"
    )
    path = tmp_path / "01.ipynb"
    for _ in range(5):
        writer = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
        for _ in range(3):
            writer.stdout.readline()
        writer.kill()
        writer.wait()
        writer.stdout.close()
        text = nbformat.read(path, as_version=4).cells[0].source
        assert len(set(text.split())) == 1


def test_reset_keeps_the_old_copy(desk):
    learn(desk, stub="def answer(x): return x")
    kept = [workbook.reset(desk[0], desk[1]) for _ in range(2)]
    assert sources(desk) == list(TEXT.values())
    assert "return x" in kept[0].read_text()
    assert kept[0] != kept[1]
    (desk[1] / desk[0].name).unlink()
    assert workbook.reset(desk[0], desk[1]) is None


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="COURSE_WORKBOOK"):
        workbook.update([], tmp_path / "file" / "workbook")


def test_every_chapter_pairs_with_itself_and_its_exercises_have_names():
    for chapter in CHAPTERS:
        notebook = workbook.read(chapter.learner)
        assert workbook.pair(notebook, notebook) == {i: i for i in range(len(notebook.cells))}
        if chapter.number not in ("00",):
            assert len(workbook._exercises(notebook)) >= 3, chapter.name
