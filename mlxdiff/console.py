"""What every command line shares: one-line errors, exit codes, and a parser that complains in one line."""

import argparse
import os
import sys
from collections.abc import Callable

from .errors import Error
from .spelling import as_flags

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class Parser(argparse.ArgumentParser):
    """argparse, with wrong usage told in one line."""

    def error(self, message: str):
        sys.stderr.write(f"{self.prog}: {message}. See {self.prog} --help.\n")
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
