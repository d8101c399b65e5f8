"""Comparisons over fresh processes: what travels, what is refused, that nothing stays behind."""

import importlib
import io
import os
import signal
import sys
import time

import numpy as np
import psutil
import pytest
import torch

from course_utils import allocator, measure
from course_utils.measure import fresh, preload, travel


def travelled(arms: object) -> object:
    file = io.BytesIO()
    travel.pack(arms, file)
    return travel.unpack(file)


QUICK = {"seconds": 0.1, "processes": 5, "threads": 1}
linux = pytest.mark.skipif(not fresh.FORKS, reason="forks are used on Linux only")


def test_each_value_comes_from_a_process_of_its_own(tmp_path, monkeypatch):
    """The arms note the process they run in: twelve processes, none of them this one."""
    monkeypatch.delenv("COURSE_PROFILE", raising=False)

    def work() -> float:
        (tmp_path / f"{os.getpid()}").touch()
        return sum(range(20_000))

    result = measure.across(work, work, seconds=0.1, threads=1)
    seen = {int(p.name) for p in tmp_path.iterdir()}
    assert result.processes == len(result.ratios) == len(seen) == (12 if fresh.FORKS else 5)
    assert os.getpid() not in seen
    assert result.scope in repr(result)


@linux
def test_what_the_first_process_imports_the_others_find(tmp_path):
    """`xmlrpc.server` stands for torch's compiler: a library that only the arm itself imports."""

    def work() -> float:
        with (tmp_path / f"{os.getpid()}").open("a") as file:
            file.write(f"{'xmlrpc.server' in sys.modules}\n")
        import xmlrpc.server  # noqa: F401

        return sum(range(20_000))

    measure.across(work, work, **QUICK)
    found = sorted(p.read_text().split()[0] for p in tmp_path.iterdir())
    assert found == ["False", *["True"] * 4]


def test_libraries_are_told_from_the_readers_own_files(tmp_path, monkeypatch):
    (tmp_path / "my_own_layers.py").write_text("width = 8", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.modules)
    importlib.import_module("my_own_layers")
    monkeypatch.delitem(sys.modules, "tabnanny", raising=False)
    importlib.import_module("tabnanny")
    try:
        assert preload.imported_since(before) == ["tabnanny"]
    finally:
        sys.modules.pop("my_own_layers")
    preload.load(["tabnanny", "there.is.no.such.library"])  # nothing is raised


def test_what_a_child_changes_stays_there():
    counts = []
    measure.across(lambda: counts.append(sum(range(9999))), lambda: sum(range(9999)), **QUICK)
    assert counts == []


@pytest.mark.wall_clock
def test_a_known_ratio_is_measured():
    result = measure.across(lambda: time.sleep(0.008), lambda: time.sleep(0.004), seconds=0.6)
    assert result.baseline_seconds >= 0.008
    assert 1.05 < result.ratio < 2.3  # a busy machine oversleeps, the shorter sleep by more


def test_models_share_weights_on_the_other_side():
    """Both arms are packed together: a network that is in both arrives once."""
    model, x = torch.nn.Linear(8, 8), torch.randn(2, 8)
    a, b = travelled((measure.arm(model, x), measure.arm(model, x)))
    assert a.call.model is b.call.model
    assert torch.equal(a.call(), model(x))


def test_channels_last_survives_the_journey():
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    conv = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    there = travelled(measure.arm(conv, x))
    assert there.call.x.is_contiguous(memory_format=torch.channels_last)
    assert there.call.model.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def relu_onnx():
    from onnx import TensorProto, helper

    value = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 64]) for name in ("x", "y")
    ]
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "relu", value[:1], value[1:]
    )
    return helper.make_model(
        graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)]
    ).SerializeToString()


@pytest.mark.parametrize("from_file", [False, True])
def test_a_session_travels_with_its_settings(relu_onnx, tmp_path, from_file):
    import onnxruntime

    source = relu_onnx
    if from_file:
        source = tmp_path / "relu.onnx"
        source.write_bytes(relu_onnx)
    session = measure.onnx_session(source, threads=1)
    there = travelled(session)
    options = there.get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    x = np.array([[-1.0] * 32 + [2.0] * 32], np.float32)
    assert np.array_equal(there.run(None, {"x": x})[0], np.maximum(x, 0))
    arm = measure.onnx_arm(session, np.ones((4096, 64), np.float32), "relu")
    assert measure.across(arm, arm, **QUICK).processes == 5


