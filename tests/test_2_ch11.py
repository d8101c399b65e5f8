"""What chapter 11 teaches, taken from its cells: exports checked over batch sizes, errors that name
what is wrong.
"""

import itertools
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from conftest import taught
from torch import nn

from course_utils import machine, measure, models, ways


@pytest.fixture(scope="module")
def ch11(tmp_path_factory):
    import onnxruntime

    folder = tmp_path_factory.mktemp("11")
    return taught(
        "11",
        FOLDER=folder,
        ort=onnxruntime,
        measure=measure,
        models=models,
        THREADS=1,
        machine=None,
        onnx=onnx,
        Counter=Counter,
        LEVELS={"none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL},
        ways=ways,
    )


@pytest.fixture(scope="module")
def session(ch11):
    return measure.onnx_session(
        ch11.export(models.baseline(), torch.zeros(2, 1, 28, 28), "net.onnx")
    )


@pytest.mark.parametrize("batch", [1, 2, 9])
def test_the_exported_network_passes_and_every_spoiled_one_fails(ch11, session, batch):
    def run(x):
        return session.run(None, {"image": x})[0]

    net = models.baseline()
    assert ch11.apart(net, run, batch) <= 1
    assert ch11.apart(net, lambda x: run(x) + 0.01, batch) > 1
    assert ch11.apart(net, lambda x: run(x)[0], batch) == np.inf, "a dropped batch dimension"
    assert ch11.apart(net, lambda x: run(x) * np.nan, batch) == np.inf
    if batch > 1:
        assert ch11.apart(net, lambda x: run(x)[::-1], batch) > 1, "a mixed-up batch"


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(1))


