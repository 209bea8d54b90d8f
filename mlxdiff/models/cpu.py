"""Layers for MLX's CPU backend, in float32, made of what it does fast there. On Linux, exp, sigmoid, tanh and erf take
12 to 22 ns a number, since they are not vectorised; sums, products and shifts of bits take 0.2 ns while arrays fit
into the processor's cache, and 2.3 ns beyond. A convolution copies its map nine times before it multiplies. So here a
function is a polynomial, a large map is taken in parts, and a convolution is nine products of a map that is not copied.
The results equal MLX's own within a few roundings, and gradients pass."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, reduce, wraps
from itertools import pairwise
from operator import add

import mlx.core as mx
import numpy as np

from .. import blas
from . import ways
from .ways import fused

PART = 1 << 18  # numbers worked on at a time: 1 MB, for the cache
_FEW = 1 << 13  # up to so many numbers, MLX's own function is as fast: twenty operations have a fixed cost
# Pixels of a map; in smaller ones a convolution's copies cost less than its nine products. With many channels they cost
# less also in larger ones: 5 % less at 32 x 32 and 320.
_PIXELS, _MANY, _PIXELS_OF_MANY = 1 << 10, 256, 1 << 12
_KERNEL = 1 << 18  # numbers of a kernel; a smaller one costs little to put in order, so that it suits all maps
_FEW_PIXELS = 1 << 9  # of a map: in smaller ones, one product of copies costs less than nine
_LARGEST = float(np.finfo(np.float32).max)
_DOUBLED = 1 << 8  # pixels of a map, before they are doubled


def suits(way: str, x: mx.array) -> bool:
    """Whether this array is computed in a way of this file. This is the one place that decides it."""
    return x.dtype == mx.float32 and mx.default_device().type == mx.cpu and ways.chosen(way)


def rather(faster: Callable) -> Callable:
    """A function of arrays that this one takes the place of, where it suits."""

    def decorate(plain: Callable) -> Callable:
        @wraps(plain)
        def call(*arrays):
            return (faster if suits("activations", arrays[0]) and arrays[0].size > _FEW else plain)(*arrays)

        return call

    return decorate


def in_parts(f: Callable, arrays: Sequence[mx.array], axis: int, rows: int) -> list[mx.array]:
    """f of slices of the arrays, `rows` along the axis, on two cores in turns."""
    n = arrays[0].shape[axis]
    if n <= rows:
        return [f(*arrays)]
    return in_turns(f, [[_sliced(x, axis, i, rows) for x in arrays] for i in range(0, n, rows)])


def in_turns(f: Callable, calls: Sequence[Sequence]) -> list[mx.array]:
    """f of the arguments of each call, on two cores in turns. On each, a call waits for the previous one: MLX would
    begin several, and their arrays would not stay in the cache. What f itself divides stays on one core."""
    results, cores = [], 2 if len(calls) > 1 and not _shared() and _both() else 1
    for n, (first, *rest) in enumerate(calls):
        with _second_core() if n % cores else nullcontext(), _sharing(cores > 1):
            results.append(f(mx.depends(first, results[-cores]) if n >= cores else first, *rest))
    return results


def _sliced(x: mx.array, axis: int, i: int, rows: int) -> mx.array:
    return x[(slice(None),) * axis + (slice(i, i + rows),)]


def _elementwise(f: Callable) -> Callable:
    """A function of arrays of one shape, computed in parts of the cache's size."""

    def call(*arrays):
        if arrays[0].size <= 2 * PART:
            return f(*arrays)
        shape, rows = arrays[0].shape, max(1, PART // arrays[0].shape[-1])
        parts = in_parts(f, [x.reshape(-1, shape[-1]) for x in arrays], 0, rows)
        return mx.concatenate(parts, axis=0).reshape(shape)

    return call


# --- two cores

# Numbers of a map whose samples are worth a core each. Handing an operation to a core costs as much as 2^15 numbers do.
_SHARED = 1 << 15
_SCORES = 1 << 17  # of an attention, the same
_PRODUCTS = 1 << 24  # multiplications of a convolution, the same
_here = threading.local()  # of each thread, the stream beside its default one


def _second_core() -> AbstractContextManager:
    """Where operations are computed beside those outside of it: MLX has a thread for each stream."""
    if not hasattr(_here, "beside"):
        _here.beside = mx.new_stream(mx.cpu)
    return mx.stream(_here.beside)


def _both() -> bool:
    """Whether a second core is there, and OpenBLAS does not use it already."""
    return blas.cores() > 1 and not blas.divides()


def _shared() -> bool:
    """Whether both cores were given work already, of which this is a part."""
    return getattr(_here, "shared", False)


@contextmanager
def _sharing(on: bool) -> Iterator[None]:
    before, _here.shared = _shared(), on or _shared()
    try:
        yield
    finally:
        _here.shared = before


def on_two_cores(layer: Callable) -> Callable:
    """A layer's call, (self, x, ...), that computes two halves of a batch beside each other, on a core each."""

    @wraps(layer)
    def call(self, x: mx.array, *arrays: mx.array) -> mx.array:
        alone = self.training or x.shape[0] % 2 or x.size < _SHARED or not suits("convolution", x)
        if alone or _shared() or not _both():
            return layer(self, x, *arrays)
        first, second = zip(*(_halves(a, x.shape[0]) for a in (x, *arrays)), strict=True)
        with _sharing(True):
            with _second_core():
                second = layer(self, *second)
            return mx.concatenate([layer(self, *first), second])

    return call


def _halves(x: mx.array, B: int) -> list[mx.array]:
    """Of an array of B samples; one that all samples share stays whole."""
    return mx.split(x, 2) if x.shape[0] == B else [x, x]


# --- exp, and what follows from it

# 2^f = (t + f) / (t - f) for f in -1/2 to 1/2, with t a polynomial of f^2, the lowest power first: fitted to the least
# greatest relative error, which is 3e-10.
_HALF = (2.88539010, 0.115523954, -9.20455849e-4)
_OF_E = 1 / math.log(2)  # e^x = 2^(x times this)
# Added to a number, it leaves in the lowest bits the nearest integer and 127, which is what an exponent's bits hold.
_SHIFT = 1.5 * 2.0**23 + 127


@mx.custom_function
def power(z: mx.array) -> mx.array:
    """2^z. It stays between 1e-38 and 3e38: it is never 0 or infinite."""
    return _power(mx.clip(z, -126.0, 127.4))


@mx.custom_function
def power_of_negative(z: mx.array) -> mx.array:
    """2^z of z up to 0, with one operation less."""
    return _power(mx.maximum(z, -126.0))


def _slope(z: mx.array, gradient: mx.array, y: mx.array) -> mx.array:
    return gradient * y * math.log(2)


power.vjp(_slope)
power_of_negative.vjp(_slope)


def _power(z: mx.array) -> mx.array:
    """2^z = 2^n 2^f."""
    n, f = _divided(z)
    return _raised(f, _exponent(n))


@mx.custom_function
def gated(x: mx.array, y: mx.array) -> mx.array:
    """x sigmoid(y), which is x / (1 + 2^z)."""
    n, f = _divided(mx.clip(y * -_OF_E, -126.0, 127.4))
    return _over(x, f, _exponent(n))


@gated.vjp
def _(inputs: tuple[mx.array, ...], gradient: mx.array, result: mx.array) -> tuple[mx.array, ...]:
    s = sigmoid(inputs[1])
    return gradient * s, gradient * result * (1 - s)


# Chains of few operations, since MLX compiles at most 11 in a row. The clipping is in none of them: g++ vectorises no
# maximum, since MLX's looks for NaN.


@fused
def _divided(z: mx.array) -> tuple[mx.array, mx.array]:
    """n, as the lowest bits of a number, and f."""
    n = z + _SHIFT
    return n, z - (n - _SHIFT)


def _exponent(n: mx.array) -> mx.array:
    """2^n, of these bits."""
    return mx.left_shift(n.view(mx.int32), 23).view(mx.float32)


def _fraction(f: mx.array) -> tuple[mx.array, mx.array]:
    """2^f, as what is above and below the line."""
    s = f * f
    t = (s * _HALF[2] + _HALF[1]) * s + _HALF[0]
    return t + f, t - f


@fused
def _raised(f: mx.array, power: mx.array) -> mx.array:
    above, below = _fraction(f)
    return above / below * power


@fused
def _over(x: mx.array, f: mx.array, power: mx.array) -> mx.array:
    above, below = _fraction(f)
    return x * below / (below + above * power)


def exp(x: mx.array) -> mx.array:
    return power(x * _OF_E)


def sigmoid(x: mx.array) -> mx.array:
    return 1 / (1 + exp(-x))


silu = _elementwise(lambda x: gated(x, x))
quick_gelu = _elementwise(lambda x: gated(x, 1.702 * x))


@_elementwise
def gelu_tanh(x: mx.array) -> mx.array:
    return gated(x, math.sqrt(8 / math.pi) * x * (1 + 0.044715 * x * x))


# --- erf: x p(x^2) / q(x^2), Eigen's coefficients

_P = (-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05)
_P += (-7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02)
_Q = (-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03, -1.42647390514189e-02)


@mx.custom_function
def erf(x: mx.array) -> mx.array:
    x = mx.clip(x, -4.0, 4.0)  # beyond, float32's erf is 1
    s = x * x
    p, q = s * _P[0] + _P[1], s * _Q[0] + _Q[1]
    for c in _P[2:]:
        p = p * s + c
    for c in _Q[2:]:
        q = q * s + c
    return x * p / q


@erf.vjp
def _(x: mx.array, gradient: mx.array, y: mx.array) -> mx.array:
    return gradient * exp(-x * x) * (2 / math.sqrt(math.pi))


def _gelu(x: mx.array) -> mx.array:
    return x * (0.5 + 0.5 * erf(x * math.sqrt(0.5)))


gelu = _elementwise(_gelu)
geglu = _elementwise(lambda x, gate: x * _gelu(gate))


# --- norm, attention, convolution


@cache
def _of_groups(c: int, groups: int, eps: float) -> tuple[mx.array, ...]:
    """Matrices of zeros and ones that add up the channels of each group, (1, c, groups), and that give each channel
    what is its group's, (1, groups, c); 0 and eps for each group."""
    member = np.repeat(np.eye(groups, dtype=np.float32), c // groups, axis=0)
    start = [np.full((1, 1, groups), value, np.float32) for value in (0, eps)]
    return tuple(mx.array(np.ascontiguousarray(a)) for a in (member[None], member.T[None], *start))


def group_norm(x: mx.array, weight: mx.array, bias: mx.array, groups: int, eps: float, silu: bool) -> mx.array:
    """Group norm over (B, ..., c), then SiLU if `silu`: three passes over the map, with numbers for each channel, which
    the last pass only multiplies and adds."""
    B, c = x.shape[0], x.shape[-1]
    y = x.reshape(B, -1, c)  # (B, N, c)
    rows, n = max(1, PART // (B * c)), y.shape[1] * (c // groups)
    to_groups, to_channels, nothing, eps = _of_groups(c, groups, eps)

    def total(f: Callable) -> mx.array:
        """The sum of f over pixels, (B, 1, c)."""
        return reduce(add, in_parts(lambda part: f(part).sum(1, keepdims=True), [y], 1, rows))

    centre = mx.addmm(nothing, total(lambda part: part), to_groups, alpha=1 / n) @ to_channels
    whole = y.shape[1] <= rows
    if whole:  # it stays in the cache
        y = y - centre
    squares = total(mx.square if whole else lambda part: mx.square(part - centre))
    # Infinity times the zeros of other groups would be no number.
    spread = mx.addmm(eps, mx.minimum(squares, _LARGEST), to_groups, alpha=1 / n)  # (B, 1, groups)
    scale = weight * (mx.rsqrt(spread) @ to_channels)
    shift = bias if whole else bias - centre * scale

    def apply(part: mx.array) -> mx.array:
        part = part * scale + shift
        if not silu:
            return part
        return part * mx.sigmoid(part) if x.size <= _FEW else gated(part, part)

    return _joined(in_parts(apply, [y], 1, rows), 1).reshape(x.shape)


def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """softmax(q k^T / sqrt(d)) v, as `layers.attention`: a head, or some rows of it, at a time. Scores lie transposed:
    MLX takes a maximum or a sum over columns side by side, but over rows one number after the other."""
    B, heads, N, d = q.shape
    M = k.shape[2]
    if B * heads * N * M <= _FEW:
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=d**-0.5)
        return y.swapaxes(1, 2).reshape(B, N, heads * d)
    # Each part would copy keys and values that do not lie in order.
    q, k, v = (mx.contiguous(x).reshape(B * heads, -1, d) for x in (q * (d**-0.5 * _OF_E), k, v))
    at_once, rows = max(1, PART // (N * M)), max(1, min(N, PART // M))
    if B * heads * N * M >= _SCORES:
        at_once = min(at_once, -(-B * heads // 2))

    ones = mx.ones((1, M))

    def of_heads(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        def attend(part: mx.array) -> mx.array:
            scores = k @ part.swapaxes(1, 2)  # (heads, M, rows)
            weights = power_of_negative(scores - mx.stop_gradient(scores.max(1, keepdims=True)))
            return (v.swapaxes(1, 2) @ weights) / (ones @ weights)

        return _joined(in_parts(attend, [q], 1, rows), 2)

    y = _joined(in_parts(of_heads, [q, k, v], 0, at_once), 0)  # (B heads, d, N)
    return y.reshape(B, heads * d, N).swapaxes(1, 2)


def _joined(parts: list[mx.array], axis: int) -> mx.array:
    return mx.concatenate(parts, axis=axis) if len(parts) > 1 else parts[0]


@mx.custom_function
def _nine(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    B, h, w, c = x.shape
    row, o = w + 2, weight.shape[0]
    kernel = weight.transpose(1, 2, 3, 0).reshape(9 * c, o)  # a view, of weights that lie `in_order`
    if h * w < _FEW_PIXELS:
        return mx.addmm(bias, ways.patches(x).reshape(-1, 9 * c), kernel).reshape(B, h, w, o)
    flat, taps, pixels = _bordered(x), mx.split(kernel, 9), _met(x)

    def of_pixels(flat: mx.array, first: int, last: int) -> mx.array:
        y = bias
        for i, tap in enumerate(taps):
            at = i // 3 * row + i % 3  # where the map begins that this tap of the kernel meets
            y = mx.addmm(y, flat[first + at : last + at], tap)
        return y

    parts = -(-pixels * o // PART)  # since the nine products add to what should stay in the cache
    parts += parts % 2 if _worth_both(x, weight) else 0
    ends = [pixels * i // parts for i in range(parts + 1)]
    return _without_border(_joined(in_turns(of_pixels, [(flat, *span) for span in pairwise(ends)]), 0), x)


# All samples of a map lie below each other, each with a border of zeros, as one matrix of pixels: a product for a tap
# of the kernel is of a slice of it. What it gives at the border means nothing.


def _bordered(x: mx.array) -> mx.array:
    """(B, h, w, c) -> (B (h + 2) (w + 2), c)."""
    return mx.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)]).reshape(-1, x.shape[-1])


def _met(x: mx.array) -> int:
    """How many pixels, from the first on, have another one two rows and two columns further on."""
    B, h, w, _ = x.shape
    return (B * (h + 2) - 2) * (w + 2) - 2


def _without_border(y: mx.array, x: mx.array) -> mx.array:
    """Of what was made of so many pixels of x, (n, o), those of the map, (B, h, w, o)."""
    (B, h, w, _), o = x.shape, y.shape[-1]
    row = (w + 2) * o
    return mx.as_strided(y, (B, h, w, o), ((h + 2) * row, row, o, 1))


def _worth_both(x: mx.array, weight: mx.array) -> bool:
    """Whether a convolution of this map is worth two cores."""
    return x.size * weight.size // x.shape[-1] >= _PRODUCTS


@_nine.vjp
def _(inputs: tuple[mx.array, ...], gradient: mx.array, y: mx.array) -> tuple[mx.array, ...]:
    return tuple(mx.vjp(lambda x, weight, bias: mx.conv2d(x, weight, padding=1) + bias, inputs, [gradient])[1])


def conv3x3(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """A convolution with a kernel of 3 x 3, padded by one pixel. weight: (o, 3, 3, c), bias: (o)."""
    few = x.shape[1] * x.shape[2] < (_PIXELS if weight.shape[0] <= _MANY else _PIXELS_OF_MANY)
    if few and weight.size > _KERNEL:
        y = mx.conv2d(x, weight, padding=1)
        return y if bias is None else y + bias
    return _nine(x, weight, mx.zeros(weight.shape[0]) if bias is None else bias)


# Which of a kernel's three taps along an axis are added up for each of the two pixels that an even, and an odd, pixel
# of the doubled map meets; and the same for both axes: (16, 9).
_MET = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)
_OF_DOUBLED = np.einsum("ika,jlb->ijklab", _MET, _MET).reshape(16, 9)


@mx.custom_function
def conv3x3_of_doubled(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """The same of a map whose pixels are doubled along both axes, (B, 2 h, 2 w, o). A row of the result meets two rows
    of x, not three, since two of the three are the same: so each of the four kinds of pixels, by even and odd rows and
    columns, has four products whose weights are sums of the kernel's. That is 16 products of x in place of 36."""
    B, h, w, c = x.shape
    row, o = w + 2, weight.shape[0]
    flat, pixels = _bordered(x), _met(x)
    sums = mx.array(_OF_DOUBLED) @ weight.transpose(1, 2, 3, 0).reshape(9, c * o)
    taps = mx.split(sums.reshape(16 * c, o), 16)

    def of_rows(flat: mx.array, odd: int) -> mx.array:
        columns = []
        for odd_column in range(2):
            y = bias
            for k in range(4):  # of two rows and two columns
                at = (k // 2 + odd) * row + k % 2 + odd_column
                y = mx.addmm(y, flat[at : at + pixels], taps[8 * odd + 4 * odd_column + k])
            columns.append(_without_border(y, x))
        return mx.concatenate(columns, axis=-1).reshape(B, h, 1, 2 * w * o)

    calls = [(flat, 0), (flat, 1)]
    both = in_turns(of_rows, calls) if _worth_both(x, weight) else [of_rows(*call) for call in calls]
    return mx.concatenate(both, axis=2).reshape(B, 2 * h, 2 * w, o)


@conv3x3_of_doubled.vjp
def _(inputs: tuple[mx.array, ...], gradient: mx.array, y: mx.array) -> tuple[mx.array, ...]:
    return tuple(mx.vjp(lambda x, *rest: _nine(doubled(x), *rest), inputs, [gradient])[1])


def doubled(x: mx.array) -> mx.array:
    """Each pixel twice along both axes, (B, 2 h, 2 w, c)."""
    B, h, w, c = x.shape
    return mx.broadcast_to(x[:, :, None, :, None], (B, h, 2, w, 2, c)).reshape(B, 2 * h, 2 * w, c)


def in_order(weight: mx.array) -> mx.array:
    """The same kernel, with memory in the order in which its nine taps are read."""
    return mx.contiguous(weight.transpose(1, 2, 3, 0)).transpose(3, 0, 1, 2)


def suits_doubled(x: mx.array) -> bool:
    """Whether a convolution of the doubled map is computed that way. Of a small map, its products would be small."""
    return suits("convolution", x) and x.shape[1] * x.shape[2] >= _DOUBLED