def test_an_openvino_model_travels_with_its_settings(relu_onnx, tmp_path):
    openvino = pytest.importorskip("openvino")
    (tmp_path / "relu.onnx").write_bytes(relu_onnx)
    how = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(tmp_path / "relu.onnx", "CPU", how)
    there = travelled(compiled)
    for name in travel.OPENVINO_SETTINGS:
        assert str(there.get_property(name)) == str(compiled.get_property(name)), name
    x = np.linspace(-1, 1, 64, dtype=np.float32)[None]
    assert np.array_equal(there(x)[0], np.maximum(x, 0))


def test_what_cannot_travel_is_refused():
    import socket

    with (
        socket.socket() as open_one,
        pytest.raises(measure.MeasurementError, match=r"cannot be copied.*measure\.compare"),
    ):
        measure.across(lambda: open_one.fileno() + sum(range(9999)), lambda: 1, **QUICK)


def test_a_childs_error_is_told_and_the_next_comparison_runs():
    with pytest.raises(measure.MeasurementError, match="baseline raised ZeroDivisionError"):
        measure.across(lambda: 1 / 0, lambda: 1, **QUICK)
    assert (
        measure.across(lambda: sum(range(9999)), lambda: sum(range(9999)), **QUICK).processes == 5
    )


@linux
def test_a_child_that_is_killed_is_told():
    with pytest.raises(measure.MeasurementError, match="ended with -9"):
        measure.across(lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: 1, **QUICK)


def test_an_arm_that_never_ends_is_stopped_with_all_below_it():
    server = _server_pid()
    with pytest.raises(TimeoutError, match="after 2 s and was stopped"):
        measure.across(lambda: time.sleep(600), lambda: 1, **QUICK, timeout=2)
    deadline = time.monotonic() + 20
    while psutil.pid_exists(server) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(server)
    assert (
        measure.across(lambda: sum(range(9999)), lambda: sum(range(9999)), **QUICK).processes == 5
    )


def test_no_file_stays_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(fresh.tempfile, "tempdir", str(tmp_path))
    measure.across(lambda: sum(range(9999)), lambda: sum(range(9999)), **QUICK)
    with pytest.raises(measure.MeasurementError):
        measure.across(lambda: 1 / 0, lambda: 1, **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_a_dead_server_is_replaced():
    psutil.Process(_server_pid()).kill()
    with pytest.raises(RuntimeError, match="server of fresh processes ended"):
        measure.across(lambda: sum(range(9999)), lambda: sum(range(9999)), **QUICK)
    assert (
        measure.across(lambda: sum(range(9999)), lambda: sum(range(9999)), **QUICK).processes == 5
    )


def _server_pid() -> int:
    measure.across(lambda: sum(range(9999)), lambda: sum(range(9999)), **QUICK)
    return fresh.servers()[0]


@linux
def test_the_children_have_no_thread_to_inherit():
    """A fork copies one thread: a server that computed would leave its children locks held for
    ever.
    """
    assert psutil.Process(_server_pid()).num_threads() <= 1 + _threads_of_numpy()


def _threads_of_numpy() -> int:
    """OpenBLAS starts its threads when numpy is imported, and starts them anew after a fork."""
    code = "import numpy, psutil; print(psutil.Process().num_threads() - 1)"
    return measure.child(code).result


@linux
def test_the_allocator_is_the_same_on_the_other_side():
    """Two megabytes come and go without a page fault, in a child as here."""

    def touch() -> None:
        torch.ones(2**19)

    result = measure.across(touch, touch, **QUICK)
    if "keeps" in allocator.STATE:
        assert max(result.faults) < 50  # 512 pages would be handed out again at every call


def test_memory_lies_elsewhere_in_each_process(tmp_path, monkeypatch):
    """Forks of one server start from one heap; what they allocate must not lie in one place."""

    def work() -> None:
        (tmp_path / str(torch.ones(300_000).data_ptr())).touch()

    monkeypatch.delenv("COURSE_PROFILE", raising=False)
    measure.across(work, work, seconds=0.1, processes=8, threads=1)
    assert len(list(tmp_path.iterdir())) >= 8


@pytest.mark.parametrize("words", [("mallopt refused",), ("no mallopt",)])
def test_an_allocator_that_does_not_listen_is_said(monkeypatch, words):
    class Library:
        if "refused" in words[0]:
            mallopt = staticmethod(lambda *_: 0)

    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: Library())
    monkeypatch.delenv("COURSE_ALLOCATOR", raising=False)
    before = allocator.STATE
    assert words[0] in allocator.settle()
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert "darwin has no mallopt" in allocator.settle()
    monkeypatch.setenv("COURSE_ALLOCATOR", "system")
    assert "COURSE_ALLOCATOR" in allocator.settle()
    monkeypatch.setattr(allocator, "STATE", before)
