"""The reader of safetensors against the format's own rules and, where it accepts, the reference reader."""

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mlxdiff import Error
from mlxdiff.convert import source

from .checkpoints import full, header, raw, sparse


def entry(dtype="F32", shape=(2,), span=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


@pytest.mark.parametrize("tag", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_every_float_type_reads_as_torch_wrote_it(tmp_path, tag):
    """Reference: torch's own widening, over all 256 codes of the 8-bit types; exact, as each step widens."""
    kind = getattr(torch, tag)
    if kind.itemsize == 1:
        x = torch.arange(256, dtype=torch.uint8).view(kind).reshape(16, 16)
    else:
        x = torch.randn(16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(kind)
    save_file({"x": x, "scalar": x[0, 1].clone(), "none": x[:0].clone()}, tmp_path / "a.safetensors")
    tensors = source.read(tmp_path / "a.safetensors").tensors
    got = np.array(tensors["x"].read().astype(mx.float32))
    np.testing.assert_array_equal(got, x.to(torch.float32).numpy())
    assert tensors["scalar"].read().shape == ()
    assert tensors["none"].read().shape == (0, 16)


@pytest.mark.parametrize(("scale", "other"), [("scale_weight", "scale_input"), ("weight_scale", "input_scale")])
def test_eight_bit_floats_are_multiplied_by_their_scale(tmp_path, scale, other):
    """ComfyUI's older and newer files. Reference: torch's product in float32, exact. What scales something else, or
    a weight that is no 8-bit float, or in blocks, stays for the caller to refuse."""
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    plain, one = torch.randn(8, 16), torch.tensor(0.037)
    held = {"a.weight": x, f"a.{scale}": one, "b.weight": plain, f"b.{scale}": one, f"c.{scale}": one}
    held |= {"d.weight": x, f"d.{scale}": torch.ones(8, 1), "e.weight": x, "scaled_fp8": x[:0]}
    held[f"a.{other}"] = one
    save_file({name: tensor.clone() for name, tensor in held.items()}, tmp_path / "a.safetensors")
    tensors = source.read(tmp_path / "a.safetensors").tensors
    assert tensors.keys() == held.keys() - {f"a.{scale}", f"a.{other}", "scaled_fp8"}
    np.testing.assert_array_equal(np.array(tensors["a.weight"].read()), (x.float() * one).numpy())
    np.testing.assert_array_equal(np.array(tensors["b.weight"].read()), plain.numpy())
    np.testing.assert_array_equal(np.array(tensors["e.weight"].read().astype(mx.float32)), x.float().numpy())


def test_reading_is_lazy(tmp_path):
    """A file of 40 GB of nothing opens, and one tensor of it reads, without the disk or memory for 40 GB."""
    path = sparse(tmp_path / "a.safetensors", {"small": (4,), "huge": (10, 2**30), "last": (3,)}, dtype="F32")
    tensors = source.read(path).tensors
    assert tensors["huge"].shape == (10, 2**30)
    assert tensors["last"].read().tolist() == [0, 0, 0]


@pytest.mark.parametrize("tag", ["F32", "BF16", "F64", "F8_E4M3"])
def test_a_file_that_is_cut_short_while_it_is_read_is_an_error(tmp_path, tag):
    """A mapped file would end the process by a signal."""
    file = sparse(tmp_path / "a.safetensors", {"a": (9000,), "b": (9000,)}, dtype=tag)
    tensors = source.read(file).tensors
    os.truncate(file, 5000)
    for tensor in tensors.values():
        with pytest.raises(Error, match="became shorter while it was read"):
            tensor.read()
    file.unlink()
    with pytest.raises(Error, match="can no longer be read at 'a'"):
        tensors["a"].read()


def test_a_pickle_becomes_safetensors_as_the_guide_says(tmp_path):
    """Reference: the tensors that torch wrote. A checkpoint holds more than them, and two of them may share memory."""
    text = (Path(__file__).parent.parent / "mlxdiff" / "GUIDE.md").read_text(encoding="utf-8")
    command = re.search(r"<!-- pickle -->\n```bash\n(.*?)```", text, re.DOTALL)[1]
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    torch.save({"state_dict": {"a": weight, "tied": weight, "turned": weight.T}, "epoch": 3}, tmp_path / "model.ckpt")
    with pytest.raises(Error, match=r"torch\.load\(FILE, weights_only=True\)"):
        source.read(tmp_path / "model.ckpt")
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["bash", "-ec", command], cwd=tmp_path, env=env, check=True)
    tensors = source.read(tmp_path / "model.safetensors").tensors
    assert tensors.keys() == {"a", "tied", "turned"}
    assert all(np.array_equal(tensors[name].read(), weight) for name in ("a", "tied"))
    np.testing.assert_array_equal(np.array(tensors["turned"].read()), weight.T)


def test_a_file_that_mlx_wrote_is_read(tmp_path):
    """Its header has null in place of the free text, which the reference takes too."""
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"a": mx.ones(3)})
    assert b'"__metadata__":null' in (tmp_path / "a.safetensors").read_bytes()
    assert source.read(tmp_path / "a.safetensors").tensors["a"].read().tolist() == [1, 1, 1]
    assert safetensors.numpy.load_file(tmp_path / "a.safetensors")["a"].tolist() == [1, 1, 1]


