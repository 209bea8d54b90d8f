"""Lesson 12, inside the network: where each block looks, and a U-Net beside a transformer."""

from typing import NamedTuple

import ipywidgets as w
import numpy as np
from matplotlib.figure import Figure
from mlx.utils import tree_flatten
from PIL import Image

from ...families import MODELS
from ...models import build
from ...probe import gaze
from .inside import PROMPT
from .lesson import BLUE, GREEN, GREY, ORANGE, RED, Lesson, Report, seed_box

STEPS = 6


class Seen(NamedTuple):
    picture: Image.Image
    maps: dict[str, np.ndarray]  # block -> (h, w, h, w): from each place, where its attention goes


def reach(maps: np.ndarray, row: int | slice = slice(None), column: int | slice = slice(None)) -> float:
    """How far away the attention of these places goes on average, in widths of the picture."""
    h, wide = maps.shape[:2]
    y, x = np.mgrid[:h, :wide]
    far = np.hypot((y[:, :, None, None] - y) / wide, (x[:, :, None, None] - x) / wide)  # (h, w, h, w)
    return float((maps * far).sum((2, 3))[row, column].mean())


class WhereBlocksLook(Lesson):
    title = "Where blocks look"
    idea = "In every block with attention a place looks at all other places. Each block does it in its own way."
    trying = (
        "Move the place to the moon, then to the ground. Which block looks at what is alike, and which at what is near?"
    )

    def __init__(self, prompt: str = PROMPT, seed: int = 7, step: int = 3, across: int = 35, down: int = 65, **options):
        self.prompt = w.Text(prompt, description="Prompt", continuous_update=False)
        self.seed = seed_box(seed)
        self.step = w.IntSlider(step, min=1, max=STEPS, description="Step", continuous_update=False)
        self.across = w.IntSlider(across, min=0, max=99, description="Place, % across")
        self.down = w.IntSlider(down, min=0, max=99, description="Place, % down")
        asks = {"prompt": self.prompt, "seed": self.seed, "step": self.step}
        super().__init__(*asks.values(), self.across, self.down, asks=asks, **options)

    def work(self, pipe, report: Report, prompt: str, seed: int, step: int) -> Seen:
        for seen in gaze(pipe, prompt, seed=seed, steps=STEPS, guidance=1.0):
            report(seen.step.step, STEPS)
            if seen.step.step == step:
                kept = seen.maps
        (picture,) = pipe.decode(seen.step.x0)
        return Seen(picture, kept)

    def place(self, maps: np.ndarray) -> tuple[int, int]:
        h, wide = maps.shape[:2]
        return self.down.value * h // 100, self.across.value * wide // 100

    def figure(self) -> Figure:
        d = self.data
        fig = Figure(figsize=(8.4, 4.5), layout="constrained")
        axes = fig.subplots(2, -(-(len(d.maps) + 1) // 2)).flat
        first = next(axes)
        first.imshow(d.picture, extent=(0, 100, 100, 0))
        first.set_title("the place, in the\npicture that it becomes")
        for ax, (name, maps) in zip(axes, d.maps.items(), strict=False):
            row, column = self.place(maps)
            ax.imshow(maps[row, column], extent=(0, 100, 100, 0), cmap="magma", vmin=0)
            ax.set_title(f"{name}, {len(maps)} × {len(maps)}\nhow far: {reach(maps, row, column):.2f}")
        for ax in fig.axes:
            ax.axis("off")
            if ax is first or ax.images:
                ax.plot(self.across.value, self.down.value, "o", mfc="none", mec="#39d353", ms=7, mew=1.6)
        return fig

    def words(self) -> str:
        said = [f"{name} {reach(maps):.2f}" for name, maps in self.data.maps.items()]
        even = {len(maps): reach(np.full_like(maps, 1 / maps[0, 0].size)) for maps in self.data.maps.values()}
        finest = max(even)
        return (
            f"Step {self.asked['step']} of {STEPS}. How far attention goes on average, in widths of the picture: "
            f"{', '.join(said)}. Spread evenly over the finest of these maps it would be {even[finest]:.2f}."
        )


# ---- two kinds of networks

SHOWN = {"sd15": BLUE, "sdxl": GREEN, "sd3-medium": ORANGE, "flux-dev": RED}
SIZES = (512, 1024)


def places(config, edge: int) -> list[tuple[int, int]]:
    """For each part of a network, in the order in which they run, at how many places it works, and how many layers of
    it compare each place with each other. edge: of the latents."""
    if hasattr(config, "channels"):  # a U-Net
        levels = [(edge // 2**i) ** 2 for i in range(len(config.channels))]
        down = [
            (n, depth)
            for n, of, k in zip(levels, config.depth, config.layers, strict=True)
            for depth in (of or (0,) * k)
        ]
        up = [
            (n, depth)
            for n, of, k in zip(levels[::-1], config.up_depth, config.layers[::-1], strict=True)
            for depth in (of or (0,) * (k + 1))
        ]
        return [*down, (levels[-1], config.mid_depth), *up]
    layers = config.layers if hasattr(config, "layers") else config.double + config.single
    return [((edge // 2) ** 2, 1)] * layers


class Kinds(NamedTuple):
    weights: dict[str, int]
    parts: dict[str, dict[int, list[tuple[int, int]]]]  # model -> edge of a picture -> `places`

    def pairs(self, name: str, size: int) -> int:
        """How many pairs of places are compared in one step."""
        return sum(n**2 * layers for n, layers in self.parts[name][size])


class UNetBesideTransformer(Lesson):
    title = "U-Net beside transformer"
    idea = "Two kinds of networks, counted and not run: at how many places each part of them works, from first to last."
    trying = "Choose the larger picture. Which network's work grows most?"

    def __init__(self, size: int = 512, **options):
        self.size = w.Dropdown(options=SIZES, value=size, description="Picture's edge")
        super().__init__(self.size, **options)

    def work(self, pipe, report: Report) -> Kinds:
        weights, parts = {}, {}
        for name in SHOWN:
            model = MODELS[name]
            config = model.networks[model.family.denoiser]
            weights[name] = sum(value.size for _, value in tree_flatten(build.build(config).parameters()))
            parts[name] = {size: places(config, size // 8) for size in SIZES}
            report(len(weights), len(SHOWN))
        return Kinds(weights, parts)

    def figure(self) -> Figure:
        d, size = self.data, self.size.value
        fig = Figure(figsize=(8.4, 3.0), layout="constrained")
        for ax, name in zip(fig.subplots(1, len(SHOWN), sharey=True), SHOWN, strict=True):
            parts = d.parts[name][size]
            colours = [SHOWN[name] if layers else GREY for _, layers in parts]
            ax.bar(range(1, len(parts) + 1), [n for n, _ in parts], color=colours, width=0.8)
            ax.set_yscale("log", base=4)
            ax.set_ylim(16, 2 * max(n for each in d.parts.values() for n, _ in each[size]))
            ax.set_yticks([64, 256, 1024, 4096, 16384], ["64", "256", "1,024", "4,096", "16,384"])
            ax.minorticks_off()
            ax.set_title(f"{name}\n{d.weights[name] / 1e9:.1f} billion weights")
            ax.set_xlabel("part, in order")
        fig.axes[0].set_ylabel("places it works at")
        return fig

    def words(self) -> str:
        d, said = self.data, []
        for name in SHOWN:
            small, large = (d.pairs(name, size) for size in SIZES)
            fewest, most = (f(n for n, _ in d.parts[name][SIZES[0]]) for f in (min, max))
            spots = (
                f"{most:,} places in every part" if fewest == most else f"{most:,} places down to {fewest:,} and back"
            )
            pairs = f"{small / 1e6:,.0f} million pairs compared in a step, {large / small:.0f} times as many"
            said.append(f"{name}: {spots}, {pairs}")
        return (
            f"At {SIZES[0]} pixels, and then the pairs at {SIZES[1]}: {'; '.join(said)}. Grey parts compare no places. "
            "The text's tokens are not counted."
        )
