"""Checks of chapter 09, Distributed training."""

import itertools
import numbers
import sys
import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np
import torch

from course_utils.checks.accept import apart, close, number, said, sequence, whole
from course_utils.exercises import Probe, Wrong, exercise


@exercise("09.A")
def bytes_per_rank(answer: Probe, rng: np.random.Generator) -> None:
    """Small models are counted on tensors that were really padded and cut; large ones by whole
    numbers, where a float's 53 bits do not reach.
    """
    cases = [(count, n, stage) for count, n in ((10, 4), (8, 4), (3, 8)) for stage in range(4)]
    cases += [(7, 1, 0), (7, 1, 3), (1, 2, 3), (1001, 1000, 3), (1001, 500, 2)]
    cases += [
        (int(rng.integers(1, 5000)), int(rng.integers(1, 40)), int(rng.integers(0, 4)))
        for _ in range(8)
    ]
    cases += [(count, n, stage) for count, n in _LARGE for stage in range(4)]
    for count, n, stage in cases:
        where = f"for {count} parameters on {n} workers, stage {stage}"
        given = answer(count, n, stage)
        if number(given, where) != int(number(given, where)):
            raise Wrong(f"{where} you say {said(given)}. Nobody can hold a part of a byte.")
        got, want = _exact(given, where), _held(count, n, stage)
        if got != want:
            raise Wrong(f"{where}, each worker holds {want} bytes; you say {got}.")


_LARGE = [(7_000_000_001, 8), (1_000_000_000_001, 1024), (2**57 + 1, 3)]


def _exact(value: object, where: str) -> int:
    """As `whole`; a whole number in a type of its own keeps all of its digits."""
    if isinstance(value, torch.Tensor | np.ndarray | np.number):
        value = value.item()
    return int(value) if isinstance(value, numbers.Rational) else whole(value, where)


