"""Ends commands at random moments, by hand, for it takes minutes: `python -m tests.stops kill lora 10` kills trainings
and continues them, `python -m tests.stops interrupt convert 10` sends what Ctrl-C sends, `terminate` and `hangup` what
ends a process or a terminal. A line for each; the exit code says whether all went well."""

import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from tests import checkpoints

ROOT = Path(__file__).parents[1]
STEPS = 12
SMALL = ["-m", "storybook", "--dtype", "float32", "--size", "64", "--steps", str(STEPS), "--save-every", "3"]
LORA = ["train", "lora", *SMALL, "--rank", "2", "-i", "pictures", "-p", "a zork"]
TRAININGS = {
    "lora": LORA,
    "dreambooth": [*LORA, "--class-images", "others", "--class-prompt", "a house"],
    "embedding": ["train", "embedding", *SMALL, "-i", "pictures", "--word", "<ring>", "--initial", "red house"],
}
DRAWING = ["generate", "a red house", "-m", "storybook", "--seed", "1", "--steps", "2", "-W", "64", "-H", "64"]
COMMANDS = {  # OUT: the name of what it writes
    "generate": [*DRAWING, "-b", "2", "-o", "OUT/"],
    "hires": [*DRAWING, "--hires", "2", "-o", "OUT.png"],
    "upscale": ["upscale", "pictures/0.png", "-m", "upscaler.safetensors", "-o", "OUT.png"],
    "detect": ["detect", "large.png", "canny", "-o", "OUT.png"],
    "convert": ["convert", "storybook", "-q", "8", "-o", "OUT"],
    "merge": ["convert", "storybook", "--lora", "paper", "-o", "OUT"],
    "bench": ["bench", "-m", "storybook", "--steps", "1", "--repeat", "1", "-W", "64", "-H", "64"],
    "report": ["bench", "--report", "OUT.json", "--steps", "1", "--repeat", "1", "-W", "64", "-H", "64"],
    "quality": ["bench", "--quality", "--over", "steps=1,2", "--prompts", "1", "-W", "64", "-H", "64"],
    "score": ["score", "drawn", "--offline"],
    "tune": ["tune"],
    "cache": ["cache", "--verify"],
    "inspect": ["inspect", "storybook"],
    "picture": ["inspect", "large.png"],
    "models": ["models", "storybook"],
}
ENDINGS = {"kill": signal.SIGKILL, "interrupt": signal.SIGINT, "terminate": signal.SIGTERM, "hangup": signal.SIGHUP}
LATE = 2.0  # seconds that a process may take to end; more where other processes have most of the machine


class Place:
    """A folder in which commands run, with all that they read, and whatever they leave behind."""

    def __init__(self, folder: Path):
        self.here, rng = folder, np.random.default_rng(0)
        for name in ("pictures", "others", "drawn", "tmp", "cache"):
            (folder / name).mkdir()
        for name in ("pictures", "others"):
            for i in range(2):
                Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / name / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (1500, 1500, 3), np.uint8)).save(folder / "large.png")
        checkpoints.full(folder / "upscaler.safetensors", checkpoints.esrgan(1, 16, 8, 2, 2))
        self.env = os.environ | {"PYTHONPATH": str(ROOT), "MLXDIFF_CACHE": str(folder / "cache")}
        self.env |= {"TMPDIR": str(folder / "tmp"), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(folder)}

    def begin(self, words: list[str]) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        call = [sys.executable, "-m", "mlxdiff", *words]
        return subprocess.Popen(call, cwd=self.here, env=self.env, preexec_fn=hear_interrupts, **pipes)

    def run(
        self, words: list[str], stop: float | None = None, by: int = signal.SIGINT, after: Callable | None = None
    ) -> tuple[int, str, float, float]:
        """The exit code, what was said, the seconds, and those after the signal. stop: send it after so many seconds.
        after: counted from when this is so."""
        began, process, sent = time.monotonic(), self.begin(words), math.inf
        while after is not None and process.poll() is None and not after():
            time.sleep(0.005)
        try:
            said, _ = process.communicate(timeout=stop)
        except subprocess.TimeoutExpired:
            process.send_signal(by)
            sent = time.monotonic()
            said, _ = process.communicate(timeout=120)
        ended = time.monotonic()
        return process.returncode, said, ended - began, max(0.0, ended - sent)

    def whole(self, words: list[str]) -> tuple[float, float]:
        """The seconds of a command that is left alone, and how late it may be after a signal on so busy a machine."""
        before = _processor()
        code, said, seconds, _ = self.run(words)
        assert code == 0, said
        return seconds, LATE * max(1.0, seconds / (_processor() - before))

    def files(self) -> set[str]:
        return files(self.here)

    def outputs(self, name: str) -> dict[str, bytes]:
        """The files whose names begin with this one, by the rest of it."""
        return {f.removeprefix(name): (self.here / f).read_bytes() for f in self.files() if f.startswith(name)}


