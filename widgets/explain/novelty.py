"""Lesson 11, is it new: a denoiser that can only repeat, one that invents, and the built-in model's pictures beside the
nearest pictures that it was trained on."""

from collections.abc import Callable
from dataclasses import astuple
from functools import cache
from typing import NamedTuple

import ipywidgets as w
import mlx.core as mx
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ...probe import encode
from ...schedules import Discrete
from ...train import storybook, toy
from .lesson import BLUE, GREEN, GREY, ORANGE, RED, Lesson, Report, seed_box

# ---- points

DRAWN, STEPS = 400, 250  # points drawn by each, in so many steps: the last noise is smaller than their distances


class Copies(NamedTuple):
    points: np.ndarray  # those that are learned
    perfect: np.ndarray  # (DRAWN, 2): drawn with the best denoiser of exactly these points
    learned: np.ndarray  # drawn by a small network that was trained on them
    fresh: np.ndarray  # from where the points themselves come


def nearest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """For each point of a, the distance to the nearest of b."""
    return np.hypot(*(a[:, None] - b).transpose(2, 0, 1)).min(1)


def best_denoiser(points: np.ndarray) -> Callable[[mx.array, float], mx.array]:
    def denoise(x: mx.array, sigma: float) -> mx.array:
        x0 = toy.best(points, np.array(x, np.float64).reshape(-1, 2), sigma)
        return mx.array(x0.reshape(x.shape).astype(np.float32))

    return denoise


class Memory(Lesson):
    title = "Repeat or invent"
    idea = "Both have seen the same few points. One gives the best answer every time. The other, a small network, errs."
    trying = "Give them 1000 points: is the perfect one better now? Then 10: does the network repeat too?"

    def __init__(self, points: int = 60, steps: int = 900, **options):
        self.points = w.SelectionSlider(options=(10, 30, 60, 200, 1000), value=points, description="Points")
        self.steps = w.IntSlider(steps, min=100, max=4000, step=100, description="Learn", continuous_update=False)
        self.points.continuous_update = False
        asks = {"points": self.points, "steps": self.steps}
        super().__init__(*asks.values(), asks=asks, **options)

    def work(self, pipe, report: Report, points: int, steps: int) -> Copies:
        seen, learner = toy.two_moons(points), toy.Toy("v")
        for result in learner.learn(seen, steps):
            report(result.step, steps)
        perfect = toy.paths(best_denoiser(seen), Discrete(toy.ALPHA_BAR), DRAWN, STEPS, "ddim")[-1]
        return Copies(seen, perfect, learner.paths(DRAWN, STEPS, "ddim")[-1], toy.two_moons(DRAWN, seed=5))

    def copied(self) -> tuple[float, dict[str, float]]:
        """How near a copy is, and the share of each cloud's points that are copies. Near is a tenth of what fresh
        points are away from the learned ones, in the middle."""
        d = self.data
        near = float(np.median(nearest(d.fresh, d.points))) / 10
        clouds = {"perfect": d.perfect, "network": d.learned, "fresh": d.fresh}
        return near, {name: float((nearest(c, d.points) < near).mean()) for name, c in clouds.items()}

    def figure(self) -> Figure:
        d = self.data
        fig = Figure(figsize=(8.4, 4.6), layout="constrained")
        top, bottom = fig.subfigures(2, 1, height_ratios=(1.35, 1))
        _, share = self.copied()
        rows = {"perfect": (d.perfect, RED), "network": (d.learned, GREEN), "fresh": (d.fresh, BLUE)}
        titles = ("the perfect denoiser", "a small network", "new points of the world")
        for ax, title, (name, (cloud, colour)) in zip(top.subplots(1, 3), titles, rows.items(), strict=True):
            ax.scatter(*d.points.T, s=26, facecolors="none", edgecolors="black", lw=0.7)
            ax.scatter(*cloud.T, s=4, color=colour, lw=0, alpha=0.8)
            ax.set(xlim=(-2.1, 2.1), ylim=(-1.4, 1.4), xticks=[], yticks=[], aspect="equal")
            ax.set_title(f"{title}:\n{share[name]:.0%} are copies")
            ax.spines[:].set_visible(False)
        ax = bottom.subplots()
        edges = np.geomspace(1e-4, 2, 40)
        for name, (cloud, colour) in rows.items():
            ax.hist(nearest(cloud, d.points).clip(1.1e-4), edges, histtype="step", color=colour, lw=1.8, label=name)
        ax.set_xscale("log")
        ax.set(xlabel="distance to the nearest point that was learned", yticks=[])
        ax.legend(loc="upper center")
        return fig

    def words(self) -> str:
        near, share = self.copied()
        off = [toy.off_moons(cloud).mean() for cloud in (self.data.perfect, self.data.learned, self.data.fresh)]
        return (
            f"{len(self.data.points)} points were learned. Copies, nearer than {near:.3f} to one of them, are: "
            f"{share['perfect']:.0%} of those by the perfect denoiser, {share['network']:.0%} of the network's, "
            f"{share['fresh']:.0%} of new points of the world. Their distances off the moons: {off[0]:.2f}, "
            f"{off[1]:.2f} and {off[2]:.2f}."
        )


