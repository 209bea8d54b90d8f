"""`mlxdiff studio` as a newcomer meets it: one command, a page with the studio drawn, the built-in model's pixels."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import mlxdiff
from mlxdiff import images
from tests.browser.conftest import HOW, Hand, rgb
from tests.test_imports import ROOT

expect = pytest.importorskip("playwright.sync_api", reason=HOW).expect


@pytest.fixture
def started(lab, tmp_path):  # lab: for its skip, and for a place of settings of our own
    env = os.environ | lab.env | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mlxdiff.widgets.app", "--no-browser"]
    begin = time.perf_counter()
    # A shell that starts the tests in its background ignores SIGINT and hands that down; a user's shell does not.
    heard = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    with open(tmp_path / "err", "w") as err:
        options = {"cwd": tmp_path, "env": env, "stdout": subprocess.PIPE, "stderr": err, "text": True}
        server = subprocess.Popen(command, preexec_fn=heard, **options)
    assert server.stdout.readline().startswith("Starting JupyterLab")
    line = server.stdout.readline()
    lab.timings["mlxdiff studio: address after"] = time.perf_counter() - begin
    address = re.search(r"http://\S+", line)
    assert address, (tmp_path / "err").read_text()
    yield address[0], begin
    server.send_signal(signal.SIGINT)
    assert server.wait(30) == 0
    assert (tmp_path / "err").read_text() == ""


def test_one_command_then_a_prompt_then_a_picture(started, lab, page, tmp_path):
    address, begin = started
    page.allowed.append("404")  # JupyterLab looks for a workspace of this name, which is new
    page.goto(address)
    root = page.locator(".mlxdiff-studio")
    root.wait_for(timeout=60_000)
    lab.timings["mlxdiff studio: studio on the page after"] = time.perf_counter() - begin
    s = Hand(page, root)
    for count, total, prompt in (
        (4, 4, "a yellow castle on a hill at sunset"),
        (1, 5, "a red house under a full moon"),
    ):
        s.label("Prompt").fill(prompt)
        s.label("Pictures").fill(str(count))
        pressed = time.perf_counter()
        s.press("Generate")
        expect(s.thumbs).to_have_count(total, timeout=60_000)
        lab.timings[f"{count} x {prompt}: drawn after"] = time.perf_counter() - pressed
        s.says("Done in")
    expect(s.thumbs).to_have_count(5)
    s.shot("studio-storybook")
    file = max((tmp_path / "pictures").glob("*.png"), key=lambda p: p.stat().st_mtime_ns)
    request, model = images.read_settings(file)
    assert (request.prompt, model) == (prompt, "storybook")
    # The same machine, weights and code in another process: equal to the last bit.
    np.testing.assert_array_equal(rgb(s), np.asarray(mlxdiff.load("storybook")(request).image))
