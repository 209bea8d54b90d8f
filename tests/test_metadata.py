"""What picture files say about themselves. References: the standards' byte layouts, written here by hand as other
programs write them; ElementTree as a second reader of XMP; and Pillow for the pixels."""

import ast
import io
import json
import random
import re
import struct
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import mlxdiff
from mlxdiff import images, metadata
from mlxdiff.errors import Error
from mlxdiff.generate import main as generate
from mlxdiff.guides import Guide

from .test_images import FULL as plain

ROOT = Path(__file__).parent.parent
FULL = replace(
    plain,
    prompt="a (red:1.3) house & <b>, steps: many\nsecond line \x01 \ufffe \U0001f3e0 ]]>",
    loras=("a.safetensors:0.8",),
    lora_hashes=("2e",),
    references=(Guide("b.png", "ip-adapter", 0.5),),
)
A1111 = "a house\nNegative prompt: blurry\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 5, Size: 64x48"
ENDINGS = ("png", "jpg", "webp")


def picture() -> Image.Image:
    """Smooth, as pictures are: what JPEG is made for."""
    y, x = np.mgrid[:40, :72]
    return Image.fromarray(np.stack([x * 3, y * 6, 255 - x * 2], -1).astype(np.uint8))


def second_reader(file: bytes) -> dict[str, str]:
    """The properties in a file's XMP packet, found by its first and last element."""
    (packet,) = re.findall(rb"<x:xmpmeta.*?</x:xmpmeta>", file, re.DOTALL)
    (said,) = ElementTree.fromstring(packet).iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    return {child.tag: child.text for child in said}


def source_of(file: bytes) -> str:
    said = second_reader(file)["{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"]
    assert said.startswith("http://cv.iptc.org/newscodes/digitalsourcetype/")
    return said.rpartition("/")[2]


# ---- written and read back


@pytest.mark.parametrize("ending", ENDINGS)
def test_settings_and_pixels_come_back_from_every_format(tmp_path, ending):
    """The settings exactly. PNG: the pixels too. JPEG and WebP at quality 95: within 2/255 in the mean, of which WebP's
    YUV, which has 220 levels, takes half."""
    path = images.save(picture(), tmp_path / f"a.{ending}", FULL, "model, with <comma>", "float16-4bit")
    assert images.read_settings(path) == (FULL, "model, with <comma>")
    assert images.read_settings(io.BytesIO(path.read_bytes()))[0] == FULL  # as the studio takes it
    held = images.read_metadata(path)
    assert (held.source, held.tool, held.problems) == ("trainedAlgorithmicMedia", f"mlxdiff {mlxdiff.__version__}", ())
    assert held.texts["mlxdiff-recipe"] == "float16-4bit"
    assert "Steps: 20, Sampler: DPM++ 2M" in held.texts["parameters"]
    apart = np.abs(np.asarray(images.read(path), float) - np.asarray(picture()))
    assert apart.max() == 0 if ending == "png" else apart.mean() < 2


def test_quality_is_heeded_and_a_webp_of_100_loses_nothing(tmp_path):
    sizes = {}
    for ending in ("jpg", "webp"):
        for quality in (20, 95, 100):
            file = images.save(picture(), tmp_path / f"{quality}.{ending}", FULL, "m", "float32", quality)
            sizes[ending, quality] = file.stat().st_size
            assert images.read_settings(file)[0] == FULL
        assert sizes[ending, 20] < sizes[ending, 95]
    assert np.array_equal(np.asarray(images.read(tmp_path / "100.webp")), np.asarray(picture()))
    assert not np.array_equal(np.asarray(images.read(tmp_path / "95.webp")), np.asarray(picture()))


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_other_programs_keep_of_a_copy_is_enough(tmp_path, ending):
    """A program that copies the XMP packet alone, or A1111's text alone, as most do."""
    held = images.read_metadata(images.save(picture(), tmp_path / f"a.{ending}", FULL, "m", "float32"))
    with Image.open(tmp_path / f"a.{ending}") as image:
        packet, exif = image.info["xmp"], image.info.get("exif")
    picture().save(tmp_path / "xmp.webp", xmp=packet)
    assert images.read_settings(tmp_path / "xmp.webp") == (FULL, "m")
    if exif is not None:
        picture().save(tmp_path / "exif.webp", exif=exif)
        request, model = images.read_settings(tmp_path / "exif.webp")
        assert (request.seed, request.sampler, request.noise, model) == (7, "dpmpp_2m", "nv", "m")
        assert images.read_metadata(tmp_path / "exif.webp").texts["parameters"] == held.texts["parameters"]


