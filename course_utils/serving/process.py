"""A server in a process group of its own, watched over, and gone when its block is left."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from course_utils import ROOT, processes

_BUSY = (
    "address already in use",
    "address in use",
    "addrinuse",
    "errno 98",
    "errno 48",
    "winerror 10048",
)


@dataclass
class Server:
    """A running server. `pid` is the program's own, `log()` what it printed so far.

    >>> Server("http://127.0.0.1:8000", 1, None, Path("log.txt"), 1).port
    8000
    """

    url: str
    pid: int
    token: str | None
    _log: Path = field(repr=False)
    _guard: int = field(repr=False)
    _peak: float = field(default=0.0, repr=False)

    @property
    def log(self) -> str:
        """What the server has printed so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def port(self) -> int:
        return urlsplit(self.url).port

    def processes(self) -> list:
        """The server's processes now, as psutil.Process, the guard that watches over them not
        counted.
        """
        import psutil

        with contextlib.suppress(psutil.Error):
            return psutil.Process(self._guard).children(recursive=True)
        return []

    def peak_mb(self) -> float:
        """The most memory, in MB, that the server's processes were seen to hold
        (`processes.held_together`). Looked at once a second, and now.
        """
        self._look()
        return self._peak / 1e6

    def _look(self) -> None:
        held = processes.held_together(process.pid for process in self.processes())
        self._peak = max(self._peak, held)


_GUARD = """
import os, signal, subprocess, sys, threading
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
def watch():
    sys.stdin.buffer.read()  # ends when whoever started us has ended, however that happened
    os.killpg(0, signal.SIGKILL) if hasattr(os, "killpg") else child.kill()
threading.Thread(target=watch, daemon=True).start()
os._exit(child.wait() & 255)
"""
"""Runs beside the server and ends it if the notebook's process vanishes: a kernel that is killed
runs no `finally`.
"""


@contextlib.contextmanager
def server(
    program: Path,
    *,
    args: Sequence[str] = (),
    port: int | None = None,
    token: str | None = None,
    env: Mapping[str, str] | None = None,
    ready_s: float = 60.0,
    ready: str = "/",
    patience_s: float = 5.0,
) -> Iterator[Server]:
    """`python program args…` in a process group of its own, with PORT and COURSE_TOKEN in its
    environment.

    Waits until GET `ready` is answered, with whatever status but 502 or 503. However the block is
    left, the group is asked to end, is killed after `patience_s` seconds if it did not, and is
    gone, its port free, when the block is over. Without `port` a free one is taken, another one if
    somebody else took it meanwhile. Raises RuntimeError with the server's last lines if it ends
    while starting, TimeoutError if it does not answer within `ready_s` seconds.

    >>> with server(Path("app.py"), token="secret") as running:  # doctest: +SKIP
    ...     print(running.url, running.peak_mb())
    http://127.0.0.1:41527 312.4
    """
    with tempfile.TemporaryDirectory(prefix="course-server-", ignore_cleanup_errors=True) as folder:
        for attempt in range(3):
            log, chosen = Path(folder) / f"log{attempt}.txt", port or _free_port()
            with log.open("wb") as out:
                settings = {"PORT": str(chosen), "PYTHONUNBUFFERED": "1"} | (
                    {"COURSE_TOKEN": token} if token else {}
                )
                path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _GUARD, sys.executable, str(program), *args],
                    stdin=subprocess.PIPE,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=os.environ | {"PYTHONPATH": path} | settings | dict(env or {}),
                )
            seen: set = set()
            try:
                url = f"http://127.0.0.1:{chosen}"
                pid = _wait_ready(process, url + ready, token, ready_s, log, seen)
                if pid is None and port is None and attempt < 2:
                    continue  # somebody else took the port between our look and its bind
                if pid is None:
                    raise RuntimeError(
                        f"the server {Path(program).name} ended while starting:\n{_tail(log)}"
                    )
                running = Server(url, pid, token, log, process.pid)
                stop = threading.Event()
                watcher = threading.Thread(target=_watch, args=(running, stop), daemon=True)
                watcher.start()
                try:
                    yield running
                finally:
                    stop.set()
                    watcher.join()
                return
            finally:
                _end(process, seen, patience_s)


def _watch(running: Server, stop: threading.Event) -> None:
    while not stop.wait(1.0):
        running._look()


def _wait_ready(
    process: subprocess.Popen, url: str, token: str | None, ready_s: float, log: Path, seen: set
) -> int | None:
    """The program's pid once it answers; None if it ended because its port was taken."""
    import http.client

    import psutil

    target, end = urlsplit(url), time.monotonic() + ready_s
    while time.monotonic() < end:
        if process.poll() is not None:
            if any(word in log.read_text(errors="replace").lower() for word in _BUSY):
                return None
            raise RuntimeError(
                f"the server ended while starting, with status {process.returncode}:\n{_tail(log)}"
            )
        connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=2)
        try:
            connection.request(
                "GET",
                target.path or "/",
                headers={"Authorization": f"Bearer {token}"} if token else {},
            )
            answered = connection.getresponse().status not in (502, 503)
        except (OSError, http.client.HTTPException):
            answered = False
        finally:
            connection.close()
        with contextlib.suppress(psutil.Error):
            family = psutil.Process(process.pid).children(recursive=True)
            seen.update(family)
            own = psutil.Process(process.pid).children()
            # whoever answers must be ours: another program may hold the port
            if answered and own and _listens(target.port, {p.pid for p in family}):
                return own[0].pid
        time.sleep(0.03)
    raise TimeoutError(
        f"the server did not answer at {url} within {ready_s:g} s. It printed:\n{_tail(log)}"
    )


def _listens(port: int, pids: set[int]) -> bool:
    """Whether one of these processes listens on the port; True where the system does not tell."""
    import psutil

    try:
        for pid in pids:
            connections = psutil.Process(pid).net_connections(kind="tcp")
            if any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in connections):
                return True
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, OSError):
        return True
    return False


def _end(process: subprocess.Popen, seen: set, patience_s: float) -> None:
    """End the whole group: politely, then not; return when all of it is gone."""
    import psutil

    family = set(seen)
    with contextlib.suppress(psutil.Error):
        family.update(psutil.Process(process.pid).children(recursive=True))
    for kind, patience in (
        (signal.SIGTERM, patience_s),
        (getattr(signal, "SIGKILL", signal.SIGTERM), 5.0),
    ):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, kind)
        for member in family:  # those that left the group, and where there are no groups
            with contextlib.suppress(psutil.Error):
                member.send_signal(kind)
        if processes.wait_gone([member.pid for member in family], patience):
            break
    if process.poll() is None:
        process.kill()
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    process.wait()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _tail(log: Path, lines: int = 15) -> str:
    return (
        "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
        or "(it printed nothing)"
    )
