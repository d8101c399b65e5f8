"""Execute chapters from end to end, watch their memory, and collect what they said into one
ledger.
"""

import contextlib
import json
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from nbformat.notebooknode import NotebookNode

from course_utils import processes
from course_utils.course import build, edition
from course_utils.course.chapters import Chapter
from course_utils.ledger import events as recorded

CELL_SECONDS = {"smoke": 300, "fast": 900, "full": None}
"""Longer than any cell. A message between papermill and a kernel can get lost (see plots.explore):
the kernel is idle, papermill waits for ever. So a chapter that gives no answer is run once more.
"""


@dataclass
class Outcome:
    """What one chapter's run gave."""

    chapter: str
    seconds: float = 0.0
    peak_bytes: int = 0
    events: list[dict] = field(default_factory=list)
    error: str = ""

    def counts(self, event: str, key: str) -> Counter:
        return Counter(e[key] for e in self.events if e["event"] == event)


def run(chapters: list[Chapter], profile: str, edition: str, folder: Path) -> list[Outcome]:
    """Run each chapter by papermill into `folder`, going on after a failing one. Ctrl-C stops every
    process started.
    """
    from tqdm import tqdm

    outcomes: list[Outcome] = []
    with tqdm(chapters, unit="chapter", dynamic_ncols=True) as bar:
        for chapter in bar:
            bar.set_description(chapter.name)
            earlier = [e for o in outcomes for e in o.events if e["event"] == "verdict"]
            outcomes.append(run_one(chapter, profile, edition, folder, earlier))
    return outcomes


def run_one(
    chapter: Chapter, profile: str, edition: str, folder: Path, earlier: Sequence[dict] = ()
) -> Outcome:
    """Run one chapter; it finds the `earlier` chapters' verdicts in its ledger, as a reader's last
    chapter would.
    """
    return execute(build.notebook(chapter, edition), chapter.name, profile, folder, earlier)


def execute(
    book: NotebookNode, name: str, profile: str, folder: Path, earlier: Sequence[dict] = ()
) -> Outcome:
    """Run a notebook that is not executed yet in an empty working folder; its copy with outputs
    goes to `folder`.
    """
    import nbformat
    import papermill
    from nbclient.exceptions import CellTimeoutError
    from papermill.exceptions import PapermillExecutionError

    outcome, start = Outcome(name), time.perf_counter()
    with (
        tempfile.TemporaryDirectory(prefix="course-run-") as scratch,
        build.environment(scratch, profile),
        Watch() as watch,
    ):
        before, after = Path(scratch) / "in.ipynb", Path(scratch) / "out.ipynb"
        nbformat.write(book, before)
        events = Path(scratch) / "ledger.jsonl"
        for attempt in (1, 2):
            events.write_text("".join(json.dumps(e) + "\n" for e in earlier), encoding="utf-8")
            outcome.error = ""
            try:
                papermill.execute_notebook(
                    before,
                    after,
                    {"PROFILE": profile},
                    cwd=scratch,
                    kernel_name=build.KERNEL["name"],
                    progress_bar=False,
                    execution_timeout=CELL_SECONDS[profile],
                    **build.QUIET,
                )
            except CellTimeoutError:
                outcome.error = f"a cell took more than {CELL_SECONDS[profile]} s, in two attempts"
                print(
                    f"{name}: no answer for {CELL_SECONDS[profile]} s in attempt {attempt}",
                    file=sys.stderr,
                )
                continue
            except PapermillExecutionError as error:
                outcome.error = (
                    f"cell {error.cell_index} ({_first_line(error.source)}): {error.ename}:"
                    f" {error.evalue}"
                )
            except (
                Exception
            ) as error:  # a kernel that died, a disk that is full: the next chapter still runs
                outcome.error = f"{type(error).__name__}: {error}"
            break
        if watch.interrupted:
            raise KeyboardInterrupt
        if after.is_file():
            part = folder / f".{name}.part"
            part.write_bytes(after.read_bytes())
            part.replace(folder / f"{name}.ipynb")
        outcome.events = recorded(events)[len(earlier) :]
    outcome.seconds, outcome.peak_bytes = time.perf_counter() - start, watch.peak
    return outcome


def ledger(outcomes: list[Outcome], profile: str) -> list[dict]:
    """The verdicts of a run, the last of each claim, each with the machine it was reached on."""
    return edition.rows((e for o in outcomes for e in o.events), profile)


def table(outcomes: list[Outcome]) -> str:
    head = (
        f"{'chapter':24} {'seconds':>8} {'peak MB':>8} {'checks':>8} {'verdicts':>9} {'skips':>6}"
    )
    lines = [head, "-" * len(head)]
    for o in outcomes:
        checks = o.counts("check", "status")
        verdicts, skips = len(o.counts("verdict", "claim")), sum(o.counts("skip", "kind").values())
        passed = f"{checks['passed']}/{sum(checks.values())}"
        lines.append(
            f"{o.chapter:24} {o.seconds:8.1f} {o.peak_bytes / 1e6:8.0f} {passed:>8} {verdicts:9}"
            f" {skips:6}"
        )
    lines += [f"FAILED {o.chapter}: {o.error}" for o in outcomes if o.error]
    return "\n".join(lines)


class Watch:
    """Peak memory of the processes this one starts, and their end.

    Memory is `processes.held_together`, which disturbs nobody who is timed. Ctrl-C is an exception
    that can arrive in a callback of zmq or of the garbage collector, where it is printed and
    dropped. So it is noted as well, and two seconds later what was started is killed: nothing is
    left to wait for.
    """

    def __init__(self, every: float = 0.5) -> None:
        self.every, self.peak, self.interrupted = every, 0, 0.0
        self._is_main = threading.current_thread() is threading.main_thread()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Watch":
        import psutil

        self._before = {p.pid for p in psutil.Process().children(recursive=True)}
        if self._is_main:
            self._handler = signal.signal(signal.SIGINT, self._note)
        self._thread.start()
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = time.monotonic()
        signal.default_int_handler(number, frame)

    def __exit__(self, *_: object) -> None:
        if self._is_main:
            signal.signal(signal.SIGINT, self._handler)
        self._stop.set()
        self._thread.join()
        self._kill()

    def _kill(self) -> None:
        import psutil

        for process in self._started():
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _started(self) -> list:
        import psutil

        return [p for p in psutil.Process().children(recursive=True) if p.pid not in self._before]

    def _sample(self) -> None:
        while not self._stop.wait(self.every):
            if self.interrupted and time.monotonic() > self.interrupted + 2:
                self._kill()
            held = processes.held_together(process.pid for process in self._started())
            self.peak = max(self.peak, held)


def _first_line(source: str) -> str:
    lines = [line for line in source.splitlines() if line.strip() and not line.startswith("#")]
    return lines[0][:60] if lines else ""
