"""The style that the package holds for the built-in model: paper, cut out and laid in sheets that throw soft shadows.
`mlxdiff train lora` learned it from forty renders.

    python -m tests.recipes.style make work/     the renders, the training, and its file into mlxdiff/builtin
    python -m tests.recipes.style judge work/    what it reached and what it forgot, and work/style.png

storybook ignores words that it does not know, so there is no word for the style: the LoRA is the style, and its scale
says how much. `make` continues what was stopped. A style must be one that the model's autoencoder can draw: it smooths
pixels away. And it must not hide the words from the judge by itself, as globes, lamps and thick outlines do."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image, ImageFilter
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import mlxdiff
from mlxdiff import builtin
from mlxdiff.train import judge, lora
from mlxdiff.train import storybook as sb
from mlxdiff.train.measure import LUMA, SIZE, scenes, steepness
from mlxdiff.train.measure import SEED as FIRST
from mlxdiff.train.storybook import picture
from mlxdiff.train.storybook.canvas import Canvas, mix

SEED, COUNT = 3_000_000, 40
TRAINING = "lora -m storybook -i pictures -o run --layers all --rank 6 --batch 2 --rate 3e-3 --decay-after 0.4"
TRAINING += " --save-every 50"
STEPS = 600, 1000  # it was looked at, and trained on: the rate rises again
EDGE, SHEETS = 24, 4  # pixels around a picture in which shadows begin; sheets of the sky


class Paper(Canvas):
    """What is painted on it is a sheet of paper, which throws a shadow on what is there."""

    def shadow(self, sheet: np.ndarray, right: int, down: int, soft: float, depth: float) -> None:
        wide = Image.fromarray((np.pad(sheet, EDGE, mode="edge") * 255).astype(np.uint8))
        blurred = np.asarray(wide.filter(ImageFilter.GaussianBlur(soft)), np.float32) / 255
        y, x, n = EDGE - down, EDGE - right, self.size
        self.image *= 1 - depth * np.clip(blurred[y : y + n, x : x + n] - sheet, 0, 1)[..., None]

    def over(self, mask: np.ndarray, colour) -> None:
        sheet = np.broadcast_to(mask, (self.size, self.size))
        glow = ((sheet > 0.03) & (sheet < 0.97)).mean() > 0.06
        if not glow and sheet.mean() > 0.004:
            self.shadow(sheet, 4, 8, 6.4, 0.4)
        super().over(mask, colour)

    def below(self, line: np.ndarray, top, bottom, depth: float) -> None:
        self.hill(line, mix(top, bottom, 0.4), 0.44)

    def hill(self, line: np.ndarray, colour, depth: float) -> None:
        sheet = self.edge(self.y - line[None])
        self.shadow(sheet, 3, -8, 7.2, depth)
        super().over(sheet, colour)

    def paste(self, rgba: np.ndarray, x: float, base: float, light: np.ndarray) -> None:
        alone = Canvas(self.size)
        alone.paste(np.concatenate([np.ones_like(rgba[..., :3]), rgba[..., 3:]], -1), x, base, 1.0)
        self.shadow(alone.image[..., 0], 6, 9, 8.0, 0.56)
        super().paste(rgba, x, base, light)


def _sky(plain: Callable) -> Callable:
    """The sky in sheets, with wavy upper edges."""

    def sky(canvas: Paper, scene: sb.Scene, rng, horizon: float, light_x: float) -> np.ndarray:
        haze = plain(canvas, replace(scene, sky="clear"), rng, horizon, light_x)
        waves = np.random.default_rng(int(1e6 * horizon))
        rows = canvas.image[:, 0].copy()
        for k in range(SHEETS):
            line = horizon * k / SHEETS + picture._wave(waves, canvas.a, 0.022, (1, 2)) - (k == 0)
            canvas.hill(line, rows[int(horizon * canvas.size * k / (SHEETS - 1))], 0.32)
        if scene.sky in picture.SKIES:
            picture.SKIES[scene.sky](canvas, scene, rng, light_x)
        return haze

    return sky


def paper(scene: sb.Scene, rng: np.random.Generator) -> np.ndarray:
    """The scene as a picture of paper."""
    with mock.patch.object(picture, "Canvas", Paper), mock.patch.object(picture, "_sky", _sky(picture._sky)):
        return sb.render(scene, rng, SIZE)


def relief(pictures: np.ndarray) -> float:
    """How much light and shade there is of the size of the shadows."""
    total = 0.0
    for one in pictures:
        light = Image.fromarray((one @ LUMA).astype(np.uint8))
        near, far = (np.asarray(light.filter(ImageFilter.GaussianBlur(r)), np.float32) for r in (3, 10))
        total += np.abs(near - far).mean() / len(pictures)
    return total


def make(folder: Path) -> None:
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for k in range(COUNT):
        rng = np.random.default_rng(SEED + k)
        scene = sb.sample(rng)
        Image.fromarray(paper(scene, rng)).save(folder / "pictures" / f"{k:02}.png")
        (folder / "pictures" / f"{k:02}.txt").write_text(sb.plain(scene))
    begun = folder / "run" / "recipe.json"
    for steps in STEPS:
        if begun.exists() and json.loads(begun.read_text())["steps"] > steps:
            continue  # the run went on already, and cannot go back
        words = [*TRAINING.split(), "--steps", str(steps)]
        subprocess.run([sys.executable, "-m", "mlxdiff", "train", *words], cwd=folder, check=True)
    ship(folder)


def ship(folder: Path) -> None:
    """In 16 bits, without the settings of the training, which name a folder."""
    file = folder / "run" / lora.FILE
    halves = {name: value.astype(np.float16) for name, value in load_file(file).items()}
    with safe_open(file, "np") as opened:
        header = opened.metadata() | {"modelspec.title": "paper"}
    del header["mlxdiff"]
    save_file(halves, builtin.FOLDER.parent / "paper.safetensors", header)


def measure(folder: Path, count: int) -> None:
    """The same prompts and seeds at several scales, beside renders: 0 % of paper is a plain render, 100 % one of
    paper."""
    pipe, referee, chosen = mlxdiff.load("storybook"), judge.load(judge.shipped()), scenes(count)
    seeds = range(FIRST, FIRST + count)
    renders = [np.stack([draw(s, np.random.default_rng(k)) for s, k in zip(chosen, seeds, strict=True)]) for draw in
               (lambda s, rng: sb.render(s, rng, SIZE), paper)]  # fmt: skip
    plain, styled = map(relief, renders)

    def tell(what: str, pictures: np.ndarray) -> None:
        shares = judge.adherence(referee, pictures, chosen)
        words = " ".join(f"{kind} {100 * share:.0f}" for kind, share in shares.items())
        own = 100 * (relief(pictures) - plain) / (styled - plain)
        crisp = steepness(pictures) / steepness(renders[0])
        print(f"{what:14} {own:4.0f} % of paper; % of words: {words}; crispness {crisp:.2f}", flush=True)

    tell("renders", renders[0])
    tell("paper", renders[1])
    rows = []
    for scale in (0, 0.5, 1):
        how = {"loras": [f"paper:{scale}"] if scale else []}
        drawn = [np.asarray(pipe(sb.plain(s), seed=k, **how).image) for s, k in zip(chosen, seeds, strict=True)]
        tell(f"scale {scale}", np.stack(drawn))
        rows.append(np.concatenate(drawn[:6], 1))
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(folder / "style.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("make", "judge"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=48)
    args = parser.parse_args()
    if args.command == "make":
        make(args.folder)
    else:
        measure(args.folder, args.count)


if __name__ == "__main__":
    main()
