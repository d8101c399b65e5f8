"""The load generator: requests over keep-alive connections from a process of its own, that imports
no torch.

Latency counts from the moment a request was due, not from when the client got round to sending it.
"""

from __future__ import (
    annotations,
)  # the client must start fast, so numpy is imported where it is used

import asyncio
import collections
import contextlib
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from course_utils import ROOT

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Answers:
    """What became of every request, in the order in which they were due. Times are seconds since
    the load began.

    >>> import numpy as np
    >>> due, end = np.array([0.0, 0.5]), np.array([0.1, 0.9])
    >>> answers = Answers(due, due, end, np.array([200, 503]), np.array([0, 0]), seconds=1.0)
    >>> round(answers.p(99)), answers.throughput, answers.failed
    (100, 1.0, 1)
    """

    intended: np.ndarray
    sent: np.ndarray
    finished: np.ndarray
    status: np.ndarray  # the HTTP status; 0 where no answer came
    which: np.ndarray  # the index into `bodies` that was sent
    seconds: float  # how long the load lasted
    bodies: tuple[bytes, ...] = ()  # the answers' texts, with keep=True

    def latency(self) -> np.ndarray:
        """Seconds from the intended arrival to the answer, of the requests answered with 200."""
        good = self.status == 200
        return (self.finished - self.intended)[good]

    def p(self, q: float) -> float:
        """The q-th percentile of the latency in milliseconds; NaN if nothing was answered. `failed`
        are not in it.
        """
        import numpy as np

        latency = self.latency()
        return float(1e3 * np.percentile(latency, q)) if len(latency) else float("nan")

    @property
    def throughput(self) -> float:
        """Answers with status 200 a second, of those that came while the load lasted."""
        return float(((self.status == 200) & (self.finished <= self.seconds)).sum() / self.seconds)

    @property
    def failed(self) -> int:
        """Requests without an answer of status 200."""
        return int((self.status != 200).sum())

    def between(self, start: float, end: float) -> Answers:
        """The requests due from `start` to before `end`, on a clock that begins at `start`."""
        import numpy as np

        keep = np.flatnonzero((self.intended >= start) & (self.intended < end))
        times = [t[keep] - start for t in (self.intended, self.sent, self.finished)]
        texts = tuple(self.bodies[i] for i in keep) if self.bodies else ()
        return Answers(
            *times, self.status[keep], self.which[keep], min(end, self.seconds) - start, texts
        )


def open_loop(
    url: str,
    bodies: Sequence[bytes],
    rate: float,
    seconds: float,
    *,
    connections: int = 64,
    token: str | None = None,
    seed: int = 0,
    timeout_s: float = 30.0,
    keep: bool = False,
) -> Answers:
    """Poisson arrivals, `rate` a second for `seconds`, whatever the server does; each sends one of
    `bodies` by POST.

    If all `connections` are busy a request waits in the client, and that wait counts. A request
    that is not answered `timeout_s` after it was due is given up, with status 0. Raises
    RuntimeError if the server cannot be reached.

    >>> open_loop("http://127.0.0.1:8000/", [b"{}"], rate=0, seconds=1)
    Traceback (most recent call last):
    ValueError: rate is 0; it must be above 0 requests a second.
    >>> answers = open_loop("http://127.0.0.1:8000/", [b"{}"], 200, 5)  # doctest: +SKIP
    >>> answers.p(99), answers.failed  # doctest: +SKIP
    (12.5, 0)
    """
    import numpy as np

    if not rate > 0:
        raise ValueError(f"rate is {rate}; it must be above 0 requests a second.")
    rng = np.random.default_rng(seed)
    due = np.cumsum(rng.exponential(1 / rate, max(16, int(2 * rate * seconds + 50))))
    due = due[due < seconds]
    return _client(url, bodies, seconds, connections, token, seed, timeout_s, keep, due)


def closed_loop(
    url: str,
    bodies: Sequence[bytes],
    seconds: float,
    *,
    connections: int,
    token: str | None = None,
    seed: int = 0,
    timeout_s: float = 30.0,
    keep: bool = False,
) -> Answers:
    """Each of `connections` sends its next request when its last is answered: the server sets the
    pace.

    Good for a capacity, wrong for a latency under load: a slow server is asked less often.

    >>> answers = closed_loop("http://127.0.0.1:8000/", [b"{}"], 5, connections=0)
    Traceback (most recent call last):
    ValueError: at least one body and one connection and more than 0 s are needed; ...
    """
    return _client(url, bodies, seconds, connections, token, seed, timeout_s, keep, None)


