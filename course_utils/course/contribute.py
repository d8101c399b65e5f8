"""`course contribute`: check a ledger and write the file that a pull request adds to the atlas.

A ledger is taken as it was measured or not at all. Everything that can be computed again is: each
verdict from its interval and today's band, the self-test's answer from its numbers.
"""

import datetime
import getpass
import json
import math
import re
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from course_utils import ROOT, claims, cpu, machine
from course_utils.card import Card
from course_utils.course import atlas, report
from course_utils.course.chapters import UsageError, writable
from course_utils.course.shape import MACHINE_PATH

PERSONAL = re.compile(
    rf"{MACHINE_PATH.pattern}|[A-Za-z]:\\\w+|\\\\\w+\\|~/\w|[\w.+-]+@[\w-]+\.\w+|https?://"
)
COMMON = {"root", "user", "admin", "ubuntu", "localhost", "runner", "jovyan", "course"}
"""Names of accounts and machines that say nothing about a person, and may be ordinary words."""
SHOWN = 6  # complaints


def contribute(
    source: Path, name: str | None = None, commit: str | None = None, folder: Path = atlas.FOLDER
) -> Path:
    """Check the ledger `source` and write it to `folder`, whole or not at all; returns the file.

    Raises UsageError with what is wrong: no ledger, no self-test passed, a verdict that does not
    follow from its numbers, a question that is no longer asked, a path or a name of a person.
    """
    rows = report.read(source)
    commit = commit or rows[0].get("commit") or head()
    found = [*complaints(rows), *_named(name, commit)]
    if found:
        more = f"\n- and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        lines = "".join(f"\n- {one}" for one in found[:SHOWN])
        raise UsageError(f"{source} can't go into the atlas:{lines}{more}")
    card = rows[0]["machine"]
    name = name or slug(card)
    target = writable(folder) / f"{name}.json"
    if target.is_file() and _processor(atlas.read(target).machine) != _processor(card):
        raise UsageError(f"{target} is another machine's ledger: choose another --name.")
    whole = {
        "format": atlas.FORMAT,
        "name": name,
        "date": max(row["at"] for row in rows)[:10],
        "commit": commit,
        "machine": card,
        "verdicts": [_row(row) for row in sorted(rows, key=lambda row: row["claim"])],
    }
    part = target.with_suffix(".part")
    part.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(target)
    return target


def complaints(rows: list[dict]) -> list[str]:
    """Why these rows, as `report.read` gives them, are no ledger for the atlas; [] if they are."""
    card = rows[0]["machine"]
    if any(row["machine"] != card for row in rows):
        return ["it mixes machines: every row must carry the same card. Run all on one machine."]
    found = [*_card(card), *_dates(rows), *_personal(rows)]
    for row in rows:
        found += [f"{row['claim']}: {fault}" for fault in _faults(row)]
    names = [row["claim"] for row in rows]
    found += [
        f"{name} stands there twice" for name in sorted({n for n in names if names.count(n) > 1})
    ]
    wanted = {name[:2] for name in claims.registry()}
    if lacking := sorted(wanted - {name[:2] for name in names}):
        found.append(f"it is not whole: no verdict from chapter {', '.join(lacking)}: `course run`")
    return found


def _card(card: dict) -> Iterator[str]:
    known = {field.name for field in fields(Card)}
    if missing := sorted(known - card.keys() - {"caps", "model", "unknown", "allocator"}):
        yield f"its machine card lacks {', '.join(missing)}: it was made by an older course"
    if extra := sorted(card.keys() - known):
        yield f"its machine card holds {', '.join(extra)}, which no card has"
    if card.get("profile") not in ("fast", "full"):
        yield f"it was run in the profile {card.get('profile')!r}: sizes count in fast or full only"
    if odd := sorted({*card.get("isa", ())} - {*cpu.X86, *cpu.ARM}):
        yield f"the instruction sets {', '.join(odd)} are none that the course looks for"
    if odd := sorted({*card.get("caps", {})} - {*machine.CAPS}):
        yield f"the caps {', '.join(odd)} are none that the course knows"
    versions = card.get("versions") or {}
    if "torch" not in versions or not all(re.match(r"\d+\.\d", str(v)) for v in versions.values()):
        yield f"its versions are {versions}: torch's must be there, and each must be a version"
    yield from _selftest(card)


def _selftest(card: dict) -> Iterator[str]:
    """The self-test must have passed, on this processor, by its own numbers."""
    test = card.get("selftest") or {}
    if not test:
        yield "its card carries no self-test: run `course selftest`, then the chapters"
        return
    if test.get("cpu") != card.get("cpu"):
        yield f"its self-test is of another processor, {test.get('cpu')!r}"
    try:
        (_, low, high), (_, known_low, known_high) = test["equal"], test["known"]
        passed = low <= 1 <= high and known_low <= 1.515 and known_high >= 1.485
        passed = passed and test["programs"] >= 10 and test["held"] >= test["programs"] - 1
    except (KeyError, TypeError, ValueError):
        yield "its self-test is broken: it lacks the numbers that `course selftest` keeps"
        return
    if not test.get("passed"):
        yield "its self-test did not pass: repeat it with nothing else running"
    elif not passed:
        yield "its self-test says passed, and its own numbers say it did not"


