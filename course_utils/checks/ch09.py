"""Checks of chapter 09, Distributed training."""

import itertools
import sys
import threading
import time
from collections import deque

import numpy as np
import torch

from course_utils.exercises import Probe, Wrong, exercise


@exercise("09.A")
def bytes_per_rank(answer: Probe, rng: np.random.Generator) -> None:
    """Counted on tensors that were really padded and cut."""
    cases = [(10, 4, stage) for stage in range(4)] + [(8, 1, 3), (3, 8, 3), (8, 4, 2)]
    cases += [
        (int(rng.integers(1, 5000)), int(rng.integers(1, 40)), int(rng.integers(0, 4)))
        for _ in range(12)
    ]
    for numbers, n, stage in cases:
        got, want = answer(numbers, n, stage), _held(numbers, n, stage)
        if not isinstance(got, int | float | np.number) or isinstance(got, bool):
            raise Wrong(f"a number of bytes was expected; you returned {got!r}.")
        if got != want:
            raise Wrong(
                f"{numbers} parameters on {n} workers, stage {stage}: each worker holds {want}"
                f" bytes; you say {got:g}."
            )


def _held(numbers: int, n: int, stage: int) -> int:
    """Bytes of worker 0's tensors, each cut by torch after padding to a multiple of n."""
    total = 0
    for sharded in (
        stage >= 3,
        stage >= 2,
        stage >= 1,
        stage >= 1,
    ):  # weights, gradients, Adam's two numbers
        whole = torch.zeros(numbers)
        if sharded:
            whole = torch.nn.functional.pad(whole, (0, -numbers % n)).view(n, -1)[0].clone()
        total += whole.nbytes
    return total


class _Ring:
    """p threads that can only hand tensors to their right neighbours. When all that still run wait
    for one another, that is noticed at once, and without a clock.
    """

    def __init__(self, p: int) -> None:
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
                self.boxes[(rank + 1) % p].append(tensor.clone())
                self.news.notify_all()

        def receive() -> torch.Tensor:
            with self.news:
                self.waiting.add(rank)
                self.news.notify_all()
                self.news.wait_for(lambda: self.boxes[rank] or self._stuck() or self.over)
                if not self.boxes[rank]:
                    raise Wrong(
                        f"with p = {p}: worker {rank} waits for a message that nobody sends."
                    )
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
    cases = [(1, 3), (2, 4), (3, 6), (4, 1), (3, 0), (3, 7), (5, 13)]
    cases += [(int(rng.integers(2, 7)), int(rng.integers(1, 60))) for _ in range(4)]
    for p, length in cases:
        vectors = [torch.from_numpy(rng.integers(-99, 99, length)).double() for _ in range(p)]
        total = torch.stack(vectors).sum(0)
        where, workers = f"p = {p}, vectors of length {length}", _Ring(p)
        workers.run(answer, vectors)
        if workers.errors:
            raise Wrong(f"{where}: {workers.errors[0]}")
        for rank, (got, sent) in enumerate(zip(workers.results, workers.sent, strict=True)):
            if not isinstance(got, torch.Tensor) or got.shape != total.shape:
                raise Wrong(
                    f"{where}: worker {rank} returned {got!r}; a tensor of shape"
                    f" {tuple(total.shape)} was expected."
                )
            if not torch.equal(got, total):
                raise Wrong(
                    f"{where}: worker {rank} has {got.tolist()[:8]}; the sum begins"
                    f" {total.tolist()[:8]}."
                )
            if len(sent) != 2 * (p - 1):
                raise Wrong(f"{where}: worker {rank} sent {len(sent)} messages, not {2 * (p - 1)}.")
            if sent and max(sent) > -(-length // p):
                raise Wrong(
                    f"{where}: a message of {max(sent)} numbers; a p-th of the vector is"
                    f" {-(-length // p)}."
                )


@exercise("09.C")
def layout(answer: Probe, rng: np.random.Generator) -> None:
    """Every GPU used, nothing over the budget, and no allowed plan is faster."""
    cases = [
        (1, 8, 4, 4),
        (8, 8, 8, 8),
        (12, 6, 30, 12),
        (6, 3, 9, 6),
        (4, 2, 4, 1),
        (16, 4, 12, 8),
    ]
    cases += [
        (
            int(rng.choice([2, 4, 6, 8, 12, 24])),
            int(rng.choice([2, 3, 4, 6, 8])),
            int(rng.integers(2, 33)),
            int(rng.choice([1, 6, 8, 24])),
        )
        for _ in range(10)
    ]
    for case in cases:
        a, b, c = rng.uniform(1, 9, 3)
        weights, rows = int(rng.integers(40, 900)), int(rng.integers(10, 300))

        def need(
            data: int, tensor: int, pipe: int, weights: int = weights, rows: int = rows
        ) -> int:
            return -(-weights // (tensor * pipe)) + -(-rows // (data * tensor))

        def seconds(
            data: int, tensor: int, pipe: int, a: float = a, b: float = b, c: float = c
        ) -> float:
            return (
                100 / (data * tensor * pipe)
                + a * (1 - 1 / data)
                + b * (tensor - 1)
                + c * (1 - 1 / pipe)
            )

        fitting = sorted({need(*plan) for plan in _plans(*case)})
        for budget in (
            {fitting[0] - 1, fitting[0], fitting[len(fitting) // 2], fitting[-1]}
            if fitting
            else {10}
        ):
            _judge(answer(*case, budget, need, seconds), case, budget, need, seconds)


def _plans(gpus: int, per_node: int, layers: int, batch: int) -> list[tuple[int, int, int]]:
    every = itertools.product(range(1, gpus + 1), repeat=3)
    return [
        (d, t, p)
        for d, t, p in every
        if d * t * p == gpus and not (per_node % t or layers % p or batch % d)
    ]


def _judge(got: object, case: tuple, budget: int, need: object, seconds: object) -> None:
    names = dict(zip(("gpus", "per_node", "layers", "batch"), case, strict=True)) | {
        "budget": budget
    }
    where = ", ".join(f"{k} = {v}" for k, v in names.items())
    allowed = [plan for plan in _plans(*case) if need(*plan) <= budget]
    if not allowed:
        if got is not None:
            raise Wrong(f"{where}: nothing is allowed, so None is due; you returned {got!r}.")
        return
    best = min(seconds(*plan) for plan in allowed)
    if got is None:
        raise Wrong(f"{where}: a plan is allowed, with {best:.3g} s; you returned None.")
    if not isinstance(got, tuple) or len(got) != 3:
        raise Wrong(f"{where}: a tuple (data, tensor, pipe) was expected; you returned {got!r}.")
    if got not in _plans(*case):
        raise Wrong(
            f"{where}: {got} breaks a rule: the product must be all GPUs, tensor divide per_node,"
            " pipe the layers, data the batch."
        )
    if need(*got) > budget:
        raise Wrong(f"{where}: {got} needs {need(*got)} bytes.")
    if seconds(*got) > best + 1e-9:
        raise Wrong(f"{where}: {got} takes {seconds(*got):.3g} s; {best:.3g} s are possible.")
