"""Ends commands at random moments, by hand, for it takes minutes: `python -m tests.stops kill lora 10` kills trainings
and continues them, `python -m tests.stops interrupt convert 10` sends what Ctrl-C sends. A line for each; the exit code
says whether all went well."""

import math
import os
import random
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

ROOT = Path(__file__).parents[1]
STEPS = 12
SMALL = ["-m", "storybook", "--dtype", "float32", "--size", "64", "--steps", str(STEPS), "--save-every", "3"]
LORA = ["train", "lora", *SMALL, "--rank", "2", "-i", "pictures", "-p", "a zork"]
TRAININGS = {
    "lora": LORA,
    "dreambooth": [*LORA, "--class-images", "others", "--class-prompt", "a house"],
    "embedding": ["train", "embedding", *SMALL, "-i", "pictures", "--word", "<ring>", "--initial", "red house"],
}
COMMANDS = {
    "convert": ["convert", "storybook", "-q", "8"],
    "bench": ["bench", "-m", "storybook", "--steps", "1", "--repeat", "1", "-W", "64", "-H", "64"],
    "score": ["score", "drawn", "--offline"],
    "tune": ["tune"],
    "cache": ["cache", "--verify"],
    "inspect": ["inspect", "storybook"],
}


class Place:
    """A folder in which commands run, with all that they read, and whatever they leave behind."""

    def __init__(self, folder: Path):
        self.here, rng = folder, np.random.default_rng(0)
        for name in ("pictures", "others", "drawn", "tmp", "cache"):
            (folder / name).mkdir()
        for name in ("pictures", "others"):
            for i in range(2):
                Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / name / f"{i}.png")
        self.env = os.environ | {"PYTHONPATH": str(ROOT), "MLXDIFF_CACHE": str(folder / "cache")}
        self.env |= {"TMPDIR": str(folder / "tmp"), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(folder)}

    def begin(self, words: list[str]) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        call = [sys.executable, "-m", "mlxdiff", *words]
        return subprocess.Popen(call, cwd=self.here, env=self.env, preexec_fn=hear_interrupts, **pipes)

    def run(
        self, words: list[str], stop: float | None = None, by: int = signal.SIGINT, after: Callable | None = None
    ) -> tuple[int, str, float]:
        """The exit code, what was said, and the seconds. stop: send a signal after so many. after: counted from when
        this is so."""
        began, process = time.monotonic(), self.begin(words)
        while after is not None and process.poll() is None and not after():
            time.sleep(0.005)
        try:
            said, _ = process.communicate(timeout=stop)
        except subprocess.TimeoutExpired:
            process.send_signal(by)
            said, _ = process.communicate(timeout=120)
        return process.returncode, said, time.monotonic() - began

    def files(self) -> set[str]:
        return files(self.here)


def hear_interrupts() -> None:
    """A shell that starts this in its background ignores SIGINT and hands that down; a user's shell does not."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def trained(place: Path, name: str, count: int, by: int, seed: int = 0) -> bool:
    """Stop a training so often in one folder, each time at a random moment, one of four before its first step, and then
    let it end. Its weights, its state and the losses of its log are those of a run that was left alone."""
    place, rng = Place(place), random.Random(f"{name} {seed}")
    words, whole, parts = [*TRAININGS[name], "-o"], place.here / "whole", place.here / "parts"
    began = time.time()
    code, said, seconds = place.run([*words, "whole"])
    assert code == 0, said
    before, start = place.files(), (whole / "recipe.json").stat().st_mtime - began
    well, names = True, files(whole)
    for moment in sorted(rng.uniform(0, STEPS) for _ in range(count)):
        began, early = time.time(), rng.uniform(0.2, 1) * start if rng.random() < 0.25 else math.inf
        reached = partial(is_reached, parts, int(moment), began, began + early)
        code, said, seen = place.run([*words, "parts"], moment % 1 * (seconds - start) / STEPS, by, reached)
        bad = wrong(code, said, by)
        if by == signal.SIGINT:  # a process that is killed cleans nothing up
            bad += [f"left {f}" for f in place.files() - before if not f.startswith("parts/")]
            bad += [f"left {f}" for f in files(parts) - names]
        print(f"{name}: after {seen:.2f} s: {code}, {len(log(parts))} steps{told(bad)}", flush=True)
        well &= not bad
    code, said, _ = place.run([*words, "parts"])
    same = code == 0 and equal(whole, parts)
    print(f"{name}: {'the same as a run that was left alone' if same else f'ANOTHER RUN {code} {said}'}", flush=True)
    return well and same


def is_reached(out: Path, step: int, began: float, until: float) -> bool:
    """Whether a training that began at that time has logged so many steps, or that time has come."""
    return time.time() > until or (written(out) > began and len(log(out)) >= step)


def wrong(code: int, said: str, by: int) -> list[str]:
    """What is wrong with the end of a command."""
    ends = {0, -signal.SIGKILL} if by == signal.SIGKILL else {0, 130}
    found = [f"code {code}"] if code not in ends else []
    return found + [said for word in ("Traceback", "Exception ignored", "Error") if word in said][:1]


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


def interrupted(place: Path, name: str, count: int, seed: int = 0) -> bool:
    """Interrupt a command so often, each time after a random part of its duration: it ends with 130, or as it always
    does, without a traceback, and leaves nothing but its output, which is whole."""
    place, rng, well = Place(place), random.Random(f"{name} {seed}"), True
    if name == "score":
        drawn = ["a red house", "-m", "storybook", "--steps", "1", "-b", "2", "-W", "64", "-H", "64", "-o", "drawn/"]
        assert place.run(["generate", *drawn])[0] == 0
    output = ["-o"] * (name == "convert")
    code, said, seconds = place.run([*COMMANDS[name], *output, *["whole"] * len(output)])
    assert code == 0, said
    before, whole = place.files(), place.here / "whole"
    for i in range(count):
        wait, parts = rng.uniform(0.1, 1) * seconds, place.here / f"parts{i}"
        code, said, _ = place.run([*COMMANDS[name], *output, *[parts.name] * len(output)], wait)
        bad = wrong(code, said, signal.SIGINT)
        bad += [f"left {f}" for f in place.files() - before if not f.startswith(f"{parts.name}/")]
        if parts.exists() and any(not same_bytes(whole / f, parts / f) for f in files(whole) | files(parts)):
            bad.append(f"half a model: {sorted(files(parts))}")
        print(f"{name}: after {wait:.2f} of {seconds:.2f} s: {code}{told(bad)}", flush=True)
        before |= place.files()
        well &= not bad
    return well


def files(folder: Path) -> set[str]:
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}


def same_bytes(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and one.read_bytes() == other.read_bytes()


def main(how: str, name: str, count: str, seed: str = "0") -> int:
    with tempfile.TemporaryDirectory() as place:
        if name in TRAININGS:
            by = {"kill": signal.SIGKILL, "interrupt": signal.SIGINT}[how]
            return 0 if trained(Path(place), name, int(count), by, int(seed)) else 1
        return 0 if interrupted(Path(place), name, int(count), int(seed)) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
