"""The cache of converted models, in $MLXDIFF_CACHE, else in the user's cache folder: models/<name>-<recipe>-<key>. A
conversion is either whole or absent, even if the process that makes it is killed."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .. import description, foreign
from ..errors import Error
from ..recipe import Recipe
from ..whole import appearing

# Matches the folder of a conversion, and the scratch folder of an unfinished one.
_OURS = re.compile(r"(.+-[0-9a-f]{12})(\.\w+\.part)?")


def root() -> Path:
    """$MLXDIFF_CACHE, else the system's folder for files that programs can make again."""
    named = os.environ.get("MLXDIFF_CACHE")
    if named:
        return foreign.path(named)
    try:
        home = Path.home()
    except RuntimeError:
        raise Error(
            "This user has no home folder.", "Let MLXDIFF_CACHE point to a folder for converted models."
        ) from None
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "mlxdiff"


def folder(label: str, kind: str, identity: list) -> Path:
    """The folder of a source's conversion, which may not exist yet. `identity` is everything the conversion depends
    on."""
    return root() / "models" / f"{slug(label)}-{kind}-{short(json.dumps(identity))}"


def slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.")[:80]


def short(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:12]


def complete(target: Path) -> bool:
    """Whether a conversion still has all its files, as they were written."""
    try:
        description.read(target)
    except Error:
        return False
    return True


def named(name: str) -> list[Path]:
    """The conversions of a model with this name."""
    folders = sorted(p.parent for p in root().glob("models/*/model.json") if not p.parent.name.endswith(".part"))
    return [p for p in folders if complete(p) and description.read(p).name == name]


@dataclass(frozen=True)
class Entry:
    """A conversion in the cache, or the scratch folder of one."""

    folder: Path
    name: str
    recipe: str  # "" for a scratch folder
    source: str  # a hub id or a path; "" if it was not stored
    size: int  # bytes
    made: float  # seconds since 1970
    useless: str  # why `resolve` will never return it; "" if it may
    busy: bool  # another process is making it


def entries(reachable: Callable[[dict], bool]) -> list[Entry]:
    """The contents of the cache. reachable: whether the source, as stored with a conversion, is unchanged."""
    found = []
    for folder in _folders():
        with suppress(FileNotFoundError):  # another process has just removed it
            found.append(_entry(folder, reachable))
    return found


def _entry(folder: Path, reachable: Callable[[dict], bool]) -> Entry:
    model, note, busy = read_note(folder / "model.json"), read_note(folder / "source.json"), _is_busy(folder)
    source, recipe, form = note.get("identity"), model.get("recipe"), model.get("format", description.FORMAT)
    source = source if isinstance(source, list) and len(source) > 1 else None
    if folder.name.endswith(".part"):
        useless = "" if busy else "unfinished"
    elif form != description.FORMAT:
        useless = "of an older version" if form < description.FORMAT else ""  # a newer one may use it
    elif not complete(folder):
        useless = "damaged"
    else:
        useless = "its source has changed or gone" if source and not _is_true(reachable, note) else ""
    return Entry(
        folder,
        str(model.get("name", folder.name)),
        str(Recipe(**recipe)) if foreign.fits(recipe, Recipe) else "",
        str(source[1]) if source else "",
        sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir()),
        folder.stat().st_mtime,
        useless,
        busy,
    )


def _is_true(reachable: Callable[[dict], bool], note: dict) -> bool:
    try:
        return reachable(note)
    except (KeyError, TypeError, ValueError, OSError):  # the note is damaged, or its source may not be looked at
        return False


def remove(entry: Entry) -> bool:
    """Delete a conversion, unless another process is making it. Links inside are removed, but not their targets."""
    try:
        with _locked(_target(entry.folder), None), suppress(FileNotFoundError):
            shutil.rmtree(entry.folder)
    except BlockingIOError:
        return False
    except OSError as e:
        raise Error(f"{entry.folder} cannot be removed: {e.strerror}.", "Check its permissions.") from None
    return True


def _folders() -> list[Path]:
    """The folders that this module made. It knows them by their names, and conversions also by their description."""
    return [
        path
        for path in sorted(root().glob("models/*"))
        if (named := _OURS.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()
        if named[2] or isinstance(read_note(path / "model.json").get("format"), int)
    ]


def _target(folder: Path) -> Path:
    """The path of the conversion that a folder is, or whose scratch folder it is."""
    return folder.with_name(_OURS.fullmatch(folder.name)[1])


def _is_busy(folder: Path) -> bool:
    try:
        with _locked(_target(folder), None):
            return False
    except OSError as e:  # if the cache cannot be written, nobody works in it
        return isinstance(e, BlockingIOError)


def make(target: Path, fill: Callable[[Path], None], busy: Callable[[], None]) -> Path:
    """Have `fill` write the model into `model` inside a scratch folder. If another process does this already, `busy` is
    called and this process waits."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep()
        with _locked(target, busy):
            if complete(target):
                return target
            shutil.rmtree(target, ignore_errors=True)
            part = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".part", dir=target.parent))
            try:
                fill(part)
                try:
                    os.rename(part / "model", target)
                except OSError:  # without working locks, another process may have been first
                    if not complete(target):
                        raise
            except Error as e:  # name the target, not the scratch folder
                problem = e.problem.replace(str(part / "model"), str(target)).replace(f"{part}{os.sep}", "")
                raise Error(problem, e.fix) from None
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return target


@contextmanager
def _locked(target: Path, busy: Callable[[], None] | None) -> Iterator[bool]:
    """The lock of the process that works on `target`. The system releases it when that process ends, however it ends.
    If another process has the lock, call `busy` and wait; without `busy`, raise BlockingIOError. Some network drives
    have no locks: then this yields False, and two processes may do the same work."""
    path = target.parent / ".locks" / target.name
    path.parent.mkdir(exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if busy is None:
                raise
            busy()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            yield False
            return
        yield True


def _sweep() -> None:
    """Remove scratch folders of dead processes (nobody holds their lock), and conversions by older versions, which this
    and later versions cannot read."""
    for folder in _folders():
        part = folder.name.endswith(".part")
        if part or read_note(folder / "model.json")["format"] < description.FORMAT:
            with suppress(OSError), _locked(_target(folder), None) as sure:  # what cannot be swept stays
                if sure:
                    shutil.rmtree(folder, ignore_errors=True)


def check_room(name: str, need: float) -> None:
    """Raise before the work if the disk lacks this many bytes."""
    free = shutil.disk_usage(root()).free
    if free < need:
        raise Error(
            f"{name} needs {need / 1e9:.2f} GB converted; {root()} has {free / 1e9:.2f} GB free.",
            "Free some space, or let MLXDIFF_CACHE point to a larger disk.",
        )


def read_note(path: Path) -> dict:
    """The contents of a JSON file, or {} if it cannot be read: its facts can be looked up again."""
    try:
        return foreign.read_json(path, "")
    except Error:
        return {}


def write_note(path: Path, note: dict) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with appearing(path) as part:
            write_json(part, note)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        elsewhere = "let MLXDIFF_CACHE point to"
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            free = f"{root()} has {shutil.disk_usage(root()).free / 1e9:.2f} GB free"
            raise Error(f"The disk is full: {free}.", f"Free some space, or {elsewhere} a larger disk.") from None
        raise Error(
            f"{target} cannot be written: {e}.", f"Check its permissions, or {elsewhere} another folder."
        ) from None
