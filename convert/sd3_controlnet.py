"""ControlNets of Stable Diffusion 3 and 3.5: diffusers' names, and Stability's original ones."""

import math
from dataclasses import replace

from ..families.sd3 import MODELS
from ..models.sd3_controlnet import Config
from . import controlnet, sd3
from .layout import Layout
from .rules import Row, Shapes
from .settings import Settings

_BLOCK = r"^(transformer_blocks\.\d+)"
TABLE: list[Row] = [
    (rf"{_BLOCK}\.adaLN_modulation\.1\.", r"\1.norm1.linear."),
    (rf"{_BLOCK}\.attn\.qkv\.(weight|bias)$", tuple(rf"\1.attn.to_{p}.\2" for p in "qkv")),
    (rf"{_BLOCK}\.attn\.proj\.", r"\1.attn.to_out.0."),
    (rf"{_BLOCK}\.mlp\.fc1\.", r"\1.ff.net.0.proj."),
    (rf"{_BLOCK}\.mlp\.fc2\.", r"\1.ff.net.2."),
    *sd3.TABLE,
]
_BASE = vars(MODELS["sd3-medium"].networks["transformer"])
LAYOUTS = {
    "sd3_controlnet": Layout(
        "a Stable Diffusion 3 ControlNet",
        [(r"^", "sd3_controlnet.")],
        {"sd3_controlnet": "sd3_controlnet"},
        {"sd3_controlnet": Config(**_BASE, hint_channels=16, told=False)},
        use=controlnet.LAYOUTS["controlnet"].use,
    )
}
CLASSES = ("SD3ControlNetModel",)
ORIGINAL = r"^transformer_blocks\.\d+\.attn\.qkv\."


def recognise(keys: Shapes) -> str | None:
    guides = keys.has(r"^controlnet_blocks\.\d") and keys.has(r"^pos_embed_input\.proj\.")
    return "sd3_controlnet" if guides else None


def table(names: list[str], like: Config | None) -> list[Row]:
    return TABLE


def config(shapes: Shapes, like: Config) -> Config:
    """That one which reads the text is not told the pooled text, no shape shows: of those known, none is."""
    hint, patches = "pos_embed_input.proj.weight", "pos_embed.proj.weight"
    text, own, norm = "context_embedder.weight", "pos_embed.pos_embed", "transformer_blocks.0.attn.norm_q.weight"
    width, layers = shapes.size(hint, 0), shapes.count("transformer_blocks")
    head = shapes.size(norm, 0) if norm in shapes else like.head_dim
    channels = shapes.size(patches if patches in shapes else hint, 1)
    return replace(
        like,
        in_channels=channels,
        out_channels=channels,
        patch=shapes.size(hint, 2),
        positions=math.isqrt(shapes.size(own, 1)) if own in shapes else 0,
        context=shapes.size(text, 1) if text in shapes else 0,
        pooled=shapes.size("time_text_embed.text_embedder.linear_1.weight", 1),
        heads=max(1, width // head),
        head_dim=head,
        layers=layers,
        dual=tuple(i for i in range(layers) if f"transformer_blocks.{i}.attn2.to_q.weight" in shapes),
        qk_norm=norm in shapes,
        hint_channels=shapes.size(hint, 1),
        told=text not in shapes and shapes.size(hint, 1) != channels + 1,
    )


def from_json(s: Settings, cls: str) -> Config:
    """From diffusers' config.json."""
    text = s.get("joint_attention_dim", 4096) is not None
    places = s.flag("use_pos_embed", True)
    s.one("pos_embed_type", "sincos", ["sincos", None])
    channels = s.whole("in_channels", 16)
    more = s.get("extra_conditioning_channels", 0)
    return Config(
        in_channels=channels,
        out_channels=channels,
        patch=s.whole("patch_size", 2),
        positions=s.whole("pos_embed_max_size", 96, 2**12) if places else 0,
        context=s.whole("joint_attention_dim", 4096) if text else 0,
        pooled=s.whole("pooled_projection_dim", 2048),
        **sd3.blocks(s),
        hint_channels=channels + (s.whole("extra_conditioning_channels", 0) if more else 0),
        told=not s.flag("force_zeros_for_pooled_projection", True),
    )


def corrected(config: Config, shapes: Shapes) -> Config:
    """The published config.json of the one that reads a mask does not say so: diffusers must be told. Such a network is
    not told the pooled text, whatever its config.json says."""
    channels = shapes.get("pos_embed_input.proj.weight", ())[1:2]
    if channels != (config.in_channels + 1,) or config.hint_channels not in (config.in_channels, *channels):
        return config
    return replace(config, hint_channels=channels[0], told=False)


def divided(config: Config) -> list[tuple[int, int, str]]:
    return []
