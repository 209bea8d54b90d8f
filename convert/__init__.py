"""Public checkpoints to model folders. `open` says what a source is, from headers; `convert` writes its folder, and
`save` that of one already opened; `read` gives networks without writing a folder."""

from .checkpoint import PREDICTIONS, Checkpoint, Component, check, open
from .component import KNOWN
from .parts import beside
from .write import convert, describe, read, save

__all__ = [
    "KNOWN",
    "PREDICTIONS",
    "Checkpoint",
    "Component",
    "beside",
    "check",
    "convert",
    "describe",
    "open",
    "read",
    "save",
]
