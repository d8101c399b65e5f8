"""A server in a process group of its own, and a load generator in a process of its own, over real
HTTP on 127.0.0.1.

    with serving.server(Path("app.py"), token="secret") as server:  # it reads PORT, COURSE_TOKEN
        url = server.url + "/embed"
        answers = serving.open_loop(url, bodies, rate=200, seconds=5, token="secret")
        answers.p(99), answers.throughput, answers.failed, server.peak_mb()
"""

from course_utils.serving.client import Answers, closed_loop, open_loop
from course_utils.serving.process import Server, server

__all__ = ["Answers", "Server", "closed_loop", "open_loop", "server"]
