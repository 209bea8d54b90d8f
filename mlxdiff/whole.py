"""Files that appear whole or not at all, over an older one if there is one: neither a full disk nor a kill costs what
was there."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PART = ".part"  # in the names of unfinished files


@contextmanager
def appearing(file: Path) -> Iterator[Path]:
    """A hidden file beside `file`, of the same suffix, to be written. It takes the name at the end; after an error or
    an interrupt nothing of it stays."""
    part = file.with_name(f".{secrets.token_hex(8)}{PART}{file.suffix}")  # of this call alone: others may write too
    try:
        yield part
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def write(file: Path, data: bytes) -> None:
    with appearing(file) as part:
        part.write_bytes(data)
