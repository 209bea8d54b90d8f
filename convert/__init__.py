"""Public checkpoints to model folders. `open` says what a source is, from headers; `convert` writes the folder,
`read` does without one."""

from .checkpoint import PREDICTIONS, Checkpoint, Component, check, open
from .write import convert, read

__all__ = ["PREDICTIONS", "Checkpoint", "Component", "check", "convert", "open", "read"]