def test_large_metadata_is_fine(tmp_path):
    path = sparse(tmp_path / "a.safetensors", {"x": (2,)}, metadata={"modelspec.thumbnail": "A" * 3_000_000})
    weights = source.read(path)
    assert len(weights.metadata["modelspec.thumbnail"]) == 3_000_000
    assert list(weights.tensors) == ["x"]


@pytest.mark.parametrize("length", [60, 256 + 60, 0x0A, 0x20])
def test_a_header_length_that_spells_html_is_no_html(tmp_path, length):
    text = json.dumps({"x": entry(shape=(0,), span=(0, 0))}).encode()
    if length < len(text):
        length += 256
    assert source.read(raw(tmp_path / "a.safetensors", text.ljust(length), 0)).tensors.keys() == {"x"}


def test_shards_read_as_one(tmp_path):
    full(tmp_path / "model-00001-of-00002.safetensors", {"a": np.ones(2, np.float32)})
    full(tmp_path / "model-00002-of-00002.safetensors", {"b": np.zeros(3, np.float32)})
    placed = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 20}, "weight_map": placed}))
    assert source.read(tmp_path).tensors.keys() == {"a", "b"}
    assert source.read(index).tensors["b"].read().tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        (["model.safetensors", "model.fp16.safetensors"], "model.safetensors"),
        (["model.bf16.safetensors", "model.fp16.safetensors", "pytorch_model.bin"], "model.fp16.safetensors"),
        (["model.fp16.safetensors", "model.non_ema.safetensors"], "model.fp16.safetensors"),
        (["anything.safetensors", "config.json"], "anything.safetensors"),
    ],
)
def test_one_rule_chooses_among_copies(tmp_path, present, chosen):
    for name in present:
        sparse(tmp_path / name, {name: (1,)})
    assert source.read(tmp_path).tensors.keys() == {chosen}


