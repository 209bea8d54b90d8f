"""`python -m mlxdiff.bench`: measures how long each stage of a picture takes and how much memory it needs. It uses a
model or, without any file, a named model's full-size networks with random weights. Times are medians, printed with the
shortest and the longest."""

import argparse
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
from tqdm import tqdm, trange

from .. import foreign
from ..console import Parser, run, say, say_json
from ..errors import Error
from ..families import DEFAULT, MODELS
from ..families.base import SECOND_PASS
from ..pipeline import Pipeline, load
from ..recipe import BITS, DTYPES, SMALLER, Recipe, bits_of
from ..request import Request
from ..samplers import SAMPLERS
from . import against_torch, graph, machine, quality, report, start
from .random_model import RandomNetworks, random_pipeline
from .step import Trace, spread

_PROMPT = "a red house under a full moon"
_QUALITY = "draw with several settings: what they cost, and what the pictures are worth"
_STAGES = ("encode", "load", "prepare", "denoise", "decode")  # prepare: everything that is constant during the loop
_AFTER = {"encode": "prepare", "load": "prepare", "denoise": "decode", "decode": None}


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="mlxdiff bench", description="Measure time, memory and kernels.", add_help=False)
    g = p.add_argument_group("what to measure")
    which = g.add_mutually_exclusive_group()
    which.add_argument("-m", "--model", default=DEFAULT, help=f"a name, hub id, folder or file ({DEFAULT})")
    what = "a named model's networks with random weights; needs no file"
    which.add_argument("--random", choices=MODELS, metavar="NAME", help=what)
    what = "count a named model's kernels and traffic on a Mac; runs nothing"
    which.add_argument("--graph", choices=MODELS, metavar="NAME", help=what)
    which.add_argument("--quality", nargs="?", const=DEFAULT, metavar="MODEL", help=f"{_QUALITY} ({DEFAULT})")
    which.add_argument("--table", nargs="+", metavar="FILE", help="make one table of files that --report wrote")
    what = "with --random or --graph: keep N blocks of each kind in SD3, FLUX and T5"
    g.add_argument("--blocks", type=int, metavar="N", help=what)
    g.add_argument("--steps", type=int, metavar="N", help="steps of a run (4; with --report the model's)")
    g.add_argument("-W", "--width", type=int, metavar="PX", help="width of the picture (default: the model's size)")
    g.add_argument("-H", "--height", type=int, metavar="PX", help="height; multiples of 8, of 16 from SD3 on")
    g.add_argument("--batch", type=int, choices=(1, 2), help="1: no guidance, 2: guidance (default: the model's)")
    g.add_argument("-q", "--quantize", type=bits_of, choices=BITS, metavar="BITS", help=SMALLER)
    g.add_argument("--dtype", choices=DTYPES, help="default: the dtype that suits this machine")
    g.add_argument("--low-memory", action="store_true", help="slower, but in less memory")
    g.add_argument("--force", action="store_true", help="try it even if this machine has too little memory")
    g = p.add_argument_group("how")
    g.add_argument("--repeat", type=int, metavar="N", help="runs to measure, after one warm-up run (3)")
    g.add_argument("--against", choices=("torch",), help="time diffusers' network alternately with ours")
    g.add_argument("--install", metavar="PATH", help="also time a fresh install of this wheel or checkout")
    what = "write the figures as JSON and Markdown to send"
    g.add_argument("--report", nargs="?", const="-", metavar="FILE", help=what)
    g.add_argument("--note", default="", metavar="TEXT", help="with --report: what else matters, such as 'on battery'")
    g.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    g = p.add_argument_group("with --quality")
    what = "steps=4,8 sampler=ddim bits=8,none reuse=0,0.1: all combinations (default: the first three, each alone)"
    g.add_argument("--over", nargs="+", default=(), metavar="NAME=VALUES", help=what)
    g.add_argument("--prompts", metavar="N|FILE", help="how many, or a text file with one a line")
    g.add_argument("--clip", metavar="CLIP", help="judges pictures of other models than storybook; see mlxdiff score")
    g = p.add_argument_group("also")
    g.add_argument("-h", "--help", action="help", help="show this and stop")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run("mlxdiff bench", lambda: bench(args))


