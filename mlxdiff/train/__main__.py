"""`python -m mlxdiff.train`: train a LoRA or a word, or the built-in model from nothing, or measure it."""

import argparse
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import fields
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image
from tqdm import tqdm

from .. import blas, images, machines, metadata
from ..console import Parser, run, say
from ..errors import Error
from ..recipe import BITS, DTYPES, bits_of, default_dtype
from ..recipe import recipe as weights
from ..request import MAX_EDGE
from . import storybook as sb
from .fit import same_run
from .judge import SIDE
from .objective import PREDICTIONS
from .recipe import SIZE, Recipe, storybook


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="mlxdiff train", description="Train a LoRA or a word, or the built-in model from nothing, or measure it."
    )
    kinds = p.add_subparsers(dest="what", required=True, metavar="WHAT")
    what = "a LoRA: teach a model a thing or a style from pictures"
    _lora(kinds.add_parser("lora", help=what, description=f"Train {what}."))
    what = "a new word (textual inversion), in a file of a few kilobytes"
    _embedding(kinds.add_parser("embedding", help=what, description=f"Train {what}."))
    s = kinds.add_parser("storybook", help="pictures, VAE, text encoder and U-Net, from nothing to a model folder")
    _output(s, "DIR", "folder; an unfinished run continues")
    s.add_argument("--pictures", type=int, default=60000, metavar="N", help="how many renders to learn from (60000)")
    s.add_argument("--size", type=int, default=SIZE, metavar="PX", help=f"edge of each picture ({SIZE})")
    s.add_argument("--vae-steps", type=int, default=4000, metavar="N", help="steps of the VAE, the first stage (4000)")
    s.add_argument("--steps", type=int, default=8000, metavar="N", help="steps of U-Net and text encoder (8000)")
    s.add_argument("--batch", type=int, default=64, metavar="N", help="pictures a step; the VAE takes a quarter (64)")
    s.add_argument("--optimizer", choices=("muon", "adamw"), default="muon", help="for the inner matrices (muon)")
    s.add_argument("--prediction", choices=PREDICTIONS, default="v", help="what the U-Net learns to predict")
    what = "weight the losses by min-SNR; 5 is usual"
    s.add_argument("--min-snr", dest="gamma", type=float, metavar="GAMMA", help=what)
    s.add_argument("--seed", type=int, default=0, help="seed of pictures, weights and order (0)")
    s = kinds.add_parser("judge", help="measure how well a storybook model follows its prompts")
    s.add_argument("model", metavar="MODEL", help="a name or a folder")
    s.add_argument("--judge", type=Path, metavar="FILE", help="weights of another judge than the one that ships")
    s.add_argument("--size", type=int, metavar="PX", help="edge of each picture (the model's)")
    s.add_argument("--scenes", type=int, default=192, metavar="N", help="how many prompts (192)")
    s.add_argument("--unseen", action="store_true", help="use pairs of words that were held out of training")
    s.add_argument("-g", "--guidance", type=float, nargs="+", metavar="G", help="one or several (the model's)")
    s.add_argument("--steps", type=int, nargs="+", metavar="N", help="of a picture; one or several (the model's)")
    s.add_argument("--sampler", nargs="+", metavar="NAME", help="one or several (the model's)")
    s.add_argument("-q", "--quantize", type=bits_of, choices=BITS, metavar="BITS", help="quantize the model")
    s.add_argument("--dtype", choices=DTYPES, help="default: the dtype that suits this machine")
    s = kinds.add_parser("scenes", help="draw some training pictures, with their captions")
    _output(s, "PNG", "file for the sheet of twelve; never overwrites")
    s.add_argument("--size", type=int, default=SIZE, metavar="PX", help=f"edge of each picture ({SIZE})")
    s.add_argument("--seed", type=int, default=0, help="seed of the scenes (0)")
    return p


def _output(s: argparse.ArgumentParser, what: str, about: str) -> None:
    # --out is what it was called first.
    s.add_argument("-o", "--output", "--out", dest="out", type=Path, required=True, metavar=what, help=about)


def _lora(s: argparse.ArgumentParser) -> None:
    _common(s)
    s.add_argument("--trigger", metavar="TEXT", help="the words that prompts need later; they are noted in the file")
    s.add_argument("--class-images", metavar="DIR", help="other such things, to be kept as they were (DreamBooth)")
    s.add_argument("--class-prompt", metavar="TEXT", help="caption of --class-images, such as 'a photo of a dog'")
    s.add_argument("--prior", type=float, metavar="W", help="weight of the loss of --class-images (1)")
    s.add_argument("--rank", type=int, metavar="R", help="size of each layer's change; more learns more details (16)")
    s.add_argument("--alpha", type=float, metavar="A", help="the change is scaled by alpha / rank (default: the rank)")
    what = "which layers, by the ends of diffusers' names; 'all' takes every one, convolutions too (attention)"
    s.add_argument("--layers", nargs="+", metavar="NAME", help=what)
    what = "share of captions to leave out, for a style that guidance should not exaggerate (0; 0.1 is usual)"
    s.add_argument("--caption-dropout", type=float, metavar="SHARE", help=what)
    what = "also train CLIP, for new words (SD 1.x, 2.x, XL)"
    s.add_argument("--text-encoder", action="store_true", default=None, help=what)


