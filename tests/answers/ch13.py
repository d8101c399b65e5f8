"""Answers to chapter 13's exercises."""

import asyncio
import functools
import time
from fractions import Fraction

import numpy as np
import torch

from answers import right, wrong


@right("13.A", "fractions")
def in_fractions(arrived, finished):
    a, f = [Fraction(t) for t in arrived], [Fraction(t) for t in finished]
    window = max(f, default=0) - min(a, default=0)
    return sum(x - y for x, y in zip(f, a, strict=True)) / window if window else 0


@right("13.A", "a tensor of no dimension")
def in_torch(arrived, finished):
    if not arrived or max(finished) == min(arrived):
        return torch.tensor(0.0)
    a, f = torch.tensor(arrived).double(), torch.tensor(finished).double()
    return (f - a).sum() / (f.max() - a.min())


@right("13.A", "event by event")
def walked(arrived, finished):
    events = sorted([(t, 1) for t in arrived] + [(t, -1) for t in finished])
    area = inside = 0
    for (t, step), (after, _) in zip(events, events[1:], strict=False):
        inside += step
        area += inside * (after - t)
    return np.array([area / (events[-1][0] - events[0][0])]) if area else np.float32(0)


def _inside(window, total=lambda a, f: (f - a).sum()):
    def mean_inside(arrived, finished):
        a, f = np.asarray(arrived, float), np.asarray(finished, float)
        if len(a) == 0 or f.max() == a.min():
            return 0.0
        return float(total(a, f) / window(a, f))

    return mean_inside


wrong("13.A", "the first in the list is the first to come")(_inside(lambda a, f: f.max() - a[0]))
wrong("13.A", "the last in the list is the last answered")(_inside(lambda a, f: f[-1] - a.min()))
wrong("13.A", "the window begins at 0")(_inside(lambda a, f: f.max()))
wrong("13.A", "the window is that of the arrivals")(
    _inside(lambda a, f: max(a.max() - a.min(), 1e-9))
)
wrong("13.A", "only the time in which anybody is inside")(
    _inside(
        lambda a, f: sum(
            any(x <= t < y for x, y in zip(a, f, strict=True)) * 0.01
            for t in np.arange(a.min(), f.max(), 0.01)
        )
    )
)
wrong("13.A", "the rate of arrivals times the mean latency")(
    _inside(lambda a, f: max(a.max() - a.min(), 1e-9) * len(a) / max(len(a) - 1, 1))
)
wrong("13.A", "the number, not the mean")(_inside(lambda a, f: 1.0))
wrong("13.A", "the mean over the requests")(_inside(lambda a, f: len(a)))
wrong("13.A", "one without requests")(
    lambda a, f: _inside(lambda x, y: y.max() - x.min())(a, f) if a else 1.0
)


@wrong("13.A", "a window without length ends in NaN")
def no_length(arrived, finished):
    a, f = np.asarray(arrived, float), np.asarray(finished, float)
    with np.errstate(all="ignore"):
        return float((f - a).sum() / (f.max() - a.min())) if len(a) else 0.0


@right("13.B", "asyncio.timeout_at around the loop, then a drain")
async def under_a_timeout(queue, max_batch, max_wait):
    came, first = await queue.get()
    batch = [first]
    try:
        async with asyncio.timeout_at(came + max_wait):
            while len(batch) < max_batch:
                batch.append((await queue.get())[1])
    except TimeoutError:
        pass
    return _drained(queue, batch, max_batch)


def _drained(queue, batch, max_batch):
    while len(batch) < max_batch and not queue.empty():
        batch.append(queue.get_nowait()[1])
    return batch


@right("13.B", "a tuple, and asyncio.wait on a task that is cancelled at the end")
async def by_tasks(queue, max_batch, max_wait):
    came, first = await queue.get()
    batch = [first]
    while len(batch) < max_batch:
        try:
            batch.append(queue.get_nowait()[1])
            continue
        except asyncio.QueueEmpty:
            pass
        task = asyncio.ensure_future(queue.get())
        try:
            done, _ = await asyncio.wait([task], timeout=max(came + max_wait - time.monotonic(), 0))
        finally:
            if not task.done():
                task.cancel()
        if not done:
            break
        batch.append(task.result()[1])
    return tuple(batch)


