"""Stable Diffusion 3 and 3.5: velocity sd3(x, t, **sd3.prepare(...)), x (B, h, w, c) with even sides, t a sigma in
[0, 1]. Esser et al. 2024; names as in diffusers' SD3Transformer2DModel."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .layers import TimeEmbedding, adaptive_norm, at_time, attention, gated, gelu_tanh, modulation, silu, sinusoids

Pair = tuple[mx.array, mx.array]


@dataclass(frozen=True)
class Config:
    in_channels: int
    out_channels: int
    patch: int
    positions: int  # patches along a side of the largest picture that has position embeddings
    context: int  # width of the text
    pooled: int
    heads: int
    head_dim: int
    layers: int
    dual: tuple[int, ...]  # layers in which the picture also attends to itself alone (SD3.5 medium)
    qk_norm: bool


class SelfAttention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        d = config.heads * config.head_dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(d, d) for _ in range(3))
        self.norm_q, self.norm_k = qk_norms(config)
        self.to_out = [nn.Linear(d, d)]
        self.heads = config.heads

    def qkv(self, x: mx.array) -> tuple[mx.array, ...]:
        return self.split(self.to_q(x), self.to_k(x), self.to_v(x), self.norm_q, self.norm_k)

    def split(self, q: mx.array, k: mx.array, v: mx.array, norm_q: nn.Module, norm_k: nn.Module):
        """(B, N, heads * d) each -> (B, heads, N, d) each."""
        B, N, _ = q.shape
        q, k, v = (x.reshape(B, N, self.heads, -1) for x in (q, k, v))
        return norm_q(q).swapaxes(1, 2), norm_k(k).swapaxes(1, 2), v.swapaxes(1, 2)

    def __call__(self, x: mx.array) -> mx.array:
        return self.to_out[0](attention(*self.qkv(x)))


class JointAttention(SelfAttention):
    """Attention over picture and text, which share nothing else."""

    def __init__(self, config: Config, last: bool):
        super().__init__(config)
        d = config.heads * config.head_dim
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(d, d) for _ in range(3))
        self.norm_added_q, self.norm_added_k = qk_norms(config)
        if not last:
            self.to_add_out = nn.Linear(d, d)

    def text_qkv(self, x: mx.array) -> tuple[mx.array, ...]:
        q, k, v = self.add_q_proj(x), self.add_k_proj(x), self.add_v_proj(x)
        return self.split(q, k, v, self.norm_added_q, self.norm_added_k)

    def __call__(self, x: mx.array, txt: mx.array) -> Pair:
        """The outputs for picture and text; `to_add_out` has not been applied to the text's."""
        q, k, v = (mx.concatenate(p, axis=2) for p in zip(self.qkv(x), self.text_qkv(txt), strict=True))
        x, txt = mx.split(attention(q, k, v), [x.shape[1]], axis=1)
        return self.to_out[0](x), txt


def qk_norms(config: Config) -> tuple[nn.Module, nn.Module]:
    if config.qk_norm:
        return nn.RMSNorm(config.head_dim, eps=1e-6), nn.RMSNorm(config.head_dim, eps=1e-6)
    return nn.Identity(), nn.Identity()


