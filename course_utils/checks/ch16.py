"""Checks of chapter 16, Capstone."""

import math

import numpy as np

from course_utils import fleet
from course_utils.checks.accept import apart, close, number, said, sequence, whole
from course_utils.exercises import Probe, Wrong, exercise


@exercise("16.A")
def binding(answer: Probe, rng: np.random.Generator) -> None:
    """The share of every budget, in both directions, and the largest of them."""
    cases = [
        [("file", 50.0, 100.0, "at most")],
        [("accuracy", 45.0, 90.0, "at least")],
        [("accuracy", 90.0, 90.0, "at least"), ("file", 99.0, 100.0, "at most")],
        [("accuracy", 0.5, 0.9, "at least"), ("file", 1.7, 1.0, "at most")],
        [("latency", 30.0, 40.0, "at most"), ("file", 90.0, 100.0, "at most")],
        [("latency", 900.0, 1000.0, "at most"), ("accuracy", 60.0, 90.0, "at least")],
        [("latency", 1.0, 40.0, "at most"), ("accuracy", 99.0, 90.0, "at least")],
        [("latency", 3000.0, 2000.0, "at most"), ("file", 20.0, 10.0, "at most")],
        [("latency", 39.0, 40.0, "at most"), ("accuracy", 0.0, 90.0, "at least")],
        [("latency", 0.0, 40.0, "at most"), ("file", 0.0, 1.0, "at most")],
        [("accuracy", math.nan, 90.0, "at least"), ("latency", 80.0, 40.0, "at most")],
        [("latency", math.nan, 40.0, "at most"), ("accuracy", 45.0, 90.0, "at least")],
    ]
    for _ in range(12):
        kinds = rng.choice(["at most", "at least"], rng.integers(2, 6))
        names = rng.permutation([f"r{i}" for i in range(len(kinds))])
        drawn = rng.uniform(0.1, 99, (len(kinds), 2)).tolist()
        rows = zip(names, drawn, kinds, strict=True)
        cases.append([(str(name), *two, str(kind)) for name, two, kind in rows])
    for requirements in cases:
        where = f"of {requirements}"
        got = sequence(answer(list(requirements)), f"{where}, a name and a share", 2)
        used = {
            name: _used(measured, target, kind) for name, measured, target, kind in requirements
        }
        if not isinstance(got[0], str) or got[0] not in used:
            raise Wrong(f"{where}: {said(got[0])} is none of the requirements {sorted(used)}.")
        most = max(used.values())
        if used[got[0]] != most:
            shares = {n: float(f"{u:.4g}") for n, u in used.items()}
            raise Wrong(
                f"{where}, the shares of the budgets are {shares}; you say that it hangs on"
                f" {got[0]}."
            )
        share = number(got[1], where)
        if not close(share, most, rel=1e-6):
            yours, due = apart(share, most)
            raise Wrong(f"{where}, {got[0]} uses {due} of its budget; you say {yours}.")


def _used(measured: float, target: float, kind: str) -> float:
    """How far to the limit, from the definition: 1 exactly on it, whichever way it points."""
    if math.isnan(measured):
        return math.inf
    if kind == "at most":
        return measured / target
    return math.inf if measured <= 0 else target / measured


@exercise("16.B")
def front(answer: Probe, rng: np.random.Generator) -> None:
    """Nobody on the front is dominated, everybody off it is, and the order is by time."""
    cases: list[list[tuple[str, float, float]]] = [
        [("a", 2, 0.9), ("b", 1, 0.8), ("c", 2, 0.8)],
        [("a", 1, 0.8), ("b", 1, 0.9)],
        [("a", 2, 0.9), ("b", 1, 0.9)],
        [("b", 1, 0.9), ("a", 1, 0.9)],  # equal in both: in the order of the list
        [("z", 2, 0.9), ("y", 1, 0.8), ("x", 2, 0.9)],
        [
            ("low", 1, 0.5),
            ("middle", 2, 0.55),
            ("high", 3, 0.9),
        ],  # below the line, and on the front
        [("slow", 9, 0.9), ("bad", 1, 0.1)],
        [("a", 1.0, 0.900), ("b", 1.005, 0.905)],  # a little is a difference
        [("only", 3, 0.5)],
        [("nothing right", 1, 0.0), ("something", 2, 0.1)],
        [],
    ]
    for _ in range(20):
        names = rng.permutation([f"m{i}" for i in range(int(rng.integers(2, 9)))])
        numbers = rng.integers(1, 5, (len(names), 2)).tolist()
        cases.append([(str(n), ms, r / 10) for n, (ms, r) in zip(names, numbers, strict=True)])
    for points in cases:
        _judge_front(answer, points)


