"""Conversion of real numbers. References: the modules of diffusers and transformers that were saved, and the same
modules under the original authors' names (original.py); for schedules, the classes of diffusers."""

import inspect
import json
from pathlib import Path

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from mlxdiff import Error, builtin, convert, description, weights
from mlxdiff.convert import registry, rules, scheduler
from mlxdiff.convert import source as files
from mlxdiff.convert.settings import Settings
from mlxdiff.families import FAMILIES, MODELS
from mlxdiff.models import build
from mlxdiff.recipe import DTYPES, recipe

from . import clip_vocab, original
from .checkpoints import full, manifest, sparse
from .parity.tiny import stir

CLIP_L, CLIP_G = "conditioner.embedders.0.", "conditioner.embedders.1.model."

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def text(seed: int, width: int, act: str, projected: bool = False, layers: int = 3):
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=700, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, hidden_act=act, projection_dim=width, eos_token_id=699, bos_token_id=698,
    )  # fmt: skip
    return stir((CLIPTextModelWithProjection if projected else CLIPTextModel)(config), seed)


def nets(family: str) -> dict[str, torch.nn.Module]:
    """Small, and with the numbers no shape tells as the family has them: heads, groups, sinusoids."""
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (32, 64),
    }
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 32, 64), layers_per_block=1, scaling_factor=0.13025 if family == "sdxl" else 0.18215,
    )  # fmt: skip
    if family == "sd1":
        unet = diffusers.UNet2DConditionModel(
            **blocks, layers_per_block=1, cross_attention_dim=64, time_cond_proj_dim=16
        )
        return {"text_encoder": text(1, 64, "quick_gelu"), "unet": stir(unet, 2), "vae": stir(vae, 3)}
    if family == "sd2":
        unet = diffusers.UNet2DConditionModel(
            **blocks | {"block_out_channels": (64, 128)}, attention_head_dim=(1, 2), use_linear_projection=True,
            cross_attention_dim=64, layers_per_block=2,
        )  # fmt: skip
        return {"text_encoder": text(4, 64, "gelu"), "unet": stir(unet, 5), "vae": stir(vae, 6)}
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(64, 128), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), layers_per_block=2,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(1, 2), use_linear_projection=True,
        transformer_layers_per_block=(1, 2), addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=128 + 6 * 8, cross_attention_dim=192,
    )  # fmt: skip
    texts = {"text_encoder": text(7, 64, "quick_gelu"), "text_encoder_2": text(8, 128, "gelu", projected=True)}
    return texts | {"unet": stir(unet, 9), "vae": stir(vae, 10)}


def folder(path: Path, parts: dict[str, torch.nn.Module], **saving) -> Path:
    index = {k: ["x", type(v).__name__] for k, v in parts.items()}
    path.mkdir()
    (path / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "PNDMScheduler"]}))
    diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1).save_pretrained(path / "scheduler")
    for name, part in parts.items():
        part.save_pretrained(path / name, **saving)
    for name in ("tokenizer", "tokenizer_2"):
        if name.replace("tokenizer", "text_encoder") in parts:
            clip_vocab.write(path / name, clip_vocab.trained(150))
    return path


