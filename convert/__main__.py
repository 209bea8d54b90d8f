"""`python -m mlxdiff.convert MODEL -o DIR` writes a model folder. (`mlxdiff inspect` says what MODEL is.)"""

import sys
from pathlib import Path

from tqdm import tqdm

from .. import store
from ..console import Parser, run
from ..tokenizer_search import tokenizer_for
from ..weights import BITS, DTYPES, SMALLER, bits_of, default_dtype
from . import PARTS, PREDICTIONS, open, save
from .inspect import describe, of_folder


def parser() -> Parser:
    p = Parser(prog="mlxdiff convert", description="Turn a public checkpoint into a model folder.")
    p.add_argument("source", metavar="MODEL", help="name, hub id, folder in diffusers layout or .safetensors file")
    p.add_argument(
        "-o", "--output", metavar="DIR", type=Path, required=True, help="the folder; an older model's is replaced"
    )
    p.add_argument("-q", "--quantize", metavar="BITS", type=bits_of, choices=BITS, help=SMALLER)
    p.add_argument("--dtype", choices=DTYPES, help="default: what suits this machine")
    p.add_argument("--prediction", choices=PREDICTIONS, help="what the network predicts, where the file does not say")
    p.add_argument("--tokenizer", metavar="DIR", type=Path, help="tokenizer folder for a single-file checkpoint")
    for kind, (_, what) in PARTS.items():
        flag = f"--{kind.replace('_', '-')}"
        p.add_argument(flag, metavar="FILE", type=Path, help=f"{what} to use, where MODEL has none or another")
    p.add_argument("--no-t5", action="store_true", help="SD3: leave T5 out, for less memory")
    p.add_argument("--offline", action="store_true", help="never use the network, not even for a tokenizer")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run("mlxdiff convert", lambda: _convert(args))


def _convert(args) -> int:
    dtype = default_dtype() if args.dtype is None else args.dtype
    parts = {kind: file for kind in PARTS if (file := getattr(args, kind)) is not None}
    with tqdm(unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:

        def show(stage: str, done: int, total: int) -> None:
            bar.set_description(stage, refresh=False)
            bar.total = total
            bar.update(done - bar.n)

        fetch = {"half": dtype != "float32", "t5": not args.no_t5, "offline": args.offline, "progress": show}
        with store.original(args.source, **fetch) as path:
            checkpoint = open(path, args.prediction, parts, not args.no_t5)
            words = args.tokenizer
            if words is None:
                words = tokenizer_for(checkpoint, args.offline, show)
            save(checkpoint, args.output, args.quantize, dtype, words, show)
    print(describe(of_folder(args.output)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
