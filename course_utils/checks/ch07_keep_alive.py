"""The check of chapter 07's last exercise: a run in fp16 that must not die."""

import copy
import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from course_utils.exercises import Probe, Wrong, exercise

GOOD, RATE, ALLOWED = 320, 0.05, 0.12
"""Good batches, learning rate, and how far from the end of the run in fp32 one may end, as a share
of its way. In 12 to 66 runs each, right answers ended below 0.11 (growth every 5, 8, 10 and 15
steps), and scales that never change (2⁸ to 2²⁰) above 0.15; those further off end further away.
"""


@exercise("07.C")
def keep_alive(answer: Probe, rng: np.random.Generator) -> None:
    """Real fp16, broken batches alone and in a burst, a loss that shrinks by 2⁵⁴ and jumps: the run
    ended where fp32 ends.
    """
    function = answer.answer
    if not callable(function):
        raise Wrong(f"a function was expected; this is a {type(function).__name__}.")
    alone = [i for i in range(GOOD) if i % 5 == 2]
    at = int(rng.integers(60, 200))
    for name, places in (("a broken batch in six", alone), ("45 broken batches", [at] * 45)):
        _survive(function, name, places, rng)


def _exponents() -> np.ndarray:
    """Of the factor of each good batch's loss, as a power of two: it falls, jumps, falls again."""
    jump = GOOD * 3 // 4
    falls = 14 - np.arange(GOOD) * 54 / jump
    falls[jump:] += 32
    return falls


def _survive(function: Callable, name: str, places: list[int], rng: np.random.Generator) -> None:
    torch.manual_seed(int(rng.integers(0, 2**31)))
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))
    model.register_parameter("spare", nn.Parameter(torch.ones(2)))  # it gets no gradient
    truth, images = torch.randn(20, 4), torch.randn(GOOD, 32, 20)
    good = [(x, (x @ truth).argmax(1)) for x in images]
    start, ends = _flat(model), _flat(_in_fp32(copy.deepcopy(model), good))
    run = _Run(model, good, places)
    try:
        function(model, run.batches, run.optimizer, run.loss_of)
    except Exception as error:
        raise Wrong(f"{name}: your code raised {type(error).__name__}: {error}") from error
    if [run.number.get(hash(x.numpy().tobytes())) for x, _ in run.batches] != list(
        range(len(run.factors))
    ):
        raise Wrong(f"{name}: your code changed the batches, which belong to the caller.")
    if not bool(_flat(model).isfinite().all()):
        raise Wrong(f"{name}: the weights are not finite at the end.")
    if run.formats != {torch.float16}:
        seen = ", ".join(sorted(str(d) for d in run.formats)) or "nothing"
        raise Wrong(f"{name}: the layers computed in {seen}; fp16 autocast was asked for.")
    if run.on_broken:
        raise Wrong(f"{name}: {run.on_broken} updates were made on broken batches.")
    if twice := sum(n > 1 for n in run.updates.values()):
        raise Wrong(f"{name}: {twice} batches made more than one update.")
    missed = GOOD - len(run.updates)
    apart = float((_flat(model) - ends).norm() / (ends - start).norm())
    if not (missed <= GOOD // 8 and apart <= ALLOWED):
        raise Wrong(
            f"{name}: your run ends {apart:.0%} of the way beside the run in fp32, {ALLOWED:.0%} is"
            f" allowed; {missed} of {GOOD} good batches made no update, {GOOD // 8} may. Are the"
            " gradients true when the optimizer steps? Does the scale rise while the loss shrinks,"
            " and fall when it jumps?"
        )


def _in_fp32(model: nn.Module, batches: list[tuple]) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def _flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


class _Run:
    """What the reader is given. It notes the formats of the layers, and on which batch each update
    was made; broken batches look like others, and only their loss tells.
    """

    def __init__(self, model: nn.Module, good: list[tuple], places: list[int]) -> None:
        self.batches, self.factors = [], []
        for i, (batch, exponent) in enumerate(zip(good, _exponents(), strict=True)):
            for k in range(places.count(i)):
                spoiled = (torch.randn_like(batch[0]), batch[1].clone())
                self.batches.append(spoiled)
                self.factors.append(math.nan if k % 2 == i % 2 else math.inf)
            self.batches.append((batch[0].clone(), batch[1].clone()))
            self.factors.append(2.0**exponent)
        self.number = {hash(x.numpy().tobytes()): i for i, (x, _) in enumerate(self.batches)}
        own = list(model.parameters())
        self.optimizer = torch.optim.SGD([{"params": own[:2]}, {"params": own[2:]}], RATE)
        self.optimizer.register_step_pre_hook(lambda *_: self.stepped())
        self.formats: set[torch.dtype] = set()
        self.updates: Counter[int] = Counter()
        self.on_broken, self.current = 0, -1
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(lambda _, __, y: self.formats.add(y.dtype))

    def loss_of(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.current = self.number.get(hash(x.detach().float().numpy().tobytes()), -1)
        if self.current < 0:
            raise ValueError("loss_of was given a batch that is not among the batches")
        factor = self.factors[self.current]
        if math.isfinite(factor):  # the schedule makes up for the loss's size
            for group in self.optimizer.param_groups:
                group["lr"] = RATE / factor
        return F.cross_entropy(model(x), y) * factor

    def stepped(self) -> None:
        if math.isfinite(self.factors[self.current]):
            self.updates[self.current] += 1
        else:
            self.on_broken += 1
