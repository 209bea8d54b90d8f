"""TAESD: the original decoder alone, and diffusers' AutoencoderTiny, whose encoder is dropped: it is used nowhere."""

import itertools
import re

from ..models.taesd import Config
from .layout import Layout
from .rules import Row, Shapes
from .settings import Settings

TABLE: list[Row] = [
    (r"^encoder\.", None),
    (r"^decoder\.", ""),
]
LAYOUTS = {
    "taesd": Layout(
        "a TAESD decoder, for previews",
        [(r"^", "taesd.")],
        {"taesd": "taesd"},
        use="Draw previews by it: `taesd=FILE`.",
    )
}
CLASSES = ("AutoencoderTiny",)
ORIGINAL = r"^\d+\.conv\.\d+\.weight$"


def recognise(keys: Shapes) -> str | None:
    return "taesd" if keys.has(r"^(decoder\.layers\.)?\d+\.conv\.\d+\.weight$") else None


def table(names: list[str], like: Config | None) -> list[Row]:
    """The original's layer 0 keeps the latents in range, so all others are numbered one higher."""
    numbers = sorted({int(m[1]) for n in names if (m := re.match(r"(\d{1,4})\.", n))})
    return [*TABLE, *((rf"^{i}\.", f"layers.{i - 1}.") for i in numbers)]


def config(shapes: Shapes, like: Config | None) -> Config:
    """A level is its blocks and, in all but the last, an enlargement and a convolution."""
    layers = sorted({int(m[1]) for n in shapes if (m := re.match(r"layers\.(\d{1,4})\.", n))})
    kinds = ["block" if f"layers.{i}.conv.0.weight" in shapes else "conv" for i in layers[1:]]
    return Config(
        latent_channels=shapes.size("layers.0.weight", 1),
        out_channels=shapes.size(f"layers.{layers[-1]}.weight", 0),
        width=shapes.size("layers.0.weight", 0),
        blocks=tuple(len(list(run)) for kind, run in itertools.groupby(kinds) if kind == "block"),
    )


def from_json(s: Settings, cls: str) -> Config:
    """From diffusers' config.json. diffusers runs only those whose levels are all of one width."""
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


def divided(config: Config) -> list[tuple[int, int, str]]:
    return []
