"""The right half of the studio, which ipywidgets cannot draw: canvas, progress, history, file drop, shortcuts.

A mirror of Python state. Traits hold what a page opened again must show; previews are messages, shown and forgotten.
The page only sends messages, each a dict with `do`: generate, cancel, view, restore, seed, drop (with the file's bytes)."""

from pathlib import Path

import anywidget
import traitlets as t


class View(anywidget.AnyWidget):
    _esm = Path(__file__).with_name("studio.js")
    _css = Path(__file__).with_name("studio.css")

    status = t.Unicode("Ready").tag(sync=True)
    spoken = t.Unicode("").tag(sync=True)  # for screen readers: the turns of a run, not its every step
    progress = t.Float(0.0).tag(sync=True)  # 0 to 1; below 0 when nobody can know
    running = t.Bool(False).tag(sync=True)
    error = t.Dict().tag(sync=True)  # problem, fix, trace
    shown = t.Dict().tag(sync=True)  # png, title, caption, name, path, key: the picture on the canvas
    history = t.List().tag(sync=True)  # dicts of key, title, thumb

    def frame(self, jpeg: bytes, title: str) -> None:
        """Show a preview."""
        self.send({"do": "frame", "title": title}, [jpeg])
