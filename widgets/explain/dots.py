"""Lesson 1, forward noise: a drop of ink spreads in water, and is played backwards."""

from itertools import pairwise
from typing import NamedTuple

import ipywidgets as w
import numpy as np
from matplotlib.figure import Figure

from .drawing import GRAIN, heart_and_ring, met
from .lesson import BLUE, GREY, ORANGE, Lesson, Report, played, seed_box

DOTS, STEPS, PUSH = 400, 200, 0.1  # how many dots; steps of a walk, each of this spread to the side and up or down
FOLLOWED, EDGE = 6, 3.6  # dots that are marked; half the side of the figure's squares


class Walks(NamedTuple):
    shape: np.ndarray  # (n, 2): the middles of the blobs that the drop is made of
    out: np.ndarray  # (STEPS + 1, DOTS, 2)
    back: np.ndarray  # (STEPS + 1, DOTS, 2): from where `out` ends, so its last is the drop again

    def away(self, step: int) -> float:
        """How far the dots are from where they began: the root of the mean square."""
        return float(np.sqrt(np.square(self.out[step] - self.out[0]).sum(-1).mean()))


def walked_back(shape: np.ndarray, x: np.ndarray, steps: int, rng: np.random.Generator) -> np.ndarray:
    """The random walk in reverse (Sohl-Dickstein et al. 2015). In each step a dot draws where it may have begun, of all
    places in the shape by how probable they are, and then where it was one step earlier on the way from there."""
    states, normal = [x], lambda: rng.standard_normal(x.shape)
    for more, less in pairwise(PUSH * np.sqrt(np.arange(steps, -1, -1))):
        far = np.square(x[:, None] - shape).sum(-1) / (2 * (GRAIN**2 + more**2))  # (dots, blobs)
        middle = shape[(rng.gumbel(size=far.shape) - far).argmax(1)]
        share = GRAIN**2 / (GRAIN**2 + more**2)
        begun = middle + share * (x - middle) + more * np.sqrt(share) * normal()
        kept = (less / more) ** 2
        x = kept * x + (1 - kept) * begun + less * np.sqrt(1 - kept) * normal()
        states.append(x)
    return np.stack(states)


class InkDrop(Lesson):
    title = "A drop of ink"
    idea = "Dots that are pushed about at random spread, as ink does in water. Physics calls this diffusion."
    trying = "Play it. When can you no longer see what it was? Then follow one of the dark dots to the end, and back."

    def __init__(self, at: int = 5, seed: int = 0, **options):
        self.at = w.IntSlider(at, min=0, max=STEPS, description="Step")
        self.seed = seed_box(seed)
        super().__init__(played(self.at, 150, step=5), self.seed, asks={"seed": self.seed}, **options)

    def work(self, pipe, report: Report, seed: int) -> Walks:
        rng, shape = np.random.default_rng(seed), np.array([p[:2] for p in heart_and_ring() if p[2] == 0])
        begin = shape[rng.integers(0, len(shape), DOTS)] + GRAIN * rng.standard_normal((DOTS, 2))
        pushes = PUSH * rng.standard_normal((STEPS, DOTS, 2))
        out = begin + np.concatenate([np.zeros((1, DOTS, 2)), np.cumsum(pushes, 0)])
        return Walks(shape, out, walked_back(shape, out[-1], STEPS, rng))

    def figure(self) -> Figure:
        d, at = self.data, self.at.value
        fig = Figure(figsize=(8.4, 3.1), layout="constrained")
        out, back, ax = fig.subplots(1, 3, width_ratios=(1, 1, 1.25))
        views = ((out, d.out[at], f"after {at} pushes"), (back, d.back[STEPS - at], f"on the way back, {at} to go"))
        for panel, dots, title in views:
            panel.scatter(*dots[FOLLOWED:].T, s=5, color=BLUE if panel is out else ORANGE, lw=0)
            panel.scatter(*dots[:FOLLOWED].T, s=22, color="black", lw=0)
            panel.set(xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE), xticks=[], yticks=[], aspect="equal", title=title)
        steps = np.arange(STEPS + 1)
        ax.plot(steps, [d.away(k) for k in steps], color=BLUE, label="measured")
        ax.plot(steps, PUSH * np.sqrt(2 * steps), ":", color="black", label="as the root of the steps")
        ax.axvline(at, color=GREY, lw=0.8)
        ax.set(xlabel="step", title="how far from where they began", ylim=(0, None), xlim=(0, STEPS))
        ax.legend(loc="lower right")
        return fig

    def words(self) -> str:
        d, at = self.data, self.at.value
        own = float(np.hypot(*(d.back[-1] - d.out[0]).T).mean())
        other = float(np.hypot(*(d.out[0] - d.out[0][::-1]).T).mean())
        drop = [f"{met(dots, d.shape):.0%}" for dots in (d.back[-1], d.out[-1])]
        return (
            f"After {at} pushes the dots are {d.away(at):.2f} from where they began, after {STEPS // 4} "
            f"{d.away(STEPS // 4):.2f}, after {STEPS} {d.away(STEPS):.2f}. Played backwards, {drop[0]} of them lie in "
            f"the drop again; before that {drop[1]} did. But each is {own:.2f} from where it was itself; two dots of "
            f"the drop are {other:.2f} apart."
        )
