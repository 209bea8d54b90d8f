"""`mlxdiff COMMAND ...` runs a command; `mlxdiff PROMPT ...` draws a picture. Most commands are modules that also run
as `python -m mlxdiff.<command>`."""

import importlib
import sys

from . import __version__
from .console import run, say, warn
from .errors import did_you_mean

COMMANDS = {
    "generate": ("mlxdiff.generate", "draw a picture from a prompt"),
    "upscale": ("mlxdiff.upscale.__main__", "enlarge a picture"),
    "detect": ("mlxdiff.detect.__main__", "make a control picture: edges, depth, grey, inverted"),
    "score": ("mlxdiff.score.__main__", "judge pictures: do they match their prompts, and other pictures?"),
    "studio": ("mlxdiff.widgets.app", "draw in the browser"),
    "lessons": ("mlxdiff.widgets.lessons", "see in the browser what diffusion does"),
    "models": ("mlxdiff.catalogue", "list the models that have a name"),
    "inspect": ("mlxdiff.convert.inspect", "say what a model holds, or where a picture comes from"),
    "convert": ("mlxdiff.convert.__main__", "turn a checkpoint into a model folder"),
    "cache": ("mlxdiff.store.__main__", "list the converted models that are kept, or remove some"),
    "train": ("mlxdiff.train.__main__", "train a LoRA or a word on your pictures, or the built-in model"),
    "tune": ("mlxdiff.tune", "measure once which ways to compute are fastest on this machine"),
    "bench": ("mlxdiff.bench.__main__", "measure time, memory and kernels"),
}


def main(argv: list[str] | None = None) -> int:
    return run("mlxdiff", lambda: _main(sys.argv[1:] if argv is None else argv), loads=True)


def _main(argv: list[str]) -> int:
    if argv[:1] == ["--version"]:
        say(f"mlxdiff {__version__}")
        return 0
    if len(argv) == 2 and argv[1] in ("-h", "--help") and " " not in argv[0]:
        argv = ["help", argv[0]]  # a word that is no command would show the help of generate
    helps = argv[:1] == ["help"]
    word, rest = (argv[1], ["--help"]) if helps and len(argv) > 1 else ("".join(argv[:1]), argv[1:])
    if word in ("", "help", "-h", "--help"):
        say("usage: mlxdiff COMMAND ...\n       mlxdiff PROMPT ...\n")
        for name, (_, text) in COMMANDS.items():
            say(f"  {name:10} {text}")
        say("\nmlxdiff PROMPT is short for mlxdiff generate PROMPT. mlxdiff COMMAND --help says more.")
        say("mlxdiff --version says which version this is.")
        return 0 if argv else 2
    if word in COMMANDS:
        return importlib.import_module(COMMANDS[word][0]).main(rest)
    meant = did_you_mean(word, COMMANDS)
    if helps or word.startswith("-") or (meant and " " not in word):  # anything else is a prompt
        names = f"Use one of {', '.join(COMMANDS)}."
        fix = names if helps or not meant else f"To draw it: mlxdiff generate {word}"
        if word.startswith("-") and not helps:
            meant, fix = "", f"To draw: mlxdiff generate {word} ..., or the prompt first: mlxdiff PROMPT {word} ..."
        warn(f"mlxdiff: {word!r} is not a command. {meant}{fix}")
        return 2
    return importlib.import_module(COMMANDS["generate"][0]).main(argv)


if __name__ == "__main__":
    sys.exit(main())
