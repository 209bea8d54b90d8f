"""Foreign names to ours, foreign layout to ours. A table row is (pattern, target), applied in order, each to what the
last one made of the name; a tuple of targets splits axis 0; None drops a key on purpose; `.T` at the end transposes."""

import re
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .source import FLOATS, Tensor

Row = tuple[str, str | tuple[str, ...] | None]
Named = list[tuple[str, Tensor]]  # a name can occur twice: then one of the two is reported, not lost


@dataclass(frozen=True)
class Weight:
    """What fills one parameter: a stored tensor, or one of several equal parts of it along axis 0."""

    tensor: Tensor
    shape: tuple[int, ...]  # the parameter's
    part: int = 0
    parts: int = 1
    transposed: bool = False

    def array(self) -> mx.array:
        return self.fitted(self.tensor.read())

    def fitted(self, array: mx.array | np.ndarray) -> mx.array | np.ndarray | None:
        if self.parts > 1:
            if array.ndim == 0 or array.shape[0] % self.parts:
                return None
            rows = array.shape[0] // self.parts
            array = array[self.part * rows : (self.part + 1) * rows]
        return fit(array.T if self.transposed else array, self.shape)


class Lacking(Exception):
    """A tensor is absent, or of the wrong rank, without which a network's size cannot be told."""


class Shapes(dict[str, tuple[int, ...]]):
    """Shapes of a network's tensors, names already ours, to read its Config off."""

    def size(self, name: str, axis: int) -> int:
        shape = self.get(name, ())
        if len(shape) <= axis or shape[axis] == 0:
            raise Lacking(name)
        return shape[axis]

    def count(self, block: str) -> int:
        """How many `block.<number>` there are. They are numbered from 0; where that has a gap, the last go unmapped."""
        return len({n.removeprefix(f"{block}.").partition(".")[0] for n in self if n.startswith(f"{block}.")})


def rename(name: str, table: list[Row]) -> tuple[str, ...]:
    """Our names for a foreign one: none if it is dropped, several if it is split."""
    for pattern, target in table:
        if target is None:
            if re.search(pattern, name):
                return ()
        elif isinstance(target, tuple):
            if re.search(pattern, name):
                return tuple(re.sub(pattern, t, name) for t in target)
        else:
            name = re.sub(pattern, target, name)
    return (name,)


def fit(array: mx.array | np.ndarray, shape: tuple[int, ...]) -> mx.array | np.ndarray | None:
    """The array in the destination's layout, or None: OIHW to OHWI, a 1x1 convolution to a linear layer and back."""
    if array.ndim == 4:
        array = array.transpose(0, 2, 3, 1)
    if array.ndim == 4 and len(shape) == 2 and array.shape[1:3] == (1, 1):
        array = array[:, 0, 0]
    elif array.ndim == 2 and len(shape) == 4 and shape[1:3] == (1, 1):
        array = array[:, None, None]
    return array if tuple(array.shape) == shape else None


def shapes(tensors: Named, table: list[Row]) -> Shapes:
    """By our names; only whole tensors, for no network's size is told by a split one."""
    found = Shapes()
    for name, tensor in tensors:
        for target in rename(name, table):
            found[target.removesuffix(".T")] = tensor.shape[::-1] if target.endswith(".T") else tensor.shape
    return found


def fill(
    tensors: Named, table: list[Row], shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, Weight], dict[str, str], list[str]]:
    """Give every parameter in `shapes` exactly one tensor, judged by headers alone: (what fills each parameter, why
    each leftover key has no place, what nothing fills)."""
    weights, unmapped = {}, {}
    for name, tensor in tensors:
        targets = rename(name, table)
        for i, target in enumerate(targets):
            transposed, target = target.endswith(".T"), target.removesuffix(".T")
            if target not in shapes:
                unmapped[tensor.name] = "no such parameter"
            elif target in weights:
                unmapped[tensor.name] = f"{target} is filled already by {weights[target].tensor.name}"
            elif tensor.dtype not in FLOATS:
                unmapped[tensor.name] = f"{tensor.dtype} where a floating-point type is needed"
            else:
                weight = Weight(tensor, shapes[target], i, len(targets), transposed)
                if weight.fitted(np.broadcast_to(np.int8(0), tensor.shape)) is None:  # a shape that takes no memory
                    unmapped[tensor.name] = f"shape {tensor.shape} does not fit {target}, {shapes[target]}"
                else:
                    weights[target] = weight
    return weights, unmapped, [name for name in shapes if name not in weights]
