"""The audit of test_graph over the transformers of SD3, FLUX.1 and FLUX.2, over T5 and Qwen3: half precision but where
float32 is meant, nothing for the CPU alone, and in the loop only what sees x."""

from dataclasses import replace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlxdiff.models import flux, flux2, layers, qwen3, sd3, t5, zimage

from .test_graph import HALVES, counts, cpu_only, graph, of_dtype, strays

FLUX = flux.Config(
    in_channels=16,
    out_channels=16,
    context=20,
    pooled=12,
    width=48,
    heads=2,
    hidden=96,
    double=2,
    single=3,
    axes=(8, 8, 8),
    theta=10000.0,
    guidance=True,
)
FLUX2 = flux2.Config(4, 4, 20, 48, 2, 96, 2, 3, (8, 8, 4, 4), 2000.0, guidance=False)
SD3 = sd3.Config(
    in_channels=4,
    out_channels=4,
    patch=2,
    positions=8,
    context=20,
    pooled=12,
    heads=2,
    head_dim=16,
    layers=3,
    dual=(0,),
    qk_norm=True,
)
T5 = t5.Config(99, 32, 3, 2, 16, 64, 8, 16, 1e-6)
QWEN3 = qwen3.Config(99, 32, 3, 4, 2, 64, 80, 1e6, 1e-6, (1, 3))
ZIMAGE = zimage.Config(16, 16, 20, 48, 2, 96, 3, 2, (8, 8, 8), 256.0, 1e-5)
NETS = {
    "flux": (flux.Flux, FLUX),
    "flux2": (flux2.Flux2, FLUX2),
    "sd3": (sd3.SD3, SD3),
    "zimage": (zimage.ZImage, ZIMAGE),
}


def conditions(config, dtype: mx.Dtype, batch: int) -> dict:
    guidance = {"guidance": 3.5} if isinstance(config, flux.Config) else {}
    context = mx.zeros((batch, 5, config.context), dtype)
    if isinstance(config, flux2.Config):
        return {"context": context, "size": (4, 6), "references": [mx.zeros((1, 2, 3, 4), dtype)]}
    if isinstance(config, zimage.Config):
        lengths = tuple(range(5, 5 - batch, -1))
        return {"context": context, "lengths": lengths, "size": (4, 6)}
    return {"context": context, "pooled": mx.zeros((batch, config.pooled), dtype), "size": (4, 6), **guidance}


@pytest.fixture
def cut_float32_places(monkeypatch):
    """As in test_graph: what computes in float32 by intent and gives back what it was given, replaced by stand-ins that
    stay in the dtype. MLX's norms are kernels on a GPU; only on the CPU they are spelled out in float32."""

    def layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array:
        x = x if weight is None else x * weight
        return x if bias is None else x + bias

    monkeypatch.setattr(mx.fast, "layer_norm", layer_norm)
    monkeypatch.setattr(mx.fast, "rms_norm", lambda x, weight, eps: x if weight is None else x * weight)
    monkeypatch.setattr(layers, "affine", lambda x, a, b: x * a + b)
    for module in (flux, sd3):
        monkeypatch.setattr(module, "gelu_tanh", lambda x: x)
        monkeypatch.setattr(module, "gated", lambda x, gate, y: x + gate * y)
        monkeypatch.setattr(module, "sinusoids", lambda t, dim, **_: mx.zeros((*t.shape, dim), mx.float16))
    monkeypatch.setattr(zimage, "gated", lambda x, gate, y: x + gate * y)
    monkeypatch.setattr(zimage, "gated_silu", lambda gate, y: gate * y)
    monkeypatch.setattr(zimage, "sinusoids", lambda t, dim, **_: mx.zeros((*t.shape, dim), mx.float16))
    monkeypatch.setattr(flux2, "sinusoids", lambda t, dim, **_: mx.zeros((*t.shape, dim), mx.float16))
    monkeypatch.setattr(flux2, "swiglu", lambda gate, x: gate * x)
    monkeypatch.setattr(flux, "turn", lambda x, swapped, scale, _, cos, sin: x * scale * cos.astype(x.dtype) + swapped)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("batch", [1, 2])  # modulations inside the norm kernel, and after it
