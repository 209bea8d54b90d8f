"""Scene -> picture: sky, terrain and one object, painted back to front. All random numbers are in unit coordinates,
so a seed gives the same picture at any size."""

import numpy as np

from .canvas import Canvas, mix, rgb
from .objects import RGB, SIZES, sprite
from .world import Scene

SKY = {  # two palettes each, top to horizon
    "dawn": [
        [(120, 140, 204), (196, 166, 206), (252, 192, 190), (255, 226, 190)],
        [(140, 168, 214), (206, 186, 214), (255, 204, 196), (255, 236, 208)],
    ],
    "day": [
        [(46, 126, 220), (104, 176, 240), (180, 222, 250), (222, 242, 252)],
        [(60, 150, 230), (120, 195, 245), (170, 220, 248), (215, 240, 250)],
    ],
    "sunset": [
        [(72, 44, 116), (176, 60, 108), (246, 112, 62), (255, 190, 84)],
        [(92, 48, 120), (204, 78, 96), (250, 130, 56), (255, 205, 100)],
    ],
    "night": [
        [(8, 12, 44), (16, 26, 76), (30, 48, 112), (52, 76, 140)],
        [(12, 10, 48), (24, 24, 82), (42, 42, 116), (66, 70, 146)],
    ],
}
LIGHT = {
    "dawn": rgb((250, 228, 230)),
    "day": rgb((255, 255, 255)),
    "sunset": rgb((252, 206, 180)),
    "night": rgb((146, 156, 212)),
}
GROUND = {  # lit and shaded
    "mountains": [(126, 166, 112), (84, 136, 84)],
    "hills": [(156, 208, 96), (84, 164, 70)],
    "desert": [(248, 210, 136), (224, 154, 84)],
    "sea": [(232, 210, 150), (120, 170, 90)],
    "snow": [(240, 246, 253), (206, 222, 242)],
    "forest": [(104, 162, 92), (60, 112, 66)],
}
WATER = {"dawn": (120, 136, 186), "day": (40, 120, 184), "sunset": (98, 54, 108), "night": (16, 28, 74)}
CLOUD = {  # top and underside
    "dawn": [(255, 236, 234), (228, 180, 196)],
    "day": [(255, 255, 255), (206, 222, 240)],
    "sunset": [(255, 190, 150), (198, 92, 112)],
}
SUN = {  # disc and halo
    "dawn": [(255, 244, 206), (255, 206, 160)],
    "day": [(255, 246, 150), (255, 244, 190)],
    "sunset": [(255, 232, 130), (255, 150, 60)],
}
BOW = rgb([(235, 60, 60), (250, 150, 50), (252, 230, 80), (90, 200, 100), (70, 140, 235), (150, 90, 210)])
PUFFS = ((-0.13, 0, 0.048), (-0.065, 0.028, 0.066), (0.005, 0.05, 0.08), (0.07, 0.024, 0.064), (0.13, 0, 0.048))
PLACE = {"left": 0.27, "centre": 0.5, "right": 0.73}
LAMP = rgb((255, 204, 108))


