"""Several machines that `mlx.launch` started with one command. They find one another through mx.distributed; then each
keeps a connection of its own to the first (rank 0), which hands out pictures and gets them back. A collective of MLX
would wait for the slowest machine, and fail or hang in all of them if one of them dies."""

import hmac
import json
import os
import queue
import secrets
import shutil
import signal
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

import mlx.core as mx
from mlx.nn.utils import average_gradients
from mlx.utils import tree_flatten, tree_map, tree_map_with_path
from PIL import Image

from . import __version__, foreign
from .errors import Error
from .request import MAX_EDGE, MAX_HIRES, Request

_MEET = 120  # seconds in which all machines must have found one another
_AGAIN = "Start it again: the run continues."
_GRACE = 10  # seconds after which a collective ends that waits for a machine that has gone
_WORD = 16  # bytes of the password of a run
_MOST_TEXT, _MOST_BODY = 2**20, 3 * (MAX_EDGE * MAX_HIRES) ** 2  # bytes of a message's two parts
_HEAD = struct.Struct(">IQ")


class Lost(Exception):
    """The other end of a connection has gone."""


class Drawn(NamedTuple):
    """A picture that another machine has drawn."""

    image: Image.Image
    rank: int
    seconds: float
    peak_bytes: int
    reused: int  # steps that took over the work of earlier ones


def started() -> bool:
    """Whether this process is one of several that `mlx.launch` started. This initialises nothing."""
    if "MLX_RANK" not in os.environ:
        return False
    if os.environ.get("MLX_WORLD_SIZE", "1") != "1":
        raise Error("mlx.launch started this with NCCL.", "Give mlx.launch `--backend ring`.")
    return _first() is not None


@contextmanager
def joined() -> Iterator["Machines | None"]:
    """The machines of this run; None if it is alone."""
    if not started():
        yield None
        return
    with join() as machines:
        yield machines


def join() -> "Machines":
    """Meet the other machines. Call this before anything that can fail on one of them."""
    late = threading.Timer(_MEET, _give_up, [f"The machines did not find one another within {_MEET} s."])
    late.daemon = True
    late.start()
    address = _first()
    try:
        group = mx.distributed.init(strict=True)
        rank, size = group.rank(), group.size()
        with socket.socket() as door:
            note = [0] * (1 + _WORD)
            if rank == 0:
                door.bind((address, 0))
                door.listen(size)
                note = [door.getsockname()[1], *secrets.token_bytes(_WORD)]
            port, *word = mx.distributed.all_sum(mx.array(note), group=group, stream=mx.cpu).tolist()
            word = bytes(word)
            links = _accept(door, word, size) if rank == 0 else {0: _call(address, port, word, rank)}
    except (OSError, RuntimeError, ValueError) as e:
        fix = "Can they reach one another at the addresses that mlx.launch was given?"
        raise Error(f"The machines did not find one another: {e}.", fix) from None
    finally:
        late.cancel()
    return Machines(rank, size, links, group)