def bench(args: argparse.Namespace) -> int:
    if args.repeat is not None and args.repeat < 1:
        raise Error(f"--repeat must be at least 1; {args.repeat} was given.", "Use 1 or more.")
    if args.random is not None and args.install is not None:
        raise Error("--install draws a picture, and --random has no model for that.", "Name a model with -m.")
    if args.blocks is not None and (args.random is args.graph is None or args.blocks < 1):
        raise Error(f"--blocks {args.blocks} has no effect.", "Use 1 or more, with --random or --graph.")
    _check_mode(args)
    if args.table is not None:
        say(report.table_of([foreign.path(file) for file in args.table]))
    elif args.quality is not None:
        facts = compare(args)
        say_json(facts) if args.json else say(quality.table(facts))
    elif args.report is not None:
        send(args)
    elif args.graph is not None:
        facts = counted(args)
        say_json(facts) if args.json else say(graph.table(facts))
    else:
        facts = measure(args)
        say_json(facts) if args.json else say(table(facts))
    return 0


def _check_mode(args: argparse.Namespace) -> None:
    """Raise if a flag has no effect on what is asked for."""
    only = {"quality": ("over", "prompts", "clip"), "report": ("note",)}
    for mode, names in only.items():
        typed = next((name for name in names if getattr(args, name)), None)
        if typed is not None and getattr(args, mode) is None:
            raise Error(f"--{typed} has no effect without --{mode}.", "Leave it out.")
    drawn = ("batch", "steps", "repeat", "quantize", "against", "install", "blocks", "report")
    sized = ("width", "height", "dtype")
    none = {"quality": drawn, "table": (*drawn, *sized, "json"), "report": ("against", "install", "blocks", "json")}
    none["graph"] = ("repeat", "against", "install", "report")
    for mode, names in none.items():
        typed = next((name for name in names if getattr(args, name)), None)
        if typed is not None and getattr(args, mode) is not None:
            fix = "Give `over=steps=4,8` or `over=bits=8,none`." if mode == "quality" else "Leave it out."
            raise Error(f"`{typed}` has no effect with --{mode}.", fix)


def opened(args: argparse.Namespace) -> Pipeline:
    if args.random is not None:
        return random_pipeline(args.random, args.dtype, args.low_memory, args.blocks, args.force, bits=args.quantize)
    return load(args.model, bits=args.quantize, dtype=args.dtype, low_memory=args.low_memory, force=args.force)


def counted(args: argparse.Namespace) -> dict:
    """What a named model asks of a GPU; in 16 bits if no dtype was given."""
    dtype = args.dtype or "float16"
    pipe = random_pipeline(args.graph, dtype, args.low_memory, args.blocks, force=True, bits=args.quantize)
    return graph.measure(pipe, asked(pipe, args))


def measure(args: argparse.Namespace) -> dict:
    """All figures. Each time is {median, least, most, n} in seconds."""
    pipe, repeat = opened(args), 3 if args.repeat is None else args.repeat
    request = asked(pipe, args)
    if args.against is not None:
        against_torch.check(pipe)
    facts = about(pipe, request, args) | {"repeat": repeat}
    if args.report is None:  # the rest is no figure of the model
        facts |= {
            "import": start.import_time(repeat),
            "cold_start": None if args.random else start.cold_start(args, request, repeat),  # before the model is held
            "install": start.install_size(),
            "install_to_picture": None if args.install is None else start.install_to_picture(args, request),
        }
    facts |= draw(pipe, request, repeat, parts=args.report is None)
    batch = facts["batch"]
    facts["against"] = None if args.against is None else against_torch.compare(pipe, request, batch, repeat)
    return facts


def about(pipe: Pipeline, request: Request, args: argparse.Namespace) -> dict:
    """What is measured, and on what."""
    model = pipe.description
    return machine.facts() | {
        "model": pipe.name,
        "family": model.family.name,
        "random": args.random is not None,
        **model.recipe.values(),
        "width": request.width,
        "height": request.height,
        "batch": model.passes(request),
        "steps": request.steps,
        "low_memory": args.low_memory,
    }


def send(args: argparse.Namespace) -> None:
    """Measure, and print what a user may send; to a file, the JSON alone."""
    report.check_note(args.note)
    file = None if args.report == "-" else foreign.path(args.report)
    if file is not None and file.exists():
        raise Error(f"{file} is there already.", "Choose another name.")
    made = report.report(measure(args), args.random or args.model, args.note)
    if file is None:
        say(report.pasted(made))
    else:
        report.write(made, file)
        say(f"{file}\n{report.table([made])}")


