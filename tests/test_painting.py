"""Painting on the start picture without a browser: what the page sends, what it is told, files and requests."""

import io
from dataclasses import replace
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


# --- what a picture from the page is for, and those that guide


def file_of(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def drop(studio, use: str, image: Image.Image) -> None:
    send(studio, "drop", file_of(image), part=0, parts=1, use=use)


def whys(studio) -> dict[str, str]:
    return {use["name"]: use["why"] for use in studio.view.uses}


def test_a_picture_is_taken_for_what_it_was_said_to_be(studio):
    mask = painted(10, 10, 30, 20)
    drop(studio, "mask", mask)
    assert studio.request().mask == Path("pictures") / f"mask-{images.fingerprint(mask)}.png"
    assert studio.strength == 1.0
    drop(studio, "mask", painted(size=(64, 64)))
    assert "another shape" in studio.status
    assert studio.mask.name == f"mask-{images.fingerprint(mask)}.png"  # the earlier one stays
    drop(studio, "begin", Image.new("RGB", (32, 32), "red"))
    assert (studio.mask, studio.image.name[:6]) == (None, "begin-")
    drop(studio, "restore", Image.new("RGB", (32, 32), "red"))
    assert "carries no settings" in studio.status


def test_what_the_model_cannot_take_is_grey_with_the_reason(studio):
    assert whys(studio) == dict.fromkeys(("begin", "mask", "control", "reference", "restore"), "")
    studio.image = None
    assert whys(studio)["mask"] == "There is no start picture yet."
    drop(studio, "mask", painted(1, 1, 2, 2))
    assert (studio.status, studio.mask) == ("There is no start picture yet.", None)
    studio._learn(fakes.describe("Z", "z-image-turbo"))
    assert whys(studio)["reference"] == "fake takes no references."
    drop(studio, "reference", painted())
    assert studio.reference_guides == []
    studio._learn(fakes.editor())
    assert whys(studio)["mask"] == "fake edits: it takes no mask."


def test_controls_and_references_have_rows_and_reach_the_request(studio):
    rows = studio.controls.guides
    drop(studio, "control", Image.new("RGB", (40, 30), "white"))
    drop(studio, "control", Image.new("RGB", (30, 40), "white"))
    drop(studio, "reference", Image.new("RGB", (20, 20), "green"))
    first = rows["control"].rows[0]
    names = [name for name, _ in first.network.options]
    assert {"canny", "depth"} <= {*names}  # of the fake model's family
    assert "ip-adapter" not in names
    first.network.value, first.scale.value, first.begin.value, first.end.value = "depth", 0.7, 0.1, 0.8
    assert rows["control"].rows[0] is first  # the row stays: a person has its slider in hand
    rows["control"].rows[1].network.value = ""
    rows["control"].rows[1].file.value = " mine.safetensors "
    rows["reference"].rows[0].end.value = 0.5
    request = studio.generate().result(WAIT).request
    guide, other = request.controls
    assert (guide.model, guide.scale, guide.interval) == ("depth", 0.7, (0.1, 0.8))
    assert images.read(guide.image).size == (40, 30)
    assert (other.model, other.image.name[:6]) == ("mine.safetensors", "guide-")
    assert request.references[0].model in rows["reference"].rows[0].network.label
    assert request.references[0].interval == (0.0, 0.5)
    assert "Control" in dict(studio.images[-1].words())

    file = studio.images[-1].path
    rows["control"].rows[0].remove.click()
    assert [g.model for g in studio.control_guides] == ["mine.safetensors"]
    studio.reference_guides = []
    assert rows["reference"].layout.display == "none"
    studio.load(file)
    assert [(g.model, g.scale, str(g.image)) for g in studio.control_guides] == [
        ("depth", 0.7, str(guide.image)),
        ("mine.safetensors", 1.0, str(other.image)),
    ]
    assert (len(studio.reference_guides), studio.more) == (1, {})
    studio.recall()
    assert not [entry for entry in studio.view.history if "guide" in entry["title"]]


def test_a_network_that_inpaints_reads_the_masked_start_picture(studio):
    """It has a button while a part is drawn anew, is offered for nothing else, and goes with the mask."""
    start, rows = studio.controls.start_picture, studio.controls.guides["control"]
    assert start.inpaint.layout.display == "none"
    send(studio, "mask", paint(painted(10, 10, 30, 20)), id="page 1")
    assert start.inpaint.layout.display is None
    start.inpaint.click()
    (guide,) = studio.request().controls
    assert (guide.image, guide.model) == ("masked", "inpaint")
    assert start.inpaint.layout.display == "none"
    drop(studio, "control", Image.new("RGB", (40, 30), "white"))
    masked, plain = rows.rows
    assert [name for name, _ in masked.network.options] == ["inpaint", "file or hub id"]
    assert "inpaint" not in [name for name, _ in plain.network.options]
    masked.scale.value = 0.5
    studio.request().check_guides()
    assert [g.scale for g in studio.request().controls] == [0.5, 1.0]
    start.forget.click()
    assert [g.masked for g in studio.request().controls] == [False]
    studio.model = "flux-dev"
    send(studio, "mask", paint(painted(10, 10, 30, 20)), id="page 1")
    assert start.inpaint.layout.display == "none"  # no such network is known for it


def test_a_reference_gives_all_its_style_or_its_layout(studio):
    drop(studio, "reference", Image.new("RGB", (20, 20), "green"))
    (row,) = studio.controls.guides["reference"].rows
    assert [value for _, value in row.aspect.options] == ["", "style", "layout"]  # of the fake model's family
    row.aspect.value = "style"
    (guide,) = studio.request().references
    assert (guide.model, guide.mode) == ("ip-adapter", "style")
    row.scale.value = 0.4
    row.network.value, row.file.value = "", "C:/plus.safetensors"
    (guide,) = studio.request().references
    assert (guide.model, guide.mode, guide.scale) == ("C:/plus.safetensors", "style", 0.4)
    row.aspect.value = ""
    assert studio.request().references[0].mode is None
    studio.model = "flux-dev"
    (row,) = studio.controls.guides["reference"].rows
    assert row.aspect is None


def test_a_control_of_a_network_for_several_kinds_keeps_its_kind(studio):
    Image.new("RGB", (40, 30), "white").save("edges.png")
    studio.control_guides = [("union.safetensors:canny", "edges.png", 0.7)]
    (row,) = studio.controls.guides["control"].rows
    assert row.file.value == "union.safetensors:canny"
    row.scale.value = 0.5
    (guide,) = studio.request().controls
    assert (guide.model, guide.mode, guide.scale) == ("union.safetensors", "canny", 0.5)
    row.file.value = "union.safetensors:depth"
    assert (studio.control_guides[0].model, studio.control_guides[0].mode) == ("union.safetensors", "depth")


def test_a_guide_whose_picture_is_gone_is_named_and_forgotten(studio):
    studio.control_guides = [("canny", "gone.png", 0.7)]
    assert studio.status.startswith("There is no picture at gone.png.")
    assert studio.control_guides == []


def test_a_model_that_reads_its_control_itself_names_no_network(studio):
    studio._learn(fakes.describe("Canny", "flux-canny"))
    drop(studio, "control", Image.new("RGB", (40, 30), "white"))
    assert studio.control_guides[0].model is None
    assert len(studio.controls.guides["control"].rows[0].children) == 3  # picture, remove, edges


def test_edges_are_made_of_a_control_picture(studio, monkeypatch):
    cv2 = pytest.importorskip("cv2", reason="OpenCV makes the edges: pip install .[control]")
    photo = Image.new("RGB", (40, 30), "white")
    photo.paste("black", (10, 10, 25, 20))
    drop(studio, "control", photo)
    studio.controls.guides["control"].rows[0].edges.click()
    made = images.read(studio.control_guides[0].image)
    np.testing.assert_array_equal(np.asarray(made)[..., 0], cv2.Canny(np.asarray(photo), 100, 200))


def test_without_opencv_edges_are_grey_with_the_reason(studio, monkeypatch):
    monkeypatch.setattr("mlxdiff.widgets.guide_rows.importlib.util.find_spec", lambda name: None)
    drop(studio, "control", Image.new("RGB", (40, 30), "white"))
    edges = studio.controls.guides["control"].rows[0].edges
    assert edges.disabled
    assert edges.tooltip.startswith("This needs OpenCV: pip install")


# --- what is done with a picture of the history


def test_enlarging_draws_the_same_again_at_twice_the_size(studio):
    studio.image = None
    first = studio.generate().result(WAIT).request
    studio.prompt = "something else"
    key = studio.view.history[-1]["key"]
    send(studio, "enlarge", key=key)
    studio._worker.submit("fake", None, lambda *_: None).result(WAIT)
    again = studio.images[-1].request
    assert again == replace(first, hires=(2.0, 0.5))
    assert (studio.prompt, studio.view.shown["unenlargeable"]) == ("something else", "It was enlarged already.")
    send(studio, "enlarge", key=studio.view.history[-1]["key"])
    assert studio.status == "It was enlarged already."
    again.resolve(fakes.DEFAULTS, ("euler", "leading"), "leading", 1, 8)  # a request that runs


def test_what_cannot_be_enlarged_says_why(studio):
    send(studio, "mask", paint(painted(10, 10, 30, 20)), id="page 1")
    studio.generate().result(WAIT)
    assert studio.view.shown["unenlargeable"].startswith("Only a part of it was drawn.")


def test_a_deleted_picture_is_gone_from_the_folder_and_the_history(studio):
    studio.image = None
    studio.generate().result(WAIT)
    first, second = studio.images
    keys = [entry["key"] for entry in studio.view.history]
    send(studio, "begin", key=keys[1])
    send(studio, "delete", key=keys[1])
    assert "is to begin with this one" in studio.status
    studio.image = None
    send(studio, "delete", key=keys[1])
    assert (second.path.exists(), first.path.exists(), studio.images) == (False, True, [first])
    assert ([e["key"] for e in studio.view.history], studio.view.shown["key"]) == ([keys[0]], keys[0])
    send(studio, "delete", key=keys[0])
    assert (studio.view.history, studio.view.shown, studio.controls.last.disabled) == ([], {}, True)


def test_before_is_the_picture_that_a_run_began_with(studio, monkeypatch):
    """At the size of the result, with what was added around it."""
    send(studio, "outpaint", sides=[0, 0, 16, 0])
    request = studio.generate().result(WAIT).request
    sent = []
    monkeypatch.setattr(studio.view, "send", lambda message, buffers: sent.append((message, buffers)))
    assert studio.view.shown["began"]
    send(studio, "before", key=studio.view.shown["key"])
    ((message, (png,)),) = sent
    assert message == {"do": "before", "key": studio.view.shown["key"]}
    before = images.read(Image.open(io.BytesIO(png)))
    assert before.size == (request.width, request.height) == (80, 48)
    np.testing.assert_array_equal(np.asarray(before)[:, :64], np.asarray(images.read("start.png")))


def test_a_sketch_guides_the_next_picture(studio):
    """Drawn on a black page of the picture's size, by the network of that name; the start picture's mask stays."""
    mask = painted(1, 1, 9, 9)
    send(studio, "mask", paint(mask), id="page 1")
    assert studio.view.sketches
    studio.width, studio.height = 64, 128
    send(studio, "sketch")
    page = Image.open(io.BytesIO(studio.view.paper["png"]))
    assert (page.size, page.getbbox(), studio.view.paper["sketch"]) == ((64, 128), None, True)
    assert (studio.view.mask, studio.view.around["inner"]) == ({"id": "", "png": b""}, [64, 128])

    lines = painted(5, 5, 20, 100, size=(64, 128))
    send(studio, "mask", paint(lines), id="page 1")
    (guide,) = studio.control_guides
    assert (guide.model, guide.image.name) == ("scribble", f"guide-{images.fingerprint(lines)}.png")
    np.testing.assert_array_equal(np.asarray(Image.open(guide.image)), np.asarray(lines))
    assert Path(studio.mask).name == f"mask-{images.fingerprint(mask)}.png"

    studio.control_guides = [replace(guide, scale=0.5)]
    studio.height = 64
    send(studio, "sketch")  # to go on with it
    shown = Image.open(io.BytesIO(studio.view.mask["png"]))
    np.testing.assert_array_equal(np.asarray(shown)[..., 3], np.asarray(lines))
    more = painted(5, 5, 60, 100, size=(64, 128))
    send(studio, "mask", paint(more), id="page 1")
    (second,) = studio.control_guides
    assert (second.scale, images.fingerprint(Image.open(second.image))) == (0.5, images.fingerprint(more))
    whole = second.image.read_bytes()
    second.image.write_bytes(whole[:60])
    send(studio, "sketch")
    assert f"{second.image} cannot be read as a picture" in studio.status
    second.image.write_bytes(whole)
    send(studio, "mask", paint(painted(size=(64, 128))), id="page 1")
    assert studio.control_guides == []

    studio.controls.start_picture.paint.click()
    assert "sketch" not in studio.view.paper
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(studio.view.mask["png"])))[..., 3], np.asarray(mask))


def test_a_model_without_a_network_for_sketches_says_so(studio):
    studio.model = "z-image"
    assert not studio.view.sketches
    with pytest.raises(Error, match="z-image has no network that reads a sketch"):
        studio._painting.sketch()
