"""What chapter 13 teaches and stands on: the batcher, its worker processes, the service and its
clients, under every load and fault that its texts name.
"""

import asyncio
import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import taught

import course_utils
from course_utils import batching, embed, fleet, processes, serving, sharing, trials, workers
from course_utils.batching import Batcher, Closed, Died, Full
from course_utils.checks.clock import Clock, Loop

ENCODE = embed.tokenizer()
SERVICE = Path(course_utils.__file__).with_name("service.py")
ECHO = """
import asyncio, os, sys
async def serve(reader, writer):
    while head := await reader.readuntil(b"\\r\\n\\r\\n"):
        lines = head.decode().split("\\r\\n")
        fields = dict(l.lower().split(": ", 1) for l in lines[1:] if ": " in l)
        body = await reader.readexactly(int(fields.get("content-length", 0)))
        ok = fields.get("authorization", "") == "bearer " + os.environ["COURSE_TOKEN"].lower()
        if b"slow" in body: await asyncio.sleep(0.1)
        answer = lines[0].split()[1].encode() + b" " + body
        head = b"HTTP/1.1 %d X\\r\\ncontent-length: %d\\r\\n\\r\\n"
        writer.write(head % (200 if ok else 401, len(answer)) + answer)
async def main():
    async with await asyncio.start_server(serve, "127.0.0.1", int(os.environ["PORT"])) as s:
        await s.serve_forever()
asyncio.run(main())
"""
MODEL = '''
"""A model for tests: the answer says who asked; a request can raise, kill the process or hang. It
writes down what it has computed.
"""
import os, sys, time
import numpy as np

class Model:
    def __init__(self, log):
        self.log = open(log, "a")

    def __call__(self, lists):
        last = [numbers[-2] if len(numbers) > 2 else 0 for numbers in lists]
        whole = [tuple(numbers) for numbers in lists]
        for numbers in whole:
            if RAISES in numbers: raise ValueError("a poisoned request")
            if KILLS in numbers: os._exit(1)
            if HANGS in numbers: time.sleep(60)
        time.sleep(0.001)
        self.log.write("".join(" ".join(map(str, n)) + "\\n" for n in whole))
        self.log.flush()
        vectors = np.zeros((len(lists), 384), np.float32)
        for vector, numbers in zip(vectors, whole):
            vector[: len(numbers)] = numbers
        return vectors
'''


@pytest.fixture(scope="module")
def ch13() -> SimpleNamespace:
    return taught("13", asyncio=asyncio, batching=batching, trials=trials)


def play(work, clock: Clock) -> object:
    """Run a coroutine on a loop whose timers keep this clock: no busy machine makes it late."""
    with asyncio.Runner(loop_factory=lambda: Loop(clock)) as runner:
        return runner.run(work)


# ---------------------------------------------------------------------------- the batcher


def test_a_storm_is_answered_exactly_once_and_the_innocent_are_unharmed(seeded):
    rng = np.random.default_rng(seeded)
    kinds = rng.permutation(np.repeat(["poisoned", "gone", "slow", "plain"], [30, 90, 10, 2870]))
    for count in (1, 3):
        how = {"max_batch": int(rng.integers(2, 40)), "workers": count}
        seen, bill = asyncio.run(trials.storm(kinds, **how))
        assert seen == {
            ("poisoned", "ValueError"): 30,
            ("gone", "CancelledError"): 90,
            ("slow", "own answer"): 10,
            ("plain", "own answer"): 2870,
        }
        assert bill.gone == 0  # they had left the queue before anything ran
        assert bill.items - bill.again == 2910


def test_the_storm_can_fail():
    """A batcher that does not cut a failed batch harms the innocent, and the storm shows it."""

    class Careless(Batcher):
        async def _answer(self, batch):
            try:
                outputs = await self._run(batch)
            except Exception as error:
                outputs = [error] * len(batch)
            for request, output in zip(batch, outputs, strict=True):
                if isinstance(output, Exception):
                    request.future.set_exception(ValueError(str(output)))
                else:
                    request.future.set_result(output)

    seen, _ = asyncio.run(trials.storm(["poisoned"] + ["plain"] * 50, Careless, max_batch=8))
    assert seen["plain", "ValueError"] == 7


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (asyncio.CancelledError(), "RuntimeError"),
        (GeneratorExit(), "RuntimeError"),
        (StopAsyncIteration(), "StopAsyncIteration"),
        (TimeoutError("the model's own"), "TimeoutError"),
        (MemoryError(), "MemoryError"),
        (ExceptionGroup("two", [ValueError(), KeyError()]), "ExceptionGroup"),
    ],
)
def test_whatever_a_model_raises_everybody_hears_of_it_and_the_next_are_served(error, told):
    broken = [True]

    async def run(items):
        if broken[0]:
            raise error
        return [2 * i for i in items]

    async def go():
        batcher = Batcher(run)
        first = await trials.callers(batcher, 48)
        broken[0] = False
        second = await trials.callers(batcher, 48)
        await asyncio.wait_for(batcher.close(), 5)
        return first, second

    assert asyncio.run(go()) == ({told: 48}, {"own answer": 48})


