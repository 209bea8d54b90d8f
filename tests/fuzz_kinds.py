"""More kinds of damaged files for `tests.fuzz`: whole folders of models, of what guides them and of pictures, and the
small files of features. Each kind makes its good files once, shows that they are read, and then damages them by number.
The tiny models come from diffusers and transformers; this is for a long run by hand."""

import io
import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

import mlxdiff
from mlxdiff import builtin, description, images, machines, provenance, seal, signing, tune
from mlxdiff.bench import report
from mlxdiff.detect import run as detect
from mlxdiff.models import ways
from mlxdiff.pipeline import Pipeline
from mlxdiff.request import Request
from mlxdiff.score.__main__ import parser as of_score
from mlxdiff.score.__main__ import score as scored
from mlxdiff.store import cache, prompts
from mlxdiff.train import folder as training
from mlxdiff.widgets.history import FAVOURITES, History
from mlxdiff.widgets.view import View

from .damage import Folder, damaged, damaged_file

TEXTS = (".json", ".txt", ".safetensors", ".model")
SIZE = {"seed": 1, "steps": 2, "width": 64, "height": 64}
_NAMES = ("a\nb: 3", "\x1b[31ma", "a\u202eb", "é" * 60, "-rf", "a|b*c", "' \"", "a\ud800"[:1], "..a", "\u2066a\r")
_SETTINGS = {"steps": 4, "guidance": 4.0, "width": 64, "height": 64, "sampler": "ddim", "schedule": "leading"}


def draw(pipe: Pipeline, **settings) -> None:
    drawn = pipe("a red house", **SIZE | settings)
    assert drawn.image.size == (64, 64)


def models(root: Path) -> None:
    """Make the good folders."""
    from .parity import adapters, tiny
    from .parity.test_controlnet import guide_of
    from .parity.test_depth import oracle as depth
    from .parity.test_flux2_pipelines import made as klein

    made = {"sd": tiny.sd1, "sd-v": tiny.sd2, "sdxl": tiny.sdxl, "sd3": tiny.sd3, "flux": tiny.flux}
    for name, make in (made | {"flux2": klein, "zimage": tiny.zimage}).items():
        theirs = make(root / f"{name}-words")
        theirs.save_pretrained(root / name)
        if name == "sd":
            guide_of(theirs.unet, 1).save_pretrained(root / "control")
            adapters.saved(root / "reference", adapters.plain(theirs.unet, 1), adapters.eyes())
    depth(root / "depth")


def _family(name: str) -> Callable:
    """The folder of a family's model in diffusers layout: converted, loaded, and a picture drawn with it."""

    def kind(root: Path, pipe: Pipeline, models: Path) -> Callable:
        shutil.copytree(models / name, root)
        good = Folder(root, *TEXTS)
        draw(mlxdiff.load(root, dtype="float32"))

        def one(rng: random.Random) -> None:
            with good.broken(rng):
                try:
                    draw(mlxdiff.load(root, dtype="float32"), steps=rng.randint(1, 2))
                finally:
                    shutil.rmtree(cache.root(), ignore_errors=True)

        return one

    kind.__name__ = name
    return kind


def converted(root: Path, pipe: Pipeline, models: Path) -> Callable:
    """A converted folder whose description and seal pass for right, as a hostile person would make them."""
    shutil.copytree(pipe.networks.folder, root / "model")
    good = Folder(root / "model", *TEXTS)
    note = root / "model" / "model.json"

    def one(rng: random.Random) -> None:
        with good.broken(rng):
            try:
                with suppress(ValueError, RecursionError, TypeError, AttributeError):
                    values = json.loads(note.read_bytes())
                    values["seal"] = seal.of(note.parent, lambda done, total: None)
                    note.write_text(json.dumps(values | {"hash": description.hash_of(values)}), encoding="utf-8")
                draw(mlxdiff.load(good.path))
            finally:
                note.write_bytes(good.good[note])

    return one


def guides(root: Path, pipe: Pipeline, models: Path) -> Callable:
    """Networks in folders with their settings: a ControlNet, and an IP-Adapter with its vision model."""
    for name in ("sd", "control", "reference"):
        shutil.copytree(models / name, root / name)
    ours, picture = mlxdiff.load(root / "sd", dtype="float32"), Image.new("RGB", (40, 24), "red")
    folders = {"controls": Folder(root / "control"), "references": Folder(root / "reference")}

    def given(role: str) -> dict:
        file = root / ("control" if role == "controls" else "reference/adapter.safetensors")
        return {role: [(file, picture)]}

    for role in folders:
        draw(ours, **given(role))

    def one(rng: random.Random) -> None:
        role = rng.choice([*folders])
        with folders[role].broken(rng):
            draw(ours, **given(role))

    return one


