"""What chapter 12 teaches, on more inputs: the builder, the memory plan, pairs and types in an ONNX
file.
"""

import copy
import inspect
import time
import warnings

import numpy as np
import pytest
import torch
from conftest import taught
from torch import nn

from course_utils import machine, measure, models, onnx_int8, qdq, tactics, trt, typed

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import helper, numpy_helper  # noqa: E402


@pytest.fixture(scope="module")
def ch12():
    from onnxconverter_common import float16

    given = {"copy": copy, "time": time, "warnings": warnings, "onnx": onnx, "trt": trt}
    given |= {"float16": float16, "measure": measure, "tactics": tactics, "typed": typed}
    given |= {"TACTICS": {}, "some": None}
    space = taught("12", **given)
    given["TACTICS"] |= {"planes": space.Planes, "pixels": space.Pixels, "columns": space.Columns}
    return space


@pytest.fixture(scope="module")
def graph():
    """Two convolutions with a residual Add between ReLUs, random weights, batch left free."""
    rng = np.random.default_rng(5)
    shapes = {"w1": (6, 3, 3, 3), "b1": (6,), "w2": (6, 6, 3, 3), "b2": (6,)}
    weights = [
        numpy_helper.from_array(rng.normal(size=s).astype(np.float32) * 0.3, n)
        for n, s in shapes.items()
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["a"], name="c1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["r"], name="r1"),
        helper.make_node("Conv", ["r", "w2", "b2"], ["c"], name="c2", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c", "r"], ["y"], name="add"),
    ]
    ends = [
        helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", c, 8, 8])
        for n, c in (("x", 3), ("y", 6))
    ]
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.mark.parametrize(
    ("side", "stride", "padding"), [(1, 1, 0), (1, 2, 0), (3, 1, 1), (3, 2, 1), (5, 3, 2)]
)
def test_all_tactics_compute_the_same_convolution(ch12, side, stride, padding):
    conv = nn.Conv2d(3, 7, side, stride, padding).requires_grad_(False)
    x = torch.randn(4, 3, 11, 11)
    for tactic in (ch12.Planes, ch12.Pixels, ch12.Columns):
        torch.testing.assert_close(tactic(conv)(x), conv(x), atol=1e-4, rtol=1e-4)


def test_the_builder_measures_once_and_its_engine_agrees(ch12, monkeypatch):
    network = models.folded(models.mini_resnet(8, seed=1)).requires_grad_(False)
    x, cache, calls = torch.randn(2, 1, 28, 28), {}, []
    monkeypatch.setitem(
        inspect.unwrap(ch12.build).__globals__,
        "fastest",
        lambda call: calls.append(call()) or len(calls),
    )
    engine, plan = ch12.build(network, x, cache)
    torch.testing.assert_close(engine(x), network(x), atol=1e-4, rtol=0)
    assert set(plan.values()) == {"planes"}  # the first of each three was given the smallest time
    first = len(calls)
    assert ch12.build(network, x, cache)[1] == plan
    assert len(calls) == first == len(cache)
    ch12.build(network, torch.randn(3, 1, 28, 28), cache)
    assert len(calls) == 2 * first  # another shape is another key


def test_a_race_in_place_times_the_whole_network(ch12, monkeypatch):
    network, x = (
        models.folded(models.mini_resnet(8, seed=1)).requires_grad_(False),
        torch.randn(2, 1, 28, 28),
    )
    outputs = []
    # two of the nine convolutions are alike; in place, the second tactic is the fastest
    times = iter([1.0] * 24 + [3.0, 1.0, 2.0] * 9)

    def fastest(call, repeat=7):
        outputs.append(call())
        return next(times)

    monkeypatch.setitem(inspect.unwrap(ch12.build).__globals__, "fastest", fastest)
    engine = ch12.build_in_place(network, x)
    assert [tuple(out.shape) for out in outputs[24:]] == [(2, 10)] * 27
    kinds = [type(m) for m in engine.modules() if isinstance(m, ch12.Planes)]
    assert kinds == [ch12.Pixels] * 9
    torch.testing.assert_close(engine(x), network(x), atol=1e-4, rtol=0)


def test_two_plans_are_apart_by_the_layers_that_differ(ch12):
    assert ch12.apart({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 3, "c": 2}) == 2
    assert ch12.apart({"a": 1}, {"a": 1}) == 0


def test_pairs_stand_on_the_named_tensors_alone_and_stay_within_half_a_step(ch12, graph, seeded):
    x = np.random.default_rng(seeded).normal(size=(5, 3, 8, 8)).astype(np.float32)
    amax = {n: float(np.abs(v).max()) for n, v in qdq.values(graph, {"x": x}).items()}
    chosen = ["x", "w1", "r", "w2"]
    made = qdq.insert_pairs(graph, chosen, amax, unsigned={"r"})
    onnx.checker.check_model(made)
    assert [n.input[0] for n in made.graph.node if n.op_type == "QuantizeLinear"] == [
        "x",
        "w1",
        "w2",
        "r",
    ]
    assert qdq.paired(made) == sorted(chosen)
    with pytest.raises(KeyError, match="nobody"):
        qdq.insert_pairs(graph, ["nobody"], amax)
    add = next(n for n in made.graph.node if n.op_type == "Add")
    assert list(add.input) == ["c", "r.dq"]
    values = qdq.values(made, {"x": x})
    steps = {"x": amax["x"] / 127, "r": amax["r"] / 255}
    for name, step in steps.items():
        # The pairs before r change it a little, so it may leave the range that was seen without
        # them: there it is clipped, and the half step counts from the end of the range. fp32 adds
        # five roundings of 2⁻²⁴ at up to 255 steps, 0.00008 of one.
        inside = np.clip(values[name], -amax[name], amax[name])
        assert np.abs(values[f"{name}.dq"] - inside).max() <= step * 0.5001
    assert values["r.q"].dtype == np.uint8
    assert values["x.q"].dtype == np.int8
    assert len(graph.graph.node) == 4, "the graph that was given is not changed"


def test_compare_outputs_sees_nan_shapes_and_a_turned_class(ch12):
    a = np.eye(4)
    assert ch12.compare_outputs(a, a + 1e-6)["largest gap"] < 1e-3
    broken = np.where(a == 1, np.nan, a)
    found = ch12.compare_outputs(a, broken)
    assert (found["finite (%)"], found["same class (%)"]) == (0.0, 0.0)
    assert np.isnan(found["largest gap"])
    broken = a.copy()
    broken[0, 1] = np.inf
    assert ch12.compare_outputs(a, broken)["same class (%)"] == 75
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        ch12.compare_outputs(a, a[:3])
    assert ch12.compare_outputs(a, a[[1, 0, 2, 3]])["same class (%)"] == 50


@pytest.fixture(scope="module")
def chain(graph):
    """Two convolutions with a ReLU between and one behind, no path around."""
    made = copy.deepcopy(graph)
    nodes = list(made.graph.node)[:3]
    del made.graph.node[:]
    made.graph.node.extend([*nodes, helper.make_node("Relu", ["c"], ["y"], name="r2")])
    return made


def test_rescaling_changes_no_answer_in_fp32_and_all_of_them_in_fp16(ch12, chain, seeded):
    x = torch.tensor(np.random.default_rng(seeded).normal(size=(5, 3, 8, 8)).astype(np.float32))
    stretched = ch12.rescaled(chain, 0, 2.0**20)
    plain = typed.run(chain, {"x": x})["y"]
    assert torch.equal(typed.run(stretched, {"x": x})["y"], plain)
    half, said = ch12.to_fp16(stretched)
    assert not torch.isfinite(typed.run(half, {"x": x})["y"]).all()
    assert any("truncated" in s or "10000" in s for s in said), said
    fine, nothing = ch12.to_fp16(chain)
    assert not [s for s in nothing if "10000" in s]
    # sums of sizes below 100, rounded to 2⁻¹¹ a few times: 0.25 at most, were all of one sign
    np.testing.assert_allclose(typed.run(fine, {"x": x})["y"], plain, atol=0.25)


def test_only_weights_in_fp32_survive_the_rescaling(ch12, chain, seeded):
    x = np.random.default_rng(seeded).normal(size=(5, 3, 8, 8)).astype(np.float32)
    feed, stretched = {"x": torch.tensor(x)}, ch12.rescaled(chain, 0, 2.0**20)
    plain = typed.run(chain, feed)["y"]
    wide = ["c1", "r1", "c2"]
    right, _ = ch12.to_fp16(stretched, wide)
    np.testing.assert_allclose(typed.run(right, feed)["y"], plain, atol=0.25)
    listed = copy.deepcopy(stretched)  # as torch's exporter writes it
    for i in stretched.graph.initializer:
        listed.graph.value_info.append(helper.make_tensor_value_info(i.name, i.data_type, i.dims))
    spoiled, _ = ch12.to_fp16(listed, wide)
    assert (typed.run(spoiled, feed)["y"] - plain).abs().max() > 2, (
        "onnxconverter now keeps listed weights: change the chapter"
    )
    unlisted, _ = ch12.to_fp16(ch12.weights_unlisted(listed), wide)
    np.testing.assert_allclose(typed.run(unlisted, feed)["y"], plain, atol=0.25)


def test_the_typed_executor_agrees_with_the_runtime_and_refuses_what_it_does_not_know(graph):
    x = np.random.default_rng(3).normal(size=(5, 3, 8, 8)).astype(np.float32)
    ours = typed.run(graph, {"x": torch.tensor(x)})
    theirs = qdq.values(graph, {"x": x})
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, atol=1e-5)
    with pytest.raises(TypeError, match=r"Conv c1 reads .*float16.*float32"):
        typed.run(graph, {"x": torch.tensor(x).half()})
    other = copy.deepcopy(graph)
    other.graph.node[1].op_type = "Sigmoid"
    with pytest.raises(NotImplementedError, match="Sigmoid r1"):
        typed.run(other, {"x": torch.tensor(x)})


