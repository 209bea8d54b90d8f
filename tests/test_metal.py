"""Our kernels for Metal. None can run here: their text is compiled as C++, with a loop in place of the grid, and held
to float64. What Metal's compiler makes of it, `mlxdiff tune` compares on a Mac."""

import ctypes
import shutil
import subprocess

import mlx.core as mx
import numpy as np
import pytest

from mlxdiff.models import layers, metal, ways

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing")
_CPP = """
typedef unsigned int uint;
struct uint3 { uint x, y, z; };
extern "C" void run(const float* x, float* total, float* spread, uint width, uint height, int ROWS, int C) {
    for (uint b = 0; b < height; b++)
        for (uint a = 0; a < width; a++) {
            uint3 thread_position_in_grid = {a, b, 0};
            %s
        }
}
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    place = tmp_path_factory.mktemp("metal")
    (place / "kernel.cpp").write_text(_CPP % metal.MOMENTS)
    subprocess.run(["g++", "-O1", "-shared", "-fPIC", "-o", place / "kernel.so", place / "kernel.cpp"], check=True)
    return ctypes.CDLL(str(place / "kernel.so")).run


@pytest.fixture
def kernel(compiled, monkeypatch):
    """Runs the kernel's text with what it would get on a Mac."""

    def run(*, inputs, template, grid, threadgroup, output_shapes, output_dtypes):
        assert output_dtypes == [mx.float32] * 2
        assert threadgroup[0] <= 1024
        x, outs = np.array(inputs[0]), [np.full(shape, np.nan, np.float32) for shape in output_shapes]
        assert grid[2] == 1
        assert grid[0] * grid[1] == outs[0].size  # a thread writes one number of each
        given = dict(template)
        pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (x, *outs)]
        compiled(*pointers, *grid[:2], given["ROWS"], given["C"])
        return tuple(map(mx.array, outs))

    monkeypatch.setattr(metal, "run", run)


def numbers(N: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, N, 3, 5)).astype(np.float32) + 300


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("N", [256, 24, 7])  # in 64 parts, in 8, in one
def test_moments_equal_float64(N):
    x = numbers(N)
    total, spread = metal.moments(mx.array(x))
    y = x.astype(np.float64).reshape(2, total.shape[1], -1, 3, 5)
    np.testing.assert_allclose(total, y.sum(2), rtol=1e-6)
    true = np.square(y - y.mean(2, keepdims=True)).sum(2)
    np.testing.assert_allclose(spread, true, rtol=1e-5, atol=1e-6)  # differences from the first number are exact
    for ours, theirs in zip(metal.reference(mx.array(x)), (y.sum(2), true), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)  # a mean of 300 is rounded to 300 * 2^-24


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("shifted", [True, False])
def test_group_norm_of_moments_is_group_norm(monkeypatch, shifted):
    x, shift = mx.array(numbers(48)).reshape(2, 8, 6, 15), mx.arange(30).reshape(2, 1, 1, 15) / 10 if shifted else None
    norm = layers.GroupNorm(3, 15, 1e-5, silu=True)
    expected = norm(x, shift)
    calls = []
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setitem(ways.STANDARD, "moments", True)
    monkeypatch.setattr(metal, "run", lambda run=metal.run, **how: (calls.append(1), run(**how))[1])
    assert mx.abs(norm(x, shift) - expected).max() < 1e-4 * mx.abs(expected).max()  # of a mean of 300
    assert calls


@pytest.mark.usefixtures("kernel")
def test_gradients_of_moments_are_those_of_the_reference():
    x = mx.array(numbers(24))

    def loss(f, x: mx.array) -> mx.array:
        total, spread = f(x)
        return (total * total).mean() + (spread**2).mean()

    ours, theirs = (mx.grad(lambda x, f=f: loss(f, x))(x) for f in (metal.moments, metal.reference))
    assert mx.abs(ours - theirs).max() < 1e-4 * mx.abs(theirs).max()
