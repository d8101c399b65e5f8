"""Wrong answers to chapter 12's exercises, by somebody who has read only their texts."""

import json

from answers import wrong

# ---- A


def _pairs(
    nodes,
    *,
    ops=("Conv", "Gemm"),
    bias=False,
    add="rule",
    repeat=False,
    makers=("Conv", "Gemm"),
    data=True,
    weight=True,
    either=0,
    look_ahead=True,
):
    """The rules with switches."""
    chosen = []
    for op, inputs, _ in nodes:
        if op in ops:
            wanted = inputs[0 if data else 1 : 3 if bias else 2 if weight else 1]
            chosen += [t for t in wanted if repeat or t not in chosen]
        elif op == "Add" and not look_ahead:
            chosen += _residual(nodes, inputs, chosen, add, makers, either)
    if look_ahead:
        for op, inputs, _ in nodes:
            if op == "Add":
                chosen += _residual(nodes, inputs, chosen, add, makers, either)
    return chosen


def _residual(nodes, inputs, chosen, add, makers, either):
    made = {output for op, _, output in nodes if op in makers}
    if add == "none":
        return []
    if add == "both":
        return [t for t in dict.fromkeys(inputs) if t not in chosen]
    if add != "always" and any(t in chosen for t in inputs):
        return []
    if add == "first":
        return inputs[:1]
    if add == "second":
        return inputs[1:2]
    if add == "made":
        return [next((t for t in inputs if t in made), inputs[0])]
    wanted = next((t for t in inputs if t not in made), inputs[either])
    return [wanted] if wanted not in chosen else []


@wrong("12.A", "read only: the bias gets a pair, too")
def bias_too(nodes):
    return _pairs(nodes, bias=True)


@wrong("12.A", "read only: an Add gets nothing")
def no_add(nodes):
    return _pairs(nodes, add="none")


@wrong("12.A", "read only: both inputs of an Add get a pair")
def both_inputs(nodes):
    return _pairs(nodes, add="both")


@wrong("12.A", "read only: the residual gets a pair although the other input has one")
def always_residual(nodes):
    return _pairs(nodes, add="always")


@wrong("12.A", "read only: an Add's first input, a Conv makes it or not")
def first_input(nodes):
    return _pairs(nodes, add="first")


@wrong("12.A", "read only: an Add's second input, as in the example")
def second_input(nodes):
    return _pairs(nodes, add="second")


@wrong("12.A", "read only: the input that the Conv makes")
def conv_made(nodes):
    return _pairs(nodes, add="made")


@wrong("12.A", "read only: a tensor has a pair for each node that reads it")
def for_each_reader(nodes):
    return _pairs(nodes, repeat=True)


@wrong("12.A", "read only: Conv only, no Gemm")
def no_gemm(nodes):
    return _pairs(nodes, ops=("Conv",))


@wrong("12.A", "read only: what a Gemm makes counts as a residual")
def gemm_residual(nodes):
    return _pairs(nodes, makers=("Conv",))


@wrong("12.A", "read only: an Add does not see the Convs behind it")
def not_behind(nodes):
    return _pairs(nodes, look_ahead=False)


@wrong("12.A", "read only: no pairs on weights")
def no_weights(nodes):
    return _pairs(nodes, weight=False)


@wrong("12.A", "read only: weights only")
def weights_only(nodes):
    return _pairs(nodes, data=False)


@wrong("12.A", "read only: every node is asked, a Relu and a MaxPool, too")
def every_node(nodes):
    ops = {op for op, _, _ in nodes} - {"Add"}
    return _pairs(nodes, ops=tuple(ops))


@wrong("12.A", "read only: a Relu of a Conv counts as made by a Conv")
def relu_of_conv(nodes):
    return _pairs(nodes, makers=("Conv", "Gemm", "Relu"))


@wrong("12.A", "read only: remembers the tensors of the call before")
def remembers(nodes, seen=set()):  # noqa: B006
    found = [t for t in _pairs(nodes) if t not in seen]
    seen.update(found)
    return found


@wrong("12.A", "read only: the last Add of two gets nothing")
def one_add(nodes):
    adds = [n for n in nodes if n[0] == "Add"]
    return _pairs([n for n in nodes if n[0] != "Add" or n is adds[0]])


# ---- B


def _total(trace, seconds, tuned):
    return sum(seconds(n, tuned) for n in trace)


@wrong("12.B", "read only: opt is one of the trace's batches only")
def of_the_trace(trace, seconds):
    return min(trace), min(set(trace), key=lambda o: _total(trace, seconds, o)), max(trace)


