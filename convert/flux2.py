"""FLUX.2: Black Forest Labs' names are ours; diffusers takes the attention of double blocks apart and has the last
layer's scale before its shift."""

import re
from dataclasses import replace

from ..families.flux2 import DEV
from ..models.flux2 import Config
from . import flux
from .layout import Part, of_transformer
from .rules import Row, Shapes
from .settings import MOST_LAYERS, Settings

TABLE: list[Row] = [
    (r"^time_guidance_embed\.", "time_text_embed."),
    (r"_stream_modulation(_img|_txt|)\.linear\.", r"_stream_modulation\1.lin."),
    *[
        (rf"\.{theirs}\.linear_{end}\.", f".{ours}_mlp.{i}.")
        for theirs, ours in (("ff", "img"), ("ff_context", "txt"))
        for end, i in (("in", 0), ("out", 2))
    ],
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj\.", r"single_blocks.\1.linear1."),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_out\.", r"single_blocks.\1.linear2."),
    *flux.TABLE,
]

_KLEIN = of_transformer(
    "flux2-klein", {"qwen3_4b": "text_encoder", "qwen3_8b": "text_encoder"}, "flux2-vae*.safetensors"
)
_ENCODER = Part("text_encoder", "qwen_3_[48]b*.safetensors")  # 4B's and 9B's
LAYOUTS = {
    "flux2": replace(_KLEIN, parts=_KLEIN.parts | {"text_encoder": _ENCODER}),
    "flux2-dev": replace(
        _KLEIN, title=DEV.title, networks=DEV.networks, family=DEV, parts={"vae": _KLEIN.parts["vae"]}
    ),
}
CLASSES = ("Flux2Transformer2DModel",)
ORIGINAL = flux.ORIGINAL


def recognise(keys: Shapes) -> str | None:
    if not keys.has(r"(^|\.)single_stream_modulation\.lin(ear)?\."):
        return None
    return "flux2-dev" if keys.has(r"(^|\.)(guidance_in|guidance_embedder)\.") else "flux2"


def table(names: list[str], like: Config | None) -> list[Row]:
    return TABLE


def config(shapes: Shapes, like: Config) -> Config:
    """No shape shows theta, nor how a head's 128 numbers are shared among the axes: equally, in all published ones."""
    width = shapes.size("img_in.weight", 0)
    norm = "double_blocks.0.img_attn.norm" if shapes.has(r"^double_blocks\.") else "single_blocks.0.norm"
    head = shapes.size(f"{norm}.query_norm.scale", 0)
    return Config(
        in_channels=shapes.size("img_in.weight", 1),
        out_channels=shapes.size("final_layer.linear.weight", 0),
        context=shapes.size("txt_in.weight", 1),
        width=width,
        heads=max(1, width // head),
        hidden=shapes.size("single_blocks.0.linear2.weight", 1) - width,
        double=shapes.count("double_blocks"),
        single=shapes.count("single_blocks"),
        axes=(head // 4,) * 4,
        theta=like.theta,
        guidance="guidance_in.in_layer.weight" in shapes,
    )


def from_json(s: Settings, cls: str) -> Config:
    """From diffusers' config.json."""
    s.one("patch_size", 1, [1])
    s.one("timestep_guidance_channels", 256, [256])
    s.one("eps", 1e-6, [1e-6])
    channels, heads = s.whole("in_channels", 128), s.whole("num_attention_heads", 48)
    head, axes = s.whole("attention_head_dim", 128), s.wholes("axes_dims_rope", [32, 32, 32, 32], 4)
    if sum(axes) != head or any(a % 2 for a in axes):
        s.refuse("axes_dims_rope", list(axes))
    return Config(
        in_channels=channels,
        out_channels=channels if s.get("out_channels", None) is None else s.whole("out_channels", channels),
        context=s.whole("joint_attention_dim", 15360),
        width=heads * head,
        heads=heads,
        hidden=int(heads * head * s.positive("mlp_ratio", 3.0)),
        double=s.whole("num_layers", 8, MOST_LAYERS, 0),
        single=s.whole("num_single_layers", 48, MOST_LAYERS, 0),
        axes=axes,
        theta=s.positive("rope_theta", 2000),
        guidance=s.flag("guidance_embeds", True),
    )


def layers(config: Config) -> list[str]:
    """The layers' names in diffusers."""
    double = [f"attn.{n}" for n in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0")]
    double += [f"attn.{n}" for n in ("to_add_out", "norm_q", "norm_k", "norm_added_q", "norm_added_k")]
    double += [f"{ff}.linear_{end}" for ff in ("ff", "ff_context") for end in ("in", "out")]
    single = ["attn.to_qkv_mlp_proj", "attn.to_out", "attn.norm_q", "attn.norm_k"]
    timed = ["timestep_embedder", *["guidance_embedder"] * config.guidance]
    shared = ["double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"]
    return [
        *(f"transformer_blocks.{i}.{name}" for i in range(config.double) for name in double),
        *(f"single_transformer_blocks.{i}.{name}" for i in range(config.single) for name in single),
        *(f"time_guidance_embed.{name}.linear_{n}" for name in timed for n in (1, 2)),
        *(f"{name}.linear" for name in shared),
        *("x_embedder", "context_embedder", "proj_out", "norm_out.linear"),
    ]


def divided(config: Config) -> list[tuple[int, int, str]]:
    return [(config.width, config.heads, "heads")]


def layout(config: Config, components: dict) -> str:
    return "flux2-dev" if config.guidance else "flux2"


def variant(config: Config, called: str, schedule: dict | None) -> str:
    """Base has the same shapes as what was distilled from it. A folder's pipeline says which it is, and a file's
    architecture or, without one, its name."""
    if config.guidance:
        return "dev"
    says_base = "Pipeline" in called or re.search(r"(?<![a-z])base(?![a-z])", called.lower())
    return "base" if says_base and "is_distilled" not in called else "distilled"


def reads(config: Config, others: dict) -> list[tuple[str, str, int, int]]:
    text = [("text_encoder", "text", config.context, others["text_encoder"].output)] if "text_encoder" in others else []
    return [*text, ("vae", "latents", config.out_channels, others["vae"].seen)]