@pytest.mark.usefixtures("cut_float32_places")
def test_transformers_stay_in_half_precision(name, dtype, batch):
    kind, config = NETS[name]
    net, x = of_dtype(kind(config), dtype), mx.zeros((batch, 4, 6, 4), dtype)
    for ts in (None, [0.5]):  # times made in the call, and beforehand
        cond = net.prepare(ts, **conditions(config, dtype, batch))
        mx.eval(cond)  # its tables of rotations are float32; what is made of them is not
        assert strays(lambda x, cond=cond: net(x, 0.5, **cond), x) == []

    def prepared(x: mx.array) -> list[mx.array]:
        return [m for _, m in tree_flatten(net.prepare([0.5], **conditions(config, dtype, batch))["mods"])]

    assert strays(prepared, x) == []


@pytest.mark.parametrize("name", NETS)
def test_float32_places_give_back_what_they_were_given(name):
    """The stand-ins above are fair: with the real ones, every matmul of the network and its output are half."""
    kind, config = NETS[name]
    net, x = of_dtype(kind(config), mx.bfloat16), mx.zeros((2, 4, 6, 4), mx.bfloat16)
    cond = net.prepare([0.5], **conditions(config, mx.bfloat16, 2))
    mx.eval(cond)
    step = graph(lambda x: net(x, 0.5, **cond), x)
    products = [o[2] for r in step if r["name"] in ("AddMM", "Matmul") for o in r["outputs"]]
    assert set(products) == {mx.bfloat16}
    assert net(x, 0.5, **cond).dtype == mx.bfloat16


@pytest.mark.parametrize("dtype", HALVES)
def test_t5_multiplies_in_half_precision(dtype):
    """Its residual stream alone is float32, for float16 cannot hold it."""
    net = of_dtype(t5.T5Encoder(T5), dtype)
    step = graph(lambda ids: net(ids), mx.zeros((2, 7), mx.int32))
    assert {o[2] for r in step if r["name"] in ("AddMM", "Matmul") for o in r["outputs"]} == {dtype}
    assert net(mx.zeros((2, 7), mx.int32)).dtype == dtype


@pytest.mark.parametrize("dtype", HALVES)
def test_qwen3_multiplies_in_half_precision(dtype):
    """Its residual stream alone is float32, and with it the states that are read from it."""
    net = of_dtype(qwen3.Qwen3(QWEN3), dtype)
    step = graph(lambda ids: net(ids, mx.ones((2, 7))), mx.zeros((2, 7), mx.int32))
    assert {o[2] for r in step if r["name"] in ("AddMM", "Matmul") for o in r["outputs"]} == {dtype}
    assert net(mx.zeros((2, 7), mx.int32)).dtype == mx.float32


def test_the_audit_sees_an_upcast():
    """A float32 latent, a float32 weight, a rotation that promotes: each is found."""
    net, x = of_dtype(flux.Flux(FLUX), mx.bfloat16), mx.zeros((1, 4, 6, 4), mx.bfloat16)
    cond = net.prepare([0.5], **conditions(FLUX, mx.bfloat16, 1))
    mx.eval(cond)

    def products(x: mx.array) -> set:
        step = graph(lambda x: net(x, 0.5, **cond), x)
        return {o[2] for r in step if r["name"] in ("AddMM", "Matmul") for o in r["outputs"]}

    assert products(x) == {mx.bfloat16}
    assert mx.float32 in products(x.astype(mx.float32))
    net.single_blocks[1].linear2.bias = mx.zeros(48)
    assert mx.float32 in products(x)