def test_settings_that_a_jpeg_cannot_hold_are_refused(tmp_path):
    """Its markers have 65,533 bytes. PNG and WebP have room."""
    long = replace(FULL, prompt="ä house " * 9000)
    with pytest.raises(Error, match=r"are \d+ bytes, and a JPEG holds at most 65533\. End the name in \.png"):
        images.save(picture(), tmp_path / "a.jpg", long, "m", "float32")
    with pytest.raises(Error, match="a JPEG holds at most"):
        images.check_settings("JPEG", long, "m", "float32")
    assert not list(tmp_path.iterdir())
    for ending in ("png", "webp"):
        assert images.read_settings(images.save(picture(), tmp_path / f"a.{ending}", long, "m", "r"))[0] == long


# ---- what other programs write


def exif(comment: object = None, order: str = "<", **tags: str) -> bytes:
    """EXIF by the standard's layout: a TIFF header, a directory with texts and a pointer, and a second directory with
    the comment, of type 7 (bytes), or 2 (text)."""
    names = {"make": 0x010F, "model": 0x0110, "description": 0x010E, "software": 0x0131}
    entries = [(names[k], 2, v.encode() + b"\0") for k, v in tags.items()]
    if comment is not None:
        kind = 2 if isinstance(comment, str) else 7
        data = comment.encode() + b"\0" if isinstance(comment, str) else comment
        entries.append((0x8769, 4, [(0x9286, kind, data)]))
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8) + _directory(entries, 8, order)


def _directory(entries: list, at: int, order: str) -> bytes:
    table, extra = b"", b""
    begin = at + 2 + 12 * len(entries) + 4
    for tag, kind, data in sorted(entries, key=lambda e: e[0]):
        count = 1 if isinstance(data, list) else len(data)
        where = begin + len(extra)
        data = _directory(data, where, order) if isinstance(data, list) else data
        inline = kind != 4 and len(data) <= 4
        table += struct.pack(f"{order}HHI", tag, kind, count)
        table += data.ljust(4, b"\0") if inline else struct.pack(f"{order}I", where)
        extra += b"" if inline else data + b"\0" * (len(data) % 2)
    return struct.pack(f"{order}H", len(entries)) + table + struct.pack(f"{order}I", 0) + extra


def put(path: Path, kind: str, exif: bytes, **options) -> None:
    """Write a picture with EXIF, which a JPEG has under a name."""
    picture().save(path, kind, exif=b"Exif\0\0" * (kind == "JPEG") + exif, **options)


COMMENTS = {
    "A1111, big-endian, without a mark": b"UNICODE\0" + A1111.encode("utf-16-be"),
    "little-endian": b"UNICODE\0" + A1111.encode("utf-16-le"),
    "with a byte order mark": b"UNICODE\0" + b"\xff\xfe" + A1111.encode("utf-16-le"),
    "UTF-8 that calls itself Unicode": b"UNICODE\0" + A1111.encode(),
    "ASCII": b"ASCII\0\0\0" + A1111.encode(),
    "no code": bytes(8) + A1111.encode(),
    "Fooocus, no code at all": A1111.encode(),
    "padded": b"ASCII\0\0\0" + A1111.encode() + b"\0" * 9,
    "as text": A1111,
}


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
@pytest.mark.parametrize("comment", COMMENTS.values(), ids=COMMENTS)
def test_a_comment_of_another_program_is_read(tmp_path, comment, kind, order):
    put(tmp_path / "a", kind, exif(comment, order))
    request, _ = images.read_settings(tmp_path / "a")
    found = (request.prompt, request.negative, request.steps, request.seed, request.sampler, request.schedule)
    assert found == ("a house", "blurry", 20, 5, "dpmpp_2m", "karras")


@pytest.mark.parametrize(
    "comment", [b"ASCII\0\0\0" + b" " * 60, b"ASCII\0\0\0on holiday", b"UNICODE\0", b"", b"AS", None]
)
def test_what_a_camera_writes_is_no_prompt(tmp_path, comment):
    put(tmp_path / "a.jpg", "JPEG", exif(comment, make="Leica"))
    with pytest.raises(images.NoSettings, match=r"carries no settings\."):
        images.read_settings(tmp_path / "a.jpg")


