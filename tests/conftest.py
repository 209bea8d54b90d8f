"""What every test shares: OpenBLAS under MLX (by importing mlxdiff first), no network, and how tests share a machine.

`pytest -n 2` runs two files at a time, each test on one thread. Tests marked `alone` measure clocks or whole networks,
which a neighbour would disturb: they come last, on all cores, and while one of them runs, no other test does."""

import fcntl
import gc
import linecache
import os
import resource
import sys
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The oracles must not look for a hub; tests of the hub code point HF_ENDPOINT at a loopback server of their own.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHARED = "PYTEST_XDIST_WORKER" in os.environ  # pytest -n
if SHARED:
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(name, "1")

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

import mlxdiff.blas  # noqa: E402

# ---- what trainings share


@pytest.fixture(scope="module")
def pipe():
    """The built-in model in float32."""
    return mlxdiff.load("storybook", dtype="float32")


@pytest.fixture(scope="module")
def small():
    """The built-in model draws 128 x 128 pixels unless it is told otherwise: for what does not depend on the size."""
    from mlxdiff.families import MODELS

    row = MODELS["storybook"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "storybook", replace(row, defaults=replace(row.defaults, size=128)))
        yield


@pytest.fixture(scope="session")
def rings(tmp_path_factory):
    """Four pictures of rings, which are no thing of the built-in model's world."""
    place = tmp_path_factory.mktemp("rings")
    y, x = np.mgrid[:64, :64]
    for i in range(4):
        pixels = np.full((64, 64, 3), (250, 240, 220), np.uint8)
        for radius, colour in ((24, (200, 30, 60)), (17, (20, 20, 120)), (10, (240, 200, 0))):
            pixels[(x - 26 - 4 * i) ** 2 + (y - 36 + 3 * i) ** 2 < radius**2] = colour
        Image.fromarray(pixels).save(place / f"{i}.png")
    return place


@pytest.fixture
def full_disk():
    """`with full_disk(): ...` lets no file grow beyond 10 kB."""

    @contextmanager
    def limited():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture
def interrupts():
    """`for moment in interrupts("worker.py"): with moment: ...` runs the block again and again, and raises
    KeyboardInterrupt in this thread before one line of these files after the other, as Ctrl-C may; and when a Condition
    that they enter has taken its lock, before its `__enter__` returns. It ends when no line is left. At the end of a
    `with` it does not: Python hears no signal between the last line and `__exit__`."""

    def moments(*names):
        passed = number = 0
        entered = set()

        def trace(frame, event, _):
            nonlocal passed
            code = frame.f_code
            lock = code.co_name == "__enter__" and frame.f_back.f_code.co_filename.endswith(names)
            if not lock and not code.co_filename.endswith(names):
                return None
            place = frame, frame.f_lineno
            if event == "line" and linecache.getline(code.co_filename, frame.f_lineno).lstrip().startswith("with "):
                if place in entered:
                    return trace
                entered.add(place)
            if event == ("return" if lock else "line"):
                passed += 1
                if passed == number:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        @contextmanager
        def moment():
            before = sys.gettrace()
            sys.settrace(trace)
            try:
                with suppress(KeyboardInterrupt):
                    yield
            finally:
                sys.settrace(before)
                entered.clear()

        while passed >= number:
            passed, number = 0, number + 1
            yield moment()

    return moments


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("alone") is not None)


def pytest_collection_finish():
    """What was imported stays: the collector need not walk torch's and diffusers' modules again, test after test."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Set-up included, for fixtures measure too. The lock is the kernel's, and a process that dies lets go of it."""
    alone = item.get_closest_marker("alone") is not None
    with open(__file__) as turn:
        if SHARED:
            fcntl.flock(turn, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            _work_in(os.cpu_count() if alone else 1)
        return (yield)


def _work_in(threads: int) -> None:
    """So many, in MLX's OpenBLAS and in torch."""
    for library in mlxdiff.blas._loaded:
        if hasattr(library, "openblas_set_num_threads"):
            library.openblas_set_num_threads(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
