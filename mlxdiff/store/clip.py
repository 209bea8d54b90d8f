"""A whole CLIP, its two encoders and its tokenizer, in a folder in transformers' layout: found, fetched once, and read
where it is. Pictures are judged with it."""

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from .. import tokenizers
from ..errors import Error, did_you_mean
from ..models import clip, vision
from ..tokenizers import ClipTokenizer
from . import Progress, local, silent


@dataclass(frozen=True)
class Named:
    """A published CLIP that has a name here."""

    repo: str
    title: str
    download: float  # GB


NAMES = {"vit-l": Named("openai/clip-vit-large-patch14", "OpenAI's CLIP ViT-L/14, which most CLIP scores use", 1.71)}
DEFAULT = "vit-l"
_WORDS = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def here(name: str | Path) -> Path | None:
    """The folder of a CLIP, if it is on this machine. Raises if the name can mean none."""
    path = local(name)
    if path is not None:
        return path
    from . import hub

    held = hub.snapshots("config.json", _repo(name))  # it is fetched last
    return next((config.parent for config in reversed(held) if any(config.parent.glob("*.safetensors"))), None)


def find(name: str | Path, *, offline: bool, progress: Progress | None = None) -> Path:
    """The folder of a CLIP: of a name, a folder, or a hub repository, from which it is fetched once."""
    path = here(name)
    if path is not None:
        return path
    from . import hub

    repo = _repo(name)
    if offline or hub.offline():
        raise lacking(name)
    commit, names = hub.listing(repo, "main")
    words = [n for n in _WORDS if n in names]
    files = {n: names[n] for n in [*words, *hub.select_network(repo, names, half=False)]}
    return hub.download(repo, "main", commit, files, silent if progress is None else progress)


def lacking(name: str | Path) -> Error:
    """The error about a CLIP that is not here."""
    repo = _repo(name)
    size = next((f" ({row.download:.1f} GB)" for row in NAMES.values() if row.repo == repo), "")
    files = "config.json, model.safetensors, vocab.json and merges.txt"
    return Error(
        f"{repo}{size} is not on this machine, and the network may not be used.",
        f"Run once without `offline`, or give a folder with its {files}: `clip=DIR`.",
    )


def check(folder: Path) -> vision.Config:
    """The Config of its encoder of pictures. Raises unless both encoders, their projections and the tokenizer are
    there. This reads headers only."""
    sees, reads = _config(folder, "vision"), _config(folder, "clip")
    if not sees.class_token or None in (sees.projection, reads.projection) or sees.projection != reads.projection:
        raise _no_clip(folder)
    from ..convert import tokenizer

    try:
        tokenizer.check(folder, reads)
    except Error as e:
        raise Error(e.problem, "Put the vocab.json and the merges.txt of this CLIP into its folder.") from None
    return sees


def _config(folder: Path, layout: str) -> vision.Config | clip.Config:
    from .. import convert

    if not folder.is_dir():
        raise Error(f"{folder} is not a folder.", "Give the folder of a whole CLIP in transformers' layout.")
    try:
        checkpoint = convert.open(folder, layout=layout)
        convert.check(checkpoint)
    except Error as e:  # convert would name checkpoints of models
        raise _no_clip(folder, e.problem) from None
    (component,) = checkpoint.components.values()
    return component.config


def read_vision(folder: Path) -> vision.Vision:
    """Its encoder of pictures, in float32: it is no part of a drawing, and its numbers are compared with others'."""
    return _read(folder, "vision")


def read_text(folder: Path) -> tuple[clip.CLIPText, ClipTokenizer]:
    """Its encoder of texts, and the tokenizer that lies beside it."""
    return _read(folder, "clip"), tokenizers.load(folder)


def _read(folder: Path, layout: str) -> vision.Vision | clip.CLIPText:
    from .. import convert

    (network,) = convert.read(folder, mx.float32, layout).values()
    return network.eval()


def _no_clip(folder: Path, why: str = "Both encoders must be there, with their projections.") -> Error:
    return Error(
        f"{folder} holds no whole CLIP: {why}", f"Give such a folder, or one of {', '.join(NAMES)}: `clip=NAME`."
    )


def _repo(name: str | Path) -> str:
    from . import HUB_ID

    if str(name) in NAMES:
        return NAMES[str(name)].repo
    match = HUB_ID.fullmatch(str(name))
    if match is None or match[2] is not None:
        fix = f"{did_you_mean(str(name), NAMES)}Use one of {', '.join(NAMES)}, a folder, or a hub id (org/repo)."
        raise Error(f"There is no CLIP or folder {str(name)!r:.200}.", fix)
    return match[1]
