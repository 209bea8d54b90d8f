"""What a step of each family asks of a Mac's GPU, held to exact figures: a change that adds a kernel, a copy or a byte
is seen here. They are counted from full-size graphs without weights, as `python -m mlxdiff.bench --graph NAME` does.

Where a figure changes on purpose, write the new one here; it should be lower. References of the rules: numpy for
reshapes, hand-made graphs for the rest."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlxdiff import load
from mlxdiff.bench import __main__ as bench
from mlxdiff.bench import graph
from mlxdiff.bench.graph import Tally
from mlxdiff.bench.random_model import random_pipeline
from mlxdiff.models import layers

# arguments of the benchmark -> part -> kernels, other traffic in GB, hidden copies, kernels that write a large float32
# array, activations in GB
FIGURES = {
    "sd15": {"step": (890, 3.0, 0, 122, 0.087), "decode": (357, 6.06, 0, 60, 0.753)},
    "sdxl": {"step": (1635, 15.69, 0, 92, 0.347), "decode": (385, 48.34, 0, 172, 5.98)},  # a decoder in float32
    "sd3-medium": {"step": (838, 19.77, 0, 0, 0.161)},
    "sd3.5-large": {"step": (1480, 55.95, 0, 0, 0.255)},
    "flux-dev": {"step": (1090, 43.55, 0, 0, 0.198)},
    "flux-dev -q 4": {"step": (1470, 81.21, 0, 0, 0.311)},
    "flux2-klein": {"step": (410, 18.83, 0, 0, 0.311)},
    "z-image-turbo": {"step": (618, 36.41, 0, 0, 0.26)},
    "sd15 -W 1024 -H 1024": {"decode": (375, 25.09, 0, 60, 2.99)},
}
# Upper bounds that the project set itself, in 16 bits.
BARS = {
    ("flux-dev", "step"): (1100, 45, 0, 0, 0.2),
    ("sdxl", "step"): (1700, 18, 0, None, None),
    ("sd15 -W 1024 -H 1024", "decode"): (400, 45, 0, None, 3.0),
}


def measured(line: str) -> dict:
    args = bench.parser().parse_args(["--graph", *line.split()])
    pipe = random_pipeline(args.graph, args.dtype or "float16", args.low_memory, args.blocks, True, args.quantize)
    return graph.measure(pipe, bench.asked(pipe, args))


def row(f: dict) -> tuple:
    gb = round(f["other_bytes"] / 1e9, 2), round(f["peak_bytes"] / 1e9, 3)
    return f["kernels"], gb[0], f["hidden_copies"], f["float32_kernels"], gb[1]


@pytest.mark.parametrize("line", FIGURES)
def test_figures_of_each_family(line):
    found = measured(line)
    assert {part: row(found[part]) for part in FIGURES[line]} == FIGURES[line]
    for part in FIGURES[line]:
        assert found[part]["waits"] == 1
        for value, bar in zip(row(found[part]), BARS.get((line, part), ()), strict=False):
            assert bar is None or value <= bar


def test_a_step_waits_once(monkeypatch):
    """One more step is one more evaluation: the loop's own."""
    calls, evaluate, counts = [], mx.eval, []
    monkeypatch.setattr(mx, "eval", lambda *a: (calls.append(1), evaluate(*a)))
    pipe = load()
    for steps in (1, 2, 3):  # the first run also reads the prompt
        calls.clear()
        list(pipe.stream("a red house under a full moon", steps=steps, seed=0, sampler="euler"))
        counts.append(len(calls))
    assert counts[2] - counts[1] == 1


def tally(f, *arrays: mx.array) -> Tally:
    return Tally(graph.graph(lambda t: f(*t), list(arrays)))


def launched(f, *arrays: mx.array) -> dict:
    return dict(tally(f, *arrays).kernels)


