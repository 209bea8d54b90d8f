"""JupyterLab on a notebook: on the lessons, or on one whose studio is already drawn. It listens on loopback only."""

import html
import importlib.util
import json
import os
import re
import secrets
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from ..console import install, say
from ..errors import Error
from ..whole import appearing

INTRO = """# Studio

Type a prompt and press **Generate**. Pictures are saved in the folder `pictures`, each with its settings inside:
drop one on the studio to get them back. Nothing leaves this machine."""
CELL = """from mlxdiff.widgets import Studio

studio = Studio({model})
studio"""
MORE = """# Everything is also here, in Python:
# studio.images[-1]                                   the last picture, with .request and .save(...)
# studio.prompt, studio.steps = "a red house", 30
# studio.compare(seed=[1, 2, 3], guidance=[1, 3, 7])"""
_OURS = re.compile(re.escape(CELL).replace(r"\{model\}", r"""('[^'\\\n]*'|"[^"\\\n]*")?"""))
_PATIENCE = 60.0  # seconds that Jupyter may take to start, on a cold disk and an old machine
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_FAREWELL = 30.0  # seconds that Jupyter may take to end: it gives every kernel five


def studio(path: Path, model: str | None, browser: bool) -> int:
    if path.suffix != ".ipynb":
        raise Error(f"{path.name} is not the name of a notebook.", f"Call it {path.stem}.ipynb.")
    if model is not None:
        model = _name_in(path.parent, model)
    needed("jupyterlab", "ipywidgets", "anywidget")  # before anything is written
    from nbformat.sign import NotebookNotary

    book = _notebook(path, model)

    def draw(url: str, token: str) -> None:
        _draw(book, path, url, token)
        with _notary():
            NotebookNotary().sign(book)  # without a signature Jupyter would not show what was drawn
        _write(book, path)

    return lab(path, "studio is", browser, draw)


def _name_in(folder: Path, model: str) -> str:
    """The name that opens the model from a notebook in `folder`, where its kernel runs. An unknown name is an error."""
    from .. import store

    store.check_name(model)
    file = Path(os.path.expanduser(model))
    return str(file.absolute()) if store.local(model) == file and folder != Path.cwd() else model


def needed(*modules: str) -> None:
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise Error(f"{name} is not installed.", f"Install it with: {install('studio')}")


def lab(
    path: Path,
    what: str,
    browser: bool,
    prepare: Callable[[str, str], None] = lambda url, token: None,
    extensions: Path | None = None,
) -> int:
    """Run JupyterLab on a notebook until Ctrl-C, until a signal ends this process, or until it loses its terminal.
    extensions: a folder with more of its extensions."""
    token, port = secrets.token_hex(16), _free_port()
    url = f"http://127.0.0.1:{port}"
    say("Starting JupyterLab ...")
    with writing("The folder for temporary files", "let TMPDIR point to another one"):
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (entered below)
    with log, ExitStack() as stack:
        try:
            with _signals_later():  # or a server would be left that nobody knows
                server = _serve(path.parent, token, port, log, extensions)
                stack.callback(_end, server)
            _wait(server, url, log)
            prepare(url, token)
            address = f"{url}/lab/tree/{urllib.parse.quote(path.name)}?token={token}"
            say(f"The {what} at {address}\nCtrl-C here ends it.")
            if browser:
                webbrowser.open(stack.enter_context(private_page(address)))
            return server.wait()
        except KeyboardInterrupt:
            return 0


@contextmanager
def _signals_later() -> Iterator[None]:
    """Signals that end this process do so after the block."""
    came, before = [], {number: handler for number in _ENDING if callable(handler := signal.getsignal(number))}
    for number in before:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)


def _end(server: subprocess.Popen) -> None:
    """End Jupyter, which ends its kernels before itself. No signal interrupts this. If Jupyter takes too long, it is
    killed, and its kernels end when they see that it is gone."""
    for each in _ENDING:
        signal.signal(each, signal.SIG_IGN)
    server.terminate()
    try:
        server.wait(_FAREWELL)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


@contextmanager
def private_page(address: str) -> Iterator[str]:
    """A page that only this user can read and that leads to the address with its token. The browser is started with
    this page, because everybody on the machine can read a program's arguments."""
    from jupyter_core.paths import jupyter_runtime_dir  # Jupyter keeps such pages there too

    there, folder = html.escape(address), jupyter_runtime_dir()
    with writing(folder, "add --no-browser"):
        os.makedirs(folder, exist_ok=True)
        handle, name = tempfile.mkstemp(".html", "mlxdiff-", folder)
    try:
        with writing(folder, "add --no-browser"), open(handle, "w", encoding="utf-8") as page:
            page.write(f'<meta charset="utf-8"><meta http-equiv="refresh" content="0;url={there}">')
            page.write(f'<a href="{there}">To the studio</a>')
        yield Path(name).as_uri()
    finally:
        os.unlink(name)


@contextmanager
def _notary() -> Iterator[None]:
    """Of notebooks, which keeps a secret and a list of signatures."""
    from jupyter_core.paths import jupyter_data_dir

    try:
        with writing(jupyter_data_dir(), "let JUPYTER_DATA_DIR point to another folder"):
            yield
    except sqlite3.Error as e:
        fix = "Free some space, or let JUPYTER_DATA_DIR point to another folder."
        raise Error(f"Jupyter's signatures in {jupyter_data_dir()} cannot be used: {e}.", fix) from None


