"""ControlNets (Zhang et al. 2023): the way down of a denoiser once more, which reads a picture and adds to the maps of
the denoiser. net(x, t, **net.prepare(...), hint=net.hint(picture)) -> residuals. Names as in diffusers. And what all
networks that guide have in common: a Config that `Reads`, and `net.controls(Guiding)` -> a Control for each side."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from . import unet, vae
from .layers import Conv3x3, TimeEmbedding, quick_gelu


class Reads:
    """What a Config of a network that guides says of the pictures that it reads. Each changes what differs."""

    modes: tuple[str, ...] = ()  # the kinds of pictures that it must be told apart; () if it reads one kind
    reads_latents: bool = False  # whether it reads the VAE's latents of a picture, not its pixels
    reads_mask: bool = False  # whether it also reads a mask, so that it reads no other picture than MASKED
    draws: bool = False  # whether it reads a sample of the latents, for which a seed draws noise, or their mean
    multiple: int = 1  # a picture's edges must be multiples of this
    hole: float | None = None  # what the pixels of MASKED are where the mask is white; None if it reads no such picture


class Guiding(NamedTuple):
    """A control of a run, for the network that reads it: one picture, or several of a union."""

    pictures: list[mx.array]  # (1, H, W, 3) in [0, 1] each, or latents where the network reads them
    tasks: list[int]  # the numbers of their kinds, for a network that must be told them
    scales: list[float]
    times: tuple[float, float]  # it is on from the first time down to the second, which is excluded
    guess: bool  # whether it guides the prompt's pass alone
    guidance: float | None  # for a network that takes it as an input; None if the denoiser takes it too
    sides: dict[str, dict]  # the denoiser's conditions, by the names that `guidance.denoiser` has for its passes
    prepared: Callable[..., dict[str, dict]]  # the network's own for these sides; alone: for the prompt only
    base: nn.Module  # the denoiser
    vae: vae.Config


@dataclass(frozen=True)
class Config(unet.HalfConfig, Reads):
    """Of a U-Net's."""

    hint_channels: int  # of the picture
    hint: tuple[int, ...]  # widths of the convolutions that read it; between two of them it is halved
    pooled: bool  # whether residuals are averages over the picture: the one kind that shows content, not lines

    hole = -1.0  # as the authors' for inpainting was trained

    @property
    def multiple(self) -> int:
        return 2 ** (len(self.hint) - 1)


def misfit(config: Config, net: object, factor: int) -> str:
    """What keeps a ControlNet from a denoiser, both by their Configs, in words; "" if nothing does. factor: pixels
    that a latent covers."""
    if not isinstance(net, unet.Config):
        return "is for a U-Net"
    if config.context != net.context and (any(config.depth) or config.mid_depth):
        return f"reads text of width {config.context}, not {net.context}"
    for name in ("channels", "layers", "added"):
        ours, theirs = getattr(config, name), getattr(net, name)
        if ours != theirs:
            return f"has {name} {_spelt(ours)}, not {_spelt(theirs)}"
    if config.in_channels != net.out_channels:
        return f"reads latents of {config.in_channels} channels, not {net.out_channels}"
    if config.multiple != factor:
        return f"makes one of {config.multiple} pixels of its picture, not of {factor}"
    return ""


def _spelt(value) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


class Hint(nn.Module):
    """Convolutions that bring a picture (B, H, W, c) in [0, 1] to the size of the latents."""

    def __init__(self, c_in: int, widths: tuple[int, ...], c: int):
        super().__init__()
        self.conv_in = Conv3x3(c_in, widths[0])
        self.blocks = []
        for a, b in pairwise(widths):
            self.blocks += [Conv3x3(a, a), nn.Conv2d(a, b, 3, stride=2, padding=1)]
        self.conv_out = Conv3x3(widths[-1], c)

    def __call__(self, x: mx.array) -> mx.array:
        x = nn.silu(self.conv_in(x))
        for conv in self.blocks:
            x = nn.silu(conv(x))
        return self.conv_out(x)


