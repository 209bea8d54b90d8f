"""The LoRAs of a person's folder, for a list to choose from."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from .. import foreign
from ..description import Description
from ..errors import Error

if TYPE_CHECKING:
    from ..convert.lora_header import Look

MOST = 500  # files of the folder


def folder() -> Path | None:
    """Where names of LoRAs are looked up, if that is a folder."""
    named = os.environ.get("MLXDIFF_LORAS")
    path = foreign.path(named).absolute() if named else None
    return path if path is not None and path.is_dir() else None


def files(folder: Path) -> list[Path]:
    """The files of a folder and of the folders in it, by name."""
    return sorted(folder.rglob("*.safetensors"), key=lambda path: str(path).lower())[:MOST]


def look(paths: Iterable[Path], model: Description) -> "dict[Path, Look | Error]":
    """By the headers of files, what they would change in a model, or why they do not fit it."""
    from ..convert import lora_header

    return lora_header.look(paths, model)
