"""`mlxdiff inspect MODEL`: what a checkpoint or a converted model holds, and whether every tensor of it is understood.
It reads headers only. `mlxdiff inspect PICTURE` is in `provenance`."""

import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from mlx.utils import tree_flatten

from .. import description, foreign, provenance, store, weights
from ..console import Parser, run, say, say_json
from ..errors import Error
from ..families import FAMILIES
from ..foreign import path as expanded
from ..models import build
from ..recipe import Recipe, component_bits, component_dtype
from ..spelling import as_flags
from ..store.adapters import usual_loras
from . import Checkpoint, Component, check, lora, open
from .registry import LAYOUTS

_SHOWN = 20  # how many unmapped or missing tensors the text for people names; --json has all


def parser() -> Parser:
    p = Parser(prog="mlxdiff inspect", description=_WHAT)
    p.add_argument("model", metavar="MODEL|PICTURE", help="name, hub id, folder, .safetensors or .gguf; or a picture")
    what = "for machines: a line for the picture, or for each copy of the model"
    p.add_argument("--json", action="store_true", help=what)
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run("mlxdiff inspect", lambda: look(args.model, args.json))


_WHAT = "Say what a model on this machine is and what it holds, or where a picture comes from."


def look(model: str, as_json: bool, **options) -> int:
    """Print what is on this machine: the original and its conversions, or one of them. options: see `open`."""
    if provenance.is_picture(picture := expanded(model)):
        found = provenance.facts(picture)
        say_json(found) if as_json else say(provenance.describe(found))
        return 0
    copies, show = store.conversions(model), say_json if as_json else lambda facts: say(describe(facts))
    with ExitStack() as stack:
        try:
            path = stack.enter_context(store.original(model, half=True, offline=True))
            path = next(iter(usual_loras(path)), path)
        except Error as e:  # the original is not here, which is no error if a copy is
            if not copies:
                raise Error(e.problem, f"`mlxdiff convert {model} -o DIR` fetches it.") from None
        else:
            if (path / "model.json").is_file():
                copies = [path]
            elif lora.recognise(path):
                facts = lora.describe(path)
                say_json(facts) if as_json else say(describe_lora(facts))
            else:
                checkpoint = open(path, **options)
                show(of_checkpoint(checkpoint) | {"path": model})
                check(checkpoint)
        for folder in copies:
            show(of_folder(folder))
    return 0


def of_checkpoint(checkpoint: Checkpoint) -> dict:
    sound = not checkpoint.unmapped and not checkpoint.missing
    components = {name: _component(c) for name, c in checkpoint.components.items()}
    denoises = checkpoint.family in FAMILIES and FAMILIES[checkpoint.family].denoiser in components
    return {
        "family": checkpoint.family,
        "variant": checkpoint.variant,
        "layout": checkpoint.names,
        "prediction": checkpoint.prediction if sound and denoises else None,
        "components": components,
        "schedule": checkpoint.schedule,
        "tokenizers": list(checkpoint.tokenizers),
        "lacking": checkpoint.lacking,
        "part_of": None if checkpoint.part_of is None else str(checkpoint.part_of),
        "unmapped": checkpoint.unmapped,
        "missing": checkpoint.missing,
    }


def _component(component: Component) -> dict:
    held = Counter()
    for weight in component.weights.values():
        for piece in weight.pieces:
            held[piece.tensor.dtype] += piece.tensor.size // piece.parts
    return {
        "tensors": len(component.weights),
        "parameters": component.parameters,
        "bytes": held.total(),
        "dtype": "+".join(dtype for dtype, _ in held.most_common()),
    }


def of_folder(folder: Path) -> dict:
    """The same for a converted model, which is read as it is for drawing."""
    model, components = description.read(folder), {}
    for name, config in model.components.items():
        stored = tree_flatten(
            weights.load(folder / f"{name}.safetensors", model.family, config, model.recipe).parameters()
        )
        error = model.error.get(name)
        dtype = component_dtype(model.family, name, model.recipe.dtype)
        components[name] = {
            "tensors": len(stored),
            "parameters": sum(v.size for _, v in tree_flatten(build.build(config).parameters())),
            "bytes": sum(v.nbytes for _, v in stored),
            "dtype": str(Recipe(dtype, None if error is None else component_bits(model.family, name, model.recipe))),
            "error": error,
        }
    same = {key: getattr(model, key) for key in ("variant", "prediction", "schedule")}
    same |= {"family": model.family.name, "tokenizers": list(model.tokenizers)}
    return {"path": str(folder), "layout": "converted", "components": components} | same


def describe_lora(facts: dict) -> str:
    layers = ", ".join(f"{name} {n}" for name, n in facts["layers"].items())
    ranks = f", rank {', '.join(map(str, facts['ranks']))}" if facts["ranks"] else ""
    n = sum(facts["layers"].values())
    lines = [f"{facts['path']}: a LoRA of {n} layer{'s' * (n != 1)} ({layers}){ranks}"]
    lines.append(f"  fits {', '.join(facts['fits'])} and models of the same shapes")
    if facts["words"]:
        lines.append(f"  trained on {', '.join(f'{word!r:.60}' for word in facts['words'])}")
    return foreign.lines(lines)


_NAMES = {"single-file": "original names", "diffusers": "diffusers names", "converted": "converted"}


def describe(facts: dict) -> str:
    variant = f"{facts['variant']}, " if facts["family"] in FAMILIES else ""
    lines = [f"{facts['path']}: {_title(facts)}, {variant}{_NAMES[facts['layout']]}"]
    for name, c in facts["components"].items():
        error = "" if c.get("error") is None else f", quantized with an error of {c['error']:.2%}"
        size = f"{c['bytes'] / 1e9:8.3f} GB {c['dtype']}{error}"
        lines.append(f"  {name:16} {c['tensors']:5} tensors {c['parameters']:14,} parameters {size}")
    if facts["prediction"] is not None:
        settings = ", ".join(f"{k} {v}" for k, v in facts["schedule"].items() if v is not None)
        lines.append(f"  predicts {facts['prediction']}; {settings}")
    if facts["tokenizers"]:
        lines.append(f"  {', '.join(facts['tokenizers'])}")
    for title, names in (
        ("no place for", [f"{key!r}: {why}" for key, why in facts.get("unmapped", {}).items()]),
        ("missing", facts.get("missing", [])),
    ):
        lines += [f"  {title} {n}" for n in names[:_SHOWN]]
        if len(names) > _SHOWN:
            lines.append(f"  ... and {len(names) - _SHOWN} more ({title})")
    if facts.get("lacking"):
        lines.append(f"  not a whole model: no {', no '.join(facts['lacking'])}")
    elif facts["family"] not in FAMILIES:
        use = as_flags(LAYOUTS[facts["family"]].use)
        lines.append(f"  to use it: {use[0].lower()}{use[1:]}" if use else "  not a whole model: one network of it")
    if facts.get("part_of") is not None:
        lines.append(f"  the whole is {facts['part_of']}")
    return foreign.lines(lines)


def _title(facts: dict) -> str:
    title, whole = LAYOUTS[facts["family"]].title, len(facts["components"]) > 1
    return title if whole or facts["family"] not in FAMILIES else f"{title} {' '.join(facts['components'])}"


if __name__ == "__main__":
    sys.exit(main())
