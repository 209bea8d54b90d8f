"""Depth Anything: how near each pixel of a picture is. (B, H, W, 3), normalised, in multiples of the patch ->
(B, H, W), larger is nearer, in units that differ from picture to picture. A vision transformer (DINOv2, Oquab et al.
2023) with DPT's head (Ranftl et al. 2021). Yang et al. 2024; names as in transformers' DepthAnythingForDepthEstimation,
without some that only lead to others."""

from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .layers import Conv3x3, attention, gelu, split_heads

# What stands behind `taps` in DPT: how much finer or coarser each map is than the patches.
ENLARGED, HALVED = (4, 2, 1), 2


@dataclass(frozen=True)
class Config:
    patch: int
    grid: int  # positions along an edge that were trained
    width: int
    heads: int
    hidden: int
    layers: int
    taps: tuple[int, ...]  # the head reads what these layers give, counted from 1
    neck: tuple[int, ...]  # channels of each
    fusion: int
    head: int
    eps: float


class SelfAttention(nn.Module):
    def __init__(self, c: int, heads: int):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(c, c) for _ in range(3))
        self.out = nn.Linear(c, c)
        self.heads = heads

    def __call__(self, x: mx.array) -> mx.array:
        return self.out(attention(*(split_heads(f(x), self.heads) for f in (self.query, self.key, self.value))))


class MLP(nn.Module):
    def __init__(self, c: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c, hidden), nn.Linear(hidden, c)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(gelu(self.fc1(x)))


