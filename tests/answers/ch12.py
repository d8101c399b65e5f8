"""Answers to chapter 12's exercises."""

import re

import numpy as np

from answers import right, wrong

HEAVY = ("Conv", "Gemm")


def _heavy(nodes):
    return list(dict.fromkeys(t for op, inputs, _ in nodes if op in HEAVY for t in inputs[:2]))


def _made(nodes):
    return {output for op, _, output in nodes if op in HEAVY}


@right("12.A", "a tuple, the other input where either may be taken")
def last_input(nodes):
    chosen = _heavy(nodes)
    for op, inputs, _ in nodes:
        if op == "Add" and not set(inputs) & set(chosen):
            free = [t for t in inputs if t not in _made(nodes)] or inputs
            chosen.append(free[-1])
    return tuple(chosen)


@right("12.A", "a generator")
def generated(nodes):
    heavy, made = _heavy(nodes), _made(nodes)
    yield from heavy
    residuals = set()
    for op, inputs, _ in nodes:
        if op == "Add" and not set(inputs) & (set(heavy) | residuals):
            residuals.add(min(inputs, key=lambda t: t in made))
    yield from sorted(residuals)


@wrong("12.A", "the pair on the convolution's own output")
def own_output(nodes):
    chosen = _heavy(nodes)
    for op, inputs, _ in nodes:
        if op == "Add" and not set(inputs) & set(chosen):
            chosen.append(max(inputs, key=lambda t: t in _made(nodes)))
    return chosen


@wrong("12.A", "always the first input of an Add")
def first_input(nodes):
    chosen = _heavy(nodes)
    for op, inputs, _ in nodes:
        if op == "Add" and not set(inputs) & set(chosen):
            chosen.append(inputs[0])
    return chosen


@wrong("12.A", "always the second input of an Add")
def second_input(nodes):
    chosen = _heavy(nodes)
    for op, inputs, _ in nodes:
        if op == "Add" and not set(inputs) & set(chosen):
            chosen.append(inputs[1])
    return chosen


@wrong("12.A", "the Adds are left out")
def no_adds(nodes):
    return _heavy(nodes)


@wrong("12.A", "each Add gets one more pair")
def one_more(nodes):
    chosen = _heavy(nodes)
    for op, inputs, _ in nodes:
        if op == "Add":
            chosen += [t for t in inputs if t not in _made(nodes) and t not in chosen][:1]
    return chosen


@wrong("12.A", "Gemm is forgotten")
def conv_alone(nodes):
    return last_input([node for node in nodes if node[0] != "Gemm"])


@wrong("12.A", "the data alone, no weights")
def data_alone(nodes):
    weights = {inputs[1] for op, inputs, _ in nodes if op in HEAVY}
    return [t for t in last_input(nodes) if t not in weights]


@wrong("12.A", "the pairs behind the heavy nodes, not before")
def behind(nodes):
    return sorted(_made(nodes))


@wrong("12.A", "all that any node reads")
def all_inputs(nodes):
    return list(dict.fromkeys(t for _, inputs, _ in nodes for t in inputs[:2]))


def _total(trace, seconds, tuned):
    return sum(seconds(n, tuned) for n in trace)


@right("12.B", "NumPy")
def with_numpy(trace, seconds):
    low, high = np.min(trace), np.max(trace)
    every = np.arange(low, high + 1)
    return np.array([low, every[np.argmin([_total(trace, seconds, int(o)) for o in every])], high])


@right("12.B", "each size once, times its number")
def by_count(trace, seconds):
    sizes = {n: trace.count(n) for n in trace}
    cost = {
        o: sum(k * seconds(n, o) for n, k in sizes.items())
        for o in range(min(sizes), max(sizes) + 1)
    }
    return [float(min(sizes)), float(min(cost, key=cost.get)), float(max(sizes))]


def _profile(candidates):
    def profile(trace, seconds):
        best = min(candidates(trace), key=lambda o: _total(trace, seconds, o))
        return min(trace), best, max(trace)

    return profile


wrong("12.B", "opt among the sizes that came")(_profile(set))
wrong("12.B", "the mean")(_profile(lambda t: [round(sum(t) / len(t))]))
wrong("12.B", "the median")(_profile(lambda t: [int(np.median(t))]))
wrong("12.B", "powers of two and the ends")(
    _profile(lambda t: {min(t), max(t)} | {n for n in (2, 4, 8, 16, 32) if min(t) <= n <= max(t)})
)
wrong("12.B", "one beyond the trace")(_profile(lambda t: range(min(t), max(t) + 2)))
wrong("12.B", "one below the trace")(_profile(lambda t: range(max(min(t) - 1, 1), max(t) + 1)))
wrong("12.B", "the trace is taken for sorted")(
    lambda t, s: (t[0], min(range(t[0], t[-1] + 1), key=lambda o: _total(t, s, o)), t[-1])
)
wrong("12.B", "the largest batch alone counts")(
    lambda t, s: (min(t), min(range(min(t), max(t) + 1), key=lambda o: s(max(t), o)), max(t))
)
wrong("12.B", "the arguments of seconds exchanged")(
    lambda t, s: (
        min(t),
        min(range(min(t), max(t) + 1), key=lambda o: sum(s(o, n) for n in t)),
        max(t),
    )
)
wrong("12.B", "the slowest")(
    lambda t, s: (min(t), max(range(min(t), max(t) + 1), key=lambda o: _total(t, s, o)), max(t))
)


