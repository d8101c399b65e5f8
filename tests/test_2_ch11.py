"""What chapter 11 teaches, taken from its cells: exports checked over batch sizes, errors that name
what is wrong.
"""

import numpy as np
import onnx
import pytest
import torch
from conftest import taught
from torch import nn

from course_utils import measure, models


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
    path = ch11.export(Small().eval(), torch.zeros(2, 1, 28, 28), "split.onnx", external=True)
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
