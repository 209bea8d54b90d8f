"""What all lessons share: one idea, controls, a figure, the figure in words, and one thing to try.

A lesson is a subclass. Its `work` runs on the worker's thread (see worker.py) and returns numbers and pictures; its
`figure` and `words` show them and do not touch MLX. When a control in `asks` moves, `work` runs again, with the values
of all controls in `asks` as arguments. When any other control moves, the lesson is only redrawn."""

import base64
import functools
import html
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ipywidgets as w
import matplotlib as mpl
import traitlets as t
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image

from ...families import DEFAULT
from ..worker import Job, Update, Worker, shared
from .sheet import Sheet

BLUE, ORANGE, GREEN, RED, GREY = "#2f6fb7", "#d9822b", "#3d8f5f", "#b8434e", "#8a8f98"
_STYLE = {
    "font.size": 9,
    "font.family": "DejaVu Sans",  # it comes with matplotlib, so it is the same everywhere
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": mpl.cycler(color=[BLUE, ORANGE, GREEN, RED, GREY]),
    "axes.titlesize": 9,
    "image.interpolation": "nearest",
    "legend.frameon": False,
    # A reader's style would change these. Lessons are black on white, whatever the notebook's plots look like.
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "white"),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "black"),
    "axes.grid": False,
}
_DPI, _SHOWN = 144, 120  # pixels per inch in the file, and at most on the page
_drawing = threading.Lock()  # matplotlib keeps its style and its fonts for the whole process
Report = Callable[..., None]  # reports progress: steps done, of how many, and perhaps a function for the data so far


class Lesson(w.VBox):
    """A cell that shows a lesson waits for its work. Then it is live; a saved notebook keeps all but the controls."""

    title = ""
    idea = ""  # one sentence
    trying = ""  # what to do with the controls
    model = DEFAULT

    data = t.Any(None, help="what `work` last returned")
    error = t.Any(None, help="the last error; `raise lesson.error` shows where it was raised")

    def __init__(self, *controls: w.Widget, asks: dict[str, w.Widget] | None = None, worker: Worker | None = None):
        self._worker = shared() if worker is None else worker
        self._job: Job | None = None
        self._asks = {} if asks is None else asks
        self._turn = 0  # the number of the newest request
        self.asked = self.settings()  # the settings that `data` belong to: the controls may have moved since
        self._showing = threading.RLock()  # data arrive on one thread while controls move on another
        self.bar = w.FloatProgress(max=1.0, layout=w.Layout(width="auto", height="6px", visibility="hidden"))
        self.bar.add_class("mlxdiff-lesson-bar")
        self.said = w.HTML().add_class("mlxdiff-lesson-status")
        self.image = Sheet()
        self.caption = w.HTML().add_class("mlxdiff-lesson-caption")
        super().__init__(
            [
                w.HTML(f"<b>{self.title}.</b> {self.idea}").add_class("mlxdiff-lesson-title"),
                *([_row(*controls).add_class("mlxdiff-lesson-controls")] if controls else []),
                self.bar,
                self.image,
                self.caption,
                w.HTML(f"<b>Try this.</b> {self.trying}").add_class("mlxdiff-lesson-try"),
                self.said,
            ]
        )
        self.add_class("mlxdiff-lesson")
        for control in self._asks.values():
            control.observe(lambda _: self.ask(), "value")
        for control in controls:
            for part in (control, *getattr(control, "children", ())):
                # A Play needs no observer: it moves a slider, and the slider redraws.
                if part not in self._asks.values() and not isinstance(part, w.Play):
                    part.observe(lambda _: self._show(), "value")

    # --- what each lesson defines

    def work(self, pipe, report: Report) -> object:
        """Do everything that takes time, on the worker's thread. Returns what `figure` and `words` show."""

    def settings(self) -> dict:
        """The arguments of `work`. They are read before it is queued, because `work` must not look at widgets."""
        return {name: control.value for name, control in self._asks.items()}

    def figure(self) -> Figure:
        """The picture of the lesson, from `data`, from `asked`, and from the controls that only choose the view."""

    def words(self) -> str:
        """What the figure shows, for readers who cannot see it, with the numbers that a text may quote."""

    # --- how it runs

    def ask(self) -> Job:
        """Queue the work with the current settings. It replaces an unfinished request."""
        if self._job is not None:
            self._job.cancel()
        self._turn += 1
        self.error, self.said.value = None, ""
        settings = self.settings()
        work, tell = functools.partial(self._work, settings), functools.partial(self._on_update, self._turn, settings)
        self._job = self._worker.submit(self.model, work, tell)
        return self._job

    def _work(self, settings: dict, pipe, job: Job) -> object:
        due = time.monotonic() + 1.0

        def report(done: int, total: int, so_far: Callable[[], object] | None = None) -> None:
            nonlocal due
            job.check()
            self._progress(done / total)
            begin = time.monotonic()
            if so_far is not None and begin >= due:  # showing the data may slow the work by a fifth
                self._show(so_far(), settings)
                due = time.monotonic() + 5 * (time.monotonic() - begin)

        return self.work(pipe, report, **settings)

    def _on_update(self, turn: int, settings: dict, job: Job, update: Update) -> None:
        if turn != self._turn:
            return
        if update.stage == "open":
            self.said.value = "Opening the model …"
        if update.stage in ("done", "cancelled", "failed"):
            self._progress(None)
            self.said.value = ""
        if update.stage == "failed":
            self._fail(job.error)
        elif update.stage == "done":
            try:
                self._show(job.value, settings)
            except Exception as e:
                self._fail(e)

    def _show(self, data: object = None, asked: dict | None = None) -> None:
        """Redraw. New data are stored first, together with the settings they belong to."""
        with self._showing:
            if data is not None:
                self.asked, self.data = asked, data  # in this order: an observer of `data` may read both
            self.redraw()

    def _progress(self, part: float | None) -> None:
        self.bar.layout.visibility = "hidden" if part is None else "visible"
        self.bar.value = part or 0.0

    def _fail(self, error: BaseException) -> None:
        self.error = error
        self.said.value = f'<span style="color:var(--jp-error-color1, {RED})">{html.escape(str(error))}</span>'

    def redraw(self) -> None:
        """Show the data as the controls say."""
        if self.data is None:
            return
        try:
            said = self.words()
            self.image.show(*png(self.figure), said)
            self.caption.value = html.escape(said, quote=False)
        except Exception as e:  # in a callback Jupyter would show nothing
            self._fail(e)

    def ready(self) -> "Lesson":
        """Wait until there is something to see. Interrupting the wait cancels the work."""
        if self.data is None:
            bar = w.FloatProgress(max=1.0, description=self.title, style={"description_width": "initial"})
            tie = t.dlink((self.bar, "value"), (bar, "value"))
            seen = w.VBox([bar])
            display(seen)
            self.image.observe(grow := lambda _: seen.set_trait("children", [bar, self.image]), "value")
            try:
                over = self._job is None or self._job.state in ("cancelled", "failed")
                (self.ask() if over else self._job).result()
            finally:
                tie.unlink()
                self.image.unobserve(grow, "value")
                seen.close()
                bar.close()
        if self.error is not None:
            raise self.error
        return self

    def _repr_mimebundle_(self, **options):
        self.ready()
        bundle = super()._repr_mimebundle_(**options)
        bundle["text/markdown"] = self.saved()
        bundle["text/plain"] = self.words()
        return bundle

    def saved(self) -> str:
        """The lesson for a page that runs nothing, as Markdown: all but the controls."""
        picture = base64.b64encode(self.image.value).decode()
        return "\n\n".join(
            (
                f"**{self.title}.** {self.idea}",
                f"![{self.title}](data:image/png;base64,{picture})",
                html.escape(self.words(), quote=False),
                f"**Try this.** {self.trying}",
            )
        )


