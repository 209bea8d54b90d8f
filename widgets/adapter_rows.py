"""What the next picture is drawn with beside the model: a row for each LoRA, and one for each taught word."""

import html
from pathlib import Path

import ipywidgets as w

from .. import foreign
from ..errors import Error
from ..families import Beside, Lora

_MOST = 2.0  # of a slider, in both directions
_WORDS, _WORD = 8, 40  # trigger words of a LoRA, and characters of one
_UNSEEN = "It is looked at when it is drawn with."


class _Row(w.VBox):
    """look: what is known of the file, an Error, or None."""

    def __init__(self, name: str, look: object, about: str, words: tuple[str, ...], *controls: w.Widget):
        called = foreign.shown(Path(name).stem, 60)
        self.title = w.HTML(f"<b>{html.escape(called)}</b>").add_class("mlxdiff-lora-name")
        self.title.tooltip = foreign.shown(name)
        self.remove = w.Button(description="Remove", tooltip=f"Draw without {called}")
        if isinstance(look, Error):
            about = f"{look.problem} {look.fix}"
        self.about = w.HTML(html.escape(foreign.shown(about, 240))).add_class("mlxdiff-why")
        chips = "".join(map(_chip, words[:_WORDS]))
        self.words = w.HTML(f"<div>{chips}</div>" if chips else "").add_class("mlxdiff-chips")
        head = w.HBox([self.title, self.remove]).add_class("mlxdiff-lora-head")
        super().__init__([head, *controls, self.about, *([self.words] if chips else [])])
        self.add_class("mlxdiff-lora")
        if isinstance(look, Error):
            self.add_class("mlxdiff-misfit")


class LoraRow(_Row):
    def __init__(self, name: str, scale: float, look: object):
        most = max(_MOST, abs(scale))
        self.scale = w.FloatSlider(
            description="Scale", min=-most, max=most, step=0.05, value=scale, readout_format=".2f"
        )
        what = _UNSEEN if look is None else about(look) if isinstance(look, Lora) else str(look)
        super().__init__(name, look, what, getattr(look, "words", ()), self.scale)


class WordRow(_Row):
    """word: what the request calls it; None: as the file does."""

    def __init__(self, name: str, word: str | None, look: object):
        word = getattr(look, "word", None) if word is None else word
        what = _UNSEEN if look is None else f"{str(look).capitalize()}. It counts where the prompt has it:"
        super().__init__(name, look, what, () if word is None else (word,))


def about(row: Beside) -> str:
    """What people should know of a LoRA or an embedding that has a name, before they take it."""
    wants = row.wants if isinstance(row, Lora) else {}
    made = f", made for {wants['steps']} steps at guidance {wants['guidance']:g}" if wants else ""
    place = "built in" if row.repo is None else f"{row.size * 1000:.0f} MB from the hub, once"
    return f"{row.kind}{made}; {place}; licence {row.licence}."


def _chip(word: str) -> str:
    text = " ".join(foreign.shown(word, _WORD).split())
    return f'<button type="button" class="mlxdiff-chip" title="Add it to the prompt">{html.escape(text)}</button>'
