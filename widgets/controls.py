"""The settings as controls, and how a comparison's values are read."""

import html
from collections.abc import Callable

import ipywidgets as w
import traitlets as t

from .. import builtin, samplers, schedules, upscale
from ..errors import Error
from ..families import MODELS
from ..recipe import BITS
from ..request import MAX_SEED
from .guide_rows import GuideRows
from .known import MULTIPLE, SHAPES, Known
from .loras import TITLE, Loras
from .settings import FIELDS, GUIDES, ignored, presets
from .start_picture import StartPicture

_ANOTHER = ""
_WIDE = {"width": "auto"}  # of a control's layout
_REUSE = [("off", 0.0), ("0.1: faster in long runs", 0.1), ("0.2: faster", 0.2), ("0.3: fastest, least exact", 0.3)]


def values(name: str, text: str) -> list:
    """The values typed for one axis of a comparison: 1, 2, 3 or, for prompts, one | another."""
    if name not in FIELDS:
        raise Error(f"{name} is not a setting to compare.", f"Use one of {', '.join(FIELDS)}.")
    parts = [p.strip() for p in text.split("|" if name in ("prompt", "negative") else ",")]
    try:
        read = [FIELDS[name](p) for p in parts if p]
    except ValueError:
        raise Error(f"{text!r} are not all values of {name}.", "Separate them with commas, such as 1, 2, 3.") from None
    if not read:
        raise Error(f"There are no values of {name} to compare.", "Separate them with commas, such as 1, 2, 3.")
    return read


