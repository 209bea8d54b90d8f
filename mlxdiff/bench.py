"""`python -m mlxdiff.bench`: how long a picture takes and where, in how much memory, from a model or, without any file,
from a family's full-size networks with random weights. Times are medians, with the least and the most beside them."""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import NamedTuple

import mlx.core as mx
from tqdm import trange

from . import BLAS, __version__, bench_torch
from .bench_step import Trace, spread
from .console import Parser, run
from .errors import Error
from .fullsize import ROWS, RandomPipeline
from .pipeline import Pipeline, load
from .registry import DEFAULT
from .request import Request
from .weights import DTYPES, label

_PROMPT = "a red house under a full moon"
_PACKAGE = Path(__file__).parent
_STAGES = ("encode", "load", "prepare", "denoise", "decode")  # prepare: what the loop has constant
_AFTER = {"encode": "prepare", "load": "prepare", "denoise": "decode", "decode": None}


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="mlxdiff bench", description="Measure time, memory and kernels.", add_help=False)
    g = p.add_argument_group("what to measure")
    which = g.add_mutually_exclusive_group()
    which.add_argument("-m", "--model", default=DEFAULT, help=f"name, hub id, folder or .safetensors ({DEFAULT})")
    which.add_argument("--random", choices=ROWS, metavar="FAMILY", help=f"random weights, no file: {', '.join(ROWS)}")
    g.add_argument("--steps", type=int, default=4, metavar="N", help="steps of a run (4)")
    g.add_argument("-W", "--width", type=int, metavar="PX")
    g.add_argument("-H", "--height", type=int, metavar="PX")
    g.add_argument("--batch", type=int, choices=(1, 2), help="1: not guided, 2: guided (default: what the model does)")
    g.add_argument("--dtype", choices=DTYPES, help="default: what suits this machine")
    g.add_argument("--low-memory", action="store_true", help="slower, in less memory")
    g = p.add_argument_group("how")
    g.add_argument("--repeat", type=int, default=3, metavar="N", help="runs measured, after one to warm up (3)")
    g.add_argument("--against", choices=("torch",), help="call diffusers' network in turn with ours")
    g.add_argument("--install", metavar="PATH", help="also time a fresh install of this wheel or checkout")
    g.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    g.add_argument("-h", "--help", action="help", help="show this and stop")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run("mlxdiff bench", lambda: bench(args))


def bench(args: argparse.Namespace) -> int:
    if args.repeat < 1:
        raise Error(f"--repeat {args.repeat} measures nothing.", "Use 1 or more.")
    if args.random is not None and args.install is not None:
        raise Error("--install ends with a picture, for which --random has no model.", "Name a model with -m.")
    facts = measure(args)
    print(json.dumps(facts) if args.json else table(facts))
    return 0


def measure(args: argparse.Namespace) -> dict:
    """All figures. Seconds come as {median, least, most, n}."""
    if args.random is None:
        pipe = load(args.model, dtype=args.dtype, low_memory=args.low_memory)
    else:
        pipe = RandomPipeline(args.random, args.dtype, args.low_memory)
    request = asked(pipe, args)
    batch = 2 if request.guidance > 1 and pipe.two_passes else 1
    facts = {
        "mlxdiff": __version__,
        "mlx": metadata.version("mlx"),
        "device": "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu",
        "chip": str(mx.device_info().get("device_name", "unknown")),
        "blas": BLAS,
        "model": pipe.name,
        "family": pipe.model["family"],
        "random": args.random is not None,
        **pipe.model["recipe"],
        "width": request.width,
        "height": request.height,
        "batch": batch,
        "steps": request.steps,
        "repeat": args.repeat,
        "low_memory": args.low_memory,
        "import": import_time(args.repeat),
        "cold_start": None if args.random else cold_start(args, request),  # before this process holds the model
        "install": install_size(),
        "install_to_picture": None if args.install is None else install_to_picture(args, request),
    }
    facts |= draw(pipe, request, args.repeat)
    facts["against"] = None if args.against is None else bench_torch.compare(pipe, request, batch, args.repeat)
    return facts


def asked(pipe: Pipeline, args: argparse.Namespace) -> Request:
    """The picture that is drawn: euler, which calls the network once a step."""
    guidance = None
    if args.batch == 2 and not pipe.two_passes:
        raise Error(f"{pipe.name} is guided without a second pass.", "Use --batch 1.")
    if args.batch is not None and pipe.two_passes:
        guidance = 1.0 if args.batch == 1 else max(pipe.defaults.guidance, 2.0)
    return pipe.resolve(
        _PROMPT, seed=0, steps=args.steps, width=args.width, height=args.height, guidance=guidance, sampler="euler"
    )


