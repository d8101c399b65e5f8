"""A pipeline's time against its number of micro-batches, and how many of them are alive at once.

Each stage computes a little and then waits, twice as long in the backward pass: so its slots are
equally long however few cores there are, and what is measured is the schedule.

Settings: width; micro, rows of a micro-batch; wait, seconds of a stage's forward pass; counts,
numbers of micro-batches; rounds.
"""

import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from course_utils.distributed import Block, apart, batch, chain, device, flat_gradients, seconds

__all__ = ["Stage", "run"]


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: "Stage") -> Tensor:
        ctx.stage = stage
        stage.begin()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        ctx.stage.finish()
        return gradient, None


class Stage(nn.Module):
    """A block that takes `wait` seconds forwards and twice as many backwards, and counts how many
    micro-batches are between the two at most.

    >>> stage = Stage(Block(8), wait=0.001)
    >>> stage(torch.ones(2, 8)).sum().backward()
    >>> stage.alive, stage.most
    (0, 1)
    """

    def __init__(self, block: Block, wait: float) -> None:
        super().__init__()
        self.block, self.wait, self.alive, self.most = block, wait, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        return _Wait.apply(self.block(x), self)

    def begin(self) -> None:
        """A forward pass: wait, and one more is alive."""
        time.sleep(self.wait)
        self.alive += 1
        self.most = max(self.most, self.alive)

    def finish(self) -> None:
        """A backward pass: wait, and one less is alive."""
        time.sleep(2 * self.wait)
        self.alive -= 1


def run(settings: dict) -> dict:
    """On each worker, by schedule and number of micro-batches: seconds of a step, a list over
    rounds, and the most micro-batches alive; also the largest gap of the gradients to those of one
    process.

    >>> from course_utils import distributed
    >>> few = {"width": 8, "micro": 2, "wait": 0.001, "counts": [2], "rounds": 2}
    >>> with distributed.alone():
    ...     run(few)["apart"] < 1e-5
    True
    """
    rank, p, width = dist.get_rank(), dist.get_world_size(), settings["width"]
    whole, stage = chain(width, p), Stage(chain(width, p)[rank], settings["wait"])
    calls, times, alive, gaps = {}, {}, {}, []
    for m in settings["counts"]:
        x, y = batch(m * settings["micro"], width)
        whole.zero_grad()
        F.mse_loss(whole(x), y).backward()
        ways = {"GPipe": scheduled(stage, m, x, y)}
        if m >= p:  # 1F1B needs a micro-batch for each stage
            ways["1F1B"] = scheduled(stage, m, x, y, Schedule1F1B)
        if m == max(settings["counts"]):
            ways["one by one"] = one_by_one(stage, m, x, y)
        for name, call in ways.items():
            call()  # the first call asks for shapes
            stage.zero_grad()
            stage.alive = stage.most = 0
            dist.barrier()
            times[f"{name}, {m}"] = [seconds(call)]
            calls[f"{name}, {m}"], alive[f"{name}, {m}"] = call, stage.most
            gaps.append(apart(flat_gradients(stage), flat_gradients(whole[rank])))
    order = random.Random(0)
    for _ in range(settings["rounds"] - 1):
        for name in order.sample(list(calls), len(calls)):
            dist.barrier()
            times[name].append(seconds(calls[name]))
    return {"times": times, "alive": alive, "apart": max(gaps)}


def scheduled(
    stage: Stage, m: int, x: Tensor, y: Tensor, kind: type = ScheduleGPipe
) -> Callable[[], object]:
    """One step of this worker's stage: the first is given the rows, the last the targets.

    >>> from course_utils import distributed
    >>> with distributed.alone():
    ...     scheduled(Stage(Block(8), 0.0), 2, *batch(4, 8))().shape
    torch.Size([4, 8])
    """
    rank, p = dist.get_rank(), dist.get_world_size()
    step = kind(PipelineStage(stage, rank, p, device()), m, loss_fn=F.mse_loss).step
    first = (x,) if rank == 0 else ()
    return partial(step, *first, **({"target": y} if rank == p - 1 else {}))


def one_by_one(stage: Stage, m: int, x: Tensor, y: Tensor) -> Callable[[], object]:
    """The same step without a pipeline: each micro-batch goes through all stages and back before
    the next one starts. The loss is divided, as a schedule does it.

    >>> from course_utils import distributed
    >>> with distributed.alone():
    ...     one_by_one(Stage(Block(8), 0.0), 2, *batch(4, 8))()
    """
    rank, p = dist.get_rank(), dist.get_world_size()

    def call() -> None:
        for part, target in zip(x.chunk(m), y.chunk(m), strict=True):
            inbox = part if rank == 0 else torch.empty_like(part)
            if rank > 0:
                dist.recv(inbox, rank - 1)
                inbox.requires_grad_()
            out = stage(inbox)
            if rank == p - 1:
                (F.mse_loss(out, target) / m).backward()
            else:
                dist.send(out.detach(), rank + 1)
                gradient = torch.empty_like(out)
                dist.recv(gradient, rank + 1)
                out.backward(gradient)
            if rank > 0:
                dist.send(inbox.grad, rank - 1)

    return call
