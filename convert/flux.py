"""FLUX.1: Black Forest Labs' names are ours; diffusers takes the fused layers apart and has the last layer's scale
before its shift. And the single files of the family."""

from ..models.flux import Config
from .rules import Row, Shapes
from .scheduler import DYNAMIC, FLOW
from .sd import DROPPED, Family, Part
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

FLUX = Family(
    table=[
        *DROPPED,
        (r"^text_encoders\.clip_l\.transformer\.", "text_encoder."),
        (r"^text_encoders\.t5xxl\.transformer\.", "text_encoder_2."),
        (r"^(vae|first_stage_model)\.", "vae."),
        (r"^((model\.)?diffusion_model\.|transformer\.|(?!text_encoder|vae\.))", "transformer."),
    ],
    components=("text_encoder", "text_encoder_2", "transformer", "vae"),
    acts={"text_encoder": "quick_gelu"},
    pads={"tokenizer": "<|endoftext|>", "tokenizer_2": None},
    parts={
        "clip": Part("text_encoder", "clip_l*.safetensors"),
        "t5": Part("text_encoder_2", "t5xxl*.safetensors"),
        "vae": Part("vae", "ae.safetensors"),
    },
    t5="text_encoder_2",
    prediction="flow",
    scale=0.3611,
    shift=0.1159,
)


def table(names: list[str]) -> list[Row]:
    return TABLE


def config(shapes: Shapes) -> Config:
    """Read off the shapes. Not in them: how a head's 128 numbers are shared among the axes, and theta."""
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
        theta=10000.0,
        guidance="guidance_in.in_layer.weight" in shapes,
    )


def from_json(s: Settings, cls: str) -> Config:
    """From diffusers' config.json."""
    s.one("patch_size", 1, [1])
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


def variant(config: Config, called: str) -> str:
    """By what a patch shows the network beside itself: fill a picture and its mask, 8 x 8 pixels a latent; control
    (Canny, Depth) another picture. Kontext and Krea have dev's very shapes: Kontext, which was trained for other work,
    is told where it says so (FluxKontextPipeline, or SwarmUI's Flux.1-dev/kontext)."""
    dev = "kontext" if "kontext" in called.lower() else "base"
    kinds = {config.out_channels: dev if config.guidance else "schnell"}
    kinds |= {2 * config.out_channels: "control", 2 * config.out_channels + 256: "fill"}
    return kinds.get(config.in_channels, f"{config.in_channels}-channel")


def schedule(config: Config) -> dict:
    """Of files that bring none."""
    dev = {"shift": 3.0, "dynamic": DYNAMIC}
    return FLOW | {"spacing": "trailing", "ends": "trailing"} | (dev if config.guidance else {"shift": 1.0})


def reads(config: Config, others: dict) -> list[tuple[str, str, int, int]]:
    """What the transformer takes from the other networks: (which, what of it, how wide it takes it, how wide it is)."""
    return [
        ("text_encoder", "a text vector", config.pooled, others["text_encoder"].width),
        ("text_encoder_2", "text", config.context, others["text_encoder_2"].width),
        ("vae", "patches", config.out_channels, 4 * others["vae"].latent_channels),
    ]