@pytest.mark.parametrize(
    "tags", [{"make": "workflow", "model": "prompt"}, {"make": "Prompt", "description": "Workflow"}]
)
def test_graphs_of_comfyui_are_found_in_exif(tmp_path, tags):
    """ComfyUI's own WebP, and extensions that write JPEG."""
    graph = json.dumps({"3": {"class_type": "KSampler"}})
    picture().save(tmp_path / "a.webp", exif=exif(**{tag: f"{name}:{graph}" for tag, name in tags.items()}))
    assert images.read_metadata(tmp_path / "a.webp").texts == {"prompt": graph, "workflow": graph}


def test_forms_of_xmp():
    """As attributes, as elements, as a resource, and in a list; of nested structures only the outermost counts."""
    iptc = 'xmlns:i="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
    word = metadata.SOURCES + metadata.DRAWN
    key = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/ DigitalSourceType"
    nested = '<i:ArtworkOrObject><rdf:Description i:DigitalSourceType="x">y</rdf:Description></i:ArtworkOrObject>'
    for attributes, inside in (
        (f'i:DigitalSourceType="{word}"', nested),
        ("", f"{nested}<i:DigitalSourceType>\n {word} </i:DigitalSourceType>"),
        ("", f'<i:DigitalSourceType rdf:resource="{word}"/>{nested}'),
        ("", f"<i:DigitalSourceType><rdf:Bag><rdf:li>{word}</rdf:li></rdf:Bag></i:DigitalSourceType>"),
    ):
        assert metadata.properties(packet(inside, f"{iptc} {attributes}"))[key] == word


def packet(inside: str = "", attributes: str = "", before: str = "") -> bytes:
    rdf = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
    return (
        f'{before}<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{rdf}"><rdf:Description rdf:about="" '
        f'xmlns:m="urn:x-mlxdiff:1.0/" {attributes}>{inside}</rdf:Description></rdf:RDF></x:xmpmeta>'
    ).encode()


# ---- hostile

