"""What LoRA files are for a model, by their headers alone: none of their numbers is read."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .. import description
from ..description import Description
from ..errors import Error
from ..families import MODELS
from ..recipe import Recipe
from . import source
from .lora import NoPlace, _Place, _places, _split, _words

_LORA = "Use a LoRA that was made for this family of models."


@dataclass(frozen=True)
class Look:
    """Of a file that fits the model, as far as its header says."""

    layers: dict[str, int]  # component -> how many of its layers the file changes
    ranks: tuple[int, ...]
    words: tuple[str, ...]  # that it was trained on

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {n}" for name, n in self.layers.items())
        n, ranks = sum(self.layers.values()), " to ".join(str(r) for r in sorted({*self.ranks[:1], *self.ranks[-1:]}))
        return f"{n} of {n} layer{'s' * (n != 1)} ({parts})" + (f", rank {ranks}" if ranks else "")


def look(paths: Iterable[Path], model: Description) -> dict[Path, Look | Error]:
    """For each file what it is, or why it does not fit."""
    places, found = _places(model), {}
    for path in paths:
        try:
            found[path] = _look(path, model, places)
        except Error as e:
            found[path] = e
    return found


def _look(path: Path, model: Description, places: dict[str, _Place]) -> Look:
    file, layers, ranks = source.read(path), {}, set()
    strange = [key for key in file.tensors if _split(key)[0] not in places]
    if strange or not file.tensors:
        raise NoPlace(f"{len(strange)} of its {len(file.tensors)} tensors have no place in {model.name}.", _hint(file))
    for key, tensor in file.tensors.items():
        name, kind = _split(key)
        layers.setdefault(places[name].component, set()).add(name)
        if kind in ("down", "up") and len(tensor.shape) >= 2:
            ranks |= {tensor.shape[0]} if kind == "down" else set()
            for rows in places[name].weight:
                wanted = rows.shape[-1] if kind == "down" else rows.shape[0] * rows.parts
                if tensor.shape[kind == "down"] != wanted:
                    raise Error(f"Its layers have other shapes than those of {model.name}.", _LORA)
    counts = {component: len(names) for component, names in layers.items()}
    return Look(counts, tuple(sorted(ranks)), tuple(_words(path)))


def _hint(file: source.Weights) -> str:
    """The family in which most of a file's tensors have a place."""
    keys = {_split(key)[0] for key in file.tensors}
    one = {row.family.title: name for name, row in MODELS.items()}
    fits = {title: len(keys & _names(name)) for title, name in one.items()}
    best = max(fits, key=fits.get)
    return f"It seems to be made for {best}." if fits[best] > len(keys) / 2 else _LORA


@cache
def _names(model: str) -> frozenset[str]:
    """Every spelling of the layers of a named model."""
    return frozenset(_places(description.published(model, Recipe("float32", None))))
