"""Adapters on the built-in model. References: the dense weights that a change makes, and the file's own numbers; that
files mean what they mean elsewhere is parity/test_lora.py's."""

import json
import math
import re
import time
import warnings
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlxdiff
from mlxdiff import advice, conditioning, generate, images, memory
from mlxdiff.adapters import SidePath
from mlxdiff.attached import settled
from mlxdiff.convert import __main__ as convert
from mlxdiff.convert import inspect, lora
from mlxdiff.description import published
from mlxdiff.errors import Error
from mlxdiff.families import ADAPTERS, MODELS, Fast
from mlxdiff.recipe import Recipe
from mlxdiff.request import Request
from mlxdiff.store import hub
from mlxdiff.store.adapters import named
from tests.checkpoints import full, header, manifest, raw

LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
WIDE = MODELS["storybook"].networks["unet"].channels[1]


@pytest.fixture(scope="module")
def pipe():
    return mlxdiff.load("storybook", dtype="float32")


SMALL = {"seed": 1, "steps": 3, "width": 64, "height": 64}


def shape(pipe, layer: str) -> tuple[int, ...]:
    component, _, name = layer.partition(".")
    parameters = dict(tree_flatten(pipe.networks.open(component).parameters()))
    return parameters[f"{name}.weight"].shape


