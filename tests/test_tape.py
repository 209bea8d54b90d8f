"""How much memory a graph takes. Reference: MLX's own count while it computes the graph."""

import gc

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxdiff.models import ways
from mlxdiff.train import tape


class Block(nn.Module):
    """A frozen layer and one that is trained, of rank 2."""

    def __init__(self):
        super().__init__()
        self.layer, self.down, self.up = nn.Linear(256, 256), nn.Linear(256, 2), nn.Linear(2, 256)
        self.layer.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        return x + mx.tanh(self.layer(x) + self.up(self.down(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = [Block() for _ in range(8)]

    def __call__(self, x: mx.array) -> mx.array:
        for block in self.blocks:
            x = block(x)
        return mx.square(x).mean()


class Again(Block):
    def __call__(self, x: mx.array) -> mx.array:
        return nn.utils.checkpoint(self, super().__call__)(x)


def gradients(net: Net, x: mx.array) -> list[mx.array]:
    value, grads = nn.value_and_grad(net, Net.__call__)(net, x)
    return [value, *(g for _, g in tree_flatten(grads))]


def seen(net: Net, x: mx.array) -> int:
    """Bytes, the weights and the input among them."""
    mx.eval(net.parameters(), x)
    gc.collect()
    mx.clear_cache()
    besides = mx.get_active_memory() - x.nbytes - sum(v.nbytes for _, v in tree_flatten(net.parameters()))
    mx.reset_peak_memory()
    with ways.exportable():
        mx.eval(gradients(net, x))
    return mx.get_peak_memory() - besides


@pytest.mark.skipif(mx.default_device() == mx.Device(mx.gpu), reason="how far ahead a GPU's work begins is a guess")
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_it_is_between_what_is_alive_if_mlx_waits_for_each_operation_and_if_it_never_waits_sooner(twice, monkeypatch):
    """Blocks that are computed twice keep only what they read. 3 %: small arrays that are not counted."""
    x, nets = mx.array(np.random.default_rng(0).standard_normal((4096, 256), np.float32)), [Net(), Net()]
    if twice:
        tape.mark(nets[0].blocks)
        for block in nets[1].blocks:
            block.__class__ = Again

    def run(params: dict, x: mx.array) -> list[mx.array]:
        nets[0].update(params)
        return gradients(nets[0], x)

    graph = tape.traced(run, nets[0].parameters(), x)
    graph = tape.again(graph) if twice else graph
    most = tape.peak(graph, gpu=False)
    monkeypatch.setattr(tape, "_AHEAD", -1)
    least = tape.peak(graph, gpu=False)
    assert 0.97 * least < seen(nets[1], x) < 1.03 * most
    assert least < 0.9 * tape.peak(tape.traced(run, Net().parameters(), x), gpu=False) if twice else True


@pytest.mark.skipif(mx.default_device() == mx.Device(mx.gpu), reason="a CPU's way of computing")
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("turned", [False, True], ids=["forward", "gradient"])
def test_a_convolution_takes_its_kernel_s_copies(dtype, turned):
    """On a CPU, of a map so small that its kernel takes most. 10 %: the map with its border and the output in float32
    are not counted, which are 84 kB of 1.3 MB here."""
    x, kernel = mx.ones((1, 8, 8, 128), dtype), mx.ones((128, 3, 3, 128), dtype)

    def run(x: mx.array, kernel: mx.array) -> list[mx.array]:
        call = lambda x: mx.conv2d(x, kernel, padding=1)  # noqa: E731
        return mx.vjp(call, [x], [x])[1] if turned else [call(x)]

    mx.eval(x, kernel)
    gc.collect()
    mx.clear_cache()
    besides = mx.get_active_memory() - x.nbytes - kernel.nbytes
    mx.reset_peak_memory()
    mx.eval(run(x, kernel))
    seen = mx.get_peak_memory() - besides
    assert abs(tape.peak(tape.traced(run, x, kernel), gpu=False) / seen - 1) < 0.1
