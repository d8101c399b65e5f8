"""One exercise: a judge, which runs the course's check, and the answer's process that it forks.

The judge never executes a line of the learner's. Whatever does not come to a clean verdict ends in
"error", with the reason.
"""

import contextlib
import io
import os
import select
import shutil
import socket
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

from course_utils import exercises
from course_utils.course.grading import answering, remote, walls, wire

SHOWN = 4000  # characters of what an answer printed


def main(channel: socket.socket) -> None:
    """In the fork: read the job, judge it, tell the outcome."""
    os.setsid()
    walls.adopt()
    pairs = [socket.socketpair() for _ in range(remote.CHANNELS + 1)]
    told, said = os.pipe()  # what the answer prints
    missing, walled = os.pipe()  # which walls are not up
    job, _ = wire.receive(channel)
    scratch = Path(tempfile.mkdtemp(prefix="course-grade-", dir=job["scratch"]))
    pid = os.fork()
    if pid == 0:
        _answer(channel, pairs, (told, said), (missing, walled), job, scratch)
    for fd in (said, walled):
        os.close(fd)
    for _, theirs in pairs:
        theirs.close()
    guard = Guard(pid, job["slot"], walls.Limits(**job["limits"]), told, channel, scratch)
    outcome = _outcome([mine for mine, _ in pairs], job, guard)
    guard.end()
    outcome["missing"] = os.read(missing, 4096).decode().splitlines()
    outcome["printed"] = guard.printed.decode(errors="replace")[:SHOWN]
    shutil.rmtree(scratch, ignore_errors=True)
    with contextlib.suppress(wire.Broken):
        wire.send(channel, outcome, [])


def _answer(
    channel: socket.socket,
    pairs: list,
    told: tuple,
    missing: tuple,
    job: dict,
    scratch: Path,
) -> None:
    """In the second fork: close what is the judge's, put up the walls, and serve."""
    try:
        os.setsid()
        limits = walls.Limits(**job["limits"])
        job.clear()  # what the judge knows; the answer is told its own part
        channel.close()
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(told[1], 1)
        os.dup2(told[1], 2)
        for name in [n for n in os.environ if n not in ("PATH", "LANG", "LC_ALL")]:
            del os.environ[name]
        places = ("HOME", "TMPDIR", "COURSE_SCRATCH", "COURSE_WORKBOOK")
        os.environ |= dict.fromkeys(places, str(scratch)) | {"COURSE_PROFILE": "smoke"}
        tempfile.tempdir = str(scratch)
        theirs = [there for _, there in pairs]
        for mine, _ in pairs:
            mine.close()
        for fd in (told[0], told[1], missing[0], null):
            os.close(fd)
        slot = int(scratch.parent.name)
        os.write(missing[1], "\n".join(walls.enclose(slot, scratch, limits)).encode())
        os.close(missing[1])
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        answering.main(theirs)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


class Guard:
    """Watches an answer's process from outside: its time, memory, number and output; and ends it.
    `why` says what it was ended for.
    """

    def __init__(
        self,
        pid: int,
        slot: int,
        limits: walls.Limits,
        output: int,
        asker: socket.socket,
        scratch: Path,
    ) -> None:
        self.pid, self.slot, self.limits, self.output = pid, slot, limits, output
        self.asker, self.scratch = asker, scratch
        self.why, self.printed, self.status = "", b"", None
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._start = time.monotonic()
        self._base = walls.own_bytes([pid])
        for work in (self._watch, self._read):
            threading.Thread(target=work, daemon=True).start()

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            if why := self._broken():
                self._stop(why)
                return

    def _broken(self) -> str:
        most = self.limits
        if select.select([self.asker], [], [], 0)[0]:  # it says nothing more: it is gone
            return "the grading was interrupted"
        if time.monotonic() - self._start > most.wall:
            return f"it was still running after {most.wall:g} s and was stopped"
        family = walls.family(self.pid, self.slot)
        if len(family) > most.processes // 2:
            return f"it started {len(family)} processes and was stopped"
        if walls.own_bytes(family) - self._base * len(family) > 1.25 * most.memory:
            return f"it took more than {most.memory / 2**20:,.0f} MiB of memory and was stopped"
        if walls.written_bytes(self.scratch) > most.disk:
            return f"it wrote more than {most.disk / 2**20:,.0f} MiB of files and was stopped"
        return ""

    def _read(self) -> None:
        total = 0
        while part := os.read(self.output, 2**16):
            total += len(part)
            self.printed += part[: max(0, SHOWN - len(self.printed))]
            if total > self.limits.output:
                self._stop(f"it printed more than {self.limits.output / 2**20:,.0f} MiB")
                return

    def _stop(self, why: str) -> None:
        self.why = self.why or why
        self._kill()

    def _kill(self) -> None:
        with self._lock:
            if self.status is None:
                walls.end(self.pid, self.slot)
                self.status = os.waitpid(self.pid, 0)[1]

    def end(self) -> None:
        """No process of the answer's is left after this."""
        self._over.set()
        self._kill()
        walls.reap()

    def reason(self) -> str:
        """Why the process is gone, in words."""
        for _ in range(100):  # it may be ending just now
            with self._lock:
                if self.status is None:
                    pid, status = os.waitpid(self.pid, os.WNOHANG)
                    self.status = status if pid else None
            if self.status is not None or self.why:
                break
            time.sleep(0.02)
        if self.why or self.status is None:
            return self.why or "it spoke to its judge as no answer does"
        if os.WIFSIGNALED(self.status):
            number = os.WTERMSIG(self.status)
            if number == 24:  # SIGXCPU
                return f"it computed for more than {self.limits.cpu:g} s and was stopped"
            return f"it was ended by signal {number}"
        return f"your code took the whole process with it (exit status {self.status >> 8})"


def _outcome(mine: list[socket.socket], job: dict, guard: Guard) -> dict:
    names = ("context", "cell", "answer", "within", "exercise")
    told = {name: job[name] for name in names}
    if job["within"]:
        told |= {"seed": job["seed"], "seconds": job["seconds"]}
    try:
        wire.send(mine[0], ["job", told], [])
        message, _ = wire.receive(mine[0])
        match message:
            case ["stopped", str(text)]:
                return {"status": "wrong", "message": text[:2000]}
            case ["verdict", str(status), str(text)] if job["within"]:
                return _beside(status, text)
            case ["ready", int(number)] if not job["within"]:
                return _asked(remote.Line(mine), number, job, guard)
        return {"status": "error", "message": "it spoke to its judge as no answer does."}
    except wire.Broken:
        return {"status": "error", "message": f"{guard.reason()}."}


def _beside(status: str, text: str) -> dict:
    if status == "tampering":
        return {"status": "error", "message": text[:2000], "flags": ["tampering"]}
    if status not in ("passed", "wrong"):
        return {"status": "error", "message": "the check beside it came to no verdict."}
    return {"status": status, "message": text[:4000]}


def _asked(line: remote.Line, number: int, job: dict, guard: Guard) -> dict:
    answer = remote.RemoteAnswer(line, number, job["answer"])
    with contextlib.redirect_stdout(io.StringIO()):
        result = exercises.check(
            job["exercise"], answer, seed=job["seed"], seconds=guard.limits.wall + 60
        )
    if line.reason:
        return {"status": "error", "message": f"{guard.reason()}."}
    return {"status": result.status, "message": result.message}
