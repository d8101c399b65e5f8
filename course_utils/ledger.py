"""The reader's ledger: every verdict, check and skip, one JSON object a line.

The file is COURSE_LEDGER, or ledger.jsonl in the workbook (COURSE_WORKBOOK, or workbook/ in the
course's folder). A full disk, a kill or two notebooks at once must not cost more than the line that
was being written.
"""

import json
import os
import sys
import time
from pathlib import Path

from course_utils import ROOT

__all__ = ["events", "path", "record", "verdicts"]
_told: set[tuple[Path, bytes]] = set()


def path() -> Path:
    """Where the ledger lies.

    >>> path().suffix
    '.jsonl'
    """
    folder = os.environ.get("COURSE_WORKBOOK", ROOT / "workbook")
    return Path(os.environ.get("COURSE_LEDGER", Path(folder) / "ledger.jsonl"))


def record(event: str, **fields: object) -> None:
    """Append an event (a verdict, a check, a skip, a prediction) with its time; without a writable
    place it is only shown.

    >>> record("check", exercise="99.A", status="passed")
    """
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    line = json.dumps({"event": event, **fields, "at": moment}, ensure_ascii=False).encode() + b"\n"
    try:
        path().parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
        file = os.open(path(), flags, 0o666)
        try:
            # One write of whole lines: with O_APPEND two writers do not mix theirs. A line that
            # an earlier writer left unfinished is closed first.
            os.write(file, line if _ends_whole(file) else b"\n" + line)
        finally:
            os.close(file)
    except OSError:
        pass


def _ends_whole(file: int) -> bool:
    if os.fstat(file).st_size == 0:
        return True
    os.lseek(file, -1, os.SEEK_END)
    return os.read(file, 1) == b"\n"


def events(file: Path | None = None) -> list[dict]:
    """All events of a ledger (this reader's by default), the oldest first.

    A line that is no event, half-written say, is left out, and told once on the error stream.

    >>> record("check", exercise="99.A", status="passed")
    >>> events()[-1]["event"]
    'check'
    """
    file = file or path()
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError:
        return []
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
            whole = isinstance(event, dict) and isinstance(event["event"], str)
        except (ValueError, KeyError):
            whole = False
        if whole:
            found.append(event)
        elif (file, line) not in _told:
            _told.add((file, line))
            print(
                f"{file.name}, line {number}: this is no whole event (a write that was cut off?)."
                " It is left out; the others count.",
                file=sys.stderr,
            )
    return found


def verdicts() -> list[dict]:
    """This reader's verdicts so far, the last one of each claim.

    >>> record("verdict", claim="99.twice", verdict="holds here")
    >>> verdicts()[-1]["claim"]
    '99.twice'
    """
    return list(
        {e["claim"]: e for e in events() if e["event"] == "verdict" and "claim" in e}.values()
    )
