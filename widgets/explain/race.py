"""Lesson 5, steps and samplers: how fast each sampler, from the same noise, approaches the result of many steps."""

import math
from typing import NamedTuple

import ipywidgets as w
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ...probe import from_noise, noise_of, trace
from .guidance import changes, size
from .lesson import BLUE, GREEN, GREY, ORANGE, RED, Lesson, Report, seed_box

COUNTS = (4, 8, 16)
REFERENCE = ("unipc", 32)
SCHEDULE = "karras"  # its first and last noise levels do not depend on the number of steps
RACERS = {"euler": (1, BLUE), "heun": (2, GREEN), "dpmpp_2m": (2, ORANGE)}  # name -> the order it claims, its colour
NOISY = "euler_ancestral"


class Race(NamedTuple):
    far: dict[str, list[float]]  # sampler -> distance to the reference at each of COUNTS, over the reference's length
    noisy: list[float]  # the noisy sampler's distance to the reference
    spread: list[float]  # the distance between two of its runs that start from the same noise
    drawn: dict[str, list[Image.Image]]  # sampler -> its pictures at COUNTS; the noisy one's two at the last
    reference: Image.Image

    @property
    def order(self) -> dict[str, float]:
        """The power of the step size with which the distance fell when the steps were last doubled."""
        return {name: math.log2(far[-2] / far[-1]) for name, far in self.far.items()}


def calls(name: str, steps: int) -> int:
    """How often a run asks the network. Heun asks twice in every step but the last."""
    return 2 * steps - 1 if name == "heun" else steps


def small(image: Image.Image) -> Image.Image:
    return image.resize((96, 96), Image.Resampling.LANCZOS)  # about the size at which it is shown


class SamplerRace(Lesson):
    title = "The race"
    idea = "From the same noise, samplers that add none reach the same picture; the better ones need fewer steps."
    trying = "Count network calls instead of steps: how good is Heun now? Then raise guidance: the path bends more."

    def __init__(
        self,
        prompt: str = "a red house on the left in the mountains at night under a full moon",
        seed: int = 7,
        guidance: float = 1.0,
        **options,
    ):
        self.prompt = w.Text(prompt, description="Prompt", continuous_update=False)
        self.seed = seed_box(seed)
        # A list, because a slider would start a race of ten seconds or more at every value it passes.
        self.guidance = w.Dropdown(options=(1.0, 2.0, 4.0, 8.0), value=guidance, description="Guidance")
        self.axis = w.Dropdown(options=("steps", "network calls"), description="Against")
        asks = {"prompt": self.prompt, "seed": self.seed, "guidance": self.guidance}
        super().__init__(self.axis, *asks.values(), asks=asks, **options)

    def work(self, pipe, report: Report, prompt: str, seed: int, guidance: float) -> Race:
        same = {"seed": seed, "guidance": guidance, "schedule": SCHEDULE}
        total = len(RACERS) * sum(COUNTS) + REFERENCE[1] + sum(COUNTS)
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            report(done, total)

        def run(name: str, steps: int) -> np.ndarray:
            for step in trace(pipe, prompt, sampler=name, steps=steps, **same):
                end = step.x0
                advance()
            return end

        def twice(steps: int) -> np.ndarray:
            """Two runs of the noisy sampler from the noise that the others start from."""
            for event in from_noise(pipe, noise, prompt, sampler=NOISY, steps=steps, **same):
                if event.stage == "decode":
                    break
                if event.x0 is not None:
                    pair = event.x0
                    advance()
            return pair

        noise = np.repeat(noise_of(pipe, seed), 2, axis=0)
        reference = run(*REFERENCE)
        length = size(reference)
        ends = {name: [run(name, steps) for steps in COUNTS] for name in RACERS}
        noisy = [twice(steps) for steps in COUNTS]
        drawn = {name: [pipe.decode(z)[0] for z in zs] for name, zs in ends.items()}
        return Race(
            {name: [size(z - reference) / length for z in zs] for name, zs in ends.items()},
            [sum(size(z - reference[0]) for z in pair) / 2 / length for pair in noisy],
            [size(pair[0] - pair[1]) / length for pair in noisy],
            drawn | {NOISY: pipe.decode(noisy[-1])},
            pipe.decode(reference)[0],
        )

    def figure(self) -> Figure:
        fig = Figure(figsize=(8.6, 3.9), layout="constrained")
        left, right = fig.subfigures(1, 2, width_ratios=(1.2, 1))
        self._pictures(left)
        self._curves(right.subplots())
        return fig

    def _pictures(self, fig) -> None:
        axes = fig.subplots(len(RACERS), len(COUNTS) + 1)
        for row, name in zip(axes, RACERS, strict=True):
            for ax, steps, image in zip(row, COUNTS, self.data.drawn[name], strict=False):
                ax.imshow(small(image))
                ax.set_xlabel(f"off by {changes(image, self.data.reference).mean():.1f}", fontsize=7, labelpad=1)
                if name == next(iter(RACERS)):
                    ax.set_title(f"{steps} steps")
            row[0].set_ylabel(name)
        last = (
            (self.data.reference, "reference", f"{REFERENCE[0]}, {REFERENCE[1]} steps"),
            (self.data.drawn[NOISY][0], f"noisy, {COUNTS[-1]} steps", NOISY),
            (self.data.drawn[NOISY][1], "its noise anew", NOISY),
        )
        for ax, (image, title, below) in zip(axes[:, -1], last, strict=True):
            ax.imshow(small(image))
            ax.set_title(title)
            ax.set_xlabel(below, fontsize=7, labelpad=1)
        for ax in axes.flat:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)

    def _curves(self, ax) -> None:
        def x(name: str) -> list[int]:
            return [calls(name, n) if self.axis.value == "network calls" else n for n in COUNTS]

        for name, (order, colour) in RACERS.items():
            far = self.data.far[name]
            ax.plot(x(name), far, "o-", color=colour, ms=4, label=f"{name}")
            claimed = [far[-1] * (COUNTS[-1] / n) ** order for n in COUNTS]
            ax.plot(x(name), claimed, ":", color=colour, lw=1)
        ax.plot(COUNTS, self.data.noisy, "o-", color=RED, ms=4, label=NOISY)
        ax.plot(COUNTS, self.data.spread, "o--", color=RED, ms=3, lw=1, label="two runs of it, from each other")
        ax.plot([], [], ":", color=GREY, lw=1, label="slope of the order it claims")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ticks = COUNTS if self.axis.value == "steps" else (*COUNTS, 2 * COUNTS[-1])
        ax.set_xticks(ticks, map(str, ticks))
        ax.set(xlabel=self.axis.value, title="distance to the reference, as a part of its length")
        ax.legend(fontsize=7, loc="lower left")

    def words(self) -> str:
        d, most = self.data, COUNTS[-1]
        parts = [
            f"{name} {d.far[name][-1]:.1%} off (order {d.order[name]:.1f}, claimed {order})"
            for name, (order, _) in RACERS.items()
        ]
        off = [f"{changes(d.drawn[name][-1], d.reference).mean():.1f}" for name in RACERS]
        return (
            f"At {most} steps: {', '.join(parts)}; their pictures are off by {', '.join(off)} of 255. "
            f"{NOISY} stays {d.noisy[-1]:.0%} away, and two of its runs are {d.spread[-1]:.0%} apart."
        )
