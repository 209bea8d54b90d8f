"""Request: every setting of one picture (or of `count` pictures that differ by seed). None means the model's own
default; `resolve` fills those in once, checks everything, and from then on nothing is None that a run needs."""

import json
import math
import reprlib
import secrets
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin

from PIL.Image import Image

from . import dialects, samplers, schedules
from .errors import Error
from .families import Defaults
from .noise import SOURCES

MAX_SEED = 2**63 - 1  # what a signed 64-bit file format or another tool can still hold
MAX_EDGE = 16384
STRENGTH = 0.6


@dataclass(frozen=True)
class Request:
    prompt: str
    negative: str | None = None  # None is not "": SDXL was trained with zeros for "no negative prompt"
    seed: int | None = None  # the first picture's; picture i of `count` has seed + i
    steps: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    sampler: str | None = None
    schedule: str | None = None
    count: int = 1
    eta: float | None = None  # how much noise a stochastic sampler puts back; None: the sampler's own
    rescale: float = 0.0  # guidance rescale (Lin et al. 2023), 0 to 1
    interval: tuple[float, float] = (0.0, 1.0)  # the part of the steps that is guided
    clip_skip: int | None = None  # text layer counted from the end, 1 is the last
    refine_at: float = 0.8  # the part of the steps before a refiner, if one is loaded, takes over
    shift: float | None = None  # SD3 and FLUX: more than 1 spends the steps on large noise; None: the model's own
    true_cfg: float = 1.0  # FLUX, which is told its guidance: how far a second pass pulls from the negative prompt
    skip_layers: tuple[int, ...] = ()  # SD3: blocks left out of a third pass, to be led away from (3.5 medium: 7 8 9)
    skip_scale: float = 2.8  # how far
    skip_interval: tuple[float, float] = (0.01, 0.2)  # in which part of the steps
    t5: bool = True  # SD3: whether T5 reads the prompt too
    image: str | Path | Image | None = None  # what to begin with; a PNG keeps its path as it was typed, never pixels
    image_hash: str | None = None  # of what it showed, noted by `Pipeline.resolve`: a replay asks for the same
    strength: float | None = None  # the part of the steps that redraws the image; 1 ignores it, as in diffusers
    noise: str = "torch"

    def resolve(
        self, defaults: Defaults, scheduler: tuple[str, str], spacing: str, clip_skip: int, multiple: int
    ) -> "Request":
        """All settings as numbers. `scheduler`: sampler and schedule that go together when no sampler is named;
        `spacing`: the schedule under a sampler the user chose; `multiple`: what both edges must be divisible by."""
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
            strength=_first(self.strength, None if self.image is None else STRENGTH),
        )
        full.check(multiple)
        return full

    def sized(self, image: tuple[int, int], pixels: int, multiple: int) -> "Request":
        """With edges for an image (width, height): its own, made smaller where they make more than `pixels`; of one
        that is given the other follows."""
        given = {name: edge for name in ("width", "height") if (edge := getattr(self, name)) is not None}
        for name, edge in given.items():
            _whole(name, edge, multiple, MAX_EDGE)
        grow = min(1.0, math.sqrt(pixels / math.prod(image)))
        if len(given) == 1:
            grow = given["width"] / image[0] if "width" in given else given["height"] / image[1]
        w, h = (max(1, round(edge * grow / multiple)) * multiple for edge in image)
        return replace(self, **{"width": w, "height": h} | given)

    def check(self, multiple: int) -> None:
        """Every value in its range, or one Error that names it."""
        _text("prompt", self.prompt)
        if self.negative is not None:
            _text("negative prompt", self.negative)
        _whole("seed", self.seed, 0, MAX_SEED)
        _whole("steps", self.steps, 1, 1000)
        _whole("count", self.count, 1, 1000)
        _whole("clip_skip", self.clip_skip, 1, 12)
        _number("guidance", self.guidance, 0, 100)
        _number("rescale", self.rescale, 0, 1)
        _number("refine_at", self.refine_at, 0, 1)
        _number("true_cfg", self.true_cfg, 0, 100)
        _number("skip_scale", self.skip_scale, 0, 100)
        if self.shift is not None:
            _number("shift", self.shift, 0.01, 100)
        if self.strength is not None:
            _number("strength", self.strength, 0, 1)
        if self.image is None and (self.strength is not None or self.image_hash is not None):
            raise Error("There is no image for these settings to begin with.", "Give it as `image=FILE`.")
        if not isinstance(self.t5, bool):
            raise Error(f"t5 {self.t5!r} is neither true nor false.", "Use `t5=False` to leave T5 out.")
        if self.eta is not None:
            _number("eta", self.eta, 0, 10)
        if self.eta is not None and not samplers.SAMPLERS[self.sampler].noisy:
            raise Error(f"eta has no meaning for {self.sampler}, which adds no noise.", "Leave `eta` out, or use ddim.")
        for name, value in (("width", self.width), ("height", self.height)):
            _whole(name, value, multiple, MAX_EDGE)
            if value % multiple:
                low = value // multiple * multiple
                raise Error(f"{name} {value} is not a multiple of {multiple}.", f"Use {low} or {low + multiple}.")
        _span("interval", self.interval)
        _span("skip_interval", self.skip_interval)
        if not isinstance(self.skip_layers, tuple | list):
            raise Error(f"skip_layers {self.skip_layers!r} are not layers.", "Give their numbers, such as (7, 8, 9).")
        if self.schedule not in schedules.SPACINGS:
            raise Error(f"Schedule {self.schedule!r} is not known.", f"Use one of {', '.join(schedules.SPACINGS)}.")
        if self.noise not in SOURCES:
            raise Error(f"Noise {self.noise!r} is not known.", f"Use one of {', '.join(SOURCES)}.")

    def to_json(self) -> str:
        """An image that is no file becomes null; its hash stays."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return json.dumps(values, ensure_ascii=False, default=lambda v: str(v) if isinstance(v, Path) else None)

    @classmethod
    def from_json(cls, text: str) -> "Request":
        """Raises ValueError for what is no JSON or has values of other types than the fields; ranges: see `check`."""
        try:
            values = json.loads(text)
        except RecursionError:
            raise ValueError("they are nested too deeply") from None
        if not isinstance(values, dict) or "prompt" not in values:
            raise ValueError("they have no prompt")
        types = {f.name: f.type for f in fields(cls)}
        for name, value in values.items():
            if name not in types:
                problem = f"The settings hold {reprlib.repr(name)}, which this version does not know."
                raise Error(problem, "Update mlxdiff.")
            if not _is(value, types[name]):
                raise ValueError(f"{name} is {reprlib.repr(value)}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _first(*values):
    return next((v for v in values if v is not None), None)


def _is(value, kind) -> bool:
    """Whether a value from JSON suits the type of a field, where lists stand for tuples."""
    if isinstance(kind, UnionType):
        return any(_is(value, k) for k in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(_is(v, get_args(kind)[0]) for v in value)
    return type(value) is kind or (kind is float and type(value) is int)


def _text(name: str, value) -> None:
    if not isinstance(value, str):
        raise Error(f"The {name} is {type(value).__name__}, not text.", f"Give the {name} as a string.")


def _whole(name: str, value, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise Error(f"{name} {value!r} is not a whole number from {low} to {high}.", f"Choose {name} in that range.")


def _number(name: str, value, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise Error(f"{name} {value!r} is not a number from {low} to {high}.", f"Choose {name} in that range.")


def _span(name: str, value) -> None:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise Error(f"{name} {value!r} is not a pair of numbers.", "Give two fractions, such as (0.1, 0.8).")
    for v in value:
        _number(name, v, 0, 1)
    if value[0] > value[1]:
        raise Error(f"{name} {value[0]} to {value[1]} ends before it begins.", "Give the smaller fraction first.")
