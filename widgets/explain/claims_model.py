"""Claims about the network, its latents, guidance and training, and what each is tried by."""

import functools

import mlx.core as mx
import numpy as np

from ...families import MODELS
from ...families.base import SECOND_PASS
from ...noise import SOURCES
from ...probe import encode
from ...train import objective, toy
from .claims_noise import PROMPT
from .guidance import changes, clipped, saturation
from .latent import photo, psnr, scene
from .lesson import BLUE, GREEN, ORANGE
from .trial import Claim, Evidence

POINTS, NEAR = 100, 0.01  # what the two denoisers are taught; nearer than this a new point is a copy
TAUGHT = 250  # steps
GUIDANCE = (1.0, 4.0, 12.0)


@functools.cache
def taught(prediction: str, points: int) -> toy.Toy:
    learner = toy.Toy(prediction, seed=0)
    for _ in learner.learn(toy.two_moons(points), TAUGHT):
        pass
    return learner


# --- what it learns


def stores(pipe, seed: int) -> Evidence:
    points, rng = toy.two_moons(POINTS), np.random.default_rng(seed)
    sigmas = np.geomspace(5, 0.01, 30)
    x = sigmas[0] * rng.standard_normal((200, 2))
    for sigma, lower in zip(sigmas, [*sigmas[1:], 0], strict=True):
        x = x + (lower - sigma) * (x - toy.best(points, x, sigma)) / sigma
    learned = taught("flow", POINTS).paths(200, seed=seed)[-1]
    copies = [(np.hypot(*(new[:, None] - points).transpose(2, 0, 1)).min(1) < NEAR).mean() for new in (x, learned)]

    def plot(ax) -> None:
        for dots, colour, name in ((learned, BLUE, "learned"), (x, ORANGE, "perfect"), (points, "black", "taught")):
            ax.scatter(*dots.T, s=4 if name == "taught" else 9, color=colour, label=name)
        ax.set(xticks=[], yticks=[], aspect="equal", xlim=(-2, 3.4))
        ax.spines[:].set_visible(False)
        ax.legend(fontsize=7, loc="right")

    return Evidence(
        copies[0] > 0.5 and copies[1] < 0.2,
        f"Of 200 new points from a perfect denoiser of {POINTS} points, {copies[0]:.0%} are copies of a taught point "
        f"(nearer than {NEAR}); from a small network taught the same points, {copies[1]:.0%}.",
        plot=plot,
    )


def noise_is_sharper(pipe, seed: int) -> Evidence:
    points, rng = toy.two_moons(2000), np.random.default_rng(seed)
    toys = {kind: taught(kind, 2000) for kind in ("eps", "x0")}
    off = {kind: toy.off_moons(t.paths(500, seed=seed)[-1]).mean() for kind, t in toys.items()}
    ratios, error = (0.15, 0.5, 2.0), {kind: [] for kind in toys}
    for ratio in ratios:
        x = points[:300] + ratio * rng.standard_normal((300, 2))
        right = toy.best(points, x, ratio)
        for kind, each in toys.items():
            error[kind].append(float(np.sqrt(np.square(each.expected(x, ratio) - right).mean())))

    def plot(ax) -> None:
        for (kind, values), colour in zip(error.items(), (BLUE, ORANGE), strict=True):
            ax.plot(ratios, values, "o-", color=colour, label=f"learned {kind}", ms=4)
        ax.set(xscale="log", xlabel="noise", title="error of the point expected", ylim=(0, None))
        ax.set_xticks(ratios, map(str, ratios))
        ax.minorticks_off()
        ax.legend(fontsize=7)

    return Evidence(
        off["eps"] > 0.7 * off["x0"],  # the noise is not the better thing to predict
        f"Two networks learned the same points, one as noise, one as points: new points lie {off['eps']:.2f} and "
        f"{off['x0']:.2f} off the moons. What they expect is off by {error['eps'][0]:.2f} and {error['x0'][0]:.2f} "
        f"under little noise, {error['eps'][-1]:.2f} and {error['x0'][-1]:.2f} under much.",
        plot=plot,
    )


