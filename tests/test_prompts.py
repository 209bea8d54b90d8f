"""Prompts that were encoded before. References: the picture without the cache, bit for bit; which networks were opened;
the file system's own word on permissions, sizes and times."""

import errno
import os
import stat
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlxdiff
from mlxdiff.generate import main
from mlxdiff.networks import Networks
from mlxdiff.store import prompts
from mlxdiff.store.__main__ import main as cache

from .parity import tiny

ENCODERS = {"sdxl": {"text_encoder", "text_encoder_2"}, "flux": {"text_encoder", "text_encoder_2"}}
SIZE = {"seed": 1, "steps": 1, "width": 32, "height": 32}


@pytest.fixture(scope="module", params=ENCODERS)
def model(request, tmp_path_factory) -> tuple[Path, set[str]]:
    root = tmp_path_factory.mktemp(request.param)
    getattr(tiny, request.param)(root / "words").save_pretrained(root / "model")
    return root / "model", ENCODERS[request.param]


@pytest.fixture
def opened(tmp_path, monkeypatch) -> list[str]:
    """The networks that were opened. Every encoder counts as large; the cache begins empty, but for conversions."""
    names, whole = [], Networks.open
    monkeypatch.setattr(Networks, "open", lambda self, name: names.append(name) or whole(self, name))
    monkeypatch.setattr(prompts, "WORTH", 0)
    monkeypatch.setattr(prompts, "folder", lambda: tmp_path / "prompts")
    return names


def drawn(model: Path, opened: list[str], prompt: str = "a red fox", **settings) -> tuple[np.ndarray, set[str]]:
    """The picture by a pipeline of its own, and the networks that it opened."""
    opened.clear()
    options = {"prompt_cache": settings.pop("prompt_cache")} if "prompt_cache" in settings else {}
    picture = np.asarray(mlxdiff.load(model, **options)(prompt, **SIZE | settings).image)
    return picture, set(opened)


def files(tmp_path: Path) -> list[Path]:
    return [*(tmp_path / "prompts").iterdir()] if (tmp_path / "prompts").exists() else []


def test_a_prompt_is_encoded_once(model, opened, tmp_path):
    """Another prompt, or another negative one, is encoded again; without the cache all are."""
    folder, encoders = model
    want, first = drawn(folder, opened, prompt_cache=False)
    assert encoders <= first
    assert not files(tmp_path)
    assert encoders <= drawn(folder, opened)[1]
    again, second = drawn(folder, opened)
    assert not encoders & second
    assert np.array_equal(again, want)
    assert encoders <= drawn(folder, opened, "a red foxes")[1]
    assert encoders <= drawn(folder, opened, prompt_cache=False)[1]
    assert len(files(tmp_path)) == 2
    for file in files(tmp_path):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert b"fox" not in file.read_bytes()
    assert stat.S_IMODE((tmp_path / "prompts").stat().st_mode) == 0o700


