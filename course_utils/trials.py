"""What chapter 13 does to a batcher and to a service to see whether they survive: callers who
count their outcomes, models that fail, a storm, clients who hang up.
"""

import asyncio
import concurrent.futures
import http.client
import json
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from course_utils import plots, serving
from course_utils.batching import Batcher, Bill
from course_utils.measure import Interval, over_processes
from course_utils.serving import Answers, Server

__all__ = [
    "Load",
    "ask",
    "bill_of",
    "callers",
    "figure",
    "over",
    "play",
    "shuffled",
    "storm",
]


def play(work: Coroutine) -> object:
    """Run a coroutine to its end, in a thread: a notebook's own thread runs an event loop already.

    >>> play(double([1, 2]))
    [2, 4]
    """
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


async def double(items: list[int]) -> list[int]:
    """A model: twice the input, after 2 ms, whatever the batch."""
    await asyncio.sleep(0.002)
    return [2 * i for i in items]


async def cancelled(items: list[int]) -> list[int]:
    """A model that raises CancelledError, as when a task inside a library is cancelled."""
    raise asyncio.CancelledError


async def stuck(items: list[int]) -> list[int]:
    """A model that never ends."""
    await asyncio.Event().wait()


async def poisoned(items: list[int]) -> list[int]:
    """A model that can't take the input 5."""
    if 5 in items:
        raise ValueError("a request that the model can't take")
    return await double(items)


async def forgetful(items: list[int]) -> list[int]:
    """A model that gives an output too few."""
    return (await double(items))[1:]


async def callers(batcher: object, n: int, patience: float = 0.5) -> dict[str, int]:
    """n callers ask `batcher` for twice their number, at once: what they got within `patience`
    seconds, "own answer", "hangs", "other" or an error's name, and how many of them.

    >>> async def main():
    ...     return await callers(Batcher(double), 10)
    >>> play(main())
    {'own answer': 10}
    """
    tasks = [asyncio.create_task(batcher.ask(i)) for i in range(n)]
    _, late = await asyncio.wait(tasks, timeout=patience)
    for task in late:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    return dict(
        Counter(
            "hangs" if task in late else _outcome(i, result)
            for i, (task, result) in enumerate(zip(tasks, results, strict=True))
        )
    )


def _outcome(i: int, result: object) -> str:
    if isinstance(result, BaseException):
        return type(result).__name__
    return "own answer" if result == 2 * i else "other"


async def storm(
    kinds: Sequence[str], make: Callable[..., Batcher] = Batcher, **settings: object
) -> tuple[Counter, Bill]:
    """One request for each of `kinds`, all at once: a batch with one that is "poisoned" raises, the
    callers who are "gone" leave before they are answered, "slow" ones make their batch take 20 ms
    longer. Counts (kind, outcome), and gives the batcher's bill.

    >>> play(storm(["plain", "poisoned"]))[0][("plain", "own answer")]
    1
    """

    async def run(items: list[int]) -> list[int]:
        await asyncio.sleep(0.02 if any(kinds[i] == "slow" for i in items) else 0)
        if any(kinds[i] == "poisoned" for i in items):
            raise ValueError("a poisoned request")
        return [2 * i for i in items]

    batcher = make(run, max_queue=len(kinds), **settings)
    tasks = [asyncio.create_task(batcher.ask(i)) for i in range(len(kinds))]
    await asyncio.sleep(0)  # every task has asked
    for task, kind in zip(tasks, kinds, strict=True):
        if kind == "gone":
            task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    await batcher.close()
    outcomes = [_outcome(i, result) for i, result in enumerate(results)]
    return Counter(zip(map(str, kinds), outcomes, strict=True)), batcher.bill


