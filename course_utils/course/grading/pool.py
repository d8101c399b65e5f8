"""The server and its slots, from where the class is graded: jobs in, outcomes out."""

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict
from pathlib import Path

from course_utils import ROOT
from course_utils.course.chapters import UsageError
from course_utils.course.grading import wire
from course_utils.course.grading.walls import Limits

WARM = 300  # seconds until everything is imported, on a busy machine


class Pool:
    """Runs jobs, as many at once as there are slots; a context manager.

    A job has a folder, and for a privileged teacher a user id of its own, which no other grading
    that runs on this machine is likely to share.
    """

    def __init__(self, slots: int, limits: Limits, imports: list[str]) -> None:
        if not hasattr(os, "fork") or not hasattr(socket, "send_fds"):
            raise UsageError("grading needs a system that can fork: Linux, macOS or WSL.")
        self.limits, self.imports = limits, imports
        self._slots = threading.Semaphore(slots)
        first = os.getpid() % 300 * 100
        self._users = itertools.cycle(range(first, first + 100))
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()

    def __enter__(self) -> "Pool":
        self.folder = Path(tempfile.mkdtemp(prefix="course-grade-"))
        self.folder.chmod(0o711)
        self.control, theirs = socket.socketpair()
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "COURSE_LEDGER": os.devnull,
            "COURSE_SCRATCH": str(self.folder / "judge"),
            "COURSE_PROFILE": "smoke",
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [sys.executable, "-m", "course_utils.course.grading.server"]
        self.server = subprocess.Popen(
            [*command, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=env,
            cwd=self.folder,
            start_new_session=True,  # Ctrl-C is for `grade`, which then ends the server
        )
        theirs.close()
        self.control.settimeout(WARM)
        wire.send(self.control, self.imports, [])
        wire.receive(self.control)
        return self

    def __exit__(self, *_: object) -> None:
        self.control.close()
        try:
            self.server.wait(10)
        except subprocess.TimeoutExpired:
            self.server.kill()
            self.server.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, job: dict) -> dict:
        """One exercise: `status`, `message`, what was printed, which walls were `missing`."""
        with self._slots:
            return self._run(job)

    def _run(self, job: dict) -> dict:
        with self._lock:
            user = next(self._users)
        mine, theirs = socket.socketpair()
        scratch = self.folder / str(user)
        try:
            scratch.mkdir(exist_ok=True)
            scratch.chmod(0o711)
            with mine:
                with theirs, self._lock:
                    socket.send_fds(self.control, [b"j"], [theirs.fileno()])
                self._open.add(mine)
                mine.settimeout(self.limits.wall + 120)
                told = {"slot": user, "scratch": str(scratch), "limits": asdict(self.limits)}
                wire.send(mine, job | told, [])
                outcome, _ = wire.receive(mine)
            return outcome
        except (wire.Broken, OSError) as error:
            text = f"the judge came to no verdict ({error})."
            return {"status": "error", "message": text, "missing": [], "printed": ""}
        finally:
            self._open.discard(mine)
            shutil.rmtree(scratch, ignore_errors=True)

    def interrupt(self) -> None:
        """Let go of every job under way: its judge notices, and ends the answer."""
        for channel in list(self._open):
            with contextlib.suppress(OSError):
                channel.shutdown(socket.SHUT_RDWR)
