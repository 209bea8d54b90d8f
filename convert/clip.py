"""CLIP text encoders: transformers' names with or without `text_model.`, and OpenCLIP's with its fused projections."""

import re

from ..errors import Error
from ..families.published import CLIP_G, CLIP_H
from ..models.clip import Config
from .layout import ALONE, DROPPED, Layout
from .rules import Row, Shapes
from .settings import MOST_LAYERS, Settings

TABLE: list[Row] = [
    (r"position_ids$|^logit_scale$|^attn_mask$", None),  # buffers, and what only CLIP's own training uses
    (r"^(vision_model|visual|visual_projection)\.", None),  # the vision model of a whole CLIP
    (r"^text_model\.", ""),
    # OpenCLIP
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "embeddings.token_embedding."),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.attn\.in_proj_(weight|bias)$", tuple(rf".self_attn.{p}_proj.\1" for p in "qkv")),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^ln_final\.", "final_layer_norm."),
    (r"^text_projection$", "text_projection.weight.T"),  # OpenCLIP multiplies from the right
]
_UNPROJECTED: Row = (r"^text_projection(\.weight)?$", None)
LAYOUTS = {
    "clip": Layout("a CLIP text encoder", [*DROPPED, (ALONE, "text_encoder.")], {"text_encoder": "clip"}),
    "clip-g": Layout(
        "a CLIP text encoder with projection",
        [*DROPPED, (ALONE, "text_encoder_2.")],
        {"text_encoder_2": "clip"},
        {"text_encoder_2": CLIP_G},
    ),
}
CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
ORIGINAL = r"^transformer\.resblocks\.\d"
POSITIONS = 77  # of every CLIP but Long-CLIP, which reads longer chunks
# What a CLIP's text is filled up with: the end of the text in OpenAI's, and id 0 in OpenCLIP's. By their activations.
PADS = {"quick_gelu": "<|endoftext|>", "gelu": "!"}


def recognise(keys: Shapes) -> str | None:
    if not keys.has(rf"{ALONE}(text_model\.)?encoder\.layers\.\d+\.self_attn\.|{ORIGINAL}"):
        return None
    large = keys.first(r"(final_layer_norm|ln_final)\.weight$") != (768,)
    return "clip-g" if large and keys.has(rf"{ALONE}text_projection") else "clip"


def table(names: list[str], like: Config | None) -> list[Row]:
    """Many files hold a projection, though the published network has none. The encoder of SD 2.x lacks OpenCLIP's last
    layer, which is never read: original files hold all 24 layers, those exported from diffusers only 23. With any other
    number of layers, a file that holds the projection too is taken for a whole encoder."""
    rows = TABLE if like is None or like.projection is not None else [_UNPROJECTED, *TABLE]
    if like == CLIP_H:
        n = len({m[1] for name in names if (m := re.match(r"transformer\.resblocks\.(\d+)\.", name))})
        if n == 24 or (n != 23 and "text_projection" in names):
            rows = [(rf"^transformer\.resblocks\.{n - 1}\.", None), *rows]
    return rows


def config(shapes: Shapes, like: Config | None) -> Config:
    """No shape shows the heads, which are 64 wide in every CLIP in use, nor the activation. In a CLIP that may be of
    any family, it is the quick approximation only if the width is OpenAI's, 768."""
    last = "text_projection.weight"
    positions = shapes.size("embeddings.position_embedding.weight", 0)
    if positions > POSITIONS:
        long = f"{shapes.file} has a Long-CLIP of {positions} positions, which is not read."
        raise Error(long, f"Use the plain one, of {POSITIONS} positions.")
    vocab, width = (shapes.size("embeddings.token_embedding.weight", axis) for axis in (0, 1))
    return Config(
        vocab=vocab,
        positions=positions,
        width=width,
        layers=shapes.count("encoder.layers"),
        heads=max(1, width // 64),
        hidden=shapes.size("encoder.layers.0.mlp.fc1.weight", 0),
        act=like.act if like is not None else "quick_gelu" if width == 768 else "gelu",
        projection=shapes.size(last, 0) if last in shapes or (like and like.projection) else None,
        eos=vocab - 1,
        eps=1e-5,
    )


def from_json(s: Settings, cls: str) -> Config:
    """From transformers' config.json."""
    vocab, eos = s.whole("vocab_size", 49408), s.whole("eos_token_id", 49407)
    return Config(
        vocab=vocab,
        positions=s.whole("max_position_embeddings", 77),
        width=s.whole("hidden_size", 512),
        layers=s.whole("num_hidden_layers", 12, MOST_LAYERS),
        heads=s.whole("num_attention_heads", 8),
        hidden=s.whole("intermediate_size", 2048),
        act=s.one("hidden_act", "quick_gelu", ["quick_gelu", "gelu"]),
        projection=s.whole("projection_dim", 512) if cls.endswith("WithProjection") else None,
        eos=vocab - 1 if eos == 2 else eos,  # 2 is in configs older than the field; it meant the highest id
        eps=s.positive("layer_norm_eps", 1e-5),
    )


def of_whole(s: Settings) -> Settings:
    """Of a whole CLIP's config.json, what says more than shapes: the heads, the activation."""
    return s.of_whole("text_config", "CLIPTextModelWithProjection")


def divided(config: Config) -> list[tuple[int, int, str]]:
    return [(config.width, config.heads, "heads")]
