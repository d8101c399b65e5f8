"""The book for the suite: built once from planted ledgers, served on 127.0.0.1, and opened in a
browser in which nothing else can be reached. Tests import its helpers before pytest takes its
fixtures, hence PYTEST_DONT_REWRITE.
"""

import functools
import html.parser
import http.server
import shutil
import threading
import urllib.parse

import pytest
from test_2_atlas import given, ledger

from course_utils.course.book import make

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
BROWSER = pytest.mark.skipif(
    CHROMIUM is None, reason="package: no Chromium on this machine (Debian: apt install chromium)"
)


PHONE = {"width": 360, "height": 740}
PATIENCE = 60_000  # ms: a busy machine


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    """Two kinds of machine, one of them a second time under a cap."""
    folder = tmp_path_factory.mktemp("planted")
    for kind, caps in (("avx2", {}), ("bf16", {}), ("bf16", {"ONEDNN_MAX_CPU_ISA": "AVX2"})):
        given(folder, ledger(kind, caps=caps))
    return folder / "atlas"


@pytest.fixture(scope="session")
def book(planted, tmp_path_factory):
    built = make.make(tmp_path_factory.mktemp("book") / "book", planted)
    print(built)
    return built


@pytest.fixture(scope="session")
def site(book):
    """The book on a port of 127.0.0.1."""
    handler = functools.partial(Quiet, directory=book.folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")  # no other test may meet its event loop
def browser():
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser):
    """Opens pages; whatever asks for another machine fails there and fails the test."""
    contexts, outside, errors = [], [], []

    def new(**options):
        context = browser.new_context(reduced_motion="reduce", **options)
        contexts.append(context)
        context.set_default_timeout(PATIENCE)

        def guard(route):
            address = urllib.parse.urlsplit(route.request.url)
            if address.scheme in ("data", "file") or address.hostname == "127.0.0.1":
                route.continue_()
            else:
                outside.append(route.request.url)
                route.abort()

        context.route("**/*", guard)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        return page

    yield new
    for context in contexts:
        context.close()
    assert outside == []
    assert errors == []


class Links(html.parser.HTMLParser):
    """What a page points to, what it loads, which names it has, and which figures lack a text."""

    def __init__(self):
        super().__init__()
        self.links, self.loads, self.names, self.mute, self.figures = [], [], set(), [], 0

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.names |= {given.get("id"), given.get("name")}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical", "search", "index"):
            self.loads.append(given["href"])
        elif tag in ("script", "img", "iframe") and given.get("src"):
            self.loads.append(given["src"])
        if tag == "img":
            self.figures += 1
            if not given.get("alt", "").strip() or given["alt"].startswith("_images"):
                self.mute.append(given["src"])


@pytest.fixture(scope="session")
def pages(book):
    read = {}
    for path in sorted(book.folder.rglob("*.html")):
        read[path] = Links()
        read[path].feed(path.read_text(encoding="utf-8"))
    return read


def serious(page, rules: list[str] | None = None) -> list[str]:
    from axe_playwright_python.sync_playwright import Axe

    options = {"runOnly": rules} if rules else None
    return [
        f"{v['id']}: {v['help']}: {node['html'][:200]}"
        for v in Axe().run(page, options=options).response["violations"]
        if v["impact"] in ("serious", "critical")
        for node in v["nodes"][:3]
    ]
