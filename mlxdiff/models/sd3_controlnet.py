"""ControlNets of Stable Diffusion 3 and 3.5, which read the latents of a picture: InstantX's, whose blocks read the
text too, and Stability's for 3.5 large, whose blocks do not. net(x, t, **net.prepare(...), hint=...) -> residuals."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import sd3
from .controlnet import Guiding, Reads
from .layers import adaptive_norm, at_time, gated

EDGES = "canny"


@dataclass(frozen=True)
class Config(sd3.Config, Reads):
    """positions: 0 if patches and their positions come from the denoiser. context: 0 if it reads no text."""

    hint_channels: int  # of the picture's latents, and of a mask, if it reads one
    told: bool  # whether it is told the pooled text; else it reads zeros, and latents without the VAE's shift
    reads_latents = True

    @property
    def modes(self) -> tuple[str, ...]:
        """Those that read no text are told apart: the one for edges reads other pixels, and no shape shows it."""
        return () if self.context else ("blur", EDGES, "depth")

    @property
    def reads_mask(self) -> bool:
        """Alimama's for inpainting does."""
        return self.hint_channels == self.in_channels + 1

    @property
    def hole(self) -> float | None:
        return 0.0 if self.reads_mask else None

    def pixels(self, picture: np.ndarray, mode: str | None) -> np.ndarray:
        """What the VAE is shown of a picture in [-1, 1]. Stability's network for edges was trained on far too bright
        ones."""
        return (picture / 2 + 0.5) * 127.5 + 0.5 if mode == EDGES else picture


def misfit(config: Config, net: object, factor: int) -> str:
    """What keeps a ControlNet from a denoiser, in words; "" if nothing does."""
    if not isinstance(net, sd3.Config):
        return "is for Stable Diffusion 3"
    for name in ("heads", "head_dim", "context", "pooled", "in_channels", "patch", "positions"):
        ours, theirs = getattr(config, name), getattr(net, name)
        left_out = name in ("context", "positions") and not ours
        if not left_out and ours != theirs and (name != "positions" or ours < theirs):
            return f"has {name} {ours}, not {theirs}"
    if config.hint_channels - config.reads_mask != net.in_channels:
        return f"reads {config.hint_channels} channels of its picture, not {net.in_channels}"
    if config.layers >= net.layers:
        return f"has {config.layers} blocks, not fewer than {net.layers}"
    return ""


class Block(nn.Module):
    """One of the picture alone."""

    def __init__(self, config: Config):
        super().__init__()
        d = config.heads * config.head_dim
        self.norm1 = sd3.Modulation(d, 2)
        self.attn = sd3.SelfAttention(config)
        self.ff = sd3.FeedForward(d)

    def mods(self, vec: mx.array) -> list:
        return self.norm1(vec)

    def __call__(self, x: mx.array, mods: list) -> mx.array:
        norm, gate, mlp_norm, mlp_gate = mods
        x = gated(x, gate, self.attn(adaptive_norm(x, *norm)))
        return gated(x, mlp_gate, self.ff(adaptive_norm(x, *mlp_norm)))


class SD3ControlNet(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        d = config.heads * config.head_dim
        if config.positions:
            self.pos_embed = sd3.PatchEmbed(config)
        self.pos_embed_input = sd3.Patches(config.hint_channels, d, config.patch)
        self.time_text_embed = sd3.TimeTextEmbed(config)
        if config.context:
            self.context_embedder = nn.Linear(config.context, d)
            self.transformer_blocks = [sd3.Block(config, i in config.dual, False) for i in range(config.layers)]
        else:
            self.transformer_blocks = [Block(config) for _ in range(config.layers)]
        self.controlnet_blocks = [nn.Linear(d, d) for _ in range(config.layers)]

    def hint(self, z: mx.array, scale: float, shift: float) -> mx.array:
        """What it reads of a picture's latents (B, h, w, c), as a VAE with this scale and shift makes them, and of a
        mask behind them."""
        shifted = self.config.told or self.config.reads_mask
        return self.pos_embed_input((z if shifted else z + scale * shift).astype(self.dtype))

    def controls(self, given: Guiding) -> dict[str, "Control"]:
        hint = self.hint(given.pictures[0], given.vae.scale, given.vae.shift)
        conds = given.prepared(base=(given.base.pos_embed, given.sides["cond"]["pos"]))
        scale, times, layers = given.scales[0], given.times, given.base.config.layers
        return {side: Control(self, cond | {"hint": hint}, scale, times, layers) for side, cond in conds.items()}

    def prepare(
        self, ts: list[float] | None, context: mx.array, pooled: mx.array, size: tuple[int, int],
        base: tuple[nn.Module, mx.array],
    ) -> dict:  # fmt: skip
        """As Stable Diffusion 3's. base: the denoiser's patches and positions, for one that has none of its own."""
        h, w = (n // self.config.patch for n in size)
        pooled = (pooled if self.config.told else mx.zeros_like(pooled)).astype(self.dtype)
        vec = self.time_text_embed.text_embedder(pooled)
        own = self.config.positions
        return {
            "txt": self.context_embedder(context.astype(self.dtype)) if self.config.context else None,
            "patches": self.pos_embed if own else base[0],
            "pos": self.pos_embed.crop(h, w).astype(self.dtype) if own else base[1],
            "vec": vec,
            "times": {} if ts is None else {t: i for i, t in enumerate(ts)},
            "mods": None if ts is None else self.mods(mx.array(ts)[:, None], vec),
        }

    def __call__(
        self, x: mx.array, t: float, *, txt: mx.array | None, patches: nn.Module, pos: mx.array, vec: mx.array,
        times: dict, mods: list | None, hint: mx.array,
    ) -> list[mx.array]:  # fmt: skip
        mods = at_time(t, times, mods, lambda t: self.mods(t, vec))
        x = patches(x) + pos + hint
        outs = []
        for block, m, out in zip(self.transformer_blocks, mods, self.controlnet_blocks, strict=True):
            if txt is None:
                x = block(x, m)
            else:
                x, txt = block(x, txt, m)
            outs.append(out(x))
        return outs

    def mods(self, t: mx.array, vec: mx.array) -> list:
        vec = self.time_text_embed(t, vec)
        return [block.mods(vec) for block in self.transformer_blocks]

    @property
    def dtype(self) -> mx.Dtype:
        return self.pos_embed_input.proj.bias.dtype


@dataclass(frozen=True)
class Control:
    """One control of a run, under one side's conditions."""

    net: Callable[..., list[mx.array]]
    cond: dict  # the arguments of net besides x and t
    scale: float
    times: tuple[float, float]  # it is on from the first time down to the second, which is excluded
    layers: int  # of the denoiser

    def adds(self, x: mx.array, t: float) -> dict[str, list[mx.array]]:
        outs = [self.scale * out for out in self.net(x, t, **self.cond)]
        apart = self.layers / len(outs)  # blocks that share a residual; nothing is added after the last block
        return {"residuals": [outs[int(i / apart)] for i in range(self.layers - 1)]}
