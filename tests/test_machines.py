"""Several machines, as processes of this one under MLX's ring. References: the pictures of one process, bit for bit;
the state of a training on one; messages that are wrong by construction."""

import json
import os
import re
import secrets
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlxdiff import machines
from mlxdiff.errors import Error
from mlxdiff.generate import main
from mlxdiff.machines import Link, Lost, Machines
from mlxdiff.request import Request
from mlxdiff.train import fit, lora, tune

ROOT = Path(__file__).parent.parent
BOUND = 180  # seconds in which processes must end; they take about ten on an idle machine


def ports(n: int) -> range:
    """Ports in a row that are free now, and that the system does not give to another test by itself meanwhile."""
    while True:
        found = range(first := 20_000 + secrets.randbelow(10_000), first + n)
        try:
            for port in found:
                socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return found


class Run:
    """The ranks of one command."""

    def __init__(self, n: int, folder: Path, *command: str):
        hosts = folder / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports(n)]))
        env = os.environ | {"MLX_HOSTFILE": str(hosts), "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": folder}
        self.ranks = [
            subprocess.Popen([sys.executable, "-m", *command], env=env | {"MLX_RANK": str(rank)}, **pipe)
            for rank in range(n)
        ]

    def end(self) -> list[tuple[int, str, str]]:
        """Each rank's exit code and what it said."""
        try:
            said = [rank.communicate(timeout=BOUND) for rank in self.ranks]
        finally:
            for rank in self.ranks:
                rank.kill()
        return [(rank.returncode, *texts) for rank, texts in zip(self.ranks, said, strict=True)]


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {file.name: np.asarray(Image.open(file)) for file in folder.glob("*.png")}


def test_two_machines_draw_what_one_draws_bit_for_bit(tmp_path):
    """The pictures of a batch equal those that its seeds draw alone. The second says nothing, and each draws a part."""
    typed = ["a red house", "--steps", "3", "-W", "64", "-H", "64"]
    batches = ["-s", "1", "5", "-b", "3", "-o", "two/", "--json"]
    first, second = Run(2, tmp_path, "mlxdiff.generate", *typed, *batches).end()
    assert first[0] == 0
    assert re.fullmatch(r"storybook learned from pictures of .*\n", first[2])  # which are larger
    assert second == (0, "", "")
    said = [json.loads(line) for line in first[1].splitlines()]
    assert sorted(s["request"]["seed"] for s in said) == [1, 2, 3, 5, 6, 7]
    assert 1 in {s.get("rank") for s in said}
    assert main([*typed, "-s", *"123567", "-o", str(tmp_path / "one/")]) == 0
    two, one = pixels(tmp_path / "two"), pixels(tmp_path / "one")
    assert two.keys() == one.keys()
    for name, want in one.items():
        assert np.array_equal(two[name], want), name


def test_of_four_machines_one_is_killed(tmp_path):
    """The others draw everything but the picture that it had begun, which is named; the exit code says so."""
    seeds = range(1, 21)
    typed = ["a red house", "-s", *map(str, seeds), "--steps", "12", "-W", "32", "-H", "32"]
    run = Run(4, tmp_path, "mlxdiff.generate", *typed, "-o", "out/")
    while "on rank 2" not in (line := run.ranks[0].stdout.readline()):
        assert line, "rank 2 drew nothing"
    run.ranks[2].kill()
    began = time.monotonic()
    first, second, _, fourth = run.end()
    assert time.monotonic() - began < BOUND
    assert (first[0], second, fourth) == (1, (0, "", ""), (0, "", ""))
    assert "rank 2 has gone" in first[2]
    (missing,) = re.findall(r"missing: seed (\d+) of 'a red house'", first[2])
    drawn = {int(file.stem.rpartition("-")[2]) for file in (tmp_path / "out").iterdir()}
    assert drawn == {*seeds} - {int(missing)}


def test_mlx_launch_starts_them_and_an_error_is_said_once(tmp_path):
    """MLX's own launcher, which ends all ranks when one fails."""
    launch = Path(sys.executable).with_name("mlx.launch")
    if not launch.exists():
        pytest.skip("mlx.launch is not beside this Python")
    command = [str(launch), "-n", "2", "--backend", "ring", "--starting-port", str(ports(2)[0]), "--", sys.executable]
    command += ["-m", "mlxdiff.generate", "a red house", "--steps", "2", "-W", "32", "-H", "32", "-b", "2"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    how = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True, "timeout": BOUND}
    drawn = subprocess.run([*command, "-s", "4", "-o", "out/"], stdin=subprocess.DEVNULL, **how)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"a-red-house-4.png", "a-red-house-5.png"}, drawn
    wrong = subprocess.run([*command, "--sampler", "nonsense"], stdin=subprocess.DEVNULL, **how)
    assert wrong.stderr.count("nonsense") == 1
    assert "Node with rank 0 exited with code 1" in wrong.stdout + wrong.stderr


