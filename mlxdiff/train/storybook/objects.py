"""The ten objects. Each is drawn in a unit square (u to the right, v down), stands on v = 1 and is lit from the left. A
drawing returns the places that glow at night as (u, v, radius)."""

import math

import numpy as np
from PIL import Image, ImageDraw

RGB = {
    "red": (212, 36, 42), "orange": (244, 130, 24), "yellow": (252, 214, 44), "green": (48, 166, 76),
    "blue": (40, 104, 226), "purple": (130, 62, 192), "pink": (252, 130, 186), "white": (246, 246, 242),
}  # fmt: skip
# Side of the object's unit square, in picture widths.
SIZES = {
    "house": 0.46, "castle": 0.53, "tree": 0.50, "boat": 0.50, "cactus": 0.48,
    "balloon": 0.50, "lighthouse": 0.60, "windmill": 0.56, "tent": 0.46, "mushroom": 0.46,
}  # fmt: skip
CREAM, WOOD, DOOR, INK = (248, 240, 222), (120, 80, 52), (84, 52, 36), (62, 58, 76)
OVERSAMPLE = 3

Colour = tuple[int, int, int]
Glow = tuple[float, float, float]


def shade(colour: Colour, factor: float) -> Colour:
    return tuple(min(255, int(c * factor)) for c in colour)


def tint(colour: Colour, amount: float) -> Colour:
    return tuple(int(c + (255 - c) * amount) for c in colour)


class Pen:
    """PIL's drawing calls in unit coordinates. At night `lamps` are lit; `tilt` turns a windmill's sails."""

    def __init__(self, pixels: int, lamps: bool, tilt: float):
        self.lamps, self.tilt = lamps, tilt
        self.window = (255, 214, 110) if lamps else (176, 220, 248)
        self.n = pixels * OVERSAMPLE
        self.image = Image.new("RGBA", (self.n, self.n), (0, 0, 0, 0))
        self.draw = ImageDraw.Draw(self.image)

    def scale(self, *values: float) -> list[float]:
        return [v * self.n for v in values]

    def polygon(self, colour: Colour, *points: tuple[float, float]) -> None:
        self.draw.polygon([(u * self.n, v * self.n) for u, v in points], fill=colour)

    def box(self, colour: Colour, *corners: float, radius: float = 0.0) -> None:
        self.draw.rounded_rectangle(self.scale(*corners), radius * self.n, fill=colour)

    def oval(self, colour: Colour, *corners: float) -> None:
        self.draw.ellipse(self.scale(*corners), fill=colour)

    def disc(self, colour: Colour, u: float, v: float, r: float) -> None:
        self.oval(colour, u - r, v - r, u + r, v + r)

    def pie(self, colour: Colour, *corners: float) -> None:
        """The upper half of an oval."""
        self.draw.pieslice(self.scale(*corners), 180, 360, fill=colour)

    def line(self, colour: Colour, width: float, *points: tuple[float, float]) -> None:
        self.draw.line([(u * self.n, v * self.n) for u, v in points], fill=colour, width=max(1, int(width * self.n)))


def house(pen: Pen, c: Colour) -> list[Glow]:
    roof = (96, 66, 64) if c[0] < 200 or c[1] > 180 else (70, 66, 92)
    pen.box((132, 92, 82), 0.70, 0.18, 0.80, 0.45)
    pen.box(c, 0.12, 0.48, 0.88, 1)
    pen.box(shade(c, 0.78), 0.66, 0.48, 0.88, 1)
    pen.polygon(roof, (0.5, 0.08), (0.02, 0.52), (0.98, 0.52))
    pen.polygon(shade(roof, 0.75), (0.5, 0.08), (0.66, 0.52), (0.98, 0.52))
    pen.box(DOOR, 0.42, 0.68, 0.58, 1.02, radius=0.04)
    for u in (0.17, 0.67):
        pen.box(CREAM, u, 0.60, u + 0.17, 0.80)
        pen.box(pen.window, u + 0.025, 0.625, u + 0.145, 0.775)
    return [(0.255, 0.70, 0.16), (0.755, 0.70, 0.16)]


