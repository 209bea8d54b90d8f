"""Layers that several networks share: norms, attention, time embedding, residual and resampling blocks. Maps are (B, h,
w, c), parameter names are diffusers'. Every layer returns the dtype of its input; only norm statistics, sinusoids and
elementwise kernels compute in float32 inside."""

import math
from collections.abc import Callable
from copy import copy
from functools import partial
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from . import cpu, metal, ways
from .ways import fused

FUSED = (64, 72, 80, 96, 128)  # head widths of Metal's fused attention kernel
SCORES = 1 << 24  # bytes of attention scores per piece if no fused kernel runs; MLX queues about ten pieces
GPU_SCORES = 1 << 28  # the same on a GPU, which runs one piece after the other
PARTS = 16  # of a map that one kernel of a group norm adds up on a GPU; MLX fuses at most 24 arrays
FEW = 4096  # pixels of such a sum that a GPU adds up together with a group's channels


@cpu.rather(cpu.silu)
@fused
def silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


@cpu.rather(cpu.gelu)
@fused
def gelu(x: mx.array) -> mx.array:
    return x * (1 + mx.erf(x / math.sqrt(2))) / 2


@cpu.rather(cpu.quick_gelu)
@fused
def quick_gelu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(1.702 * x)


@cpu.rather(cpu.geglu)
@fused
def geglu(x: mx.array, gate: mx.array) -> mx.array:
    return x * gelu(gate)


def _wide(x: mx.array, shift: mx.array | None) -> mx.array:
    x = x.astype(mx.float32)
    return x if shift is None else x + shift


def _sum(maps: list[mx.array]) -> mx.array:
    """Their sum, in pairs: a long chain would be cut into several kernels."""
    while len(maps) > 1:
        maps = [a + b for a, b in zip(maps[::2], maps[1::2], strict=True)]
    return maps[0]


@fused
def summed(shift: mx.array | None, *parts: mx.array) -> mx.array:
    return _sum([_wide(x, shift) for x in parts])


@fused
def squares(total: mx.array, per: mx.array, shift: mx.array | None, *parts: mx.array) -> mx.array:
    return _sum([mx.square(_wide(x, shift) - total * per) for x in parts])


@fused
def normed(x: mx.array, shift: mx.array | None, total, square, per, weight, bias, eps: float) -> mx.array:
    return ((_wide(x, shift) - total * per) * mx.rsqrt(square * per + eps) * weight + bias).astype(x.dtype)


@fused
def normed_silu(x: mx.array, shift: mx.array | None, total, square, per, weight, bias, eps: float) -> mx.array:
    y = (_wide(x, shift) - total * per) * mx.rsqrt(square * per + eps) * weight + bias
    return (y * mx.sigmoid(y)).astype(x.dtype)


@fused
def around(total: mx.array, per: mx.array, shift: mx.array | None, rows: int, sums: mx.array, spread: mx.array):
    """Squared distances from a group's mean, of those from the means of parts of `rows` pixels."""
    return spread + mx.square(_wide(sums / rows, shift) - total * per) * rows


