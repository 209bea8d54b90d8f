"""What a command shows while it works: a progress bar on a terminal, a line for each picture, or JSON for machines."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import mlx.core as mx

from .console import say, say_json, warn
from .errors import Error
from .request import Request
from .result import Event


class Bar:
    """Shows one tqdm line for each stage, and prints one line for each picture to `out`; quiet: JSON lines instead."""

    def __init__(self, quiet: bool, out: TextIO):
        self.quiet, self.out, self.bar, self.stage = quiet, out, None, None
        self.unreported: Error | BrokenPipeError | None = None  # why a report of a picture could not be printed
        self.began = time.perf_counter()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_) -> None:
        self._close()

    def progress(self, stage: str, done: int, total: int) -> None:
        """Show the bytes of a download or a conversion."""
        self._open(stage, total, unit="B", unit_scale=True)
        if self.bar is not None:
            self.bar.update(done - self.bar.n)

    def show(self, event: Event) -> None:
        self.count(event.stage, event.step, event.steps)

    def count(self, stage: str, done: int, total: int) -> None:
        self._open(stage, total, unit="step")
        if self.bar is not None:
            self.bar.update(done - self.bar.n)

    def done(
        self, path: Path | str, request: Request, made: dict, seconds: float | None = None, peak: int | None = None
    ) -> None:
        """Report a picture. seconds, peak: of another machine that drew it."""
        self._close()
        seconds = time.perf_counter() - self.began if seconds is None else seconds
        peak = mx.get_peak_memory() if peak is None else peak
        if self.quiet:
            facts = {"path": str(path), "seconds": round(seconds, 3), "peak_bytes": peak, **made}
            self._report(say_json, facts | {"request": json.loads(request.to_json())})
        else:
            where = f", {made['reused']} steps reused" if "reused" in made else ""
            where += f", on rank {made['rank']}" if "rank" in made else ""
            self._report(say, f"{path}  seed {request.seed}, {seconds:.1f} s, {peak / 1e9:.2f} GB peak{where}")

    def write(self, text: str) -> None:
        warn(text)

    def _report(self, print_it: Callable, what: str | dict) -> None:
        """The picture is written by now, and others follow: a report that fails is told once they are drawn."""
        try:
            print_it(what, self.out)
        except (Error, BrokenPipeError) as e:
            self.unreported = e

    def _open(self, stage: str, total: int, **style) -> None:
        if not self.quiet and stage != self.stage and sys.stderr.isatty():
            from tqdm import tqdm  # a tenth of what all imports take, and of no use in a pipe

            self._close()
            self.bar = tqdm(total=total, desc=f"{stage:8}", leave=False, dynamic_ncols=True, **style)
            self.stage = stage

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = self.stage = None
