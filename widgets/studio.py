"""`Studio()` turns its controls into a Request and shows what the worker draws. Python holds the truth; the page
mirrors it.

    studio = Studio("storybook"); studio               # draw with the mouse
    studio.prompt, studio.steps = "a red house", 30    # or from cells
    job = studio.generate(); job.result().image        # job.cancel() stops it; so does interrupting the kernel
    studio.images[-1].request, studio.error, studio.compare(seed=[1, 2, 3], guidance=[1, 3, 7])

Callbacks run on whatever thread Jupyter chooses, so they only queue jobs, set flags and copy (see worker.py)."""

import functools
import io
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ipywidgets as w
import traitlets as t
from PIL import Image

from .. import builtin, images
from ..description import Description
from ..errors import Error
from ..families import DEFAULT
from ..request import Request
from .controls import Controls
from .gallery import Grid, Picture, writable
from .history import History
from .known import Known
from .loras import Picker
from .painting import Painting
from .previews import jpeg
from .second_pictures import SecondPictures
from .settings import BY_MODEL, FIELDS, GUIDES, Settings
from .view import View, line, seconds, size
from .worker import Job, Update, Worker, shared

ENLARGE = (2.0, 0.5)  # times, and the strength of the second pass


class Studio(Settings, w.VBox):
    """Draw with a model. Every setting is a trait: set it, observe it. Files go to `folder` as they are finished."""

    status = t.Unicode("Ready", help="the line under the picture")
    images = t.List(help="the pictures drawn, as gallery.Picture, oldest first")
    signer = t.Any(None, help="signs every picture that is written: mlxdiff.signing.signer()")
    error = t.Any(None, help="the last error; `raise studio.error` shows where it was raised")

    def __init__(self, model: str | Path = DEFAULT, *, worker: Worker | None = None, **settings):
        self._worker = shared() if worker is None else worker
        self._jobs: list[Job] = []  # queued or running, in order
        self._known = Known(str(model))
        self._flow = False  # whether the lists show the samplers of rectified flow
        self._before, self._seen = {}, {}
        self.controls, self.view = Controls(str(model)), View()
        self._history = History(self.view)
        self._painting = Painting(self, self.view, self.controls.start_picture)
        self._second = SecondPictures(self, self._painting, self.controls.guides)
        self._picker = Picker(self, self.controls.loras, self.controls.loras_shown)
        super().__init__([w.HBox([self.controls, self.view]).add_class("mlxdiff-body")])
        self.add_class("mlxdiff-studio")
        known = [*Settings.class_own_traits(), *Studio.class_own_traits()]
        if unknown := settings.keys() - {*known}:
            raise Error(f"A studio has no {min(unknown)}.", f"It has {', '.join(known)}.")
        self.seed = secrets.randbelow(2**32)
        self.options = settings.pop("options", {})
        self.model = str(model)
        self._on_model()
        for name, value in settings.items():
            setattr(self, name, value)
        self.controls.bind(self)
        self.view.controls = {name: control.model_id for name, control in self.controls.entries().items()}
        self._wire()
        self._count()
        self._show_pictures()
        self._second.show()

    # --- for cells

    def generate(self) -> Job:
        """Queue a run with the current settings; `.result()` waits for it, `.cancel()` stops it."""
        return self._submit(self._next(), self._on_update)

    def cancel(self, everything: bool = False) -> None:
        """Stop the running picture, or everything that this studio has queued."""
        for job in self._jobs[::-1] if everything else self._jobs[:1]:
            job.cancel()
        self._count()

    def compare(self, **axes: list) -> Grid:
        """A grid over one or two settings: compare(seed=[1, 2, 3], guidance=[1, 3, 7]). The last runs across."""
        if not 1 <= len(axes) <= 2 or not axes.keys() <= FIELDS.keys() or not all(axes.values()):
            fix = f"Give values for one or two of {', '.join(FIELDS)}."
            raise Error(f"{', '.join(axes) or 'Nothing'} cannot be compared.", fix)
        grid = Grid(replace(self._next(), count=1), {n: list(v) for n, v in axes.items()})
        for cell, request in grid.requests().items():
            grid.jobs.append(self._submit(request, functools.partial(self._on_update, grid=grid, cell=cell)))
        return grid

    def restore(self, request: Request, model: str | None = None) -> None:
        super().restore(request, model)
        self.view.turn += 1

    def _set(self, settings: dict) -> None:
        super()._set(settings)
        self.view.turn += 1  # last: a page that knows the turn knows the settings

    def recall(self) -> None:
        """Show the pictures too that the folder held before."""
        self._history.recall(self.folder)

    # --- to the worker

    def _next(self) -> Request:
        """The request of the next run. Its seed is drawn and its folder is checked before the work, not after."""
        if not self.locked:
            self.seed = secrets.randbelow(2**32)
        writable(self.folder)
        return self.request()

    def _submit(self, request: Request | None, tell: Callable[[Job, Update], None], model: str | None = None) -> Job:
        self._clear()
        job = self._worker.submit(self.model if model is None else model, request, tell, **self.options)
        self._jobs.append(job)
        self._count()
        return job

    def _count(self) -> None:
        """Show how many jobs go on. One that has ended leaves here, whatever kept it from being told."""
        with self._history.lock:  # or the page's thread might show last what it counted first
            for job in [job for job in self._jobs if job.state not in ("queued", "running")]:
                self._jobs.remove(job)
            self.view.running = bool(self._jobs)
            self.controls.cancel.disabled = not self._jobs
            self.controls.clear.layout.display = "none" if len(self._jobs) < 2 else None

    # --- from the worker, on its thread

    def _on_update(
        self, job: Job, update: Update, grid: Grid | None = None, cell: tuple[int, int] | None = None
    ) -> None:
        if update.stage == "ready":
            self._seen[job.description.name] = job.model
            if job.model == self.model:
                self._learn(job.description)
        if update.frame is not None and grid is None:
            self.view.frame(update.frame, f"Preview of {job.request.prompt}")
        elif update.frame is not None:
            self.view.frame(jpeg(grid.draft(cell, Image.open(io.BytesIO(update.frame)))), "The comparison so far")
        if update.picture is not None:
            request = replace(job.request, seed=job.request.seed + update.step - 1, count=1)
            made = job.description.name, str(job.description.recipe)
            picture = Picture.write(update.picture, self.folder, request, *made, update.seconds, self.signer)
            with self._history.lock:
                self.images = [*self.images, picture]
            self._keep(picture, update.picture, show=grid is None)
            if grid is not None and grid.put(cell, picture, update.picture):
                whole = grid.finish(self.folder, self.signer)
                self._keep(whole, whole.image, show=True)
        if update.stage in ("done", "cancelled", "failed"):
            self._ended(job, update)
        elif update.stage != "ready":
            self._count()  # every time: the page's thread may have counted at the same moment
            text, progress = line(update)
            self._say(self._place() + text, progress, aloud=update.step == 0)

    def _ended(self, job: Job, update: Update) -> None:
        self._count()
        if job.state == "failed":
            self._fail(job.error)
        elif job.state == "cancelled":
            self._say("Cancelled")
        elif job.asked is None:
            self._say("Ready")
        else:
            self._say(f"{self._place()}Done in {seconds(update.seconds)} · {size(update.peak)} at the peak", 1.0)

    def _place(self) -> str:
        i, n = self._worker.place
        return f"{i} of {n} · " if n > 1 else ""

    def _keep(self, picture: Picture, image: Image.Image, show: bool) -> None:
        self._history.keep(picture, image, show)
        self.controls.last.disabled = False

    def _say(self, text: str, progress: float = 0.0, aloud: bool = True) -> None:
        self.view.say(text, progress, aloud)
        self.status = text

    def _fail(self, error: BaseException) -> None:
        self.error = error
        self.view.fail(error)
        self.status = self.view.status

    def _clear(self) -> None:
        self.error = None
        self.view.clear()

    # --- what depends on the model

    def _on_model(self) -> None:
        """The model changed: take its defaults from the registry, or ask the model itself if it is on this machine."""
        self._name_model()
        self.controls.width.step = self.controls.height.step = self._known.multiple
        if self._known.here:
            self._submit(None, self._on_update)
        self._show_pictures()
        self._picker.look()

    def _change_model(self) -> None:
        """What was chosen to make another model fit this machine does not count for this one."""
        self.options = {k: v for k, v in self.options.items() if k not in ("bits", "low_memory", "refiner")}
        self._on_model()

    def _learn(self, model: Description) -> None:
        """The model is open: offer what it can use."""
        self._open_model(model)
        if model.flow != self._flow:
            selected = {n: getattr(self, n) for n in ("sampler", "schedule", "more")}
            self._flow = model.flow
            self.controls.offer(model.flow)  # this clears the selection
            for name, value in selected.items():
                setattr(self, name, value)
        self.controls.width.step = self.controls.height.step = model.multiple
        if model.row.edits:
            self._show_pictures()
        self._second.show()
        self._picker.look()
        if model.row.inpaints:
            self.strength = 1.0  # as it was trained
        self._judge()

    def _judge(self) -> None:
        self.view.edits = self._known.edits > 0
        self.view.unpaintable = f"{self.model} edits: say in the prompt what to change." if self._known.edits else ""
        self.view.sketches = self._painting.sketcher is not None
        self._painting.show_around()
        self.view.uses = self._second.uses()
        self.controls.start_picture.inpaint.layout.display = None if self._second.inpaintable else "none"
        chosen = {n: getattr(self, n) for n in BY_MODEL}
        self.controls.judge(self._known, self.prompt, chosen, self.more, self._picker.taught())
        self.controls.memory.tell(self._estimate())

    # --- the start picture, or the pictures to edit

    def _show_pictures(self) -> None:
        """Show the pictures that the next run takes, and take over the shape of the first."""
        try:
            pictures = [images.read(picture) for picture in self._taken]
        except Error:
            self.image = None
            raise
        edits = self._known.edits > 0
        self.controls.start_picture.show(pictures, edits)
        self._sizes = tuple(picture.size for picture in pictures)
        self._painting.show_picture(pictures[0] if pictures and not edits else None)
        self._show_part()

    def _show_guides(self) -> None:
        self._second.show()
        self._judge()

    def _show_part(self) -> None:
        """Show what of the start picture is drawn anew, and take over the size of the result."""
        if self.view.paper:
            self._painting.show_mask()
        if self._known.defaults is not None:
            self._set(self._known.shape(self._sizes, self.outpaint))
        self._judge()

    def _forget_part(self) -> None:
        self._second.forget_mask()
        self._painting.forget()

    def _change_pictures(self) -> None:
        """There is another start picture: it has no mask yet."""
        self.mask, self.outpaint = None, (0, 0, 0, 0)
        self._show_pictures()

    # --- from the page

    def _wire(self) -> None:
        c = self.controls
        self.observe(lambda _: self._try(self._change_model), "model")
        self.observe(lambda _: self._picker.look(), ["loras", "embeddings"])
        self.observe(lambda _: self._clear(), ["prompt", "negative"])
        self.observe(lambda _: self._judge(), ["prompt", *BY_MODEL, "more", "count", "options"])
        self.observe(lambda _: self._forget("eta"), "sampler")
        self.observe(lambda _: self._try(self._change_pictures), "image")
        self.observe(lambda _: self._try(self._show_part), ["mask", "outpaint"])
        self.observe(lambda _: self._judge(), "mask_blur")
        self.observe(lambda _: self._try(self._show_guides), [*GUIDES.values(), "model"])
        for what, rows in c.guides.items():
            rows.change = functools.partial(self.set_trait, GUIDES[what])
        c.guides["control"].edges = lambda i: self._do(self._second.make_edges, i)
        c.start_picture.drop = lambda i: self._try(self._drop, i)
        self.view.on_msg(lambda _, message, buffers: self._do(self._on_message, message, buffers))
        buttons = {
            c.generate: self.generate,
            c.cancel: self.cancel,
            c.clear: lambda: self.cancel(everything=True),
            c.dice: lambda: self.set_trait("seed", secrets.randbelow(2**32)),
            c.last: lambda: self._reuse(self.images[-1]),
            c.forget: lambda: self._forget(*self.more),
            c.compare.draw: self._draw_grid,
            c.words.surprise: lambda: self.set_trait("prompt", builtin.surprise()),
            c.start_picture.paint: self._painting.open,
            c.start_picture.forget: self._forget_part,
            c.start_picture.inpaint: self._second.inpaint,
            c.memory.fit: lambda: self._say(self._fit()),
        }
        for name, button in c.presets.items():
            buttons[button] = functools.partial(self._apply, name)
        for name, button in c.shapes.items():
            buttons[button] = functools.partial(self._reshape, name)
        for button, action in buttons.items():
            button.on_click(lambda _, action=action: self._do(action))

    def _do(self, action: Callable, *args) -> None:
        """Do what the person asks for. The last error goes: it has been read."""
        self._clear()
        self._try(action, *args)

    def _try(self, action: Callable, *args) -> None:
        """Run a callback. Jupyter would hide its error; the view shows it."""
        try:
            action(*args)
        except Exception as e:
            self._fail(e)

    def _on_message(self, message: dict, buffers: list) -> None:
        """Do what a message from the page asks for."""
        do, key = message["do"], message.get("key")
        if message.get("turn", self.view.turn) == self.view.turn:  # else the page shows what a button has just changed
            self.controls.take(message.get("settings", {}))
        if do == "generate":
            self.generate()
        elif do == "compare":
            self._draw_grid()
        elif do == "cancel":
            self.cancel()
        elif do == "view":
            self._history.show(key)
        elif do == "seed":
            self._reuse(self._history[key])
        elif do == "begin":
            self._add(self._history[key].path)
        elif do == "before":
            self.view.send({"do": "before", "key": key}, [self._history[key].before()])
        elif do == "copy":
            name, data = self._history[key].copy(message["ending"], self.signer)
            self.view.send({"do": "copy", "name": name}, [data])
        elif do == "enlarge":
            self._enlarge(self._history[key])
        elif do == "star":
            self._history.star(key)
        elif do == "delete":
            self._delete(key)
        elif do == "restore":
            self.restore(self._history[key].request, self._history[key].model)
            self._say("Settings restored")
        elif do == "paint":
            self._painting.open(self._history[key].path)
        elif do == "sketch":
            self._painting.sketch()
        elif do == "mask":
            self._painting.take_mask(bytes(buffers[0]), message["id"], writable(self.folder))
        elif do == "outpaint":
            self._painting.take_around(message["sides"])
        elif do == "soften":
            self._painting.take_blur(message["pixels"])
        elif do == "drop" and (data := self.view.whole(message, buffers)) is not None:
            self._say(self._second.take(data, message["use"]))

    def _draw_grid(self) -> None:
        self.compare(**self.controls.compare.axes())

    def _enlarge(self, picture: Picture) -> None:
        """Draw a picture again, and then on at twice its size."""
        if why := picture.unenlargeable():
            raise Error(why)
        writable(self.folder)
        request = replace(picture.request, hires=ENLARGE, upscaler=self.upscaler, upscaler_hash=None)
        self._submit(request, self._on_update, self._opens(picture.model))

    def _delete(self, key: int) -> None:
        picture = self._history[key]
        if any(isinstance(p, str | Path) and Path(p).resolve() == picture.path for p in self._taken):
            raise Error("The next picture is to begin with this one.", "Remove it there first.")
        self._history.delete(key)
        with self._history.lock:
            self.images = [p for p in self.images if p.path != picture.path]
        self.controls.last.disabled = not self.images
        self._say(f"{picture.path.name} is deleted")

    def _reuse(self, picture: Picture) -> None:
        self.seed, self.locked = picture.request.seed, True
