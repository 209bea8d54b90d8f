"""Four ways to learn to draw, on points in the plane: a GAN, a VAE, a diffusion model and a flow. All have the same
world, batch and number of steps, and hidden layers as wide as those of the toy's network."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as opt
import numpy as np
from mlx.utils import tree_flatten, tree_map

from . import objective, toy

START = -4.0  # of a VAE: from 0 it never learns to use its numbers here
BATCH, PASSES = 128, 20  # points of a step; steps of the two that draw in steps
EMA = 0.99  # the largest share of the mean weights, which draw, that one step keeps
HOLD = 0.4  # after this share of the steps, every rate falls to 0


class Layers(nn.Module):
    """A number of points in, as many out, through three hidden layers."""

    def __init__(self, wide_in: int, wide_out: int):
        super().__init__()
        h = toy.HIDDEN
        self.layers = [nn.Linear(a, b) for a, b in ((wide_in, h), (h, h), (h, h), (h, wide_out))]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers[:-1]:
            x = nn.leaky_relu(layer(x), 0.2)
        return self.layers[-1](x)


class Halves(nn.Module):
    """Of the VAE."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Layers(2, 4), Layers(2, 2)
        self.doubt = mx.full(1, START)  # the logarithm of the variance of what is read


class Gan:
    """A forger makes points of noise, and a critic says of points how real they look to it (Goodfellow et al. 2014).
    Each learns from the other's answers."""

    passes = 1

    def __init__(self, seed: int):
        mx.random.seed(seed)
        self.forger, self.critic = Layers(2, 2), Layers(2, 1)
        rate = {"learning_rate": 2e-3, "betas": [0.5, 0.9]}
        self.optimizers = [opt.Adam(**rate), opt.Adam(**rate)]
        self.averaged = Layers(2, 2)
        critic = _stepper(self.critic, self.optimizers[0], self._critic_loss, also=[self.forger.state])
        forger = _stepper(self.forger, self.optimizers[1], self._forger_loss, self.averaged, [self.critic.state])
        self._steps = critic, forger

    def step(self, points: mx.array, rng: np.random.Generator) -> mx.array:
        """The loss of the forger: how badly it fools the critic."""
        critic, forger = self._steps
        critic(points, _noise(rng, len(points)))
        return forger(_noise(rng, len(points)))

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        return np.array(self.averaged(_noise(rng, n)))

    def _critic_loss(self, critic: nn.Module, real: mx.array, noise: mx.array) -> mx.array:
        said = critic(mx.concatenate([real, self.forger(noise)]))
        return nn.softplus(-said[: len(real)]).mean() + nn.softplus(said[len(real) :]).mean()

    def _forger_loss(self, forger: nn.Module, noise: mx.array) -> mx.array:
        return nn.softplus(-self.critic(forger(noise))).mean()


class Vae:
    """An encoder writes a point as two numbers with a doubt, a decoder reads it from them, and the numbers must look
    like noise, so that noise can be read as a point (Kingma and Welling 2014)."""

    passes = 1

    def __init__(self, seed: int):
        mx.random.seed(seed)
        self.net, self.averaged = Halves(), Halves()
        self.optimizers = [opt.Adam(2e-3)]
        self._step = _stepper(self.net, self.optimizers[0], self._loss, self.averaged)

    def step(self, points: mx.array, rng: np.random.Generator) -> mx.array:
        return self._step(points, _noise(rng, len(points)))

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """With the grain that the model itself gives its points. Without it they would be smoother than its world."""
        points = self.averaged.decoder(_noise(rng, n))
        return np.array(points + mx.exp(self.averaged.doubt / 2) * _noise(rng, n))

    def _loss(self, net: nn.Module, points: mx.array, noise: mx.array) -> mx.array:
        mean, doubt = net.encoder(points).split(2, axis=-1)
        read = net.decoder(mean + mx.exp(doubt / 2) * noise)
        off = (mx.square(points - read) * mx.exp(-net.doubt) + net.doubt).sum(-1)
        return (off + (mx.square(mean) + mx.exp(doubt) - doubt - 1).sum(-1)).mean() / 2


