"""Ctrl-C while a command loads its modules, or when it is done: it ends the process at once, and quietly. As a
KeyboardInterrupt it would show a traceback, or become an ImportError on its way through a compiled module."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def begin() -> None:
    """Leave at Ctrl-C, if this process was started as one of mlxdiff's commands. Nobody else's signals change."""
    if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


@contextmanager
def done() -> Iterator[None]:
    """Within, Ctrl-C is a KeyboardInterrupt as usual: there may be something to tidy up."""
    loads = signal.getsignal(signal.SIGINT) is _leave
    try:
        if loads:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
    finally:
        if loads:
            signal.signal(signal.SIGINT, _leave)


def _is_command() -> bool:
    """Whether this process is `mlxdiff ...` or `python -m mlxdiff...`, which is called "-m" until it is found."""
    if sys.argv[:1] == ["-m"] and "-m" in sys.orig_argv:
        after = sys.orig_argv[sys.orig_argv.index("-m") + 1 :]
        return bool(after) and after[0].partition(".")[0] == "mlxdiff"
    return os.path.basename("".join(sys.argv[:1])) in ("mlxdiff", "mlxdiff.exe")


def _leave(*_) -> None:
    os._exit(INTERRUPTED)
