"""What chapter 10 teaches, taken from its cells and its modules: bytes counted, blocks, threads
read in generated code, kernels, folds that are legal, tiles of attention.
"""

import ctypes
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import execute, taught
from torch import fx, nn
from torch.fx.experimental.optimization import fuse
from torch.utils import cpp_extension
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import mobilenet_v2, resnet18

from course_utils import compiled, exercises, folding, machine, measure, models
from course_utils.course import build, shape
from course_utils.course.chapters import chapters

KERNELS = Path(compiled.__file__).with_name("kernels")
can_compile = pytest.mark.skipif(not machine.can("compiler"), reason="no C++ compiler")
can_build = pytest.mark.skipif(
    not (machine.can("compiler") and machine.can("package:ninja")), reason="no compiler or ninja"
)


@pytest.fixture(scope="module")
def ch10():
    given = {"TorchDispatchMode": TorchDispatchMode, "Counter": Counter, "fx": fx, "LONG": 2**16}
    return taught("10", **given)


def solution(letter):
    """The chapter's own answer to an exercise."""
    exercise = next(e for e in shape.exercises(chapters(["10"])[0]) if e.id == f"10.{letter}")
    return execute(exercise.solution)[exercise.answer]


def test_traffic_counts_reads_and_writes_and_no_views(ch10):
    x = torch.randn(100)  # 400 bytes
    for call, trips in (
        (lambda: x + 1, 2),
        (lambda: x + x, 3),
        (lambda: x.view(10, 10).t(), 0),
        (lambda: torch.relu(x), 2),
        (lambda: torch.relu_(x), 2),  # in place saves no trip
        (lambda: x.clone().relu_(), 4),
    ):
        with ch10.Traffic() as seen:
            call()
        assert seen.bytes == trips * x.nbytes, seen.calls
    with ch10.Traffic() as seen:
        ch10.chain(x, x.clone())
    assert seen.bytes == (2 + 12) * x.nbytes


@pytest.mark.parametrize("numbers", [1, 7, 64, 65, 1000])
def test_blocks_give_the_same_bits_for_any_length(ch10, numbers):
    x, r = torch.randn(numbers), torch.randn(numbers)
    for size in (1, 64, 2000):
        assert torch.equal(ch10.by_blocks(x, r, size), ch10.chain(x, r))
        out = torch.empty(numbers)
        add = lambda t, out: torch.add(t, 0.1, out=out)  # noqa: E731
        assert torch.equal(ch10.six(add, x, out, size), ch10.six(add, x, x.clone(), numbers))
        six = x
        for _ in range(6):
            six = six + 0.1
        assert torch.equal(out, six)


# --- What Inductor writes ---------------------------------------------------------------------


@pytest.fixture
def two_threads():
    if machine.usable_cores() < 2:
        pytest.skip("one core: nothing is parallel")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@can_compile
def test_the_timed_kernel_is_parallel_and_one_warmed_on_something_small_is_not(ch10, two_threads):
    for numbers, parallel in ((2**20, True), (256, False)):
        program = compiled.generated(ch10.chain, torch.randn(numbers), torch.randn(numbers))
        assert (compiled.PARALLEL in program) == parallel
        body = compiled.loop(program)
        assert body.count("loadu") == 2, "x and r are read, nothing else"
        assert body.count(".store(") == 1
    program = compiled.generated(ch10.chain, torch.randn(1000), torch.randn(1000), dynamic=True)
    assert compiled.PARALLEL not in program, "the first edition's arm had one thread"


@can_compile
def test_both_arms_of_the_comparison_keep_the_same_cores_busy(ch10, two_threads):
    """The compiled arm compiles at the size at which it is timed, in every process."""
    x, r = torch.randn(2, 2**20).unbind(0)
    arm, chain = compiled.Compiled(ch10.chain), ch10.chain
    one = measure.compare(lambda: chain(x, r), lambda: arm(x, r), seconds=0.2, threads=1)
    assert max(one.cores) < 1.3, "one thread is one thread for both"
    torch.compiler.reset()


@can_compile
def test_an_arm_travels_without_its_code_and_is_compiled_again(ch10):
    import pickle

    arm = compiled.Compiled(torch.sin, frozen=False)
    x = torch.randn(100)
    torch.testing.assert_close(arm(x), torch.sin(x))
    assert arm._ready is not None
    other = pickle.loads(pickle.dumps(arm))
    assert other._ready is None
    assert (other.function, other.frozen) == (torch.sin, False)
    torch.compiler.reset()


