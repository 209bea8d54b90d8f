"""Name, hub id, folder or file -> a model folder ready to read. What needs converting is converted once, into a cache
($MLXDIFF_CACHE, else the user's cache folder). A converted model never touches the network again, and its original may
be deleted. Only this module calls convert."""

import difflib
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
from typing import TYPE_CHECKING

import mlx.nn as nn

from . import weights
from .errors import Error
from .registry import FAMILIES, MODELS

if TYPE_CHECKING:
    from .convert import Checkpoint

# convert and hub are imported where a cached model no longer gets by without them: they take a second to load.

Progress = Callable[[str, int, int], None]
BUILTIN = Path(__file__).parent / "builtin"
CLIP_WORDS = 49408  # every CLIP text encoder of these families was published with the one vocabulary
T5_WORDS = 32128  # and every T5
_HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*(?<!\.safetensors)(?<!\.ckpt))(?:/(.+\.safetensors))?")


@dataclass(frozen=True)
class Order:
    """What was asked of `resolve`, checked."""

    recipe: dict
    tokenizer: Path | None
    parts: dict[str, Path]
    offline: bool
    progress: Progress


def resolve(
    model: str | Path,
    *,
    bits: int | str | None = None,
    dtype: str | None = None,
    offline: bool = False,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
    prediction: str | None = None,
    parts: dict[str, str | Path] | None = None,
    progress: Progress | None = None,
) -> Path:
    """The model folder of a named model, a hub id (`org/repo`, or `org/repo/file.safetensors`), a folder or a file.

    bits, dtype: how to store the weights. offline: never use the network. revision: a branch, tag or commit of the hub
    repository; without one the commit first seen stays. tokenizer: a folder, for checkpoints that bring none.
    prediction: "eps" or "v", where a checkpoint does not say. parts: files of "vae", "clip", "clip_g" and "t5", for
    checkpoints of SD3 and FLUX that lack them and have none beside them. progress(stage, done, total) is told bytes."""
    if bits is not None and bits not in weights.BITS:
        raise Error(f"Weights cannot be quantized to {bits!r}.", f"Use one of {', '.join(map(str, weights.BITS))}.")
    if dtype is not None and dtype not in weights.DTYPES:
        raise Error(f"{dtype!r} is not a dtype for weights.", f"Use one of {', '.join(weights.DTYPES)}.")
    asked = {"dtype": dtype, "bits": bits, "prediction": prediction}
    recipe = asked | {"dtype": weights.default_dtype() if dtype is None else dtype}
    words = None if tokenizer is None else Path(tokenizer).expanduser()
    given = {kind: Path(file).expanduser() for kind, file in (parts or {}).items()}
    tell = (lambda *_: None) if progress is None else progress
    order = Order(recipe, words, given, offline, tell)

    path = _path(model)
    if path is not None:
        return _as_it_is(path, asked, order) if (path / "model.json").is_file() else _from_path(path, order)
    name = str(model)
    if name in MODELS:
        row = MODELS[name]
        return _from_path(BUILTIN / name, order) if row.repo is None else _from_hub(row.repo, None, revision, order)
    found = _HUB_ID.fullmatch(name) if isinstance(model, str) else None
    if found is None:
        raise _unknown(name)
    return _from_hub(found[1], found[2], revision, order)


def _path(model: str | Path) -> Path | None:
    """The file or folder that is meant. One that merely shares a named model's name has to look like a model."""
    try:
        path = Path(model).expanduser()
        exists = str(model) != "" and path.exists()
    except (OSError, RuntimeError, ValueError):  # too long, no home, a NUL inside: no file can be meant
        return None
    if str(model) in MODELS and not any((path / f).is_file() for f in ("model.json", "model_index.json")):
        return None
    return path if exists else None


def _unknown(name: str) -> Error:
    known = f"Named models are {', '.join(MODELS)}; or give a hub id (org/repo), a folder or a .safetensors file."
    near = difflib.get_close_matches(name, MODELS, 1)
    return Error(f"There is no model, file or folder {name!r}.", f"Did you mean {near[0]}? {known}" if near else known)


def _as_it_is(folder: Path, asked: dict, order: Order) -> Path:
    """Our own format is used in place; it cannot be converted once more."""
    if order.parts:
        raise Error(f"{folder} is already converted; it takes no other parts.", "Convert the original checkpoint.")
    model = weights.read_model(folder)
    has = model["recipe"] | {"prediction": model["prediction"]}
    for key, value in asked.items():
        if value is not None and value != has[key]:
            raise Error(
                f"{folder} is already converted, with {key} {has[key]}, not {value}.",
                "Convert the original checkpoint again with what you want.",
            )
    return folder


# A source's identity is what has to stay the same for a cached conversion of it to be the right one.


def _from_path(path: Path, order: Order) -> Path:
    """A checkpoint on disk is the same as long as its files keep their place, size and time."""
    label = path.stem if path.is_file() else path.resolve().name
    target = _target(label, ["path", str(path.resolve()), _marks(path)], order)
    return target if _complete(target) else _make(target, lambda _: path, order)


