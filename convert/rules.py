"""Foreign names and axes to ours. A row of a table is (pattern, target). Rows apply in order, each to the name that the
last one made. A tuple of targets splits axis 0; None drops a key on purpose; a function gives what takes the place of
the pattern. At the end of a target, `.T` transposes, and `+0`, `+1`, ... are pieces of one parameter, which are laid
end to end along axis 0."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from . import gguf
from .source import Tensor

Row = tuple[str, str | tuple[str, ...] | Callable[[re.Match], str] | None]
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
        """None if the tensor cannot be cut into so many parts."""
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
        """The parameter from its stored tensors."""
        parts = [p.cut(x) for p, x in zip(self.pieces, arrays, strict=True)]
        return fit(parts[0] if len(parts) == 1 else mx.concatenate(parts), self.shape)

    @property
    def bits(self) -> int | None:
        """In how many bits MLX can hold its numbers as they are stored, in groups of 32, if it can: see
        `gguf.STEPS`."""
        tensors = [p.tensor for p in self.pieces if not p.transposed]
        sound = [t for t in tensors if len(t.shape) == 2 and t.shape[1] % 32 == 0 and t.dtype in gguf.STEPS]
        whole = len(self.shape) == 2 and len(sound) == len(self.pieces)
        return max(gguf.STEPS[t.dtype] for t in sound) if whole else None

    def steps(self, bits: int) -> tuple[mx.array, ...]:
        """The parameter as MLX holds it in so many bits: the packed numbers, scales and biases."""
        pieces = [[p.cut(part) for part in p.tensor.steps(bits)] for p in self.pieces]
        return tuple(mx.concatenate(parts) for parts in zip(*pieces, strict=True))

    @property
    def fits(self) -> bool:
        """By shapes alone."""
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
    """A tensor that shows a network's size is absent or has the wrong rank."""


class Shapes(dict[str, tuple[int, ...]]):
    """Shapes by name. A Config is read off those of one network, whose names are ours already."""

    file = Path()  # that they are from

    def has(self, pattern: str) -> bool:
        return any(re.search(pattern, name) for name in self)

    def first(self, pattern: str) -> tuple[int, ...]:
        """The shape of the first name that the pattern is in."""
        return next((shape for name, shape in self.items() if re.search(pattern, name)), ())

    def size(self, name: str, axis: int) -> int:
        shape = self.get(name, ())
        if len(shape) <= axis or shape[axis] == 0:
            raise Lacking(name)
        return shape[axis]

    def count(self, block: str) -> int:
        """How many `block.<number>` there are. They are numbered from 0; after a gap, the last ones stay unmapped."""
        return len({n.removeprefix(f"{block}.").partition(".")[0] for n in self if n.startswith(f"{block}.")})


def rename(name: str, table: list[Row]) -> tuple[str, ...]:
    """Our names for a foreign one: none if the key is dropped, several if its tensor is split."""
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
    """The array with the axes of the destination (OIHW becomes OHWI; a 1x1 convolution a linear layer, or the reverse),
    or None if that does not give its shape."""
    if array.ndim == 4:
        array = array.transpose(0, 2, 3, 1)
    if array.ndim == 4 and len(shape) == 2 and array.shape[1:3] == (1, 1):
        array = array[:, 0, 0]
    elif array.ndim == 2 and len(shape) == 4 and shape[1:3] == (1, 1):
        array = array[:, None, None]
    return array if tuple(array.shape) == shape else None


def target(name: str) -> tuple[str, int, bool]:
    """A target's parameter, which piece of it this is, and whether it is transposed."""
    name, _, piece = name.partition("+")
    return name.removesuffix(".T"), int(piece or 0), name.endswith(".T")


def shapes(tensors: Named, table: list[Row]) -> Shapes:
    """By our names. Of tensors that are split or put together the shapes are wrong, but no Config needs them."""
    shapes = Shapes()
    for name, tensor in tensors:
        shapes.file = tensor.file
        for to in rename(name, table):
            ours, _, transposed = target(to)
            shapes[ours] = tensor.shape[::-1] if transposed else tensor.shape
    return shapes


def fill(
    tensors: Named, table: list[Row], shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, Weight], dict[str, str], list[str]]:
    """Give every parameter in `shapes` one tensor, or one for each of its pieces. This needs headers only. Returns what
    fills each parameter, why each key that is left has no place, and the parameters that nothing fills."""
    filling, weights, unmapped = {}, {}, {}
    for name, tensor in tensors:
        targets = rename(name, table)
        for i, to in enumerate(targets):
            ours, n, transposed = target(to)
            pieces = filling.setdefault(ours, {})
            if ours not in shapes:
                unmapped[tensor.name] = "no such parameter"
            elif n in pieces:
                unmapped[tensor.name] = f"{ours} is filled already by {pieces[n].tensor.name}"
            elif not tensor.floating:
                unmapped[tensor.name] = f"{tensor.dtype} where a floating-point type is needed"
            else:
                pieces[n] = Piece(tensor, i, len(targets), transposed)
    for ours, pieces in filling.items():
        if pieces:
            weight = Weight(tuple(pieces[n] for n in sorted(pieces)), shapes[ours])
            if weight.fits:
                weights[ours] = weight
            else:
                sizes = " + ".join(str(p.tensor.shape) for p in weight.pieces)
                why = f"shape {sizes} does not fit {ours}, {shapes[ours]}"
                unmapped |= {p.tensor.name: why for p in weight.pieces}
    return weights, unmapped, [name for name in shapes if name not in weights]
