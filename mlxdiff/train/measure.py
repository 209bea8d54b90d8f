"""Measures how well a storybook model draws: it draws plain captions of random scenes, with seeds that count up from a
fixed one, and a judge reads the pictures. Renders of the same scenes give the best score that the judge can give. Also
measures how well the model denoises: its loss by noise level and by wrong word."""

from collections.abc import Iterator
from dataclasses import fields, replace

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..pipeline import Pipeline
from ..probe import encode, sides
from . import judge
from . import storybook as sb
from .recipe import SIZE

SEED = 1000  # the first picture's seed; it was fixed before any picture was seen
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue


def scenes(count: int, unseen: bool = False) -> list[sb.Scene]:
    rng = np.random.default_rng(2027 if unseen else 2026)
    return [sb.sample(rng, unseen) for _ in range(count)]


def renders(chosen: list[sb.Scene], size: int = SIZE) -> np.ndarray:
    """(B, size, size, 3) uint8."""
    rng = np.random.default_rng(9)
    return np.stack([sb.render(s, rng, size) for s in chosen])


def draw(pipe: Pipeline, chosen: list[sb.Scene], **settings) -> np.ndarray:
    """(B, height, width, 3) uint8. The settings are Request's fields."""
    pictures = []
    for k, scene in enumerate(tqdm(chosen, desc="draw", unit="picture", leave=False)):
        pictures.append(np.asarray(pipe(sb.plain(scene), seed=SEED + k, **settings).image))
    return np.stack(pictures)


def measure(pipe: Pipeline, referee: judge.Judge, chosen: list[sb.Scene], **settings) -> dict[str, float]:
    """The shares of `judge.adherence`, and the Frechet distance from renders of the same scenes."""
    pictures = draw(pipe, chosen, **settings)
    distance = judge.frechet(referee, pictures, renders(chosen, pictures.shape[1]))
    return judge.adherence(referee, pictures, chosen) | {"frechet": distance}


def steepness(pictures: np.ndarray) -> float:
    """How sharp the edges of pictures (B, H, W, 3) are: the 99th percentile of the luma's gradient, over all pixels."""
    luma = pictures.astype(np.float32) @ LUMA
    return float(np.percentile(np.hypot(np.diff(luma, axis=1)[:, :, :-1], np.diff(luma, axis=2)[:, :-1]), 99))


def losses(
    pipe: Pipeline, chosen: list[sb.Scene], sigmas: list[float], seed: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """For each scene, the loss at each noise level: the error in v, which the built-in model was trained to predict.
    The dict has the loss for the right caption and for captions with one kind of word wrong, under the same noise."""
    sigmas, size = np.array(sigmas), pipe.description.defaults.size
    for k, (scene, pixels) in enumerate(zip(chosen, renders(chosen, size), strict=True)):
        x0 = encode(pipe, Image.fromarray(pixels))
        noise = np.random.default_rng([seed, k]).standard_normal((len(sigmas), *x0.shape)).astype(np.float32)
        versions = {"right": scene, **wrong(scene, np.random.default_rng([seed, k]))}
        captions = [sb.plain(s) for s in versions.values()]
        looks = [
            look
            for a, b in zip(captions[::2], captions[1::2] + captions[-1:], strict=False)
            for look in sides(pipe, b, negative=a)
        ]
        by_version = {}
        for name, look in zip(versions, looks, strict=False):
            off = [np.square(look(x0 + s * n, float(s)) - x0).mean() for s, n in zip(sigmas, noise, strict=True)]
            by_version[name] = np.array(off) * (1 + sigmas**2) / sigmas**2
        yield by_version


def wrong(scene: sb.Scene, rng: np.random.Generator) -> dict[str, sb.Scene]:
    """For each kind of word: the same scene with another word of this kind that also makes a valid scene."""
    kinds = (sb.TIMES, sb.TERRAINS, sb.SKIES, sb.OBJECTS, sb.COLOURS, sb.POSITIONS)
    scenes_by_kind = {}
    for field, options in zip(fields(scene), kinds, strict=True):
        others = [replace(scene, **{field.name: word}) for word in options]
        others = [s for s in others if s != scene and sb.valid(s)]
        if others:  # a boat is only on the water, so it has no other terrain
            scenes_by_kind[field.name] = others[rng.integers(len(others))]
    return scenes_by_kind
