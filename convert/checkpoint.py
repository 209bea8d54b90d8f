"""What a source holds: `open` reads headers and config files, says what it is, and finds for every parameter of our
networks the tensor that fills it."""

import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from mlx.utils import tree_flatten

from .. import weights
from ..errors import Error
from . import clip, detect, rules, scheduler, unet, vae
from . import source as files
from .settings import Settings

# Classes of diffusers and transformers that we have; and what is in their folders that drawing does not need.
_CLASSES = {
    "UNet2DConditionModel": unet,
    "AutoencoderKL": vae,
    "CLIPTextModel": clip,
    "CLIPTextModelWithProjection": clip,
}
_BESIDE = ("scheduler", "tokenizer", "tokenizer_2", "feature_extractor", "safety_checker", "image_encoder")

PREDICTIONS = ("eps", "v", "x0")
_STATED = {"epsilon": "eps", "v": "v"}  # modelspec's words for what a file predicts
_COMPONENTS = {c for family in detect.FAMILIES.values() for c in family.components}
_FAMILIES = "Give a Stable Diffusion 1.x, 2.x or XL checkpoint."
FULL = "Use the full checkpoint, or the diffusers folder that holds every part."

Config = clip.Config | unet.Config | vae.Config


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


@dataclass(frozen=True)
class Checkpoint:
    """What a source holds, from headers and config files. Only one with nothing unmapped or missing is converted."""

    path: Path
    family: str  # of detect.FAMILIES
    layout: str  # "diffusers" or "single-file"
    components: dict[str, Component]
    stray: dict[str, str]  # like a component's unmapped: keys that belong to none
    schedule: dict
    zero_negative: bool
    tokenizers: dict[str, Path]
    stated: str | None  # the prediction, where the caller or the file says it

    @property
    def unmapped(self) -> dict[str, str]:
        return self.stray | {k: why for c in self.components.values() for k, why in c.unmapped.items()}

    @property
    def missing(self) -> list[str]:
        return [f"{name}.{key}" for name, c in self.components.items() for key in c.missing]

    @property
    def variant(self) -> str:
        """base, inpaint or lcm; edit, upscale and depth are recognised and cannot draw yet."""
        net = self.components["unet"].config if "unet" in self.components else None
        if net is None:
            return "base"
        return (
            "lcm" if net.time_cond is not None else detect.VARIANTS.get(net.in_channels, f"{net.in_channels}-channel")
        )

    @cached_property
    def prediction(self) -> str:
        """eps, v or x0. An SD 2.x file that does not say is told by one of its weights, which is read here."""
        if self.stated is not None:
            return self.stated
        guess = self.family == "sd2" and self.variant == "base"
        return detect.prediction_sd2(self.components["unet"].weights) if guess else "eps"


def open(source: str | Path, prediction: str | None = None) -> Checkpoint:
    """Say what a checkpoint is and where each of its tensors goes, from headers and config files alone.

    source: a .safetensors file, an index of shards, a folder in diffusers layout, or the folder of one component.
    prediction: "eps", "v" or "x0" where the checkpoint does not say, or to overrule it."""
    path = Path(source)
    if prediction not in (None, *PREDICTIONS):
        raise Error(f"{prediction!r} is not what a network predicts.", f"Use one of {', '.join(PREDICTIONS)}.")
    try:
        if (path / "model_index.json").is_file():
            return _folder(path, prediction)
        if (path / "model.json").is_file():
            raise Error(f"{path} is converted already.", "Use it as it is.")
        return _single(path, prediction)
    except OSError as e:  # a folder that may not be looked into, a link that leads nowhere
        raise Error(f"{path} cannot be read: {e.strerror}.", "Check the path, its links and its permissions.") from None


def _folder(path: Path, prediction: str | None) -> Checkpoint:
    index, components = Settings(path / "model_index.json"), {}
    networks = {
        name: entry[-1]
        for name, entry in index.values.items()
        if isinstance(entry, list) and entry[-1:] not in ([], [None]) and name not in _BESIDE
    }
    for name, cls in networks.items():
        if cls not in _CLASSES or name not in _COMPONENTS:
            raise Error(f"{path} is a {index.cls} whose {name} is a {cls}, which is not supported yet.", _FAMILIES)
    for name, cls in networks.items():
        if not (path / name).is_dir():
            raise Error(f"{path} lacks the folder {name}.", "Download the missing folder.")
        tensors = files.read(path / name).tensors
        components[name] = _configured(name, Settings(path / name / "config.json"), cls, list(tensors.items()))
    if "unet" not in components:
        raise Error(f"{path} has no unet.", FULL)
    net = components["unet"].config
    if net.added is not None:
        family = "sdxl" if "text_encoder" in components else "sdxl-refiner"
    else:
        family = "sd2" if net.linear_projection else "sd1"
    schedule, stated = scheduler.SINGLE, None
    if index.get("scheduler", None) is not None:
        schedule, stated = scheduler.from_json(Settings(path / "scheduler" / "scheduler_config.json"))
    return Checkpoint(
        path=path,
        family=family,
        layout="diffusers",
        components=components,
        stray={},
        schedule=schedule,
        zero_negative=index.flag("force_zeros_for_empty_prompt", net.added is not None),
        tokenizers={t: path / t for t in detect.FAMILIES[family].pads if (path / t).is_dir()},
        stated=stated if prediction is None else prediction,
    )