class Controls(w.VBox):
    """One control for each setting. `bind` ties it to the studio's trait of the same name, which holds the truth."""

    def __init__(self, model: str):
        ask, settings = self._asked(), self._settings(model)
        super().__init__([ask, settings])  # in a narrow window the picture comes between the two
        self.add_class("mlxdiff-controls")

    def _asked(self) -> w.Widget:
        """What to draw, the pictures that lead it, and the buttons that start and stop."""
        self.prompt = w.Textarea(description="Prompt", rows=3, layout=_WIDE, placeholder="What to draw")
        self.prompt.add_class("mlxdiff-prompt")
        self.negative = w.Textarea(description="Negative prompt", rows=2, layout=_WIDE, placeholder="What to keep away")
        self.why = w.HTML().add_class("mlxdiff-why")
        self.words = Words()
        self.start_picture = StartPicture()
        self.strength = self.start_picture.strength
        self.guides = {what: GuideRows(what) for what in GUIDES}
        self.generate = w.Button(description="Generate", tooltip="Draw this (Ctrl+Enter)", button_style="primary")
        self.generate.add_class("mlxdiff-generate")
        self.cancel = w.Button(description="Cancel", tooltip="Stop the running picture (Esc)", disabled=True)
        self.clear = w.Button(description="Cancel all", tooltip="Stop the running picture and empty the queue")
        go = w.HBox([self.generate, self.cancel, self.clear]).add_class("mlxdiff-go")
        pictures = [self.start_picture, *self.guides.values()]
        return w.VBox([self.prompt, self.words, self.negative, self.why, *pictures, go]).add_class("mlxdiff-ask")

    def _settings(self, model: str) -> w.Widget:
        """With which model and how."""
        self.model = w.Dropdown(description="Model", options=_models(model), layout=_WIDE).add_class("mlxdiff-beside")
        self.other = w.Text(
            description="Another model",
            continuous_update=False,
            placeholder="hub id, folder, .safetensors or .gguf file",
            layout=w.Layout(width="auto", display="none"),
        )
        names = ("quick", "standard", "fine")
        self.presets = {n: w.Button(description=n.title(), tooltip=f"Set the {n} steps and sampler") for n in names}
        self.more = w.HTML().add_class("mlxdiff-why")
        self.forget = w.Button(description="Forget these", layout=w.Layout(display="none")).add_class("mlxdiff-link")
        rows = [
            self.model,
            self.other,
            w.HBox([*self.presets.values()]).add_class("mlxdiff-presets"),
            self._more_settings(),
            self._seeds(),
            w.HBox([self.more, self.forget]),
            self._panels(),
        ]
        return w.VBox(rows).add_class("mlxdiff-settings")

    def _more_settings(self) -> w.Widget:
        self.steps = w.IntSlider(description="Steps", min=1, max=60, layout=_WIDE)
        self.guidance = w.FloatSlider(
            description="Guidance", min=0, max=15, step=0.5, readout_format=".1f", layout=_WIDE
        )
        self.sampler = w.Dropdown(description="Sampler", layout=_WIDE).add_class("mlxdiff-beside")
        self.schedule = w.Dropdown(description="Schedule", layout=_WIDE).add_class("mlxdiff-beside")
        self.offer(flow=False)
        what = "Reuse the last step's work where less than this share has changed: faster, and slightly different"
        self.reuse = w.Dropdown(description="Reuse", options=_REUSE, tooltip=what, layout=_WIDE)
        self.reuse.add_class("mlxdiff-beside")
        self.shapes = {
            n: w.Button(description=n, tooltip=f"Set a {n.lower()} size that suits the model") for n in SHAPES
        }
        self.width = w.BoundedIntText(description="Width", min=8, max=16384, step=MULTIPLE, layout=_WIDE)
        self.height = w.BoundedIntText(description="Height", min=8, max=16384, step=MULTIPLE, layout=_WIDE)
        self.count = w.BoundedIntText(description="Pictures", min=1, max=1000, layout=_WIDE)
        self.memory = Memory()
        self.bits, self.low_memory = self.memory.bits.add_class("mlxdiff-beside"), self.memory.low_memory
        return _fold(
            "More settings",
            "Steps, guidance, sampler, size, memory",
            self.steps,
            self.guidance,
            w.HBox([self.sampler, self.schedule]).add_class("mlxdiff-two"),
            self.reuse,
            w.HBox([*self.shapes.values()]).add_class("mlxdiff-presets"),
            w.HBox([self.width, self.height, self.count]).add_class("mlxdiff-three"),
            self.memory,
        ).add_class("mlxdiff-roomy")

    def _seeds(self) -> w.Widget:
        # A text field, because a browser's numbers lose the last digits of large seeds.
        self.seed = w.Text(description="Seed", continuous_update=False, layout=_WIDE)
        self.locked = w.ToggleButton(description="Keep", tooltip="Keep this seed for every picture")
        self.dice = w.Button(description="New", tooltip="Another seed")
        self.last = w.Button(description="Last", tooltip="Reuse the last picture's seed, and keep it", disabled=True)
        return w.HBox([self.seed, self.locked, self.dice, self.last]).add_class("mlxdiff-seed")

    def _panels(self) -> w.Widget:
        """LoRAs and words, enlarging and comparing: unfolded beside the other controls."""
        self.loras, self.enlarging, self.compare = Loras(), Enlarging(), Compare()
        self.upscaler = self.enlarging.upscaler
        self.compare.draw.add_class("mlxdiff-compare")
        folds = [
            _fold(TITLE, "Files that change what the model draws, or teach it a word", self.loras, panel=True),
            _fold("Enlarge", "With what the button Enlarge 2× enlarges", self.enlarging, panel=True),
            _fold("Compare", "A grid of pictures over one or two settings", self.compare, panel=True),
        ]
        self.loras_shown = folds[0].children[0]
        return w.HBox(folds).add_class("mlxdiff-folds")

    def entries(self) -> dict[str, w.Widget]:
        """All controls that a run or a comparison reads."""
        settings = {n: getattr(self, n) for n in (*FIELDS, "model", "count", "locked", "bits", "low_memory")}
        names = ("rows", "row_values", "columns", "column_values")
        return settings | {n: getattr(self.compare, n) for n in names}

    def take(self, shown: dict) -> None:
        """Set the controls to what the page shows: the index in a list, the value of any other control."""
        entries = self.entries()
        for name, value in shown.items():
            if value is not None:
                entries[name].set_trait("index" if isinstance(entries[name], w.Dropdown) else "value", value)

    def offer(self, flow: bool) -> None:
        """List the samplers and schedules that a model can use."""
        fit = [n for n, row in samplers.SAMPLERS.items() if row.flow is not None or not flow]
        self.sampler.options = _with_default(fit)
        self.schedule.options = _with_default(schedules.FLOW_SPACINGS if flow else schedules.SPACINGS)

    def judge(self, known: Known, prompt: str, chosen: dict, more: dict, taught: list[str]) -> None:
        """Disable controls that would change nothing now and say why; name the settings that have no control. chosen:
        the settings that presets and shapes set. taught: words."""
        model, edits = known.description, known.edits > 0
        reasons = ignored(model, chosen["guidance"], more.get("true_cfg", 1.0))
        self.strength.disabled = edits
        if edits and self.start_picture.sizes:
            reasons["strength"] = "This model edits: it takes no strength and no mask."
        built_in = model is not None and model.name in builtin.NAMES
        if built_in and (unknown := builtin.notice(model.name, prompt, taught)):
            reasons["prompt"] = unknown
        size = chosen["width"], chosen["height"]
        if built_in and (small := builtin.size_notice(model.name, *size, known.defaults.size)):
            reasons["size"] = small
        self.words.layout.display = None if built_in else "none"
        self.negative.disabled = "negative" in reasons
        self.why.value = html.escape(" ".join(reasons.values()))
        possible = {} if known.defaults is None else presets(known.defaults, known.quick)
        for name, button in self.presets.items():
            button.disabled = name not in possible
            _mark(button, name in possible and chosen.items() >= _settings_of(possible[name]).items())
        for name, button in self.shapes.items():
            _mark(button, known.defaults is not None and chosen.items() >= known.shaped(name).items())
        also = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in more.items())
        self.more.value = html.escape(f"Also set: {also}.") if also else ""
        self.forget.layout.display = None if also else "none"

    def bind(self, studio: t.HasTraits) -> None:
        """Tie every control to its trait, in both directions."""
        for name in ("prompt", "steps", "guidance", "width", "height", "strength", "reuse", "count", "locked"):
            _tie(studio, name, getattr(self, name))
        for name in ("negative", "sampler", "schedule", "upscaler"):
            _tie(studio, name, getattr(self, name), lambda v: "" if v is None else v, lambda v: v or None)
        _tie(studio, "seed", self.seed, str, _seed)
        self.memory.bind(studio)
        # The last row of the list asks for another model; nothing changes until one is named.
        _tie(studio, "model", self.model, str, lambda v: studio.model if v == _ANOTHER else v)
        self.model.observe(lambda change: self._ask(change["new"] == _ANOTHER), "value")
        self.other.observe(lambda change: self._answer(studio, change["new"].strip()), "value")

    def _ask(self, yes: bool) -> None:
        self.other.layout.display = None if yes else "none"

    def _answer(self, studio: t.HasTraits, model: str) -> None:
        if model:
            studio.model = model
            self.model.value, self.other.value = studio.model, ""


