"""What must be settled before MLX is imported. On Linux, put OpenBLAS under MLX: the `mlx[cpu]` wheel brings reference
BLAS (4.5 GFLOP/s a core); OpenBLAS does 81. It is loaded before `mlx.core`, and a stub that has the name of MLX's own
library leads MLX to it. Nobody else in the process sees its symbols: when all did, OpenBLAS 0.3.33 took the place of
torch's BLAS and crashed it.

The wheel `ngsolve-openblas` has an OpenBLAS for x86_64 that chooses its kernels by the processor it runs on.
`cmeel-openblas` has wheels for ARM too, but is built for one processor: without AVX-512 it dies of an illegal
instruction."""

import ctypes
import importlib.util
import os
import struct
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import IO

_SYSTEM = "libopenblas.so.0"  # both the wheel's SONAME and the system's
_THREADS = "OPENBLAS_NUM_THREADS"
# Read once, while the library is loaded. A thread without work asks for some 2^26 times before it sleeps, which costs
# others their processor; 2^4 is the least that OpenBLAS takes.
_SETTINGS = {_THREADS: "1", "OPENBLAS_THREAD_TIMEOUT": "4"}
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's names for its settings, in malloc.h
_loaded: list[ctypes.CDLL] = []
_stubs: list[IO[bytes]] = []


def preload() -> str | None:
    """Load OpenBLAS and return its name, or None if there is none. Must run before the first import of mlx.core.

    OpenBLAS uses one thread until `use_all_cores` is called, unless OPENBLAS_NUM_THREADS is set."""
    names = [file.name for file in _files("mlx", "../mlx_cpu.libs/libblas-*.so*")]
    if sys.platform != "linux" or not names:
        return None
    if "mlx.core" in sys.modules:
        text = "mlx was imported before mlxdiff, so MLX keeps its own, much slower, BLAS. Import mlxdiff first."
        warnings.warn(text, stacklevel=3)
        return None
    ours = [name for name in _SETTINGS if name not in os.environ]
    os.environ.update({name: _SETTINGS[name] for name in ours})
    try:
        found = _wheel() or (_SYSTEM if _load(_SYSTEM) else None)
    finally:
        for name in ours:
            del os.environ[name]  # numpy's OpenBLAS reads them too
    return found if found is not None and all(_lead(name, _SYSTEM) for name in names) else None


def whole_float32() -> None:
    """macOS: M5's matrix units round the numbers of a float32 product to 11 bits (TF32) unless MLX is told otherwise,
    before its first product. Only a VAE that overflows in float16 is in float32, and its pictures need the bits."""
    if sys.platform == "darwin":
        os.environ.setdefault("MLX_ENABLE_TF32", "0")


def keep_freed_memory() -> None:
    """Linux: let the process keep up to 256 MB of what it frees. MLX has no store of arrays there: each is asked of the
    C library, which would give much of them back to the system at once, and a page that comes back costs a fault, a
    sixth of the time of a small picture's decoding. An array of over 32 MB still goes back."""
    if sys.platform == "linux" and not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):  # not in musl
            library.mallopt(_MMAP_THRESHOLD, 32 << 20)
            library.mallopt(_TRIM_THRESHOLD, 256 << 20)


def _wheel() -> str | None:
    """The name of the wheel's library, once it is loaded. It needs libgfortran.so.5, which a bare system lacks; MLX's
    wheel brings one under a name of its own."""
    for library in _files("ngsolve_openblas", "libopenblas*.so*"):
        if _load(library):
            return library.name
        for fortran in _files("mlx", "../mlx_cpu.libs/libgfortran-*.so.5*"):
            if _load(fortran) and _lead("libgfortran.so.5", fortran.name) and _load(library):
                return library.name
    return None


def use_all_cores() -> None:
    """Give OpenBLAS a thread for each core. Only where one product follows another, as in training: its threads wait
    for each other without yielding, so that two products at once cost four times the processor time."""
    for library in _loaded:
        if _THREADS not in os.environ and hasattr(library, "openblas_set_num_threads"):
            library.openblas_set_num_threads(cores())
    divides.cache_clear()


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


@cache
def divides() -> bool:
    """Whether OpenBLAS divides a product over threads of its own, and wants no others beside it."""
    return any(x.openblas_get_num_threads() > 1 for x in _loaded if hasattr(x, "openblas_get_num_threads"))


def _files(package: str, pattern: str) -> Iterator[Path]:
    """Files in the folder of an installed package. The package is not imported."""
    spec = importlib.util.find_spec(package)
    for folder in [] if spec is None else spec.submodule_search_locations:
        yield from Path(folder).glob(pattern)


def _load(library: Path | str) -> bool:
    try:
        _loaded.append(ctypes.CDLL(str(library)))
    except OSError:  # found but not loadable: MLX still runs, only slower
        return False
    return True


def _lead(name: str, needs: str) -> bool:
    """Whoever needs the library `name` from now on is led to `needs`, which is loaded already."""
    file = open(os.memfd_create(name), "wb")  # noqa: SIM115 (stays open: the next stub must not get the same path)
    _stubs.append(file)
    try:
        file.write(_stub(name, needs))
        file.flush()
        _loaded.append(ctypes.CDLL(f"/proc/self/fd/{file.fileno()}"))
    except OSError:
        return False
    return True


def _stub(name: str, needs: str) -> bytes:
    """The smallest shared library: it is called `name`, holds nothing, and needs the one called `needs`, whose symbols
    are found by whoever needs `name`. (64-bit ELF: a header, two program headers, a dynamic section, strings.)"""
    strings = b"\0" + name.encode() + b"\0" + needs.encode() + b"\0"
    dynamic = [(14, 1), (1, len(name) + 2), (5, 0), (10, len(strings)), (6, 0), (11, 24), (0, 0)]  # SONAME, NEEDED, ...
    at = 64 + 2 * 56
    text = at + 16 * len(dynamic)
    where = {5: text, 6: text + len(strings)}  # DT_STRTAB, DT_SYMTAB: one empty symbol behind the strings
    entries = b"".join(struct.pack("<QQ", tag, where.get(tag, value)) for tag, value in dynamic)
    size = text + len(strings) + 24
    ident = b"\x7fELF\2\1\1".ljust(16, b"\0")
    with open(sys.executable, "rb") as python:
        (machine,) = struct.unpack_from("<H", python.read(20), 18)
    header = ident + struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, 64, 0, 0, 64, 56, 2, 64, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 6, 0, 0, 0, size, size, 4096)  # PT_LOAD: all of it, which the linker writes to
    own = struct.pack("<IIQQQQQQ", 2, 6, at, at, at, len(entries), len(entries), 8)  # PT_DYNAMIC
    return header + load + own + entries + strings + bytes(24)
