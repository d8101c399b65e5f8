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


@right("13.B", "asyncio.timeout around the loop")
async def under_a_timeout(get, max_batch, max_wait):
    batch = [await get()]
    try:
        async with asyncio.timeout(max_wait):
            while len(batch) < max_batch:
                batch.append(await get())
    except TimeoutError:
        pass
    return batch


@right("13.B", "a tuple, and asyncio.wait on a task that is cancelled at the end")
async def by_tasks(get, max_batch, max_wait):
    batch = [await get()]
    deadline = time.monotonic() + max_wait
    while len(batch) < max_batch:
        task = asyncio.ensure_future(get())
        try:
            done, _ = await asyncio.wait([task], timeout=max(deadline - time.monotonic(), 0))
        finally:
            if not task.done():
                task.cancel()
        if not done:
            break
        batch.append(task.result())
    return tuple(batch)


class Collector:
    def __init__(self, slack):
        self.slack = slack

    async def __call__(self, get, max_batch, max_wait):
        return await under_a_timeout(get, max_batch, max_wait - self.slack)


right("13.B", "an object that is called")(Collector(0.0))
right("13.B", "a partial")(functools.partial(under_a_timeout))


@wrong("13.B", "a get that is never cancelled")
async def getter_left(get, max_batch, max_wait):
    batch = [await get()]
    deadline = asyncio.get_running_loop().time() + max_wait
    while len(batch) < max_batch:
        task = asyncio.ensure_future(get())
        left = max(deadline - asyncio.get_running_loop().time(), 0)
        done, _ = await asyncio.wait([task], timeout=left)
        if not done:
            break
        batch.append(task.result())
    return batch


@wrong("13.B", "a get behind a shield")
async def shielded(get, max_batch, max_wait):
    batch = [await get()]
    deadline = asyncio.get_running_loop().time() + max_wait
    while len(batch) < max_batch:
        left = deadline - asyncio.get_running_loop().time()
        try:
            batch.append(await asyncio.wait_for(asyncio.shield(get()), left))
        except TimeoutError:
            break
    return batch


@wrong("13.B", "a pool of gets")
async def pool(get, max_batch, max_wait):
    batch = [await get()]
    tasks = [asyncio.ensure_future(get()) for _ in range(max_batch - 1)]
    if tasks:
        done, _ = await asyncio.wait(tasks, timeout=max_wait)
        batch += sorted(t.result() for t in done)
    return batch


@wrong("13.B", "no wait means for ever")
async def for_ever(get, max_batch, max_wait):
    return await under_a_timeout(get, max_batch, max_wait or None)


@wrong("13.B", "every exception ends the batch, being cancelled too")
async def catches_all(get, max_batch, max_wait):
    batch = [await get()]
    deadline = asyncio.get_running_loop().time() + max_wait
    while len(batch) < max_batch:
        try:
            left = deadline - asyncio.get_running_loop().time()
            batch.append(await asyncio.wait_for(get(), left))
        except BaseException:
            break
    return batch


@wrong("13.B", "the wall clock")
async def wall_clock(get, max_batch, max_wait):
    batch = [await get()]
    deadline = time.time() + max_wait
    while len(batch) < max_batch:
        try:
            batch.append(await asyncio.wait_for(get(), deadline - time.time()))
        except TimeoutError:
            break
    return batch


@wrong("13.B", "one more than fits")
async def one_more(get, max_batch, max_wait):
    return await under_a_timeout(get, max_batch + 1, max_wait)


@wrong("13.B", "a wait for one request alone, too")
async def waits_alone(get, max_batch, max_wait):
    batch = await under_a_timeout(get, max_batch, max_wait)
    if max_batch == 1:
        await asyncio.sleep(max_wait)
    return batch


@wrong("13.B", "the first request has a deadline, too")
async def impatient(get, max_batch, max_wait):
    try:
        first = await asyncio.wait_for(get(), max_wait)
    except TimeoutError:
        return []
    return (
        [first, *await under_a_timeout(get, max_batch - 1, max_wait)] if max_batch > 1 else [first]
    )


@wrong("13.B", "the newest first")
async def newest_first(get, max_batch, max_wait):
    return (await under_a_timeout(get, max_batch, max_wait))[::-1]


@wrong("13.B", "milliseconds")
async def milliseconds(get, max_batch, max_wait):
    return await under_a_timeout(get, max_batch, max_wait / 1000)


@wrong("13.B", "an ordinary function")
def not_a_coroutine(get, max_batch, max_wait):
    return [get() for _ in range(max_batch)]


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