class GELU(nn.Module):
    def __init__(self, d: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(d, hidden)

    def __call__(self, x: mx.array) -> mx.array:
        return gelu_tanh(self.proj(x))


class FeedForward(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.net = [GELU(d, 4 * d), nn.Identity(), nn.Linear(4 * d, d)]  # index 1 is a dropout

    def __call__(self, x: mx.array) -> mx.array:
        return self.net[2](self.net[0](x))


class Modulation(nn.Module):
    """vec (..., d) -> n times a norm's (scale, shift) and a gate; if n is 0, one norm without a gate."""

    def __init__(self, d: int, n: int):
        super().__init__()
        self.linear = nn.Linear(d, 3 * n * d if n else 2 * d)
        self.n = n

    def __call__(self, vec: mx.array) -> list:
        y = self.linear(vec)
        if self.n:
            return modulation(y, self.n)
        scale, shift = mx.split(y[..., None, :], 2, axis=-1)  # here the scale comes first
        return [(1 + scale, shift)]


class Block(nn.Module):
    def __init__(self, config: Config, dual: bool, last: bool):
        super().__init__()
        d = config.heads * config.head_dim
        self.norm1 = Modulation(d, 3 if dual else 2)
        self.norm1_context = Modulation(d, 0 if last else 2)
        self.attn = JointAttention(config, last)
        if dual:
            self.attn2 = SelfAttention(config)
        self.ff = FeedForward(d)
        if not last:
            self.ff_context = FeedForward(d)

    def mods(self, vec: mx.array) -> tuple[list, list]:
        return self.norm1(vec), self.norm1_context(vec)

    def __call__(self, x: mx.array, txt: mx.array, mods: tuple[list, list]) -> Pair:
        (norm, gate, mlp_norm, mlp_gate, *dual), (txt_norm, *txt_mods) = mods
        y, txt_y = self.attn(adaptive_norm(x, *norm), adaptive_norm(txt, *txt_norm))
        if dual:
            norm, dual_gate = dual
            x, x0 = gated(x, gate, y), x
            x = gated(x, dual_gate, self.attn2(adaptive_norm(x0, *norm)))
        else:
            x = gated(x, gate, y)
        x = gated(x, mlp_gate, self.ff(adaptive_norm(x, *mlp_norm)))
        if txt_mods:  # the last block has none: nothing reads its text
            gate, mlp_norm, mlp_gate = txt_mods
            txt = gated(txt, gate, self.attn.to_add_out(txt_y))
            txt = gated(txt, mlp_gate, self.ff_context(adaptive_norm(txt, *mlp_norm)))
        return x, txt


class Patches(nn.Module):
    def __init__(self, channels: int, d: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, d, patch, stride=patch)

    def __call__(self, x: mx.array) -> mx.array:
        return self.proj(x).flatten(1, 2)  # (B, N, d)


class PatchEmbed(Patches):
    def __init__(self, config: Config):
        d = config.heads * config.head_dim
        super().__init__(config.in_channels, d, config.patch)
        self.pos_embed = mx.zeros((1, config.positions**2, d))
        self.positions = config.positions

    def crop(self, h: int, w: int) -> mx.array:
        """The middle of the stored map of positions, (1, h * w, d)."""
        top, left = (self.positions - h) // 2, (self.positions - w) // 2
        whole = self.pos_embed.reshape(self.positions, self.positions, -1)
        return whole[top : top + h, left : left + w].reshape(1, h * w, -1)


class TimeTextEmbed(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        d = config.heads * config.head_dim
        self.timestep_embedder = TimeEmbedding(256, d)
        self.text_embedder = TimeEmbedding(config.pooled, d)

    def __call__(self, t: mx.array, vec: mx.array) -> mx.array:
        """What modulations are made of, at times t, (..., B or 1), for a pooled text that was embedded."""
        waves = sinusoids(1000 * t, 256, flip_sin_to_cos=True, freq_shift=0).astype(vec.dtype)
        return silu(self.timestep_embedder(waves) + vec)


class SD3(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        d, last = config.heads * config.head_dim, config.layers - 1
        self.pos_embed = PatchEmbed(config)
        self.time_text_embed = TimeTextEmbed(config)
        self.context_embedder = nn.Linear(config.context, d)
        self.transformer_blocks = [Block(config, i in config.dual, i == last) for i in range(config.layers)]
        self.norm_out = Modulation(d, 0)
        self.proj_out = nn.Linear(d, config.patch**2 * config.out_channels)

    def __call__(
        self,
        x: mx.array,
        t: float | mx.array,
        *,
        txt: mx.array,
        pos: mx.array,
        vec: mx.array,
        times: dict[float, int],
        mods: tuple[list, list] | None,
        skip_layers: tuple[int, ...] = (),
        residuals: Sequence[mx.array] = (),
        reuse: Callable | None = None,
    ) -> mx.array:
        """x (B, h, w, c) at t, a float or one per sample (B,) -> (B, h, w, out). The rest comes from `prepare`, except
        `skip_layers`, which skip-layer guidance leaves out of its extra pass, `residuals`, which are added to the
        picture after each block but the last, and `reuse`, which is that of `mlxdiff.reuse`."""
        blocks, (final,) = at_time(t, times, mods, lambda t: self.mods(t, vec))

        B, h, w, _ = x.shape
        x = self.pos_embed(x) + pos
        numbered = [*enumerate(zip(self.transformer_blocks, blocks, strict=True))]

        def through(x: mx.array, txt: mx.array, some: list) -> tuple[mx.array, mx.array]:
            for i, (block, m) in some:
                if i not in skip_layers:
                    x, txt = block(x, txt, m)
                if i < len(residuals):
                    x = x + residuals[i]
            return x, txt

        first, txt = through(x, txt, numbered[:1])

        def rest() -> mx.array:
            return through(first, txt, numbered[1:])[0]

        x = rest() if reuse is None else reuse(first - x, first, rest)
        x = self.proj_out(adaptive_norm(x, *final))
        p = self.config.patch
        x = x.reshape(B, h // p, w // p, p, p, -1).swapaxes(2, 3)
        return x.reshape(B, h, w, -1)

    def prepare(self, ts: list[float] | None, context: mx.array, pooled: mx.array, size: tuple[int, int]) -> dict:
        """All inputs that do not depend on x, made once per picture: the text, the positions for x's size (h, w), and
        each block's modulations at each of `ts` (None: made in every call). context (B, M, n), pooled (B, p)."""
        h, w = (n // self.config.patch for n in size)
        vec = self.time_text_embed.text_embedder(pooled.astype(self.dtype))  # (B, d)
        return {
            "txt": self.context_embedder(context.astype(self.dtype)),
            "pos": self.pos_embed.crop(h, w).astype(self.dtype),
            "vec": vec,
            "times": {} if ts is None else {t: i for i, t in enumerate(ts)},
            "mods": None if ts is None else self.mods(mx.array(ts)[:, None], vec),  # (T, B, 1, d) each
        }

    def release_modulation(self) -> None:
        """Drop the weights that only `prepare` reads, over a third of all. Call this before the result of `prepare` is
        evaluated, part by part: then memory holds only a few of these weights at a time, not all of them together."""
        for block in self.transformer_blocks:
            del block.norm1, block.norm1_context
        del self.norm_out, self.time_text_embed, self.context_embedder, self.pos_embed.pos_embed

    def mods(self, t: mx.array, vec: mx.array) -> tuple[list, list]:
        """The modulations of every block at times t, (..., B or 1)."""
        vec = self.time_text_embed(t, vec)
        return [block.mods(vec) for block in self.transformer_blocks], self.norm_out(vec)

    @property
    def dtype(self) -> mx.Dtype:
        return self.pos_embed.proj.bias.dtype
