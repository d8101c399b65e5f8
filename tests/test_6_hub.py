"""One JupyterHub for a room, started here with five learners on loopback."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import requests
from jupyter_client import BlockingKernelClient

from course_utils import ROOT, machine
from course_utils.course import build, hub
from course_utils.course.chapters import chapters

LEARNERS = ["ada", "ben", "cem", "dil", "eva"]
PASSWORD = "a room's password"
NEEDED = pytest.mark.skipif(
    sys.platform != "linux" or not (hub.BIN / "jupyterhub").exists(),
    reason="package: JupyterHub comes with make setup-extended",
)
PROGRAM = """
import json, os, torch
from course_utils import ledger, scratch
ledger.record("check", exercise="99.A", status="passed")
torch.randn(500, 500) @ torch.randn(500, 500)
told = [str(ledger.path()), str(scratch("99")), sorted(os.sched_getaffinity(0))]
print(json.dumps(told))
"""


def three_ports() -> int:
    """The first of three ports in a row that nobody listens on."""
    for first in range(18000 + os.getpid() % 1000, 30000, 3):
        taken = False
        for port in range(first, first + 3):
            with socket.socket() as one:
                taken = taken or one.connect_ex(("127.0.0.1", port)) == 0
        if not taken:
            return first
    raise OSError("no free ports")


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """(address, folder, the class's repository) of a hub that runs."""
    folder = tmp_path_factory.mktemp("a room")
    repository = folder / "class"
    build.write(chapters(["01"])[0], "student", repository.parent)
    repository.mkdir()
    next(folder.glob("*.ipynb")).rename(repository / "01.ipynb")
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["init", "-qb", "main"], ["add", "-A"], [*who, "commit", "-qm", "class"]):
        subprocess.run(["git", *words], cwd=repository, check=True)
    address = f"http://127.0.0.1:{three_ports()}"
    environment = os.environ | {
        "COURSE_HUB_PASSWORD": PASSWORD,
        "COURSE_HUB_FOLDER": str(folder / "homes"),
        "COURSE_HUB_ADDRESS": address,
        "COURSE_HUB_CORES": "1",
    }
    command = [hub.BIN / "jupyterhub", "-f", hub.__file__]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        wait_for(lambda: requests.get(f"{address}/hub/login", timeout=5).ok, 90, folder / "log")
        yield address, folder / "homes", repository
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    left = [p for p in psutil.process_iter() if home_of(p).startswith(str(folder))]
    assert left == []


def wait_for(done, seconds: float, log: Path) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            if done():
                return
        except requests.ConnectionError:
            pass
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.3)


def home_of(process: psutil.Process) -> str:
    try:
        return process.environ().get("HOME", "")
    except psutil.Error:
        return ""


def log_in(address: str, name: str, password: str = PASSWORD) -> tuple[requests.Session, int]:
    session = requests.Session()
    session.get(f"{address}/hub/login", timeout=30)
    form = {"username": name, "password": password, "_xsrf": session.cookies["_xsrf"]}
    done = session.post(f"{address}/hub/login", data=form, timeout=120)
    return session, done.status_code


def server_of(address: str, folder: Path, name: str) -> requests.Session:
    """A learner's session when the server is there, logged in to it as a browser would be."""
    session, _ = log_in(address, name)
    session.get(f"{address}/hub/spawn", timeout=120)

    def there() -> bool:
        page = session.get(f"{address}/user/{name}/lab", timeout=120)
        return page.ok and page.url.split("?")[0].endswith(f"/user/{name}/lab")

    wait_for(there, 120, folder.parent / "log")
    return session


def pulled(session: requests.Session, address: str, name: str, repository: Path) -> list[str]:
    """The phases that nbgitpuller reports."""
    asked = {"repo": str(repository), "branch": "main", "targetpath": "class"}
    url = f"{address}/user/{name}/git-pull/api"
    with session.get(url, params=asked, stream=True, timeout=120) as answer:
        assert answer.ok, answer.text
        lines = [line for line in answer.iter_lines() if line.startswith(b"data:")]
    return [json.loads(line[5:])["phase"] for line in lines]