@pytest.mark.parametrize("outputs", [None, 7, [1], [], range(99)])
def test_outputs_that_are_none_or_too_few_are_an_error_for_everybody(outputs):
    async def run(_):
        return outputs

    async def go():
        batcher = Batcher(run)
        seen = await trials.callers(batcher, 4)
        await batcher.close()
        return seen

    assert set(asyncio.run(go())) <= {"ValueError", "TypeError", "other"}


def test_a_model_that_hangs_hangs_nobody_and_does_not_hold_up_the_end():
    clock = Clock()
    swallowed = []

    async def run(items):
        try:
            await asyncio.sleep(1e6)
        except asyncio.CancelledError:  # even if it takes no notice
            swallowed.append(len(items))
            await asyncio.sleep(1e5)

    async def go():
        batcher = Batcher(run, limit=2.0)
        tasks = [asyncio.create_task(batcher.ask(i)) for i in range(48)]
        await asyncio.sleep(0)
        await batcher.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        return Counter(type(r) for r in results), clock.now, batcher.bill.calls

    kinds, took, calls = play(go(), clock)
    assert kinds == {TimeoutError: 48}
    assert took < 2.0 * 8 + 0.1
    assert calls == 8  # four for each batch, and not 63
    assert len(swallowed) >= calls


def test_one_request_that_hangs_or_kills_costs_two_of_those():
    async def go(error):
        async def run(items):
            if 5 in items:
                raise error
            return [2 * i for i in items]

        batcher = Batcher(run)
        seen = await trials.callers(batcher, 32)
        await batcher.close()
        return seen, batcher.bill.failed

    assert asyncio.run(go(Died("gone"))) == ({"own answer": 31, "Died": 1}, 2)
    assert asyncio.run(go(ValueError())) == ({"own answer": 31, "ValueError": 1}, 6)


def test_a_model_that_is_down_costs_fifteen_calls_a_batch():
    async def run(_):
        raise ValueError

    async def go():
        batcher = Batcher(run)
        seen = await trials.callers(batcher, 64)
        await batcher.close()
        return seen, batcher.bill.calls

    assert asyncio.run(go()) == ({"ValueError": 64}, 30)


def test_stopped_from_outside_it_leaves_nobody_waiting():
    async def go():
        batcher = Batcher(trials.stuck, max_batch=4, workers=2)
        tasks = [asyncio.create_task(batcher.ask(i)) for i in range(20)]
        await asyncio.sleep(0.01)
        for task in batcher.tasks:
            task.cancel()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        with pytest.raises(Closed):
            await batcher.ask(0)
        await batcher.close()
        return Counter(type(r) for r in results)

    assert asyncio.run(go()) == {Closed: 20}


def test_a_full_queue_refuses_and_closing_drains_without_waiting():
    clock = Clock()

    async def go():
        batcher = Batcher(trials.double, max_batch=4, max_wait=30.0, max_queue=8)
        tasks = [asyncio.create_task(batcher.ask(i)) for i in range(11)]
        await asyncio.sleep(0)
        start = clock.now
        await batcher.close()
        await batcher.close()  # twice is no harm
        took = clock.now - start
        with pytest.raises(Closed):
            await batcher.ask(0)
        return await asyncio.gather(*tasks, return_exceptions=True), took

    results, took = play(go(), clock)
    assert results[:8] == [2 * i for i in range(8)]
    assert all(isinstance(r, Full) for r in results[8:])
    assert took < 0.1


