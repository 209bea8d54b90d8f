"""Control pictures on the built-in model, and what is refused. That ControlNets mean what they mean elsewhere is
parity/test_controlnet.py's."""

import json
import re
import sys
from dataclasses import fields, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image
from safetensors.numpy import load_file

import mlxdiff
from mlxdiff import Guide, advice, builtin, catalogue, detect, generate, images, memory
from mlxdiff.errors import Error
from mlxdiff.families import ADAPTERS, FAMILIES
from mlxdiff.guides import DETECTORS
from mlxdiff.models import controlnet, unet
from mlxdiff.recipe import Recipe
from mlxdiff.request import Request
from mlxdiff.store import hub
from tests.checkpoints import full, manifest, sparse

SAME = {"seed": 1, "steps": 4, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def pipe():
    return mlxdiff.load("storybook", dtype="float32")


def config(net: unet.Config, **changed) -> controlnet.Config:
    shared = {f.name: getattr(net, f.name) for f in fields(unet.HalfConfig)}
    return controlnet.Config(**{**shared, "hint_channels": 3, "hint": (8, 8, 8, 8), "pooled": False, **changed})


def write(folder: Path, pipe, seed: int = 0, **changed) -> Path:
    """A random ControlNet for a model's U-Net, as diffusers would save it."""
    made = config(pipe.description.net, **changed)
    g, arrays = np.random.default_rng(seed), {}
    for name, value in tree_flatten(controlnet.ControlNet(made).parameters()):
        array = g.normal(scale=0.5 / np.sqrt(max(1, value[0].size)), size=value.shape).astype(np.float32)
        array = array + 1 if "norm" in name and name.endswith("weight") else array
        arrays[name] = array.transpose(0, 3, 1, 2) if array.ndim == 4 else array
    settings = {
        "_class_name": "ControlNetModel",
        "attention_head_dim": made.heads[0],
        "block_out_channels": made.channels,
        "conditioning_embedding_out_channels": made.hint,
        "cross_attention_dim": made.context,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in made.depth],
        "in_channels": made.in_channels,
        "layers_per_block": made.layers[0],
        "norm_num_groups": made.groups,
    }
    full(folder / "diffusion_pytorch_model.safetensors", arrays)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def net(pipe, tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("net"), pipe)


