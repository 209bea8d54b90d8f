"""Which OpenBLAS is put under MLX on Linux, and that it works. Each case has its own process: what is loaded stays.
References: the loaded files in /proc/self/maps, OpenBLAS's own account of its threads, numpy."""

import os
import subprocess
import sys
import textwrap

import pytest

import mlxdiff
from mlxdiff import blas, networks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MLX brings its own")
WHEEL = next((file.name for file in blas._files("ngsolve_openblas", "libopenblas*.so*")), None)
wheel = pytest.mark.skipif(WHEEL is None, reason="there is no wheel for this processor")

# What the children have. `refuse` makes libraries impossible to load, the first `times` times.
PRELUDE = """
import ctypes, os, sys
from pathlib import Path
REAL = ctypes.CDLL
def refuse(*names, times=99):
    left = dict.fromkeys(names, times)
    def load(name, *args, **kw):
        for part in left:
            if part in str(name) and left[part] > 0:
                left[part] -= 1
                raise OSError(f"{name} is refused")
        return REAL(name, *args, **kw)
    ctypes.CDLL = load
def mapped(part):
    return sorted({line.split(maxsplit=5)[5] for line in open("/proc/self/maps") if part in line})
def square(n=256):
    import mlx.core as mx
    import numpy as np
    a = np.random.default_rng(0).standard_normal((n, n), np.float32)
    with mx.stream(mx.cpu):
        assert np.allclose(np.array(mx.array(a) @ mx.array(a)), a @ a, atol=1e-3)
"""