class GroupNorm(nn.Module):
    """Group norm over (B, ..., c), then SiLU if `silu`. It takes two sums for the mean, two for the variance, and one
    pass that applies them, without transposed copies. On a GPU, one kernel first adds up parts of the map, so that no
    whole map is written for a sum; it also adds the shift, for the same reason. Pixels are summed before a group's
    channels, which gives a GPU a thread a channel, unless few are left."""

    def __init__(self, groups: int, c: int, eps: float, silu: bool = False):
        super().__init__()
        self.weight, self.bias = mx.ones(c), mx.zeros(c)
        self.groups, self.eps = groups, eps
        self.apply_to = normed_silu if silu else normed

    def __call__(self, x: mx.array, shift: mx.array | None = None) -> mx.array:
        """shift: added to x first, (c) or (B or 1, 1, 1, c)."""
        gpu = mx.default_device() == mx.gpu
        if shift is not None and not gpu:  # a CPU would add it in each of the passes
            x, shift = x + shift, None
        if cpu.suits("group norm", x):
            return cpu.group_norm(x, self.weight, self.bias, self.groups, self.eps, self.apply_to is normed_silu)
        y = x.reshape(x.shape[0], -1, self.groups, x.shape[-1] // self.groups)  # (B, N, groups, c / groups)
        shift = None if shift is None else shift.reshape(-1, 1, *y.shape[2:])
        per = mx.array(1 / (y.shape[1] * y.shape[3]))

        def over_groups(z: mx.array) -> mx.array:  # (B, 1, groups, 1)
            together = gpu and z.shape[1] <= FEW
            return z.sum((1, 3), keepdims=True) if together else z.sum(1, keepdims=True).sum(3, keepdims=True)

        if gpu and ways.chosen("moments", x.shape[-1], y.shape[1]):
            sums, spread = metal.moments(y)
            rows = y.shape[1] // sums.shape[1]
            total = over_groups(sums if shift is None else sums + rows * shift)
            square = over_groups(around(total, per, shift, rows, sums, spread))
        else:
            parts = mx.split(y, math.gcd(y.shape[1], PARTS), axis=1) if gpu else [y]
            total = over_groups(summed(shift, *parts))
            square = over_groups(squares(total, per, shift, *parts))
        weight, bias = self.weight.reshape(self.groups, -1), self.bias.reshape(self.groups, -1)
        return self.apply_to(y, shift, total, square, per, weight, bias, self.eps).reshape(x.shape)


def pad_heads(x: mx.array) -> mx.array:
    """Pad the last axis with zeros to a width of the fused kernel. This changes neither the scores nor the output."""
    d = x.shape[-1]
    width = d if _unpadded(d, x) else next((n for n in FUSED if n >= d and not _slow(n)), d)
    return x if width == d else mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - d)])


def _unpadded(d: int, x: mx.array) -> bool:
    return cpu.suits("attention", x) or (d < FUSED[0] and ways.chosen("unpadded", d))


def _slow(width: int) -> bool:
    """Whether heads of the next width were measured to be faster. M5's matrix units take no heads of 72 and 80."""
    return width in (72, 80) and ways.chosen("wider", width)


