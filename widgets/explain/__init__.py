"""Lessons: small widgets, one idea each, on the built-in model. `from mlxdiff.widgets.explain import FilmStrip`."""

from .film import FilmStrip
from .forward import ForwardNoise
from .guidance import GuidanceSweep, Negative, TwoAnswers
from .latent import Channels, Nudge, RoundTrip
from .race import SamplerRace
from .seeds import BetweenSeeds, SeedGrid
from .tokens import Tokens
from .training import Loss, TwoMoons
from .whole import Map, here
from .words import WordMaps

__all__ = [
    "BetweenSeeds",
    "Channels",
    "FilmStrip",
    "ForwardNoise",
    "GuidanceSweep",
    "Loss",
    "Map",
    "Negative",
    "Nudge",
    "RoundTrip",
    "SamplerRace",
    "SeedGrid",
    "Tokens",
    "TwoAnswers",
    "TwoMoons",
    "WordMaps",
    "here",
]
