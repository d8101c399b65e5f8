"""The chapter as a reader meets it: JupyterLab in a browser, a fresh kernel, all cells run, no
error; and its outputs as a reader meets them who hears the page, or has chosen the dark theme.
"""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time

import pytest
from conftest import CHAPTERS

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
READY = (
    "() => window.jupyterapp &&"
    " window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
)
RUN = """async () => {
  const app = window.jupyterapp;
  await app.commands.execute('editmenu:clear-all');
  await app.commands.execute('notebook:run-all-cells');
}"""
STATE = """() => {
  const panel = window.jupyterapp.shell.currentWidget;
  const code = panel.content.widgets.map(w => w.model).filter(m => m.type === 'code');
  const outputs = code.flatMap(m => m.outputs.toJSON());
  const ran = code.filter(m => m.executionCount !== null);
  const left = code.filter(m => m.executionCount === null && m.sharedModel.getSource().trim());
  const errors = outputs.filter(o => o.output_type === 'error');
  return {left: left.length,
          last: ran.length ? JSON.stringify(ran[ran.length - 1].outputs.toJSON()) : '',
          errors: errors.map(o => o.ename + ': ' + o.evalue),
          figures: outputs.filter(o => o.data && o.data['image/png']).length};
}"""
ALTS = "() => [...document.querySelectorAll('.jp-OutputArea-output img')].map(i => i.alt)"
THEME = "theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})"
SPOIL = """() => { document.querySelector('.jp-OutputArea-output').innerHTML =
  '<img src="data:,">'; }"""
THEMES = ("JupyterLab Light", "JupyterLab Dark")


@pytest.fixture
def lab(tmp_path):
    """JupyterLab on a copy of the notebook, in smoke, at a port of its own; ended whatever
    happens.
    """
    chapter = CHAPTERS[0] if len(CHAPTERS) == 1 else next(c for c in CHAPTERS if c.number == "01")
    shutil.copy(chapter.learner, tmp_path)
    token = secrets.token_hex(16)
    command = [
        *(sys.executable, "-m", "jupyter", "lab", "--no-browser", "--ip=127.0.0.1", "--port=0"),
        *(f"--ServerApp.root_dir={tmp_path}", f"--IdentityProvider.token={token}"),
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.news_url=",
    ]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")
    # every cell in the page, not only those in the window
    settings = tmp_path / ".jupyter/lab/user-settings/@jupyterlab/notebook-extension"
    settings.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text(json.dumps({"windowingMode": "none"}))
    environment = os.environ | {
        "COURSE_PROFILE": "smoke",
        "COURSE_FIGURES": "",
        "COURSE_LEDGER": str(tmp_path / "ledger.jsonl"),
        "HOME": str(tmp_path),
    }
    log = (tmp_path / "lab.log").open("w+")
    server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=tmp_path)
    try:
        address = _address(tmp_path / "lab.log", server)
        yield f"{address}/lab/tree/{chapter.learner.name}?token={token}"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def _address(log, server) -> str:
    end = time.monotonic() + 60
    while time.monotonic() < end and server.poll() is None:
        if found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text()):
            return found.group(0)
        time.sleep(0.3)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


@pytest.mark.skipif(
    CHROMIUM is None, reason="package: no Chromium on this machine (Debian: apt install chromium)"
)
def test_the_chapter_runs_in_jupyterlab(lab):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"],
        )
        try:
            page = browser.new_page()
            page.goto(lab, timeout=90_000)
            page.wait_for_function(READY, timeout=120_000)
            page.evaluate(RUN)
            end = time.monotonic() + 240
            while (
                (state := page.evaluate(STATE))["left"]
                and not state["errors"]
                and time.monotonic() < end
            ):
                time.sleep(1)
            alts = page.evaluate(ALTS)
            found = {theme: serious(page, theme) for theme in THEMES}
            page.evaluate(SPOIL)
            spoilt = " ".join(serious(page, THEMES[0]))
        finally:
            browser.close()
    assert state["errors"] == []
    assert state["left"] == 0, f"after the last cell that ran, which showed {state['last'][:500]}"
    assert state["figures"] >= 4
    assert len(alts) >= state["figures"]
    assert all(alt.strip() for alt in alts), "a figure without a text for who does not see it"
    assert found == {theme: [] for theme in THEMES}
    assert "image-alt" in spoilt, "the inspection sees nothing"


def serious(page, theme: str) -> list[str]:
    """What axe-core finds serious or critical in the outputs, in this theme."""
    from axe_playwright_python.sync_playwright import Axe

    page.evaluate(THEME, theme)
    page.wait_for_timeout(1500)
    result = Axe().run(page, context={"include": [[".jp-OutputArea-output"]]})
    return [
        f"{v['id']}: {v['help']}: {node['html'][:200]}"
        for v in result.response["violations"]
        if v["impact"] in ("serious", "critical")
        for node in v["nodes"][:3]
    ]
