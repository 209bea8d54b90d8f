"""The command line, on a tiny random model saved by diffusers. References: files, exit codes, one-line errors."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlxdiff import images, load
from mlxdiff.generate import main
from mlxdiff.weights import default_dtype

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    from .parity import tiny

    root = tmp_path_factory.mktemp("tiny")
    pipe = tiny.sd1(root / "words")
    pipe.save_pretrained(root / "model")
    return root / "model"


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def here(tmp_path, monkeypatch, cache) -> Path:
    """An empty working directory, with the converted model cached elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLXDIFF_CACHE", str(cache))
    return tmp_path


def quick(model: Path, *args: str) -> list[str]:
    return ["-m", str(model), "--steps", "2", "-W", "16", "-H", "16", *args]


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_picture_carries_what_drew_it_and_replays(here, model, capsys):
    assert main(quick(model, "a red fox", "-s", "3", "-o", "a.png")) == 0
    assert "a.png" in capsys.readouterr().out
    assert Image.open("a.png").info["mlxdiff-recipe"] == default_dtype()
    request, name = images.read_settings(here / "a.png")
    assert (request.prompt, request.seed, request.steps, name) == ("a red fox", 3, 2, "model")
    assert main(["--from-image", "a.png", "-m", str(model), "-o", "b.png"]) == 0
    assert np.array_equal(np.asarray(Image.open("a.png")), np.asarray(Image.open("b.png")))
    assert main(["--from-image", "a.png", "-m", str(model), "-s", "4", "-o", "c.png"]) == 0  # a flag wins
    assert not np.array_equal(np.asarray(Image.open("a.png")), np.asarray(Image.open("c.png")))


def test_a_picture_begins_with_another_and_replays_only_with_it(here, model, capsys):
    Image.linear_gradient("L").resize((30, 14)).save("begin.png")
    typed = ["-m", str(model), "--steps", "4", "-i", "begin.png", "--strength", "0.5", "a red fox", "-s", "3"]
    assert main([*typed, "-o", "a.png"]) == 0
    request, _ = images.read_settings(here / "a.png")
    assert (request.image, request.strength, request.width, request.height) == ("begin.png", 0.5, 32, 16)
    assert "Denoising strength: 0.5" in Image.open("a.png").info["parameters"]
    again = ["--from-image", "a.png", "-m", str(model)]
    assert main([*again, "-o", "b.png"]) == 0
    assert np.array_equal(np.asarray(Image.open("a.png")), np.asarray(Image.open("b.png")))
    Image.new("RGB", (30, 14), "red").save("other.png")
    assert main([*again, "-i", "other.png", "-o", "c.png"]) == 0  # a flag wins
    assert not np.array_equal(np.asarray(Image.open("a.png")), np.asarray(Image.open("c.png")))
    Image.new("RGB", (30, 14), "red").save("begin.png")
    capsys.readouterr()
    assert main([*again, "-o", "d.png"]) == 1
    assert "not what these settings began with" in capsys.readouterr().err


def test_an_image_from_memory_is_drawn_from_but_not_replayed(here, model, capsys):
    pipe = load(model)
    begun = pipe("a red fox", seed=1, steps=2, width=16, height=16)
    more = pipe("a red fox", seed=2, steps=4, image=begun.image)  # as large as its image
    assert more.image.size == (16, 16)
    images.save(more.image, here / "a.png", more.request, pipe.name, pipe.recipe)
    assert main(["--from-image", "a.png", "-m", str(model), "-o", "b.png"]) == 1
    assert "no image for these settings" in capsys.readouterr().err
    assert pipe.resolve(more.request, image=Image.new("RGB", (8, 8))).image_hash != more.request.image_hash


def test_seeds_counts_and_names(here, model, capsys):
    assert main(quick(model, "a red fox!", "-s", "3", "9", "-b", "2", "-o", "out/", "--json")) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [s["request"]["seed"] for s in said] == [3, 4, 9, 10]
    assert {(s["model"], s["dtype"], s["bits"]) for s in said} == {("model", default_dtype(), None)}
    assert files(here) == [f"out/a-red-fox-{n}.png" for n in (10, 3, 4, 9)]
    assert all(s["request"]["count"] == 1 for s in said)  # each file replays alone
    assert main(quick(model, "a red fox!", "-s", "3", "-o", "out")) == 0
    assert "out/a-red-fox-3-1.png" in files(here)


