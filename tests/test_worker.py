"""The studio's one thread, without a browser: these tests are the contract of widgets/worker.py."""

import gc
import io
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import psutil
import pytest
from PIL import Image

from mlxdiff import advice, load, store
from mlxdiff.errors import Error
from mlxdiff.request import Request
from mlxdiff.widgets.worker import Cancelled, Worker
from tests import fakes

pytestmark = pytest.mark.alone
WAIT = 30  # seconds before a hang becomes a failure


class Heard(list):
    """Collects a job's updates, each with the thread that reported it."""

    def __call__(self, job, update):
        self.append((job, update, threading.current_thread()))

    def stages(self, job=None):
        return [u.stage for j, u, _ in self if job in (None, j)]


@pytest.fixture
def heard():
    return Heard()


def quiet(job, update):
    pass


def test_a_job_gives_what_the_pipe_draws(heard):
    worker = Worker(fakes.load)
    job = worker.submit("fake", Request("a", seed=3, steps=4, count=2), heard)
    result = job.result(WAIT)
    assert [i.tobytes() for i in result.images] == [fakes.picture(result.request, i).tobytes() for i in (0, 1)]
    assert result.request.sampler == "euler"  # resolved by the pipe, on the worker
    assert job.state == "done"
    assert heard.stages() == ["open", "ready", "encode", *["denoise"] * 5, *["decode"] * 3, "done"]
    assert {t.name for *_, t in heard} == {"mlxdiff"}
    assert job.description.multiple == 8


def test_only_pictures_bytes_and_numbers_come_out(heard):
    Worker(fakes.load).submit("fake", Request("a", steps=3), heard).result(WAIT)
    for _, update, _ in heard:
        for value in update:
            assert value is None or isinstance(value, str | int | float | bytes | Image.Image)
    frames = [u.frame for _, u, _ in heard if u.frame is not None]
    assert Image.open(io.BytesIO(frames[0])).format == "JPEG"


def test_previews_come_at_most_nine_a_second(heard):
    """40 steps of 10 ms: a preview each would be 40. The bound is the run's own length times nine, and the first."""
    worker = Worker(lambda model, **_: fakes.Pipe(pace=0.01))
    seconds = worker.submit("fake", Request("a", steps=40), heard).result(WAIT).seconds
    frames = sum(u.frame is not None for _, u, _ in heard)
    assert 2 <= frames <= 9 * seconds + 1


def test_cancel_stops_within_a_step():
    gate = threading.Event()
    pipe = fakes.Pipe(gate=gate)
    worker = Worker(lambda model, **_: pipe)
    started = threading.Event()
    job = worker.submit("fake", Request("a", steps=20), lambda j, u: u.stage == "denoise" and started.set())
    assert started.wait(WAIT)
    job.cancel()
    gate.set()
    with pytest.raises(Cancelled):
        job.result(WAIT)
    assert job.state == "cancelled"
    assert pipe.steps == 1  # the one that ran
    assert worker.submit("fake", Request("b", steps=2), quiet).result(WAIT).images  # and it draws again


def test_a_cancelled_job_leaves_the_queue_at_once():
    gate = threading.Event()
    worker = Worker(lambda model, **_: fakes.Pipe(gate=gate))
    first, second, third = (worker.submit("fake", Request(p, steps=2), quiet) for p in "abc")
    second.cancel()
    assert second.state == "cancelled"  # while the first still waits at its gate
    assert worker.place[1] == 2
    gate.set()
    assert all(job.result(WAIT).images for job in (first, third))
    with pytest.raises(Cancelled):
        second.result(WAIT)


def test_jobs_run_in_order_and_know_their_place():
    places = []
    worker = Worker(fakes.load)
    hold = threading.Event()
    worker.submit("fake", None, lambda j, u: hold.wait(WAIT))  # opening a model is not counted
    jobs = [
        worker.submit("fake", Request(p, steps=1), lambda j, u: u.stage == "encode" and places.append(worker.place))
        for p in "abc"
    ]
    hold.set()
    for job in jobs:
        job.result(WAIT)
    assert places == [(1, 3), (2, 3), (3, 3)]


def test_a_load_that_fails_is_reported_and_tried_again(heard):
    worker = Worker(fakes.load)
    job = worker.submit("missing", Request("a"), heard)
    with pytest.raises(Error, match="no model 'missing'"):
        job.result(WAIT)
    assert heard.stages() == ["open", "failed"]
    with pytest.raises(Error):
        worker.submit("missing", Request("a"), quiet).result(WAIT)
    assert worker.submit("fake", Request("a", steps=1), quiet).result(WAIT).images


