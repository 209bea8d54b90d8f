"""A newcomer paints on the first picture and draws a part of it anew: with the mouse, in Chromium, by the built-in
model."""

import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mlxdiff
from mlxdiff import images, pictures
from mlxdiff.families import MODELS
from mlxdiff.request import Request
from tests.browser.conftest import HOW, SHOTS, Hand, rgb
from tests.browser.test_app import started

expect = pytest.importorskip("playwright.sync_api", reason=HOW).expect

SIDE = MODELS["storybook"].defaults.size
__all__ = ["started"]  # a fixture

_PAINTED = """async c => [c.width, c.height, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]
    .filter((_, i) => i % 4 === 3)]"""


class Brush:
    """The paper as a person sees it: places are fractions of the picture's edges."""

    def __init__(self, s: Hand):
        self.page, self.sheet = s.page, s.root.locator(".mlxdiff-sheet")
        self.canvas = self.sheet.locator("canvas")

    def to(self, x: float, y: float, steps: int = 6) -> None:
        box = self.sheet.bounding_box()
        self.page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=steps)

    def drag(self, *places: tuple[float, float]) -> None:
        self.to(*places[0])
        self.page.mouse.down()
        for place in places[1:]:
            self.to(*place)
        self.page.mouse.up()

    def painted(self) -> np.ndarray:
        w, h, alpha = self.canvas.evaluate(_PAINTED)
        return np.array(alpha, np.uint8).reshape(h, w)


