"""Audit of the graphs MLX would run, read from its own exporter: in half precision nothing becomes float32 but where it
is meant, nothing needs float64 or the CPU, and what is constant is not computed in the loop."""

from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxdiff.models import clip, layers, unet, vae, ways

# mx.linalg without a Metal kernel.
CPU_ONLY = {"Cholesky", "CholeskyInverse", "Eig", "Eigh", "Inverse", "LUF", "QRF", "SVD"}
VIEWS = {
    "Broadcast",
    "Depends",
    "ExpandDims",
    "Flatten",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unflatten",
}
HALVES = [mx.float16, mx.bfloat16]

UNET = unet.Config(
    in_channels=4,
    out_channels=4,
    channels=(16, 32),
    layers=(1, 1),
    depth=((1,), (2,)),
    up_depth=((2, 2), (1, 1)),
    mid_depth=2,
    heads=(2, 4),
    context=20,
    groups=8,
    eps=1e-5,
    linear_projection=True,
    time_cond=12,
    added_time=8,
    added=10 + 6 * 8,
    flip_sin_to_cos=True,
    freq_shift=0,
)
VAE = vae.Config(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    channels=(16, 32),
    layers=1,
    groups=8,
    scale=0.2,
    shift=0.1,
    quant_conv=True,
    post_quant_conv=True,
    mid_attention=True,
)
CLIP = clip.Config(99, 77, 32, 2, 4, 64, "quick_gelu", 16, 98, 1e-5)


def graph(f, *inputs: mx.array) -> list[dict]:
    """The primitives of f(*inputs), each with its name and the (name, shape, dtype) of its inputs and outputs."""
    records = []
    mx.disable_compile()  # the exporter reads no fused kernels
    try:
        with pytest.MonkeyPatch.context() as patch:  # without a CPU's own ways, which a GPU does not go
            patch.setattr(ways, "STANDARD", dict.fromkeys(ways.STANDARD, False))
            mx.export_function(records.append, f, *inputs)
    finally:
        mx.enable_compile()
    return [r for r in records if r["type"] == "primitive"]


def strays(f, *inputs: mx.array) -> list[str]:
    """The primitives of f that make an array wider than half precision. A view makes none."""
    wide, made = {mx.float32, mx.float64, mx.complex64}, [r for r in graph(f, *inputs) if r["name"] not in VIEWS]
    return [f"{r['name']} {o[1]}" for r in made for o in r["outputs"] if o[2] in wide and len(o[1]) > 1]


def of_dtype(network: nn.Module, dtype: mx.Dtype) -> nn.Module:
    network.set_dtype(dtype)
    mx.eval(network.parameters())
    return network


@pytest.fixture
def cut_float32_places(monkeypatch):
    """The named places that compute in float32 and give back what they were given (tested in test_layers), replaced by
    stand-ins that stay in the dtype: what is float32 after this is so by accident. MLX's own layer norm is a kernel on
    a GPU; only on the CPU it is spelled out in float32."""

    def norm(self, x: mx.array, shift: mx.array | None = None) -> mx.array:
        return (x if shift is None else x + shift) * self.weight + self.bias

    def sinusoids(self, t: mx.array, dim: int) -> mx.array:
        return mx.zeros((*t.shape, dim), self.conv_in.weight.dtype)

    monkeypatch.setattr(layers.GroupNorm, "__call__", norm)
    monkeypatch.setattr(nn.LayerNorm, "__call__", norm)
    monkeypatch.setattr(unet.UNet, "sinusoids", sinusoids)


