"""The map at the head of every lesson: the whole way from words to a picture, drawn now, and where the lesson is."""

from typing import NamedTuple

import ipywidgets as w
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image

from ...errors import Error
from ...images import to_pixels
from ...probe import Token, encode, noise_of, sides, tokens, trace
from ...schedules import q_sample
from ...train import measure, storybook
from .latent import to_colours
from .lesson import GREY, ORANGE, Lesson, Report, seed_box

STEPS = 6
SHARES = (0.95, 0.5, 0.05)  # of a training picture's variance, in the three views of it under noise
SIGMA = 1.0  # the noise under which the network is examined
# station -> its title, and the lesson about it
DRAWING = {
    "text": "words",
    "noise": "noise",
    "network": "the network",
    "guidance": "guidance",
    "steps": "steps",
    "latents": "latents",
    "picture": "picture",
}
LEARNING = {"forward": "noise is added to pictures", "training": "the network learns to see under it"}
TITLES = DRAWING | LEARNING
_WIDE, _GAP, _TALL, _LOW = 1.33, 0.17, 1.78, 1.2  # inches: a card, the space between two, the two rows


class Way(NamedTuple):
    tokens: list[Token]
    noise: np.ndarray  # (h, w, c)
    x: list[np.ndarray]  # what the network is given in each step
    x0: list[np.ndarray]  # the clean latents that each step expects
    empty: np.ndarray  # the answer without words in the second step
    positive: np.ndarray  # with them
    calls: int
    picture: Image.Image
    learned: Image.Image  # a picture of the kind it was trained on
    caption: str
    guess: np.ndarray  # the clean latents it expects under noise
    off: float  # how far they are from the right ones, over their length

    def colours(self, z: np.ndarray) -> np.ndarray:
        """Latents (h, w, c) as colours, by the linear map that fits this run's picture best."""
        return to_colours(self.x0[-1], self.picture)(z)