def castle(pen: Pen, c: Colour) -> list[Glow]:
    roof = shade(c, 0.5) if min(c) < 200 else (96, 110, 160)
    pen.box(shade(c, 0.86), 0.18, 0.56, 0.82, 1)
    for k in range(4):
        pen.box(shade(c, 0.86), 0.27 + 0.13 * k, 0.49, 0.34 + 0.13 * k, 0.58)
    for u in (0.03, 0.73):
        pen.box(c, u, 0.36, u + 0.24, 1)
        pen.box(shade(c, 0.72), u + 0.15, 0.36, u + 0.24, 1)
        pen.polygon(roof, (u + 0.12, 0.06), (u - 0.03, 0.38), (u + 0.27, 0.38))
        pen.box(pen.window, u + 0.075, 0.50, u + 0.165, 0.66, radius=0.04)
    pen.oval(DOOR, 0.39, 0.70, 0.61, 0.94)
    pen.box(DOOR, 0.39, 0.82, 0.61, 1)
    return [(0.15, 0.58, 0.13), (0.85, 0.58, 0.13)]


def tree(pen: Pen, c: Colour) -> list[Glow]:
    crown = [(0.5, 0.26, 0.25), (0.27, 0.42, 0.23), (0.73, 0.42, 0.23), (0.5, 0.48, 0.25)]
    pen.polygon(WOOD, (0.43, 0.55), (0.57, 0.55), (0.62, 1), (0.38, 1))
    for u, v, r in crown:
        pen.disc(shade(c, 0.74), u, v, r)
    for u, v, r in crown:
        pen.disc(c, u - 0.035, v - 0.03, 0.82 * r)
    pen.disc(tint(c, 0.3), 0.42, 0.19, 0.10)
    return []


def boat(pen: Pen, c: Colour) -> list[Glow]:
    pen.line(DOOR, 0.03, (0.5, 0.02), (0.5, 0.82))
    pen.polygon(c, (0.53, 0.04), (0.53, 0.74), (0.97, 0.74))
    pen.polygon(shade(c, 0.82), (0.47, 0.14), (0.47, 0.74), (0.10, 0.74))
    pen.polygon((140, 82, 50), (0.03, 0.79), (0.97, 0.79), (0.80, 1), (0.20, 1))
    pen.polygon(CREAM, (0.03, 0.79), (0.97, 0.79), (0.93, 0.85), (0.07, 0.85))
    return []


def cactus(pen: Pen, c: Colour) -> list[Glow]:
    for corners in ((0.36, 0.08, 0.64, 1.10), (0.06, 0.30, 0.25, 0.68), (0.75, 0.22, 0.94, 0.60)):
        pen.box(c, *corners, radius=(corners[2] - corners[0]) / 2)
    pen.box(c, 0.06, 0.54, 0.50, 0.70, radius=0.08)
    pen.box(c, 0.50, 0.46, 0.94, 0.62, radius=0.08)
    for u, top, bottom in ((0.50, 0.16, 1), (0.585, 0.2, 1)):
        pen.line(shade(c, 0.72), 0.028, (u, top), (u, bottom))
    pen.disc((255, 224, 90) if c[0] > 240 and c[1] < 200 else (255, 112, 170), 0.5, 0.09, 0.08)
    return []


def balloon(pen: Pen, c: Colour) -> list[Glow]:
    stripe = CREAM if min(c) < 200 else (176, 186, 214)
    pen.line(INK, 0.018, (0.38, 0.72), (0.44, 0.90))
    pen.line(INK, 0.018, (0.62, 0.72), (0.56, 0.90))
    pen.disc(c, 0.5, 0.38, 0.37)
    pen.polygon(c, (0.18, 0.56), (0.82, 0.56), (0.60, 0.80), (0.40, 0.80))
    for left, right in ((0.28, 0.36), (0.64, 0.72)):
        pen.oval(stripe, left, 0.08, right, 0.74)
    pen.oval(shade(c, 0.8), 0.77, 0.20, 0.86, 0.58)
    pen.box((156, 104, 62), 0.40, 0.87, 0.60, 1, radius=0.03)
    return [(0.5, 0.80, 0.20)]


