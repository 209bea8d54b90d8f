"""Serves one studio as a page to a browser on this machine, without Jupyter.

The page gets the state of every widget through one socket, and sends what a person does with them; it can run no code.
The studio lives in this process, so a reloaded page shows what it showed before. Only who knows the token of this run
gets an answer: it is in the printed address, and then in a cookie."""

import asyncio
import hmac
import json
import secrets
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from pathlib import Path

import comm
from comm.base_comm import BaseComm
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, HTTPError, RequestHandler
from tornado.websocket import WebSocketClosedError, WebSocketHandler

_HERE = Path(__file__).parent
_FILES = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
_FILES |= {f"{name}.css": "text/css" for name in ("theme", "studio", "painting")}
_FILES |= {f"{name}.js": "text/javascript" for name in ("studio", "painting", "zoom")}
_POLICY = "; ".join(
    (
        "default-src 'none'",  # the page takes nothing from elsewhere, and no other page may frame it
        "script-src 'self'",
        "style-src 'self' 'unsafe-inline'",  # widgets set their own sizes
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    )
)
_MOST_PARTS = 16  # of a message; the page sends one at most
_NOT_YOURS = "Open the address that `mlxdiff studio` printed when it started."


def serve(make: Callable[[], object], tell: Callable[[str], None]) -> None:
    """Serve the studio that `make` returns until this process is interrupted. `tell` gets the page's address."""
    asyncio.run(_serve(make, tell))


async def _serve(make: Callable[[], object], tell: Callable[[str], None]) -> None:
    wire, token = Wire(), secrets.token_hex(16)
    sockets = bind_sockets(0, "127.0.0.1")
    port = sockets[0].getsockname()[1]
    facts = {"token": token, "port": port}
    routes = [(r"/(\w+\.\w+)?", _Page, facts), (r"/wire", _Socket, facts | {"wire": wire})]
    HTTPServer(Application(routes, log_function=lambda handler: None)).add_sockets(sockets)
    comm.create_comm = partial(_Comm, wire)
    wire.studio = make()
    tell(f"http://127.0.0.1:{port}/?token={token}")
    await asyncio.Event().wait()


class Wire:
    """The messages between the widgets and the pages that show them."""

    def __init__(self):
        self.studio = None
        self.pages: set[_Socket] = set()
        self._loop = asyncio.get_running_loop()
        self._only: ContextVar[_Socket | None] = ContextVar("only", default=None)
        self._from: ContextVar[_Socket | None] = ContextVar("from", default=None)

    def post(self, head: dict, buffers: list) -> None:
        """Send a message to all pages. This may be called on any thread."""
        only, sender = self._only.get(), self._from.get()
        if head["data"].get("method") != "echo_update":  # an echo is for the pages that did not send it
            sender = None
        text, parts = json.dumps(head | {"buffers": len(buffers)}), [bytes(b) for b in buffers]
        with suppress(RuntimeError):  # the server has ended, the worker's thread not yet
            self._loop.call_soon_threadsafe(self._post, text, parts, only, sender)

    def _post(self, text: str, parts: list[bytes], only: "_Socket | None", sender: "_Socket | None") -> None:
        for page in [*self.pages] if only is None else [only]:
            if page is not sender:
                page.send(text, parts)

    def join(self, page: "_Socket") -> None:
        """Tell a new page the state of every widget, and which of them is the studio."""
        self.pages.add(page)
        token = self._only.set(page)
        try:
            for each in list(comm.get_comm_manager().comms.values()):
                each.handle_msg({"content": {"data": {"method": "request_state"}}, "buffers": []})
            self.post({"id": self.studio.model_id, "data": {"method": "show"}}, [])
        finally:
            self._only.reset(token)

    def take(self, page: "_Socket", head: dict, buffers: list[bytes]) -> None:
        """Pass a page's message to its widget."""
        known = comm.get_comm_manager().comms.get(head["id"])
        if known is None:  # the widget has gone since the page sent this
            return
        token = self._from.set(page)
        try:
            known.handle_msg({"content": {"data": head["data"]}, "buffers": buffers})
        finally:
            self._from.reset(token)


