"""Lesson 8, training: what a denoiser learns, measured on the built-in model, and three toys that learn now."""

from itertools import pairwise
from typing import NamedTuple

import ipywidgets as w
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ...probe import encode, sides
from ...schedules import Discrete
from ...train import measure, storybook, toy
from ...train.recipe import ALPHA_BAR
from .latent import to_colours
from .lesson import BLUE, GREEN, GREY, ORANGE, RED, Lesson, Report, seed_box

TIMES = (50, 200, 400, 600, 800, 950)  # some of the 1000 time steps of training
SIGMAS = Discrete(ALPHA_BAR).sigmas[list(TIMES)]
WORDS = {"time": BLUE, "terrain": GREEN, "sky": GREY, "object": ORANGE, "colour": RED, "position": "black"}
RATIOS = (0.15, 0.3, 0.6, 1.0, 2.0, 4.0)  # of noise to points: the levels at which the toys are examined
SHOWN, PATHS = 500, 40  # how many new points are drawn, and how many with their paths


class Losses(NamedTuple):
    right: np.ndarray  # (times,): the mean over the scenes
    raised: dict[str, np.ndarray]  # kind of word -> what a wrong one adds
    caption: str  # the prompt of the pictures
    noisy: list[np.ndarray]  # latents as colours
    expected: list[Image.Image]


class Loss(Lesson):
    title = "What a denoiser is taught"
    idea = (
        "Mix noise into a picture and let the network say what was mixed in. The square of its error is the loss, "
        "and training is making it small."
    )
    trying = "Measure more scenes. Which words matter while there is mostly noise, and which to the end?"

    def __init__(self, scenes: int = 2, **options):
        self.scenes = w.IntSlider(scenes, min=1, max=12, description="Scenes", continuous_update=False)
        super().__init__(self.scenes, asks={"count": self.scenes}, **options)

    def work(self, pipe, report: Report, count: int) -> Losses:
        scenes, measured = measure.scenes(count), []
        for losses in measure.losses(pipe, scenes, SIGMAS):
            measured.append(losses)
            report(len(measured), count + 1)
        right = np.mean([m["right"] for m in measured], axis=0)
        added = {kind: [m[kind] - m["right"] for m in measured if kind in m] for kind in WORDS}
        raised = {kind: np.mean(values, axis=0) for kind, values in added.items() if values}
        caption = storybook.plain(scenes[0])
        picture = Image.fromarray(measure.renders(scenes[:1], pipe.description.defaults.size)[0])
        x0 = encode(pipe, picture)
        noise = np.random.default_rng(0).standard_normal(x0.shape).astype(np.float32)
        _, look = sides(pipe, caption, negative="", guidance=2.0)
        expected = np.concatenate([look(x0 + s * noise, float(s)) for s in SIGMAS])
        colours = to_colours(x0[0], picture)
        noisy = [colours((x0 + s * noise)[0] / np.sqrt(1 + s**2)) for s in SIGMAS]
        report(count + 1, count + 1)
        return Losses(right, raised, caption, noisy, pipe.decode(expected))

    def figure(self) -> Figure:
        fig = Figure(figsize=(8.4, 6), layout="constrained")
        top, bottom = fig.subfigures(2, 1, height_ratios=(1, 1.05))
        top.suptitle(self.data.caption, style="italic")
        for k, column in enumerate(top.subplots(2, len(TIMES)).T):
            column[0].set_title(f"t = {TIMES[k]}\nnoise {SIGMAS[k]:.2f} to 1")
            column[1].set_title("expected")
            for ax, image in zip(column, (self.data.noisy[k], self.data.expected[k]), strict=True):
                ax.imshow(image)
                ax.axis("off")
        left, right = bottom.subplots(1, 2, width_ratios=(1, 1.5))
        left.plot(TIMES, self.data.right, "o-", color=BLUE)
        left.set(xlabel="t: noise grows to the right", ylim=(0, None), xlim=(0, 1000))
        left.set_title("the loss, all words right")
        ends = spaced([values[-1] for values in self.data.raised.values()], 0.07 * max_of(self.data.raised))
        for (kind, values), y in zip(self.data.raised.items(), ends, strict=True):
            right.plot(TIMES, values, "o-", color=WORDS[kind], ms=3)
            right.annotate(kind, (TIMES[-1], values[-1]), (1010, y), color=WORDS[kind], va="center")
        right.set(xlabel="t", xlim=(0, 1000))
        right.set_title("what one wrong word adds to it, by kind of word")
        return fig

    def words(self) -> str:
        said = [f"{value:.2f} at t = {t}" for t, value in zip(TIMES, self.data.right, strict=True)]
        raised = [f"{kind} {v[0]:+.2f} and {v[-1]:+.2f}" for kind, v in self.data.raised.items()]
        return (
            f"Scenes measured: {self.asked['count']}. The loss: {', '.join(said)}. "
            f"A wrong word adds, at t = {TIMES[0]} and t = {TIMES[-1]}: {', '.join(raised)}."
        )


def max_of(raised: dict[str, np.ndarray]) -> float:
    return max(values.max() for values in raised.values())


