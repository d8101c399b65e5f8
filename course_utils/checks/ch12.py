"""Checks of chapter 12, TensorRT."""

from collections.abc import Callable, Mapping

import numpy as np

from course_utils.checks.accept import apart, close, said, sequence, whole
from course_utils.exercises import Probe, Wrong, exercise
from course_utils.trt.inspection import Layer, Tensor

HEAVY = ("Conv", "Gemm")
_CHAIN = [("Conv", ["x", "w1", "b1"], "a"), ("Relu", ["a"], "r")]
_GRAPHS = [
    [("Gemm", ["x", "w", "b"], "y")],
    [("Conv", ["x", "w"], "y")],  # without a bias
    [("Conv", ["x", "w1"], "a"), ("Conv", ["x", "w1"], "b")],  # read twice: one pair each
    [*_CHAIN, ("Conv", ["r", "w2", "b2"], "c"), ("Add", ["c", "r"], "s")],
    # The residual is first, or second; nobody heavy reads it.
    [*_CHAIN, ("MaxPool", ["r"], "m"), ("Conv", ["x", "w2"], "c"), ("Add", ["m", "c"], "s")],
    [*_CHAIN, ("MaxPool", ["r"], "m"), ("Conv", ["x", "w2"], "c"), ("Add", ["c", "m"], "s")],
    [_CHAIN[0], ("Conv", ["x", "w2"], "c"), ("Add", ["a", "c"], "s")],  # a Conv makes both
    [("Relu", ["x"], "r"), ("MaxPool", ["x"], "m"), ("Add", ["r", "m"], "s")],  # and neither
    [("Relu", ["x"], "r"), ("Gemm", ["x", "w", "b"], "g"), ("Add", ["r", "g"], "s")],
    [("Relu", ["x"], "r"), ("Gemm", ["x", "w", "b"], "g"), ("Add", ["g", "r"], "s")],
    # The Add comes first, then the Conv that reads one of its inputs.
    [
        *[("Conv", ["x", "w1"], "a"), ("Relu", ["x"], "r"), ("Add", ["a", "r"], "s")],
        ("Conv", ["a", "w2"], "d"),
    ],
    # Two Adds with one residual: one pair serves both.
    [
        *[("Relu", ["x"], "r"), ("Conv", ["x", "w1"], "a"), ("Conv", ["x", "w2"], "c")],
        *[("Add", ["a", "r"], "s"), ("Add", ["r", "c"], "t")],
    ],
    [("Relu", ["x"], "r")],
    [],
]


@exercise("12.A")
def place_pairs(answer: Probe, rng: np.random.Generator) -> None:
    """Every heavy input once, no bias, and of each Add the residual where it needs one."""
    for nodes in [*_GRAPHS, *(_network(rng) for _ in range(20))]:
        where = f"in the graph {nodes}" if len(nodes) < 6 else f"in a graph of {len(nodes)} nodes"
        got = sequence(answer(list(nodes)), where)
        if not all(isinstance(t, str) for t in got):
            raise Wrong(f"{where}: a list of tensor names was expected; you returned {said(got)}.")
        _judge_pairs(got, nodes, where)


def _network(rng: np.random.Generator) -> list[tuple]:
    """A random network: each node reads tensors that are there, no two Adds the same one, and it
    ends in a Gemm.
    """
    nodes, there, added = [], ["image"], set()
    for i in range(int(rng.integers(4, 12))):
        op = str(rng.choice(["Conv", "Conv", "Relu", "Add", "MaxPool"]))
        near = [t for t in there[-4:] if op != "Add" or t not in added]
        if op == "Add" and len(near) < 2:
            op, near = "Conv", there[-4:]
        some = [str(t) for t in rng.choice(near, 2 if op == "Add" else 1, replace=False)]
        added |= set(some) if op == "Add" else set()
        mark = f"{op.lower()}{i}_{rng.integers(1000)}"
        nodes.append((op, some + ([f"{mark}.w", f"{mark}.b"] if op == "Conv" else []), mark))
        there.append(mark)
    return [*nodes, ("Gemm", [there[-1], "fc.w", "fc.b"], "logits")]


