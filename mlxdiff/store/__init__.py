"""Name, hub id, folder or file -> a model folder ready to read. A checkpoint is converted once, into the cache. A
converted model never needs the network again, and its original may be deleted. Only this package calls convert."""

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.nn as nn

from .. import builtin, description, foreign, recipe, seal
from ..description import Description
from ..errors import Error, did_you_mean
from ..families import ADAPTERS, FAMILIES, MODELS
from ..recipe import Recipe
from . import cache
from .tokenizer import tokenizer_for

if TYPE_CHECKING:
    from ..convert import Checkpoint

# convert and hub take most of a second to load: they are imported only where a cached model is not enough.

Progress = Callable[[str, int, int], None]
_LARGE = 2**29  # bytes of a file that takes too long to read whole
HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*(?<!\.safetensors)(?<!\.gguf)(?<!\.ckpt))(?:/(.+\.(?:safetensors|gguf)))?")


@dataclass(frozen=True)
class Options:
    """The checked options of `resolve`: how to find and convert a model."""

    recipe: Recipe
    suited: bool  # its dtype was not asked for: the family may have another one
    prediction: str | None
    tokenizer: Path | None
    parts: dict[str, Path]
    t5: bool
    offline: bool
    progress: Progress
    check: Callable[[Description], None]


def resolve(
    model: str | Path,
    *,
    bits: int | str | None = None,
    dtype: str | None = None,
    text_bits: int | str | None = None,
    offline: bool = False,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
    prediction: str | None = None,
    parts: dict[str, str | Path] | None = None,
    t5: bool = True,
    progress: Progress | None = None,
    check: Callable[[Description], None] | None = None,
) -> Path:
    """The model folder of a named model, a hub id (`org/repo`, or `org/repo/file.safetensors`), a folder or a file.

    bits, dtype, text_bits: how to store the weights. offline: never use the network. revision: a branch, tag or commit
    of the hub repository; by default the commit that was seen first is kept. tokenizer: a folder, for checkpoints
    without one. prediction: "eps" or "v", if a checkpoint does not say. parts: files of what `families.PARTS` names,
    for a transformer that lacks them and has no such files beside it. t5: False neither fetches nor converts SD3's T5.
    progress(stage, done, total) is called with bytes. check: called with the model's description as soon as it is
    known, which is before a conversion; an exception from it ends the call."""
    asked = {"dtype": dtype, "bits": bits, "text_bits": text_bits, "prediction": prediction}
    how = recipe.recipe(bits, dtype, text_bits=text_bits)
    tokenizer = None if tokenizer is None else foreign.path(tokenizer)
    if tokenizer is not None and not tokenizer.is_dir():
        fix = "Give `tokenizer=DIR`, the tokenizer folder of a model in diffusers layout."
        raise Error(f"There is no folder {tokenizer}.", fix)
    given = {kind: foreign.path(file) for kind, file in (parts or {}).items()}
    options = Options(
        recipe=how,
        suited=dtype is None,
        prediction=prediction,
        tokenizer=tokenizer,
        parts=given,
        t5=t5,
        offline=offline,
        progress=silent if progress is None else progress,
        check=(lambda _: None) if check is None else check,
    )

    path = local(model)
    if path is not None:
        return _as_it_is(path, asked, options) if (path / "model.json").is_file() else _from_path(path, options)
    return _from_hub(*_repo(model), revision, options)


@contextmanager
def original(
    model: str | Path, *, half: bool, t5: bool = True, offline: bool = False, progress: Progress | None = None
) -> Iterator[Path]:
    """The checkpoint that a model is converted from, downloaded if necessary. half: half precision is enough."""
    path = local(model)
    if path is not None:
        yield path
        return
    repo, file = _repo(model)
    seen = cache.read_note(_note(repo, "main")).get("commit", "main")
    _, obtain = _published(repo, file, seen, half, t5, offline, silent if progress is None else progress)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            yield obtain(Path(scratch))
        except Error as e:  # name files as the user knows them
            raise Error(e.problem.replace(f"{scratch}{os.sep}", ""), e.fix) from None


def conversions(model: str | Path) -> list[Path]:
    """The converted copies in the cache of a model from the hub."""
    return [] if local(model) is not None else cache.named(_label(*_repo(model)))


def check_name(model: str | Path) -> None:
    """Fail like `resolve` on a name that cannot mean any model. This opens no file and uses no network."""
    if local(model) is None:
        _repo(model)


