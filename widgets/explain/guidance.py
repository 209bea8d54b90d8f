"""Lesson 3, guidance: the network's two answers, their difference, and what happens when it is exaggerated."""

from typing import NamedTuple

import ipywidgets as w
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ...probe import sides, trace
from .lesson import BLUE, ORANGE, RED, Lesson, Report, seed_box

SWEEP = (1.0, 4.0, 8.0, 16.0)


class Answers(NamedTuple):
    sigmas: list[float]
    apart: list[float]  # for each step: the size of the difference over that of the answer to the prompt
    difference: np.ndarray  # (h, w): the size of the difference at each place of the latents, at the chosen step
    empty: Image.Image
    prompt: Image.Image
    total: Image.Image  # the two answers combined by guidance


class TwoAnswers(Lesson):
    title = "Two answers"
    idea = "Every step asks the network twice, without your words and with them; guidance exaggerates the difference."
    trying = "Go through the steps: when do the answers differ most? At guidance 1 the sum is the answer to the prompt."

    def __init__(
        self, prompt: str = "a red house under a full moon", seed: int = 7, steps: int = 8, at: int = 2, **options
    ):
        self.at = w.IntSlider(at, min=1, max=steps, description="Step", continuous_update=False)
        self.guidance = w.FloatSlider(4.0, min=1, max=16, step=0.5, description="Guidance", continuous_update=False)
        self.prompt = w.Text(prompt, description="Prompt", continuous_update=False)
        self.seed = seed_box(seed)
        asks = {"prompt": self.prompt, "seed": self.seed, "guidance": self.guidance, "at": self.at}
        super().__init__(*asks.values(), asks=asks, **options)

    def settings(self) -> dict:
        return super().settings() | {"steps": self.at.max}

    def work(self, pipe, report: Report, prompt: str, seed: int, guidance: float, steps: int, at: int) -> Answers:
        empty, positive = sides(pipe, prompt, seed=seed, steps=steps)
        sigmas, apart = [], []
        for step in trace(pipe, prompt, seed=seed, steps=steps, guidance=guidance):
            a, b = empty(step.x, step.sigma), positive(step.x, step.sigma)
            sigmas.append(step.sigma)
            apart.append(size(b - a) / size(b))
            if step.step == at:
                chosen, pictures = (b - a)[0], np.concatenate([a, b, a + guidance * (b - a)])
            report(step.step, steps + 1)
        return Answers(sigmas, apart, np.sqrt((chosen**2).mean(2)), *pipe.decode(pictures))

    def figure(self) -> Figure:
        d, at = self.data, self.asked["at"]
        fig = Figure(figsize=(7.6, 3.7), layout="constrained")
        top, bottom = fig.subfigures(2, 1, height_ratios=(2.35, 1.35))
        panels = (
            (d.empty, "without words:\nthe empty prompt"),
            (d.prompt, "with your words"),
            (d.difference, "their difference\n(bright: large)"),
            (d.total, f"the sum: without +\n{self.asked['guidance']:g} × the difference"),
        )
        for ax, (image, title) in zip(top.subplots(1, 4), panels, strict=True):
            ax.imshow(image, cmap="magma", vmin=0)
            ax.set_title(title)
            ax.axis("off")
        ax = bottom.subplots()
        percent = 100 * np.array(d.apart)
        ax.plot(range(1, len(percent) + 1), percent, "o-", color=BLUE, ms=4)
        ax.plot(at, percent[at - 1], "o", color=ORANGE, ms=9)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_title("distance of the two answers, in % of the second")
        ax.set(xlabel="step", ylabel="%", ylim=(0, None), xlim=(0.8, len(d.apart) + 0.2))
        return fig

    def words(self) -> str:
        at, apart = self.asked["at"], self.data.apart
        return (
            f"Step {at} of {len(apart)}, noise {self.data.sigmas[at - 1]:.2f}: the two answers differ by "
            f"{apart[at - 1]:.0%} of the answer's size. In the first step it is {apart[0]:.0%}, "
            f"in the last {apart[-1]:.0%}."
        )


class Run(NamedTuple):
    guidance: float
    image: Image.Image
    seconds: list[float]  # of each step

    @property
    def saturation(self) -> float:
        return saturation(self.image)

    @property
    def clipped(self) -> float:
        return clipped(self.image)


