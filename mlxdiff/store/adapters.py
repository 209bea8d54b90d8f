"""LoRAs and taught words: found by a path, a name or a hub id, and read where they are."""

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .. import builtin, foreign
from ..adapters import UNNAMED, Adapter, Rows, Taught, Word
from ..description import Description
from ..errors import Error, did_you_mean
from ..families import ADAPTERS, FAMILIES, Beside, Lora, fitting
from . import HUB_ID, Progress, fingerprint, guides, local, one_file, silent

if TYPE_CHECKING:
    from ..convert.lora_header import Look

_MOST = 500  # files of a list
_ROLE = {"LoRA": "lora", "embedding": "word"}
FOLDER = "MLXDIFF_LORAS"  # an environment variable: where names are looked up


def folder_of(path: str | Path | None) -> Path | None:
    """The folder in which names are looked up, if one is given. Raises if it does not exist."""
    folder = None if path is None else foreign.path(path)
    if folder is not None and not os.path.isdir(folder):  # unlike Path's, this takes any name
        raise Error(f"There is no folder {folder}.", "Give the folder of your LoRAs: `lora_dir=DIR`.")
    return folder


def usual_folder() -> Path | None:
    """That of MLXDIFF_LORAS, if it is a folder."""
    said = os.environ.get(FOLDER)
    folder = foreign.path(said) if said else None
    return folder if folder is not None and os.path.isdir(folder) else None


def files(folder: Path) -> list[Path]:
    """The files of a folder and of the folders in it, by name, for a list to choose from."""
    return sorted(folder.rglob("*.safetensors"), key=lambda path: str(path).lower())[:_MOST]


def look(paths: Iterable[Path], model: Description) -> "dict[Path, Look | Taught | Error]":
    """What LoRAs would change in a model, by their headers; what textual inversions teach it; or why a file does not
    fit it."""
    from ..convert import embedding, lora_header

    found = {}
    for path in paths:
        try:
            found[path] = embedding.look(path, model)
        except Error as e:
            found[path] = e
    others = [path for path, taught in found.items() if taught is None]
    return found | lora_header.look(others, model)


def here(name: str | Path, folder: Path | None = None) -> Path | None:
    """The file of a LoRA or an embedding on this machine: a path, or a name in a folder, by default MLXDIFF_LORAS."""
    path, folder = local(name), usual_folder() if folder is None else folder
    if path is None and folder is not None:
        path = next((p for end in ("", ".safetensors") if os.path.isfile(p := folder / f"{name}{end}")), None)
    if path is not None and path.is_dir():
        found = usual_loras(path) or sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise Error(f"{path} holds {len(found)} .safetensors files.", "Give the path of one of them.")
        path = found[0]
    return path


def named(name: str | Path, model: Description, what: str = "LoRA") -> Beside | None:
    """The published LoRA or embedding that a name means for a model; None if the name is not one of those. Raises if it
    was made for another model."""
    role = _ROLE[what]
    families = [of for (of, called), row in ADAPTERS.items() if called == str(name) and row.role == role]
    if families and model.family.name not in families:
        whose, known = " and ".join(FAMILIES[of].title for of in families), fitting(model.family, model.net, role)
        fix = f"{model.family.title} has {', '.join(known)}." if known else "Leave it out."
        raise Error(f"The {what} {name} is for {whose}; {model.name} is {model.family.title}.", fix)
    return guides.row(name, model, role)


def published(name: str | Path, model: Description, folder: Path | None = None, what: str = "LoRA") -> Beside | None:
    """As `named`; None if a file that is here has this name."""
    return None if here(name, folder) is not None else named(name, model, what)


def scale(row: Lora | None, said: float | None) -> float:
    """The scale of a LoRA, published or not, of which a user says one or none."""
    return said if said is not None else 1.0 if row is None else row.scale


def find(
    name: str | Path,
    what: str,
    model: Description,
    *,
    offline: bool,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """The file of a LoRA or an embedding: one that is here, a published LoRA by its name, or one of a hub repository
    (`org/repo`, or `org/repo/file.safetensors`). From the hub it is fetched once."""
    check(name, what, model, folder)
    path = here(name, folder)
    if path is not None:
        return path
    row = published(name, model, folder, what)
    if row is not None and row.repo is None:
        return builtin.FOLDER.parent / row.file
    match = HUB_ID.fullmatch(str(name))
    repo, file = (row.repo, row.file) if row is not None else (match[1], match[2] or UNNAMED[0])
    return one_file(repo, file, offline, silent if progress is None else progress)


def check(name: str | Path, what: str, model: Description, folder: Path | None = None) -> None:
    """Raise unless `find` can find this name for this model, as far as it is known without the network."""
    if here(name, folder) is not None or named(name, model, what) is not None:
        return
    if not HUB_ID.fullmatch(str(name)):
        known = [*fitting(model.family, model.net, _ROLE[what])]
        names = f"{model.name} has {', '.join(known)}; or give" if known else "Give"
        fix = f"{did_you_mean(str(name), known)}{names} a .safetensors file, a hub id, or a name in the folder that"
        raise Error(f"There is no {what} {str(name)!r}.", f"{fix} `lora_dir=DIR` or MLXDIFF_LORAS names.")


def usual_loras(folder: Path) -> list[Path]:
    """The files in a folder that are called as a LoRA usually is."""
    return [folder / name for name in UNNAMED if (folder / name).is_file()]


def lora(path: Path, model: Description, called: str | None = None) -> tuple[Adapter, str]:
    """What a LoRA file changes in a model, and the file's fingerprint. called: its name, if not the file's."""
    from ..convert import lora

    adapter = lora.read(path, model)
    return adapter if called is None else replace(adapter, name=called), fingerprint(path)


def layers(model: Description, component: str) -> dict[str, Rows]:
    """The layers of a component that multiply, by their names in diffusers and transformers."""
    from ..convert import lora

    return lora.layers(component, model.components[component])


def embedding(path: Path, model: Description, word: str | None = None) -> tuple[Word, str]:
    """What a textual inversion teaches a model, and the file's fingerprint."""
    from ..convert import embedding

    return embedding.read(path, model, word), fingerprint(path)


def offered(model: Description) -> dict[str, Beside]:
    """The LoRAs and embeddings that fit a model, by their names."""
    return fitting(model.family, model.net, "lora") | fitting(model.family, model.net, "word")