class Collector:
    async def __call__(self, queue, max_batch, max_wait):
        return await under_a_timeout(queue, max_batch, max_wait)


right("13.B", "an object that is called")(Collector())
right("13.B", "a partial")(functools.partial(under_a_timeout))


@wrong("13.B", "a get that is never cancelled")
async def getter_left(queue, max_batch, max_wait):
    came, first = await queue.get()
    batch = _drained(queue, [first], max_batch)
    while len(batch) < max_batch:
        task = asyncio.ensure_future(queue.get())
        left = max(came + max_wait - asyncio.get_running_loop().time(), 0)
        done, _ = await asyncio.wait([task], timeout=left)
        if not done:
            break
        batch.append(task.result()[1])
    return batch


@wrong("13.B", "a get behind a shield")
async def shielded(queue, max_batch, max_wait):
    came, first = await queue.get()
    batch = _drained(queue, [first], max_batch)
    while len(batch) < max_batch:
        left = came + max_wait - asyncio.get_running_loop().time()
        try:
            batch.append((await asyncio.wait_for(asyncio.shield(queue.get()), left))[1])
        except TimeoutError:
            break
    return batch


@wrong("13.B", "a pool of gets")
async def pool(queue, max_batch, max_wait):
    batch = [(await queue.get())[1]]
    tasks = [asyncio.ensure_future(queue.get()) for _ in range(max_batch - 1)]
    if tasks:
        done, _ = await asyncio.wait(tasks, timeout=max_wait)
        batch += sorted(t.result()[1] for t in done)
    return batch


@wrong("13.B", "no wait means for ever")
async def for_ever(queue, max_batch, max_wait):
    return await under_a_timeout(queue, max_batch, max_wait or 1e9)


@wrong("13.B", "every exception ends the batch, being cancelled too")
async def catches_all(queue, max_batch, max_wait):
    came, first = await queue.get()
    batch = [first]
    while len(_drained(queue, batch, max_batch)) < max_batch:
        try:
            left = came + max_wait - asyncio.get_running_loop().time()
            batch.append((await asyncio.wait_for(queue.get(), left))[1])
        except BaseException:
            break
    return batch


@wrong("13.B", "the wall clock")
async def wall_clock(queue, max_batch, max_wait):
    loop = asyncio.get_running_loop()
    came, first = await queue.get()
    batch, deadline = [first], time.time() + came - loop.time() + max_wait
    while len(_drained(queue, batch, max_batch)) < max_batch:
        try:
            batch.append((await asyncio.wait_for(queue.get(), deadline - time.time()))[1])
        except TimeoutError:
            break
    return batch


@wrong("13.B", "the wait counts from when the first is picked up")
async def from_the_pick_up(queue, max_batch, max_wait):
    batch = [(await queue.get())[1]]
    try:
        async with asyncio.timeout(max_wait):
            while len(batch) < max_batch:
                batch.append((await queue.get())[1])
    except TimeoutError:
        pass
    return _drained(queue, batch, max_batch)


@wrong("13.B", "no wait: the first one alone")
async def alone_without_a_wait(queue, max_batch, max_wait):
    return await under_a_timeout(queue, max_batch if max_wait else 1, max_wait)


@wrong("13.B", "the pairs, not the requests")
async def pairs(queue, max_batch, max_wait):
    return [(0.0, item) for item in await under_a_timeout(queue, max_batch, max_wait)]


@wrong("13.B", "drains more than fits")
async def drains_all(queue, max_batch, max_wait):
    return _drained(queue, await under_a_timeout(queue, max_batch, max_wait), 10**9)


@wrong("13.B", "one more than fits")
async def one_more(queue, max_batch, max_wait):
    return await under_a_timeout(queue, max_batch + 1, max_wait)


@wrong("13.B", "a wait for one request alone, too")
async def waits_alone(queue, max_batch, max_wait):
    batch = await under_a_timeout(queue, max_batch, max_wait)
    if max_batch == 1:
        await asyncio.sleep(max_wait)
    return batch