class Words(w.VBox):
    """The words that the built-in model knows. The page puts one that is clicked at the end of the prompt."""

    def __init__(self):
        kinds = builtin.vocabulary().items()
        chips = "".join(f"<p>{kind.title()}</p><div>{''.join(map(_chip, words))}</div>" for kind, words in kinds)
        self.surprise = w.Button(description="Surprise me", tooltip="A prompt of random words that the model knows")
        what = "Every word that this model was taught. A click adds one to the prompt"
        unfold = w.ToggleButton(description="Known words", tooltip=what).add_class("mlxdiff-unfold")
        head = w.HBox([unfold, self.surprise]).add_class("mlxdiff-words-head")
        super().__init__([head, w.HTML(chips).add_class("mlxdiff-chips").add_class("mlxdiff-panel")])
        self.add_class("mlxdiff-words-known").add_class("mlxdiff-fold")


class Memory(w.VBox):
    """How the weights are held, and how much memory the next picture takes."""

    def __init__(self):
        gains = {8: ": half the size", 4: ": a quarter"}
        ways = [(f"{n} bits{gains.get(n, '')}" if isinstance(n, int) else n, n) for n in BITS]
        what = "The model's numbers. With fewer bits they need less memory, and are a little less exact; not faster"
        self.bits = w.Dropdown(description="Weights", options=[("full precision", ""), *ways], tooltip=what)
        self.low_memory = w.ToggleButton(description="Low memory", tooltip="Slower, but in less memory")
        self.fit = w.Button(
            description="Fit it to this machine", tooltip="Change settings until the next picture fits this machine"
        )
        self.need = w.HTML().add_class("mlxdiff-why")
        rows = [w.HBox(row).add_class("mlxdiff-memory") for row in ([self.bits], [self.low_memory, self.fit])]
        super().__init__([*rows, self.need])

    def tell(self, estimate: str) -> None:
        self.need.value = html.escape(estimate)

    def bind(self, studio: t.HasTraits) -> None:
        """Tie both controls to the studio's options, which hold more than these two."""

        def show(_=None) -> None:
            self.bits.value = studio.options.get("bits") or ""
            self.low_memory.value = bool(studio.options.get("low_memory"))

        def take(name: str, value) -> None:
            others = {k: v for k, v in studio.options.items() if k != name}
            studio.options = others | ({name: value} if value else {})

        self.bits.observe(lambda change: take("bits", change["new"]), "value")
        self.low_memory.observe(lambda change: take("low_memory", change["new"]), "value")
        studio.observe(show, "options")
        show()


