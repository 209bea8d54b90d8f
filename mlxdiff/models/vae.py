"""The VAE between pictures (B, H, W, 3) in [-1, 1] and latents (B, h, w, c) at the scale the diffusion model sees.
Rombach et al. 2022; names as in diffusers' AutoencoderKL, with its newer names for attention."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .layers import Attention, Conv3x3, Downsample, GroupNorm, ResBlock, Upsample, pack, unpack

EPS = 1e-6  # eps of every norm


@dataclass(frozen=True)
class Config:
    in_channels: int
    out_channels: int
    latent_channels: int
    channels: tuple[int, ...]  # per level, finest first
    layers: int  # residual blocks per level of the encoder; one more in the decoder
    groups: int
    scale: float
    shift: float
    quant_conv: bool
    post_quant_conv: bool
    mid_attention: bool
    decoder_channels: tuple[int, ...] | None = None  # if they are not the encoder's
    # The eps of a batch norm. With it, the diffusion model sees patches of 2 x 2 latents, normalised, as its latents.
    bn_eps: float | None = None

    @property
    def patch(self) -> int:
        """How many latents along an edge are one latent for the diffusion model."""
        return 1 if self.bn_eps is None else 2

    @property
    def seen(self) -> int:
        """The channels of a latent that the diffusion model sees."""
        return self.latent_channels * self.patch**2


def factor(channels: Sequence[int]) -> int:
    """How many pixels one latent covers along an edge, without patches: every level but the last halves the picture."""
    return 2 ** (len(channels) - 1)


class AttentionBlock(Attention):
    def __init__(self, c: int, groups: int):
        super().__init__(c, c, heads=1, bias=True)
        self.group_norm = GroupNorm(groups, c, EPS)

    def __call__(self, x: mx.array) -> mx.array:
        B, h, w, c = x.shape
        y = self.group_norm(x).reshape(B, h * w, c)
        return x + super().__call__(y, self.kv(y)).reshape(B, h, w, c)


class Block(nn.Module):
    def __init__(self, c_in: int, c: int, n: int, groups: int):
        super().__init__()
        self.resnets = [ResBlock(c if i else c_in, c, groups, EPS) for i in range(n)]


class MidBlock(Block):
    def __init__(self, c: int, config: Config):
        super().__init__(c, c, 2, config.groups)
        self.attentions = [AttentionBlock(c, config.groups)] if config.mid_attention else []

    def __call__(self, x: mx.array) -> mx.array:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class DownBlock(Block):
    def __init__(self, c_in: int, c: int, n: int, groups: int, down: bool):
        super().__init__(c_in, c, n, groups)
        self.downsamplers = [Downsample(c, padding=0)] if down else []

    def __call__(self, x: mx.array) -> mx.array:
        for resnet in self.resnets:
            x = resnet(x)
        for downsample in self.downsamplers:
            x = downsample(mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]))  # bottom and right only, as in training
        return x


class UpBlock(Block):
    def __init__(self, c_in: int, c: int, n: int, groups: int, up: bool):
        super().__init__(c_in, c, n, groups)
        self.upsamplers = [Upsample(c)] if up else []

    def __call__(self, x: mx.array) -> mx.array:
        for resnet in self.resnets:
            x = resnet(x)
        for upsample in self.upsamplers:
            x = upsample(x, 2 * x.shape[1], 2 * x.shape[2])
        return x


class Encoder(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        c, last = config.channels[0], len(config.channels) - 1
        self.conv_in = Conv3x3(config.in_channels, c)
        self.down_blocks = []
        for i, width in enumerate(config.channels):
            self.down_blocks.append(DownBlock(c, width, config.layers, config.groups, i < last))
            c = width
        self.mid_block = MidBlock(c, config)
        self.conv_norm_out = GroupNorm(config.groups, c, EPS, silu=True)
        self.conv_out = Conv3x3(c, 2 * config.latent_channels)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x)))


class Decoder(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        c = config.channels[-1]
        self.conv_in = Conv3x3(config.latent_channels, c)
        self.mid_block = MidBlock(c, config)
        self.up_blocks = []
        for i, width in reversed(list(enumerate(config.channels))):
            self.up_blocks.append(UpBlock(c, width, config.layers + 1, config.groups, i > 0))
            c = width
        self.conv_norm_out = GroupNorm(config.groups, c, EPS, silu=True)
        self.conv_out = Conv3x3(c, config.out_channels)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x))


class Statistics(nn.Module):
    """The mean and variance that a batch norm gathered in training."""

    def __init__(self, n: int, eps: float):
        super().__init__()
        self.running_mean, self.running_var = mx.zeros(n), mx.ones(n)
        self.eps = eps

    def normalise(self, x: mx.array) -> mx.array:
        return ((x - self.running_mean) * mx.rsqrt(self.running_var + self.eps)).astype(x.dtype)

    def restore(self, x: mx.array) -> mx.array:
        return (x * mx.sqrt(self.running_var + self.eps) + self.running_mean).astype(x.dtype)


class VAE(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        n = config.latent_channels
        self.encoder = Encoder(config)
        channels = config.channels if config.decoder_channels is None else config.decoder_channels
        self.decoder = Decoder(replace(config, channels=channels))
        if config.bn_eps is not None:
            self.bn = Statistics(config.seen, config.bn_eps)
        if config.quant_conv:
            self.quant_conv = nn.Linear(2 * n, 2 * n)  # this and the next are 1x1 convolutions in the file
        if config.post_quant_conv:
            self.post_quant_conv = nn.Linear(n, n)

    @property
    def factor(self) -> int:
        return factor(self.config.channels)

    def encode(self, image: mx.array, tile: int | None = None) -> tuple[mx.array, mx.array]:
        """(B, H, W, 3) in [-1, 1] -> the mean, which is also the mode, at the model's scale, (B, h, w, c), and the
        unscaled log variance of the latents without patches. tile: as in `decode`."""
        x = image.astype(self.encoder.conv_in.weight.dtype)
        if tile is None or max(x.shape[1:3]) <= tile * self.factor:
            x = self.encoder(x)
        else:
            x = by_tiles(self.encoder, x, tile, self.factor, 1)
        if "quant_conv" in self:
            x = self.quant_conv(x)
        mean, logvar = mx.split(x, 2, axis=-1)
        mean = (mean - self.config.shift) * self.config.scale
        if "bn" in self:
            B, h, w, _ = mean.shape
            mean = self.bn.normalise(pack(mean).reshape(B, h // 2, w // 2, -1))
        return mean, logvar

    def sample(self, image: mx.array, noise: mx.array, tile: int | None = None) -> mx.array:
        """A latent drawn from the distribution of `encode`, with standard noise of its shape. The bounds of the
        variance are diffusers'."""
        mean, logvar = self.encode(image, tile)
        return mean + self.spread(logvar) * noise

    def spread(self, logvar: mx.array) -> mx.array:
        """The standard deviation around the mean of `encode`."""
        spread = mx.exp(0.5 * mx.clip(logvar, -30, 20)) * self.config.scale
        if "bn" in self:
            B, h, w, _ = spread.shape
            spread = pack(spread).reshape(B, h // 2, w // 2, -1) * mx.rsqrt(self.bn.running_var + self.bn.eps)
        return spread

    def decode(self, z: mx.array, tile: int | None = None) -> mx.array:
        """z (B, h, w, c) at the model's scale -> (B, H, W, 3) in about [-1, 1]. tile: work in overlapping tiles with
        this many latents a side, counted without patches, so that memory does not grow with the picture."""
        if "bn" in self:
            B, h, w, c = z.shape
            z = unpack(self.bn.restore(z).reshape(B, h * w, c), 2 * h, 2 * w)
        z = (z / self.config.scale + self.config.shift).astype(self.decoder.conv_in.weight.dtype)
        if "post_quant_conv" in self:
            z = self.post_quant_conv(z)
        if tile is None or max(z.shape[1:3]) <= tile:
            return self.decoder(z)
        return by_tiles(self.decoder, z, tile, 1, self.factor)


def by_tiles(net: Encoder | Decoder, x: mx.array, tile: int, into: int, out: int) -> mx.array:
    """Run overlapping tiles (by a quarter) through the network one by one and blend them. Norms see only their tile, so
    the result is close to the untiled one, but not equal. into, out: the edge of a latent in x and in the output."""
    B, h, w = x.shape[0], x.shape[1] // into, x.shape[2] // into
    canvas = mx.zeros((B, h * out, w * out, net.conv_out.weight.shape[0]))
    for i, wi in windows(h, tile, out):
        for j, wj in windows(w, tile, out):
            part = x[:, i * into : (i + tile) * into, j * into : (j + tile) * into]
            part = net(mx.depends(part, canvas))  # one after the other: see layers.in_turn
            weight = mx.array((wi[:, None, None] * wj[:, None]).astype(np.float32))  # (H, W, 1)
            canvas[:, i * out : i * out + len(wi), j * out : j * out + len(wj)] += part * weight
    return canvas.astype(x.dtype)


def windows(n: int, tile: int, scale: int) -> list[tuple[int, np.ndarray]]:
    """Tiles along n latents: where each begins, and its weights, `scale` numbers a latent. All weights sum to one."""
    overlap = max(1, tile // 4)
    count = max(1, math.ceil((n - overlap) / (tile - overlap)))
    tile = min(tile, n)
    starts = [round(i * (n - tile) / max(1, count - 1)) for i in range(count)]
    i = (np.arange(tile * scale) + 0.5) / (overlap * scale)
    ramp = np.sin(np.pi / 2 * np.clip(np.minimum(i, i[::-1]), 0, 1)) ** 2
    total = np.zeros(n * scale)
    for s in starts:
        total[s * scale : (s + tile) * scale] += ramp
    return [(s, ramp / total[s * scale : (s + tile) * scale]) for s in starts]
