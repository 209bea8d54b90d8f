"""Lesson 6, latent space: what the few numbers mean that diffusion works on, and what is lost by using them."""

import io
import math
from collections.abc import Callable
from typing import NamedTuple

import ipywidgets as w
import matplotlib as mpl
import numpy as np
from matplotlib.cbook import get_sample_data
from matplotlib.figure import Figure
from PIL import Image

from ...images import to_pixels
from ...probe import encode
from ...train.recipe import CELL, SIZE, VAE
from ...train.storybook import render, sample
from .forward import square
from .guidance import changes
from .lesson import Lesson, Report

SIDE, CHANNELS = SIZE, VAE.seen  # the edge of the model's pictures, in pixels; the numbers at each place of its latents
READ = 8  # the number of pictures that the correlations are taken over
QUALITIES = ("brightness", "red − green", "yellow − blue", "brighter to the right", "brighter below")


def scene(seed: int) -> Image.Image:
    """A picture of the storybook world that was not used in training."""
    rng = np.random.default_rng([6, seed])
    return Image.fromarray(render(sample(rng), rng, SIDE))


def scene_slider(seed: int) -> w.IntSlider:
    return w.IntSlider(seed, min=1, max=50, description="Scene", continuous_update=False)


def to_colours(latents: np.ndarray, picture: Image.Image) -> Callable[[np.ndarray], np.ndarray]:
    """A function that shows latents (h, w, c) as colours, by the linear map that fits this picture's latents best."""
    h, wide, c = latents.shape
    seen = to_pixels(picture.resize((wide, h), Image.Resampling.BOX)).reshape(-1, 3)
    inputs = np.concatenate([latents.reshape(-1, c), np.ones((h * wide, 1))], 1)
    fitted = np.linalg.lstsq(inputs, seen, rcond=None)[0]
    return lambda z: np.clip((z @ fitted[:-1] + fitted[-1]) / 2 + 0.5, 0, 1)


# --- the channels


class Read(NamedTuple):
    image: Image.Image
    latents: np.ndarray  # (h, w, c)
    table: np.ndarray  # (c + 1, qualities): correlations of each channel, and last of their best weighted sum


