"""Lesson 18, LoRAs with their scale: one that has a formula, one that was trained, and what it does to everything that
the words leave open."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import ipywidgets as w
import mlx.core as mx
import numpy as np
from matplotlib.figure import Figure
from mlx.utils import tree_flatten
from PIL import Image

from ... import surgery
from ...errors import Error
from ...families import QUICK
from ...train import judge, swap
from ...train import storybook as sb
from .editing import seen
from .guidance import changes
from .judging import read
from .latent import psnr
from .lesson import BLUE, GREEN, GREY, RED, Lesson, Report, seed_box
from .seeds import show

# ---- a LoRA that has a formula


SCALES = (0.0, 0.5, 1.0, 1.5)
THINGS = ("house", "castle", "balloon", "tent", "mushroom", "tree")


class Felt(NamedTuple):
    drawn: list[Image.Image]  # with the word that the adapter changes, at each of SCALES
    others: list[Image.Image]  # without it
    read: list[str]
    read_others: list[str]
    numbers: int  # in the adapter
    whole: int  # in the network


class Adapter(Lesson):
    title = "An adapter and its scale"
    idea = (
        "A LoRA is a small change of some weights. This one is so small that it need not be trained: it makes the "
        "model read one colour as another. Its scale says how much of the change is added."
    )
    trying = "Other colours. What lies beyond scale 1? Does the lower picture, with another colour, stay the same?"

    def __init__(self, word: str = "red", becomes: str = "blue", seed: int = 3, **options):
        self.word = w.Dropdown(options=sb.COLOURS, value=word, description="Read")
        self.becomes = w.Dropdown(options=sb.COLOURS, value=becomes, description="As")
        self.seed = seed_box(seed)
        asks = {"word": self.word, "becomes": self.becomes, "seed": self.seed}
        super().__init__(*asks.values(), asks=asks, **options)

    def work(self, pipe, report: Report, word: str, becomes: str, seed: int) -> Felt:
        if word == becomes:
            raise Error(f"{word} is {word} already.", "Choose two colours.")
        rest = [colour for colour in sb.COLOURS if colour not in (word, becomes)]
        source, target, stay = (
            [f"a {colour} {thing} by day" for colour in colours for thing in THINGS]
            for colours in ([word], [becomes], rest)
        )
        drawn, others = [], []
        with TemporaryDirectory() as folder:
            file = Path(folder) / "swap.safetensors"
            swap.write(file, pipe, source, target, [*stay, ""])
            numbers = sum(value.size for value in mx.load(str(file)).values())
            for scale in SCALES:
                for colour, pictures in ((word, drawn), (rest[0], others)):
                    prompt = f"a {colour} house on hills by day"
                    pictures.append(pipe(prompt, seed=seed, loras=[QUICK, f"{file}:{scale:g}"]).image)
                    report(len(drawn) + len(others), 2 * len(SCALES))
        net = sum(value.size for _, value in tree_flatten(surgery.unet(pipe).parameters()))
        return Felt(drawn, others, seen(drawn, "colour"), seen(others, "colour"), numbers, net)

    def figure(self) -> Figure:
        d = self.data
        fig = Figure(figsize=(7.6, 4.3), layout="constrained")
        for row, pictures, read_ in zip(
            fig.subplots(2, len(SCALES)), (d.drawn, d.others), (d.read, d.read_others), strict=True
        ):
            for ax, image, scale, word in zip(row, pictures, SCALES, read_, strict=True):
                show(ax, image, f"scale {scale:g}: {word}", BLUE if scale == 0 else "black")
        return fig

    def words(self) -> str:
        d = self.data
        shift = [changes(image, d.others[SCALES.index(0.0)]).mean() for image in d.others]
        said = ", ".join(f"{word} at {scale:g}" for scale, word in zip(SCALES, d.read, strict=True))
        return (
            f"{d.numbers:,} numbers beside the network's {d.whole:,}. “{self.asked['word']}” is read as "
            f"“{self.asked['becomes']}”, and the judge sees {said}. The picture that asks for another colour "
            f"changes by {shift[SCALES.index(1.0)]:.1f} of 255 at scale 1."
        )


# ---- a trained LoRA


STEPS = 10  # of the picture to compare with


class Turned(NamedTuple):
    bare: Image.Image  # at scale 0, with as few steps
    drawn: Image.Image
    whole: Image.Image  # by the model alone, with its own guidance and more steps
    calls: tuple[int, int]  # of the network, for the second and the third


class Scale(Lesson):
    title = "A trained LoRA, turned up"
    idea = (
        f"<code>{QUICK}</code> was trained to reach in four steps, without guidance, the picture that the model "
        "reaches in many with it. Its scale is a number like any other: it can be half, double or negative."
    )
    trying = "Find the scale that comes nearest to the picture on the right. Is it 1 for each seed?"

    def __init__(self, prompt: str = "a red house on a hill by day", scale: float = 1.0, seed: int = 5, **options):
        self.prompt = w.Text(prompt, description="Prompt", continuous_update=False)
        self.scale = w.FloatSlider(scale, min=-0.5, max=2, step=0.25, description="Scale", continuous_update=False)
        self.seed = seed_box(seed)
        asks = {"prompt": self.prompt, "scale": self.scale, "seed": self.seed}
        super().__init__(*asks.values(), asks=asks, **options)

    def work(self, pipe, report: Report, prompt: str, scale: float, seed: int) -> Turned:
        bare, drawn = (quick(pipe, prompt, each, seed) for each in (0.0, scale))
        report(1, 2)
        whole = pipe(prompt, seed=seed, steps=STEPS, loras=[])
        report(2, 2)
        calls = tuple(r.request.steps * pipe.description.passes(r.request) for r in (drawn, whole))
        return Turned(bare.image, drawn.image, whole.image, calls)

    def figure(self) -> Figure:
        d = self.data
        fig = Figure(figsize=(7.2, 2.95), layout="constrained")
        axes = fig.subplots(1, 3)
        few, many = d.calls
        names = (
            f"scale 0, {few} calls",
            f"scale {self.asked['scale']:g}, {few} calls",
            f"the model alone, {many} calls",
        )
        for ax, image, name in zip(axes, (d.bare, d.drawn, d.whole), names, strict=True):
            show(ax, image, name if image is d.whole else f"{name}\n{psnr(image, d.whole):.1f} dB from the right one")
        return fig

    def words(self) -> str:
        d = self.data
        return (
            f"“{self.asked['prompt']}”: at scale {self.asked['scale']:g} and {d.calls[0]} calls of the network "
            f"{psnr(d.drawn, d.whole):.1f} dB from what the model alone draws with {d.calls[1]}; at scale 0 "
            f"{psnr(d.bare, d.whole):.1f} dB."
        )


TURNS = (0.0, 1.0, 2.0)
SHADES = (GREY, GREEN, RED)  # of TURNS, in the titles and the bars
OPEN = ("time", "terrain", "sky", "colour")  # kinds of words that the prompt leaves open


class Drifted(NamedTuple):
    images: list[list[Image.Image]]  # for each of TURNS, from the same seeds
    named: list[float]  # the share in which the judge sees the object
    counts: list[dict[str, np.ndarray]]  # how often it sees each word of a kind
    drift: list[float]  # the share of words that differ from those at scale 0, as counts
    chance: list[float]  # what two sets would reach that differ by chance alone, in 19 of 20 cases
    steps: int  # of each picture


def quick(pipe, prompt: str, scale: float, seed: int, count: int = 1):
    """Pictures with the LoRA at a scale, and with the settings that its row brings."""
    return pipe(prompt, seed=seed, count=count, loras=[f"{QUICK}:{scale:g}"])


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """The share of words that must be exchanged to make the counts of two sets equal, over all kinds. a, b: (n, kinds),
    as many rows in both."""
    gap = 0
    for kind, x, y in zip(OPEN, a.T, b.T, strict=True):
        least = len(judge.WORDS[kind])
        gap += np.abs(np.bincount(x, minlength=least) - np.bincount(y, minlength=least)).sum() / 2
    return float(gap / a.size)


def by_chance(a: np.ndarray, b: np.ndarray) -> float:
    """`apart` of two sets made by shuffling these: 19 of 20 are not larger."""
    rng, both = np.random.default_rng(0), np.concatenate([a, b])
    shuffled = (rng.permutation(both) for _ in range(400))
    return float(np.quantile([apart(each[: len(a)], each[len(a) :]) for each in shuffled], 0.95))


class Drift(Lesson):
    title = "Drift"
    idea = (
        "The prompt names a thing and leaves the rest open. What fills the gap is the model's own habit. Does a LoRA "
        "change the habit as well?"
    )
    trying = "Another thing, more pictures. Does the drift grow with the scale, and is it more than chance?"

    def __init__(self, thing: str = "house", count: int = 6, seed: int = 200, **options):
        self.thing = w.Dropdown(options=sb.OBJECTS, value=thing, description="Thing")
        self.count = w.IntSlider(count, min=6, max=48, step=3, description="Pictures", continuous_update=False)
        self.seed = seed_box(seed, "First seed")
        asks = {"thing": self.thing, "count": self.count, "seed": self.seed}
        super().__init__(*asks.values(), asks=asks, **options)

    def work(self, pipe, report: Report, thing: str, count: int, seed: int) -> Drifted:
        referee, kinds = judge.load(judge.shipped()), [*judge.WORDS]
        images, found = [], []
        for scale in TURNS:
            images.append([])
            for first in range(seed, seed + count, 3):
                result = quick(pipe, f"a {thing}", scale, first, 3)
                images[-1] += result.images
                report(sum(map(len, images)), count * len(TURNS))
            found.append(judge.read(referee, read(images[-1])))
        open_ = [each[:, [kinds.index(kind) for kind in OPEN]] for each in found]
        return Drifted(
            images,
            [float((each[:, kinds.index("object")] == sb.OBJECTS.index(thing)).mean()) for each in found],
            [
                {k: np.bincount(col, minlength=len(judge.WORDS[k])) for k, col in zip(OPEN, each.T, strict=True)}
                for each in open_
            ],
            [apart(open_[0], each) for each in open_],
            [by_chance(open_[0], each) for each in open_],
            result.request.steps,
        )

    def figure(self) -> Figure:
        d, shown = self.data, min(6, len(self.data.images[0]))
        fig = Figure(figsize=(10, 4.3), layout="constrained")
        left, right = fig.subfigures(1, 2, width_ratios=(1.35, 1))
        for row, images, scale, named, shade in zip(
            left.subplots(len(TURNS), shown), d.images, TURNS, d.named, SHADES, strict=False
        ):
            for ax, image in zip(row, images, strict=False):
                show(ax, image, "")
            row[0].set_title(f"scale {scale:g}: a {self.asked['thing']} in {named:.0%}", loc="left", pad=3, color=shade)
        tall = 0.8 / len(TURNS)
        for ax, kind in zip(right.subplots(2, 2).flat, OPEN, strict=True):
            y = np.arange(len(judge.WORDS[kind]))
            for i, (shade, counts) in enumerate(zip(SHADES, d.counts, strict=False)):
                ax.barh(y + (i - (len(TURNS) - 1) / 2) * tall, counts[kind], tall, color=shade)
            ax.set_yticks(y, judge.WORDS[kind], fontsize=7)
            ax.invert_yaxis()
            ax.set_title(kind)
        return fig

    def words(self) -> str:
        d = self.data
        said = "; ".join(
            f"at {scale:g} the judge sees a {self.asked['thing']} in {named:.0%}, and {drift:.0%} of the open words "
            f"moved (by chance up to {chance:.0%})"
            for scale, named, drift, chance in zip(TURNS[1:], d.named[1:], d.drift[1:], d.chance[1:], strict=True)
        )
        return (
            f"“a {self.asked['thing']}”, {len(d.images[0])} pictures a scale from the same seeds, {d.steps} "
            f"steps without guidance. At scale 0 the judge sees a {self.asked['thing']} in {d.named[0]:.0%}; {said}."
        )
