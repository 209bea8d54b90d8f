"""One thread makes all MLX calls of the widgets: loading, drawing, previews, lessons. Others queue jobs or set flags.

MLX streams belong to threads, and a widget's callback may run on another thread from one click to the next. So requests
go in, and only pictures, bytes and numbers come out. The thread never ends: MLX can abort the process when a
thread that used it ends."""

import atexit
import statistics
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
from PIL import Image

from ..description import Description
from ..errors import Error
from ..pipeline import Pipeline, Result, load
from ..request import Request
from .previews import Previews

_APART = 0.2  # seconds between two reports of a download
_AT_EXIT = 20.0  # seconds to wait for the running step: stopping Python during a step can abort the process


class Cancelled(Exception):
    """Raised by `result()` of a cancelled job. It is not an Error, since nothing went wrong."""


class Update(NamedTuple):
    """What a job reports while it runs. The first stages are open, when a model is about to be read, download and
    convert (both in bytes), and ready, when `job.description` is known. Then come those of Event; done, cancelled or
    failed is the last."""

    stage: str
    step: int = 0
    steps: int = 0
    pace: float | None = None  # seconds a step
    peak: int = 0  # bytes
    frame: bytes | None = None  # a preview, as a JPEG
    picture: Image.Image | None = None
    seconds: float = 0.0  # since the drawing began


Work = Callable[[Pipeline, "Job"], object]


class Job:
    """One run. `state` is queued, running, done, cancelled or failed; `error` is the exception that made it fail."""

    def __init__(
        self, worker: "Worker", model: str | Path, options: dict, asked: Request | Work | None, tell: Callable
    ):
        self.model, self.options, self.asked = model, options, asked
        self.state, self.error = "queued", None
        self.request: Request | None = None  # resolved, once the model is open
        self.description: Description | None = None
        self._worker, self._listener = worker, tell
        self._stopped = self._over = False  # what it was told, and whether `result()` still waits
        self.value: object = None  # what `result()` returns

    def __repr__(self) -> str:
        what = repr(self.asked.prompt) if isinstance(self.asked, Request) else getattr(self.asked, "__name__", "open")
        return f"<Job {self.state}: {what} with {self.model}>"

    def cancel(self) -> None:
        """Leave the queue at once, or stop after the step that is running."""
        self._worker._cancel(self)

    def result(self, timeout: float | None = None) -> object:
        """Wait for the Result, for the value of other work, or for None if the job only opens a model. Interrupting the
        wait cancels the job."""
        try:
            if not self._worker._wait(self, timeout):
                raise TimeoutError(f"{self!r} has not ended after {timeout:g} s.")
        except KeyboardInterrupt:
            self.cancel()
            self._worker._wait(self)
            raise
        if self.error is not None:
            raise self.error
        if self.state == "cancelled":
            raise Cancelled(repr(self))
        return self.value

    def report(self, stage: str, *args, **facts) -> None:
        self._listener(self, Update(stage, *args, peak=mx.get_peak_memory(), **facts))

    def check(self) -> None:
        if self._stopped:
            raise Cancelled(repr(self))


