"""Layers for MLX's CPU backend, in float32, made of what it does fast there. On Linux, exp, sigmoid, tanh and erf take
12 to 22 ns a number, since they are not vectorised; sums, products and shifts of bits take 0.2 ns while arrays fit
into the processor's cache, and 2.3 ns beyond. A convolution copies its map nine times before it multiplies. So here a
function is a polynomial, a large map is taken in parts, and a convolution is nine products of a map that is not copied.
The results equal MLX's own within a few roundings, and gradients pass."""

import math
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps

import mlx.core as mx

from . import ways

PART = 1 << 18  # numbers worked on at a time: 1 MB, for the cache
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
_FEW = 1 << 13  # up to so many numbers, MLX's own function is as fast: twenty operations have a fixed cost
# Pixels of a map; in smaller ones a convolution's copies cost less than its nine products. With many channels they cost
# less also in larger ones: 5 % less at 32 x 32 and 320.
_PIXELS, _MANY, _PIXELS_OF_MANY = 1 << 10, 256, 1 << 12


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
    """f of slices of the arrays, `rows` along the axis, on two cores in turns. On each, a part waits for the previous
    one: MLX would begin several, and their arrays would not stay in the cache."""
    parts, cores = [], min(_CORES, 2)
    for n, i in enumerate(range(0, arrays[0].shape[axis], rows)):
        first, *rest = (_sliced(x, axis, i, rows) for x in arrays)
        with _second_core() if n % cores else nullcontext():
            parts.append(f(mx.depends(first, parts[-cores]) if n >= cores else first, *rest))
    return parts


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

# Numbers of a map whose samples are worth a core each. Handing an operation to a core costs as much as it does with
# 2^15 numbers; and of more than 2^20, matrix products are a network's largest part, which have threads of their own.
_SHARED = range(1 << 16, 1 << 20)
_here = threading.local()  # of each thread, the stream beside its default one


def _second_core() -> AbstractContextManager:
    """Where operations are computed beside those outside of it: MLX has a thread for each stream."""
    if not hasattr(_here, "beside"):
        _here.beside = mx.new_stream(mx.cpu)
    return mx.stream(_here.beside)


def by_sample(layer: Callable) -> Callable:
    """A layer's call, (self, x, ...), that computes two halves of a batch beside each other, on a core each."""

    @wraps(layer)
    def call(self, x: mx.array, *arrays: mx.array) -> mx.array:
        alone = self.training or x.shape[0] % 2 or x.size not in _SHARED or not suits("convolution", x)
        if alone or _CORES < 2:
            return layer(self, x, *arrays)
        first, second = zip(*(_halves(a, x.shape[0]) for a in (x, *arrays)), strict=True)
        with _second_core():
            second = layer(self, *second)
        return mx.concatenate([layer(self, *first), second])

    return call


def _halves(x: mx.array, B: int) -> list[mx.array]:
    """Of an array of B samples; one that all samples share stays whole."""
    return mx.split(x, 2) if x.shape[0] == B else [x, x]


# --- exp, and what follows from it

# 2^f for f in -1/2 to 1/2, the lowest power first: fitted to the least greatest relative error, which is 7.5e-8.
_POWER = (1.000000072, 0.6931469671, 0.2402211974, 0.0555071331, 0.009675540363, 0.001327645459)
_OF_E = 1 / math.log(2)  # e^x = 2^(x times this)
_SHIFT = 1.5 * 2.0**23  # added to a number, it leaves the nearest integer in the lowest bits


@mx.custom_function
def power(z: mx.array) -> mx.array:
    """2^z = 2^n 2^f: n goes into the exponent's bits. It stays between 1e-38 and 3e38: it is never 0 or infinite."""
    z = mx.clip(z, -126.0, 127.9)
    n = z + _SHIFT
    f, p = z - (n - _SHIFT), _POWER[-1]
    for c in _POWER[-2::-1]:
        p = p * f + c
    return (p.view(mx.int32) + mx.left_shift(n.view(mx.int32), 23)).view(mx.float32)


@power.vjp
def _(z: mx.array, gradient: mx.array, y: mx.array) -> mx.array:
    return gradient * y * math.log(2)


def exp(x: mx.array) -> mx.array:
    return power(x * _OF_E)


def sigmoid(x: mx.array) -> mx.array:
    return 1 / (1 + exp(-x))


def _silu(x: mx.array) -> mx.array:
    return x / (1 + exp(-x))


