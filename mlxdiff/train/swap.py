"""Makes a LoRA without training: the cross-attention of a U-Net comes to read one word as another. It is a
least-squares problem with a closed form (Orgad et al. 2023; Gandikota et al. 2024)."""

from pathlib import Path

import mlx.core as mx
import numpy as np

from .. import surgery
from ..pipeline import Pipeline
from .fit import write_arrays

RANK = 8
KEEP = 1.0  # the weight of the words that should stay as they are


def contexts(pipe: Pipeline, prompts: list[str]) -> np.ndarray:
    """(prompts, N, d): what the text encoder says of each token."""
    texts = pipe.read(prompts, pipe.resolve(""), t5=False)
    return np.concatenate([np.array(text.context.astype(mx.float32), np.float64) for text in texts])


def mapping(
    source: np.ndarray, target: np.ndarray, stay: np.ndarray, rank: int = RANK
) -> tuple[np.ndarray, np.ndarray]:
    """M of this rank, as (d, rank) and (rank, d), for which c + M c is the target's token for each of the source's, and
    c for those that stay, as nearly as possible. All are (n, d)."""
    moved = (target - source).T @ source  # (d, d)
    held = source.T @ source + KEEP * len(source) / max(1, len(stay)) * stay.T @ stay
    held += 1e-3 * np.trace(held) / len(held) * np.eye(len(held))
    left, sizes, right = np.linalg.svd(np.linalg.solve(held, moved.T).T)
    return left[:, :rank] * sizes[:rank], right[:rank]


def tensors(pipe: Pipeline, source: list[str], target: list[str], stay: list[str]) -> dict[str, mx.array]:
    """A LoRA's tensors, by which prompts of the source are read as those of the target, one by one, and others stay."""
    a, b, c = (contexts(pipe, prompts) for prompts in (source, target, stay))
    up, down = mapping(*(each.reshape(-1, each.shape[-1]) for each in (a, b, c)))
    made = {}
    for name, layer in surgery.unet(pipe).named_modules():
        if name.endswith(".attn2"):
            for part in ("to_k", "to_v"):
                weight = np.array(layer[part].weight.astype(mx.float32), np.float64)  # (out, d)
                made[f"unet.{name}.{part}.lora_A.weight"] = mx.array(down.astype(np.float32))
                made[f"unet.{name}.{part}.lora_B.weight"] = mx.array((weight @ up).astype(np.float32))
    return made


def write(file: Path, pipe: Pipeline, source: list[str], target: list[str], stay: list[str]) -> None:
    write_arrays(file, tensors(pipe, source, target, stay), {"format": "pt"})
