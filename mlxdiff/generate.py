"""`python -m mlxdiff.generate`: turns arguments into a Request, events into a progress bar, and pictures into files."""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TextIO

import mlx.core as mx
from PIL.Image import Image

from . import BLAS, foreign, images, machines, notes, output, samplers, schedules, tune
from .bar import Bar
from .console import Parser, run, warn
from .errors import Error
from .families import DEFAULT, MODELS, PARTS
from .guides import DETECTORS, MASKED, guides
from .pipeline import Pipeline, load
from .recipe import BITS, DTYPES, OF_TEXT, SMALLER, TEXT_BITS, WHOLE, bits_of, recipe
from .request import OUTPAINT, STRENGTH, Request


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="mlxdiff generate", usage="mlxdiff generate PROMPT [options]", epilog=_EXAMPLES, add_help=False)
    p.description = "Draw pictures from a prompt. Settings that you leave open take the model's defaults."
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    _what_to_draw(p.add_argument_group("what to draw"))
    _from_a_picture(p.add_argument_group("from a picture"))
    _guided(p.add_argument_group("guided by pictures"))
    _larger(p.add_argument_group("larger"))
    _how_to_draw(p.add_argument_group("how to draw it"))
    _with_which_model(p.add_argument_group("with which model"))
    _where_it_goes(p.add_argument_group("where it goes"))
    return p


def _what_to_draw(g: argparse._ArgumentGroup) -> None:
    g.add_argument("words", nargs="*", metavar="PROMPT", help="the prompt; '-' reads it from standard input")
    g.add_argument("-p", "--prompt", help="the prompt, as a flag")
    g.add_argument("--prompt-file", type=Path, metavar="FILE", help="one prompt a line; # begins a comment line")
    g.add_argument("-n", "--negative-prompt", metavar="TEXT", help="what to avoid")
    g.add_argument("-s", "--seed", type=int, nargs="+", metavar="N", help="one picture for each seed (default: fresh)")
    g.add_argument("-b", "--count", type=int, metavar="N", help="pictures for each seed; their seeds count up from it")
    g.add_argument("-W", "--width", type=int, metavar="PX", help="width of the picture (default: the model's size)")
    g.add_argument("-H", "--height", type=int, metavar="PX", help="height; multiples of 8, of 16 from SD3 on")
    g.add_argument("--from-image", type=Path, metavar="PICTURE", help="use its settings; flags replace them")


def _from_a_picture(g: argparse._ArgumentGroup) -> None:
    what = "start image, cropped to -W, -H if they are given; or what to edit: repeat it if the model takes several"
    g.add_argument("-i", "--image", action="append", metavar="FILE", help=what)
    what = f"how much of a start image to redraw; 1 is all ({STRENGTH}, to outpaint {OUTPAINT}, for inpaint models 1)"
    g.add_argument("--strength", type=float, metavar="F", help=what)
    what = "white where the start image is drawn anew; alpha: where it is transparent"
    g.add_argument("--mask", metavar="FILE|alpha", help=what)
    g.add_argument("--mask-blur", type=float, metavar="PX", help="soften the edge of the mask (0)")
    what = "draw only the part that holds the mask, with PAD pixels around it, and put it back into the picture"
    g.add_argument("--mask-crop", type=int, metavar="PAD", help=what)
    what = "do not paste back the pixels outside the mask"
    g.add_argument("--no-keep", dest="keep", action="store_false", default=None, help=what)
    sides = ("LEFT", "TOP", "RIGHT", "BOTTOM")
    g.add_argument("--outpaint", type=int, nargs=4, metavar=sides, help="pixels to add around the start image")


