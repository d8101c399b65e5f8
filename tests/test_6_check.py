"""`course check`: a reader's notebook is judged without being run."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from course_utils.course import check, cli

RIGHT = "def speedup(old_seconds, new_seconds):\n    return old_seconds / new_seconds"
ASK = 'exercises.check("00.A", speedup)'


def written(path, *cells: tuple[str, str]):
    """A notebook of (tag, source) cells; a tag of "" is none."""
    book = new_notebook(cells=[new_markdown_cell("# a chapter")])
    for tag, source in cells:
        book.cells.append(new_code_cell(source, metadata={"tags": [tag]} if tag else {}))
    nbformat.write(book, path)
    return path


@pytest.mark.parametrize(
    ("answer", "status", "said"),
    [
        (RIGHT, "passed", "above 1 is faster"),
        (RIGHT.replace(" / ", " * "), "wrong", "speedup(12, 4)"),
        ("def speedup(old_seconds, new_seconds): ...", "pending", "Replace the"),
        ("def speedup(old_seconds, new_seconds:", "wrong", "SyntaxError"),
        ("speedup = undefined_name", "wrong", "NameError: name 'undefined_name'"),
        ("def other():\n    return 1", "wrong", "no cell above the check defines speedup"),
        ("import os\nspeedup = lambda a, b: os._exit(3)", "wrong", "exit status 3"),
        ("%matplotlib inline\n!true\n" + RIGHT, "passed", "above 1 is faster"),
        ("speedup = type('', (), {'__call__': lambda self, a, b: a / b})()", "passed", "above"),
    ],
)
def test_an_answer_is_judged_from_its_cell(answer, status, said, tmp_path):
    path = written(tmp_path / "a b.ipynb", ("exercise", answer), ("", ASK))
    (result,) = check.check(path)
    assert (result.id, result.status) == ("00.A", status), result
    assert said in result.message


def test_helpers_of_other_cells_are_there_and_nothing_else_is_run(tmp_path):
    witness = tmp_path / "witness"
    path = written(
        tmp_path / "book.ipynb",
        ("", "import operator as op\ndef ratio(a, b):\n    return op.truediv(a, b)"),
        ("", f"open({str(witness)!r}, 'w')"),
        ("", "%%writefile " + str(witness) + "\nnothing"),
        ("exercise", "speedup = ratio"),
        ("", ASK),
        ("", "def speedup(a, b):\n    return 0"),  # below the check
    )
    (result,) = check.check(path)
    assert result.status == "passed", result
    assert not witness.exists()


def test_an_answer_that_ends_the_process_costs_the_next_one_nothing(tmp_path, capsys):
    ends = "import os\ndef p99(latencies):\n    os._exit(7)"
    path = written(
        tmp_path / "two.ipynb",
        *(("exercise", ends), ("", 'exercises.check("01.A", p99)')),
        *(("exercise", RIGHT), ("", ASK)),
    )
    assert cli.main(["check", str(path)]) == 1
    said = capsys.readouterr().out
    assert "Exercise 01.A: not yet right: your code took the whole process" in said
    assert "Exercise 00.A: passed" in said


def test_an_exercise_that_does_not_exist_is_told(tmp_path):
    path = written(tmp_path / "x.ipynb", ("", RIGHT), ("", 'exercises.check("00.Z", speedup)'))
    (result,) = check.check(path)
    assert "no exercise '00.Z'" in result.message


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("none.ipynb", None, "there is no notebook"), ("bad.ipynb", "no json", "is no notebook")],
)
def test_what_is_no_notebook_is_refused(name, content, said, tmp_path, capsys):
    if content:
        (tmp_path / name).write_text(content)
    assert cli.main(["check", str(tmp_path / name)]) == 2
    assert said in capsys.readouterr().err


def test_a_shipped_notebook_has_only_exercises_not_yet_attempted(capsys):
    assert cli.main(["check", "00"]) == 0
    assert capsys.readouterr().out.count("not attempted yet") == 1