def conditions(dtype: mx.Dtype) -> dict:
    shapes = {"context": (2, 9, 20), "pooled": (2, 10), "time_ids": (2, 6), "guidance_embedding": (2, 12)}
    return {name: mx.zeros(shape, dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.usefixtures("cut_float32_places")
def test_unet_stays_in_half_precision(dtype):
    net = of_dtype(unet.UNet(UNET), dtype)
    x = mx.zeros((2, 5, 7, 4), dtype)
    for ts in (None, [7.0]):  # times made in the call, and beforehand
        assert strays(lambda x, ts=ts: net(x, 7.0, **net.prepare(ts, **conditions(dtype))), x) == []
    assert strays(lambda x: net(x, mx.array([7.0, 8.0]), **net.prepare(None, **conditions(dtype))), x) == []


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.usefixtures("cut_float32_places")
def test_clip_stays_in_half_precision(dtype):
    net = of_dtype(clip.CLIPText(CLIP), dtype)
    assert strays(lambda ids: net(ids).last, mx.zeros((2, 77), mx.int32)) == []
    assert strays(lambda ids: net(ids).pooled, mx.zeros((2, 77), mx.int32)) == []


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.usefixtures("cut_float32_places")
def test_vae_stays_in_half_precision(dtype, monkeypatch):
    net = of_dtype(vae.VAE(VAE), dtype)
    assert strays(net.decode, mx.zeros((1, 5, 7, 4), dtype)) == []
    assert strays(net.encode, mx.zeros((1, 10, 14, 3), dtype)) == []
    monkeypatch.setattr(layers, "SCORES", 1 << 10)  # and with its attention in chunks
    assert strays(net.decode, mx.zeros((1, 5, 7, 4), dtype)) == []


@pytest.mark.usefixtures("cut_float32_places")
def test_the_audit_sees_an_upcast():
    """float32 noise, a float32 scalar, one float32 weight: each spreads through the network, and each is found."""
    net = of_dtype(unet.UNet(UNET), mx.float16)
    x = mx.zeros((2, 5, 7, 4), mx.float16)

    def step(x: mx.array) -> mx.array:
        return net(x, 7.0, **net.prepare([7.0], **conditions(mx.float16)))

    assert strays(step, x) == []
    assert any("Convolution" in s for s in strays(step, x.astype(mx.float32)))
    assert any("Convolution" in s for s in strays(lambda x: step(x * mx.array(2.0)), x))
    net.mid_block.resnets[0].conv2.bias = mx.zeros(32)
    assert any("Matmul" in s for s in strays(step, x))


def cpu_only(f, *inputs: mx.array) -> list[str]:
    arrays = [(r["name"], a[2]) for r in graph(f, *inputs) for a in (*r["inputs"], *r["outputs"])]
    return [name for name, dtype in arrays if name in CPU_ONLY or dtype in (mx.float64, mx.complex64)]


def test_nothing_needs_float64_or_the_cpu():
    net, coder, text = unet.UNet(UNET), vae.VAE(VAE), clip.CLIPText(CLIP)
    mx.eval(net.parameters(), coder.parameters(), text.parameters())
    cond = conditions(mx.float32)
    assert cpu_only(lambda x: net(x, 7.0, **net.prepare([7.0], **cond)), mx.zeros((2, 5, 7, 4))) == []
    assert cpu_only(lambda z: coder.decode(z, tile=4), mx.zeros((1, 5, 7, 4))) == []
    assert cpu_only(coder.encode, mx.zeros((1, 10, 14, 3))) == []
    assert cpu_only(lambda ids: text(ids).pooled, mx.zeros((2, 77), mx.int32)) == []

    def needs_cpu(x: mx.array) -> mx.array:
        return mx.linalg.inv(x, stream=mx.cpu)

    def needs_float64(x: mx.array) -> mx.array:
        return mx.add(x.astype(mx.float64), 1, stream=mx.cpu)

    assert cpu_only(needs_cpu, mx.zeros((3, 3))) != []
    assert cpu_only(needs_float64, mx.zeros((3, 3))) != []


def counts(f, *inputs: mx.array) -> Counter:
    return Counter(r["name"] for r in graph(f, *inputs))


def test_constants_are_outside_the_loop():
    """Prepared, a step holds only the matmuls that see x: per transformer layer six projections, two of the
    feed-forward and four of attention; per transformer in and out; shortcuts. No sine and no text."""
    net = unet.UNet(UNET)
    cond = net.prepare([7.0], **conditions(mx.float32))
    mx.eval(net.parameters(), cond)
    step = counts(lambda x: net(x, 7.0, **cond), mx.zeros((2, 5, 7, 4)))
    blocks = net.blocks()
    transformers = [t for block in blocks for t in block.attentions]
    depth = sum(len(t.transformer_blocks) for t in transformers)
    shortcuts = sum("conv_shortcut" in r for block in blocks for r in block.resnets)
    assert step["Matmul"] + step["AddMM"] == (6 + 2 + 4) * depth + 2 * len(transformers) + shortcuts
    assert step["Sin"] == step["Cos"] == 0

    cond = net.prepare(None, **conditions(mx.float32))
    mx.eval(cond)
    unprepared = counts(lambda x: net(x, 7.0, **cond), mx.zeros((2, 5, 7, 4)))
    assert unprepared["Sin"] == 1
    resnets = sum(len(block.resnets) for block in blocks)
    matmuls = unprepared["Matmul"] + unprepared["AddMM"]
    assert matmuls == step["Matmul"] + step["AddMM"] + resnets + 3  # each block's time, the time MLP, LCM's projection
