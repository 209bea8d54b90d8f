"""What the built-in model does not know, taught by `mlxdiff train` from a few renders: a style and a colour.

    python -m tests.recipes.style make work/     pictures, both trainings, and their files into mlxdiff/builtin
    python -m tests.recipes.style judge work/    what they reached: a line each, and work/style.png

`make` continues what was stopped. The style is a woodcut: flat tones on paper, with dark lines. It is a LoRA, trained
with the word `woodcut` beside plain renders of the same scenes without it (DreamBooth's prior), so that a prompt
without the word draws as before. The colour is teal, for which the model has no word: a textual inversion that begins
as the word blue.

The judge learned from plain renders, so renders in the style are read first: that is the most that can be reached.
How near pictures are to the style: the mean difference of their sorted channel values, and of their sorted steps from
pixel to pixel, from those of renders in the style of the same scenes, of 255; plain renders have some distance too.
What was measured is in mlxdiff/builtin/ADAPTERS.md."""

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

import mlxdiff
from mlxdiff import builtin
from mlxdiff.train import judge
from mlxdiff.train import storybook as sb
from mlxdiff.train.measure import SIZE
from mlxdiff.train.storybook import objects

STYLE, COLOUR, LIKE = "woodcut", "<teal>", "blue"
SEED, COUNT, FEW = 3_000_000, 40, 16  # FEW: of the colour
LUMA = np.array([0.299, 0.587, 0.114])
INK, PAPER, TEAL = np.array([38, 24, 30]), np.array([250, 238, 214]), (0, 158, 148)
TONES, EDGE = 4, 50  # steps of lightness; of 255 from pixel to pixel, from which there is a line

_LORA = "lora -m storybook -i woodcut/pictures --class-images woodcut/plain -o woodcut/run --trigger woodcut"
_LORA += " --steps 200 --batch 2 --rank 8 --rate 2e-3 --caption-dropout 0.1 --save-every 10"
_LORA += " --layers to_q to_k to_v to_out.0 ff.net.0.proj ff.net.2 time_emb_proj"
_WORD = f"embedding -m storybook -i teal/pictures -o teal/run --word {COLOUR} --initial {LIKE}"
_WORD += " --steps 40 --batch 2 --rate 2e-2 --save-every 10"
TRAININGS = {
    "teal": (_WORD.split(), "learned_embeds.safetensors"),
    "woodcut": (_LORA.split(), "pytorch_lora_weights.safetensors"),
}


def woodcut(picture: np.ndarray) -> np.ndarray:
    """(S, S, 3) uint8 -> the same as a print of a few tones, with ink along its edges."""
    soft = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1)), float)
    light = soft @ LUMA / 255
    tone = soft * ((np.round(light * TONES) / TONES + 0.15) / (light + 0.15))[..., None] / 255 * PAPER
    line = np.clip(steps(soft) / EDGE - 1, 0, 1)[..., None]
    return (tone + (INK - tone) * line).clip(0, 255).round().astype(np.uint8)


def steps(picture: np.ndarray) -> np.ndarray:
    """(..., S, S, 3) -> how much the colour changes over two pixels, (..., S, S)."""
    return np.hypot(*(2 * np.abs(np.gradient(picture.astype(float), axis=axis)).max(-1) for axis in (-2, -3)))


def scenes(first: int, count: int) -> list[tuple[sb.Scene, np.ndarray]]:
    """Scenes and their renders."""
    pairs = []
    for k in range(first, first + count):
        rng = np.random.default_rng(SEED + k)
        scene = sb.sample(rng)
        pairs.append((scene, sb.render(scene, rng, SIZE)))
    return pairs


def teal(first: int, count: int) -> list[tuple[sb.Scene, np.ndarray]]:
    """The same with objects in a colour that is not of the world."""
    objects.RGB[COLOUR] = TEAL
    pairs = []
    for k in range(first, first + count):
        rng = np.random.default_rng(SEED + k)
        scene = replace(sb.sample(rng), colour=COLOUR)
        pairs.append((scene, sb.render(scene, rng, SIZE)))
    return pairs


