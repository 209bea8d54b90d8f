"""Lessons: small widgets, one idea each, on the built-in model. `from mlxdiff.widgets.explain import FilmStrip`."""

from .adapters import Adapter, Drift, Scale
from .added import FromLines, LearnedWord
from .blocks import UNetBesideTransformer, WhereBlocksLook
from .claims_further import COUNTING, EXTRA_FINGERS, HEALS, NEAR_ONLY, ONE_SPACE, PHRASING, SCHEDULE
from .claims_model import MODEL
from .claims_noise import NOISE
from .dots import InkDrop
from .drawing import YourWorld
from .editing import OnlyAPart, Strength, ThereAndBack
from .few import FewSteps, NoiseTable, Straighten
from .film import FilmStrip
from .forward import ForwardNoise
from .guidance import GuidanceSweep, Negative, TwoAnswers
from .inside import LyingAboutTime, TakenOut, WhoDecides
from .judging import Bias, Distance, Marks, Obedience
from .latent import Channels, Nudge, RoundTrip
from .nothing import Checks, Strip
from .novelty import Memory, NearestPicture
from .race import SamplerRace
from .rivals import LossSays, Rivals, Scores
from .seeds import BetweenSeeds, SeedGrid
from .tokens import Tokens
from .training import Loss, TwoMoons
from .trial import Trial, verdicts
from .whole import Map, here
from .words import PictureAsPrompt, WordMaps

__all__ = [
    "COUNTING",
    "EXTRA_FINGERS",
    "HEALS",
    "MODEL",
    "NEAR_ONLY",
    "NOISE",
    "ONE_SPACE",
    "PHRASING",
    "SCHEDULE",
    "Adapter",
    "BetweenSeeds",
    "Bias",
    "Channels",
    "Checks",
    "Distance",
    "Drift",
    "FewSteps",
    "FilmStrip",
    "ForwardNoise",
    "FromLines",
    "GuidanceSweep",
    "InkDrop",
    "LearnedWord",
    "Loss",
    "LossSays",
    "LyingAboutTime",
    "Map",
    "Marks",
    "Memory",
    "NearestPicture",
    "Negative",
    "NoiseTable",
    "Nudge",
    "Obedience",
    "OnlyAPart",
    "PictureAsPrompt",
    "Rivals",
    "RoundTrip",
    "SamplerRace",
    "Scale",
    "Scores",
    "SeedGrid",
    "Straighten",
    "Strength",
    "Strip",
    "TakenOut",
    "ThereAndBack",
    "Tokens",
    "Trial",
    "TwoAnswers",
    "TwoMoons",
    "UNetBesideTransformer",
    "WhereBlocksLook",
    "WhoDecides",
    "WordMaps",
    "YourWorld",
    "here",
    "verdicts",
]