class _Comm(BaseComm):
    """What ipywidgets sends its messages through."""

    def __init__(self, wire: Wire, **facts):
        self._wire = wire
        super().__init__(**facts)

    def publish_msg(self, msg_type: str, data=None, metadata=None, buffers=None, **_) -> None:
        method = {"comm_open": "update", "comm_close": "close"}.get(msg_type)
        data = (data or {}) | ({} if method is None else {"method": method})
        self._wire.post({"id": self.comm_id, "data": data}, buffers or [])


class _Guarded(RequestHandler):
    """Answers only this machine's own addresses, and only who knows the token."""

    def initialize(self, token: str, port: int) -> None:
        self.token, self.port, self.cookie = token, port, f"mlxdiff-{port}"  # cookies are shared by all ports

    def prepare(self) -> None:
        if self.request.host not in (f"127.0.0.1:{self.port}", f"localhost:{self.port}"):
            raise HTTPError(403)  # another site's name that was made to lead here
        if not self._is_token(self.get_cookie(self.cookie, "")) and not self._is_token(self.get_argument("token", "")):
            raise HTTPError(403)

    def _is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(), self.token.encode())

    def write_error(self, status_code: int, **_) -> None:
        self.set_header("Content-Type", "text/plain")
        self.finish(_NOT_YOURS if status_code == 403 else "There is nothing here.")

    def log_exception(self, kind, value, trace) -> None:
        if not isinstance(value, HTTPError):
            super().log_exception(kind, value, trace)


class _Page(_Guarded):
    def set_default_headers(self) -> None:
        headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
        for name, value in (headers | {"X-Content-Type-Options": "nosniff"}).items():
            self.set_header(name, value)

    def get(self, name: str | None) -> None:
        if self.get_argument("token", None) is not None:  # it leaves the address, and so the browser's history
            self.set_cookie(self.cookie, self.token, httponly=True, samesite="Lax")
            return self.redirect("/")
        name = name or "page.html"
        if name not in _FILES:
            raise HTTPError(404)
        self.set_header("Content-Type", f"{_FILES[name]}; charset=utf-8")
        return self.finish((_HERE / name).read_bytes())


class _Socket(WebSocketHandler, _Guarded):
    """A page's connection. A message is JSON, then as many binary ones as it says."""

    def initialize(self, wire: Wire, **facts) -> None:
        super().initialize(**facts)
        self.wire, self._head, self._parts = wire, {}, []

    def open(self) -> None:
        self.set_nodelay(True)
        self.wire.join(self)

    def on_close(self) -> None:
        self.wire.pages.discard(self)

    def send(self, text: str, parts: list[bytes]) -> None:
        with suppress(WebSocketClosedError):
            for part in (text, *parts):
                sent = self.write_message(part, binary=isinstance(part, bytes))
                sent.add_done_callback(lambda task: task.exception())  # else asyncio complains of a page that has gone

    def on_message(self, message: str | bytes) -> None:
        if isinstance(message, str):
            self._head, self._parts = read_head(message), []
        elif self._head:
            self._parts.append(message)
        if not self._head:
            self.close(1008, "This is no message of the studio's page.")
        elif len(self._parts) == self._head["buffers"]:
            try:
                self.wire.take(self, self._head, self._parts)
            except Exception:  # of a widget: the page stays connected, as in Jupyter
                traceback.print_exc(file=sys.stderr)


def read_head(text: str) -> dict:
    """The JSON of a message; empty if no page of ours sends such a one."""
    try:
        head = json.loads(text)
    except (ValueError, RecursionError):  # a number of 5000 digits, deep nesting
        return {}
    kinds = {"id": str, "data": dict, "buffers": int}
    sound = isinstance(head, dict) and all(type(head.get(name)) is kind for name, kind in kinds.items())
    return head if sound and 0 <= head["buffers"] <= _MOST_PARTS else {}
