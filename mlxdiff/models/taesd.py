"""TAESD's decoder: a few convolutions that imitate a VAE's decoder well enough for previews. Latents at the scale of
the diffusion model (B, h, w, c) -> (B, H, W, 3) in about [-1, 1]. Bohan 2023; names as in AutoencoderTiny."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .layers import Conv3x3


@dataclass(frozen=True)
class Config:
    latent_channels: int
    out_channels: int
    width: int
    blocks: tuple[int, ...]  # per level, coarsest first


class Block(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        conv = [Conv3x3(c, c) for _ in range(3)]
        self.conv = [conv[0], nn.ReLU(), conv[1], nn.ReLU(), conv[2]]

    def __call__(self, x: mx.array) -> mx.array:
        y = x
        for layer in self.conv:
            y = layer(y)
        return nn.relu(x + y)


class Decoder(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        c, last = config.width, len(config.blocks) - 1
        self.layers = [Conv3x3(config.latent_channels, c), nn.ReLU()]
        for i, n in enumerate(config.blocks):
            self.layers += [Block(c) for _ in range(n)]
            if i < last:
                self.layers += [nn.Upsample(2), Conv3x3(c, c, bias=False)]
        self.layers.append(Conv3x3(c, config.out_channels))

    def decode(self, z: mx.array) -> mx.array:
        x = mx.tanh(z.astype(self.layers[0].weight.dtype) / 3) * 3  # it was trained on latents in this range
        for layer in self.layers:
            x = layer(x)
        return x * 2 - 1
