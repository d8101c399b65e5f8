"""Checks of chapter 07, Mixed precision: the first two exercises."""

import math

import numpy as np
import torch
from torch import nn

from course_utils.checks.accept import apart, close, number, said, sequence
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
        *((2.0**p, 5, 2) for p in (-13, -3, 2, 3, 4)),
        (8.0 - 2.0**-50, 5, 10),  # just below a power of two, where a logarithm rounds up
        *((2.0**p, 8, 3) for p in (-31, -29, -58, 29, 31)),  # and where it rounds down
    ]
    for _ in range(60):
        e, m = int(rng.integers(2, 7)), int(rng.integers(1, 6))
        numbers = _numbers(e, m)
        i = int(rng.integers(1, len(numbers) - 1))
        share = float(rng.choice([0.0, 0.25, 0.5]))
        cases.append((numbers[i] + share * (numbers[i + 1] - numbers[i]), e, m))
    for x, e, m in cases:
        where = f"x = {float(x)!r}, {e} exponent and {m} mantissa bits"
        got = sequence(answer(x, e, m), f"{where}, (smallest normal, ulp)", 2)
        got = [number(v, where) for v in got]
        numbers = _numbers(e, m)
        i = int(np.searchsorted(numbers, x, side="right"))
        normal = next(
            n for k, n in enumerate(numbers) if k >= 2**m
        )  # after zero and 2^m − 1 subnormals
        if got[0] != normal:
            yours, due = apart(got[0], normal)
            raise Wrong(f"{where}: the smallest normal number is {due}, not {yours}.")
        want = numbers[i] - numbers[i - 1]
        if got[1] != want:
            kind = "subnormal" if x < normal else "normal"
            yours, due = apart(got[1], want)
            raise Wrong(
                f"{where} ({kind}): it lies between {numbers[i - 1]:g} and {numbers[i]:g}, the"
                f" distance is {due}, not {yours}."
            )


def _numbers(e: int, m: int) -> np.ndarray:
    """All non-negative finite numbers of the format, ascending: from each exponent's and mantissa's
    integers.
    """
    bias, steps = 2 ** (e - 1) - 1, np.arange(2**m) / 2.0**m
    octaves = [(1 + steps) * 2.0 ** (k - bias) for k in range(1, 2**e - 1)]
    return np.concatenate([steps * 2.0 ** (1 - bias), *octaves])


_GOOD = [("good", "good", False)] * 5
_PLANS = [  # (what it is, growth interval, [(what each optimizer meets, whether the first clips)])
    ("one optimizer, every gradient finite", 2, [("good", False)] * 5),
    ("two optimizers, every gradient finite", 2, _GOOD),
    (
        "an infinity in the first of two optimizers' gradients",
        2,
        [*_GOOD[:1], ("inf", "good", False), *_GOOD],
    ),
    ("an infinity just before growth", 3, [*_GOOD[:2], ("good", "inf", False), *_GOOD]),
    ("a NaN in the first optimizer's gradients", 2, [("nan", "good", False), *_GOOD]),
    ("unscale and clip before step", 3, [("good", "good", True)] * 4),
    (
        "an infinity, then a clip",
        3,
        [("inf", "good", True), ("good", "nan", True), *_GOOD],
    ),
    # Every second clip is by value, after which nothing is infinite any more.
    ("an infinity that a clip hides", 3, [_GOOD[0], ("inf", "good", True), *_GOOD]),
    ("a gradient that is None", 1, [("none", "good", False), ("good", "inf", False)]),
    ("an infinity in the last group alone", 2, [("last", "good", False), *_GOOD]),
    ("infinities that add up to NaN", 2, [("inf and -inf", "good", True)]),
    ("finite gradients whose squares are not", 2, [("huge", "good", False)] * 3),
    ("three optimizers", 2, [("good", "inf", "good", False), *[("good",) * 3 + (False,)] * 3]),
]


