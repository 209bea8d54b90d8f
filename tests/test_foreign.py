"""Foreign paths, files, settings and text: each is refused in one line or does no harm. Reference: the same inputs,
which hung, filled the memory or ended in a traceback before they were checked."""

import gc
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import mlxdiff
from mlxdiff import builtin, console, convert, description, foreign, images, metadata, store, upscale, weights
from mlxdiff.convert import source
from mlxdiff.convert import union as union_names
from mlxdiff.errors import Error
from mlxdiff.families import MODELS, published
from mlxdiff.generate import main as draw
from mlxdiff.models import build, ip_adapter
from mlxdiff.request import Request
from tests import checkpoints
from tests.test_imports import ROOT


@pytest.fixture(scope="session")
def converted(tmp_path_factory) -> Path:
    return convert.convert(builtin.FOLDER, tmp_path_factory.mktemp("converted") / "model", dtype="float32")


# ---- files that never end, or are too large


@pytest.mark.parametrize(
    "name", ["model.json", "vae.safetensors", "tokenizer/vocab.json", "tokenizer/tokenizer_config.json"]
)
def test_a_pipe_in_a_model_folder_is_an_error(converted, tmp_path, name):
    folder = shutil.copytree(converted, tmp_path / "model")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(Error):
        mlxdiff.load(folder)("a red fox", steps=1, width=64, height=64)


@pytest.mark.parametrize("name", ["tokenizer/tokenizer_config.json", "tokenizer/added_tokens.json", "unet/config.json"])
def test_a_pipe_in_a_checkpoint_does_not_hang(tmp_path, name):
    folder = shutil.copytree(builtin.FOLDER, tmp_path / "model")
    place = folder / name
    place.unlink(missing_ok=True)
    place.parent.mkdir(exist_ok=True)
    os.mkfifo(place)
    try:
        convert.convert(folder, tmp_path / "out")
    except Error:
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("read", [store.fingerprint, lambda path: upscale.Upscaler(path, offline=True)])
def test_a_pipe_is_no_network(tmp_path, read):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(Error, match="not a regular file"):
        read(tmp_path / "x.safetensors")


def test_an_adapter_of_very_many_layers_takes_linear_time(tmp_path):
    """A row of the table for each layer took hours."""
    shapes = {f"ip_adapter.{2 * i + 1}.to_k_ip.weight": (1, 1) for i in range(20_000)}
    begin = time.perf_counter()
    with pytest.raises(Error, match="has 20,000 layers"):
        convert.open(checkpoints.sparse(tmp_path / "x.safetensors", shapes))
    assert time.perf_counter() - begin < 5


def test_a_vision_model_of_no_tensors_is_an_error(tmp_path):
    with pytest.raises(Error, match="holds no tensor of"):
        convert.open(checkpoints.sparse(tmp_path / "model.safetensors", {}), layout="vision")


def test_a_whole_number_larger_than_any_float_is_no_float():
    assert foreign.fits(10**300, float)
    assert not any(foreign.fits(value, float) for value in (10**400, -(10**400), math.nan, math.inf, True))


