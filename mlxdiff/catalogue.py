"""`mlxdiff models`: the models that have a name, and what the built-in one knows."""

import re
import sys

from .console import Parser, run
from .errors import Error
from .registry import FAMILIES, MODELS
from .train.storybook import captions

BUILTIN = "storybook"


def main(argv: list[str] | None = None) -> int:
    p = Parser(prog="mlxdiff models", description="List the models that have a name, or show one.")
    p.add_argument("name", nargs="?", metavar="NAME", help=f"show this one; {BUILTIN} also lists the words it knows")
    args = p.parse_args(argv)
    return run("mlxdiff models", lambda: show(args.name))


def show(name: str | None) -> int:
    if name is not None and name not in MODELS:
        raise Error(f"There is no model named {name!r}.", f"Named models are {', '.join(MODELS)}.")
    for key, m in MODELS.items():
        if name in (None, key):
            size = "in the box" if m.repo is None else f"{m.download / 1e9:.1f} GB"
            print(f"{key:19} {size:>10}  {m.licence:26} {m.title}")
    if name is None:
        titles = ", ".join(f.title for f in FAMILIES.values())
        print(f"\nBeside these: any hub repository, folder or .safetensors file of {titles}.")
    elif MODELS[name].repo is not None:
        print(f"from {MODELS[name].repo}{', gated: accept its licence there first' if MODELS[name].gated else ''}")
    else:
        for kind, words in captions.vocabulary().items():
            print(f"{kind:10} {', '.join(words)}")
    return 0


def strange(prompt: str) -> list[str]:
    """The words of a prompt that the built-in model was never shown to mean something."""
    phrases = [*captions.LEADING, *captions.OPENINGS, *(p for w in captions.vocabulary().values() for p in w)]
    known = {word for phrase in phrases for word in phrase.split()}
    return [w for w in dict.fromkeys(re.findall(r"[a-z]+", prompt.replace("BREAK", "").lower())) if w not in known]


if __name__ == "__main__":
    sys.exit(main())
