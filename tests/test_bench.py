"""The benchmark, on a tiny model. References: the network's own layers for what a step calls, hand-made graphs for
kernels, published tensor lists for the full-size rows, diffusers for the network that is called beside ours."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlxdiff import advice, load, weights
from mlxdiff.bench import __main__ as bench
from mlxdiff.bench import against_torch, random_model, start
from mlxdiff.bench import step as steps
from mlxdiff.bench.step import Call, Shape, Trace, kernels
from mlxdiff.families import FAMILIES, MODELS, published
from mlxdiff.models import build, layers
from mlxdiff.models.layers import Downsample
from mlxdiff.recipe import DTYPES, Recipe, component_dtype
from tests.usage import refused

CLIP = replace(published.CLIP_L, vocab=514, width=32, layers=2, heads=2, hidden=40)
UNET = replace(
    published.UNET,
    channels=(16, 24),
    layers=(1, 1),
    depth=((1,), ()),
    up_depth=((), (1, 1)),
    heads=(2, 3),
    context=32,
    groups=8,
)
VAE = replace(published.VAE, channels=(8, 16, 16), layers=1, groups=4)
TINY = {"text_encoder": CLIP, "unet": UNET, "vae": VAE}
SD15 = replace(MODELS["sd15"], networks=TINY)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(MODELS, "sd15", SD15)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model folder of random weights."""
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "sd15", SD15)
        pipe = random_model.random_pipeline("sd15")
    made = pipe.networks.folder
    for name, config in TINY.items():
        net = build.build(config)
        with weights.Writer(made / f"{name}.safetensors", FAMILIES["sd1"], config, Recipe("float32", None)) as out:
            for key, value in tree_flatten(net.parameters()):
                out.put(key, value)
    pipe.description.write(made)
    made.rename(folder)
    return folder


def quick(*args: str) -> list[str]:
    return ["-W", "32", "-H", "32", "--steps", "2", "--repeat", "1", *args]


def net() -> nn.Module:
    return build.build(UNET)


@pytest.fixture(scope="module")
def facts(model) -> dict:
    """Measured once; the wall clock beside it, and what other tests still held."""
    mx.clear_cache()
    begin, before = time.perf_counter(), mx.get_active_memory()
    found = bench.measure(bench.parser().parse_args(quick("-m", str(model))))
    return found | {"wall": time.perf_counter() - begin, "before": before}


def test_the_stages_are_all_there_and_add_up(facts):
    stages = facts["stages"]
    assert list(stages) == ["encode", "load", "prepare", "denoise", "decode"]
    assert all(s["seconds"]["median"] > 0 and s["peak_bytes"] > 0 for s in stages.values())
    # One measured run, so its stages are the whole, to rounding; loading was in the run before it.
    whole = facts["total"]["seconds"]["median"]
    assert sum(s["seconds"]["median"] for n, s in stages.items() if n != "load") == pytest.approx(whole, rel=1e-9)
    assert whole < facts["wall"]
    # The two steps lie inside their stage: of two, twice the median is the sum.
    assert 0 < 2 * facts["step"]["seconds"]["median"] < stages["denoise"]["seconds"]["median"]
    held = sum(v.nbytes for _, v in tree_flatten(net().parameters()))
    own = stages["denoise"]["peak_bytes"] - facts["before"]
    assert held < own < 100 * held  # weights at least; activations of 8x8 maps
    assert facts["total"]["resident_bytes"] > 10 * 2**20  # an interpreter alone holds more


def test_spread_is_reported(facts):
    for seconds in (facts["step"]["seconds"], facts["cold_start"], facts["import"]):
        assert seconds["least"] <= seconds["median"] <= seconds["most"]
    assert facts["step"]["seconds"]["n"] == 2  # steps of the measured run
    assert steps.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "least": 1.0, "most": 3.0, "n": 3}


