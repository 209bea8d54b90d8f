"""A U-Net with one part changed while a context lasts: a skip cut, a block's attention left out, the time misstated, or
a block that reads other words. The lessons use it to see what a part does."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from .errors import Error
from .pipeline import Pipeline


def unet(pipe: Pipeline) -> nn.Module:
    """The U-Net that a pipeline draws with."""
    if pipe.description.family.denoiser != "unet" or pipe.refiner is not None:
        raise Error(f"{pipe.name} does not draw with one U-Net.", "Use a model of Stable Diffusion without a refiner.")
    return pipe.networks.get("unet")


def blocks(net: nn.Module) -> dict[str, nn.Module]:
    """The blocks in the order in which they run, by name. Level 1 has the finest maps."""
    down = {f"down {i}": block for i, block in enumerate(net.down_blocks, 1)}
    middle = {"middle": net.mid_block} if "mid_block" in net else {}
    return down | middle | {f"up {len(net.up_blocks) - i}": block for i, block in enumerate(net.up_blocks)}


def readers(net: nn.Module) -> list[str]:
    """The names of the blocks that have attention, and so read words."""
    return [name for name, block in blocks(net).items() if block.attentions]


def skips(net: nn.Module) -> list[int]:
    """The level of each skip's map, in the order in which the way down leaves them. The first is the input itself; the
    last of a level, made smaller, is the next one's."""
    levels = len(net.config.layers)
    return [1, *(min(i + k // n, levels) for i, n in enumerate(net.config.layers, 1) for k in range(n + (i < levels)))]


@contextmanager
def cut(net: nn.Module, chosen: Collection[int]) -> Iterator[None]:
    """Nothing passes through these skips, counted as in `skips`: the way up gets zeros."""
    whole = net.down

    def down(*args) -> tuple[mx.array, list[mx.array]]:
        x, maps = whole(*args)
        return x, [mx.zeros_like(m) if i in chosen else m for i, m in enumerate(maps)]

    net.down = down
    try:
        yield
    finally:
        del net.down


@contextmanager
def misled(net: nn.Module, by: float) -> Iterator[None]:
    """The network is told a time that is off by so many training steps; what it is shown stays as it is."""
    right = net.shifts_at
    net.shifts_at = lambda t, times, *rest: right(min(max(t + by, 0.0), 999.0), {}, *rest)
    try:
        yield
    finally:
        del net.shifts_at


class _Through:
    """In the place of a transformer: it reads nothing and changes nothing."""

    def __init__(self, transformer: nn.Module):
        self.transformer_blocks = transformer.transformer_blocks

    def __call__(self, x: mx.array, kv: Iterator) -> mx.array:
        for _ in self.transformer_blocks:
            next(kv)
        return x


@contextmanager
def muted(net: nn.Module, names: Collection[str]) -> Iterator[None]:
    """These blocks work without attention: without text, and without a look at the rest of the picture."""
    chosen = [blocks(net)[name] for name in names]
    kept = [list(block.attentions) for block in chosen]
    try:
        for block, attentions in zip(chosen, kept, strict=True):
            block.attentions[:] = [_Through(a) for a in attentions]
        yield
    finally:
        for block, attentions in zip(chosen, kept, strict=True):
            block.attentions[:] = attentions


class _Other:
    """In the place of a cross-attention: the last sample of a batch, which is the prompt's, reads another text."""

    def __init__(self, layer: nn.Module, context: mx.array):
        self.layer, self.kv, self.other = layer, layer.kv, layer.kv(context)

    def __call__(self, x: mx.array, kv: tuple[mx.array, mx.array]) -> mx.array:
        return self.layer(x, tuple(mx.concatenate([own[:-1], new]) for own, new in zip(kv, self.other, strict=True)))


@contextmanager
def reading(net: nn.Module, names: Collection[str], context: mx.array) -> Iterator[None]:
    """These blocks read another text, (1, N, d), where the others read the prompt. For one picture at a time."""
    named = blocks(net)
    layers = [layer for name in names for a in named[name].attentions for layer in a.transformer_blocks]
    originals = [layer.attn2 for layer in layers]
    try:
        for layer, attn2 in zip(layers, originals, strict=True):
            layer.attn2 = _Other(attn2, context)
        yield
    finally:
        for layer, attn2 in zip(layers, originals, strict=True):
            layer.attn2 = attn2