# ---- the run and its step


def draw(pipe: Pipeline, request: Request, repeat: int) -> dict:
    """A run to warm up, whose first step is traced, then `repeat` runs. From the first come the peaks, since later ones
    find networks in memory, and what it alone does, such as loading. Random weights come from no file, so making them
    is neither timed nor called loading."""
    trace, clock = Trace(), pipe.clock if isinstance(pipe, RandomPipeline) else time.perf_counter
    try:
        first = watch(pipe, request, clock, trace)
    finally:
        trace.on(False)
    runs = trange(repeat, desc="runs", leave=False, disable=None)  # a bar on a terminal only
    rest = [watch(pipe, replace(request, prompt=f"{_PROMPT} {i}"), clock) for i in runs]
    stages = {}
    for stage in (s for s in _STAGES if s in first.seconds):
        samples = [r.seconds[stage] for r in rest if stage in r.seconds] or [first.seconds[stage]]
        stages[stage] = {"seconds": spread(samples), "peak_bytes": first.peaks[stage]}
    if isinstance(pipe, RandomPipeline):
        del stages["load"]
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    parts, step = trace.alone(repeat), spread([s for r in rest for s in r.steps])
    parts["rest"] = {"seconds": step["median"] - sum(p["seconds"] for p in parts.values())}
    for part in parts.values():
        part["share"] = part["seconds"] / step["median"]
    kernels = {"kernels": sum(trace.kernels.values()), "primitives": dict(trace.kernels.most_common())}
    return {
        "stages": stages,
        "total": {"seconds": spread([sum(r.seconds.values()) for r in rest]), "resident_bytes": resident},
        "step": {"seconds": step, **kernels, "parts": parts},
    }


class Run(NamedTuple):
    seconds: dict[str, float]  # of each stage; a stage lasts until the next one begins, so they add up to the whole
    peaks: dict[str, int]  # bytes
    steps: list[float]  # seconds


def watch(pipe: Pipeline, request: Request, clock: Callable[[], float], trace: Trace | None = None) -> Run:
    """One run. It encodes if its prompt is not that of the run before."""
    done, stage, begin = Run({}, {}, []), None, 0.0
    for event in pipe.stream(request):
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


# ---- starting and installing


def import_time(repeat: int) -> dict:
    """Of what `generate` needs, without the interpreter's own start."""
    bare = median(_seconds([sys.executable, "-c", "pass"]) for _ in range(repeat))
    return spread([_seconds([sys.executable, "-c", "import mlxdiff.generate"]) - bare for _ in range(repeat)])


def cold_start(args: argparse.Namespace, request: Request) -> dict:
    """From the command to the first byte of a picture of one step, the model already converted, in files the system
    may still hold in memory."""
    return spread([first_byte(sys.executable, args, request, _environment()) for _ in range(args.repeat)])


def install_to_picture(args: argparse.Namespace, request: Request) -> dict:
    """Seconds of a fresh environment, of pip (whose downloads may be cached), and of the first picture in it."""
    source = Path(args.install).resolve()
    if not source.exists():
        raise Error(f"{args.install} does not exist.", "Give a wheel, or a folder with a pyproject.toml.")
    with tempfile.TemporaryDirectory(prefix="mlxdiff-") as place:
        python = Path(place) / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        venv = _seconds([sys.executable, "-m", "venv", place])
        pip = _seconds([str(python), "-m", "pip", "install", "-q", str(source)])
        picture = first_byte(str(python), args, request, os.environ | {"PYTHONPATH": ""})
    return {"venv": venv, "pip": pip, "picture": picture, "seconds": venv + pip + picture}


def first_byte(python: str, args: argparse.Namespace, request: Request, environment: dict) -> float:
    model = str(Path(args.model).resolve()) if Path(args.model).exists() else args.model
    call = [python, "-m", "mlxdiff.generate", _PROMPT, "-m", model, "-s", "0", "--steps", "1", "--sampler", "euler"]
    call += ["-W", str(request.width), "-H", str(request.height), "-g", str(request.guidance), "-o", "a.png", "--json"]
    call += [] if args.dtype is None else ["--dtype", args.dtype]
    call += ["--low-memory"] if args.low_memory else []
    with tempfile.TemporaryDirectory(prefix="mlxdiff-") as place:
        begin, picture = time.perf_counter(), Path(place) / "a.png"
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(call, cwd=place, env=environment, stdout=said, stderr=said)
            try:
                while not picture.exists() and process.poll() is None:
                    time.sleep(0.002)
                seconds = time.perf_counter() - begin
                process.wait()
            finally:
                process.kill()
            said.seek(0)
            if process.returncode != 0:
                raise Error("The first picture failed.", (said.read().strip().splitlines() or ["It said nothing."])[-1])
    return seconds


