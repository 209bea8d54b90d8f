"""The seal of a model folder: size, sample and hash of each file that a conversion wrote. Sizes and samples are
compared whenever the folder is opened, and all bytes by `mlxdiff cache --verify`."""

import hashlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from .errors import Error
from .foreign import check_regular

_BLOCKS, _BLOCK = 16, 2**12  # of a sample: how many, and bytes of each
_READ = 2**22  # bytes that are hashed at a time
_MOST_FILES = 1000  # in a seal; a conversion writes fewer than thirty
_OTHERS = ("model.json", "source.json")  # the first holds the seal, the second is written after it


class Mark(NamedTuple):
    """What is known of one file."""

    size: int
    sample: str
    hash: str


Seal = dict[str, Mark]  # path in the folder -> its mark


def sample(file: Path, size: int) -> str:
    """A fingerprint of blocks of a file: all of a small one, and of a large one sixteen, spread evenly."""
    seen = hashlib.sha256()
    with open(file, "rb") as f:
        for i in range(_BLOCKS):
            f.seek(max(0, size - _BLOCK) * i // (_BLOCKS - 1))
            seen.update(f.read(_BLOCK))
    return seen.hexdigest()[:16]


def of(folder: Path, progress: Callable[[int, int], None]) -> Seal:
    """The seal of all files of a folder. progress: called with bytes done and bytes in all."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name not in _OTHERS)
    sizes = {f: f.stat().st_size for f in files}
    done, seal = 0, {}
    for file, size in sizes.items():
        whole = _hash(file, lambda n, before=done: progress(before + n, sum(sizes.values())))
        seal[file.relative_to(folder).as_posix()] = Mark(size, sample(file, size), whole)
        done += size
    return seal


def is_sound(seal) -> bool:
    """Whether a conversion could have written this."""
    return (isinstance(seal, dict) and len(seal) <= _MOST_FILES) and all(
        PurePosixPath(name).as_posix() == name
        and not PurePosixPath(name).is_absolute()
        and ".." not in PurePosixPath(name).parts
        and isinstance(mark, list)
        and [*map(type, mark)] == [int, str, str]
        for name, mark in seal.items()
    )


def check(folder: Path, seal: Seal) -> None:
    """Raise if a file is missing, or has another size or sample."""
    for name, mark in seal.items():
        file = folder / name
        try:
            check_regular(file)
            same = file.stat().st_size == mark.size and sample(file, mark.size) == mark.sample
        except FileNotFoundError:
            raise Error(f"{file} is missing.", "Convert the checkpoint again.") from None
        except (OSError, ValueError) as e:  # a name that no file can have is a ValueError
            raise Error(
                f"{file} cannot be read: {e}.", "Check its permissions, or convert the checkpoint again."
            ) from None
        if not same:
            raise Error(f"{file} is not as the conversion wrote it.", "Convert the checkpoint again.")


def broken(folder: Path, seal: Seal, progress: Callable[[int, int], None]) -> list[str]:
    """The files that are missing or differ in any byte."""
    found, done, total = [], 0, sum(mark.size for mark in seal.values())
    for name, mark in seal.items():
        try:
            check(folder, {name: mark})
            same = _hash(folder / name, lambda n, before=done: progress(before + n, total)) == mark.hash
        except (Error, OSError):
            same = False
        found += [] if same else [name]
        done += mark.size
    return found


def _hash(file: Path, progress: Callable[[int], None]) -> str:
    seen, done = hashlib.sha256(), 0
    with open(file, "rb") as f:
        while block := f.read(_READ):
            seen.update(block)
            done += len(block)
            progress(done)
    return seen.hexdigest()