def pair(pipe, layer: str, rank: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    out, columns = shape(pipe, layer)
    g = np.random.default_rng(seed)
    down, up = (g.normal(size=size).astype(np.float32) for size in ((rank, columns), (out, rank)))
    return {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": 0.1 * up}


# ---- drawing


def test_a_picture_keeps_its_loras_and_draws_again(pipe, tmp_path):
    file = full(tmp_path / "style.safetensors", pair(pipe, LAYER))
    bare = pipe("a red house", **SMALL)
    result = pipe("a red house", **SMALL, loras=[f"{file}:0.5"])
    assert result.request.loras == (f"{file}:0.5",)
    assert (np.asarray(result.image) != np.asarray(bare.image)).any()
    again = pipe(images.read_settings(result.save(tmp_path / "a.png")[0])[0])
    assert (np.asarray(again.image) == np.asarray(result.image)).all()
    off = pipe("a red house", **SMALL)
    assert (np.asarray(off.image) == np.asarray(bare.image)).all()  # bit for bit, once it is taken off
    full(file, pair(pipe, LAYER, seed=1))
    with pytest.raises(Error, match="The LoRA files are not those of these settings"):
        pipe(images.read_settings(tmp_path / "a.png")[0])


def test_a_prompt_names_loras_of_a_folder(pipe, tmp_path, monkeypatch):
    full(tmp_path / "style.safetensors", pair(pipe, LAYER))
    monkeypatch.setenv("MLXDIFF_LORAS", str(tmp_path))
    request = pipe.resolve("a red house <lora:style:0.5>", seed=1)
    assert (request.prompt, request.loras) == ("a red house", ("style:0.5",))
    with pytest.raises(
        Error, match=r"There is no LoRA 'styl'\. storybook has quick, paper; or give a .safetensors file"
    ):
        pipe.resolve("a red house <lora:styl:0.5>")


def test_a_model_is_loaded_with_loras(pipe, tmp_path):
    file = str(full(tmp_path / "style.safetensors", pair(pipe, LAYER)))
    changed = mlxdiff.load("storybook", dtype="float32", loras=[file])
    assert changed.resolve("a house").loras == (f"{file}:1",)
    assert changed.resolve("a house", loras=[]).loras == ()


def test_scales_add_up(pipe, tmp_path):
    """Two LoRAs are the sum of their changes, and a scale of -1 takes one off again."""
    one, two = (full(tmp_path / f"{i}.safetensors", pair(pipe, LAYER, seed=i)) for i in (1, 2))
    first, second = (lora.read(path, pipe.description) for path in (one, two))
    name = f"{LAYER.partition('.')[2]}.weight"
    bare, a, b, both, none = (
        weight(pipe, name, *adapters)
        for adapters in (
            (),
            ((first, 0.5),),
            ((second, -2.0),),
            ((first, 0.5), (second, -2.0)),
            ((first, 1.0), (first, -1.0)),
        )
    )
    np.testing.assert_allclose(both - bare, (a - bare) + (b - bare), atol=1e-6)
    np.testing.assert_allclose(none, bare, atol=1e-6)


def weight(pipe, name: str, *adapters) -> np.ndarray:
    pipe.networks.adapt(list(adapters))
    try:
        return np.array(dict(tree_flatten(pipe.networks.open("unet").parameters()))[name])
    finally:
        pipe.networks.adapt([])


# ---- LoRAs with names


@pytest.fixture
def fast(pipe, tmp_path, monkeypatch):
    """A LoRA of the built-in model that has a name, and lies on the hub; and what was fetched."""
    made = full(tmp_path / "published" / "file.safetensors", pair(pipe, LAYER))
    how = {"net": pipe.description.net, "scale": 0.5, "steps": 2, "guidance": 1.0, "sampler": "ddim"}
    row = Fast("Fast LoRA", "org/fast", "MIT", 0.01, file="file.safetensors", **how)
    monkeypatch.setitem(ADAPTERS, ("sd1", "fast"), row)
    fetched = []
    monkeypatch.setattr(hub, "snapshots", lambda *_: [])
    monkeypatch.setattr(hub, "listing", lambda *_: ("c1", {"file.safetensors": 1}))
    monkeypatch.setattr(hub, "download", lambda *asked: fetched.append(asked) or made.parent)
    monkeypatch.setattr(hub, "offline", lambda: False)
    return fetched


def test_a_named_lora_brings_its_settings(pipe, fast, tmp_path, capsys):
    """Those that the user leaves open. Closed form: a DDIM picture in two steps with the file's change."""
    small = {"seed": 1, "width": 64, "height": 64}
    bare = {"steps": 2, "guidance": 1.0, "sampler": "ddim", "schedule": "trailing"}
    drawn = pipe("a red house", loras=["fast"], **small)
    assert drawn.request.loras == ("fast:0.5",)
    assert {key: getattr(drawn.request, key) for key in bare} == bare
    want = pipe("a red house", loras=[f"{tmp_path / 'published' / 'file.safetensors'}:0.5"], **bare, **small)
    assert (np.asarray(drawn.image) == np.asarray(want.image)).all()
    said = pipe.resolve("a house <lora:fast>", steps=3)
    assert (said.loras, said.steps, said.guidance, said.sampler) == (("fast:0.5",), 3, 1.0, "ddim")
    said = pipe.resolve("a house", loras=["fast:1"], sampler="euler")
    assert (said.loras, said.sampler, said.schedule) == (("fast:1",), "euler", pipe.description.schedule["spacing"])
    typed = ["a red house", "-W", "64", "-H", "64", "--lora", "fast", "--dtype", "float32", "--steps", "3"]
    assert generate.main([*typed, "-o", str(tmp_path / "a.png")]) == 0
    told = capsys.readouterr().err
    assert "fast: 1 layer (unet 1), rank 4, scale 0.5\n" in told
    wants = "steps 2, guidance 1, sampler ddim, schedule trailing"
    assert f"fast was made for {wants}. This picture has steps 3.\n" in told
    again = pipe(images.read_settings(drawn.save(tmp_path / "b.png")[0])[0])
    assert (np.asarray(again.image) == np.asarray(drawn.image)).all()


def test_a_file_goes_before_a_name(pipe, fast, tmp_path):
    full(tmp_path / "mine" / "fast.safetensors", pair(pipe, LAYER, seed=1))
    held = mlxdiff.load("storybook", dtype="float32", lora_dir=tmp_path / "mine")
    request = held.resolve("a house <lora:fast>")
    assert (request.loras, request.steps, fast) == (("fast:1",), held.description.defaults.steps, [])
    with pytest.raises(Error, match=r"There is no folder .*nowhere"):
        mlxdiff.load("storybook", lora_dir=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("model", "name", "says"),
    [
        ("storybook", "lcm", "which was made for sd15, sd15-inpaint: it does not fit storybook"),
        (
            "flux-dev",
            "lcm",
            r"for Stable Diffusion 1.x and Stable Diffusion XL; flux-dev is FLUX.1. FLUX.1 has hyper-8",
        ),
        ("flux-schnell", "turbo", "which was made for flux-dev, flux-krea, flux-kontext: it does not fit flux-schnell"),
        ("sd3.5-medium", "hyper-8", "which was made for sd3-medium: it does not fit sd3.5-medium"),
        ("sd21", "hyper-4", "sd21 is Stable Diffusion 2.x. Leave it out"),
        ("sdxl", "lightning4", "There is no LoRA 'lightning4'. Did you mean lightning-4"),
        ("sdxl", "nothing", "There is no LoRA 'nothing'. sdxl has lcm, lightning-2"),
    ],
)
def test_a_name_that_does_not_fit_is_refused_before_any_download(model, name, says, monkeypatch, capsys):
    monkeypatch.setattr(hub, "listing", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(Error, match=says):
        mlxdiff.load(model, force=True, request=Request(f"a house <lora:{name}>"))
    if model != "storybook":
        assert convert.main([model, "--lora", name, "-o", "nowhere"]) == 1
        assert re.search(says, capsys.readouterr().err)


def test_named_loras_fit_the_models_that_they_were_made_for():
    """With settings that those models can draw with."""
    rows = {key: row for key, row in ADAPTERS.items() if row.role == "lora"}
    assert len(rows) == 22
    for (family, name), row in rows.items():
        fit = [n for n, m in MODELS.items() if row.fits(m.networks[m.family.denoiser]) and m.family.name == family]
        model = published(fit[0], Recipe("float32", None))
        assert named(name, model) == row
        assert row.file.endswith(".safetensors")
        request, ((_, scale),) = settled(Request("x", loras=(name,)), (), model, None)
        full = model.resolve(request)
        assert scale == row.scale
        assert row.wants == {key: getattr(full, key) for key in row.wants}
    assert named("lcm", published("sd15-inpaint", Recipe("float32", None))) is not None


# ---- beside quantized layers


@pytest.mark.parametrize("bits", [8, 4, "mxfp4"])
def test_a_change_beside_a_quantized_layer_is_not_lost(pipe, tmp_path, bits, quantized):
    """Against the dense layer of the dequantized weights and the change, in float32 on both sides."""
    small = quantized(bits)
    adapter = lora.read(full(tmp_path / "a.safetensors", pair(pipe, LAYER)), small.description)
    small.networks.adapt([(adapter, 0.7)])
    bare_layer, layer = (at(net, LAYER) for net in (quantized(bits, fresh=True), small.networks.open("unet")))
    assert isinstance(layer, SidePath)
    ((change,),) = adapter.changes["unet"].values()
    x = mx.random.normal((2, 5, change.low[0].shape[1]), key=mx.random.key(0))
    how = {"group_size": bare_layer.group_size, "bits": bare_layer.bits, "mode": bare_layer.mode}
    dense = mx.dequantize(bare_layer.weight, bare_layer.scales, bare_layer.get("biases"), **how)
    want = x @ (dense + 0.7 * change.low[1] @ change.low[0]).T
    np.testing.assert_allclose(np.array(layer(x)), np.array(want), atol=1e-3 * np.abs(np.array(want)).max())


@pytest.mark.parametrize("bits", [8, 4])
def test_a_change_survives_quantized_weights_and_comes_off(pipe, tmp_path, bits, quantized):
    """What is left of the change, projected on it, at a tenth of the weights' size: all of it beside a layer; at least
    95 % of it if it is merged before the weights are quantized. Taken off, the picture is the bare one bit for bit."""
    small, settings = quantized(bits), {"seed": 1, "steps": 2, "width": 64, "height": 64}
    bare = np.asarray(small("a red house", **settings).image)
    state = pair(pipe, LAYER)
    whole = weight(pipe, f"{LAYER.partition('.')[2]}.weight")
    change = state[UP] @ state[DOWN]
    state[UP] *= 0.1 * np.linalg.norm(whole) / np.linalg.norm(change)
    change = state[UP] @ state[DOWN]
    file = full(tmp_path / "a.safetensors", state)
    drawn = np.asarray(small("a red house", loras=[str(file)], **settings).image)
    assert (drawn != bare).any()
    assert (np.asarray(small("a red house", **settings).image) == bare).all()

    def left(after: np.ndarray, before: np.ndarray) -> float:
        return ((after - before) * change).sum() / np.square(change).sum()

    small.networks.adapt([(lora.read(file, small.description), 1.0)])
    eye = mx.eye(change.shape[1])
    layer = at(small.networks.open("unet"), LAYER)
    assert left(np.array(layer(eye).T), np.array(layer.layer(eye).T)) == pytest.approx(1, abs=1e-3)
    small.networks.adapt([])
    group = {"group_size": layer.layer.group_size, "bits": bits}
    baked, plain = (
        np.array(mx.dequantize(*mx.quantize(mx.array(w), **group), **group)) for w in (whole + change, whole)
    )
    assert left(baked, plain) > 0.95


def test_a_change_of_full_rank_leaves_its_layer_unquantized(pipe, tmp_path, quantized):
    small = quantized(4)
    value = np.full(shape(pipe, LAYER), 0.01, np.float32)
    adapter = lora.read(full(tmp_path / "a.safetensors", {f"{LAYER}.diff": value}), small.description)
    small.networks.adapt([(adapter, 1.0)])
    assert type(at(small.networks.open("unet"), LAYER)) is nn.Linear


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        pipes: dict = {}

        def get(bits, fresh: bool = False):
            if bits not in pipes:
                pipes[bits] = mlxdiff.load("storybook", bits=bits, dtype="float32")
            if fresh:
                before, pipes[bits].networks._adapters = pipes[bits].networks._adapters, []
                try:
                    return pipes[bits].networks.open("unet")
                finally:
                    pipes[bits].networks._adapters = before
            pipes[bits].networks.adapt([])
            return pipes[bits]

        yield get


def at(network, layer: str):
    for part in layer.split(".")[1:]:
        network = network[int(part)] if part.isdigit() else network[part]
    return network


# ---- memory


def test_memory_counts_what_a_quantized_network_gains(pipe, tmp_path, quantized):
    """Exactly: the parameters of the network with and without it. One layer runs beside, one is no longer quantized."""
    other = LAYER.replace("to_k", "to_v")
    state = pair(pipe, LAYER) | {f"{other}.diff": np.full(shape(pipe, other), 0.01, np.float32)}
    small = quantized(4)
    adapter = lora.read(full(tmp_path / "a.safetensors", state), small.description)
    held = [sum(v.nbytes for _, v in tree_flatten(small.networks.open("unet").parameters()))]
    small.networks.adapt([(adapter, 1.0)])
    held.append(sum(v.nbytes for _, v in tree_flatten(small.networks.open("unet").parameters())))
    work = small.workload(small.resolve("a house", seed=1, width=64, height=64))
    bare, more = (memory.peaks(replace(work, loras=loras), gpu=False) for loras in ((), (adapter,)))
    numbers = sum(x.size for x in state.values())
    assert more.denoise - bare.denoise == held[1] - held[0] + 4 * numbers > 4 * numbers
    assert more.encode - bare.encode == 4 * numbers
    known = memory.peaks(replace(work, loras=(2 * numbers,)), gpu=False)  # one that is not here: its bytes in 16 bits
    assert known.encode == more.encode
    assert known.denoise - bare.denoise == 4 * numbers + 4 * numbers  # in float32, as held and as run beside


def test_a_lora_that_does_not_fit_the_machine_is_refused_before_a_download(monkeypatch):
    monkeypatch.setattr(hub, "listing", lambda *_: pytest.fail("asked the hub"))
    request = Request("a house", loras=("hyper-8",), width=512, height=512)
    work = advice.named("sdxl", Recipe("float16", None), request=Request("a house", width=512, height=512, guidance=0))
    need = memory.peak(work, gpu=True)
    between = advice.Machine(int((need + 0.8e9) / memory.SURE), 2**40, True)  # two bytes a number become four: 1.6 GB
    monkeypatch.setattr(advice, "this_machine", lambda: between)
    with pytest.raises(Error, match=r"sdxl at 512x512 takes about .* GB; this machine has"):
        mlxdiff.load("sdxl", dtype="float16", request=request)
    with pytest.raises(Error, match="is not on this machine, and the network"):  # it fits
        mlxdiff.load("sdxl", dtype="float16", request=replace(request, loras=()), offline=True)


def test_a_change_as_large_as_the_model_is_not_kept(pipe, tmp_path):
    """A file's factors stay in memory, not the product, which is made for each layer anew."""
    conv = f"unet.down_blocks.{len(pipe.description.net.channels) - 1}.resnets.0.conv2"
    c = pipe.description.net.channels[-1]
    factors = {f"{conv}.lora_down.weight": (1, c, 3, 3), f"{conv}.lora_up.weight": (c, 1, 1, 1)}
    file = full(tmp_path / "a.safetensors", {k: np.ones(v, np.float32) for k, v in factors.items()})
    adapter = lora.read(file, pipe.description)
    mx.clear_cache()
    before = mx.get_active_memory()
    pipe.networks.adapt([(adapter, 1.0)])
    mx.eval(pipe.networks.open("unet").parameters())
    pipe.networks.adapt([])
    mx.clear_cache()
    assert mx.get_active_memory() - before < 0.1 * 4 * 9 * c**2


# ---- written into a model, and inspected


def test_a_converted_model_holds_its_loras(pipe, tmp_path, monkeypatch):
    """Its weights are those that the LoRA makes at loading; quantized, they are quantized with the change in them."""
    monkeypatch.setenv("MLXDIFF_CACHE", str(tmp_path / "cache"))
    file = full(tmp_path / "style.safetensors", pair(pipe, LAYER))
    name = f"{LAYER.partition('.')[2]}.weight"
    want = weight(pipe, name, (lora.read(file, pipe.description), 0.5))
    for bits in (None, 8):
        typed = ["storybook", "-o", str(tmp_path / f"{bits}"), "--lora", f"{file}:0.5", "--dtype", "float32"]
        assert convert.main(typed + (["-q", f"{bits}"] if bits else [])) == 0
    held = mlxdiff.load(tmp_path / "None")
    np.testing.assert_allclose(weight(held, name), want, atol=1e-7)
    layer = at(mlxdiff.load(tmp_path / "8").networks.open("unet"), LAYER)
    dense = np.array(mx.dequantize(layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits))
    assert np.abs(dense - want).max() < 0.02 * np.abs(want).max() < np.abs(want - weight(pipe, name)).max()


def test_inspect_says_what_a_lora_fits(pipe, tmp_path, capsys):
    state = pair(pipe, LAYER)
    notes = {"ss_tag_frequency": json.dumps({"10_moss": {"moss house": 9, "green": 3}})}
    entries = header({k: v.shape for k, v in state.items()}, "F32", metadata=notes)
    file = raw(tmp_path / "style.safetensors", entries, body=b"".join(v.tobytes() for v in state.values()))
    assert inspect.main([str(file)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{file}: a LoRA of 1 layer (unet 1), rank 4",
        "  fits storybook and models of the same shapes",
        "  trained on 'moss house', 'green'",
    ]
    file = file.rename(tmp_path / "pytorch_lora_weights.safetensors")
    assert inspect.main([str(tmp_path), "--json"]) == 0  # a folder, as training makes it
    assert json.loads(capsys.readouterr().out)["fits"] == ["storybook"]
    assert generate.main(["a house", "-m", str(file)]) == 1
    assert "is a LoRA, which is no model by itself. Name the model that it changes" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["<moss>", "emb_params"])
def test_a_taught_word_is_named_for_what_it_is(tmp_path, capsys, key):
    file = full(tmp_path / "moss.safetensors", {key: np.ones((1, 768), np.float32)})
    for command, words in ((inspect, [str(file)]), (generate, ["a house", "-m", str(file)])):
        assert command.main(words) == 1
        assert "is a textual inversion, which is no model by itself. Name the model" in capsys.readouterr().err


def test_inspect_says_what_is_wrong_in_the_model_that_a_lora_fits(pipe, tmp_path, capsys):
    file = full(tmp_path / "a.safetensors", pair(pipe, LAYER) | {f"{LAYER}.alpha": np.full(1, np.float32(3e38))})
    assert inspect.main([str(file)]) == 1
    assert "has an alpha of 3e+38, which cannot be" in capsys.readouterr().err


# ---- the names in published files

MANIFESTS = {
    "lora_diffusers_sd15_lora_down_up": "sd15", "lora_kohya_sd15": "sd15", "lora_lcm_sd15": "sd15",
    "lora_peft_sd15_unet": "sd15", "lora_peft_sd15_unet_te": "sd15", "lora_kohya_sdxl": "sdxl",
    "lora_peft_sdxl_unet": "sdxl", "lora_kohya_flux": "flux-dev", "lora_peft_flux_aitoolkit": "flux-dev",
    "lora_peft_flux_dreambooth": "flux-dev",
}  # fmt: skip


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_tensor_of_a_published_file_has_one_place(name, tmp_path):
    """None is left, no rows are changed twice, and every shape fits. The numbers are not read."""
    tensors = manifest(name)["tensors"]
    model = published(MANIFESTS[name], Recipe("float32", None))
    places, kinds, taken = lora._places(model), {}, {}
    for key, shape in tensors.items():
        layer, kind = lora._split(key)
        kinds.setdefault(layer, {})[kind] = tuple(shape)
        for rows in places[layer].weight:
            taken.setdefault((places[layer].component, rows.parameter, rows.first, kind), set()).add(layer)
    assert all(len(layers) == 1 for layers in taken.values())
    for layer, shapes in kinds.items():
        up, down = shapes["up"], shapes["down"]
        rows = places[layer].weight
        assert up[:2] == (sum(r.shape[0] for r in rows), down[0]), layer
        assert math.prod(down[1:]) == math.prod(rows[0].shape[1:]), layer


# ---- files that are refused


def changed(key: str, value):
    return lambda state: state | {key: value}


UP, DOWN = f"{LAYER}.lora_B.weight", f"{LAYER}.lora_A.weight"
BAD = {
    "another family's names": (
        lambda s: {"double_blocks.0.img_attn.proj.lora_A.weight": s[DOWN]},
        "1 of the 1 tensors of .* have no place in storybook .* It seems to be made for FLUX.1",
    ),
    "a key without a place": (changed("unet.nowhere.lora_A.weight", np.ones((4, 8))), "'unet.nowhere.lora_A.weight'"),
    "a kind that is not read": (changed(f"{LAYER}.oft_diag", np.ones(4)), "have no place"),
    "no tensors": (lambda s: {}, "0 of the 0 tensors"),
    "down without up": (lambda s: {DOWN: s[DOWN]}, "attn2.to_k lacks the other half of down"),
    "up without down": (lambda s: {UP: s[UP]}, "lacks the other half of up"),
    "another width": (lambda s: s | {DOWN: s[DOWN][:, 1:]}, rf"of shape \({WIDE}, 127\); .* takes \({WIDE}, 128\)"),
    "factors that do not fit": (lambda s: s | {DOWN: s[DOWN][1:]}, "up of shape .* which do not fit"),
    "not finite": (lambda s: s | {UP: s[UP] * np.nan}, "NaN or infinite"),
    "all zeros": (lambda s: s | {UP: s[UP] * 0}, "changes nothing: all of its numbers are 0"),
    "whole numbers": (lambda s: s | {UP: s[UP].astype(np.int64)}, "I64, where a floating-point type is needed"),
    "an alpha of several numbers": (changed(f"{LAYER}.alpha", np.ones(3)), r"alpha of shape \(3,\)"),
    "two spellings": (changed(f"{LAYER}.lora.up.weight", np.ones((64, 4))), "holds two tensors for 'up'"),
    "a bias that is not there": (changed(f"{LAYER}.diff_b", np.ones(64)), "in this model it has no bias"),
    "two kinds in one": (changed(f"{LAYER}.lokr_w1", np.ones((2, 2))), "do not belong together"),
    "half a LoKr": (lambda s: {f"{LAYER}.lokr_w1": np.ones((2, 2))}, "lacks lokr_w2"),
    "factors without a rank": (
        lambda s: {DOWN: s[DOWN][:0], UP: s[UP][:, :0]},
        "which holds nothing",
    ),
    "an alpha beyond all": (changed(f"{LAYER}.alpha", np.array(3e38)), r"alpha of 3e\+38, which cannot be"),
    "an alpha of nothing": (changed(f"{LAYER}.alpha", np.array(0.0)), "changes nothing: all of its numbers are 0"),
    "factors of a product beyond all": (
        lambda s: {f"{LAYER}.lokr_w{n}": np.ones((2**16, 1)) for n in (1, 2)},
        "has factors whose product is too large",
    ),
    "a core that is no convolution": (
        lambda s: (
            {f"{LAYER}.hada_{n}": np.ones((2, 2)) for n in ("w1_a", "w1_b", "w2_a", "w2_b")}
            | {f"{LAYER}.hada_t1": np.ones(2)}
        ),
        r"hada_t1 of shape \(2,\), which do not fit",
    ),
    "lengths of another layer": (changed(f"{LAYER}.dora_scale", np.ones(3)), r"change of shape \(3,\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_line(pipe, tmp_path, case, capsys):
    damage, message = BAD[case]
    state = {k: v if v.dtype == np.int64 else v.astype(np.float32) for k, v in damage(pair(pipe, LAYER)).items()}
    file = full(tmp_path / "bad.safetensors", state)
    code = generate.main(["a red house", "--lora", str(file), "-o", str(tmp_path / "out.png"), "--steps", "1"])
    said = capsys.readouterr().err
    assert code == 1
    assert re.search(message, said)
    assert said.count("\n") == 1
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    "said", ["[", '{"unet.lora_alpha": "x"}', '{"unet.lora_alpha": 0}', f'{{"unet.lora_alpha": 1{"0" * 400}}}']
)
def test_settings_of_peft_are_checked(pipe, tmp_path, said):
    state = pair(pipe, LAYER)
    entries = header({k: v.shape for k, v in state.items()}, "F32", metadata={"lora_adapter_metadata": said})
    file = raw(tmp_path / "a.safetensors", entries, body=b"".join(v.tobytes() for v in state.values()))
    with pytest.raises(Error, match=r"lora_adapter_metadata|its settings say lora_alpha"):
        lora.read(file, pipe.description)


def test_many_patterns_cost_nothing(pipe, tmp_path):
    """200,000 patterns for one layer: they are looked up, not tried one by one. The layer's own name decides."""
    state, name = pair(pipe, LAYER), LAYER.removeprefix("unet.")
    told = {"unet.lora_alpha": 4, "unet.alpha_pattern": {f"x{i}": 1 for i in range(200_000)} | {name: 8}}
    entries = header(
        {k: v.shape for k, v in state.items()}, "F32", metadata={"lora_adapter_metadata": json.dumps(told)}
    )
    file = raw(tmp_path / "a.safetensors", entries, body=b"".join(v.tobytes() for v in state.values()))
    (change,) = lora.read(file, pipe.description).changes["unet"][f"{name}.weight"]
    assert np.allclose(np.array(change.low[1]), 2 * state[UP], atol=1e-6)  # alpha 8 over rank 4


def test_many_tensors_cost_little(tmp_path, capsys):
    """A name is taken apart once, not once for each of the models that a LoRA may fit: that took minutes."""
    entries = header({f"unet.x.{i}.lora_A.weight": (1,) for i in range(5000)})
    file, begin = raw(tmp_path / "a.safetensors", entries), time.process_time()
    assert inspect.main([str(file)]) == 1
    assert "5000 of the 5000 tensors" in capsys.readouterr().err
    assert time.process_time() - begin < 10  # 1 s; without it, 100 s
    raw(file, header({f"unet.x.{i}.lora_A.weight": (1,) for i in range(50_001)}))
    assert inspect.main([str(file)]) == 1
    assert "lists 50,001 tensors; 50,000 are the most" in capsys.readouterr().err


@pytest.mark.parametrize("kinds", [("lora_A.weight", "lora_B.weight"), ("lokr_w1", "lokr_w2"), ("dora_scale", "diff")])
def test_a_number_is_no_matrix(pipe, tmp_path, kinds):
    """MLX's Kronecker product of two numbers ends the process."""
    entries = header({f"{LAYER}.{kind}": () for kind in kinds}, "F32")
    file = raw(tmp_path / "a.safetensors", entries, body=np.ones(2, np.float32).tobytes())
    with pytest.raises(Error, match=r"of shape \(\), which holds nothing to apply"):
        lora.read(file, pipe.description)


def test_a_lora_is_named_once(pipe, tmp_path, monkeypatch):
    monkeypatch.setenv("MLXDIFF_LORAS", str(tmp_path))
    file = full(tmp_path / "style.safetensors", pair(pipe, LAYER))
    with pytest.raises(Error, match="is named twice"):
        pipe.resolve("a house", loras=[str(file), f"{file}:0.5"])
    with pytest.raises(Error, match="is named twice"):
        pipe.resolve("a house <lora:style:1> <lora:style:1>")


def test_a_lora_is_checked_before_its_model_is_fetched(pipe, tmp_path, monkeypatch):
    monkeypatch.setenv("MLXDIFF_CACHE", str(tmp_path / "cache"))
    file = full(tmp_path / "style.safetensors", pair(pipe, LAYER))
    with pytest.raises(Error, match=r"tensors of .* have no place in sdxl|takes \("):
        mlxdiff.load("sdxl", loras=[str(file)], force=True, offline=True)


# ---- taught words


@pytest.fixture(scope="module")
def width(pipe) -> int:
    return pipe.description.components["text_encoder"].width


def test_a_taught_word_is_kept_with_the_picture(pipe, width, tmp_path):
    file = full(tmp_path / "moss.safetensors", {"emb_params": np.ones((2, width), np.float32)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it knows this word now
        result = pipe("a moss house", **SMALL, embeddings=[str(file)])
    plain = pipe("a moss house", **SMALL)
    assert (np.asarray(result.image) != np.asarray(plain.image)).any()
    again = pipe(images.read_settings(result.save(tmp_path / "a.png")[0])[0])
    assert (np.asarray(again.image) == np.asarray(result.image)).all()
    full(file, {"emb_params": np.zeros((2, width), np.float32)})
    with pytest.raises(Error, match="The embedding files are not those of these settings"):
        pipe(images.read_settings(tmp_path / "a.png")[0])


def test_ctrl_c_while_a_prompt_is_read_teaches_the_next_one_nothing(width, tmp_path, monkeypatch):
    """A text encoder that was taught a word and not closed would keep it, in the place of the next one."""
    files = [full(tmp_path / f"{x}.safetensors", {"moss": np.full((1, width), x, np.float32)}) for x in (1, -1)]
    stopped, fresh = (mlxdiff.load("storybook", dtype="float32") for _ in range(2))

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conditioning, "read", stop)
        with pytest.raises(KeyboardInterrupt):
            stopped("a moss house", **SMALL, embeddings=[str(files[0])])
    again, want = (each("a moss house", **SMALL, embeddings=[str(files[1])]).image for each in (stopped, fresh))
    assert again.tobytes() == want.tobytes()


BAD_WORDS = {
    "another width": (lambda d: {"emb_params": np.ones((1, d + 1))}, "", r"takes rows of"),
    "no rows": (lambda d: {"emb_params": np.ones((0, d))}, "", r"takes rows of"),
    "too many rows": (lambda d: {"emb_params": np.ones((76, d))}, "", r"takes rows of"),
    "three axes": (lambda d: {"emb_params": np.ones((1, 1, d))}, "", r"takes rows of"),
    "not finite": (lambda d: {"emb_params": np.full((1, d), np.inf)}, "", "NaN or infinite"),
    "SDXL's": (lambda d: {"clip_l": np.ones((1, d)), "clip_g": np.ones((1, d))}, "", "has 1 CLIP text encoder"),
    "nothing": (lambda d: {}, "", "holds nothing"),
    "several": (lambda d: {"a": np.ones(d), "b": np.ones(d)}, "", "holds a, b"),
    "a LoRA": (lambda d: {DOWN: np.ones((4, d)), UP: np.ones((d, 4))}, "", "holds unet"),
    "a word with spaces": (lambda d: {"a b": np.ones(d)}, "", "cannot be 'a b'"),
    "a known word": (lambda d: {"emb_params": np.ones(d)}, "=a", "knows the word 'a' already"),
    "a word of one token": (lambda d: {"emb_params": np.ones(d)}, "=house", "knows the word 'house' already"),
    "a word that moves the cursor": (lambda d: {"\x1b[2J": np.ones(d)}, "", r"cannot be '\\x1b\[2J'"),
    "a word without end": (lambda d: {"w" * 10_000: np.ones(d)}, "", "cannot be 'wwww"),
    "no word": (lambda d: {"emb_params": np.ones(d)}, "=", "cannot be ''"),
}


@pytest.mark.parametrize("case", BAD_WORDS)
def test_a_bad_embedding_is_one_line(width, tmp_path, case, capsys):
    state, word, message = BAD_WORDS[case]
    file = full(tmp_path / "moss.safetensors", {k: v.astype(np.float32) for k, v in state(width).items()})
    code = generate.main(["a house", "--embedding", f"{file}{word}", "-o", str(tmp_path / "out.png"), "--steps", "1"])
    said = capsys.readouterr().err
    assert code == 1
    assert re.search(message, said)
    assert said.count("\n") == 1
    assert not (tmp_path / "out.png").exists()


def test_a_file_that_is_named_as_all_are_is_called_as_its_folder():
    """Those of peft and diffusers, in a folder of one's own and in the hub's cache."""
    held = Path("hub/models--org--moss/snapshots/1f")
    files = Path("my-moss/moss_v2.safetensors"), *(p / "adapter_model.safetensors" for p in (Path("my-moss"), held))
    assert [lora._called(p) for p in files] == ["moss_v2", "my-moss", "moss"]
