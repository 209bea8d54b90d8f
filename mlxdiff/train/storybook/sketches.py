"""Three drawings as a beginner makes them with a mouse: few, thick strokes of what is large, white on black."""

from PIL import Image, ImageDraw

SIZE, WIDTH = 256, 4
HILL = [(0, 158), (40, 152), (66, 156)]
STROKES = {
    "house": [
        [(84, 212), (86, 156), (128, 118), (172, 158), (170, 213), (84, 212)],
        [(74, 164), (128, 116), (182, 165)],
        [(119, 211), (120, 184), (137, 183), (138, 212)],
        [(96, 170), (108, 170), (109, 183), (96, 184), (96, 170)],
        [(148, 170), (161, 171), (160, 184), (148, 183), (148, 170)],
    ],
    "tent": [[(60, 214), (118, 132), (180, 216), (58, 214)], [(118, 134), (106, 214)], [(118, 134), (134, 214)]],
    "tree": [
        [(118, 212), (121, 170)],
        [(138, 212), (135, 170)],
        [(120, 172), (88, 168), (72, 140), (84, 112), (112, 92), (146, 94), (172, 114), (180, 142), (164, 168)],
        [(164, 168), (134, 172)],
    ],
}
SUN = (180, 34, 224, 76)  # over the tent


def sketch(name: str) -> Image.Image:
    page = Image.new("RGB", (SIZE, SIZE))
    draw = ImageDraw.Draw(page)
    for stroke in [*STROKES[name], HILL]:
        draw.line(stroke, "white", WIDTH, joint="curve")
    if name == "tent":
        draw.ellipse(SUN, outline="white", width=WIDTH)
    return page
