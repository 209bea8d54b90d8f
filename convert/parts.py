"""What people have in files of their own: the text encoders and the VAE of a transformer, given, or found beside it."""

from pathlib import Path

from ..errors import Error
from . import detect, rules
from . import source as files
from .component import Component, by_itself

# A network alone in a file, by the short name it is given under: the families it can be told for, and what it is.
PARTS = {
    "vae": (("vae",), "a VAE"),
    "clip": (("clip", "clip-g"), "a CLIP text encoder"),
    "clip_g": (("clip-g",), "a CLIP text encoder with projection"),
    "t5": (("t5",), "a T5 text encoder"),
}


def with_parts(
    path: Path, family: str, held: dict[str, Component], given: dict[str, str | Path], left: set[str]
) -> dict[str, Component]:
    """The networks of a checkpoint, with those that are given, and those that lie beside it, where it has none of its
    own. `left` are not looked for."""
    row = detect.FAMILIES[family]
    for kind in given:
        flag = f"--{kind.replace('_', '-')}"
        if kind not in row.parts:
            takes = ", ".join(f"--{k.replace('_', '-')}" for k in row.parts)
            fix = f"It takes {takes}." if takes else f"Leave {flag} out."
            raise Error(f"{path} is of {family}, which takes no {flag}.", fix)
        if row.parts[kind].component in left:
            raise Error(f"{flag} gives what --no-t5 leaves out.", "Use one of them.")
    parts = {kind: Path(file) for kind, file in given.items()}
    if path.is_file() and "transformer" in held:
        lacking = {k: p for k, p in row.parts.items() if k not in parts and p.component not in held.keys() | left}
        parts |= {kind: file for kind, part in lacking.items() if (file := _beside(path, part.beside)) is not None}
    held = held | {row.parts[kind].component: _part(family, kind, file) for kind, file in parts.items()}
    return {c: held[c] for c in (*row.components, *held) if c in held}


def _beside(path: Path, name: str) -> Path | None:
    folders = (path.parent, path.parent / "text_encoders")
    return next((file for folder in folders for file in sorted(folder.glob(name))), None)


def beside(path: Path) -> list[Path]:
    """Whatever the conversion of a file may take from beside it, be it of any family."""
    names = {part.beside for row in detect.FAMILIES.values() for part in row.parts.values()}
    return [file for name in sorted(names) if (file := _beside(path, name)) is not None] if path.is_file() else []


def _part(family: str, kind: str, path: Path) -> Component:
    """A network in a file, or a folder, of its own."""
    tensors = files.read(path).tensors
    alone, (kinds, what) = detect.family(path, tensors), PARTS[kind]
    if alone not in kinds:
        holds = next((w for k, w in PARTS.values() if alone in k), f"{alone} weights")
        raise Error(f"{path} holds {holds}, not {what}.", f"Give --{kind.replace('_', '-')} the file of {what}.")
    named = [
        (to.partition(".")[2], x)
        for key, x in tensors.items()
        for to in rules.rename(key, detect.FAMILIES[alone].table)
    ]
    name = detect.FAMILIES[family].parts[kind].component
    return by_itself(name, family, path, named)