class Link:
    """A connection that carries messages: some JSON, and bytes."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        connection.settimeout(None)

    def send(self, facts: dict, body: bytes = b"") -> None:
        text = json.dumps(facts).encode()
        try:
            self.connection.sendall(_HEAD.pack(len(text), len(body)) + text)
            self.connection.sendall(body)
        except OSError:
            raise Lost from None

    def receive(self) -> tuple[dict, bytes]:
        """The next message. Raises Lost if there will be none, or if it is none of ours."""
        text, body = _HEAD.unpack(self._read(_HEAD.size))
        if text > _MOST_TEXT or body > _MOST_BODY:
            raise Lost
        try:
            facts = json.loads(self._read(text))
        except (ValueError, RecursionError):
            raise Lost from None
        if not isinstance(facts, dict):
            raise Lost
        return facts, self._read(body)

    def _read(self, n: int) -> bytes:
        """So many bytes. Memory is taken as they come, not as they are announced."""
        data = bytearray()
        while len(data) < n:
            try:
                part = self.connection.recv(min(n - len(data), 2**20))
            except OSError:
                raise Lost from None
            if not part:
                raise Lost
            data += part
        return bytes(data)

    def close(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()


class Machines:
    """Those of a run, for one of them. links: of rank 0, its connections to the others by their ranks; of another, its
    connection to rank 0. As a context, it ends the others when rank 0 ends, for whatever reason."""

    def __init__(self, rank: int, size: int, links: dict[int, Link], group: mx.distributed.Group):
        self.rank, self.size, self.links, self.group = rank, size, links, group
        self.problems: list[str] = []  # of other machines, for people
        self.ending = False  # whether someone asked this run to end after the pictures at hand
        self._lock = threading.Lock()
        self._waiting, self._collectives = False, 0  # whether in a collective of MLX; how many there were
        self._failed = False
        self.scratch: str | None = None  # a folder to remove when rank 0 ends this process
        self._told: queue.SimpleQueue = queue.SimpleQueue()  # what rank 0 said

    def __enter__(self) -> "Machines":
        self._before = {s: signal.signal(s, self._end) for s in (signal.SIGTERM, signal.SIGHUP)}
        if self.rank:
            threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, kind, error, _) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        for link in self.links.values():
            with suppress(Lost):
                link.send({"error": str(error)} if self.rank and isinstance(error, Error) else {"end": True})
        self._failed = kind is not None
        if self.rank and (kind is None or isinstance(error, Error)):
            threading.Event().wait()  # until rank 0 ends this process
        for link in self.links.values():
            link.close()

    def _end(self, *_) -> None:
        """mlx.launch sends SIGTERM to all machines as soon as one has failed. What they draw now would be lost."""
        self.ending = True

    # --- rank 0

    def greet(self, facts: dict) -> None:
        """Tell the others what they need to begin with."""
        for link in self.links.values():
            with suppress(Lost):  # this is told when a picture is handed out
                link.send({"version": __version__} | facts)

    def share(
        self,
        requests: list[Request],
        draw: Callable[[Request, Callable[[], None]], None],
        keep: Callable[[Request, Drawn], None],
    ) -> list[Request]:
        """Draw pictures, of one seed each, here and on the other machines, each on the first that is free. draw: draws
        one here, and calls what it is given now and then. keep: takes one that another machine drew. Returns those
        that are missing. A picture is handed out only once: what was too much for one machine may be so for others."""
        todo, arrived = deque(requests), queue.SimpleQueue()
        missing, own, received = [], 0, 0

        def take() -> Request | None:
            with self._lock:
                return None if self.ending or not todo else todo.popleft()

        def collect(wait: bool) -> None:
            nonlocal received
            while received < len(requests) - own - len(todo):
                try:
                    request, drawn = arrived.get(wait)
                except queue.Empty:
                    return
                received += 1
                if drawn is None:
                    missing.append(request)
                else:
                    keep(request, drawn)

        for rank, link in self.links.items():
            threading.Thread(target=self._hand_out, args=(rank, link, take, arrived.put), daemon=True).start()
        while (request := take()) is not None:
            own += 1
            draw(request, lambda: collect(False))
            collect(False)
        collect(True)
        return missing + list(todo)

    def _hand_out(self, rank: int, link: Link, take: Callable, put: Callable) -> None:
        """Hand one picture after the other to a machine, until there is none or the machine fails."""
        request = None
        try:
            self._ready(link)
            while (request := take()) is not None:
                link.send({"draw": request.to_json()})
                put((request, _received(rank, *link.receive())))
        except (Lost, Error) as e:
            self.problems.append(f"rank {rank} {'has gone' if isinstance(e, Lost) else f'failed: {e}'}")
            if request is not None:
                put((request, None))

    def _ready(self, link: Link) -> None:
        facts, _ = link.receive()
        if "ready" not in facts:
            raise Error(str(facts.get("error", "it cannot be understood")))

    # --- the others

    def greeted(self) -> dict:
        """What `greet` told."""
        told = self._told.get()
        if told["version"] != __version__:
            problem = f"It has mlxdiff {__version__}, the first machine has {told['version']}."
            raise Error(problem, "Install the same version on all.")
        return told

    def _listen(self) -> NoReturn:
        """The thread that waits for what rank 0 says. It uses no MLX."""
        lost = False
        try:
            while "end" not in (message := self.links[0].receive()[0]):
                self._told.put(message)
        except Lost:
            lost = True
        if self.scratch is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)
        if lost and not self._failed:
            _give_up("The first machine has gone.")
        os._exit(1 if lost else 0)

    def follow(self, draw: Callable[[Request], tuple[Image.Image, dict]]) -> NoReturn:
        """Draw what rank 0 hands out, until it ends this process. draw: returns the picture and facts about it."""
        link = self.links[0]
        with suppress(Lost):  # then the other thread ends the process
            link.send({"ready": True})
            while not self.ending:
                message = self._told.get()
                image, facts = draw(Request.from_json(message["draw"]))
                link.send({"size": image.size} | facts, image.convert("RGB").tobytes())

    # --- a training, in which all machines wait for one another

    def watch(self) -> None:
        """Let rank 0 notice what goes wrong on the others while it waits in a collective of MLX."""
        for rank, link in self.links.items():
            threading.Thread(target=self._watch, args=(rank, link), daemon=True).start()

    def _watch(self, rank: int, link: Link) -> None:
        try:
            facts, _ = link.receive()
            if "error" not in facts:
                return  # it is done
            problem = f"rank {rank} failed: {facts['error']}"
        except Lost:
            problem = f"rank {rank} has gone"
        self.problems.append(problem)
        while True:  # MLX's ring tells the neighbours of a machine, and not even those if its cable was pulled
            before = self._collectives
            time.sleep(_GRACE)
            if self._waiting and self._collectives == before:
                _give_up(f"{problem}. {_AGAIN}")

    def same(self, tree):
        """The arrays of rank 0, on all machines."""
        with self._together():
            sent = tree if self.rank == 0 else tree_map(mx.zeros_like, tree)
            told = tree_map(lambda x: mx.distributed.all_sum(x, group=self.group), sent)
            mx.eval(told)
        return told

    def mean(self, tree):
        """The mean of all machines' arrays."""
        mx.eval(tree)
        with self._together():
            told = dict(tree_flatten(average_gradients(tree, self.group)))
            mx.eval(told)
        return tree_map_with_path(lambda at, _: told[at], tree)  # MLX leaves out a last block that has no parameters

    @contextmanager
    def _together(self) -> Iterator[None]:
        if self.ending:
            raise KeyboardInterrupt
        self._waiting, self._collectives = True, self._collectives + 1
        try:
            yield
        except RuntimeError as e:
            time.sleep(1)  # until `_watch` knows more
            raise Error(f"{'; '.join(self.problems) or f'Another machine has gone: {e}'}.", _AGAIN) from None
        finally:
            self._waiting = False


