"""The parts of `course grade`, one at a time: who handed in what, what crosses between two
processes, what looks like tampering, gradebooks and pages.
"""

import csv
import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from test_6_grade import EXERCISES, RIGHT, notebook

from course_utils.course.chapters import UsageError
from course_utils.course.grading import (
    gradebook,
    jobs,
    pages,
    picking,
    submissions,
    tampering,
    wire,
)


def zipped(members: dict[str, bytes], links: tuple[str, ...] = ()) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (0o120777 if name in links else 0o644) << 16
            z.writestr(info, data)
    return buffer.getvalue()


def test_moodle_s_and_canvas_s_names_are_understood(tmp_path):
    inner = zipped({"workbook/03.ipynb": b"3", "workbook/ledger.jsonl": b""})
    moodle = {
        "Ada Lovelace_4711_assignsubmission_file_/03.ipynb": b"1",
        "Ada Lovelace_4712_assignsubmission_file_/03.ipynb": b"2",
        "Bob_X_9_assignsubmission_file_/book.zip": inner,
    }
    (tmp_path / "m.zip").write_bytes(zipped(moodle))
    found, _ = submissions.read(tmp_path / "m.zip")
    assert [(s.name, s.id, s.system) for s in found] == [
        ("Ada Lovelace", "4711", "moodle"),
        ("Ada Lovelace", "4712", "moodle"),
        ("Bob_X", "9", "moodle"),
    ]
    assert len({s.key for s in found}) == 3
    assert found[2].notebooks == {"book.zip/workbook/03.ipynb": b"3"}
    canvas = {
        "lovelaceada_LATE_11_801_03_pruning.ipynb": b"old",
        "lovelaceada_LATE_11_802_03_pruning-1.ipynb": b"new",
        "nobeloscar_12_803_04.ipynb": b"4",
    }
    (tmp_path / "c.zip").write_bytes(zipped(canvas))
    (ada, oscar), _ = submissions.read(tmp_path / "c.zip")
    assert (ada.name, ada.id, ada.late, oscar.late) == ("lovelaceada", "11", True, False)
    assert sorted(ada.notebooks, key=submissions.order)[-1] == "03_pruning-1.ipynb"


def test_a_zip_that_means_harm_does_none(tmp_path, monkeypatch):
    monkeypatch.setattr(submissions, "MOST_FILE", 2**20)
    monkeypatch.setattr(submissions, "MOST_ALL", 2**20)
    members = {
        "Eve/../../out.ipynb": b"x",
        "/Eve/root.ipynb": b"x",
        "Eve/link.ipynb": b"/etc/passwd",
        "Eve/bomb.ipynb": bytes(2**24),
        "Eve/fine.ipynb": b"fine",
        "Eve/inner.zip": b"no zip",
    }
    (tmp_path / "z.zip").write_bytes(zipped(members, ("Eve/link.ipynb",)))
    (eve,), odd = submissions.read(tmp_path / "z.zip")
    assert eve.notebooks == {"fine.ipynb": b"fine"}
    assert (len(odd), len(eve.flags)) == (4, 1)
    (tmp_path / "d" / "Eve").mkdir(parents=True)
    (tmp_path / "d" / "Eve" / "x.ipynb").symlink_to("/etc/passwd")
    (tmp_path / "d" / "Eve" / "03.ipynb").write_bytes(b"fine")
    (eve,), odd = submissions.read(tmp_path / "d")
    assert eve.notebooks == {"03.ipynb": b"fine"}
    assert odd == ["Eve/x.ipynb is a link, and was not followed"]


class Liar(str):
    def __eq__(self, other):
        return True

    __hash__ = str.__hash__


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 3, 10**40, -0.5, float("inf"), "text", b"bytes", 2j, torch.float16),
        *([1, (2.0, "x")], {"a": [1]}, {1, 2}, np.float32(0.5), np.arange(6).reshape(2, 3)),
        *(torch.zeros(2, 0), torch.ones(3, dtype=torch.bfloat16), torch.tensor(7), ...),
    ],
    ids=repr,
)
def test_plain_values_cross_the_border_as_they_are(value):
    packed, blobs = wire.pack(value, lambda _: 0)
    got = wire.unpack(json.loads(json.dumps(packed)), blobs)
    assert type(got) is type(value)
    assert repr(got) == repr(value)


def test_nothing_crosses_the_border_that_can_lie():
    kept = []
    values = [Liar("faster"), iter([1, 2]), torch.nn.Parameter(torch.ones(1)), print]
    packed, blobs = wire.pack(values, lambda v: kept.append(v) or len(kept) - 1)
    word, numbers, tensor, function = wire.unpack(packed, blobs)
    assert type(word) is str
    assert word != "slower"
    assert numbers == [1, 2]
    assert type(tensor) is torch.Tensor
    assert isinstance(function, wire.Foreign)
    assert kept == [print]


@pytest.mark.parametrize(
    "message",
    [["tensor", "float32", [9], 0], ["list"], ["eval", "1"], 7, ["array", "O", [1], 0, 0]],
)
def test_what_is_no_message_is_refused(message):
    with pytest.raises(wire.Broken):
        wire.unpack(message, [b"abc"])


