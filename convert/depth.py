"""Depth Anything: transformers' names, which the hub's files have, and its newer ones inside attention."""

import math

from ..errors import Error
from ..models.depth import Config
from .layout import Layout
from .rules import Row, Shapes
from .settings import MOST_LAYERS, Settings

# Depth Anything V2 small, as published. Its file alone has no shape that shows heads and taps.
V2_SMALL = Config(
    patch=14, grid=37, width=384, heads=6, hidden=1536, layers=12, taps=(3, 6, 9, 12), neck=(48, 96, 192, 384),
    fusion=64, head=32, eps=1e-6,
)  # fmt: skip
LAYOUTS = {
    "depth": Layout(
        "a Depth Anything model",
        [(r"^", "depth.")],
        {"depth": "depth"},
        {"depth": V2_SMALL},
        use="Make depth pictures with it: mlxdiff detect PICTURE depth -m FILE.",
    )
}
CLASSES = ("DepthAnythingForDepthEstimation",)
ORIGINAL = r"(?!)"  # never: only transformers' names are read
TABLE: list[Row] = [
    (r"^backbone\.embeddings\.mask_token$", None),  # of training
    (r"^neck\.fusion_stage\.layers\.0\.residual_layer1\.", None),  # never used: the first has nothing to add
    (r"^backbone\.(embeddings\.patch_embeddings|embeddings|encoder)\.", "backbone."),
    (r"\.attention\.attention\.", ".attention."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attention.out."),
    (r"\.attention\.q_proj\.", ".attention.query."),
    (r"\.attention\.k_proj\.", ".attention.key."),
    (r"\.attention\.v_proj\.", ".attention.value."),
    (r"^neck\.reassemble_stage\.layers\.", "reassemble."),
    (r"^neck\.fusion_stage\.layers\.", "fusion."),
    (r"^neck\.convs\.", "convs."),
]


def recognise(keys: Shapes) -> str | None:
    return "depth" if keys.has(r"^neck\.fusion_stage\.layers\.0\.") and keys.has(r"^backbone\.embeddings\.") else None


def table(names: list[str], like: Config | None) -> list[Row]:
    return TABLE


def config(shapes: Shapes, like: Config) -> Config:
    layers, width = shapes.count("backbone.layer"), shapes.size("backbone.position_embeddings", 2)
    if layers != like.layers:
        raise Error(
            f"{shapes.file} is a depth model of {layers} layers; which of them its head reads, no shape shows.",
            "Give the folder whose config.json says so.",
        )
    return Config(
        patch=shapes.size("backbone.projection.weight", 2),
        grid=math.isqrt(shapes.size("backbone.position_embeddings", 1) - 1),
        width=width,
        heads=max(1, width * like.heads // like.width),
        hidden=shapes.size("backbone.layer.0.mlp.fc1.weight", 0),
        layers=layers,
        taps=like.taps,
        neck=tuple(shapes.size(f"reassemble.{i}.projection.weight", 0) for i in range(len(like.taps))),
        fusion=shapes.size("head.conv1.weight", 1),
        head=shapes.size("head.conv2.weight", 0),
        eps=like.eps,
    )


def from_json(s: Settings, cls: str) -> Config:
    b = s.inner("backbone_config")
    b.one("model_type", None, ["dinov2"])
    b.one("num_channels", 3, [3])
    b.one("hidden_act", "gelu", ["gelu"])
    b.one("qkv_bias", True, [True])
    b.one("use_swiglu_ffn", False, [False])
    b.one("apply_layernorm", True, [True])
    b.one("reshape_hidden_states", True, [False])
    s.one("depth_estimation_type", "relative", ["relative"])
    s.one("max_depth", 1, [1])
    s.one("head_in_index", -1, [-1])
    s.one("reassemble_factors", [4, 2, 1, 0.5], [[4, 2, 1, 0.5]])
    patch, width = b.whole("patch_size", 14, 64), b.whole("hidden_size", 768, 2**16)
    s.one("patch_size", 14, [patch])
    s.one("reassemble_hidden_size", 384, [width])
    layers, size = b.whole("num_hidden_layers", 12, MOST_LAYERS), b.whole("image_size", 224, 2**16, least=patch)
    taps = b.wholes("out_indices", [], 4, layers)
    if list(taps) != sorted(set(taps)):
        b.refuse("out_indices", list(taps))
    return Config(
        patch=patch,
        grid=size // patch,
        width=width,
        heads=b.whole("num_attention_heads", 12),
        hidden=width * b.whole("mlp_ratio", 4, 64),
        layers=layers,
        taps=taps,
        neck=s.wholes("neck_hidden_sizes", [48, 96, 192, 384], 4, 2**16),
        fusion=s.whole("fusion_hidden_size", 64, 2**16, least=2),
        head=s.whole("head_hidden_size", 32, 2**16),
        eps=b.positive("layer_norm_eps", 1e-6),
    )


def divided(config: Config) -> list[tuple[int, int, str]]:
    return [(config.width, config.heads, "heads")]