def _judge_pairs(got: list[str], nodes: list[tuple], where: str) -> None:
    if twice := sorted({t for t in got if got.count(t) > 1}):
        raise Wrong(f"{where}, {twice[0]} has two pairs: a tensor that two nodes read needs one.")
    heavy = {t for op, inputs, _ in nodes if op in HEAVY for t in inputs[:2]}
    made = {output for op, _, output in nodes if op in HEAVY}
    if missing := sorted(heavy - set(got)):
        reader = next(n for n in nodes if n[0] in HEAVY and missing[0] in n[1][:2])
        raise Wrong(
            f"{where}, {missing[0]} has no pair, and {reader[0]} {reader[2]} reads it: it can't run"
            " on integers."
        )
    for inputs, output in [(inputs, output) for op, inputs, output in nodes if op == "Add"]:
        paired = set(inputs) & set(got)
        if not paired:
            raise Wrong(
                f"{where}, no input of Add {output} has a pair: the residual travels in floating"
                " point."
            )
        spare = paired - heavy
        if len(paired) > 1 and spare:
            raise Wrong(
                f"{where}, both inputs of Add {output} have a pair. {min(spare)} needs none: left"
                " alone, the Add is fused with what makes it."
            )
        if spare & made and set(inputs) - made:
            raise Wrong(
                f"{where}, Add {output} has its pair on {min(spare)}, which a Conv or Gemm makes:"
                f" the pair stands between the two. Take {min(set(inputs) - made)}."
            )
    free = {t for op, inputs, _ in nodes if op == "Add" for t in inputs}
    if spare := sorted(set(got) - heavy - free):
        raise Wrong(
            f"{where}, {spare[0]} has a pair that nobody needs: no Conv or Gemm reads it as data or"
            " weight, and no Add."
        )


@exercise("12.B")
def choose_shapes(answer: Probe, rng: np.random.Generator) -> None:
    """The trace is covered, nothing beyond it is paid for, and no other tuning is faster."""
    fixed = [
        ([2, 9, 9, 9], lambda n, tuned: n * abs(n - tuned)),  # the largest is the best
        ([9, 2, 2, 2], lambda n, tuned: n * abs(n - tuned)),  # the smallest, and the trace unsorted
        ([1, 5], lambda n, tuned: (n - tuned) ** 2),  # 3 is best, and nobody sent 3
        ([1, 1, 1, 1, 9], lambda n, tuned: (n - tuned) ** 2),  # 3 again: 1 counts four times
        ([2, 4], lambda n, tuned: 10 - tuned),  # beyond the trace it would be faster still
        ([2, 4], lambda n, tuned: 10 + tuned),  # and here below it
        ([3, 6], lambda n, tuned: {3: 5, 4: 9, 5: 2, 6: 5}.get(tuned, 0)),  # two valleys
        ([1, 1, 1, 8], lambda n, tuned: n * (9 - tuned) if n == 8 else tuned / 3),
    ]
    for trace, seconds in fixed:
        _judge_profile(answer, trace, seconds)
    for trial in range(20):
        top = int(rng.integers(3, 40))
        trace = [int(n) for n in rng.integers(1, top + 1, int(rng.integers(1, 30)))]
        if trial == 0:
            trace = [5]
        elif trial < 6:  # a few huge batches among many small ones
            trace += [top * 3] * int(rng.integers(1, 4))
        _judge_profile(answer, trace, _engine(rng))


def _engine(rng: np.random.Generator) -> Callable[[int, int], float]:
    """Time of a batch of n on an engine tuned for `tuned`: work, a penalty that differs upwards and
    downwards, and kernels that are lucky or unlucky for no reason.
    """
    fixed, each = rng.uniform(0.5, 3), rng.uniform(0.05, 0.5)
    up, down = rng.uniform(0.0, 1.0, 2)
    luck = rng.uniform(0.8, 1.25, 400)

    def seconds(n: int, tuned: int) -> float:
        steps = np.log2(n / tuned)
        penalty = up * steps if steps > 0 else -down * steps
        return float((fixed + each * n) * (1 + penalty) * luck[tuned])

    return seconds