def run(session: requests.Session, address: str, home: Path, code: str) -> str:
    """What a program prints in a new kernel of this learner's server."""
    base = f"{address}/user/{home.name}/"
    token = next(c.value for c in session.cookies if c.name == "_xsrf" and c.path in base)
    made = session.post(f"{base}api/kernels", headers={"X-XSRFToken": token}, timeout=60)
    assert made.ok, made.text
    known = f"kernel-{made.json()['id']}.json"
    wait_for(lambda: list(home.rglob(known)), 60, home.parent.parent / "log")
    client = BlockingKernelClient(connection_file=str(next(home.rglob(known))))
    client.load_connection_file()
    client.start_channels()
    client.wait_for_ready(timeout=120)
    said = []

    def keep(message: dict) -> None:
        if message["msg_type"] == "stream":
            said.append(message["content"]["text"])

    answer = client.execute_interactive(code, timeout=180, output_hook=keep)
    client.stop_channels()
    assert answer["content"]["status"] == "ok", answer["content"]
    return "".join(said)


@NEEDED
def test_five_learners_work_side_by_side_each_in_files_and_on_a_core_of_their_own(room):
    address, folder, repository = room
    cores = sorted(os.sched_getaffinity(0))
    for number, name in enumerate(LEARNERS):
        session, home = server_of(address, folder, name), folder / name
        assert pulled(session, address, name, repository)[-1] == "finished"
        assert (home / "class" / "01.ipynb").is_file()
        ledger, scratch, mine = json.loads(run(session, address, home, PROGRAM).splitlines()[-1])
        assert Path(ledger) == home / "workbook" / "ledger.jsonl"
        assert Path(ledger).read_text().count("99.A") == 1
        assert Path(scratch).is_relative_to(home)
        assert mine == [cores[number % len(cores)]]
    sizes = []
    for name in LEARNERS:
        family = [p for p in psutil.process_iter() if home_of(p) == str(folder / name)]
        sizes.append(sum(p.memory_full_info().pss for p in family) / 2**20)
        assert len(family) >= 2  # a server and a kernel
    print(f"memory of a learner with a kernel that uses torch: {min(sizes):.0f} to", end=" ")
    print(f"{max(sizes):.0f} MiB of {1024 * machine.memory_gb():.0f} (PSS), five at once")


@NEEDED
def test_a_learners_changes_survive_the_teachers_next_version(room):
    address, folder, repository = room
    session, home = server_of(address, folder, "ada"), folder / "ada"
    pulled(session, address, "ada", repository)
    own = home / "class" / "01.ipynb"
    text = own.read_text(encoding="utf-8").replace("return ...", "return 41", 1)
    own.write_text(text, encoding="utf-8")
    (repository / "02.txt").write_text("new")
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["add", "-A"], [*who, "commit", "-qm", "next"]):
        subprocess.run(["git", *words], cwd=repository, check=True)
    assert pulled(session, address, "ada", repository)[-1] == "finished"
    assert own.read_text(encoding="utf-8") == text
    assert (home / "class" / "02.txt").read_text() == "new"


@NEEDED
@pytest.mark.parametrize(
    ("name", "password"), [("zoe", "another password"), ("../ada", PASSWORD), ("Zoe Z", PASSWORD)]
)
def test_who_is_not_let_in(room, name, password):
    session, status = log_in(room[0], name, password)
    page = session.get(f"{room[0]}/hub/home", timeout=30)
    assert status in (401, 403) or "/hub/login" in page.url
    assert not (room[1] / name.lower()).exists() or name == "../ada"


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, "COURSE_HUB_PASSWORD has 0 characters"),
        ({"COURSE_HUB_PASSWORD": "short"}, "has 5 characters; the room's password needs 8"),
        ({"COURSE_HUB_PASSWORD": PASSWORD, "COURSE_HUB_CORES": "9"}, "machine has 2 cores"),
        ({"COURSE_HUB_PASSWORD": PASSWORD, "COURSE_HUB_CORES": "0"}, "COURSE_HUB_CORES is 0"),
    ],
)
def test_what_cannot_be_is_refused(environment, told):
    with pytest.raises(ValueError, match=told):
        hub.settings(environment, [0, 1])


def test_teaching_says_what_is_run():
    text = (ROOT / "TEACHING.md").read_text(encoding="utf-8")
    assert ".venv/bin/jupyterhub -f course_utils/course/hub.py" in text
    assert set(re.findall(r"COURSE_HUB_\w+", text)) <= set(
        re.findall(r"COURSE_HUB_\w+", Path(hub.__file__).read_text(encoding="utf-8"))
    )
