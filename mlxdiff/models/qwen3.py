"""Qwen3 as a text encoder. ids (B, N) -> (B, N, taps * d), float32: its states after some of its layers, side by side.
Yang et al. 2025; names as in transformers' Qwen3Model. Layers above the last one that is read do not exist here.

In float16 its residual stream may overflow, as T5's does: `layers.SHRINK` says what is done. The states are read from
that stream, so they stay float32: the first layer that reads them casts what it makes of them to its own dtype."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .layers import SHRINK, StreamNorm, add_shrunk, attention, fused, split_heads


@dataclass(frozen=True)
class Config:
    vocab: int
    width: int
    layers: int  # those that are held and run
    heads: int  # of the queries
    kv_heads: int  # of the keys and values, which groups of query heads share
    head_dim: int
    hidden: int
    theta: float  # of the rotary position embedding
    eps: float
    taps: tuple[int, ...]  # after how many layers the states are read; the last is `layers`

    @property
    def output(self) -> int:
        """Width of the output."""
        return len(self.taps) * self.width


@fused
def gated_silu(gate: mx.array, y: mx.array) -> mx.array:
    g = gate.astype(mx.float32)
    return (g * mx.sigmoid(g) * (y.astype(mx.float32) * SHRINK)).astype(gate.dtype)


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        inner, shared = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.width, inner, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(config.width, shared, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(inner, config.width, bias=False)
        self.q_norm, self.k_norm = (nn.RMSNorm(config.head_dim, config.eps) for _ in range(2))
        self.config = config

    def __call__(self, x: mx.array, mask: mx.array | str) -> mx.array:
        c = self.config
        q = self.q_norm(split_heads(self.q_proj(x), c.heads))  # (B, heads, N, d)
        k = self.k_norm(split_heads(self.k_proj(x), c.kv_heads))
        v = split_heads(self.v_proj(x), c.kv_heads)
        q, k = (mx.fast.rope(y, c.head_dim, traditional=False, base=c.theta, scale=1.0, offset=0) for y in (q, k))
        return self.o_proj(attention(q, k, v, mask))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(config.width, config.hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(config.hidden, config.width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """The output, scaled by SHRINK."""
        return self.down_proj(gated_silu(self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.input_layernorm = StreamNorm(config.width, config.eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = StreamNorm(config.width, config.eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, mask: mx.array | str) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), mask)
        return add_shrunk(x, self.mlp(self.post_attention_layernorm(x)))


class Qwen3(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab, config.width)
        self.layers = [Layer(config) for _ in range(config.layers)]

    def __call__(self, ids: mx.array, mask: mx.array | None = None) -> mx.array:
        """mask (B, N): nonzero where a token is visible to itself and to later ones. The first token must be visible.
        None: all tokens."""
        visible, taps = "causal", []
        if mask is not None:
            N = ids.shape[1]
            visible = mx.tri(N, dtype=mx.bool_) & mask.astype(mx.bool_)[:, None, None]  # (B, 1, N, N)
        x = self.embed_tokens(ids).astype(mx.float32)
        for k, layer in enumerate(self.layers, 1):
            x = layer(x, visible)
            taps += [x] * self.config.taps.count(k)
        return taps[0] if len(taps) == 1 else mx.concatenate(taps, axis=-1)
