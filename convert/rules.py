"""Foreign names to ours, foreign layout to ours. A table row is (pattern, target), applied in order, each to what the
last one made of the name; a tuple of targets splits axis 0; None drops a key on purpose. At a target's end, `.T`
transposes, and `+0`, `+1`, ... are pieces of one parameter, laid end to end along axis 0."""

import re
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .source import FLOATS, Tensor

Row = tuple[str, str | tuple[str, ...] | None]
Named = list[tuple[str, Tensor]]  # a name can occur twice: then one of the two is reported, not lost


@dataclass(frozen=True)
class Piece:
    """A stored tensor, or one of several equal parts of it along axis 0."""

    tensor: Tensor
    part: int
    parts: int
    transposed: bool

    def cut(self, array: mx.array | np.ndarray) -> mx.array | np.ndarray:
        rows = array.shape[0] // self.parts if self.parts > 1 else 0
        array = array[self.part * rows : (self.part + 1) * rows] if self.parts > 1 else array
        return array.T if self.transposed else array

    @property
    def shape(self) -> tuple[int, ...] | None:
        """None where it cannot be cut into so many."""
        shape = self.tensor.shape
        if self.parts > 1:
            if not shape or shape[0] % self.parts:
                return None
            shape = (shape[0] // self.parts, *shape[1:])
        return shape[::-1] if self.transposed else shape


@dataclass(frozen=True)
class Weight:
    """What fills one parameter."""

    pieces: tuple[Piece, ...]
    shape: tuple[int, ...]  # the parameter's

    def array(self) -> mx.array:
        return self.fitted([p.tensor.read() for p in self.pieces])

    def fitted(self, arrays: list[mx.array]) -> mx.array:
        """Their tensors in our layout."""
        parts = [p.cut(x) for p, x in zip(self.pieces, arrays, strict=True)]
        return fit(parts[0] if len(parts) == 1 else mx.concatenate(parts), self.shape)

    @property
    def fits(self) -> bool:
        """Judged by shapes alone."""
        shapes = [p.shape for p in self.pieces]
        if None in shapes:
            return False
        whole = shapes[0]
        if len(shapes) > 1:
            if () in shapes or len({s[1:] for s in shapes}) > 1:
                return False
            whole = (sum(s[0] for s in shapes), *whole[1:])
        return fit(np.broadcast_to(np.int8(0), whole), self.shape) is not None  # which takes no memory


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


def target(name: str) -> tuple[str, int, bool]:
    """A target without its marks, which piece it is, and whether it is transposed."""
    name, _, piece = name.partition("+")
    return name.removesuffix(".T"), int(piece or 0), name.endswith(".T")


def shapes(tensors: Named, table: list[Row]) -> Shapes:
    """By our names; only whole tensors, for no network's size is told by one that is split or put together."""
    found = Shapes()
    for name, tensor in tensors:
        for to in rename(name, table):
            ours, _, transposed = target(to)
            found[ours] = tensor.shape[::-1] if transposed else tensor.shape
    return found


def fill(
    tensors: Named, table: list[Row], shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, Weight], dict[str, str], list[str]]:
    """Give every parameter in `shapes` exactly one tensor, or one for each of its pieces, judged by headers alone:
    (what fills each parameter, why each leftover key has no place, what nothing fills)."""
    found, weights, unmapped = {}, {}, {}
    for name, tensor in tensors:
        targets = rename(name, table)
        for i, to in enumerate(targets):
            ours, n, transposed = target(to)
            pieces = found.setdefault(ours, {})
            if ours not in shapes:
                unmapped[tensor.name] = "no such parameter"
            elif n in pieces:
                unmapped[tensor.name] = f"{ours} is filled already by {pieces[n].tensor.name}"
            elif tensor.dtype not in FLOATS:
                unmapped[tensor.name] = f"{tensor.dtype} where a floating-point type is needed"
            else:
                pieces[n] = Piece(tensor, i, len(targets), transposed)
    for ours, pieces in found.items():
        if pieces:
            weight = Weight(tuple(pieces[n] for n in sorted(pieces)), shapes[ours])
            if weight.fits:
                weights[ours] = weight
            else:
                sizes = " + ".join(str(p.tensor.shape) for p in weight.pieces)
                why = f"shape {sizes} does not fit {ours}, {shapes[ours]}"
                unmapped |= {p.tensor.name: why for p in weight.pieces}
    return weights, unmapped, [name for name in shapes if name not in weights]
