"""Lessons: small widgets, one idea each, on the built-in model. `from mlxdiff.widgets.explain import FilmStrip`."""

from .few import FewSteps, NoiseTable, Straighten
from .film import FilmStrip
from .forward import ForwardNoise
from .guidance import GuidanceSweep, Negative, TwoAnswers
from .inside import LyingAboutTime, TakenOut, WhoDecides
from .latent import Channels, Nudge, RoundTrip
from .nothing import Checks, Strip
from .novelty import Memory, NearestPicture
from .race import SamplerRace
from .seeds import BetweenSeeds, SeedGrid
from .tokens import Tokens
from .training import Loss, TwoMoons
from .whole import Map, here
from .words import WordMaps

__all__ = [
    "BetweenSeeds",
    "Channels",
    "Checks",
    "FewSteps",
    "FilmStrip",
    "ForwardNoise",
    "GuidanceSweep",
    "Loss",
    "LyingAboutTime",
    "Map",
    "Memory",
    "NearestPicture",
    "Negative",
    "NoiseTable",
    "Nudge",
    "RoundTrip",
    "SamplerRace",
    "SeedGrid",
    "Straighten",
    "Strip",
    "TakenOut",
    "Tokens",
    "TwoAnswers",
    "TwoMoons",
    "WhoDecides",
    "WordMaps",
    "here",
]
