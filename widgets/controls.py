"""The settings as controls, and what is known about them: presets, which of them a model ignores, values of an axis."""

import html
from collections.abc import Callable
from dataclasses import fields

import ipywidgets as w
import traitlets as t

from .. import builtin, dialects, samplers, schedules
from ..description import Description
from ..errors import Error
from ..families import MODELS, Defaults
from ..families.base import SECOND_PASS
from ..request import MAX_SEED, Request
from .begin import Begin

# Request fields that have a control, with how one value of a comparison is read from text.
FIELDS: dict[str, Callable] = {
    "seed": int,
    "steps": int,
    "guidance": float,
    "sampler": str,
    "schedule": str,
    "width": int,
    "height": int,
    "strength": float,
    "prompt": str,
    "negative": str,
}
MULTIPLE = 64  # pixels: what edges are multiples of until a model is open, right for all
_ANOTHER = ""
_QUICK, _FINE = 0.4, 2.0  # of the model's own steps


def presets(defaults: Defaults) -> dict[str, dict]:
    """What the three buttons set. Models made for a few steps have only the one way they were made for."""
    own = {
        "steps": defaults.steps,
        "guidance": defaults.guidance,
        "width": defaults.size,
        "height": defaults.size,
        "sampler": None,
        "schedule": None,
    }
    if defaults.steps < 10:
        return {"standard": own}
    solver = {"sampler": "dpmpp_2m"}  # of second order, and for every family
    return {
        "quick": own | solver | {"steps": round(defaults.steps * _QUICK)},
        "standard": own,
        "fine": own | solver | {"steps": round(defaults.steps * _FINE)},
    }


def ignored(model: Description | None, guidance: float, true_cfg: float) -> dict[str, str]:
    """The controls that change nothing now, with the reason. true_cfg: Request's, a second pass for FLUX."""
    one_pass = model is not None and model.guidance != SECOND_PASS
    if one_pass and true_cfg <= 1:
        return {"negative": f"{model.name} draws in one pass: it has no place for a negative prompt."}
    if guidance <= 1 and not one_pass:
        return {"negative": "Not used at guidance 1 or below: nothing is subtracted there."}
    return {}


def unusual(request: Request, model: Description | None) -> dict:
    """The fields without a control that are not as they would be had nobody set them."""
    plain, own = Request(""), {}
    if model is not None:
        own["clip_skip"] = model.family.clip_skip
    if request.sampler is not None:
        own["eta"] = samplers.SAMPLERS[dialects.sampler(request.sampler)[0]].eta
    shown = (*FIELDS, "count", "image", "image_hash")
    found = {f.name: getattr(request, f.name) for f in fields(Request) if f.name not in shown}
    return {n: v for n, v in found.items() if v not in (getattr(plain, n), own.get(n))}


def values(name: str, text: str) -> list:
    """The values typed for one axis of a comparison: 1, 2, 3 or, for prompts, one | another."""
    if name not in FIELDS:
        raise Error(f"{name} is not a setting to compare.", f"Use one of {', '.join(FIELDS)}.")
    parts = [p.strip() for p in text.split("|" if name in ("prompt", "negative") else ",")]
    try:
        found = [FIELDS[name](p) for p in parts if p]
    except ValueError:
        raise Error(f"{text!r} are not values of {name}.", "Separate them with commas, such as 1, 2, 3.") from None
    if not found:
        raise Error(f"There are no values of {name} to compare.", "Separate them with commas, such as 1, 2, 3.")
    return found