def test_a_failure_in_the_middle_holds_no_arrays():
    """The error keeps the lines of its traceback, but none of the variables: they may be arrays of another thread."""
    worker = Worker(fakes.load)
    job = worker.submit("fake", Request("fail", steps=5), quiet)
    with pytest.raises(Error, match="step 2"):
        job.result(WAIT)
    trace, frames = job.error.__traceback__, []
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    inside = [f for f in frames if f.f_code.co_name == "run"]
    assert [f.f_locals for f in inside] == [{}]
    assert worker.submit("fake", Request("a", steps=1), quiet).result(WAIT).images


def test_what_is_too_large_is_refused_before_it_is_opened(heard, monkeypatch):
    """The request's size decides, so that nothing is downloaded in vain; with force it is opened all the same."""
    monkeypatch.setattr(advice, "this_machine", lambda: advice.mac(8))
    opened = []
    monkeypatch.setattr(store, "resolve", lambda model, **_: opened.append(model) or Path("nowhere"))
    worker = Worker(load)
    large = Request("a", steps=2, width=2048, height=2048)
    with pytest.raises(Error, match="sdxl at 2048x2048 takes about"):
        worker.submit("sdxl", large, heard).result(WAIT)
    assert heard.stages() == ["open", "failed"]
    assert opened == []
    with pytest.raises(Error, match="nowhere"):
        worker.submit("sdxl", large, heard, force=True).result(WAIT)
    assert opened == ["sdxl"]


def test_memory_errors_are_readable():
    class Full(fakes.Pipe):
        def run(self, request):
            raise RuntimeError("[malloc] Unable to allocate 99999999999 bytes.")

    job = Worker(lambda model, **_: Full()).submit("fake", Request("a"), quiet)
    with pytest.raises(Error, match="not enough memory"):
        job.result(WAIT)


def test_another_model_during_a_run_takes_the_first_one_s_place():
    gate, opened = threading.Event(), []
    gone = []

    def load(model, progress, **_):
        gc.collect()
        gone.append(not any(isinstance(o, fakes.Pipe) and o.name in opened for o in gc.get_objects()))
        opened.append(model)
        return fakes.Pipe(model, gate=gate)

    worker = Worker(load)
    jobs = [worker.submit(m, Request("x", steps=2), quiet) for m in ("one", "two", "two", "one")]
    gate.set()
    assert all(job.result(WAIT).images for job in jobs)
    assert opened == ["one", "two", "one"]  # opened once for two jobs in a row
    assert all(gone)  # the old one was gone before the new one came


def test_a_download_can_be_cancelled():
    started = threading.Event()

    def load(model, progress, **_):
        for done in range(10**9):
            progress("download", done, 10**9)
            started.set()
        raise AssertionError("it was never stopped")

    worker = Worker(load)
    job = worker.submit("fake", Request("a"), quiet)
    assert started.wait(WAIT)
    job.cancel()
    with pytest.raises(Cancelled):
        job.result(WAIT)


def test_a_listener_that_fails_does_not_stop_the_thread(capsys):
    def broken(job, update):
        raise ValueError("a listener's own mistake")

    worker = Worker(fakes.load)
    job = worker.submit("fake", Request("a", steps=1), broken)
    with pytest.raises(ValueError, match="own mistake"):
        job.result(WAIT)
    assert worker.submit("fake", Request("a", steps=1), quiet).result(WAIT).images


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("when", ["open", "denoise", "done", "failed", "cancelled"])
def test_nothing_that_a_listener_raises_ends_the_thread(capsys, kind, when):
    def broken(job, update):
        if update.stage == when:
            raise kind
        if update.stage == "encode" and when == "failed":
            raise ValueError("fails here")
        if update.stage == "encode" and when == "cancelled":
            job.cancel()

    worker = Worker(fakes.load)
    job = worker.submit("fake", Request("a", steps=1), broken)
    assert worker._wait(job, WAIT)
    assert worker.submit("fake", Request("a", steps=1), quiet).result(WAIT).images