def test_the_typed_executor_overflows_where_fp16_does(graph):
    """65,504 is the largest fp16; a convolution that reaches 70,000 must give infinity."""
    big = copy.deepcopy(graph)
    for i in big.graph.initializer:
        if i.name in ("w1", "b1"):
            i.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(i) * 0 + 1000, i.name))
    from onnxconverter_common import float16

    half = float16.convert_float_to_float16(big, keep_io_types=False)
    out = typed.run(half, {"x": torch.full((1, 3, 8, 8), 10.0, dtype=torch.float16)})
    assert torch.isinf(out["a"]).any()
    assert out["a"].dtype == torch.float16


@pytest.mark.skipif(
    not (machine.can("package:modelopt") and machine.can("package:lief")),
    reason="Model Optimizer comes with make setup-extended",
)
def test_model_optimizer_places_its_pairs_by_the_same_rules(tmp_path):
    """What the chapter says of it, on the chapter's network."""
    onnx_int8.export(models.baseline(), (torch.zeros(2, 1, 28, 28),), tmp_path / "fp32.onnx")
    np.savez(tmp_path / "images.npz", x=np.random.default_rng(0).random((8, 1, 28, 28), np.float32))
    given = [str(tmp_path / name) for name in ("fp32.onnx", "int8.onnx", "images.npz")]
    code = f"import json; from course_utils import nvidia; print(json.dumps(nvidia.int8(*{given})))"
    graph = onnx.load(tmp_path / "fp32.onnx").graph
    convs = [n for n in graph.node if n.op_type == "Conv"]
    ours = {t for n in convs for t in n.input[:2]}
    ours |= {n.input[1] for n in graph.node if n.op_type == "Add" and n.input[1] not in ours}
    assert measure.child(code, timeout=300).result == sorted(ours)
