"""The right half of the studio, which ipywidgets cannot draw: canvas, progress, history, file drop, shortcuts.

It mirrors Python state. Traits hold what a reopened page must show; previews are messages, shown once and forgotten.
The page only sends messages. They are dicts whose `do` is generate, compare, cancel; view, restore, seed, begin,
paint, before, copy, enlarge, star, delete (with a picture of the history); sketch; drop, mask (with bytes); outpaint,
soften (with numbers)."""

import re
import traceback
from pathlib import Path

import anywidget
import traitlets as t

from ..errors import Error
from ..spelling import as_controls
from .gallery import Picture
from .worker import Update

STRIP = 100  # thumbnails kept on the page
_STAGES = {
    "open": "Opening the model",
    "download": "Downloading",
    "convert": "Converting the model, once",
    "check": "Noting what was written",
    "encode": "Reading the prompt",
    "load": "Loading the weights",
    "decode": "Making pixels",
    "upscale": "Enlarging",
}


_HERE = Path(__file__).parent


def _module(name: str) -> str:
    """A script with what it imports inside: Jupyter takes a single one."""
    text = (_HERE / name).read_text(encoding="utf-8")
    inside = lambda found: _module(found[1]).replace("export function", "function")  # noqa: E731
    return re.sub(r'^import .* from "\./(\w+\.js)";$', inside, text, flags=re.MULTILINE)


class View(anywidget.AnyWidget):
    _esm = _module("studio.js")
    _css = "".join((_HERE / name).read_text(encoding="utf-8") for name in ("theme.css", "studio.css", "painting.css"))

    controls = t.Dict().tag(sync=True)  # name -> widget id of the control; the page sends their values with a run
    turn = t.Int(0).tag(sync=True)  # grows after something other than its control has changed a setting
    status = t.Unicode("Ready").tag(sync=True)
    spoken = t.Unicode("").tag(sync=True)  # for screen readers: the stages of a run, not every step
    progress = t.Float(0.0).tag(sync=True)  # 0 to 1; below 0 if unknown
    running = t.Bool(False).tag(sync=True)
    edits = t.Bool(False).tag(sync=True)  # whether the model edits the pictures it is given
    uses = t.List().tag(sync=True)  # what a picture from the page may be for: dicts of name, label, why not ("")
    unpaintable = t.Unicode("").tag(sync=True)  # why this model draws no part of a picture anew; "" if it does
    sketches = t.Bool(False).tag(sync=True)  # whether the model has a network that reads a sketch
    paper = t.Dict().tag(sync=True)  # png, width, height, sketch: what is painted on; empty without one
    mask = t.Dict({"id": "", "png": b""}).tag(sync=True)  # the paint, and who painted it
    around = t.Dict().tag(sync=True)  # sides, inner, step, blur: see Painting
    error = t.Dict().tag(sync=True)  # problem, fix, trace
    shown = t.Dict().tag(
        sync=True
    )  # key, png, title, words, caption, name, unenlargeable, began, path: the picture on the canvas
    history = t.List().tag(sync=True)  # dicts of key, title, thumb, star

    _parts: tuple[bytes, ...] = ()  # of a dropped file, received so far
    _file: str | None = None  # which one

    def whole(self, message: dict, buffers: list) -> bytes | None:
        """Add a part of a dropped file; return the file when it is complete. A single large message would end the
        connection to the kernel. Raises if another page drops one at the same time."""
        kept = self._parts if message["part"] else ()
        if len(kept) != message["part"] or (kept and self._file != message.get("file")):
            raise Error("Two files were dropped at the same time.", "Drop them one after the other.")
        self._parts, self._file = (*kept, bytes(buffers[0])), message.get("file")
        return b"".join(self._parts) if message["part"] + 1 == message["parts"] else None

    def say(self, text: str, progress: float = 0.0, aloud: bool = True) -> None:
        with self.hold_sync():
            self.status, self.progress = text, progress
            if aloud:
                self.spoken = text

    def fail(self, error: BaseException) -> None:
        """Show the error in red, with its traceback folded. Screen readers read the page's alert without `spoken`."""
        known = isinstance(error, Error)
        plain = (error.problem, error.fix) if known else (f"{type(error).__name__}: {error}", "")
        plain = [as_controls(text) for text in plain]
        self.say(" ".join(plain).strip(), aloud=False)
        self.error = {"problem": plain[0], "fix": plain[1], "trace": "".join(traceback.format_exception(error))}

    def clear(self) -> None:
        """Take the error away: the person has done something else."""
        if self.error:
            self.error = {}
            self.say("Ready", aloud=False)

    def frame(self, jpeg: bytes, title: str) -> None:
        """Show a preview."""
        self.send({"do": "frame", "title": title}, [jpeg])

    def show(self, key: int, picture: Picture) -> None:
        path, here = picture.path, Path.cwd()
        self.shown = {
            "key": key,
            "png": picture._repr_png_(),
            "title": picture.title or picture.request.prompt or "no prompt",
            "words": picture.words(),
            "caption": picture.caption(),
            "name": path.name,
            "unenlargeable": picture.unenlargeable(),
            "began": bool(picture.request.pictures) and not picture.title,
            "path": str(path.relative_to(here) if path.is_relative_to(here) else path),
        }


def line(update: Update) -> tuple[str, float]:
    """The progress of a run: in words, and as a fraction, which is below 0 if unknown."""
    text = _STAGES.get(update.stage, "")
    if update.stage == "denoise" and update.pace is None:
        return "First step, the slowest", 0.0
    if update.stage == "denoise":
        left = seconds(update.pace * (update.steps - update.step))
        text = f"Step {update.step} of {update.steps} · {update.pace:.2f} s a step · {left} left · {size(update.peak)}"
        return text, update.step / update.steps
    if update.stage in ("download", "convert", "check") and update.steps:
        done = update.step / update.steps
        return f"{text} · {done:.0%} of {size(update.steps)}", done
    if update.stage in ("decode", "upscale") and update.steps > 1:
        text += f" · {min(update.step + 1, update.steps)} of {update.steps}"
    return text, -1.0


def seconds(s: float) -> str:
    return f"{s:.1f} s" if s < 10 else f"{s:.0f} s" if s < 100 else f"{s // 60:.0f} min {s % 60:.0f} s"


def size(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"
