"""JupyterLab on a free port with settings of its own, Chromium on it, and a page that notes what should not happen."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest

from tests.test_imports import ROOT

SHOTS = ROOT / "build" / "shots"  # for eyes: no test compares them
CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
KERNEL = os.environ.get("MLXDIFF_TEST_KERNEL")  # a folder with another ipykernel, to be tried in place of the own
NEEDS = ("jupyterlab", "notebook", "playwright")
HOW = "apt-get install chromium fonts-dejavu-core; pip install jupyterlab notebook playwright ipywidgets anywidget"

_PATIENCE = 60_000  # ms before a failure: a busy machine is no mistake of ours

STUDIO = """
from functools import partial
from mlxdiff.widgets import Studio
from mlxdiff.widgets.worker import Worker
from tests import fakes
studio = Studio("fake", worker=Worker(partial(fakes.load, pace={pace})), steps=20)
studio
"""


@dataclass
class Lab:
    """A running JupyterLab."""

    url: str
    folder: Path
    started: float  # seconds until it answered
    settings: Path
    env: dict[str, str]  # what keeps it apart from a person's own Jupyter
    timings: dict[str, float]

    def write(self, name: str, *cells: str) -> None:
        blank = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
        body = [blank | {"id": f"cell-{i}", "source": source.strip()} for i, source in enumerate(cells)]
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        book = {"nbformat": 4, "nbformat_minor": 5, "metadata": kernel, "cells": body}
        (self.folder / name).write_text(json.dumps(book))

    def theme(self, name: str) -> None:
        self._set("themes", {"theme": name})

    def _set(self, plugin: str, value: dict) -> None:
        path = self.settings / "@jupyterlab" / "apputils-extension" / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))


@pytest.fixture(scope="session")
def timings():
    """Seconds that things took, kept beside the screenshots."""
    noted: dict[str, float] = {}
    yield noted
    SHOTS.mkdir(parents=True, exist_ok=True)
    name = f"timings-{os.environ.get('PYTEST_XDIST_WORKER', 'all')}.txt"
    (SHOTS / name).write_text("".join(f"{v:6.2f} s  {k}\n" for k, v in noted.items()))


@pytest.fixture(scope="session")
def lab(tmp_path_factory, timings):
    if CHROMIUM is None or not all(map(importlib.util.find_spec, NEEDS)):
        pytest.skip(f"browser tests need Chromium and JupyterLab: {HOW}")
    base = tmp_path_factory.mktemp("lab")
    env = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "MLXDIFF_CACHE": str(base / "cache")}
    for name in ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR"):
        env[f"JUPYTER_{name}"] = str(base / name.lower())
    env |= {"IPYTHONDIR": str(base / "ipython"), "JUPYTERLAB_SETTINGS_DIR": str(base / "settings")}
    env["JUPYTERLAB_WORKSPACES_DIR"] = str(base / "workspaces")
    (base / "books").mkdir()
    if KERNEL is not None:
        env["JUPYTER_PATH"] = str(base / "kernel")  # looked into before any other place
        spec = base / "kernel" / "kernels" / "python3" / "kernel.json"
        spec.parent.mkdir(parents=True)
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        path = {"PYTHONPATH": os.pathsep.join([KERNEL, str(ROOT)])}
        spec.write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python", "env": path}))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # Without a token: it listens on the loopback interface only, and for the length of the tests.
    options = {"ip": "127.0.0.1", "port": port, "port_retries": 0, "password": "", "root_dir": base / "books"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"]
    command += ["--JupyterNotebookApp.expose_app_in_browser=True", "--IdentityProvider.token="]
    command += [f"--ServerApp.{k}={v}" for k, v in options.items()]
    begin = time.perf_counter()
    with open(base / "log", "w") as log:
        server = subprocess.Popen(command, env=os.environ | env, stdout=log, stderr=log, start_new_session=True)
    found = Lab(f"http://127.0.0.1:{port}", base / "books", 0.0, base / "settings", env, timings)
    found._set("notification", {"fetchNews": "false", "checkForUpdates": False})
    try:
        while not _answers(f"{found.url}/api/status"):
            if server.poll() is not None or time.perf_counter() > begin + 60:
                pytest.fail((base / "log").read_text()[-2000:])
            time.sleep(0.1)
        found.started = time.perf_counter() - begin
        found.timings["server start"] = found.started
        yield found
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def _answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=2).status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None or importlib.util.find_spec("playwright") is None:
        pytest.skip(f"browser tests need Chromium: {HOW}")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=_PATIENCE)
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    """A page that must neither complain nor ask anything of another machine."""
    context = browser.new_context(viewport={"width": 1400, "height": 1200}, accept_downloads=True)
    context.set_default_timeout(_PATIENCE)
    wrong: list[str] = []
    page = context.new_page()
    page.on("console", lambda m: m.type == "error" and wrong.append(m.text))
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.on("request", lambda r: _outside(r.url) and wrong.append(f"asked for {r.url}"))
    # Texts that may be on the console; a test adds what it expects. JupyterLab's own, where a kernel ends early:
    page.allowed = ["Could not restore the debugger state"]
    yield page
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / "last-page.png")  # what a test that failed was looking at
    context.close()
    assert [w for w in wrong if not any(a in w for a in page.allowed)] == []


def _outside(url: str) -> bool:
    found = urlparse(url)
    return found.scheme in ("http", "https", "ws", "wss") and found.hostname not in ("127.0.0.1", "localhost")


_SESSION = "window.jupyterapp.shell.currentWidget.sessionContext"


class Desk:
    """An open notebook: run it, find a studio in it."""

    def __init__(self, lab: Lab, page, name: str, where: str = "doc/tree"):
        self.lab, self.page = lab, page
        page.goto(f"{lab.url}/{where}/{name}?reset")
        self.idle()

    def idle(self) -> None:
        """Until the kernel is there: a notebook says idle before, and would ask which kernel to run on."""
        self.page.wait_for_function(f"{_SESSION.replace('.', '?.')}?.session?.kernel")
        self.page.evaluate(f"{_SESSION}.ready.then(() => {_SESSION}.session.kernel.info)")
        self.page.wait_for_function(f"{_SESSION}.session.kernel.status === 'idle'", timeout=60_000)

    def run_all(self) -> None:
        self.page.evaluate("() => void window.jupyterapp.commands.execute('notebook:run-all-cells')")

    def restart(self) -> None:
        self.page.evaluate(f"{_SESSION}.session.kernel.restart()")
        self.idle()

    def studio(self, n: int = 0) -> "Hand":
        root = self.page.locator(".mlxdiff-studio").nth(n)
        root.wait_for()
        root.locator(".mlxdiff-stage").wait_for()
        return Hand(self.page, root)


class Hand:
    """A studio as a person sees it: by roles and labels."""

    def __init__(self, page, root):
        self.page, self.root = page, root
        self.canvas = root.locator(".mlxdiff-stage canvas[role=img]")
        self.status = root.locator(".mlxdiff-status")
        self.error = root.get_by_role("alert")
        self.thumbs = root.locator(".mlxdiff-thumb")

    def label(self, name: str):
        return self.root.get_by_label(name, exact=True)

    def press(self, name: str) -> None:
        self.root.get_by_role("button", name=name, exact=True).click()

    def says(self, text: str) -> None:
        from playwright.sync_api import expect

        expect(self.status).to_contain_text(text)

    def frames(self) -> int:
        return int(self.canvas.get_attribute("data-frames") or 0)

    def pixels(self) -> tuple[int, int, bytes]:
        """What is on the canvas: width, height, RGBA."""
        w, h, data = self.canvas.evaluate(
            "c => [c.width, c.height, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]"
        )
        return w, h, bytes(data)

    def record(self) -> None:
        """From now on the page itself notes each picture as it is drawn. A test that polls would miss some: Playwright
        looks once a second after the first ones, and a preview lasts a fifth of a second."""
        self.canvas.evaluate(
            """c => { c.record = []; c.observer?.disconnect();
            c.observer = new MutationObserver(() => c.record.push([performance.now() / 1000, c.toDataURL()]));
            c.observer.observe(c, { attributeFilter: ["data-frames"] }); }"""
        )

    def recorded(self) -> list[tuple[float, str]]:
        """Seconds on the page's clock and the picture, of each since `record()`."""
        return [(seconds, picture) for seconds, picture in self.canvas.evaluate("c => c.record")]

    def shot(self, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.root.screenshot(path=SHOTS / f"{name}.png")


def rgb(hand: Hand) -> np.ndarray:
    w, h, data = hand.pixels()
    return np.frombuffer(data, np.uint8).reshape(h, w, 4)[..., :3]


@pytest.fixture
def desk(lab, page):
    """desk("name.ipynb", cell, cell, ...) writes a notebook and opens it."""

    def opened(name: str, *cells: str, where: str = "doc/tree") -> Desk:
        lab.write(name, *cells)
        return Desk(lab, page, name, where)

    yield opened
    page.evaluate(f"{_SESSION}.shutdown()")
