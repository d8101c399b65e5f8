"""The other instruments: data, models, training, sizes, memory, plots."""

import gc
import json
import os
import shutil
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from torch import nn

import course_utils
from course_utils import data, measure, models, plots, scratch, training


def test_splits_are_balanced_and_share_no_image():
    sets = {split: data.fashion_mnist(split) for split in data.SPLITS}
    for split, n in (("train", 12_000), ("validation", 3_000), ("test", 10_000)):
        images, labels = sets[split]
        assert images.shape == (n, 1, 28, 28)
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert torch.bincount(labels).tolist() == [n // 10] * 10
    seen = {images.numpy().tobytes() for images in sets["train"][0]}
    assert (
        sum(images.numpy().tobytes() in seen for images in sets["validation"][0]) < 5
    )  # the set itself holds a few twins
    with pytest.raises(ValueError, match="'val'"):
        data.fashion_mnist("val")


@pytest.fixture
def copied(tmp_path, monkeypatch):
    for name in ("SHA256.json", "fashion_mnist_validation.npz"):
        shutil.copy(data.DATASETS / name, tmp_path / name)
    monkeypatch.setattr(data, "DATASETS", tmp_path)
    return tmp_path / "fashion_mnist_validation.npz"


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_named_with_both_digests_and_the_remedy(copied, damage):
    content = bytearray(copied.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        copied.write_bytes(content)
    elif damage == "truncate":
        copied.write_bytes(content[:-100])
    else:
        copied.unlink()
    with pytest.raises(data.DataError) as error:
        data.fashion_mnist("validation")
    text = str(error.value)
    assert "fashion_mnist_validation.npz" in text
    assert "git checkout -- datasets/" in text
    if damage != "remove":
        wanted = json.loads((copied.parent / "SHA256.json").read_text())[copied.name]
        assert wanted in text
        assert data.sha256(copied) in text


def test_validation_mask_is_500_a_class_and_always_the_same():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10, dtype=np.uint8), 6000))
    mask = data.validation_mask(labels)
    assert np.bincount(labels[mask]).tolist() == [500] * 10
    assert (mask == data.validation_mask(labels)).all()


def test_the_full_set_is_read_from_debians_files_and_repaired(tmp_path, monkeypatch):
    import gzip

    files = {name: f"{name}".encode() * 50 for name in ("a-idx", "b-idx")}
    debian, full = tmp_path / "debian", tmp_path / "full"
    debian.mkdir()
    for name, content in files.items():
        (debian / f"{name}.gz").write_bytes(gzip.compress(content))
    import hashlib

    monkeypatch.setattr(data, "_DEBIAN", debian)
    monkeypatch.setattr(data, "FULL", full)
    monkeypatch.setattr(data, "_IDX", {n: hashlib.sha256(c).hexdigest() for n, c in files.items()})
    assert data.fetch_full() == ["a-idx", "b-idx"]
    assert data.fetch_full() == []
    (full / "a-idx").write_bytes(b"half")
    assert data.fetch_full() == ["a-idx"]
    (full / "b-idx").unlink()
    (debian / "b-idx.gz").write_bytes(gzip.compress(files["b-idx"])[:-20])
    with pytest.raises(data.DataError, match="b-idx"):
        data.fetch_full()
    assert sorted(p.name for p in full.iterdir()) == ["a-idx"]


def test_austen_is_a_whole_novel():
    text = data.austen()
    assert text.startswith("Persuasion")
    assert "FINIS" in text[-200:].upper()
    assert len(text.split()) > 80_000


@pytest.mark.settled
def test_the_baseline_reaches_92_percent_of_the_whole_test_set():
    images, labels = data.fashion_mnist("test")
    assert training.accuracy(models.baseline(), images, labels) >= 0.92


