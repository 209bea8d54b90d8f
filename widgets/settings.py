"""The settings of the next picture, as traits: how a model's defaults and a picture's settings get into them, and how
they become a Request."""

import io
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import traitlets as t

from .. import dialects, images, samplers
from ..advice import this_machine
from ..description import Description
from ..errors import Error
from ..families import DEFAULT, MODELS, QUICK, Defaults, Fast
from ..families.base import SECOND_PASS
from ..guides import Guide, guides
from ..memory import Workload
from ..request import STRENGTH, Request, asked
from .known import Known, estimate, fit

# The Request fields that have a control, each with the type that reads a value of a comparison from text.
FIELDS: dict[str, Callable] = {
    "seed": int,
    "steps": int,
    "guidance": float,
    "sampler": str,
    "schedule": str,
    "width": int,
    "height": int,
    "strength": float,
    "reuse": float,
    "prompt": str,
    "negative": str,
}
GUIDES = {"control": "control_guides", "reference": "reference_guides"}
PART = ("mask", "mask_blur", "outpaint")  # what is drawn anew of the start picture
BY_MODEL = ("steps", "guidance", "width", "height", "sampler", "schedule")  # each model has defaults for these
_QUICK, _FINE = 0.4, 2.0  # times the model's default number of steps


def presets(defaults: Defaults, quick: Fast | None = None) -> dict[str, dict]:
    """What the three buttons set. A model made for a few steps has only the standard settings. quick: the model's own
    LoRA for few steps, which the quick ones are for."""
    standard = {
        "steps": defaults.steps,
        "guidance": defaults.guidance,
        "width": defaults.size,
        "height": defaults.size,
        "sampler": None,
        "schedule": None,
    }
    if defaults.steps < 10:
        return {"standard": standard}
    solver = {"sampler": "dpmpp_2m"}  # it is of second order, and every family can use it
    return {
        "quick": standard | (solver | {"steps": round(defaults.steps * _QUICK)} if quick is None else quick.wants),
        "standard": standard,
        "fine": standard | solver | {"steps": round(defaults.steps * _FINE)},
    }


def ignored(model: Description | None, guidance: float, true_cfg: float) -> dict[str, str]:
    """The controls that change nothing now, with the reason. FLUX takes a second pass if true_cfg is above 1."""
    one_pass = model is not None and model.guidance != SECOND_PASS
    if one_pass and true_cfg <= 1:
        return {"negative": f"{model.name} draws in one pass: it has no place for a negative prompt."}
    if guidance <= 1 and not one_pass:
        return {"negative": "Not used at guidance 1 or below: nothing is subtracted there."}
    return {}


def unusual(request: Request, model: Description | None) -> dict:
    """The request's fields that have no control and whose value is not the default."""
    plain, defaults = Request(""), {}
    if model is not None:
        defaults["clip_skip"] = model.family.clip_skip
    if request.sampler is not None:
        defaults["eta"] = samplers.SAMPLERS[dialects.sampler(request.sampler)[0]].eta
    shown = (*FIELDS, "count", "image", "image_hash", *PART, "mask_hash", "controls", "references")
    shown += ("loras", "lora_hashes", "embeddings", "embedding_hashes")
    others = {f.name: getattr(request, f.name) for f in fields(Request) if f.name not in shown}
    return {n: v for n, v in others.items() if v not in (getattr(plain, n), defaults.get(n))}


