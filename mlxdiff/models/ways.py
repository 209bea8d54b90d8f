"""Equivalent ways to compute a layer, and which of them is used. `mlxdiff tune` (tune.py) measures them on a machine.
Where nothing was measured, it is as it stands in STANDARD."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import mlx.core as mx
import mlx.nn as nn

OF_CPU = ("activations", "group norm", "attention", "convolution")  # those of cpu.py
STANDARD: dict[str, bool | mx.DeviceType] = {  # a device: on this one, and on no other
    **dict.fromkeys(OF_CPU, True),
    "unfold": False,  # a convolution of many channels as one product
    "unpadded": False,  # heads that no fused kernel takes, not padded to a width that one takes
    "wider": False,  # heads of 72 or 80 padded to 96 or 128
    "moments": False,  # the sums of a group norm by a kernel of our own: metal.py
    "dequantize": mx.cpu,  # quantized weights made whole before each product
}
MANY = 512  # channels from which a convolution may be unfolded
# Rows of a product from which quantized weights may be made whole. With 768 channels it cost a CPU as much as two rows
# of the product in 4 bits, and three in 8.
ROWS = 4

_measured: dict[str, dict[tuple[int, ...], bool]] = {}


def use(measured: dict[str, dict[tuple[int, ...], bool]]) -> None:
    """Use these choices from now on: way -> sizes of a case -> whether the way was chosen there."""
    _measured.clear()
    _measured.update(measured)


def measured() -> dict[str, bool]:
    """Whether each way that was measured on this machine is used for any case."""
    return {way: any(cases.values()) for way, cases in _measured.items()}


@contextmanager
def exportable() -> Iterator[None]:
    """Layers as MLX can export them: not as cpu.py computes them, nor with quantized weights made whole."""
    before = dict(_measured)
    use(before | {way: {(): False} for way in (*OF_CPU, "dequantize")})
    try:
        yield
    finally:
        use(before)


def chosen(way: str, *sizes: int) -> bool:
    """Whether a way is used for these sizes: as it was measured for the sizes nearest to them. A way with one case is
    asked for without sizes."""
    cases = _measured.get(way)
    if not cases:
        return _standard(way)
    return cases[min(cases, key=lambda case: sum(abs(math.log(a / b)) for a, b in zip(case, sizes, strict=False)))]


def _standard(way: str) -> bool:
    on = STANDARD[way]
    return on if isinstance(on, bool) else mx.default_device().type == on


_compiling = False  # on a CPU too


def compile_kernels() -> None:
    """Let a CPU compile fused chains from now on, for large networks. MLX starts g++ for each, which takes seconds:
    longer than a picture of a small network, and the kernels are no faster."""
    global _compiling
    _compiling = True


run_chain: Callable | None = None  # set by `bench.graph`, which counts a chain as one kernel: called with it and arrays


def fused(chain: Callable) -> Callable:
    """Compile a chain of elementwise operations to one kernel. It is retraced for each new shape: with shapeless=True,
    MLX keeps broadcasts separate and makes two kernels."""
    compiled = mx.compile(chain)

    @wraps(chain)
    def call(*arrays):
        if run_chain is not None:
            return run_chain(chain, *arrays)
        return (compiled if _compiling or mx.default_device().type == mx.gpu else chain)(*arrays)

    return call


def unfold(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """A convolution with a kernel of 3 x 3, padded by one pixel, as one product of the map unfolded nine times."""
    B, h, w, c = x.shape
    x = mx.contiguous(mx.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)]))
    row = (w + 2) * c
    patches = mx.as_strided(x, (B, h, w, 3, 3 * c), ((h + 2) * row, row, c, row, 1)).reshape(B, h * w, 9 * c)
    weight = weight.reshape(-1, 9 * c).T
    y = patches @ weight if bias is None else mx.addmm(bias, patches, weight)
    return y.reshape(B, h, w, -1)


class Dequantizing(nn.QuantizedLinear):
    """A quantized layer that makes its weights whole before the product, where that is faster. In training they would
    have to be kept for the gradient."""

    def __call__(self, x: mx.array) -> mx.array:
        rows = x.size // x.shape[-1]
        if self.training or rows < ROWS or not chosen("dequantize", self.bits, x.shape[-1], rows):
            return super().__call__(x)
        y = dequantize(x, self.weight, self.scales, self.get("biases"), self.group_size, self.bits, self.mode)
        return y + self.bias if "bias" in self else y


def dequantize(x: mx.array, weight, scales, biases, group_size: int, bits: int, mode: str) -> mx.array:
    how = {"group_size": group_size, "bits": bits, "mode": mode}
    weight = mx.depends(weight, x)  # else MLX makes the weights of a dozen layers whole before the first product
    return x @ mx.dequantize(weight, scales, biases, **how, dtype=x.dtype).T


def adopt(network: nn.Module) -> nn.Module:
    """The network with quantized layers that choose their way."""
    cases = _measured.get("dequantize")
    if any(cases.values()) if cases else _standard("dequantize"):
        for layer in network.modules():
            if type(layer) is nn.QuantizedLinear:
                layer.__class__ = Dequantizing
    return network