def test_a_picture_with_damaged_exif_is_read_without_a_word(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*" + b"\xff" * 30)
    typed = [sys.executable, "-m", "mlxdiff.detect", str(tmp_path / "a.jpg"), "invert"]
    assert subprocess.run(typed, check=True, capture_output=True, cwd=ROOT).stderr == b""


def test_a_pipe_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(Error, match="not a regular file"):
        images.read(tmp_path / "a.png")
    with pytest.raises(Error, match="not a regular file"):
        images.read_settings(tmp_path / "a.png")


def test_a_small_file_may_not_be_large(tmp_path, monkeypatch):
    monkeypatch.setattr(foreign, "MOST", 100)
    (tmp_path / "a.json").write_text(" " * 99 + "{}")
    with pytest.raises(Error, match="more than 100 bytes"):
        foreign.read_json(tmp_path / "a.json", "")


def test_a_late_duplicate_in_a_header_takes_linear_time(tmp_path):
    """The bound is by size: four times the names may take eight times as long; quadratic work would take sixteen."""

    def seconds(n: int) -> float:
        names = ",".join(f'"k{i}":0' for i in [*range(n), n - 1])
        path = checkpoints.raw(tmp_path / f"{n}.safetensors", b"{%s}" % names.encode(), 0)
        begin = time.perf_counter()
        with pytest.raises(Error, match=f"lists 'k{n - 1}' twice"):
            source.read(path)
        return time.perf_counter() - begin

    gc.collect()
    assert seconds(80_000) < 8 * max(seconds(20_000), 0.01)


# ---- descriptions that claim too much, or contradict themselves


DAMAGE = {
    "unet": [
        ("layers", [10**9, 1]), ("heads", [0, 0]), ("groups", 0), ("groups", 7), ("context", True), ("eps", "small"),
        ("channels", []), ("depth", [[10**6], []]), ("mid_depth", 10**6), ("channels", None), ("in_channels", 2**40),
    ],
    "text_encoder": [("layers", 10**9), ("layers", 1e9), ("layers", 1001), ("heads", 0), ("heads", 7), ("width", -8)],
    "vae": [("layers", 10**9), ("layers", 999), ("groups", 0), ("groups", 7), ("channels", [0])],
}  # fmt: skip


@pytest.mark.parametrize(("name", "key", "value"), [(n, k, v) for n, pairs in DAMAGE.items() for k, v in pairs])
def test_a_damaged_model_json_is_an_error_before_a_network_is_built(converted, tmp_path, monkeypatch, name, key, value):
    values = json.loads((converted / "model.json").read_text(encoding="utf-8"))
    assert values["components"][name][key] != value
    values["components"][name][key] = value
    (tmp_path / "model.json").write_text(json.dumps(values), encoding="utf-8")
    monkeypatch.setattr(build, "build", None)
    with pytest.raises(Error, match=r"model\.json"):
        description.read(tmp_path)


@pytest.mark.parametrize("model", [name for name, row in MODELS.items() if row.networks])
def test_every_published_network_passes_the_checks(model):
    for config in MODELS[model].networks.values():
        assert build.config(json.loads(json.dumps(build.settings(config)))) == config


IP_ADAPTER = ip_adapter.Config("plain", 8, 8, 4, None, None, 1, None, (8,))


@pytest.mark.parametrize(
    ("config", "key"), [(published.CLIP_L, "act"), (published.CLIP_VIT_H, "act"), (IP_ADAPTER, "kind")]
)
def test_a_word_that_a_network_does_not_know(config, key):
    """It was a KeyError where the network was built."""
    with pytest.raises(Error, match=f"has {key} 'quic', which is none of"):
        build.config(json.loads(json.dumps(build.settings(config) | {key: "quic"})))


def test_no_network_of_too_many_layers_is_built():
    """A U-Net of 1000 x 1000 layers, which took 11 GB."""
    unet = description.published("sd15", mlxdiff.description.Recipe("float32", None)).components["unet"]
    many = vars(unet) | {"layers": (1000,) * 4, "depth": ((1000,) * 1000,) * 4}
    with pytest.raises(Error, match="has 4,00"):
        build.build(type(unet)(**many))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 10**9),
        ("steps", 1.5),
        ("start", 1e308),
        ("end", -1),
        ("offset", 10**6),
        ("spacing", "x"),
        ("spacing", 1),
    ],
)
def test_a_schedule_that_cannot_be(converted, tmp_path, key, value):
    """10^9 training steps took 8 GB for each array of them. The hash is right: an attacker can compute it."""
    values = json.loads((converted / "model.json").read_text(encoding="utf-8"))
    values["schedule"][key] = value
    values["hash"] = description.hash_of(values)
    (tmp_path / "model.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(Error, match=r"model\.json has schedule"):
        description.read(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("num_train_timesteps", 10**7), ("beta_start", 1.0), ("beta_end", 1e200)])
def test_a_scheduler_that_cannot_be(tmp_path, key, value):
    folder = shutil.copytree(builtin.FOLDER, tmp_path / "model")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {key: value}), encoding="utf-8")
    with pytest.raises(Error, match=f"scheduler_config.json has {key}"):
        convert.open(folder)


@pytest.mark.parametrize("kind", ["mixers", "hint"])
def test_an_adapter_of_too_many_layers_is_not_built(kind):
    union = union_names.LAYOUTS["union"].published["union"]
    many = {"mixers": 10**6, "hint": (16,) * 1001}[kind]
    with pytest.raises(Error, match=r"union has 1,00[\d,]+ layers, more than"):
        build.build(type(union)(**vars(union) | {kind: many}))


def test_no_more_layers_are_built_than_the_file_has_tensors(tmp_path, converted, monkeypatch):
    """Of a checkpoint's config.json and of a converted folder's description."""
    folder = shutil.copytree(builtin.FOLDER, tmp_path / "model")
    config = json.loads((folder / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 900}))
    model, text = description.read(converted), description.read(converted).components["text_encoder"]
    monkeypatch.setattr(build, "build", None)
    with pytest.raises(Error, match=r"config\.json: clip has 900 layers; its file holds \d\d tensors"):
        convert.open(folder)
    with pytest.raises(Error, match=r"text_encoder\.safetensors: clip has 900 layers"):
        weights.load(converted / "text_encoder.safetensors", model.family, replace(text, layers=900), model.recipe)


# ---- files that change while they are in use


def test_weights_that_are_cut_short_after_they_were_opened(converted, tmp_path):
    """They are read when they are first needed, so this is found in the middle of a run."""
    folder = shutil.copytree(converted, tmp_path / "model")
    pipe = mlxdiff.load(folder)
    events = pipe.stream("a red house", steps=1, width=64, height=64)
    while next(events).stage != "denoise":
        pass
    pipe.networks.get("vae")
    os.truncate(folder / "vae.safetensors", 100_000)
    with pytest.raises(Error, match=r"A file of .* changed while it was in use"):
        list(events)


# ---- paths


