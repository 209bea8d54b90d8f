"""Claims that stand in the lessons about their subject, and what each is tried by."""

from itertools import pairwise

import numpy as np

from ... import surgery
from ...families import MODELS
from ...probe import noise_of, sides
from ...schedules import Discrete, alpha_bar, betas, sigmas
from ...train import judge, swap, toy
from ...train import storybook as sb
from .claims_noise import PROMPT
from .forward import ENDS
from .guidance import changes
from .judging import read
from .lesson import BLUE, GREEN, ORANGE, RED
from .trial import Claim, Evidence

# --- lesson 2: does a run correct its errors?

STEPS, SPOILED = 10, (2, 5, 7, 9)  # of a run, and after how many of them it is spoiled
WOUND = (slice(None), slice(10, 20), slice(6, 16))  # in latents


def heals(pipe, seed: int) -> Evidence:
    request = pipe.resolve(PROMPT, steps=STEPS)
    levels = sigmas(pipe.description.noise_levels(request), request.schedule, STEPS)
    _, look = sides(pipe, PROMPT, guidance=2.0)

    def walk(x: np.ndarray, begin: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """x after each step from `begin` on, and the picture expected in it."""
        states = []
        for high, low in pairwise(levels[begin:]):
            x0 = look(x.astype(np.float32), float(high))
            x = x + (low - high) * (x - x0) / high
            states.append((x, x0))
        return states

    whole, ends, left = walk(levels[0] * noise_of(pipe, seed), 0), [], []
    for k in SPOILED:
        x, x0 = whole[k - 1]
        wound = np.zeros_like(x)
        wound[WOUND] = -x0[WOUND]  # the picture expected there is taken away, and the noise stays
        ends.append(walk(x + wound, k)[-1][0])
        left.append(float(np.linalg.norm((ends[-1] - whole[-1][0])[WOUND]) / np.linalg.norm(wound)))
    drawn = pipe.decode(np.concatenate([whole[-1][0], *ends]).astype(np.float32))
    said = ", ".join(f"{part:.0%} after step {k}" for k, part in zip(SPOILED, left, strict=True))
    names = ["not spoiled", *(f"after step {k}: {p:.0%}" for k, p in zip(SPOILED, left, strict=True))]
    return Evidence(
        left[0] < 0.35 and left[-1] > 0.7,
        f"In a run of {STEPS} steps a patch of the expected picture was made grey, once. What was left of this at the "
        f"end, by when it was done: {said}.",
        list(zip(drawn, names, strict=True)),
    )


# --- lesson 10: what a noise schedule decides

KINDS = {"linear": BLUE, "scaled_linear": GREEN, "cosine": ORANGE, "sigmoid": RED}
COUNTS, POINTS, BLOBS = (3, 4, 6, 8, 12, 16, 32, 64), 400, 8


def schedule_decides(pipe, seed: int) -> Evidence:
    real = toy.ring(1000, BLOBS, seed=1)
    denoise, off = toy.ring_denoiser(BLOBS, flow=False), {}
    for kind in KINDS:
        schedule = Discrete(alpha_bar(betas(kind, 1000, *ENDS[kind])))
        off[kind] = [toy.apart(toy.paths(denoise, schedule, POINTS, n, "ddim", seed)[-1], real) for n in COUNTS]
    floor = float(np.mean([toy.apart(toy.ring(POINTS, BLOBS, s), real) for s in range(2, 8)]))
    few, many = ([values[k] for values in off.values()] for k in (1, -1))

    def plot(ax) -> None:
        for kind, values in off.items():
            ax.plot(COUNTS, values, "o-", color=KINDS[kind], ms=3, label=kind.replace("_", " "))
        ax.axhline(floor, color="black", lw=0.8, ls=":")
        ax.set(xscale="log", yscale="log", xlabel="steps of DDIM", title="distance from the world")
        ax.set_xticks(COUNTS[::2], map(str, COUNTS[::2]))
        ax.minorticks_off()
        ax.legend(fontsize=7)

    said = ["; ".join(f"{kind} {values[k]:.3f}" for kind, values in off.items()) for k in (1, -1)]
    return Evidence(
        max(few) > 1.5 * min(few) and max(many) < 3 * floor,
        f"The same perfect denoiser of eight blobs, asked at the times of four schedules. Distance from the world with "
        f"{COUNTS[1]} steps: {said[0]}. With {COUNTS[-1]}: {said[1]}. Points of the world itself: {floor:.3f}.",
        plot=plot,
    )


# --- lesson 7: words and pictures in one space

PAIRS, ASKED, SHOWN, EDGE = 160, 32, 8, 128


def one_space(pipe, seed: int) -> Evidence:
    rng = np.random.default_rng([seed, 7])
    scenes = [sb.sample(rng) for _ in range(PAIRS + ASKED)]
    pictures = np.stack([sb.render(scene, rng, EDGE) for scene in scenes])
    said = swap.contexts(pipe, [sb.plain(scene) for scene in scenes]).mean(1)  # (n, d)
    seen = judge.features(judge.load(judge.shipped()), pictures)
    said, seen = (each - each[:PAIRS].mean(0) for each in (said, seen))
    own = said[:PAIRS].T @ said[:PAIRS]
    own += 0.01 * np.trace(own) / len(own) * np.eye(len(own))
    mapped = said[PAIRS:] @ np.linalg.solve(own, said[:PAIRS].T @ seen[:PAIRS])
    mapped, seen = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (mapped, seen[PAIRS:]))
    alike = seen @ mapped.T  # (pictures, captions)
    found = int((alike.argmax(1) == np.arange(ASKED)).sum())
    without = sum(not model.family.text.clip for model in MODELS.values())

    def plot(ax) -> None:
        ax.imshow(alike[:SHOWN, :SHOWN], cmap="RdBu_r", vmin=-1, vmax=1)
        ax.set(xlabel="captions", ylabel="pictures", xticks=[], yticks=[], title="red: alike, blue: unlike")

    return Evidence(
        found > 5 and without > 0,
        f"From {PAIRS} pictures and captions a map was fitted now from what this model's text encoder says to what the "
        f"judge sees. In this common space {found} of {ASKED} new pictures are nearest to their own caption; chance "
        f"gives 1. The drawing network has no part in it. Of the {len(MODELS)} named models {without} read no CLIP.",
        [(picture, f"picture {k + 1}") for k, picture in enumerate(pictures[PAIRS : PAIRS + 3])],
        plot,
    )