def test_a_converted_copy_of_a_named_model_keeps_its_defaults(here, monkeypatch):
    from mlxdiff.convert.__main__ import main as convert
    from mlxdiff.store import BUILTIN

    assert convert([str(BUILTIN / "storybook"), "-o", "copy", "--dtype", "float32"]) == 0
    request = load("copy").resolve("a house")
    assert (request.width, request.guidance) == (128, 4.0)


def test_prompts_from_a_file_and_from_standard_input(here, model, monkeypatch, capsys):
    Path("prompts.txt").write_text("a cat\n\n  a dog  \n")
    assert main(quick(model, "--prompt-file", "prompts.txt", "-s", "1", "--json")) == 0
    said = [json.loads(line)["request"]["prompt"] for line in capsys.readouterr().out.splitlines()]
    assert said == ["a cat", "a dog"]
    monkeypatch.setattr("sys.stdin", open("prompts.txt"))  # noqa: SIM115
    assert main(quick(model, "-", "-s", "1", "-o", "stdin.png")) == 0
    assert images.read_settings(here / "stdin.png")[0].prompt == "a cat\n\n  a dog"


def test_settings_that_do_nothing_are_told(here, model, capsys):
    said = ["--preview-dir", "steps", "--taesd", "auto", "-n", "blue", "-g", "1"]
    assert main(quick(model, "a fox", "-o", "a.png", *said)) == 0
    told = capsys.readouterr().err
    assert "no TAESD is needed" in told
    assert "Without guidance above 1 a negative prompt does nothing" in told
    assert main(quick(model, "a fox", "-o", "b.png", "-n", "blue", "-g", "2")) == 0
    assert "does nothing" not in capsys.readouterr().err


def test_previews_of_every_step(here, model):
    assert main(quick(model, "a fox", "-s", "1", "-o", "a.png", "--preview-dir", "steps")) == 0
    assert files(here) == ["a.png", "steps/1-001.png", "steps/1-002.png"]
    assert Image.open("steps/1-001.png").size == (16, 16)  # a VAE this small decodes