@wrong("12.B", "read only: opt is the most frequent batch")
def most_frequent(trace, seconds):
    return min(trace), max(sorted(set(trace)), key=trace.count), max(trace)


@wrong("12.B", "read only: opt is the largest batch, as in the example")
def largest(trace, seconds):
    return min(trace), max(trace), max(trace)


@wrong("12.B", "read only: opt is the mean batch")
def mean(trace, seconds):
    return min(trace), round(sum(trace) / len(trace)), max(trace)


@wrong("12.B", "read only: opt is the median batch")
def median(trace, seconds):
    return min(trace), sorted(trace)[len(trace) // 2], max(trace)


@wrong("12.B", "read only: every batch size counts once, however often it came")
def counts_once(trace, seconds):
    options = range(min(trace), max(trace) + 1)
    return min(trace), min(options, key=lambda o: _total(set(trace), seconds, o)), max(trace)


@wrong("12.B", "read only: min is always 1")
def from_one(trace, seconds):
    options = range(min(trace), max(trace) + 1)
    return 1, min(options, key=lambda o: _total(trace, seconds, o)), max(trace)


@wrong("12.B", "read only: the last whole number is left out")
def last_left_out(trace, seconds):
    options = range(min(trace), max(trace)) or [max(trace)]
    return min(trace), min(options, key=lambda o: _total(trace, seconds, o)), max(trace)


@wrong("12.B", "read only: powers of two only")
def powers_of_two(trace, seconds):
    options = [o for o in range(min(trace), max(trace) + 1) if o & (o - 1) == 0] or [max(trace)]
    return min(trace), min(options, key=lambda o: _total(trace, seconds, o)), max(trace)


@wrong("12.B", "read only: the fastest at its own batch an image")
def own_batch(trace, seconds):
    options = range(min(trace), max(trace) + 1)
    return min(trace), min(options, key=lambda o: seconds(o, o) / o), max(trace)


@wrong("12.B", "read only: seconds with its arguments turned round")
def turned(trace, seconds):
    options = range(min(trace), max(trace) + 1)
    return min(trace), min(options, key=lambda o: sum(seconds(o, n) for n in trace)), max(trace)


@wrong("12.B", "read only: the slowest batch counts, not the total")
def slowest(trace, seconds):
    options = range(min(trace), max(trace) + 1)
    worst = {o: max(seconds(n, o) for n in trace) for o in options}
    return min(trace), min(options, key=worst.get), max(trace)


@wrong(
    "12.B", "read only: walks down from the largest as long as it helps, a valley may lie behind"
)
def walks_down(trace, seconds):
    opt = max(trace)
    while opt > min(trace) and _total(trace, seconds, opt - 1) < _total(trace, seconds, opt):
        opt -= 1
    return min(trace), opt, max(trace)


@wrong("12.B", "read only: max is opt, larger batches are not covered")
def max_is_opt(trace, seconds):
    options = range(min(trace), max(trace) + 1)
    opt = min(options, key=lambda o: _total(trace, seconds, o))
    return min(trace), opt, opt


@wrong("12.B", "read only: the first and the last batch of the trace for min and max")
def first_and_last(trace, seconds):
    low, high = sorted((trace[0], trace[-1]))
    options = range(low, high + 1)
    return low, min(options, key=lambda o: _total(trace, seconds, o)), high


# ---- C: written when the exercise gave the inspector's text, and read from it still


def _text(layers):
    """The inspector's JSON of these layers."""

    def tensors(found):
        return [{"Name": t.name, "Format/Datatype": f"linear {t.dtype} format"} for t in found]

    return json.dumps(
        {
            "Layers": [
                {
                    "Name": layer.name,
                    "LayerType": layer.kind,
                    "Metadata": "\x1e".join(f"[ONNX Layer: {n}]" for n in layer.nodes),
                    "Inputs": tensors(layer.inputs),
                    "Outputs": tensors(layer.outputs),
                }
                for layer in layers
            ]
        }
    )


def wrong_c(what):
    def register(reader):
        wrong("12.C", what)(lambda layers: reader(_text(layers)))
        return reader

    return register


def _faults(
    text,
    *,
    kind=lambda k: "Convolution" in k,
    int8=lambda t: "int8" in t.lower(),
    every=False,
    names=("relu", "add"),
    quantifier=all,
    readers=True,
    empty=False,
    fusion=True,
    precision=True,
    where="Inputs",
    first_only=False,
):
    layers = json.loads(text)["Layers"]
    makers = {t["Name"] for layer in layers if kind(layer["LayerType"]) for t in layer["Outputs"]}
    count = {}
    for layer in layers:
        for name in {t["Name"] for t in layer["Inputs"]}:
            count[name] = count.get(name, 0) + 1
    found = {}
    for layer in layers:
        if kind(layer["LayerType"]):
            types = [t["Format/Datatype"] for t in layer[where]]
            types = types if every else types[:1]
            if precision and not all(int8(t) for t in types):
                found[layer["Name"]] = "precision"
            continue
        nodes = [
            part.partition("ONNX Layer: ")[2].rstrip("]")
            for part in layer.get("Metadata", "").split("\x1e")
            if "ONNX Layer: " in part
        ]
        if not nodes and not empty:
            continue
        inputs = [t["Name"] for t in layer["Inputs"]]
        inputs = inputs[:1] if first_only else inputs
        could = any(t in makers and (not readers or count[t] == 1) for t in inputs)
        if fusion and could and quantifier(n.startswith(names) for n in nodes):
            found[layer["Name"]] = "fusion"
    return found


@wrong_c("read only: the answer for DUMP")
def for_dump(text):
    return {"PWN(relu2)": "fusion", "conv3": "precision"}


@wrong_c("read only: every input of a convolution must be INT8")
def every_input(text):
    return _faults(text, every=True)


@wrong_c("read only: the output's type instead of the first input's")
def output_type(text):
    return _faults(text, where="Outputs")


@wrong_c("read only: FP16 and FP32 alone are not INT8")
def floats_alone(text):
    return _faults(text, int8=lambda t: "fp16" not in t.lower() and "fp32" not in t.lower())


@wrong_c("read only: only a LayerType CaskConvolution is a convolution")
def cask_only(text):
    return _faults(text, kind=lambda k: k == "CaskConvolution")


@wrong_c("read only: a LayerType must end with Convolution")
def ends_with(text):
    return _faults(text, kind=lambda k: k.endswith("Convolution"))


@wrong_c("read only: one relu or add among the nodes is enough")
def any_node(text):
    return _faults(text, quantifier=any)


@wrong_c("read only: relu only, no add")
def relu_only(text):
    return _faults(text, names=("relu",))


@wrong_c("read only: no matter who else reads the convolution's output")
def other_readers(text):
    return _faults(text, readers=False)


@wrong_c("read only: a layer without ONNX nodes can be a fault")
def without_nodes(text):
    return _faults(text, empty=True)


@wrong_c("read only: the first input only can be a convolution's")
def first_only(text):
    return _faults(text, first_only=True)


@wrong_c("read only: precision faults only")
def precision_only(text):
    return _faults(text, fusion=False)


@wrong_c("read only: fusion faults only")
def fusion_only(text):
    return _faults(text, precision=False)


@wrong_c("read only: the convolution must stand before the layer")
def must_stand_before(text):
    layers = json.loads(text)["Layers"]
    found = _faults(text)
    made, kept = set(), {}
    for layer in layers:
        name = layer["Name"]
        behind = any(t["Name"] in made for t in layer["Inputs"])
        if name in found and (behind or found[name] == "precision"):
            kept[name] = found[name]
        if "Convolution" in layer["LayerType"]:
            made |= {t["Name"] for t in layer["Outputs"]}
    return kept


@wrong_c("read only: pointwise layers alone can be fusion faults")
def pointwise_only(text):
    layers = {layer["Name"]: layer["LayerType"] for layer in json.loads(text)["Layers"]}
    return {
        name: fault
        for name, fault in _faults(text).items()
        if fault == "precision" or layers[name].startswith("PointWise")
    }


@wrong_c("read only: the layer's name is searched for relu, not its nodes")
def by_name(text):
    layers = json.loads(text)["Layers"]
    for layer in layers:
        if "Convolution" not in layer["LayerType"]:
            fused = "relu" in layer["Name"] or "add" in layer["Name"]
            layer["Metadata"] = "[ONNX Layer: relu]" if fused else "[ONNX Layer: other]"
    return _faults(json.dumps({"Layers": layers}))


@wrong_c("read only: relu and add in any place of a node's name")
def anywhere(text):
    layers = json.loads(text)["Layers"]
    for layer in layers:
        meta = layer.get("Metadata", "")
        for word in ("relu", "add"):
            parts = meta.split("\x1e")
            meta = "\x1e".join(f"[ONNX Layer: {word}]" if word in p else p for p in parts)
        layer["Metadata"] = meta
    return _faults(json.dumps({"Layers": layers}))


@wrong_c("read only: the first ONNX node alone is looked at")
def first_node(text):
    layers = json.loads(text)["Layers"]
    for layer in layers:
        layer["Metadata"] = layer.get("Metadata", "").split("\x1e")[0]
    return _faults(json.dumps({"Layers": layers}))
