"""T2I-Adapters (Mou et al. 2023): small networks that read a picture once and add to the maps of a U-Net's way down.
net(pixels) -> features, one for each level; pixels (1, H, W, 3) in [0, 1]. Names as in diffusers."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from . import unet
from .controlnet import Guiding, Reads
from .layers import Conv3x3


@dataclass(frozen=True)
class Config(Reads):
    kind: str  # full, light, or xl, which is halved once in all
    in_channels: int  # 3, or 1 for grey pictures
    channels: tuple[int, ...]  # per feature
    layers: int  # residual blocks of each feature
    patch: int  # pixels along the edge that become one

    @property
    def multiple(self) -> int:
        return self.patch

    @property
    def halved(self) -> tuple[bool, ...]:
        """Before which features the map is halved."""
        return tuple(i == 2 if self.kind == "xl" else i > 0 for i in range(len(self.channels)))

    @property
    def scales(self) -> list[int]:
        """Pixels along the edge of one number of each feature."""
        return [self.patch * 2 ** sum(self.halved[: i + 1]) for i in range(len(self.channels))]


def misfit(config: Config, net: object, factor: int) -> str:
    """What keeps an adapter from a denoiser, in words; "" if nothing does. factor: pixels that a latent covers."""
    if not isinstance(net, unet.Config):
        return "is for a U-Net"
    last, places = len(net.channels) - 1, []  # width and scale of the maps that features are added to
    for i, (c, depth) in enumerate(zip(net.channels, net.depth, strict=True)):
        places.append((c, factor * 2 ** (i if depth or i == last else i + 1)))
    if net.mid_depth is not None:
        places.append((net.channels[-1], factor * 2**last))
    features = list(zip(config.channels, config.scales, strict=True))
    if len(features) > len(places) or features != places[: len(features)]:
        spelt = ", ".join(f"{c} channels at 1/{scale}" for c, scale in features)
        return f"gives {spelt}, which are not that U-Net's maps"
    return ""


class ResBlock(nn.Module):
    def __init__(self, c: int, kernel: int):
        super().__init__()
        self.block1 = Conv3x3(c, c)
        self.block2 = nn.Linear(c, c) if kernel == 1 else nn.Conv2d(c, c, kernel, padding=kernel // 2)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.block2(nn.relu(self.block1(x)))


class Block(nn.Module):
    def __init__(self, c_in: int, c: int, layers: int, light: bool):
        super().__init__()
        width = c // 4 if light else c
        if light or c_in != c:
            self.in_conv = nn.Linear(c_in, width)
        self.resnets = [ResBlock(width, 3 if light else 1) for _ in range(layers)]
        if light:
            self.out_conv = nn.Linear(width, c)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.in_conv(x) if "in_conv" in self else x
        for resnet in self.resnets:
            x = resnet(x)
        return self.out_conv(x) if "out_conv" in self else x


class T2IAdapter(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        light, c = config.kind == "light", config.in_channels * config.patch**2
        if not light:
            self.conv_in = Conv3x3(c, config.channels[0])
            c = config.channels[0]
        self.body = []
        for width in config.channels:
            self.body.append(Block(c, width, config.layers, light))
            c = width

    def __call__(self, pixels: mx.array) -> list[mx.array]:
        B, H, W, _ = pixels.shape
        n, first = self.config.patch, self.body[0].resnets[0].block1.weight
        if self.config.in_channels == 1:  # as PIL makes grey of RGB
            pixels = (pixels * mx.array([0.299, 0.587, 0.114])).sum(-1, keepdims=True)
        x = pixels.astype(first.dtype).reshape(B, H // n, n, W // n, n, -1)
        x = x.transpose(0, 1, 3, 5, 2, 4).reshape(B, H // n, W // n, -1)  # channel, then row and column, as in torch
        x = self.conv_in(x) if "conv_in" in self else x
        features = []
        for block, halve in zip(self.body, self.config.halved, strict=True):
            x = block(_halved(x) if halve else x)
            features.append(x)
        return features

    def controls(self, given: Guiding) -> dict[str, "Features"]:
        """It reads no text: the same for all sides."""
        features = [given.scales[0] * f for f in self(given.pictures[0])]
        on = [side for side in given.sides if side != "uncond" or not given.guess]
        return {side: Features(features, given.times, given.guess and side == "both") for side in on}


def _halved(x: mx.array) -> mx.array:
    """Means of 2 x 2; where an edge is odd, of what is there."""
    B, h, w, c = x.shape
    x = mx.pad(x, [(0, 0), (0, h % 2), (0, w % 2), (0, 0)], mode="edge")
    return x.reshape(B, (h + 1) // 2, 2, (w + 1) // 2, 2, c).mean(axis=(2, 4))


@dataclass(frozen=True)
class Features:
    """One adapter of a run: what it adds, its scale multiplied in."""

    features: list[mx.array]  # (1, h, w, c) each
    times: tuple[float, float]  # it is on from the first time down to the second, which is excluded
    guess: bool  # whether it is for the second half of the samples alone

    def adds(self, x: mx.array, t: float) -> dict[str, list[mx.array]]:
        if not self.guess:
            return {"features": self.features}
        n = x.shape[0] // 2
        zeros = [mx.zeros((n, *f.shape[1:]), f.dtype) for f in self.features]
        return {
            "features": [
                mx.concatenate([z, mx.repeat(f, n, axis=0)]) for z, f in zip(zeros, self.features, strict=True)
            ]
        }