def _seconds(call: list[str]) -> float:
    begin = time.perf_counter()
    done = subprocess.run(call, env=_environment(), capture_output=True, text=True)
    if done.returncode != 0:
        raise Error(f"{' '.join(call[:4])} failed.", (done.stderr.strip().splitlines() or ["It said nothing."])[-1])
    return time.perf_counter() - begin


def _environment() -> dict[str, str]:
    """Ours, with this mlxdiff to be found from any folder."""
    path = os.pathsep.join(p for p in (str(_PACKAGE.parent), os.environ.get("PYTHONPATH")) if p)
    return os.environ | {"PYTHONPATH": path}


def install_size() -> dict | None:
    """Bytes on disk of mlxdiff and of all it requires, as each installed package lists its files; None where mlxdiff
    runs from a checkout that was never installed."""
    sizes, todo, seen = {}, [("mlxdiff", "")], set()
    while todo:
        name, extras = todo.pop()
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # wanted by another system
            continue
        if (name, extras) not in seen:
            seen.add((name, extras))
            sizes[name] = _bytes(package.locate_file(f) for f in package.files or [])
            todo += [need for line in package.requires or [] for need in _required(line, extras)]
    if "mlxdiff" not in sizes:
        return None
    checkout = (_PACKAGE.parent / "pyproject.toml").is_file()  # then two of its folders lie beside it
    folders = [_PACKAGE, *(_PACKAGE.parent / n for n in ("convert", "widgets") if checkout)]
    sizes["mlxdiff"] = _bytes(f for d in folders for f in d.rglob("*") if f.is_file() and f.suffix != ".pyc")
    return {"bytes": sum(sizes.values()), "packages": dict(sorted(sizes.items(), key=lambda s: -s[1]))}


def _required(line: str, extras: str) -> list[tuple[str, str]]:
    """(name, extras) of a line like `mlx[cpu]>=0.30; sys_platform == 'linux'`; nothing if it is for an extra not asked.
    Other markers are not read: what they exclude is not installed."""
    m = re.match(r"\s*([\w.-]+)\s*(?:\[([^\]]*)\])?", line)
    wanted = re.findall(r"extra\s*==\s*['\"]([^'\"]+)", line)
    if wanted and not set(wanted) & set(re.split(r"\s*,\s*", extras)):
        return []
    return [(re.sub(r"[-_.]+", "-", m[1]).lower(), m[2] or "")]


def _bytes(files: Iterable[Path]) -> int:
    total = 0
    for file in files:
        with suppress(OSError):  # listed, and gone
            total += os.stat(file).st_size
    return total


# ---- the table


def table(facts: dict) -> str:
    """The figures for people, aligned."""
    f, step = facts, facts["step"]
    blas = "" if f["blas"] is None else f", {f['blas']}"
    lines = [
        f"mlxdiff {f['mlxdiff']}, mlx {f['mlx']} on {f['device']} ({f['chip']}{blas})",
        f"{f['model']}, {label(f)}, {f['width']}x{f['height']}, batch {f['batch']}"
        + (", low memory" if f["low_memory"] else ""),
        f"runs of {f['steps']} steps: {f['repeat']}, after one to warm up",
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
        lines.append(f"{'cold start':12}{_spread(f['cold_start'])}   command to first byte of a picture of one step")
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


_RESIDENT = "held at most by all runs, as the system counts"
_REST = "the step less these: elementwise, norms, copies, overhead"
_KERNELS = "primitives of its graph but views"


def _spread(s: dict) -> str:
    """Median, then least and most, 29 wide."""
    span = f"{s['least']:.3f} - {s['most']:.3f}" if s["n"] > 1 else "once"
    return f"{s['median']:10.3f}   {span:16}"


def _against(a: dict) -> list[str]:
    if "absent" in a:
        return [f"torch       absent: no {a['absent']} here; pip install torch diffusers"]
    apart = "other weights" if a["error"] is None else f"outputs within {a['error']:.0e}"
    torch = "unknown" if a["torch_peak_bytes"] is None else f"{a['torch_peak_bytes'] / 1e9:.2f} GB"
    return [
        f"network alone, in turn with torch {a['torch']} (diffusers {a['diffusers']}) on {a['device']}, {apart}",
        f"{'mlxdiff':12}{_spread(a['seconds'])}{a['peak_bytes'] / 1e9:6.2f} GB",
        f"{'torch':12}{_spread(a['torch_seconds'])}{torch:>9}",
        f"{'ratio':12}{_spread(a['ratio'])}   of torch's time",
    ]


if __name__ == "__main__":
    sys.exit(main())
