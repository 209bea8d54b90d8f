"""The T5 encoder: transformers' names, which every file of it has; of whole T5 models the encoder alone."""

from ..models.t5 import Config
from .rules import Row, Shapes
from .settings import MOST_LAYERS, Settings

TABLE: list[Row] = [
    (r"^(decoder\.|lm_head\.)|^(logit_scale|spiece_model)$", None),  # the last two: see sd.DROPPED
    (r"^encoder\.embed_tokens\.", "shared."),
]


def table(names: list[str]) -> list[Row]:
    """Where a file holds the words under both of their names, one is a copy of the other."""
    twice = "shared.weight" in names
    return [(r"^encoder\.embed_tokens\.", None), *TABLE] if twice else TABLE


def config(shapes: Shapes) -> Config:
    """Read off the shapes. Not in them: the distance beyond which all positions are one, and the norms' eps."""
    first = "encoder.block.0.layer."
    bias = f"{first}0.SelfAttention.relative_attention_bias.weight"
    heads = shapes.size(bias, 1)
    return Config(
        vocab=shapes.size("shared.weight", 0),
        width=shapes.size("shared.weight", 1),
        layers=shapes.count("encoder.block"),
        heads=heads,
        head_dim=max(1, shapes.size(f"{first}0.SelfAttention.q.weight", 0) // heads),
        hidden=shapes.size(f"{first}1.DenseReluDense.wi_0.weight", 0),
        buckets=shapes.size(bias, 0),
        max_distance=128,
        eps=1e-6,
    )


def from_json(s: Settings, cls: str) -> Config:
    """From transformers' config.json."""
    s.one("feed_forward_proj", "relu", ["gated-gelu"])
    s.one("dense_act_fn", "gelu_new", ["gelu_new"])
    buckets = s.whole("relative_attention_num_buckets", 32, least=4)
    return Config(
        vocab=s.whole("vocab_size", 32128),
        width=s.whole("d_model", 512),
        layers=s.whole("num_layers", 6, MOST_LAYERS),
        heads=s.whole("num_heads", 8),
        head_dim=s.whole("d_kv", 64),
        hidden=s.whole("d_ff", 2048),
        buckets=buckets,
        max_distance=s.whole("relative_attention_max_distance", 128, least=buckets // 4 + 1),
        eps=s.positive("layer_norm_epsilon", 1e-6),
    )
