"""What a source holds: `open` reads headers and config files, says what it is, and finds for every parameter of our
networks the tensor that fills it."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from .. import description
from ..errors import Error
from . import detect, flux, rules, scheduler, sd3
from . import source as files
from .component import CLASSES, Component, Config, by_itself, configured, measured, sized, tables
from .parts import with_parts
from .settings import Settings

# What is in folders of diffusers beside networks.
_TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
_BESIDE = ("scheduler", *_TOKENIZERS, "feature_extractor", "safety_checker", "image_encoder")

_NETS = ("unet", "transformer")  # what a whole model has one of

PREDICTIONS = ("eps", "v", "x0")
_STATED = {"epsilon": "eps", "v": "v"}  # modelspec's words for what a file predicts
_OPTIONAL = {c for family in detect.FAMILIES.values() for c in family.optional}
_COMPONENTS = {c for family in detect.FAMILIES.values() for c in family.components}
FULL = "Use the full checkpoint, or the diffusers folder that holds every part."


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
    called: str  # what it calls itself: a folder its pipeline, a file its architecture; "" where neither does

    @property
    def unmapped(self) -> dict[str, str]:
        return self.stray | {k: why for c in self.components.values() for k, why in c.unmapped.items()}

    @property
    def missing(self) -> list[str]:
        return [f"{name}.{key}" for name, c in self.components.items() for key in c.missing]

    @property
    def lacking(self) -> list[str]:
        """The networks of its family without which there is no picture."""
        row = detect.FAMILIES[self.family]
        return [c for c in row.components if c not in self.components and c not in row.optional]

    @property
    def part_of(self) -> Path | None:
        """The folder of a whole model that this one network lies in."""
        around = (self.path.absolute().parent, self.path.absolute().parent.parent) if len(self.components) == 1 else ()
        return next((p for p in around if (p / "model_index.json").is_file()), None)

    @property
    def variant(self) -> str:
        """base, schnell, kontext or lcm; others are recognised and cannot draw yet."""
        name = next((n for n in _NETS if n in self.components), None)
        net = None if name is None else self.components[name].config
        if net is None:
            return "base"
        if name == "transformer":
            return tables(self.family, name).variant(net, self.called)
        return (
            "lcm" if net.time_cond is not None else detect.VARIANTS.get(net.in_channels, f"{net.in_channels}-channel")
        )

    @cached_property
    def prediction(self) -> str:
        """eps, v, x0 or flow. An SD 2.x file that does not say is told by one of its weights, which is read here."""
        if self.stated is not None:
            return self.stated
        guess = self.family == "sd2" and self.variant == "base"
        own = detect.FAMILIES[self.family].prediction
        return detect.prediction_sd2(self.components["unet"].weights) if guess else own


def open(
    source: str | Path,
    prediction: str | None = None,
    parts: dict[str, str | Path] | None = None,
    t5: bool = True,
) -> Checkpoint:
    """Say what a checkpoint is and where each of its tensors goes, from headers and config files alone.

    source: a .safetensors file, an index of shards, a folder in diffusers layout, or the folder of one component.
    prediction: "eps", "v" or "x0" where the checkpoint does not say, or to overrule it. parts: files (or folders) of
    "vae", "clip", "clip_g" or "t5", to use these in place of the checkpoint's own. What a single file of SD3 or FLUX
    lacks and nobody gives is looked for beside it, and in text_encoders/ there, under the names people know:
    clip_l*.safetensors, clip_g*.safetensors, t5xxl*.safetensors, FLUX's ae.safetensors and sd3_vae.safetensors.
    t5: False leaves SD3's T5 out, whether the checkpoint has it or not."""
    path, parts = Path(source), {} if parts is None else parts
    if prediction not in (None, *PREDICTIONS):
        raise Error(f"{prediction!r} is not what a network predicts.", f"Use one of {', '.join(PREDICTIONS)}.")
    try:
        if (path / "model_index.json").is_file():
            found = _folder(path, prediction, t5)
        elif (path / "model.json").is_file():
            description.read(path)  # one that this version does not read says so
            raise Error(f"{path} is converted already.", "Use it as it is.")
        else:
            found = _single(path, prediction)
        row = detect.FAMILIES[found.family]
        if found.stated is not None and row.prediction == "flow":
            raise Error(f"{path} is of {found.family}, which predicts flow.", "Leave out --prediction.")
        if not t5 and row.t5 not in row.optional:
            raise Error(f"{path} is of {found.family}, which has no T5 to leave out.", "Leave out --no-t5.")
        left = set() if t5 else {row.t5}
        held = {name: c for name, c in found.components.items() if name not in left}
        return replace(found, components=with_parts(path, found.family, held, parts, left))
    except OSError as e:  # a folder that may not be looked into, a link that leads nowhere
        raise Error(f"{path} cannot be read: {e.strerror}.", "Check the path, its links and its permissions.") from None


