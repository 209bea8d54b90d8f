"""`mlxdiff`: one word, then what to do. Each word is a module that also runs as `python -m mlxdiff.<word>`."""

import importlib
import sys

from . import __version__

COMMANDS = {
    "generate": ("mlxdiff.generate", "draw a picture from a prompt"),
    "convert": ("mlxdiff.convert.__main__", "turn a checkpoint into a model folder"),
    "inspect": ("mlxdiff.convert.inspect", "say what a checkpoint or a model folder holds"),
    "bench": ("mlxdiff.bench.__main__", "measure time, memory and kernels"),
    "studio": ("mlxdiff.widgets.app", "draw in the browser"),
    "lessons": ("mlxdiff.widgets.lessons", "see in the browser what diffusion does"),
    "models": ("mlxdiff.catalogue", "list the models that have a name"),
    "train": ("mlxdiff.train.__main__", "teach the built-in model anew, or measure it"),
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--version"]:
        print(f"mlxdiff {__version__}")
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: mlxdiff COMMAND ...\n")
        for name, (_, text) in COMMANDS.items():
            print(f"  {name:10} {text}")
        print("\nmlxdiff COMMAND --help says more.")
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"mlxdiff: {argv[0]!r} is not a command. Use one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
