"""This machine: its card, what it can do, what a container leaves of it, its processes."""

import ctypes
import faulthandler
import json
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from course_utils import ROOT, cpu, distributed, limits, llm, machine, processes


def test_skips_are_typed_and_false():
    for what in (
        "gpu",
        "vnni",
        "bf16",
        "compiler",
        "energy",
        "root",
        "full",
        "two cores",
        "signals",
        "package:nowhere",
    ):
        answer = machine.can(what)
        assert answer is True or (isinstance(answer, machine.Skip) and not answer and answer.reason)
    assert machine.can("package:torch") is True
    nowhere = machine.can("package:nowhere")
    assert nowhere.kind == "package"
    assert "make setup" in nowhere.remedy
    assert "make setup-extended" in nowhere.remedy
    for unknown in ("tpu", "many GB", "-3 GB"):
        with pytest.raises(ValueError, match=f"not '{unknown}'"):
            machine.can(unknown)
    with pytest.raises(ValueError, match="'boredom'"):
        machine.Skip("boredom", "no reason")
    with pytest.raises(ValueError, match="must run"):
        machine.skip("package:torch", "nothing")


def test_the_card_shows_the_same_in_text_and_html():
    card = machine.card()
    assert card.cpu in repr(card)
    assert card.profile in card._repr_html_()
    assert json.dumps(card.as_dict())


def test_the_memory_a_process_holds_grows_with_what_it_fills():
    before = processes.held_bytes(os.getpid())
    # straight from the system: the allocator may still hold what an earlier test gave back
    filled = np.frombuffer(mmap.mmap(-1, 50 * 2**20), np.uint8)
    filled[:] = 1
    assert 45 * 2**20 < processes.held_bytes(os.getpid()) - before < 70 * 2**20
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert processes.held_bytes(ended.pid) == 0


def test_a_zombie_does_not_run_and_what_runs_is_waited_for_no_longer_than_said():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    assert processes.wait_gone([ended.pid], seconds=20)
    assert not processes.runs(ended.pid), "it ended; nobody has asked how"
    ended.wait()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as asleep:
        assert processes.runs(asleep.pid)
        assert not processes.wait_gone([ended.pid, asleep.pid], seconds=0.1)
        asleep.kill()
        assert processes.wait_gone([asleep.pid], seconds=20)


