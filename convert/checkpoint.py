"""What a source holds: `open` reads headers and config files, says what it is, and maps each parameter of our networks
to the tensor that fills it."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from .. import description
from ..errors import Error
from ..families import FAMILIES, Family
from ..families.base import tokenizer_of
from . import detect, rules, scheduler
from . import source as files
from .component import KNOWN, Component, by_itself, configured, measured
from .layout import Layout
from .parts import with_parts
from .registry import CLASSES, LAYOUTS, MODULES
from .settings import Settings
from .unet import sized, sizes

# What is in folders of diffusers beside networks that are read.
_TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
_UNREAD = ("Mistral3ForConditionalGeneration",)  # FLUX.2 dev converts without it, and does not draw
_BESIDE = ("scheduler", *_TOKENIZERS, "feature_extractor", "safety_checker", "image_encoder")

PREDICTIONS = tuple(p for p in description.PREDICTIONS if p != "flow")  # those that a caller may say
_STATED = {"epsilon": "eps", "v": "v"}  # modelspec's words for what a network predicts
_OPTIONAL = {family.text.t5 for family in FAMILIES.values() if family.text.t5_optional}
FULL = "Use the full checkpoint, or the diffusers folder that holds every part."


@dataclass(frozen=True)
class Checkpoint:
    """What a source holds, from headers and config files. It converts only if nothing is unmapped or missing."""

    path: Path
    family: str  # a key of LAYOUTS; of a network alone in a file, that is no family
    names: str  # whose names its tensors have: "diffusers", or "single-file" for the original authors'
    components: dict[str, Component]
    stray: dict[str, str]  # like a component's unmapped: keys that belong to none
    schedule: dict
    zero_negative: bool
    tokenizers: dict[str, Path]
    stated: str | None  # the prediction, if the caller or the file says it
    # What it calls itself: a folder its pipeline, and whether that is distilled; a file its architecture and its name.
    called: str

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.family]

    @property
    def unmapped(self) -> dict[str, str]:
        return self.stray | {k: why for c in self.components.values() for k, why in c.unmapped.items()}

    @property
    def missing(self) -> list[str]:
        return [f"{name}.{key}" for name, c in self.components.items() for key in c.missing]

    @property
    def lacking(self) -> list[str]:
        """The absent networks without which there is no picture."""
        return [c for c in self.layout.required if c not in self.components]

    @property
    def part_of(self) -> Path | None:
        """The folder of a whole model that this one network lies in."""
        around = (self.path.absolute().parent, self.path.absolute().parent.parent) if len(self.components) == 1 else ()
        return next((p for p in around if (p / "model_index.json").is_file()), None)

    @property
    def variant(self) -> str:
        """One of the family's variants, or, if it has none of so many input channels, their number."""
        return _variant(self.layout.family, self.components, self.called, self.schedule)

    @cached_property
    def prediction(self) -> str | None:
        """eps, v, x0 or flow. If an SD 2.x file does not say, one of its weights does, which is read here."""
        if self.stated is not None or self.layout.family is None:
            return self.stated
        if self.family == "sd2" and self.variant == "base":
            return detect.prediction_sd2(self.components["unet"].weights)
        return self.layout.family.prediction


def _variant(family: Family | None, components: dict[str, Component], called: str, schedule: dict | None) -> str:
    denoiser = None if family is None else components.get(family.denoiser)
    if denoiser is None or denoiser.config is None:
        return "base"
    config = denoiser.config
    extra = config.in_channels - config.out_channels
    if extra == 0:
        return MODULES[family.network].variant(config, called, schedule)
    return next((n for n, v in family.variants.items() if v.beside == extra), f"{config.in_channels}-channel")


def _schedule(family: Family | None, variant: str) -> dict:
    """The schedule of a checkpoint that brings none."""
    if family is None:
        return {}
    row = family.variants.get(variant)
    return family.schedule if row is None or row.schedule is None else row.schedule


