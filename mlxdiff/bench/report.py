"""Figures that users send: `--report` writes one measurement as JSON and as a row of Markdown, `--table` makes one
table of such JSON files. They come from anywhere, so each is read strictly, and its text cannot format the page."""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from .. import foreign, whole
from ..errors import Error
from ..families import MODELS
from ..recipe import BITS, DTYPES
from ..store import local

FORMAT = 1
MOST_FILES = 1000
_LONGEST = 80  # characters of a text
_MOST_TUNING = 20
# The largest number of each field: beyond any machine, and small enough to print.
_MOST = {"memory_bytes": 2**50, "peak_bytes": 2**50, "width": 2**16, "height": 2**16, "steps": 1000, "batch": 2}
_MOST |= {"seconds_per_step": 1e6, "seconds": 1e8, "format": FORMAT}


@dataclass(frozen=True)
class Report:
    format: int
    chip: str
    memory_bytes: int
    system: str
    python: str
    mlx: str
    mlxdiff: str
    commit: str | None
    device: str
    model: str
    width: int
    height: int
    batch: int  # 2 with a pass for guidance
    steps: int
    bits: int | str | None
    dtype: str
    low_memory: bool
    seconds_per_step: float
    seconds: float  # of a picture
    peak_bytes: int
    tuning: tuple[str, ...]  # NAME=VALUE
    note: str


def report(facts: dict, asked: str, note: str = "") -> Report:
    """The part of a measurement that is worth sending. asked: the model as it was named; the name of a folder or file
    is its owner's, and is left out."""
    known = {name: facts[name] for name in (f.name for f in fields(Report)) if name in facts}
    made = known | {
        "format": FORMAT,
        "model": public_name(asked, facts["family"], facts["random"]),
        "seconds_per_step": round(facts["step"]["seconds"]["median"], 4),
        "seconds": round(facts["total"]["seconds"]["median"], 3),
        "peak_bytes": max(stage["peak_bytes"] for stage in facts["stages"].values()),
        "tuning": [f"{name}={value}"[:_LONGEST] for name, value in facts["tuning"].items()],
        "note": note,
    }
    return checked(made, "The report", "Shorten `note`.")


def public_name(asked: str, family: str, random: bool) -> str:
    if random:
        return f"{asked} (random weights)"
    return asked if asked in MODELS or local(asked) is None else f"a model of {family}"


def check_note(note: str) -> None:
    """Raise before the work if a note cannot be sent."""
    if not _sound("note", note):
        problem = f"The note {note!r:.60} is longer than {_LONGEST} characters, or has some that cannot be printed."
        raise Error(problem, "Shorten `note`.")


def checked(values: dict, what: str, fix: str) -> Report:
    """A Report of values from anywhere, every one of them checked."""
    hints = {f.name: f.type for f in fields(Report)}
    if values.get("format") != FORMAT or type(values["format"]) is not int:
        raise Error(f"{what} is not one that `mlxdiff bench --report` of this version wrote.", fix)
    odd = sorted(values.keys() ^ hints.keys())
    if odd:
        raise Error(f"{what} {'lacks' if odd[0] in hints else 'has an unknown'} {odd[0]!r:.60}.", fix)
    for name, value in values.items():
        if not foreign.fits(value, hints[name]) or not _sound(name, value):
            raise Error(f"{what} has {name} {value!r:.60}, which cannot be.", fix)
    return Report(**values | {"tuning": tuple(values["tuning"])})


def _sound(name: str, value: object) -> bool:
    if isinstance(value, str):
        named = {"bits": [*BITS], "dtype": [*DTYPES], "device": ["cpu", "gpu"]}
        return len(value) <= _LONGEST and value.isprintable() and value in named.get(name, [value])
    if isinstance(value, list):
        return len(value) <= _MOST_TUNING and all(_sound("", text) for text in value)
    if name == "bits":
        return value is None or value in BITS
    return type(value) not in (int, float) or 0 < value <= _MOST[name]


def read(file: Path) -> Report:
    fix = "Give files that `mlxdiff bench --report FILE` wrote."
    return checked(foreign.read_json(file, fix), str(file), fix)


def as_json(made: Report) -> str:
    return json.dumps(asdict(made), indent=1)


def write(made: Report, file: Path) -> None:
    """Write the JSON, whole or not at all."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        whole.write(file, f"{as_json(made)}\n".encode())
    except OSError as e:
        raise Error(f"{file} cannot be written: {e.strerror or e}.", "Choose another place.") from None


# ---- Markdown

HEAD = ("machine", "model", "drawn", "weights", "s/step", "picture", "peak memory", "versions")


def markdown(made: Report) -> list[str]:
    """The cells of a row, safe to paste: foreign text cannot format the page."""
    how = f", {', '.join(made.tuning)}" if made.tuning else ""
    where = f"{made.chip}, {made.memory_bytes / 2**30:.0f} GB, {made.system}" + (f": {made.note}" if made.note else "")
    commit = f" ({made.commit})" if made.commit else ""
    cells = (
        where,
        made.model,
        f"{made.width}x{made.height}, {made.steps} steps{', guided' if made.batch == 2 else ''}",
        (made.dtype if made.bits is None else f"{made.bits} bits" if isinstance(made.bits, int) else made.bits)
        + (", low memory" if made.low_memory else ""),
        f"{made.seconds_per_step:.3g}",
        f"{made.seconds:.3g} s",
        f"{made.peak_bytes / 1e9:.2f} GB",
        f"mlxdiff {made.mlxdiff}{commit}, mlx {made.mlx}, Python {made.python}{how}",
    )
    return [escaped(cell) for cell in cells]


def escaped(text: str) -> str:
    """Text that Markdown shows as it is: no link, mention, HTML or column comes of it."""
    text = re.sub(r"[\\`*_{}\[\]<>()#!|~&]", lambda m: f"\\{m[0]}", foreign.shown(text))
    return re.sub(r"@|(?<![\d ])\.(?=\D)|://", lambda m: "".join(f"&#{ord(c)};" for c in m[0]), text)


def table(reports: Iterable[Report]) -> str:
    """A table in Markdown, Macs first, and a sentence if there is none."""
    rows = sorted(
        reports, key=lambda r: (not is_mac(r), r.chip, r.memory_bytes, r.model, r.steps, str(r.bits), r.seconds)
    )
    lines = [HEAD, ["---"] * len(HEAD), *(markdown(r) for r in rows)]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    if any(map(is_mac, rows)):
        return text
    return f"{text}\n\nNo figures of a Mac were sent so far. `mlxdiff bench -m sdxl --report` writes them."


def is_mac(made: Report) -> bool:
    return made.system.startswith("macOS")


def table_of(files: list[Path]) -> str:
    if len(files) > MOST_FILES:
        raise Error(f"There are {len(files):,} files, more than {MOST_FILES:,}.", "Give fewer.")
    return table(read(file) for file in files)


def pasted(made: Report) -> str:
    """What a user pastes into an issue: the row, and the JSON that `--table` reads."""
    return f"{table([made]).partition(chr(10) * 2)[0]}\n\n```json\n{as_json(made)}\n```"