# ---- training


def typed(rings: Path, out: str, *more: str) -> list[str]:
    words = ["mlxdiff.train", "lora", "-m", "storybook", "--dtype", "float32", "-i", str(rings), "-p", "a zork"]
    return [*words, "--size", "32", "--rank", "2", "--accumulate", "2", "-o", out, *more]


def test_a_training_on_two_machines_is_that_of_one(pipe, rings, tmp_path):
    """The losses of three steps, and the weights. Both sum the same gradients in another order, which float32 rounds;
    the weights of a LoRA that saw only the batches of one machine are 30 times as far."""
    first, second = Run(2, tmp_path, *typed(rings, "two", "--steps", "3")).end()
    assert first[0] == 0, first
    assert second == (0, "", "")
    assert "is ready" in first[1]
    losses, weights = {}, {}
    for name, accumulate in (("one", 2), ("half", 1)):
        settings = tune.LoraTuning(str(rings), "a zork", size=32, rank=2, accumulate=accumulate, steps=3)
        run = tune.LoraRun(pipe, settings, tmp_path / name)
        losses[name] = [report.loss for report in run.steps()]
    for name in ("one", "two", "half"):
        tensors = mx.load(str(tmp_path / name / lora.FILE))
        weights[name] = np.concatenate([np.array(v).reshape(-1) for k, v in tensors.items() if "lora_B" in k])
    rows = (tmp_path / "two" / tune.RUN / "log.csv").read_text().splitlines()[1:]
    assert [float(row.split(",")[1]) for row in rows] == pytest.approx(losses["one"], rel=1e-5)  # it has 6 digits

    def off(name: str) -> float:
        return np.linalg.norm(weights[name] - weights["one"]) / np.linalg.norm(weights["one"])

    print(off("two"), off("half"))
    assert off("two") < 0.01
    assert off("half") > 0.3


def test_a_training_whose_machine_is_killed_ends_and_keeps_its_state(rings, tmp_path):
    run = Run(2, tmp_path, *typed(rings, "two", "--steps", "1000", "--save-every", "1"))
    began = time.monotonic()
    while not (tmp_path / "two" / tune.RUN / "state.safetensors").exists():
        assert time.monotonic() - began < BOUND
        time.sleep(0.2)
    run.ranks[1].kill()
    (code, _, said), _ = run.end()
    assert code == 1
    assert "rank 1 has gone" in said
    assert "the run continues" in said
    _, header = mx.load(str(tmp_path / "two" / tune.RUN / "state.safetensors"), return_metadata=True)
    assert int(header["step"]) >= 1
    assert not list(tmp_path.rglob("*.new*"))


def test_a_step_that_cannot_be_divided_is_refused(pipe, rings, tmp_path):
    with pytest.raises(Error, match="A step has 3 batches, for 2 machines"):
        next(fit.fit(None, None, None, fit.Plan(1, 1.0, "adamw", 0, 1, 1, 0, 1, accumulate=3), tmp_path, _Two()))


class _Two:
    rank, size = 0, 2


# ---- rank 0, with another machine that a test plays


def request(seed: int) -> Request:
    return Request("a", seed=seed, width=8, height=8)


PICTURE = {"size": [2, 1], "seconds": 1.5, "peak_bytes": 3, "reused": 4}


@pytest.fixture
def pair():
    ours, theirs = map(Link, socket.socketpair())
    yield Machines(0, 2, {1: ours}, None), theirs
    ours.close()
    theirs.close()


def test_messages_that_arrive_together_are_read_one_by_one(pair):
    first, theirs = pair
    for n in (1, 2):
        theirs.send({"n": n}, bytes([n]) * 5)
    assert [first.links[1].receive() for _ in (1, 2)] == [({"n": n}, bytes([n]) * 5) for n in (1, 2)]


def shared(first: Machines, theirs: Link, first_word: dict, facts: dict, body: bytes) -> tuple[list, list, list[int]]:
    """What rank 0 gets, misses and draws itself, if the other begins with a word, and answers each picture alike."""
    kept, drawn = [], []

    def play():
        with suppress(Lost):
            theirs.send(first_word)
            while theirs.receive():
                theirs.send(facts, body)

    def draw(request, meanwhile):
        time.sleep(0.1)
        drawn.append(request.seed)
        meanwhile()

    threading.Thread(target=play, daemon=True).start()
    missing = first.share([request(s) for s in range(4)], draw, lambda r, d: kept.append((r.seed, d)))
    return kept, [r.seed for r in missing], drawn


