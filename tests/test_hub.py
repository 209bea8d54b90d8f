"""The hub code against a real HTTP server on the loopback interface, in processes of its own, with a converter that
only copies. Reference: the promises in the docstrings of store and hub."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlxdiff import description
from mlxdiff.families import MODELS
from mlxdiff.foreign import MOST
from tests import clip_vocab
from tests.loopback_hub import COMMIT, Hub, Repo, diffusers_repo, noise

ROOT = Path(__file__).parent.parent


def chosen(variant: str) -> set[str]:
    """What of it should be fetched."""
    both = {f for f in diffusers_repo() if f.endswith((".json", ".txt")) and ".index." not in f}
    unet = [f for f in diffusers_repo() if "-of-0000" in f or ".index." in f]
    plain = {"text_encoder/model.safetensors", *unet}
    half = {"text_encoder/model.fp16.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"}
    return both | {"vae/diffusion_pytorch_model.safetensors"} | (half if variant == "fp16" else plain)


class Worker:
    """A process of tests/store_worker.py."""

    def __init__(self, env: dict[str, str]):
        command = [sys.executable, "-m", "tests.store_worker"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env, bufsize=1
        )
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, model: str | Path, **options) -> None:
        self.process.stdin.write(json.dumps({"model": str(model), **options}) + "\n")

    def answer(self) -> dict:
        return json.loads(self.process.stdout.readline())

    def __call__(self, model: str | Path, **options) -> dict:
        self.ask(model, **options)
        return self.answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def start(hub, tmp_path_factory):
    """start(**environment) -> a Worker on caches of its own, or on those of `home`."""
    workers = []

    def start(home: Path | None = None, **extra: str) -> Worker:
        home = tmp_path_factory.mktemp("home") if home is None else home
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MLXDIFF"))}
        env = clean | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "MLXDIFF_CACHE": str(home / "cache")}
        env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), "."])}
        workers.append(Worker(env | extra))
        workers[-1].home = home
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


@pytest.fixture(scope="module")
def worker(start):
    return start()


def source_files(answer: dict) -> set[str]:
    return set(json.loads((Path(answer["folder"]) / "files.json").read_text()))


def content(answer: dict) -> bytes:
    return (Path(answer["folder"]) / "unet.safetensors").read_bytes()


# From the hub.


def test_sharded_repository_is_fetched_and_converted(hub, worker):
    hub.repos["org/sharded"] = Repo(diffusers_repo())
    answer = worker("org/sharded", dtype="float32")
    assert source_files(answer) == chosen("plain")
    files = hub.repos["org/sharded"].files
    assert content(answer) == b"".join(files[f] for f in sorted(chosen("plain")) if f.endswith(".safetensors"))
    total = sum(len(files[f]) for f in chosen("plain"))
    told = [(done, all) for stage, done, all in answer["told"] if stage == "download"]
    assert told[0] == (0, total)
    assert told[-1] == (total, total)
    assert len(told) > 10  # in steps, not file by file
    assert told == sorted(told)
    assert [stage for stage, *_ in answer["told"]].index("convert") >= len(told)
    assert not any(hub.gets("org/sharded", f) for f in files if f not in chosen("plain"))


def test_half_precision_takes_the_fp16_variant(hub, worker):
    hub.repos["org/half"] = Repo(diffusers_repo())
    assert source_files(worker("org/half", dtype="float16")) == chosen("fp16")
    # The plain files come later into the same snapshot; each conversion sees only its own.
    assert source_files(worker("org/half", dtype="float32")) == chosen("plain")
    assert source_files(worker("org/half", dtype="bfloat16")) == chosen("fp16")


def test_a_cached_model_makes_no_request(hub, worker):
    hub.repos["org/cached"] = Repo(diffusers_repo())
    first = worker("org/cached", dtype="float16")
    before = len(hub.log)
    again = worker("org/cached", dtype="float16")
    assert again == {"folder": first["folder"], "told": []}
    assert worker("org/cached", dtype="float16", offline=True)["folder"] == first["folder"]
    hub.repos["org/cached"].commit = "f" * 40  # what was seen first stays
    assert worker("org/cached", dtype="float16")["folder"] == first["folder"]
    assert len(hub.log) == before


def test_another_recipe_downloads_nothing_again(hub, worker):
    hub.repos["org/recipes"] = Repo(diffusers_repo())
    folders = {worker("org/recipes", dtype="float16")["folder"]}
    before = [entry for entry in hub.log if entry[0] == "GET" and "/api/" not in entry[1]]
    for recipe in ({"bits": 4}, {"bits": 8}, {"prediction": "v"}):
        folders.add(worker("org/recipes", dtype="float16", **recipe)["folder"])
    assert len(folders) == 4
    assert [entry for entry in hub.log if entry[0] == "GET" and "/api/" not in entry[1]] == before


def test_originals_may_be_deleted(hub, start):
    hub.repos["org/deleted"] = Repo(diffusers_repo())
    worker = start()
    first = worker("org/deleted", dtype="float16")
    for path in sorted((worker.home / "hf").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    assert content(worker("org/deleted", dtype="float16", offline=True)) == content(first)


def test_without_t5_none_of_it_is_fetched(hub, worker):
    """A later run with it fetches what is missing and converts anew; one that has it serves both."""
    t5 = {"text_encoder_3/config.json": b"{}", "text_encoder_3/model.safetensors": noise(7000, 3)}
    t5["tokenizer_3/spiece.model"] = b"words"
    hub.repos["org/three"] = Repo(diffusers_repo() | t5)
    small = worker("org/three", dtype="float16", t5=False)
    assert source_files(small) == chosen("fp16")
    assert not any(hub.gets("org/three", f) for f in t5)
    before = len(hub.log)
    assert worker("org/three", dtype="float16", t5=False) == {"folder": small["folder"], "told": []}
    assert len(hub.log) == before
    whole = worker("org/three", dtype="float16")
    assert source_files(whole) == chosen("fp16") | t5.keys()
    assert whole["folder"] != small["folder"]
    assert worker("org/three", dtype="float16", t5=False)["folder"] == whole["folder"]
    hub.repos["org/two"] = Repo(diffusers_repo())
    assert "org/two has no T5 to leave out" in worker("org/two", dtype="float16", t5=False)["problem"]


def test_one_file_of_a_repository(hub, worker):
    hub.repos["org/single"] = Repo({"model.safetensors": noise(9000, 1), "other.safetensors": noise(10, 2)})
    answer = worker("org/single/model.safetensors", tokenizer=str(ROOT))
    assert content(answer) == noise(9000, 1)
    assert not hub.gets("org/single", "other.safetensors")


def test_other_revisions(hub, worker):
    hub.repos["org/revised"] = Repo(diffusers_repo())
    by_commit = worker("org/revised", dtype="float16", revision=COMMIT)
    assert worker("org/revised", dtype="float16")["folder"] == by_commit["folder"]  # the same thing under another name
    answer = worker("org/revised", dtype="float16", revision="v9")
    assert "has no revision 'v9'" in answer["problem"]


def test_a_named_model_is_its_repository(hub, worker):
    hub.repos[MODELS["sd15"].repo] = Repo(diffusers_repo())
    assert source_files(worker("sd15", dtype="float16")) == chosen("fp16")


# Interrupted.

BIG = "unet/diffusion_pytorch_model.fp16.safetensors"


def test_dropped_connection_goes_on_by_itself_or_in_the_next_run(hub, start):
    """huggingface_hub 1 and later try again at once; before, the error came through and the next run goes on."""
    hub.repos["org/dropped"] = repo = Repo(diffusers_repo(2_000_000))
    repo.cut[BIG] = 1_000_000
    worker = start()
    answer = worker("org/dropped", dtype="float16")
    if "problem" in answer:
        assert "goes on where it stopped" in answer["fix"]
        answer = worker("org/dropped", dtype="float16")
    assert repo.files[BIG] in content(answer)
    first, second = hub.gets("org/dropped", BIG)
    assert first is None
    assert 0 < int(second.removeprefix("bytes=").rstrip("-")) <= 1_000_000


def test_killed_download_goes_on_where_it_stopped(hub, start):
    hub.repos["org/killed"] = repo = Repo(diffusers_repo(2_000_000))
    repo.held[BIG] = 1_000_000
    hub.reached.clear()
    first = start()
    first.ask("org/killed", dtype="float16")
    assert hub.reached.wait(60)
    part = _wait_for_part(first.home)
    first.process.kill()
    first.process.wait()
    assert not list((first.home / "cache").rglob("model.json"))
    repo.held.clear()
    answer = start(first.home)("org/killed", dtype="float16")
    assert repo.files[BIG] in content(answer)
    start_of_rest = int(hub.gets("org/killed", BIG)[-1].removeprefix("bytes=").rstrip("-"))
    assert start_of_rest >= part > 0
    assert not list((first.home / "cache").rglob("*.part"))
    assert not list((first.home / "hf").rglob("*.incomplete"))


def _wait_for_part(home: Path) -> int:
    """How much of the held file has reached the disk: at least one piece, as the server has sent many."""
    while True:
        sizes = [f.stat().st_size for f in home.rglob("*.incomplete")]
        if sizes and max(sizes) > 0:
            return max(sizes)


def test_damaged_start_of_a_resumed_download_is_found(hub, start):
    """After a power cut a file can be longer than what was written of it."""
    hub.repos["org/damaged"] = repo = Repo(diffusers_repo(200_000))
    worker = start()
    blobs = worker.home / "hf" / "hub" / "models--org--damaged" / "blobs"
    blobs.mkdir(parents=True)
    etag = hashlib.sha256(repo.files[BIG]).hexdigest()
    for size in (100_000, 200_000, 300_000):  # shorter than the file, as long, longer
        (blobs / f"{etag}.incomplete").write_bytes(bytes(size))
        answer = worker("org/damaged", dtype="float16")
        if size < 300_000:
            assert "was damaged during the download" in answer["problem"]
            assert "again" in answer["fix"]
            assert not (blobs / etag).exists()
    assert repo.files[BIG] in content(answer)


def test_repository_that_changes_meanwhile_is_an_error(hub, start):
    hub.repos["org/moving"] = repo = Repo(diffusers_repo(200_000))
    repo.held[BIG] = 100_000
    hub.reached.clear()
    worker = start()
    worker.ask("org/moving", dtype="float16")
    assert hub.reached.wait(60)
    repo.commit, repo.older = "d" * 40, (COMMIT,)
    repo.held.clear()
    hub.release.set()
    answer = worker.answer()
    hub.release.clear()
    assert "org/moving changed while it was being downloaded" in answer["problem"]
    assert "again" in answer["fix"]
    assert source_files(worker("org/moving", dtype="float16")) == chosen("fp16")


# Refused.


def test_gated_repository(hub, start, worker):
    hub.repos["org/gated"] = Repo(diffusers_repo(), gated=True)
    for asks in (worker, start(HF_TOKEN="hf_not_a_real_one")):
        answer = asks("org/gated", dtype="float16")
        assert "org/gated is gated" in answer["problem"]
        assert f"{hub.url}/org/gated" in answer["fix"]
        assert "hf auth login" in answer["fix"]


def test_a_login_is_not_passed_on_to_the_other_host(hub, start):
    hub.repos["org/login"] = Repo(diffusers_repo())
    assert "folder" in start(HF_TOKEN="hf_not_a_real_one")("org/login", dtype="float16")


def test_missing_repository(worker):
    answer = worker("org/nowhere")
    assert "org/nowhere" in answer["problem"]
    assert "spelling" in answer["fix"]


def test_missing_file(hub, worker):
    hub.repos["org/few"] = Repo({"a.safetensors": b"1", "b.safetensors": b"2"})
    answer = worker("org/few/c.safetensors")
    assert "org/few has no file c.safetensors" in answer["problem"]
    assert "org/few/a.safetensors, org/few/b.safetensors" in answer["fix"]
    answer = worker("org/few")
    assert "not a model in diffusers layout" in answer["problem"]
    assert "org/few/a.safetensors" in answer["fix"]


def test_file_that_is_listed_and_not_there(hub, worker):
    class Lying(dict):
        def __contains__(self, name):
            return name != "vae/config.json" and super().__contains__(name)

    hub.repos["org/lying"] = Repo(Lying(diffusers_repo()))
    answer = worker("org/lying", dtype="float16")
    assert "lacks a file that it lists" in answer["problem"]
    assert "vae/config.json" in answer["problem"]


def test_only_pickles(hub, worker):
    files = {name.replace(".safetensors", ".bin"): data for name, data in diffusers_repo().items()}
    hub.repos["org/pickles"] = Repo(files)
    answer = worker("org/pickles", dtype="float16")
    assert "org/pickles has text_encoder only as a pickle" in answer["problem"]
    assert ".safetensors" in answer["fix"]
    assert not any("org/pickles" in path and path.endswith(".bin") for _, path, _ in hub.log)


def test_hub_that_is_down(hub, worker):
    hub.repos["org/down"] = Repo({}, status=500)
    answer = worker("org/down")
    assert f"{hub.url} answered 500 for org/down" in answer["problem"]


def test_refused_token(hub, start):
    hub.repos["org/refused"] = Repo({}, status=403)
    answer = start(HF_TOKEN="hf_not_a_real_one")("org/refused")
    assert f"{hub.url} refused access to org/refused (403)" in answer["problem"]
    assert "HF_TOKEN" in answer["fix"]


def test_no_network(start):
    with Hub() as gone:
        address = gone.url
    answer = start(HF_ENDPOINT=address)("org/model")
    assert f"The connection to {address} failed" in answer["problem"]
    assert "`offline" in answer["fix"]


def test_full_disk_is_told_before_the_download(hub, worker):
    hub.repos["org/huge"] = Repo(diffusers_repo(1000))

    class Huge(bytes):
        def __len__(self):
            return 10**16

    hub.repos["org/huge"].files[BIG] = Huge(b"x")
    answer = worker("org/huge", dtype="float16")
    assert "The disk is full" in answer["problem"]
    assert "10000000.00 GB" in answer["problem"]
    assert "HF_HOME" in answer["fix"]
    assert not hub.gets("org/huge", BIG)


# Offline.


@pytest.mark.parametrize("how", ["option", "environment"])
def test_offline_makes_no_request(hub, start, how):
    hub.repos["org/offline"] = Repo(diffusers_repo())
    worker = start(**({"HF_HUB_OFFLINE": "1"} if how == "environment" else {}))
    before = len(hub.log)
    answer = worker("org/offline", **({"offline": True} if how == "option" else {}))
    assert "org/offline is not on this machine" in answer["problem"]
    assert "`offline" in answer["fix"]
    assert len(hub.log) == before


def test_offline_uses_what_others_left_in_the_hub_cache(hub, start):
    hub.repos["org/held"] = Repo(diffusers_repo())
    online = start()
    first = online("org/held", dtype="float16")
    before = len(hub.log)
    other = start(online.home, HF_HUB_OFFLINE="1", MLXDIFF_CACHE=str(online.home / "second"))
    assert content(other("org/held", dtype="float16")) == content(first)
    assert len(hub.log) == before


def test_offline_with_half_a_download(hub, start, saved):
    files = {f.relative_to(saved / "plain").as_posix(): f.read_bytes() for f in (saved / "plain").rglob("*.*")}
    hub.repos["org/part"] = Repo(files, held={"unet/diffusion_pytorch_model.safetensors": 1000})
    hub.reached.clear()
    first = start()
    first.ask("org/part", dtype="float32")
    assert hub.reached.wait(60)
    first.process.kill()
    first.process.wait()
    answer = start(first.home, STORE_WORKER="real", HF_HUB_OFFLINE="1")("org/part", dtype="float32")
    assert "org-part" in answer["problem"]
    assert "unet" in answer["problem"]
    assert "once without `offline`" in answer["fix"]


# Two processes, and ends that nobody planned.


def test_two_processes_at_once(hub, start):
    hub.repos["org/twice"] = repo = Repo(diffusers_repo(2_000_000))
    repo.held[BIG] = 1_000_000
    hub.reached.clear()
    first = start()
    second = start(first.home)
    first.ask("org/twice", dtype="float16")
    assert hub.reached.wait(60)
    second.ask("org/twice", dtype="float16")
    assert second.answer() == "waiting"
    repo.held.clear()
    hub.release.set()
    one, two = first.answer(), second.answer()
    hub.release.clear()
    assert one["folder"] == two["folder"]
    assert repo.files[BIG] in content(one)
    converted = [any(stage == "convert" for stage, *_ in answer["told"]) for answer in (one, two)]
    assert converted == [True, False]
    models = first.home / "cache" / "models"
    assert sorted(p.name for p in models.iterdir()) == [".locks", Path(one["folder"]).name]


# A file without a tokenizer.


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A vocabulary with CLIP's size and last two words."""
    return clip_vocab.write(tmp_path_factory.mktemp("clip") / "tokenizer", clip_vocab.made_up(49408 - 514))


