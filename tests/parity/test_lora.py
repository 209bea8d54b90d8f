"""LoRA and its relatives. References: diffusers and peft on the same random weights (pictures: 40 dB as for whole
pipelines; changes of weights: 1e-5, since both sides multiply in float32); closed forms where peft has no kind."""

import copy
import json
import re
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from mlxdiff.adapters import Adapter
from mlxdiff.convert import lora
from mlxdiff.families import FAMILIES
from tests import original

from . import bfl, tiny
from .test_flux2_pipelines import made as klein
from .test_pipelines import DB, NEGATIVE, PROMPT, SEED, SIZE, oracle, psnr

pytestmark = pytest.mark.usefixtures("cache")


def zimage(folder):
    """No shape shows how many groups its VAE's norms have: as many as in the published one."""
    made = tiny.zimage(folder)
    made.register_modules(vae=tiny.vae(45, 0.3611, 16, shift_factor=0.1159))
    return made


KINDS = {"sd1": tiny.sd1, "sdxl": tiny.sdxl, "flux": tiny.flux, "sd3": lambda folder: tiny.sd3(folder, "3.5")}
KINDS |= {"zimage": zimage, "klein": klein}
TOKENS = 64  # of a text for FLUX.2, in place of 512: sooner
CFG = {"num_inference_steps": 4, "guidance_scale": 5.0, "negative_prompt": NEGATIVE}
OTHERS = {  # what diffusers is told in the place of CFG
    "flux": {"num_inference_steps": 4, "max_sequence_length": 512},
    "zimage": {"num_inference_steps": 4, "guidance_scale": 0.0},
    "klein": {"num_inference_steps": 4, "guidance_scale": 4.0, "max_sequence_length": TOKENS},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> (diffusers pipeline, our pipeline)"""
    with pytest.MonkeyPatch.context() as patch:
        family = FAMILIES["flux2"]
        patch.setitem(FAMILIES, "flux2", replace(family, text=replace(family.text, qwen_tokens=TOKENS)))
        yield tiny.saved(tmp_path_factory.mktemp("lora"), KINDS)


def layers(theirs: torch.nn.Module, kinds=(torch.nn.Linear,)) -> dict[str, torch.nn.Module]:
    found = {n: m for n, m in theirs.named_modules() if isinstance(m, kinds)}
    return {n: m for n, m in found.items() if min(m.weight.shape[:2]) > 1}


def low_rank(theirs: torch.nn.Module, prefix: str, seed: int, rank: int = 4, size: float = 0.5) -> dict:
    """A random change of every layer, in peft's spelling. size: how large, relative to the weights."""
    g, state = torch.Generator().manual_seed(seed), {}
    for name, layer in layers(theirs).items():
        out, columns = layer.weight.shape
        up, down = torch.randn(out, rank, generator=g), torch.randn(rank, columns, generator=g)
        up *= size * layer.weight.norm() / (up @ down).norm()
        state |= {f"{prefix}{name}.lora_A.weight": down, f"{prefix}{name}.lora_B.weight": up}
    return state


def drawn(pipe, *loras: str, **settings) -> np.ndarray:
    return np.asarray(pipe(PROMPT, seed=SEED, loras=loras, **(SIZE | settings)).image)


SETTINGS = {
    "sd1": {"steps": 4, "guidance": 5.0, "negative": NEGATIVE},
    "sdxl": {"steps": 4, "guidance": 5.0, "negative": NEGATIVE},
    "sd3": {"steps": 4, "guidance": 5.0, "negative": NEGATIVE},
    "flux": {"steps": 4},
    "zimage": {"steps": 4},
    "klein": {"steps": 4, "guidance": 4.0},
}


@pytest.mark.parametrize("name", KINDS)
def test_a_lora_of_denoiser_and_text_draws_as_in_diffusers(models, name, tmp_path):
    theirs, ours = models[name]
    denoiser = "unet" if hasattr(theirs, "unet") else "transformer"
    state = low_rank(getattr(theirs, denoiser), f"{denoiser}.", 1)
    encoders = {"sdxl": ("text_encoder", "text_encoder_2"), "zimage": (), "klein": ()}
    for encoder in encoders.get(name, ("text_encoder",)):  # diffusers reads no LoRA of Qwen
        state |= low_rank(getattr(theirs, encoder), f"{encoder}.", 2)
    file = tmp_path / "style.safetensors"
    save_file(state, file)
    assert sum(lora.read(file, ours.description).layers.values()) == len(state) // 2
    draws_as_in_diffusers(models, name, file)


def draws_as_in_diffusers(models: dict, name: str, file) -> None:
    """A file moves the picture, by as much as in diffusers; without it, the picture is what it was."""
    (theirs, ours), settings = models[name], OTHERS.get(name, CFG)
    bare = oracle(theirs, **settings)
    theirs.load_lora_weights(file.parent, weight_name=file.name, adapter_name="style")
    try:
        theirs.set_adapters(["style"], [0.6])
        want = oracle(theirs, **settings)
    finally:
        theirs.unload_lora_weights()
    assert psnr(want, bare) < DB - 10  # else the comparison proves nothing
    assert psnr(drawn(ours, f"{file}:0.6", **SETTINGS[name]), want) > DB
    assert psnr(drawn(ours, **SETTINGS[name]), bare) > DB  # taken off again


# ---- every kind of change


def weights(pipe, component: str, *adapters: tuple[Adapter, float]) -> dict[str, np.ndarray]:
    """The parameters of a network under adapters."""
    pipe.networks.adapt(list(adapters))
    try:
        return {n: np.array(v.astype(mx.float32)) for n, v in tree_flatten(pipe.networks.open(component).parameters())}
    finally:
        pipe.networks.adapt([])


CONVS = (torch.nn.Linear, torch.nn.Conv2d)
PEFT = {
    "lora": LoraConfig(r=3, lora_alpha=5),
    "rslora": LoraConfig(r=3, lora_alpha=5, use_rslora=True),
    "dora": LoraConfig(r=3, lora_alpha=5, use_dora=True),
    "loha": LoHaConfig(r=3, alpha=5),
    "loha with a core": LoHaConfig(r=3, alpha=5, use_effective_conv2d=True),
    "lokr": LoKrConfig(r=3, alpha=5),
    "lokr, both factored": LoKrConfig(r=2, alpha=5, decompose_both=True, decompose_factor=4),
    "lokr with a core": LoKrConfig(r=2, alpha=5, use_effective_conv2d=True),
}


@pytest.mark.parametrize("kind", PEFT)
def test_a_kind_changes_weights_as_in_peft(models, kind, tmp_path):
    """alpha is not the rank, and stored as each kind of file stores it: peft's in the header, LyCORIS' per layer."""
    theirs, ours = models["sd1"]
    net, config = copy.deepcopy(theirs.unet), copy.deepcopy(PEFT[kind])
    names = [*layers(net, CONVS)]
    config.target_modules = names
    inject_adapter_in_model(config, net)
    torch.manual_seed(3)
    state, metadata = {}, None
    for name, parameter in net.named_parameters():
        if any(part in name for part in ("lora_", "hada", "lokr")):
            if "magnitude" not in name:
                torch.nn.init.normal_(parameter, std=0.3)
            state[name.replace(".default", "")] = parameter.data.clone()
    if isinstance(config, LoraConfig):  # its settings in the header
        state = {f"unet.{name}": value for name, value in state.items()}
        said = {"unet.lora_alpha": 5, "unet.r": 3, "unet.use_rslora": config.use_rslora}
        metadata = {"lora_adapter_metadata": json.dumps(said)}
    elif isinstance(config, LoHaConfig):  # an alpha for each layer
        state = {f"unet.{name}": value for name, value in state.items()}
        state |= {f"unet.{name}.alpha": torch.tensor(5.0) for name in names}
    else:  # its settings beside it
        state = {f"base_model.model.{name}": value for name, value in state.items()}
        (tmp_path / "adapter_config.json").write_text(json.dumps({"alpha": 5, "r": config.r}))
    save_file(state, tmp_path / "a.safetensors", metadata)
    for module in net.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    adapter = lora.read(tmp_path / "a.safetensors", ours.description)
    changed, bare = weights(ours, "unet", (adapter, 1.0)), weights(ours, "unet")
    merged = {n.replace(".base_layer", ""): p for n, p in net.state_dict().items()}
    for name in names:
        want = merged[f"{name}.weight"].numpy()
        want = want.transpose(0, 2, 3, 1).reshape(changed[f"{name}.weight"].shape) if want.ndim == 4 else want
        assert np.abs(want - bare[f"{name}.weight"]).max() > 0.01 * np.abs(want).max()
        np.testing.assert_allclose(changed[f"{name}.weight"], want, atol=1e-5 * np.abs(want).max())


# ---- every spelling of one change


def kohya(state: dict, names: dict) -> dict:
    """names: our prefix and layer -> theirs. Their alpha is twice the rank, so their factors are half as large."""
    out = {}
    for key, value in state.items():
        name, _, kind = key.removesuffix(".weight").rpartition(".lora_")
        down = kind == "A"
        out[f"{names[name]}.lora_{'down' if down else 'up'}.weight"] = value.clone() if down else value / 2
        out[f"{names[name]}.alpha"] = torch.tensor(2.0 * state[f"{name}.lora_A.weight"].shape[0])
    return out


def renamed(state: dict, *pairs: tuple[str, str]) -> dict:
    out = {}
    for key, value in state.items():
        for old, new in pairs:
            key = re.sub(old, new, key)
        out[key] = value
    return out


def spellings_of_sd(state: dict) -> dict[str, dict]:
    names = sorted({key.rpartition(".lora_")[0] for key in state})
    net = [n.removeprefix("unet.") for n in names if n.startswith("unet.")]
    theirs = [n.removesuffix(".weight") for n in original.unet({f"{n}.weight": 0 for n in net})]
    original_names = dict(zip(net, theirs, strict=True))
    text = [n for n in names if n.startswith("text_encoder")]
    xl = any(n.startswith("text_encoder_2.") for n in names)
    tes = {"text_encoder": "te1" if xl else "te", "text_encoder_2": "te2"}
    comfy = {"text_encoder": "text_encoders.clip_l", "text_encoder_2": "text_encoders.clip_g"}

    def spelt(prefixes: dict, form: str, dot: str) -> dict:
        parts = [(n, *n.split(".", 1)) for n in text]
        return {
            n: form.format(prefixes[encoder]) + rest.removeprefix("text_model.").replace(".", dot)
            for n, encoder, rest in parts
        }

    text, dots = spelt(tes, "lora_{}_text_model_", "_"), spelt(comfy, "{}.transformer.text_model.", ".")
    flat = {f"unet.{n}": f"lora_unet_{n.replace('.', '_')}" for n in net}
    numbered = {f"unet.{n}": f"lora_unet_{o.replace('.', '_')}" for n, o in original_names.items()}
    dotted = {f"unet.{n}": f"diffusion_model.{o}" for n, o in original_names.items()}
    return {
        "kohya": kohya(state, flat | text),
        "kohya of SDXL": kohya(state, numbered | text),
        "ComfyUI": kohya(state, dotted | dots),
        "diffusers, old": renamed(state, (r"lora_A", "lora.down"), (r"lora_B", "lora.up")),
        "diffusers, older": renamed(state, (r"lora_A", "lora_linear_layer.down"), (r"lora_B", "lora_linear_layer.up")),
        "peft": renamed(state, (r"\.weight$", ".default.weight"), (r"^unet\.", "base_model.model.unet.")),
        "processors": renamed(
            state,
            (r"\.to_([qkv])\.lora_A", r".processor.to_\1_lora.down"),
            (r"\.to_([qkv])\.lora_B", r".processor.to_\1_lora.up"),
            (r"\.to_out\.0\.lora_A", ".processor.to_out_lora.down"),
            (r"\.to_out\.0\.lora_B", ".processor.to_out_lora.up"),
        ),
    }


def fused_as_bfl(state: dict) -> dict:
    """The factors of several layers side by side, on the diagonal."""
    fused, left = {}, {key.rpartition(".lora_")[0] for key in state if key.startswith("transformer.")}
    blocks = [(f"transformer_blocks.{i}.", f"double_blocks.{i}.", bfl.DOUBLE) for i in range(1)]
    blocks += [(f"single_transformer_blocks.{i}.", f"single_blocks.{i}.", bfl.SINGLE) for i in range(2)]
    for prefix, to, rows in [*blocks, ("", "", bfl.TOP)]:
        for ours, sources in rows:
            names = [f"transformer.{prefix}{s}" for s in sources]
            if names[0] not in left:
                continue
            ups = [state[f"{n}.lora_B.weight"] for n in names]
            if ours == "final_layer.adaLN_modulation.1":  # scale and shift
                ups = [torch.cat(ups[0].chunk(2)[::-1])]
            fused[f"{to}{ours}.lora_A.weight"] = torch.cat([state[f"{n}.lora_A.weight"] for n in names])
            fused[f"{to}{ours}.lora_B.weight"] = torch.block_diag(*ups)
            left -= set(names)
    assert not left
    return fused


def spellings_of_flux(state: dict) -> dict[str, dict]:
    """XLabs' files have attention alone."""
    fused = fused_as_bfl(state)
    text = {key: value for key, value in state.items() if key.startswith("text_encoder")}
    names = {key.rpartition(".lora_")[0] for key in fused}
    flat = {n: f"lora_unet_{n.replace('.', '_')}" for n in names}
    layers = sorted({key.rpartition(".lora_")[0] for key in text})
    kohyas = {"text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te3_"}
    comfys = {"text_encoder": "text_encoders.clip_l.transformer.text_model.",
              "text_encoder_2": "text_encoders.t5xxl.transformer."}  # fmt: skip
    parts = [(n, *n.split(".", 1)) for n in layers]
    one = {n: kohyas[encoder] + rest.replace(".", "_") for n, encoder, rest in parts}
    dots = [(rf"^{encoder}\.", prefix) for encoder, prefix in comfys.items()]
    other = {n: f"lora_transformer_{n.removeprefix('transformer.').replace('.', '_')}" for n in
             {key.rpartition(".lora_")[0] for key in state if key.startswith("transformer.")}}  # fmt: skip
    return {
        "kohya": kohya(fused | text, flat | one),
        "BFL": fused | text,
        "ComfyUI": {f"diffusion_model.{k}": v for k, v in fused.items()} | renamed(text, *dots),
        "peft": renamed(state, (r"\.weight$", ".default.weight"), (r"^transformer\.", "base_model.model.")),
        "diffusers, old": renamed(state, (r"lora_A", "lora.down"), (r"lora_B", "lora.up")),
        "OneTrainer": kohya(state, other | one),
        "XLabs": renamed(
            {k: v for k, v in fused.items() if re.search(r"^double.*attn\.(qkv|proj)\.", k)},
            (r"\.img_attn\.(qkv|proj)\.lora_A", r".processor.\1_lora1.down"),
            (r"\.img_attn\.(qkv|proj)\.lora_B", r".processor.\1_lora1.up"),
            (r"\.txt_attn\.(qkv|proj)\.lora_A", r".processor.\1_lora2.down"),
            (r"\.txt_attn\.(qkv|proj)\.lora_B", r".processor.\1_lora2.up"),
        ),
    }


def spellings_of_klein(state: dict) -> dict[str, dict]:
    """Those that diffusers reads too. Old exports of it lost the beginning of a name."""
    fused = fused_as_bfl(state)
    flat = {n: f"lora_unet_{n.replace('.', '_')}" for n in {key.rpartition(".lora_")[0] for key in fused}}
    dotted = {f"diffusion_model.{k}": v for k, v in fused.items()}
    return {
        "kohya": kohya(fused, flat),
        "ai-toolkit": dotted,
        "peft": {f"base_model.model.{k}": v for k, v in fused.items()},
        "older": renamed(dotted, (r"lora_A", "lora_down"), (r"lora_B", "lora_up")),
        "diffusers' names": renamed(state, (r"^transformer\.", "diffusion_model.")),
        "cut": renamed(state, (r"^transformer\.(tran(?=sformer_b))?", "diffusion_model.")),
    }


def spellings_of_sd3(state: dict) -> dict[str, dict]:
    """The original names, fused, in kohya's form."""
    fused, used = {}, set()
    for key in [k for k in state if k.startswith("transformer.") and k.endswith("lora_A.weight")]:
        name = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
        block = re.match(r"transformer_blocks\.(\d+)\.(attn2?)\.(to|add)_?([qkv])(_proj)?$", name)
        if block and block[4] == "q":
            group = [name.replace("to_q", f"to_{p}").replace("add_q", f"add_{p}") for p in "qkv"]
            side = "x_block" if block[3] == "to" else "context_block"
            new = f"joint_blocks.{block[1]}.{side}.{block[2]}.qkv"
        elif block:
            continue
        else:
            group, new = [name], sd3_name(name)
        used |= set(group)
        ups = [state[f"transformer.{n}.lora_B.weight"] for n in group]
        if new.startswith("final_layer.adaLN") or (new.endswith("adaLN_modulation.1") and "2.context" in new):
            ups = [torch.cat(ups[0].chunk(2)[::-1])]
        fused[f"{new}.lora_A.weight"] = torch.cat([state[f"transformer.{n}.lora_A.weight"] for n in group])
        fused[f"{new}.lora_B.weight"] = torch.block_diag(*ups)
    assert len(used) == len([k for k in state if k.startswith("transformer.")]) // 2
    names = {key.rpartition(".lora_")[0] for key in fused}
    text = {key: value for key, value in state.items() if key.startswith("text_encoder")}
    parts = [(n, *n.split(".", 1)) for n in sorted({key.rpartition(".lora_")[0] for key in text})]
    tes = {"text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_text_model_"}
    tes |= {"text_encoder_3": "lora_te3_"}
    one = {n: tes[e] + rest.removeprefix("text_model.").replace(".", "_") for n, e, rest in parts}
    comfys = [(r"^text_encoder\.(text_model\.)?", "text_encoders.clip_l.transformer.text_model.")]
    comfys += [(r"^text_encoder_2\.(text_model\.)?", "text_encoders.clip_g.transformer.text_model.")]
    comfys += [(r"^text_encoder_3\.", "text_encoders.t5xxl.transformer.")]
    flat = {n: f"lora_unet_{n.replace('.', '_')}" for n in names}
    return {
        "kohya": kohya(fused | text, flat | one),
        "original": {f"model.diffusion_model.{k}": v for k, v in fused.items()} | text,
        "ComfyUI": {f"diffusion_model.{k}": v for k, v in fused.items()} | renamed(text, *comfys),
        "bare": renamed(state, (r"^transformer\.", "")),
    }


def sd3_name(name: str) -> str:
    for old, new in (
        (r"^transformer_blocks\.(\d+)\.norm1\.linear$", r"joint_blocks.\1.x_block.adaLN_modulation.1"),
        (r"^transformer_blocks\.(\d+)\.norm1_context\.linear$", r"joint_blocks.\1.context_block.adaLN_modulation.1"),
        (r"^transformer_blocks\.(\d+)\.(attn2?)\.to_out\.0$", r"joint_blocks.\1.x_block.\2.proj"),
        (r"^transformer_blocks\.(\d+)\.attn\.to_add_out$", r"joint_blocks.\1.context_block.attn.proj"),
        (r"^transformer_blocks\.(\d+)\.ff\.net\.0\.proj$", r"joint_blocks.\1.x_block.mlp.fc1"),
        (r"^transformer_blocks\.(\d+)\.ff\.net\.2$", r"joint_blocks.\1.x_block.mlp.fc2"),
        (r"^transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj$", r"joint_blocks.\1.context_block.mlp.fc1"),
        (r"^transformer_blocks\.(\d+)\.ff_context\.net\.2$", r"joint_blocks.\1.context_block.mlp.fc2"),
        (r"^time_text_embed\.timestep_embedder\.linear_1$", "t_embedder.mlp.0"),
        (r"^time_text_embed\.timestep_embedder\.linear_2$", "t_embedder.mlp.2"),
        (r"^time_text_embed\.text_embedder\.linear_1$", "y_embedder.mlp.0"),
        (r"^time_text_embed\.text_embedder\.linear_2$", "y_embedder.mlp.2"),
        (r"^norm_out\.linear$", "final_layer.adaLN_modulation.1"),
        (r"^proj_out$", "final_layer.linear"),
    ):
        name = re.sub(old, new, name)
    return name


def spellings_of_zimage(state: dict) -> dict[str, dict]:
    """ComfyUI's queries, keys and values are one layer; ai-toolkit's are apart. Text encoders are named after Qwen."""
    fused = {k: v for k, v in state.items() if not re.search(r"\.attention\.to_[qkv]\.", k)}
    for name in {k.partition(".attention.to_q.")[0] for k in state if ".attention.to_q." in k}:
        down, up = ([state[f"{name}.attention.to_{p}.lora_{side}.weight"] for p in "qkv"] for side in "AB")
        fused |= {f"{name}.attention.qkv.lora_A.weight": torch.cat(down)}
        fused |= {f"{name}.attention.qkv.lora_B.weight": torch.block_diag(*up)}
    theirs = renamed(
        fused, (r"^transformer\.", "diffusion_model."), (r"attention\.to_out\.0", "attention.out"),
        (r"^text_encoder\.", "text_encoders.qwen3_4b.transformer.model."),
        (r"\.all_(x_embedder|final_layer)\.2-1\.", r".\1."),
    )  # fmt: skip
    return {
        "ComfyUI": theirs,
        "ai-toolkit": renamed(state, (r"^transformer\.", "diffusion_model."), (r"^text_encoder\.", r"\g<0>model.")),
        "kohya": kohya(state, {n: f"lora_unet_{n.removeprefix('transformer.').replace('.', '_')}" if n[0] == "t" and
                               n.startswith("transformer.") else f"lora_te1_model_{n.removeprefix('text_encoder.')}"
                               .replace(".", "_") for n in {k.rpartition(".lora_")[0] for k in state}}),
    }  # fmt: skip


SPELLINGS = {"sd1": spellings_of_sd, "sdxl": spellings_of_sd, "flux": spellings_of_flux, "sd3": spellings_of_sd3}
SPELLINGS |= {"zimage": spellings_of_zimage, "klein": spellings_of_klein}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_the_same_change(models, name, tmp_path):
    theirs, ours = models[name]
    denoiser = "unet" if name.startswith("sd1") or name == "sdxl" else "transformer"
    state = low_rank(getattr(theirs, denoiser), f"{denoiser}.", 5)
    for encoder in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        if hasattr(theirs, encoder) and name != "klein":  # for whose encoder there are no such files
            state |= low_rank(getattr(theirs, encoder), f"{encoder}.", 6)
    if name == "zimage":  # it reads the layer before the last one
        state = {k: v for k, v in state.items() if not k.startswith("text_encoder.layers.2.")}
    components = {key.partition(".")[0] for key in state}

    def after(spelled: dict) -> tuple[Adapter, dict]:
        save_file({k: v.contiguous() for k, v in spelled.items()}, tmp_path / "a.safetensors")
        adapter = lora.read(tmp_path / "a.safetensors", ours.description)
        return adapter, {f"{c}.{n}": v for c in components for n, v in weights(ours, c, (adapter, 1.0)).items()}

    _, want = after(state)
    bare = {f"{c}.{n}": v for c in components for n, v in weights(ours, c).items()}
    for spelling, spelled in SPELLINGS[name](state).items():
        adapter, got = after(spelled)
        touched = {f"{c}.{n}" for c, changes in adapter.changes.items() for n in changes}
        assert touched, spelling
        if spelling not in ("XLabs",):
            assert touched == {n for n in want if np.abs(want[n] - bare[n]).max() > 0}, spelling
        for n in touched:
            tolerance = 1e-5 * np.abs(want[n]).max()
            np.testing.assert_allclose(got[n], want[n], atol=tolerance, err_msg=f"{spelling}: {n}")


OF_BLOCKS = {"klein": r"transformer_blocks\.\d+\.(attn|ff)", "zimage": r"\.\d+\.(attention|feed_forward)\."}


@pytest.mark.parametrize("spelling", ["kohya", "ai-toolkit"])
@pytest.mark.parametrize("name", OF_BLOCKS)
def test_a_spelling_draws_as_in_diffusers(models, name, spelling, tmp_path):
    """Of the layers that public trainers change; diffusers reads kohya's files without the others."""
    state = low_rank(models[name][0].transformer, "transformer.", 5)
    spelled = SPELLINGS[name]({k: v for k, v in state.items() if re.search(OF_BLOCKS[name], k)})[spelling]
    save_file({k: v.contiguous() for k, v in spelled.items()}, tmp_path / "a.safetensors")
    draws_as_in_diffusers(models, name, tmp_path / "a.safetensors")


def test_xlabs_single_blocks_are_the_same_change(models, tmp_path):
    """Queries, keys and values are the first rows of a fused layer."""
    theirs, ours = models["flux"]
    state, spelled = low_rank(theirs.transformer, "transformer.", 5), {}
    state = {k: v for k, v in state.items() if re.search(r"\.single_.*\.(attn\.to_[qkv]|proj_out)\.", k)}
    for i in range(2):
        name = f"transformer.single_transformer_blocks.{i}"
        down, up = ([state[f"{name}.attn.to_{p}.lora_{side}.weight"] for p in "qkv"] for side in "AB")
        to = f"single_blocks.{i}.processor"
        spelled |= {f"{to}.qkv_lora.down.weight": torch.cat(down), f"{to}.qkv_lora.up.weight": torch.block_diag(*up)}
        spelled |= {f"{to}.proj_lora.down.weight": state[f"{name}.proj_out.lora_A.weight"]}
        spelled |= {f"{to}.proj_lora.up.weight": state[f"{name}.proj_out.lora_B.weight"]}
    got = []
    for i, each in enumerate((state, spelled)):
        save_file({k: v.contiguous() for k, v in each.items()}, tmp_path / f"{i}.safetensors")
        adapter = lora.read(tmp_path / f"{i}.safetensors", ours.description)
        got.append(weights(ours, "transformer", (adapter, 1.0)))
    bare = weights(ours, "transformer")
    assert sum(np.abs(got[0][n] - bare[n]).max() > 0 for n in bare) == 4
    for n, want in got[0].items():
        np.testing.assert_allclose(got[1][n], want, atol=1e-5 * np.abs(want).max(), err_msg=n)


# ---- textual inversion


def taught(tmp_path, *widths: int, n: int, form: str) -> str:
    g = torch.Generator().manual_seed(9)
    vectors = [2 * torch.randn(n, width, generator=g) for width in widths]
    keys = ("clip_l", "clip_g") if len(widths) == 2 else ("<moss>" if form == "diffusers" else "emb_params",)
    save_file(dict(zip(keys, vectors, strict=True)), tmp_path / "moss.safetensors")
    return str(tmp_path / "moss.safetensors")


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("form", ["diffusers", "A1111"])
def test_a_taught_word_draws_as_in_diffusers(models, tmp_path, n, form):
    theirs, ours = models["sd1"]
    prompt, file = "a <moss> house, <moss>s", taught(tmp_path, 48, n=n, form=form)
    settings = {"num_inference_steps": 4, "guidance_scale": 5.0, "negative_prompt": "<moss> fog", **SIZE}
    untaught = theirs(prompt, generator=torch.Generator().manual_seed(SEED), **settings).images[0]
    theirs.load_textual_inversion(file, token="<moss>")
    try:
        want = theirs(prompt, generator=torch.Generator().manual_seed(SEED), **settings).images[0]
    finally:
        theirs.unload_textual_inversion()
    assert psnr(np.asarray(want), np.asarray(untaught)) < DB - 10
    given = file if form == "diffusers" else f"{file}=<moss>"
    same = {"seed": SEED, "steps": 4, "guidance": 5.0, "negative": "<moss> fog"} | SIZE
    assert psnr(np.asarray(ours(prompt, embeddings=[given], **same).image), np.asarray(want)) > DB
    assert psnr(np.asarray(ours(prompt, **same).image), np.asarray(untaught)) > DB


def test_a_word_is_taught_to_both_encoders_of_sdxl(models, tmp_path):
    """The second one's pooled vector is read at the end of the text, not at the taught word, whose id is higher."""
    theirs, ours = models["sdxl"]
    prompt, file = "a <moss> house", taught(tmp_path, 32, 48, n=2, form="SDXL")
    state = load_file(file)
    settings = {"num_inference_steps": 4, "guidance_scale": 5.0, "negative_prompt": NEGATIVE, **SIZE}
    both = (("clip_l", theirs.text_encoder, theirs.tokenizer), ("clip_g", theirs.text_encoder_2, theirs.tokenizer_2))
    for key, encoder, tok in both:
        theirs.load_textual_inversion({"<moss>": state[key]}, text_encoder=encoder, tokenizer=tok)
    try:
        want = theirs(prompt, generator=torch.Generator().manual_seed(SEED), **settings).images[0]
    finally:
        for _, encoder, tok in both:
            theirs.unload_textual_inversion(text_encoder=encoder, tokenizer=tok)
    same = {"seed": SEED, "steps": 4, "guidance": 5.0, "negative": NEGATIVE} | SIZE
    got = np.asarray(ours(prompt, embeddings=[f"{file}=<moss>"], **same).image)
    assert psnr(got, np.asarray(want)) > DB
    assert psnr(np.asarray(ours(prompt, **same).image), np.asarray(want)) < DB - 10