def silent(stage: str, done: int, total: int) -> None:
    pass


def local(model: str | Path) -> Path | None:
    """The file or folder that a name means. A folder that shares a named model's name must look like a model."""
    try:
        path = Path(model).expanduser()
        exists = str(model) != "" and os.path.lexists(path)  # a broken link counts: a later error reports it
    except (OSError, RuntimeError, TypeError, ValueError):  # too long, no home, not text, a NUL inside: no path
        return None
    row = MODELS.get(str(model))
    if row is not None and not any((path / f).is_file() for f in ("model.json", "model_index.json")):
        return builtin.FOLDER.parent / str(model) if row.repo is None else None
    return path if exists else None


def _repo(model: str | Path) -> tuple[str, str | None]:
    """The hub repository that a name means, and the one file of it if the name says one."""
    name = str(model)
    if name in MODELS:
        return MODELS[name].repo, None
    match = HUB_ID.fullmatch(name) if isinstance(model, str) else None
    if match is not None:
        return match[1], match[2]
    known = "Give a name that `mlxdiff models` lists, a hub id (org/repo), a folder, a .safetensors or a .gguf file."
    if any(name == called for _, called in ADAPTERS):
        raise Error(f"{name} is no model, but goes beside one.", "`mlxdiff models --adapters` says how it is used.")
    raise Error(f"There is no model, file or folder {name!r}.", did_you_mean(name, MODELS, 3) + known)


def _as_it_is(folder: Path, asked: dict, options: Options) -> Path:
    """A model folder is used where it is; it cannot be converted again."""
    if options.parts:
        names = ", ".join(options.parts)
        fix = f"Leave {names} out; such parts are taken when the original checkpoint is converted."
        raise Error(f"{folder} is already converted; its {names} cannot be replaced.", fix)
    model = description.read(folder)
    how = model.recipe
    has = {"dtype": how.dtype, "bits": how.bits, "text_bits": how.text_bits, "prediction": model.prediction}
    if has["text_bits"] is None:
        has["text_bits"] = recipe.WHOLE if how.bits is None else how.bits
    for key, value in asked.items():
        if value is not None and value != has[key]:
            raise Error(
                f"{folder} is already converted, with {key} {has[key]}, not {value}.",
                "Convert the original checkpoint again with the settings that you want.",
            )
    options.check(model)
    return folder


# A cached conversion is valid as long as the identity of its source stays the same.


def _from_path(path: Path, options: Options) -> Path:
    label, identity = path.stem if path.is_file() else path.resolve().name, _identity(path)
    return _present(label, identity, options) or _make(label, identity, lambda _: path, options)


def _identity(path: Path) -> list:
    """A checkpoint on disk is the same as long as its files keep their path, size, time and a sample of their contents.
    The files beside it from which it may take parts count too."""
    identity = ["path", str(path.resolve()), _stamps(path)]
    if path.is_file():
        from .. import convert

        identity += [[str(file), _stamps(file)] for file in convert.beside(path)]
    return identity


def _stamps(path: Path) -> list:
    """Name, size, time and sample of a file (and of the settings and an index's shards beside it), or of every file in
    a folder, two levels deep, that can belong to a model."""
    ends = (".json", ".safetensors", ".gguf", ".txt", ".model")
    if path.is_file():
        files = [path, path.with_name("config.json")]
        files += sorted(path.parent.glob("*.safetensors")) if path.suffix == ".json" else []
    else:
        files = sorted(f for g in ("*", "*/*") for f in path.glob(g) if f.suffix in ends)
    stats = [(f, f.stat()) for f in files if f.is_file()]
    return [[f.name, f.parent.name, s.st_size, s.st_mtime_ns, _sample(f, s.st_size)] for f, s in stats]


def _sample(file: Path, size: int) -> str:
    """A replaced file may have the old one's size and time. "" if it cannot be read, which conversion reports."""
    try:
        return seal.sample(file, size)
    except OSError:
        return ""


