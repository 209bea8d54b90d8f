"""Lesson 17, editing: a picture taken back to noise, a start picture, and a part drawn anew. What stays is measured in
decibels, and what was asked for by the judge."""

from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import ipywidgets as w
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ...probe import encode, sides
from ...schedules import sigmas
from ...train import judge
from ...train import storybook as sb
from .guidance import changes
from .judging import read
from .latent import psnr
from .lesson import GREEN, RED, Lesson, Report, seed_box
from .seeds import show

KINDS = ("colour", "object", "sky", "terrain")  # of words that can be changed


class Case(NamedTuple):
    picture: Image.Image  # by the program that drew the training pictures, so the model did not draw it
    caption: str
    other: str  # the caption with one word changed
    kind: str
    word: str  # the new one


def case(pipe, seed: int, kind: str) -> Case:
    """A picture and what is to be changed in it."""
    rng, size, others = np.random.default_rng([seed, 17]), pipe.resolve("").width, []
    while not others:  # a boat, for one, has no other ground than the sea
        scene = sb.sample(rng)
        changed = [replace(scene, **{kind: word}) for word in judge.WORDS[kind] if word != getattr(scene, kind)]
        others = [each for each in changed if sb.valid(each) and not sb.held_out(each)]
    picture, other = Image.fromarray(sb.render(scene, rng, size)), others[seed % len(others)]
    return Case(picture, sb.plain(scene), sb.plain(other), kind, getattr(other, kind))


def seen(images: list[Image.Image], kind: str) -> list[str]:
    """What the judge sees in pictures, of one kind of word."""
    found = judge.read(judge.load(judge.shipped()), read(images))
    return [judge.WORDS[kind][row[[*judge.WORDS].index(kind)]] for row in found]


# ---- there and back


class Trip(NamedTuple):
    case: Case
    coded: Image.Image  # through the autoencoder and back, without noise: nothing can be nearer
    noise: np.ndarray  # (h, w, c): where the picture came from
    back: Image.Image
    changed: Image.Image
    read: str  # of the changed picture


def inverted(look, x: np.ndarray, levels: list[float], least: float) -> np.ndarray:
    """The steps of DDIM backwards, from clean latents to noise. The answer is asked for at the level that a step
    leaves, since the point to which it goes is not known yet. least: the lowest level that the network knows."""
    for high, low in reversed([*pairwise(levels)]):
        known = max(low, least)
        x = x + (high - low) * (x - look(x, known)) / known
    return x


def walked(look, x: np.ndarray, levels: list[float]) -> np.ndarray:
    """The steps of DDIM from noise to clean latents."""
    for high, low in pairwise(levels):
        x = x + (low - high) * (x - look(x, high)) / high
    return x


