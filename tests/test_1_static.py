"""Sources, notebooks, claims, links and settings: everything that can be judged without executing a
chapter.
"""

import json
import re
import subprocess
import sys
import time
import tomllib

import pytest
from conftest import CHAPTERS, names

from course_utils import ROOT, claims, data
from course_utils.course import shape

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


def test_sizes_are_printed_not_judged(capsys):
    with capsys.disabled():
        print()
        for chapter in CHAPTERS:
            print("   ", shape.sizes(chapter))


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
        p.name for p in data.DATASETS.iterdir() if p.suffix in {".npz", ".txt", ".safetensors"}
    }
    assert files == set(digests)
    for name, digest in digests.items():
        assert data.dataset_file(name).name == name
        assert name in readme
        assert digest in readme


def test_the_package_is_light_to_import():
    code = (
        "import sys, time; t = time.perf_counter(); import course_utils; print(time.perf_counter()"
        " - t, 'torch' in sys.modules)"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd="/"
        ).stdout.split()
        for _ in range(3)
    ]
    assert min(float(seconds) for seconds, _ in runs) < 0.05
    assert all(loaded == "False" for _, loaded in runs)


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
            (line for line in readme.splitlines() if f"(notebooks/{chapter.name}.ipynb)" in line),
            None,
        )
        assert row, f"README's table lacks {chapter.name}"
        question = re.search(r"^# \*\*(.+?)\*\*$", chapter.text(), re.M).group(1)
        minutes = re.search(r"^# (\d+) minutes", chapter.text(), re.M).group(1)
        assert question in row, row
        listed = re.search(rf"^# \| {chapter.number} .*\| (\d+) \|$", CHAPTERS[0].text(), re.M)
        assert chapter.number == "00" or listed.group(1) == minutes, (
            f"the map in 00 says {listed.group(1)}, not {minutes}"
        )
        assert f"| {minutes} |" in row, row
