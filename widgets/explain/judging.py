"""Lesson 15, judging: one number for many pictures, obedience, bias, and marks of where a picture comes from."""

import io
from typing import NamedTuple

import ipywidgets as w
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageFilter

from ...errors import Error
from ...images import encoded, read_settings
from ...train import judge, measure
from ...train import storybook as sb
from .guidance import changes
from .lesson import BLUE, GREEN, GREY, RED, Lesson, Report, seed_box
from .seeds import show

SETS = (8, 16, 32, 64)  # pictures in each of two sets
BLURS = (0, 1, 2, 4)  # pixels
SIDE = 128  # of the pictures that the judge reads
FEW, ENOUGH = 2, 6  # steps


def read(images: list[Image.Image]) -> np.ndarray:
    """The pictures as the judge takes them."""
    return np.stack([np.asarray(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)) for image in images])


# --- one number for many pictures


class Distances(NamedTuple):
    by_size: list[float]  # between two sets of renders, for each of SETS
    by_blur: list[float]  # between renders and blurred renders, for each of BLURS
    pictures: list[Image.Image]  # one render, blurred


class Distance(Lesson):
    title = "One number for many pictures"
    idea = (
        "A network sees features in two sets of pictures; the Fréchet distance says how differently they are spread. "
        "FID is this, with another network."
    )
    trying = "Choose another seed. Which moves more: the distance of equal sets, or that of blurred ones?"

    def __init__(self, seed: int = 0, **options):
        self.seed = seed_box(seed)
        super().__init__(self.seed, asks={"seed": self.seed}, **options)

    def work(self, pipe, report: Report, seed: int) -> Distances:
        referee, rng, most = judge.load(judge.shipped()), np.random.default_rng(seed), SETS[-1]
        pictures = [sb.render(sb.sample(rng), rng, SIDE) for _ in range(2 * most)]
        report(1, 6)
        a, b = (judge.features(referee, np.stack(half)) for half in (pictures[:most], pictures[most:]))
        report(2, 6)
        by_blur = [judge.apart(a, b)]
        for k, radius in enumerate(BLURS[1:]):
            soft = np.stack([np.asarray(blurred(p, radius)) for p in pictures[:most]])
            by_blur.append(judge.apart(judge.features(referee, soft), b))
            report(3 + k, 6)
        by_size = [judge.apart(a[:n], b[:n]) for n in SETS]
        report(6, 6)
        return Distances(by_size, by_blur, [blurred(pictures[0], radius) for radius in BLURS])

    def figure(self) -> Figure:
        fig = Figure(figsize=(9, 2.5), layout="constrained")
        *axes, last = fig.subplots(1, 5, width_ratios=(1, 1, 1, 1, 1.7))
        for ax, image, radius, far in zip(axes, self.data.pictures, BLURS, self.data.by_blur, strict=True):
            show(ax, image, f"{f'blur {radius}' if radius else 'as it is'}\ndistance {far:,.0f}")
        last.plot(SETS, self.data.by_size, "o-", color=BLUE, ms=4)
        last.set_xscale("log", base=2)
        last.set_xticks(SETS, map(str, SETS))
        last.set(title="two equal sets: it should be 0", xlabel="pictures in each", ylim=(0, None))
        return fig

    def words(self) -> str:
        sizes = ", ".join(f"{far:,.0f} with {n}" for n, far in zip(SETS, self.data.by_size, strict=True))
        blurs = ", ".join(f"{far:,.0f} by {r}" for r, far in zip(BLURS[1:], self.data.by_blur[1:], strict=True))
        return (
            f"Two sets of pictures from the same program, so equally good: {sizes} in each. "
            f"One of two sets of {SETS[-1]} blurred: {blurs} pixels."
        )


def blurred(picture: np.ndarray, radius: int) -> Image.Image:
    return Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius))


# --- obedience


class Obeyed(NamedTuple):
    captions: list[str]
    drawn: dict[int, list[Image.Image]]  # steps -> a picture for each caption
    right: dict[int, np.ndarray]  # steps -> (captions, kinds of words)


