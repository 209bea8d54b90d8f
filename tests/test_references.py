"""Reference pictures on the built-in model, and what is refused. That IP-Adapters and Redux mean what they mean
elsewhere is parity/test_ip_adapter.py's and parity/test_redux.py's."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image
from safetensors.numpy import load_file

import mlxdiff
from mlxdiff import Guide, advice, generate, images, memory, references
from mlxdiff.errors import Error
from mlxdiff.families import ADAPTERS
from mlxdiff.families.published import CLIP_VIT_BIGG, CLIP_VIT_H, SIGLIP
from mlxdiff.models import build, ip_adapter, redux, vision
from mlxdiff.recipe import Recipe
from mlxdiff.request import Request
from mlxdiff.store import hub
from mlxdiff.store import references as store_references
from tests.checkpoints import full, manifest, sparse

SAME = {"seed": 1, "steps": 4, "width": 64, "height": 64}
SEES = vision.Config(16, 8, 24, 2, 2, 40, "gelu", 12, True, 1e-5)


@pytest.fixture(scope="module")
def pipe():
    return mlxdiff.load("storybook", dtype="float32")


def adapter(net, kind: str = "plain", image: int = 12) -> ip_adapter.Config:
    same = {"kind": kind, "image": image, "context": net.context, "widths": net.reading}
    if kind == "plus":
        return ip_adapter.Config(**same, tokens=3, width=20, heads=1, layers=1, hidden=30)
    return ip_adapter.Config(**same, tokens=4, width=None, heads=None, layers=0, hidden=None)


def random(config: build.Config, seed: int) -> dict[str, np.ndarray]:
    g, arrays = np.random.default_rng(seed), {}
    for name, value in tree_flatten(build.build(config).parameters()):
        array = g.normal(scale=1.5 / np.sqrt(max(1, value[0].size)), size=value.shape).astype(np.float32)
        array = array + 1 if "norm" in name and name.endswith("weight") else array
        arrays[name] = array.transpose(0, 3, 1, 2) if array.ndim == 4 else array
    return arrays


def write_encoder(folder: Path, config: vision.Config, seed: int = 0) -> Path:
    """A random vision model as transformers saves it."""
    arrays = random(config, seed)
    whole = {n if n.startswith("visual") else f"vision_model.{n}": x for n, x in arrays.items()}
    full(folder / "model.safetensors", whole)
    settings = {
        "architectures": ["CLIPVisionModelWithProjection"],
        "hidden_act": config.act,
        "hidden_size": config.width,
        "image_size": config.size,
        "intermediate_size": config.hidden,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "patch_size": config.patch,
        "projection_dim": config.projection,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def published(config: ip_adapter.Config, seed: int = 0) -> dict[str, np.ndarray]:
    """A random IP-Adapter under its authors' names."""
    arrays = random(config, seed)
    return {re.sub(r"^layers\.(\d+)", lambda m: f"ip_adapter.{2 * int(m[1]) + 1}", n): x for n, x in arrays.items()}


