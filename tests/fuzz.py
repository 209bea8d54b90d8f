"""Damaged files, made at random from good ones: each must be read or be refused with one Error. `test_fuzz` tries a few
of them; `python -m tests.fuzz --minutes 60` tries many. An input is known by its number: `--first N --count 1` repeats
it."""

import argparse
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

from mlxdiff import builtin, convert, description, images, load, metadata, samplers, tokenizers  # before MLX

# isort: split
import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from mlxdiff.convert import embedding, lora, scheduler, source, write
from mlxdiff.convert import settings as reading
from mlxdiff.convert import tokenizer as copying
from mlxdiff.description import Description
from mlxdiff.errors import Error
from mlxdiff.foreign import shown
from mlxdiff.models import controlnet, t2i, t5, unet
from mlxdiff.recipe import recipe
from mlxdiff.spelling import as_flags
from mlxdiff.store import references
from mlxdiff.train import fit
from tests import checkpoints, t5_vocab
from tests.damage import damaged, damaged_file

SLOW = 5.0  # seconds of work that one input may take
MEMORY = 500_000_000  # bytes by which one input may raise the peak
HANGS = 60.0  # seconds on the clock after which an input counts as hanging
_PARAMETERS = "a fox\nNegative prompt: rain\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 3, Size: 64x64, Model: x"


def _outward(network: nn.Module) -> dict[str, tuple]:
    """The shapes of a network's parameters as diffusers stores them."""
    shapes = {name: tuple(x.shape) for name, x in tree_flatten(network.parameters())}
    return {name: (s[0], s[3], *s[1:3]) if len(s) == 4 else s for name, s in shapes.items()}


_T5 = t5.Config(220, 8, 1, 2, 4, 16, 8, 16, 1e-6)


def _node(**inputs) -> dict:
    return {"class_type": "x", "inputs": inputs}


_GRAPH = json.dumps({
    "1": _node(seed=3, steps=4, cfg=5.0, sampler_name="euler", scheduler="karras", denoise=1.0, model=["7", 0],
               positive=["2", 0], negative=["3", 0], latent_image=["4", 0]),
    "2": _node(text="a fox", clip=["7", 1]), "3": _node(text="rain", clip=["7", 1]),
    "4": _node(width=64, height=64, batch_size=1), "5": _node(ckpt_name="a.safetensors"),
    "7": _node(lora_name="b.safetensors", strength_model=0.5, model=["5", 0], clip=["5", 1]),
    "8": _node(guider=["9", 0], noise=["10", 0], sampler=["11", 0], sigmas=["12", 0], latent_image=["1", 0]),
    "9": _node(conditioning=["2", 0], model=["5", 0]), "10": _node(noise_seed=7),
    "11": _node(sampler_name="dpmpp_2m"), "12": _node(scheduler="simple", steps=9, model=["5", 0]),
})  # fmt: skip