def _dates(rows: list[dict]) -> Iterator[str]:
    days = [str(row.get("at", ""))[:10] for row in rows]
    try:
        latest = max(map(datetime.date.fromisoformat, days))
    except ValueError:
        yield "a row lacks the time at which it was measured"
        return
    if latest > datetime.date.today() + datetime.timedelta(days=1):
        yield f"it was measured on {latest}, which lies in the future"


def _faults(row: dict) -> Iterator[str]:
    """What is wrong with one verdict, judged again from its numbers."""
    claim = claims.registry().get(row["claim"])
    if claim is None:
        yield "no claim of the course has this name"
        return
    for field in ("statement", "unit", "stand_in"):
        if row.get(field, "") != getattr(claim, field):
            yield f"its {field} is not what the course asks today"
    numbers = [row["value"], row["low"], row["high"]]
    if row["verdict"] == claims.UNTESTED:
        if numbers != [None] * 3 or not row["reason"]:
            yield "what could not be tested has a reason and no numbers"
        return
    if not all(isinstance(x, int | float) and not math.isnan(x) for x in numbers):
        yield f"its numbers are {numbers}"
    elif not row["low"] <= row["value"] <= row["high"]:
        yield f"{row['value']} does not lie in its interval [{row['low']}, {row['high']}]"
    elif (due := claims.status(claim.band, row["low"], row["high"])) != row["verdict"]:
        yield f"its numbers say {due!r}, and it says {row['verdict']!r}"


def _personal(rows: list[dict]) -> Iterator[str]:
    """A path, an address, an account's or a machine's name in what would be published."""
    own = {_account(), socket.gethostname().split(".")[0].lower()} - COMMON
    words = [re.escape(name) for name in own if len(name) >= 3]
    names = re.compile(rf"(?i)\b({'|'.join(words)})\b") if words else None
    texts = list(_texts(rows[0]["machine"]))
    texts += [str(row.get(key, "")) for row in rows for key in ("reason", "scope")]
    for text in texts:
        for pattern in filter(None, (PERSONAL, names)):
            if found := pattern.search(text):
                yield f"a path or a name stands in {text[:80]!r}: {found.group(0)!r}"


def _account() -> str:
    try:
        return getpass.getuser().lower()
    except (OSError, KeyError):  # a process without an account, in a container say
        return ""


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, one in value.items():
            yield from (str(key), *_texts(one))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)
    elif isinstance(value, str):
        yield value


def _named(name: str | None, commit: str) -> Iterator[str]:
    if name is not None and not re.fullmatch(r"[a-z0-9][a-z0-9-]{2,39}", name):
        yield f"--name is {name!r}: 3 to 40 small letters, digits and hyphens, e.g. zen4-vnni-bf16"
    if not re.fullmatch(r"[0-9a-f]{7,40}", commit):
        yield f"the commit is {commit!r}: 7 to 40 hexadecimal digits. Say it with --commit"


def head() -> str:
    """The commit of this copy. UsageError where it is none, or where code or claims differ from
    it: then nobody could repeat the run.
    """
    try:
        told = [
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
            for words in (
                ("rev-parse", "HEAD"),
                ("status", "--porcelain", "--", "course_utils", "notebooks/source"),
            )
        ]
    except (OSError, subprocess.CalledProcessError):
        raise UsageError(
            "this copy of the course has no git history: say with --commit which commit measured."
        ) from None
    if told[1].stdout.strip():
        raise UsageError(
            "the course's code differs from its last commit: commit first, or say with --commit"
            " which commit measured."
        )
    return told[0].stdout.strip()


def slug(card: dict) -> str:
    """A file's name from the card, e.g. "amd-epyc-bf16"."""
    capped = "-capped" if card.get("caps") else ""
    text = re.sub(r"\((r|tm)\)|@.*|\bcpu\b|\bprocessor\b", " ", card["cpu"].lower())
    words = re.sub(r"[^a-z0-9]+", "-", text).strip("-")[:24].strip("-") or "machine"
    return f"{words}-{atlas.kind(card)}{capped}"


def _processor(card: dict) -> tuple:
    return card["cpu"], tuple(card["isa"]), tuple(sorted(card.get("caps", {}).items()))


def _row(row: dict) -> dict:
    claim = claims.find(row["claim"])
    return {key: row.get(key, "") for key in atlas.ROW} | {"asked": atlas.asked(claim)}