@pytest.fixture(scope="module")
def file(pipe, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("adapter")
    write_encoder(root / "image_encoder", SEES)
    return full(root / "ip.safetensors", published(adapter(pipe.description.net)))


@pytest.fixture(scope="module")
def style(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "style.png"
    Image.effect_noise((50, 40), 120).convert("RGB").save(path)
    return path


def pixels(result) -> np.ndarray:
    return np.asarray(result.image).astype(int)


# ---- drawing


def test_a_picture_keeps_its_references_and_draws_again(pipe, file, style, tmp_path):
    bare = pipe("a red house", **SAME)
    result = pipe("a red house", references=[(file, style, 0.8)], **SAME)
    assert abs(pixels(result) - pixels(bare)).mean() > 1
    (guide,) = result.request.references
    assert (guide.image, guide.model, guide.scale) == (style, file, 0.8)
    assert None not in (guide.hash, guide.model_hash)
    (saved,) = result.save(tmp_path / "a.png")
    again = pipe(images.read_settings(saved)[0])
    assert (pixels(again) == pixels(result)).all()
    assert (pixels(pipe("a red house", **SAME)) == pixels(bare)).all()
    Image.new("L", (64, 64)).save(tmp_path / "style.png")
    other = replace(again.request, references=(replace(guide, image=tmp_path / "style.png"),))
    with pytest.raises(Error, match=r"The picture of reference .* is not the one that these settings name"):
        pipe(other)
    write_encoder(tmp_path / "image_encoder", SEES, 1)
    (tmp_path / "ip.safetensors").write_bytes(file.read_bytes())
    other = replace(again.request, references=(replace(guide, model=tmp_path / "ip.safetensors"),))
    with pytest.raises(Error, match=r"The network of reference .* is not the one that these settings name"):
        pipe(other)  # another vision model


def test_the_command_line_draws_with_a_reference_and_says_so(file, style, tmp_path, capsys):
    typed = ["--steps", "4", "-s", "1", "-W", "64", "-H", "64", "--dtype", "float32"]
    typed += ["--reference", str(file), str(style), "0.8", "--reference", str(file), str(style)]
    assert generate.main(["a red house", *typed, "-o", str(tmp_path / "a.png")]) == 0
    said = capsys.readouterr().err
    assert f"reference {file} {style}: scale 0.8" in said
    assert f"reference {file} {style}: scale 1" in said
    request, _ = images.read_settings(tmp_path / "a.png")
    assert [guide.scale for guide in request.references] == [0.8, 1]
    assert generate.main(["--from-image", str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png")]) == 0
    assert (np.asarray(Image.open(tmp_path / "b.png")) == np.asarray(Image.open(tmp_path / "a.png"))).all()


def test_what_a_picture_became_is_kept_for_the_next_seed(pipe, file, style):
    def encoded(*references, **changed) -> int:
        stages = [e.stage for e in pipe.stream("a house", references=references, **(SAME | changed))]
        return stages.count("encode")

    encoded()
    assert encoded((file, style)) == 2
    assert encoded((file, style, 0.5), seed=7) == 0
    assert encoded((file, style, 0.5), guidance=1.0) == 4  # other prompts too: there is no pass to pull from
    assert encoded((file, style), (file, Image.new("RGB", (9, 9)))) > 0
    assert not any(isinstance(v, vision.Vision) for v in vars(pipe.attached.references).values())


def test_a_batch_draws_what_single_pictures_do(pipe, file, style):
    settings = SAME | {"references": [(file, style, 0.8)]}
    both = pipe("a red house", count=2, **settings).images
    for seed, drawn in zip((1, 2), both, strict=True):
        alone = pixels(pipe("a red house", **(settings | {"seed": seed})))
        assert abs(alone - np.asarray(drawn).astype(int)).max() <= 1  # float32 sums in another order


def test_low_memory_draws_the_same(pipe, file, style):
    spare = mlxdiff.load("storybook", dtype="float32", low_memory=True)
    drawn = [p("a red house", references=[(file, style, 0.8)], **SAME) for p in (pipe, spare)]
    assert abs(pixels(drawn[0]) - pixels(drawn[1])).max() <= 1  # tiles and passes, summed in another order


def test_a_part_of_the_steps_and_of_the_picture_is_kept_and_said(pipe, file, style, tmp_path, capsys):
    """Two references of one adapter that differ in either are read apart."""
    typed = ["--steps", "4", "-s", "1", "-W", "64", "-H", "64", "--dtype", "float32"]
    typed += [
        "--reference",
        f"{file}:style",
        str(style),
        "0.8",
        "0",
        "0.5",
        "--reference",
        f"{file}:layout",
        str(style),
    ]
    assert generate.main(["a red house", *typed, "-o", str(tmp_path / "a.png")]) == 0
    said = capsys.readouterr().err
    assert f"reference {file}:style {style}: scale 0.8, in steps 1 to 2 of 4\n" in said
    assert f"reference {file}:layout {style}: scale 1\n" in said
    request, _ = images.read_settings(tmp_path / "a.png")
    assert [(guide.mode, guide.interval) for guide in request.references] == [("style", (0, 0.5)), ("layout", (0, 1))]
    again = pixels(pipe(request))
    assert (again == np.asarray(Image.open(tmp_path / "a.png")).astype(int)).all()
    for other in ([("IP:style", "S", 0.8), ("IP:layout", "S")], [("IP", "S", 0.8, 0, 0.5), ("IP:layout", "S")]):
        words = {"IP": str(file), "S": style}
        changed = [(words.get(m, m.replace("IP", str(file))), words[s], *n) for m, s, *n in other]
        assert abs(pixels(pipe("a red house", references=changed, **SAME)) - again).mean() > 0.1


def test_a_scale_of_zero_draws_as_without(pipe, file, style):
    bare, nothing = (pipe("a red house", references=r, **SAME) for r in ([], [(file, style, 0)]))
    assert (pixels(bare) == pixels(nothing)).all()


def test_pixels_are_those_that_clip_was_trained_on():
    """By the numbers that OpenAI published; of a very long picture only the middle counts."""
    mean, spread = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    long = Image.new("RGB", (8, 9000), "red")
    long.paste((10, 128, 255), (0, 4000, 8, 5000))
    seen = np.asarray(references.pixels(long, SEES))
    want = [(c / 255 - m) / s for c, m, s in zip((10, 128, 255), mean, spread, strict=True)]
    assert seen.shape == (1, SEES.size, SEES.size, 3)
    assert np.abs(seen - np.array(want)).max() < 1e-5  # float32


# ---- where the vision model is


def test_the_vision_model_that_fits_is_found(pipe, file, style, tmp_path):
    """Beside the file, beside its folder, and in models/ beside that, as in the published repository."""
    wrong = replace(SEES, projection=14)
    write_encoder(tmp_path / "sdxl_models" / "image_encoder", wrong)
    moved = tmp_path / "sdxl_models" / "ip.safetensors"
    moved.write_bytes(file.read_bytes())
    with pytest.raises(Error, match=r"12 numbers, and .*image_encoder gives 14\."):
        pipe.resolve("x", references=[(moved, style)], **SAME)
    write_encoder(tmp_path / "models" / "image_encoder", SEES)
    want = pipe.resolve("x", references=[(file, style)], **SAME).references[0].model_hash
    assert pipe.resolve("x", references=[(moved, style)], **SAME).references[0].model_hash == want


def test_a_whole_clip_serves_as_vision_model(pipe, file, style, tmp_path):
    sees = replace(SEES, width=32, heads=16)  # the number of heads, which no shape shows
    weights = load_file(write_encoder(tmp_path / "other", sees) / "model.safetensors")
    text = {
        "text_model.final_layer_norm.weight": np.ones(8),
        "logit_scale": np.ones(()),
        "text_projection.weight": np.ones((8, 8)),
    }
    full(tmp_path / "image_encoder" / "model.safetensors", weights | {n: np.float32(x) for n, x in text.items()})
    (tmp_path / "ip.safetensors").write_bytes(file.read_bytes())
    reader = pipe.attached.references.reader(Guide(style, tmp_path / "ip.safetensors"))
    assert reader.sees == sees


# ---- what is refused, in one line and before any work

BAD = {
    "no such adapter": ([("ip-adaptr", "S")], "There is no reference network, file or folder 'ip-adaptr'. Give"),
    "no such picture": ([("IP", "none.png")], "There is no picture at none.png."),
    "no network": (["S"], "has no network that reads it. Name an IP-Adapter or FLUX Redux before the"),
    "an interval without a step": ([Guide("S", "IP", interval=(0.1, 0.2))], "0.1 to 0.2 holds none of 4 steps"),
    "a part of it that none takes": ([Guide("S", "IP", mode="mood")], "cannot take 'mood' alone from a reference. Use"),
    "another family's": ([("SD15", "S")], "is an IP-Adapter that reads text 768 wide, not 128: it does not fit storyb"),
    "Redux": ([("REDUX", "S")], "is a FLUX Redux embedder, for FLUX.1; storybook is Stable Diffusion 1.x."),
    "FaceID": ([("FACE", "S")], "is an IP-Adapter FaceID, which reads faces by insightface, which is not"),
    "FaceID without LoRA": ([("FACE2", "S")], "is an IP-Adapter FaceID, which reads faces by insightface"),
    "a pickle": ([("BIN", "S")], "is a pickle, which can run any code when it is opened."),
    "a ControlNet": ([("CANNY", "S")], "is a ControlNet and reads no reference picture. Give an IP-Adapter or"),
    "a vision model": ([("EYES", "S")], "is a vision model and reads no reference picture."),
    "no vision model": ([("ALONE", "S")], "reads what a vision model gives of a picture, 12 numbers, and there"),
    "a text encoder": ([("TEXT", "S")], "is not a complete vision checkpoint"),
    "cut short": ([("CUT", "S")], "is cut short"),
    "a tensor too few": ([("FEW", "S")], "1 parameter is missing (such as ip_adapter.image_proj.norm.bias)"),
    "a tensor too many": ([("MANY", "S")], "1 of its tensors has no place (such as 'more'"),
    "a gap in its layers": ([("GAP", "S")], "missing"),
    "NaN": ([("NAN", "S")], "has numbers that are NaN or infinite"),
    "NaN in the vision model": ([("NANEYES", "S")], "has numbers that are NaN or infinite"),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(pipe, file, style, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bad")
    made = {"IP": file, "S": style, "EYES": file.parent / "image_encoder"}
    made["SD15"] = sparse(root / "sd15.safetensors", manifest("ip_adapter_sd15")["tensors"])
    made["REDUX"] = sparse(root / "redux.safetensors", manifest("flux1-redux-dev")["tensors"])
    made["CANNY"] = sparse(root / "canny.safetensors", manifest("sd15_controlnet_canny")["tensors"])
    weights, eyes = load_file(file), load_file(made["EYES"] / "model.safetensors")
    norm, face = "image_proj.norm.bias", {"image_proj.proj.0.weight": np.ones((8, 8), np.float32)}
    lora = {"ip_adapter.1.to_q_lora.down.weight": np.ones((4, 8), np.float32)}
    made["FACE"] = full(root / "face.safetensors", weights | face | lora)
    made["FACE2"] = full(root / "face2.safetensors", weights | face)
    (root / "face.bin").write_bytes(b"\x80\x02")
    made["BIN"] = root / "face.bin"
    nan = weights | {norm: weights[norm] * np.nan}
    gap = {n.replace("ip_adapter.3.", "ip_adapter.4."): x for n, x in weights.items()}
    few = {n: x for n, x in weights.items() if n != norm}
    bad = {"FEW": few, "MANY": weights | {"more": np.zeros(1, np.float32)}, "NAN": nan, "GAP": gap, "NANEYES": weights}
    for name, arrays in (bad | {"ALONE": weights, "TEXT": weights}).items():
        made[name] = full(root / name / "ip.safetensors", arrays)
        if name != "ALONE":
            write_encoder(root / name / "image_encoder", SEES)
    broken = {n: x * np.nan if n == "visual_projection.weight" else x for n, x in eyes.items()}
    full(root / "NANEYES" / "image_encoder" / "model.safetensors", broken)
    (root / "TEXT" / "image_encoder" / "config.json").unlink()
    sparse(root / "TEXT" / "image_encoder" / "model.safetensors", manifest("sd15_text_encoder")["tensors"])
    made["CUT"] = root / "cut.safetensors"
    made["CUT"].write_bytes(file.read_bytes()[:-4])
    return made


@pytest.mark.parametrize("case", BAD)
def test_bad_references_are_named(pipe, files, case):
    references, says = BAD[case]

    def named(guide):
        if isinstance(guide, Guide):
            return replace(guide, image=files[guide.image], model=files[guide.model])
        return [files.get(w, w) for w in ([guide] if isinstance(guide, str) else guide)]

    with pytest.raises(Error, match=re.escape(says)) as e:
        pipe("a red house", references=[named(guide) for guide in references], **SAME)
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("SD15", "is an IP-Adapter, which is no model by itself. Name the model that draws, and give the file"),
        ("REDUX", "is a FLUX Redux embedder, which is no model by itself"),
        ("EYES", "is a vision model, which is no model by itself"),
    ],
)
def test_they_are_no_models(files, name, says):
    with pytest.raises(Error, match=re.escape(says)):
        mlxdiff.load(files[name])


@pytest.mark.parametrize("model", ["sd3.5-medium", "flux2-klein", "z-image-turbo", "sdxl-refiner"])
def test_other_families_take_no_references(model, style, monkeypatch):
    monkeypatch.setattr(hub, "listing", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(Error, match=r"^References are for Stable Diffusion 1.x and .* Leave `references` out"):
        mlxdiff.load(model, force=True, request=Request("a house", references=[("ip-adapter", style)]))


def test_networks_for_controls_and_for_references_are_not_confused(style, monkeypatch):
    """Before anything is fetched."""
    monkeypatch.setattr(hub, "listing", lambda *_: pytest.fail("asked the hub"))
    for settings, says in (
        (
            {"references": [("canny", style)]},
            "canny is a network for control pictures (ControlNet), not a network for references. Give",
        ),
        (
            {"controls": [("ip-adapter", style)]},
            "ip-adapter is a network for references (IP-Adapter), not a network",
        ),
    ):
        with pytest.raises(Error, match=re.escape(says)):
            mlxdiff.load("sd15", force=True, request=Request("a house", **settings))


@pytest.mark.parametrize(
    ("model", "guide", "says"),
    [
        ("flux-dev", ("redux", "S", 1, 0, 0.5), "becomes a part of the prompt, which is the same in all steps"),
        ("flux-dev", ("redux:style", "S"), "flux-dev cannot take 'style' alone from a reference. Leave it out"),
        ("sdxl", ("lcm", "S"), "lcm is a LoRA (LCM LoRA), not a network for references. Give it as `loras=[NAME]`"),
    ],
)
def test_what_a_named_network_cannot_do_is_refused_before_a_download(model, guide, says, style, monkeypatch):
    monkeypatch.setattr(hub, "listing", lambda *_: pytest.fail("asked the hub"))
    guide = tuple(style if word == "S" else word for word in guide)
    with pytest.raises(Error, match=re.escape(says)):
        mlxdiff.load(model, force=True, request=Request("a house", references=[guide]))


def test_a_wrong_adapter_is_refused_before_a_model_is_fetched(files, monkeypatch):
    monkeypatch.setattr(hub, "listing", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(Error, match="reads text 768 wide, not 2048"):
        mlxdiff.load("sdxl", force=True, request=Request("a house", references=[(files["SD15"], files["S"])]))


# ---- named adapters, the hub, and memory


def test_the_files_of_a_named_adapter_are_fetched_from_one_repository(pipe, file, style, tmp_path, monkeypatch):
    """The adapter, then the settings of the vision models around it, then the weights of the one that fits."""
    write_encoder(tmp_path / "sdxl_models" / "image_encoder", replace(SEES, projection=14))
    write_encoder(tmp_path / "models" / "image_encoder", SEES)
    names = [f"{p}/image_encoder/{n}" for p in ("sdxl_models", "models") for n in ("config.json", "model.safetensors")]
    monkeypatch.setattr(hub, "listing", lambda *_: ("c1", dict.fromkeys([*names, "sdxl_models/ip.safetensors"], 1)))
    snapshot, asked = tmp_path / "snapshot", []

    def download(repo, revision, commit, wanted, progress):
        for name in wanted:
            asked.append(name)
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            source = file if name.endswith("ip.safetensors") else tmp_path / name
            (snapshot / name).write_bytes(source.read_bytes())
        return snapshot

    monkeypatch.setattr(hub, "download", download)
    monkeypatch.setattr(hub, "offline", lambda: False)
    monkeypatch.setattr(hub, "snapshots", lambda *_: [])
    request = pipe.resolve("x", references=[("org/repo/sdxl_models/ip.safetensors", style)], **SAME)
    assert request.references[0].model_hash is not None
    assert asked == ["sdxl_models/ip.safetensors", names[0], names[2], names[2], names[3]]
    shutil.rmtree(snapshot / "models")
    monkeypatch.setattr(hub, "snapshots", lambda *_: [snapshot / "sdxl_models" / "ip.safetensors"])
    monkeypatch.setattr(hub, "held", lambda *_: ("c1", {"sdxl_models/ip.safetensors": 1}))
    monkeypatch.setattr(hub, "offline", lambda: True)
    with pytest.raises(Error, match=r"The vision model of .*ip.safetensors is not on this machine, and the network"):
        pipe.resolve("x", references=[("org/repo/sdxl_models/ip.safetensors", style)], **SAME)


def test_a_vision_model_may_be_in_another_repository(pipe, file, style, tmp_path, monkeypatch):
    """XLabs' IP-Adapter for FLUX reads what OpenAI's CLIP gives."""
    write_encoder(tmp_path / "eyes", SEES)
    adapter = tmp_path / "alone" / file.name
    adapter.parent.mkdir()
    adapter.write_bytes(file.read_bytes())
    row = replace(ADAPTERS["flux", "ip-adapter"], net=pipe.description.net)
    monkeypatch.setitem(ADAPTERS, ("sd1", "eyes"), row)
    monkeypatch.setattr(store_references, "one_file", lambda repo, *_: adapter if repo == row.repo else None)
    monkeypatch.setattr(store_references, "one_network", lambda repo, *_: {row.sees: tmp_path / "eyes"}[repo])
    found, beside = (pipe.resolve("x", references=[(name, style)], **SAME).references[0] for name in ("eyes", file))
    assert found.model_hash == beside.model_hash


def test_memory_counts_the_networks_that_read_and_the_tokens():
    """A vision model and an adapter by their manifests, while a picture is read; then keys and values of its tokens."""
    work = advice.named("sd15", Recipe("float16", None))
    size = [sum(int(np.prod(s)) for n, s in manifest(m)["tensors"].items() if "position_ids" not in n)
            for m in ("ip_adapter_image_encoder_vit_h", "ip_adapter_sd15")]  # fmt: skip
    config = adapter(work.model.net, image=1024)
    known = memory.Reader((CLIP_VIT_H, config), 4)
    reads = memory.peaks(replace(work, readers=(known,)), gpu=True)
    assert 2 * sum(size) < reads.encode < 1.05 * 2 * sum(size)
    row = ADAPTERS["sd1", "ip-adapter"]
    assert row.size + row.encoder == pytest.approx(2e-9 * sum(size), abs=0.02)
    bare, more = (memory.peaks(replace(work, readers=r), gpu=True).denoise for r in ((), (known, known)))
    assert 0 < more - bare < 0.01 * bare
    flux = advice.named("flux-dev", Recipe("bfloat16", None))
    tokens = memory.Reader((SIGLIP, redux.Config(1152, 12288, 4096)), 729)
    bare, more = (memory.peaks(replace(flux, readers=r), gpu=True) for r in ((), (tokens,)))
    assert more.denoise - bare.denoise == pytest.approx(37.5 * 3072 * 729 * 2, rel=0.01)
    assert ADAPTERS["flux", "redux"].tokens == SIGLIP.tokens


def test_the_published_configs_are_those_of_the_published_files(tmp_path):
    """By shapes alone; the heads, which no shape shows, are the same in all."""
    file = sparse(tmp_path / "h.safetensors", manifest("ip_adapter_image_encoder_vit_h")["tensors"], dtypes={})
    assert mlxdiff.convert.open(file).components["image_encoder"].config == CLIP_VIT_H
    file = sparse(tmp_path / "s.safetensors", manifest("flux_redux_image_encoder")["tensors"])
    assert mlxdiff.convert.open(file).components["image_encoder"].config == SIGLIP
    assert CLIP_VIT_BIGG.width // CLIP_VIT_BIGG.heads == 104
