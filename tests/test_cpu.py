"""What a CPU computes with instead of MLX's own functions (models/cpu.py). References: numpy in float64, and MLX's own
functions, for values and for gradients."""

import math
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlxdiff.models import cpu, layers, unet, ways

pytestmark = pytest.mark.skipif(mx.default_device().type != mx.cpu, reason="a GPU computes with MLX's own functions")


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


@pytest.fixture
def plain(monkeypatch):
    """Call a function with MLX's own operations."""

    def call(f, *args):
        with monkeypatch.context() as m:
            m.setattr(ways, "STANDARD", dict.fromkeys(ways.STANDARD, False))
            out = f(*args)
            mx.eval(out)
            return out

    return call


def off(ours: mx.array, theirs) -> float:
    """The largest difference, as a part of the largest value."""
    theirs = np.array(theirs, np.float64)
    return float(np.abs(np.array(ours, np.float64) - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("compiling", [False, True])
def test_exp_is_as_exact_as_that_of_mlx(compiling, monkeypatch):
    """x log2(e) is rounded in float32, which costs |x| 6e-8 of the result; MLX's own loses the same."""
    monkeypatch.setattr(ways, "_compiling", compiling)
    x = np.linspace(-87, 88, 100_001).astype(np.float32)
    true = np.exp(x.astype(np.float64))
    ours, theirs = (np.abs(np.array(f(mx.array(x))) / true - 1) for f in (cpu.exp, mx.exp))
    assert (ours < 3e-7 + 1.2e-7 * np.abs(x)).all()
    assert ours.max() < 2 * theirs.max()


def test_exp_beyond_its_range_and_of_what_is_no_number():
    y = np.array(cpu.exp(mx.array([-math.inf, -1e9, -90, 90, 1e9, math.inf, math.nan])))
    assert ((y[:3] > 0) & (y[:3] < 1e-37)).all()
    assert ((y[3:6] > 1e38) & np.isfinite(y[3:6])).all()
    assert np.isnan(y[6])  # an overflow in a network must be seen at its end
    assert cpu.sigmoid(mx.array([-1e9, 1e9])).tolist() == pytest.approx([0, 1], abs=1e-38)


def test_erf_equals_float64():
    """Six roundings of 6e-8."""
    x = np.linspace(-6, 6, 10_001).astype(np.float32)
    assert np.abs(np.array(cpu.erf(mx.array(x))) - np.vectorize(math.erf)(x.astype(np.float64))).max() < 4e-7


@pytest.mark.parametrize("name", ["silu", "gelu", "quick_gelu", "gelu_tanh", "geglu"])
@pytest.mark.parametrize("shape", [(100, 90), (700, 1000)], ids=["whole", "in parts"])
def test_activations_equal_those_of_mlx(name, shape, plain):
    """Both are off by a few roundings of 6e-8. The large ones are taken in parts, the last of which is short."""
    f = getattr(layers, name)
    args = [4 * normal(*shape, seed=i) for i in range(2 if name == "geglu" else 1)]
    assert off(f(*args), plain(f, *args)) < 1e-6
    assert not mx.array_equal(f(*args), plain(f, *args))  # it is another function

    def total(*args):
        return (f(*args) * args[0]).sum()

    slope = mx.grad(total, argnums=[*range(len(args))])
    for ours, theirs in zip(slope(*args), plain(slope, *args), strict=True):
        assert off(ours, theirs) < 1e-6


def test_halves_of_an_array_are_read_where_they_lie(plain):
    halves = mx.split(normal(3, 300, 2000), 2, axis=-1)
    assert off(layers.geglu(*halves), plain(layers.geglu, *halves)) < 1e-6


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("part", "few"), [(64, 0), (1 << 18, 0), (1 << 18, 1 << 13)], ids=["in parts", "whole", "few"])
def test_group_norm_equals_that_of_mlx(silu, part, few, monkeypatch, plain):
    monkeypatch.setattr(cpu, "PART", part)
    monkeypatch.setattr(cpu, "_FEW", few)
    norm, x = layers.GroupNorm(3, 12, 1e-5, silu), 2 * normal(2, 9, 7, 12) + 5
    norm.weight, norm.bias = normal(12, seed=1), normal(12, seed=2)
    assert off(norm(x), plain(norm, x)) < 2e-6  # a mean of 2.5 deviations costs as many roundings
    slope = mx.grad(lambda x: (norm(x) * normal(*x.shape, seed=3)).sum())
    assert off(slope(x), plain(slope, x)) < 1e-5  # differences of sums of 252 terms


def test_a_group_too_large_for_its_variance_spoils_no_other(plain):
    """Its squares are infinite: MLX's own norm gives its bias, and the other groups are what they were."""
    norm, x = layers.GroupNorm(3, 12, 1e-5), normal(1, 9, 7, 12)
    norm.weight, norm.bias = normal(12, seed=1), normal(12, seed=2)
    x[..., 4:8] *= 1e25
    assert off(norm(x), plain(norm, x)) < 1e-6


@pytest.mark.parametrize("part", [50, 700, 4000, 1 << 18], ids=["rows", "a head", "two heads", "whole"])
def test_attention_in_parts_equals_that_of_mlx(part, monkeypatch, plain):
    monkeypatch.setattr(cpu, "PART", part)
    monkeypatch.setattr(cpu, "_FEW", 0)
    q, k, v = normal(2, 3, 30, 40), normal(2, 3, 21, 40, seed=1), normal(2, 3, 21, 40, seed=2)
    assert off(layers.attention(q, k, v), plain(layers.attention, q, k, v)) < 1e-6
    slope = mx.grad(lambda *qkv: (layers.attention(*qkv) * normal(2, 30, 120, seed=3)).sum(), argnums=[0, 1, 2])
    for ours, theirs in zip(slope(q, k, v), plain(slope, q, k, v), strict=True):
        assert off(ours, theirs) < 1e-5


def test_peaked_attention(plain):
    """Scores of hundreds, whose softmax is nearly one of the values: 2^-24 of their size remains as an error."""
    q, k, v = 40 * normal(1, 2, 64, 40), normal(1, 2, 80, 40, seed=1), normal(1, 2, 80, 40, seed=2)
    assert off(layers.attention(q, k, v), plain(layers.attention, q, k, v)) < 1e-4


def exact(q: mx.array, k: mx.array, v: mx.array) -> np.ndarray:
    """Attention in float64, (B, N, heads * d)."""
    q, k, v = (np.array(x, np.float64) for x in (q, k, v))
    scores = q @ k.swapaxes(2, 3) / math.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = (weights / weights.sum(-1, keepdims=True)) @ v
    return y.swapaxes(1, 2).reshape(*y.shape[::2], -1)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("keys", [77, 1024])
def test_attention_equals_float64(compiling, keys, monkeypatch):
    """A weight has an error of some 3e-7, and the score of one number, 2^-24 of its size."""
    monkeypatch.setattr(ways, "_compiling", compiling)
    monkeypatch.setattr(cpu, "PART", 1 << 15)
    q, k, v = normal(1, 2, 128, 40), normal(1, 2, keys, 40, seed=1), normal(1, 2, keys, 40, seed=2)
    assert off(layers.attention(q, k, v), exact(q, k, v)) < 2e-6


@pytest.mark.parametrize("compiling", [False, True])
def test_attention_to_scores_beyond_any_weight(compiling, monkeypatch):
    """A row of scores that are 1e6, 1e15 or 1e30 lower than the largest reads one value; equal ones, their mean."""
    monkeypatch.setattr(ways, "_compiling", compiling)
    monkeypatch.setattr(cpu, "_FEW", 0)
    k, v = mx.zeros((1, 1, 40, 8)), normal(1, 1, 40, 8, seed=1)
    k[:, :, 1:, 0] = -1
    q = mx.zeros((1, 1, 4, 8))
    q[0, 0, :, 0] = mx.array([0, 1e6, 1e15, 1e30])
    y = layers.attention(q, k, v)[0]
    assert off(y[0], v[0, 0].mean(0)) < 1e-6
    for row in y[1:]:
        assert off(row, v[0, 0, 0]) < 1e-6


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
def test_attention_shows_what_is_no_number(which, compiling, monkeypatch):
    monkeypatch.setattr(ways, "_compiling", compiling)
    monkeypatch.setattr(cpu, "_FEW", 0)
    arrays = [normal(1, 1, 20, 8, seed=i) for i in range(3)]
    arrays[which][0, 0, 3, 2] = math.nan
    y = np.isnan(np.array(layers.attention(*arrays)))[0]
    assert y[3].all() if which == 0 else y[:, 2].all()
    assert which == 1 or not y.all()


def test_few_scores_are_left_to_mlx(monkeypatch):
    q, k, v = normal(1, 2, 16, 24), normal(1, 2, 21, 24, seed=1), normal(1, 2, 21, 24, seed=2)
    few = layers.attention(q, k, v)
    monkeypatch.setattr(cpu, "_FEW", 0)
    assert 0 < off(few, layers.attention(q, k, v)) < 1e-6


@pytest.mark.parametrize("shared", [True, False], ids=["one shift", "a shift for each sample"])
def test_two_halves_of_a_batch_on_a_core_each(shared, monkeypatch):
    """Reference: the whole batch at once."""
    block, x, shift = layers.ResBlock(64, 32, 8, 1e-5, time=16), normal(2, 32, 32, 64), normal(1 if shared else 2, 32)
    block.eval()
    slope = mx.grad(lambda x: (block(x, shift) * normal(2, 32, 32, 32, seed=5)).sum())
    monkeypatch.setattr(cpu, "_both", lambda: False)
    whole, steep = block(x, shift), slope(x)
    mx.eval(whole, steep)
    monkeypatch.setattr(cpu, "_both", lambda: True)
    halves, taken = cpu._halves, []
    monkeypatch.setattr(cpu, "_halves", lambda *a: taken.append(a) or halves(*a))
    assert off(block(x, shift), whole) < 1e-6
    assert taken
    assert off(slope(x), steep) < 1e-5
    taken.clear()
    block(normal(2, 8, 8, 64), shift)  # few numbers
    block(normal(3, 32, 32, 64), shift[:1])
    block.train()
    block(x, shift)
    assert not taken


# B, h, w, channels, outputs; the last is unfolded, as MLX does it
@pytest.mark.parametrize("shape", [(1, 33, 40, 5, 3), (2, 32, 32, 8, 16), (2, 16, 17, 5, 3), (2, 5, 4, 7, 6)])
@pytest.mark.parametrize("bias", [False, True])
def test_convolution_equals_that_of_mlx(shape, bias, plain):
    B, h, w, c, o = shape
    conv, x = layers.Conv3x3(c, o, bias), normal(B, h, w, c)
    if bias:
        conv.bias = normal(o, seed=1)
    assert off(conv(x), plain(conv, x)) < 2e-6  # sums of 9 c terms in another order
    if h * w >= cpu._FEW_PIXELS:
        assert not mx.array_equal(conv(x), plain(conv, x))  # it is another way

    def total(weight, x):
        return (layers.conv3x3(x, weight, conv.get("bias")) * normal(B, h, w, o, seed=2)).sum()

    slope = mx.grad(total, argnums=[0, 1])
    for ours, theirs in zip(slope(conv.weight, x), plain(slope, conv.weight, x), strict=True):
        assert off(ours, theirs) < 2e-6


def test_kernels_of_a_small_network_are_only_put_in_order(tmp_path):
    """Reference: the same network before. A file of its weights holds what it held."""
    up, x = layers.Upsample(16), normal(2, 16, 16, 16)
    before, weight = up(x, 32, 32), np.array(up.conv.weight)
    layers.order_kernels(up)
    mx.eval(up.parameters())
    assert memoryview(up.conv.weight).strides == (4, 3 * 16 * 16 * 4, 16 * 16 * 4, 16 * 4)  # outputs are innermost
    assert off(up(x, 32, 32), before) < 1e-6
    up.save_weights(str(tmp_path / "up.safetensors"))
    assert np.array_equal(mx.load(str(tmp_path / "up.safetensors"))["conv.weight"], weight)


@pytest.fixture
def turns(monkeypatch):
    """How many parts each call was divided into, on a machine of two cores."""
    seen, in_turns = [], cpu.in_turns
    monkeypatch.setattr(cpu, "_both", lambda: True)
    monkeypatch.setattr(cpu, "in_turns", lambda f, calls: seen.append(len(calls)) or in_turns(f, calls))
    return seen


def test_a_convolution_on_two_cores_is_that_on_one(turns, monkeypatch):
    """Reference: the whole map at once. Each row is the sum of the same products."""
    x, weight = normal(1, 33, 40, 16), normal(16, 3, 3, 16, seed=1)
    whole = cpu.conv3x3(x, weight)
    monkeypatch.setattr(cpu, "_PRODUCTS", 1)
    assert off(cpu.conv3x3(x, weight), whole) < 1e-6
    assert turns == [1, 2]


def test_a_transformer_of_a_u_net_on_two_cores_is_that_on_one(monkeypatch):
    """Reference: the whole batch at once. A wrapper of an attention, as lessons use, still sees all of the batch."""
    config = SimpleNamespace(groups=8, context=16)
    net, x = unet.Transformer(config, 64, 2, 1), normal(2, 32, 32, 64)
    net.eval()
    layer = net.transformer_blocks[0]
    kv = layer.attn2.kv(normal(2, 7, 16, seed=1))
    halves, taken, seen, own = cpu._halves, [], [], layer.attn2
    monkeypatch.setattr(cpu, "_halves", lambda *a: taken.append(a) or halves(*a))
    monkeypatch.setattr(cpu, "_both", lambda: False)
    whole = net(x, iter([kv]))
    assert not taken
    monkeypatch.setattr(cpu, "_both", lambda: True)
    layer.attn2 = lambda x, kv: seen.append(x.shape) or own(x, kv)
    assert off(net(x, iter([kv])), whole) < 1e-6
    assert taken
    assert seen == [(2, 32 * 32, 64)]


def test_where_openblas_has_threads_of_its_own_nothing_is_handed_to_a_second_core(monkeypatch):
    monkeypatch.setattr(cpu.blas, "cores", lambda: 2)
    monkeypatch.setattr(cpu.blas, "divides", lambda: False)
    assert cpu._both()
    monkeypatch.setattr(cpu.blas, "divides", lambda: True)
    assert not cpu._both()


def test_what_has_a_core_already_is_not_handed_to_both(turns, monkeypatch):
    monkeypatch.setattr(cpu, "_PRODUCTS", 1)
    second, handed = cpu._second_core, []
    monkeypatch.setattr(cpu, "_second_core", lambda: handed.append(1) or second())
    conv = layers.Conv3x3(16, 16)
    conv.eval()
    conv(normal(2, 64, 64, 16))  # its halves are convolutions that would be divided
    assert (len(turns), len(handed)) == (2, 1)
    conv(normal(1, 64, 64, 16))
    assert len(handed) == 2


@pytest.mark.parametrize("shape", [(2, 16, 17, 5, 5), (1, 24, 16, 32, 32)])  # B, h, w, channels, outputs
def test_convolution_of_a_doubled_map_equals_that_of_mlx(shape, plain):
    B, h, w, c, o = shape
    up, x = layers.Upsample(c), normal(B, h, w, c)
    up.conv.bias = normal(o, seed=1)
    assert off(up(x, 2 * h, 2 * w), plain(up, x, 2 * h, 2 * w)) < 2e-6  # weights are added up first
    assert mx.array_equal(up(x, 2 * h - 1, 2 * w), up.conv(cpu.doubled(x)[:, :-1]))  # a cut map is convolved as it is

    def total(weight, bias, x):
        up.conv.weight, up.conv.bias = weight, bias
        return (up(x, 2 * h, 2 * w) * normal(B, 2 * h, 2 * w, o, seed=2)).sum()

    args, slope = (up.conv.weight, up.conv.bias, x), mx.grad(total, argnums=[0, 1, 2])
    for ours, theirs in zip(slope(*args), plain(slope, *args), strict=True):
        assert off(ours, theirs) < 2e-6


def test_half_precision_is_left_to_mlx():
    assert not cpu.suits("activations", normal(2).astype(mx.float16))
    assert not cpu.suits("activations", normal(2).astype(mx.bfloat16))
    assert cpu.suits("activations", normal(2))


def test_a_gpu_computes_with_its_own(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert not cpu.suits("activations", normal(2))
    assert layers.pad_heads(mx.zeros((1, 1, 2, 40))).shape[-1] == 64
