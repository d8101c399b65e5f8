"""One JupyterHub for a room: a configuration file that JupyterHub reads.

    COURSE_HUB_PASSWORD=… .venv/bin/jupyterhub -f course_utils/course/hub.py

Everybody types a name of their own and the room's password. A learner's files lie in
COURSE_HUB_FOLDER/NAME (build/hub), and so do workbook, ledger and scratch files. The hub listens at
COURSE_HUB_ADDRESS (http://127.0.0.1:8000) and takes the next two ports for itself. All servers run
as the account that started it: this is for a room that trusts each other, not for strangers.
"""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

BIN = Path(sys.executable).parent
NAME = r"[a-z][a-z0-9-]{0,30}"
"""What a learner may be called: the name becomes a folder."""
SHORTEST = 8  # characters of the password, JupyterHub's own rule


def settings(environment: dict[str, str], cores: list[int]) -> dict[str, dict]:
    """{class: {trait: value}} for JupyterHub. Raises ValueError where the password is missing or
    too short, or COURSE_HUB_CORES is no number of cores that are there.
    """
    password = environment.get("COURSE_HUB_PASSWORD", "")
    if len(password) < SHORTEST:
        raise ValueError(
            f"COURSE_HUB_PASSWORD has {len(password)} characters; the room's password needs"
            f" {SHORTEST} at least."
        )
    folder = Path(environment.get("COURSE_HUB_FOLDER", "build/hub")).resolve()
    address = environment.get("COURSE_HUB_ADDRESS", "http://127.0.0.1:8000")
    port = int(address.rsplit(":", 1)[1].strip("/"))
    own = {
        "COURSE_WORKBOOK": lambda spawner: str(folder / spawner.user.name / "workbook"),
        "COURSE_SCRATCH": lambda spawner: str(folder / spawner.user.name / "scratch"),
        "JUPYTER_PLATFORM_DIRS": "1",
    }
    return {
        "JupyterHub": {
            "bind_url": address,
            "hub_port": port + 2,
            "authenticator_class": "shared-password",
            "spawner_class": "simple",
            "db_url": f"sqlite:///{folder}/hub.sqlite",
            "cookie_secret_file": f"{folder}/cookie_secret",
        },
        "ConfigurableHTTPProxy": {
            "command": [str(BIN / "configurable-http-proxy")],
            "api_url": f"http://127.0.0.1:{port + 1}",
            "pid_file": f"{folder}/proxy.pid",
        },
        "SharedPasswordAuthenticator": {"user_password": password},
        "Authenticator": {"allow_all": True, "username_pattern": f"^{NAME}$"},
        "SimpleLocalProcessSpawner": {"home_dir_template": f"{folder}/{{username}}"},
        "Spawner": {
            "cmd": [str(BIN / "jupyterhub-singleuser")],
            "args": ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else [],
            "default_url": "/lab",
            "environment": own,
            "pre_spawn_hook": pinned(int(environment.get("COURSE_HUB_CORES", "2")), cores),
        },
    }


def pinned(each: int, cores: list[int]) -> Callable[[object], None]:
    """A hook that gives each new server `each` cores of its own, as long as there are some: who
    shares a core measures the neighbour. Raises ValueError for none, or more than there are.

    >>> from types import SimpleNamespace as server
    >>> ada, ben = server(cmd=["lab"]), server(cmd=["lab"])
    >>> hook = pinned(2, [0, 1, 2])
    >>> hook(ada), hook(ben), ada.cmd, ben.cmd
    (None, None, ['taskset', '-c', '0,1', 'lab'], ['taskset', '-c', '2,0', 'lab'])
    """
    if not 1 <= each <= len(cores):
        raise ValueError(f"COURSE_HUB_CORES is {each}; this machine has {len(cores)} cores.")
    given = 0

    def hook(spawner: object) -> None:
        nonlocal given
        if spawner.cmd[0] == "taskset":  # the same server again
            return
        mine = [str(cores[(given + k) % len(cores)]) for k in range(each)]
        given += each
        spawner.cmd = ["taskset", "-c", ",".join(mine), *spawner.cmd]

    return hook


def link(address: str, repository: str, branch: str, first: str) -> str:
    """What a teacher hands out: it brings the class's repository into the learner's folder, keeps
    what the learner changed, and opens the notebook `first`.

    >>> link("http://hub:8000", "/srv/class", "main", "00.ipynb").partition("?")[2]
    'repo=%2Fsrv%2Fclass&branch=main&urlpath=lab%2Ftree%2Fclass%2F00.ipynb'
    """
    from urllib.parse import urlencode

    name = re.sub(r"\.git$", "", repository.rstrip("/").rsplit("/", 1)[-1])
    asked = {"repo": repository, "branch": branch, "urlpath": f"lab/tree/{name}/{first}"}
    return f"{address.rstrip('/')}/hub/user-redirect/git-pull?{urlencode(asked)}"


if "get_config" in globals():  # read by JupyterHub, not imported
    Path(os.environ.get("COURSE_HUB_FOLDER", "build/hub")).mkdir(parents=True, exist_ok=True)
    for _class, _traits in settings(dict(os.environ), sorted(os.sched_getaffinity(0))).items():
        for _trait, _value in _traits.items():
            setattr(get_config()[_class], _trait, _value)  # noqa: F821 (JupyterHub's)
