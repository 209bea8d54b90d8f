"""Stable Diffusion in plain Python on MLX."""

from . import loading as _loading

_loading.begin()  # first of all: loading takes a while

from importlib import import_module as _import_module  # noqa: E402
from pathlib import Path as _Path  # noqa: E402
from typing import TYPE_CHECKING  # noqa: E402

__version__ = "0.1.0"

# In a checkout, convert/ and widgets/ are next to this package; in a wheel they are inside it.
_above = _Path(__file__).resolve().parent.parent
if (_above / "pyproject.toml").is_file() and str(_above) not in __path__:
    __path__.append(str(_above))

from . import blas as _blas  # noqa: E402

BLAS = _blas.preload()
_blas.whole_float32()
_blas.keep_freed_memory()

if TYPE_CHECKING:
    from .errors import Error
    from .guides import Guide
    from .pipeline import Event, Pipeline, Result, load, stream
    from .request import Request

__all__ = ["BLAS", "Error", "Event", "Guide", "Pipeline", "Request", "Result", "__version__", "load", "stream"]

# Loading all of it takes a second, in which a command could not yet answer Ctrl-C: names are fetched when first used.
_MODULES = {"Error": "errors", "Guide": "guides", "Request": "request"}
_MODULES |= dict.fromkeys(("Event", "Pipeline", "Result", "load", "stream"), "pipeline")


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(_import_module(f".{_MODULES[name]}", __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
