"""`python -m mlxdiff.convert MODEL -o DIR` writes a model folder; `--check` is `mlxdiff inspect`."""

import sys
from pathlib import Path

from tqdm import tqdm

from .. import description, store
from ..console import Parser, run, say
from ..dialects import lora
from ..families import PARTS, name_of
from ..recipe import BITS, DTYPES, OF_TEXT, SMALLER, TEXT_BITS, bits_of, default_dtype, recipe
from ..spelling import flag
from ..store import Progress, adapters
from ..store.tokenizer import tokenizer_for
from . import PREDICTIONS, Checkpoint, describe, open, save
from .inspect import describe as describe_facts
from .inspect import look, of_folder


def parser() -> Parser:
    p = Parser(prog="mlxdiff convert", description="Turn a public checkpoint into a model folder.")
    p.add_argument("source", metavar="MODEL", help="name, hub id, diffusers folder, .safetensors or .gguf file")
    p.add_argument("-o", "--output", metavar="DIR", type=Path, help="the folder; an older model's is replaced")
    p.add_argument("-q", "--quantize", metavar="BITS", type=bits_of, choices=BITS, help=SMALLER)
    p.add_argument("--text-bits", metavar="BITS", type=bits_of, choices=TEXT_BITS, help=OF_TEXT)
    p.add_argument("--dtype", choices=DTYPES, help="default: what suits this machine")
    p.add_argument("--prediction", choices=PREDICTIONS, help="what the network predicts, if the file does not say it")
    p.add_argument("--tokenizer", metavar="DIR", type=Path, help="tokenizer folder for a single-file checkpoint")
    for part, what in PARTS.items():
        p.add_argument(flag(part), metavar="FILE", type=Path, help=f"{what} to use, if MODEL has none or another")
    many = "a LoRA that changes the weights before they are quantized; may be given several times"
    p.add_argument("--lora", dest="loras", action="append", default=[], metavar="FILE[:SCALE]", help=many)
    p.add_argument("--lora-dir", type=Path, metavar="DIR", help="where --lora finds names ($MLXDIFF_LORAS)")
    p.add_argument("--no-t5", action="store_true", help="SD3: leave T5 out, for less memory")
    p.add_argument("--offline", action="store_true", help="never use the network, not even for a tokenizer")
    p.add_argument("--check", action="store_true", help="write nothing: say what `mlxdiff inspect MODEL` says")
    p.add_argument("--json", action="store_true", help="with --check: for machines")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.check and args.output is not None:
        parser().error("--check only looks: leave out -o")
    if args.json and not args.check:
        parser().error("--json goes with --check")
    if args.output is None and not args.check:
        parser().error("there is no folder to write to: give one with -o, or only look with --check")
    parts = {part: file for part in PARTS if (file := getattr(args, part)) is not None}
    options = {"prediction": args.prediction, "parts": parts, "t5": not args.no_t5}
    body = (lambda: look(args.source, args.json, **options)) if args.check else (lambda: _convert(args, options))
    return run("mlxdiff convert", body)


def _convert(args, options: dict) -> int:
    dtype = default_dtype() if args.dtype is None else args.dtype
    folder, name = adapters.folder_of(args.lora_dir), None if store.local(args.source) else name_of(args.source)
    if name is not None:  # before it is fetched
        for file, _ in map(lora, args.loras):
            adapters.check(file, "LoRA", description.published(name, recipe(args.quantize, dtype)), folder)
    with tqdm(unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:

        def show(stage: str, done: int, total: int) -> None:
            bar.set_description(stage, refresh=False)
            bar.total = total
            bar.update(done - bar.n)

        fetch = {"half": dtype != "float32", "t5": not args.no_t5, "offline": args.offline, "progress": show}
        with store.original(args.source, **fetch) as path:
            checkpoint = open(path, **options)
            words = args.tokenizer
            if words is None:
                words = tokenizer_for(checkpoint, args.offline, show)
            loras = _loras(args, folder, checkpoint, show)
            save(checkpoint, args.output, args.quantize, dtype, words, show, loras, args.text_bits)
    say(describe_facts(of_folder(args.output)))
    return 0


def _loras(args, folder: Path | None, checkpoint: Checkpoint, show: Progress) -> list[tuple[Path, float]]:
    """The files of the LoRAs, and their scales."""
    if not args.loras:
        return []
    model, found = describe(checkpoint, recipe(args.quantize, args.dtype)), []
    for name, scale in map(lora, args.loras):
        row = adapters.published(name, model, folder)
        path = adapters.find(name, "LoRA", model, offline=args.offline, folder=folder, progress=show)
        found.append((path, adapters.scale(row, scale)))
    return found


if __name__ == "__main__":
    sys.exit(main())
