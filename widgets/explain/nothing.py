"""Lesson 9, from nothing: checks for a sampler that the reader writes. A check that fails names the mistake if it is a
common one. The check of an exercise whose answer is still missing says so and stops nothing."""

import math
from collections.abc import Callable, Iterable

import mlx.core as mx
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ...errors import Error
from ...probe import from_noise, noise_of, sides, trace
from .lesson import png

DDIM = {"sampler": "ddim", "schedule": "leading"}
Found = tuple[np.ndarray, ...]
Known = Iterable[tuple[str, Found]]  # what to say about a mistake, and what it gives
STEPS = 4  # of the runs that are compared: enough to tell two samplers apart


class Mistake(Error):
    """Shown without the way to it: the reader's own cell stands above."""

    def _render_traceback_(self) -> list[str]:
        return [f"✗ {self}"]


class Checks:
    """Checks of each step, against what this pipeline does."""

    def __init__(self, pipe):
        self._pipe = pipe
        schedule = pipe.description.noise_levels(pipe.resolve("", sampler="ddim"))
        self._share = schedule.alpha_bar  # what is left of the picture's variance after each step
        rng = np.random.default_rng(9)
        self.shape = noise_of(pipe, 0).shape  # of latents, (1, h, w, c)
        self._picture, self._noise, self._x = rng.standard_normal((3, *self.shape)).astype(np.float32)

    # --- the steps

    def levels(self, alpha_bar) -> None:
        """The share of the picture's variance that is left after each of the training steps."""
        right = self._share
        each = np.concatenate([right[:1], right[1:] / right[:-1]])  # 1 - beta
        known = {
            "These are 1 - beta, step by step. What is left after many steps is their product: np.cumprod.": each,
            "These are the products of beta. A step keeps the share 1 - beta.": np.cumprod(1 - each),
            "These are square roots. Keep the shares themselves; the roots come when you mix.": np.sqrt(right),
            "These are the shares of the noise. Subtract them from 1.": 1 - right,
            "They run backwards: the first step comes first.": right[::-1],
        }
        self._same("the shares", (alpha_bar,), (right,), ((text, (a,)) for text, a in known.items()), 1e-6)
        print(f"✓ {len(right)} steps. {right[0]:.2%} is left after the first, {right[-1]:.2%} after the last.")

    def mix(self, mix: Callable) -> None:
        """mix(picture, noise, t): the picture after t + 1 steps of noise."""
        for t in (len(self._share) // 3, 0):
            a, b, picture, noise = self._share[t], 1 - self._share[t], self._picture, self._noise
            known = {
                "The two shares are of the variance. Picture and noise are multiplied by their square roots.": (
                    a * picture + b * noise
                ),
                "The picture has the noise's share, and the noise has the picture's.": b**0.5 * picture
                + a**0.5 * noise,
                "The picture is not made weaker: multiply it by the root of its share.": picture + b**0.5 * noise,
                "The noise is not made weaker: multiply it by the root of 1 - alpha_bar.": a**0.5 * picture + noise,
                "The noise is subtracted.": a**0.5 * picture - b**0.5 * noise,
            }
            right = a**0.5 * picture + b**0.5 * noise
            self._same("the mixture", (mix(picture, noise, t),), (right,), ((text, (x,)) for text, x in known.items()))
        print("✓ Picture and noise are mixed as in training.")

    def look(self, look: Callable, words: Callable) -> None:
        """look(x, t, text): the picture and the noise that the network sees in x, which is mixed as in training."""
        t, prompt = len(self._share) // 2, "a blue boat"
        a, b = self._share[t] ** 0.5, (1 - self._share[t]) ** 0.5
        picture, x = self._seen(prompt, t), self._x
        noise = (x - a * picture) / b
        answer = (a * x - picture) / b  # what the network said, if it is v
        known = {
            "The noise comes first and the picture second: return the picture first.": (noise, picture),
            "The network's answer is taken for the noise. This one answers with v: a mixture of noise and picture.": (
                (x - b * answer) / a,
                answer,
            ),
            "Picture: root of alpha_bar times x minus root of (1 - alpha_bar) times v. Yours adds.": (
                a * x + b * answer,
                noise,
            ),
            "Noise: root of (1 - alpha_bar) times x plus root of alpha_bar times v. Yours subtracts.": (
                picture,
                b * x - a * answer,
            ),
        }
        self._same("picture and noise", look(mx.array(x), t, words(prompt)), (picture, noise), known.items())
        print("✓ The two parts are right, and mixed again they give x.")

    def step(self, step: Callable) -> None:
        """step(ask, x, t, s): x at the lower noise level s. ask(x, t) gives picture and noise."""
        t, s = len(self._share) // 2, len(self._share) // 4
        picture, noise, x = self._picture, self._noise, self._x

        def at(share: float) -> np.ndarray:
            return share**0.5 * picture + (1 - share) ** 0.5 * noise

        known = {
            "It is mixed at t, the level that x has already. Mix it at s.": (at(self._share[t]),),
            "This is the picture alone. All noise at once is too much: mix noise in again, for level s.": (picture,),
            "This is x, unchanged.": (x,),
            "The noise is missing: mix it in again.": (self._share[s] ** 0.5 * picture,),
        }
        found = step(lambda x, t: (mx.array(picture), mx.array(noise)), mx.array(x), t, s)
        self._same("x at level s", (found,), (at(self._share[s]),), known.items())
        print("✓ A step takes the parts apart and mixes them again, with less noise.")

    def draw(self, draw: Callable, plain: Callable) -> None:
        """draw(ask, noise, steps): the latents of a picture. plain(prompt) is an `ask`."""
        prompt, noise = "a blue boat", noise_of(self._pipe, 5)
        right = self._run(prompt, noise, guidance=1.0)
        early = next(trace(self._pipe, prompt, seed=5, steps=STEPS, **DDIM, guidance=1.0)).x0
        known = {
            "This is the noise that you began with: nothing is kept of the steps.": (noise,),
            "Only the first step was made.": (early,),
        }
        self._same("the latents", (draw(plain(prompt), mx.array(noise), STEPS),), (right,), known.items(), 2e-3)
        print("✓ From the same noise, your loop and the pipeline's DDIM end in the same place.")

    def guided(self, guided: Callable, draw: Callable) -> None:
        """guided(prompt, scale): an `ask` that exaggerates what the prompt changes."""
        prompt, scale, t = "a blue boat", 4.0, len(self._share) // 2
        x = self._x
        a, b = (self._parts(x, self._seen(text, t), t) for text in (prompt, ""))

        def by(weight: Callable) -> Found:
            return tuple(weight(p, q) for p, q in zip(a, b, strict=True))

        right = by(lambda p, q: q + scale * (p - q))
        known = {
            "This is the answer to the prompt: the difference is not exaggerated.": a,
            "This is the answer to the empty prompt.": b,
            "With and without are exchanged: begin without words and go towards the prompt.": by(
                lambda p, q: p + scale * (q - p)
            ),
            "You begin at the prompt. Begin without words: scale 1 must give just the prompt.": by(
                lambda p, q: p + scale * (p - q)
            ),
            "Only the difference is left: add it to the answer without words.": by(lambda p, q: scale * (p - q)),
        }
        self._same("picture and noise", guided(prompt, scale)(mx.array(x), t), right, known.items())
        noise = noise_of(self._pipe, 5)
        latents = draw(guided(prompt, scale), mx.array(noise), STEPS)
        end = self._run(prompt, noise, guidance=scale)
        self._same("the latents", (latents,), (end,), (), 2e-3)
        print("✓ Your sampler and the pipeline draw the same picture.")

    # --- the exercises

    def half(self, half) -> None:
        """The first step after which noise has the larger share."""
        if half is not ...:
            right = int(np.argmax(self._share < 0.5))
            known = {
                "That is the last step with more picture than noise: one further.": (right - 1,),
                "That is the middle of the steps, not of the shares: look for alpha_bar below 0.5.": (
                    len(self._share) // 2,
                ),
                "There the mixture's weights are halves. The shares are their squares.": (
                    int(np.argmax(self._share**0.5 < 0.5)),
                ),
            }
            self._same("the step", (half,), (right,), known.items(), 0)
        self._answered(half)

    def fresh(self, fresh: Callable) -> None:
        """fresh(ask, x, t, s, noise): a step in which the noise that is put back is new."""
        t, s = len(self._share) // 2, len(self._share) // 4
        picture, old, x, new = self._picture, self._noise, self._x, np.ascontiguousarray(self._x[:, ::-1])

        def at(noise: np.ndarray, share: float) -> np.ndarray:
            return share**0.5 * picture + (1 - share) ** 0.5 * noise

        known = {
            "The old noise is put back. Put the new one back.": (at(old, self._share[s]),),
            "It is mixed at t. Mix it at s.": (at(new, self._share[t]),),
        }
        found = fresh(lambda x, t: (mx.array(picture), mx.array(old)), mx.array(x), t, s, mx.array(new))
        if found is not ...:
            self._same("x at level s", (found,), (at(new, self._share[s]),), known.items())
        self._answered(found)

    def redraw(self, redraw: Callable, ask: Callable) -> None:
        """redraw(ask, picture, noise, steps, skip): a run that begins with a picture and leaves `skip` steps out."""
        picture, noise, skip = self._picture, self._noise, STEPS // 2
        times = [k * (len(self._share) // STEPS) + 1 for k in reversed(range(STEPS))]

        def run(x: np.ndarray, left: list[int]) -> Found:
            for t, s in zip(left, [*left[1:], 0], strict=True):
                seen, rest = (np.array(part) for part in ask(mx.array(x), t))
                x = (self._share[s] ** 0.5 * seen + (1 - self._share[s]) ** 0.5 * rest).astype(np.float32)
            return (x,)

        def mixed(t: int) -> np.ndarray:
            return (self._share[t] ** 0.5 * picture + (1 - self._share[t]) ** 0.5 * noise).astype(np.float32)

        text = "The picture gets as much noise as at the first step. Give it the noise of the first step that is left."
        known = {
            text: (mixed(times[0]), times[skip:]),
            "No steps are left out.": (mixed(times[0]), times),
            "The picture is not noised.": (picture, times[skip:]),
            "This is the noise alone, drawn from as before.": (noise, times),
        }
        found = redraw(ask, mx.array(picture), mx.array(noise), STEPS, skip)
        if found is not ...:
            mistakes = ((text, run(*begin)) for text, begin in known.items())
            self._same("the latents", (found,), run(mixed(times[skip]), times[skip:]), mistakes, 2e-3)
        self._answered(found)

    # --- how

    def _same(self, what: str, found: Found, right: Found, known: Known, tolerance: float = 1e-4) -> None:
        """Raise unless each part of `found` is near `right`. tolerance: of the error, over its size."""
        found = tuple(found) if isinstance(found, tuple | list) else (found,)
        if len(found) != len(right):
            raise Mistake(f"{what.capitalize()}: {len(right)} values were expected, {len(found)} came.", "Return both.")
        found = tuple(self._numbers(what, part) for part in found)
        for part, expected in zip(found, right, strict=True):
            if part.shape != np.shape(expected):
                fix = "Nothing may be cut off, and nothing put on."
                raise Mistake(f"{what.capitalize()}: shape {np.shape(expected)} was expected, not {part.shape}.", fix)
        if not np.isfinite(np.concatenate([part.ravel() for part in found])).all():
            raise Mistake(f"{what.capitalize()}: there is a value that is no number.", "Look for a division by 0.")
        if far(found, right) <= tolerance:
            return
        for text, wrong in known:
            if far(found, wrong) <= max(tolerance, 1e-6):
                raise Mistake(f"{what.capitalize()}: not yet.", text)
        fix = "Compare with the formula, term by term."
        raise Mistake(f"{what.capitalize()}: off by {far(found, right):.0%} of their size.", fix)

    def _numbers(self, what: str, part) -> np.ndarray:
        try:
            return np.asarray(np.array(part)).astype(np.float64, casting="same_kind")
        except (TypeError, ValueError):
            raise Mistake(f"{what.capitalize()}: numbers were expected, not {part!r}.", "Return an array.") from None

    def _answered(self, answer) -> None:
        print("○ Not answered yet: put your answer in the place of the dots." if answer is ... else "✓ Right.")

    def _seen(self, prompt: str, t: int) -> np.ndarray:
        """The clean latents that the network sees in x at time t, found by the pipeline."""
        share = self._share[t]
        _, look = sides(self._pipe, prompt, negative="", guidance=2.0, **DDIM)
        return look((self._x / share**0.5).astype(np.float32), math.sqrt((1 - share) / share))

    def _parts(self, x: np.ndarray, picture: np.ndarray, t: int) -> Found:
        return picture, (x - self._share[t] ** 0.5 * picture) / (1 - self._share[t]) ** 0.5

    def _run(self, prompt: str, noise: np.ndarray, guidance: float) -> np.ndarray:
        """The latents at the end of the pipeline's run."""
        for event in from_noise(self._pipe, noise, prompt, steps=STEPS, guidance=guidance, **DDIM):
            if event.stage == "decode":
                break
            if event.x is not None:
                x, sigma = event.x, event.sigma
        return x / math.sqrt(1 + sigma**2)


def far(a: Found, b: Found) -> float:
    """The distance of two answers, over the size of the second."""
    a, b = (np.concatenate([np.ravel(part) for part in each]).astype(np.float64) for each in (a, b))
    return math.inf if a.shape != b.shape else float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12))


class Strip:
    """Pictures in a row, each under its name, in the lessons' style."""

    def __init__(self, pictures: dict[str, Image.Image]):
        self._pictures = pictures

    def __repr__(self) -> str:
        return ", ".join(self._pictures)

    def _repr_png_(self) -> bytes:
        return png(self._figure)[0]

    def _figure(self) -> Figure:
        n = len(self._pictures)
        fig = Figure(figsize=(min(8.4, 2.1 * n), 0.18 + min(8.4, 2.1 * n) / n), layout="constrained")
        for ax, (name, image) in zip(fig.subplots(1, n, squeeze=False)[0], self._pictures.items(), strict=True):
            ax.imshow(image)
            ax.set_title(name)
            ax.axis("off")
        return fig
