"""Sources, notebooks, claims, links and settings: everything that can be judged without executing a
chapter.
"""

import ast
import json
import os
import re
import subprocess
import sys
import time
import tomllib

import pytest
from conftest import CHAPTERS, names

from course_utils import ROOT, claims, data
from course_utils.course import pace, shape

pytestmark = pytest.mark.settled  # files do not change between rounds
TRACKED = subprocess.run(
    ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
).stdout.split("\n")


@pytest.mark.parametrize("chapter", CHAPTERS, ids=names(CHAPTERS))
def test_source_has_the_shape_of_a_chapter(chapter):
    assert shape.source_complaints(chapter) == []


def test_notebooks_are_what_their_sources_build_and_were_executed_by_them():
    start = time.perf_counter()
    found = {c.name: complaints for c in CHAPTERS if (complaints := shape.notebook_complaints(c))}
    print(f"{time.perf_counter() - start:.2f} s for {len(CHAPTERS)} chapters")
    assert found == {}


@pytest.mark.parametrize("chapter", CHAPTERS, ids=names(CHAPTERS))
def test_a_chapter_keeps_its_pace(chapter):
    assert pace.complaints(chapter) == []


def test_sizes_and_minutes_are_printed(capsys):
    with capsys.disabled():
        print()
        for chapter in CHAPTERS:
            print("   ", pace.told(chapter))


def test_every_claim_belongs_to_a_chapter_and_is_complete():
    numbers = {c.number for c in CHAPTERS}
    for claim in claims.registry().values():
        assert claim.id[:2] in numbers, f"{claim.id} has no chapter"
        assert claim.band[0] <= claim.band[1], claim.id
        assert all(len(text) > 10 for text in (claim.statement, claim.source, claim.condition)), (
            claim.id
        )


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "TEACHING.md", "datasets/README.md"]
)
def test_links_of_the_pages_lead_somewhere(name):
    path = ROOT / name
    assert shape.broken_links(path.read_text(encoding="utf-8"), path.parent) == []


def test_no_tracked_text_names_a_registry_or_a_machine_path():
    for name in filter(None, TRACKED):
        path = ROOT / name
        if path.suffix in {".npz", ".safetensors", ".png", ".txt"} or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        assert not shape.REGISTRY.search(text), name
        if path.suffix in {".ipynb", ".md", ".toml", ".lock"}:
            assert not shape.MACHINE_PATH.search(text), name


def test_every_data_file_has_its_digest_and_its_line_in_the_readme():
    digests = json.loads((data.DATASETS / "SHA256.json").read_text())
    readme = (data.DATASETS / "README.md").read_text(encoding="utf-8")
    files = {
        p.name
        for p in data.DATASETS.iterdir()
        if p.suffix in {".npz", ".txt", ".safetensors"} or p.name == "real_pair.json"
    }
    assert files == set(digests)
    for name, digest in digests.items():
        assert data.dataset_file(name).name == name
        assert name in readme
        assert digest in readme


LIGHT = """\
import sys, time
def took(names):
    start = time.process_time()
    for name in names:
        __import__(name)
    return time.process_time() - start
own = took(["course_utils"])
print(own, took(["email.message", "http.client", "decimal", "unittest.mock"]))
print({"torch", "numpy", "psutil", "IPython"} & set(sys.modules))
"""


@pytest.mark.wall_clock
def test_the_package_is_light_to_import():
    """Lighter than four modules of Python's own, imported by the same process a moment later."""
    runs = [
        subprocess.run(
            [sys.executable, "-c", LIGHT], capture_output=True, text=True, cwd="/"
        ).stdout.splitlines()
        for _ in range(3)
    ]
    own, others = zip(*(map(float, times.split()) for times, _ in runs), strict=True)
    assert min(own) < min(others), (own, others)
    assert all(loaded == "set()" for _, loaded in runs)


AROUND = """\
import json, logging, os, signal, sys, warnings
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()

def state():
    loggers = [logging.root, *map(logging.getLogger, sorted(logging.root.manager.loggerDict))]
    return {
        "environment": dict(os.environ),
        "levels": {one.name: (one.level, len(one.handlers), one.disabled) for one in loggers},
        "hooks": {name: len(calls) for name, calls in shell.events.callbacks.items()},
        "path": sys.path,
        "warnings": len(warnings.filters),
        "excepthook": sys.excepthook.__qualname__,
        "signals": str(signal.getsignal(signal.SIGINT)),
        "folder": os.getcwd(),
    }

for name in ("torch.utils.cpp_extension", "torch.utils._pytree"):
    logging.getLogger(name)
before = json.dumps(state())
import course_utils
print(before)
print(json.dumps(state()))
"""


def test_an_import_changes_nothing_outside_but_what_the_design_says():
    """The allocator is settled in the C library; the threads, where a quota demands it."""
    ran = subprocess.run([sys.executable, "-c", AROUND], capture_output=True, text=True, cwd="/")
    before, after = map(json.loads, ran.stdout.splitlines())
    for state in (before, after):
        state["environment"].pop("OMP_NUM_THREADS", None)
    assert after == before
    assert ran.stderr == ""


def test_a_kernel_is_set_up_once_and_only_a_kernel():
    code = """if 1:
    import os, logging
    from IPython.core.interactiveshell import InteractiveShell
    from course_utils import notebook
    shell = InteractiveShell.instance()
    print(notebook.start(), "KINETO_LOG_LEVEL" in os.environ)
    shell.kernel = "a kernel"
    print(notebook.start(), notebook.start(), len(shell.events.callbacks["post_run_cell"]))
    print(os.environ["KINETO_LOG_LEVEL"], logging.getLogger("torch.utils._pytree").level)
    shell.run_cell("nowhere")
    """
    environment = {k: v for k, v in os.environ.items() if k != "KINETO_LOG_LEVEL"}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    lines = ran.stdout.splitlines()
    assert lines[:3] == ["False False", "True True 1", "99 40"], ran.stderr
    assert "run the cells in order" in lines[-1]