def render(scene: Scene, rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 3) uint8."""
    canvas = Canvas(size)
    horizon = rng.uniform(0.58, 0.63)
    x = PLACE[scene.position] + rng.uniform(-0.03, 0.03)
    # The sun or moon is always on the free side, never on a random one: a model that cannot know the side draws two.
    away = -1 if scene.position == "right" else 1
    light_x = 0.5 + away * rng.uniform(0.24, 0.34)
    light = away if scene.sky in ("sun", "full moon", "crescent moon") else -1  # -1: from the left

    haze = _sky(canvas, scene, rng, horizon, light_x)
    lit = [rgb(c) * LIGHT[scene.time] + rng.normal(0, 0.012, 3) for c in GROUND[scene.terrain]]
    ground = [np.clip(c, 0, 1).astype(np.float32) for c in lit]
    TERRAIN[scene.terrain](canvas, scene, rng, horizon, ground, haze, light)

    size_ = SIZES[scene.object] * rng.uniform(0.95, 1.05)
    base = rng.uniform(0.84, 0.90)
    if scene.object == "balloon":
        base = rng.uniform(0.60, 0.66)
    elif scene.terrain == "sea":
        base = horizon + (0.06 if scene.object == "boat" else 0.02)
        size_ *= 1.0 if scene.object == "boat" else 0.9
    if scene.terrain == "sea":
        if scene.object not in ("boat", "balloon"):
            hill = 1 - ((canvas.x - x) / 0.30) ** 2 - ((canvas.y - horizon - 0.01) / 0.07) ** 2
            shore = np.clip(hill * 9, 0, 1) * canvas.edge(horizon - canvas.y)
            canvas.over(shore, mix(ground[0], ground[1], np.clip((horizon - canvas.y) / 0.06, 0, 1)[..., None]))
            _object(canvas, scene, rng, x, base - 0.04, size_, light)
        elif scene.object == "balloon":
            _object(canvas, scene, rng, x, base - 0.04, size_, light)
        _water(canvas, scene, rng, horizon)
        if scene.object == "boat":
            _object(canvas, scene, rng, x, base, size_, light)
            canvas.over(0.35 * _shadow(canvas, x, base + 0.006, 0.46 * size_, 0.014), LIGHT[scene.time])
    else:
        if scene.object != "balloon":
            canvas.over(0.32 * _shadow(canvas, x - 0.03 * light, base, 0.46 * size_, 0.024), ground[1] * 0.25)
        _object(canvas, scene, rng, x, base, size_, light)
    vignette = 1 - 0.3 * ((canvas.x - 0.5) ** 2 + (canvas.y - 0.5) ** 2)
    return (np.clip(canvas.image * vignette[..., None], 0, 1) * 255 + 0.5).astype(np.uint8)


def _shadow(canvas: Canvas, x: float, y: float, half: float, height: float) -> np.ndarray:
    return np.exp(-(((canvas.x - x) / half) ** 4) - ((canvas.y - y) / height) ** 2)


def _object(canvas: Canvas, scene: Scene, rng, x: float, base: float, size: float, light: int) -> None:
    lamps = scene.time == "night"
    colour = tuple(int(c) for c in np.clip(np.array(RGB[scene.colour]) + rng.normal(0, 4, 3), 0, 255))
    pixels = max(8, round(size * canvas.size))
    rgba, glows = sprite(scene.object, colour, pixels, lamps, mirror=light > 0, tilt=rng.uniform(-0.2, 0.2))
    canvas.paste(rgba, x, base, mix(LIGHT[scene.time], 1.0, 0.62))  # a third of the tint: red stays red at night
    for u, v, r in glows if lamps else ():
        canvas.glow(x + (u - 0.5) * size, base - (1 - v) * size, r * size, LAMP, 0.45)


# --- sky


def _sky(canvas: Canvas, scene: Scene, rng, horizon: float, light_x: float) -> np.ndarray:
    """Paint the sky and return its colour at the horizon, which is the haze over distant things."""
    stops = rgb(SKY[scene.time][rng.integers(2)]) + rng.normal(0, 0.012, (4, 3)).astype(np.float32)
    v = np.clip(canvas.a / (horizon + 0.02), 0, 1) * 3
    k = np.minimum(v.astype(int), 2)
    rows = mix(stops[k], stops[k + 1], (v - k)[:, None])  # (S, 3)
    canvas.image[:] = rows[:, None]
    if scene.sky in SKIES:
        SKIES[scene.sky](canvas, scene, rng, light_x)
    return rows[int(horizon * canvas.size)]


def _sun(canvas, scene, rng, x):
    disc, halo = (rgb(c) for c in SUN[scene.time])
    y = rng.uniform(0.16, 0.24)
    canvas.over(0.6 * np.exp(-((canvas.distance(x, y) / 0.24) ** 1.4)), halo)
    canvas.over(canvas.disc(x, y, 0.095), disc)


def _moon(canvas, scene, rng, x):
    y, r = rng.uniform(0.16, 0.24), 0.11
    canvas.over(0.34 * np.exp(-((canvas.distance(x, y) / 0.22) ** 1.4)), rgb((170, 190, 250)))
    moon = canvas.disc(x, y, r)
    if scene.sky == "crescent moon":
        moon *= 1 - canvas.disc(x + 0.065, y - 0.02, 0.095)
    canvas.over(moon, rgb((255, 246, 208)))
    if scene.sky == "full moon":
        for dx, dy, q in ((-0.04, -0.025, 0.026), (0.035, 0.03, 0.032), (0.02, -0.05, 0.018)):
            canvas.over(0.4 * canvas.disc(x + dx, y + dy, q), rgb((204, 198, 184)))


def _stars(canvas, scene, rng, x):
    """Stars with rays, on a jittered grid, so that no corner is empty."""
    columns, rows = 6, 4
    cells = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2)
    at = (cells + rng.uniform(0.2, 0.8, cells.shape)) / (columns, rows) * (1.0, 0.56)
    radii = rng.uniform(0.012, 0.026, len(at))

    def draw(pen, n):
        for (sx, sy), r in zip(at * n, radii * n, strict=True):
            q = 0.28 * r
            rays = (0, -r), (q, -q), (r, 0), (q, q), (0, r), (-q, q), (-r, 0), (-q, -q)
            pen.polygon([(sx + u, sy + v) for u, v in rays], fill=255)

    canvas.over(canvas.drawn(draw, 3), rgb((255, 246, 196)))


def _aurora(canvas, scene, rng, x):
    for k in range(2):
        foot = 0.26 + 0.16 * k + rng.uniform(0, 0.06) + _wave(rng, canvas.a, 0.06, (1, 2))
        up = foot[None] - canvas.y
        curtain = np.where(up > 0, np.exp(-up / 0.15), np.exp(np.minimum(up, 0) / 0.02))
        folds = 0.8 + 0.2 * np.sin(2 * np.pi * (5 * canvas.x + rng.random()))
        colour = mix(rgb((70, 250, 150)), rgb((150, 90, 255)), np.clip(up / 0.28, 0, 1)[..., None])
        canvas.image += (0.75 * curtain * folds)[..., None] * colour * np.clip(1.05 - canvas.image, 0, 1)


def _rainbow(canvas, scene, rng, x):
    d = (rng.uniform(0.50, 0.54) - canvas.distance(rng.uniform(0.45, 0.55), 0.66)) / 0.11  # 0 outside .. 1 inside
    band = np.clip(d / 0.08, 0, 1) * np.clip((1 - d) / 0.08, 0, 1)
    canvas.over(0.78 * band, BOW[np.clip(d * 6, 0, 5.99).astype(int)])


def _clouds(canvas, scene, rng, x):
    light, dark = (rgb(c) for c in CLOUD[scene.time])
    for k in range(3):
        cx, cy, s = (k + 0.5) / 3 + rng.uniform(-0.08, 0.08), rng.uniform(0.12, 0.30), rng.uniform(0.9, 1.25)
        radii = rng.uniform(0.9, 1.1, len(PUFFS)) * [r for _, _, r in PUFFS] * s
        foot = cy + 0.045 * s

        def draw(pen, n, cx=cx, cy=cy, s=s, radii=radii, foot=foot):
            for (dx, dy, _), r in zip(PUFFS, radii, strict=True):
                px, py = cx + s * dx, cy - s * dy
                pen.ellipse([(px - r) * n, (py - r) * n, (px + r) * n, (py + r) * n], fill=255)
            pen.rectangle([(cx - 0.13 * s) * n, cy * n, (cx + 0.13 * s) * n, foot * n], fill=255)
            pen.rectangle([0, foot * n, n, n], fill=0)

        fade = np.clip((canvas.y - cy + 0.08 * s) / (0.13 * s), 0, 1)[..., None]
        canvas.over(0.96 * canvas.drawn(draw), mix(light, dark, fade))


SKIES = {
    "sun": _sun,
    "clouds": _clouds,
    "rainbow": _rainbow,
    "full moon": _moon,
    "crescent moon": _moon,
    "stars": _stars,
    "aurora": _aurora,
}

# --- terrain


def _wave(rng, a: np.ndarray, height: float, frequencies) -> np.ndarray:
    return sum(np.sin(2 * np.pi * (f * a + rng.random())) * height / f**0.8 for f in frequencies).astype(np.float32)


def _mountains(canvas, scene, rng, horizon, ground, haze, light):
    lit, dark = rgb((158, 162, 190)) * LIGHT[scene.time], rgb((102, 108, 150)) * LIGHT[scene.time]
    veil = np.clip((canvas.y - 0.45) / 0.35, 0, 0.5)[..., None]
    for k, (top, count) in enumerate(((0.27, 4), (0.40, 5))):
        peaks = (np.arange(count) + rng.uniform(0.1, 0.9, count)) / count * 1.1 - 0.05
        heights, slopes = top + rng.uniform(0, 0.11, count), rng.uniform(1.0, 1.4, count)
        rim = 0.08 + 0.018 * np.sin(2 * np.pi * (11 * canvas.x + rng.random()))  # how far down the snow reaches
        for n in np.argsort(heights):  # a lower mountain stands before a higher one
            drop, side = canvas.y - heights[n], canvas.x - peaks[n]
            rock = canvas.edge(drop - np.abs(side) * slopes[n])
            away = canvas.edge(-light * side - 0.2 * drop)[..., None]  # the shaded flank; the ridge slants
            canvas.over(rock, mix(mix(mix(lit, dark, away), haze, 0.42 - 0.24 * k), haze, veil))
            snow = mix(rgb((252, 252, 255)), rgb((200, 210, 238)), away) * LIGHT[scene.time]
            canvas.over(0.95 * rock * canvas.edge(rim - drop), snow)
    line = horizon + 0.04 + _wave(rng, canvas.a, 0.015, (1, 2))
    canvas.below(line, mix(ground[0], haze, 0.15), ground[1] * 0.86, 0.30)


def _hills(canvas, scene, rng, horizon, ground, haze, light):
    for k, (rise, height) in enumerate(((-0.09, 0.05), (-0.01, 0.04), (0.08, 0.03))):
        line = horizon + rise + _wave(rng, canvas.a, height, (1.0, 1.9))
        top, bottom = mix(ground[0], haze, 0.36 - 0.18 * k), mix(ground[1] * (1 - 0.07 * k), haze, 0.24 - 0.12 * k)
        canvas.below(line, top, bottom, 0.28)


def _desert(canvas, scene, rng, horizon, ground, haze, light):
    for k, rise in enumerate((-0.03, 0.04, 0.12)):
        u = ((0.8 + 0.4 * k) * canvas.a + rng.random()) % 1  # a long slope up, a short slope down
        line = (horizon + rise - 0.08 * np.minimum(u / 0.62, (1 - u) / 0.38)).astype(np.float32)
        drop = canvas.y - line[None]
        lee = np.clip((u[None] + 1.4 * drop - 0.60) / 0.04, 0, 1)  # the shade fades to the dune's foot, on both sides
        lee = (lee * np.clip((1 - u[None]) / 0.38, 0, 1) * np.clip(1 - drop / 0.25, 0, 1))[..., None]
        sand = mix(mix(ground[0], haze, 0.26 - 0.12 * k), mix(ground[1], haze, 0.18 - 0.09 * k), 0.15 + 0.55 * lee)
        sand = mix(sand, ground[1], np.clip((canvas.y - horizon - 0.1) / 0.6, 0, 0.5)[..., None])
        canvas.over(canvas.edge(drop), sand)


def _pines(canvas, rng, foot: float, count: int, low: float, high: float, colour, snow=None):
    """A row of fir trees, evenly spread with jitter."""
    xs = (np.arange(count) + rng.uniform(0.15, 0.85, count)) / count * 1.1 - 0.05
    heights = rng.uniform(low, high, count)

    def layers(pen, n, width, drop):
        for x, h in zip(xs, heights, strict=True):
            for top, bottom, w in ((1, 0.45, 0.20), (0.72, 0.2, 0.27), (0.45, 0, 0.33)):
                half, tip, hem = w * h * width, foot - top * h, foot - (bottom + (top - bottom) * drop) * h
                pen.polygon([(x * n, tip * n), ((x - half) * n, hem * n), ((x + half) * n, hem * n)], fill=255)

    canvas.over(canvas.drawn(lambda pen, n: layers(pen, n, 1.0, 0.0)), colour)
    if snow is not None:
        canvas.over(canvas.drawn(lambda pen, n: layers(pen, n, 0.5, 0.5)), snow)


def _snow(canvas, scene, rng, horizon, ground, haze, light):
    light_ = LIGHT[scene.time]
    line = horizon - 0.05 + _wave(rng, canvas.a, 0.04, (1, 2))
    canvas.below(line, mix(ground[1], haze, 0.35), mix(ground[1], haze, 0.2), 0.25)
    _pines(canvas, rng, horizon + 0.05, 6, 0.20, 0.30, rgb((64, 110, 110)) * light_, rgb((244, 250, 255)) * light_)
    canvas.below(horizon + 0.04 + _wave(rng, canvas.a, 0.02, (0.8, 1.5)), ground[0], ground[1], 0.3)


def _forest(canvas, scene, rng, horizon, ground, haze, light):
    light_ = LIGHT[scene.time]
    canvas.below(np.full(canvas.size, horizon - 0.06, np.float32), mix(ground[1], haze, 0.4), ground[1], 0.2)
    _pines(canvas, rng, horizon + 0.04, 10, 0.30, 0.42, mix(rgb((58, 110, 90)) * light_, haze, 0.45))
    _pines(canvas, rng, horizon + 0.08, 7, 0.24, 0.40, mix(rgb((34, 88, 60)) * light_, haze, 0.12))
    canvas.below(horizon + 0.06 + _wave(rng, canvas.a, 0.018, (0.7, 1.3)), ground[0], ground[1] * 0.8, 0.3)


def _sea(canvas, scene, rng, horizon, ground, haze, light):
    """Paint nothing yet: the water is a mirror, so it is painted after the objects in it."""


def _water(canvas, scene, rng, horizon):
    size, top = canvas.size, round(horizon * canvas.size)
    rows = np.arange(top, size)
    depth = ((rows - top + 0.5) / (size - top))[:, None]  # 0 at the horizon .. 1
    sway = np.sin(2 * np.pi * (7 * depth**0.6 + rng.random())) * (0.004 + 0.012 * depth) * size
    columns = np.clip(np.arange(size, dtype=np.float32)[None] + sway, 0, size - 1.001).astype(np.float32)
    left, source = columns.astype(int), np.clip(2 * top - 1 - rows, 0, size - 1)[:, None]
    mirrored = mix(canvas.image[source, left], canvas.image[source, left + 1], (columns - left)[..., None])
    canvas.image[top:] = mix(mirrored, rgb(WATER[scene.time]), (0.38 + 0.42 * depth)[..., None])
    xs, ys = rng.random(9), (np.arange(9) + rng.random(9)) / 9

    def glints(pen, n):
        for x, y in zip(xs, ys, strict=True):
            cy, half, thick = horizon + 0.03 + y * (0.93 - horizon), 0.05 + 0.07 * y, 0.004 + 0.003 * y
            corners = x - half, cy - thick, x + half, cy + thick
            pen.rounded_rectangle([c * n for c in corners], thick * n, fill=90)

    canvas.over(canvas.drawn(glints), mix(canvas.image[top], 1.0, 0.4)[None])


TERRAIN = {"mountains": _mountains, "hills": _hills, "desert": _desert, "sea": _sea, "snow": _snow, "forest": _forest}
