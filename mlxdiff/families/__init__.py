"""The families of models, and the named models. A family's file holds everything that is true of this family alone."""

from . import flux, flux2, sd, sd3, sdxl, zimage
from .base import PARTS, QUICK, Beside, Config, Defaults, Family, Fast, Lora, Model, Word

_FILES = (sd, sdxl, sd3, flux, flux2, zimage)  # a new family's file goes here

FAMILIES: dict[str, Family] = {family.name: family for file in _FILES for family in file.FAMILIES}
MODELS: dict[str, Model] = {name: model for file in _FILES for name, model in file.MODELS.items()}
# (family, name) -> a network that guides its models
ADAPTERS: dict[tuple[str, str], Beside] = {
    k: row for file in _FILES for k, row in getattr(file, "ADAPTERS", {}).items()
}
DEFAULT = "storybook"

__all__ = [
    "ADAPTERS",
    "DEFAULT",
    "FAMILIES",
    "MODELS",
    "PARTS",
    "QUICK",
    "Beside",
    "Defaults",
    "Family",
    "Fast",
    "Lora",
    "Model",
    "Word",
    "find",
    "fitting",
    "name_of",
]


def fitting(family: Family, net: Config, role: str | None = None) -> dict[str, Beside]:
    """The networks with names that fit a family's denoiser. role: those with this one alone, "control", "reference",
    "lora" or "word"."""
    rows = ((called, row) for (of, called), row in ADAPTERS.items() if of == family.name and role in (None, row.role))
    return {called: row for called, row in rows if row.fits(net)}


def name_of(model: str) -> str | None:
    """The name of a named model, given its name or its hub id."""
    return next((n for n, m in MODELS.items() if model in (n, m.repo)), None)


def find(model: str) -> Model | None:
    """A named model, given its name or its hub id."""
    name = name_of(model)
    return None if name is None else MODELS[name]
