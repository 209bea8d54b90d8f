"""Measures how long mlxdiff takes to start and to install, in separate processes, and how much disk space it takes."""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from statistics import median

from ..errors import Error
from ..request import Request
from .step import spread

_PACKAGE = Path(__file__).parent.parent


def import_time(repeat: int) -> dict:
    """Seconds to import all that `generate` needs, without the start of the interpreter."""
    bare = median(_seconds([sys.executable, "-c", "pass"]) for _ in range(repeat))
    return spread([_seconds([sys.executable, "-c", "import mlxdiff.generate"]) - bare for _ in range(repeat)])


def cold_start(args: argparse.Namespace, request: Request, repeat: int) -> dict:
    """Seconds from the command to the first byte of a one-step picture. The model is already converted, and its files
    may be in the system's cache."""
    return spread([first_byte(sys.executable, args, request, _environment()) for _ in range(repeat)])


def install_to_picture(args: argparse.Namespace, request: Request) -> dict:
    """Seconds to make a fresh environment, to run pip (downloads may be cached), and to draw the first picture."""
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
    call = [
        python,
        "-m",
        "mlxdiff.generate",
        request.prompt,
        "-m",
        model,
        "-s",
        "0",
        "--steps",
        "1",
        "--sampler",
        "euler",
    ]
    call += ["-W", str(request.width), "-H", str(request.height), "-g", str(request.guidance), "-o", "a.png", "--json"]
    call += [] if args.quantize is None else ["-q", str(args.quantize)]
    call += [] if args.dtype is None else ["--dtype", args.dtype]
    call += [flag for flag, on in (("--low-memory", args.low_memory), ("--force", args.force)) if on]
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
    """This environment, with this mlxdiff importable from any folder."""
    path = os.pathsep.join(p for p in (str(_PACKAGE.parent), os.environ.get("PYTHONPATH")) if p)
    return os.environ | {"PYTHONPATH": path}


def install_size() -> dict | None:
    """Bytes on disk of mlxdiff and its requirements, by the file lists of the installed packages; None if mlxdiff runs
    from a checkout that was never installed."""
    sizes, todo, seen = {}, [("mlxdiff", "")], set()
    while todo:
        name, extras = todo.pop()
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # only another system requires it
            continue
        if (name, extras) not in seen:
            seen.add((name, extras))
            sizes[name] = _bytes(package.locate_file(f) for f in package.files or [])
            todo += [need for line in package.requires or [] for need in _required(line, extras)]
    if "mlxdiff" not in sizes:
        return None
    checkout = (_PACKAGE.parent / "pyproject.toml").is_file()  # there, two of its folders are beside the package
    folders = [_PACKAGE, *(_PACKAGE.parent / n for n in ("convert", "widgets") if checkout)]
    sizes["mlxdiff"] = _bytes(f for d in folders for f in d.rglob("*") if f.is_file() and f.suffix != ".pyc")
    return {"bytes": sum(sizes.values()), "packages": dict(sorted(sizes.items(), key=lambda s: -s[1]))}


def _required(line: str, extras: str) -> list[tuple[str, str]]:
    """(name, extras) of a line like `mlx[cpu]>=0.30; sys_platform == 'linux'`; nothing if the line is for another
    extra. Other markers are not read: a package that they exclude is not installed."""
    m = re.match(r"\s*([\w.-]+)\s*(?:\[([^\]]*)\])?", line)
    wanted = re.findall(r"extra\s*==\s*['\"]([^'\"]+)", line)
    if wanted and not set(wanted) & set(re.split(r"\s*,\s*", extras)):
        return []
    return [(re.sub(r"[-_.]+", "-", m[1]).lower(), m[2] or "")]


def _bytes(files: Iterable[Path]) -> int:
    total = 0
    for file in files:
        with suppress(OSError):  # listed, but deleted
            total += os.stat(file).st_size
    return total
