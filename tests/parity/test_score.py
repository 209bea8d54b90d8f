"""Scores of pictures against transformers' CLIPModel with the same random weights, and numpy's closed forms of the
distances on torch's embeddings; the command on folders of pictures."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mlxdiff import images
from mlxdiff.request import Request
from mlxdiff.score.__main__ import main
from tests import clip_vocab
from tests.loopback_hub import Hub, Repo, noise

from .oracle import randomize

# Heads that no shape shows: three, where every published CLIP of that width would have another number.
VISION = {"hidden_size": 36, "num_attention_heads": 3, "patch_size": 8, "image_size": 32, "intermediate_size": 70}
TEXT = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 90}
SETTINGS = {"steps": 4, "guidance": 4.0, "width": 128, "height": 128, "sampler": "ddim", "schedule": "leading"}
PROMPTS = ["a red fox in the snow", "a cat's house under full moon", "a photo of the red house", "写真 🦊"]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A folder with a whole CLIP, and torch's model and tokenizer of it."""
    folder = tmp_path_factory.mktemp("clip")
    clip_vocab.write(folder, clip_vocab.trained(150))
    tok = CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    text = CLIPTextConfig(**TEXT, vocab_size=len(tok), num_hidden_layers=2, eos_token_id=len(tok) - 1)
    seen = CLIPVisionConfig(**VISION, num_hidden_layers=3)
    whole = CLIPConfig(text_config=text.to_dict(), vision_config=seen.to_dict(), projection_dim=20)
    model = CLIPModel(whole).eval()
    for k, part in enumerate(("vision_model", "text_model", "visual_projection", "text_projection")):
        randomize(getattr(model, part), k)
    model.save_pretrained(folder)
    return folder, model, tok


def fill(folder, count, seed, tint=0):
    """Pictures of noise over a colour, with prompts."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for i in range(count):
        base = np.full((48, 40, 3), rng.integers(0, 200, 3)) + rng.integers(0, 55, (48, 40, 3))
        base[..., 0] = np.minimum(base[..., 0] + tint, 255)
        request = Request(PROMPTS[i % len(PROMPTS)], seed=i, **SETTINGS)
        images.save(Image.fromarray(base.astype(np.uint8)), folder / f"{i:03}.png", request, "sdxl", "float32")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    return fill(root / "a", 36, 1), fill(root / "b", 37, 2, 90)


def embeddings(theirs, folder):
    """torch's, of length 1: of pictures in the order of their names, and of their prompts."""
    _, model, tok = theirs
    crop = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    files = sorted(folder.glob("*.png"))
    pixels = CLIPImageProcessorPil(**crop)([Image.open(f) for f in files], return_tensors="pt").pixel_values
    prompts = [images.read_settings(f)[0].prompt for f in files]
    ids = tok(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels)
    return out.image_embeds.double().numpy(), out.text_embeds.double().numpy()


def scored(capsys, *args):
    assert main([*map(str, args), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_clip_scores_equal_torch_s(theirs, folders, capsys):
    found = scored(capsys, folders[0], "--clip", theirs[0])
    pictures, texts = embeddings(theirs, folders[0])
    want = 100 * np.maximum((pictures * texts).sum(1), 0)
    got = [each["score"] for each in found["clip_score"]["each"]]
    assert [each["picture"] for each in found["clip_score"]["each"]] == [f"{i:03}.png" for i in range(36)]
    assert np.abs(got - want).max() < 1e-4 * 100  # float32 networks: 1e-4 of the scale's 100
    assert np.ptp(want) > 1  # so that a mistake shows
    assert found["clip_score"]["value"] == pytest.approx(want.mean(), abs=1e-2)
    assert found["clip_score"]["low"] < found["clip_score"]["value"] < found["clip_score"]["high"]


def test_distances_equal_closed_forms_on_torch_s_embeddings(theirs, folders, capsys):
    """CMMD as its authors publish it, kernel by kernel; Fréchet by the square root of a product of covariances."""
    found = scored(capsys, folders[0], "--against", folders[1], "--clip", theirs[0])["distances"]
    x, y = (embeddings(theirs, folder)[0] for folder in folders)

    def kernel(a, b):
        return np.exp(-((a[:, None] - b) ** 2).sum(-1) / (2 * 10**2)).mean()

    cmmd = 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    (m1, c1), (m2, c2) = ((z.mean(0), np.cov(z.T)) for z in (x, y))
    root = np.sqrt(np.linalg.eigvals(c1 @ c2).astype(complex)).real.sum()
    frechet = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2) - 2 * root
    assert found["cmmd"]["value"] == pytest.approx(cmmd, rel=1e-4)
    assert found["frechet"]["value"] == pytest.approx(frechet, rel=1e-4)
    for row in found.values():
        assert row["low"] <= row["value"] <= row["high"]
        assert row["n"] == [36, 37]
        assert row["value"] > row["chance"]  # one folder is redder


def test_the_table_says_what_it_rests_on(theirs, folders, capsys):
    assert main([str(folders[0]), "--against", str(folders[1]), "--clip", str(theirs[0])]) == 0
    out = capsys.readouterr().out
    assert "36 pictures, against 37" in out
    assert "rests on 4 prompts, fewer than 30" in out
    assert "CMMD is of 36 pictures" in out
    assert "least like their prompts: " in out
    assert max(map(len, out.splitlines())) < 240


def test_prompts_of_a_file_come_first(theirs, folders, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"house {i}" for i in range(36)) + "\n")
    by_line = scored(capsys, folders[0], "--clip", theirs[0], "--prompts", file)["clip_score"]
    assert by_line["prompts"] == 36
    named = tmp_path / "prompts.json"
    named.write_text(json.dumps({f"{i:03}.png": f"house {i}" for i in range(30, 36)}))
    some = scored(capsys, folders[0], "--clip", theirs[0], "--prompts", named)["clip_score"]
    assert [row["picture"] for row in some["each"]] == [row["picture"] for row in by_line["each"][30:]]
    scores = [row["score"] for row in by_line["each"][30:]]  # read in other batches, which round otherwise
    assert [row["score"] for row in some["each"]] == pytest.approx(scores, rel=1e-5)


