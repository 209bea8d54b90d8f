"""Claims on trial: a sentence that is often said of diffusion, your guess, the run, and the verdict by its figures.
The evidence is in claims_noise.py and claims_model.py."""

import html
from collections.abc import Callable, Sequence
from typing import NamedTuple

import ipywidgets as w
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from .lesson import Lesson, Report, seed_box

GUESSES = ("true", "imprecise", "wrong")


class Evidence(NamedTuple):
    """What a run measured."""

    shown: bool  # whether the figures bear the verdict out
    because: str  # the figures, in a sentence or two
    panels: Sequence[tuple[Image.Image | np.ndarray, str]] = ()  # pictures, or maps in grey, with their titles
    plot: Callable[[Axes], object] | None = None  # draws a diagram beside them


class Claim(NamedTuple):
    quote: str
    verdict: str  # "imprecise" or "wrong"
    instead: str  # what is right
    trying: str
    examine: Callable[[object, int], Evidence]  # (pipe, seed)


class Trial(Lesson):
    """One claim. The evidence stays covered until there is a guess; a saved notebook shows it."""

    idea = "True, imprecise or wrong? Guess before you look."

    def __init__(self, claim: Claim, seed: int = 7, **options):
        self.claim = claim
        self.title, self.trying = f"“{claim.quote}”", claim.trying
        style = {"button_width": "auto"}
        self.guess = w.ToggleButtons(options=GUESSES, value=None, description="Your guess", style=style)
        self.seed = seed_box(seed, "Seed of the evidence")
        super().__init__(self.guess, self.seed, asks={"seed": self.seed}, **options)

    def work(self, pipe, report: Report, seed: int) -> Evidence:
        return self.claim.examine(pipe, seed)

    @property
    def verdict(self) -> str:
        return self.claim.verdict if self.data.shown else "not decided by this run"

    def figure(self) -> Figure:
        panels = self.data.panels
        alone, lines = not panels, max((title.count("\n") for _, title in panels), default=0)
        wide = [1.55] * len(panels) + [5.4 if alone else 3.4] * (self.data.plot is not None)
        high = 1.69 + 0.13 * lines if self.data.plot is None else 2.4 if alone else 2.1
        fig = Figure(figsize=(sum(wide), high), layout="constrained")
        axes = fig.subplots(1, len(wide), width_ratios=wide, squeeze=False)[0]
        for ax, (image, title) in zip(axes, panels, strict=False):
            ax.imshow(image, cmap="Greys_r")
            ax.set_title(title, fontsize=8)
            ax.axis("off")
        if self.data.plot is not None:
            self.data.plot(axes[-1])
        return fig

    def words(self) -> str:
        return f"Verdict: {self.verdict}. {self.data.because} {self.claim.instead}"

    def redraw(self) -> None:
        super().redraw()
        covered = self.guess.value is None
        self.image.layout.display = "none" if covered else ""
        if self.data is not None and self.error is None:
            said = html.escape(self.words(), quote=False).replace(self.verdict, f"<b>{self.verdict}</b>", 1)
            self.caption.value = "" if covered else f"You said <b>{self.guess.value}</b>. {said}"


def verdicts(trials: list[Trial]) -> str:
    """A table in Markdown."""
    rows = [f"| {t.title} | **{t.verdict}** | {t.claim.instead} |" for t in trials]
    return "\n".join(["| claim | verdict | instead |", "|---|---|---|", *rows])