# ---- pictures

# The seeds of the built-in model's training pictures. It saw the first 28,672 at 256 pixels; the model of 128 pixels
# that it started from saw all. See its recipe.
FIRST, COUNT = 1_000_003, 61_440
SHOWN = 3


@cache
def trained_on() -> list[tuple[str, ...]]:
    """The scenes of all training pictures, in order."""
    return [astuple(storybook.sample(np.random.default_rng(FIRST + k))) for k in range(COUNT)]


def training_picture(k: int, size: int) -> np.ndarray:
    rng = np.random.default_rng(FIRST + k)
    return storybook.render(storybook.sample(rng), rng, size)


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """The root of the mean squared difference of two pictures, of 255."""
    return float(np.sqrt(((a.astype(np.float64) - b) ** 2).mean()))


class Found(NamedTuple):
    caption: str
    picture: np.ndarray
    near: list[tuple[float, int, np.ndarray]]  # distance, words in common, picture; nearest first
    render: np.ndarray  # a new picture by the program that drew the training pictures
    near_render: list[tuple[float, int, np.ndarray]]
    copy: float  # what the distance would be if the model had repeated the nearest picture
    compared: int


class NearestPicture(Lesson):
    title = "The nearest picture it was trained on"
    idea = (
        "A program drew every training picture from a seed, so each of them can be drawn again, and the nearest ones "
        "found: among all that share at least five of the six words."
    )
    trying = (
        "Try other scenes. Then take a pair of words that was held out of training: there is nothing to repeat. "
        "What does the model draw?"
    )

    def __init__(self, scene: int = 1, unseen: bool = False, **options):
        self.scene = seed_box(scene, "Scene")
        self.unseen = w.Checkbox(unseen, description="a pair of words that was held out", indent=False)
        asks = {"scene": self.scene, "unseen": self.unseen}
        super().__init__(*asks.values(), asks=asks, **options)

    def work(self, pipe, report: Report, scene: int, unseen: bool) -> Found:
        rng = np.random.default_rng([scene, 0])  # two numbers: none of the training seeds
        chosen = storybook.sample(rng, unseen)
        caption, size = storybook.plain(chosen), pipe.resolve("").width
        own = astuple(chosen)
        picture = np.asarray(pipe(caption, seed=scene, steps=10).image)
        report(1, 4)
        common = {k: sum(map(str.__eq__, own, words)) for k, words in enumerate(trained_on())}
        chosen_ones = {k: n for k, n in common.items() if n >= len(own) - 1}
        report(2, 4)
        seen = [(n, training_picture(k, size)) for k, n in chosen_ones.items()]
        report(3, 4)
        render = storybook.render(chosen, rng, size)

        def ranked(image: np.ndarray) -> list[tuple[float, int, np.ndarray]]:
            return sorted(((apart(image, other), n, other) for n, other in seen), key=lambda each: each[0])[:SHOWN]

        near = ranked(picture)
        (again,) = pipe.decode(encode(pipe, Image.fromarray(near[0][2])))
        copy = apart(np.asarray(again), near[0][2])
        return Found(caption, picture, near, render, ranked(render), copy, len(seen))

    def figure(self) -> Figure:
        d = self.data
        fig = Figure(figsize=(8.4, 4.7), layout="constrained")
        fig.suptitle(d.caption, style="italic")
        rows = (("drawn by the model", d.picture, d.near, ORANGE), ("a new render", d.render, d.near_render, BLUE))
        for axes, (name, image, near, colour) in zip(fig.subplots(2, 1 + SHOWN), rows, strict=True):
            for ax, picture in zip(axes, (image, *(other for _, _, other in near)), strict=True):
                ax.imshow(picture)
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_color(GREY)
            axes[0].set_title(name, weight="bold", color=colour)
            axes[0].spines[:].set(visible=True, color=colour, linewidth=2.5)
            for ax, (far, n, _) in zip(axes[1:], near, strict=True):
                ax.set_title(f"{far:.0f} of 255 away")
                ax.set_xlabel("the same words" if n == 6 else f"{n} of 6 words the same", fontsize=8)
        return fig

    def words(self) -> str:
        d = self.data
        return (
            f"“{d.caption}”: of {COUNT:,} training pictures {d.compared} share five or six of its words. The nearest "
            f"is {d.near[0][0]:.0f} of 255 away from the model's picture; a new render's, {d.near_render[0][0]:.0f}. "
            f"A repeated picture would be {d.copy:.0f} away, since the VAE cannot do better."
        )
