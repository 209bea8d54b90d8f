"""Model folders. References: safetensors' own reader for the file format, mx.quantize for quantized layers, and the
promise of strictness: what is missing, unknown or misshapen is an Error that names the tensor."""

import json
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors import safe_open

from mlxdiff import weights
from mlxdiff.errors import Error
from mlxdiff.models import clip

CONFIG = asdict(
    clip.Config(
        vocab=50, positions=7, width=64, layers=2, heads=2, hidden=96, act="gelu", projection=32, eos=49, eps=1e-5
    )
)


def arrays(seed: int = 0) -> dict[str, mx.array]:
    module = weights.build("text_encoder", CONFIG)
    rng = np.random.default_rng(seed)
    return {k: mx.array(rng.normal(size=v.shape).astype(np.float32)) for k, v in tree_flatten(module.parameters())}


def write(folder: Path, tensors: dict, dtype: str = "float32", bits: int | None = None) -> dict:
    model = {
        "format": weights.FORMAT,
        "components": {"text_encoder": CONFIG},
        "recipe": {"dtype": dtype, "bits": bits},
    }
    with weights.Writer(folder / "text_encoder.safetensors", "text_encoder", CONFIG, dtype, bits) as out:
        for key, value in reversed(tensors.items()):  # any order
            out.put(key, value)
    weights.write_json(folder / "model.json", model)
    return weights.read_model(folder)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_written_is_read(tmp_path, dtype):
    tensors = arrays()
    module = weights.load(tmp_path, "text_encoder", write(tmp_path, tensors, dtype))
    for key, value in tree_flatten(module.parameters()):
        assert value.dtype == weights.DTYPES[dtype]
        assert mx.array_equal(value, tensors[key].astype(value.dtype)), key


def test_the_file_is_safetensors(tmp_path):
    tensors = arrays()
    write(tmp_path, tensors)
    with safe_open(tmp_path / "text_encoder.safetensors", "numpy") as f:
        assert set(f.keys()) == tensors.keys()
        for key in f.keys():  # noqa: SIM118 (not a dict)
            assert np.array_equal(f.get_tensor(key), np.array(tensors[key]))


@pytest.mark.parametrize("bits", weights.BITS)
def test_quantized_layers_hold_what_mx_quantize_gives(tmp_path, bits):
    tensors = arrays()
    module = weights.load(tmp_path, "text_encoder", write(tmp_path, tensors, "float16", bits))
    layer = module.encoder.layers[0].mlp.fc1
    group = 64 if CONFIG["width"] % 64 == 0 else 32
    theirs = mx.quantize(tensors["encoder.layers.0.mlp.fc1.weight"].astype(mx.float16), group, bits)
    for ours, part in zip((layer.weight, layer.scales, layer.biases), theirs, strict=True):
        assert mx.array_equal(ours, part)
    assert module.text_projection.weight.dtype == mx.float16  # kept whole, as the embeddings are
    assert module.embeddings.token_embedding.weight.dtype == mx.float16


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
    model = write(tmp_path, tensors)
    damage(tensors)
    mx.save_safetensors(str(tmp_path / "text_encoder.safetensors"), tensors)
    with pytest.raises(Error) as e:
        weights.load(tmp_path, "text_encoder", model)
    assert says in str(e.value)


def test_a_truncated_component_is_named(tmp_path):
    model = write(tmp_path, arrays())
    path = tmp_path / "text_encoder.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Error, match=r"text_encoder\.safetensors"):
        weights.load(tmp_path, "text_encoder", model)


@pytest.mark.parametrize("text", ["", "[]", "{", json.dumps({"format": 99})])
def test_a_damaged_description_is_named(tmp_path, text):
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(Error, match=r"model\.json"):
        weights.read_model(tmp_path)


def test_a_writer_insists_on_every_tensor(tmp_path):
    tensors = arrays()
    tensors.popitem()
    with pytest.raises(AssertionError, match="never written"):
        write(tmp_path, tensors)


def test_dtype_policy():
    assert weights.default_dtype() == "float32" or mx.default_device() == mx.Device(mx.gpu)
    assert weights.component_dtype("sd1", "vae", "float16") == "float16"
    assert weights.component_dtype("sdxl", "vae", "float16") == "float32"  # the published VAE overflows
    assert weights.component_dtype("sd1", "vae", "bfloat16") == "float32"
    assert weights.component_dtype("sdxl", "unet", "float16") == "float16"
