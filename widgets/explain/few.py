"""Lesson 10, few steps: the noise table, and how samplers do with few steps where the best denoiser has a formula."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import ipywidgets as w
import mlx.core as mx
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ...probe import encode, noise_of, sides
from ...schedules import Discrete, Flow, alpha_bar, betas
from ...train import objective, storybook, toy
from ...train.fit import Plan, averaged, fit
from .lesson import BLUE, GREEN, GREY, ORANGE, RED, Lesson, Report, seed_box
from .seeds import sharpness

# ---- the noise table

TIMES = (0, 100, 400, 700, 1000)  # steps of training that are done
KINDS = ("scaled_linear", "linear", "cosine", "flow")


def weights(kind: str, t: int) -> tuple[float, float]:
    """What the picture and the noise are multiplied by after t of 1000 steps."""
    if kind == "flow":
        return 1 - t / 1000, t / 1000
    start, end = (0.00085, 0.012) if kind == "scaled_linear" else (0.0001, 0.02)
    share = 1.0 if t == 0 else alpha_bar(betas(kind, 1000, start, end))[t - 1]
    return float(np.sqrt(share)), float(np.sqrt(1 - share))


class Table(NamedTuple):
    pixels: np.ndarray  # (H, W, 3) in 0 .. 255
    noisy: list[Image.Image]  # the latents with noise, decoded, at each of TIMES
    seen: list[Image.Image]  # the picture that the network expects
    caption: str


class NoiseTable(Lesson):
    title = "The noise table"
    idea = "The same picture at five times of training: with noise, as latents with noise, and as the network sees it."
    trying = (
        "Choose another schedule: which one spends most of its steps on pictures that can still be recognised? "
        "Then take the words away: from which time on does the network need them?"
    )

    def __init__(self, scene: int = 3, told: bool = True, **options):
        self.kind = w.Dropdown(options=KINDS, description="Schedule")
        self.scene = seed_box(scene, "Scene")
        self.told = w.Checkbox(told, description="tell the network the words", indent=False)
        asks = {"kind": self.kind, "scene": self.scene, "told": self.told}
        super().__init__(*asks.values(), asks=asks, **options)

    def work(self, pipe, report: Report, kind: str, scene: int, told: bool) -> Table:
        rng = np.random.default_rng(scene)
        chosen = storybook.sample(rng)
        caption = storybook.plain(chosen)
        pixels = storybook.render(chosen, rng, pipe.resolve("").width)
        x0, noise = encode(pipe, Image.fromarray(pixels)), noise_of(pipe, scene)
        empty, words = sides(pipe, caption, negative="", guidance=2.0)
        look, mixed, seen = words if told else empty, [], []
        for t in TIMES:
            a, b = weights(kind, t)
            ratio = max(b, 1e-2) / max(a, 1e-2)  # about as far as the network was trained
            mixed.append(a * x0 + b * noise)
            seen.append(look((x0 + ratio * noise).astype(np.float32), ratio))
            report(len(seen), len(TIMES))
        noisy = pipe.decode(np.concatenate(mixed).astype(np.float32))
        return Table(pixels.astype(np.float64), noisy, pipe.decode(np.concatenate(seen)), caption)

    def mixed(self, t: int) -> Image.Image:
        """The picture after t steps."""
        a, b = weights(self.asked["kind"], t)
        noise = np.random.default_rng(0).standard_normal(self.data.pixels.shape)
        mixed = 127.5 + a * (self.data.pixels - 127.5) + b * 127.5 * noise
        return Image.fromarray(mixed.clip(0, 255).round().astype(np.uint8))

    def figure(self) -> Figure:
        kind = self.asked["kind"]
        fig = Figure(figsize=(8.4, 5.75), layout="constrained")
        axes = fig.subplots(4, len(TIMES), height_ratios=(1, 1, 1, 0.16))
        for k, (t, column) in enumerate(zip(TIMES, axes.T, strict=True)):
            a, b = weights(kind, t)
            pictures = (self.mixed(t), self.data.noisy[k], self.data.seen[k])
            for ax, image in zip(column, pictures, strict=False):
                ax.imshow(image)
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(False)
            column[0].set_title(f"t = {t}", weight="bold")
            bar, power = column[3], a**2 + b**2
            bar.barh(0, a**2 / power, color=BLUE)
            bar.barh(0, b**2 / power, left=a**2 / power, color=GREY)
            bar.set(xlim=(0, 1), xticks=[], yticks=[], xlabel=f"{a:.2f} picture + {b:.2f} noise")
            bar.spines[:].set_visible(False)
        words = "with its words" if self.asked["told"] else "without words"
        for ax, name in zip(axes[:, 0], ("pixels", "latents, decoded", f"the network,\n{words}"), strict=False):
            ax.set_ylabel(name)
        return fig

    def words(self) -> str:
        kind = self.asked["kind"]
        said = [f"{a:.2f} and {b:.2f} at {t}" for t, (a, b) in ((t, weights(kind, t)) for t in TIMES)]
        grain = [sharpness(self.mixed(t)) for t in (TIMES[0], TIMES[-1])]
        return (
            f"“{self.data.caption}”, schedule {kind}. The weights of picture and noise: {', '.join(said)}. "
            f"Neighbouring pixels differ by {grain[0]:.0f} of 255 at t = 0 and by {grain[1]:.0f} at t = 1000: "
            "grain, not blur."
        )


# ---- samplers on the ring

POINTS, PATHS, JUDGED = 600, 24, 1000
COUNTS = (1, 2, 4, 8, 16, 32, 100)
RUNNERS = {"DDPM": ("ddpm", GREY), "DDIM": ("ddim", BLUE), "DPM++ 2M": ("dpmpp_2m", ORANGE), "flow": ("euler", GREEN)}
LONG = 1000  # steps of DDPM's longest run: as many as in training


class Runs(NamedTuple):
    paths: dict[str, dict[int, np.ndarray]]  # runner -> steps -> (steps + 1, points, 2)
    off: dict[str, dict[int, float]]  # runner -> steps -> distance of the new points from the ring's
    floor: float  # the same distance for points of the ring itself


def straightness(paths: np.ndarray) -> float:
    """The way from start to end over the length of the path, on average: 1 is a straight line."""
    length = np.linalg.norm(np.diff(paths, axis=0), axis=-1).sum(0)
    return float((np.linalg.norm(paths[-1] - paths[0], axis=-1) / length).mean())


def on_blob(points: np.ndarray, blobs: int) -> float:
    """The share of points within three spreads of a blob's centre. Of the ring's own points it is 98.9 %."""
    far = np.linalg.norm(points[:, None] - toy.centres(blobs), axis=-1).min(1)
    return float((far < 3 * toy.SPREAD).mean())


class FewSteps(Lesson):
    title = "Few steps"
    idea = (
        "Points instead of pictures, from a world where the best denoiser has a formula. So nothing had to be learned, "
        "and what is wrong is the sampler's fault alone."
    )
    trying = "Go from 1 step to 1000. Who is first to have all blobs? Then make it two blobs: are the paths straighter?"

    def __init__(self, blobs: int = 8, steps: int = 8, **options):
        self.steps = w.SelectionSlider(options=(*COUNTS, LONG), value=steps, description="Steps")
        self.blobs = w.IntSlider(blobs, min=1, max=12, description="Blobs", continuous_update=False)
        super().__init__(self.steps, self.blobs, asks={"blobs": self.blobs}, **options)

    def work(self, pipe, report: Report, blobs: int) -> Runs:
        real, paths, off = toy.ring(JUDGED, blobs, seed=1), {}, {}
        for done, (name, (sampler, _)) in enumerate(RUNNERS.items(), 1):
            flow = name == "flow"
            denoise, schedule = toy.ring_denoiser(blobs, flow), Flow() if flow else Discrete(toy.ALPHA_BAR)
            counts = (*COUNTS, LONG) if name == "DDPM" else COUNTS
            paths[name] = {n: toy.paths(denoise, schedule, POINTS, n, sampler) for n in counts}
            off[name] = {n: toy.apart(path[-1], real) for n, path in paths[name].items()}
            report(done, len(RUNNERS))
        floor = np.mean([toy.apart(toy.ring(POINTS, blobs, seed), real) for seed in range(2, 10)])
        return Runs(paths, off, float(floor))

    def shown(self, name: str) -> int:
        """The longest run that has not more steps than were chosen."""
        return max(n for n in self.data.paths[name] if n <= self.steps.value)

    def figure(self) -> Figure:
        fig = Figure(figsize=(8.4, 5.2), layout="constrained")
        top, bottom = fig.subfigures(2, 1, height_ratios=(1.2, 1))
        for ax, (name, (_, colour)) in zip(top.subplots(1, len(RUNNERS)), RUNNERS.items(), strict=True):
            n = self.shown(name)
            path = self.data.paths[name][n]
            cloud(ax, path, colour)
            ax.set_title(f"{name}, {n} step{'s' * (n > 1)}")
            ax.set_xlabel(f"{on_blob(path[-1], self.asked['blobs']):.0%} on a blob", fontsize=8)
        ax = bottom.subplots()
        for name, (_, colour) in RUNNERS.items():
            off = self.data.off[name]
            ax.plot(list(off), [max(v, 1e-4) for v in off.values()], "o-", color=colour, ms=4, label=name)
        ax.axhline(self.data.floor, color="black", lw=0.8, ls=":", label="points of the world itself")
        ax.axvline(self.steps.value, color="black", lw=0.8)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xticks((*COUNTS, LONG), map(str, (*COUNTS, LONG)))
        ax.minorticks_off()
        ax.set(xlabel="steps", title="distance of the new points from the world's")
        ax.legend(ncols=2)
        return fig

    def words(self) -> str:
        said = []
        for name in RUNNERS:
            n = self.shown(name)
            path = self.data.paths[name][n]
            said.append(
                f"{name} with {n}: {on_blob(path[-1], self.asked['blobs']):.0%} on a blob, distance "
                f"{self.data.off[name][n]:.3f}"
            )
        straight = [f"{name} {straightness(runs[COUNTS[-1]]):.2f}" for name, runs in self.data.paths.items()]
        return (
            f"{'; '.join(said)}. Points of the world itself have distance {self.data.floor:.3f} from one another. "
            f"Straightness of the ways in {COUNTS[-1]} steps: {', '.join(straight)}."
        )


def cloud(ax, path: np.ndarray, colour: str) -> None:
    """New points, and the paths of some of them."""
    ax.plot(*path[:, :PATHS].transpose(2, 0, 1), color=GREY, lw=0.5, alpha=0.7)
    ax.scatter(*path[-1].T, s=3, color=colour, lw=0)
    ax.set(xlim=(-2.25, 2.25), ylim=(-2.25, 2.25), xticks=[], yticks=[], aspect="equal")
    ax.spines[:].set_visible(False)


# ---- straightened paths

STUDENT = 1, 2, 4  # steps


class Straight(NamedTuple):
    teacher: dict[int, np.ndarray]  # steps -> paths
    student: dict[int, np.ndarray]


class Straighten(Lesson):
    title = "Straight paths"
    idea = (
        "The flow of the ring makes pairs: a noise, and the point it ends in. A small network learns to go from one to "
        "the other in a straight line, and a straight line needs few steps."
    )
    trying = "Let it learn for 100 steps, and for 2000. Which of the two is better with 4 steps?"

    def __init__(self, steps: int = 500, blobs: int = 8, **options):
        self.steps = w.IntSlider(steps, min=100, max=3000, step=100, description="Learn", continuous_update=False)
        self.blobs = w.IntSlider(blobs, min=1, max=12, description="Blobs", continuous_update=False)
        asks = {"steps": self.steps, "blobs": self.blobs}
        super().__init__(*asks.values(), asks=asks, **options)

    def work(self, pipe, report: Report, steps: int, blobs: int) -> Straight:
        denoise = toy.ring_denoiser(blobs, flow=True)
        whole = toy.paths(denoise, Flow(), 4000, 32, "euler", seed=1)
        pupil = toy.Toy("flow")
        for done in learn_pairs(pupil, whole[0], whole[-1], steps):
            report(done, steps)
        teacher = {n: toy.paths(denoise, Flow(), POINTS, n, "euler") for n in STUDENT}
        return Straight(teacher, {n: pupil.paths(POINTS, n) for n in STUDENT})

    def figure(self) -> Figure:
        fig = Figure(figsize=(8.4, 5.6), layout="constrained")
        rows = (("teacher", self.data.teacher, GREEN), ("student", self.data.student, RED))
        for axes, (name, runs, colour) in zip(fig.subplots(2, len(STUDENT)), rows, strict=True):
            for ax, (n, path) in zip(axes, runs.items(), strict=True):
                cloud(ax, path, colour)
                ax.set_title(f"{name}, {n} step{'s' * (n > 1)}")
                ax.set_xlabel(f"{on_blob(path[-1], self.asked['blobs']):.0%} on a blob", fontsize=8)
        return fig

    def words(self) -> str:
        def said(runs: dict[int, np.ndarray]) -> str:
            shares = [f"{on_blob(path[-1], self.asked['blobs']):.0%} with {n}" for n, path in runs.items()]
            return f"{', '.join(shares)}; straightness {straightness(runs[STUDENT[-1]]):.2f}"

        learned = f"Student, after {self.asked['steps']} steps of learning"
        return f"On a blob: teacher {said(self.data.teacher)}. {learned}: {said(self.data.student)}."


def learn_pairs(pupil: toy.Toy, noise: np.ndarray, points: np.ndarray, steps: int) -> Iterator[int]:
    """Train a flow on fixed pairs of noise and point (Liu et al. 2023: reflow), where training has random ones."""

    def batch(step: int) -> tuple[mx.array, ...]:
        rng = np.random.default_rng([1, step])
        picks, level = rng.integers(0, len(points), toy.BATCH), objective.stratified(rng, toy.BATCH)
        eps, x0 = (mx.array(a[picks].reshape(-1, 1, 1, 2).astype(np.float32)) for a in (noise, points))
        level = mx.array(level.astype(np.float32))
        x, target = objective.mixture("flow", x0, eps, level)
        return x, level, target

    with TemporaryDirectory() as folder:
        for report in fit(pupil.net, toy.loss, batch, Plan(steps, **toy.TUNED, save_every=steps), Path(folder)):
            yield report.step
        averaged(pupil.net, Path(folder))