@pytest.fixture(scope="module")
def edges(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "edges.png"
    Image.effect_noise((64, 64), 120).save(path)
    return path


def pixels(result) -> np.ndarray:
    return np.asarray(result.image).astype(int)


# ---- drawing


def test_a_picture_keeps_its_controls_and_draws_again(pipe, net, edges, tmp_path):
    bare = pipe("a red house", **SAME)
    result = pipe("a red house", controls=[(net, edges, 0.8, 0, 0.5)], **SAME)
    assert abs(pixels(result) - pixels(bare)).mean() > 1
    (guide,) = result.request.controls
    assert (guide.image, guide.model, guide.scale, guide.interval) == (edges, net, 0.8, (0, 0.5))
    assert None not in (guide.hash, guide.model_hash)
    (file,) = result.save(tmp_path / "a.png")
    again = pipe(images.read_settings(file)[0])
    assert (pixels(again) == pixels(result)).all()
    assert (pixels(pipe("a red house", **SAME)) == pixels(bare)).all()
    Image.new("L", (64, 64)).save(tmp_path / "edges.png")
    other = replace(again.request, controls=(replace(guide, image=tmp_path / "edges.png"),))
    with pytest.raises(Error, match=r"The picture of control .* is not the one that these settings name"):
        pipe(other)
    other = replace(again.request, controls=(replace(guide, model=write(tmp_path / "net", pipe, 1)),))
    with pytest.raises(Error, match=r"The network of control .* is not the one that these settings name"):
        pipe(other)
    assert pipe(other, controls=[Guide(edges, tmp_path / "net")]).request.controls[0].model_hash != guide.model_hash


def test_the_command_line_draws_with_a_control_and_says_so(net, edges, tmp_path, capsys):
    size = ["--steps", "4", "-s", "1", "-W", "64", "-H", "64", "--dtype", "float32"]
    control = ["--control", str(net), str(edges), "0.8", "0", "0.5", "--guess"]
    assert generate.main(["a red house", *size, *control, "-o", str(tmp_path / "a.png")]) == 0
    assert f"control {net} {edges}: scale 0.8, in steps 1 to 2 of 4" in capsys.readouterr().err
    request, _ = images.read_settings(tmp_path / "a.png")
    assert request.guess
    assert request.controls[0].interval == (0, 0.5)
    assert generate.main(["--from-image", str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png")]) == 0
    assert (np.asarray(Image.open(tmp_path / "b.png")) == np.asarray(Image.open(tmp_path / "a.png"))).all()


def test_networks_are_opened_once_and_closed_when_not_needed(pipe, net, edges, tmp_path):
    other = write(tmp_path, pipe, 2)

    def loads(*controls) -> int:
        return sum(e.stage == "load" for e in pipe.stream("a house", controls=controls, **SAME)) // 2

    pipe.networks.release("unet")
    pipe.attached.release()
    assert loads((net, edges), (other, edges), (net, edges, 0.5)) == 3  # the U-Net and two ControlNets
    assert loads((net, edges)) == 0
    assert loads((other, edges)) == 1  # it was closed


def test_a_quantized_model_quantizes_its_controls(net, edges):
    small = mlxdiff.load("storybook", bits=8, dtype="float32")
    bare, drawn = (small("a red house", controls=controls, **SAME) for controls in ([], [(net, edges)]))
    network = small.attached.network(drawn.request.controls[0])
    kinds = {name: v.dtype for name, v in tree_flatten(network.parameters())}
    assert kinds["down_blocks.1.attentions.0.proj_in.weight"] == mx.uint32
    assert kinds["controlnet_mid_block.weight"] == mx.float32
    assert abs(pixels(drawn) - pixels(bare)).mean() > 1


# ---- what is refused, in one line and before any work

BAD = {
    "no such network": (
        {"controls": [("cany", "E")]},
        "There is no control network, file or folder 'cany'. storybook has edges, sketch; or",
    ),
    "no such picture": ({"controls": [("NET", "none.png")]}, "There is no picture at none.png."),
    "no network": ({"controls": ["E"]}, "itself reads no control picture. Name the network that reads it: `controls="),
    "a kind that is not told apart": ({"controls": [("NET:depth", "E")]}, "one kind of picture; 'depth' was given"),
    "another family's": ({"controls": [("SDXL", "E")]}, "a ControlNet that reads text of width 2048, not 128: it does"),
    "a model": ({"controls": [("storybook", "E")]}, "is a model, not a network that reads a control picture. Give a C"),
    "a LoRA": ({"controls": [("LORA", "E")]}, "is a LoRA, which is no model by itself."),
    "cut short": ({"controls": [("CUT", "E")]}, "is cut short"),
    "a tensor too few": ({"controls": [("FEW", "E")]}, "1 parameter is missing (such as controlnet.controlnet_mid_"),
    "a tensor too many": ({"controls": [("MANY", "E")]}, "1 of its tensors has no place (such as 'more'"),
    "NaN": ({"controls": [("NAN", "E")]}, "has numbers that are NaN or infinite"),
    "no step": ({"controls": [("NET", "E", 1, 0.3, 0.4)]}, "The control interval 0.3 to 0.4 holds none of 4 steps."),
    "no guidance": ({"controls": [("NET", "E")], "guess": True, "guidance": 1.0}, "guess leaves the negative prompt's"),
    "a reference": ({"references": ["E"]}, "has no network that reads it"),
}


@pytest.fixture(scope="module")
def files(pipe, net, edges, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bad")
    made = {"NET": net, "E": edges, "storybook": "storybook", "cany": "cany", "none.png": "none.png"}
    made["SDXL"] = sparse(root / "xl.safetensors", manifest("sdxl_controlnet_canny")["tensors"])
    made["LORA"] = sparse(root / "lora.safetensors", manifest("lora_kohya_sd15")["tensors"])
    weights = load_file(net / "diffusion_pytorch_model.safetensors")
    few = {n: w for n, w in weights.items() if n != "controlnet_mid_block.bias"}
    nan = weights | {"controlnet_mid_block.bias": weights["controlnet_mid_block.bias"] * np.nan}
    for name, arrays in {"FEW": few, "MANY": weights | {"more": np.zeros(1)}, "NAN": nan}.items():
        full(root / name / "diffusion_pytorch_model.safetensors", {k: np.float32(v) for k, v in arrays.items()})
        (root / name / "config.json").write_text((net / "config.json").read_text())
        made[name] = root / name
    made["NET:depth"] = f"{net}:depth"
    made["CUT"] = root / "cut.safetensors"
    made["CUT"].write_bytes((net / "diffusion_pytorch_model.safetensors").read_bytes()[:-4])
    return made


@pytest.mark.parametrize("case", BAD)
def test_bad_controls_are_named(pipe, files, case):
    settings, says = BAD[case]
    for kind in ("controls", "references"):
        if kind in settings:
            named = [[files.get(w, w) for w in ([g] if isinstance(g, str) else g)] for g in settings[kind]]
            settings = settings | {kind: named}
    with pytest.raises(Error, match=re.escape(says)) as e:
        pipe("a red house", **(SAME | settings))
    assert len(str(e.value).splitlines()) == 1


def test_a_wrong_control_is_refused_before_a_model_is_fetched(files, monkeypatch):
    monkeypatch.setattr(hub, "listing", lambda *_: pytest.fail("asked the hub"))
    request = Request("a house", controls=[(files["SDXL"], files["E"])])
    with pytest.raises(Error, match="reads text of width 2048, not 768"):
        mlxdiff.load("sd15", request=request)


def test_the_masked_start_image_draws_again_and_is_refused_without_a_mask(pipe, net, edges, tmp_path):
    hole = Image.new("L", (64, 64))
    hole.paste(255, (10, 10, 40, 40))
    hole.save(tmp_path / "hole.png")
    masked = {"image": edges, "mask": tmp_path / "hole.png"}
    result = pipe("a red house", controls=[(str(net), "masked")], **masked, **SAME)
    assert (result.request.strength, result.request.controls[0].image) == (1.0, "masked")
    assert abs(pixels(result) - pixels(pipe("a red house", **masked, strength=1.0, **SAME))).mean() > 1
    (file,) = result.save(tmp_path / "a.png")
    assert (pixels(pipe(images.read_settings(file)[0])) == pixels(result)).all()
    cropped = pipe("a red house", controls=[(str(net), "masked")], mask_crop=4, **masked, **SAME)
    assert abs(pixels(cropped) - pixels(result)).mean() > 1
    for settings, says in (
        ({"controls": [(net, "masked")]}, "needs a mask, and none was given"),
        ({"controls": ["masked"]}, "for a control that inpaints"),
        ({"controls": [Guide("masked", net, detect="grey")]}, "for a control that inpaints"),
        ({"references": [(net, "masked")]}, "for a control that inpaints"),
    ):
        with pytest.raises(Error, match=says):
            pipe.resolve("x", **(SAME | settings))
    with pytest.raises(Error, match="was not made to inpaint"):
        mlxdiff.load("sd15", request=Request("x", controls=[("canny", "masked")], **masked))
    with pytest.raises(Error, match=r"was made to inpaint.*controls=\[\('inpaint', 'masked'\)\]"):
        mlxdiff.load("sd15", request=Request("x", controls=[("inpaint", edges)], **masked))


@pytest.mark.parametrize(
    ("model", "settings", "says"),
    [
        (
            "storybook",
            {"controls": [("canny", "E")]},
            r"which was made for sd15, .*: it does not fit storybook\. storybook has edges, sketch; or give the file",
        ),
        ("sd15", {"controls": [("edges", "E")]}, "a ControlNet of the package, which was made for storybook: it does"),
        (
            "storybook",
            {"references": [("ip-adapter", "E")]},
            "h94/IP-Adapter, which was made for sd15, ",
        ),
        (
            "sd3-medium",
            {"controls": [("canny-large", "E")]},
            "which was made for sd3.5-large, sd3.5-large-turbo",
        ),
        (
            "sdxl",
            {"controls": [("cany", "E")]},
            "There is no control network, file or folder 'cany'. Did you",
        ),
        ("sdxl", {"references": [("ip-adaptr", "E")]}, "There is no reference network, file or folder 'ip-adaptr'"),
        ("sd15", {"controls": [("inpaint",)]}, r"is a network, and the picture .* is missing.*\('inpaint', 'masked'\)"),
        ("sd15", {"references": [("ip-adapter",)]}, r"is a network, and the picture .*\('ip-adapter', PICTURE\)"),
        ("sd15", {"upscaler": "realesrgan-x4"}, "There is no upscaler, file or folder 'realesrgan-x4'. Did you mean"),
    ],
)
def test_a_name_that_does_not_fit_is_refused_before_any_download(edges, monkeypatch, model, settings, says):
    for name in ("listing", "download"):
        monkeypatch.setattr(hub, name, lambda *_: pytest.fail("asked the hub"))
    given = settings | {
        k: [tuple(edges if word == "E" else word for word in guide) for guide in v]
        for k, v in settings.items()
        if isinstance(v, list)
    }
    with pytest.raises(Error, match=says):
        mlxdiff.load(model, request=Request("a house", **given))


# ---- named networks, and memory


def test_named_networks_are_of_families_and_the_command_lists_them(capsys):
    assert {family for family, _ in ADAPTERS} <= {*FAMILIES}
    assert all(0 < row.size < 20 and row.licence for row in ADAPTERS.values())
    published = [row for row in ADAPTERS.values() if row.repo is not None]
    assert all(row.repo.count("/") == 1 for row in published)
    assert all(row in published or (builtin.FOLDER.parent / row.file).exists() for row in ADAPTERS.values())
    assert catalogue.main(["--adapters"]) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"{name} .*{row.repo or 'in the package'}", out) for (_, name), row in ADAPTERS.items())
    assert catalogue.main(["sdxl", "--adapters"]) == 0
    out = capsys.readouterr().out
    assert "sdxl-1.0" in out
    assert "sd15_canny" not in out
    assert catalogue.main(["storybook", "--adapters"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.endswith("in the package")]
    assert {row.split()[3] for row in rows} == {"edges", "sketch", "quick", "paper", "teal"}
    assert catalogue.main(["sd15", "--adapters"]) == 0
    out = capsys.readouterr().out
    assert "sd15_canny" in out
    assert "in the package" not in out


def test_the_files_of_a_network_are_chosen():
    names = ("README.md", "config.json", "diffusion_pytorch_model.bin", "images/a.png")
    names += ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
    sizes = dict.fromkeys(names, 1)
    half = ["diffusion_pytorch_model.fp16.safetensors", "config.json"]  # the config last: where it is, all is
    assert hub.select_network("o/r", sizes, half=True) == half
    assert hub.select_network("o/r", sizes, half=False) == ["diffusion_pytorch_model.safetensors", "config.json"]
    with pytest.raises(Error, match="only as a pickle"):
        hub.select_network("o/r", {"config.json": 1, "diffusion_pytorch_model.bin": 1}, half=True)
    with pytest.raises(Error, match=r"Choose one.* o/r/a\.safetensors"):
        hub.select_network("o/r", {"a.safetensors": 1}, half=True)


def test_memory_counts_a_network_that_guides():
    """Its weights, by their manifest, and little more."""
    request = Request("a house", controls=[("canny", "edges.png")])
    work = advice.named("sd15", Recipe("float16", None), request=request)
    full_size = config(work.model.net, hint=(16, 32, 96, 256))
    bare, known, named = (memory.peak(replace(work, beside=b), gpu=True) for b in ((), (full_size,), (720_000_000,)))
    weights = 2 * sum(int(np.prod(s)) for s in manifest("sd15_controlnet_canny")["tensors"].values())
    assert weights <= known - bare < 1.05 * weights
    assert named - bare == 720_000_000
    quarter = replace(work, model=replace(work.model, recipe=Recipe("float16", 4)))
    smaller = [memory.peak(replace(quarter, beside=b), gpu=True) for b in ((), (full_size,))]
    assert smaller[1] - smaller[0] < 0.8 * weights  # of a U-Net's convolutions nothing is quantized


def test_a_named_network_is_counted_before_it_is_fetched(edges, monkeypatch):
    monkeypatch.setattr(hub, "listing", lambda *_: pytest.fail("asked the hub"))
    need = memory.peak(advice.named("sd15", Recipe("float16", None)), gpu=False)
    machine = advice.Machine(int((need + 0.4e9) / memory.SURE), int(need), False)
    monkeypatch.setattr(advice, "this_machine", lambda: machine)
    request = Request("a house", width=512, height=512, controls=[("canny", edges)])
    with pytest.raises(Error, match="takes about"):
        mlxdiff.load("sd15", dtype="float16", request=request)


# ---- control pictures that are made first


def louder(folder: Path, pipe) -> Path:
    """A ControlNet that listens to its picture."""
    file = write(folder, pipe) / "diffusion_pytorch_model.safetensors"
    hint = "controlnet_cond_embedding"
    full(file, {k: x * (3 if hint in k and k.endswith("weight") else 1) for k, x in load_file(file).items()})
    return folder


def test_a_control_picture_is_made_of_a_photograph_and_draws_again(pipe, edges, tmp_path, capsys):
    """As when `mlxdiff detect` has made it. The fingerprint is the photograph's."""
    net = louder(tmp_path / "loud", pipe)
    detect.run("invert", edges).save(tmp_path / "made.png")
    expected = pipe("a red house", controls=[(net, tmp_path / "made.png", 0.8)], **SAME)
    made = pipe("a red house", controls=[Guide(edges, net, 0.8, detect="invert")], **SAME)
    plain = pipe("a red house", controls=[(net, edges, 0.8)], **SAME)
    assert (pixels(made) == pixels(expected)).all()
    assert abs(pixels(made) - pixels(plain)).mean() > 0.1
    assert made.request.controls[0].hash == plain.request.controls[0].hash
    both = [Guide(edges, net, 0.4, detect="invert"), Guide(edges, net, 0.4)]  # one photograph, two pictures
    apart = [Guide(tmp_path / "made.png", net, 0.4), Guide(edges, net, 0.4)]
    assert (pixels(pipe("x", controls=both, **SAME)) == pixels(pipe("x", controls=apart, **SAME))).all()
    size = ["--steps", "4", "-s", "1", "-W", "64", "-H", "64", "--dtype", "float32"]
    typed = ["a red house", *size, "--detect", "invert", "--control", str(net), str(edges), "0.8"]
    assert generate.main([*typed, "-o", str(tmp_path / "a.png")]) == 0
    assert generate.main(["--from-image", str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png")]) == 0
    for name in ("a.png", "b.png"):
        assert (np.asarray(Image.open(tmp_path / name)) == np.asarray(expected.image)).all()
    capsys.readouterr()
    assert generate.main([*typed, "--detect", "canny"]) == 1
    assert "--detect makes the picture of a --control, and none follows" in capsys.readouterr().err


def test_what_cannot_be_made_is_refused_before_the_work(pipe, net, edges, monkeypatch):
    assert tuple(detect.KINDS) == DETECTORS
    with pytest.raises(Error, match="detect 'cany' makes no picture for a control"):
        pipe.resolve("x", controls=[Guide(edges, net, detect="cany")])
    with pytest.raises(Error, match="detect 'grey' makes no picture for a reference"):
        pipe.resolve("x", references=[Guide(edges, net, detect="grey")])
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setattr(mlxdiff.store, "_from_hub", lambda *_: pytest.fail("it asked the hub"))
    with pytest.raises(Error, match="OpenCV, which is not here"):
        mlxdiff.load("sd15", force=True, request=Request("x", controls=[Guide(edges, "canny", detect="canny")]))


def test_two_passes_keep_their_controls(pipe, net, edges):
    """Which are scaled to each pass; the second begins with the first one's picture."""
    guided = {"controls": [Guide(edges, net, 0.8)], "seed": 1, "steps": 4}
    first = pipe("a red house", width=64, height=64, **guided).image.resize((96, 96), Image.Resampling.LANCZOS)
    second = pipe("a red house", image=first, strength=0.6, width=96, height=96, **guided)
    both = pipe("a red house", hires=(1.5, 0.6), width=64, height=64, **guided)
    assert (pixels(both) == pixels(second)).all()
    assert abs(pixels(both) - pixels(pipe("a red house", hires=(1.5, 0.6), **SAME))).mean() > 1
