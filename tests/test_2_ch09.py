"""What chapter 09 teaches, on real processes: any number of workers, recovery after kill -9, faults
that say why and leave nothing behind; and its formulas, on more inputs than a notebook has.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from conftest import taught
from safetensors.torch import load, save

from course_utils import ROOT, distributed, machine
from course_utils.course import build
from course_utils.course.chapters import chapters
from course_utils.distributed import heap, launcher, model

SMALL = {"width": 84, "depth": 3, "rows": 84, "rounds": 2, "sizes": [2**6, 2**10]}
SMALL |= {"cases": [[1, 8], [2, 8]], "micro": 2, "wait": 0.0005, "counts": [1, 2, 8]}
SMALL |= {"steps": 6, "kill_at": None, "stop_at": 3}
HANGS = (
    "import os, time\ndef run(settings):\n    open(f'begun.{os.environ[\"RANK\"]}', 'w').close();"
    " time.sleep(1000)\n"
)
RAISES = (
    "import torch.distributed as dist\ndef run(settings):\n    assert dist.get_rank() == 0, 'rank 1"
    " has no rows'\n    dist.barrier()\n"
)
WHO = "import os\ndef run(settings):\n    return [os.getpid(), os.getppid()]\n"


@pytest.fixture(scope="module")
def workers(tmp_path_factory) -> Path:
    """The files that the chapter writes with %%writefile."""
    folder = tmp_path_factory.mktemp("workers")
    for cell in build.cells(chapters(["09"])[0]):
        if found := re.match(r'%%writefile "\$W/(\S+)"( -a)?\n', cell.source):
            with (folder / found[1]).open("a" if found[2] else "w", encoding="utf-8") as file:
                file.write(cell.source[found.end() :] + "\n")
    return folder


@pytest.fixture(scope="module")
def ch09():
    return taught(
        "09",
        SMOKE=True,
        FOLDER=Path(),
        SETTINGS={"width": 128},
        FIT=[[4, 64], [4, 256], [8, 256]],
        typical=distributed.typical,
        measure=None,
        counts=[2, 4, 8],
    )


def alive() -> list[int]:
    """Workers and torchruns that this process started and that still run."""
    mine = psutil.Process().children(recursive=True)
    running = [p for p in mine if p.status() != psutil.STATUS_ZOMBIE]
    return [p.pid for p in running if "distributed" in " ".join(p.cmdline())]


@pytest.mark.parametrize("p", [1, 2, 3, 4, 7])
def test_every_file_runs_on_any_number_of_workers(workers, tmp_path, p):
    """Those that the chapter writes, and those that come with the course."""
    written = [workers / f"{name}.py" for name in ("ring", "equality", "sharded")]
    given = ("messages", "scaling", "sharding", "pipes", "mesh", "elastic", "hang")
    settings = SMALL | {"save": str(tmp_path / "saved")}
    told = distributed.launch(
        *written, *map(distributed.job, given), workers=p, settings=settings, timeout=300
    )
    for rank in range(p):
        one = {name: ranks[rank] for name, ranks in told.items()}
        assert one["ring"]["equal"]
        total = [p * k + 10 * p * (p - 1) / 2 for k in range(2 * p)]
        assert one["ring"]["after"] == total
        gaps = one["equality"]
        for name in ("every row counts", "padding, loss over all workers"):
            assert gaps[name] < 1e-12
        assert gaps["the same in fp32"] < 1e-5
        assert (gaps["worker 0 has padding"] > 1e-2) == (p > 1)
        assert (gaps["BatchNorm, every row counts"] > 1e-3) == (p > 1)
        assert one["mesh"]["apart"] < 1e-5
        assert one["pipes"]["apart"] < 1e-5
        assert all(way["apart"] < 1e-4 for way in one["sharding"].values())
        assert one["elastic"]["nothing forgotten"] == one["elastic"]["killed and restarted"] == 0
        assert one["elastic"]["generator forgotten"] > 1e-6 < one["elastic"]["momentum forgotten"]
        alive = one["pipes"]["alive"]
        assert alive["GPipe, 8"] == 8
        assert alive["1F1B, 8"] == p - rank
        assert alive["one by one, 8"] == 1
    assert list(told["scaling"][0]["2 x 8"]) == ["silent", "ddp"]
    assert set(told["messages"][0]) == {"torch", "ring"}
    assert bool(told["hang"][0]) == (p > 1)
    if p > 1:
        assert re.search(r"Ranks? 1.*failed to pass", told["hang"][0]["monitored_barrier"])
    kept = told["sharding"][0]
    assert kept["FSDP2"]["kept"] == pytest.approx(16 / p, rel=0.1, abs=1.6)
    assert kept["DDP, plain"]["kept"] - kept["DDP, views"]["kept"] == pytest.approx(4, abs=0.3)
    assert alive is not None


@pytest.fixture(scope="module")
def story(workers, tmp_path_factory) -> SimpleNamespace:
    """One launch after another's port: the writer is killed with 9 in the middle of a write, all
    start again; in the last module a worker raises. Then one worker goes on where two were.
    """
    folder, out = tmp_path_factory.mktemp("raises"), tmp_path_factory.mktemp("out")
    (folder / "raises.py").write_text(RAISES)
    settings = {"steps": 6, "kill_at": 3, "save": str(out / "saved")}
    modules = [distributed.job("elastic"), workers / "sharded.py", folder / "raises.py"]
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(distributed.WorkerError) as caught:
            distributed.launch(*modules, settings=settings, out=out, restarts=1, port=port)
    two = {m.stem: distributed.results(out, m.stem, 2) for m in modules[:2]}
    left = alive()
    on = settings | {"go_on": True, "load": str(out / "saved")}
    one = distributed.launch(*modules[:2], workers=1, settings=on, out=out)
    return SimpleNamespace(
        folder=folder, out=out, error=str(caught.value), left=left, two=two, one=one
    )


def test_a_writer_killed_with_9_ends_at_the_bits_of_an_undisturbed_run(story):
    told = story.two["elastic"][0]
    assert told["begin"] == 3  # step 4 was being written
    assert told["killed and restarted"] == told["nothing forgotten"] == 0
    assert min(told["momentum forgotten"], told["generator forgotten"]) > 1e-5
    assert story.left == []


def test_one_worker_goes_on_where_two_were(story):
    told = story.one["elastic"][0]
    assert 0 <= told["dropout 0.0"] < 1e-5 < told["dropout 0.1"]
    sums = [ranks["sharded"][0]["sum"] for ranks in (story.two, story.one)]
    assert sums[0] == pytest.approx(sums[1], abs=1e-5)
    assert story.one["sharded"][0]["part"] == [64, 16]
    assert story.two["sharded"][0]["part"] == [32, 16]


def test_a_worker_that_raises_is_named_with_its_own_traceback(story):
    assert re.search(r"(?s)worker 1 raised.*raises\.py.*rank 1 has no rows", story.error)
    assert str(story.folder) not in story.error


@pytest.mark.skipif(not distributed.FORKS, reason="fresh processes are forks on Linux alone")
def test_each_life_is_a_process_of_its_own_and_its_errors_come_home(tmp_path):
    (tmp_path / "who.py").write_text(WHO)
    lives = distributed.launch(tmp_path / "who.py", fresh=3)["who"]
    assert len(lives) == 3
    assert len({pid for life in lives for pid, _ in life}) == 6
    assert len({parent for life in lives for _, parent in life}) == 2
    (tmp_path / "raises.py").write_text(RAISES)
    with pytest.raises(distributed.WorkerError, match=r"(?s)worker 1 raised.*rank 1 has no rows"):
        distributed.launch(tmp_path / "raises.py", fresh=2)
    assert alive() == []


def test_without_a_safe_fork_each_life_is_a_start(monkeypatch, tmp_path):
    (tmp_path / "who.py").write_text(WHO)
    starts = []

    def torchrun(tail, workers, restarts, port, timeout, env, folder):
        starts.append(tail[-1])
        for rank in range(workers):
            (folder / f"who.worker.0.{rank}.json").write_text(str(len(starts)))
        return 0, ""

    monkeypatch.setattr(launcher, "FORKS", False)
    monkeypatch.setattr(launcher, "_torchrun", torchrun)
    lives = distributed.launch(tmp_path / "who.py", fresh=12)["who"]
    assert lives == [[k, k] for k in range(1, 6)]
    assert starts == ["0"] * 5


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
    for fresh in (0, 2):
        for old in tmp_path.glob("begun.*"):
            old.unlink()
        with pytest.raises(
            TimeoutError, match=r'(?s)worker 0 was here.*"hangs\.py", line 3 in run'
        ):
            distributed.launch(tmp_path / "hangs.py", timeout=12, fresh=fresh)
        assert alive() == []


def worker_alone(monkeypatch, **more: str) -> dict[str, str]:
    """One worker, started without torchrun; its variables."""
    monkeypatch.setattr(launcher, "command", lambda tail, *_: [sys.executable, *tail])
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    names |= {"MASTER_PORT": str(distributed.free_port()), "PYTHONPATH": str(ROOT)}
    return names | more


def test_a_name_that_nobody_knows_is_an_error_that_says_what_to_do(monkeypatch, tmp_path):
    (tmp_path / "who.py").write_text(WHO)
    names = worker_alone(monkeypatch, MASTER_ADDR="nowhere.invalid", GROUP_WORLD_SIZE="2")
    with pytest.raises(distributed.WorkerError, match=r"(?s)'nowhere\.invalid'.*--local-addr"):
        distributed.launch(tmp_path / "who.py", workers=1, env=names, timeout=60)


def test_an_address_that_does_not_answer_is_an_error_that_says_what_to_do(monkeypatch, tmp_path):
    (tmp_path / "who.py").write_text(
        "from course_utils.distributed import worker\nfrom datetime import timedelta\n"
        "worker.PATIENCE = timedelta(seconds=2)\n" + WHO
    )
    patient = "from course_utils.distributed import worker; worker.PATIENCE /= 30; worker.main()"
    names = worker_alone(monkeypatch, MASTER_ADDR="127.0.0.1", GROUP_WORLD_SIZE="2")
    names |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    monkeypatch.setattr(
        launcher, "command", lambda tail, *_: [sys.executable, "-c", patient, *tail[2:]]
    )
    with pytest.raises(distributed.WorkerError, match=r"(?s)did not answer.*--local-addr"):
        distributed.launch(tmp_path / "who.py", workers=1, env=names, timeout=60)


def test_on_one_machine_its_own_name_is_not_asked_for(monkeypatch, tmp_path):
    assert "--local-addr=127.0.0.1" in distributed.command([], 2, 0, 29400)
    if os.name != "posix" or os.getuid() or not shutil.which("unshare"):
        pytest.skip("giving a machine an unknown name needs root and unshare")
    (tmp_path / "who.py").write_text(WHO)
    plain = launcher.command

    def renamed(*given):
        line = "hostname nowhere-at-all; exec " + " ".join(map("'{}'".format, plain(*given)))
        return ["unshare", "--uts", "sh", "-c", line]

    monkeypatch.setattr(launcher, "command", renamed)
    assert len(distributed.launch(tmp_path / "who.py", timeout=60)["who"]) == 2


def test_a_missing_module_starts_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.py"):
        distributed.launch(tmp_path / "nowhere.py")


def test_the_ring_on_paper_adds_up(ch09, capsys, seeded):
    rng = np.random.default_rng(seeded)
    for p in (1, 2, 3, 5, 8):
        vectors = rng.integers(-99, 99, (p, p))
        assert (ch09.ring_on_paper(vectors) == vectors.sum(0)).all()


@pytest.mark.parametrize(("p", "m"), [(1, 1), (2, 1), (3, 5), (4, 8)])
def test_the_timeline_idles_p_minus_1_slots_and_respects_the_order(ch09, capsys, p, m):
    ch09.timeline(p, m)
    rows = [line.split()[2:] for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == p
    for stage, row in enumerate(rows):
        assert len(row) == 2 * (m + p - 1)
        assert row.count("·") == 2 * (p - 1)
        for j in range(m):
            assert row.index(str(j)) == stage + j
            assert row.index("abcdefgh"[j]) == m + p - 1 + (p - 1 - stage) + j


def test_the_model_finds_the_numbers_that_made_the_times(ch09, seeded):
    rng = np.random.default_rng(seeded)
    a, b, c, alpha = 1e-5, 4e-4, 3e-9, 1e-4
    times = {}
    for blocks, rows in [*ch09.fitted.__globals__["FIT"], [6, 192]]:
        silent = a * blocks * rows + b * blocks
        ddp = silent + c * ch09.gradient_bytes(blocks) + 2 * alpha
        times[blocks, rows] = {"silent": silent, "ddp": ddp}
    assert ch09.fitted(times, alpha) == pytest.approx((a, b, c))
    guess = ch09.predicted((a, b, c), 6, 192, alpha)
    assert guess == pytest.approx(times[6, 192]["ddp"])
    spread = {n: 6 * (1e-4 + n / 4 * 1e-9) * rng.uniform(0.99, 1.01) for n in (64, 4096, 2**22)}
    assert model.alpha_beta(spread, p=4) == pytest.approx((1e-4, 1e-9), rel=0.05)


def test_the_bytes_of_the_gradients_are_those_of_the_chain(ch09):
    numbers = sum(p.numel() for p in distributed.chain(128, 3).parameters())
    assert ch09.gradient_bytes(3) == 4 * numbers


def test_efficiency_keeps_its_laws(ch09):
    for messages in (ch09.in_a_ring, ch09.by_halving):
        curve = [ch09.efficiency_at(32, h / 10, messages) for h in range(11)]
        assert sorted(curve) == curve
        assert curve[-1] <= 1
        by_servers = [ch09.efficiency_at(n, 0.5, messages) for n in (1, 2, 8, 32, 512)]
        assert by_servers[0] == 1
        assert sorted(by_servers, reverse=True) == by_servers
    assert ch09.efficiency_at(2, 0, ch09.in_a_ring) == ch09.efficiency_at(2, 0, ch09.by_halving)
    assert ch09.efficiency_at(512, 0, ch09.in_a_ring) < ch09.efficiency_at(512, 0, ch09.by_halving)
    slow = ch09.efficiency_at(32, 1.0, ch09.in_a_ring, card=1e8)
    assert slow == pytest.approx(0.18 / (0.18 + 62 * 50e-6 + 2 * 31 / 32 - 0.12))


def test_a_line_gives_slope_and_slots(ch09):
    times = {f"GPipe, {m}": [0.01 * (m + 3)] * 2 for m in (2, 4, 8)}
    slope, slots = ch09.line([{"times": times}, {"times": times}], "GPipe")
    assert (slope, slots) == pytest.approx((0.01, 3))


def test_a_file_is_complete_or_absent(ch09, tmp_path):
    contents = [save({"done": torch.tensor(k)}) for k in range(3)]
    ch09.write(tmp_path / "a.st", contents[0], die=True)
    assert not (tmp_path / "a.st").exists()
    ch09.write(tmp_path / "a.st", contents[1])
    ch09.write(tmp_path / "a.st", contents[2], die=True)
    assert int(load((tmp_path / "a.st").read_bytes())["done"]) == 1


def test_without_glibc_the_profiler_counts(monkeypatch):
    monkeypatch.setattr(heap, "_in_use", lambda: None)
    result, kept, peak = heap.kept_and_peak(lambda: torch.ones(1000) + torch.ones(1000))
    assert (len(result), kept, peak) == (1000, 4000, 12000)


@pytest.mark.settled
@pytest.mark.skipif(not machine.can("package:deepspeed"), reason="DeepSpeed is not installed")
def test_the_library_that_the_chapter_switches_off_has_the_name_that_it_uses():
    """With another name DeepSpeed would compile it when it starts: a minute, and gigabytes."""
    written = distributed.job("deep").read_text(encoding="utf-8")
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