def _guided(g: argparse._ArgumentGroup) -> None:
    what = "a picture to follow line by line, and the ControlNet that reads it: a name, hub id, folder or file; no"
    what += f" MODEL for flux-depth and flux-canny, which read it themselves; IMAGE {MASKED}: the start image without"
    what += " what the mask marks, for a ControlNet that inpaints"
    form = ("[MODEL] IMAGE", "SCALE [FROM TO]")
    g.add_argument("--control", dest="controls", action=_Control, nargs="+", metavar=form, help=what)
    what = f"make a control picture of the photograph of the next --control: {', '.join(DETECTORS)}"
    g.add_argument("--detect", choices=DETECTORS, metavar="KIND", help=what)
    what = "controls guide the prompt's pass alone: the picture decides more, the prompt less"
    g.add_argument("--guess", action="store_true", default=None, help=what)
    what = "a picture whose style or things to take over, and the IP-Adapter or Redux that reads it; MODEL:style or"
    what += " MODEL:layout takes over that alone"
    g.add_argument("--reference", dest="references", action="append", nargs="+", metavar=form, help=what)


def _larger(g: argparse._ArgumentGroup) -> None:
    what = "draw it, enlarge it and draw on: SCALE 2 doubles its edges; STRENGTH of the second pass is 0 to 1"
    form = ("SCALE", "STRENGTH")
    g.add_argument("--hires", type=float, nargs="+", metavar=form, help=f"{what} ({STRENGTH})")
    what = "enlarge by this upscaler (mlxdiff upscale --help lists some): the finished picture, or that of --hires"
    g.add_argument("--upscale", dest="upscaler", metavar="MODEL", help=what)


def _how_to_draw(g: argparse._ArgumentGroup) -> None:
    g.add_argument("--steps", type=int, metavar="N", help="more steps are slower and finer (default: the model's)")
    g.add_argument("-g", "--guidance", "--cfg-scale", type=float, metavar="G", help="pull to the prompt; 1 is no pull")
    g.add_argument("--rescale", type=float, metavar="R", help="guidance rescale, 0 to 1 (default 0)")
    what, part = "guide in this part of the steps alone, such as 0.2 0.8", ("FROM", "TO")
    g.add_argument("--interval", type=float, nargs=2, metavar=part, help=what)
    g.add_argument("--sampler", metavar="NAME", help=", ".join(samplers.SAMPLERS))
    g.add_argument("--schedule", metavar="NAME", help=", ".join(schedules.SPACINGS))
    g.add_argument("--eta", type=float, metavar="E", help="how much noise a stochastic sampler puts back")
    g.add_argument("--clip-skip", type=int, metavar="N", help="which text layer is read, counted from the end")
    g.add_argument("--shift", type=float, metavar="S", help="SD3, FLUX, Z-Image: above 1 moves steps to larger noise")
    g.add_argument("--true-cfg", type=float, metavar="G", help="FLUX: push from the negative prompt by a second pass")
    g.add_argument("--skip-layers", type=int, nargs="+", metavar="N", help="SD3.5 medium: 7 8 9 draws firmer shapes")
    g.add_argument("--skip-scale", type=float, metavar="G", help="how far to push from the pass without them (2.8)")
    what = "in which part of the steps (0.01 0.2)"
    g.add_argument("--skip-interval", type=float, nargs=2, metavar=part, help=what)
    g.add_argument("--no-t5", dest="t5", action="store_false", default=None, help="SD3: leave T5 out, for less memory")
    what = "skip most of a step where little changed, 0.1 is a tenth: faster, slightly different; 0 skips nothing (0)"
    g.add_argument("--reuse", type=float, metavar="F", help=what)
    g.add_argument("--noise", metavar="KIND", help="torch: as diffusers; nv: as A1111 on a GPU; mlx (default torch)")


