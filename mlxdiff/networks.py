"""The networks of a model folder: opened when a run first asks for them, kept, and let go."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from . import blas, weights
from .description import Description

_LARGE = 64 * 2**20  # bytes; a network of more is worth all cores, and kernels compiled for it


class Networks:
    def __init__(self, folder: Path, description: Description):
        self.folder, self.description = folder, description
        self._held: dict[str, nn.Module] = {}

    def __contains__(self, name: str) -> bool:
        """Whether it is held now."""
        return name in self._held

    @property
    def small(self) -> bool:
        """Whether the denoiser is."""
        return (self.folder / f"{self.description.family.denoiser}.safetensors").stat().st_size <= _LARGE

    def get(self, name: str) -> nn.Module:
        """Opened when first asked for, and kept."""
        if name not in self._held:
            self._held[name] = network = self.open(name)
            if sum(v.nbytes for _, v in tree_flatten(network.parameters())) > _LARGE:
                blas.use_all_cores()
        return self._held[name]

    def open(self, name: str) -> nn.Module:
        """A network of its own, which is not kept."""
        model = self.description
        return weights.load(self.folder / f"{name}.safetensors", model.family, model.components[name], model.recipe)

    def release(self, *names: str) -> None:
        for name in names:
            self._held.pop(name, None)
        mx.clear_cache()


def dtype_of(net: nn.Module) -> mx.Dtype:
    """The dtype a network computes in: that of its weights, quantized ones (uint32) aside."""
    return next(v.dtype for _, v in tree_flatten(net.parameters()) if mx.issubdtype(v.dtype, mx.floating))
