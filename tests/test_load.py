"""What `load` refuses before anything is fetched or converted. Reference: the promise that every setting is checked
before the network is asked for anything, and what only a checkpoint can tell right after its headers."""

import shutil
from pathlib import Path

import pytest

import mlxdiff
import mlxdiff.__main__
from mlxdiff import advice, builtin, store
from mlxdiff.errors import Error
from mlxdiff.request import Request
from mlxdiff.store import cache

PICTURE = str(Path(__file__).parent / "data" / "lesson.png")
BEFORE = {
    "a sampler of diffusion for rectified flow": ("flux-dev", {"sampler": "ddim"}, "ddim is not for models of rect"),
    "an unknown sampler": ("sd15", {"sampler": "nope"}, "no sampler 'nope'"),
    "an unknown schedule": ("sd15", {"schedule": "nope"}, "Schedule 'nope'"),
    "a schedule that rectified flow has not": (
        "sd3-medium",
        {"schedule": "leading"},
        "leading schedule does not exist",
    ),
    "a size": ("flux-dev", {"width": 1000}, "width 1000 is not a multiple of 16"),
    "a size beyond the positions": ("sd3-medium", {"height": 4096}, "positions for at most 3072 pixels"),
    "shift for diffusion": ("sdxl", {"shift": 3.0}, "shift is for Stable Diffusion 3 and 3.5 and FLUX.1"),
    "strength without a picture": ("sdxl", {"strength": 0.5}, "needs a start image"),
    "skipped layers for another family": ("flux-dev", {"skip_layers": (7,)}, "skip_layers is for Stable Diffusion 3"),
    "a skipped layer that is not there": ("sd3.5-medium", {"skip_layers": (99,)}, "layers 0 to 23"),
    "guidance of a model without": ("flux-schnell", {"guidance": 3.0}, "takes no guidance"),
    "eta of a sampler without noise": ("sd15", {"sampler": "euler", "eta": 0.5}, "eta has no meaning for euler"),
    "a picture that is not there": ("sd15", {"image": "nowhere.png"}, "no picture at nowhere.png"),
    "one of two pictures that is not there": ("sd15", {"image": [PICTURE, "nowhere.png"]}, "no picture at nowhere.png"),
    "two pictures to begin with": ("sd15", {"image": [PICTURE] * 2}, "sd15 begins with one picture; 2 were given"),
    "two pictures for a model that edits one": (
        "flux-kontext",
        {"image": [PICTURE] * 2},
        "flux-kontext takes at most 1 to edit; 2 pictures were given",
    ),
    "strength of an edit": (
        "flux-kontext",
        {"image": PICTURE, "strength": 0.5},
        r"flux-kontext edits: it takes no strength. Leave `strength` out",
    ),
    "strength of an edit without a picture": ("flux-kontext", {"strength": 0.5}, "edits: it takes no strength"),
}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """The network counts as asked where a hub's repository would be resolved; memory is no reason to refuse."""

    def reached(*_, **__):
        raise AssertionError("The network was asked.")

    monkeypatch.setattr(store, "_from_hub", reached)
    monkeypatch.setattr(advice, "this_machine", lambda: advice.Machine(10**12, 10**12, False))


@pytest.mark.parametrize("case", BEFORE)
def test_a_setting_is_refused_before_the_network_is_asked(case):
    model, settings, says = BEFORE[case]
    with pytest.raises(Error, match=says):
        mlxdiff.load(model, request=Request("a red house", **settings))
    with pytest.raises(AssertionError, match="network was asked"):  # else the test could not fail
        mlxdiff.load(model, request=Request("a red house"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bits": 7}, "quantized to 7"),
        ({"dtype": "int8"}, "'int8' is not a dtype"),
        ({"refiner": "flux-dev"}, "flux-dev works on other latents than sdxl"),
    ],
)
def test_an_option_is_refused_before_the_network_is_asked(options, says):
    with pytest.raises(Error, match=says):
        mlxdiff.load("sdxl", **options)


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["-m", "flux-dev", "--sampler", "ddim"], "not for models of rectified flow"),
        (["-m", "sd15", "--sampler", "nope"], "no sampler 'nope'"),
        (["-m", "flux-dev", "-W", "1000"], "width 1000"),
        (["-m", "flux-kontext", "-i", PICTURE, "--strength", "0.5"], "Leave --strength out"),
        (["-m", "flux-kontext", "-i", PICTURE, "-i", PICTURE], "takes at most 1 to edit"),
        (["-m", "sdxl", "--refiner", "flux-dev"], "other latents"),
        (["-m", "flux-dev", "-n", "trees"], "Add --true-cfg 4"),
    ],
)
def test_the_command_line_refuses_in_one_line(typed, says, capsys):
    assert mlxdiff.__main__.main(["generate", "a red house", *typed]) == 1
    said = capsys.readouterr().err
    assert says in said
    assert len(said.splitlines()) == 1


def test_eta_waits_for_the_checkpoint_that_says_which_sampler_it_is():
    with pytest.raises(AssertionError, match="network was asked"):
        mlxdiff.load("sd15", request=Request("a red house", eta=0.5))


def test_what_only_a_checkpoint_can_tell_is_told_before_it_is_converted(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXDIFF_CACHE", str(tmp_path / "cache"))
    shutil.copytree(builtin.FOLDER, tmp_path / "mine")
    with pytest.raises(Error, match="shift is for"):
        mlxdiff.load(tmp_path / "mine", request=Request("a red house", shift=3.0))
    assert not list(cache.root().glob("models/*/model.json"))
    mlxdiff.load(tmp_path / "mine", request=Request("a red house"))
    assert len(list(cache.root().glob("models/*/model.json"))) == 1
    with pytest.raises(Error, match="shift is for"):  # the same of what is converted already
        mlxdiff.load(tmp_path / "mine", request=Request("a red house", shift=3.0))


def test_force_is_for_memory_alone(monkeypatch):
    with pytest.raises(Error, match="width 1000"):
        mlxdiff.load("flux-dev", force=True, request=Request("a red house", width=1000))
    monkeypatch.setattr(advice, "this_machine", lambda: advice.Machine(10**9, 10**9, False))
    with pytest.raises(Error, match="takes about"):
        mlxdiff.load("flux-dev", request=Request("a red house"))
    with pytest.raises(AssertionError, match="network was asked"):
        mlxdiff.load("flux-dev", force=True, request=Request("a red house"))