def _from_hub(repo: str, file: str | None, revision: str | None, options: Options) -> Path:
    """A hub repository is the same as long as its commit is the same. The commit of the first conversion is stored."""
    revision = "main" if revision is None else revision
    half = options.recipe.dtype != "float32"
    label, note = _label(repo, file), _note(repo, revision)
    seen = cache.read_note(note).get("commit")
    if seen is not None:
        made = _present(label, ["hub", repo, seen, file, half], options)
        if made is not None:
            return made

    from . import hub

    at = revision if seen is None else seen
    commit, obtain = _published(repo, file, at, half, options.t5, options.offline, options.progress)
    identity = ["hub", repo, commit, file, half]
    try:
        made = _present(label, identity, options) or _make(label, identity, obtain, options)
    except Error as e:
        if options.offline or hub.offline():  # the files here may be an unfinished download
            raise Error(e.problem, f"{e.fix} If its download was cut off, run once without `offline`.") from None
        raise
    cache.write_note(note, {"repo": repo, "revision": revision, "commit": commit})
    return made


def _label(repo: str, file: str | None) -> str:
    """The name of a model from the hub in the cache: its name here, if it has one."""
    if file is not None:
        return cache.slug(Path(file).stem)
    return next((name for name, row in MODELS.items() if row.repo == repo), cache.slug(repo))


def _note(repo: str, revision: str) -> Path:
    """The file that stores which commit a revision stood for when it was converted."""
    return cache.root() / "hub" / f"{cache.slug(repo)}-{cache.short(f'{repo}@{revision}')}.json"


def _published(
    repo: str, file: str | None, at: str, half: bool, t5: bool, offline: bool, progress: Progress
) -> tuple[str, Callable[[Path], Path]]:
    """The commit that `at` stands for, and a function that fetches the checkpoint. The function takes a folder that
    must exist as long as the checkpoint is used."""
    from . import hub

    commit, held = hub.held(repo, at) if offline or hub.offline() else hub.listing(repo, at)
    files = {name: held[name] for name in hub.select(repo, held, half, file, t5)}

    def obtain(place: Path) -> Path:
        folder = hub.download(repo, at, commit, files, progress)
        if file is not None:
            return folder / file
        chosen = place / _label(repo, None)
        for name in files:  # only the chosen files: the snapshot may hold other variants, perhaps unfinished ones
            link = chosen / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((folder / name).resolve())
        return chosen

    return commit, obtain


def _keyed(options: Options) -> Recipe:
    """The recipe as it names a conversion. Where a family decides between the dtypes of 16 bits, that is not known
    before the checkpoint is here."""
    open_yet = options.suited and options.recipe.dtype == "bfloat16"
    return replace(options.recipe, dtype="half") if open_yet else options.recipe


def _asked(options: Options) -> list:
    tokenizer = None if options.tokenizer is None else [str(options.tokenizer.resolve()), _stamps(options.tokenizer)]
    parts = [[kind, str(file.resolve()), _stamps(file)] for kind, file in sorted(options.parts.items())]
    return [_keyed(options).values(), options.prediction, options.t5, tokenizer, *parts]


def _target(label: str, identity: list, options: Options) -> Path:
    word = str(replace(_keyed(options), text_bits=None))  # T5 and Qwen3: it may have neither
    return cache.folder(label, word, [description.FORMAT, identity, _asked(options)])


def _present(label: str, identity: list, options: Options) -> Path | None:
    """The conversion, if there is one. A conversion with T5 also serves a call without it: T5 is then not loaded."""
    ways = [options] if options.t5 else [replace(options, t5=True), options]
    targets = [_target(label, identity, o) for o in ways]
    made = next((target for target in targets if cache.complete(target)), None)
    if made is not None:
        options.check(description.read(made))
    return made


def _make(label: str, identity: list, obtain: Callable[[Path], Path], options: Options) -> Path:
    """Convert the checkpoint that `obtain` fetches."""
    from .. import convert

    asked = _asked(options)

    def fill(part: Path) -> None:
        checkpoint = convert.open(obtain(part), options.prediction, options.parts, options.t5)
        how = options.recipe
        if options.suited:
            how = replace(how, dtype=recipe.default_dtype(FAMILIES.get(checkpoint.family)))
        how = how.of(FAMILIES.get(checkpoint.family))
        options.check(convert.describe(checkpoint, how))
        cache.check_room(checkpoint.path.name, _size(checkpoint, how))
        tokenizer = options.tokenizer
        if tokenizer is None:
            tokenizer = tokenizer_for(checkpoint, options.offline, options.progress)
        convert.save(checkpoint, part / "model", **how.values(), tokenizer=tokenizer, progress=options.progress)
        cache.write_json(part / "model" / "source.json", {"identity": identity, "asked": asked})

    return cache.make(_target(label, identity, options), fill, lambda: options.progress("wait", 0, 0))


