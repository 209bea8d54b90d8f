"""What a measurement was made on: the machine and the versions. Nothing in it is personal: no user, host or path."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import mlx.core as mx

from .. import BLAS, __version__
from ..advice import this_machine
from ..models import ways

# Environment variables of MLX that change its speed
_TUNING = ("MLX_ENABLE_TF32", "MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER", "MLX_METAL_FAST_SYNCH")
_ROOT = Path(__file__).parent.parent.parent


def facts() -> dict:
    return {
        "mlxdiff": __version__,
        "commit": commit(),
        "mlx": metadata.version("mlx"),
        "python": platform.python_version(),
        "system": system(),
        "device": "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu",
        "chip": str(mx.device_info().get("device_name", "unknown")),
        "memory_bytes": this_machine().memory,
        "blas": BLAS,
        "tuning": tuning(),
    }


def tuning() -> dict[str, str]:
    """What `mlxdiff tune` chose here, and settings of MLX. A model must have been loaded, which reads the choices."""
    chosen = {way: "on" if used else "off" for way, used in ways.measured().items()}
    return chosen | {name: os.environ[name] for name in _TUNING if os.environ.get(name)}


def system() -> str:
    """macOS with its version; of others the name alone."""
    mac = platform.mac_ver()[0]
    return f"macOS {mac}" if mac else platform.system()


def commit() -> str | None:
    """The commit that mlxdiff runs from, if that is a checkout of its repository, with a + if files differ from it."""
    if not (_ROOT / "pyproject.toml").is_file() or not (_ROOT / ".git").exists():
        return None
    try:
        found = _git("rev-parse", "--short=10", "HEAD")
        return f"{found}{'+' if _git('status', '--porcelain', '--untracked-files=no') else ''}"
    except (OSError, subprocess.SubprocessError):  # no git here, or not its repository
        return None


def _git(*words: str) -> str:
    call = ["git", "-C", str(_ROOT), *words]
    return subprocess.run(call, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
