"""Stable Diffusion in plain Python on MLX."""

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a checkout, convert/ and widgets/ are next to this package; in a wheel they are inside it.
_above = _Path(__file__).resolve().parent.parent
if (_above / "pyproject.toml").is_file() and str(_above) not in __path__:
    __path__.append(str(_above))

from . import blas as _blas  # noqa: E402

BLAS = _blas.preload()
_blas.whole_float32()

from .errors import Error  # noqa: E402
from .guides import Guide  # noqa: E402
from .pipeline import Event, Pipeline, Result, load, stream  # noqa: E402
from .request import Request  # noqa: E402

__all__ = ["BLAS", "Error", "Event", "Guide", "Pipeline", "Request", "Result", "__version__", "load", "stream"]
