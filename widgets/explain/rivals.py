"""Lesson 16, rivals: a GAN, a VAE, a diffusion model and a flow learn the same world, and are measured alike."""

from collections.abc import Callable
from typing import NamedTuple

import ipywidgets as w
import numpy as np
from matplotlib.figure import Figure

from ...train import toy
from ...train.rivals import RIVALS, Training, train
from .few import on_blob
from .lesson import BLUE, GREEN, GREY, ORANGE, RED, Lesson, Report, played

STEPS, EVERY = 400, 40  # of learning; and how often points are drawn on the way
MOMENTS = tuple(range(0, STEPS + 1, EVERY))
LEARNED, DRAWN = 4000, 400  # points
COLOURS = dict(zip(RIVALS, (RED, ORANGE, BLUE, GREEN), strict=True))
BLOBS = (2, 4, 8, 12)
_MOST = 40  # trainings that are kept: a slider that comes back need not wait

_kept: dict[tuple, Training] = {}


def trained(name: str, blobs: int, seed: int, tell: Callable[[int], None]) -> Training:
    """A rival's training. `tell` hears the steps done."""
    key = name, blobs, seed, STEPS
    if key not in _kept:
        points = toy.ring(LEARNED, blobs).astype(np.float32)
        for done in train(name, points, STEPS, MOMENTS, DRAWN, seed):
            if isinstance(done, Training):
                _kept[key] = done
            elif done:
                tell(done)
        while len(_kept) > _MOST:
            del _kept[next(iter(_kept))]
    tell(STEPS)
    return _kept[key]


def contest(names: list[str], blobs: int, seeds: int, report: Report) -> dict[str, list[Training]]:
    """The trainings of rivals, with several seeds each."""
    found, whole = {name: [] for name in names}, len(names) * seeds * STEPS
    for i, (seed, name) in enumerate((seed, name) for seed in range(seeds) for name in names):
        found[name].append(trained(name, blobs, seed, lambda done, i=i: report(i * STEPS + done, whole)))
    return found


def shares(points: np.ndarray, blobs: int) -> np.ndarray:
    """The share of the points that is nearest to each blob."""
    near = np.linalg.norm(points[:, None] - toy.centres(blobs), axis=-1).argmin(1)
    return np.bincount(near, minlength=blobs) / len(points)


def covered(points: np.ndarray, blobs: int) -> int:
    """How many blobs have at least half of the points that they have in the world."""
    return int((shares(points, blobs) >= 0.5 / blobs).sum())


class Race(NamedTuple):
    runs: dict[str, list[Training]]
    off: dict[str, np.ndarray]  # (seeds, moments): the distance of the points drawn from the world's
    floor: float  # the distance of points of the world from one another


def raced(names: list[str], blobs: int, seeds: int, report: Report) -> Race:
    runs, real = contest(names, blobs, seeds, report), toy.ring(DRAWN, blobs, seed=1)
    off = {name: np.array([[toy.apart(c, real) for c in run.clouds] for run in each]) for name, each in runs.items()}
    floor = np.mean([toy.apart(toy.ring(DRAWN, blobs, seed), real) for seed in range(2, 6)])
    return Race(runs, off, float(floor))


# ---- through training


