"""The `course` command, the builder, the set-up and the first cell for a notebook opened alone."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import CHAPTERS, names

from course_utils import ROOT, machine
from course_utils.course import badges, build, chapters, cli, report, run, setup

MINI = """\
# %% [markdown]
# # 97 · Mini

# %% tags=["parameters"]
PROFILE = "fast"

# %% tags=["exercise"]
def f(x): ...

# %%
print("checked")

# %% [markdown] tags=["hint"]
# a hint

# %% tags=["solution"]
def f(x):
    return 42

# %% tags=["wrong"]
def f(x):
    return 41

# %% [markdown] tags=["instructor"]
# a note
"""


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A course of one's own in a folder with a space: notebooks/source with the chapters given."""
    notebooks = tmp_path / "my course" / "notebooks"
    (notebooks / "source").mkdir(parents=True)
    monkeypatch.setattr(chapters.chapters, "__defaults__", (None, notebooks / "source"))

    def add(name: str, source: str = MINI) -> chapters.Chapter:
        path = notebooks / "source" / f"{name}.py"
        path.write_text(source)
        return chapters.Chapter(path)

    return add


def test_the_three_editions(house):
    chapter = house("97_mini")
    learner, instructor, student = (build.notebook(chapter, e) for e in chapters.EDITIONS)

    def code(book):
        return "\n".join(c.source for c in book.cells if c.cell_type == "code")

    def text(book):
        return "\n".join(c.source for c in book.cells if c.cell_type == "markdown")

    assert "return 42" in code(instructor)
    assert "return 42" not in code(learner) + code(student) + text(student)
    assert (
        "<details><summary>One solution</summary>\n\n```python\ndef f(x):\n    return 42"
        in text(learner)
    )
    assert "def f(x): ..." in code(learner)
    assert "def f(x): ..." in code(student)
    assert "a hint" in text(learner)
    assert "a hint" in text(student)
    assert "return 41" in text(instructor)
    assert "return 41" not in code(instructor) + code(learner) + text(learner) + text(student)
    assert "For the teacher" in text(instructor)
    assert "a note" not in text(learner) + text(student)
    for book in (learner, instructor, student):
        nbformat.validate(book)
        assert len({c.id for c in book.cells}) == len(book.cells)


