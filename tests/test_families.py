"""The families. References: the list in mlxdiff/README.md of what a new family touches, held to the code by reading it;
a family made up here, which draws without any other file knowing of it."""

import ast
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import mlxdiff
from mlxdiff import builtin, description
from mlxdiff.bench.random_model import random_pipeline
from mlxdiff.errors import Error
from mlxdiff.families import FAMILIES, MODELS, base
from mlxdiff.models import build
from mlxdiff.recipe import Recipe, recipe
from mlxdiff.request import Defaults, Request
from tests.test_imports import ROOT, modules

FLOAT32 = Recipe("float32", None)

# ---- one family, one file

# What adding a transformer family touches, as mlxdiff/README.md lists it; {} is the family's name.
TOUCHED = ("mlxdiff/models/{}.py", "convert/{}.py", "mlxdiff/families/{}.py")
REGISTRIES = ("mlxdiff/models/build.py", "mlxdiff/families/__init__.py", "convert/registry.py")


def mentions(path: Path, name: str) -> list[int]:
    """The lines on which code, comments and texts for people aside, names a family: a string that is its name, an
    import of its module, a name or an attribute."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        said = {
            ast.Constant: lambda n: [n.value],
            ast.Name: lambda n: [n.id],
            ast.Attribute: lambda n: [n.attr],
            ast.ImportFrom: lambda n: [*(n.module or "").split("."), *(a.name for a in n.names)],
            ast.Import: lambda n: [part for a in n.names for part in a.name.split(".")],
        }.get(type(node), lambda n: [])(node)
        if any(isinstance(s, str) and s.lower() == name for s in said):
            found.append(node.lineno)
    return found


# network -> files of other networks that are built of its layers, or read with its rules
REUSED = {"flux": {"convert/flux2.py", "mlxdiff/models/flux2.py", "mlxdiff/models/zimage.py"}}
REUSED["flux"] |= {"convert/flux_controlnet.py", "mlxdiff/models/flux_controlnet.py"}
REUSED["sd3"] = {"convert/sd3_controlnet.py", "mlxdiff/models/sd3_controlnet.py"}


@pytest.mark.parametrize("name", ["sd3", "flux", "flux2", "zimage"])
def test_a_transformer_family_is_known_to_its_own_files_and_the_registries_alone(name):
    known = {path.relative_to(ROOT).as_posix() for path in modules().values() if mentions(path, name)}
    assert known - {file.format(name) for file in TOUCHED} - set(REGISTRIES) == REUSED.get(name, set())


def test_the_map_lists_what_a_new_family_touches():
    text = (ROOT / "mlxdiff" / "README.md").read_text(encoding="utf-8")
    (row,) = (line for line in text.splitlines() if line.startswith("| a family of models |"))
    for file in (*TOUCHED, *REGISTRIES):
        assert f"`{file.format('NAME')}`" in row, file


def test_the_search_for_mentions_can_find(tmp_path):
    file = tmp_path / "a.py"
    file.write_text('from .models import flux\nx = "flux" if y else z.FLUX  # flux\nw = "FLUX.1 dev"\n')
    assert mentions(file, "flux") == [1, 2, 2]


def test_a_family_is_its_row(monkeypatch):
    """One made up here, on FLUX's network with other rows, draws a picture in what its rows say."""
    networks = MODELS["flux-schnell"].networks
    small = {
        "transformer": replace(
            networks["transformer"], width=256, heads=2, hidden=512, double=1, single=1, context=64, pooled=64
        ),
        "text_encoder": replace(networks["text_encoder"], vocab=514, width=64, layers=2, heads=1, hidden=64),
        "text_encoder_2": replace(networks["text_encoder_2"], vocab=300, width=64, layers=1, heads=1, hidden=64),
        "vae": replace(networks["vae"], channels=(8, 16, 16, 16), layers=1, groups=4),
    }
    toy = replace(
        FAMILIES["flux"],
        name="toy",
        title="Toy",
        defaults=Defaults(size=64, steps=2, guidance=3.0),
        guidance=base.SECOND_PASS,
        takes=("shift",),
        variants={"base": base.Variant()},
    )
    row = replace(MODELS["flux-schnell"], family=toy, variant="base", networks=small, defaults=toy.defaults)
    monkeypatch.setitem(FAMILIES, "toy", toy)
    monkeypatch.setitem(MODELS, "toy", row)
    pipe = random_pipeline("toy", "float32")
    result = pipe("a red house", negative="blue", seed=1)
    assert result.image.size == (64, 64)
    assert pipe.description.passes(result.request) == 2
    with pytest.raises(Error, match=r"true_cfg is for FLUX.1; toy is Toy."):
        pipe.resolve("a red house", true_cfg=2.0)


# ---- rows that agree with one another


@pytest.mark.parametrize("name", MODELS)
def test_a_named_model_has_the_networks_its_family_asks_for(name):
    model = description.published(name, FLOAT32)
    model.check_draws()
    assert description._misplaced(model.family, model.components) is None
    assert build.name_of(model.net) == model.family.network
    assert model.usual_latents != (name in builtin.NAMES)  # whose own VAE draws its previews
    assert model.defaults == MODELS[name].defaults
    if not model.row.reads:  # else it cannot draw from a prompt alone: tests/test_masks.py
        model.resolve(Request(""))


@pytest.mark.parametrize("name", MODELS)
def test_a_description_is_read_as_it_was_written(tmp_path, name):
    model = replace(description.published(name, recipe(4, "float16")), error={"vae": 0.5}, tokenizers=("tokenizer",))
    model.write(tmp_path)
    assert description.read(tmp_path) == model


def test_variants_that_cannot_draw_say_what_they_need(tmp_path):
    family = FAMILIES["flux"]
    row = replace(family.variants["fill"], needs=("a picture and a mask",))
    family = replace(family, variants={"fill": row})
    fill = replace(description.published("flux-dev", FLOAT32), family=family, variant="fill")
    with pytest.raises(Error, match="is a fill model, which also needs a picture and a mask"):
        fill.check_draws()


# ---- defaults are those of what a folder holds, not of what it is called


def test_a_folder_that_is_called_as_another_model_keeps_its_own_defaults(tmp_path, monkeypatch):
    shutil.copytree(builtin.FOLDER, tmp_path / "sdxl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLXDIFF_CACHE", str(tmp_path / "cache"))
    pipe = mlxdiff.load("sdxl")
    assert (pipe.name, pipe.description.family.name) == ("sdxl", "sd1")
    assert pipe.description.defaults == FAMILIES["sd1"].defaults
    assert pipe.resolve("x").width == 512


def test_a_variant_that_is_called_as_another_model_keeps_its_own_defaults():
    schnell = replace(description.published("flux-schnell", FLOAT32), name="flux-dev")
    assert schnell.defaults.steps == 4
