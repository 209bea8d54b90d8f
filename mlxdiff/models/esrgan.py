"""ESRGAN enlarges pictures: (B, H, W, 3) in [0, 1] -> (B, scale H, scale W, 3) in about [0, 1]. Wang et al. 2018; 2021
(Real-ESRGAN) for those that fold pictures first. It has convolutions and no norms, so that a part of a picture, with
enough around it, gives the same pixels as in the whole. Names as in BasicSR's RRDBNet."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .layers import Conv3x3, Upsample, fused

COLOURS = 3


@dataclass(frozen=True)
class Config:
    fold: int  # pixels along the edge of a square that becomes one pixel of more channels, before anything else
    width: int
    growth: int  # channels that each convolution of a dense block adds
    rrdb: int  # how many blocks of three dense blocks
    doublings: int

    @property
    def scale(self) -> int:
        return 2**self.doublings // self.fold


@fused
def leaky(x: mx.array) -> mx.array:
    return mx.maximum(x, 0.2 * x)


@fused
def fifth(x: mx.array, y: mx.array) -> mx.array:
    return x + 0.2 * y


class DenseBlock(nn.Module):
    """Five convolutions; each reads the block's input and what all before it made."""

    def __init__(self, c: int, growth: int):
        super().__init__()
        for i in range(5):
            self[f"conv{i + 1}"] = Conv3x3(c + i * growth, growth if i < 4 else c)

    def __call__(self, x: mx.array) -> mx.array:
        seen = x
        for i in range(1, 5):
            seen = mx.concatenate([seen, leaky(self[f"conv{i}"](seen))], axis=-1)
        return fifth(x, self.conv5(seen))


class RRDB(nn.Module):
    def __init__(self, c: int, growth: int):
        super().__init__()
        for i in range(3):
            self[f"rdb{i + 1}"] = DenseBlock(c, growth)

    def __call__(self, x: mx.array) -> mx.array:
        return fifth(x, self.rdb3(self.rdb2(self.rdb1(x))))


class ESRGAN(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        c = config.width
        self.conv_first = Conv3x3(COLOURS * config.fold**2, c)
        self.body = [RRDB(c, config.growth) for _ in range(config.rrdb)]
        self.conv_body = Conv3x3(c, c)
        self.conv_up = [Upsample(c) for _ in range(config.doublings)]
        self.conv_hr = Conv3x3(c, c)
        self.conv_last = Conv3x3(c, COLOURS)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.conv_first(folded(x.astype(self.conv_first.weight.dtype), self.config.fold))
        y = x
        for block in self.body:
            y = block(y)
        x = x + self.conv_body(y)
        for up in self.conv_up:
            x = leaky(up(x, 2 * x.shape[1], 2 * x.shape[2]))
        return self.conv_last(leaky(self.conv_hr(x)))


def folded(x: mx.array, n: int) -> mx.array:
    """(B, H, W, c) -> (B, H/n, W/n, c n n): squares of pixels become channels; those of one colour are together."""
    if n == 1:
        return x
    B, H, W, c = x.shape
    x = x.reshape(B, H // n, n, W // n, n, c).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(B, H // n, W // n, c * n * n)
