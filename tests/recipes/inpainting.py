"""The README's picture of masks, drawn by the built-in model: python -m tests.recipes.inpainting."""

from pathlib import Path

from PIL import Image, ImageDraw

import mlxdiff
from tests.notebooks import few_bits

FILE = Path(__file__).parent.parent / "data" / "inpainting.png"
GAP = 8


def main() -> None:
    pipe = mlxdiff.load("storybook")
    start = pipe("a red house under a full moon", seed=7).image
    mask = Image.new("L", start.size)
    edge = start.width
    ImageDraw.Draw(mask).rectangle([part * edge // 128 for part in (28, 52, 100, 122)], fill=255)
    inside = {"image": start, "mask": mask, "mask_blur": edge // 43, "strength": 1.0, "seed": 1}
    drawn = [pipe(f"{what} under a full moon", **inside).image for what in ("a blue house", "a red mushroom")]
    around = {"outpaint": (edge // 2, 0, edge // 2, 0), "mask_blur": edge // 32}
    wide = pipe("hills at night", image=start, seed=1, **around).image
    pictures = [start, mask.convert("RGB"), *drawn, wide]
    sheet = Image.new("RGB", (sum(p.width + GAP for p in pictures) - GAP, start.height), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + GAP
    few_bits(sheet).save(FILE, optimize=True)


if __name__ == "__main__":
    main()
