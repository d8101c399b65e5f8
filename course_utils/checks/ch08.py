"""Checks of chapter 08, Memory."""

import itertools

import numpy as np
import torch
from torch import nn

from course_utils.exercises import Probe, Wrong, exercise


@exercise("08.A")
def mlp_bytes(answer: Probe, rng: np.random.Generator) -> None:
    """Counted on real networks: parameters, Adam's state, and every tensor that autograd kept."""
    torch.manual_seed(int(rng.integers(2**31)))
    cases = [([4, 8, 2], 3), ([5, 3], 2), ([6, 9, 9, 4], 2)]
    cases += [
        ([int(w) for w in rng.integers(2, 40, rng.integers(3, 7))], int(rng.integers(1, 30)))
        for _ in range(4)
    ]
    for widths, batch in cases:
        got, want = answer(list(widths), batch), _alive(widths, batch)
        if not isinstance(got, int | float | np.number) or isinstance(got, bool):
            raise Wrong(f"a number of bytes was expected; you returned {got!r}.")
        if got != want:
            raise Wrong(
                f"widths {widths} and a batch of {batch}: torch holds {want} bytes, you say"
                f" {got:g}, {abs(got - want) / 4:g} numbers too {'many' if got > want else 'few'}."
            )


def _alive(widths: list[int], batch: int) -> int:
    """Bytes that a real MLP and its Adam hold between forward and backward, from autograd's own
    saved tensors.
    """
    layers = [
        f(i)
        for i in range(len(widths) - 1)
        for f in (lambda i: nn.Linear(widths[i], widths[i + 1]), _relu)
    ]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(model.parameters())
    x = torch.randn(batch, widths[0])
    model(x).sum().backward()
    optimizer.step()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    state = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if v.dim() > 0)
    del y
    return sum(p.nbytes for p in model.parameters()) + state + sum(kept.values())


def _relu(_: int) -> nn.Module:
    return nn.ReLU()


class _Watched:
    """A function that notes each call: whether autograd was on."""

    def __init__(self, function: object) -> None:
        self.function, self.recorded = function, []

    def __call__(self, *inputs: object) -> torch.Tensor:
        self.recorded.append(torch.is_grad_enabled())
        return self.function(*inputs)


@exercise("08.B")
def my_checkpoint(answer: Probe, rng: np.random.Generator) -> None:
    """The same bits as the plain step, nothing kept, and the random generator where it belongs."""
    cls = answer.answer
    if not (isinstance(cls, type) and issubclass(cls, torch.autograd.Function)):
        raise Wrong("a class derived from torch.autograd.Function was expected.")
    torch.manual_seed(int(rng.integers(2**31)))
    width = int(rng.integers(3, 9))
    linear, words = nn.Linear(width, width), nn.Embedding(20, width)
    a = torch.from_numpy(rng.normal(size=(4, width))).float()
    b = torch.from_numpy(rng.normal(size=(4, width))).float()
    index = torch.from_numpy(rng.integers(0, 20, 4))
    cases = {
        "one tensor": (lambda x: torch.tanh(linear(x)), [a], [0]),
        "dropout": (lambda x: nn.functional.dropout(linear(x).exp(), 0.5), [a], [0]),
        "two tensors": (lambda x, y: torch.sin(x * y), [a, b], [0, 1]),
        "the same tensor twice": (lambda x, y: x * y.exp(), [a, a], [0]),
        "a number among the inputs": (lambda x, n: linear(x) ** n, [a, 3], [0]),
        "a string first": (lambda s, x: x.cos() if s == "cos" else x, ["cos", a], [1]),
        "the second tensor needs no gradient": (lambda x, y: linear(x) * y, [a, b], [0]),
        "integers (an embedding's indices)": (lambda x, i: x * words(i), [a, index], [0]),
    }
    for name, (function, inputs, needs) in cases.items():
        _compare(cls, name, function, inputs, needs, [*linear.parameters(), *words.parameters()])


