"""ControlNets of FLUX.1: InstantX's, which read the latents of a picture, unions among them, and XLabs', which read its
pixels. net(x, t, **net.prepare(...), hint=...) -> residuals of its double and of its single blocks."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import flux
from .controlnet import Guiding, Hint, Reads
from .layers import at_time, pack

MODES = ("canny", "tile", "depth", "blur", "pose", "gray", "lq")  # of InstantX's union, by their numbers


@dataclass(frozen=True)
class Config(flux.Config, Reads):
    tasks: int  # kinds of pictures that it is told apart; 0: it reads one kind
    hint: tuple[int, ...]  # widths of the convolutions that read pixels; (): it reads latents
    draws = True

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES[: self.tasks]

    @property
    def reads_latents(self) -> bool:
        return not self.hint

    def pixels(self, picture: np.ndarray, mode: str | None) -> np.ndarray:
        """What the VAE is shown of a picture in [-1, 1]."""
        return picture

    @property
    def multiple(self) -> int:
        return 2 * 2 ** max(0, len(self.hint) - 1)


def misfit(config: Config, net: object, factor: int) -> str:
    """What keeps a ControlNet from a denoiser, in words; "" if nothing does. factor: pixels that a latent covers."""
    if not isinstance(net, flux.Config):
        return "is for FLUX.1"
    for name in ("width", "heads", "context", "pooled", "axes"):
        ours, theirs = getattr(config, name), getattr(net, name)
        if ours != theirs:
            return f"has {name} {ours}, not {theirs}"
    if config.in_channels != net.out_channels:
        return f"reads patches of {config.in_channels} numbers, not {net.out_channels}"
    if config.hint and 2 ** (len(config.hint) - 1) != factor:
        return f"makes one of {2 ** (len(config.hint) - 1)} pixels of its picture, not of {factor}"
    return ""


class FluxControlNet(flux.Stack):
    def __init__(self, config: Config):
        super().__init__(config)
        d = config.width
        if config.hint:
            self.input_hint_block = Hint(3, config.hint, config.in_channels // 4)
        self.controlnet_x_embedder = nn.Linear(config.in_channels, d)
        self.controlnet_blocks = [nn.Linear(d, d) for _ in range(config.double)]
        self.controlnet_single_blocks = [nn.Linear(d, d) for _ in range(config.single)]
        if config.tasks:
            self.controlnet_mode_embedder = nn.Embedding(config.tasks, d)

    def hint(self, z: mx.array) -> mx.array:
        """What it reads of a picture: of its latents (B, h, w, c), or of its pixels (1, H, W, 3) in [-1, 1]."""
        z = z.astype(self.img_in.bias.dtype)
        return self.controlnet_x_embedder(pack(self.input_hint_block(z) if self.config.hint else z))

    def controls(self, given: Guiding) -> dict[str, "Control"]:
        picture, denoiser = given.pictures[0], given.base.config
        more = {"task": given.tasks[0]} if self.config.modes else {}
        if self.config.guidance and given.guidance is not None:  # the denoiser is distilled, but this was not
            more["guidance"] = given.guidance
        hint = self.hint(2 * picture - 1 if self.config.hint else picture)
        cond, blocks = given.prepared(alone=True, **more)["cond"] | {"hint": hint}, (denoiser.double, denoiser.single)
        scale, times = given.scales[0], given.times
        return {side: Control(self, cond, scale, times, side == "both", blocks) for side in given.sides}

    def prepare(
        self, ts: list[float] | None, context: mx.array, *, size: tuple[int, int], task: int | None = None, **rest
    ) -> dict:
        """As FLUX.1's. task: the kind of picture, which becomes a first token of the text."""
        cond = super().prepare(ts, context, size=size, **rest)
        del cond["refs"], cond["pictures"]  # the denoiser alone reads other pictures
        if task is not None:
            token = mx.broadcast_to(
                self.controlnet_mode_embedder.weight[task], (context.shape[0], 1, self.config.width)
            )
            cond["txt"] = mx.concatenate([token, cond["txt"]], axis=1)
            cond["pe"] = flux.rotations(self.config, context.shape[1] + 1, size)
        return cond

    def __call__(
        self, x: mx.array, t: float, *, txt: mx.array, pe: flux.Pair, vec: mx.array, times: dict, mods: tuple,
        hint: mx.array,
    ) -> tuple[list[mx.array], list[mx.array]]:  # fmt: skip
        double, single = at_time(t, times, mods, lambda t: self.mods(t, vec))
        img = self.img_in(pack(x[..., : self.config.in_channels // 4])) + hint
        doubles, singles, M = [], [], txt.shape[1]
        for block, m, out in zip(self.double_blocks, double, self.controlnet_blocks, strict=True):
            img, txt = block(img, txt, m, pe)
            doubles.append(out(img))
        both = mx.concatenate([txt, img], axis=1)
        for block, m, out in zip(self.single_blocks, single, self.controlnet_single_blocks, strict=True):
            both = block(both, m, pe)
            singles.append(out(both[:, M:]))
        return doubles, singles


@dataclass(frozen=True)
class Control:
    """One control of a run. It reads the prompt alone: in a pass for the negative prompt, too, it adds the same."""

    net: Callable[..., tuple[list[mx.array], list[mx.array]]]
    cond: dict  # the arguments of net besides x and t
    scale: float
    times: tuple[float, float]  # it is on from the first time down to the second, which is excluded
    both: bool  # whether x holds the samples twice
    blocks: tuple[int, int]  # double and single ones of the denoiser

    def adds(self, x: mx.array, t: float) -> dict[str, list[mx.array]]:
        outs = self.net(x[x.shape[0] // 2 :] if self.both else x, t, **self.cond)
        added = {}
        for name, residuals, n in zip(("residuals", "single_residuals"), outs, self.blocks, strict=True):
            if residuals:
                scaled = [self.scale * (mx.concatenate([r, r]) if self.both else r) for r in residuals]
                apart = -(-n // len(scaled))  # blocks that share a residual; XLabs' take turns
                each = (i % len(scaled) if self.net.config.hint else i // apart for i in range(n))
                added[name] = [scaled[i] for i in each]
        return added
