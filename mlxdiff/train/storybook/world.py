"""The contents of a picture. A scene has one object, because small networks swap the colours of two objects. Some pairs
of words are never trained on; they measure whether a model can combine what it has learned."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

TIMES = ("dawn", "day", "sunset", "night")
TERRAINS = ("mountains", "hills", "desert", "sea", "snow", "forest")
BY_DAY = ("clear", "sun", "clouds", "rainbow")
BY_NIGHT = ("full moon", "crescent moon", "stars", "aurora")
SKIES = BY_DAY + BY_NIGHT
OBJECTS = ("house", "castle", "tree", "boat", "cactus", "balloon", "lighthouse", "windmill", "tent", "mushroom")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
POSITIONS = ("left", "centre", "right")

HELD_OUT = {
    ("castle", "pink"), ("tree", "blue"), ("house", "purple"), ("lighthouse", "green"),
    ("balloon", "white"), ("boat", "yellow"), ("tent", "orange"), ("windmill", "red"),
    ("cactus", "snow"), ("mushroom", "desert"), ("castle", "sea"), ("windmill", "forest"),
}  # (object, colour) and (object, terrain)  # fmt: skip


@dataclass(frozen=True)
class Scene:
    time: str
    terrain: str
    sky: str
    object: str
    colour: str
    position: str


def valid(scene: Scene) -> bool:
    """Whether the sky fits the time (moon and stars at night, sun and rainbow by day), and a boat is on water."""
    return (scene.sky in BY_NIGHT) == (scene.time == "night") and (scene.object != "boat" or scene.terrain == "sea")


def held_out(scene: Scene) -> bool:
    return (scene.object, scene.colour) in HELD_OUT or (scene.object, scene.terrain) in HELD_OUT


def every() -> Iterator[Scene]:
    """All valid scenes, held-out ones too."""
    combinations = product(TIMES, TERRAINS, SKIES, OBJECTS, COLOURS, POSITIONS)
    return filter(valid, (Scene(*c) for c in combinations))


def sample(rng: np.random.Generator, unseen: bool = False) -> Scene:
    """A valid scene from the training pairs, or with `unseen` from the held-out pairs. It tries all objects
    equally often."""
    while True:
        thing = OBJECTS[rng.integers(len(OBJECTS))]
        time = TIMES[rng.integers(len(TIMES))]
        skies = BY_NIGHT if time == "night" else BY_DAY
        scene = Scene(
            time=time,
            terrain="sea" if thing == "boat" else TERRAINS[rng.integers(len(TERRAINS))],
            sky=skies[rng.integers(len(skies))],
            object=thing,
            colour=COLOURS[rng.integers(len(COLOURS))],
            position=POSITIONS[rng.integers(len(POSITIONS))],
        )
        if held_out(scene) == unseen:
            return scene
