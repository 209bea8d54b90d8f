"""Request: every setting of a picture. None stands for the model's default. `resolve` fills the defaults in and checks
every value; after that, nothing that a run needs is None."""

import inspect
import json
import math
import reprlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypedDict, TypeVar

from PIL.Image import Image

from . import arguments, dialects, samplers, schedules, values
from .errors import Error, did_you_mean
from .foreign import fits
from .guides import MAX_SCALE, Guide, Picture, guides
from .noise import SOURCES

MAX_SEED = 2**63 - 1  # the most that signed 64-bit file formats and other tools can hold
MAX_EDGE = 16384
MAX_BLUR = 256
MAX_HIRES = 8  # times
REUSABLE = 8  # steps, at least, for `reuse`
STRENGTH = 0.6
OUTPAINT = 0.8  # the strength beside what `outpaint` adds, which begins as the stretched edge of the picture
ALPHA = "alpha"  # as a mask: what is transparent in the start image

Guides = tuple[Guide, ...] | list[Guide | Picture | tuple]
Call = TypeVar("Call", bound=Callable)


@dataclass(frozen=True)
class Defaults:
    """Values for settings that a request leaves open. Sampler and schedule None: use the checkpoint's scheduler
    file."""

    size: int  # pixels, both edges
    steps: int
    guidance: float
    sampler: str | None = None
    schedule: str | None = None


