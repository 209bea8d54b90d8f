"""FLUX.1: Black Forest Labs' names are ours; diffusers takes the fused layers apart and has the last layer's scale
before its shift."""

from ..models.flux import Config
from .layout import of_transformer
from .rules import Row, Shapes
from .settings import MOST_LAYERS, Settings

_END = r"\.(weight|bias)$"
TABLE: list[Row] = [
    (r"_norm\.weight$", "_norm.scale"),  # as newer versions of ComfyUI save it
    (r"^transformer_blocks\.", "double_blocks."),
    (r"\.norm1\.linear\.", ".img_mod.lin."),
    (r"\.norm1_context\.linear\.", ".txt_mod.lin."),
    (r"^(double_.*)\.attn\.norm_q\.weight$", r"\1.img_attn.norm.query_norm.scale"),
    (r"^(double_.*)\.attn\.norm_k\.weight$", r"\1.img_attn.norm.key_norm.scale"),
    (r"\.attn\.norm_added_q\.weight$", ".txt_attn.norm.query_norm.scale"),
    (r"\.attn\.norm_added_k\.weight$", ".txt_attn.norm.key_norm.scale"),
    (r"\.attn\.to_out\.0\.", ".img_attn.proj."),
    (r"\.attn\.to_add_out\.", ".txt_attn.proj."),
    (r"\.ff\.net\.0\.proj\.", ".img_mlp.0."),
    (r"\.ff\.net\.2\.", ".img_mlp.2."),
    (r"\.ff_context\.net\.0\.proj\.", ".txt_mlp.0."),
    (r"\.ff_context\.net\.2\.", ".txt_mlp.2."),
    *[(rf"^(double_.*)\.attn\.to_{p}{_END}", rf"\1.img_attn.qkv.\2+{i}") for i, p in enumerate("qkv")],
    *[(rf"\.attn\.add_{p}_proj{_END}", rf".txt_attn.qkv.\1+{i}") for i, p in enumerate("qkv")],
    (r"^single_transformer_blocks\.", "single_blocks."),
    (r"^(single_.*)\.norm\.linear\.", r"\1.modulation.lin."),
    *[(rf"^(single_.*)\.attn\.to_{p}{_END}", rf"\1.linear1.\2+{i}") for i, p in enumerate("qkv")],
    (rf"\.proj_mlp{_END}", r".linear1.\1+3"),
    (rf"^(single_.*)\.qkv{_END}", tuple(rf"\1.linear1.\2+{i}" for i in range(3))),  # in XLabs' LoRA
    (r"^(single_.*)\.proj_out\.", r"\1.linear2."),
    (r"^(single_.*)\.attn\.norm_q\.weight$", r"\1.norm.query_norm.scale"),
    (r"^(single_.*)\.attn\.norm_k\.weight$", r"\1.norm.key_norm.scale"),
    (r"^x_embedder\.", "img_in."),
    (r"^context_embedder\.", "txt_in."),
    (r"^time_text_embed\.timestep_embedder\.", "time_in."),
    (r"^time_text_embed\.guidance_embedder\.", "guidance_in."),
    (r"^time_text_embed\.text_embedder\.", "vector_in."),
    (r"^(\w+_in)\.linear_1\.", r"\1.in_layer."),
    (r"^(\w+_in)\.linear_2\.", r"\1.out_layer."),
    (r"^proj_out\.", "final_layer.linear."),
    (rf"^norm_out\.linear{_END}", tuple(rf"final_layer.adaLN_modulation.1.\1+{i}" for i in (1, 0))),
]

LAYOUTS = {
    "flux": of_transformer("flux-dev", {"clip_l": "text_encoder", "t5xxl": "text_encoder_2"}, vae="ae.safetensors")
}
CLASSES = ("FluxTransformer2DModel",)
ORIGINAL = r"(^|\.)double_blocks\.\d"


def recognise(keys: Shapes) -> str | None:
    return "flux" if keys.has(rf"{ORIGINAL}|(^|\.)single_transformer_blocks\.\d") else None


def table(names: list[str], like: Config | None) -> list[Row]:
    return TABLE