BAD_HEADERS = {
    "length beyond the file": (b"{}", None, 10**6, "claims a header"),
    "not JSON": (b"{nothing}", None, None, "not valid JSON"),
    "not UTF-8": (b'{"\xff\xfe": 1}', None, None, "not valid JSON"),
    "deep nesting": (b'{"a":' * 100_000, None, None, "not valid JSON"),
    "an endless number": (b'{"a":' + b"1" * 5000 + b"}", None, None, "not valid JSON"),
    "a list": (b"[]", None, None, "not a JSON object"),
    "a duplicate": (b'{"x":1,"x":2}', None, None, "lists 'x' twice"),
    "a missing field": ({"x": {"dtype": "F32", "shape": [2]}}, 8, None, "is not dtype, shape and data_offsets"),
    "no entry": ({"x": 3}, 8, None, "is not dtype, shape and data_offsets"),
    "an unknown dtype": ({"x": entry("F7")}, 8, None, "unknown dtype 'F7'"),
    "a dtype that is a list": ({"x": entry(["F32"])}, 8, None, "unknown dtype"),
    "a negative shape": ({"x": entry(shape=(-2,))}, 8, None, "cannot be"),
    "a boolean shape": ({"x": entry(shape=(True, 2))}, 8, None, "cannot be"),
    "a fractional shape": ({"x": entry(shape=(2.0,))}, 8, None, "cannot be"),
    "an immense shape": ({"x": entry(shape=(0, 2**40), span=(0, 0))}, 0, None, "cannot be"),
    "offsets backwards": ({"x": entry(span=(8, 0))}, 8, None, "cannot be"),
    "three offsets": ({"x": entry(span=(0, 8, 8))}, 8, None, "cannot be"),
    "a size that disagrees": ({"x": entry("F16")}, 8, None, "does not fill 8 bytes"),
    "an overlap": ({"x": entry(), "y": entry(span=(4, 12))}, 12, None, "overlaps"),
    "a hole": ({"x": entry(), "y": entry(span=(12, 20))}, 20, None, "leaves unused bytes"),
    "offsets beyond the file": ({"x": entry()}, 4, None, "is cut short"),
    "bytes to spare": ({"x": entry()}, 9, None, "1 bytes after its last tensor"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "x": entry()}, 8, None, "__metadata__"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_header_is_one_error(tmp_path, case):
    entries, size, length, said = BAD_HEADERS[case]
    path = raw(tmp_path / "a.safetensors", entries, 0 if size is None else size)
    if length is not None:
        data = bytearray(path.read_bytes())
        data[:8] = struct.pack("<Q", length)
        path.write_bytes(data)
    with pytest.raises(Error, match=r"a\.safetensors") as e:
        source.read(path)
    assert said in e.value.problem
    assert e.value.fix


def test_every_truncation_is_an_error(tmp_path):
    path = full(tmp_path / "a.safetensors", {"x": np.ones(3, np.float32), "y": np.ones((2, 2), np.float32)})
    data = path.read_bytes()
    for n in range(len(data)):
        path.write_bytes(data[:n])
        with pytest.raises(Error):
            source.read(path)


VALID = {"__metadata__": {"format": "pt"}} | header({"a": (2, 3), "b": (), "c": (0, 4)}, "F32")


def read_bytes(tmp_path_factory, data: bytes):
    path = tmp_path_factory.mktemp("fuzz") / "a.safetensors"
    path.write_bytes(data)
    try:
        return set(source.read(path).tensors)
    except Error as e:
        problem = e.problem
    finally:
        path.unlink()
        path.parent.rmdir()
    assert len(problem.splitlines()) == 1  # whatever the file says
    return None


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(st.binary(max_size=200))
def test_any_bytes_are_an_error_or_a_header(tmp_path_factory, data):
    read_bytes(tmp_path_factory, data)


@settings(max_examples=400, deadline=None, database=None, derandomize=True)
@given(st.data())
def test_any_damage_to_a_header_is_an_error_or_what_the_reference_accepts(tmp_path_factory, data):
    """Reference: the safetensors library. Where we accept damaged bytes, it does, and sees the same names."""
    text = bytearray(json.dumps(VALID).encode())
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at] = data.draw(st.sampled_from(b'0123456789-,:{}[]" e.Fabc\\\xff') | st.integers(0, 255))
    whole = struct.pack("<Q", len(text)) + bytes(text) + bytes(data.draw(st.sampled_from([24, 28, 28, 28, 29])))
    accepted = read_bytes(tmp_path_factory, whole)
    if accepted is not None:
        assert {name for name, _ in safetensors.deserialize(whole)} == accepted


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "I64", "F8_E4M3", "F99", ""]) | json_values,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 64), min_size=2, max_size=2) | json_values,
    }
)


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(st.dictionaries(st.text(max_size=6), entries | json_values, max_size=3), st.integers(0, 64))
def test_any_json_header_is_an_error_or_a_header(tmp_path_factory, header, size):
    text = json.dumps(header).encode()
    read_bytes(tmp_path_factory, struct.pack("<Q", len(text)) + text + bytes(size))
