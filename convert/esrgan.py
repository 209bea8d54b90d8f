"""ESRGAN upscalers: BasicSR's names (Real-ESRGAN), those of its forerunners (BSRGAN, RealSR) and the numbered ones of
the first ESRGAN, which most files of the community have."""

import math
import re

from ..errors import Error
from ..models.esrgan import COLOURS, Config
from .layout import Layout
from .rules import Row, Shapes
from .settings import Settings

MOST_DOUBLINGS = 4  # published ones have up to three
LAYOUTS = {
    "esrgan": Layout(
        "an ESRGAN upscaler",
        [(r"^(params(_ema)?\.)?", "upscaler.")],
        {"upscaler": "esrgan"},
        use="Enlarge pictures with it: `upscaler=FILE`.",
    )
}
CLASSES = ()
ORIGINAL = r"^model\.1\.sub\.0\.RDB1\."
_DENSE = r"(?:body|RRDB_trunk)\.(\d+)\.(?:rdb|RDB)(\d)\.conv(\d)\."
TABLE: list[Row] = [
    (rf"^{_DENSE}", r"body.\1.rdb\2.conv\3."),
    (r"^trunk_conv\.", "conv_body."),
    (r"^HRconv\.", "conv_hr."),
    *((rf"^(?:upconv|conv_up){i + 1}\.", f"conv_up.{i}.conv.") for i in range(MOST_DOUBLINGS)),
]


def recognise(keys: Shapes) -> str | None:
    return "esrgan" if keys.has(rf"^(params(_ema)?\.)?{_DENSE}weight$|{ORIGINAL}conv1\.0\.weight$") else None


def table(names: list[str], like: Config | None) -> list[Row]:
    """The numbered names are places in a sequence: a convolution, the blocks and one more convolution, three places for
    each doubling, of which the second has weights, and the last two convolutions with an activation between them."""
    places = sorted({int(m[1]) for n in names if (m := re.match(r"model\.(\d{1,3})\.", n))})
    if not places:
        return TABLE
    inner = [int(m[1]) for n in names if (m := re.match(r"model\.1\.sub\.(\d{1,3})\.", n))]
    hr, last = places[-2:] if len(places) > 3 else (2, 4)
    ups = [p for p in places if 1 < p < hr]
    return [
        (r"^model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.", r"body.\1.rdb\2.conv\3."),
        (rf"^model\.1\.sub\.{max(inner, default=0)}\.(weight|bias)$", r"conv_body.\1"),
        (r"^model\.0\.", "conv_first."),
        *((rf"^model\.{p}\.", f"conv_up.{i}.conv.") for i, p in enumerate(ups)),
        (rf"^model\.{hr}\.", "conv_hr."),
        (rf"^model\.{last}\.", "conv_last."),
    ]


def config(shapes: Shapes, like: Config | None) -> Config:
    """A network whose pictures are folded first reads that many times more channels than three colours."""
    channels, colours = shapes.size("conv_first.weight", 1), shapes.size("conv_last.weight", 0)
    doublings, fold = shapes.count("conv_up"), math.isqrt(channels // COLOURS)
    if colours != COLOURS or fold not in (1, 2, 4) or channels != COLOURS * fold**2:
        raise Error(
            f"{shapes.file} reads pictures of {channels} channels and makes {colours}; {COLOURS} colours are needed.",
            "Use an upscaler for colour pictures.",
        )
    if not fold <= 2**doublings <= 2**MOST_DOUBLINGS:
        raise Error(
            f"{shapes.file} is an upscaler that doubles {doublings} times.",
            f"Use one that enlarges 1 to {2**MOST_DOUBLINGS} times.",
        )
    return Config(
        fold=fold,
        width=shapes.size("conv_first.weight", 0),
        growth=shapes.size("body.0.rdb1.conv1.weight", 0),
        rrdb=shapes.count("body"),
        doublings=doublings,
    )


def from_json(s: Settings, cls: str) -> Config:
    """There is none: no class of diffusers or transformers is an ESRGAN."""
    s.refuse("_class_name", cls)


def divided(config: Config) -> list[tuple[int, int, str]]:
    return []
