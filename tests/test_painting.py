"""Painting on the start picture without a browser: what the page sends, what it is told, files and requests."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

pytest.importorskip("anywidget", reason="the studio needs ipywidgets and anywidget: pip install .[studio]")

from mlxdiff import images, pictures
from mlxdiff.errors import Error
from mlxdiff.request import OUTPAINT, STRENGTH
from mlxdiff.widgets import Studio, view
from mlxdiff.widgets.worker import Worker
from tests import fakes

WAIT = 30


@pytest.fixture
def studio(tmp_path, monkeypatch):
    """A studio with a picture of 64 x 48 pixels to paint on, whose model is open."""
    monkeypatch.chdir(tmp_path)
    studio = Studio("fake", worker=Worker(fakes.load), steps=4)
    studio.generate().result(WAIT)
    Image.new("RGB", (64, 48), "navy").save("start.png")
    studio.image = "start.png"
    return studio


def painted(*box: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A mask, white in a box."""
    mask = Image.new("L", size)
    if box:
        ImageDraw.Draw(mask).rectangle(box, fill=255)
    return mask


def paint(mask: Image.Image) -> bytes:
    """A mask as the page sends it: as opaque as the mask is white."""
    image, out = Image.new("RGBA", mask.size, (255, 45, 135)), io.BytesIO()
    image.putalpha(mask)
    image.save(out, "PNG")
    return out.getvalue()


def send(studio, do: str, *buffers: bytes, **message) -> None:
    studio.view._handle_custom_msg({"do": do, **message}, [memoryview(b) for b in buffers])


def test_what_is_painted_is_the_mask_of_the_next_request(studio):
    mask = painted(10, 10, 30, 20)
    send(studio, "mask", paint(mask), id="page 1")
    file = Path("pictures") / f"mask-{images.fingerprint(mask)}.png"
    assert studio.request().mask == studio.mask == file
    assert Image.open(file).mode == "L"
    np.testing.assert_array_equal(np.asarray(pictures.read(studio.request()).mask), np.asarray(mask))
    assert studio.view.mask["id"] == "page 1"  # the page that painted it does not load it again
    assert studio.strength == 1.0
    drawn = studio.generate().result(WAIT).request
    assert drawn.mask == file
    assert ("Mask", file.name) in studio.images[-1].words()

    send(studio, "mask", paint(mask), id="page 2")
    assert len([*Path("pictures").glob("mask-*")]) == 1  # the same mask is the same file
    send(studio, "mask", paint(painted()), id="page 3")
    assert (studio.mask, studio.request().mask, studio.strength) == (None, None, STRENGTH)


def test_a_restored_mask_is_painted_again(studio):
    """Also with a soft edge and pixels around; then other settings follow, and the mask goes with its picture."""
    mask = painted(0, 0, 40, 47)
    send(studio, "mask", paint(mask), id="page 1")
    send(studio, "soften", pixels=3)
    send(studio, "outpaint", sides=[0, 8, 16, 0])
    studio.strength = 0.7
    request = studio.generate().result(WAIT).request
    file = studio.images[-1].path
    assert (request.mask_blur, request.outpaint, request.strength) == (3, (0, 8, 16, 0), 0.7)
    studio.image = None
    assert (studio.mask, studio.outpaint, studio.view.paper) == (None, (0, 0, 0, 0), {})
    studio.load(file)
    assert (studio.mask, studio.mask_blur, studio.outpaint) == (str(request.mask), 3, (0, 8, 16, 0))
    assert (studio.strength, studio.more) == (0.7, {})
    shown = Image.open(io.BytesIO(studio.view.mask["png"]))
    np.testing.assert_array_equal(np.asarray(shown)[..., 3], np.asarray(mask))
    assert "page" not in studio.view.mask["id"]
    paper = Image.open(io.BytesIO(studio.view.paper["png"]))
    assert paper.size == (studio.view.paper["width"], studio.view.paper["height"]) == (64, 48)


