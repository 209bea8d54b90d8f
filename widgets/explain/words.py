"""Lesson 7, text: where in the picture each word is read, step by step, and a picture in the place of words."""

import math
from typing import NamedTuple

import ipywidgets as w
import mlx.core as mx
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ... import surgery
from ...probe import Token, attention, tokens
from ...train import judge, swap
from ...train import storybook as sb
from .judging import read
from .lesson import ORANGE, Lesson, Report, played, seed_box
from .seeds import show
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


# ---- a picture in the place of words


FITTED, SIDE = 320, 128  # pictures with captions from which the map is fitted; pixels of those that it is tried with


class Borrowed(NamedTuple):
    captions: list[str]  # of the pictures; the network that draws never hears them
    pictures: list[Image.Image]
    drawn: list[Image.Image]
    right: list[int]  # of the six words of each caption, those that the judge sees in what was drawn


def fitted_map(seen: np.ndarray, said: np.ndarray, least: float = 0.03) -> tuple[np.ndarray, np.ndarray]:
    """A and b for which seen A + b is nearest to said, (n, d) to (n, e). least: how far A is held small, as a share of
    the mean square of what is seen, for pictures that are not among these."""
    middle, goal = seen.mean(0), said.mean(0)
    square = (seen - middle).T @ (seen - middle)
    square += least * np.trace(square) / len(square) * np.eye(len(square))
    a = np.linalg.solve(square, (seen - middle).T @ (said - goal))
    return a, goal - middle @ a


class PictureAsPrompt(Lesson):
    title = "A picture as a prompt"
    idea = (
        "A linear map is fitted now, from what the judge sees in pictures to what the text encoder says of their "
        "captions. Then a picture can stand in the place of the words."
    )
    trying = "Other pictures. What is taken over of each, and what is new? Then another seed: what stays?"

    def __init__(self, first: int = 0, count: int = 3, seed: int = 5, **options):
        self.first, self.seed = seed_box(first, "Pictures"), seed_box(seed)
        self.count = w.IntSlider(count, min=1, max=5, description="How many", continuous_update=False)
        asks = {"first": self.first, "count": self.count, "seed": self.seed}
        super().__init__(*asks.values(), asks=asks, **options)

    def work(self, pipe, report: Report, first: int, count: int, seed: int) -> Borrowed:
        referee, rng, own = judge.load(judge.shipped()), np.random.default_rng(18), np.random.default_rng([first, 18])
        scenes = [sb.sample(rng) for _ in range(FITTED)]
        said = swap.contexts(pipe, [sb.plain(scene) for scene in scenes])  # (n, N, d)
        seen = judge.features(referee, np.stack([sb.render(scene, rng, judge.SIDE) for scene in scenes]))
        a, b = fitted_map(seen, said.reshape(FITTED, -1))
        tried = [sb.sample(own) for _ in range(count)]
        pictures = np.stack([sb.render(scene, own, SIDE) for scene in tried])
        texts = (judge.features(referee, pictures) @ a + b).reshape(count, *said.shape[1:])
        net, drawn = surgery.unet(pipe), []
        for text in texts.astype(np.float32):
            with surgery.reading(net, surgery.readers(net), mx.array(text[None])):
                drawn.append(pipe("", seed=seed, steps=6).image)
            report(len(drawn), count)
        right = (judge.read(referee, read(drawn)) == judge.labels(tried)).sum(1)
        return Borrowed([sb.plain(scene) for scene in tried], [*map(Image.fromarray, pictures)], drawn, right.tolist())

    def figure(self) -> Figure:
        d = self.data
        fig = Figure(figsize=(1.9 * max(3, len(d.drawn)), 4.1), layout="constrained")
        for column, picture, image, right in zip(
            fig.subplots(2, max(3, len(d.drawn))).T, d.pictures, d.drawn, d.right, strict=False
        ):
            show(column[0], picture, "the picture")
            show(column[1], image, f"drawn from it: {right} of 6")
        for ax in fig.axes:
            ax.axis("off")
        return fig

    def words(self) -> str:
        said = "; ".join(f"{n} of “{caption}”" for n, caption in zip(self.data.right, self.data.captions, strict=True))
        return (
            f"The map was fitted from {FITTED} pictures and captions; these are others. No word was given. Of the six "
            f"words of each picture's caption, the judge sees in what was drawn: {said}."
        )
