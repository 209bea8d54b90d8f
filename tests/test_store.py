"""The cache of converted models, and what a name means, with a converter that only copies; then with the real one.
Reference: the promises in the docstring of store. tests/test_hub.py has what touches the network."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import mlxdiff.convert
import mlxdiff.store.cache
from mlxdiff import Error, description, store
from mlxdiff.__main__ import main
from tests import clip_vocab, store_worker
from tests.checkpoints import seal_again
from tests.loopback_hub import diffusers_repo


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mlxdiff.convert, "open", store_worker.fake_open)
    monkeypatch.setattr(mlxdiff.convert, "describe", store_worker.fake_describe)
    monkeypatch.setattr(mlxdiff.convert, "save", store_worker.fake_save)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def folder(path: Path) -> Path:
    for name, data in diffusers_repo(1000).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def test_a_folder_is_converted_once(cache, tmp_path):
    source = folder(tmp_path / "model")
    first = store.resolve(source)
    assert first.parent == cache / "models"
    made = (first / "unet.safetensors").stat().st_mtime_ns
    assert store.resolve(str(source)) == store.resolve("model") == first
    assert (first / "unet.safetensors").stat().st_mtime_ns == made


def test_the_key_holds_all_that_matters(cache, tmp_path):
    source = folder(tmp_path / "model")
    words = folder(tmp_path / "other") / "tokenizer"
    seen = [store.resolve(source)]
    for recipe in ({"bits": 4}, {"dtype": "float16"}, {"prediction": "v"}, {"tokenizer": words}):
        seen.append(store.resolve(source, **recipe))
    (words / "merges.txt").write_text("#version: 0.2\na b\n", encoding="utf-8")
    seen.append(store.resolve(source, tokenizer=words))
    os.utime(source / "vae" / "config.json", ns=(0, 0))
    seen.append(store.resolve(source))
    (source / "unet" / "config.json").write_text("{} ", encoding="utf-8")
    seen.append(store.resolve(source))
    source.rename(tmp_path / "moved")
    seen.append(store.resolve(tmp_path / "moved"))
    assert len(set(seen)) == len(seen)
    assert "float16" in seen[2].name
    assert "4bit" in seen[1].name


def test_a_unet_has_float16_where_other_models_have_bfloat16(cache, tmp_path, monkeypatch):
    """On an M3 and later. What was asked for explicitly is another conversion, and is made as it was asked for."""
    monkeypatch.setattr(
        mlxdiff.recipe, "default_dtype", lambda family=None: "bfloat16" if family is None else "float16"
    )
    source = folder(tmp_path / "model")
    suited, asked = store.resolve(source), store.resolve(source, dtype="bfloat16")
    assert suited != asked
    assert description.read(suited).recipe.dtype == "float16"
    assert description.read(asked).recipe.dtype == "bfloat16"
    assert store.resolve(source) == suited


def test_a_source_replaced_by_one_of_equal_size_and_time_is_converted_again(cache, tmp_path):
    source = folder(tmp_path / "model")
    file, made = source / "vae" / "config.json", store.resolve(source)
    before = file.stat()
    file.write_text(file.read_text(encoding="utf-8").swapcase()[::-1], encoding="utf-8")
    os.utime(file, ns=(before.st_mtime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert store.resolve(source) != made


def test_our_own_folder_is_used_in_place(cache, tmp_path):
    ours = store.resolve(folder(tmp_path / "model"), bits=4, dtype="float16")
    assert store.resolve(ours) == ours
    assert store.resolve(ours, bits=4, dtype="float16", prediction="eps") == ours
    for wrong in ({"bits": 8}, {"dtype": "float32"}, {"prediction": "v"}):
        with pytest.raises(Error, match="is already converted, with"):
            store.resolve(ours, **wrong)
    with pytest.raises(Error, match=r"its vae cannot be replaced\. Leave vae out;"):
        store.resolve(ours, parts={"vae": "vae.safetensors"})


def test_damaged_entries_are_made_again(cache, tmp_path):
    source = folder(tmp_path / "model")
    made = store.resolve(source)
    for name in ("unet.safetensors", "model.json"):
        whole = (made / name).read_bytes()
        (made / name).unlink()
        assert store.resolve(source) == made
        assert (made / name).read_bytes() == whole
    (made / "model.json").write_text("{", encoding="utf-8")
    assert json.loads((store.resolve(source) / "model.json").read_text())["format"] == description.FORMAT


def test_failure_leaves_nothing(cache, tmp_path, monkeypatch):
    def fails(checkpoint, target, **_):
        Path(target).mkdir()
        (Path(target) / "unet.safetensors").write_bytes(b"half")
        raise Error(f"{checkpoint.path}/unet is odd.", "Fix it.")

    monkeypatch.setattr(mlxdiff.convert, "save", fails)
    with pytest.raises(Error, match="unet is odd"):
        store.resolve(folder(tmp_path / "model"))
    assert [p.name for p in (cache / "models").iterdir()] == [".locks"]


def test_what_a_dead_process_left_is_removed_and_a_living_one_keeps_its_own(cache, tmp_path):
    source = folder(tmp_path / "model")
    made = store.resolve(source)
    dead, living = (cache / "models" / f"{n}-float32-0123456789ab.x1y2z3.part" for n in ("dead", "living"))
    for part in (dead, living):
        (part / "model").mkdir(parents=True)
    with open(cache / "models" / ".locks" / "living-float32-0123456789ab", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = store.resolve(source, bits=4)
        assert not dead.exists()
        assert living.exists()
    assert store.resolve(source) == made != other


def test_what_an_older_version_converted_goes(cache, tmp_path):
    old, newer = (cache / "models" / f"{n}-float32-0123456789ab" for n in ("old", "newer"))
    for folder_, number in ((old, description.FORMAT - 1), (newer, description.FORMAT + 1)):
        folder_.mkdir(parents=True)
        (folder_ / "model.json").write_text(json.dumps({"format": number}))
    store.resolve(folder(tmp_path / "model"))
    assert not old.exists()
    assert newer.exists()  # a newer version's is its own


def test_killed_conversion_leaves_nothing_usable(cache, tmp_path):
    """SIGKILL while the converter writes; the same call then makes the model and clears up."""
    source = folder(tmp_path / "model")
    script = (
        "import os, pathlib, sys\n"
        "from tests import store_worker\n"
        "from mlxdiff import store\n"
        "import mlxdiff.convert\n"
        "def stuck(checkpoint, target, **_):\n"
        "    target.mkdir()\n"
        "    (target / 'model.json').write_text('{')\n"
        "    print('writing', flush=True)\n"
        "    sys.stdin.read()\n"
        "store_worker.fake()\n"
        "mlxdiff.convert.save = stuck\n"
        "store.resolve(sys.argv[1])\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", script, str(source)]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    models = cache / "models"
    (left,) = (p for p in models.iterdir() if p.name != ".locks")
    assert left.name.endswith(".part")
    made = store.resolve(source)
    assert sorted(p.name for p in models.iterdir()) == [".locks", made.name]


@pytest.mark.parametrize("where", ["readonly", "file"])
def test_cache_that_cannot_be_written(cache, tmp_path, monkeypatch, where):
    source = folder(tmp_path / "model")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    monkeypatch.setenv("MLXDIFF_CACHE", "/proc/none" if where == "readonly" else str(tmp_path / "file"))
    with pytest.raises(Error, match="cannot be written") as caught:
        store.resolve(source)
    assert "MLXDIFF_CACHE" in caught.value.fix


def test_full_disk_is_told_before_the_conversion(cache, tmp_path, monkeypatch):
    class Net:
        parameters = 10**16

    def huge(*asked):
        found = store_worker.fake_open(*asked)
        found.components["unet"] = Net()
        return found

    monkeypatch.setattr(mlxdiff.convert, "open", huge)
    with pytest.raises(Error, match=r"model needs 40000000\.00 GB converted; .* has \d+\.\d\d GB free"):
        store.resolve(folder(tmp_path / "model"), dtype="float32")
    with pytest.raises(Error, match=r"model needs 5000000\.00 GB converted"):
        store.resolve(tmp_path / "model", dtype="float32", bits=4)


def test_a_tokenizer_that_is_not_there_is_refused(cache, tmp_path):
    with pytest.raises(Error, match="There is no folder"):
        store.resolve(folder(tmp_path / "a"), tokenizer=tmp_path / "none")


def test_the_shards_of_an_index_count(cache, tmp_path):
    index, shard = tmp_path / "unet.safetensors.index.json", tmp_path / "unet-00001-of-00001.safetensors"
    index.write_text("{}", encoding="utf-8")
    shard.write_bytes(b"first")
    words = folder(tmp_path / "other") / "tokenizer"
    made = store.resolve(index, tokenizer=words)
    assert store.resolve(index, tokenizer=words) == made
    shard.write_bytes(b"other")
    os.utime(shard, ns=(0, 0))
    assert store.resolve(index, tokenizer=words) != made


def test_what_lies_beside_a_file_counts(cache, tmp_path):
    """And only what a conversion may take from there."""
    words, file = folder(tmp_path / "other") / "tokenizer", tmp_path / "flux.safetensors"
    file.write_bytes(b"x")
    seen = [store.resolve(file, tokenizer=words)]
    for name, data in (("ae", b"a"), ("ae", b"another"), ("text_encoders/t5xxl_fp8", b"b"), ("clip_l", b"c")):
        (tmp_path / f"{name}.safetensors").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.safetensors").write_bytes(data)
        seen.append(store.resolve(file, tokenizer=words))
    assert len(set(seen)) == len(seen)
    for name in ("sdxl.safetensors", "t5xxl.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert store.resolve(file, tokenizer=words) == seen[-1]
    (tmp_path / "config.json").write_bytes(b"{}")
    assert store.resolve(file, tokenizer=words) not in seen


# `mlxdiff cache`.


def listed(capsys) -> dict[str, str]:
    """The line of each conversion, by its source's name."""
    assert main(["cache"]) == 0
    head, *lines, total = [line for line in capsys.readouterr().out.splitlines() if "--clean" not in line]
    assert head.split() == ["name", "weights", "size", "made", "source"]
    return {line.split()[0]: line for line in lines} | {"total": total}