def test_another_start_picture_has_no_mask(studio, tmp_path):
    send(studio, "mask", paint(painted(1, 1, 9, 9)), id="page 1")
    send(studio, "paint", key=studio.view.history[0]["key"])
    assert studio.image == studio.images[0].path
    assert (studio.mask, studio.view.mask) == (None, {"id": "", "png": b""})
    send(studio, "mask", paint(painted(1, 1, 9, 9, size=(64, 64))), id="page 2")
    mask = studio.mask
    send(studio, "paint", key=studio.view.history[0]["key"])  # the same one, to paint on
    assert studio.mask == mask is not None
    studio.controls.start_picture.forget.click()
    assert (studio.mask, studio.view.mask["png"]) == (None, b"")


def test_pixels_around_make_the_result_larger(studio):
    assert (studio.width, studio.height) == (64, 48)
    send(studio, "outpaint", sides=[16, 0, 8, 24])
    assert (studio.width, studio.height, studio.strength) == (88, 72, OUTPAINT)
    assert studio.view.around == {"sides": [16, 0, 8, 24], "inner": [64, 48], "step": 8, "blur": 0.0}
    request = studio.request()
    assert pictures.canvas(request, pictures.read(request)).anew.sum() == 88 * 72 - 64 * 48
    studio.controls.presets["standard"].click()
    assert (studio.width, studio.height) == (88, 72)
    studio.controls.start_picture.forget.click()
    assert (studio.width, studio.height, studio.outpaint, studio.strength) == (64, 48, (0, 0, 0, 0), STRENGTH)


@pytest.mark.parametrize(
    ("png", "what"),
    [
        (paint(painted(size=(64, 64))), "another size"),
        (b"GIF89a", "no PNG"),
        (paint(painted(3, 3, 9, 9))[:60], "cut off"),
    ],
)
def test_paint_that_is_no_mask_of_the_picture_is_refused(studio, png, what):
    send(studio, "mask", png, id="page 1")
    assert studio.status.startswith("The page sent no mask of the start picture's size.")
    assert (studio.mask, [*Path("pictures").glob("mask-*")]) == (None, [])


@pytest.mark.parametrize(
    ("do", "message", "problem"),
    [
        ("outpaint", {"sides": [1, 2]}, "is not four numbers"),
        ("outpaint", {"sides": [0, 0, 0, -8]}, "must be a whole number"),
        ("soften", {"pixels": 1e9}, "must be a number"),
    ],
)
def test_numbers_out_of_range_are_refused(studio, do, message, problem):
    send(studio, do, **message)
    assert problem in studio.status
    assert (studio.outpaint, studio.mask_blur) == ((0, 0, 0, 0), 0.0)


def test_a_mask_of_another_shape_is_refused_and_forgotten(studio):
    painted(size=(64, 64)).save("square.png")
    studio.mask = "square.png"
    assert "another shape" in studio.status
    assert studio.mask is None


def test_a_model_that_edits_takes_no_mask_and_says_so(studio):
    send(studio, "mask", paint(painted(1, 1, 9, 9)), id="page 1")
    studio.model = "editor"
    studio._learn(fakes.editor())
    assert studio.view.unpaintable == "editor edits: say in the prompt what to change."
    assert studio.request().mask is None
    paint_on = studio.controls.start_picture.paint
    assert (paint_on.disabled, paint_on.tooltip) == (True, "This model edits: it takes no mask")
    send(studio, "paint", key=studio.view.history[0]["key"])
    assert studio.status.startswith("editor edits")
    studio.model = "fake"
    assert studio.view.unpaintable == ""


def test_a_large_picture_is_painted_on_in_a_smaller_copy(studio):
    Image.new("RGB", (2100, 1050)).save("large.png")
    studio.image = "large.png"
    assert (studio.view.paper["width"], studio.view.paper["height"]) == (2048, 1024)
    send(studio, "mask", paint(painted(0, 0, 99, 99, size=(2048, 1024))), id="page 1")
    assert pictures.read(studio.request()).mask.size == (2048, 1024)


def test_jupyter_gets_one_script_with_all_in_it():
    text = view.View._esm if isinstance(view.View._esm, str) else view._module("studio.js")
    lines = text.splitlines()
    assert "function painting({ model, send, h, covered }) {" in lines
    assert [line for line in lines if line.startswith(("import", "export"))] == ["export default { render };"]


def test_a_mask_without_a_picture_is_an_error_of_the_run(studio):
    studio.image, studio.mask = None, "start.png"
    with pytest.raises(Error, match="A mask needs a start image"):
        studio.generate().result(WAIT)
