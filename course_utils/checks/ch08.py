"""Checks of chapter 08, Memory."""

import gc
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from course_utils.checks.accept import apart, close, said, sequence, whole
from course_utils.exercises import Probe, Wrong, exercise


@exercise("08.A")
def mlp_bytes(answer: Probe, rng: np.random.Generator) -> None:
    """Counted on real networks: parameters, Adam's state, and every tensor that autograd kept."""
    torch.manual_seed(int(rng.integers(2**31)))
    cases = [([5, 3], 2), ([4, 8, 2], 3), ([3, 3, 3], 1), ([6, 9, 9, 4], 2), ([1, 1], 1)]
    cases += [
        ([int(w) for w in rng.integers(2, 40, rng.integers(3, 7))], int(rng.integers(1, 30)))
        for _ in range(4)
    ]
    for widths, batch in cases:
        where = f"for the widths {widths} and a batch of {batch}"
        got, want = whole(answer(list(widths), batch), where), _alive(widths, batch)
        if got != want:
            raise Wrong(
                f"{where}, torch holds {want} bytes; you say {got}, {abs(got - want) / 4:g} numbers"
                f" too {'many' if got > want else 'few'}.{_reason(got, widths, batch)}"
            )


def _reason(got: int, widths: list[int], batch: int) -> str:
    """The misconception that leads to this number, if one of the usual ones does."""
    parameters = sum((a + 1) * b for a, b in itertools.pairwise(widths))
    numbers = got / 4 - 3 * parameters
    reasons = {
        batch * sum(widths): "Nobody keeps the last output.",
        batch * sum(widths[1:]): "The first layer keeps the batch, and nobody the last output.",
        batch * (sum(widths[:-1]) + sum(widths[1:-1])): (
            "A ReLU's output and the next layer's input are one tensor."
        ),
        batch * sum(widths[:-1]) + parameters: "There are no gradients yet.",
    }
    return f" {reasons[numbers]}" if numbers in reasons else ""


def _alive(widths: list[int], batch: int) -> int:
    """Bytes that a real MLP and its Adam hold between forward and backward, from autograd's own
    saved tensors.
    """
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
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


