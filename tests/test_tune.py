"""Tuning with ways that are right, wrong, slow and broken on purpose. References: the way a test gives, and MLX's own
functions."""

import json
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxdiff import generate, tune
from mlxdiff.models import layers, ways
from mlxdiff.store import cache
from mlxdiff.tune import Way


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """A cache of its own, and nothing measured, before and after."""
    monkeypatch.setenv("MLXDIFF_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "_applied", False)
    ways.use({})
    yield
    ways.use({})


def slow(x: mx.array) -> mx.array:
    for _ in range(20):
        x = x + 1
    return x


def row(alternative, reference=slow, name: str = "activations") -> Way:
    """A way over 300,000 numbers, on whatever device."""
    cases = {"cpu": ((300_000,),), "gpu": ((300_000,),)}
    return Way(name, ("cpu", "gpu"), "a way", reference, alternative, lambda n, dtype: (mx.ones(n, dtype),), cases)


def measured(*args, dtypes=(), **named) -> tune.Measured:
    """With a clock that counts calls of the slow function: one call of it is a second, and all else is none."""
    calls = [0]

    def counted(f):
        def call(x):
            calls[0] += f is slow
            return f(x)

        return call

    way = row(*args, **named)
    way = way._replace(reference=counted(way.reference), alternative=counted(way.alternative))
    return tune.measure(way, (300_000,), dtypes, lambda: float(calls[0]))


def constant(value):
    """slow(1) without its work: only its last step."""
    return lambda x: mx.full(x.shape, value, x.dtype)


def test_an_equal_and_faster_way_is_chosen():
    found = measured(constant(21.0))
    assert found.chosen
    assert found.error < 1e-6
    assert found.seconds == (1, 0)


def test_a_slower_way_is_not_chosen():
    found = measured(slow, reference=constant(21.0))
    assert not found.chosen
    assert found.seconds == (0, 1)
    assert found.why.endswith("times as fast")


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (constant(21.001), "deviates by 4.8e-05 in float32"),
        (constant(float("nan")), "deviates by nan"),
        (lambda x: mx.full((3,), 21.0), "gives (3,)"),
        (lambda x: mx.full(x.shape, 21.0, mx.float16), "float16"),
        (lambda x: mx.ones((2, 3)) @ x, "failed"),
    ],
    ids=["a little", "nan", "shape", "dtype", "raises"],
)
def test_a_wrong_way_is_never_chosen_however_fast(wrong, why):
    found = measured(wrong)
    assert not found.chosen
    assert why in found.why
    assert found.seconds is None  # it is not even timed


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_a_way_that_is_wrong_in_the_working_dtype_alone_is_not_chosen(dtype):
    def wrong(x):
        return mx.full(x.shape, 21.5 if x.dtype == dtype else 21.0, x.dtype)

    assert measured(constant(21.0), dtypes=(dtype,)).chosen
    found = measured(wrong, dtypes=(dtype,))
    assert not found.chosen
    assert str(dtype).removeprefix("mlx.core.") in found.why


def test_every_way_that_exists_here_equals_its_reference():
    """By the comparison that is made on users' machines; those for Metal are plain MLX and can be compared anywhere."""
    for way in tune.WAYS:
        for sizes in way.cases.get("cpu", ()):
            assert tune.compare(way, sizes, ()) == ("", pytest.approx(0, abs=1e-5)), way.name


SMALL = {"unfold": (512, 16), "unpadded": (40,), "wider": (72,), "dequantize": (4, 64, 8)}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtypes", [(), (mx.float16,), (mx.bfloat16,)])
def test_ways_for_a_gpu_equal_their_references_on_small_sizes(name, dtypes, monkeypatch):
    monkeypatch.setitem(ways.STANDARD, "attention", False)  # of a CPU, which pads no heads
    way = next(way for way in tune.WAYS if way.name == name)
    if way.inputs is tune._heads:
        way = way._replace(inputs=partial(tune._heads, tokens=50))
    wrong, error = tune.compare(way, SMALL[name], dtypes)
    assert not wrong
    assert error < 1e-5