def compare(args: argparse.Namespace) -> dict:
    """The figures of `--quality`."""
    size = {"width": args.width, "height": args.height}

    def opened(bits: int | str | None) -> Pipeline:
        return load(args.quality, bits=bits, dtype=args.dtype, low_memory=args.low_memory, force=args.force)

    question = quality.asked(args.quality, args.prompts)
    pipe = opened(None)
    request = pipe.resolve(question.prompts[0], seed=0, **size)
    known = [name for name, row in SAMPLERS.items() if row.flow is not None or not pipe.description.family.flow]
    facts = about(pipe, request, args)
    bits = (8, 4) if facts["device"] == "gpu" else (4,)  # which a CPU multiplies slowly
    todo = quality.settings(request.steps, request.sampler, known, args.over, bits)
    del pipe
    scorer, total = quality.Scorer(question, args.clip), len(todo) * len(question.prompts)
    with tqdm(total=total, desc="draw", unit="picture", leave=False, disable=True if args.json else None) as bar:
        rows = quality.compare(opened, todo, question, scorer, lambda done: bar.update(done - bar.n), **size)
    return {
        **{name: facts[name] for name in facts if name not in ("bits", "steps", "batch", "random")},
        "prompts": question.prompts,
        "own": question.labels is not None,
        "score": scorer.title,
        "rows": rows,
        "fastest_as_good": quality.fastest_as_good(rows),
    }


def asked(pipe: Pipeline, args: argparse.Namespace) -> Request:
    """The request to measure. Its sampler is euler, which calls the network once a step."""
    guidance = None
    two = pipe.description.guidance == SECOND_PASS
    if args.batch == 2 and not two:
        raise Error(f"{pipe.name} has no second pass for guidance.", "Use --batch 1.")
    if args.batch is not None and two:
        guidance = 1.0 if args.batch == 1 else max(pipe.description.defaults.guidance, 2.0)
    steps = 4 if args.steps is None and args.report is None else args.steps
    return pipe.resolve(
        _PROMPT, seed=0, steps=steps, width=args.width, height=args.height, guidance=guidance, sampler="euler"
    )


# ---- the run and its step


def draw(pipe: Pipeline, request: Request, repeat: int, parts: bool = True) -> dict:
    """A warm-up run, whose first step is traced, then `repeat` runs. The peaks come from the first run, since later
    runs already have the networks in memory, and so do the stages that only it has, such as loading. Random weights are
    not loaded, so making them is not timed, except a transformer's modulations, which are created inside `prepare`.
    parts: also time the first step's matmuls, convolutions and attentions alone."""
    random = isinstance(pipe.networks, RandomNetworks)
    trace, clock = Trace(), pipe.networks.clock if random else time.perf_counter
    try:
        first = watch(pipe, request, clock, trace if parts else None)
    finally:
        trace.on(False)
    runs = trange(repeat, desc="runs", leave=False, disable=None)  # a bar on a terminal only
    rest = [watch(pipe, replace(request, prompt=f"{_PROMPT} {i}"), clock) for i in runs]
    stages = {}
    for stage in (s for s in _STAGES if s in first.seconds):
        samples = [r.seconds[stage] for r in rest if stage in r.seconds] or [first.seconds[stage]]
        stages[stage] = {"seconds": spread(samples), "peak_bytes": first.peaks[stage]}
    if random:
        del stages["load"]
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    step = spread([s for r in rest for s in r.steps])
    total = {"seconds": spread([sum(r.seconds.values()) for r in rest]), "resident_bytes": resident}
    inside = inside_step(trace, step["median"], repeat) if parts else {}
    return {"stages": stages, "total": total, "step": {"seconds": step, **inside}}


def inside_step(trace: Trace, step: float, repeat: int) -> dict:
    """What a step of so many seconds spends its time on."""
    parts = trace.alone(repeat)
    parts["rest"] = {"seconds": step - sum(p["seconds"] for p in parts.values())}
    for part in parts.values():
        part["share"] = part["seconds"] / step
    primitives = dict(trace.kernels.most_common())
    return {"kernels": sum(trace.kernels.values()), "primitives": primitives, "parts": parts}


class Run(NamedTuple):
    seconds: dict[str, float]  # per stage; a stage lasts until the next one begins, so all stages add up to the run
    peaks: dict[str, int]  # bytes
    steps: list[float]  # seconds


def watch(pipe: Pipeline, request: Request, clock: Callable[[], float], trace: Trace | None = None) -> Run:
    """Time one run. It has an encode stage only if its prompt differs from that of the run before."""
    done, stage, begin = Run({}, {}, []), None, 0.0
    for event in pipe.run(request):
        if event.step in (0, event.steps):
            if stage is not None:
                done.seconds[stage] = done.seconds.get(stage, 0.0) + clock() - begin
                done.peaks[stage] = max(done.peaks.get(stage, 0), mx.get_peak_memory())
            mx.reset_peak_memory()
            stage, begin = event.stage if event.step == 0 else _AFTER[event.stage], clock()
        if event.stage == "denoise" and event.step > 0:
            done.steps.append(event.seconds)
        if trace is not None:
            trace.on(event.stage == "denoise" and event.step == 0)
    return done


