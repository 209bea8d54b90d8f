"""The LoRAs of the next picture: a row for each, and the files of a folder to choose from."""

import functools
import html
import itertools
import queue
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import ipywidgets as w

from .. import foreign
from ..dialects import lora
from ..errors import Error
from ..store import adapters as store
from .settings import Settings

_MOST = 2.0  # of a slider, in both directions
_SHOWN = 60  # files in the list; a search finds the others
_WORDS, _WORD = 8, 40  # trigger words of a LoRA, and characters of one
_NO_FOLDER = "Start with `mlxdiff studio --lora-dir DIR` to choose from the files of a folder."


class Loras(w.VBox):
    """`change` is called with the LoRAs that a person chose, as a request has them."""

    def __init__(self):
        self.change: Callable[[list[str]], None] = lambda loras: None
        self.chosen: list[str] = []
        self.rows: list[Row] = []
        self._files: list[tuple[Path, str, object]] = []
        self.looks: dict[Path, object] = {}
        self._rows, self._list = w.VBox(), w.VBox().add_class("mlxdiff-lora-files")
        self.search = w.Text(description="Search", placeholder="Part of a file's name")
        self.other = w.Text(description="Another LoRA", placeholder="file or hub id", continuous_update=False)
        self.note = w.HTML().add_class("mlxdiff-why")
        super().__init__([self._rows, self.search, self._list, self.note, self.other])
        self.add_class("mlxdiff-loras")
        self.search.observe(lambda _: self._show_list(), "value")
        self.other.observe(lambda change: self._name(change["new"].strip()), "value")
        self.search.layout.display = "none"

    def show(self, chosen: list[str], looks: dict[Path, object]) -> None:
        """looks: what is known of files by their headers; of those chosen, and of those of the folder."""
        if (chosen, looks) == (self.chosen, self.looks):
            return  # a person changed it here: the row has the focus
        self.chosen, self.looks = list(chosen), looks
        self.rows = [self._row(i, text) for i, text in enumerate(chosen)]
        self._rows.children = self.rows
        self._show_list()

    def offer(self, files: list[Path], folder: Path | None, note: str) -> None:
        """The files of the folder. note: what to say instead of them."""
        self._files = [(path, str(path.relative_to(folder).with_suffix(""))) for path in files]
        self.search.layout.display = None if len(files) > 8 else "none"
        self.note.value = html.escape(note)
        self._show_list()

    def _show_list(self) -> None:
        part, taken = self.search.value.strip().lower(), {lora(text)[0] for text in self.chosen}
        found = [(p, name) for p, name in self._files if part in name.lower() and str(p) not in taken]
        found.sort(key=lambda each: isinstance(self.looks.get(each[0]), Error))  # those that fit are first
        self._list.children = [self._entry(*each) for each in found[:_SHOWN]]

    def _entry(self, path: Path, name: str) -> w.Widget:
        look = self.looks.get(path)
        button = w.Button(description=foreign.shown(name, 60), tooltip=f"Draw with {foreign.shown(str(path))}")
        button.on_click(lambda _: self._put([*self.chosen, f"{path}:1"]))
        if not isinstance(look, Error):
            return button
        button.disabled, button.tooltip = True, foreign.shown(look.problem)
        reason = w.HTML(html.escape(foreign.shown(f"{look.problem} {look.fix}", 160))).add_class("mlxdiff-why")
        return w.VBox([button, reason])

    def _row(self, i: int, text: str) -> "Row":
        name, scale = lora(text)
        row = Row(name, 1.0 if scale is None else scale, self.looks.get(Path(name)))
        row.remove.on_click(lambda _: self._put([c for j, c in enumerate(self.chosen) if j != i]))
        row.scale.observe(lambda change: self._scale(i, name, change["new"]), "value")
        return row

    def _scale(self, i: int, name: str, scale: float) -> None:
        self.chosen = [f"{name}:{scale:g}" if j == i else c for j, c in enumerate(self.chosen)]
        self.change(list(self.chosen))

    def _name(self, name: str) -> None:
        if name:
            self.other.value = ""
            self._put([*self.chosen, name if lora(name)[0] != name else f"{name}:1"])

    def _put(self, chosen: list[str]) -> None:
        self.change(chosen)


