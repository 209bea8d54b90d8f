"""How well a storybook model draws: plain captions of random scenes, seeds that count up from a fixed one, read by a
judge. Renders of the same scenes give the judge's own ceiling."""

import numpy as np
from tqdm import tqdm

from ..pipeline import Pipeline
from . import judge
from . import storybook as sb

SEED = 1000  # of the first picture; fixed before any picture was seen


def scenes(count: int, unseen: bool = False) -> list[sb.Scene]:
    rng = np.random.default_rng(2027 if unseen else 2026)
    return [sb.sample(rng, unseen) for _ in range(count)]


def renders(chosen: list[sb.Scene]) -> np.ndarray:
    """(B, 128, 128, 3) uint8."""
    rng = np.random.default_rng(9)
    return np.stack([sb.render(s, rng, 128) for s in chosen])


def draw(pipe: Pipeline, chosen: list[sb.Scene], **settings) -> np.ndarray:
    """(B, 128, 128, 3) uint8. The settings are Request's fields."""
    pictures = []
    for k, scene in enumerate(tqdm(chosen, desc="draw", unit="picture", leave=False)):
        pictures.append(np.asarray(pipe(sb.plain(scene), seed=SEED + k, **settings).image))
    return np.stack(pictures)


def measure(pipe: Pipeline, referee: judge.Judge, chosen: list[sb.Scene], **settings) -> dict[str, float]:
    """Shares of words found, and the Frechet distance from renders of the same scenes."""
    pictures = draw(pipe, chosen, **settings)
    distance = judge.frechet(referee, pictures, renders(chosen))
    return judge.adherence(referee, pictures, chosen) | {"frechet": distance}
