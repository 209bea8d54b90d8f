"""Guide: a picture that guides a drawing beside the prompt, how strongly and in which steps, and the network that reads
it."""

import math
import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image

from . import values
from .errors import Error, did_you_mean

Picture = str | Path | Image

MASKED = "masked"  # as a control picture: the start image without what the mask marks, for networks that inpaint

# What makes a control picture of a photograph: the kinds of `mlxdiff.detect`.
DETECTORS = ("canny", "depth", "grey", "invert")
MAX_SCALE = 10  # of a control, a reference or a LoRA
_MODE = re.compile(r"(.{2,}):([\w-]+)")  # two characters at least: C:\ is a disk
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_FORM = "[MODEL] IMAGE [SCALE [FROM TO]]"
_LIKE = {"control": '("canny", "edges.png")', "reference": '("ip-adapter", "photo.png")'}


@dataclass(frozen=True)
class Guide:
    """A picture that guides a drawing. What its network is, the network's file says.

    image: a path or a PIL image; "masked": the start image without what the mask marks; None in settings of a picture
    that was never a file.
    model: the network that reads it: a name (`mlxdiff models --adapters`), a hub id, a folder or a .safetensors file.
    None: the drawing model itself reads it.
    scale: how strongly it guides. interval: the part of the steps in which it does.
    mode: what kind of picture it is, for a network that reads several kinds; for a reference through an IP-Adapter,
    "style" or "layout" if that alone should be taken over. `model` may say it too: "FILE:canny", "ip-adapter:style".
    detect: which control picture to make of the image first: "canny", "depth", "grey" or "invert".
    hash, model_hash: fingerprints of picture and network, set by `Pipeline.resolve`: a replay needs the same ones."""

    image: Picture | None
    model: str | Path | None = None
    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    mode: str | None = None
    hash: str | None = None
    model_hash: str | None = None
    detect: str | None = None

    def __post_init__(self):
        if isinstance(self.interval, list):  # from JSON
            object.__setattr__(self, "interval", tuple(self.interval))
        said = _MODE.fullmatch(self.model) if isinstance(self.model, str) and self.mode is None else None
        if said is not None:
            object.__setattr__(self, "model", said[1])
            object.__setattr__(self, "mode", said[2])

    def __str__(self) -> str:
        mode = "" if self.mode is None else f":{self.mode}"
        named = [f"{self.model}{mode}"] if self.model is not None else []
        named.append("a picture" if self.image is None or isinstance(self.image, Image) else str(self.image))
        return " ".join(named)

    def check(self, what: str, with_mask: bool) -> None:
        """Raise unless this has a picture and its numbers are in range, before files are read. what: "control" or
        "reference". with_mask: whether the request has a mask."""
        if self.image is None:
            fix = f"Give that picture again: `{what}s=[...]`."
            raise Error(f"These settings need the picture of a {what}, which was no file.", fix)
        if not isinstance(self.model, str | Path | None):
            problem = f"The model of a {what} is {type(self.model).__name__}, not a name or a path."
            raise Error(problem, "Give a name, a hub id, a folder or a .safetensors file.")
        values.number(f"{what} scale", self.scale, 0, MAX_SCALE)
        values.span(f"{what} interval", self.interval)
        if self.mode is not None:
            values.text(f"mode of a {what}", self.mode)
        if self.masked and (what == "reference" or self.model is None or self.detect is not None):
            problem = f'"{MASKED}" is the start image without what the mask marks, for a control that inpaints.'
            raise Error(problem, f'Give it as `controls=[("inpaint", "{MASKED}")]`.')
        if self.masked and not with_mask:
            raise Error(f"The control {self} needs a mask, and none was given.", "Give `image=FILE` and `mask=FILE`.")
        if self.detect is not None and (what == "reference" or self.detect not in DETECTORS):
            problem = f"detect {reprlib.repr(self.detect)} makes no picture for a {what}."
            fix = f"{did_you_mean(str(self.detect), DETECTORS)}Use one of {', '.join(DETECTORS)}."
            raise Error(problem, fix if what == "control" else "Leave it out.")

    @property
    def masked(self) -> bool:
        """Whether its picture is the start image without what the mask marks."""
        return isinstance(self.image, str) and self.image == MASKED

    def times(self, taken: int, sigmas: list[float], t: Callable[[float], float]) -> tuple[float, float]:
        """The times in which it is on: from the first down to the second, which is excluded. taken: steps that are
        taken, the last of those between the run's sigmas; t: the time of a sigma."""
        on = steps_on(self.interval, taken)
        last = sigmas[on.stop - 1 - taken]
        return t(sigmas[on.start - 1 - taken]), t(last) if last > 0 else -math.inf


def guides(values, what: str) -> tuple[Guide, ...]:
    """Guides as a caller may write them: [("canny", "edges.png", 0.7)]. what: "control" or "reference"."""
    if not isinstance(values, list | tuple):
        fix = f"Give a list, such as [{_LIKE[what]}]: {_FORM} each."
        raise Error(f"{what}s is {type(values).__name__}, not a list.", fix)
    if (
        isinstance(values, tuple)
        and values[1:]
        and all(_number(v) is not None or isinstance(v, Picture) for v in values)
    ):
        raise Error(f"{what}s is one {what}, not a list.", f"Put brackets around it, as in `{what}s=[{_LIKE[what]}]`.")
    return tuple(_guide(value, what) for value in values)


def _guide(value, what: str) -> Guide:
    """A Guide of its words, which are a path or picture, perhaps its network before it, and numbers behind it."""
    if isinstance(value, Guide):
        return value
    words, numbers = [*value] if isinstance(value, list | tuple) else [value], []
    while len(words) > 1 and _number(words[-1]) is not None:
        numbers.insert(0, _number(words.pop()))
    fits = 1 <= len(words) <= 2 and len(numbers) in (0, 1, 3)
    if not fits or not isinstance(words[-1], Picture) or not isinstance(words[0], Picture):
        written = " ".join("a picture" if isinstance(w, Image) else str(w) for w in [*words, *numbers])
        raise Error(f"{written[:80]!r} is no {what}.", f"Give {_FORM}.")
    model, image = (None, *words) if len(words) == 1 else words
    if isinstance(model, Image) or Path("" if model is None else model).suffix.lower() in _PICTURES:
        raise Error(f"The first word of a {what} names its network; it is {Guide(model)}.", f"Give {_FORM}.")
    return Guide(image, model, *numbers[:1], **({"interval": tuple(numbers[1:])} if numbers[1:] else {}))


def _number(word) -> float | None:
    if isinstance(word, bool) or not isinstance(word, int | float | str):
        return None
    try:
        return float(word)
    except (ValueError, OverflowError):
        return None


def steps_on(interval: tuple[float, float], steps: int) -> range:
    """The steps in which a guide of this interval guides, of so many that are taken. As in diffusers, a step counts if
    all of it lies in the interval."""
    on = [i for i in range(steps) if i / steps >= interval[0] and (i + 1) / steps <= interval[1]]
    return range(on[0], on[-1] + 1) if on else range(0)
