"""Public checkpoints to model folders. `open` says what a source is, from headers; `convert` writes the folder, or
`save` that of what is open; `read` does without a folder."""

from .checkpoint import PREDICTIONS, Checkpoint, Component, check, open
from .parts import PARTS, beside
from .write import convert, describe, read, save

__all__ = [
    "PARTS",
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
