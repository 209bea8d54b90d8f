"""The storybook world: `sample` a scene, `render` it at any size, `caption` it in words. Everything is drawn from
one numpy Generator, so a seed is a picture."""

from .captions import caption, plain, vocabulary
from .picture import render
from .world import COLOURS, OBJECTS, POSITIONS, SKIES, TERRAINS, TIMES, Scene, every, held_out, sample, valid

__all__ = [
    "COLOURS",
    "OBJECTS",
    "POSITIONS",
    "SKIES",
    "TERRAINS",
    "TIMES",
    "Scene",
    "caption",
    "every",
    "held_out",
    "plain",
    "render",
    "sample",
    "valid",
    "vocabulary",
]
