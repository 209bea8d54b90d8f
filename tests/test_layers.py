"""Layers against closed forms in numpy float64, and what they are for: memory that stays bounded."""

import math
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxdiff.bench.step import kernels
from mlxdiff.models import cpu, layers, vae, ways


def normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def distance(ours: mx.array, theirs: np.ndarray) -> float:
    return float(np.abs(np.array(ours.astype(mx.float32)) - theirs).max() / np.abs(theirs).max())


def group_norm(x: np.ndarray, groups: int, weight: np.ndarray, bias: np.ndarray, eps: float, silu: bool) -> np.ndarray:
    B, h, w, c = x.shape
    y = x.astype(np.float64).reshape(B, h * w, groups, c // groups)
    y = (y - y.mean((1, 3), keepdims=True)) / np.sqrt(y.var((1, 3), keepdims=True) + eps)
    y = y.reshape(x.shape) * weight + bias
    return y / (1 + np.exp(-y)) if silu else y


CHAINS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("compiling", [False, True])
def test_chains_equal_float64(name, compiling, monkeypatch):
    """A float32 exp or erf has an error of a few roundings."""
    monkeypatch.setattr(ways, "_compiling", compiling)
    x = 3 * normal((40, 50), 4)
    assert distance(getattr(layers, name)(mx.array(x)), CHAINS[name](x.astype(np.float64))) < 1e-6


@pytest.mark.skipif(mx.default_device() == mx.Device(mx.gpu), reason="a GPU always compiles")
def test_a_cpu_compiles_from_when_it_is_told(monkeypatch):
    """Uncompiled, a chain leaves several primitives in the graph; compiled, one."""
    monkeypatch.setattr(ways, "_compiling", False)
    x = mx.array(normal((4, 6), 5))
    mx.eval(x)
    assert sum(kernels(layers.affine(x, x, x)).values()) > 1
    ways.compile_kernels()
    assert sum(kernels(layers.affine(x, x, x)).values()) == 1


@pytest.mark.parametrize(("groups", "silu"), [(1, False), (3, True), (7, False), (21, True)])
@pytest.mark.parametrize("mean", [0, 300])
def test_group_norm_equals_float64(groups, silu, mean):
    """A mean of 300 sigmas is where E[x^2] - E[x]^2 in float32 would be off by percents."""
    x = normal((2, 5, 7, 21), 0) + mean
    norm = layers.GroupNorm(groups, 21, 1e-5, silu)
    norm.weight, norm.bias = mx.array(normal((21,), 1)), mx.array(normal((21,), 2))
    expected = group_norm(x, groups, normal((21,), 1), normal((21,), 2), 1e-5, silu)
    assert distance(norm(mx.array(x)), expected) < (1e-6 if mean == 0 else 1e-4)  # x itself is rounded to 300 * 2^-24


@pytest.fixture
def gpu(monkeypatch):
    """Networks choose what they would on a GPU; MLX's CPU runs it, and compiles their chains."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("h", "w"), [(8, 6), (5, 7), (4, 6)])  # in 16 parts, in one, in 8
@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("shifted", [None, (21,), (2, 1, 1, 21)])
def test_group_norm_of_a_gpu_equals_float64(monkeypatch, h, w, few, shifted):
    monkeypatch.setattr(layers, "FEW", 4096 if few else 0)
    x, shift = normal((2, h, w, 21), 0) + 300, None if shifted is None else normal(shifted, 3)
    norm = layers.GroupNorm(3, 21, 1e-5, silu=True)
    norm.weight, norm.bias = mx.array(normal((21,), 1)), mx.array(normal((21,), 2))
    expected = group_norm(x if shift is None else x + shift, 3, normal((21,), 1), normal((21,), 2), 1e-5, True)
    y = norm(mx.array(x), None if shift is None else mx.array(shift))
    assert distance(y, expected) < 1e-4  # as above


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
def test_sums_of_parts_are_one_kernel_each(dtype):
    """MLX cuts a chain that is too long or reads too many arrays."""
    parts = [mx.full((2, 4, 3, 5), i, dtype) for i in range(layers.PARTS)]
    per, total, shift = mx.array(0.1), mx.ones((2, 1, 3, 1)), mx.ones((2, 1, 3, 5), dtype)
    mx.eval(parts, total, shift)
    assert sum(kernels(layers.summed(shift, *parts)).values()) == 1
    assert sum(kernels(layers.squares(total, per, shift, *parts)).values()) == 1


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_group_norm_of_half_precision_rounds_once(dtype):
    eps = 2**-11 if dtype == mx.float16 else 2**-8
    x = mx.array(3 * normal((2, 5, 7, 12), 3) + 40).astype(dtype)  # sums of squares beyond float16's 65504
    norm = layers.GroupNorm(3, 12, 1e-5, silu=True)
    norm.set_dtype(dtype)
    y = norm(x)
    assert y.dtype == dtype
    expected = group_norm(np.array(x.astype(mx.float32)), 3, np.ones(12), np.zeros(12), 1e-5, True)
    assert distance(y, expected) < 1.01 * eps  # half a unit in the last place of the largest value, and float32's own


def softmax_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool = False) -> np.ndarray:
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    B, heads, N, d = q.shape
    scores = q @ k.swapaxes(2, 3) / math.sqrt(d)
    if causal:
        scores = np.where(np.tri(N, k.shape[2], dtype=bool), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    out = p / p.sum(-1, keepdims=True) @ v
    return out.swapaxes(1, 2).reshape(B, N, heads * d)


@pytest.mark.parametrize("d", [8, 40, 64, 72, 77, 100, 160])  # 8, 40, 77 and 100 are padded, 160 is not
def test_attention_equals_float64_softmax(d):
    q, k, v = normal((2, 3, 9, d), 4), normal((2, 3, 11, d), 5), normal((2, 3, 11, d), 6)
    out = layers.attention(mx.array(q), mx.array(k), mx.array(v))
    assert distance(out, softmax_attention(q, k, v)) < 1e-6
    ready = layers.attention(mx.array(q), layers.pad_heads(mx.array(k)), layers.pad_heads(mx.array(v)))
    assert mx.array_equal(out, ready)


def test_causal_attention_equals_float64_softmax():
    q, k, v = normal((2, 3, 9, 12), 7), normal((2, 3, 9, 12), 8), normal((2, 3, 9, 12), 9)
    out = layers.attention(mx.array(q), mx.array(k), mx.array(v), mask="causal")
    assert distance(out, softmax_attention(q, k, v, causal=True)) < 1e-6


@pytest.mark.parametrize("rows", [1, 4, 9, 10])
def test_attention_in_chunks_equals_whole(rows, monkeypatch):
    """Nine queries, one at a time, in uneven chunks, and whole."""
    monkeypatch.setitem(ways.STANDARD, "attention", False)  # of a CPU, whose pieces test_cpu.py tests
    q, k, v = normal((2, 3, 9, 40), 10), normal((2, 3, 11, 40), 11), normal((2, 3, 11, 40), 12)
    monkeypatch.setattr(layers, "SCORES", 2 * 3 * 11 * 4 * rows)
    assert distance(layers.attention(mx.array(q), mx.array(k), mx.array(v)), softmax_attention(q, k, v)) < 1e-6


def peak(make) -> int:
    """Bytes that evaluating make() needs beyond what is there already."""
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(make())
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("own", [False, True])
def test_attention_memory_is_bounded(own, monkeypatch):
    """Scores of all pairs would take 64 MB; pieces of 1 MB, ten to twenty of them queued, as soon as MLX frees them,
    take less than half. own: with the softmax of a CPU's own, whose pieces are of that size."""
    monkeypatch.setitem(ways.STANDARD, "attention", own)
    q = mx.array(normal((1, 1, 4096, 8), 13))
    monkeypatch.setattr(layers, "SCORES", 1 << 20)
    assert peak(lambda: layers.attention(q, q, q)) < 32e6
    monkeypatch.setattr(layers, "SCORES", 1 << 30)
    monkeypatch.setattr(cpu, "PART", 1 << 28)
    assert peak(lambda: layers.attention(q, q, q)) > 64e6


def test_sinusoids_equal_closed_form():
    t = np.array([0, 0.5, 17, 999], np.float32)
    for flip in (True, False):
        for shift in (0, 1):
            angles = t[:, None] * np.exp(-math.log(10000) * np.arange(16) / (16 - shift))
            waves = [np.cos(angles), np.sin(angles)] if flip else [np.sin(angles), np.cos(angles)]
            ours = layers.sinusoids(mx.array(t), 32, flip, shift)
            # 999 * 2^-24 is float32's rounding of the angle itself.
            assert np.abs(np.array(ours) - np.concatenate(waves, 1)).max() < 1e-4


def test_upsample_meets_odd_maps():
    """Nearest neighbours, as torch's interpolate(size=...) picks them: source pixel floor(i * h0 / h)."""
    x = normal((1, 3, 4, 2), 14)
    up = layers.Upsample(2)
    up.conv.weight, up.conv.bias = mx.zeros((2, 3, 3, 2)), mx.zeros(2)
    up.conv.weight[:, 1, 1] = mx.eye(2)
    for h, w in ((6, 8), (5, 7), (5, 8)):
        rows, columns = np.arange(h) * 3 // h, np.arange(w) * 4 // w
        assert np.array_equal(np.array(up(mx.array(x), h, w)), x[:, rows][:, :, columns])


TILED = vae.Config(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    channels=(8, 16),
    layers=1,
    groups=4,
    scale=1.0,
    shift=0.0,
    quant_conv=False,
    post_quant_conv=False,
    mid_attention=True,
)


def noise(n: int, w: int, seed: int) -> mx.array:
    return mx.array(normal((1, n, w, 4), seed))


@pytest.fixture(scope="module")
def decoder() -> vae.VAE:
    mx.random.seed(15)
    return vae.VAE(TILED)


@pytest.mark.parametrize(("n", "tile"), [(17, 8), (40, 16), (64, 64), (9, 16), (23, 5)])
def test_windows_cover_everything_once(n, tile):
    total = np.zeros(2 * n)
    for start, share in vae.windows(n, tile, 2):
        assert 0 <= start <= n - len(share) // 2
        total[2 * start : 2 * start + len(share)] += share
    assert np.allclose(total, 1, atol=1e-12)


@pytest.mark.parametrize(
    ("n", "tile", "overlap", "starts"), [(40, 16, 4, [0, 12, 24]), (9, 5, 1, [0, 4]), (5, 3, 1, [0, 2])]
)
def test_windows_overlap_by_a_quarter_and_blend_as_sine_squares(n, tile, overlap, starts):
    """At least by one latent. Where tiles overlap by that much exactly, a share climbs over it and is whole beyond."""
    found = vae.windows(n, tile, 3)
    assert [start for start, _ in found] == starts
    climb = np.sin(np.pi / 2 * (np.arange(3 * overlap) + 0.5) / (3 * overlap)) ** 2
    for (_, before), (_, after) in pairwise(found):
        assert len(before) == len(after) == 3 * tile
        np.testing.assert_allclose(after[: 3 * overlap], climb, rtol=0, atol=1e-12)
        np.testing.assert_allclose(before[-3 * overlap :], climb[::-1], rtol=0, atol=1e-12)
        np.testing.assert_allclose(before[-3 * (tile - overlap) : -3 * overlap], 1, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("h", "w"), [(12, 40), (40, 12)])
def test_a_picture_long_in_one_direction_is_tiled_in_that_one(decoder, monkeypatch, h, w):
    seen = []
    for net in (vae.Decoder, vae.Encoder):
        own = net.__call__
        monkeypatch.setattr(net, "__call__", lambda self, x, own=own: seen.append(x.shape[1:3]) or own(self, x))
    z, image = noise(h, w, 21), mx.array(normal((1, 2 * h, 2 * w, 3), 22))
    assert decoder.decode(z, tile=16).shape == (1, 2 * h, 2 * w, 3)
    assert seen == [(min(h, 16), min(w, 16))] * 3
    seen.clear()
    assert decoder.encode(image, tile=16)[0].shape == (1, h, w, 4)
    assert seen == [(2 * min(h, 16), 2 * min(w, 16))] * 3
    whole, tiled = (np.array(decoder.decode(z, tile=tile)) for tile in (None, 16))
    assert 0 < np.abs(tiled - whole).mean() < 0.25 * whole.std()


def test_tiled_decode_of_a_small_map_is_the_whole_decode(decoder):
    z = noise(13, 16, 16)
    assert mx.array_equal(decoder.decode(z, tile=16), decoder.decode(z))


@pytest.mark.parametrize(("tile", "bound"), [(16, 0.25), (24, 0.15)])  # of a standard deviation; 0.17 and 0.07 are seen
def test_tiled_decode_is_close_and_its_seams_are_no_worse(decoder, tile, bound):
    """Norms and attention see one tile and not the picture, so it is off a little, but nowhere suddenly: where tiles
    begin and end, the error changes no faster than elsewhere. Tiles cut and laid side by side do show."""
    n = 40
    z = noise(n, n, 17)
    whole = np.array(decoder.decode(z))

    def jumps(picture: np.ndarray, edges: set[int]) -> tuple[np.ndarray, np.ndarray]:
        """How fast the error changes from column to column: at the edges, and elsewhere."""
        jump = np.abs(np.diff(picture - whole, axis=2)).mean((0, 1, 3))
        at = [e - 1 for e in edges if 0 < e < 2 * n]
        return jump[at], np.delete(jump, at)

    tiled = np.array(decoder.decode(z, tile=tile))
    assert np.abs(tiled - whole).mean() < bound * whole.std()
    starts = [x for x, _ in vae.windows(n, tile, 2)]
    seams, rest = jumps(tiled, {2 * x for x in starts} | {2 * (x + tile) for x in starts})
    assert seams.max() <= rest.max()

    cut = np.concatenate([np.array(decoder.decode(z[:, :, a : a + tile])) for a in range(0, n, tile)], 2)
    seams, rest = jumps(cut, {2 * a for a in range(0, n, tile)})
    assert seams.min() > rest.max()


def test_tiled_decode_memory_does_not_grow_with_the_picture(decoder):
    small, large = noise(24, 24, 18), noise(60, 60, 19)
    mx.eval(decoder.decode(small, tile=16))  # weights
    canvas = 144 * 144 * 3 * 4
    assert (
        peak(lambda: decoder.decode(large, tile=16)) < 1.5 * peak(lambda: decoder.decode(small, tile=16)) + 4 * canvas
    )
    assert peak(lambda: decoder.decode(large)) > 4 * peak(lambda: decoder.decode(large, tile=16))


def test_tiled_encode_is_close_and_its_memory_does_not_grow_with_the_picture(decoder):
    """Bounds as in decoding, 0.16 is seen; a picture that fits a tile is encoded whole."""
    image = mx.array(normal((1, 80, 80, 3), 20))
    for whole, tiled in zip(decoder.encode(image), decoder.encode(image, tile=16), strict=True):
        assert np.abs(np.array(tiled - whole)).mean() < 0.25 * mx.std(whole).item()
    assert mx.array_equal(decoder.encode(image, tile=40)[0], decoder.encode(image)[0])
    large = mx.tile(image, (1, 2, 2, 1))
    assert peak(lambda: decoder.encode(large)) > 4 * peak(lambda: decoder.encode(large, tile=16))
    assert peak(lambda: decoder.encode(large, tile=16)) < 1.5 * peak(lambda: decoder.encode(image, tile=16))


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_in_parts_is_the_layer(bias):
    """Bare, in 4 bits, and as a module of another kind, such as one that an adapter changes."""
    x, layer = mx.array(normal((2, 3, 64), 0)), nn.Linear(64, 96, bias=bias)
    for kind in (layer, nn.QuantizedLinear.from_linear(layer, 32, 4), nn.Sequential(layer)):
        parts = layers.split_linear(kind, x, 32, 80)
        assert [p.shape[-1] for p in parts] == [32, 48, 16]
        assert distance(mx.concatenate(parts, axis=-1), np.array(kind(x))) < 1e-6
        y = layers.side_by_side(kind, x[..., :40], x[..., 40:])
        assert distance(y, np.array(kind(x))) < 1e-6
