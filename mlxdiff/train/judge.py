"""A small network that recognises time, terrain, sky, object, colour and side in a storybook picture. It measures how
well a model follows its prompts; its features give a Frechet distance. Pictures are (B, S, S, 3) uint8, S a
multiple of 64."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import Error
from ..score.distances import frechet as apart
from .storybook import COLOURS, OBJECTS, POSITIONS, SKIES, TERRAINS, TIMES, Scene
from .storybook.captions import NOUNS, POSITION, SKY, TERRAIN, TIME, bare

WORDS = {
    "time": TIMES,
    "terrain": TERRAINS,
    "sky": SKIES,
    "object": OBJECTS,
    "colour": COLOURS,
    "position": POSITIONS,
}
SIDE = 64  # pixels: what larger pictures are made smaller to
_LONGEST = 1000  # characters of a prompt that are read
SHAPES = ((3, 24, 2), (24, 48, 1), (48, 96, 1), (96, 96, 1))  # each convolution: in, out, stride


class Judge(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = [nn.Conv2d(a, b, 3, stride, 1, bias=False) for a, b, stride in SHAPES]
        self.norms = [nn.BatchNorm(b) for _, b, _ in SHAPES]
        self.pool = nn.MaxPool2d(2)
        self.hidden, self.heads = nn.Linear(4 * 4 * 96, 128), nn.Linear(128, sum(map(len, WORDS.values())))

    def features(self, x: mx.array) -> mx.array:
        """(B, S, S, 3) in [-1, 1] -> (B, 128)."""
        B, n = len(x), x.shape[1] // SIDE
        x = x.reshape(B, SIDE, n, SIDE, n, 3).mean((2, 4))
        for conv, norm, (_, _, stride) in zip(self.convs, self.norms, SHAPES, strict=True):
            x = nn.relu(norm(conv(x)))
            x = self.pool(x) if stride == 1 else x
        return nn.relu(self.hidden(x.reshape(B, -1)))

    def __call__(self, x: mx.array) -> list[mx.array]:
        """Logits of each kind of word."""
        ends = np.cumsum([len(words) for words in WORDS.values()])[:-1]
        return mx.split(self.heads(self.features(x)), ends.tolist(), axis=-1)


def shipped() -> Path:
    """The judge of the built-in model, which lies beside the tests in a checkout and inside the package in a wheel."""
    places = (above / "tests" / "data" / "judge.safetensors" for above in Path(__file__).parents[1:3])
    return next(file for file in places if file.is_file())


def load(path: Path) -> Judge:
    judge = Judge()
    try:
        judge.load_weights(str(path))
    except (OSError, RuntimeError, ValueError) as e:
        reason = str(e).splitlines()[0]
        raise Error(f"{path} is not a judge: {reason}.", "Give tests/data/judge.safetensors of the sources.") from None
    judge.apply(lambda w: w.astype(mx.float32))
    judge.eval()
    return judge


def labels(scenes: list[Scene]) -> np.ndarray:
    """(B, 6) indices into WORDS."""
    return np.array([[words.index(getattr(s, kind)) for kind, words in WORDS.items()] for s in scenes])


@cache
def _phrases() -> list[tuple[re.Pattern, int, int]]:
    """What captions say, the longest first: a pattern, the kind of word, and the word."""
    said = {"time": TIME, "terrain": TERRAIN, "sky": SKY, "object": NOUNS, "position": POSITION}
    found = {}
    for kind, (name, words) in enumerate(WORDS.items()):
        for i, word in enumerate(words):
            for phrase in (word, *map(bare, said.get(name, {}).get(word, ()))):
                found[phrase] = kind, i
    longest = sorted(found.items(), key=lambda entry: -len(entry[0]))
    return [(re.compile(rf"\b{re.escape(phrase)}\b"), *where) for phrase, where in longest]


def asked(prompts: Sequence[str]) -> np.ndarray:
    """(B, 6) indices into WORDS of what prompts ask for; -1 where one names no word of a kind, or several."""
    rows = np.full((len(prompts), len(WORDS)), -1)
    for row, prompt in zip(rows, prompts, strict=True):
        text, named = prompt[:_LONGEST].lower(), [set() for _ in WORDS]
        for pattern, kind, word in _phrases():
            text, times = pattern.subn("|", text)
            if times:
                named[kind].add(word)
        row[:] = [min(words) if len(words) == 1 else -1 for words in named]
    return rows


def read(judge: Judge, pictures: np.ndarray) -> np.ndarray:
    """The words that the judge sees, as (B, 6) indices into WORDS."""
    answers = [judge(_signed(pictures[i : i + 64])) for i in range(0, len(pictures), 64)]
    return np.concatenate([np.stack([np.array(a.argmax(-1)) for a in part], 1) for part in answers])


def adherence(judge: Judge, pictures: np.ndarray, scenes: list[Scene]) -> dict[str, float]:
    """For each kind, the share of pictures in which the judge sees the scene's word; "all": the share with all six
    words."""
    right = read(judge, pictures) == labels(scenes)
    return dict(zip(WORDS, right.mean(0).tolist(), strict=True)) | {"all": float(right.all(1).mean())}


def frechet(judge: Judge, a: np.ndarray, b: np.ndarray) -> float:
    """The distance of two sets of pictures."""
    return apart(features(judge, a), features(judge, b))


def features(judge: Judge, pictures: np.ndarray) -> np.ndarray:
    """(B, 128): what the judge sees in pictures, before it names it."""
    parts = [judge.features(_signed(pictures[i : i + 64])) for i in range(0, len(pictures), 64)]
    return np.concatenate([np.array(p, np.float64) for p in parts])


def _signed(pictures: np.ndarray) -> mx.array:
    high, wide = pictures.shape[1:3]
    if high != wide or high % SIDE:
        fix = f"Make them square, with an edge that is a multiple of {SIDE}."
        raise Error(f"The judge cannot read pictures of {wide} x {high} pixels.", fix)
    return mx.array(pictures.astype(np.float32) / 127.5 - 1)
