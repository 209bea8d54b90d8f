"""The T5 encoder: transformers' names, which every file of it has. Of a whole T5 model only the encoder is read."""

from ..families.published import T5_XXL
from ..models.t5 import Config
from .layout import ALONE, DROPPED, Layout
from .rules import Row, Shapes
from .settings import MOST_LAYERS, Settings

TABLE: list[Row] = [
    (r"^(decoder\.|lm_head\.)|^(logit_scale|spiece_model)$", None),  # the last two: see layout.DROPPED
    (r"^encoder\.embed_tokens\.", "shared."),
]
LAYOUTS = {
    "t5": Layout(
        "a T5 text encoder", [*DROPPED, (ALONE, "text_encoder.")], {"text_encoder": "t5"}, {"text_encoder": T5_XXL}
    )
}
CLASSES = ("T5EncoderModel",)
ORIGINAL = r"(?!)"  # never: its authors' names are transformers'


def recognise(keys: Shapes) -> str | None:
    return "t5" if keys.has(rf"{ALONE}encoder\.block\.\d+\.layer\.0\.SelfAttention\.") else None


def table(names: list[str], like: Config | None) -> list[Row]:
    """Where a file holds the words under both of their names, one is a copy of the other."""
    twice = "shared.weight" in names
    return [(r"^encoder\.embed_tokens\.", None), *TABLE] if twice else TABLE


def config(shapes: Shapes, like: Config) -> Config:
    """No shape shows the distance beyond which positions are not told apart, nor the norms' eps."""
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
        max_distance=like.max_distance,
        eps=like.eps,
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


def divided(config: Config) -> list[tuple[int, int, str]]:
    return []
