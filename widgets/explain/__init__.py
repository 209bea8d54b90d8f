"""Lessons: small widgets, one idea each, on the built-in model. `from mlxdiff.widgets.explain import FilmStrip`."""

from .claims_model import MODEL
from .claims_noise import NOISE
from .film import FilmStrip
from .forward import ForwardNoise
from .guidance import GuidanceSweep, Negative, TwoAnswers
from .judging import Bias, Distance, Marks, Obedience
from .latent import Channels, Nudge, RoundTrip
from .race import SamplerRace
from .seeds import BetweenSeeds, SeedGrid
from .tokens import Tokens
from .training import Loss, TwoMoons
from .trial import Trial, verdicts
from .whole import Map, here
from .words import WordMaps

__all__ = [
    "MODEL",
    "NOISE",
    "BetweenSeeds",
    "Bias",
    "Channels",
    "Distance",
    "FilmStrip",
    "ForwardNoise",
    "GuidanceSweep",
    "Loss",
    "Map",
    "Marks",
    "Negative",
    "Nudge",
    "Obedience",
    "RoundTrip",
    "SamplerRace",
    "SeedGrid",
    "Tokens",
    "Trial",
    "TwoAnswers",
    "TwoMoons",
    "WordMaps",
    "here",
    "verdicts",
]