def test_vector_code_is_not_compiled_where_vectors_are_capped(monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert machine.can("compiler").kind == "isa"
    monkeypatch.delenv("ATEN_CPU_CAPABILITY")
    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cpu, "features", lambda: {"avx2": False})
    assert machine.can("compiler").kind == "isa"
    monkeypatch.setattr(cpu, "features", lambda: {"avx2": True})
    assert getattr(machine.can("compiler"), "kind", "") != "isa"


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Control groups as planted: file name → content; and the groups this process is in."""

    def plant(own: str, **files: str) -> None:
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (tmp_path / "own").write_text(own)

    monkeypatch.setattr(limits, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(limits, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(limits.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    return plant


def v1(quota: int, folder: str) -> dict[str, str]:
    return {
        f"{folder}/cpu.cfs_quota_us": f"{quota}\n",
        f"{folder}/cpu.cfs_period_us": "100000\n",
    }


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/\n", {}, 8),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "300000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "20000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "nonsense"}, 8),
        ("0::/a/b\n", {"a/b/cpu.max": "200000 100000\n", "cpu.max": "max 100000\n"}, 2),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "400000 100000\n"}, 4),
        ("0::/a\n", {"b/cpu.max": "100000 100000\n"}, 8),
        ("0::/../b\n", {"cpu.max": "200000 100000\n"}, 2),
        ("", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/a\n", {"unified/a/cpu.max": "200000 100000\n"}, 2),
        ("4:cpu,cpuacct:/\n0::/\n", v1(-1, "cpu"), 8),
        ("4:cpu,cpuacct:/\n0::/\n", v1(100000, "cpu"), 1),
        ("4:cpu,cpuacct:/\n0::/\n", v1(250000, "cpu,cpuacct"), 2),
        ("4:cpu:/docker/x\n0::/\n", v1(200000, "cpu/docker/x"), 2),
        ("4:cpu:/docker/x\n0::/\n", v1(200000, "cpu/docker"), 2),
        ("4:cpu:/docker/x\n0::/\n", v1(200000, "cpu"), 2),
        ("4:cpu:/docker/y\n0::/\n", v1(200000, "cpu/docker/x"), 8),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "0\n"}, 8),
    ],
)
def test_cores_are_those_of_the_smallest_quota_above_this_process(groups, own, files, cores):
    groups(own, **files)
    assert limits.usable_cores() == cores
    assert machine.usable_cores() == cores


def test_threads_are_capped_by_the_quota(groups, monkeypatch):
    """One core of many: the variable for processes to come, and torch, which is loaded already."""
    groups("0::/\n", **{"cpu.max": "100000 100000\n"})
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setattr(limits.os, "cpu_count", lambda: 8)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert limits.cap_threads() == 1
        assert torch.get_num_threads() == 1
        assert os.environ["OMP_NUM_THREADS"] == "1"
    finally:
        torch.set_num_threads(before)


def test_a_quota_never_adds_cores(groups, monkeypatch):
    groups("0::/\n", **{"cpu.max": "400000 100000\n"})
    monkeypatch.setattr(limits.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert limits.usable_cores() == 2


@pytest.mark.parametrize(
    "name", ["memory.max", "memory/memory.limit_in_bytes", "memory/own/memory.limit_in_bytes"]
)
def test_a_container_with_little_memory_gets_the_tiny_language_model(name, groups):
    own = "3:memory:/own\n0::/\n"
    groups(own)
    whole = machine.memory_gb()
    groups(own, **{name: "max\n"})
    assert machine.memory_gb() == whole
    groups(own, **{name: str(2 * 2**30)})
    assert machine.memory_gb() == 2
    assert machine.can("2 GB") is True
    answer = machine.can("3 GB")
    assert (answer.kind, answer.reason) == (
        "memory",
        "3 GB of memory are needed; this machine lets the course use 2.0.",
    )
    model = llm.load()
    assert not model.real
    assert model.why.kind == "memory"


@pytest.fixture
def computer(tmp_path, monkeypatch):
    """Another computer: its architecture, its system, /proc/cpuinfo, and what torch says of it."""

    def build(architecture, system, cpuinfo=None, torch_says=None, processor="") -> None:
        monkeypatch.setattr(cpu.platform, "machine", lambda: architecture)
        monkeypatch.setattr(cpu.platform, "processor", lambda: processor)
        monkeypatch.setattr(cpu.sys, "platform", system)
        monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
        if cpuinfo is not None:
            (tmp_path / "cpuinfo").write_text(cpuinfo)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: torch_says or {})
        cpu.features.cache_clear()

    yield build
    cpu.features.cache_clear()


def sysctl(monkeypatch, answers: dict[str, str]) -> None:
    def run(command, **_):
        assert command[:2] == ["sysctl", "-n"]
        return SimpleNamespace(stdout=answers.get(command[2], ""))

    monkeypatch.setattr(cpu.subprocess, "run", run)


def kinds() -> tuple:
    return tuple(getattr(machine.can(what), "kind", True) for what in ("vnni", "bf16"))


def test_a_mac_is_asked_by_sysctl(computer, monkeypatch):
    computer("arm64", "darwin", processor="arm")
    feat = "hw.optional.arm.FEAT_"
    sysctl(monkeypatch, {f"{feat}DotProd": "1\n", f"{feat}I8MM": "1\n", f"{feat}BF16": "1\n"})
    assert machine.isa() == ("dotprod", "i8mm", "bf16")
    assert kinds() == (True, True)
    cpu.features.cache_clear()
    sysctl(monkeypatch, {f"{feat}DotProd": "1\n", f"{feat}I8MM": "0\n", f"{feat}BF16": "0\n"})
    assert machine.isa() == ("dotprod",)
    assert "has no bf16" in machine.can("bf16").reason
    cpu.features.cache_clear()
    sysctl(monkeypatch, {f"{feat}DotProd": "1\n"})  # an older macOS does not know the others
    assert machine.isa() == ("dotprod",)
    assert "does not tell" in machine.can("bf16").reason
    assert machine.can("bf16").kind == "isa"
    assert "not known: i8mm, bf16, sve" in repr(machine.card())


def test_arm_on_windows_tells_of_its_dot_product_alone(computer, monkeypatch):
    computer("ARM64", "win32", processor="ARMv8 (64-bit) Family 8 Model 1, Qualcomm")
    asked = []
    kernel32 = SimpleNamespace(IsProcessorFeaturePresent=lambda n: asked.append(n) or 1)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel32), raising=False)
    assert machine.can("vnni") is True
    assert asked == [43]
    assert "does not tell" in machine.can("bf16").reason
    assert "Family 8 Model 1" in machine.card().cpu


@pytest.mark.parametrize("architecture", ["aarch64", "riscv64", "x86_64"])
def test_where_nothing_can_be_found_nothing_is_denied(computer, architecture):
    computer(architecture, "freebsd")
    assert machine.isa() == ()
    assert kinds() == ("isa", "isa")
    for what in ("vnni", "bf16"):
        assert "does not tell" in machine.can(what).reason
    assert "Instruction sets  not known" in repr(machine.card())


def test_arm_on_linux_and_what_torch_found_elsewhere(computer):
    computer("aarch64", "linux", "Features\t: fp asimd asimddp i8mm\n")
    assert machine.isa() == ("dotprod", "i8mm")
    assert "has no bf16" in machine.can("bf16").reason
    computer("aarch64", "freebsd", torch_says={"dot": True, "bf16": False})
    (cpu.CPUINFO).unlink()
    cpu.features.cache_clear()
    assert machine.isa() == ("dotprod",)
    assert "does not tell" in machine.can("bf16").reason, "torch's no is a guess there"


X86_INFO = """\
processor\t: 0
cpu family\t: 6
model\t\t: 143
model name\t: Some Xeon
stepping\t: 8
flags\t\t: sse avx2 avx512f avx512_vnni avx512_bf16
"""


def test_family_and_model_stand_on_the_card(computer):
    says = {"avx2": True, "avx512_f": True, "avx512_vnni": False, "avx_vnni": False}
    computer("x86_64", "linux", X86_INFO, says | dict.fromkeys(cpu.X86[4:], False))
    card = machine.card()
    assert (card.cpu, card.model) == ("Some Xeon", "family 6, model 143, stepping 8")
    assert card.model in repr(card)
    assert card.model in card._repr_html_()
    assert card.isa == ("avx2", "avx512_f")
    assert "has no INT8" not in repr(machine.can("gpu"))
    assert kinds() == ("isa", "isa")
    assert "CPU has no" in machine.can("vnni").reason
    computer("x86_64", "linux", X86_INFO)  # a torch that does not tell: the kernel does
    assert machine.isa() == ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16")


@pytest.fixture
def windows(monkeypatch):
    """Without the signals and the part of faulthandler that Windows lacks."""
    for name in ("SIGUSR1", "SIGSTOP", "SIGCONT"):
        monkeypatch.delattr(signal, name)
    monkeypatch.delattr(faulthandler, "register")
    monkeypatch.setattr(psutil.Process, "suspend", lambda _: None)  # it is no signal there


def test_signals_that_a_system_lacks_are_a_typed_skip(windows):
    answer = machine.can("signals")
    assert (answer.kind, bool(answer)) == ("system", False)
    assert "SIGUSR1" in answer.reason


def test_a_process_is_ended_without_those_signals(windows):
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {!r}]); {}"
    nap = "import time; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code.format(nap, "time.sleep(60)")]) as parent:
        while not (below := psutil.Process(parent.pid).children()):
            pass
        processes.end(parent.pid)
        parent.wait()
    assert not processes.runs(below[0].pid)
    processes.end(parent.pid)  # it is gone: no error


LACKING = """\
import faulthandler, signal
del faulthandler.register, signal.SIGUSR1
"""


LOST = """\
import faulthandler
def run(settings):
    assert not hasattr(faulthandler, "register")
    return {}["lost"]