class Enlarging(w.VBox):
    """With what the picture's button Enlarge enlarges."""

    def __init__(self):
        self.upscaler = w.Combobox(
            description="Upscaler",
            options=tuple(upscale.NAMES),
            placeholder="none: smoothly",
            continuous_update=False,
            tooltip="A name, a .safetensors file, or org/repo/file on the hub",
        )
        rows = "".join(f"<br>{name}: {row.title}, {row.download * 1000:.0f} MB" for name, row in upscale.NAMES.items())
        what = "Enlarge 2× draws a picture again, enlarges it, and draws on at that size. An upscaler makes it sharper."
        super().__init__([self.upscaler, w.HTML(what + rows).add_class("mlxdiff-why")])


class Compare(w.VBox):
    """The form of a comparison: two settings and their values, typed as text."""

    def __init__(self):
        two = [n for n in FIELDS if n != "negative"] + ["negative"]
        self.rows = w.Dropdown(description="Rows", options=two, value="seed")
        self.row_values = w.Text(description="Row values", value="1, 2, 3")
        self.columns = w.Dropdown(description="Columns", options=two, value="guidance")
        self.column_values = w.Text(description="Column values", value="1, 3, 7")
        self.draw = w.Button(description="Draw the grid", tooltip="Draw a picture for every pair and one labelled PNG")
        what = "One setting changes from row to row, another from column to column. All else stays as it is."
        super().__init__(
            [
                w.HTML(what).add_class("mlxdiff-why"),
                w.HBox([self.rows, self.row_values]).add_class("mlxdiff-axis"),
                w.HBox([self.columns, self.column_values]).add_class("mlxdiff-axis"),
                self.draw,
            ]
        )

    def axes(self) -> dict[str, list]:
        """The arguments for `Studio.compare`."""
        if self.rows.value == self.columns.value:
            raise Error(f"Rows and columns are both {self.rows.value}.", "Choose two different settings.")
        pairs = ((self.rows.value, self.row_values.value), (self.columns.value, self.column_values.value))
        return {name: values(name, text) for name, text in pairs}


def _tie(
    studio: t.HasTraits,
    name: str,
    control: w.Widget,
    to_control: Callable | None = None,
    to_trait: Callable | None = None,
):
    """Keep a trait and its control equal. A control is first extended if it cannot show the value: its scale grows, or
    its list gets another row."""

    def show(_=None):
        value = getattr(studio, name) if to_control is None else to_control(getattr(studio, name))
        if isinstance(control, w.IntSlider | w.FloatSlider) and value > control.max:
            control.max = value
        if isinstance(control, w.Dropdown) and value not in [v for _, v in control.options]:
            control.options = [(value, value), *control.options]  # first, because new options select the first
        control.value = value

    def take(change):
        try:
            setattr(studio, name, change["new"] if to_trait is None else to_trait(change["new"]))
        except t.TraitError:
            show()

    control.observe(take, "value")
    studio.observe(show, name)
    show()


def _seed(text: str) -> int:
    if not text.strip().isdecimal() or len(text) > 99 or int(text) > MAX_SEED:
        raise t.TraitError(f"{text!r} is not a seed.")
    return int(text)


def _models(extra: str) -> list[tuple[str, str]]:
    rows = []
    for name, row in MODELS.items():
        short = f"{row.title.partition(':')[0]}, built in"  # the list is narrow
        rows.append((short if row.repo is None else f"{row.title}, {row.download:.1f} GB", name))
    return [*rows, *([] if extra in MODELS else [(extra, extra)]), ("Another …", _ANOTHER)]


def _with_default(names) -> list[tuple[str, str]]:
    return [("model's own", ""), *((n, n) for n in names)]  # "", since None would select nothing


def _chip(words: str) -> str:
    return f'<button type="button" class="mlxdiff-chip">{html.escape(words)}</button>'


def _settings_of(preset: dict) -> dict:
    """What a preset sets beside the size."""
    return {k: v for k, v in preset.items() if k not in ("width", "height")}


def _mark(button: w.Button, chosen: bool) -> None:
    (button.add_class if chosen else button.remove_class)("mlxdiff-chosen")


def _fold(title: str, what: str, *children: w.Widget, panel: bool = False) -> w.VBox:
    """A button that unfolds its children; the page does it. No key would reach the titles of an Accordion. what: its
    tooltip. panel: on a page of its own they are shown beside the other controls, not between them."""
    button = w.ToggleButton(description=title, tooltip=what).add_class("mlxdiff-unfold")
    content = w.VBox(children)
    if panel:
        content.add_class("mlxdiff-panel")
    return w.VBox([button, content]).add_class("mlxdiff-fold")
