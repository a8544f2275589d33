"""A notebook as a new user meets it: JupyterLab in a real Chromium, run all cells, move the slider, see the picture change.

Skipped where no Chromium is installed (Debian: apt install chromium); nothing is downloaded.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ROOT = Path(__file__).parent.parent
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")]


@pytest.fixture
def lab(tmp_path):
    """A JupyterLab of its own: private configuration, a copy of one notebook, results out of the checkout."""
    (tmp_path / "books").mkdir()
    shutil.copy(ROOT / "notebooks" / "01_tensors_by_hand.ipynb", tmp_path / "books")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    private = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    private |= {f"JUPYTERLAB_{kind}_DIR": str(tmp_path / kind) for kind in ("SETTINGS", "WORKSPACES")}
    env = {
        **os.environ,
        **private,
        "TNLIB_RESULTS": str(tmp_path / "results"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    env.pop("MPLBACKEND", None)
    options = [
        f"--port={port}",
        "--no-browser",
        "--allow-root",
        "--IdentityProvider.token=t",
        f"--ServerApp.root_dir={tmp_path / 'books'}",
    ]
    with open(tmp_path / "lab.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=env, stdout=log, stderr=log)
    try:
        _wait(lambda: _answers(port), 60)
        yield f"http://127.0.0.1:{port}/lab/tree/01_tensors_by_hand.ipynb?token=t"
    finally:
        server.terminate()
        server.wait(20)


def _answers(port):
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token=t", timeout=2).status == 200
    except OSError:
        return False


def _wait(ready, seconds):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.3)


def test_a_reader_runs_the_notebook_and_moves_the_slider(lab):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(lab)
        idle = page.locator(".jp-StatusBar-Widget", has_text=re.compile(r"\| Idle"))
        idle.first.wait_for(timeout=90_000)  # "Run All" is dropped while the kernel starts
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.locator(".lm-Menu-item[data-command='runmenu:run-all']").click()
        slider = page.locator(".widget-slider .noUi-handle, .jupyter-widgets .noUi-handle").first
        slider.wait_for(timeout=150_000)
        idle.first.wait_for(timeout=150_000)
        picture = page.locator(".jupyter-widgets.widget-image, img.widget-image").first
        picture.scroll_into_view_if_needed()
        before = picture.get_attribute("src")
        slider.focus()
        page.keyboard.press("ArrowRight")
        _wait(lambda: picture.get_attribute("src") != before, 30)
        assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
        assert page.locator("text=Traceback").count() == 0
        browser.close()