def test_the_wait_counts_from_the_oldest_and_a_caller_who_leaves_frees_its_place():
    clock = Clock()

    async def go():
        batcher = Batcher(trials.double, max_batch=64, max_wait=0.3, max_queue=3)
        start = clock.now
        first = asyncio.create_task(batcher.ask(0))
        gone = asyncio.create_task(batcher.ask(1))
        await asyncio.sleep(0.1)
        gone.cancel()
        await asyncio.sleep(0.1)
        # would be refused if the place were still taken
        late = [asyncio.create_task(batcher.ask(i)) for i in (2, 3)]
        assert await first == 0
        took = clock.now - start
        assert await asyncio.gather(*late) == [4, 6]
        await batcher.close()
        return took, [n for n, *_ in batcher.log]

    took, sizes = play(go(), clock)
    assert 0.29 < took < 0.32
    assert sizes == [3]


def test_without_a_wait_what_waits_leaves_together():
    async def go():
        batcher = Batcher(trials.double, max_batch=32)
        seen = await trials.callers(batcher, 640)
        await batcher.close()
        return seen, batcher.bill.calls

    assert asyncio.run(go()) == ({"own answer": 640}, 20)


def test_who_leaves_while_a_batch_runs_is_computed_once_and_no_more():
    clock = Clock()

    async def go():
        batcher = Batcher(trials.double, max_batch=8)
        tasks = [asyncio.create_task(batcher.ask(i)) for i in range(100)]
        await asyncio.sleep(0.001)  # the first batch runs
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await batcher.close()
        return batcher.bill

    bill = play(go(), clock)
    assert (bill.items, bill.gone) == (8, 8)


def test_a_batch_keeps_its_budget_and_the_oldest_is_always_in_it(seeded):
    rng, batches = np.random.default_rng(seeded), []

    async def run(items):
        batches.append(items)
        await asyncio.sleep(0)
        return items

    async def go():
        batcher = Batcher(run, max_batch=16, size=len, budget=256, max_queue=500)
        items = [[i] * int(n) for i, n in enumerate(rng.integers(1, 80, 500))]
        answers = await asyncio.gather(*(batcher.ask(item) for item in items))
        await batcher.close()
        assert answers == items
        assert batcher.places == 0

    asyncio.run(go())
    waiting = list(range(500))
    for batch in batches:
        assert len(batch) * max(map(len, batch)) <= 256
        assert len(batch) <= 16
        assert waiting[0] in [item[0] for item in batch]
        waiting = [i for i in waiting if i not in {item[0] for item in batch}]
    places = sum(len(b) * max(map(len, b)) for b in batches)
    assert sum(len(item) for b in batches for item in b) > 0.75 * places


# ------------------------------------------------- everything at once, over HTTP, in processes


