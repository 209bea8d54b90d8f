"""Lesson 12, inside the network: a part is taken out, lied to, or given other words, and the same picture is drawn."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import ipywidgets as w
import mlx.core as mx
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ... import surgery
from ...probe import trace
from .guidance import changes
from .lesson import BLUE, GREY, ORANGE, Lesson, Report, seed_box
from .seeds import sharpness

STEPS = 4
PROMPT = "a red house on the left in the mountains at night under a full moon"


def drawn(pipe, prompt: str, seed: int, changed: AbstractContextManager) -> np.ndarray:
    """The latents of a picture that the changed network draws. Without guidance, which would hide what the change does
    behind what it does to the difference."""
    with changed:
        for step in trace(pipe, prompt, seed=seed, steps=STEPS, guidance=1):
            end = step.x0
    return end


def changed_by(image: Image.Image, whole: Image.Image) -> float:
    return float(changes(image, whole).mean())


class Parts(NamedTuple):
    whole: Image.Image
    without: dict[str, Image.Image]  # what is left out -> the picture


class TakenOut(Lesson):
    title = "Taken out"
    idea = "The same noise and the same words, drawn without one part of the network: what is missing is what it did."
    trying = "Take attention out instead: which block makes the layout? Then another prompt: do the same parts matter?"

    def __init__(self, what: str = "skips", prompt: str = PROMPT, seed: int = 7, **options):
        self.what = w.Dropdown(options=("skips", "attention"), value=what, description="Leave out")
        self.prompt = w.Text(prompt, description="Prompt", continuous_update=False)
        self.seed = seed_box(seed)
        asks = {"what": self.what, "prompt": self.prompt, "seed": self.seed}
        super().__init__(*asks.values(), asks=asks, **options)

    def work(self, pipe, report: Report, what: str, prompt: str, seed: int) -> Parts:
        net = surgery.unet(pipe)
        if what == "skips":
            levels = surgery.skips(net)
            of = {level: [i for i, each in enumerate(levels) if each == level] for level in levels}
            each = {f"skips of level {level}": surgery.cut(net, own) for level, own in of.items()}
            each["all skips"] = surgery.cut(net, range(len(levels)))
        else:
            each = {name: surgery.muted(net, [name]) for name in surgery.readers(net)}
        ends = [drawn(pipe, prompt, seed, nullcontext())]
        for changed in each.values():
            ends.append(drawn(pipe, prompt, seed, changed))
            report(len(ends), len(each) + 1)
        whole, *without = pipe.decode(np.concatenate(ends))
        return Parts(whole, dict(zip(each, without, strict=True)))

    def figure(self) -> Figure:
        panels = {"whole": self.data.whole} | {f"without\n{name}": image for name, image in self.data.without.items()}
        rows = 1 if len(panels) <= 6 else 2
        across = -(-len(panels) // rows)
        fig = Figure(figsize=(8.4, rows * (8.4 / across + 0.55)), layout="constrained")
        axes = fig.subplots(rows, across)
        for ax in axes.flat[len(panels) :]:
            ax.axis("off")
        for ax, (name, image) in zip(axes.flat, panels.items(), strict=False):
            ax.imshow(image)
            ax.set_title(name)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if image is not self.data.whole:
                ax.set_xlabel(f"changed by {changed_by(image, self.data.whole):.0f} of 255", fontsize=8)
        return fig

    def words(self) -> str:
        by = {name: changed_by(image, self.data.whole) for name, image in self.data.without.items()}
        most, least = max(by, key=by.__getitem__), min(by, key=by.__getitem__)
        said = ", ".join(f"{name} {value:.0f}" for name, value in by.items())
        return f"The picture's mean change, of 255, without {said}. Most without {most}, least without {least}."


SHIFTS = (-300, -100, 0, 100, 300)


class Lies(NamedTuple):
    pictures: list[Image.Image]  # at each of SHIFTS
    rough: list[float]  # the mean difference of neighbouring pixels


class LyingAboutTime(Lesson):
    title = "Lying about the time"
    idea = "The network is told how much noise there is. Here it is told wrong, in every step, and shown the truth."
    trying = "Which lie does more harm: less noise than there is, or more? Is it the same with other prompts?"

    def __init__(self, prompt: str = PROMPT, seed: int = 7, **options):
        self.prompt = w.Text(prompt, description="Prompt", continuous_update=False)
        self.seed = seed_box(seed)
        asks = {"prompt": self.prompt, "seed": self.seed}
        super().__init__(*asks.values(), asks=asks, **options)

    def work(self, pipe, report: Report, prompt: str, seed: int) -> Lies:
        net, ends = surgery.unet(pipe), []
        for by in SHIFTS:
            ends.append(drawn(pipe, prompt, seed, surgery.misled(net, by)))
            report(len(ends), len(SHIFTS))
        pictures = pipe.decode(np.concatenate(ends))
        return Lies(pictures, [sharpness(image) for image in pictures])

    def figure(self) -> Figure:
        fig = Figure(figsize=(8.4, 2.25), layout="constrained")
        for ax, by, image, rough in zip(fig.subplots(1, len(SHIFTS)), SHIFTS, *self.data, strict=True):
            ax.imshow(image)
            ax.set_title(f"t {by:+d}" if by else "the truth", weight="normal" if by else "bold")
            ax.set_xlabel(f"roughness {rough:.1f}", fontsize=8)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        return fig

    def words(self) -> str:
        told = [f"{rough:.1f} at t {by:+d}" for by, rough in zip(SHIFTS, self.data.rough, strict=True)]
        return f"Neighbouring pixels differ, of 255, by {', '.join(told)}. At +0 it is told the truth."


class Votes(NamedTuple):
    one: Image.Image
    other: Image.Image
    swapped: dict[str, Image.Image]  # block that reads the other prompt -> the picture
    share: dict[str, float]  # how far it has gone from the one picture to the other


class WhoDecides(Lesson):
    title = "Who decides"
    idea = "Two prompts, from the same noise. One block alone reads the second: how far does the picture follow it?"
    trying = "Let the prompts differ in the time of day instead, or in the object: does another block decide?"

    def __init__(self, prompt: str = PROMPT, other: str = PROMPT.replace("red", "blue"), seed: int = 7, **options):
        wide = {"continuous_update": False, "layout": w.Layout(width="36em", max_width="96%")}
        self.prompt = w.Text(prompt, description="Prompt", **wide)
        self.other = w.Text(other, description="Other", **wide)
        self.seed = seed_box(seed)
        asks = {"prompt": self.prompt, "other": self.other, "seed": self.seed}
        super().__init__(*asks.values(), asks=asks, **options)

    def work(self, pipe, report: Report, prompt: str, other: str, seed: int) -> Votes:
        net = surgery.unet(pipe)
        (text,) = pipe.read([other], pipe.resolve(other), t5=False)
        mx.eval(text.context)
        names = surgery.readers(net)
        ends = [drawn(pipe, p, seed, nullcontext()) for p in (prompt, other)]
        for name in names:
            ends.append(drawn(pipe, prompt, seed, surgery.reading(net, [name], text.context)))
            report(len(ends), len(names) + 2)
        a, b, *rest = ends
        way = b - a
        shares = [float(((x - a) * way).sum() / max((way**2).sum(), 1e-9)) for x in rest]
        one, two, *pictures = pipe.decode(np.concatenate(ends))
        return Votes(one, two, dict(zip(names, pictures, strict=True)), dict(zip(names, shares, strict=True)))

    def figure(self) -> Figure:
        d = self.data
        fig = Figure(figsize=(8.4, 5.6), layout="constrained")
        top, bottom = fig.subfigures(2, 1, height_ratios=(2, 1))
        panels = {"the prompt": d.one} | {f"{name} reads\nthe other": p for name, p in d.swapped.items()}
        panels["the other"] = d.other
        axes = top.subplots(2, -(-len(panels) // 2))
        for ax in axes.flat:
            ax.axis("off")
        for ax, (name, image) in zip(axes.flat, panels.items(), strict=False):
            ax.imshow(image)
            ax.set_title(name)
        ax = bottom.subplots()
        most = max(d.share, key=d.share.__getitem__)
        colours = [ORANGE if name == most else BLUE for name in d.share]
        bars = ax.bar(list(d.share), list(d.share.values()), color=colours)
        ax.bar_label(bars, [percent(v) for v in d.share.values()], fontsize=8)
        ax.axhline(0, color=GREY, lw=0.8)
        ax.set_title("how far the picture follows the one block, in % of the way to the other picture")
        ax.set_yticks([])
        ax.margins(y=0.2)
        return fig

    def words(self) -> str:
        d = self.data
        said = ", ".join(f"{name} {percent(share)}" for name, share in d.share.items())
        most = max(d.share, key=d.share.__getitem__)
        return (
            f"Of the way from “{self.asked['prompt']}” to “{self.asked['other']}” the picture goes, if one block alone "
            f"reads the other: {said}. Most by {most}. The sum is {percent(sum(d.share.values()))}: "
            "near 100% the blocks' shares simply add up."
        )


def percent(share: float) -> str:
    return f"{round(100 * share)}%"  # never -0%