def test_every_way_is_one_that_a_layer_asks_for():
    assert {way.name for way in tune.WAYS} == ways.STANDARD.keys()
    assert all(way.cases.keys() == {*way.devices} for way in tune.WAYS)


# --- what is kept


def test_choices_are_kept_by_machine_and_used(monkeypatch):
    monkeypatch.setattr(tune, "WAYS", (row(constant(21.0)),))
    monkeypatch.setattr(
        tune, "measured", lambda: iter([tune.Measured("activations", (300_000,), False, "", None, 0.0)])
    )
    assert not tune.known()
    tune.tune()
    assert tune.known()
    assert not ways.chosen("activations")
    ways.use({})
    assert tune.apply(again=True) == ""
    assert not ways.chosen("activations")
    assert "no other way" in tune.summary()
    monkeypatch.setattr(tune, "machine", lambda: "another")
    assert not tune.known()
    assert tune.apply(again=True) == ""
    assert ways.chosen("activations") == ways.STANDARD["activations"]
    tune.tune()
    assert len(json.loads((cache.root() / "tuning.json").read_text())["machines"]) == 2  # the first is still there


SOUND = {"format": tune.FORMAT, "machines": {"m": {"unfold": [[[512, 4096], True]]}}}


def other(*path, value) -> str:
    note = json.loads(json.dumps(SOUND))
    at = note
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return json.dumps(note)


DAMAGED = {
    "cut": json.dumps(SOUND)[:-9],
    "no object": "[]",
    "format": other("format", value=99),
    "machines": other("machines", value=[1]),
    "choices": other("machines", "m", value=3),
    "unknown way": other("machines", "m", value={"warp": [[[1], True]]}),
    "foreign sizes": other("machines", "m", "unfold", value=[[[0, 0], True]]),
    "no sizes": other("machines", "m", "unfold", value=[]),
    "more cases than there are": other("machines", "m", "unfold", value=[[[512, 4096], True]] * 9),
    "not a choice": other("machines", "m", "unfold", value=[[[512, 4096], 1]]),
    "nested": "[" * 100_000,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_or_foreign_file_is_ignored_with_one_line(name, monkeypatch):
    monkeypatch.setattr(tune, "machine", lambda: "m")
    file = cache.root() / "tuning.json"
    file.write_text(DAMAGED[name])
    said = tune.apply(again=True)
    assert str(file) in said
    assert "ignored" in said
    assert "\n" not in said
    assert not ways._measured
    file.write_text(json.dumps(SOUND))
    assert tune.apply(again=True) == ""
    assert ways.chosen("unfold", 640, 4000)


def test_stopped_it_keeps_nothing(monkeypatch):
    def stopped():
        yield tune.Measured("activations", (2**20,), False, "", None, 0.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "measured", stopped)
    assert tune.main([]) == 130
    assert not (cache.root() / "tuning.json").exists()
    assert ways.chosen("activations")


def test_the_command_measures_prints_and_forgets(monkeypatch, capsys):
    monkeypatch.setattr(tune, "WAYS", (row(constant(21.0)), row(constant(3.0), name="convolution")))
    assert tune.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("activations") and " chosen: " in line and "off by" in line for line in lines)
    assert any(line.startswith("convolution") and "not chosen: it deviates" in line for line in lines)
    assert ways.chosen("activations")
    assert not ways.chosen("convolution")
    assert tune.main(["--forget"]) == 0
    assert not tune.known()
    capsys.readouterr()
    assert tune.main(["--json"]) == 0
    assert [m["chosen"] for m in json.loads(capsys.readouterr().out)["ways"]] == [True, False]


def test_a_file_that_cannot_be_written_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tune, "WAYS", (row(constant(21.0)),))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLXDIFF_CACHE", str(tmp_path / "file"))
    assert tune.main([]) == 1
    assert capsys.readouterr().err.count("\n") == 1


# --- how layers choose


