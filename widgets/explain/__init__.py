"""Lessons: small widgets, one idea each, on the built-in model. `from mlxdiff.widgets.explain import FilmStrip`."""

from .film import FilmStrip
from .forward import ForwardNoise
from .guidance import GuidanceSweep, Negative, TwoAnswers
from .race import SamplerRace
from .text import Tokens, WordMaps

__all__ = ["FilmStrip", "ForwardNoise", "GuidanceSweep", "Negative", "SamplerRace", "Tokens", "TwoAnswers", "WordMaps"]
