"""Every published file of these families is understood to the last tensor, and every other is named for what it is.
References: manifests of published files, whose names and shapes are facts, and files derived from those by original.py,
which is itself held to them."""

import json
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from mlxdiff import Error, convert
from mlxdiff.convert.inspect import main
from mlxdiff.families import MODELS

from . import original
from .checkpoints import MANIFESTS, manifest, sparse

CONFIGS = json.loads((Path(__file__).parent / "data" / "configs.json").read_text())

# manifest -> family
WHOLE = {
    "sd15_v1-5-pruned-emaonly": "sd1", "sdxl_base_1.0": "sdxl", "sdxl_refiner_1.0": "sdxl-refiner",
    "sd3_medium": "sd3", "sd3_medium_incl_clips": "sd3", "sd35_large": "sd3", "sd35_medium": "sd3",
}  # fmt: skip
# manifest -> (family, variant, component)
ALONE = {
    "comfy_t5xxl_fp16": ("t5", "base", "text_encoder"),
    "flux1-dev": ("flux", "base", "transformer"),
    "flux1-fill-dev": ("flux", "fill", "transformer"),
    "flux1-redux-dev": ("redux", "base", "redux"),
    "flux1-schnell": ("flux", "schnell", "transformer"),
    "flux2_dev": ("flux2-dev", "dev", "transformer"),
    "flux2_dev_transformer": ("flux2-dev", "dev", "transformer"),
    "flux2_klein_4b": ("flux2", "distilled", "transformer"),
    "flux2_klein_4b_transformer": ("flux2", "distilled", "transformer"),
    "flux2_vae": ("vae", "base", "vae"),
    "flux_ae": ("vae", "base", "vae"),
    "flux_dev_transformer": ("flux", "base", "transformer"),
    "flux_fill_dev_transformer": ("flux", "fill", "transformer"),
    "flux_redux_image_embedder": ("redux", "base", "redux"),
    "flux_redux_image_encoder": ("vision", "base", "image_encoder"),
    "flux_schnell_transformer": ("flux", "schnell", "transformer"),
    "flux_text_encoder_2": ("t5", "base", "text_encoder"),
    "flux_vae": ("vae", "base", "vae"),
    "ip_adapter_image_encoder_vit_h": ("vision", "base", "image_encoder"),
    "ip_adapter_sd15": ("ip-adapter", "base", "ip_adapter"),
    "qwen3_4b_text_encoder": ("qwen3", "base", "text_encoder"),
    "z_image_transformer": ("zimage", "base", "transformer"),
    "sd35_large_transformer": ("sd3", "base", "transformer"),
    "sd35_medium_transformer": ("sd3", "base", "transformer"),
    "sd3_medium_transformer": ("sd3", "base", "transformer"),
    "sd3_vae": ("vae", "base", "vae"),
    "t5xxl_encoder": ("t5", "base", "text_encoder"),
    "comfy_clip_g": ("clip-g", "base", "text_encoder_2"),
    "comfy_clip_l": ("clip", "base", "text_encoder"),
    "flux_text_encoder": ("clip", "base", "text_encoder"),
    "lcm_dreamshaper_v7_unet": ("sd1", "lcm", "unet"),
    "sd15_controlnet_canny": ("controlnet", "base", "controlnet"),
    "sd15_controlnet_canny_single": ("controlnet", "base", "controlnet"),
    "sdxl_controlnet_canny": ("controlnet", "base", "controlnet"),
    "sd15_inpainting_unet": ("sd1", "inpaint", "unet"),
    "sd15_text_encoder": ("clip", "base", "text_encoder"),
    "sd15_unet": ("sd1", "base", "unet"),
    "sd15_vae": ("vae", "base", "vae"),
    "sd15_vae_newnames": ("vae", "base", "vae"),
    "sd15_vae_single": ("vae", "base", "vae"),
    "sd21_text_encoder": ("clip", "base", "text_encoder"),
    "sd21_text_encoder_posids": ("clip", "base", "text_encoder"),
    "sd21_unet": ("sd2", "base", "unet"),
    "sd21_vae": ("vae", "base", "vae"),
    "sd3_text_encoder": ("clip", "base", "text_encoder"),
    "sd3_text_encoder_2": ("clip-g", "base", "text_encoder_2"),
    "sdxl_base_unet": ("sdxl", "base", "unet"),
    "sdxl_inpainting_unet": ("sdxl", "inpaint", "unet"),
    "sdxl_refiner_unet": ("sdxl-refiner", "base", "unet"),
    "sdxl_text_encoder": ("clip", "base", "text_encoder"),
    "sdxl_text_encoder_2": ("clip-g", "base", "text_encoder_2"),
    "sdxl_vae": ("vae", "base", "vae"),
    "taef1": ("taesd", "base", "taesd"),
    "taesd": ("taesd", "base", "taesd"),
    "taesd3": ("taesd", "base", "taesd"),
    "taesd_decoder_single": ("taesd", "base", "taesd"),
    "taesdxl": ("taesd", "base", "taesd"),
    "taesdxl_decoder_single": ("taesd", "base", "taesd"),
}
BUFFERS = (
    "vision_model.head.",
    "num_batches_tracked",
    "position_ids",
    "model_ema.",
    "alphas_cumprod",
    "betas",
)  # and what is not read
# By what our parameters are counted: such files take fused layers apart, or hold the words twice.
LIKE = {
    "comfy_t5xxl_fp16": "t5xxl_encoder",
    "flux2_dev_transformer": "flux2_dev",
    "flux2_klein_4b_transformer": "flux2_klein_4b",
    "flux_dev_transformer": "flux1-dev",
    "flux_fill_dev_transformer": "flux1-fill-dev",
    "flux_schnell_transformer": "flux1-schnell",
}
NO_PROJECTION = {"text_encoder": "comfy_clip_l"}  # of single SD3 files: the reference puts an identity in its place


