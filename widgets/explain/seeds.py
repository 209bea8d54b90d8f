"""Lesson 4, seeds and noise: the noise decides what the words leave open, and two noises are joined by going around."""

from typing import NamedTuple

import ipywidgets as w
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ...probe import from_noise, noise_of
from .lesson import BLUE, GREEN, GREY, ORANGE, Lesson, Report, seed_box

PROMPTS = ("a house", "a tree", "a boat")
PLACES = np.linspace(0, 1, 5)  # positions on the way between two seeds


class Grids(NamedTuple):
    seeds: list[Image.Image]  # one prompt with several seeds
    prompts: list[Image.Image]  # one seed with several prompts


class SeedGrid(Lesson):
    title = "Seeds"
    idea = "The noise decides what the words leave open. The seed is the name of a noise."
    trying = "Say more: “a red house in the snow under a full moon”. What does the seed still decide?"

    def __init__(self, prompt: str = "a house", seed: int = 1, steps: int = 6, **options):
        self.prompt = w.Text(prompt, description="Prompt", continuous_update=False)
        self.seed = seed_box(seed, "First seed")
        self.steps = w.IntSlider(steps, min=4, max=30, description="Steps", continuous_update=False)
        asks = {"prompt": self.prompt, "seed": self.seed, "steps": self.steps}
        super().__init__(*asks.values(), asks=asks, **options)

    def work(self, pipe, report: Report, prompt: str, seed: int, steps: int) -> Grids:
        runs = [{"prompt": prompt, "count": len(PROMPTS)}, *({"prompt": other} for other in PROMPTS[1:])]
        drawn = []
        for i, run in enumerate(runs):
            drawn += pictures(pipe.stream(seed=seed, steps=steps, **run), report, i, len(runs))
        return Grids(drawn[: len(PROMPTS)], [drawn[0], *drawn[len(PROMPTS) :]])

    def figure(self) -> Figure:
        prompt, seed = self.asked["prompt"], self.asked["seed"]
        fig = Figure(figsize=(7.2, 4.75))
        fig.subplots_adjust(left=0.17, right=0.995, bottom=0.005, top=0.94, wspace=0.03, hspace=0.15)
        rows = (
            ("one prompt", self.data.seeds, [f"seed {seed + i}" for i in range(len(PROMPTS))]),
            (f"one seed, {seed}", self.data.prompts, [prompt, *PROMPTS[1:]]),
        )
        for axes, (name, images, titles) in zip(fig.subplots(2, len(PROMPTS)), rows, strict=True):
            for ax, image, title in zip(axes, images, titles, strict=True):
                show(ax, image, title)
            axes[0].text(-0.07, 0.5, name, ha="right", va="center", transform=axes[0].transAxes)
        return fig

    def words(self) -> str:
        prompt, seed = self.asked["prompt"], self.asked["seed"]
        seeds, prompts = apart(self.data.seeds), apart(self.data.prompts)
        return (
            f"“{prompt}” with {len(PROMPTS)} seeds: two pictures differ by {seeds:.0f} of 255 on average. "
            f"Seed {seed} with {len(PROMPTS)} prompts: by {prompts:.0f}."
        )


class Between(NamedTuple):
    ends: np.ndarray  # (2, n): the two noises
    slerp: list[Image.Image]
    lerp: list[Image.Image]


