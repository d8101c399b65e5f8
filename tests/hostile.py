"""Learners who hand in something else than answers, for `course grade`: each with what it must get.

Each hands in chapter 03. `cells` replaces the answers of exercises (all others are right ones);
`due` says what each exercise must get, and `said` a part of what its message or a flag says.
"""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from course_utils import ROOT

RIGHT = {"03.A": "passed", "03.B": "passed", "03.C": "passed"}


@dataclass(frozen=True)
class Hostile:
    """`rework` changes the whole notebook (bytes to {file name: bytes}) where cells do not do.
    `dangerous` ones are only let loose where `walls.lacking()` says that nothing is missing.
    """

    name: str
    cells: dict[str, str]
    due: dict[str, str]
    said: str = ""
    rework: Callable[[bytes], dict[str, bytes]] = field(default=lambda book: {"03.ipynb": book})
    dangerous: bool = False


def _a(body: str, before: str = "") -> dict[str, str]:
    """An answer to 03.A, judged across a socket."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    return {"03.A": f"{before}\ndef channel_importance(weight, grad):\n{lines}\n"}


def _b(body: str, before: str = "") -> dict[str, str]:
    """An answer to 03.B, whose check runs beside it."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    return {"03.B": f"{before}\ndef shrink(conv1, bn, conv2, keep):\n{lines}\n"}


def _due(**changed: str) -> dict[str, str]:
    return RIGHT | {f"03.{letter}": status for letter, status in changed.items()}


_JUDGES = """\
import sys
for name in ("course_utils.exercises", "course_utils.checks.ch03", "course_utils.probe"):
    space = sys.modules[name].__dict__
    space.update(Wrong=type("Never", (Exception,), {}), check=print, apart=lambda *a: ("", ""))
"""
_FORGED = """\
import os, struct
head = b'["verdict", "passed", "all is well"]'
ready = b'["value", ["list", []], false]'
for text in (head, ready):
    for fd in range(3, 64):
        try:
            os.write(fd, struct.pack("<IQ", 1, len(text)) + text)
        except OSError:
            pass
"""
_FORKS = """\
import os
while True:
    try:
        os.fork()
    except OSError:
        pass"""
_SOLUTIONS = str(ROOT / "notebooks" / "source" / "03_pruning.py")
_HIDDEN_SYS = "sys = __builtins__['__import__']('sys') if 0 else getattr(torch, 'o' + 's').sys"


def table(canary: Path, port: int) -> list[Hostile]:
    """All cases. `canary` is a file that must live on, beside which nothing may appear; nobody may
    connect to `port` of this machine.
    """
    witness = canary.with_name("witness")
    return [
        *_greedy(),
        *_reaching(canary, port),
        *_patching(),
        *_lying(witness),
        *_files(witness),
    ]


def _greedy() -> list[Hostile]:
    """They take all there is, or their process with them."""
    return [
        Hostile("loops", _a("while True:\n    pass"), _due(A="error"), "was stopped"),
        Hostile("sleeps", _a("import time\ntime.sleep(1e6)"), _due(A="error"), "was stopped"),
        Hostile(
            "forks",
            _a(_FORKS),
            _due(A="error"),
            "stopped",
        ),
        Hostile(
            "prints",
            _a("while True:\n    print('x' * 2**20)"),
            _due(A="error"),
            "printed more than",
        ),
        Hostile(
            "fills the memory",
            _a("x = []\nwhile True:\n    x.append(bytearray(2**26))"),
            _due(A="wrong"),
            "MemoryError",
        ),
        Hostile(
            "fills the disk",
            _a(
                "import itertools\nfor i in itertools.count():\n"
                "    open(f'f{i}', 'wb').write(bytes(2**25))"
            ),
            _due(A="error"),
            "of files",
        ),
        Hostile("exits", _a("import os\nos._exit(0)"), _due(A="error"), "took the whole process"),
        Hostile("exits softly", _a("import sys\nsys.exit()"), _due(A="wrong"), "sys.exit"),
        Hostile(
            "leaves a daemon",
            _a(
                "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
                "        time.sleep(1e6)\n    os._exit(0)\nos.wait()\nreturn 1"
            ),
            _due(A="wrong"),
            "was expected",
        ),
    ]