def _marks(path: Path) -> list:
    """Name, size and time of a file, or of every file of a folder that a model can consist of, two levels deep."""
    ends = (".json", ".safetensors", ".txt", ".model")
    files = [path] if path.is_file() else sorted(f for g in ("*", "*/*") for f in path.glob(g) if f.suffix in ends)
    return [[f.name, f.parent.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()]


def _from_hub(repo: str, file: str | None, revision: str | None, order: Order) -> Path:
    """A hub repository is the same as long as its commit is; the commit of the first conversion is remembered."""
    revision = "main" if revision is None else revision
    half = order.recipe["dtype"] != "float32"
    label = _slug(repo if file is None else f"{repo}/{file}")
    note = root() / "hub" / f"{_slug(repo)}-{_short(f'{repo}@{revision}')}.json"
    seen = _read_json(note).get("commit")
    if seen is not None:
        target = _target(label, ["hub", repo, seen, file, half], order)
        if _complete(target):
            return target

    from . import hub

    at = revision if seen is None else seen
    offline = order.offline or hub.offline()
    commit, held = hub.held(repo, at) if offline else hub.listing(repo, at)
    files = {name: held[name] for name in hub.select(repo, held, half, file)}

    def obtain(part: Path) -> Path:
        folder = hub.download(repo, at, commit, files, order.progress)
        if file is not None:
            return folder / file
        for name in files:  # only what was chosen: the snapshot may hold other, perhaps unfinished, variants
            link = part / _slug(repo) / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((folder / name).resolve())
        return part / _slug(repo)

    target = _target(label, ["hub", repo, commit, file, half], order)
    try:
        made = target if _complete(target) else _make(target, obtain, order)
    except Error as e:
        if offline:  # what is held may be the beginning of a download
            raise Error(e.problem, f"{e.fix} If its download was cut off, run once without --offline.") from None
        raise
    with _writing(note):
        note.parent.mkdir(parents=True, exist_ok=True)
        fresh = note.with_suffix(f".{os.getpid()}")
        weights.write_json(fresh, {"repo": repo, "revision": revision, "commit": commit})
        os.replace(fresh, note)
    return made


# A preview's decoder is read where it is: of a few megabytes no converted copy is kept.


def taesd(name: str | Path, *, dtype: str, offline: bool, progress: Progress | None = None) -> nn.Module:
    """The tiny decoder in a file, in a folder, or in a hub repository (`org/repo`, or `org/repo/file.safetensors`)."""
    from . import convert

    path = _path(name)
    if path is None:
        found = _HUB_ID.fullmatch(str(name))
        if found is None:
            raise Error(f"There is no TAESD, file or folder {str(name)!r}.", "Use auto for the model's own.")
        file = "diffusion_pytorch_model.safetensors" if found[2] is None else found[2]
        path = _one_file(found[1], file, offline, (lambda *_: None) if progress is None else progress)
    networks = convert.read(path, weights.DTYPES[dtype])
    if "taesd" not in networks:
        raise Error(f"{path} is no TAESD but {', '.join(networks)}.", "Use auto for the model's own.")
    return networks["taesd"]


def _one_file(repo: str, file: str, offline: bool, progress: Progress) -> Path:
    """One that is here already is not asked for again."""
    from . import hub

    here = hub.snapshots(file, repo)
    if here:
        return here[-1]
    commit, held = hub.held(repo, "main") if offline or hub.offline() else hub.listing(repo, "main")
    return hub.download(repo, "main", commit, {n: held[n] for n in hub.select(repo, held, True, file)}, progress) / file


# The cache: models/<name>-<recipe>-<key>, each either whole or absent.


def root() -> Path:
    """$MLXDIFF_CACHE, else where the system keeps what programs can make again."""
    named = os.environ.get("MLXDIFF_CACHE")
    if named:
        return Path(named).expanduser()
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "mlxdiff"


def _target(label: str, identity: list, order: Order) -> Path:
    words = None if order.tokenizer is None else [str(order.tokenizer.resolve()), _marks(order.tokenizer)]
    parts = [[kind, str(file.resolve()), _marks(file)] for kind, file in sorted(order.parts.items())]
    key = json.dumps([weights.FORMAT, identity, order.recipe, words, *parts])
    return root() / "models" / f"{_slug(label)}-{weights.label(order.recipe)}-{_short(key)}"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.")[:80]


def _short(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:12]


def _complete(target: Path) -> bool:
    """A conversion appears under its name only when it is whole; this finds what somebody has since taken out of it."""
    try:
        model = weights.read_model(target)
    except Error:
        return False
    parts = [f"{name}.safetensors" for name in model["components"]] + list(model["tokenizers"])
    return all((target / part).exists() for part in parts)


def _make(target: Path, obtain: Callable[[Path], Path], order: Order) -> Path:
    """Convert what `obtain` brings. Of two processes one works and the other waits for it."""
    from . import convert

    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        with _locked(target, lambda: order.progress("wait", 0, 0)):
            if _complete(target):
                return target
            shutil.rmtree(target, ignore_errors=True)
            part = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".part", dir=target.parent))
            try:
                source = obtain(part)
                parts = {"parts": order.parts} if order.parts else {}
                checkpoint = convert.open(source, order.recipe["prediction"], **parts)
                _check_room(checkpoint, order)
                words = order.tokenizer
                if words is None:
                    words = tokenizer_for(checkpoint, order.offline, order.progress)
                options = order.recipe | {"tokenizer": words, "progress": order.progress} | parts
                convert.convert(source, part / "model", **options)
                try:
                    os.rename(part / "model", target)
                except OSError:  # where a file system's locks do not hold, somebody else may have been first
                    if not _complete(target):
                        raise
            except Error as e:  # in words of what the user knows: not where it was worked on
                problem = e.problem.replace(str(part / "model"), str(target)).replace(f"{part}{os.sep}", "")
                raise Error(problem, e.fix) from None
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return target


