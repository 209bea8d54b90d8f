"""`Studio()`: controls <-> Request, worker -> view. Python state is the truth; the page mirrors it.

    studio = Studio("storybook"); studio            # draw with the mouse
    studio.prompt, studio.steps = "a red house", 30 # or from cells
    job = studio.generate(); job.result().image     # .cancel() stops it; so does interrupting the kernel
    studio.images[-1].request, studio.error, studio.compare(seed=[1, 2, 3], guidance=[1, 3, 7])

Callbacks run on whatever thread Jupyter chose and only queue, set flags and copy; see worker.py."""

import functools
import html
import io
import itertools
import secrets
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

import ipywidgets as w
import traitlets as t
from PIL import Image

from .. import images, registry, samplers
from ..errors import Error
from ..registry import DEFAULT, MODELS, Defaults
from ..request import Request
from .controls import FIELDS, Controls, ignored, presets, values
from .gallery import Grid, Picture, thumbnail
from .view import View
from .worker import Facts, Job, Update, Worker, jpeg, shared

_OWN = ("steps", "guidance", "width", "height", "sampler", "schedule")  # what every model has its own values for
_STRIP = 100  # thumbnails on the page; `images` keeps all

_STAGES = {
    "open": "Opening the model",
    "download": "Downloading",
    "convert": "Converting the model, once",
    "encode": "Reading the prompt",
    "load": "Loading the weights",
    "decode": "Making pixels",
}


def _told(method: Callable) -> Callable:
    """A callback's error would vanish unseen in Jupyter: show it in the view instead."""

    @functools.wraps(method)
    def guarded(self, *args):
        try:
            return method(self, *args)
        except Exception as e:
            self._fail(e)

    return guarded