class Rivals(Lesson):
    title = "Four rivals"
    idea = (
        "A GAN, a VAE, a diffusion model and a flow learn the same blobs, from the same points, in as many steps. Go "
        "through their training."
    )
    trying = (
        "Play it from the start. Who has the blobs first, and who has them sharp? Then make it two blobs, and twelve."
    )

    def __init__(self, blobs: int = 8, moment: int = STEPS, **options):
        self.moment = w.IntSlider(moment, min=0, max=STEPS, step=EVERY, description="Steps learned")
        self.blobs = w.SelectionSlider(options=BLOBS, value=blobs, description="Blobs", continuous_update=False)
        super().__init__(played(self.moment, 700, EVERY), self.blobs, asks={"blobs": self.blobs}, **options)

    def work(self, pipe, report: Report, blobs: int) -> Race:
        return raced([*RIVALS], blobs, 1, report)

    def clouds(self) -> dict[str, np.ndarray]:
        """What each has drawn at the chosen moment."""
        k = MOMENTS.index(self.moment.value)
        return {name: run.clouds[k] for name, (run,) in self.data.runs.items()}

    def figure(self) -> Figure:
        blobs = self.asked["blobs"]
        fig = Figure(figsize=(8.4, 4.8), layout="constrained")
        top, bottom = fig.subfigures(2, 1, height_ratios=(1.25, 1))
        for ax, (name, points) in zip(top.subplots(1, len(RIVALS)), self.clouds().items(), strict=True):
            ax.scatter(*toy.centres(blobs).T, s=120, facecolors="none", edgecolors=GREY, lw=0.7)
            ax.scatter(*points.T, s=2, color=COLOURS[name], lw=0)
            ax.set(xlim=(-2.3, 2.3), ylim=(-2.3, 2.3), xticks=[], yticks=[], aspect="equal")
            ax.spines[:].set_visible(False)
            ax.set_title(name, weight="bold", color=COLOURS[name])
            ax.set_xlabel(
                f"{on_blob(points, blobs):.0%} on a blob, {covered(points, blobs)} of {blobs} found", fontsize=8
            )
        ax = bottom.subplots()
        for name, (off,) in self.data.off.items():
            ax.plot(MOMENTS, off, "o-", color=COLOURS[name], ms=3, label=name)
        ax.axhline(self.data.floor, color="black", lw=0.8, ls=":", label="points of the world itself")
        ax.axvline(self.moment.value, color="black", lw=0.8)
        ax.set_yscale("log")
        ax.set(xlabel="steps learned", title="distance of the new points from the world's")
        ax.legend(ncols=3, fontsize=8)
        return fig

    def words(self) -> str:
        blobs, k = self.asked["blobs"], MOMENTS.index(self.moment.value)
        said = [
            f"{name} {on_blob(points, blobs):.0%}, {covered(points, blobs)} and {self.data.off[name][0][k]:.3f}"
            for name, points in self.clouds().items()
        ]
        return (
            f"After {self.moment.value} steps, the points on a blob, the blobs found of {blobs}, and the distance from "
            f"the world: {'; '.join(said)}. Points of the world itself have distance {self.data.floor:.3f}."
        )


# ---- what is measured


