"""Several ways to run one network, each in a process of its own: what chapter 11's children do.

A way is a Python file that defines `precision` (a text) and `run(images)`, from a float32 array
(batch, 1, 28, 28) to logits. It finds THREADS and FOLDER among its names.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

BATCHES = (1, 32)
CALLS = {1: 8, 32: 2}
"""Calls in a row that one answer takes the mean of, once the way's own caches are warm again."""


def load(path: str | Path, threads: int, folder: str | Path) -> dict:
    """Execute a way's file and return its names. Raises KeyError where `run` or `precision` is
    missing.

    >>> code = "precision = 'float32'; run = lambda images: images * THREADS"
    >>> Path("way.py").write_text(code) > 0
    True
    >>> load("way.py", 2, ".")["run"](1.5)
    3.0
    """
    way = {"THREADS": threads, "FOLDER": str(folder), "__name__": "way"}
    text = Path(path).read_text(encoding="utf-8")
    exec(compile(text, str(path), "exec"), way)
    for name in ("run", "precision"):
        if name not in way:
            raise KeyError(f"{Path(path).name} defines no {name}.")
    return way


def sampler() -> Callable[[], dict]:
    """A child's `sample` for `measure.turns`: the way that the environment's WAY names, with its
    THREADS and FOLDER; FOLDER/known.npz holds `images` and torch's `logits` in 64 bits.

    Each answer holds, for each batch size, the seconds of the first call after the others had their
    turn ("cold 1") and the mean of the next ones ("hot 1"); what does not change from answer to
    answer: seconds to be `ready`, `far` (largest gap to the logits), `agree` (share of equal
    classes) and `precision`.

    >>> sampler()()["precision"]  # doctest: +SKIP
    'torch.float32'
    """
    start = time.perf_counter()
    folder = Path(os.environ["FOLDER"])
    way = load(os.environ["WAY"], int(os.environ["THREADS"]), folder)
    run = way["run"]
    run(np.zeros((1, 1, 28, 28), np.float32))
    told: dict = {"ready": time.perf_counter() - start, "precision": way["precision"]}
    with np.load(folder / "known.npz") as known:
        images, logits = known["images"], known["logits"]
    answers = np.concatenate([run(part) for part in np.split(images, len(images) // 32)])
    told["far"] = float(np.abs(answers - logits).max())
    told["agree"] = float((answers.argmax(1) == logits.argmax(1)).mean())

    def seconds(part: np.ndarray, calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            run(part)
        return (time.perf_counter() - begin) / calls

    def sample() -> dict:
        for batch in BATCHES:
            part = images[:batch]
            told[f"cold {batch}"] = seconds(part, 1)
            told[f"hot {batch}"] = seconds(part, CALLS[batch])
        return told

    return sample


def neighbours(path: str | Path, rounds: int, threads: int) -> dict[str, float]:
    """Milliseconds of an eager call of the course's network at batch 1 right after each of four
    neighbours, the median of `rounds` rounds, each in a new order: an eager call, 20 ms of sleep,
    and a call of ONNX Runtime on the file `path` with its threads told not to spin, and as they
    come.

    >>> neighbours("net.onnx", 60, 2)["an eager call"] > 0  # doctest: +SKIP
    True
    """
    import onnxruntime
    import torch

    from course_utils import models

    torch.set_num_threads(threads)
    net, x = models.baseline(), torch.randn(1, 1, 28, 28)

    def eager() -> None:
        with torch.inference_mode():
            net(x)

    def session(spins: bool) -> Callable[[], object]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spins)))
        opened = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        return lambda: opened.run(None, {"image": x.numpy()})

    before = {
        "an eager call": eager,
        "20 ms of sleep": lambda: time.sleep(0.02),
        "ONNX Runtime, spinning off": session(False),
        "ONNX Runtime, its default": session(True),
    }
    taken: dict[str, list[float]] = {name: [] for name in before}
    order = np.random.default_rng()
    for _ in range(rounds):
        for name in order.permutation(list(before)):
            before[name]()
            start = time.perf_counter()
            eager()
            taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(t[2:])) for name, t in taken.items()}


def side_by_side(path: str | Path, seconds: float) -> dict[str, float]:
    """Images a second that two ONNX Runtime sessions on the file `path` serve together, each in a
    thread that calls it with batch 32 for `seconds`: with ONNX Runtime's own number of threads,
    which spin ("default"), and with "one thread each". The sessions of the one are closed before
    those of the other open; which comes first is drawn.

    >>> side_by_side("net.onnx", 0.5)["default"] > 0  # doctest: +SKIP
    True
    """
    found = {}
    for how in np.random.default_rng().permutation(["default", "one thread each"]):
        found[str(how)] = _served(path, 1 if how == "one thread each" else 0, seconds)
    return found


def _served(path: str | Path, threads: int, seconds: float) -> float:
    """Images a second by two sessions of `threads` threads each (0: ONNX Runtime's own choice)."""
    import threading

    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    images = {"image": np.zeros((32, 1, 28, 28), np.float32)}
    cpu = ["CPUExecutionProvider"]
    sessions = [onnxruntime.InferenceSession(str(path), options, cpu) for _ in range(2)]
    calls = [0, 0]
    for session in sessions:
        session.run(None, images)
    start = time.perf_counter()

    def serve(i: int) -> None:
        while time.perf_counter() < start + seconds:
            sessions[i].run(None, images)
            calls[i] += 1

    workers = [threading.Thread(target=serve, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return 32 * sum(calls) / (time.perf_counter() - start)
