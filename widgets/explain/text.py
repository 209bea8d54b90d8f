"""Lesson 7, text: what becomes of a prompt before the network reads it, and where in the picture each word is read."""

import math
from typing import NamedTuple

import ipywidgets as w
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image

from ...probe import Token, attention, merges, tokens
from .lesson import BLUE, GREY, ORANGE, Lesson, Told

WIDTH, LETTER, GAP = 8.4, 0.09, 0.07  # inches: of the figure, of a letter in a box, between boxes
PANELS = 9  # maps in a row


class Box(NamedTuple):
    text: str
    below: str
    colour: str

    @property
    def width(self) -> float:
        return 0.16 + LETTER * max(3, len(self.text), 0.75 * len(self.below))


class Cut(NamedTuple):
    chunks: list[list[Token]]
    grown: list[list[list[str]]]  # of each word, how its letters grew into tokens


class Tokens(Lesson):
    title = "Tokens"
    idea = "The network reads numbers. A prompt is cut into pieces from a fixed list; each is known by its place in it."
    trying = (
        "Write a word that the model was never taught, such as <i>elephant</i>, and choose it: it stays in pieces. "
        "Weigh a word, <code>(red:1.3)</code>. Write <code>BREAK</code>, or more words than there are places."
    )

    def __init__(self, prompt: str = "a (red:1.3) toadstool under a full moon", word: int = 3, **options):
        self.prompt = w.Text(prompt, description="Prompt", continuous_update=False, layout=w.Layout(width="36em"))
        self.at = w.IntSlider(word, min=1, max=99, description="Word")
        super().__init__(self.prompt, self.at, asks=(self.prompt,), **options)

    def settings(self) -> dict:
        return {"prompt": self.prompt.value}

    def work(self, pipe, told: Told, prompt: str) -> Cut:
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
        """The states of the chosen word."""
        return self.data.grown[self.at.value - 1] if self.data.grown else []


def shown(piece: str) -> str:
    return piece.removesuffix("</w>")


def boxes(chunk: list[Token]) -> list[Box]:
    """One for each token; one for all padding."""
    own = []
    for t in chunk:
        if t.role == "text":
            weighed = t.weight != 1
            below = f"{t.id}, weight {t.weight:.2f}" if weighed else f"{t.id}"
            own.append(Box(shown(t.piece), below, ORANGE if weighed else BLUE))
        elif t.role != "padding":
            own.append(Box(t.role, f"{t.id}", GREY))
    padding = [t.id for t in chunk if t.role == "padding"]
    return own + ([Box(f"padding × {len(padding)}", f"{padding[0]}", GREY)] if padding else [])


def broken(line: list[Box]) -> list[list[Box]]:
    """Into lines that fit."""
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

    def __init__(self, prompt: str = "a red house under a full moon", seed: int = 7, steps: int = 16, **options):
        self.prompt = w.Text(prompt, description="Prompt", continuous_update=False)
        self.seed = w.BoundedIntText(seed, min=0, max=2**31 - 1, description="Seed")
        self.steps = w.IntSlider(steps, min=4, max=50, description="Steps", continuous_update=False)
        self.word = w.IntSlider(3, min=1, max=99, description="Word")
        self.at = w.IntSlider(steps, min=1, max=steps, description="Step")
        play = w.Play(min=1, max=steps, interval=500)
        w.jslink((play, "value"), (self.at, "value"))
        w.jslink((self.at, "max"), (play, "max"))
        asks = (self.prompt, self.seed, self.steps)
        super().__init__(*asks, self.word, w.HBox([play, self.at]), asks=asks, **options)

    def settings(self) -> dict:
        return {"prompt": self.prompt.value, "seed": self.seed.value, "steps": self.steps.value}

    def work(self, pipe, told: Told, prompt: str, seed: int, steps: int) -> Read:
        maps = []
        for seen in attention(pipe, prompt, seed=seed, steps=steps):
            maps.append(seen.maps)
            told(seen.step.step, seen.step.steps)
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
        fig = Figure(figsize=(WIDTH, 1.45 * (rows + 1) + 0.5), layout="constrained")
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
    """Which tokens make up each word."""
    found, open_ = [], False
    for i, t in enumerate(tokens):
        if t.role == "text":
            if open_:
                found[-1].append(i)
            else:
                found.append([i])
        open_ = t.role == "text" and not t.piece.endswith("</w>")
    return found


def spelled(tokens: list[Token], word: list[int]) -> str:
    return "".join(shown(tokens[i].piece) for i in word)


def contrast(map_: np.ndarray) -> float:
    """The mean of the brightest tenth over the mean of the rest."""
    rising = np.sort(map_, axis=None)
    cut = len(rising) - math.ceil(len(rising) / 10)
    return rising[cut:].mean() / rising[:cut].mean()


def panel(ax: Axes, image, title: str, colour: str) -> None:
    ax.imshow(image, cmap="magma", vmin=0 if isinstance(image, np.ndarray) else None)
    ax.set_title(title, color=colour, size=8)
    ax.axis("off")