def test_the_cache_is_listed(cache, tmp_path, capsys):
    assert main(["cache"]) == 0
    assert capsys.readouterr().out == f"0.0 MB in {cache}.\n"
    assert not cache.exists()
    made = store.resolve(folder(tmp_path / "model"), bits=4, dtype="float16")
    (made / "unet.safetensors").write_bytes(bytes(3_000_000))
    seal_again(made)
    lines = listed(capsys)
    assert lines.keys() == {"model", "total"}
    assert lines["model"].split()[1:4] == ["float16-4bit", "3.0", "MB"]
    assert lines["model"].endswith(f"  {tmp_path / 'model'}")
    assert lines["total"] == f"3.0 MB in {cache}."


def test_verifying_reads_every_byte(cache, tmp_path, capsys):
    """One bit of a large file, between the blocks of its sample: only `--verify` sees it."""
    made = store.resolve(folder(tmp_path / "model"), dtype="float16")
    (made / "unet.safetensors").write_bytes(bytes(3_000_000))
    seal_again(made)
    assert main(["cache", "--verify"]) == 0
    assert capsys.readouterr().out == "model float16: whole, 3.0 MB\n"
    with open(made / "unet.safetensors", "r+b") as file:
        file.seek(100_001)
        file.write(b"\1")
    assert store.resolve(tmp_path / "model", dtype="float16") == made
    assert main(["cache", "--verify", "model"]) == 1
    told, fix = capsys.readouterr().out.splitlines()
    assert told == "model float16: damaged: unet.safetensors differs from what was written."
    assert "mlxdiff cache --clean NAME" in fix
    (made / "unet.safetensors").unlink()
    assert main(["cache", "--verify", "all"]) == 1
    assert f"{made / 'unet.safetensors'} is missing" in capsys.readouterr().out
    assert main(["cache", "--verify", "nothing"]) == 1
    assert "holds no conversion of 'nothing'" in capsys.readouterr().err


