"""Wrong answers to chapter 13's exercises, by somebody who has read only their texts."""

import asyncio
import time

import numpy as np

from answers import wrong

# ---- A


def _arrays(arrived, finished):
    return np.asarray(arrived, float), np.asarray(finished, float)


def _inside(a, f, span):
    return float((f - a).sum() / span) if span > 0 else 0.0


@wrong("13.A", "read only: first and last of the list, right for sorted requests")
def first_and_last(arrived, finished):
    a, f = _arrays(arrived, finished)
    return _inside(a, f, f[-1] - a[0]) if len(a) else 0.0


@wrong("13.A", "read only: the last arrival's answer, not the last answer")
def last_arrivals_answer(arrived, finished):
    a, f = _arrays(arrived, finished)
    return _inside(a, f, f[a.argmax()] - a.min()) if len(a) else 0.0


@wrong("13.A", "read only: counted from second 0, right if the first arrives then")
def from_second_zero(arrived, finished):
    a, f = _arrays(arrived, finished)
    return _inside(a, f, f.max()) if len(a) else 0.0


@wrong("13.A", "read only: until the last arrival")
def until_last_arrival(arrived, finished):
    a, f = _arrays(arrived, finished)
    return _inside(a, f, a.max() - a.min()) if len(a) else 0.0


@wrong("13.A", "read only: nan without requests' time")
def no_guard_for_time(arrived, finished):
    a, f = _arrays(arrived, finished)
    with np.errstate(all="ignore"):
        return float((f - a).sum() / (f.max() - a.min())) if len(a) else 0.0


@wrong("13.A", "read only: fails without requests")
def no_guard_for_none(arrived, finished):
    a, f = _arrays(arrived, finished)
    return _inside(a, f, f.max() - a.min())


@wrong("13.A", "read only: the mean latency")
def mean_latency(arrived, finished):
    a, f = _arrays(arrived, finished)
    return float((f - a).mean()) if len(a) else 0.0


@wrong("13.A", "read only: arrivals a second")
def rate(arrived, finished):
    a, f = _arrays(arrived, finished)
    span = f.max() - a.min() if len(a) else 0.0
    return len(a) / span if span > 0 else 0.0


@wrong("13.A", "read only: the mean over the moments of arrival")
def at_arrivals(arrived, finished):
    a, f = _arrays(arrived, finished)
    if not len(a):
        return 0.0
    return float(np.mean([((a <= t) & (f > t)).sum() for t in a]))


@wrong("13.A", "read only: the most that are inside at once")
def most(arrived, finished):
    a, f = _arrays(arrived, finished)
    return float(max((((a <= t) & (f > t)).sum() for t in a), default=0))


@wrong("13.A", "read only: idle moments do not count")
def busy_only(arrived, finished):
    a, f = _arrays(arrived, finished)
    busy, end = 0.0, -np.inf
    for i in np.argsort(a):
        busy += max(0.0, f[i] - max(a[i], end))
        end = max(end, f[i])
    return _inside(a, f, busy)


@wrong("13.A", "read only: sorted answers in front of sorted arrivals, in the caller's arrays")
def sorts_in_place(arrived, finished):
    a, f = _arrays(arrived, finished)
    arrived.sort()
    finished.sort()
    return _inside(a, f, f.max() - a.min()) if len(a) else 0.0


@wrong("13.A", "read only: 1 if the first arrival is the last answer")
def one_for_no_time(arrived, finished):
    a, f = _arrays(arrived, finished)
    if not len(a):
        return 0.0
    span = f.max() - a.min()
    return _inside(a, f, span) if span > 0 else float(len(a))


# ---- B


def _now():
    return asyncio.get_running_loop().time()


async def _rest(queue, batch, max_batch, end):
    while len(batch) < max_batch:
        if not queue.empty():
            batch.append(queue.get_nowait()[1])
            continue
        left = end - _now()
        if left <= 0:
            break
        try:
            batch.append((await asyncio.wait_for(queue.get(), left))[1])
        except TimeoutError:
            break
    return batch


@wrong("13.B", "read only: the wait starts anew with each request")
async def anew(queue, max_batch, max_wait):
    batch = [(await queue.get())[1]]
    while len(batch) < max_batch:
        if not queue.empty():
            batch.append(queue.get_nowait()[1])
            continue
        try:
            batch.append((await asyncio.wait_for(queue.get(), max_wait))[1])
        except TimeoutError:
            break
    return batch