@can_compile
def test_freezing_folds_as_a_setting_and_the_arm_does_it():
    from torch._inductor import config

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    x, counts = torch.randn(2, 3, 16, 16), {}
    for name, how in {
        "default": {},
        "setting": {},
        "option": {"options": {"freezing": True}},
    }.items():
        with torch.no_grad(), config.patch(freezing=name == "setting"):
            counts[name] = compiled.generated(net, x, **how).count("sqrt")
    assert counts["default"] > 0
    assert counts["setting"] == 0
    assert counts["option"] == counts["default"], "the option works now: mend the chapter's myth"
    with torch.inference_mode():
        frozen = compiled.Compiled(net, frozen=True)
        want = net(x)
        torch.testing.assert_close(frozen(x), want, atol=1e-5, rtol=1e-4)
        net[0].weight.zero_()
        torch.testing.assert_close(frozen(x), want, atol=1e-5, rtol=1e-4)  # a constant by now
    torch.compiler.reset()


@can_compile
def test_after_an_empty_cache_code_is_written_anew(ch10, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # put back when the test is over
    x = torch.randn(300)
    for _ in range(2):  # the second time what this process remembers must not count either
        (tmp_path / "cache").mkdir(exist_ok=True)
        (tmp_path / "cache" / "old").write_text("")
        compiled.empty_cache(tmp_path / "cache")
        compiled.generated(ch10.chain, x, x)
        assert not (tmp_path / "cache" / "old").exists()
        assert list((tmp_path / "cache").glob("**/*.so")), "nothing was compiled"


@can_compile
def test_a_break_makes_two_programs_and_is_said(ch10):
    def broken(x):
        y = torch.relu(x)
        return y + 1 if y.sum() > 100 else y - 1

    with pytest.raises(ValueError, match="break"):
        compiled.generated(broken, torch.randn(64))


def test_the_logs_tell_of_breaks_and_recompiles(tmp_path):
    cells = [c.source for c in build.cells(chapters(["10"])[0])]
    cell = next(c for c in cells if c.startswith('%%writefile "$FOLDER/breaks.py"'))
    (tmp_path / "breaks.py").write_text(cell.split("\n", 1)[1], encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, tmp_path / "breaks.py"],
        env=os.environ | {"TORCH_LOGS": "graph_breaks,recompiles"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-2000:]
    broken, mended = ran.stdout.split("--- mended")
    assert "Graph Break Reason" in broken
    assert "Graph Break Reason" not in mended
    assert mended.count("Recompiling function") == 1, "sizes are free after the first change"


# --- Kernels ----------------------------------------------------------------------------------

POINTER, WHOLE = ctypes.c_void_p, ctypes.c_int64


@can_build
def test_the_passes_share_arithmetic_and_differ_in_trips_only(tmp_path):
    run = compiled.library(KERNELS / "passes.cpp", tmp_path).run
    run.argtypes = POINTER, POINTER, WHOLE, ctypes.c_int, ctypes.c_int
    x = torch.rand(1003)
    due = x.clone()
    for _ in range(16):
        due = due * 0.5 + 0.5
    for together in (1, 2, 4, 8, 16):
        y = torch.zeros(1003)
        run(x.data_ptr(), y.data_ptr(), len(x), together, 16 // together)
        torch.testing.assert_close(y, due, rtol=1e-6, atol=0)


@can_build
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 1024), (2, 1025)])
def test_the_kernel_for_rmsnorm_is_rmsnorm(ch10, tmp_path, shape):
    run = compiled.library(KERNELS / "rms.cpp", tmp_path).run
    run.argtypes = POINTER, POINTER, POINTER, WHOLE, WHOLE
    x, w, out = torch.randn(shape), torch.randn(shape[1]), torch.empty(shape)
    run(x.data_ptr(), w.data_ptr(), out.data_ptr(), *shape)
    due = F.rms_norm(x, shape[1:], w, 1e-6)
    torch.testing.assert_close(out, due, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ch10.naive(x, w), due, rtol=1e-4, atol=1e-5)


@can_build
def test_a_library_that_does_not_compile_says_why(tmp_path):
    (tmp_path / "bad.cpp").write_text("int seven( { return 7; }")
    with pytest.raises(RuntimeError, match=r"bad\.cpp"):
        compiled.library(tmp_path / "bad.cpp", tmp_path)


@can_build
@pytest.mark.skipif(os.name == "nt", reason="the linker is called without a shell")
def test_torch_may_lie_in_a_folder_with_a_space(tmp_path, monkeypatch):
    place = tmp_path / "a space" / "lib"
    place.parent.mkdir()
    place.symlink_to(cpp_extension.TORCH_LIB_PATH)
    monkeypatch.setattr(cpp_extension, "TORCH_LIB_PATH", str(place))
    source = place.parent / "seven.cpp"
    source.write_text('extern "C" int seven() { return 7; }')
    assert compiled.library(source, place.parent).seven() == 7
    assert str(place) == cpp_extension.TORCH_LIB_PATH


