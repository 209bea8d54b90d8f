"""CLIP's embeddings of pictures and of prompts, computed in batches."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import Error
from ..models import vision
from ..store import clip as store
from ..tokenizers import parse_weights

BATCH = 16
_LONGEST = 5000  # characters of a prompt that are looked at: CLIP reads 75 tokens


def embed(encoder: vision.Vision, batch: Sequence[mx.array]) -> np.ndarray:
    """(B, projection) of as many pictures as fit into memory together, each as `references.pixels` gives it."""
    return _checked(encoder(mx.concatenate(batch)).pooled)


def embed_all(encoder: vision.Vision, seen: Sequence[np.ndarray]) -> np.ndarray:
    """(n, projection), batch by batch."""
    batches = (seen[i : i + BATCH] for i in range(0, len(seen), BATCH))
    return np.concatenate([embed(encoder, [mx.array(x) for x in batch]) for batch in batches])


def embed_texts(folder: Path, prompts: Sequence[str]) -> tuple[np.ndarray, int]:
    """(B, projection), and how many of the prompts are longer than CLIP reads. Their ends are cut off, and marks of
    weights are left out, so that a score is what it is elsewhere."""
    (network, tokenizer), rows, cut = store.read_text(folder), {}, 0
    times, chunks = Counter(prompts), []
    known = [*times]
    for prompt in known:
        pieces = tokenizer.encode(_plain(prompt), weighted=False)
        cut += (len(pieces) > 1 or len(prompt) > _LONGEST) * times[prompt]
        chunks.append(pieces[0].ids)
    for i in range(0, len(known), BATCH):
        found = _checked(network(mx.array(chunks[i : i + BATCH])).pooled)
        rows |= dict(zip(known[i : i + BATCH], found, strict=True))
    return np.stack([rows[prompt] for prompt in prompts]), cut


def _plain(prompt: str) -> str:
    valid = prompt[:_LONGEST].encode("utf-8", "replace").decode("utf-8")
    return "".join(" " if weight is None else text for text, weight in parse_weights(valid))


def _checked(found: mx.array) -> np.ndarray:
    mx.eval(found)
    values = np.array(found.astype(mx.float32), np.float64)
    if not np.isfinite(values).all():
        raise Error("CLIP gave values that are not finite.", "Its weights are damaged: fetch them again.")
    return values
