"""Where the pictures of a command go: the names of files or standard output, the format, and the signature. What cannot
work is refused before the work."""

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image

from . import images, metadata, signing
from .errors import Error
from .request import Request
from .values import whole

STDOUT = Path("-")


def add_arguments(g: argparse._ArgumentGroup) -> None:
    where = "file or folder (default: this folder, where files get the prompt and the seed as their name); never"
    where += " overwrites; each of several pictures adds its seed to FILE; - is standard output"
    g.add_argument("-o", "--output", type=Path, metavar="FILE", help=where)
    g.add_argument("--format", choices=images.ENDINGS, help="of pictures that FILE does not name (png)")
    what = f"of a JPEG or WebP, 1 to {metadata.LOSSLESS} ({metadata.QUALITY}); a WebP of {metadata.LOSSLESS} loses"
    g.add_argument("--quality", type=int, metavar="N", help=f"{what} nothing")
    what = "add Content Credentials (C2PA), by a key of yours or one that mlxdiff makes; needs the extra `sign`"
    g.add_argument("--sign", action="store_true", help=what)
    g.add_argument("--sign-key", type=Path, metavar="PEM", help=f"your key to sign with (${signing.KEY})")
    g.add_argument("--sign-cert", type=Path, metavar="PEM", help=f"its certificates (${signing.CERTIFICATE})")


@dataclass(frozen=True)
class Output:
    path: Path | None  # a file, a folder, STDOUT, or None: the current folder
    ending: str  # of the names that a folder's files get
    quality: int | None
    signer: signing.Signer | None

    @classmethod
    def of(cls, args: argparse.Namespace, requests: list[Request]) -> "Output":
        """What `add_arguments` says, checked for these requests."""
        path, ending = args.output, "png" if args.format is None else args.format
        if path == STDOUT:
            _one_to_stdout(requests, args.json)
        elif path is not None and not images.is_folder(path):
            images.check_name(path)
            if args.format is not None and images.kind_of(path) != images.ENDINGS[ending]:
                raise Error(f"--format is {ending}, and {path} is another format.", "Leave one of them out.")
        made = cls(path, ending, args.quality, None)
        if path != STDOUT:
            check_writable(made.folder, "-o")
        if args.quality is not None:
            whole("--quality", args.quality, 1, metadata.LOSSLESS)
            if made.kind == "PNG":
                raise Error("--quality is of a JPEG or WebP; a PNG loses nothing.", "Add --format jpg or webp.")
        return cls(path, ending, args.quality, _signer(args))

    @property
    def is_file(self) -> bool:
        return self.path is not None and self.path != STDOUT and not images.is_folder(self.path)

    @property
    def folder(self) -> Path:
        return Path() if self.path is None else self.path.parent if self.is_file else self.path

    @property
    def kind(self) -> str:
        """The format of the pictures."""
        return images.kind_of(self.path) if self.is_file else images.ENDINGS[self.ending]

    def name(self, requests: list[Request], single: Request) -> Path:
        """The path of one picture of a run. In a folder it is named after its prompt and seed. If the output is
        house.png, a single picture gets that name, several get their seed (house-7.png), and several prompts also get
        their first words (house-a-red-fox-7.png)."""
        if not self.is_file:
            return self.folder / images.file_name(single, self.ending)
        if sum(r.count for r in requests) == 1:
            return self.path
        one_prompt = all(r.prompt == single.prompt for r in requests)
        return images.numbered(self.path, single.seed if one_prompt else images.stem(single))

    def write(self, image: Image, requests: list[Request], single: Request, model: str, recipe: str) -> Path | str:
        """Write a picture of a run. Returns where."""
        how = (single, model, recipe)
        if self.path == STDOUT:
            _write_stdout(images.encoded(image, *how, self.kind, self.quality, self.signer))
            return "standard output"
        return images.save(image, self.name(requests, single), *how, self.quality, self.signer)


def _signer(args: argparse.Namespace) -> signing.Signer | None:
    """Who signs the pictures."""
    if not args.sign and (args.sign_key is not None or args.sign_cert is not None):
        raise Error("There is a key to sign with, but nothing is to be signed.", "Add --sign.")
    if not args.sign:
        return None
    return signing.announced(args.sign_key, args.sign_cert)


def _one_to_stdout(requests: list[Request], as_json: bool) -> None:
    """Fail before the work, not after it."""
    if as_json:
        raise Error("--json and -o - both write to standard output.", "Use one of them.")
    if len(requests) > 1 or requests[0].count != 1:
        raise Error("Standard output takes one picture, but several were requested.", "Give a folder: -o DIR/.")
    if sys.stdout.name == os.devnull:  # by `console.open_streams`
        raise Error("Standard output is closed.", "Choose a file with -o.")
    if sys.stdout.isatty():
        raise Error("Standard output is a terminal, which cannot show a picture.", "Redirect it: -o - > house.png.")


def _write_stdout(data: bytes) -> None:
    """Write without Python's buffer: after a failure, Python would try to write the buffer again at exit."""
    rest = memoryview(data)
    try:
        with open(sys.stdout.fileno(), "wb", buffering=0, closefd=False) as out:
            while rest:
                rest = rest[out.write(rest) :]
    except BrokenPipeError:  # the reader has closed the pipe
        raise
    except OSError as e:
        raise Error(f"Standard output cannot be written: {e.strerror or e}.", "Choose a file with -o.") from None


def check_writable(place: Path, flag: str) -> None:
    """Fail before the work, not after it."""
    try:
        there = next(p for p in (place, *place.absolute().parents) if p.exists())  # missing folders are made later
        tempfile.TemporaryFile(dir=there).close()
    except OSError as e:
        raise Error(f"{place} cannot be written to: {e.strerror}.", f"Choose another place with {flag}.") from None