def ask(server: Server, setting: str, text: str = "She was right.") -> http.client.HTTPConnection:
    """A request on its way to a service: a connection whose answer can be read (`getresponse`), or
    that can be dropped (`close`). `http.client` asks the address itself; most other clients ask the
    proxy that the environment names, which cannot reach this machine's 127.0.0.1.

    >>> ask(server, "batch=32&wait=5").getresponse().status  # doctest: +SKIP
    200
    """
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    head = {"Authorization": f"Bearer {server.token}"}
    connection.request("POST", f"/embed?{setting}", json.dumps({"text": text}), head)
    return connection


def bill_of(server: Server, setting: str) -> dict:
    """What the answers of a service's setting have cost so far, and [requests, longest, seconds] of
    each batch since the last look, under "log".

    >>> bill_of(server, "batch=32&wait=5")["items"]  # doctest: +SKIP
    1
    """
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    head = {"Authorization": f"Bearer {server.token}"}
    connection.request("GET", f"/bill?{setting}", headers=head)
    return json.load(connection.getresponse())


@dataclass(frozen=True)
class Load:
    """Requests for a service, `bodies`, in pieces of `seconds`.

    >>> Load([b"{}"], 0.5).seconds
    0.5
    """

    bodies: Sequence[bytes]
    seconds: float

    def closed(
        self, server: Server, setting: str, *, seconds: float | None = None, connections: int = 64
    ) -> Answers:
        """Connections that each send their next request when the last is answered."""
        return serving.closed_loop(
            f"{server.url}/embed?{setting}",
            self.bodies,
            seconds or self.seconds,
            connections=connections,
            token=server.token,
        )

    def opened(self, server: Server, setting: str, rate: float, **how: object) -> Answers:
        """`rate` requests a second, whatever the server does; new arrivals at every call, for so
        long that twenty are to be expected.
        """
        how = {
            "seconds": max(self.seconds, 20 / rate),
            "seed": int(np.random.default_rng().integers(2**31)),
        } | how
        url = f"{server.url}/embed?{setting}"
        return serving.open_loop(url, self.bodies, rate, token=server.token, **how)


def over(values: Sequence[float]) -> Interval:
    """`measure.over_processes`; of fewer than five values, as in the profile smoke, the range.

    >>> over([1.0, 3.0])
    2 [1, 3]
    """
    if len(values) >= 5:
        return over_processes(values)
    return Interval(float(np.median(values)), float(min(values)), float(max(values)))


def shuffled(names: Iterable) -> list:
    """The names in a new random order.

    >>> sorted(shuffled("abc"))
    ['a', 'b', 'c']
    """
    names = list(names)
    return [names[i] for i in np.random.default_rng().permutation(len(names))]


def figure(
    seen: Mapping[tuple[str, float, int], Interval], *, xlabel: str, title: str, alt: str
) -> None:
    """Latencies in ms with their intervals over the load, a line a setting and a panel a
    percentile; `seen` is (setting, load, percentile) → interval.

    >>> one = Interval(5.0, 4.0, 6.0)
    >>> figure({("a", 0.3, 50): one, ("a", 0.3, 95): one}, xlabel="load", title="", alt="A point.")
    Figure: A point.
    """
    settings, loads, percentiles = (list(dict.fromkeys(k)) for k in zip(*seen, strict=True))
    drawing, panels = plots.axes(xlabel, "", columns=len(percentiles), height=3.6, title=title)
    for panel, q in zip(np.atleast_1d(panels), percentiles, strict=True):
        for i, setting in enumerate(settings):
            points = [seen[setting, load, q] for load in loads]
            panel.errorbar(
                loads,
                [p.value for p in points],
                yerr=[[p.value - p.low for p in points], [p.high - p.value for p in points]],
                capsize=3,
                label=setting,
                color=plots.COLOURS[i],
                marker=plots.MARKERS[i],
            )
        plots.plain_log(panel.yaxis)
        panel.set_ylabel(f"p{q} of the latency (ms)")
    handles = np.atleast_1d(panels)[0].get_legend_handles_labels()
    drawing.legend(*handles, loc="outside lower center", ncols=len(settings))
    plots.show(drawing, alt)