def test_a_step_calls_what_its_layers_are(facts):
    """Counted on the network itself: what its preparation has done is called no more."""
    layers = dict(net().named_modules())
    constant = ("time_embedding", "time_emb_proj", "attn2.to_k", "attn2.to_v")
    linear = [n for n, m in layers.items() if isinstance(m, nn.Linear) and not any(c in n for c in constant)]
    convolutions = [k for k, v in tree_flatten(net().parameters()) if v.ndim == 4]
    attentions = [n for n in layers if n.endswith(("attn1", "attn2"))]
    parts = facts["step"]["parts"]
    assert parts["matmul"]["calls"] == len(linear)
    assert parts["convolution"]["calls"] == len(convolutions)
    assert parts["attention"]["calls"] == len(attentions)
    assert sum(p["share"] for p in parts.values()) == pytest.approx(1)
    primitives = facts["step"]["primitives"]
    assert sum(primitives.values()) == facts["step"]["kernels"]
    # On a CPU, the others are products.
    assert primitives["Convolution"] == sum(isinstance(m, Downsample) for m in layers.values())


def test_starting_cold_is_a_process_of_its_own(model, facts):
    assert 0.02 < facts["cold_start"]["median"] < facts["wall"]  # no interpreter starts faster, with or without MLX
    args = bench.parser().parse_args(quick("-m", str(model / "absent")))
    request = load(model).resolve("x", width=32, height=32)
    with pytest.raises(bench.Error, match="absent"):
        start.first_byte(sys.executable, args, request, start._environment())


def test_the_table_has_every_figure(facts):
    text = bench.table(facts | {"install": {"bytes": 3 * 10**6, "packages": {"mlx": 2 * 10**6, "numpy": 10**6}}})
    for word in (*facts["stages"], *facts["step"]["parts"], "whole", "s/it", "kernels", "import", "cold start"):
        assert word in text
    assert "mlx 2.0, numpy 1.0" in text
    assert f"{facts['step']['kernels']:10} " in text
    assert max(map(len, text.splitlines())) <= 120
    assert "not installed" in bench.table(facts | {"install": None})


