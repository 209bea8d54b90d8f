"""Bad days of a machine: a disk that is full, a drive without hard links, a clock that is far off, a second process in
the same folder. References: the system's own refusals (a limit on the size of files stands for a full disk), and the
files as they were before."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading

import mlx.core as mx
import numpy as np
import pytest
from huggingface_hub import constants
from mlx.utils import tree_map
from PIL import Image

import mlxdiff
from mlxdiff import foreign, generate, images, metadata, pipeline, whole
from mlxdiff.description import Description
from mlxdiff.errors import Error
from mlxdiff.families import DEFAULT
from mlxdiff.store import __main__ as shows
from mlxdiff.store import adapters, cache, hub
from mlxdiff.train import fit, recipe
from tests.test_imports import ROOT

NOISE = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)  # 120 kB, also as a PNG


# What is written -> how, from few bytes (True) or many: the small one is there when the large one fails.
WRITERS = {
    "state": lambda folder, few: fit.write_arrays(folder / "a.safetensors", {"a": mx.zeros(1 if few else 9999)}, {}),
    "notes": lambda folder, few: fit.write_text(folder / "recipe.json", "x" * (1 if few else 99_999)),
    "sheet": lambda folder, few: fit.write_picture(folder / "a.png", Image.fromarray(NOISE[: 1 if few else 200])),
    "note": lambda folder, few: cache.write_note(folder / "a.json", {"a": "x" * (1 if few else 99_999)}),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_costs_nothing_that_was_there(tmp_path, monkeypatch, full_disk, kind):
    monkeypatch.setenv("MLXDIFF_CACHE", str(tmp_path))
    WRITERS[kind](tmp_path, True)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with full_disk(), pytest.raises(Error, match="cannot be written"):
        WRITERS[kind](tmp_path, False)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    WRITERS[kind](tmp_path, False)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} != before


def test_a_full_disk_stops_the_rendering_of_pictures(tmp_path, monkeypatch, full_disk):
    """Through a memory map, it would be a signal that ends the process."""
    made = recipe.Recipe(4, 128, 1, 1, 4, "adamw", "v", None, 0)
    with full_disk(), pytest.raises(Error, match=r"pictures\.npy cannot be written"):
        recipe.pictures(tmp_path, made)
    assert not [*tmp_path.iterdir()]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(Error, match=r"need 0\.00 GB"):
        recipe.pictures(tmp_path, made)


@pytest.mark.parametrize("name", ["pictures.npy", "scenes.json"])
def test_a_damaged_file_of_an_earlier_stage_is_named(tmp_path, name):
    made = recipe.Recipe(2, 128, 1, 1, 4, "adamw", "v", None, 0)
    shown, scenes = recipe.pictures(tmp_path, made)
    assert (shown.shape, len(scenes)) == ((2, 128, 128, 3), 2)
    (tmp_path / name).write_bytes(b"\x93NUMPY[[")
    with pytest.raises(Error, match=rf"{name} is damaged"):
        recipe.pictures(tmp_path, made)


def test_without_hard_links_no_picture_is_lost(tmp_path, monkeypatch):
    """As on a memory card: threads that save one name still take turns."""

    def refused(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)

    def save(shade: int) -> None:
        for _ in range(5):
            images.write(Image.new("L", (8, 8), shade), tmp_path / "a.png", metadata.COMPUTED)

    threads = [threading.Thread(target=save, args=(shade,)) for shade in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(Image.open(f).getextrema()[0] for f in tmp_path.iterdir()) == sorted([*range(8)] * 5)

    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(Error, match="Input/output error"):
        images.write(Image.new("L", (8, 8)), tmp_path / "b.png", metadata.COMPUTED)
    assert not (tmp_path / "b.png").exists()


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    code = f"import fcntl; f = open({str(tmp_path / '.lock')!r}, 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=1)"
    other = subprocess.Popen(
        [sys.executable, "-c", f"{code}; input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "1\n"
    with pytest.raises(Error, match="Another process trains"), fit.alone(tmp_path):
        pass
    other.kill()
    other.communicate()
    (tmp_path / f".abc{whole.PART}.safetensors").touch()  # of a process that was killed
    with fit.alone(tmp_path):
        assert [file.name for file in tmp_path.iterdir()] == [".lock"]


def test_a_lock_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(Error, match="cannot be written"), fit.alone(tmp_path):
        pass


def test_a_drive_without_locks_is_trained_on(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refused)
    part = tmp_path / f".abc{whole.PART}.safetensors"
    part.touch()
    with fit.alone(tmp_path):
        assert part.exists()  # it may be another process's


def test_a_changed_file_is_seen_whatever_the_clock_says(tmp_path):
    """Equal size and time, as after the clock was set back, or by `cp -p`."""
    file = tmp_path / "a"
    file.write_bytes(b"1")
    seen, then = foreign.stamp(file), file.stat().st_mtime_ns
    file.write_bytes(b"2")
    os.utime(file, ns=(then, then))
    assert foreign.stamp(file) != seen
    assert foreign.stamp(tmp_path / "none") == ()


def test_nothing_follows_from_the_clock():
    """A clock that is set back changes no lock, no sweep and no resumed run: the time of day is only ever shown. (A
    certificate says from when on it holds.)"""
    code = [f for of in ("mlxdiff", "convert", "widgets") for f in (ROOT / of).rglob("*.py") if f.name != "signing.py"]
    asks = ("time.time(", "datetime", "time_ns(", "utcnow")
    assert len(code) > 100
    assert not [file for file in code if any(ask in file.read_text(encoding="utf-8") for ask in asks)]


@pytest.mark.parametrize("seconds", [-(2.0**33), 2.0**62])
def test_a_day_that_no_calendar_has(seconds):
    assert len(shows._day(seconds)) >= 10
    assert shows._day(0.0) in ("1970-01-01", "1969-12-31")


@pytest.mark.parametrize("data", [b"", b"\0" * 40, b"\xff\xfe", b"../../x"])
def test_a_ref_that_a_crash_has_emptied_is_no_commit(tmp_path, monkeypatch, data):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--a--b"
    for folder in ("refs", "snapshots/c0"):
        (repo / folder).mkdir(parents=True)
    (repo / "snapshots" / "c0" / "model_index.json").touch()
    (repo / "refs" / "main").write_bytes(b"c0\n")
    assert hub.held("a/b", "main") == ("c0", {"model_index.json": 0})
    (repo / "refs" / "main").write_bytes(data)
    with pytest.raises(Error, match="is not on this machine"):
        hub.held("a/b", "main")


@pytest.mark.parametrize("name", ["text_encoder", "vae"])
def test_a_network_that_overflows_in_float16_draws_no_black_picture(monkeypatch, name):
    """Its weights are finite, but so loud that float16 cannot hold what it computes, which float32 can."""
    problems = {}
    for dtype in ("float16", "float32"):
        pipe = mlxdiff.load("storybook", dtype=dtype)
        quiet, louder = pipe.networks.get, set()

        def get(asked: str, quiet=quiet, louder=louder):
            network = quiet(asked)
            if asked == name and asked not in louder:
                louder.add(asked)
                network.update(tree_map(lambda x: mx.clip(x * 300, -6e4, 6e4).astype(x.dtype), network.parameters()))
            return network

        monkeypatch.setattr(pipe.networks, "get", get)
        try:
            pipe("a red house", seed=1, steps=1, width=64, height=64)
        except Error as e:
            problems[dtype] = str(e)
    assert "not finite in float16" in problems.pop("float16")
    assert not problems


def test_previews_that_overflow_are_made_by_the_linear_map(pipe, monkeypatch):
    """For a model whose latents are its family's, which the built-in model's are not."""
    x0 = np.random.default_rng(0).standard_normal((1, 8, 8, len(pipe.description.family.preview) - 1), np.float32)
    monkeypatch.setattr(Description, "usual_latents", True)
    assert pipe.previews_by_vae
    monkeypatch.setattr(pipeline, "_pixels", lambda *_: np.full((1, 64, 64, 3), np.nan, np.float32))
    (shown,) = pipe.preview(x0)
    assert shown.tobytes() == images.preview(x0[0], pipe.description.family.preview).tobytes()
    with pytest.raises(Error, match="not finite"):
        pipe.decode(x0)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\udcff" * 200])
def test_names_that_no_file_can_have(pipe, tmp_path, name):
    """A picture's settings, or a prompt from elsewhere, may hold such a name."""
    with pytest.raises(Error):
        adapters.check(name, "LoRA", pipe.description, tmp_path)
    assert generate._known(name) == DEFAULT
    with pytest.raises(Error, match="There is no folder"):
        adapters.folder_of(name)