def config(shapes: Shapes, like: Config) -> Config:
    """No shape shows theta, nor how a head's 128 numbers are shared among the axes."""
    width = shapes.size("img_in.weight", 0)
    head = shapes.size("double_blocks.0.img_attn.norm.query_norm.scale", 0)
    side = 2 * ((head - head // 8) // 4)  # 16, 56, 56
    return Config(
        in_channels=shapes.size("img_in.weight", 1),
        out_channels=shapes.size("final_layer.linear.weight", 0),
        context=shapes.size("txt_in.weight", 1),
        pooled=shapes.size("vector_in.in_layer.weight", 1),
        width=width,
        heads=max(1, width // head),
        hidden=shapes.size("double_blocks.0.img_mlp.0.weight", 0),
        double=shapes.count("double_blocks"),
        single=shapes.count("single_blocks"),
        axes=(head - 2 * side, side, side),
        theta=like.theta,
        guidance="guidance_in.in_layer.weight" in shapes,
    )


def from_json(s: Settings, cls: str) -> Config:
    """From diffusers' config.json."""
    s.one("patch_size", 1, [1])
    return read(s)


def read(s: Settings) -> Config:
    channels, heads = s.whole("in_channels", 64), s.whole("num_attention_heads", 24)
    head, axes = s.whole("attention_head_dim", 128), s.wholes("axes_dims_rope", [16, 56, 56], 3)
    if sum(axes) != head or any(a % 2 for a in axes):
        s.refuse("axes_dims_rope", list(axes))
    return Config(
        in_channels=channels,
        out_channels=channels if s.get("out_channels", None) is None else s.whole("out_channels", channels),
        context=s.whole("joint_attention_dim", 4096),
        pooled=s.whole("pooled_projection_dim", 768),
        width=heads * head,
        heads=heads,
        hidden=4 * heads * head,
        double=s.whole("num_layers", 19, MOST_LAYERS, 0),
        single=s.whole("num_single_layers", 38, MOST_LAYERS, 0),
        axes=axes,
        theta=10000.0,
        guidance=s.flag("guidance_embeds", False),
    )


def layers(config: Config) -> list[str]:
    """The layers' names in diffusers, and one of XLabs'."""
    streams = [("attn.to_q", "attn.add_q_proj"), ("attn.to_k", "attn.add_k_proj"), ("attn.to_v", "attn.add_v_proj")]
    streams += [("attn.to_out.0", "attn.to_add_out"), ("ff.net.0.proj", "ff_context.net.0.proj")]
    streams += [("ff.net.2", "ff_context.net.2"), ("norm1.linear", "norm1_context.linear")]
    norms = ["attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k"]
    double = [*(name for pair in streams for name in pair), *norms]
    single = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out", "norm.linear", *norms[:2]]
    timed = ["timestep_embedder", "text_embedder", *["guidance_embedder"] * config.guidance]
    return [
        *(f"transformer_blocks.{i}.{name}" for i in range(config.double) for name in double),
        *(f"single_transformer_blocks.{i}.{name}" for i in range(config.single) for name in single),
        *(f"single_blocks.{i}.qkv" for i in range(config.single)),
        *(f"time_text_embed.{name}.linear_{n}" for name in timed for n in (1, 2)),
        *("x_embedder", "context_embedder", "proj_out", "norm_out.linear"),
    ]


def divided(config: Config) -> list[tuple[int, int, str]]:
    return [(config.width, config.heads, "heads")]


def layout(config: Config, components: dict) -> str:
    return "flux"


def variant(config: Config, called: str, schedule: dict | None) -> str:
    """Kontext and Krea have the same shapes as dev. Kontext, which was trained to edit, is recognised where the
    checkpoint says so (FluxKontextPipeline, SwarmUI's Flux.1-dev/kontext, or a file's name)."""
    if not config.guidance:
        return "schnell"
    return "kontext" if "kontext" in called.lower() else "base"


def reads(config: Config, others: dict) -> list[tuple[str, str, int, int]]:
    return [
        ("text_encoder", "a text vector", config.pooled, others["text_encoder"].width),
        ("text_encoder_2", "text", config.context, others["text_encoder_2"].width),
        ("vae", "patches", config.out_channels, 4 * others["vae"].latent_channels),
    ]
