"""Broken checkpoints through the command line: exit code not 0, one line on stderr that names the thing and the fix, no
traceback, and nothing left behind. The good ones they are made from do convert, so each fails for its own reason."""

import errno
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxdiff import Error, convert, weights
from mlxdiff.convert import inspect, registry, source, write
from mlxdiff.convert.__main__ import main
from mlxdiff.models import build

from . import clip_vocab, original
from .checkpoints import full, header, manifest, raw, sparse

CONFIGS = {
    "text_encoder": {
        "architectures": ["CLIPTextModel"], "vocab_size": 700, "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 1, "eos_token_id": 699,
    },
    "unet": {
        "_class_name": "UNet2DConditionModel", "block_out_channels": [32, 32], "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "cross_attention_dim": 64,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "attention_head_dim": 8,
    },
    "vae": {
        "_class_name": "AutoencoderKL", "block_out_channels": [32, 32], "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    },
}  # fmt: skip
CLASSES = {"text_encoder": "CLIPTextModel", "unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}


def state(name: str, folder: Path) -> dict[str, np.ndarray]:
    """Random weights of one component, layout as diffusers saves it."""
    settings = convert.settings.Settings(folder / name / "config.json")
    config = registry.MODULES[registry.CLASSES[CLASSES[name]]].from_json(settings, CLASSES[name])
    rng = np.random.default_rng(0)
    out = {}
    for key, value in tree_flatten(build.build(config).parameters()):
        x = rng.normal(size=value.shape).astype(np.float32)
        point = key.endswith(("proj_in.weight", "proj_out.weight", "conv_shortcut.weight", "quant_conv.weight"))
        x = x[:, None, None, :] if point and x.ndim == 2 and "attn" not in key else x
        out[key] = x.transpose(0, 3, 1, 2) if x.ndim == 4 else x
    return out


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """model/: a folder in diffusers layout; one.safetensors: the same in one file; words/: a tokenizer."""
    root = tmp_path_factory.mktemp("good")
    model, one = root / "model", {}
    model.mkdir()
    for name, config in CONFIGS.items():
        (model / name).mkdir()
        (model / name / "config.json").write_text(json.dumps(config))
        own = state(name, model)
        full(model / name / "model.safetensors", own)
        if name == "unet":
            one |= original.under("model.diffusion_model.", original.unet(own))
        elif name == "vae":
            one |= original.under("first_stage_model.", original.vae(own))
        else:
            one |= original.under("cond_stage_model.transformer.text_model.", own)
    full(root / "one.safetensors", one)
    clip_vocab.write(root / "words", clip_vocab.trained(150))
    shutil.copytree(root / "words", model / "tokenizer")
    (model / "scheduler").mkdir()
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "PNDMScheduler"}))
    index = {k: ["x", v] for k, v in CLASSES.items()} | {"scheduler": ["diffusers", "PNDMScheduler"]}
    (model / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionPipeline"}))
    return root


class Place:
    """A copy of the good ones to break, and what to type."""

    def __init__(self, root: Path, good: Path):
        self.root, self.good = root, good
        self.file = root / "bad.safetensors"

    def data(self, change=None, size: int | None = None) -> list[str]:
        """bad.safetensors: the good file's bytes, changed and cut."""
        data = bytearray((self.good / "one.safetensors").read_bytes())
        data = data if change is None else change(data)
        self.file.write_bytes(bytes(data[:size]))
        return self.single()

    def bytes(self, data: bytes, name: str = "bad.safetensors") -> list[str]:
        (self.root / name).write_bytes(data)
        return [str(self.root / name), "-o", "out"]

    def header(self, entries, size: int | None = None) -> list[str]:
        raw(self.file, entries, size)
        return self.single()

    def tensors(self, change) -> list[str]:
        """bad.safetensors: the good file's tensors, changed."""
        held = {k: np.array(t.read()) for k, t in source.read(self.good / "one.safetensors").tensors.items()}
        full(self.file, change(held))
        return self.single()

    def single(self, *more: str) -> list[str]:
        return [str(self.file), "-o", "out", "--dtype", "float32", "--tokenizer", str(self.good / "words"), *more]

    def folder(self, change=None) -> list[str]:
        shutil.copytree(self.good / "model", self.root / "bad")
        if change is not None:
            change(self.root / "bad")
        return [str(self.root / "bad"), "-o", "out", "--dtype", "float32"]

    def json(self, path: str, **values) -> list[str]:
        def change(folder: Path) -> None:
            content = json.loads((folder / path).read_text())
            (folder / path).write_text(json.dumps(content | values))

        return self.folder(change)

    def sparse(self, name: str) -> list[str]:
        m = manifest(name)
        sparse(self.file, m["tensors"], dtype=m["dtype"], dtypes=m.get("dtypes"))
        return self.single()


def put(key: str, value: object):
    """The same tensors with one (the first whose name ends in `key`) changed by a function, replaced, or taken out."""

    def change(held: dict) -> dict:
        name = next((k for k in held if k.endswith(key)), key)
        new = value(held[name]) if callable(value) else value
        return {k: x for k, x in held.items() if k != name} | ({} if new is None else {name: new})

    return change


def poke(x: np.ndarray, value: float) -> np.ndarray:
    x = x.copy()
    x.flat[-1] = value
    return x


def respan(start: int, end: int):
    """The last of three tensors moved."""
    entries = header({"a": (2,), "b": (2,), "c": (2,)}, "F32")
    entries["c"]["data_offsets"] = [start, end]
    return entries


def cut(n: int):
    return lambda place: place.data(size=n)


def twice(held: dict) -> dict:
    """The last norm under both of the names it can have."""
    return held | {k.replace("text_model.", ""): x for k, x in held.items() if "final_layer" in k}


def too_large(p: Place) -> list[str]:
    p.tensors(put(NORM, lambda x: poke(x, 1e6)))
    return [str(p.file), "-o", "out", "--dtype", "float16", "--tokenizer", str(p.good / "words")]


def itself(p: Place) -> list[str]:
    p.folder()
    return [str(p.root / "bad"), "-o", str(p.root / "bad")]


def unet(**values):
    return lambda place: place.json("unet/config.json", **values)


def scheduler(**values):
    return lambda place: place.json("scheduler/scheduler_config.json", **values)


def index(text: str):
    return lambda place: place.folder(lambda f: (f / "model_index.json").write_text(text))


def gone(name: str):
    return lambda place: place.folder(lambda f: (f / name).unlink())


def other_text(folder: Path) -> None:
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(CONFIGS["text_encoder"] | {"hidden_size": 128, "num_attention_heads": 2}))
    full(path.with_name("model.safetensors"), state("text_encoder", folder))


