"""What every command line shares: one-line errors, exit codes, and a parser that complains in one line."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from .errors import Error, did_you_mean
from .spelling import as_flags

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class Parser(argparse.ArgumentParser):
    """argparse, with wrong usage told in one line. Flags are typed whole: of a shortened or misspelt one the nearest is
    named."""

    def __init__(self, *args, **settings):
        super().__init__(*args, allow_abbrev=False, **settings)

    def parse_known_args(self, args: list[str] | None = None, namespace: argparse.Namespace | None = None):
        """Every parser complains of its own: a parser above it would suggest flags that do not belong here."""
        parsed, strange = super().parse_known_args(args, namespace)
        if strange:
            flag = next((word.partition("=")[0] for word in strange if word.startswith("-")), None)
            if flag is None:
                self.error(f"{strange[0]!r} is not expected here")
            meant = did_you_mean(flag, (f for f in self._option_string_actions if f.startswith("--")))
            self.error(f"There is no flag {flag}. {meant}".rstrip(" ."))
        return parsed, strange

    def error(self, message: str):
        stop = "" if message.endswith("?") else "."
        sys.stderr.write(f"{self.prog}: {message}{stop} See {self.prog} --help.\n")
        sys.exit(2)


def run(prog: str, body: Callable[[], int]) -> int:
    """The exit code of `body`: an Error is one line and 1, Ctrl-C is 130, a closed pipe is quiet."""
    try:
        code = body()
        sys.stdout.flush()
        return code
    except Error as e:
        print(f"{prog}: {' '.join(as_flags(str(e)).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{prog}: stopped.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `mlxdiff models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def install(extra: str) -> str:
    """The command that adds what an extra of pyproject.toml names, from where mlxdiff itself came: a checkout, a wheel,
    a repository, else the package index."""
    from importlib import metadata  # slow to load, and needed by nothing else

    place = Path(__file__).parent.parent
    if (place / "pyproject.toml").is_file():
        return f'pip install -e "{place}[{extra}]"'
    try:
        origin = json.loads(metadata.distribution("mlxdiff").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        origin = {}
    url = origin.get("url", "")
    file = Path(unquote(urlsplit(url).path))
    if url.startswith("file:") and file.exists():
        return f'pip install "{file}[{extra}]"'
    if "vcs_info" in origin:
        return f'pip install "mlxdiff[{extra}] @ {origin["vcs_info"]["vcs"]}+{url}"'
    return f'pip install "mlxdiff[{extra}]"'