def test_what_is_broken_is_named_and_no_folder_shows(ch11, session):
    path = ch11.export(Small().eval(), torch.zeros(2, 1, 28, 28), "split.onnx", external_data=True)
    weights = path.with_name("split.onnx.data")
    whole = weights.read_bytes()
    weights.unlink()
    missing = ch11.told(lambda: ch11.opened(path))
    weights.write_bytes(whole[: len(whole) // 2])
    cut = ch11.told(lambda: ch11.opened(path))
    weights.write_bytes(whole)
    ch11.opened(path)
    assert "does not exist" in missing
    assert "split.onnx.data" in missing
    assert "out of bounds" in cut
    assert str(ch11.FOLDER) not in missing + cut
    drifted = onnx.load(ch11.FOLDER / "net.onnx")
    drifted.opset_import[0].version = 99
    assert "opset" in ch11.told(lambda: ch11.opened(drifted.SerializeToString())).lower()
    shape = ch11.told(lambda: session.run(None, {"image": np.zeros((1, 3, 28, 28), np.float32)}))
    assert "Got: 3 Expected: 1" in shape
    with pytest.raises(AssertionError, match="today it runs"):
        ch11.told(lambda: session.run(None, {"image": np.zeros((1, 1, 28, 28), np.float32)}))


def test_preprocessing_inside_the_model_is_the_same_as_outside(ch11):
    pixels = torch.randint(0, 256, (5, 1, 28, 28), dtype=torch.uint8)
    with torch.no_grad():
        inside = ch11.Whole(models.baseline()).eval()(pixels)
        torch.testing.assert_close(
            inside, models.baseline()(models.normalise(pixels)), atol=1e-5, rtol=1e-5
        )


def test_a_file_without_free_batch_refuses_another(ch11):
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).eval()
    fixed = measure.onnx_session(
        ch11.export(model, torch.zeros(2, 1, 28, 28), "fixed.onnx", free_batch=False)
    )
    with pytest.raises(Exception, match="index: 0 Got: 3 Expected: 2"):
        fixed.run(None, {"image": np.zeros((3, 1, 28, 28), np.float32)})


@pytest.fixture
def traced(ch11):
    """A convolution with BatchNorm and ReLU, exported as it was traced."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
    ch11.export(net, torch.randn(1, 1, 8, 8), "traced.onnx", free_batch=False, optimize=False)
    return ch11.FOLDER / "traced.onnx"


def test_a_computed_bias_keeps_the_runtime_from_folding_and_nothing_else_does(ch11, traced):
    """What the chapter finds: if ONNX Runtime folds such a file one day, the text must change."""
    ch11.LEVELS["all"] = ch11.ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert ch11.at_level("traced", "all")[1]["BatchNormalization"] == 1
    repaired = onnx.load(traced)
    for node in repaired.graph.node:
        if node.op_type == "Conv":
            del node.input[2:]
    onnx.save(repaired, ch11.FOLDER / "repaired.onnx")
    assert ch11.at_level("repaired", "all")[1]["BatchNormalization"] == 0
    assert ch11.at_level("repaired", "none")[1]["BatchNormalization"] == 1
    x = {"image": np.random.default_rng(0).normal(size=(1, 1, 8, 8)).astype(np.float32)}
    answers = [ch11.at_level(n, "all")[0].run(None, x)[0] for n in ("traced", "repaired")]
    np.testing.assert_allclose(*answers, atol=1e-5)


def test_kinds_name_the_domain(ch11, traced):
    found = ch11.kinds(traced)
    assert found["Conv"] == 1
    model = onnx.load(traced)
    model.graph.node[0].domain = "com.example"
    onnx.save(model, ch11.FOLDER / "named.onnx")
    assert any(kind.startswith("com.example::") for kind in ch11.kinds(ch11.FOLDER / "named.onnx"))


def table(ch11, monkeypatch, hot: dict[str, list[float]]):
    """The chapter's `leaders` on planted seconds of each way in five processes."""
    space = ch11.leaders.__globals__
    monkeypatch.setitem(space, "np", np)
    planted = {way: [{"hot 1": t} for t in seconds] for way, seconds in hot.items()}
    monkeypatch.setitem(space, "times", planted)
    monkeypatch.setitem(space, "STARTS", 5)
    monkeypatch.setitem(space, "present", [way for way in hot if way != "eager again"])
    return ch11.leaders("hot 1")


def test_the_table_ranks_only_what_its_intervals_separate(ch11, monkeypatch):
    level = [1.0, 1.01, 0.99, 1.0, 1.01, 0.99, 1.0, 1.01, 0.99, 1.0]
    double, nearly = [0.5 * t for t in level], [0.51 * t for t in reversed(level)]
    hot = {"eager": level, "A": double, "B": nearly, "eager again": list(reversed(level))}
    assert table(ch11, monkeypatch, hot) == ["A", "B"]
    hot["B"] = [0.8 * t for t in level]
    assert table(ch11, monkeypatch, hot) == ["A"]
    # Equal arms that differ threefold raise the bar for all.
    hot["eager again"] = [0.33, 0.33, 1.0, 1.0, 3.0, 3.0, 0.4, 0.4, 2.5, 2.5]
    assert table(ch11, monkeypatch, hot)[0] == "A"
    assert "B" in table(ch11, monkeypatch, hot)


def test_a_way_is_loaded_sampled_and_refused_where_it_lacks_a_name(tmp_path, monkeypatch):
    images = np.random.default_rng(0).normal(size=(64, 1, 28, 28)).astype(np.float32)
    logits = images.reshape(64, -1)[:, :10].astype(np.float64)
    np.savez(tmp_path / "known.npz", images=images, logits=logits)
    way = tmp_path / "own way.py"
    way.write_text(
        "precision = 'own'\ndef run(images):\n    return images.reshape(-1, 784)[:, :10]\n"
    )
    for name, value in {"FOLDER": tmp_path, "WAY": way, "THREADS": 1}.items():
        monkeypatch.setenv(name, str(value))
    told = ways.sampler()()
    assert (told["precision"], told["far"], told["agree"]) == ("own", 0.0, 1.0)
    assert all(told[f"{s} {b}"] > 0 for s, b in itertools.product(("cold", "hot"), ways.BATCHES))
    way.write_text(
        "precision = 'own'\ndef run(images):\n    return -images.reshape(-1, 784)[:, :10]"
    )
    assert ways.sampler()()["agree"] < 0.5
    way.write_text("precision = 'own'")
    with pytest.raises(KeyError, match=r"own way\.py defines no run"):
        ways.load(way, 1, tmp_path)


def test_the_files_of_the_ways_answer_as_torch_does(ch11, tmp_path):
    """Each file that the chapter writes, on the course's network, but the one that is compiled."""
    from course_utils.course import build
    from course_utils.course.chapters import chapters

    for b in ways.BATCHES:
        path = ch11.export(models.baseline(), torch.zeros(b, 1, 28, 28), "n.onnx", free_batch=False)
        path.rename(tmp_path / f"net{b}.onnx")
    cells = [
        c.source for c in build.cells(chapters(["11"])[0]) if c.source.startswith("%%writefile")
    ]
    files = {c.splitlines()[0].split("/")[1].rstrip('"'): c.split("\n", 1)[1] for c in cells}
    assert set(files) == {"eager.py", "AOTInductor.py", "ONNX Runtime.py", "OpenVINO.py"}
    x = torch.randn(32, 1, 28, 28)
    with torch.no_grad():
        want = models.baseline()(x).numpy()
    for name, text in files.items():
        if name == "AOTInductor.py" or (
            name == "OpenVINO.py" and not machine.can("package:openvino")
        ):
            continue
        (tmp_path / name).write_text(text)
        way = ways.load(tmp_path / name, 1, tmp_path)
        np.testing.assert_allclose(way["run"](x.numpy()), want, atol=1e-3)
        np.testing.assert_allclose(way["run"](x[:1].numpy()), want[:1], atol=1e-3)


def test_neighbours_and_two_sessions_are_measured(session, ch11):
    path = ch11.FOLDER / "net.onnx"
    found = ways.neighbours(path, rounds=4, threads=1)
    assert list(found)[0] == "an eager call"
    assert len(found) == 4
    assert all(ms > 0 for ms in found.values())
    served = ways.side_by_side(path, 0.05)
    assert set(served) == {"default", "one thread each"}
    assert min(served.values()) > 0