@wrong("13.B", "the first request has a deadline, too")
async def impatient(queue, max_batch, max_wait):
    try:
        pair = await asyncio.wait_for(queue.get(), max(max_wait, 1e-3))
    except TimeoutError:
        return []
    queue._queue.appendleft(pair)
    return await under_a_timeout(queue, max_batch, max_wait)


@wrong("13.B", "the newest first")
async def newest_first(queue, max_batch, max_wait):
    return (await under_a_timeout(queue, max_batch, max_wait))[::-1]


@wrong("13.B", "milliseconds")
async def milliseconds(queue, max_batch, max_wait):
    return await under_a_timeout(queue, max_batch, max_wait / 1000)


@wrong("13.B", "an ordinary function")
def not_a_coroutine(queue, max_batch, max_wait):
    return _drained(queue, [], max_batch)


def _grid(simulate, promise, batches=(1, 8, 16, 32, 64), waits=14):
    seen = []
    for batch in batches:
        for wait in np.minimum(np.linspace(0, 0.95, waits) * promise, 100):
            tail, work = simulate(batch, wait)
            if tail <= promise:
                seen.append((work, batch, wait))
    return sorted(seen)


def _careful(simulate, promise, batches, share=0.93):
    for _, batch, wait in _grid(simulate, promise, batches)[:10]:
        if np.mean([simulate(batch, wait)[0] for _ in range(8)]) <= share * promise:
            return batch, wait
    return None


@right("13.C", "the longest wait of each batch size, by halving; a list of NumPy numbers")
def by_halving(simulate, promise):
    found = []
    for batch in (8, 16, 32, 64):
        low, high = 0.0, min(promise, 100.0)
        if np.mean([simulate(batch, low)[0] for _ in range(3)]) > 0.94 * promise:
            continue
        for _ in range(5):
            middle = (low + high) / 2
            plays = [simulate(batch, middle) for _ in range(6)]
            if np.mean([p[0] for p in plays]) <= 0.94 * promise:
                low = middle
            else:
                high = middle
        found.append((simulate(batch, low)[1], batch, low))
    return [np.int64(min(found)[1]), np.float32(min(found)[2])] if found else None


wrong("13.C", "8 whatever the machine")(lambda s, p: _careful(s, p, (8,)))
wrong("13.C", "16 whatever the machine")(lambda s, p: _careful(s, p, (16,)))
wrong("13.C", "half of the promise is margin")(lambda s, p: _careful(s, p, (1, 8, 16, 32, 64), 0.5))
wrong("13.C", "ten ms less than the promise, never tried")(
    lambda s, p: None if p < 4 else (64, p - 10)
)
wrong("13.C", "0.82 of the promise, never tried")(lambda s, p: None if p < 4 else (64, 0.82 * p))
wrong("13.C", "half of the promise, never tried")(lambda s, p: None if p < 4 else (16, 0.5 * p))
wrong("13.C", "never None")(
    lambda s, p: _careful(s, p, (1, 8, 16, 32, 64)) or (64, min(p / 2, 100.0))
)
wrong("13.C", "None for promises below 4 alone")(
    lambda s, p: None if p < 4 else (_careful(s, p, (1, 8, 16, 32, 64)) or (1, 0.0))
)
wrong("13.C", "the shortest tail")(
    lambda s, p: min(
        ((s(b, w)[0], b, w) for b in (1, 8, 16, 32, 64) for w in (0.0, 0.2 * p)), default=None
    )[1:]
)
wrong("13.C", "no wait at all")(
    lambda s, p: next((b, 0.0) for b in (64,)) if s(64, 0.0)[0] <= p else None
)
wrong("13.C", "every wait, however many calls it takes")(
    lambda s, p: _grid(s, p, range(1, 65), 30)[0][1:]
)


@wrong("13.C", "p99 of one draw, by halving to a hair")
def to_a_hair(simulate, promise):
    found = []
    for batch in (8, 16, 32, 64):
        low, high = 0.0, min(promise, 100.0)
        for _ in range(20):
            middle = (low + high) / 2
            tail, work = simulate(batch, middle)
            if tail <= promise:
                low = middle
                found.append((work, batch, middle))
            else:
                high = middle
    return min(found)[1:] if found else None