@pytest.mark.parametrize("option", [{"tokenizer": "~nosuchuser/t"}, {"parts": {"vae": "~nosuchuser/v"}}])
def test_a_home_that_does_not_exist(option):
    with pytest.raises(Error, match="names a home folder that does not exist"):
        store.resolve("storybook", **option)


def test_no_home_at_all(monkeypatch):
    def none():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MLXDIFF_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", none)
    with pytest.raises(Error, match="has no home folder"):
        store.cache.root()


def test_a_link_out_of_a_checkpoint_is_not_copied(tmp_path):
    folder = shutil.copytree(builtin.FOLDER, tmp_path / "model")
    (tmp_path / "secret").write_text("{}")
    (folder / "tokenizer" / "added_tokens.json").symlink_to(tmp_path / "secret")
    with pytest.raises(Error, match="is a link that leads out of its folder"):
        convert.convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- text


def test_foreign_text_is_shown_printable_and_cut():
    assert foreign.shown("a\x1b[31mb\x9b\u202ec\udcff\nd") == "a\\x1b[31mb\\x9b\\u202ec\\udcff\nd"
    assert foreign.shown("grün 月") == "grün 月"
    assert len(foreign.shown("x" * 3_000_000)) < foreign.MOST_SHOWN + 10


def test_an_error_is_one_short_printable_line(capsys):
    def fail():
        raise Error("\x1b]0;title\x07" + "x" * 3_000_000, "Do this.")

    assert console.run("mlxdiff", fail) == 1
    err = capsys.readouterr().err
    assert "\x1b" not in err
    assert len(err) < foreign.MOST_SHOWN + 50
    assert err.endswith("Do this.\n")


# ---- a finished picture is written


def test_a_path_that_is_not_utf_8_is_written_and_read_again(tmp_path):
    request = Request("a", seed=1, steps=1, guidance=1, width=8, height=8, sampler="euler", schedule="leading")
    start = os.fsdecode(b"caf\xe9.png")
    for name in ("a.png", "b.jpg"):
        settings = {**vars(request), "image": start, "noise": "torch", "clip_skip": 1}
        path = images.save(Image.new("RGB", (8, 8)), tmp_path / name, Request(**settings), os.fsdecode(b"m\xff"), "f")
        assert path.exists()
    assert images.read_settings(tmp_path / "a.png")[0].image == start


@pytest.mark.parametrize("setting", ["prompt", "negative"])
def test_a_prompt_that_is_not_utf_8_is_refused_before_the_work(converted, setting):
    texts = {"prompt": "a red fox"} | {setting: os.fsdecode(b"r\xf6t")}
    with pytest.raises(Error, match="is not valid UTF-8"):
        next(mlxdiff.load(converted).stream(**texts, steps=1))


def test_an_overlong_name_is_refused_in_one_line(tmp_path, capsys):
    assert draw(["a red house", "-o", str(tmp_path / ("x" * 300 + ".png"))]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_names_up_to_the_limit_are_written_and_numbered(tmp_path):
    name = f"{'ö' * 125}x.png"  # 255 bytes
    picture = Image.new("RGB", (8, 8))
    first, second = (images.write(picture, tmp_path / name, metadata.COMPUTED) for _ in range(2))
    assert first.name == name
    assert second.name.endswith("ö-1.png")
    assert len(os.fsencode(second.name)) <= 255
    images.check_name(tmp_path / name)
    with pytest.raises(Error, match="cannot be written"):
        images.check_name(tmp_path / f"x{name}")


def test_threads_that_save_one_name_lose_no_picture(tmp_path):
    def save(shade: int) -> None:
        for _ in range(5):
            images.write(Image.new("L", (64, 64), shade), tmp_path / "a.png", metadata.COMPUTED)

    threads = [threading.Thread(target=save, args=(shade,)) for shade in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shades = []
    for file in tmp_path.iterdir():
        with Image.open(file) as image:
            shades.append(image.getextrema())
    assert sorted(shades) == sorted([(shade, shade) for shade in range(8)] * 5)


@pytest.mark.parametrize(
    ("streams", "code"),
    [("2>&-", 0), (">&-", 0), ("<&- >&- 2>&-", 0), (">/dev/full", 1), ("2>/dev/full", 0), (">/dev/full 2>&1", 1)],
)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux alone has it")
def test_no_picture_is_lost_with_the_standard_streams(converted, tmp_path, streams, code):
    draw = f'"{sys.executable}" -m mlxdiff.generate "a red fox" -m "{converted}" --steps 1 -W 64 -H 64 -s 1 2 -v'
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(f"{draw} {streams}", shell=True, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a-red-fox-1.png", "a-red-fox-2.png"]
    for file in tmp_path.iterdir():
        Image.open(file).load()


def test_an_ascii_locale_gets_json_in_ascii(converted, tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "mlxdiff.generate", "ein grüner Fuchs", "-m", str(converted), "--json"]
    settings = ["--steps", "1", "-W", "64", "-H", "64", "-o", "grün.png"]
    done = subprocess.run([*command, *settings], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert (done.returncode == 0) == (len([*tmp_path.iterdir()]) == 1)
    if done.returncode == 0:
        assert json.loads(done.stdout)["path"]
