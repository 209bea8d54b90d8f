"""Kernels of our own for Metal. They could not be run where they were written: on a Mac, `mlxdiff tune` compares each
with the reference, times it, and only then lets it be used. A test runs their text as C++."""

import math
from functools import cache

import mlx.core as mx

PARTS = 64  # of a map, each of which is one thread's work for each channel

# One thread for each channel of each part: the sum of its `rows` numbers, and the sum of their squared distances from
# their own mean. It subtracts the first number from all: a mean that is large beside the spread would cost digits.
MOMENTS = """
    uint c = thread_position_in_grid.x;
    uint part = thread_position_in_grid.y;
    uint at = part * ROWS * C + c;
    float first = float(x[at]);
    float sum = 0.0f;
    float square = 0.0f;
    for (uint i = 0; i < ROWS; i++) {
        float y = float(x[at + i * C]) - first;
        sum += y;
        square += y * y;
    }
    total[part * C + c] = sum + ROWS * first;
    spread[part * C + c] = square - sum * (sum / ROWS);
"""


@mx.custom_function
def moments(x: mx.array) -> tuple[mx.array, mx.array]:
    """Of each part of the pixels of x (B, N, groups, n): the sum, and the sum of squared distances from the part's
    mean, (B, parts, groups, n) each, in float32. It reads x once."""
    B, N, groups, n = x.shape
    parts, c = math.gcd(N, PARTS), groups * n
    return run(
        inputs=[x],
        template=[("ROWS", N // parts), ("C", c)],
        grid=(c, B * parts, 1),
        threadgroup=(min(c, 256), 1, 1),
        output_shapes=[(B, parts, groups, n)] * 2,
        output_dtypes=[mx.float32] * 2,
    )


@moments.vjp
def _(x: mx.array, gradients: tuple[mx.array, mx.array], _) -> mx.array:
    return mx.vjp(reference, [x], list(gradients))[1][0]


def reference(x: mx.array) -> tuple[mx.array, mx.array]:
    """The same in MLX's own operations."""
    B, N, groups, n = x.shape
    y = x.reshape(B, math.gcd(N, PARTS), -1, groups, n).astype(mx.float32)
    return y.sum(2), mx.square(y - y.mean(2, keepdims=True)).sum(2)


@cache
def _kernel():
    return mx.fast.metal_kernel("mlxdiff_moments", ["x"], ["total", "spread"], MOMENTS)


def run(**how) -> tuple[mx.array, mx.array]:
    return tuple(_kernel()(**how))
