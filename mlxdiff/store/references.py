"""The networks that read a reference picture, an adapter and its vision model: found, checked against the model
that draws, and read where they are."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from .. import memory
from ..description import Description
from ..errors import Error
from ..families import FAMILIES
from ..families.published import VISION
from ..models import build, ip_adapter, redux, vision
from . import Progress, fingerprint, one_file, silent
from .guides import locate, one_network, row

if TYPE_CHECKING:
    from ..convert import Checkpoint

_ENCODER = "image_encoder"


@dataclass(frozen=True)
class Reader:
    """The two networks, of which only headers are read yet."""

    adapter: Path
    encoder: Path
    config: ip_adapter.Config | redux.Config
    sees: vision.Config
    hash: str  # of both

    @property
    def workload(self) -> memory.Reader:
        """What the memory estimate depends on."""
        tokens = getattr(self.config, "tokens", None)
        return memory.Reader((self.sees, self.config), self.sees.tokens if tokens is None else tokens)


def find(name: str | Path, model: Description, *, offline: bool, progress: Progress | None = None) -> Reader:
    """The networks that a reference names: the adapter by a file, a folder or a hub repository, from which it is
    fetched once. Its vision model lies in image_encoder/ beside the adapter's file, or beside that one's folder."""
    progress = silent if progress is None else progress
    path, repo, file = locate(name, model, "reference"), None, None
    if not isinstance(path, Path):
        repo, file = path
        file = _only_file(repo, offline) if file is None else file
        path = one_file(repo, file, offline, progress)
    elif path.is_dir() and (path / "image_embedder").is_dir():  # Redux in diffusers layout
        path = path / "image_embedder"
    checkpoint, config = _adapter(path, model)
    folder = next((f for f in _beside(path) if _gives(f, config) == config.image), None)
    if folder is None and repo is None:
        raise _lacks(path, config)
    if repo is not None and (folder is None or not any(folder.glob("*.safetensors"))):  # or its download was cut off
        half, named = model.recipe.dtype != "float32", row(name, model, "reference")
        if named is None or named.sees is None:
            folder = _fetched(repo, file, path, config, half, offline, progress)
        else:
            folder = one_network(named.sees, half, offline, progress)
    encoder = _encoder(folder)
    return Reader(
        adapter=path,
        encoder=folder,
        config=config,
        sees=_config(encoder),
        hash=fingerprint(*_files(checkpoint), *_files(encoder)),
    )


def read(reader: Reader, dtype: mx.Dtype) -> tuple[vision.Vision, nn.Module]:
    """The vision model and the adapter. No converted copy is kept: both are needed once for a picture."""
    from .. import convert

    (adapter,) = convert.read(reader.adapter, dtype).values()
    (encoder,) = convert.read(reader.encoder, dtype, "vision").values()
    return encoder, adapter


def gives(sees: vision.Config, adapter: ip_adapter.Config | redux.Config) -> int | None:
    """The width of what a vision model gives to such an adapter."""
    return sees.projection if adapter.pools else sees.width


def _adapter(path: Path, model: Description) -> tuple["Checkpoint", ip_adapter.Config | redux.Config]:
    """What an adapter's file holds. Raises unless it fits the model, and every tensor has its place."""
    from .. import convert

    checkpoint = convert.open(path)
    (kind, *_), title = checkpoint.layout.networks.values(), checkpoint.layout.title
    if kind not in build.READERS:
        what = title if checkpoint.layout.family is None else f"a model, of {title},"
        raise Error(f"{path} is {what} and reads no reference picture.", "Give an IP-Adapter or FLUX Redux.")
    if kind not in model.family.references:
        whose = " and ".join(f.title for f in FAMILIES.values() if kind in f.references)
        raise Error(f"{path} is {title}, for {whose}; {model.name} is {model.family.title}.", "Use a model of those.")
    convert.check(checkpoint)
    (component,) = checkpoint.components.values()
    wrong = build.READERS[kind](component.config, model.net)
    if wrong:
        made_for = f"Use one that was made for {model.family.title}."
        raise Error(f"{path} is {title} that {wrong}: it does not fit {model.name}.", made_for)
    return checkpoint, component.config


