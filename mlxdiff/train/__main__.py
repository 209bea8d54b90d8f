"""`python -m mlxdiff.train`: train a storybook model from nothing, or measure one."""

import argparse
import json
import sys
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from .. import blas, images
from ..console import Parser, run
from ..errors import Error
from ..recipe import BITS, bits_of
from . import storybook as sb
from .objective import PREDICTIONS
from .recipe import Recipe, storybook


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="mlxdiff train", description=__doc__.partition(": ")[2])
    kinds = p.add_subparsers(dest="what", required=True, metavar="WHAT")
    s = kinds.add_parser("storybook", help="pictures, VAE, text encoder and U-Net, from nothing to a model folder")
    s.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="folder; an unfinished run continues")
    s.add_argument("--pictures", type=int, default=60000, metavar="N", help="how many renders to learn from (60000)")
    s.add_argument("--vae-steps", type=int, default=4000, metavar="N", help="steps of the VAE, the first stage (4000)")
    s.add_argument("--steps", type=int, default=8000, metavar="N", help="steps of U-Net and text encoder (8000)")
    s.add_argument("--batch", type=int, default=64, metavar="N", help="pictures a step; the VAE takes a quarter (64)")
    s.add_argument("--optimizer", choices=("muon", "adamw"), default="muon", help="for the inner matrices (muon)")
    s.add_argument("--prediction", choices=PREDICTIONS, default="v", help="what the U-Net learns to predict")
    s.add_argument("--min-snr", type=float, metavar="GAMMA", help="weight the losses by min-SNR; 5 is usual")
    s.add_argument("--seed", type=int, default=0, help="seed of pictures, weights and order (0)")
    s = kinds.add_parser("judge", help="measure how well a storybook model follows its prompts")
    s.add_argument("model", metavar="MODEL", help="a name or a folder")
    s.add_argument("--judge", type=Path, required=True, metavar="FILE", help="weights of the judge")
    s.add_argument("--scenes", type=int, default=192, metavar="N", help="how many prompts (192)")
    s.add_argument("--unseen", action="store_true", help="use pairs of words that were held out of training")
    s.add_argument("--guidance", type=float, nargs="+", metavar="G", default=[4.0], help="each in turn (4)")
    s.add_argument("--steps", type=int, nargs="+", metavar="N", default=[25], help="each in turn (25)")
    s.add_argument("--sampler", nargs="+", metavar="NAME", default=["ddim"], help="each in turn (ddim)")
    s.add_argument("--quantize", type=bits_of, choices=BITS, metavar="BITS", help="quantize the model")
    s.add_argument("--dtype", help="float32, float16 or bfloat16 (default: the dtype that suits this machine)")
    s = kinds.add_parser("scenes", help="draw some training pictures, with their captions")
    s.add_argument(
        "-o", "--out", type=Path, required=True, metavar="PNG", help="file for the sheet of twelve; never overwrites"
    )
    s.add_argument("--size", type=int, default=128, metavar="PX", help="edge of each picture (128)")
    s.add_argument("--seed", type=int, default=0, help="seed of the scenes (0)")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(sys.argv[1:] if argv is None else argv)
    return run("mlxdiff train", lambda: {"storybook": train, "judge": judge, "scenes": scenes}[args.what](args))


def train(args) -> int:
    recipe = Recipe(
        args.pictures,
        args.vae_steps,
        args.steps,
        args.batch,
        args.optimizer,
        args.prediction,
        args.min_snr,
        args.seed,
    )
    _same_run(args.out, recipe)
    blas.use_all_cores()  # the networks are small, but a batch is not
    if (args.out / "scenes.json").exists():
        print("The run in this folder continues.")
    else:
        size = recipe.pictures * 3 * 128**2 / 1e9
        print(f"Rendering {recipe.pictures} pictures first, {size:.2g} GB in {args.out}.")
        print("A bar shows how long each stage takes. Ctrl-C stops the run, and the same command continues it.")
    totals = {"vae": recipe.vae_steps, "denoiser": recipe.steps}
    sizes = {"vae": max(1, recipe.batch // 4), "denoiser": recipe.batch}
    bars: dict[str, tqdm] = {}
    mean = 0.0
    for stage, report in storybook(args.out, recipe):
        if stage not in bars:
            bars[stage] = tqdm(total=totals[stage], initial=report.step - 1, desc=stage, unit="step")
            mean = report.loss
        mean += 0.05 * (report.loss - mean)
        bars[stage].set_postfix_str(f"loss {mean:.4f}, {sizes[stage] / report.seconds:.0f} samples/s", refresh=False)
        bars[stage].update(1)
    for bar in bars.values():
        bar.close()
    print(f"{args.out / 'model'} is the model, in the diffusers layout.")
    return 0


def _same_run(folder: Path, recipe: Recipe) -> None:
    """Raise unless the folder is empty or holds a run with the same settings: other settings would mix two runs."""
    file, settings = folder / "recipe.json", vars(recipe)
    if file.exists():
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise Error(f"{file} cannot be read: {e}.", "Give a new folder.") from None
        changed = [k for k in settings if settings[k] != before.get(k)]
        if changed:
            stored = ", ".join(f"{k} {before.get(k)}" for k in changed)
            raise Error(f"{folder} holds a run with {stored}.", "Give the same settings, or another --out.")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Error(f"{folder} holds something other than a run.", "Give a new folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    except OSError as e:
        raise Error(f"{folder} cannot be written: {e.strerror}.", "Give another --out.") from None


def judge(args) -> int:
    """Print a line for each combination of settings."""
    from .. import load
    from . import judge as judges
    from . import measure

    referee, pipe = judges.load(args.judge), load(args.model, bits=args.quantize, dtype=args.dtype)
    chosen = measure.scenes(args.scenes, args.unseen)
    _line("renders", judges.adherence(referee, measure.renders(chosen), chosen))
    for guidance, steps, sampler in product(args.guidance, args.steps, args.sampler):
        shares = measure.measure(pipe, referee, chosen, guidance=guidance, steps=steps, sampler=sampler)
        _line(f"guidance {guidance:g}, {steps} steps of {sampler}", shares)
    return 0


def _line(what: str, figures: dict[str, float]) -> None:
    parts = [f"{k} {v:.2f}" if k == "frechet" else f"{k} {100 * v:.1f}" for k, v in figures.items()]
    print(f"{what}: {', '.join(parts)}", flush=True)


def scenes(args) -> int:
    images.kind_of(args.out)  # raises before the work
    rng, rows = np.random.default_rng(args.seed), []
    for _ in range(3):
        row = []
        for _ in range(4):
            scene = sb.sample(rng)
            row.append(sb.render(scene, rng, args.size))
            print(sb.caption(scene, rng))
        rows.append(np.concatenate(row, 1))
    print(images.write(Image.fromarray(np.concatenate(rows)), args.out), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
