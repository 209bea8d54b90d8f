"""The U-Net: diffusers' names, and the original ones, where blocks are numbered in one line through all levels."""

import re

from ..models.unet import Config
from .rules import Lacking, Row, Shapes
from .settings import MOST_LAYERS, Settings

TABLE: list[Row] = [
    (r"^time_embed\.0\.", "time_embedding.linear_1."),
    (r"^time_embed\.2\.", "time_embedding.linear_2."),
    (r"^time_embed\.cond_proj\.", "time_embedding.cond_proj."),
    (r"^label_emb\.0\.0\.", "add_embedding.linear_1."),
    (r"^label_emb\.0\.2\.", "add_embedding.linear_2."),
    (r"^input_blocks\.0\.0\.", "conv_in."),
    (r"^out\.0\.", "conv_norm_out."),
    (r"^out\.2\.", "conv_out."),
    (r"^middle_block\.0\.", "mid_block.resnets.0."),
    (r"^middle_block\.1\.", "mid_block.attentions.0."),
    (r"^middle_block\.2\.", "mid_block.resnets.1."),
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.emb_layers\.1\.", ".time_emb_proj."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.skip_connection\.", ".conv_shortcut."),
]


def table(names: list[str]) -> list[Row]:
    """TABLE and, counted from the names, where each numbered block lies. A level ends in a resampling."""
    rows = list(TABLE)
    parts = {}  # "input_blocks.4" -> {"0.in_layers", "1.norm", ...}
    for n in names:
        if m := re.match(r"((?:input|output)_blocks\.\d+)\.(\d+\.\w+)", n):
            parts.setdefault(m[1], set()).add(m[2])
    level = j = 0
    for i in range(1, len(parts)):
        block = f"input_blocks.{i}"
        if block not in parts:
            break
        if "0.op" in parts[block]:
            rows.append((rf"^{block}\.0\.op\.", f"down_blocks.{level}.downsamplers.0.conv."))
            level, j = level + 1, 0
        else:
            rows.append((rf"^{block}\.0\.", f"down_blocks.{level}.resnets.{j}."))
            rows.append((rf"^{block}\.1\.", f"down_blocks.{level}.attentions.{j}."))
            j += 1
    level = j = 0
    for i in range(len(parts)):
        block = f"output_blocks.{i}"
        if block not in parts:
            break
        rows.append((rf"^{block}\.[12]\.conv\.", f"up_blocks.{level}.upsamplers.0.conv."))
        rows.append((rf"^{block}\.0\.", f"up_blocks.{level}.resnets.{j}."))
        rows.append((rf"^{block}\.1\.", f"up_blocks.{level}.attentions.{j}."))
        j += 1
        if {"1.conv", "2.conv"} & parts[block]:
            level, j = level + 1, 0
    return rows


