"""One network of a checkpoint: its Config, told by a config.json or read off its shapes, and the tensor that fills each
of its parameters."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from mlx.utils import tree_flatten

from ..errors import Error
from ..models import build
from ..models.build import Config
from . import clip, detect, flux, rules, sd3, source, t5, taesd, unet, vae
from .settings import Settings

# Classes of diffusers and transformers that we have.
CLASSES = {
    "UNet2DConditionModel": unet,
    "AutoencoderKL": vae,
    "CLIPTextModel": clip,
    "CLIPTextModelWithProjection": clip,
    "FluxTransformer2DModel": flux,
    "SD3Transformer2DModel": sd3,
    "T5EncoderModel": t5,
}
_ALONE = CLASSES | {"AutoencoderTiny": taesd}  # and what is no part of a model: a preview's decoder
_WIDER = ("CLIPModel", "T5ForConditionalGeneration")  # of which the text encoder alone is read: its shapes tell it


@dataclass(frozen=True)
class Component:
    """One network: its Config (None where too much is missing to tell), and what fills each of its parameters."""

    config: Config | None
    weights: dict[str, rules.Weight]
    unmapped: dict[str, str]  # key of the file -> why it has no place
    missing: list[str]  # parameters that nothing fills

    @property
    def parameters(self) -> int:
        return sum(math.prod(w.shape) for w in self.weights.values())


def tables(family: str, name: str):
    """Whose tables and settings a component has."""
    if name == detect.FAMILIES[family].t5:
        return t5
    nets = {"unet": unet, "vae": vae, "taesd": taesd, "transformer": {"flux": flux, "sd3": sd3}.get(family)}
    return nets.get(name, clip)


def configured(name: str, settings: Settings, cls: str, tensors: rules.Named) -> Component:
    """A network whose config.json says what it is."""
    if cls not in _ALONE:
        raise Error(f"{settings.path} describes a {cls}, which is not supported yet.", detect.KNOWN)
    module = _ALONE[cls]
    config = module.from_json(settings, cls)
    table = module.table([n for n, _ in tensors])
    if module is clip and config.projection is None:
        table = clip.UNPROJECTED + table
    return _fill(name, config, tensors, table, "Use another checkpoint.")


def by_itself(name: str, family: str, path: Path, tensors: rules.Named) -> Component:
    """A network that `path` holds and nothing else: its config.json, where it has one, says more than shapes do."""
    beside = source.settings(path)
    settings = None if beside is None else Settings(beside)
    if settings is None or settings.cls in _WIDER:
        return measured(name, family, tensors)
    return configured(name, settings, settings.cls, tensors)


def measured(name: str, family: str, tensors: rules.Named) -> Component:
    """A network whose Config is read off its shapes."""
    row, names = detect.FAMILIES[family], [n for n, _ in tensors]
    module = tables(family, name)
    table = module.table(names)
    if family == "sd2" and module is clip:
        table = clip.unread(names) + table
    if name == "text_encoder" and module is clip and not row.pooled:
        table = clip.UNPROJECTED + table
    shapes = rules.shapes(tensors, table)
    try:
        if module is vae:
            config = vae.config(shapes, row.scale, row.shift)
        elif module is clip:
            config = clip.config(shapes, row.acts.get(name), name == "text_encoder_2")
            if config.positions > clip.POSITIONS:
                long = f"{tensors[0][1].file} has a Long-CLIP of {config.positions} positions, which is not read."
                raise Error(long, f"Use the plain one, of {clip.POSITIONS} positions.")
        else:
            config = module.config(shapes)
    except rules.Lacking as e:
        return Component(None, {}, {}, [str(e)])
    fix = "No shape tells their number: if it has others, give the diffusers folder whose config.json says so."
    return _fill(name, config, tensors, table, fix)


def sized(components: dict[str, Component], sizes: int) -> Component:
    """The U-Net, with the width of its size numbers now that a text encoder tells what share the text has."""
    net, text = components["unet"], components["text_encoder_2"]
    if net.config is None or net.config.added is None or text.config is None:
        return net
    width, rest = divmod(net.config.added - text.config.projection, sizes)
    if rest or width < 1:
        raise Error(
            f"The unet is told {net.config.added} numbers, which are no text vector of {text.config.projection} and "
            f"{sizes} sizes.",
            "Use a checkpoint whose networks belong together.",
        )
    return replace(net, config=replace(net.config, added_time=width))


def _fill(name: str, config: Config, tensors: rules.Named, table: list[rules.Row], fix: str) -> Component:
    for width, n, what in _divided(config):
        if width % n:
            where = f"{tensors[0][1].file}: the {name}" if tensors else f"The {name}"
            raise Error(f"{where} is {width} wide, which is no multiple of its {n} {what}.", fix)
    parameters = tree_flatten(build.build(config).parameters())
    return Component(config, *rules.fill(tensors, table, {k: tuple(v.shape) for k, v in parameters}))


def _divided(config: Config) -> list[tuple[int, int, str]]:
    """What no shape shows and no tensor contradicts: the numbers that widths are divided by."""
    if isinstance(config, clip.Config):
        return [(config.width, config.heads, "heads")]
    if isinstance(config, flux.Config):
        return [(config.width, config.heads, "heads")]
    if isinstance(config, sd3.Config | t5.Config | taesd.Config):
        return []
    groups = [(c, config.groups, "norm groups") for c in config.channels]
    if isinstance(config, vae.Config):
        return groups
    attends = [bool(a or b) for a, b in zip(config.depth, reversed(config.up_depth), strict=True)]
    attends[-1] |= bool(config.mid_depth)
    return groups + [(c, h, "heads") for c, h, a in zip(config.channels, config.heads, attends, strict=True) if a]