@wrong("12.B", "a search that takes the curve for one valley")
def ternary(trace, seconds):
    low, high = min(trace), max(trace)
    while high - low > 2:
        a, b = low + (high - low) // 3, high - (high - low) // 3
        if _total(trace, seconds, a) <= _total(trace, seconds, b):
            high = b
        else:
            low = a
    best = min(range(low, high + 1), key=lambda o: _total(trace, seconds, o))
    return min(trace), best, max(trace)


@wrong("12.B", "opt alone")
def opt_alone(trace, seconds):
    return _profile(lambda t: range(min(t), max(t) + 1))(trace, seconds)[1]


def _faults(
    *,
    is_int8=lambda tensors: tensors[0].dtype == "int8",
    movable=lambda nodes: bool(nodes) and all(re.match("relu|add", n) for n in nodes),
    nodes_of=lambda layer: layer.nodes,
    inputs_of=lambda layer: layer.inputs,
    is_conv=lambda layer: "Convolution" in layer.kind,
    alone=lambda count: count == 1,
):
    """The right answer, with one of its decisions exchanged."""

    def faults(layers):
        found = {}
        for layer in layers:
            if is_conv(layer):
                if not is_int8(layer.inputs):
                    found[layer.name] = "precision"
                continue
            names = {t.name for t in inputs_of(layer)}
            for other in layers:
                made = names & {t.name for t in other.outputs}
                readers = [x for x in layers if made & {t.name for t in x.inputs}]
                if made and is_conv(other) and alone(len(readers)) and movable(nodes_of(layer)):
                    found[layer.name] = "fusion"
        return found

    return faults


right("12.C", "two loops, one in the other")(_faults())


class Reader:
    def __call__(self, layers):
        return {str(name): fault for name, fault in _faults()(tuple(layers)).items()}


right("12.C", "an object that is called")(Reader())


@right("12.C", "a dict of its own kind")
def own_kind(layers):
    from collections import OrderedDict

    return OrderedDict(sorted(_faults()(layers).items()))


wrong("12.C", "fp16 alone is a fault")(_faults(is_int8=lambda t: t[0].dtype != "fp16"))
wrong("12.C", "fp16 and fp32 are faults")(
    _faults(is_int8=lambda t: t[0].dtype not in ("fp16", "fp32"))
)
wrong("12.C", "any eight bits will do")(_faults(is_int8=lambda t: t[0].dtype.endswith("8")))
wrong("12.C", "the last input")(_faults(is_int8=lambda t: t[-1].dtype == "int8"))
wrong("12.C", "any input in int8 will do")(
    _faults(is_int8=lambda t: any(x.dtype == "int8" for x in t))
)
wrong("12.C", "every input must be int8")(
    _faults(is_int8=lambda t: all(x.dtype == "int8" for x in t))
)
wrong("12.C", "any node will do")(
    _faults(movable=lambda nodes: any(re.match("relu|add", n) for n in nodes))
)
wrong("12.C", "the first node decides")(
    _faults(movable=lambda nodes: bool(nodes) and bool(re.match("relu|add", nodes[0])))
)
wrong("12.C", "the last node decides")(
    _faults(movable=lambda nodes: bool(nodes) and bool(re.match("relu|add", nodes[-1])))
)
wrong("12.C", "relu anywhere in a node's name")(
    _faults(movable=lambda nodes: bool(nodes) and all(re.search("relu|add", n) for n in nodes))
)
wrong("12.C", "relu alone")(
    _faults(movable=lambda nodes: bool(nodes) and all(n.startswith("relu") for n in nodes))
)
wrong("12.C", "a layer without nodes is a fault")(
    _faults(movable=lambda nodes: all(re.match("relu|add", n) for n in nodes))
)
wrong("12.C", "the layer's name in place of its nodes")(
    _faults(nodes_of=lambda layer: re.findall(r"PWN\((\w+)\)", layer.name))
)
wrong("12.C", "its first input alone")(_faults(inputs_of=lambda layer: layer.inputs[:1]))
wrong("12.C", "its last input alone")(_faults(inputs_of=lambda layer: layer.inputs[-1:]))
wrong("12.C", "however many read it")(_faults(alone=lambda count: True))
wrong("12.C", "a convolution by its exact kind")(
    _faults(is_conv=lambda layer: layer.kind == "CaskConvolution")
)
wrong("12.C", "a convolution by its name")(
    _faults(is_conv=lambda layer: "conv" in layer.name.lower())
)


@wrong("12.C", "the layer before it in the list")
def the_one_before(layers):
    found, before = {}, ""
    for layer in layers:
        if "Convolution" in layer.kind:
            if layer.inputs[0].dtype != "int8":
                found[layer.name] = "precision"
        elif "relu" in str(layer.nodes) and "Convolution" in before:
            found[layer.name] = "fusion"
        before = layer.kind
    return found


@wrong("12.C", "the faults' names alone")
def names_alone(layers):
    return list(_faults()(layers))
