"""Pictures and their settings. References: PIL reads back what was written."""

import io
import os
import struct
import tracemalloc
import zlib
from dataclasses import fields, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, PngImagePlugin

import mlxdiff
from mlxdiff import images
from mlxdiff.errors import Error
from mlxdiff.guides import Guide
from mlxdiff.request import Request

FULL = Request(
    prompt="a (red:1.3) house, steps: many\nsecond line",
    negative="blurry, Negative prompt",
    seed=7,
    steps=20,
    guidance=5.5,
    width=72,
    height=40,
    sampler="dpmpp_2m",
    schedule="karras",
    clip_skip=2,
    interval=(0.1, 0.8),
    noise="nv",
)


def picture() -> Image.Image:
    return Image.fromarray(np.arange(40 * 72 * 3, dtype=np.uint8).reshape(40, 72, 3))


def test_pixels_are_rounded_and_clipped():
    pixels = np.array([[[-1.0, 1.0, 0.0], [-3.0, 9.0, 1 / 255]]], np.float32)
    # -1 -> 0, 1 -> 255, 0 -> 127.5 -> 128 (round half to even), 1/255 -> 128
    assert np.asarray(images.to_image(pixels)).tolist() == [[[0, 255, 128], [0, 255, 128]]]


def test_preview_is_the_linear_map():
    factors = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.5, -0.5, 0.0))
    out = np.asarray(images.preview(np.array([[[0.5, 0.5]]]), factors))
    assert out.tolist() == [[[255, 128, 128]]]  # (0.5 + 0.5, 0.5 - 0.5, 0) on [-1, 1]


def test_a_png_gives_back_the_whole_request(tmp_path):
    path = images.save(picture(), tmp_path / "a.png", FULL, "model, with comma", "float16-4bit")
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(picture()))
    request, model = images.read_settings(path)
    assert (request, model) == (FULL, "model, with comma")
    with Image.open(path) as written:
        assert written.info["mlxdiff-recipe"] == "float16-4bit"
        assert ', Model: "model, with comma", Weights: float16-4bit, ' in written.info["parameters"]


def test_saving_never_overwrites(tmp_path):
    names = [images.save(picture(), tmp_path / "a.png", FULL, "m", "float32").name for _ in range(3)]
    assert names == ["a.png", "a-1.png", "a-2.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)  # and leaves no temporary file


def test_saving_where_one_cannot_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Error, match="cannot be written"):
        images.save(picture(), tmp_path / "file" / "a.png", FULL, "m", "float32")
    with pytest.raises(Error, match="not a kind of picture"):
        images.save(picture(), tmp_path / "a.gif", FULL, "m", "float32")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("absent.png", None, "no picture"),
        ("text.png", b"hello", "cannot be read"),
        ("empty.png", b"", "cannot be read"),
    ],
)
def test_what_is_no_picture_is_one_error(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(Error, match=says):
        images.read_settings(tmp_path / name)


def test_a_picture_without_settings_is_one_error(tmp_path):
    picture().save(tmp_path / "bare.png")
    with pytest.raises(Error, match="carries no settings"):
        images.read_settings(tmp_path / "bare.png")


def with_text(path: Path, key: str, text: str) -> Path:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(key, text)
    picture().save(path, pnginfo=info)
    return path


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "damaged settings: Expecting"),
        ("5", "no prompt"),
        ('["prompt"]', "no prompt"),
        ('{"seed": 1}', "no prompt"),
        ("[" * 200_000, "nested too deeply"),
        ('{"prompt": ' + '{"a":' * 100_000, "nested too deeply"),
        ('{"prompt": "x", "sampler": 5}', "sampler is 5"),
        ('{"prompt": "x", "sampler": ' + "[" * 200 + "]" * 200 + "}", r"sampler is \[\["),
        ('{"prompt": "x", "sampler": {"a": "b"}}', "sampler is {"),
        ('{"prompt": ["x"]}', "prompt is \\['x'\\]"),
        ('{"prompt": null}', "prompt is None"),
        ('{"prompt": "x", "schedule": []}', r"schedule is \[\]"),
        ('{"prompt": "x", "noise": []}', r"noise is \[\]"),
        ('{"prompt": "x", "steps": true}', "steps is True"),
        ('{"prompt": "x", "seed": "7"}', "seed is '7'"),
        ('{"prompt": "x", "seed": ' + "7" * 5000 + "}", "damaged settings"),
        ('{"prompt": "x", "guidance": "7"}', "guidance is '7'"),
        ('{"prompt": "x", "interval": 5}', "interval is 5"),
        ('{"prompt": "x", "interval": ["a", []]}', "interval is"),
        ('{"prompt": "x", "image": [["' + "a" * 10_000 + '"]]}', "image is"),
        ('{"prompt": "x", "' + "a" * 10_000 + '": 1}', "does not know"),
        ('{"prompt": "' + "x" * 2**20 + '"}', "more than 1048576"),
    ],
    ids=lambda v: v[:40],
)
def test_damaged_json_is_one_short_line(tmp_path, text, says):
    with pytest.raises(Error, match=says) as e:
        images.read_settings(with_text(tmp_path / "a.png", "mlxdiff", text))
    assert len(str(e.value).splitlines()) == 1
    assert len(str(e.value)) < 300 + len(str(tmp_path))
    assert e.value.fix