def count(name: str) -> dict[str, int]:
    """Tensors and parameters of a component's manifest, buffers left out."""
    held = manifest(LIKE.get(name, name))["tensors"]
    dropped = (*BUFFERS, "encoder.layers.") if name.startswith("tae") else BUFFERS  # of a TAESD, the decoder is read
    if name.startswith("qwen3"):  # the last layer and the norm after it are not read
        dropped = (*BUFFERS, "model.layers.35.", "model.norm.")
    held = [s for k, s in held.items() if not any(b in k for b in dropped)]
    return {"tensors": len(held), "parameters": sum(int(np.prod(s)) for s in held)}


def check(path: Path, capsys) -> dict:
    """What `inspect --json` prints, its exit code being 0; of components what is counted here."""
    code = main([str(path), "--json"])
    out = capsys.readouterr()
    assert code == 0, out.err
    said = json.loads(out.out)
    assert (said["unmapped"], said["missing"]) == ({}, [])
    said["components"] = {n: {k: c[k] for k in ("tensors", "parameters")} for n, c in said["components"].items()}
    return said


def published(tmp_path: Path, name: str) -> Path:
    m = manifest(name)
    return sparse(tmp_path / f"{name}.safetensors", m["tensors"], dtype=m["dtype"], dtypes=m.get("dtypes"))


@pytest.mark.parametrize("name", WHOLE)
def test_published_single_files(tmp_path, capsys, name):
    said = check(published(tmp_path, name), capsys)
    assert (said["family"], said["variant"], said["layout"]) == (WHOLE[name], "base", "single-file")
    parts = manifest(name)["converts_to"]
    parts |= NO_PROJECTION if WHOLE[name] == "sd3" and "text_encoder" in parts else {}
    assert said["components"] == {part: count(m) for part, m in parts.items()}


@pytest.mark.parametrize("name", ALONE)
def test_published_components_alone(tmp_path, capsys, name):
    said = check(published(tmp_path, name), capsys)
    family, variant, part = ALONE[name]
    assert (said["family"], said["variant"]) == (family, variant)
    assert said["components"] == {part: count(name)}


