"""The parts of one step: the kernels of its graph, and its matmuls, convolutions and attentions, each timed alone."""

import io
import re
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from statistics import median
from typing import NamedTuple

import mlx.core as mx

from ..models import cpu

# The functions whose calls are recorded. An attention is one call; its inner work is not recorded again, and that of
# a norm, of no kind, not at all: it adds up by thin products.
CAUGHT = (
    (mx, "matmul", "matmul"),
    (mx, "addmm", "matmul"),
    (mx, "quantized_matmul", "matmul"),
    (mx.array, "__matmul__", "matmul"),
    (mx, "conv2d", "convolution"),
    (mx.fast, "scaled_dot_product_attention", "attention"),
    (cpu, "attention", "attention"),
    (cpu, "conv3x3", "convolution"),
    (cpu, "group_norm", None),
)
KINDS = ("matmul", "convolution", "attention")
_MOST = 8  # calls timed in one evaluation, so many that its fixed cost does not matter

# Primitives that only change how memory is read. After a strided one, a reshape must copy.
_STRIDED = {"AsStrided", "Broadcast", "BroadcastAxes", "Slice", "Split", "Transpose"}
_SHAPED = {"Flatten", "Reshape"}
_VIEWS = _STRIDED | _SHAPED | {"Depends", "ExpandDims", "Squeeze", "StopGradient", "Unflatten", "View"}


def kernels(*arrays: mx.array) -> Counter:
    """Count the primitives of the graph that leads to `arrays`, by name, without views. A reshape counts if its input
    is transposed, sliced or broadcast, since then it copies. A chain fused by mx.compile counts as one. The result is a
    lower bound: on a GPU, one convolution may launch several kernels."""
    out = io.StringIO()
    mx.export_to_dot(out, *arrays)
    text = out.getvalue()
    # A node is named by its primitive's address. All calls of one compiled function share it: nodes are not unique.
    nodes = re.findall(r'^\{ (\d+) \[label ="([^"]+)"', text, re.M)
    names, source = dict(nodes), {}
    made = {array: node for node, array in re.findall(r'^(\d+) -> "(\w+)"', text, re.M)}
    for array, node in re.findall(r'^"(\w+)" -> (\d+)', text, re.M):
        source.setdefault(node, array)  # the first array that the node reads

    @cache
    def strided(array: str) -> bool:
        name = names.get(made.get(array))
        return name in _STRIDED or (name in _VIEWS - _SHAPED and strided(source[made[array]]))

    return Counter(n for node, n in nodes if n not in _VIEWS or (n in _SHAPED and strided(source[node])))


class Shape(NamedTuple):
    """Stands for an array argument."""

    shape: tuple[int, ...]
    dtype: mx.Dtype


class Call(NamedTuple):
    kind: str
    function: Callable
    args: tuple
    options: dict


class Trace:
    """While it is on, it replaces functions of MLX by wrappers. They record every call of a matmul, convolution or
    attention, and count the kernels of the first evaluation."""

    def __init__(self):
        self.calls: dict[str, Call] = {}
        self.counts: Counter = Counter()
        self.kernels: Counter | None = None
        self._inside = False  # one of those calls
        self._kept: list[tuple] = []

    def on(self, on: bool) -> None:
        while self._kept:
            owner, name, function = self._kept.pop()
            setattr(owner, name, function)
        if on:
            for owner, name, kind in CAUGHT:
                self._replace(owner, name, lambda function, kind=kind: self._caught(kind, function))
            self._replace(mx, "eval", self._counted)

    def _replace(self, owner, name: str, wrap: Callable) -> None:
        function = getattr(owner, name)
        self._kept.append((owner, name, function))
        setattr(owner, name, wrap(function))

    def _caught(self, kind: str | None, function: Callable) -> Callable:
        def called(*args, **options):
            if self._inside:
                return function(*args, **options)
            if kind is not None:
                shapes = tuple(map(_shape, args)), {k: _shape(v) for k, v in options.items()}
                key = f"{kind} {function.__name__} {shapes}"
                self.calls.setdefault(key, Call(kind, function, *shapes))
                self.counts[key] += 1
            self._inside = True
            try:
                return function(*args, **options)
            finally:
                self._inside = False

        return called

    def _counted(self, evaluate: Callable) -> Callable:
        def called(*arrays):
            if self.kernels is None:
                self.kernels = kernels(*arrays)
            evaluate(*arrays)

        return called

    def alone(self, repeat: int) -> dict[str, dict]:
        """For each kind: the calls, the distinct shapes, and the seconds of all calls, timed alone."""
        parts = {kind: {"calls": 0, "shapes": 0, "seconds": 0.0} for kind in KINDS}
        for key, call in self.calls.items():
            n, part = self.counts[key], parts[call.kind]
            part["calls"] += n
            part["shapes"] += 1
            part["seconds"] += n * seconds_alone(call, min(n, _MOST), repeat)
        return parts


def _shape(value):
    return Shape(tuple(value.shape), value.dtype) if isinstance(value, mx.array) else value


def seconds_alone(call: Call, n: int, repeat: int) -> float:
    """Median time of one call on random arrays. n calls that wait for each other are timed together, at least `repeat`
    times and for a twentieth of a second. A second matrix is made transposed, like the weights of Linear."""
    args = [_random(a) for a in call.args]
    options = {k: _random(v) for k, v in call.options.items()}
    right = {"matmul": 1, "__matmul__": 1, "addmm": 2}.get(call.function.__name__)
    if right is not None and args[right].ndim == 2:
        args[right] = mx.contiguous(args[right].T).T
    mx.eval(args, options)

    def evaluate() -> float:
        begin, out = time.perf_counter(), None
        for _ in range(n):
            out = call.function(args[0] if out is None else mx.depends(args[0], out), *args[1:], **options)
        mx.eval(out)
        return (time.perf_counter() - begin) / n

    evaluate()
    samples = []
    while len(samples) < repeat or sum(samples) * n < 0.05:
        samples.append(evaluate())
    return median(samples)


def _random(value):
    if not isinstance(value, Shape):
        return value
    if mx.issubdtype(value.dtype, mx.floating):
        return mx.random.normal(value.shape, dtype=value.dtype, key=mx.random.key(0))
    return mx.random.randint(0, 1 << 30, value.shape, key=mx.random.key(0)).astype(value.dtype)


def spread(samples: list[float]) -> dict:
    """Median and range of several measurements."""
    return {"median": median(samples), "least": min(samples), "most": max(samples), "n": len(samples)}
