"""IP-Adapter (Ye et al. 2023): a picture as a few more tokens, which a denoiser's text layers read by keys and values
of their own. Plain adapters read the pooled output of a vision model, Plus and Full what its last layer reads. Names
are those of the published files."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .layers import attention, split_heads
from .vision import Output

Pair = tuple[mx.array, mx.array]


@dataclass(frozen=True)
class Config:
    kind: str  # a key of PROJECTIONS
    image: int  # width of what it reads
    context: int  # width of its tokens
    tokens: int | None  # how many it makes; None: as many as it reads
    width: int | None  # of the projection
    heads: int | None
    layers: int  # of the projection
    hidden: int | None
    widths: tuple[int, ...]  # of the denoiser's layers, in the order of the file

    @property
    def pools(self) -> bool:
        """Whether it reads the pooled output."""
        return PROJECTIONS[self.kind] is Plain


class Plain(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.proj = nn.Linear(config.image, config.tokens * config.context)
        self.norm = nn.LayerNorm(config.context)

    def __call__(self, x: mx.array) -> mx.array:
        return self.norm(self.proj(x).reshape(x.shape[0], -1, self.norm.weight.size))


class Full(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        width = config.hidden
        act = nn.GELU()
        self.proj = [
            nn.Linear(config.image, width),
            act,
            nn.Linear(width, config.context),
            nn.LayerNorm(config.context),
        ]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.proj:
            x = layer(x)
        return x


class Perceiver(nn.Module):
    """Attention of the tokens to what they are made of, and to themselves."""

    def __init__(self, config: Config):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        inner = 64 * config.heads  # in every published file
        self.to_q = nn.Linear(config.width, inner, bias=False)
        self.to_kv = nn.Linear(config.width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, config.width, bias=False)
        self.heads = config.heads

    def __call__(self, x: mx.array, tokens: mx.array) -> mx.array:
        y = self.norm2(tokens)
        kv = self.to_kv(mx.concatenate([self.norm1(x), y], axis=1))
        q, k, v = (split_heads(z, self.heads) for z in (self.to_q(y), *mx.split(kv, 2, axis=-1)))
        return self.to_out(attention(q, k, v))


class Resampler(nn.Module):
    """Plus: tokens that the file brings gather what the vision model saw (Jaegle et al. 2021)."""

    def __init__(self, config: Config):
        super().__init__()
        width, hidden = config.width, config.hidden
        self.latents = mx.zeros((1, config.tokens, width))
        self.proj_in = nn.Linear(config.image, width)
        self.layers = [
            [
                Perceiver(config),
                [
                    nn.LayerNorm(width),
                    nn.Linear(width, hidden, bias=False),
                    nn.GELU(),
                    nn.Linear(hidden, width, bias=False),
                ],
            ]
            for _ in range(config.layers)
        ]
        self.proj_out, self.norm_out = nn.Linear(width, config.context), nn.LayerNorm(config.context)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.proj_in(x)
        tokens = mx.broadcast_to(self.latents, (x.shape[0], *self.latents.shape[1:]))
        for attend, mlp in self.layers:
            tokens = y = tokens + attend(x, tokens)
            for layer in mlp:
                y = layer(y)
            tokens = tokens + y
        return self.norm_out(self.proj_out(tokens))


class KeysValues(nn.Module):
    def __init__(self, context: int, width: int, bias: bool):
        super().__init__()
        self.to_k_ip, self.to_v_ip = nn.Linear(context, width, bias), nn.Linear(context, width, bias)

    def __call__(self, tokens: mx.array) -> Pair:
        return self.to_k_ip(tokens), self.to_v_ip(tokens)


def misfit(config: Config, net) -> str:
    """What keeps a denoiser of a Config from reading such pictures; "" if nothing does."""
    if config.context != net.context:
        return f"reads text {config.context} wide, not {net.context}"
    if config.widths != net.reading:
        return f"has other layers ({len(config.widths)}) than the denoiser ({len(net.reading)})"
    return ""


PROJECTIONS = {"plain": Plain, "plus": Resampler, "full": Full, "xlabs": Plain}  # the last is for FLUX.1


class IPAdapter(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.image_proj = PROJECTIONS[config.kind](config)
        self.layers = [KeysValues(config.context, width, config.kind == "xlabs") for width in config.widths]

    def __call__(self, seen: Output) -> list[Pair]:
        """Keys and values (B, tokens, width) for each of the denoiser's layers, in the order of the file."""
        tokens = self.image_proj(seen.pooled if self.config.pools else seen.inner)
        return [layer(tokens) for layer in self.layers]