def test_interrupting_the_wait_cancels(monkeypatch):
    """What Jupyter's interrupt does: KeyboardInterrupt inside the cell that waits."""
    gate = threading.Event()
    worker = Worker(lambda model, **_: fakes.Pipe(gate=gate))
    job = worker.submit("fake", Request("a"), quiet)
    wait, calls = worker._wait, []

    def interrupted(job, timeout=None):
        calls.append(timeout)
        if len(calls) == 1:
            gate.set()
            raise KeyboardInterrupt
        return wait(job, WAIT)

    monkeypatch.setattr(worker, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        job.result()
    assert job.state == "cancelled"


def test_an_interrupt_at_any_moment_hangs_nothing(interrupts):
    """While a cell queues a job, waits for it, cancels one."""
    times = 0
    for moment in interrupts("worker.py"):
        worker, jobs, times = Worker(fakes.load), [], times + 1
        with moment:
            jobs.append(worker.submit("fake", Request("a", steps=1), quiet))
            jobs.append(worker.submit("fake", Request("b", steps=1), quiet))
            jobs[0].result(WAIT)
            jobs[1].cancel()
            worker.place  # noqa: B018 (it takes the lock)
        assert worker.submit("fake", Request("c", steps=1), quiet).result(WAIT).images
        for job in jobs:
            with suppress(Cancelled):
                job.result(WAIT)
    assert times > 30


def test_200_jobs_leave_no_threads():
    worker = Worker(fakes.load)
    worker.submit("fake", Request("a", steps=1), quiet).result(WAIT)
    before = threading.active_count(), psutil.Process().num_threads()
    for i in range(200):
        job = worker.submit("fake", Request("a", seed=i, steps=1), quiet)
    job.result(WAIT)
    assert (threading.active_count(), psutil.Process().num_threads()) == before


def test_rest_cancels_all_and_waits():
    worker = Worker(lambda model, **_: fakes.Pipe(pace=0.01))
    jobs = [worker.submit("fake", Request("a", steps=1000), quiet) for _ in range(3)]
    worker.rest(WAIT)
    assert [job.state for job in jobs] == ["cancelled"] * 3


# --- with MLX itself

EXIT = """
import sys, time
sys.path.insert(0, {root!r})
from mlxdiff.request import Request
import mlx.core as mx
from mlxdiff.widgets.worker import Worker
from tests import fakes

class Busy(fakes.Pipe):
    def run(self, request):
        double = mx.compile(lambda x: mx.tanh(x * 2) + 1)
        for event in super().run(request):
            mx.eval(double(mx.random.normal((64, 64), key=mx.random.key(event.step))))
            yield event

worker = Worker(lambda model, **_: Busy(pace=0.002))
worker.submit("a", Request("x", steps=3), lambda *_: None).result()
worker.submit("a", Request("x", steps=1000), lambda *_: None)
time.sleep({after})
"""


@pytest.mark.parametrize("after", [0.0, 0.05])
def test_the_interpreter_exits_0_in_the_middle_of_a_run(after):
    """MLX aborts (rc 134) in 10 to 40 % of the exits with a compiled function in a thread that ended."""
    from tests.test_imports import ROOT

    code = EXIT.format(root=str(ROOT), after=after)
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_cancelled_run_gives_its_memory_back():
    """Active memory after a run cancelled in its middle is what it was before: nothing of the run is held."""
    big = 2**22  # float32 numbers: 16 MiB, far above anything else here

    class Holding(fakes.Pipe):
        def run(self, request):
            x = mx.ones((big,))
            for event in super().run(request):
                x = x + 1
                mx.eval(x)
                yield event

    started = threading.Event()
    worker = Worker(lambda model, **_: Holding(pace=0.005))
    worker.submit("a", Request("x", steps=1), quiet).result(WAIT)
    before = mx.get_active_memory()
    job = worker.submit("a", Request("x", steps=1000), lambda j, u: u.step > 2 and started.set())
    assert started.wait(WAIT)
    assert mx.get_active_memory() >= before + 4 * big
    job.cancel()
    with pytest.raises(Cancelled):
        job.result(WAIT)
    assert mx.get_active_memory() == before
    assert mx.get_cache_memory() < 4 * big


def test_a_real_model_draws_the_same_through_the_worker():
    """The same request on this thread and on the worker's: equal to the last bit. A cancelled one holds nothing."""
    worker = Worker()
    started = threading.Event()
    request = Request("a red house under a full moon", seed=3, steps=3)
    drawn = worker.submit("storybook", request, quiet).result(WAIT)
    assert drawn.image.tobytes() == load("storybook")(request).image.tobytes()
    before = mx.get_active_memory()
    job = worker.submit("storybook", replace(request, steps=200), lambda j, u: u.frame and started.set())
    assert started.wait(WAIT)
    job.cancel()
    with pytest.raises(Cancelled):
        job.result(WAIT)
    # What the worker keeps is the model and the last prompt's texts, as before: a run's latents alone are 32 KiB. Two
    # scalars, 32 bytes, were there once in many runs, and it is not known why.
    assert mx.get_active_memory() - before < 1024