silu = _elementwise(_silu)
quick_gelu = _elementwise(lambda x: x / (1 + exp(-1.702 * x)))


@_elementwise
def gelu_tanh(x: mx.array) -> mx.array:
    return x / (1 + exp(-math.sqrt(8 / math.pi) * x * (1 + 0.044715 * x * x)))


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


def group_norm(x: mx.array, weight: mx.array, bias: mx.array, groups: int, eps: float, silu: bool) -> mx.array:
    """Group norm over (B, ..., c), then SiLU if `silu`: three passes over the map, with numbers for each channel, which
    the last pass only multiplies and adds."""
    B, c = x.shape[0], x.shape[-1]
    y = x.reshape(B, -1, c)  # (B, N, c)
    rows, N = max(1, PART // (B * c)), y.shape[1]

    def mean(f: Callable) -> mx.array:
        """The mean of f over pixels and a group's channels, for each channel, (B, 1, c)."""
        total = sum(in_parts(lambda part: f(part).sum(1, keepdims=True), [y], 1, rows))
        of_group = total.reshape(B, groups, -1).sum(2, keepdims=True) * (groups / (N * c))
        return mx.broadcast_to(of_group, (B, groups, c // groups)).reshape(B, 1, c)

    centre = mean(lambda part: part)
    scale = weight * mx.rsqrt(mean(lambda part: mx.square(part - centre)) + eps)
    shift, few = bias - centre * scale, x.size <= _FEW
    to_power = scale * -_OF_E, shift * -_OF_E  # z, with 2^z = e^-y of the norm's result y

    def apply(part: mx.array) -> mx.array:
        if few or not silu:
            part = part * scale + shift
            return part * mx.sigmoid(part) if silu else part
        z = part * to_power[0] + to_power[1]
        return z * (-1 / _OF_E) / (1 + power(z))

    parts = in_parts(apply, [y], 1, rows)
    return (mx.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]).reshape(x.shape)


def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """softmax(q k^T / sqrt(d)) v, as `layers.attention`: a head, or some rows of it, at a time."""
    B, heads, N, d = q.shape
    M = k.shape[2]
    if B * heads * N * M <= _FEW:
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=d**-0.5)
        return y.swapaxes(1, 2).reshape(B, N, heads * d)
    # Each part would copy keys and values that do not lie in order.
    q, k, v = (mx.contiguous(x).reshape(B * heads, -1, d) for x in (q * (d**-0.5 * _OF_E), k, v))
    at_once, rows = max(1, PART // (N * M)), max(1, min(N, PART // M))

    def of_heads(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        def attend(part: mx.array) -> mx.array:
            scores = part @ k.swapaxes(1, 2)
            weights = power(scores - mx.stop_gradient(scores.max(-1, keepdims=True)))
            return (weights @ v) / weights.sum(-1, keepdims=True)

        parts = in_parts(attend, [q], 1, rows)
        return mx.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]

    parts = in_parts(of_heads, [q, k, v], 0, at_once)
    y = mx.concatenate(parts, axis=0) if len(parts) > 1 else parts[0]
    return y.reshape(B, heads, N, d).swapaxes(1, 2).reshape(B, N, heads * d)


@mx.custom_function
def _nine(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    B, h, w, c = x.shape
    row, o = w + 2, weight.shape[0]
    # One row more at the end: the last products read two pixels beyond the map.
    flat = mx.pad(x, [(0, 0), (1, 2), (1, 1), (0, 0)]).reshape(B, (h + 3) * row, c)
    y = bias
    for i in range(3):
        for j in range(3):
            begin = i * row + j  # where the map begins that this tap of the kernel meets
            y = mx.addmm(y, flat[:, begin : begin + h * row], weight[:, i, j].T)
    return y.reshape(B, h, row, o)[:, :, :w]


@_nine.vjp
def _(inputs: tuple[mx.array, ...], gradient: mx.array, y: mx.array) -> tuple[mx.array, ...]:
    return tuple(mx.vjp(lambda x, weight, bias: mx.conv2d(x, weight, padding=1) + bias, inputs, [gradient])[1])


def conv3x3(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """A convolution with a kernel of 3 x 3, padded by one pixel. weight: (o, 3, 3, c), bias: (o)."""
    if x.shape[1] * x.shape[2] < (_PIXELS if weight.shape[0] <= _MANY else _PIXELS_OF_MANY):
        y = mx.conv2d(x, weight, padding=1)
        return y if bias is None else y + bias
    return _nine(x, weight, mx.zeros(weight.shape[0]) if bias is None else bias)
