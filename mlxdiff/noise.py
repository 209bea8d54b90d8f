"""Noise: a seed -> standard normals in float32, drawn in torch's order (B, c, h, w). A second draw continues the first.

"torch": the numbers of torch.Generator("cpu"), a Mersenne Twister with the Box-Muller transform, so a seed means the
same picture as in diffusers. "nv": the numbers of CUDA's generator, Philox 4x32-10 (Salmon et al. 2011), as in A1111.
"mlx": mx.random with a key."""

import math
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from .errors import Error

Draw = Callable[[tuple[int, ...]], np.ndarray]


def torch_cpu(seed: int) -> Draw:
    """torch.randn on the CPU. The uniforms are equal bit for bit; logarithm and cosine may differ in the last bits."""
    twister = np.random.RandomState(seed % 2**32)  # torch keeps the low 32 bits; both seed the Twister in the same way
    kept: list[float] = []  # the second number of a pair, which torch's generator keeps for the next small draw

    def bits(n: int) -> np.ndarray:
        return twister.randint(0, 2**32, n, dtype=np.uint32)

    def blocks(n: int) -> np.ndarray:
        """n uniforms -> n // 16 blocks of 16 normals, value j paired with j + 8; float32 throughout, as torch is."""
        u = (bits(n) & 0xFFFFFF).astype(np.float32)[: n - n % 16].reshape(-1, 2, 8) * np.float32(2**-24)
        radius, angle = np.sqrt(-2 * np.log(1 - u[:, 0])), np.float32(2 * math.pi) * u[:, 1]
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()

    def one() -> float:
        if not kept:
            a, b, c, d = (int(r) for r in bits(4))
            u, v = ((hi << 32 | lo) % 2**53 * 2**-53 for hi, lo in ((a, b), (c, d)))
            radius, angle = math.sqrt(-2 * math.log1p(-v)), 2 * math.pi * u
            kept.append(radius * math.sin(angle))
            return radius * math.cos(angle)
        return kept.pop()

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        n = math.prod(shape)
        if n < 16:  # torch's path for a few values, in double precision
            x = np.array([one() for _ in range(n)], np.float32)
        else:
            x = blocks(n)
            if n % 16:  # torch redraws the last 16 values if the count is no multiple of 16
                x = np.concatenate([x[: n - 16], blocks(16)])
        return x.reshape(shape)

    return draw


def philox(counter: np.ndarray, key: int) -> np.ndarray:
    """Philox 4x32-10. counter: (4, n) 32-bit words, key: 64 bits -> (4, n) random 32-bit words."""
    c0, c1, c2, c3 = counter.astype(np.uint64)
    k0, k1 = key % 2**32, key >> 32
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack([c0, c1, c2, c3])


def cuda(seed: int) -> Draw:
    """torch.randn on CUDA: value i of draw k is the first normal of Philox subsequence i at offset k.

    This holds on any card that has a resident thread for each value (an RTX 3090 has 125,952; SDXL at 1024 x 1024 needs
    65,536). For more values torch's numbers depend on the card; these numbers continue as A1111's do."""
    draws = 0

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        nonlocal draws
        counter = np.zeros((4, math.prod(shape)), np.uint64)
        counter[0], counter[2] = draws, np.arange(counter.shape[1])
        draws += 1
        u, v = (philox(counter, seed % 2**64)[:2] + 0.5) * 2**-32
        return (np.sqrt(-2 * np.log(u)) * np.sin(2 * math.pi * v)).astype(np.float32).reshape(shape)

    return draw


def mlx_key(seed: int) -> Draw:
    """mx.random.normal; each draw splits the key once."""
    key = mx.random.key(seed)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        nonlocal key
        key, now = mx.random.split(key)
        return np.array(mx.random.normal(shape, key=now))

    return draw


SOURCES: dict[str, Callable[[int], Draw]] = {"torch": torch_cpu, "nv": cuda, "mlx": mlx_key}


class Noise:
    """The normals of one seed: `draw(shape)` gives float32, and the next draw continues where the last one stopped."""

    def __init__(self, seed: int, kind: str = "torch"):
        if kind not in SOURCES:
            raise Error(f"There is no noise {kind!r}.", fix=f"Use one of {', '.join(SOURCES)}.")
        self.draw = SOURCES[kind](seed)


def draw_nhwc(noises: list[Noise], h: int, w: int, c: int) -> mx.array:
    """One latent of noise per image, each from its own seed: (B, h, w, c). An image has the same noise alone and in a
    batch."""
    return mx.array(np.concatenate([noise.draw((1, c, h, w)) for noise in noises])).transpose(0, 2, 3, 1)
