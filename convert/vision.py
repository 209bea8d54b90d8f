"""Vision models that reference pictures go through: CLIP's and SigLIP's, under transformers' names."""

import math

from ..families.published import CLIP_VIT_H, SIGLIP
from ..models.vision import Config
from .layout import Layout
from .rules import Row, Shapes
from .settings import MOST_LAYERS, Settings

TABLE: list[Row] = [
    (r"position_ids$", None),
    (r"^(text_model|text_projection)\.|^logit_(scale|bias)$", None),  # the text model of a whole CLIP
    (r"^(vision_model\.)?head\.", None),  # SigLIP's pooling, which Redux does not read
    (r"^vision_model\.", ""),
]
LAYOUTS = {
    "vision": Layout(
        "a vision model",
        [(r"^", "image_encoder.")],
        {"image_encoder": "vision"},
        use="It reads pictures for an adapter if its folder is called image_encoder and lies beside the adapter.",
    )
}
CLASSES = ("CLIPVisionModelWithProjection", "CLIPVisionModel", "SiglipVisionModel")
ORIGINAL = r"(?!)"
_PATCH = "embeddings.patch_embedding.weight"


def recognise(keys: Shapes) -> str | None:
    """A whole CLIP is recognised by its text model: elsewhere only that is read."""
    alone = keys.has(rf"^(vision_model\.)?{_PATCH}$") and not keys.has(r"^text_model\.")
    return "vision" if alone else None


def table(names: list[str], like: Config | None) -> list[Row]:
    return TABLE


def config(shapes: Shapes, like: Config | None) -> Config:
    """No shape shows the heads, which are 16 in all that are in use, nor the activation."""
    width, patch = shapes.size(_PATCH, 0), shapes.size(_PATCH, 2)
    clip, projection = "embeddings.class_embedding" in shapes, "visual_projection.weight"
    tokens = shapes.size("embeddings.position_embedding.weight", 0) - clip
    edge = patch * max(1, math.isqrt(max(0, tokens)))
    return Config(
        size=SIGLIP.size if not clip and edge // patch == SIGLIP.size // patch else edge,  # 384, of which 378 are read
        patch=patch,
        width=width,
        layers=shapes.count("encoder.layers"),
        heads=CLIP_VIT_H.heads,
        hidden=shapes.size("encoder.layers.0.mlp.fc1.weight", 0),
        act=SIGLIP.act if not clip else "quick_gelu" if width == 1024 else CLIP_VIT_H.act,  # quick in OpenAI's ViT-L
        projection=shapes.size(projection, 0) if projection in shapes else None,
        class_token=clip,
        eps=CLIP_VIT_H.eps if clip else SIGLIP.eps,
    )


def from_json(s: Settings, cls: str) -> Config:
    """From transformers' config.json."""
    clip = cls.startswith("CLIP")
    act = s.one("hidden_act", *("quick_gelu", ["quick_gelu", "gelu"]) if clip else (_TANH, [_TANH]))
    s.one("num_channels", 3, [3])
    return Config(
        size=s.whole("image_size", 224, 4096),
        patch=s.whole("patch_size", 32 if clip else 16, 1024),
        width=s.whole("hidden_size", 768),
        layers=s.whole("num_hidden_layers", 12, MOST_LAYERS),
        heads=s.whole("num_attention_heads", 12),
        hidden=s.whole("intermediate_size", 3072),
        act="gelu_tanh" if act == _TANH else act,
        projection=s.whole("projection_dim", 512) if cls.endswith("WithProjection") else None,
        class_token=clip,
        eps=s.positive("layer_norm_eps", 1e-5 if clip else 1e-6),
    )


def of_whole(s: Settings) -> Settings:
    """Of a whole CLIP's config.json, what says more than shapes: the heads, the activation."""
    return s.of_whole("vision_config", "CLIPVisionModelWithProjection")


_TANH = "gelu_pytorch_tanh"


def divided(config: Config) -> list[tuple[int, int, str]]:
    return [(config.width, config.heads, "heads")]