def test_a_part_of_the_first_picture_is_painted_and_drawn_anew(started, timings, page, tmp_path):
    page.set_viewport_size({"width": 1440, "height": 900})
    begin = time.perf_counter()
    page.goto(started)
    s = Hand(page, page.locator(".mlxdiff-studio"))
    s.label("Prompt").fill("a red house under a full moon")
    s.label("Seed").fill("7")
    s.root.get_by_title("Keep this seed for every picture").click()
    s.press("Generate")
    expect(s.thumbs).to_have_count(1)
    s.says("Done in")
    start = next((tmp_path / "pictures").glob("*.png"))

    s.press("Change a part of it")
    brush = Brush(s)
    assert not brush.painted().any()
    brush.drag((0.3, 0.6), (0.7, 0.6), (0.4, 0.8))
    stroke = brush.painted()
    assert stroke[round(0.6 * len(stroke)), len(stroke) // 2] == 255
    s.press("Rectangle")
    brush.drag((0.2, 0.45), (0.8, 0.95))
    both = brush.painted()
    top, bottom, left, right = (int(part * SIDE) for part in (0.47, 0.93, 0.24, 0.78))
    assert both[top:bottom, left:right].min() == 255
    s.press("Undo")
    np.testing.assert_array_equal(brush.painted(), stroke)
    s.press("Redo")
    np.testing.assert_array_equal(brush.painted(), both)
    s.press("Invert")
    np.testing.assert_array_equal(brush.painted(), 255 - both)
    page.keyboard.press("Control+z")
    size = s.root.get_by_label("Brush size")
    before = int(size.input_value())
    brush.sheet.press("]")
    page.mouse.wheel(0, -100)
    assert int(size.input_value()) > before + 1
    brush.sheet.press("e")
    brush.drag((0.5, 0.2), (0.5, 0.3))  # nothing is there
    np.testing.assert_array_equal(brush.painted(), both)
    s.root.get_by_label("Soft edge").fill("3")

    # Its last stroke counts, though Generate follows at once.
    s.label("Prompt").fill("a blue house under a full moon")
    brush.drag((0.2, 0.9), (0.3, 0.9))
    mask = brush.painted()
    s.press("Generate")
    expect(s.thumbs).to_have_count(2)
    s.says("Done in")
    timings["mlxdiff studio: a part drawn anew after"] = time.perf_counter() - begin
    expect(s.root.locator(".mlxdiff-paper")).to_be_hidden()
    (file,) = (tmp_path / "pictures").glob("a-blue-house*.png")
    request, _ = images.read_settings(file)
    assert (request.mask_blur, request.strength, request.seed) == (3.0, 1.0, 7)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / request.mask)), mask)
    pasted = np.asarray(pictures.canvas(request, pictures.read(_here(request, tmp_path))).mask) > 0
    drawn, first = rgb(s), np.asarray(images.read(start))
    np.testing.assert_array_equal(drawn[~pasted], first[~pasted])
    assert np.abs(drawn[mask == 255].astype(int) - first[mask == 255]).mean() > 8
    np.testing.assert_array_equal(drawn, np.asarray(mlxdiff.load("storybook")(_here(request, tmp_path)).image))

    # Before and after, on one picture.
    split = s.root.locator(".mlxdiff-split")
    expect(split).to_be_hidden()
    s.press("Before / after")
    expect(split).to_be_visible()
    s.root.get_by_label("Before and after").fill("30")
    expect(split.locator("img")).to_have_attribute("style", re.compile(r"inset\(0px 70% 0px 0px\)"))
    page.screenshot(path=SHOTS / "before-after.png")
    s.press("Before / after")
    expect(split).to_be_hidden()

    # A reloaded page shows the mask again. A key adds pixels, another paints.
    page.reload()
    s.press("Change a part")
    np.testing.assert_array_equal(brush.painted(), mask)
    s.root.get_by_role("slider", name="Add at the right").press("ArrowRight")
    expect(s.root.get_by_label("Pixels to add at the right")).to_have_value(re.compile(r"[1-9]"))
    expect(s.label("Width")).not_to_have_value(str(SIDE))
    s.press("Clear")
    assert not brush.painted().any()
    brush.sheet.press("b")
    for key in ("ArrowUp", "ArrowLeft", "Space"):
        brush.sheet.press(key)
    assert brush.painted()[SIDE // 2 - 4, SIDE // 2 - 4] == 255
    for scheme, (width, height) in (("light", (1440, 900)), ("dark", (768, 1024)), ("light", (420, 900))):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": height})
        page.screenshot(path=SHOTS / f"painting-{scheme}-{width}.png", full_page=width == 420)
        assert page.evaluate("() => document.body.scrollWidth") <= width
    s.press("Change all of it")
    expect(s.label("Width")).to_have_value(str(SIDE))
    page.wait_for_function("() => document.querySelector('.mlxdiff-painting .mlxdiff-button:disabled')")
    s.press("Done")
    expect(s.root.locator(".mlxdiff-stage")).to_be_visible()

    # The first picture is enlarged, which the second cannot be; then the large one is deleted.
    enlarge = s.root.get_by_role("button", name="Enlarge 2×")
    expect(enlarge).to_be_disabled()
    s.thumbs.last.click()
    enlarge.click()
    expect(s.thumbs).to_have_count(3)
    s.says("Done in")
    assert rgb(s).shape == (2 * SIDE, 2 * SIDE, 3)
    s.press("Delete")
    s.press("Really delete?")
    expect(s.thumbs).to_have_count(2)
    assert len([*(tmp_path / "pictures").glob("a-*.png")]) == 2


def _here(request: Request, folder: Path) -> Request:
    """The request with paths that hold outside the studio's folder too."""
    return replace(request, image=folder / request.image, mask=folder / request.mask)


def test_a_sketch_is_drawn_with_the_mouse_and_followed(started, page, tmp_path):
    """On a black page, white; the built-in model follows what is there, and a reloaded page goes on with it."""
    page.set_viewport_size({"width": 1440, "height": 900})
    page.goto(started)
    s = Hand(page, page.locator(".mlxdiff-studio"))
    s.press("Draw a sketch")
    brush = Brush(s)
    expect(s.root.locator(".mlxdiff-paper")).to_be_visible()
    expect(s.root.get_by_label("Soft edge")).to_be_hidden()
    assert int(s.root.get_by_label("Brush size").input_value()) < 10
    brush.drag((0.3, 0.8), (0.3, 0.5), (0.5, 0.35), (0.7, 0.5), (0.7, 0.8), (0.3, 0.8))
    drawn = brush.painted()
    page.screenshot(path=SHOTS / "sketch.png")
    s.label("Prompt").fill("a red house at sunset")
    s.press("Generate")
    expect(s.thumbs).to_have_count(1)
    s.says("Done in")
    (file,) = (tmp_path / "pictures").glob("a-red-house*.png")
    (guide,) = images.read_settings(file)[0].controls
    assert guide.model == "sketch"
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / guide.image)), drawn)
    page.reload()
    s.press("Draw a sketch")
    np.testing.assert_array_equal(brush.painted(), drawn)
    s.press("Clear")
    expect(s.root.locator(".mlxdiff-guide")).to_have_count(0)