class Obedience(Lesson):
    title = "What was asked"
    idea = "A judge, a network that was taught to name what is in such pictures, reads each: six words, right or wrong."
    trying = "Ask for more prompts. How many would you need to tell 90 % from 95 %?"

    def __init__(self, count: int = 3, **options):
        self.count = w.IntSlider(count, min=3, max=24, description="Prompts", continuous_update=False)
        super().__init__(self.count, asks={"count": self.count}, **options)

    def work(self, pipe, report: Report, count: int) -> Obeyed:
        referee, scenes = judge.load(judge.shipped()), measure.scenes(count)
        captions, drawn, done = [sb.plain(scene) for scene in scenes], {FEW: [], ENOUGH: []}, 0
        for steps, pictures in drawn.items():
            for k, caption in enumerate(captions):
                pictures.append(pipe(caption, seed=measure.SEED + k, steps=steps).image)
                done += 1
                report(done, 2 * count)
        truth = judge.labels(scenes)
        right = {steps: judge.read(referee, read(pictures)) == truth for steps, pictures in drawn.items()}
        return Obeyed(captions, drawn, right)

    def figure(self) -> Figure:
        shown = min(len(self.data.captions), 6)
        fig = Figure(figsize=(1.75 * shown, 4.8))
        place = fig.add_gridspec(2, shown, left=0.01, right=0.99, bottom=0.11, top=0.95, hspace=0.32, wspace=0.08)
        axes = place.subplots(squeeze=False)
        for row, (steps, pictures) in zip(axes, self.data.drawn.items(), strict=True):
            for k, ax in enumerate(row):
                show(ax, pictures[k], f"{steps} steps")
                for i, (kind, right) in enumerate(zip(judge.WORDS, self.data.right[steps][k], strict=True)):
                    where = (0.02 + 0.34 * (i % 3), -0.06 - 0.11 * (i // 3))
                    mark, colour = ("✓", GREEN) if right else ("✗", RED)
                    ax.text(*where, f"{mark} {kind}", color=colour, fontsize=7, va="top", transform=ax.transAxes)
        return fig

    def words(self) -> str:
        n = len(self.data.captions)
        said = [
            f"{r.all(1).sum()} of {n} with {steps} steps ({r.mean():.0%} of the words)"
            for steps, r in self.data.right.items()
        ]
        return f"The judge finds all six words in {' and '.join(said)}."


# --- bias


class Drawn(NamedTuple):
    images: list[Image.Image]
    counts: np.ndarray  # of the colours, in pictures where the judge sees the object
    trained: np.ndarray  # the share of each colour in training
    chance: float  # how far shares of as many pictures are from `trained` in one of 20 sets, by chance alone

    @property
    def far(self) -> float:
        """Half the sum of the differences of the shares: the part of the pictures that has another colour."""
        return float(np.abs(self.counts / max(self.counts.sum(), 1) - self.trained).sum() / 2)


class Bias(Lesson):
    title = "What it draws when you leave it open"
    idea = "The prompt says what, but no colour. A model has to choose; does it choose as its training pictures do?"
    trying = "Draw 64, then another thing. Is one colour preferred, or was that chance?"

    def __init__(self, thing: str = "house", count: int = 8, seed: int = 100, **options):
        self.thing = w.Dropdown(options=sb.OBJECTS, value=thing, description="Thing")
        self.count = w.IntSlider(count, min=8, max=96, step=8, description="Pictures", continuous_update=False)
        self.seed = seed_box(seed, "First seed")
        asks = {"thing": self.thing, "count": self.count, "seed": self.seed}
        super().__init__(*asks.values(), asks=asks, **options)

    def work(self, pipe, report: Report, thing: str, count: int, seed: int) -> Drawn:
        images = []
        for first in range(seed, seed + count, 8):
            images += pipe(f"a {thing}", seed=first, count=8, steps=4, guidance=1.0).images
            report(len(images), count)
        seen = judge.read(judge.load(judge.shipped()), read(images))
        kinds = list(judge.WORDS)
        named = seen[:, kinds.index("object")] == sb.OBJECTS.index(thing)
        counts = np.bincount(seen[named, kinds.index("colour")], minlength=len(sb.COLOURS))
        scenes = [s for s in sb.every() if s.object == thing and not sb.held_out(s)]
        trained = np.array([sum(s.colour == colour for s in scenes) for colour in sb.COLOURS]) / len(scenes)
        tries = np.random.default_rng(0).multinomial(max(counts.sum(), 1), trained, 4000) / max(counts.sum(), 1)
        chance = float(np.quantile(np.abs(tries - trained).sum(1) / 2, 0.95))
        return Drawn(images, counts, trained, chance)

    def figure(self) -> Figure:
        d = self.data
        fig = Figure(figsize=(9, 3.4), layout="constrained")
        left, right = fig.subplots(1, 2, width_ratios=(1.25, 1))
        across = int(np.ceil(np.sqrt(1.6 * len(d.images))))
        rows = [read(d.images[k : k + across]) for k in range(0, len(d.images), across)]
        sheet = np.full((len(rows) * SIDE, across * SIDE, 3), 255, np.uint8)
        for i, row in enumerate(rows):
            sheet[i * SIDE : (i + 1) * SIDE, : len(row) * SIDE] = np.concatenate(row, 1)
        show(left, Image.fromarray(sheet), f"“a {self.asked['thing']}”, no guidance")
        y = np.arange(len(sb.COLOURS))
        share = d.counts / max(d.counts.sum(), 1)
        tints = ["#e9e4da" if colour == "white" else colour for colour in sb.COLOURS]
        right.barh(y - 0.2, 100 * share, 0.4, color=tints, edgecolor=GREY, lw=0.5)
        right.barh(y + 0.2, 100 * d.trained, 0.4, color="none", edgecolor="black", lw=0.8, label="in training")
        right.set_yticks(y, sb.COLOURS)
        right.invert_yaxis()
        right.set(title="colours drawn (filled), in %")
        right.legend(fontsize=7, loc="lower right")
        return fig

    def words(self) -> str:
        d, total = self.data, self.data.counts.sum()
        said = ", ".join(f"{n} {colour}" for colour, n in zip(sb.COLOURS, d.counts, strict=True) if n)
        return (
            f"In {total} of {len(d.images)} pictures the judge sees a {self.asked['thing']}: {said}. "
            f"{d.far:.0%} of them would need another colour to be spread as in training; chance alone needs up to "
            f"{d.chance:.0%} in 19 of 20 such sets."
        )


# --- marks

STRENGTH = 3  # of 255, of the mark that is spread over the picture


class Marked(NamedTuple):
    plain: Image.Image
    marked: Image.Image
    copies: dict[str, Image.Image]
    left: list[tuple[bool, float, float]]  # for each copy: the settings, the share of the bits, the spread mark's score


def copies(picture: bytes) -> dict[str, bytes]:
    """What becomes of a PNG on its way through the world, each as a file."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    half = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS).resize(image.size)
    made = {"the file itself": picture}
    for name, each, kind, options in (
        ("saved again, as PNG", image, "PNG", {}),
        ("JPEG 90", image, "JPEG", {"quality": 90}),
        ("JPEG 50", image, "JPEG", {"quality": 50}),
        ("half the size and back", half, "PNG", {}),
    ):
        out = io.BytesIO()
        each.save(out, kind, **options)
        made[name] = out.getvalue()
    return made


def spread(shape: tuple[int, ...], key: int) -> np.ndarray:
    """A pattern of +1 and -1 in squares of 2 × 2 pixels that only the key tells."""
    h, wide, c = shape
    signs = np.random.default_rng(key).choice([-1.0, 1.0], (-(-h // 2), -(-wide // 2), 1))
    return np.repeat(signs.repeat(2, 0).repeat(2, 1)[:h, :wide], c, axis=2)


def score(pixels: np.ndarray, key: int) -> float:
    """How many standard errors the correlation with the key's pattern is above chance."""
    soft = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(2)), float)
    rest = (pixels - soft).mean(2, keepdims=True)[::2, ::2]
    pattern = spread(pixels.shape, key)[::2, ::2, :1]
    return float((rest * pattern).sum() / np.sqrt((rest**2).sum()))


