"""Linux only: put OpenBLAS under MLX. The `mlx[cpu]` wheel is linked against reference BLAS (7 GFLOP/s on two cores);
an OpenBLAS loaded globally before `mlx.core` takes its sgemm's place (230 GFLOP/s). Does nothing elsewhere."""

import ctypes
import ctypes.util
import sys


def preload() -> str | None:
    """The OpenBLAS library now under MLX, or None. Must run before the first import of mlx.core."""
    if sys.platform != "linux" or "mlx.core" in sys.modules:
        return None
    name = ctypes.util.find_library("openblas")
    if name is None:
        return None
    try:
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    except OSError:  # found but not loadable: MLX still runs, only slower
        return None
    return name