class Scores(Lesson):
    title = "The table"
    idea = (
        "Each rival has learned several times, from other random numbers. A bar is the mean, and a dot is one of them."
    )
    trying = "More seeds: do the dots of one rival lie closer than those of another? Then other worlds."

    def __init__(self, seeds: int = 2, blobs: int = 8, **options):
        self.seeds = w.IntSlider(seeds, min=1, max=6, description="Seeds", continuous_update=False)
        self.blobs = w.SelectionSlider(options=BLOBS, value=blobs, description="Blobs", continuous_update=False)
        asks = {"seeds": self.seeds, "blobs": self.blobs}
        super().__init__(*asks.values(), asks=asks, **options)

    def work(self, pipe, report: Report, seeds: int, blobs: int) -> Race:
        return raced([*RIVALS], blobs, seeds, report)

    def scores(self) -> dict[str, dict[str, list[float]]]:
        """Column -> rival -> one value for each seed."""
        blobs, runs = self.asked["blobs"], self.data.runs
        columns = {
            "seconds to learn": lambda run: run.learned,
            f"ms for {DRAWN} points": lambda run: 1000 * run.drawn,
            "% on a blob": lambda run: 100 * on_blob(run.clouds[-1], blobs),
            f"blobs found, of {blobs}": lambda run: covered(run.clouds[-1], blobs),
        }
        found = {title: {name: [*map(of, each)] for name, each in runs.items()} for title, of in columns.items()}
        return found | {"distance": {name: [*off[:, -1]] for name, off in self.data.off.items()}}

    def figure(self) -> Figure:
        scores = self.scores()
        fig = Figure(figsize=(8.4, 2.5), layout="constrained")
        for ax, (title, rows) in zip(fig.subplots(1, len(scores), sharey=True), scores.items(), strict=True):
            for y, (name, values) in enumerate(rows.items()):
                mean = np.mean(values)
                ax.barh(y, mean, color=COLOURS[name], alpha=0.45, height=0.62)
                ax.plot(values, [y] * len(values), "o", ms=3.5, color=COLOURS[name])
                ax.annotate(_short(mean), (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=8)
            if title == "distance":
                ax.axvline(self.data.floor, color="black", lw=0.8, ls=":")
            ax.set(xlim=(0, None), yticks=range(len(rows)), yticklabels=rows, xticks=[], title=title)
            ax.spines[["bottom"]].set_visible(False)
            ax.tick_params(left=False)
        ax.invert_yaxis()  # they share it
        return fig

    def words(self) -> str:
        """Without the times, which are of this machine and this moment."""
        said, seeds = [], self.asked["seeds"]
        for name, each in self.data.runs.items():
            blobs, off = self.asked["blobs"], self.data.off[name][:, -1]
            on = [on_blob(run.clouds[-1], blobs) for run in each]
            found = [covered(run.clouds[-1], blobs) for run in each]
            said.append(
                f"{name}: {np.mean(on):.0%} on a blob, {min(found)} of {blobs} found at least, "
                f"distance {off.mean():.3f} ({off.min():.3f} to {off.max():.3f}), "
                f"{each[0].passes} pass{'es' * (each[0].passes > 1)} for a point, {each[0].weights:,} weights"
            )
        return (
            f"With {seeds} seed{'s' * (seeds > 1)}. {'; '.join(said)}. The world's own points: {self.data.floor:.3f}."
        )


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}" if value >= 0.1 else f"{value:.3f}"


# ---- what a loss says


class LossSays(Lesson):
    title = "What the loss says"
    idea = (
        "While it learns one sees the loss (grey). What one wants to know is how good the drawn points are (coloured)."
    )
    trying = "Which loss would you stop by? For the others, what would you look at instead?"

    def __init__(self, blobs: int = 8, **options):
        self.blobs = w.SelectionSlider(options=BLOBS, value=blobs, description="Blobs", continuous_update=False)
        super().__init__(self.blobs, asks={"blobs": self.blobs}, **options)

    def work(self, pipe, report: Report, blobs: int) -> Race:
        return raced([*RIVALS], blobs, 1, report)

    def beside(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The mean loss of the steps before each moment, and the distance at it; without the moment before learning."""
        return self.data.runs[name][0].losses.reshape(-1, EVERY).mean(1), self.data.off[name][0][1:]

    def figure(self) -> Figure:
        fig = Figure(figsize=(8.4, 2.6), layout="constrained")
        for ax, (name, (run,)) in zip(fig.subplots(1, len(RIVALS)), self.data.runs.items(), strict=True):
            smooth = np.convolve(run.losses, np.ones(10) / 10, "valid")
            ax.plot(np.arange(len(smooth)) + 10, smooth, color=GREY, lw=1)
            ax.set(yticks=[], xlabel="steps learned")
            other = ax.twinx()
            other.plot(MOMENTS[1:], self.beside(name)[1], "o-", color=COLOURS[name], ms=3)
            other.set(yticks=[], ylim=(0, None))
            other.spines[:].set_visible(False)
            ax.set_title(f"{name}: agree {ranks_agree(*self.beside(name)):+.1f}", color=COLOURS[name], weight="bold")
        return fig

    def words(self) -> str:
        said = [f"{name} {ranks_agree(*self.beside(name)):+.1f}" for name in self.data.runs]
        return (
            f"How well the ranks of loss and distance agree over {len(MOMENTS) - 1} moments: {', '.join(said)}. "
            "At +1 the loss falls whenever the points get better; at -1 it rises then."
        )


def ranks_agree(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation of two lists without ties."""
    return float(np.corrcoef(*(values.argsort().argsort() for values in (a, b)))[0, 1])
