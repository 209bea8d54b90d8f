"""The Jupyter layer: `Studio()` draws with any model from a notebook. It needs the extra `studio`."""

from ..console import install
from ..errors import Error

__all__ = ["Studio"]


def __getattr__(name: str):
    """Import Studio only when it is asked for: the worker and `mlxdiff studio --help` need no ipywidgets."""
    if name != "Studio":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .studio import Studio
    except ModuleNotFoundError as e:
        raise Error(f"The studio needs {e.name}.", f"Install it with: {install('studio')}") from None
    return Studio