def _gives(folder: Path, adapter: ip_adapter.Config | redux.Config) -> int | None:
    """The width of what the vision model in a folder gives to an adapter. Its config.json is enough to say."""
    from ..convert import vision as names
    from ..convert.settings import Settings

    if (folder / "config.json").is_file():
        s = Settings(folder / "config.json")
        if s.cls in names.CLASSES:
            return gives(names.from_json(s, s.cls), adapter)
    return gives(_config(_encoder(folder)), adapter)


def _encoder(folder: Path) -> "Checkpoint":
    from .. import convert

    checkpoint = convert.open(folder, layout="vision")
    convert.check(checkpoint)
    return checkpoint


def _config(encoder: "Checkpoint") -> vision.Config:
    return encoder.components[_ENCODER].config


def _beside(path: Path) -> Iterator[Path]:
    """Where an adapter's vision model may be: beside its file; beside its folder; and as in h94/IP-Adapter, whose SDXL
    adapters share that of the others, in models/ beside its folder."""
    home = path.absolute().parent
    for place in (home, home.parent, home.parent / "models"):
        if (place / _ENCODER).is_dir():
            yield place / _ENCODER


def _lacks(path: Path, config: ip_adapter.Config | redux.Config) -> Error:
    """The error about a vision model that is absent, or is another one."""
    called = next((name for name, sees in VISION.items() if gives(sees, config) == config.image), "a vision model")
    place = path.absolute().parent / _ENCODER
    found = [f"{folder} gives {_gives(folder, config)}" for folder in _beside(path)]
    seen = "; ".join(found) if found else f"there is no folder {place}"
    return Error(
        f"{path} reads what {called} gives of a picture, {config.image} numbers, and {seen}.",
        f"Put the config.json and the model.safetensors of {called} into {place}.",
    )


def _fetched(repo: str, file: str, path: Path, config, half: bool, offline: bool, progress: Progress) -> Path:
    """The vision model of an adapter from the hub, from the same repository."""
    from . import hub

    offline = offline or hub.offline()
    commit, held = hub.held(repo, "main") if offline else hub.listing(repo, "main")
    home, _, _ = file.rpartition("/")
    above = home.rpartition("/")[0]
    for place in dict.fromkeys((home, above, f"{above}/models".lstrip("/"))):
        folder = f"{place}/{_ENCODER}".lstrip("/")
        if f"{folder}/config.json" not in held:
            continue
        settings = {f"{folder}/config.json": held[f"{folder}/config.json"]}
        if _gives(hub.download(repo, "main", commit, settings, progress) / folder, config) == config.image:
            names = hub.select_folder(repo, folder, held, half)
            return hub.download(repo, "main", commit, {name: held[name] for name in names}, progress) / folder
    if offline:
        problem = f"The vision model of {repo}/{file} is not on this machine, and the network may not be used."
        raise Error(problem, "Run once without `offline`, and without HF_HUB_OFFLINE.")
    raise _lacks(path, config)


def _only_file(repo: str, offline: bool) -> str:
    """The file of a repository that has one, as FLUX Redux does."""
    from . import hub

    _, held = hub.held(repo, "main") if offline or hub.offline() else hub.listing(repo, "main")
    files = sorted(name for name in held if name.endswith(".safetensors") and _ENCODER not in name)
    top = [name for name in files if "/" not in name]
    if len(top) != 1:
        choices = ", ".join(f"{repo}/{name}" for name in files[:8])
        fix = f"Choose one: {choices}." if files else "Use another repository."
        raise Error(f"{repo} holds {len(files)} .safetensors files.", fix)
    return top[0]


def _files(checkpoint: "Checkpoint") -> list[Path]:
    (component,) = checkpoint.components.values()
    return sorted({piece.tensor.file for weight in component.weights.values() for piece in weight.pieces})
