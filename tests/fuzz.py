"""Damaged files, made at random from good ones: each must be read or be refused with one Error. `test_fuzz` tries a few
of them; `python -m tests.fuzz --minutes 60` tries many. An input is known by its number: `--first N --count 1` repeats
it."""

import argparse
import io
import json
import random
import shutil
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from mlxdiff import builtin, convert, description, images, load, metadata, samplers, tokenizers
from mlxdiff.convert import embedding, lora, scheduler, source, write
from mlxdiff.convert import settings as reading
from mlxdiff.convert import tokenizer as copying
from mlxdiff.errors import Error
from mlxdiff.models import controlnet, t2i, t5, unet
from mlxdiff.recipe import recipe
from mlxdiff.store import references
from mlxdiff.train import fit
from tests import checkpoints, t5_vocab

SLOW = 5.0  # seconds of work that one input may take
_VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    7,
    10**9,
    2**63,
    10**30,
    0.5,
    -0.0,
    1e308,
    "",
    "x",
    "\x1b[31m",
    "../../x",
    "a" * 999,
]
_VALUES += [[0, 2**31 - 1], [2**31 - 1, 0], [], {}, [0], [[1]], {"a": 1}, ["a", "b"], [10**6] * 4]
_VALUES += [float("nan"), float("inf")]
_PARAMETERS = "a fox\nNegative prompt: rain\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 3, Size: 64x64, Model: x"


def damaged(rng: random.Random, data: bytes, is_json: bool) -> bytes:
    """One to three changes: of values in the JSON, or of bytes."""
    for _ in range(rng.randint(1, 3)):
        if is_json and rng.random() < 0.8:
            try:
                data = json.dumps(_changed(rng, json.loads(data))).encode()
                continue
            except (ValueError, RecursionError):  # no JSON any more, after a change of bytes
                pass
        at = rng.randrange(len(data) + 1)
        data = rng.choice(
            [
                data[:at],
                data[:at] + rng.randbytes(4) + data[at:],
                data[:at] + data[at + rng.randint(1, 9) :],
                data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
                data + data,
                b"[" * 100_000,
            ]
        )
    return data


def _changed(rng: random.Random, value):
    """The JSON value with one place of it replaced, removed, or put twice."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice([*value])
        if rng.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if rng.random() < 0.1:
            return value | {f"{key}2": value[key]}
        return value | {key: _changed(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return [*value[:i], _changed(rng, value[i]), *value[i + 1 :]]
    return rng.choice(_VALUES)


def _with_header(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """Weights whose header is changed, and with it, mostly, its length."""
    length = struct.unpack("<Q", data[:8])[0]
    header = change(data[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _outward(network: nn.Module) -> dict[str, tuple]:
    """The shapes of a network's parameters as diffusers stores them."""
    shapes = {name: tuple(x.shape) for name, x in tree_flatten(network.parameters())}
    return {name: (s[0], s[3], *s[1:3]) if len(s) == 4 else s for name, s in shapes.items()}


_T5 = t5.Config(220, 8, 1, 2, 4, 16, 8, 16, 1e-6)


