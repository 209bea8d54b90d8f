"""The Stable Diffusion U-Net: SD 1.x, SD 2.x, SDXL and its refiner, inpainting, LCM and distilled models; they differ
in their Config. unet(x, t, **unet.prepare(...)), x (B, h, w, in). Rombach et al. 2022; names as in diffusers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import mlx.core as mx
import mlx.nn as nn

from .layers import (
    Attention,
    Conv3x3,
    Downsample,
    GroupNorm,
    ResBlock,
    Shown,
    Span,
    TimeEmbedding,
    Upsample,
    by_sample,
    geglu,
    of_time,
    shows,
    silu,
    sinusoids,
)


@dataclass(frozen=True)
class HalfConfig:
    """The way down and the middle, which a ControlNet has too."""

    in_channels: int
    channels: tuple[int, ...]  # per level
    layers: tuple[int, ...]  # residual blocks per level on the way down; one more on the way up
    depth: tuple[tuple[int, ...], ...]  # per level, transformer layers of each attention on the way down; () if none
    mid_depth: int | None  # transformer layers in the middle; 0: no attention there, None: no middle
    heads: tuple[int, ...]  # per level; the middle takes the last
    context: int  # width of the text
    groups: int
    eps: float
    linear_projection: bool  # how the file stores proj_in and proj_out; here they are linear in both cases
    time_cond: int | None  # LCM: width of the guidance embedding
    added_time: int | None  # SDXL: width of each of the sizes' sinusoids
    added: int | None  # SDXL: width of pooled text and sizes together
    flip_sin_to_cos: bool
    freq_shift: int


@dataclass(frozen=True)
class Config(HalfConfig):
    out_channels: int
    up_depth: tuple[tuple[int, ...], ...]  # transformer layers of each attention on the way up, deepest level first

    @property
    def readers(self) -> dict[str, int]:
        """The layers that read text, by their transformers' names and numbers, and their widths, in the order in which
        IP-Adapters number them: down, up, middle."""
        down, up = zip(self.channels, self.depth, strict=True), zip(self.channels[::-1], self.up_depth, strict=True)
        blocks = [(f"down_blocks.{i}", *of_block) for i, of_block in enumerate(down)]
        blocks += [(f"up_blocks.{i}", *of_block) for i, of_block in enumerate(up)]
        blocks += [("mid_block", self.channels[-1], (self.mid_depth,))] if self.mid_depth else []
        return {
            f"{block}.attentions.{j}.{k}": width
            for block, width, depths in blocks
            for j, depth in enumerate(depths)
            for k in range(depth)
        }

    @property
    def reading(self) -> tuple[int, ...]:
        """Widths of the layers that read text, in the order of `readers`."""
        return tuple(self.readers.values())


class GEGLU(nn.Module):
    def __init__(self, c: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(c, 2 * hidden)

    def __call__(self, x: mx.array) -> mx.array:
        return geglu(*mx.split(self.proj(x), 2, axis=-1))


class FeedForward(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.net = [GEGLU(c, 4 * c), nn.Identity(), nn.Linear(4 * c, c)]  # the file's net.1 is a dropout

    def __call__(self, x: mx.array) -> mx.array:
        return self.net[2](self.net[0](x))


class TransformerLayer(nn.Module):
    def __init__(self, c: int, context: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(c)
        self.attn1 = Attention(c, c, heads, bias=False)
        self.norm2 = nn.LayerNorm(c)
        self.attn2 = Attention(c, context, heads, bias=False)
        self.norm3 = nn.LayerNorm(c)
        self.ff = FeedForward(c)

    def __call__(self, x: mx.array, kv: tuple[mx.array, ...]) -> mx.array:
        y = self.norm1(x)
        x = x + self.attn1(y, self.attn1.kv(y))
        x = x + self.attn2(self.norm2(x), kv)
        return x + by_sample(self.ff, self.norm3(x))


class Transformer(nn.Module):
    def __init__(self, config: HalfConfig, c: int, heads: int, depth: int):
        super().__init__()
        self.norm = GroupNorm(config.groups, c, eps=1e-6)
        self.proj_in = nn.Linear(c, c)
        self.transformer_blocks = [TransformerLayer(c, config.context, heads) for _ in range(depth)]
        self.proj_out = nn.Linear(c, c)

    def __call__(self, x: mx.array, kv: Iterator) -> mx.array:
        B, h, w, c = x.shape
        y = by_sample(self.proj_in, self.norm(x).reshape(B, h * w, c))  # (B, N, c)
        for layer in self.transformer_blocks:
            y = layer(y, next(kv))
        return x + by_sample(self.proj_out, y).reshape(B, h, w, c)


class Block(nn.Module):
    """Residual blocks with given input widths, and a transformer for each `depth`. Calls also get two iterators: every
    residual block takes the next time shift, every transformer layer takes the next text keys and values."""

    def __init__(self, config: HalfConfig, c_in: list[int], c: int, depth: tuple[int, ...], heads: int):
        super().__init__()
        time = 4 * config.channels[0]
        self.resnets = [ResBlock(n, c, config.groups, config.eps, time) for n in c_in]
        self.attentions = [Transformer(config, c, heads, n) for n in depth]


class DownBlock(Block):
    def __init__(self, config: HalfConfig, c_in: list[int], c: int, depth: tuple[int, ...], heads: int, down: bool):
        super().__init__(config, c_in, c, depth, heads)
        self.downsamplers = [Downsample(c, padding=1)] if down else []

    def __call__(
        self, x: mx.array, skips: list, shifts: Iterator, kv: Iterator, feature: mx.array | None = None
    ) -> mx.array:
        """feature: what a T2I-Adapter adds, before the map is halved if there is attention, else after that."""
        for resnet, transformer in zip_longest(self.resnets, self.attentions):
            x = resnet(x, next(shifts))
            if transformer is not None:
                x = transformer(x, kv)
            skips.append(x)
        if feature is not None and self.attentions:
            x = skips[-1] = x + feature
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        if feature is not None and not self.attentions:
            x = skips[-1] = x + feature
        return x


class MidBlock(Block):
    def __call__(self, x: mx.array, shifts: Iterator, kv: Iterator) -> mx.array:
        x = self.resnets[0](x, next(shifts))
        for transformer, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            x = resnet(transformer(x, kv), next(shifts))
        return x


class UpBlock(Block):
    def __init__(self, config: HalfConfig, c_in: list[int], c: int, depth: tuple[int, ...], heads: int, up: bool):
        super().__init__(config, c_in, c, depth, heads)
        self.upsamplers = [Upsample(c)] if up else []

    def __call__(
        self, x: mx.array, skips: list, shifts: Iterator, kv: Iterator, layers: slice = slice(None)
    ) -> mx.array:
        """layers: which of them to compute."""
        for resnet, transformer in zip_longest(self.resnets[layers], self.attentions[layers]):
            x = resnet(mx.concatenate([x, skips.pop()], axis=-1), next(shifts))
            if transformer is not None:
                x = transformer(x, kv)
        for upsample in self.upsamplers:
            x = upsample(x, *skips[-1].shape[1:3])
        return x


def _readers(blocks: list[Block]) -> list[Attention]:
    """The layers that read text."""
    return [layer.attn2 for block in blocks for a in block.attentions for layer in a.transformer_blocks]


class HalfUNet(nn.Module):
    """The way down and the middle."""

    def __init__(self, config: HalfConfig):
        super().__init__()
        self.config = config
        c, last = config.channels[0], len(config.channels) - 1
        self.conv_in = Conv3x3(config.in_channels, c)
        self.time_embedding = TimeEmbedding(c, 4 * c, config.time_cond)
        if config.added is not None:
            self.add_embedding = TimeEmbedding(config.added, 4 * c)

        self.down_blocks = []
        for i, (width, n) in enumerate(zip(config.channels, config.layers, strict=True)):
            c_in = [c] + [width] * (n - 1)
            self.down_blocks.append(DownBlock(config, c_in, width, config.depth[i], config.heads[i], i < last))
            c = width

        if config.mid_depth is not None:
            depth = (config.mid_depth,) if config.mid_depth else ()
            self.mid_block = MidBlock(config, [c] * (1 + len(depth)), c, depth, config.heads[-1])

    def skips(self) -> list[int]:
        """The widths of the maps that the way down leaves."""
        config, last = self.config, len(self.config.channels) - 1
        levels = enumerate(zip(config.channels, config.layers, strict=True))
        return [config.channels[0]] + [c for i, (c, n) in levels for _ in range(n + (i < last))]

    def prepare(
        self,
        ts: list[float] | None,
        context: mx.array,
        pooled: mx.array | None = None,
        time_ids: mx.array | None = None,
        guidance_embedding: mx.array | None = None,
        emphasis: mx.array | None = None,
    ) -> dict:
        """All inputs that do not depend on x, made once per picture: text keys and values, and each block's shift at
        each time in `ts` (None: computed in every call). context (B, N, d), pooled (B, p), time_ids (B, 6 or 5);
        emphasis: what a subclass adds to the time's embedding, (1, c)."""
        dtype = self.conv_in.weight.dtype
        added, guidance = emphasis, None
        if self.config.added is not None:
            sizes = self.sinusoids(time_ids, self.config.added_time).reshape(time_ids.shape[0], -1)
            embedding = self.add_embedding(mx.concatenate([pooled.astype(dtype), sizes], axis=-1))
            added = embedding if added is None else added + embedding
        if self.config.time_cond is not None:
            guidance = guidance_embedding.astype(dtype)
        times = {}
        if ts is not None:
            shifts = self.shifts(mx.array(ts)[:, None], added, guidance)  # per block (T, B or 1, c)
            times = {t: of_time(shifts, i) for i, t in enumerate(ts)}
        kv = [layer.kv(context.astype(dtype)) for layer in _readers(self.blocks())]
        return {"kv": kv, "times": times, "added": added, "guidance": guidance}

    def blocks(self) -> list[Block]:
        return [*self.down_blocks, *([self.mid_block] if "mid_block" in self else [])]

    def sinusoids(self, t: mx.array, dim: int) -> mx.array:
        waves = sinusoids(t, dim, self.config.flip_sin_to_cos, self.config.freq_shift)
        return waves.astype(self.conv_in.weight.dtype)

    def shifts(self, t: mx.array, added: mx.array | None, guidance: mx.array | None) -> list[mx.array]:
        """The shifts that residual blocks add at times t, (..., B or 1) -> (..., B or 1, c) each."""
        emb = self.time_embedding(self.sinusoids(t, self.config.channels[0]), guidance)
        emb = silu(emb if added is None else emb + added)
        return [resnet.time_shift(emb) for block in self.blocks() for resnet in block.resnets]

    def shifts_at(
        self, t: float | mx.array, times: dict[float, list[mx.array]], added: mx.array | None, guidance: mx.array | None
    ) -> Iterator[mx.array]:
        """Those at a time t, a float or one per sample (B,), of `prepare` if it knew that time."""
        if isinstance(t, mx.array) or t not in times:
            return iter(self.shifts(mx.array(t).reshape(-1), added, guidance))
        return iter(times[t])

    def down(
        self, x: mx.array, shifts: Iterator, kv: Iterator, features: list[mx.array] = ()
    ) -> tuple[mx.array, list[mx.array]]:
        """What `conv_in` gives -> what the middle gives, and the maps that the way down leaves, (B, h, w, c) each.
        features: what a T2I-Adapter adds in each level and, if there is one more, to the middle."""
        skips, features = [x], iter(features)
        for block in self.down_blocks:
            x = block(x, skips, shifts, kv, next(features, None))
        x = self.mid_block(x, shifts, kv) if "mid_block" in self else x
        return sum(features, x), skips


