"""The habits of a public project: workflows, forms, changelog, citation."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from course_utils import ROOT
from course_utils.course import cli

pytestmark = pytest.mark.settled
HUB = ROOT / ".github"
WORKFLOWS = sorted((HUB / "workflows").glob("*.yml"))
FORMS = sorted(p for p in (HUB / "ISSUE_TEMPLATE").glob("*.yml") if p.stem != "config")
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINNED = re.compile(r"[\w-]+/[\w./-]+@[0-9a-f]{40}")


def loaded(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(path: Path) -> list[dict]:
    return [step for job in loaded(path)["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_a_workflow_takes_only_what_is_pinned_and_may_do_little(path):
    """A tag can be moved to another commit, a hash can not."""
    whole = loaded(path)
    assert whole["permissions"] in ({}, {"contents": "read"})
    assert all("timeout-minutes" in job for job in whole["jobs"].values())
    for step in steps(path):
        assert PINNED.fullmatch(step["uses"]) if "uses" in step else step["run"]
        if step.get("uses", "").startswith("actions/checkout"):
            assert step["with"]["persist-credentials"] is False
    lines = [x for x in path.read_text().splitlines() if "uses:" in x]
    assert all(re.search(r"# v\d+\.\d+\.\d+$", line) for line in lines)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_what_a_workflow_calls_is_there(path, capsys):
    targets = re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text())
    for words in (s["run"].split() for s in steps(path) if "run" in s):
        match words:
            case ["make", target]:
                assert target in targets
            case ["course", command, *_]:
                with pytest.raises(SystemExit) as ended:
                    cli.main([command, "--help"])
                assert ended.value.code == 0
                assert command in capsys.readouterr().out
            case ["bash" | "python", script]:
                assert (ROOT / script).is_file()
            case _:
                assert words[0] == "echo"


def test_a_pull_request_runs_what_ci_runs_and_two_other_systems():
    runs = [step.get("run") for step in steps(HUB / "workflows" / "suite.yml")]
    assert "bash .ci/run" in runs
    jobs = loaded(HUB / "workflows" / "suite.yml")["jobs"]
    systems = {name.split("-")[0] for name in jobs["smoke"]["strategy"]["matrix"]["os"]}
    assert systems == {"macos", "windows"}


def test_zizmor_finds_nothing():
    zizmor = Path(sys.executable).with_name("zizmor")
    done = subprocess.run([zizmor, "--offline", str(HUB)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", FORMS, ids=lambda p: p.stem)
def test_a_form_can_be_filled_in(path):
    form = loaded(path)
    assert {"name", "description", "body"} <= form.keys()
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    ids = [part["id"] for part in fields]
    assert len(ids) == len(set(ids))
    assert all(part["attributes"]["label"] for part in fields)
    assert any(part.get("validations", {}).get("required") for part in fields)


def test_there_is_a_form_for_each_kind_of_report():
    assert {p.stem for p in FORMS} == {"my_machine", "new_claim", "stuck", "wrong_number"}


def test_version_stands_everywhere_alike():
    version = SETTINGS["project"]["version"]
    assert str(loaded(ROOT / "CITATION.cff")["version"]) == version
    told = re.findall(r"(?m)^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text())
    assert told[0] == version
    assert told == sorted(told, key=lambda v: [int(x) for x in v.split(".")], reverse=True)


def test_the_container_of_an_editor_has_what_the_course_asks_for():
    folder = ROOT / ".devcontainer"
    settings = json.loads((folder / "devcontainer.json").read_text())
    wanted = SETTINGS["project"]["requires-python"].removeprefix(">=")
    image = (folder / settings["build"]["dockerfile"]).read_text().split("FROM ")[1].strip()
    assert image.startswith(f"python:{wanted}")
    assert settings["postCreateCommand"] == "make setup"
