"""The pictures that guide the next one: a row for each control and each reference."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import ipywidgets as w

from .. import images
from ..console import install
from ..guides import Guide
from .start_picture import picture_tag

_ANOTHER = ""


@dataclass(frozen=True)
class Offer:
    """What a model has for its guides. names: of networks that read a picture; inpainters: of those that read the
    masked start picture; aspects: what may be taken over of a reference alone; alone: the model itself reads the
    picture, as it is."""

    names: tuple[str, ...] = ()
    inpainters: tuple[str, ...] = ()
    aspects: tuple[str, ...] = ()
    alone: bool = False


class GuideRows(w.VBox):
    """A row for each guide, which `change` is called with when a person changes one; `edges` is called with its
    number. what: "control" or "reference"."""

    def __init__(self, what: str):
        self.what, self.guides, self.rows = what, [], []
        self._offer = Offer()
        self.change: Callable[[list[Guide]], None] = lambda guides: None
        self.edges: Callable[[int], None] = lambda i: None
        super().__init__(layout=w.Layout(display="none"))
        self.add_class("mlxdiff-guides")

    def show(self, guides: list[Guide], offer: Offer) -> None:
        if (guides, offer) == (self.guides, self._offer):
            return  # a person changed it here: the row has the focus
        self.guides, self._offer = list(guides), offer
        self.rows = [self._row(i, guide) for i, guide in enumerate(guides)]
        self.children = self.rows
        self.layout.display = None if guides else "none"

    def _row(self, i: int, guide: Guide) -> "Row":
        row = Row(self.what, i + 1, guide, self._offer)
        row.remove.on_click(lambda _: self.change([g for j, g in enumerate(self.guides) if j != i]))
        row.edges.on_click(lambda _: self.edges(i))
        row.change = lambda guide: self._put(i, guide)
        return row

    def _put(self, i: int, guide: Guide) -> None:
        self.guides = [guide if j == i else g for j, g in enumerate(self.guides)]
        self.change(list(self.guides))


class Row(w.HBox):
    def __init__(self, what: str, n: int, guide: Guide, offer: Offer):
        self.guide, self.change = guide, lambda guide: None
        names = offer.inpainters if guide.masked else offer.names
        known = guide.model in names
        self.aspect = _aspects(guide, offer) if what == "reference" else None
        self.network = w.Dropdown(
            description=f"{what.title()} network",
            options=[*((name, name) for name in names), ("file or hub id", _ANOTHER)],
            value=guide.model if known else _ANOTHER,
        )
        self.file = w.Text(
            description="Its file",
            value="" if known else self._spelled(),
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
        reader = [self.network, self.file, *([self.aspect] if self.aspect else []), self.scale, self.begin, self.end]
        if not offer.alone or guide.masked:
            parts += reader
        super().__init__(parts)
        self.add_class("mlxdiff-guide")
        for control in reader:
            control.observe(lambda _: self._read(), "value")
        self._name()

    def _name(self) -> None:
        self.file.layout.display = None if self.network.value == _ANOTHER else "none"

    def _read(self) -> None:
        self._name()
        model, mode = self._network()
        interval = (self.begin.value, max(self.begin.value, self.end.value))
        named = {"model": model, "mode": mode, "model_hash": None}
        changed = replace(self.guide, scale=self.scale.value, interval=interval, **named)
        if changed != self.guide:
            self.guide = changed
            self.change(changed)

    def _spelled(self) -> str:
        """The network's file as a person types it: FILE:canny for one kind of picture, of a network that reads several.
        What is taken over of a reference has a list of its own."""
        kind = "" if self.guide.mode is None or self.aspect else f":{self.guide.mode}"
        return "" if self.guide.model is None else f"{self.guide.model}{kind}"

    def _network(self) -> tuple[str | Path | None, str | None]:
        """The network that the row names, and the kind of picture that is said beside it."""
        text = self.network.value or self.file.value.strip()
        same = text == (str(self.guide.model) if self.network.value else self._spelled())
        model, mode = (self.guide.model, self.guide.mode) if same else (text or None, None)
        return model, (self.aspect.value or None) if self.aspect else mode


def _aspects(guide: Guide, offer: Offer) -> w.Dropdown | None:
    """What is taken over of a reference picture, for a model with a choice."""
    said = {guide.mode} - {None, *offer.aspects}  # it came with a picture's settings
    options = [("all of it", ""), *((f"its {name}", name) for name in (*offer.aspects, *said))]
    if len(options) == 1:
        return None
    return w.Dropdown(description="Takes over", options=options, value=guide.mode or "")