def _single(path: Path, prediction: str | None) -> Checkpoint:
    found = files.read(path)
    family = detect.family(path, found.tensors)
    row, parts, stray = detect.FAMILIES[family], {}, {}
    for key, tensor in found.tensors.items():
        for target in rules.rename(key, row.table):
            name, _, rest = target.partition(".")
            if name in row.components:
                parts.setdefault(name, []).append((rest, tensor))
            else:
                stray[key] = "no part of this family"
    components = {}
    for name in (c for c in row.components if c in parts):
        if len(parts) == 1 and path.is_dir() and (path / "config.json").is_file():  # which says more than shapes do
            settings = Settings(path / "config.json")
            components[name] = _configured(name, settings, settings.cls, parts[name])
        else:
            components[name] = _measured(name, family, parts[name])
    if "text_encoder_2" in components and "unet" in components:
        components["unet"] = _sized(components, row.sizes)
    zero_snr = "ztsnr" in found.tensors
    own = {"zero_snr": True, "spacing": "trailing"} if zero_snr else {}  # Lin et al. 2024: start at the very last step
    words = found.metadata.get("modelspec.prediction_type", found.metadata.get("modelspec.predict_key"))
    stated = "v" if "v_pred" in found.tensors else _STATED.get(words)
    return Checkpoint(
        path=path,
        family=family,
        layout="single-file" if detect.original(found.tensors) else "diffusers",
        components=components,
        stray=stray,
        schedule=scheduler.SINGLE | own,
        zero_negative=row.zero_negative,
        tokenizers={},
        stated=stated if prediction is None else prediction,
    )


def _configured(name: str, settings: Settings, cls: str, tensors: rules.Named) -> Component:
    """A network whose config.json says what it is."""
    if cls not in _CLASSES:
        raise Error(f"{settings.path} describes a {cls}, which is not supported yet.", _FAMILIES)
    module = _CLASSES[cls]
    config = module.from_json(settings, cls)
    table = module.table([n for n, _ in tensors])
    if module is clip and config.projection is None:
        table = clip.UNPROJECTED + table
    return _fill(name, config, tensors, table)


def _measured(name: str, family: str, tensors: rules.Named) -> Component:
    """A network whose Config is read off its shapes."""
    row, names = detect.FAMILIES[family], [n for n, _ in tensors]
    module = {"unet": unet, "vae": vae}.get(name, clip)
    table = module.table(names)
    if family == "sd2" and module is clip:
        table = clip.unread(names) + table
    if name == "text_encoder" and family != "clip":
        table = clip.UNPROJECTED + table
    shapes = rules.shapes(tensors, table)
    try:
        if module is unet:
            config = unet.config(shapes)
        elif module is vae:
            config = vae.config(shapes, row.scale)
        else:
            config = clip.config(shapes, row.acts.get(name), name == "text_encoder_2")
    except rules.Lacking as e:
        return Component(None, {}, {}, [str(e)])
    return _fill(name, config, tensors, table)


def _sized(components: dict[str, Component], sizes: int) -> Component:
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


def _fill(name: str, config: Config, tensors: rules.Named, table: list[rules.Row]) -> Component:
    for width, n, what in _divided(config):
        if width % n:
            raise Error(
                f"The {name} is {width} wide, which is no multiple of its {n} {what}.", "Use another checkpoint."
            )
    parameters = tree_flatten(weights.build(name, asdict(config)).parameters())
    return Component(config, *rules.fill(tensors, table, {k: tuple(v.shape) for k, v in parameters}))


def _divided(config: Config) -> list[tuple[int, int, str]]:
    """What no shape shows and no tensor contradicts: the numbers that widths are divided by."""
    if isinstance(config, clip.Config):
        return [(config.width, config.heads, "heads")]
    groups = [(c, config.groups, "norm groups") for c in config.channels]
    if isinstance(config, vae.Config):
        return groups
    attends = [bool(a or b) for a, b in zip(config.depth, reversed(config.up_depth), strict=True)]
    attends[-1] |= bool(config.mid_depth)
    return groups + [(c, h, "heads") for c, h, a in zip(config.channels, config.heads, attends, strict=True) if a]


def check(checkpoint: Checkpoint) -> None:
    """Raise unless every tensor has its place and every parameter its tensor."""
    unmapped, missing = checkpoint.unmapped, checkpoint.missing
    said = []
    if unmapped:
        key, why = next(iter(unmapped.items()))
        said.append(f"{len(unmapped)} of its tensors have no place (such as {key!r}: {why})")
    if missing:
        said.append(f"{len(missing)} parameters are missing (such as {missing[0]})")
    if said:
        raise Error(
            f"{checkpoint.path} is not a complete {checkpoint.family} checkpoint: {'; '.join(said)}.",
            "Use an unmodified checkpoint; `python -m mlxdiff.convert FILE --check` lists all that is wrong.",
        )
