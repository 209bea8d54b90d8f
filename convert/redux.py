"""FLUX.1 Redux: the embedder alone in a file, and in diffusers' folder. Both have the same names."""

from ..models.redux import Config
from .ip_adapter import USE
from .layout import Layout
from .rules import Row, Shapes
from .settings import Settings

LAYOUTS = {"redux": Layout("a FLUX Redux embedder", [(r"^", "redux.")], {"redux": "redux"}, use=USE)}
CLASSES = ("ReduxImageEncoder",)
ORIGINAL = r"(?!)"


def recognise(keys: Shapes) -> str | None:
    return "redux" if keys.has(r"^redux_(up|down)\.") else None


def table(names: list[str], like: Config | None) -> list[Row]:
    return []


def config(shapes: Shapes, like: Config | None) -> Config:
    return Config(
        image=shapes.size("redux_up.weight", 1),
        hidden=shapes.size("redux_up.weight", 0),
        context=shapes.size("redux_down.weight", 0),
    )


def from_json(s: Settings, cls: str) -> Config:
    """From diffusers' config.json, which is silent about the layer between."""
    context = s.whole("txt_in_features", 4096)
    return Config(image=s.whole("redux_dim", 1152), hidden=3 * context, context=context)


def divided(config: Config) -> list[tuple[int, int, str]]:
    return []