def open(
    source: str | Path,
    prediction: str | None = None,
    parts: dict[str, str | Path] | None = None,
    t5: bool = True,
    layout: str | None = None,
) -> Checkpoint:
    """Say what a checkpoint is and where each of its tensors goes, from headers and config files alone.

    source: a .safetensors or .gguf file, an index of shards, a folder in diffusers layout, or the folder of one
    component. prediction: "eps", "v" or "x0", if the checkpoint does not say it or is wrong. parts: files (or folders)
    of what `families.PARTS` names, which are used instead of the checkpoint's. Parts that a denoiser's file lacks and
    nobody gives are looked for beside it, and in text_encoders/ there, under their usual names: clip_l*.safetensors,
    clip_g*.safetensors, t5xxl*.safetensors, qwen_3_4b*.safetensors, and the name of the family's VAE, or the same with
    .gguf.
    t5: False leaves SD3's T5 out, whether the checkpoint has it or not. layout: a key of LAYOUTS, to read a file as
    that: of a whole CLIP the text encoder is read, unless it is read as a vision model."""
    path, parts = Path(source), {} if parts is None else parts
    if prediction not in (None, *PREDICTIONS):
        raise Error(f"{prediction!r} is not what a network predicts.", f"Use one of {', '.join(PREDICTIONS)}.")
    try:
        if (path / "model_index.json").is_file():
            checkpoint = _folder(path, prediction, t5)
        elif (path / "model.json").is_file():
            description.read(path)  # raises if this version does not read it
            raise Error(f"{path} is converted already.", "Use it as it is.")
        else:
            checkpoint = _single(path, prediction, layout)
        family = checkpoint.layout.family
        if checkpoint.stated is not None and family is not None and family.flow:
            raise Error(f"{path} is of {checkpoint.family}, which predicts flow.", "Leave out `prediction`.")
        if not t5 and (family is None or not family.text.t5_optional):
            raise Error(f"{path} is of {checkpoint.family}, which has no T5 to leave out.", "Leave out `t5=False`.")
        left_out = set() if t5 else {family.text.t5}
        held = {name: c for name, c in checkpoint.components.items() if name not in left_out}
        whole = with_parts(path, checkpoint.layout, held, parts, left_out)
        return replace(checkpoint, components=_sized(family, whole))
    except OSError as e:  # a folder that may not be looked into, a link that leads nowhere
        raise Error(f"{path} cannot be read: {e.strerror}.", "Check the path, its links and its permissions.") from None


def _folder(path: Path, prediction: str | None, t5: bool) -> Checkpoint:
    index, components, skipped = Settings(path / "model_index.json"), {}, _BESIDE if t5 else {*_BESIDE, *_OPTIONAL}
    networks = {
        name: str(entry[-1])
        for name, entry in index.values.items()
        if isinstance(entry, list) and entry[-1:] not in ([], [None], *([c] for c in _UNREAD)) and name not in skipped
    }
    denoiser = next((n for n in ("unet", "transformer") if n in networks), None)
    if denoiser is None:
        raise Error(f"{path} has no unet and no transformer.", FULL)
    module = MODULES.get(CLASSES.get(networks[denoiser]))
    layouts = [] if module is None else [*module.LAYOUTS.values()]
    known = {pair for layout in layouts for pair in layout.networks.items()}
    for name in (denoiser, *networks):
        if (name, CLASSES.get(networks[name])) not in known:
            what = f"{path} is a {index.cls} whose {name} is a {networks[name]}"
            raise Error(f"{what}, which is not supported yet.", KNOWN)
    published = layouts[0].published  # all layouts of a denoiser read the same layers of an encoder
    for name, cls in networks.items():
        if not (path / name).is_dir():
            raise Error(f"{path} lacks the folder {name}.", "Download the missing folder.")
        tensors = files.read(path / name).tensors
        settings = Settings(path / name / "config.json")
        components[name] = configured(name, settings, cls, list(tensors.items()), published.get(name))
    key = module.layout(components[denoiser].config, components)
    layout, stated = LAYOUTS[key], None
    family = layout.family
    called = f"{index.cls} is_distilled" if index.flag("is_distilled", False) else index.cls
    schedule = _schedule(family, _variant(family, components, called, None))
    if index.get("scheduler", None) is not None:
        settings = Settings(path / "scheduler" / "scheduler_config.json")
        if family.flow:
            schedule = scheduler.flow_from_json(settings, schedule)
        else:
            schedule, stated = scheduler.from_json(settings)
    tokenizers = {t: path / t for t in map(tokenizer_of, layout.encoders) if (path / t).is_dir()}
    return Checkpoint(
        path=path,
        family=key,
        names="diffusers",
        components=components,
        stray={},
        schedule=schedule,
        zero_negative=index.flag("force_zeros_for_empty_prompt", family.text.sizes),  # by default in SDXL's pipelines
        tokenizers=tokenizers,
        stated=stated if prediction is None else prediction,
        called=called,
    )


