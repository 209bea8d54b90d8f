"""Stable Diffusion 3 and 3.5: diffusers' names, and the original ones, where a layer that only scales and shifts has
the shift first."""

import math
import re

from ..families.published import CLIP_L
from ..models.sd3 import Config
from .layout import of_transformer
from .rules import Row, Shapes
from .settings import MOST_LAYERS, Settings

_END = r"\.(weight|bias)$"
TABLE: list[Row] = [
    (r"^x_embedder\.proj\.", "pos_embed.proj."),
    (r"^pos_embed$", "pos_embed.pos_embed"),
    (r"^t_embedder\.mlp\.", "time_text_embed.timestep_embedder.mlp."),
    (r"^y_embedder\.mlp\.", "time_text_embed.text_embedder.mlp."),
    (r"_embedder\.mlp\.0\.", "_embedder.linear_1."),
    (r"_embedder\.mlp\.2\.", "_embedder.linear_2."),
    (r"^joint_blocks\.", "transformer_blocks."),
    (r"\.x_block\.adaLN_modulation\.1\.", ".norm1.linear."),
    (r"\.x_block\.mlp\.fc1\.", ".ff.net.0.proj."),
    (r"\.x_block\.mlp\.fc2\.", ".ff.net.2."),
    (r"\.x_block\.(attn2?)\.proj\.", r".\1.to_out.0."),
    (r"\.x_block\.(attn2?)\.ln_([qk])\.", r".\1.norm_\2."),
    (rf"\.x_block\.(attn2?)\.qkv{_END}", tuple(rf".\1.to_{p}.\2" for p in "qkv")),
    (r"\.context_block\.mlp\.fc1\.", ".ff_context.net.0.proj."),
    (r"\.context_block\.mlp\.fc2\.", ".ff_context.net.2."),
    (r"\.context_block\.attn\.proj\.", ".attn.to_add_out."),
    (r"\.context_block\.attn\.ln_([qk])\.", r".attn.norm_added_\1."),
    (rf"\.context_block\.attn\.qkv{_END}", tuple(rf".attn.add_{p}_proj.\1" for p in "qkv")),
    (r"^final_layer\.linear\.", "proj_out."),
    (rf"^final_layer\.adaLN_modulation\.1{_END}", tuple(rf"norm_out.linear.\1+{i}" for i in (1, 0))),
]

LAYOUTS = {
    "sd3": of_transformer(
        "sd3-medium",
        {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"},
        vae="sd3_vae.safetensors",
        text_encoder=CLIP_L,  # without the projection of the folder in diffusers layout, which is an identity
    )
}
CLASSES = ("SD3Transformer2DModel",)
ORIGINAL = r"(^|\.)joint_blocks\.\d"


def recognise(keys: Shapes) -> str | None:
    return "sd3" if keys.has(rf"{ORIGINAL}|(^|\.)transformer_blocks\.\d+\.attn\.add_q_proj\.") else None


def table(names: list[str], like: Config | None) -> list[Row]:
    """TABLE and rows for the last block, whose text is only scaled and shifted."""
    last = max((int(m[1]) for n in names if (m := re.match(r"joint_blocks\.(\d{1,3})\.", n))), default=0)
    swap = tuple(rf"transformer_blocks.{last}.norm1_context.linear.\1+{i}" for i in (1, 0))
    return [
        (rf"^joint_blocks\.{last}\.context_block\.adaLN_modulation\.1{_END}", swap),
        (r"\.context_block\.adaLN_modulation\.1\.", ".norm1_context.linear."),
        *TABLE,
    ]


def config(shapes: Shapes, like: Config) -> Config:
    """Where queries and keys have no norm, no shape shows the heads."""
    norm = "transformer_blocks.0.attn.norm_q.weight"
    width, patch = (shapes.size("pos_embed.proj.weight", axis) for axis in (0, 2))
    head = shapes.size(norm, 0) if norm in shapes else like.head_dim
    layers = shapes.count("transformer_blocks")
    return Config(
        in_channels=shapes.size("pos_embed.proj.weight", 1),
        out_channels=max(1, shapes.size("proj_out.weight", 0) // patch**2),
        patch=patch,
        positions=math.isqrt(shapes.size("pos_embed.pos_embed", 1)),
        context=shapes.size("context_embedder.weight", 1),
        pooled=shapes.size("time_text_embed.text_embedder.linear_1.weight", 1),
        heads=max(1, width // head),
        head_dim=head,
        layers=layers,
        dual=tuple(i for i in range(layers) if f"transformer_blocks.{i}.attn2.to_q.weight" in shapes),
        qk_norm=norm in shapes,
    )


def from_json(s: Settings, cls: str) -> Config:
    """From diffusers' config.json."""
    inside, channels = blocks(s), s.whole("in_channels", 16)
    s.one("caption_projection_dim", 1152, [inside["heads"] * inside["head_dim"]])
    return Config(
        in_channels=channels,
        out_channels=channels if s.get("out_channels", 16) is None else s.whole("out_channels", 16),
        patch=s.whole("patch_size", 2),
        positions=s.whole("pos_embed_max_size", 96, 2**12),
        context=s.whole("joint_attention_dim", 4096),
        pooled=s.whole("pooled_projection_dim", 2048),
        **inside,
    )


def blocks(s: Settings) -> dict:
    """What diffusers' config.json says of the blocks, for a Config."""
    layers, dual = s.whole("num_layers", 18, MOST_LAYERS), s.get("dual_attention_layers", [])
    if not isinstance(dual, list) or not all(type(i) is int and 0 <= i < layers for i in dual):
        s.refuse("dual_attention_layers", dual)
    return {
        "heads": s.whole("num_attention_heads", 18),
        "head_dim": s.whole("attention_head_dim", 64),
        "layers": layers,
        "dual": tuple(dual),
        "qk_norm": s.one("qk_norm", None, [None, "rms_norm"]) is not None,
    }


def layers(config: Config) -> list[str]:
    """The layers' original names."""
    block = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1", "attn.ln_q", "attn.ln_k"]
    last = f"joint_blocks.{config.layers - 1}.context_block"
    names = [f"joint_blocks.{i}.{s}_block.{n}" for i in range(config.layers) for s in ("x", "context") for n in block]
    names = [n for n in names if not n.startswith(last) or n.endswith((".qkv", "modulation.1", ".ln_q", ".ln_k"))]
    second = [
        f"joint_blocks.{i}.x_block.attn2.{n.partition('.')[2]}" for i in config.dual for n in block if "attn" in n
    ]
    ends = ["context_embedder", "x_embedder.proj", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    return [*names, *second, *ends, *(f"{n}_embedder.mlp.{i}" for n in "ty" for i in (0, 2))]


def divided(config: Config) -> list[tuple[int, int, str]]:
    return []


def layout(config: Config, components: dict) -> str:
    return "sd3"


def variant(config: Config, called: str, schedule: dict | None) -> str:
    """Turbo has the same shapes as large."""
    return "base"


def reads(config: Config, others: dict) -> list[tuple[str, str, int, int]]:
    clips = [others[c] for c in ("text_encoder", "text_encoder_2")]
    pooled = sum(c.width if c.projection is None else c.projection for c in clips)
    rows = [
        ("text_encoder_2", "text vectors", config.pooled, pooled),
        ("vae", "latents", config.out_channels, others["vae"].latent_channels),
    ]
    if "text_encoder_3" in others:
        rows.append(("text_encoder_3", "text", config.context, others["text_encoder_3"].width))
    return rows
