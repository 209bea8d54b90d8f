"""FLUX.2: velocity flux2(x, t, **flux2.prepare(...)), x (B, h, w, 128), t a sigma in [0, 1]. A latent is a token. All
blocks share their modulations, and no layer has a bias. Names are those of Black Forest Labs' code (2025)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import flux
from .flux import Attention, Embedder, LastLayer, Modulation, Pair, QKNorm, through, turns
from .layers import at_time, fused, silu, sinusoids

REFERENCE = 10  # the distance along the first axis between the picture and the first reference, and between references


@dataclass(frozen=True)
class Config:
    in_channels: int
    out_channels: int
    context: int  # width of the text
    width: int
    heads: int
    hidden: int  # of the MLPs, after the gate
    double: int  # blocks
    single: int
    axes: tuple[int, ...]  # how many numbers of a head each coordinate of a token rotates
    theta: float
    guidance: bool  # whether guidance is an input: yes in dev, no in klein


def gated_mlp(x: mx.array) -> mx.array:
    """SwiGLU (Shazeer 2020): the first half of x is the gate of the second."""
    return swiglu(*mx.split(x, 2, axis=-1))


@fused
def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    g = gate.astype(mx.float32)
    return (g * mx.sigmoid(g) * x.astype(mx.float32)).astype(x.dtype)


class DoubleBlock(flux.DoubleBlock):
    """As in FLUX.1, with other MLPs, and without biases and modulations of its own."""

    def __init__(self, config: Config):
        nn.Module.__init__(self)
        d, hidden = config.width, config.hidden
        for name in ("img", "txt"):
            self[f"{name}_attn"] = Attention(config, bias=False)
            up, down = nn.Linear(d, 2 * hidden, bias=False), nn.Linear(hidden, d, bias=False)
            self[f"{name}_mlp"] = [up, nn.Identity(), down]  # index 1 is the SwiGLU

    def act(self, x: mx.array) -> mx.array:
        return gated_mlp(x)


class SingleBlock(flux.SingleBlock):
    """As in FLUX.1, with another MLP, and without biases and modulation of its own."""

    def __init__(self, config: Config):
        nn.Module.__init__(self)
        d, hidden = config.width, config.hidden
        self.linear1 = nn.Linear(d, 3 * d + 2 * hidden, bias=False)
        self.norm = QKNorm(config)
        self.linear2 = nn.Linear(d + hidden, d, bias=False)

    def act(self, x: mx.array) -> mx.array:
        return gated_mlp(x)


class Flux2(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        d = config.width
        self.img_in = nn.Linear(config.in_channels, d, bias=False)
        self.txt_in = nn.Linear(config.context, d, bias=False)
        self.time_in = Embedder(256, d, bias=False)
        if config.guidance:
            self.guidance_in = Embedder(256, d, bias=False)
        self.double_stream_modulation_img = Modulation(d, 2, bias=False)
        self.double_stream_modulation_txt = Modulation(d, 2, bias=False)
        self.single_stream_modulation = Modulation(d, 1, bias=False)
        self.double_blocks = [DoubleBlock(config) for _ in range(config.double)]
        self.single_blocks = [SingleBlock(config) for _ in range(config.single)]
        self.final_layer = LastLayer(config, bias=False)

    def __call__(
        self,
        x: mx.array,
        t: float | mx.array,
        *,
        txt: mx.array,
        refs: list[mx.array],
        pe: Pair,
        vec: mx.array,
        times: dict[float, int],
        mods: tuple[tuple[list, list], list, Pair] | None,
        reuse: Callable | None = None,
    ) -> mx.array:
        """x (B, h, w, c) at t, a float or one per sample (B,) -> (B, h, w, out). The rest comes from `prepare`; reuse:
        see `mlxdiff.reuse`."""
        double, single, final = at_time(t, times, mods, lambda t: self.mods(t, vec))

        B, h, w, c = x.shape
        doubles = [partial(block, mods=double, pe=pe) for block in self.double_blocks]
        singles = [partial(block, mods=single, pe=pe) for block in self.single_blocks]
        y = through(self.img_in(x.reshape(B, h * w, c)), refs, txt, doubles, singles, reuse)
        return self.final_layer(y, final).reshape(B, h, w, -1)

    def prepare(
        self,
        ts: list[float] | None,
        context: mx.array,
        size: tuple[int, int],
        guidance: float | mx.array | None = None,
        references: Sequence[mx.array] = (),
    ) -> dict:
        """All inputs that do not depend on x, made once per picture: the text, the rotations for x's size (h, w), and
        the modulations at each of `ts` (None: made in every call). context (B, M, n). references: latents of pictures
        to edit, (1, h_k, w_k, c), which all samples share."""
        dtype = self.img_in.weight.dtype
        vec = mx.zeros((1, self.config.width), dtype)  # (B or 1, d)
        if self.config.guidance:
            vec = self.guidance_in(self.waves(mx.array(guidance).reshape(-1)))
        return {
            "txt": self.txt_in(context.astype(dtype)),
            "refs": [self.img_in(z.astype(dtype).reshape(1, -1, z.shape[-1])) for z in references],
            "pe": rotations(self.config, context.shape[1], size, *(z.shape[1:3] for z in references)),
            "vec": vec,
            "times": {} if ts is None else {t: i for i, t in enumerate(ts)},
            "mods": None if ts is None else self.mods(mx.array(ts)[:, None], vec),  # (T, B or 1, 1, d) each
        }

    def release_modulation(self) -> None:
        """Drop the weights that only `prepare` reads. Call this before the result of `prepare` is evaluated, part by
        part: then memory holds only a few of these weights at a time, not all."""
        del self.double_stream_modulation_img, self.double_stream_modulation_txt, self.single_stream_modulation
        del self.final_layer.adaLN_modulation, self.txt_in, self.time_in
        if self.config.guidance:
            del self.guidance_in

    def mods(self, t: mx.array, vec: mx.array) -> tuple[tuple[list, list], list, Pair]:
        """The modulations of all double blocks, of all single blocks and of the last layer at times t, (..., B or
        1)."""
        vec = silu(self.time_in(self.waves(t)) + vec)
        double = self.double_stream_modulation_img(vec), self.double_stream_modulation_txt(vec)
        return double, self.single_stream_modulation(vec), self.final_layer.mods(vec)

    def waves(self, t: mx.array) -> mx.array:
        return sinusoids(1000 * t, 256, flip_sin_to_cos=True, freq_shift=0).astype(self.img_in.weight.dtype)


def rotations(config: Config, text: int, *sizes: tuple[int, int]) -> Pair:
    """The rotations of all tokens, as `flux.turns` gives them. Word i is at (0, 0, 0, i), a latent at (t, row, column,
    0): t is 0 for the picture that is drawn, which has the first of these sizes (h, w), and counts its references."""
    ids = [np.zeros((text, 4))]
    ids[0][:, 3] = np.arange(text)
    for k, (h, w) in enumerate(sizes):
        t = REFERENCE * k
        ids.append(np.stack([a.reshape(-1) for a in np.mgrid[t : t + 1, :h, :w, :1]], axis=-1))
    return turns(config, np.concatenate(ids))
