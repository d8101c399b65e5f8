"""What chapter 09 teaches, on real processes: recovery after kill -9, faults that leave nothing
behind, equality, the simulator.
"""

import ast
import hashlib
import math
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from course_utils import distributed, machine
from course_utils.course import build
from course_utils.course.chapters import chapters

SETTINGS = {"width": 16, "depth": 2, "rows": 8, "steps": 9, "kill_at": 4}
HANGS = (
    "import os, time\ndef run(settings):\n    open(f'begun.{os.environ[\"RANK\"]}', 'w').close();"
    " time.sleep(1000)\n"
)
RAISES = (
    "import torch.distributed as dist\ndef run(settings):\n    assert dist.get_rank() == 0, 'rank 1"
    " has no rows'\n    dist.barrier()\n"
)


def code() -> list[str]:
    cells = build.cells(chapters(["09"])[0])
    hidden = {"exercise", "solution", "wrong", "parameters"}
    return [c.source for c in cells if c.cell_type == "code" and not hidden & set(build.tags(c))]


@pytest.fixture(scope="module")
def workers(tmp_path_factory) -> Path:
    """The files that the chapter writes with %%writefile."""
    folder = tmp_path_factory.mktemp("workers")
    for source in code():
        if source.startswith("%%writefile"):
            head, text = source.split("\n", 1)
            (folder / head.rsplit("/", 1)[1]).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def taught() -> SimpleNamespace:
    """The functions and classes of the notebook itself."""
    space = {
        "torch": torch,
        "np": np,
        "math": math,
        "dataclass": dataclass,
        "replace": replace,
        "__name__": "chapter09",
    }
    for source in code():
        if source.startswith("%%writefile"):
            continue
        for node in ast.parse(source).body:
            names = [ast.unparse(t) for t in getattr(node, "targets", [])]
            if isinstance(node, ast.FunctionDef | ast.ClassDef) or names in (["SERVER"], ["GPT"]):
                exec(compile(ast.Module([node], []), "<chapter 09>", "exec"), space)
    return SimpleNamespace(**space)


def alive() -> list[int]:
    """Workers and torchruns that this process started and that still run."""
    mine = psutil.Process().children(recursive=True)
    running = [p for p in mine if p.status() != psutil.STATUS_ZOMBIE]
    return [p.pid for p in running if "distributed" in " ".join(p.cmdline())]


def test_a_run_killed_with_9_ends_at_the_bits_of_an_undisturbed_one(workers, tmp_path):
    told = distributed.launch(workers / "elastic.py", settings=SETTINGS, out=tmp_path, restarts=1)[
        "elastic"
    ][0]
    assert told["disturbed"]["attempt"] == 1
    assert 0 < told["disturbed"]["begin"] <= SETTINGS["kill_at"]
    assert told["undisturbed"]["begin"] == 0
    assert (
        told["disturbed"]["sha256"]
        == told["undisturbed"]["sha256"]
        != hashlib.sha256(b"").hexdigest()
    )
    assert not list(tmp_path.glob("*.part"))
    assert alive() == []


def test_a_worker_that_raises_is_named_with_its_own_traceback(tmp_path):
    (tmp_path / "raises.py").write_text(RAISES)
    with pytest.raises(
        distributed.WorkerError, match=r"(?s)worker 1 raised.*raises\.py.*rank 1 has no rows"
    ) as caught:
        distributed.launch(tmp_path / "raises.py")
    assert str(tmp_path) not in str(caught.value)
    assert alive() == []


@pytest.mark.wall_clock
def test_a_worker_that_hangs_is_stopped_and_its_line_named(tmp_path, monkeypatch):
    """The time is up when both workers hang, however long a busy machine needs until then."""

    class Popen(subprocess.Popen):
        def wait(self, timeout: float | None = None) -> int:
            if timeout is None:
                return super().wait()
            for _ in range(3000):
                if len(list(tmp_path.glob("begun.*"))) == 2 or self.poll() is not None:
                    break
                time.sleep(0.1)
            raise subprocess.TimeoutExpired(self.args, timeout)

    (tmp_path / "hangs.py").write_text(HANGS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", Popen)
    with pytest.raises(TimeoutError, match=r'(?s)worker 0 was here.*"hangs\.py", line 3 in run'):
        distributed.launch(tmp_path / "hangs.py", timeout=12)
    assert alive() == []


def test_a_busy_port_is_retried_and_ddp_equals_the_large_batch(workers):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        first = distributed.launch(
            workers / "ring.py", workers / "equality.py", settings=SETTINGS, port=port
        )
    for told in first["ring"]:
        assert told["equal"]
        assert len(told["messages"]) == 2
    gaps = np.array([told["gaps"] for told in first["equality"]])
    assert (gaps[:, 0] < 1e-5).all()
    assert (gaps[:, 1] < 1e-12).all()
    assert (gaps[:, 2:] > 1e-4).all(), "with BatchNorm it must differ"
    assert alive() == []


def test_a_missing_module_starts_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.py"):
        distributed.launch(tmp_path / "nowhere.py")


def test_the_ring_on_paper_adds_up(taught, capsys, seeded):
    rng = np.random.default_rng(seeded)
    for p in (1, 2, 3, 5, 8):
        vectors = rng.integers(-99, 99, (p, p))
        assert (taught.ring_on_paper(vectors) == vectors.sum(0)).all()


def test_the_simulator_keeps_its_laws(taught):
    cluster = taught.Cluster(rate=1e12, alpha=1e-5, beta=1e10)
    job = taught.Job(operations=1e13, gradient=4e9, blocks=32, border=1e8)
    free = replace(cluster, alpha=0.0, beta=math.inf)
    for p, m in ((2, 4), (4, 8), (8, 1)):
        took = taught.step_time(free, job, taught.Plan(pipe=p, micro=m))
        assert 1 - 10 / p / took == pytest.approx((p - 1) / (m + p - 1))
    alone = taught.step_time(cluster, job, taught.Plan())
    assert alone == pytest.approx(10)
    assert taught.step_time(free, job, taught.Plan(data=4)) == pytest.approx(alone / 4)
    slow = taught.step_time(cluster, job, taught.Plan(data=4))
    assert slow == pytest.approx(alone / 4 + 6 * (1e-5 + 1e9 / 1e10))
    assert (
        alone / 4 < taught.step_time(replace(cluster, hidden=0.5), job, taught.Plan(data=4)) < slow
    )
    speeds = [taught.efficiency(n) for n in (8, 16, 64, 256, 1024)]
    assert speeds[0] == 1
    assert sorted(speeds, reverse=True) == speeds


@pytest.mark.skipif(not machine.can("package:deepspeed"), reason="DeepSpeed is not installed")
def test_the_library_that_the_chapter_switches_off_has_the_name_that_it_uses():
    """With another name DeepSpeed would compile it when it starts: a minute, and gigabytes."""
    written = next(c for c in code() if c.startswith("%%writefile $W/ds.py"))
    assert '__compatible_ops__["deepspeed_shm_comm"] = False' in written
    look = (
        "import deepspeed; print('known:', 'deepspeed_shm_comm' in"
        " deepspeed.ops.__compatible_ops__)"
    )
    told = subprocess.run(
        [sys.executable, "-c", look],
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
    )
    assert "known: True" in told.stdout, told.stderr[-1000:]