def borrowed(answer: dict) -> str:
    return (Path(answer["folder"]) / "tokenizer" / "from").read_text(encoding="utf-8")


def test_tokenizer_of_a_single_file(hub, start, clip_folder, tmp_path):
    """In order: what is named, the hub's cache, a converted model, the network; else an error naming a repository."""
    file = tmp_path / "single.safetensors"
    file.write_bytes(b"x")
    worker = start()
    answer = worker(file, offline=True)
    assert "single.safetensors has no tokenizer" in answer["problem"]
    assert f"tokenizer folder of {MODELS['sd15'].repo}" in answer["fix"]
    assert borrowed(worker(file, offline=True, tokenizer=str(clip_folder))) == str(clip_folder)

    files = {f"tokenizer/{f.name}": f.read_bytes() for f in clip_folder.iterdir()}
    hub.repos[MODELS["sd15"].repo] = Repo(diffusers_repo() | files)
    before = len(hub.log)
    fetched = Path(borrowed(worker(file)))
    assert (fetched / "merges.txt").read_bytes() == files["tokenizer/merges.txt"]
    assert not any(path.endswith(".safetensors") for _, path, _ in hub.log[before:])  # only the tokenizer

    before = len(hub.log)
    assert borrowed(worker(file, bits=4)) == str(fetched)  # now from the hub's cache
    assert len(hub.log) == before

    held = worker.home / "cache" / "models" / "held" / "tokenizer"
    clip_vocab.write(held, clip_vocab.made_up(49408 - 514))
    for link in fetched.iterdir():
        link.unlink()
    assert borrowed(worker(file, bits=8, offline=True)) == str(held)