class BetweenSeeds(Lesson):
    title = "Between two seeds"
    idea = "Noise has a strength, and the network relies on it: from one noise to another, go around and not through."
    trying = "Choose other seeds, then a prompt that says less. Which small things does the way through leave out?"

    def __init__(self, prompt: str = "a tree under the stars", a: int = 1, b: int = 2, steps: int = 6, **options):
        self.prompt = w.Text(prompt, description="Prompt", continuous_update=False)
        self.a = seed_box(a, "From seed")
        self.b = seed_box(b, "To seed")
        self.steps = w.IntSlider(steps, min=4, max=30, description="Steps", continuous_update=False)
        asks = {"prompt": self.prompt, "a": self.a, "b": self.b, "steps": self.steps}
        super().__init__(*asks.values(), asks=asks, **options)

    def work(self, pipe, report: Report, prompt: str, a: int, b: int, steps: int) -> Between:
        ends = noise_of(pipe, a), noise_of(pipe, b)
        round_, straight = ([way(*ends, t) for t in PLACES] for way in (slerp, lerp))
        noise = np.concatenate([*round_, *straight[1:-1]])  # both ways have the same ends
        drawn = pictures(from_noise(pipe, noise, prompt, seed=a, steps=steps), report, 0, 1)
        n = len(PLACES)
        return Between(np.stack([e.ravel() for e in ends]), drawn[:n], [drawn[0], *drawn[n:], drawn[n - 1]])

    def figure(self) -> Figure:
        a, b = self.data.ends
        fig = Figure(figsize=(7.2, 5.25))
        above = fig.add_gridspec(2, len(PLACES), left=0.005, right=0.995, bottom=0.385, top=0.965)
        above.update(wspace=0.04, hspace=0.13)
        names = [f"seed {self.asked['a']}", "¼", "½", "¾", f"seed {self.asked['b']}"]
        for i, name in enumerate(names):
            if i in (0, len(names) - 1):
                show(fig.add_subplot(above[:, i]), self.data.slerp[i], name)
                continue
            show(fig.add_subplot(above[0, i]), self.data.slerp[i], f"{name} around (slerp)", BLUE)
            show(fig.add_subplot(above[1, i]), self.data.lerp[i], f"{name} through (lerp)", ORANGE)
        below = fig.add_gridspec(1, 3, left=0.03, right=0.96, bottom=0.07, top=0.31, wspace=0.3)
        plane, strength, detail = below.subplots()
        fine = np.linspace(0, 1, 101)
        for way, images, colour in ((slerp, self.data.slerp, BLUE), (lerp, self.data.lerp, ORANGE)):
            path, stops = (flat(a, b, np.stack([way(a, b, t) for t in ts])) for ts in (fine, PLACES))
            plane.plot(*path.T, color=colour)
            plane.plot(*stops.T, "o", ms=3.5, color=colour)
            strength.plot(fine, np.hypot(*path.T), color=colour)
            strength.plot(PLACES, np.hypot(*stops.T), "o", ms=3.5, color=colour)
            detail.plot(PLACES, [sharpness(i) for i in images], "o-", ms=3.5, color=colour)
        turn = np.linspace(0, 2 * np.pi, 200)
        plane.plot(np.cos(turn), np.sin(turn), color=GREY, lw=0.8)
        plane.plot(0, 0, "+", color="black")
        for (x, y), name in zip(((0, 0), *flat(a, b, self.data.ends)), ("no noise", names[0], names[-1]), strict=True):
            plane.text(x + 0.08, y + 0.04, name, fontsize=8)
        plane.set(title="the plane of the two noises", aspect="equal", xlim=(-0.3, 1.4), ylim=(-0.15, 1.15))
        plane.axis("off")
        off = 2.6 / np.sqrt(2 * a.size)  # the length of n normal numbers spreads by sqrt(1 / 2) around sqrt(n)
        strength.axhspan(1 - off, 1 + off, color=GREEN, alpha=0.2, lw=0)
        strength.text(0.5, 1 + off, "99 of 100 seeds", ha="center", va="bottom", color=GREEN, fontsize=8)
        strength.set(title="strength of the noise", ylim=(0, 1.3))
        detail.set(title="how far neighbouring pixels differ")
        detail.set_ylim(0, 1.2 * detail.get_ylim()[1])
        for ax in (strength, detail):
            ax.set(xticks=PLACES, xticklabels=names)
        return fig

    def words(self) -> str:
        a, b = self.data.ends
        strengths = [np.linalg.norm(way(a, b, 0.5)) / np.sqrt(a.size) for way in (slerp, lerp)]
        details = [np.mean([sharpness(i) for i in row[1:-1]]) for row in (self.data.slerp, self.data.lerp)]
        between, turn = f"{self.asked['a']} and {self.asked['b']}", np.degrees(angle(a, b))
        return (
            f"The noises of seeds {between} stand at {turn:.0f} degrees to each other. Half way their strength is "
            f"{strengths[0]:.2f} around and {strengths[1]:.2f} through. On the way, neighbouring pixels differ by "
            f"{details[0]:.2f} of 255 around and {details[1]:.2f} through."
        )


def slerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """Go along the sphere from a to b at constant speed (Shoemake 1985)."""
    turn = angle(a, b)
    if turn < 1e-6:
        return lerp(a, b, t)
    return (np.sin((1 - t) * turn) * a + np.sin(t * turn) * b) / np.sin(turn)


def lerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    return (1 - t) * a + t * b


def angle(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.arccos(np.clip((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), -1, 1)))


def flat(a: np.ndarray, b: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(k, n) -> (k, 2): points of the plane of a and b. a lies on the x axis, and 1 is the usual length of noise."""
    x = a / np.linalg.norm(a)
    y = b - (b @ x) * x
    return points @ np.stack([x, y / max(np.linalg.norm(y), 1e-12)], axis=1) / np.sqrt(a.size)


def sharpness(image: Image.Image) -> float:
    pixels = np.asarray(image, float)
    return float(np.mean([np.abs(np.diff(pixels, axis=axis)).mean() for axis in (0, 1)]))


def apart(images: list[Image.Image]) -> float:
    """The mean difference of the pixels of two pictures, over all pairs."""
    x = [np.asarray(i, float) for i in images]
    return float(np.mean([np.abs(x[i] - x[j]).mean() for i in range(len(x)) for j in range(i)]))


def pictures(events, report: Report, i: int, runs: int) -> list[Image.Image]:
    """The pictures of a run, which is run i of several. Its steps are reported."""
    drawn = []
    for event in events:
        if event.stage == "denoise" and event.step:
            report(i * event.steps + event.step, runs * event.steps)
        if event.image is not None:
            drawn.append(event.image)
    return drawn


def show(ax, image: Image.Image, title: str, colour: str = "black") -> None:
    ax.imshow(image)
    ax.set_title(title, pad=3, color=colour)
    ax.axis("off")