# --- lesson 15: what a prompt can do

WANTED = "a purple house on the left in the snow at night under a full moon"
PHRASINGS = {
    "plainly": WANTED,
    "in another order": "at night, under a full moon, in the snow, a purple house on the left",
    "in other words": "a purple cottage at the left on a snowy field at midnight in the moonlight",
    "with praise": f"a beautiful detailed masterpiece of {WANTED}, digital art, trending",
    "as a sentence": "please draw me a house: it should be purple and on the left, with snow and a full moon at night",
    "misspelt": "a purpel hous on the left in the snow at nite under a ful moon",
}


def phrasing(pipe, seed: int) -> Evidence:
    referee, (wanted,) = judge.load(judge.shipped()), judge.asked([WANTED])
    drawn = [pipe(prompt, seed=seed, steps=5, guidance=2.0).image for prompt in PHRASINGS.values()]
    right = (judge.read(referee, read(drawn)) == wanted).sum(1).tolist()
    known = min(right[:3])
    return Evidence(
        known > right[-1],
        f"One scene, asked for in {len(PHRASINGS)} ways with one seed. Of its six words the judge sees "
        f"{', '.join(f'{n} {name}' for name, n in zip(PHRASINGS, right, strict=True))}.",
        [(image, f"{name}: {n} of 6") for image, name, n in zip(drawn, PHRASINGS, right, strict=True)],
    )


HOW_MANY = {1: "a red house by day in the snow", 2: "two red houses by day in the snow"}
COUNTED = 64  # pixels: the edge of the pictures in which things are counted


def counting(pipe, seed: int) -> Evidence:
    drawn = {n: pipe(prompt, seed=seed, steps=10, count=2).images for n, prompt in HOW_MANY.items()}
    counts = {n: [regions(red(image)) for image in images] for n, images in drawn.items()}
    referee, kind = judge.load(judge.shipped()), [*judge.WORDS].index("object")
    named = {
        n: [judge.WORDS["object"][row[kind]] for row in judge.read(referee, read(images))]
        for n, images in drawn.items()
    }
    said = [f"{n}: {counts[n][0]} and {counts[n][1]}, {named[n][0]} and {named[n][1]}" for n in HOW_MANY]
    return Evidence(
        counts[1] == [1, 1] and (2, "house") not in zip(counts[2], named[2], strict=True),
        f"Red things in two pictures each, and what the judge takes them for, when asked for {'; '.join(said)}.",
        [(image, f"asked for {n}") for n, images in drawn.items() for image in images],
    )


def red(image) -> np.ndarray:
    """Where a picture is plainly red."""
    r, g, b = np.moveaxis(np.asarray(image.resize((COUNTED, COUNTED)), float), -1, 0)
    return (r > 110) & (r > 1.8 * g) & (r > 1.8 * b)


def regions(mask: np.ndarray) -> int:
    """How many connected parts of at least a hundredth of the picture there are."""
    names = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(names, 1)
        around = [padded[1 + i : padded.shape[0] - 1 + i, 1 + j : padded.shape[1] - 1 + j] for i, j in NEIGHBOURS]
        grown = np.where(mask, np.max([names, *around], axis=0), 0)
        if (grown == names).all():
            return int((np.unique(names[mask], return_counts=True)[1] >= mask.size / 100).sum())
        names = grown


NEIGHBOURS = ((-1, 0), (1, 0), (0, -1), (0, 1))

# --- lesson 3: a negative prompt of words that the model does not know

