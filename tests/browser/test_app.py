"""`mlxdiff studio` as a newcomer meets it: one command, one page without Jupyter, the built-in model's pixels."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import mlxdiff
from mlxdiff import builtin, images
from tests.browser.conftest import HOW, SHOTS, Hand, rgb
from tests.test_imports import ROOT

expect = pytest.importorskip("playwright.sync_api", reason=HOW).expect

SIZES = ((1440, 900), (1024, 768), (768, 1024), (420, 900))


@pytest.fixture
def started(browser, timings, tmp_path):  # browser: for its skip
    env = os.environ | {"PYTHONPATH": str(ROOT), "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime")}
    command = [sys.executable, "-m", "mlxdiff.widgets.app", "--no-browser"]
    begin = time.perf_counter()
    # A shell that starts the tests in its background ignores SIGINT and hands that down; a user's shell does not.
    heard = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    with open(tmp_path / "err", "w") as err:
        options = {"cwd": tmp_path, "env": env, "stdout": subprocess.PIPE, "stderr": err, "text": True}
        server = subprocess.Popen(command, preexec_fn=heard, **options)
    assert server.stdout.readline().startswith("Starting the studio")
    line = server.stdout.readline()
    timings["mlxdiff studio: address after"] = time.perf_counter() - begin
    address = re.search(r"http://\S+", line)
    assert address, (tmp_path / "err").read_text()
    yield address[0]
    server.send_signal(signal.SIGINT)
    assert server.wait(30) == 0
    assert (tmp_path / "err").read_text() == ""


def test_one_command_then_a_prompt_then_a_picture(started, timings, page, tmp_path):
    page.set_viewport_size({"width": 1440, "height": 900})
    begin = time.perf_counter()
    page.goto(started)
    s = Hand(page, page.locator(".mlxdiff-studio"))
    s.label("Prompt").wait_for()
    timings["mlxdiff studio: prompt box after"] = time.perf_counter() - begin
    assert "token" not in page.url
    s.label("Prompt").fill("a red house under a full moon")
    s.root.get_by_role("slider", name="Steps", exact=True).fill("25")
    s.record()
    begin = page.evaluate("() => performance.now() / 1000")
    s.press("Generate")
    expect(s.thumbs).to_have_count(1)
    s.says("Done in")
    file, seen = next((tmp_path / "pictures").glob("*.png")), s.recorded()
    timings["25 steps: first preview after"] = seen[0][0] - begin
    timings["25 steps: drawn after"] = seen[-1][0] - begin
    assert len({picture for _, picture in seen[:-1]}) >= 6  # the last is the picture
    request, model = images.read_settings(file)
    assert (request.prompt, request.steps, model) == ("a red house under a full moon", 25, "storybook")
    # The same machine, weights and code in another process: equal to the last bit.
    np.testing.assert_array_equal(rgb(s), np.asarray(mlxdiff.load("storybook")(request).image))

    # A reloaded page shows the same, and keys work from anywhere.
    page.reload()
    expect(s.label("Prompt")).to_have_value(request.prompt)
    expect(s.thumbs).to_have_count(1)
    s.label("Prompt").press("End")
    s.press("Its words")
    s.root.get_by_role("button", name="in the snow", exact=True).click()
    expect(s.label("Prompt")).to_have_value("a red house under a full moon in the snow")
    s.press("Its words")
    s.press("Surprise me")
    expect(s.label("Prompt")).not_to_have_value(re.compile("red house"))
    prompt = s.label("Prompt").input_value()
    assert builtin.unknown_words(prompt) == []
    s.press("Quick")
    page.locator("body").press("Control+Enter")
    expect(s.thumbs).to_have_count(2)
    s.says("Done in")
    expect(s.root.locator(".mlxdiff-words dd").first).to_contain_text(prompt)

    # An error goes with what is done next.
    s.label("Width").fill("100")
    s.press("Generate")
    expect(s.error).to_contain_text("width 100 is not a multiple of 8. Use 96 or 104.")
    s.press("Square")
    expect(s.error).to_be_hidden()
    expect(s.label("Width")).to_have_value("128")
    s.press("Fit it to this machine")
    s.says("It fits as it is")

    # All of it is in the window, in both schemes, from a desk to a phone.
    titles = "() => [...document.querySelectorAll('[title]')].map(e => e.title)"
    assert "null" not in page.evaluate(titles)
    for scheme, (width, height) in ((scheme, size) for scheme in ("light", "dark") for size in SIZES):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": height})
        page.screenshot(path=SHOTS / f"app-{scheme}-{width}.png", full_page=width == 420)
        ground = s.root.locator(".mlxdiff-body").evaluate("e => getComputedStyle(e).backgroundColor")
        assert (max(int(v) for v in ground[4:-1].split(",")) < 80) == (scheme == "dark")
        across, down = page.evaluate("() => [document.body.scrollWidth, document.body.scrollHeight]")
        assert across <= width
        assert down <= height or width == 420
        if width == 1440:
            parts = (s.label("Prompt"), s.label("Seed"), s.canvas, s.status, s.thumbs.first)
            for part in (*parts, s.root.get_by_role("button", name="Compare settings")):
                box = part.bounding_box()
                assert box["y"] + box["height"] <= height
            assert s.canvas.bounding_box()["width"] > 640
