"""The U-Net of Stable Diffusion 1.x, 2.x and XL: diffusers' names, and the original ones, which number the blocks of
all levels in one row."""

import re
from dataclasses import replace

from ..errors import Error
from ..families import Family
from ..models import clip
from ..models.unet import Config, HalfConfig
from .layout import Part, of_family
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
_WHOLE: list[Row] = [  # of a checkpoint, all but its text encoders
    (
        r"^((model\.)?diffusion_model\.|(?=(input|middle|output|down|mid|up)_blocks?\.|time_embed(ding)?\."
        r"|label_emb\.|add_embedding\.|out\.\d\.|conv_(in|out|norm_out)\.))",
        "unet.",
    ),
    (r"^first_stage_model\.", "vae."),
]
_VAE, _VAE_XL = Part("vae", "vae-ft-*.safetensors"), Part("vae", "sdxl_vae*.safetensors")
_CLIP, _CLIP_G = Part("text_encoder", "clip_l*.safetensors"), Part("text_encoder_2", "clip_g*.safetensors")
# What stands beside a U-Net that is alone in its file, as it is in most GGUF files.
_PARTS = {
    "sd1": {"vae": _VAE, "clip": _CLIP},
    "sd2": {"vae": _VAE},
    "sdxl": {"vae": _VAE_XL, "clip": _CLIP, "clip_g": _CLIP_G},
    "sdxl-refiner": {"vae": _VAE_XL, "clip_g": _CLIP_G},
}
LAYOUTS = {
    # ComfyUI once wrote `clip_l.` in between, and trainers before transformers 4 no `text_model.` (see clip).
    "sd1": of_family("sd15", [*_WHOLE, (r"^cond_stage_model\.(clip_l\.)?transformer\.", "text_encoder.")]),
    "sd2": of_family("sd21", [*_WHOLE, (r"^(cond_stage_model|conditioner\.embedders\.0)\.model\.", "text_encoder.")]),
    "sdxl": of_family(
        "sdxl",
        [
            *_WHOLE,
            (r"^conditioner\.embedders\.0\.transformer\.", "text_encoder."),
            (r"^conditioner\.embedders\.1\.model\.(transformer\.(?=text_model\.))?", "text_encoder_2."),
        ],
    ),
    "sdxl-refiner": of_family("sdxl-refiner", [*_WHOLE, (r"^conditioner\.embedders\.0\.model\.", "text_encoder_2.")]),
}
LAYOUTS = {name: replace(layout, parts=_PARTS[name]) for name, layout in LAYOUTS.items()}
CLASSES = ("UNet2DConditionModel",)
ORIGINAL = r"^((model\.)?diffusion_model\.)?input_blocks\.\d"


def recognise(keys: Shapes) -> str | None:
    if not keys.has(rf"{ORIGINAL}|^((model\.)?diffusion_model\.)?down_blocks\.\d"):
        return None
    two = keys.has(r"^conditioner\.embedders\.1\.")
    if not two and not keys.has(r"(label_emb|add_embedding)\."):
        return "sd1" if len(keys.first(r"\.proj_in\.weight$")) == 4 else "sd2"
    # Where there is only a U-Net: the refiner's takes one text vector, pooled and in whole, SDXL's reads two encoders.
    added = keys.first(r"(label_emb\.0\.0|add_embedding\.linear_1)\.weight")
    context, refiner = keys.first(r"attn2\.to_k\.weight"), LAYOUTS["sdxl-refiner"]
    alone = len(added) == len(context) == 2 and added[1] - context[1] == 256 * sizes(refiner.family)
    return "sdxl-refiner" if not two and (alone or keys.has(r"^conditioner\.embedders\.0\.model\.")) else "sdxl"


def sizes(family: Family) -> int:
    """How many numbers SDXL's U-Nets take beside the pooled text: height, width, crop top and left; then target height
    and width, or the refiner's aesthetic score."""
    return 6 if family.text.scores is None else 5


def table(names: list[str], like: Config | None) -> list[Row]:
    """TABLE and rows for the numbered blocks, whose levels each end in a resampling."""
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


def config(shapes: Shapes, like: Config) -> Config:
    values = half(shapes, like)
    return Config(
        **values,
        out_channels=shapes.size("conv_out.weight", 0),
        up_depth=tuple(_depth(shapes, f"up_blocks.{i}", n + 1) for i, n in enumerate(reversed(values["layers"]))),
    )


