"""Claims about noise, schedules and steps, and what each is tried by."""

from itertools import islice
from weakref import WeakKeyDictionary

import numpy as np
from PIL import Image, ImageFilter

from ...families import MODELS
from ...images import to_image, to_pixels
from ...probe import Step, encode, from_noise, noise_of, trace
from ...schedules import alpha_bar, betas, q_sample
from ...train import measure
from ...train.recipe import ALPHA_BAR
from .forward import ENDS
from .guidance import changes, size
from .lesson import BLUE, GREEN, ORANGE
from .seeds import angle, sharpness, slerp
from .trial import Claim, Evidence

PROMPT = "a red house under a full moon"
COPIES = 256  # noisy copies that are averaged
_ENDS: WeakKeyDictionary = WeakKeyDictionary()  # pipe -> settings -> what a run gave: several claims ask for it


def end(pipe, prompt: str, **settings) -> np.ndarray:
    """The last clean latents of a run."""
    known = _ENDS.setdefault(pipe, {})
    key = (prompt, *sorted(settings.items()))
    if key not in known:
        for step in trace(pipe, prompt, **settings):
            known[key] = step.x0
    return known[key]


def plain_steps(pipe, seed: int) -> list[Step]:
    """Eight steps without guidance."""
    known = _ENDS.setdefault(pipe, {})
    if seed not in known:
        known[seed] = list(trace(pipe, PROMPT, seed=seed, steps=8, guidance=1.0))
    return known[seed]


def far(a: np.ndarray, b: np.ndarray) -> float:
    """The distance of a from b, over b's length."""
    return size(a - b) / size(b)


def drawn_from(pipe, noise: np.ndarray, prompt: str, **settings) -> np.ndarray:
    """The last clean latents of runs from these noises, (B, h, w, c)."""
    for event in from_noise(pipe, noise, prompt, **settings):
        if event.stage == "decode":
            break
        if event.x0 is not None:
            last = event.x0
    return last


# --- noise


def grain(pipe, seed: int) -> Evidence:
    clean = Image.fromarray(measure.renders(measure.scenes(3)[1:2])[0])
    x, rng, share = to_pixels(clean), np.random.default_rng(seed), 0.5
    noisy = [q_sample(x, rng.standard_normal(x.shape, np.float32), share) for _ in range(COPIES)]
    blurred = clean.filter(ImageFilter.GaussianBlur(clean.width / 40))
    mean = to_image(np.clip(np.mean(noisy, 0) / share**0.5, -1, 1).astype(np.float32))
    one = to_image(np.clip(noisy[0], -1, 1).astype(np.float32))
    edges = [sharpness(image) for image in (clean, blurred, one)]
    off = [changes(image, clean).mean() for image in (mean, blurred)]
    return Evidence(
        edges[1] < edges[0] < edges[2] and off[0] < off[1],
        f"Neighbouring pixels of the clean picture differ by {edges[0]:.1f} of 255, those of a blurred one by "
        f"{edges[1]:.1f}, those of the noisy one by {edges[2]:.1f}. Noise lies on top and averages out: the mean of "
        f"{COPIES} noisy copies is off by {off[0]:.1f}; the mean of any number of blurred copies by {off[1]:.1f}.",
        [(clean, "clean"), (blurred, "blurred"), (one, "noisy"), (mean, f"mean of {COPIES} noisy")],
    )


def nothing_left(pipe, seed: int) -> Evidence:
    scenes = measure.scenes(40)
    bright, dark = (
        next(s for s in scenes if (s.time, s.terrain) == kind) for kind in (("day", "snow"), ("night", "sea"))
    )
    hidden = [encode(pipe, Image.fromarray(picture)) for picture in measure.renders([bright, dark])]
    noise, left = noise_of(pipe, seed), ALPHA_BAR[-1]
    most = ((1 - left) / left) ** 0.5
    starts = np.concatenate([noise, *(noise + z / most for z in hidden)])
    ends = drawn_from(pipe, starts, "a house", steps=4, guidance=1.0)
    names = ("from pure noise", "and a trace of day", "and a trace of night")
    drawn = pipe.decode(ends)
    light = [np.asarray(image, float).mean() for image in drawn]
    return Evidence(
        bool(left**0.5 > 0.01 and light[1] > light[2] + 5),
        f"At the last time step {left**0.5:.1%} of the picture is left. The same noise was used three times, alone and "
        f"with that much of a bright and of a dark picture in it: the results have a mean brightness of "
        f"{light[0]:.0f}, {light[1]:.0f} and {light[2]:.0f} of 255.",
        list(zip(drawn, names, strict=True)),
    )


