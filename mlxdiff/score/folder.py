"""A folder of pictures: which files are read, and with which prompts. A file that is no picture, or one that cannot be
read, is counted and left out: in a folder of thousands, one bad file should not stop the rest."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from .. import builtin, foreign, images
from ..errors import Error

MOST = 100_000  # files of a folder
MOST_PIXELS = 2**26  # of a picture, 200 MB in memory; the largest cameras have fewer


class Picture(NamedTuple):
    name: str
    image: Image.Image
    prompt: str | None


@dataclass
class Skipped:
    """Files that were not read: why -> how many, and about one of them."""

    counts: dict[str, int] = field(default_factory=dict)
    example: dict[str, str] = field(default_factory=dict)

    def add(self, why: str, example: str) -> None:
        self.counts[why] = self.counts.get(why, 0) + 1
        self.example.setdefault(why, example)


OTHER, BROKEN, LARGE = "other files", "unreadable pictures", f"pictures of more than {MOST_PIXELS // 10**6} megapixels"


def files(folder: Path, skipped: Skipped) -> list[Path]:
    """The files of a folder that are pictures by their names, in the order of the names."""
    found = []
    try:
        with os.scandir(folder) as entries:
            for i, entry in enumerate(entries):
                if i >= MOST:
                    raise Error(f"{folder} holds more than {MOST:,} files.", "Score a smaller folder.")
                if entry.name.startswith("."):  # also what a Mac puts beside each picture on other disks
                    continue
                path = Path(folder, entry.name)
                if path.suffix.lower() in images.READ:
                    found.append(path)
                else:
                    skipped.add(OTHER, entry.name)
    except (FileNotFoundError, NotADirectoryError):
        raise Error(f"There is no folder {folder}.", "Give a folder of pictures.") from None
    except (OSError, ValueError) as e:  # a NUL in the name is a ValueError
        why = getattr(e, "strerror", None) or e
        raise Error(f"{folder} cannot be read: {why}.", "Give a folder of pictures.") from None
    if not found:
        raise Error(f"{folder} holds no pictures.", f"Give a folder of pictures: {', '.join(images.READ)}.")
    return sorted(found, key=lambda path: path.name)


def read(paths: list[Path], prompts: dict[str, str] | None, skipped: Skipped) -> Iterator[Picture | None]:
    """Each picture, one at a time; None for one that is left out. prompts: by the names of files, instead of those that
    the pictures carry."""
    for path in paths:
        try:
            width, height = images.size(path)
            if width * height > MOST_PIXELS:
                skipped.add(LARGE, f"{path.name} has {width} x {height} pixels")
                yield None
                continue
            image = images.read(path)
            image.load()  # of some kinds it is read only now
        except (Error, MemoryError) as e:
            skipped.add(BROKEN, e.problem.removesuffix(".") if isinstance(e, Error) else path.name)
            yield None
            continue
        yield Picture(path.name, image, _settings(path)[0] if prompts is None else prompts.get(path.name))


def by_builtin(paths: list[Path]) -> bool:
    """Whether all pictures say that a built-in model drew them."""
    return all(_settings(path)[1] in builtin.NAMES for path in paths)


def _settings(path: Path) -> tuple[str | None, str | None]:
    """The prompt and the model that a picture carries."""
    try:
        request, model = images.read_settings(path)
    except Error:
        return None, None
    return request.prompt or None, model


def prompts_of(file: Path, names: list[str]) -> dict[str, str]:
    """Prompts for the pictures of these names: a JSON object {name: prompt}, or one line for each picture, in the order
    of the names."""
    fix = "Give a JSON object {file name: prompt}, or a text file with one prompt a line."
    text = foreign.read_text(file, fix)
    if file.suffix.lower() != ".json":
        lines = text.removesuffix("\n").split("\n")
        if len(lines) != len(names):
            order = "There must be one line for each picture, in the order of the files' names."
            raise Error(f"{file} has {len(lines):,} lines, and there are {len(names):,} pictures.", order)
        return {name: line.strip() for name, line in zip(names, lines, strict=True) if line.strip()}
    try:
        held = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise Error(f"{file} is not valid JSON: {e}.", fix) from None
    if not isinstance(held, dict) or not all(isinstance(value, str) for value in held.values()):
        raise Error(f"{file} does not hold a name and a prompt for each picture.", fix)
    absent = sorted(held.keys() - set(names))
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise Error(f"{file} names {absent[0]!r:.200}{more}, and there is no such picture.", "Correct the names.")
    return {name: prompt for name, prompt in held.items() if prompt.strip()}
