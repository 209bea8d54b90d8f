"""`mlxdiff studio` and `mlxdiff lessons` before they start anything: the errors they report, and what they open."""

import os
import re
import signal
import stat
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("nbformat", reason="the studio needs JupyterLab: pip install .[studio]")

import nbformat
import psutil
from nbformat.sign import NotebookNotary

from mlxdiff.console import install
from mlxdiff.errors import Error
from mlxdiff.widgets import app, lab, lessons
from tests.test_imports import ROOT


@pytest.mark.parametrize(("module", "flags"), [("jupyterlab", "'studio', '--lab'"), ("tornado", "'studio'")])
def test_without_its_packages_it_says_what_to_install_and_writes_nothing(tmp_path, module, flags):
    code = f"import sys; sys.modules['{module}'] = None\n"
    code += f"from mlxdiff.__main__ import main; sys.exit(main([{flags}]))"
    env = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"mlxdiff studio: {module} is not installed. Install it with: {install('studio')}\n"
    assert not list(tmp_path.iterdir())


def test_a_new_notebook_is_valid_and_its_cell_makes_a_studio(tmp_path):
    book = lab._notebook(tmp_path / "new.ipynb", "sdxl")
    nbformat.validate(book)
    assert "Studio('sdxl')" in lab._cell(book, tmp_path).source
    assert "Studio()" in lab._cell(lab._notebook(tmp_path / "new.ipynb", None), tmp_path).source
    for cell in book.cells:
        if cell.cell_type == "code":
            compile(cell.source, "cell", "exec")


def test_a_notebook_that_is_there_keeps_what_its_owner_wrote(tmp_path):
    path = tmp_path / "mine.ipynb"
    book = lab._notebook(path, None)
    book.cells.append(nbformat.v4.new_code_cell("mine = 1"))
    lab._write(book, path)
    assert lab._notebook(path, None).cells == book.cells
    named = lab._notebook(path, "folder/model")
    assert "Studio('folder/model')" in lab._cell(named, path).source
    assert named.cells[-1].source == "mine = 1"


FOREIGN = {
    "code of its own": ("import os; os.system('touch ran')", []),
    "code behind ours": (lab.CELL.format(model="") + "\nimport os", []),
    "code in the model's name": (lab.CELL.format(model="'a'); import os; ('b'"), []),
    "ours with a foreign output elsewhere": (
        lab.CELL.format(model=""),
        [nbformat.v4.new_output("display_data", {"text/html": "<script>1</script>"})],
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_notebook_of_somebody_else_is_neither_run_nor_signed(tmp_path, monkeypatch, case):
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
    code, outputs = FOREIGN[case]
    path, cells = tmp_path / "studio.ipynb", [nbformat.v4.new_code_cell(code), nbformat.v4.new_code_cell("1")]
    cells[1].outputs = outputs
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    before = path.read_bytes()
    with pytest.raises(Error, match="would run unasked"):
        lab._notebook(path, None)
    assert path.read_bytes() == before
    book = nbformat.read(path, as_version=4)
    NotebookNotary().sign(book)  # as JupyterLab does when its owner saves it
    assert lab._notebook(path, None).cells == book.cells


def test_without_a_place_for_jupyters_signatures_it_says_so(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "file" / "data"))
    nbformat.write(lab._notebook(tmp_path / "new.ipynb", None), tmp_path / "a.ipynb")
    with pytest.raises(Error, match="JUPYTER_DATA_DIR"):
        lab._notebook(tmp_path / "a.ipynb", None)


def test_the_flags_of_the_page_and_of_the_notebook(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(app, "studio", lambda *args: asked.append(args) or 0)
    monkeypatch.setattr(app.lab, "studio", lambda *args: asked.append(args) or 0)
    for line in ("", "-m sdxl -o there --no-browser --sign", "--lab", "--lab mine.ipynb -m sdxl"):
        assert app.main(line.split()) == 0
    here = Path.cwd()
    assert asked == [
        (None, None, True, False),
        ("sdxl", "there", False, True),
        (here / "studio.ipynb", None, True),
        (here / "mine.ipynb", "sdxl", True),
    ]
    wrongs = (("--lab -o there", "set studio.folder"), ("mine.ipynb", "is not expected here"))
    for wrong, said in (*wrongs, ("--lab --sign", "set studio.signer")):
        with pytest.raises(SystemExit):
            app.main(wrong.split())
        assert said in capsys.readouterr().err


def test_a_notebook_is_called_one(tmp_path):
    with pytest.raises(Error, match=r"Call it notes\.ipynb"):
        lab.studio(tmp_path / "notes.txt", None, browser=False)
    assert not list(tmp_path.iterdir())


def test_an_impossible_model_is_refused_before_anything_starts(tmp_path, monkeypatch, capsys):
    """In the words of `store.resolve`, as `mlxdiff generate` tells it."""
    monkeypatch.chdir(tmp_path)
    for name in ("nosuch", "folder/missing.safetensors", ""):
        assert app.main(["-m", name]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"mlxdiff studio: There is no model, file or folder {name!r}. Give a name that ")
        assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_notebook_elsewhere_finds_a_file_that_was_named_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.safetensors").write_bytes(b"")
    for name in ("mine.safetensors", "storybook", "org/repo"):
        assert lab._name_in(tmp_path, name) == name
    assert lab._name_in(tmp_path / "books", "mine.safetensors") == str(tmp_path / "mine.safetensors")
    assert lab._name_in(tmp_path / "books", "storybook") == "storybook"


@pytest.mark.parametrize("text", ["not json", "[]", '{"nbformat": 99}'])
def test_what_is_no_notebook_is_one_line(tmp_path, text):
    path = tmp_path / "bad.ipynb"
    path.write_text(text)
    with pytest.raises(Error, match="cannot be read"):
        lab._notebook(path, None)


def test_a_notebook_without_code_is_refused(tmp_path):
    path = tmp_path / "prose.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# hello")]), path)
    with pytest.raises(Error, match="has no code"):
        lab._notebook(path, None)


