"""Fetches files of a hub repository with huggingface_hub into its ordinary cache (HF_HOME, HF_ENDPOINT and HF_TOKEN
work). An interrupted file continues where it stopped, also in a later process. Every failure becomes an Error with a
fix."""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import huggingface_hub as hf
from huggingface_hub import constants, errors
from huggingface_hub.utils import (
    WeakFileLock,
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    get_session,
    hf_raise_for_status,
    logging,
    validate_repo_id,
)

from ..errors import Error
from ..foreign import MOST

Progress = Callable[[str, int, int], None]
_TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
FOLDERS = ("scheduler", *_TEXT, "unet", "transformer", "vae")
# model.fp16.safetensors, model.fp16-00001-of-00002.safetensors and the index model.safetensors.index.fp16.json
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_)?model(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?\.safetensors"
    r"(?:\.index(?:\.(?P<shards_of>\w+))?\.json)?"
)
_PLAIN = re.compile(r"\w[\w.-]{0,127}")  # commits and ETags, which become names in the cache
_PIECE = 2**16  # bytes of an answer that are taken together
_TRIES = 3  # in a row to get more of a file
_NO_RANGE = 416  # how a server refuses to send the rest of a file
_SHA256 = re.compile(r"[0-9a-f]{64}")  # the hub's ETag of every large file


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids the network."""
    return constants.HF_HUB_OFFLINE


def listing(repo: str, revision: str) -> tuple[str, dict[str, int]]:
    """The commit that a revision stands for now, and its files with their sizes. This takes one request."""
    with _explained(repo, revision):
        validate_repo_id(repo)
        url = f"{constants.ENDPOINT}/api/models/{repo}/revision/{quote(revision, safe='')}?blobs=true"
        with _opened(url, constants.HF_HUB_ETAG_TIMEOUT, {}) as (_, pieces):
            answer = _bounded(pieces)
        try:
            if len(answer) > MOST:
                raise _strange(repo, f"more than {MOST:,} bytes")
            info = json.loads(answer)
            commit, files = info["sha"], {file["rfilename"]: file.get("size") for file in info["siblings"]}
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):  # a web page, other or deep JSON
            raise _strange(repo, "no list of files") from None
    if not isinstance(commit, str) or not _PLAIN.fullmatch(commit):
        raise _strange(repo, f"the commit {commit!r:.60}")
    for name, size in files.items():
        if not _is_name(name):
            raise _strange(repo, f"a file {name!r:.60}")
        if type(size) is not int or size < 0:
            raise _strange(repo, f"no size of {name!r:.60}")
    return commit, files


def _is_name(name: object) -> bool:
    """Whether a repository's file can have this name, on any file system."""
    plain = isinstance(name, str) and name.isprintable() and "\\" not in name
    return plain and not {"", ".", ".."} & {*name.split("/")}


@contextmanager
def _opened(url: str, patience: float, headers: dict[str, str]) -> Iterator[tuple[int, Iterator[bytes]]]:
    """The status of what the hub answers, and its bytes, piece by piece: huggingface_hub would take whatever comes,
    wait as long as it is told to, and print warnings. patience: seconds in which something must arrive."""
    session, how = get_session(), {"headers": build_hf_headers() | headers, "timeout": patience}
    is_httpx = callable(session.stream)  # in requests it is a flag
    with session.stream("GET", url, **how) if is_httpx else session.get(url, stream=True, **how) as response:
        pieces = response.iter_bytes(_PIECE) if is_httpx else response.iter_content(_PIECE)
        if response.status_code >= 400:
            response._content = _bounded(pieces)  # where both libraries keep a body that was read
        hf_raise_for_status(response)
        yield response.status_code, pieces


def _bounded(pieces: Iterator[bytes]) -> bytes:
    """What arrives, without its end if it is longer than any list of files."""
    got = bytearray()
    for piece in pieces:
        got += piece
        if len(got) > MOST:
            break
    return bytes(got)


