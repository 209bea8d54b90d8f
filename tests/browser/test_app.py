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
from mlxdiff.families import MODELS
from tests.browser.conftest import HOW, SHOTS, Hand, rgb
from tests.checkpoints import full
from tests.test_imports import ROOT

expect = pytest.importorskip("playwright.sync_api", reason=HOW).expect

SIZES = ((1440, 900), (1024, 768), (768, 1024), (420, 900))


@pytest.fixture
def started(browser, timings, tmp_path):  # browser: for its skip
    env = os.environ | {"PYTHONPATH": str(ROOT), "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime")}
    (tmp_path / "loras").mkdir()
    command = [sys.executable, "-m", "mlxdiff.widgets.app", "--no-browser", "--lora-dir", "loras"]
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
    s.press("Known words")
    s.root.get_by_role("button", name="in the snow", exact=True).click()
    expect(s.label("Prompt")).to_have_value("a red house under a full moon in the snow")
    s.press("Known words")
    s.press("Surprise me")
    expect(s.label("Prompt")).not_to_have_value(re.compile("red house"))
    prompt = s.label("Prompt").input_value()
    assert builtin.unknown_words(prompt) == []
    s.press("Quick")
    page.locator("body").press("Control+Enter")
    expect(s.thumbs).to_have_count(2)
    s.says("Done in")
    (other,) = {*(tmp_path / "pictures").glob("*.png")} - {file}
    drawn = images.read_settings(other)[0]  # the key came before the page had seen what the button set
    assert (drawn.steps, drawn.guidance, drawn.loras) == (4, 1.0, ("quick:1",))
    expect(s.root.locator(".mlxdiff-words dd").first).to_contain_text(prompt)

    # An error goes with what is done next.
    s.label("Width").fill("100")
    s.press("Generate")
    expect(s.error).to_contain_text("width 100 is not a multiple of 8. Use 96 or 104.")
    s.press("Square")
    expect(s.error).to_be_hidden()
    expect(s.label("Width")).to_have_value(str(MODELS["storybook"].defaults.size))
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
            for part in (*parts, s.root.get_by_role("button", name="Compare")):
                box = part.bounding_box()
                assert box["y"] + box["height"] <= height
            assert s.canvas.bounding_box()["width"] > 640


LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
WIDE = MODELS["storybook"].networks["unet"].channels[1]


def test_a_lora_by_keyboard_a_favourite_and_the_picture_in_full_screen(started, page, tmp_path):
    g = np.random.default_rng(0)
    down, up = (g.normal(size=size).astype(np.float32) for size in ((4, 128), (WIDE, 4)))
    full(tmp_path / "loras" / "ink.safetensors", {f"{LAYER}.lora_A.weight": down, f"{LAYER}.lora_B.weight": up})
    full(tmp_path / "loras" / "wide.safetensors", {f"{LAYER}.lora_A.weight": np.ones((4, 768), np.float32)})
    page.set_viewport_size({"width": 1440, "height": 900})
    page.goto(started)
    s = Hand(page, page.locator(".mlxdiff-studio"))
    s.label("Prompt").fill("a red house under a full moon")
    shown = s.root.get_by_role("button", name="LoRA, words")
    shown.press("Enter")
    ink, wide = (s.root.get_by_role("button", name=name, exact=True) for name in ("ink", "wide"))
    expect(wide).to_be_disabled()
    expect(s.root.get_by_text("Its layers have other shapes")).to_be_visible()
    ink.press("Enter")
    expect(s.root.get_by_text("1 of 1 layer (unet 1), rank 4")).to_be_visible()
    s.root.get_by_role("slider", name="Scale", exact=True).fill("-0.5")
    page.screenshot(path=SHOTS / "app-loras.png")
    page.keyboard.press("Escape")
    expect(s.root.get_by_text("1 of 1 layer")).to_be_hidden()
    page.reload()
    expect(shown).to_have_text("LoRA, words (1)")
    s.press("Generate")
    expect(s.thumbs).to_have_count(1)
    s.says("Done in")
    (file,) = (tmp_path / "pictures").glob("*.png")
    request = images.read_settings(file)[0]
    assert request.loras == (f"{tmp_path / 'loras' / 'ink.safetensors'}:-0.5",)
    np.testing.assert_array_equal(rgb(s), np.asarray(mlxdiff.load("storybook")(request).image))

    # A favourite is on the disk, and can be shown alone.
    s.press("☆ Favourite")
    expect(s.thumbs.first).to_have_class(re.compile("mlxdiff-starred"))
    assert (tmp_path / "pictures" / "favourites.txt").read_text() == f"{file.name}\n"
    s.press("Generate")
    expect(s.thumbs).to_have_count(2)
    s.says("Done in")
    s.press("★ Favourites")
    expect(s.thumbs.and_(page.locator(":visible"))).to_have_count(1)
    s.press("★ Favourites")
    expect(s.thumbs.and_(page.locator(":visible"))).to_have_count(2)

    # Over the picture's own pixels lies a sharper copy; in full screen it is zoomed and moved.
    copy = s.root.locator(".mlxdiff-sharp")
    expect(copy).to_be_visible()
    assert copy.evaluate("c => c.width") > 700
    stage = s.root.locator(".mlxdiff-stage")
    zoom = lambda: float(stage.evaluate("e => e.style.getPropertyValue('--zoom')"))  # noqa: E731
    s.press("Full screen")
    expect(stage).to_have_css("width", "1440px")
    page.wait_for_timeout(200)  # the style is there before the event that the keys wait for
    page.keyboard.press("+")
    assert zoom() == 1.25
    page.mouse.move(1000, 300)
    page.mouse.wheel(0, -300)
    page.wait_for_timeout(50)
    assert zoom() == 2.5
    place = lambda: s.canvas.bounding_box()  # noqa: E731
    before = place()
    page.mouse.down()
    page.mouse.move(1040, 330, steps=3)
    page.mouse.up()
    assert (place()["x"] - before["x"], place()["y"] - before["y"]) == (40, 30)
    page.screenshot(path=SHOTS / "app-full-screen.png")
    page.mouse.dblclick(700, 450)
    assert zoom() == 1.0
    page.mouse.dblclick(700, 450)
    assert zoom() == 3.0
    page.keyboard.press("0")
    assert zoom() == 1.0
    page.evaluate("() => document.exitFullscreen()")
