"""Diffusion in the plane: points instead of pictures; all else is the same. A point is a picture of one pixel with two
channels, so objectives, schedules, samplers and guidance.denoiser work unchanged. For a finite set of points, the
output of the best possible denoiser is known in closed form."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import guidance, samplers, schedules
from . import objective
from .fit import Plan, Report, averaged, fit

HIDDEN, WAVES, BATCH = 128, 8, 256
# Of fit.Plan.
TUNED = {"rate": 6e-3, "optimizer": "adamw", "warmup": 30, "decay": 0.3, "clip": 1.0, "ema": 0.99}
ALPHA_BAR = schedules.alpha_bar(schedules.betas("linear", 1000, 0.0001, 0.02))


def two_moons(n: int, seed: int = 0, noise: float = 0.06) -> np.ndarray:
    """(n, 2): two interlocking half circles of radius 1 around the origin, with about unit spread."""
    rng = np.random.default_rng(seed)
    angle, upper = rng.uniform(0, np.pi, n), rng.random(n) < 0.5
    x = np.where(upper, np.cos(angle), 1 - np.cos(angle)) - 0.5
    y = np.where(upper, np.sin(angle), 0.5 - np.sin(angle)) - 0.25
    return (np.stack([x, y], 1) + noise * rng.standard_normal((n, 2))).astype(np.float32)


def off_moons(points: np.ndarray) -> np.ndarray:
    """The distance of each point from the nearer half circle without noise."""
    x, y = points[:, 0] + 0.5, points[:, 1] + 0.25
    arcs = []
    for u, v in ((x, y), (1 - x, 0.5 - y)):
        ends = np.minimum(np.hypot(u - 1, v), np.hypot(u + 1, v))
        arcs.append(np.where(v >= 0, np.abs(np.hypot(u, v) - 1), ends))
    return np.minimum(*arcs)


class Net(nn.Module):
    """Passes a point, and its time in [0, 1] as waves, through three hidden layers."""

    def __init__(self, time: float):
        super().__init__()
        self.conv_in = nn.Linear(2 + 2 * WAVES, HIDDEN)
        self.hidden = [nn.Linear(HIDDEN, HIDDEN) for _ in range(2)]
        self.conv_out = nn.Linear(HIDDEN, 2)
        self.time = time  # the schedule's largest time

    def __call__(self, x: mx.array, t: float | mx.array) -> mx.array:
        """x (B, 1, 1, 2) at time t, one time for all or (B,)."""
        t = mx.broadcast_to(mx.array(t).reshape(-1, 1) / self.time, (len(x), 1))
        angles = (0.5 * mx.pi * t) * mx.arange(1, WAVES + 1)
        y = self.conv_in(mx.concatenate([x.reshape(-1, 2), mx.sin(angles), mx.cos(angles)], -1))  # (B, hidden)
        for layer in self.hidden:
            y = y + layer(nn.relu(y))
        return self.conv_out(nn.relu(y)).reshape(x.shape)


class Toy:
    """A net, the quantity that it learns to predict, and the schedule and denoiser that samplers need."""

    def __init__(self, prediction: str, seed: int = 0):
        mx.random.seed(seed)
        flow = prediction == "flow"
        self.prediction = prediction
        self.schedule = schedules.Flow() if flow else schedules.Discrete(ALPHA_BAR)
        self.net = Net(1.0 if flow else len(ALPHA_BAR))
        self.denoise = guidance.denoiser(self.net, self.schedule, prediction, {}, dtype=mx.float32)

    def learn(self, points: np.ndarray, steps: int, seed: int = 0) -> Iterator[Report]:
        """Train with the same loop as the built-in model. At the end the net has the mean of its late weights."""

        def batch(step: int) -> tuple[mx.array, ...]:
            rng = np.random.default_rng([seed, step])
            t, level = objective.levels(self.prediction, ALPHA_BAR, objective.stratified(rng, BATCH))
            picks = points[rng.integers(0, len(points), BATCH)]
            x0, noise = (
                mx.array(a.reshape(-1, 1, 1, 2)) for a in (picks, rng.standard_normal(picks.shape, np.float32))
            )
            level = mx.array(level.astype(np.float32))
            x, target = objective.mixture(self.prediction, x0, noise, level)
            return x, level if self.prediction == "flow" else mx.array(t), target

        with TemporaryDirectory() as folder:
            yield from fit(self.net, loss, batch, Plan(steps, **TUNED, save_every=steps), Path(folder))
            averaged(self.net, Path(folder))

    def expected(self, x: np.ndarray, ratio: float) -> np.ndarray:
        """The clean points that the net expects for x (B, 2) = points + ratio * noise, for every kind of prediction."""
        scale, sigma = (1 / (1 + ratio), ratio / (1 + ratio)) if self.prediction == "flow" else (1.0, ratio)
        x0 = self.denoise(mx.array((scale * x).astype(np.float32).reshape(-1, 1, 1, 2)), sigma)
        return np.array(x0).reshape(-1, 2)

    def paths(self, n: int, steps: int = 25, sampler: str = "euler", seed: int = 0) -> np.ndarray:
        """n points on their way from noise, (steps + 1, n, 2), as the net sees them."""
        return paths(self.denoise, self.schedule, n, steps, sampler, seed)


def paths(
    denoise: guidance.Denoise, schedule: schedules.Schedule, n: int, steps: int, sampler: str, seed: int = 0
) -> np.ndarray:
    """n points on their way from noise, (steps + 1, n, 2), as a network sees them."""
    sigmas, row = schedules.sigmas(schedule, "trailing", steps), samplers.SAMPLERS[sampler]
    fn = samplers.of_flow(sampler) if isinstance(schedule, schedules.Flow) else row.fn
    rng = np.random.default_rng(seed)

    def draw() -> mx.array:
        return mx.array(rng.standard_normal((n, 1, 1, 2), np.float32))

    x = draw() * schedule.start(sigmas[0], "trailing")
    noisy = {"draw": draw, "eta": row.eta} if row.noisy else {}
    # Evaluated step by step: the graph of a thousand steps would be slow.
    states = [np.array(x), *(np.array(after) for after, _ in fn(denoise, x, sigmas, **noisy))]
    seen = [state / schedule.spread(sigma) for state, sigma in zip(states, sigmas, strict=True)]
    return np.stack(seen).reshape(steps + 1, n, 2)


def loss(net: Net, x: mx.array, t: mx.array, target: mx.array) -> mx.array:
    return mx.square(net(x, t) - target).mean()


def best(points: np.ndarray, x: np.ndarray, ratio: float) -> np.ndarray:
    """The output of a perfect denoiser of exactly these points for x (B, 2) = points + ratio * noise: the mean of the
    points, each weighted by how probable it makes x."""
    far = ((x[:, None] - points) ** 2).sum(-1) / (2 * ratio**2)
    likely = np.exp(far.min(1, keepdims=True) - far)  # (B, N)
    return (likely @ points) / likely.sum(1, keepdims=True)


RADIUS, SPREAD = 1.6, 0.12  # of the ring, and of each of its blobs


def ring(n: int, blobs: int, seed: int = 0) -> np.ndarray:
    """(n, 2): round blobs, evenly on a circle."""
    rng = np.random.default_rng(seed)
    return centres(blobs)[rng.integers(0, blobs, n)] + SPREAD * rng.standard_normal((n, 2))


def centres(blobs: int) -> np.ndarray:
    angle = 2 * np.pi * np.arange(blobs) / blobs
    return RADIUS * np.stack([np.cos(angle), np.sin(angle)], 1)


def ring_denoiser(blobs: int, flow: bool) -> guidance.Denoise:
    """The best denoiser of the ring, in closed form: of the distribution, not of some of its points. So what a sampler
    gets wrong with it is the sampler's error alone."""
    return blobs_denoiser(centres(blobs), SPREAD, flow)


def blobs_denoiser(middles: np.ndarray, spread: float, flow: bool) -> guidance.Denoise:
    """The best denoiser of equal round blobs around these middles, (n, 2)."""

    def denoise(x: mx.array, sigma: float) -> mx.array:
        x, sigma = np.array(x, np.float64), float(sigma)
        signal, noise = (1 - sigma, sigma) if flow else (1.0, sigma)  # x = signal * x0 + noise * eps
        variance = (signal * spread) ** 2 + noise**2
        away = x.reshape(-1, 1, 2) - signal * middles  # (B, n, 2)
        far = (away**2).sum(-1) / (2 * variance)
        likely = np.exp(far.min(1, keepdims=True) - far)[..., None]  # (B, n, 1)
        x0 = (likely * (middles + signal * spread**2 / variance * away)).sum(1) / likely.sum(1)
        return mx.array(x0.reshape(x.shape).astype(np.float32))

    return denoise


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """Energy distance of two clouds of points: 0 if they have the same distribution (Szekely and Rizzo 2013)."""

    def between(p, q):
        return np.hypot(*(p[:, None] - q).transpose(2, 0, 1)).mean()

    return float(2 * between(a, b) - between(a, a) - between(b, b))
