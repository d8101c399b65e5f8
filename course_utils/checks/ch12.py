"""Checks of chapter 12, TensorRT."""

import json

import numpy as np

from course_utils.exercises import Probe, Wrong, exercise

HEAVY = ("Conv", "Gemm")


@exercise("12.A")
def place_pairs(answer: Probe, rng: np.random.Generator) -> None:
    """Every heavy input once, no bias, and of each Add no more than it needs."""
    chain = [("Conv", ["x", "w1", "b1"], "a"), ("Relu", ["a"], "r")]
    cases = [chain, [*chain, ("Conv", ["r", "w2", "b2"], "c"), ("Add", ["c", "r"], "s")]]
    branch = [
        ("Conv", ["x", "w2", "b2"], "c"),
        ("Add", ["a", "c"], "s"),
        ("Conv", ["c", "w3", "b3"], "d"),
    ]
    cases.append([chain[0], *branch])  # c is read by a convolution that comes after the Add
    cases += [_network(rng) for _ in range(20)]
    for nodes in cases:
        _judge_pairs(answer(list(nodes)), nodes)


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


def _judge_pairs(got: object, nodes: list[tuple]) -> None:
    where = f"in the graph {nodes}" if len(nodes) < 6 else f"in a graph of {len(nodes)} nodes"
    if not isinstance(got, list) or not all(isinstance(t, str) for t in got):
        raise Wrong(f"a list of tensor names was expected; you returned {got!r}.")
    if twice := sorted({t for t in got if got.count(t) > 1}):
        raise Wrong(f"{where}, {twice[0]} has two pairs: a tensor that two nodes read needs one.")
    heavy = {t for op, inputs, _ in nodes if op in HEAVY for t in inputs[:2]}
    if missing := sorted(heavy - set(got)):
        reader = next(n for n in nodes if n[0] in HEAVY and missing[0] in n[1])
        raise Wrong(
            f"{where}, {missing[0]} has no pair, and {reader[0]} {reader[2]} reads it: it can't run"
            " on integers."
        )
    for inputs, output in [(inputs, output) for op, inputs, output in nodes if op == "Add"]:
        if not set(inputs) & set(got):
            raise Wrong(
                f"{where}, no input of Add {output} has a pair: the residual travels in floating"
                " point."
            )
        if set(inputs) <= set(got) and not set(inputs) <= heavy:
            spare = next(t for t in inputs if t not in heavy)
            raise Wrong(
                f"{where}, both inputs of Add {output} have a pair. {spare} needs none: left alone,"
                " the Add is fused with what makes it."
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
    _judge_profile(
        answer, [2, 9, 9, 9], lambda n, tuned: n * (1 + abs(np.log2(n / tuned)))
    )  # the largest is the best
    for trial in range(25):
        top = int(rng.integers(3, 40))
        trace = [int(n) for n in rng.integers(1, top + 1, int(rng.integers(1, 30)))]
        if trial == 0:
            trace = [5]
        elif trial < 6:  # a few huge batches among many small ones
            trace += [top * 3] * int(rng.integers(1, 4))
        _judge_profile(answer, trace, _costs(rng))


def _costs(rng: np.random.Generator) -> object:
    """Time of a batch of n on an engine tuned for `tuned`: work, plus a penalty that differs
    upwards and downwards.
    """
    fixed, each = rng.uniform(0.5, 3), rng.uniform(0.05, 0.5)
    up, down = rng.uniform(0.0, 1.0, 2)

    def seconds(n: int, tuned: int) -> float:
        apart = np.log2(n / tuned)
        return float((fixed + each * n) * (1 + (up * apart if apart > 0 else -down * apart)))

    return seconds


def _judge_profile(answer: Probe, trace: list[int], seconds: object) -> None:
    got = answer(list(trace), seconds)
    shown = (
        f"the trace {trace if len(trace) < 12 else [*trace[:10], '…']} (from {min(trace)} to"
        f" {max(trace)})"
    )
    try:
        low, best, high = (int(v) for v in got)
        whole = all(float(v) == int(v) for v in got)
    except (TypeError, ValueError):
        raise Wrong(
            f"three whole numbers (min, opt, max) were expected; you returned {got!r}."
        ) from None
    if not whole or not low <= best <= high:
        raise Wrong(f"min ≤ opt ≤ max in whole numbers is due; you returned {got!r}.")
    if low > min(trace) or high < max(trace):
        raise Wrong(f"for {shown} your profile {low} … {high} leaves a batch outside.")
    if low < min(trace) or high > max(trace):
        raise Wrong(
            f"for {shown} your profile {low} … {high} reaches further than the trace: memory is"
            " reserved for its largest shape, and kernels are ruled out that can't take the"
            " smallest."
        )
    costs = {o: sum(seconds(n, o) for n in trace) for o in range(low, high + 1)}
    if costs[best] > min(costs.values()) * (1 + 1e-9):
        o = min(costs, key=costs.get)
        raise Wrong(
            f"for {shown}, tuned for {best} it takes {costs[best]:.3g} s in all; tuned for {o},"
            f" {costs[o]:.3g} s."
        )


@exercise("12.C")
def read_dump(answer: Probe, rng: np.random.Generator) -> None:
    """Each convolution in floating point and each layer that a convolution could have taken in, and
    no other.
    """
    for trial in range(25):
        text, wanted, why = _dump(rng, trial)
        got = answer(text)
        if not isinstance(got, dict):
            raise Wrong(
                "a dict from layer name to 'precision' or 'fusion' was expected; you returned"
                f" {got!r}."
            )
        for name in sorted(set(wanted) | set(got)):
            if got.get(name) != wanted.get(name):
                said = f"you say {got[name]!r}" if name in got else "you leave it out"
                raise Wrong(f"layer {name!r}: {said}. {why[name]}")


def _dump(rng: np.random.Generator, trial: int) -> tuple[str, dict, dict]:
    """A synthetic dump in the inspector's form with known faults: the text, {name: fault}, and
    {name: what it is}.
    """
    layers, wanted, why, current = [], {}, {}, ("image", "INT8")

    def add(
        name: str, kind: str, reads: list, writes: tuple, nodes: str, note: str, fault: str = ""
    ) -> None:
        tensors = [
            [{"Name": t, "Format/Datatype": f"Row major {d} format"} for t, d in side]
            for side in (reads, [writes])
        ]
        meta = "\u001e".join(f"[ONNX Layer: {n}]" for n in nodes.split())
        layers.append(
            {
                "Name": name,
                "LayerType": kind,
                "Inputs": tensors[0],
                "Outputs": tensors[1],
                "Metadata": meta,
            }
        )
        why[name] = note
        if fault:
            wanted[name] = fault

    for i in range(int(rng.integers(3, 7))):
        mark, draw = f"{i}_{rng.integers(1000)}", rng.random() if trial else 0.0
        wide = rng.random() < 0.3
        if wide and current[1] == "INT8":
            add(
                f"reformat {mark}",
                "Reformat",
                [current],
                (f"f{mark}", "FP16"),
                "",
                "It is a Reformat, a consequence and no fault.",
            )
            current = (f"f{mark}", "FP16")
        reads, out = current, (f"t{mark}", "INT8" if rng.random() < 0.7 else "FP16")
        fault = "precision" if reads[1] != "INT8" else ""
        note = f"It is a convolution, and its first input is {reads[1]}."
        # A fused ReLU stands in the convolution's own name.
        tail = " + relu_f" if rng.random() < 0.5 else ""
        add(
            f"conv_{mark}{tail}",
            "CaskConvolution",
            [reads],
            out,
            f"conv_{mark}{tail.replace(' +', '')}",
            note,
            fault,
        )
        current = out
        if draw < 0.3:
            twice = rng.random() < 0.5
            note = "It reads a convolution's output, " + (
                "and so does another layer: a fused kernel could not serve both."
                if twice
                else "nobody else does, and its only ONNX node is a Relu or an Add."
            )
            node = str(rng.choice(["relu", "add"])) + f"_{mark}"
            add(
                f"PWN({node})",
                "PointWiseV2",
                [out],
                (f"p{mark}", out[1]),
                node,
                note,
                "" if twice else "fusion",
            )
            if twice:
                add(
                    f"pool_{mark}",
                    "Pooling",
                    [out],
                    (f"q{mark}", out[1]),
                    f"pool_{mark}",
                    "It is a pooling layer.",
                )
            current = (f"p{mark}", out[1])
        elif draw < 0.5:
            add(
                f"pool_{mark}",
                "CaskPooling",
                [out],
                (f"q{mark}", out[1]),
                f"pool_{mark}",
                "It is a pooling layer.",
            )
            node = f"relu_{mark}"
            note = "It reads the output of a pooling layer, which takes nothing in."
            add(
                f"PWN({node})",
                "PointWiseV2",
                [(f"q{mark}", out[1])],
                (f"p{mark}", out[1]),
                node,
                note,
            )
            current = (f"p{mark}", out[1])
    return json.dumps({"Layers": layers}), wanted, why