def test_cleaning_removes_what_is_useless_and_nothing_else(cache, tmp_path, capsys):
    sources = {name: folder(tmp_path / name) for name in ("kept", "changed", "gone", "worded", "hurt")}
    words = folder(tmp_path / "other") / "tokenizer"
    made = {name: store.resolve(s, tokenizer=words if name == "worded" else None) for name, s in sources.items()}
    os.utime(sources["changed"] / "unet" / "config.json", ns=(0, 0))
    sources["gone"].rename(tmp_path / "moved")
    (words / "merges.txt").write_text("", encoding="utf-8")
    (made["hurt"] / "unet.safetensors").unlink()
    models, outside = cache / "models", tmp_path / "outside-float32-0123456789ab"
    shutil.copytree(made["kept"], outside)
    mlxdiff.store.cache.write_json(outside / "model.json", {"format": description.FORMAT - 1})
    (models / "linked-float32-0123456789ab").symlink_to(outside)
    for name, number in (("old", description.FORMAT - 1), ("newer", description.FORMAT + 1)):
        (models / f"{name}-float32-0123456789ab").mkdir()
        mlxdiff.store.cache.write_json(models / f"{name}-float32-0123456789ab" / "model.json", {"format": number})
    for name in ("mine", "mine.part", "mine-float32-0123456789ab"):  # of somebody else, even if its name is like ours
        (models / name).mkdir()
    mlxdiff.store.cache.write_json(models / "mine" / "model.json", {"format": description.FORMAT - 1})
    for name in ("dead", "living"):
        (models / f"{name}-float32-0123456789ab.x1y2z3_a.part").mkdir()
    (models / "dead-float32-0123456789ab.x1y2z3_a.part" / "snapshot").symlink_to(outside)
    with open(models / ".locks" / "living-float32-0123456789ab", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before, lines = {p.name for p in models.iterdir()}, listed(capsys)
        assert "being made" in lines["living-float32-0123456789ab.x1y2z3_a.part"]
        assert {p.name for p in models.iterdir()} == before
        assert main(["cache", "--clean"]) == 0
        said = capsys.readouterr().out
        assert main(["cache", "--clean", "living-float32-0123456789ab.x1y2z3_a.part"]) == 0
        assert "it is being made" in capsys.readouterr().out
    removed = {made[name].name for name in ("changed", "gone", "worded", "hurt")}
    removed |= {"old-float32-0123456789ab", "dead-float32-0123456789ab.x1y2z3_a.part"}
    assert before - {p.name for p in models.iterdir()} == removed
    assert [line.rpartition(": ")[2] for line in said.splitlines()[:-1]] == [
        "its source has changed or gone.",
        "unfinished.",
        "its source has changed or gone.",
        "damaged.",
        "of an older version.",
        "its source has changed or gone.",
    ]
    assert sorted(p.name for p in outside.iterdir()) == sorted(p.name for p in made["kept"].iterdir())
    assert store.resolve(sources["kept"]) == made["kept"]
    assert (models / "mine" / "model.json").exists()  # making another did not remove it either
    assert store.resolve(sources["changed"]).exists()
    assert (models / "mine" / "model.json").exists()


def test_cleaning_by_name_and_all(cache, tmp_path, capsys):
    one, four, other = (
        store.resolve(folder(tmp_path / name), bits=bits) for name, bits in (("a", None), ("a", 4), ("other", None))
    )
    assert main(["cache", "--clean", "A"]) == 1
    assert "no conversion of 'A'. Did you mean a? mlxdiff cache lists" in capsys.readouterr().err
    assert main(["cache", "--clean", one.name]) == 0
    assert [p.exists() for p in (one, four, other)] == [False, True, True]
    assert main(["cache", "--clean", "a"]) == 0
    assert [p.exists() for p in (one, four, other)] == [False, False, True]
    assert main(["cache", "--clean", "all"]) == 0
    assert not other.exists()
    out = capsys.readouterr().out.splitlines()
    assert out[-2].startswith("Removed other float32, ")
    assert out[-1] == f"0.0 MB freed in {cache}."


def test_a_conversion_from_the_hub_is_reached_while_its_commit_is_noted(cache):
    note = {"identity": ["hub", "org/model", "c0", None, True], "asked": [{}, None, True, None]}
    for revision, commit in (("main", "c1"), ("v1", "c0")):
        assert not store.reachable(note)
        noted = {"repo": "org/model", "revision": revision, "commit": commit}
        mlxdiff.store.cache.write_note(cache / "hub" / f"{revision}.json", noted)
    assert store.reachable(note)


# What a name means.


def test_a_folder_wins_over_a_hub_id(cache, tmp_path):
    with pytest.raises(Error, match="org/model is not on this machine"):
        store.resolve("org/model", offline=True)
    folder(tmp_path / "org" / "model")
    assert store.resolve("org/model").parent == cache / "models"


def test_a_named_model_wins_over_what_is_no_model(cache, tmp_path):
    (tmp_path / "sdxl").mkdir()  # pictures, say
    with pytest.raises(Error, match=r"stabilityai/stable-diffusion-xl-base-1\.0 is not on this machine"):
        store.resolve("sdxl", offline=True)
    folder(tmp_path / "sdxl")
    assert store.resolve("sdxl", offline=True).name.startswith("sdxl-")


@pytest.mark.parametrize(
    ("name", "says", "fix"),
    [
        ("paper", "paper is no model, but goes beside one", "models --adapters"),
        ("sdx", "no model, file or folder 'sdx'", "Did you mean sdxl?"),
        ("", "no model, file or folder ''", "`mlxdiff models` lists"),
        ("missing.safetensors", "no model, file or folder", "`mlxdiff models` lists"),
        ("folder/missing.safetensors", "no model, file or folder", "`mlxdiff models` lists"),
        ("./missing", "no model, file or folder", "`mlxdiff models` lists"),
        ("../missing", "no model, file or folder", "`mlxdiff models` lists"),
        ("/missing/a/b", "no model, file or folder", "`mlxdiff models` lists"),
        ("~nobody/missing", "no model, file or folder", "`mlxdiff models` lists"),
        ("a\0b", "no model, file or folder", "`mlxdiff models` lists"),
        (3, "no model, file or folder '3'", "`mlxdiff models` lists"),
        ("x" * 5000, "no model, file or folder", "`mlxdiff models` lists"),
        ("org/missing", "org/missing is not on this machine", "without `offline`"),
    ],
)
def test_names_that_mean_nothing(cache, name, says, fix):
    with pytest.raises(Error, match=says) as caught:
        store.resolve(name, offline=True)
    assert fix in caught.value.fix
    if name != "org/missing":  # the hub may have that: only asking would tell
        with pytest.raises(Error) as before:
            store.check_name(name)
        assert str(before.value) == str(caught.value)


def test_names_of_what_there_is_are_no_error(cache, tmp_path):
    for name in ("storybook", "sdxl", "org/repo", "org/repo/a.safetensors", folder(tmp_path / "here")):
        store.check_name(name)


def test_a_path_object_is_never_a_hub_id(cache):
    with pytest.raises(Error, match="no model, file or folder"):
        store.resolve(Path("org/model"), offline=True)


@pytest.mark.parametrize(
    ("recipe", "says"), [({"bits": 7}, "quantized to 7"), ({"dtype": "int8"}, "'int8' is not a dtype")]
)
def test_recipes_that_cannot_be(cache, recipe, says):
    with pytest.raises(Error, match=says):
        store.resolve("sd15", offline=True, **recipe)


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("MLXDIFF_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "darwin")
    assert mlxdiff.store.cache.root() == tmp_path / "Library" / "Caches" / "mlxdiff"
    monkeypatch.setattr(sys, "platform", "linux")
    assert mlxdiff.store.cache.root() == tmp_path / ".cache" / "mlxdiff"


def test_other_vocabularies_are_not_taken_for_clip(cache, tmp_path, monkeypatch):
    clip_vocab.write(cache / "models" / "tiny" / "tokenizer", clip_vocab.trained(10))
    (tmp_path / "single.safetensors").write_bytes(b"x")
    with pytest.raises(Error, match="has no tokenizer, none is on this machine"):
        store.resolve("single.safetensors", offline=True)


def test_a_full_disk_says_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXDIFF_CACHE", str(tmp_path))
    free = shutil.disk_usage(tmp_path).free / 1e9
    with (
        pytest.raises(Error, match=r"The disk is full: .* has [\d.]+ GB free\.") as e,
        mlxdiff.store.cache.writing(tmp_path / "a"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert float(re.search(r"has ([\d.]+) GB", str(e.value))[1]) == pytest.approx(free, rel=0.2)