def test_every_field_reads_back_from_json():
    """With none of them at its default."""
    full = Request("x", "n", 1, 2, 3, 64, 72, "ddim", "karras", 2, 1, 0.5, (0, 0.5), 2, 1, 2, 3, (7,), 1, (0.1, 1))
    full = replace(full, t5=False, image="a.png", image_hash="1f", strength=1, noise="nv")
    full = replace(full, loras=("a.safetensors:0.8",), lora_hashes=("2e",), embeddings=("b",), embedding_hashes=("3",))
    full = replace(full, mask="m.png", mask_hash="5b", mask_blur=2.0, mask_crop=3, keep=False, outpaint=(8, 0, 16, 0))
    full = replace(full, reuse=0.1, hires=(2.0, 0.5), upscaler="x4.safetensors", upscaler_hash="6c")
    guide = Guide("edges.png", "canny", 0.7, (0.1, 0.8), "canny", "4a", "5b", "depth")
    full = replace(full, controls=(guide,), references=(guide, replace(guide, model=None)), guess=True)
    plain = Request("")
    assert all(getattr(full, f.name) != getattr(plain, f.name) for f in fields(Request))
    assert Request.from_json(full.to_json()) == full
    assert Request.from_json(Request("x").to_json()) == Request("x")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("Steps: many", "Steps is 'many'"),
        ("Steps: 3, CFG scale: 7;5", "CFG scale is '7;5'"),
        ("Steps: 3, Seed: " + "7" * 5000, "Seed is '777"),
        ("Steps: 3, CFG scale: " + "x" * 10_000, "CFG scale is 'xxx"),
        ("Steps: 3, Size: 64", "Size is '64'"),
        ("Steps: 3, Size: 1x2x3", "Size is '1x2x3'"),
        ("Steps: 3, Clip skip: []", r"Clip skip is '\[\]'"),
        ("Steps: 3" + " " * 2**20, "more than 1048576"),
    ],
    ids=lambda v: v[:24],
)
def test_damaged_a1111_text_is_one_short_line(tmp_path, line, says):
    with pytest.raises(Error, match=says) as e:
        images.read_settings(with_text(tmp_path / "a.png", "parameters", "a house\n" + line))
    assert len(str(e.value).splitlines()) == 1
    assert len(str(e.value)) < 300 + len(str(tmp_path))
    assert e.value.fix


# ---- pictures to begin with


def test_a_picture_is_read_upright_opaque_and_in_colour(tmp_path):
    """EXIF orientation 6: the camera was turned, and the first row is the last column. Half of red on white is pink."""
    turned = picture().convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(images.read(tmp_path / "a.png")), np.rot90(np.asarray(turned), -1))
    clear = Image.new("RGBA", (4, 2), (255, 0, 0, 128))
    clear.putpixel((0, 0), (0, 0, 0, 0))
    out = np.asarray(images.read(clear))
    assert (out[0, 0].tolist(), out[1, 1].tolist()) == ([255, 255, 255], [255, 127, 127])
    for mode in ("1", "L", "LA", "P", "CMYK", "YCbCr"):
        assert images.read(picture().convert("L").convert(mode)).mode == "RGB"
    plain = np.asarray(images.read(str(images.save(picture(), tmp_path / "b.png", FULL, "m", "float32"))))
    assert np.array_equal(plain, np.asarray(picture()))


