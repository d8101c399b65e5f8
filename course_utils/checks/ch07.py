"""Checks of chapter 07, Mixed precision."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from course_utils.exercises import Probe, Wrong, exercise


@exercise("07.A")
def ruler(answer: Probe, rng: np.random.Generator) -> None:
    """Compared with every number of a format, written down one by one."""
    cases = [
        (1.0, 5, 10),
        (3.0, 8, 7),
        (1.75, 5, 10),
        (2.0**-15, 5, 10),
        (2.0**-24, 5, 10),
        (0.75, 3, 2),
    ]
    for _ in range(60):
        e, m = int(rng.integers(2, 7)), int(rng.integers(1, 6))
        numbers = _numbers(e, m)
        i = int(rng.integers(1, len(numbers) - 1))
        share = float(rng.choice([0.0, 0.25, 0.5]))
        cases.append((numbers[i] + share * (numbers[i + 1] - numbers[i]), e, m))
    for x, e, m in cases:
        got = answer(x, e, m)
        if not isinstance(got, tuple | list) or len(got) != 2:
            raise Wrong(f"two numbers were expected, (smallest normal, ulp); you returned {got!r}.")
        numbers = _numbers(e, m)
        i = int(np.searchsorted(numbers, x, side="right"))
        normal = next(
            n for k, n in enumerate(numbers) if k >= 2**m
        )  # after zero and 2^m − 1 subnormals
        if got[0] != normal:
            raise Wrong(
                f"{e} exponent and {m} mantissa bits: the smallest normal number is {normal:g}, not"
                f" {got[0]:g}."
            )
        want = numbers[i] - numbers[i - 1]
        if got[1] != want:
            kind = "subnormal" if x < normal else "normal"
            raise Wrong(
                f"x = {x:g} ({kind}) with {e} exponent and {m} mantissa bits lies between"
                f" {numbers[i - 1]:g} and {numbers[i]:g}: the distance is {want:g}, not {got[1]:g}."
            )


def _numbers(e: int, m: int) -> np.ndarray:
    """All non-negative finite numbers of the format, ascending: from each exponent's and mantissa's
    integers.
    """
    bias, steps = 2 ** (e - 1) - 1, np.arange(2**m) / 2.0**m
    octaves = [(1 + steps) * 2.0 ** (k - bias) for k in range(1, 2**e - 1)]
    return np.concatenate([steps * 2.0 ** (1 - bias), *octaves])


@exercise("07.B")
def my_scaler(answer: Probe, rng: np.random.Generator) -> None:
    """Step for step what torch.amp.GradScaler does: the same scales, the same skips, the same
    weights.
    """
    cls = answer.answer
    if not isinstance(cls, type):
        raise Wrong("a class was expected.")
    plain = [("good", "good", False)] * 5
    one_bad = [("good", "good", False), ("inf", "good", False), *plain]
    _follow(cls, rng, 2, plain, "two optimizers, every gradient finite")
    _follow(cls, rng, 2, one_bad, "an infinity in the first of two optimizers' gradients")
    _follow(
        cls, rng, 2, [("nan", "good", False), *plain], "a NaN in the first optimizer's gradients"
    )
    _follow(cls, rng, 3, [("good", "good", True)] * 4, "unscale and clip before step")
    _follow(
        cls,
        rng,
        3,
        [("inf", "good", True), ("good", "nan", True), *plain],
        "an infinity, then a clip",
    )
    _follow(
        cls, rng, 1, [("none", "good", False), ("good", "inf", False)], "a gradient that is None"
    )
    kinds = ["good"] * 5 + ["inf", "nan", "none"]
    for _ in range(3):
        plan = [
            (str(rng.choice(kinds)), str(rng.choice(kinds)), bool(rng.random() < 0.4))
            for _ in range(20)
        ]
        _follow(cls, rng, int(rng.integers(1, 5)), plan, "twenty mixed steps")
    _twice(cls)


def _follow(
    cls: type, rng: np.random.Generator, interval: int, plan: list[tuple], what: str
) -> None:
    """Both scalers on the same gradients; `plan` says for each step what the two optimizers meet
    and whether one clips.
    """
    scale, growth, backoff = 1024.0, 2.0, 0.5
    theirs = torch.amp.GradScaler(
        "cpu",
        init_scale=scale,
        growth_factor=growth,
        backoff_factor=backoff,
        growth_interval=interval,
    )
    mine = _do(
        lambda: cls(scale, growth, backoff, interval),
        f"{what}: making MyScaler({scale:g}, {growth:g}, {backoff}, {interval})",
    )
    sides = [[_pair() for _ in range(2)] for _ in range(2)]
    for number, (*kinds, clip) in enumerate(plan, 1):
        where = f"{what}, step {number}, growth interval {interval}"
        values = [torch.from_numpy(rng.normal(size=4)).float() for _ in kinds]
        before = theirs.get_scale()
        stepped = []
        for side, (scaler, pairs) in enumerate(zip((theirs, mine), sides, strict=True)):
            factor = scaler.scaled if side else scaler.scale
            for (weights, spare, _), kind, value in zip(pairs, kinds, values, strict=True):
                _gradients(weights, spare, kind, value, factor, where)
            for k, (weights, spare, optimizer) in enumerate(pairs):
                if clip and k == 0:
                    unscale = scaler.unscale if side else scaler.unscale_
                    _do(lambda u=unscale, o=optimizer: u(o), f"{where}: unscale")
                    nn.utils.clip_grad_norm_([weights, spare], 1.0)
                result = _do(lambda s=scaler, o=optimizer: s.step(o), f"{where}: step")
                if side:
                    stepped.append(result)
            _do(scaler.update, f"{where}: update")
        for k, (a, b) in enumerate(zip(*sides, strict=True)):
            _same_weights(
                a,
                b,
                f"{where}, optimizer {k + 1} ({kinds[k]}{', clipped' if clip and k == 0 else ''})",
            )
            fine = kinds[k] in ("good", "none")
            if stepped[k] is not fine and stepped[k] != fine:
                raise Wrong(
                    f"{where}: step returned {stepped[k]!r} for optimizer {k + 1}; it"
                    f" {'did' if fine else 'must not'} step."
                )
        if mine.scale != theirs.get_scale():
            raise Wrong(
                f"{where}: the scale was {before:g}; after update GradScaler has"
                f" {theirs.get_scale():g}, yours is {mine.scale!r}. The optimizers met: {kinds[0]},"
                f" {kinds[1]}."
            )


def _pair() -> tuple[nn.Parameter, nn.Parameter, torch.optim.Optimizer]:
    weights, spare = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2))
    return weights, spare, torch.optim.SGD([weights, spare], 0.1, momentum=0.9)


def _gradients(
    weights: nn.Parameter,
    spare: nn.Parameter,
    kind: str,
    value: torch.Tensor,
    scaled: object,
    where: str,
) -> None:
    """Backward of a scaled loss whose gradient is `value`, spoiled as `kind` says. `scaled` scales
    a loss.
    """
    weights.grad = spare.grad = None
    loss = _do(lambda: scaled((weights * value).sum()), f"{where}: scaled")
    if not isinstance(loss, torch.Tensor):
        raise Wrong(f"{where}: scaled returned {loss!r}, not a tensor.")
    loss.backward()
    if kind in ("inf", "nan"):
        weights.grad[1] = math.inf if kind == "inf" else math.nan
    if kind != "none":
        spare.grad = torch.zeros_like(spare)


def _same_weights(theirs: tuple, mine: tuple, where: str) -> None:
    for a, b in zip(theirs[:2], mine[:2], strict=True):
        if not torch.equal(a, b):
            raise Wrong(
                f"{where}: GradScaler leaves the weights at {_round(a)}, yours at {_round(b)}."
            )


def _round(t: torch.Tensor) -> list[float]:
    return [round(v, 5) for v in t.tolist()]


def _twice(cls: type) -> None:
    scaler, (weights, _, optimizer) = cls(8.0, 2.0, 0.5, 2), _pair()
    loss = _do(lambda: scaler.scaled(weights.sum()), "scaled")
    if not isinstance(loss, torch.Tensor) or float(loss.detach()) != 32.0:
        raise Wrong(
            "scaled(loss) of a loss of 4 with scale 8 must be a tensor of 32; you returned"
            f" {loss!r}."
        )
    loss.backward()
    _do(lambda: scaler.unscale(optimizer), "unscale")
    if weights.grad.tolist() != [1.0] * 4:
        raise Wrong(f"after unscale the gradients must be true: 1, not {weights.grad.tolist()}.")
    try:
        scaler.unscale(optimizer)
    except RuntimeError:
        pass
    else:
        raise Wrong(
            "unscale was called twice before update() and raised nothing; a RuntimeError was asked"
            " for."
        )
    _do(lambda: scaler.step(optimizer), "step")
    _do(scaler.update, "update")
    weights.sum().backward()
    _do(lambda: scaler.unscale(optimizer), "unscale, after update() allowed it again")


def _do(call: object, what: str) -> object:
    try:
        return call()
    except Exception as error:
        raise Wrong(f"{what} raised {type(error).__name__}: {error}") from error


@exercise("07.C")
def keep_alive(answer: Probe, rng: np.random.Generator) -> None:
    """Real fp16, broken batches alone and in bursts: the weights stayed finite, within the budget,
    and it learnt.
    """
    function = answer.answer
    if not callable(function):
        raise Wrong(f"a function was expected; this is a {type(function).__name__}.")
    # 25 broken batches or more in each: a stock scaler has lost every gradient after them.
    single = [i % 4 == 3 for i in range(120)]
    burst = [i < 40 for i in range(130)]
    mixed = [bool(b) for b in rng.random(140) < 0.1]
    start = int(rng.integers(20, 60))
    mixed[start : start + 45] = [True] * 45
    for name, pattern, kind in (
        ("single broken batches (loss NaN)", single, "nan"),
        ("40 broken batches first (loss infinite)", burst, "inf"),
        ("a burst of 45 and single ones, NaN and infinite", mixed, "both"),
    ):
        _survive(function, name, pattern, kind, rng)


def _survive(
    function: object, name: str, pattern: list[bool], kind: str, rng: np.random.Generator
) -> None:
    torch.manual_seed(int(rng.integers(0, 2**31)))
    truth, images = torch.randn(20, 4), torch.randn(len(pattern), 32, 20)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))
    batches = []
    for broken, x in zip(pattern, images, strict=True):
        y = (x @ truth).argmax(1)
        if broken:
            x[0] = 1e9
            x[0, ::2] *= -1  # inf − inf in fp16
            if kind == "inf" or (kind == "both" and rng.random() < 0.5):
                x[0], y[0] = 7e4, -1
        batches.append((x, y))
    good = [b for b, broken in zip(batches, pattern, strict=True) if not broken]
    watch = _Watch(model, batches, pattern)
    before = _loss(model, good)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    optimizer.register_step_pre_hook(lambda *_: watch.stepped())
    given = [(x.clone(), y.clone()) for x, y in batches]
    _do(lambda: function(model, given, optimizer, watch.loss_of), f"{name}: your code")
    after = _loss(model, good)
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise Wrong(f"{name}: the weights are not finite at the end.")
    if watch.formats != {torch.float16}:
        seen = ", ".join(sorted(str(d) for d in watch.formats)) or "nothing"
        raise Wrong(f"{name}: the layers computed in {seen}; fp16 autocast was asked for.")
    if watch.on_broken:
        raise Wrong(f"{name}: {watch.on_broken} updates were made on broken batches.")
    if len(watch.updated) < 0.9 * len(good):
        raise Wrong(
            f"{name}: {len(good) - len(watch.updated)} of {len(good)} good batches went without an"
            f" update; at most {len(good) // 10} may."
        )
    if not after < before / 2:  # the solution: a sixth, 0.19 at most in 75 runs
        raise Wrong(
            f"{name}: the loss on the good batches went from {before:.3f} to {after:.3f}; less than"
            " half was asked for. Are the gradients of the good batches still different from zero?"
        )


class _Watch:
    """The loss the reader is given; it notes the batch, the layers' formats, and which batches led
    to an update.
    """

    def __init__(self, model: nn.Module, batches: list, pattern: list[bool]) -> None:
        self.broken = {
            hash(x.numpy().tobytes()): b for (x, _), b in zip(batches, pattern, strict=True)
        }
        self.formats: set = set()
        self.updated: set = set()
        self.on_broken, self.current, self.listening = 0, None, False
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(self._computed)

    def _computed(self, _: nn.Module, __: tuple, output: torch.Tensor) -> None:
        if self.listening:
            self.formats.add(output.dtype)

    def loss_of(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.current = hash(x.detach().float().numpy().tobytes())
        broken = self.broken.get(self.current)
        if broken is None:
            raise ValueError("loss_of was given a batch that is not among the batches")
        self.listening = True
        logits = model(x)
        self.listening = False
        loss = F.cross_entropy(logits, y.clamp(min=0))
        if bool((y < 0).any()):  # the other kind of broken batch
            loss = loss.nan_to_num(0.0) * 0 + math.inf
        return loss * 2.0**-20

    def stepped(self) -> None:
        if self.broken.get(self.current):
            self.on_broken += 1
        else:
            self.updated.add(self.current)


@torch.no_grad()
def _loss(model: nn.Module, batches: list) -> float:
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return F.cross_entropy(model(x), y).item()
