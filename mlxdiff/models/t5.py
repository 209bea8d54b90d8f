"""T5 v1.1 encoder. ids (B, N) -> (B, N, d). Raffel et al. 2020, Shazeer 2020; names as in transformers' T5EncoderModel.

Its residual stream and the output of its `wo` exceed float16's range: `layers.SHRINK` says what is done."""

import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .layers import SHRINK, StreamNorm, add_shrunk, fused, gelu_tanh, split_heads


@dataclass(frozen=True)
class Config:
    vocab: int
    width: int
    layers: int
    heads: int
    head_dim: int
    hidden: int
    buckets: int
    max_distance: int
    eps: float


@fused
def gated_gelu(x: mx.array, y: mx.array) -> mx.array:
    return (gelu_tanh(x.astype(mx.float32)) * (y.astype(mx.float32) * SHRINK)).astype(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        inner = config.heads * config.head_dim
        self.q, self.k, self.v = (nn.Linear(config.width, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.width, bias=False)
        self.heads = config.heads

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        B, N, _ = x.shape
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.q, self.k, self.v))
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=bias)  # trained without the 1 / sqrt(d)
        return self.o(y.swapaxes(1, 2).reshape(B, N, -1))


class AttentionLayer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.layer_norm = StreamNorm(config.width, config.eps)
        self.SelfAttention = Attention(config)

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class GatedGELU(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(config.width, config.hidden, bias=False) for _ in range(2))
        self.wo = nn.Linear(config.hidden, config.width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.wo(gated_gelu(self.wi_0(x), self.wi_1(x)))


class MLPLayer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.layer_norm = StreamNorm(config.width, config.eps)
        self.DenseReluDense = GatedGELU(config)

    def __call__(self, x: mx.array) -> mx.array:
        return add_shrunk(x, self.DenseReluDense(self.layer_norm(x)))


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.layer = [AttentionLayer(config), MLPLayer(config)]

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        return self.layer[1](self.layer[0](x, bias))


class Encoder(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.block = [Block(config) for _ in range(config.layers)]
        # In the file, the first block holds the table of position biases for all blocks.
        self.block[0].layer[0].SelfAttention.relative_attention_bias = nn.Embedding(config.buckets, config.heads)
        self.final_layer_norm = StreamNorm(config.width, config.eps)


class T5Encoder(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab, config.width)
        self.encoder = Encoder(config)

    def __call__(self, ids: mx.array) -> mx.array:
        """Padding is visible, as in SD3 and FLUX."""
        x = self.shared(ids).astype(mx.float32)
        bias = self.position_bias(ids.shape[1])
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)

    def position_bias(self, n: int) -> mx.array:
        """The biases that each head adds to its scores by distance, the same in every layer: (1, heads, n, n)."""
        i = np.arange(n)
        distance = buckets(i - i[:, None], self.config.buckets, self.config.max_distance)  # (query, key)
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        return table(mx.array(distance)).transpose(2, 0, 1)[None].astype(self.encoder.final_layer_norm.weight.dtype)


def buckets(distance: np.ndarray, count: int, max_distance: int) -> np.ndarray:
    """Sort distances into `count` buckets: half for each direction. Of each half, the first half holds exact distances
    and the second grows with the logarithm. float32 as in the reference: a bucket's edge falls on whole numbers."""
    half, exact = count // 2, count // 4
    far = np.log(np.maximum(np.abs(distance), 1).astype(np.float32) / np.float32(exact))
    far = exact + (far / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)).astype(np.int32)
    near = np.where(np.abs(distance) < exact, np.abs(distance), np.minimum(far, half - 1))
    return (near + half * (distance > 0)).astype(np.int32)
