"""FLUX.1: velocity flux(x, t, **flux.prepare(...)), x (B, h, w, c) with even sides, t a sigma in [0, 1]. Packing into
2 x 2 patches and positions happen inside. Names, orders and rotations are those of Black Forest Labs' code (2024)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .layers import (
    Shown,
    Span,
    adaptive_norm,
    at_time,
    attention,
    fused,
    gated,
    gelu_tanh,
    modulation,
    pack,
    shows,
    side_by_side,
    silu,
    sinusoids,
    split_heads,
    split_linear,
    unpack,
)

Pair = tuple[mx.array, mx.array]


@dataclass(frozen=True)
class Config:
    in_channels: int  # per patch: 4 for each channel of x
    out_channels: int
    context: int  # width of the text
    pooled: int
    width: int
    heads: int
    hidden: int
    double: int  # blocks
    single: int
    axes: tuple[int, ...]  # how many numbers of a head each coordinate of a token rotates
    theta: float
    guidance: bool  # whether guidance is an input: yes in dev, no in schnell

    @property
    def reading(self) -> tuple[int, ...]:
        """Widths of the blocks that IP-Adapters give pictures to."""
        return (self.width,) * self.double


class Embedder(nn.Module):
    def __init__(self, dim: int, width: int, bias: bool):
        super().__init__()
        self.in_layer, self.out_layer = (nn.Linear(n, width, bias=bias) for n in (dim, width))

    def __call__(self, x: mx.array) -> mx.array:
        return self.out_layer(silu(self.in_layer(x)))


class Modulation(nn.Module):
    def __init__(self, width: int, n: int, bias: bool):
        super().__init__()
        self.lin = nn.Linear(width, 3 * n * width, bias=bias)
        self.n = n

    def __call__(self, vec: mx.array) -> list:
        return modulation(self.lin(vec), self.n)


class RMSNorm(nn.Module):
    """The scale of a norm whose numbers `QKNorm` divides."""

    def __init__(self, d: int):
        super().__init__()
        self.scale = mx.ones(d)


class QKNorm(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        d = config.width // config.heads
        self.query_norm, self.key_norm = RMSNorm(d), RMSNorm(d)
        self.heads = config.heads

    def __call__(self, qk: mx.array) -> Pair:
        """(B, N, 2 * heads * d) -> q, k, (B, N, heads, d) each, without their scales, which `rotate` applies: one norm
        serves both."""
        B, N, _ = qk.shape
        return mx.split(mx.fast.rms_norm(qk.reshape(B, N, 2 * self.heads, -1), None, eps=1e-6), 2, axis=2)

    def plain(self, q: mx.array) -> mx.array:
        """Queries with their scale, not turned, (B, heads, N, d)."""
        return (q * self.query_norm.scale).swapaxes(1, 2)

    def rotated(self, q: mx.array, k: mx.array, pe: Pair) -> Pair:
        """Both with their scales, turned by their tokens' positions, (B, heads, N, d) each."""
        return rotate(q, self.query_norm.scale, pe), rotate(k, self.key_norm.scale, pe)


class Attention(nn.Module):
    def __init__(self, config: Config, bias: bool):
        super().__init__()
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=bias)
        self.norm = QKNorm(config)
        self.proj = nn.Linear(config.width, config.width, bias=bias)

    def __call__(self, x: mx.array) -> tuple[mx.array, ...]:
        """q and k as `QKNorm` gives them, and v, (B, heads, N, d)."""
        d = x.shape[-1]
        qk, v = split_linear(self.qkv, x, 2 * d)
        return *self.norm(qk), split_heads(v, self.norm.heads)


