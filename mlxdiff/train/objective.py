"""The training objective: mix a picture and noise at a level, and predict a target from the mixture. The level is
alpha_bar for "eps", "v" and "x0" (Ho et al. 2020; Salimans and Ho 2022) and sigma for "flow" (Liu et al. 2022)."""

import mlx.core as mx
import numpy as np

from ..schedules import q_sample

PREDICTIONS = ("eps", "v", "x0", "flow")


def levels(prediction: str, alpha_bar: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Uniforms (B,) in [0, 1) -> the times, which are the network's input, and their levels."""
    n = len(alpha_bar)
    if prediction == "flow":
        return 1000 * u, u
    t = np.minimum((u * n).astype(int), n - 1)
    return t, alpha_bar[t]


def mixture(prediction: str, x0: mx.array, noise: mx.array, level: mx.array) -> tuple[mx.array, mx.array]:
    """The network's input and its target. x0, noise (B, h, w, c); level (B,)."""
    a = level.reshape(-1, 1, 1, 1)
    if prediction == "flow":
        return (1 - a) * x0 + a * noise, noise - x0
    targets = {"eps": noise, "v": a**0.5 * noise - (1 - a) ** 0.5 * x0, "x0": x0}
    return q_sample(x0, noise, a), targets[prediction]


def weights(prediction: str, level: mx.array, gamma: float | None) -> mx.array:
    """min-SNR: for every prediction, the error in x0 has weight min(SNR, gamma) (Hang et al. 2023). None: all ones."""
    if gamma is None or prediction == "flow":
        return mx.ones_like(level)
    snr = level / (1 - level)
    per_x0 = {"eps": 1 / snr, "v": 1 / (snr + 1), "x0": mx.ones_like(snr)}
    return mx.minimum(snr, gamma) * per_x0[prediction]


def stratified(rng: np.random.Generator, n: int) -> np.ndarray:
    """n shuffled uniforms, one in each nth part of [0, 1), so that a batch has all noise levels."""
    return rng.permutation((np.arange(n) + rng.random()) / n)