@contextmanager
def writing(place: str, otherwise: str) -> Iterator[None]:
    """Make one Error of whatever keeps a file of this program's own from being written."""
    try:
        yield
    except OSError as e:
        raise Error(f"{place} cannot be written: {e.strerror or e}.", f"Free some space, or {otherwise}.") from None


def _notebook(path: Path, model: str | None):
    """Read the notebook, or make a new one if there is none."""
    import nbformat
    from nbformat import v4

    if not path.is_file():
        cell = v4.new_code_cell(CELL.format(model="" if model is None else repr(model)))
        return v4.new_notebook(
            cells=[v4.new_markdown_cell(INTRO), cell, v4.new_code_cell(MORE)],
            metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        )
    try:
        book = nbformat.read(path, as_version=4)
    except (OSError, ValueError, AttributeError, nbformat.ValidationError) as e:  # nbformat raises these on odd JSON
        raise Error(f"{path} cannot be read as a notebook: {e}.", "Name another one.") from None
    _check_trust(book, path)
    if model is not None:
        _cell(book, path).source = CELL.format(model=repr(model))
    return book


def _check_trust(book, path: Path) -> None:
    """Raise unless the first code cell may run unasked and the outputs may be signed: this user's Jupyter has signed
    the notebook, or the cell is, to the letter, what this module writes and no other cell has an output."""
    from nbformat.sign import NotebookNotary

    first = _cell(book, path)
    others = [cell for cell in book.cells if cell is not first and cell.get("outputs")]
    with _notary():
        signed = NotebookNotary().check_signature(book)
    if signed or (_OURS.fullmatch(first.source) and not others):
        return
    raise Error(
        f"{path} was not made by `mlxdiff studio` here, and its first code cell would run unasked.",
        "Look at it in JupyterLab and save it there if you trust it, or name another notebook.",
    )


def _cell(book, path: Path):
    """The first code cell, which holds the studio."""
    for cell in book.cells:
        if cell.cell_type == "code":
            return cell
    raise Error(f"{path} has no code.", "Name another notebook, or one that does not exist yet.")


def _serve(folder: Path, token: str, port: int, log: IO[str], extensions: Path | None) -> subprocess.Popen:
    options = {"ip": "127.0.0.1", "port": port, "port_retries": 0, "root_dir": folder}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser"]
    command += [f"--ServerApp.{k}={v}" for k, v in options.items()]
    command += [] if extensions is None else [f"--LabApp.extra_labextensions_path={extensions}"]
    command += ["--allow-root"] if os.geteuid() == 0 else []
    # A new session, since Jupyter would answer Ctrl-C with a question. `ps` shows arguments, but not the token here.
    env = os.environ | {"JUPYTER_TOKEN": token}
    return subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _wait(server: subprocess.Popen, url: str, log: IO[str]) -> None:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        if server.poll() is not None:
            log.seek(0)
            last = (log.read().strip().splitlines() or ["it said nothing"])[-1]
            raise Error(f"JupyterLab ended with code {server.returncode}: {last}.", "Try it alone: jupyter lab.")
        try:
            urllib.request.urlopen(f"{url}/api", timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise Error(f"JupyterLab did not answer within {_PATIENCE:g} s.", "Try it alone: jupyter lab.")


def _draw(book, path: Path, url: str, token: str) -> None:
    """Run the studio's cell in the kernel that the page will use for this notebook."""
    from jupyter_client import BlockingKernelClient
    from jupyter_core.paths import jupyter_runtime_dir
    from nbformat.v4 import output_from_msg

    _write(book, path)
    session = {"path": path.name, "name": path.name, "type": "notebook", "kernel": {"name": "python3"}}
    headers = {"Authorization": f"token {token}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/api/sessions", json.dumps(session).encode(), headers)
    with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
        kernel = json.load(answer)["kernel"]["id"]
    client = BlockingKernelClient(connection_file=str(Path(jupyter_runtime_dir()) / f"kernel-{kernel}.json"))
    client.load_connection_file()
    client.start_channels(hb=False)  # a busy machine misses heartbeats, and the client would give up the kernel
    try:
        client.wait_for_ready(timeout=_PATIENCE)
        cell, messages = _cell(book, path), []
        reply = client.execute_interactive(cell.source, output_hook=messages.append, timeout=_PATIENCE)
    except (RuntimeError, TimeoutError) as e:  # jupyter_client raises these if a kernel does not answer
        raise Error(f"The notebook's kernel does not answer: {e}.", "Try again.") from None
    finally:
        client.stop_channels()
    shown = ("stream", "display_data", "execute_result", "error")
    cell.outputs = [output_from_msg(m) for m in messages if m["msg_type"] in shown]
    cell.execution_count = reply["content"].get("execution_count")


def _write(book, path: Path) -> None:
    import nbformat

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with appearing(path) as part:
            nbformat.write(book, part)
    except OSError as e:
        raise Error(f"{path} cannot be written: {e.strerror}.", "Name a notebook somewhere else.") from None
