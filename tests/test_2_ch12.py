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

from course_utils import measure, models, trt

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import helper, numpy_helper  # noqa: E402


@pytest.fixture(scope="module")
def ch12():
    from onnxconverter_common import float16

    given = {
        "copy": copy,
        "time": time,
        "warnings": warnings,
        "onnx": onnx,
        "helper": helper,
        "float16": float16,
    }
    given |= {
        "numpy_helper": numpy_helper,
        "measure": measure,
        "trt": trt,
        "SAFE": 16000.0,
        "TACTICS": {},
    }
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
    network = ch12.folded(models.mini_resnet(8, seed=1).eval())
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


def test_the_arena_never_overlaps_and_is_no_smaller_than_what_lives_at_once(ch12, seeded):
    rng = np.random.default_rng(seeded)
    for _ in range(50):
        count = int(rng.integers(1, 12))
        lives = {i: sorted(rng.integers(0, 10, 2).tolist()) for i in range(count)}
        sizes = {i: int(rng.integers(1, 100)) for i in range(count)}
        placed, total = ch12.arena(sizes, lives)
        for i in range(count):
            for j in range(i):
                together = lives[i][0] <= lives[j][1] and lives[j][0] <= lives[i][1]
                apart = placed[i] + sizes[i] <= placed[j] or placed[j] + sizes[j] <= placed[i]
                assert apart or not together
        at_once = max(
            sum(s for i, s in sizes.items() if lives[i][0] <= t <= lives[i][1]) for t in range(10)
        )
        assert at_once <= total <= sum(sizes.values())


def test_pairs_stand_on_the_named_tensors_alone_and_stay_within_half_a_step(ch12, graph, seeded):
    x = np.random.default_rng(seeded).normal(size=(5, 3, 8, 8)).astype(np.float32)
    amax = {n: float(np.abs(v).max()) for n, v in ch12.all_tensors(graph, {"x": x}).items()}
    chosen = ["x", "w1", "r", "w2"]
    made = ch12.insert_pairs(graph, chosen, amax, unsigned={"r"})
    onnx.checker.check_model(made)
    assert [n.input[0] for n in made.graph.node if n.op_type == "QuantizeLinear"] == [
        "x",
        "w1",
        "w2",
        "r",
    ]
    add = next(n for n in made.graph.node if n.op_type == "Add")
    assert list(add.input) == ["c", "r.dq"]
    values = ch12.all_tensors(made, {"x": x})
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
    assert ch12.compare_outputs(a, a + 1e-6, 1e-3)["passed"]
    assert not ch12.compare_outputs(a, np.where(a == 1, np.nan, a), 1e9)["passed"]
    assert not ch12.compare_outputs(a, a[:3], 1e9)["passed"]
    assert ch12.compare_outputs(a, a[[1, 0, 2, 3]], 2)["same class (%)"] == 50


def test_rescaling_changes_no_answer_and_only_fp32_weights_survive_it(ch12, graph, seeded):
    x = np.random.default_rng(seeded).normal(size=(5, 3, 8, 8)).astype(np.float32)

    def run(model):
        return ch12.all_tensors(model, {"x": x})["y"]

    nodes = graph.graph.node
    plain = copy.deepcopy(graph)
    del plain.graph.node[:]
    plain.graph.node.extend(
        [*nodes[:3], helper.make_node("Relu", ["c"], ["y"], name="r2")]
    )  # no path around
    wide = ch12.rescaled(plain, 0, 2.0**20)
    np.testing.assert_array_equal(run(wide), run(plain))
    ranges = {n: float(np.abs(v).max()) for n, v in ch12.all_tensors(wide, {"x": x}).items()}
    right, names = ch12.to_fp16(wide, ranges)
    assert {"c1", "r1", "c2"} <= set(names)
    # sums of sizes below 100, five roundings to 2⁻¹¹ on the way: 0.25 at most, were all of one sign
    np.testing.assert_allclose(run(right), run(plain), atol=0.25)
    listed = copy.deepcopy(wide)  # as torch's exporter writes it
    for i in wide.graph.initializer:
        listed.graph.value_info.append(helper.make_tensor_value_info(i.name, i.data_type, i.dims))
    spoiled, _ = ch12.to_fp16(listed, ranges)
    assert np.abs(run(spoiled) - run(plain)).max() > 2, (
        "onnxconverter now keeps listed weights: change the chapter"
    )
    unlisted, _ = ch12.to_fp16(ch12.weights_unlisted(listed), ranges)
    np.testing.assert_allclose(run(unlisted), run(plain), atol=0.25)
