"""Lesson 2, the way back. Step by step it shows what the network sees, what it takes for noise and what it expects."""

from typing import NamedTuple

import ipywidgets as w
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ...probe import trace
from .latent import to_colours
from .lesson import BLUE, GREEN, ORANGE, Lesson, Report, played, seed_box

SHAPES, DETAIL = 6, 16  # cycles across a picture: below the first is layout, above the second is detail


class Frame(NamedTuple):
    sigma: float
    noisy: np.ndarray  # (h, w, 3): x as colours
    noise: np.ndarray  # (h, w): the predicted noise, its first channel
    clean: Image.Image  # x0, decoded


class FilmStrip(Lesson):
    title = "The way back"
    idea = (
        "A run asks one question again and again: which part of this is noise? "
        "The picture it expects settles from coarse to fine."
    )
    trying = (
        "Scrub through the steps, or press play: when is the layout decided, and when the edges? "
        "Then choose fewer steps."
    )

    def __init__(self, prompt: str = "a red house under a full moon", seed: int = 7, steps: int = 12, **options):
        self.prompt = w.Text(prompt, description="Prompt", continuous_update=False)
        self.seed = seed_box(seed)
        self.steps = w.IntSlider(steps, min=4, max=50, description="Steps", continuous_update=False)
        self.at = w.IntSlider(1, min=1, max=steps, description="Step")
        asks = {"prompt": self.prompt, "seed": self.seed, "steps": self.steps}
        super().__init__(*asks.values(), played(self.at, 300), asks=asks, **options)

    def work(self, pipe, report: Report, prompt: str, seed: int, steps: int) -> list[Frame]:
        seen, clean = [], []
        for step in trace(pipe, prompt, seed=seed, steps=steps):
            seen.append(step)
            clean += pipe.decode(step.x0)
            report(step.step, step.steps)
        colours = to_colours(seen[-1].x0[0], clean[-1])
        return [
            Frame(s.sigma, colours(s.x[0] / np.sqrt(1 + s.sigma**2)), s.noise[0, :, :, 0], picture)
            for s, picture in zip(seen, clean, strict=True)
        ]

    def redraw(self) -> None:
        if self.data is not None:
            self.at.max = len(self.data)
        super().redraw()

    def figure(self) -> Figure:
        frame, last = self.data[self.at.value - 1], self.data[-1]
        fig = Figure(figsize=(8.4, 4.0), layout="constrained")
        top, bottom = fig.subfigures(2, 1, height_ratios=(2.6, 1.4))
        panels = (
            (frame.noisy, f"what the network sees, latents:\nnoise {frame.sigma:.2f} to 1 of picture"),
            (frame.noise, "what it takes for noise\n(one of its channels)"),
            (frame.clean, "the picture it expects"),
            (last.clean, "where it ends"),
        )
        for ax, (image, title) in zip(top.subplots(1, 4), panels, strict=True):
            ax.imshow(image, cmap="gray")
            ax.set_title(title)
            ax.axis("off")
        ax = bottom.subplots()
        for (name, values), colour in zip(settled(self.data).items(), (BLUE, GREEN, ORANGE), strict=True):
            ax.plot(range(1, len(values) + 1), values, label=name, color=colour)
        ax.axvline(self.at.value, color="black", lw=0.8)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set(xlabel="step", ylabel="still to change", ylim=(0, None), xlim=(1, len(self.data)))
        ax.legend(ncols=3)
        return fig

    def words(self) -> str:
        frame = self.data[self.at.value - 1]
        half = {name: first_below(values, 0.25) for name, values in settled(self.data).items()}
        when = ", ".join(f"{name} by step {step}" for name, step in half.items())
        return (
            f"Step {self.at.value} of {len(self.data)}, noise {frame.sigma:.2f}. "
            f"Three quarters of the way to the final picture: {when}."
        )


def settled(frames: list[Frame]) -> dict[str, np.ndarray]:
    """How far each expected picture is from the last, by size of its parts. 1 is the last one's distance from grey."""
    pictures = np.stack([np.asarray(f.clean, np.float32).mean(2) / 255 - 0.5 for f in frames])
    spectra = np.fft.fft2(pictures)  # (steps, H, W)
    H, W = pictures.shape[1:]
    cycles = np.hypot(np.fft.fftfreq(H)[:, None] * H, np.fft.fftfreq(W) * W)
    bands = {
        "layout": cycles < SHAPES,
        "shapes": (cycles >= SHAPES) & (cycles < DETAIL),
        "detail": cycles >= DETAIL,
    }
    power = np.abs(spectra - spectra[-1]) ** 2
    return {
        name: np.sqrt(power[:, band].sum(1) / (np.abs(spectra[-1][band]) ** 2).sum()) for name, band in bands.items()
    }


def first_below(values: np.ndarray, bound: float) -> int:
    """The first step, counted from 1, from which on all values are below a bound."""
    above = np.flatnonzero(values >= bound)
    return 1 if len(above) == 0 else int(above[-1]) + 2