def _processor() -> float:
    """Seconds of processor that processes have taken which have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def hear_interrupts() -> None:
    """A shell that starts this in its background ignores SIGINT and hands that down; a user's shell does not."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def trained(place: Path, name: str, count: int, by: int, seed: int = 0) -> bool:
    """Stop a training so often in one folder, each time at a random moment, one of four before its first step, and then
    let it end. Its weights, its state and the losses of its log are those of a run that was left alone."""
    place, rng = Place(place), random.Random(f"{name} {seed}")
    words, whole, parts = [*TRAININGS[name], "-o"], place.here / "whole", place.here / "parts"
    began = time.time()
    seconds, most = place.whole([*words, "whole"])
    before, start = place.files(), (whole / "recipe.json").stat().st_mtime - began
    well, names = True, files(whole)
    for moment in sorted(rng.uniform(0, STEPS) for _ in range(count)):
        began, early = time.time(), rng.uniform(0.2, 1) * start if rng.random() < 0.25 else math.inf
        reached = partial(is_reached, parts, int(moment), began, began + early)
        code, said, seen, late = place.run([*words, "parts"], moment % 1 * (seconds - start) / STEPS, by, reached)
        bad = wrong(code, said, by, late, most)
        if by != signal.SIGKILL:  # a process that is killed cleans nothing up
            bad += [f"left {f}" for f in place.files() - before if not f.startswith("parts/")]
            bad += [f"left {f}" for f in files(parts) - names]
        print(f"{name}: after {seen:.2f} s: {code}, {len(log(parts))} steps, {late:.2f} s late{told(bad)}", flush=True)
        well &= not bad
    code, said, *_ = place.run([*words, "parts"])
    same = code == 0 and equal(whole, parts)
    print(f"{name}: {'the same as a run that was left alone' if same else f'ANOTHER RUN {code} {said}'}", flush=True)
    return well and same


def is_reached(out: Path, step: int, began: float, until: float) -> bool:
    """Whether a training that began at that time has logged so many steps, or that time has come."""
    return time.time() > until or (written(out) > began and len(log(out)) >= step)


def wrong(code: int, said: str, by: int, late: float, most: float) -> list[str]:
    """What is wrong with the end of a command. It may have ended before the signal, which may have come while Python
    itself began, whose own traceback this is then, or ended."""
    began = "Traceback" in said and "mlxdiff" not in said
    found = [f"code {code}"] if code not in (0, -by, 128 + by) and not began else []
    found += [f"{late:.1f} s late"] if late > most else []
    found += [f"{said.count('stopped.')} lines"] if said.count("stopped.") > (by == signal.SIGINT) else []
    return found + [said for word in ("Traceback", "Exception ignored", "Error") if word in said and not began][:1]


def told(bad: list[str]) -> str:
    return f" BAD: {'; '.join(bad)}" if bad else ""


def log(out: Path) -> list[list[str]]:
    """Steps, losses and rates."""
    file = out / "run" / "log.csv"
    return [line.split(",")[:3] for line in file.read_text().splitlines()[1:]] if file.exists() else []


def written(out: Path) -> float:
    """When the log was written last."""
    file = out / "run" / "log.csv"
    return file.stat().st_mtime if file.exists() else 0.0


def equal(one: Path, other: Path) -> bool:
    """Whether two trainings left the same: files, numbers and losses, to the last bit."""
    weights = [n for n in files(one) if n.endswith(".safetensors")]
    same = files(one) == files(other) and log(one) == log(other) and bool(weights)
    for name in weights if same else ():
        a, b = load_file(one / name), load_file(other / name)
        same &= a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
    return same


def interrupted(place: Path, name: str, count: int, by: int, seed: int = 0) -> bool:
    """Interrupt a command so often, each time after a random part of its duration: it ends with 130, or as it always
    does, without a traceback, and leaves nothing but its output, which is whole."""
    place, rng, well, slowest = Place(place), random.Random(f"{name} {seed}"), True, 0.0
    if name == "score":
        place.whole(words_of("generate", "drawn"))
    seconds, most = place.whole(words_of(name, "whole"))
    before, whole = place.files(), place.outputs("whole")
    for i in range(count):
        wait = rng.uniform(0, 1) * seconds
        code, said, _, late = place.run(words_of(name, f"parts{i}-"), wait, by)
        parts = place.outputs(f"parts{i}-")
        bad = wrong(code, said, by, late, most)
        bad += [f"left {f}" for f in place.files() - before if not f.startswith(f"parts{i}-")]
        if name == "generate":  # of two pictures, the first may be there
            parts |= {f: data for f, data in whole.items() if f not in parts}
        if parts and not alike(whole, parts):
            bad.append(f"half of it: {sorted(parts)}")
        slowest = max(slowest, late)
        print(f"{name}: after {wait:.2f} of {seconds:.2f} s: {code}, {late:.2f} s late{told(bad)}", flush=True)
        before |= place.files()
        well &= not bad
    print(f"{name}: {count} moments, the slowest end {slowest:.2f} s")
    return well


def words_of(name: str, out: str) -> list[str]:
    return [word.replace("OUT", out) for word in COMMANDS[name]]


def alike(one: dict[str, bytes], other: dict[str, bytes]) -> bool:
    """Whether two runs wrote the same: files, and bytes, or of JSON, in which times differ, names."""
    return one.keys() == other.keys() and all(
        json.loads(data).keys() == json.loads(other[f]).keys() if f == ".json" else data == other[f]
        for f, data in one.items()
    )


def files(folder: Path) -> set[str]:
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}


def main(how: str, name: str, count: str, seed: str = "0") -> int:
    with tempfile.TemporaryDirectory() as place:
        tried = trained if name in TRAININGS else interrupted
        return 0 if tried(Path(place), name, int(count), ENDINGS[how], int(seed)) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