def held(repo: str, revision: str) -> tuple[str, dict[str, int]]:
    """The same as `listing`, but from the hub's cache alone."""
    ref = _folder(repo) / "refs" / revision
    commit = ref.read_bytes().decode("ascii", "replace").strip() if ref.is_file() else revision
    folder = _folder(repo) / "snapshots" / commit
    if not _PLAIN.fullmatch(commit) or not folder.is_dir():  # after a crash a ref can be empty
        raise _absent(repo)
    return commit, {f.relative_to(folder).as_posix(): f.stat().st_size for f in folder.rglob("*") if f.is_file()}


def select(repo: str, names: dict[str, int], half: bool, file: str | None, t5: bool = True) -> list[str]:
    """The files of a repository that are needed: settings, tokenizers and one safetensors variant of each network.
    Without `t5` this excludes SD3's third text encoder."""
    single = sorted(n for n in names if "/" not in n and n.endswith((".safetensors", ".gguf")))
    if file is not None or "model_index.json" not in names:
        if file in names:
            return [file]
        choices = f"Choose one: {', '.join(f'{repo}/{n}' for n in single)}." if single else "Use another repository."
        what = "is not a model in diffusers layout (no model_index.json)" if file is None else f"has no file {file}"
        raise Error(f"{repo} {what}.", choices)
    if not t5 and not any(n.startswith("text_encoder_3/") for n in names):
        raise Error(f"{repo} has no T5 to leave out.", "Leave out `t5=False`.")
    chosen = ["model_index.json"]
    for folder in FOLDERS if t5 else [f for f in FOLDERS if not f.endswith("_3")]:
        inside = [n for n in names if n.startswith(f"{folder}/") and n.count("/") == 1]
        chosen += [n for n in inside if n.endswith((".json", ".txt", ".model")) and ".index." not in n]
        chosen += _variant(repo, folder, inside, half)
    return chosen


def select_network(repo: str, names: dict[str, int], half: bool) -> list[str]:
    """The files of a repository that holds one network: its weights and, last, its config.json."""
    top = [n for n in names if "/" not in n]
    chosen = _variant(repo, "its weights", top, half)
    if not chosen:
        single = sorted(n for n in names if n.endswith(".safetensors"))
        choices = (
            f"Choose one: {', '.join(f'{repo}/{n}' for n in single[:8])}." if single else "Use another repository."
        )
        raise Error(f"{repo} is not a network in diffusers layout.", choices)
    return [*chosen, *(n for n in top if n == "config.json")]


def select_folder(repo: str, folder: str, names: dict[str, int], half: bool) -> list[str]:
    """The files of one network in a folder of a repository: its settings and one safetensors variant."""
    inside = [n for n in names if n.rpartition("/")[0] == folder]
    return [n for n in inside if n == f"{folder}/config.json"] + _variant(repo, folder, inside, half)


def _variant(repo: str, folder: str, inside: list[str], half: bool) -> list[str]:
    """The fp16 files if half precision is enough and they exist, else the plain weights; never pickles."""
    variants: dict[str | None, list[str]] = {}
    for name in inside:
        match = _WEIGHTS.fullmatch(name.rpartition("/")[2])
        if match is not None:
            variants.setdefault(match["variant"] or match["shards_of"], []).append(name)
    order = ("fp16", None) if half else (None, "fp16")
    for variant in order:
        if any(n.endswith(".safetensors") for n in variants.get(variant, [])):
            return variants[variant]
    if any(n.endswith((".bin", ".ckpt", ".pt")) for n in inside):
        raise Error(
            f"{repo} has {folder} only as a pickle, which can run any code when it is opened; it is not read.",
            "Use a repository that has .safetensors files.",
        )
    return []