class Settings(t.HasTraits):
    """Set them, observe them. `_known` is what is known of the model."""

    prompt = t.Unicode("a red house under a full moon")
    negative = t.Unicode(None, allow_none=True)
    model = t.Unicode(DEFAULT)
    sampler = t.Unicode(None, allow_none=True)
    schedule = t.Unicode(None, allow_none=True)
    steps = t.Int(25)
    guidance = t.Float(7.5)
    width = t.Int(512)
    height = t.Int(512)
    seed = t.Int(0)
    locked = t.Bool(False, help="keep the seed; otherwise every run draws a fresh one")
    count = t.Int(1)
    image = t.Any(None, help="the start picture, a path or a PIL image; for a model that edits, one or a list to edit")
    strength = t.Float(STRENGTH, help="the part of the steps that redraws the start picture; 1 ignores it")
    mask = t.Any(None, help="where the start picture is drawn anew: a path or a PIL image, white there; or 'alpha'")
    mask_blur = t.Float(0.0, help="softens the edge of the mask, in pixels of the result")
    outpaint = t.Tuple((0, 0, 0, 0), help="pixels to add to the start picture at the left, top, right and bottom")
    control_guides = t.List(help="Request's controls: Guides or tuples, such as ('canny', 'edges.png', 0.7)")
    reference_guides = t.List(help="Request's references: Guides or tuples, such as ('ip-adapter', 'photo.png', 0.6)")
    loras = t.List(t.Unicode(), help="LoRAs, each with its scale, such as ['style.safetensors:0.8']")
    embeddings = t.List(t.Unicode(), help="taught words: files, each with its word if the file's own does not suit")
    reuse = t.Float(0.0, help="0.1 skips most of a step where little changed: faster, slightly different; 0 skips none")
    upscaler = t.Unicode(None, allow_none=True, help="with what the page's Enlarge enlarges: a name, file or hub id")
    more = t.Dict(help="the Request's fields that have no control, such as {'clip_skip': 2}")
    folder = t.Union([t.Unicode(), t.Instance(Path)], default_value="pictures", help="where files are written")
    options = t.Dict(help="arguments of mlxdiff.load, such as {'bits': 8}")

    _known: Known
    _seen: dict[str, str]  # an opened model's name in files -> the name that opened it
    _before: dict  # the settings of BY_MODEL when the model was named
    _sizes: tuple[tuple[int, int], ...] = ()  # width and height of the pictures that the next run takes

    def request(self) -> Request:
        """The current settings. Those left to a model whose defaults are unknown are None."""
        values = {n: getattr(self, n) for n in (*FIELDS, "count", "image")}
        values["strength"] = None if self.image is None or self._known.edits else self.strength
        if not self._known.edits:
            values |= {n: getattr(self, n) for n in PART if n != "mask_blur" or self.masked}
        values |= {f"{what}s": tuple(getattr(self, name)) for what, name in GUIDES.items()}
        values["loras"] = tuple(self.loras) or None  # None: those of `options`
        values["embeddings"] = tuple(self.embeddings) or None
        if self._known.defaults is None:
            values |= {n: None for n in BY_MODEL if values[n] == self._before[n]}
        return asked(values.pop("prompt"), values | self.more)

    def restore(self, request: Request, model: str | None = None) -> None:
        """Take over all settings of a request, and its model if one of that name can be opened here."""
        self.model = self._opens(model)
        self.prompt, self.negative = request.prompt, request.negative
        self.image = request.image  # before the mask, which it removes, and the size, which both change
        for name in (*PART, *FIELDS, "count"):
            value = getattr(request, name)
            if value is not None or self.traits()[name].allow_none:
                setattr(self, name, value)
        self.control_guides = [replace(g, hash=None, model_hash=None) for g in request.controls]
        self.reference_guides = [replace(g, hash=None, model_hash=None) for g in request.references]
        self.loras = list(request.loras or ())
        self.embeddings = list(request.embeddings or ())
        self.locked = self.locked or request.seed is not None
        self.more = unusual(request, self._known.opened)

    def _opens(self, model: str | None) -> str:
        """What opens the model of this name in files, or the current model if it is not known."""
        published = {r.repo.rpartition("/")[2]: n for n, r in MODELS.items() if r.repo}
        known = self._seen | {n: n for n in MODELS} | published
        return known.get(model, self.model)

    @t.validate(*GUIDES.values())
    def _as_guides(self, proposal: dict) -> list[Guide]:
        what = next(what for what, name in GUIDES.items() if name == proposal["trait"].name)
        return list(guides(proposal["value"], what))

    def load(self, png: str | Path | bytes) -> None:
        """Restore the settings stored in a picture by this program, by A1111 or by a similar program."""
        self.restore(*images.read_settings(io.BytesIO(png) if isinstance(png, bytes) else Path(png)))

    # --- what depends on the model

    def _name_model(self) -> None:
        """Another model was named: take its defaults, if they are known."""
        self._known = Known(self.model)
        self._before = {n: getattr(self, n) for n in BY_MODEL}
        self._hurry(False)
        if self._known.defaults is not None:
            self._apply("standard")

    def _open_model(self, model: Description) -> None:
        """The model is open. Settings that were not touched since it was named become the model's defaults."""
        new = self._known.defaults is None
        self._known.open(model)
        if new:
            untouched = [n for n in BY_MODEL if getattr(self, n) == self._before[n]]
            self._set({n: v for n, v in self._preset("standard").items() if n in untouched})

    def _set(self, settings: dict) -> None:
        for name, value in settings.items():
            setattr(self, name, value)

    def _apply(self, preset: str) -> None:
        self._set(self._preset(preset))
        self._hurry(preset == "quick" and self._known.quick is not None)

    def _hurry(self, on: bool) -> None:
        """Draw with the model's own LoRA for few steps, or without it."""
        loras = [text for text in self.loras if dialects.lora(text)[0] != QUICK] + [QUICK] * on
        if loras != self.loras:
            self.loras = loras

    def _preset(self, name: str) -> dict:
        """A preset's settings, but a start picture keeps its shape."""
        return presets(self._known.defaults, self._known.quick)[name] | self._known.shape(self._sizes, self.outpaint)

    def _reshape(self, shape: str) -> None:
        if self._known.defaults is None:
            raise Error(f"The size of {self.model} is not known yet.", "Draw once.")
        self._set(self._known.shaped(shape))

    def _forget(self, *names: str) -> None:
        self.more = {k: v for k, v in self.more.items() if k not in names}

    # --- pictures that the next run takes: the start picture, or those to edit

    @property
    def masked(self) -> bool:
        """Whether only a part of the start picture is drawn anew."""
        return self.mask is not None or any(self.outpaint)

    @property
    def _taken(self) -> tuple:
        return Request("", image=self.image).pictures

    def _add(self, picture: Path) -> None:
        """Give the next run this picture: instead of the last, or beside others to edit if the model takes several."""
        most = self._known.edits
        if most <= 1:
            self.image = picture
        elif len(self._taken) < most:
            self.image = [*self._taken, picture]
        else:
            raise Error(f"{self.model} takes at most {most} pictures to edit.", "Remove one of them first.")

    def _drop(self, i: int) -> None:
        self.image = [p for j, p in enumerate(self._taken) if j != i] or None

    # --- memory

    def _workload(self) -> Workload | None:
        request = self.request()
        if "negative" in ignored(self._known.description, self.guidance, self.more.get("true_cfg", 1.0)):
            request = replace(request, negative=None)
        return self._known.workload(request, self.options)

    def _estimate(self) -> str:
        try:
            workload = self._workload()
        except Error:  # the run itself says what is wrong with the request
            return ""
        return "" if workload is None else estimate(workload, this_machine())

    def _fit(self) -> str:
        """Change settings, as few as possible, until the next picture fits this machine; say which."""
        workload = self._workload()
        if workload is None:
            raise Error(f"{self.model} is not known yet.", "Draw once, or choose a model of the list.")
        settings = fit(workload, this_machine())
        if settings is None:
            raise Error(f"{self.model} fits this machine at no setting.", "Choose a smaller model.")
        for name, value in settings.items():
            if name in ("bits", "low_memory", "refiner"):
                self.options = {**self.options, name: value}
            elif self.has_trait(name):
                setattr(self, name, value)
            else:
                self.more = {**self.more, name: value}
        changed = ", ".join(f"{name.replace('_', ' ')} {_plain(value)}" for name, value in settings.items())
        return f"It should fit now, with {changed}" if changed else "It fits as it is"


def _plain(value) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