@exercise("08.B")
def my_checkpoint(answer: Probe, rng: np.random.Generator) -> None:
    """The same bits as the plain step, nothing kept, and the random generator where it belongs."""
    cls = answer.answer
    if not (isinstance(cls, type) and issubclass(cls, torch.autograd.Function)):
        raise Wrong("a class derived from torch.autograd.Function was expected.")
    torch.manual_seed(int(rng.integers(2**31)))
    width = int(rng.integers(3, 9))
    linear, words = nn.Linear(width, width), nn.Embedding(20, width)
    a, b = torch.randn(4, width), torch.randn(4, width)
    index = torch.from_numpy(rng.integers(0, 20, 4))

    def mask(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(linear(x).exp(), 0.5)

    cases = [
        ("x * n for two ones and n = 3", lambda x, n: x * n, [torch.ones(2), 3], [0]),
        ("one tensor", lambda x: torch.tanh(linear(x)), [a], [0]),
        ("dropout", mask, [a], [0]),
        ("two tensors", lambda x, y: torch.sin(x * y), [a, b], [0, 1]),
        ("the same tensor twice", lambda x, y: x * y.exp(), [a, a], [0]),
        ("a string first", lambda s, x: x.cos() if s == "cos" else x, ["cos", a], [1]),
        (
            "None and a number",
            lambda n, x, k: linear(x) ** k if n is None else x,
            [None, a, 3],
            [1],
        ),
        ("a second tensor that needs no gradient", lambda x, y: linear(x) * y, [a, b], [0]),
        ("a first tensor that needs no gradient", lambda x, y: linear(x) * y, [a, b], [1]),
        ("integers (an embedding's indices)", lambda i, x: x * words(i), [index, a], [1]),
    ]
    own = [*linear.parameters(), *words.parameters()]
    for name, function, inputs, needs in cases:
        _compare(cls, f"with {name}", function, inputs, needs, own)
    _compare(cls, "with two checkpoints in a row", mask, [a], [0], own, times=2)
    _weigh(cls, rng)


@dataclass
class _Step:
    """What a training step showed: its value, its gradients, whether the generator stood still
    while it went backwards, and for each run of the function whether autograd was on.
    """

    value: torch.Tensor
    gradients: list[torch.Tensor | None]
    in_place: bool
    forwards: list[bool]
    backwards: list[bool]


def _step(
    apply: Callable, function: Callable, inputs: list, needs: list[int], own: list, times: int
) -> _Step:
    """`own` are the parameters; with `times` = 2 the result is given to the function again."""
    fresh, recorded = {}, []
    for i in needs:
        fresh[id(inputs[i])] = inputs[i].clone().requires_grad_()
    given = [fresh.get(id(v), v) for v in inputs]
    for p in own:
        p.grad = None

    def watched(*args: object) -> torch.Tensor:
        recorded.append(torch.is_grad_enabled())
        return function(*args)

    y = apply(watched, *given)
    for _ in range(times - 1):
        y = apply(watched, y)
    if not isinstance(y, torch.Tensor):
        raise Wrong(f"apply returned {said(y)}, not function's tensor.")
    if not y.requires_grad:
        raise Wrong("nothing leads back: what apply returned requires no gradient.")
    forwards = list(recorded)
    weights = torch.randn(y.shape)  # what a program draws between its passes; another one each time
    state = torch.get_rng_state()
    (y * weights).sum().backward()
    gradients = [given[i].grad for i in needs] + [p.grad for p in own]
    in_place = torch.equal(state, torch.get_rng_state())
    _own(apply, y)
    return _Step(y.detach(), gradients, in_place, forwards, recorded[len(forwards) :])


def _own(apply: Callable, y: torch.Tensor) -> None:
    """The reader's class stands in the graph behind y, not torch's ready one."""
    cls, todo, seen = getattr(apply, "__self__", None), [y.grad_fn], set()
    while cls is not None and todo:
        node = todo.pop()
        if issubclass(getattr(node, "_forward_cls", object), cls):
            return
        new = [n for n, _ in node.next_functions if n is not None and n not in seen]
        seen.update(new)
        todo += new
    if cls is not None:
        raise Wrong(
            "your class's backward does not stand behind what apply returned: both passes are to"
            " be your own."
        )


def _compare(
    cls: type,
    where: str,
    function: Callable,
    inputs: list,
    needs: list[int],
    own: list,
    times: int = 1,
) -> None:
    seed, steps = int(torch.randint(0, 2**31, ())), []
    for apply in (lambda f, *given: f(*given), cls.apply):
        torch.manual_seed(seed)
        try:
            steps.append(_step(apply, function, inputs, needs, own, times))
        except Wrong as error:
            raise Wrong(f"{where}: {error}") from None
        except Exception as error:
            raise Wrong(
                f"{where}: your code raised {type(error).__name__}: {error}".partition("\n")[0]
            ) from error
    plain, yours = steps
    if yours.value.shape != plain.value.shape or not torch.equal(yours.value, plain.value):
        raise Wrong(f"{where}: the value differs from the plain one.")
    if any(yours.forwards):
        raise Wrong(f"{where}: autograd was on in the first run, so everything inside was kept.")
    if (len(yours.forwards), len(yours.backwards)) != (times, times):
        raise Wrong(
            f"{where}: function ran {len(yours.forwards)} times forwards and"
            f" {len(yours.backwards)} times backwards; {times} and {times} were expected."
        )
    for mine, theirs in zip(yours.gradients, plain.gradients, strict=True):
        _judge_gradient(mine, theirs, where)
    if not yours.in_place:
        raise Wrong(
            f"{where}: after backward the random generator stands elsewhere than before it; every"
            " later random number of the program changes."
        )


def _judge_gradient(mine: torch.Tensor | None, theirs: torch.Tensor | None, where: str) -> None:
    if (mine is None) != (theirs is None):
        missing = "missing" if mine is None else "there and should not be"
        raise Wrong(f"{where}: a gradient is {missing}.")
    if theirs is not None and not torch.equal(mine, theirs):
        at = int((mine != theirs).flatten().nonzero()[0])
        got, want = apart(float(mine.flatten()[at]), float(theirs.flatten()[at]))
        raise Wrong(
            f"{where}: a gradient is {got} where the plain one is {want}; it must be equal bit for"
            " bit. Does the second run see the same inputs and the same random numbers?"
        )


class _Scale(TorchDispatchMode):
    """Notes each storage that is made, and whether the function made it or the code around it."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.made = False, {}

    def __torch_dispatch__(
        self, func: object, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                note = (StorageWeakRef(storage), storage.nbytes(), self.inside)
                self.made.setdefault(storage._cdata, note)
        return out

    def held(self, known: set[int]) -> Iterator[tuple[int, bool]]:
        """(bytes, made inside) of what still exists, without the known storages."""
        for key, (storage, size, inside) in self.made.items():
            if key not in known and not storage.expired():
                yield size, inside


_SPARE = 8192  # bytes that an answer may hold beside its inputs: a random state has 5,056


def _weigh(cls: type, rng: np.random.Generator) -> None:
    """Of a function whose every inner tensor is a hundred times its input nothing is held between
    the passes; its slope in a drawn direction is what finite differences say.
    """
    n, scale = 96, _Scale()
    x, direction, w = (torch.from_numpy(rng.normal(size=s)) for s in ((n, 1), (n, 1), (1, n)))
    weights = torch.from_numpy(rng.normal(size=(n, n)))
    x.requires_grad_()

    def function(x: torch.Tensor) -> torch.Tensor:
        scale.inside = True
        y = (x * w).sin().exp().tanh() + (x - w).cos()
        scale.inside = False
        return y

    with scale:
        y = cls.apply(function, x)
    known = {t.untyped_storage()._cdata for t in (x, y, w)}
    if any(scale.held(known)):
        gc.collect()  # cycles of references
    held = list(scale.held(known))
    inside = sum(size for size, made_inside in held if made_inside)
    if inside or sum(size for size, _ in held) > x.nbytes + _SPARE:
        raise Wrong(
            f"between the passes {sum(size for size, _ in held):,} bytes are held that were not"
            f" there before, beside the output; {inside:,} of them were made inside function. Its"
            f" input has {x.nbytes:,}. Keep what went in, and nothing else."
        )
    (y * weights).sum().backward()
    h = 1e-6
    with torch.no_grad():
        ends = [float((function(x + s * h * direction) * weights).sum()) for s in (1, -1)]
    slope, want = float((x.grad * direction).sum()), (ends[0] - ends[1]) / (2 * h)
    # Two values of at most 1e4 are rounded to 1e-12 each: the quotient is good to 1e-6.
    if not close(slope, want, rel=1e-4, absolute=1e-3):
        yours, due = apart(slope, want)
        raise Wrong(f"in fp64 the slope is {yours}; finite differences say {due}.")


_FEWEST = [(47, 5, 4.0), (54, 2, 17.0), (58, 4, 12.0), (36, 6, 1.0), (35, 1, 10.0), (50, 5, 19.0)]


@exercise("08.C")
def plan(answer: Probe, rng: np.random.Generator) -> None:
    """Within the budget to the byte, and no set that fits takes less time."""
    two = [(10, 1, 3.0), (10, 1, 2.0)]
    cases = [(two, budget) for budget in (20, 19, 12, 11, 10)]
    cases += [([(7, 2, 1.0)], budget) for budget in (9, 7, 6)]
    cases += [
        ([(10, 4, 1.0), (5, 1, 3.0)], 13),  # block 0 holds 14 while it is computed again
        ([(20, 1, 9.0), (10, 1, 1.0), (5, 1, 1.0)], 31),  # most bytes for its time, not most bytes
        ([(9, 4, 1.0), (9, 1, 5.0), (9, 1, 1.0)], 12),  # nothing is as cheap as all but the last
        ([(5, 1, 1.0)] * 4, 8),
        ([(9, 1, 0.75), (9, 1, 0.5), (30, 1, 0.25)], 40),  # 0.5 s
        ([(20, 1, 8.0), (10, 1, 5.0), (10, 1, 5.0), (30, 1, 1.0)], 52),  # 8 s, or 5 s and 5 s
        (_FEWEST, 194),  # three blocks in 15 s; two take 16
        (_FEWEST[::-1], 194),
    ]
    for trial in range(14):
        insides = [int(v) for v in rng.integers(5, 60, int(rng.integers(3, 8)))]
        blocks = [
            (inside, int(rng.integers(1, inside)), float(rng.integers(1, 80)) / 4)
            for inside in insides
        ]
        peaks = sorted({_peak(blocks, c) for c in _sets(len(blocks))})
        budget = peaks[int(rng.integers(0, len(peaks)))]  # to the byte
        cases.append((blocks, budget if trial else peaks[0] - 1))
    for blocks, budget in cases:
        _judge(answer(list(blocks), budget), blocks, budget)


def _judge(got: object, blocks: list[tuple], budget: int) -> None:
    where = f"for the blocks {blocks} and a budget of {budget}"
    fitting = [c for c in _sets(len(blocks)) if _peak(blocks, c) <= budget]
    if not fitting:
        if got is not None:
            raise Wrong(f"{where} nothing fits, so None is due; you returned {said(got)}.")
        return
    best = min(fitting, key=lambda c: sum(blocks[i][2] for i in c))
    if got is None:
        raise Wrong(f"{where} the set {list(best)} fits; you returned None.")
    chosen = [whole(i, where) for i in sequence(got, where)]
    if chosen != sorted(set(chosen)) or not set(chosen) <= set(range(len(blocks))):
        raise Wrong(
            f"{where}: a sorted list of different indices was expected; you returned {said(got)}."
        )
    peak, (time, fastest) = (
        _peak(blocks, chosen),
        [sum(blocks[i][2] for i in c) for c in (chosen, best)],
    )
    if peak > budget:
        raise Wrong(
            f"{where} your set {chosen} has a peak of {peak}. What is held while a block is"
            " computed again?"
        )
    if time > fastest and not close(time, fastest):
        raise Wrong(
            f"{where} your set {chosen} takes {time:g} s; {list(best)} takes {fastest:g} s."
        )


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
        if i in chosen:  # its input stays while all that it keeps is made again
            peak = max(peak, sum(held) + blocks[i][0])
        peak = max(peak, sum(held))
        held.pop()
    return peak
