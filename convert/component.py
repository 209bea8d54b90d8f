"""One network of a checkpoint: its Config, from a config.json or from shapes, and the tensor that fills each of its
parameters."""

import math
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from mlx.utils import tree_flatten

from ..errors import Error
from ..families import FAMILIES
from ..models import build
from ..models.build import Config
from . import rules, source
from .layout import Layout
from .registry import CLASSES, MODULES
from .settings import Settings

KNOWN = f"Use a checkpoint of {', '.join(family.title for family in FAMILIES.values())}."
# Only one part of these is read, which shapes describe.
_WIDER = ("CLIPModel", "SiglipModel", "T5ForConditionalGeneration")
# Of a table, which has rows for each numbered block in some families: Python keeps 512 patterns compiled, and each row
# looks at each name. Those of published files have about 100 rows for 1,700 names.
_MOST_ROWS, _MOST_LOOKS = 500, 3_000_000


@dataclass(frozen=True)
class Component:
    """One network: its Config (None if the tensors that show it are missing), and what fills each of its parameters."""

    config: Config | None
    weights: dict[str, rules.Weight]
    unmapped: dict[str, str]  # key of the file -> why it has no place
    missing: list[str]  # parameters that nothing fills

    @property
    def parameters(self) -> int:
        return sum(math.prod(w.shape) for w in self.weights.values())


def configured(name: str, settings: Settings, cls: str, tensors: rules.Named, like: Config | None) -> Component:
    """A network that a config.json describes. like: the network as published, if that is known."""
    if cls not in CLASSES:
        raise Error(f"{settings.path} describes a {cls:.60}, which is not supported yet.", KNOWN)
    module = MODULES[CLASSES[cls]]
    config = module.from_json(settings, cls)
    if hasattr(module, "corrected"):
        config = module.corrected(config, rules.shapes(tensors, _table(module, tensors, config)))
    try:
        build.check_size(config, len(tensors))
    except Error as e:
        raise Error(f"{settings.path}: {e.problem}", e.fix) from None
    if hasattr(module, "kept"):
        config = module.kept(config, like)
    return _fill(name, module, config, tensors, _table(module, tensors, config), "Use another checkpoint.")


def _table(module: ModuleType, tensors: rules.Named, like: Config | None) -> list[rules.Row]:
    """The rows for the names of a file. Raises if it has so many blocks that reading the names would take minutes."""
    rows = module.table([n for n, _ in tensors], like)
    if len(rows) > _MOST_ROWS or len(rows) * len(tensors) > _MOST_LOOKS:
        problem = f"{tensors[0][1].file} holds {len(tensors):,} tensors of one network in more blocks than any model."
        raise Error(problem, "Use a sound copy of it.")
    return rows


def by_itself(name: str, layout: Layout, path: Path, tensors: rules.Named) -> Component:
    """A network that `path` holds alone. If it has a config.json of a known kind, that says more than shapes do."""
    module = MODULES[layout.networks[name]]
    beside = source.settings(path) if module.CLASSES else None
    settings = None if beside is None else Settings(beside)
    if settings is not None and settings.cls == "CLIPModel" and hasattr(module, "of_whole"):
        # A model that reads it without its projection is as published.
        settings = None if name in layout.published else module.of_whole(settings)
    if settings is None or settings.cls in _WIDER:
        return measured(name, layout, tensors)
    return configured(name, settings, settings.cls, tensors, layout.published.get(name))


def measured(name: str, layout: Layout, tensors: rules.Named) -> Component:
    """A network whose shapes give its Config."""
    module, like = MODULES[layout.networks[name]], layout.published.get(name)
    table = _table(module, tensors, like)
    try:
        config = module.config(rules.shapes(tensors, table), like)
    except rules.Lacking as e:
        return Component(None, {}, {}, [str(e)])
    fix = "No shape shows their number: if it has others, give the diffusers folder whose config.json says so."
    return _fill(name, module, config, tensors, table, fix)


def _fill(
    name: str, module: ModuleType, config: Config, tensors: rules.Named, table: list[rules.Row], fix: str
) -> Component:
    for width, n, what in module.divided(config):
        if width % n:
            where = f"{tensors[0][1].file}: the {name}" if tensors else f"The {name}"
            raise Error(f"{where} is {width} wide, which is no multiple of its {n} {what}.", fix)
    parameters = tree_flatten(build.build(config).parameters())
    return Component(config, *rules.fill(tensors, table, {k: tuple(v.shape) for k, v in parameters}))
