"""T2I-Adapters: diffusers' names, and the original ones, which number the residual blocks of all levels in one row."""

import re

from ..models.t2i import Config
from .layout import Layout
from .rules import Lacking, Row, Shapes
from .settings import MOST_LAYERS, Settings

_OF_LEVEL = 2  # residual blocks of a level, in the original files of the full kind
LAYOUTS = {
    "t2i": Layout(
        "a T2I-Adapter",
        [(r"^(adapter\.)?", "t2i.")],
        {"t2i": "t2i"},
        use="Name the model that it guides, and give it with its picture: `controls=[(FILE, PICTURE)]`.",
    )
}
CLASSES = ("T2IAdapter",)
ORIGINAL = r"^body\.\d+\.(body\.\d+\.)?block1\."
_KINDS = {"full_adapter": "full", "full_adapter_xl": "xl", "light_adapter": "light"}
_INPUTS = {c * patch**2: (c, patch) for c in (1, 3) for patch in (8, 16)}  # of the first convolution


def recognise(keys: Shapes) -> str | None:
    return "t2i" if keys.has(rf"{ORIGINAL}|^(adapter\.)?body\.\d+\.resnets\.\d+\.block1\.") else None


def table(names: list[str], like: Config | None) -> list[Row]:
    rows: list[Row] = [(r"^body\.(\d+)\.body\.(\d+)\.", r"body.\1.resnets.\2.")]  # the light kind
    flat = sorted({int(m[1]) for n in names if (m := re.match(r"body\.(\d{1,4})\.block1\.", n))})
    for n in flat:
        level, j = divmod(n, _OF_LEVEL)
        rows.append((rf"^body\.{n}\.(?=block)", f"_.{level}.resnets.{j}."))
        rows.append((rf"^body\.{n}\.(?=in_conv)", f"_.{level}."))
    return [*rows, (r"^_\.", "body.")]


def config(shapes: Shapes, like: Config | None) -> Config:
    light, levels = "conv_in.weight" not in shapes, range(max(1, shapes.count("body")))
    end = "out_conv.weight" if light else "resnets.0.block1.weight"
    inputs = shapes.size("body.0.in_conv.weight" if light else "conv_in.weight", 1)
    if inputs not in _INPUTS:
        raise Lacking("conv_in.weight")
    c, patch = _INPUTS[inputs]
    return Config(
        kind="light" if light else "full" if patch == 8 else "xl",
        in_channels=c,
        channels=tuple(shapes.size(f"body.{i}.{end}", 0) for i in levels),
        layers=max(1, shapes.count("body.0.resnets")),
        patch=patch,
    )


def from_json(s: Settings, cls: str) -> Config:
    """From diffusers' config.json. The light kind has one level more than widths: the last one twice."""
    kind = _KINDS[s.one("adapter_type", "full_adapter", [*_KINDS])]
    channels = s.wholes("channels", [320, 640, 1280, 1280])
    return Config(
        kind=kind,
        in_channels=s.one("in_channels", 3, [1, 3]),
        channels=(*channels, channels[-1]) if kind == "light" else channels,
        layers=s.whole("num_res_blocks", 2, MOST_LAYERS),
        patch=s.one("downscale_factor", 16 if kind == "xl" else 8, [4, 8, 16]),
    )


def divided(config: Config) -> list[tuple[int, int, str]]:
    return [(c, 4, "parts") for c in config.channels] if config.kind == "light" else []
