"""Lesson 8 too: a world that the reader draws, and the ways of new points from noise to it, with guidance."""

import math
from pathlib import Path
from typing import NamedTuple

import anywidget
import ipywidgets as w
import mlx.core as mx
import numpy as np
import traitlets as t
from matplotlib.figure import Figure

from ... import guidance as guiding
from ...errors import Error
from ...schedules import Flow, sigmas
from ...train import toy
from .lesson import BLUE, GREY, ORANGE, Lesson, Report

MOST, EDGE = 500, 2.4  # points that may be drawn; half the side of the square
GRAIN = 0.09  # each drawn point is a blob of this spread
STEPS, COUNT = 24, 300  # of the ways of new points; and how many there are
LEARN = 500  # steps of the networks
COLOURS = {"blue": BLUE, "orange": ORANGE}
EITHER = "either colour"
_LENGTH = 0.2  # of the longest arrow; the grid's points are twice as far apart
GRID = np.stack(np.meshgrid(*2 * [np.linspace(-2.2, 2.2, 17)]), -1).reshape(-1, 2)


class Board(anywidget.AnyWidget):
    _esm = (Path(__file__).parent / "board.js").read_text(encoding="utf-8")
    _css = (Path(__file__).parent / "board.css").read_text(encoding="utf-8")

    points = t.List().tag(sync=True)  # [x, y, number of the colour]
    most = t.Int(MOST).tag(sync=True)
    run = t.Dict({"steps": 0}).tag(sync=True)  # steps, count, grid: the sizes of what follows; and which run it is
    paths = t.Bytes().tag(sync=True)  # (steps + 1, count, 2)
    arrows = t.Bytes().tag(sync=True)  # (steps, grid, 2)
    places = t.Bytes().tag(sync=True)  # (grid, 2)

    @t.validate("points")
    def _whole(self, proposal: dict) -> list:
        """What a page sends is kept where it is a point on the board."""
        return [point for point in proposal["value"][:MOST] if _on_board(point)]

    def show(self, paths: np.ndarray, arrows: np.ndarray) -> None:
        sizes = {"steps": len(arrows), "count": paths.shape[1], "grid": len(GRID), "turn": self.run.get("turn", 0) + 1}
        with self.hold_sync():
            self.paths, self.arrows, self.places = (a.astype("<f4").tobytes() for a in (paths, arrows, GRID))
            self.run = sizes

    def stop(self) -> None:
        self.run = {"steps": 0, "turn": self.run.get("turn", 0) + 1}


def _on_board(point) -> bool:
    if not isinstance(point, list | tuple) or len(point) != 3 or point[2] not in (0, 1):
        return False
    return all(isinstance(v, int | float) and math.isfinite(v) and abs(v) <= EDGE for v in point[:2])


def moons() -> list[list[float]]:
    angle = np.linspace(0, np.pi, 40)
    upper = np.stack([np.cos(angle) - 0.5, np.sin(angle) - 0.25], 1) * 1.2
    return coloured(upper, -upper)


def heart_and_ring() -> list[list[float]]:
    a = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    heart = np.stack([16 * np.sin(a) ** 3, 13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a)], 1)
    return coloured(heart / 17, 2.0 * np.stack([np.cos(a), np.sin(a)], 1))


def spirals() -> list[list[float]]:
    a = np.linspace(1, 3.4 * np.pi, 70)
    arm = 0.19 * a[:, None] * np.stack([np.cos(a), np.sin(a)], 1)
    return coloured(arm, -arm)


WORLDS = {"two moons": moons, "a heart in a ring": heart_and_ring, "two spirals": spirals}


def coloured(*parts: np.ndarray) -> list[list[float]]:
    return [[round(float(x), 3), round(float(y), 3), k] for k, part in enumerate(parts) for x, y in part]


class Drawn(NamedTuple):
    points: np.ndarray  # (n, 2): what was drawn
    kinds: np.ndarray  # (n,): 0 blue, 1 orange
    paths: np.ndarray  # (STEPS + 1, COUNT, 2)
    arrows: np.ndarray  # (STEPS, grid, 2): the ways to what is expected there, shortened to fit
    levels: list[float]  # (STEPS + 1,): the shares of noise

    def own(self, told: str) -> np.ndarray:
        """The drawn points of the colour that was asked for."""
        return self.points if told == EITHER else self.points[self.kinds == [*COLOURS].index(told)]


def shortened(ways: np.ndarray) -> np.ndarray:
    """Arrows for a figure: none longer than _LENGTH, and long ones still longer than short ones."""
    long = np.linalg.norm(ways, axis=-1, keepdims=True)
    return _LENGTH * ways * np.tanh(long) / np.maximum(long, 1e-9)


def spread(points: np.ndarray) -> float:
    """The mean distance of two of the points."""
    return float(np.hypot(*(points[:, None] - points).transpose(2, 0, 1)).mean())


def met(new: np.ndarray, points: np.ndarray) -> float:
    """The share of new points that are within three grains of a drawn one."""
    far = np.hypot(*(new[:, None] - points).transpose(2, 0, 1)).min(1)
    return float((far < 3 * GRAIN).mean())


