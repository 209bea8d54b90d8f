"""One thread owns every MLX call of the widgets: it loads, draws, previews, looks. All others queue jobs or set flags.

MLX streams belong to threads, and a widget's callback may run on another thread from one click to the next. So requests
go in, and only pictures, bytes and numbers come out. The thread never ends: MLX can abort a process when one does."""

import atexit
import io
import statistics
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
from PIL import Image

from ..description import Description
from ..errors import Error
from ..images import sheet
from ..pipeline import Event, Pipeline, Result, load
from ..request import Request

_APART = 0.2  # seconds between two previews, and between two reports of a download
_SHARE = 10  # a preview that took s seconds is followed by none for 10 s: it slows a run by a tenth at most
_EDGE = 256  # pixels: smaller previews, such as one a latent, are enlarged to about this
_AT_EXIT = 20.0  # seconds to wait for the running step: stopping Python under it can abort the process


class Cancelled(Exception):
    """What `result()` of a cancelled job raises. Not an Error: nothing went wrong."""


class Update(NamedTuple):
    """What a job tells while it runs. Stages: those of Event, download and convert before them (in bytes), open when a
    model is about to be read, ready when `job.description` is known; done, cancelled or failed ends the job."""

    stage: str
    step: int = 0
    steps: int = 0
    pace: float | None = None  # seconds a step
    peak: int = 0  # bytes
    frame: bytes | None = None  # a JPEG of the picture as it will probably be
    picture: Image.Image | None = None
    seconds: float = 0.0  # since the job began, with a picture and when done


Work = Callable[[Pipeline, "Job"], object]


class Job:
    """One run. `state` is queued, running, done, cancelled or failed; `error` is what made it fail."""

    def __init__(
        self, worker: "Worker", model: str | Path, options: dict, asked: Request | Work | None, tell: Callable
    ):
        self.model, self.options, self.asked = model, options, asked
        self.state, self.error = "queued", None
        self.request: Request | None = None  # resolved, once the model is open
        self.description: Description | None = None
        self._worker, self._tell = worker, tell
        self._stop, self._ended = threading.Event(), threading.Event()
        self.value: object = None  # what came of it

    def __repr__(self) -> str:
        what = repr(self.asked.prompt) if isinstance(self.asked, Request) else getattr(self.asked, "__name__", "open")
        return f"<Job {self.state}: {what} with {self.model}>"

    def cancel(self) -> None:
        """Leave the queue at once, or stop after the step that is running."""
        self._worker._cancel(self)

    def result(self, timeout: float | None = None) -> object:
        """Wait for the Result, for what other work returned, or for None of a job that only opens a model. Interrupting
        the wait cancels the job."""
        try:
            if not self._ended.wait(timeout):
                raise TimeoutError(f"{self!r} has not ended after {timeout:g} s.")
        except KeyboardInterrupt:
            self.cancel()
            self._ended.wait()
            raise
        if self.error is not None:
            raise self.error
        if self.state == "cancelled":
            raise Cancelled(repr(self))
        return self.value

    def tell(self, stage: str, *args, **facts) -> None:
        self._tell(self, Update(stage, *args, peak=mx.get_peak_memory(), **facts))

    def check(self) -> None:
        if self._stop.is_set():
            raise Cancelled(repr(self))