class Controls(w.VBox):
    """One control a setting. `bind` ties each to the trait of the same name, which is the truth."""

    def __init__(self, model: str):
        wide = w.Layout(width="auto")
        self.prompt = w.Textarea(description="Prompt", rows=3, layout=wide, placeholder="What to draw")
        self.negative = w.Textarea(description="Negative prompt", rows=2, layout=wide, placeholder="What to keep away")
        self.why = w.HTML().add_class("mlxdiff-why")
        self.begin = Begin()
        self.strength = self.begin.strength
        self.generate = w.Button(description="Generate", tooltip="Draw this (Ctrl+Enter)", button_style="primary")
        self.cancel = w.Button(description="Cancel", tooltip="Stop the running picture (Esc)", disabled=True)
        self.clear = w.Button(description="Cancel all", tooltip="Stop the running picture and empty the queue")
        self.model = w.Dropdown(description="Model", options=_models(model), layout=wide)
        self.other = w.Text(
            description="Another model",
            continuous_update=False,
            placeholder="hub id, folder or .safetensors file",
            layout=w.Layout(width="auto", display="none"),
        )
        names = ("quick", "standard", "fine")
        self.presets = {n: w.Button(description=n.title(), tooltip=f"Set {n} steps and sampler") for n in names}
        self.steps = w.IntSlider(description="Steps", min=1, max=60, layout=wide)
        self.guidance = w.FloatSlider(
            description="Guidance", min=0, max=15, step=0.5, readout_format=".1f", layout=wide
        )
        self.sampler = w.Dropdown(description="Sampler", layout=wide)
        self.schedule = w.Dropdown(description="Schedule", layout=wide)
        self.offer(flow=False)
        self.width = w.BoundedIntText(description="Width", min=8, max=16384, step=MULTIPLE, layout=wide)
        self.height = w.BoundedIntText(description="Height", min=8, max=16384, step=MULTIPLE, layout=wide)
        self.count = w.BoundedIntText(description="Pictures", min=1, max=1000, layout=wide)
        # Text and not a number: a browser's numbers lose the last digits of large seeds.
        self.seed = w.Text(description="Seed", continuous_update=False, layout=wide)
        self.locked = w.ToggleButton(icon="lock", tooltip="Keep this seed for every picture")
        self.dice = w.Button(icon="random", tooltip="Another seed")
        self.reuse = w.Button(icon="history", tooltip="Reuse the last picture's seed, and keep it", disabled=True)
        self.more = w.HTML().add_class("mlxdiff-why")
        self.forget = w.Button(description="Forget these", layout=w.Layout(display="none")).add_class("mlxdiff-link")
        self.compare = Compare()
        go = _row("mlxdiff-go", self.generate, self.cancel, self.clear)
        ask = w.VBox([self.prompt, self.negative, self.why, self.begin, go]).add_class("mlxdiff-ask")
        settings = w.VBox(
            [
                self.model,
                self.other,
                _row("mlxdiff-presets", *self.presets.values()),
                _fold(
                    "More settings",
                    self.steps,
                    self.guidance,
                    _row("mlxdiff-two", self.sampler, self.schedule),
                    _row("mlxdiff-three", self.width, self.height, self.count),
                ).add_class("mlxdiff-roomy"),
                _row("mlxdiff-seed", self.seed, self.locked, self.dice, self.reuse),
                w.HBox([self.more, self.forget]),
                _fold("Compare settings", self.compare),
            ]
        ).add_class("mlxdiff-settings")
        super().__init__([ask, settings])  # in a narrow window the picture comes between the two
        self.add_class("mlxdiff-controls")
        self.generate.add_class("mlxdiff-generate")
        self.compare.draw.add_class("mlxdiff-compare")

    def entries(self) -> dict[str, w.Widget]:
        """Everything that a run or a comparison reads."""
        own = {n: getattr(self, n) for n in (*FIELDS, "model", "count", "locked")}
        names = ("rows", "row_values", "columns", "column_values")
        return own | {n: getattr(self.compare, n) for n in names}

    def take(self, found: dict) -> None:
        """What the page shows: values, and of lists the index."""
        entries = self.entries()
        for name, value in found.items():
            if value is not None:
                entries[name].set_trait("index" if isinstance(entries[name], w.Dropdown) else "value", value)

    def offer(self, flow: bool) -> None:
        """List the samplers and schedules that a model can take."""
        fit = [n for n, row in samplers.SAMPLERS.items() if row.flow is not None or not flow]
        self.sampler.options = _or_own(fit)
        self.schedule.options = _or_own(schedules.FLOW_SPACINGS if flow else schedules.SPACINGS)

    def judge(
        self, model: Description | None, defaults: Defaults | None, prompt: str, guidance: float, more: dict
    ) -> None:
        """Disable what would change nothing now, and say why; name what is set and has no control."""
        reasons = ignored(model, guidance, more.get("true_cfg", 1.0))
        if model is not None and model.name == builtin.NAME and (unknown := builtin.notice(prompt)):
            reasons["prompt"] = unknown
        self.negative.disabled = "negative" in reasons
        self.why.value = html.escape(" ".join(reasons.values()))
        known = {} if defaults is None else presets(defaults)
        for name, button in self.presets.items():
            button.disabled = name not in known
        also = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in more.items())
        self.more.value = html.escape(f"Also set: {also}.") if also else ""
        self.forget.layout.display = None if also else "none"

    def bind(self, studio: t.HasTraits) -> None:
        """Every setting both ways."""
        for name in ("prompt", "steps", "guidance", "width", "height", "strength", "count", "locked"):
            _tie(studio, name, getattr(self, name))
        for name in ("negative", "sampler", "schedule"):
            _tie(studio, name, getattr(self, name), lambda v: "" if v is None else v, lambda v: v or None)
        _tie(studio, "seed", self.seed, str, _seed)
        # The last row of the list is no model: it asks for one, and changes nothing until it is named.
        _tie(studio, "model", self.model, str, lambda v: studio.model if v == _ANOTHER else v)
        self.model.observe(lambda change: self._ask(change["new"] == _ANOTHER), "value")
        self.other.observe(lambda change: self._answer(studio, change["new"].strip()), "value")

    def _ask(self, yes: bool) -> None:
        self.other.layout.display = None if yes else "none"

    def _answer(self, studio: t.HasTraits, model: str) -> None:
        if model:
            studio.model = model
            self.model.value, self.other.value = studio.model, ""


