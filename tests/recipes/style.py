"""A style that storybook does not know, taught by forty pictures: cyanotypes, white on Prussian blue.

    python -m tests.recipes.style pictures blue/pictures    forty renders as cyanotypes, with captions
    mlxdiff train lora -m storybook -i blue/pictures -o blue/lora --steps 240 --batch 2 --rank 8 --rate 2e-3
    python -m tests.recipes.style judge blue/lora           what it learned, what it forgot, and a sheet

`judge` draws the same prompts with the LoRA and without it, first with the word and then without: how far the pictures
are from a cyanotype, and how many of the prompts' words the judge still finds in pictures that do not ask for one.
After three minutes of training the distance fell from 29 to 7 of 255, with the word and without: the word is not in the
model's vocabulary, and the text encoder is not trained here. So the LoRA is the style, and its scale says how much."""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

import mlxdiff
from mlxdiff.train import judge
from mlxdiff.train import storybook as sb
from mlxdiff.train.measure import SIZE

WORD, SEED, COUNT = "cyanotype", 3_000_000, 40
BLUE, WHITE = np.array([0, 49, 83]), np.array([250, 250, 240])
LUMA = np.array([0.299, 0.587, 0.114])


def cyanotype(pictures: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 -> the same in one colour."""
    light = (pictures / 255 @ LUMA)[..., None]
    return (BLUE + (WHITE - BLUE) * light).round().astype(np.uint8)


def off(pictures: np.ndarray) -> float:
    """How far pictures are from being cyanotypes, in steps of 255: the mean distance from the nearest tone."""
    tones = BLUE + (WHITE - BLUE) * np.linspace(0, 1, 64)[:, None]
    pixels = pictures.reshape(-1, 3)[::17].astype(float)
    return float(np.abs(pixels[:, None] - tones).mean(2).min(1).mean())


def pictures(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(COUNT):
        rng = np.random.default_rng(SEED + k)
        scene = sb.sample(rng)
        Image.fromarray(cyanotype(sb.render(scene, rng, SIZE))).save(folder / f"{k:02}.png")
        (folder / f"{k:02}.txt").write_text(f"{sb.plain(scene)}, {WORD}")


def measure(lora: Path, count: int) -> None:
    pipe, referee = mlxdiff.load("storybook"), judge.load(judge.shipped())
    rng = np.random.default_rng(SEED + COUNT)
    scenes = [sb.sample(rng) for _ in range(count)]
    rows = []
    for what, end, loras in (("before", "", []), ("after", "", [lora]), ("before", WORD, []), ("after", WORD, [lora])):
        prompts = [f"{sb.plain(s)}, {end}" if end else sb.plain(s) for s in scenes]
        drawn = [pipe(p, seed=k, loras=[str(f) for f in loras]).image for k, p in enumerate(prompts)]
        shares = judge.adherence(referee, np.stack(drawn), scenes)
        words = " ".join(f"{kind} {100 * share:.0f}" for kind, share in shares.items())
        print(f"{what:6} {end or 'plain':9}  {off(np.stack(drawn)):5.1f} of 255 from a cyanotype; % of words: {words}")
        rows.append(drawn[:6])
    sheet = np.concatenate([np.concatenate([np.asarray(p) for p in row], 1) for row in (rows[0], rows[1], rows[3])])
    Image.fromarray(sheet).save(lora.parent / "style.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("pictures", "judge"))
    parser.add_argument("path", type=Path)
    parser.add_argument("--count", type=int, default=48)
    args = parser.parse_args()
    if args.command == "pictures":
        pictures(args.path)
    else:
        measure(args.path, args.count)


if __name__ == "__main__":
    main()