def _compare(
    cls: type, name: str, function: object, inputs: list, needs: list[int], own: list
) -> None:
    seed = int(torch.randint(0, 2**31, ()))
    results = {}
    for which in ("plain", "yours"):
        fresh: dict[int, torch.Tensor] = {}
        given = []
        for i, value in enumerate(inputs):
            if isinstance(value, torch.Tensor):
                first = fresh.setdefault(id(value), value.clone())
                given.append(first.requires_grad_() if i in needs else first)
            else:
                given.append(value)
        for p in own:
            p.grad = None
        watched = _Watched(function)
        torch.manual_seed(seed)
        try:
            y = watched(*given) if which == "plain" else cls.apply(watched, *given)
            if not isinstance(y, torch.Tensor):
                raise Wrong(
                    f"with {name}: forward returned a {type(y).__name__}, not function's tensor."
                )
            _ = torch.rand(2)  # what a program draws between its passes
            state = torch.get_rng_state()
            (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
        except Wrong:
            raise
        except Exception as error:
            raise Wrong(f"with {name}: your code raised {type(error).__name__}: {error}") from error
        tensors = [given[i].grad for i in needs] + [p.grad for p in own]
        results[which] = (
            y.detach(),
            tensors,
            torch.equal(state, torch.get_rng_state()),
            watched.recorded,
        )
    (y, wanted, _, _), (mine, got, in_place, recorded) = results["plain"], results["yours"]
    if not torch.equal(y, mine):
        raise Wrong(f"with {name}: the value differs from function(*inputs).")
    if recorded and recorded[0]:
        raise Wrong(
            f"with {name}: autograd was on in the first run, so everything inside is kept and no"
            " byte is saved."
        )
    if len(recorded) != 2:
        raise Wrong(
            f"with {name}: function ran {len(recorded)} times; once forwards and once backwards"
            " were expected."
        )
    for mine_, theirs in zip(got, wanted, strict=True):
        if (mine_ is None) != (theirs is None):
            raise Wrong(
                f"with {name}: a gradient is"
                f" {'missing' if mine_ is None else 'there and should not be'}."
            )
        if theirs is not None and not torch.equal(mine_, theirs):
            raise Wrong(
                f"with {name}: a gradient differs from the plain one by up to"
                f" {float((mine_ - theirs).abs().max()):.2g}; it must be equal bit for bit. Does"
                " the second run see the same random numbers?"
            )
    if not in_place:
        raise Wrong(
            f"with {name}: after backward the random generator stands elsewhere than before it; "
            "every later random number of the program changes."
        )


@exercise("08.C")
def plan(answer: Probe, rng: np.random.Generator) -> None:
    """Within the budget to the byte, and no set that fits takes less time."""
    cases = [([(10, 1, 3.0), (10, 1, 2.0)], budget) for budget in (20, 12, 11, 10)]
    cases.append(
        ([(20, 1, 9.0), (10, 1, 1.0), (5, 1, 1.0)], 31)
    )  # most bytes for its time, not most bytes
    for trial in range(14):
        blocks = [
            (int(rng.integers(5, 60)), int(rng.integers(1, 6)), float(rng.integers(1, 20)))
            for _ in range(int(rng.integers(3, 8)))
        ]
        peaks = sorted({_peak(blocks, c) for c in _sets(len(blocks))})
        budget = peaks[int(rng.integers(0, len(peaks)))]  # to the byte
        cases.append((blocks, budget if trial else peaks[0] - 1))
    for blocks, budget in cases:
        _judge(answer(list(blocks), budget), blocks, budget)


def _judge(got: object, blocks: list[tuple], budget: int) -> None:
    where = f"blocks {blocks} and a budget of {budget}"
    fitting = [c for c in _sets(len(blocks)) if _peak(blocks, c) <= budget]
    if not fitting:
        if got is not None:
            raise Wrong(f"{where}: nothing fits, so None is due; you returned {got!r}.")
        return
    fastest = min(sum(blocks[i][2] for i in c) for c in fitting)
    if got is None:
        raise Wrong(f"{where}: a set fits, at {fastest:g} s more; you returned None.")
    if (
        not isinstance(got, list)
        or got != sorted(set(got))
        or not set(got) <= set(range(len(blocks)))
    ):
        raise Wrong(
            f"{where}: a sorted list of different indices was expected; you returned {got!r}."
        )
    peak, time = _peak(blocks, got), sum(blocks[i][2] for i in got)
    if peak > budget:
        raise Wrong(
            f"{where}: your set {got} has a peak of {peak}. What is held while a block is computed"
            " again?"
        )
    if time > fastest + 1e-9:
        raise Wrong(f"{where}: your set {got} takes {time:g} s more; {fastest:g} s are enough.")


def _sets(n: int) -> list[tuple[int, ...]]:
    return [c for k in range(n + 1) for c in itertools.combinations(range(n), k)]


def _peak(blocks: list[tuple], chosen: object) -> int:
    """A replay of the step: forward fills, backward works on the last block that is left, then
    frees it.
    """
    held = [blocks[i][1 if i in chosen else 0] for i in range(len(blocks))]
    peak = sum(held)
    while held:
        i = len(held) - 1
        peak = max(peak, sum(held) + (blocks[i][0] if i in chosen else 0))
        held.pop()
    return peak