def other_vae(folder: Path) -> None:
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(CONFIGS["vae"] | {"latent_channels": 8}))
    full(path.with_name("model.safetensors"), state("vae", folder))


def relink(place: Place) -> list[str]:
    (place.root / "a.safetensors").symlink_to(place.file)
    place.file.symlink_to(place.root / "a.safetensors")
    return place.single()


def shards(folder: Path, **index) -> Path:
    """The U-Net in two files."""
    own = {k: np.array(t.read()) for k, t in source.read(folder / "unet" / "model.safetensors").tensors.items()}
    (folder / "unet" / "model.safetensors").unlink()
    names, placed = sorted(own), {}
    for i, part in enumerate((names[:50], names[50:])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        full(folder / "unet" / file, {k: own[k] for k in part})
        placed |= dict.fromkeys(part, file)
    path = folder / "unet" / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": placed | index}))
    return path


def out_of(p: Place) -> list[str]:
    p.folder()
    return [str(p.root / "bad" / "unet" / "model.safetensors"), "-o", "out"]


def one_shard(p: Place) -> list[str]:
    p.folder(shards)
    return [str(p.root / "bad" / "unet" / "model-00001-of-00002.safetensors"), "-o", "out"]


def no_shard(folder: Path) -> None:
    shards(folder)
    (folder / "unet" / "model-00002-of-00002.safetensors").unlink()


def no_index(folder: Path) -> None:
    shards(folder).unlink()


def only_pickle(folder: Path) -> None:
    (folder / "unet" / "model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"PK\x03\x04")


def several(folder: Path) -> None:
    (folder / "vae" / "model.safetensors").rename(folder / "vae" / "a.safetensors")
    shutil.copy(folder / "vae" / "a.safetensors", folder / "vae" / "b.safetensors")


def wide_words(p: Place) -> list[str]:
    words = p.root / "words"
    words.mkdir()
    (words / "vocab.json").write_text(json.dumps({f"w{i}": i for i in range(49408)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    return [str(p.good / "one.safetensors"), "-o", "out", "--tokenizer", str(words)]


def output(p: Place, path: str) -> list[str]:
    return [str(p.good / "model"), "-o", path]


def occupied(p: Place) -> list[str]:
    (p.root / "out").mkdir()
    (p.root / "out" / "diary.txt").write_text("not a model")
    return output(p, "out")


def taken(p: Place) -> list[str]:
    (p.root / "out").write_text("not a folder")
    return output(p, "out")


KERNEL, NORM = "model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.out.0.bias"
X = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

# name -> (what to break, what the error must name)
BAD = {
    # files that are no safetensors
    "empty": (lambda p: p.bytes(b""), "is empty"),
    "a web page": (lambda p: p.bytes(b"<!DOCTYPE html><html>sign in</html>"), "web page"),
    "a PNG": (lambda p: p.bytes(b"\x89PNG\r\n\x1a\n" + bytes(40), "house.png"), "is a picture, not weights."),
    "a WebP": (lambda p: p.bytes(b"RIFF\x20\x00\x00\x00WEBPVP8 " + bytes(40)), "is a picture, not weights."),
    "an LFS pointer": (lambda p: p.bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "LFS pointer"),
    "a .ckpt": (lambda p: p.bytes(b"PK\x03\x04", "model.ckpt"), "can run any code"),
    "a .pt": (lambda p: p.bytes(b"\x80\x02}q", "model.pt"), "can run any code"),
    "a .pth": (lambda p: p.bytes(b"\x80\x04", "model.pth"), "can run any code"),
    "a .bin": (lambda p: p.bytes(b"PK\x03\x04", "pytorch_model.bin"), "can run any code"),
    "a pickle under another name": (lambda p: p.bytes(b"PK\x03\x04" + bytes(90)), "can run any code"),
    "a broken .gguf": (lambda p: p.bytes(b"GGUF\x03\x00\x00\x00", "model.gguf"), "cut short"),
    "a broken GGUF under another name": (lambda p: p.bytes(b"GGUF\x63" + bytes(90)), "version 99"),
    "a picture": (lambda p: p.bytes(b"\x89PNG\r\n\x1a\n" + bytes(90), "fox.png"), "fox.png"),
    "noise": (lambda p: p.bytes(np.random.default_rng(0).bytes(4096)), "claims a header"),
    "zeros": (lambda p: p.bytes(bytes(4096)), "claims a header of 0"),
    "text": (lambda p: p.bytes(b"the weights are in the other folder\n", "notes.txt"), "notes.txt"),
    "absent": (lambda p: p.single(), "no model, file or folder"),
    "a symlink loop": (relink, "symbolic links"),
    "a symlink to nothing": (lambda p: p.file.symlink_to("gone") or p.single(), "No such file"),
    "an empty folder": (lambda p: p.file.mkdir() or p.single(), "holds no .safetensors"),
    "a pipe": (lambda p: os.mkfifo(p.file) or p.single(), "is not a file"),
    # broken headers and data
    **{f"cut at byte {n}": (cut(n), "bad.safetensors") for n in (3, 8, 9, 200, 20000)},
    "cut by one byte": (lambda p: p.data(lambda d: d[:-1]), "is cut short"),
    "bytes to spare": (lambda p: p.data(lambda d: d + b"\0"), "after its last tensor"),
    "length beyond the file": (lambda p: p.data(lambda d: struct.pack("<Q", 2**40) + d[8:]), "claims a header"),
    "length a little short": (lambda p: p.data(lambda d: struct.pack("<Q", 100) + d[8:]), "not valid JSON"),
    "header damaged": (lambda p: p.data(lambda d: d[:50] + b"\xff\xfe" + d[52:]), "not valid JSON"),
    "header a list": (lambda p: p.header(b"[1, 2]", 0), "not a JSON object"),
    "header with a name twice": (lambda p: p.header(b'{"a":1,"a":2}', 0), "lists 'a' twice"),
    "dtype unknown": (lambda p: p.header({"x": X | {"dtype": "Q4_0"}}), "'Q4_0'"),
    "dtype of another size": (lambda p: p.header({"x": X | {"dtype": "F16"}}), "does not fill"),
    "shape negative": (lambda p: p.header({"x": X | {"shape": [-2]}}), "cannot be"),
    "tensors overlap": (lambda p: p.header(respan(12, 20)), "overlaps"),
    "tensors with a hole": (lambda p: p.header(respan(20, 28)), "leaves unused bytes"),
    "no tensors": (lambda p: p.header(b"{}", 0), "no checkpoint that is known"),
    "tensors of something else": (lambda p: p.header(header({"layers.0.q_proj.weight": (4, 4)})), "q_proj"),
    # tensors
    "a tensor missing": (lambda p: p.tensors(put(NORM, None)), "unet.conv_norm_out.bias"),
    "the tensor missing that tells the size": (lambda p: p.tensors(put(KERNEL, None)), "unet.conv_in.weight"),
    "a tensor too many": (lambda p: p.tensors(put("stranger", np.ones(2, np.float32))), "'stranger'"),
    "a tensor misshaped": (lambda p: p.tensors(put(NORM, lambda x: x[:-1])), "(31,) does not fit"),
    "a matrix transposed": (lambda p: p.tensors(put("emb_layers.1.weight", lambda x: x.T)), "time_emb_proj"),
    "a kernel already transposed": (
        lambda p: p.tensors(put("out.2.weight", lambda x: x.transpose(0, 2, 3, 1))),
        "does not fit conv_out.weight",
    ),
    "an integer weight": (lambda p: p.tensors(put(NORM, lambda x: x.astype(np.int64))), "I64 where"),
    "one parameter from two tensors": (
        lambda p: p.tensors(twice),
        "filled already",
    ),
    "NaN": (lambda p: p.tensors(put(NORM, lambda x: poke(x, np.nan))), "'model.diffusion_model.out.0.bias'"),
    "infinity": (lambda p: p.tensors(put("decoder.conv_in.bias", lambda x: poke(x, np.inf))), "conv_in.bias"),
    "too large for float16": (too_large, "too large for float16. Use --dtype bfloat16"),
    # whole files of something else, and half models
    "a LoRA": (lambda p: p.sparse("lora_kohya_sd15"), "a LoRA"),
    "a ControlNet": (
        lambda p: p.sparse("sd15_controlnet_canny"),
        "is a ControlNet, which is no model by itself. Name the model that it guides, and give it with its picture: "
        "--control FILE PICTURE.",
    ),
    "a FLUX transformer alone": (
        lambda p: p.sparse("flux1-schnell"),
        "without text_encoder, text_encoder_2, vae. Give --clip clip_l*.safetensors, --t5 t5xxl*.safetensors, --vae ae",
    ),
    "SD3 without its CLIPs": (lambda p: p.sparse("sd3_medium"), "without text_encoder, text_encoder_2. Give --clip "),
    "an IP-Adapter": (lambda p: p.sparse("ip_adapter_sd15"), "an IP-Adapter"),
    "a tiny VAE": (
        lambda p: p.sparse("taesd"),
        "a TAESD decoder, for previews, which is no model by itself. Draw previews by it: --taesd",
    ),
    "half of a tiny VAE": (lambda p: p.sparse("taesd_encoder_single"), "encoder of a TAESD"),
    "a U-Net alone": (lambda p: p.sparse("sdxl_base_unet"), "only unet, without text_encoder, text_encoder_2, vae"),
    "a VAE alone": (lambda p: p.sparse("sdxl_vae"), "give this one as --vae FILE"),
    "a text encoder alone": (lambda p: p.sparse("comfy_clip_l"), "give this one as --clip FILE"),
    "SDXL's second text encoder alone": (lambda p: p.sparse("comfy_clip_g"), "give this one as --clip-g FILE"),
    "a network out of a folder": (out_of, "without text_encoder, vae. Use the model that it is a part of, /"),
    "one of a network's shards": (one_shard, "model-00001-of-00002.safetensors is one of several shards"),
    "no VAE": (
        lambda p: p.tensors(lambda h: {k: x for k, x in h.items() if not k.startswith("first_stage")}),
        "without vae",
    ),
    "a variant that cannot draw": (
        lambda p: p.tensors(put(KERNEL, lambda x: np.concatenate([x, x], 1))),
        "edit variant",
    ),
    "networks of different models": (
        lambda p: p.folder(other_text),
        "takes text 64 wide and text encoders that give 128",
    ),
    "a VAE of other latents": (
        lambda p: p.folder(other_vae),
        "takes latents 4 wide and a vae (model.safetensors) that gives 8",
    ),
    "no tokenizer": (lambda p: [str(p.good / "one.safetensors"), "-o", "out"], "--tokenizer"),
    "a tokenizer folder without one": (
        lambda p: [str(p.good / "one.safetensors"), "-o", "out", "--tokenizer", str(p.good)],
        "holds no tokenizer",
    ),
    "a tokenizer of another model": (wide_words, "49408 words; the text encoder knows 700"),
    # folders
    "model_index.json cut": (index('{"unet": ['), "not valid JSON"),
    "model_index.json a list": (index("[]"), "holds list"),
    "a component's folder missing": (lambda p: p.folder(lambda f: shutil.rmtree(f / "vae")), "lacks the folder vae"),
    "config.json missing": (gone("unet/config.json"), "unet/config.json"),
    "a component unknown": (lambda p: p.json("model_index.json", controlnet=["x", "ControlNetModel"]), "controlnet"),
    "a class that is no text": (lambda p: p.json("model_index.json", vae=["x", ["y"]]), "whose vae is a ['y']"),
    "no unet": (lambda p: p.json("model_index.json", unet=[None, None]), "has no unet and no transformer"),
    "a folder of FLUX": (
        lambda p: p.json("model_index.json", _class_name="FluxPipeline", transformer=["diffusers", "FluxTransformer"]),
        "is a FluxPipeline whose transformer is a FluxTransformer",
    ),
    "noise of continuous time": (scheduler(timestep_type="continuous"), "timestep_type"),
    "a setting not implemented": (unet(class_embed_type="timestep"), "class_embed_type"),
    "a block that is no text": (unet(down_block_types=["DownBlock2D", {"a": 1}]), "down_block_types"),
    "a block not implemented": (unet(down_block_types=["AttnDownBlock2D"] * 2), "AttnDown"),
    "a setting of the wrong kind": (unet(layers_per_block="two"), "layers_per_block"),
    "heads that do not divide": (unet(attention_head_dim=5), "unet is 32 wide, which is no multiple of its 5 heads"),
    "groups that do not divide": (lambda p: p.json("vae/config.json", norm_num_groups=5), "its 5 norm groups"),
    "a config unlike its weights": (unet(cross_attention_dim=96), "does not fit"),
    "a config of fewer blocks": (lambda p: p.json("vae/config.json", layers_per_block=2), "missing (such as vae."),
    "a scheduler unknown": (scheduler(_class_name="EDMEulerScheduler"), "EDMEuler"),
    "betas of its own": (scheduler(trained_betas=[0.1]), "trained_betas"),
    "weights missing": (gone("vae/model.safetensors"), "holds no .safetensors"),
    "weights only as a pickle": (lambda p: p.folder(only_pickle), "can run any code"),
    "weights twice": (lambda p: p.folder(several), "several weight files: a.safetensors, b.safetensors"),
    "a shard missing": (lambda p: p.folder(no_shard), "lacks the shard model-00002-of-00002.safetensors"),
    "shards without an index": (lambda p: p.folder(no_index), "no index"),
    "an index of other tensors": (
        lambda p: p.folder(lambda f: shards(f, **{"conv_in.bias": "model-00002-of-00002.safetensors"})),
        "disagrees",
    ),
    "an index that leaves the folder": (lambda p: p.folder(lambda f: shards(f, x="../../a.safetensors")), "'../../a"),
    "a tokenizer missing": (lambda p: p.folder(lambda f: shutil.rmtree(f / "tokenizer")), "has no tokenizer"),
    # where to write
    "output a file": (taken, "out exists"),
    "output a folder of something else": (occupied, "folder of something else"),
    "output under a file": (lambda p: output(p, "/dev/null/out"), "/dev/null/out"),
    "output the checkpoint itself": (itself, "folder of something else"),
    "no output": (lambda p: [str(p.good / "model")], "-o"),
    "bits that are not": (lambda p: [*output(p, "out"), "-q", "7"], "7"),
    "a dtype that is not": (lambda p: [*output(p, "out"), "--dtype", "int8"], "int8"),
    "a prediction that is not": (lambda p: [*output(p, "out"), "--prediction", "flow"], "flow"),
}  # fmt: skip


@pytest.fixture
def place(tmp_path, good, monkeypatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, good)


def files(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*"))


def fails(argv: list[str], capsys) -> str:
    try:
        code = main(argv)
    except SystemExit as e:  # argparse
        code = e.code
    said = capsys.readouterr()
    assert code not in (0, None)
    assert len(said.err.splitlines()) == 1, said.err
    assert said.out == ""
    return said.err


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoint(place, case, capsys):
    prepare, named = BAD[case]
    argv = prepare(place)
    before = files(place.root)
    error = fails(argv, capsys)
    assert named in error
    assert files(place.root) == before


def test_there_are_enough():
    assert len(BAD) >= 40


def test_the_good_ones_convert(place):
    one = [
        str(place.good / "one.safetensors"),
        "-o",
        "one",
        "--dtype",
        "float32",
        "--tokenizer",
        str(place.good / "words"),
    ]
    assert main(one) == 0
    assert main([*place.folder()[:-3], "folder", "--dtype", "float32"]) == 0
    for name in CLASSES:
        assert Path("one", f"{name}.safetensors").read_bytes() == Path("folder", f"{name}.safetensors").read_bytes()


def test_disk_full(place, monkeypatch, capsys):
    """In the middle of the second component."""
    write_one, left = weights.Writer._write, [200]

    def full_after(self, key, value):
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_one(self, key, value)

    monkeypatch.setattr(weights.Writer, "_write", full_after)
    assert "No space left on device" in fails(output(place, "out"), capsys)
    assert files(place.root) == []


def test_too_little_space_is_said_before_anything_is_written(place, monkeypatch, capsys):
    monkeypatch.setattr(write.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    assert "GB free; the model needs" in fails(output(place, "out"), capsys)
    assert files(place.root) == []


def test_unreadable(place, monkeypatch, capsys):
    """Tests may run as root, who reads everything; so the system's refusal is put in."""

    def refuse(path, *_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    argv = place.data()
    monkeypatch.setattr(source, "open", refuse, raising=False)
    assert "Permission denied" in fails(argv, capsys)
    assert files(place.root) == ["bad.safetensors"]


def test_a_file_that_shrinks_meanwhile(place):
    place.data()
    checkpoint = convert.open(place.file)
    place.file.write_bytes(place.file.read_bytes()[:10000])
    weight = list(checkpoint.components["vae"].weights.values())[-1]
    with pytest.raises(Error, match="became shorter while it was read"):
        weight.array()


@pytest.mark.parametrize("first", range(0, 120, 20))
def test_any_mix_of_names_and_shapes_is_told_or_refused(place, first, capsys):
    """Dropped, renamed, resized and exchanged tensors in a sound file: inspect ends in 0 or in one line, never else."""
    for seed in range(first, first + 20):
        mix_of_names_and_shapes(place, seed, capsys)


def mix_of_names_and_shapes(place, seed: int, capsys) -> None:
    rng = np.random.default_rng(seed)
    file = place.good / ("one.safetensors" if seed % 2 else "model/unet/model.safetensors")
    shapes = {k: t.shape for k, t in source.read(file).tensors.items()}
    for _ in range(rng.integers(1, 6)):
        name, other = (str(x) for x in rng.choice(list(shapes), 2, replace=False))
        kind = rng.integers(6)
        if kind == 0:
            del shapes[name]
        elif kind == 1:  # whole blocks
            part = rng.choice(name.split("."))
            shapes = {k: s for k, s in shapes.items() if f".{part}." not in k} or {"x": ()}
        elif kind == 2:
            shapes[name] = tuple(int(x) for x in rng.integers(0, 40, rng.integers(0, 6)))
        elif kind == 3:
            shapes[name], shapes[other] = shapes[other], shapes[name]
        elif kind == 4:
            shapes[name.replace(".0.", f".{rng.integers(99)}.")] = shapes.pop(name)
        else:
            shapes[name.replace(name.split(".")[-1], str(rng.choice(["weight", "bias", "", "9" * 30])))] = ()
        if len(shapes) < 2:
            break
    sparse(place.file, shapes, dtype="F32")
    code = inspect.main([str(place.file), "--json"])
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == (code != 0)
    if said.out:
        told = json.loads(said.out)
        assert (code == 0) == (told["unmapped"] == {} and told["missing"] == [])


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_any_value_in_a_config_is_told_or_refused(place, first, capsys):
    """One random setting of each config.json, a random value: inspect ends in 0 or in one line, never else."""
    for seed in range(first, first + 20):
        value_in_a_config(place, seed, capsys)
        shutil.rmtree(place.root / "bad")


def value_in_a_config(place, seed: int, capsys) -> None:
    rng = np.random.default_rng(seed)
    junk = [None, True, 0, -1, 2**31 - 1, 2**70, 0.5, float("nan"), "", "silu", [], [1], [[1]], [None], {}, {"a": 1}]

    def change(folder: Path) -> None:
        for name in (*CONFIGS, "scheduler"):
            path = folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
            keys = [n for n in KNOWN[name] if rng.random() < 0.2]
            values = {k: junk[rng.integers(len(junk))] for k in keys}
            path.write_text(json.dumps(json.loads(path.read_text()) | values))

    code = inspect.main([*place.folder(change)[:1], "--json"])
    assert len(capsys.readouterr().err.splitlines()) == (code != 0)


KNOWN = {
    "text_encoder": ["architectures", "vocab_size", "hidden_size", "num_hidden_layers", "hidden_act", "eos_token_id",
                     "layer_norm_eps", "projection_dim"],
    "unet": ["_class_name", "block_out_channels", "layers_per_block", "down_block_types", "attention_head_dim",
             "cross_attention_dim", "transformer_layers_per_block", "reverse_transformer_layers_per_block",
             "mid_block_type", "time_cond_proj_dim", "addition_embed_type", "norm_num_groups", "norm_eps"],
    "vae": ["block_out_channels", "layers_per_block", "latent_channels", "scaling_factor", "shift_factor",
            "use_quant_conv", "mid_block_add_attention", "latents_mean"],
    "scheduler": ["_class_name", "beta_start", "num_train_timesteps", "prediction_type", "timestep_spacing",
                  "steps_offset", "use_karras_sigmas", "beta_schedule"],
}  # fmt: skip


def run(argv: list[str], **limits) -> subprocess.CompletedProcess:
    code = "import sys; from mlxdiff.convert.__main__ import main; sys.exit(main())"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, env=env, check=False, **limits
    )


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([f"model.diffusion_model.input_blocks.{i}.0.weight" for i in range(600)], "more blocks than any model"),
        ([f"decoder.up.{i}.block.0.weight" for i in range(600)], "more blocks than any model"),
        ([f"body.{i}.block1.weight" for i in range(600)], "more blocks than any model"),
        ([f"{'1' * 5000}.conv.0.weight"], "a TAESD decoder"),  # Python makes no number of so many digits
        ([f"joint_blocks.{'1' * 5000}.x_block.attn.qkv.weight", "x_embedder.proj.weight"], "Stable Diffusion 3"),
    ],
)
def test_numbers_in_names_make_no_work(tmp_path, names, says, capsys):
    """A row of the table for each block, and each row looked at each name: a file of a megabyte took minutes."""
    file = sparse(tmp_path / "a.safetensors", dict.fromkeys(names, (1,)))
    assert inspect.main([str(file)]) == 1
    assert says in "".join(capsys.readouterr())


def test_as_a_command(place):
    """One of the above in a process of its own, where code and lines are what a shell sees."""
    prepare, named = BAD["NaN"]
    argv = prepare(place)
    before = files(place.root)
    ran = run(argv)
    assert ran.returncode == 1
    assert named in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    assert files(place.root) == before


def test_a_real_limit_on_file_size(place):
    """The kernel's refusal in the middle of a write."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))  # noqa: E731
    ran = run(output(place, "out"), preexec_fn=limit)
    assert ran.returncode == 1
    assert "out cannot be written: File too large" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    assert files(place.root) == []
