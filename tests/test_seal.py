"""Attacks on the seal of a converted folder, and on the cache that holds it: names, types, links, races, drives without
locks. Reference: what each of them did before (a traceback, a hang, another program's folder gone)."""

import errno
import fcntl
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from mlxdiff import Error, description, seal, store
from mlxdiff.__main__ import main
from mlxdiff.store import cache as kept
from tests.test_store import cache, folder  # noqa: F401 (a fixture)


@pytest.fixture
def made(cache, tmp_path) -> Path:  # noqa: F811
    return store.resolve(folder(tmp_path / "model"))


def changed(made: Path, change) -> None:
    """Change a description, and give it the hash that it should have."""
    values = json.loads((made / "model.json").read_text(encoding="utf-8"))
    change(values)
    values["hash"] = description.hash_of(values)
    (made / "model.json").write_text(json.dumps(values), encoding="utf-8")


MARK = [1, "0" * 16, "0" * 64]
SEALS = {
    "a name with a NUL": {"a\0b": MARK},
    "a name that is no text": {"\ud800": MARK},
    "a name too long": {"a" * 5000: MARK},
    "the folder itself": {"": MARK},
    "a folder": {".": MARK},
    "above": {"../../x": MARK},
    "a device": {"/dev/zero": MARK},
    "one file many times": {f"{'./' * k}unet.safetensors": MARK for k in range(1500)},
    "more files than any conversion": {f"{k}": MARK for k in range(20_000)},
    "a negative size": {"unet.safetensors": [-1, "", ""]},
    "a huge size": {"unet.safetensors": [10**4000, "", ""]},
    "sizes in words": {"unet.safetensors": ["1", "", ""]},
    "no marks": {"unet.safetensors": []},
    "a list": [MARK],
    "a number": 5,
}


@pytest.mark.parametrize("case", SEALS)
def test_a_seal_that_no_conversion_wrote(made, capsys, case):
    """It is one error at once, in the library and on the command line."""
    begin = time.process_time()
    changed(made, lambda values: values.update(seal=SEALS[case]))
    with pytest.raises(Error, match=r"model\.json|unet|x|cannot be read|missing"):
        description.read(made)
    assert main(["cache"]) == 0
    assert main(["cache", "--verify"]) == 1
    said = capsys.readouterr()
    assert "damaged" in said.out
    assert "Traceback" not in said.out + said.err
    assert time.process_time() - begin < 5


NOTES = [{"identity": 5}, {"identity": ["path"]}, {"identity": {"a": 1}}, {"identity": ["path", 7, []], "asked": 1},
         {"identity": ["path", "a\0b", []], "asked": [1, 2, 3, None]},
         {"identity": [None] * 4, "asked": [1] * 9}]  # fmt: skip


@pytest.mark.parametrize("note", NOTES)
def test_a_damaged_note_of_the_source(made, note, capsys):
    (made / "source.json").write_text(json.dumps(note), encoding="utf-8")
    assert main(["cache"]) == 0
    assert main(["cache", "--verify"]) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_values_of_the_wrong_type_in_a_description(made, capsys):
    for recipe in ({"dtype": 5, "bits": None}, {"dtype": "float32", "bits": [1]}, {"dtype": {}, "bits": {}}):
        changed(made, lambda values, recipe=recipe: values.update(recipe=recipe, name="wild\n" + "x" * 10**6))
        assert main(["cache"]) == 0
        out = capsys.readouterr().out
        assert len(out) < 1000
        assert len(out.splitlines()) == 4  # a name cannot pass for another line of the list


def test_a_conversion_that_goes_while_it_is_listed(made, monkeypatch, capsys):
    """Another process removes it after its folder was found."""
    found = kept._folders()
    shutil.rmtree(made)
    monkeypatch.setattr(kept, "_folders", lambda: found)
    assert main(["cache"]) == 0
    assert main(["cache", "--verify"]) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_folders_of_other_programs_stay(made, tmp_path):
    """Whatever they are called, if they do not bear our mark; and what a link leads to."""
    models = made.parent
    theirs = [models / "notes", models / "photos-0123456789ab", models / "x-0123456789ab.tmp"]
    for place in theirs:
        place.mkdir()
        (place / "model.json").write_text('{"format": "theirs"}', encoding="utf-8")
    link = models / "far-0123456789ab"
    link.symlink_to(folder(tmp_path / "far"))
    kept._sweep()
    assert main(["cache", "--clean", "all"]) == 0
    assert not made.exists()
    assert all((place / "model.json").exists() for place in theirs)
    assert (tmp_path / "far" / "unet" / "config.json").exists()


def test_a_sealed_file_that_became_another_kind_of_file(made, capsys):
    """A pipe, which would be read for ever, and a renamed file."""
    file = made / "unet.safetensors"
    file.rename(made / "unet2.safetensors")
    with pytest.raises(Error, match=r"unet\.safetensors is missing"):
        description.read(made)
    os.mkfifo(file)
    with pytest.raises(Error, match="not a regular file"):
        description.read(made)
    assert main(["cache", "--verify"]) == 1


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_drive_without_locks(cache, tmp_path, monkeypatch, number):  # noqa: F811
    """It converts; and what another process may be making there is left alone."""

    def refused(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)
    part = cache / "models" / "other-float32-0123456789ab.abc.part"
    part.mkdir(parents=True)
    assert (store.resolve(folder(tmp_path / "model")) / "model.json").is_file()
    assert part.is_dir()


def test_a_note_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXDIFF_CACHE", str(tmp_path))

    def full(path, note):
        path.write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(kept, "write_json", full)
    with pytest.raises(Error, match="The disk is full"):
        kept.write_note(tmp_path / "hub" / "a.json", {})
    assert not [*(tmp_path / "hub").iterdir()]


def test_a_seal_is_of_regular_files_alone(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"1" * 100)
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [*seal.of(tmp_path, lambda *_: None)] == ["a.safetensors"]
