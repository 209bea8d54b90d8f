"""`mlxdiff detect PICTURE KIND`: makes a control picture from a photograph."""

import argparse
import sys
import time
from pathlib import Path

from .. import images, metadata
from ..bar import Bar
from ..console import Parser, run, say
from ..errors import Error
from ..foreign import lines
from ..foreign import path as expanded
from ..output import check_writable
from . import DEPTH, KINDS, check
from . import run as detect


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="mlxdiff detect", epilog="example:\n  mlxdiff detect photo.png canny -o edges.png")
    p.description = "Make a control picture from a photograph, of the same size."
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("picture", metavar="PICTURE", help="PNG, JPEG, WebP, TIFF, BMP or GIF")
    what = f"{', '.join(KINDS)}: canny makes white edges on black, depth makes white what is near"
    p.add_argument("kind", metavar="KIND", help=what)
    where = "file or folder; never overwrites (default: photo-canny.png beside photo.jpg)"
    p.add_argument("-o", "--output", type=Path, metavar="FILE", help=where)
    name = DEPTH.rpartition("/")[0]
    p.add_argument("-m", "--model", help=f"for depth: a folder or file of Depth Anything ({name}, 99 MB)")
    p.add_argument("--offline", action="store_true", help="never use the network")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run("mlxdiff detect", lambda: make(args))


def make(args: argparse.Namespace) -> int:
    if args.picture in KINDS and args.kind not in KINDS:
        raise Error(f"{args.picture} is a kind, which comes after the picture.", "Write mlxdiff detect PICTURE KIND.")
    check(args.kind, args.model)
    picture, target, begin = expanded(args.picture), args.output, time.perf_counter()
    images.size(picture)
    if target is None or images.is_folder(target):
        name = images.numbered(picture.with_suffix(".png"), args.kind).name
        target = (picture.parent if target is None else target) / name
    images.check_name(target)
    check_writable(target.parent, "-o")
    with Bar(False, sys.stdout) as bar:
        made = detect(args.kind, picture, model=args.model, offline=args.offline, progress=bar.progress)
    path = images.write(made, target, metadata.DRAWN if args.kind == "depth" else metadata.ENHANCED)
    say(lines([f"{path}  {made.width} x {made.height}, {time.perf_counter() - begin:.1f} s"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