def _single(path: Path, prediction: str | None, layout: str | None) -> Checkpoint:
    file = files.read(path)
    key, original = detect.layout(path, file.tensors) if layout is None else (layout, False)
    layout, networks, stray = LAYOUTS[key], {}, {}
    for name, tensor in file.tensors.items():
        for target in rules.rename(name, layout.table):
            component, _, rest = target.partition(".")
            if component in layout.networks:
                networks.setdefault(component, []).append((rest, tensor))
            else:
                stray[name] = "no part of this family"
    if not networks:
        raise Error(f"{path} holds no tensor of {layout.title}.", "Download it again.")
    if len(networks) == 1:
        components = {name: by_itself(name, layout, path, tensors) for name, tensors in networks.items()}
    else:
        components = {name: measured(name, layout, networks[name]) for name in layout.networks if name in networks}
    called = " ".join((file.metadata.get("modelspec.architecture", ""), path.stem)).strip()
    schedule = _schedule(layout.family, _variant(layout.family, components, called, None))
    if "ztsnr" in file.tensors:  # Lin et al. 2024: start at the very last step
        schedule = schedule | {"zero_snr": True, "spacing": "trailing"}
    words = file.metadata.get("modelspec.prediction_type", file.metadata.get("modelspec.predict_key"))
    stated = "v" if "v_pred" in file.tensors else _STATED.get(words)
    return Checkpoint(
        path=path,
        family=key,
        names="single-file" if original else "diffusers",
        components=components,
        stray=stray,
        schedule=schedule,
        zero_negative=layout.family is not None and layout.family.zero_negative,
        tokenizers={},
        stated=stated if prediction is None else prediction,
        called=called,
    )


def _sized(family: Family | None, components: dict[str, Component]) -> dict[str, Component]:
    """With what the U-Net of SDXL and its text encoder show together, if both are there."""
    unet, text = (components.get(name) for name in ("unet", "text_encoder_2"))
    if unet is None or text is None or None in (unet.config, text.config) or unet.config.added is None:
        return components
    return components | {"unet": replace(unet, config=sized(unet.config, text.config, sizes(family)))}


def check(checkpoint: Checkpoint) -> None:
    """Raise unless every tensor has a place and every parameter a tensor."""
    unmapped, missing, wrong = checkpoint.unmapped, checkpoint.missing, []
    if unmapped:
        key, why = next(iter(unmapped.items()))
        have = "has" if len(unmapped) == 1 else "have"
        wrong.append(f"{len(unmapped)} of its tensors {have} no place (such as {key!r}: {why})")
    if missing:
        are = "parameter is" if len(missing) == 1 else "parameters are"
        wrong.append(f"{len(missing)} {are} missing (such as {missing[0]})")
    if wrong:
        raise Error(
            f"{checkpoint.path} is not a complete {checkpoint.family} checkpoint: {'; '.join(wrong)}.",
            "Use an unmodified checkpoint; `mlxdiff inspect FILE` lists everything that is wrong.",
        )
