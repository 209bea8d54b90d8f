"""Model folders. References: safetensors' own reader for the file format, mx.quantize for quantized layers, and the
promise of strictness: what is missing, unknown or misshapen is an Error that names the tensor."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors import safe_open

from mlxdiff import convert, description, load, store, weights
from mlxdiff.bench.step import kernels
from mlxdiff.errors import Error
from mlxdiff.families import FAMILIES
from mlxdiff.models import build, clip
from mlxdiff.recipe import BITS, DTYPES, Recipe, component_dtype, default_dtype, quantization_plan

CONFIG = clip.Config(
    vocab=50, positions=7, width=64, layers=2, heads=2, hidden=96, act="gelu", projection=32, eos=49, eps=1e-5
)
SD1, FILE = FAMILIES["sd1"], "text_encoder.safetensors"


def arrays(seed: int = 0) -> dict[str, mx.array]:
    module = build.build(CONFIG)
    rng = np.random.default_rng(seed)
    return {k: mx.array(rng.normal(size=v.shape).astype(np.float32)) for k, v in tree_flatten(module.parameters())}


def write(folder: Path, tensors: dict, dtype: str = "float32", bits: int | str | None = None) -> Recipe:
    recipe = Recipe(dtype, bits)
    with weights.Writer(folder / FILE, SD1, CONFIG, recipe) as out:
        for key, value in reversed(tensors.items()):  # any order
            out.put(key, value)
    return recipe


def read(folder: Path, recipe: Recipe) -> nn.Module:
    return weights.load(folder / FILE, SD1, CONFIG, recipe)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_written_is_read(tmp_path, dtype):
    tensors = arrays()
    module = read(tmp_path, write(tmp_path, tensors, dtype))
    for key, value in tree_flatten(module.parameters()):
        assert value.dtype == DTYPES[dtype]
        assert mx.array_equal(value, tensors[key].astype(value.dtype)), key


def test_the_file_is_safetensors(tmp_path):
    tensors = arrays()
    write(tmp_path, tensors)
    with safe_open(tmp_path / "text_encoder.safetensors", "numpy") as f:
        assert set(f.keys()) == tensors.keys()
        for key in f.keys():  # noqa: SIM118 (not a dict)
            assert np.array_equal(f.get_tensor(key), np.array(tensors[key]))


# What -q takes -> what mx.quantize is told, and an error no normal weights exceed. In whole bits that is the noise of
# rounding, a step / sqrt(12), where the steps span 5.5 sigma, as far as the ends of a group of 64 may lie apart; small
# floats lose half a unit of their last place, 1 of 2 or 4 bits, or less.
QUANTIZED = {
    3: ({"bits": 3}, 0.2),
    4: ({"bits": 4}, 0.1),
    5: ({"bits": 5}, 0.05),
    6: ({"bits": 6}, 0.024),
    8: ({"bits": 8}, 0.006),
    "mxfp4": ({"mode": "mxfp4"}, 0.13),
    "mxfp8": ({"mode": "mxfp8"}, 0.03),
    "nvfp4": ({"mode": "nvfp4"}, 0.1),
}


def test_every_recipe_is_looked_at():
    assert QUANTIZED.keys() == BITS.keys()


@pytest.mark.parametrize("bits", BITS)
def test_quantized_layers_hold_what_mx_quantize_gives(tmp_path, bits):
    tensors, (told, _) = arrays(), QUANTIZED[bits]
    module = read(tmp_path, write(tmp_path, tensors, "float16", bits))
    for name, group in (("fc1", 64), ("fc2", 32)):  # 64 and 96 wide
        group = {"mode": "affine", "group_size": group} if "mode" not in told else {}
        layer = module.encoder.layers[0].mlp[name]
        theirs = mx.quantize(tensors[f"encoder.layers.0.mlp.{name}.weight"].astype(mx.float16), **told, **group)
        parts = [layer[p] for p in ("weight", "scales", "biases") if layer.get(p) is not None]
        assert all(mx.array_equal(ours, part) for ours, part in zip(parts, theirs, strict=True))
        x = mx.random.normal((3, layer.scales.shape[1] * layer.group_size), key=mx.random.key(0)).astype(mx.float16)
        want = x @ mx.dequantize(*theirs, **told, **group).astype(mx.float16).T + layer.bias
        # Sums of up to 96 products of float16, about 20 large, in two orders.
        assert mx.abs(layer(x) - want).max() < 0.1
        assert layer(x).dtype == mx.float16
    assert module.text_projection.weight.dtype == mx.float16  # kept whole, as the embeddings are
    assert module.embeddings.token_embedding.weight.dtype == mx.float16


@pytest.mark.parametrize("bits", BITS)
def test_a_reloaded_model_is_written_bit_for_bit(tmp_path, bits):
    """What is quantized once stays: what is loaded and saved as it is, is the same file again."""
    recipe = write(tmp_path, arrays(), "bfloat16", bits)
    module = read(tmp_path, recipe)
    (tmp_path / "again").mkdir()
    mx.save_safetensors(str(tmp_path / "again" / "text_encoder.safetensors"), dict(tree_flatten(module.parameters())))
    again = read(tmp_path / "again", recipe)
    for (key, a), (other, b) in zip(*(tree_flatten(m.parameters()) for m in (module, again)), strict=True):
        assert (key, a.dtype) == (other, b.dtype)
        assert mx.array_equal(a, b), key


@pytest.mark.parametrize("bits", BITS)
def test_the_error_of_a_recipe(tmp_path, monkeypatch, bits):
    """Against the definition, in float64 over what the reloaded layers hold; a row at a time, or all at once."""
    tensors, found = arrays(), []
    for rows in (1, weights._ROWS):
        monkeypatch.setattr(weights, "_ROWS", rows)
        with weights.Writer(tmp_path / FILE, SD1, CONFIG, Recipe("float32", bits)) as out:
            for key, value in tensors.items():
                out.put(key, value)
        found.append(out.error)
    lost = whole = 0.0
    for path, layer in read(tmp_path, Recipe("float32", bits)).named_modules():
        if isinstance(layer, nn.QuantizedLinear):
            how = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode, "dtype": mx.float32}
            back = np.array(mx.dequantize(layer.weight, layer.scales, layer.get("biases"), **how), np.float64)
            true = np.array(tensors[f"{path}.weight"], np.float64)
            lost, whole = lost + np.square(back - true).sum(), whole + np.square(true).sum()
    assert found == pytest.approx([(lost / whole) ** 0.5] * 2, rel=1e-5)  # sums in float32
    most = QUANTIZED[bits][1]
    assert most / 2 < found[0] < most


def test_nothing_quantized_has_no_error(tmp_path):
    tensors = arrays()
    with weights.Writer(tmp_path / FILE, SD1, CONFIG, Recipe("float32", None)) as out:
        for key, value in tensors.items():
            out.put(key, value)
    assert out.error is None


@pytest.mark.parametrize("bits", [None, 4, "mxfp8"])
def test_a_folder_loads_lazily(tmp_path, bits):
    """Opened, it holds no memory, nor what quantized layers begin with; evaluated, what its file holds."""
    tensors = arrays()
    recipe = write(tmp_path, tensors, "float16", bits)
    size = sum(v.nbytes for v in mx.load(str(tmp_path / "text_encoder.safetensors")).values())
    del tensors
    before = mx.get_active_memory()
    module = read(tmp_path, recipe)
    assert mx.get_active_memory() == before
    mx.eval(module.parameters())
    assert size <= mx.get_active_memory() - before < 1.2 * size + 2**16  # MLX rounds up what it allocates


def test_layers_no_group_divides_stay_whole():
    for width, takes in ((64, set(BITS)), (96, set(BITS)), (80, {"nvfp4"}), (72, set())):
        module = build.build(replace(CONFIG, width=width, heads=1))
        found = {b for b in BITS if "encoder.layers.0.mlp.fc1" in quantization_plan(SD1, "text_encoder", module, b)}
        assert found == takes


def break_missing(tensors):
    del tensors["final_layer_norm.bias"]


def break_unknown(tensors):
    tensors["surprise"] = mx.zeros(3)


def break_shape(tensors):
    tensors["final_layer_norm.bias"] = mx.zeros(3)


@pytest.mark.parametrize(
    ("damage", "says"),
    [(break_missing, "lacks final_layer_norm.bias"), (break_unknown, "surprise"), (break_shape, "shape (3,)")],
)
def test_a_damaged_folder_is_named(tmp_path, damage, says):
    tensors = arrays()
    recipe = write(tmp_path, tensors)
    damage(tensors)
    mx.save_safetensors(str(tmp_path / "text_encoder.safetensors"), tensors)
    with pytest.raises(Error) as e:
        read(tmp_path, recipe)
    assert says in str(e.value)


def test_a_truncated_component_is_named(tmp_path):
    recipe = write(tmp_path, arrays())
    path = tmp_path / "text_encoder.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Error, match=r"text_encoder\.safetensors"):
        read(tmp_path, recipe)


@pytest.mark.parametrize("text", ["", "[]", "{", json.dumps({"format": 99})])
def test_a_damaged_description_is_named(tmp_path, text):
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(Error, match=r"model\.json"):
        description.read(tmp_path)


def test_converting_what_is_converted_is_refused_and_an_older_one_says_so(tmp_path):
    with pytest.raises(Error, match="is converted already"):
        convert.open(store.resolve("storybook"))
    (tmp_path / "model.json").write_text(json.dumps({"format": description.FORMAT - 1}))
    with pytest.raises(Error, match=r"this version reads \d+\. Convert the checkpoint again"):
        convert.open(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("family", "sd9"),
        ("family", None),
        ("prediction", 3),
        ("recipe", None),
        ("recipe", {"bits": None, "dtype": "float12"}),
        ("components", {"unet": 3}),
    ],
)
def test_a_description_says_all_that_drawing_asks(tmp_path, key, value):
    """Reference: the built-in model's own, which opens, with one of its entries changed."""
    folder = shutil.copytree(store.resolve("storybook"), tmp_path / "model")
    file = folder / "model.json"
    model = json.loads(file.read_text())
    assert description.read(folder).name == "storybook"
    file.write_text(json.dumps(model | {key: value}))
    for opened in (description.read, load):
        with pytest.raises(Error, match=rf"model\.json has {key} {re.escape(repr(value))}"):
            opened(folder)