class GuidanceSweep(Lesson):
    title = "More and more guidance"
    idea = "The seed stays the same and only guidance grows: the picture obeys more, and its colours run out of room."
    trying = "Ask for a vague prompt, “a boat”: at guidance 1 it wanders. Which value would you take?"

    def __init__(self, prompt: str = "a red house under a full moon", seed: int = 7, steps: int = 6, **options):
        self.prompt = w.Text(prompt, description="Prompt", continuous_update=False)
        self.seed = seed_box(seed)
        self.steps = w.IntSlider(steps, min=4, max=30, description="Steps", continuous_update=False)
        asks = {"prompt": self.prompt, "seed": self.seed, "steps": self.steps}
        super().__init__(*asks.values(), asks=asks, **options)

    def work(self, pipe, report: Report, prompt: str, seed: int, steps: int) -> list[Run]:
        runs = []
        for i, guidance in enumerate(SWEEP):
            seconds = []
            for event in pipe.stream(prompt, seed=seed, steps=steps, guidance=guidance):
                if event.x0 is not None:
                    seconds.append(event.seconds)
                    report(i * steps + event.step, len(SWEEP) * steps)
            runs.append(Run(guidance, event.image, seconds))
        return runs

    def figure(self) -> Figure:
        fig = Figure(figsize=(7.6, 3.6), layout="constrained")
        top, bottom = fig.subfigures(2, 1, height_ratios=(2.2, 1.4))
        for ax, run in zip(top.subplots(1, len(self.data)), self.data, strict=True):
            ax.imshow(run.image)
            ax.set_title(f"guidance {run.guidance:g}")
            ax.axis("off")
        x = [run.guidance for run in self.data]
        curves = (
            ("mean saturation", [100 * run.saturation for run in self.data], BLUE),
            ("values cut off at 0 or 255", [100 * run.clipped for run in self.data], RED),
        )
        for ax, (title, y, colour) in zip(bottom.subplots(1, 2), curves, strict=True):
            ax.plot(x, y, "o-", color=colour, ms=4)
            ax.set_xscale("log", base=2)
            ax.set_xticks(x, [f"{g:g}" for g in x])
            ax.set(title=title, xlabel="guidance", ylabel="%", ylim=(0, 1.1 * max(*y, 1)))
        return fig

    def words(self) -> str:
        first, last = self.data[0], self.data[-1]
        return (
            f"From guidance {first.guidance:g} to {last.guidance:g} the mean saturation goes from "
            f"{first.saturation:.0%} to {last.saturation:.0%}, and the share of values cut off from "
            f"{first.clipped:.1%} to {last.clipped:.1%}."
        )


class Negative(Lesson):
    title = "A negative prompt"
    idea = "It is not a third question: its words replace the empty prompt, and guidance leads away from them."
    trying = "Switch between “without” and “with” and watch one place. Then type the prompt as the negative prompt too."

    def __init__(
        self, prompt: str = "a house", negative: str = "under a rainbow", seed: int = 2, steps: int = 10, **options
    ):
        self.prompt = w.Text(prompt, description="Prompt", continuous_update=False)
        self.negative = w.Text(negative, description="Negative", continuous_update=False)
        self.seed = seed_box(seed)
        self.steps = w.IntSlider(steps, min=4, max=30, description="Steps", continuous_update=False)
        self.show = w.ToggleButtons(options=("both", "without", "with"), style={"button_width": "5em"})
        asks = {"prompt": self.prompt, "negative": self.negative, "seed": self.seed, "steps": self.steps}
        super().__init__(*asks.values(), self.show, asks=asks, **options)

    def work(self, pipe, report: Report, prompt: str, negative: str, seed: int, steps: int) -> list[Image.Image]:
        drawn = []
        for i, text in enumerate((None, negative)):
            for event in pipe.stream(prompt, negative=text, seed=seed, steps=steps):
                if event.x0 is not None:
                    report(i * steps + event.step, 2 * steps)
            drawn.append(event.image)
        return drawn

    def figure(self) -> Figure:
        names = ("without", "with")
        shown = [pair for pair in zip(names, self.data, strict=True) if self.show.value in ("both", pair[0])]
        fig = Figure(figsize=(7.0, 2.3), layout="constrained")
        *axes, last = fig.subplots(1, len(shown) + 1)
        for ax, (name, image) in zip(axes, shown, strict=True):
            ax.imshow(image)
            ax.set_title(f"{name} it")
            ax.axis("off")
        drawn = last.imshow(changes(*self.data), cmap="magma", vmin=0)
        last.set_title("what it changed, of 255")
        last.axis("off")
        fig.colorbar(drawn, ax=last, shrink=0.8)
        return fig

    def words(self) -> str:
        map_ = changes(*self.data)
        return (
            f"“{self.asked['negative']}” as negative prompt changes the mean value by {map_.mean():.0f} of 255, "
            f"and {(map_ > 25.5).mean():.0%} of the pixels by more than a tenth."
        )


# --- measures


def size(x: np.ndarray) -> float:
    return float(np.sqrt((x.astype(np.float64) ** 2).mean()))


def saturation(image: Image.Image) -> float:
    """The mean of HSV's S: 0 for greys, 1 for colours without any grey in them."""
    return float(np.asarray(image.convert("HSV"), np.float64)[..., 1].mean() / 255)


def clipped(image: Image.Image) -> float:
    """The share of the values that are 0 or 255."""
    values = np.asarray(image)
    return float(((values == 0) | (values == 255)).mean())


def changes(a: Image.Image, b: Image.Image) -> np.ndarray:
    """The difference of two pictures at each pixel: the mean over its colours, out of 255."""
    return np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean(2)