class DoubleBlock(nn.Module):
    """Picture and text share one attention, but have separate weights."""

    def __init__(self, config: Config):
        super().__init__()
        d, hidden = config.width, config.hidden
        for name in ("img", "txt"):
            self[f"{name}_mod"] = Modulation(d, 2, bias=True)
            self[f"{name}_attn"] = Attention(config, bias=True)
            self[f"{name}_mlp"] = [nn.Linear(d, hidden), nn.Identity(), nn.Linear(hidden, d)]  # index 1 is the GELU

    def mods(self, vec: mx.array) -> tuple[list, list]:
        return self.img_mod(vec), self.txt_mod(vec)

    def __call__(
        self, img: mx.array, txt: mx.array, mods: tuple[list, list], pe: Pair, pictures: Sequence[Pair] = ()
    ) -> Pair:
        """pictures: keys and values of each IP-Adapter, (B, heads, n, d)."""
        (img_norm, img_gate, *img_mlp), (txt_norm, txt_gate, *txt_mlp) = mods
        M = txt.shape[1]
        txt_pe, img_pe = zip(*(mx.split(p, [M]) for p in pe), strict=True)
        *txt_qk, txt_v = self.txt_attn(adaptive_norm(txt, *txt_norm))
        *img_qk, img_v = self.img_attn(adaptive_norm(img, *img_norm))
        txt_qk, turned = self.txt_attn.norm.rotated(*txt_qk, txt_pe), self.img_attn.norm.rotated(*img_qk, img_pe)
        streams = (*txt_qk, txt_v), (*turned, img_v)
        q, k, v = (mx.concatenate(parts, axis=2) for parts in zip(*streams, strict=True))
        txt_y, img_y = mx.split(attention(q, k, v), [M], axis=1)
        img = gated(img, img_gate, self.img_attn.proj(img_y))
        txt = gated(txt, txt_gate, self.txt_attn.proj(txt_y))
        img, txt = self.add_mlp(img, self.img_mlp, *img_mlp), self.add_mlp(txt, self.txt_mlp, *txt_mlp)
        for picture in pictures:  # with queries that are not rotated
            img = img + attention(self.img_attn.norm.plain(img_qk[0]), *picture)
        return img, txt

    def act(self, x: mx.array) -> mx.array:
        return gelu_tanh(x)

    def add_mlp(self, x: mx.array, mlp: list[nn.Module], norm: Pair, gate: mx.array) -> mx.array:
        return gated(x, gate, mlp[2](self.act(mlp[0](adaptive_norm(x, *norm)))))


class SingleBlock(nn.Module):
    """Text and picture as one sequence; attention and MLP side by side."""

    def __init__(self, config: Config):
        super().__init__()
        d, hidden = config.width, config.hidden
        self.modulation = Modulation(d, 1, bias=True)
        self.linear1 = nn.Linear(d, 3 * d + hidden)
        self.norm = QKNorm(config)
        self.linear2 = nn.Linear(d + hidden, d)

    def __call__(self, x: mx.array, mods: list, pe: Pair) -> mx.array:
        norm, gate = mods
        d = x.shape[-1]
        qk, v, hidden = split_linear(self.linear1, adaptive_norm(x, *norm), 2 * d, 3 * d)
        q, k = self.norm.rotated(*self.norm(qk), pe)
        y = attention(q, k, split_heads(v, self.norm.heads))
        return gated(x, gate, side_by_side(self.linear2, y, self.act(hidden)))

    def act(self, x: mx.array) -> mx.array:
        return gelu_tanh(x)


class LastLayer(nn.Module):
    def __init__(self, config: Config, bias: bool):
        super().__init__()
        d = config.width
        self.adaLN_modulation = [nn.Identity(), nn.Linear(d, 2 * d, bias=bias)]  # index 0 is the SiLU
        self.linear = nn.Linear(d, config.out_channels, bias=bias)

    def mods(self, vec: mx.array) -> Pair:
        shift, scale = mx.split(self.adaLN_modulation[1](vec)[..., None, :], 2, axis=-1)
        return 1 + scale, shift

    def __call__(self, x: mx.array, mods: Pair) -> mx.array:
        return self.linear(adaptive_norm(x, *mods))


