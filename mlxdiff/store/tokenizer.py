"""Finds a tokenizer for checkpoints without one, such as single files: on this machine, else on the hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Error
from ..families import FAMILIES, MODELS
from ..tokenizers import load_qwen
from . import cache

if TYPE_CHECKING:
    from ..convert import Checkpoint
    from .hub import Progress

# text encoder's network -> its title, and the vocabulary that all published ones of these families share
WORDS = {"clip": ("CLIP", 49408), "t5": ("T5", 32128), "qwen3": ("Qwen3", 151936)}
QWEN_END = 151643  # the id of <|endoftext|>, the first beyond the vocabulary that Qwen2 and Qwen3 share


def tokenizer_for(checkpoint: "Checkpoint", offline: bool, progress: "Progress") -> Path | None:
    """The folder of a suitable tokenizer. None if the checkpoint has one, or cannot be converted anyway."""
    from . import hub

    wrong = checkpoint.lacking or checkpoint.missing or checkpoint.unmapped
    if checkpoint.tokenizers or wrong or checkpoint.family not in FAMILIES:
        return None
    name, kinds = checkpoint.path.name, set()
    for encoder, kind in FAMILIES[checkpoint.family].text.encoders.items():
        if encoder in checkpoint.components or kind != "t5":  # T5 may be left out
            kinds.add(kind)
        title, words = WORDS[kind]
        found = checkpoint.components[encoder].config.vocab if encoder in checkpoint.components else words
        if found != words:
            raise Error(
                f"{name} has no tokenizer, and its {encoder} knows {found} words where {title} has {words}.",
                "Give the tokenizer folder it was trained with: `tokenizer=DIR`.",
            )
    # With T5, use the folder of a whole model, which holds both kinds of tokenizers; without it, any of this kind.
    t5, suits = "t5" in kinds, _is_qwen if "qwen3" in kinds else _is_clip
    for folder in _held():
        if suits(folder):
            if not t5:
                return folder
            if any((folder.parent / w / "spiece.model").is_file() for w in ("tokenizer_2", "tokenizer_3")):
                return folder.parent
    repo = next(row.repo for row in MODELS.values() if row.family.name == checkpoint.family and row.repo is not None)
    if offline or hub.offline():
        raise Error(
            f"{name} has no tokenizer, none is on this machine, and the network may not be used.",
            f"Fetch the tokenizer folder of {repo} and give it as `tokenizer=DIR`, or run once without `offline`.",
        )
    commit, files = hub.listing(repo, "main")
    folder = min(n.partition("/")[0] for n in files if n.endswith(("/merges.txt", "/tokenizer.json")))
    wanted = "tokenizer" if t5 else f"{folder}/"
    files = {n: size for n, size in files.items() if n.startswith(wanted)}
    place = hub.download(repo, "main", commit, files, progress)
    return place if t5 else place / folder


def _held() -> Iterator[Path]:
    """The folders of byte-level BPEs on this machine: in the hub's cache, then in converted models."""
    from . import hub

    for file in ("merges.txt", "tokenizer.json"):  # newer folders hold only the second
        places = [*hub.snapshots(file), *hub.snapshots(f"*/{file}"), *cache.root().glob(f"models/*/*/{file}")]
        yield from (place.parent for place in places)


def _is_clip(folder: Path) -> bool:
    """Whether this is CLIP's one published vocabulary, judged by its size and its last two words."""
    words = cache.read_note(folder / "vocab.json")
    last = words.get("<|startoftext|>"), words.get("<|endoftext|>")
    return len(words) == WORDS["clip"][1] and last == (49406, 49407)


def _is_qwen(folder: Path) -> bool:
    """Whether this is Qwen3's published tokenizer, judged by its size and its special tokens."""
    try:
        return load_qwen(folder).pad == QWEN_END
    except Error:
        return False