def attention(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | str | None = None) -> mx.array:
    """softmax(q k^T / sqrt(d)) v. q: (B, heads, N, d); k, v: (B, heads, M, d), padded or not -> (B, N, heads * d)."""
    B, heads, N, d = q.shape
    if mask is None and cpu.suits("attention", q):
        return cpu.attention(q, k, v)
    q, k, v = pad_heads(q), pad_heads(k), pad_heads(v)
    attend = partial(mx.fast.scaled_dot_product_attention, k=k, v=v, scale=d**-0.5, mask=mask)
    gpu = mx.default_device() == mx.gpu
    fused = q.shape[-1] in FUSED and gpu
    rows = max(1, (GPU_SCORES if gpu else SCORES) // (B * heads * k.shape[2] * q.itemsize))
    by_row = isinstance(mask, str) or (mask is not None and mask.shape[-2] > 1)  # then a part would need its own rows
    out = attend(q) if fused or by_row or rows >= N else in_turn(attend, q, rows)
    return out[..., :d].swapaxes(1, 2).reshape(B, N, heads * d)


def in_turn(attend, q: mx.array, rows: int) -> mx.array:
    """Attention over `rows` queries at a time. Each part waits for the previous one: otherwise MLX may make the scores
    of all parts before the first softmax (twice the memory was measured)."""
    parts: list[mx.array] = []
    for i in range(0, q.shape[2], rows):
        part = q[:, :, i : i + rows]
        parts.append(attend(mx.depends(part, parts[-1]) if parts else part))
    return mx.concatenate(parts, axis=2)


def split_heads(x: mx.array, heads: int) -> mx.array:
    B, N, _ = x.shape
    return x.reshape(B, N, heads, -1).swapaxes(1, 2)  # (B, heads, N, d)


Shown = dict[int, tuple[mx.array, mx.array]]  # what an IP-Adapter gives: keys and values for layers of a denoiser
Span = tuple[float, float]  # times: on from the first down to the second, which is excluded


def shows(span: Span, t: float | mx.array) -> bool:
    """Whether a span is on at a time. Times per sample, as in training, are in all spans."""
    return isinstance(t, mx.array) or span[0] >= t > span[1]


@cpu.on_two_cores
def by_sample(layer: nn.Module, x: mx.array) -> mx.array:
    """layer(x), of which a CPU computes half of the batch on each core."""
    return layer(x)


class Attention(nn.Module):
    """Multi-head attention. `kv` is separate from the call, so that a constant text needs them only once."""

    def __init__(self, c: int, context: int, heads: int, bias: bool):
        super().__init__()
        self.to_q = nn.Linear(c, c, bias=bias)
        self.to_k = nn.Linear(context, c, bias=bias)
        self.to_v = nn.Linear(context, c, bias=bias)
        self.to_out = [nn.Linear(c, c)]
        self.heads = heads

    def kv(self, context: mx.array) -> tuple[mx.array, mx.array]:
        return self.of_heads(by_sample(self.to_k, context), by_sample(self.to_v, context))

    def of_heads(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        return pad_heads(split_heads(k, self.heads)), pad_heads(split_heads(v, self.heads))

    def __call__(self, x: mx.array, kv: tuple[mx.array, ...]) -> mx.array:
        """kv: keys and values of the text, then those of each IP-Adapter; each has a softmax of its own."""
        return self.of_keys(x, *kv)

    @cpu.on_two_cores
    def of_keys(self, x: mx.array, *kv: mx.array) -> mx.array:
        q = split_heads(self.to_q(x), self.heads)
        y = attention(q, *kv[:2])
        for k, v in zip(kv[2::2], kv[3::2], strict=True):
            y = y + attention(q, k, v)
        return self.to_out[0](y)


def sinusoids(t: mx.array, dim: int, flip_sin_to_cos: bool, freq_shift: int) -> mx.array:
    """Time as waves, (...) -> (..., dim) float32. Ho et al. 2020; the two options are diffusers'."""
    half = dim // 2
    freqs = mx.array([math.exp(-math.log(10000) * i / (half - freq_shift)) for i in range(half)])
    angles = t.astype(mx.float32)[..., None] * freqs
    waves = [mx.sin(angles), mx.cos(angles)]
    return mx.concatenate(waves[::-1] if flip_sin_to_cos else waves, axis=-1)


class TimeEmbedding(nn.Module):
    """A two-layer MLP; `cond_proj` adds LCM's guidance embedding."""

    def __init__(self, dim: int, width: int, cond: int | None = None):
        super().__init__()
        self.linear_1 = nn.Linear(dim, width)
        self.linear_2 = nn.Linear(width, width)
        if cond is not None:
            self.cond_proj = nn.Linear(cond, dim, bias=False)

    def __call__(self, x: mx.array, cond: mx.array | None = None) -> mx.array:
        if cond is not None:
            x = x + self.cond_proj(cond)
        return self.linear_2(silu(self.linear_1(x)))


@fused
def added(x: mx.array, bias: mx.array, y: mx.array) -> mx.array:
    return x + bias + y


def conv3x3(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """A convolution with a kernel of 3 x 3, padded by one pixel. weight: (o, 3, 3, c)."""
    if cpu.suits("convolution", x):
        return cpu.conv3x3(x, weight, bias)
    if min(weight.shape[0], x.shape[-1]) >= ways.MANY and ways.chosen("unfold", x.shape[-1], x.shape[1] * x.shape[2]):
        return ways.unfold(x, weight, bias)
    y = mx.conv2d(x, weight, padding=1)
    return y if bias is None else y + bias


class Conv3x3(nn.Conv2d):
    def __init__(self, c_in: int, c: int, bias: bool = True):
        super().__init__(c_in, c, 3, padding=1, bias=bias)

    @cpu.on_two_cores
    def __call__(self, x: mx.array) -> mx.array:
        return conv3x3(x, self.weight, self.get("bias"))

    def without_bias(self, x: mx.array) -> mx.array:
        return conv3x3(x, self.weight)


def order_kernels(network: nn.Module) -> None:
    """Put the kernels of a small network in the order in which a CPU reads them. In a large network, that is a small
    part of a convolution's time."""
    for layer in network.modules():
        if isinstance(layer, Conv3x3) and cpu.suits("convolution", layer.weight):
            layer.weight = cpu.in_order(layer.weight)


class ResBlock(nn.Module):
    """Two convolutions and a skip. `shift`, (B or 1, c), comes from `time_shift` and is added between them."""

    def __init__(self, c_in: int, c: int, groups: int, eps: float, time: int | None = None):
        super().__init__()
        self.norm1 = GroupNorm(groups, c_in, eps, silu=True)
        self.conv1 = Conv3x3(c_in, c)
        if time is not None:
            self.time_emb_proj = nn.Linear(time, c)
        self.norm2 = GroupNorm(groups, c, eps, silu=True)
        self.conv2 = Conv3x3(c, c)
        if c_in != c:
            self.conv_shortcut = nn.Linear(c_in, c)  # a 1x1 convolution in the file

    def time_shift(self, emb: mx.array) -> mx.array:
        return self.time_emb_proj(emb) + self.conv1.bias  # with the bias included: one pass over the map, not two

    def __call__(self, x: mx.array, shift: mx.array | None = None) -> mx.array:
        shift = self.conv1.bias[None] if shift is None else shift
        return self.of_shift(x, shift[:, None, None])

    @cpu.on_two_cores
    def of_shift(self, x: mx.array, shift: mx.array) -> mx.array:
        h = self.norm2(self.conv1.without_bias(self.norm1(x)), shift)
        skip = self.conv_shortcut(x) if "conv_shortcut" in self else x
        if mx.default_device() == mx.gpu:
            return added(self.conv2.without_bias(h), self.conv2.bias, skip)
        return self.conv2(h) + skip


class Downsample(nn.Module):
    def __init__(self, c: int, padding: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2, padding=padding)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(x)


class Upsample(nn.Module):
    """Double each pixel along both axes, cut the map to (h, w) (the skip's map may be odd), then convolve."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = Conv3x3(c, c)

    def __call__(self, x: mx.array, h: int, w: int) -> mx.array:
        whole = (h, w) == (2 * x.shape[1], 2 * x.shape[2])
        if whole and type(self.conv) is Conv3x3 and cpu.suits_doubled(x):  # an adapter may have put another layer there
            return cpu.conv3x3_of_doubled(x, self.conv.weight, self.conv.bias)
        return self.conv(cpu.doubled(x)[:, :h, :w])


def split_linear(layer: nn.Module, x: mx.array, *ends: int) -> list[mx.array]:
    """What a Linear layer gives, in parts that end here; one more is the rest. Each is a product of its own and lies in
    memory as one block: parts of a whole would be copied by the norms that read them, and all be held as long as one of
    them."""
    if not isinstance(layer, nn.Linear | nn.QuantizedLinear):  # one that an adapter changes
        return mx.split(layer(x), ends, axis=-1)
    return [_rows(layer, x, *span) for span in pairwise((0, *ends, layer.weight.shape[0]))]


def _rows(layer: nn.Linear | nn.QuantizedLinear, x: mx.array, first: int, end: int) -> mx.array:
    part = copy(layer)
    for name, value in layer.items():
        if isinstance(value, mx.array):
            part[name] = value[first:end]
    return part(x)


def side_by_side(layer: nn.Module, *parts: mx.array) -> mx.array:
    """A Linear layer of parts side by side, which are not copied together: each meets its columns of the weights. Those
    of a quantized layer cannot be taken apart."""
    if not isinstance(layer, nn.Linear):
        return layer(mx.concatenate(parts, axis=-1))
    y, first = layer.bias if "bias" in layer else None, 0
    for x in parts:
        weight = layer.weight[:, first : first + x.shape[-1]].T
        y, first = x @ weight if y is None else mx.addmm(y, x, weight), first + x.shape[-1]
    return y


@cpu.rather(cpu.gelu_tanh)
@fused
def gelu_tanh(x: mx.array) -> mx.array:
    """GELU in its tanh form (Hendrycks and Gimpel 2016), by (1 + tanh z) / 2 = sigmoid(2 z)."""
    y = x.astype(mx.float32)
    return (y * mx.sigmoid(math.sqrt(8 / math.pi) * y * (1 + 0.044715 * y * y))).astype(x.dtype)


@fused
def gated(x: mx.array, gate: mx.array, y: mx.array) -> mx.array:
    """x + gate * y. float16 is clipped, as in the references, because the text of a diffusion transformer overflows."""
    z = x.astype(mx.float32) + gate.astype(mx.float32) * y
    if x.dtype == mx.float16:
        z = mx.clip(z, -65504, 65504)
    return z.astype(x.dtype)


def modulation(y: mx.array, n: int) -> list:
    """The output of adaLN's layer, (..., 3 n d) -> n times ((scale, shift), gate) in one list, (..., 1, d) each. A
    scale has 1 added, so that it can be a norm's weight (Peebles and Xie 2022)."""
    parts = iter(mx.split(y[..., None, :], 3 * n, axis=-1))
    mods: list = []
    for shift, scale, gate in zip(parts, parts, parts, strict=True):
        mods += [(1 + scale, shift), gate]
    return mods


def of_time(mods: list | tuple, i: int) -> list | tuple:
    """The modulations of the i-th time, as views. Indexing by an integer would cost a gather for each."""
    return tree_map(lambda m: m[i : i + 1].squeeze(0), mods)


def at_time(t: float | mx.array, times: dict[float, int], mods: list | tuple | None, make: Callable) -> list | tuple:
    """The modulations at a time t, a float or one per sample (B,): those that `prepare` made, if it knew that time,
    else those of make(t), for t (B or 1,)."""
    if isinstance(t, mx.array) or t not in times:
        return make(mx.array(t).reshape(-1))
    return of_time(mods, times[t])


@fused
def affine(x: mx.array, a: mx.array, b: mx.array) -> mx.array:
    return (x.astype(mx.float32) * a + b).astype(x.dtype)


def adaptive_norm(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    """Layer norm with given weight and bias, (B or 1, 1, d) each. It is one kernel if all samples share them."""
    if scale.shape[0] == 1:
        return mx.fast.layer_norm(x, scale.reshape(-1), shift.reshape(-1), eps=1e-6)
    return affine(mx.fast.layer_norm(x, None, None, eps=1e-6), scale, shift)


# A text encoder's residual stream exceeds float16's range, and so does the output of its MLP. So the stream is float32,
# and the input of the MLP's last layer is scaled down by a power of two; weights and matmuls keep the model's dtype.
SHRINK = 2.0**-6  # the output may then reach 4e6 in float16, and numbers down to 4e-3 stay exact


@fused
def add_shrunk(x: mx.array, y: mx.array) -> mx.array:
    return x + y.astype(mx.float32) / SHRINK


class StreamNorm(nn.RMSNorm):
    """RMS norm from the float32 stream to the model's dtype."""

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x).astype(self.weight.dtype)


def pack(x: mx.array) -> mx.array:
    """(B, h, w, c) -> (B, h/2 * w/2, 4 c): 2 x 2 patches; each begins with the four values of its first channel."""
    B, h, w, c = x.shape
    x = x.reshape(B, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(B, (h // 2) * (w // 2), 4 * c)


def unpack(x: mx.array, h: int, w: int) -> mx.array:
    x = x.reshape(x.shape[0], h // 2, w // 2, -1, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(x.shape[0], h, w, -1)