def _held(count: int, n: int, stage: int) -> int:
    """Bytes of worker 0's tensors, each cut by torch after padding to a multiple of n."""
    kinds = (2, stage >= 3), (4, stage >= 2), (12, stage >= 1)  # weight, gradient, state
    if count > 5000:
        return sum(each * (-(-count // n) if cut else count) for each, cut in kinds)
    total = 0
    for each, cut in kinds:
        held = torch.zeros(count, each, dtype=torch.uint8)
        if cut:
            held = torch.nn.functional.pad(held, (0, 0, 0, -count % n)).view(n, -1, each)[0]
        total += held.numel()
    return total


class _Ring:
    """p threads that can only hand tensors to their right neighbours. When all that still run wait
    for one another, that is noticed at once, and without a clock.
    """

    def __init__(self, p: int, spoil: bool = False) -> None:
        self.spoil = spoil  # one number of worker 0's first message changes on its way
        self.boxes: list[deque[torch.Tensor]] = [deque() for _ in range(p)]
        self.sent: list[list[int]] = [[] for _ in range(p)]
        self.results: list[object] = [None] * p
        self.errors: list[Exception] = []
        self.news, self.waiting, self.ended = threading.Condition(), set(), 0
        self.over = False

    def run(self, answer: object, vectors: list[torch.Tensor], seconds: float = 15.0) -> None:
        """`seconds` is for an answer that computes for ever; a right one needs thousandths."""
        threads = [
            threading.Thread(target=self._worker, args=(answer, vectors, r), daemon=True)
            for r in range(len(vectors))
        ]
        for thread in threads:
            thread.start()
        end = time.monotonic() + seconds
        for thread in threads:
            thread.join(max(end - time.monotonic(), 0))
        if any(thread.is_alive() for thread in threads):
            self.over = True  # whoever still runs is stopped at his next line
            with self.news:
                self.news.notify_all()
            raise Wrong(f"with p = {len(vectors)}: a worker still runs. Does a loop ever end?")

    def _stuck(self) -> bool:
        empty = not any(self.boxes[rank] for rank in self.waiting)
        return empty and len(self.waiting) + self.ended == len(self.boxes)

    def _worker(self, answer: object, vectors: list[torch.Tensor], rank: int) -> None:
        p = len(vectors)

        def send(tensor: torch.Tensor) -> None:
            if not isinstance(tensor, torch.Tensor):
                raise Wrong(f"send takes a tensor, not a {type(tensor).__name__}.")
            with self.news:
                self.sent[rank].append(tensor.numel())
                arrives = tensor.detach().clone()
                if self.spoil and rank == 0 and arrives.numel():
                    arrives.view(-1)[0] += 1
                    self.spoil = False
                self.boxes[(rank + 1) % p].append(arrives)
                self.news.notify_all()

        def receive() -> torch.Tensor:
            with self.news:
                self.waiting.add(rank)
                self.news.notify_all()
                self.news.wait_for(lambda: self.boxes[rank] or self._stuck() or self.over)
                if not self.boxes[rank]:
                    raise Wrong(f"worker {rank} waits for a message that nobody sends.")
                self.waiting.discard(rank)
                return self.boxes[rank].popleft()

        def stop(*_: object) -> object:
            if self.over:
                raise SystemExit
            return stop

        sys.settrace(stop)
        try:
            self.results[rank] = answer(vectors[rank], rank, p, send, receive)
        except Exception as error:
            self.errors.append(error)
        except SystemExit:
            pass
        finally:
            sys.settrace(None)
            with self.news:
                self.waiting.discard(rank)
                self.ended += 1
                self.news.notify_all()


@exercise("09.B")
def ring(answer: Probe, rng: np.random.Generator) -> None:
    """The sum on every worker, for every length, with 2(p-1) messages of a p-th each."""
    cases = [(1, 3), (2, 4), (3, 6), (4, 1), (3, 0), (3, 7), (5, 13), (6, 2), (1, 0), (7, 20)]
    cases += [(int(rng.integers(2, 10)), int(rng.integers(1, 60))) for _ in range(3)]
    cases += [(8, 24), (8, 9), (9, 30)]
    types = itertools.cycle([torch.float32, torch.float64, torch.int64])
    for (p, length), dtype in zip(cases, types, strict=False):
        vectors = [torch.from_numpy(rng.integers(-9999, 9999, length)) for _ in range(p)]
        # Sums of eighths are exact in either type; those of this size fit float64 and int64 alone.
        share, offset = {torch.float64: (8, 2**40), torch.float32: (8, 0)}.get(dtype, (1, 2**40))
        vectors = [v.to(dtype) if share == 1 else v.to(dtype) / share for v in vectors]
        vectors = [v + offset for v in vectors]
        where, workers = f"with p = {p} and vectors of length {length}", _Ring(p)
        workers.run(Probe(_apart_from_x(answer)), vectors)
        if workers.errors:
            raise Wrong(f"{where}: {workers.errors[0]}")
        for rank, (got, sent) in enumerate(zip(workers.results, workers.sent, strict=True)):
            _judge_sum(got, torch.stack(vectors).sum(0), f"{where}, worker {rank}")
            if len(sent) != 2 * (p - 1):
                raise Wrong(f"{where}, worker {rank} sent {len(sent)} messages, not {2 * (p - 1)}.")
            if sent and max(sent) > -(-length // p):
                raise Wrong(
                    f"{where}, worker {rank} sent {max(sent)} numbers in a message; a p-th of the"
                    f" vector is {-(-length // p)}."
                )
    _judge_need(answer, rng)


def _judge_need(answer: Probe, rng: np.random.Generator) -> None:
    """A message changed on its way must change a result: else the numbers came otherwise."""
    vectors = [torch.from_numpy(rng.integers(-99, 99, 12)) for _ in range(3)]
    workers = _Ring(3, spoil=True)
    workers.run(Probe(_apart_from_x(answer)), vectors)
    total = torch.stack(vectors).sum(0)
    if not workers.errors and all(torch.equal(got, total) for got in workers.results):
        raise Wrong(
            "with p = 3 the results stay what they are when a message is changed on its way: so the"
            " workers know each other's numbers by another way."
        )


def _apart_from_x(answer: Probe) -> Callable:
    """The answer, and a look whether what it returns lies in the caller's memory."""
    if not callable(answer.answer):
        raise Wrong(f"a function was expected; this is {said(answer.answer)}.")

    def call(x: torch.Tensor, *rest: object) -> object:
        got = answer.answer(x, *rest)
        if got is x or (
            isinstance(got, torch.Tensor) and got.numel() and got.data_ptr() == x.data_ptr()
        ):
            raise Wrong("your code returned x itself; a new tensor was expected.")
        return got

    return call


def _judge_sum(got: object, total: torch.Tensor, where: str) -> None:
    if not isinstance(got, torch.Tensor) or got.shape != total.shape:
        raise Wrong(
            f"{where} returned {said(got)}; a tensor of shape {tuple(total.shape)} was expected."
        )
    if got.dtype != total.dtype:
        raise Wrong(f"{where} returned {got.dtype} for vectors of {total.dtype}.")
    if not torch.equal(got, total):
        at = int((got != total).nonzero()[0])
        yours, due = apart(float(got[at]), float(total[at]))
        raise Wrong(f"{where} has {yours} at place {at}, where the sum is {due}.")


_RULES = [  # the plan, and a time: each rule, if forgotten, lets a faster plan in
    ((1, 8, 4, 4), lambda data, tensor, pipe: 1.0),
    ((4, 4, 4, 4), lambda data, tensor, pipe: data + 2 * tensor + 3 * pipe),
    ((8, 8, 8, 8), lambda data, tensor, pipe: data * tensor * pipe),  # all GPUs must be used
    ((8, 4, 8, 8), lambda data, tensor, pipe: 20 - tensor),  # 8 in tensor leave the machine
    ((8, 6, 8, 8), lambda data, tensor, pipe: 20 - tensor),  # 4 do not divide 6
    ((2, 8, 1, 1), lambda data, tensor, pipe: 20 - tensor),  # a machine has more than we use
    ((8, 8, 4, 8), lambda data, tensor, pipe: 20 - pipe),  # 8 stages of 4 layers
    ((6, 6, 9, 6), lambda data, tensor, pipe: 20 - pipe),  # 6 and 2 do not divide 9
    ((2, 2, 8, 2), lambda data, tensor, pipe: 20 - pipe),
    ((8, 8, 8, 4), lambda data, tensor, pipe: 20 - data),  # 8 parts of 4 rows
    ((6, 6, 6, 9), lambda data, tensor, pipe: 20 - data),  # 6 and 2 do not divide 9
    ((4, 2, 4, 1), lambda data, tensor, pipe: 20 - data),
    ((7, 3, 2, 2), lambda data, tensor, pipe: 1.0),  # nothing is allowed
    ((16, 16, 1, 1), lambda data, tensor, pipe: 1.0),  # more than 8, each way
    ((16, 1, 16, 1), lambda data, tensor, pipe: 1.0),
    ((16, 1, 1, 16), lambda data, tensor, pipe: 1.0),
    ((9, 3, 6, 3), lambda data, tensor, pipe: 20 - data),  # 9 > 3, though 3 divides 9
]


@exercise("09.C")
def layout(answer: Probe, rng: np.random.Generator) -> None:
    """Every GPU used, nothing over the budget, and no allowed plan is faster."""
    for case, time_of in _RULES:
        _judge(answer, case, 100, lambda data, tensor, pipe: 100, time_of)
    _judge(answer, (2, 2, 2, 2), 99, lambda data, tensor, pipe: 100, lambda *plan: 1.0)
    for case in [(12, 6, 30, 12), (6, 3, 9, 6), (16, 4, 12, 8), *(_case(rng) for _ in range(12))]:
        a, b, c = rng.uniform(1, 9, 3)
        weights, rows = int(rng.integers(40, 900)), int(rng.integers(10, 300))

        def need(
            data: int, tensor: int, pipe: int, weights: int = weights, rows: int = rows
        ) -> int:
            return -(-weights // int(tensor * pipe)) + -(-rows // int(data * tensor))

        def seconds(
            data: int, tensor: int, pipe: int, a: float = a, b: float = b, c: float = c
        ) -> float:
            every = 100 / (data * tensor * pipe)
            return every + a * (1 - 1 / data) + b * (tensor - 1) + c * (1 - 1 / pipe)

        fitting = sorted({need(*plan) for plan in _plans(*case)}) or [10]
        for budget in {fitting[0] - 1, fitting[0], fitting[len(fitting) // 2], fitting[-1]}:
            _judge(answer, case, budget, need, seconds)


def _case(rng: np.random.Generator) -> tuple[int, int, int, int]:
    return (
        int(rng.choice([2, 4, 6, 8, 12, 24])),
        int(rng.choice([2, 3, 4, 6, 8])),
        int(rng.integers(2, 33)),
        int(rng.choice([1, 6, 8, 24])),
    )


def _plans(gpus: int, per_node: int, layers: int, batch: int) -> list[tuple[int, int, int]]:
    every = itertools.product(range(1, gpus + 1), repeat=3)
    return [
        (d, t, p)
        for d, t, p in every
        if d * t * p == gpus and not (per_node % t or layers % p or batch % d)
    ]


def _judge(answer: Probe, case: tuple, budget: int, need: Callable, seconds: Callable) -> None:
    got = answer(*case, budget, need, seconds)
    gpus, per_node, layers, batch = case
    where = (
        f"for gpus = {gpus}, per_node = {per_node}, layers = {layers}, batch = {batch}, budget ="
        f" {budget}"
    )
    allowed = [plan for plan in _plans(*case) if need(*plan) <= budget]
    if not allowed:
        if got is not None:
            raise Wrong(f"{where} nothing is allowed, so None is due; you returned {said(got)}.")
        return
    best = min(allowed, key=lambda plan: seconds(*plan))
    if got is None:
        raise Wrong(
            f"{where} the plan {best} is allowed and needs {need(*best)} bytes; you returned None."
        )
    plan = sequence(got, f"{where}, a plan", 3)
    if any(isinstance(v, float | np.floating) for v in plan):
        raise Wrong(f"{where} you returned {said(got)}; a mesh is made of whole numbers (int).")
    data, tensor, pipe = (whole(v, where) for v in plan)
    mine = f"{where} your plan {(data, tensor, pipe)}"
    if min(data, tensor, pipe) < 1 or data * tensor * pipe != gpus:
        raise Wrong(f"{mine} has {data * tensor * pipe} GPUs in place of {gpus}.")
    rules = ("tensor", tensor, "per_node"), ("pipe", pipe, "layers"), ("data", data, "batch")
    for (name, part, total), size in zip(rules, (per_node, layers, batch), strict=True):
        if size % part:
            raise Wrong(f"{mine} breaks a rule: {name} = {part} must divide {total} = {size}.")
    if need(data, tensor, pipe) > budget:
        raise Wrong(f"{mine} needs {need(data, tensor, pipe)} bytes.")
    took, least = seconds(data, tensor, pipe), seconds(*best)
    if took > least and not close(took, least, rel=1e-9):
        yours, due = apart(took, least)
        raise Wrong(f"{mine} takes {yours} s; {best} takes {due} s and needs {need(*best)} bytes.")