def test_json_of_random_weights(capsys):
    """No file, so nothing is loaded and nothing can be started cold."""
    assert bench.main(quick("--random", "sd15", "--json", "--batch", "1", "--low-memory")) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["stages"]) == ["encode", "prepare", "denoise", "decode"]
    assert (found["batch"], found["low_memory"], found["cold_start"]) == (1, True, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_weights_are_of_the_dtype_asked(dtype):
    pipe = random_model.random_pipeline("sd15", dtype)
    for name in TINY:
        kind = DTYPES[component_dtype(FAMILIES["sd1"], name, dtype)]
        assert {v.dtype for _, v in tree_flatten(pipe.networks.get(name).parameters())} == {kind}


def test_random_weights_are_quantized_as_a_conversion_s_are(tmp_path):
    """Against a file the writer made: the same parameters, of the same shapes and types; and it is said."""
    pipe = random_model.random_pipeline("sd15", "float16", bits=4)
    for name, config in TINY.items():
        file = tmp_path / f"{name}.safetensors"
        writer = weights.Writer(file, FAMILIES["sd1"], config, Recipe("float16", 4))
        made = dict(tree_flatten(pipe.networks.get(name).parameters()))
        assert {k: (v.dtype, v.shape) for k, v in made.items()} == {k: e[:2] for k, e in writer.entries.items()}
        assert bool(writer.layers) == (name != "vae")


def test_bits_are_in_the_report(capsys):
    assert bench.main(quick("--random", "sd15", "--json", "--batch", "1", "-q", "4")) == 0
    assert json.loads(capsys.readouterr().out)["bits"] == 4


def test_bits_reach_the_model_and_its_cold_start(model, capsys):
    """A folder that is converted already says what it is asked and is not."""
    typed = quick("-m", str(model), "-q", "mxfp4")
    assert bench.main(typed) == 1
    assert "bits None, not mxfp4" in capsys.readouterr().err
    args, request = bench.parser().parse_args(typed), load(model).resolve("x", width=32, height=32)
    with pytest.raises(bench.Error, match="bits None, not mxfp4"):
        start.first_byte(sys.executable, args, request, start._environment())


def test_guided_is_twice_the_batch(model):
    def calls(batch: str) -> set:
        args = bench.parser().parse_args(quick("-m", str(model), "--batch", batch))
        pipe, trace = load(model), Trace()
        bench.watch(pipe, bench.asked(pipe, args), time.perf_counter, trace)
        return {call.args[0].shape[0] for call in trace.calls.values() if call.kind == "convolution"}

    assert calls("1") == {1}
    assert calls("2") == {2}


def test_a_model_of_one_pass_has_no_batch_of_two(model, monkeypatch):
    lcm = replace(SD15, networks=TINY | {"unet": replace(UNET, time_cond=8)}, variant="lcm")
    monkeypatch.setitem(MODELS, "sd15", lcm)
    pipe = random_model.random_pipeline("sd15")
    args = bench.parser().parse_args(quick("--batch", "2"))
    with pytest.raises(bench.Error, match="--batch 1"):
        bench.asked(pipe, args)
    args.batch = 1
    assert (
        bench.asked(pipe, args).guidance == pipe.description.defaults.guidance
    )  # an input of the network, not a second pass


# ---- kernels


affine = mx.compile(layers.affine.__wrapped__)  # whatever this machine would do
X, W = mx.random.normal((2, 8, 8, 6), key=mx.random.key(1)), mx.random.normal((6, 6), key=mx.random.key(2))
GRAPHS = {
    "nothing": (lambda: X, 0),
    "a matmul by a transposed matrix": (lambda: X @ W.T, 1),
    "views alone": (lambda: X[:, 2:].swapaxes(1, 2)[None], 0),
    "reshaped": (lambda: X.reshape(2, 64, 6), 0),
    "transposed, then reshaped: a copy": (lambda: X.swapaxes(1, 2).reshape(2, 64, 6), 1),
    "sliced, squeezed, then reshaped: a copy": (lambda: X[:1, ..., :3].squeeze(0).reshape(-1), 1),
    "two sums": (lambda: X + X * 2, 2),
    "used twice, made once": (lambda: (X @ W) * (X @ W), 3),
    "one array in two places": (lambda: (lambda y: y * y)(X @ W), 2),
    "a chain that mx.compile fuses": (lambda: affine(X, X, X), 1),
    "the same chain again": (lambda: affine(affine(X, X, X), X, X), 2),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_kernels_of_a_graph_made_by_hand(name):
    mx.eval(X, W)
    graph, count = GRAPHS[name]
    assert sum(kernels(graph()).values()) == count


def test_kernels_fall_when_a_constant_leaves_the_loop():
    unet, x, text = net(), mx.zeros((1, 4, 4, 4)), mx.zeros((1, 77, 32))
    inside, outside = unet.prepare(None, text), unet.prepare([7.0], text)
    mx.eval(unet.parameters(), x, inside, outside)
    gone = sum(kernels(unet(x, 7.0, **inside)).values()) - sum(kernels(unet(x, 7.0, **outside)).values())
    assert gone > len([n for n, _ in unet.named_modules() if n.endswith("time_emb_proj")])


# ---- calls caught, and timed alone


def test_a_trace_leaves_mlx_as_it_was():
    before = [getattr(owner, name) for owner, name, _ in steps.CAUGHT]
    mx.eval(X, W)
    trace = Trace()
    trace.on(True)
    assert mx.conv2d is not before[4]
    a = X @ W
    mx.eval(a)
    trace.on(False)
    assert [getattr(owner, name) for owner, name, _ in steps.CAUGHT] == before
    assert mx.array_equal(a, X @ W)
    assert [(c.kind, c.args) for c in trace.calls.values()] == [
        ("matmul", (Shape((2, 8, 8, 6), mx.float32), Shape((6, 6), mx.float32)))
    ]
    assert trace.kernels == {"Matmul": 1}


def test_ctrl_c_within_the_traced_step(model, monkeypatch, capsys):
    before = mx.conv2d

    def stopped(self, x, t, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlxdiff.models.unet.UNet.__call__", stopped)
    monkeypatch.setattr(start, "cold_start", lambda *_: None)
    assert bench.main(quick("-m", str(model))) == 130
    assert mx.conv2d is before
    assert capsys.readouterr().err == "mlxdiff bench: stopped.\n"


@pytest.mark.parametrize("kind", ["matmul", "addmm", "quantized", "convolution", "attention"])
def test_more_work_alone_takes_longer(kind):
    """Each function that is caught can be called again on shapes alone; far more work shows on any machine, by the
    least of five times, which what else runs can only raise."""

    def call(n: int) -> Call:
        a, b, q = (Shape(s, mx.float32) for s in ((1, n, 128), (128, 128), (1, 2, n, 32)))
        packed, scale = Shape((128, 16), mx.uint32), Shape((128, 2), mx.float32)
        options = {"scales": scale, "biases": scale, "transpose": True, "group_size": 64, "bits": 4}
        return {
            "matmul": Call("matmul", mx.array.__matmul__, (a, b), {}),
            "addmm": Call("matmul", mx.addmm, (Shape((128,), mx.float32), a, b), {}),
            "quantized": Call("matmul", mx.quantized_matmul, (a, packed), options),
            "convolution": Call(
                "convolution",
                mx.conv2d,
                (Shape((1, n, 4, 32), mx.float32), Shape((32, 3, 3, 32), mx.float32), 1, 1),
                {},
            ),
            "attention": Call(
                "attention", mx.fast.scaled_dot_product_attention, (q, q, q), {"scale": 1.0, "mask": None}
            ),
        }[kind]

    large = 512 * 16 if kind != "attention" else 32 * 16
    small_times, large_times = zip(
        *((steps.seconds_alone(call(16), 1, 2), steps.seconds_alone(call(large), 1, 2)) for _ in range(5)),
        strict=True,
    )
    assert min(small_times) < min(large_times)


# ---- beside torch


def test_torch_calls_the_same_network(model, facts):
    pipe = load(model)
    request = bench.asked(pipe, bench.parser().parse_args(quick("-m", str(model))))
    found = against_torch.compare(pipe, request, 2, 2)
    assert found["error"] < 1e-4  # float32, the bound of the parity tests
    assert found["ratio"]["n"] == found["seconds"]["n"] == found["torch_seconds"]["n"] == 2
    assert found["torch_seconds"]["least"] > 0
    text = bench.table(facts | {"against": found})
    assert "of torch's time" in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", ["sd15", "sd21", "lcm", "sdxl", "sdxl-refiner"])
def test_diffusers_reads_our_configs(name, monkeypatch):
    """Every parameter of ours is one of diffusers', of as many numbers; nothing is allocated."""
    import torch
    from diffusers import UNet2DConditionModel

    monkeypatch.undo()
    ours = MODELS[name].networks["unet"]
    with torch.device("meta"):
        theirs = UNet2DConditionModel(**against_torch.config(ours))
    sizes = {k: v.size for k, v in tree_flatten(build.build(ours).parameters())}
    assert {k: v.numel() for k, v in theirs.state_dict().items()} == sizes


def without_torch(monkeypatch, folder: Path, error: str) -> None:
    (folder / "torch.py").write_text(f"raise {error}\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_torch_absent_is_said_and_no_error(model, facts, tmp_path, monkeypatch):
    without_torch(monkeypatch, tmp_path, "ModuleNotFoundError('no', name='torch')")
    pipe = load(model)
    found = against_torch.compare(pipe, pipe.resolve("x", width=32, height=32), 2, 1)
    assert found == {"absent": "torch"}
    assert "pip install torch diffusers" in bench.table(facts | {"against": found})


def test_torch_that_fails_is_one_line(model, tmp_path, monkeypatch, capsys):
    without_torch(monkeypatch, tmp_path, "RuntimeError('no such device')")
    monkeypatch.setattr(start, "cold_start", lambda *_: None)
    assert bench.main(quick("-m", str(model), "--against", "torch")) == 1
    err = capsys.readouterr().err
    assert "no such device" in err
    assert len(err.splitlines()) == 1


# ---- installed


def test_install_size_is_the_bytes_of_all_that_is_required(tmp_path, monkeypatch):
    def package(name: str, size: int, *requires: str) -> None:
        info = tmp_path / f"{name}-1.dist-info"
        info.mkdir()
        needs = "".join(f"Requires-Dist: {r}\n" for r in requires)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n{needs}")
        (info / "RECORD").write_text(f"{name}.bin,,\n{name}.gone,,\n")
        (tmp_path / f"{name}.bin").write_bytes(b"x" * size)

    package("mlxdiff", 1, "base[cpu] >=0.3; sys_platform == 'linux'", "absent-here; sys_platform == 'plan9'")
    package("base", 10, "Back_End==1; extra == 'cpu'", "tests>2; extra == 'dev'", "base")
    package("back_end", 100, "mlxdiff")
    package("tests", 1000)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = start.install_size()
    own = found["packages"].pop("mlxdiff")  # what its folders hold, wherever it was installed from
    assert found["packages"] == {"back-end": 100, "base": 10}
    assert found["bytes"] == own + 110
    assert 10**5 < own < 10**8


# ---- what is typed


BAD = {
    "family unknown": (["--random", "sd9"], "sd9"),
    "no blocks": (["--random", "flux-dev", "--blocks", "0"], "--blocks 0"),
    "blocks of a file": (["--blocks", "2"], "--random"),
    "blocks of a U-Net": (["--random", "sd15", "--blocks", "2"], "U-Net"),
    "two sources": (["--random", "sd15", "-m", "x"], "not allowed with"),
    "model absent": (["-m", "./no/such/model"], "no/such/model"),
    "no such bits": (["--random", "sd15", "-q", "7"], "7"),
    "no run": (["--random", "sd15", "--repeat", "0"], "--repeat must be at least 1; 0 was given"),
    "no step": (["--random", "sd15", "--steps", "0"], "Steps must be a whole number from 1 to 1000; 0 was given"),
    "no such size": (["--random", "sd15", "-W", "30"], "width 30"),
    "no such batch": (["--random", "sd15", "--batch", "3"], "3"),
    "no such rival": (["--random", "sd15", "--against", "jax"], "jax"),
    "install without a model": (["--random", "sd15", "--install", "."], "--install"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_usage_is_one_line(name, capsys):
    typed, says = BAD[name]
    err = refused(bench.main, typed, capsys)
    assert says in err


@pytest.mark.parametrize("which", ["-m", "--random"])
def test_what_the_machine_is_too_small_for_is_measured_by_force(monkeypatch, capsys, model, which):
    monkeypatch.setattr(advice, "this_machine", lambda: advice.Machine(10**4, 10**4, False))
    monkeypatch.setattr(start, "cold_start", lambda *_: None)
    typed = quick(which, str(model) if which == "-m" else "sd15", "--json")
    assert bench.main(typed) == 1
    assert "--force tries it" in capsys.readouterr().err
    assert bench.main([*typed, "--force"]) == 0
    assert json.loads(capsys.readouterr().out)["step"]["seconds"]["n"] == 2


def test_install_from_nowhere(model):
    args = bench.parser().parse_args(quick("-m", str(model), "--install", "no/such/wheel.whl"))
    with pytest.raises(bench.Error, match="does not exist"):
        start.install_to_picture(args, None)


def test_the_program_for_torch_is_no_module():
    """It is the one text here that says `import torch`, and it runs only in a process of its own."""
    compile(against_torch.PROGRAM.read_text(), "against_torch", "exec")
    assert against_torch.PROGRAM.suffix == ".txt"
    assert not {"torch", "diffusers"} & {m.split(".")[0] for m in vars(against_torch)}
    assert sys.modules.get("mlxdiff.bench.against_torch") is against_torch
