"""`python -m mlxdiff.convert SOURCE -o DIR` writes a model folder; `--check` says what SOURCE is, from headers."""

import json
import sys
from pathlib import Path

from tqdm import tqdm

from .. import store
from ..console import Parser, run
from ..errors import Error
from ..weights import BITS, DTYPES, SMALLER, bits_of
from . import PREDICTIONS, Checkpoint, check, convert, open
from .checkpoint import PARTS
from .detect import FAMILIES

_ALONE = {
    "clip": "CLIP text encoder",
    "clip-g": "CLIP text encoder with projection",
    "t5": "T5 text encoder",
    "vae": "VAE",
    "taesd": "TAESD decoder, for previews",
}
_SHOWN = 20  # of what is unmapped or missing, in the text for people; --json has all


def parser() -> Parser:
    p = Parser(prog="mlxdiff convert", description="Turn a public checkpoint into a model folder, or check one.")
    p.add_argument("source", metavar="SOURCE", type=Path, help=".safetensors file, or folder in diffusers layout")
    p.add_argument("-o", "--output", metavar="DIR", type=Path, help="the model folder to write")
    p.add_argument("-q", "--quantize", metavar="BITS", type=bits_of, choices=BITS, help=SMALLER)
    p.add_argument("--dtype", choices=DTYPES, help="default: what suits this machine")
    p.add_argument("--prediction", choices=PREDICTIONS, help="what the network predicts, where the file does not say")
    p.add_argument("--tokenizer", metavar="DIR", type=Path, help="tokenizer folder for a single-file checkpoint")
    for kind, (_, what) in PARTS.items():
        flag = f"--{kind.replace('_', '-')}"
        p.add_argument(flag, metavar="FILE", type=Path, help=f"{what} to use, where SOURCE has none or another")
    p.add_argument("--offline", action="store_true", help="never use the network, not even for a tokenizer")
    p.add_argument("--check", action="store_true", help="read headers only; exit 0 if every tensor is understood")
    p.add_argument("--json", action="store_true", help="with --check: for machines")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.check and args.output is not None:
        parser().error("--check only looks: leave out -o")
    if args.json and not args.check:
        parser().error("--json goes with --check")
    return run("mlxdiff convert", lambda: _check(args) if args.check else _convert(args))


def _convert(args) -> int:
    if args.output is None:
        raise Error("There is no folder to write to.", "Give one with -o DIR, or only look with --check.")
    with tqdm(desc="convert", unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:

        def show(_: str, done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        words = args.tokenizer
        if words is None:
            words = store.tokenizer_for(open(args.source, args.prediction, _parts(args)), args.offline, show)
        convert(args.source, args.output, args.quantize, args.dtype, args.prediction, words, show, _parts(args))
    print(args.output)
    return 0


def _check(args) -> int:
    checkpoint = open(args.source, args.prediction, _parts(args))
    print(json.dumps(report(checkpoint)) if args.json else _describe(checkpoint))
    check(checkpoint)
    return 0


def _parts(args) -> dict[str, Path]:
    return {kind: file for kind in PARTS if (file := getattr(args, kind)) is not None}


def report(checkpoint: Checkpoint) -> dict:
    return {
        "family": checkpoint.family,
        "variant": checkpoint.variant,
        "layout": checkpoint.layout,
        "components": {
            name: {"tensors": len(c.weights), "parameters": c.parameters} for name, c in checkpoint.components.items()
        },
        "unmapped": list(checkpoint.unmapped),
        "missing": checkpoint.missing,
    }


def _describe(checkpoint: Checkpoint) -> str:
    names = "original names" if checkpoint.layout == "single-file" else "diffusers names"
    lines = [f"{checkpoint.path}: {_title(checkpoint)}, {checkpoint.variant}, {names}"]
    for name, c in checkpoint.components.items():
        lines.append(f"  {name:16} {len(c.weights):5} tensors {c.parameters:14,} parameters")
    for title, names in (
        ("no place for", [f"{key!r}: {why}" for key, why in checkpoint.unmapped.items()]),
        ("missing", checkpoint.missing),
    ):
        lines += [f"  {title} {n}" for n in names[:_SHOWN]]
        if len(names) > _SHOWN:
            lines.append(f"  ... and {len(names) - _SHOWN} more ({title})")
    row = FAMILIES[checkpoint.family]
    lacking = [c for c in row.components if c not in checkpoint.components and c not in row.optional]
    if lacking:
        lines.append(f"  not a whole model: no {', no '.join(lacking)}")
    return "\n".join(lines)


def _title(checkpoint: Checkpoint) -> str:
    if checkpoint.family in _ALONE:
        return _ALONE[checkpoint.family]
    whole = len(checkpoint.components) > 1
    return f"{checkpoint.family} checkpoint" if whole else f"{checkpoint.family} {' '.join(checkpoint.components)}"


if __name__ == "__main__":
    sys.exit(main())
