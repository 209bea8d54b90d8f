"""Folders of pictures to figures: what CLIP and, for pictures of the built-in model, the judge see in them; how well
that matches the prompts; how far two folders are apart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import Error
from ..models import vision
from ..references import pixels
from ..train import judge
from . import clip, distances
from . import folder as folders
from .folder import Skipped

Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much
SIDE = 128  # of the pictures that the judge reads
FEW = 30  # values; of fewer, the bootstrap's intervals are too narrow
FEW_FOR_CMMD = 500  # pictures in each folder; published figures use thousands


@dataclass(frozen=True)
class Seen:
    """The pictures of a folder."""

    names: list[str]
    prompts: list[str | None]
    embeddings: np.ndarray | None  # (n, d), of length 1; None without CLIP
    features: np.ndarray | None  # (n, 128), what the judge sees; None unless the built-in model drew all of them
    words: np.ndarray | None  # (n, 6), the words that the judge names


def look(
    paths: list[Path],
    prompts: dict[str, str] | None,
    encoder: vision.Vision | None,
    referee: judge.Judge | None,
    skipped: Skipped,
    progress: Callable[[int, int], None],
) -> Seen:
    """Read pictures in batches. Of each, a few thousand numbers stay in memory."""
    names, said, whole, small, rows, features, words = [], [], [], [], [], [], []
    for i, picture in enumerate(folders.read(paths, prompts, skipped)):
        if picture is not None:
            names.append(picture.name)
            said.append(picture.prompt)
            if encoder is not None:
                whole.append(pixels(picture.image, encoder.config))
            if referee is not None:
                small.append(for_judge(picture.image))
        if whole and (len(whole) == clip.BATCH or i + 1 == len(paths)):
            rows.append(clip.embed(encoder, whole))
            whole.clear()
        if small and (len(small) == clip.BATCH or i + 1 == len(paths)):
            features.append(judge.features(referee, np.stack(small)))
            words.append(judge.read(referee, np.stack(small)))
            small.clear()
        progress(i + 1, len(paths))
    if not names:
        first = next(iter(skipped.example.values()), "")
        raise Error(f"None of {len(paths)} pictures in {paths[0].parent} can be read: {first}.", "Give other pictures.")
    return Seen(
        names=names,
        prompts=said,
        embeddings=distances.unit(np.concatenate(rows)) if rows else None,
        features=np.concatenate(features) if features else None,
        words=np.concatenate(words) if words else None,
    )


def for_judge(image: Image.Image) -> np.ndarray:
    """A picture as the judge takes it, (128, 128, 3)."""
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def mean(values: np.ndarray, groups: Sequence, top: float | None = None) -> dict:
    """A mean, its interval, and of how many values."""
    low, high = distances.mean_interval(values, np.asarray(groups), top)
    return {"value": float(values.mean()), "low": low, "high": high, "n": len(values)}


def prompts_met(seen: Seen, folder: Path) -> dict | None:
    """CLIP scores of the pictures that have a prompt, and their mean. None if none has one, or without CLIP."""
    rows = [i for i, prompt in enumerate(seen.prompts) if prompt is not None]
    if seen.embeddings is None or not rows:
        return None
    prompts = [seen.prompts[i] for i in rows]
    texts, cut = clip.embed_texts(folder, prompts)
    scores = distances.clip_scores(seen.embeddings[rows], texts)
    each = [{"picture": seen.names[i], "score": float(s)} for i, s in zip(rows, scores, strict=True)]
    return mean(scores, prompts) | {"prompts": len(set(prompts)), "cut": cut, "each": each}


def words_met(seen: Seen) -> dict | None:
    """For pictures of the built-in model: the share of the words asked for that the judge sees, of each kind and in
    all, and the share of the pictures that lack none."""
    if seen.words is None:
        return None
    prompts = [prompt or "" for prompt in seen.prompts]
    return adherence(seen.words, judge.asked(prompts), prompts)


def adherence(words: np.ndarray, asked: np.ndarray, groups: Sequence[str]) -> dict | None:
    """words, asked: (n, 6); in `asked`, -1 where no word is asked for. groups: what is not independent is of one."""
    right, wanted = words == asked, asked >= 0
    some = wanted.any(1)
    if not some.any():
        return None
    groups, whole = np.asarray(groups), (right | ~wanted).all(1)[some]
    kinds = {
        kind: mean(right[wanted[:, k], k].astype(float), groups[wanted[:, k]], 1.0)
        for k, kind in enumerate(judge.WORDS)
        if wanted[:, k].any()
    }
    where = np.nonzero(wanted)
    return {
        "words": mean(right[wanted].astype(float), groups[where[0]], 1.0),
        "all": mean(whole.astype(float), groups[some], 1.0),
        "kinds": kinds,
    }


def apart(a: Seen, b: Seen, progress: Progress) -> dict:
    """The distances of two folders, by those features that both have."""
    found = {}
    if a.embeddings is not None and b.embeddings is not None:
        pair = a.embeddings, b.embeddings
        found["cmmd"] = distances.cmmd(*pair, progress=lambda n, of: progress("CMMD", n, of))
        found["frechet"] = distances.frechet_distance(*pair, progress=lambda n, of: progress("Frechet", n, of))
    if a.features is not None and b.features is not None:
        found["judge"] = distances.frechet_distance(
            a.features, b.features, progress=lambda n, of: progress("judge", n, of)
        )
    sizes = {"n": [len(a.names), len(b.names)]}
    return {
        name: {"value": d.value, "low": d.interval.low, "high": d.interval.high, "chance": d.chance} | sizes
        for name, d in found.items()
    }


def warnings(facts: dict, width: int | None) -> list[str]:
    """What the number of pictures does not bear out, and why. width: of CLIP's embeddings."""
    said, score = [], facts["clip_score"]
    few = "a bootstrap of so few says too narrow an interval"
    if score is not None and score["prompts"] < FEW:
        said.append(f"The CLIP score rests on {score['prompts']} prompts, fewer than {FEW}: {few}.")
    words = facts["storybook"]
    if words is not None and words["all"]["n"] < FEW:
        said.append(f"The judge's shares rest on {words['all']['n']} pictures, fewer than {FEW}: {few}.")
    for name, title, features in (("frechet", "CLIP features", width), ("judge", "judge's features", 128)):
        row = facts["distances"].get(name)
        if row is not None and min(row["n"]) <= features:
            said.append(
                f"The Fréchet distance of {title} has {min(row['n'])} pictures to learn a {features} x {features} "
                f"covariance from: it needs more than {features} in each folder, and mostly counts pictures below that."
            )
    row = facts["distances"].get("cmmd")
    if row is not None and min(row["n"]) < FEW_FOR_CMMD:
        said.append(
            f"CMMD is of {min(row['n'])} pictures; it grows as sets shrink, so compare it only with CMMDs of as many, "
            f"or use {FEW_FOR_CMMD} in each folder."
        )
    for name, row in facts["distances"].items():
        if row["value"] <= row["chance"]:
            said.append(f"{TITLES[name]} is no larger than chance gives: it shows no difference between the folders.")
    return said


TITLES = {"cmmd": "CMMD", "frechet": "The Fréchet distance", "judge": "The judge's Fréchet distance"}