def _client(
    url: str,
    bodies: Sequence[bytes],
    seconds: float,
    connections: int,
    token: str | None,
    seed: int,
    timeout_s: float,
    keep: bool,
    due: np.ndarray | None,
) -> Answers:
    """Run the load in a process of its own and read what it saw."""
    import numpy as np

    if not bodies or connections < 1 or not seconds > 0:
        raise ValueError(
            f"at least one body and one connection and more than 0 s are needed; got {len(bodies)}"
            f" bodies, {connections} connections, {seconds} s."
        )
    head = {
        "url": url,
        "seconds": seconds,
        "connections": connections,
        "token": token,
        "seed": seed,
        "timeout": timeout_s,
        "keep": keep,
        "sizes": [len(b) for b in bodies],
        "due": None if due is None else len(due),
    }
    which = np.random.default_rng([seed, 1]).integers(
        0, len(bodies), 4096 if due is None else len(due)
    )
    head |= {"which": len(which)}
    numbers = which.astype("d").tobytes() + (b"" if due is None else due.tobytes())
    request = json.dumps(head).encode() + b"\n" + b"".join(bodies) + numbers
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryFile() as told:  # through a pipe, a report once arrived in part
        process = subprocess.Popen(
            [sys.executable, "-c", "from course_utils.serving import client; client.main()"],
            stdin=subprocess.PIPE,
            stdout=told,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
        )
        try:
            _, errors = process.communicate(request, timeout=seconds + timeout_s + 60)
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()
        if process.returncode:
            raise RuntimeError(
                f"the load generator ended with {process.returncode}:\n{errors.decode()[-2000:]}"
            )
        told.seek(0)
        first, rest = told.readline(), told.read()
    n, sizes = _head(first, len(rest), process.returncode)
    numbers = np.frombuffer(rest[: 40 * n]).reshape(5, n)
    ends = np.cumsum([0, *sizes]) + 40 * n
    texts = tuple(rest[a:b] for a, b in zip(ends, ends[1:], strict=False))
    status, which = numbers[3].astype(int), numbers[4].astype(int)
    return Answers(numbers[0], numbers[1], numbers[2], status, which, float(seconds), texts)


def _head(line: bytes, size: int, status: int | None) -> tuple[int, list[int]]:
    """How many requests the load generator tells of, and the size of each answer's body. Raises
    RuntimeError where less arrived than it says.
    """
    with contextlib.suppress(ValueError, KeyError, TypeError):
        head = json.loads(line)
        if size == 40 * head["count"] + sum(head["sizes"]):
            return head["count"], head["sizes"]
    raise RuntimeError(
        f"the load generator ended with {status}, and what it told is not whole: {len(line)} and"
        f" {size} bytes, the first {line[:40]!r}. Was it killed? Run the load again."
    )


class _Connection(asyncio.Protocol):
    """One keep-alive connection that carries one request at a time."""

    def __init__(self, load: _Load) -> None:
        self.load, self.transport, self.request = load, None, None

    def connection_made(self, transport: asyncio.Transport) -> None:
        import httptools

        self.transport, self.parser = transport, httptools.HttpResponseParser(self)
        with contextlib.suppress(OSError, AttributeError):
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, request: int, data: bytes) -> None:
        self.request, self.parts = request, []
        self.transport.write(data)

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except Exception:  # not HTTP: the request it answers has failed, the connection is no good
            self.transport.abort()

    def on_body(self, body: bytes) -> None:
        if self.load.keep:
            self.parts.append(body)

    def on_message_complete(self) -> None:
        self._done(self.parser.get_status_code(), stays=self.parser.should_keep_alive())

    def connection_lost(self, _: Exception | None) -> None:
        self.transport = None
        self._done(0, stays=False)

    def give_up(self) -> None:
        if self.transport:
            self.transport.abort()

    def _done(self, status: int, *, stays: bool) -> None:
        request, self.request = self.request, None
        if not stays and self.transport:
            self.transport.close()
            self.transport = None
        self.load.ended(self, request, status, b"".join(getattr(self, "parts", ())))