class ThereAndBack(Lesson):
    title = "There and back"
    idea = (
        "Without fresh noise every step can be taken backwards. So a picture that the model never drew can be led to "
        "the noise that it would have come from, and from there to another picture."
    )
    trying = "More steps: how near does it come? Then change another kind of word: what else has changed with it?"

    def __init__(self, scene: int = 1, kind: str = "colour", steps: int = 16, **options):
        self.scene = seed_box(scene, "Picture")
        self.kind = w.Dropdown(options=KINDS, value=kind, description="Change the")
        self.steps = w.SelectionSlider(options=(4, 8, 16, 32, 64), value=steps, description="Steps")
        self.steps.continuous_update = False
        asks = {"scene": self.scene, "kind": self.kind, "steps": self.steps}
        super().__init__(*asks.values(), asks=asks, **options)

    def work(self, pipe, report: Report, scene: int, kind: str, steps: int) -> Trip:
        it, done = case(pipe, scene, kind), 0
        z = encode(pipe, it.picture)
        request = pipe.resolve("", steps=steps)
        schedule = pipe.description.noise_levels(request)
        levels = sigmas(schedule, request.schedule, steps)

        def asked(prompt: str):
            _, look = sides(pipe, prompt, guidance=2.0)

            def counted(x: np.ndarray, sigma: float) -> np.ndarray:
                nonlocal done
                done += 1
                report(done, 3 * steps)
                return look(x.astype(np.float32), float(sigma))

            return counted

        own, new = asked(it.caption), asked(it.other)
        x = inverted(own, z, levels, schedule.sigmas[0])
        ends = [walked(look, x, levels) for look in (own, new)]
        coded, back, changed = pipe.decode(np.concatenate([z, *ends]).astype(np.float32))
        (word,) = seen([changed], kind)
        return Trip(it, coded, x[0] / np.sqrt(1 + levels[0] ** 2), back, changed, word)

    def figure(self) -> Figure:
        d = self.data
        fig = Figure(figsize=(8.4, 2.75), layout="constrained")
        fig.suptitle(f"{d.case.caption}\n→ {d.case.other}", style="italic", fontsize=10)
        axes = fig.subplots(1, 4)
        show(axes[0], d.case.picture, "the picture")
        grey = d.noise.mean(-1) * np.sqrt(d.noise.shape[-1])  # as spread as one channel
        axes[1].imshow(grey, cmap="gray", vmin=-2, vmax=2)
        axes[1].set_title(f"its noise, of size {d.noise.std():.2f}", pad=3)
        axes[1].axis("off")
        show(axes[2], d.back, f"and back: {psnr(d.back, d.case.picture):.1f} dB")
        show(axes[3], d.changed, f"back with “{d.case.word}”: {psnr(d.changed, d.case.picture):.1f} dB")
        return fig

    def words(self) -> str:
        d = self.data
        return (
            f"“{d.case.caption}”: through {self.asked['steps']} steps to noise of size {d.noise.std():.2f} and back "
            f"with {psnr(d.back, d.coded):.1f} dB of what the autoencoder makes of it, which is itself "
            f"{psnr(d.coded, d.case.picture):.1f} dB from the picture. Back with “{d.case.word}” it is "
            f"{psnr(d.changed, d.case.picture):.1f} dB from the picture, and the judge sees {d.read}."
        )


# ---- a start picture


STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
STEPS = 5


class Begun(NamedTuple):
    case: Case
    drawn: list[Image.Image]
    read: list[str]


class Strength(Lesson):
    title = "How much is drawn anew"
    idea = (
        "A start picture is mixed with noise, and the steps begin there. The strength is the share of the steps that "
        "are left: more of them change more, and keep less."
    )
    trying = (
        "Change the sky, then the object. From which strength on does each follow the words, and what is lost by then?"
    )

    def __init__(self, scene: int = 1, kind: str = "sky", seed: int = 5, **options):
        self.scene, self.seed = seed_box(scene, "Picture"), seed_box(seed)
        self.kind = w.Dropdown(options=KINDS, value=kind, description="Change the")
        asks = {"scene": self.scene, "kind": self.kind, "seed": self.seed}
        super().__init__(*asks.values(), asks=asks, **options)

    def work(self, pipe, report: Report, scene: int, kind: str, seed: int) -> Begun:
        it, drawn = case(pipe, scene, kind), []
        for strength in STRENGTHS:
            drawn.append(pipe(it.other, image=it.picture, strength=strength, seed=seed, steps=STEPS).image)
            report(len(drawn), len(STRENGTHS))
        return Begun(it, drawn, seen(drawn, kind))

    def figure(self) -> Figure:
        d = self.data
        fig = Figure(figsize=(10, 2.4), layout="constrained")
        fig.suptitle(d.case.other, style="italic", fontsize=10)
        first, *axes = fig.subplots(1, 1 + len(STRENGTHS))
        show(first, d.case.picture, "the picture")
        for ax, image, strength, word in zip(axes, d.drawn, STRENGTHS, d.read, strict=True):
            show(ax, image, f"strength {strength:g}: {psnr(image, d.case.picture):.0f} dB")
            right = word == d.case.word
            mark = f"{'✓' if right else '✗'} {word}"
            ax.text(0.5, -0.05, mark, color=GREEN if right else RED, ha="center", va="top", transform=ax.transAxes)
        return fig

    def words(self) -> str:
        d = self.data
        said = [
            f"{psnr(image, d.case.picture):.1f} dB and {word} at {strength:g}"
            for image, strength, word in zip(d.drawn, STRENGTHS, d.read, strict=True)
        ]
        what = f"What is kept of the picture, and the {d.case.kind} that the judge sees"
        return f"“{d.case.other}”. {what}: {', '.join(said)}."


