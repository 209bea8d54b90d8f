"""What comes from elsewhere, taken with care: paths, small files and JSON values as they are read, and text before a
terminal shows it."""

import json
import os
import stat
import sys
from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin

from .errors import Error

MOST = 2**25  # bytes of a small file: the largest tokenizers have half of that, and settings a few thousand
MOST_SHOWN = 2000  # characters of foreign text that are printed together


def path(text: str | Path) -> Path:
    """A path with its ~ replaced by the home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise Error(f"{text} names a home folder that does not exist.", "Give the whole path.") from None


def stamp(file: Path) -> tuple[int, ...]:
    """What differs once a file has changed, even if its size and time were put back; () if it cannot be looked at,
    which reading it reports."""
    try:
        seen = file.stat()
    except (OSError, ValueError):
        return ()
    return seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino


def check_regular(file: str | Path) -> None:
    """Raise OSError unless this is a regular file: reading a pipe or a device may never end."""
    mode = os.stat(file).st_mode
    if not stat.S_ISREG(mode):
        raise OSError(0, "it is a folder" if stat.S_ISDIR(mode) else "it is not a regular file")


def read(file: Path, fix: str) -> bytes:
    """The bytes of a small regular file. fix: what to do if it cannot be read."""
    try:
        check_regular(file)
        with open(file, "rb") as f:
            data = f.read(MOST + 1)
    except (OSError, ValueError) as e:  # a NUL in the name is a ValueError
        raise Error(f"{file} cannot be read: {getattr(e, 'strerror', None) or e}.", fix) from None
    if len(data) > MOST:
        raise Error(f"{file} cannot be read: it has more than {MOST:,} bytes.", fix)
    return data


def read_text(file: Path, fix: str) -> str:
    try:
        return read(file, fix).decode("utf-8")
    except UnicodeDecodeError as e:
        raise Error(f"{file} cannot be read: {e}.", fix) from None


def read_json(file: Path, fix: str) -> dict:
    """The JSON object in a small file."""
    try:
        value = json.loads(read(file, fix))
    except (ValueError, RecursionError) as e:  # deep nesting
        raise Error(f"{file} is not valid JSON: {e}.", fix) from None
    if not isinstance(value, dict):
        raise Error(f"{file} holds {type(value).__name__}, not a JSON object.", fix)
    return value


def fits(value, kind) -> bool:
    """Whether a value from JSON fits a type annotation. JSON has lists where the type has tuples, and objects where it
    has dataclasses."""
    if isinstance(kind, UnionType):
        return any(fits(value, k) for k in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(fits(v, get_args(kind)[0]) for v in value)
    if is_dataclass(kind):
        types = {f.name: f.type for f in fields(kind)}
        needed = {f.name for f in fields(kind) if f.default is MISSING}
        known = isinstance(value, dict) and needed <= value.keys() <= types.keys()
        return known and all(fits(v, types[name]) for name, v in value.items())
    if kind is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max  # also of a whole number beyond it
    return type(value) is kind or (kind is type(None) and value is None)


def lines(texts: Iterable[str]) -> str:
    """Lines for a terminal, each of which may hold foreign text: a line end in one of them would forge another."""
    return "\n".join(" ".join(text.split("\n")).rstrip() for text in texts)


def shown(text: str, most: int = MOST_SHOWN) -> str:
    """Foreign text for a terminal: characters that are not printable are escaped, and a long text loses its middle.
    Line ends stay."""
    if len(text) > most:
        text = f"{text[: most * 2 // 3]} ... {text[len(text) - most // 3 :]}"
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
