"""`mlxdiff bench --quality`: draws the same prompts and seeds with several settings, and says of each what its pictures
are worth, how far they are from those of the slowest setting, and what they cost."""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from PIL import Image

from .. import builtin, foreign
from ..errors import Error, did_you_mean
from ..pipeline import Pipeline
from ..recipe import BITS, bits_of
from ..references import pixels
from ..request import Request
from ..score import clip, distances, measure
from ..store import clip as store
from ..train import judge
from ..train import storybook as sb
from ..train.measure import SEED, scenes
from .step import spread

PROMPTS = (  # of models that know the world
    "a photo of a red fox in the snow",
    "a watercolor painting of a lighthouse by the sea at sunset",
    "a close-up portrait of an old fisherman with a white beard",
    "three green apples on a wooden table",
    "a street in Tokyo at night in the rain, neon lights",
    "a blue ceramic teapot beside a yellow cup",
    "a castle on a hill under a full moon, oil painting",
    "an astronaut riding a horse in the desert",
)
STORY = 4  # prompts of the built-in model: with the default settings 50 seconds of one core
_OTHER = ("euler", "ddim")  # the sampler to compare with is the first of these that is not the model's own
MOST = 100  # settings
MOST_PICTURES = 2000  # of each, what CLIP reads stays in memory until all are drawn: 0.6 MB
_LONGEST = 2000  # characters of a prompt
_CALLS = {"heun": 2}  # of the network, a step
Load = Callable[[int | str | None], Pipeline]  # bits -> a model


class Setting(NamedTuple):
    steps: int
    sampler: str
    bits: int | str | None
    reuse: float = 0.0


class Asked(NamedTuple):
    prompts: list[str]
    labels: np.ndarray | None  # (n, 6) words for the judge; None of other models


def settings(
    steps: int, sampler: str, known: Sequence[str], over: Sequence[str] = (), bits: Sequence[int] = (4,)
) -> list[Setting]:
    """The settings to draw with, the slowest first. steps, sampler: the model's defaults. known: the samplers that it
    can use. over: `steps=4,8`, `sampler=ddim`, `bits=8,none`, `reuse=0,0.1`: all combinations of these. By default each
    of the first three changes alone. bits: those of the default."""
    if over:
        values = {"steps": [steps], "sampler": [sampler], "bits": [None], "reuse": [0.0]} | _given(over, known)
        made = [Setting(*combination) for combination in product(*values.values())]
    else:
        made = [Setting(max(1, round(steps * part)), sampler, None) for part in (2, 1, 1 / 2, 1 / 4)]
        made += [Setting(steps, other, None) for other in _OTHER if other in known and other != sampler][:1]
        made += [Setting(steps, sampler, few) for few in bits]
    made = list(dict.fromkeys(made))
    if len(made) > MOST:
        raise Error(f"{len(made)} settings are more than {MOST}.", "Give fewer values: `over`.")
    for s in made:
        Request("", steps=s.steps, sampler=s.sampler, reuse=s.reuse).check_reuse()
    order = [None, *reversed(BITS)]

    def cheapness(s: Setting) -> tuple:
        return -s.steps * _CALLS.get(s.sampler, 1), s.sampler != sampler, order.index(s.bits), s.reuse

    return sorted(made, key=cheapness)


def _given(over: Sequence[str], known: Sequence[str]) -> dict[str, list]:
    fix = "Give such as `over=steps=4,8`, `over=sampler=ddim,euler`, `over=bits=8,none`, `over=reuse=0,0.1`."
    found = {}
    for text in over:
        name, sign, values = text.partition("=")
        if not sign or name not in Setting._fields or name in found:
            again = "is given twice" if name in found else "cannot be varied"
            raise Error(f"{text!r:.60} {again}.", fix)
        found[name] = [_value(name, value.strip(), known, fix) for value in values.split(",")]
    return found


def _value(name: str, text: str, known: Sequence[str], fix: str) -> int | float | str | None:
    if name == "steps":
        if not text.isdecimal() or not 1 <= int(text[:9]) <= 1000:
            raise Error(f"Steps must be a whole number from 1 to 1000; {text!r:.60} was given.", fix)
        return int(text)
    if name == "reuse":
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 1:
            raise Error(f"Reuse must be a number from 0 to 1; {text!r:.60} was given.", fix)
        return value
    if name == "sampler":
        if text not in known:
            choices = f"{did_you_mean(text, known)}Use one of {', '.join(known)}."
            raise Error(f"This model has no sampler {text!r:.60}.", choices)
        return text
    if text in ("none", "16"):
        return None
    bits = bits_of(text)
    if bits not in [*BITS]:
        raise Error(f"There is no quantization {text!r:.60}.", f"Use none or one of {', '.join(map(str, BITS))}.")
    return bits