def _with_which_model(g: argparse._ArgumentGroup) -> None:
    g.add_argument("-m", "--model", metavar="MODEL", help=f"name, hub id, folder, .safetensors or .gguf ({DEFAULT})")
    many = "a file or name (lcm, ...) that changes the model, at a scale if it is not 1; may be given several times"
    g.add_argument("--lora", dest="loras", action="append", metavar="FILE[:SCALE]", help=many)
    where = "where --lora, --embedding and <lora:NAME> in a prompt find names ($MLXDIFF_LORAS)"
    g.add_argument("--lora-dir", type=Path, metavar="DIR", help=where)
    many = "a word that is taught to CLIP (textual inversion); may be given several times"
    g.add_argument("--embedding", dest="embeddings", action="append", metavar="FILE[=WORD]", help=many)
    g.add_argument("--refiner", metavar="MODEL", help="a second model that finishes the picture, such as sdxl-refiner")
    g.add_argument("--refine-at", type=float, metavar="F", help="fraction of the steps before the refiner begins (0.8)")
    g.add_argument("-q", "--quantize", type=bits_of, choices=BITS, metavar="BITS", help=SMALLER)
    g.add_argument("--text-bits", type=bits_of, choices=TEXT_BITS, metavar="BITS", help=OF_TEXT)
    g.add_argument("--dtype", choices=DTYPES, help="default: the dtype that suits this machine")
    g.add_argument("--tokenizer", metavar="DIR", help="tokenizer folder for a single-file checkpoint")
    for kind, what in PARTS.items():
        flag = f"--{kind.replace('_', '-')}"
        g.add_argument(flag, dest=f"part_{kind}", type=Path, metavar="FILE", help=f"{what}, for a single file")
    g.add_argument("--prediction", choices=("eps", "v"), help="what the network predicts, if the file does not say it")
    g.add_argument("--offline", action="store_true", help="never use the network")
    what = "keep nothing of what text encoders made of the prompt, and use nothing that was kept"
    g.add_argument("--no-prompt-cache", dest="prompt_cache", action="store_false", help=what)
    g.add_argument("--low-memory", action="store_true", help="slower, but in less memory")
    g.add_argument("--force", action="store_true", help="try it even if this machine has too little memory")
    what = "do not measure first which ways to compute are fastest here: done once, before a large model on a GPU"
    g.add_argument("--no-tune", dest="tune", action="store_false", help=what)


def _where_it_goes(g: argparse._ArgumentGroup) -> None:
    output.add_arguments(g)
    where = "write a rough picture of every step there, in a new folder for each picture (slower)"
    g.add_argument("--preview-dir", type=Path, metavar="DIR", help=where)
    g.add_argument("--taesd", metavar="auto|FILE", help="tiny decoder for previews; auto fetches the model's, 10 MB")
    g.add_argument("--json", action="store_true", help="print one JSON line for each picture, and no progress bar")
    g.add_argument("-v", "--verbose", action="store_true", help="say what was chosen")
    g.add_argument("-h", "--help", action="help", help="show this and stop")


_LARGE = 2**30  # bytes of a denoiser
_EXAMPLES = """examples:
  mlxdiff generate "a red house under a full moon"
  mlxdiff generate "a red fox in the snow" -m sdxl -s 1 2 3 -o foxes/
  mlxdiff generate "make it winter" -m flux2-klein -i photo.png
  mlxdiff generate "a red door" -m sdxl -i photo.png --mask door.png
  mlxdiff generate "a lighthouse" -m sdxl --hires 1.5 0.5 --upscale realesrgan-x4plus
  mlxdiff generate "a lighthouse" -m sdxl --lora style.safetensors:0.8
  mlxdiff generate "a lighthouse" -m sd15 --control canny edges.png 0.8
  mlxdiff generate "a lighthouse" -m sd15 --detect canny --control canny photo.png
  mlxdiff generate "a red door" -m sd15 -i photo.png --mask door.png --control inpaint masked
  mlxdiff generate "a lighthouse" -m sdxl --reference ip-adapter-plus photo.png 0.6
  mlxdiff generate "a lighthouse" -m model.safetensors --sampler dpmpp_2m --schedule karras
"""


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run("mlxdiff generate", lambda: draw(args))


def draw(args: argparse.Namespace) -> int:
    with machines.joined() as others:
        return _draw(args, others) if others is None or others.rank == 0 else _follow(args, others)


