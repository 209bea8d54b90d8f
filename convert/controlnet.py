"""ControlNets of U-Nets: diffusers' names, and the original ones."""

from dataclasses import fields

from ..families.published import UNET
from ..models.controlnet import Config
from ..models.unet import HalfConfig
from . import unet
from .layout import DROPPED, Layout
from .rules import Row, Shapes
from .settings import Settings

HINT = (2, 4, 6, 8, 10, 12)  # the original numbers count the activations between the convolutions
TABLE: list[Row] = [
    (r"^input_hint_block\.0\.", "controlnet_cond_embedding.conv_in."),
    *((rf"^input_hint_block\.{n}\.", f"controlnet_cond_embedding.blocks.{i}.") for i, n in enumerate(HINT)),
    (r"^input_hint_block\.14\.", "controlnet_cond_embedding.conv_out."),
    (r"^zero_convs\.(\d+)\.0\.", r"controlnet_down_blocks.\1."),
    (r"^middle_block_out\.0\.", "controlnet_mid_block."),
]
_SHARED = {f.name: getattr(UNET, f.name) for f in fields(HalfConfig)}
_LIKE = Config(**(_SHARED | {"added_time": 256}), hint_channels=3, hint=(16, 32, 96, 256), pooled=False)
# The first files that their authors published hold the model too that was trained with.
_MODEL: Row = (r"^(model\.diffusion_model|first_stage_model|cond_stage_model)\.", None)
LAYOUTS = {
    "controlnet": Layout(
        "a ControlNet",
        [*DROPPED, _MODEL, (r"^(control_model\.)?", "controlnet.")],
        {"controlnet": "controlnet"},
        {"controlnet": _LIKE},
        use="Name the model that it guides, and give it with its picture: `controls=[(FILE, PICTURE)]`.",
    )
}
CLASSES = ("ControlNetModel",)
ORIGINAL = r"^(control_model\.)?input_hint_block\.0\."


def recognise(keys: Shapes) -> str | None:
    return "controlnet" if keys.has(rf"{ORIGINAL}|^controlnet_cond_embedding\.") else None


def table(names: list[str], like: Config | None) -> list[Row]:
    return [*TABLE, *unet.table(names, None)]


def config(shapes: Shapes, like: Config) -> Config:
    """That the residuals are pooled, no shape shows: of the published ones, only those named shuffle do it."""
    hint = "controlnet_cond_embedding"
    return Config(
        **unet.half(shapes, like),
        hint_channels=shapes.size(f"{hint}.conv_in.weight", 1),
        hint=widths(shapes, hint),
        pooled="shuffle" in shapes.file.name,
    )


def widths(shapes: Shapes, hint: str) -> tuple[int, ...]:
    """Of the convolutions that read pixels."""
    blocks = range(1, shapes.count(f"{hint}.blocks"), 2)
    return tuple(shapes.size(f"{hint}.{name}.weight", 0) for name in ("conv_in", *(f"blocks.{i}" for i in blocks)))


def from_json(s: Settings, cls: str) -> Config:
    """From diffusers' config.json."""
    s.one("controlnet_conditioning_channel_order", "rgb", ["rgb"])
    return Config(
        **unet.half_from_json(s),
        hint_channels=s.whole("conditioning_channels", 3, most=3),
        hint=s.wholes("conditioning_embedding_out_channels", [16, 32, 96, 256]),
        pooled=s.flag("global_pool_conditions", False),
    )


def divided(config: Config) -> list[tuple[int, int, str]]:
    return unet.divided_half(config, [False] * len(config.depth))
