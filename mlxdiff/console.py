"""The parts that every command line shares: one-line errors, exit codes, and a parser whose errors fit in one line."""

import argparse
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TextIO
from urllib.parse import unquote, urlsplit

from . import loading
from .arguments import NEITHER, THEIRS
from .errors import Error, did_you_mean
from .foreign import lines, shown
from .loading import INTERRUPTED
from .spelling import as_flags, flag


class Parser(argparse.ArgumentParser):
    """argparse that reports wrong usage in one line. Flags cannot be shortened; for a shortened or misspelt flag the
    error names the closest one."""

    def __init__(self, *args, **settings):
        super().__init__(*args, allow_abbrev=False, **settings)

    def parse_known_args(self, args: list[str] | None = None, namespace: argparse.Namespace | None = None):
        """Report unknown flags here: a parser above this one would suggest flags of its own."""
        open_streams()
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            typed = next((word.partition("=")[0] for word in unknown if word.startswith("-")), None)
            if typed is None:
                again = ""
                if "--lora" in self._option_string_actions:
                    again = "; repeat a flag for each value: --lora A --lora B"
                self.error(f"{unknown[0]!r} is not expected here{again}")
            self.error(f"There is no flag {typed}. {self._advice(typed)}".rstrip(" ."))
        return parsed, unknown

    def _advice(self, typed: str) -> str:
        """What to type instead of a flag that is misspelt, shortened or another program's; "" if it is like none."""
        flags = {long: action for long, action in self._option_string_actions.items() if long.startswith("--")}
        name = typed.lstrip("-").replace("-", "_").casefold()
        if name in NEITHER:
            return as_flags(NEITHER[name][0].upper() + NEITHER[name][1:])
        ours = self._option_string_actions.get(flag(THEIRS[name])) if name in THEIRS else None
        if ours is not None:
            return f"Did you mean {next(f for f in ours.option_strings if f in flags)}?"
        begun = [long for long in flags if long.startswith(typed.casefold())]
        return f"Did you mean {begun[0]}?" if len(begun) == 1 else did_you_mean(typed, begun or flags)

    def _print_message(self, message: str, file: TextIO | None = None):
        """Print a help, or end with 1: argparse fails at what an encoding lacks, and keeps silent of a full disk."""
        kind = getattr(file, "encoding", None) or "utf-8"
        text = message.removesuffix("\n").encode(kind, "backslashreplace").decode(kind)
        if code := run(self.prog, lambda: _print(text, sys.stderr if file is None else file) or 0):
            sys.exit(code)

    def error(self, message: str):
        stop = "" if message.endswith((".", "?")) else "."
        warn(f"{self.prog}: {message}{stop} See {self.prog} --help.")
        sys.exit(2)


def run(prog: str, body: Callable[[], int], loads: bool = False) -> int:
    """Run `body` and return its exit code. An Error prints one line and returns 1, Ctrl-C returns 130, and a closed
    pipe prints nothing. A signal that would end this process is SystemExit. loads: the body only loads the modules of a
    command and calls it, which runs as this does."""
    open_streams()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about a picture's size or EXIF, which are read all the same
    try:
        with nullcontext() if loads else loading.done():
            try:
                with _leaving():
                    code = body()
            finally:
                _flush(sys.stdout)
        return code
    except Error as e:
        warn(f"{prog}: {' '.join(as_flags(str(e)).split())}")
        return 1
    except KeyboardInterrupt:
        warn(f"{prog}: stopped.")
        return INTERRUPTED
    except BrokenPipeError:  # `mlxdiff models | head`
        return 1


@contextmanager
def _leaving() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into SystemExit, so that what is half written is removed, a training saves, and whatever
    was started is ended too. The same signal a second time ends this process at once. One that is ignored, as by nohup,
    stays ignored."""
    known = (signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    taken = [number for number in known if signal.getsignal(number) is signal.SIG_DFL]

    def leave(number: int, _) -> None:
        signal.signal(number, signal.SIG_DFL)
        sys.exit(128 + number)

    for number in taken:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line, or several that `foreign.lines` joins. file: standard output by default. What its encoding lacks is
    escaped. If it cannot be written, nothing more goes there, and an Error says so, or BrokenPipeError."""
    file = sys.stdout if file is None else file
    kind = getattr(file, "encoding", None) or "utf-8"
    safe = "\n".join(shown(line) for line in text.split("\n"))
    _print(safe.encode(kind, "backslashreplace").decode(kind), file)


def say_json(facts: dict, file: TextIO | None = None) -> None:
    """`say` for machines: one line of JSON in ASCII, uncut."""
    _print(json.dumps(facts), sys.stdout if file is None else file)


def warn(text: str) -> None:
    """Say a line on standard error, if it can be written."""
    with suppress(Error, BrokenPipeError):
        say(lines([text]), sys.stderr)


def open_streams() -> None:
    """Standard streams that were closed before the start lead nowhere. Without this, the next file that is opened would
    become one of them, and receive what other libraries print."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(handle, True)
    os.close(handle)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (stays open until the process ends)


def _print(text: str, file: TextIO) -> None:
    try:
        print(text, file=file)
    except OSError as e:
        _give_up(file, e)
    _flush(file)


def _flush(file: TextIO) -> None:
    try:
        file.flush()
    except OSError as e:
        _give_up(file, e)


def _give_up(file: TextIO, error: OSError) -> None:
    """Lead a stream that cannot be written nowhere: Python would try to write its buffer again at exit. Then raise."""
    with suppress(OSError):  # a stream without a file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file.fileno())
        os.close(nowhere)
    if isinstance(error, BrokenPipeError):
        raise error
    name = "Standard error" if file is sys.stderr else "Standard output"
    raise Error(f"{name} cannot be written: {error.strerror or error}.", "Lead it to another place.") from None


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