def half(shapes: Shapes, like: HalfConfig) -> dict:
    """The values of a HalfConfig. No shape shows the attention heads, which are 8 where the file keeps proj_in as a
    convolution (SD 1.x) and 64 wide elsewhere; nor the groups, nor how wide the sinusoids of SDXL's sizes are (but see
    `sized`)."""
    levels = range(max(1, shapes.count("down_blocks"), shapes.count("up_blocks")))
    channels = tuple(shapes.size(f"down_blocks.{i}.resnets.0.conv1.weight", 0) for i in levels)
    layers = tuple(shapes.count(f"down_blocks.{i}.resnets") for i in levels)
    linear = not any(len(s) == 4 for n, s in shapes.items() if n.endswith(".proj_in.weight"))
    reads = next((n for n in shapes if n.endswith(".attn2.to_k.weight")), "down_blocks.0.attentions")
    added, cond = "add_embedding.linear_1.weight", "time_embedding.cond_proj.weight"
    return {
        "in_channels": shapes.size("conv_in.weight", 1),
        "channels": channels,
        "layers": layers,
        "depth": tuple(_depth(shapes, f"down_blocks.{i}", n) for i, n in enumerate(layers)),
        "mid_depth": sum(_depth(shapes, "mid_block", 1)) if shapes.count("mid_block") else None,
        "heads": tuple(max(1, c // 64) if linear else 8 for c in channels),
        "context": shapes.size(reads, 1),
        "groups": like.groups,
        "eps": like.eps,
        "linear_projection": linear,
        "time_cond": shapes.size(cond, 1) if cond in shapes else None,
        "added_time": like.added_time if added in shapes else None,
        "added": shapes.size(added, 1) if added in shapes else None,
        "flip_sin_to_cos": like.flip_sin_to_cos,
        "freq_shift": like.freq_shift,
    }


def _depth(shapes: Shapes, block: str, resnets: int) -> tuple[int, ...]:
    """Transformer layers of each attention. A block has no attention, or one for each residual block."""
    n = shapes.count(f"{block}.attentions")
    if n not in (0, resnets):
        raise Lacking(f"{block}.attentions.{min(n, resnets)}")
    return tuple(shapes.count(f"{block}.attentions.{j}.transformer_blocks") for j in range(n))


# Settings of diffusers that are not implemented here: the only value of each that this network has.
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
    values = half_from_json(s)
    layers = values["layers"]
    up = _attends(s, "up_block_types", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, len(layers))
    key = "transformer_layers_per_block"
    back = s.get(key, 1)
    back = back[::-1] if isinstance(back, list) else back
    if s.get(f"reverse_{key}", None) is not None:
        key = f"reverse_{key}"
        back = s.get(key, None)
    up_depth = s.layers(key, back, [k + 1 for k in reversed(layers)])
    return Config(
        **values,
        out_channels=s.whole("out_channels", 4),
        up_depth=tuple(d if a else () for d, a in zip(up_depth, up, strict=True)),
    )


def half_from_json(s: Settings) -> dict:
    """The values of a HalfConfig."""
    for key, value in _FIXED.items():
        s.one(key, value, [value])
    s.one("mid_block_only_cross_attention", None, [None, False])
    channels = s.wholes("block_out_channels", [320, 640, 1280, 1280])
    n = len(channels)
    layers = s.wholes("layers_per_block", 2, n, MOST_LAYERS)
    down = _attends(s, "down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], n)
    mid = s.one("mid_block_type", "UNetMidBlock2DCrossAttn", [None, "UNetMidBlock2D", "UNetMidBlock2DCrossAttn"])
    key = "transformer_layers_per_block"
    depth = s.layers(key, s.get(key, 1), layers)
    added = s.one("addition_embed_type", None, [None, "text_time"]) is not None
    context = s.wholes("cross_attention_dim", 1280, n)
    if len(set(context)) > 1:
        s.refuse("cross_attention_dim", list(context))
    return {
        "in_channels": s.whole("in_channels", 4),
        "channels": channels,
        "layers": layers,
        "depth": tuple(d if a else () for d, a in zip(depth, down, strict=True)),
        "mid_depth": None if mid is None else depth[-1][0] if mid.endswith("CrossAttn") else 0,
        "heads": s.wholes("attention_head_dim", 8, n),  # misnamed in diffusers from the start: these are counts
        "context": context[0],
        "groups": s.whole("norm_num_groups", 32),
        "eps": s.positive("norm_eps", 1e-5),
        "linear_projection": s.flag("use_linear_projection", False),
        "time_cond": None if s.get("time_cond_proj_dim", None) is None else s.whole("time_cond_proj_dim", 1),
        "added_time": s.whole("addition_time_embed_dim", 0) if added else None,
        "added": s.whole("projection_class_embeddings_input_dim", 0) if added else None,
        "flip_sin_to_cos": s.flag("flip_sin_to_cos", True),
        "freq_shift": s.one("freq_shift", 0, [0, 1]),
    }


def _attends(s: Settings, key: str, default: list[str], n: int) -> list[bool]:
    """Whether each block attends to the text, from its class."""
    kinds = s.get(key, default)
    known = {k for d in ("Down", "Up") for k in (f"{d}Block2D", f"CrossAttn{d}Block2D")}
    if not isinstance(kinds, list) or len(kinds) != n or not all(str(k) in known for k in kinds):
        s.refuse(key, kinds)
    return [k.startswith("CrossAttn") for k in kinds]


_RESNET = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
_ATTENTION = [f"attn{n}.to_{part}" for n in (1, 2) for part in ("q", "k", "v", "out.0")]
_TRANSFORMER = [*_ATTENTION, "ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"]


def pointwise(config: Config) -> tuple[str, ...]:
    """The last names of our linear layers that are convolutions of 1 x 1 in diffusers."""
    return ("conv_shortcut",) if config.linear_projection else ("conv_shortcut", "proj_in", "proj_out")


def layers(config: Config) -> list[str]:
    """The layers' original names."""
    names = ["time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2", "input_blocks.0.0", "out.0", "out.2"]

    def attention(place: str, depth: int) -> list[str]:
        inner = [f"transformer_blocks.{k}.{name}" for k in range(depth) for name in _TRANSFORMER]
        return [f"{place}.{name}" for name in ("norm", "proj_in", *inner, "proj_out")]

    def block(place: str, depth: int | None) -> list[str]:
        rest = [] if depth is None else attention(f"{place}.1", depth)
        return [f"{place}.0.{name}" for name in _RESNET] + rest

    i, last = 1, len(config.layers) - 1
    for level, (n, depth) in enumerate(zip(config.layers, config.depth, strict=True)):
        for j in range(n):
            names += block(f"input_blocks.{i}", depth[j] if depth else None)
            i += 1
        if level < last:
            names.append(f"input_blocks.{i}.0.op")
            i += 1
    names += [f"middle_block.{j}.{name}" for j in (0, 2) for name in _RESNET]
    names += attention("middle_block.1", config.mid_depth or 0)
    i = 0
    for level, (n, depth) in enumerate(zip(reversed(config.layers), config.up_depth, strict=True)):
        for j in range(n + 1):
            names += block(f"output_blocks.{i}", depth[j] if depth else None)
            if j == n and level < last:
                names.append(f"output_blocks.{i}.{2 if depth else 1}.conv")
            i += 1
    return names


def divided(config: Config) -> list[tuple[int, int, str]]:
    return divided_half(config, [bool(up) for up in reversed(config.up_depth)])


def divided_half(config: HalfConfig, also: list[bool]) -> list[tuple[int, int, str]]:
    """also: which levels have attention elsewhere."""
    attends = [bool(down) or up for down, up in zip(config.depth, also, strict=True)]
    attends[-1] |= bool(config.mid_depth)
    heads = [(c, h, "heads") for c, h, a in zip(config.channels, config.heads, attends, strict=True) if a]
    return [(c, config.groups, "norm groups") for c in config.channels] + heads


def layout(config: Config, components: dict) -> str:
    if config.added is not None:
        return "sdxl" if "text_encoder" in components else "sdxl-refiner"
    return "sd2" if config.linear_projection else "sd1"


def variant(config: Config, called: str, schedule: dict | None) -> str:
    return "base" if config.time_cond is None else "lcm"


def reads(config: Config, others: dict) -> list[tuple[str, str, int, int]]:
    encoders = [c.width for name, c in others.items() if name.startswith("text_encoder")]
    return [
        ("text encoders", "text", config.context, sum(encoders)),
        ("vae", "latents", config.out_channels, others["vae"].latent_channels),
    ]


def sized(config: Config, text: clip.Config, sizes: int) -> Config:
    """The Config with the width of the sinusoids, which follows from the share that the pooled text has."""
    width, rest = divmod(config.added - text.projection, sizes)
    if rest or width < 1:
        raise Error(
            f"The unet takes {config.added} numbers, which are no text vector of {text.projection} and {sizes} sizes.",
            "Use a checkpoint whose networks belong together.",
        )
    return replace(config, added_time=width)