def download(repo: str, revision: str, commit: str, files: dict[str, int], progress: Progress) -> Path:
    """The folder of the snapshot, after all `files` (name -> bytes) are in it."""
    folder = _folder(repo) / "snapshots" / commit
    missing = {name: size for name, size in files.items() if not (folder / name).exists()}
    total = sum(files.values())
    done = total - sum(missing.values())
    progress("download", done, total)
    with _explained(repo, revision), _quiet():
        for name, size in missing.items():
            _fetch(repo, commit, name, size, lambda n, before=done: progress("download", before + n, total))
            # The bytes are here: this only links them into the snapshot, and stores the commit of the revision.
            path = hf.hf_hub_download(repo, name, revision=revision)
            if not Path(path).is_relative_to(folder):
                raise Error(f"{repo} changed while it was being downloaded.", "Run the same command again.")
            done += size
    progress("download", total, total)
    return folder


def snapshots(pattern: str, repo: str = "*") -> list[Path]:
    """The paths that match a pattern, in one repository of the hub's cache, or in all of them."""
    return sorted(Path(constants.HF_HUB_CACHE).glob(f"{_folder(repo).name}/snapshots/*/{pattern}"))


def _folder(repo: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def _fetch(repo: str, commit: str, name: str, size: int, watch: Callable[[int], None]) -> None:
    """Download one file into the cache's blobs. huggingface_hub 2 restarts a file in each process; this continues
    it."""
    url = hf.hf_hub_url(repo, name, revision=commit, endpoint=constants.ENDPOINT)
    meta = hf.get_hf_file_metadata(url)
    etag, size = meta.etag, size if meta.size is None else meta.size
    if etag is None or not _PLAIN.fullmatch(etag):  # it becomes a file's name
        raise _strange(repo, f"the ETag {etag!r:.60} for {name}")
    blob = _folder(repo) / "blobs" / etag
    part = blob.with_name(f"{etag}.incomplete")
    lock = Path(constants.HF_HUB_CACHE, ".locks", _folder(repo).name, f"{etag}.lock")
    for path in (blob, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return
        have = part.stat().st_size if part.exists() else 0
        if have > size or not _SHA256.fullmatch(etag):  # continue only if the result can be checked
            part.unlink(missing_ok=True)
            have = 0
        if shutil.disk_usage(blob.parent).free < size - have:
            raise _full(repo, f"; {name} needs {(size - have) / 1e9:.2f} GB")
        try:
            _get_all(url, part, size, watch)
            # What arrives may be damaged, and after a crash a file can be longer than the data that reached the disk.
            why = "its SHA-256 is not the one listed" if _SHA256.fullmatch(etag) and _sha256(part) != etag else None
        except _Longer:
            why = f"it has more than the {size} bytes that were listed"
        if why is not None:
            part.unlink()
            problem = f"{name} of {repo} was damaged during the download: {why}; it was deleted."
            raise Error(problem, "Run the same command again.")
        os.replace(part, blob)


class _Longer(Exception):
    """More arrives than a file has. It may have no end."""


def _get_all(url: str, part: Path, size: int, watch: Callable[[int], None]) -> None:
    """Get the rest of a file. A connection that ends is opened again, as long as something arrives now and then."""
    with _Watched(part, size, watch) as file:
        tries = _TRIES
        while True:
            have = file.tell()
            try:
                return _get(url, file, have)
            except errors.HfHubHTTPError as e:
                if not have or e.response.status_code != _NO_RANGE:
                    raise
                file.begin_again()  # else every later run would be refused the same
            except _transport():
                tries = tries - 1 if file.tell() == have else _TRIES
                if not tries:
                    raise
                time.sleep(1)


def _get(url: str, file: "_Watched", have: int) -> None:
    if have == file.size:
        return
    headers = {"Accept-Encoding": "identity"}  # a compressed range would be other bytes
    if have:
        headers["Range"] = f"bytes={have}-"
    with _opened(url, constants.HF_HUB_DOWNLOAD_TIMEOUT, headers) as (status, pieces):
        if have and status == 200:  # the server ignores ranges
            file.begin_again()
        for piece in pieces:
            file.write(piece)
    if file.tell() < file.size:
        raise OSError(f"a file of {file.size} bytes ended after {file.tell()}")


class _Watched(io.BufferedWriter):
    """A file opened for appending that reports its length after each write. size: the most that it takes."""

    def __init__(self, path: Path, size: int, watch: Callable[[int], None]):
        super().__init__(io.FileIO(path, "a"))
        self.size, self.watch = size, watch
        self.seek(0, os.SEEK_END)

    def write(self, data: bytes) -> int:
        if self.tell() + len(data) > self.size:
            raise _Longer
        written = super().write(data)
        self.watch(self.tell())
        return written

    def begin_again(self) -> None:
        self.seek(0)
        self.truncate()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide huggingface_hub's bars and warnings: the caller shows the progress, and an Error says what went wrong."""
    were_off, said = are_progress_bars_disabled(), logging.get_verbosity()
    disable_progress_bars()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(said)
        if not were_off:
            enable_progress_bars()


def _transport() -> tuple[type[Exception], ...]:
    """The exceptions of the HTTP library; which one it is depends on huggingface_hub (requests, httpx or httpx2)."""
    names = {"requests": "RequestException", "httpx": "HTTPError", "httpx2": "HTTPError"}
    return tuple(getattr(sys.modules[module], name) for module, name in names.items() if module in sys.modules)


@contextmanager
def _explained(repo: str, revision: str) -> Iterator[None]:
    site = constants.ENDPOINT
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    try:
        yield
    except errors.GatedRepoError:
        raise Error(
            f"{repo} is gated: you must accept its licence.", f"Accept it at {site}/{repo}, then {log_in}."
        ) from None
    except errors.RevisionNotFoundError:
        raise Error(f"{repo} has no revision {revision!r}.", "Name a branch, a tag or a commit that it has.") from None
    except errors.RepositoryNotFoundError:
        raise Error(
            f"There is neither a folder {repo} here, nor a repository of that name at {site} that you may read.",
            f"Check the spelling; if it is private, {log_in}.",
        ) from None
    except errors.HFValidationError as e:
        raise Error(f"{repo!r} is not a hub id: {e}.", "Hub ids look like some-org/some-repo.") from None
    except errors.OfflineModeIsEnabled:
        raise _absent(repo) from None
    except errors.LocalEntryNotFoundError as e:  # hf_hub_download raises this if the network fails
        raise _no_connection(site, e) from None
    except errors.EntryNotFoundError as e:
        raise Error(f"{repo} lacks a file that it lists: {e}.", "Run again; if it stays, use another model.") from None
    except errors.HfHubHTTPError as e:
        status = e.response.status_code
        if status in (401, 403):
            raise Error(f"{site} refused access to {repo} ({status}).", f"Renew your token: {log_in}.") from None
        raise Error(f"{site} answered {status} for {repo}.", "Try again later; what was downloaded is kept.") from None
    except _transport() as e:
        raise _no_connection(site, e) from None
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(repo) from None
        raise Error(f"Downloading {repo} failed: {e}.", "Run again: it goes on where it stopped.") from None
    except (AttributeError, KeyError, TypeError, ValueError) as e:  # headers or bodies that huggingface_hub trips over
        raise _strange(repo, f"what cannot be read ({str(e)[:200]})") from e


def _strange(repo: str, what: str) -> Error:
    problem = f"{constants.ENDPOINT} answered with {what} for {repo}, which no hub does."
    return Error(problem, "Check HF_ENDPOINT, and whether a network login page stands in between.")


def _full(repo: str, wants: str = "") -> Error:
    free = shutil.disk_usage(constants.HF_HUB_CACHE).free / 1e9
    return Error(
        f"The disk is full: {constants.HF_HUB_CACHE} has {free:.2f} GB free for {repo}{wants}.",
        "Free some space, or let HF_HOME point to a larger disk.",
    )


def _no_connection(site: str, e: Exception) -> Error:
    return Error(
        f"The connection to {site} failed ({type(e).__name__}).",
        "Check the connection and run again: it goes on where it stopped. `offline=True` uses what is already here.",
    )


def _absent(repo: str) -> Error:
    return Error(
        f"{repo} is not on this machine, and the network may not be used.",
        "Run once without `offline`, and without HF_HUB_OFFLINE.",
    )