OPEN = "a red house by day"  # it leaves the ground open
UNKNOWN = (
    "extra fingers, bad anatomy",
    "glonk brilm, tavoo quess",
)  # the first is often advised, the second is nothing


def extra_fingers(pipe, seed: int) -> Evidence:
    def drawn(negative: str):
        return pipe(OPEN, negative=negative, seed=seed, steps=5).image

    def grounds(images: list) -> list[str]:
        kind = [*judge.WORDS].index("terrain")
        return [judge.WORDS["terrain"][row[kind]] for row in judge.read(judge.load(judge.shipped()), read(images))]

    first = drawn("")
    (ground,) = grounds([first])
    negatives = [*UNKNOWN, ground]
    images = [drawn(negative) for negative in negatives]
    by, seen = [float(changes(image, first).mean()) for image in images], grounds(images)
    said = "; ".join(f"“{n}” {b:.0f}, {s}" for n, b, s in zip(negatives, by, seen, strict=True))
    names = [f"“{n}”: {s}".replace(", ", ",\n") for n, s in zip(negatives, seen, strict=True)]
    return Evidence(
        seen[2] != ground and max(by[:2]) < by[2],
        f"Without a negative prompt the judge sees {ground} as the ground. By how much of 255 each negative prompt "
        f"changes the picture, and the ground then: {said}. Of the words of the first two the model knows none.",
        [(first, f"without: {ground}"), *zip(images, names, strict=True)],
    )


# --- lesson 12: what a place can know


SIGMA, NEAR = 3.0, 0.25  # the noise; a quarter of the picture's width


def sees_near(pipe, seed: int) -> Evidence:
    _, look = sides(pipe, PROMPT, guidance=2.0)
    x = SIGMA * noise_of(pipe, seed)
    moved, (h, wide) = x.copy(), x.shape[1:3]
    moved[0, h // 2, wide // 2] *= -1  # the noise at one place, turned round
    net = surgery.unet(pipe)
    answers = [np.abs(look(moved, SIGMA) - look(x, SIGMA))[0].mean(-1)]
    with surgery.muted(net, surgery.readers(net)):
        answers.append(np.abs(look(moved, SIGMA) - look(x, SIGMA))[0].mean(-1))
    y, across = np.mgrid[:h, :wide]
    far = np.hypot(y - h // 2, across - wide // 2) > NEAR * wide
    beyond = [float(a[far].sum() / a.sum()) for a in answers]
    everywhere = [float((a > 1e-6 * a.max()).mean()) for a in answers]
    return Evidence(
        everywhere[0] > 0.99 and beyond[0] > 0.02,
        f"The noise at one place was turned round, and the network asked again: its answer changes at "
        f"{everywhere[0]:.0%} of all places, and {beyond[0]:.0%} of the change is more than a quarter of the picture "
        f"away. Without attention: {everywhere[1]:.0%} and {beyond[1]:.0%}.",
        [
            (np.log10(a + 1e-6 * answers[0].max()), name)
            for a, name in zip(answers, ("whole", "without attention"), strict=True)
        ],
    )


_LOOK = "Try other seeds. Does the verdict hold for every one?"
HEALS = Claim(
    "On its way the network corrects its own errors",
    "imprecise",
    "Early ones, while all is still open. Late ones stay, because by then it trusts what it sees.",
    _LOOK,
    heals,
)
SCHEDULE = Claim(
    "The noise schedule decides how good the pictures are",
    "imprecise",
    "It decides where the steps are, and that matters while they are few. With many, all four end in the same world.",
    _LOOK,
    schedule_decides,
)
ONE_SPACE = Claim(
    "It can draw because words and pictures lie in one space (CLIP)",
    "imprecise",
    "Such a space can be made, and CLIP is one. But the drawing network only learns what the text encoder's numbers go "
    "with, and the encoder need never have seen a picture.",
    _LOOK,
    one_space,
)
PHRASING = Claim(
    "Everything depends on how the prompt is phrased",
    "imprecise",
    "It depends on words that the model has learned. Among those, order and synonyms matter little.",
    _LOOK,
    phrasing,
)
COUNTING = Claim(
    "It can count: ask for two, and it draws two",
    "wrong",
    "It draws what captions taught. No caption counted, so a number, and even a plural, is a word without a meaning.",
    _LOOK,
    counting,
)
EXTRA_FINGERS = Claim(
    "‘Extra fingers’ as a negative prompt takes them away",
    "imprecise",
    "Guidance leads away from what words mean to the model. Words that no caption gave a meaning lead anywhere.",
    _LOOK,
    extra_fingers,
)
NEAR_ONLY = Claim(
    "A U-Net sees what is near, only a transformer sees the whole picture",
    "wrong",
    "Both see all of it: a transformer by comparing all places, a U-Net also by its small maps, on which all is near, "
    "and by its norms, which are taken over whole maps.",
    _LOOK,
    sees_near,
)
CLAIMS = (HEALS, SCHEDULE, ONE_SPACE, PHRASING, COUNTING, EXTRA_FINGERS, NEAR_ONLY)