def reachable(note: dict) -> bool:
    """Whether `resolve` can still return the conversion that has this `source.json`."""
    (kind, place, seen, *_), (_, _, _, tokenizer, *parts) = note["identity"], note["asked"]
    files = [entry[-2:] for entry in ([] if tokenizer is None else [tokenizer]) + parts]
    if any(_stamps(Path(file)) != stamps for file, stamps in files):
        return False
    if kind == "path":
        return Path(place).exists() and _identity(Path(place)) == note["identity"]
    notes = map(cache.read_note, cache.root().glob("hub/*.json"))
    return any((n.get("repo"), n.get("commit")) == (place, seen) for n in notes)


def _size(checkpoint: "Checkpoint", how: Recipe) -> float:
    """Bytes that the conversion will write. If it is quantized, all layers count as quantized."""
    need = 0.0
    for name, component in checkpoint.components.items():
        family = FAMILIES.get(checkpoint.family)
        dtype, bits = recipe.component_dtype(family, name, how.dtype), recipe.component_bits(family, name, how)
        size = recipe.DTYPES[dtype].size if bits is None else recipe.BITS[bits] / 8
        need += component.parameters * size
    return need


# Small networks that belong to no model are read where they are: a few megabytes need no converted copy.


def taesd(name: str | Path, *, dtype: str, offline: bool, progress: Progress | None = None) -> nn.Module:
    """The tiny decoder in a file, in a folder, or in a hub repository (`org/repo`, or `org/repo/file.safetensors`)."""
    path = network_file(name, "a TAESD", "Use auto for the model's TAESD.", offline=offline, progress=progress)
    return network(path, "a TAESD", "Use auto for the model's TAESD.", dtype=dtype)


_ALONE = {
    "a TAESD": "taesd",
    "an upscaler": "upscaler",
    "a depth model": "depth",
}  # what people call such a network -> its component


def network_file(name: str | Path, what: str, fix: str, *, offline: bool, progress: Progress | None) -> Path:
    """The file or folder of a small network, fetched once if it is on the hub. what: what people call it. fix: what to
    do if there is none of this name."""
    path = local(name)
    if path is None:
        match = check_hub_id(name, what, fix)
        file = "diffusion_pytorch_model.safetensors" if match[2] is None else match[2]
        path = one_file(match[1], file, offline, silent if progress is None else progress)
    return path


def check_hub_id(name: str | Path, what: str, fix: str) -> re.Match:
    """The parts of a hub id. Raises if a name is none."""
    match = HUB_ID.fullmatch(str(name))
    if match is None:
        raise Error(f"There is no {what.split(' ', 1)[1]}, file or folder {str(name)!r}.", fix)
    return match


def network(path: Path, what: str, fix: str, *, dtype: str) -> nn.Module:
    """The small network in a file or folder."""
    from .. import convert

    try:
        held = convert.open(path)
        if _ALONE[what] not in held.components:
            raise Error(f"{path} is not {what} but {held.layout.title}.", fix)
        return convert.read(path, recipe.DTYPES[dtype])[_ALONE[what]]
    except Error as e:  # convert would name checkpoints of models
        raise Error(e.problem, fix if e.fix == convert.KNOWN else e.fix) from None


def fingerprint(*paths: Path) -> str:
    """Of files, and of all weights in folders: of all bytes of a file, or of the size and a sample of a large one."""
    seen = hashlib.sha256()
    try:
        for file in (f for path in paths for f in (sorted(path.glob("*.safetensors")) if path.is_dir() else [path])):
            foreign.check_regular(file)
            size = file.stat().st_size
            if size > _LARGE:
                seen.update(f"{size} {seal.sample(file, size)}".encode())
                continue
            with open(file, "rb") as f:
                while block := f.read(2**20):
                    seen.update(block)
    except OSError as e:
        raise Error(f"{file} cannot be read: {e.strerror}.", "Give a .safetensors file.") from None
    return seen.hexdigest()[:16]


def one_file(repo: str, file: str, offline: bool, progress: Progress) -> Path:
    """One file of a repository. A file that is already here is not requested again."""
    from . import hub

    here = hub.snapshots(file, repo)
    if here:
        return here[-1]
    _, obtain = _published(repo, file, "main", True, True, offline, progress)
    return obtain(Path())