# With the real converter: what diffusers itself saves, whole and in shards.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> folder of one tiny pipeline."""
    import torch

    from tests.parity import tiny

    root = tmp_path_factory.mktemp("saved")
    pipe = tiny.sd1(root / "words")
    pipe.save_pretrained(root / "plain")
    pipe.save_pretrained(root / "shards", max_shard_size="200KB")
    pipe.to(torch.float16).save_pretrained(root / "shards", variant="fp16", max_shard_size="100KB")
    return root


def test_fetched_converts_to_the_same_as_the_folder(hub, start, saved):
    worker = start(STORE_WORKER="real")
    plain = worker(saved / "plain", dtype="float32")
    folder = saved / "shards"
    files = {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    hub.repos["org/real"] = Repo(files)
    full, half = worker("org/real", dtype="float32"), worker("org/real", dtype="float16")
    assert any("fp16-00001-of-" in path for _, path, _ in hub.log)
    model = description.read(Path(plain["folder"]))
    for name in model.components:
        one, two, three = (Path(a["folder"]) / f"{name}.safetensors" for a in (plain, full, half))
        assert one.read_bytes() == two.read_bytes()
        assert three.stat().st_size < two.stat().st_size
    assert description.read(Path(full["folder"])).components == model.components
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        for given in (saved / "plain" / "tokenizer").glob(name):
            assert (Path(full["folder"]) / "tokenizer" / name).read_bytes() == given.read_bytes()
    assert ("convert", 0) in {(stage, done) for stage, done, _ in full["told"]}


def command(home: Path, module: str, *args: str) -> subprocess.CompletedProcess:
    env = os.environ | {"HF_HOME": str(home / "hf"), "MLXDIFF_CACHE": str(home / "cache"), "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-m", module, *args]
    return subprocess.run(run, env=env, cwd=home, capture_output=True, text=True, check=False)


def test_convert_and_inspect_take_names_and_reuse_the_download(hub, start, saved):
    """`convert` of what is in the hub's cache makes what the store makes of it; `inspect` shows both, fetching none."""
    files = {f.relative_to(saved / "plain").as_posix(): f.read_bytes() for f in (saved / "plain").rglob("*.*")}
    hub.repos["org/shown"] = Repo(files)
    worker = start(STORE_WORKER="real")
    absent = command(worker.home, "mlxdiff.convert.inspect", "org/shown")
    assert absent.returncode == 1
    assert "org/shown is not on this machine" in absent.stderr
    made = Path(worker("org/shown", dtype="float32", bits=4)["folder"])
    ran = command(
        worker.home, "mlxdiff.convert", "org/shown", "-o", "out", "-q", "4", "--dtype", "float32", "--offline"
    )
    assert ran.returncode == 0, ran.stderr
    kept = files_of(made)
    assert kept.pop("source.json")  # for `mlxdiff cache`, which finds that the hub's commit still leads there
    assert files_of(worker.home / "out") == kept
    listed = command(worker.home, "mlxdiff.store").stdout.splitlines()
    assert listed[1].split()[:2] == ["org-shown", "float32-4bit"]
    assert listed[1].endswith("  org/shown")
    ran = command(worker.home, "mlxdiff.convert.inspect", "org/shown", "--json")
    assert ran.returncode == 0, ran.stderr
    first, second = (json.loads(line) for line in ran.stdout.splitlines())
    assert (first["layout"], first["path"]) == ("diffusers", "org/shown")
    assert (second["layout"], second["path"]) == ("converted", str(made))
    for name, held in first["components"].items():
        assert held["parameters"] == second["components"][name]["parameters"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_errors_name_the_repository_not_where_it_was_worked_on(hub, start, saved):
    files = {f.relative_to(saved / "plain").as_posix(): f.read_bytes() for f in (saved / "plain").rglob("*.*")}
    files["unet/diffusion_pytorch_model.safetensors"] = b"<html>"
    hub.repos["org/broken"] = Repo(files)
    worker = start(STORE_WORKER="real")
    answer = worker("org/broken", dtype="float32")
    assert "org-broken/unet/diffusion_pytorch_model.safetensors" in answer["problem"]
    assert str(worker.home) not in answer["problem"]
    assert [p.name for p in (worker.home / "cache" / "models").iterdir()] == [".locks"]


def test_a_taesd_is_fetched_once(hub, start, tmp_path):
    """One file of the repository; found in the hub's cache, it is not asked for again, nor is the network."""
    from diffusers import AutoencoderTiny

    AutoencoderTiny(decoder_block_out_channels=(8,) * 4).save_pretrained(tmp_path)
    files = {f.name: f.read_bytes() for f in tmp_path.iterdir()} | {"taesd_encoder.safetensors": b"not asked for"}
    hub.repos["madebyollin/taesd"] = Repo(files)
    worker = start(STORE_WORKER="real")
    ask = {"taesd": True, "dtype": "float32", "offline": False}
    first = worker("madebyollin/taesd", **ask)
    assert first["width"] == 8
    size = len(files["diffusion_pytorch_model.safetensors"])
    assert first["told"][-1] == ["download", size, size]
    assert not hub.gets("madebyollin/taesd", "taesd_encoder.safetensors")
    before = len(hub.log)
    assert worker("madebyollin/taesd", **ask) == {"width": 8, "told": []}
    assert len(hub.log) == before
    assert "has no file" in worker("madebyollin/taesd/other.safetensors", **ask)["problem"]
    assert "not on this machine" in worker("madebyollin/taef1", **ask | {"offline": True})["problem"]


# A hub that is damaged or is none.


@pytest.mark.parametrize("more", [0, 100_000])
def test_bytes_of_another_sha256_or_too_many_are_refused_and_deleted(hub, worker, more):
    files, repo = diffusers_repo(), f"org/exchanged-{more}"
    name = "unet/diffusion_pytorch_model.fp16.safetensors"
    other = noise(len(files[name]) + more, 99)
    hub.repos[repo] = Repo(files, instead={name: other})
    answer = worker(repo, dtype="float16")
    assert "was damaged during the download" in answer["problem"]
    assert ("it has more than the 300000 bytes" in answer["problem"]) == bool(more)
    blobs = (worker.home / "hf").rglob("*")
    assert not any(f.is_file() and f.read_bytes()[:1000] == other[:1000] for f in blobs)
    assert content(worker(repo, dtype="float16"))  # the next run fetches it again


def test_a_hub_that_is_busy_is_not_waited_for(hub, worker):
    """It asks for an hour, which huggingface_hub would sleep."""
    hub.repos["org/busy"] = Repo(diffusers_repo(), busy="unet/diffusion_pytorch_model.fp16.safetensors")
    began = time.monotonic()
    assert "answered 429 for org/busy" in worker("org/busy", dtype="float16")["problem"]
    assert time.monotonic() - began < 60


_FILES = b'[{"rfilename": "model_index.json", "size": 2}]'
STRANGE = {
    "a web page": Repo(diffusers_repo(), info=b"<!DOCTYPE html><title>Log in</title>"),
    "a list": Repo(diffusers_repo(), info=b"[1]"),
    "no files": Repo(diffusers_repo(), info=b'{"id": "a/b", "sha": "c0ffee"}'),
    "no sizes": Repo(diffusers_repo(), info=b'{"id": "a/b", "sha": "c0ffee", "siblings": [{"rfilename": "a.json"}]}'),
    "a commit that climbs": Repo(diffusers_repo(), info=b'{"id": "a/b", "sha": "../../x", "siblings": %s}' % _FILES),
    "a file that climbs": Repo(
        diffusers_repo(), info=b'{"id": "a", "sha": "c0ffee", "siblings": [{"rfilename": "vae/../../x", "size": 2}]}'
    ),
    "no ETag": Repo(diffusers_repo(), etag=""),
    "a list without end": Repo(diffusers_repo(), info=b" " * (MOST + 1)),
    "deep lists": Repo(diffusers_repo(), info=b"[" * 200_000),
    "no letters": Repo(diffusers_repo(), info=b'{"sha": "c0ffee", "siblings": [{"rfilename": "a\\ud800", "size": 2}]}'),
    "a backslash": Repo(diffusers_repo(), info=b'{"sha": "c0", "siblings": [{"rfilename": "a\\\\..", "size": 2}]}'),
    "a commit that climbs later": Repo(
        {"model_index.json": b"{}"}, "../../x", ("c0ffee",), info=b'{"sha": "c0ffee", "siblings": %s}' % _FILES
    ),
    "an ETag that climbs": Repo(diffusers_repo(), etag="../../../x"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_strange_answers_are_one_clear_error(hub, worker, case):
    repo = f"org/{case.replace(' ', '-')}"
    hub.repos[repo] = STRANGE[case]
    assert "which no hub does" in worker(repo, dtype="float16")["problem"]


@pytest.mark.parametrize("ranges", ["ignored", "refused"])
def test_a_server_without_ranges_sends_the_whole_file(hub, start, ranges):
    """Else every later run would ask for the rest of the file again."""
    hub.repos[f"org/{ranges}"] = repo = Repo(diffusers_repo(200_000), ranges=ranges)
    worker = start()
    blobs = worker.home / "hf" / "hub" / f"models--org--{ranges}" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(repo.files[BIG]).hexdigest()}.incomplete").write_bytes(repo.files[BIG][:100_000])
    answer = worker(f"org/{ranges}", dtype="float16")
    if "problem" in answer:  # huggingface_hub before 1 appends the whole file, which the hash shows
        assert "was damaged during the download" in answer["problem"]
        answer = worker(f"org/{ranges}", dtype="float16")
    assert repo.files[BIG] in content(answer)
    assert hub.gets(f"org/{ranges}", BIG)[0] == "bytes=100000-"


def test_a_connection_that_is_reset_goes_on_in_the_next_run(hub, start):
    hub.repos["org/reset"] = repo = Repo(diffusers_repo(2_000_000))
    repo.reset[BIG] = 1_000_000
    worker = start()
    answer = worker("org/reset", dtype="float16")
    if "problem" in answer:
        assert "The connection to" in answer["problem"]
        assert "goes on where it stopped" in answer["fix"]
        answer = worker("org/reset", dtype="float16")
    assert repo.files[BIG] in content(answer)


def test_a_hub_that_says_nothing_is_given_up(hub, start):
    """Reference: HF_HUB_ETAG_TIMEOUT, the time that users give a hub to answer."""
    hub.repos["org/silent"] = Repo(diffusers_repo(), silent=True)
    answer = start(HF_HUB_ETAG_TIMEOUT="1")("org/silent")
    assert "The connection to" in answer["problem"]
