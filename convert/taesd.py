"""TAESD: the original decoder alone, and diffusers' AutoencoderTiny, of which the encoder is left: nothing here encodes
with it."""

import itertools
import re

from ..models.taesd import Config
from .rules import Row, Shapes
from .settings import Settings

TABLE: list[Row] = [
    (r"^encoder\.", None),
    (r"^decoder\.", ""),
]


def table(names: list[str]) -> list[Row]:
    """The original counts what holds the latents in range as its layer 0, so all others come one later."""
    numbers = sorted({int(m[1]) for n in names if (m := re.match(r"(\d+)\.", n))})
    return [*TABLE, *((rf"^{i}\.", f"layers.{i - 1}.") for i in numbers)]


def config(shapes: Shapes) -> Config:
    """Read off the shapes: a level is its blocks, then, but for the last, an enlargement and a convolution."""
    layers = sorted({int(m[1]) for n in shapes if (m := re.match(r"layers\.(\d+)\.", n))})
    kinds = ["block" if f"layers.{i}.conv.0.weight" in shapes else "conv" for i in layers[1:]]
    return Config(
        latent_channels=shapes.size("layers.0.weight", 1),
        out_channels=shapes.size(f"layers.{layers[-1]}.weight", 0),
        width=shapes.size("layers.0.weight", 0),
        blocks=tuple(len(list(run)) for kind, run in itertools.groupby(kinds) if kind == "block"),
    )


def from_json(s: Settings, cls: str) -> Config:
    """From diffusers' config.json. Widths differ from level to level in none that its own network could run."""
    blocks = s.wholes("num_decoder_blocks", [3, 3, 3, 1], most=100)
    widths = s.wholes("decoder_block_out_channels", [64, 64, 64, 64], len(blocks))
    s.one("decoder_block_out_channels", list(widths), [[widths[0]] * len(widths)])
    s.one("act_fn", "relu", ["relu"])
    s.one("upsample_fn", "nearest", ["nearest"])
    s.one("upsampling_scaling_factor", 2, [2])
    s.one("scaling_factor", 1.0, [1.0])
    s.one("shift_factor", 0.0, [0.0])
    return Config(
        latent_channels=s.whole("latent_channels", 4),
        out_channels=s.whole("out_channels", 3),
        width=widths[0],
        blocks=blocks,
    )
