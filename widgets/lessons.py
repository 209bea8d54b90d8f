"""`mlxdiff lessons` copies the notebooks for the reader and opens JupyterLab on them, where they start alone."""

import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import mlxdiff

from .. import whole
from ..console import Parser, run
from ..errors import Error
from .lab import lab, needed, writing

FIRST = "00_start.ipynb"


def main(argv: list[str] | None = None) -> int:
    p = Parser(prog="mlxdiff lessons", description="See live what diffusion does: opens JupyterLab on the lessons.")
    what = "where your copies go (default lessons)"
    p.add_argument("folder", nargs="?", type=Path, default=Path("lessons"), metavar="FOLDER", help=what)
    p.add_argument("--no-browser", action="store_true", help="only print the address")
    args = p.parse_args(argv)
    return run("mlxdiff lessons", lambda: lessons(args.folder.resolve(), not args.no_browser))


def lessons(folder: Path, browser: bool) -> int:
    needed("jupyterlab", "ipywidgets", "anywidget", "matplotlib")
    copy(folder)
    with ExitStack() as stack:
        with writing("The folder for temporary files", "let TMPDIR point to another one"):
            place = stack.enter_context(tempfile.TemporaryDirectory())
            write_starter(Path(place))
        return lab(folder / FIRST, "lessons are", browser, extensions=Path(place))


def books() -> list[Path]:
    """The notebooks. They lie beside this package in a checkout, and inside it in a wheel."""
    folder = next(place for p in mlxdiff.__path__ if (place := Path(p) / "notebooks").is_dir())
    return sorted(folder.glob("*.ipynb"))


def write_starter(place: Path) -> None:
    """Write the extension of lessons.js. It knows the code of our own notebooks, because no other may run unasked."""
    code = {}
    for book in books():
        cells = json.loads(book.read_text(encoding="utf-8"))["cells"]
        code[book.name] = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    script = (Path(__file__).parent / "lessons.js").read_text(encoding="utf-8")
    folder = place / "mlxdiff-lessons"
    (folder / "static").mkdir(parents=True)
    built = script.replace("const LESSONS = {};", f"const LESSONS = {json.dumps(code)};")
    (folder / "static" / "start.js").write_text(built, encoding="utf-8")
    about = {"_build": {"load": "static/start.js", "extension": "./extension"}, "extension": True}
    about["disabledExtensions"] = ["@jupyterlab/apputils-extension:announcements"]  # no question about news comes first
    package = {"name": "mlxdiff-lessons", "version": mlxdiff.__version__, "jupyterlab": about}
    (folder / "package.json").write_text(json.dumps(package), encoding="utf-8")


def copy(folder: Path) -> None:
    """Copy the notebooks that the folder does not have yet. What a reader has changed stays."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for book in books():
            if not (folder / book.name).exists():
                whole.write(folder / book.name, book.read_bytes())
    except OSError as e:
        fix = "Free some space, or name another folder."
        raise Error(f"{folder} cannot be written: {e.strerror}.", fix) from None


if __name__ == "__main__":
    sys.exit(main())