class Studio(w.VBox):
    """Draw with a model. Every setting is a trait: set it, observe it. Files go to `folder` as they are finished."""

    prompt = t.Unicode("a red house under a full moon")
    negative = t.Unicode(None, allow_none=True)
    model = t.Unicode(DEFAULT)
    sampler = t.Unicode(None, allow_none=True)
    schedule = t.Unicode(None, allow_none=True)
    steps = t.Int(25)
    guidance = t.Float(7.5)
    width = t.Int(512)
    height = t.Int(512)
    seed = t.Int(0)
    locked = t.Bool(False, help="keep the seed; otherwise every run draws a fresh one")
    count = t.Int(1)
    more = t.Dict(help="Request's fields that have no control, such as {'clip_skip': 2}")
    folder = t.Unicode("pictures", help="where files are written")
    options = t.Dict(help="for mlxdiff.load, such as {'bits': 8}")
    status = t.Unicode("Ready")
    images = t.List(help="what was drawn: gallery.Picture, oldest first")
    error = t.Any(None, help="what went wrong last; `raise studio.error` shows where")

    def __init__(self, model: str | Path = DEFAULT, *, worker: Worker | None = None, **settings):
        self._worker = shared() if worker is None else worker
        self._facts: Facts | None = None
        self._defaults: Defaults | None = None
        self._left: dict = {}  # the model's own settings as they were when a model of unknown defaults was named
        self._jobs: list[Job] = []
        self._keys = itertools.count()
        self._pictures: dict[int, Picture] = {}
        self.controls, self.view = Controls(str(model)), View()
        super().__init__([w.HBox([self.controls, self.view]).add_class("mlxdiff-body")])
        self.add_class("mlxdiff-studio")
        self.seed = secrets.randbelow(2**32)
        self.model = str(model)
        self._opened()
        for name, value in settings.items():
            if name not in self.class_own_traits():
                raise Error(f"Studio has no setting {name!r}.", f"Use one of {', '.join(self.class_own_traits())}.")
            setattr(self, name, value)
        self.controls.bind(self)
        self._wire()
        self._judge()

    # --- what a cell can do

    def request(self) -> Request:
        """The settings as they stand. What a model not yet known was left to choose stays None."""
        values = {n: getattr(self, n) for n in (*FIELDS, "count")}
        if self._defaults is None:
            values |= {n: None for n in _OWN if values[n] == self._left[n]}
        return Request(**values | self.more)

    def generate(self) -> Job:
        """Queue a run with the settings as they stand; `.result()` waits for it, `.cancel()` stops it."""
        return self._submit(self._asked(), self._tell)

    def cancel(self, everything: bool = False) -> None:
        """Stop the running picture, or all that this studio has queued."""
        for job in self._jobs[::-1] if everything else self._jobs[:1]:
            job.cancel()

    def compare(self, **axes: list) -> Grid:
        """A grid over one or two settings: compare(seed=[1, 2, 3], guidance=[1, 3, 7]). The last runs across."""
        if not 1 <= len(axes) <= 2 or not axes.keys() <= FIELDS.keys():
            raise Error(
                f"{', '.join(axes) or 'Nothing'} cannot be compared.", f"Name one or two of {', '.join(FIELDS)}."
            )
        grid = Grid(replace(self._asked(), count=1), {n: list(v) for n, v in axes.items()})
        for cell, request in grid.requests().items():
            grid.jobs.append(self._submit(request, functools.partial(self._tell, grid=grid, cell=cell)))
        return grid

    def restore(self, request: Request, model: str | None = None) -> None:
        """Take over all settings of a request, and the model if it can be opened here."""
        if model is not None and (model in MODELS or Path(model).exists()):
            self.model = model
        for name in (*FIELDS, "count"):
            value = getattr(request, name)
            if value is not None or name not in ("seed", "steps", "guidance", "width", "height"):
                setattr(self, name, value)
        self.locked = request.seed is not None or self.locked
        self.more = _unusual(request, self._facts)

    def load(self, png: str | Path | bytes) -> None:
        """Restore the settings a picture carries: a PNG of ours, of A1111 or of a relative."""
        if isinstance(png, bytes):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "picture"
                path.write_bytes(png)
                try:
                    self.restore(*images.read_settings(path))
                except Error as e:
                    raise Error(e.problem.replace(str(path), "The picture"), e.fix) from None
        else:
            self.restore(*images.read_settings(Path(png)))
        self._say("Settings restored")

    # --- from settings to the worker

    def _asked(self) -> Request:
        """The request of a run that is about to begin, its seed drawn and its folder there."""
        if not self.locked:
            self.seed = secrets.randbelow(2**32)
        try:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as e:
            raise Error(f"{self.folder} cannot be written to: {e.strerror}.", "Set studio.folder.") from None
        return self.request()

    def _submit(self, request: Request | None, tell: Callable) -> Job:
        self.error, self.view.error = None, {}
        job = self._worker.submit(self.model, request, tell, **self.options)
        self._jobs.append(job)
        if job.state not in ("queued", "running"):  # it ended before it was in the list it would have left
            self._drop(job)
        self._busy()
        return job

    def _drop(self, job: Job) -> None:
        with suppress(ValueError):
            self._jobs.remove(job)

    # --- from the worker, on its thread, to the view

    def _tell(self, job: Job, update: Update, grid: Grid | None = None, cell: tuple[int, int] | None = None) -> None:
        if update.stage == "ready" and job.model == self.model:
            self._learn(job.facts)
        if update.frame is not None and grid is None:
            self.view.frame(update.frame, f"Preview of {job.request.prompt}")
        elif update.frame is not None:
            self.view.frame(jpeg(grid.draft(cell, Image.open(io.BytesIO(update.frame)))), "The comparison so far")
        if update.picture is not None:
            own = replace(job.request, seed=job.request.seed + update.step - 1, count=1)
            picture = Picture.write(update.picture, self.folder, own, job.facts.name, update.seconds)
            self.images = [*self.images, picture]
            self._keep(picture, update.picture, show=grid is None)
            if grid is not None and grid.put(cell, picture, update.picture):
                self._finish(grid)
        if update.stage in ("done", "cancelled", "failed"):
            self._ended(job, update)
        else:
            self._line(job, update)

    def _line(self, job: Job, update: Update) -> None:
        """Where a run stands, in words and as a fraction."""
        part, text = -1.0, _STAGES.get(update.stage, "")
        if update.stage in ("download", "convert") and update.steps:
            part = update.step / update.steps
            text += f" · {part:.0%} of {_bytes(update.steps)}"
        elif update.stage == "denoise":
            part, text = update.step / update.steps, f"Step {update.step} of {update.steps}"
            if update.pace is None:
                text = "First step, the slowest"
            else:
                left = update.pace * (update.steps - update.step)
                text += f" · {update.pace:.2f} s a step · {_seconds(left)} left · {_bytes(update.peak)}"
        elif update.stage == "decode" and update.steps > 1:
            text += f" · {min(update.step + 1, update.steps)} of {update.steps}"
        if text:
            self._say(self._place() + text, part, aloud=update.step == 0)

    def _place(self) -> str:
        i, n = self._worker.place
        return f"{i} of {n} · " if n > 1 else ""

    def _ended(self, job: Job, update: Update) -> None:
        self._drop(job)
        self._busy()
        if update.stage == "failed":
            self._fail(job.error)
        elif update.stage == "cancelled":
            self._say("Cancelled")
        elif job.asked is None:
            self._say("Ready")
        else:
            result = job._result
            self._say(f"{self._place()}Done in {_seconds(result.seconds)} · {_bytes(result.peak_bytes)} at most", 1.0)

    def _keep(self, picture: Picture, image: Image.Image, show: bool) -> None:
        key = next(self._keys)
        self._pictures[key] = picture
        item = {"key": key, "title": f"{picture.request.prompt}, seed {picture.request.seed}"}
        self.view.history = [*self.view.history, item | {"thumb": thumbnail(image)}][-_STRIP:]
        self.controls.reuse.disabled = False
        if show:
            self._show(key)

    def _show(self, key: int) -> None:
        picture = self._pictures[key]
        self.view.shown = {
            "key": key,
            "png": picture._repr_png_(),
            "title": picture.request.prompt,
            "caption": picture.caption(),
            "name": picture.path.name,
            "path": _short(picture.path),
        }

    def _finish(self, grid: Grid) -> None:
        """A grid's last cell is there: write the whole as one labelled file, and show that."""
        path = grid.save(Path(self.folder) / f"{grid.name}.png").resolve()
        picture = replace(grid.cells[0, 0], path=path)
        self._keep(picture, picture.image, show=True)

    def _say(self, text: str, part: float = 0.0, aloud: bool = True) -> None:
        self.status = text
        with self.view.hold_sync():
            self.view.status, self.view.progress = text, part
            if aloud:
                self.view.spoken = text

    def _fail(self, error: BaseException) -> None:
        problem, fix = (
            (error.problem, error.fix) if isinstance(error, Error) else (f"{type(error).__name__}: {error}", "")
        )
        self.error = error
        self._say(f"{problem} {fix}".strip(), aloud=False)  # the view's alert is read out by itself
        self.view.error = {"problem": problem, "fix": fix, "trace": "".join(traceback.format_exception(error))}

    def _busy(self) -> None:
        running, waiting = bool(self._jobs), len(self._jobs) > 1
        self.view.running = running
        self.controls.cancel.disabled = not running
        self.controls.clear.layout.display = None if waiting else "none"

    # --- what depends on the model

    def _opened(self) -> None:
        """Another model was named: take its defaults from the registry, or ask the model itself if it is here."""
        row = registry.find(self.model)
        self._facts, self._defaults = None, None if row is None else row.defaults
        self._left = {n: getattr(self, n) for n in _OWN}
        if row is not None:
            self._apply("standard")
        if (row is None and Path(self.model).exists()) or (row is not None and row.repo is None):
            self._submit(None, self._tell)
        self._judge()

    def _learn(self, facts: Facts) -> None:
        """The model is open. What the user has not touched since naming it becomes the model's own."""
        known, self._facts, self._defaults = self._defaults is not None, facts, facts.defaults
        if not known:
            own = presets(facts.defaults)["standard"]
            for name in _OWN:
                if getattr(self, name) == self._left[name]:
                    setattr(self, name, own[name])
        for edge in (self.controls.width, self.controls.height):
            edge.step = facts.multiple
        self._judge()

    def _apply(self, preset: str) -> None:
        for name, value in presets(self._defaults)[preset].items():
            setattr(self, name, value)

    def _judge(self) -> None:
        """Disable what changes nothing now, and say why."""
        reasons = ignored(self._facts, self.guidance)
        self.controls.negative.disabled = "negative" in reasons
        self.controls.why.value = html.escape(" ".join(reasons.values()))
        offered = {} if self._defaults is None else presets(self._defaults)
        for name, button in self.controls.presets.items():
            button.disabled = name not in offered
        extra = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in self.more.items())
        self.controls.more.value = html.escape(f"Also set: {extra}.") if extra else ""
        self.controls.forget.layout.display = None if extra else "none"

    # --- from the page

    def _wire(self) -> None:
        c = self.controls
        self.observe(_told(lambda self, _: self._opened()).__get__(self), "model")
        self.observe(lambda _: self._judge(), ["guidance", "more"])
        self.observe(lambda _: setattr(self, "more", {k: v for k, v in self.more.items() if k != "eta"}), "sampler")
        self.view.on_msg(self._heard)
        for button, do in (
            (c.generate, self.generate),
            (c.cancel, self.cancel),
            (c.clear, lambda: self.cancel(everything=True)),
            (c.dice, lambda: setattr(self, "seed", secrets.randbelow(2**32))),
            (c.reuse, lambda: self._reuse(self.images[-1])),
            (c.forget, lambda: setattr(self, "more", {})),
            (c.compare.draw, self._draw_grid),
            *((b, functools.partial(self._apply, n)) for n, b in c.presets.items()),
        ):
            button.on_click(functools.partial(self._do, do))

    @_told
    def _do(self, what: Callable, *_) -> None:
        what()

    @_told
    def _heard(self, _, message: dict, buffers: list) -> None:
        """A message of the view."""
        do, key = message["do"], message.get("key")
        if do == "generate":
            self.generate()
        elif do == "cancel":
            self.cancel()
        elif do == "drop":
            self.load(bytes(buffers[0]))
        elif do == "view":
            self._show(key)
        elif do == "restore":
            self.restore(self._pictures[key].request)
            self._say("Settings restored")
        elif do == "seed":
            self._reuse(self._pictures[key])

    def _reuse(self, picture: Picture) -> None:
        self.seed, self.locked = picture.request.seed, True

    def _draw_grid(self) -> None:
        c = self.controls.compare
        if c.rows.value == c.columns.value:
            raise Error(f"Rows and columns are both {c.rows.value}.", "Choose two different settings.")
        pairs = ((c.rows.value, c.row_values.value), (c.columns.value, c.column_values.value))
        self.compare(**{name: values(name, text) for name, text in pairs})


def _unusual(request: Request, facts: Facts | None) -> dict:
    """The fields without a control that are not as they would be if nobody had set them."""
    plain = Request("")
    own = {"clip_skip": None if facts is None else facts.clip_skip}
    if request.sampler is not None:
        own["eta"] = samplers.SAMPLERS[samplers.resolve(request.sampler)].eta
    found = {f.name: getattr(request, f.name) for f in fields(Request) if f.name not in (*FIELDS, "count")}
    return {n: v for n, v in found.items() if v not in (getattr(plain, n), own.get(n))}


def _seconds(s: float) -> str:
    return f"{s:.1f} s" if s < 10 else f"{s:.0f} s" if s < 100 else f"{s // 60:.0f} min {s % 60:.0f} s"


def _bytes(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