def _embedding(s: argparse.ArgumentParser) -> None:
    _common(s)
    what = "a new word that will mean the thing, such as '<moss>'"
    s.add_argument("--word", required=True, metavar="WORD", help=what)
    s.add_argument("--initial", required=True, metavar="WORDS", help="known words that it begins as, such as 'plant'")
    s.add_argument("--vectors", type=int, metavar="N", help="how many tokens the word has (1)")


def _common(s: argparse.ArgumentParser) -> None:
    s.add_argument("-m", "--model", required=True, metavar="MODEL", help="name, hub id, folder or file to train for")
    what = "pictures; a .txt file beside a picture, with its name, is its caption"
    s.add_argument("-i", "--images", required=True, metavar="DIR", help=what)
    s.add_argument("-p", "--prompt", metavar="TEXT", help="caption of the pictures that have no .txt file")
    _output(s, "DIR", "folder; an unfinished run continues")
    s.add_argument("--steps", type=int, metavar="N", help="steps of the training (1000)")
    s.add_argument("--batch", type=int, metavar="N", help="pictures a step (1)")
    s.add_argument("--accumulate", type=int, metavar="N", help="batches a step, one after the other (1)")
    s.add_argument("--low-memory", action="store_true", default=None, help="slower, but in less memory")
    s.add_argument("--rate", type=float, metavar="R", help="learning rate (a LoRA 1e-4, a word 5e-4)")
    s.add_argument("--warmup", type=int, metavar="N", help="steps in which the rate rises to its value (0)")
    what = "the share of the steps after which the rate falls to nothing (1: it stays)"
    s.add_argument("--decay-after", type=float, metavar="SHARE", help=what)
    s.add_argument("--size", type=int, metavar="PX", help="edge of a square with as many pixels (the model's size)")
    s.add_argument("--crop", action="store_true", default=None, help="crop all to that square (default: keep shapes)")
    s.add_argument("--flip", action="store_true", default=None, help="also learn from mirrored pictures")
    s.add_argument("--seed", type=int, metavar="N", help="seed of first values, noise and order (0)")
    s.add_argument("--save-every", type=int, metavar="N", help="steps from one save to the next (100)")
    s.add_argument("--sample", nargs="+", metavar="PROMPT", help="pictures to draw whenever it saves; see samples.png")
    s.add_argument("-q", "--quantize", type=bits_of, choices=BITS, metavar="BITS", help="train over a smaller model")
    s.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the model (bfloat16; on a CPU float32)")
    s.add_argument("--offline", action="store_true", help="never use the network")
    s.add_argument("--estimate", action="store_true", help="say how much memory a step takes, and stop")
    s.add_argument("--force", action="store_true", help="try it even if this machine has too little memory")


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(sys.argv[1:] if argv is None else argv)
    if args.what != "lora" and machines.started():
        p.error("Of all that this trains, only a LoRA is trained on several machines")
    kinds = {"lora": lora, "embedding": embedding, "storybook": train, "judge": judge, "scenes": scenes}
    return run("mlxdiff train", lambda: kinds[args.what](args))


def _edge(size: int) -> int:
    """Raise unless the judge can read pictures of this size."""
    if size % SIDE or not SIDE <= size <= MAX_EDGE:
        raise Error(f"Size {size} is not a multiple of {SIDE} up to {MAX_EDGE}.", f"Use `size={SIZE}`.")
    return size


def train(args) -> int:
    settings = {f.name: getattr(args, f.name) for f in fields(Recipe)}
    recipe = Recipe(**settings | {"size": _edge(args.size)})
    same_run(args.out, vars(recipe))
    blas.use_all_cores()  # the networks are small, but a batch is not
    if (args.out / "scenes.json").exists():
        say("The run in this folder continues.")
    else:
        size = recipe.pictures * 3 * recipe.size**2 / 1e9
        say(f"Rendering {recipe.pictures} pictures first, {size:.2g} GB in {args.out}.")
        say("A bar shows how long each stage takes. Ctrl-C stops the run, and the same command continues it.")
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
    say(f"{args.out / 'model'} is the model, in the diffusers layout. It draws {args.size} x {args.size} pixels.")
    return 0


def lora(args) -> int:
    with machines.joined() as others:
        if others is None or others.rank == 0:
            return _lora_on(args, others)
        with TemporaryDirectory() as scratch:  # the folder of a machine that only helps
            others.scratch, args.out = scratch, Path(scratch) / "run"
            return _lora_on(args, others)


