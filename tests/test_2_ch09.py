"""What chapter 09 teaches, on real processes: recovery after kill -9, faults that leave nothing
behind, equality, the simulator.
"""

import ast
import hashlib
import math
import os
import re
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
            (folder / head.strip('"').rsplit("/", 1)[1]).write_text(text, encoding="utf-8")
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


@pytest.fixture(scope="module")
def story(workers, tmp_path_factory) -> SimpleNamespace:
    """One launch after another's port: a worker is killed with 9, all start again and go through
    three modules; in the last one a worker raises.
    """
    folder, out = tmp_path_factory.mktemp("raises"), tmp_path_factory.mktemp("out")
    (folder / "raises.py").write_text(RAISES)
    modules = [workers / f"{name}.py" for name in ("elastic", "ring", "equality")]
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        with pytest.raises(distributed.WorkerError) as caught:
            distributed.launch(
                *modules,
                folder / "raises.py",
                settings=SETTINGS,
                out=out,
                restarts=1,
                port=busy.getsockname()[1],
            )
    told = {m.stem: distributed.results(out, m.stem, 2) for m in modules}
    return SimpleNamespace(folder=folder, out=out, error=str(caught.value), left=alive(), **told)


def test_a_run_killed_with_9_ends_at_the_bits_of_an_undisturbed_one(story):
    told = story.elastic[0]
    assert told["disturbed"]["attempt"] == 1
    assert 0 < told["disturbed"]["begin"] <= SETTINGS["kill_at"]
    assert told["undisturbed"]["begin"] == 0
    assert (
        told["disturbed"]["sha256"]
        == told["undisturbed"]["sha256"]
        != hashlib.sha256(b"").hexdigest()
    )
    assert not list(story.out.glob("*.part"))
    assert story.left == []


def test_a_worker_that_raises_is_named_with_its_own_traceback(story):
    assert re.search(r"(?s)worker 1 raised.*raises\.py.*rank 1 has no rows", story.error)
    assert str(story.folder) not in story.error
    assert story.left == []


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


def test_a_busy_port_is_retried_and_ddp_equals_the_large_batch(story):
    for told in story.ring:
        assert told["equal"]
        assert len(told["messages"]) == 2
    gaps = np.array([told["gaps"] for told in story.equality])
    assert (gaps[:, 0] < 1e-5).all()
    assert (gaps[:, 1] < 1e-12).all()
    assert (gaps[:, 2:] > 1e-4).all(), "with BatchNorm it must differ"


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


@pytest.mark.settled
@pytest.mark.skipif(not machine.can("package:deepspeed"), reason="DeepSpeed is not installed")
def test_the_library_that_the_chapter_switches_off_has_the_name_that_it_uses():
    """With another name DeepSpeed would compile it when it starts: a minute, and gigabytes."""
    written = next(c for c in code() if c.startswith('%%writefile "$W/ds.py"'))
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
