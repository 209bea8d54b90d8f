"""The word that the package holds for the built-in model: teal, a colour that storybook has no word for, taught by
`mlxdiff train embedding` from sixteen renders.

    python -m tests.recipes.word make work/     the renders, the training, and its file into mlxdiff/builtin
    python -m tests.recipes.word judge work/    what it reached, and work/word.png

The word begins as blue; the model stays as it is. `make` continues what was stopped."""

import argparse
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

import mlxdiff
from mlxdiff import builtin
from mlxdiff.train import judge
from mlxdiff.train import storybook as sb
from mlxdiff.train.measure import SIZE
from mlxdiff.train.storybook import objects
from mlxdiff.widgets.explain.added import teal

WORD, LIKE, TEAL = "<teal>", "blue", (0, 158, 148)
SEED, COUNT = 3_000_000, 16
TRAINING = f"embedding -m storybook -i pictures -o run --word {WORD} --initial {LIKE}"
TRAINING += " --steps 40 --batch 2 --rate 2e-2 --save-every 10"


def scenes(first: int, count: int) -> list[tuple[sb.Scene, np.ndarray]]:
    """Scenes with an object in a colour that is not of the world, and their renders."""
    objects.RGB[WORD] = TEAL
    pairs = []
    for k in range(first, first + count):
        rng = np.random.default_rng(SEED + k)
        scene = replace(sb.sample(rng), colour=WORD)
        pairs.append((scene, sb.render(scene, rng, SIZE)))
    return pairs


def make(folder: Path) -> None:
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for k, (scene, picture) in enumerate(scenes(0, COUNT)):
        Image.fromarray(picture).save(folder / "pictures" / f"{k:02}.png")
        (folder / "pictures" / f"{k:02}.txt").write_text(sb.plain(scene))
    subprocess.run([sys.executable, "-m", "mlxdiff", "train", *TRAINING.split()], cwd=folder, check=True)
    shutil.copyfile(folder / "run" / "learned_embeds.safetensors", builtin.FOLDER.parent / "teal.safetensors")


def coloured(pictures: np.ndarray) -> float:
    """The share of pixels, in percent, with teal's hue."""
    return 100 * float(np.mean([teal(Image.fromarray(picture)) for picture in pictures]))


def measure(folder: Path, count: int) -> None:
    """The same prompts and seeds with the word it began as and with the learned one, beside the renders."""
    pipe, referee = mlxdiff.load("storybook"), judge.load(judge.shipped())
    chosen, renders = zip(*scenes(COUNT, count), strict=True)
    rows = [np.stack(renders)]
    print(f"renders: {coloured(rows[0]):.1f} % of the pixels are teal")
    plain = [replace(s, colour=LIKE) for s in chosen]
    for said, words in ((LIKE, []), (WORD, ["teal"])):
        prompts = [sb.plain(replace(s, colour=said)) for s in chosen]
        drawn = [pipe(p, seed=k, embeddings=words).image for k, p in enumerate(prompts)]
        rows.append(np.stack([np.asarray(image) for image in drawn]))
        shares = judge.adherence(referee, rows[-1], plain)
        told = " ".join(f"{kind} {100 * share:.0f}" for kind, share in shares.items() if kind not in ("all", "colour"))
        print(f"{said}: {coloured(rows[-1]):.1f} %; % of the other words: {told}", flush=True)
    Image.fromarray(np.concatenate([np.concatenate(list(row[:6]), 1) for row in rows])).save(folder / "word.png")


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