def test_building_twice_gives_the_same_bytes_and_prose_alone_needs_no_execution(house):
    chapter = house("97_mini", MINI.replace("def f(x): ...", "def f(x): ...\n\n\n1 + 1"))
    first = build.write_learner(chapter, "smoke").read_bytes()
    assert build.write_learner(chapter, "smoke").read_bytes() == first
    chapter = house("97_mini", chapter.text().replace("· Mini", "· Mini, said better"))
    path = build.write_learner(chapter, "fast", keep_outputs=True)
    book = nbformat.read(path, 4)
    assert "said better" in book.cells[0].source
    assert (
        book.metadata["course"]["profile"] == "smoke"
    )  # the outputs are still those of the earlier run
    assert [c.execution_count for c in book.cells if c.cell_type == "code"] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "77"], "no chapter '77'"),
        (["run", "--profile", "slow"], "'slow'; it must be one of smoke, fast, full"),
        (["build", "--edition", "pirate"], "'pirate'; it must be one of learner"),
        (["run", "--out", "/proc/none"], "cannot write to /proc/none"),
        (["report", "/nowhere.json"], "cannot read /nowhere.json"),
        (["badges", "--repo", "nonsense"], "'nonsense'"),
    ],
)
def test_a_usage_error_is_one_clear_line_and_status_2(arguments, said, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("content", ["no json", "{}", "[]", '[{"claim": "x"}]', "[3]"])
def test_what_is_no_ledger_is_refused(content, tmp_path, capsys):
    (tmp_path / "l.json").write_text(content)
    assert cli.main(["report", str(tmp_path / "l.json"), "--out", str(tmp_path)]) == 2
    assert "no ledger" in capsys.readouterr().err
    assert not list(tmp_path.glob("report*"))


def row(claim, verdict, cpu="A", **more):
    card = {"cpu": cpu, "isa": ["avx2"], "cores": 2, "architecture": "x"}
    base = {
        "claim": claim,
        "chapter": claim[:2],
        "statement": "<b>s</b>",
        "value": 1.0,
        "low": 0.9,
        "high": 1.1,
        "unit": "x",
    }
    return base | {"verdict": verdict, "reason": "", "machine": card} | more


def test_report_over_two_machines(tmp_path):
    (tmp_path / "a.json").write_text(
        json.dumps([row("01.p", "holds here"), row("01.q", "inconclusive")])
    )
    skipped = row(
        "01.q", "not testable here", "B", value=None, low=None, high=None, reason="no GPU"
    )
    (tmp_path / "b.json").write_text(json.dumps([row("01.p", "does not hold here", "B"), skipped]))
    page, picture = report.report([tmp_path / "a.json", tmp_path / "b.json"], tmp_path)
    text = page.read_text()
    assert text.count("holds here") >= 2
    assert "no GPU" in text
    assert "<b>s</b>" not in text  # a statement is text, not markup
    assert "http" not in text.split("</style>")[1].split("base64")[0]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_capped_run_is_a_machine_of_its_own_in_the_report(tmp_path, monkeypatch):
    free, capped = row("01.p", "holds here"), row("01.p", "inconclusive")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    capped["machine"] |= {"caps": machine.card().as_dict()["caps"]}
    for name, claim in (("a.json", free), ("b.json", capped)):
        (tmp_path / name).write_text(json.dumps([claim]))
    text = report.report([tmp_path / "a.json", tmp_path / "b.json"], tmp_path)[0].read_text()
    heads = [h.split("</th>")[0] for h in text.split("<th>")[3:]]
    assert [h.endswith("ONEDNN_MAX_CPU_ISA=SSE41") for h in heads] == [False, True]
    assert "ONEDNN_MAX_CPU_ISA=SSE41" in repr(machine.card())


def test_run_goes_on_after_a_failing_chapter_and_names_the_cell(house, tmp_path, capsys):
    house("97_mini", MINI)
    house("96_broken", MINI.replace('print("checked")', "wrong = 1 / 0"))
    status = cli.main(["run", "--profile", "smoke", "--out", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert status == 1
    assert "FAILED 96_broken" in out
    assert "wrong = 1 / 0" in out
    assert "ZeroDivisionError" in out
    assert (tmp_path / "out" / "97_mini.ipynb").is_file()
    assert json.loads((tmp_path / "out" / "ledger.json").read_text()) == []


def test_ctrl_c_stops_every_process_and_leaves_finished_outputs_whole(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "97_mini.py").write_text(MINI)
    sleeper = (
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import time;"
        " time.sleep(987)'])"
    )
    (source / "98_slow.py").write_text(MINI.replace('print("checked")', sleeper))
    code = (
        "import sys, pathlib; from course_utils.course import chapters, cli\n"
        f"chapters.chapters.__defaults__ = (None, pathlib.Path({str(source)!r}))\n"
        f"sys.exit(cli.main(['run', '--profile', 'smoke', '--out', {str(tmp_path / 'out')!r}]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    import psutil

    end = time.monotonic() + 90
    while time.monotonic() < end and not _sleeping(psutil.Process(process.pid)):
        time.sleep(0.2)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    assert "interrupted" in error
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    nbformat.validate(nbformat.read(tmp_path / "out" / "97_mini.ipynb", 4))
    assert not (tmp_path / "out" / "98_slow.ipynb").exists()


def test_a_ctrl_c_that_was_swallowed_ends_the_chapter_all_the_same(house, tmp_path, monkeypatch):
    """As if it had arrived in a callback that prints exceptions and drops them."""
    swallowed = []
    monkeypatch.setattr(signal, "default_int_handler", lambda *_: swallowed.append(1))
    chapter = house("97_slow", MINI.replace('print("checked")', "import time\ntime.sleep(500)"))
    timer = threading.Timer(8, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    start, handler = time.monotonic(), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run.run_one(chapter, "smoke", "learner", tmp_path)
    assert swallowed
    assert time.monotonic() - start < 60
    assert signal.getsignal(signal.SIGINT) is handler
    assert not list(tmp_path.glob("97_slow.ipynb"))


def _sleeping(process) -> bool:
    import psutil

    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it may end while we look
            if "time.sleep(987)" in " ".join(child.cmdline()):
                return True
    return False


def test_doctor_names_what_is_missing_with_its_remedy(monkeypatch, capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["card"]["cores"] >= 1
    assert all(s["kind"] and s["reason"] for s in found["skips"])
    from course_utils import data

    monkeypatch.setattr(
        data,
        "verified",
        lambda path, *_: (_ for _ in ()).throw(data.DataError(f"{path.name} is broken")),
    )
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "PROBLEM     fashion_mnist_test.npz is broken" in out
    assert "git checkout -- datasets/fashion_mnist_test.npz" in out


def test_set_up_is_skipped_when_done_and_repaired_when_interrupted(tmp_path, monkeypatch):
    root = tmp_path / "with space"
    (root / "tests").mkdir(parents=True)
    copied = ("pyproject.toml", "requirements.lock", "requirements-extended.lock")
    for name in (*copied, setup.OTHER_TENSORRT):
        (root / name).write_bytes((ROOT / name).read_bytes())
    monkeypatch.setattr(setup, "ROOT", root)
    monkeypatch.setattr(setup, "VENV", root / ".venv")
    monkeypatch.setattr(setup, "STAMP", root / ".venv" / "course-setup.json")
    calls: list[tuple] = []

    def pip(*arguments, **_):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(setup, "pip", pip)
    monkeypatch.setattr(setup, "torch_backend", lambda: None)
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    assert setup.main() == 130
    assert not setup.STAMP.exists()
    assert setup.main() == 0
    assert any("--require-hashes" in c for c in calls)
    done = len(calls)
    assert setup.main() == 0
    assert len(calls) == done, "a second call must install nothing"
    (root / "requirements.lock").write_text("# changed\n")
    assert setup.main() == 0
    assert len(calls) > done
    (
        root / ".venv" / "bin" / "python"
    ).unlink()  # an environment whose Python is gone is made again
    setup.STAMP.unlink()
    assert setup.main() == 0
    assert setup.works(setup.venv_python())


def test_an_old_python_is_refused_with_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(setup.sys, "version_info", (3, 10, 4))
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    assert setup.main() == 2
    error = capsys.readouterr().err
    assert "this is 3.10.4" in error
    assert "make PYTHON=" in error


def test_badges_stamp_and_unstamp(house, tmp_path, monkeypatch):
    house("97_mini")
    root = tmp_path / "stamped"
    root.mkdir()
    (root / "pyproject.toml").write_text('[tool.course]\nrepository = ""\n')
    (root / "README.md").write_text(f"# T\n{badges.START}{badges.END}\nrest\n")
    monkeypatch.setattr(badges, "ROOT", root)
    monkeypatch.setattr(chapters, "ROOT", root)
    badges.stamp("some-body/some.course")
    assert (
        "colab.research.google.com/github/some-body/some.course" in (root / "README.md").read_text()
    )
    first = build.notebook(chapters.chapters()[0]).cells
    assert "some-body/some.course" in first[0].source
    assert "some-body/some.course" in first[1].source
    badges.stamp("")
    assert (root / "README.md").read_text() == f"# T\n{badges.START}{badges.END}\nrest\n"
    assert "github" not in build.notebook(chapters.chapters()[0]).cells[0].source


def test_no_link_is_stamped_while_there_is_no_repository():
    if not chapters.repository():
        assert "colab.research" not in (ROOT / "README.md").read_text()


def test_binder_would_read_our_environment():
    """repo2docker's dry run: what image it would make from environment.yml, without making it."""
    tool = Path(sys.executable).parent / "repo2docker"
    if not tool.exists():
        pytest.skip("package: jupyter-repo2docker is not installed on this platform")
    done = subprocess.run(
        [tool, "--no-build", "--debug", str(ROOT)], capture_output=True, text=True, timeout=120
    )
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-2000:]
    assert "environment.yml" in text
    assert "python=3.11" in (ROOT / "environment.yml").read_text()
    assert "pytorch-cpu" in (ROOT / "environment.yml").read_text()


@pytest.fixture
def bare_python(tmp_path):
    """An environment that has torch and Jupyter but not the course, as Colab has."""
    folder = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "torch_is_here.pth").write_text(str(Path(torch.__file__).parent.parent))
    python = folder / "bin" / "python"
    probe = subprocess.run(
        [python, "-c", "import torch, course_utils"], capture_output=True, text=True, cwd=tmp_path
    )
    assert "No module named 'course_utils'" in probe.stderr
    return python


@pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="system: this checkout is no git repository to clone from"
)
@pytest.mark.skipif(os.name == "nt", reason="system: the test environment is made for POSIX paths")
def test_a_notebook_opened_alone_fetches_the_course(bare_python, tmp_path):
    chapter = chapters.chapters()[0]
    start = next(c.source for c in build.notebook(chapter).cells if "start" in build.tags(c))
    book = nbformat.v4.new_notebook(metadata={"kernelspec": build.KERNEL})
    probe = (
        "from course_utils import data, machine\nprint(len(data.fashion_mnist('validation')[0]))"
    )
    book.cells = [nbformat.v4.new_code_cell(start), nbformat.v4.new_code_cell(probe)]
    empty = tmp_path / "empty folder"
    empty.mkdir()
    nbformat.write(book, empty / "bare.ipynb")
    bare = os.environ | {"COURSE_REPOSITORY": ""}
    nowhere = subprocess.run(
        [bare_python, "-c", start], cwd=empty, env=bare, capture_output=True, text=True
    )
    if not chapters.repository():
        assert "names no repository" in nowhere.stderr
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "COURSE_REPOSITORY": str(ROOT)}
    command = [
        bare_python,
        "-m",
        "nbconvert",
        "--to",
        "notebook",
        "--execute",
        "--inplace",
        "bare.ipynb",
    ]
    done = subprocess.run(
        command, cwd=empty, env=os.environ | offline, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert nbformat.read(empty / "bare.ipynb", 4).cells[1].outputs[-1].text == "3000\n"


def run_as_a_reader(path: Path, folder: Path, *prefix: str) -> subprocess.CompletedProcess:
    """Papermill on a notebook as it lies there, in a working folder of its own, without the suite's
    scratch folders.
    """
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(path),
        str(folder / "out.ipynb"),
        "--cwd",
        str(folder),
        "-k",
        "python3",
    ]
    environment = {
        k: v for k, v in os.environ.items() if k not in ("COURSE_LEDGER", "COURSE_SCRATCH")
    }
    environment |= {"COURSE_PROFILE": "smoke"}
    return subprocess.run(
        [*prefix, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_cell_that_is_run_too_early_says_what_to_do(tmp_path):
    book = nbformat.read(ROOT / "notebooks" / "08_memory.ipynb", 4)
    code = [c for c in book.cells if c.cell_type == "code"]
    late = next(c for c in code[8:] if "def " not in c.source and "plots." in c.source)
    book.cells = [*code[:3], late]
    nbformat.write(book, tmp_path / "early.ipynb")
    ran = run_as_a_reader(tmp_path / "early.ipynb", tmp_path)
    assert ran.returncode != 0
    assert "NameError" in ran.stderr
    told = nbformat.read(tmp_path / "out.ipynb", 4).cells[-1].outputs
    assert any("run the cells in order" in o.get("text", "") for o in told)


# One chapter here; all of them, in ten minutes, with COURSE_READ_ONLY=all.
UNWRITABLE = [
    c for c in CHAPTERS if c.number == "02" or os.environ.get("COURSE_READ_ONLY") == "all"
]
READ_ONLY = (
    'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && ! touch "$0/x" 2>/dev/null && exec'
    ' "$@"'
)


@pytest.mark.parametrize("chapter", UNWRITABLE, ids=names(UNWRITABLE))
def test_a_checkout_that_cannot_be_written_is_enough(chapter, tmp_path):
    """The whole course is mounted read-only: what a chapter writes goes to a temporary folder."""
    prefix = ["unshare", "-m", "sh", "-c", READ_ONLY, str(ROOT)]
    can_mount = sys.platform == "linux" and os.geteuid() == 0
    if not can_mount or subprocess.run([*prefix, "true"], capture_output=True).returncode != 0:
        pytest.skip("this needs root on Linux and the right to mount")
    ran = run_as_a_reader(chapter.learner, tmp_path, *prefix)
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_a_chapter_that_gives_no_answer_is_run_once_more_and_then_given_up(
    house, tmp_path, monkeypatch
):
    count = tmp_path / "count"
    source = MINI.replace(
        'print("checked")', f'import time\nopen({str(count)!r}, "a").write("x")\ntime.sleep(WAIT)'
    )
    monkeypatch.setitem(run.CELL_SECONDS, "smoke", 3)
    chapter = house("97_mini", source.replace("WAIT", "60"))
    outcome = run.run_one(chapter, "smoke", "learner", tmp_path)
    assert outcome.error == "a cell took more than 3 s, in two attempts"
    assert count.read_text() == "xx"
    chapter = house(
        "97_mini", source.replace("WAIT", f"60 if len(open({str(count)!r}).read()) % 2 else 0")
    )
    assert run.run_one(chapter, "smoke", "learner", tmp_path).error == ""
    assert count.read_text() == "xxxx", "lost once, answered the second time"


@pytest.mark.skipif(sys.platform == "win32", reason="system: pipes break otherwise there")
def test_a_pipe_that_is_closed_early_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)  # before the command prints its first line
    code = "import sys; from course_utils.course.cli import main; sys.exit(main(['doctor']))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_another_pipe_that_breaks_is_not_hidden(monkeypatch):
    def broken() -> dict:
        raise BrokenPipeError("a child's")

    monkeypatch.setattr("course_utils.course.doctor.examine", broken)
    with pytest.raises(BrokenPipeError, match="a child's"):
        cli.main(["doctor"])
