"""Lesson 7, text: where in the picture each word is read, step by step."""

import math
from typing import NamedTuple

import ipywidgets as w
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ...probe import Token, attention, tokens
from .lesson import ORANGE, Lesson, Report, played, seed_box
from .tokens import WIDTH, shown

PANELS = 9  # maps in a row


class Read(NamedTuple):
    tokens: list[Token]  # of all chunks
    maps: np.ndarray  # (steps, N, h, w)
    picture: Image.Image


class WordMaps(Lesson):
    title = "Where words are read"
    idea = (
        "At every step each place of the picture looks at all the words. A map shows which places looked at a word: "
        "a sign of its influence, not a proof."
    )
    trying = (
        "Choose <i>red</i>, then <i>moon</i>, and play the steps. Ask for a blue boat on the left: does the map move? "
        "Does a word that changes nothing, such as <i>a</i>, have an empty map?"
    )

    def __init__(self, prompt: str = "a red house under a full moon", seed: int = 7, steps: int = 12, **options):
        self.prompt = w.Text(prompt, description="Prompt", continuous_update=False)
        self.seed = seed_box(seed)
        self.steps = w.IntSlider(steps, min=4, max=50, description="Steps", continuous_update=False)
        self.word = w.IntSlider(3, min=1, max=99, description="Word")
        self.at = w.IntSlider(steps, min=1, max=steps, description="Step")
        asks = {"prompt": self.prompt, "seed": self.seed, "steps": self.steps}
        super().__init__(*asks.values(), self.word, played(self.at, 500), asks=asks, **options)

    def work(self, pipe, report: Report, prompt: str, seed: int, steps: int) -> Read:
        maps = []
        for seen in attention(pipe, prompt, seed=seed, steps=steps):
            maps.append(seen.maps)
            report(seen.step.step, seen.step.steps)
        (picture,) = pipe.decode(seen.step.x0)
        flat = [t for chunk in tokens(pipe, prompt, seed=seed, steps=steps) for t in chunk]
        return Read(flat, np.stack(maps), picture)

    def redraw(self) -> None:
        if self.data is not None:
            self.at.max, self.word.max = len(self.data.maps), max(1, len(words_of(self.data.tokens)))
        super().redraw()

    def figure(self) -> Figure:
        tokens, maps = self.data.tokens, self.data.maps
        at, chosen, words = self.at.value - 1, self.word.value - 1, words_of(tokens)
        panels = [(spelled(tokens, word), maps[at, word].sum(0)) for word in words]
        panels.append(("begin, end,\npadding", maps[at, [i for i, t in enumerate(tokens) if t.role != "text"]].sum(0)))
        rows = math.ceil((1 + len(panels)) / PANELS)
        fig = Figure(figsize=(WIDTH, 1.33 * (rows + 1) + 0.4), layout="constrained")
        top, bottom = fig.subfigures(2, 1, height_ratios=(rows, 1))
        top.suptitle(f"step {at + 1}: all words, each map from black (none) to its own brightest", size=9)
        axes = iter(top.subplots(rows, PANELS, squeeze=False).flat)
        panel(next(axes), self.data.picture, "the picture", "black")
        for k, (name, map_) in enumerate(panels):
            panel(next(axes), map_, f"{name}\n{map_.mean():.1%}", ORANGE if k == chosen else "black")
        for ax in axes:
            ax.axis("off")
        if words:
            name = spelled(tokens, words[chosen])
            bottom.suptitle(f"“{name}” from step to step", size=9, color=ORANGE)
            spread = np.unique(np.linspace(0, len(maps) - 1, PANELS).round().astype(int))
            for ax, k in zip(bottom.subplots(1, len(spread)), spread, strict=True):
                map_ = maps[k, words[chosen]].sum(0)
                panel(ax, map_, f"step {k + 1}\n{map_.mean():.1%}", "black")
        return fig

    def words(self) -> str:
        tokens, at, words = self.data.tokens, self.at.value - 1, words_of(self.data.tokens)
        said = [f"Step {at + 1} of {len(self.data.maps)}."]
        if words:
            word = words[self.word.value - 1]
            map_ = self.data.maps[at, word].sum(0)
            said.append(f"“{spelled(tokens, word)}” has {map_.mean():.1%} of the attention;")
            said.append(f"where it is read most, {contrast(map_):.1f} times as much as elsewhere.")
        rest = self.data.maps[at, [i for i, t in enumerate(tokens) if t.role != "text"]].sum(0).mean()
        return " ".join([*said, f"Begin, end and padding together have {rest:.1%}."])


def words_of(tokens: list[Token]) -> list[list[int]]:
    """For each word, the tokens that make it up."""
    out, open_ = [], False
    for i, t in enumerate(tokens):
        if t.role == "text":
            if open_:
                out[-1].append(i)
            else:
                out.append([i])
        open_ = t.role == "text" and not t.piece.endswith("</w>")
    return out


def spelled(tokens: list[Token], word: list[int]) -> str:
    return "".join(shown(tokens[i].piece) for i in word)


def contrast(map_: np.ndarray) -> float:
    """The mean of the brightest tenth, divided by the mean of the rest."""
    rising = np.sort(map_, axis=None)
    cut = len(rising) - math.ceil(len(rising) / 10)
    return rising[cut:].mean() / rising[:cut].mean()


def panel(ax: Axes, image, title: str, colour: str) -> None:
    ax.imshow(image, cmap="magma", vmin=0 if isinstance(image, np.ndarray) else None)
    ax.set_title(title, color=colour, size=8)
    ax.axis("off")