class Steps:
    """The toy of lesson 8, which draws in steps. prediction: "v" for the diffusion model, "flow" for the flow."""

    passes = PASSES

    def __init__(self, prediction: str, seed: int):
        self.toy, self.averaged = toy.Toy(prediction, seed), toy.Toy(prediction, seed)
        self.optimizers = [opt.Adam(6e-3)]
        self._step = _stepper(self.toy.net, self.optimizers[0], toy.loss, self.averaged.net)

    def step(self, points: mx.array, rng: np.random.Generator) -> mx.array:
        kind, x0 = self.toy.prediction, points.reshape(-1, 1, 1, 2)
        t, level = objective.levels(kind, toy.ALPHA_BAR, objective.stratified(rng, len(points)))
        level = mx.array(level.astype(np.float32))
        x, target = objective.mixture(kind, x0, _noise(rng, len(points)).reshape(x0.shape), level)
        return self._step(x, level if kind == "flow" else mx.array(t.astype(np.float32)), target)

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        sampler = "euler" if self.toy.prediction == "flow" else "dpmpp_2m"
        return self.averaged.paths(n, PASSES, sampler, seed=int(rng.integers(2**31)))[-1]


RIVALS: dict[str, Callable] = {
    "GAN": Gan,
    "VAE": Vae,
    "diffusion": partial(Steps, "v"),
    "flow": partial(Steps, "flow"),
}


class Training(NamedTuple):
    moments: tuple[int, ...]  # steps done, at which points were drawn
    clouds: list[np.ndarray]  # (n, 2) at each of them
    losses: np.ndarray  # (steps,)
    learned: float  # seconds, without the drawing
    drawn: float  # seconds for the last cloud
    weights: int
    passes: int  # of a network for a point


def train(name: str, points: np.ndarray, steps: int, moments: tuple[int, ...], n: int, seed: int) -> Iterator:
    """Train a rival; yields the steps done, and at last its Training."""
    rng, rival, losses, clouds = np.random.default_rng([seed, 0]), RIVALS[name](seed=seed), [], []
    rates, learned, drawn = [float(r.learning_rate) for r in rival.optimizers], 0.0, 0.0
    for step in range(steps + 1):
        if step in moments:
            begin = time.perf_counter()
            clouds.append(rival.draw(n, np.random.default_rng([seed, 1])))
            drawn = time.perf_counter() - begin
            yield step
        if step == steps:
            break
        begin = time.perf_counter()
        for chosen, rate in zip(rival.optimizers, rates, strict=True):
            chosen.learning_rate = rate * min(1.0, (1 - step / steps) / (1 - HOLD))
        losses.append(rival.step(mx.array(points[rng.integers(0, len(points), BATCH)]), rng).item())
        learned += time.perf_counter() - begin
    yield Training(moments, clouds, np.array(losses), learned, drawn, _weights(rival), rival.passes)


def _weights(rival: Gan | Vae | Steps) -> int:
    nets = {Gan: ("forger", "critic"), Vae: ("net",)}.get(type(rival))
    modules = [rival.toy.net] if nets is None else [getattr(rival, name) for name in nets]
    return sum(value.size for module in modules for _, value in tree_flatten(module.parameters()))


def _noise(rng: np.random.Generator, n: int) -> mx.array:
    return mx.array(rng.standard_normal((n, 2), np.float32))


def _stepper(
    net: nn.Module, chosen: opt.Optimizer, loss: Callable, averaged: nn.Module | None = None, also: list = ()
) -> Callable:
    """One compiled step of learning. averaged: gets the running mean of the net's weights. also: the state of networks
    that the loss reads beside its own."""
    chosen.init(net.trainable_parameters())
    gradient, state = (
        nn.value_and_grad(net, loss),
        [net.state, chosen.state, *([] if averaged is None else [averaged.state])],
    )
    done = 0

    @partial(mx.compile, inputs=[*state, *also], outputs=state)
    def step(follow: mx.array, *batch: mx.array) -> mx.array:
        value, grads = gradient(net, *batch)
        chosen.update(net, grads)
        if averaged is not None:
            near = tree_map(lambda mean, now: mean + follow * (now - mean), averaged.parameters(), net.parameters())
            averaged.update(near)
        return value

    def run(*batch: mx.array) -> mx.array:
        nonlocal done
        done += 1
        value = step(mx.array(max(1 - EMA, 11 / (done + 11))), *batch)  # at first the mean follows closely
        mx.eval(value, state)
        return value

    return run