def _judge_profile(answer: Probe, trace: list[int], seconds: Callable) -> None:
    got = answer(list(trace), seconds)
    head = trace if len(trace) < 12 else [*trace[:10], "…"]
    where = f"for the trace {head} (from {min(trace)} to {max(trace)})"
    low, best, high = (whole(v, where) for v in sequence(got, f"{where}, (min, opt, max)", 3))
    if not low <= best <= high:
        raise Wrong(f"{where}: min ≤ opt ≤ max is due; you returned {(low, best, high)}.")
    if low > min(trace) or high < max(trace):
        raise Wrong(f"{where}, your profile {low} … {high} leaves a batch outside.")
    if low < min(trace) or high > max(trace):
        raise Wrong(
            f"{where}, your profile {low} … {high} reaches further than the trace: memory is"
            " reserved for its largest shape, and kernels are ruled out that can't take the"
            " smallest."
        )
    costs = {o: sum(seconds(n, o) for n in trace) for o in range(low, high + 1)}
    o = min(costs, key=costs.get)
    if costs[best] > costs[o] and not close(costs[best], costs[o], rel=1e-9):
        yours, least = apart(costs[best], costs[o])
        raise Wrong(f"{where}, tuned for {best} it takes {yours} s in all; tuned for {o}, {least}.")


_CONV, _POINT, _POOL = "CaskConvolution", "PointWiseV2", "CaskPooling"


def _layer(name: str, kind: str, reads: list[str], writes: str, nodes: str = "") -> Layer:
    """A layer of an engine. Tensors are "name type"; nodes are separated by blanks."""

    def tensors(said: list[str]) -> tuple[Tensor, ...]:
        return tuple(Tensor(*t.split()) for t in said)

    return Layer(name, kind, tensors(reads), tensors([writes]), "", tuple(nodes.split()))


def _after_conv(reads: list[str], nodes: str, kind: str = _POINT, name: str = "L") -> list[Layer]:
    """A convolution that writes c, a pooling layer that writes p, and one layer of this kind."""
    return [
        _layer("conv_a", _CONV, ["image int8"], "c int8", "conv_a"),
        _layer("pool_a", _POOL, ["image int8"], "p int8", "pool_a"),
        _layer(name, kind, reads, "out int8", nodes),
    ]


_RELU = _layer("PWN(relu_b)", _POINT, ["c int8"], "r int8", "relu_b")
_DUMPS = [  # the layers, the faults, and what the odd layer is
    ([_layer("k", _CONV, ["x int8"], "y fp16", "k")], {}, "its first input is int8"),
    ([_layer("k", _CONV, ["x fp8"], "y int8", "k")], {"k": "precision"}, "it reads fp8"),
    ([_layer("k", _CONV, ["x fp32"], "y int8", "k")], {"k": "precision"}, "it reads fp32"),
    ([_layer("k", _CONV, ["x bf16"], "y int8", "k")], {"k": "precision"}, "it reads bf16"),
    ([_layer("k", _CONV, ["x int8", "r fp16"], "y int8", "k add_k")], {}, "the first one counts"),
    (
        [_layer("k", _CONV, ["x fp16", "r int8"], "y int8", "k add_k")],
        {"k": "precision"},
        "its first input is fp16",
    ),
    (
        [_layer("k", "FusedConvolutionAct", ["x fp16"], "y int8", "k")],
        {"k": "precision"},
        "its kind contains Convolution",
    ),
    ([_layer("Convolution", _POOL, ["x fp16"], "y fp16", "conv_p")], {}, "it is a pooling layer"),
    (_after_conv(["c int8"], "relu_b"), {"L": "fusion"}, "it is a ReLU on conv_a's output"),
    (_after_conv(["c int8"], "relu_b", name="PWN(pool_b)"), {"PWN(pool_b)": "fusion"}, "a ReLU"),
    (_after_conv(["c int8"], "relu_b", "ElementWise"), {"L": "fusion"}, "its nodes tell"),
    (_after_conv(["c int8"], "add_b relu_b"), {"L": "fusion"}, "both of its nodes count"),
    (_after_conv(["c int8"], "relu_b sigmoid_b"), {}, "it holds a sigmoid, too"),
    (_after_conv(["c int8"], "sigmoid_b relu_b"), {}, "it holds a sigmoid, too"),
    (_after_conv(["c int8"], "prelu_b"), {}, "prelu_b does not begin with relu"),
    (_after_conv(["c int8"], "", "Reformat", "relu_copy"), {}, "it has no ONNX node"),
    (_after_conv(["p int8"], "relu_b"), {}, "it reads a pooling layer's output"),
    (_after_conv(["image int8"], "relu_b"), {}, "it reads what no layer makes"),
    (_after_conv(["p int8", "c int8"], "add_b"), {"L": "fusion"}, "it reads conv_a's output"),
    (_after_conv(["c int8", "p int8"], "add_b"), {"L": "fusion"}, "it reads conv_a's output"),
    (_after_conv(["c int8", "c int8"], "add_b"), {"L": "fusion"}, "no other layer reads it"),
    (_after_conv(["c int8"], "relu_b", _CONV), {}, "it is a convolution, and reads int8"),
    ([*_after_conv(["c int8"], "tanh_b"), _RELU], {}, "L reads c, too"),
    ([*_after_conv(["p int8", "c int8"], "tanh_b"), _RELU], {}, "L reads c, too"),
    ([_RELU, *_after_conv(["p int8"], "tanh_b")], {"PWN(relu_b)": "fusion"}, "the order is free"),
    ([], {}, ""),
]


