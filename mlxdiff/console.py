"""The parts that every command line shares: one-line errors, exit codes, and a parser whose errors fit in one line."""

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
    """argparse that reports wrong usage in one line. Flags cannot be shortened; for a shortened or misspelt flag the
    error names the closest one."""

    def __init__(self, *args, **settings):
        super().__init__(*args, allow_abbrev=False, **settings)

    def parse_known_args(self, args: list[str] | None = None, namespace: argparse.Namespace | None = None):
        """Report unknown flags here: a parser above this one would suggest flags of its own."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flag = next((word.partition("=")[0] for word in unknown if word.startswith("-")), None)
            if flag is None:
                self.error(f"{unknown[0]!r} is not expected here")
            meant = did_you_mean(flag, (f for f in self._option_string_actions if f.startswith("--")))
            self.error(f"There is no flag {flag}. {meant}".rstrip(" ."))
        return parsed, unknown

    def error(self, message: str):
        stop = "" if message.endswith("?") else "."
        sys.stderr.write(f"{self.prog}: {message}{stop} See {self.prog} --help.\n")
        sys.exit(2)


def run(prog: str, body: Callable[[], int]) -> int:
    """Run `body` and return its exit code. An Error prints one line and returns 1, Ctrl-C returns 130, and a closed
    pipe prints nothing."""
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
    """The command that installs an extra of pyproject.toml. The source is the one that mlxdiff came from: a checkout,
    a wheel, a repository, else the package index."""
    from importlib import metadata  # slow to load, and nothing else here needs it

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