class Client:
    """Sends requests by keep-alive connections and keeps the books. A request that was refused, or
    whose connection ended before an answer, is sent again to whoever serves now.
    """

    def __init__(self, servers: list[serving.Server]) -> None:
        self.servers, self.outcomes = servers, {}

    async def work(self, jobs: list) -> None:
        reader = writer = at = None
        while jobs:
            number, kind = jobs.pop()
            for _ in range(200):
                server = self.servers[-1]
                try:
                    if writer is None or at is not server or writer.is_closing():
                        at = server
                        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
                    writer.write(self.request(server, number, kind))
                    if kind == "gone":
                        await asyncio.sleep(0.002)
                        writer.close()
                        writer, status, text = None, "gone", b""
                        break
                    status, text = await asyncio.wait_for(self.read(reader), 60)
                    if status != 503:
                        break
                except (OSError, asyncio.IncompleteReadError):
                    writer = None
                await asyncio.sleep(0.02)
            self.outcomes.setdefault(number, []).append(self.judged(number, kind, status, text))
        if writer:
            writer.close()

    @staticmethod
    def request(server: serving.Server, number: int, kind: str) -> bytes:
        body = json.dumps({"text": f"number {number} {kind}"}).encode()
        head = (
            f"POST /embed?batch=32&wait=5 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer"
            f" {server.token}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    @staticmethod
    async def read(reader: asyncio.StreamReader) -> tuple[int, bytes]:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        size = int(head.split("content-length: ")[1].split("\r\n")[0])
        return int(head.split()[1]), await reader.readexactly(size)

    @staticmethod
    def judged(number: int, kind: str, status: object, text: bytes) -> str:
        if status != 200:
            return str(status)
        vector = np.frombuffer(base64.b64decode(json.loads(text)["vector"]), np.float32)
        own = ENCODE([f"number {number} {kind}"])[0]
        return "own" if vector[: len(own)].astype(int).tolist() == own else "wrong"


@pytest.mark.wall_clock
def test_every_fault_at_once_loses_doubles_and_harms_nobody(tmp_path, seeded, monkeypatch):
    """10,000 requests, 100 of them poisoned (some raise, some kill their process, some hang), 300
    clients who hang up, and SIGTERM in the middle, after which another server takes over.
    """
    counts = {"plain": 9600, "gone": 300, "raises": 86, "kills": 10, "hangs": 4}
    kinds = np.random.default_rng(seeded).permutation(
        np.repeat(list(counts), list(counts.values()))
    )
    words = {k.upper(): ENCODE([k])[0] for k in ("raises", "kills", "hangs")}
    plain = set(ENCODE(["number 1 plain gone"])[0])
    code = MODEL
    for name, numbers in words.items():
        code = code.replace(name, str(next(n for n in numbers if n not in plain)))
    (tmp_path / "faulty.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def started(name):
        args = ["faulty:Model", str(tmp_path / name), "--workers", "2", "--limit", "1"]
        return serving.server(SERVICE, args=args, token="t", patience_s=30)

    jobs = list(enumerate(map(str, kinds)))[::-1]

    async def go(first, second):
        client = Client([first])
        crowd = [asyncio.create_task(client.work(jobs)) for _ in range(64)]
        while len(jobs) > 5000:
            await asyncio.sleep(0.01)
        client.servers.append(second)
        os.kill(first.pid, signal.SIGTERM)
        await asyncio.gather(*crowd)
        return client.outcomes, await asyncio.to_thread(trials.bill_of, second, "batch=32&wait=5")

    with started("first.txt") as first, started("second.txt") as second:
        outcomes, bill = asyncio.run(go(first, second))
        assert processes.wait_gone([first.pid], 30)
    assert sorted(outcomes) == list(range(10_000))  # none lost
    assert all(len(o) == 1 for o in outcomes.values())  # none answered twice
    seen = Counter((kind, outcomes[i][0]) for i, kind in enumerate(map(str, kinds)))
    assert seen == {
        ("plain", "own"): 9600,
        ("gone", "gone"): 300,
        ("raises", "500"): 86,
        ("kills", "500"): 10,
        ("hangs", "504"): 4,
    }
    computed = Counter(
        line for name in ("first.txt", "second.txt") for line in (tmp_path / name).open()
    )
    names = [" ".join(map(str, ENCODE([f"number {i} {k}"])[0])) + "\n" for i, k in enumerate(kinds)]
    assert all(computed[n] == 1 for n, k in zip(names, kinds, strict=True) if k == "plain")
    assert all(computed[n] <= 1 for n, k in zip(names, kinds, strict=True) if k == "gone")
    bad = ("raises", "kills", "hangs")
    assert not any(computed[n] for n, k in zip(names, kinds, strict=True) if k in bad)
    assert bill["gone"] <= 300


@pytest.mark.wall_clock
def test_who_hangs_up_in_the_queue_is_never_computed(tmp_path, monkeypatch):
    (tmp_path / "faulty.py").write_text(
        MODEL.replace("RAISES", "-1").replace("KILLS", "-2").replace("HANGS", "-3")
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    args = ["faulty:Model", str(tmp_path / "log.txt")]
    setting = "batch=256&wait=1500"
    with serving.server(SERVICE, args=args, token="t", patience_s=30) as server:
        waiting = [trials.ask(server, setting, f"number {i}") for i in range(60)]
        time.sleep(0.3)
        for connection in waiting[10:]:
            connection.close()
        assert [c.getresponse().status for c in waiting[:10]] == [200] * 10
        bill = trials.bill_of(server, setting)
    assert (bill["items"], bill["gone"]) == (10, 0)


@pytest.mark.wall_clock
def test_told_to_end_a_server_answers_who_waits_at_once(tmp_path, monkeypatch):
    (tmp_path / "faulty.py").write_text(
        MODEL.replace("RAISES", "-1").replace("KILLS", "-2").replace("HANGS", "-3")
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    args = ["faulty:Model", str(tmp_path / "log.txt")]
    with serving.server(SERVICE, args=args, token="t", patience_s=30) as server:
        waiting = [trials.ask(server, "batch=64&wait=60000", f"number {i}") for i in range(5)]
        time.sleep(0.3)
        start = time.perf_counter()
        os.kill(server.pid, signal.SIGTERM)
        assert [c.getresponse().status for c in waiting] == [200] * 5
        assert time.perf_counter() - start < 20  # a busy machine; an idle one needs 0.1 s
        assert processes.wait_gone([server.pid], 20)


@pytest.mark.wall_clock
def test_workers_compute_die_hang_and_leave_nothing_behind(tmp_path, monkeypatch):
    code = MODEL.replace("RAISES", "7").replace("KILLS", "8").replace("HANGS", "9")
    (tmp_path / "faulty.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    async def go():
        crew = workers.Workers("faulty:Model", tmp_path / "log.txt", 2)
        await crew.start()
        names = [w.segment.name for w in crew.free._queue]
        same = await asyncio.gather(*(crew.run([[1, i], [2]]) for i in range(10, 30)))
        assert [v[0, 1] for v in same] == list(range(10, 30))
        with pytest.raises(RuntimeError, match="ValueError: a poisoned request"):
            await crew.run([[7]])
        assert crew.starts == 2  # a model that raises is as good as before
        with pytest.raises(Died):
            await crew.run([[8]])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(crew.run([[9]]), 0.3)
        with pytest.raises(ValueError, match="larger than"):
            await crew.run([[1] * 70_000])
        assert (await crew.run([[5, 0, 5]]))[0, :3].tolist() == [5, 0, 5]
        idle = crew.free._queue[0]  # one that dies while nobody needs it
        names += [w.segment.name for w in crew.free._queue]
        idle.process.kill()
        await idle.process.wait()
        for _ in range(4):
            await crew.run([[5]])
        await crew.stop()
        assert crew.starts == 5
        return names

    names = asyncio.run(go())
    assert not any(sharing.exists(name) for name in names)


# ---------------------------------------------------------------- what else the chapter builds


def test_padding_keeps_every_number_and_masks_the_rest(seeded):
    rng = np.random.default_rng(seeded)
    lists = [rng.integers(0, 30000, n).tolist() for n in rng.integers(1, 40, 20)]
    ids, mask = embed.pad(lists)
    assert [row[m == 1].tolist() for row, m in zip(ids, mask, strict=True)] == lists
    assert mask.sum() == sum(map(len, lists))


def test_batches_by_length_keep_the_budget_and_lose_nobody(ch13, seeded):
    rng = np.random.default_rng(seeded)
    lists = [[i] * int(n) for i, n in enumerate(rng.integers(1, 65, 200))]
    batches = ch13.by_length(lists, 256)
    assert sorted(n[0] for b in batches for n in b) == list(range(200))
    assert all(len(b) <= 32 and len(b) * max(map(len, b)) <= 256 for b in batches)


def test_a_fleet_of_one_is_the_simulated_machine(ch13, seeded):
    rng = np.random.default_rng(seeded)
    arrivals = np.cumsum(rng.exponential(1.0, 3000))
    for batch, wait in ((1, 0), (4, 0), (8, 2.5), (3, 100.0)):
        single = ch13.simulate(arrivals, batch, wait, lambda b: 0.5 + 0.3 * b) - arrivals
        many = fleet.fleet(arrivals, 1, "random", batch, wait, lambda b: 0.5 + 0.3 * b, rng)
        # the fleet can't know that no more requests will come: it waits for its last batch as a
        # server does
        np.testing.assert_allclose(np.sort(single)[:-batch], np.sort(many)[:-batch], atol=1e-9)


def test_two_choices_lie_between_random_and_the_fewest(seeded):
    rng = np.random.default_rng(seeded)
    arrivals = np.cumsum(rng.exponential(1 / (0.9 * 20), 20_000))
    tails = {
        b: np.percentile(fleet.fleet(arrivals, 20, b, 1, 0.0, lambda _: 1.0, rng), 99)
        for b in fleet.BALANCERS
    }
    assert tails["fewest"] < tails["two choices"] < tails["random"]
    with pytest.raises(ValueError, match="one of random, two choices, fewest"):
        fleet.fleet(arrivals, 2, "round", 1, 0.0, lambda _: 1.0, rng)


def test_one_machine_without_batching_is_the_textbook_queue(ch13):
    """M/D/1 at load 0.7: mean wait ρ/(2(1−ρ)) service times (Pollaczek and Khinchine)."""
    arrivals = np.cumsum(np.random.default_rng(3).exponential(1 / 0.7, 200_000))
    wait = (ch13.simulate(arrivals, 1, 0, lambda b: 1.0) - arrivals).mean() - 1
    assert wait == pytest.approx(0.7 / (2 * 0.3), rel=0.05)


# ------------------------------------------------------------------ the server and the client


@pytest.fixture
def echo(tmp_path):
    program = tmp_path / "echo.py"
    program.write_text(ECHO)
    return program


@pytest.mark.wall_clock
def test_load_over_http_keeps_its_books(echo):
    with serving.server(echo, token="s3cret") as server:
        bodies = [b'{"a": 1}', b'{"b": 22}']
        load = serving.open_loop(
            server.url + "/x?y=1", bodies, 300, 0.4, token="s3cret", keep=True, seed=4
        )
        assert load.failed == 0
        assert 70 < len(load.status) < 180
        assert all(
            t == b"/x?y=1 " + bodies[w] for t, w in zip(load.bodies, load.which, strict=True)
        )
        assert (load.sent >= load.intended).all()
        assert (np.diff(load.intended) >= 0).all()
        again = serving.open_loop(server.url, bodies, 300, 0.4, token="s3cret", seed=4)
        np.testing.assert_array_equal(load.intended, again.intended)
        assert set(
            serving.closed_loop(server.url, bodies, 0.2, connections=3, token="wrong").status
        ) == {401}
        assert server.peak_mb() > 1


@pytest.mark.wall_clock
def test_waiting_for_a_connection_counts_and_what_comes_too_late_is_given_up(echo):
    with serving.server(echo, token="t") as server:
        queued = serving.open_loop(server.url, [b"slow"], 40, 0.2, connections=1, token="t", seed=1)
        assert queued.p(99) > 2 * 100
        # sent one after the other: the times from sending to answer share the whole time
        assert (queued.sent[1:] >= queued.finished[:-1]).all()
        # one after the other they take longer than this; the first has 0.9 s to spare
        late = serving.open_loop(
            server.url, [b"slow"], 80, 0.25, connections=1, token="t", seed=1, timeout_s=1.0
        )
        assert 0 < late.failed < len(late.status)
        assert set(late.status) == {0, 200}


@pytest.mark.wall_clock
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_no_process_and_no_port_is_left_however_the_block_ends(echo, error):
    with (
        contextlib.suppress(*([error] if error else [])),
        serving.server(echo, token="t") as server,
    ):
        pid, port = server.pid, server.port
        assert processes.runs(pid)
        if error:
            raise error
    assert not processes.runs(pid)
    with socket.socket() as s:
        assert s.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.wall_clock
def test_a_killed_notebook_takes_its_server_along(echo):
    code = (
        "import sys, time; from pathlib import Path; from course_utils import serving\n"
        "with serving.server(Path(sys.argv[1]), token='t') as s:\n"
        "    print(s.pid, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(echo)], stdout=subprocess.PIPE, text=True
    )
    pid = int(process.stdout.readline())
    process.kill(), process.wait(), process.stdout.close()
    for _ in range(2400):  # two minutes of a busy machine; an idle one needs a second
        if not processes.runs(pid):
            break
        time.sleep(0.05)
    assert not processes.runs(pid)


def test_a_server_that_dies_says_its_last_words_and_a_taken_port_is_not_mistaken_for_ours(
    tmp_path, echo
):
    bad = tmp_path / "bad.py"
    bad.write_text("raise SystemExit('no model in this folder')")
    with pytest.raises(RuntimeError, match="no model in this folder"), serving.server(bad):
        pass
    with (
        serving.server(echo, token="t") as first,
        pytest.raises(RuntimeError),
        serving.server(echo, token="t", port=first.port),
    ):
        pass


def test_the_client_imports_no_torch_and_no_numpy():
    code = (
        "import sys, course_utils.serving; print([m for m in ('torch', 'numpy', 'psutil') if m in"
        " sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        == "[]"
    )


@pytest.mark.parametrize(
    ("line", "size"),
    [(b"", 0), (b'{"count": 2, "sizes": [5', 0), (b'{"count": 2, "sizes": [5, 6]}\n', 90)],
)
def test_a_load_whose_report_is_not_whole_is_refused(line, size):
    """Seen once: the report came without its end, and without an error."""
    with pytest.raises(RuntimeError, match=r"not whole: \d+ and \d+ bytes"):
        serving.client._head(line, size, 0)
    assert serving.client._head(b'{"count": 2, "sizes": [5, 6]}\n', 91, 0) == (2, [5, 6])