def child(code: str, **env: str | None) -> str:
    text, env = PRELUDE + textwrap.dedent(code), {k: v for k, v in (os.environ | env).items() if v is not None}
    done = subprocess.run([sys.executable, "-c", text], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@wheel
def test_the_wheel_comes_first_and_is_not_imported():
    code = """
    import mlxdiff; assert 'ngsolve_openblas' not in sys.modules
    square(); assert mapped('memfd:libblas')
    print(mlxdiff.BLAS)
    """
    assert child(code) == WHEEL


def test_without_the_wheel_the_system_serves():
    code = f"""
    refuse({str(WHEEL)!r})
    try:
        REAL(blas := "libopenblas.so.0")
    except OSError:
        blas = None
    import mlxdiff; assert mlxdiff.BLAS == blas, mlxdiff.BLAS
    square()
    """
    child(code)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MLX has its system's BLAS")
def test_mlx_before_mlxdiff_is_told():
    code = """
    import warnings, mlx.core
    with warnings.catch_warnings(record=True) as said:
        import mlxdiff
    assert mlxdiff.BLAS is None
    print(said[0].message, Path(said[0].filename).name)
    """
    assert "Import mlxdiff first" in child(code)


def test_with_neither_mlx_runs_on_its_own():
    code = """
    refuse("openblas")
    import mlxdiff; assert mlxdiff.BLAS is None
    assert not mapped("/libopenblas"), mapped("/libopenblas")
    assert not mapped("memfd:libblas")
    square()
    """
    child(code)


@wheel
def test_a_system_without_fortran_is_lent_that_of_mlx():
    """The first try at the wheel fails, as it does there; then the library must take the copy, not the system's."""
    code = f"""
    refuse({WHEEL!r}, times=1)
    import mlxdiff; assert mlxdiff.BLAS == {WHEEL!r}, mlxdiff.BLAS
    assert mapped("memfd:libgfortran.so.5")
    assert mapped("memfd:libblas")
    assert not mapped("/libgfortran.so.5"), mapped("/libgfortran.so.5")
    import mlx.core as mx
    u, s, vt = mx.linalg.svd(mx.eye(3), stream=mx.cpu)  # LAPACK, which is what asks for Fortran
    assert s.tolist() == [1, 1, 1]
    square()
    """
    child(code)


@wheel
def test_its_threads_are_one_until_a_large_network_comes_or_as_many_as_asked_for():
    code = """
    import mlxdiff; square()
    library = next(one for one in mlxdiff.blas._loaded if hasattr(one, "openblas_get_num_threads"))
    threads = library.openblas_get_num_threads
    before = threads()
    mlxdiff.blas.use_all_cores(); square(1024)
    print(before, threads(), os.environ.get("OPENBLAS_NUM_THREADS"))
    assert mlxdiff.blas.divides() == (threads() > 1)
    """
    cores = len(os.sched_getaffinity(0))
    assert child(code, OPENBLAS_NUM_THREADS=None) == f"1 {cores} None"
    assert child(code, OPENBLAS_NUM_THREADS="1") == "1 1 1"
    assert child(code, OPENBLAS_NUM_THREADS="2") == f"{min(2, cores)} {min(2, cores)} 2"


@wheel
def test_its_settings_are_for_itself_alone_and_those_of_the_user_count():
    """numpy's OpenBLAS reads the same variables. What the library was told is seen at the moment it is loaded."""
    code = """
    seen, load = [], ctypes.CDLL
    def look(name, *args, **kw):
        seen.append(os.environ.get("OPENBLAS_THREAD_TIMEOUT"))
        return load(name, *args, **kw)
    ctypes.CDLL = look
    import mlxdiff
    print(seen[0], os.environ.get("OPENBLAS_THREAD_TIMEOUT"))
    """
    assert child(code, OPENBLAS_THREAD_TIMEOUT=None) == "4 None"
    assert child(code, OPENBLAS_THREAD_TIMEOUT="20") == "20 20"


def test_float32_stays_whole_on_a_mac(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    blas.whole_float32()
    assert os.environ.get("MLX_ENABLE_TF32") == ("0" if sys.platform == "darwin" else None)
    monkeypatch.setattr(sys, "platform", "darwin")
    blas.whole_float32()
    assert os.environ["MLX_ENABLE_TF32"] == "0"
    os.environ["MLX_ENABLE_TF32"] = "1"
    blas.whole_float32()
    assert os.environ["MLX_ENABLE_TF32"] == "1"


def test_a_large_network_asks_for_more_than_two_cores(monkeypatch):
    asked = []
    monkeypatch.setattr(blas, "use_all_cores", lambda: asked.append(True))
    pipe = mlxdiff.load("storybook")
    pipe.networks.get("unet")
    assert not asked
    monkeypatch.setattr(networks, "_LARGE", 10 * 2**20)
    pipe.networks.get("vae")
    assert not asked
    pipe.networks.release("unet")
    monkeypatch.setattr(blas, "cores", lambda: 2)
    pipe.networks.get("unet")
    assert not asked
    pipe.networks.release("unet")
    monkeypatch.setattr(blas, "cores", lambda: 8)
    pipe.networks.get("unet")
    assert asked


@wheel
def test_it_is_much_faster_than_the_blas_of_mlx():
    """Seconds of one core; 18 times faster was measured."""
    code = """
    if REFUSED: refuse("openblas")
    import time, mlxdiff, mlx.core as mx
    mx.set_default_device(mx.cpu)
    a = mx.random.normal((768, 768)); mx.eval(a, a @ a)
    begin = time.process_time(); mx.eval(a @ a); print(time.process_time() - begin)
    """
    slow, fast = (float(child(code.replace("REFUSED", r), OPENBLAS_NUM_THREADS="1")) for r in ("True", "False"))
    assert slow > 4 * fast


@wheel
def test_numpy_threads_and_forks_live_beside_it():
    code = """
    import mlxdiff, numpy as np
    from threading import Thread
    mlxdiff.blas.use_all_cores()
    square()
    threads = [Thread(target=square) for _ in range(4)]
    [t.start() for t in threads]; [t.join() for t in threads]
    pid = os.fork()
    if pid == 0:
        a = np.ones((300, 300), np.float32)
        os._exit(0 if (a @ a == 300).all() else 1)
    assert os.waitpid(pid, 0)[1] == 0
    square()
    """
    child(code)


def test_nobody_else_in_the_process_sees_it():
    """torch finds its own BLAS: led to OpenBLAS 0.3.33, it crashed in a batch of small products."""
    code = """
    import mlxdiff, torch
    square()
    a = torch.ones(4, 77, 16)
    assert (torch.bmm(a, a.mT) == 16).all()
    assert (torch.nn.functional.linear(a, torch.ones(8, 16)) == 16).all()
    assert not hasattr(REAL(None), "openblas_get_num_threads")
    """
    child(code)


@pytest.mark.skipif("MALLOC_TRIM_THRESHOLD_" in os.environ, reason="the C library is set already")
def test_freed_memory_is_kept_unless_the_user_says_otherwise():
    """Page faults of ten rounds of four arrays of 20 MB, 5,120 pages each. A setting of the user's, here the C
    library's own figure, is left alone."""
    code = """
    import mlxdiff, resource
    import mlx.core as mx
    x = mx.zeros(5 << 20)
    def round():
        with mx.stream(mx.cpu):
            mx.eval(((x + 1) * (x + 2)) * ((x + 3) * (x + 4)))
    round(); round()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10): round()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    kept, given_back = int(child(code)), int(child(code, MALLOC_TRIM_THRESHOLD_="131072"))
    assert kept < 10 * 5_120 < given_back