def spaced(values: list[float], gap: float) -> np.ndarray:
    """Heights for labels near the values, a gap apart at least."""
    out = np.array(values, float)
    order = np.argsort(out)
    for a, b in pairwise(order):
        out[b] = max(out[b], out[a] + gap)
    return out


class Learner(NamedTuple):
    losses: np.ndarray  # (steps so far,)
    paths: np.ndarray  # (steps + 1, n, 2)
    arrows: np.ndarray  # (ratios, grid, 2): the points it expects at the grid's points
    off: float  # the mean distance of its points from the moons
    short: np.ndarray  # (ratios,): its error beyond that of the best possible denoiser


class TwoMoons(Lesson):
    title = "Two moons"
    idea = "A denoiser that has seen some points can make new ones. Three learn here, and each predicts something else."
    trying = (
        "Move the noise: with much noise all arrows point at the middle of the moons, with little each at the nearest. "
        "Then let them learn for 200 steps, and for 3000."
    )

    def __init__(self, steps: int = 500, seed: int = 0, **options):
        self.steps = w.IntSlider(steps, min=100, max=5000, step=100, description="Steps", continuous_update=False)
        self.seed = seed_box(seed)
        self.ratio = w.SelectionSlider(options=RATIOS, value=0.3, description="Noise")
        asks = {"steps": self.steps, "seed": self.seed}
        super().__init__(self.ratio, *asks.values(), asks=asks, **options)

    def work(self, pipe, report: Report, steps: int, seed: int) -> dict[str, Learner]:
        points = toy.two_moons(2000)
        noisy = [points[:SHOWN] + ratio * np.random.default_rng(2).standard_normal((SHOWN, 2)) for ratio in RATIOS]
        least = [toy.best(points, x, ratio) for x, ratio in zip(noisy, RATIOS, strict=True)]
        toys = {name: toy.Toy(name, seed) for name in ("eps", "v", "flow")}
        losses = {name: [] for name in toys}

        def now() -> dict[str, Learner]:
            return {name: look(each, noisy, least, losses[name]) for name, each in toys.items()}

        for results in zip(*(each.learn(points, steps, seed) for each in toys.values()), strict=True):
            for name, result in zip(toys, results, strict=True):
                losses[name].append(result.loss)
            report(len(losses["eps"]), steps, now)
        return now()

    def figure(self) -> Figure:
        k, data = RATIOS.index(self.ratio.value), toy.two_moons(SHOWN)
        fig = Figure(figsize=(8.4, 6.6), layout="constrained")
        axes = fig.subplots(3, 3, height_ratios=(1, 1, 0.45))
        under = data + RATIOS[k] * np.random.default_rng(1).standard_normal(data.shape)
        columns = zip(self.data.items(), (BLUE, GREEN, RED), axes.T, strict=True)
        for (name, learner), colour, (paths, field, curve) in columns:
            paths.plot(*learner.paths[:, :PATHS].transpose(2, 0, 1), color=GREY, lw=0.5, alpha=0.7)
            paths.scatter(*learner.paths[-1, :SHOWN].T, s=2, color=colour)
            paths.set_title(f"{name}: new points,\nand the paths of {PATHS} from noise")
            field.scatter(*under.T, s=1, color=GREY, alpha=0.5)
            step = (learner.arrows[k] - GRID).T
            field.quiver(*GRID.T, *step, color=colour, angles="xy", scale_units="xy", scale=2.5, width=0.006)
            field.set_title(f"noise {RATIOS[k]:g} to 1: from noisy points\ntowards what it expects there")
            for ax in (paths, field):
                ax.set(xlim=(-2.4, 2.4), ylim=(-2, 2), xticks=[], yticks=[], aspect="equal")
            smooth = np.convolve(learner.losses, np.ones(20) / 20, "valid")
            curve.plot(np.arange(len(smooth)) + 20, smooth, color=colour)
            curve.set(ylim=(0, None), xlabel="steps learned")
            curve.set_title("its loss")
        return fig

    def words(self) -> str:
        k, steps = RATIOS.index(self.ratio.value), len(self.data["eps"].losses)
        said = [f"{name} {each.off:.2f} and {each.short[k]:.3f}" for name, each in self.data.items()]
        least = toy.off_moons(toy.two_moons(2000)).mean()
        return (
            f"After {steps} steps the new points lie off the moons by, and the squared error at noise {RATIOS[k]:g} "
            f"exceeds the least possible by: {', '.join(said)}. The points learned from lie off by {least:.2f}."
        )


GRID = np.stack(np.meshgrid(np.linspace(-2.1, 2.1, 13), np.linspace(-1.7, 1.7, 11)), -1).reshape(-1, 2)


def look(model: toy.Toy, noisy: list[np.ndarray], least: list[np.ndarray], losses: list[float]) -> Learner:
    paths, arrows = model.paths(SHOWN), np.stack([model.expected(GRID, ratio) for ratio in RATIOS])
    short = [np.square(model.expected(x, r) - b).mean() for x, b, r in zip(noisy, least, RATIOS, strict=True)]
    return Learner(np.array(losses), paths, arrows, toy.off_moons(paths[-1]).mean(), np.array(short))
