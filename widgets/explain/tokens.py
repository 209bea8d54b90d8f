"""Lesson 7, text: what happens to a prompt before the network reads it."""

from typing import NamedTuple

import ipywidgets as w
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from ...probe import Token, merges, tokens
from .lesson import BLUE, GREY, ORANGE, Lesson, Report

WIDTH, LETTER, GAP = 8.4, 0.09, 0.07  # inches: the width of the figure and of a letter in a box, the gap between boxes


class Box(NamedTuple):
    text: str
    below: str
    colour: str

    @property
    def width(self) -> float:
        return 0.16 + LETTER * max(3, len(self.text), 0.75 * len(self.below))


class Cut(NamedTuple):
    chunks: list[list[Token]]
    grown: list[list[list[str]]]  # for each word, the states in which its letters are merged into tokens


class Tokens(Lesson):
    title = "Tokens"
    idea = "The network reads numbers. A prompt is cut into pieces from a fixed list; each is known by its place in it."
    trying = (
        "Write a word that the model was never taught, such as <i>elephant</i>, and choose it: it stays in pieces. "
        "Give a word a weight, <code>(red:1.3)</code>. Write <code>BREAK</code>, or more words than there are places."
    )

    def __init__(self, prompt: str = "a (red:1.3) toadstool under a full moon", word: int = 3, **options):
        self.prompt = w.Text(prompt, description="Prompt", continuous_update=False)
        self.at = w.IntSlider(word, min=1, max=99, description="Word")
        super().__init__(self.prompt, self.at, asks={"prompt": self.prompt}, **options)

    def work(self, pipe, report: Report, prompt: str) -> Cut:
        return Cut(tokens(pipe, prompt), merges(pipe, prompt))

    def redraw(self) -> None:
        if self.data is not None:
            self.at.max = max(1, len(self.data.grown))
        super().redraw()

    def figure(self) -> Figure:
        lines: list[str | list[Box]] = []
        for k, chunk in enumerate(self.data.chunks, 1):
            alone = len(self.data.chunks) == 1
            lines += ["what the text encoder reads" if alone else f"chunk {k}, read by itself", *broken(boxes(chunk))]
        if self.data.grown:
            lines.append("the chosen word, from letters to tokens, one merge a line")
            lines += [line for state in self.grown() for line in broken([Box(shown(p), "", BLUE) for p in state])]
        heights = [0.3 if isinstance(line, str) or not line[0].below else 0.52 for line in lines]
        fig = Figure(figsize=(WIDTH, sum(heights) + 0.1))
        ax = fig.add_axes((0, 0, 1, 1))
        ax.set(xlim=(0, WIDTH), ylim=(sum(heights) + 0.1, 0))
        ax.axis("off")
        for line, y in zip(lines, np.cumsum([0.0, *heights[:-1]]), strict=True):
            if isinstance(line, str):
                ax.text(0.1, y + 0.2, line, weight="bold")
            else:
                draw(ax, line, y + 0.04)
        return fig

    def words(self) -> str:
        flat = [t for chunk in self.data.chunks for t in chunk]
        used, room = sum(t.role == "text" for t in flat), sum(t.role in ("text", "padding") for t in flat)
        chunks = "" if len(self.data.chunks) == 1 else f" of {len(self.data.chunks)} chunks"
        said = [f"{used} tokens in the {room} places{chunks}."]
        weighed = [f"{shown(t.piece)} counts {t.weight:.2f} times" for t in flat if t.weight != 1]
        said += [f"{', '.join(weighed)}."] if weighed else []
        if self.data.grown:
            *before, last = self.grown()
            pieces = "one token" if len(last) == 1 else f"{len(last)} tokens"
            said.append(f"{''.join(map(shown, last))}: {len(before)} merges make {pieces} of its letters.")
        return " ".join(said)

    def grown(self) -> list[list[str]]:
        """The states of the chosen word, from letters to tokens."""
        return self.data.grown[self.at.value - 1] if self.data.grown else []


def shown(piece: str) -> str:
    return piece.removesuffix("</w>")


def boxes(chunk: list[Token]) -> list[Box]:
    """One box for each token, and one for all padding."""
    out = []
    for t in chunk:
        if t.role == "text":
            weighed = t.weight != 1
            below = f"{t.id}, weight {t.weight:.2f}" if weighed else f"{t.id}"
            out.append(Box(shown(t.piece), below, ORANGE if weighed else BLUE))
        elif t.role != "padding":
            out.append(Box(t.role, f"{t.id}", GREY))
    padding = [t.id for t in chunk if t.role == "padding"]
    return out + ([Box(f"padding × {len(padding)}", f"{padding[0]}", GREY)] if padding else [])


def broken(line: list[Box]) -> list[list[Box]]:
    """Break a line of boxes into lines that fit the figure."""
    lines, left = [[]], WIDTH - 0.2
    for box in line:
        if box.width > left:
            lines.append([])
            left = WIDTH - 0.2
        lines[-1].append(box)
        left -= box.width + GAP
    return lines


def draw(ax: Axes, line: list[Box], y: float) -> None:
    x = 0.1
    for box in line:
        style = {"boxstyle": "round,pad=0,rounding_size=0.04", "lw": 0.8, "ec": box.colour, "fc": f"{box.colour}22"}
        ax.add_patch(FancyBboxPatch((x, y), box.width, 0.23, **style))
        ax.text(x + box.width / 2, y + 0.12, box.text, ha="center", va="center")
        ax.text(x + box.width / 2, y + 0.33, box.below, ha="center", va="center", color=GREY, size=7)
        x += box.width + GAP