# EXIF's orientation -> how the upright rows lie to the stored ones (the standard's table)
TURNS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
def test_a_picture_is_turned_by_its_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = picture().convert("RGB")
    stored.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(images.read(tmp_path / "a.png")), TURNS[orientation](np.asarray(stored)))


def two(mode: str, first, second) -> Image.Image:
    """A picture of two pixels."""
    image = Image.new(mode, (2, 1), first)
    if mode == "P":
        image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), second)
    return image


WHITE, BLACK, RED, BROWN = [255] * 3, [0] * 3, [255, 0, 0], [10, 20, 30]
GREY16 = Image.fromarray(np.array([[7 * 257, 65535]], np.uint16))
FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (2, 1), "blue")]}
FIRST = Image.new("RGB", (2, 1), "red")
# file -> the picture that is saved, how it is saved, and its colours by the formats' definitions
KINDS = {
    "palette.png": (two("P", 0, 1), {}, [BROWN, [200, 100, 50]]),
    "clear.png": (two("P", 0, 1), {"transparency": 1}, [BROWN, WHITE]),
    "grey16.png": (GREY16, {}, [[7] * 3, WHITE]),
    "grey16.tiff": (GREY16, {}, [[7] * 3, WHITE]),
    "ink.tiff": (two("CMYK", (255, 0, 0, 0), (0, 0, 0, 255)), {}, [[0, 255, 255], BLACK]),
    "alpha.png": (two("LA", (0, 51), (255, 0)), {}, [[204] * 3, WHITE]),
    "alpha.webp": (two("RGBA", (255, 0, 0, 0), (255, 0, 0, 255)), {"lossless": True}, [WHITE, RED]),
    "frames.gif": (FIRST, FRAMES, [RED, RED]),
    "frames.png": (FIRST, FRAMES, [RED, RED]),
    "frames.tiff": (FIRST, FRAMES, [RED, RED]),
    "frames.webp": (FIRST, FRAMES | {"lossless": True}, [RED, RED]),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_picture_is_read_to_its_colours(tmp_path, name):
    image, options, colours = KINDS[name]
    image.save(tmp_path / name, **options)
    assert np.asarray(images.read(tmp_path / name)).tolist() == [colours]


def test_a_picture_fills_the_size_and_is_cropped_about_its_middle():
    """A white band in the middle third of black: at the band's shape only the band is left."""
    bands = np.zeros((30, 90, 3), np.uint8)
    bands[:, 30:60] = 255
    assert np.asarray(images.fit(Image.fromarray(bands), 30, 30)).min() == 255
    assert np.array_equal(np.asarray(images.fit(Image.fromarray(bands), 90, 30)), bands)  # of its size: untouched


def test_pixels_come_back_from_a_picture():
    assert np.array_equal(np.asarray(images.to_image(images.to_pixels(picture()))), np.asarray(picture()))


def test_a_fingerprint_is_what_is_seen_and_not_the_file(tmp_path):
    for name in ("a.png", "a.bmp"):
        picture().save(tmp_path / name)
    marks = {images.fingerprint(images.read(tmp_path / name)) for name in ("a.png", "a.bmp")}
    assert len(marks | {images.fingerprint(picture())}) == 1
    assert images.fingerprint(picture().resize((40, 72))) not in marks


def test_a_picture_of_more_pixels_than_pillow_opens_is_one_error(tmp_path, monkeypatch):
    path = images.save(picture(), tmp_path / "a.png", FULL, "m", "float32")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for read in (images.read, images.read_settings):
        with pytest.raises(Error, match="cannot be read as a picture: Image size"):
            read(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_of_too_many_pixels_is_refused_before_they_are_decoded(tmp_path):
    """A black one, which is a small file."""
    Image.new("1", (10_001, 10_000)).save(tmp_path / "a.png")
    for read in (images.read, images.read_settings, images.size):
        with pytest.raises(Error, match="it has 100 megapixels, and 100 are the most"):
            read(tmp_path / "a.png")


def test_a_jpeg_that_repeats_its_scans_is_refused(tmp_path, monkeypatch):
    """Each scan goes over all pixels: in a megabyte there is room for thousands."""
    whole = io.BytesIO()
    Image.new("L", (64, 64)).save(whole, "JPEG", progressive=True)
    data = whole.getvalue()
    scan = data[data.rindex(b"\xff\xc4") : -2]
    monkeypatch.setattr(images, "_MOST_WORK", 64 * 64 * 30)
    for n, refused in ((3, False), (40, True)):
        (tmp_path / "a.jpg").write_bytes(data[:-2] + n * scan + data[-2:])
        assert Image.open(tmp_path / "a.jpg").convert("L").getextrema() == (0, 0)  # Pillow reads it
        if refused:
            with pytest.raises(Error, match="in more scans than its pixels need"):
                images.read(tmp_path / "a.jpg")
        else:
            images.read(tmp_path / "a.jpg")


def test_a_jpeg_with_exif_in_many_parts_is_refused(tmp_path, monkeypatch):
    """Pillow joins them in a time that grows with their square: 2,000 parts, 130 MB, took more than a minute."""
    whole = io.BytesIO()
    Image.new("L", (8, 8)).save(whole, "JPEG")
    part = b"\xff\xe1" + (1002).to_bytes(2, "big") + b"Exif\0\0" + bytes(994)
    monkeypatch.setattr(images, "_LARGE", 10_000)
    for n, refused in ((64, False), (65, True)):
        data = whole.getvalue()[:2] + n * part + whole.getvalue()[2:]
        (tmp_path / "a.jpg").write_bytes(data)
        assert Image.open(tmp_path / "a.jpg").size == (8, 8)  # Pillow reads it
        for source in (tmp_path / "a.jpg", io.BytesIO(data)):
            if refused:
                with pytest.raises(Error, match="whose EXIF has more than 64 parts"):
                    images.read_metadata(source)
            else:
                images.read_metadata(source)
    monkeypatch.setattr(images, "_PIECE", 100)  # marks across two pieces count too
    assert images._marks(tmp_path / "a.jpg") == (65, 1)
    monkeypatch.setattr(images, "_LARGE", 10**6)  # a small file cannot take long
    images.read_metadata(tmp_path / "a.jpg")


def test_a_large_jpeg_is_looked_through_in_pieces(tmp_path):
    """Of a sparse file, which takes no room on a disk."""
    Image.new("L", (8, 8)).save(tmp_path / "a.jpg", progressive=True)
    for size in (10**8, 10**9 + 1):
        os.truncate(tmp_path / "a.jpg", size)
        tracemalloc.start()
        if size > 10**9:
            with pytest.raises(Error, match="a JPEG of more than 1 GB"):
                images.read(tmp_path / "a.jpg")
        else:
            assert images.read(tmp_path / "a.jpg").size == (8, 8)
        assert tracemalloc.get_traced_memory()[1] < 10**7
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("absent.png", "no picture at"),
        (".", "cannot be read"),
        ("text.png", "cannot be read"),
        ("cut.png", "cannot be read"),
        ("exif.webp", "cannot be read as a picture: unpack requires"),
        ("palette.png", r"cannot be read as a picture: it is damaged \(AssertionError\)"),
        ("deep.tiff", "more than 16 bits"),
        ("long.tiff", "more than 16 bits"),
        (np.zeros((8, 8, 3), np.uint8), "is ndarray"),
        (Image.new("RGB", (0, 5)), "no pixels: it is 0 x 5"),
    ],
)
def test_what_cannot_be_begun_with_is_one_error(tmp_path, monkeypatch, given, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_bytes(b"hello")
    whole = images.save(picture(), tmp_path / "whole.png", FULL, "m", "float32").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) * 2 // 3])
    Image.new("RGB", (8, 8)).save(tmp_path / "exif.webp", exif=b"Exif\0\0II*\0")
    chunks = [(b"IHDR", b"\0\0\0\x08" * 2 + b"\2\3\0\0\0"), (b"IDAT", zlib.compress(bytes(24)))]  # without its colours
    data = b"".join(struct.pack(">I", len(b)) + t + b + struct.pack(">I", zlib.crc32(t + b)) for t, b in chunks)
    (tmp_path / "palette.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    Image.new("F", (8, 8), 0.5).save(tmp_path / "deep.tiff")
    Image.new("I", (8, 8), 257).save(tmp_path / "long.tiff")
    with pytest.raises(Error, match=says) as e:
        images.read(given)
    assert len(str(e.value).splitlines()) == 1
    assert e.value.fix


# ---- start pictures


@pytest.mark.parametrize("orientation", [*range(10), "up"])
def test_the_size_of_a_picture_is_that_of_its_pixels_read(tmp_path, orientation):
    held = (2, 4, b"up\0\0") if orientation == "up" else (3, 1, struct.pack("<I", orientation))  # text, or a number
    exif = b"Exif\0\0II*\0" + struct.pack("<IHHHI4sI", 8, 1, 0x0112, *held, 0)
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert images.size(tmp_path / "a.jpg") == images.read(tmp_path / "a.jpg").size


def test_a_format_that_starts_a_program_is_not_opened(tmp_path, monkeypatch):
    """An EPS, whatever its name: Pillow would have Ghostscript draw it."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: started.append(True))
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    for look in (images.read, images.size, images.read_settings):
        with pytest.raises(Error, match="cannot be read as a picture"):
            look(tmp_path / "a.png")
    assert not started


def test_a_start_picture_is_decoded_once(tmp_path, monkeypatch):
    """By load, resolve and the run together."""
    Image.linear_gradient("L").save(tmp_path / "a.png")
    decoded = []
    real = PngImagePlugin.PngImageFile.load_prepare
    spy = lambda self: decoded.append(self.filename) or real(self)  # noqa: E731
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", spy)
    asked = Request("a red house", image=tmp_path / "a.png", strength=0.1, steps=10, width=64, height=64)
    pipe = mlxdiff.load("storybook", request=asked)
    pipe(asked)
    assert len(decoded) == 1


def test_a_tall_picture_is_read_in_strips_as_at_once(tmp_path):
    """Against Pillow on the whole picture; fingerprints must stay as they were, for replays."""
    g = np.random.default_rng(0)
    clear = Image.fromarray(g.integers(0, 256, (600, 9, 4), np.uint8))
    clear.save(tmp_path / "clear.png")
    palette = clear.convert("RGB").quantize(16)
    palette.save(tmp_path / "palette.png", transparency=3)
    deep = g.integers(0, 2**16, (600, 9), np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for name in ("clear.png", "palette.png"):
        whole = Image.open(tmp_path / name).convert("RGBA")
        for ground in ("white", "black"):
            want = Image.alpha_composite(Image.new("RGBA", whole.size, ground), whole).convert("RGB")
            found = images.read(tmp_path / name, ground=ground)
            assert found.tobytes() == want.tobytes()
            assert images.fingerprint(found) == sha256(repr(want.size).encode() + want.tobytes()).hexdigest()[:16]
    assert np.array_equal(np.asarray(images.read(tmp_path / "deep.png"))[..., 0], np.round(deep / 257))
    turned = Image.Exif()
    turned[0x112] = 6
    clear.convert("RGB").save(tmp_path / "turned.jpg", exif=turned)
    assert images.read(tmp_path / "turned.jpg").size == (600, 9)
    given = Image.open(tmp_path / "turned.jpg")
    assert (images.read(given).size, given.size) == ((600, 9), (9, 600))  # a caller's picture stays as it is


def test_libtiff_says_nothing_by_itself(tmp_path, capfd):
    """Without `_quiet_libtiff` it writes "tempfile.tif: Using code not yet in table." for this file."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    noise.save(tmp_path / "a.tif", compression="tiff_lzw")
    damaged = bytearray((tmp_path / "a.tif").read_bytes())
    damaged[40:400] = bytes(255 - b for b in damaged[40:400])
    (tmp_path / "a.tif").write_bytes(damaged)
    with pytest.raises(Error, match="cannot be read"):
        images.read(tmp_path / "a.tif")
    assert capfd.readouterr().err == ""
