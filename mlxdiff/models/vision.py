"""Vision transformers that read a picture for a denoiser: CLIP's (Radford et al. 2021) and SigLIP's (Zhai et al. 2023).
pixels (B, size, size, 3) -> Output. Names as in transformers' CLIPVisionModelWithProjection and SiglipVisionModel,
without `vision_model.`."""

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .clip import Encoder


@dataclass(frozen=True)
class Config:
    size: int  # pixels along both edges of a picture
    patch: int  # pixels along both edges of a token
    width: int
    layers: int
    heads: int
    hidden: int
    act: str  # a key of clip.ACTS
    projection: int | None  # width of the pooled output; None: nothing is pooled
    class_token: bool  # CLIP: a token for the whole picture, and a norm before the first layer
    eps: float

    @property
    def tokens(self) -> int:
        return (self.size // self.patch) ** 2 + self.class_token


class Output(NamedTuple):
    inner: mx.array  # (B, N, d), what the last layer reads
    last: mx.array  # (B, N, d), what it gives, after the final norm
    pooled: mx.array | None  # (B, projection), the first token of `last`


class Embeddings(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        width, patch = config.width, config.patch
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=not config.class_token)
        self.position_embedding = nn.Embedding(config.tokens, width)
        if config.class_token:
            self.class_embedding = mx.zeros(width)

    def __call__(self, pixels: mx.array) -> mx.array:
        x = self.patch_embedding(pixels).flatten(1, 2)  # (B, N, d)
        if "class_embedding" in self:
            first = mx.broadcast_to(self.class_embedding, (x.shape[0], 1, x.shape[2]))
            x = mx.concatenate([first, x], axis=1)
        return x + self.position_embedding.weight


class Vision(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        if config.class_token:
            self.pre_layrnorm = nn.LayerNorm(config.width, config.eps)  # so spelt in the files
        self.encoder = Encoder(config, mask=None)
        self.post_layernorm = nn.LayerNorm(config.width, config.eps)
        if config.projection is not None:
            self.visual_projection = nn.Linear(config.width, config.projection, bias=False)

    def __call__(self, pixels: mx.array) -> Output:
        x = self.embeddings(pixels.astype(self.post_layernorm.weight.dtype))
        if "pre_layrnorm" in self:
            x = self.pre_layrnorm(x)
        *first, end = self.encoder.layers
        for layer in first:
            x = layer(x)
        last = self.post_layernorm(end(x))
        pooled = self.visual_projection(last[:, 0]) if "visual_projection" in self else None
        return Output(x, last, pooled)
