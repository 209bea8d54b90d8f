"""Lesson 18, what is added to a model that stays as it is: a network that reads lines, and a learned word."""

from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import ipywidgets as w
import mlx.core as mx
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageFilter

from ... import builtin
from ...families import ADAPTERS, QUICK
from ...probe import tokens
from ...train import storybook as sb
from ...train.fit import write_arrays
from ...train.storybook.sketches import STROKES, sketch
from .editing import seen
from .lesson import GREY, ORANGE, Lesson, Report, seed_box
from .seeds import show

# ---- lines


EDGE = 16  # of 255, from one pixel to the next: from here on a change of brightness counts as an edge
NEAR = 3  # pixels
FEW = 5  # steps


def followed(image: Image.Image, lines: Image.Image) -> float:
    """The share of the lines that have an edge of the picture within so many pixels."""
    edges = np.hypot(*np.gradient(np.asarray(image.convert("L"), float))) > EDGE
    near = Image.fromarray((255 * edges).astype(np.uint8)).filter(ImageFilter.MaxFilter(2 * NEAR + 1))
    return float((np.asarray(near) > 0)[np.asarray(lines.convert("L")) > 127].mean())


class Lined(NamedTuple):
    lines: Image.Image
    bare: Image.Image  # the same request without the lines
    drawn: Image.Image
    read: list[str]  # the objects of both

    @property
    def followed(self) -> tuple[float, float]:
        return followed(self.bare, self.lines), followed(self.drawn, self.lines)


class FromLines(Lesson):
    title = "Lines say where"
    idea = (
        "A ControlNet is a second network beside the first. It reads a drawing, and its maps are added to those of the "
        "first, times its strength."
    )
    trying = "Turn the strength up slowly. Then let it guide the first fifth of the steps only: is that enough?"

    def __init__(
        self,
        drawing: str = "house",
        prompt: str = "by day",
        strength: float = 1.0,
        until: float = 1.0,
        seed: int = 3,
        **options,
    ):
        self.drawing = w.Dropdown(options=[*STROKES], value=drawing, description="Drawing")
        self.prompt = w.Text(prompt, description="Prompt", continuous_update=False)
        self.strength = w.FloatSlider(strength, min=0, max=1.5, step=0.25, description="Strength")
        shares = [(f"{k / FEW:.0%} of the steps", k / FEW) for k in range(1, FEW + 1)]
        self.until = w.SelectionSlider(options=shares, value=until, description="For the first")
        self.strength.continuous_update = self.until.continuous_update = False
        self.seed = seed_box(seed)
        asks = {"drawing": self.drawing, "prompt": self.prompt, "strength": self.strength, "until": self.until}
        asks["seed"] = self.seed
        super().__init__(*asks.values(), asks=asks, **options)

    def work(self, pipe, report: Report, drawing: str, prompt: str, strength: float, until: float, seed: int) -> Lined:
        size = pipe.resolve("").width
        lines, settings = sketch(drawing).resize((size, size)), {"seed": seed, "steps": FEW}
        bare = pipe(prompt, **settings).image
        report(1, 2)
        drawn = pipe(prompt, controls=[("sketch", lines, strength, 0.0, until)], **settings).image
        report(2, 2)
        return Lined(lines, bare, drawn, seen([bare, drawn], "object"))

    def figure(self) -> Figure:
        d = self.data
        fig = Figure(figsize=(8.4, 2.6), layout="constrained")
        axes = fig.subplots(1, 4)
        show(axes[0], d.lines, "the drawing")
        names = ("without it", f"strength {self.asked['strength']:g}")
        for ax, image, name, word, share in zip(axes[1:], (d.bare, d.drawn), names, d.read, d.followed, strict=False):
            show(ax, image, f"{name}: {word}\n{share:.0%} of the lines")
        over = np.asarray(d.drawn, np.uint8).copy()
        over[np.asarray(d.lines.convert("L")) > 127] = (255, 45, 135)
        show(axes[3], Image.fromarray(over), "the lines over it")
        return fig

    def words(self) -> str:
        d, (bare, drawn) = self.data, self.data.followed
        return (
            f"A {self.asked['drawing']} in lines, and the prompt “{self.asked['prompt']}”. Strength "
            f"{self.asked['strength']:g} for the first {self.asked['until']:.0%} of the steps: {drawn:.0%} of the "
            f"lines have an edge within {NEAR} pixels, and the judge sees a {d.read[1]}. Without the lines it is "
            f"{bare:.0%}, and a {d.read[0]}."
        )


# ---- a learned word


LENGTHS = (0.0, 0.5, 1.0, 2.5)  # of the vector, as multiples of its own
PLACES = (0.0, 0.5, 0.75, 1.0)  # on the way to another word
TEAL = next(row for (_, name), row in ADAPTERS.items() if name == "teal")
TAUGHT = TEAL.word


class Vectors(NamedTuple):
    near: list[tuple[str, float]]  # the words that the model knows, by cosine, the nearest first
    size: float  # the vector's length
    usual: float  # the middle length of those of known words
    longer: list[Image.Image]  # for each of LENGTHS
    between: list[Image.Image]  # for each of PLACES
    read: tuple[list[str], list[str]]  # colours
    teal: tuple[list[float], list[float]]  # shares of the pixels