# ---- the table


def table(facts: dict) -> str:
    """The figures as an aligned table."""
    f, step = facts, facts["step"]
    blas = "" if f["blas"] is None else f", {f['blas']}"
    lines = [
        f"mlxdiff {f['mlxdiff']}, mlx {f['mlx']} on {f['device']} ({f['chip']}{blas})",
        f"{f['model']}, {Recipe(f['dtype'], f['bits'])}, {f['width']}x{f['height']}, batch {f['batch']}"
        + (", low memory" if f["low_memory"] else ""),
        f"runs of {f['steps']} steps: {f['repeat']}, after a warm-up run",
        "",
        f"{'stage':12}{'seconds':>10}   {'least - most':16}{'peak':>9}",
    ]
    for name, row in f["stages"].items():
        lines.append(f"{name:12}{_spread(row['seconds'])}{row['peak_bytes'] / 1e9:6.2f} GB")
    lines.append(
        f"{'whole':12}{_spread(f['total']['seconds'])}{f['total']['resident_bytes'] / 1e9:6.2f} GB   {_RESIDENT}"
    )
    lines += [f"{'one step':12}{_spread(step['seconds'])}   s/it", ""]

    lines.append(f"{'in one step':12}{'seconds':>10}{'share':>8}{'calls':>8}")
    for name, row in step["parts"].items():
        calls = f"{row['calls']:8}   alone, {row['shapes']} shapes" if "calls" in row else f"{'':8}   {_REST}"
        lines.append(f"{name:12}{row['seconds']:10.4f}{row['share']:8.0%}{calls}")
    most = ", ".join(f"{n} {name}" for name, n in list(step["primitives"].items())[:4])
    lines += [f"{'kernels':12}{step['kernels']:10}   {_KERNELS}: {most}, ...", ""]

    lines.append(f"{'import':12}{_spread(f['import'])}")
    if f["cold_start"] is not None:
        lines.append(f"{'cold start':12}{_spread(f['cold_start'])}   command to first byte of a one-step picture")
    if f["install"] is None:
        lines.append(f"{'on disk':12}{'-':>10}   not installed: run pip install .")
    else:
        most = ", ".join(f"{name} {n / 1e6:.1f}" for name, n in list(f["install"]["packages"].items())[:5])
        lines.append(f"{'on disk':12}{f['install']['bytes'] / 1e6:7.1f} MB   {most}, ...")
    if f["install_to_picture"] is not None:
        i = f["install_to_picture"]
        lines.append(
            f"{'install':12}{i['seconds']:10.3f}   venv {i['venv']:.1f}, pip {i['pip']:.1f}, picture {i['picture']:.1f}"
        )
    if f["against"] is not None:
        lines += ["", *_against(f["against"])]
    return "\n".join(line.rstrip() for line in lines)


_RESIDENT = "the process's peak in all runs, by the system"
_REST = "the rest of the step: elementwise, norms, copies, overhead"
_KERNELS = "primitives of its graph, without views"


def _spread(s: dict) -> str:
    """Median, then least and most, 29 wide."""
    span = f"{s['least']:.3f} - {s['most']:.3f}" if s["n"] > 1 else "once"
    return f"{s['median']:10.3f}   {span:16}"


def _against(a: dict) -> list[str]:
    if "absent" in a:
        return [f"torch       absent: {a['absent']} is missing; pip install torch diffusers"]
    apart = "different weights" if a["error"] is None else f"outputs within {a['error']:.0e}"
    torch = "unknown" if a["torch_peak_bytes"] is None else f"{a['torch_peak_bytes'] / 1e9:.2f} GB"
    return [
        f"network alone, alternating with torch {a['torch']} (diffusers {a['diffusers']}) on {a['device']}, {apart}",
        f"{'mlxdiff':12}{_spread(a['seconds'])}{a['peak_bytes'] / 1e9:6.2f} GB",
        f"{'torch':12}{_spread(a['torch_seconds'])}{torch:>9}",
        f"{'ratio':12}{_spread(a['ratio'])}   of torch's time",
    ]


if __name__ == "__main__":
    sys.exit(main())
