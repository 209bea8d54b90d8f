"""The networks of a model folder. A network is opened when a run first needs it, and kept until it is released."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from . import adapters, blas, weights
from .adapters import Adapter
from .description import Description
from .errors import Error
from .models import ways
from .models.layers import order_kernels

_LARGE = 64 * 2**20  # bytes; a larger network is worth all cores and compiled kernels


class Networks:
    def __init__(self, folder: Path, description: Description):
        self.folder, self.description = folder, description
        self._held: dict[str, nn.Module] = {}
        self._trained: set[str] = set()  # those of them that are being trained
        self._adapters: list[tuple[Adapter, float]] = []  # with their scales

    def __contains__(self, name: str) -> bool:
        """Whether this network is open now."""
        return name in self._held

    def get(self, name: str) -> nn.Module:
        """The network, opened on the first call and kept."""
        if name not in self._held:
            self._held[name] = network = self.open(name)
            if sum(v.nbytes for _, v in tree_flatten(network.parameters())) > _LARGE:
                # A U-Net divides its work by samples and parts over two cores. A transformer is mostly matrix products.
                if self.description.flow or blas.cores() > 2:
                    blas.use_all_cores()
                ways.compile_kernels()
            else:
                order_kernels(network)
        return self._held[name]

    def open(self, name: str) -> nn.Module:
        """A fresh copy of the network, which is not kept."""
        model = self.description
        network = weights.load(self.folder / f"{name}.safetensors", model.family, model.components[name], model.recipe)
        ways.adopt(network)
        adapters.apply(network, name, self._adapters)
        return network

    def whole(self, name: str) -> nn.Module:
        """The network with all its weights: one that is held may have dropped some that only `prepare` reads."""
        return self._held[name] if name in self._trained else self.open(name)

    def trains(self, *names: str) -> bool:
        """Whether one of these is being trained."""
        return not self._trained.isdisjoint(names)

    def hold(self, name: str, network: nn.Module) -> None:
        """Use this one, which is being trained, without adapters, until it is released."""
        self.adapt([])
        self._held[name] = network
        self._trained.add(name)

    def adapt(self, changed: list[tuple[Adapter, float]]) -> None:
        """Use these adapters and no others. Networks for which that makes a difference are released."""
        if changed != self._adapters:  # released first: after Ctrl-C between the two, none has others than these say
            self.release(*{name for adapter, _ in self._adapters + changed for name in adapter.changes})
        self._adapters = changed

    def release(self, *names: str) -> None:
        for name in names:
            self._held.pop(name, None)
            self._trained.discard(name)
        mx.clear_cache()


@contextmanager
def computing(name: str) -> Iterator[None]:
    """Make an Error of what MLX raises when memory ends, or when a file was cut short after its header was read: the
    weights are read when they are first needed."""
    try:
        yield
    except RuntimeError as e:
        if "[read]" in str(e):
            fix = "Load it again; if that fails too, convert the checkpoint again."
            raise Error(f"A file of {name} changed while it was in use.", fix) from None
        if "[malloc" in str(e):
            fix = "Choose a smaller picture, `count=1`, or `low_memory=True`."
            raise Error("There is not enough memory for this run.", fix) from None
        raise


def dtype_of(net: nn.Module) -> mx.Dtype:
    """The dtype a network computes in: the dtype of its weights that are not quantized (quantized ones are uint32)."""
    return next(v.dtype for _, v in tree_flatten(net.parameters()) if mx.issubdtype(v.dtype, mx.floating))