@pytest.mark.parametrize("name", NETS)
def test_nothing_needs_float64_or_the_cpu(name):
    kind, config = NETS[name]
    net, x = of_dtype(kind(config), mx.float32), mx.zeros((2, 4, 6, 4))
    assert cpu_only(lambda x: net(x, 0.5, **net.prepare([0.5], **conditions(config, mx.float32, 2))), x) == []
    text = of_dtype(t5.T5Encoder(T5), mx.float32)
    assert cpu_only(text, mx.zeros((2, 7), mx.int32)) == []
    text = of_dtype(qwen3.Qwen3(QWEN3), mx.float32)
    assert cpu_only(lambda ids: text(ids, mx.ones((2, 7))), mx.zeros((2, 7), mx.int32)) == []


def matmuls(f, x: mx.array) -> tuple[int, int]:
    step = counts(f, x)
    return step["Matmul"] + step["AddMM"], step["Sin"] + step["Cos"] + step["Gather"]


@pytest.mark.parametrize("name", NETS)
def test_the_loop_holds_only_what_sees_x(name):
    """Prepared, no sine, no gather, no modulation, no text, no position: a product for each layer x passes and two for
    each attention. Unprepared there are the time's two layers and every block's modulation besides."""
    kind, config = NETS[name]
    net, x = of_dtype(kind(config), mx.float32), mx.zeros((2, 4, 6, 4))
    if name == "flux":
        expected = 2 + config.double * (2 * 5 + 2) + config.single * (5 + 2)  # q and k together, v, MLP
        modulations = 2 * config.double + config.single + 1
    elif name == "flux2":  # the blocks share their modulations
        expected, modulations = 2 + config.double * (2 * 5 + 2) + config.single * (5 + 2), 3 + 1
    elif name == "zimage":
        blocks = config.layers + config.refiners
        expected, modulations = 2 + blocks * (4 + 2 + 3), blocks + 1  # the second 2: the attention
    else:
        expected = 1 + config.layers * (2 * 6 + 2) - 3 + len(config.dual) * (4 + 2)  # the last text goes nowhere
        modulations = 2 * config.layers + 1
    for ts, more, waves in (([0.75, 0.5], 0, 0), (None, modulations + 2, 2)):
        cond = net.prepare(ts, **conditions(config, mx.float32, 2))
        mx.eval(cond)
        assert matmuls(lambda x, cond=cond: net(x, 0.5, **cond), x) == (expected + more, waves)


def test_t5_makes_its_position_bias_once():
    net = of_dtype(t5.T5Encoder(T5), mx.float32)
    assert counts(lambda ids: net(ids), mx.zeros((1, 7), mx.int32))["Gather"] == 2  # tokens, and biases by distance


@pytest.mark.parametrize("name", NETS)
def test_weights_released_before_they_are_read_stream(name, tmp_path):
    """Peak memory, from a file, of making all modulations: a few layers at a time where they are released first, all
    of them together where they are kept."""
    kind, config = NETS[name]
    if name == "flux2":
        pytest.skip("Its modulations are three layers, whatever its depth.")
    deep = {
        "flux": {"width": 192, "double": 12, "single": 24},
        "sd3": {"head_dim": 96, "layers": 24},
        "zimage": {"width": 192, "axes": (32, 32, 32), "layers": 48},
    }[name]
    config = replace(config, **deep)
    mx.save_safetensors(str(tmp_path / "net.safetensors"), dict(tree_flatten(kind(config).parameters())))
    peaks = {}
    for first in (True, False):
        net = kind(config)
        net.load_weights(str(tmp_path / "net.safetensors"))
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        cond = net.prepare([0.75, 0.5], **conditions(config, mx.float32, 1))
        if first:
            net.release_modulation()
        mx.eval(cond)
        peaks[first] = mx.get_peak_memory() - before
    assert peaks[True] < peaks[False] / 2  # a quarter is seen
