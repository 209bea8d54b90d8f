"""Z-Image (Tongyi Lab 2025): velocity zimage(x, t, **zimage.prepare(...)), x (B, h, w, c) with even sides, t a sigma in
[0, 1]. Names are those of the published checkpoint, which are diffusers'; of its input and its last layer there is only
one here. The network itself counts time from noise to picture, so both its time and its output are turned round inside.

Picture and text are one sequence, [patches, text]. Each of the two is filled up to a multiple of 32 with a learned
token, which the network attends to. A sample whose text is shorter than the longest of its batch gets a mask."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .flux import Pair, rotate, turns
from .layers import SHRINK, StreamNorm, at_time, attention, gated, silu, sinusoids, split_heads
from .qwen3 import gated_silu

MULTIPLE = 32  # of the tokens of a picture, and of a text
TIME = 256  # largest width of the time embedding
Mods = tuple[mx.array, mx.array, mx.array, mx.array]  # of a block: norm, gate, norm, gate


@dataclass(frozen=True)
class Config:
    in_channels: int  # per patch: 4 for each channel of x
    out_channels: int
    context: int  # width of the text
    width: int
    heads: int
    hidden: int
    layers: int
    refiners: int  # blocks for the picture alone, and as many for the text alone
    axes: tuple[int, ...]  # how many numbers of a head each coordinate of a token rotates
    theta: float
    eps: float  # of all norms but the last layer's


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        d, head = config.width, config.width // config.heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(d, d, bias=False) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(head, config.eps) for _ in range(2))
        self.to_out = [nn.Linear(d, d, bias=False)]
        self.heads = config.heads

    def __call__(self, x: mx.array, pe: Pair, mask: mx.array | None) -> mx.array:
        q, k = self.rotated(self.to_q(x), self.norm_q, pe), self.rotated(self.to_k(x), self.norm_k, pe)
        return self.to_out[0](attention(q, k, split_heads(self.to_v(x), self.heads), mask))

    def rotated(self, x: mx.array, norm: nn.RMSNorm, pe: Pair) -> mx.array:
        """(B, N, heads * d) -> (B, heads, N, d). Heads are normed where they lie: one by one they would be copied."""
        heads = x.reshape(*x.shape[:2], self.heads, -1)
        return rotate(mx.fast.rms_norm(heads, None, norm.eps), norm.weight, pe)


class FeedForward(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(config.width, config.hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(config.hidden, config.width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """The output, scaled by SHRINK: float16 may not hold it before the norm that follows."""
        return self.w2(gated_silu(self.w1(x), self.w3(x)))


class Block(nn.Module):
    def __init__(self, config: Config, modulated: bool):
        super().__init__()
        d = config.width
        self.attention, self.feed_forward = Attention(config), FeedForward(config)
        self.attention_norm1, self.attention_norm2 = (nn.RMSNorm(d, config.eps) for _ in range(2))
        self.ffn_norm1, self.ffn_norm2 = (nn.RMSNorm(d, config.eps) for _ in range(2))
        if modulated:
            self.adaLN_modulation = [nn.Linear(min(d, TIME), 4 * d)]
        self.eps = config.eps

    def mods(self, vec: mx.array) -> Mods:
        """The weights of both first norms with their scales, and both gates, (..., 1, d) each."""
        scale, gate, mlp_scale, mlp_gate = mx.split(self.adaLN_modulation[0](vec)[..., None, :], 4, axis=-1)
        norm, mlp_norm = self.attention_norm1.weight, self.ffn_norm1.weight
        return norm * (1 + scale), mx.tanh(gate), mlp_norm * (1 + mlp_scale), mx.tanh(mlp_gate)

    def __call__(self, x: mx.array, mods: Mods | None, pe: Pair, mask: mx.array | None) -> mx.array:
        """mods: None for a block without modulation."""
        one = mx.ones((1, 1, 1), x.dtype)
        norm, gate, mlp_norm, mlp_gate = (
            mods if mods is not None else (self.attention_norm1.weight, one, self.ffn_norm1.weight, one)
        )
        y = self.attention(scaled_norm(x, norm, self.eps), pe, mask)
        x = gated(x, gate, self.attention_norm2(y))
        y = self.feed_forward(scaled_norm(x, mlp_norm, self.eps))
        # A norm of shrunk numbers gives the same if its eps shrinks with their squares.
        return gated(x, mlp_gate, mx.fast.rms_norm(y, self.ffn_norm2.weight, self.eps * SHRINK**2))


def scaled_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """RMS norm with a given weight, (d) or (B or 1, 1, d). It is one kernel if all samples share it."""
    if weight.ndim == 1 or weight.shape[0] == 1:
        return mx.fast.rms_norm(x, weight.reshape(-1), eps)
    return mx.fast.rms_norm(x, None, eps) * weight


class TimeEmbedder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = [nn.Linear(256, 1024), nn.Identity(), nn.Linear(1024, width)]  # index 1 is the SiLU

    def __call__(self, x: mx.array) -> mx.array:
        return self.mlp[2](silu(self.mlp[0](x)))


class LastLayer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        d = config.width
        self.adaLN_modulation = [nn.Identity(), nn.Linear(min(d, TIME), d)]  # index 0 is the SiLU
        self.linear = nn.Linear(d, config.out_channels)

    def mods(self, vec: mx.array) -> mx.array:
        return 1 + self.adaLN_modulation[1](silu(vec))[..., None, :]

    def __call__(self, x: mx.array, scale: mx.array) -> mx.array:
        if scale.shape[0] == 1:
            return self.linear(mx.fast.layer_norm(x, scale.reshape(-1), None, eps=1e-6))
        return self.linear(mx.fast.layer_norm(x, None, None, eps=1e-6) * scale)


class ZImage(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        d = config.width
        self.x_embedder = nn.Linear(config.in_channels, d)
        self.cap_embedder = [StreamNorm(config.context, config.eps), nn.Linear(config.context, d)]
        self.t_embedder = TimeEmbedder(min(d, TIME))
        self.x_pad_token, self.cap_pad_token = mx.zeros((1, d)), mx.zeros((1, d))
        self.noise_refiner = [Block(config, modulated=True) for _ in range(config.refiners)]
        self.context_refiner = [Block(config, modulated=False) for _ in range(config.refiners)]
        self.layers = [Block(config, modulated=True) for _ in range(config.layers)]
        self.final_layer = LastLayer(config)

    def __call__(
        self,
        x: mx.array,
        t: float | mx.array,
        *,
        txt: mx.array,
        pe: Pair,
        img_pe: Pair,
        mask: list[mx.array],
        times: dict[float, int],
        mods: tuple[list, list, mx.array] | None,
        reuse: Callable | None = None,
    ) -> mx.array:
        """x (B, h, w, c) at t, a float or one per sample (B,) -> (B, h, w, out). The rest comes from `prepare`; reuse:
        see `mlxdiff.reuse`."""
        refiners, layers, final = at_time(t, times, mods, self.mods)

        B, h, w, _ = x.shape
        img = self.x_embedder(pack(x))  # (B, h/2 * w/2, d)
        N = img.shape[1]
        img = mx.concatenate([img, mx.broadcast_to(self.x_pad_token, (B, -N % MULTIPLE, img.shape[-1]))], axis=1)
        for block, m in zip(self.noise_refiner, refiners, strict=True):
            img = block(img, m, img_pe, None)
        both = mx.concatenate([img, txt], axis=1)
        seen = mask[0] if mask else None
        first = self.layers[0](both, layers[0], pe, seen)

        def rest() -> mx.array:
            y = first
            for block, m in zip(self.layers[1:], layers[1:], strict=True):
                y = block(y, m, pe, seen)
            return y[:, :N]

        y = rest() if reuse is None else reuse(first[:, :N] - both[:, :N], first[:, :N], rest)
        return -unpack(self.final_layer(y, final), h, w)

    def prepare(
        self, ts: list[float] | None, context: mx.array, lengths: tuple[int, ...], size: tuple[int, int]
    ) -> dict:
        """All inputs that do not depend on x, made once per picture: the refined text, the rotations for x's size
        (h, w), a mask if the texts differ in length, and each block's modulations at each of `ts` (None: made in every
        call). context (B, M, n), each text in the first of its `lengths` tokens."""
        filled = [n + -n % MULTIPLE for n in lengths]
        longest = max(filled)
        txt = self.cap_embedder[1](self.cap_embedder[0](context))
        txt = mx.pad(txt, [(0, 0), (0, longest - txt.shape[1]), (0, 0)])
        place = mx.arange(longest)[None]
        txt = mx.where((place < mx.array(lengths)[:, None])[..., None], txt, self.cap_pad_token)

        words = np.zeros((longest, 3))
        words[:, 0] = np.arange(1, longest + 1)
        h, w = (n // 2 for n in size)
        grids = [places(h, w, n + 1) for n in (filled if len({*filled}) > 1 else filled[:1])]
        img_pe = joined([turns(self.config, grid) for grid in grids])
        pe = joined([turns(self.config, np.concatenate([grid, words])) for grid in grids])
        mask, seen = [], None
        if len(grids) > 1:
            seen = place < mx.array(filled)[:, None]
            mask = [mx.concatenate([mx.ones((len(filled), len(grids[0])), mx.bool_), seen], axis=1)[:, None, None]]
            seen = seen[:, None, None]  # (B, 1, 1, longest)
        for block in self.context_refiner:
            txt = block(txt, None, turns(self.config, words), seen)
        return {
            "txt": txt,
            "pe": pe,
            "img_pe": img_pe,
            "mask": mask,  # one, or none
            "times": {} if ts is None else {t: i for i, t in enumerate(ts)},
            "mods": None if ts is None else self.mods(mx.array(ts)[:, None]),  # (T, 1, 1, d) each
        }

    def release_modulation(self) -> None:
        """Drop the weights that only `prepare` reads. Call this before the result of `prepare` is evaluated, part by
        part: then memory holds only a few of these weights at a time, not all."""
        for block in [*self.noise_refiner, *self.layers]:
            del block.adaLN_modulation, block.attention_norm1, block.ffn_norm1
        del self.final_layer.adaLN_modulation, self.t_embedder, self.cap_embedder
        del self.context_refiner, self.cap_pad_token

    def mods(self, t: mx.array) -> tuple[list, list, mx.array]:
        """The modulations of every block at times t, (..., B or 1)."""
        waves = sinusoids(1000 * (1 - t), 256, flip_sin_to_cos=True, freq_shift=0).astype(self.x_embedder.bias.dtype)
        vec = self.t_embedder(waves)
        refiners, layers = ([b.mods(vec) for b in blocks] for blocks in (self.noise_refiner, self.layers))
        return refiners, layers, self.final_layer.mods(vec)


def places(h: int, w: int, t: int) -> np.ndarray:
    """The coordinates (t, row, column) of a picture's patches, and of the tokens that fill it up, which are at 0."""
    grid = np.zeros((h * w + -(h * w) % MULTIPLE, 3))
    grid[: h * w, 0] = t
    grid[: h * w, 1:] = np.indices((h, w)).reshape(2, -1).T
    return grid


def joined(pes: list[Pair]) -> Pair:
    """Rotations that all samples share, or, of several, one for each: (B, N, ...)."""
    return pes[0] if len(pes) == 1 else tuple(mx.stack(parts) for parts in zip(*pes, strict=True))


def pack(x: mx.array) -> mx.array:
    """(B, h, w, c) -> (B, h/2 * w/2, 4 c): 2 x 2 patches, each with its four latents one after the other."""
    B, h, w, c = x.shape
    x = x.reshape(B, h // 2, 2, w // 2, 2, c).swapaxes(2, 3)
    return x.reshape(B, (h // 2) * (w // 2), 4 * c)


def unpack(x: mx.array, h: int, w: int) -> mx.array:
    x = x.reshape(x.shape[0], h // 2, w // 2, 2, 2, -1).swapaxes(2, 3)
    return x.reshape(x.shape[0], h, w, -1)