@dataclass(frozen=True)
class Request:
    """Every setting of one picture, or of `count` pictures that differ by seed. None stands for the model's default.

    prompt: what to draw; with an empty prompt the model chooses.
    negative: what to avoid. None is not "": SDXL was trained with zeros in place of a missing negative prompt.
    seed: the seed of the first picture; picture i of `count` has seed + i. None draws a fresh one.
    steps: more steps are slower and finer.
    guidance: how strongly to follow the prompt; 1 is no guidance.
    width, height: pixels, in multiples of 8, or of 16 for SD3, FLUX and Z-Image.
    sampler: a name of `mlxdiff.samplers.SAMPLERS`, or diffusers' or A1111's name for it.
    schedule: how the steps divide the noise, a name of `mlxdiff.schedules.SPACINGS`.
    count: how many pictures to draw at once.
    eta: how much noise a stochastic sampler puts back. None stands for the sampler's default.
    rescale: guidance rescale (Lin et al. 2023), 0 to 1.
    interval: the part of the steps with guidance: (0.1, 0.8) leaves out the first tenth and the last fifth.
    clip_skip: which layer of the text encoder is read, counted from the end; 1 is the last.
    refine_at: the part of the steps after which a refiner takes over, if one is loaded.
    shift: SD3, FLUX and Z-Image: a value above 1 moves the steps to larger noise.
    true_cfg: FLUX, where guidance is an input: how strongly a second pass pushes away from the negative prompt.
    skip_layers: SD3: blocks to leave out of a third pass, from which guidance pushes away; (7, 8, 9) for SD3.5 medium.
    skip_scale: how far to push away from that pass.
    skip_interval: the part of the steps that has this pass.
    t5: SD3: whether T5 reads the prompt too.
    image: the start image, a path or a PIL image; for a model that edits, what to edit: an image, or a list of several.
    A PNG stores the paths as they were typed, never the pixels.
    image_hash: a fingerprint of each image, set by `Pipeline.resolve`: a replay needs the same images.
    strength: the part of the steps that redraws the start image; 1 ignores it, as in diffusers. None is 0.6; 0.8
    with `outpaint`; 1 for a model or a control that was made for inpainting.
    mask: where the start image is drawn anew: a picture of the same shape, white there and black elsewhere; or "alpha":
    where the start image is transparent.
    mask_hash: a fingerprint of the mask, as for the image.
    mask_blur: softens the edge of the mask, in pixels of the result.
    mask_crop: draws only the part of the picture that holds the mask, with so many pixels around it, at the size that
    is drawn, and puts it back into the whole picture.
    keep: pastes the pixels outside the mask back in the end. Otherwise they are what the VAE makes of them.
    outpaint: how many pixels to add to the start image at its left, top, right and bottom.
    loras: LoRAs that change the model: files, hub ids or names (`mlxdiff models --adapters`), each with a scale if it
    is not 1: "style.safetensors:0.8". None stands for those that the model was loaded with. A prompt may name them too:
    <lora:style:0.8>. A named one that draws in few steps brings its steps, guidance, sampler and schedule: they are the
    defaults then.
    lora_hashes: fingerprints of these files, set by `Pipeline.resolve`: a replay needs the same files.
    embeddings: words that are taught to CLIP (textual inversion): files, each with a word if its own does not suit:
    "moss.safetensors=<moss>". None stands for those that the model was loaded with.
    embedding_hashes: fingerprints of these files, as for LoRA.
    hires: draw in two passes: the picture as it is without this, then that picture, enlarged, as a start image with the
    same seed. How many times to enlarge its edges, or a pair of that and the strength of the second pass: (2, 0.5).
    upscaler: the network that enlarges: a name of `mlxdiff upscale --help` or a .safetensors file. With `hires` it
    enlarges before the second pass, where otherwise a filter (Lanczos) does; else it enlarges the finished picture.
    upscaler_hash: a fingerprint of its file, set by `Pipeline.resolve`: a replay needs the same file.
    controls: pictures that the drawing follows line by line, each with the network that reads it (ControlNet): a list
    of Guides, or of tuples ("canny", "edges.png", 0.7). The numbers are a scale, and then the part of the steps, from
    and to. "masked" as a picture is the start image without what the mask marks, for a network that was made for that:
    ("inpaint", "masked").
    references: pictures whose style or things the drawing takes over, in the same form: ("ip-adapter", "a.png", 0.6).
    "ip-adapter:style" takes over the style alone, "ip-adapter:layout" where things are.
    guess: whether controls guide the prompt's pass alone, so that they decide more than the prompt does.
    reuse: 0.1 lets a step take over most of an earlier step's work where the network's first block changed by at most a
    tenth: faster, and a slightly different picture. 0 computes all. Pictures drawn at once reuse the same steps.
    noise: where the noise comes from: "torch" as in diffusers, "nv" as in A1111 on a GPU, or "mlx"."""

    prompt: str
    negative: str | None = None
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    sampler: str | None = None
    schedule: str | None = None
    count: int = 1
    eta: float | None = None
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    clip_skip: int | None = None
    refine_at: float = 0.8
    shift: float | None = None
    true_cfg: float = 1.0
    skip_layers: tuple[int, ...] = ()
    skip_scale: float = 2.8
    skip_interval: tuple[float, float] = (0.01, 0.2)
    t5: bool = True
    image: Picture | list[Picture] | tuple[Picture, ...] | None = None
    image_hash: str | tuple[str, ...] | None = None
    strength: float | None = None
    mask: Picture | None = None
    mask_hash: str | None = None
    mask_blur: float = 0.0
    mask_crop: int | None = None
    keep: bool = True
    outpaint: tuple[int, int, int, int] = (0, 0, 0, 0)
    loras: tuple[str, ...] | None = None
    lora_hashes: tuple[str, ...] = ()
    embeddings: tuple[str, ...] | None = None
    embedding_hashes: tuple[str, ...] = ()
    hires: float | tuple[float, ...] | None = None
    upscaler: str | Path | None = None
    upscaler_hash: str | None = None
    controls: Guides = ()
    references: Guides = ()
    guess: bool = False
    reuse: float = 0.0
    noise: str = "torch"

    def __post_init__(self):
        """One spelling for each number of pictures: None, the picture alone, or a tuple of several; and for hires and
        guides."""
        object.__setattr__(self, "controls", guides(self.controls, "control"))
        object.__setattr__(self, "references", guides(self.references, "reference"))
        if isinstance(self.hires, int | float):
            object.__setattr__(self, "hires", (self.hires,))
        for name in ("image", "image_hash"):
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                object.__setattr__(self, name, tuple(value) if len(value) > 1 else value[0] if value else None)

    def but(self, settings: dict) -> "Request":
        """The request with other settings. Fingerprints of files that these replace are dropped."""
        files = {"image_hash": {"image"}, "mask_hash": {"mask", "image"}}
        files |= {"lora_hashes": {"loras"}, "embedding_hashes": {"embeddings"}}
        files |= {"upscaler_hash": {"upscaler"}}
        dropped = {f.name: f.default for f in fields(self) if files.get(f.name, set()) & settings.keys()}
        return replace(self, **dropped | settings)

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """The images, however many there are."""
        return _several(self.image)

    @property
    def hashes(self) -> tuple[str, ...]:
        """Their fingerprints, if they are known."""
        return _several(self.image_hash)

    @property
    def masked(self) -> bool:
        """Whether only a part is drawn anew."""
        return self.mask is not None or any(self.outpaint)

    def resolve(
        self,
        defaults: Defaults,
        scheduler: tuple[str, str],
        spacing: str,
        clip_skip: int,
        multiple: int,
        strength: float | None = STRENGTH,
    ) -> "Request":
        """The request with a value for every setting. `scheduler`: the sampler and schedule to use when no sampler is
        named; `spacing`: the schedule for a sampler that the user chose; `multiple`: both edges must be divisible by
        it; `strength`: how much of a start image is redrawn."""
        for name in ("sampler", "schedule", "noise"):  # these names are looked up before `check` runs
            if (value := getattr(self, name)) is not None:
                values.text(name, value)
        if self.sampler is None:
            sampler, schedule = _first(defaults.sampler, scheduler[0]), _first(defaults.schedule, scheduler[1])
        else:
            sampler, named = dialects.sampler(self.sampler)
            schedule = _first(named, spacing)
        full = replace(
            self,
            seed=secrets.randbelow(2**32) if self.seed is None else self.seed,
            steps=_first(self.steps, defaults.steps),
            guidance=_first(self.guidance, defaults.guidance),
            width=_first(self.width, defaults.size),
            height=_first(self.height, defaults.size),
            sampler=sampler,
            schedule=_first(self.schedule, schedule),
            clip_skip=_first(self.clip_skip, clip_skip),
            eta=_first(self.eta, samplers.SAMPLERS[sampler].eta),
            strength=_first(self.strength, None if self.image is None else strength),
        )
        full.check_hires()
        if full.hires is not None:
            full = replace(full, hires=(*full.hires, STRENGTH)[:2])
        full.check(multiple)
        return full

    def sized(self, image: tuple[int, int], pixels: int, multiple: int) -> "Request":
        """The request with edges for a start image (width, height): the image's edges, scaled down where they have more
        than `pixels`. If one edge is given, the other follows from it. What `outpaint` adds is added to these edges,
        and is in those that are given."""
        given = {name: edge for name in ("width", "height") if (edge := getattr(self, name)) is not None}
        left, top, right, bottom = self.outpaint
        added = {"width": left + right, "height": top + bottom}
        for name, edge in given.items():
            values.whole(name, edge, multiple, MAX_EDGE)
            given[name] = edge - added[name]
            if given[name] < multiple:
                problem = f"outpaint adds {added[name]} pixels, which leaves no place for the image in {name} {edge}."
                raise Error(problem, f"Raise `{name}`, or leave it out.")
        grow = min(1.0, math.sqrt(pixels / math.prod(image)))
        if len(given) == 1:
            grow = given["width"] / image[0] if "width" in given else given["height"] / image[1]
        w, h = (max(1, round(edge * grow / multiple)) * multiple for edge in image)
        edges = {"width": w, "height": h} | given
        return replace(self, **{name: edge + added[name] for name, edge in edges.items()})

    def check(self, multiple: int) -> None:
        """Raise one Error, which names the setting, if a value is out of range."""
        values.text("prompt", self.prompt)
        if self.negative is not None:
            values.text("negative prompt", self.negative)
        values.whole("seed", self.seed, 0, MAX_SEED)
        values.whole("steps", self.steps, 1, 1000)
        values.whole("count", self.count, 1, 1000)
        values.whole("clip_skip", self.clip_skip, 1, 12)
        values.number("guidance", self.guidance, 0, 100)
        values.number("rescale", self.rescale, 0, 1)
        values.number("refine_at", self.refine_at, 0, 1)
        values.number("true_cfg", self.true_cfg, 0, 100)
        values.number("skip_scale", self.skip_scale, 0, 100)
        self.check_reuse()
        if self.shift is not None:
            values.number("shift", self.shift, 0.01, 100)
        if self.strength is not None:
            values.number("strength", self.strength, 0, 1)
        if self.image is None and (self.strength is not None or self.image_hash is not None):
            what = "`strength` needs" if self.image_hash is None else "These settings need"
            raise Error(f"{what} a start image, and none was given.", "Give it as `image=FILE`.")
        if not isinstance(self.t5, bool):
            raise Error(f"t5 {self.t5!r} is neither true nor false.", "Use `t5=False` to leave T5 out.")
        if self.eta is not None:
            values.number("eta", self.eta, 0, 10)
        if self.eta is not None and not samplers.SAMPLERS[self.sampler].noisy:
            raise Error(f"eta has no meaning for {self.sampler}, which adds no noise.", "Leave `eta` out, or use ddim.")
        self.check_mask()
        for n in self.outpaint:
            if n % multiple:
                problem = f"outpaint adds {n} pixels, which is not a multiple of {multiple}."
                raise Error(problem, f"Add {n // multiple * multiple or multiple}, or another multiple.")
        for name, value in (("width", self.width), ("height", self.height)):
            values.whole(name, value, multiple, MAX_EDGE)
            if value % multiple:
                low = value // multiple * multiple
                raise Error(f"{name} {value} is not a multiple of {multiple}.", f"Use {low} or {low + multiple}.")
        values.span("interval", self.interval)
        values.span("skip_interval", self.skip_interval)
        if not isinstance(self.skip_layers, tuple | list):
            raise Error(f"skip_layers {self.skip_layers!r} is not a list of layers.", "Give a few, such as (7, 8, 9).")
        self.check_adapters()
        self.check_guides()
        if self.schedule not in schedules.SPACINGS:
            fix = f"{did_you_mean(str(self.schedule), schedules.SPACINGS)}Use one of {', '.join(schedules.SPACINGS)}."
            raise Error(f"Schedule {self.schedule!r} is not known.", fix)
        if self.noise not in SOURCES:
            fix = f"{did_you_mean(str(self.noise), SOURCES)}Use one of {', '.join(SOURCES)}."
            raise Error(f"Noise {self.noise!r} is not known.", fix)

    def check_reuse(self) -> None:
        """Raise unless steps can reuse the work of others, if they are to."""
        values.number("reuse", self.reuse, 0, 1)
        if self.reuse == 0:
            return
        why = ""
        if not samplers.SAMPLERS[self.sampler].alone:
            once = ", ".join(name for name, row in samplers.SAMPLERS.items() if row.alone)
            why, fix = f"{self.sampler} computes some steps twice, so there is little to reuse", f"Use one of {once}"
        elif self.steps < REUSABLE:
            why, fix = f"{self.steps} steps differ too much to reuse one another", f"Take {REUSABLE} or more"
        elif self.controls:
            why, fix = "controls are read anew in each step", "Leave the controls out"
        if why:
            raise Error(f"reuse {self.reuse:g} cannot work: {why}.", f"{fix}, or leave `reuse` out.")

    def check_mask(self) -> None:
        """Raise if the settings of a mask contradict one another, before its file is read."""
        if not isinstance(self.mask, Picture | None):
            raise Error(f"The mask is {type(self.mask).__name__}, not a picture.", "Give a path or a PIL image.")
        if not isinstance(self.outpaint, tuple | list) or len(self.outpaint) != 4:
            fix = "Give the pixels at the left, top, right and bottom, such as (128, 0, 128, 0)."
            raise Error(f"outpaint {reprlib.repr(self.outpaint)} is not four numbers.", fix)
        for n in self.outpaint:
            values.whole("outpaint", n, 0, MAX_EDGE)
        values.number("mask_blur", self.mask_blur, 0, MAX_BLUR)
        if self.mask_crop is not None:
            values.whole("mask_crop", self.mask_crop, 0, MAX_EDGE)
        if not isinstance(self.keep, bool):
            raise Error(f"keep {self.keep!r} is neither true nor false.", "Use `keep=False` to paste nothing back.")
        if self.mask_hash is not None and self.mask is None:
            raise Error("These settings need a mask, and none was given.", "Give it as `mask=FILE`.")
        if self.masked and self.image is None:
            what = "A mask" if self.mask is not None else "outpaint"
            raise Error(f"{what} needs a start image, and none was given.", "Give it as `image=FILE`.")
        used = {"mask_blur": self.mask_blur > 0, "mask_crop": self.mask_crop is not None, "keep=False": not self.keep}
        for name in (name for name, on in used.items() if on and not self.masked):
            raise Error(f"{name.split('=')[0]} has no meaning without a mask.", f"Leave `{name}` out, or add a mask.")
        if self.mask_crop is not None and any(self.outpaint):
            raise Error("mask_crop draws a part, outpaint adds to the whole.", "Leave `mask_crop` or `outpaint` out.")

    def check_hires(self) -> None:
        """Raise unless hires is one or two numbers in range, and the upscaler a name or a path."""
        if self.hires is not None:
            if not isinstance(self.hires, tuple | list) or len(self.hires) not in (1, 2):
                fix = "Give how many times to enlarge, or that and a strength, such as (2, 0.5)."
                raise Error(f"hires {reprlib.repr(self.hires)} is not one or two numbers.", fix)
            values.number("hires", self.hires[0], 1, MAX_HIRES)
            if len(self.hires) > 1:
                values.number("the strength of hires", self.hires[1], 0, 1)
        if not isinstance(self.upscaler, str | Path | None):
            raise Error(f"The upscaler is {type(self.upscaler).__name__}, not a name or a path.", "Give text.")
        if self.upscaler_hash is not None and self.upscaler is None:
            raise Error("These settings need an upscaler, and none was given.", "Give it as `upscaler=FILE`.")

    def check_adapters(self) -> None:
        """Raise unless the LoRAs and the embeddings are lists of texts, before their files are read."""
        for name, value in (("loras", self.loras), ("embeddings", self.embeddings)):
            if not isinstance(value, tuple | list | None):
                raise Error(f"{name} {reprlib.repr(value)} is not a list.", 'Give a list, such as ["a.safetensors"].')
            for text in value or ():
                values.text("LoRA" if name == "loras" else "embedding", text)
        for text in self.loras or ():
            if (scale := dialects.lora(text)[1]) is not None:
                values.number("LoRA scale", scale, -MAX_SCALE, MAX_SCALE)

    def check_guides(self) -> None:
        """Raise unless the guides have pictures and numbers in range, before their files are read."""
        for name, several in (("control", self.controls), ("reference", self.references)):
            for guide in several:
                guide.check(name, self.masked)
        if not isinstance(self.guess, bool):
            raise Error(f"guess {self.guess!r} is neither true nor false.", "Use `guess=True` to guess.")
        if self.guess and not self.controls:
            raise Error("guess is for controls, and there is none.", "Leave `guess` out, or add `controls=[...]`.")

    def singles(self) -> list["Request"]:
        """The requests that draw the pictures of this resolved one alone: one picture and one seed each."""
        return [replace(self, seed=self.seed + i, count=1) for i in range(self.count)]

    def to_json(self) -> str:
        """The settings as JSON. If an image or the mask is not a file, it becomes null; the hashes stay."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        if any(isinstance(picture, Image) for picture in self.pictures):
            held["image"] = None
        if isinstance(self.mask, Image):
            held["mask"] = None
        text = json.dumps(held, ensure_ascii=False, default=_plain)
        # A path that is not UTF-8 has lone surrogates, which JSON escapes, and which come back when it is read.
        return "".join(f"\\u{ord(c):04x}" if "\ud800" <= c <= "\udfff" else c for c in text)

    @classmethod
    def from_json(cls, text: str) -> "Request":
        """Read `to_json`. Raises ValueError if the text is not JSON or a value has the wrong type; `check` checks
        ranges."""
        try:
            held = json.loads(text)
        except RecursionError:
            raise ValueError("they are nested too deeply") from None
        if not isinstance(held, dict) or "prompt" not in held:
            raise ValueError("they have no prompt")
        types = {f.name: f.type for f in fields(cls)}
        for name, value in held.items():
            if name not in types:
                problem = f"The settings hold {reprlib.repr(name)}, which this version does not know."
                raise Error(problem, "Update mlxdiff.")
            if not fits(value, types[name]):
                raise ValueError(f"{name} is {reprlib.repr(value)}")
        for name in ("prompt", "negative"):
            if held.get(name) is not None:
                values.text(name, held[name])
        return cls(**{k: tuple(map(_made, v)) if isinstance(v, list) else v for k, v in held.items()})


class Settings(TypedDict, total=False):
    """Request's fields after the prompt, as keyword arguments, for type checkers, which cannot derive them."""

    negative: str | None
    seed: int | None
    steps: int | None
    guidance: float | None
    width: int | None
    height: int | None
    sampler: str | None
    schedule: str | None
    count: int
    eta: float | None
    rescale: float
    interval: tuple[float, float]
    clip_skip: int | None
    refine_at: float
    shift: float | None
    true_cfg: float
    skip_layers: tuple[int, ...]
    skip_scale: float
    skip_interval: tuple[float, float]
    t5: bool
    image: Picture | list[Picture] | tuple[Picture, ...] | None
    image_hash: str | tuple[str, ...] | None
    strength: float | None
    mask: Picture | None
    mask_hash: str | None
    mask_blur: float
    mask_crop: int | None
    keep: bool
    outpaint: tuple[int, int, int, int]
    loras: tuple[str, ...] | None
    lora_hashes: tuple[str, ...]
    embeddings: tuple[str, ...] | None
    embedding_hashes: tuple[str, ...]
    hires: float | tuple[float, ...] | None
    upscaler: str | Path | None
    upscaler_hash: str | None
    controls: Guides
    references: Guides
    guess: bool
    reuse: float
    noise: str


