"""`mlxdiff cache`: lists the converted models and encoded prompts that are kept, removes them, and verifies models."""

import sys
import time
from dataclasses import replace

from tqdm import tqdm

from .. import description, foreign, seal, store
from ..console import Parser, run, say
from ..errors import Error, did_you_mean
from . import cache, prompts

_WIDE = 60  # characters of a name that the list shows


def main(argv: list[str] | None = None) -> int:
    p = Parser(prog="mlxdiff cache", description="List the converted models that are kept, or remove some.")
    what = "remove what is of no more use; NAME: all copies of that model; prompts: encoded prompts; all: everything"
    p.add_argument("--clean", nargs="?", const="", metavar="NAME", help=what)
    what = "read every byte of the copies, or of those of NAME, and say which are damaged"
    p.add_argument("--verify", nargs="?", const="", metavar="NAME", help=what)
    args = p.parse_args(argv)
    if args.verify is not None and args.clean is not None:
        p.error("--verify and --clean are two commands.")
    if args.verify is not None:
        return run("mlxdiff cache", lambda: verify(args.verify))
    return run("mlxdiff cache", lambda: show() if args.clean is None else clean(args.clean))


def show() -> int:
    held = cache.entries(store.reachable)
    if held:  # a name is foreign text
        held = [replace(e, name=" ".join(e.name[:_WIDE].split()), source=" ".join(e.source.split())) for e in held]
        wide = max(len(e.name) for e in held)
        say(f"{'name':{wide}}  {'weights':13} {'size':>9}  {'made':10}  source")
    for e in held:
        state = "being made" if e.busy else e.useless
        source = f"{e.source or '-'} ({state})" if state else e.source or "-"
        say(foreign.lines([f"{e.name:{wide}}  {e.recipe or '-':13} {_size(e.size):>9}  {_day(e.made)}  {source}"]))
    count, size = prompts.held()
    if count:
        say(f"{count} encoded prompt{'s' * (count > 1)}, {_size(size)}: mlxdiff cache --clean prompts removes them.")
    say(f"{_size(sum(e.size for e in held) + size)} in {cache.root()}.")
    useless = sum(e.size for e in held if e.useless)
    if useless:
        say(f"{_size(useless)} of it is of no more use: mlxdiff cache --clean removes that.")
    return 0


def clean(name: str) -> int:
    """Remove the useless entries, those of a name (a model's or a folder's), encoded prompts, or everything."""
    held, freed = cache.entries(store.reachable), 0
    if name in ("prompts", "all"):
        count, freed = prompts.held()
        prompts.clear()
        if count or name == "prompts":
            say(f"Removed {count} encoded prompt{'s' * (count != 1)}, {_size(freed)}.")
        if name == "prompts":
            return 0
    chosen = [e for e in held if name == "all" or e.useless] if name in ("", "all") else _called(name, held)
    for e in chosen:
        what = f"{e.name} {e.recipe}".strip()
        if cache.remove(e):
            freed += e.size
            say(f"Removed {what}, {_size(e.size)}" + (f": {e.useless}." if e.useless else "."))
        else:
            say(f"Left {what}: it is being made.")
    say(f"{_size(freed)} freed in {cache.root()}.")
    return 0


def verify(name: str) -> int:
    """Compare every byte of all entries, or of those of a name, with what their conversions wrote."""
    held = [e for e in cache.entries(store.reachable) if e.recipe and not e.busy]
    code = 0
    for e in held if name in ("", "all") else _called(name, held):
        with tqdm(total=e.size, unit="B", unit_scale=True, desc=e.name, leave=False, disable=None) as bar:
            problem = _damage(e, bar)
        say(f"{e.name} {e.recipe}: {problem or f'whole, {_size(e.size)}'}")
        code = 1 if problem else code
    if code:
        say("A damaged copy is made anew once it is gone: mlxdiff cache --clean NAME.")
    return code


def _damage(entry: cache.Entry, bar: tqdm) -> str:
    """What is wrong with an entry; "" if nothing is."""
    try:
        model = description.read(entry.folder)
    except Error as e:
        return f"damaged: {e.problem}"
    broken = seal.broken(entry.folder, model.seal, lambda done, _: bar.update(done - bar.n))
    return f"damaged: {', '.join(broken)} differ{'s' * (len(broken) == 1)} from what was written." if broken else ""


def _called(name: str, held: list[cache.Entry]) -> list[cache.Entry]:
    """The entries of a name, a model's or a folder's."""
    chosen = [e for e in held if name in (e.name, e.folder.name)]
    if not chosen:
        fix = f"{did_you_mean(name, (e.name for e in held))}mlxdiff cache lists what is kept."
        raise Error(f"The cache holds no conversion of {name!r}.", fix)
    return chosen


def _day(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d", time.localtime(seconds))
    except (OSError, OverflowError, ValueError):  # the clock was far off when the folder was made
        return f"{'-':10}"


def _size(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