class Marks(Lesson):
    title = "Marks of origin"
    idea = (
        "Three marks: the settings in the file, bits in the last digit of each value, a faint pattern over all of it."
    )
    trying = "Another key: the pattern of the wrong key finds nothing. Which mark would you trust, and against whom?"

    def __init__(self, prompt: str = "a lighthouse by the sea at sunset", seed: int = 3, key: int = 1, **options):
        self.prompt = w.Text(prompt, description="Prompt", continuous_update=False)
        self.seed, self.key = seed_box(seed), seed_box(key, "Key")
        asks = {"prompt": self.prompt, "seed": self.seed, "key": self.key}
        super().__init__(*asks.values(), asks=asks, **options)

    def work(self, pipe, report: Report, prompt: str, seed: int, key: int) -> Marked:
        result = pipe(prompt, seed=seed, steps=6)
        pixels = np.asarray(result.image)
        strong = np.clip(pixels + STRENGTH * spread(pixels.shape, key), 0, 255).round().astype(np.uint8)
        bits = np.random.default_rng(key).integers(0, 2, pixels.shape).astype(np.uint8)
        marked = Image.fromarray((strong & 254) | bits)
        made = copies(encoded(marked, result.request, result.model, result.recipe))
        images, left = {}, []
        for name, file in made.items():
            images[name] = Image.open(io.BytesIO(file)).convert("RGB")
            values = np.asarray(images[name])
            left.append((said(file), float(((values & 1) == bits).mean()), score(values, key)))
        report(1, 1)
        return Marked(result.image, marked, images, left)

    def figure(self) -> Figure:
        d = self.data
        fig = Figure(figsize=(10, 2.9), layout="constrained")
        axes = fig.subplots(1, 1 + len(d.copies))
        show(axes[0], d.plain, f"without marks\n{changes(d.plain, d.marked).mean():.1f} of 255 away")
        for ax, (name, image), (settings, bits, found) in zip(axes[1:], d.copies.items(), d.left, strict=True):
            show(ax, image, name)
            rows = (("settings", settings), (f"bits {bits:.0%}", bits > 0.75), (f"pattern {found:.0f}", found > 5))
            for k, (text, there) in enumerate(rows):
                mark, colour = ("✓", GREEN) if there else ("✗", RED)
                ax.text(
                    0.02, -0.06 - 0.14 * k, f"{mark} {text}", color=colour, fontsize=8, va="top", transform=ax.transAxes
                )
        return fig

    def words(self) -> str:
        parts = [
            f"{name}: settings {'read' if settings else 'gone'}, {bits:.0%} of the bits, pattern {found:.0f}"
            for name, (settings, bits, found) in zip(self.data.copies, self.data.left, strict=True)
        ]
        return f"{'; '.join(parts)}. Of the bits, chance gives 50%; a pattern is found above 5 standard errors."


def said(file: bytes) -> bool:
    """Whether the settings of a picture can be read in its file."""
    try:
        read_settings(io.BytesIO(file))
    except Error:
        return False
    return True