def test_mini_resnet_is_the_size_it_says_and_seeds_do_not_leak():
    before = torch.random.get_rng_state()
    net = models.mini_resnet(32, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert measure.parameters(net) == 308_074
    assert torch.equal(net.fc.weight, models.mini_resnet(32, seed=3).fc.weight)
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    with pytest.raises(ValueError, match="width is 0"):
        models.mini_resnet(0)
    with pytest.raises(TypeError, match="uint8"):
        models.normalise(torch.zeros(1, 1, 28, 28))


def test_fit_learns_repeats_itself_and_refuses_no_data():
    images, labels = data.fashion_mnist("train")
    images, labels = images[:300], labels[:300]
    nets = [models.mini_resnet(8, seed=1) for _ in range(2)]
    histories = [
        training.fit(
            net, images, labels, training.Recipe(epochs=3, batch_size=64, seed=5), progress=False
        )
        for net in nets
    ]
    assert histories[0].loss == pytest.approx(histories[1].loss, rel=1e-4)
    assert histories[0].loss[-1] < histories[0].loss[0] - 0.15
    assert not nets[0].training
    training.fit(
        nets[0], images[:100], labels[:100], training.Recipe(epochs=1), progress=False
    )  # a single step
    with pytest.raises(ValueError, match="300 images and 3 labels"):
        training.fit(nets[0], images, labels[:3])


def test_macs_parameters_and_bytes_of_layers_counted_by_hand():
    conv = nn.Conv2d(3, 8, 5, stride=2, padding=2, groups=1, bias=False)
    assert measure.macs(conv, torch.zeros(2, 3, 16, 16)) == 2 * 8 * 8 * 8 * 3 * 25
    assert measure.macs(nn.Linear(10, 7), torch.zeros(4, 10)) == 4 * 70
    assert measure.parameters(nn.Linear(10, 7)) == 77
    assert 77 * 4 < measure.saved_bytes(nn.Linear(10, 7)) < 77 * 4 + 400
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert measure.saved_bytes(tied) > 0  # shared tensors are saved, not refused


def test_peak_memory_sees_what_is_freed_again():
    def call():
        a = torch.empty(1_000_000)
        b = a + 1
        del a
        return b[:10].clone()

    peak = measure.peak_memory(call)
    assert 8_000_000 <= peak < 8_100_000


def test_child_returns_json_its_peak_and_its_own_error():
    big = measure.child("x = bytearray(200_000_000)\nprint('noise')\nprint('{\"a\": 1}')")
    assert big.result == {"a": 1}
    assert 200e6 < big.peak_bytes < 300e6
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        measure.child("1/0")
    with pytest.raises(RuntimeError, match="JSON"):
        measure.child("print('no')")
    with pytest.raises(TimeoutError, match="did not end within"):
        measure.child("while True: pass", timeout=0.1)


def test_children_take_turns_and_none_outlives_the_call():
    import psutil

    code = (
        "import os\ndef sample():\n    print('noise of a library')\n    return [os.environ['WHO'],"
        " os.getpid()]"
    )
    got = measure.turns(code, {who: {"WHO": who} for who in "ab"}, rounds=5)
    assert {who: {name for name, _ in rows} for who, rows in got.items()} == {
        "a": {"a"},
        "b": {"b"},
    }
    pids = [{pid for _, pid in rows} for rows in got.values()]
    assert all(len(p) == 1 and not psutil.pid_exists(p.pop()) for p in pids), (
        "one process an arm, gone afterwards"
    )
    assert [len(rows) for rows in got.values()] == [5, 5]
    with pytest.raises(RuntimeError, match=r"child 'a'(.|\n)*ZeroDivisionError"):
        measure.turns("def sample(): 1 / 0", {"a": {}}, rounds=1)
    with pytest.raises(TimeoutError, match="did not end within"):
        measure.turns("import time\ndef sample(): time.sleep(30)", {"a": {}}, rounds=1, timeout=0.1)


def test_a_child_with_a_path_of_its_own_still_finds_the_course(monkeypatch):
    """As in Colab, where the course is a clone on the path and nothing is installed."""
    monkeypatch.setenv("PYTHONPATH", "ours")
    code = "import json, os; print(json.dumps(os.environ['PYTHONPATH']))"
    root = str(course_utils.ROOT)
    assert measure.child(code).result == os.pathsep.join(["ours", root])
    own = {"PYTHONPATH": "theirs"}
    assert measure.child(code, env=own).result == os.pathsep.join(["theirs", root])
    code = "import os; sample = lambda: os.environ['PYTHONPATH']"
    assert measure.turns(code, {"a": own}, rounds=1)["a"] == [os.pathsep.join(["theirs", root])]


def test_a_comparison_does_not_keep_what_it_called():
    model = torch.nn.Linear(64, 64)
    gone = weakref.ref(model)
    result = measure.compare(
        *[measure.arm(m, torch.randn(8, 64)) for m in (model, torch.nn.ReLU())], seconds=0.1
    )
    del model
    gc.collect()
    assert gone() is None
    assert result.baseline.label == "Linear"
    with pytest.raises(measure.MeasurementError, match="measure again"):
        result.candidate.call()


def test_roofline_bounds():
    roof = measure.Roofline(100.0, 20.0, 2)
    assert roof.bound(1) == 20.0
    assert roof.bound(1000) == 100.0
    assert roof.bound(roof.ridge) == pytest.approx(100.0)


def test_a_figure_without_an_alternative_text_is_refused():
    figure, _ = plots.axes("x (s)", "y", title="t")
    with pytest.raises(ValueError, match="alternative text"):
        plots.show(figure, "  ")


@pytest.mark.parametrize("draw", ["lines", "bars", "intervals", "seeds"])
def test_figures_carry_png_text_and_alt(draw, monkeypatch):
    shown = []
    monkeypatch.setattr(InteractiveShell, "initialized", lambda: True)  # as in a notebook
    monkeypatch.setattr(
        "IPython.display.display", lambda bundle, **kw: shown.append((bundle, kw["metadata"]))
    )
    i = measure.Interval(1.0, 0.9, 1.2)
    calls = {
        "lines": lambda: plots.lines(
            [1, 2], {"a": [i, i], "b": [1, 2]}, xlabel="n", ylabel="s", title="t", alt="an alt"
        ),
        "bars": lambda: plots.bars({"a": i, "b": 2.0}, xlabel="s", title="t", alt="an alt"),
        "intervals": lambda: plots.intervals({"a": i}, xlabel="x", title="t", alt="an alt"),
        "seeds": lambda: plots.seeds(
            {"a": [1, 2, 3], "b": [2, 3, 4]}, ylabel="%", title="t", alt="an alt"
        ),
    }
    calls[draw]()
    bundle, metadata = shown[0]
    assert bundle["image/png"].startswith(b"\x89PNG")
    assert b"Software" not in bundle["image/png"]
    assert bundle["text/plain"] == "Figure: an alt"
    assert metadata["image/png"]["alt"] == "an alt"


EXPLORE = """
import ipywidgets
from IPython.core.interactiveshell import InteractiveShell
from course_utils import plots
InteractiveShell.instance()
def picture(n, word):
    if n == 0:
        raise ValueError("n must be positive, <not> 0")
    figure, _ = plots.axes("x", "y", title=word)
    plots.show(figure, f"{n} of <{word}>")
*knobs, frame = plots.explore(picture, n=ipywidgets.IntSlider(value=2), word=["a", "b"]).children
print([k.description for k in knobs], type(knobs[1]).__name__, frame.value[:60])
knobs[0].value, knobs[1].value = 3, "b"
print(frame.value[:60])
knobs[0].value = 0
print(frame.value)
plots.explore(picture, n=[0], word=["a"])
"""


@pytest.mark.settled
def test_a_knob_redraws_the_figure_and_an_error_is_read_where_the_figure_stood():
    ran = subprocess.run([sys.executable, "-c", EXPLORE], capture_output=True, text=True)
    first, second, third = ran.stdout.splitlines()
    image = '<img alt="{} of &lt;{}&gt;" src="data:image/png;base64,iV'
    assert first.startswith("['n', 'word'] Dropdown " + image.format(2, "a"))
    assert second.startswith(image.format(3, "b"))
    assert third == "<pre>ValueError: n must be positive, &lt;not&gt; 0</pre>"
    assert "ValueError: n must be positive" in ran.stderr, "the first picture's error is not hidden"


def test_a_chapter_finds_what_it_wrote_also_where_the_course_cannot_be_written(
    tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("COURSE_SCRATCH", str(tmp_path / "file"))  # no folder can be made in a file
    (scratch("chapter") / "weights").write_text("w")
    assert (scratch("chapter") / "weights").read_text() == "w"
    assert scratch("another") != scratch("chapter")
    for name in ("chapter", "another"):
        shutil.rmtree(scratch(name))
    course_utils._temporary.cache_clear()
