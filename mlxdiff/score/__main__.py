"""`mlxdiff score FOLDER`: how well pictures match their prompts, and how far they are from those of another folder."""

import argparse
import sys
import time
from pathlib import Path

import mlx.core as mx

from .. import foreign
from ..bar import Bar
from ..console import Parser, run, say, say_json
from ..errors import Error
from ..result import Event
from ..store import clip as store
from ..train import judge
from . import folder as folders
from . import measure
from .folder import Skipped
from .report import table

NO_CLIP = "none"


def parser() -> argparse.ArgumentParser:
    lines = [f"  {name:8} {n.title}; {n.repo}, {n.download:.1f} GB" for name, n in store.NAMES.items()]
    example = "example:\n  mlxdiff score pictures/ --against photos/"
    p = Parser(prog="mlxdiff score", epilog="\n".join(["CLIPs that have a name:", *lines, "", example]))
    p.description = (
        "Judge pictures: the CLIP score says how well they match their prompts;\n"
        "CMMD and the Fréchet distance say how far they are from other pictures.\n"
        "Pictures of the built-in model are judged without CLIP."
    )
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("folder", metavar="FOLDER", help="of PNG, JPEG, WebP, TIFF, BMP or GIF; others in it are counted")
    p.add_argument("--against", metavar="FOLDER", help="pictures as they should be, such as photographs")
    what = "a text file with one prompt a line, in the order of names, or a .json {name: prompt}"
    p.add_argument("--prompts", metavar="FILE", help=f"{what} (default: those that the pictures carry)")
    what = "name, folder or hub id, fetched once; none: the judge of the built-in model alone"
    p.add_argument("--clip", metavar="CLIP", help=f"{what} ({store.DEFAULT})")
    p.add_argument("--offline", action="store_true", help="never use the network")
    what = "one JSON object instead of a table, with a score of each picture"
    p.add_argument("--json", action="store_true", help=what)
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run("mlxdiff score", lambda: score(args))


def score(args: argparse.Namespace) -> int:
    begin = time.perf_counter()
    places = {"pictures": args.folder} | ({} if args.against is None else {"against": args.against})
    skipped = {what: Skipped() for what in places}
    paths = {what: folders.files(foreign.path(place), skipped[what]) for what, place in places.items()}
    prompts = None
    if args.prompts is not None:
        prompts = folders.prompts_of(foreign.path(args.prompts), [path.name for path in paths["pictures"]])
    judged = {what: folders.by_builtin(files) for what, files in paths.items()}
    with Bar(args.json, sys.stdout) as bar:

        def progress(what: str, done: int, total: int) -> None:
            bar.show(Event(what, done, total, 0.0))

        place = clip_folder(args, judged["pictures"], bar)
        if place is not None:
            store.check(place)
        encoder = None if place is None else store.read_vision(place)
        referee = judge.load(judge.shipped()) if any(judged.values()) else None
        seen = {}
        for what, files in paths.items():
            seen[what] = measure.look(
                files,
                prompts if what == "pictures" else {},
                encoder,
                referee if judged[what] else None,
                skipped[what],
                lambda n, of, what=what: progress(what, n, of),
            )
        width = None if encoder is None else encoder.config.projection
        del encoder  # its memory is for the encoder of texts
        mx.clear_cache()
        progress("prompts", 0, 1)
        facts = {
            "pictures": len(seen["pictures"].names),
            "against": len(seen["against"].names) if "against" in seen else None,
            "skipped": {what: s.counts for what, s in skipped.items()},
            "clip": None if place is None else {"model": args.clip or store.DEFAULT, "features": width},
            "without_prompt": sum(prompt is None for prompt in seen["pictures"].prompts),
            "clip_score": measure.prompts_met(seen["pictures"], place),
            "storybook": measure.words_met(seen["pictures"]),
            "distances": measure.apart(seen["pictures"], seen["against"], progress) if "against" in seen else {},
        }
    facts["warnings"] = measure.warnings(facts, width)
    facts["seconds"] = round(time.perf_counter() - begin, 3)
    if args.json:
        say_json(facts)
    else:
        say(table(facts, skipped))
    return 0


def clip_folder(args: argparse.Namespace, judged: bool, bar: Bar) -> Path | None:
    """Where CLIP is, fetched if it must be. None if it is not wanted, or not here and not needed: pictures of the
    built-in model have a judge of their own."""
    if args.clip == NO_CLIP:
        if judged:
            return None
        fix = "Leave out `clip`, or score pictures that mlxdiff drew with it."
        raise Error(f"Without CLIP, nothing judges {args.folder}: not all of it says storybook drew it.", fix)
    if args.clip is None and judged and store.here(store.DEFAULT) is None:
        return None
    return store.find(args.clip or store.DEFAULT, offline=args.offline, progress=bar.progress)


if __name__ == "__main__":
    sys.exit(main())
