"""ControlNets for several kinds of pictures (Xinsir's union for SDXL), in diffusers' names. Shapes alone say its
Config: what class its published config.json names is not certain."""

from dataclasses import fields

from ..models import controlnet as plain
from ..models.controlnet import UnionConfig
from . import controlnet
from .layout import Layout
from .rules import Lacking, Row, Shapes
from .settings import Settings

_LIKE = controlnet.LAYOUTS["controlnet"].published["controlnet"]
LAYOUTS = {
    "union": Layout(
        "a union ControlNet",
        [(r"^", "union.")],
        {"union": "union"},
        {"union": UnionConfig(**vars(_LIKE), tasks=6, mixers=1)},
        use=controlnet.LAYOUTS["controlnet"].use,
    )
}
CLASSES = ()
ORIGINAL = r"^$"


def recognise(keys: Shapes) -> str | None:
    return "union" if "task_embedding" in keys else None


def table(names: list[str], like: UnionConfig | None) -> list[Row]:
    return []


def config(shapes: Shapes, like: UnionConfig) -> UnionConfig:
    tasks, mixers = shapes.size("task_embedding", 0), shapes.count("transformer_layes")
    if tasks > len(plain.MODES):  # kinds that have no name here
        raise Lacking("task_embedding")
    values = {f.name: getattr(controlnet.config(shapes, like), f.name) for f in fields(plain.Config)}
    width, rest = divmod(shapes.size("control_add_embedding.linear_1.weight", 1), tasks)
    if rest:
        raise Lacking("control_add_embedding.linear_1.weight")
    return UnionConfig(**values | {"added_time": width}, tasks=tasks, mixers=mixers)


def from_json(s: Settings, cls: str) -> UnionConfig:
    """Of no class: see above."""
    s.refuse("_class_name", cls)


def divided(config: UnionConfig) -> list[tuple[int, int, str]]:
    return controlnet.divided(config)