SETTINGS = tuple(f.name for f in fields(Request) if f.name != "prompt")


def asked(prompt: str | Request, settings: dict) -> Request:
    """The request of a call: a prompt or an earlier request, whose settings the given settings replace."""
    arguments.check_settings(settings, SETTINGS)
    return prompt.but(settings) if isinstance(prompt, Request) else Request(prompt, **settings)


def takes_settings(call: Call) -> Call:
    """Spell `**settings` out, for help and completion: add Request's fields to the signature and to the docstring."""
    signature = inspect.signature(call)
    kept = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    typed = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in fields(Request)
        if f.name in SETTINGS
    ]
    call.__signature__ = signature.replace(parameters=[*kept, *typed])
    meanings = inspect.getdoc(Request).partition("\n\n")[2].partition("\n")[2]  # without the line about the prompt
    call.__doc__ = f"{inspect.getdoc(call)}\n\n{meanings}"
    return call


def _plain(value):
    """A value that JSON does not have. Of a picture that is not a file nothing is kept."""
    if isinstance(value, Guide):
        return {f.name: getattr(value, f.name) for f in fields(Guide)}
    return str(value) if isinstance(value, Path) else None


def _made(value):
    """The reverse of `_plain`, for values whose types were checked."""
    return Guide(**value) if isinstance(value, dict) else value


def _several(value) -> tuple:
    return () if value is None else value if isinstance(value, tuple) else (value,)


def _first(*values):
    return next((v for v in values if v is not None), None)