def _reaching(canary: Path, port: int) -> list[Hostile]:
    """They want what is not theirs."""
    return [
        Hostile(
            "kills",
            _a("import os\nos.kill(os.getppid(), 9)\nos.kill(-1, 9)"),
            _due(A="wrong"),
            "PermissionError",
            dangerous=True,
        ),
        Hostile(
            "deletes",
            _a(f"import os\nos.remove({str(canary)!r})"),
            _due(A="wrong"),
            "PermissionError",
            dangerous=True,
        ),
        Hostile(
            "connects",
            _a(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 5)"),
            _due(A="wrong"),
            "raised",
            dangerous=True,
        ),
        Hostile(
            "reads the solution",
            _a(f"exec(open({_SOLUTIONS!r}).read(), globals())"),
            _due(A="wrong"),
            "PermissionError",
            dangerous=True,
        ),
    ]


def _patching() -> list[Hostile]:
    """They change what judges them."""
    return [
        Hostile(
            "patches exercises",
            _a("return 0", "from course_utils import exercises\nexercises.check = print"),
            _due(A="error"),
            "it sets exercises.check",
        ),
        Hostile(
            "patches claims",
            _b("return 0", "from course_utils import claims\nclaims.verdict = print"),
            _due(B="error"),
            "it sets claims.verdict",
        ),
        Hostile("patches unseen", _a("return weight", _JUDGES), _due(A="wrong"), "was expected"),
        Hostile("patches beside", _b("return 0", _JUDGES), _due(B="error"), "it imports sys"),
        Hostile(
            "hides a name",
            _b("return 0", _HIDDEN_SYS),
            _due(B="error"),
            "not written out",
        ),
    ]


def _lying(witness: Path) -> list[Hostile]:
    """They say what the check wants to hear, or send what must not be opened."""
    return [
        Hostile("forges a verdict", _a("return 0", _FORGED), _due(A="error"), "judge"),
        Hostile("forges beside", _b("return 0", _FORGED), _due(B="error"), "it imports os"),
        Hostile(
            "agrees with all",
            _a(
                "return [Yes()] * len(weight)",
                "class Yes(float):\n    __eq__ = __le__ = __ge__ = lambda *a: True\n"
                "    __float__ = lambda self: self\n    __hash__ = None",
            ),
            _due(A="wrong"),
            "was expected",
        ),
        Hostile(
            "returns a pickle",
            _a(
                "return Bad()",
                "class Bad:\n    def __reduce__(self):\n"
                f"        return open, ({str(witness)!r}, 'w')",
            ),
            _due(A="wrong"),
            "was expected",
        ),
        Hostile(
            "writes HTML",
            _a("raise ValueError('<script>alert(1)</script>')"),
            _due(A="wrong"),
            "<script>",
        ),
    ]


def _files(witness: Path) -> list[Hostile]:
    none = dict.fromkeys(RIGHT, "not attempted")
    stubs = {"03.A": "", "03.B": "", "03.C": ""}
    passed = [{"event": "check", "exercise": e, "status": "passed"} for e in RIGHT]
    ledger = "\n".join(map(json.dumps, passed)).encode()
    return [
        Hostile(
            "breaks the notebook", {}, none, "is no notebook", lambda book: {"03.ipynb": book[:-40]}
        ),
        Hostile(
            "renames cells",
            {},
            none,
            "is not there",
            lambda book: {"03.ipynb": book.replace(b'"id": "c03-', b'"id": "c03-x')},
        ),
        Hostile(
            "hands in twice",
            {"03.A": "channel_importance = 7"},
            RIGHT | {"03.A": "wrong"},
            "more than once",
            lambda book: {
                "03.ipynb": b'{"cells": []}',
                "03-1.ipynb": book,
                "03 (0).ipynb": book.replace(b"channel_importance = 7", b"channel_importance = 8"),
            },
        ),
        Hostile(
            "forges a ledger",
            stubs,
            none,
            "",
            lambda book: {"03.ipynb": book, "ledger.jsonl": ledger},
        ),
        Hostile(
            "hands in a pickle",
            stubs,
            none,
            "",
            lambda book: {"03.pkl": pickle.dumps(_Opens(witness)), "03.ipynb": book},
        ),
    ]


class _Opens:
    """Whoever unpickles it writes a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple:
        return open, (str(self.witness), "w")