def test_lessons_are_copied_once_and_a_readers_changes_stay(tmp_path):
    folder = tmp_path / "mine"
    lessons.copy(folder)
    assert (folder / lessons.FIRST).read_bytes() == (ROOT / "notebooks" / lessons.FIRST).read_bytes()
    assert {p.name for p in folder.iterdir()} == {p.name for p in (ROOT / "notebooks").glob("*.ipynb")}
    (folder / lessons.FIRST).write_text("changed")
    lessons.copy(folder)
    assert (folder / lessons.FIRST).read_text() == "changed"


def test_a_folder_for_lessons_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Error, match="cannot be written"):
        lessons.copy(tmp_path / "file")


# What runs, with a real Jupyter.


def until(holds: Callable[[], object], seconds: float = 60.0):
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.1)
    return found


def alive(pid: int) -> bool:
    """Whether a process runs, one that has ended and was not waited for aside."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(params=["lab", "page"])
def started(request, tmp_path):
    """`mlxdiff studio` as a page or in a Jupyter of its own, with a browser that notes how it was started: the process,
    its children's ids, that note."""
    pytest.importorskip("jupyterlab")
    from nbformat.sign import NotebookNotary

    browser, note = tmp_path / "browser", tmp_path / "note"
    browser.write_text(f'#!/bin/sh\nprintf "%s" "$*" > "{note}.part" && mv "{note}.part" "{note}"\n')
    browser.chmod(0o755)
    env = os.environ | {"PYTHONPATH": str(ROOT), "BROWSER": str(browser), "IPYTHONDIR": str(tmp_path / "ipython")}
    env |= {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    # Whoever started the tests may ignore the signals that end a terminal, and hand that down.
    code = "import signal; [signal.signal(s, signal.SIG_DFL) for s in (signal.SIGHUP, signal.SIGTERM)]\n"
    code += "import sys; from mlxdiff.widgets import app\n"
    code += f"sys.exit(app.main({['--lab'] * (request.param == 'lab')}))"
    (tmp_path / "books").mkdir()
    book = lab._notebook(tmp_path / "books" / "studio.ipynb", None)
    lab._cell(book, tmp_path).source = "print('hello')"
    lab._write(book, tmp_path / "books" / "studio.ipynb")
    with pytest.MonkeyPatch.context() as patch:  # as if this user's Jupyter had saved it
        patch.setenv("JUPYTER_DATA_DIR", env["JUPYTER_DATA_DIR"])
        NotebookNotary().sign(book)
    out = open(tmp_path / "out", "w+")  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path / "books", env=env, stdout=out, stderr=out, start_new_session=True
    )
    children: list[int] = []
    try:
        until(lambda: note.exists() or process.poll() is not None)
        assert process.poll() is None, (tmp_path / "out").read_text()
        children += [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        yield process, children, note.read_text()
    finally:
        out.close()
        for pid in [process.pid, *children]:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_all_that_was_started_ends_with_the_terminal(started, request):
    process, children, _ = started
    if request.node.callspec.params["started"] == "lab":
        assert len(children) >= 2  # Jupyter and a kernel
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP
    until(lambda: not any(map(alive, children)), 20)


def test_the_browser_is_not_started_with_the_token(started, tmp_path):
    """What it is started with, every user of the machine can read."""
    process, children, said = started
    page = Path(urllib.parse.unquote(said.removeprefix("file://")))
    address = re.search(r"http://\S+", (tmp_path / "out").read_text())[0]
    token = address.partition("token=")[2]
    assert len(token) == 32
    assert token not in said
    assert address in page.read_text()
    assert stat.S_IMODE(page.stat().st_mode) == 0o600
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not page.exists()
    until(lambda: not any(map(alive, children)), 20)


def test_half_a_lesson_is_none(tmp_path, full_disk):
    """It would stay: a lesson that is there is not copied again."""
    with full_disk(), pytest.raises(Error, match="cannot be written"):
        lessons.copy(tmp_path)
    sizes = {book.name: book.stat().st_size for book in lessons.books()}
    assert all(file.stat().st_size == sizes[file.name] for file in tmp_path.iterdir())
    lessons.copy(tmp_path)
    assert {file.name: file.stat().st_size for file in tmp_path.iterdir()} == sizes


def test_a_full_disk_costs_no_notebook(tmp_path, full_disk):
    """The one that is there, which may hold work, stays as it was."""
    path = tmp_path / "a.ipynb"
    lab._write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("mine")]), path)
    before = path.read_bytes()
    with full_disk(), pytest.raises(Error, match="cannot be written"):
        lab._write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("x" * 99_999)]), path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]
