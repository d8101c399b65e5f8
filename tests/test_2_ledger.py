"""The ledger: what a full disk, a kill or a second writer may cost."""

import json
import subprocess
import sys

import pytest

from course_utils import ledger


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "ledger.jsonl"
    monkeypatch.setenv("COURSE_LEDGER", str(path))
    monkeypatch.setattr(ledger, "_told", set())
    return path


def verdict(claim: str, said: str) -> None:
    ledger.record("verdict", claim=claim, verdict=said)


def test_what_is_recorded_is_read_and_the_last_verdict_of_a_claim_counts(file):
    assert ledger.events() == []
    verdict("01.a", "holds here")
    ledger.record("check", exercise="01.A", status="passed")
    verdict("01.b", "inconclusive")
    verdict("01.a", "does not hold here")
    assert [e["event"] for e in ledger.events()] == ["verdict", "check", "verdict", "verdict"]
    assert {v["claim"]: v["verdict"] for v in ledger.verdicts()} == {
        "01.a": "does not hold here",
        "01.b": "inconclusive",
    }


def test_text_of_every_kind_stays_on_one_line(file):
    ledger.record("check", status="two\nlines, a \u2028 separator, é and 课程")
    assert file.read_bytes().count(b"\n") == 1
    assert ledger.events()[0]["status"] == "two\nlines, a \u2028 separator, é and 课程"


def test_a_half_written_last_line_costs_itself_alone_and_is_told_once(file, capsys):
    verdict("01.a", "holds here")
    with file.open("a") as half:
        half.write('{"event": "verdict", "claim": "01.b", "ver')
    verdict("01.c", "holds here")
    assert [v["claim"] for v in ledger.verdicts()] == ["01.a", "01.c"]
    told = capsys.readouterr().err
    assert "ledger.jsonl, line 2" in told
    assert told.count("\n") == 1
    assert [v["claim"] for v in ledger.verdicts()] == ["01.a", "01.c"]
    assert capsys.readouterr().err == "", "told once"
    assert len(file.read_text().splitlines()) == 3, "nothing of the reader's is thrown away"


@pytest.mark.parametrize("line", ["[]", "3", "{}", '{"event": 3}', "\xff", "null", '{"event"'])
def test_a_line_that_is_no_event_is_left_out(file, line, capsys):
    file.write_bytes(line.encode("latin-1") + b"\n\n")
    verdict("01.a", "holds here")
    assert len(ledger.events()) == 1
    assert "line 1" in capsys.readouterr().err


FULL_DISK = """\
import resource, signal
from pathlib import Path
from course_utils import ledger
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
ledger.record("check", exercise="01.A", status="passed")
size = ledger.path().stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, resource.RLIM_INFINITY))
ledger.record("verdict", claim="01.a", verdict="holds here")
ledger.record("verdict", claim="01.b", verdict="holds here")
print(ledger.path().stat().st_size - size)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
ledger.record("verdict", claim="01.c", verdict="holds here")
print([e.get("claim", "check") for e in ledger.events()])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="system: no limit on a file's size")
def test_a_full_disk_costs_what_did_not_fit_and_nothing_later(file):
    ran = subprocess.run([sys.executable, "-c", FULL_DISK], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == ["20", "['check', '01.c']"]
    assert "line 2" in ran.stderr


APPEND = """\
import sys
from course_utils import ledger
sys.stdin.readline()
for k in range(300):
    ledger.record("check", who=sys.argv[1], k=k, text=sys.argv[1] * (k % 50 * 20))
"""


def test_two_writers_at_once_do_not_mix_their_lines(file, capsys):
    command = [sys.executable, "-c", APPEND]
    both = [subprocess.Popen([*command, who], stdin=subprocess.PIPE, text=True) for who in "ab"]
    for one in both:
        one.stdin.write("go\n")
        one.stdin.flush()
    for one in both:
        assert one.wait(60) == 0
        one.stdin.close()
    events = ledger.events()
    for who in "ab":
        assert [e["k"] for e in events if e["who"] == who] == list(range(300))
    assert capsys.readouterr().err == ""


def test_each_record_is_one_write_of_a_whole_line(file, monkeypatch):
    written = []
    monkeypatch.setattr(ledger.os, "write", lambda _, line: written.append(line))
    verdict("01.a", "holds here")
    assert len(written) == 1
    assert written[0].endswith(b"\n")
    assert json.loads(written[0])["claim"] == "01.a"