def test_a_long_prompt_is_cut_as_elsewhere(theirs, folders, tmp_path, capsys):
    """Its first 75 tokens count, marks of weights do not, and the table says so."""
    words = " ".join(["red fox"] * 60)
    files = []
    for k, prompt in enumerate((words, f"(red:1.3) fox {words[8:]}")):
        files.append(tmp_path / f"{k}.json")
        files[k].write_text(json.dumps({"000.png": prompt}))
    a, b = (scored(capsys, folders[0], "--clip", theirs[0], "--prompts", f)["clip_score"] for f in files)
    assert a["cut"] == b["cut"] == 1
    assert a["value"] == pytest.approx(b["value"], abs=1e-9)


LACKS = {
    "a folder of nothing": (lambda folder: None, r"holds no whole CLIP"),
    "no tokenizer": (lambda folder: (folder / "vocab.json").unlink(), r"holds no tokenizer"),
    "a text encoder alone": (lambda folder: alone(folder, "text"), r"holds no whole CLIP: .*missing"),
    "a vision model alone": (lambda folder: alone(folder, "vision"), r"holds no whole CLIP: .*missing"),
    "cut off": (lambda folder: cut(folder / "model.safetensors"), r"model.safetensors"),
}


def alone(folder, kind):
    from safetensors.torch import load_file, save_file

    held = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in held.items() if k.startswith(kind)}, folder / "model.safetensors")


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("name", LACKS)
def test_what_is_no_whole_clip_is_refused_in_one_line(name, theirs, folders, tmp_path, capsys, monkeypatch):
    change, _ = LACKS[name]
    folder = tmp_path / "empty"
    folder.mkdir()
    if name != "a folder of nothing":
        for file in theirs[0].iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        change(folder)
    monkeypatch.setattr("mlxdiff.score.measure.look", lambda *_: pytest.fail("it is refused before the work"))
    assert main([str(folders[0]), "--clip", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert re.search(LACKS[name][1], err), err


def test_memory_is_bounded_by_batches(theirs, folders, capsys, monkeypatch):
    """At most a batch of pictures is held, whatever the folder holds."""
    from mlxdiff.score import clip

    sizes, embed = [], clip.embed
    monkeypatch.setattr(clip, "BATCH", 5)
    monkeypatch.setattr(clip, "embed", lambda encoder, batch: sizes.append(len(batch)) or embed(encoder, batch))
    found = scored(capsys, folders[0], "--clip", theirs[0])
    assert sizes == [5] * 7 + [1]
    assert found["pictures"] == 36


def test_it_is_fetched_once_and_then_needs_no_network(theirs, folders, tmp_path):
    """From a hub that has what the published repository has: pickles and other frameworks' weights stay there."""
    files = {file.name: file.read_bytes() for file in theirs[0].iterdir()}
    others = {name: noise(1000, 1) for name in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack")}
    with Hub() as hub:
        hub.repos["openai/clip-vit-large-patch14"] = Repo(files | others)
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(map(str, sys.path))}

        def score(*args: str) -> subprocess.CompletedProcess:
            call = [sys.executable, "-m", "mlxdiff", "score", str(folders[0]), "--json", *args]
            return subprocess.run(call, env=env, capture_output=True, text=True)

        before = score("--offline")
        assert (before.returncode, before.stdout) == (1, "")
        assert "openai/clip-vit-large-patch14 (1.7 GB) is not on this machine" in before.stderr
        first = score()
        assert first.returncode == 0, first.stderr
    held = {file.name for file in tmp_path.rglob("snapshots/*/*")}
    assert {"config.json", "model.safetensors", "vocab.json", "merges.txt"} <= held
    assert not held & others.keys()
    again = score("--offline")
    assert json.loads(again.stdout)["clip_score"] == json.loads(first.stdout)["clip_score"]