# what was typed -> what the error names
BAD = {
    "no prompt": ([], "no prompt"),
    "two prompts": (["a", "-p", "b"], "More than one prompt"),
    "prompt file missing": (["--prompt-file", "absent.txt"], "absent.txt"),
    "prompt file empty": (["--prompt-file", "empty.txt"], "empty.txt"),
    "prompt file binary": (["--prompt-file", "binary.txt"], "binary.txt"),
    "a decoder for no previews": (["x", "--taesd", "auto"], "Add --preview-dir"),
    "width 0": (["x", "-W", "0"], "width 0"),
    "width negative": (["x", "-W", "-8"], "width -8"),
    "height not a multiple": (["x", "-H", "30"], "Use 28 or 32"),
    "height too large": (["x", "-H", "99999"], "height 99999"),
    "steps 0": (["x", "--steps", "0"], "steps 0"),
    "steps negative": (["x", "--steps", "-2"], "steps -2"),
    "steps more than training": (["x", "--steps", "1001"], "steps 1001"),
    "guidance nan": (["x", "-g", "nan"], "guidance nan"),
    "guidance infinite": (["x", "-g", "inf"], "guidance inf"),
    "guidance negative": (["x", "-g", "-1"], "guidance -1"),
    "seed 2^64": (["x", "-s", str(2**64)], str(2**64)),
    "seed negative": (["x", "-s", "-1"], "seed -1"),
    "count 0": (["x", "-b", "0"], "count 0"),
    "sampler unknown": (["x", "--sampler", "eulr"], "eulr"),
    "schedule unknown": (["x", "--schedule", "karas"], "karas"),
    "noise unknown": (["x", "--noise", "gpu"], "gpu"),
    "eta without use": (["x", "--sampler", "euler", "--eta", "1"], "eta"),
    "eta nan": (["x", "--sampler", "ddim", "--eta", "nan"], "eta nan"),
    "rescale out of range": (["x", "--rescale", "2"], "rescale 2"),
    "interval backwards": (["x", "--interval", "0.9", "0.1"], "interval"),
    "clip skip 0": (["x", "--clip-skip", "0"], "clip_skip 0"),
    "clip skip too deep": (["x", "--clip-skip", "9"], "clip_skip 9"),
    "output is no picture": (["x", "-o", "a.txt"], "a.txt"),
    "output folder is a file": (["x", "-o", "empty.txt/a.png"], "empty.txt"),
    "model absent": (["x", "-m", "no-such-model"], "no-such-model"),
    "model path absent": (["x", "-m", "./no/such/folder"], "no/such/folder"),
    "model is no checkpoint": (["x", "-m", "binary.txt"], "binary.txt"),
    "refiner absent": (["x", "--refiner", "no-such-refiner"], "no-such-refiner"),
    "image absent": (["x", "-i", "absent.png"], "absent.png"),
    "image is no picture": (["x", "-i", "binary.txt"], "binary.txt"),
    "strength without an image": (["x", "--strength", "0.5"], "no image"),
    "strength out of range": (["x", "-i", "begin.png", "--strength", "2"], "strength 2"),
    "strength leaves no step": (
        ["x", "-i", "begin.png", "--strength", "0.2", "--steps", "4"],
        "Strength 0.2 of 4 steps",
    ),
    "width 0 for an image": (["x", "-i", "begin.png", "-W", "0"], "width 0"),
    "layers skipped in Stable Diffusion 1": (["x", "--skip-layers", "1"], "skip_layers is for SD3"),
    "settings from nothing": (["--from-image", "absent.png"], "absent.png"),
    "settings from no picture": (["--from-image", "binary.txt"], "binary.txt"),
    "not a number": (["x", "--steps", "many"], "many"),
    "unknown flag": (["x", "--stepz", "3"], "stepz"),
    "bits unknown": (["x", "-q", "7"], "7"),
    "dtype unknown": (["x", "--dtype", "float8"], "float8"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_one_line_and_nothing_else(here, model, capsys, name):
    typed, says = BAD[name]
    Path("empty.txt").write_text("")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00\x80" * 50)
    Image.new("RGB", (16, 16)).save("begin.png")
    before = files(here)
    if "-m" not in typed:
        typed = ["-m", str(model), *typed]
    try:
        code = main(typed)
    except SystemExit as e:  # argparse's own way out
        code = e.code
    out, err = capsys.readouterr()
    assert code not in (0, None)
    assert out == ""
    assert len(err.strip().splitlines()) == 1, err
    assert says in err
    assert "Traceback" not in err
    assert files(here) == before


def test_ctrl_c_stops_within_a_step_and_leaves_nothing(here, model, cache):
    """As a user does it: a process, SIGINT while it denoises, exit code 130."""
    call = [sys.executable, "-m", "mlxdiff.generate", "x", "-m", str(model), "--steps", "900", "-W", "64", "-H", "64"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "MLXDIFF_CACHE": str(cache)}
    # A shell that starts the tests in its background ignores SIGINT and hands that down; a user's shell does not.
    heard = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    options = {"cwd": here, "env": env, "stderr": subprocess.PIPE, "text": True, "preexec_fn": heard}
    process = subprocess.Popen([*call, "--preview-dir", "steps"], **options)
    deadline = time.monotonic() + 60
    while not (here / "steps").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert err.strip().splitlines()[-1].endswith("stopped.")
    assert "Traceback" not in err
    assert not [f for f in files(here) if not f.startswith("steps/") or f.endswith(".part")]


def test_weights_that_are_not_finite_draw_no_black_picture(here, model, cache, capsys, monkeypatch):
    import mlx.core as mx

    from mlxdiff.models.unet import UNet

    monkeypatch.setattr(UNet, "__call__", lambda self, x, t, **_: mx.full(x.shape, float("nan")))
    assert main(quick(model, "x", "-o", "a.png")) == 1
    assert "not finite" in capsys.readouterr().err
    assert files(here) == []