class Worker:
    """The queue and its thread. At most one model is in memory, the one used last."""

    def __init__(self, load: Callable[..., Pipeline] = load):
        self._load = load
        self._pipe: Pipeline | None = None
        self._previews: Previews | None = None  # of that model
        self._key: tuple | None = None
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._started = self._total = 0
        # Entered as the lock: a kernel's interrupt may leave a Condition's own `__enter__` after it has taken the lock,
        # which nobody would then give back. `_changed` waits and notifies.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._thread = threading.Thread(target=self._loop, name="mlxdiff", daemon=True)

    def submit(
        self, model: str | Path, asked: Request | Work | None, tell: Callable[[Job, Update], None], **options
    ) -> Job:
        """Queue a run, other work with the opened model, or, if `asked` is None, only its opening. The worker's thread
        calls `tell(job, update)` and work as `work(pipe, job)`. Work may call `job.check()`, which raises Cancelled
        once the job is cancelled, and `job.report`."""
        job = Job(self, model, options, asked, tell)
        with self._lock:
            if self._thread.ident is None:
                atexit.register(self.rest, _AT_EXIT)
                self._thread.start()
            if self._running is None and not self._waiting:
                self._started = self._total = 0
            self._total += isinstance(asked, Request)
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    @property
    def place(self) -> tuple[int, int]:
        """(2, 4) is the second of four runs since the queue was last empty."""
        with self._lock:
            return self._started, self._total

    def rest(self, timeout: float | None = None) -> None:
        """Cancel everything and wait until the thread is idle."""
        with self._lock:
            jobs = [*self._waiting] if self._running is None else [*self._waiting, self._running]
        for job in jobs:
            job.cancel()
        with self._lock:
            self._changed.wait_for(lambda: self._running is None, timeout)

    def _wait(self, job: Job, timeout: float | None = None) -> bool:
        with self._lock:
            return self._changed.wait_for(lambda: job._over, timeout)

    def _cancel(self, job: Job) -> None:
        job._stopped = True
        with self._lock:
            waiting = job in self._waiting
            if waiting:
                job.state, job._over = "cancelled", True
                self._waiting.remove(job)
                self._total -= isinstance(job.asked, Request)
                self._changed.notify_all()
        if waiting:
            self._end(job, "cancelled")

    def _loop(self) -> None:
        while True:
            with self._lock:
                self._changed.wait_for(lambda: self._waiting)
                self._running = self._waiting.popleft()
                self._started += isinstance(self._running.asked, Request)
            self._run(self._running)
            with self._lock:
                self._running = None
                self._changed.notify_all()

    def _run(self, job: Job) -> None:
        job.state, state, seconds = "running", "done", 0.0
        try:
            job.value = self._draw(job)
            seconds = job.value.seconds if isinstance(job.value, Result) else 0.0
        except Cancelled:
            state = "cancelled"
        except BaseException as e:  # of any kind: the thread goes on to the next job, and this one reports it
            state, job.error = "failed", _readable(e)
            self._pipe = self._previews = self._key = None  # it may be half loaded
        if state != "done":
            mx.clear_cache()
        self._end(job, state, seconds)

    def _end(self, job: Job, state: str, seconds: float = 0.0) -> None:
        job.state = state
        try:
            job.report(state, seconds=seconds)
        except BaseException as e:  # of the listener, which must not end this thread; the job itself is over
            if not isinstance(e, Exception) and threading.current_thread() is not self._thread:
                raise  # a user's Ctrl-C
            with suppress(OSError, ValueError):  # the kernel's terminal may be closed
                traceback.print_exc()
        finally:
            with self._lock:
                job._over = True
                self._changed.notify_all()

    def _draw(self, job: Job) -> object:
        job.check()
        mx.reset_peak_memory()
        pipe = self._open(job)
        if not isinstance(job.asked, Request):
            return None if job.asked is None else job.asked(pipe, job)
        job.request = pipe.resolve(job.asked)
        begin, drawn, paces = time.perf_counter(), [], []
        with closing(pipe.run(job.request)) as events:
            for event in events:
                if event.stage == "denoise" and event.step:
                    paces.append(event.seconds)
                if event.image is not None:
                    drawn.append(event.image)
                job.report(
                    event.stage,
                    event.step,
                    event.steps,
                    pace=statistics.median(paces[-5:]) if paces else None,
                    frame=self._previews.frame(event),
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
            self._pipe = self._previews = self._key = None  # the old model is freed before the new one is loaded
            mx.clear_cache()
            job.report("open")
            due = 0.0

            def progress(stage: str, done: int, total: int) -> None:
                nonlocal due
                job.check()
                if time.perf_counter() >= due:
                    due = time.perf_counter() + _APART
                    job.report(stage, done, total)

            request = job.asked if isinstance(job.asked, Request) else None
            self._pipe = self._load(job.model, request=request, progress=progress, **job.options)
            self._previews, self._key = Previews(self._pipe), key
        pipe = self._pipe
        job.description = pipe.description
        job.report("ready")
        return pipe


def _readable(error: BaseException) -> BaseException:
    """The error without the variables of its frames: these hold the worker's arrays, which should be freed now."""
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