def _received(rank: int, facts: dict, body: bytes) -> Drawn:
    """A picture that came, checked. Raises an Error for the reason why there is none."""
    if "error" in facts:
        raise Error(str(facts["error"]))
    if "end" in facts:
        raise Lost
    size, seconds, *whole = (facts.get(name) for name in ("size", "seconds", "peak_bytes", "reused"))
    sound = (
        foreign.fits(size, tuple[int, ...]) and foreign.fits(seconds, float) and foreign.fits(whole, tuple[int, ...])
    )
    if not sound or len(size) != 2 or min(size) < 1 or 3 * size[0] * size[1] != len(body) or max(whole) >= 2**63:
        raise Error("It sent something other than a picture.")
    return Drawn(Image.frombytes("RGB", tuple(size), body), rank, seconds, *whole)


def _first() -> str | None:
    """The address of rank 0; None if this process was started alone."""
    if "MLX_JACCL_COORDINATOR" in os.environ:
        return os.environ["MLX_JACCL_COORDINATOR"].rpartition(":")[0]
    file = os.environ.get("MLX_HOSTFILE")
    try:
        text = Path(file).read_text() if file else ""
        hosts = json.loads(text) if text.strip() else []
        return hosts[0][0].rpartition(":")[0] if len(hosts) > 1 else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        fix = "mlx.launch writes such a file; start this with it."
        raise Error(f"MLX_HOSTFILE {file} is no list of machines.", fix) from None


def _accept(door: socket.socket, word: bytes, size: int) -> dict[int, Link]:
    """Connections of all other machines, which know the word. Nobody else is let in."""
    links = {}
    while len(links) < size - 1:
        connection, _ = door.accept()
        connection.settimeout(5)
        note = b""
        with suppress(OSError):
            while len(note) < _WORD + 4 and (part := connection.recv(_WORD + 4 - len(note))):
                note += part
        rank = int.from_bytes(note[_WORD:], "big")
        if hmac.compare_digest(note[:_WORD], word) and 0 < rank < size and rank not in links:
            links[rank] = Link(_watched(connection))
        else:
            connection.close()
    return links


def _call(address: str, port: int, word: bytes, rank: int) -> Link:
    connection = socket.create_connection((address, port), timeout=_MEET)
    connection.sendall(word + rank.to_bytes(4, "big"))
    return Link(_watched(connection))


def _watched(connection: socket.socket) -> socket.socket:
    """A connection that ends by itself if the other machine was unplugged: it is asked after 10 s of
    silence and every 5 s, as often as the system says (nine times on Linux)."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", None))  # Linux, macOS
    for option, value in ((idle, 10), (getattr(socket, "TCP_KEEPINTVL", None), 5)):
        if option is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
    return connection


def _give_up(why: str) -> NoReturn:
    """End this process, whatever its other threads are waiting for."""
    print(f"mlxdiff: {foreign.shown(' '.join(why.split()))}", file=sys.stderr, flush=True)
    os._exit(1)