class Stack(nn.Module):
    """All of it but the last layer, which a ControlNet does not have."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        d = config.width
        self.img_in = nn.Linear(config.in_channels, d)
        self.txt_in = nn.Linear(config.context, d)
        self.time_in = Embedder(256, d, bias=True)
        self.vector_in = Embedder(config.pooled, d, bias=True)
        if config.guidance:
            self.guidance_in = Embedder(256, d, bias=True)
        self.double_blocks = [DoubleBlock(config) for _ in range(config.double)]
        self.single_blocks = [SingleBlock(config) for _ in range(config.single)]

    def prepare(
        self,
        ts: list[float] | None,
        context: mx.array,
        pooled: mx.array,
        size: tuple[int, int],
        guidance: float | mx.array | None = None,
        references: Sequence[mx.array] = (),
        pictures: Sequence[Shown] = (),
        spans: Sequence[Span] = (),
    ) -> dict:
        """All inputs that do not depend on x, made once per picture: the text, the rotations for x's size (h, w), and
        each block's modulations at each of `ts` (None: made in every call). context (B, M, n), pooled (B, p).
        references: latents of pictures to edit, (1, h_k, w_k, c), which all samples share. pictures: of
        each IP-Adapter, keys and values (B, n, d) for double blocks; spans: the times in which each is read."""
        dtype = self.img_in.bias.dtype
        vec = self.vector_in(pooled.astype(dtype))  # (B, d)
        if self.config.guidance:
            vec = vec + self.guidance_in(self.waves(mx.array(guidance).reshape(-1)))
        return {
            "txt": self.txt_in(context.astype(dtype)),
            "refs": [self.img_in(pack(z.astype(dtype))) for z in references],
            "pe": rotations(self.config, context.shape[1], size, *(z.shape[1:3] for z in references)),
            "vec": vec,
            "times": {} if ts is None else {t: i for i, t in enumerate(ts)},
            "mods": None if ts is None else self.mods(mx.array(ts)[:, None], vec),  # (T, B, 1, d) each
            "pictures": [
                (
                    span,
                    {i: tuple(split_heads(x.astype(dtype), self.config.heads) for x in kv) for i, kv in shown.items()},
                )
                for span, shown in zip(spans, pictures, strict=True)
            ],
        }

    def mods(self, t: mx.array, vec: mx.array) -> tuple[list, list]:
        """The modulations of every block at times t, (..., B or 1)."""
        return self.modulations(silu(self.time_in(self.waves(t)) + vec))

    def modulations(self, vec: mx.array) -> tuple[list, list]:
        return [b.mods(vec) for b in self.double_blocks], [b.modulation(vec) for b in self.single_blocks]

    def waves(self, t: mx.array) -> mx.array:
        return sinusoids(1000 * t, 256, flip_sin_to_cos=True, freq_shift=0).astype(self.img_in.bias.dtype)


class Flux(Stack):
    def __init__(self, config: Config):
        super().__init__(config)
        self.final_layer = LastLayer(config, bias=True)

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
        mods: tuple[list, list, Pair] | None,
        pictures: list[tuple[Span, Shown]],
        residuals: Sequence[mx.array] = (),
        single_residuals: Sequence[mx.array] = (),
        reuse: Callable | None = None,
    ) -> mx.array:
        """x (B, h, w, c) at t, a float or one per sample (B,) -> (B, h, w, out). The rest comes from `prepare`.
        residuals, single_residuals: what a ControlNet adds to the picture's tokens after each block; reuse: see
        `mlxdiff.reuse`."""
        double, single, final = at_time(t, times, mods, lambda t: self.mods(t, vec))
        on = [shown for span, shown in pictures if shows(span, t)]

        def double_step(i: int, m: tuple, r: mx.array | None, img: mx.array, txt: mx.array) -> Pair:
            img, txt = self.double_blocks[i](img, txt, m, pe, [shown[i] for shown in on])
            return img if r is None else add_at(img, r, 0), txt

        def single_step(block: SingleBlock, m: list, r: mx.array | None, both: mx.array) -> mx.array:
            both = block(both, m, pe)
            return both if r is None else add_at(both, r, txt.shape[1])

        doubles = [partial(double_step, i, *mr) for i, mr in enumerate(zip_longest(double, residuals))]
        singles = [partial(single_step, *bmr) for bmr in zip_longest(self.single_blocks, single, single_residuals)]
        y = through(self.img_in(pack(x)), refs, txt, doubles, singles, reuse)
        return unpack(self.final_layer(y, final), *x.shape[1:3])

    def release_modulation(self) -> None:
        """Drop the weights that only `prepare` reads, over a quarter of all. Call this before the result of `prepare`
        is evaluated, part by part: then memory holds only a few of these weights at a time, not all."""
        for block in self.double_blocks:
            del block.img_mod, block.txt_mod
        for block in self.single_blocks:
            del block.modulation
        del self.final_layer.adaLN_modulation, self.txt_in, self.time_in, self.vector_in
        if self.config.guidance:
            del self.guidance_in

    def modulations(self, vec: mx.array) -> tuple[list, list, Pair]:
        return *super().modulations(vec), self.final_layer.mods(vec)


def through(
    img: mx.array,
    refs: list[mx.array],
    txt: mx.array,
    doubles: list[Callable[[mx.array, mx.array], Pair]],
    singles: list[Callable[[mx.array], mx.array]],
    reuse: Callable | None,
) -> mx.array:
    """The picture's tokens (B, N, d) after all blocks. refs: those of pictures to edit, (1, n, d) each, which all
    samples share. The first double block decides what `reuse` reuses."""
    B, N, _ = img.shape
    M = txt.shape[1]
    img = mx.concatenate([img, *(mx.broadcast_to(ref, (B, *ref.shape[1:])) for ref in refs)], axis=1)

    def double(img: mx.array, txt: mx.array, blocks: list) -> Pair:
        for block in blocks:
            img, txt = block(img, txt)
        return img, txt

    first, txt = double(img, txt, doubles[:1])

    def rest() -> mx.array:
        both = mx.concatenate(double(first, txt, doubles[1:])[::-1], axis=1)
        for block in singles:
            both = block(both)
        return both[:, M : M + N]

    return rest() if reuse is None else reuse(first[:, :N] - img[:, :N], first[:, :N], rest)


def add_at(x: mx.array, y: mx.array, start: int) -> mx.array:
    """x (B, N, d) with y (B, n, d) added to its tokens from `start` on."""
    return x + mx.pad(y, [(0, 0), (start, x.shape[1] - start - y.shape[1]), (0, 0)])


def rotations(config: Config, text: int, *sizes: tuple[int, int]) -> Pair:
    """The rotation of each pair of a head's numbers, as cos (N, 1, d/2, 1) and signed sin (N, 1, d/2, 2) in float32.
    Text tokens are at (0, 0, 0) and do not rotate. A patch is at (k, row, column), where k counts the pictures of these
    sizes (h, w) in latents: 0 for the one that is drawn."""
    ids = [np.zeros((text, 3))]
    for k, (h, w) in enumerate(sizes):
        ids.append(np.stack([a.reshape(-1) for a in np.mgrid[k : k + 1, : h // 2, : w // 2]], axis=-1))
    return turns(config, np.concatenate(ids))


def turns(config: Config, ids: np.ndarray) -> Pair:
    """The rotations of tokens at these coordinates, (N, axes)."""
    freqs = [config.theta ** -(np.arange(0, d, 2) / d) for d in config.axes]
    angles = np.concatenate([ids[:, i, None] * f for i, f in enumerate(freqs)], axis=1)[:, None, :, None]
    cos, sin = np.cos(angles), np.sin(angles) * np.array([-1, 1])
    return mx.array(cos.astype(np.float32)), mx.array(sin.astype(np.float32))


def rotate(x: mx.array, scale: mx.array, pe: Pair) -> mx.array:
    """RoPE (Su et al. 2021) of neighbouring pairs of normed queries or keys (B, N, heads, d), after the scale (d,) of
    their norm -> (B, heads, N, d). One kernel computes it in float32 and returns x's dtype."""
    pairs, scales = x.reshape(*x.shape[:-1], -1, 2), scale.reshape(-1, 2)
    return turn(pairs, pairs[..., ::-1], scales, scales[..., ::-1], *pe).reshape(x.shape).swapaxes(1, 2)


@fused
def turn(x: mx.array, swapped: mx.array, scale: mx.array, swapped_scale: mx.array, cos: mx.array, sin: mx.array):
    y = x.astype(mx.float32) * scale * cos + swapped.astype(mx.float32) * swapped_scale * sin
    return y.astype(x.dtype)
