"""Who handed in what: a folder or a zip, as Moodle and Canvas export them, or one folder a learner.

Moodle's names ("Ada Lovelace_4711_assignsubmission_file_", a folder or a prefix of files) are those
of mod/assign's download of all submissions; Canvas's ("lovelaceada_LATE_4711_81234_03_pruning-1
.ipynb") those of its bulk download: the name without spaces, "LATE" where it was, the user's and
the attachment's number, the learner's file name, and "-1" and so on for one handed in again.
"""

import hashlib
import re
import stat
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path, PurePosixPath

from course_utils.course.chapters import UsageError

MOST_FILE = 64 * 2**20
MOST_ALL = 512 * 2**20
MOST_MEMBERS = 5000
_MOODLE = re.compile(
    r"^(?P<name>.+?)_(?P<id>\d+)_assignsubmission_(?:file|onlinetext)_?(?P<rest>.*)$"
)
_CANVAS = re.compile(r"^(?P<name>[^_]+)_(?P<late>LATE_)?(?P<id>\d+)_(?P<file>\d+)_(?P<rest>.+)$")
_AGAIN = re.compile(r"^(?P<stem>.*?)(?:-(?P<n>\d+)| \((?P<copy>\d+)\))?\.ipynb$")


@dataclass
class Submission:
    """One learner: `key` is unique and good for a file's name; `system` is "moodle", "canvas" or
    "". `notebooks` and `ledgers` map paths to bytes; `flags` say what was odd about what was handed
    in.
    """

    key: str
    name: str
    id: str = ""
    system: str = ""
    late: bool = False
    notebooks: dict[str, bytes] = field(default_factory=dict)
    ledgers: dict[str, bytes] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """SHA-256 of all notebooks with their names."""
        total = hashlib.sha256()
        for path, data in sorted(self.notebooks.items()):
            total.update(f"{path}\0{len(data)}\0".encode(errors="surrogateescape") + data)
        return total.hexdigest()


def read(source: Path) -> tuple[list[Submission], list[str]]:
    """All learners of a folder or zip, by name, and what was odd about it. Raises UsageError where
    there is none.
    """
    if not source.exists():
        raise UsageError(f"there is no {source}; give a folder or zip of submissions.")
    found: dict[tuple, Submission] = {}
    odd: list[str] = []
    for path, data in _files(source, odd):
        _add(found, path, data)
    if not found:
        raise UsageError(
            f"{source} holds no submissions. It must hold a folder or a zip a learner, or be what"
            " Moodle or Canvas exports."
        )
    every = sorted(found.values(), key=lambda s: (s.name.lower(), s.id))
    taken: set[str] = set()
    for one in every:
        base = re.sub(r"[^\w.-]+", "-", f"{one.name}-{one.id}" if one.id else one.name).strip("-.")
        key, n = base[:60] or "learner", 1
        while key.lower() in taken:
            n += 1
            key = f"{base[:60]}-{n}"
        taken.add(key.lower())
        one.key = key
    return every, odd


def _add(found: dict, path: PurePosixPath, data: bytes | None) -> None:
    first, *rest = path.parts
    if moodle := _MOODLE.match(first):
        who = ("moodle", moodle["name"], moodle["id"])
        inner = "/".join(rest) or moodle["rest"]
    elif not rest and (canvas := _CANVAS.match(first)):
        who = ("canvas", canvas["name"], canvas["id"])
        inner = canvas["rest"]
    else:
        who = ("", first if rest or data is None else path.stem, "")
        inner = "/".join(rest) or first
    one = found.setdefault(who, Submission("", who[1], who[2], who[0]))
    if who[0] == "canvas" and canvas["late"]:
        one.late = True
    if data is None:
        return
    if inner.lower().endswith(".zip"):
        for name, member in _members(data, inner, one.flags):
            _keep(one, f"{inner}/{name}", member)
    else:
        _keep(one, inner, data)


def _keep(one: Submission, path: str, data: bytes) -> None:
    parts = PurePosixPath(path).parts
    if ".ipynb_checkpoints" in parts or "__MACOSX" in parts:
        return
    if path.lower().endswith(".ipynb"):
        one.notebooks[path] = data
    elif path.lower().endswith(".jsonl"):
        one.ledgers[path] = data
    else:
        one.ignored.append(path)


def _files(source: Path, odd: list[str]) -> Iterator[tuple[PurePosixPath, bytes | None]]:
    """(path, bytes) of all that was handed in. A single folder around everything is left out."""
    if source.is_file():
        entries = list(_members(source.read_bytes(), source.name, odd))
        paths = [PurePosixPath(name) for name, _ in entries]
        tops = {p.parts[0] for p in paths}
        inside = len(tops) == 1 and min(len(p.parts) for p in paths) > 2
        for path, (_, data) in zip(paths, entries, strict=True):
            yield (PurePosixPath(*path.parts[1:]) if inside else path), data
        return
    for path in sorted(source.rglob("*")):
        inner = PurePosixPath(path.relative_to(source).as_posix())
        if any(p.is_symlink() for p in (path, *path.parents) if p.is_relative_to(source)):
            odd.append(f"{inner} is a link, and was not followed")
        elif path.is_dir() and path.parent == source:
            yield inner, None
        elif path.is_file():
            if path.stat().st_size > MOST_FILE:
                odd.append(f"{inner} is larger than {MOST_FILE / 2**20:.0f} MiB and was not read")
            else:
                yield inner, path.read_bytes()


def _members(data: bytes, name: str, flags: list[str]) -> Iterator[tuple[str, bytes]]:
    """The files of a zip, as far as they are what they seem: no link, no path that leads out, and
    in all not more than MOST_ALL bytes, counted as they are unpacked.
    """
    try:
        archive = zipfile.ZipFile(BytesIO(data))
        infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        flags.append(f"{name} is no zip that can be read")
        return
    if len(infos) > MOST_MEMBERS:
        flags.append(f"{name} has {len(infos)} members; the first {MOST_MEMBERS} were read")
    room = MOST_ALL
    for info in infos[:MOST_MEMBERS]:
        path = PurePosixPath(info.filename.replace("\\", "/"))
        if info.is_dir():
            continue
        if path.is_absolute() or ".." in path.parts or not path.parts or ":" in path.parts[0]:
            flags.append(f"{name}: the path {str(path)[:80]} leads out of it, and was left out")
        elif stat.S_ISLNK(info.external_attr >> 16):
            flags.append(f"{name}: {str(path)[:80]} is a link, and was left out")
        else:
            content = _unpacked(archive, info, min(MOST_FILE, room))
            if content is None:
                flags.append(f"{name}: {str(path)[:80]} is too large or broken, and was left out")
            else:
                room -= len(content)
                yield str(path), content


def _unpacked(archive: zipfile.ZipFile, info: zipfile.ZipInfo, most: int) -> bytes | None:
    try:
        with archive.open(info) as file:
            content = file.read(most + 1)
    except (zipfile.BadZipFile, RuntimeError, OSError, NotImplementedError, EOFError, ValueError):
        return None
    except Exception:  # zlib.error and the like
        return None
    return content if len(content) <= most else None


def order(path: str) -> tuple[int, str]:
    """Of two notebooks of a chapter the one handed in later comes later: "-1", "(1)"."""
    again = _AGAIN.match(PurePosixPath(path).name)
    return (int(again["n"] or again["copy"] or 0) if again else 0), path