def config(shapes: Shapes) -> Config:
    """Read off the shapes, names already ours. Not in them: attention heads, which are 8 where the file keeps proj_in
    as a convolution (SD 1.x) and 64 wide elsewhere; 32 groups; sinusoids of SDXL's sizes, 256 wide."""
    levels = range(max(1, shapes.count("down_blocks"), shapes.count("up_blocks")))
    channels = tuple(shapes.size(f"down_blocks.{i}.resnets.0.conv1.weight", 0) for i in levels)
    layers = tuple(shapes.count(f"down_blocks.{i}.resnets") for i in levels)
    linear = not any(len(s) == 4 for n, s in shapes.items() if n.endswith(".proj_in.weight"))
    reads = next((n for n in shapes if n.endswith(".attn2.to_k.weight")), "down_blocks.0.attentions")
    added, cond = "add_embedding.linear_1.weight", "time_embedding.cond_proj.weight"
    return Config(
        in_channels=shapes.size("conv_in.weight", 1),
        out_channels=shapes.size("conv_out.weight", 0),
        channels=channels,
        layers=layers,
        depth=tuple(_depth(shapes, f"down_blocks.{i}", n) for i, n in enumerate(layers)),
        up_depth=tuple(_depth(shapes, f"up_blocks.{i}", n + 1) for i, n in enumerate(reversed(layers))),
        mid_depth=sum(_depth(shapes, "mid_block", 1)) if shapes.count("mid_block") else None,
        heads=tuple(max(1, c // 64) if linear else 8 for c in channels),
        context=shapes.size(reads, 1),
        groups=32,
        eps=1e-5,
        linear_projection=linear,
        time_cond=shapes.size(cond, 1) if cond in shapes else None,
        added_time=256 if added in shapes else None,
        added=shapes.size(added, 1) if added in shapes else None,
        flip_sin_to_cos=True,
        freq_shift=0,
    )


def _depth(shapes: Shapes, block: str, resnets: int) -> tuple[int, ...]:
    """Of each attention: a block has none, or one for each residual block."""
    n = shapes.count(f"{block}.attentions")
    if n not in (0, resnets):
        raise Lacking(f"{block}.attentions.{min(n, resnets)}")
    return tuple(shapes.count(f"{block}.attentions.{j}.transformer_blocks") for j in range(n))


# What diffusers can be told and we do not implement: the only value of each that this network has.
_FIXED = {
    "act_fn": "silu",
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_scale_factor": 1,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}


def from_json(s: Settings, cls: str) -> Config:
    """From diffusers' config.json."""
    for key, value in _FIXED.items():
        s.one(key, value, [value])
    s.one("mid_block_only_cross_attention", None, [None, False])
    channels = s.wholes("block_out_channels", [320, 640, 1280, 1280])
    n = len(channels)
    layers = s.wholes("layers_per_block", 2, n, MOST_LAYERS)
    down = _attends(s, "down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], n)
    up = _attends(s, "up_block_types", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, n)
    mid = s.one("mid_block_type", "UNetMidBlock2DCrossAttn", [None, "UNetMidBlock2D", "UNetMidBlock2DCrossAttn"])
    key = "transformer_layers_per_block"
    depth = s.layers(key, s.get(key, 1), layers)
    back = s.get(key, 1)
    back = back[::-1] if isinstance(back, list) else back
    if s.get(f"reverse_{key}", None) is not None:
        key = f"reverse_{key}"
        back = s.get(key, None)
    up_depth = s.layers(key, back, [k + 1 for k in reversed(layers)])
    added = s.one("addition_embed_type", None, [None, "text_time"]) is not None
    context = s.wholes("cross_attention_dim", 1280, n)
    if len(set(context)) > 1:
        s.refuse("cross_attention_dim", list(context))
    return Config(
        in_channels=s.whole("in_channels", 4),
        out_channels=s.whole("out_channels", 4),
        channels=channels,
        layers=layers,
        depth=tuple(d if a else () for d, a in zip(depth, down, strict=True)),
        up_depth=tuple(d if a else () for d, a in zip(up_depth, up, strict=True)),
        mid_depth=None if mid is None else depth[-1][0] if mid.endswith("CrossAttn") else 0,
        heads=s.wholes("attention_head_dim", 8, n),  # misnamed in diffusers from the start: these are counts
        context=context[0],
        groups=s.whole("norm_num_groups", 32),
        eps=s.positive("norm_eps", 1e-5),
        linear_projection=s.flag("use_linear_projection", False),
        time_cond=None if s.get("time_cond_proj_dim", None) is None else s.whole("time_cond_proj_dim", 1),
        added_time=s.whole("addition_time_embed_dim", 0) if added else None,
        added=s.whole("projection_class_embeddings_input_dim", 0) if added else None,
        flip_sin_to_cos=s.flag("flip_sin_to_cos", True),
        freq_shift=s.one("freq_shift", 0, [0, 1]),
    )


def _attends(s: Settings, key: str, default: list[str], n: int) -> list[bool]:
    """Whether each block attends to the text, from its class."""
    kinds = s.get(key, default)
    known = {k for d in ("Down", "Up") for k in (f"{d}Block2D", f"CrossAttn{d}Block2D")}
    if not isinstance(kinds, list) or len(kinds) != n or not all(k in known for k in kinds):
        s.refuse(key, kinds)
    return [k.startswith("CrossAttn") for k in kinds]
