"""The first speed-up of chapter 00: three files of one network, and a process for each way."""

import numpy as np
import pytest

from course_utils import data, first, machine, measure, models, training

pytestmark = pytest.mark.skipif(
    not (machine.can("package:onnxruntime") and machine.can("package:onnxscript")),
    reason="needs ONNX Runtime and the exporter",
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    images = models.normalise(data.fashion_mnist("train")[0][:100])
    return first.export_and_quantize(models.baseline(), images, tmp_path_factory.mktemp("first"))


def test_the_files_hold_the_network_in_three_formats(files):
    images = data.fashion_mnist("test")[0][:1200]
    own = training.predict(models.baseline(), images).argmax(1).numpy()
    x = models.normalise(images).numpy()
    same = {name: (first.answers(file, x) == own).mean() for name, file in files.items()}
    assert same["fp32"] == 1.0
    assert 0.97 < same["int8, 7-bit weights"] <= 1.0
    assert same["int8"] > (0.98 if machine.can("vnni") else 0.9)
    sizes = {name: file.stat().st_size for name, file in files.items()}
    assert sizes["int8"] < sizes["fp32"] / 3


def test_seven_bits_are_what_the_weights_of_the_third_file_have(files):
    import onnx
    from onnx import numpy_helper

    largest = {}
    for name in ("int8", "int8, 7-bit weights"):
        weights = [numpy_helper.to_array(t) for t in onnx.load(files[name]).graph.initializer]
        largest[name] = max(int(abs(w.astype(int)).max()) for w in weights if w.dtype == np.int8)
    assert largest["int8"] > 64 >= largest["int8, 7-bit weights"]


@pytest.mark.parametrize("way", ["eager", "fp32", "int8"])
def test_a_process_times_the_way_it_is_told(files, way, tmp_path):
    np.save(tmp_path / "x.npy", models.normalise(data.fashion_mnist("test")[0][:4]).numpy())
    told = {"WAY": str(files.get(way, way)), "IMAGES": str(tmp_path / "x.npy"), "THREADS": "1"}
    took = measure.turns(first.CHILD, {way: told}, rounds=2)[way]
    assert len(took) == 2
    assert all(0 < seconds < 10 for seconds in took)