class ControlNet(unet.HalfUNet):
    def __init__(self, config: Config):
        super().__init__(config)
        self.controlnet_cond_embedding = Hint(config.hint_channels, config.hint, config.channels[0])
        self.controlnet_down_blocks = [nn.Linear(c, c) for c in self.skips()]
        self.controlnet_mid_block = nn.Linear(config.channels[-1], config.channels[-1])

    def hint(self, pixels: mx.array) -> mx.array:
        """What it reads of a picture (1, H, W, 3) in [0, 1]; made once."""
        pixels = pixels[..., : self.config.hint_channels].astype(self.conv_in.weight.dtype)
        return self.controlnet_cond_embedding(pixels)

    def controls(self, given: Guiding) -> dict[str, "Control"]:
        hint, scale, more = self.read(given)
        conds = given.prepared(**more)
        half = given.guess or self.config.pooled
        graded = given.guess and not self.config.pooled
        if half and len(conds) == 2:  # the negative prompt's pass stays as it is
            conds = {side: conds["cond"] for side in conds if side != "uncond"}
        return {
            side: Control(self, cond | {"hint": hint}, scale, given.times, half and side == "both", graded)
            for side, cond in conds.items()
        }

    def read(self, given: Guiding) -> tuple[mx.array, float, dict]:
        """The hint, the scale of the residuals, and what else `prepare` takes."""
        return self.hint(given.pictures[0]), given.scales[0], {}

    def __call__(
        self,
        x: mx.array,
        t: float,
        *,
        kv: list[tuple[mx.array, mx.array]],
        times: dict[float, list[mx.array]],
        added: mx.array | None,
        guidance: mx.array | None,
        hint: mx.array,
    ) -> list[mx.array]:
        """Residuals of x (B, h, w, in) at time t: one for each skip of the U-Net and, last, one for its middle."""
        x = self.conv_in(x[..., : self.config.in_channels]) + hint
        x, skips = self.down(x, self.shifts_at(t, times, added, guidance), iter(kv))
        outs = [conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        outs.append(self.controlnet_mid_block(x))
        return [out.mean(axis=(1, 2), keepdims=True) for out in outs] if self.config.pooled else outs


# What pictures a union reads, by their numbers in it (Xinsir 2024), and other names for some of them.
INPAINT = "inpaint"
MODES = ("openpose", "depth", "scribble", "canny", "normal", "seg", "tile", INPAINT)
ALIASES = {"hed": "scribble", "softedge": "scribble", "lineart": "canny", "mlsd": "canny", "repaint": INPAINT}
ALIASES |= {"grey": "gray"}


@dataclass(frozen=True)
class UnionConfig(Config):
    tasks: int  # kinds of pictures
    mixers: int  # layers that prepare what the kind adds
    hole = 0.0

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES[: self.tasks]


class Mlp(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.c_fc = nn.Linear(c, 4 * c)
        self.c_proj = nn.Linear(4 * c, c)

    def __call__(self, x: mx.array) -> mx.array:
        return self.c_proj(quick_gelu(self.c_fc(x)))


class Values(nn.Module):
    """An attention of which values alone count: its authors let it attend over the samples of a batch, not over the
    tokens. For one picture, the samples are equal, and what is read from them is the value of each token."""

    def __init__(self, c: int):
        super().__init__()
        self.in_proj_weight = mx.zeros((3 * c, c))  # queries, keys, values
        self.in_proj_bias = mx.zeros((3 * c,))
        self.out_proj = nn.Linear(c, c)

    def __call__(self, x: mx.array) -> mx.array:
        weight, bias = (mx.split(p, 3)[-1] for p in (self.in_proj_weight, self.in_proj_bias))
        return self.out_proj(x @ weight.T + bias)


class Mixer(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.attn = Values(c)
        self.ln_1 = nn.LayerNorm(c)
        self.mlp = Mlp(c)
        self.ln_2 = nn.LayerNorm(c)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Union(ControlNet):
    """A ControlNet for several kinds of pictures, and for several pictures at once."""

    def __init__(self, config: UnionConfig):
        super().__init__(config)
        c = config.channels[0]
        self.task_embedding = mx.zeros((config.tasks, c))
        self.transformer_layes = [Mixer(c) for _ in range(config.mixers)]  # so it is spelt in the files
        self.spatial_ch_projs = nn.Linear(c, c)
        self.control_add_embedding = TimeEmbedding(config.added_time * config.tasks, 4 * c)

    def read(self, given: Guiding) -> tuple[mx.array, float, dict]:
        one, more = len(given.pictures) == 1, {"emphasis": self.emphasis(given.tasks)}
        hint = self.hints(given.pictures, given.tasks, [1.0] if one else given.scales)
        return hint, given.scales[0] if one else 1.0, more

    def emphasis(self, tasks: list[int]) -> mx.array:
        """What the kinds of pictures add to the time's embedding, (1, c)."""
        given = mx.array([float(i in tasks) for i in range(self.config.tasks)])
        return self.control_add_embedding(self.sinusoids(given, self.config.added_time).reshape(1, -1))

    def hints(self, pictures: list[mx.array], tasks: list[int], scales: list[float]) -> mx.array:
        """What it reads of several pictures, each (1, H, W, 3), of these kinds and at these scales."""
        total = 0.0
        for pixels, task, scale in zip(pictures, tasks, scales, strict=True):
            x = self.hint(pixels)
            token = scale * (x.mean(axis=(1, 2), keepdims=True) + self.task_embedding[task])
            for mixer in self.transformer_layes:
                token = mixer(token)
            total = total + scale * (x + self.spatial_ch_projs(token))
        return total


@dataclass(frozen=True)
class Control:
    """One control of a run, under one side's conditions."""

    net: Callable[..., list[mx.array]]
    cond: dict  # the arguments of net besides x and t
    scale: float
    times: tuple[float, float]  # it is on from the first time down to the second, which is excluded
    guess: bool  # whether it is for the second half of the samples alone
    graded: bool  # whether residuals from high up in the network count less

    def adds(self, x: mx.array, t: float) -> dict[str, list[mx.array]]:
        """The arguments of the denoiser that it adds to, and what."""
        half = x[x.shape[0] // 2 :] if self.guess else x
        outs = self.net(half, t, **self.cond)
        last = max(1, len(outs) - 1)
        grades = [10 ** (i / last - 1) if self.graded else 1.0 for i in range(len(outs))]
        outs = [self.scale * grade * out for grade, out in zip(grades, outs, strict=True)]
        return {"residuals": [mx.concatenate([mx.zeros_like(out), out]) for out in outs] if self.guess else outs}


def controlled(net: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """A denoiser that also takes `controls` (ControlNets and T2I-Adapters), and is again net(x, t, **cond). What
    several add to the same argument is summed."""

    def call(x: mx.array, t: float, *, controls: list = (), **cond) -> mx.array:
        added: dict[str, list[mx.array]] = {}
        for control in controls:
            if control.times[0] >= t > control.times[1]:
                for name, outs in control.adds(x, t).items():
                    added[name] = [a + b for a, b in zip(added[name], outs, strict=True)] if name in added else outs
        return net(x, t, **added, **cond)

    return call
