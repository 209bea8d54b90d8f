"""`mlxdiff studio` opens the studio as a page of its own. With --lab it is a notebook in JupyterLab."""

import os
import sys
import webbrowser
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Thread

from .. import signing
from ..console import Parser, run, say
from . import lab


def main(argv: list[str] | None = None) -> int:
    p = Parser(prog="mlxdiff studio", description="Draw in the browser. The page is served to this machine alone.")
    p.add_argument("-m", "--model", metavar="MODEL", help="name, hub id, folder, .safetensors or .gguf")
    where = "where pictures are kept (default pictures)"
    p.add_argument("-o", "--output", "--out", dest="out", metavar="DIR", help=where)  # --out: its first name
    p.add_argument("--lora-dir", metavar="DIR", help="where your LoRAs are ($MLXDIFF_LORAS)")
    what = "the studio in a notebook, in JupyterLab (default studio.ipynb); it is created if it does not exist"
    p.add_argument("--lab", nargs="?", type=Path, const=Path("studio.ipynb"), metavar="NOTEBOOK", help=what)
    p.add_argument("--sign", action="store_true", help="add Content Credentials to every picture, as generate does")
    p.add_argument("--no-browser", action="store_true", help="only print the address")
    args = p.parse_args(argv)
    if args.lora_dir is not None:
        if not Path(args.lora_dir).is_dir():
            p.error(f"There is no folder {args.lora_dir}. Give the folder of your LoRAs: --lora-dir DIR.")
        os.environ["MLXDIFF_LORAS"] = args.lora_dir  # also for a notebook's kernel
    if args.lab is None:
        return run("mlxdiff studio", lambda: studio(args.model, args.out, not args.no_browser, args.sign))
    if args.out is not None:
        p.error("--output is for the page alone: in a notebook, set studio.folder")
    if args.sign:
        p.error("--sign is for the page alone: in a notebook, set studio.signer")
    return run("mlxdiff studio", lambda: lab.studio(args.lab.resolve(), args.model, not args.no_browser))


def studio(model: str | None, folder: str | None, browser: bool, sign: bool = False) -> int:
    """Serve the page until Ctrl-C, until a signal ends this process, or until it loses its terminal."""
    settings = {k: v for k, v in (("model", model), ("folder", folder)) if v is not None}
    if model is not None:
        from .. import store

        store.check_name(model)
    if sign:
        settings["signer"] = signing.announced()
    lab.needed("tornado", "ipywidgets", "anywidget", "jupyter_core")
    say("Starting the studio ...")
    from .server import serve
    from .studio import Studio

    with ExitStack() as stack:

        def tell(address: str) -> None:
            say(f"The studio is at {address}\nCtrl-C here ends it.")
            if browser:
                page = stack.enter_context(lab.private_page(address))
                # In a thread: a browser in the terminal would block.
                Thread(target=webbrowser.open, args=[page], daemon=True).start()

        def make() -> Studio:
            made = Studio(**settings)
            Thread(target=made._try, args=[made.recall], daemon=True).start()  # many large pictures take seconds
            return made

        with suppress(KeyboardInterrupt):
            serve(make, tell)
    return 0


if __name__ == "__main__":
    sys.exit(main())