class Fuzz:
    """The good files, in a folder of this run, and what has happened so far."""

    def __init__(self, folder: Path, drawing: bool = False):
        self.model = shutil.copytree(builtin.FOLDER, folder / "model")
        files = sorted(f for f in self.model.rglob("*") if f.suffix in (".json", ".txt", ".safetensors"))
        self.files = {f: f.read_bytes() for f in files}
        self.picture = folder / "a.png"
        checkpoint = convert.open(self.model)
        self.notes = folder / "converted"
        self.notes.mkdir()
        convert.describe(checkpoint, recipe(None, "float32")).write(self.notes)
        self.note = (self.notes / "model.json").read_bytes()
        self.ends: Counter[str] = Counter()
        self.network = folder / "network.safetensors"
        self.described = description.read(self.notes)
        net = self.described.net
        few = {"down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": net.channels[1]}
        lora_shapes = {
            f"unet.{n}.lora_{ab}.weight": s for n, w in few.items() for ab, s in (("A", (2, w)), ("B", (w, 2)))
        }
        adapter = {"image_proj.proj.weight": (4 * net.context, 12), "image_proj.proj.bias": (4 * net.context,)}
        adapter |= {f"image_proj.norm.{leaf}": (net.context,) for leaf in ("weight", "bias")}
        adapter |= {
            f"ip_adapter.{2 * i + 1}.to_{kv}_ip.weight": (w, net.context)
            for i, w in enumerate(net.reading)
            for kv in "kv"
        }
        redux = {f"redux_{way}.{leaf}": shape for way, shapes in
                 (("up", {"weight": (48, 12), "bias": (48,)}), ("down", {"weight": (16, 48), "bias": (16,)}))
                 for leaf, shape in shapes.items()}  # fmt: skip
        half = {f: getattr(net, f) for f in unet.HalfConfig.__dataclass_fields__}
        half |= {"channels": (32, 64), "layers": (1, 1), "depth": ((1,), ()), "heads": (8, 8)}
        guide = controlnet.ControlNet(controlnet.Config(**half, hint_channels=3, hint=(4, 8, 8, 8), pooled=False))
        t2i_guide = t2i.T2IAdapter(t2i.Config("full", 3, net.channels, 2, 8))
        enlarges = {name: x.shape for name, x in checkpoints.esrgan(1, 4, 2, 1, 1).items()}
        width = self.described.components["text_encoder"].width
        read = lambda file: convert.read(file, mx.float32)  # noqa: E731
        kinds: dict[str, tuple[dict, Callable]] = {
            "upscaler": (enlarges, read),
            "redux": (redux, read),
            "lora": (lora_shapes, lambda file: lora.read(file, self.described)),
            "word": ({"emb_params": (2, width)}, lambda file: embedding.read(file, self.described)),
            "ip-adapter": (adapter, lambda file: references._adapter(file, self.described)),
            "controlnet": (_outward(guide), read),
            "t2i": (_outward(t2i_guide), read),
        }
        self.networks = {name: (self._weights(shapes), read) for name, (shapes, read) in kinds.items()}
        self.networks["gguf"] = self._gguf(enlarges), read
        for good, read in self.networks.values():
            self.network.write_bytes(good)
            read(self.network)
        self.trained = nn.Linear(4, 4)
        self.run = folder / "run"
        self.run.mkdir()
        fit.same_run(self.run, {"steps": 3, "rate": 0.1})
        (self.run / "log.csv").write_text("step,loss,rate,seconds\n1,0.5,0.1,1.0\n2,0.4,0.1,1.0\n", encoding="utf-8")
        state = fit._state(self.trained, fit.optimizer("adamw"), self.trained.trainable_parameters())
        fit._save(self.run, state, 2)
        self.of_run = {file: file.read_bytes() for file in sorted(self.run.iterdir()) if file.suffix != ".png"}
        t5_vocab.write(folder / "t5")
        self.pieces = folder / "t5" / "spiece.model"
        self.good_pieces = self.pieces.read_bytes()
        self.pipe = load(self.model, dtype="float32") if drawing else None

    def _weights(self, shapes: dict) -> bytes:
        return checkpoints.full(
            self.network, {n: np.ones(shape, np.float32) for n, shape in shapes.items()}
        ).read_bytes()

    def _gguf(self, shapes: dict) -> bytes:
        writer = gguf.GGUFWriter(self.network, "esrgan")
        for name, shape in shapes.items():
            writer.add_tensor(name, np.ones(shape, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return self.network.read_bytes()

    def one(self, number: int) -> None:
        """Make the input of this number and read it. Anything but success or an Error is raised."""
        rng = random.Random(number)
        kinds = [self.checkpoint, self.description, self.settings, self.index, self.training, self.spiece]
        kind = rng.choice([*kinds, self.beside, self.beside, *[self.scheduler] * (self.pipe is not None)])
        self.kind, begin = "", time.process_time()
        try:
            kind(rng)
            end = "read"
        except Error:
            end = "refused"
        assert (took := time.process_time() - begin) < SLOW, f"input {number} took {took:.1f} s"
        self.ends[f"{self.kind or kind.__name__} {end}"] += 1

    def checkpoint(self, rng: random.Random) -> None:
        file = rng.choice([*self.files])
        good = self.files[file]
        if file.suffix == ".safetensors":
            file.write_bytes(_with_header(good, lambda header: damaged(rng, header, True)))
        else:
            file.write_bytes(damaged(rng, good, file.suffix == ".json"))
        try:
            checkpoint = convert.open(self.model)
            convert.describe(checkpoint, recipe(None, "float32"))
            write._tokenizers(checkpoint, None)
            tokenizers.load(self.model / "tokenizer").encode("a red fox")
        finally:
            file.write_bytes(good)

    def description(self, rng: random.Random) -> None:
        data = damaged(rng, self.note, True)
        with suppress(ValueError, RecursionError, AttributeError):  # the attacker gives it the hash that it should have
            values = json.loads(data)
            data = json.dumps(values | {"hash": description.hash_of(values)}).encode()
        (self.notes / "model.json").write_bytes(data)
        model = description.read(self.notes)
        for config in model.components.values():
            description.build.build(config)
        if self.pipe is not None and model.components == self.described.components:
            self.pipe.description = model
            self.pipe("a red house", seed=1, steps=2, width=64, height=64)

    def settings(self, rng: random.Random) -> None:
        ours = json.dumps({"prompt": "a fox", "seed": 1, "steps": 4, "width": 64, "loras": ["a:1"], "image": "a.png"})
        good = {"mlxdiff": ours} if rng.random() < 0.5 else {"parameters": _PARAMETERS}
        texts = {}
        for key, text in good.items():
            texts[key] = damaged(rng, text.encode(), key == "mlxdiff").decode("utf-8", "replace").replace("\0", "")
        out, kind = io.BytesIO(), rng.choice(("PNG", "JPEG", "WEBP"))
        options = metadata.options(kind, texts, metadata.DRAWN)
        if kind == "WEBP" and rng.random() < 0.5:
            name = rng.choice(("xmp", "exif"))
            options[name] = damaged(rng, options[name], False)
        Image.new("L", (8, 8)).save(out, kind, **options)
        data = out.getvalue() if rng.random() < 0.8 else damaged(rng, out.getvalue(), False)
        self.picture.write_bytes(data)
        request, _ = images.read_settings(self.picture)
        request.check_adapters()
        images.read(self.picture)

    def beside(self, rng: random.Random) -> None:
        """A file beside a model."""
        self.kind = rng.choice([*self.networks])
        good, read = self.networks[self.kind]
        if self.kind == "gguf":  # binary: the header is where damage counts
            head = 8 * len(good) // 10 if rng.random() < 0.1 else 1200
            self.network.write_bytes(damaged(rng, good[:head], False) + good[head:])
        else:
            self.network.write_bytes(_with_header(good, lambda header: damaged(rng, header, True)))
        read(self.network)

    def training(self, rng: random.Random) -> None:
        """A file in the folder of a training that is continued."""
        for file, good in self.of_run.items():
            file.write_bytes(good)
        file = rng.choice([*self.of_run])
        good, is_json = self.of_run[file], file.suffix == ".json"
        if file.suffix == ".safetensors" and rng.random() < 0.8:
            file.write_bytes(_with_header(good, lambda header: damaged(rng, header, True)))
        else:
            file.write_bytes(damaged(rng, good, is_json))
        fit.same_run(self.run, {"steps": 3, "rate": 0.1})
        fit._restore(self.run / "state.safetensors", self.trained, fit.optimizer("adamw"))
        fit._cut_log(self.run / "log.csv", 2)

    def spiece(self, rng: random.Random) -> None:
        """T5's vocabulary. Every token is one that the encoder knows."""
        self.pieces.write_bytes(damaged(rng, self.good_pieces, False))
        copying.check(self.pieces.parent, _T5)
        words = tokenizers.load_t5(self.pieces.parent)
        for text in ("a red fox", "\ud800 \N{SNOWMAN}", ""):
            ids = words.encode(text, 16).ids
            assert 0 <= min(ids) <= max(ids) < _T5.vocab, "tokens outside the embedding"

    def scheduler(self, rng: random.Random) -> None:
        """The settings of the noise, and a picture that is drawn with them."""
        file = self.model / "scheduler" / "scheduler_config.json"
        file.write_bytes(damaged(rng, self.files[file], True))
        try:
            schedule, _ = scheduler.from_json(reading.Settings(file))
        finally:
            file.write_bytes(self.files[file])
        self.pipe.description = replace(self.described, schedule=schedule)
        drawn = self.pipe("a red house", seed=1, steps=rng.randint(1, 3), width=64, height=64,
                          sampler=rng.choice([*samplers.SAMPLERS]))  # fmt: skip
        assert drawn.image.size == (64, 64)

    def index(self, rng: random.Random) -> None:
        file = self.model / "unet" / "model.safetensors.index.json"
        names = [*source.read(next((self.model / "unet").glob("*.safetensors"))).tensors]
        placed = dict.fromkeys(names, "diffusion_pytorch_model.safetensors")
        file.write_bytes(damaged(rng, json.dumps({"weight_map": placed}).encode(), True))
        try:
            source.read(file)
        finally:
            file.unlink()


def main() -> None:
    p = argparse.ArgumentParser(description="Read damaged files for some minutes.")
    p.add_argument("--minutes", type=float, default=1.0)
    p.add_argument("--first", type=int, default=0, metavar="N", help="number of the first input")
    p.add_argument("--count", type=int, metavar="N", help="stop after so many inputs")
    args = p.parse_args()
    stop, number = time.monotonic() + 60 * args.minutes, args.first
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(Path(folder), drawing=True)
        while time.monotonic() < stop and number - args.first != args.count:
            try:
                fuzz.one(number)
            except BaseException:
                print(f"Input {number} failed: repeat it with --first {number} --count 1.")
                raise
            number += 1
    print(f"{number - args.first} inputs: {', '.join(f'{n} {end}' for end, n in sorted(fuzz.ends.items()))}.")


if __name__ == "__main__":
    main()