def _folder(path: Path, prediction: str | None, t5: bool) -> Checkpoint:
    index, components, skipped = Settings(path / "model_index.json"), {}, _BESIDE if t5 else {*_BESIDE, *_OPTIONAL}
    networks = {
        name: entry[-1]
        for name, entry in index.values.items()
        if isinstance(entry, list) and entry[-1:] not in ([], [None]) and name not in skipped
    }
    for name, cls in networks.items():
        if cls not in CLASSES or name not in _COMPONENTS:
            raise Error(f"{path} is a {index.cls} whose {name} is a {cls}, which is not supported yet.", detect.KNOWN)
    for name, cls in networks.items():
        if not (path / name).is_dir():
            raise Error(f"{path} lacks the folder {name}.", "Download the missing folder.")
        tensors = files.read(path / name).tensors
        components[name] = configured(name, Settings(path / name / "config.json"), cls, list(tensors.items()))
    name = next((n for n in _NETS if n in components), None)
    if name is None:
        raise Error(f"{path} has no unet and no transformer.", FULL)
    net = components[name].config
    family = _family(net, "text_encoder" in components)
    schedule, stated = _schedule(family, net), None
    if index.get("scheduler", None) is not None:
        settings = Settings(path / "scheduler" / "scheduler_config.json")
        if name == "transformer":
            schedule = scheduler.flow_from_json(settings, schedule["ends"])
        else:
            schedule, stated = scheduler.from_json(settings)
    return Checkpoint(
        path=path,
        family=family,
        layout="diffusers",
        components=components,
        stray={},
        schedule=schedule,
        zero_negative=index.flag("force_zeros_for_empty_prompt", family.startswith("sdxl")),
        tokenizers={t: path / t for t in detect.FAMILIES[family].pads if (path / t).is_dir()},
        stated=stated if prediction is None else prediction,
        called=index.cls,
    )


def _family(net: Config, first: bool) -> str:
    """By the network of a folder, and by whether there is a first text encoder."""
    if isinstance(net, flux.Config):
        return "flux"
    if isinstance(net, sd3.Config):
        return "sd3"
    if net.added is not None:
        return "sdxl" if first else "sdxl-refiner"
    return "sd2" if net.linear_projection else "sd1"


def _schedule(family: str, net: Config | None) -> dict:
    """Of a checkpoint that brings none."""
    if detect.FAMILIES[family].prediction != "flow":
        return scheduler.SINGLE
    return scheduler.FLOW if net is None else tables(family, "transformer").schedule(net)


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
        only = len(parts) == 1
        components[name] = by_itself(name, family, path, parts[name]) if only else measured(name, family, parts[name])
    if "text_encoder_2" in components and "unet" in components:
        components["unet"] = sized(components, row.sizes)
    net = components["transformer"].config if "transformer" in components else None
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
        schedule=_schedule(family, net) | own,
        zero_negative=row.zero_negative,
        tokenizers={},
        stated=stated if prediction is None else prediction,
        called=found.metadata.get("modelspec.architecture", ""),
    )


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
            "Use an unmodified checkpoint; `mlxdiff inspect FILE` lists all that is wrong.",
        )
