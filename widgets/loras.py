"""The LoRAs and the taught words of the next picture: a row for each; the files of a folder and the published LoRAs to
choose from."""

import functools
import html
import itertools
import os
import queue
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import ipywidgets as w

from .. import foreign
from ..adapters import Taught
from ..dialects import embedding, lora
from ..errors import Error
from ..families import Beside, Word
from ..store import adapters as store
from .adapter_rows import LoraRow, WordRow, about
from .settings import Settings

_SHOWN = 60  # files in the list; a search finds the others
TITLE = "LoRA, words"
_NO_FOLDER = "Start with `mlxdiff studio --lora-dir DIR` to choose from the files of a folder."


class Loras(w.VBox):
    """`change` is called with the LoRAs that a person chose, `teach` with the words, as a request has them; `named`
    with the name of a published LoRA and what is known of it."""

    def __init__(self):
        self.change: Callable[[list[str]], None] = lambda loras: None
        self.teach: Callable[[list[str]], None] = lambda words: None
        self.named: Callable[[str, Beside], None] = lambda name, row: None
        self.chosen: list[str] = []
        self.taught: list[str] = []
        self.rows: list[LoraRow] = []
        self.words: list[WordRow] = []
        self._files: list[tuple[Path, str]] = []
        self._published: dict[str, Beside] = {}
        self.looks: dict[Path, object] = {}  # of files, and of the names of published ones
        self._rows, self._list = w.VBox(), w.VBox().add_class("mlxdiff-lora-files")
        self._named = w.VBox().add_class("mlxdiff-lora-files")
        self.search = w.Text(description="Search", placeholder="Part of a file's name")
        self.other = w.Text(description="Another LoRA", placeholder="file or hub id", continuous_update=False)
        self.word = w.Text(description="Another word", placeholder="file or hub id, =WORD", continuous_update=False)
        self.note = w.HTML().add_class("mlxdiff-why")
        super().__init__([self._rows, self.search, self._list, self.note, self._named, self.other, self.word])
        self.add_class("mlxdiff-loras")
        self.search.observe(lambda _: self._show_list(), "value")
        self.other.observe(lambda change: self._name(change["new"].strip()), "value")
        self.word.observe(lambda change: self._word(change["new"].strip()), "value")
        self.search.layout.display = "none"

    def show(self, chosen: list[str], taught: list[str], looks: dict[Path, object]) -> None:
        """looks: what is known of files by their headers; of those chosen, and of those of the folder."""
        if (chosen, taught, looks) == (self.chosen, self.taught, self.looks):
            return  # a person changed it here: the row has the focus
        self.chosen, self.taught, self.looks = list(chosen), list(taught), looks
        self.rows = [self._row(i, text) for i, text in enumerate(chosen)]
        self.words = [self._word_row(i, text) for i, text in enumerate(taught)]
        self._rows.children = [*self.rows, *self.words]
        self._show_list()

    def offer(self, files: list[Path], folder: Path | None, note: str, published: dict[str, Beside]) -> None:
        """The files of the folder, and the LoRAs and words with names. note: what to say instead of the files."""
        self._published = published
        self._files = [(path, str(path.relative_to(folder).with_suffix(""))) for path in files]
        self.search.layout.display = None if len(files) > 8 else "none"
        self.note.value = html.escape(note)
        self._show_list()

    def _show_list(self) -> None:
        part, taken = self.search.value.strip().lower(), {lora(text)[0] for text in self.chosen}
        taken |= {embedding(text)[0] for text in self.taught}
        found = [(p, name) for p, name in self._files if part in name.lower() and str(p) not in taken]
        found.sort(key=lambda each: isinstance(self.looks.get(each[0]), Error))  # those that fit are first
        self._list.children = [self._entry(*each) for each in found[:_SHOWN]]
        named = [self._name_entry(name, row) for name, row in self._published.items() if name not in taken]
        heading = w.HTML("By name:").add_class("mlxdiff-why")
        self._named.children = [heading, *named] if named else []

    def _name_entry(self, name: str, row: Beside) -> w.Button:
        button = w.Button(description=name, tooltip=about(row))
        if isinstance(row, Word):
            button.on_click(lambda _: self.teach([*self.taught, name]))
        else:
            button.on_click(lambda _: self.named(name, row))
        return button

    def _entry(self, path: Path, name: str) -> w.Widget:
        look = self.looks.get(path)
        button = w.Button(description=foreign.shown(name, 60), tooltip=f"Draw with {foreign.shown(str(path))}")
        if isinstance(look, Taught):
            button.description += f" · {foreign.shown(look.word, 30)}"
            button.on_click(lambda _: self.teach([*self.taught, str(path)]))
            return button
        button.on_click(lambda _: self._put([*self.chosen, f"{path}:1"]))
        if not isinstance(look, Error):
            return button
        button.disabled, button.tooltip = True, foreign.shown(look.problem)
        said = f"{look.problem} {look.fix}".replace(str(path), path.name)
        reason = w.HTML(html.escape(foreign.shown(said, 160))).add_class("mlxdiff-why")
        return w.VBox([button, reason])

    def _row(self, i: int, text: str) -> LoraRow:
        name, scale = lora(text)
        row = LoraRow(name, 1.0 if scale is None else scale, self.looks.get(Path(name)))
        row.remove.on_click(lambda _: self._put([c for j, c in enumerate(self.chosen) if j != i]))
        row.scale.observe(lambda change: self._scale(i, name, change["new"]), "value")
        return row

    def _word_row(self, i: int, text: str) -> WordRow:
        name, word = embedding(text)
        row = WordRow(name, word, self.looks.get(Path(name)))
        row.remove.on_click(lambda _: self.teach([t for j, t in enumerate(self.taught) if j != i]))
        return row

    def _scale(self, i: int, name: str, scale: float) -> None:
        self.chosen = [f"{name}:{scale:g}" if j == i else c for j, c in enumerate(self.chosen)]
        self.change(list(self.chosen))

    def _name(self, name: str) -> None:
        if name:
            self.other.value = ""
            self._put([*self.chosen, name if lora(name)[0] != name else f"{name}:1"])

    def _word(self, name: str) -> None:
        if name:
            self.word.value = ""
            self.teach([*self.taught, name])

    def _put(self, chosen: list[str]) -> None:
        self.change(chosen)


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
        list_.teach = functools.partial(studio.set_trait, "embeddings")
        list_.named = self._take
        unfold.observe(lambda change: self.look(), "value")

    def look(self) -> None:
        """Show what is chosen, and what there is to choose from once the list is open."""
        studio = self._studio
        n = len(studio.loras) + len(studio.embeddings)
        self._unfold.description = f"{TITLE} ({n})" if n else TITLE
        self._list.show(studio.loras, studio.embeddings, self._list.looks)
        model = studio._known.description
        seen = self._names(), self._unfold.value, model and model.name
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
        named = [Path(name) for name in self._names()]
        looks = {} if model is None else self._looked([*files, *(p for p in named if os.path.isfile(p))], model)
        published = {} if model is None else store.offered(model)
        looks |= {Path(name): row for name, row in published.items() if Path(name) in named and Path(name) not in looks}
        if turn == self._turn:  # else another look has begun since
            self._list.show(self._studio.loras, self._studio.embeddings, looks)
            self._list.offer(files, folder, note, published)
            self._studio._judge()  # the words that are taught are known now

    def taught(self) -> list[str]:
        """The words of the embeddings and LoRAs that are chosen, as far as they are known."""
        chosen = {Path(name): word for name, word in map(embedding, self._studio.embeddings)}
        looks = {path: getattr(look, "word", None) for path, look in self._list.looks.items()}
        learned = [self._list.looks.get(Path(lora(text)[0])) for text in self._studio.loras]
        words = [word for look in learned for word in getattr(look, "words", ())]
        return [word for word in (chosen[path] or looks.get(path) for path in chosen) if word] + words

    def _names(self) -> list[str]:
        """The files and names that are chosen."""
        studio = self._studio
        return [lora(text)[0] for text in studio.loras] + [embedding(text)[0] for text in studio.embeddings]

    def _take(self, name: str, row: Beside) -> None:
        """Draw with a published LoRA, in the settings that it was made for."""
        self._studio.loras = [*self._studio.loras, f"{name}:{row.scale:g}"]
        self._studio._set(row.wants)

    def _looked(self, paths: list[Path], model) -> dict[Path, object]:
        keys = {path: (path, *foreign.stamp(path), model.name) for path in paths}
        new = [path for path, key in keys.items() if key not in self._known]
        self._known |= {keys[path]: found for path, found in store.look(new, model).items()}
        return {path: self._known[key] for path, key in keys.items()}