def asked(model: str, prompts: str | None) -> Asked:
    """What to draw. prompts: a number of prompts, or a file with one a line."""
    own = model in builtin.NAMES
    if prompts is not None and not prompts.isdecimal():
        fix = "Give a number, or a text file with one prompt a line."
        lines = [line.strip() for line in foreign.read_text(foreign.path(prompts), fix).splitlines() if line.strip()]
        if not lines or len(lines) > 1000 or max(map(len, lines)) > _LONGEST:
            most = f"1 to 1,000 lines of at most {_LONGEST:,} characters"
            raise Error(f"{prompts} does not hold {most}.", fix)
        return Asked(lines, judge.asked(lines) if own else None)
    most = 1000 if own else len(PROMPTS)
    count = (STORY if own else most) if prompts is None else int(prompts[:9])
    if not 1 <= count <= most:
        fix = "Give a file of more: `prompts=FILE`."
        raise Error(f"{model} has 1 to {most} prompts of its own; {count} were asked for.", fix)
    if not own:
        return Asked([*PROMPTS[:count]], None)
    chosen = scenes(count)
    return Asked([sb.plain(scene) for scene in chosen], judge.labels(chosen))


class Drawn(NamedTuple):
    """The pictures of one setting, as far as they are needed. db: to those of the slowest one; None of itself. reused:
    the part of all steps that took over the work of earlier ones."""

    setting: Setting
    seconds: dict
    peak_bytes: int
    db: float | None
    seen: list[np.ndarray]  # each as the judge or CLIP takes it
    reused: float


def draw(
    load: Load, todo: list[Setting], prompts: list[str], see: Callable[[Image.Image], np.ndarray], **size
) -> Iterator[Drawn | None]:
    """Draw all, model by model, and yield None after each picture but the last of a setting. The first setting is the
    reference of all. The first picture of a model is drawn twice: the first time it also loads the networks."""
    reference: list[np.ndarray] = []
    for bits in dict.fromkeys(s.bits for s in todo):
        pipe = load(bits)
        pipe(prompts[0], seed=SEED, steps=1, **size)
        for setting in (s for s in todo if s.bits == bits):
            mx.clear_cache()
            mx.reset_peak_memory()
            seconds, errors, seen, reused = [], [], [], 0
            for k, prompt in enumerate(prompts):
                begin = time.perf_counter()
                how = setting._asdict() | size
                del how["bits"]
                result = pipe(prompt, seed=SEED + k, **how)
                seconds.append(time.perf_counter() - begin)
                image, reused = result.image, reused + result.reused
                seen.append(see(image))
                values = np.asarray(image, np.float32)
                if setting == todo[0]:
                    reference.append(np.asarray(image))
                errors.append(float(np.square(values - reference[k]).mean()))
                if k + 1 < len(prompts):
                    yield None
            db = None if setting == todo[0] else 10 * np.log10(255**2 / max(float(np.mean(errors)), 1e-3))
            part = reused / (setting.steps * len(prompts))
            yield Drawn(setting, spread(seconds), mx.get_peak_memory(), db, seen, part)
        del pipe
        mx.clear_cache()


class Scorer:
    """What pictures are scored by: the judge of the built-in model, else a CLIP if it is here, else nothing. CLIP is
    read only once all is drawn: its memory is none of the model's."""

    def __init__(self, question: Asked, name: str | None):
        self.question, self.place, self.sees, self.title = question, None, None, None
        if question.labels is not None:
            if (question.labels < 0).all():
                raise Error("No prompt has a word that the judge knows.", "`mlxdiff models storybook` lists them.")
            self.title = "% of the words of a prompt that the judge sees"
        elif name is not None or store.here(store.DEFAULT) is not None:
            name = store.DEFAULT if name is None else name
            self.place, self.title = store.find(name, offline=False), f"CLIP score by {Path(name).name}"
            self.sees = store.check(self.place)

    def see(self, image: Image.Image) -> np.ndarray:
        """What is kept of a picture until all are drawn."""
        if self.question.labels is not None:
            return measure.for_judge(image)
        return np.zeros(0) if self.sees is None else np.array(pixels(image, self.sees))

    def scores(self, drawn: list[Drawn]) -> list[np.ndarray] | None:
        """Of each setting, the score of each picture."""
        if self.question.labels is not None:
            referee, labels = judge.load(judge.shipped()), self.question.labels
            wanted = labels >= 0
            some = wanted.any(1)
            right = [(judge.read(referee, np.stack(d.seen)) == labels) & wanted for d in drawn]
            return [100 * r[some].sum(1) / wanted[some].sum(1) for r in right]
        if self.place is None:
            return None
        encoder = store.read_vision(self.place)
        rows = [clip.embed_all(encoder, d.seen) for d in drawn]
        del encoder
        texts, _ = clip.embed_texts(self.place, self.question.prompts)
        return [distances.clip_scores(x, texts) for x in rows]