def loras(root: Path, pipe: Pipeline, models: Path) -> Callable:
    """A LoRA with DoRA's magnitude, a LoHa, a LoKr, and a LoRA with peft's settings beside it; a taught word."""
    root.mkdir()
    net = pipe.description.net
    width, name = net.channels[1], "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    rng = np.random.default_rng(0)
    low = {"lora_A.weight": (2, width), "lora_B.weight": (width, 2)}
    loha = {f"hada_w{n}_{ab}": s for n in (1, 2) for ab, s in (("a", (width, 2)), ("b", (2, width)))}
    kinds = {
        "dora": low | {"lora_magnitude_vector": (width,)},
        "loha": loha | {"alpha": ()},
        "lokr": {"lokr_w1": (4, 4), "lokr_w2_a": (width // 4, 2), "lokr_w2_b": (2, width // 4), "alpha": ()},
        "peft": low,
    }
    files, good = {}, {}
    for kind, shapes in kinds.items():
        files[kind] = root / kind / "adapter_model.safetensors"
        held = {f"{name}.{end}": mx.array(rng.standard_normal(s).astype(np.float32)) for end, s in shapes.items()}
        files[kind].parent.mkdir()
        mx.save_safetensors(str(files[kind]), held)
    (root / "peft" / "adapter_config.json").write_text(
        json.dumps({"lora_alpha": 4, "r": 2, "use_rslora": True, "rank_pattern": {"to_q": 2}, "alpha_pattern": {}})
    )
    for kind in kinds:
        draw(pipe, loras=[str(files[kind])])
        good[kind] = Folder(files[kind].parent)
    word, width = root / "word.safetensors", pipe.description.components["text_encoder"].width
    mx.save_safetensors(str(word), {"emb_params": mx.ones((2, width))})
    taught = word.read_bytes()

    def one(rng: random.Random) -> None:
        kind = rng.choice([*kinds, "word"])
        if kind == "word":
            word.write_bytes(damaged_file(rng, word, taught))
            pipe("a word house", **SIZE, embeddings=[str(word)])
            return
        with good[kind].broken(rng):
            draw(pipe, loras=[f"{files[kind]}:{rng.choice(('0.7', '-1', '1', '10', '1e9', 'x'))}"])

    return one


def encoded(root: Path, pipe: Pipeline, models: Path) -> Callable:
    """What was kept of a prompt."""
    root.mkdir()
    file, width = root / "kept.safetensors", pipe.description.net.context
    mx.save_safetensors(str(file), {"0.context": mx.ones((1, 5, width)), "0.pooled": mx.ones((1, 8))})
    good = file.read_bytes()
    assert prompts._kept(file, 1, width, 8)

    def one(rng: random.Random) -> None:
        file.write_bytes(damaged_file(rng, file, good))
        for text in prompts._kept(file, 1, width, 8) or ():
            assert (*text.context.shape[::2], *text.pooled.shape) == (1, width, 1, 8)
            mx.eval([x for x in text if x is not None])

    return one


def tuned(root: Path, pipe: Pipeline, models: Path) -> Callable:
    """The choices of `mlxdiff tune`, and a picture drawn with what is left of them."""
    way, sizes = tune.cases()[0]
    tune.keep([tune.Measured(way.name, sizes, True, "", None, None)])
    file, good = tune._file(), tune._file().read_bytes()

    def one(rng: random.Random) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(damaged(rng, good, True))
        try:
            said = tune.apply(again=True)
            assert "\n" not in said
            draw(pipe, steps=1)
            tune.keep([tune.Measured(way.name, sizes, True, "", None, None)])
            assert tune.known()
        finally:
            file.unlink()
            ways.use({})

    return one


def reports(root: Path, pipe: Pipeline, models: Path) -> Callable:
    """A measurement that someone sent. Its row has as many cells as the head, and is one line."""
    root.mkdir()
    file = root / "r.json"
    good = (Path(__file__).parent / "data" / "reports" / "linux-idle.json").read_bytes()

    def one(rng: random.Random) -> None:
        file.write_bytes(damaged(rng, good, True))
        lines = report.table_of([file]).splitlines()
        assert sum(line.startswith("|") for line in lines) == 3
        assert lines[2].replace("\\|", "").count("|") == lines[0].count("|")
        report.pasted(report.read(file))

    return one


def _drawn(folder: Path, name: str, seed: int = 1) -> Path:
    request = Request("a red fox", seed=seed, **_SETTINGS)
    image = Image.effect_noise((40, 40), 60).convert("RGB")
    return images.save(image, folder / f"{name}.png", request, builtin.NAME, "float32")


def signed(root: Path, pipe: Pipeline, models: Path) -> Callable:
    """Signed pictures, inspected."""
    os.environ[signing.KEY] = os.environ[signing.CERTIFICATE] = ""
    os.environ["MLXDIFF_CONFIG"] = str(root / "config")
    maker, good = signing.signer(), {}
    for ending in images.ENDINGS:
        image, request = Image.effect_noise((16, 16), 60).convert("RGB"), Request("a fox", seed=1, **_SETTINGS)
        file = images.save(image, root / f"a.{ending}", request, "m", "float32", signer=maker)
        assert "hold" in provenance.describe(provenance.facts(file))
        good[file] = file.read_bytes()

    def one(rng: random.Random) -> None:
        file = rng.choice([*good])
        data = bytearray(good[file])
        if rng.random() < 0.5:  # within the credentials
            at = data.find(b"jumb") if rng.random() < 0.5 else data.find(b"c2pa")
            for _ in range(rng.randint(1, 4)):
                data[min(len(data) - 1, at + rng.randrange(8000))] = rng.randrange(256)
        else:
            data = damaged(rng, bytes(data), False)
        file.write_bytes(data)
        if provenance.is_picture(file):
            lines = provenance.describe(provenance.facts(file)).splitlines()
            assert 6 <= len(lines) <= 10

    return one


def scores(root: Path, pipe: Pipeline, models: Path) -> Callable:
    """A folder of pictures with hostile names, one of them damaged, scored with prompts that may be damaged too."""
    (root / "pictures").mkdir(parents=True)
    for i, name in enumerate(_NAMES):
        _drawn(root / "pictures", name, i)
    (root / "pictures" / "\x1b[2Jnote\n.txt").write_text("x")
    good = Folder(root / "pictures", ".png")
    lists = {root / "p.json": json.dumps({f.name: "a red fox" for f in good.good}).encode()}
    lists[root / "p.txt"] = b"a fox\n" * len(good.good)

    def one(rng: random.Random) -> None:
        with good.broken(rng):
            typed = [str(good.path), "--offline", *(["--json"] if rng.random() < 0.3 else [])]
            if rng.random() < 0.5:
                file = rng.choice([*lists])
                file.write_bytes(damaged(rng, lists[file], file.suffix == ".json"))
                typed += ["--prompts", str(file)]
            out = io.StringIO()
            with redirect_stdout(out), redirect_stderr(out):
                scored(of_score().parse_args(typed))
            assert "\x1b[2J" not in out.getvalue()
            assert "\u202e" not in out.getvalue()

    return one


def history(root: Path, pipe: Pipeline, models: Path) -> Callable:
    """A studio's folder: its favourites, and pictures with hostile names."""
    root.mkdir()
    for i, name in enumerate(_NAMES):
        _drawn(root, name, i)
    (root / FAVOURITES).write_text("-rf.png\n..a.png\n")
    good = Folder(root)
    History(View()).recall(root)

    def one(rng: random.Random) -> None:
        with good.broken(rng):
            shown = History(View())
            shown.recall(root)
            key = shown._view.history[0]["key"]
            shown.star(key)
            shown.star(key)

    return one


def captions(root: Path, pipe: Pipeline, models: Path) -> Callable:
    """A folder of training pictures."""
    root.mkdir()
    for i in range(3):
        Image.effect_noise((40, 30), 60).convert("RGB").save(root / f"{i}.png")
        (root / f"{i}.txt").write_text("a red fox")
    good = Folder(root)

    def one(rng: random.Random) -> None:
        with good.broken(rng):
            training.fingerprint(training.read(root, None, 64, 8, False))

    return one


def messages(root: Path, pipe: Pipeline, models: Path) -> Callable:
    """What another machine of a run says."""
    facts, body = {"size": [4, 4], "seconds": 1.0, "peak_bytes": 1, "reused": 0}, bytes(48)

    def one(rng: random.Random) -> None:
        with suppress(ValueError, RecursionError):
            told = json.loads(damaged(rng, json.dumps(facts).encode(), True))
            if isinstance(told, dict):
                with suppress(machines.Lost):
                    machines._received(1, told, body)

    return one


def depth_models(root: Path, pipe: Pipeline, models: Path) -> Callable:
    """A depth model in a folder, and a control picture made with it."""
    shutil.copytree(models / "depth", root)
    good, picture = Folder(root), Image.effect_noise((40, 30), 60).convert("RGB")
    detect("depth", picture, model=good.path, offline=True)

    def one(rng: random.Random) -> None:
        with good.broken(rng):
            detect("depth", picture, model=good.path, offline=True)

    return one


FAMILIES = ("sd", "sd-v", "sdxl", "sd3", "flux", "flux2", "zimage")
KINDS = [*map(_family, FAMILIES), converted, guides, loras, encoded, tuned, reports]
KINDS += [signed, scores, history, captions, messages, depth_models]
