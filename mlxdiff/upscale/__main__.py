"""`mlxdiff upscale PICTURE`: enlarges pictures, which keep the settings that they carry."""

import argparse
import json
import sys
import time
from pathlib import Path

from .. import images, metadata
from ..bar import Bar
from ..console import Parser, run, say, say_json
from ..errors import Error
from ..foreign import lines
from ..foreign import path as expanded
from ..output import check_writable
from ..recipe import DTYPES
from ..result import Event
from . import DEFAULT, NAMES, Upscaler


def parser() -> argparse.ArgumentParser:
    lines = [f"  {name:24} {n.title}; {n.licence}, {n.download * 1000:.0f} MB" for name, n in NAMES.items()]
    p = Parser(prog="mlxdiff upscale", epilog="\n".join(["upscalers that have a name:", *lines]))
    p.description = "Enlarge pictures with an upscaler of the ESRGAN family. Their settings are kept."
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("pictures", nargs="+", metavar="PICTURE", help="PNG, JPEG, WebP, TIFF, BMP or GIF")
    p.add_argument("-m", "--model", default=DEFAULT, help=f"a name, a .safetensors file, org/repo/file ({DEFAULT})")
    where = "file or folder; never overwrites (default: photo-x4.png beside photo.jpg)"
    p.add_argument("-o", "--output", type=Path, metavar="FILE", help=where)
    p.add_argument("--dtype", choices=DTYPES, help="default: float16 on a GPU, else float32")
    p.add_argument("--offline", action="store_true", help="never use the network")
    p.add_argument("--json", action="store_true", help="print one JSON line for each picture, and no progress bar")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run("mlxdiff upscale", lambda: enlarge(args))


def enlarge(args: argparse.Namespace) -> int:
    pictures = [expanded(name) for name in args.pictures]
    into = args.output is not None and images.is_folder(args.output)
    if args.output is not None and not into:
        if len(pictures) > 1:
            raise Error(
                f"{args.output} is one file, and there are {len(pictures)} pictures.", "Give a folder: -o DIR/."
            )
        images.check_name(args.output)
    folders = {p.parent for p in pictures} if args.output is None else {args.output if into else args.output.parent}
    for picture in pictures:
        images.size(picture)  # one that cannot be read is refused before the first is enlarged
    for folder in folders:
        check_writable(folder, "-o")
    with Bar(args.json, sys.stdout) as bar:
        upscaler = Upscaler(args.model, dtype=args.dtype, offline=args.offline, progress=bar.progress)
        for picture in pictures:
            upscaler.size(images.size(picture))
    for picture in pictures:
        begin = time.perf_counter()
        target = args.output
        if target is None or into:
            name = images.numbered(picture.with_suffix(".png"), f"x{upscaler.scale}").name
            target = (picture.parent if target is None else target) / name
        image, held = images.read(picture, alpha=True), images.read_metadata(picture, whole=True)
        images.check_fits(target, upscaler.size(image.size), image.mode)
        with Bar(args.json, sys.stdout) as bar:
            for tile in upscaler.tiles(image):
                bar.show(Event("upscale", tile.done, tile.tiles, tile.seconds))
        done = {"upscaler": upscaler.name, "hash": upscaler.hash, "scale": upscaler.scale, "from": image.size}
        texts = {name: text for name, text in held.texts.items() if len(text) <= metadata.MAX_TEXT}
        made = tile.image
        made.info["icc_profile"] = image.info.get("icc_profile")  # which colours its numbers mean
        path = images.write(made, target, _source(held), texts | {metadata.ENLARGED: json.dumps(done)})
        w, h = made.size
        seconds = time.perf_counter() - begin
        if args.json:
            say_json({"path": str(path), "size": [w, h], "seconds": round(seconds, 3), **done})
        else:
            say(lines([f"{path}  {w} x {h}, {seconds:.1f} s"]))
    return 0


def _source(held: metadata.Metadata) -> str:
    """How the enlarged picture was made, in IPTC's word: by a model, if the small one was."""
    if held.source in metadata.GENERATED:
        return held.source
    return metadata.DRAWN if held.texts.keys() & metadata.SETTINGS else metadata.ENHANCED


if __name__ == "__main__":
    sys.exit(main())