class Worker:
    """The queue and its thread. At most one model is in memory, the one drawn with last."""

    def __init__(self, load: Callable[..., Pipeline] = load):
        self._load = load
        self._pipe: Pipeline | None = None
        self._key: tuple | None = None
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._begun = self._total = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def submit(
        self, model: str | Path, asked: Request | Work | None, tell: Callable[[Job, Update], None], **options
    ) -> Job:
        """Queue a run, or other work with the opened model, or with None its opening. Work is called as (pipe, job) on
        the worker's thread, as `tell` is; it may look at `job.check()` to be cancelled and use `job.tell`."""
        job = Job(self, model, options, asked, tell)
        with self._changed:
            if self._running is None and not self._waiting:
                self._begun = self._total = 0
            self._waiting.append(job)
            self._total += isinstance(asked, Request)
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="mlxdiff", daemon=True)
                self._thread.start()
                atexit.register(self.rest, _AT_EXIT)
            self._changed.notify_all()
        return job

    @property
    def place(self) -> tuple[int, int]:
        """(2, 4): the second of four runs since the queue was last empty."""
        with self._changed:
            return self._begun, self._total

    def rest(self, timeout: float | None = None) -> None:
        """Cancel everything and wait until the thread does nothing."""
        with self._changed:
            jobs = [*self._waiting] if self._running is None else [*self._waiting, self._running]
        for job in jobs:
            job.cancel()
        with self._changed:
            self._changed.wait_for(lambda: self._running is None, timeout)

    def _cancel(self, job: Job) -> None:
        job._stop.set()
        with self._changed:
            waiting = job in self._waiting
            if waiting:
                self._waiting.remove(job)
                self._total -= isinstance(job.asked, Request)
        if waiting:
            self._end(job, "cancelled")

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                self._running = self._waiting.popleft()
                self._begun += isinstance(self._running.asked, Request)
            self._run(self._running)
            with self._changed:
                self._running = None
                self._changed.notify_all()

    def _run(self, job: Job) -> None:
        job.state, state, seconds = "running", "done", 0.0
        try:
            job.value = self._draw(job)
            seconds = job.value.seconds if isinstance(job.value, Result) else 0.0
        except Cancelled:
            state = "cancelled"
        except BaseException as e:  # whatever it is, the thread goes on to the next job and the job tells its user
            state, job.error = "failed", _readable(e)
            self._pipe = self._key = None  # it may have been left half loaded
        if state != "done":
            mx.clear_cache()
        self._end(job, state, seconds)

    def _end(self, job: Job, state: str, seconds: float = 0.0) -> None:
        job.state = state
        try:
            job.tell(state, seconds=seconds)
        except Exception:  # a listener's mistake: said on the kernel's terminal, since the job itself is over
            traceback.print_exc()
        finally:
            job._ended.set()

    def _draw(self, job: Job) -> object:
        job.check()
        mx.reset_peak_memory()
        pipe = self._open(job)
        if not isinstance(job.asked, Request):
            return None if job.asked is None else job.asked(pipe, job)
        job.request = pipe.resolve(job.asked)
        begin, drawn, paces, due = time.perf_counter(), [], [], 0.0
        with closing(pipe.run(job.request)) as events:
            for event in events:
                if event.stage == "denoise" and event.step:
                    paces.append(event.seconds)
                frame, due = _frame(pipe, event, due)
                if event.image is not None:
                    drawn.append(event.image)
                job.tell(
                    event.stage,
                    event.step,
                    event.steps,
                    pace=statistics.median(paces[-5:]) if paces else None,
                    frame=frame,
                    picture=event.image,
                    seconds=time.perf_counter() - begin,
                )
                if len(drawn) < job.request.count:  # all drawn: too late to cancel
                    job.check()
        made = pipe.name, str(pipe.description.recipe)
        return Result(drawn, job.request, time.perf_counter() - begin, mx.get_peak_memory(), *made)

    def _open(self, job: Job) -> Pipeline:
        key = (str(job.model), tuple(sorted(job.options.items())))
        if self._key != key:
            self._pipe = self._key = None  # the old model goes before the new one comes
            mx.clear_cache()
            job.tell("open")
            due = 0.0

            def progress(stage: str, done: int, total: int) -> None:
                nonlocal due
                job.check()
                if time.perf_counter() >= due:
                    due = time.perf_counter() + _APART
                    job.tell(stage, done, total)

            request = job.asked if isinstance(job.asked, Request) else None
            self._pipe = self._load(job.model, request=request, progress=progress, **job.options)
            self._key = key
        pipe = self._pipe
        job.description = pipe.description
        job.tell("ready")
        return pipe


def _frame(pipe: Pipeline, event: Event, due: float) -> tuple[bytes | None, float]:
    """The event's preview, if it has one and the last is long enough ago; and the time before which no other comes."""
    begin = time.perf_counter()
    if event.x0 is None or begin < due:
        return None, due
    rough = sheet(pipe.preview(event.x0))
    grow = max(1, _EDGE // max(rough.size))  # a page enlarges less smoothly than we can
    frame = jpeg(rough.resize([grow * edge for edge in rough.size], Image.Resampling.BICUBIC))
    now = time.perf_counter()
    return frame, now + max(_APART, _SHARE * (now - begin))


def jpeg(image: Image.Image) -> bytes:
    """Small and quick to make: a PNG of a noisy picture takes forty times as long."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return out.getvalue()


def _readable(error: BaseException) -> BaseException:
    """The error without the arrays its frames hold: they are the worker's, and should be free by now."""
    chain: BaseException | None = error
    while chain is not None:
        traceback.clear_frames(chain.__traceback__)
        chain = chain.__context__
    if isinstance(error, MemoryError) or "malloc" in str(error):
        fix = "Choose a smaller picture, `count=1`, or `low_memory=True`."
        return Error("There is not enough memory for this run.", fix).with_traceback(error.__traceback__)
    return error


_shared = Worker()


def shared() -> Worker:
    """The one worker of this process: every studio draws through it."""
    return _shared
