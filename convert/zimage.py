"""Z-Image: diffusers' names, under which its authors published it, and ComfyUI's, whose attention has one fused layer
for queries, keys and values."""

from ..models.zimage import Config
from .layout import of_transformer
from .rules import Row, Shapes
from .settings import MOST_LAYERS, Settings

TABLE: list[Row] = [
    (r"^norm_final\.weight$", None),  # ComfyUI's files have it, and nothing reads it
    (r"^all_(x_embedder|final_layer)\.2-1\.", r"\1."),  # patches of 2 x 2 pixels of 1 frame: there are no others
    (r"\.attention\.([qk])_norm\.", r".attention.norm_\1."),
    (r"\.attention\.out\.", ".attention.to_out.0."),
    (r"\.attention\.qkv\.weight$", tuple(f".attention.to_{p}.weight" for p in "qkv")),
]
PUBLISHED: list[Row] = [(r"^(x_embedder|final_layer)\b", r"all_\1.2-1")]  # our layers' names to diffusers'
LAYOUTS = {"zimage": of_transformer("z-image", {"qwen3_4b": "text_encoder"}, vae="ae.safetensors")}
CLASSES = ("ZImageTransformer2DModel",)
ORIGINAL = r"\.attention\.qkv\."


def recognise(keys: Shapes) -> str | None:
    """Its ancestor Lumina-Image 2 has no tokens to fill up with."""
    return "zimage" if keys.has(r"(^|\.)cap_pad_token$") else None


def table(names: list[str], like: Config | None) -> list[Row]:
    return TABLE


def config(shapes: Shapes, like: Config) -> Config:
    """No shape shows theta and eps, nor how a head's 128 numbers are shared among the axes."""
    width, head = shapes.size("x_embedder.weight", 0), shapes.size("layers.0.attention.norm_q.weight", 0)
    side = 2 * (3 * head // 16)  # 32, 48, 48
    return Config(
        in_channels=shapes.size("x_embedder.weight", 1),
        out_channels=shapes.size("final_layer.linear.weight", 0),
        context=shapes.size("cap_embedder.0.weight", 0),
        width=width,
        heads=max(1, width // head),
        hidden=shapes.size("layers.0.feed_forward.w1.weight", 0),
        layers=shapes.count("layers"),
        refiners=shapes.count("noise_refiner"),
        axes=(head - 2 * side, side, side),
        theta=like.theta,
        eps=like.eps,
    )


def from_json(s: Settings, cls: str) -> Config:
    """From diffusers' config.json."""
    heads, width = s.whole("n_heads", 30), s.whole("dim", 3840)
    axes = s.wholes("axes_dims", [32, 48, 48], 3)
    if sum(axes) * heads != width or any(a % 2 for a in axes):
        s.refuse("axes_dims", list(axes))
    only = {"all_patch_size": [2], "all_f_patch_size": [1], "n_kv_heads": heads, "qk_norm": True, "t_scale": 1000.0}
    for name, value in (only | {"siglip_feat_dim": None}).items():
        s.one(name, value, [value])
    channels = 4 * s.whole("in_channels", 16)
    return Config(
        in_channels=channels,
        out_channels=channels,
        context=s.whole("cap_feat_dim", 2560),
        width=width,
        heads=heads,
        hidden=int(width / 3 * 8),
        layers=s.whole("n_layers", 30, MOST_LAYERS),
        refiners=s.whole("n_refiner_layers", 2, MOST_LAYERS),
        axes=axes,
        theta=s.positive("rope_theta", 256.0),
        eps=s.positive("norm_eps", 1e-5),
    )


def layers(config: Config) -> list[str]:
    """The layers' names in diffusers and in ComfyUI that are not ours."""
    final = "all_final_layer.2-1"
    blocks = [f"{name}_refiner.{i}" for name in ("noise", "context") for i in range(config.refiners)]
    blocks += [f"layers.{i}" for i in range(config.layers)]
    return [
        *(f"{block}.attention.{name}" for block in blocks for name in ("qkv", "out", "q_norm", "k_norm")),
        *("all_x_embedder.2-1", f"{final}.linear", f"{final}.adaLN_modulation.1"),
    ]


def divided(config: Config) -> list[tuple[int, int, str]]:
    return [(config.width, config.heads, "heads")]


def layout(config: Config, components: dict) -> str:
    return "zimage"


def variant(config: Config, called: str, schedule: dict | None) -> str:
    """Turbo has the same shapes. A scheduler's shift shows it, which is 3 in Turbo and 6 in Z-Image; of a file without
    a scheduler, only what it is called."""
    if schedule is not None:
        return "turbo" if schedule["shift"] < 4.5 else "base"
    return "turbo" if "turbo" in called.lower() else "base"


def reads(config: Config, others: dict) -> list[tuple[str, str, int, int]]:
    return [
        ("text_encoder", "text", config.context, others["text_encoder"].output),
        ("vae", "patches", config.out_channels, 4 * others["vae"].latent_channels),
    ]