def test_what_was_kept_is_used_though_the_cache_may_only_be_read(tmp_path, monkeypatch):
    """Its time of use cannot be noted."""

    def refused(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(prompts, "folder", lambda: tmp_path)
    prompts._keep(tmp_path / "a.safetensors", [prompts.Text(mx.ones((1, 7, 4)), None)])
    monkeypatch.setattr(os, "utime", refused)
    (found,) = prompts._kept(tmp_path / "a.safetensors", 1, 4, 0)
    assert mx.array_equal(found.context, mx.ones((1, 7, 4)))


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _rewrite(change) -> callable:
    def damage(file: Path) -> None:
        arrays = dict(mx.load(str(file)))
        mx.eval(arrays)
        mx.save_safetensors(str(file), change(arrays))

    return damage


DAMAGES = {
    "cut": _cut,
    "empty": lambda file: file.write_bytes(b""),
    "noise": lambda file: file.write_bytes(os.urandom(4096)),
    "not finite": _rewrite(lambda a: a | {"0.context": a["0.context"] * mx.inf}),
    "narrow": _rewrite(lambda a: a | {"0.context": a["0.context"][..., :-1]}),
    "flat": _rewrite(lambda a: a | {"0.context": a["0.context"][0]}),
    "whole numbers": _rewrite(lambda a: a | {"0.context": mx.zeros(a["0.context"].shape, mx.int32)}),
    "more": _rewrite(lambda a: a | {"9.context": a["0.context"]}),
    "less": _rewrite(lambda a: {k: v for k, v in a.items() if k != "0.context"}),
    "pooled": _rewrite(lambda a: a | {"0.pooled": mx.zeros(3)}),
    "narrow pooled": _rewrite(lambda a: a | {"0.pooled": a["0.pooled"][:, :-1]}),
    "not pooled": _rewrite(lambda a: {k: v for k, v in a.items() if k != "0.pooled"}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_made_anew(opened, tmp_path, damage, tiny_flux):
    want, _ = drawn(tiny_flux, opened)
    (file,) = files(tmp_path)
    damage(file)
    picture, networks = drawn(tiny_flux, opened)
    assert networks >= ENCODERS["flux"]
    assert np.array_equal(picture, want)
    assert not ENCODERS["flux"] & drawn(tiny_flux, opened)[1]
    assert files(tmp_path) == [file]


@pytest.fixture(scope="module")
def tiny_flux(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("damaged")
    tiny.flux(root / "words").save_pretrained(root / "model")
    return root / "model"


def test_the_oldest_leave_first(opened, tmp_path, tiny_flux, monkeypatch):
    """Room for two; one that was used is not the oldest."""
    for word in ("fox", "cat"):
        drawn(tiny_flux, opened, word)
    sizes = [file.stat().st_size for file in files(tmp_path)]
    monkeypatch.setattr(prompts, "MOST", int(2.5 * max(sizes)))
    for i, file in enumerate(sorted(files(tmp_path), key=lambda f: f.stat().st_mtime)):
        os.utime(file, (1000 + i, 1000 + i))
    drawn(tiny_flux, opened, "fox")
    drawn(tiny_flux, opened, "dog")
    assert len(files(tmp_path)) == 2
    assert not ENCODERS["flux"] & drawn(tiny_flux, opened, "fox")[1]
    assert not ENCODERS["flux"] & drawn(tiny_flux, opened, "dog")[1]
    assert drawn(tiny_flux, opened, "cat")[1] >= ENCODERS["flux"]


def test_a_cache_that_cannot_be_written_stops_no_picture(opened, tmp_path, tiny_flux):
    (tmp_path / "prompts").write_text("a file in the place of the folder")
    drawn(tiny_flux, opened)
    assert (tmp_path / "prompts").read_text().startswith("a file")


def test_small_encoders_are_not_worth_it(opened, tmp_path, tiny_flux, monkeypatch):
    seal = mlxdiff.load(tiny_flux).description.seal
    size = sum(seal[f"{name}.safetensors"].size for name in ENCODERS["flux"])
    for worth, kept in ((size + 1, 0), (size, 1)):
        monkeypatch.setattr(prompts, "WORTH", worth)
        drawn(tiny_flux, opened)
        assert len(files(tmp_path)) == kept


def test_the_commands_show_and_clear_them(opened, tmp_path, tiny_flux, capsys, monkeypatch):
    typed = ["a red fox", "-m", str(tiny_flux), "--steps", "1", "-W", "32", "-H", "32", "-o", str(tmp_path / "a.png")]
    assert main([*typed, "--no-prompt-cache"]) == 0
    assert not files(tmp_path)
    assert main(typed) == 0
    assert cache([]) == 0
    assert "1 encoded prompt, " in capsys.readouterr().out
    assert cache(["--clean", "prompts"]) == 0
    assert "Removed 1 encoded prompt, " in capsys.readouterr().out
    assert not files(tmp_path)
    assert cache([]) == 0
    assert "encoded prompt" not in capsys.readouterr().out
    assert cache(["--clean", "prompts"]) == 0
    assert "Removed 0 encoded prompts, " in capsys.readouterr().out
    monkeypatch.setenv("MLXDIFF_CACHE", str(tmp_path / "cache"))  # of other tests' models nothing goes
    for kept in (["1", "2"], []):
        for name in kept:
            (tmp_path / "prompts").mkdir(exist_ok=True)
            (tmp_path / "prompts" / f"{name}.safetensors").write_bytes(b"12")
        assert cache(["--clean", "all"]) == 0
        said = capsys.readouterr().out
        assert ("Removed 2 encoded prompts, 0.0 MB." in said) == bool(kept)
        assert ("encoded" in said) == bool(kept)
