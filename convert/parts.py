"""Networks that people keep in files of their own: those that the caller gives, or that lie beside a denoiser."""

from pathlib import Path

from ..errors import Error
from ..families import PARTS
from . import detect, rules
from . import source as files
from .component import Component, by_itself
from .layout import Layout
from .registry import LAYOUTS

# part -> the layouts that its file may have
KINDS = {
    "vae": ("vae",),
    "clip": ("clip", "clip-g"),
    "clip_g": ("clip-g",),
    "t5": ("t5",),
    "text_encoder": ("qwen3",),
}


def with_parts(
    path: Path, layout: Layout, held: dict[str, Component], given: dict[str, str | Path], left_out: set[str]
) -> dict[str, Component]:
    """The networks of a checkpoint, the parts that are given, and, if it lacks others, those that lie beside it.
    Nothing is looked for that is left out."""
    for part in given:
        if part not in layout.parts:
            takes = ", ".join(f"`{p}`" for p in layout.parts)
            raise Error(f"{path} takes no `{part}`.", f"It takes {takes}." if takes else f"Leave `{part}` out.")
        if layout.parts[part].component in left_out:
            raise Error(f"`{part}` gives what `t5=False` leaves out.", "Use one of them.")
    taken = {part: Path(file) for part, file in given.items()}
    if path.is_file() and layout.family is not None and layout.family.denoiser in held:
        lacking = layout.networks.keys() - held.keys() - left_out
        near = {n: _beside(path, p.beside) for n, p in layout.parts.items() if p.component in lacking}
        taken = {n: file for n, file in near.items() if file is not None} | taken
    held = held | {layout.parts[part].component: _part(layout, part, file) for part, file in taken.items()}
    return {c: held[c] for c in (*layout.networks, *held) if c in held}


def _beside(path: Path, name: str) -> Path | None:
    folders, names = (path.parent, path.parent / "text_encoders"), (name, name.replace(".safetensors", ".gguf"))
    return next((file for n in names for folder in folders for file in sorted(folder.glob(n))), None)


def beside(path: Path) -> list[Path]:
    """The files beside a file that its conversion may use, whatever its family is."""
    names = {part.beside for layout in LAYOUTS.values() for part in layout.parts.values()}
    return [file for name in sorted(names) if (file := _beside(path, name)) is not None] if path.is_file() else []


def _part(layout: Layout, part: str, path: Path) -> Component:
    """The network in a file or a folder that holds nothing else."""
    tensors = files.read(path).tensors
    key, _ = detect.layout(path, tensors)
    if key not in KINDS[part]:
        holds = LAYOUTS[key].title if LAYOUTS[key].family is None else f"{key} weights"
        raise Error(f"{path} holds {holds}, not {PARTS[part]}.", f"Give `{part}` the file of {PARTS[part]}.")
    targets = [(to, x) for name, x in tensors.items() for to in rules.rename(name, LAYOUTS[key].table)]
    named = [(to.partition(".")[2], x) for to, x in targets]
    return by_itself(layout.parts[part].component, layout, path, named)