LAUGHS = "<!DOCTYPE x [<!ENTITY a 'ha'>" + "".join(
    f"<!ENTITY {b} '{f'&{a};' * 10}'>" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
PACKETS = {
    "entities": (packet("<m:request>&i;</m:request>", before=LAUGHS + "]>"), "declares a document type"),
    "an outer file": (
        packet("<m:request>&f;</m:request>", before='<!DOCTYPE x [<!ENTITY f SYSTEM "file:///etc/passwd">]>'),
        "declares a document type",
    ),
    "an outer document type": (
        packet(before='<!DOCTYPE x SYSTEM "http://localhost/x.dtd">'),
        "declares a document type",
    ),
    "an undeclared entity": (packet("<m:request>&nbsp;</m:request>"), "undefined entity"),
    "huge": (packet(f"<m:request>{'x' * 2**20}</m:request>"), "more than 1048576"),
    "deep": (packet("<m:a>" * 100_000), "nested too deeply"),
    "truncated": (packet("<m:request>{</m:request>")[:-20], "unclosed token|no element found"),
    "not UTF-8": (packet("<m:request>\xff</m:request>").replace(b"\xc3\xbf", b"\xff"), "can't decode byte"),
    "UTF-16": (packet().decode().encode("utf-16"), "can't decode byte"),
    "UTF-16 that does not say so": (packet().decode().encode("utf-16-le"), "it is not UTF-8"),
    "a false declaration": (
        packet("<m:request>\xff</m:request>", before='<?xml version="1.0" encoding="latin-1"?>').replace(
            b"\xc3\xbf", b"\xff"
        ),
        "can't decode byte",
    ),
    "no XML": (b"hello", "syntax error|not well-formed"),
}


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
@pytest.mark.parametrize("name", PACKETS)
def test_a_hostile_xmp_packet_is_one_clause_and_no_settings(tmp_path, name, kind):
    """What else the file says is still read."""
    data, says = PACKETS[name]
    if kind == "JPEG" and len(data) > 65000:
        data = data[:65000]
        says += "|unclosed|no element found"
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add(b"iTXt", b"XML:com.adobe.xmp" + bytes(5) + data)
        put(tmp_path / "a", kind, exif(COMMENTS["ASCII"]), pnginfo=info)
    else:
        put(tmp_path / "a", kind, exif(COMMENTS["ASCII"]), xmp=data)
    held = images.read_metadata(tmp_path / "a")
    assert held.source is None
    (problem,) = held.problems
    assert re.search(f"its XMP cannot be read: .*({says})", problem)
    assert images.read_settings(tmp_path / "a")[0].prompt == "a house"


def test_laughs_are_refused_before_they_grow():
    """The packet would hold 10**8 times "ha"."""
    data, _ = PACKETS["entities"]
    assert len(data) < 1000
    with pytest.raises(ValueError, match="declares a document type"):
        metadata.properties(data)


HOSTILE = {
    "an odd end of UTF-16": exif(b"UNICODE\0" + A1111.encode("utf-16-be")[:-1]),
    "half a pair": exif(b"UNICODE\0" + A1111.encode("utf-16-be") + b"\xd8\x3d"),
    "not UTF-8": exif(b"ASCII\0\0\0" + A1111.encode() + b"\xff\xfe"),
    "no TIFF": b"hello",
    "a header alone": b"II*\0",
    "a directory beyond the end": b"II*\0" + struct.pack("<I", 2**31),
    "a comment beyond the end": exif(COMMENTS["ASCII"])[:60],
    "a directory within itself": b"II*\0" + struct.pack("<IHHHIII", 8, 1, 0x8769, 4, 1, 8, 8),
    "a count without bound": b"II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0131, 2, 2**32 - 1, 26, 0),
    "more directories than there are": b"II*\0" + struct.pack("<IH", 8, 65535),
}


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_exif_carries_no_settings(tmp_path, name, kind):
    put(tmp_path / "a", kind, HOSTILE[name])
    with pytest.raises(images.NoSettings) as e:
        images.read_settings(tmp_path / "a")
    assert len(str(e.value).splitlines()) == 1
    assert len(str(e.value)) < 300 + len(str(tmp_path))


def test_overlong_settings_are_refused(tmp_path):
    picture().save(tmp_path / "a.webp", exif=exif(b"ASCII\0\0\0Steps: 3" + b" x" * 2**20))
    with pytest.raises(Error, match="characters of settings, more than 1048576"):
        images.read_settings(tmp_path / "a.webp")
    (chunk,) = [exif(b"ASCII\0\0\0Steps: 3" + b" x" * 2**23)]
    picture().save(tmp_path / "b.webp", exif=chunk)
    assert [p[:20] for p in images.read_metadata(tmp_path / "b.webp").problems] == ["its EXIF cannot be r"]


def test_damaged_files_end_in_an_error_or_in_settings(tmp_path):
    """300 files of each format with some bytes changed or cut: anything but an Error fails. 2 s."""
    rng, lines = random.Random(7), []
    for ending in ENDINGS:
        good = images.save(picture(), tmp_path / f"a.{ending}", FULL, "m", "float32").read_bytes()
        for _ in range(300):
            data = bytearray(good)
            for _ in range(rng.choice((1, 2, 8))):
                data[rng.randrange(len(data))] = rng.randrange(256)
            data = data[: rng.choice((len(data), rng.randrange(len(data))))]
            try:
                images.read_settings(io.BytesIO(bytes(data)))
            except Error as e:
                lines.append(str(e).splitlines())
    assert {len(line) for line in lines} == {1}


# ---- every way to write a picture


def upscaled(folder: Path, start: Path, ending: str = "png") -> bytes:
    from mlxdiff.upscale.__main__ import main as enlarge

    from .checkpoints import esrgan, full

    if not (folder / "x2.safetensors").exists():
        full(folder / "x2.safetensors", esrgan(1, 8, 4, 1, 1))
    out = folder / f"{start.name}-big.{ending}"
    assert enlarge([str(start), "-m", str(folder / "x2.safetensors"), "-o", str(out)]) == 0
    return out.read_bytes()


def foreign(folder: Path) -> Path:
    """A photograph, which says nothing."""
    picture().save(folder / "photo.jpg")
    return folder / "photo.jpg"


def shell(folder: Path, *typed: str) -> list[bytes]:
    """The pictures that the command writes."""
    (folder / "out").mkdir()
    plain = ["a red house", "-s", "3", "--steps", "1", "-W", "64", "-H", "64", "-o", str(folder / "out"), *typed]
    assert generate(plain) == 0
    return [file.read_bytes() for file in sorted((folder / "out").iterdir()) if file.is_file()]


def piped(folder: Path, *typed: str) -> list[bytes]:
    import subprocess

    command = [
        sys.executable,
        "-m",
        "mlxdiff.generate",
        "a red house",
        "--steps",
        "1",
        "-W",
        "64",
        "-H",
        "64",
        "-o",
        "-",
    ]
    return [subprocess.run([*command, *typed], cwd=ROOT, capture_output=True, check=True).stdout]


def result(folder: Path, pipe, **settings) -> mlxdiff.result.Result:
    return pipe("a red house", steps=1, width=64, height=64, **settings)


def saved(paths) -> list[bytes]:
    return [path.read_bytes() for path in ([paths] if isinstance(paths, Path) else paths)]


def gallery(folder: Path, ending: str, **settings) -> bytes:
    from mlxdiff.widgets.gallery import Picture

    drawn = Picture.write(picture(), folder, replace(FULL, **settings), "m", "float32", 1.0)
    return drawn.path.read_bytes() if ending == "" else drawn.save(folder / f"copy.{ending}").read_bytes()


def download(folder: Path) -> bytes:
    from mlxdiff.widgets.gallery import Picture

    name, data = Picture.write(picture(), folder, FULL, "m", "float32", 1.0).copy("webp")
    assert (Path(name).suffix, Image.open(io.BytesIO(data)).format) == (".webp", "WEBP")
    assert images.read_settings(io.BytesIO(data)) == (FULL, "m")
    return data


def grid(folder: Path, notebook: bool) -> bytes:
    from mlxdiff.widgets.gallery import Grid, Picture

    made = Grid(FULL, {"seed": [1, 2]})
    for cell, request in made.requests().items():
        made.put(cell, Picture.write(picture(), folder, request, "m", "float32", 1.0), picture())
    return made._repr_png_() if notebook else made.finish(folder).path.read_bytes()


def detected(folder: Path) -> bytes:
    from mlxdiff.detect.__main__ import main as detect

    assert detect([str(foreign(folder)), "grey", "-o", str(folder / "grey.png")]) == 0
    return (folder / "grey.png").read_bytes()


def sheet(folder: Path) -> bytes:
    from mlxdiff.train.tune import sheet as write

    write([foreign(folder)], 1, folder / "samples.png")
    return (folder / "samples.png").read_bytes()


def scenes(folder: Path) -> bytes:
    from mlxdiff.train.__main__ import main as train

    assert train(["scenes", "-o", str(folder / "scenes.png"), "--size", "32"]) == 0
    return (folder / "scenes.png").read_bytes()


DRAWN, EDITED = "trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"
ENHANCED, COMPUTED = "algorithmicallyEnhanced", "algorithmicMedia"
MASKED = {"image": Image.new("RGB", (64, 64)), "mask": Image.new("L", (64, 64), 255), "strength": 1}
# What writes pictures -> IPTC's word that must be in each file
WAYS = {
    "the command": (lambda f, _: shell(f), DRAWN),
    "several seeds": (lambda f, _: shell(f, "-b", "2"), DRAWN),
    "the command, JPEG": (lambda f, _: shell(f, "--format", "jpg"), DRAWN),
    "the command, WebP": (lambda f, _: shell(f, "--format", "webp", "--quality", "100"), DRAWN),
    "the command, from a picture": (lambda f, _: shell(f, "-i", str(foreign(f)), "--strength", "1"), EDITED),
    "previews": (lambda f, _: saved([*(shell(f, "--preview-dir", str(f / "p")) and (f / "p").rglob("*.png"))]), DRAWN),
    "standard output": (lambda f, _: piped(f), DRAWN),
    "standard output, JPEG": (lambda f, _: piped(f, "--format", "jpg"), DRAWN),
    "Python": (lambda f, pipe: saved(result(f, pipe).save(f / "a.png")), DRAWN),
    "Python, a batch of WebP": (lambda f, pipe: saved(result(f, pipe, count=2).save(f / "a.webp")), DRAWN),
    "Python, from a picture and a mask": (lambda f, pipe: saved(result(f, pipe, **MASKED).save(f / "a.jpg")), EDITED),
    "a notebook": (lambda f, pipe: [result(f, pipe)._repr_png_()], DRAWN),
    "a notebook, from a picture": (lambda f, pipe: [result(f, pipe, image=picture(), strength=1)._repr_png_()], EDITED),
    "an enlarged photograph": (lambda f, _: [upscaled(f, foreign(f))], ENHANCED),
    "an enlarged picture": (lambda f, pipe: [upscaled(f, result(f, pipe).save(f / "a.webp")[0], "jpg")], DRAWN),
    "an enlarged edit": (lambda f, pipe: [upscaled(f, result(f, pipe, **MASKED).save(f / "a.jpg")[0], "webp")], EDITED),
    "a control picture": (lambda f, _: [detected(f)], ENHANCED),
    "samples of a training": (lambda f, _: [sheet(f)], DRAWN),
    "a program's scenes": (lambda f, _: [scenes(f)], COMPUTED),
}
STUDIO = {
    "the studio": (lambda f: gallery(f, ""), DRAWN),
    "the studio, a copy": (lambda f: gallery(f, "jpg"), DRAWN),
    "the studio, a download": (lambda f: download(f), DRAWN),
    "the studio, from a picture": (lambda f: gallery(f, "", image="a.png", image_hash="1"), EDITED),
    "a comparison": (lambda f: grid(f, False), DRAWN),
    "a comparison in a notebook": (lambda f: grid(f, True), DRAWN),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_picture_says_how_it_was_made(tmp_path, pipe, way):
    write, source = WAYS[way]
    made = write(tmp_path, pipe)
    assert made
    assert {source_of(file) for file in made} == {source}


@pytest.mark.parametrize("way", STUDIO)
def test_every_picture_of_the_studio_says_how_it_was_made(tmp_path, way):
    pytest.importorskip("anywidget", reason="the studio needs ipywidgets and anywidget: pip install .[studio]")
    write, source = STUDIO[way]
    assert source_of(write(tmp_path)) == source


# Calls of `save` and `savefig`, by module: whatever they write. A new one needs a line here, and a way above if it
# writes pictures.
SAVES = {
    "mlxdiff.bench.random_model": 1,  # a tokenizer
    "mlxdiff.generate": 1,  # `images.save`: previews
    "mlxdiff.images": 1,  # Pillow's, in `encode`, which marks every picture
    "mlxdiff.output": 1,  # `images.save`
    "mlxdiff.provenance": 1,  # into memory, to be measured
    "mlxdiff.result": 1,  # `images.save`
    "mlxdiff.signing": 1,  # into memory, to try a key
    "mlxdiff.store": 1,  # a model
    "mlxdiff.train.fit": 1,  # `write_picture`: diagrams, and samples with their mark
    "mlxdiff.train.recipe": 1,  # a tokenizer
    "mlxdiff.train.tune": 1,  # `Result.save`
    "mlxdiff.widgets.explain.judging": 1,  # copies that lose their marks: the lesson is about them
    "mlxdiff.widgets.explain.lesson": 2,  # diagrams of the lessons
    "mlxdiff.widgets.gallery": 6,  # three of `images.save` and `save`; small pictures for the page; before
    "mlxdiff.widgets.painting": 1,  # masks, and what is painted on
    "mlxdiff.widgets.previews": 1,  # shown while a picture forms, and kept nowhere
    "mlxdiff.widgets.second_pictures": 1,  # the edges of a person's picture
}


def test_no_other_place_writes_pictures():
    from .test_imports import modules

    found: dict[str, int] = {}
    for name, path in modules().items():
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        if saves := [f for f in calls if isinstance(f, ast.Attribute) and f.attr in ("save", "savefig")]:
            found[name] = len(saves)
    assert found == SAVES


def test_a_format_that_the_name_does_not_have_is_refused(tmp_path, capsys):
    for typed, says in (
        (["-o", "a.png", "--format", "jpg"], "--format is jpg, and a.png is another format"),
        (["--quality", "80"], "--quality is of a JPEG or WebP"),
        (["--format", "webp", "--quality", "0"], "--quality must be a whole number from 1 to 100"),
        (["-o", "a.jpg", "-p", "house " * 20_000], "a JPEG holds at most"),
    ):
        words = [] if "-p" in typed else ["a house"]
        assert generate([*words, *typed]) == 1
        said = capsys.readouterr().err
        assert says in said
        assert said.count("\n") == 1


def test_a_text_behind_the_pixels_is_kept_when_enlarged(tmp_path):
    """PNG allows it. `zlib` makes the chunk's checksum."""
    images.save(picture(), tmp_path / "a.png", FULL, "m", "float32")
    data = (tmp_path / "a.png").read_bytes()
    body = b"tEXtComment\0behind"
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "a.png").write_bytes(data[:-12] + chunk + data[-12:])
    upscaled(tmp_path, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png-big.png").info["Comment"] == "behind"
    assert images.read_settings(tmp_path / "a.png-big.png")[0] == FULL