def known(pipe) -> dict[str, np.ndarray]:
    """The vector of each word that is one token."""
    rows = np.array(pipe.networks.open("text_encoder").embeddings.token_embedding.weight.astype(mx.float32))
    found = {}
    for word in sorted(builtin.known_words()):
        ids = [token.id for token in tokens(pipe, word)[0] if token.role == "text"]
        if len(ids) == 1:
            found[word] = rows[ids[0]]
    return found


def teal(image: Image.Image) -> float:
    """The share of pixels with teal's hue."""
    hue, saturation, _ = np.moveaxis(np.asarray(image.convert("HSV")), -1, 0)
    return float(((hue > 158 / 360 * 255) & (hue < 198 / 360 * 255) & (saturation > 90)).mean())


class LearnedWord(Lesson):
    title = "A word is a place"
    idea = (
        f"The model has no word for teal. Training found one vector for <code>{escape(TAUGHT)}</code> and changed "
        "nothing else. Above it is made shorter and longer, below it is moved to another word."
    )
    trying = "Move it to another colour. Is there a middle, or does one word win at once?"

    def __init__(self, other: str = "red", thing: str = "house", seed: int = 3, **options):
        self.other = w.Dropdown(options=sb.COLOURS, value=other, description="To")
        self.thing = w.Dropdown(options=sb.OBJECTS, value=thing, description="Thing")
        self.seed = seed_box(seed)
        asks = {"other": self.other, "thing": self.thing, "seed": self.seed}
        super().__init__(*asks.values(), asks=asks, **options)

    def work(self, pipe, report: Report, other: str, thing: str, seed: int) -> Vectors:
        vector = np.array(mx.load(str(Path(builtin.__file__).parent / TEAL.file))[TAUGHT].astype(mx.float32)).reshape(
            -1
        )
        table = known(pipe)
        lengths = {word: float(np.linalg.norm(row)) for word, row in table.items()}
        size = float(np.linalg.norm(vector))
        cosines = [(word, float(row @ vector) / (lengths[word] * size)) for word, row in table.items()]
        drawn = []
        with TemporaryDirectory() as folder:
            tried = [k * vector for k in LENGTHS] + [(1 - k) * vector + k * table[other] for k in PLACES[1:]]
            for i, row in enumerate(tried):
                file = Path(folder) / f"{i}.safetensors"
                write_arrays(file, {TAUGHT: mx.array(row[None].astype(np.float32))}, {"format": "pt"})
                request = {"seed": seed, "loras": [QUICK], "embeddings": [str(file)]}
                drawn.append(pipe(f"a {TAUGHT} {thing} by day", **request).image)
                report(len(drawn), len(tried))
        longer = drawn[: len(LENGTHS)]
        rows = longer, [longer[LENGTHS.index(1.0)], *drawn[len(LENGTHS) :]]
        return Vectors(
            sorted(cosines, key=lambda pair: -pair[1])[:6],
            size,
            float(np.median([*lengths.values()])),
            *rows,
            tuple(seen(row, "colour") for row in rows),
            tuple([teal(image) for image in row] for row in rows),
        )

    def figure(self) -> Figure:
        d = self.data
        fig = Figure(figsize=(9, 4.2), layout="constrained")
        left, right = fig.subfigures(1, 2, width_ratios=(1, 2.7))
        ax = left.subplots()
        names, cosines = zip(*d.near, strict=True)
        ax.barh(names, cosines, color=[ORANGE if name in sb.COLOURS else GREY for name in names])
        ax.invert_yaxis()
        ax.set(title=f"cosine with {TAUGHT}", xlim=(min(0, *cosines), 1))
        heads = (
            [f"× {k:g}" for k in LENGTHS],
            [TAUGHT if k == 0 else self.asked["other"] if k == 1 else f"{k:.0%} of the way" for k in PLACES],
        )
        for row, images, head, words in zip(
            right.subplots(2, max(len(LENGTHS), len(PLACES))), (d.longer, d.between), heads, d.read, strict=True
        ):
            for one, image, name, word in zip(row, images, head, words, strict=False):
                show(one, image, f"{name}\njudge: {word}")
        return fig

    def words(self) -> str:
        d = self.data
        near = ", ".join(f"{word} {cosine:.2f}" for word, cosine in d.near)
        longer, between = (
            ", ".join(f"{word} and {share:.0%} at {k:g}" for k, word, share in zip(places, words, shares, strict=True))
            for places, words, shares in zip((LENGTHS, PLACES), d.read, d.teal, strict=True)
        )
        return (
            f"The nearest words of {TAUGHT}, by cosine: {near}. Its vector is {d.size:.2f} long, those of other words "
            f"{d.usual:.2f}. The colour that the judge, who knows no teal, sees, and the share of pixels with teal's "
            f"hue, by length: {longer}; on the way to {self.asked['other']}: {between}."
        )
