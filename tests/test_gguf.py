"""The reader of GGUF against the gguf package: its writer makes the files, and its numbers are the reference."""

import json
import random
import struct
import time
from pathlib import Path

import diffusers
import gguf
import mlx.core as mx
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM, T5Config, T5EncoderModel

from mlxdiff import Error, convert, description, store, weights
from mlxdiff.convert import gguf as ours
from mlxdiff.convert import rules, source
from mlxdiff.convert.inspect import main as inspect
from mlxdiff.store import hub

from . import original
from .checkpoints import full
from .parity.tiny import stir
from .test_convert_flow import FLUX, T5, apart, folder, nets, same, t5_state, transformer_state

QUANTIZERS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def written(path: Path, arrays: dict, arch: str = "flux", kinds: dict | None = None, shapes: dict | None = None):
    """name -> numbers, as float32, or in the type of `kinds` (bytes, if there is no quantizer for it)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, arch)
    for name, shape in (shapes or {}).items():
        writer.add_array(f"comfy.gguf.orig_shape.{name}", [int(n) for n in shape])
    for name, x in arrays.items():
        kind = Kind[(kinds or {}).get(name, "F32")]
        writer.add_tensor(name, x if x.dtype == np.uint8 else gguf.quants.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def packed(arrays: dict, kind: str) -> dict[str, str]:
    """What a program that packs would pack: matrices, where whole blocks fit."""
    block = gguf.GGML_QUANT_SIZES[Kind[kind]][0]
    return {n: kind if x.shape[-1] % block == 0 else "F16" for n, x in arrays.items() if x.ndim > 1}


def unpacked(arrays: dict, kinds: dict) -> dict:
    """The numbers that the file then has."""
    out = {}
    for name, x in arrays.items():
        kind = Kind[kinds.get(name, "F32")]
        out[name] = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind).reshape(x.shape)
    return out


def blocks(kind: str, rows: int, width: int) -> np.ndarray:
    """Random blocks, of which those that are not finite are zero."""
    numbers, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    raw = np.random.default_rng(1).integers(0, 256, (rows * width // numbers, size), np.uint8)
    with np.errstate(all="ignore"):
        raw[~np.isfinite(gguf.quants.dequantize(raw, Kind[kind])).all(1)] = 0
    assert raw.any(1).mean() > 0.5
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", [*ours.BLOCKS, "F32", "F16", "BF16"])
def test_every_type_reads_as_the_package_reads_it(tmp_path, monkeypatch, kind):
    """To the bit, for any blocks; across the pieces that a large tensor is read in."""
    monkeypatch.setattr(ours, "_CHUNK", 1024)
    if kind in ours.BLOCKS:
        assert ours.BLOCKS[kind] == gguf.GGML_QUANT_SIZES[Kind[kind]]
        raw = blocks(kind, 7, 768)
        expected = gguf.quants.dequantize(raw, Kind[kind])
    else:
        x = np.random.default_rng(0).standard_normal((7, 768)).astype(np.float32)
        raw, expected = x, gguf.quants.dequantize(gguf.quants.quantize(x, Kind[kind]), Kind[kind])
    path = written(tmp_path / "a.gguf", {"before": np.ones(3, np.float32), "x": raw}, kinds={"x": kind})
    tensor = source.read(path).tensors["x"]
    assert (tensor.dtype, tensor.shape) == (kind, (7, 768))
    assert tensor.size == 7 * 768 * gguf.GGML_QUANT_SIZES[Kind[kind]][1] // gguf.GGML_QUANT_SIZES[Kind[kind]][0]
    got = np.array(tensor.read().astype(mx.float32))
    np.testing.assert_array_equal(got.view(np.uint32), expected.astype(np.float32).view(np.uint32))


def test_numbers_of_types_agree_with_the_package():
    for number, (name, numbers, size) in ours._TYPES.items():
        assert Kind(number).name == name
        assert gguf.GGML_QUANT_SIZES[Kind(number)] == (numbers, size)


def test_shapes_are_those_before_a_program_changed_them(tmp_path):
    """ComfyUI-GGUF keeps a convolution's shape in the metadata; stable-diffusion.cpp drops a first axis of one entry,
    and makes 1x1 convolutions of SDXL's projections."""
    rng = np.random.default_rng(0)
    conv = rng.standard_normal((16, 32, 3, 3)).astype(np.float32)
    plain = {"pos_embed": (1, 36, 8), "x.proj_in.weight": (4, 4), "label_emb.0.0.weight": (4, 8), "one.weight": (1, 8)}
    held = {"conv.weight": conv.reshape(-1, 256), "pos_embed": np.ones((36, 8), np.float32)}
    held |= {"x.proj_in.weight": np.ones((4, 4, 1, 1), np.float32), "label_emb.0.0.weight": np.ones((4, 8), np.float32)}
    held |= {"one.weight": np.ones((1, 8), np.float32)}
    path = written(tmp_path / "a.gguf", held, kinds={"conv.weight": "Q8_0"}, shapes={"conv.weight": conv.shape})
    tensors = source.read(path).tensors
    assert {n: t.shape for n, t in tensors.items()} == plain | {"conv.weight": conv.shape}
    expected = gguf.quants.dequantize(gguf.quants.quantize(conv.reshape(-1, 256), Kind.Q8_0), Kind.Q8_0)
    np.testing.assert_array_equal(np.array(tensors["conv.weight"].read()), expected.reshape(conv.shape))
    for shape, said in (((16, 32, 3, 2), "says its header"), ((-16, -32, 3, 3), "says its header")):
        with pytest.raises(Error, match=said):
            source.read(written(tmp_path / "b.gguf", held, shapes={"conv.weight": shape}))