def test_pictures_come_back_whole(pair):
    first, theirs = pair
    body = bytes(range(6))
    kept, missing, drawn = shared(first, theirs, {"ready": True}, PICTURE, body)
    assert not missing
    assert sorted([seed for seed, _ in kept] + drawn) == [0, 1, 2, 3]
    assert all(d.image.tobytes() == body and d[1:] == (1, 1.5, 3, 4) for _, d in kept)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (({"error": "It has no \x1b[31mmemory."}, b""), "rank 1 failed: It has no"),
        ((PICTURE, bytes(5)), "something other than a picture"),
        ((PICTURE | {"size": [10**9, 10**9]}, bytes(6)), "something other than a picture"),
        ((PICTURE | {"size": [-2, -1]}, bytes(6)), "something other than a picture"),
        ((PICTURE | {"size": "ab"}, bytes(6)), "something other than a picture"),
        ((PICTURE | {"peak_bytes": 10**400}, bytes(6)), "something other than a picture"),
        ((PICTURE | {"seconds": None}, bytes(6)), "something other than a picture"),
    ],
)
def test_a_machine_that_fails_is_named_and_gets_no_more(pair, answer, why):
    """Its picture is missing; the others are drawn."""
    first, theirs = pair
    kept, missing, drawn = shared(first, theirs, {"ready": True}, *answer)
    assert not kept
    assert len(missing) == 1
    assert sorted(missing + drawn) == [0, 1, 2, 3]
    assert why in first.problems[0]


def test_a_machine_that_cannot_begin_costs_no_picture(pair):
    first, theirs = pair
    kept, missing, drawn = shared(first, theirs, {"error": "There is no model here."}, PICTURE, bytes(6))
    assert (kept, missing, drawn) == ([], [], [0, 1, 2, 3])
    assert first.problems == ["rank 1 failed: There is no model here."]


def test_sigterm_ends_a_run_after_the_pictures_at_hand(pair):
    first, _ = pair
    with first:
        drawn = []

        def draw(request, meanwhile):
            drawn.append(request.seed)
            os.kill(os.getpid(), signal.SIGTERM)

        assert [r.seed for r in first.share([request(s) for s in range(4)], draw, None)] == [1, 2, 3]
    assert drawn == [0]


@pytest.mark.parametrize(
    "sent",
    [
        struct.pack(">IQ", 2**31, 0),  # a text of 2 GB
        struct.pack(">IQ", 2, 2**63) + b"{}",
        struct.pack(">IQ", 3, 0) + b"[1]",
        struct.pack(">IQ", 2, 0) + b"\xff\xfe",
        struct.pack(">IQ", 100_000, 0) + b"[" * 100_000,
        struct.pack(">IQ", 2, 100) + b"{}half",
        b"\x00",
    ],
)
def test_a_message_that_is_none_ends_the_connection(sent):
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(sent)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(Lost):
            Link(ours).receive()
    ours.close()


def test_nobody_joins_without_the_word_of_the_run():
    word, links = bytes(range(16)), {}
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
        thread = threading.Thread(target=lambda: links.update(machines._accept(door, word, 3)), daemon=True)
        thread.start()
        strangers = [machines._call("127.0.0.1", port, *who) for who in ((bytes(16), 1), (word, 0), (word, 3))]
        known = [machines._call("127.0.0.1", port, word, rank) for rank in (2, 1)]
        thread.join(BOUND)
        assert links.keys() == {1, 2}
        for stranger in strangers:
            with pytest.raises(Lost):
                stranger.receive()
        links[2].send({"hello": 2})
        assert known[0].receive() == ({"hello": 2}, b"")
        for link in (*strangers, *known, *links.values()):
            link.close()


def test_a_process_alone_initialises_nothing(monkeypatch, tmp_path):
    """Neither without mlx.launch nor with `mlx.launch -n 1`, which writes an empty file."""
    for name in ("MLX_RANK", "MLX_HOSTFILE", "MLX_WORLD_SIZE", "MLX_JACCL_COORDINATOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machines, "join", None)
    assert not machines.started()
    monkeypatch.setenv("MLX_RANK", "0")
    hosts = tmp_path / "hosts"
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    hosts.write_text("\n")
    assert not machines.started()
    hosts.write_text('[["10.0.0.1:5000"], ["10.0.0.2:5000"]]')
    assert machines.started()
    assert machines._first() == "10.0.0.1"
    for wrong in ("[1, 2]", "{", '{"a": 1, "b": 2}', "[" * 100_000):
        hosts.write_text(wrong)
        with pytest.raises(Error, match="is no list of machines"):
            machines.started()
    monkeypatch.delenv("MLX_HOSTFILE")
    monkeypatch.setenv("MLX_WORLD_SIZE", "2")
    with pytest.raises(Error, match="ring"):
        machines.started()