# ---- a part


AREAS = {
    "left half": (0, 0, 0.5, 1),
    "right half": (0.5, 0, 1, 1),
    "upper half": (0, 0, 1, 0.5),
    "middle": (0.25, 0.2, 0.75, 0.9),
}


class Part(NamedTuple):
    case: Case
    mask: Image.Image  # white where it is drawn anew
    masked: Image.Image
    whole: Image.Image  # the same request without the mask


class OnlyAPart(Lesson):
    title = "Only a part"
    idea = (
        "After each step everything outside the mask is put back as it was, with as much noise as the step left. So "
        "the part that is drawn anew sees the rest, and fits it."
    )
    trying = "Another part. Look at the edge: what tells you where it was?"

    def __init__(self, scene: int = 1, kind: str = "sky", area: str = "upper half", seed: int = 5, **options):
        self.scene, self.seed = seed_box(scene, "Picture"), seed_box(seed)
        self.kind = w.Dropdown(options=KINDS, value=kind, description="Change the")
        self.area = w.Dropdown(options=[*AREAS], value=area, description="In the")
        asks = {"scene": self.scene, "kind": self.kind, "area": self.area, "seed": self.seed}
        super().__init__(*asks.values(), asks=asks, **options)

    def work(self, pipe, report: Report, scene: int, kind: str, area: str, seed: int) -> Part:
        it = case(pipe, scene, kind)
        size = it.picture.width
        mask = Image.new("L", it.picture.size)
        mask.paste(255, tuple(round(part * size) for part in AREAS[area]))
        settings = {"image": it.picture, "strength": 1.0, "seed": seed, "steps": STEPS}
        masked = pipe(it.other, mask=mask, **settings).image
        report(1, 2)
        whole = pipe(it.other, **settings).image
        report(2, 2)
        return Part(it, mask, masked, whole)

    def inside(self) -> np.ndarray:
        return np.asarray(self.data.mask) > 0

    def figure(self) -> Figure:
        d = self.data
        fig = Figure(figsize=(8.4, 2.5), layout="constrained")
        fig.suptitle(d.case.other, style="italic", fontsize=10)
        axes = fig.subplots(1, 4)
        tinted = np.asarray(d.case.picture, np.float64).copy()
        tinted[self.inside()] = 0.55 * tinted[self.inside()] + 0.45 * np.array((255, 45, 135))
        show(axes[0], Image.fromarray(tinted.round().astype(np.uint8)), "the picture, and the part")
        show(axes[1], d.masked, "the part drawn anew")
        show(axes[2], d.whole, "all of it drawn anew")
        axes[3].imshow(changes(d.masked, d.case.picture), cmap="magma")
        axes[3].set_title("what the part changed", pad=3)
        axes[3].axis("off")
        return fig

    def words(self) -> str:
        d, inside = self.data, self.inside()
        by, whole = (changes(image, d.case.picture) for image in (d.masked, d.whole))
        return (
            f"“{d.case.other}” in the {self.asked['area']}: pixels change by {by[inside].mean():.1f} of 255 inside, "
            f"and {(by[~inside] > 0).mean():.0%} of those outside change at all. Without a mask they change by "
            f"{whole[inside].mean():.1f} inside and by {whole[~inside].mean():.1f} outside."
        )