def cosine(pipe, seed: int) -> Evidence:
    kinds = {name: m.family.schedule.get("betas", "flow") for name, m in MODELS.items()}
    scaled, flow = (sum(kind == k for kind in kinds.values()) for k in ("scaled_linear", "flow"))

    def plot(ax) -> None:
        for kind, colour in (("cosine", ORANGE), ("scaled_linear", BLUE)):
            ax.plot(alpha_bar(betas(kind, 1000, *ENDS[kind])) ** 0.5, color=colour, label=kind.replace("_", " "))
        t = np.linspace(0, 1, 1000)
        ax.plot((1 - t) / np.hypot(t, 1 - t), color=GREEN, label="flow, evenly spaced")
        ax.set(title="part of the picture, by time", xlabel="t", ylim=(0, None))
        ax.legend(fontsize=7)

    return Evidence(
        flow + scaled == len(kinds),
        f"Of the {len(kinds)} models that this program knows by name, {scaled} were trained with the scaled linear "
        f"schedule, {flow} with straight flow, and {len(kinds) - scaled - flow} with cosine.",
        plot=plot,
    )


def says_noise(pipe, seed: int) -> Evidence:
    counts = {}
    for name, model in MODELS.items():
        own = pipe.description.prediction if name == pipe.name else None  # a file may say what its family does not
        kind = own or model.prediction or model.family.prediction
        counts[kind] = counts.get(kind, 0) + 1
    steps = plain_steps(pipe, seed)
    first, late = (v_of(step) for step in (steps[0], steps[-1]))
    alike = [
        abs(float(np.corrcoef(v.ravel(), s.noise.ravel())[0, 1])) for v, s in ((first, steps[0]), (late, steps[-1]))
    ]
    said = ", ".join(f"{n} {kind}" for kind, n in counts.items())
    step = steps[len(steps) // 2]
    shown = ((step.noise, "its noise"), (step.x0, "its picture"), (v_of(step), "their mixture, v"))
    return Evidence(
        pipe.description.prediction != "eps" and len(counts) > 1,
        f"The model at hand predicts {pipe.description.prediction}. The named models, by their family: {said}. "
        f"v is like the noise where there is little of it (correlation {alike[1]:.2f}), "
        f"and hardly where there is nothing else ({alike[0]:.2f}).",
        [(z[0, :, :, 0], f"{name},\none channel") for z, name in shown],
    )


def v_of(step: Step) -> np.ndarray:
    """What a network that predicts v says in this step (Salimans and Ho 2022)."""
    return (step.noise - step.sigma * step.x0) / np.sqrt(1 + step.sigma**2)


def random_path(pipe, seed: int) -> Evidence:
    same = {"seed": seed, "steps": 4, "guidance": 1.0}
    once, again = (list(trace(pipe, PROMPT, sampler="ddim", **same))[-1].x0 for _ in range(2))
    two = np.repeat(noise_of(pipe, seed), 2, axis=0)
    noisy = drawn_from(pipe, two, PROMPT, sampler="euler_ancestral", **same)
    equal = np.array_equal(once, again)
    return Evidence(
        equal and far(noisy[:1], noisy[1:]) > 0.05,
        f"DDIM from the same noise, twice: {'equal bit for bit' if equal else 'not equal'}. Euler ancestral, which "
        f"adds fresh noise in each step, twice from the same first noise: {far(noisy[:1], noisy[1:]):.0%} apart. Even "
        "its fresh noise comes from the seed.",
        list(zip(pipe.decode(np.concatenate([once, noisy])), ("DDIM, twice", "ancestral", "ancestral"), strict=True)),
    )


def sensitive(pipe, seed: int) -> Evidence:
    a, b = noise_of(pipe, seed), noise_of(pipe, seed + 1)
    turns = (0, 1, 4, np.degrees(angle(a, b)))
    noises = np.concatenate([slerp(a, b, turn / turns[-1]) for turn in turns])
    ends = drawn_from(pipe, noises, PROMPT, steps=5, guidance=1.0)
    moved, changed = ([far(z[k : k + 1], z[:1]) for k in (1, 2, 3)] for z in (noises, ends))
    names = ["the noise", *(f"turned by {turn:.0f}°" for turn in turns[1:])]
    return Evidence(
        changed[0] < 5 * moved[0] and changed[0] < changed[2] / 5,
        f"Noise turned by 1 degree ({moved[0]:.1%} of its length) changes the latents by {changed[0]:.1%}; by 4 "
        f"degrees ({moved[1]:.1%}), by {changed[1]:.1%}; another seed's ({moved[2]:.0%}), by {changed[2]:.0%}.",
        list(zip(pipe.decode(ends), names, strict=True)),
    )


# --- steps

RUNS = (3, 6, 12)
REFERENCE = 16


def steps_of(pipe, seed: int, sampler: str) -> list[np.ndarray]:
    return [end(pipe, PROMPT, seed=seed, sampler=sampler, steps=n, guidance=1.0, schedule="karras") for n in RUNS]


def reference(pipe, seed: int) -> np.ndarray:
    return end(pipe, PROMPT, seed=seed, sampler="unipc", steps=REFERENCE, guidance=1.0, schedule="karras")


def high_order(pipe, seed: int) -> Evidence:
    goal = reference(pipe, seed)
    off = {name: [far(z, goal) for z in steps_of(pipe, seed, name)] for name in ("euler", "dpmpp_2m")}

    def plot(ax) -> None:
        for (name, values), colour in zip(off.items(), (BLUE, ORANGE), strict=True):
            ax.plot(RUNS, values, "o-", color=colour, label=name, ms=4)
        ax.set(title="distance from many steps", xlabel="steps", xticks=RUNS, ylim=(0, None))
        ax.legend(fontsize=7)

    said = {name: " and ".join(f"{x:.1%}" for x in values[1:]) for name, values in off.items()}
    return Evidence(
        all(a < b for a, b in zip(off["dpmpp_2m"][1:], off["euler"][1:], strict=True)),
        f"With {' and '.join(map(str, RUNS[1:]))} steps DPM++ 2M is {said['dpmpp_2m']} away from where many steps "
        f"lead, Euler {said['euler']}.",
        plot=plot,
    )


def flat(pipe, seed: int) -> Evidence:
    *drawn, goal = pipe.decode(np.concatenate([*steps_of(pipe, seed, "dpmpp_2m"), reference(pipe, seed)]))
    off = [changes(image, goal).mean() for image in drawn]
    reached = next((n for n, o in zip(RUNS, off, strict=True) if o < 1), None)
    titles = [f"{n} steps: {o:.1f}" for n, o in zip(RUNS, off, strict=True)]
    return Evidence(
        off[0] > 1 and reached is not None and reached < 30,
        f"DPM++ 2M without guidance differs from {REFERENCE} steps by {', '.join(f'{o:.1f}' for o in off)} of 255 at "
        f"{', '.join(map(str, RUNS))} steps. Below 1, here with {reached} steps, nobody sees a difference; above, the "
        "loss is plain.",
        [*zip(drawn, titles, strict=True), (goal, f"{REFERENCE} steps")],
    )


def one_step(pipe, seed: int) -> Evidence:
    steps = plain_steps(pipe, seed)
    first, half, last = drawn = pipe.decode(np.concatenate([steps[k].x0 for k in (0, 3, -1)]))
    edges = [sharpness(image) for image in drawn]
    return Evidence(
        edges[0] < 0.9 * edges[2],
        f"This model, which is no consistency model, expects a clean picture in its first step too. There neighbouring "
        f"pixels differ by {edges[0]:.1f} of 255, in its last by {edges[2]:.1f}: the first answer is a mean of many.",
        [(first, "expected in step 1"), (half, "in step 4"), (last, "in step 8")],
    )


def one_earlier(pipe, seed: int) -> Evidence:
    settings = {"seed": seed, "guidance": 1.0, "schedule": "karras"}
    begun = {n: list(islice(trace(pipe, PROMPT, steps=n, **settings), 2)) for n in (4, 16)}
    firsts, second = ({n: steps[k] for n, steps in begun.items()} for k in (0, 1))
    second = {n: step.sigma for n, step in second.items()}
    a, b = (step.x0 for step in firsts.values())
    same = far(a, b)
    few, many = firsts
    return Evidence(
        same < 1e-5 and second[few] < 0.9 * second[many],
        f"Two runs of {few} and of {many} steps begin at noise {firsts[few].sigma:.1f} and get the same first answer, "
        f"{'but for rounding' if same < 1e-5 else f'but for {same:.0%}'}. Then one goes on to noise {second[few]:.1f}, "
        f"the other to {second[many]:.1f}. The network was not told where.",
        list(zip(pipe.decode(np.concatenate([a, b])), (f"first of {few}", f"first of {many}"), strict=True)),
    )


_LOOK = "Try other seeds. Does the verdict hold for every one?"
GRAIN = Claim(
    "Noise makes the picture blurry, step by step",
    "wrong",
    "Noise adds grain. Blur takes detail away, noise hides it.",
    _LOOK,
    grain,
)
NOTHING_LEFT = Claim(
    "After the last step there is nothing of the picture left",
    "imprecise",
    "It depends on the schedule. The common one leaves a trace, so pure noise is a start that training never saw.",
    "Try other seeds: how much does so little decide?",
    nothing_left,
)
COSINE = Claim(
    "Stable Diffusion, like most modern models, uses the cosine schedule",
    "wrong",
    "Stable Diffusion uses scaled linear, the newer models use flow.",
    "<code>mlxdiff models sdxl</code> shows what else a named model is.",
    cosine,
)
SAYS_NOISE = Claim(
    "The network predicts the noise",
    "imprecise",
    "Some predict noise, some v, some the way from picture to noise. Any of them gives the others.",
    "Which of the three maps would you rather predict, if you had to?",
    says_noise,
)
RANDOM_PATH = Claim(
    "Generation is not deterministic: two runs share no path",
    "wrong",
    "The first noise is random. The path from there is fixed, unless the sampler adds noise, and that has a seed too.",
    _LOOK,
    random_path,
)
SENSITIVE = Claim(
    "The smallest change of the noise leads to an entirely different picture",
    "wrong",
    "Near noises lead to near pictures; that is why one can be turned into another.",
    _LOOK,
    sensitive,
)
HIGH_ORDER = Claim(
    "DPM++ is for many steps: it gets better the more you take",
    "wrong",
    "Every sampler comes nearer with more steps. DPM++ was made to need few.",
    _LOOK,
    high_order,
)
FLAT = Claim(
    "Up to 30 to 50 steps quality grows; fewer steps cost none",
    "imprecise",
    "The gain ends where the error can no longer be seen. Where that is, depends on sampler and guidance.",
    "The race of lesson 5 has the same with guidance, which needs more steps.",
    flat,
)
ONE_STEP = Claim(
    "Consistency models are different: they predict the clean picture",
    "imprecise",
    "Every denoiser does. A consistency model is taught to give the same sharp answer all along the path.",
    _LOOK,
    one_step,
)
ONE_EARLIER = Claim(
    "The network predicts the picture of one step earlier",
    "wrong",
    "It says what is clean and what is noise. How far to go is the sampler's choice.",
    _LOOK,
    one_earlier,
)
NOISE = (GRAIN, NOTHING_LEFT, COSINE, SAYS_NOISE, RANDOM_PATH, SENSITIVE, HIGH_ORDER, FLAT, ONE_STEP, ONE_EARLIER)