class Row(w.VBox):
    """look: what the header says, an Error, or None if that is not known."""

    def __init__(self, name: str, scale: float, look: object):
        self.title = w.HTML(f"<b>{html.escape(foreign.shown(Path(name).stem, 60))}</b>").add_class("mlxdiff-lora-name")
        self.title.tooltip = foreign.shown(name)
        self.remove = w.Button(description="Remove", tooltip=f"Draw without {foreign.shown(Path(name).stem, 60)}")
        most = max(_MOST, abs(scale))
        self.scale = w.FloatSlider(
            description="Scale", min=-most, max=most, step=0.05, value=scale, readout_format=".2f"
        )
        about, words = "It is looked at when it is drawn with.", ()
        if isinstance(look, Error):
            about = f"{look.problem} {look.fix}"
        elif look is not None:
            about, words = str(look), look.words
        self.about = w.HTML(html.escape(foreign.shown(about, 240))).add_class("mlxdiff-why")
        chips = "".join(map(_chip, words[:_WORDS]))
        self.words = w.HTML(f"<div>{chips}</div>" if chips else "").add_class("mlxdiff-chips")
        head = w.HBox([self.title, self.remove]).add_class("mlxdiff-lora-head")
        super().__init__([head, self.scale, self.about, *([self.words] if chips else [])])
        self.add_class("mlxdiff-lora")
        if isinstance(look, Error):
            self.add_class("mlxdiff-misfit")


def _chip(word: str) -> str:
    text = " ".join(foreign.shown(word, _WORD).split())
    return f'<button type="button" class="mlxdiff-chip" title="Add it to the prompt">{html.escape(text)}</button>'


class Picker:
    """Looks at the folder's files for one studio, on a thread of its own: hundreds of headers take seconds. A look
    builds networks, and MLX aborts in some exits of a process in which a thread that did so has ended: so this one does
    not end."""

    def __init__(self, studio: Settings, list_: Loras, unfold: w.ToggleButton):
        self._studio, self._list, self._unfold = studio, list_, unfold
        self._turns, self._turn = itertools.count(1), 0
        self._known: dict[tuple, object] = {}  # by file, time, size and model
        self._seen: tuple = ()  # what the last look was for
        self._asked: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.rests = threading.Event()  # set after the last look
        list_.change = functools.partial(studio.set_trait, "loras")
        unfold.observe(lambda change: self.look(), "value")

    def look(self) -> None:
        """Show what is chosen, and what there is to choose from once the list is open."""
        n = len(self._studio.loras)
        self._unfold.description = f"LoRA ({n})" if n else "LoRA"
        self._list.show(self._studio.loras, self._list.looks)
        model = self._studio._known.description
        seen = [lora(text)[0] for text in self._studio.loras], self._unfold.value, model and model.name
        if seen == self._seen or not (n or self._unfold.value):
            return
        self._seen, self._turn = seen, next(self._turns)
        self.rests.clear()
        self._asked.put(self._turn)
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, daemon=True)
            self._thread.start()

    def _loop(self) -> None:
        while True:
            turn = self._asked.get()
            try:
                if turn == self._turn:  # else another look has been asked for since
                    self._look(turn)
            except Exception:
                traceback.print_exc()
            if turn == self._turn:
                self.rests.set()

    def _look(self, turn: int) -> None:
        model, folder, note = self._studio._known.description, store.usual_folder(), ""
        folder = folder and folder.absolute()
        files = [] if folder is None or not self._unfold.value else store.files(folder)
        if folder is None:
            note = _NO_FOLDER
        elif not files:
            note = f"{foreign.shown(str(folder))} has no .safetensors files."
        elif model is None:
            note = "Which of them fit is known once the model has drawn."
        named = [Path(lora(text)[0]) for text in self._studio.loras]
        looks = {} if model is None else self._looked([*files, *(p for p in named if p.is_file())], model)
        if turn == self._turn:  # else another look has begun since
            self._list.show(self._studio.loras, looks)
            self._list.offer(files, folder, note)

    def _looked(self, paths: list[Path], model) -> dict[Path, object]:
        keys = {path: (path, *foreign.stamp(path), model.name) for path in paths}
        new = [path for path, key in keys.items() if key not in self._known]
        self._known |= {keys[path]: found for path, found in store.look(new, model).items()}
        return {path: self._known[key] for path, key in keys.items()}