"""


def test_a_worker_without_faulthandlers_signal_keeps_its_traceback(tmp_path, windows, monkeypatch):
    """The worker is started alone: torchrun would start it no otherwise, and takes its time."""
    (tmp_path / "sitecustomize.py").write_text(LACKING)  # so that the worker lacks it, too
    (tmp_path / "lost.py").write_text(LOST)
    monkeypatch.setattr(distributed.launcher, "command", lambda tail, *_: [sys.executable, *tail])
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(distributed.free_port())}
    names |= {"PYTHONPATH": os.pathsep.join(map(str, [tmp_path, ROOT]))}
    with pytest.raises(distributed.WorkerError, match="KeyError: 'lost'"):
        distributed.launch(tmp_path / "lost.py", workers=1, env=names)


def test_where_workers_hang_is_not_known_without_that_signal(tmp_path, windows, monkeypatch):
    (tmp_path / "slow.py").touch()
    slow = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(distributed.launcher, "command", lambda *_: slow)
    with pytest.raises(TimeoutError, match="no signal to ask them"):
        distributed.launch(tmp_path / "slow.py", workers=1, timeout=0.2)


@pytest.mark.skipif(sys.platform != "linux", reason="forks and /proc")
def test_what_is_held_together_counts_a_forks_own_memory_and_not_its_parents():
    source = (
        "import os, sys, time; block = bytearray(80_000_000); pid = os.fork()\n"
        "if pid == 0: more = bytearray(40_000_000)\n"
        "print(pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True)
    try:
        pids = [int(parent.stdout.readline()) for _ in range(2)]
        child = max(pids)
        alone = processes.held_together([parent.pid])
        assert 80e6 < alone < 130e6
        assert 38e6 < processes.held_together(iter([parent.pid, child])) - alone < 60e6
        assert processes.held_together([child]) > 110e6  # its parent is not among them
        both = sum(map(processes.held_bytes, (parent.pid, child)))
        assert processes.held_together([parent.pid, child]) == pytest.approx(both, rel=0.15)
    finally:
        processes.end(parent.pid)
        parent.wait()
    assert processes.held_together([parent.pid]) == 0


def test_what_is_held_together_is_read_without_a_walk_through_the_pages(monkeypatch):
    def walks(*_, **__):
        raise AssertionError("this walks through all pages")

    monkeypatch.setattr(Path, "read_text", walks)
    for name in ("memory_full_info", "memory_maps", "memory_footprint"):
        monkeypatch.setattr(psutil.Process, name, walks, raising=False)
    monkeypatch.setattr(processes, "held_bytes", walks)
    assert processes.held_together([os.getpid()]) > 2**20