def _draw(args: argparse.Namespace, others: machines.Machines | None) -> int:
    base, model = (None, None) if args.from_image is None else images.read_settings(args.from_image)
    model = args.model if args.model is not None else _known(model)
    requests = [r.but(_settings(args)) for r in _prompts(args, base)]
    if args.seed is not None:
        requests = [replace(r, seed=s) for r in requests for s in args.seed]
    target = output.Output.of(args, requests)
    _check(args, others)
    if note := tune.apply():
        warn(note)
    with Bar(args.json, sys.stderr if args.output == output.STDOUT else sys.stdout) as bar:
        t5, how = any(r.t5 for r in requests), {"dtype": args.dtype, "text_bits": args.text_bits}
        first = requests[0]  # the others differ in prompts and seeds
        if others is not None:  # machines have different defaults, but pictures are to be the same
            how = _same_everywhere(args, model)
            others.greet({"model": model, "request": first.to_json(), "t5": t5, "how": how})
        pipe = _load(args, model, first, t5, how, bar.progress)
        requests = _resolved(pipe, requests, bar)
        for request in requests:
            images.check_settings(target.kind, request, pipe.name, str(pipe.description.recipe))
        if args.tune and large(pipe) and not tune.known():
            _tune(bar)
        _say_of_run(args, pipe, requests[0], bar)
        write, lacking = partial(target.write, requests=requests), 0
        for request in requests:
            for note in notes.of_prompt(pipe, request):
                bar.write(note)
            if others is None:
                _one(args, pipe, request, write, bar)
        if others is not None:
            lacking = _share(args, pipe, requests, write, bar, others)
        if bar.unreported is not None:
            raise bar.unreported
    return 1 if lacking else 0


def _check(args: argparse.Namespace, others: machines.Machines | None) -> None:
    """Raise for flags that do nothing, or cannot, before anything is loaded."""
    if args.preview_dir is not None:
        if others is not None:
            raise Error("--preview-dir is for one machine, and mlx.launch started several.", "Leave it out.")
        output.check_writable(args.preview_dir, "--preview-dir")
    elif args.taesd is not None:
        raise Error("--taesd draws previews, but there is no --preview-dir for them.", "Add --preview-dir DIR.")
    if args.refine_at is not None and args.refiner is None:
        raise Error("--refine-at says when a refiner begins, but there is no refiner.", "Add --refiner MODEL.")


def _resolved(pipe: Pipeline, requests: list[Request], bar: Bar) -> list[Request]:
    """The requests with all settings: a bad one is reported before the first picture is drawn."""
    requests = _once([pipe.resolve(r) for r in requests], bar)
    if any(r.reuse for r in requests):  # pictures drawn at once reuse the same steps, and differ with their number
        requests = [single for r in requests for single in r.singles()]
    return requests


def _say_of_run(args: argparse.Namespace, pipe: Pipeline, request: Request, bar: Bar) -> None:
    """Say what holds for all pictures. request: one of them."""
    if args.taesd == "auto" and pipe.previews_by_vae:
        bar.write(f"{pipe.name} draws previews with its VAE, which is small: no TAESD is needed.")
    if args.verbose:
        bar.write(f"model {pipe.name} in {pipe.networks.folder}, {pipe.description.recipe}")
        bar.write(f"MLX {mx.__version__} on {mx.default_device()}, BLAS {BLAS or 'its own'}")
        for fact in filter(None, (tune.summary(), tune.matrix_units())):
            bar.write(fact)
    for note in notes.of_run(pipe, request):
        bar.write(note)


def _same_everywhere(args: argparse.Namespace, model: str) -> dict:
    """How this machine stores weights, for others to do the same."""
    family = MODELS[model].family if model in MODELS else None
    how = recipe(args.quantize, args.dtype, family, args.text_bits)
    whole = how.bits is None and how.text_bits is None
    return {"dtype": how.dtype, "text_bits": WHOLE if whole else how.text_bits}


def _load(args: argparse.Namespace, model: str, first: Request, t5: bool, how: dict, progress: Callable) -> Pipeline:
    """how: `dtype` and `text_bits`."""
    return load(
        model,
        bits=args.quantize,
        **how,
        refiner=args.refiner,
        taesd=args.taesd,
        offline=args.offline,
        low_memory=args.low_memory,
        force=args.force,
        request=first,
        tokenizer=args.tokenizer,
        prediction=args.prediction,
        t5=t5,
        lora_dir=args.lora_dir,
        prompt_cache=args.prompt_cache,
        parts={k: f for k in PARTS if (f := getattr(args, f"part_{k}")) is not None},
        progress=progress,
    )