@pytest.mark.parametrize("name", sorted(EXERCISES))
def test_no_right_and_no_wrong_answer_looks_like_tampering(name):
    exercise = EXERCISES[name]
    for source in (exercise.solution, *exercise.wrong):
        assert tampering.signs(source, name in jobs.WITHIN) == []


def test_what_is_patched_beside_a_check_is_seen(monkeypatch):
    from course_utils.checks import accept

    watch = tampering.Watch()
    assert watch.touched() == []
    monkeypatch.setattr(accept, "close", lambda *a, **k: True)
    monkeypatch.setattr(torch, "allclose", lambda *a, **k: True)
    assert {"course_utils.checks.accept.close", "torch.allclose"} <= set(watch.touched())


def test_a_stub_is_not_attempted_and_a_cell_is_known_by_its_id_alone():
    tasks = jobs.tasks(["00"])
    (task,) = tasks.values()
    one = submissions.Submission("x", "x", notebooks={"a.ipynb": notebook("00", {})})
    assert picking.pick(one, tasks)["00.A"]["status"] == "not attempted"
    one.notebooks = {"a.ipynb": notebook("00", RIGHT).replace(task.cell.encode(), b"elsewhere")}
    picked = picking.pick(one, tasks)["00.A"]
    assert picked["status"] == "not attempted"
    assert task.cell in picked["flags"][0]


@pytest.mark.parametrize(
    "cell",
    ["\0", "'''", "(" * 5000, "x" + ".a" * 20_000, "\ud800", "%%bash\nrm", "%x", "!y", "9" * 9999],
    ids=ascii,
)
def test_no_cell_is_so_odd_that_the_grading_stops(cell):
    tasks = jobs.tasks(["00"])
    book = json.loads(notebook("00", {}))
    for one in book["cells"]:
        if one["id"] == tasks["00.A"].cell:
            one["source"] = cell
    handed = submissions.Submission("x", "x", notebooks={"a.ipynb": json.dumps(book).encode()})
    picked = picking.pick(handed, tasks)["00.A"]
    assert picked.get("status") != "passed"
    assert handed.digest


@pytest.mark.parametrize(
    "book", [b"", b"7", b"[]", b'{"cells": 7}', b'{"cells": [7, {}]}', b"[" * 100_000, b"\xff\xfe"]
)
def test_no_notebook_is_so_broken_that_the_grading_stops(book):
    handed = submissions.Submission("x", "x", notebooks={"a.ipynb": book})
    assert picking.pick(handed, jobs.tasks(["00"]))["00.A"]["status"] == "not attempted"


def result(*messages: str) -> dict:
    def row(k: int, message: str) -> dict:
        outcome = {"status": "wrong", "message": message, "flags": []}
        base = {"key": f"k{k}", "name": f"=N{k}", "id": str(k), "system": "canvas", "late": False}
        return base | {"flags": [], "passed": 0, "exercises": {"03.A": outcome}}

    rows = [row(k, m) for k, m in enumerate(messages)]
    return {"exercises": ["03.A"], "learners": rows, "seed": 1, "walls_missing": [], "flags": []}


def test_equal_mistakes_are_counted_together_whatever_their_numbers():
    latency = "speedup(12, 4) is {}; a right answer is 3. Yours is the latency ratio."
    found = pages.commonest(result(latency.format(0.3), latency.format(0.25), "It raised <b>."))
    assert [(count, belief) for _, count, belief, _ in found] == [
        (2, "Yours is the latency ratio."),
        (1, ""),
    ]
    assert pages.alike("[1.5, 2, 3] of 4") == pages.alike("[7] of 12")


def test_gradebooks_have_the_columns_that_their_systems_ask_for():
    files = {n: list(csv.reader(io.StringIO(t))) for n, t in gradebook.files(result("x")).items()}
    head, possible, ada = files["canvas.csv"]
    assert head == ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", "Chapter 03"]
    assert possible[0].strip() == "Points Possible"
    assert possible[-1] == "1"
    assert ada[:2] == ["'=N0", "0"]
    head, ada = files["moodle.csv"]
    assert {"Identifier", "Grade", "Last modified (grade)"} <= set(head)  # or it takes no line
    assert ada[0] == "Participant 0"


def luminance(colour: str) -> float:
    full = colour if len(colour) == 7 else "#" + "".join(c * 2 for c in colour[1:])
    parts = [int(full[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_pages_need_nothing_from_elsewhere_and_can_be_read():
    told = result("<img src=x onerror=alert(1)>")
    for page in (pages.overview(told), pages.feedback(told["learners"][0])):
        assert "<img" not in page
        assert not re.search(r"https?://", page)
        assert page.count("<table") == page.count("<thead")
    pairs = re.findall(r"background:(#\w+);color:(#\w+)", pages.STYLE)
    for scheme in re.findall(r"--ink:(#\w+);--paper:(#\w+);--line:#\w+;--soft:(#\w+)", pages.STYLE):
        pairs += [(scheme[1], scheme[0]), (scheme[1], scheme[2])]
    assert len(pairs) == 8
    for paper, ink in pairs:
        low, high = sorted((luminance(paper), luminance(ink)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (paper, ink)


def test_a_copy_without_sources_is_told(monkeypatch):
    monkeypatch.setattr(jobs, "chapters", lambda wanted: [type("C", (), {"source": Path("no")})])
    with pytest.raises(UsageError, match="no sources"):
        jobs.tasks()