@exercise("07.B")
def my_scaler(answer: Probe, rng: np.random.Generator) -> None:
    """Step for step what torch.amp.GradScaler does: the same scales, the same skips, the same
    weights.
    """
    cls = answer.answer
    if not isinstance(cls, type):
        raise Wrong("a class was expected.")
    for what, interval, plan in _PLANS:
        _follow(cls, rng, interval, plan, what)
    kinds = ["good"] * 5 + ["inf", "nan", "none", "huge", "last", "inf and -inf"]
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
    """Both scalers on the same gradients; `plan` says for each step what the optimizers meet
    and whether the first one clips.
    """
    scale, growth, backoff = 1024.0, 3.0, 0.25
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
    sides = [[_pair() for _ in plan[0][:-1]] for _ in range(2)]
    for step, (*kinds, clip) in enumerate(plan, 1):
        where = f"{what}, step {step}, growth interval {interval}"
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
                    (clip_by_norm if step % 2 else clip_by_value)([weights, spare], 1.0)
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
            fine = kinds[k] in ("good", "none", "huge")
            if stepped[k] is not fine and stepped[k] != fine:
                raise Wrong(
                    f"{where}: step returned {said(stepped[k])} for optimizer {k + 1}; it"
                    f" {'did' if fine else 'must not'} step."
                )
        got, due = _scale(mine, where), theirs.get_scale()
        if not close(got, due):  # GradScaler's scale is an fp32 number, which rounds powers of 3
            got, due = apart(got, due)
            raise Wrong(
                f"{where}: the scale was {before:g}; after update GradScaler has {due}, yours is"
                f" {got}. The gradients were: {', '.join(kinds)}."
            )


def _scale(scaler: object, where: str) -> float:
    if not hasattr(scaler, "scale"):
        raise Wrong(f"{where}: your scaler has no attribute scale.")
    return number(scaler.scale, f"{where}, the attribute scale")


def _pair() -> tuple[nn.Parameter, nn.Parameter, torch.optim.Optimizer]:
    weights, spare = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2))
    groups = [{"params": [weights]}, {"params": [spare], "lr": 0.01}]
    return weights, spare, torch.optim.SGD(groups, 0.1, momentum=0.9)


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
        raise Wrong(f"{where}: scaled returned {said(loss)}, not a tensor.")
    loss.backward()
    if kind != "none":
        spare.grad = torch.zeros_like(spare)
    match kind:
        case "inf" | "nan":
            weights.grad[1] = math.inf if kind == "inf" else math.nan
        case "inf and -inf":
            weights.grad[:2] = torch.tensor([math.inf, -math.inf])
        case "huge":
            weights.grad[1] = 1e25  # finite for every scale that 20 steps reach; its square is not
        case "last":
            spare.grad[-1] = -math.inf


def _same_weights(theirs: tuple, mine: tuple, where: str) -> None:
    """Up to rounding: a division by the scale and a product with its inverse differ in the last
    bit, twenty steps of at most 40 in these. A skipped or a wrongly scaled step differs by tenths.
    """
    for a, b in zip(theirs[:2], mine[:2], strict=True):
        if not torch.allclose(a, b, rtol=1e-4, atol=1e-4):
            at = int((~torch.isclose(a, b, rtol=1e-4, atol=1e-4)).nonzero()[0])
            due, yours = apart(a[at].item(), b[at].item())
            raise Wrong(f"{where}: GradScaler leaves a weight at {due}, yours at {yours}.")


def clip_by_norm(parameters: list[nn.Parameter], most: float) -> None:
    nn.utils.clip_grad_norm_(parameters, most)


def clip_by_value(parameters: list[nn.Parameter], most: float) -> None:
    """An infinity becomes an ordinary number: who asks only now does not see it."""
    nn.utils.clip_grad_value_(parameters, most)


def _twice(cls: type) -> None:
    scaler, (weights, _, optimizer) = cls(8.0, 2.0, 0.5, 2), _pair()
    odd = _do(lambda: scaler.scaled(torch.tensor(4.0009765625)), "scaled")
    if not isinstance(odd, torch.Tensor) or float(odd) != 32.0078125:
        raise Wrong(f"scaled(loss) of 4.0009765625 with scale 8 is 32.0078125; yours is {odd!r}.")
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
    try:
        scaler.unscale(optimizer)
    except RuntimeError:
        pass
    else:
        raise Wrong(
            "unscale after step, before update(), raised nothing: the gradients would be divided"
            " twice. A RuntimeError was asked for."
        )
    _do(scaler.update, "update")
    weights.sum().backward()
    _do(lambda: scaler.unscale(optimizer), "unscale, after update() allowed it again")


def _do(call: object, what: str) -> object:
    try:
        return call()
    except Exception as error:
        raise Wrong(f"{what} raised {type(error).__name__}: {error}") from error