def arrays(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {k: v.detach().numpy() for k, v in module.state_dict().items()}


def single(path: Path, family: str, parts: dict[str, torch.nn.Module]) -> Path:
    prefixes = {
        "sd1": {"text_encoder": "cond_stage_model.transformer."},
        "sd2": {"text_encoder": "cond_stage_model.model."},
        "sdxl": {"text_encoder": f"{CLIP_L}transformer.", "text_encoder_2": CLIP_G},
    }[family]
    state = original.under("model.diffusion_model.", original.unet(arrays(parts["unet"])))
    state |= original.under("first_stage_model.", original.vae(arrays(parts["vae"])))
    for name, prefix in prefixes.items():
        own = {f"text_model.{k.removeprefix('text_model.')}": x for k, x in arrays(parts[name]).items()}
        own = {k.replace("text_model.text_projection", "text_projection"): x for k, x in own.items()}
        if prefix.endswith("model."):
            n = own["text_model.final_layer_norm.weight"].shape[0]
            spare = np.ones((n, n), np.float32) if family == "sd2" else None
            own = original.open_clip(own, spare=family == "sd2", projection=spare)
        state |= original.under(prefix, own)
    return full(path, state)


def read(folder: Path) -> tuple[dict, dict[str, dict[str, np.ndarray]]]:
    """What model.json says, and the weights as they are read for drawing."""
    model = description.read(folder)
    return json.loads((folder / "model.json").read_text()), {
        name: held(folder, model, name) for name in model.components
    }


def held(folder: Path, model: description.Description, name: str) -> dict[str, np.ndarray]:
    module = weights.load(folder / f"{name}.safetensors", model.family, model.components[name], model.recipe)
    return {k: np.array(v) for k, v in tree_flatten(module.parameters())}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict:
    """family -> (modules, diffusers folder, its conversion)"""
    root = tmp_path_factory.mktemp("saved")
    made = {}
    for family in ("sd1", "sd2", "sdxl"):
        parts = nets(family)
        source = folder(root / family, parts)
        made[family] = parts, source, convert.convert(source, root / f"{family}-out", dtype="float32")
    return made


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_folder_of_diffusers_keeps_every_number(saved, family):
    """Reference: the modules' own state. Exact; only the layout of convolutions differs."""
    parts, _, out = saved[family]
    model, ours = read(out)
    assert (model["family"], model["variant"]) == (family, "lcm" if family == "sd1" else "base")
    for name, part in parts.items():
        theirs = {k.removeprefix("text_model."): x for k, x in arrays(part).items() if "position_ids" not in k}
        assert ours[name].keys() == theirs.keys()
        for key, x in theirs.items():
            x = x.transpose(0, 2, 3, 1) if x.ndim == 4 else x
            assert np.array_equal(ours[name][key], x.reshape(ours[name][key].shape)), key


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_single_file_with_original_names_equals_its_folder(saved, tmp_path, family):
    parts, source, out = saved[family]
    file = single(tmp_path / "a.safetensors", family, parts)
    got = convert.convert(file, tmp_path / "out", dtype="float32", tokenizer=source / "tokenizer")
    theirs, ours = read(out), read(got)
    assert ours[0]["components"] == theirs[0]["components"]
    for key in ("family", "variant", "zero_negative", "tokenizers"):
        assert ours[0][key] == theirs[0][key], key
    assert ours[0]["schedule"] == theirs[0]["schedule"] | {"sampler": None}  # no file says it
    for name, tensors in theirs[1].items():
        assert (out / f"{name}.safetensors").read_bytes() == (got / f"{name}.safetensors").read_bytes(), name
        assert tensors.keys() == ours[1][name].keys()


def test_shards_and_variants_convert_like_the_plain_folder(saved, tmp_path):
    parts, _, out = saved["sdxl"]
    cut = folder(tmp_path / "cut", parts, max_shard_size="100KB")
    assert len(list((cut / "unet").glob("*-of-*"))) > 3
    half = folder(tmp_path / "half", parts, variant="fp16", max_shard_size="100KB")
    for source in (cut, half):
        got = convert.convert(source, tmp_path / f"{source.name}-out", dtype="float32")
        for name in parts:
            assert (out / f"{name}.safetensors").read_bytes() == (got / f"{name}.safetensors").read_bytes(), name


def test_older_attention_names_inside_a_folder(saved, tmp_path):
    parts, _, out = saved["sd1"]
    named = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = arrays(parts["vae"])
    for new, old in named.items():
        state = {k.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): x for k, x in state.items()}
    old = folder(tmp_path / "old", parts)
    full(old / "vae" / "diffusion_pytorch_model.safetensors", state)
    got = convert.convert(old, tmp_path / "out", dtype="float32")
    assert (out / "vae.safetensors").read_bytes() == (got / "vae.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_and_bits_reach_the_writer(saved, tmp_path, dtype):
    _, source, _ = saved["sdxl"]
    out = convert.convert(source, tmp_path / "out", bits=8, dtype=dtype)
    model = description.read(out)
    assert model.recipe == recipe(8, dtype)
    net = mx.load(str(out / "unet.safetensors"))
    assert net["conv_in.weight"].dtype == DTYPES[dtype]
    assert any(k.endswith(".scales") for k in net)


def test_a_clip_with_and_without_its_prefix_is_the_same(saved, tmp_path):
    parts, _, _ = saved["sdxl"]
    state = {k.removeprefix("text_model."): x for k, x in arrays(parts["text_encoder_2"]).items()}
    long = {k if k.startswith("text_projection") else f"text_model.{k}": x for k, x in state.items()}
    long["text_model.embeddings.position_ids"] = np.arange(77, dtype=np.int64)[None]
    found = [
        convert.open(full(tmp_path / f"{i}.safetensors", s)).components["text_encoder_2"]
        for i, s in enumerate((state, long))
    ]
    assert found[0].config == found[1].config
    for key, weight in found[0].weights.items():
        assert mx.array_equal(weight.array(), found[1].weights[key].array())


def test_every_parameter_is_filled_exactly_once(saved):
    for parts, source, _ in saved.values():
        checkpoint = convert.open(source)
        for name in parts:
            pieces = [w.pieces for w in checkpoint.components[name].weights.values()]
            filled = [[(p.tensor.file, p.tensor.name, p.part) for p in ps] for ps in pieces]
            filled = [piece for ps in filled for piece in ps]
            assert (
                len(filled)
                == len(set(filled))
                == len(tree_flatten(build.build(checkpoint.components[name].config).parameters()))
            )


# ---- the networks

PROTOCOL = {
    "recognise": ["keys"],
    "table": ["names", "like"],
    "config": ["shapes", "like"],
    "from_json": ["s", "cls"],
    "divided": ["config"],
}
OF_DENOISERS = {
    "layout": ["config", "components"],
    "variant": ["config", "called", "schedule"],
    "reads": ["config", "others"],
}


def test_every_network_has_a_module_with_the_protocol():
    """And every family a layout, whose components are those of its published models."""
    assert registry.MODULES.keys() == build.NETWORKS.keys()
    for name, module in registry.MODULES.items():
        denoises = name in {family.network for family in FAMILIES.values()}
        for function, parameters in (PROTOCOL | OF_DENOISERS if denoises else PROTOCOL).items():
            assert list(inspect.signature(getattr(module, function)).parameters) == parameters, (name, function)
    for model in MODELS.values():
        networks = {name: build.name_of(config) for name, config in model.networks.items()}
        whole = registry.LAYOUTS[model.family.name].networks
        assert networks == {name: whole[name] for name in whole if name in networks or model.repo is not None}


# ---- rules


@pytest.mark.parametrize(
    ("have", "want"),
    [
        ((5, 3, 1, 1), (5, 3)),
        ((5, 3), (5, 1, 1, 3)),
        ((5, 3, 2, 7), (5, 2, 7, 3)),
        ((4, 3, 3, 3), (4, 3, 3, 3)),
        ((), ()),
    ],
)
def test_fit_reads_the_layout_off_the_destination(have, want):
    """Reference: the four axes named. A 3x3 kernel over 3 channels looks the same both ways and is still transposed."""
    x = np.arange(int(np.prod(have)), dtype=np.float32).reshape(have)
    y = rules.fit(x, want)
    assert y.shape == want
    if len(have) == 4:
        o, i, h, w = 3, 2, have[2] - 1, 0
        assert y.reshape(have[0], have[2], have[3], have[1])[o, h, w, i] == x[o, i, h, w]
    assert np.array_equal(np.array(rules.fit(mx.array(x), want)), y)
    assert rules.fit(x, (*want, 2)) is None


def test_rows_apply_in_order_and_split_and_drop():
    table = [(r"^old\.", "new."), (r"\.qkv$", (".q", ".k")), (r"buffer", None)]
    assert rules.rename("old.qkv", table) == ("new.q", "new.k")
    assert rules.rename("old.buffer", table) == ()
    assert rules.rename("other", table) == ("other",)


# ---- what the network predicts, and its schedule


def spread(state: dict, std: float) -> dict:
    """An SD 2.x file whose telling biases have this standard deviation."""
    key = max(k for k in state if k.startswith("model.diffusion_model.output_blocks.") and "norm1.bias" in k)
    n = state[key].shape[0]
    return state | {key: np.tile(np.array([std, -std], np.float32), n // 2)}


@pytest.mark.parametrize(("std", "said"), [(0.2, "v"), (0.05, "eps"), (0.0, "v")])
def test_sd2_files_tell_v_from_epsilon_by_one_weight(saved, tmp_path, std, said):
    """ComfyUI's rule, bound 0.09; with weights that were never trained, diffusers': v."""
    parts, _, _ = saved["sd2"]
    tensors = files.read(single(tmp_path / "a.safetensors", "sd2", parts)).tensors
    state = {k: np.array(t.read()) for k, t in tensors.items()}
    file = full(tmp_path / "b.safetensors", spread(state, std))
    assert convert.open(file).prediction == said
    assert convert.open(file, prediction="eps").prediction == "eps"
    assert convert.open(file, prediction="x0").prediction == "x0"


def test_marks_and_metadata_tell_the_prediction(tmp_path):
    shapes = manifest("sdxl_base_unet")["tensors"]
    plain = convert.open(sparse(tmp_path / "a.safetensors", shapes))
    assert (plain.prediction, plain.schedule["zero_snr"], plain.schedule["spacing"]) == ("eps", False, "leading")
    marked = convert.open(sparse(tmp_path / "b.safetensors", shapes | {"v_pred": (0,), "ztsnr": (0,)}))
    assert (marked.prediction, marked.schedule["zero_snr"], marked.schedule["spacing"]) == ("v", True, "trailing")
    for word, kind in (("v", "v"), ("epsilon", "eps")):
        spec = sparse(tmp_path / "c.safetensors", shapes, metadata={"modelspec.prediction_type": word})
        assert convert.open(spec).prediction == kind


def test_unknown_predictions_are_refused(tmp_path):
    with pytest.raises(Error, match="'flow'"):
        convert.open(tmp_path, prediction="flow")


@pytest.mark.parametrize(
    ("made", "want", "prediction"),
    [
        (diffusers.PNDMScheduler(**BETAS, steps_offset=1), {"sampler": None, "spacing": "leading", "offset": 1}, "eps"),
        (diffusers.PNDMScheduler(skip_prk_steps=True), {"sampler": "pndm", "final_alpha_one": False}, "eps"),
        (diffusers.DDIMScheduler(prediction_type="v_prediction"), {"sampler": "ddim", "betas": "linear"}, "v"),
        (diffusers.EulerDiscreteScheduler(**BETAS), {"sampler": "euler", "spacing": "linspace"}, "eps"),
        (
            diffusers.EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing"),
            {"sampler": "euler_ancestral", "spacing": "trailing"},
            "eps",
        ),
        (
            diffusers.DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True, algorithm_type="sde-dpmsolver++"),
            {"sampler": "dpmpp_2m_sde", "spacing": "karras"},
            "eps",
        ),
        (
            diffusers.UniPCMultistepScheduler(beta_schedule="squaredcos_cap_v2"),
            {"sampler": "unipc", "betas": "cosine"},
            "eps",
        ),
        (diffusers.LCMScheduler(), {"sampler": "lcm", "spacing": "lcm", "betas": "scaled_linear", "end": 0.012}, "eps"),
        (
            diffusers.DDPMScheduler(beta_schedule="sigmoid", prediction_type="sample", rescale_betas_zero_snr=True),
            {"sampler": "ddpm", "betas": "sigmoid", "zero_snr": True},
            "x0",
        ),
    ],
    ids=lambda v: type(v).__name__ if hasattr(v, "config") else None,
)
def test_schedulers_in_our_terms(tmp_path, made, want, prediction):
    made.save_pretrained(tmp_path)
    schedule, said = scheduler.from_json(Settings(tmp_path / "scheduler_config.json"))
    assert said == prediction
    assert schedule.items() >= want.items()
    assert schedule.keys() == FAMILIES["sd1"].schedule.keys()


@pytest.mark.parametrize("cls", scheduler._CLASSES)
def test_what_a_scheduler_file_leaves_out_is_the_class_default(tmp_path, cls):
    """Reference: the signatures of diffusers' classes."""
    (tmp_path / "s.json").write_text(json.dumps({"_class_name": cls}))
    schedule, said = scheduler.from_json(Settings(tmp_path / "s.json"))
    assert said == "eps"
    if cls == "DPMSolverSDEScheduler":  # cannot be imported without torchsde
        return
    default = {k: p.default for k, p in inspect.signature(getattr(diffusers, cls).__init__).parameters.items()}
    assert scheduler._BETAS[default["beta_schedule"]] == schedule["betas"]
    assert (default["beta_start"], default["beta_end"]) == (schedule["start"], schedule["end"])
    assert default.get("set_alpha_to_one", True) == schedule["final_alpha_one"]
    if cls != "LCMScheduler":
        assert default.get("timestep_spacing", "linspace") == schedule["spacing"]


# ---- the folder that is written


def listing(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def test_an_older_model_folder_is_replaced_whole(saved, tmp_path):
    _, source, _ = saved["sd1"]
    out = tmp_path / "out"
    convert.convert(source, out, dtype="float32")
    (out / "leftover.txt").write_text("of the older one")
    convert.convert(source, out, dtype="float16")
    assert description.read(out).recipe.dtype == "float16"
    assert listing(out) == [
        "model.json",
        "text_encoder.safetensors",
        "tokenizer",
        "unet.safetensors",
        "vae.safetensors",
    ]
    assert listing(tmp_path) == ["out"]
    assert out.stat().st_mode & 0o777 == (Path(tmp_path / "x").mkdir() or (tmp_path / "x").stat().st_mode & 0o777)


def test_ctrl_c_leaves_nothing(saved, tmp_path):
    _, source, _ = saved["sd1"]

    def interrupt(stage: str, done: int, total: int) -> None:
        assert stage == "convert"
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.convert(source, tmp_path / "new" / "out", dtype="float32", progress=interrupt)
    assert listing(tmp_path) == []


def test_a_borrowed_tokenizer_fills_up_as_the_family_was_trained(saved, tmp_path):
    parts, source, _ = saved["sdxl"]
    file = single(tmp_path / "a.safetensors", "sdxl", parts)
    out = convert.convert(file, tmp_path / "out", dtype="float32", tokenizer=source / "tokenizer")
    pads = [
        json.loads((out / t / "tokenizer_config.json").read_text())["pad_token"] for t in ("tokenizer", "tokenizer_2")
    ]
    assert pads == ["<|endoftext|>", "!"]
    again = convert.convert(file, tmp_path / "again", dtype="float32", tokenizer=source)  # a whole model's folder
    for t in ("tokenizer", "tokenizer_2"):
        assert listing(again / t) == listing(source / t)


@pytest.mark.parametrize("bits", [None, 4])
def test_converting_holds_one_tensor_at_a_time(tmp_path, bits):
    """16 layers of 1.6 million numbers and a vocabulary of 12: the peak is a few times the largest tensor, also where
    the error of what is quantized is measured."""
    width, n = 512, 16
    config = {"hidden_size": width, "intermediate_size": 1024, "num_hidden_layers": n}
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in CLIPTextModel(CLIPTextConfig(**config, vocab_size=24000)).state_dict().items()}
    found = convert.open(sparse(tmp_path / "a.safetensors", shapes, dtype="F32")).components["text_encoder"]
    total, largest = 4 * found.parameters, 4 * 24000 * width
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    path, how = tmp_path / "text_encoder.safetensors", recipe(bits, "float32")
    with weights.Writer(path, FAMILIES["sd1"], found.config, how) as writer:
        for key, weight in found.weights.items():
            writer.put(key, weight.array())
    peak = mx.get_peak_memory() - before
    assert largest <= peak < 3 * largest < total


def test_check_is_what_inspect_says(capsys):
    from mlxdiff.convert import inspect as looked
    from mlxdiff.convert.__main__ import main

    for flags in ([], ["--json"]):
        assert looked.main(["storybook", *flags]) == 0
        says = capsys.readouterr().out
        assert main(["storybook", "--check", *flags]) == 0
        assert capsys.readouterr().out == says
    for wrong in (["storybook"], ["storybook", "--check", "-o", "x"], ["storybook", "-o", "x", "--json"]):
        with pytest.raises(SystemExit):
            main(wrong)
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("file", ["text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"])
def test_a_file_out_of_a_folder_is_the_component_its_folder_is(file, capsys):
    """Of the built-in model, whose norms have fewer groups than its shapes let one think; and what it belongs to."""
    from mlxdiff.convert import inspect as looked

    whole = builtin.FOLDER
    path = whole / f"{file}.safetensors"
    (one,), (folder,) = (list(convert.open(p).components.values()) for p in (path, path.parent))
    assert one.config == folder.config == convert.open(whole).components[path.parent.name].config
    assert looked.main([str(path)]) == 0
    said = capsys.readouterr().out
    assert "not a whole model: " in said
    assert f"the whole is {whole}" in said


def test_groups_that_no_shape_tells_are_not_blamed_on_the_file(tmp_path):
    (tmp_path / "mine.safetensors").symlink_to(builtin.FOLDER / "vae/diffusion_pytorch_model.safetensors")
    with pytest.raises(Error, match=r"no multiple of its 32 norm groups\. No shape shows .* config\.json says so"):
        convert.open(tmp_path / "mine.safetensors")


def test_settings_count_only_beside_a_component_s_own_name(tmp_path):
    for name in ("model", "diffusion_pytorch_model", "model.fp16", "diffusion_pytorch_model.fp16"):
        (tmp_path / f"{name}.safetensors").touch()
        assert files.settings(tmp_path / f"{name}.safetensors") is None
    (tmp_path / "config.json").write_text("{}")
    for name in ("model", "diffusion_pytorch_model", "model.fp16", "diffusion_pytorch_model.fp16"):
        assert files.settings(tmp_path / f"{name}.safetensors") == tmp_path / "config.json"
    for name in ("dreamshaper", "my_model", "models"):
        assert files.settings(tmp_path / f"{name}.safetensors") is None
    assert files.settings(tmp_path) == tmp_path / "config.json"
