"""The Jupyter layer: `Studio()` draws with any model from a notebook. It needs `pip install "mlxdiff[studio]"`."""

from ..errors import Error

__all__ = ["Studio"]


def __getattr__(name: str):
    """Studio, loaded when asked for: the worker and `mlxdiff studio --help` do without ipywidgets."""
    if name != "Studio":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .studio import Studio
    except ModuleNotFoundError as e:
        raise Error(f"The studio needs {e.name}.", 'Install it with: pip install "mlxdiff[studio]"') from None
    return Studio
