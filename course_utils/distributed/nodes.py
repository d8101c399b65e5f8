"""Two machines on one: network namespaces, joined by a cable, with a torchrun in each."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from course_utils import processes
from course_utils.distributed.launcher import (
    WorkerError,
    ask_where,
    environment,
    first_failure,
    hanging,
    results,
)

__all__ = ["launch_two_nodes"]


def launch_two_nodes(
    *modules: str | Path, settings: dict | None = None, timeout: float = 120.0
) -> dict[str, list]:
    """As `launch`, on two machines made of network namespaces: one torchrun and one worker in each,
    joined by a cable.

    Needs root, Linux and the program `ip`. The namespaces, and with them the cable, are removed
    however the call ends.

    >>> launch_two_nodes("ring.py", settings={"steps": 8})["ring"]  # doctest: +SKIP
    [{'rank': 0, …}, {'rank': 1, …}]
    """
    names = [f"course-{os.getpid()}-{side}" for side in "ab"]
    cable, addresses = [f"cv{os.getpid()}{side}" for side in "ab"], ["10.213.77.1", "10.213.77.2"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    with (
        tempfile.TemporaryDirectory(prefix="course-nodes-") as temporary,
        tempfile.TemporaryFile("w+") as log,
    ):
        folder, nodes = Path(temporary), []
        tail = ["-m", "course_utils.distributed", *map(str, modules), "--out", temporary]
        tail += ["--settings", json.dumps(settings or {})]
        try:
            for name in names:
                ip("netns", "add", name)
            ip(
                "link",
                "add",
                cable[0],
                "netns",
                names[0],
                "type",
                "veth",
                "peer",
                "name",
                cable[1],
                "netns",
                names[1],
            )
            for name, end_of, address in zip(names, cable, addresses, strict=True):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", end_of)
                ip("-n", name, "link", "set", end_of, "up")
                ip("-n", name, "link", "set", "lo", "up")
            for node, name in enumerate(names):
                torchrun = [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--nnodes=2",
                    "--nproc-per-node=1",
                ]
                torchrun += [
                    "--rdzv-backend=c10d",
                    f"--rdzv-endpoint={addresses[0]}:29400",
                    "--rdzv-id=course",
                ]
                torchrun += [
                    f"--rdzv-conf=is_host={1 - node}",
                    f"--local-addr={addresses[node]}",
                    *tail,
                ]
                env = os.environ | environment() | {"GLOO_SOCKET_IFNAME": cable[node]}
                command_line = ["ip", "netns", "exec", name, *torchrun]
                nodes.append(
                    subprocess.Popen(
                        command_line, stdout=log, stderr=log, env=env, start_new_session=True
                    )
                )
            stop = time.monotonic() + timeout
            codes = [process.wait(max(stop - time.monotonic(), 0.1)) for process in nodes]
        except subprocess.TimeoutExpired:
            for process in nodes:
                ask_where(process.pid)
            raise TimeoutError(
                f"the two nodes did not end within {timeout:g} s.\n{hanging(folder)}"
            ) from None
        finally:
            for process in nodes:
                processes.end(process.pid)
                process.wait()
            for name in names:
                subprocess.run(["ip", "netns", "del", name], capture_output=True)
        log.seek(0)
        if any(codes):
            raise WorkerError(first_failure(folder, log.read()))
        return {Path(m).stem: results(folder, Path(m).stem, 2) for m in modules}
