"""Run the notebooks as a reader would: from the top, in a fresh kernel, without a network, on the built-in model.

    python -m tests.notebooks                # run all and write their outputs back; or name some
    pytest tests/test_notebooks.py           # run all; what they print must be what is committed

Committed outputs are what a page shows that runs nothing: text and pictures, no widgets, no times of execution. A cell
tagged "volatile" may print what differs by machine or run: it runs, and its text is not compared."""

import base64
import io
import os
import re
import sys
from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parent.parent / "notebooks"
TIMEOUT = 300  # seconds a cell
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
_PICTURE = re.compile(r"!\[([^]]*)\]\(data:image/png;base64,([A-Za-z0-9+/=]+)\)")
_LIVE = ("application/vnd.jupyter.widget-view+json", "application/javascript")


def names() -> list[str]:
    return sorted(p.stem for p in FOLDER.glob("*.ipynb"))


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def run(name: str, place: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run in `place`, where what it writes will lie. A cell's error is raised."""
    book = read(name)
    path = os.pathsep.join(p for p in (str(FOLDER.parent), os.environ.get("PYTHONPATH")) if p)
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    options = {"kernel_name": "python3", "record_timing": False, "coalesce_streams": True}
    client = NotebookClient(book, timeout=TIMEOUT, resources={"metadata": {"path": str(place)}}, **options)
    client.execute(env=env)
    return still(book)


def still(book: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what needs a kernel."""
    book.metadata.pop("widgets", None)
    for cell in book.cells:
        if cell.cell_type != "code":
            continue
        kept = []
        for output in cell.outputs:
            if "data" in output:
                live = output.data.pop(_LIVE[0], None)
                if live is not None and not output.data.keys() - {"text/plain"}:
                    continue  # a progress bar that has gone
                output.metadata = {}
            kept += parts(output)
        cell.outputs = kept
    return book


def parts(output: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """A saved lesson as words, picture and words: some pages show no picture that is inside Markdown."""
    found = _PICTURE.search(output.get("data", {}).get("text/markdown", ""))
    if found is None:
        return [output]
    above, below = (found.string[: found.start()].strip(), found.string[found.end() :].strip())
    shown = ({"text/markdown": above}, {"image/png": found[2], "text/plain": found[1]}, {"text/markdown": below})
    return [nbformat.v4.new_output("display_data", data) for data in shown]


def light(book: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """With pictures of 64 levels a colour, not 256: half the bytes, and on a page the same to the eye."""
    for output in (
        o for c in book.cells if c.cell_type == "code" for o in c.outputs if "image/png" in o.get("data", {})
    ):
        small = io.BytesIO()
        few_bits(Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))).save(small, "PNG", optimize=True)
        output.data["image/png"] = base64.b64encode(small.getvalue()).decode()
    return book


def few_bits(picture: Image.Image) -> Image.Image:
    """With 64 levels a colour."""
    pixels = np.asarray(picture.convert("RGB"), float)
    return Image.fromarray(((pixels * 63 / 255).round() * 255 / 63).round().astype(np.uint8))


def texts(book: nbformat.NotebookNode) -> list[str]:
    """What each code cell says in words, markdown included; and that there are pictures, if there are."""
    said = []
    for cell in book.cells:
        if cell.cell_type != "code" or "volatile" in cell.metadata.get("tags", []):
            continue
        parts = []
        for output in cell.outputs:
            data = output.get("data", {})
            parts.append(output.get("text") or data.get("text/markdown") or data.get("text/plain") or "")
            parts += ["[picture]"] if "image/png" in data else []
        said.append("\n".join(parts))
    return said


def same(a: str, b: str, rel: float = 0.02, least: float = 0.02) -> bool:
    """Equal but for numbers, which may differ by 2 % or by `least`: what rounding does to a run on another machine."""
    if _NUMBER.sub("#", a) != _NUMBER.sub("#", b):
        return False
    pairs = zip(map(float, _NUMBER.findall(a)), map(float, _NUMBER.findall(b)), strict=True)
    return all(abs(x - y) <= max(least, rel * max(abs(x), abs(y))) for x, y in pairs)


def main(argv: list[str]) -> None:
    import tempfile

    for name in argv or names():
        with tempfile.TemporaryDirectory() as place:
            book = light(run(name, Path(place)))
        path = FOLDER / f"{name}.ipynb"
        nbformat.write(book, path)
        print(f"{name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