class Scale(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.lambda1 = mx.ones(c)

    def __call__(self, x: mx.array) -> mx.array:
        return x * self.lambda1


class Layer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        c = config.width
        self.norm1, self.norm2 = nn.LayerNorm(c, eps=config.eps), nn.LayerNorm(c, eps=config.eps)
        self.attention, self.mlp = SelfAttention(c, config.heads), MLP(c, config.hidden)
        self.layer_scale1, self.layer_scale2 = Scale(c), Scale(c)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.layer_scale1(self.attention(self.norm1(x)))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class Backbone(nn.Module):
    """(B, H, W, 3) -> the maps (B, h, w, c) of the layers in `taps`."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        c = config.width
        self.cls_token = mx.zeros((1, 1, c))
        self.position_embeddings = mx.zeros((1, config.grid**2 + 1, c))
        self.projection = nn.Conv2d(3, c, config.patch, stride=config.patch)
        self.layer = [Layer(config) for _ in range(config.layers)]
        self.layernorm = nn.LayerNorm(c, eps=config.eps)

    def __call__(self, x: mx.array) -> list[mx.array]:
        x = self.projection(x)
        B, h, w, c = x.shape
        x = mx.concatenate([mx.broadcast_to(self.cls_token, (B, 1, c)), x.reshape(B, h * w, c)], axis=1)
        x, maps = x + self.positions(h, w), []
        for i, layer in enumerate(self.layer):
            x = layer(x)
            if i + 1 in self.config.taps:
                maps.append(self.layernorm(x)[:, 1:].reshape(B, h, w, c))
        return maps

    def positions(self, h: int, w: int) -> mx.array:
        """Those that were trained, resized for a picture of another size."""
        n = self.config.grid
        if (h, w) == (n, n):
            return self.position_embeddings
        first, rest = self.position_embeddings[:, :1], self.position_embeddings[:, 1:].reshape(1, n, n, -1)
        return mx.concatenate([first, resized(rest, h, w, "bicubic").reshape(1, h * w, -1)], axis=1)


class Enlarge(nn.Module):
    """A transposed convolution whose kernel is as long as its stride: each pixel becomes a square of its own."""

    def __init__(self, c: int, n: int):
        super().__init__()
        self.weight, self.bias = mx.zeros((c, n, n, c)), mx.zeros(c)  # (in, n, n, out)

    def __call__(self, x: mx.array) -> mx.array:
        B, h, w, c = x.shape
        n = self.weight.shape[1]
        y = (x @ self.weight.reshape(c, n * n * c)).reshape(B, h, w, n, n, c).transpose(0, 1, 3, 2, 4, 5)
        return y.reshape(B, h * n, w * n, c) + self.bias


class Reassemble(nn.Module):
    """One map of the backbone at another size and width."""

    def __init__(self, config: Config, i: int):
        super().__init__()
        c = config.neck[i]
        self.projection = nn.Linear(config.width, c)  # a 1x1 convolution in the file
        if i >= len(ENLARGED):
            self.resize = nn.Conv2d(c, c, 3, stride=HALVED, padding=1)
        elif ENLARGED[i] > 1:
            self.resize = Enlarge(c, ENLARGED[i])

    def __call__(self, x: mx.array) -> mx.array:
        x = self.projection(x)
        return self.resize(x) if "resize" in self else x


class Residual(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.convolution1, self.convolution2 = (Conv3x3(c, c) for _ in range(2))

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.convolution2(nn.relu(self.convolution1(nn.relu(x))))


class Fusion(nn.Module):
    """Adds a finer map to what the coarser ones gave. The first has nothing to add to."""

    def __init__(self, c: int, first: bool):
        super().__init__()
        if not first:
            self.residual_layer1 = Residual(c)
        self.residual_layer2 = Residual(c)
        self.projection = nn.Linear(c, c)  # a 1x1 convolution in the file

    def __call__(self, x: mx.array, more: mx.array | None, size: tuple[int, int]) -> mx.array:
        if more is not None:
            x = x + self.residual_layer1(more)
        return self.projection(resized(self.residual_layer2(x), *size, "corners"))


class Head(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        c = config.fusion
        self.conv1 = Conv3x3(c, c // 2)
        self.conv2 = Conv3x3(c // 2, config.head)
        self.conv3 = nn.Linear(config.head, 1)  # a 1x1 convolution in the file

    def __call__(self, x: mx.array, H: int, W: int) -> mx.array:
        x = resized(self.conv1(x), H, W, "corners")
        return nn.relu(self.conv3(nn.relu(self.conv2(x))))[..., 0]


class DepthAnything(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        n = len(config.taps)
        self.backbone = Backbone(config)
        self.reassemble = [Reassemble(config, i) for i in range(n)]
        self.convs = [Conv3x3(c, config.fusion, bias=False) for c in config.neck]
        self.fusion = [Fusion(config.fusion, i == 0) for i in range(n)]
        self.head = Head(config)

    def __call__(self, x: mx.array) -> mx.array:
        _, H, W, _ = x.shape
        taken = zip(self.backbone(x), self.reassemble, self.convs, strict=True)
        maps = [conv(reassemble(y)) for y, reassemble, conv in taken][::-1]  # coarsest first
        y, more = maps[0], None
        for i, fuse in enumerate(self.fusion):
            h, w = maps[i + 1].shape[1:3] if i + 1 < len(maps) else (2 * n for n in y.shape[1:3])
            y, more = fuse(y, more, (h, w)), maps[i + 1] if i + 1 < len(maps) else None
        return self.head(y, H, W)


def resized(x: mx.array, h: int, w: int, kind: str) -> mx.array:
    """(B, h0, w0, c) -> (B, h, w, c), as torch's interpolate: by one matrix for each axis."""
    dtype = x.dtype
    for axis, n in ((1, h), (2, w)):
        matrix = mx.array(weights(x.shape[axis], n, kind))
        x = mx.moveaxis(mx.tensordot(matrix, x.astype(mx.float32), axes=[[1], [axis]]), 0, axis)
    return x.astype(dtype)


@cache
def weights(n: int, m: int, kind: str) -> np.ndarray:
    """(m, n): how much of each of n pixels is in each of m. corners: linear, the outermost pixels stay where they are;
    bicubic: Keys' kernel with a = -0.75, centres stay where they are, and the edge is repeated."""
    if kind == "corners":
        at = np.linspace(0, n - 1, m) if m > 1 else np.zeros(1)
        taps, kernel = (0, 1), lambda t: np.maximum(0, 1 - np.abs(t))
    else:
        at = (np.arange(m) + 0.5) * n / m - 0.5
        taps, kernel = (-1, 0, 1, 2), _keys
    base = np.floor(at).astype(int)
    made = np.zeros((m, n), np.float32)
    for tap in taps:
        np.add.at(made, (np.arange(m), np.clip(base + tap, 0, n - 1)), kernel(at - base - tap))
    return made


def _keys(t: np.ndarray, a: float = -0.75) -> np.ndarray:
    t = np.abs(t)
    near, far = ((a + 2) * t - (a + 3)) * t * t + 1, ((t - 5) * t + 8) * t * a - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0))
