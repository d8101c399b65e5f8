"""llama.cpp's OpenAI-compatible server behind a door that refuses, and an open loop that reads
streams.

llama.cpp (through xllamacpp) computes: it keeps `slots` texts in one batch and lets the others
wait, as many as come. The door in front of it knows how many are inside and answers 429 to who
would wait behind `waiting` others; it ends a text whose reader has gone.

    with llm_server.started(llm.gguf_file(), slots=4, waiting=8) as server:
        answers = llm_server.load(server, prompts, due=[0.0, 0.1, 0.2], tokens=16)

As a program it is the server itself.
"""

import asyncio
import concurrent.futures
import contextlib
import hmac
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from course_utils import serving

CONTEXT = 512  # tokens of a prompt and its answer together, the most a slot has room for


@dataclass
class Answer:
    """What became of one request. Times are seconds since the load began; `status` is 0 where no
    answer came in time, or only a part of one.

    >>> a = Answer(0, due=1.0, status=200, first=1.5, last=2.5, tokens=11, text=" of the sea")
    >>> a.ttft, a.tpot, a.within(1.0, 0.2), a.within(1.0, 0.05)
    (0.5, 0.1, True, False)
    """

    which: int  # index of the prompt
    due: float
    status: int = 0
    first: float = math.nan
    last: float = math.nan
    tokens: int = 0
    text: str = ""

    @property
    def ttft(self) -> float:
        """Seconds from when the request was due to its first token."""
        return self.first - self.due

    @property
    def tpot(self) -> float:
        """Seconds a token after the first one; NaN for a single token."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else math.nan

    def within(self, ttft: float, tpot: float) -> bool:
        """Whether the whole answer came and kept both promises, in seconds."""
        return self.status == 200 and self.ttft <= ttft and not self.tpot > tpot


@contextlib.contextmanager
def started(model: Path, *, slots: int, waiting: int, threads: int = 1) -> Iterator[serving.Server]:
    """The server in a process group of its own, on 127.0.0.1 behind a token; ends with the block.

    Raises ValueError for fewer than one slot or a negative queue, RuntimeError with its last lines
    where it cannot start.

    >>> with started(Path("model.gguf"), slots=0, waiting=8): pass
    Traceback (most recent call last):
    ValueError: slots is 0 and waiting 8; at least 1 and at least 0 are due.
    """
    if slots < 1 or waiting < 0:
        raise ValueError(
            f"slots is {slots} and waiting {waiting}; at least 1 and at least 0 are due."
        )
    args = [str(model), str(slots), str(waiting), str(threads)]
    with serving.server(Path(__file__), args=args, token=secrets.token_urlsafe(16)) as server:
        yield server


def load(
    server: serving.Server,
    prompts: Sequence[str],
    due: Sequence[float],
    *,
    tokens: int | Sequence[int] = 16,
    timeout_s: float = 60.0,
) -> list[Answer]:
    """An open loop: request i is sent `due[i]` seconds after the start, whatever became of those
    before, takes the prompts in turn, and reads its stream of `tokens` greedy tokens (one number,
    or one for each prompt).

    It runs in a thread of this process. Raises ValueError without a prompt.

    >>> load(None, [], [0.0])
    Traceback (most recent call last):
    ValueError: there is no prompt to send.
    """
    if not prompts:
        raise ValueError("there is no prompt to send.")
    counts = [tokens] * len(prompts) if isinstance(tokens, int) else list(tokens)

    async def everything() -> list[Answer]:
        start = time.perf_counter()

        async def one(i: int, when: float) -> Answer:
            which = i % len(prompts)
            answer = Answer(which, when)
            await asyncio.sleep(start + when - time.perf_counter())
            with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                async with asyncio.timeout(timeout_s):
                    await _ask(server, prompts[which], counts[which], answer, start)
            return answer

        return await asyncio.gather(*(one(i, t) for i, t in enumerate(due)))

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, everything()).result()


async def _ask(
    server: serving.Server, prompt: str, count: int, answer: Answer, start: float
) -> None:
    """Send one request and follow its stream of server-sent events."""
    body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "stream": True}
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(_request(server.token, body | {"ignore_eos": True, "cache_prompt": False}))
        status = int((await reader.readuntil(b"\r\n")).split()[1])
        await reader.readuntil(b"\r\n\r\n")
        if status != 200:
            answer.status = status
            return
        while line := await reader.readline():  # the chunks' sizes stand between the events
            if line.startswith(b"data: [DONE]"):
                answer.status = 200
            elif line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    return
                answer.text += event["choices"][0]["text"]
                answer.tokens = event.get("usage", {}).get("completion_tokens", answer.tokens)
                if event["choices"][0]["finish_reason"] is None:
                    answer.last = time.perf_counter() - start
                    answer.first = min(answer.last, answer.first)
    finally:
        writer.close()


def _request(token: str | None, body: dict) -> bytes:
    data = json.dumps(body | {"stream_options": {"include_usage": True}}).encode()
    return (
        "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        f"Authorization: Bearer {token}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    ).encode() + data


# ------------------------------------------------------------------- from here on: in the server


class Door:
    """Lets `slots + waiting` requests inside, refuses the others at once, and passes bytes on.

    >>> Door("http://127.0.0.1:1", "inner", "outer", most=12).inside
    0
    """

    def __init__(self, upstream: str, key: str, token: str, most: int) -> None:
        self.port, self.key, self.token = urlsplit(upstream).port, key, token
        self.most, self.inside = most, 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, one request."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, ValueError):
            try:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin1").split("\r\n")
                fields = dict(h.lower().split(": ", 1) for h in head[1:] if ": " in h)
                body = await reader.readexactly(int(fields.get("content-length", 0)))
                given = next((h for h in head if h.lower().startswith("authorization: ")), "")
                if not hmac.compare_digest(given.split(" ")[-1], self.token):
                    writer.write(_said(401, "the token is wrong"))
                elif head[0].startswith("GET"):
                    writer.write(_said(200, f"{self.inside} inside"))
                elif self.inside >= self.most:
                    writer.write(_said(429, f"{self.inside} requests are inside; come again"))
                else:
                    await self._passed_on(head[0], body, reader, writer)
                await writer.drain()
            finally:
                writer.close()

    async def _passed_on(
        self,
        first: str,
        body: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.inside, up = self.inside + 1, None
        gone = asyncio.ensure_future(reader.read(1))  # ends when the client hangs up
        try:
            try:
                down, up = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError:
                writer.write(_said(502, "the engine does not answer"))
                return
            up.write(
                f"{first}\r\nHost: 127.0.0.1\r\nConnection: close\r\nAuthorization: Bearer"
                f" {self.key}\r\nContent-Type: application/json\r\nContent-Length:"
                f" {len(body)}\r\n\r\n".encode()
                + body
            )
            copy = asyncio.ensure_future(_copied(down, writer))
            await asyncio.wait([gone, copy], return_when=asyncio.FIRST_COMPLETED)
            copy.cancel()
        finally:
            gone.cancel()
            self.inside -= 1
            if up:
                up.close()  # llama.cpp gives up a text whose connection has gone


async def _copied(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await source.read(65536):
        sink.write(data)
        await sink.drain()


def _said(status: int, text: str) -> bytes:
    data = json.dumps({"error": {"code": status, "message": text}}).encode()
    head = f"HTTP/1.1 {status} _\r\nConnection: close\r\nContent-Type: application/json\r\n"
    head += "Retry-After: 1\r\n" if status == 429 else ""
    return (head + f"Content-Length: {len(data)}\r\n\r\n").encode() + data


def engine(model: str, slots: int, threads: int, key: str) -> object:
    """llama.cpp's server with `slots` places of CONTEXT tokens each, on a free port of 127.0.0.1,
    as an xllamacpp.Server; `listening_address` says where. It ends with the process.

    >>> engine("model.gguf", 4, 1, "secret").listening_address  # doctest: +SKIP
    'http://127.0.0.1:41231'
    """
    import xllamacpp

    p = xllamacpp.CommonParams()
    p.model.path, p.hostnames, p.port, p.api_keys = model, ["127.0.0.1"], 0, [key]
    p.n_parallel, p.n_ctx, p.verbosity, p.n_threads_http = slots, slots * CONTEXT, -1, 2 * slots + 8
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
    return xllamacpp.Server(p)


def sampler(model: str, tokens: int = 16) -> Callable[[], dict[str, float]]:
    """For `measure.turns`: a function that decodes `tokens` tokens of one text on one thread, then
    copies 64 MiB. "decode" is ms a token, "copy" GB/s read and written.

    >>> sampler("model.gguf")()  # doctest: +SKIP
    {'decode': 18.1, 'copy': 19.8}
    """
    import numpy as np

    from course_utils import data

    server = engine(model, 1, 1, secrets.token_urlsafe(16))
    ask = {"prompt": data.austen()[9000:9100], "n_predict": tokens, "temperature": 0}
    ask |= {"ignore_eos": True, "cache_prompt": False}
    source, target = np.zeros(2**26, np.uint8), np.ones(2**26, np.uint8)

    def sample() -> dict[str, float]:
        decode, seconds = server.handle_completions(ask)["timings"]["predicted_per_token_ms"], []
        for _ in range(9):
            seconds.append(-time.perf_counter())
            np.copyto(target, source)
            seconds[-1] += time.perf_counter()
        return {"decode": decode, "copy": 2 * 2**26 / sorted(seconds)[4] / 1e9}

    return sample


async def main(model: str, slots: str, waiting: str, threads: str) -> None:
    """Start the engine, then the door on PORT; serve until ended.

    >>> asyncio.run(main("model.gguf", "4", "8", "1"))  # doctest: +SKIP
    """
    key, most = secrets.token_urlsafe(16), int(slots) + int(waiting)
    inner = engine(model, int(slots), int(threads), key)
    door = Door(inner.listening_address, key, os.environ["COURSE_TOKEN"], most)
    server = await asyncio.start_server(door.serve, "127.0.0.1", int(os.environ["PORT"]))
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
