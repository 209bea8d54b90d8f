"""A square float32 picture in [0, 1] with unit coordinates (x right, y down), and methods that paint on it."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

FLOAT = np.float32


def rgb(colour) -> np.ndarray:
    return np.asarray(colour, FLOAT) / 255


def mix(a, b, t):
    return a + (b - a) * t


class Canvas:
    def __init__(self, size: int):
        self.size = size
        self.a = (np.arange(size, dtype=FLOAT) + 0.5) / size  # (S,)
        self.x, self.y = self.a[None, :], self.a[:, None]
        self.image = np.zeros((size, size, 3), FLOAT)

    def edge(self, distance: np.ndarray) -> np.ndarray:
        """Coverage of the side where distance (in picture widths) is positive, with an edge one pixel soft."""
        return np.clip(distance * self.size + 0.5, 0, 1)

    def over(self, mask: np.ndarray, colour) -> None:
        """Paint a colour through a mask (S, S). colour: (3,), or any shape that broadcasts to the picture."""
        self.image += mask[..., None] * (colour - self.image)

    def disc(self, x: float, y: float, r: float) -> np.ndarray:
        return self.edge(r - self.distance(x, y))

    def distance(self, x: float, y: float) -> np.ndarray:
        return np.sqrt((self.x - x) ** 2 + (self.y - y) ** 2)

    def below(self, line: np.ndarray, top, bottom, depth: float) -> None:
        """Fill under the curve y = line(x), from colour `top` at the curve to `bottom` at `depth` under it."""
        drop = self.y - line[None]
        self.over(self.edge(drop), mix(top, bottom, np.clip(drop / depth, 0, 1)[..., None]))

    def drawn(self, draw: Callable[[ImageDraw.ImageDraw, int], None], oversample: int = 2) -> np.ndarray:
        """The mask of a PIL drawing; `draw` gets the pen and the side of the paper in pixels."""
        n = self.size * oversample
        paper = Image.new("L", (n, n), 0)
        draw(ImageDraw.Draw(paper), n)
        return np.asarray(paper.reduce(oversample), FLOAT) / 255

    def paste(self, rgba: np.ndarray, x: float, base: float, light: np.ndarray) -> None:
        """Paint a sprite (n, n, 4) that stands on (x, base), with its colours multiplied by `light`."""
        n, size = len(rgba), self.size
        left, top = round(x * size - n / 2), round(base * size - n)
        x0, x1, y0, y1 = max(0, left), min(size, left + n), max(0, top), min(size, top + n)
        part = rgba[y0 - top : y1 - top, x0 - left : x1 - left]
        below = self.image[y0:y1, x0:x1]
        below += part[..., 3:] * (part[..., :3] * light - below)

    def glow(self, x: float, y: float, r: float, colour, strength: float) -> None:
        """Add light as a soft round spot."""
        spot = strength * np.exp(-((self.x - x) ** 2 + (self.y - y) ** 2) / r**2)
        self.image += spot[..., None] * (1 - self.image) * colour
