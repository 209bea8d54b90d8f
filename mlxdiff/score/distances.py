"""What is computed from features: CLIP scores, two distances between sets of pictures, and how sure a number is. Arrays
are numpy's, in float64: a distance is a small difference of large numbers. x: (n, d), y: (m, d)."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

SIGMA, SCALE = 10.0, 1000.0  # of CMMD, as its authors chose them
RESAMPLES = 200  # enough for the 2.5 % at either end
_BLOCK = 512  # rows of a kernel matrix that are in memory together

Progress = Callable[[int, int], None]


class Interval(NamedTuple):
    """In 95 of 100 cases the number for endlessly many such pictures is within."""

    low: float
    high: float


class Distance(NamedTuple):
    value: float
    interval: Interval
    chance: float  # of two sets of these sizes that are drawn from the same pictures, 95 % are closer


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def clip_scores(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """100 times the cosine between each picture and its text, at least 0 (Hessel et al. 2021, as it is now scaled)."""
    return 100 * np.maximum((unit(images) * unit(texts)).sum(-1), 0)


def mean_interval(values: np.ndarray, groups: np.ndarray, top: float | None = None, seed: int = 0) -> Interval:
    """Of the mean of values, by the bootstrap. What is in one group, such as the pictures of one prompt, is not
    independent, so whole groups are drawn; if there is only one, single values. top: the largest value, of which 0 is
    the least. Where all values are one of the two, no draw differs, and the rule of three holds: of n cases without an
    exception, up to 3 / n may be exceptions (Hanley and Lippman-Hand 1983)."""
    _, of = np.unique(groups, return_inverse=True)
    if of.max(initial=0) == 0:
        of = np.arange(len(values))
    n = of.max() + 1
    if top is not None and (values == top).all():
        return Interval(top * max(0.0, 1 - 3 / n), top)
    if top is not None and (values == 0).all():
        return Interval(0.0, top * min(1.0, 3 / n))
    sums, counts = np.bincount(of, values, n), np.bincount(of, minlength=n)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), 10 * RESAMPLES)  # (R, n)
    return Interval(*np.quantile(drawn @ sums / (drawn @ counts), (0.025, 0.975)).tolist())


def _quadratic(z: np.ndarray, weights: np.ndarray, progress: Progress | None) -> np.ndarray:
    """SCALE * w k w for each row w of `weights` (R, N), where k is the kernel matrix of z (N, d). Since each w sums up
    to 0, k - 1 gives the same, without losing digits."""
    squares, total = (z * z).sum(1), np.zeros(len(weights))
    for i in range(0, len(z), _BLOCK):
        far = squares[i : i + _BLOCK, None] + squares - 2 * z[i : i + _BLOCK] @ z.T
        k = np.expm1(-np.maximum(far, 0) / (2 * SIGMA**2))  # (block, N)
        total += ((weights @ k.T) * weights[:, i : i + _BLOCK]).sum(1)
        if progress is not None:
            progress(min(i + _BLOCK, len(z)), len(z))
    return SCALE * total


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """The Frechet distance of two sets of features, taken as Gaussians. Dowson and Landau 1982; Heusel et al. 2017."""
    (m1, a), (m2, b) = (_centred(x), _centred(y))
    # With covariances a'a and b'b, the trace of the root of their product is the sum of the singular values of a b'.
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(((m1 - m2) ** 2).sum() + (a * a).sum() + (b * b).sum() - 2 * cross)


def _centred(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean, and a matrix `a` of at most d rows for which a'a is the covariance."""
    mean = x.mean(0)
    a = (x - mean) / np.sqrt(max(len(x) - 1, 1))
    return mean, np.linalg.qr(a, mode="r") if len(a) > a.shape[1] else a


def cmmd(x: np.ndarray, y: np.ndarray, seed: int = 0, progress: Progress | None = None) -> Distance:
    """CMMD, where x and y are CLIP embeddings of length 1: the squared maximum mean discrepancy with a Gaussian kernel,
    times SCALE, by the estimator that counts a picture's kernel with itself (Jayasumana et al. 2024). Its interval and
    what chance gives come from the same pass over the kernel matrix."""
    n, m, rng = len(x), len(y), np.random.default_rng(seed)
    value = np.concatenate([np.full(n, 1 / n), np.full(m, -1 / m)])
    drawn = [rng.multinomial(k, np.full(k, 1 / k), RESAMPLES) / k for k in (n, m)]
    shuffled = np.stack([rng.permutation(value) for _ in range(RESAMPLES)])
    weights = np.concatenate([value[None], np.concatenate([drawn[0], -drawn[1]], 1), shuffled])
    found = _quadratic(np.concatenate([x, y]), weights, progress)
    return _distance(found[0], found[1 : RESAMPLES + 1], found[RESAMPLES + 1 :])


def frechet_distance(x: np.ndarray, y: np.ndarray, seed: int = 0, progress: Progress | None = None) -> Distance:
    """`frechet` with its interval and what chance gives. Each draw decomposes a matrix of d by d numbers if there are
    that many pictures, so few are made then."""
    n, m, rng = len(x), len(y), np.random.default_rng(seed)
    draws = RESAMPLES if min(n, m, x.shape[1]) <= 256 else RESAMPLES // 4
    both, drawn, shuffled = np.concatenate([x, y]), [], []
    for i in range(draws):
        drawn.append(frechet(x[rng.integers(n, size=n)], y[rng.integers(m, size=m)]))
        order = rng.permutation(n + m)
        shuffled.append(frechet(both[order[:n]], both[order[n:]]))
        if progress is not None:
            progress(i + 1, draws)
    return _distance(frechet(x, y), np.array(drawn), np.array(shuffled))


def _distance(value: float, drawn: np.ndarray, shuffled: np.ndarray) -> Distance:
    """A set that is drawn with repeats is further from another than the set itself, so the draws say how far the value
    spreads, and not around what."""
    low, high = value + np.quantile(drawn, (0.025, 0.975)) - drawn.mean()
    return Distance(float(value), Interval(max(0.0, float(low)), float(high)), float(np.quantile(shuffled, 0.95)))
