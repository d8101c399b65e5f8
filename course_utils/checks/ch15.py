"""Checks of chapter 15, Capstone."""

import bisect
import math

import numpy as np

from course_utils.exercises import Probe, Wrong, exercise


@exercise("15.A")
def binding(answer: Probe, rng: np.random.Generator) -> None:
    """The share of every budget, in both directions, and the largest of them."""
    cases = [
        [("latency", 30.0, 40.0, "at most"), ("file", 90.0, 100.0, "at most")],
        [("latency", 900.0, 1000.0, "at most"), ("accuracy", 60.0, 90.0, "at least")],
        [("latency", 1.0, 40.0, "at most"), ("accuracy", 99.0, 90.0, "at least")],
        [("latency", 3000.0, 2000.0, "at most"), ("file", 20.0, 10.0, "at most")],
        [("latency", 39.0, 40.0, "at most"), ("accuracy", 0.0, 90.0, "at least")],
        [("latency", 80.0, 40.0, "at most"), ("accuracy", math.nan, 90.0, "at least")],
    ]
    for _ in range(12):
        kinds = rng.choice(["at most", "at least"], rng.integers(2, 6))
        cases.append(
            [
                (f"r{i}", float(rng.uniform(1, 99)), float(rng.uniform(1, 99)), str(k))
                for i, k in enumerate(kinds)
            ]
        )
    for requirements in cases:
        got = answer(list(requirements))
        if not (isinstance(got, tuple | list) and len(got) == 2):
            raise Wrong(f"a name and a share were expected; you returned {got!r}.")
        used = {
            name: _used(measured, target, kind) for name, measured, target, kind in requirements
        }
        if got[0] not in used:
            raise Wrong(f"{got[0]!r} is none of the requirements {sorted(used)}.")
        most = max(used.values())
        if used[got[0]] != most:
            raise Wrong(
                f"of {requirements}, the shares of the budgets are"
                f" { {n: round(u, 2) for n, u in used.items()} }; you say that it hangs on"
                f" {got[0]}."
            )
        if not math.isclose(float(got[1]), most, rel_tol=1e-9):
            raise Wrong(
                f"of {requirements}, {got[0]} uses {most:.3g} of its budget; you say"
                f" {float(got[1]):.3g}."
            )


def _used(measured: float, target: float, kind: str) -> float:
    """How far to the limit, from the definition: 1 exactly on it, whichever way it points."""
    if math.isnan(measured):
        return math.inf
    if kind == "at most":
        return measured * (1 / target)
    return math.inf if measured <= 0 else 1 / (measured / target)


@exercise("15.B")
def front(answer: Probe, rng: np.random.Generator) -> None:
    """Nobody on the front is dominated, everybody off it is, and the order is by time."""
    cases: list[list[tuple[str, float, float]]] = [
        [("a", 2, 0.9), ("b", 1, 0.8), ("c", 2, 0.8)],
        [("a", 1, 0.8), ("b", 1, 0.9)],
        [("a", 2, 0.9), ("b", 1, 0.9)],
        [("a", 1, 0.9), ("b", 1, 0.9)],
        [("only", 3, 0.5)],
        [],
    ]
    for _ in range(20):
        n = int(rng.integers(2, 9))
        cases.append(
            [(f"m{i}", int(rng.integers(1, 5)), int(rng.integers(1, 5)) / 10) for i in range(n)]
        )
    for points in cases:
        got = answer(list(points))
        if not isinstance(got, list | tuple) or any(g not in [p[0] for p in points] for g in got):
            raise Wrong(f"a list of names was expected for {points}; you returned {got!r}.")
        for name, ms, right in points:
            better = [n for n, m, r in points if m <= ms and r >= right and (m, r) != (ms, right)]
            if better and name in got:
                raise Wrong(
                    f"of {points}, {name!r} is dominated by {better[0]!r} and does not belong to"
                    " the front."
                )
            if not better and name not in got:
                raise Wrong(
                    f"of {points}, nothing dominates {name!r}, and it is missing from {list(got)}."
                )
        times = {n: (m, i) for i, (n, m, _) in enumerate(points)}
        if len(set(got)) != len(got) or [times[n] for n in got] != sorted(times[n] for n in got):
            raise Wrong(
                f"of {points}, the names are right; the order {list(got)} is not: fastest first,"
                " each once."
            )