class YourWorld(Lesson):
    title = "Your own world"
    idea = "Draw points, in two colours. New points begin as noise, and the arrows show where each place is sent to."
    trying = (
        "Clear it and draw a letter. Then ask for one colour and raise the guidance: what do the new points gain, and "
        "what do they lose? Last, let a network learn your world: where does it err?"
    )

    def __init__(
        self,
        world: str = "a heart in a ring",
        told: str = EITHER,
        guidance: float = 1.0,
        learned: bool = False,
        **options,
    ):
        self.world = w.Dropdown(options=[*WORLDS], value=world, description="Begin with")
        self.told = w.Dropdown(options=(EITHER, *COLOURS), value=told, description="Ask for")
        self.guidance = w.FloatSlider(
            guidance, min=0, max=8, step=0.5, readout_format=".1f", description="Guidance", continuous_update=False
        )
        self.learned = w.Checkbox(learned, description="a small network learns it", indent=False)
        self.board = Board(points=WORLDS[world]())
        asks = {"told": self.told, "guidance": self.guidance, "learned": self.learned}
        super().__init__(self.world, *asks.values(), asks=asks, **options)
        head, controls, *rest = self.children
        self.children = [head, controls, self.board, *rest]
        self.world.observe(lambda change: self.board.set_trait("points", WORLDS[change["new"]]()), "value")
        self.board.observe(lambda _: self.ask(), "points")
        self.observe(lambda _: self._move(), "data")

    def settings(self) -> dict:
        return {"points": tuple(map(tuple, self.board.points)), **super().settings()}

    def work(self, pipe, report: Report, points: tuple, told: str, guidance: float, learned: bool) -> Drawn:
        drawn = np.array(points, np.float64).reshape(-1, 3)
        data = Drawn(drawn[:, :2], drawn[:, 2].astype(int), np.empty(0), np.empty(0), sigmas(Flow(), "trailing", STEPS))
        if len(data.points) == 0 or len(data.own(told)) == 0:
            raise Error(f"There are no {'' if told == EITHER else f'{told} '}points.", "Draw some.")
        worlds = [data.points] if told == EITHER else [data.points, data.own(told)]
        answers = []
        for k, world in enumerate(worlds):
            tell = lambda done, k=k: report(k * LEARN + done, len(worlds) * LEARN)  # noqa: E731
            answers.append(network(world, tell) if learned else toy.blobs_denoiser(world, GRAIN, flow=True))

        def denoise(x: mx.array, sigma: float) -> mx.array:
            both = [answer(x, sigma) for answer in answers]
            return both[0] if told == EITHER else guiding.guide(*both, guidance, 0.0)

        paths = toy.paths(denoise, Flow(), COUNT, STEPS, "euler")
        places = mx.array(GRID.astype(np.float32).reshape(-1, 1, 1, 2))
        ways = [np.array(denoise(places, level)).reshape(-1, 2) - GRID for level in data.levels[:-1]]
        return data._replace(paths=paths, arrows=shortened(np.stack(ways)))

    def _fail(self, error: BaseException) -> None:
        super()._fail(error)
        self.board.stop()

    def _move(self) -> None:
        self.board.show(self.data.paths, self.data.arrows)

    def figure(self) -> Figure:
        d = self.data
        fig = Figure(figsize=(8.4, 2.5), layout="constrained")
        steps = [round(part * STEPS) for part in (0, 0.4, 0.7, 1)]
        for ax, k in zip(fig.subplots(1, len(steps)), steps, strict=True):
            for number, colour in enumerate(COLOURS.values()):
                ax.scatter(*d.points[d.kinds == number].T, s=9, color=colour, lw=0, alpha=0.4)
            ax.quiver(
                *GRID.T, *d.arrows[min(k, STEPS - 1)].T, color=GREY, angles="xy", scale_units="xy", scale=1, width=0.004
            )
            ax.scatter(*d.paths[k].T, s=2, color="black", lw=0)
            ax.set(xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE), xticks=[], yticks=[], aspect="equal")
            ax.set_title(f"{d.levels[k]:.0%} noise")
            ax.spines[:].set_visible(False)
        return fig

    def words(self) -> str:
        d, told = self.data, self.asked["told"]
        own, new = d.own(told), d.paths[-1]
        blue, orange = ((d.kinds == k).sum() for k in (0, 1))
        asked = f"{told}, at guidance {self.asked['guidance']:g}" if told != EITHER else told
        whose = f"a network that learned for {LEARN} steps" if self.asked["learned"] else "the best denoiser"
        return (
            f"{blue} blue and {orange} orange points were drawn; asked for is {asked}, and {whose} answers. Of {COUNT} "
            f"new points {met(new, own):.0%} lie at a drawn point of what was asked for. Two of them are "
            f"{spread(new):.2f} apart on average, two of the drawn ones {spread(own):.2f}."
        )


def network(points: np.ndarray, tell) -> guiding.Denoise:
    """A flow that has learned this world: the drawn points, each with its grain."""
    rng = np.random.default_rng(0)
    grains = points[rng.integers(0, len(points), 4000)] + GRAIN * rng.standard_normal((4000, 2))
    learner = toy.Toy("flow")
    for result in learner.learn(grains.astype(np.float32), LEARN):
        tell(result.step)
    return learner.denoise