@wrong("13.B", "read only: the wait starts when collect is called")
async def from_the_call(queue, max_batch, max_wait):
    end = _now() + max_wait
    return await _rest(queue, [(await queue.get())[1]], max_batch, end)


@wrong("13.B", "read only: the wait starts when the first one is taken")
async def from_the_take(queue, max_batch, max_wait):
    first = (await queue.get())[1]
    return await _rest(queue, [first], max_batch, _now() + max_wait)


@wrong("13.B", "read only: the newest one's wait counts, for it came last")
async def from_the_newest(queue, max_batch, max_wait):
    came, item = await queue.get()
    batch = [item]
    while len(batch) < max_batch:
        try:
            came, item = await asyncio.wait_for(queue.get(), max(came + max_wait - _now(), 0.001))
        except TimeoutError:
            break
        batch.append(item)
    return batch


@wrong("13.B", "read only: waits for the first one no longer than max_wait")
async def short_first(queue, max_batch, max_wait):
    try:
        came, item = await asyncio.wait_for(queue.get(), max(max_wait, 0.001))
    except TimeoutError:
        return []
    return await _rest(queue, [item], max_batch, came + max_wait)


@wrong("13.B", "read only: one request more than max_batch")
async def one_more(queue, max_batch, max_wait):
    came, item = await queue.get()
    return await _rest(queue, [item], max_batch + 1, came + max_wait)


@wrong("13.B", "read only: two requests at least")
async def two_at_least(queue, max_batch, max_wait):
    came, item = await queue.get()
    return await _rest(queue, [item], max(2, max_batch), came + max_wait)


@wrong("13.B", "read only: always waits to the end, a full batch too")
async def to_the_end(queue, max_batch, max_wait):
    came, item = await queue.get()
    batch = await _rest(queue, [item], max_batch, came + max_wait)
    await asyncio.sleep(max(0.0, came + max_wait - _now()))
    return batch


@wrong("13.B", "read only: sleeps first, then takes what there is")
async def sleeps_first(queue, max_batch, max_wait):
    came, item = await queue.get()
    await asyncio.sleep(max(0.0, came + max_wait - _now()))
    return await _rest(queue, [item], max_batch, 0)


@wrong("13.B", "read only: the wall clock decides, which may be set back")
async def wall_clock(queue, max_batch, max_wait):
    came, item = await queue.get()
    batch, end = [item], time.time() + came - _now() + max_wait
    while len(batch) < max_batch:
        if not queue.empty():
            batch.append(queue.get_nowait()[1])
            continue
        left = end - time.time()
        if left <= 0:
            break
        try:
            batch.append((await asyncio.wait_for(queue.get(), left))[1])
        except TimeoutError:
            break
    return batch


@wrong("13.B", "read only: a get is left waiting, its request is lost")
async def left_waiting(queue, max_batch, max_wait):
    came, item = await queue.get()
    batch, end = [item], came + max_wait
    while len(batch) < max_batch:
        task = asyncio.ensure_future(queue.get())
        done, _ = await asyncio.wait([task], timeout=max(end - _now(), 0.0))
        if not done:
            break
        batch.append(task.result()[1])
    return batch


@wrong("13.B", "read only: many gets at once, those too late are cancelled, those too many lost")
async def many_at_once(queue, max_batch, max_wait):
    batch = [(await queue.get())[1]]
    if max_batch > 1:
        tasks = [asyncio.ensure_future(queue.get()) for _ in range(max_batch)]
        done, late = await asyncio.wait(tasks, timeout=max_wait)
        for task in late:
            task.cancel()
        batch += [task.result()[1] for task in tasks if task in done][: max_batch - 1]
    return batch


@wrong("13.B", "read only: a cancellation is swallowed")
async def swallowed(queue, max_batch, max_wait):
    came, item = await queue.get()
    batch = [item]
    try:
        return await _rest(queue, batch, max_batch, came + max_wait)
    except asyncio.CancelledError:
        return batch


@wrong("13.B", "read only: a cancellation before the first one is swallowed")
async def swallowed_at_first(queue, max_batch, max_wait):
    try:
        came, item = await queue.get()
    except asyncio.CancelledError:
        return []
    return await _rest(queue, [item], max_batch, came + max_wait)


@wrong("13.B", "read only: remembers the batch of the call before")
async def remembers(queue, max_batch, max_wait, batch=[]):  # noqa: B006
    came, item = await queue.get()
    batch.append(item)
    return list(await _rest(queue, batch, max_batch, came + max_wait))