def blocky() -> dict:
    """FLUX whose transformer and T5 have widths that fill blocks of 32."""
    kinds = FLUX | {"num_attention_heads": 4, "joint_attention_dim": 32, "in_channels": 16}
    net = diffusers.FluxTransformer2DModel(**kinds, num_layers=1, num_single_layers=2, guidance_embeds=True)
    t5 = T5EncoderModel(T5Config(**(T5.to_dict() | {"d_model": 32, "d_ff": 64, "d_kv": 32})))
    return nets("dev") | {"text_encoder_2": stir(t5, 2), "transformer": stir(net, 3)}


@pytest.fixture(scope="module")
def parts() -> dict:
    return blocky()


@pytest.fixture(scope="module")
def words(parts, tmp_path_factory) -> Path:
    return folder(tmp_path_factory.mktemp("gguf") / "words", "dev", parts)


def renamed(names: list[str], arch: gguf.MODEL_ARCH, layers: int) -> dict[str, str]:
    """transformers' name -> llama.cpp's, by the package's own table."""
    table, out = gguf.get_tensor_name_map(arch, layers), {}
    for name in names:
        stem, _, end = name.rpartition(".")
        out[name] = f"{table.get_name(stem)}.{end}"
    return out


def test_names_of_text_encoders_become_those_of_transformers(tmp_path):
    """Reference: the package's table, by which llama.cpp's converter names them."""
    inside = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.q_norm",
              "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm",
              "post_attention_layernorm")  # fmt: skip
    qwen = [f"model.layers.{i}.{n}.weight" for i in (0, 11) for n in inside]
    qwen += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    t5 = [n for n in nets("dev")["text_encoder_2"].state_dict() if "embed_tokens" not in n]
    one = np.ones((1, 1), np.float32)
    for arch, names in ((gguf.MODEL_ARCH.QWEN3, qwen), (gguf.MODEL_ARCH.T5, t5), (gguf.MODEL_ARCH.T5ENCODER, t5)):
        theirs = renamed(names, arch, 12)
        assert len(set(theirs.values())) == len(names)
        path = written(tmp_path / "a.gguf", dict.fromkeys(theirs.values(), one), gguf.MODEL_ARCH_NAMES[arch])
        assert source.read(path).tensors.keys() == set(names)


