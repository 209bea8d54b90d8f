"""The description of a model: `model.json` as a frozen, checked value. It resolves a request and gives its number of
passes and its noise levels. Every model folder has one, and so has every published model before it is fetched."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import samplers, schedules
from . import seal as seals
from .errors import Error
from .families import FAMILIES, MODELS, Family, find
from .families.base import EMBEDDED, INPUT, NONE, SECOND_PASS, Cut, TextPlan, Variant
from .families.published import DYNAMIC, EMPIRICAL
from .foreign import read_json
from .guides import steps_on
from .models import build
from .models.vae import factor
from .recipe import BITS, DTYPES, TEXT_BITS, WHOLE, Recipe
from .request import MAX_EDGE, OUTPAINT, STRENGTH, Defaults, Request
from .schedules import Schedule
from .tokenizers import unweighted

FORMAT = 7  # raise it when a quantization plan or a conversion's output changes: older folders are then reconverted
PREDICTIONS = ("eps", "v", "x0", "flow")
_AGAIN = "Convert the checkpoint again."

# Settings that not every family has -> whether a request uses them.
SPECIAL: dict[str, Callable[[Request], bool]] = {
    "shift": lambda r: r.shift is not None,
    "true_cfg": lambda r: r.true_cfg != 1,
    "skip_layers": lambda r: bool(r.skip_layers),
    "t5": lambda r: not r.t5,
    "guess": lambda r: r.guess,
}


@dataclass(frozen=True)
class Description:
    name: str
    family: Family
    variant: str  # a key of family.variants
    prediction: str
    recipe: Recipe
    schedule: dict
    zero_negative: bool
    components: dict[str, build.Config]
    tokenizers: tuple[str, ...] = ()
    error: dict[str, float] = field(default_factory=dict)  # quantized components -> relative error of their weights
    seal: seals.Seal = field(default_factory=dict)  # of the files of the folder that it was read from

    @property
    def wider(self) -> tuple[str, int] | None:
        """The variant that a LoRA may make of this model, which reads a control picture, and the channels of its input.
        None if there is none: published ones are for a base model."""
        name = next((n for n, v in self.family.variants.items() if v.reads == ("control",)), None)
        if name is None or not self.family.first or self.variant != "base":
            return None
        return name, self.net.in_channels + self.family.variants[name].beside

    def widened(self) -> "Description":
        """The model that such a LoRA makes of this one."""
        name, channels = self.wider
        net = replace(self.net, in_channels=channels)
        return replace(self, variant=name, components=self.components | {self.family.denoiser: net})

    @property
    def row(self) -> Variant:
        return self.family.variants[self.variant]

    @property
    def defaults(self) -> Defaults:
        """A named model's defaults, if name and contents match one; else those of the variant or the family."""
        named = find(self.name)
        if named is not None and (named.family, named.variant) == (self.family, self.variant):
            return named.defaults
        return self.family.defaults if self.row.defaults is None else self.row.defaults

    @property
    def net(self) -> build.Config:
        """The Config of the denoiser."""
        return self.components[self.family.denoiser]

    @property
    def text(self) -> TextPlan:
        tokens = self.row.t5_tokens
        return self.family.text if tokens is None else replace(self.family.text, t5_tokens=tokens)

    @property
    def guidance(self) -> str:
        """SECOND_PASS, INPUT, NONE or EMBEDDED."""
        return self.family.guidance if self.row.guidance is None else self.row.guidance

    @property
    def flow(self) -> bool:
        """Whether this is rectified flow."""
        return self.prediction == "flow"

    @property
    def factor(self) -> int:
        """How many pixels one latent covers along an edge."""
        vae = self.components["vae"]
        return factor(vae.channels) * vae.patch

    @property
    def multiple(self) -> int:
        """A picture's edges must be multiples of this: the pixels of a latent, or of a transformer's patch."""
        return self.factor * self.family.patch

    @property
    def latent_channels(self) -> int:
        return self.components["vae"].seen

    @property
    def usual_latents(self) -> bool:
        """Whether it has as many latent channels as its family."""
        return self.latent_channels == len(self.family.preview) - 1  # the last row is the bias

    def latent_size(self, request: Request) -> tuple[int, int]:
        """(h, w)"""
        return request.height // self.factor, request.width // self.factor

    def cfg(self, request: Request) -> float:
        """The scale of classifier-free guidance, which needs a second pass; 1 means no guidance."""
        if self.guidance == EMBEDDED:
            return 1.0
        return request.guidance if self.guidance == SECOND_PASS else request.true_cfg

    def passes(self, request: Request) -> int:
        """2 if guidance pushes away from a second pass, which reads the negative prompt; else 1."""
        return 2 if self.cfg(request) > 1 else 1

    def reads_t5(self, request: Request) -> bool:
        return request.t5 and self.text.t5 in self.components

    def noise_levels(self, request: Request) -> Schedule:
        """The schedule of a resolved request."""
        if self.flow:
            h, w = self.latent_size(request)
            return schedules.flow(self.schedule, h * w // self.family.patch**2, request.steps, request.shift)
        return schedules.discrete(self.schedule, samplers.SAMPLERS[request.sampler].grid)

    def starts(self, request: Request) -> bool:
        """Whether a request's picture is a start image, which runs begin with, and not a picture to edit."""
        return request.image is not None and not self.row.edits

    def cuts(self, pictures: Sequence[tuple[int, int]]) -> list[Cut]:
        """How each picture to edit, given its width and height, reaches the networks."""
        return [self.family.cut(*size, self.multiple) for size in pictures] if self.row.edits else []

    def resolve(self, request: Request, pictures: Sequence[tuple[int, int]] = ()) -> Request:
        """The request with every open setting filled from this model's defaults, and checked. pictures: width and
        height of each of its pictures."""
        self._check_pictures(request)
        full = self.fill(request, pictures)
        self._check(full)
        if full.hires is not None:
            self._check(self.second_pass(full))
        return full

    def second_pass(self, request: Request) -> Request:
        """The request of the second pass of a resolved one with `hires`. Its image stands for the enlarged picture."""
        scale, strength = request.hires
        edges = {"width": request.width, "height": request.height}
        edges = {name: max(1, round(edge * scale / self.multiple)) * self.multiple for name, edge in edges.items()}
        if max(edges.values()) > MAX_EDGE:
            w, h = edges.values()
            raise Error(f"hires {scale:g} makes it {w} x {h}; an edge has at most {MAX_EDGE}.", "Use a smaller scale.")
        alone = {"hires": None, "upscaler": None, "upscaler_hash": None}
        picture = {"image": Path("the picture of the first pass"), "image_hash": None}
        return replace(request, strength=strength, **picture, **edges, **alone)

    def fill(self, request: Request, pictures: Sequence[tuple[int, int]] = ()) -> Request:
        """As `resolve`, but without checking whether this model can do what is asked."""
        if pictures and self.row.edits:
            shape = self.cuts(pictures[:1])[0].size
            request = request.sized(shape, math.prod(shape), self.multiple)
        elif pictures:
            request = request.sized(pictures[0], self.defaults.size**2, self.multiple)
        schedule = self.schedule
        pair = self.family.fallback if schedule["sampler"] is None else (schedule["sampler"], schedule["spacing"])
        strength = OUTPAINT if any(request.outpaint) else STRENGTH
        inpaints = self.row.inpaints or any(guide.masked for guide in request.controls)
        strength = None if self.row.edits else 1.0 if inpaints else strength
        spacing, clip_skip = schedule["spacing"], self.family.clip_skip
        return request.resolve(self.defaults, pair, spacing, clip_skip, self.multiple, strength)

    def _check_pictures(self, request: Request) -> None:
        """Raise if this model cannot take that many pictures, or a strength or a mask beside them, or lacks one."""
        request.check_mask()
        count, edits = len(request.pictures), self.row.edits
        if edits and request.masked:
            fix = "Say in the prompt what to change, or use a model that does not edit."
            raise Error(f"{self.name} edits: it takes no mask.", fix)
        if edits and request.hires is not None:
            fix = "Enlarge the finished picture: `upscaler=MODEL`."
            raise Error(f"{self.name} edits: it begins with no picture, as hires would do.", fix)
        if request.hires is not None and (request.masked or self.row.inpaints):
            raise Error("hires draws the whole picture on, a mask a part of it.", "Enlarge the finished picture.")
        if edits and request.strength is not None:
            raise Error(f"{self.name} edits: it takes no strength.", "Leave `strength` out.")
        if edits and count > edits:
            raise Error(f"{self.name} takes at most {edits} to edit; {count} pictures were given.", "Give fewer.")
        if not edits and count > 1:
            fix = "Give one, or use a model that edits."
            raise Error(f"{self.name} begins with one picture; {count} were given.", fix)
        if self.row.inpaints and not request.masked:
            problem = f"{self.name} draws a part of a picture anew: it needs a picture and a mask."
            raise Error(problem, "Give them as `image=FILE` and `mask=FILE`, or use a base model.")

    def taken(self, request: Request) -> int:
        """How many steps a resolved request takes: a start image is redrawn in the last of them."""
        steps = request.steps
        return self.noise_levels(request).taken(steps, request.strength) if self.starts(request) else steps

    def _check_guides(self, request: Request) -> None:
        """Raise if the controls cannot guide this model, as far as their files do not show it."""
        own = [guide for guide in request.controls if guide.model is None]  # those that no network of their own reads
        if own and "control" not in self.row.reads:
            fix = "Name the network that reads it: `controls=[(MODEL, PICTURE)]`. "
            fix += "`mlxdiff models --adapters` lists some."
            raise Error(f"{self.name} itself reads no control picture.", fix)
        if "control" in self.row.reads and len(own) != 1:
            problem = f"{self.name} reads one control picture; {len(own) or 'none'} {'were' if own else 'was'} given."
            raise Error(problem, "Give it as `controls=[PICTURE]`.")
        if any((guide.scale, guide.interval, guide.mode) != (1, (0, 1), None) for guide in own):
            raise Error(f"{self.name} reads its control picture as it is, in all steps.", "Leave the numbers out.")
        if request.guess and self.passes(request) == 1:
            fix = "Leave `guess` out, or use more guidance."
            raise Error("guess leaves the negative prompt's pass alone, and without guidance there is none.", fix)
        steps = self.taken(request)
        for what, guide in [("control", c) for c in request.controls] + [("reference", r) for r in request.references]:
            if steps and not steps_on(guide.interval, steps):
                span = f"{guide.interval[0]:g} to {guide.interval[1]:g}"
                raise Error(f"The {what} interval {span} holds none of {steps} steps.", "Give a longer one.")

    def _check(self, request: Request) -> None:
        """Raise before the work if this model cannot do what the request asks."""
        self._check_guides(request)
        for setting, used in SPECIAL.items():
            if used(request) and setting not in self.family.takes:
                whose = " and ".join(f.title for f in FAMILIES.values() if setting in f.takes)
                typed = "t5=False" if setting == "t5" else setting
                raise Error(f"{setting} is for {whose}; {self.name} is {self.family.title}.", f"Leave `{typed}` out.")
        self._check_guidance(request)
        if self.text.qwen is not None:
            for prompt in (request.prompt, request.negative or ""):
                unweighted(prompt)
        layers = min((self.components[e].layers for e in self.text.clip), default=math.inf)
        if request.clip_skip > layers:
            raise Error(
                f"clip_skip {request.clip_skip} goes below the text encoder's {layers} layers.", "Use a smaller one."
            )
        if self.flow:
            samplers.of_flow(request.sampler)
        schedule = self.noise_levels(request)
        schedules.sigmas(schedule, request.schedule, request.steps)
        if self.starts(request) and schedule.taken(request.steps, request.strength) == 0:
            none = f"Strength {request.strength:g} of {request.steps} steps leaves no step to take."
            raise Error(none, "Raise the strength or the steps.")
        if self.family.check is not None:
            self.family.check(self.name, self.net, self.multiple, request)

    def _check_guidance(self, request: Request) -> None:
        """Raise if a model that draws in one pass cannot follow the guidance or the negative prompt."""
        if self.guidance == NONE and request.guidance > 1:
            raise Error(
                f"{self.name} takes no guidance, and {request.guidance:g} was given.",
                "Leave `guidance` out, or use another model.",
            )
        if self.guidance in (INPUT, NONE) and request.negative and request.true_cfg <= 1:
            add = "Add `true_cfg=4` for a second pass, or leave" if "true_cfg" in self.family.takes else "Leave"
            raise Error(
                f"{self.name} draws in one pass, which has no place for a negative prompt.",
                f"{add} the negative prompt out.",
            )
        if request.negative is None and request.true_cfg > 1:
            fix = 'Give a negative prompt, or an empty one: `negative=""`.'
            raise Error("true_cfg has no negative prompt to pull from.", fix)

    def check_draws(self) -> None:
        """Raise unless this model has all components that drawing needs."""
        for name in (self.family.denoiser, "vae", *self.text.needs):
            if name not in self.components:
                raise Error(f"{self.name} has no {name}.", "Use a checkpoint that holds the whole model.")
        if self.row.needs:
            raise Error(
                f"{self.name} is a {self.variant} model, which also needs {' and '.join(self.row.needs)}.",
                "It converts, but cannot draw yet: use another model.",
            )

    def check_refiner(self, refiner: "Description") -> None:
        """Raise unless a refiner works on the same latents."""
        if refiner.components["vae"].scale != self.components["vae"].scale:
            raise Error(
                f"{refiner.name} works on other latents than {self.name}.", "Use the refiner made for this model."
            )
        for model in (self, refiner):
            if model.row.reads:
                problem = f"{model.name} reads pictures beside the latents: it has no refiner, and is none."
                raise Error(problem, "Leave `refiner` out, or use a base model.")

    @property
    def taesd(self) -> str:
        """The hub id of the tiny decoder. Raises if there is none for this family."""
        if self.family.taesd is None:
            raise Error(f"mlxdiff reads no TAESD for {self.family.title}.", "Leave `taesd` out.")
        return self.family.taesd

    def check_taesd(self, channels: int) -> None:
        """Raise unless a tiny decoder reads latents of this many channels."""
        if channels != self.latent_channels:
            right = self.taesd
            raise Error(
                f"This TAESD reads latents of {channels} channels; {self.name} has {self.latent_channels}.",
                f"Use {right}." if self.usual_latents else "Leave `taesd` out.",
            )

    def not_finite(self) -> Error:
        """The error to raise when numbers overflow. It names a dtype in which they do not."""
        dtype = self.recipe.dtype
        other = "bfloat16" if dtype == "float16" else "float32"
        damaged = "Its weights, or those of a file beside it, are damaged: fetch them again."
        fix = f"Run it with `dtype={other!r}`." if dtype != other else damaged
        return Error(f"{self.name} gave values that are not finite in {dtype}.", fix)

    def write(self, folder: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Write model.json into a folder whose other files are all there. progress: called with bytes done and bytes in
        all, since every file is read once for the seal."""
        values = {name: getattr(self, name) for name in ("name", "variant", "prediction", "schedule", "zero_negative")}
        values |= {"format": FORMAT, "family": self.family.name, "recipe": self.recipe.values(), "error": self.error}
        values |= {"tokenizers": self.tokenizers, "seal": seals.of(folder, progress)}
        values["components"] = {name: build.settings(config) for name, config in self.components.items()}
        values["hash"] = hash_of(values)
        text = json.dumps(values, indent=1, sort_keys=True)
        (folder / "model.json").write_text(text + "\n", encoding="utf-8")


def hash_of(values: dict) -> str:
    """Of all values of a model.json but this one."""
    text = json.dumps({k: v for k, v in values.items() if k != "hash"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def published(name: str, recipe: Recipe) -> Description:
    """The description that a named model will have once it is fetched and converted."""
    model = MODELS[name]
    schedule = model.family.variants[model.variant].schedule
    return Description(
        name=name,
        family=model.family,
        variant=model.variant,
        prediction=model.family.prediction if model.prediction is None else model.prediction,
        recipe=recipe.of(model.family),
        schedule=model.family.schedule if schedule is None else schedule,
        zero_negative=model.family.zero_negative,
        components=model.networks,
    )


def read(folder: str | Path) -> Description:
    """The description in a model folder. Every value of it is checked, and whether the folder's files are those that
    the conversion wrote."""
    path = Path(folder) / "model.json"
    values = read_json(path, _AGAIN)
    if values.get("format") != FORMAT:
        raise Error(f"{path} has format {values.get('format')!r:.60}; this version reads {FORMAT}.", _AGAIN)
    for key, sound in _SOUND.items():
        if not sound(values.get(key)):
            raise Error(f"{path} has {key} {values.get(key)!r:.60}.", _AGAIN)
    family = FAMILIES[values["family"]]
    if values["variant"] not in [*family.variants]:
        raise Error(f"{path} has variant {values['variant']!r:.60} of {family.name}.", _AGAIN)
    try:
        components = {name: build.config(settings) for name, settings in values["components"].items()}
    except Error as e:
        raise Error(f"{path}: {e.problem}", e.fix) from None
    wrong = _misplaced(family, components)
    if wrong is not None:
        raise Error(f"{path} has a {wrong} that {family.title} does not have.", _AGAIN)
    if values.get("hash") != hash_of(values):
        raise Error(f"{path} is not as the conversion wrote it.", _AGAIN)
    marks = {name: seals.Mark(*mark) for name, mark in values["seal"].items()}
    seals.check(Path(folder), marks)
    return Description(
        name=values["name"],
        family=family,
        variant=values["variant"],
        prediction=values["prediction"],
        recipe=Recipe(**values["recipe"]),
        schedule=values["schedule"],
        zero_negative=values["zero_negative"],
        components=components,
        tokenizers=tuple(values["tokenizers"]),
        error=values["error"],
        seal=marks,
    )


def _misplaced(family: Family, components: dict[str, build.Config]) -> str | None:
    """The first component whose network is not the one that the family has there; None if all fit."""
    return next((name for name, c in components.items() if family.networks.get(name) != build.name_of(c)), None)


def _schedule_is_sound(value) -> bool:
    """Whether a conversion could have written this: a family's schedule has these fields, with such values."""
    if not isinstance(value, dict):
        return False
    model = next((f.schedule for f in FAMILIES.values() if f.schedule.keys() == value.keys()), None)
    return model is not None and all(_alike(value[key], model[key], key) for key in model)


def _alike(value, model, key: str) -> bool:
    if key == "dynamic":
        if not isinstance(value, dict | None):
            return False
        numbers = () if value is None else value.values()
        known = value is None or any(value.keys() == dynamic.keys() for dynamic in (DYNAMIC, EMPIRICAL))
        ends = [0, 1] if value is None else [value.get(f"{which}_image_seq_len", i) for i, which in enumerate(_ENDS)]
        return known and all(_is_number(n) for n in numbers) and ends[0] < ends[1]
    if key == "sampler":
        return value is None or value in [*samplers.SAMPLERS]
    if isinstance(model, bool | str):
        return type(value) is type(model) and (key not in _NAMED or value in _NAMED[key])
    return _is_number(value) and _RANGES[key](value)


_ENDS = ("base", "max")
_NAMED = {"spacing": schedules.SPACINGS, "ends": schedules.FLOW_SPACINGS}
_RANGES: dict[str, Callable[[float], bool]] = {
    "steps": lambda n: type(n) is int and 2 <= n <= schedules.MOST_STEPS,
    "start": lambda beta: 0 < beta < 1,
    "end": lambda beta: 0 < beta < 1,
    "offset": lambda n: n in (0, 1),
    "shift": lambda n: 0 < n < 1e30,
}


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_SOUND = {
    "name": lambda v: isinstance(v, str),
    "family": lambda v: v in [*FAMILIES],
    "variant": lambda v: isinstance(v, str),
    "prediction": lambda v: v in [*PREDICTIONS],
    "recipe": lambda v: (
        isinstance(v, dict)
        and v.keys() - {"text_bits"} == {"dtype", "bits"}
        and v["dtype"] in [*DTYPES]
        and v["bits"] in [None, *BITS]
        and v.get("text_bits", WHOLE) in [*TEXT_BITS]
    ),
    "schedule": _schedule_is_sound,
    "zero_negative": lambda v: isinstance(v, bool),
    "components": lambda v: isinstance(v, dict) and all(isinstance(c, dict) for c in v.values()),
    "tokenizers": lambda v: isinstance(v, list) and all(isinstance(t, str) for t in v),
    "seal": seals.is_sound,
    "error": lambda v: isinstance(v, dict) and all(_is_number(n) for n in v.values()),
}
