"""A process that resolves models as it is told to on its standard input, a JSON line each, with a converter that only
copies. Environment (hub address, caches, offline) is read when a process starts, so the tests of the hub need one."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlxdiff.convert
from mlxdiff import Error, store
from mlxdiff.description import published
from mlxdiff.families import MODELS
from mlxdiff.recipe import Recipe

UNET = {"unet": MODELS["sd15"].networks["unet"]}


def fake_open(source, prediction=None, parts=None, t5=True):
    source = Path(source)
    words = {"tokenizer": source / "tokenizer"} if (source / "tokenizer").is_dir() else {}
    return SimpleNamespace(
        path=source,
        family="sd1",
        components={},
        unmapped={},
        missing=[],
        lacking=[],
        tokenizers=words,
        prediction="eps" if prediction is None else prediction,
    )


def fake_describe(checkpoint, recipe):
    return replace(published("sd15", recipe), name=checkpoint.path.resolve().name, components=UNET)


def fake_save(checkpoint, target, bits, dtype, tokenizer, progress):
    """Everything of the source in one component file, in order, so that a test can tell what was converted."""
    source, target = checkpoint.path, Path(target)
    files = [source] if source.is_file() else sorted(f for f in source.rglob("*") if f.is_file())
    progress("convert", 0, len(files))
    target.mkdir()
    (target / "tokenizer").mkdir()
    names = {} if source.is_file() else {f.relative_to(source).as_posix(): f.stat().st_size for f in files}
    with open(target / "unet.safetensors", "wb") as out:
        for file in files:
            if file.suffix == ".safetensors":
                out.write(file.read_bytes())
    if tokenizer is not None:
        (target / "tokenizer" / "from").write_text(str(tokenizer), encoding="utf-8")
    (target / "files.json").write_text(json.dumps(names), encoding="utf-8")
    model = fake_describe(checkpoint, Recipe(dtype, bits))
    replace(model, tokenizers=("tokenizer",), prediction=checkpoint.prediction).write(target)
    progress("convert", len(files), len(files))


def fake() -> None:
    mlxdiff.convert.open, mlxdiff.convert.save = fake_open, fake_save
    mlxdiff.convert.describe = fake_describe


def main() -> None:
    import huggingface_hub.constants as constants

    constants.DOWNLOAD_CHUNK_SIZE = 2**16  # so that a file of a test arrives in several pieces
    if os.environ.get("STORE_WORKER") != "real":
        fake()
    print("ready", flush=True)
    for line in sys.stdin:
        told = []

        def progress(stage: str, done: int, total: int, told: list = told) -> None:
            told.append((stage, done, total))
            if stage == "wait":
                print(json.dumps("waiting"), flush=True)

        try:
            call = json.loads(line)
            model = call.pop("model")
            if call.pop("taesd", False):
                said = {"width": store.taesd(model, **call, progress=progress).config.width}
            else:
                said = {"folder": str(store.resolve(model, **call, progress=progress))}
        except Error as e:
            said = {"problem": e.problem, "fix": e.fix}
        print(json.dumps(said | {"told": told}), flush=True)


if __name__ == "__main__":
    main()