class UNet(HalfUNet):
    def __init__(self, config: Config):
        super().__init__(config)
        c, last, skips = config.channels[-1], len(config.channels) - 1, self.skips()
        self.up_blocks = []
        for i, depth in zip(range(last, -1, -1), config.up_depth, strict=True):
            width, c_in = config.channels[i], []
            for _ in range(config.layers[i] + 1):
                c_in.append(c + skips.pop())
                c = width
            self.up_blocks.append(UpBlock(config, c_in, width, depth, config.heads[i], i > 0))

        self.conv_norm_out = GroupNorm(config.groups, c, config.eps, silu=True)
        self.conv_out = Conv3x3(c, config.out_channels)

    def __call__(
        self,
        x: mx.array,
        t: float | mx.array,
        *,
        kv: list[tuple[mx.array, ...]],
        times: dict[float, list[mx.array]],
        added: mx.array | None,
        guidance: mx.array | None,
        pictures: list[tuple[Span, Shown]] = (),
        residuals: list[mx.array] | None = None,
        features: list[mx.array] = (),
        reuse: Callable | None = None,
    ) -> mx.array:
        """x (B, h, w, in) at time t, a float or one per sample (B,) -> (B, h, w, out). `prepare` makes the rest.
        residuals: what a ControlNet adds to each skip and, last, to the middle; features: see `down`; reuse: see
        `mlxdiff.reuse`."""
        on = [layers for span, layers in pictures if shows(span, t)]
        kv = [(*own, *(x for layers in on for x in layers.get(i, ()))) for i, own in enumerate(kv)]
        shifts = [*self.shifts_at(t, times, added, guidance)]
        x, last = self.conv_in(x), self.up_blocks[-1]

        def deep() -> tuple[mx.array, list[mx.array]]:
            """What the last layer reads, and the one skip that is left for it."""
            rest = iter(shifts), iter(kv)
            y, skips = self.down(x, *rest, features)
            if residuals is not None:
                skips = [skip + r for skip, r in zip(skips, residuals[:-1], strict=True)]
                y = y + residuals[-1]
            for block in self.up_blocks[:-1]:
                y = block(y, skips, *rest)
            return last(y, skips, *rest, slice(-1)), skips

        if reuse is None:
            y, skips = deep()
        else:
            y = reuse(self.down_blocks[0].resnets[0](x, shifts[0]) - x, 0.0, lambda: deep()[0])
            skips = [x if residuals is None else x + residuals[0]]
        read = len(last.attentions[-1].transformer_blocks) if last.attentions else 0
        x = last(y, skips, iter(shifts[-1:]), iter(kv[len(kv) - read :]), slice(-1, None))
        return self.conv_out(self.conv_norm_out(x))

    def prepare(
        self, *args, pictures: Sequence[Shown] = (), spans: Sequence[Span] = (), **text: mx.array | None
    ) -> dict:
        """As of `HalfUNet`. pictures: what IP-Adapters give, keys and values (B, n, c) for layers that read text, by
        their numbers in the file; spans: the times in which each is read."""
        cond, layers = super().prepare(*args, **text), _readers(self.blocks())
        down, up = (len(_readers(blocks)) for blocks in (self.down_blocks, self.up_blocks))
        middle = len(layers) - down - up

        def ours(i: int) -> int:  # adapters number the layers down, up, middle
            return i if i < down else i + middle if i < down + up else i - up

        def of_heads(shown: Shown) -> Shown:
            dtype = self.conv_in.weight.dtype
            return {ours(i): layers[ours(i)].of_heads(*(x.astype(dtype) for x in kv)) for i, kv in shown.items()}

        return cond | {"pictures": [(span, of_heads(shown)) for span, shown in zip(spans, pictures, strict=True)]}

    def blocks(self) -> list[Block]:
        return [*super().blocks(), *self.up_blocks]