class Fuzz:
    """The good files, in a folder of this run, and what has happened so far."""

    def __init__(self, folder: Path, drawing: bool = False, models: Path | None = None, only: str = ""):
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
        self.more = []
        if models is not None:
            from . import fuzz_kinds

            if not models.exists():
                fuzz_kinds.models(models)
            for kind in fuzz_kinds.KINDS:
                if kind.__name__ in only.split(",") or not only:
                    self.more.append(kind(folder / kind.__name__, self.pipe, models))
                    self.more[-1].__name__ = kind.__name__
        self.mine = [self.checkpoint, self.description, self.settings, self.index, self.training, self.spiece]
        self.mine += [self.beside, self.beside, *[self.scheduler] * (self.pipe is not None)]
        if only:
            self.mine = [kind for kind in self.mine if kind.__name__ in only.split(",")]

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
        kind = rng.choice([*self.mine, *self.more])
        self.kind, begin, peak = "", time.process_time(), _peak()
        try:
            kind(rng)
            end = "read"
        except Error as e:
            end = "refused"
            line = " ".join(as_flags(str(e)).split())  # as `console.run` prints it
            assert 10 < len(shown(line)) <= 2010, f"input {number} says {line[:300]}"
        assert (took := time.process_time() - begin) < SLOW, f"input {number} took {took:.1f} s"
        assert (grown := _peak() - peak) < MEMORY, f"input {number} took {grown / 1e6:.0f} MB"
        self.ends[f"{self.kind or kind.__name__} {end}"] += 1

    def checkpoint(self, rng: random.Random) -> None:
        file = rng.choice([*self.files])
        good = self.files[file]
        file.write_bytes(damaged_file(rng, file, good))
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
            self.drawn(model)

    def settings(self, rng: random.Random) -> None:
        ours = json.dumps({"prompt": "a fox", "seed": 1, "steps": 4, "width": 64, "loras": ["a:1"], "image": "a.png"})
        good = rng.choice(({"mlxdiff": ours}, {"parameters": _PARAMETERS}, {"prompt": _GRAPH}))
        texts = {}
        for key, text in good.items():
            texts[key] = damaged(rng, text.encode(), key != "parameters").decode("utf-8", "replace")
            texts[key] = texts[key].replace("\0", "")
        out, kind = io.BytesIO(), rng.choice(("PNG", "JPEG", "WEBP"))
        options = metadata.options(kind, texts, metadata.DRAWN)
        if kind != "PNG" and "prompt" in texts:  # as ComfyUI's extensions write it
            exif = Image.Exif()
            exif[rng.choice((0x010E, 0x010F, 0x0110))] = f"prompt:{texts['prompt']}"[:60_000]
            options["exif"] = exif.tobytes()
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
            self.network.write_bytes(damaged_file(rng, self.network, good))
        read(self.network)

    def training(self, rng: random.Random) -> None:
        """A file in the folder of a training that is continued."""
        for file, good in self.of_run.items():
            file.write_bytes(good)
        file = rng.choice([*self.of_run])
        file.write_bytes(damaged_file(rng, file, self.of_run[file]))
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
        self.drawn(replace(self.described, schedule=schedule), rng.choice([*samplers.SAMPLERS]), rng.randint(1, 3))

    def drawn(self, model: Description, sampler: str = "ddim", steps: int = 2) -> None:
        """A picture by a pipeline of this description, which others use after it as it was."""
        before, self.pipe.description = self.pipe.description, model
        try:
            drawn = self.pipe("a red house", seed=1, steps=steps, width=64, height=64, sampler=sampler)
            assert drawn.image.size == (64, 64)
        finally:
            self.pipe.description = before

    def index(self, rng: random.Random) -> None:
        file = self.model / "unet" / "model.safetensors.index.json"
        names = [*source.read(next((self.model / "unet").glob("*.safetensors"))).tensors]
        placed = dict.fromkeys(names, "diffusion_pytorch_model.safetensors")
        file.write_bytes(damaged(rng, json.dumps({"weight_map": placed}).encode(), True))
        try:
            source.read(file)
        finally:
            file.unlink()


def _peak() -> int:
    """The most bytes that this process has held."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _work(args: argparse.Namespace, folder: Path, at: Synchronized) -> None:
    """Try one input after the other, in a process of its own, which ends with its parent. at: the number of the one at
    hand."""
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    os.environ["MLXDIFF_CACHE"] = f"{folder}/cache"
    fuzz, number = Fuzz(folder, True, args.models or folder / "models", args.only), args.first
    stop = time.monotonic() + 60 * args.minutes
    while time.monotonic() < stop and number - args.first != args.count:
        at.value = number
        try:
            fuzz.one(number)
        except Exception:
            print(f"Input {number} failed: repeat it with --first {number} --count 1 and the same kinds.", flush=True)
            traceback.print_exc(limit=-6)
            fuzz.ends["failed"] += 1
        number += 1
    at.value = -1
    print(f"{number - args.first} inputs: {', '.join(f'{n} {end}' for end, n in sorted(fuzz.ends.items()))}.")
    if fuzz.ends["failed"]:
        sys.exit(1)


def main() -> None:
    p = argparse.ArgumentParser(description="Read damaged files for some minutes.")
    p.add_argument("--minutes", type=float, default=1.0)
    p.add_argument("--first", type=int, default=0, metavar="N", help="number of the first input")
    p.add_argument("--count", type=int, metavar="N", help="stop after so many inputs")
    p.add_argument("--only", default="", metavar="KINDS", help="such as flux,sd3; a failed input needs the same ones")
    p.add_argument("--models", type=Path, metavar="DIR", help="keep the tiny models there: they take long to make")
    args = p.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the folder is removed
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(_watched(args, Path(folder)))


def _watched(args: argparse.Namespace, folder: Path) -> int:
    """Let a child do the work: a signal or a hang ends it alone. Returns its exit code."""
    spawn = multiprocessing.get_context("spawn")
    at = spawn.Value("q", -1)
    child = spawn.Process(target=_work, args=(args, folder, at), daemon=True)
    child.start()
    number, seen = -1, 0.0
    try:
        while child.is_alive():
            child.join(1.0)
            if at.value != number:
                number, seen = at.value, time.monotonic()
            if number >= 0 and time.monotonic() - seen > HANGS:
                child.kill()
    finally:
        child.kill()
        child.join()
    if at.value >= 0:
        print(f"Input {at.value} ended the process or hung: repeat it with --first {at.value} --count 1.")
    return child.exitcode


if __name__ == "__main__":
    main()
