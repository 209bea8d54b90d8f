"""Make MLX use OpenBLAS, on Linux only. The `mlx[cpu]` wheel is linked against reference BLAS (4.5 GFLOP/s a core). An
OpenBLAS that is loaded globally before `mlx.core` replaces its sgemm (81 GFLOP/s). Elsewhere this does nothing.

The wheel `ngsolve-openblas` has an OpenBLAS for x86_64 that chooses its kernels by the processor it runs on.
`cmeel-openblas` has wheels for ARM too, but is built for one processor: without AVX-512 it dies of an illegal
instruction."""

import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_SYSTEM = "libopenblas.so.0"  # the system's loader looks it up; ctypes.util.find_library would run ldconfig first
_THREADS = "OPENBLAS_NUM_THREADS"
_loaded: list[ctypes.CDLL] = []


def preload() -> str | None:
    """Load OpenBLAS and return its name, or None if there is none. Must run before the first import of mlx.core.

    OpenBLAS uses one thread until `use_all_cores` is called, unless OPENBLAS_NUM_THREADS is set."""
    if sys.platform != "linux" or "mlx.core" in sys.modules:
        return None
    chosen = _THREADS in os.environ
    os.environ.setdefault(_THREADS, "1")
    try:
        for library in _files("ngsolve_openblas", "libopenblas*.so*"):
            if _load(library) or (_load_fortran() and _load(library)):
                return library.name
        return _SYSTEM if _load(_SYSTEM) else None
    finally:
        if not chosen:
            del os.environ[_THREADS]  # numpy's OpenBLAS reads it too


def use_all_cores() -> None:
    """Call this for large networks. Small ones gain little from threads, and since 0.3.27 OpenBLAS's threads wait for
    each other without yielding: while other programs kept the cores busy, the built-in model took six times as long
    with two threads."""
    if _loaded and _THREADS not in os.environ:
        _loaded[0].openblas_set_num_threads(len(os.sched_getaffinity(0)))


def _files(package: str, pattern: str) -> Iterator[Path]:
    """Files in the folder of an installed package. The package is not imported."""
    spec = importlib.util.find_spec(package)
    for folder in [] if spec is None else spec.submodule_search_locations:
        yield from Path(folder).glob(pattern)


def _load(library: Path | str) -> bool:
    try:
        _loaded.append(ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL))
    except OSError:  # the file exists but cannot be loaded: MLX still runs, only slower
        return False
    return True


def _load_fortran() -> bool:
    """The wheel's library needs libgfortran.so.5, which a bare system lacks. MLX's wheel has one, but under another
    name (libgfortran-f7379c93.so.5.0.0). This loads a copy of it, kept in memory, under the name that is needed."""
    for original in _files("mlx", "../mlx_cpu.libs/libgfortran-*.so.5*"):
        name, wanted = original.name.encode() + b"\0", b"libgfortran.so.5"
        try:
            ctypes.CDLL(str(original))  # this also loads the libraries that the copy needs and could not find itself
            with open(os.memfd_create(wanted.decode()), "wb") as file:
                file.write(original.read_bytes().replace(name, wanted.ljust(len(name), b"\0")))
                file.flush()
                ctypes.CDLL(f"/proc/self/fd/{file.fileno()}")
        except OSError:
            return False
        return True
    return False
