"""What a source holds: `open` reads headers and config files, says what it is, and finds for every parameter of our
networks the tensor that fills it."""

import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from mlx.utils import tree_flatten

from .. import weights
from ..errors import Error
from . import clip, detect, flux, rules, scheduler, sd3, t5, taesd, unet, vae
from . import source as files
from .settings import Settings

# Classes of diffusers and transformers that we have; and what is in their folders that drawing does not need.
_CLASSES = {
    "UNet2DConditionModel": unet,
    "AutoencoderKL": vae,
    "CLIPTextModel": clip,
    "CLIPTextModelWithProjection": clip,
    "FluxTransformer2DModel": flux,
    "SD3Transformer2DModel": sd3,
    "T5EncoderModel": t5,
}
_ALONE = _CLASSES | {"AutoencoderTiny": taesd}  # and what is no part of a model: a preview's decoder
_TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
_BESIDE = ("scheduler", *_TOKENIZERS, "feature_extractor", "safety_checker", "image_encoder")

_NETS = ("unet", "transformer")  # what a whole model has one of

PREDICTIONS = ("eps", "v", "x0")
_STATED = {"epsilon": "eps", "v": "v"}  # modelspec's words for what a file predicts
_COMPONENTS = {c for family in detect.FAMILIES.values() for c in family.components}
FULL = "Use the full checkpoint, or the diffusers folder that holds every part."

# A network alone in a file, by the short name it is given under: the families it can be told for, and what it is.
PARTS = {
    "vae": (("vae",), "a VAE"),
    "clip": (("clip", "clip-g"), "a CLIP text encoder"),
    "clip_g": (("clip-g",), "a CLIP text encoder with projection"),
    "t5": (("t5",), "a T5 text encoder"),
}

Config = clip.Config | flux.Config | sd3.Config | t5.Config | taesd.Config | unet.Config | vae.Config


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
        """base, schnell, inpaint or lcm; others are recognised and cannot draw yet."""
        name = next((n for n in _NETS if n in self.components), None)
        net = None if name is None else self.components[name].config
        if net is None:
            return "base"
        if name == "transformer":
            return _module(self.family, name).variant(net)
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


def open(source: str | Path, prediction: str | None = None, parts: dict[str, str | Path] | None = None) -> Checkpoint:
    """Say what a checkpoint is and where each of its tensors goes, from headers and config files alone.

    source: a .safetensors file, an index of shards, a folder in diffusers layout, or the folder of one component.
    prediction: "eps", "v" or "x0" where the checkpoint does not say, or to overrule it. parts: files (or folders) of
    "vae", "clip", "clip_g" or "t5", to use these in place of the checkpoint's own. What a single file of SD3 or FLUX
    lacks and nobody gives is looked for beside it, and in text_encoders/ there, under the names people know:
    clip_l*.safetensors, clip_g*.safetensors, t5xxl*.safetensors, FLUX's ae.safetensors and sd3_vae.safetensors."""
    path, parts = Path(source), {} if parts is None else parts
    if prediction not in (None, *PREDICTIONS):
        raise Error(f"{prediction!r} is not what a network predicts.", f"Use one of {', '.join(PREDICTIONS)}.")
    try:
        if (path / "model_index.json").is_file():
            return _with_parts(_folder(path, prediction), parts)
        if (path / "model.json").is_file():
            raise Error(f"{path} is converted already.", "Use it as it is.")
        return _with_parts(_single(path, prediction), parts)
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
            raise Error(f"{path} is a {index.cls} whose {name} is a {cls}, which is not supported yet.", detect.KNOWN)
    for name, cls in networks.items():
        if not (path / name).is_dir():
            raise Error(f"{path} lacks the folder {name}.", "Download the missing folder.")
        tensors = files.read(path / name).tensors
        components[name] = _configured(name, Settings(path / name / "config.json"), cls, list(tensors.items()))
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


def _module(family: str, name: str):
    """Whose tables and settings a component has."""
    if name == detect.FAMILIES[family].t5:
        return t5
    nets = {"unet": unet, "vae": vae, "taesd": taesd, "transformer": {"flux": flux, "sd3": sd3}.get(family)}
    return nets.get(name, clip)


def _schedule(family: str, net: Config | None) -> dict:
    """Of a checkpoint that brings none."""
    if detect.FAMILIES[family].prediction != "flow":
        return scheduler.SINGLE
    return scheduler.FLOW if net is None else _module(family, "transformer").schedule(net)


def _with_parts(checkpoint: Checkpoint, given: dict[str, str | Path]) -> Checkpoint:
    """The checkpoint with the networks that are given, and those that lie beside it, where it has none of its own."""
    row, path = detect.FAMILIES[checkpoint.family], checkpoint.path
    if checkpoint.stated is not None and row.prediction == "flow":
        raise Error(f"{path} is of {checkpoint.family}, which predicts flow.", "Leave out --prediction.")
    for kind in given:
        if kind not in row.parts:
            takes = ", ".join(f"--{k.replace('_', '-')}" for k in row.parts) or "none"
            raise Error(
                f"{path} is of {checkpoint.family}, which takes no --{kind.replace('_', '-')}.", f"It takes {takes}."
            )
    parts = {kind: Path(file) for kind, file in given.items()}
    if path.is_file() and "transformer" in checkpoint.components:
        for kind, part in row.parts.items():
            if kind not in parts and part.component not in checkpoint.components:
                found = [f for d in (path.parent, path.parent / "text_encoders") for f in sorted(d.glob(part.beside))]
                if found:
                    parts[kind] = found[0]
    added = {row.parts[kind].component: _part(checkpoint.family, kind, file) for kind, file in parts.items()}
    held = checkpoint.components | added
    return replace(checkpoint, components={c: held[c] for c in (*row.components, *held) if c in held})


def _part(family: str, kind: str, path: Path) -> Component:
    """A network in a file, or a folder, of its own."""
    tensors = files.read(path).tensors
    alone, (kinds, what) = detect.family(path, tensors), PARTS[kind]
    if alone not in kinds:
        holds = next((w for k, w in PARTS.values() if alone in k), f"{alone} weights")
        raise Error(f"{path} holds {holds}, not {what}.", f"Give --{kind.replace('_', '-')} the file of {what}.")
    named = [
        (to.partition(".")[2], x)
        for key, x in tensors.items()
        for to in rules.rename(key, detect.FAMILIES[alone].table)
    ]
    name = detect.FAMILIES[family].parts[kind].component
    if path.is_dir() and (path / "config.json").is_file():
        settings = Settings(path / "config.json")
        return _configured(name, settings, settings.cls, named)
    return _measured(name, family, named)


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
    )


def _configured(name: str, settings: Settings, cls: str, tensors: rules.Named) -> Component:
    """A network whose config.json says what it is."""
    if cls not in _ALONE:
        raise Error(f"{settings.path} describes a {cls}, which is not supported yet.", detect.KNOWN)
    module = _ALONE[cls]
    config = module.from_json(settings, cls)
    table = module.table([n for n, _ in tensors])
    if module is clip and config.projection is None:
        table = clip.UNPROJECTED + table
    return _fill(name, config, tensors, table)


def _measured(name: str, family: str, tensors: rules.Named) -> Component:
    """A network whose Config is read off its shapes."""
    row, names = detect.FAMILIES[family], [n for n, _ in tensors]
    module = _module(family, name)
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
        else:
            config = module.config(shapes)
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
