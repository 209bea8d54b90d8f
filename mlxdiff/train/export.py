"""Writes a trained model as a public diffusers folder in float16, which other tools read and which `builtin` ships."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..models import clip, unet, vae

POINTWISE = ("conv_shortcut", "quant_conv", "post_quant_conv", "proj_in", "proj_out")  # Linear here, Conv2d in the file


def public(name: str, module: nn.Module, dtype: mx.Dtype = mx.float16) -> dict[str, mx.array]:
    """A component's tensors under the file's names, in the file's layout."""
    tensors = {}
    for key, value in tree_flatten(module.parameters()):
        if value.ndim == 4:
            value = value.transpose(0, 3, 1, 2)  # (O, I, kh, kw)
        elif value.ndim == 2 and key.split(".")[-2] in POINTWISE:
            value = value[:, :, None, None]
        prefix = "text_model." if name == "text_encoder" and not key.startswith("text_projection") else ""
        tensors[prefix + key] = mx.contiguous(value.astype(dtype))
    return tensors


def vae_config(c: vae.Config, size: int) -> dict:
    levels = len(c.channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": c.channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": c.in_channels,
        "latent_channels": c.latent_channels,
        "layers_per_block": c.layers,
        "norm_num_groups": c.groups,
        "out_channels": c.out_channels,
        "sample_size": size,
        "scaling_factor": c.scale,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def unet_config(c: unet.Config, size: int) -> dict:
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": c.heads[0],  # the number of heads: the name is an old mistake that stayed
        "block_out_channels": c.channels,
        "center_input_sample": False,
        "cross_attention_dim": c.context,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in c.depth],
        "downsample_padding": 1,
        "flip_sin_to_cos": c.flip_sin_to_cos,
        "freq_shift": c.freq_shift,
        "in_channels": c.in_channels,
        "layers_per_block": c.layers[0],
        "mid_block_scale_factor": 1,
        "norm_eps": c.eps,
        "norm_num_groups": c.groups,
        "out_channels": c.out_channels,
        "sample_size": size,
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in c.up_depth],
        "use_linear_projection": False,
    }


def text_config(c: clip.Config) -> dict:
    return {
        "architectures": ["CLIPTextModel"],
        "bos_token_id": c.vocab - 2,
        "dtype": "float16",
        "eos_token_id": c.eos,
        "hidden_act": c.act,
        "hidden_size": c.width,
        "intermediate_size": c.hidden,
        "layer_norm_eps": c.eps,
        "max_position_embeddings": c.positions,
        "model_type": "clip_text_model",
        "num_attention_heads": c.heads,
        "num_hidden_layers": c.layers,
        "pad_token_id": c.eos,
        "projection_dim": c.width,
        "vocab_size": c.vocab,
    }


def scheduler_config(prediction: str) -> dict:
    shared = {"num_train_timesteps": 1000}
    if prediction == "flow":
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0, **shared}
    return {
        "_class_name": "DDIMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "prediction_type": {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[prediction],
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        **shared,
    }


def write(
    folder: Path, autoencoder: vae.VAE, denoiser: unet.UNet, text: clip.CLIPText, prediction: str, size: int
) -> None:
    """Write everything except the tokenizer; its folder is written where the vocabulary is learned. size: the edge of
    the pictures that it was trained on."""
    latents = size // autoencoder.factor
    parts = {
        "vae": (autoencoder, vae_config(autoencoder.config, size), "diffusion_pytorch_model", "config.json"),
        "unet": (denoiser, unet_config(denoiser.config, latents), "diffusion_pytorch_model", "config.json"),
        "text_encoder": (text, text_config(text.config), "model", "config.json"),
    }
    for name, (module, config, file, config_name) in parts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(folder / name / f"{file}.safetensors"), public(name, module), {"format": "pt"})
        _json(folder / name / config_name, config)
    (folder / "scheduler").mkdir(exist_ok=True)
    _json(folder / "scheduler" / "scheduler_config.json", scheduler_config(prediction))
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler_config(prediction)["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _json(folder / "model_index.json", index)


def _json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
