"""Finds a tokenizer for checkpoints without one, such as single files: on this machine, else on the hub."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Error
from ..families import FAMILIES, MODELS
from . import cache

if TYPE_CHECKING:
    from ..convert import Checkpoint
    from .hub import Progress

CLIP_WORDS = 49408  # all published CLIP text encoders of these families share one vocabulary
T5_WORDS = 32128  # and so do all T5


def tokenizer_for(checkpoint: "Checkpoint", offline: bool, progress: "Progress") -> Path | None:
    """The folder of a suitable tokenizer. None if the checkpoint has one, or cannot be converted anyway."""
    from . import hub

    wrong = checkpoint.lacking or checkpoint.missing or checkpoint.unmapped
    if checkpoint.tokenizers or wrong or checkpoint.family not in FAMILIES:
        return None
    name, t5 = checkpoint.path.name, False
    for encoder, component in checkpoint.components.items():
        words = getattr(component.config, "vocab", CLIP_WORDS)
        if words == T5_WORDS:
            t5 = True
        elif words != CLIP_WORDS:
            raise Error(
                f"{name} has no tokenizer, and its {encoder} knows {words} words where CLIP has {CLIP_WORDS}.",
                "Give the tokenizer folder it was trained with: `tokenizer=DIR`.",
            )
    # With T5, use the folder of a whole model, which holds both kinds of tokenizers; without it, any CLIP tokenizer.
    held = [*hub.snapshots("merges.txt"), *hub.snapshots("*/merges.txt"), *cache.root().glob("models/*/*/merges.txt")]
    for merges in held:
        if _is_clip(merges.parent):
            if not t5:
                return merges.parent
            if any((merges.parents[1] / w / "spiece.model").is_file() for w in ("tokenizer_2", "tokenizer_3")):
                return merges.parents[1]
    repo = next(row.repo for row in MODELS.values() if row.family.name == checkpoint.family and row.repo is not None)
    if offline or hub.offline():
        raise Error(
            f"{name} has no tokenizer, none is on this machine, and the network may not be used.",
            f"Fetch the tokenizer folder of {repo} and give it as `tokenizer=DIR`, or run once without `offline`.",
        )
    commit, files = hub.listing(repo, "main")
    folder = min(n.partition("/")[0] for n in files if n.endswith("/merges.txt"))
    wanted = "tokenizer" if t5 else f"{folder}/"
    files = {n: size for n, size in files.items() if n.startswith(wanted)}
    place = hub.download(repo, "main", commit, files, progress)
    return place if t5 else place / folder


def _is_clip(folder: Path) -> bool:
    """Whether this is CLIP's one published vocabulary, judged by its size and its last two words."""
    words = cache.read_note(folder / "vocab.json")
    return len(words) == CLIP_WORDS and words.get("<|startoftext|>") == 49406 and words.get("<|endoftext|>") == 49407