def large(pipe: Pipeline) -> bool:
    """Whether the model is worth a measurement of this machine: a large one on a GPU."""
    file = pipe.networks.folder / f"{pipe.description.family.denoiser}.safetensors"
    return mx.default_device().type == mx.gpu and file.stat().st_size > _LARGE


def _tune(bar: Bar) -> None:
    """Measure this machine. If the choices cannot be kept, the picture is drawn all the same."""
    bar.write("Measuring which ways to compute are fastest on this machine: about 20 s, once. --no-tune skips it.")
    cases = len(tune.cases())
    try:
        tune.tune(lambda done, m: bar.count("tune", done, cases))
    except Error as e:
        bar.write(str(e))


def _once(requests: list[Request], bar: Bar) -> list[Request]:
    """Keep every picture once: seeds that count up from a given seed may reach another given seed."""
    seen, kept, again = set(), [], {}
    for r in requests:
        seeds = range(r.seed, r.seed + r.count)
        new = [seed for seed in seeds if (r.prompt, seed) not in seen]
        again |= dict.fromkeys(seed for seed in seeds if (r.prompt, seed) in seen)
        seen |= {(r.prompt, seed) for seed in seeds}
        if new:  # all requests have the same count, so only the first or the last seeds can be repeated: no gap
            kept.append(replace(r, seed=new[0], count=len(new)))
    if again:
        bar.write(f"Drawn once, though asked for more often: seed {', '.join(map(str, again))}.")
    return kept


