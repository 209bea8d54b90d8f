"""A folder of training pictures: each with a caption from a .txt file beside it, or all with one prompt. Their sizes
come from a few buckets, so that pictures of several shapes can be trained on without distortion."""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .. import foreign, images
from ..errors import Error

_LONGEST = 20_000  # characters of a caption; encoders read a few hundred
_BUCKETS = 16  # a bucket's edges are multiples of this fraction of the size, or of what the model needs


@dataclass(frozen=True)
class Picture:
    path: Path
    caption: str
    width: int  # to which it is scaled and cropped
    height: int
    fingerprint: str  # of its pixels


def read(
    folder: Path, prompt: str | None, size: int, multiple: int, crop: bool, setting: str = "prompt"
) -> list[Picture]:
    """The pictures of a folder, checked before the work. prompt: for those without a .txt file. size: edge of a square
    of the area that each takes. multiple: of all edges. crop: all are cropped to the square. setting: the name of the
    prompt's, for messages."""
    try:
        files = sorted(f for f in folder.iterdir() if not f.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        raise Error(f"There is no folder {folder}.", "Give a folder of pictures.") from None
    except (OSError, ValueError) as e:
        why = getattr(e, "strerror", None) or e
        raise Error(f"{folder} cannot be read: {why}.", "Give a folder of pictures.") from None
    pictures = [f for f in files if f.suffix.lower() in images.READ]
    if not pictures:
        raise Error(f"{folder} holds no pictures.", f"Put some there, as {', '.join(images.READ)}.")
    known = {f.with_suffix(".txt") for f in pictures}
    stray = next((f for f in files if f.suffix == ".txt" and f not in known), None)
    if stray is not None:
        raise Error(f"{stray} is a caption without a picture.", "Give it the name of its picture, or remove it.")
    return [_read(f, prompt, size, multiple, crop, setting) for f in pictures]


def _read(file: Path, prompt: str | None, size: int, multiple: int, crop: bool, setting: str) -> Picture:
    image, text = images.read(file), file.with_suffix(".txt")
    caption = prompt
    if text.exists():
        caption = " ".join(foreign.read_text(text, "Write the caption as UTF-8 text.").split())
    if not caption:
        what = f"{text} is empty" if text.exists() else f"{file} has no caption"
        raise Error(f"{what}.", f"Write one to {text.name} beside the picture, or give all one: `{setting}=TEXT`.")
    if len(caption) > _LONGEST:
        raise Error(f"The caption of {file} has {len(caption):,} characters.", f"Use at most {_LONGEST:,}.")
    width, height = (size, size) if crop else bucket(image.size, size, multiple)
    return Picture(file, caption, width, height, images.fingerprint(image))


def bucket(shape: tuple[int, int], size: int, multiple: int) -> tuple[int, int]:
    """The width and height with about size * size pixels whose shape is closest to the picture's."""
    step = multiple * max(1, size // (_BUCKETS * multiple))
    wide = math.log(min(max(shape[0] / shape[1], 1 / 4), 4))
    choices = []
    for width in range(step, 4 * size + 1, step):
        height = max(step, size * size // width // step * step)  # never more pixels than the square
        choices.append((abs(math.log(width / height) - wide), -width * height, width, height))
    return min(choices)[2:]


def fingerprint(pictures: Iterable[Picture]) -> str:
    """Of pictures and captions: a resumed run must have the same."""
    seen = hashlib.sha256()
    for picture in pictures:
        seen.update(repr((picture.fingerprint, picture.caption, picture.width, picture.height)).encode())
    return seen.hexdigest()[:16]