@contextmanager
def _locked(target: Path, busy: Callable[[], None] | None) -> Iterator[None]:
    """Held by whoever works on `target`; the system lets go of it when that process ends, however it ends. Where it is
    already held, `busy` is told and we wait; without it that is a BlockingIOError."""
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
        yield


def _sweep(models: Path) -> None:
    """Remove what processes that died have left behind: a part whose lock nobody holds."""
    for part in models.glob("*.part"):
        target = part.with_name(part.name.rsplit(".", 2)[0])
        with suppress(BlockingIOError), _locked(target, None):
            shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
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


def _read_json(path: Path) -> dict:
    """What was noted, or {}: a note that cannot be read is only looked up again."""
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _check_room(checkpoint: "Checkpoint", order: Order) -> None:
    """Before the work: whether what will be written fits. Quantized, the layers that are not count as if they were."""
    bits, need = order.recipe["bits"], 0
    for name, component in checkpoint.components.items():
        dtype = weights.component_dtype(checkpoint.family, name, order.recipe["dtype"])
        need += component.parameters * (weights.DTYPES[dtype].size if bits is None else weights.BITS[bits] / 8)
    free = shutil.disk_usage(root()).free
    if free < need:
        raise Error(
            f"{checkpoint.path.name} needs {need / 1e9:.2f} GB converted; {root()} has {free / 1e9:.2f} GB free.",
            "Free some space, or let MLXDIFF_CACHE point to a larger disk.",
        )


# Tokenizers, for checkpoints that bring none.


def tokenizer_for(checkpoint: "Checkpoint", offline: bool, progress: Progress) -> Path | None:
    """The folder to take the words from: of any model on this machine, else from the hub. None where the checkpoint has
    its own, or cannot be converted anyway."""
    from . import hub

    whole = checkpoint.family in FAMILIES and not checkpoint.missing and not checkpoint.unmapped
    if checkpoint.tokenizers or not whole:
        return None
    name, t5 = checkpoint.path.name, False
    for encoder, component in checkpoint.components.items():
        words = getattr(component.config, "vocab", CLIP_WORDS)
        if words == T5_WORDS:
            t5 = True
        elif words != CLIP_WORDS:
            raise Error(
                f"{name} has no tokenizer, and its {encoder} knows {words} words where CLIP has {CLIP_WORDS}.",
                "Give the tokenizer folder it was trained with (--tokenizer).",
            )
    # With T5 a whole model's folder is taken, which holds a tokenizer of either kind; else any tokenizer of CLIP.
    held = [*hub.snapshots("merges.txt"), *hub.snapshots("*/merges.txt"), *root().glob("models/*/*/merges.txt")]
    for merges in held:
        if _is_clip(merges.parent):
            if not t5:
                return merges.parent
            if any((merges.parents[1] / w / "spiece.model").is_file() for w in ("tokenizer_2", "tokenizer_3")):
                return merges.parents[1]
    repo = next(row.repo for row in MODELS.values() if row.family == checkpoint.family and row.repo is not None)
    if offline or hub.offline():
        raise Error(
            f"{name} has no tokenizer, none is on this machine, and the network may not be used.",
            f"Fetch the tokenizer folder of {repo} and name it with --tokenizer, or run once without --offline.",
        )
    commit, files = hub.listing(repo, "main")
    folder = min(n.partition("/")[0] for n in files if n.endswith("/merges.txt"))
    wanted = "tokenizer" if t5 else f"{folder}/"
    files = {n: size for n, size in files.items() if n.startswith(wanted)}
    place = hub.download(repo, "main", commit, files, progress)
    return place if t5 else place / folder


def _is_clip(folder: Path) -> bool:
    """Whether this is CLIP's one published vocabulary, as far as its size and its last two words tell."""
    words = _read_json(folder / "vocab.json")
    return len(words) == CLIP_WORDS and words.get("<|startoftext|>") == 49406 and words.get("<|endoftext|>") == 49407
