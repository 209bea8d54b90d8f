"""Enlarging: the command, the setting of a picture, and its two passes. References: the same commands run one by one,
pixel for pixel; PIL; and what the files carry. The network itself is in tests/parity/test_esrgan.py."""

import json
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import mlxdiff
from mlxdiff import advice, convert, images, memory, upscale
from mlxdiff.convert.inspect import main as inspect
from mlxdiff.errors import Error
from mlxdiff.generate import main as generate
from mlxdiff.memory import Workload, peaks
from mlxdiff.models import ways
from mlxdiff.models.esrgan import Config
from mlxdiff.request import Request
from mlxdiff.upscale import NAMES, Upscaler
from mlxdiff.upscale.__main__ import main

from .checkpoints import esrgan, full, raw, sparse

SMALL = {"width": 64, "height": 48, "steps": 3}
TYPED = ["a red house", "-s", "7", "-W", "64", "-H", "48", "--steps", "3"]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with an upscaler that doubles."""
    monkeypatch.chdir(tmp_path)
    full(tmp_path / "x2.safetensors", esrgan(1, 8, 4, 1, 1))
    return tmp_path


def enlarged(picture: str, *args: str) -> int:
    return main([picture, "-m", "x2.safetensors", "--dtype", "float32", *args])


def pixels(file) -> np.ndarray:
    return np.asarray(Image.open(file))


def photo(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(3)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], len(mode)), np.uint8), mode)


# ---- the command


def test_a_picture_keeps_its_settings_and_says_what_enlarged_it(here, capsys):
    assert generate([*TYPED, "-o", "a.png"]) == 0
    assert enlarged("a.png", "--json") == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["path"], said["size"]) == ("a-x2.png", [128, 96])
    before, after = Image.open("a.png").info, Image.open("a-x2.png").info
    texts = ("parameters", "mlxdiff", "mlxdiff-model", "mlxdiff-recipe")
    assert all(before[name] == after[name] for name in texts)
    hashed = Upscaler("x2.safetensors").hash
    assert json.loads(after["mlxdiff-upscale"]) == {
        "upscaler": "x2.safetensors", "hash": hashed, "scale": 2, "from": [64, 48]
    }  # fmt: skip
    assert np.array_equal(pixels("a-x2.png"), np.asarray(Upscaler("x2.safetensors")(Image.open("a.png"))))
    assert generate(["--from-image", "a-x2.png", "-o", "b.png"]) == 0  # the picture before it was enlarged
    assert np.array_equal(pixels("a.png"), pixels("b.png"))


def test_other_programs_settings_are_kept_too(here):
    text = "a fox\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 3, Size: 64x64"
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    info.add_itxt("workflow", '{"nodes": "ü"}')
    photo((6, 5)).save("a.png", pnginfo=info)
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode("utf-16-be")
    photo((6, 5)).save("b.jpg", exif=exif)
    assert enlarged("a.png") == enlarged("b.jpg") == enlarged("a.png", "-o", "c.webp") == 0
    assert Image.open("a-x2.png").info["workflow"] == '{"nodes": "ü"}'
    for made in ("a-x2.png", "b-x2.png", "c.webp"):
        assert images.read_settings(here / made)[0].seed == 3


@pytest.mark.parametrize(
    ("mode", "made"), [("RGB", "RGB"), ("L", "RGB"), ("RGBA", "RGBA"), ("LA", "RGBA"), ("P", "RGBA")]
)
def test_what_is_transparent_stays_so(here, mode, made):
    image = photo((9, 7), "RGBA")
    if mode == "P":
        image = photo((9, 7)).quantize(8)
        image.info["transparency"] = 0
    else:
        image = image.convert(mode)
    image.save("a.png")
    assert enlarged("a.png") == 0
    out = Image.open("a-x2.png")
    assert (out.mode, out.size) == (made, (18, 14))
    if made == "RGBA":
        alpha = image.convert("RGBA").getchannel("A").resize((18, 14), Image.Resampling.LANCZOS)
        assert np.array_equal(np.asarray(out.getchannel("A")), np.asarray(alpha))
    seen = Upscaler("x2.safetensors")(image.convert("RGBA").convert("RGB"))
    assert np.array_equal(np.asarray(out.convert("RGB")), np.asarray(seen))


def test_the_meaning_of_its_colours_is_kept(here):
    photo((4, 4)).save("a.png", icc_profile=b"display p3")
    photo((4, 4)).convert("CMYK").save("b.tiff", icc_profile=b"of a printer")
    assert enlarged("a.png") == enlarged("b.tiff") == 0
    assert Image.open("a-x2.png").info["icc_profile"] == b"display p3"
    assert "icc_profile" not in Image.open("b-x2.png").info


def test_names(here, capsys):
    """Beside the picture, in a folder, or as said; never over another."""
    os.makedirs("photos")
    for name in ("photos/a.jpg", "b.png"):
        photo((5, 4)).save(name)
    assert enlarged("photos/a.jpg") == enlarged("photos/a.jpg") == 0
    assert enlarged("b.png", "-o", "big.png") == enlarged("b.png", "-o", "big.jpg") == 0
    assert main(["b.png", "photos/a.jpg", "-m", "x2.safetensors", "-o", "out/"]) == 0
    found = sorted(p.as_posix() for p in Path().rglob("*.*") if "x2" in p.name or p.stem == "big")
    wanted = ["big.jpg", "big.png", "out/a-x2.png", "out/b-x2.png", "photos/a-x2-1.png", "photos/a-x2.png"]
    assert found == [*wanted, "x2.safetensors"]


def test_an_interrupt_leaves_nothing_half_written(here, monkeypatch, capsys):
    photo((100, 80)).save("a.png")
    monkeypatch.setattr(upscale, "tile_edge", lambda: 96)
    run, done = Upscaler._run, []

    def interrupted(self, x):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(x.shape)
        return run(self, x)

    monkeypatch.setattr(Upscaler, "_run", interrupted)
    before = sorted(os.listdir())
    assert enlarged("a.png") == 130
    assert "stopped" in capsys.readouterr().err
    assert (len(done), sorted(os.listdir())) == (2, before)


def layers(**shapes) -> dict:
    return {name.replace("__", "."): shape for name, shape in shapes.items()}


# what the upscaler's file holds -> what the error says
FILES = {
    "SwinIR": (layers(layers__0__residual_group__blocks__0__norm1__weight=[8]), "a SwinIR upscaler, which is not"),
    "HAT": (layers(layers__0__residual_group__overlap_attn__qkv__weight=[8]), "a HAT upscaler"),
    "DAT": (layers(layers__0__blocks__1__attn__attns__0__pos__pos_proj__weight=[8, 2]), "a DAT upscaler"),
    "compact": (layers(body__0__weight=[8, 3, 3, 3], body__1__weight=[8]), "a compact Real-ESRGAN (SRVGG) upscaler"),
    "compact in its training file": (layers(params__body__0__weight=[8, 3, 3, 3]), "a compact Real-ESRGAN"),
    "SPAN": (layers(block_1__c1_r__sk__weight=[8, 8, 1, 1]), "a SPAN upscaler"),
    "ESRGAN+": (layers(model__1__sub__0__RDB1__conv1x1__weight=[4, 8, 1, 1]), "an ESRGAN+ upscaler"),
    "something else": (layers(stranger=[2]), "its first tensor is 'stranger'. Use an upscaler of the ESRGAN family"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_other_files_are_named_for_what_they_are(here, capsys, kind):
    shapes, says = FILES[kind]
    sparse(here / "up.safetensors", shapes)
    photo((4, 4)).save("a.png")
    assert main(["a.png", "-m", "up.safetensors"]) == 1
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def put(name: str, change) -> dict:
    held = esrgan(1, 8, 4, 2, 2)
    made = change(held.pop(name))
    return held if made is None else held | {name: made}


def poke(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flat[0] = np.nan
    return x


# the tensors of a damaged upscaler -> what the error says
DAMAGED = {
    "a tensor missing": (lambda: put("conv_hr.bias", lambda _: None), "missing (such as upscaler.conv_hr.bias)"),
    "the one that tells the size": (lambda: put("conv_first.weight", lambda _: None), "as upscaler.conv_first.weight"),
    "a block cut": (lambda: put("body.0.rdb2.conv3.weight", lambda _: None), "as upscaler.body.0.rdb2.conv3.weight"),
    "a block that is not the next": (
        lambda: {k.replace("body.1", "body.3"): x for k, x in esrgan(1, 8, 4, 2, 2).items()}, "no such parameter"
    ),
    "a tensor too many": (lambda: esrgan(1, 8, 4, 2, 2) | {"stranger": np.ones(2, np.float32)}, "'stranger'"),
    "misshaped": (lambda: put("body.0.rdb2.conv3.weight", lambda x: x[:, 1:]), "does not fit body.0.rdb2.conv3"),
    "a convolution of another size": (lambda: put("conv_hr.weight", lambda x: x[..., :1, :1]), "does not fit conv_hr"),
    "integers": (lambda: put("conv_hr.bias", lambda x: x.astype(np.int64)), "I64 where"),
    "NaN": (lambda: put("conv_hr.bias", poke), "'conv_hr.bias' in "),
    "twice": (lambda: (h := esrgan(1, 8, 4, 2, 2)) | {"HRconv.bias": h["conv_hr.bias"]}, "filled already"),
    "grey": (lambda: put("conv_first.weight", lambda x: x[:, :1]), "reads pictures of 1 channels and makes 3"),
    "an alpha channel": (lambda: put("conv_last.weight", lambda x: np.concatenate([x, x[:1]])), "3 channels and makes"),
    "too large": (lambda: esrgan(1, 8, 4, 1, 4) | {"conv_up5.weight": np.ones((8, 8, 3, 3), np.float32)}, "conv_up5"),
    "smaller than the picture": (lambda: esrgan(4, 8, 4, 1, 1), "doubles 1 times"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_upscalers_are_one_line(here, capsys, kind):
    make, says = DAMAGED[kind]
    full(here / "up.safetensors", make())
    photo((4, 4)).save("a.png")
    assert main(["a.png", "-m", "up.safetensors"]) == 1
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def gone(here: Path) -> None:
    os.remove("x2.safetensors")


def cut(here: Path) -> None:
    (here / "x2.safetensors").write_bytes((here / "x2.safetensors").read_bytes()[:-9])


# what was typed, and what happened before -> what the error says
BAD = {
    "no such picture": (["b.png"], None, "no picture at b.png"),
    "one of several is no picture": (["a.png", "x2.safetensors"], None, "x2.safetensors cannot be read as a picture"),
    "several into one file": (["a.png", "a.png", "-o", "b.png"], None, "b.png is one file, and there are 2 pictures"),
    "no kind of picture": (["a.png", "-o", "b.bmp"], None, "b.bmp is not a kind of picture"),
    "transparent as JPEG": (["alpha.png", "-o", "b.jpg"], None, "b.jpg cannot be transparent"),
    "too long for WebP": (["long.png", "-o", "b.webp"], None, "would have 20000 x 2 pixels; WEBP has at most 16383"),
    "a name of none": (["a.png", "-m", "realesrgan-x4"], None, "Did you mean realesrgan-x4plus?"),
    "a pickle": (["a.png", "-m", "x4.pth"], lambda h: (h / "x4.pth").write_bytes(b"PK\3\4"), "x4.pth is a pickle"),
    "a file that is gone": ([], gone, "There is no upscaler, file or folder 'x2.safetensors'"),
    "a file that is cut": ([], cut, "x2.safetensors is cut short"),
    "a named one, offline": (["a.png", "-m", "realesrgan-x4plus", "--offline"], None, "real_esrgan is not on this"),
    "a model": (["a.png", "-m", str(mlxdiff.builtin.FOLDER)], None, "is not an upscaler but Stable Diffusion 1.x."),
    "too large to hold": (["a.png"], lambda h: None, "machine has 0.0"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_before_work(here, capsys, kind, monkeypatch):
    typed, before, says = BAD[kind]
    photo((6, 5)).save("a.png")
    photo((6, 5), "RGBA").save("alpha.png")
    photo((10000, 1)).save("long.png")
    if before is not None:
        before(here)
    if kind == "too large to hold":
        monkeypatch.setattr(upscale, "this_machine", lambda: advice.Machine(900, 900, False))
    typed = typed or ["a.png"]
    monkeypatch.setattr(Upscaler, "_run", lambda *_: pytest.fail("it began to work"))
    there = sorted(os.listdir())
    assert main(typed if "-m" in typed else [*typed, "-m", "x2.safetensors"]) == 1
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert sorted(os.listdir()) == there


def test_an_upscaler_is_no_model(here, capsys):
    assert generate(["a house", "-m", "x2.safetensors"]) == 1
    said = capsys.readouterr().err
    assert "is an ESRGAN upscaler, which is no model by itself. Enlarge pictures with it: --upscale FILE" in said
    assert generate(["a house", "--taesd", "x2.safetensors", "--preview-dir", "p"]) == 1
    assert "is not a TAESD but an ESRGAN upscaler" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "config", "tensors"),
    [
        ("realesrgan-x4plus", Config(1, 64, 32, 23, 2), 702),
        ("realesrgan-x4plus-anime", Config(1, 64, 32, 6, 2), 192),
        ("realesrgan-x2plus", Config(2, 64, 32, 23, 2), 702),
    ],
)
def test_the_published_sizes_are_read_off_the_shapes(here, capsys, name, config, tensors):
    """As their authors wrote them down; 702 tensors and 67 MB are what the hub lists."""
    held = esrgan(*(getattr(config, f) for f in ("fold", "width", "growth", "rrdb", "doublings")))
    sparse(here / "up.safetensors", {name: x.shape for name, x in held.items()}, dtype="F32")
    checkpoint = convert.open(here / "up.safetensors")
    part = checkpoint.components["upscaler"]
    assert (part.config, len(part.weights), checkpoint.unmapped) == (config, tensors, {})
    assert round(part.parameters * 4 / 1e9, 3) == NAMES[name].download
    assert inspect([str(here / "up.safetensors")]) == 0
    assert "an ESRGAN upscaler" in capsys.readouterr().out


def test_the_named_ones_are_known_files(capsys):
    assert all(row.file.endswith(".safetensors") and row.file.count("/") == 2 for row in NAMES.values())
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(name in out and row.licence in out for name, row in NAMES.items())


# ---- as a setting of a picture


def test_a_drawn_picture_is_enlarged_and_replays(here, capsys):
    pipe = mlxdiff.load("storybook")
    plain, big = pipe("a red house", seed=7, **SMALL), pipe("a red house", seed=7, upscaler="x2.safetensors", **SMALL)
    assert np.array_equal(np.asarray(big.image), np.asarray(Upscaler("x2.safetensors")(plain.image)))
    events = list(pipe.stream(big.request))
    assert [e.stage for e in events[-3:]] == ["decode", "upscale", "upscale"]
    assert [e.image is not None for e in events] == [False] * (len(events) - 1) + [True]
    assert generate([*TYPED, "--upscale", "x2.safetensors", "-o", "a.png"]) == 0
    assert np.array_equal(pixels("a.png"), np.asarray(big.image))
    request, _ = images.read_settings(here / "a.png")
    assert (request.upscaler, request.upscaler_hash) == ("x2.safetensors", Upscaler("x2.safetensors").hash)
    assert "Postprocess upscaler: x2.safetensors" in Image.open("a.png").info["parameters"]
    assert generate(["--from-image", "a.png", "-o", "b.png"]) == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    full(here / "x2.safetensors", esrgan(1, 8, 4, 1, 1, seed=1))
    with pytest.raises(Error, match="is not the one that these settings name"):  # though it is open
        pipe.resolve(big.request)
    assert generate(["--from-image", "a.png", "-o", "c.png"]) == 1
    assert "The upscaler x2.safetensors is not the one that these settings name" in capsys.readouterr().err
    assert generate(["--from-image", "a.png", "--upscale", "x2.safetensors", "-o", "c.png"]) == 0  # a flag wins
    assert not np.array_equal(pixels("a.png"), pixels("c.png"))


def by_hand(here: Path, typed: list[str], strength: str, scale: float = 2, upscaler: str | None = None) -> np.ndarray:
    """The first picture, enlarged, and then as a start picture."""
    w, h = (round(edge * scale / 8) * 8 for edge in (64, 48))
    assert generate([*TYPED, *typed, "-o", "one.png"]) == 0
    grown = Image.open("one.png")
    if upscaler is not None:
        assert main(["one.png", "-m", upscaler, "-o", "grown.png"]) == 0
        grown = Image.open("grown.png").convert("RGB")
    grown.resize((w, h), Image.Resampling.LANCZOS).save("begin.png")
    again = [*TYPED, *typed, "-W", str(w), "-H", str(h), "-i", "begin.png", "--strength", strength]
    assert generate([*again, "-o", "two.png"]) == 0
    return pixels("two.png")


CASES = {
    "plain": ([], "0.6", 2),
    "of a noisy sampler": (["--sampler", "euler_ancestral"], "0.7", 1.5),
    "in little memory": (["--low-memory"], "0.5", 2),
    "with guidance 1 and another noise": (["-g", "1", "--noise", "nv"], "1", 1.2),
}


@pytest.mark.parametrize("case", CASES)
def test_two_passes_are_the_two_commands(here, case):
    typed, strength, scale = CASES[case]
    wanted = by_hand(here, typed, strength, scale)
    assert generate([*TYPED, *typed, "--hires", str(scale), strength, "-o", "hires.png"]) == 0
    assert np.array_equal(pixels("hires.png"), wanted)
    assert generate(["--from-image", "hires.png", *(t for t in typed if t == "--low-memory"), "-o", "again.png"]) == 0
    assert np.array_equal(pixels("again.png"), wanted)


def test_the_upscaler_enlarges_between_the_passes(here):
    wanted = by_hand(here, [], "0.6", 2, "x2.safetensors")
    assert generate([*TYPED, "--hires", "2", "--upscale", "x2.safetensors", "-o", "hires.png"]) == 0
    assert np.array_equal(pixels("hires.png"), wanted)
    assert generate([*TYPED, "--hires", "2", "-o", "plain.png"]) == 0
    assert not np.array_equal(pixels("plain.png"), wanted)
    text = Image.open("hires.png").info["parameters"]
    assert "Size: 64x48, Denoising strength: 0.6, " in text
    assert "Hires upscale: 2, Hires upscaler: x2.safetensors" in text
    assert "Hires upscaler: Lanczos" in Image.open("plain.png").info["parameters"]


def test_from_a_start_picture(here):
    """The first pass is what it is without hires, whatever it begins with."""
    photo((64, 48)).save("start.png")
    pipe, how = mlxdiff.load("storybook"), {"seed": 7, "steps": 4}
    one = pipe("a red house", image="start.png", strength=0.8, **how).image.resize((128, 96), Image.Resampling.LANCZOS)
    two = pipe("a red house", image=one, strength=0.5, width=128, height=96, **how).image
    both = pipe("a red house", image="start.png", strength=0.8, hires=(2, 0.5), **how)
    assert np.array_equal(np.asarray(both.image), np.asarray(two))
    assert both.request.hires == (2, 0.5)


def test_several_pictures_each_get_their_second_pass(here):
    pipe, events = mlxdiff.load("storybook"), []
    request = pipe.resolve("a red house", seed=7, count=2, hires=1.5, **SMALL)
    assert request.hires == (1.5, 0.6)
    for event in pipe.run(request):
        events.append(event)
    drawn = [e.image for e in events if e.image is not None]
    for i, single in enumerate(request.singles()):
        alone = pipe(single).image
        assert np.abs(np.asarray(alone, int) - np.asarray(drawn[i], int)).max() <= 1  # a batch: up to rounding
    assert [(e.stage, e.hires) for e in events if e.image is not None] == [("decode", 0), ("decode", 1)]
    steps = [(e.hires, e.step, e.steps) for e in events if e.stage == "denoise" and e.step]
    assert steps == [(None, s, 3) for s in (1, 2, 3)] + [(0, 1, 1), (1, 1, 1)]
    assert [e.x0.shape[0] for e in events if e.x0 is not None] == [2, 2, 2, 1, 1]


def test_previews_of_both_passes(here):
    assert generate([*TYPED, "-b", "2", "--hires", "1.5", "-o", "out/", "--preview-dir", "p"]) == 0
    assert sorted(p.name for p in Path("p/a-red-house-7").iterdir()) == [
        "001.png",
        "002.png",
        "003.png",
        "hires-001.png",
    ]
    assert len(list(Path("p/a-red-house-8").iterdir())) == 4


BAD_HIRES = [
    (
        {"hires": 2, "image": Image.new("RGB", (64, 64)), "outpaint": (64, 0, 0, 0)},
        "hires draws the whole picture on, a mask a part of it",
    ),
    ({"hires": 0.5}, "Hires must be a number from 1 to 8; 0.5 was given"),
    ({"hires": float("nan")}, "Hires must be a number from 1 to 8; nan was given"),
    ({"hires": (2, 1.5)}, "The strength of hires must be a number from 0 to 1; 1.5 was given"),
    ({"hires": ()}, r"hires \(\) is not one or two numbers. Give how many times"),
    ({"hires": (2, 0.5, 1)}, "is not one or two numbers"),
    ({"hires": "2"}, "hires '2' is not one or two numbers"),
    ({"hires": (2, 0.1), "steps": 5}, "Strength 0.1 of 5 steps leaves no step to take"),
    ({"hires": 8, "width": 4096}, "hires 8 makes it 32768 x 1024; an edge has at most 16384. Use a smaller scale"),
    ({"upscaler": 4}, "The upscaler is int, not a name or a path"),
    ({"upscaler": "no-such"}, "There is no upscaler, file or folder 'no-such'"),
    ({"upscaler_hash": "1f"}, "These settings need an upscaler"),
]


@pytest.mark.parametrize(("settings", "says"), BAD_HIRES)
def test_bad_settings_are_one_line_before_work(settings, says):
    pipe = mlxdiff.load("storybook")
    with pytest.raises(Error, match=says) as e:
        pipe.resolve("a house", **{"height": 128} | settings)
    assert len(str(e.value).splitlines()) == 1


def test_a_bad_upscaler_is_refused_before_a_download(here, monkeypatch):
    from mlxdiff import store

    monkeypatch.setattr(store, "_from_hub", lambda *_: pytest.fail("it asked the hub"))
    raw(here / "bad.safetensors", b"{}", size=3)
    with pytest.raises(Error, match="has 3 bytes after its last tensor"):
        mlxdiff.load("sdxl", force=True, request=Request("x", upscaler="bad.safetensors"))


def test_a_model_that_edits_has_no_second_pass():
    from .fakes import editor

    with pytest.raises(Error, match="edits: it begins with no picture, as hires would do"):
        editor().resolve(Request("x", hires=2))


def test_memory_is_told_at_the_larger_size():
    """Before a download, from the published shapes."""
    plain = advice.named("sdxl", mlxdiff.pipeline.recipe(None, "bfloat16"))
    model = plain.model
    twice = Workload(model, model.resolve(Request("x", hires=2)))
    large = Workload(model, model.resolve(Request("x", width=2048, height=2048)))
    assert peaks(twice, True).denoise >= peaks(large, True).denoise
    assert peaks(twice, True).decode == peaks(large, True).decode > 3 * peaks(plain, True).decode / 2
    many = Workload(model, model.resolve(Request("x", hires=2, count=8)))
    assert peaks(many, True).decode == peaks(twice, True).decode  # the second pass draws them one by one
    small = advice.Machine(int(memory.peak(plain, True) * 1.1), int(memory.peak(plain, True) * 1.1), True)
    advice.check(plain, small)
    with pytest.raises(Error, match="sdxl at 1024x1024, enlarged 2 times, takes about"):
        advice.check(twice, small)


@pytest.mark.skipif(mx.default_device() == mx.Device(mx.gpu), reason="activations were measured on a CPU")
def test_a_tile_takes_what_is_estimated(here, monkeypatch):
    """Of a network as wide as the published ones. Depth does not count: its blocks work before the picture is large."""
    monkeypatch.setattr(memory, "upscale_tile", lambda gpu: 128)
    full(here / "up.safetensors", esrgan(1, 64, 32, 1, 2))
    upscaler = Upscaler("up.safetensors", dtype="float32")
    mx.clear_cache()
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    with ways.exportable():  # what a CPU computes in ways of its own takes less
        upscaler(photo((32, 32)))
    assert 0.9 < memory.upscaling(gpu=False) / (mx.get_peak_memory() - held) < memory.SURE  # 0.99 was seen


def test_an_upscaler_is_in_the_estimate():
    plain = advice.named("storybook", mlxdiff.pipeline.recipe(None, "float32"))
    big = plain.but(upscaler="realesrgan-x4plus")
    assert peaks(big, False).decode > memory.upscaling(False) > 2 * peaks(plain, False).decode
