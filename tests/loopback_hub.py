"""A hub on the loopback interface: what huggingface_hub asks of the real one (model info, HEAD and ranged GET of files,
large files redirected to another host), with repositories made in the test and faults on demand."""

import hashlib
import json
import random
import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c0ffee" + "0" * 34


def noise(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


def diffusers_repo(size: int = 300_000) -> dict[str, bytes]:
    """Shaped like the published ones: two variants, one of them in shards, pickles and folders that are not needed."""
    return {
        "model_index.json": b'{"_class_name": "StableDiffusionPipeline"}',
        "README.md": b"#",
        "v1-5-pruned.safetensors": noise(1000, 0),
        "scheduler/scheduler_config.json": b"{}",
        "tokenizer/vocab.json": b"{}",
        "tokenizer/merges.txt": b"#version: 0.2\n",
        "safety_checker/model.safetensors": noise(1000, 1),
        "text_encoder/config.json": b"{}",
        "text_encoder/model.safetensors": noise(5000, 2),
        "text_encoder/model.fp16.safetensors": noise(2500, 3),
        "text_encoder/pytorch_model.bin": noise(5000, 4),
        "unet/config.json": b"{}",
        "unet/diffusion_pytorch_model.safetensors.index.json": b'{"weight_map": {}}',
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors": noise(size, 5),
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors": noise(size, 6),
        "unet/diffusion_pytorch_model.fp16.safetensors": noise(size, 7),
        "unet/diffusion_pytorch_model.non_ema.safetensors": noise(1000, 8),
        "vae/config.json": b"{}",
        "vae/diffusion_pytorch_model.safetensors": noise(4000, 9),
    }


@dataclass
class Repo:
    files: dict[str, bytes]
    commit: str = COMMIT
    older: tuple[str, ...] = ()  # commits that can still be read
    gated: bool = False
    status: int | None = None  # answered to everything, e.g. 503
    cut: dict[str, int] = field(default_factory=dict)  # file -> bytes after which the connection is dropped, once
    held: dict[str, int] = field(default_factory=dict)  # file -> bytes after which the server waits for `release`
    instead: dict[str, bytes] = field(default_factory=dict)  # file -> bytes that are sent in its place, once
    info: bytes | None = None  # sent in place of the list of files
    silent: bool = False  # the list of files is never sent
    ranges: str = "sent"  # "ignored": the whole file comes instead; "refused": an error
    reset: dict[str, int] = field(default_factory=dict)  # file -> bytes after which the connection is reset, once
    busy: str | None = None  # this file is not sent, but in an hour
    etag: str | None = None  # of every file; "" for none


class Hub:
    """`with Hub() as hub`: hub.repos["org/name"] = Repo({...}); hub.log is (method, path, range) of each request."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.log: list[tuple[str, str, str | None]] = []
        self.reached = threading.Event()  # a held file has got as far as it will
        self.release = threading.Event()
        self.closed = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.release.set()
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()

    def gets(self, repo: str, name: str) -> list[str | None]:
        """The ranges in which a large file's bytes were asked for, None for a whole file."""
        return [
            s for method, path, s in self.log if method == "GET" and path.startswith(f"/cdn/{repo}/") and name in path
        ]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.hub.log.append((self.command, self.path, self.headers["Range"]))
        parts = self.path.partition("?")[0].strip("/").split("/")
        on_cdn, api = parts[0] == "cdn", parts[:2] == ["api", "models"]
        if on_cdn:
            # A signed address takes no login: the real one refuses a request that carries one.
            if "Authorization" in self.headers:
                return self.refuse(400, "BadRequest")
            parts = parts[1:]
        elif api:
            parts = parts[2:]
        repo = self.hub.repos.get("/".join(parts[:2]))
        if repo is None:
            return self.refuse(401, "RepoNotFound")
        if repo.status is not None:
            return self.refuse(repo.status, "")
        revision, name = parts[3], "/".join(parts[4:])
        if revision not in ("main", repo.commit, *repo.older):
            return self.refuse(404, "RevisionNotFound")
        if api and repo.silent:
            self.hub.closed.wait()
            return None
        if api:
            siblings = [{"rfilename": n, "size": len(b)} for n, b in repo.files.items()]
            info = {"id": "/".join(parts[:2]), "sha": repo.commit, "siblings": siblings}
            text = json.dumps(info).encode() if repo.info is None else repo.info
            return self.send(200, text, {"Content-Type": "application/json"}, body)
        if repo.gated:
            return self.refuse(403 if "Authorization" in self.headers else 401, "GatedRepo")
        if name not in repo.files:
            return self.refuse(404, "EntryNotFound")
        commit = repo.commit if revision == "main" else revision
        return self.file(repo, name, commit, on_cdn, body)

    def file(self, repo: Repo, name: str, commit: str, on_cdn: bool, body: bool) -> None:
        data = repo.files[name]
        digest = hashlib.sha256(data).hexdigest()
        large = name.endswith(".safetensors")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest if large else digest[:40]}"'}
        if repo.etag is not None:
            headers |= {"ETag": f'"{repo.etag}"'} if repo.etag else {}
            headers = headers if repo.etag else {"X-Repo-Commit": commit}
            return self.send(200, data, headers, body)
        if body and name == repo.busy:
            return self.send(429, b"{}", {"Retry-After": "3600", "RateLimit": '"resolvers";r=0;t=3600'}, body)
        if body and (on_cdn or not large):
            data = repo.instead.pop(name, data)
        if large and not on_cdn:
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
            headers["Location"] = f"http://localhost:{self.hub.port}/cdn{self.path}"
            return self.send(302, b"", headers, body)
        status, start = 200, 0
        if self.headers["Range"] and repo.ranges == "refused":
            return self.refuse(416, "")
        if self.headers["Range"] and repo.ranges == "sent":
            start = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0])
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(data) - 1}/{len(data)}"
        stop = repo.cut.pop(name, None) if body else None
        if stop is not None:
            self.send(status, data[start:], headers, False)
            self.wfile.write(data[start:stop])
            self.close_connection = True
            return None
        stop = repo.reset.pop(name, None) if body else None
        if stop is not None:
            self.send(status, data[start:], headers, False)
            self.wfile.write(data[start:stop])
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return None
        if body and name in repo.held:
            pause = repo.held[name]
            self.send(status, data[start:], headers, False)
            self.wfile.write(data[start:pause])
            self.wfile.flush()
            self.hub.reached.set()
            self.hub.release.wait()
            with suppress(ConnectionError):  # whoever asked may be dead by now
                self.wfile.write(data[pause:])
            return None
        return self.send(status, data[start:], headers, body)

    def refuse(self, status: int, code: str) -> None:
        self.send(status, b"{}", {"X-Error-Code": code, "Content-Type": "application/json"}, self.command != "HEAD")

    def send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)