def test_the_nearest_case_counts():
    ways.use({"dequantize": {(4, 1280, 1024): True, (4, 3072, 4096): False, (8, 1280, 1024): False}})
    assert ways.chosen("dequantize", 4, 1000, 900)
    assert not ways.chosen("dequantize", 8, 1280, 1024)
    assert not ways.chosen("dequantize", 4, 4096, 4096)


def test_a_quantized_layer_takes_the_chosen_way(monkeypatch):
    """It equals MLX's own: only the order of sums differs."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [nn.QuantizedLinear(64, 32, group_size=32, bits=4), nn.Linear(32, 8)]

    network, x = Network(), mx.random.normal((ways.ROWS, 64), key=mx.random.key(0))
    network.eval()
    before = network.layers[0](x)
    ways.use({"dequantize": {(4, 64, 3): False}})
    assert type(ways.adopt(network).layers[0]) is nn.QuantizedLinear
    ways.use({"dequantize": {(4, 64, 3): True}})
    assert type(ways.adopt(network).layers[0]) is ways.Dequantizing
    asked = []
    monkeypatch.setattr(mx, "dequantize", lambda *a, _plain=mx.dequantize, **k: asked.append(a) or _plain(*a, **k))
    assert mx.abs(network.layers[0](x) - before).max().item() < 1e-5
    assert len(asked) == 1
    network.layers[0](x[1:])  # few rows
    network.train()
    network.layers[0](x)
    network.eval()
    ways.use({"dequantize": {(4, 64, 3): False}})
    network.layers[0](x)
    assert len(asked) == 1


@pytest.mark.parametrize("device", [mx.cpu, mx.gpu])
def test_a_cpu_makes_quantized_weights_whole_where_nothing_was_measured(device, monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))
    layer = nn.QuantizedLinear(64, 32, group_size=32, bits=4)
    assert type(ways.adopt(layer)) is (ways.Dequantizing if device == mx.cpu else nn.QuantizedLinear)
    assert ways.chosen("dequantize", 4, 64, 8) == (device == mx.cpu)
    with ways.exportable():
        assert not ways.chosen("dequantize", 4, 64, 8)


def test_heads_are_padded_as_measured(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    width = lambda d: layers.pad_heads(mx.zeros((1, 1, 2, d))).shape[-1]  # noqa: E731
    assert [width(d) for d in (40, 72, 80, 96)] == [64, 72, 80, 96]
    ways.use({"unpadded": {(40,): True}, "wider": {(72,): True, (80,): True}})
    assert [width(d) for d in (40, 72, 80, 96)] == [40, 96, 96, 96]


def test_what_one_product_says_of_matrix_units():
    assert tune.of_matrix_units("Apple M2", 9e12) == "A product of 4096-cubes in float16 reaches 9.0 TFLOP/s."
    assert "seem to be in use" in tune.of_matrix_units("Apple M5 Max", 40e12)
    assert "seem not to be in use" in tune.of_matrix_units("Apple M5 Max", 15e12)


def test_generate_measures_once_before_a_large_model_and_says_so(monkeypatch, tmp_path, capsys):
    """The small model stands for a large one on a GPU."""
    monkeypatch.setattr(generate, "large", lambda pipe: True)
    monkeypatch.setattr(tune, "WAYS", (row(constant(21.0)),))

    def said(name: str, *flags: str) -> bool:
        call = ["a red house", "--steps", "1", "-s", "0", "-o", str(tmp_path / name), *flags]
        assert generate.main(call) == 0
        return "Measuring which ways" in capsys.readouterr().err

    assert not said("a.png", "--no-tune")
    assert not tune.known()
    assert said("b.png")
    assert tune.known()
    assert not said("c.png")


def test_a_small_model_or_a_cpu_is_not_measured_first(pipe, monkeypatch):
    assert not generate.large(pipe)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert not generate.large(pipe)
    monkeypatch.setattr(generate, "_LARGE", 1)
    assert generate.large(pipe)