@wrong("13.B", "read only: the first one alone")
async def first_alone(queue, max_batch, max_wait):
    return [(await queue.get())[1]]


@wrong("13.B", "read only: its time is over, so it goes alone")
async def alone_when_late(queue, max_batch, max_wait):
    came, item = await queue.get()
    if _now() >= came + max_wait:
        return [item]
    return await _rest(queue, [item], max_batch, came + max_wait)


@wrong("13.B", "read only: max_wait is taken for milliseconds")
async def milliseconds(queue, max_batch, max_wait):
    came, item = await queue.get()
    return await _rest(queue, [item], max_batch, came + max_wait / 1000)


@wrong("13.B", "read only: waits twice as long")
async def twice_as_long(queue, max_batch, max_wait):
    came, item = await queue.get()
    return await _rest(queue, [item], max_batch, came + 2 * max_wait)


# ---- C

_GRID = [(b, w) for b in (1, 2, 4, 8, 16, 32, 64) for w in (0, 2, 5, 10, 20, 40, 70, 100)]


def _least(results, limit):
    fits = [(work, policy) for policy, (p99, work) in results.items() if p99 <= limit]
    return min(fits)[1] if fits else None


def _played(simulate, grid=_GRID):
    return {policy: simulate(*policy) for policy in grid}


@wrong("13.C", "read only: always 32 and 10 ms")
def always_the_same(simulate, promise):
    return 32, 10


@wrong("13.C", "read only: the largest batch and the longest wait that miss it by a fifth at most")
def largest(simulate, promise):
    for policy in reversed(_GRID):
        if simulate(*policy)[0] <= promise * 1.2:
            return policy
    return None


@wrong("13.C", "read only: the shortest tail, whatever it works")
def shortest_tail(simulate, promise):
    results = _played(simulate)
    policy = min(results, key=lambda p: results[p][0])
    return policy if results[policy][0] <= promise else None


@wrong("13.C", "read only: one draw each, no room to spare, the luckiest of all wins")
def luckiest(simulate, promise):
    results = {}
    for policy in _GRID * 2:
        p99, work = simulate(*policy)
        before = results.get(policy, (p99, work))
        results[policy] = (min(p99, before[0]), min(work, before[1]))
    return _least(results, promise * 1.05)


@wrong("13.C", "read only: 168 calls")
def too_many_calls(simulate, promise):
    results = {}
    for policy in _GRID * 3:
        p99, work = simulate(*policy)
        results[policy] = (max(p99, results.get(policy, (0, 0))[0]), work)
    return _least(results, promise * 0.97)


@wrong("13.C", "read only: a policy even where the promise can't be kept")
def never_none(simulate, promise):
    results = _played(simulate)
    found = _least(results, promise * 0.95)
    return found or min(results, key=lambda p: results[p][0])


@wrong("13.C", "read only: never a policy")
def always_none(simulate, promise):
    return None


@wrong("13.C", "read only: batches of one")
def batches_of_one(simulate, promise):
    return (1, 0) if simulate(1, 0)[0] <= promise else None


@wrong("13.C", "read only: no wait, the largest batch")
def no_wait(simulate, promise):
    return (64, 0) if simulate(64, 0)[0] <= promise * 0.97 else None


@wrong("13.C", "read only: half of the promise is waited, whatever the machine needs")
def half_the_promise(simulate, promise):
    return 64, min(100, promise / 2)


@wrong("13.C", "read only: half of the promise for room, so that good policies are left")
def half_for_room(simulate, promise):
    return _least(_played(simulate), promise / 2)


@wrong("13.C", "read only: the promise is taken for the wait")
def promise_as_wait(simulate, promise):
    return _least(_played(simulate, [(b, promise) for b in (1, 4, 16, 64)]), promise)


@wrong("13.C", "read only: wait before batch in the tuple")
def turned(simulate, promise):
    found = _least(_played(simulate), promise * 0.95)
    return found and found[::-1]


@wrong("13.C", "read only: the most work of those that keep the promise")
def most_work(simulate, promise):
    results = _played(simulate)
    fits = [p for p in results if results[p][0] <= promise * 0.95]
    return max(fits, key=lambda p: results[p][1], default=None)


@wrong("13.C", "read only: an empty tuple where nothing fits")
def empty_tuple(simulate, promise):
    return _least(_played(simulate), promise * 0.95) or ()