FOREIGN = {
    "lora_bfl_flux_control": "LoRA", "lora_diffusers_sd15_lora_down_up": "LoRA",
    "lora_kohya_flux": "LoRA", "lora_kohya_sd15": "LoRA", "lora_kohya_sdxl": "LoRA", "lora_lcm_sd15": "LoRA",
    "lora_peft_flux_aitoolkit": "LoRA", "lora_peft_flux_dreambooth": "LoRA", "lora_peft_sd15_unet": "LoRA",
    "lora_peft_sd15_unet_te": "LoRA", "lora_peft_sdxl_unet": "LoRA",
    "taesd_encoder_single": "encoder of a TAESD", "taesdxl_encoder_single": "encoder of a TAESD",
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_other_files_are_named_for_what_they_are(tmp_path, name):
    with pytest.raises(Error) as e:
        convert.open(published(tmp_path, name))
    assert FOREIGN[name] in e.value.problem


def test_every_manifest_is_in_one_of_the_lists():
    assert {p.name.removesuffix(".json.gz") for p in MANIFESTS.glob("*.gz")} == {*WHOLE, *ALONE, *FOREIGN}


# Files of the same families that are published and have no manifest here, derived from those that have.


def shapes(state: dict) -> dict:
    return {k: tuple(x.shape) for k, x in state.items()}


def hollow(name: str) -> dict:
    return {k: np.broadcast_to(np.int8(0), s) for k, s in manifest(name)["tensors"].items()}


def ldm(unet: str, vae: str, **texts: dict) -> dict:
    state = original.under("model.diffusion_model.", original.unet(hollow(unet)))
    state |= original.under("first_stage_model.", original.vae(hollow(vae)))
    for prefix, text in texts.items():
        state |= original.under({"l": "cond_stage_model.transformer.", "h": "cond_stage_model.model."}[prefix], text)
    return shapes(state)


def open_clip_h() -> dict:
    return original.open_clip(hollow("sd21_text_encoder"), spare=True, projection=np.zeros((1024, 1024), np.int8))


def test_the_inverse_tables_give_the_published_names():
    """original.py against the manifests: what is left over is schedule buffers and counters."""
    made = ldm("sd15_unet", "sd15_vae", l=hollow("sd15_text_encoder"))
    facts = {k: tuple(s) for k, s in manifest("sd15_v1-5-pruned-emaonly")["tensors"].items()}
    assert made.items() <= facts.items()
    assert all("." not in k or k.startswith("model_ema.") for k in facts.keys() - made.keys())
    facts = {k: tuple(s) for k, s in manifest("sdxl_refiner_1.0")["tensors"].items()}
    text = original.under("conditioner.embedders.0.model.", original.open_clip(hollow("sdxl_text_encoder_2"), False))
    assert ldm("sdxl_refiner_unet", "sdxl_vae") | shapes(text) == facts


SD1_COUNTS = {"text_encoder": "sd15_text_encoder", "unet": "sd15_unet", "vae": "sd15_vae"}
SD2_COUNTS = {"text_encoder": "sd21_text_encoder", "unet": "sd21_unet", "vae": "sd21_vae"}
SDXL_COUNTS = manifest("sdxl_base_1.0")["converts_to"]


def v15() -> dict:
    return {k: tuple(s) for k, s in manifest("sd15_v1-5-pruned-emaonly")["tensors"].items()}


def xl() -> dict:
    return {k: tuple(s) for k, s in manifest("sdxl_base_1.0")["tensors"].items()}


def facts(name: str) -> dict:
    return {k: tuple(s) for k, s in manifest(name)["tensors"].items()}


def ema(held: dict) -> dict:
    """With the averaged copies of full training checkpoints: the U-Net's names without their dots."""
    prefix = "model.diffusion_model."
    copies = {k.removeprefix("model.").replace(".", ""): s for k, s in held.items() if k.startswith(prefix)}
    return held | {f"model_ema.{k}": s for k, s in copies.items()}


def renamed(held: dict, old: str, new: str) -> dict:
    assert any(old in k for k in held)
    return {k.replace(old, new): s for k, s in held.items()}


def without(held: dict, *words: str) -> dict:
    assert all(any(w in k for k in held) for w in words)
    return {k: s for k, s in held.items() if not any(w in k for w in words)}


LDM = "model.diffusion_model."
CLIP_L, CLIP_G = "conditioner.embedders.0.", "conditioner.embedders.1.model."


# name -> (shapes, family, variant, component -> the manifest that counts it)
def z_image() -> dict[str, tuple]:
    """The published transformer's shapes under ComfyUI's names."""
    made = {}
    for name, shape in facts("z_image_transformer").items():
        name = name.replace("all_x_embedder.2-1", "x_embedder").replace("all_final_layer.2-1", "final_layer")
        name = name.replace("norm_q", "q_norm").replace("norm_k", "k_norm").replace("to_out.0", "out")
        if ".to_q." in name:
            made[name.replace("to_q", "qkv")] = (3 * shape[0], shape[1])
        elif ".to_k." not in name and ".to_v." not in name:
            made[name] = shape
    return made


DERIVED = {
    "v1-5-pruned, with its full EMA": (lambda: ema(v15()), "sd1", "base", SD1_COUNTS),
    "SD1 without buffers": (
        lambda: ldm("sd15_unet", "sd15_vae", l=without(hollow("sd15_text_encoder"), "position_ids")),
        "sd1", "base", SD1_COUNTS,
    ),
    "SD1 of a trainer without text_model.": (lambda: renamed(v15(), "text_model.", ""), "sd1", "base", SD1_COUNTS),
    "SD1 merged, saved by ComfyUI": (
        lambda: renamed(v15(), "cond_stage_model.", "cond_stage_model.clip_l.")
        | {"cond_stage_model.clip_l.transformer.text_projection.weight": (768, 768)}
        | {"cond_stage_model.logit_scale": ()}
        | {"embedding_manager.embedder.transformer.text_model.final_layer_norm.bias": (768,)},
        "sd1", "base", SD1_COUNTS,
    ),
    "SD1 inpainting": (
        lambda: ldm("sd15_inpainting_unet", "sd15_vae", l=hollow("sd15_text_encoder")),
        "sd1", "inpaint", SD1_COUNTS | {"unet": "sd15_inpainting_unet"},
    ),
    "LCM in one file": (
        lambda: ldm("lcm_dreamshaper_v7_unet", "sd15_vae", l=hollow("sd15_text_encoder")),
        "sd1", "lcm", SD1_COUNTS | {"unet": "lcm_dreamshaper_v7_unet"},
    ),
    "SD1 with the newer attention names inside": (
        lambda: renamed(v15(), "mid.attn_1.q.", "mid_block.attentions.0.to_q."),
        "sd1", "base", SD1_COUNTS,
    ),
    "SD1 U-Net and text encoder, no VAE": (
        lambda: without(v15(), "first_stage_model."),
        "sd1", "base", {k: SD1_COUNTS[k] for k in ("text_encoder", "unet")},
    ),
    "SD1 U-Net, prefix and all": (
        lambda: original.under("model.diffusion_model.", shapes(original.unet(hollow("sd15_unet")))),
        "sd1", "base", {"unet": "sd15_unet"},
    ),
    "SDXL U-Net, original names, no prefix": (
        lambda: shapes(original.unet(hollow("sdxl_base_unet"))),
        "sdxl", "base", {"unet": "sdxl_base_unet"},
    ),
    "SDXL refiner U-Net, original names": (
        lambda: shapes(original.unet(hollow("sdxl_refiner_unet"))),
        "sdxl-refiner", "base", {"unet": "sdxl_refiner_unet"},
    ),
    "SD1 VAE with its prefix": (
        lambda: original.under("first_stage_model.", shapes(original.vae(hollow("sd15_vae")))),
        "vae", "base", {"vae": "sd15_vae"},
    ),
    "VAE of a training run": (
        lambda: manifest("sd15_vae_single")["tensors"] | {"loss.logvar": (), "loss.discriminator.main.0.bias": (64,)},
        "vae", "base", {"vae": "sd15_vae"},
    ),
    "SD2": (lambda: ldm("sd21_unet", "sd21_vae", h=open_clip_h()), "sd2", "base", SD2_COUNTS),
    "SD2 with EMA": (lambda: ema(ldm("sd21_unet", "sd21_vae", h=open_clip_h())), "sd2", "base", SD2_COUNTS),
    "SD2 exported from diffusers: 23 layers": (
        lambda: ldm("sd21_unet", "sd21_vae", h=original.open_clip(hollow("sd21_text_encoder"), spare=False)),
        "sd2", "base", SD2_COUNTS,
    ),
    "SD2 without its projection": (
        lambda: without(ldm("sd21_unet", "sd21_vae", h=open_clip_h()), "text_projection", "logit_scale"),
        "sd2", "base", SD2_COUNTS,
    ),
    "SD2 exported from diffusers and given a projection": (
        lambda: ldm("sd21_unet", "sd21_vae", h=original.open_clip(hollow("sd21_text_encoder"), spare=False))
        | {"cond_stage_model.model.text_projection": (1024, 1024)},
        "sd2", "base", SD2_COUNTS,
    ),
    "SD-Turbo, with the newer prefix": (
        lambda: renamed(ldm("sd21_unet", "sd21_vae", h=open_clip_h()), "cond_stage_model.", "conditioner.embedders.0."),
        "sd2", "base", SD2_COUNTS,
    ),
    "SD2 inpainting": (
        lambda: ldm("sd21_unet", "sd21_vae", h=open_clip_h()) | {f"{LDM}input_blocks.0.0.weight": (320, 9, 3, 3)},
        "sd2", "inpaint", {k: v for k, v in SD2_COUNTS.items() if k != "unet"},
    ),
    "SD1 that edits by instruction": (
        lambda: v15() | {f"{LDM}input_blocks.0.0.weight": (320, 8, 3, 3)},
        "sd1", "edit", {k: v for k, v in SD1_COUNTS.items() if k != "unet"},
    ),
    "SDXL merged": (
        lambda: xl() | {
            f"{CLIP_L}logit_scale": (), f"{CLIP_L}transformer.text_projection.weight": (768, 768),
            f"{CLIP_G}transformer.text_model.embeddings.position_ids": (1, 77), "denoiser.sigmas": (1000,),
        },
        "sdxl", "base", SDXL_COUNTS,
    ),
    "SDXL v-prediction": (lambda: xl() | {"v_pred": (0,), "ztsnr": (0,)}, "sdxl", "base", SDXL_COUNTS),
    "SDXL with transformers' names for CLIP-G": (
        lambda: without(xl(), CLIP_G)
        | original.under(f"{CLIP_G}transformer.", without(shapes(hollow("sdxl_text_encoder_2")), "text_projection"))
        | {f"{CLIP_G}text_projection": (1280, 1280)},
        "sdxl", "base", SDXL_COUNTS,
    ),
    "SDXL inpainting": (
        lambda: without(xl(), "model.diffusion_model.")
        | original.under("model.diffusion_model.", shapes(original.unet(hollow("sdxl_inpainting_unet")))),
        "sdxl", "inpaint", SDXL_COUNTS | {"unet": "sdxl_inpainting_unet"},
    ),
    "SD3 with all its encoders": (
        lambda: facts("sd3_medium_incl_clips")
        | original.under("text_encoders.t5xxl.transformer.", facts("t5xxl_encoder")),
        "sd3", "base",
        {"text_encoder": "comfy_clip_l", "text_encoder_2": "sd3_text_encoder_2", "text_encoder_3": "t5xxl_encoder",
         "transformer": "sd3_medium_transformer", "vae": "sd3_vae"},
    ),
    "SD3.5 transformer alone, no prefix": (
        lambda: {k.removeprefix(LDM): s for k, s in facts("sd35_medium").items() if k.startswith(LDM)},
        "sd3", "base", {"transformer": "sd35_medium_transformer"},
    ),
    "SD3 medium's transformer alone, in ComfyUI's prefix": (
        lambda: {k: s for k, s in facts("sd3_medium").items() if k.startswith(LDM)},
        "sd3", "base", {"transformer": "sd3_medium_transformer"},
    ),
    "SD3.5's transformer of a saved pipeline": (
        lambda: original.under("transformer.", facts("sd35_large_transformer")),
        "sd3", "base", {"transformer": "sd35_large_transformer"},
    ),
    "SD3 that lost its VAE": (
        lambda: without(facts("sd3_medium_incl_clips"), "first_stage_model."),
        "sd3", "base",
        {"text_encoder": "comfy_clip_l", "text_encoder_2": "sd3_text_encoder_2",
         "transformer": "sd3_medium_transformer"},
    ),
    "FLUX's transformer of a saved pipeline": (
        lambda: original.under("transformer.", facts("flux_schnell_transformer")),
        "flux", "schnell", {"transformer": "flux1-schnell"},
    ),
    "FLUX Fill, in ComfyUI's prefix": (
        lambda: original.under(LDM, facts("flux1-fill-dev")), "flux", "fill", {"transformer": "flux1-fill-dev"},
    ),
    "FLUX in one file, saved by ComfyUI": (
        lambda: original.under(LDM, facts("flux1-schnell")) | original.under("vae.", facts("flux_ae"))
        | original.under("text_encoders.clip_l.transformer.", facts("comfy_clip_l"))
        | {"text_encoders.clip_l.transformer.text_projection.weight": (768, 768)}
        | {"text_encoders.clip_l.logit_scale": ()}
        | original.under("text_encoders.t5xxl.transformer.", facts("comfy_t5xxl_fp16"))
        | {"text_encoders.t5xxl.logit_scale": ()},
        "flux", "schnell",
        {"text_encoder": "comfy_clip_l", "text_encoder_2": "t5xxl_encoder", "transformer": "flux1-schnell",
         "vae": "flux_vae"},
    ),
    "FLUX saved by a newer ComfyUI, a tokenizer beside T5": (
        lambda: original.under(LDM, renamed(facts("flux1-dev"), "_norm.scale", "_norm.weight"))
        | original.under("text_encoders.t5xxl.transformer.", facts("t5xxl_encoder"))
        | {"text_encoders.t5xxl.spiece_model": (9,)},
        "flux", "base", {"text_encoder_2": "t5xxl_encoder", "transformer": "flux1-dev"},
    ),
    "T5 saved by ComfyUI": (
        lambda: facts("comfy_t5xxl_fp16") | {"logit_scale": (), "spiece_model": (9,)},
        "t5", "base", {"text_encoder": "t5xxl_encoder"},
    ),
    "T5 taken out of ComfyUI's one file": (
        lambda: original.under("text_encoders.t5xxl.transformer.", facts("comfy_t5xxl_fp16")),
        "t5", "base", {"text_encoder": "t5xxl_encoder"},
    ),
    "Qwen3 without its prefix, and its head": (
        lambda: {k.removeprefix("model."): s for k, s in facts("qwen3_4b_text_encoder").items()}
        | {"lm_head.weight": (151936, 2560), "logit_scale": ()},
        "qwen3", "base", {"text_encoder": "qwen3_4b_text_encoder"},
    ),
    "Qwen3 taken out of ComfyUI's one file": (
        lambda: original.under("text_encoders.qwen3_4b.transformer.", facts("qwen3_4b_text_encoder"))
        | {"text_encoders.qwen3_4b.logit_scale": ()},
        "qwen3", "base", {"text_encoder": "qwen3_4b_text_encoder"},
    ),
    "CLIP-G taken out of ComfyUI's one file": (
        lambda: original.under("text_encoders.clip_g.transformer.", facts("comfy_clip_g"))
        | {"text_encoders.clip_g.logit_scale": ()},
        "clip-g", "base", {"text_encoder_2": "sd3_text_encoder_2"},
    ),
    "a whole CLIP-L, its eyes too": (
        lambda: facts("comfy_clip_l") | {"text_projection.weight": (768, 768), "logit_scale": ()}
        | {"vision_model.post_layernorm.bias": (1024,), "visual_projection.weight": (768, 1024)},
        "clip", "base", {"text_encoder": "sd3_text_encoder"},
    ),
    "FLUX Canny or Depth": (
        lambda: facts("flux1-dev") | {"img_in.weight": (3072, 128)}, "flux", "control", {},
    ),
    "FLUX trained to another depth": (
        lambda: without(facts("flux1-dev"), *(f"double_blocks.{i}." for i in range(8, 19))),
        "flux", "base", {},
    ),
    "Z-Image in ComfyUI's names": (
        lambda: z_image() | {"norm_final.weight": (3840,)},
        "zimage", "base", {"transformer": "z_image_transformer"},
    ),
    "Z-Image in ComfyUI's prefix, with its encoder": (
        lambda: original.under(LDM, z_image())
        | original.under("text_encoders.qwen3_4b.transformer.", facts("qwen3_4b_text_encoder"))
        | original.under("vae.", facts("flux_ae")),
        "zimage", "base",
        {"transformer": "z_image_transformer", "text_encoder": "qwen3_4b_text_encoder", "vae": "flux_vae"},
    ),
    "a ControlNet with the model that it was trained with": (
        lambda: v15() | facts("sd15_controlnet_canny_single"),
        "controlnet", "base", {"controlnet": "sd15_controlnet_canny_single"},
    ),
    "SDXL without text encoders": (
        lambda: without(xl(), "conditioner."),
        "sdxl", "base", {k: SDXL_COUNTS[k] for k in ("unet", "vae")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["F16", "F8_E4M3"])
@pytest.mark.parametrize("name", DERIVED)
def test_files_like_the_published(tmp_path, capsys, name, dtype):
    make, family, variant, counts = DERIVED[name]
    held = make()
    dtypes = {k: "I64" for k in held if "position_ids" in k} if dtype == "F16" else {}  # merges cast even those
    said = check(sparse(tmp_path / "a.safetensors", held, dtype=dtype, dtypes=dtypes), capsys)
    assert (said["family"], said["variant"]) == (family, variant)
    assert said["components"].items() >= {part: count(m) for part, m in counts.items()}.items()
    assert len(said["components"]) == len(counts) or variant in ("inpaint", "edit") or not counts


REFUSED = {
    "T5 in scaled 8-bit numbers": (lambda: facts("t5xxl_encoder") | {"scaled_fp8": (0,)}, "scaled 8-bit numbers"),
    "FLUX in scaled 8-bit numbers": (
        lambda: facts("flux1-dev") | {"double_blocks.0.img_attn.proj.weight_scale": ()},
        "scaled 8-bit numbers",
    ),
    "FLUX by Nunchaku": (
        lambda: facts("flux_dev_transformer") | {"transformer_blocks.0.attn.to_q.qweight": (9, 9)},
        "Nunchaku",
    ),
    "FLUX by another MLX program": (
        lambda: facts("flux_dev_transformer") | {"transformer_blocks.0.attn.to_q.scales": (9, 9)},
        "with MLX",
    ),
    "a FLUX LoRA of XLabs": (
        lambda: {"double_blocks.0.processor.proj_lora1.down.weight": (16, 3072)},
        "a LoRA",
    ),
    "FLUX in four bits": (lambda: facts("flux1-dev") | {"img_in.weight.absmax": (3072,)}, "bitsandbytes"),
    "HunyuanVideo": (
        lambda: facts("flux1-dev") | {"txt_in.individual_token_refiner.blocks.0.norm1.bias": (3072,)},
        "HunyuanVideo",
    ),
    "Playground 2.5": (lambda: xl() | {"edm_mean": (1, 4, 1, 1), "edm_std": (1, 4, 1, 1)}, "EDM noise"),
    "CosXL": (lambda: xl() | {"edm_vpred.sigma_max": (), "edm_vpred.sigma_min": ()}, "EDM noise"),
    "SD2 depth": (
        lambda: ldm("sd21_unet", "sd21_vae", h=open_clip_h()) | {"depth_model.model.pretrained.x": (1,)},
        "a depth",
    ),
    "an embedding": (lambda: {"emb_params": (4, 768)}, "a textual inversion"),
    "an embedding for SDXL": (lambda: {"clip_g": (4, 1280), "clip_l": (4, 768)}, "a textual inversion"),
    "AnimateDiff": (lambda: {"down_blocks.0.motion_modules.0.temporal_transformer.norm.bias": (320,)}, "AnimateDiff"),
    "Lumina-Image 2": (
        lambda: {k: v for k, v in z_image().items() if "pad_token" not in k},
        "a Lumina-Image 2 model",
    ),
    "Z-Image Omni": (lambda: z_image() | {"siglip_embedder.0.weight": (1152,)}, "a Z-Image Omni model"),
    "a Z-Image ControlNet": (lambda: {"control_layers.0.before_proj.weight": (3840, 3840)}, "a ControlNet"),
    "a language model": (lambda: {"model.layers.0.self_attn.q_proj.weight": (8, 8)}, "no checkpoint that is known"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_near_relatives_are_refused_by_name(tmp_path, name):
    make, named = REFUSED[name]
    with pytest.raises(Error) as e:
        convert.open(sparse(tmp_path / "a.safetensors", make()))
    assert named in e.value.problem


def distilled(kind: str):
    """U-Nets with fewer blocks than their family: diffusers' class with the published settings, without weights."""
    if kind == "small-sd":
        settings = {"layers_per_block": 1, "mid_block_type": None, "cross_attention_dim": 768}
    else:
        settings = CONFIGS["sdxl_base"]["components"]["unet"]["config"] | {
            "mid_block_type": "UNetMidBlock2D",
            "transformer_layers_per_block": [1, 2, 4],
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        }
        settings = {k: v for k, v in settings.items() if not k.startswith("_")}
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(**settings)


@pytest.mark.parametrize(("kind", "family"), [("small-sd", "sd1"), ("SSD-1B", "sdxl")])
def test_distilled_unets_in_every_form(tmp_path, capsys, kind, family):
    net = distilled(kind)
    state = {k: np.broadcast_to(np.int8(0), v.shape) for k, v in net.state_dict().items()}
    counts = {"unet": {"tensors": len(state), "parameters": sum(x.size for x in state.values())}}
    file = sparse(tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors", shapes(state))
    net.save_config(tmp_path / "unet")
    paths = (file, tmp_path / "unet", sparse(tmp_path / "a.safetensors", shapes(original.unet(state))))
    for path in paths:
        said = check(path, capsys)
        assert (said["family"], said["components"]) == (family, counts)
    configs = [convert.open(path).components["unet"].config for path in paths]
    assert configs[0] == configs[1] == configs[2]  # what shapes and family tell, and what config.json tells, agree


@pytest.mark.parametrize("name", ["sd15", "sd15_inpainting", "sd21", "sdxl_base", "sdxl_refiner", "sdxl_inpainting"])
def test_published_folders_agree_with_their_single_files(tmp_path, capsys, name):
    """A folder with the published configs; its Configs are those that shapes and family knowledge give."""
    base, stem = name.split("_")[0], {"sdxl_base": "sdxl_base", "sdxl_refiner": "sdxl_refiner"}.get(name, name)
    parts = {k: v["config"] for k, v in CONFIGS[name]["components"].items() if k != "model_index"}
    index = {k: ["x", v.get("_class_name") or v["architectures"][0]] for k, v in parts.items()}
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model_index.json").write_text(
        json.dumps(index | {"_class_name": "X", "safety_checker": [None] * 2})
    )
    for part, config in parts.items():
        folder = tmp_path / "m" / part
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        folder.mkdir()
        (folder / file).write_text(json.dumps(config))
        if part != "scheduler":
            of = f"{stem}_unet" if part == "unet" else f"{base}_{part}"
            sparse(folder / "model.fp16.safetensors", manifest(of)["tensors"])
    said = check(tmp_path / "m", capsys)
    assert said["layout"] == "diffusers"
    opened = convert.open(tmp_path / "m")
    assert opened.prediction == ("v" if name == "sd21" else "eps")
    assert opened.zero_negative == base.startswith("sdxl")  # the refiner's model_index, not here, says otherwise
    for part in opened.components:
        alone = convert.open(tmp_path / "m" / part / "model.fp16.safetensors").components[part].config
        told = opened.components[part].config
        if part == "vae":
            alone = type(alone)(**{**vars(alone), "scale": told.scale})  # no shape tells it
        assert alone == told


FLOW = {
    # configs.json -> (single file, the manifests of its folder, what lies beside the single file)
    "flux_dev": ("flux1-dev", "flux", ("comfy_clip_l", "comfy_t5xxl_fp16", "flux_ae")),
    "flux_schnell": ("flux1-schnell", "flux", ("comfy_clip_l", "comfy_t5xxl_fp16", "flux_ae")),
    "sd3_medium": ("sd3_medium", "sd3", ("comfy_clip_l", "comfy_clip_g", "comfy_t5xxl_fp16")),
    "sd35_large": ("sd35_large", "sd3", ("comfy_clip_l", "comfy_clip_g", "comfy_t5xxl_fp16")),
    "sd35_medium": ("sd35_medium", "sd3", ("comfy_clip_l", "comfy_clip_g", "comfy_t5xxl_fp16")),
}
BESIDE = {"flux_ae": "ae", "comfy_t5xxl_fp16": "t5xxl_fp16", "comfy_clip_l": "clip_l", "comfy_clip_g": "clip_g"}


@pytest.mark.parametrize("name", FLOW)
def test_published_folders_of_transformers_agree_with_single_files_and_what_lies_beside(tmp_path, capsys, name):
    single, family, beside = FLOW[name]
    parts = {k: v["config"] for k, v in CONFIGS[name]["components"].items() if k != "model_index"}
    index = {k: ["x", v.get("_class_name") or v["architectures"][0]] for k, v in parts.items()}
    folder = tmp_path / "m"
    for part, config in parts.items():
        (folder / part).mkdir(parents=True)
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / file).write_text(json.dumps(config))
        if part != "scheduler":
            of = {"transformer": f"{name}_transformer", "text_encoder_3": "t5xxl_encoder"}.get(part, f"{family}_{part}")
            sparse(folder / part / "model.safetensors", manifest(of)["tensors"])
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "X"}))
    check(folder, capsys)
    for b in beside:
        sparse(tmp_path / f"{BESIDE[b]}.safetensors", manifest(b)["tensors"])
    check(published(tmp_path, single), capsys)
    told, read = convert.open(folder), convert.open(published(tmp_path, single))
    assert (told.family, told.variant, told.schedule) == (read.family, read.variant, read.schedule)
    assert (told.prediction, read.prediction) == ("flow", "flow")
    assert told.components.keys() == read.components.keys() == set(index) - {"scheduler"}
    row = MODELS[name.replace("_", "-").replace("sd35-", "sd3.5-")].networks  # what memory is estimated from
    assert {part: c.config for part, c in told.components.items()} == row
    for part, component in told.components.items():
        want = component.config
        if (family, part) == ("sd3", "text_encoder"):
            want = replace(want, projection=None)  # the identity is in diffusers' file only
        assert read.components[part].config == want


def test_people_are_told_what_it_is_and_what_is_wrong(tmp_path, capsys):
    held = without(shapes(hollow("sd15_unet")), "conv_in.bias")
    path = sparse(tmp_path / "a.safetensors", held | {"stranger": (3,), "conv_out.bias": (5,)})
    assert main([str(path)]) == 1
    out = capsys.readouterr()
    assert "Stable Diffusion 1.x unet, base, diffusers names" in out.out
    assert "684 tensors" in out.out
    for line in ("no place for 'stranger'", "no place for 'conv_out.bias': shape (5,)", "missing unet.conv_in.bias"):
        assert line in out.out
    assert len(out.err.splitlines()) == 1


def test_without_what_tells_the_size_says_so(tmp_path, capsys):
    path = sparse(tmp_path / "a.safetensors", without(shapes(hollow("sd15_vae")), "encoder.conv_in.weight"))
    assert main([str(path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["missing"] == ["vae.encoder.conv_in.weight"]


def test_what_a_transformer_lacks_is_named_with_its_publisher_and_size(tmp_path):
    held = {name: tuple(shape) for name, shape in manifest("z_image_transformer")["tensors"].items()}
    checkpoint = convert.open(sparse(tmp_path / "z_image_turbo_bf16.safetensors", held, dtype="BF16"))
    with pytest.raises(Error, match=r"Tongyi-MAI/Z-Image-Turbo has text_encoder \(8.0 GB\) and vae \(0.2 GB\)"):
        convert.save(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