def lighthouse(pen: Pen, c: Colour) -> list[Glow]:
    band = CREAM if min(c) < 200 else (140, 150, 178)
    step = 0.76 / 5

    def half(v):  # the tower widens towards its foot
        return 0.12 + 0.10 * (v - 0.24) / 0.76

    for k in range(5):
        top, bottom = 0.24 + step * k, min(1.0, 0.245 + step * (k + 1))
        colour = band if k % 2 else c
        right = (0.5 + half(top), top), (0.5 + half(bottom), bottom)
        pen.polygon(colour, *right, (0.5 - half(bottom), bottom), (0.5 - half(top), top))
        pen.polygon(shade(colour, 0.82), *right, (0.54, bottom), (0.53, top))
    pen.box(INK, 0.33, 0.21, 0.67, 0.26)
    pen.box((255, 236, 140), 0.40, 0.10, 0.60, 0.215)
    pen.polygon(shade(c, 0.62) if min(c) < 200 else (84, 92, 124), (0.5, 0), (0.34, 0.115), (0.66, 0.115))
    pen.box(DOOR, 0.43, 0.88, 0.57, 1.02, radius=0.03)
    return [(0.5, 0.16, 0.34)]


def windmill(pen: Pen, c: Colour) -> list[Glow]:
    pen.polygon(c, (0.36, 0.44), (0.64, 0.44), (0.76, 1), (0.24, 1))
    pen.polygon(shade(c, 0.78), (0.54, 0.44), (0.64, 0.44), (0.76, 1), (0.58, 1))
    pen.polygon(shade(c, 0.5) if min(c) < 200 else (120, 84, 70), (0.5, 0.27), (0.31, 0.46), (0.69, 0.46))
    pen.box(DOOR, 0.43, 0.80, 0.57, 1.02, radius=0.05)
    sail = (252, 246, 230) if min(c) < 200 else (214, 184, 150)
    for k in range(4):
        angle = pen.tilt + math.pi * (0.25 + 0.5 * k)
        x, y = math.cos(angle), math.sin(angle)
        outline = (0.06, -0.02), (0.43, -0.02), (0.43, 0.13), (0.06, 0.08)
        corners = [(0.5 + r * x - q * y, 0.46 + r * y + q * x) for r, q in outline]
        pen.polygon(sail, *corners)
        pen.line(DOOR, 0.03, (0.5, 0.46), (0.5 + 0.45 * x, 0.46 + 0.45 * y))
    pen.disc(DOOR, 0.5, 0.46, 0.055)
    return []


def tent(pen: Pen, c: Colour) -> list[Glow]:
    pen.line(WOOD, 0.03, (0.53, 0.30), (0.46, 0.16))
    pen.line(WOOD, 0.03, (0.47, 0.30), (0.54, 0.16))
    pen.polygon(c, (0.5, 0.24), (-0.02, 1), (1.02, 1))
    pen.polygon(shade(c, 0.76), (0.5, 0.24), (0.66, 1), (1.02, 1))
    pen.polygon(pen.window if pen.lamps else shade(c, 0.36), (0.5, 0.42), (0.33, 1), (0.67, 1))
    return [(0.5, 0.82, 0.30)]


def mushroom(pen: Pen, c: Colour) -> list[Glow]:
    pen.box((248, 236, 214), 0.35, 0.46, 0.65, 1.0, radius=0.09)
    pen.box((224, 206, 182), 0.54, 0.54, 0.65, 1.0, radius=0.09)
    pen.pie(c, 0.01, 0.04, 0.99, 1.06)
    pen.oval(shade(c, 0.72), 0.01, 0.46, 0.99, 0.66)
    dots = (255, 250, 240) if min(c) < 200 else (232, 112, 104)
    for u, v, r in ((0.5, 0.20, 0.085), (0.24, 0.34, 0.07), (0.75, 0.35, 0.075), (0.49, 0.43, 0.06)):
        pen.disc(dots, u, v, r)
    return []


DRAWINGS = {
    "house": house, "castle": castle, "tree": tree, "boat": boat, "cactus": cactus,
    "balloon": balloon, "lighthouse": lighthouse, "windmill": windmill, "tent": tent, "mushroom": mushroom,
}  # fmt: skip


def sprite(
    name: str, colour: Colour, pixels: int, lamps: bool, mirror: bool, tilt: float
) -> tuple[np.ndarray, list[Glow]]:
    """(pixels, pixels, 4) float32 in [0, 1], and the glows. `mirror` moves the light to the right."""
    pen = Pen(pixels, lamps, tilt)
    glows = DRAWINGS[name](pen, colour)
    rgba = np.asarray(pen.image.reduce(OVERSAMPLE), np.float32) / 255  # (n, n, 4)
    if mirror:
        rgba, glows = rgba[:, ::-1], [(1 - u, v, r) for u, v, r in glows]
    return rgba, glows