def compare(
    load: Load, todo: list[Setting], question: Asked, scorer: Scorer, progress: Callable[[int], None], **size
) -> list[dict]:
    """A row for each setting, in the order of `todo`."""
    if len(todo) * len(question.prompts) > MOST_PICTURES:
        problem = f"{len(todo)} settings of {len(question.prompts)} prompts are more than {MOST_PICTURES:,} pictures."
        raise Error(problem, "Give fewer prompts, or fewer values: `over`.")
    found = {}
    for i, drawn in enumerate(draw(load, todo, question.prompts, scorer.see, **size)):
        progress(i + 1)
        if drawn is not None:
            found[drawn.setting] = drawn
    ordered = [found[setting] for setting in todo]
    scores = scorer.scores(ordered)
    if scores is None:
        return [row(drawn, None, None) for drawn in ordered]
    return [row(drawn, mine, scores[0]) for drawn, mine in zip(ordered, scores, strict=True)]


def row(drawn: Drawn, scores: np.ndarray | None, best: np.ndarray | None) -> dict:
    """best: the scores of the reference, from which the difference is taken prompt by prompt."""
    found = drawn.setting._asdict() | {"score": None, "below": None}
    if scores is not None:
        each = np.arange(len(scores))
        found |= {"score": measure.mean(scores, each, 100.0), "below": measure.mean(best - scores, each)}
    costs = {"seconds": drawn.seconds, "peak_bytes": drawn.peak_bytes}
    return found | {"db": drawn.db, "reused": drawn.reused} | costs


def fastest_as_good(rows: list[dict]) -> int | None:
    """The fastest row whose score is not measurably below that of the first; None without scores."""
    good = [i for i, r in enumerate(rows) if r["below"] is not None and r["below"]["low"] <= 0]
    return min(good, key=lambda i: rows[i]["seconds"]["median"], default=None)


# ---- the table


def table(facts: dict) -> str:
    f, rows = facts, facts["rows"]
    n, title = len(f["prompts"]), f["score"]
    lines = [
        f"{f['model']}, {f['width']}x{f['height']}, {f['dtype']}, {f['chip']}, mlx {f['mlx']} on {f['device']}",
        f"{n} prompts, seeds {SEED} to {SEED + n - 1}; score: {title or 'none'}",
        "",
        f"{'steps':>5}  {'sampler':16}{'bits':>6}{'reuse':>6}{'saved':>7}{'score':>8}  {'95 % interval':15}"
        f"{'to first':>9}{'s/picture':>11}{'speed':>8}{'peak':>10}",
    ]
    took = [r["seconds"]["median"] for r in rows]
    for i, r in enumerate(rows):
        score = r["score"]
        value = f"{score['value']:8.1f}  {score['low']:5.1f} - {score['high']:<5.1f} " if score else f"{'-':>8}{'':17}"
        db = f"{r['db']:6.1f} dB" if r["db"] is not None else "-"
        mark = "  *" if i == f["fastest_as_good"] else ""
        bits = "-" if r["bits"] is None else r["bits"]
        lines.append(
            f"{r['steps']:5}  {r['sampler']:16}{bits:>6}{r['reuse']:6g}{r['reused']:7.0%}{value}{db:>9}"
            f"{took[i]:11.2f}{took[0] / took[i]:7.1f}x{r['peak_bytes'] / 1e9:7.2f} GB{mark}"
        )
    lines += ["", "saved: the part of the steps that took over the work of earlier ones (`reuse`)."]
    lines.append("to first: how far the pictures are from those of the first row; below 23 dB, other pictures.")
    if f["fastest_as_good"] is not None:
        lines.append(f"*: the fastest whose score is not measurably below that of the first row, of {n} prompts.")
    elif title is None:
        lines.append("No score: CLIP is not here. `mlxdiff score FOLDER` fetches it, or give a folder: --clip DIR.")
    if title is not None and n < measure.FEW:
        lines.append(
            f"{n} prompts are few: small losses do not show. --prompts {100 if f['own'] else 'FILE'} shows more."
        )
    return "\n".join(line.rstrip() for line in lines)