def imports() -> dict[str, set[str]]:
    """Which module of the package imports which, also inside functions and for type checkers."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "course_utils").glob("**/*.py")
    }
    found: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{name}: the course imports by full names"
                # each name may be a module or what a module holds
                targets = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
            else:
                continue
            for target in targets:
                # to import a.b.c runs a and a.b, too; a package's own modules may use each other
                while target:
                    inside = name == target or name.startswith(f"{target}.")
                    if target in files and not inside:
                        found[name].add(target)
                    target = target.rpartition(".")[0]
    return found


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Every way round that a walk along the imports meets."""
    found, done = [], set()

    def walk(name: str, way: list[str]) -> None:
        if name in way:
            found.append(" → ".join([*way[way.index(name) :], name]))
        elif name not in done:
            for target in sorted(graph[name]):
                walk(target, [*way, name])
            done.add(name)

    for name in sorted(graph):
        walk(name, [])
    return found


def test_no_module_imports_itself_by_way_of_others():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a → b → c → a"]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    graph = imports()
    assert graph["course_utils.machine"] >= {"course_utils.ledger", "course_utils.cpu"}
    assert circles(graph) == []


LENGTH = 100
PYTHON = [name for name in TRACKED if name.endswith(".py")]


def too_long(line: str) -> bool:
    """Rows of a Markdown table and lines whose overlong part is one link can't be wrapped."""
    if len(line) <= LENGTH or line.startswith("# |"):
        return False
    start = line.rfind(" ", 0, LENGTH + 1) + 1  # the word that runs over the edge
    word = line[start:].split(" ")[0]
    return not ("](http" in word or word.startswith("http")) or len(line) > start + len(word) + 1


def test_no_line_of_python_is_longer_than_100_characters():
    assert not too_long("# | a row" + " of a table" * 20)
    assert not too_long("# see [the page](" + "https://example.org/" + "x" * 100 + ")")
    assert too_long("# " + "words " * 20)
    assert too_long("# see https://example.org/" + "x" * 100 + " and more words")
    long = [
        f"{name}:{number} ({len(line)})"
        for name in PYTHON
        if (ROOT / name).is_file()
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1)
        if too_long(line)
    ]
    assert long == []


def test_the_formatter_is_never_switched_off():
    switch = re.compile("#.*fmt" + r":\s*(off|on|skip)")
    for name in PYTHON:
        if (ROOT / name).is_file():
            assert not switch.search((ROOT / name).read_text(encoding="utf-8")), name


def test_types_travel_with_the_package():
    assert (ROOT / "course_utils" / "py.typed").is_file()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["tool"]["setuptools"]["package-data"]["course_utils"] == [
        "py.typed",
        "kernels/*.cpp",
        "programs/*.py",
        "course/book/*.toml",
        "course/book/static/*",
        "course/slides/template/*",
    ]


def test_instruments_do_not_import_the_makers_wing():
    for path in (ROOT / "course_utils").glob("**/*.py"):
        if "course" not in path.relative_to(ROOT / "course_utils").parts:
            assert "course_utils.course" not in path.read_text(encoding="utf-8"), path


def test_the_lock_has_hashes_no_addresses_and_no_torch():
    for name in ("requirements.lock", "requirements-extended.lock"):
        text = (ROOT / name).read_text()
        assert "://" not in text
        entries = re.split(r"\n(?=[a-z])", text)[1:]
        assert all("--hash=sha256:" in e for e in entries)
        assert not [
            e for e in entries if re.match(r"(torch|torchvision|nvidia-cublas|triton)==", e)
        ]


def test_the_lock_pins_everything_the_project_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [
        r for e in ("all", "dev") for r in project["optional-dependencies"][e]
    ]
    locked = set(
        re.findall(r"^([A-Za-z0-9._-]+)==", (ROOT / "requirements.lock").read_text(), re.M)
    )
    normal = {re.split(r"[<>=;\[ ]", r)[0].lower().replace("_", "-") for r in wanted} - {
        "torch",
        "torchvision",
    }
    assert normal - locked == set()


def test_no_private_import_of_another_module():
    for path in (ROOT / "course_utils").glob("**/*.py"):
        assert not re.search(
            r"from course_utils\S* import .*\b_\w+", path.read_text(encoding="utf-8")
        ), path


def test_the_readme_lists_every_chapter_with_its_question():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for chapter in CHAPTERS:
        row = next(
            (
                line
                for line in readme.splitlines()
                if re.match(rf"\| \[[^]]+\]\(notebooks/{chapter.name}\.ipynb\)", line)
            ),
            None,
        )
        assert row, f"README's table lacks {chapter.name}"
        question = re.search(r"^# \*\*(.+?)\*\*$", chapter.text(), re.M | re.S).group(1)
        question = question.replace("\n# ", " ")
        minutes = re.search(r"^# (\d+) minutes", chapter.text(), re.M).group(1)
        assert question in row, row
        listed = re.search(rf"^# \| {chapter.number} .*\| (\d+) \|$", CHAPTERS[0].text(), re.M)
        assert chapter.number == "00" or listed.group(1) == minutes, (
            f"the map in 00 says {listed.group(1)}, not {minutes}"
        )
        assert f"| {minutes} |" in row, row