def test_a_qwen3_of_llama_cpp_is_read_as_that_of_transformers(tmp_path):
    """Every number of every parameter; the layers that no family reads are left out of both."""
    torch.manual_seed(0)
    kinds = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "num_hidden_layers": 3}
    net = Qwen3ForCausalLM(Qwen3Config(hidden_size=64, intermediate_size=96, vocab_size=50, **kinds))
    state = {n: np.ascontiguousarray(x.numpy()) for n, x in net.state_dict().items()}
    state = {n: x for n, x in state.items() if n != "lm_head.weight"}
    names, types = renamed(list(state), gguf.MODEL_ARCH.QWEN3, 3), packed(state, "Q8_0")
    held = {names[n]: x for n, x in state.items()}
    path = written(tmp_path / "a.gguf", held, "qwen3", {names[n]: k for n, k in types.items()})
    a, b = convert.open(path), convert.open(full(tmp_path / "a.safetensors", unpacked(state, types)))
    assert (a.family, a.missing, a.unmapped) == (b.family, [], {})
    (one,), (other,) = a.components.values(), b.components.values()
    assert (one.config, one.weights.keys()) == (other.config, other.weights.keys())
    assert len(one.weights) > 20
    for key, weight in one.weights.items():
        assert np.array_equal(weight.array(), other.weights[key].array()), key


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1"])
def test_flux_converts_to_what_its_blocks_hold(parts, words, tmp_path, kind, capsys):
    """The transformer with and without the prefix of stable-diffusion.cpp, and T5 under llama.cpp's names, found beside
    it. Reference: the same files as safetensors, with the package's numbers. To the bit."""
    net = transformer_state("dev", parts["transformer"])
    t5 = {k: np.ascontiguousarray(x) for k, x in t5_state(parts["text_encoder_2"]).items() if "embed" not in k}
    kinds, kinds_t5 = packed(net, kind), packed(t5, kind)
    assert sum(k == kind for k in kinds.values()) > 20
    assert sum(k == kind for k in kinds_t5.values()) > 10
    plain = apart(tmp_path / "plain", "dev", parts)
    full(plain, unpacked(net, kinds))
    full(tmp_path / "plain" / "t5xxl_fp16.safetensors", unpacked(t5, kinds_t5))
    expected = convert.convert(plain, tmp_path / "expected", dtype="float32", tokenizer=words)
    apart(tmp_path / "packed", "dev", parts).unlink()
    for old in (tmp_path / "packed").glob("t5*"):
        old.unlink()
    names = renamed(list(t5), gguf.MODEL_ARCH.T5ENCODER, T5.num_layers)
    written(tmp_path / "packed" / "t5xxl-Q.gguf", {names[n]: x for n, x in t5.items()}, "t5encoder",
            {names[n]: k for n, k in kinds_t5.items()})  # fmt: skip
    for prefix in ("", "model.diffusion_model."):
        file = written(tmp_path / "packed" / "net.gguf", original.under(prefix, net) if prefix else net, "flux",
                       {f"{prefix}{n}": k for n, k in kinds.items()})  # fmt: skip
        got = convert.convert(file, tmp_path / "got", dtype="float32", tokenizer=words)
        same(expected, got, parts)
    assert inspect([str(file), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["family"], said["missing"], said["unmapped"]) == ("flux", [], {})
    assert kind in said["components"]["transformer"]["dtype"].split("+")


def test_strictness_is_that_of_safetensors(parts, words, tmp_path):
    net = transformer_state("dev", parts["transformer"])
    first = next(n for n in net if n.endswith("img_mlp.0.weight"))
    with pytest.raises(Error, match="holds only transformer, without text_encoder, text_encoder_2, vae"):
        convert.convert(written(tmp_path / "a.gguf", net), tmp_path / "out", tokenizer=words)
    for changed, said in (
        ({n: x for n, x in net.items() if n != first}, "missing"),
        (net | {"stray.weight": np.ones(3, np.float32)}, "no such parameter"),
        (net | {first: net[first][:-1]}, "does not fit"),
        ({n: (x * np.nan if n == first else x) for n, x in net.items()}, "NaN or infinite"),
    ):
        path = written(apart(tmp_path / "b", "dev", parts).with_name("net.gguf"), changed)
        with pytest.raises(Error, match=said):
            convert.convert(path, tmp_path / "out", dtype="float32", tokenizer=words)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("error")  # one line, and no warning beside it
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_block_that_is_not_finite_is_an_error(parts, words, tmp_path, bits):
    """A scale of NaN or infinity, in blocks that are unpacked and in those that are kept."""
    net = transformer_state("dev", parts["transformer"])
    name = next(n for n in net if n.endswith("single_blocks.0.linear2.weight"))
    for scale in (np.nan, np.inf, -np.inf):
        raw = gguf.quants.quantize(net[name], Kind.Q4_0)
        raw.reshape(-1, 18)[3, :2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
        net_ = net | {name: raw}
        file = written(apart(tmp_path / "a", "dev", parts).with_name("net.gguf"), net_, kinds={name: "Q4_0"})
        with pytest.raises(Error, match=r"linear2.weight' in .* has numbers that are NaN or infinite"):
            convert.convert(file, tmp_path / "out", bits=bits, dtype="float16", tokenizer=words)
    assert not (tmp_path / "out").exists()


def test_foreign_text_of_a_header_reaches_no_terminal_raw(parts, tmp_path, capsys):
    """Names and values that move the cursor, set a title, turn the direction of writing or begin a new line."""
    wild = "\x1b]0;title\x07\x1b[31mred\u202e\r\nmlxdiff: all is well"
    state = transformer_state("dev", parts["transformer"])
    files = [written(tmp_path / "stray.gguf", state | {wild: np.ones(3, np.float32)}, wild)]
    heads = [made([info(wild)], body=16), made(keys=[key(wild, 77, b"")], body=64)]
    heads += [made([info()], [key("general.alignment", 8, text(wild))], body=16)]
    for i, data in enumerate(heads):
        files.append(tmp_path / f"{i}.gguf")
        files[-1].write_bytes(data)
    for file in files:
        for argv in ([str(file)], [str(file), "--json"]):
            assert inspect(argv) == 1
            out, err = capsys.readouterr()
            assert not any(c in out + err for c in "\x1b\x07\u202e\r"), argv
            assert len(err.splitlines()) <= 1


def test_a_file_of_a_hub_repository_can_be_named():
    assert store._repo("org/some.gguf-repo/part/net-Q4_K_S.gguf") == ("org/some.gguf-repo", "part/net-Q4_K_S.gguf")
    files = {"net-Q8_0.gguf": 9, "net-F16.gguf": 9}
    assert hub.select("org/repo", files, True, "net-Q8_0.gguf") == ["net-Q8_0.gguf"]
    with pytest.raises(Error) as e:
        hub.select("org/repo", files, True, None)
    assert "org/repo/net-F16.gguf, org/repo/net-Q8_0.gguf" in e.value.fix
    with pytest.raises(Error, match=r"no model, file or folder 'net/x\.gguf'"):  # an absent file is no repository
        store._repo("net/x.gguf")


# ---- headers made by hand


def text(s: bytes | str) -> bytes:
    s = s.encode() if isinstance(s, str) else s
    return struct.pack("<Q", len(s)) + s


def info(name="x", dims=(4,), kind=0, offset=0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def made(tensors=(), keys=(), version=3, counts=None, body=0, pad=True, end=b"") -> bytes:
    n = (len(tensors), len(keys)) if counts is None else counts
    data = b"GGUF" + struct.pack("<IQQ", version, *n) + b"".join(keys) + b"".join(tensors)
    return data + bytes(-len(data) % 32 if pad else 0) + bytes(body) + end


HUGE = 2**60
BAD = {
    "nothing more": (b"GGUF", "is cut short"),
    "version 1": (made(version=1), "version 1"),
    "version 99": (made(version=99), "version 99"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "tensors without end": (made(counts=(HUGE, 0)), "claims 1,152,921,504,606,846,976 tensors"),
    "keys without end": (made(counts=(0, HUGE)), "and 1,152,921,504,606,846,976 metadata keys"),
    "more tensors than there are": (made([info()], counts=(2, 0), pad=False), "claims 2 tensors"),
    "a name without end": (made([struct.pack("<Q", HUGE) + bytes(64)]), "a name of 1,152,921,504,606,846,976 bytes"),
    "a key without end": (made(keys=[struct.pack("<Q", HUGE) + bytes(64)]), "a name of"),
    "a text without end": (made(keys=[key("a", 8, struct.pack("<Q", HUGE))], body=64), "is cut short"),
    "a name that is no text": (made([info(b"\xff\xfe")], body=16), "not UTF-8"),
    "an array without end": (made(keys=[key("a", 9, struct.pack("<IQ", 0, HUGE))], body=64), "is cut short"),
    "texts without end": (made(keys=[key("a", 9, struct.pack("<IQ", 8, HUGE))], body=64), "is cut short"),
    "an array of arrays": (made(keys=[key("a", 9, struct.pack("<IQ", 9, 3))], body=64), "an array of arrays"),
    "deep arrays": (made(keys=[key("a", 9, struct.pack("<IQ", 9, 1) * 100_000)]), "an array of arrays"),
    "an array of nothing known": (made(keys=[key("a", 9, struct.pack("<IQ", 77, 1))], body=64), "unknown kind 77"),
    "a key of an unknown kind": (made(keys=[key("a", 13, bytes(8))], body=64), "unknown kind 13"),
    "a key twice": (made(keys=[key("a", 0, b"1")] * 2, body=64), "lists 'a' twice"),
    "axes without end": (made([text("x") + struct.pack("<I", 2**31) + bytes(64)]), "2,147,483,648 axes"),
    "an axis without end": (made([info(dims=(HUGE, 0))]), "cannot be"),
    "a product without end": (made([info(dims=(2**30,) * 4)], body=64), "cannot be"),
    "an unknown type": (made([info(kind=99)], body=16), "has the type 99"),
    "a type that was removed": (made([info(kind=4)], body=16), "has the type 4"),
    "a broken block": (made([info(dims=(33,), kind=8)], body=34), "not in blocks of 32"),
    "a block of a scalar": (made([info(dims=(), kind=8)], body=34), "not in blocks of 32"),
    "an offset beyond the file": (made([info(offset=HUGE)], body=16), "leaves unused bytes"),
    "an offset that is not aligned": (made([info(), info("y", offset=17)], body=64), "not aligned to 32"),
    "an overlap": (made([info(dims=(16,)), info("y", offset=32)], body=80), "overlaps"),
    "a hole": (made([info(), info("y", offset=64)], body=80), "leaves unused bytes"),
    "a tensor twice": (made([info(), info(offset=32)], body=48), "lists 'x' twice"),
    "two names for one": (
        made([info("token_embd.weight"), info("shared.weight", offset=32)], body=48,
             keys=[key("general.architecture", 8, text("t5"))]), "lists 'shared.weight' twice"),
    "cut short": (made([info()], body=15), "is cut short"),
    "bytes to spare": (made([info()], body=16, end=bytes(33)), "bytes after its last tensor"),
    "an alignment of 0": (made([info()], [key("general.alignment", 4, struct.pack("<I", 0))], body=16), "alignment 0"),
    "an alignment of 24": (made([info()], [key("general.alignment", 4, struct.pack("<I", 24))], body=16), "no power"),
    "an alignment in words": (made([info()], [key("general.alignment", 8, text("32"))], body=16), "no power of two"),
    "one of several": (made([info()], [key("split.count", 2, b"\x02\x00")], body=16), "llama-gguf-split"),
    "a shape of fractions": (made([info()], [key("comfy.gguf.orig_shape.x", 9, struct.pack("<IQ", 6, 1) + bytes(4))],
                                  body=16), "is no shape"),
    "a shape without end": (made([info()], [key("comfy.gguf.orig_shape.x", 9, struct.pack("<IQ", 5, HUGE))], body=16),
                            "is no shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_header_is_one_error(tmp_path, case):
    data, said = BAD[case]
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    begun = time.monotonic()
    with pytest.raises(Error, match=r"a\.gguf|Join") as e:
        source.read(path)
    assert said in f"{e.value.problem} {e.value.fix}"
    assert len(e.value.problem.splitlines()) == 1
    assert e.value.fix
    assert time.monotonic() - begun < 2


def test_what_is_no_gguf_is_said(tmp_path):
    for data, said in ((b"GGUX" + bytes(90), "not a GGUF file"), (b"", "empty"), (b"<html>", "web page")):
        (tmp_path / "a.gguf").write_bytes(data)
        with pytest.raises(Error, match=said):
            source.read(tmp_path / "a.gguf")


VALID = made(
    [info("a", (4, 2)), info("b", (32, 2), 8, 32), info("c", (3,), 30, 128)],
    [key("general.architecture", 8, text("flux")), key("general.alignment", 4, struct.pack("<I", 32)),
     key("t", 9, struct.pack("<IQ", 8, 2) + text("x") + text("yz")), key("n", 9, struct.pack("<IQ", 5, 3) + bytes(12)),
     key("comfy.gguf.orig_shape.a", 9, struct.pack("<IQii", 5, 2, 4, 2))],
    body=128 + 32,
)  # fmt: skip


def read_bytes(path: Path, data: bytes) -> set[str] | None:
    path.write_bytes(data)
    try:
        tensors, said = source.read(path).tensors, ""
    except Error as e:
        tensors, said = None, e.problem
    assert "\n" not in said
    if tensors is None:
        return None
    assert all(t.offset + t.size <= len(data) for t in tensors.values())  # nothing is read beyond the end
    return set(tensors)


def test_every_truncation_is_an_error(tmp_path):
    assert read_bytes(tmp_path / "a.gguf", VALID) == {"a", "b", "c"}
    for n in range(len(VALID) - 26):  # the last bytes only fill up
        assert read_bytes(tmp_path / "a.gguf", VALID[:n]) is None, n


def test_other_versions_and_alignments_that_are_fine(tmp_path):
    assert read_bytes(tmp_path / "a.gguf", made([info()], version=2, body=16)) == {"x"}
    wide = made([info(), info("y", offset=64)], [key("general.alignment", 4, struct.pack("<I", 64))], pad=False)
    assert read_bytes(tmp_path / "a.gguf", wide + bytes(-len(wide) % 64 + 80)) == {"x", "y"}


def test_a_large_vocabulary_is_passed_over_in_linear_time(tmp_path):
    words = key("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 150_000) + text("word") * 150_000)
    begun = time.monotonic()
    assert read_bytes(tmp_path / "a.gguf", made([info()], [words], body=16)) == {"x"}
    assert time.monotonic() - begun < 5


@settings(max_examples=400, deadline=None, database=None, derandomize=True)
@given(st.data())
def test_any_damage_to_a_header_is_an_error_or_what_the_reference_accepts(tmp_path_factory, data):
    """Reference: the package's reader. Where we accept damaged bytes, it does, and sees the same names and shapes."""
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    damaged = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(VALID) - 161))
        damaged[at] = data.draw(st.sampled_from([0, 1, 2, 3, 8, 9, 32, 64, 255]) | st.integers(0, 255))
    names = read_bytes(path, bytes(damaged))
    if names is not None:
        assert {t.name for t in gguf.GGUFReader(path).tensors} == names


def test_any_bytes_after_the_magic_are_an_error_or_a_header(tmp_path):
    rng = random.Random(0)
    for _ in range(300):
        body = bytes(rng.choice((0, 0, 0, 1, 2, 8, rng.randrange(256))) for _ in range(rng.randrange(200)))
        read_bytes(tmp_path / "a.gguf", b"GGUF\x03\x00\x00\x00" + body)


# ---- kept as they are


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("kind", ours.STEPS)
def test_mlx_holds_blocks_as_they_are(monkeypatch, kind, more):
    """Any blocks, across pieces, in as many bits or the next more. Exact in float32, where a product of scale and step
    has no more bits than fit; the difference of two such products is rounded by both, and MLX's CPU may round the
    product too: 2 ulp of the larger."""
    monkeypatch.setattr(ours, "_CHUNK", 1024)
    raw = blocks(kind, 7, 768)
    want = gguf.quants.dequantize(raw, Kind[kind]).reshape(7, 768)
    bits = [4, 5, 6, 8, 8][[4, 5, 6, 8].index(ours.STEPS[kind]) + more]
    parts = (mx.array(part.reshape(7, -1)) for part in ours.steps(raw.reshape(-1), kind, bits))
    got = np.array(mx.dequantize(*parts, group_size=32, bits=bits))
    if kind in ours._LOWEST:
        np.testing.assert_array_equal(got, want)
    else:
        scale, low = ours._scales(raw.reshape(-1, gguf.GGML_QUANT_SIZES[Kind[kind]][1]), kind)
        largest = np.abs(low) + np.abs(scale) * 2 ** ours.STEPS[kind]
        assert (np.abs(got - want).reshape(-1, 32) <= 2 * 2**-23 * largest[:, None]).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0"])
def test_a_conversion_of_as_many_bits_keeps_the_blocks(parts, words, tmp_path, kind, dtype):
    """Reference: the package's numbers. bfloat16 rounds the scales to 8 bits: 2^-9 at most, or 0.2 %; the shift of
    Q5_1 is larger than most of its numbers. In fewer bits than it has, the file is rounded once more."""
    net = transformer_state("dev", parts["transformer"])
    file = written(apart(tmp_path / "a", "dev", parts).with_name("net.gguf"), net, kinds=packed(net, kind))
    out = convert.convert(file, tmp_path / "out", bits=ours.STEPS[kind], dtype=dtype, tokenizer=words)
    model = description.read(out)
    opened = weights.load(out / "transformer.safetensors", model.family, model.net, model.recipe)
    assert opened.img_in.weight.dtype == opened.single_blocks[0].linear2.scales.dtype  # small layers stay whole
    kept = {"single_blocks.0.linear2": opened.single_blocks[0].linear2, "double_blocks.0.img_mod.lin":
            opened.double_blocks[0].img_mod.lin}  # fmt: skip
    for name, layer in kept.items():
        want = gguf.quants.dequantize(gguf.quants.quantize(net[f"{name}.weight"], Kind[kind]), Kind[kind])
        assert (layer.group_size, layer.bits) == (32, 8 if "mod" in name else ours.STEPS[kind])
        scales = (x.astype(mx.float32) for x in (layer.scales, layer.biases))
        got = np.array(mx.dequantize(layer.weight, *scales, group_size=32, bits=layer.bits))
        off = np.sqrt(np.square(got - want).mean() / np.square(want).mean())
        assert off < (0.004 if dtype == "bfloat16" else 1e-7), name
        x = np.random.default_rng(0).standard_normal((3, want.shape[1])).astype(np.float32)
        y = np.array(layer(mx.array(x).astype(layer.scales.dtype)).astype(mx.float32))
        exact = x @ want.T + np.array(layer.bias.astype(mx.float32))
        # The rest is MLX's arithmetic, whose sums of many roundings go as far as 0.005 and 0.04 of the largest.
        loss = {"float32": 1e-6, "float16": 0.02, "bfloat16": 0.1}[dtype]
        assert np.abs(y - exact).max() / np.abs(exact).max() < loss
    if kind != "Q4_0":
        other = convert.convert(file, tmp_path / "other", bits=4, dtype=dtype, tokenizer=words)
        assert description.read(other).error["transformer"] > 0.05


def test_fused_layers_are_cut_as_they_are_stored(tmp_path):
    """Z-Image's attention, whose rows are three layers; what is transposed is quantized anew."""
    raw, path = blocks("Q8_0", 96, 64), tmp_path / "a.gguf"
    written(path, {"attention.qkv.weight": raw}, kinds={"attention.qkv.weight": "Q8_0"})
    tensor = source.read(path).tensors["attention.qkv.weight"]
    whole = gguf.quants.dequantize(raw, Kind.Q8_0).reshape(96, 64)
    for i in range(3):
        weight = rules.Weight((rules.Piece(tensor, i, 3, False),), (32, 64))
        assert weight.bits == 8
        got = mx.dequantize(*weight.steps(8), group_size=32, bits=8)
        np.testing.assert_array_equal(np.array(got), whole[32 * i : 32 * i + 32])
    assert rules.Weight((rules.Piece(tensor, 0, 1, True),), (64, 96)).bits is None  # no row of it is a row of the file


def test_a_scale_whose_lowest_number_overflows_is_an_error(parts, words, tmp_path):
    """-128 times 600 is beyond float16, though no number of the block is."""
    net = transformer_state("dev", parts["transformer"])
    name = "single_blocks.0.linear2.weight"
    raw = gguf.quants.quantize(net[name], Kind.Q8_0)
    raw.reshape(-1, 34)[0] = np.frombuffer(np.float16(600).tobytes() + bytes([100] * 32), np.uint8)
    file = written(apart(tmp_path / "a", "dev", parts).with_name("net.gguf"), net | {name: raw}, kinds={name: "Q8_0"})
    with pytest.raises(Error, match=r"linear2.weight' in .* has numbers too large for float16"):
        convert.convert(file, tmp_path / "out", bits=8, dtype="float16", tokenizer=words)
    assert not (tmp_path / "out").exists()
