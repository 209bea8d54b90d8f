"""The pictures that guide the next one: a row for each control and each reference."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace

import ipywidgets as w

from .. import images
from ..console import install
from ..guides import Guide
from .start_picture import picture_tag

_ANOTHER = ""


class GuideRows(w.VBox):
    """A row for each guide, which `change` is called with when a person changes one; `edges` is called with its
    number. what: "control" or "reference"."""

    def __init__(self, what: str):
        self.what, self.guides, self.rows = what, [], []
        self._names, self._alone = [], False
        self.change: Callable[[list[Guide]], None] = lambda guides: None
        self.edges: Callable[[int], None] = lambda i: None
        super().__init__(layout=w.Layout(display="none"))
        self.add_class("mlxdiff-guides")

    def show(self, guides: list[Guide], names: list[str], alone: bool) -> None:
        """names: of networks that have one for this model. alone: the model itself reads the picture, as it is."""
        if (guides, names, alone) == (self.guides, self._names, self._alone):
            return  # a person changed it here: the row has the focus
        self.guides, self._names, self._alone = list(guides), names, alone
        self.rows = [self._row(i, guide) for i, guide in enumerate(guides)]
        self.children = self.rows
        self.layout.display = None if guides else "none"

    def _row(self, i: int, guide: Guide) -> "Row":
        row = Row(self.what, i + 1, guide, self._names, self._alone)
        row.remove.on_click(lambda _: self.change([g for j, g in enumerate(self.guides) if j != i]))
        row.edges.on_click(lambda _: self.edges(i))
        row.change = lambda guide: self._put(i, guide)
        return row

    def _put(self, i: int, guide: Guide) -> None:
        self.guides = [guide if j == i else g for j, g in enumerate(self.guides)]
        self.change(list(self.guides))


class Row(w.HBox):
    def __init__(self, what: str, n: int, guide: Guide, names: list[str], alone: bool):
        self.guide, self.change = guide, lambda guide: None
        known = guide.model in names
        self.network = w.Dropdown(
            description=f"{what.title()} network",
            options=[*((name, name) for name in names), ("file or hub id", _ANOTHER)],
            value=guide.model if known else _ANOTHER,
        )
        self.file = w.Text(
            description="Its file",
            value="" if known or guide.model is None else str(guide.model),
            placeholder=".safetensors, folder or hub id",
            continuous_update=False,
        )
        number = {"min": 0, "step": 0.05, "readout_format": ".2f"}
        self.scale = w.FloatSlider(description="Scale", max=max(2, guide.scale), value=guide.scale, **number)
        self.begin = w.FloatSlider(description="From", max=1, value=guide.interval[0], **number)
        self.end = w.FloatSlider(description="To", max=1, value=guide.interval[1], **number)
        self.remove = w.Button(description="Remove", tooltip=f"Draw without {what} {n}")
        here = importlib.util.find_spec("cv2") is not None
        self.edges = w.Button(
            description="Make edges of it",
            disabled=not here,
            tooltip="White edges on black, as ControlNets read them"
            if here
            else f"This needs OpenCV: {install('control')}",
        )
        label = f"{what.title()} {n}"
        shown = f"{label}: the masked start picture" if guide.masked else picture_tag(images.read(guide.image), label)
        parts = [w.HTML(shown), self.remove]
        if what == "control" and not guide.masked:
            parts.append(self.edges)
        if not alone:
            parts += [self.network, self.file, self.scale, self.begin, self.end]
        super().__init__(parts)
        self.add_class("mlxdiff-guide")
        for control in (self.network, self.file, self.scale, self.begin, self.end):
            control.observe(lambda _: self._read(), "value")
        self._name()

    def _name(self) -> None:
        self.file.layout.display = None if self.network.value == _ANOTHER else "none"

    def _read(self) -> None:
        self._name()
        model = self.network.value or self.file.value.strip() or None
        interval = (self.begin.value, max(self.begin.value, self.end.value))
        changed = replace(self.guide, model=model, scale=self.scale.value, interval=interval, model_hash=None)
        if changed != self.guide:
            self.guide = changed
            self.change(changed)