@exercise("12.C")
def read_dump(answer: Probe, rng: np.random.Generator) -> None:
    """Each convolution in floating point and each layer that a convolution could have taken in, and
    no other.
    """
    for layers, wanted, note in _DUMPS:
        where = f"with the layers {layers}"
        why = f"{note[:1].upper()}{note[1:]}." if note else ""
        _judge_faults(answer, layers, wanted, dict.fromkeys(wanted, why), why, where)
    for _ in range(15):
        layers, wanted, notes = _dump(rng)
        where = f"in a dump of {len(layers)} layers"
        _judge_faults(answer, layers, wanted, notes, "", where)


def _judge_faults(
    answer: Probe, layers: list[Layer], wanted: dict, notes: dict, why: str, where: str
) -> None:
    got = answer(list(layers))
    if not isinstance(got, Mapping):
        raise Wrong(
            f"{where}: a dict from layer name to 'precision' or 'fusion' was expected; you returned"
            f" {said(got)}."
        )
    for name in sorted({*wanted, *map(str, got)}):
        if got.get(name) != wanted.get(name):
            yours = f"you say {said(got[name])}" if name in got else "you leave it out"
            raise Wrong(f"{where}, layer {name!r}: {yours}. {notes.get(name, why)}")


def _dump(rng: np.random.Generator) -> tuple[list[Layer], dict, dict]:
    """A drawn chain of blocks with known faults, in a drawn order: the layers, {name: fault}, and
    {name: what it is}.
    """
    layers, wanted, notes, current, dtype = [], {}, {}, "image", "int8"
    for i in range(int(rng.integers(3, 7))):
        mark = f"{i}_{rng.integers(1000)}"
        if rng.random() < 0.3:
            layers.append(
                _layer(f"copy {mark}", "Reformat", [f"{current} {dtype}"], f"f{mark} fp16")
            )
            notes[f"copy {mark}"] = "It is a Reformat: no fault."
            current, dtype = f"f{mark}", "fp16"
        name, out = f"conv_{mark}", str(rng.choice(["int8", "fp8", "fp16"]))
        layers.append(_layer(name, _CONV, [f"{current} {dtype}"], f"t{mark} {out}", name))
        notes[name] = f"It is a convolution, and its first input is {dtype}."
        if dtype != "int8":
            wanted[name] = "precision"
        current, dtype = f"t{mark}", out
        if rng.random() < 0.6:
            node, twice = f"{rng.choice(['relu', 'add'])}_{mark}", rng.random() < 0.5
            layers.append(
                _layer(f"PWN({node})", _POINT, [f"{current} {dtype}"], f"p{mark} {out}", node)
            )
            notes[f"PWN({node})"] = f"It reads a convolution's output, and so do {twice:d} others."
            if twice:
                side = [f"{current} {dtype}"]
                layers.append(_layer(f"pool_{mark}", _POOL, side, f"q{mark} {out}", f"pool_{mark}"))
                notes[f"pool_{mark}"] = "It is a pooling layer."
            else:
                wanted[f"PWN({node})"] = "fusion"
            current = f"p{mark}"
    return [layers[i] for i in rng.permutation(len(layers))], wanted, notes