class _Load:
    """The requests of one run and the connections that carry them."""

    def __init__(
        self, head: dict, bodies: list[bytes], which: Sequence[float], due: Sequence[float] | None
    ) -> None:
        target = urlsplit(head["url"])
        self.host, self.port = target.hostname, target.port or 80
        token = f"Authorization: Bearer {head['token']}\r\n" if head["token"] else ""
        path = (target.path or "/") + (f"?{target.query}" if target.query else "")
        self.data = [
            f"POST {path} HTTP/1.1\r\nHost: {target.netloc}\r\n{token}Content-Type:"
            f" application/json\r\nContent-Length: {len(b)}\r\n\r\n".encode()
            + b
            for b in bodies
        ]
        self.choice = [int(w) for w in which]
        self.seconds, self.connections, self.timeout, self.keep = (
            head[k] for k in ("seconds", "connections", "timeout", "keep")
        )
        self.due = due
        self.rows: list[
            list
        ] = []  # [intended, sent, finished, status, which, text] of each request
        self.waiting: collections.deque[int] = collections.deque()
        self.idle: list[_Connection] = []
        self.busy: set[_Connection] = set()
        self.opening = 0
        self.over = False

    def now(self) -> float:
        return time.perf_counter() - self.start

    async def run(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.finished = asyncio.Event()
        opened = [
            await self.loop.create_connection(lambda: _Connection(self), self.host, self.port)
            for _ in range(self.connections)
        ]
        self.idle = [protocol for _, protocol in opened]
        self.start = time.perf_counter()
        sweeper = self.loop.create_task(self._sweep())
        if self.due is None:
            for _ in range(self.connections):
                self._next()
        else:
            for due, which in zip(self.due, self.choice, strict=True):
                while (
                    wait := due - self.now()
                ) > 0:  # uvloop's timers may end up to half a millisecond early
                    await asyncio.sleep(wait)
                self.rows.append([due, math.nan, math.nan, -1, which, b""])
                self.waiting.append(len(self.rows) - 1)
                self._assign()
        await asyncio.sleep(max(0.0, self.seconds - self.now()))
        self.over = True
        self._check_end()
        await self.finished.wait()
        sweeper.cancel()
        for connection in [*self.idle, *self.busy]:
            connection.give_up()

    def _next(self) -> None:
        """Closed loop: one more request, due now."""
        self.rows.append(
            [
                self.now(),
                math.nan,
                math.nan,
                -1,
                self.choice[len(self.rows) % len(self.choice)],
                b"",
            ]
        )
        self.waiting.append(len(self.rows) - 1)
        self._assign()

    def _assign(self) -> None:
        while self.waiting and self.idle:
            connection = self.idle.pop()
            if connection.transport is None or connection.transport.is_closing():
                self._reopen()
                continue
            request = self.waiting.popleft()
            self.busy.add(connection)
            self.rows[request][1] = self.now()
            connection.send(request, self.data[self.rows[request][4]])

    def _reopen(self) -> None:
        async def open_one() -> None:
            try:
                _, connection = await self.loop.create_connection(
                    lambda: _Connection(self), self.host, self.port
                )
            except OSError:
                await asyncio.sleep(0.05)
                self._reopen()
                return
            finally:
                self.opening -= 1
            self.idle.append(connection)
            self._assign()

        self.opening += 1
        self._tasks = {t for t in getattr(self, "_tasks", ()) if not t.done()} | {
            self.loop.create_task(open_one())
        }

    def ended(self, connection: _Connection, request: int | None, status: int, text: bytes) -> None:
        if request is not None:
            row = self.rows[request]
            row[2], row[3], row[5] = self.now(), status, text
            self.busy.discard(connection)
            if connection.transport is not None:
                self.idle.append(connection)
            else:
                self._reopen()
            if self.due is None and not self.over:
                self._next()
        elif connection in self.idle:  # the server closed a connection that was resting
            self.idle.remove(connection)
            self._reopen()
        if self.waiting:
            self._assign()
        self._check_end()

    async def _sweep(self) -> None:
        """Give up what is too late."""
        while True:
            await asyncio.sleep(0.05)
            limit = self.now() - self.timeout
            while self.waiting and self.rows[self.waiting[0]][0] < limit:
                row = self.rows[self.waiting.popleft()]
                row[1], row[2], row[3] = self.now(), self.now(), 0
            for connection in [c for c in self.busy if self.rows[c.request][0] < limit]:
                connection.give_up()
            self._check_end()

    def _check_end(self) -> None:
        if self.over and not self.waiting and not self.busy:
            self.finished.set()


def main() -> None:
    """The client's process: a load from standard input, what became of each request to standard
    output.
    """
    head = json.loads(sys.stdin.buffer.readline())
    bodies = [sys.stdin.buffer.read(size) for size in head["sizes"]]
    which, due = (
        None if n is None else array("d", sys.stdin.buffer.read(8 * n))
        for n in (head["which"], head["due"])
    )
    load = _Load(head, bodies, which, due)
    try:
        import uvloop  # not on Windows

        uvloop.run(load.run())
    except ImportError:
        asyncio.run(load.run())
    rows = load.rows
    texts = [row[5] for row in rows] if head["keep"] else []
    sys.stdout.buffer.write(
        json.dumps({"count": len(rows), "sizes": [len(t) for t in texts]}).encode() + b"\n"
    )
    sys.stdout.buffer.write(
        b"".join(array("d", [row[k] for row in rows]).tobytes() for k in range(5)) + b"".join(texts)
    )
