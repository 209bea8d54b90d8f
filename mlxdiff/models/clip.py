"""CLIP text encoder. ids (B, 77) -> Output. Radford et al. 2021; names as in transformers' CLIPTextModelWithProjection,
without `text_model.`."""

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .layers import attention, gelu, gelu_tanh, quick_gelu, split_heads

ACTS = {"quick_gelu": quick_gelu, "gelu": gelu, "gelu_tanh": gelu_tanh}


@dataclass(frozen=True)
class Config:
    vocab: int
    positions: int
    width: int
    layers: int
    heads: int
    hidden: int
    act: str  # a key of ACTS
    projection: int | None  # width of the pooled output, if the model projects it
    eos: int
    eps: float


class Output(NamedTuple):
    states: list[mx.array]  # embeddings, then after each layer, (B, N, d) each
    last: mx.array  # (B, N, d), the last state after the final norm
    pooled: mx.array  # (B, projection or d), `last` at the end of the text


class SelfAttention(nn.Module):
    def __init__(self, c: int, heads: int, mask: str | None):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(c, c), nn.Linear(c, c)
        self.v_proj, self.out_proj = nn.Linear(c, c), nn.Linear(c, c)
        self.heads, self.mask = heads, mask

    def __call__(self, x: mx.array) -> mx.array:
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(q, k, v, mask=self.mask))


class MLP(nn.Module):
    def __init__(self, c: int, hidden: int, act: str):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c, hidden), nn.Linear(hidden, c)
        self.act = ACTS[act]

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self.act(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, config: Config, mask: str | None):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width, config.eps)
        self.self_attn = SelfAttention(config.width, config.heads, mask)
        self.layer_norm2 = nn.LayerNorm(config.width, config.eps)
        self.mlp = MLP(config.width, config.hidden, config.act)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab, config.width)
        self.position_embedding = nn.Embedding(config.positions, config.width)

    @property
    def words(self) -> int:
        """How many ids have an embedding; taught words have come to those of the file."""
        return self.token_embedding.weight.shape[0]

    def __call__(self, ids: mx.array) -> mx.array:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class Encoder(nn.Module):
    """The layers. `vision` has the same, without the mask."""

    def __init__(self, config: Config, mask: str | None = "causal"):
        super().__init__()
        self.layers = [Layer(config, mask) for _ in range(config.layers)]


class CLIPText(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.width, config.eps)
        if config.projection is not None:
            self.text_projection = nn.Linear(config.width, config.projection, bias=False)

    def __call__(self, ids: mx.array) -> Output:
        states = [self.embeddings(ids)]  # (B, N, d)
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
        last = self.final_layer_norm(states[-1])
        # The text ends at the first eos; without an eos, at the highest id, as in early CLIP files.
        end = mx.where(ids == self.config.eos, self.embeddings.words, ids).argmax(axis=1)
        pooled = last[mx.arange(ids.shape[0]), end]  # (B, d)
        if "text_projection" in self:
            pooled = self.text_projection(pooled)
        return Output(states, last, pooled)
