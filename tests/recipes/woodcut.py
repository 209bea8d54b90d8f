"""Teaches the built-in model a style outside its world, woodcuts, and draws the README's picture of it:
python -m tests.recipes.woodcut FOLDER. The folder gets the pictures, the LoRA, and report.json: what the judge says
before and after. Of plain prompts, its shares must stay; of prompts with the word, the distance from woodcuts of the
same scenes must fall."""

import json
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

import mlxdiff
from mlxdiff.train import judge, measure, tune
from mlxdiff.train import storybook as sb

DATA = Path(__file__).parent.parent / "data"
PICTURES, STEPS, SCENES, WORD = 40, 300, 48, "woodcut"
SHOWN = [
    "a red house on a hill at night under a full moon",
    "a green tree in the snow by day",
    "a blue boat on the water at night under stars",
    "a yellow flower on the left in a meadow by day under clouds",
]


def woodcut(picture: np.ndarray) -> np.ndarray:
    """Black ink on cream paper: the darker a place is, the wider its slanted lines, and edges are cut in full."""
    grey = picture.astype(np.float64) @ (0.299, 0.587, 0.114) / 255
    y, x = np.mgrid[: grey.shape[0], : grey.shape[1]]
    lines = (x + 2 * y + 3 * np.sin(x / 9)) % 6 / 6
    steps = [np.abs(np.diff(grey, axis=axis, append=grey.take([-1], axis))) for axis in (0, 1)]
    ink = (lines > 0.15 + 0.85 * grey) | (steps[0] + steps[1] > 0.12)
    return np.where(ink[..., None], (38, 30, 28), (243, 234, 212)).astype(np.uint8)


def pictures(folder: Path) -> None:
    """Renders of random scenes as woodcuts, each with a caption that begins with the word."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)
    for i in range(PICTURES):
        scene = sb.sample(rng)
        Image.fromarray(woodcut(sb.render(scene, rng, 128))).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"{WORD} of {sb.plain(scene)}")


def draw(pipe, prompts: list[str], **settings) -> np.ndarray:
    return np.stack([np.asarray(pipe(p, seed=1000 + i, **settings).image) for i, p in enumerate(prompts)])


def main(folder: Path) -> None:
    pictures(folder / "pictures")
    pipe, referee = mlxdiff.load("storybook", dtype="float32"), judge.load(DATA / "judge.safetensors")
    tuning = tune.LoraTuning(
        str(folder / "pictures"), size=128, steps=STEPS, batch=4, rate=2e-3, rank=8, warmup=20, trigger=WORD
    )
    run, began = tune.LoraRun(pipe, tuning, folder / "run"), time.process_time()
    for report in run.steps():
        if report.step % 25 == 0:
            print(report, flush=True)
    seconds, taught = time.process_time() - began, [str(run.out)]

    scenes = measure.scenes(SCENES)
    plain, with_word = [sb.plain(s) for s in scenes], [f"{WORD} of {sb.plain(s)}" for s in scenes]
    aim = np.stack([woodcut(p) for p in measure.renders(scenes)])
    report = {"processor seconds of training": round(seconds, 1), "steps": STEPS, "final loss": report.loss}
    for when, loras in (("before", []), ("after", taught)):
        drawn = draw(pipe, plain, loras=loras)
        report[f"plain prompts, {when}"] = judge.adherence(referee, drawn, scenes)
        drawn = draw(pipe, with_word, loras=loras)
        report[f"with the word, {when}"] = {"frechet": judge.frechet(referee, drawn, aim)}
        print(json.dumps(report, indent=1), flush=True)
    report["renders as woodcuts, other noise"] = {"frechet": judge.frechet(referee, aim[::2], aim[1::2])}
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")

    sheet = Image.new("RGB", (4 * 136 - 8, 2 * 136 - 8), "white")
    for row, loras in enumerate(([], taught)):
        for i, prompt in enumerate(SHOWN):
            shown = pipe(f"{WORD} of {prompt}", seed=7, loras=loras).image
            sheet.paste(shown, (136 * i, 136 * row))
    sheet.save(folder / "woodcut.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