def every_step(pipe, seed: int) -> Evidence:
    seen, times = set(), len(toy.ALPHA_BAR)
    for step in range(1, TAUGHT + 1):  # the draws of Toy.learn
        rng = np.random.default_rng([0, step])
        t, _ = objective.levels("eps", toy.ALPHA_BAR, objective.stratified(rng, toy.BATCH))
        seen.update(zip(rng.integers(0, 2000, toy.BATCH).tolist(), t.tolist(), strict=True))
    learner, possible = taught("eps", 2000), 2000 * times
    off = toy.off_moons(learner.paths(500, seed=seed)[-1]).mean()
    far = toy.off_moons(np.random.default_rng(seed).standard_normal((500, 2))).mean()
    shown = sorted(seen)[:: max(1, len(seen) // 4000)]

    def plot(ax) -> None:
        ax.scatter(*np.array(shown).T[::-1], s=0.4, color=BLUE)
        ax.set(xlabel="time step", ylabel="training point", title="seen in training, a part of it")

    return Evidence(
        len(seen) < 0.1 * possible and off < 0.5 * far,
        f"{TAUGHT} steps of {toy.BATCH} samples used {len(seen):,} of the {possible:,} pairs of a point and a time, "
        f"{len(seen) / possible:.1%}. New points then lie {off:.2f} off the moons, noise {far:.2f}.",
        plot=plot,
    )


# --- the network


def time_is_read(pipe, seed: int) -> Evidence:
    net, times = pipe.networks.get("unet"), (100.0, 900.0)
    words = np.random.default_rng(seed).standard_normal((1, 8, net.config.context), np.float32)
    early, late = (net.prepare([t], mx.array(words)) for t in times)
    pairs = [
        (a, b) for one, other in zip(early["kv"], late["kv"], strict=True) for a, b in zip(one, other, strict=True)
    ]
    same = all(np.array_equal(np.array(a), np.array(b)) for a, b in pairs)
    shifts = [
        [np.array(s.astype(mx.float32)) for s in kept["times"][t]] for kept, t in zip((early, late), times, strict=True)
    ]
    moved = [float(np.linalg.norm(a - b) / max(map(np.linalg.norm, (a, b)))) for a, b in zip(*shifts, strict=True)]

    def plot(ax) -> None:
        ax.bar(range(1, len(moved) + 1), [100 * m for m in moved], color=BLUE)
        ax.set(title="change of what time adds, in %", xlabel="residual block")
        ax.xaxis.get_major_locator().set_params(integer=True)

    return Evidence(
        same and min(moved) > 0,
        f"From t = {times[0]:.0f} to {times[1]:.0f} the keys and values of all {len(early['kv'])} cross-attention "
        f"layers {'stay equal bit for bit' if same else 'change'}. What is added in the {len(moved)} residual blocks "
        f"changes by {min(moved):.0%} to {max(moved):.0%}.",
        plot=plot,
    )


def reading(config) -> list[bool]:
    """For each residual block of a U-Net, from the first to the last, whether layers that read the text follow it."""
    sides = [zip(config.depth, config.layers, strict=True)]
    sides.append(((depth, n + 1) for depth, n in zip(config.up_depth, config.layers[::-1], strict=True)))
    down, up = ([bool(d) for depth, n in side for d in (depth or (0,) * n)] for side in sides)
    return [*down, config.mid_depth > 0, False, *up]


def text_everywhere(pipe, seed: int) -> Evidence:
    nets = {"this model": pipe.description.components["unet"]}
    nets |= {name: MODELS[name].networks["unet"] for name in ("sd15", "sdxl")}
    rows = {name: reading(config) for name, config in nets.items()}

    def plot(ax) -> None:
        for y, row in enumerate(rows.values()):
            for x, reads in enumerate(row):
                ax.plot(x, -y, "s", ms=6.5, color=ORANGE if reads else "#d5d8de")
        ax.set(yticks=[0, -1, -2], yticklabels=rows, xticks=[], ylim=(-2.6, 0.6))
        ax.set_title("blocks in order; orange: text is read")
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)

    said = [f"{name} {sum(row)} of {len(row)}" for name, row in rows.items()]
    return Evidence(
        all(sum(row) < len(row) for row in rows.values()),
        f"Residual blocks after which text is read: {', '.join(said)}.",
        plot=plot,
    )


# --- latents


def times_fewer(pipe, seed: int) -> Evidence:
    image = scene(3)
    latents = encode(pipe, image)
    vae = MODELS["sd15"].networks["vae"]
    edge = 512 // 2 ** (len(vae.channels) - 1)
    values, fewer = 512 * 512 * 3, 512 * 512 * 3 / (edge * edge * vae.latent_channels)
    ours = np.asarray(image).size / latents.size
    maps = [latents[0, :, :, k] for k in range(min(3, latents.shape[-1]))]
    return Evidence(
        fewer == 48,
        f"Stable Diffusion: {values:,} numbers become {edge} × {edge} × {vae.latent_channels} = "
        f"{edge * edge * vae.latent_channels:,}, {fewer:.0f} times fewer. This model: {np.asarray(image).size:,} "
        f"become {latents.size:,}, {ours:.0f} times fewer.",
        [(image, "picture"), *((z, f"channel {k + 1}") for k, z in enumerate(maps))],
    )


def same_quality(pipe, seed: int) -> Evidence:
    pictures = scene(seed), photo()
    back = pipe.decode(np.concatenate([encode(pipe, image) for image in pictures]))
    kept = [psnr(*pair) for pair in zip(pictures, back, strict=True)]
    off = [changes(*pair).mean() for pair in zip(pictures, back, strict=True)]
    return Evidence(
        max(kept) < 45 and kept[0] > kept[1],
        f"There and back, a scene of its world is off by {off[0]:.1f} of 255 ({kept[0]:.1f} dB), a photograph by "
        f"{off[1]:.1f} ({kept[1]:.1f} dB).",
        [(pictures[0], "a scene"), (back[0], "and back"), (pictures[1], "a photograph"), (back[1], "and back")],
    )


# --- guidance and seeds


def guided() -> dict[str, float]:
    """The named models that take a second pass by default, and how much guidance they use."""
    rows = {}
    for name, m in MODELS.items():
        how = m.family.variants[m.variant].guidance or m.family.guidance
        if how == SECOND_PASS and m.defaults.guidance > 1:
            rows[name] = m.defaults.guidance
    return rows


def two_passes(pipe, seed: int) -> Evidence:
    passes = [pipe.description.passes(pipe.resolve(PROMPT, guidance=g)) for g in (1.0, 4.0)]
    twice, every = len(guided()), len(MODELS)
    return Evidence(
        passes == [1, 2] and twice < every,
        f"This model: {passes[0]} answer a step at guidance 1, {passes[1]} at guidance 4. Of the {every} named models, "
        f"{twice} need two by default and {every - twice} one.",
        plot=lambda ax: (
            ax.barh(["one answer", "two answers"], [every - twice, twice], color=[GREEN, BLUE], height=0.6),
            ax.set_title("named models, by their defaults"),
            ax.xaxis.get_major_locator().set_params(integer=True),
        ),
    )


def seven_to_twelve(pipe, seed: int) -> Evidence:
    rows = guided()
    drawn = [pipe(PROMPT, seed=seed, steps=9, guidance=g).image for g in GUIDANCE]
    cut, grey = [clipped(image) for image in drawn], [saturation(image) for image in drawn]
    below = sum(g < 7 for g in rows.values())
    return Evidence(
        below > len(rows) / 2,
        f"The defaults of the {len(rows)} named models with two answers run from {min(rows.values()):g} to "
        f"{max(rows.values()):g}; {below} are below 7. Here, at guidance {GUIDANCE[1]:g} and {GUIDANCE[-1]:g}, the "
        f"colours are {grey[1]:.0%} and {grey[-1]:.0%} saturated, and {cut[1]:.1%} and {cut[-1]:.1%} of the values are "
        "cut off at black or white.",
        [(image, f"{g:g}: {s:.0%} saturated") for image, g, s in zip(drawn, GUIDANCE, grey, strict=True)],
    )


def same_seed(pipe, seed: int) -> Evidence:
    base = {"seed": seed, "steps": 4, "guidance": 1.0}
    other = next(source for source in SOURCES if source != "torch")
    changed = {"the same": {}, "sampler": {"sampler": "euler_ancestral"}, f"noise of “{other}”": {"noise": other}}
    first, *drawn = (pipe(PROMPT, **base, **extra).image for extra in ({}, *changed.values()))
    off = [changes(first, image).mean() for image in drawn]
    return Evidence(
        off[0] == 0 and min(off[1:]) > 2,
        f"Seed {seed} again: {off[0]:.1f} of 255 away. With another sampler: {off[1]:.1f}. With another source of "
        f"random numbers: {off[2]:.1f}.",
        [
            (first, f"seed {seed}"),
            *((image, f"{name}: {o:.0f} off") for image, name, o in zip(drawn, changed, off, strict=True)),
        ],
    )


_LOOK = "Try other seeds. Does the verdict hold for every one?"
STORES = Claim(
    "The model makes something new; it stores no pictures",
    "imprecise",
    "It can store them: a perfect answer to what it is taught is a copy. It does not because it is not perfect.",
    "Lesson 8 has the two moons: let them learn for 100 steps, and for 5000.",
    stores,
)
SHARPER = Claim(
    "The network learns the noise, not the picture, and that is why pictures are sharp",
    "wrong",
    "Both are the same regression, since one gives the other. They only weigh the noise levels differently.",
    _LOOK,
    noise_is_sharper,
)
EVERY_STEP = Claim(
    "Each picture is trained on with every one of its noise steps",
    "wrong",
    "Each time a picture is met, one time step is drawn for it, and most pairs are never met.",
    _LOOK,
    every_step,
)
TIME = Claim(
    "The network reads the time step by cross-attention, as it reads the words",
    "wrong",
    "In Stable Diffusion the time is added to every residual block; cross-attention is for the words.",
    _LOOK,
    time_is_read,
)
TEXT = Claim(
    "The text enters at each layer of the U-Net",
    "imprecise",
    "It enters where there is cross-attention, and some blocks have none.",
    "Which blocks read no text, the fine ones or the coarse ones?",
    text_everywhere,
)
FEWER = Claim(
    "64 × 64 × 4 is 4 times (or 64 times) fewer numbers than the picture has",
    "wrong",
    "“4” counts something else, “64” forgets that three colours become four channels: it is 48.",
    "Lesson 6 counts bytes too.",
    times_fewer,
)
QUALITY = Claim(
    "The latents give back a picture of the same quality",
    "imprecise",
    "They keep what the VAE was trained to keep, and lose fine detail everywhere, most in pictures it never saw.",
    _LOOK,
    same_quality,
)
TWO = Claim(
    "Guidance makes every step run the network twice",
    "imprecise",
    "Only where the model has not learned guidance itself, and only above 1.",
    "<code>mlxdiff models</code> shows each model's default guidance.",
    two_passes,
)
SEVEN = Claim(
    "Set guidance to between 7 and 12",
    "imprecise",
    "The right value belongs to the model. Take its default, and change it a little.",
    _LOOK,
    seven_to_twelve,
)
SEED = Claim(
    "The same seed gives the same picture",
    "imprecise",
    "Only with the same model, words, size, sampler, steps and source of random numbers.",
    _LOOK,
    same_seed,
)
MODEL = (STORES, SHARPER, EVERY_STEP, TIME, TEXT, FEWER, QUALITY, TWO, SEVEN, SEED)