@pytest.mark.parametrize(
    "seal",
    [
        None,
        {"/etc/passwd": [1, "", ""]},
        {"a/../../b": [1, "", ""]},
        {"a": [1, ""]},
        {"a": ["1", "", ""]},
        {"a": {"size": 1, "sample": "", "hash": ""}},
    ],
)
def test_a_seal_of_another_shape_is_refused(tmp_path, seal):
    folder = shutil.copytree(store.resolve("storybook"), tmp_path / "model")
    model = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(model | {"seal": seal}))
    with pytest.raises(Error, match=r"model\.json has seal"):
        description.read(folder)


def zero(file: Path) -> None:
    """Zeros in the middle, as a full disk or a lost block leaves them."""
    body = bytearray(file.read_bytes())
    body[len(body) // 2 :] = bytes(len(body) - len(body) // 2)
    file.write_bytes(body)


DAMAGE = {
    "zeroed weights": ("unet.safetensors", zero, "is not as the conversion wrote it"),
    "longer weights": ("vae.safetensors", lambda f: f.write_bytes(f.read_bytes() + b"x"), "is not as the conversion"),
    "empty merges": ("tokenizer/merges.txt", lambda f: f.write_text(""), "is not as the conversion wrote it"),
    "another setting": (
        "model.json",
        lambda f: f.write_text(f.read_text().replace('"prediction": "v"', '"prediction": "eps"')),
        "model.json is not as the conversion wrote it",
    ),
    "a file that is gone": ("text_encoder.safetensors", Path.unlink, "is missing"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_changed_folder_is_refused(tmp_path, case):
    folder = shutil.copytree(store.resolve("storybook"), tmp_path / "model")
    name, damage, message = DAMAGE[case]
    before = (folder / name).read_bytes()
    damage(folder / name)
    assert not (folder / name).exists() or (folder / name).read_bytes() != before
    with pytest.raises(Error, match=message):
        load(folder)


def test_building_networks_leaves_nothing_behind():
    """The key of MLX's random numbers is a number, and not a graph that grows with each network that is built: 500
    pictures over 7 prompts once left 45 MB."""
    build.build(CONFIG)
    assert sum(kernels(mx.random.state[0]).values()) == 0


def test_a_writer_insists_on_every_tensor(tmp_path):
    tensors = arrays()
    tensors.popitem()
    with pytest.raises(AssertionError, match="never written"):
        write(tmp_path, tensors)


@pytest.mark.parametrize(("chip", "unet", "other"), [("applegpu_g13s", "float16", "float16"),
                                                     ("applegpu_g14d", "float16", "float16"),
                                                     ("applegpu_g15g", "float16", "bfloat16"),
                                                     ("applegpu_g17s", "float16", "bfloat16")])  # fmt: skip
def test_dtypes_by_chip_and_family(monkeypatch, chip, unet, other):
    """M1, M2, M3 and M5, by the numbers of their GPUs."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": chip})
    assert [default_dtype(FAMILIES[name]) for name in ("sd1", "sdxl")] == [unet, unet]
    assert [default_dtype(FAMILIES[name]) for name in ("sd3", "flux")] == [other, other]
    assert default_dtype() == other


def test_dtype_policy():
    assert default_dtype() == "float32" or mx.default_device() == mx.Device(mx.gpu)
    assert component_dtype(FAMILIES["sd1"], "vae", "float16") == "float16"
    assert component_dtype(FAMILIES["sdxl"], "vae", "float16") == "float32"  # the published VAE overflows
    assert component_dtype(FAMILIES["sd1"], "vae", "bfloat16") == "float32"
    assert component_dtype(FAMILIES["sdxl"], "unet", "float16") == "float16"