class Compare(w.VBox):
    """Two settings and, as text, their values."""

    def __init__(self):
        two = [n for n in FIELDS if n != "negative"] + ["negative"]
        self.rows = w.Dropdown(description="Rows", options=two, value="seed")
        self.row_values = w.Text(description="Row values", value="1, 2, 3")
        self.columns = w.Dropdown(description="Columns", options=two, value="guidance")
        self.column_values = w.Text(description="Column values", value="1, 3, 7")
        self.draw = w.Button(description="Draw the grid", tooltip="A picture for every pair, then one labelled PNG")
        super().__init__(
            [
                _row("mlxdiff-axis", self.rows, self.row_values),
                _row("mlxdiff-axis", self.columns, self.column_values),
                self.draw,
            ]
        )

    def axes(self) -> dict[str, list]:
        """What `Studio.compare` takes."""
        if self.rows.value == self.columns.value:
            raise Error(f"Rows and columns are both {self.rows.value}.", "Choose two different settings.")
        pairs = ((self.rows.value, self.row_values.value), (self.columns.value, self.column_values.value))
        return {name: values(name, text) for name, text in pairs}


def _tie(
    studio: t.HasTraits, name: str, control: w.Widget, there: Callable | None = None, back: Callable | None = None
):
    """Keep a trait and its control equal. What a control cannot show, it first learns: longer scales, other models."""

    def show(_=None):
        value = getattr(studio, name) if there is None else there(getattr(studio, name))
        if isinstance(control, w.IntSlider | w.FloatSlider) and value > control.max:
            control.max = value
        if isinstance(control, w.Dropdown) and value not in [v for _, v in control.options]:
            control.options = [(value, value), *control.options]  # first: new options select the first of them
        control.value = value

    def take(change):
        try:
            setattr(studio, name, change["new"] if back is None else back(change["new"]))
        except t.TraitError:
            show()

    control.observe(take, "value")
    studio.observe(show, name)
    show()


def _seed(text: str) -> int:
    if not text.strip().isdecimal() or int(text) > MAX_SEED:
        raise t.TraitError(f"{text!r} is not a seed.")
    return int(text)


def _models(extra: str) -> list[tuple[str, str]]:
    rows = [
        (row.title if row.repo is None else f"{row.title}, {row.download / 1e9:.1f} GB", name)
        for name, row in MODELS.items()
    ]
    return [*rows, *([] if extra in MODELS else [(extra, extra)]), ("Another …", _ANOTHER)]


def _or_own(names) -> list[tuple[str, str]]:
    return [("model's own", ""), *((n, n) for n in names)]  # "" and not None, which selects nothing


def _fold(title: str, *children: w.Widget) -> w.VBox:
    """A button, and what it shows. Not an Accordion, whose titles no key reaches; the page does the folding."""
    button = w.ToggleButton(description=title, icon="caret-right").add_class("mlxdiff-unfold")
    return w.VBox([button, w.VBox(children)]).add_class("mlxdiff-fold")


def _row(kind: str, *children: w.Widget) -> w.HBox:
    return w.HBox(children).add_class(kind)