class Map(Lesson):
    title = "The whole way"
    idea = "From your words to a picture, as it happens now; below, how the network learned it, once."
    trying = "Write other words or another seed, and see which cards change."

    def __init__(self, *stations: str, prompt: str = "a red house under a full moon", seed: int = 7, **options):
        for each in stations:
            if each not in TITLES:
                raise Error(f"{each} is no station of the map.", f"Name one of {', '.join(TITLES)}.")
        self.stations = stations
        self.prompt = w.Text(prompt, description="Prompt", continuous_update=False)
        self.seed = seed_box(seed)
        asks = {"prompt": self.prompt, "seed": self.seed}
        super().__init__(*asks.values(), asks=asks, **options)

    def work(self, pipe, report: Report, prompt: str, seed: int) -> Way:
        settings = {"seed": seed, "steps": STEPS}
        chunks = tokens(pipe, prompt, **settings)
        steps = []
        for step in trace(pipe, prompt, **settings):
            steps.append(step)
            report(step.step, STEPS + 2)
        empty, positive = (look(steps[1].x, steps[1].sigma)[0] for look in sides(pipe, prompt, **settings))
        report(STEPS + 1, STEPS + 2)
        (picture,) = pipe.decode(steps[-1].x0)
        (scene,) = measure.scenes(1)
        learned, caption = Image.fromarray(measure.renders([scene], picture.width)[0]), storybook.plain(scene)
        clean = encode(pipe, learned)
        _, look = sides(pipe, caption, guidance=2.0)
        noisy = clean + SIGMA * np.random.default_rng(0).standard_normal(clean.shape).astype(np.float32)
        guess = look(noisy, SIGMA)
        return Way(
            [token for chunk in chunks for token in chunk if token.role == "text"],
            noise_of(pipe, **settings)[0],
            [step.x[0] / np.sqrt(1 + step.sigma**2) for step in steps],
            [step.x0[0] for step in steps],
            empty,
            positive,
            STEPS * pipe.description.passes(pipe.resolve(prompt, **settings)),
            picture,
            learned,
            caption,
            guess[0],
            float(np.linalg.norm(guess - clean) / np.linalg.norm(clean)),
        )

    def figure(self) -> Figure:
        width = len(DRAWING) * (_WIDE + _GAP) - _GAP + 0.1
        height = 0.1 + _LOW + 0.35 + _TALL + 0.05
        fig = Figure(figsize=(width, height))
        page = fig.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
        page.axis("off")
        d, top = self.data, 0.1 + _LOW + 0.35
        drawn = {
            "noise": [d.colours(d.noise)],
            "network": [d.colours(d.x[1])],
            "guidance": [d.colours(d.empty), d.colours(d.positive)],
            "steps": [d.colours(d.x0[k]) for k in (0, 1, 2, -1)],
            "latents": list(d.x0[-1].transpose(2, 0, 1)[-4:]),
            "picture": [d.picture],
        }
        below = {
            "text": f"{len(d.tokens)} tokens",
            "noise": f"{d.noise.size:,} numbers",
            "network": f"asked {d.calls} times",
            "guidance": "without, with words",
            "steps": f"{STEPS}, noise falls",
            "latents": f"{d.x0[-1].size:,} numbers",
            "picture": f"{np.asarray(d.picture).size:,} numbers",
        }
        for k, station in enumerate(DRAWING):
            x = 0.05 + k * (_WIDE + _GAP)
            inside = self._card(page, station, x, top, _WIDE, _TALL, below[station])
            if k:
                arrow(page, (x - _GAP, top + _TALL / 2), (x, top + _TALL / 2))
            if station == "text":
                listed(page, d.tokens, inside)
            else:
                thumbs(fig, drawn[station], inside, 2 if len(drawn[station]) > 1 else 1)
        self._learning(fig, page, top)
        return fig

    def _learning(self, fig: Figure, page, top: float) -> None:
        """The lower row, whose last card leads up to the network; and the way back from the steps to the network."""
        d, step = self.data, _WIDE + _GAP
        clean = to_pixels(d.learned)
        fresh = np.random.default_rng(1).standard_normal(clean.shape)
        noisy = [np.clip(q_sample(clean, fresh, share) / 2 + 0.5, 0, 1) for share in SHARES]
        thumbs(fig, [d.learned, *noisy], self._card(page, "forward", 0.05, 0.1, 2 * step - _GAP, _LOW, ""), 4)
        x, y, wide, tall = self._card(page, "training", 0.05 + 2 * step, 0.1, 2 * step - _GAP, _LOW, "")
        thumbs(fig, [d.colours(d.guess), d.learned.resize(d.guess.shape[1::-1])], (x, y, 0.62 * wide, tall), 2)
        said = f"its guess, and\nwhat was there:\n{d.off:.0%} off"
        page.text(x + 0.66 * wide, y + tall / 2, said, va="center", fontsize=7.5)
        arrow(page, (2 * step - _GAP + 0.05, 0.1 + _LOW / 2), (0.05 + 2 * step, 0.1 + _LOW / 2))
        network, steps = 0.05 + 2.5 * step - _GAP / 2, 0.05 + 4.5 * step - _GAP / 2
        arrow(page, (network - 0.3, 0.1 + _LOW), (network - 0.3, top))
        page.plot([steps, steps, network + 0.3], [top, top - 0.17, top - 0.17], color=GREY, lw=1)
        arrow(page, (network + 0.3, top - 0.18), (network + 0.3, top))
        page.text(steps - 0.1, top - 0.28, "again, with less noise", ha="right", va="center", fontsize=7.5, color=GREY)
        note = (
            "The upper row happens for every picture.\nThe lower row happened once, before,\nwith very many pictures."
        )
        page.text(0.15 + 4 * step, 0.1 + _LOW / 2, note, va="center", fontsize=8, color="#555a63")

    def _card(self, page, station: str, x: float, y: float, wide: float, tall: float, below: str) -> tuple:
        """Draw an empty card; return the place for what is in it: x, y, width, height."""
        on = station in self.stations
        edge, face = (ORANGE, "#fff3e2") if on else ("#d5d8de", "#f6f7f9")
        shape = "round,pad=0,rounding_size=0.09"
        page.add_patch(FancyBboxPatch((x, y), wide, tall, boxstyle=shape, ec=edge, fc=face, lw=2.2 if on else 0.8))
        title = f"▸ {TITLES[station]}" if on else TITLES[station]
        colour = "#a75a06" if on else "black"
        middle = {"ha": "center", "va": "center"}
        page.text(x + wide / 2, y + tall - 0.14, title, color=colour, weight="bold", fontsize=8.5, **middle)
        if below:
            page.text(x + wide / 2, y + 0.12, below, fontsize=7.5, color="#555a63", **middle)
        return x + 0.08, y + (0.25 if below else 0.08), wide - 0.16, tall - (0.52 if below else 0.35)

    def words(self) -> str:
        d = self.data
        places = f"This lesson is about: {', '.join(TITLES[s] for s in self.stations)}. " if self.stations else ""
        return (
            f"{places}“{self.asked['prompt']}” becomes {len(d.tokens)} tokens. {d.noise.size:,} numbers of noise "
            f"become {d.x0[-1].size:,} latents in {STEPS} steps, which ask the network {d.calls} times, and these "
            f"become the {np.asarray(d.picture).size:,} numbers of a picture. "
            f"Under a picture of its world (“{d.caption}”) and as much noise, it is {d.off:.0%} off."
        )


def here(*stations: str) -> Map:
    """The map for the head of a lesson. stations: those that the lesson is about, of `TITLES`; none for all of them."""
    return Map(*stations)


def arrow(page, start: tuple[float, float], end: tuple[float, float]) -> None:
    page.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=8, color=GREY, shrinkA=1, shrinkB=1))


def thumbs(fig: Figure, images: list, inside: tuple, columns: int) -> None:
    """Square pictures in a place of the page."""
    x, y, wide, tall = inside
    rows = -(-len(images) // columns)
    side = min((wide - 0.05 * (columns - 1)) / columns, (tall - 0.05 * (rows - 1)) / rows)
    left = x + (wide - columns * side - 0.05 * (columns - 1)) / 2
    bottom = y + (tall - rows * side - 0.05 * (rows - 1)) / 2
    whole = fig.get_size_inches()
    for k, image in enumerate(images):
        column, row = k % columns, rows - 1 - k // columns
        place = left + column * (side + 0.05), bottom + row * (side + 0.05)
        ax = fig.add_axes((place[0] / whole[0], place[1] / whole[1], side / whole[0], side / whole[1]))
        ax.imshow(image, cmap="Greys_r")
        ax.axis("off")


def listed(page, tokens: list[Token], inside: tuple) -> None:
    """The first tokens with their numbers, one below the other."""
    x, y, wide, tall = inside
    lines = [(token.piece.removesuffix("</w>"), str(token.id)) for token in tokens[:7]]
    if len(tokens) > 7:
        lines[-1] = ("…", "")
    for k, (piece, number) in enumerate(lines):
        height = y + tall - (k + 0.6) * tall / 7
        page.text(x + 0.05, height, piece[:11], va="center", fontsize=8)
        page.text(x + wide - 0.05, height, number, ha="right", va="center", fontsize=7.5, color=GREY)
