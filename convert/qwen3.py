"""Qwen3 as a text encoder: transformers' names, which every file of it has, with or without `model.`. What a family
does not read is dropped: the last layers, the final norm and the head."""

import re
from dataclasses import replace

from ..families.published import QWEN3_4B
from ..models.qwen3 import Config
from .layout import ALONE, DROPPED, Layout
from .rules import Row, Shapes
from .settings import MOST_LAYERS, Settings

TABLE: list[Row] = [
    (r"^(lm_head\.|logit_scale$)", None),  # the second: see layout.DROPPED
    (r"^model\.", ""),
    (r"^norm\.", None),
    (r"\.rotary_emb\.inv_freq$", None),  # a buffer in older files
]
LAYOUTS = {
    "qwen3": Layout(
        "a Qwen3 text encoder",
        [*DROPPED, (ALONE, "text_encoder.")],
        {"text_encoder": "qwen3"},
        {"text_encoder": QWEN3_4B},
    )
}
CLASSES = ("Qwen3ForCausalLM", "Qwen3Model")
ORIGINAL = r"(?!)"  # never: its authors' names are transformers'


def recognise(keys: Shapes) -> str | None:
    return "qwen3" if keys.has(rf"{ALONE}(model\.)?layers\.\d+\.self_attn\.q_norm\.") else None


def table(names: list[str], like: Config) -> list[Row]:
    """TABLE and a row for the layers that are not read."""
    layers = {int(m[1]) for name in names if (m := re.match(r"(?:model\.)?layers\.(\d{1,3})\.", name))}
    unread = [k for k in sorted(layers) if k >= _read(like, len(layers))]
    return [(rf"^(model\.)?layers\.({'|'.join(map(str, unread))})\.", None), *TABLE] if unread else TABLE


def _read(like: Config, layers: int) -> int:
    """How many layers of a file with so many are read: as many as the family reads, or, where it reads one state, all
    but the last."""
    return like.taps[-1] if len(like.taps) > 1 else layers - 1


def kept(whole: Config, like: Config) -> Config:
    """The Config of an encoder, with the layers that its family reads."""
    n = _read(like, whole.layers)
    return replace(whole, layers=n, taps=like.taps if len(like.taps) > 1 else (n,))


def config(shapes: Shapes, like: Config) -> Config:
    """No shape shows theta and eps. The layers that are not read have no place in `shapes`."""
    first = "layers.0."
    head = shapes.size(f"{first}self_attn.q_norm.weight", 0)
    taps = like.taps if len(like.taps) > 1 else (shapes.count("layers"),)
    return Config(
        vocab=shapes.size("embed_tokens.weight", 0),
        width=shapes.size("embed_tokens.weight", 1),
        layers=taps[-1],
        heads=max(1, shapes.size(f"{first}self_attn.q_proj.weight", 0) // head),
        kv_heads=max(1, shapes.size(f"{first}self_attn.k_proj.weight", 0) // head),
        head_dim=head,
        hidden=shapes.size(f"{first}mlp.gate_proj.weight", 0),
        theta=like.theta,
        eps=like.eps,
        taps=taps,
    )


def from_json(s: Settings, cls: str) -> Config:
    """The whole encoder, from transformers' config.json, whose newer versions put theta with the rope's settings."""
    s.one("hidden_act", "silu", ["silu"])
    s.one("attention_bias", False, [False])
    s.one("use_sliding_window", False, [False])
    s.one("rope_scaling", None, [None])
    rope = s.get("rope_parameters", None)
    if rope is not None and (not isinstance(rope, dict) or rope.get("rope_type", "default") != "default"):
        s.refuse("rope_parameters", rope)
    theta = s.positive("rope_theta", 1e4 if rope is None else rope.get("rope_theta", 1e4))
    layers, heads = s.whole("num_hidden_layers", 32, MOST_LAYERS, least=2), s.whole("num_attention_heads", 32)
    return Config(
        vocab=s.whole("vocab_size", 151936),
        width=s.whole("hidden_size", 4096),
        layers=layers,
        heads=heads,
        kv_heads=s.whole("num_key_value_heads", 32),
        head_dim=s.whole("head_dim", 128),
        hidden=s.whole("intermediate_size", 22016),
        theta=theta,
        eps=s.positive("rms_norm_eps", 1e-6),
        taps=(layers,),
    )


def divided(config: Config) -> list[tuple[int, int, str]]:
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return [(queries, keys, "keys"), (config.head_dim, 2, "halves of a head")]