def _lora_on(args, others: machines.Machines | None) -> int:
    from . import footprint, tune

    tuning = _settings(args, tune.LoraTuning)
    model, pipe = _described(args)
    tune.check(model, tuning)
    helps = others is not None and others.rank > 0
    if args.estimate:
        if not helps:
            say(footprint.table(model, tuning))
        return 0
    said = footprint.told(model, tuning, args.force)
    made = tune.LoraRun(_load(args) if pipe is None else pipe, tuning, args.out, others)
    if helps:
        for _ in made.steps():
            pass
        return 0
    return _tune(args, made, said)


def embedding(args) -> int:
    from . import footprint, inversion, tune

    tuning = _settings(args, inversion.WordTuning)
    model, pipe = _described(args)
    tune.check(model, tuning)
    inversion.check(model)
    if args.estimate:
        say(footprint.table(model, tuning))
        return 0
    said = footprint.told(model, tuning, args.force)
    return _tune(args, inversion.WordRun(_load(args) if pipe is None else pipe, tuning, args.out), said)


def _described(args):
    """The model's description, and the model if it had to be loaded for it: of a named one, all is known before it is
    fetched."""
    from ..description import published
    from ..families import name_of

    if (name := name_of(args.model)) is not None:
        return published(name, weights(args.quantize, _dtype(args))), None
    pipe = _load(args)
    return pipe.description, pipe


def _settings(args, kind: Callable):
    given = {f.name: v for f in fields(kind) if (v := getattr(args, f.name, None)) is not None}
    tuning = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    tuning.check()
    return tuning


def _dtype(args) -> str:
    """The small numbers of gradients are lost in float16."""
    return args.dtype or ("float32" if default_dtype() == "float32" else "bfloat16")


def _load(args):
    from .. import load

    blas.use_all_cores()
    pipe = load(args.model, bits=args.quantize, dtype=_dtype(args), offline=args.offline)
    for prompt in args.sample or ():
        pipe.resolve(prompt)  # a bad one is refused before the work
    return pipe


def _tune(args, made, *said: str) -> int:
    """Train a file for a model, with a bar. made: the training. said: what else people should know."""
    tuning = made.tuning
    for line in (*made.lines(), *said):
        say(line)
    say("Ctrl-C stops the run, and the same command continues it.")
    bar, mean = None, None
    with closing(made.steps()) as steps:  # it saves when it is closed
        try:
            for report in steps:
                if bar is None:
                    bar = tqdm(total=tuning.steps, initial=report.step - 1, desc="train", unit="step")
                mean = report.loss if mean is None else mean + 0.05 * (report.loss - mean)
                speed = tuning.batch * tuning.accumulate / report.seconds
                bar.set_postfix_str(f"loss {mean:.4f}, {speed:.2g} samples/s", refresh=False)
                bar.update(1)
                if args.sample and (report.step % tuning.save_every == 0 or report.step == tuning.steps):
                    made.sample(args.sample, report.step)
        finally:
            if bar is not None:
                bar.close()
    say(f"{made.file} is ready: mlxdiff generate PROMPT -m {args.model} {made.flag}")
    return 0


def judge(args) -> int:
    """Print a line for each combination of settings."""
    from .. import load
    from . import judge as judges
    from . import measure

    referee = judges.load(judges.shipped() if args.judge is None else args.judge)
    pipe = load(args.model, bits=args.quantize, dtype=args.dtype)
    chosen = measure.scenes(args.scenes, args.unseen)
    size = _edge(pipe.description.defaults.size if args.size is None else args.size)
    _line("renders", judges.adherence(referee, measure.renders(chosen, size), chosen))
    own = pipe.description.defaults
    each = args.guidance or [own.guidance], args.steps or [own.steps], args.sampler or [own.sampler]
    for guidance, steps, sampler in product(*each):
        shares = measure.measure(
            pipe, referee, chosen, guidance=guidance, steps=steps, sampler=sampler, width=size, height=size
        )
        _line(f"guidance {guidance:g}, {steps} steps of {sampler}", shares)
    return 0


def _line(what: str, figures: dict[str, float]) -> None:
    parts = [f"{k} {v:.2f}" if k == "frechet" else f"{k} {100 * v:.1f}" for k, v in figures.items()]
    say(f"{what}: {', '.join(parts)}")


def scenes(args) -> int:
    images.kind_of(args.out)  # raises before the work
    rng, rows = np.random.default_rng(args.seed), []
    for _ in range(3):
        row = []
        for _ in range(4):
            scene = sb.sample(rng)
            row.append(sb.render(scene, rng, args.size))
            say(sb.caption(scene, rng))
        rows.append(np.concatenate(row, 1))
    say(str(images.write(Image.fromarray(np.concatenate(rows)), args.out, metadata.COMPUTED)), sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