def write(folder: Path, pairs: list[tuple[str, np.ndarray]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for k, (caption, picture) in enumerate(pairs):
        Image.fromarray(picture).save(folder / f"{k:02}.png")
        (folder / f"{k:02}.txt").write_text(caption)


def make(folder: Path) -> None:
    pairs = scenes(0, COUNT)
    write(folder / "woodcut" / "plain", [(sb.plain(s), p) for s, p in pairs])
    write(folder / "woodcut" / "pictures", [(f"{sb.plain(s)}, {STYLE}", woodcut(p)) for s, p in pairs])
    write(folder / "teal" / "pictures", [(sb.plain(s), p) for s, p in teal(0, FEW)])
    for name, (typed, file) in TRAININGS.items():
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "mlxdiff", "train", *typed], cwd=folder, check=True)
        shutil.copyfile(folder / name / "run" / file, builtin.FOLDER.parent / f"{name}.safetensors")
        print(f"{name}: {time.perf_counter() - began:.0f} seconds")


def apart(pictures: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """The mean differences of sorted channel values and of sorted steps, of 255."""

    def of(f: Callable) -> float:
        a, b = (np.sort(f(each).reshape(-1, f(each).shape[-1]), axis=0) for each in (pictures, others))
        return float(np.abs(a - b).mean())

    return of(lambda p: p[..., ::2, ::2, :].astype(float)), of(lambda p: steps(p)[..., None])


def coloured(pictures: np.ndarray) -> float:
    """The share of pixels, in percent, with teal's hue."""
    hue, saturation, _ = np.moveaxis(np.stack([np.asarray(Image.fromarray(p).convert("HSV")) for p in pictures]), -1, 0)
    return 100 * float(((hue > 158 / 360 * 255) & (hue < 198 / 360 * 255) & (saturation > 90)).mean())


def measure(folder: Path, count: int) -> None:
    pipe, referee = mlxdiff.load("storybook"), judge.load(judge.shipped())
    chosen, plain = zip(*scenes(COUNT, count), strict=True)
    plain = np.stack(plain)
    styled = np.stack([woodcut(p) for p in plain])

    def draw(prompts: list[str], **settings) -> np.ndarray:
        return np.stack([np.asarray(pipe(p, seed=k, **settings).image) for k, p in enumerate(prompts)])

    def told(what: str, pictures: np.ndarray) -> None:
        shares = judge.adherence(referee, pictures, list(chosen))
        words = " ".join(f"{kind} {100 * share:.0f}" for kind, share in shares.items())
        tones, edges = apart(pictures, styled)
        print(f"{what:34} from the style: tones {tones:4.1f}, edges {edges:4.1f}; % of words: {words}", flush=True)

    prompts = [sb.plain(s) for s in chosen]
    with_word = [f"{p}, {STYLE}" for p in prompts]
    bare, after = draw(prompts), draw(prompts, loras=[STYLE])
    asked, drawn = draw(with_word), draw(with_word, loras=[STYLE])
    rows = [plain, styled, bare, after, asked, drawn]
    names = ("plain renders", "renders in the style", "bare model", "LoRA, without the word")
    for what, pictures in zip((*names, "bare model, with the word", "LoRA and word"), rows, strict=True):
        told(what, pictures)
    moved = np.abs(after.astype(float) - bare).mean(), np.abs(asked.astype(float) - bare).mean()
    print(f"without the word the LoRA moves the pictures by {moved[0]:.1f} of 255; the word alone by {moved[1]:.1f}")

    chosen, renders = zip(*teal(COUNT, count), strict=True)
    chosen, prompts = [replace(s, colour=LIKE) for s in chosen], [sb.plain(s) for s in chosen]
    ways = ("the word it began as", LIKE, {}), ("the learned word", COLOUR, {"embeddings": ["teal"]})
    for what, said, given in ways:
        pictures = draw([p.replace(COLOUR, said) for p in prompts], **given)
        shares = judge.adherence(referee, pictures, chosen)
        words = " ".join(f"{kind} {100 * share:.0f}" for kind, share in shares.items() if kind not in ("all", "colour"))
        want = coloured(np.stack(renders))
        print(f"{what:34} {coloured(pictures):.1f} % of pixels are teal, of renders {want:.1f}; % of words: {words}")
        rows.append(pictures)
    sheet = np.concatenate([np.concatenate(list(row[:6]), 1) for row in rows])
    Image.fromarray(sheet).save(folder / "style.png")


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