def _one(
    args: argparse.Namespace,
    pipe: Pipeline,
    request: Request,
    write: Callable[..., Path | str],
    bar: Bar,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Draw a request and write its pictures. meanwhile: called after each event."""
    mx.reset_peak_memory()
    drawn, reused, made_by = 0, 0, (pipe.name, str(pipe.description.recipe))
    singles = request.singles()
    previews: list[Path] = []  # a folder for each picture, made with its first preview
    place = args.preview_dir
    for event in pipe.run(request):
        bar.show(event)
        reused += event.reused
        if event.x0 is not None and place is not None:
            try:
                previews = previews or [images.new_folder(place / images.stem(single)) for single in singles]
                if shutil.disk_usage(place).free < 3 * request.width * request.height * len(singles):
                    raise Error(f"{place} has little room left, which the pictures may need.", "Free some space.")
                shown = slice(None) if event.hires is None else slice(event.hires, event.hires + 1)
                step = f"{event.step:03}.png" if event.hires is None else f"hires-{event.step:03}.png"
                for rough, folder, single in zip(pipe.preview(event.x0), previews[shown], singles[shown], strict=True):
                    images.save(rough, folder / step, single, *made_by)
            except Error as e:  # the picture does not need them
                bar.write(f"No more previews: {e.problem}")
                place = None
        if event.image is not None:
            single = singles[drawn]
            path = write(event.image, single=single, model=made_by[0], recipe=made_by[1])
            drawn += 1
            bar.done(path, single, _facts(pipe, request, reused))
        meanwhile()
    bar.began = time.perf_counter()


def _facts(pipe: Pipeline, request: Request, reused: int) -> dict:
    return {"model": pipe.name, **pipe.description.recipe.values()} | ({"reused": reused} if request.reuse else {})


def _share(
    args: argparse.Namespace,
    pipe: Pipeline,
    requests: list[Request],
    write: Callable[..., Path | str],
    bar: Bar,
    others: machines.Machines,
) -> int:
    """Draw on several machines. Returns how much went wrong."""

    def own(request: Request, meanwhile: Callable[[], None]) -> None:
        _one(args, pipe, request, write, bar, meanwhile)

    def keep(request: Request, drawn: machines.Drawn) -> None:
        path = write(drawn.image, single=request, model=pipe.name, recipe=str(pipe.description.recipe))
        made = _facts(pipe, request, drawn.reused) | {"rank": drawn.rank}
        bar.done(path, request, made, drawn.seconds, drawn.peak_bytes)

    missing = others.share([single for r in requests for single in r.singles()], own, keep)
    for problem in others.problems:
        bar.write(f"mlxdiff generate: {problem}")
    for request in missing:
        bar.write(f"mlxdiff generate: missing: seed {request.seed} of {request.prompt!r}.")
    return len(missing) + len(others.problems)


def _follow(args: argparse.Namespace, first: machines.Machines) -> int:
    """Draw what the first machine hands out, and say nothing."""
    told = first.greeted()
    request = Request.from_json(told["request"])
    pipe = _load(args, told["model"], request, told["t5"], told["how"], lambda *_: None)

    def drawn(request: Request) -> tuple[Image, dict]:
        mx.reset_peak_memory()
        began, image, reused = time.perf_counter(), None, 0
        for event in pipe.run(pipe.resolve(request)):
            image, reused = event.image or image, reused + event.reused
        seconds = time.perf_counter() - began
        return image, {"seconds": seconds, "peak_bytes": mx.get_peak_memory(), "reused": reused}

    first.follow(drawn)
    return 0


class _Control(argparse.Action):
    """Keep the words of a control, and the --detect before it."""

    def __call__(self, parser, namespace, words, option_string=None):
        namespace.controls = [*(namespace.controls or []), (words, namespace.detect)]
        namespace.detect = None


def _settings(args: argparse.Namespace) -> dict:
    """The fields of Request that the user typed."""
    same = {f.name for f in fields(Request)} & vars(args).keys() - {"prompt", "seed"}
    typed = {"negative": args.negative_prompt} | {n: getattr(args, n) for n in same}
    if args.detect is not None:
        raise Error("--detect makes the picture of a --control, and none follows.", "Put it before one.")
    if args.controls is not None:
        typed["controls"] = [replace(guides([words], "control")[0], detect=kind) for words, kind in args.controls]
    return {k: tuple(v) if isinstance(v, list) else v for k, v in typed.items() if v is not None}


def _prompts(args: argparse.Namespace, base: Request | None) -> list[Request]:
    given = [" ".join(args.words) if args.words else None, args.prompt, args.prompt_file]
    if sum(g is not None for g in given) > 1:
        raise Error("More than one prompt was given.", "Use only one of PROMPT, --prompt and --prompt-file.")
    if args.prompt_file is not None:
        fix = "Give a text file, one prompt a line."
        try:
            with open(args.prompt_file, encoding="utf-8") as file:
                lines = _text(file, str(args.prompt_file), fix).splitlines()
        except (OSError, ValueError) as e:  # a NUL in the name is a ValueError
            raise Error(f"{args.prompt_file} cannot be read: {getattr(e, 'strerror', None) or e}.", fix) from None
        prompts = [text for line in lines if (text := line.strip()) and not text.startswith("#")]
        if not prompts:
            raise Error(f"{args.prompt_file} holds no prompt.", "Write one prompt a line.")
    elif given[0] == "-":
        prompts = [_text(sys.stdin, "Standard input", "Give a prompt as UTF-8 text.").strip()]
    else:
        prompts = [g for g in given[:2] if g is not None]
    if prompts:
        return [Request(p) if base is None else replace(base, prompt=p) for p in prompts]
    if base is None:
        raise Error("There is no prompt.", 'Say what to draw: mlxdiff generate "a red house under a full moon".')
    return [base]


def _text(file: TextIO, name: str, fix: str) -> str:
    """What a file holds, or a pipe, which may never end."""
    try:
        text = file.read(foreign.MOST + 1)
    except UnicodeDecodeError:
        raise Error(f"{name} cannot be read: it is not UTF-8 text.", fix) from None
    if len(text) > foreign.MOST:
        raise Error(f"{name} cannot be read: it has more than {foreign.MOST:,} characters.", fix)
    return text


def _known(model: str | None) -> str:
    """The model that a picture names, if it can be opened here; else the default."""
    return model if model is not None and (model in MODELS or os.path.exists(model)) else DEFAULT


if __name__ == "__main__":
    sys.exit(main())