@exercise("15.C")
def choose(answer: Probe, rng: np.random.Generator) -> None:
    """Each choice met its brief on arrivals drawn just now, and no smaller file could have."""
    for case in (_single, _queue, _wait, _needs_batches, _nothing, _accuracy, _crowd):
        candidates, brief, wanted = case(rng)
        order = rng.permutation(len(candidates))
        candidates = [candidates[i] for i in order]
        got = answer([dict(c) for c in candidates], dict(brief))
        table = "; ".join(
            f"{c['name']}: {c['fixed_ms']:.3g} + {c['image_ms']:.3g} n ms, {c['kb']:g} kB, right"
            f" {c['right']}"
            for c in candidates
        )
        asked = f"for {table}, under {brief}"
        if got is None:
            if wanted is not None:
                raise Wrong(f"you say that nothing fits, {asked}; {wanted} does.")
            continue
        if not (
            isinstance(got, tuple | list)
            and len(got) == 3
            and got[0] in {c["name"] for c in candidates}
        ):
            raise Wrong(
                f"(name, max_batch, max_wait_ms) or None was expected; you returned {got!r}."
            )
        chosen = next(c for c in candidates if c["name"] == got[0])
        for key, bad in (
            ("kb", chosen["kb"] > brief["kb"]),
            ("right", chosen["right"] < brief["right"]),
        ):
            if bad:
                raise Wrong(
                    f"{got[0]} has {key} {chosen[key]}, and the brief asks for {brief[key]};"
                    f" {asked}."
                )
        if int(got[1]) < 1 or float(got[2]) < 0:
            raise Wrong(
                f"max_batch {got[1]} and max_wait_ms {got[2]}: at least 1 and at least 0 are"
                " needed."
            )
        p99 = _simulate(chosen, brief, int(got[1]), float(got[2]), rng)
        if p99 > brief["p99_ms"]:
            raise Wrong(
                f"{got[0]} with max_batch {got[1]} and max_wait_ms {got[2]:g} has a p99 of"
                f" {p99:.3g} ms in the simulation, and {brief['p99_ms']:.3g} are allowed; {asked}."
            )
        if wanted != got[0]:
            better = (
                "nothing fits" if wanted is None else f"{wanted} fits, too, and its file is smaller"
            )
            raise Wrong(f"{got[0]} was chosen, and {better}; {asked}.")


def _simulate(
    candidate: dict, brief: dict, max_batch: int, max_wait_ms: float, rng: np.random.Generator
) -> float:
    """p99 in ms of one service under 6,000 Poisson arrivals; a batch starts when it is full or its
    oldest has waited enough.
    """
    arrivals = np.cumsum(rng.exponential(1e3 / brief["rate"], 6000))
    due, count = arrivals.tolist(), len(arrivals)
    fixed, each = candidate["fixed_ms"], candidate["image_ms"] * brief["images"]
    free, i, ends, sizes = 0.0, 0, [], []
    while i < count:
        full = due[i + max_batch - 1] if i + max_batch <= count else math.inf
        begin = max(free, min(full, due[i] + max_wait_ms))
        n = bisect.bisect_right(due, begin, i, min(i + max_batch, count)) - i
        free = begin + fixed + each * n
        ends.append(free)
        sizes.append(n)
        i += n
    return float(np.percentile(np.repeat(ends, sizes) - arrivals, 99))


def _candidate(name: str, fixed: float, image: float, kb: float, right: float = 0.92) -> dict:
    return {"name": name, "fixed_ms": fixed, "image_ms": image, "kb": kb, "right": right}


def _brief(rng: np.random.Generator, **changes: float) -> dict:
    return {
        "rate": 100.0,
        "images": int(rng.integers(3, 6)),
        "p99_ms": 80.0,
        "kb": 200.0,
        "right": 0.9,
    } | changes


def _single(rng: np.random.Generator) -> tuple[list[dict], dict, str | None]:
    return [_candidate("quick", 0.5, 0.4, 150)], _brief(rng), "quick"


def _queue(rng: np.random.Generator) -> tuple[list[dict], dict, str | None]:
    """The small file takes 30 ms an order alone, well within 80, and gets 100 a second: no batch
    helps it.
    """
    brief = _brief(rng)
    return (
        [_candidate("slow", 1, 29 / brief["images"], 60), _candidate("quick", 0.5, 0.3, 150)],
        brief,
        "quick",
    )


def _wait(rng: np.random.Generator) -> tuple[list[dict], dict, str | None]:
    """So few orders that a full batch never comes."""
    return (
        [_candidate("quick", 2, 0.5, 90), _candidate("large", 1, 0.4, 190)],
        _brief(rng, rate=20.0),
        "quick",
    )


def _needs_batches(rng: np.random.Generator) -> tuple[list[dict], dict, str | None]:
    """20 ms a call whatever is in it: 50 orders a second one by one, thousands together."""
    brief = _brief(rng)
    return (
        [_candidate("fixed", 20, 0.4 / brief["images"], 80), _candidate("large", 0.5, 0.3, 190)],
        brief,
        "fixed",
    )


def _nothing(rng: np.random.Generator) -> tuple[list[dict], dict, str | None]:
    brief = _brief(rng)
    return (
        [_candidate("slow", 1, 25 / brief["images"], 60), _candidate("large", 0.5, 0.3, 400)],
        brief,
        None,
    )


def _accuracy(rng: np.random.Generator) -> tuple[list[dict], dict, str | None]:
    out = [_candidate("cut", 0.3, 0.1, 40, 0.6), _candidate("edge", 0.5, 0.3, 120, 0.9)]
    return [*out, _candidate("full", 0.6, 0.5, 200)], _brief(rng), "edge"


def _crowd(rng: np.random.Generator) -> tuple[list[dict], dict, str | None]:
    """Several fit: the smallest counts, not the fastest or the most accurate."""
    sizes = np.sort(rng.choice(np.arange(50, 190), 4, replace=False))
    out = [
        _candidate(f"m{i}", 0.5, 0.5 - 0.1 * i, float(kb), 0.91 + 0.01 * i)
        for i, kb in enumerate(sizes)
    ]
    return out, _brief(rng), "m0"
