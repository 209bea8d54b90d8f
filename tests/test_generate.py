"""The command line, on a tiny random model saved by diffusers. References: files, exit codes, one-line errors."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlxdiff import images, load
from mlxdiff.errors import Error
from mlxdiff.families import MODELS
from mlxdiff.generate import main
from mlxdiff.recipe import default_dtype
from tests.usage import refused

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


@pytest.mark.skipif(default_dtype() != "float32", reason="a GPU's kernels are made by Metal")
def test_nothing_is_compiled_for_a_small_model_on_a_cpu(here, model):
    """MLX leaves in TMPDIR what its compiler makes, 13 CPU seconds of it for the built-in model."""
    command = [sys.executable, "-m", "mlxdiff.generate", *quick(model, "a red fox", "-o", "a.png")]
    (here / "temp").mkdir()
    env = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(here / "temp")}
    subprocess.run(command, env=env, check=True, capture_output=True)
    assert (here / "a.png").exists()
    assert not list((here / "temp").rglob("*.so"))


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
    assert "The image is not the one that these settings name" in capsys.readouterr().err


def test_an_image_from_memory_is_drawn_from_but_not_replayed(here, model, capsys):
    pipe = load(model)
    begun = pipe("a red fox", seed=1, steps=2, width=16, height=16)
    more = pipe("a red fox", seed=2, steps=4, image=begun.image)  # as large as its image
    assert more.image.size == (16, 16)
    images.save(more.image, here / "a.png", more.request, pipe.name, str(pipe.description.recipe))
    assert main(["--from-image", "a.png", "-m", str(model), "-o", "b.png"]) == 1
    assert "These settings need a start image" in capsys.readouterr().err
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


def test_several_pictures_of_one_name_say_which_is_which(here, model):
    assert main(quick(model, "a fox", "-s", "7", "-o", "one.png")) == 0
    assert main(quick(model, "a fox", "-s", "1", "5", "-o", "one.png")) == 0
    assert main(quick(model, "a fox", "-s", "8", "-b", "2", "-o", "two.jpg")) == 0
    Path("prompts.txt").write_text("a red fox\na cat\n")
    assert main(quick(model, "--prompt-file", "prompts.txt", "-s", "3", "-o", "three.png")) == 0
    named = {"one.png": 7, "one-1.png": 1, "one-5.png": 5, "three-a-red-fox-3.png": 3, "three-a-cat-3.png": 3}
    jpegs = {"two-8.jpg": 8, "two-9.jpg": 9}
    assert files(here) == sorted([*named, *jpegs, "prompts.txt"])
    assert {name: images.read_settings(here / name)[0].seed for name in named | jpegs} == named | jpegs


def test_a_seed_that_is_reached_twice_is_drawn_once(here, model, capsys):
    def seeds(*args: str) -> tuple[list, str]:
        assert main(quick(model, *args, "--json", "-o", "out/")) == 0
        out, err = capsys.readouterr()
        said = [json.loads(line)["request"] for line in out.splitlines()]
        return [(s["prompt"], s["seed"]) for s in said], err

    assert seeds("a", "-s", "1", "2", "-b", "2") == (
        [("a", 1), ("a", 2), ("a", 3)],
        "Drawn once, though asked for more often: seed 2.\n",
    )
    drawn, said = seeds("a", "-s", "5", "1", "3", "5", "-b", "3")  # from both sides: 5 6 7, 1 2 3, then 4
    assert drawn == [("a", n) for n in (5, 6, 7, 1, 2, 3, 4)]
    assert "seed 3, 5, 6, 7." in said
    Path("prompts.txt").write_text("a\nb\na\n")
    assert seeds("--prompt-file", "prompts.txt", "-s", "1")[0] == [("a", 1), ("b", 1)]
    drawn, said = seeds("--prompt-file", "prompts.txt")  # fresh seeds are other pictures
    assert (len(set(drawn)), said) == (3, "")
    assert main(quick(model, "a", "-s", "1", "-b", "0")) == 1


def test_a_converted_copy_of_a_named_model_keeps_its_defaults(here, monkeypatch):
    from mlxdiff.builtin import FOLDER
    from mlxdiff.convert.__main__ import main as convert

    assert convert([str(FOLDER), "-o", "copy", "--dtype", "float32"]) == 0
    request = load("copy").resolve("a house")
    assert request.width == MODELS["storybook"].defaults.size
    assert request.guidance == 4.0


def test_prompts_from_a_file_and_from_standard_input(here, model, monkeypatch, capsys):
    Path("prompts.txt").write_text("# animals\na cat\n\n  # and:\n  a dog # 2  \n")
    assert main(quick(model, "--prompt-file", "prompts.txt", "-s", "1", "--json")) == 0
    said = [json.loads(line)["request"]["prompt"] for line in capsys.readouterr().out.splitlines()]
    assert said == ["a cat", "a dog # 2"]
    Path("prompts.txt").write_text("a cat\n\n  a dog  \n")
    monkeypatch.setattr("sys.stdin", open("prompts.txt"))  # noqa: SIM115
    assert main(quick(model, "-", "-s", "1", "-o", "stdin.png")) == 0
    assert images.read_settings(here / "stdin.png")[0].prompt == "a cat\n\n  a dog"


def test_a_prompt_that_never_ends_or_is_no_text_is_one_line(here, capsys, monkeypatch):
    Path("a.txt").write_bytes(b"\xff")
    monkeypatch.setattr("sys.stdin", open("a.txt", encoding="utf-8"))  # noqa: SIM115
    endless = "cannot be read: it has more than"
    cases = {"-": "Standard input cannot be read: it is not UTF-8", "--prompt-file=/dev/zero": f"/dev/zero {endless}"}
    for typed, says in (cases | {"--prompt-file=a.txt": "a.txt cannot be read: it is not UTF-8"}).items():
        assert main([typed]) == 1
        said = capsys.readouterr().err
        assert says in said
        assert said.count("\n") == 1


def test_settings_that_do_nothing_are_told(here, model, capsys):
    said = ["--preview-dir", "steps", "--taesd", "auto", "-n", "blue", "-g", "1"]
    assert main(quick(model, "a fox", "-o", "a.png", *said)) == 0
    told = capsys.readouterr().err
    assert "no TAESD is needed" in told
    assert "Without guidance above 1 a negative prompt does nothing" in told
    assert main(quick(model, "a fox", "-o", "b.png", "-n", "blue", "-g", "2")) == 0
    assert "does nothing" not in capsys.readouterr().err


def test_previews_of_every_step(here, model):
    """In a folder for each picture, so that two runs do not mix."""
    for steps in ("2", "1"):
        typed = ["a fox", "-s", "1", "-b", "2", "-o", "out/", "--preview-dir", "steps", "--steps", steps]
        assert main([*quick(model), *typed]) == 0
    first = [f"steps/a-fox-{seed}/00{step}.png" for seed in (1, 2) for step in (1, 2)]
    again = [f"steps/a-fox-{seed}-1/001.png" for seed in (1, 2)]
    assert [f for f in files(here) if f.startswith("steps")] == sorted([*first, *again])
    assert Image.open(first[0]).size == (16, 16)  # a VAE this small decodes
    assert images.read_settings(here / first[2])[0].seed == 2


# what was typed -> what the error names
BAD = {
    "no prompt": ([], "no prompt"),
    "two prompts": (["a", "-p", "b"], "More than one prompt"),
    "prompt file missing": (["--prompt-file", "absent.txt"], "absent.txt"),
    "prompt file empty": (["--prompt-file", "empty.txt"], "empty.txt"),
    "prompt file of comments": (["--prompt-file", "comment.txt"], "comment.txt holds no prompt"),
    "prompt file binary": (["--prompt-file", "binary.txt"], "binary.txt"),
    "a decoder for no previews": (["x", "--taesd", "auto"], "Add --preview-dir"),
    "width 0": (["x", "-W", "0"], "Width must be a whole number from 4 to 16384; 0 was given"),
    "width negative": (["x", "-W", "-8"], "Width must be a whole number from 4 to 16384; -8 was given"),
    "height not a multiple": (["x", "-H", "30"], "Use 28 or 32"),
    "height too large": (["x", "-H", "99999"], "Height must be a whole number from 4 to 16384; 99999 was given"),
    "steps 0": (["x", "--steps", "0"], "Steps must be a whole number from 1 to 1000; 0 was given"),
    "steps negative": (["x", "--steps", "-2"], "Steps must be a whole number from 1 to 1000; -2 was given"),
    "steps more than training": (
        ["x", "--steps", "1001"],
        "Steps must be a whole number from 1 to 1000; 1001 was given",
    ),
    "guidance nan": (["x", "-g", "nan"], "Guidance must be a number from 0 to 100; nan was given"),
    "guidance infinite": (["x", "-g", "inf"], "Guidance must be a number from 0 to 100; inf was given"),
    "guidance negative": (["x", "-g", "-1"], "Guidance must be a number from 0 to 100; -1.0 was given"),
    "seed 2^64": (["x", "-s", str(2**64)], str(2**64)),
    "seed negative": (["x", "-s", "-1"], "Seed must be a whole number from 0 to 9223372036854775807; -1 was given"),
    "count 0": (["x", "-b", "0"], "Count must be a whole number from 1 to 1000; 0 was given"),
    "sampler unknown": (["x", "--sampler", "eulr"], "Did you mean euler?"),
    "schedule unknown": (["x", "--schedule", "karas"], "karas"),
    "noise unknown": (["x", "--noise", "gpu"], "gpu"),
    "eta without use": (["x", "--sampler", "euler", "--eta", "1"], "eta"),
    "eta nan": (["x", "--sampler", "ddim", "--eta", "nan"], "Eta must be a number from 0 to 10; nan was given"),
    "rescale out of range": (["x", "--rescale", "2"], "Rescale must be a number from 0 to 1; 2.0 was given"),
    "interval backwards": (["x", "--interval", "0.9", "0.1"], "interval"),
    "clip skip 0": (["x", "--clip-skip", "0"], "clip_skip must be a whole number from 1 to 12; 0 was given"),
    "clip skip too deep": (["x", "--clip-skip", "9"], "clip_skip 9"),
    "several to standard output": (["x", "-s", "1", "2", "-o", "-"], "takes one picture"),
    "a batch to standard output": (["x", "-b", "2", "-o", "-"], "takes one picture"),
    "JSON and a picture to standard output": (["x", "--json", "-o", "-"], "--json and -o -"),
    "output is no picture": (["x", "-o", "a.txt"], "a.txt"),
    "output folder is a file": (["x", "-o", "empty.txt/a.png"], "empty.txt"),
    "previews in a file": (["x", "--preview-dir", "empty.txt"], "another place with --preview-dir"),
    "model absent": (["x", "-m", "no-such-model"], "no-such-model"),
    "model path absent": (["x", "-m", "./no/such/folder"], "no/such/folder"),
    "model is no checkpoint": (["x", "-m", "binary.txt"], "binary.txt"),
    "refiner absent": (["x", "--refiner", "no-such-refiner"], "no-such-refiner"),
    "a time for no refiner": (["x", "--refine-at", "0.5"], "Add --refiner"),
    "image absent": (["x", "-i", "absent.png"], "absent.png"),
    "image is no picture": (["x", "-i", "binary.txt"], "binary.txt"),
    "strength without an image": (["x", "--strength", "0.5"], "--strength needs a start image"),
    "strength out of range": (
        ["x", "-i", "begin.png", "--strength", "2"],
        "Strength must be a number from 0 to 1; 2.0 was given",
    ),
    "strength leaves no step": (
        ["x", "-i", "begin.png", "--strength", "0.2", "--steps", "4"],
        "Strength 0.2 of 4 steps",
    ),
    "width 0 for an image": (
        ["x", "-i", "begin.png", "-W", "0"],
        "Width must be a whole number from 4 to 16384; 0 was given",
    ),
    "layers skipped in Stable Diffusion 1": (["x", "--skip-layers", "1"], "skip_layers is for Stable Diffusion 3"),
    "settings from nothing": (["--from-image", "absent.png"], "absent.png"),
    "settings from no picture": (["--from-image", "binary.txt"], "binary.txt"),
    "not a number": (["x", "--steps", "many"], "many"),
    "unknown flag": (["x", "--stepz", "3"], "no flag --stepz. Did you mean --steps?"),
    "a VAE that is none": (["x", "-m", "storybook", "--vae", "binary.txt"], "not a .safetensors or .gguf file"),
    "T5 for a U-Net": (["x", "-m", "storybook", "--t5", "binary.txt"], "takes no --t5"),
    "bits unknown": (["x", "-q", "7"], "7"),
    "dtype unknown": (["x", "--dtype", "float8"], "float8"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_one_line_and_nothing_else(here, model, capsys, name):
    typed, says = BAD[name]
    Path("empty.txt").write_text("")
    Path("comment.txt").write_text("# a cat\n")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00\x80" * 50)
    Image.new("RGB", (16, 16)).save("begin.png")
    before = files(here)
    if "-m" not in typed:
        typed = ["-m", str(model), *typed]
    err = refused(main, typed, capsys)
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


def to_stdout(here: Path, model: Path, cache: Path, stdout) -> subprocess.Popen:
    call = [sys.executable, "-m", "mlxdiff.generate", "a fox", *quick(model, "-s", "7", "-o", "-")]
    env = os.environ | {"PYTHONPATH": str(ROOT), "MLXDIFF_CACHE": str(cache)}
    return subprocess.Popen(call, cwd=here, env=env, stdout=stdout, stderr=subprocess.PIPE)


def test_a_picture_to_standard_output_is_the_picture_and_nothing_else(here, model, cache):
    out, err = to_stdout(here, model, cache, subprocess.PIPE).communicate(timeout=120)
    assert main(quick(model, "a fox", "-s", "7", "-o", "a.png")) == 0
    assert out == Path("a.png").read_bytes()
    assert err.startswith(b"standard output  seed 7, ")
    assert files(here) == ["a.png"]


def test_standard_output_that_is_closed_or_full(here, model, cache):
    reader, writer = os.pipe()
    os.close(reader)
    process = to_stdout(here, model, cache, writer)
    os.close(writer)
    assert (process.communicate(timeout=120)[1], process.returncode) == (b"", 1)
    if Path("/dev/full").exists():
        with open("/dev/full", "wb") as full:
            process = to_stdout(here, model, cache, full)
        says = b"mlxdiff generate: Standard output cannot be written: No space left on device. Choose a file with -o.\n"
        assert (process.communicate(timeout=120)[1], process.returncode) == (says, 1)
    main_end, terminal = os.openpty()
    process = to_stdout(here, model, cache, terminal)
    err = process.communicate(timeout=120)[1]
    assert b"is a terminal" in err
    assert process.returncode == 1
    os.close(main_end)
    os.close(terminal)


def test_previews_that_cannot_be_written_cost_no_picture(here, model, capsys):
    """The folder is there, and then the disk is full."""
    said = ["a red fox", "-o", "a.png", "--preview-dir", "steps", "--steps", "3"]

    def full(*_):
        raise Error("steps/a.png cannot be written: No space left on device.", "Choose another place.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "new_folder", full)
        assert main(quick(model, *said)) == 0
    err = capsys.readouterr().err
    assert err.count("No more previews: steps/a.png cannot be written") == 1
    assert files(here) == ["a.png"]
    with pytest.MonkeyPatch.context() as patch:  # not full yet, but so that the picture would no longer fit
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 100))
        assert main(quick(model, *said)) == 0
    assert capsys.readouterr().err.count("No more previews: steps has little room left") == 1
    assert files(here) == ["a-1.png", "a.png"]


def test_weights_that_are_not_finite_draw_no_black_picture(here, model, cache, capsys, monkeypatch):
    import mlx.core as mx

    from mlxdiff.models.unet import UNet

    monkeypatch.setattr(UNet, "__call__", lambda self, x, t, **_: mx.full(x.shape, float("nan")))
    assert main(quick(model, "x", "-o", "a.png")) == 1
    assert "not finite" in capsys.readouterr().err
    assert files(here) == []
