"""Noise against torch (CPU), Random123's published vectors and A1111's published CUDA values."""

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlxdiff.errors import Error
from mlxdiff.noise import Noise, draw_nhwc, philox

SEEDS = [0, 1, 42, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**63 - 1, 2**64 - 1]

# torch's blocks of 16 use its own vector log, sin and cos; ours are numpy's. They differ in the last bit or two:
# 1.2e-7 x 2 up to |x| = 2, 4.8e-7 for |x| from 4 to 6. Any slip in the stream gives differences of order 1.
LAST_BITS = 5e-7


def torch_draws(seed, shapes):
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.randn(shape, generator=generator).numpy() for shape in shapes]


@pytest.mark.parametrize("seed", SEEDS)
def test_torch_successive_draws_of_every_small_size(seed):
    """One generator through sizes 1 to 64: both paths, ragged tails, and the half pair kept between small draws."""
    shapes = [(n,) for n in range(1, 65)] + [(n,) for n in (3, 1, 17, 5, 16, 7)]
    noise = Noise(seed)
    for shape, expected in zip(shapes, torch_draws(seed, shapes), strict=True):
        tolerance = 0 if shape[0] < 16 else LAST_BITS  # below 16 both compute in double precision
        np.testing.assert_allclose(noise.draw(shape), expected, rtol=0, atol=tolerance, err_msg=f"{seed} {shape}")


@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (2, 4, 37, 53), (1, 4, 128, 128), (3, 5, 7, 1)])
def test_torch_latents(shape):
    noise = Noise(1234)
    for expected in torch_draws(1234, [shape] * 3):
        got = noise.draw(shape)
        assert got.shape == shape
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, rtol=0, atol=LAST_BITS)


def test_torch_differs_in_last_bits_only_and_rarely():
    """Over a million values the mean difference is 1e-8: the tolerance above hides no slip of precision."""
    (expected,) = torch_draws(7, [(1 << 20,)])
    assert np.abs(Noise(7).draw((1 << 20,)) - expected).mean() < 5e-8


def words(text):
    return np.array([[int(word, 16)] for word in text.split()], np.uint64)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """Random123 (D. E. Shaw Research), tests/kat_vectors, philox4x32 with 10 rounds; the low key word comes first."""
    low, high = (int(k) for k in words(key)[:, 0])
    np.testing.assert_array_equal(philox(words(counter), high << 32 | low), words(expected))


def test_nv_equals_published_cuda_values():
    """torch.manual_seed(0); torch.randn(3, 4, device="cuda"), as printed in A1111's modules/rng_philox.py."""
    expected = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
        [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]
    # The list is in float64 with 2^-32 rounded to float32: 1e-7 off.
    np.testing.assert_allclose(Noise(0, "nv").draw((3, 4)), expected, rtol=0, atol=3e-7)


def test_nv_successive_draws_move_the_offset():
    """Draw k, value i: Box and Muller's sine of words 0 and 1 of philox(counter = (k, 0, i, 0), key = seed)."""
    seed = 0x1_2345_6789_ABCD
    noise = Noise(seed, "nv")
    for k in range(3):
        got = noise.draw((2, 3))
        for i in range(6):
            a, b = (int(w) for w in philox(np.array([[k], [0], [i], [0]], np.uint64), seed)[:2, 0])
            u, v = (a + 0.5) / 2**32, (b + 0.5) / 2**32
            # float32 rounding of a value below 6
            assert got.ravel()[i] == pytest.approx(np.sqrt(-2 * np.log(u)) * np.sin(2 * np.pi * v), abs=5e-7)


def test_mlx_is_keyed_and_leaves_the_global_state_alone():
    mx.random.seed(3)
    before = np.array(mx.random.state[0])
    noise = Noise(5, "mlx")
    first, second = noise.draw((4, 4)), noise.draw((4, 4))
    np.testing.assert_array_equal(np.array(mx.random.state[0]), before)
    np.testing.assert_array_equal(Noise(5, "mlx").draw((4, 4)), first)
    assert np.abs(first - second).max() > 0.1
    assert np.abs(Noise(6, "mlx").draw((4, 4)) - first).max() > 0.1


@pytest.mark.parametrize("kind", ["torch", "nv", "mlx"])
def test_normals_are_normal(kind):
    """Mean, variance, fourth moment of 2^18 values within five standard errors."""
    n = 1 << 18
    x = Noise(11, kind).draw((n,)).astype(np.float64)
    assert abs(x.mean()) < 5 / np.sqrt(n)
    assert abs(x.var() - 1) < 5 * np.sqrt(2 / n)
    assert abs((x**4).mean() - 3) < 5 * np.sqrt(96 / n)


def test_nhwc_is_each_seed_alone_transposed():
    batch = np.array(draw_nhwc([Noise(1), Noise(2)], 3, 5, 4))
    for row, seed in zip(batch, (1, 2), strict=True):
        (expected,) = torch_draws(seed, [(1, 4, 3, 5)])
        np.testing.assert_allclose(row, expected[0].transpose(1, 2, 0), rtol=0, atol=LAST_BITS)


def test_unknown_kind_names_the_known_ones():
    with pytest.raises(Error, match="torch, nv, mlx"):
        Noise(0, "gaussian")