@pytest.mark.skipif(not machine.can("package:triton"), reason="no triton")
def test_the_kernel_in_triton_agrees_when_it_is_interpreted(tmp_path):
    cells = [c.source for c in build.cells(chapters(["10"])[0])]
    cell = next(c for c in cells if c.startswith('%%writefile "$FOLDER/rms_triton.py"'))
    (tmp_path / "rms_triton.py").write_text(cell.split("\n", 1)[1], encoding="utf-8")
    how = {"env": os.environ | {"TRITON_INTERPRET": "1"}, "capture_output": True, "text": True}
    ran = subprocess.run([sys.executable, tmp_path / "rms_triton.py"], **how)
    assert "within 1e-5: True" in ran.stdout, ran.stderr[-2000:]


# --- Folding ----------------------------------------------------------------------------------


def norms(program):
    return sum(n.target is torch.ops.aten.batch_norm.default for n in program.graph.nodes)


@pytest.mark.parametrize("make", [resnet18, mobilenet_v2, lambda: models.mini_resnet(16, seed=0)])
def test_whole_networks_fold_and_answer_as_before(ch10, make):
    torch.manual_seed(0)
    net = make()
    channels = next(p for p in net.parameters()).shape[1]
    x = torch.randn(2, channels, 32, 32)
    with torch.no_grad():
        for _ in range(3):
            net.train()(x * 2 + 1)
    net, x = net.eval().double(), x.double()
    program = torch.export.export(net, (x,)).module()
    folded = solution("B")(program)
    assert norms(program) > 0, "the program itself stays as it was"
    assert norms(folded) == 0
    with torch.no_grad():
        want = net(x)
        torch.testing.assert_close(folded(x), want, rtol=1e-8, atol=1e-9 * float(want.abs().max()))


def test_the_library_folds_a_convolution_that_is_called_twice_and_the_solution_does_not(ch10):
    """The myth must still be wrong."""
    torch.manual_seed(0)
    twice, x = ch10.lived_in(ch10.Twice(), 16), torch.randn(2, 3, 16, 16)
    assert ch10.differs(fuse(twice), twice, x) > 1e-3
    program = torch.export.export(twice, (x,)).module()
    folded = solution("B")(program)
    assert norms(folded) == 1
    assert ch10.differs(folded, twice, x) == 0


def test_calls_that_share_weight_and_batchnorm_share_what_they_get():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(self.conv(torch.relu(self.bn(self.conv(x)))))

    x = torch.randn(2, 3, 5, 5)
    program = torch.export.export(Both().eval(), (x,)).module()
    before = sum(p.numel() for p in program.parameters())
    folded = solution("B")(program)
    assert norms(folded) == 0
    assert sum(p.numel() for p in folded.parameters()) == before + 3 * 3 + 3
    torch.testing.assert_close(folded(x), program(x))


def test_folding_refuses_what_is_no_convolution_with_one_batchnorm():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)).eval()
    program = torch.export.export(model, (torch.randn(1, 3, 4, 4),)).module()
    nodes = {n.name: n for n in program.graph.nodes}
    with pytest.raises(ValueError, match="no batch_norm"):
        folding.fold_at(program, nodes["conv2d"])
    with pytest.raises(ValueError, match="no conv2d"):
        folding.fold_at(program, nodes["relu"])


# --- Attention --------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_tiles_equal_the_whole_softmax_also_for_huge_scores(ch10, length):
    q, k, v = torch.randn(3, 2, length, 8, dtype=torch.float64).unbind(0)
    for factor in (1.0, 300.0):
        want = F.scaled_dot_product_attention(factor * q, k, v)
        torch.testing.assert_close(ch10.naive_attention(factor * q, k, v), want, atol=1e-10, rtol=0)
        # tiles of one number are slow, and 65 rows of them show what 200 do
        for tile in ((64, 64), (30, 7)) if length > 65 else ((64, 64), (1, 1), (30, 7)):
            torch.testing.assert_close(
                ch10.tiled(factor * q, k, v, *tile), want, atol=1e-10, rtol=0
            )


def test_the_penalty_for_distance_is_symmetric_and_zero_at_home(ch10):
    at = torch.arange(5)
    scores = ch10.nearer(torch.zeros(5, 5), 0, 0, at[:, None], at)
    assert torch.equal(scores, scores.T)
    assert not scores.diagonal().any()
    assert float(scores[0, 4]) == pytest.approx(-0.4)


def test_the_checks_are_registered():
    assert {"10.A", "10.B", "10.C"} <= set(exercises.registry())
