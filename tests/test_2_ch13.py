"""What chapter 13 teaches, taken from its cells and tried on more inputs, and the servers and
clients it stands on.
"""

import asyncio
import collections
import contextlib
import heapq
import itertools
import json
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import taught

from course_utils import processes, serving
from course_utils.checks.clock import Clock, Loop

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


@pytest.fixture(scope="module")
def ch13() -> SimpleNamespace:
    modules = (asyncio, collections, itertools, heapq, time, contextlib, json)
    chapter = taught("13", **{m.__name__: m for m in modules})
    for name in ("ask", "_collect", "_answer"):
        setattr(chapter.Batcher, name, vars(chapter)[name])
    return chapter


def play(work, clock: Clock) -> object:
    """Run a coroutine on a loop whose timers keep this clock: no busy machine makes it late."""
    with asyncio.Runner(loop_factory=lambda: Loop(clock)) as runner:
        return runner.run(work)


@pytest.fixture
def echo(tmp_path):
    program = tmp_path / "echo.py"
    program.write_text(ECHO)
    return program


def test_a_storm_is_answered_exactly_once_and_the_innocent_are_unharmed(ch13, seeded):
    rng = np.random.default_rng(seeded)
    kinds = rng.permutation(
        ["poisoned"] * 30 + ["cancelled"] * 90 + ["slow"] * 10 + ["plain"] * 2870
    )
    for workers in (1, 3):
        seen = asyncio.run(
            ch13.storm(
                ch13.Batcher,
                kinds,
                max_batch=int(rng.integers(2, 40)),
                workers=workers,
            )
        )
        assert seen == {
            ("poisoned", "ValueError"): 30,
            ("cancelled", "CancelledError"): 90,
            ("slow", "own answer"): 10,
            ("plain", "own answer"): 2870,
        }


def test_the_test_can_fail(ch13):
    """A batcher that does not cut a failed batch harms the innocent, and the storm shows it."""

    class Careless(ch13.Batcher):
        async def _answer(self, batch):
            try:
                outputs = await self.run([item for _, item in batch])
            except Exception as error:
                outputs = [error] * len(batch)
            for (future, _), output in zip(batch, outputs, strict=True):
                if not future.done():
                    (
                        future.set_exception(output)
                        if isinstance(output, Exception)
                        else future.set_result(output)
                    )

    seen = asyncio.run(ch13.storm(Careless, ["poisoned"] + ["plain"] * 50, max_batch=8))
    assert seen["plain", "ValueError"] == 7


def test_a_full_queue_refuses_and_closing_drains_without_waiting(ch13):
    clock = Clock()

    async def go():
        batcher = ch13.Batcher(ch13.double, max_batch=4, max_wait=30.0, max_queue=8)
        tasks = [asyncio.create_task(batcher.ask(i)) for i in range(11)]
        await asyncio.sleep(0)
        start = clock.now
        await batcher.close()
        took = clock.now - start
        with pytest.raises(ch13.Closed):
            await batcher.ask(0)
        return await asyncio.gather(*tasks, return_exceptions=True), took

    results, took = play(go(), clock)
    assert results[:8] == [2 * i for i in range(8)]
    assert all(isinstance(r, ch13.Full) for r in results[8:])
    assert took < 0.1


def test_the_wait_counts_from_the_oldest_and_a_caller_who_leaves_frees_its_place(ch13):
    clock = Clock()

    async def go():
        batcher = ch13.Batcher(ch13.double, max_batch=64, max_wait=0.3, max_queue=3)
        start = clock.now
        first = asyncio.create_task(batcher.ask(0))
        gone = asyncio.create_task(batcher.ask(1))
        await asyncio.sleep(0.1)
        gone.cancel()
        await asyncio.sleep(0.1)
        late = [
            asyncio.create_task(batcher.ask(i)) for i in (2, 3)
        ]  # would be refused if the place were still taken
        assert await first == 0
        took = clock.now - start
        assert await asyncio.gather(*late) == [4, 6]
        await batcher.close()
        return took, [n for n, _ in batcher.log]

    took, sizes = play(go(), clock)
    assert 0.29 < took < 0.32
    assert sizes == [3]


def test_a_model_that_gives_too_few_outputs_is_an_error_for_everybody(ch13):
    async def short(items):
        return items[:-1]

    async def go():
        batcher = ch13.Batcher(short, max_batch=4, max_wait=0)
        results = await asyncio.gather(*(batcher.ask(i) for i in range(4)), return_exceptions=True)
        await batcher.close()
        return results

    assert all(isinstance(r, ValueError) for r in asyncio.run(go()))


def test_padding_keeps_every_number_and_masks_the_rest(ch13, seeded):
    rng = np.random.default_rng(seeded)
    lists = [rng.integers(1, 30000, n).tolist() for n in rng.integers(1, 40, 20)]
    ids, mask = ch13.pad(lists)
    assert [row[m == 1].tolist() for row, m in zip(ids, mask, strict=True)] == lists
    assert mask.sum() == sum(map(len, lists))


def test_a_fleet_of_one_is_the_simulated_machine(ch13, seeded):
    rng = np.random.default_rng(seeded)
    arrivals = np.cumsum(rng.exponential(1.0, 3000))
    for batch, wait in ((1, 0), (4, 0), (8, 2.5), (3, 100.0)):
        single = ch13.simulate(arrivals, batch, wait, lambda b: 0.5 + 0.3 * b) - arrivals
        many = ch13.fleet(arrivals, 1, "random", batch, wait, lambda b: 0.5 + 0.3 * b, rng)
        # the fleet can't know that no more requests will come: it waits for its last batch as a
        # server does
        np.testing.assert_allclose(np.sort(single)[:-batch], np.sort(many)[:-batch], atol=1e-9)


def test_one_machine_without_batching_is_the_textbook_queue(ch13):
    """M/D/1 at load 0.7: mean wait ρ/(2(1−ρ)) service times (Pollaczek and Khinchine)."""
    arrivals = np.cumsum(np.random.default_rng(3).exponential(1 / 0.7, 200_000))
    wait = (ch13.simulate(arrivals, 1, 0, lambda b: 1.0) - arrivals).mean() - 1
    assert wait == pytest.approx(0.7 / (2 * 0.3), rel=0.05)


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
