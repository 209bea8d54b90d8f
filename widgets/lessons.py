"""`mlxdiff lessons` copies the notebooks for the reader and opens JupyterLab on them."""

import shutil
import sys
from pathlib import Path

import mlxdiff

from ..console import Parser, run
from ..errors import Error
from .lab import lab, needed

FIRST = "00_start.ipynb"


def main(argv: list[str] | None = None) -> int:
    p = Parser(prog="mlxdiff lessons", description="See live what diffusion does: opens JupyterLab on the lessons.")
    p.add_argument(
        "folder", nargs="?", type=Path, default=Path("lessons"), help="where your copies go (default lessons)"
    )
    p.add_argument("--no-browser", action="store_true", help="only print the address")
    args = p.parse_args(argv)
    return run("mlxdiff lessons", lambda: lessons(args.folder.resolve(), not args.no_browser))


def lessons(folder: Path, browser: bool) -> int:
    needed("jupyterlab", "ipywidgets", "anywidget", "matplotlib")
    copy(folder)
    return lab(folder / FIRST, "lessons are", browser)


def copy(folder: Path) -> None:
    """Copy the notebooks that the folder does not have yet. What a reader has changed stays."""
    # The notebooks lie beside this package in a checkout, and inside it in a wheel.
    books = next(place for p in mlxdiff.__path__ if (place := Path(p) / "notebooks").is_dir())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for book in sorted(books.glob("*.ipynb")):
            if not (folder / book.name).exists():
                shutil.copyfile(book, folder / book.name)
    except OSError as e:
        raise Error(f"{folder} cannot be written: {e.strerror}.", "Name another folder.") from None


if __name__ == "__main__":
    sys.exit(main())