class Channels(Lesson):
    title = "The channels"
    idea = f"Diffusion works on a small map with {CHANNELS} numbers at each place. The VAE paints the picture from it."
    trying = "Go through the scenes: which channel shows day and night, which the colour of the house?"

    def __init__(self, seed: int = 3, **options):
        self.scene = scene_slider(seed)
        self._table: np.ndarray | None = None
        super().__init__(self.scene, asks={"seed": self.scene}, **options)

    def work(self, pipe, report: Report, seed: int) -> Read:
        if self._table is None:
            images, latents = [scene(1000 + i) for i in range(READ)], []
            for i, image in enumerate(images):
                latents.append(encode(pipe, image)[0])
                report(i + 1, READ + 1)
            self._table = correlations(np.stack(latents), np.stack([qualities(image) for image in images]))
        image = scene(seed)
        return Read(image, encode(pipe, image)[0], self._table)

    def figure(self) -> Figure:
        d, most = self.data, np.abs(self.data.latents).max()
        channels = d.latents.shape[-1]
        rows = -(-channels // 4)
        fig = Figure(figsize=(7.8, 2.7 + 1.7 * rows), layout="constrained")
        top, bottom = fig.subfigures(2, 1, height_ratios=(0.8 * rows, 0.5 + 0.15 * channels))
        grid = top.add_gridspec(rows, rows + 4)
        first = top.add_subplot(grid[:, :rows])
        first.imshow(d.image)
        first.set_title("the picture")
        axes = [top.add_subplot(grid[i // 4, rows + i % 4]) for i in range(channels)]
        for i, ax in enumerate(axes):
            shown = ax.imshow(d.latents[..., i], cmap="RdBu_r", vmin=-most, vmax=most)
            ax.set_title(f"channel {i + 1}")
        for ax in (first, *axes):
            ax.axis("off")
        top.colorbar(shown, ax=axes, shrink=0.75)
        ax = bottom.subplots()
        ax.imshow(d.table, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        for (i, j), r in np.ndenumerate(d.table):
            ax.text(j, i, f"{r:+.2f}", ha="center", va="center", color="white" if abs(r) > 0.6 else "black")
        ax.set_xticks(range(len(QUALITIES)), QUALITIES)
        ax.set_yticks(range(channels + 1), [*(f"channel {i + 1}" for i in range(channels)), "best weighted sum"])
        ax.axhline(channels - 0.5, color="white", lw=4)
        ax.set_title(f"correlation with what {CELL} × {CELL} pixels look like, over {READ} pictures")
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        return fig

    def words(self) -> str:
        pixels, latents = math.prod(np.asarray(self.data.image).shape), self.data.latents.size
        said = []
        for i, row in enumerate(self.data.table[:-1]):
            j = int(np.abs(row).argmax())
            said.append(f"{i + 1} most with “{QUALITIES[j]}” ({row[j]:+.2f})")
        return (
            f"{pixels:,} numbers in the picture, {latents:,} in its latents: {pixels / latents:g} times fewer. "
            f"At 8 bits a pixel's colour and 16 bits a latent, {pixels:,} bytes and {2 * latents:,}: "
            f"{pixels / latents / 2:g} times. The channels go together: {', '.join(said)}."
        )


# --- moving a channel


class Nudged(NamedTuple):
    before: Image.Image
    after: Image.Image
    spread: float  # the channel's standard deviation in this picture: the unit of the amount


class Nudge(Lesson):
    title = "Moving a channel"
    idea = "Change latents by hand and let the VAE paint: the change in the picture shows what they stood for."
    trying = "Move each channel everywhere. Then move one place only: how far does the change reach?"

    def __init__(
        self,
        seed: int = 3,
        channel: int = CHANNELS,
        amount: float = 2.0,
        place: tuple[int, int] | None = None,  # row and column, counted from 1; None means everywhere
        **options,
    ):
        self.amount = w.FloatSlider(amount, min=-4, max=4, step=0.5, description="Amount", continuous_update=False)
        self.channel = w.Dropdown(options=range(1, CHANNELS + 1), value=channel, description="Channel")
        self.where = w.ToggleButtons(options=("everywhere", "one place"), index=0 if place is None else 1)
        places = SIDE // CELL
        self.row, self.column = (
            w.IntSlider(at, min=1, max=places, description=name, continuous_update=False)
            for at, name in zip(place or (places // 2 + 1,) * 2, ("Row", "Column"), strict=True)
        )
        self.scene = scene_slider(seed)
        asks = {
            "amount": self.amount,
            "channel": self.channel,
            "where": self.where,
            "row": self.row,
            "column": self.column,
            "seed": self.scene,
        }
        super().__init__(*asks.values(), asks=asks, **options)

    def settings(self) -> dict:
        place = (self.row.value - 1, self.column.value - 1)
        return {
            "seed": self.scene.value,
            "channel": self.channel.value - 1,
            "amount": self.amount.value,
            "place": place if self.where.value == "one place" else None,
        }

    def work(
        self, pipe, report: Report, seed: int, channel: int, amount: float, place: tuple[int, int] | None
    ) -> Nudged:
        z = encode(pipe, scene(seed))
        report(1, 3)
        spread = float(z[..., channel].std())
        moved = z.copy()
        rows, columns = (slice(None), slice(None)) if place is None else place
        moved[:, rows, columns, channel] += amount * spread
        before = pipe.decode(z)[0]
        report(2, 3)
        return Nudged(before, pipe.decode(moved)[0], spread)

    def figure(self) -> Figure:
        channel, amount, place = (self.asked[n] for n in ("channel", "amount", "place"))
        fig = Figure(figsize=(6.6, 2.3), layout="constrained")
        axes = fig.subplots(1, 3)
        shown = (self.data.before, self.data.after, changes(self.data.before, self.data.after))
        titles = ("decoded as it is", f"channel {channel + 1} moved by {amount:g}", "change, of 255")
        for ax, image, title in zip(axes, shown, titles, strict=True):
            drawn = ax.imshow(image, cmap="magma", vmin=0)
            ax.set_title(title)
            ax.axis("off")
        if place is not None:
            corner = CELL * place[1] - 0.5, CELL * place[0] - 0.5
            axes[2].add_patch(mpl.patches.Rectangle(corner, CELL, CELL, fill=False, ec="white", lw=1))
        fig.colorbar(drawn, ax=axes[2], shrink=0.8)
        return fig

    def words(self) -> str:
        before, after = (np.asarray(image, np.float64) for image in (self.data.before, self.data.after))
        channel, amount, place = (self.asked[n] for n in ("channel", "amount", "place"))
        moved = f"Channel {channel + 1} moved by {amount:g} of its spread"
        if place is None:
            shift = ", ".join(
                f"{name} {now - then:+.0f}"
                for name, now, then in zip(
                    ("red", "green", "blue"), after.mean((0, 1)), before.mean((0, 1)), strict=True
                )
            )
            return f"{moved} everywhere: the mean colour changes by {shift} of 255."
        map_ = changes(self.data.before, self.data.after)
        y, x = CELL * place[0], CELL * place[1]
        inside = map_[y : y + CELL, x : x + CELL].sum() / max(map_.sum(), 1e-9)
        touched = int((map_ >= 1).sum())
        return (
            f"{moved} at one place: {inside:.0%} of the change is in that place's own {CELL} × {CELL} pixels; "
            f"{touched:,} pixels change by 1 of 255 or more, {touched / CELL**2:.1f} times as many as it has."
        )


# --- there and back


class RoundTrip(Lesson):
    title = "There and back"
    idea = "The VAE keeps what it was trained to keep: a picture of its world comes back whole, any other loses more."
    trying = "Choose a picture of your own. What survives, and what does the VAE turn into shapes of its world?"

    def __init__(self, seed: int = 3, **options):
        self.scene = scene_slider(seed)
        self.file = w.FileUpload(accept="image/*", description="Own picture")
        super().__init__(self.scene, self.file, asks={"seed": self.scene, "file": self.file}, **options)

    def settings(self) -> dict:
        chosen = self.file.value[-1] if self.file.value else None
        file = None if chosen is None else (chosen["name"], bytes(chosen["content"]))
        return super().settings() | {"file": file}

    def work(
        self, pipe, report: Report, seed: int, file: tuple[str, bytes] | None
    ) -> list[tuple[Image.Image, Image.Image]]:
        other = photo() if file is None else square(io.BytesIO(file[1]), file[0], SIDE)
        pairs = []
        for i, image in enumerate((scene(seed), other)):
            pairs.append((image, pipe.decode(encode(pipe, image))[0]))
            report(i + 1, 2)
        return pairs

    def figure(self) -> Figure:
        fig = Figure(figsize=(5.4, 3.7), layout="constrained")
        axes = fig.subplots(2, 3)
        lost = [changes(*pair).reshape(SIDE // 4, 4, SIDE // 4, 4).mean((1, 3)) for pair in self.data]
        for row, pair, difference in zip(axes, self.data, lost, strict=True):
            row[0].imshow(pair[0])
            row[1].imshow(pair[1])
            drawn = row[2].imshow(difference, cmap="magma", vmin=0, vmax=max(d.max() for d in lost))
        axes[0, 0].set_title("a scene of its world")
        axes[1, 0].set_title("another picture")
        axes[0, 1].set_title(f"and back: {psnr(*self.data[0]):.1f} dB")
        axes[1, 1].set_title(f"and back: {psnr(*self.data[1]):.1f} dB")
        axes[0, 2].set_title("lost, of 255,\nby 4 × 4 pixels")
        for ax in axes.flat:
            ax.axis("off")
        fig.colorbar(drawn, ax=axes[:, 2], shrink=0.7)
        return fig

    def words(self) -> str:
        a, b = (psnr(*pair) for pair in self.data)
        return (
            f"The scene of its own world comes back with {a:.1f} dB, the other picture with {b:.1f} dB: "
            f"its error is {10 ** ((a - b) / 20):.1f} times as large."
        )


# --- measures


def photo() -> Image.Image:
    """A photograph that comes with matplotlib: Grace Hopper, by the US Navy."""
    with get_sample_data("grace_hopper.jpg") as file:
        return square(Image.open(file), "grace_hopper.jpg", SIDE)


def psnr(a: Image.Image, b: Image.Image) -> float:
    """The peak signal-to-noise ratio, in decibels."""
    error = ((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2).mean()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def qualities(image: Image.Image) -> np.ndarray:
    """(h, w, 5): the QUALITIES of the square of pixels that each latent stands for."""
    pixels = np.asarray(image, np.float64) / 255
    H, W, _ = pixels.shape
    cells = pixels.reshape(H // CELL, CELL, W // CELL, CELL, 3)
    red, green, blue = np.moveaxis(cells.mean((1, 3)), -1, 0)
    grey, half = cells.mean(-1), CELL // 2
    right = grey[:, :, :, half:].mean((1, 3)) - grey[:, :, :, :half].mean((1, 3))
    below = grey[:, half:].mean((1, 3)) - grey[:, :half].mean((1, 3))
    return np.stack([(red + green + blue) / 3, red - green, (red + green) / 2 - blue, right, below], axis=-1)


def correlations(latents: np.ndarray, looks: np.ndarray) -> np.ndarray:
    """(..., c) and (..., q) -> (c + 1, q): Pearson's correlations over all places of all pictures. The last row is for
    the best weighted sum of the channels."""
    a, b = latents.reshape(-1, latents.shape[-1]), looks.reshape(-1, looks.shape[-1])
    a, b = ((m - m.mean(0)) / m.std(0) for m in (a.astype(np.float64), b))
    best = a @ np.linalg.lstsq(a, b)[0]
    return np.concatenate([a.T @ b / len(a), [(best * b).mean(0) / best.std(0)]])