def seed_box(seed: int, name: str = "Seed") -> w.BoundedIntText:
    return w.BoundedIntText(seed, min=0, max=2**31 - 1, description=name)


def _row(*controls: w.Widget) -> w.HBox:
    return w.HBox(controls, layout=w.Layout(flex_flow="row wrap"))


def played(slider: w.IntSlider, interval: int, step: int = 1) -> w.HBox:
    """A slider with a play button, which moves it by `step` every `interval` milliseconds."""
    play = w.Play(slider.value, min=slider.min, max=slider.max, step=step, interval=interval)
    w.jslink((play, "value"), (slider, "value"))  # a page first gives the slider the player's value
    w.jslink((slider, "max"), (play, "max"))
    return _row(play, slider)


@contextmanager
def _styled() -> Iterator[None]:
    """Use our style while a figure is made. `rc_context` would undo what a cell sets in the meantime."""
    with _drawing:
        kept = {name: mpl.rcParams[name] for name in _STYLE}
        mpl.rcParams.update(_STYLE)
        try:
            yield
        finally:
            mpl.rcParams.update(kept)


def png(figure: Callable[[], Figure]) -> tuple[bytes, int]:
    """Draw a figure as a PNG; return it with its width on a page, in pixels."""
    with _styled():
        made = figure()
        out = io.BytesIO()
        made.savefig(out, dpi=_DPI, format="png")
    flat = Image.open(out).convert("RGB")  # matplotlib writes an alpha channel; without it the file is a tenth smaller
    out = io.BytesIO()
    flat.save(out, "PNG")
    return out.getvalue(), round(made.get_size_inches()[0] * _SHOWN)