def test_reshapes_copy_where_numpy_copies():
    rng = np.random.default_rng(0)
    copies = 0
    for _ in range(300):
        shape = rng.choice([1, 2, 3, 4], size=4).tolist()
        a = np.zeros(shape, np.int8).transpose(rng.permutation(4))
        a = a[:, :: rng.integers(1, 3)] if rng.random() < 0.3 else a
        new = list(a.shape)
        for _ in range(2):
            i = int(rng.integers(len(new)))
            if rng.random() < 0.5 and i + 1 < len(new):
                new[i : i + 2] = [new[i] * new[i + 1]]
            elif new[i] % 2 == 0:
                new[i : i + 1] = [2, new[i] // 2]
        b = a.reshape(new)
        found = graph.reshaped(a.shape, a.strides, new)
        shared = np.shares_memory(a, b)
        copies += not shared
        assert (found is not None) == shared
        if shared:
            assert [s for s, n in zip(found, new, strict=True) if n > 1] == [
                s for s, n in zip(b.strides, new, strict=True) if n > 1
            ]
    assert 20 < copies < 280


def test_what_copies_and_what_does_not():
    x, w = mx.zeros((2, 8, 12, 64), mx.float16), mx.zeros(64, mx.float16)
    assert launched(lambda x: x.swapaxes(1, 2)[:, 2:].reshape(2, 10, 8, 64) + 1, x) == {"Add": 1}
    assert launched(lambda x: x.swapaxes(1, 2).reshape(2, 96, 64), x) == {"Reshape": 1}
    assert launched(lambda x, w: mx.fast.rms_norm(x, w, 1e-6), x, w) == {"RMSNorm": 1}
    heads = launched(lambda x, w: mx.fast.rms_norm(x.swapaxes(1, 2), w, 1e-6), x, w)
    assert heads == {"RMSNorm": 1, "copy for RMSNorm": 1}
    part = launched(lambda x, w: mx.fast.rms_norm(x[:, :, :6], w, 1e-6), x, w)
    assert part == {"RMSNorm": 1, "copy for RMSNorm": 1}
    assert tally(lambda x, w: mx.fast.rms_norm(x[:, :, :6], w, 1e-6), x, w).figures()["hidden_copies"] == 1
    assert launched(lambda x: mx.concatenate([x, x, x]), x) == {"Concatenate": 3}
    assert launched(lambda x: layers.gelu_tanh(x), x) == {"gelu_tanh": 1}
    assert launched(lambda x: layers.attention(x, x, x), x) == {"Attention": 1}
    wide = mx.zeros((1, 1, 8, 512), mx.float16)
    assert launched(lambda x: layers.attention(x, x, x), wide) == {"Matmul": 2, "Multiply": 1, "Softmax": 1}


def test_bytes_are_those_behind_views():
    x = mx.zeros((64, 128), mx.float16)
    n = x.nbytes
    assert tally(lambda x: x + x[:1], x).moved == {"Add": n + n // 64 + n}
    assert tally(lambda x: x.astype(mx.float32), x).figures()["float32_kernels"] == 1
    assert tally(lambda x: x @ x.T, x).figures()["other_bytes"] == 0


def test_large_convolutions_hold_the_maps_of_winograd():
    x, w = mx.zeros((1, 64, 64, 128), mx.float16), mx.zeros((128, 3, 3, 128), mx.float16)
    large = tally(lambda x, w: mx.conv2d(x, w, padding=1), x, w)
    small = tally(lambda x, w: mx.conv2d(x[:, :32], w, padding=1), x, w)
    assert (large.kernels["Convolution"], small.kernels["Convolution"]) == (5, 1)
    assert large.peak == x.nbytes + 64 * 11 * 11 * 256 * 2  # 8 x 8 numbers for each tile of 6 x 6, in and out
    assert small.peak == x.nbytes // 2


def test_memory_is_reused_where_nothing_else_reads_it():
    x = mx.zeros((64, 128))
    n = x.nbytes
    assert tally(lambda x: mx.exp(mx.sin(x)), x).peak == n  # the input itself is not counted
    assert tally(lambda x: mx.exp(mx.sin(x) @ x.T), x).peak == n + 64 * 64 * 4

    def kept(x: mx.array) -> mx.array:
        y = mx.sin(x)
        return mx.exp(y) @ y.T

    assert tally(kept, x).peak == 2 * n + 64 * 64 * 4


def test_equal_weights_are_not_merged():
    """MLX's exporter merges equal constants, and what is computed from them."""
    a, b = mx.zeros((8, 8)), mx.zeros((8, 8))
    assert launched(lambda x, a, b: (x @ a) + (x @ b), mx.zeros((8, 8)), a, b) == {"Matmul": 2, "Add": 1}


def test_a_value_that_is_read_is_counted():
    def reads(x: mx.array) -> mx.array:
        return x * mx.array(2.0).item()

    assert graph.graph(lambda t: reads(t[0]), [mx.zeros(4)]).waits == 1


def test_the_command(capsys):
    assert bench.main(["--graph", "flux-schnell", "--blocks", "1", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["model"], facts["dtype"]) == ("flux-schnell", "float16")
    assert facts["step"]["kernels"] == sum(facts["step"]["kernels_by_operation"].values()) > 30
    assert bench.main(["--graph", "flux-schnell", "--blocks", "1", "-q", "4"]) == 0
    text = capsys.readouterr().out
    assert "hidden copies" in text
    assert "QuantizedMatmul" in text
    assert bench.main(["--graph", "flux-schnell", "--against", "torch"]) == 1
    assert "--graph" in capsys.readouterr().err
