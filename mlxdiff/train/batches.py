"""What a step of a training reads: encoded pictures, drawn into batches, with noise levels and targets as the model was
trained with. Diffusion models take all levels alike. Rectified flow takes sigmoid(normal) shifted as the model's own
schedule shifts pictures of this size, as Esser et al. 2024 did, and as diffusers (SD3) and kohya (`flux_shift`) do."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import conditioning, foreign, samplers, schedules
from ..description import Description
from ..families.base import INPUT
from ..models import build, ways
from ..networks import dtype_of
from . import objective
from .fit import write_arrays, writing


class Part(NamedTuple):
    """What a step reads of one set of pictures."""

    x: mx.array  # (B, h, w, c)
    t: mx.array  # (B,)
    target: mx.array
    args: dict  # of the denoiser's `prepare`
    weight: float


@dataclass(frozen=True)
class Data:
    """Encoded pictures. Those of a bucket, which have the same shape, can share a batch."""

    means: list[mx.array]  # (1, h, w, c)
    spreads: list[mx.array]  # of the VAE's distribution around them
    args: list[dict[str, mx.array]]  # of the denoiser's `prepare`
    weight: float = 1.0
    dropout: float = 0.0  # the share of the pictures of which a step reads no caption, but `empty`
    empty: dict[str, mx.array] = field(default_factory=dict)
    buckets: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    def add(self, mean: mx.array, spread: mx.array, args: dict[str, mx.array]) -> None:
        self.buckets.setdefault(tuple(mean.shape), []).append(len(self.means))
        self.means.append(mean)
        self.spreads.append(spread)
        self.args.append(args)

    def picks(self, rng: np.random.Generator, n: int) -> list[int]:
        """The pictures of a batch: each picture is equally probable."""
        buckets = list(self.buckets.values())
        sizes = np.array([len(b) for b in buckets])
        chosen = buckets[rng.choice(len(sizes), p=sizes / sizes.sum())]
        return [chosen[i] for i in rng.choice(len(chosen), n, replace=n > len(chosen))]


class Reads(NamedTuple):
    """What a step reads of a picture besides its latents."""

    widths: dict[str, tuple[int, ...]]  # the last axis of each array
    captions: int | None  # how many there are, if a step reads the number of one

    def known(self, args: dict[str, mx.array]) -> bool:
        """Whether the number of a caption, if there is one, is that of a caption that there is."""
        number = args.get("caption", mx.array([0]))
        right = number.dtype == mx.int32 and number.shape == (1,)
        return right and 0 <= number.item() < (self.captions or 1)


def read(model: Description, n: int) -> dict[str, mx.array]:
    """What a denoiser reads of n texts and sizes, as zeros."""
    config, plan = model.net, model.text
    args = {"context": mx.zeros((n, plan.tokens, config.context))}
    if plan.sizes:
        args["time_ids"] = mx.zeros((n, 6 if plan.scores is None else 5))
        args["pooled"] = mx.zeros((n, config.added - args["time_ids"].shape[1] * config.added_time))
    elif plan.pooled:
        args["pooled"] = mx.zeros((n, config.pooled))
    return args


def store(file: Path, data: Data) -> None:
    """Write encoded pictures, so that a run that continues need not encode them again."""
    arrays = {}
    for i, (mean, spread, args) in enumerate(zip(data.means, data.spreads, data.args, strict=True)):
        arrays |= {f"{i}.mean": mean, f"{i}.spread": spread, **{f"{i}.args.{k}": v for k, v in args.items()}}
    arrays |= {f"empty.args.{k}": v for k, v in data.empty.items()}
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(file, arrays, {"pictures": str(len(data.means))})


def stored(file: Path, weight: float, dropout: float, shapes: list[tuple[int, ...]], reads: Reads) -> Data | None:
    """What `store` wrote, read when it is used; None if there is none, or not a whole one, or one that was made for
    another model. shapes: of the latents."""
    try:
        foreign.check_regular(file)
        arrays, header = mx.load(str(file), return_metadata=True)
        data = Data([], [], [], weight, dropout, _arguments(arrays, "empty"))
        whole = header["pictures"] == str(len(shapes))
        for i, shape in enumerate(shapes):
            args = _arguments(arrays, i)
            data.add(arrays[f"{i}.mean"], arrays[f"{i}.spread"], args)
            for latents in (data.means[-1], data.spreads[-1]):
                whole &= latents.shape == shape and latents.dtype == mx.float32 and mx.isfinite(latents).all().item()
            whole &= {k: v.ndim for k, v in args.items()} == {k: v.ndim for k, v in data.args[0].items()}
            whole &= {k: v.shape[-1:] for k, v in args.items()} == reads.widths and reads.known(args)
        wanted = {k: (v.ndim, v.shape[-1:]) for k, v in data.args[0].items() if dropout and k != "time_ids"}
        whole &= {k: (v.ndim, v.shape[-1:]) for k, v in data.empty.items()} == wanted and reads.known(data.empty)
    except (KeyError, OSError, RuntimeError, ValueError):
        return None
    return data if whole else None


def _arguments(arrays: dict[str, mx.array], of: int | str) -> dict[str, mx.array]:
    start = f"{of}.args."
    return {k.removeprefix(start): v for k, v in arrays.items() if k.startswith(start)}


class Objective:
    """Noise levels and targets as the model was trained with."""

    def __init__(self, model: Description):
        self.model = model
        if not model.flow:
            self.alpha_bar = schedules.discrete(model.schedule, samplers.SAMPLERS["ddim"].grid).alpha_bar

    def part(self, data: Data, rng: np.random.Generator, n: int) -> Part:
        """The batch of a step."""
        picks, kind = data.picks(rng, n), self.model.prediction
        mean, spread = (mx.concatenate([of[i] for i in picks]) for of in (data.means, data.spreads))
        noises = rng.standard_normal((2, *mean.shape), np.float32)
        u = objective.stratified(rng, n)
        if self.model.flow:
            t = level = self.sigmas(u, mean.shape[1] * mean.shape[2])
        else:
            t, level = objective.levels(kind, self.alpha_bar, u)
        x0 = mean + spread * mx.array(noises[0])
        x, target = objective.mixture(kind, x0, mx.array(noises[1]), mx.array(level.astype(np.float32)))
        drops = rng.random(n) < data.dropout if data.dropout else [False] * n
        each = [data.args[i] | (data.empty if drop else {}) for i, drop in zip(picks, drops, strict=True)]
        args = self.arguments(each, x.shape[1:3])
        return Part(x, mx.array(t.astype(np.float32)), target, args, data.weight)

    def sigmas(self, u: np.ndarray, latents: int) -> np.ndarray:
        """Uniforms (B,) -> noise levels of rectified flow, for a picture of so many latents."""
        model, normal = self.model, NormalDist()
        logits = np.array([normal.inv_cdf(min(max(v, 1e-6), 1 - 1e-6)) for v in u])
        schedule = schedules.flow(model.schedule, latents // model.family.patch**2, model.defaults.steps)
        return schedule.shifted(1 / (1 + np.exp(-logits)))

    def arguments(self, each: list[dict[str, mx.array]], size: tuple[int, int]) -> dict:
        """Of a batch, from those of its pictures. size: h and w of the latents."""
        model, args = self.model, {}
        if model.flow:
            args["size"] = tuple(size)
        if model.guidance == INPUT:
            args["guidance"] = 1.0  # the network learns what the pictures show, not what guidance would make of it
        if model.text.qwen is not None and not model.text.qwen_padded:
            args["lengths"] = tuple(a["context"].shape[1] for a in each)
            each = [a | {"context": conditioning.longer(a["context"], max(args["lengths"]))} for a in each]
        return args | {k: mx.concatenate([a[k] for a in each]) for k in each[0]}


def loss(net: nn.Module, parts: list[Part]) -> mx.array:
    """The squared error of what the network predicts."""
    total = 0.0
    for x, t, target, args, weight in parts:
        out = net(x.astype(dtype_of(net)), t, **net.prepare(None, **args)).astype(mx.float32)
        total = total + weight * mx.square(out - target).mean()
    return total


def recompute(net: nn.Module) -> None:
    """Let the blocks of a network keep only what they read, and compute the rest again for the gradients (Chen et al.
    2016). On a CPU they then compute with MLX's own layers: the gradients of cpu.py's keep more, and at the width of a
    published network are no faster."""
    for block in blocks(net):
        block.__class__ = _again(type(block))


def blocks(net: nn.Module) -> list[nn.Module]:
    """Those that `recompute` changes."""
    return [module for module in net.modules() if type(module) in build.BLOCKS]


@cache
def _again(kind: type[nn.Module]) -> type[nn.Module]:
    class Again(kind):
        def plain(self, *args, **named):
            with ways.exportable():
                return super().__call__(*args, **named)

        def __call__(self, *args, **named):
            return nn.utils.checkpoint(self, self.plain)(*args, **named)

    return Again