def _judge_front(answer: Probe, points: list[tuple[str, float, float]]) -> None:
    got = sequence(answer(list(points)), f"for {points}, the names")
    names = [p[0] for p in points]
    if any(not isinstance(g, str) or g not in names for g in got):
        raise Wrong(f"a list of names was expected for {points}; you returned {said(got)}.")
    for name, ms, right in points:
        better = [n for n, m, r in points if m <= ms and r >= right and (m, r) != (ms, right)]
        if better and name in got:
            raise Wrong(
                f"of {points}, {name!r} is dominated by {better[0]!r} and does not belong to"
                " the front."
            )
        if not better and name not in got:
            raise Wrong(f"of {points}, nothing dominates {name!r}, and it is missing from {got}.")
    times = {n: (m, i) for i, (n, m, _) in enumerate(points)}
    if len(set(got)) != len(got) or [times[n] for n in got] != sorted(times[n] for n in got):
        raise Wrong(
            f"of {points}, the names are right; the order {got} is not: fastest first, equally fast"
            " ones as in the list, each once."
        )


@exercise("16.C")
def choose(answer: Probe, rng: np.random.Generator) -> None:
    """Each choice met its brief on arrivals drawn just now, and no smaller file could have."""
    for case in _CASES:
        candidates, brief, wanted = case(rng)
        candidates = [candidates[i] for i in rng.permutation(len(candidates))]
        _judge_choice(answer, candidates, brief, wanted, rng)


def _judge_choice(
    answer: Probe, candidates: list[dict], brief: dict, wanted: str | None, rng: np.random.Generator
) -> None:
    table = "; ".join(
        f"{c['name']}: {c['fixed_ms']:.3g} + {c['image_ms']:.3g} n ms, {c['kb']:g} kB, right"
        f" {c['right']}"
        for c in candidates
    )
    asked = f"for {table}, under {brief}"
    got = answer([dict(c) for c in candidates], dict(brief))
    if got is None:
        if wanted is not None:
            raise Wrong(f"you say that nothing fits, {asked}; {wanted} does.")
        return
    name, batch, wait = sequence(got, "(name, max_batch, max_wait_ms) or None", 3)
    batch, wait = whole(batch, "max_batch"), number(wait, "max_wait_ms")
    chosen = next((c for c in candidates if c["name"] == name), None)
    if chosen is None:
        raise Wrong(f"{said(name)} is no candidate, {asked}.")
    for key, bad in (
        ("kb", chosen["kb"] > brief["kb"]),
        ("right", chosen["right"] < brief["right"]),
    ):
        if bad:
            raise Wrong(
                f"{name} has {key} {chosen[key]}, and the brief asks for {brief[key]}; {asked}."
            )
    if not (batch >= 1 and 0 <= wait < math.inf):
        raise Wrong(f"max_batch {batch} and max_wait_ms {wait}: at least 1 and at least 0 is due.")
    p99 = fleet.p99_ms(chosen, brief, batch, wait, seed=rng)
    if not p99 <= brief["p99_ms"]:
        raise Wrong(
            f"{name} with max_batch {batch} and max_wait_ms {wait:g} has a p99 of {p99:.3g} ms in"
            f" the simulation, and {brief['p99_ms']:.3g} are allowed; {asked}."
        )
    if wanted != name:
        better = (
            "nothing fits" if wanted is None else f"{wanted} fits, too, and its file is smaller"
        )
        raise Wrong(f"{name} was chosen, and {better}; {asked}.")


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
    """60% of the time at work, and no batch makes it less: some 35 ms in one of a hundred."""
    brief = _brief(rng)
    return [_candidate("quick", 0.0, 6 / brief["images"], 150)], brief, "quick"


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


def _edge(rng: np.random.Generator) -> tuple[list[dict], dict, str | None]:
    """Exactly as large as allowed, and exactly as accurate as asked."""
    brief = _brief(rng, kb=float(rng.integers(100, 200)))
    out = [_candidate("exact", 0.5, 0.3, brief["kb"], 0.9)]
    return [*out, _candidate("over", 0.5, 0.3, brief["kb"] + 1)], brief, "exact"


def _alone(rng: np.random.Generator) -> tuple[list[dict], dict, str | None]:
    """No queue ever, and one call takes longer than the limit."""
    brief = _brief(rng, rate=3.0)
    return [_candidate("slow", 100, 1, 50), _candidate("quick", 5, 1, 150)], brief, "quick"


def _busy(rng: np.random.Generator) -> tuple[list[dict], dict, str | None]:
    """Computes 90% of the time: 49 ms in the mean, 100 to 500 ms in one of a hundred. Orders that
    came evenly spaced would wait for nothing.
    """
    brief = _brief(rng)
    out = [_candidate("busy", 0, 9 / brief["images"], 50), _candidate("quick", 0.5, 0.3, 150)]
    return out, brief, "quick"


def _tight(rng: np.random.Generator) -> tuple[list[dict], dict, str | None]:
    """45 ms alone of 66, ten seconds apart: who waits for company for 0.4 of the limit is late."""
    return [_candidate("quick", 40, 1, 90)], _brief(rng, rate=0.1, p99_ms=66.0), "quick"


_CASES = (
    *(_single, _edge, _alone, _tight, _wait, _queue, _busy),
    *(_needs_batches, _nothing, _accuracy, _crowd),
)
