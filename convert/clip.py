"""CLIP text encoders: transformers' names with or without `text_model.`, and OpenCLIP's with its fused projections."""

import re

from ..models.clip import Config
from .rules import Row, Shapes
from .settings import MOST_LAYERS, Settings

TABLE: list[Row] = [
    (r"position_ids$|^logit_scale$|^attn_mask$", None),  # buffers, and what only CLIP's own training uses
    (r"^(vision_model|visual|visual_projection)\.", None),  # of a whole CLIP, its eyes
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


POSITIONS = 77  # of every CLIP but Long-CLIP, which wants longer chunks

# For text encoders of which only the states are read; many files carry a projection all the same.
UNPROJECTED: list[Row] = [(r"^text_projection(\.weight)?$", None)]


def table(names: list[str]) -> list[Row]:
    return TABLE


def unread(names: list[str]) -> list[Row]:
    """SD 2.x reads OpenCLIP's last layer but one. Original files hold all 24 layers; those exported from diffusers only
    the 23 that are read. Of another count, a file that also holds the projection is taken for a whole encoder."""
    n = len({m[1] for name in names if (m := re.match(r"transformer\.resblocks\.(\d+)\.", name))})
    whole = n == 24 or (n != 23 and "text_projection" in names)
    return [(rf"^transformer\.resblocks\.{n - 1}\.", None)] if whole else []


def config(shapes: Shapes, act: str | None, projected: bool) -> Config:
    """Read off the shapes, names already ours. Not in them: heads, 64 wide in every CLIP in use, and the activation;
    act None is a CLIP of unknown family: only OpenAI's own, 768 wide, has its quick approximation."""
    last = "text_projection.weight"
    vocab, width = (shapes.size("embeddings.token_embedding.weight", axis) for axis in (0, 1))
    return Config(
        vocab=vocab,
        positions=shapes.size("embeddings.position_embedding.weight", 0),
        width=width,
        layers=shapes.count("encoder.layers"),
        heads=max(1, width // 64),
        hidden=shapes.size("encoder.layers.0.mlp.fc1.weight", 0),
        act=act if act is not None else "quick_gelu" if width == 768 else "gelu",
        projection=shapes.size(last, 0) if projected or last in shapes else None,
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
